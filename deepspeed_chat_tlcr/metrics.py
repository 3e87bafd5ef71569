"""Metrics: the log of a run, and the measures of a token discriminator."""

import json
import math
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

NEUTRAL_ZONE = 0.6
"""A token counts as labelled by the discriminator where max(D, 1 - D) reaches this (paper, Eq. 2)."""


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, ``step`` and ``group/name`` keys.

    ``resume_step`` drops the lines a killed run wrote after the checkpoint it now continues from. ``tensorboard``
    names a folder that gets the same numbers.
    """

    def __init__(self, folder: str | Path, resume_step: int = 0, tensorboard: str | None = None):
        self.board = SummaryWriter(tensorboard, purge_step=resume_step + 1) if tensorboard else None
        self.path = Path(folder) / "metrics.jsonl"
        kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= resume_step]
        self.path.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has no NaN; null says "not measured" to every reader.
        clean = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")
        if self.board is not None:
            for key, value in clean.items():
                if value is not None:
                    self.board.add_scalar(key, value, step)
            self.board.flush()


def read_metrics(path: str | Path) -> list[dict]:
    """All whole lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in _whole_lines(Path(path))]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def token_metrics(positive_probs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Measures of a discriminator on labelled tokens.

    ``positive_probs`` D and ``targets`` (0 negative, 0.5 neutral, 1 positive) are flat arrays, one entry per token.
    ``edited_accuracy`` (paper 7.2): among edited tokens, the share on the right side of 0.5; beside it the share a
    constant guess gets, ``majority_accuracy``. ``three_class_accuracy``: neutral where max(D, 1-D) < 0.6. ``auroc``:
    positive against negative tokens. ``reward_…``: mean 2D - 1 by label. NaN where a label does not occur.
    """
    positive, negative = targets == 1.0, targets == 0.0
    edited = positive | negative
    rewards = 2 * positive_probs - 1
    share = _mean(positive[edited])
    return {
        "edited_accuracy": _mean((positive_probs > 0.5)[edited] == positive[edited]),
        "majority_accuracy": max(share, 1 - share),
        "three_class_accuracy": _mean(predicted_targets(positive_probs) == targets),
        "auroc": auroc(positive_probs[positive], positive_probs[negative]),
        "reward_positive": _mean(rewards[positive]),
        "reward_neutral": _mean(rewards[~edited]),
        "reward_negative": _mean(rewards[negative]),
        "edited_share": _mean(edited),
    }


def predicted_targets(positive_probs: np.ndarray) -> np.ndarray:
    """What D says a token is: 1 positive, 0 negative, 0.5 neutral where max(D, 1 - D) is below 0.6."""
    sure = np.maximum(positive_probs, 1 - positive_probs) >= NEUTRAL_ZONE
    return np.where(sure, (positive_probs > 0.5).astype(float), 0.5)


def auroc(positive_scores: np.ndarray, negative_scores: np.ndarray) -> float:
    """Chance that a random positive scores above a random negative, ties counting half (Mann-Whitney U)."""
    if not len(positive_scores) or not len(negative_scores):
        return math.nan
    ordered = np.sort(negative_scores)
    below = np.searchsorted(ordered, positive_scores, side="left")
    not_above = np.searchsorted(ordered, positive_scores, side="right")
    return float((below + not_above).mean() / 2 / len(negative_scores))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
