"""Steps 1 and 2, DPO and FIGA when something goes wrong: killed, asked to stop, losses that are no numbers."""

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, bytes_of_tensors, launch, patience
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import baselines.dpo.main
import baselines.figa.main
import step1_sft.main
import step2_discriminator.main
from deepspeed_chat_tlcr.checkpoints import SETTINGS, UNFINISHED, newest_checkpoint
from deepspeed_chat_tlcr.errors import InputError, RunError, exits_cleanly
from deepspeed_chat_tlcr.locking import lock
from deepspeed_chat_tlcr.metrics import MetricsLog, read_metrics
from deepspeed_chat_tlcr.training import StageTrainer

STAGES = {
    "sft": (step1_sft.main.main, ()),
    "discriminator": (step2_discriminator.main.main, ("--revisions",)),
    "sequence": (step2_discriminator.main.main, ("--objective", "sequence")),
    "dpo": (baselines.dpo.main.main, ("--offload_reference_model",)),
    "figa": (baselines.figa.main.main, ("--revisions",)),
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program handles it, and what is on disk then is all that stays."""


@pytest.fixture
def stage(tiny, in_process):
    """Run a stage by name: ``stage("sft", folder, *more)``, with dropout, so that its noise matters."""

    def run(name: str, output: Path, *more: object) -> None:
        main, own = STAGES[name]
        own = (*own, tiny / "revisions.jsonl") if own == ("--revisions",) else own
        common = ("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--dtype", "fp32")
        common = (*common, "--per_device_train_batch_size", 4, "--num_train_epochs", 2, "--learning_rate", 1e-3)
        common = (*common, "--dropout", 0.1, "--save_interval", 2, "--output_dir", output)
        in_process(main.__wrapped__, *common, *own, *more)

    return run


def at_step(monkeypatch, step: int, action) -> None:
    """Do something right after the metrics of a step are written."""
    write = MetricsLog.write

    def watched(self, now, metrics):
        write(self, now, metrics)
        if now == step:
            action()

    monkeypatch.setattr(MetricsLog, "write", watched)


def kill() -> None:
    raise Killed


def comparable(folder: Path) -> list[dict]:
    clock = ("runtime", "per_second")
    return [
        {key: value for key, value in line.items() if not key.endswith(clock)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def require_same_end(one: Path, other: Path) -> None:
    assert comparable(one) == comparable(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert not list(other.glob("checkpoint-*"))


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_ends_where_the_uninterrupted_one_ends(stage, tmp_path, monkeypatch, name):
    stage(name, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(Killed):
            stage(name, tmp_path / "half")
    assert newest_checkpoint(tmp_path / "half").name == "checkpoint-2"
    stage(name, tmp_path / "half")
    require_same_end(tmp_path / "whole", tmp_path / "half")


@pytest.mark.parametrize(
    ("name", "more", "trained"),
    [
        ("sft", ("--dtype", "bf16", "--zero_stage", 2), 2 * 320 * 32 + 5 * 32 + 2 * 10_240),
        ("sequence", ("--zero_stage", 3, "--lora_dim", 2, "--only_optimize_lora"), 2 * 1_088 + 32 + 1),
        ("dpo", ("--zero_stage", 2, "--offload", "--lora_dim", 2, "--only_optimize_lora"), 2 * 1_088),
    ],
)
def test_a_checkpoint_is_12_bytes_of_each_parameter_that_trains(stage, tmp_path, monkeypatch, name, more, trained):
    """Whole: weight, momentum and variance in fp32. LoRA of rank 2: 1,088 parameters in each block, and the head."""
    stage(name, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(Killed):
            stage(name, tmp_path / "half", *more)
    checkpoint = newest_checkpoint(tmp_path / "half")
    assert not list(checkpoint.rglob("*.safetensors"))
    kept = sum(bytes_of_tensors(torch.load(file, weights_only=False)) for file in checkpoint.glob("global_step*/*.pt"))
    assert kept == pytest.approx(12 * trained, rel=0.02)
    stage(name, tmp_path / "half", *more)
    require_same_end(tmp_path / "whole", tmp_path / "half")


def test_a_resumed_stage_goes_by_the_rates_of_its_flags(stage, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(Killed):
            stage("sft", tmp_path)
    with pytest.raises(InputError, match=r"checkpoint-2 does not fit .*--zero_stage: 0 -> 2"):
        stage("sft", tmp_path, "--zero_stage", 2)
    stage("sft", tmp_path, "--learning_rate", 1e-6, "--lr_scheduler_type", "constant")
    assert "--learning_rate: 0.001 -> 1e-06" in capsys.readouterr().out
    rates = {
        line["step"]: line["train/learning_rate"] for line in comparable(tmp_path) if "train/learning_rate" in line
    }
    assert rates[2] > 1e-4
    assert [rates[step] for step in (3, 4)] == pytest.approx([1e-6, 1e-6])


def test_a_finished_stage_is_left_alone(stage, tmp_path, capsys):
    stage("sft", tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    stage("sft", tmp_path)
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"result of another command \(other: --seed\); choose another folder"):
        stage("sft", tmp_path, "--seed", 5)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written
    stage("sft", tmp_path, "--seed", 5, "--resume", "never")
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns > written


def test_a_warm_up_longer_than_the_run_is_said(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("step1_sft.sft.load_causal_lm", lambda *args: pytest.fail("a model is loaded"))
    for warmup, said in ((5, False), (6, True)):
        with pytest.raises(pytest.fail.Exception):
            stage("sft", tmp_path, "--num_warmup_steps", warmup)
        words = "--num_warmup_steps 6: this run has 6 optimiser steps, so the learning rate never reaches its peak"
        assert (words in capsys.readouterr().out) == said


def test_a_model_of_somebody_elses_is_left_alone(stage, tiny, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "theirs")
    with pytest.raises(InputError, match=r"config\.json in it is not of this program"):
        stage("sft", folder)
    with pytest.raises(InputError, match="is the model that the stage begins with"):
        stage("sft", folder, "--model_name_or_path", folder)


def test_only_our_own_checkpoints_are_deleted(stage, tmp_path):
    """Names that look like it, links, and folders beside them stay; a foreign checkpoint is refused before training."""
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-7").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / UNFINISHED).touch()  # of a run that was killed while it saved
    stage("sft", tmp_path, "--save_interval", 2)
    left = {"checkpoint-notes.txt", "checkpoint-best", "checkpoint-7"}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left
    assert (tmp_path / "elsewhere").is_dir()
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"checkpoint-4 is no checkpoint of this program; choose another --output_dir"):
        stage("sft", tmp_path, "--resume", "never")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()


def test_a_poisoned_checkpoint_runs_nothing(stage, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 5, kill)
        with pytest.raises(Killed):
            stage("sft", tmp_path / "half", "--save_interval", 2)
    ran = tmp_path / "ran"
    for file in newest_checkpoint(tmp_path / "half").rglob("*model_states.pt"):
        torch.save({"module": Poison(str(ran))}, file)
    with pytest.raises(InputError, match="cannot be read"):
        stage("sft", tmp_path / "half", "--save_interval", 2)
    assert not ran.exists()


class Poison:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_two_runs_do_not_share_a_folder(stage, tmp_path):
    with lock(tmp_path), pytest.raises(InputError, match="another run is writing there"):
        stage("sft", tmp_path)


def test_killed_after_the_checkpoint_of_an_epochs_end(stage, tmp_path, monkeypatch):
    """Its evaluation draws random numbers, and dropout is on: the checkpoint must stand behind it."""
    more = ("--save_interval", 3)  # 3 steps an epoch
    stage("sft", tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        at_step(patch, 4, kill)
        with pytest.raises(Killed):
            stage("sft", tmp_path / "half", *more)
    assert newest_checkpoint(tmp_path / "half").name == "checkpoint-3"
    stage("sft", tmp_path / "half", *more)
    require_same_end(tmp_path / "whole", tmp_path / "half")


def test_two_killed_ranks_end_where_the_uninterrupted_ones_end(tiny, tmp_path):
    """Steps 1 and 2 at ZeRO-2, whose optimiser states are divided among the ranks; one rank cannot take them over."""
    common = ("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--dtype", "fp32")
    common = (*common, "--per_device_train_batch_size", 2, "--num_train_epochs", 8, "--learning_rate", 1e-3)
    common = (*common, "--dropout", 0.1, "--save_interval", 2, "--zero_stage", 2)
    own = {"step1_sft": (), "step2_discriminator": ("--revisions", tiny / "revisions.jsonl", "--num_train_epochs", 3)}

    def described(stage: str, folder: str, ranks: int = 2, kill_after: int = 0) -> dict:
        arguments = (*common, *own[stage], "--output_dir", tmp_path / stage / folder)
        words = [str(argument) for argument in arguments]
        return {"program": f"{stage}/main.py", "arguments": words, "ranks": ranks, "kill_after": kill_after}

    runs = []
    for stage in own:
        runs += [described(stage, "whole"), described(stage, "half", kill_after=5), described(stage, "half")]
    runs.insert(2, described("step1_sft", "half", ranks=1))
    done = launch("tests/two_ranks.py", json.dumps(runs), tmp_path / "log.txt")
    log = (tmp_path / "log.txt").read_text()
    killed = [-signal.SIGKILL] * 2
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0], killed, [2], [0, 0], [0, 0], killed, [0, 0]], log[
        -3000:
    ]
    assert "was written by 2 rank(s), this run has 1: continue with as many ranks" in log
    for stage in own:
        # Which checkpoint it was depends on when the kill came, but there was one.
        assert f"continuing from {tmp_path / stage / 'half' / 'checkpoint-'}" in log
        require_same_end(tmp_path / stage / "whole", tmp_path / stage / "half")


def test_killed_while_it_saves(stage, tmp_path, monkeypatch):
    stage("sft", tmp_path / "whole")
    with monkeypatch.context() as patch:
        saved = StageTrainer._save_rng_state

        def half(self, folder):
            if folder.endswith("checkpoint-4"):
                kill()
            saved(self, folder)

        patch.setattr(StageTrainer, "_save_rng_state", half)
        with pytest.raises(Killed):
            stage("sft", tmp_path / "half")
    left = {path.name for path in (tmp_path / "half").glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-4"}  # the older one goes when the newer one is whole
    stage("sft", tmp_path / "half")
    require_same_end(tmp_path / "whole", tmp_path / "half")


@pytest.mark.parametrize("step", [2, 3])
def test_sigterm_saves_and_says_how_to_go_on(stage, tmp_path, monkeypatch, capsys, step):
    stage("sft", tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stage("sft", tmp_path / "half")
    # The signal comes while a step is logged, so it is the next one's end that heeds it; step 3 ends an epoch.
    assert f"stopped after step {step + 1} of 6, all saved; resume with the same command" in capsys.readouterr().out
    assert not (tmp_path / "half" / "results.json").exists()
    stage("sft", tmp_path / "half")
    require_same_end(tmp_path / "whole", tmp_path / "half")


def test_sigterm_ends_the_program_with_status_0(tiny, tmp_path):
    arguments = ("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--dtype", "fp32")
    arguments = (*arguments, "--per_device_train_batch_size", 4, "--num_train_epochs", 10_000, "--output_dir", tmp_path)
    running = warm.Program(ROOT / "step1_sft" / "main.py", arguments)
    deadline = time.monotonic() + patience(240)
    while not read_metrics(tmp_path / "metrics.jsonl"):
        assert running.poll() is None, running.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=patience(60))[0]
    assert running.returncode == 0, said[-3000:]
    assert "resume with the same command" in said
    assert newest_checkpoint(tmp_path) is not None


def test_trackers_that_are_not_there_are_refused_before_anything_loads(stage, tmp_path):
    for name, words in (("wandbb", "unknown; known: "), ("aim", "not installed")):
        with pytest.raises(InputError, match=words):
            stage("sft", tmp_path, "--report_to", name, "--model_name_or_path", "nowhere")


def test_trackers_get_the_numbers_of_the_log(stage, tmp_path):
    """TensorBoard through --report_to, as wandb would: the same names and steps as in metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage("sft", tmp_path, "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / tmp_path.name)).Reload()
    logged = {line["step"]: line["train/loss"] for line in log_of(tmp_path)}
    assert {event.step: pytest.approx(event.value) for event in events.Scalars("train/loss")} == logged


def test_resuming_otherwise_says_what_changed(stage, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(Killed):
            stage("sft", tmp_path)
    settings = tmp_path / "checkpoint-2" / SETTINGS
    saved = json.loads(settings.read_text())
    settings.write_text(json.dumps(saved | {"world_size": 2}))
    with pytest.raises(InputError, match=r"written by 2 rank\(s\), this run has 1"):
        stage("sft", tmp_path)
    settings.write_text(json.dumps(saved))
    capsys.readouterr()
    stage("sft", tmp_path, "--weight_decay", 0.5, "--save_total_limit", 3)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: continuing")]
    assert warnings == ["warning: continuing with another setting than before: --weight_decay: 0.0 -> 0.5"]


def bad_at(monkeypatch, steps: range) -> None:
    """A loss that is not a number at some steps."""
    compute = StageTrainer.compute_loss

    def spoilt(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        bad = self.model.training and self.state.global_step + 1 in steps
        return loss * torch.nan if bad else loss

    monkeypatch.setattr(StageTrainer, "compute_loss", spoilt)


def test_an_update_whose_loss_is_no_number_is_left_out(stage, tmp_path, monkeypatch):
    bad_at(monkeypatch, range(3, 4))
    stage("sft", tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines if line["train/loss"] is None] == [3]
    assert [line["train/skipped_updates"] for line in lines] == [0, 0, 1, 1, 1, 1]
    # DeepSpeed itself reports none without ZeRO in fp32; of a skipped update there is none.
    assert [line["step"] for line in lines if line["train/grad_norm"] is None] == [3]
    assert all(line["train/grad_norm"] > 0 for line in lines if line["step"] != 3)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().values()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)


@pytest.mark.parametrize(("zero_stage", "bad"), [(0, {3}), (2, {3}), (2, {1, 2}), (2, {2, 3})], ids=str)
def test_an_update_uses_its_finite_micro_batches_only(stage, tmp_path, monkeypatch, zero_stage, bad):
    """Two micro-batches an update. Left out, one weighs as if its loss were zero, wherever it stands in its update."""
    compute = StageTrainer.compute_loss

    def train(folder: str, factor: float) -> dict[str, torch.Tensor]:
        calls = itertools.count()

        def spoilt(self, model, inputs, *args, **kwargs):
            loss = compute(self, model, inputs, *args, **kwargs)
            # Weighed down to zero, the loss gives the gradients that leaving it out is to give.
            again = getattr(self, "only_steps", False)
            return loss * factor if self.model.training and not again and next(calls) in bad else loss

        with monkeypatch.context() as patch:
            patch.setattr(StageTrainer, "compute_loss", spoilt)
            small = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--num_train_epochs", 1)
            stage("sft", tmp_path / folder, *small, "--dropout", 0.0, "--zero_stage", zero_stage)
        return load_file(tmp_path / folder / "model.safetensors")

    expected, found = train("zero", 0.0), train("nan", torch.nan)
    log = log_of(tmp_path / "nan")
    whole = bad == {2, 3}
    # A whole update of no gradients is none; Adam's momentum would go on moving the weights.
    assert all(torch.equal(expected[name], found[name]) for name in found) != whole
    assert [line["train/skipped_updates"] for line in log] == [0, int(whole), int(whole)]
    assert log[-1]["train/left_out"] == len(bad)


def log_of(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


def test_losses_that_stay_no_numbers_end_the_run_with_what_caused_them(stage, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        bad_at(patch, range(3, 100))
        with pytest.raises(RunError, match="2 updates in a row had no finite loss; the newest batch is in") as ended:
            stage("sft", tmp_path, "--max_faults", 2)
    assert str(tmp_path / "checkpoint-3") in str(ended.value)
    batch = load_file(tmp_path / "faulty_batch-0.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape
    assert len(batch["input_ids"]) == 4
    stage("sft", tmp_path, "--max_faults", 2)
    assert f"continuing from {tmp_path / 'checkpoint-3'}" in capsys.readouterr().out
    assert all(torch.isfinite(weight).all() for weight in load_file(tmp_path / "model.safetensors").values())


def test_a_lost_rank_ends_the_others_with_a_message(monkeypatch, capsys):
    """What PyTorch raises in a collective of Gloo when the process at the other end was killed."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)

    @exits_cleanly
    def main(message):
        raise RuntimeError(message)

    with pytest.raises(SystemExit) as ended:
        main("[pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: another rank is gone")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(SystemExit):
        main("The server socket has failed to listen on any local network address. code: -98, name: EADDRINUSE")
    assert capsys.readouterr().err.startswith("error: port 29500 is in use; choose another")
    with pytest.raises(RuntimeError, match="something else"):
        main("something else")
