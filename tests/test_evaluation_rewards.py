"""Reward scores of real answers against a slow way to the same numbers; training curves; prompts."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from evaluation_helpers import other_model, read_lines, reward_model, texts_of

from deepspeed_chat_tlcr.models import load_token_classifier
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation import curves, reward_scores
from evaluation.policies import Question
from evaluation.prompts import prompts_of_file
from evaluation.stats import ratio_interval


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory):
    """A run over two models and both reward models; its folder and the reward models' folders."""
    folder = tmp_path_factory.mktemp("scored")
    other = other_model(folder / "other", tiny)
    judges = [reward_model(folder / f"judge{labels}", tiny, labels) for labels in (2, 1)]
    reward_scores.main(
        [
            *("--models", f"sft={tiny / 'model'}", f"tlcr={other}", "--data_path", str(tiny / "data.jsonl")),
            *("--discriminator", str(judges[0]), "--sequence_reward", str(judges[1]), "--dtype", "fp32"),
            *("--max_answer_seq_len", "10", "--out", str(folder / "out"), "--scoring_batch_size", "3"),
        ]
    )
    return folder, judges


@torch.no_grad()
def test_rewards_are_those_of_each_answer_scored_alone(scored):
    folder, (disc, rm) = scored
    results = json.loads((folder / "out" / "reward_scores" / "results.json").read_text())
    tokenizer = load_tokenizer(disc)
    discriminator, reward = (load_token_classifier(str(p), k, torch.float32).eval() for p, k in ((disc, 2), (rm, 1)))
    questions = {q.id: q for q in held_out(folder)}
    for name in ("sft", "tlcr"):
        found = {"sequence": [], "discrete token": [], "continuous token": []}
        lengths = []
        for line in read_lines(next((folder / "out" / "answers").glob(f"*/{name}.jsonl"))):
            choice, prompt = line["choices"][0], questions[line["question_id"]].turns[0]
            start = len(tokenizer(prompt)["input_ids"])
            ids = tokenizer(prompt + choice["turns"][0])["input_ids"]
            ids += [tokenizer.eos_token_id] * choice["ended"][0]
            probs = discriminator(input_ids=torch.tensor([ids])).logits[0, start:].softmax(-1)[:, 1].tolist()
            found["continuous token"].append(sum(2 * d - 1 for d in probs))
            found["discrete token"].append(sum(0 if 0.4 < d < 0.6 else 1 if d > 0.5 else -1 for d in probs))
            found["sequence"].append(reward(input_ids=torch.tensor([ids])).logits[0, -1, 0].item())
            lengths.append(choice["tokens"][0])
        row = results["models"][name]
        assert row["response_length"] == pytest.approx(np.mean(lengths))
        for kind, values in found.items():
            assert row["rewards"][kind]["sum"] == pytest.approx(np.mean(values), abs=1e-3), (name, kind)
            assert row["rewards"][kind]["per_token"] == pytest.approx(sum(values) / sum(lengths), abs=1e-4)
            low, high = row["rewards"][kind]["sum_interval"]
            assert low <= row["rewards"][kind]["sum"] <= high
    assert "continuous token" in texts_of(folder / "out" / "report.html")


def held_out(folder) -> list[Question]:
    from deepspeed_chat_tlcr.data.preferences import load_preferences
    from evaluation.prompts import prompt_id

    settings = json.loads((folder / "out" / "reward_scores" / "results.json").read_text())
    data = next(folder.parent.glob("tiny*/data.jsonl"))
    pairs = load_preferences([str(data)], "rl", "eval", require_rejected=False)
    assert settings["prompts"] == len(pairs) > 1
    return [Question(prompt_id(pair.prompt), [pair.prompt], raw=True) for pair in pairs]


def test_ratio_interval_covers_the_rate_of_equal_rows():
    sums, counts = np.array([1.0, 2.0, 3.0]), np.array([2, 4, 6])
    assert ratio_interval(sums, counts) == pytest.approx((0.5, 0.5))
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 50, 500)
    sums = draw.normal(0.3 * counts, np.sqrt(counts))
    low, high = ratio_interval(sums, counts)
    rate = sums.sum() / counts.sum()
    error = (sums - rate * counts).std() / math.sqrt(len(sums)) / counts.mean()
    assert (low, high) == pytest.approx((rate - 1.96 * error, rate + 1.96 * error), abs=0.2 * error)


def test_prompts_of_a_file(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"instruction": "Hi"}, {"prompt": "\n\nHuman: Hi\n\nAssistant:"}])
    plain, whole = prompts_of_file(str(path), 0.7)
    assert (plain.raw, whole.raw, plain.temperature) == (False, True, 0.7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to score with"),
        (["--discriminator", "d"], "--prompts FILE or --data_path DATA is missing"),
        (["--discriminator", "d", "--prompts", "/no.jsonl"], "no such .jsonl"),
        (["--discriminator", "d", "--prompts", "BAD"], "BAD:2: no text in 'instruction' or 'prompt'"),
    ],
)
def test_wrong_input_is_one_sentence(tiny, tmp_path, options, words, capsys):
    bad = str(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "x"}, {"question": "y"}]))
    options = [bad if option == "BAD" else option for option in options]
    with pytest.raises(SystemExit) as exit:
        reward_scores.main(["--models", f"a={tiny / 'model'}", "--out", str(tmp_path / "out"), *options])
    assert exit.value.code == 2
    assert words.replace("BAD", bad) in capsys.readouterr().err


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_curves_of_two_runs(tmp_path):
    for name, slope in (("tlcr", 1.0), ("seq", 2.0)):
        (tmp_path / name).mkdir()
        lines = [
            {"step": n, "policy/kl": slope * n, "policy/perplexity": None if n == 2 else 3.0} for n in range(1, 60)
        ]
        write_jsonl(tmp_path / name / "metrics.jsonl", lines)
    runs = [f"tlcr={tmp_path / 'tlcr'}", f"seq={tmp_path / 'seq' / 'metrics.jsonl'}"]
    curves.main(["--runs", *runs, "--metrics", "policy/kl", "policy/perplexity", "no/such", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "curves" / "results.json").read_text())
    assert [chart["key"] for chart in results["charts"]] == ["policy/kl", "policy/perplexity"]
    assert results["absent"] == ["no/such"]
    assert results["runs"] == {"tlcr": 59, "seq": 59}
    assert results["charts"][0]["series"][1]["y"][:3] == [2.0, 4.0, 6.0]
    assert results["charts"][1]["series"][0]["y"][:3] == [3.0, None, 3.0]
    for key in ("policy_kl", "policy_perplexity"):
        assert (tmp_path / "curves" / f"{key}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "tlcr: 59" in page
    assert "smoothed" in page
    assert "not recorded by any run" in page


@pytest.mark.parametrize(
    ("runs", "words"), [([], "--runs is missing"), (["x"], "expected NAME=PATH"), (["x=/nowhere"], "no lines in")]
)
def test_runs_that_are_no_runs(tmp_path, runs, words, capsys):
    with pytest.raises(SystemExit):
        curves.main(["--runs", *runs, "--out", str(tmp_path)])
    assert words in capsys.readouterr().err
