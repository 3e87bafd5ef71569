"""Step 3: PPO in which every generated token has its own continuous reward (paper 4.3).

deepspeed step3_ppo_tlcr/main.py --actor_model_name_or_path SFT --critic_model_name_or_path DISCRIMINATOR \\
    --reward tlcr --data_path DATA --output_dir OUTPUT
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.arguments import announce, parse
from deepspeed_chat_tlcr.checkpoints import Checkpoints, fingerprint, is_finished, same_command
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.hub import finish, require_repository
from deepspeed_chat_tlcr.metrics import read_metrics, require_trackers
from deepspeed_chat_tlcr.models import embedding_rows, label_count, require_positions
from deepspeed_chat_tlcr.runtime import Preemption, Runtime
from deepspeed_chat_tlcr.saving import require_writable, write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, require_same_tokenizer
from step3_ppo_tlcr.engines import Models, RewardSum, action_logits, load_reference, train_actor, train_critic
from step3_ppo_tlcr.faults import TooManyFaults
from step3_ppo_tlcr.heldout import HeldOut
from step3_ppo_tlcr.options import Options, check
from step3_ppo_tlcr.ppo import PPO
from step3_ppo_tlcr.pretraining import Pretraining, load_blocks
from step3_ppo_tlcr.prompts import load_prompts, prompt_sets, require_a_set, set_size
from step3_ppo_tlcr.remax import ReMax
from step3_ppo_tlcr.rewards import REWARDS, RewardSpec, load_function, parse_rewards
from step3_ppo_tlcr.rollout import make_rollouts
from step3_ppo_tlcr.run import Run, step_to_continue
from step3_ppo_tlcr.trainer import Trainer

ALGORITHMS = {"ppo": PPO, "remax": ReMax}


def parse_args(argv: Sequence[str] | None = None) -> Options:
    options = parse(Options, argv)
    # A generation batch is cut into training micro-batches: larger ones than itself there are none, as in
    # DeepSpeed-Chat, whose default of 16 goes with any size of generation batch.
    training = min(options.per_device_training_batch_size, options.per_device_generation_batch_size)
    return replace(options, per_device_training_batch_size=training)


def reward_specs(options: Options) -> list[RewardSpec]:
    """The terms of ``--reward``; ``auto`` looks at the critic checkpoint's labels."""
    critic = options.critic_model_name_or_path
    if options.reward_terms != ["auto"]:
        return parse_rewards(options.reward_terms, critic)
    names = {2: "tlcr", 1: "sequence"}
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
        elif spec.path is not None and (labels := label_count(spec.path)) != (needed := REWARDS[spec.name].labels):
            found = f"{labels or 'no'} label" + "s" * (labels != 1)
            raise InputError(f"--reward {spec.name}: {spec.path!r} is not {what[needed]}: it has {found}")


def build(
    options: Options,
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    specs: Sequence[RewardSpec],
) -> Trainer:
    """Load every model and make the trainer of ``--algo``."""
    sets = len(prompts) // set_size(options, runtime) * options.num_train_epochs
    updates = sets * options.ppo_epochs * options.micro_batches // options.gradient_accumulation_steps
    actor = train_actor(options, runtime, updates)
    critic = train_critic(options, runtime, updates) if options.algo == "ppo" else None
    models = Models(
        actor=actor,
        critic=critic,
        reference=load_reference(options, runtime),
        reward=RewardSum(specs, tokenizer, options, runtime, critic),
    )

    @torch.no_grad()
    def trained_logits(rollout):
        models.actor.train()
        return action_logits(models.actor, rollout)

    rollouts = make_rollouts(options, runtime, models.actor, tokenizer, prompts, trained_logits)
    pretraining = None
    if options.unsupervised_dataset_name:
        pretraining = Pretraining(load_blocks(options, tokenizer), options, runtime.rank, runtime.world_size)
    return ALGORITHMS[options.algo](options, models, rollouts, tokenizer, pretraining)


def sets_by_step(
    prompts: Sequence[list[int]], options: Options, runtime: Runtime
) -> Iterator[tuple[int, list[list[int]]]]:
    """``(step, this rank's prompts)`` of all epochs, steps from 1."""
    step = 0
    for epoch in range(options.num_train_epochs):
        for chosen in prompt_sets(prompts, options, runtime, epoch):
            step += 1
            yield step, chosen


def train(
    run: Run,
    held_out: HeldOut | None,
    sets: Iterator[tuple[int, list[list[int]]]],
    last_step: int,
    preemption: Preemption,
    bar: tqdm,
    save_interval: int,
) -> tuple[dict[str, float], int]:
    """All steps that are still to be made, a checkpoint every ``save_interval`` of them and at the last one; returns
    that one's metrics and number.

    Ends early on SIGTERM (then a checkpoint is saved and ``preemption.heeded``), where ReMax passes ``--target_kl``,
    and with ``RunError`` after too many faults.
    """
    options, trainer, metrics, step = run.options, run.trainer, {}, run.done
    for number, chosen in sets:
        if number <= run.done:
            continue
        if number > last_step:
            break
        step = number
        try:
            metrics = trainer.step(chosen)
        except TooManyFaults:
            run.give_up(step)
        if held_out and (step % options.eval_interval == 0 or step == last_step):
            metrics |= held_out.measure(step)
        run.write(step, last_step, metrics, bar)
        bar.update()
        limit = options.target_kl if options.algo == "remax" and options.target_kl else math.inf
        measured = "eval/policy/kl_per_token" if held_out else "policy/kl_per_token"
        ended = step == last_step or metrics.get(measured, 0) > limit
        stopping = step < last_step and preemption.agreed(trainer.device)
        # Also before the models are saved: whatever happens meanwhile, nothing has to be trained again.
        if stopping or ended or step % save_interval == 0:
            run.save(step)
        if ended and step < last_step:
            run.runtime.say(f"step {step}: {measured} is above --target_kl {options.target_kl}; the run ends here")
            break
        if stopping:
            preemption.heeded = True
            break
    return metrics, step


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    check(options)
    require_trackers(options.report_to)
    require_writable(options.output_dir)
    require_repository(options)
    specs = reward_specs(options)
    require_rewards(specs)
    longest = options.max_prompt_seq_len + options.max_answer_seq_len
    for path in {options.actor_model_name_or_path, options.critic_model_name_or_path}:
        require_positions(path, longest, "--max_prompt_seq_len + --max_answer_seq_len")
    runtime = runtimes.start(options.precision, options.seed)
    if is_finished(options, runtime):
        finish(options, runtime)
        return
    preemption = Preemption()
    if runtime.is_main:
        announce(options, options.output_dir)

    rows = embedding_rows(options.actor_model_name_or_path)
    tokenizer = load_tokenizer(options.actor_model_name_or_path, options.new_eos, rows)
    require_same_tokenizer(tokenizer, load_tokenizer(options.critic_model_name_or_path, options.new_eos), "critic")
    if options.reference_model_name_or_path:
        reference = load_tokenizer(options.reference_model_name_or_path, options.new_eos)
        require_same_tokenizer(tokenizer, reference, "reference model")
    scored_by = [spec.path for spec in specs if spec.name != "python" and spec.path]
    others = [options.critic_model_name_or_path, options.reference_model_name_or_path, *scored_by]
    for path in filter(None, others):
        if embedding_rows(path) < rows:
            raise InputError(
                f"{path} has embeddings for {embedding_rows(path)} tokens, the actor for {rows}: it could write tokens "
                "that have none there; train both from one model (SFT makes room for added tokens)"
            )
    prompts = load_prompts(options, tokenizer, runtime)
    require_a_set(prompts, options, runtime)
    held_out_prompts = load_prompts(options, tokenizer, runtime, "eval") if options.eval_interval else []
    checkpoints = Checkpoints(Path(options.output_dir) / "checkpoints", options.save_total_limit)
    known_by = fingerprint(prompts)
    done = step_to_continue(checkpoints, options, known_by, runtime)
    sets = len(prompts) // set_size(options, runtime)
    steps = sets * options.num_train_epochs
    last_step = min(steps, options.test_stop_step) if options.enable_test_mode else steps

    trainer = build(options, runtime, tokenizer, prompts, specs)
    runtime.seed(options.seed)
    run = Run(options, runtime, trainer, checkpoints, done, known_by)
    held_out = HeldOut(held_out_prompts, trainer, runtime, run.done) if options.eval_interval else None
    before = held_out.measure(0) if held_out and run.done == 0 else {}

    begun = time.monotonic()
    if before and run.log is not None:
        run.log.write(0, before)
    with tqdm(
        total=last_step, initial=run.done, desc=options.algo.upper(), dynamic_ncols=True, disable=not runtime.is_main
    ) as bar:
        every = options.save_interval or sets
        metrics, step = train(run, held_out, sets_by_step(prompts, options, runtime), last_step, preemption, bar, every)
    if preemption.heeded:
        at = f"after step {step} of {last_step}"
        runtime.say(f"stopped by SIGTERM {at}, all saved; resume with {same_command(options)}")
        runtime.finish()
        return

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
    finish(options, runtime)


if __name__ == "__main__":
    main()
    runtimes.leave()
