"""Resumable checkpoints of several DeepSpeed engines: whole or absent, never half."""

import contextlib
import hashlib
import pickle
import random
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError

from deepspeed_chat_tlcr.errors import InputError, SaveError, reading
from deepspeed_chat_tlcr.optim import Rates
from deepspeed_chat_tlcr.records import read_json
from deepspeed_chat_tlcr.runtime import Runtime, heartbeat
from deepspeed_chat_tlcr.saving import write_json

_STATE = "state.json"
SETTINGS = "settings.json"
"""Written last into a checkpoint of transformers' Trainer: one without it is half a checkpoint."""
UNFINISHED = "unfinished"
"""Written first into every checkpoint: what has it and is not whole may be deleted, nothing else may."""

# What a run may be continued with otherwise without a word: it changes no number.
_HARMLESS = {"output_dir", "resume", "save_interval", "save_total_limit", "report_to", "local_rank", "max_faults"}
_HARMLESS |= {"enable_tensorboard", "tensorboard_path", "save_format", "deepspeed", "data_output_path", "print_loss"}
_HARMLESS |= {"push_to_hub"}
# What decides which tensors a checkpoint holds: with another value it does not fit.
_STRUCTURAL = {"algo", "objective", "dtype", "bf16", "actor_bf16", "critic_bf16", "reward_bf16", "only_optimize_lora"}
_STRUCTURAL |= {"enable_ema", "offload", "offload_critic_model", "zero_stage", "actor_zero_stage", "critic_zero_stage"}
_STRUCTURAL |= {f"{role}{name}" for role in ("", "actor_", "critic_") for name in ("lora_dim", "lora_module_name")}


class Checkpoints:
    """Checkpoints ``step-N`` in one folder; all methods are collectives, every rank calls them.

    A checkpoint is written as ``step-N.part`` and renamed when every rank is done, so what bears the name is whole.
    """

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self.keep = Path(folder), keep
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.rank == 0:
            for unfinished in self.folder.glob(f"step-*.part/{UNFINISHED}"):
                shutil.rmtree(unfinished.parent)
        torch.distributed.barrier()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        names = [path.name for path in self.folder.glob("step-*") if (path / _STATE).is_file()]
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def save(
        self,
        step: int,
        engines: dict[str, DeepSpeedEngine],
        state: dict[str, Any],
        tensors: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Write engines (weights, optimisers, schedules), every generator's state and ``state`` (JSON).

        ``tensors`` are each rank's own. Raises ``SaveError`` when the disk is full or gone; older checkpoints stay.
        """
        if step in self.steps():
            return  # a run asked to stop just after it saved
        part = self.folder / f"step-{step}.part"
        try:
            with heartbeat(f"saving the checkpoint of step {step}"):
                self._write(part, step, engines, state, tensors or {})
        except (OSError, RuntimeError, SafetensorError) as error:
            newest = self.steps()[-1:]
            kept = f"; {self.folder / f'step-{newest[0]}'} is whole" if newest else ""
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise SaveError(
                f"the checkpoint of step {step} could not be written in {self.folder}: {first_line}{kept}"
            ) from error
        if self.rank == 0:
            part.replace(self.folder / f"step-{step}")
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old}")
        torch.distributed.barrier()

    def _write(self, part: Path, step: int, engines: dict, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            begin_checkpoint(part)
        torch.distributed.barrier()
        for name, engine in engines.items():
            engine.save_checkpoint(str(part), tag=name, save_latest=False)
        torch.save(generator_states(), part / f"generators-{self.rank}.pt")
        torch.save(tensors, part / f"tensors-{self.rank}.pt")
        if self.rank == 0:
            write_json(part / _STATE, {"step": step, "world_size": self.world_size, **state})
            (part / UNFINISHED).unlink()
        torch.distributed.barrier()

    def state(self, step: int) -> dict[str, Any]:
        """The ``state`` that a checkpoint was saved with.

        Raises ``InputError`` on another number of ranks: optimiser states and data are divided by it.
        """
        path = self.folder / f"step-{step}"
        state = read_json(path / _STATE)
        with reading(path / _STATE, "delete this checkpoint to go on from an older one, or --resume never"):
            world_size = int(state["world_size"])
        if world_size != self.world_size:
            raise InputError(
                f"{path} was written by {world_size} rank(s), this run has {self.world_size}: continue with "
                "as many ranks, or start anew from the saved models with --resume never"
            )
        return state

    def load(self, step: int, engines: dict[str, DeepSpeedEngine]) -> dict[str, torch.Tensor]:
        """Bring back engines and generators; returns the ``tensors`` it was saved with.

        Learning rates, their schedule and weight decays stay those that the engines were made with. Raises
        ``InputError`` for a checkpoint that cannot be read.
        """
        path = self.folder / f"step-{step}"
        try:
            for name, engine in engines.items():
                rates = Rates(engine.optimizer, engine.lr_scheduler)
                engine.load_checkpoint(str(path), tag=name)
                rates.restore(engine.optimizer, engine.lr_scheduler)
            restore_generators(torch.load(path / f"generators-{self.rank}.pt", weights_only=True))
            return torch.load(path / f"tensors-{self.rank}.pt", weights_only=True)
        except InputError:
            raise
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise unreadable(path, error) from error

    def remove(self) -> None:
        """Delete all checkpoints, when the stage is finished and its models are saved."""
        if self.rank == 0:
            for path in (self.folder / f"step-{step}" for step in self.steps()):
                (path / _STATE).unlink()  # half deleted it must not be taken for whole
                shutil.rmtree(path)
            with contextlib.suppress(OSError):  # something else is in it
                self.folder.rmdir()
        torch.distributed.barrier()


def generator_states() -> dict[str, Any]:
    """The state of every random generator of this process."""
    version, internal, gauss = random.getstate()
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    return {
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Set every random generator to what ``generator_states`` returned."""
    torch.set_rng_state(states["torch"])
    get_accelerator().set_rng_state(states["device"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def unreadable(checkpoint: Path, error: Exception) -> InputError:
    """The error for a checkpoint that does not load, though it was whole when it was written."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return InputError(
        f"{checkpoint} cannot be read ({type(error).__name__}: {first_line}); delete it to go on from an older one, if "
        "there is any, or start anew with --resume never"
    )


def changed_settings(saved: dict[str, Any], options: Any, checkpoint: Path) -> list[str]:
    """What a resumed run does otherwise than the one it continues: ``--name: old -> new`` of each changed setting.

    ``saved``: the settings in ``checkpoint``. Raises ``InputError`` for one with which the checkpoint does not fit.
    """
    current, changed = asdict(options), _differing(saved, options)
    shown = {name: f"--{name}: {saved[name]} -> {current[name]}" for name in changed}
    unfit = [shown[name] for name in changed if name in _STRUCTURAL]
    if unfit:
        raise InputError(
            f"{checkpoint} does not fit this command ({'; '.join(unfit)}): continue with the old settings, or start "
            "anew with --resume never"
        )
    return list(shown.values())


def _differing(saved: dict[str, Any], options: Any) -> list[str]:
    """Names of the settings that are others than the saved ones; one that an older version did not have is none."""
    current = asdict(options)
    # Which modules LoRA would take is no difference where there is no LoRA.
    without = [name for name in current if name.endswith("lora_dim") and not current[name] and not saved.get(name)]
    passed_over = _HARMLESS | {name.replace("lora_dim", "lora_module_name") for name in without}
    return [name for name in current if name in saved and name not in passed_over and saved[name] != current[name]]


def own_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a stage with transformers' Trainer, oldest first."""
    return sorted((path for path in _numbered(folder) if (path / SETTINGS).is_file()), key=_step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step in a stage's output folder, or None."""
    return next(reversed(own_checkpoints(folder)), None)


def clear_half_checkpoints(folder: Path) -> None:
    """Delete what a run that was killed while it saved has left (rank 0 calls this).

    Raises ``InputError`` for a checkpoint that bears no mark of ours: it is somebody else's, and would be mixed up.
    """
    for path in _numbered(folder):
        if (path / SETTINGS).is_file():
            continue
        if not (path / UNFINISHED).is_file():
            raise InputError(f"{path} is no checkpoint of this program; choose another --output_dir, or move it away")
        shutil.rmtree(path)


def begin_checkpoint(path: Path) -> None:
    """Make the folder of a checkpoint and mark it as ours, and as half, until ``SETTINGS`` is in it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / UNFINISHED).touch()


def delete_checkpoint(path: Path) -> None:
    """Half deleted it must not be taken for whole."""
    (path / UNFINISHED).touch()
    (path / SETTINGS).unlink(missing_ok=True)
    shutil.rmtree(path)


def _numbered(folder: Path) -> list[Path]:
    """Folders named as the Trainer names checkpoints; links and other names are none of ours."""
    found = (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit())
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _step_of(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def changes_since(saved: dict[str, Any], options: Any, world_size: int, checkpoint: Path) -> list[str]:
    """The settings that differ from those a checkpoint was written with, as ``--name: old -> new``.

    Raises ``InputError`` for another number of ranks: DeepSpeed's optimiser states are divided by it.
    """
    with reading(checkpoint / SETTINGS, "delete this checkpoint to go on from an older one, or --resume never"):
        before, settings = int(saved["world_size"]), dict(saved["options"])
    if before != world_size:
        raise InputError(
            f"{checkpoint} was written by {before} rank(s), this run has {world_size}: continue with as "
            "many ranks, or start anew with --resume never"
        )
    return changed_settings(settings, options, checkpoint)


def fingerprint(data: Iterable[Any]) -> str:
    """Names what a run learns from, so that a continued run can tell whether it still does."""
    digest = hashlib.sha256()
    for item in data:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:16]


def same_command(options: Any) -> str:
    """What continues a run that has been stopped."""
    return "the same command" + ", without --resume never" * (options.resume == "never")


OTHER_DATA = "warning: the data is not what this run began with; it goes on at the same place in other data"


def is_finished(options: Any, runtime: Runtime) -> bool:
    """Whether this very command has been carried out already, so that a job started again destroys nothing. Says so.

    A collective: the first rank looks, which may have the only disk with the results. Raises ``InputError`` for an
    output folder that holds a model which this command did not make, unless ``--resume never``.
    """
    found: list[Any] = [None]
    if runtime.is_main and options.resume != "never":
        try:
            found[0] = _has_finished(options, Path(options.output_dir))
        except InputError as error:
            found[0] = str(error)
    torch.distributed.broadcast_object_list(found, device=runtime.device)
    if isinstance(found[0], str):
        raise InputError(found[0])
    if found[0]:
        where = Path(options.output_dir) / "results.json"
        runtime.say(f"finished already: {where}; --resume never makes it anew")
    return bool(found[0])


def _has_finished(options: Any, folder: Path) -> bool:
    done, remedy = folder / "results.json", "choose another folder, or --resume never to replace it"
    if not (folder / "run_options.json").is_file():
        others = [name for name in ("results.json", "config.json", "actor/config.json") if (folder / name).is_file()]
        if others:
            raise InputError(f"--output_dir {folder}: {others[0]} in it is not of this program; {remedy}")
        return False
    if not done.is_file():
        return False
    saved = read_json(folder / "run_options.json")
    changed = _differing(saved, options) if isinstance(saved, dict) else ["all"]
    if changed:
        shown = ", ".join(f"--{name}" for name in changed)
        raise InputError(f"--output_dir {folder}: holds the result of another command (other: {shown}); {remedy}")
    return True
