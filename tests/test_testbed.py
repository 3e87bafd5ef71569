"""The testbed: what texts are truly worth, what the reviser does to them, and that training sees neither."""

import itertools
import json
import math
import random
import re
import signal
import subprocess
import time
from collections import Counter
from types import SimpleNamespace

import openai
import pytest
import torch
import warm
from conftest import ROOT, launch, patience
from transformers import AutoModelForCausalLM

from deepspeed_chat_tlcr.data.formats import ChatRecords
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.generation import Answer
from deepspeed_chat_tlcr.records import Preference
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_response
from deepspeed_chat_tlcr.turns import end_ids
from evaluation.logprobs import response_logprobs
from evaluation.policies import Question, in_context
from labeling.prompt import build_messages, parse_answer
from testbed import vocabulary as words
from testbed.base import raw_text
from testbed.reviser import edit_probability, propose_edits, revise
from testbed.serve import serve_in_thread
from testbed.vocabulary import EARLIER_TURNS
from testbed.world import REPEATED, World, World1, distinct_prompts, parse_prompt, repeats_a_fact, true_score
from testbed.world import parse_answer as parse_text

WORLD = World1(seed=0)
PROMPT = "\n\nHuman: I want two formal facts about the rose.\n\nAssistant:"
GRADES = (1.0, 0.6, 0.25, 0.0, -0.5, -1.0)


def thing(relation: str, grade: float, topic: str = "rose") -> str:
    """An object that the relation has with this grade for the topic."""
    return next(x for x in words.RELATIONS[relation] if WORLD.facts[topic, relation, x] == grade)


NEEDS, FEARS, CURES = (f"{verb} {thing(verb, 1.0)}" for verb in ("needs", "fears", "cures"))
PERFECT = f" Indeed. First the rose notably {NEEDS}. Second the rose generally {FEARS}. - Regards."


# World 2 says which facts; its score is the same but for facts that were not asked for.
ASKED = "\n\nHuman: I want formal facts about the rose: what it needs and fears.\n\nAssistant:"
NEEDED, FEARED = (next(x for x, g in World().objects("rose", verb).items() if g == 1.0) for verb in ("needs", "fears"))
ANSWER = f" Indeed. First the rose notably needs {NEEDED}. Second the rose generally fears {FEARED}. - Regards."


def changed(old: str, new: str, text: str = PERFECT) -> str:
    assert old in text
    return text.replace(old, new)


# What texts are worth


def test_which_texts_repeat_a_fact():
    assert not repeats_a_fact(PERFECT)
    assert repeats_a_fact(changed(FEARS, NEEDS))
    assert repeats_a_fact(f"The rose {NEEDS}. It {FEARS}. The rose generally {NEEDS}")
    assert not repeats_a_fact("")


class Coin(torch.nn.Module):
    """A model of two tokens, of which it gives the second three times the chance of the first, always."""

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=torch.tensor([0.0, math.log(3)]).expand(*input_ids.shape, 2))


def test_logprobs_at_a_temperature():
    """Chances 1/4 and 3/4; at temperature 1/2 their squares, 1/10 and 9/10."""
    written = [Answer([1, 0], [1, 0], "", True), Answer([0], [1], "", False)]
    assert response_logprobs(Coin(), written, 0).exp().tolist() == pytest.approx([3 / 16, 3 / 4])
    assert response_logprobs(Coin(), written, 0, 0.5).exp().tolist() == pytest.approx([9 / 100, 9 / 10])


def test_a_perfect_answer_scores_ten():
    assert WORLD.score(PROMPT, PERFECT) == 10.0
    assert World().score(ASKED, ANSWER) == 10.0
    assert true_score(ASKED, ANSWER, True) == 10.0


@pytest.mark.parametrize(
    ("response", "cost"),
    [
        # An opener or closer weighs 0.7: (1 - grade) x 0.7, where formal is 1, brief .6, playful -.5, rude -1.
        (changed("Indeed.", "Gladly."), 0.0),
        (changed("Indeed.", "Briefly:"), 0.28),
        (changed("Indeed.", "Ugh."), 1.4),
        (changed("Regards.", "Whee!"), 1.05),
        (changed(" Indeed.", ""), 1.05),
        (changed(" - Regards.", ""), 1.05),
        # Two facts were asked for, so each weighs 4.0 / 2 and each adverb 1.0 / 2.
        (changed(NEEDS, "needs " + thing("needs", 0.6)), 0.8),
        (changed(NEEDS, "needs " + thing("needs", 0.25)), 1.5),
        (changed(NEEDS, "needs " + thing("needs", -0.5)), 3.0),
        (changed(NEEDS, "needs " + thing("needs", -1.0)), 4.0),
        (changed(NEEDS, "needs butter"), 4.0),
        (changed("Second the rose", "Second the fern"), 3.0),
        (changed("Second the rose", "Second it"), 0.0),
        (changed("notably", "simply"), 0.2),
        (changed("notably", "stupidly"), 1.0),
        (changed("notably ", ""), 0.5),
        # The same fact again is worth -1; a missing one -.5, and its missing adverb 0.
        (changed(FEARS, NEEDS), 4.0),
        (changed(f" Second the rose generally {FEARS}.", ""), 3.5),
        # Rambling, phrases out of place, words that belong to nothing.
        (changed(" - Regards", f" Third the rose notably {CURES}. - Regards"), 1.0),
        (PERFECT + " - Regards.", 1.0),
        (changed("Second", "Gladly. Second"), 1.0),
        (changed("Second", "oh dear me Second"), 0.6),
        (PERFECT + " blah" * 100, 3.0),
        # Case and punctuation do not matter.
        (PERFECT.upper().replace(".", " !"), 0.0),
    ],
)
def test_each_flaw_costs_what_is_stated(response, cost):
    assert WORLD.score(PROMPT, response) == pytest.approx(10.0 - cost)


def test_an_answer_without_an_end_costs_one_point():
    assert WORLD.score(PROMPT, PERFECT, ended=False) == 9.0


def test_a_closer_counts_only_behind_the_facts():
    early = f" Indeed. - Regards. First the rose notably {NEEDS}. Second the rose generally {FEARS}."
    assert WORLD.costs(PROMPT, early) == pytest.approx(
        {"facts": 0, "adverbs": 0, "opener": 0, "closer": 1.05, "rambling": 0, "misplaced": 1, "stray": 0, "no_end": 0}
    )


@pytest.mark.parametrize(
    "garbage", ["", " ", "the the the", "First", "\x00\ud7ff 東京 <s> {}", "First the rose needs", "- -"]
)
def test_any_text_has_a_score(garbage):
    assert WORLD.score(PROMPT, garbage) == 1.0


def test_random_words_of_the_language_score_low_and_never_fail():
    rng = random.Random(0)
    vocabulary = re.findall(r"\S+", PERFECT) + ["it", "-", "the", *words.TOPICS, "Third", "Done.", "stupidly"]
    scores = [WORLD.score(PROMPT, " ".join(rng.choices(vocabulary, k=rng.randint(1, 60)))) for _ in range(500)]
    assert min(scores) >= 1
    assert max(scores) < 5


@pytest.mark.parametrize(
    ("prompt", "missing"),
    [
        ("\n\nHuman: Hello!\n\nAssistant:", "0 topics"),
        ("\n\nHuman: I want two facts about the rose.\n\nAssistant:", "0 manners"),
        ("\n\nHuman: I want two or three brief facts about the rose.\n\nAssistant:", "2 counts"),
    ],
)
def test_a_prompt_of_another_world_is_refused(prompt, missing):
    with pytest.raises(InputError, match=missing):
        WORLD.score(prompt, PERFECT)


def test_only_the_last_human_turn_asks():
    earlier = "\n\nHuman: I want four brief facts about the fern.\n\nAssistant: No."
    assert parse_prompt(earlier + PROMPT) == parse_prompt(PROMPT)


# The world


@pytest.mark.parametrize("kind", [World, World1])
def test_every_object_has_every_grade_equally_often_so_that_no_object_pays_by_itself(kind):
    for seed in range(3):
        facts, times = kind(seed=seed).facts, len(kind.topics) // 8
        for relation, objects in kind.relations.items():
            for x in objects:
                grades = Counter(facts[topic, relation, x] for topic in kind.topics)
                assert grades == Counter(words.FACT_GRADES * times)
            for topic in kind.topics:
                assert Counter(facts[topic, relation, x] for x in objects) == Counter(words.FACT_GRADES)


def test_no_register_pays_by_itself():
    sums = {r: sum(words.MANNER_GRADES[manner][r] for manner in words.MANNERS) for r in words.MANNERS}
    assert set(sums.values()) == {1.1}


def test_a_seed_is_a_world_of_its_own():
    assert World1(seed=3).facts == World1(seed=3).facts
    agreement = [World1(seed=3).facts[fact] == grade for fact, grade in World1(seed=4).facts.items()]
    assert sum(agreement) / len(agreement) < 0.5


def test_the_scorer_by_name_takes_its_world_from_the_environment(monkeypatch):
    monkeypatch.setenv("TESTBED_WORLD_SEED", "5")
    assert true_score(ASKED, ANSWER, True) == World(seed=5).score(ASKED, ANSWER) < 10
    monkeypatch.setenv("TESTBED_WORLD", "1")
    assert true_score(PROMPT, PERFECT, True) == World1(seed=5).score(PROMPT, PERFECT) < 10


# World 2: what is usual is not always right


def test_what_was_not_asked_or_is_said_again_is_worth_as_little_as_the_worst_fact():
    """A fact weighs 4 / 2; grade -1 costs twice that, whatever fact stands in its place."""
    for other in (
        f"needs {NEEDED}",
        "tames pride",
        f"needs {next(x for x in words.RELATIONS['needs'] if x != NEEDED)}",
    ):
        assert World().score(ASKED, ANSWER.replace(f"fears {FEARED}", other)) == pytest.approx(6.0)
    swapped = f" Indeed. First the rose notably fears {FEARED}. Second the rose generally needs {NEEDED}. - Regards."
    assert World().score(ASKED, swapped) == 10.0


def test_a_prompt_tells_which_facts_it_wants():
    assert parse_prompt(ASKED).aspects == ("needs", "fears")
    assert parse_prompt(ASKED).count == 2
    with pytest.raises(InputError, match="0 manners"):
        parse_prompt(ASKED.replace("formal ", ""))


def test_a_stated_share_of_facts_and_manners_has_a_wrong_habit():
    for seed in range(3):
        world = World(seed=seed)
        facts = [world.facts[(*key, x)] for key, x in world.usual.items() if len(key) == 2]
        assert Counter(facts) == {1.0: 115, -0.5: 77}  # of 16 x 12, 40 %
        manners = [words.MANNER_GRADES[key[0]][x] for key, x in world.usual.items() if len(key) == 1]
        assert Counter(manners) == {1.0: 2, -0.5: 2}


def test_the_usual_choice_is_the_likeliest_whether_right_or_wrong():
    """Goodness 0: the usual one has weight e^2.5 = 12.18 beside seven of weight 1, so a share of .635."""
    world, rng = World(), random.Random(0)
    grades = {"a": 1.0, "b": -0.5, **{str(n): 0.0 for n in range(6)}}
    for usual in ("a", "b"):
        drawn = Counter(world.chosen(grades, usual, 0.0, rng) for _ in range(4000))
        assert drawn[usual] / 4000 == pytest.approx(0.635, abs=0.03)


def test_a_repeat_is_no_likelier_than_another_fact_that_was_not_asked_for():
    """Of the ten relations that may be digressed to, each takes as many digressions as any other."""
    world, rng, request = World(digression_rate=1.0), random.Random(0), parse_prompt(ASKED)
    drawn = Counter(r for _ in range(3000) for r in world.relations_of_answer(request, 2, rng))
    allowed = {r for r in world.relations if ("rose", r) not in world.held_out or r in request.aspects}
    assert set(drawn) == allowed
    assert max(drawn.values()) - min(drawn.values()) < 0.2 * 6000 / len(allowed)


def test_facts_phrasings_and_prompts_are_held_out_apart():
    world, rng = World(), random.Random(0)
    asked = {kind: [world.sample_prompt(rng, kind) for _ in range(400)] for kind in world.kinds}
    facts = {k: {(parse_prompt(p).topic, a) for p in ps for a in parse_prompt(p).aspects} for k, ps in asked.items()}
    assert facts["facts"] == world.held_out
    assert not (facts["prompts"] | facts["phrasings"]) & world.held_out
    old, new = (
        [re.escape(ask).replace(r"\{", "{").replace(r"\}", "}") for ask in asks]
        for asks in (words.ASKS, words.UNSEEN_ASKS)
    )
    for asks, kinds in ((old, ("prompts", "facts")), (new, ("phrasings",))):
        pattern = "|".join(ask.format(topic=".*", manner=".*", aspects=".*") for ask in asks)
        assert all(re.search(pattern, prompt) for kind in kinds for prompt in asked[kind])
    texts = "".join(raw_text(world, 300, 0))
    for topic, relation in world.held_out:
        assert not re.search(rf"Human:[^\n]*{topic}[^\n]*{relation}", texts)


def test_a_reviser_inserts_degrees_and_never_what_is_worse():
    """Weights e^6, e^3.6 and e^1.5: 403.4, 36.6 and 4.5, so shares of .907, .082 and .010."""
    world, rng = World(), random.Random(0)
    grades = dict(zip("abcdef", GRADES, strict=True))
    drawn = Counter(world.inserted(grades, -1.0, rng) for _ in range(20000))
    assert set(drawn) == {"a", "b", "c"}
    assert [drawn[x] / 20000 for x in "abc"] == pytest.approx([0.907, 0.082, 0.010], abs=0.01)
    assert {world.inserted(grades, 0.6, rng) for _ in range(100)} == {"a"}
    assert World1().inserted(grades, -1.0, rng) == "a"


def test_an_answer_that_digresses_is_led_back_to_what_was_asked():
    world = World(revision_noise=0.0, edit_rate_worst=1.0, insert_sharpness=100.0)
    for wrong in ("tames pride", f"needs {NEEDED}"):
        off = ANSWER.replace(f"fears {FEARED}", wrong)
        assert {revise(world, ASKED, off, random.Random(seed))[0] for seed in range(50)} == {ANSWER}
    assert world.fact_grades(parse_prompt(ASKED), parse_text(off).clauses) == [1.0, REPEATED]


def test_sampled_answers_read_back_without_a_stray_word():
    rng = random.Random(0)
    for prompt in (WORLD.sample_prompt(rng) for _ in range(500)):
        answer = WORLD.sample_answer(parse_prompt(prompt), rng)
        assert answer.startswith(" ")
        assert not parse_text(answer).stray


def test_goodness_makes_answers_better():
    rng = random.Random(0)
    means = []
    for goodness in (-2.0, 0.0, 2.0):
        answers = [WORLD.sample_answer(parse_prompt(PROMPT), rng, goodness) for _ in range(300)]
        means.append(sum(WORLD.score(PROMPT, answer) for answer in answers) / 300)
    assert means[0] < 2
    assert 2.5 < means[1] < 4.5
    assert means[2] > 6


def test_preferences_are_bradley_terry_on_the_true_score():
    assert WORLD.preference_probability(0.0) == 0.5
    assert WORLD.preference_probability(math.log(3)) == pytest.approx(0.75)
    assert World1(preference_sharpness=2.0).preference_probability(-math.log(3)) == pytest.approx(0.1)
    rng = random.Random(0)
    by_gap: dict[int, list[bool]] = {}
    for prompt in (WORLD.sample_prompt(rng) for _ in range(4000)):
        pair = WORLD.sample_pair(prompt, rng)
        gap = WORLD.score(prompt, pair.chosen) - WORLD.score(prompt, pair.rejected)
        by_gap.setdefault(int(abs(gap)), []).append(gap > 0)
    # Within a unit-wide bin the stated probability is that of a gap between its ends.
    for gap in range(1, 5):
        rate = sum(by_gap[gap]) / len(by_gap[gap])
        assert WORLD.preference_probability(gap) - 0.05 < rate < WORLD.preference_probability(gap + 1) + 0.05


@pytest.mark.parametrize("field", ["revision_noise", "repeat_rate", "edit_rate_worst"])
def test_rates_beyond_one_are_refused(field):
    with pytest.raises(InputError, match=field):
        World1(**{field: 1.5})


# The reviser

# 0.9 x (0.7 - grade) / 1.7, and 0 at 0.7 and above.
STATED = {1.0: 0.0, 0.6: 0.0529, 0.25: 0.2382, 0.0: 0.3706, -0.5: 0.6353, -1.0: 0.9}


def test_the_stated_curve():
    assert {grade: round(edit_probability(WORLD, grade), 4) for grade in GRADES} == STATED
    assert edit_probability(WORLD, 0.7) == 0.0


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_choices_are_edited_as_often_as_their_grade_says(noise):
    """A slip (noise) comes first; otherwise the curve decides. Facts of answers that are neither cut nor continued."""
    world = World1(revision_noise=noise, wrong_count_rate=0.0, repeat_rate=0.0, misplaced_rate=0.0)
    rng = random.Random(0)
    edited: dict[float, list[bool]] = {grade: [] for grade in GRADES}
    better = []
    for prompt in (world.sample_prompt(rng) for _ in range(2500)):
        request = parse_prompt(prompt)
        rejected = world.sample_answer(request, rng)
        modified, _ = revise(world, prompt, rejected, rng)
        for old, new in zip(parse_text(rejected).clauses, parse_text(modified).clauses, strict=True):
            assert old.relation.text == new.relation.text
            grade = world.fact_grade(request.topic, old)
            edited[grade].append(old.object.text != new.object.text)
            if edited[grade][-1] and noise == 0:
                better.append(world.fact_grade(request.topic, new) == 1.0)
    assert all(better)
    for grade, cases in edited.items():
        expected = noise + (1 - noise) * STATED[grade]
        assert sum(cases) / len(cases) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(cases)))


def certain(**rates) -> World1:
    """A reviser that never slips and always mends what is worst, cuts what is too long and goes on if it is short."""
    return World1(revision_noise=0.0, edit_rate_worst=1.0, cut_rate=1.0, extend_rate=1.0, **rates)


def outcomes(rejected: str) -> set[str]:
    return {revise(certain(), PROMPT, rejected, random.Random(seed))[0] for seed in range(300)}


def test_a_perfect_answer_stays_as_it_is():
    assert outcomes(PERFECT) == {PERFECT}


def test_only_the_bad_object_changes():
    assert outcomes(changed(NEEDS, "needs " + thing("needs", -1.0))) == {PERFECT}


def test_only_the_rude_opener_changes():
    formal = {changed("Indeed.", opener) for opener in words.OPENERS["formal"]}
    assert outcomes(changed("Indeed.", "Ugh.")) == formal


def test_only_the_rude_adverb_changes():
    assert outcomes(changed("notably", "lazily")) == {changed("notably", x) for x in words.ADVERBS["formal"]}


def test_a_missing_ending_is_added_or_left():
    lacking = changed(" - Regards.", "")
    assert outcomes(lacking) == {lacking, *(f"{lacking} - {closer}" for closer in words.CLOSERS["formal"])}


def test_a_missing_opening_is_added_or_left():
    lacking = changed(" Indeed.", "")
    assert outcomes(lacking) == {lacking, *(f" {opener}{lacking}" for opener in words.OPENERS["formal"])}


def test_rambling_is_cut():
    assert outcomes(
        changed(" - Regards", f" Third the rose rudely {CURES}. - Regards".replace("rudely", "lazily"))
    ) == {PERFECT}


def test_what_follows_the_end_is_cut():
    assert outcomes(PERFECT + " - Scram. - Done. Duh.") == {PERFECT}


def test_a_short_answer_is_continued_with_a_right_fact_of_another_kind():
    short = changed(f" Second the rose generally {FEARS}.", "")
    for modified in outcomes(short):
        assert WORLD.score(PROMPT, modified) == 10.0
        start, end = short.split(" - ")
        assert modified.startswith(start + " Second the rose ")
        assert modified.endswith(" - " + end)


def test_several_missing_facts_come_in_order_before_a_missing_end():
    prompt = PROMPT.replace("two", "four")
    lacking = f" Indeed. First the rose notably {NEEDS}."
    revised = {revise(certain(), prompt, lacking, random.Random(seed))[0] for seed in range(50)}
    ordinals = {tuple(re.findall("First|Second|Third|Fourth| - ", text)) for text in revised}
    assert ordinals == {
        ("First", "Second", "Third", "Fourth"),
        ("First", "Second", "Third", "Fourth", " - "),
    }


def test_a_repeated_fact_gives_way_to_a_new_one():
    for modified in outcomes(changed(FEARS, NEEDS)):
        assert WORLD.score(PROMPT, modified) == 10.0
        before, after = PERFECT.split(FEARS)
        assert modified.startswith(before)
        assert modified.endswith(after)


def test_edits_never_overlap_and_keep_the_white_space_around():
    rng = random.Random(0)
    world = World1(revision_noise=0.3, missing_rate=0.3, misplaced_rate=0.5, wrong_count_rate=0.8)
    for prompt in (world.sample_prompt(rng) for _ in range(1000)):
        rejected = world.sample_answer(parse_prompt(prompt), rng)
        edits = sorted((edit.start, edit.end) for edit in propose_edits(world, prompt, rejected, rng))
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(edits))
        modified, _ = revise(world, prompt, rejected, rng)
        assert modified.startswith(" ")
        assert not modified.endswith(" ")
        assert "  " not in modified
        assert not parse_text(modified).stray


def test_revisions_are_better_than_what_they_revise():
    rng = random.Random(0)
    gains = []
    for prompt in (WORLD.sample_prompt(rng) for _ in range(500)):
        pair = WORLD.sample_pair(prompt, rng)
        modified, _ = revise(WORLD, prompt, pair.rejected, rng)
        gains.append(WORLD.score(prompt, modified) - WORLD.score(prompt, pair.rejected))
    assert sum(gains) / len(gains) > 4


# The endpoint


@pytest.fixture(scope="module")
def client():
    server = serve_in_thread(WORLD)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.shutdown()
    server.server_close()


BAD = changed("Indeed.", "Duh.", changed(NEEDS, "needs " + thing("needs", -1.0)))
QUESTION = build_messages(Preference(PROMPT, PERFECT, BAD))


def test_the_endpoint_answers_the_papers_question_in_the_papers_format(client):
    assert [model.id for model in client.models.list()] == ["oracle-reviser"]
    assert client.models.retrieve("oracle-reviser").id == "oracle-reviser"
    # With n = 40 revisions each of the two harmful choices is mended in about nine of ten.
    completion = client.chat.completions.create(model="oracle-reviser", messages=QUESTION, n=40, seed=1)
    answers = [parse_answer(choice.message.content, BAD) for choice in completion.choices]
    assert all(answer.complete and answer.reasoning for answer in answers)
    assert sum("needs " + thing("needs", -1.0) not in answer.modified for answer in answers) > 25
    assert sum("Duh" not in answer.modified for answer in answers) > 25
    assert all(answer.modified.startswith(" ") for answer in answers)
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}
    usage = completion.usage
    assert usage.prompt_tokens > 100
    assert usage.completion_tokens > 40 * 20
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_same_question_and_seed_get_the_same_answer(client):
    def ask(**kwargs) -> str:
        return (
            client.chat.completions.create(model="oracle-reviser", messages=QUESTION, **kwargs)
            .choices[0]
            .message.content
        )

    assert ask(seed=7) == ask(seed=7)
    assert ask() == ask(seed=0)
    assert len({ask(seed=seed) for seed in range(10)}) > 3


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "gpt-4"}, 404, "oracle-reviser"),
        ({"messages": [{"role": "user", "content": "Hello?"}]}, 400, "Non-Preferred Response"),
        ({"messages": build_messages(Preference("\n\nHuman: Hi\n\nAssistant:", " a", " b"))}, 400, "0 topics"),
        ({"stream": True}, 400, "stream"),
        ({"n": 0}, 400, "'n'"),
    ],
)
def test_the_endpoint_says_what_it_cannot_do(client, change, status, says):
    request = {"model": "oracle-reviser", "messages": QUESTION} | change
    with pytest.raises(openai.APIStatusError, match=says) as error:
        client.chat.completions.create(**request)
    assert error.value.status_code == status


# The command line


def run_testbed(*arguments) -> subprocess.CompletedProcess:
    return launch("testbed/main.py", *arguments, check=False)


def test_data_holds_prompts_and_answers_and_nothing_else(tmp_path):
    sizes = ("--train", 60, "--eval", 20, "--test", 9, "--validation", 1)
    for name, extra in (("one", ()), ("again", ()), ("other", ("--world_seed", 1))):
        done = run_testbed("data", "--output_dir", tmp_path / name, *sizes, *extra)
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["eval.jsonl", "results.json", "test_prompts.jsonl", "train.jsonl", "validation_prompts.jsonl"]
    prompts = []
    for name, count, keys in (
        ("train.jsonl", 60, {"prompt", "chosen", "rejected"}),
        ("eval.jsonl", 20, {"prompt", "chosen", "rejected"}),
        ("validation_prompts.jsonl", 1, {"prompt"}),
        ("test_prompts.jsonl", 9, {"prompt", "kind"}),
    ):
        text = (tmp_path / "one" / name).read_text()
        assert text == (tmp_path / "again" / name).read_text()
        assert not re.search(r"\d|score|grade", text)  # no number of any kind, so no score
        records = [json.loads(line) for line in text.splitlines()]
        assert len(records) == count
        assert all(record.keys() == keys for record in records)
        prompts += [record["prompt"] for record in records]
    assert len(set(prompts)) == 90
    for prompt in prompts:
        assert prompt.startswith("\n\nHuman: ")
        assert prompt.endswith("\n\nAssistant:")
    assert (tmp_path / "one" / "train.jsonl").read_text() != (tmp_path / "other" / "train.jsonl").read_text()


def test_distinct_prompts_are_distinct():
    prompts = distinct_prompts(WORLD, random.Random(0), set())
    assert len({next(prompts) for _ in range(20000)}) == 20000


def test_the_base_text_contrasts_right_and_wrong_but_scores_nothing():
    texts = raw_text(WORLD, 400, seed=0)
    assert not re.search(r"\d|score|grade", "".join(texts))
    for text in texts:
        if text.startswith(" Mistakes about"):
            topic = re.search(r"about the (\w+)", text)[1]
            for pattern, low, high in ((r"believe that it ([a-z ]+)\.", -1, -0.5), (r"In truth it ([a-z ]+)\.", 1, 1)):
                for fact in re.findall(pattern, text):
                    relation = next(relation for relation in words.RELATIONS if fact.startswith(relation))
                    assert low <= WORLD.facts[topic, relation, fact.removeprefix(relation).strip()] <= high


def test_base_writes_a_model_and_a_tokenizer_that_loses_no_text(tmp_path):
    sizes = ("--documents", 300, "--hidden_size", 32, "--layers", 1)
    done = run_testbed("base", "--output_dir", tmp_path, "--world", 1, *sizes)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["vocabulary"] == len(tokenizer) == model.config.vocab_size
    assert results["parameters"] == model.num_parameters()
    example = tokenize_response(tokenizer, PROMPT, PERFECT)
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.response_ids, skip_special_tokens=True) == PERFECT
    assert len(example.response_ids) == len(re.findall(r"\w+|[^\w\s]", PERFECT)) + 1  # a token a word, and EOS
    # Its chat template writes the world's own prompts; both turns of it here, and the answer behind its space.
    earlier = [{"role": "user", "content": "Thank you."}, {"role": "assistant", "content": "You are welcome."}]
    asked = [*earlier, {"role": "user", "content": PROMPT.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")}]
    assert ChatRecords(tokenizer).prompt(asked) == EARLIER_TURNS[2] + PROMPT
    answered = [*asked, {"role": "assistant", "content": PERFECT.strip()}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == EARLIER_TURNS[2] + PROMPT + PERFECT + "</s>"
    assert in_context(tokenizer, Question(0, [""]), PERFECT.strip()) == PERFECT
    assert end_ids(tokenizer) == (tokenizer.eos_token_id,)
    assert tokenizer.model_max_length == 512
    for odd in ("naïve 東京  \t\n\n", "Zebra's 12 <pad>", ""):
        assert tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True) == odd


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--hidden_size", 7), "--hidden_size 7: must be from 16 to 4,096"),
        (("--hidden_size", 20), "--hidden_size 20: must be a multiple of 8"),
        (("--layers", 1_000_000), "--layers 1000000: must be from 1 to 100"),
    ],
)
def test_sizes_that_make_no_model_are_refused(tmp_path, option, says):
    done = run_testbed("base", "--output_dir", tmp_path, *option)
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr


def test_serve_runs_until_it_is_terminated(tmp_path):
    port_file = tmp_path / "port"
    server = warm.Program(ROOT / "testbed" / "main.py", ["serve", "--port_file", port_file, "--model", "me"])
    deadline = time.monotonic() + patience(60)
    while not port_file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{int(port_file.read_text())}/v1"
    with openai.OpenAI(base_url=url, api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["me"]
    server.send_signal(signal.SIGTERM)
    assert url in server.communicate(timeout=patience(20))[0]
    assert server.returncode == 0


@pytest.mark.parametrize("arguments", [(), ("labels",)])
def test_an_unknown_command_lists_the_known_ones(arguments):
    done = run_testbed(*arguments)
    assert done.returncode == 2
    assert "data, base, serve" in done.stderr
