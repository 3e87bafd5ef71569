"""What a run of step 3 keeps: metrics, answers, checkpoints, models, and the line in the terminal."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deepspeed_chat_tlcr.arguments import record
from deepspeed_chat_tlcr.checkpoints import (
    OTHER_DATA,
    Checkpoints,
    changed_settings,
    generator_states,
    restore_generators,
)
from deepspeed_chat_tlcr.errors import RunError
from deepspeed_chat_tlcr.finite import weights_are_finite
from deepspeed_chat_tlcr.metrics import MetricsLog, StepLines
from deepspeed_chat_tlcr.model_card import Card
from deepspeed_chat_tlcr.runtime import Preemption, Runtime
from deepspeed_chat_tlcr.saving import save_model
from step3_ppo_tlcr.faults import TooManyFaults
from step3_ppo_tlcr.heldout import HeldOut
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.prompts import prompt_sets
from step3_ppo_tlcr.servers import ServerError
from step3_ppo_tlcr.trainer import Trainer


def line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """What the terminal shows of one update."""

    def shown(name: str, form: str) -> str:
        return format(metrics.get(name, math.nan), form)

    text = (
        f"{step:>5}/{steps}  reward/token {shown('reward/per_token', '+.3f')}  KL {shown('policy/kl', '.2f')}  "
        f"length {shown('rollout/response_length', '.1f')}  EOS {shown('rollout/eos_rate', '.2f')}  "
        f"entropy {shown('policy/entropy', '.2f')}  V loss {shown('value/loss', '.4f')}  "
        f"{sum(value for key, value in metrics.items() if key.startswith('seconds/')):.1f} s"
    )
    return text + ("  NOT FINITE, skipped" if metrics["faults/skipped"] else "")


def answer_lines(step: int, trainer: Trainer) -> Iterator[dict]:
    """The newest step's answers on this rank, for ``answers.jsonl``."""
    for experience in trainer.experiences:
        rollout = experience.rollout
        for row, length in enumerate(rollout.action_mask.sum(1).tolist()):
            ids = rollout.input_ids[row][rollout.attention_mask[row] > 0].tolist()
            prompt = trainer.tokenizer.decode(ids[: len(ids) - length])
            answer = trainer.tokenizer.decode(ids)[len(prompt) :]
            reward = float((experience.rewards[row] * rollout.action_mask[row]).sum())
            yield {"step": step, "prompt": prompt, "answer": answer, "reward": reward}


def sets_by_step(
    prompts: Sequence[list[int]], options: Options, runtime: Runtime
) -> Iterator[tuple[int, list[list[int]]]]:
    """``(step, this rank's prompts)`` of all epochs, steps from 1."""
    step = 0
    for epoch in range(options.num_train_epochs):
        for chosen in prompt_sets(prompts, options, runtime, epoch):
            step += 1
            yield step, chosen


def with_next(
    sets: Iterator[tuple[int, list[list[int]]]], ahead: int
) -> Iterator[tuple[tuple[int, list[list[int]]], list[list[int]] | None]]:
    """Each set with the next one's prompts: None for the last, and without ``--rollout_ahead``."""
    if not ahead:
        yield from ((one, None) for one in sets)
        return
    for one, following in pairwise(chain(sets, [(0, None)])):
        yield one, following[1]


def step_to_continue(checkpoints: Checkpoints, options: Options, prompts: str, runtime: Runtime) -> int:
    """Step of the newest checkpoint, 0 where there is none or ``--resume never``; says what was otherwise then.

    ``prompts`` is the ``fingerprint`` of the prompts. Raises ``InputError``, before a model is loaded, for settings or
    a number of ranks with which the checkpoint does not fit.
    """
    saved = checkpoints.steps() if options.resume == "auto" else []
    if not saved:
        return 0
    state = checkpoints.state(saved[-1])
    changes = changed_settings(state["options"], options, checkpoints.folder / f"step-{saved[-1]}")
    runtime.say(f"continuing from step {saved[-1]}")
    for change in changes:
        runtime.say(f"warning: continuing with another setting than before: {change}")
    if state.get("prompts") not in (None, prompts):
        runtime.say(OTHER_DATA)
    return saved[-1]


class Run:
    """What a run keeps on disk: metrics, answers, checkpoints, models.

    ``done``: the step to continue from, 0 for a new run; ``prompts``: the fingerprint of its prompts.
    """

    def __init__(
        self, options: Options, runtime: Runtime, trainer: Trainer, checkpoints: Checkpoints, done: int, prompts: str
    ):
        self.options, self.runtime, self.trainer = options, runtime, trainer
        self.checkpoints, self.done, self.prompts = checkpoints, done, prompts
        self.folder = Path(options.output_dir)
        if options.resume == "never":
            checkpoints.remove()  # an older run's: the newest of them would be taken for this one's
        if done:
            averages = checkpoints.load(done, trainer.models.engines)
            trainer.restore(checkpoints.state(done)["trainer"], averages)
        self.log = None
        if runtime.is_main:
            settings = asdict(options)
            record(options, self.folder)
            self.log = MetricsLog(
                self.folder, self.done, options.tensorboard_folder, options.report_to, settings=settings
            )
        self.answers = None
        if options.save_answers:
            self.answers = StepLines(self.folder / f"answers-{runtime.rank}.jsonl", self.done)

    def save(self, step: int) -> None:
        """A resumable checkpoint; a collective."""
        averages = self.trainer.average.averages if self.trainer.average else {}
        state = {"trainer": self.trainer.state(), "options": asdict(self.options), "prompts": self.prompts}
        self.checkpoints.save(step, self.trainer.models.engines, state, averages)

    def write(self, step: int, last_step: int, metrics: dict[str, float], bar: tqdm) -> None:
        """One step's metrics to every log and a line to the terminal; answers where they are asked for."""
        if self.answers is not None:
            self.answers.write(*answer_lines(step, self.trainer))
        if self.log is None:
            return
        self.log.write(step, metrics)
        bar.write(line(step, last_step, metrics))
        if self.options.print_answers and step % self.options.print_answers_interval == 0:
            shown = next(answer_lines(step, self.trainer), None)
            bar.write(shown["prompt"] + shown["answer"] if shown else "")

    def steps(
        self,
        held_out: HeldOut | None,
        sets: Iterator[tuple[int, list[list[int]]]],
        last_step: int,
        preemption: Preemption,
        bar: tqdm,
        save_interval: int,
    ) -> tuple[dict[str, float], int]:
        """All steps that are still to be made, a checkpoint every ``save_interval`` of them and at the last one.

        Returns that one's metrics and number. Ends early on request (then a checkpoint is saved and
        ``preemption.heeded``), where ReMax passes ``--target_kl``, and with ``RunError`` after too many faults.
        """
        options, trainer, metrics, step = self.options, self.trainer, {}, self.done
        for (number, chosen), upcoming in with_next(sets, options.rollout_ahead):
            if number <= self.done:
                continue
            if number > last_step:
                break
            step, whole, states = number, number - 1, generator_states()
            try:
                metrics = trainer.step(chosen, upcoming if number < last_step else None)
                whole, states = step, generator_states()
                if held_out and (step % options.eval_interval == 0 or step == last_step):
                    metrics |= held_out.measure(step)
            except TooManyFaults:
                self.give_up(step)
            except ServerError as error:
                restore_generators(states)
                if whole:
                    self.save(whole)
                kept = f"a checkpoint of step {whole} is saved" if whole else "nothing was learned yet"
                raise RunError(f"{error}; {kept}; the same command continues once the servers are back") from None
            self.write(step, last_step, metrics, bar)
            bar.update()
            limit = options.target_kl if options.algo == "remax" and options.target_kl else math.inf
            measured = "eval/policy/kl_per_token" if held_out else "policy/kl_per_token"
            ended = step == last_step or metrics.get(measured, 0) > limit
            stopping = step < last_step and preemption.agreed(trainer.device)
            # Also before the models are saved: whatever happens meanwhile, nothing has to be trained again.
            if stopping or ended or step % save_interval == 0:
                self.save(step)
            if ended and step < last_step:
                self.runtime.say(f"step {step}: {measured} is above --target_kl {options.target_kl}; the run ends here")
                break
            if stopping:
                preemption.heeded = True
                break
        return metrics, step

    def save_models(self, results: dict[str, Any]) -> None:
        """The trained models as Hugging Face folders; a collective. ``results``: what results.json will hold."""
        trainer, options = self.trainer, self.options
        policy = Card(options.algo, options.actor_model_name_or_path, options, results)
        cards = {"actor": policy, "critic": Card("critic", options.critic_model_name_or_path, options)}
        for role, engine in trainer.models.engines.items():
            decoding = trainer.decoding if role == "actor" else None
            save_model(engine, trainer.tokenizer, self.folder / role, cards[role], decoding)
        if trainer.average is not None:
            with trainer.average.in_place():
                folder = self.folder / "actor_ema"
                save_model(trainer.models.actor, trainer.tokenizer, folder, policy, trainer.decoding)

    def give_up(self, step: int) -> None:
        """Stop a run that makes nothing but NaN, keeping what is needed to find out why."""
        batch = self.trainer.faults.save_batch(self.folder)
        kept = self.checkpoints.steps()[-1:]
        saved = f"step-{kept[0]}" if kept else "none"
        if weights_are_finite(self.trainer.models.engines.values(), self.trainer.device):
            self.save(step)
            saved = f"step-{step}"
        raise RunError(
            f"step {step}: {self.options.max_faults} updates in a row had a loss, reward or weight that is not finite; "
            f"the newest batch is in {batch}, the newest whole checkpoint is {saved}. Lower the learning rates, use "
            "bf16 or fp32, or look for what the reward makes of this batch"
        )
