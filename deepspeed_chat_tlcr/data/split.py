"""DeepSpeed-Chat's split of the data into SFT, reward and RL parts: arithmetic on indices.

A plan needs it on machines without packages, so numpy is imported where indices are shuffled and nowhere else.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepspeed_chat_tlcr.errors import InputError

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

PARTS = ("sft", "reward", "rl")  # DeepSpeed-Chat's phases 1, 2, 3


def parse_data_split(data_split: str) -> tuple[float, float, float]:
    """Fractions of the SFT, reward and RL parts: "2,4,4" -> (0.2, 0.4, 0.4), scaled to sum 1 as in DeepSpeed-Chat.

    Raises ``InputError`` unless these are three numbers, none negative and not all zero.
    """
    try:
        weights = [float(text) for text in data_split.split(",")]
    except ValueError:
        weights = []
    total = sum(weights)
    if len(weights) != 3 or min(weights) < 0 or not 0 < total < math.inf:
        raise InputError(
            f"--data_split (DATA_SPLIT) {data_split!r}: expected three numbers for SFT, reward and RL, "
            'none negative and not all zero, as in "2,4,4" (20 %, 40 %, 40 %)'
        )
    if not any(math.isclose(total, whole) for whole in (1, 10, 100)):
        shares = ", ".join(f"{100 * weight / total:.1f} %" for weight in weights)
        log.warning("--data_split %s adds up to %g, not 1, 10 or 100: read as %s", data_split, total, shares)
    sft, reward, rl = (weight / total for weight in weights)
    return sft, reward, rl


def split_indices(size: int, fractions: Sequence[float], seed: int) -> "list[np.ndarray]":
    """Record indices of each part: DeepSpeed-Chat's shuffle, cut at its rounded boundaries.

    Each part has round(fraction * size) records; what the rounding has too many or too few is taken from or given to
    the *first* part, because every boundary after the start moves by it. One departure: a first part too small to
    give keeps 0 records (DeepSpeed-Chat's boundary turns negative there, and its parts overlap).
    """
    import numpy as np

    shuffled = np.arange(size, dtype=np.uint32)
    np.random.RandomState(seed).shuffle(shuffled)
    return [shuffled[start:end] for start, end in itertools.pairwise(_boundaries(size, fractions))]


def part_sizes(size: int, data_split: str) -> tuple[int, int, int]:
    """Records of the SFT, reward and RL parts.

    >>> part_sizes(112_052, "2,4,4")
    (22410, 44821, 44821)
    """
    ends = _boundaries(size, parse_data_split(data_split))
    sft, reward, rl = (end - start for start, end in itertools.pairwise(ends))
    return sft, reward, rl


def _boundaries(size: int, fractions: Sequence[float]) -> list[int]:
    ends = list(itertools.accumulate(round(fraction * float(size)) for fraction in fractions))
    surplus = ends[-1] - size
    return [0, *(max(0, end - surplus) for end in ends)]
