"""The DeepSpeed config of every engine, built from DeepSpeed-Chat's flags."""

import difflib
from pathlib import Path
from typing import Any

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_json

LIVE_PARAMETERS = 750_000_000
"""What ZeRO-3 may gather at a time: three blocks of a 7B model, one of them prefetched. With less than one matrix, no
gather would overlap with computation."""


def build_config(
    *,
    dtype: str,
    zero_stage: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    offload: bool = False,
    offload_parameters: bool | None = None,
    max_grad_norm: float = 1.0,
    overrides: str | Path | None = None,
) -> dict[str, Any]:
    """Config of a training engine.

    ``dtype``: fp32, fp16 or bf16. ``micro_batch_size`` counts sequences per device. ``offload`` keeps the optimiser
    in host memory, and under ZeRO-3 the parameters too unless ``offload_parameters`` says otherwise. ``overrides``
    names a JSON file merged on top. Raises ``InputError`` for a bad file.
    """
    if zero_stage == 0 and dtype != "fp32":
        # Without ZeRO, DeepSpeed 0.19 starts Adam's step count in 16-bit training at 1: its first updates are a quarter
        # too small. Stage 1 has the same arithmetic and communication and counts right.
        zero_stage = 1
    if offload_parameters is None:
        offload_parameters = offload and zero_stage == 3
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": zero_stage in (1, 2, 3),
            # Pinned memory can be copied while the device computes. DeepSpeed's other options do not help: pipelined
            # reads and writes are for NVMe, super_offload for chips that share memory with their CPU, and round-robin
            # gradients or smaller sub-groups save little and would not fit existing checkpoints.
            "offload_optimizer": {"device": "cpu" if offload else "none", "pin_memory": True},
            "offload_param": {"device": "cpu" if offload_parameters else "none", "pin_memory": True},
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "stage3_prefetch_bucket_size": LIVE_PARAMETERS // 3,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at every forward pass
    }
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale_window": 100}
    elif dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif dtype != "fp32":
        raise ValueError(f"dtype {dtype!r}: expected fp32, fp16 or bf16")
    return merge(config, read_overrides(overrides)) if overrides else config


def read_overrides(path: str | Path) -> dict[str, Any]:
    """Read ``--deepspeed_config``, without entries that are "auto". Raises ``InputError`` naming the file.

    Batches, optimiser and schedule are refused: the program knows them only from its flags.
    """
    try:
        overrides = read_json(path)
    except InputError as error:
        raise InputError(f"--deepspeed_config {error}") from None
    if not isinstance(overrides, dict):
        raise InputError(f"--deepspeed_config {path}: expected a JSON object")
    overrides = without_auto(overrides)
    for name, flags in _BY_FLAGS.items():
        if name in overrides:
            raise InputError(f"--deepspeed_config {path}: take out {name!r}, which {flags} decide(s) here")
    from deepspeed.runtime import constants  # slow to import, and few runs have such a file

    listed = {value for name, value in vars(constants).items() if name.isupper() and type(value) is str}
    known = listed | set(_NAMES.split())
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise InputError(f"--deepspeed_config {path}: DeepSpeed knows no {name!r}{hint}")
    return overrides


# Names that are not in DeepSpeed's table of constants.
_NAMES = (
    "zero_optimization activation_checkpointing aio amp autotuning comms_logger comet compile "
    "compression_training csv_monitor curriculum_learning data_efficiency eigenvalue elasticity expert_parallel "
    "flops_profiler hybrid_engine monitor_config nebula pipeline progressive_layer_drop sequence_parallel_size "
    "sparse_attention sparse_gradients tensor_parallel tensorboard timers wandb weight_quantization"
)
_BY_FLAGS = {
    "train_batch_size": "the product of the batch-size flags and ranks",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size (step 3: --per_device_training_batch_size)",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "optimizer": "--learning_rate, --weight_decay and --offload",
    "scheduler": "--lr_scheduler_type and --num_warmup_steps",
}


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without entries that are "auto" (transformers: as the flags say), or that hold only such entries."""
    kept = {key: without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in kept.items() if value != "auto" and not (value == {} and config[key])}


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``overrides`` on top, nested dicts merged key by key; neither argument changes."""
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
