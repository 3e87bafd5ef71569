"""What the runs say: means over seeds, paired differences with intervals, win rates. Functions of numbers."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, NaN of fewer than two values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of independent values (Student's t); None of fewer than two."""
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return values[0], values[0]
    low, high = stats.t.interval(0.95, len(values) - 1, statistics.fmean(values), stats.sem(values))
    return float(low), float(high)


def paired_difference(one: Mapping[int, Sequence[float]], other: Mapping[int, Sequence[float]]) -> dict | None:
    """How much better ``one`` is than ``other``, both ``{seed: score of each prompt}`` on the same prompts.

    Each seed has its own world, models and prompts, so seeds are the independent draws; with a single one in common,
    its prompts are, and the interval says nothing about other worlds or trainings (``unit`` tells which).
    """
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    by_prompt = {seed: [a - b for a, b in zip(one[seed], other[seed], strict=True)] for seed in seeds}
    differences = [statistics.fmean(by_prompt[seed]) for seed in seeds] if len(seeds) > 1 else by_prompt[seeds[0]]
    found = interval(differences)
    return {
        "difference": statistics.fmean(differences),
        "low": found[0] if found else None,
        "high": found[1] if found else None,
        "unit": "seed" if len(seeds) > 1 else "prompt",
        "count": len(differences),
    }


def win_rate(one: Mapping[int, Sequence[float]], other: Mapping[int, Sequence[float]]) -> float | None:
    """Share of prompts on which ``one`` scores higher; ties count half."""
    pairs = [pair for seed in set(one) & set(other) for pair in zip(one[seed], other[seed], strict=True)]
    if not pairs:
        return None
    return statistics.fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)


def band(curves: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float], list[float]]:
    """Mean over seeds at each update, and mean minus and plus one standard deviation; NaN where nothing was logged."""
    means, lows, highs = [], [], []
    for at in range(max(map(len, curves), default=0)):
        values = [curve[at] for curve in curves if at < len(curve) and curve[at] is not None]
        mean, sd = mean_and_sd(values) if values else (math.nan, math.nan)
        spread = 0.0 if math.isnan(sd) else sd
        means.append(mean)
        lows.append(mean - spread)
        highs.append(mean + spread)
    return means, lows, highs


def best_of_curve(scores: Sequence[float], window: int = 5) -> float:
    """The highest mean of ``window`` consecutive updates: what stopping at the right moment would have brought."""
    width = min(window, len(scores))
    return max(statistics.fmean(scores[at : at + width]) for at in range(len(scores) - width + 1))


def score_at_tokens(scores: Sequence[float], tokens: Sequence[int], budget: float, window: int = 5) -> float | None:
    """Mean of the last ``window`` updates before more than ``budget`` tokens were generated; both by update."""
    afforded = sum(spent <= budget for spent in itertools.accumulate(tokens))
    return statistics.fmean(scores[max(0, afforded - window) : afforded]) if afforded else None
