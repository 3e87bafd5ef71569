"""What stops a number that is not one from reaching the weights, and a run that makes nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from deepspeed import DeepSpeedEngine
from safetensors.torch import save_file

from step3_ppo_tlcr.records import Experience, Rollout

if TYPE_CHECKING:
    from step3_ppo_tlcr.trainer import Models


class TooManyFaults(Exception):
    """``--max_faults`` updates in a row were not finite."""


class Faults:
    """Counts skipped updates and keeps what caused the newest one."""

    def __init__(self, limit: int, device: torch.device):
        self.limit, self.device = limit, device
        self.in_a_row = 0
        self.batch: Rollout | Experience | None = None

    def found(self, batch: Rollout | Experience, *tensors: torch.Tensor) -> bool:
        """Whether a tensor has a non-finite entry on any rank; a collective. Keeps the batch if so."""
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()
        anywhere = 1.0 - finite.to(self.device, torch.float32)
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
        if bool(anywhere):
            self.batch = batch
        return bool(anywhere)

    def count(self, skipped: bool) -> None:
        """Take note of one update. Raises ``TooManyFaults`` when none of the last ``limit`` was made."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self.limit:
            raise TooManyFaults

    def save_batch(self, folder: str | Path) -> Path:
        """Write the newest faulty batch's tensors, each rank its own; returns the file."""
        path = Path(folder) / f"faulty_batch-{torch.distributed.get_rank()}.safetensors"
        rollout = self.batch.rollout if isinstance(self.batch, Experience) else self.batch
        tensors = {name: value for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
        if isinstance(self.batch, Experience):
            tensors |= {name: value for name, value in vars(self.batch).items() if isinstance(value, torch.Tensor)}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        return path


def weights_are_finite(models: "Models") -> bool:
    """Whether all weights that train are numbers, on all ranks."""
    engines = models.engines.values()
    finite = all(bool(torch.isfinite(_held(p)).all()) for e in engines for p in e.module.parameters())
    everywhere = torch.tensor(float(finite), device=models.actor.device)
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return bool(everywhere)


def _held(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def align_overflow(engines: list[DeepSpeedEngine]) -> None:
    """Make every engine skip its coming step if the 16-bit gradients of any overflowed (``--align_overflow``).

    Call it between the backward passes and the steps of an accumulation boundary.
    """
    optimizers = [engine.optimizer for engine in engines]
    if not all(hasattr(optimizer, "check_overflow") for optimizer in optimizers):
        return
    for optimizer in optimizers:
        optimizer.overflow = False
        optimizer.check_overflow()
    if any(optimizer.overflow for optimizer in optimizers):
        for optimizer in optimizers:
            # DeepSpeed's own way of skipping, which also clears the gradients: its check finds an overflow.
            optimizer.check_overflow = _overflowed(optimizer)


def _overflowed(optimizer):
    def check(*args, **kwargs) -> None:
        del optimizer.check_overflow  # once only: the class's own method is behind it
        optimizer.overflow = True

    return check
