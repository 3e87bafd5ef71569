"""Rewards that stand beside TLCR's: by hand, through step 3, and by models with another tokenizer than the policy's."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import step2_discriminator.main as step2
import step3_ppo_tlcr.main as step3
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import load_token_classifier, squash
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation import curves
from evaluation.results import load_results
from step2_discriminator.objectives import aggregate, pair_loss
from step3_ppo_tlcr.averages import RunningScale
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.options import parse_args
from step3_ppo_tlcr.reward_models import RewardModel, normalised
from step3_ppo_tlcr.rewards import (
    REWARDS,
    attention_reward,
    redistributed_reward,
    segment_reward,
    sequence_reward,
    token_score_reward,
    uniform_reward,
)
from step3_ppo_tlcr.scores import ATTENTION, last_attention
from step3_ppo_tlcr.segments import clauses, sentences
from step3_ppo_tlcr.texts import Answer, answers_of, project, read_by


def close(found: torch.Tensor, expected: list, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=atol, rtol=0)


# By hand


def test_abc_by_hand():
    """R = 2, beta .5, attention prompt .4 and response (.1, .2, .3): the prompt's part is left out."""
    mask = torch.tensor([[1.0, 1, 1, 0]])
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.9]])  # the last is behind the end and must not count
    for score in (2.0, -2.0):
        rewards = attention_reward(torch.full((1, 1), score), attention, mask, beta=0.5)
        close(rewards * score / 2, [[0.1667, 0.3333, 1.5, 0.0]])
        assert rewards.sum().item() == pytest.approx(score)
    close(attention_reward(torch.full((1, 1), 2.0), attention, mask, beta=0.0), [[0.0, 0, 2, 0]])
    close(uniform_reward(torch.full((1, 1), 9.0), mask), [[5 / 3, 5 / 3, 5 / 3, 0.0]])  # 9 is clipped to 5


def test_the_control_of_credit_keeps_the_sums():
    probs, mask = torch.tensor([[0.9, 0.1, 0.8, math.nan]]), torch.tensor([[1.0, 1, 1, 0]])
    close(redistributed_reward(probs, mask), [[0.2, 0.2, 0.2, 0.0]])  # (.8 - .8 + .6) / 3


def test_fine_grained_by_hand():
    """Ten tokens of a character: sub-sentences end at 3 (good) and 9 (bad), the sentence at 9 has an error."""
    answer = Answer("", "abcdefghij", [(at, at + 1) for at in range(10)], ended=False)
    mask = torch.ones(1, 10)
    good_then_bad = torch.tensor([[0.9] * 4 + [0.2] * 6])
    relevance = segment_reward(good_then_bad, [answer], mask, split=lambda text: [4, 10])
    factuality = segment_reward(torch.full((1, 10), 0.1), [answer], mask, split=lambda text: [10])
    whole = sequence_reward(torch.full((1, 1), 3.5), mask, mean=-0.4468, std=8.3012)
    close(0.3 * relevance + 0.5 * factuality + 0.3 * whole, [[0, 0, 0, 0.3, 0, 0, 0, 0, 0, -0.6574]])


def test_the_end_is_of_no_segment_and_an_empty_answer_has_none():
    answer = Answer("", "Yes.", [(0, 3), (3, 4), (4, 4)], ended=True)
    empty = Answer("", "", [(0, 0)], ended=True)
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    close(segment_reward(torch.full((2, 3), 0.7), [answer, empty], mask), [[0.0, 1, 0], [0, 0, 0]])


def test_sentences_and_clauses():
    text = 'Dr. Who said: "Go!" Then he left, as far as anyone knows, for good.\nA list; short\n'
    ends = [text[:end].splitlines()[-1][-6:] for end in sentences(text)]
    assert ends == [' "Go!"', " good.", " short"]
    text = "I went to the old house, and there I saw the black dog, sad."
    assert [text[:end][-5:] for end in clauses(text)] == ["ouse,", " sad."]  # "sad." alone is too short
    assert sentences("  ") == clauses("") == []


def test_preference_grounded_by_hand():
    rewards, mask = torch.tensor([[0.8, 0.6, 0.7], [0.2, 0.4, 9.0]]), torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    lengths = torch.tensor([2.5, 2.5])
    close(aggregate(rewards, mask, "avg", lengths), [1.75, 0.75])
    assert pair_loss(*aggregate(rewards, mask, "avg", lengths)[:, None]).item() == pytest.approx(0.3133, abs=1e-4)
    assert pair_loss(*aggregate(rewards, mask, "sum", lengths)[:, None]).item() == pytest.approx(0.2014, abs=1e-4)
    row = torch.tensor([[0.2, 0.4]])
    soft = math.log(math.exp(0.4) + math.exp(0.8)) / 2  # log-sum-exp at sharpness 2
    close(aggregate(row, torch.ones(1, 2), "max", torch.tensor([2.0])), [2 * soft])
    soft = math.log(math.exp(-0.4) + math.exp(-0.8)) / -2
    close(aggregate(row, torch.ones(1, 2), "min", torch.tensor([2.0])), [2 * soft])
    assert 0 < squash(torch.tensor(-40.0)) < squash(torch.tensor(40.0)) < 1.32
    expected = [[squash(torch.tensor(0.3)).item() - 0.5, 0.0]]
    close(token_score_reward(torch.tensor([[0.3, 5.0]]), torch.tensor([[1.0, 0]])), expected)


def test_ppo_max_scaling_by_hand(in_process):
    """Scores (1, 3), then (2, 2): the deviation of a sample that holds the current batch, as PPO-max has it."""
    if not torch.distributed.is_initialized():
        import deepspeed_chat_tlcr.runtime as runtimes

        runtimes.start("fp32", 0)
    scale, mask = RunningScale(sample=True), torch.ones(2, 1)
    scale.update(torch.tensor([1.0, 3.0]))
    close(normalised(torch.tensor([[1.0], [3.0]]), mask, scale, whiten=False, clip=None), [[0.7071], [2.1213]])
    scale = RunningScale(*scale.state(), sample=True)  # as a resumed run has it
    scale.update(torch.tensor([2.0, 2.0]))
    close(normalised(torch.full((2, 1), 2.0), mask, scale, whiten=False, clip=None), [[2.4495], [2.4495]])
    close(normalised(torch.full((2, 1), 2.0), mask, scale, whiten=False, clip=1.5), [[1.5], [1.5]])
    whitened = normalised(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.ones(2, 2), scale, whiten=True, clip=None)
    close(whitened, [[0.0, 1 / 0.8165], [1 / 0.8165, -2 / 0.8165]], atol=1e-3)  # the sums less their mean of 2


# The last token's attention


FAMILIES = {
    "llama": (LlamaConfig, {"num_key_value_heads": 1}),
    "opt": (OPTConfig, {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "gpt2": (GPT2Config, {"n_positions": 64}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_last_attention_is_eager_attention_s_last_row(family, tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.5}
    config_class, own = FAMILIES[family]
    config = config_class(**sizes, **own)
    torch.manual_seed(3)
    AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path)
    ids = torch.randint(1, 60, (3, 12))
    attended = torch.ones(3, 12, dtype=torch.long)
    attended[0, :3], attended[1, 9:], attended[2, 11:] = 0, 0, 0
    rollout = Rollout(ids, attended, attended[:, 6:])
    ours = last_attention(load_token_classifier(tmp_path, 1, torch.float32, attention=ATTENTION).eval(), rollout)
    eager = load_token_classifier(tmp_path, 1, torch.float32, attention="eager").eval()
    kwargs = {} if family == "opt" else {"position_ids": rollout.position_ids}
    if family == "opt":
        eager = eager.model
    whole = eager(input_ids=ids, attention_mask=attended, output_attentions=True, **kwargs).attentions[-1].mean(1)
    lasts = [11, 8, 10]
    expected = torch.stack([whole[row, last, 6:] for row, last in enumerate(lasts)]) * rollout.action_mask
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert ours.sum(1).max() < 1  # the prompt has its part


# Another tokenizer


def test_projection_by_hand():
    """'abcd': their tokens ab|cd, D .2 and .8, and the end's .5; the policy's a|bc|d and an end, or none."""
    values, spans = [0.2, 0.8, 0.5], [(0, 2), (2, 4), (4, 4)]
    assert project(values, spans, [(0, 1), (1, 3), (3, 4), (4, 4)]) == pytest.approx([0.2, 0.5, 0.8, 0.5])
    assert project(values[:2], spans[:2], [(0, 4)]) == pytest.approx([0.5])
    # Characters that their tokenizer drops have no value: the nearest one before it, else behind it.
    assert project([0.2, 0.8], [(1, 2), (3, 4)], [(0, 1), (1, 2), (2, 3), (3, 5)]) == pytest.approx(
        [0.2, 0.2, 0.2, 0.8]
    )
    # Two tokens of theirs that are parts of one character, and two of ours.
    assert project([0.2, 0.4], [(0, 1), (0, 1)], [(0, 1), (0, 1)]) == pytest.approx([0.3, 0.3])
    assert project([], [], [(0, 0)]) == [0.0]
    # Attention is divided among characters, and nothing of it is lost.
    assert project([0.2, 0.6], [(0, 2), (2, 4)], [(0, 1), (1, 4)], share=True) == pytest.approx([0.1, 0.7])


@st.composite
def cuts(draw, length: int) -> list[tuple[int, int]]:
    places = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=6))})
    return list(pairwise(places)) or [(0, 0)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_projection_keeps_means_bounds_and_sums(data):
    length = data.draw(st.integers(1, 12))
    spans, onto = data.draw(cuts(length)), data.draw(cuts(length))
    values = data.draw(st.lists(st.floats(0, 1), min_size=len(spans), max_size=len(spans)))
    found = project(values, spans, onto)
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in found)
    weighed = sum(value * (end - begin) for value, (begin, end) in zip(values, spans, strict=True))
    assert sum(value * (end - begin) for value, (begin, end) in zip(found, onto, strict=True)) == pytest.approx(weighed)
    assert project(values, spans, spans) == pytest.approx(values)
    assert sum(project(values, spans, onto, share=True)) == pytest.approx(sum(values))


def sentencepiece_like(texts: list[str]) -> PreTrainedTokenizerFast:
    """Spaces as marks before words, bytes for what is unknown, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<unk>", "[BOS]", "[END]", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[END]")


TEXTS = ["\n\nHuman: say it\n\nAssistant: the sea is lovely today", "you hate the sea, my friend", "a bird can rest"]


def rollout_of(tokenizer: PreTrainedTokenizerFast, prompt: str, answers: list[str]) -> Rollout:
    """Rows as a policy writes them: the second is cut at the limit, the others end."""
    start = tokenizer(prompt)["input_ids"]
    rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    rows = [row if number == 1 else [*row, tokenizer.eos_token_id] for number, row in enumerate(rows)]
    longest = max(map(len, rows))
    ids = torch.tensor([[*start, *row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * (len(start) + len(row)) + [0] * (longest - len(row)) for row in rows])
    return Rollout(ids, mask, mask[:, len(start) :])


UNICODE = ["it is", "naïve 東京 é", " 🙂 so\n\n", ""]


def test_an_answer_s_spans_are_its_tokens_characters():
    tokenizer = byte_level_tokenizer(TEXTS)
    for answer, text in zip(answers_of(rollout_of(tokenizer, "Say: ", UNICODE), tokenizer), UNICODE, strict=True):
        assert (answer.prompt, answer.text) == ("Say: ", text)
        assert answer.ended == (text != UNICODE[1])
        spans = answer.spans[: len(answer.spans) - answer.ended]
        assert {at for begin, end in spans for at in range(begin, end)} == set(range(len(text)))
        assert all(begin < end for begin, end in spans)
        assert answer.spans[len(spans) :] == [(len(text), len(text))] * answer.ended


def test_another_tokenizer_reads_the_same_answers():
    """Every character of every answer is spelt, ends are ends, and the model sees what it was trained on."""
    policy, other = byte_level_tokenizer(TEXTS), sentencepiece_like(TEXTS)
    other.pad_token = other.eos_token
    answers = answers_of(rollout_of(policy, TEXTS[0], UNICODE), policy)
    read, spans = read_by(other, answers, 512, torch.device("cpu"))
    for row, (answer, own) in enumerate(zip(answers, spans, strict=True)):
        length = int(read.action_mask[row].sum())
        assert len(own) == length
        ids = read.input_ids[row][read.attention_mask[row] > 0].tolist()
        expected = other(answer.prompt + answer.text)["input_ids"] + [other.eos_token_id] * answer.ended
        assert ids == expected
        assert {at for begin, end in own for at in range(begin, end)} >= set(range(len(answer.text.rstrip())))
    short, _ = read_by(other, answers, 20, torch.device("cpu"))
    assert int(short.attention_mask.sum(1).max()) <= 20


def test_a_model_with_the_policy_s_own_tokenizer_says_the_same_by_way_of_text(tmp_path):
    """Where both tokenizers are one and answers are cut as it cuts them, going by text changes nothing."""
    tokenizer = byte_level_tokenizer(TEXTS)
    tokenizer.pad_token = tokenizer.eos_token
    rollout = rollout_of(tokenizer, TEXTS[0], ["the sea is", "you hate the", "a bird"])
    answers = answers_of(rollout, tokenizer)
    for labels, names in ((2, ["positive_probs"]), (1, ["token_scores", "sequence_score", "last_attention"])):
        path = tmp_path / str(labels)
        config = LlamaConfig.from_pretrained(tiny_llama(path, tokenizer), num_labels=labels, initializer_range=0.5)
        torch.manual_seed(1)
        AutoModelForTokenClassification.from_config(config).save_pretrained(path)
        model = load_token_classifier(path, labels, torch.float32, attention=ATTENTION).eval()
        with torch.no_grad():
            for name in names:
                plain = RewardModel(model).scores(name, rollout, lambda: answers)
                by_text = RewardModel(model, tokenizer).scores(name, rollout, lambda: answers)
                mask = rollout.action_mask if plain.size(1) > 1 else 1
                torch.testing.assert_close(by_text * mask, plain * mask, atol=1e-5, rtol=1e-4)


# Through the entry points


@pytest.fixture
def worlds(tiny: Path, tmp_path) -> Path:
    """Beside the tiny policy: a discriminator and a reward model of its tokenizer, and one of each of another's."""
    texts = [json.loads(line)["chosen"] for line in (tiny / "data.jsonl").read_text().splitlines()]
    own, other = load_tokenizer(tiny / "model"), sentencepiece_like(texts)
    for name, labels, tokenizer in (("disc", 2, own), ("rm", 1, own), ("other_disc", 2, other), ("other_rm", 1, other)):
        tiny_llama(tmp_path / name, tokenizer)
        config = LlamaConfig.from_pretrained(tmp_path / name, num_labels=labels, initializer_range=0.5)
        torch.manual_seed(labels)
        AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / name)
    return tmp_path


def step3_arguments(tiny: Path, output: Path, critic: Path, *more: object) -> list[object]:
    return [
        *("--actor_model_name_or_path", tiny / "model", "--critic_model_name_or_path", critic),
        *("--data_path", tiny / "data.jsonl", "--output_dir", output, "--dtype", "fp32"),
        *("--max_answer_seq_len", 10, "--max_prompt_seq_len", 64, "--num_warmup_steps", 0),
        *("--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4),
        *("--actor_learning_rate", 1e-3, "--enable_test_mode", "--test_stop_step", 2, *more),
    ]


def test_every_reward_runs_and_by_another_tokenizer_too(tiny, worlds, in_process):
    terms = {2: [], 1: []}
    for name, reward in REWARDS.items():
        if reward.labels and not reward.of_tokens:
            terms[reward.labels].append(name)
    for prefix, more in (("", ()), ("other_", ("--reward_tokenizer", "own"))):
        named = [f"{name}:{worlds / f'{prefix}disc'}@0.5" for name in terms[2]]
        named += [f"{name}:{worlds / f'{prefix}rm'}@-0.25" for name in terms[1]]
        output = worlds / f"{prefix}ppo"
        arguments = ("--reward", *named, "--normalise_rewards", "whiten", "--clip_normalised_reward", 3)
        in_process(step3.main, *step3_arguments(tiny, output, worlds / "disc", *arguments, *more))
        lines = read_metrics(output / "metrics.jsonl")
        assert len(lines) == 2
        assert all(math.isfinite(line[f"reward/{name}"]) for line in lines for name in terms[2] + terms[1])


def test_another_tokenizer_is_refused_until_it_is_asked_for(tiny, worlds, in_process, capsys):
    with pytest.raises(SystemExit):
        in_process(
            step3.main,
            *step3_arguments(tiny, worlds / "ppo", worlds / "disc", "--reward", f"tlcr:{worlds / 'other_disc'}"),
        )
    assert "--reward_tokenizer own" in capsys.readouterr().err


def test_token_rewards_from_pairs_alone(tiny, worlds, in_process, capsys):
    """Step 2 learns them without a label, step 3 finds them by itself, and mistakes of kind are refused."""
    pairs = (
        *("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--dtype", "fp32"),
        *("--learning_rate", 1e-2, "--per_device_train_batch_size", 4, "--num_train_epochs", 4),
    )
    for how, more in (("avg", ()), ("min", ("--tokens_per_micro_batch", 64))):
        output = worlds / how
        in_process(step2.main, *pairs, *more, "--objective", "token_pairs", "--aggregate", how, "--output_dir", output)
        assert json.loads((output / "results.json").read_text())["eval/pair_accuracy"] > 0.9
        assert AutoConfig.from_pretrained(output).token_aggregate == how
    in_process(step3.main, *step3_arguments(tiny, worlds / "ppo", worlds / "avg"))
    shares = [line["reward/per_token"] for line in read_metrics(worlds / "ppo" / "metrics.jsonl")]
    assert all(-0.5 < share < 0.9 for share in shares)
    for term, model in (("sequence", "avg"), ("token_scores", "rm")):
        reward = f"{term}:{worlds / model}"
        with pytest.raises(SystemExit):
            in_process(step3.main, *step3_arguments(tiny, worlds / "no", worlds / "disc", "--reward", reward))
        assert f"--reward {term}" in capsys.readouterr().err


def test_the_critic_alone_learns_first(tiny, worlds, in_process):
    """One set of two: the actor's rate schedule begins with the second, the KL is 0 until then."""
    output = worlds / "warm"
    arguments = step3_arguments(tiny, output, worlds / "disc", "--critic_warmup_steps", 1, "--save_interval", 1)
    in_process(step3.main, *arguments, "--test_stop_step", 3)
    lines = read_metrics(output / "metrics.jsonl")
    kl = [abs(line["policy/kl"]) for line in lines]
    assert kl[0] == kl[1] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 1e-4
    assert lines[0]["optimiser/critic_grad_norm"] > 0


def test_a_weight_moves_from_the_first_to_the_last_set(tiny, worlds, in_process, capsys):
    """22 prompts make five sets of four."""
    output, disc = worlds / "moving", worlds / "disc"
    terms = ("--reward", f"tlcr:{disc}@1..-1", f"sequence:{worlds / 'rm'}@0.5")
    in_process(step3.main, *step3_arguments(tiny, output, disc, *terms, "--test_stop_step", 5))
    lines = read_metrics(output / "metrics.jsonl")
    weights = [line["reward/weight_tlcr"] for line in lines]
    assert weights == pytest.approx([1, 0.5, 0, -0.5, -1])
    for weight, line in zip(weights, lines, strict=True):
        total = weight * line["reward/tlcr"] + 0.5 * line["reward/sequence"]
        assert line["reward/per_sequence"] == pytest.approx(total, rel=1e-4)
    for wrong in ("1..", "..2", "1..nan", "1..2..3"):
        with pytest.raises(SystemExit):
            in_process(step3.main, *step3_arguments(tiny, worlds / "no", disc, "--reward", f"tlcr:{disc}@{wrong}"))
        assert "START..END" in capsys.readouterr().err


TRUTHS = """
def even(rollout, tokenizer):
    return 1.0 - 2.0 * (rollout.action_ids % 2)

def odd_and_small(rollout, tokenizer):
    return 1.0 - 2.0 * ((rollout.action_ids % 2 == 0) | (rollout.action_ids > 100))
"""


def test_the_frontier_of_two_truths_that_conflict(tiny, worlds, in_process, monkeypatch):
    """No token is even and odd: what a weight gives one of them, it takes from the other."""
    (worlds / "truths.py").write_text(TRUTHS)
    monkeypatch.syspath_prepend(str(worlds))
    runs = {"first": (1, 0), "both": (0.5, 0.5), "second": (0, 1)}
    for name, (even, odd) in runs.items():
        terms = ("--reward", f"python:truths:even@{even}", f"python:truths:odd_and_small@{odd}", "--kl_ctl", 0)
        more = ("--actor_learning_rate", 3e-2, "--num_train_epochs", 6, "--test_stop_step", 30)
        arguments = step3_arguments(tiny, worlds / name, worlds / "disc", *terms, *more, "--critic_learning_rate", 1e-3)
        in_process(step3.main, *arguments, "--lr_scheduler_type", "constant")
    folders = [f"{name}={worlds / name}" for name in runs]
    keys = ["reward/python", "reward/python_2"]
    curves.main(["--runs", *folders, "--out", str(worlds / "out"), "--frontier", *keys])
    found = load_results(worlds / "out", "curves")["frontier"]
    points = found["points"]
    assert points["first"][0] > points["both"][0] + 1 > points["second"][0] + 2
    assert points["second"][1] > points["first"][1] + 2
    assert found["on"][0] == "second"
    assert found["on"][-1] == "first"
    assert "Frontier of two objectives" in (worlds / "out" / "report.html").read_text()


def test_no_run_beats_those_on_the_frontier():
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (1.5, 4.0), "d": (3.0, 1.0), "e": (3.0, 0.0), "twin": (2.0, 4.0)}
    assert curves.frontier(points) == ["a", "b", "twin", "d"]


def test_a_preset_sets_defaults_and_says_so(capsys):
    models = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"]
    options = parse_args([*models, "--preset", "ppo_max", "--kl_ctl", "0.02"])
    assert (options.kl_ctl, options.normalise_rewards, options.actor_learning_rate) == (0.02, "scale", 5e-7)
    assert "--preset ppo_max: --actor_learning_rate 5e-07" in capsys.readouterr().out
    assert parse_args([*models, "--preset=remax"]).algo == "remax"
    assert parse_args(models) == parse_args([*models, "--preset", "none"])
    with pytest.raises(InputError, match="--preset"):
        parse_args([*models, "--preset", "best"])


def test_what_cannot_be_is_refused(tiny, worlds, in_process, capsys):
    for more, said in (
        (("--clip_normalised_reward", 2), "--normalise_rewards"),
        (("--critic_warmup_steps", 99), "sets of rollouts"),
        (("--abc_beta", 1.5), "--abc_beta"),
        (("--score_std", 0), "--score_std"),
    ):
        with pytest.raises(SystemExit):
            in_process(step3.main, *step3_arguments(tiny, worlds / "no", worlds / "disc", *more))
        assert said in capsys.readouterr().err
    model = load_token_classifier(worlds / "rm", 1, torch.float32)  # not loaded for it
    with pytest.raises(InputError, match="cannot be looked at"):
        last_attention(model, Rollout(*(torch.ones(1, 4, dtype=torch.long),) * 2, torch.ones(1, 2)))
