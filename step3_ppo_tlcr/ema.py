"""A running average of the actor's weights (``--enable_ema``), on each rank's own shards at every ZeRO stage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight after every update, in fp32, of the trainable weights."""

    def __init__(self, engine: DeepSpeedEngine, decay: float):
        self.engine, self.decay = engine, decay
        self.averages = {name: _shard(parameter).float().clone() for name, parameter in self._trained()}

    def update(self) -> None:
        for name, parameter in self._trained():
            self.averages[name].lerp_(_shard(parameter).float(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the engine's weights are the averages; after it, what they were."""
        own = {name: _shard(parameter).clone() for name, parameter in self._trained()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(own)

    def restore(self, averages: dict[str, torch.Tensor]) -> None:
        for name, average in averages.items():
            self.averages[name].copy_(average)

    def _put(self, shards: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._trained():
            if getattr(parameter, "ds_status", None) == ZeroParamStatus.AVAILABLE:
                parameter.partition()  # ZeRO-3 keeps small parameters whole: they must be gathered anew
            _shard(parameter).copy_(shards[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad)


def _shard(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a parameter: under ZeRO-3 its part of it, else all."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data
