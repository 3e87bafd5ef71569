"""DeepSpeed's checkpoints without redundant copies.

A trained parameter takes 12 bytes, in fp32: itself, momentum, variance. ZeRO-1 and 2 would also write the model's
16-bit copy, which is the fp32 one rounded. Frozen parameters are not written: the model's folder has them. Without ZeRO
there are no fp32 copies, and the model's own trained parameters are kept.
"""

import hashlib
import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from deepspeed_chat_tlcr.checkpoints import unreadable
from deepspeed_chat_tlcr.errors import InputError, lost_a_rank

TRUSTED = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed 0.19.8 writes into a checkpoint beside tensors and plain values."""


def lean_checkpoints(engine: DeepSpeedEngine) -> None:
    """Have an engine save no more than it needs; it still loads complete checkpoints too.

    Loading raises ``InputError`` if the parameters' shapes or the frozen parameters have changed since.
    """
    save_all, load_all = engine.save_checkpoint, engine.load_checkpoint
    engine.checkpoint_engine.load = _load_tensors

    @cache
    def fingerprint() -> str:
        """A hash of all parameters' shapes, and of the values that this rank holds of frozen parameters."""
        digest = hashlib.sha256()
        for name, parameter in engine.module.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            digest.update(f"{name} {shape} {parameter.requires_grad}\n".encode())
            if not parameter.requires_grad:
                digest.update(_shard(parameter).detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()

    def leave_out(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        for name in _redundant(engine):
            state_dict.pop(name, None)

    def save(save_dir: str | Path, tag: str | None = None, save_latest: bool = True) -> None:
        hook = engine.module.register_state_dict_post_hook(leave_out)
        try:
            # The last argument excludes the frozen parameters that DeepSpeed keeps beside the module's.
            save_all(save_dir, tag, {"model": fingerprint()}, save_latest, exclude_frozen_parameters=True)
        finally:
            hook.remove()

    def put(src: dict[str, Any], dst: nn.Module) -> None:
        left_out = set(_redundant(engine))
        dst.load_state_dict(src, strict=not left_out or not left_out.isdisjoint(src))

    def load(load_dir: str | Path, tag: str | None = None, **kwargs: Any) -> tuple[str | None, dict[str, Any] | None]:
        try:
            path, state = load_all(load_dir, tag, **kwargs, custom_load_fn=put)
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            if isinstance(error, RuntimeError) and lost_a_rank(error):
                raise
            raise unreadable(Path(load_dir), error) from error
        if state is not None and state.get("model", fingerprint()) != fingerprint():
            raise InputError(
                f"{path} was written with another model than the one loaded now: the shapes of its parameters differ, "
                "or those that do not train. Continue from the model it began with, or start anew with --resume never"
            )
        if engine.zero_optimization() and not engine.zero_optimization_partition_weights():
            engine.optimizer.update_lp_params()  # the model's 16-bit copy, from the fp32 parameters
        return path, state

    engine.save_checkpoint, engine.load_checkpoint = save, load


def _load_tensors(path: str, map_location: Any = None) -> dict[str, Any]:
    """Like DeepSpeed's own, but runs no code of the file: loads tensors, plain values and the ``TRUSTED`` classes."""
    with torch.serialization.safe_globals(TRUSTED):
        return torch.load(path, map_location=map_location, weights_only=True)


def _redundant(engine: DeepSpeedEngine) -> Iterator[str]:
    """Names of the parameters that are not written, as in a state dict: a tied parameter under each of its names."""
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if engine.zero_optimization() or not parameter.requires_grad:
            yield name


def _shard(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter. The last shards of ZeRO-3 end in unused memory, which is left out."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data
    shard = parameter.ds_tensor.data
    begin = torch.distributed.get_rank() * shard.numel()
    return shard.flatten()[: max(0, min(shard.numel(), parameter.ds_numel - begin))]  # type: ignore[attr-defined]
