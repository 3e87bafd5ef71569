"""Measures of the discriminator: numbers done by hand, and the entry points on a tiny model."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import shared, write_jsonl
from evaluation_helpers import reward_model, texts_of

from deepspeed_chat_tlcr.models import load_token_classifier
from deepspeed_chat_tlcr.records import read_revisions
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation import discriminator, heatmap
from evaluation.discriminator import Tokens, calibration, confusion, kind_of, measure
from evaluation.scoring import token_probs
from labeling.token_labels import label_revision


@pytest.fixture(scope="module")
def judge(tiny, tmp_path_factory):
    return reward_model(tmp_path_factory.mktemp("judge") / "disc", tiny, labels=2)


def test_measures_of_six_tokens_done_by_hand():
    probs = np.array([0.95, 0.05, 0.55, 0.35, 0.45, 0.85])
    targets = np.array([1.0, 0.0, 0.5, 1.0, 0.5, 0.0])
    tokens = Tokens(probs, targets, np.array([0, 0, 0, 9, 9, 9]), np.array(["a", "a", "b", "b", "b", "a"]))
    found = measure(tokens)
    assert found["edited_accuracy"] == 0.5  # of 0.95, 0.05, 0.35, 0.85 the first two are on their side
    assert found["majority_accuracy"] == 0.5
    assert found["auroc"] == 0.75  # only the pair (0.35, 0.85) is the wrong way round
    assert confusion(probs, targets) == [[1, 0, 1], [0, 2, 0], [1, 0, 1]]
    assert [row["edited_accuracy"] for row in found["by_place"]] == [1.0, 0.0]
    assert found["by_kind"]["a"] == {
        "tokens": 3,
        "edited": 3,
        "edited_accuracy": pytest.approx(2 / 3),
        "majority_accuracy": pytest.approx(2 / 3),
        "three_class_accuracy": pytest.approx(2 / 3),
        "reward": pytest.approx(2 * (0.95 + 0.05 + 0.85) / 3 - 1),
    }


def test_calibration_done_by_hand():
    probs = np.array([0.92, 0.98, 0.12, 0.18])
    found = calibration(probs, np.array([1.0, 0.0, 0.0, 0.0]))
    assert [(row["low"], row["tokens"]) for row in found["bins"]] == [(0.1, 2), (0.9, 2)]
    assert found["bins"][1]["mean_d"] == pytest.approx(0.95)
    assert found["bins"][1]["mean_target"] == 0.5
    assert found["ece"] == pytest.approx((0.15 + 0.45) / 2)
    assert calibration(np.array([1.0]), np.array([1.0]))["ece"] == 0


def test_a_discriminator_whose_confidence_is_right_has_no_calibration_error():
    draw = np.random.default_rng(0)
    probs = draw.random(200_000)
    right = (draw.random(len(probs)) < probs).astype(float)
    assert calibration(probs, right)["ece"] < 0.01
    assert calibration(probs, np.round(probs))["ece"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("token", "starts", "kind"),
    [
        (" cat", False, "start of a word"),
        ("cat", True, "start of a word"),
        ("cat", False, "rest of a word"),
        (" 12", False, "number"),
        ("...", False, "punctuation"),
        (" \n", False, "white space"),
        ("", False, "white space"),
    ],
)
def test_kinds_of_tokens(token, starts, kind):
    assert kind_of(token, False, starts) == kind
    assert kind_of(token, True, starts) == "end of sequence"


def test_batched_probabilities_are_those_of_each_text_alone(tiny, judge):
    tokenizer, model = load_tokenizer(judge), load_token_classifier(str(judge), 2, torch.float32).eval()
    revisions = list(read_revisions(tiny / "revisions.jsonl"))[:5]
    examples = list(chain.from_iterable(label_revision(tokenizer, revision, 512) for revision in revisions))
    found = token_probs(model, examples, tokenizer.pad_token_id, batch_size=4)
    for example, probs in zip(examples, found, strict=True):
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, example.response_start :]
        assert probs == pytest.approx(logits.softmax(-1)[:, 1].tolist(), abs=1e-5)
    assert np.ptp(list(chain.from_iterable(found))) > 0.5


def test_the_part_measures_held_out_revisions_and_draws_them(tiny, judge, tmp_path):
    arguments = ["--discriminator", str(judge), "--revisions", str(tiny / "revisions.jsonl"), "--dtype", "fp32"]
    discriminator.main([*arguments, "--eval_share", "1", "--out", str(tmp_path / "all")])
    discriminator.main([*arguments, "--eval_share", "0.2", "--out", str(tmp_path / "held")])
    everything, held = (
        json.loads((tmp_path / name / "discriminator" / "results.json").read_text()) for name in ("all", "held")
    )
    revisions = list(read_revisions(tiny / "revisions.jsonl"))
    assert everything["revisions"] == len(revisions)
    assert held["revisions"] == round(0.2 * len(revisions))
    assert sum(map(sum, everything["confusion"])) == everything["tokens"]
    assert sum(row["tokens"] for row in everything["by_kind"].values()) == everything["tokens"]
    assert everything["by_kind"]["end of sequence"]["tokens"] == 2 * len(revisions)
    # The slow way: one text at a time, label by label.
    tokenizer, model = load_tokenizer(judge), load_token_classifier(str(judge), 2, torch.float32).eval()
    right = []
    for revision in revisions:
        for example in label_revision(tokenizer, revision, 512):
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, example.response_start :]
            for (negative, positive), target in zip(logits.tolist(), example.targets, strict=True):
                right += [(positive > negative) == (target == 1.0)] if target != 0.5 else []
    assert everything["edited_accuracy"] == pytest.approx(sum(right) / len(right))
    text = texts_of(tmp_path / "held" / "report.html")
    assert "accuracy on edited tokens" in text
    assert "rejected: discriminator" in text


def test_agreement_with_people_is_counted_by_token(tiny, judge, tmp_path):
    """One answer with one span: precision, recall and AUROC by a loop over its characters."""
    record = {
        "question": "What is a tree?",
        "passages": [["Trees", "A tree is a plant."]],
        "prediction": "I think a tree is an animal.",
        "others": ["A plant."],
        "gold": "A plant.",
        "corrected": "I think a tree is a plant.",
        "errors": [{"start": 18, "end": 27, "error type": "Wrong"}],
    }
    source = write_jsonl(tmp_path / "qa.jsonl", [record])
    from labeling.importing import qa_feedback_preference

    pair = qa_feedback_preference(record)
    revision = {"id": "x", "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    revision |= {"modified": f" {record['corrected']}", "reasoning": "", "model": "people", "usage": {}}
    revisions = write_jsonl(tmp_path / "revisions.jsonl", [revision])
    arguments = ["--discriminator", str(judge), "--revisions", str(revisions), "--eval_share", "1", "--dtype", "fp32"]
    discriminator.main([*arguments, "--error_spans", str(source), "--out", str(tmp_path / "out")])
    people = json.loads((tmp_path / "out" / "discriminator" / "results.json").read_text())["people"]

    tokenizer, model = load_tokenizer(judge), load_token_classifier(str(judge), 2, torch.float32).eval()
    text = pair.prompt + pair.rejected
    encoding = tokenizer(text, return_offsets_mapping=True)
    probs = model(input_ids=torch.tensor([encoding["input_ids"]])).logits[0].softmax(-1)[:, 1].tolist()
    start = len(text) - len(record["prediction"])
    marked = {start + character for character in range(18, 27)}
    tokens = [
        (prob, any(c in marked and not text[c].isspace() for c in range(*offset)))
        for prob, offset in zip(probs, encoding["offset_mapping"], strict=True)
        if offset[1] > start and text[slice(*offset)].strip()
    ]
    said = [inside for prob, inside in tokens if prob < 0.5]
    inside = [prob for prob, inside in tokens if inside]
    outside = [prob for prob, inside in tokens if not inside]
    assert people["precision"] == pytest.approx(sum(said) / len(said), abs=1e-6)
    assert people["recall"] == pytest.approx(sum(said) / len(inside), abs=1e-6)
    assert people["auroc"] == pytest.approx(np.mean([[a < b for b in outside] for a in inside]))
    assert people["always_negative"]["precision"] == pytest.approx(len(inside) / len(tokens))


def test_peoples_spans_of_the_shared_data_are_found(tiny, judge, tmp_path):
    from labeling.main import main as label

    spans = shared("qa_feedback_dev.jsonl.gz")
    label(["--from", str(spans), "--output_dir", str(tmp_path / "labels")])
    lines = (tmp_path / "labels" / "revisions.jsonl").read_text().splitlines(keepends=True)[:5]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    arguments = ["--discriminator", str(judge), "--revisions", str(tmp_path / "few.jsonl"), "--eval_share", "1"]
    discriminator.main(
        [*arguments, "--max_seq_len", "2048", "--error_spans", str(spans), "--out", str(tmp_path / "out")]
    )
    people = json.loads((tmp_path / "out" / "discriminator" / "results.json").read_text())["people"]
    assert people["responses"] == 5
    assert 0 < people["marked"] < people["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--revisions", "x.jsonl"], "--discriminator is missing"),
        (["--discriminator", "d"], "--revisions is missing"),
        (["--discriminator", "d", "--revisions", "/no/such.jsonl"], "no such file"),
        (["--discriminator", "d", "--revisions", "x", "--eval_share", "0"], "--eval_share 0.0"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        discriminator.main([*arguments, "--out", str(tmp_path)])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_heatmap_of_any_prompt_and_answers(judge, tmp_path, capsys):
    arguments = ["--discriminator", str(judge), "--prompt", "What is <b>?", "--dtype", "fp32"]
    heatmap.main([*arguments, "--text", "the cat is lovely", "it must go"])
    shown = capsys.readouterr().out
    assert "mean reward" in shown
    assert "lovely" in shown.replace("{+", "").replace("+}", "").replace("[-", "").replace("-]", "")
    heatmap.main(
        [*arguments, "--text", "<script>", "--html", str(tmp_path / "a.html"), "--png", str(tmp_path / "a.png")]
    )
    assert "What is &lt;b&gt;?" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
