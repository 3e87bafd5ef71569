"""Work spread over processes: the same results in the same order; what happens when one of them fails or is killed."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, patience, write_jsonl
from evaluation_helpers import other_model, read_lines, reward_model

from deepspeed_chat_tlcr import workers
from deepspeed_chat_tlcr.errors import InputError, RunError
from deepspeed_chat_tlcr.workers import processes_of, spread
from evaluation import reward_scores


def square(folder: str, number: int) -> tuple[int, int]:
    """Its square, and whose work it was; 13 is wrong, and 6 ends the process."""
    (Path(folder) / str(number)).touch()
    if number == 13:
        raise InputError("13: unlucky")
    if number == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01 * (number % 2))  # so that they do not finish in order
    return number**2, os.getpid()


def squares(folder: str):
    (Path(folder) / f"loaded by {os.getpid()}").touch()
    return functools.partial(square, folder)


def test_results_keep_the_order_of_the_items(tmp_path, quick_workers):
    load = functools.partial(squares, str(tmp_path))
    items = [3, 1, 2, 5, 4, 7]
    alone = list(spread(load, items, 1))
    together = list(spread(load, items, 2))
    assert [value for value, _ in together] == [value for value, _ in alone] == [9, 1, 4, 25, 16, 49]
    assert {process for _, process in alone} == {os.getpid()}
    workers_of = {process for _, process in together}
    assert os.getpid() not in workers_of
    assert {int(path.name.split()[-1]) for path in tmp_path.glob("loaded*")} == {os.getpid(), *workers_of}
    assert list(spread(load, [], 4)) == []


def test_an_error_of_the_work_and_a_killed_process_are_told(tmp_path, quick_workers):
    load = functools.partial(squares, str(tmp_path))
    with pytest.raises(InputError, match="13: unlucky"):
        list(spread(load, [1, 13], 2))
    with pytest.raises(RunError, match="processes was killed"):
        list(spread(load, [1, 6], 2))


def test_a_process_for_each_gpu_unless_told(monkeypatch):
    assert (processes_of(0), processes_of(3)) == (1, 3)  # on a CPU

    class EightGpus:
        def device_name(self) -> str:
            return "cuda"

        def device_count(self) -> int:
            return 8

    monkeypatch.setattr(workers, "get_accelerator", EightGpus)
    assert (processes_of(0), processes_of(3)) == (8, 3)
    with pytest.raises(InputError, match="--num_processes 9: each needs a GPU, and 8 are visible"):
        processes_of(9)


def answers_of(out: Path) -> dict[str, list[dict]]:
    """Every line of every answer file, without the time at which it was written."""
    return {
        str(path.relative_to(out)): [{**line, "tstamp": 0} for line in read_lines(path)]
        for path in sorted(out.glob("answers/*/*.jsonl"))
    }


def test_two_processes_give_the_answers_and_scores_of_one(tiny, tmp_path, in_process, quick_workers):
    """Sampled answers of two models, scored twice; then once more where some of the answers were lost."""
    models = (f"sft={tiny / 'model'}", f"tlcr={other_model(tmp_path / 'other', tiny)}")
    judges = [reward_model(tmp_path / f"judge{labels}", tiny, labels) for labels in (2, 1)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"instruction": f"Tell me of {n} cats."} for n in range(7)])
    options = (
        *("--models", *models, "--prompts", prompts, "--dtype", "fp32", "--max_answer_seq_len", 10),
        *("--discriminator", judges[0], "--sequence_reward", judges[1], "--generation_batch_size", 2),
        *("--scoring_batch_size", 3),
    )
    out = {number: tmp_path / f"out{number}" for number in (1, 2)}
    for number, folder in out.items():
        in_process(reward_scores.main, *options, "--num_processes", number, "--out", folder)
    found = answers_of(out[1])
    assert answers_of(out[2]) == found
    assert [len(lines) for lines in found.values()] == [7, 7]
    assert len({line["choices"][0]["turns"][0] for lines in found.values() for line in lines}) > 10
    results = [json.loads((folder / "reward_scores" / "results.json").read_text()) for folder in out.values()]
    assert results[0]["models"] == results[1]["models"]
    assert results[0]["attn_implementation"] == "sdpa"

    # An interrupted run goes on: the lines that were there stay, the others are as they were.
    lost = next(out[2].glob("answers/*/tlcr.jsonl"))
    kept = lost.read_text().splitlines(keepends=True)[0]
    lost.write_text(kept)
    in_process(reward_scores.main, *options, "--num_processes", 2, "--out", out[2])
    assert answers_of(out[2]) == found
    assert lost.read_text().startswith(kept)


def test_processes_end_with_a_killed_parent(tmp_path):
    """Started anew, as always outside these tests."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "from deepspeed_chat_tlcr.workers import spread\n"
        "def wait(number):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "def load():\n    return wait\n"
        "if __name__ == '__main__':\n    list(spread(load, [1, 2], 2))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    children = [int(next(line for line in parent.stdout if line.strip().isdigit())) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + patience(60)
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_attention_that_is_not_there_is_refused_before_anything_loads(tiny, tmp_path, in_process, capsys):
    with pytest.raises(SystemExit):
        in_process(
            reward_scores.main,
            *("--models", f"sft={tiny / 'model'}", "--data_path", tiny / "data.jsonl", "--out", tmp_path / "out"),
            *("--attn_implementation", "flash_attention_2"),
        )
    assert "--attn_implementation flash_attention_2: needs the package flash-attn" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
