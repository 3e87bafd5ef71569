"""The models of step 3 as DeepSpeed engines: actor, critic, reference and what the rewards need."""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, get_scheduler

from deepspeed_chat_tlcr.deepspeed_config import build_config, merge
from deepspeed_chat_tlcr.engine_checkpoints import lean_checkpoints
from deepspeed_chat_tlcr.errors import InputError, RunError, told
from deepspeed_chat_tlcr.finite import watch_gradients
from deepspeed_chat_tlcr.models import (
    freeze_head_bias,
    head_of,
    label_count,
    load_causal_lm,
    load_token_classifier,
    scale_head,
)
from deepspeed_chat_tlcr.optim import add_lora, make_optimizer, without_adapters
from deepspeed_chat_tlcr.packing import Pack, Row, forward_pack, forward_packed, packable, packs_of
from deepspeed_chat_tlcr.runtime import Runtime
from step3_ppo_tlcr.experience import Rollout, at_actions, before_actions
from step3_ppo_tlcr.objectives import counted
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.rewards import REWARDS, RewardSpec, fixed_reward, load_function, names_of, sequence_reward
from step3_ppo_tlcr.rollout import hybrid_obstacle


def action_logits(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Logits of every choice, ``(B, A, V)``; nothing is computed for the prompt's other positions."""
    if _packs(model, rollout):
        return _forward_packed(
            rollout, lambda pack: forward_pack(model, pack, logits_to_keep=pack.chosen - 1, use_cache=False)[0]
        )
    outputs = _forward(model, rollout, logits_to_keep=rollout.actions + 1, use_cache=False)
    return before_actions(outputs.logits, rollout.actions)


def state_values(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """V of the state in which each action was chosen, ``(B, A)`` in fp32."""
    if _packs(model, rollout):
        return _forward_packed(rollout, lambda pack: forward_pack(model, pack)[0, pack.chosen - 1, 0].float())
    values = _forward(model, rollout).logits.squeeze(-1).float()
    return before_actions(values, rollout.actions)


def positive_probs(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """D(a_t | x, a_<t) of each chosen token, ``(B, A)`` in fp32 (Eq. 7); one soft-max, not two."""
    if _packs(model, rollout):
        logits = _forward_packed(rollout, lambda pack: forward_pack(model, pack)[0, pack.chosen])
    else:
        logits = at_actions(_forward(model, rollout).logits, rollout.actions)
    return logits.float().softmax(-1)[..., 1]


def token_scores(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """A sequence reward model's value at each response token, ``(B, A)`` in fp32; the last one is the score."""
    if _packs(model, rollout):
        return _forward_packed(rollout, lambda pack: forward_pack(model, pack)[0, pack.chosen, 0].float())
    return at_actions(_forward(model, rollout).logits.squeeze(-1).float(), rollout.actions)


def _packs(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> bool:
    return bool(rollout.tokens_at_once) and packable(model, rollout.input_ids.size(1))


def _forward_packed(rollout: Rollout, forward: Callable[[Pack], torch.Tensor]) -> torch.Tensor:
    """What ``forward`` says of each pack's N actions, ``(N, …)``, as ``(B, A, …)``; 0 elsewhere. A collective."""
    first = rollout.input_ids.size(1) - rollout.actions  # where responses start, behind prompts padded on the left
    lengths, actions = torch.stack([rollout.attention_mask.sum(1), rollout.action_mask.sum(1)]).tolist()
    rows = [Row(first + own - length, first, first + own) for length, own in zip(lengths, actions, strict=True)]
    packs = packs_of(rollout.input_ids, rows, rollout.tokens_at_once, origin=first)
    return forward_packed(packs, rollout.action_mask.shape, forward)


def _forward(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout, **kwargs):
    module = model.module if isinstance(model, DeepSpeedEngine) else model
    if "position_ids" in inspect.signature(module.forward).parameters:
        kwargs["position_ids"] = rollout.position_ids
    return model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask, **kwargs)


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


def inherited_unit(specs: Sequence[RewardSpec], critic_path: str) -> float:
    """What one unit of the critic path's own score is worth as reward: the weight of its ``sequence`` terms.

    1 where no term has that model: then it is a critic, whose values are in units of reward already.
    """
    critic = os.path.realpath(critic_path)
    weights = [spec.weight for spec in specs if spec.name == "sequence" and os.path.realpath(spec.path) == critic]
    return sum(weights) if weights else 1.0


def train_critic(
    options: Options, runtime: Runtime, total_steps: int, specs: Sequence[RewardSpec] = ()
) -> DeepSpeedEngine:
    """The value function, from the critic path's backbone.

    A sequence reward model or critic (1 label) brings its head, which is scaled as ``specs`` weigh that model's score,
    so that V speaks in units of reward; any other backbone gets one that starts at V = 0.
    """
    offload = options.offload or options.offload_critic_model
    config = _config(options, runtime, options.critic_zero_stage, offload)
    new_head = label_count(options.critic_model_name_or_path) != 1
    model = load_token_classifier(
        options.critic_model_name_or_path,
        1,
        runtime.torch_dtype,
        config,
        options.critic_dropout_rate,
        new_head=new_head,
        zero_head=new_head,
        attention=options.attn_implementation,
    )
    if not new_head:
        scale_head(model, inherited_unit(specs, options.critic_model_name_or_path))
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
    return kept and _lora_alone(options, "actor")


def _lora_alone(options: Options, role: str) -> bool:
    """Whether all that trains of a model's backbone is LoRA."""
    return options.only_optimize_lora and getattr(options, f"{role}_lora_dim") > 0


def _plain_copy(head: nn.Linear, runtime: Runtime) -> nn.Linear:
    """A frozen head that outlives its model, whole on the device also where ZeRO-3 has partitioned that."""
    with deepspeed.zero.GatheredParameters(list(head.parameters())):
        copy = nn.Linear(head.in_features, head.out_features, head.bias is not None, runtime.device, head.weight.dtype)
        copy.load_state_dict(head.state_dict())
    return copy.requires_grad_(False)


@contextmanager
def _answering(model: PreTrainedModel, head: nn.Linear) -> Iterator[None]:
    """Within it a token classifier's logits are those of another head on the same hidden states."""
    hook = head_of(model)[1].register_forward_hook(lambda module, inputs, logits: head(*inputs))
    try:
        yield
    finally:
        hook.remove()


class RewardSum:
    """The weighted sum of ``--reward``'s terms, each with its own model; a model named twice is loaded once.

    Of the one that a critic of LoRA layers alone began as, only the head is kept: the rest stands in the critic.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        tokenizer: PreTrainedTokenizerFast,
        options: Options,
        runtime: Runtime,
        critic: DeepSpeedEngine | None,
    ):
        self.specs, self.tokenizer, self.critic = specs, tokenizer, critic
        # ReMax clips the difference of two scores, which clipped ones would often make 0.
        self.clip = math.inf if options.algo == "remax" else options.clip_reward_value
        self.names = names_of(specs)
        self.fixed = options.fixed_values
        self.models: dict[str, DeepSpeedEngine | PreTrainedModel] = {}
        self.heads: dict[str, nn.Linear] = {}  # of models whose backbone is the critic's
        in_critic = options.critic_model_name_or_path if critic and _lora_alone(options, "critic") else None
        self.functions = {spec.path: load_function(spec.path) for spec in specs if spec.name == "python"}
        for path in dict.fromkeys(spec.path for spec in specs if spec.name in REWARDS and spec.path):
            labels = {REWARDS[spec.name].labels for spec in specs if spec.path == path}
            if len(labels) > 1:
                raise InputError(f"--reward: {path!r} cannot be both a discriminator and a sequence reward model")
            config = frozen_config(options, runtime, options.reward_zero_stage, options.offload_reward_model)
            model = load_token_classifier(
                path, labels.pop(), runtime.torch_dtype, config, 0.0, attention=options.attn_implementation
            )
            if path == in_critic:
                runtime.say(f"reward: {path}'s own head on the critic without its LoRA layers")
                self.heads[path] = _plain_copy(head_of(model)[1], runtime)
            else:
                self.models[path] = freeze(model, config, runtime)

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``(B, A)`` rewards before the KL penalty, and each term's unweighted ``(B, A)`` by ``names_of`` it."""
        scored: dict[str, torch.Tensor] = {}
        total = torch.zeros(rollout.action_mask.shape, device=rollout.action_mask.device)
        terms = {}
        for name, spec in zip(self.names, self.specs, strict=True):
            term = self._term(spec, rollout, scored)
            terms[name] = term
            total = total + spec.weight * term
        return total, terms

    def _term(self, spec: RewardSpec, rollout: Rollout, scored: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = rollout.action_mask
        if spec.name == "python":
            try:
                term = self.functions[spec.path](rollout, self.tokenizer)
            except Exception as error:  # whatever a stranger's function raises
                raise RunError(f"--reward python:{spec.path}: {told(error)}") from error
            if not isinstance(term, torch.Tensor) or term.shape != mask.shape:
                found = tuple(term.shape) if isinstance(term, torch.Tensor) else type(term).__name__
                raise InputError(f"--reward python:{spec.path} returned {found}, expected a tensor {tuple(mask.shape)}")
            return counted(term.to(mask.device, torch.float32), mask)
        reward = REWARDS[spec.name]
        if spec.path is None:
            return reward.function(mask, mask)
        if spec.path not in scored:
            score = positive_probs if reward.labels == 2 else token_scores
            if spec.path in self.heads:
                self.critic.eval()
                with without_adapters(self.critic.module), _answering(self.critic.module, self.heads[spec.path]):
                    scored[spec.path] = score(self.critic, rollout)
            else:
                scored[spec.path] = score(self.models[spec.path], rollout)
        if spec.name == "sequence":
            return sequence_reward(scored[spec.path], mask, self.clip)
        if spec.name == "tlcr_fixed":
            return fixed_reward(scored[spec.path], mask, **self.fixed)
        return reward.function(scored[spec.path], mask)


@dataclass(frozen=True)
class Models:
    """Everything that runs in step 3."""

    actor: DeepSpeedEngine
    critic: DeepSpeedEngine | None  # ReMax has none
    reference: DeepSpeedEngine | PreTrainedModel | None  # none where the actor without its LoRA layers serves
    reward: RewardSum

    @property
    def engines(self) -> dict[str, DeepSpeedEngine]:
        """Those that train."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})

    def reference_logits(self, rollout: Rollout) -> torch.Tensor:
        """As ``action_logits`` of the reference; the actor is in evaluation mode."""
        if self.reference is not None:
            return action_logits(self.reference, rollout)
        with without_adapters(self.actor.module):
            return action_logits(self.actor, rollout)


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
