"""Losses, gradients and weights that are not finite: detected on all ranks, skipped, and saved for inspection."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors.torch import save_file


def watch_gradients(engine: DeepSpeedEngine) -> None:
    """Have an engine report its gradients' norm (before clipping) and skip updates whose gradients are not finite.

    ``engine.get_global_grad_norm()`` has the newest update's norm. ZeRO's optimisers do both on request; without ZeRO,
    DeepSpeed does neither in fp32.
    """
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True  # in every precision, not in fp16 and bf16 alone
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return
    step = engine.step

    def watched(*args, **kwargs) -> None:
        if engine.is_gradient_accumulation_boundary():
            # The engine's own attribute, which it reports after the step; the same on all ranks.
            engine.optimizer._global_grad_norm = _checked_norm(engine)
        step(*args, **kwargs)

    engine.step = watched


def _checked_norm(engine: DeepSpeedEngine) -> float:
    """Norm of the accumulated gradients. If it is not finite, the coming step changes nothing."""
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm):
        for gradient in gradients:
            gradient.zero_()
        optimizer, usual = engine.optimizer, engine.optimizer.step

        def skip(*args, **kwargs) -> None:
            optimizer.step = usual  # for the steps after this one

        optimizer.step = skip
    return norm


def weights_are_finite(modules: Iterable[torch.nn.Module], device: torch.device) -> bool:
    """Whether all weights, or this rank's shares of them, are finite on all ranks; a collective."""
    shares = (getattr(p, "ds_tensor", p.data) for module in modules for p in module.parameters())
    everywhere = torch.tensor(float(all(bool(torch.isfinite(share).all()) for share in shares)), device=device)
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return bool(everywhere)


def save_faulty_batch(folder: Path, batch: Mapping[str, Any]) -> Path:
    """Write a batch's tensors, each rank its own; returns the file."""
    path = folder / f"faulty_batch-{torch.distributed.get_rank()}.safetensors"
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return path


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
            # DeepSpeed then skips the step itself, and clears the gradients.
            optimizer.check_overflow = _overflowed(optimizer)


def _overflowed(optimizer):
    def check(*args, **kwargs) -> None:
        del optimizer.check_overflow  # once only: uncovers the class's own method
        optimizer.overflow = True

    return check
