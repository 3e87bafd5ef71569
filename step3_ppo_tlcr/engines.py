"""The models of step 3 as DeepSpeed engines: those that train, and frozen ones."""

import os
from collections.abc import Sequence

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel, get_scheduler

from deepspeed_chat_tlcr.deepspeed_config import build_config, merge
from deepspeed_chat_tlcr.engine_checkpoints import lean_checkpoints
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.finite import watch_gradients
from deepspeed_chat_tlcr.models import (
    freeze_head_bias,
    label_count,
    load_causal_lm,
    load_token_classifier,
    scale_head,
    token_aggregate,
)
from deepspeed_chat_tlcr.optim import add_lora, make_optimizer
from deepspeed_chat_tlcr.runtime import Runtime
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.rewards import SUM_TO_THE_SCORE, RewardSpec
from step3_ppo_tlcr.rollout import hybrid_obstacle


def train_actor(options: Options, runtime: Runtime, total_steps: int) -> DeepSpeedEngine:
    """The policy, from the SFT model."""
    passes = 2 if options.unsupervised_dataset_name else 1
    config = _config(options, runtime, options.actor_zero_stage, options.offload, passes)
    config = merge(config, _actor_extras(options, runtime))
    model = load_causal_lm(
        options.actor_model_name_or_path,
        runtime.torch_dtype,
        config,
        options.actor_dropout_rate,
        options.attn_implementation,
    )
    return _train(model, "actor", options, config, total_steps)


def inherited_unit(specs: Sequence[RewardSpec], options: Options) -> float:
    """What one unit of the critic path's own score is worth as reward: the weight of the terms that sum to its score.

    1 where no term has that model: then it is a critic, whose values are in units of reward already. 0 where
    ``--normalise_rewards`` changes the unit from set to set, or RLMEC asks the model only what is right.
    """
    critic = os.path.realpath(options.critic_model_name_or_path)
    weights = [spec.weight for spec in specs if spec.name in SUM_TO_THE_SCORE and os.path.realpath(spec.path) == critic]
    if not weights:
        judges = any(spec.name == "rlmec" for spec in specs) and options.rlmec_judge is None
        return 0.0 if judges else 1.0
    return sum(weights) / options.score_std if options.normalise_rewards == "off" else 0.0


def train_critic(
    options: Options, runtime: Runtime, total_steps: int, specs: Sequence[RewardSpec] = ()
) -> DeepSpeedEngine:
    """The value function, from the critic path's backbone.

    A sequence reward model or critic (1 label) brings its head, which is scaled as ``specs`` weigh that model's score,
    so that V speaks in units of reward; any other backbone gets one that starts at V = 0.
    """
    offload = options.offload or options.offload_critic_model
    config = _config(options, runtime, options.critic_zero_stage, offload)
    path = options.critic_model_name_or_path
    new_head = label_count(path) != 1 or token_aggregate(path) is not None
    model = load_token_classifier(
        path,
        1,
        runtime.torch_dtype,
        config,
        options.critic_dropout_rate,
        new_head=new_head,
        zero_head=new_head,
        attention=options.attn_implementation,
    )
    if not new_head:
        scale_head(model, inherited_unit(specs, options))
    if options.save_format == "deepspeed_chat":
        freeze_head_bias(model)
    return _train(model, "critic", options, config, total_steps)


def freeze(model: PreTrainedModel, config: dict, runtime: Runtime) -> DeepSpeedEngine | PreTrainedModel:
    """A model that only scores: partitioned by ZeRO-3 where its config says so, else plainly on the device."""
    model.requires_grad_(False)
    model.eval()
    if config["zero_optimization"]["stage"] != 3:
        return model.to(runtime.device)  # type: ignore[arg-type]
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def frozen_config(options: Options, runtime: Runtime, zero_stage: int | None, offload: bool) -> dict:
    """Config of a scoring model: ZeRO-3 where asked, where the actor has it, or where it must leave the device."""
    stage = zero_stage if zero_stage is not None else (3 if options.actor_zero_stage == 3 else 0)
    return build_config(
        dtype=runtime.dtype,
        zero_stage=3 if offload or stage == 3 else 0,
        micro_batch_size=options.per_device_training_batch_size,
        gradient_accumulation_steps=1,
        world_size=runtime.world_size,
        offload_parameters=offload,
    )


def load_reference(options: Options, runtime: Runtime) -> DeepSpeedEngine | PreTrainedModel | None:
    """The model that the KL penalty keeps the policy near to: the SFT model, unless told otherwise.

    None where that is what remains of the actor without its LoRA layers.
    """
    config = frozen_config(options, runtime, options.reference_zero_stage, options.offload_reference_model)
    path = options.reference_model_name_or_path or options.actor_model_name_or_path
    if path == options.actor_model_name_or_path and _keeps_base(options):
        runtime.say("reference: the actor without its LoRA layers, so no model of its own is loaded")
        return None
    model = load_causal_lm(path, runtime.torch_dtype, config, 0.0, options.attn_implementation)
    return freeze(model, config, runtime)


def _keeps_base(options: Options) -> bool:
    """Whether the actor computes with the SFT model's own weights below its LoRA layers.

    ZeRO++ gathers them in 8 bits, and the hybrid engine's kernels may have them merged.
    """
    kept = not options.enable_mixed_precision_lora and options.rollout_name != "hybrid"
    return kept and lora_alone(options, "actor")


def lora_alone(options: Options, role: str) -> bool:
    """Whether all that trains of a model's backbone is LoRA."""
    return options.only_optimize_lora and getattr(options, f"{role}_lora_dim") > 0


def _config(options: Options, runtime: Runtime, zero_stage: int, offload: bool, passes: int = 1) -> dict:
    """Config of a trained model. ``passes``: backward passes for each training micro-batch."""
    return build_config(
        dtype=runtime.dtype,
        zero_stage=zero_stage,
        micro_batch_size=options.per_device_training_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps * passes,
        world_size=runtime.world_size,
        offload=offload,
        max_grad_norm=options.max_grad_norm,
        overrides=options.deepspeed_config,
    )


def _actor_extras(options: Options, runtime: Runtime) -> dict:
    """What only the actor's config has: the hybrid engine, and ZeRO++ for the weights under LoRA."""
    extras: dict = {}
    if options.rollout_name == "hybrid" and not hybrid_obstacle(runtime):
        if (
            options.offload
            and options.actor_zero_stage == options.critic_zero_stage == 2
            and options.actor_lora_dim == 0
        ):
            runtime.say("warning: hybrid engine with ZeRO-2 and offload but no LoRA: DeepSpeed-Chat calls it unstable")
        extras["hybrid_engine"] = {
            "enabled": True,
            "max_out_tokens": options.max_prompt_seq_len + options.max_answer_seq_len,
            "inference_tp_size": options.inference_tp_size,
            "release_inference_cache": options.release_inference_cache,
            "pin_parameters": not options.unpin_actor_parameters,
            "tp_gather_partition_size": options.tp_gather_partition_size,
        }
    if options.enable_mixed_precision_lora:
        if runtime.device.type == "cpu":
            raise InputError("--enable_mixed_precision_lora: ZeRO++'s 8-bit gathering needs a GPU")
        extras["zero_optimization"] = {"zero_quantized_nontrainable_weights": True}
        if runtime.world_size != get_accelerator().device_count():
            extras["zero_optimization"]["zero_hpz_partition_size"] = get_accelerator().device_count()
    return extras


def _train(model: PreTrainedModel, role: str, options: Options, config: dict, total_steps: int) -> DeepSpeedEngine:
    """LoRA, gradient checkpointing, optimiser, schedule and engine of the actor or the critic, by its flags."""

    def flag(name: str):
        return getattr(options, f"{role}_{name}")

    if flag("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if flag("lora_dim") > 0:
        add_lora(model, flag("lora_dim"), flag("lora_alpha"), flag("lora_module_name"), options.only_optimize_lora)
    offloaded = config["zero_optimization"]["offload_optimizer"]["device"] != "none"
    optimizer = make_optimizer(
        model, flag("learning_rate"), flag("weight_decay"), flag("lora_learning_rate"), offloaded
    )
    schedule = get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=min(options.num_warmup_steps, total_steps),
        num_training_steps=total_steps,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    watch_gradients(engine)
    lean_checkpoints(engine)
    return engine
