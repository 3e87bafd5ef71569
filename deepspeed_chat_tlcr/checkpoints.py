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

from deepspeed_chat_tlcr.errors import InputError, first_line, reading
from deepspeed_chat_tlcr.optim import Rates
from deepspeed_chat_tlcr.records import read_json
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.saving import write_json, writing

_STATE = "state.json"
SETTINGS = "settings.json"
"""Written last into a checkpoint of transformers' Trainer: without it a checkpoint is incomplete."""
UNFINISHED = "unfinished"
"""Written first into every checkpoint: only an incomplete checkpoint with this mark may be deleted."""
OR_OLDER = "delete this checkpoint to go on from an older one, or --resume never"

# Settings that may change on resume without a warning: they affect no number.
_HARMLESS = {"output_dir", "resume", "save_interval", "save_total_limit", "report_to", "local_rank", "max_faults"}
_HARMLESS |= {"enable_tensorboard", "tensorboard_path", "save_format", "deepspeed", "data_output_path", "print_loss"}
_HARMLESS |= {"push_to_hub"}
# Settings that decide which tensors a checkpoint holds: with another value it does not fit.
_STRUCTURAL = {"algo", "objective", "dtype", "bf16", "actor_bf16", "critic_bf16", "reward_bf16", "only_optimize_lora"}
_STRUCTURAL |= {"enable_ema", "offload", "offload_critic_model", "zero_stage", "actor_zero_stage", "critic_zero_stage"}
_STRUCTURAL |= {f"{role}{name}" for role in ("", "actor_", "critic_") for name in ("lora_dim", "lora_module_name")}


class Checkpoints:
    """Checkpoints ``step-N`` in one folder; all methods are collectives, every rank calls them.

    A checkpoint is written as ``step-N.part`` and renamed when every rank is done.
    """

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self.keep = Path(folder), keep
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.rank == 0:
            for unfinished in self.folder.glob(f"step-*.part/{UNFINISHED}"):
                shutil.rmtree(unfinished.parent)
        torch.distributed.barrier()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = [path.name for path in self.folder.glob("step-*") if (path / _STATE).is_file()]
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def save(
        self,
        step: int,
        engines: dict[str, DeepSpeedEngine],
        state: dict[str, Any],
        tensors: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Write engines (weights, optimisers, schedules), the states of all random generators, and ``state`` (JSON).

        Each rank has its own ``tensors``. Raises ``SaveError`` if the disk is full or gone; older checkpoints stay.
        """
        if step in self.steps():
            return  # a run asked to stop just after it saved
        part = self.folder / f"step-{step}.part"
        with writing(f"the checkpoint {self.folder / f'step-{step}'}", self._newest):
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
                begin_checkpoint(part)
            torch.distributed.barrier()
            for name, engine in engines.items():
                engine.save_checkpoint(str(part), tag=name, save_latest=False)
            torch.save(generator_states(), part / f"generators-{self.rank}.pt")
            torch.save(tensors or {}, part / f"tensors-{self.rank}.pt")
            if self.rank == 0:
                write_json(part / _STATE, {"step": step, "world_size": self.world_size, **state})
                (part / UNFINISHED).unlink()
            torch.distributed.barrier()
        if self.rank == 0:
            part.replace(self.folder / f"step-{step}")
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old}")
        torch.distributed.barrier()

    def _newest(self) -> Path | None:
        steps = self.steps()
        return self.folder / f"step-{steps[-1]}" if steps else None

    def state(self, step: int) -> dict[str, Any]:
        """The ``state`` that a checkpoint was saved with. Raises ``InputError`` for another number of ranks."""
        path = self.folder / f"step-{step}"
        state = read_json(path / _STATE)
        with reading(path / _STATE, OR_OLDER):
            require_ranks(path, int(state["world_size"]), self.world_size)
        return state

    def load(self, step: int, engines: dict[str, DeepSpeedEngine]) -> dict[str, torch.Tensor]:
        """Restore engines and random generators; returns the saved ``tensors``.

        Learning rates, their schedule and weight decays stay those of this run. Raises ``InputError`` for a checkpoint
        that cannot be read.
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
                (path / _STATE).unlink()  # first: a checkpoint that is half deleted must not look whole
                shutil.rmtree(path)
            with contextlib.suppress(OSError):  # the folder holds something else
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
    """The error for a checkpoint that was complete when it was written, and does not load."""
    return InputError(
        f"{checkpoint} cannot be read ({type(error).__name__}: {first_line(error)}); delete it to go on from an older "
        "one, if there is any, or start anew with --resume never"
    )


def require_ranks(checkpoint: Path, written_by: int, world_size: int) -> None:
    """Raise ``InputError`` for another number of ranks: optimiser states and data are divided by it."""
    if written_by != world_size:
        raise InputError(
            f"{checkpoint} was written by {written_by} rank(s), this run has {world_size}: continue with as many "
            "ranks, or start anew from the saved models with --resume never"
        )


def changed_settings(saved: dict[str, Any], options: Any, checkpoint: Path) -> list[str]:
    """The settings that differ from the ``saved`` ones of a checkpoint, as ``--name: old -> new``.

    Raises ``InputError`` for a change that does not fit the checkpoint.
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
    """Names of the settings that differ from the saved ones. Options that an older version lacked do not count."""
    current = asdict(options)
    # Without LoRA, the modules that it would go on make no difference.
    no_lora = [name for name in current if name.endswith("lora_dim") and not current[name] and not saved.get(name)]
    ignored = _HARMLESS | {name.replace("lora_dim", "lora_module_name") for name in no_lora}
    return [name for name in current if name in saved and name not in ignored and saved[name] != current[name]]


def own_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage with transformers' Trainer, oldest first."""
    return sorted((path for path in _numbered(folder) if (path / SETTINGS).is_file()), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the latest step in a stage's output folder, or None."""
    return next(reversed(own_checkpoints(folder)), None)


def clear_half_checkpoints(folder: Path) -> None:
    """Delete the checkpoint that a killed run left incomplete (rank 0 calls this).

    Raises ``InputError`` for a checkpoint without our mark: another program wrote it.
    """
    for path in _numbered(folder):
        if (path / SETTINGS).is_file():
            continue
        if not (path / UNFINISHED).is_file():
            raise InputError(f"{path} is no checkpoint of this program; choose another --output_dir, or move it away")
        shutil.rmtree(path)


def begin_checkpoint(path: Path) -> None:
    """Create a checkpoint's folder, marked as ours and as incomplete."""
    path.mkdir(parents=True, exist_ok=True)
    (path / UNFINISHED).touch()


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. One that is half deleted must not look complete, hence the order."""
    (path / UNFINISHED).touch()
    (path / SETTINGS).unlink(missing_ok=True)
    shutil.rmtree(path)


def _numbered(folder: Path) -> list[Path]:
    """Folders named as the Trainer names checkpoints. Links are not ours."""
    named = (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit())
    return [path for path in named if path.is_dir() and not path.is_symlink()]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def changes_since(saved: dict[str, Any], options: Any, world_size: int, checkpoint: Path) -> list[str]:
    """``changed_settings`` for a checkpoint of the Trainer. Raises ``InputError`` for another number of ranks."""
    with reading(checkpoint / SETTINGS, OR_OLDER):
        require_ranks(checkpoint, int(saved["world_size"]), world_size)
        return changed_settings(dict(saved["options"]), options, checkpoint)


def fingerprint(data: Iterable[Any]) -> str:
    """A hash of the training data, by which a resumed run sees whether the data has changed."""
    digest = hashlib.sha256()
    for item in data:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:16]


def same_command(options: Any) -> str:
    """The command that continues a stopped run, in words."""
    return "the same command" + ", without --resume never" * (options.resume == "never")


OTHER_DATA = "warning: the data has changed since this run began; it continues at the same place in the new data"


def is_finished(options: Any, runtime: Runtime) -> bool:
    """Whether this very command has finished before, so that a job started again destroys nothing. Prints that.

    A collective: the first rank looks, because it may have the only disk with the results. Raises ``InputError`` if the
    output folder holds a model that another command made, unless ``--resume never``.
    """
    finished: list[Any] = [None]
    if runtime.is_main and options.resume != "never":
        try:
            finished[0] = _has_finished(options, Path(options.output_dir))
        except InputError as error:
            finished[0] = str(error)
    torch.distributed.broadcast_object_list(finished, device=runtime.device)
    if isinstance(finished[0], str):
        raise InputError(finished[0])
    if finished[0]:
        results = Path(options.output_dir) / "results.json"
        runtime.say(f"finished already: {results}; --resume never makes it anew")
    return bool(finished[0])


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
