"""benchmarks/counts.py: one step is the difference of two runs."""

import pytest

from benchmarks.counts import by_phase, difference, report
from training_scripts.planning import duration


def test_one_step_is_what_the_longer_run_has_more():
    fewer = {"launches": {"mm": 10, "add": 4}, "waits": {"item @ a.py:1": 2}, "collectives": {}}
    more = {"launches": {"mm": 13, "add": 9, "exp": 1}, "waits": {"item @ a.py:1": 2}, "collectives": {"barrier": 1}}
    assert difference(fewer, more) == {
        "launches": {"add": 5, "mm": 3, "exp": 1},
        "waits": {},
        "collectives": {"barrier": 1},
    }


def test_time_by_phase_is_the_longer_of_device_and_host():
    """On an A100: 1.404e14 operations are a second; 100,000 launches are 1.6 s, while the kernel runs."""
    done = {
        "train;kernel;140400000000000;0": 2,
        "train;launch;0;0": 100_000,
        "train backward;launch;0;0": 100_000,
        "train backward;kernel;0;4": 3,
        "train;computed;0;0": 10,
        "train;real;0;0": 9,
        "train;token;50;0": 10,
        "train;token;7;0": 10,
    }
    phases = by_phase(done)
    assert phases["train"]["A100"] == pytest.approx(2)
    assert phases["train backward"]["A100"] == pytest.approx(100_000 * duration.LAUNCH)
    assert phases["train"]["operations"] == 2 * 1.404e14
    assert phases["train"]["looked up"] == 10  # in the larger table: the other has positions
    assert "10.0%" in report(phases)
