"""The options of step 3: DeepSpeed-Chat's, those of its forks RLHF-TLCR and ReMax, and this project's own."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from typing import Any, ClassVar, Literal

from deepspeed_chat_tlcr.arguments import DataOptions, PackingOptions, RunOptions, Schedule, option, parse
from deepspeed_chat_tlcr.asking.models import check_base_url
from deepspeed_chat_tlcr.errors import InputError

ZeroStage = Literal[0, 1, 2, 3]
Penalty = Literal["kl", "k3", "full_kl", "kl_onestep", "full_kl_onestep"]
Algorithm = Literal["ppo", "remax"]
RolloutName = Literal["loop", "hf", "continuous", "hybrid", "vllm"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """models"""

    actor_model_name_or_path: str = option(MISSING, "the SFT model, from which the policy starts")
    reference_model_name_or_path: str | None = option(
        None, "the model that the KL penalty keeps the policy near to; unset: the one that the policy starts from"
    )
    critic_model_name_or_path: str = option(
        MISSING, "where the critic starts, and the default model of --reward", flags=("--reward_model_name_or_path",)
    )
    actor_dropout: float | None = option(
        None,
        "the actor's dropout; unset: none, so that rollouts are on-policy",
        better="none by default, whatever the checkpoint's",
        most=1,
    )
    critic_dropout: float | None = option(None, "the critic's dropout; unset: none", most=1)
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
    actor_lora_alpha: float = option(1.0, "LoRA's update is scaled by this / actor_lora_dim; 1: as in DeepSpeed-Chat")
    actor_lora_module_name: str = option(
        "auto",
        "LoRA goes on linear layers whose name contains this; auto: those of the model's blocks",
        better="auto fits every family, DeepSpeed-Chat's default OPT alone",
    )
    critic_lora_dim: int = option(0, "LoRA rank of the critic; 0: train all parameters")
    critic_lora_alpha: float = option(1.0, "LoRA's update is scaled by this / critic_lora_dim; 1: as in DeepSpeed-Chat")
    critic_lora_module_name: str = option(
        "auto",
        "LoRA goes on linear layers whose name contains this; auto: those of the model's blocks",
        better="auto fits every family, DeepSpeed-Chat's default OPT alone",
    )
    only_optimize_lora: bool = option(False, "freeze everything but LoRA and the critic's head")
    actor_lora_learning_rate: float = option(5e-4, "peak learning rate of the actor's LoRA")
    critic_lora_learning_rate: float = option(5e-4, "peak learning rate of the critic's LoRA")
    enable_mixed_precision_lora: bool = option(
        False, "ZeRO++: gather the frozen weights under LoRA in 8 bits (actor ZeRO-3, accelerator only)"
    )
    enable_ema: bool = option(
        False,
        "also save actor_ema: a running average of the actor's weights over updates",
        better="it is part of the checkpoints, so a resumed run's average is the whole run's",
    )
    ema_decay: float = option(0.992, "share of the old average that each update keeps", below=1)


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """rollout"""

    rollout: RolloutName = option(
        "loop",
        "what samples: loop, this project's decoding loop; hf, transformers' generate; continuous, its continuous "
        "batching; hybrid, DeepSpeed's hybrid engine; vllm, servers of your own (--vllm_server)",
    )
    vllm_server: list[str] = option(
        [], "addresses of vLLM servers that serve_rollouts.sh started, as in http://127.0.0.1:8000"
    )
    vllm_weights_folder: str | None = option(
        None, "a folder on a disk that servers share: weights go there through files; unset: over the network"
    )
    vllm_timeout: float = option(600.0, "seconds that a vLLM server may take over one request", above=0)
    vllm_check_interval: int = option(50, "syncs of weights between comparisons of the servers' log-probs")
    rollout_correction: Literal["token", "off"] | None = option(
        None,
        "token: weigh each token's advantage by min(pi / pi_server, --rollout_correction_cap); unset: token in 16 bit "
        "and with --rollout_ahead, else off",
    )
    rollout_correction_cap: float = option(2.0, "largest weight of --rollout_correction", least=1)
    rollout_ahead: Literal[0, 1] = option(
        0, "1: vLLM servers write the next set while this one trains, with weights one update old"
    )
    eager_decoding: bool = option(
        False, "on a GPU: decode without CUDA graphs, slower, but no key-value cache stays allocated between rollouts"
    )
    per_device_generation_batch_size: int = option(16, "prompts per device and generation batch")
    generation_batches: int = option(
        1, "generation batches per set of rollouts; a set is larger where --gradient_accumulation_steps needs more"
    )
    decode_batch_size: int = option(0, "prompts decoded at a time on a device; 0: all generation batches together")
    max_prompt_seq_len: int = option(
        256,
        "longest prompt, tokens; longer ones are dropped and counted",
        better="batches are padded to their longest prompt, not to this",
    )
    max_answer_seq_len: int = option(256, "longest response, tokens")
    temperature: float = option(1.0, "sampling temperature; log-probs belong to the distribution sampled from", above=0)
    top_p: float = option(1.0, "sample from the smallest set of tokens with this probability", above=0, most=1)
    top_k: int = option(0, "sample from this many likeliest tokens; 0: from all")
    min_answer_seq_len: int = option(0, "tokens before which a response cannot end")
    print_answers: bool = option(False, "print the first prompt and response of every --print_answers_interval updates")
    print_answers_interval: int = option(1, "updates between printed responses")
    save_answers: bool = option(False, "write every prompt, response and its reward to answers.jsonl")
    enable_hybrid_engine: bool = option(
        False,
        "DeepSpeed-Chat's spelling of --rollout hybrid",
        better="its first greedy tokens are compared with transformers', which takes over where they differ",
    )
    unpin_actor_parameters: bool = option(False, "hybrid engine: keep no gathered parameters while it generates")
    release_inference_cache: bool = option(False, "hybrid engine: free its cache after every rollout")
    inference_tp_size: int = option(1, "hybrid engine: tensor-parallel degree (needs actor ZeRO-3)")
    tp_gather_partition_size: int = option(8, "hybrid engine: layers gathered at a time for tensor parallelism")

    @property
    def rollout_name(self) -> RolloutName:
        """Which rollout engine, by either of its two flags."""
        return "hybrid" if self.enable_hybrid_engine else self.rollout


@dataclass(frozen=True, kw_only=True)
class PPOOptions:
    """PPO"""

    preset: Literal["none", "paper", "deepspeed_chat", "remax", "ppo_max"] = option(
        "none", "defaults of many options at once, as one paper or program has them; what is given wins"
    )
    algo: Algorithm = option("ppo", "ppo; or remax: REINFORCE against the greedy response's reward, without a critic")
    reward: list[str] = option(
        ["auto"],
        "NAME[:PATH][@WEIGHT] terms, summed (WEIGHT START..END: linear over the run): tlcr, tlcr_fixed, "
        "tlcr_positive_only, tlcr_negative_only, tlcr_released_code, tlcr_sum, tlcr_redistributed, segments, "
        "sentences, sequence, uniform, abc, token_scores, rlmec, critic, random, python:package.module:function "
        "(docs/rewards.md); auto: tlcr for a discriminator, sequence for a sequence reward model, token_scores for a "
        "token reward model",
    )
    reward_tokenizer: Literal["same", "own"] = option(
        "same",
        "own: a reward's model may have another tokenizer than the policy; what it says of its tokens is carried over "
        "to the policy's by the characters that both spell",
    )
    abc_beta: float = option(0.8, "abc: share of the score that goes where the reward model's attention was", most=1)
    token_score_baseline: float = option(0.5, "token_scores: taken off every token's reward", least=-1e9)
    score_mean: float = option(0.0, "sequence, uniform, abc: taken off the reward model's score", least=-1e9)
    score_std: float = option(1.0, "sequence, uniform, abc: what the score is then divided by", above=0)
    rlmec_judge: str | None = option(
        None,
        "rlmec: which answers are right: a sequence reward model's path, by its score; number: by the last number, "
        "which must be the reference's; unset: --critic_model_name_or_path",
    )
    rlmec_threshold: float = option(0.0, "rlmec: score above which an answer is right", least=-1e9)
    span_base_url: str | None = option(
        None, "critic: address of the chat model's endpoint; unset: OPENAI_BASE_URL, else OpenAI"
    )
    span_api_key_env: str = option("OPENAI_API_KEY", "critic: name of the environment variable that holds the key")
    span_price: str | None = option(None, "critic: IN,OUT, US$ per million tokens, of a chat model not listed")
    span_max_cost_usd: float | None = option(None, "critic: the most that the run may spend; then no more is asked")
    span_prompt_file: str | None = option(None, "critic: a question of your own, with {prompt} and {response}")
    span_seconds: float = option(
        30.0, "critic: longest that a set of rollouts waits for it; what is late counts 0", above=0, most=300
    )
    span_concurrency: int = option(32, "critic: most calls of a rank in flight", most=4096)
    span_positive: float = option(0.8, "critic: reward of a token in a span called good", least=-1e9)
    span_negative: float = option(-0.8, "critic: reward of a token in a span called bad", least=-1e9)
    span_most: int = option(8, "critic: most spans of each kind in an answer", most=100)
    span_threshold: float | None = option(
        None, "critic: ask only about answers whose sequence reward is at most this; unset: about all", least=-1e9
    )
    normalise_rewards: Literal["off", "scale", "whiten"] = option(
        "off",
        "divide each term of --reward by the running standard deviation of its sums per response, before its weight; "
        "whiten: take their running mean off first, on the last token",
    )
    clip_normalised_reward: float | None = option(None, "bound of a term's reward after --normalise_rewards", above=0)
    per_device_training_batch_size: int = option(
        16, "sequences per device and training micro-batch, at most --per_device_generation_batch_size"
    )
    ppo_epochs: int = option(1, "passes over each set of rollouts")
    num_train_epochs: int = option(1, "passes over the prompts")
    gradient_accumulation_steps: int = option(1, "micro-batches per optimiser step")
    actor_learning_rate: float = option(9.65e-6, "the actor's peak learning rate")
    critic_learning_rate: float = option(5e-6, "the critic's peak learning rate")
    actor_weight_decay: float = option(0.0, "the actor's decoupled weight decay")
    critic_weight_decay: float = option(0.0, "the critic's decoupled weight decay")
    lr_scheduler_type: Schedule = option("cosine", "learning-rate schedule of both")
    num_warmup_steps: int = option(100, "optimiser steps of linear warm-up", least=0)
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down")
    kl_ctl: float = option(0.1, "beta of the per-token KL penalty against the SFT model")
    penalty: Penalty = option(
        "kl",
        "the KL of each token: kl, log pi - log pi_ref; k3, its low-variance estimate; full_kl, over the whole "
        "vocabulary; …_onestep: added to the advantage rather than the reward",
    )
    kl_target: float | None = option(
        None, "KL in nats per response that --kl_ctl is steered towards; unset: constant", above=0
    )
    kl_horizon: int = option(10_000, "sequences over which --kl_target steers")
    target_kl: float | None = option(
        None,
        "end a rollout's updates once the policy moved this far, nats per token; with --algo remax, as in its release: "
        "end the run once the held-out KL per token is above it (without --eval_interval: that of the rollouts)",
        better="off unless it is given; ReMax's is 1.0 by default",
    )
    clip_reward_value: float = option(5.0, "bound of a sequence reward model's score, and of ReMax's difference")
    critic_warmup_steps: int = option(
        0, "first sets of rollouts from which the critic alone learns, so that its values mean something", least=0
    )
    fixed_threshold: float = option(
        0.6, "tlcr_fixed gives 0 where max(D, 1 - D) is below this (Eq. 2)", least=0.5, most=1
    )
    scale_rewards: bool = option(False, "divide rewards by the running standard deviation of their sums per response")
    whiten_advantages: bool = option(
        False, "scale advantages to mean 0, standard deviation 1 over each set of rollouts"
    )
    gamma: float = option(1.0, "discount of later rewards", most=1)
    lam: float = option(0.95, "lambda of generalised advantage estimation", most=1)
    cliprange: float = option(0.2, "clip range of the policy ratio")
    cliprange_value: float = option(0.2, "clip range of the value function")
    entropy_coef: float = option(0.0, "weight of the policy's entropy, subtracted from its loss")
    unsupervised_dataset_name: str | None = option(
        None, "text to mix pre-training on: a hub name, or a local .txt, .json, .jsonl or .parquet with a text column"
    )
    unsupervised_dataset_config_name: str | None = option(None, "configuration of --unsupervised_dataset_name")
    unsup_coef: float = option(27.8, "weight of the pre-training loss (InstructGPT, equation 2)")
    align_overflow: bool = option(
        False, "fp16: when the gradients of one of actor and critic overflow, neither makes the step"
    )


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """watching and faults"""

    eval_interval: int = option(0, "sets of rollouts between measurements on held-out prompts; 0: none")
    eval_prompts: int = option(64, "held-out prompts that are answered, greedily and sampled")
    per_device_eval_batch_size: int = option(16, "held-out prompts per device and batch")
    enable_test_mode: bool = option(False, "stop after --test_stop_step updates")
    test_stop_step: int = option(0, "updates of a test run")
    save_model: bool = option(False, "in RLHF-TLCR: save the actor", "actor and critic are always saved at the end")
    save_at_final: bool = option(False, "in ReMax: save at the end", "actor and critic are always saved at the end")


@dataclass(frozen=True, kw_only=True)
class ForkOptions:
    """RLHF-TLCR's and ReMax's spellings"""

    actor_bf16: bool = option(False, "--dtype bf16", compatibility=True)
    critic_bf16: bool = option(False, "--dtype bf16", compatibility=True)
    reward_bf16: bool = option(False, "--dtype bf16", compatibility=True)
    disable_actor_dropout: bool = option(False, "--actor_dropout 0, which is the default")
    disable_critic_dropout: bool = option(False, "--critic_dropout 0, which is the default")
    disable_reward_dropout: bool = option(False, "no dropout in scores", "reward models never drop out")
    offload_critic_model: bool = option(False, "offload the critic; as --offload does for both")
    discriminate_reward: bool = option(False, "reward every token by a discriminator: --reward tlcr")
    fixed_reward: bool = option(False, "--reward tlcr_fixed")
    fixed_positive_reward: float = option(1.0, "what tlcr_fixed gives a positive token", least=-1e9)
    fixed_negative_reward: float = option(-1.0, "what tlcr_fixed gives a negative token", least=-1e9)
    random_dense_reward: bool = option(False, "--reward random")
    use_positive_reward_only: bool = option(False, "--reward tlcr_positive_only")
    use_negative_reward_only: bool = option(False, "--reward tlcr_negative_only")
    holistic_reward: bool = option(False, "one reward for the whole response: --reward sequence")
    uni_discriminator_head: bool = option(False, "a discriminator with one head", "every discriminator has one")
    sum_to_one_reward: bool = option(False, "reward from both probabilities", "2D - 1 always is")
    offload_param: bool = option(False, "offload parameters", "the release ignores it too; --offload with ZeRO-3 does")
    custom_template: bool = option(False, "a prompt template", "prompts are used as the data has them")
    normalize_kl: bool = option(False, "in ReMax: scale the KL", "the release ignores it too")
    memory_efficient_linear: bool = option(False, "in ReMax: ZeRO-3's linear layer", "DeepSpeed's default is used")


@dataclass(frozen=True, kw_only=True)
class Options(
    ModelOptions, PPOOptions, PackingOptions, RolloutOptions, DataOptions, WatchOptions, RunOptions, ForkOptions
):
    """Step 3: PPO with a continuous reward on every token."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"save_interval": 100}

    add_eot_token: bool = option(False, "end responses with --eot_token instead of the tokenizer's EOS")
    eot_token: str = option("<|endoftext|>", "the token that --add_eot_token makes the end of a response")
    num_padding_at_beginning: int = option(
        1, "OPT's padding", "masks come from lengths, padding is never counted", least=0
    )
    preprocessing_num_workers: int | None = option(None, "processes", "data is tokenised once, as it is read", least=0)
    compute_fp32_loss: bool = option(False, "loss in fp32", "log-probs and losses are always computed in fp32")

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 or self.actor_bf16 or self.critic_bf16 or self.reward_bf16 else self.dtype

    @property
    def actor_dropout_rate(self) -> float:
        return 0.0 if self.disable_actor_dropout else self.actor_dropout or 0.0

    @property
    def critic_dropout_rate(self) -> float:
        return 0.0 if self.disable_critic_dropout else self.critic_dropout or 0.0

    @property
    def new_eos(self) -> str | None:
        """The end-of-sequence token that --add_eot_token asks for, if it does."""
        return self.eot_token if self.add_eot_token else None

    @property
    def rlmec_judge_model(self) -> str:
        """The sequence reward model that says which answers are right, where it is one."""
        return self.rlmec_judge or self.critic_model_name_or_path

    @property
    def reward_terms(self) -> list[str]:
        """``--reward``, or what the fork's flags ask for in its place."""
        names = {
            "fixed_reward": "tlcr_fixed",
            "use_positive_reward_only": "tlcr_positive_only",
            "use_negative_reward_only": "tlcr_negative_only",
            "random_dense_reward": "random",
            "discriminate_reward": "tlcr",
            "holistic_reward": "sequence",
        }
        asked = self.fork_rewards
        return self.reward if self.reward != ["auto"] or not asked else [names[asked[0]]]

    @property
    def fork_rewards(self) -> list[str]:
        """The forks' flags that were given and choose a reward; more than one where they contradict each other.

        ``--discriminate_reward`` goes with those that say what every token gets, and ``--fixed_reward`` with the one
        part of it that is to stay (``fixed_values``).
        """
        parts = [n for n in ("use_positive_reward_only", "use_negative_reward_only") if getattr(self, n)]
        dense = ["fixed_reward"] if self.fixed_reward and len(parts) < 2 else parts
        dense += ["random_dense_reward"] if self.random_dense_reward else []
        if self.discriminate_reward and not dense:
            dense = ["discriminate_reward"]
        return dense + (["holistic_reward"] if self.holistic_reward else [])

    @property
    def fixed_values(self) -> dict[str, float]:
        """From which certainty on, and what, ``tlcr_fixed`` gives positive and negative tokens."""
        positive = 0.0 if self.fixed_reward and self.use_negative_reward_only else self.fixed_positive_reward
        negative = 0.0 if self.fixed_reward and self.use_positive_reward_only else self.fixed_negative_reward
        return {"threshold": self.fixed_threshold, "positive": positive, "negative": negative}

    @property
    def micro_batches(self) -> int:
        """Training micro-batches in one set of rollouts, per device."""
        return self.rollout_batches * self.per_device_generation_batch_size // self.per_device_training_batch_size

    @property
    def rollout_batches(self) -> int:
        """Generation batches in one set of rollouts: ``--generation_batches``, or as many as an optimiser step needs.

        DeepSpeed-Chat accumulates gradients over several sets. The policy stands still meanwhile, so one larger set is
        the same.
        """
        generated = self.generation_batches * self.per_device_generation_batch_size
        needed = self.gradient_accumulation_steps * self.per_device_training_batch_size
        return self.generation_batches * max(1, needed // generated if needed % generated == 0 else 1)

    @property
    def corrects_rollouts(self) -> bool:
        """Whether servers' log-probs weigh the tokens: ``--rollout_correction``, or what it is where it is unset."""
        wanted = self.rollout_ahead or self.precision != "fp32" if self.rollout_correction is None else None
        return self.rollout_name == "vllm" and bool(wanted or self.rollout_correction == "token")

    @property
    def on_policy(self) -> bool:
        """One optimiser step per rollout, without noise: the policy that learns is the policy that wrote.

        Then the training forward's own log-probs and values are the old ones, and need not be computed twice.
        """
        return (
            self.ppo_epochs == 1
            and self.micro_batches == self.gradient_accumulation_steps
            and self.actor_dropout_rate == self.critic_dropout_rate == 0.0
            and not self.penalty.startswith("full_kl")
            and not self.whiten_advantages
        )


PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "paper": {  # TLCR, section 5 and appendix B
        "actor_learning_rate": 1e-6,
        "critic_learning_rate": 1e-6,
        "num_warmup_steps": 0,
        "lr_scheduler_type": "cosine",
        "kl_ctl": 0.1,
        "max_prompt_seq_len": 256,
        "max_answer_seq_len": 256,
    },
    "deepspeed_chat": {  # its program's defaults
        "actor_learning_rate": 9.65e-6,
        "critic_learning_rate": 5e-6,
        "num_warmup_steps": 100,
        "kl_ctl": 0.1,
        "clip_reward_value": 5.0,
        "gamma": 1.0,
        "lam": 0.95,
        "reward": ["sequence"],
    },
    "remax": {  # its Llama-2 script
        "algo": "remax",
        "actor_learning_rate": 1e-6,
        "actor_weight_decay": 0.1,
        "num_warmup_steps": 0,
        "gamma": 0.99,
        "kl_ctl": 0.05,
        "target_kl": 1.0,
        "top_p": 0.9,
        "reward": ["sequence"],
    },
    "ppo_max": {  # Zheng et al., 2023, its English script; it also has a repetition penalty of 1.1
        "actor_learning_rate": 5e-7,
        "critic_learning_rate": 1.5e-6,
        "num_warmup_steps": 100,
        "kl_ctl": 0.01,
        "normalise_rewards": "scale",
        "clip_reward_value": 1e9,  # only what is scaled may be clipped
        "temperature": 0.8,
        "top_p": 0.9,
        "reward": ["sequence"],
    },
}


def check(options: Options) -> None:
    """Refuse options that cannot work together, before anything loads. Raises ``InputError``."""
    _check_sizes(options)
    _check_rewards(options)
    if options.min_answer_seq_len > options.max_answer_seq_len:
        raise InputError(
            f"--min_answer_seq_len {options.min_answer_seq_len} is above --max_answer_seq_len "
            f"{options.max_answer_seq_len}"
        )
    if options.decode_batch_size % options.per_device_generation_batch_size:
        raise InputError(
            f"--decode_batch_size {options.decode_batch_size} is no multiple of --per_device_generation_batch_size "
            f"{options.per_device_generation_batch_size}"
        )
    if options.unsupervised_dataset_config_name and not options.unsupervised_dataset_name:
        raise InputError("--unsupervised_dataset_config_name: name the data set too, --unsupervised_dataset_name")
    if options.inference_tp_size > 1 and options.actor_zero_stage != 3:
        raise InputError(f"--inference_tp_size {options.inference_tp_size} needs --actor_zero_stage 3")
    if options.only_optimize_lora and not options.actor_lora_dim and not options.critic_lora_dim:
        raise InputError("--only_optimize_lora: there is no LoRA to optimise; give --actor_lora_dim")
    if options.enable_mixed_precision_lora and (options.actor_lora_dim == 0 or options.actor_zero_stage != 3):
        raise InputError("--enable_mixed_precision_lora needs --actor_lora_dim above 0 and --actor_zero_stage 3")
    if options.algo == "remax" and options.whiten_advantages:
        raise InputError("--whiten_advantages: ReMax's advantages are differences from the greedy response's reward")
    _check_servers(options)
    if options.rollout_name == "continuous" and options.actor_zero_stage == 3:
        raise InputError("--rollout continuous: needs whole weights on every device, so --actor_zero_stage 0, 1 or 2")
    if options.rollout_name == "continuous" and options.min_answer_seq_len:
        raise InputError("--rollout continuous: transformers' continuous batching has no minimum length")


def _check_servers(options: Options) -> None:
    """Refuse options of vLLM servers that cannot work together."""
    if (options.rollout_name == "vllm") != bool(options.vllm_server):
        raise InputError("--rollout vllm and --vllm_server URL go together: give both, or neither")
    for url in options.vllm_server:
        check_base_url(url, "--vllm_server")
        if url.rstrip("/").endswith("/v1"):
            raise InputError(f"--vllm_server {url}: leave /v1 out; give it like http://127.0.0.1:8000")
    if len(set(options.vllm_server)) < len(options.vllm_server):
        raise InputError("--vllm_server: an address is given twice")
    if options.rollout_ahead and (options.rollout_name != "vllm" or options.algo != "ppo"):
        raise InputError("--rollout_ahead 1 needs --rollout vllm and --algo ppo")
    if options.rollout_ahead and options.rollout_correction == "off":
        raise InputError("--rollout_ahead 1 learns from answers of an older policy: not with --rollout_correction off")


def _check_rewards(options: Options) -> None:
    """Refuse flags of the forks that ask for several rewards at once, and settings of what is not there."""
    if options.clip_normalised_reward is not None and options.normalise_rewards == "off":
        raise InputError("--clip_normalised_reward: nothing is normalised; give --normalise_rewards scale or whiten")
    if options.critic_warmup_steps and options.algo == "remax":
        raise InputError("--critic_warmup_steps: ReMax has no critic")
    asked = options.fork_rewards
    if asked and options.reward != ["auto"]:
        raise InputError(f"--reward and --{asked[0]} both say what the reward is; keep one of them")
    if len(asked) > 1:
        raise InputError(
            f"--{' and --'.join(asked)} ask for different rewards; name what is to be summed with --reward, as in "
            "--reward tlcr:PATH@1.0 sequence:PATH@0.2"
        )


def _check_sizes(options: Options) -> None:
    """Refuse batch sizes that do not divide."""
    generation, training = options.per_device_generation_batch_size, options.per_device_training_batch_size
    if generation % training:
        raise InputError(
            f"--per_device_generation_batch_size {generation} is no multiple of --per_device_training_batch_size "
            f"{training}: some rollouts would be left over"
        )
    if options.micro_batches % options.gradient_accumulation_steps:
        raise InputError(
            f"{options.micro_batches} micro-batches in a set of rollouts (--generation_batches "
            f"{options.generation_batches} x --per_device_generation_batch_size {generation} / "
            f"--per_device_training_batch_size {training}) are neither a multiple nor a divisor of "
            f"--gradient_accumulation_steps {options.gradient_accumulation_steps}"
        )


def _words(value: Any) -> str:
    return (
        " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if type(value) is float else str(value)
    )


def parse_args(argv: Sequence[str] | None = None) -> Options:
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--preset", default="none")
    preset = PRESETS.get(peek.parse_known_args(argv)[0].preset, {})
    options = parse(Options, argv, preset)
    if preset and os.environ.get("LOCAL_RANK", "0") == "0":
        chosen = " ".join(f"--{name} {_words(getattr(options, name))}" for name in preset)
        print(f"--preset {options.preset}: {chosen}", flush=True)
    # A generation batch is cut into training micro-batches: larger ones than itself there are none, as in
    # DeepSpeed-Chat, whose default of 16 goes with any size of generation batch.
    training = min(options.per_device_training_batch_size, options.per_device_generation_batch_size)
    options = replace(options, per_device_training_batch_size=training)
    check(options)
    return options
