"""Optimisers and LoRA, shared by all stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.models import head_of
from deepspeed_chat_tlcr.operators import load_operator

ADAM_BETAS = (0.9, 0.95)


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, lora_learning_rate: float, offload: bool
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, betas (0.9, 0.95); no decay on biases and norms, LoRA at its own rate."""
    groups = {
        "decayed": {"lr": learning_rate, "weight_decay": weight_decay},
        "plain": {"lr": learning_rate, "weight_decay": 0.0},
        "lora": {"lr": lora_learning_rate, "weight_decay": weight_decay},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name)].append(parameter)
    used = [{"params": members[name], **settings} for name, settings in groups.items() if members[name]]
    if offload:
        # The only Adam that can keep its states in host memory; compiled at its first use.
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_operator("CPUAdamBuilder")
        return DeepSpeedCPUAdam(used, betas=ADAM_BETAS)
    # One pass over each tensor, without temporaries as large as the flat fp32 weights.
    return torch.optim.AdamW(used, betas=ADAM_BETAS, fused=get_accelerator().device_name() in ("cuda", "cpu") or None)


def _group_of(name: str) -> str:
    if "lora_" in name:
        return "lora"
    lowered = name.lower()
    # By name, not by shape: under ZeRO-3 every parameter is flat.
    return "plain" if lowered.endswith("bias") or "norm" in lowered or ".ln_" in lowered else "decayed"


class Rates:
    """Learning rates and weight decays by this run's flags, which loading a checkpoint would replace by older ones.
    Remembered before loading and restored after it, at the schedule's place."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR):
        self.peaks = list(schedule.base_lrs)
        self.decays = [group["weight_decay"] for group in optimizer.param_groups]

    def restore(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
        schedule.base_lrs = list(self.peaks)
        settings = zip(optimizer.param_groups, self.peaks, self.decays, schedule.lr_lambdas, strict=True)
        for group, peak, decay, factor in settings:
            group["initial_lr"], group["weight_decay"] = peak, decay
            group["lr"] = peak * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def add_lora(model: PreTrainedModel, rank: int, alpha: float, module_name: str, only_lora: bool) -> None:
    """Put peft LoRA layers, in place, on the linear layers whose name contains ``module_name``.

    ``auto``: the layers of the model's blocks, whatever their names. The update is scaled by ``alpha / rank``. Wrapped
    weights are frozen, as in DeepSpeed-Chat; ``only_lora`` also freezes everything else but a token classifier's head.
    Raises ``InputError`` if the pattern matches nothing, with patterns that do.
    """
    output = model.get_output_embeddings() if model.can_generate() else head_of(model)[1]
    # Conv1D is GPT-2's linear layer.
    linear = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not output
    ]
    # A model's blocks are its outermost list of modules.
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = f"{min(lists, key=lambda name: name.count('.'))}." if lists else ""
    pattern = blocks if module_name == "auto" else module_name
    targets = [name for name in linear if pattern in name]
    if not targets:
        patterns = sorted({".".join(name.split(".")[:-3]) + "." for name in linear if name.count(".") > 2})
        raise InputError(
            f"the LoRA pattern {module_name!r} matches no linear layer of {type(model).__name__}; "
            f"one that does: {', '.join(patterns[:3]) or linear[0]}"
        )
    head = None if model.can_generate() else head_of(model)[0]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    dtype = next(model.parameters()).dtype
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
        else:
            wrapped = ".base_layer." in name
            is_head = head is not None and name.startswith(f"{head}.")
            parameter.requires_grad_(name in trainable and not wrapped and (is_head or not only_lora))
    if only_lora and getattr(model, "is_gradient_checkpointing", False):
        model.enable_input_require_grads()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within it LoRA layers add nothing to the linear layers that they wrap."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def scale(factor: float) -> None:
        for layer in layers:
            layer.set_scale("default", factor)

    scale(0.0)  # the layers still run: ZeRO-3 expects the same sequence of modules in every pass
    try:
        yield
    finally:
        scale(1.0)


def merge_lora(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A full state dict with every LoRA layer merged into the weight it wraps; the model does not change."""
    merged = {}
    for name, tensor in state_dict.items():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            merged[name] = tensor
            continue
        prefix, leaf = name.split(".base_layer.")
        if leaf == "weight":
            layer: Any = model.get_submodule(prefix)
            up, down = state_dict[f"{prefix}.lora_B.default.weight"], state_dict[f"{prefix}.lora_A.default.weight"]
            delta = layer.scaling["default"] * (up.float() @ down.float())
            tensor = (tensor.float() + (delta.T if layer.fan_in_fan_out else delta)).to(tensor.dtype)
        merged[f"{prefix}.{leaf}"] = tensor
    return merged
