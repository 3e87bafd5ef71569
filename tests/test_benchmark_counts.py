"""benchmarks/counts.py: one step is the difference of two runs."""

from benchmarks.counts import difference


def test_one_step_is_what_the_longer_run_has_more():
    fewer = {"launches": {"mm": 10, "add": 4}, "waits": {"item @ a.py:1": 2}, "collectives": {}}
    more = {"launches": {"mm": 13, "add": 9, "exp": 1}, "waits": {"item @ a.py:1": 2}, "collectives": {"barrier": 1}}
    assert difference(fewer, more) == {
        "launches": {"add": 5, "mm": 3, "exp": 1},
        "waits": {},
        "collectives": {"barrier": 1},
    }
