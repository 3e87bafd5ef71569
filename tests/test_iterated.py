"""Iterated TLCR: what a round is made of, the policy's own answers, and what is reported of the rounds."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, patience

from deepspeed_chat_tlcr.records import Preference, read_jsonl
from evaluation.iterated import main as report
from labeling.own_answers import main as answer
from labeling.own_answers import part_of_round


def test_each_round_answers_other_prompts_while_there_are_any():
    preferences = [Preference(str(number), "a", "b") for number in range(5)]

    def prompts(count: int, round: int) -> str:
        return "".join(one.prompt for one in part_of_round(preferences, count, round))

    assert [prompts(2, round) for round in (1, 2, 3, 4)] == ["01", "23", "40", "12"]
    assert prompts(9, 2) == "01234"


def test_a_round_that_cannot_be_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        answer(["--policy", "p", "--output_dir", "o", "--round", "1000000"])
    assert ended.value.code == 2
    assert "--round 1000000: must be from 1 to 1,000" in capsys.readouterr().err


def test_own_answers_become_the_rejected_responses(tiny, tmp_path):
    """The real entry point: prompts and chosen responses of the reward part, rejected ones from the policy."""
    options = ("--prompts", 10, "--eval_prompts", 3, "--max_answer_seq_len", 6, "--batch_size", 4)
    data = ("--policy", tiny / "model", "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path)
    answer([*map(str, (*data, *options))])
    known = {(r["prompt"], r["chosen"]): r["rejected"] for _, r in read_jsonl(tiny / "data.jsonl")}
    reward_part = {record["prompt"] for _, record in read_jsonl(tiny / "revisions.jsonl")}
    own = {split: [record for _, record in read_jsonl(tmp_path / f"{split}.jsonl")] for split in ("train", "eval")}
    assert 0 < len(own["train"]) <= 10
    for record in own["train"]:
        assert record["prompt"] in reward_part
        assert record["rejected"] != known[record["prompt"], record["chosen"]]
    assert {r["prompt"] for r in own["eval"]} & reward_part == set()
    counts = json.loads((tmp_path / "results.json").read_text())
    assert counts["attn_implementation"] == "sdpa"
    assert counts["train"] == {"prompts": 10, "answers": len(own["train"])}


def test_two_processes_write_the_answers_of_one(tiny, tmp_path, in_process, quick_workers):
    for number in (1, 2):
        in_process(
            answer,
            *("--policy", tiny / "model", "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path / str(number)),
            *("--prompts", 10, "--eval_prompts", 3, "--max_answer_seq_len", 6, "--batch_size", 3),
            *("--num_processes", number, "--attn_implementation", "eager"),
        )
    for name in ("train.jsonl", "eval.jsonl"):
        written = [(tmp_path / number / name).read_bytes() for number in "12"]
        assert written[0] == written[1]
        assert written[0].count(b"\n") > 1


def test_a_round_goes_on_from_the_one_before(tmp_path):
    """PLAN=1, two rounds: whose answers, which labels, which judge, which policy."""
    own = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": own, "HOME": str(tmp_path), "PLAN": "1", "ROUNDS": "2"}
    script = ["bash", str(ROOT / "training_scripts" / "run_iterated.sh"), "run"]
    done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines() if ".py" in line]

    def values(program: str, flag: str) -> list[list[str]]:
        found = []
        for words in commands:
            if program in words and flag in words:
                rest = words[words.index(flag) + 1 :]
                ends = [place for place, word in enumerate(rest) if word.startswith("--")]
                found.append(rest[: ends[0]] if ends else rest)
        return found

    assert values("labeling/own_answers.py", "--policy") == [
        ["run/step3_ppo_tlcr/actor"],
        ["run/round1/step3_ppo_tlcr/actor"],
    ]
    first = ["run/labeling/revisions.jsonl", "run/round1/labeling/revisions.jsonl"]
    assert values("step2_discriminator/main.py", "--revisions") == [
        first,
        [*first, "run/round2/labeling/revisions.jsonl"],
    ]
    assert values("evaluation/discriminator.py", "--discriminator") == [
        ["run/step2_discriminator"],
        ["run/round1/step2_discriminator"],
        ["run/round1/step2_discriminator"],
        ["run/round2/step2_discriminator"],
    ]
    assert values("step3_ppo_tlcr/main.py", "--actor_model_name_or_path") == [
        ["run/step3_ppo_tlcr/actor"],
        ["run/round1/step3_ppo_tlcr/actor"],
    ]
    assert values("step3_ppo_tlcr/main.py", "--critic_model_name_or_path")[1] == ["run/round2/step2_discriminator"]


def test_the_report_of_the_rounds(tmp_path):
    def audit(folder: Path, negative: float) -> None:
        tokens = {"share_negative": negative, "share_positive": 0.25}
        found = {"tokens": tokens, "edit_ratio": {"mean": 0.5}, "unedited": 1, "revisions": 4}
        write(folder / "audit" / "audit.json", found)

    def write(path: Path, content: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    audit(tmp_path, 0.5)
    with pytest.raises(SystemExit):
        report(["--run_dir", str(tmp_path), "--rounds", "1"])
    for number, negative in ((1, 0.375), (2, 0.25)):
        folder = tmp_path / f"round{number}"
        audit(folder, negative)
        for name, accuracy in (("before", 0.6), ("after", 0.7)):
            measures = {"edited_accuracy": accuracy, "majority_accuracy": 0.5, "auroc": 0.8}
            write(folder / name / "discriminator" / "results.json", measures)
        write(folder / "step3_ppo_tlcr" / "results.json", {"reward/per_token": 0.1, "policy/kl": 2.0})
        write(folder / "labeling" / "run.json", {"usd": 1.5, "counts": {"pairs": 8, "failures": 1}})
        write(folder / "held_out" / "labeling" / "run.json", {"usd": 0.25})
    report(["--run_dir", str(tmp_path), "--rounds", "2"])
    found = json.loads((tmp_path / "iterated.json").read_text())
    assert [one["label_shift"]["share_negative"] for one in found["rounds"]] == [-0.125, -0.125]
    assert found["rounds"][1]["discriminator_after"]["edited_accuracy"] == 0.7
    assert found["rounds"][0]["labels"]["unedited_share"] == 0.25
    assert found["rounds"][0]["unrevised_share"] == 0.125
    assert found["rounds"][0]["labelling_usd"] == 1.75
