"""People's corrections from file to better policy: the commands of run_qa_feedback.sh, tiny, on real records."""

import gzip
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch, patience, shared
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from evaluation.qa_feedback import rate_with_error

TINY = {
    "VOCABULARY": 700,
    "HIDDEN_SIZE": 32,
    "LAYERS": 1,
    "BASE_BATCH_SIZE": 32,
    "BASE_EPOCHS": 1,
    "DISCRIMINATOR_EPOCHS": 2,
    "PROMPT_EPOCHS": 1,
    "MAX_ANSWER_LEN": 24,
    "MAX_PROMPT_LEN": 256,
    "ANSWERS": 2,
    "MAX_SEQ_LEN": 256,
    "MORE_METHODS": "ppo_seq",
    "SEQUENCE_EPOCHS": 1,
}


def planned(output: Path, data: Path) -> list[list[str]]:
    """What run_qa_feedback.sh would run, in order: a program and its arguments."""
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    variables |= {name: str(value) for name, value in {**TINY, "PLAN": 1, "QA_FEEDBACK": data}.items()}
    script = ["bash", str(ROOT / "training_scripts" / "run_qa_feedback.sh"), str(output)]
    done = subprocess.run(
        script, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=patience(60)
    )
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        program = next((at for at, word in enumerate(words) if word.endswith(".py")), None)
        if program is not None:
            found.append(words[program:])
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run on 40 of the records."""
    source = shared("qa_feedback_dev.jsonl.gz")
    folder = tmp_path_factory.mktemp("qa")
    data = folder / "records.jsonl"
    with gzip.open(source, "rt", encoding="utf-8") as file:
        data.write_text("".join(itertools.islice(file, 40)), encoding="utf-8")
    commands = planned(folder / "run", data)
    for program, *arguments in commands:
        launch(program, *arguments)
    stages = [program.split("/")[0] for program, *_ in commands]
    assert stages == [
        *("labeling", "evaluation", "labeling", "step1_sft", "step1_sft"),
        *("step2_discriminator", "step3_ppo_tlcr", "step2_discriminator", "step3_ppo_tlcr", "evaluation"),
    ]
    return folder / "run"


def test_the_report_holds_what_the_chain_was_run_for(finished):
    found = json.loads((finished / "results.json").read_text())
    assert found["prompts"] == {"train": 32, "held_out": 8}
    people = found["agreement_with_people"]
    assert people["responses"] == 40
    # The share of deleted and replaced tokens in people's error spans, and the other way round: far above the chance
    # level, which is the share of tokens that are marked (precision) or edited (recall), about a half.
    assert people["precision"] > 0.8
    assert people["recall"] > 0.8
    assert people["marked"] / people["tokens"] < 0.65
    assert people["edited"] / people["tokens"] < 0.65
    judge = found["discriminator"]
    assert 0 < judge["edited_accuracy"] < 1
    assert 0.5 <= judge["majority_accuracy"] < 1
    assert judge["pipeline_difference"] < 1e-3
    for name in ("sft", "tlcr", "ppo_seq"):
        assert found[name]["answers"] == 16
        assert -1 < found[name]["reward_per_token"] < 1
        assert 1 <= found[name]["response_length"] <= 24
    assert found["sft"]["kl"] == 0
    assert 0 not in (found["tlcr"]["kl"], found["ppo_seq"]["kl"])
    assert found["tlcr"]["kl"] != found["ppo_seq"]["kl"], "two policies"
    judged = json.loads((finished / "step2_sequence" / "results.json").read_text())
    assert 0 <= judged["eval/pair_accuracy"] <= 1
    assert found["ppo"]["updates"] == 2  # 32 prompts, 16 at a time


def test_a_method_that_is_none_is_named(tmp_path):
    script = ["bash", str(ROOT / "training_scripts" / "run_qa_feedback.sh"), str(tmp_path)]
    environment = os.environ | {"PLAN": "1", "MORE_METHODS": "grpo"}
    done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 2
    assert 'MORE_METHODS: "grpo" is none of ppo_seq' in done.stderr


def test_no_stage_saw_a_held_out_prompt(finished):
    def prompts(name: str) -> set[str]:
        return {json.loads(line)["prompt"] for line in (finished / "prepared" / name).read_text().splitlines()}

    assert not prompts("pairs/train.jsonl") & prompts("pairs/eval.jsonl")
    assert prompts("pairs/train.jsonl") == prompts("revisions/train.jsonl") <= prompts("texts/train.jsonl")
    assert not prompts("texts/train.jsonl") & prompts("pairs/eval.jsonl")


def test_what_is_saved_loads_in_transformers_own_classes(finished):
    classify = pipeline("token-classification", model=str(finished / "step2_discriminator"))
    assert {entry["entity"] for entry in classify("Who wrote it? She did.")} <= {"POSITIVE", "NEGATIVE"}
    actor = AutoModelForCausalLM.from_pretrained(finished / "step3_ppo_tlcr" / "actor")
    tokenizer = AutoTokenizer.from_pretrained(finished / "step3_ppo_tlcr" / "actor")
    text = "Ångström's  “unit”\n\t½"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text, "a byte-level BPE loses nothing"
    written = actor.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=2, pad_token_id=0)
    assert written.size(1) > len(tokenizer(text)["input_ids"])


def test_rate_and_its_error_by_hand():
    """Rewards 2 and 0 over 4 and 4 tokens: rate 2 / 8; deviations 1 and -1, so sd sqrt 2, / sqrt 2 prompts / 4."""
    rate, error = rate_with_error(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 4.0]))
    assert rate == pytest.approx(0.25)
    assert error == pytest.approx(0.25)
