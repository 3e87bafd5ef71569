"""Held-out prompts, answered by the policy greedily and sampled: measures, and a page of samples by step."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from deepspeed_chat_tlcr.checkpoints import generator_states, restore_generators
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import StepLines, read_metrics
from deepspeed_chat_tlcr.pictures import Sample, TokenScores, join, legend_html, sample_html, token_strings, write_page
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.turns import end_ids
from step3_ppo_tlcr.averages import Averages
from step3_ppo_tlcr.experience import Experience, Rollout
from step3_ppo_tlcr.measures import finished, measure_policy, measure_rollout
from step3_ppo_tlcr.scores import action_logits
from step3_ppo_tlcr.trainer import Trainer

SHOWN = 4  # prompts whose answers the page shows at every measurement
MODES = {"sampled": "eval/", "greedy": "eval_greedy/"}


class HeldOut:
    """The held-out prompts of this rank, and the page; every rank has equally many, so that none waits for ever."""

    def __init__(self, prompts: Sequence[list[int]], trainer: Trainer, runtime: Runtime, resume_step: int):
        self.trainer, self.runtime, options = trainer, runtime, trainer.options
        count = min(options.eval_prompts, len(prompts)) // runtime.world_size * runtime.world_size
        if count == 0:
            raise InputError(f"{len(prompts)} held-out prompts are fewer than {runtime.world_size} rank(s)")
        self.prompts = prompts[runtime.rank : count : runtime.world_size]
        self.folder = Path(options.output_dir)
        self.lines = StepLines(self.folder / "samples.jsonl", resume_step) if runtime.is_main else None

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """Metrics over all ranks, ``eval/…`` of sampled and ``eval_greedy/…`` of greedy answers; renews the page.

        The same random numbers at every step, and those of training are left as they were.
        """
        states = generator_states()
        averages = Averages(self.trainer.device)
        shown: list[dict[str, Any]] = []
        for engine in self.trainer.models.engines.values():
            engine.eval()
        for mode, prefix in MODES.items():
            self.trainer.models.reward.begin()
            set_seed(self.trainer.options.seed + self.runtime.rank)
            for rollout in self._answers(0.0 if mode == "greedy" else self.trainer.options.temperature):
                rewards, terms = self._score(rollout, averages, prefix)
                if len([line for line in shown if line["mode"] == mode]) < SHOWN:
                    shown += self._shown(step, mode, rollout, rewards, terms)
        restore_generators(states)
        metrics = finished(averages.reduce())
        if self.lines is not None:
            order = sorted(shown, key=lambda line: line["prompt"])
            self.lines.write(*order)
            write_samples(self.lines.path, self.folder / "samples.html")
        return metrics

    def _answers(self, temperature: float) -> Iterator[Rollout]:
        size = self.trainer.options.per_device_eval_batch_size
        for begin in range(0, len(self.prompts), size):
            yield from self.trainer.generate(self.prompts[begin : begin + size], temperature)

    def _score(self, rollout: Rollout, averages: Averages, prefix: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        trainer = self.trainer
        rewards, terms = trainer.models.reward(rollout)
        ref_logprobs = trainer.whole_logprobs(trainer.models.reference_logits(rollout), rollout)
        logits = action_logits(trainer.models.actor, rollout)
        experience = Experience(
            rollout,
            rewards,
            ref_logprobs,
            old_logprobs=trainer.logprobs(logits, rollout),
            whole_logprobs=trainer.whole_logprobs(logits, rollout),
        )
        measure_rollout(experience, terms, end_ids(trainer.tokenizer), averages, prefix)
        measure_policy(experience, averages, prefix)
        averages.add(f"{prefix}policy/entropy", trainer.entropy(logits, rollout), rollout.action_mask)
        return rewards, terms

    def _shown(
        self, step: int, mode: str, rollout: Rollout, rewards: torch.Tensor, terms: dict[str, torch.Tensor]
    ) -> list[dict[str, Any]]:
        """The first rows of a rollout as lines of samples.jsonl."""
        lines = []
        values = next((term for name, term in terms.items() if name.startswith("tlcr")), rewards)
        kind = "reward" if any(name.startswith("tlcr") for name in terms) else "value"
        for row in range(min(SHOWN, len(values))):
            ids = rollout.input_ids[row][rollout.attention_mask[row] > 0].tolist()
            length = int(rollout.action_mask[row].sum())
            strings = token_strings(self.trainer.tokenizer, ids)
            lines.append(
                {
                    "step": step,
                    "mode": mode,
                    "prompt": "".join(strings[: len(ids) - length]),
                    "tokens": strings[len(ids) - length :],
                    "values": [round(float(value), 4) for value in values[row, :length]],
                    "kind": kind,
                }
            )
        return lines


def write_samples(lines: Path, page: Path) -> None:
    """The page of samples from ``samples.jsonl``: one section per prompt, its answers by step as heat-maps."""
    records = read_metrics(lines)
    records.sort(key=lambda record: (record["prompt"], record["step"]))
    sections = []
    for number, (prompt, answers) in enumerate(groupby(records, key=lambda record: record["prompt"]), 1):
        texts = [
            TokenScores(r["tokens"], r["values"], f"step {r['step']}, {r['mode']}: {_summary(r)}", r["kind"])
            for r in answers
        ]
        sections.append((f"Prompt {number}", join([sample_html(Sample(prompt, texts))])))
    write_page(page, "Answers to held-out prompts, by step", sections, legend_html())


def _summary(record: dict[str, Any]) -> str:
    values = record["values"]
    return f"{len(values)} tokens, reward per token {sum(values) / max(1, len(values)):+.3f}"
