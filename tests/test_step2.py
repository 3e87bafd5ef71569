"""What step 2 makes of revisions before it trains; the discriminator's measures."""

import math

import numpy as np
import pytest
from conftest import byte_level_tokenizer

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import MetricsLog, StepLines, auroc, read_metrics, token_metrics
from deepspeed_chat_tlcr.records import Preference, Revision
from step1_sft.sft import tokenize_chosen
from step2_discriminator.examples import text_pairs, token_pairs
from step2_discriminator.revisions import hold_out

TEXT = "Human: hello there Assistant: I do like you a lot"


def revision(prompt: str, rejected: str, modified: str) -> Revision:
    identity = Preference(prompt, " yes", rejected).id
    return Revision(identity, prompt, " yes", rejected, modified, "why", "test", {})


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer([TEXT] * 4, vocab_size=400)


def test_token_pairs_count_what_is_dropped_cut_and_unedited(tokenizer):
    revisions = [
        revision("Assistant:", " I do hate you", " I do like you"),
        revision("Assistant:", " I do", " I do"),  # unedited
        revision("Assistant:", "", " I do"),  # an empty response
        revision("Assistant:", " I" * 30, " I" * 31),  # longer than the limit on both sides
        revision("Human: " * 30, " I do", " I like"),  # prompt longer than the limit
    ]
    pairs, summary = token_pairs(revisions, tokenizer, max_length=24, what="train")
    assert summary == ("train: 4 revisions, 1 dropped (prompt too long), 2 responses cut, 1 unedited (all neutral)")
    (modified, rejected), unedited, empty, long = pairs
    assert 0.0 in rejected.targets
    assert 1.0 not in rejected.targets
    assert 1.0 in modified.targets
    assert 0.0 not in modified.targets
    assert rejected.targets[-1] == modified.targets[-1] == 0.5  # EOS stands in both: neutral, and counted
    assert set(unedited[0].targets) == set(unedited[1].targets) == {0.5}
    assert empty[1].response_ids == [tokenizer.eos_token_id]
    assert empty[1].targets == [0.5]
    assert all(len(side.input_ids) == 24 and side.input_ids[-1] != tokenizer.eos_token_id for side in long)
    # Labelled before the cut: the added " I" is the left-most (right-most matches are kept), whatever the cut removes.
    assert long[0].targets[0] == 1.0
    assert set(long[0].targets[1:]) == {0.5}


def test_several_revisions_of_one_response_are_labelled_together_or_each_by_itself(tokenizer):
    """Two that disagree on a word: half labels for the discriminator, whole ones for FIGA."""
    two = [revision("Assistant:", " I do hate you", text) for text in (" I do like you", " I do hate you")]
    together, _ = token_pairs(two, tokenizer, max_length=24, what="train")
    assert 0.25 in together[0][1].targets
    alone, _ = token_pairs(two, tokenizer, max_length=24, what="train", soft=False)
    assert [{*rejected.targets} for _, rejected in alone] == [{0.0, 0.5}, {0.5}]
    assert [{*modified.targets} for modified, _ in alone] == [{0.5, 1.0}, {0.5}]


def test_nothing_left_to_train_on_is_an_error(tokenizer):
    with pytest.raises(InputError, match="--max_seq_len 3"):
        token_pairs([revision(TEXT, " a", " b")], tokenizer, 3, "train")
    with pytest.raises(InputError, match="--max_seq_len 3"):
        text_pairs([(TEXT, " a", " b")], tokenizer, 3, "train")
    with pytest.raises(InputError, match="--max_seq_len 3"):
        tokenize_chosen([Preference(TEXT, " a", None)], tokenizer, 3, "train")


def test_hold_out_keeps_each_prompt_on_one_side_and_ignores_order():
    revisions = [revision(f"p{number % 40}", f" {number}", " x") for number in range(200)]
    train, held = hold_out(revisions, share=0.1)
    assert len({r.prompt for r in held}) == 4
    assert {r.prompt for r in train}.isdisjoint({r.prompt for r in held})
    assert len(train) + len(held) == 200
    assert {r.prompt for r in hold_out(revisions[::-1], 0.1)[1]} == {r.prompt for r in held}


def test_token_metrics_by_hand():
    probs = np.array([0.9, 0.4, 0.2, 0.7, 0.5, 0.55])
    targets = np.array([1.0, 1.0, 0.0, 0.0, 0.5, 0.5])
    measured = token_metrics(probs, targets)
    assert measured["edited_accuracy"] == 0.5  # .9 and .2 are right, .4 and .7 wrong
    assert measured["majority_accuracy"] == 0.5
    # three classes: 1, 0 (.4 -> max .6), 0, 1, neutral, neutral: right are the first, third, fifth and sixth
    assert measured["three_class_accuracy"] == pytest.approx(4 / 6)
    assert measured["auroc"] == 0.75  # .9 beats both, .4 beats .2
    assert measured["reward_positive"] == pytest.approx((0.8 - 0.2) / 2)
    assert measured["reward_negative"] == pytest.approx((-0.6 + 0.4) / 2)
    assert measured["edited_share"] == pytest.approx(4 / 6)


def test_auroc_against_all_pairs_with_ties():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 5, 40) / 4, rng.integers(0, 4, 30) / 4
    slow = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert auroc(positive, negative) == pytest.approx(slow)
    assert math.isnan(auroc(positive, negative[:0]))


def test_lines_of_a_run_that_starts_anew(tmp_path):
    """Killed before its first checkpoint, it has measured step 0, and will again. Answers may hold line separators."""
    answer = {"step": 0, "tokens": ["a\u2028b\x85c"]}
    StepLines(tmp_path / "samples.jsonl").write(answer)
    lines = StepLines(tmp_path / "samples.jsonl")
    lines.write(answer, answer | {"step": 1})
    StepLines(tmp_path / "samples.jsonl", resume_step=1).write({"step": 2})
    assert read_metrics(tmp_path / "samples.jsonl") == [answer, answer | {"step": 1}, {"step": 2}]


def test_metrics_log_drops_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": float(step), "train/nan": math.nan})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 4, "train/lösß'.encode()[:-1])  # killed while writing, within a character
    MetricsLog(tmp_path, resume_step=2).write(3, {"train/loss": 30.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 1.0, "train/nan": None},
        {"step": 2, "train/loss": 2.0, "train/nan": None},
        {"step": 3, "train/loss": 30.0},
    ]
