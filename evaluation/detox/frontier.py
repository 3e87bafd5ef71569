"""Is a policy better than the SFT model sampled colder? Shares over prompts against KL, with paired intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.stats import CONFIDENCE, RESAMPLES


@dataclass(frozen=True)
class Point:
    """One policy at one way of sampling: ``(P,)`` each, one entry for each prompt."""

    score: np.ndarray  # the measure, the less the better
    kl: np.ndarray  # nats per answer from the SFT model at temperature 1


def beside(frontier: Sequence[Point], point: Point, prompts: np.ndarray) -> float:
    """Score less the frontier's at the same KL, means over ``prompts`` (their places); straight lines between points.

    Beyond the frontier's last point, that point's score counts: it could be had with less KL.
    """
    means = sorted((p.kl[prompts].mean(), p.score[prompts].mean()) for p in frontier)
    kls, scores = np.array(means).T
    # What less KL already reaches counts for more KL, too.
    return float(point.score[prompts].mean() - np.interp(point.kl[prompts].mean(), kls, np.minimum.accumulate(scores)))


def difference(frontier: Sequence[Point], point: Point, seed: int = 0) -> tuple[float, float, float]:
    """``beside`` over all prompts and its 95 % bootstrap interval: prompts are resampled, for all points alike."""
    rng, count = np.random.default_rng(seed), len(point.score)
    drawn = [beside(frontier, point, rng.integers(0, count, count)) for _ in range(RESAMPLES // 2)]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return beside(frontier, point, np.arange(count)), float(low), float(high)
