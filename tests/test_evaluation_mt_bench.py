"""MT-Bench through the real entry point, against a judge that omits ratings, rates 11, fails and dies."""

import asyncio
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from conftest import byte_level_tokenizer, shared, write_jsonl
from evaluation_helpers import QUESTIONS, expected_rating, other_model, read_lines, texts_of, write_bench
from judge_server import judging
from labeling_helpers import fault_server
from tokenizers import processors
from transformers import GenerationConfig

from deepspeed_chat_tlcr.arguments import parse
from deepspeed_chat_tlcr.asking.journal import RunFolder
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation import mt_bench
from evaluation.judging import SharedAccount
from evaluation.options import PolicyOptions
from evaluation.policies import Policy, Question, prompt_ids, prompt_text
from evaluation.stats import bootstrap_interval


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    other = other_model(tmp_path_factory.mktemp("other") / "model", tiny)
    return [f"sft={tiny / 'model'}", f"tlcr={other}"]


def bench(models, folder, out, url=None, *more):
    judge = ["--judge", "judge", "--base_url", url] if url else []
    options = [
        "--models",
        *models,
        "--mt_bench_dir",
        folder,
        "--out",
        out,
        "--max_new_tokens",
        12,
        "--generation_batch_size",
        2,
    ]
    return mt_bench.main([str(part) for part in [*options, *judge, *more]])


def test_scores_are_right_and_nothing_is_paid_twice(models, tmp_path, monkeypatch):
    """The judge first fails, then omits the rating, then rates 11, then rates: each kind for a third of the prompts."""
    folder, out = write_bench(tmp_path / "fastchat"), tmp_path / "out"

    def verdict(prompt: str, asked: int):
        troubles = ["It is nice.", "Rating: [[11]]", 500][len(prompt) % 3 :]
        return troubles[asked] if asked < len(troubles) else f"Less than [[3]]? Rating: [[{expected_rating(prompt)}]]"

    monkeypatch.setattr("deepspeed_chat_tlcr.asking.dispatch.back_off", lambda retry, wait: 0.0)
    with judging(verdict) as (judge, url):
        assert bench(models, folder, out, url) == 0
        first = judge.asked.total()
        assert bench(models, folder, out, url) == 0
        assert judge.asked.total() == first
        # A third model asks only about its own answers, of which a copy's are known already.
        assert bench([*models, models[0].replace("sft", "copy")], folder, out, url) == 0
        assert judge.asked.total() == first
    assert max(judge.paid.values()) == 3

    results = json.loads((out / "mt_bench" / "results.json").read_text())
    prompts = {}
    for name in ("sft", "tlcr"):
        for line in read_lines(out / "mt_bench" / "model_answer" / f"{name}.jsonl"):
            question = next(q for q in QUESTIONS if q["question_id"] == line["question_id"])
            (q1, q2), (a1, a2) = question["turns"], line["choices"][0]["turns"]
            needs = question["category"] in ("math", "reasoning")
            prompts[name, question["question_id"]] = (
                f"Q: {q1} A: {a1}" + " R: REFERENCE ONE" * needs,
                f"Q: {q1} {q2} A: {a1} || {a2}" + " R: REFERENCE ONE REFERENCE TWO" * needs,
            )
    for name in ("sft", "tlcr"):
        ratings = np.array([[expected_rating(p) for p in pair] for (n, _), pair in prompts.items() if n == name])
        row = results["models"][name]
        assert [row["turn 1"], row["turn 2"]] == pytest.approx(ratings.mean(0))
        assert row["overall"] == pytest.approx(ratings.mean())
    assert results["missing"] == 0
    assert {body["messages"][0]["content"] for body in judge.bodies} == {f"You judge by {n}." for n in mt_bench.PROMPTS}

    # What FastChat's show_result.py does with the file.
    path = out / "mt_bench" / "model_judgment" / "judge_single.jsonl"
    table = pd.read_json(path, lines=True)[["model", "score", "turn"]]
    table = table[table["score"] != -1]
    assert table[["model", "score"]].groupby("model").mean().loc["tlcr", "score"] == pytest.approx(
        results["models"]["tlcr"]["overall"]
    )
    assert "MT-Bench" in texts_of(out / "report.html")
    if importlib.util.find_spec("fastchat"):
        command = [sys.executable, "-m", "fastchat.llm_judge.show_result", "--input-file", str(path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"{results['models']['tlcr']['overall']:.3f}"[:4] in shown


def test_a_judge_that_never_rates_costs_three_attempts_and_leaves_a_gap(models, tmp_path, capsys):
    folder, out = write_bench(tmp_path / "fastchat"), tmp_path / "out"

    def verdict(prompt: str, asked: int):
        return "No number." if "sea" in prompt and "||" not in prompt else "Rating: [[4]]"

    with judging(verdict) as (judge, url):
        assert bench(models[:1], folder, out, url) == 4
        told = capsys.readouterr()
    assert "MT-Bench: 1 of 8 verdicts are missing" in told.err
    assert "only 7 of 8 ratings" in told.out
    assert "1 of 8 verdicts are missing" in texts_of(out / "report.html")
    assert max(judge.paid.values()) == 3
    results = json.loads((out / "mt_bench" / "results.json").read_text())
    assert results["missing"] == 1
    assert results["models"]["sft"]["overall"] == 4
    scores = [line["score"] for line in read_lines(out / "mt_bench" / "model_judgment" / "judge_single.jsonl")]
    assert sorted(scores) == [-1, 4, 4, 4, 4, 4, 4, 4]
    with judging(lambda prompt, asked: "[[6]]") as (judge, url):
        assert bench(models[:1], folder, out, url, "--retry_failed") == 0
    assert judge.asked.total() == 1
    assert json.loads((out / "mt_bench" / "results.json").read_text())["models"]["sft"]["turn 1"] == 4.5


def test_a_judge_that_dies_is_continued_without_paying_again(models, tmp_path, monkeypatch):
    folder, out = write_bench(tmp_path / "fastchat"), tmp_path / "out"
    monkeypatch.setattr("deepspeed_chat_tlcr.asking.dispatch.GIVEN_UP_IN_A_ROW", 2)
    monkeypatch.setattr("deepspeed_chat_tlcr.asking.dispatch.back_off", lambda retry, wait: 0.0)
    answered = []

    def dies(prompt: str, asked: int):
        answered.append(prompt)
        return "[[5]]" if len(answered) <= 5 else None

    with judging(dies) as (first, url):
        assert bench(models, folder, out, url, "--concurrency", 1, "--max_retries", 1) == 3
    assert "Stopped early" in texts_of(out / "report.html")
    with judging(lambda prompt, asked: "[[5]]") as (second, url):
        assert bench(models, folder, out, url, "--retry_failed") == 4  # the others have not been asked for yet
        assert bench(models, folder, out, url) == 0
    assert not set(first.paid) & set(second.paid)
    results = json.loads((out / "mt_bench" / "results.json").read_text())
    assert results["missing"] == 0
    assert {row["overall"] for row in results["models"].values()} == {5}


def test_the_cost_cap_stops_a_judge_and_is_never_passed(models, tmp_path):
    """gpt-4-0125-preview has a price: 100 tokens in and 10 out are US$ 0.0013 here, held back at far more."""
    folder, out = write_bench(tmp_path / "fastchat"), tmp_path / "out"
    cap = ["--max_cost_usd", "0.008", "--judge_max_tokens", "100", "--concurrency", "1"]
    with judging(lambda prompt, asked: "[[5]]") as (judge, url):
        assert bench(models, folder, out, url, "--judge", "gpt-4-0125-preview", *cap) == 3
        results = json.loads((out / "mt_bench" / "results.json").read_text())
        assert 0 < results["usd"] <= 0.008
        assert results["usd"] == pytest.approx(0.0013 * judge.paid.total())
        assert results["stopped"] == "cost cap"
        assert results["missing"] == 16 - judge.paid.total() > 0
        assert bench(models, folder, out, url, "--judge", "gpt-4-0125-preview") == 0
        assert set(judge.paid.values()) == {1}
    assert json.loads((out / "mt_bench" / "results.json").read_text())["missing"] == 0


def test_a_flag_can_be_mended_until_a_verdict_was_paid_for(models, tmp_path, capsys):
    """A judge that refuses temperature 0: both what it refuses and the setting may be asked anew, until it answers."""
    folder, out = write_bench(tmp_path / "fastchat"), tmp_path / "out"
    with judging(lambda prompt, asked: 400) as (judge, url):
        with pytest.raises(SystemExit) as exit:  # every request is refused, so the run is
            bench(models[:1], folder, out, url)
        assert exit.value.code == 2
    with judging(lambda prompt, asked: "[[5]]") as (judge, url):
        assert bench(models[:1], folder, out, url, "--judge_temperature", 1) == 0
        assert {body["temperature"] for body in judge.bodies} == {1.0}
        capsys.readouterr()
        with pytest.raises(SystemExit):
            bench(models[:1], folder, out, url, "--judge_temperature", 0.5)
        assert "temperature: was 1.0, now 0.5" in capsys.readouterr().err


def test_a_judge_that_is_gone_is_told_before_a_model_answers(models, tmp_path, capsys):
    folder, out = write_bench(tmp_path / "fastchat"), tmp_path / "out"
    known = json.dumps({"gpt-4": {"shutdown_date": "2026-10-23"}})
    with fault_server(models=known) as url:
        for name, words in (("gpt-4", "was shut down on 2026-10-23"), ("o3-mini", "was shut down on 2026-10-23")):
            with pytest.raises(SystemExit) as exit:
                bench(models, folder, out, url, "--judge", name)
            assert exit.value.code == 2
            told = capsys.readouterr().err
            assert words in told
            assert "set --judge (JUDGE) to gpt-5.6-sol" in told
    assert not (out / "mt_bench" / "model_answer").exists()


def test_a_judge_does_not_meet_the_lock_of_another_and_reckons_with_its_money(models, tmp_path):
    """The other has spent US$ 0.006 of 0.014; 8 calls, held back at some 0.005 each and costing 0.0013, do not fit."""
    folder, out = write_bench(tmp_path / "fastchat"), tmp_path / "out"
    other = out / "alpaca_eval" / "judge" / "other"
    cap = ["--judge", "gpt-4-0125-preview", "--judge_max_tokens", "90", "--concurrency", "1", "--max_cost_usd", 0.014]
    with RunFolder(other, results="verdicts.jsonl"), judging(lambda prompt, asked: "[[5]]") as (judge, url):
        (other / "spent").write_text("0.006\n")
        assert bench(models[:1], folder, out, url, *cap) == 3
    results = json.loads((out / "mt_bench" / "results.json").read_text())
    assert results["stopped"] == "cost cap"
    assert 0 < results["usd"] <= 0.008
    assert judge.paid.total() < 8


def test_two_accounts_share_one_cap(tmp_path):
    """US$ 1 for both: 0.6 held in one leaves no 0.6 for the other, until it turns out to have cost 0.1."""
    folders = [tmp_path / "mt_bench" / "judge" / name for name in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    one, other = (SharedAccount(folder, None, 1.0) for folder in folders)
    asyncio.run(one.hold(0.6))
    assert not other.fits(0.6)
    one.settle(0.6, spent=0.1)
    assert other.fits(0.6)
    assert not one.fits(0.6)  # the other may hold that by now
    assert SharedAccount(folders[0], None, None, 5.0).fits(1e6)  # no cap of its own


@pytest.mark.parametrize("batch", [False, True], ids=["calls", "batches"])
def test_a_judge_with_labellings_faults_is_labellings_client(models, tmp_path, batch):
    """Rate limits, resets, wrong usage, wrong bodies; and the Batch API, whose answers come twice or expire."""
    folder, out, log = write_bench(tmp_path / "fastchat"), tmp_path / "out", tmp_path / "log.jsonl"
    faults = {"rate_limited": 0.2, "reset": 0.1, "garbage": 0.1, "wrong_usage": 0.3, "server_error": 0.1}
    faults |= {"duplicates": 0.3, "expired": 0.3} if batch else {}
    more = ["--batch", "--batch_poll", 0.1] if batch else ["--timeout", 2]
    with fault_server(log, verdict="Rating: [[7]]", **faults) as url:
        assert bench(models[:1], folder, out, url, *more) == 0
    assert json.loads((out / "mt_bench" / "results.json").read_text())["models"]["sft"]["overall"] == 7
    paid = Counter(line["key"] for line in read_lines(log) if line["got"] == "verdict")
    assert set(paid.values()) == {1}
    assert len(paid) == 8


def test_a_models_own_end_of_turn_ends_its_answers(tiny, tmp_path):
    """Every token is an end: so each answer has one token, and none of it is text."""
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    vocabulary = list(range(len(load_tokenizer(model))))
    GenerationConfig(eos_token_id=vocabulary).save_pretrained(model)
    policy = Policy("x", str(model), PolicyOptions(out="", models=[], dtype="fp32", max_new_tokens=5))
    (reply,) = policy.reply([Question(1, ["Hi", "More"])])
    assert (reply.turns, reply.tokens, reply.ended) == (["", ""], [1, 1], [True, True])
    (reply,) = Policy("y", str(tiny / "model"), policy.options).reply([Question(1, ["Hi"])])
    assert reply.tokens == [5]


def test_a_prompt_that_leaves_no_room_gets_what_room_there_is(tiny):
    """The tiny model has 256 positions."""
    policy = Policy("x", str(tiny / "model"), PolicyOptions(out="", models=[], dtype="fp32", max_new_tokens=8))
    policy.load()
    found = list(policy.answer([[5] * length for length in (3, 250, 256, 300)], temperature=0.0))
    assert [len(answer.response_ids) for answer in found] == [8, 6, 0, 0]


def test_interrupted_answers_are_the_uninterrupted_ones(models, tmp_path):
    folder = write_bench(tmp_path / "fastchat")
    assert bench(models[:1], folder, tmp_path / "whole") == 0
    whole = tmp_path / "whole" / "mt_bench" / "model_answer"
    torn = tmp_path / "torn" / "mt_bench" / "model_answer"
    torn.mkdir(parents=True)
    lines = (whole / "sft.jsonl").read_text().splitlines(keepends=True)
    (torn / "sft.jsonl").write_text("".join(lines[:1]) + lines[1][:40])
    (torn / "sft.json").write_text((whole / "sft.json").read_text())
    assert bench(models[:1], folder, tmp_path / "torn") == 0
    turns = [{line["question_id"]: line["choices"] for line in read_lines(f / "sft.jsonl")} for f in (whole, torn)]
    assert turns[0] == turns[1]


def test_answers_of_other_settings_are_refused(models, tmp_path, capsys):
    folder = write_bench(tmp_path / "fastchat")
    assert bench(models[:1], folder, tmp_path / "out") == 0
    with pytest.raises(SystemExit) as exit:
        bench([models[1].replace("tlcr", "sft")], folder, tmp_path / "out")
    assert exit.value.code == 2
    assert "weights was" in capsys.readouterr().err


def test_wrong_input_is_said_before_a_model_loads(tmp_path, capsys):
    for models, folder, words in [
        (["sft"], tmp_path, "expected NAME=FOLDER"),
        (["a=/nowhere"], tmp_path, "no model in /nowhere"),
        ([f"a={tmp_path}", "a=x"], tmp_path, "no model in"),
        ([], tmp_path, "name at least 1"),
    ]:
        with pytest.raises(SystemExit):
            bench(models, folder, tmp_path / "out")
        assert words in capsys.readouterr().err


QUESTION = {"question_id": 101, "category": "math", "turns": ["One?", "Two?"]}
REFERENCE = {"question_id": 101, "choices": [{"turns": ["1"]}]}


@pytest.mark.parametrize(
    ("file", "lines", "words"),
    [
        ("question.jsonl", [], "no questions"),
        ("question.jsonl", [QUESTION, QUESTION], "question.jsonl:2: question_id 101 is there twice"),
        ("question.jsonl", [QUESTION | {"turns": ["One?", 2]}], "question.jsonl:1: expected"),
        ("question.jsonl", [QUESTION | {"turns": ["half \ud800"]}], "question.jsonl:1: expected"),
        ("question.jsonl", [QUESTION | {"category": ["math"]}], "question.jsonl:1: expected"),
        ("reference_answer/gpt-4.jsonl", [REFERENCE], "no reference answer to each turn of question 101"),
        ("reference_answer/gpt-4.jsonl", [REFERENCE | {"choices": []}], "gpt-4.jsonl:1: not an answer"),
        ("../judge_prompts.jsonl", [{"name": name} for name in mt_bench.PROMPTS], "does not fit question 81"),
    ],
)
def test_a_bench_that_does_not_fit_is_refused_before_a_model_loads(tmp_path, file, lines, words):
    folder = write_bench(tmp_path)
    write_jsonl(folder / "mt_bench" / file, lines)
    with pytest.raises(InputError, match=words):
        mt_bench.read_bench(str(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("generation_batch_size", 0), ("judge_max_tokens", 0), ("max_new_tokens", -1)],
)
def test_numbers_that_are_too_small_are_refused(name, value):
    with pytest.raises(InputError, match=f"--{name} {value}: must be from 1"):
        parse(mt_bench.Options, ["--out", "x", f"--{name}={value}"])


def test_fastchats_own_files_are_understood():
    bench = mt_bench.read_bench(str(shared("mt_bench")))
    assert len(bench.questions) == 80
    math_question = next(q for q in bench.questions if q["category"] == "math")
    system, user = bench.messages(math_question, ["FIRST ANSWER", "SECOND ANSWER"], turn=2)
    assert "second question" in system["content"]
    assert all(part in user["content"] for part in ("FIRST ANSWER", "SECOND ANSWER", math_question["turns"][1]))
    assert bench.references[math_question["question_id"]][1] in user["content"]


def test_dialogues_follow_the_models_own_template():
    tokenizer = byte_level_tokenizer(["abc"])
    question = Question(1, ["Hi", "More"])
    assert prompt_text(tokenizer, question, ["Yes"]) == ("\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: More\n\nAssistant:")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
    )
    assert prompt_text(tokenizer, question, ["Yes"]) == "<user>Hi<assistant>Yes<user>More<go>"
    # A template that writes BOS for a tokenizer that adds it: once is enough.
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert prompt_ids(tokenizer, question, []).count(tokenizer.bos_token_id) == 1
    assert prompt_text(tokenizer, Question(1, ["whole"], raw=True), []) == "whole"


def test_bootstrap_interval_of_a_mean_is_close_to_the_normal_one():
    values = np.random.default_rng(0).normal(3, 1, (400, 1))
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - 1.96 / 20, values.mean() + 1.96 / 20), abs=0.02)
    # Rows are drawn whole: two equal turns are one measurement, not two.
    assert bootstrap_interval(np.repeat(values, 2, axis=1)) == pytest.approx((low, high))
    assert all(map(math.isnan, bootstrap_interval(np.array([[1.0]]))))
