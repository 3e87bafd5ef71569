"""A running average of the actor's weights (``--enable_ema``), of which each rank keeps its own part."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight after every update, in fp32, of the trainable weights.

    4 bytes per trainable weight over all ranks together: under ZeRO-3 of the rank's own shards, else of an equal part
    of every weight, which all ranks have whole.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float):
        self.engine, self.decay = engine, decay
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.averages = {name: self._part(parameter).float().clone() for name, parameter in self._trained()}

    def update(self) -> None:
        for name, parameter in self._trained():
            self.averages[name].lerp_(self._part(parameter).float(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the engine's weights are the averages; after it, what they were. A collective."""
        own = {name: self._part(parameter).clone() for name, parameter in self._trained()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(own)

    def restore(self, averages: dict[str, torch.Tensor]) -> None:
        for name, average in averages.items():
            mine = self.averages[name]
            if average.numel() != mine.numel():  # a whole weight, as an earlier version kept it
                size = -(-average.numel() // self.world_size)
                average = average.flatten()[self.rank * size : (self.rank + 1) * size]
            mine.copy_(average.flatten())

    def _put(self, parts: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._trained():
            if getattr(parameter, "ds_status", None) == ZeroParamStatus.AVAILABLE:
                parameter.partition()  # type: ignore[attr-defined] # ZeRO-3 keeps small parameters whole: they must be gathered anew
            if hasattr(parameter, "ds_tensor"):
                self._part(parameter).copy_(parts[name])
            else:
                self._spread(parameter, parts[name])

    def _spread(self, parameter: nn.Parameter, part: torch.Tensor) -> None:
        """Give all ranks a weight of which each has a part."""
        size = _part_size(parameter, self.world_size)
        padded = parameter.new_zeros(size)
        padded[: len(part)] = part.to(parameter.dtype)
        whole = parameter.new_empty(size * self.world_size)
        torch.distributed.all_gather_into_tensor(whole, padded)
        parameter.data.copy_(whole[: parameter.numel()].view_as(parameter))

    def _part(self, parameter: nn.Parameter) -> torch.Tensor:
        """What this rank keeps of a weight, flat: under ZeRO-3 its shard, else as much as each of the others."""
        if hasattr(parameter, "ds_tensor"):
            return parameter.ds_tensor.data
        size = _part_size(parameter, self.world_size)
        return parameter.data.flatten()[self.rank * size : (self.rank + 1) * size]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad)


def _part_size(parameter: nn.Parameter, world_size: int) -> int:
    return -(-parameter.numel() // world_size)
