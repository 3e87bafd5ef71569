"""Table 1 over seeds: what evaluate_table1.sh has measured in each seed's folder, as mean and standard deviation.

python evaluation/table1.py --run_dir output/table1     -> RUN_DIR/table1.json, and a table in the terminal
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepspeed_chat_tlcr.arguments import option, parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly, reading
from deepspeed_chat_tlcr.saving import write_json
from evaluation.results import load_results


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put the measures of several seeds together."""

    run_dir: str = option(MISSING, "OUTPUT of run_table1.sh or run_ablations.sh, with seed-*/evaluation in it")


def measures(evaluation: Path) -> dict[str, dict[str, float]]:
    """By model, what was measured: MT-Bench's three ratings, sums of rewards per answer, answers' length."""
    found: dict[str, dict[str, float]] = {}
    for name, rated in ((load_results(evaluation, "mt_bench") or {}).get("models") or {}).items():
        parts = ("turn 1", "turn 2", "overall")
        found.setdefault(name, {}).update({f"MT-Bench, {part}": rated[part] for part in parts})
    for name, scored in ((load_results(evaluation, "reward_scores") or {}).get("models") or {}).items():
        rewards = {f"{reward}, sum": entry["sum"] for reward, entry in scored["rewards"].items()}
        found.setdefault(name, {}).update({**rewards, "response length": scored["response_length"]})
    return {name: {m: v for m, v in one.items() if v is not None and math.isfinite(v)} for name, one in found.items()}


def over_seeds(seeds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict]]:
    """By model and measure: mean, standard deviation (None of one seed) and the value of each seed."""
    table: dict[str, dict[str, dict]] = {}
    for seed, models in seeds.items():
        for name, measured in models.items():
            for measure, value in measured.items():
                entry = table.setdefault(name, {}).setdefault(measure, {"by_seed": {}})
                entry["by_seed"][seed] = value
    for measured in table.values():
        for entry in measured.values():
            values = list(entry["by_seed"].values())
            entry["mean"] = statistics.fmean(values)
            entry["sd"] = statistics.stdev(values) if len(values) > 1 else None
    return table


def shown(entry: Mapping | None, seeds: int) -> str:
    """``mean ± sd``, and of how many seeds where some are missing."""
    if entry is None:
        return "—"
    spread = "" if entry["sd"] is None else f" ± {entry['sd']:.2f}"
    count = len(entry["by_seed"])
    return f"{entry['mean']:.2f}{spread}" + (f" ({count} of {seeds})" if count < seeds else "")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    run = Path(parse(Options, argv).run_dir)
    folders = sorted(run.glob("seed-*"))
    seeds: dict[str, dict] = {}
    for folder in folders:
        with reading(f"{folder / 'evaluation'}: results of MT-Bench or of the rewards", "run that part again"):
            seeds[folder.name.removeprefix("seed-")] = measures(folder / "evaluation")
    seeds = {seed: found for seed, found in seeds.items() if found}
    if not seeds:
        raise InputError(f"{run}: no seed-*/evaluation with MT-Bench or reward scores; run evaluate_table1.sh first")
    table = over_seeds(seeds)
    write_json(run / "table1.json", {"seeds": list(seeds), "models": table})
    columns = list(dict.fromkeys(measure for measured in table.values() for measure in measured))
    printed = Table(title=f"Mean ± standard deviation over {len(seeds)} seed{'s' * (len(seeds) > 1)}")
    for name in ("method", *columns):
        printed.add_column(name, justify="left" if name == "method" else "right")
    for name, measured in table.items():
        printed.add_row(name, *(shown(measured.get(column), len(seeds)) for column in columns))
    Console().print(printed)
    print(run / "table1.json")


if __name__ == "__main__":
    sys.exit(main())
