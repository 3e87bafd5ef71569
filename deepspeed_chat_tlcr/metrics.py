"""Metrics: the log of a run, and the measures of a token discriminator."""

import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import parse_json, replace_file, require_file

NEUTRAL_ZONE = 0.6
"""A token counts as labelled by the discriminator where max(D, 1 - D) reaches this (paper, Eq. 2)."""


class StepLines:
    """A file of JSON lines, each with a ``step``. Lines after ``resume_step`` are dropped; 0 starts a new file."""

    def __init__(self, path: str | Path, resume_step: int = 0):
        self.path = Path(path)
        before = _whole_lines(self.path) if resume_step else []  # step 0 may have been measured, and will be again
        replace_file(self.path, [line for line in before if parse_json(line)["step"] <= resume_step])

    def write(self, *records: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, ``step`` and ``group/name`` keys.

    ``tensorboard`` names a folder that gets the same numbers, ``report_to`` further trackers ("wandb", …), which also
    get the ``settings``.
    """

    def __init__(
        self,
        folder: str | Path,
        resume_step: int = 0,
        tensorboard: str | None = None,
        report_to: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
    ):
        self.board = SummaryWriter(tensorboard, purge_step=resume_step + 1) if tensorboard else None
        self.lines = StepLines(Path(folder) / "metrics.jsonl", resume_step)
        resumed = resume_step > 0
        self.trackers = [_tracker(name, Path(folder), settings or {}, resumed) for name in report_to if name != "none"]

    def write(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has no NaN; null says "not measured" to every reader.
        clean = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self.lines.write({"step": step, **clean})
        measured = {key: value for key, value in clean.items() if value is not None}
        if self.board is not None:
            for key, value in measured.items():
                self.board.add_scalar(key, value, step)
            self.board.flush()
        for tracker in self.trackers:
            tracker.log(measured, step=step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Raise ``InputError`` for a tracker of ``--report_to`` that accelerate does not know or that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in names:
        if name != "none" and name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"--report_to {name}: unknown; known: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name != "none" and name not in map(str, get_available_trackers()):
            raise InputError(f"--report_to {name}: its package is not installed; pip install {name}")


def _tracker(name: str, folder: Path, settings: dict[str, Any], resumed: bool) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers write from the main process only, and ask it which that is
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    run = folder.resolve().name
    if name == "wandb":  # a resumed run continues the same curves
        id_file = folder / "wandb_id.txt"
        if not (resumed and id_file.is_file()):
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        project, run_id = os.environ.get("WANDB_PROJECT", run), id_file.read_text(encoding="utf-8")
        tracker = tracker_class(project, name=run, id=run_id, resume="allow")
    else:
        folder_option = {"logging_dir": str(folder)} if tracker_class.requires_logging_directory else {}
        tracker = tracker_class(run, **folder_option)
    if hasattr(tracker, "start"):
        tracker.start()
    plain = {key: value for key, value in settings.items() if isinstance(value, int | float | str)}
    tracker.store_init_configuration(plain)
    return tracker


def read_metrics(path: str | Path) -> list[dict]:
    """All whole lines of a ``metrics.jsonl`` or another file of JSON lines."""
    return [parse_json(line) for line in _whole_lines(Path(path))]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # As bytes: a killed run's last line may end within a character, and str.splitlines() ends lines at U+2028 too.
    return [line.decode("utf-8") + "\n" for line in require_file(path).read_bytes().split(b"\n")[:-1]]


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
