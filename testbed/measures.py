"""How good a policy's answers truly are, and whether it knows more than colder sampling of the SFT model does.

Whatever sharpens a policy can raise its score at temperature 1. So scores are read against what they cost, the KL to
the SFT model and the entropy that is left, beside the *frontier* that the SFT model reaches over ``TEMPERATURES``.
"""

import json
import lzma
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.generation import Answer, Decoding, seeded_answers
from deepspeed_chat_tlcr.records import read_jsonl
from deepspeed_chat_tlcr.tokenization import tokenize_prompt
from evaluation.logprobs import as_examples, response_logprobs
from evaluation.scoring import sequence_scores, token_probs
from testbed.base import BOS
from testbed.world import repeats_a_fact

TEMPERATURES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Those that every policy's best one is chosen from; 0: greedy."""
BEST_OF = (1, 2, 4, 8, 16)

Scorer = Callable[[str, str, bool], float]
"""(prompt, response, whether the policy ended it itself) to a true score; higher is better."""


@dataclass(frozen=True)
class Sampler:
    """How answers are written: the same for every policy, so that they can be paired."""

    tokenizer: PreTrainedTokenizerFast
    sft: PreTrainedModel
    scorer: Scorer
    longest: int
    batch_size: int
    seed: int

    def measure(
        self, policy: PreTrainedModel, prompts: Sequence[str], temperature: float, each: int, shown: str | None = None
    ) -> "Measured":
        """``each`` answers to every prompt (greedily one), scored, with their KL and entropy in nats per response."""
        count = each if temperature else 1
        ids = [tokenize_prompt(self.tokenizer, prompt) for prompt in prompts for _ in range(count)]
        decoding = Decoding(self.longest, temperature)
        written = seeded_answers(policy, self.tokenizer, ids, decoding, self.batch_size, self.seed, shown)
        asked = [prompt for prompt in prompts for _ in range(count)]
        scores = [self.scorer(prompt, one.text, one.ended) for prompt, one in zip(asked, written, strict=True)]
        pad_id, own = self.tokenizer.pad_token_id, np.zeros(len(written))
        if temperature:
            own = response_logprobs(policy, written, pad_id, temperature).numpy().astype(float)
        away = own - response_logprobs(self.sft, written, pad_id).numpy()
        rows = (np.asarray(values, float).reshape(len(prompts), count) for values in (scores, away, -own))
        return Measured(temperature, written, *rows)

    def sweep(self, policy: PreTrainedModel, prompts: Sequence[str], name: str | None = None) -> dict[float, float]:
        """Mean true score at every temperature, of two answers to each prompt: what a temperature is chosen by."""
        shown = {t: name and f"{name} at temperature {t:g}" for t in TEMPERATURES}
        return {t: float(self.measure(policy, prompts, t, 2, shown[t]).scores.mean()) for t in TEMPERATURES}


@dataclass(frozen=True)
class Measured:
    """A policy's answers at one temperature; every array is (prompts, answers to each)."""

    temperature: float
    answers: list[Answer]
    scores: np.ndarray
    kls: np.ndarray  # log pi - log pi_sft, pi at its temperature, the SFT model at 1
    entropies: np.ndarray  # - log pi, whose mean is the entropy

    def summary(self) -> dict[str, float]:
        """Means with standard errors over prompts."""
        shape, answers = self.scores.shape, self.answers
        arrays = {"true_score": self.scores, "kl": self.kls, "entropy": self.entropies}
        arrays["response_length"] = np.reshape([len(answer.response_ids) for answer in answers], shape)
        arrays["repeats"] = np.reshape([repeats_a_fact(answer.text) for answer in answers], shape)
        found = {"temperature": self.temperature, "prompts": shape[0], "answers": len(answers)}
        found["eos_rate"] = float(np.mean([answer.ended for answer in answers]))
        for name, values in arrays.items():
            by_prompt = values.mean(1)
            found |= {name: float(by_prompt.mean()), f"{name}_standard_error": float(stats.sem(by_prompt))}
        return found

    def best_of_n(self, judged: Sequence[float]) -> list[dict]:
        """Best-of-n of these answers by what a judge says of each: n, KL to temperature 1, true scores."""
        by, found = np.reshape(judged, self.scores.shape), []
        for n in (n for n in BEST_OF if n <= by.shape[1]):
            scores = best_of(by, self.scores, n)
            row = {"n": n, "kl": best_of_kl(n), "true_score": float(scores.mean())}
            found.append(row | {"scores": scores.round(4).tolist()})
        return found

    def by_kind(self, kinds: Sequence[str]) -> dict[str, float]:
        """Mean true score by what is new in the prompts."""
        scores, of = self.scores.mean(1), np.asarray(kinds)
        return {kind: float(scores[of == kind].mean()) for kind in dict.fromkeys(kinds)}


def write_answers(path: Path, prompts: Sequence[str], measured: Mapping[str, Measured]) -> None:
    """Every answer that was measured, with its true score: one line for each set of answers and prompt."""
    with lzma.open(path, "wt", encoding="utf-8") as file:
        for name, one in measured.items():
            each = one.scores.shape[1]
            for at, prompt in enumerate(prompts):
                row = one.answers[at * each : (at + 1) * each]
                line = {"set": name, "prompt": prompt, "scores": one.scores[at].round(4).tolist()}
                line |= {"answers": [answer.text for answer in row], "ended": [answer.ended for answer in row]}
                file.write(json.dumps(line) + "\n")


def judged(model: PreTrainedModel, measured: Measured, pad_id: int) -> list[float]:
    """What a discriminator (the sum of 2D - 1) or a sequence reward model says of each answer."""
    examples = as_examples(measured.answers)
    if model.num_labels == 1:
        return sequence_scores(model, examples, pad_id, 64)
    return [sum(2 * p - 1 for p in row) for row in token_probs(model, examples, pad_id, 64)]


def scores_in_training(folder: Path, scorer: Scorer, eos: str) -> dict[int, list[float]]:
    """True scores of the answers that each step of PPO learnt from, where the run has saved them (--save_answers)."""
    scores: dict[int, list[float]] = {}
    for file in sorted(folder.glob("answers-*.jsonl")):
        for _, line in read_jsonl(file):
            prompt, answer = line["prompt"].removeprefix(BOS), line["answer"]
            score = scorer(prompt, answer.removesuffix(eos), answer.endswith(eos))
            scores.setdefault(line["step"], []).append(score)
    return scores


def best_of(selected_by: np.ndarray, true: np.ndarray, n: int) -> np.ndarray:
    """Expected true score of the answer that a judge ranks first among ``n``, by prompt: (P, N) and (P, N) to (P,).

    Over all sets of ``n`` of a prompt's N answers: the one ranked i-th from below leads C(i - 1, n - 1) of C(N, n).
    """
    size = true.shape[1]
    weights = np.array([math.comb(rank, n - 1) for rank in range(size)]) / math.comb(size, n)
    return np.take_along_axis(true, selected_by.argsort(1, kind="stable"), 1) @ weights


def best_of_kl(n: int) -> float:
    """KL of best-of-n to what it samples from, nats: log n - (n - 1) / n, an upper bound."""
    return math.log(n) - (n - 1) / n


def frontier(costs: Sequence[float], scores: np.ndarray, at: float) -> np.ndarray:
    """What the SFT model reaches at cost ``at``: (points, prompts) scores at their costs, to (prompts,).

    Between two points linear in the cost; where a costlier point scores lower on the whole, the better one before it
    counts: nobody has to spend what does not help. Costs beyond the last point are worth no more than that.
    """
    order = np.argsort(costs, kind="stable")
    costs, scores = np.asarray(costs, float)[order], np.asarray(scores, float)[order]
    means = scores.mean(1)
    best = [int(np.argmax(means[: place + 1])) for place in range(len(order))]
    kept = scores[best]
    place = int(np.searchsorted(costs, at, side="right"))
    if place in (0, len(costs)):
        return kept[max(place - 1, 0)]
    share = (at - costs[place - 1]) / (costs[place] - costs[place - 1])
    return (1 - share) * kept[place - 1] + share * kept[place]


def interval(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """Mean of independent values with Student's t interval and two-sided p of its being 0; no interval of one value."""
    values = np.asarray(values, float)
    found = {"mean": float(values.mean()), "count": len(values)}
    if len(values) < 2 or np.ptp(values) == 0:
        return found
    low, high = stats.t.interval(level, len(values) - 1, values.mean(), stats.sem(values))
    return found | {"low": float(low), "high": float(high), "p": float(stats.ttest_1samp(values, 0).pvalue)}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979), in their order."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
