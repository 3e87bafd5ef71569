"""Resumable checkpoints of several DeepSpeed engines: whole or absent, never half."""

import json
import random
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

from deepspeed_chat_tlcr.errors import InputError, SaveError
from deepspeed_chat_tlcr.saving import write_json

_STATE = "state.json"


class Checkpoints:
    """Checkpoints ``step-N`` in one folder; all methods are collectives, every rank calls them.

    A checkpoint is written as ``step-N.part`` and renamed when every rank is done, so what bears the name is whole.
    """

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self.keep = Path(folder), keep
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.rank == 0:
            for unfinished in self.folder.glob("step-*.part"):
                shutil.rmtree(unfinished)
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
            self._write(part, step, engines, state, tensors or {})
        except (OSError, RuntimeError) as error:
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
            part.mkdir(parents=True)
        torch.distributed.barrier()
        for name, engine in engines.items():
            engine.save_checkpoint(str(part), tag=name, save_latest=False)
        torch.save(generator_states(), part / f"generators-{self.rank}.pt")
        torch.save(tensors, part / f"tensors-{self.rank}.pt")
        if self.rank == 0:
            write_json(part / _STATE, {"step": step, "world_size": self.world_size, **state})
        torch.distributed.barrier()

    def load(self, step: int, engines: dict[str, DeepSpeedEngine]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Bring back a checkpoint; returns the ``state`` and ``tensors`` it was saved with.

        Raises ``InputError`` on another number of ranks: optimiser states and data are divided by it.
        """
        path = self.folder / f"step-{step}"
        state = json.loads((path / _STATE).read_text())
        if state["world_size"] != self.world_size:
            raise InputError(
                f"{path} was written by {state['world_size']} rank(s), this run has {self.world_size}: continue with "
                "as many ranks, or start anew from the saved models with --resume never"
            )
        for name, engine in engines.items():
            engine.load_checkpoint(str(path), tag=name)
        restore_generators(torch.load(path / f"generators-{self.rank}.pt", weights_only=True))
        return state, torch.load(path / f"tensors-{self.rank}.pt", weights_only=True)

    def remove(self) -> None:
        """Delete all checkpoints, when the stage is finished and its models are saved."""
        if self.rank == 0:
            for path in self.folder.glob("step-*"):
                (path / _STATE).unlink(missing_ok=True)  # half deleted it must not be taken for whole
                shutil.rmtree(path)
        torch.distributed.barrier()


def generator_states() -> dict[str, Any]:
    """The state of every random generator of this process."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
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


def changed_settings(saved: dict[str, Any], current: dict[str, Any], ignored: Container[str]) -> list[str]:
    """What a resumed run does otherwise than the one it continues: ``name: old -> new`` of each changed setting."""
    return [
        f"--{name}: {saved.get(name)} -> {value}"
        for name, value in current.items()
        if name not in ignored and name in saved and saved[name] != value
    ]
