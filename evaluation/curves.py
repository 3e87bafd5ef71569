"""Training curves (Figure 7): perplexity, length and KL of several runs in one chart each, as PNG and in the report.

python evaluation/curves.py --runs tlcr=OUT/step3_ppo_tlcr seq=OTHER/step3_ppo_tlcr --out OUTPUT
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.pictures import Series
from deepspeed_chat_tlcr.pictures.charts import thin
from deepspeed_chat_tlcr.pictures.png import line_chart_png
from evaluation.options import CURVES, CurveOptions, OutOptions
from evaluation.report import part_program
from evaluation.results import save_results

MOST_STEPS, MOST_DRAWN = 10**12, 1e300


@dataclass(frozen=True, kw_only=True)
class Options(CurveOptions, OutOptions):
    """Draw the training curves of several runs in one chart for each metric."""


def read_runs(entries: Sequence[str]) -> dict[str, list[dict]]:
    """Each run's lines. Raises ``InputError`` for a run that has no metrics."""
    runs: dict[str, list[dict]] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or not name or name in runs:
            raise InputError(f"--runs {entry}: expected NAME=PATH, each name once")
        file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
        try:
            runs[name] = read_metrics(file)
        except ValueError as error:
            raise InputError(f"--runs {entry}: {file} is not a metrics.jsonl ({error})") from None
        if not runs[name]:
            raise InputError(f"--runs {entry}: no lines in {file}")
        for number, line in enumerate(runs[name], 1):
            step = line.get("step") if isinstance(line, dict) else None
            if type(step) is not int or not 0 <= step <= MOST_STEPS:
                raise InputError(f"--runs {entry}: {file}:{number} has no step, so this is not a metrics.jsonl")
    if not runs:
        raise InputError("--runs is missing: NAME=PATH of one run or more")
    return runs


def as_number(value: object) -> float:
    """NaN for what was not measured (null), is not a number, or is too large to draw."""
    return float(value) if isinstance(value, int | float) and abs(value) <= MOST_DRAWN else math.nan


def series_of(runs: dict[str, list[dict]], key: str) -> list[Series]:
    """One line for each run that has the metric; gaps where it was not measured."""
    lines = []
    for name, log in runs.items():
        points = [(line["step"], as_number(line[key])) for line in log if key in line]
        if points:
            lines.append(Series(name, *map(list, zip(*points, strict=True))))
    return lines


LAST = 0.2
"""Share of a run's lines, at its end, whose mean is its place on the frontier."""


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """The runs that no other one beats, being as good in both measures and better in one; by the first measure."""
    best = [
        name
        for name, (x, y) in points.items()
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())
    ]
    return sorted(best, key=lambda name: points[name])


def places(runs: dict[str, list[dict]], keys: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Each run's mean of every key over its last lines. Raises ``InputError`` for a run without them."""
    found = {}
    for name, log in runs.items():
        last = log[-max(1, round(LAST * len(log))) :]
        values = [[as_number(line.get(key)) for line in last] for key in keys]
        kept = [[value for value in column if math.isfinite(value)] for column in values]
        for key, column in zip(keys, kept, strict=True):
            if not column:
                raise InputError(f"--frontier {key}: not in the last lines of the run {name}")
        found[name] = tuple(sum(column) / len(column) for column in kept)
    return found


def run(options: Options) -> None:
    if options.frontier and len(options.frontier) != 2:
        raise InputError(f"--frontier: takes two keys of metrics.jsonl, not {len(options.frontier)}")
    runs = read_runs(options.runs)
    points = places(runs, options.frontier) if options.frontier else {}
    folder = Path(options.out) / "curves"
    folder.mkdir(parents=True, exist_ok=True)
    charts, absent = [], []
    for key in options.metrics:
        title, unit = CURVES.get(key, (key, ""))
        lines = series_of(runs, key)
        if not lines:
            absent.append(key)
            continue
        picture = folder / f"{key.replace('/', '_')}.png"
        line_chart_png(picture, lines, title, "step", unit, options.smoothing)
        print(picture)
        thinned = [(line.name, *zip(*thin(line.x, line.y), strict=True)) for line in lines]
        records = [{"name": name, "x": list(x), "y": list(y)} for name, x, y in thinned]
        charts.append({"title": title, "unit": unit, "key": key, "series": records})
    if absent:
        print(f"not recorded by any run: {', '.join(absent)}")
    steps = {name: log[-1]["step"] for name, log in runs.items()}
    results = {"runs": steps, "charts": charts, "absent": absent, "smoothing": options.smoothing}
    if points:
        results["frontier"] = {"keys": options.frontier, "points": points, "on": frontier(points)}
    save_results(options.out, "curves", results)


main = part_program("curves", Options, run)


if __name__ == "__main__":
    sys.exit(main())
