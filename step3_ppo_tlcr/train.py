"""Step 3 on every rank: models, prompts, steps, results."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.checkpoints import Checkpoints, fingerprint, same_command
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import (
    embedding_rows,
    label_count,
    require_attention,
    require_positions,
    token_aggregate,
    trained_positions,
)
from deepspeed_chat_tlcr.runtime import Preemption, Runtime
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, require_same_tokenizer
from deepspeed_chat_tlcr.training import warn_of_warmup
from step3_ppo_tlcr.engines import load_reference, train_actor, train_critic
from step3_ppo_tlcr.heldout import HeldOut
from step3_ppo_tlcr.models import Models
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.ppo import PPO
from step3_ppo_tlcr.pretraining import Pretraining, load_blocks
from step3_ppo_tlcr.prompts import load_prompts, load_references, require_a_set, set_size
from step3_ppo_tlcr.remax import ReMax
from step3_ppo_tlcr.reward_models import RewardSum, scores_sequences
from step3_ppo_tlcr.rewards import REWARDS, RewardSpec, load_function, parse_rewards
from step3_ppo_tlcr.rollout import make_rollouts
from step3_ppo_tlcr.run import Run, sets_by_step, step_to_continue
from step3_ppo_tlcr.scores import action_logits
from step3_ppo_tlcr.servers import Servers
from step3_ppo_tlcr.trainer import Trainer

if TYPE_CHECKING:
    from step3_ppo_tlcr.span_critic import SpanCritic

ALGORITHMS = {"ppo": PPO, "remax": ReMax}


def reward_specs(options: Options) -> list[RewardSpec]:
    """The terms of ``--reward``; ``auto`` looks at the critic checkpoint's labels."""
    critic = options.critic_model_name_or_path
    if options.reward_terms != ["auto"]:
        return parse_rewards(options.reward_terms, critic)
    names = {2: "tlcr", 1: "token_scores" if token_aggregate(critic) else "sequence"}
    labels = label_count(critic)
    if labels not in names:
        raise InputError(
            f"--critic_model_name_or_path {critic!r} is neither a discriminator nor a reward model, so --reward auto "
            "finds no reward in it; train one with step2_discriminator/main.py or name one with --reward"
        )
    return parse_rewards([names[labels]], critic)


def require_rewards(specs: Sequence[RewardSpec]) -> None:
    """Raise ``InputError``, before a model is loaded, for a function or model that is not what its term needs."""
    what = {1: "a sequence reward model (1 label)", 2: "a discriminator (a token classifier with 2 labels)"}
    for spec in specs:
        if spec.name == "python":
            load_function(spec.path)
            continue
        needed = REWARDS[spec.name]
        if spec.model is None:
            continue
        if needed.rewrites:
            if label_count(spec.path) is not None:
                raise InputError(f"--reward {spec.name}: {spec.path!r} is not a language model of step2_grm/main.py")
            continue
        labels = label_count(spec.path)
        if labels != needed.labels:
            found = f"{labels or 'no'} label" + "s" * (labels != 1)
            raise InputError(f"--reward {spec.name}: {spec.path!r} is not {what[needed.labels]}: it has {found}")
        if needed.of_tokens != bool(token_aggregate(spec.path)):
            other = "a model of --objective token_pairs" if needed.of_tokens else what[1]
            raise InputError(f"--reward {spec.name}: {spec.path!r} is not {other}")


def require_judge(options: Options, specs: Sequence[RewardSpec]) -> None:
    """Raise ``InputError`` where RLMEC has nothing that tells right answers from wrong ones."""
    if options.rlmec_judge == "number" or not any(spec.name == "rlmec" for spec in specs):
        return
    path = options.rlmec_judge_model
    if label_count(path) != 1 or token_aggregate(path):
        raise InputError(
            f"--reward rlmec: {path!r} is not a sequence reward model, which would tell right answers from wrong ones; "
            "name one with --rlmec_judge, or number where answers end in numbers"
        )


def span_critic_of(specs: Sequence[RewardSpec], options: Options, runtime: Runtime) -> "SpanCritic | None":
    """The chat model of ``--reward critic:MODEL``, if there is one, asked a first question.

    Raises ``InputError`` where it does not answer, for two of them, and for a threshold of scores that nothing gives.
    """
    models = list(dict.fromkeys(spec.path for spec in specs if spec.name == "critic"))
    if not models:
        return None
    if len(models) > 1:
        raise InputError(f"--reward: {' and '.join(models)} both mark spans; name one chat model")
    if options.span_threshold is not None and not any(map(scores_sequences, specs)):
        raise InputError("--span_threshold: is of a sequence reward model's score; add one to --reward, sequence:PATH")
    from step3_ppo_tlcr.span_critic import SpanCritic  # brings openai, which no other reward needs

    return SpanCritic(models[0], options, runtime)


def sets_of(options: Options, runtime: Runtime, prompts: Sequence[list[int]]) -> int:
    """Sets of rollouts of a whole run."""
    return len(prompts) // set_size(options, runtime) * options.num_train_epochs


def updates_of(options: Options, runtime: Runtime, prompts: Sequence[list[int]]) -> int:
    """Optimiser steps of a whole run."""
    per_set = options.ppo_epochs * options.micro_batches // options.gradient_accumulation_steps
    return sets_of(options, runtime, prompts) * per_set


def build(
    options: Options,
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    specs: Sequence[RewardSpec],
    span_critic: "SpanCritic | None" = None,
    servers: Servers | None = None,
) -> Trainer:
    """Load every model and make the trainer of ``--algo``."""
    sets, updates = sets_of(options, runtime, prompts), updates_of(options, runtime, prompts)
    if options.critic_warmup_steps >= sets:
        raise InputError(f"--critic_warmup_steps {options.critic_warmup_steps}: the run has {sets} sets of rollouts")
    actor = train_actor(options, runtime, updates - updates // sets * options.critic_warmup_steps)
    critic = train_critic(options, runtime, updates, specs) if options.algo == "ppo" else None
    rewrites = any(REWARDS[spec.name].rewrites for spec in specs if spec.model)
    references = load_references(options, tokenizer) if rewrites else None
    models = Models(
        actor=actor,
        critic=critic,
        reference=load_reference(options, runtime),
        reward=RewardSum(specs, tokenizer, options, runtime, critic, span_critic, references, sets),
    )

    @torch.no_grad()
    def trained_logits(rollout):
        models.actor.train()
        return action_logits(models.actor, rollout)

    rollouts = make_rollouts(options, runtime, models.actor, tokenizer, prompts, trained_logits, servers)
    pretraining = None
    if options.unsupervised_dataset_name:
        pretraining = Pretraining(load_blocks(options, tokenizer), options, runtime.rank, runtime.world_size)
    return ALGORITHMS[options.algo](options, models, rollouts, tokenizer, pretraining)


def train(options: Options, runtime: Runtime) -> None:
    """Step 3's work on every rank."""

    # ---- what it starts from: each model looked at before any is loaded ----
    require_attention(options.attn_implementation, runtime.dtype)
    specs = reward_specs(options)
    require_rewards(specs)
    require_judge(options, specs)
    tokenizer = common_tokenizer(options, specs)
    preemption = Preemption()

    # ---- prompts, and how far an earlier start of this command came ----
    prompts = load_prompts(options, tokenizer, runtime)
    require_a_set(prompts, options, runtime)
    held_out_prompts = load_prompts(options, tokenizer, runtime, "eval") if options.eval_interval else []
    checkpoints = Checkpoints(Path(options.output_dir) / "checkpoints", options.save_total_limit)
    known_by = fingerprint(prompts)
    done = step_to_continue(checkpoints, options, known_by, runtime)
    sets = len(prompts) // set_size(options, runtime)
    steps = sets * options.num_train_epochs
    warn_of_warmup(options, runtime, updates_of(options, runtime, prompts))
    last_step = min(steps, options.test_stop_step) if options.enable_test_mode else steps

    servers = Servers(options, runtime) if options.rollout_name == "vllm" else None

    # ---- models ----
    trainer = build(options, runtime, tokenizer, prompts, specs, span_critic_of(specs, options, runtime), servers)
    runtime.seed(options.seed)
    run = Run(options, runtime, trainer, checkpoints, done, known_by)
    held_out = HeldOut(held_out_prompts, trainer, runtime, run.done) if options.eval_interval else None
    before = held_out.measure(0) if held_out and run.done == 0 else {}

    # ---- steps ----
    begun = time.monotonic()
    if before and run.log is not None:
        run.log.write(0, before)
    with tqdm(
        total=last_step, initial=run.done, desc=options.algo.upper(), dynamic_ncols=True, disable=not runtime.is_main
    ) as bar:
        every, chosen = options.save_interval or sets, sets_by_step(prompts, options, runtime)
        metrics, step = run.steps(held_out, chosen, last_step, preemption, bar, every)
    if preemption.heeded:
        at = f"after step {step} of {last_step}"
        runtime.say(f"stopped {at}, all saved; resume with {same_command(options)}")
        return

    # ---- results, last: what has them is finished ----
    if runtime.is_main and not metrics:  # killed while it saved the models, after the last step
        metrics = read_metrics(Path(options.output_dir) / "metrics.jsonl")[-1]
    last = {k: v for k, v in metrics.items() if k != "step" and v is not None and math.isfinite(v)}
    seconds = round(time.monotonic() - begun, 1)
    results = {"stage": options.algo, "steps": step, "seconds": seconds, "prompts": len(prompts), **last}
    run.save_models(results)
    if runtime.is_main:
        write_json(Path(options.output_dir) / "results.json", results)
        run.log.close()
    run.checkpoints.remove()
    runtime.say(f"{options.algo.upper()}: {step} steps; models saved in {options.output_dir}")


def common_tokenizer(options: Options, specs: Sequence[RewardSpec]) -> PreTrainedTokenizerFast:
    """The actor's tokenizer. Raises ``InputError`` where another model reads other tokens, or not so many."""
    rows = embedding_rows(options.actor_model_name_or_path)
    tokenizer = load_tokenizer(options.actor_model_name_or_path, options.new_eos, rows)
    others = {options.critic_model_name_or_path: "critic"}
    if options.reference_model_name_or_path:
        others[options.reference_model_name_or_path] = "reference model"
    judges = {spec.model: "reward model" for spec in specs if spec.model and not REWARDS[spec.name].rewrites}
    if options.rlmec_judge not in (None, "number"):
        judges[options.rlmec_judge] = "reward model"
    if options.reward_tokenizer == "same":
        others |= judges
    longest = options.max_prompt_seq_len + options.max_answer_seq_len
    for path in (options.actor_model_name_or_path, *others):
        require_positions(path, longest, "--max_prompt_seq_len + --max_answer_seq_len")
        if (known := trained_positions(path)) and options.max_answer_seq_len > known:
            raise InputError(
                f"--max_answer_seq_len {options.max_answer_seq_len}: {path} was trained for {known} positions, prompt "
                "included"
            )
    for path, role in others.items():
        own = "--reward_tokenizer own lets it read answers by its own" if path in judges else None
        require_same_tokenizer(tokenizer, load_tokenizer(path, options.new_eos), role, own)
        if embedding_rows(path) < rows:
            raise InputError(
                f"{path} has embeddings for {embedding_rows(path)} tokens, the actor for {rows}: it could write tokens "
                "that have none there; train both from one model (SFT makes room for added tokens)"
            )
    return tokenizer
