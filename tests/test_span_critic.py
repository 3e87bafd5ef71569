"""DRLC's rewards: a chat model's spans by hand, and step 3 beside a real server that answers, misbehaves or is lost."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, patience
from labeling_helpers import fault_server, lines
from test_dense_rewards import close, step3_arguments, worlds  # noqa: F401 (a fixture)

import step2_discriminator.main as step2
import step3_ppo_tlcr.main as step3
from deepspeed_chat_tlcr.asking.endpoint import CUT, ChatAnswer, Unusable
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.marking import load_template, question, read_marks
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.spans import Marks, content_id, places, read_marked
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from labeling.spans import main as label_spans
from step2_discriminator.examples import marked_examples
from step3_ppo_tlcr.rewards import parse_reward, sequence_reward, span_reward
from step3_ppo_tlcr.texts import Answer

VERDICT = 'Positive:\n1. "e"\n2. "t"\nNegative:\n1. "a"'


def test_drlc_by_hand():
    """I| hate| this| nice| day: "hate this" is bad, "nice" is good, R = -1 comes on the last token."""
    words = ["I", " hate", " this", " nice", " day"]
    ends = torch.tensor([0, *map(len, words)]).cumsum(0).tolist()
    spans = list(pairwise(ends))
    answer, mask = Answer("", "".join(words), spans, ended=False), torch.ones(1, 5)
    marks = [Marks(("nice",), ("hate this",))]
    intrinsic = span_reward(marks, [answer], mask)
    close(intrinsic + sequence_reward(torch.full((1, 1), -1.0), mask), [[0.0, -0.8, -0.8, 0.8, -1.0]])
    both = span_reward([Marks(("this",), ("hate this",))], [answer], mask, positive=0.5, negative=-0.25)
    close(both, [[0.0, -0.25, 0.25, 0.0, 0.0]])
    close(span_reward([None], [answer], mask), [[0.0] * 5])


def test_a_span_takes_the_first_place_that_is_free():
    assert places("a nice, nice day", ["nice", "nice", "nice"]) == ([(2, 6), (8, 12)], 1)
    assert places("hate this", ["hate this", "hate"]) == ([(0, 9)], 1)
    assert places("aaa", ["aa", "a"]) == ([(0, 2), (2, 3)], 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Positive:\n1. "so kind"\nNegative:\nNone', (["so kind"], [])),
        ("**Positive spans:**\n- ‘so kind’\n\n## Negative\n* rude, 3. times\n", (["so kind"], ["rude, 3. times"])),
        ('Sure!\nNegative: "bad"\nPositive: None identified.', ([], ["bad"])),
        ('positive:\n"None of it"\nnegative:\n(none)', (["None of it"], [])),
        ('Positive:\n1. "a"\n2. "b"\n3. "c"\nNegative:\n', (["a", "b"], [])),
    ],
)
def test_an_answer_s_spans(text, expected):
    marks = read_marks(ChatAnswer(text, "stop", {}, "m"), most=2)
    assert (list(marks.positive), list(marks.negative)) == expected


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("Positive:\n1. x", "stop", "headings_missing"),
        ("", "stop", "empty"),
        (VERDICT, "length", CUT),
        (VERDICT, "content_filter", "refusal"),
    ],
)
def test_an_answer_that_cannot_be_read(text, finish, reason):
    with pytest.raises(Unusable, match=reason):
        read_marks(ChatAnswer(text, finish, {}, "m"))


def test_the_question_shows_both_texts_and_its_answer_is_a_line(tmp_path):
    asked = question("Human: {response}?", " fine", "m", most=3)
    text = asked.messages[0]["content"]
    assert "Human: {response}?\n" in text
    assert "\nfine\n" in text
    assert "At most 3 pieces" in text
    (tmp_path / "spans.jsonl").write_text(asked.accept(ChatAnswer(VERDICT, "stop", {}, "m"), {"usd": 0.5}))
    [line] = read_marked(tmp_path / "spans.jsonl")
    assert (line.id, line.response, line.marks.negative) == (content_id("Human: {response}?", " fine"), " fine", ("a",))
    (tmp_path / "own.txt").write_text("Only {prompt}")
    with pytest.raises(InputError, match=r"own.txt: the placeholder \{response\} is missing"):
        load_template(str(tmp_path / "own.txt"), "--span_prompt_file")
    (tmp_path / "spans.jsonl").write_text('{"id": "1", "prompt": "", "response": "x", "positive": "e"}\n')
    with pytest.raises(InputError, match=r"spans.jsonl:1: 'positive'"):
        list(read_marked(tmp_path / "spans.jsonl"))


def test_a_chat_model_s_name_may_hold_a_colon():
    spec = parse_reward("critic:qwen2.5:7b@0.5", "D")
    assert (spec.path, spec.weight, spec.model) == ("qwen2.5:7b", 0.5, None)
    with pytest.raises(InputError, match="name the chat model"):
        parse_reward("critic", "D")


def critic_arguments(tiny: Path, folder: Path, output: Path, url: str, *more: object) -> list[str]:
    terms = ("--reward", f"sequence:{folder / 'rm'}", "critic:gpt-4o@0.5", "--span_base_url", url)
    seconds = ("--span_seconds", patience(5), "--save_interval", 1, "--span_price", "2.5,10")
    return [str(part) for part in step3_arguments(tiny, output, folder / "disc", *terms, *seconds, *more)]


def test_a_killed_run_asks_nothing_twice_and_ends_alike(tiny, worlds, tmp_path, monkeypatch):  # noqa: F811
    """Killed before the checkpoint of step 2: the answers of step 2 are written anew, their marks are on disk."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdef")
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\nimport step3_ppo_tlcr.main as step3\nfrom deepspeed_chat_tlcr.metrics import MetricsLog\n"
        "whole_write = MetricsLog.write\n"
        "def write(self, step, metrics):\n    whole_write(self, step, metrics)\n"
        "    if step == 2 and 'half' in sys.argv[1]:\n        os._exit(9)\n"
        "MetricsLog.write = write\nstep3.main(sys.argv[2:])\n"
    )
    log, logs = tmp_path / "log", {}
    with fault_server(log, verdict=VERDICT, alike=True) as url:
        for folder, status in (("whole", 0), ("half", 9), ("half-again", 0)):
            output = tmp_path / folder.removesuffix("-again")
            arguments = critic_arguments(tiny, worlds, output, url, "--span_threshold", 100, "--test_stop_step", 3)
            command = [sys.executable, script, folder.replace("half-again", "rest"), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert done.returncode == status, done.stderr[-3000:]
            logs[folder] = Counter(line["key"] for line in lines(log))
    whole, half = logs["whole"], logs["half-again"] - logs["whole"]
    assert set(whole.values()) == {1}
    assert half == whole
    kept = ["reward/critic", "reward/sequence", "spans/asked", "spans/unanswered", "spans/unmatched", "spans/usd"]
    once, twice = (
        [{name: line[name] for name in kept} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "half")
    )
    assert once == twice
    assert [line["spans/unanswered"] for line in once] == [0, 0, 0]
    assert any(line["reward/critic"] for line in once)
    assert 0 < once[0]["spans/usd"] < once[1]["spans/usd"]
    spent = json.loads((tmp_path / "half" / "critic" / "rank-0" / "run.json").read_text())["usd"]
    assert spent == pytest.approx(once[2]["spans/usd"], rel=1e-4)
    assert "sk-test" not in (tmp_path / "half" / "critic" / "rank-0" / "calls.jsonl").read_text()


def test_one_of_two_ranks_loses_its_endpoint(tiny, worlds, tmp_path):  # noqa: F811
    """Its rewards are 0 from then on and its sets wait no longer than they may; the other rank's are whole."""
    with fault_server(verdict=VERDICT, lost_key="1") as url:
        keys = ("--span_api_key_env", "LOCAL_RANK", "--span_seconds", 3, "--span_concurrency", 2)
        arguments = critic_arguments(tiny, worlds, tmp_path / "ppo", url, *keys)
        runs = [{"program": "step3_ppo_tlcr/main.py", "arguments": arguments, "ranks": 2, "kill_after": 0}]
        command = [sys.executable, ROOT / "tests" / "two_ranks.py", json.dumps(runs), tmp_path / "log.txt"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    said = (tmp_path / "log.txt").read_text()
    assert done.stdout.splitlines()[-1:] == ["[[0, 0]]"], done.stderr[-2000:] + said[-4000:]
    assert [line["spans/unanswered"] for line in read_metrics(tmp_path / "ppo" / "metrics.jsonl")] == [0.5, 0.5]
    assert said.count("rank 1: critic: late") == 1
    whole, lost = (lines(tmp_path / "ppo" / "critic" / f"rank-{rank}" / "spans.jsonl") for rank in (0, 1))
    assert len(whole) == 1 + 2 * 4  # the first question, and two sets of four
    assert len(lost) == 1
    calls = lines(tmp_path / "ppo" / "critic" / "rank-1" / "calls.jsonl")
    assert 0 < sum("sent" in call for call in calls) - 1 <= 2 * 2 * 2  # two at a time, and never more than the rows


def test_what_cannot_be_used_or_paid_counts_nothing(tiny, worlds, tmp_path, in_process):  # noqa: F811
    """Step 1's replies are good, step 2's have no headings, step 3's would cost more than may be spent."""
    os.environ["OPENAI_API_KEY"] = "none"
    log, output = tmp_path / "log", tmp_path / "ppo"
    with fault_server(log, verdict=VERDICT) as good, fault_server(log, verdict="It is fine.") as bad:
        with pytest.raises(SystemExit):  # the first question shows it
            in_process(step3.main, *critic_arguments(tiny, worlds, output, bad))
        assert not (output / "metrics.jsonl").exists()
        runs = ((good, 1, ()), (bad, 2, ()), (good, 3, ("--span_max_cost_usd", 0.008)))
        for url, steps, more in runs:
            in_process(
                step3.main,
                *critic_arguments(tiny, worlds, output, url, "--test_stop_step", steps, "--resume", "never", *more),
            )
    found = read_metrics(output / "metrics.jsonl")
    assert [line["spans/unanswered"] for line in found] == [0, 1, 1]
    assert found[0]["reward/critic"] != 0
    assert [line["reward/critic"] for line in found[1:]] == [0, 0]
    asked = Counter(line["key"] for line in lines(log))
    assert sorted(asked.values()) == [1] * 8 + [2]  # twice: the question that comes before any
    # By its limits the next question may cost 0.0095 US$; those that were answered cost some 0.001 each.
    assert 0.004 < found[2]["spans/usd"] < 0.016


def test_what_is_refused_before_anything_loads(tiny, worlds, in_process, capsys):  # noqa: F811
    os.environ["OPENAI_API_KEY"] = "none"
    with fault_server(refuse_key=True) as url:
        for more, said in (
            ((), "refuses the key"),
            (("--reward", "critic:gpt-4o", "--span_threshold", 1), "--span_threshold"),
            (("--reward", "critic:gpt-4o", "critic:other"), "one chat model"),
            (("--span_price", "1"), "--span_price 1: expected IN,OUT"),
            (("--span_base_url", "127.0.0.1"), "--span_base_url"),
            (("--span_seconds", 0), "--span_seconds"),
        ):
            with pytest.raises(SystemExit):
                in_process(step3.main, *critic_arguments(tiny, worlds, worlds / "no", url, *more))
            assert said in capsys.readouterr().err


def test_a_character_of_several_tokens_is_all_of_theirs():
    answer = Answer("", "東京", [(0, 1), (0, 1), (0, 1), (1, 2), (2, 2)], ended=True)
    close(span_reward([Marks(("東",), ())], [answer], torch.ones(1, 5)), [[0.8, 0.8, 0.8, 0, 0]])


def test_offline_marks_become_a_discriminator(tiny, tmp_path, in_process):
    """Good words 1, bad ones 0, the rest 0.5; and what cannot be is refused."""
    os.environ["OPENAI_API_KEY"] = "none"
    pool = tmp_path / "pool.jsonl"
    pool.write_text((tiny / "data.jsonl").read_text())
    verdict = 'Positive:\n1. "lovely"\n2. "likes you"\nNegative:\n1. "awful"\n2. "hates you"'
    with fault_server(verdict=verdict) as url:
        arguments = ["--responses", str(pool), "--model", "m", "--base_url", url, "--output_dir", str(tmp_path / "out")]
        assert label_spans(arguments + ["--limit", "5"]) == 3
        assert label_spans(arguments) == 0
    marked = list(read_marked(tmp_path / "out" / "spans.jsonl"))
    assert len(marked) == len({line.id for line in marked}) == 120
    tokenizer = load_tokenizer(tiny / "model")
    examples, said = marked_examples(marked, tokenizer, 128, "train")
    assert "120 responses, 0 dropped" in said
    targets = {0.0: "", 1.0: ""}
    for example in examples:
        for id, target in zip(example.response_ids, example.targets, strict=True):
            if target != 0.5:
                targets[target] += tokenizer.decode([id])
    assert {word for word in ("awful", "hates", "lovely", "likes") if word in targets[0.0]} == {"awful", "hates"}
    assert {word for word in ("awful", "hates", "lovely", "likes") if word in targets[1.0]} == {"lovely", "likes"}
    step2_arguments = (
        *("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--dtype", "fp32"),
        *("--spans", tmp_path / "out" / "spans.jsonl", "--output_dir", tmp_path / "disc", "--learning_rate", 1e-2),
        *("--per_device_train_batch_size", 8, "--num_train_epochs", 2, "--tokens_per_micro_batch", 256),
    )
    with pytest.raises(SystemExit):  # of prompts of the SFT and RL part too
        in_process(step2.main, *step2_arguments)
    in_process(step2.main, *step2_arguments, "--allow_foreign_revisions")
    assert json.loads((tmp_path / "disc" / "results.json").read_text())["eval/auroc"] > 0.9
    with pytest.raises(SystemExit):
        in_process(step2.main, *step2_arguments, "--revisions", tiny / "revisions.jsonl")
