"""Statistics of the evaluations: bootstrap and binomial intervals, win rates, agreement of annotators."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000


def bootstrap_interval(columns: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of all entries of ``columns`` ``(N, C)``, whose N rows are resampled.

    A row is what was drawn together: both turns of a question, the answers to a prompt. NaN means not measured. To
    compare two models, pass the differences of their rows: the resampling is then paired.
    """
    rows = np.atleast_2d(np.asarray(columns, float).T).T
    rows = rows[np.isfinite(rows).any(axis=1)]
    return ratio_interval(np.nansum(rows, axis=1), np.isfinite(rows).sum(axis=1))


def ratio_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(``sums``) / sum(``counts``), both ``(N,)``, resampled together."""
    if len(sums) < 2:
        return math.nan, math.nan

    def ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis) / counts.sum(axis)

    found = stats.bootstrap(
        (np.asarray(sums, float), np.asarray(counts, float)),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def wilson_interval(wins: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share ``wins / count``. ``wins`` may hold halves (ties), which only widens it."""
    if not count:
        return math.nan, math.nan
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    share, scale = wins / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(middle - half, 0.0), min(middle + half, 1.0)


def share_interval(votes: np.ndarray, raters: int) -> tuple[float, float]:
    """95 % interval of a share of all votes: ``votes`` ``(N,)`` of ``raters`` on each of N items.

    One annotator: Wilson's binomial interval. Several: their votes on an item are not independent, so items are
    resampled (bootstrap); where no item differs from another, it is Wilson's interval over items.
    """
    votes = np.asarray(votes, float)
    if raters == 1 or np.ptp(votes) == 0:
        return wilson_interval(votes.sum() / raters, len(votes))
    return ratio_interval(votes, np.full(len(votes), raters))


@dataclass(frozen=True)
class HeadToHead:
    """One model against another over ``items`` judged in both orders."""

    items: int
    wins: int  # both orders prefer the first model
    losses: int
    ties: int  # both orders say tie, or they prefer different models
    inconsistent: int  # of the ties: both orders preferred what was shown in the same place
    win_rate: float  # wins and half the ties
    interval: tuple[float, float]
    p_value: float  # exact sign test of wins against losses
    first_shown_preferred: float  # of all verdicts but ties: position bias, 0.5 is none


def head_to_head(verdicts: Sequence[tuple[str, str]]) -> HeadToHead:
    """From ``(verdict with the first model shown first, verdict with it shown second)``, each "first", "second", "tie".

    "first" and "second" are places in which answers were shown. A model wins an item where it is preferred in one order
    and not beaten in the other; where the two orders prefer different models, or both say tie, the item is a tie.
    """
    points = {"first": 1, "second": -1, "tie": 0}
    sums = [points[one] - points[other] for one, other in verdicts]
    wins, losses = sum(s > 0 for s in sums), sum(s < 0 for s in sums)
    items, ties = len(sums), len(sums) - wins - losses
    shown = [verdict for pair in verdicts for verdict in pair if verdict != "tie"]
    return HeadToHead(
        items=items,
        wins=wins,
        losses=losses,
        ties=ties,
        inconsistent=sum(one == other != "tie" for one, other in verdicts),
        win_rate=(wins + ties / 2) / items if items else math.nan,
        interval=wilson_interval(wins + ties / 2, items),
        p_value=float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
        first_shown_preferred=shown.count("first") / len(shown) if shown else math.nan,
    )


def longer_preferred(verdicts: Sequence[tuple[str, str]], lengths: Sequence[tuple[int, int]]) -> float:
    """Length bias: of the verdicts that prefer one of two answers, the share that prefers the longer one; 0.5 is none.

    ``verdicts`` as for ``head_to_head``; ``lengths``: those of the first model's answer and the other's, which do not
    count where they are equal. NaN where nothing counts.
    """
    longer = []
    for (one, other), (mine, theirs) in zip(verdicts, lengths, strict=True):
        if mine != theirs:
            longer += [(one == "first") == (mine > theirs)] * (one != "tie")
            longer += [(other == "second") == (mine > theirs)] * (other != "tie")
    return sum(longer) / len(longer) if longer else math.nan


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement of annotators beyond chance (Fleiss 1971). ``counts`` ``(N, K)``: how many chose answer k of item n.

    Every item has the same number of annotators, at least 2; else ``ValueError``. NaN where all always chose the same
    one category, which leaves nothing to agree on.
    """
    counts = np.asarray(counts, float)
    raters = counts.sum(axis=1) if counts.ndim == 2 and len(counts) else np.zeros(1)
    if raters.min() < 2 or (raters != raters[0]).any():
        raise ValueError("Fleiss' kappa needs items that all have the same number of annotators, at least 2")
    per_item = ((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))
    by_chance = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return float((per_item.mean() - by_chance) / (1 - by_chance)) if by_chance < 1 else math.nan
