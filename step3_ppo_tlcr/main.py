"""Step 3: PPO in which every generated token has its own continuous reward (paper 4.3).

deepspeed step3_ppo_tlcr/main.py --actor_model_name_or_path SFT --critic_model_name_or_path DISCRIMINATOR \\
    --reward tlcr --data_path DATA --output_dir OUTPUT
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.arguments import DataOptions, RunOptions, Schedule, announce, option, parse
from deepspeed_chat_tlcr.checkpoints import Checkpoints
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.metrics import MetricsLog
from deepspeed_chat_tlcr.models import label_count
from deepspeed_chat_tlcr.preference_data import load_preferences
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.saving import require_writable, save_model, write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, require_same_tokenizer, tokenize_prompt
from deepspeed_chat_tlcr.training import LengthGroupedSampler
from step3_ppo_tlcr.engines import RewardSum, decoding, load_reference, train_actor, train_critic
from step3_ppo_tlcr.rewards import RewardSpec, parse_rewards
from step3_ppo_tlcr.rollout import GenerateRollout
from step3_ppo_tlcr.trainer import Models, PPOTrainer, micro_batches

ZeroStage = Literal[0, 1, 2, 3]
Penalty = Literal["kl", "k3", "full_kl", "kl_onestep", "full_kl_onestep"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """models"""

    actor_model_name_or_path: str = option(MISSING, "the SFT model: policy and KL reference")
    critic_model_name_or_path: str = option(MISSING, "where the critic starts, and the default model of --reward")
    actor_dropout: float | None = option(None, "the actor's dropout; unset: none, so that rollouts are on-policy")
    critic_dropout: float | None = option(None, "the critic's dropout; unset: none")
    actor_zero_stage: ZeroStage = option(0, "ZeRO stage of the actor")
    critic_zero_stage: ZeroStage = option(0, "ZeRO stage of the critic")
    reference_zero_stage: ZeroStage | None = option(None, "3 partitions the reference; unset: as the actor's stage 3")
    reward_zero_stage: ZeroStage | None = option(None, "3 partitions the reward models; unset: as the actor's stage 3")
    offload: bool = option(False, "keep actor's and critic's optimiser states (ZeRO-3: parameters) in host memory")
    offload_reference_model: bool = option(False, "keep the reference in host memory (partitions it with ZeRO-3)")
    offload_reward_model: bool = option(False, "keep the reward models in host memory (partitions them with ZeRO-3)")
    actor_gradient_checkpointing: bool = option(False, "recompute the actor's activations in its backward pass")
    critic_gradient_checkpointing: bool = option(False, "recompute the critic's activations in its backward pass")
    actor_lora_dim: int = option(0, "LoRA rank of the actor; 0: train all parameters")
    actor_lora_module_name: str = option("decoder.layers.", "LoRA goes on linear layers whose name contains this")
    critic_lora_dim: int = option(0, "LoRA rank of the critic; 0: train all parameters")
    critic_lora_module_name: str = option("decoder.layers.", "LoRA goes on linear layers whose name contains this")
    only_optimize_lora: bool = option(False, "freeze everything but LoRA and the critic's head")
    actor_lora_learning_rate: float = option(5e-4, "peak learning rate of the actor's LoRA")
    critic_lora_learning_rate: float = option(5e-4, "peak learning rate of the critic's LoRA")


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """rollout"""

    per_device_generation_batch_size: int = option(16, "prompts per device and generation batch")
    generation_batches: int = option(1, "generation batches per set of rollouts")
    max_prompt_seq_len: int = option(256, "longest prompt, tokens; longer ones are dropped and counted")
    max_answer_seq_len: int = option(256, "longest response, tokens")
    temperature: float = option(1.0, "sampling temperature; log-probs belong to the distribution sampled from")
    top_p: float = option(1.0, "sample from the smallest set of tokens with this probability")
    top_k: int = option(0, "sample from this many likeliest tokens; 0: from all")
    min_answer_seq_len: int = option(0, "tokens before which a response cannot end")
    print_answers: bool = option(False, "print the first prompt and response of every --print_answers_interval updates")
    print_answers_interval: int = option(1, "updates between printed responses")


@dataclass(frozen=True, kw_only=True)
class PPOOptions:
    """PPO"""

    reward: list[str] = option(
        ["auto"],
        "NAME[:PATH][@WEIGHT] terms, summed: tlcr, tlcr_fixed, tlcr_positive_only, tlcr_negative_only, "
        "tlcr_released_code, sequence, random, python:package.module:function; auto: tlcr for a discriminator, "
        "sequence for a sequence reward model",
    )
    per_device_training_batch_size: int = option(16, "sequences per device and training micro-batch")
    ppo_epochs: int = option(1, "passes over each set of rollouts")
    num_train_epochs: int = option(1, "passes over the prompts")
    gradient_accumulation_steps: int = option(1, "micro-batches per optimiser step")
    actor_learning_rate: float = option(9.65e-6, "the actor's peak learning rate")
    critic_learning_rate: float = option(5e-6, "the critic's peak learning rate")
    actor_weight_decay: float = option(0.0, "the actor's decoupled weight decay")
    critic_weight_decay: float = option(0.0, "the critic's decoupled weight decay")
    lr_scheduler_type: Schedule = option("cosine", "learning-rate schedule of both")
    num_warmup_steps: int = option(100, "optimiser steps of linear warm-up")
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down")
    kl_ctl: float = option(0.1, "beta of the per-token KL penalty against the SFT model")
    penalty: Penalty = option(
        "kl",
        "the KL of each token: kl, log pi - log pi_ref; k3, its low-variance estimate; full_kl, over the whole "
        "vocabulary; …_onestep: added to the advantage rather than the reward",
    )
    kl_target: float | None = option(None, "KL in nats per response that --kl_ctl is steered towards; unset: constant")
    kl_horizon: int = option(10_000, "sequences over which --kl_target steers")
    target_kl: float | None = option(None, "end a rollout's updates once the policy moved this far, nats per token")
    clip_reward_value: float = option(5.0, "bound of a sequence reward model's score")
    scale_rewards: bool = option(False, "divide rewards by the running standard deviation of their sums per response")
    whiten_advantages: bool = option(
        False, "scale advantages to mean 0, standard deviation 1 over each set of rollouts"
    )
    gamma: float = option(1.0, "discount of later rewards")
    lam: float = option(0.95, "lambda of generalised advantage estimation")
    cliprange: float = option(0.2, "clip range of the policy ratio")
    cliprange_value: float = option(0.2, "clip range of the value function")


@dataclass(frozen=True, kw_only=True)
class Options(PPOOptions, RolloutOptions, ModelOptions, DataOptions, RunOptions):
    """Step 3: PPO with a continuous reward on every token."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"save_interval": 0}

    enable_test_mode: bool = option(False, "stop after --test_stop_step updates")
    test_stop_step: int = option(0, "updates of a test run")
    add_eot_token: bool = option(False, "end responses with --eot_token instead of the tokenizer's EOS")
    eot_token: str = option("<|endoftext|>", "the token that --add_eot_token makes the end of a response")
    num_padding_at_beginning: int = option(1, "OPT's padding", "masks come from lengths, padding is never counted")
    compute_fp32_loss: bool = option(False, "loss in fp32", "log-probs and losses are always computed in fp32")

    @property
    def actor_dropout_rate(self) -> float:
        return self.actor_dropout or 0.0

    @property
    def critic_dropout_rate(self) -> float:
        return self.critic_dropout or 0.0


def parse_args(argv: Sequence[str] | None = None) -> Options:
    return parse(Options, argv)


def reward_specs(options: Options) -> list[RewardSpec]:
    """The terms of ``--reward``; ``auto`` looks at the critic checkpoint's labels."""
    critic = options.critic_model_name_or_path
    if options.reward != ["auto"]:
        return parse_rewards(options.reward, critic)
    names = {2: "tlcr", 1: "sequence"}
    labels = label_count(critic)
    if labels not in names:
        raise InputError(
            f"--critic_model_name_or_path {critic!r} is neither a discriminator nor a reward model, so --reward auto "
            "finds no reward in it; train one with step2_discriminator/main.py or name one with --reward"
        )
    return parse_rewards([names[labels]], critic)


def load_prompts(options: Options, tokenizer, runtime: Runtime) -> list[list[int]]:
    """Token ids of the RL part's prompts that fit; the longer ones are counted and dropped."""
    preferences = load_preferences(
        options.data_path, "rl", "train", options.data_split, options.data_seed, False, tokenizer=tokenizer
    )
    prompts = [tokenize_prompt(tokenizer, preference.prompt) for preference in preferences]
    kept = [prompt for prompt in prompts if len(prompt) <= options.max_prompt_seq_len]
    runtime.say(f"{len(kept)} prompts, {len(prompts) - len(kept)} dropped (over {options.max_prompt_seq_len} tokens)")
    return kept


def prompt_batches(
    prompts: Sequence[list[int]], options: Options, runtime: Runtime, epoch: int
) -> Iterator[list[list[list[int]]]]:
    """This rank's prompts for each set of rollouts, ``generation_batches`` lists of them; formed by length.

    A last set that would be incomplete is left out: no rank ever holds a batch of another size.
    """
    per_device = options.per_device_generation_batch_size
    per_rank = per_device * options.generation_batches
    per_set = per_rank * runtime.world_size
    sampler = LengthGroupedSampler([len(prompt) for prompt in prompts], per_set, options.seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    for begin in range(0, len(order) - per_set + 1, per_set):
        chosen = order[begin : begin + per_set]
        mine = chosen[runtime.rank * per_rank : (runtime.rank + 1) * per_rank]
        yield [[prompts[i] for i in mine[at : at + per_device]] for at in range(0, len(mine), per_device)]


def line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """What the terminal shows of one update."""
    return (
        f"{step:>5}/{steps}  reward/token {metrics['reward/per_token']:+.3f}  KL {metrics['policy/kl']:.2f}  "
        f"length {metrics['rollout/response_length']:.1f}  EOS {metrics['rollout/eos_rate']:.2f}  "
        f"entropy {metrics['policy/entropy']:.2f}  V loss {metrics['value/loss']:.4f}  "
        f"{sum(value for key, value in metrics.items() if key.startswith('seconds/')):.1f} s"
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    micro_batches(options)
    require_writable(options.output_dir)
    specs = reward_specs(options)
    runtime = runtimes.start(options.precision, options.seed)
    if runtime.is_main:
        announce(options, options.output_dir)

    eot_token = options.eot_token if options.add_eot_token else None
    tokenizer = load_tokenizer(options.actor_model_name_or_path, eot_token)
    require_same_tokenizer(tokenizer, load_tokenizer(options.critic_model_name_or_path, eot_token), "critic")
    prompts = load_prompts(options, tokenizer, runtime)
    per_set = options.per_device_generation_batch_size * options.generation_batches * runtime.world_size
    if len(prompts) < per_set:
        raise InputError(
            f"{len(prompts)} prompts do not fill one set of rollouts of {per_set} "
            f"(--per_device_generation_batch_size x --generation_batches x {runtime.world_size} rank(s))"
        )
    sets_per_epoch = len(prompts) // per_set
    steps = sets_per_epoch * options.num_train_epochs
    last_step = min(steps, options.test_stop_step) if options.enable_test_mode else steps
    updates = steps * options.ppo_epochs * micro_batches(options) // options.gradient_accumulation_steps

    models = Models(
        actor=train_actor(options, runtime, updates),
        critic=train_critic(options, runtime, updates),
        reference=load_reference(options, runtime),
        reward=RewardSum(specs, tokenizer, options, runtime),
    )
    rollouts = GenerateRollout(models.actor, tokenizer, options.min_answer_seq_len)
    trainer = PPOTrainer(options, models, rollouts, decoding(options))

    engines = {"actor": models.actor, "critic": models.critic}
    checkpoints = Checkpoints(Path(options.output_dir) / "checkpoints", options.save_total_limit)
    saved = checkpoints.steps() if options.resume == "auto" else []
    done = 0
    if saved:
        state = checkpoints.load(saved[-1], engines)
        done = state["step"]
        trainer.restore(state["trainer"])
        runtime.say(f"continuing from step {done} of {last_step}")
    log = MetricsLog(options.output_dir, done, options.tensorboard_folder) if runtime.is_main else None

    begun = time.monotonic()
    metrics: dict[str, float] = {}
    bar = tqdm(total=last_step, initial=done, desc="PPO", dynamic_ncols=True, disable=not runtime.is_main)
    step = 0
    for epoch in range(options.num_train_epochs):
        for batch in prompt_batches(prompts, options, runtime, epoch):
            step += 1
            if step <= done or step > last_step:
                continue
            metrics = trainer.step(batch)
            if log is not None:
                log.write(step, metrics)
                bar.write(line(step, last_step, metrics))
                if options.print_answers and step % options.print_answers_interval == 0:
                    bar.write(trainer.shown_answer)
            bar.update()
            if options.save_interval and step % options.save_interval == 0 and step < last_step:
                checkpoints.save(step, engines, {"trainer": trainer.state()})
    bar.close()

    save_model(models.actor, tokenizer, Path(options.output_dir) / "actor", options.save_format)
    save_model(models.critic, tokenizer, Path(options.output_dir) / "critic", options.save_format)
    if runtime.is_main:
        last = {key: value for key, value in metrics.items() if math.isfinite(value)}
        seconds = round(time.monotonic() - begun, 1)
        write_json(
            Path(options.output_dir) / "results.json",
            {"stage": "ppo", "steps": last_step, "seconds": seconds, "prompts": len(prompts), **last},
        )
    checkpoints.remove()
    runtime.say(f"PPO: {last_step} steps; actor and critic saved in {options.output_dir}")
    runtime.finish()


if __name__ == "__main__":
    main()
    runtimes.leave()
