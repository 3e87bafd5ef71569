"""What stops a number that is not one from reaching the weights, and a run that makes nothing else."""

from pathlib import Path

import torch

from deepspeed_chat_tlcr.finite import save_faulty_batch
from step3_ppo_tlcr.experience import Experience, Rollout


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
        rollout = self.batch.rollout if isinstance(self.batch, Experience) else self.batch
        return save_faulty_batch(Path(folder), vars(rollout) | vars(self.batch))
