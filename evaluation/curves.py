"""Training curves (Figure 7): perplexity, length and KL of several runs over each other, as PNG and on the report.

python evaluation/curves.py --runs tlcr=OUT/step3_ppo_tlcr seq=OTHER/step3_ppo_tlcr --out OUTPUT
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.arguments import parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.pictures import Series
from deepspeed_chat_tlcr.pictures.charts import thin
from deepspeed_chat_tlcr.pictures.png import line_chart_png
from evaluation.options import TITLES, CurveOptions, OutOptions
from evaluation.report import refresh_report
from evaluation.results import save_results

MOST_STEPS, MOST_DRAWN = 10**12, 1e300


@dataclass(frozen=True, kw_only=True)
class Options(CurveOptions, OutOptions):
    """Draw the training curves of several runs over each other."""


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
                raise InputError(f"--runs {entry}: {file}:{number} has no step, as lines of a metrics.jsonl do")
    if not runs:
        raise InputError("--runs is missing: NAME=PATH of one run or more")
    return runs


def as_number(value: object) -> float:
    """NaN for what was not measured (null), is no number, or one that no axis can hold."""
    return float(value) if isinstance(value, int | float) and abs(value) <= MOST_DRAWN else math.nan


def series_of(runs: dict[str, list[dict]], key: str) -> list[Series]:
    """One line for each run that has the metric; gaps where it was not measured."""
    lines = []
    for name, log in runs.items():
        points = [(line["step"], as_number(line[key])) for line in log if key in line]
        if points:
            lines.append(Series(name, *map(list, zip(*points, strict=True))))
    return lines


def run(options: Options) -> None:
    runs = read_runs(options.runs)
    folder = Path(options.out) / "curves"
    folder.mkdir(parents=True, exist_ok=True)
    charts, absent = [], []
    for key in options.metrics:
        title, unit = TITLES.get(key, (key, ""))
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
    save_results(
        options.out,
        "curves",
        {"runs": steps, "charts": charts, "absent": absent, "smoothing": options.smoothing},
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    run(options)
    refresh_report(options.out)


if __name__ == "__main__":
    sys.exit(main())
