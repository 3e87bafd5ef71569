"""The norm of every update's gradients, and updates left out where it is not a number, whatever the ZeRO stage."""

import math
from collections.abc import Callable

import torch
from deepspeed import DeepSpeedEngine


def watch_gradients(engine: DeepSpeedEngine) -> None:
    """Have an engine report its gradients' norm (before clipping) and skip updates whose gradients are not finite.

    ``engine.get_global_grad_norm()`` has the newest update's norm. ZeRO's optimisers do both where they are told to;
    without ZeRO, DeepSpeed does neither in fp32.
    """
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True  # in every precision, not in fp16 and bf16 alone
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return
    step = engine.step

    def watched(*args, **kwargs) -> None:
        if engine.is_gradient_accumulation_boundary():
            # The engine's own name for what it reports after the step; it is the same on all ranks.
            engine.optimizer._global_grad_norm = _checked_norm(engine)
        step(*args, **kwargs)

    engine.step = watched


def _checked_norm(engine: DeepSpeedEngine) -> float:
    """Norm of the accumulated gradients; if not finite, the coming step leaves weights and optimiser states alone."""
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm):
        for gradient in gradients:
            gradient.zero_()
        engine.optimizer.step = _once(engine.optimizer)
    return norm


def _once(optimizer: torch.optim.Optimizer) -> Callable[..., None]:
    """A step that does nothing and puts the real one back."""
    usual = optimizer.step

    def skip(*args, **kwargs) -> None:
        optimizer.step = usual

    return skip
