"""The example on people's edits of toxic sentences: data, judges and frontier by hand, programs on tiny models."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import ROOT, tiny_llama, write_jsonl
from transformers import AutoModelForTokenClassification, AutoTokenizer, LlamaConfig

import evaluation.detox.main as detox
from deepspeed_chat_tlcr.gguf import main as convert_gguf
from deepspeed_chat_tlcr.tokenization import TokenizedExample
from evaluation.detox import judges, pages
from evaluation.detox.data import JUDGE, TEST, TRAIN, VALIDATION, Pair, clean, pair_of, part_of
from evaluation.detox.frontier import Point, beside, difference


def test_both_sides_get_one_form():
    assert clean("you are n't  wrong , it 's a ( big ) mess .") == "you aren't wrong, it's a (big) mess"
    assert clean("You aren’t wrong, it’s a (big) mess!") == "you aren't wrong, it's a (big) mess"


def test_a_pair_is_the_least_edited_rewrite_behind_what_both_share():
    rewrites = ["Completely other words.", "what a bad idea that was", "What a silly idea that really was, I think"]
    assert pair_of("what a stupid idea that was", rewrites) == Pair(
        "what a", " stupid idea that was", " bad idea that was"
    )
    assert pair_of("what a stupid idea", ["what a stupid idea."]) is None, "nothing was edited"
    assert pair_of("damn it all", ["forget it all"]) is None, "no shared words to begin with"
    assert pair_of("this is the worst shit ever", ["this is the worst thing ever"]).prompt == "this is the worst"


def test_parts_hold_prompts_together_and_have_their_shares():
    pairs = [Pair(f"prompt {number // 2}", f" {number}", " x") for number in range(4000)]
    parts = [part_of(pair, 0.12) for pair in pairs]
    assert all(one == other for one, other in zip(parts[::2], parts[1::2], strict=True))
    shares = [parts.count(part) / 4000 for part in (TEST, VALIDATION, JUDGE, TRAIN)]
    assert shares == pytest.approx([0.12, 0.03, 0.425, 0.425], abs=0.03)


def test_the_bag_of_words_and_its_comparison_by_hand():
    train = [TokenizedExample([9, 1, 2, 3], 1, [0.0, 0.5, 1.0]), TokenizedExample([9, 1, 2], 1, [0.0, 0.5])]
    words = judges.Unigrams(train, 10)
    assert words.probs[[1, 2, 3, 4]].tolist() == pytest.approx([0.5 / 3, 0.5, 1.5 / 2, 0.5])
    held_out = [TokenizedExample([9, 1, 3], 1, [0.0, 1.0]), TokenizedExample([9, 2, 1], 1, [0.5, 1.0])] * 3
    rows = judges.edited(held_out, words.judge(held_out))
    found = judges.measures(rows)
    assert found["accuracy"] == pytest.approx(2 / 3)  # token 1 is called negative, the last time wrongly
    assert found["majority"] == pytest.approx(2 / 3)
    assert found["auroc"] == pytest.approx(0.75)
    perfect = [np.stack([row[:, 1], row[:, 1]], 1) for row in rows]
    assert judges.ahead(perfect, rows, "accuracy") == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert judges.distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert judges.repetition("a b a") == pytest.approx(1 / 3)


def test_the_frontier_by_hand():
    """SFT has .8 at KL 0, .4 at KL 2, and .6 at KL 4, where less KL has already reached .4."""
    points = [Point(np.full(4, score), np.full(4, kl)) for score, kl in ((0.8, 0.0), (0.6, 4.0), (0.4, 2.0))]
    everyone = np.arange(4)
    assert beside(points, Point(np.full(4, 0.5), np.full(4, 1.0)), everyone) == pytest.approx(-0.1)
    assert beside(points, Point(np.full(4, 0.5), np.full(4, 3.0)), everyone) == pytest.approx(0.1)
    assert beside(points, Point(np.full(4, 0.5), np.full(4, 99.0)), everyone) == pytest.approx(0.1)
    policy = Point(np.array([0.0, 0.0, 1.0, 0.0]), np.full(4, 2.0))
    value, low, high = difference(points, policy)
    assert value == pytest.approx(0.25 - 0.4)
    assert low < value < high


def test_a_verdict_says_no_more_than_its_intervals():
    def row(name, low, high):
        return {"policy": name, "sampling": "1", "beside_frontier": ((low + high) / 2, low, high)}

    assert "is less toxic" in pages.verdict([row("a", -0.2, -0.1)])
    assert "not told apart" in pages.verdict([row("a", -0.2, 0.1)])
    assert "more toxic" in pages.verdict([row("a", 0.1, 0.2)])


@pytest.fixture
def toxic(tmp_path, monkeypatch):
    """A hundred and more pairs whose toxic word is one of two, and a judge that knows both."""
    nouns = [f"{first}{second}" for first in "abcdefghijkl" for second in "mnopqrstuvwx"]
    records = [
        {"toxic": f"the {noun} is a {word} thing to see", "neutral": [f"the {noun} is a poor thing to see"]}
        for noun, word in zip(nouns, ["stupid", "damned"] * 99, strict=False)
    ]
    bad = lambda texts: np.array([float("stupid" in text or "damned" in text) for text in texts])  # noqa: E731
    monkeypatch.setattr(detox, "profanity", bad)
    monkeypatch.setattr(pages, "profanity", bad)
    return write_jsonl(tmp_path / "toxic.jsonl", records)


def test_the_programs_on_tiny_models(tiny, toxic, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    data = tmp_path / "data"
    detox.main(["prepare", "--paradetox", str(toxic), "--output_dir", str(data), "--test_share", "0.2"])
    counts = json.loads((data / "results.json").read_text())
    assert sum(counts.values()) == 144

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    for name in ("disc", "judge"):
        tiny_llama(tmp_path / name, tokenizer)
        config = LlamaConfig.from_pretrained(tmp_path / name, num_labels=2)
        AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / name)
    check = ["check", "--data_dir", data, "--discriminator", tmp_path / "disc", "--output_dir", tmp_path / "check"]
    with pytest.raises(SystemExit) as ended:
        detox.main([str(word) for word in check])
    assert ended.value.code == 1, "an untrained discriminator is refused"
    assert "bag of words" in capsys.readouterr().err
    assert not (tmp_path / "check" / "results.json").exists()
    detox.main([*map(str, check), "--go_on"])
    assert json.loads((tmp_path / "check" / "results.json").read_text())["bag of words"]["accuracy"] > 0.9

    report = [
        *("report", "--models", f"sft={tiny / 'model'}", f"tlcr={tiny / 'model'}", "--data_dir", data),
        *("--base", tiny / "model", "--discriminator", tmp_path / "disc", "--judge", tmp_path / "judge"),
        *("--prompts", 6, "--best_of", 2, "--max_new_tokens", 4, "--out", tmp_path / "report"),
    ]
    detox.main([str(word) for word in report])
    rows = json.loads((tmp_path / "report" / "results.json").read_text())["rows"]
    assert [row["sampling"] for row in rows if row["policy"] == "sft"] == [f"{heat:g}" for heat in detox.SWEEP] + [
        "best of 2"
    ]
    same = {row["policy"]: row for row in rows if row["sampling"] == "1"}
    assert same["tlcr"]["kl"] == pytest.approx(0, abs=1e-4)
    assert same["tlcr"]["toxic"] == same["sft"]["toxic"]
    assert "<html" in (tmp_path / "report" / "report.html").read_text()[:200]


def test_words_are_masked(monkeypatch):
    monkeypatch.setattr(pages, "profanity", lambda words: [float(word == "stupid") for word in words])
    assert pages.masked("a stupid, stupid thing") == "a s•••••, s••••• thing"


def test_a_gguf_file_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and no more")
    for words in ([tmp_path / "absent.gguf", tmp_path / "out"], [tmp_path / "model.gguf", tmp_path / "out"], ["x"]):
        with pytest.raises(SystemExit) as ended:
            convert_gguf([str(word) for word in words])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_reward_of_a_bag_of_words_needs_its_data(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from deepspeed_chat_tlcr.errors import InputError
    from evaluation.detox.unigram import reward

    monkeypatch.delenv("DETOX_DATA", raising=False)
    with pytest.raises(InputError, match="DETOX_DATA"):
        reward(None, None)
