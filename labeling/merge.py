"""Join the folders of --shard 1/n to n/n into one, after checking that nothing is missing or repeated.

python labeling/merge.py --output_dir OUTPUT SHARD_1 SHARD_2 …
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.arguments import Parser
from deepspeed_chat_tlcr.asking.journal import RunFolder, line_ids
from deepspeed_chat_tlcr.asking.progress import Totals
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly, reading
from labeling.revising import describe
from labeling.selection import Shard


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="output folders of labeling/main.py --shard i/n")
    parser.add_argument("--output_dir", required=True, help="folder for the joined run")
    options = parser.parse(argv)
    with ExitStack() as stack:
        folders = [open_shard(stack, path) for path in options.shards]
        merge(folders, stack.enter_context(RunFolder(options.output_dir)))
    return 0


def open_shard(stack: ExitStack, path: str) -> RunFolder:
    """A shard's folder, locked so that no run changes it meanwhile."""
    if not (Path(path) / "run.json").is_file():
        raise InputError(f"{path}: no run.json, so this is not an output folder of labeling/main.py")
    return stack.enter_context(RunFolder(path))


def merge(folders: Sequence[RunFolder], output: RunFolder):
    """Raises ``InputError`` for shards of different runs, missing or repeated ones, unfinished ones, repeated pairs."""
    summaries = [folder.saved_summary() for folder in folders]
    with reading(f"{', '.join(str(folder.path) for folder in folders)}: a run.json", "it has to be labelling's"):
        settings = check_settings(folders, summaries)
        samples = int(settings["n"])
    states = [folder.read_state(samples) for folder in folders]
    for folder, summary, state in zip(folders, summaries, states, strict=True):
        with reading(folder.summary, "it has to be labelling's"):
            done, pairs = len(state.results) + len(state.failures), int(summary["counts"]["pairs"])
            summary["complete"], summary["usd"] = bool(summary["complete"]), summary["usd"] and float(summary["usd"])
        if not summary["complete"] or done != pairs * samples:
            raise InputError(f"{folder.path}: {done} of {pairs * samples} revisions and failures; finish this shard")
    settled = [np.unique(np.concatenate([state.results, state.failures])) for state in states]
    ids, counts = np.unique(np.concatenate(settled), return_counts=True)
    if counts.max(initial=1) > 1:
        raise InputError(f"pair {ids[np.argmax(counts)].decode()} is in more than one shard")

    output.bind(settings)
    if len(line_ids(output.results)) or len(line_ids(output.failures)):
        raise InputError(f"--output_dir {output.path}: holds revisions already; choose an empty folder")
    output.add_lines(output.results, lines_of(folder.results for folder in folders))
    output.add_lines(output.failures, lines_of(folder.failures for folder in folders))
    total = states[0]
    for state in states[1:]:
        total.unusable += state.unusable
        total.faults += state.faults
        for name in ("prompt_tokens", "completion_tokens", "usd", "usd_lost", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(state, name))
    results, failures = (sum(len(getattr(state, name)) for state in states) for name in ("results", "failures"))
    priced = all(summary["usd"] is not None for summary in summaries)
    usd = total.usd if priced else None
    totals = Totals(len(ids), results, failures, total, usd, total.usd_lost, total.seconds)
    summary = totals.summary(settings, {"merged": len(folders)}, complete=True, stopped=None)
    output.write_summary(summary)
    print(describe(summary, output.path))


def check_settings(folders: Sequence[RunFolder], summaries: Sequence[dict]) -> dict:
    """The common settings, with the shard ``1/1``. Raises ``InputError`` if they differ or a shard is missing."""
    first = {**summaries[0]["settings"], "shard": "1/1"}
    shards = []
    for folder, summary in zip(folders, summaries, strict=True):
        settings = summary["settings"]
        if "shard" not in settings:
            raise InputError(f"{folder.path}: not a shard (it was imported)")
        shards.append(Shard.parse(settings["shard"]))
        for name, value in {**settings, "shard": "1/1"}.items():
            if first.get(name) != value:
                raise InputError(f"{folder.path}: its {name} differs from that of {folders[0].path}")
    count = shards[0].count
    if any(shard.count != count for shard in shards):
        raise InputError(f"shards of different divisions: {', '.join(map(str, shards))}")
    indices = sorted(shard.index for shard in shards)
    missing = sorted(set(range(1, count + 1)) - set(indices))
    if missing:
        raise InputError(f"shards missing: {', '.join(f'{index}/{count}' for index in missing)}")
    if len(indices) > count:
        raise InputError(f"a shard is given twice: {', '.join(map(str, shards))}")
    return first


def lines_of(paths: Iterator[Path]) -> Iterator[str]:
    for path in paths:
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    yield line.rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
