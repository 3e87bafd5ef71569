"""What a policy's scores are read against: frontiers, best-of-n, intervals and their correction, by hand."""

import json
import lzma
import math

import numpy as np
import pytest

from deepspeed_chat_tlcr.generation import Answer
from testbed.measures import Measured, best_of, best_of_kl, frontier, holm, interval, write_answers

SWEPT = np.array([[2.0, 4.0], [5.0, 5.0], [4.0, 4.0]])
"""Means 3, 5 and 4 at costs 0, 2 and 3, of two prompts."""


@pytest.mark.parametrize(
    ("at", "reached"),
    [
        (-1.0, [2.0, 4.0]),  # before the first point: as good as that
        (0.0, [2.0, 4.0]),
        (1.0, [3.5, 4.5]),  # half-way to the second
        (2.0, [5.0, 5.0]),
        (2.5, [5.0, 5.0]),  # the third scores lower, so nobody has to spend that much
        (9.0, [5.0, 5.0]),
    ],
)
def test_the_frontier_is_linear_between_points_and_never_falls(at, reached):
    assert frontier([0.0, 2.0, 3.0], SWEPT, at) == pytest.approx(reached)
    shuffled = [1, 2, 0]
    assert frontier(np.array([0.0, 2.0, 3.0])[shuffled], SWEPT[shuffled], at) == pytest.approx(reached)


def test_best_of_n_over_all_sets_of_n():
    """Three answers whose judge ranks them 1, 3, 2 and which are worth 10, 1, 4: of the three pairs the second leads
    two (worth 1) and the third one (worth 4)."""
    judged, true = np.array([[0.1, 0.3, 0.2]]), np.array([[10.0, 1.0, 4.0]])
    assert best_of(judged, true, 1) == pytest.approx([5.0])
    assert best_of(judged, true, 2) == pytest.approx([(1 + 1 + 4) / 3])
    assert best_of(judged, true, 3) == pytest.approx([1.0])
    assert best_of_kl(1) == 0.0
    assert best_of_kl(2) == pytest.approx(math.log(2) - 0.5)


def test_intervals_by_hand():
    """Means 1 and 3: 2 ± t(1) * sqrt(2) / sqrt(2) = 2 ± 12.706; p of t = 2: 1 - 2 atan(2) / pi = .2952."""
    found = interval([1.0, 3.0])
    assert (found["mean"], found["count"]) == (2.0, 2)
    assert (found["low"], found["high"]) == (pytest.approx(2 - 12.706, abs=1e-3), pytest.approx(2 + 12.706, abs=1e-3))
    assert found["p"] == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert interval([1.0]) == {"mean": 1.0, "count": 1}
    assert interval([1.0, 1.0]) == {"mean": 1.0, "count": 2}


def test_holm_by_hand():
    """.01 x 3; .02 x 2 is .04; .03 x 1 is below that and so becomes it; none above 1."""
    assert holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_is_told_of_answers_and_kept_of_them(tmp_path):
    """Two prompts, two answers each; one repeats a fact. Errors are over prompts: of 2 and 3, .5."""
    texts = [" The rose needs sand. It needs sand.", " a", " b", " c"]
    answers = [Answer([1], [5] * length, text, length < 4) for length, text in zip((1, 2, 3, 4), texts, strict=True)]
    scores = np.array([[1.0, 3.0], [2.0, 4.0]])
    measured = Measured(0.5, answers, scores, 2 * scores, 3 * scores)
    told = measured.summary()
    assert (told["true_score"], told["kl"], told["entropy"]) == (2.5, 5.0, 7.5)
    assert told["true_score_standard_error"] == pytest.approx(0.5)
    assert (told["repeats"], told["eos_rate"], told["response_length"]) == (0.25, 0.75, 2.5)
    assert measured.by_kind(["new", "old"]) == {"new": 2.0, "old": 3.0}
    write_answers(tmp_path / "a.xz", ["p", "q"], {"T=0.5": measured})
    lines = [json.loads(line) for line in lzma.decompress((tmp_path / "a.xz").read_bytes()).splitlines()]
    assert [line["answers"] for line in lines] == [texts[:2], texts[2:]]
    assert lines[1] == {
        "set": "T=0.5",
        "prompt": "q",
        "scores": [2, 4],
        "answers": [" b", " c"],
        "ended": [True, False],
    }
