"""What evaluation/main.py runs: each part where it has what it needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deepspeed_chat_tlcr.arguments import announce, record
from deepspeed_chat_tlcr.asking.redaction import without_secrets
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.locking import lock
from deepspeed_chat_tlcr.models import label_count
from deepspeed_chat_tlcr.records import read_json
from evaluation import alpaca_eval, curves, discriminator, mt_bench, reward_scores, side_by_side
from evaluation.judging import Shortfall, check_judge
from evaluation.options import Everything as Options
from evaluation.pairwise import read_pair_prompt
from evaluation.policies import parse_models
from evaluation.prompts import read_prompts
from evaluation.report import conclude


@dataclass(frozen=True)
class Step:
    """A part, the options that it needs (one of each list), how it runs, and what verdicts it lacks where it judges."""

    name: str
    needs: Sequence[Sequence[str]]
    run: Callable[[Options], Shortfall | None]


def for_rewards(options: Options) -> Options:
    """Reward scores are measured on held-out prompts of the training data, where that is given."""
    return replace(options, prompts=None) if options.data_path else options


STEPS = [
    Step("mt_bench", [["models"], ["mt_bench_dir"]], mt_bench.run),
    Step("alpaca_eval", [["models"], ["prompts", "data_path"], ["judge", "annotators_config"]], alpaca_eval.run),
    Step(
        "reward_scores",
        [["models"], ["prompts", "data_path"], ["discriminator", "sequence_reward"]],
        lambda options: reward_scores.run(for_rewards(options)),
    ),
    Step("curves", [["runs"]], curves.run),
    Step("discriminator", [["discriminator"], ["revisions"]], discriminator.run),
    Step("side_by_side", [["models"], ["prompts", "data_path", "show"]], side_by_side.run),
]


def missing(step: Step, options: Options) -> list[str]:
    """What a part lacks, as flags."""
    lacking = [names for names in step.needs if not any(getattr(options, name) for name in names)]
    return [" or ".join(f"--{name}" for name in names) for names in lacking]


def with_data_of_run(options: Options) -> Options:
    """The options with the data that ``--run_options`` names, where none is given.

    Raises ``InputError`` for a file that step 3 has not written.
    """
    if options.data_path or not options.run_options:
        return options
    try:
        saved = read_json(Path(options.run_options))
    except InputError as error:
        raise InputError(f"--run_options {error}") from None
    names = ("data_path", "data_split", "data_seed")
    found = {name: saved.get(name) for name in names} if isinstance(saved, dict) else {}
    paths, split, seed = map(found.get, names)
    as_written = isinstance(split, str) and type(seed) is int and isinstance(paths, list)
    if not as_written or not all(isinstance(path, str) for path in paths):
        raise InputError(
            f"--run_options {options.run_options}: no data_path, data_split and data_seed as step 3 writes them"
        )
    return replace(options, **found)


def check(options: Options) -> None:
    """Raise ``InputError`` for what cannot work, before the first model is loaded."""
    check_judge(options)
    if options.models:
        models = parse_models(options.models)
        if options.prompts or options.data_path:
            read_prompts(options, next(iter(models.values())))
    if options.mt_bench_dir:
        mt_bench.read_bench(options.mt_bench_dir, options.judge)
    if options.runs:
        curves.read_runs(options.runs)
    if options.revisions:
        discriminator.held_out_revisions(options)
    read_pair_prompt(options.judge_prompts)
    if options.annotators_config:
        alpaca_eval.package_command()
    for flag, labels in (("discriminator", 2), ("sequence_reward", 1)):
        path = getattr(options, flag)
        if path and label_count(path) != labels:
            raise InputError(f"--{flag} {path}: not a token classifier with {labels} label(s), as step 2 trains")


def evaluate(options: Options) -> int:
    """Every part that can be run, then the report; the exit code."""
    options = with_data_of_run(options)
    check(options)
    ready = [step for step in STEPS if not missing(step, options)]
    if not ready:
        lacks = "; ".join(f"{step.name} needs {', '.join(missing(step, options))}" for step in STEPS)
        raise InputError(f"nothing to evaluate: {lacks}")
    shown = replace(options, base_url=options.base_url and without_secrets(options.base_url))
    announce(shown)
    lacking: dict[str, Shortfall | None] = {}
    with lock(options.out, "--out"):
        record(shown, options.out)
        for step in STEPS:
            if step not in ready:
                print(f"{step.name}: left out, needs {', '.join(missing(step, options))}", flush=True)
                continue
            print(f"---- {step.name} ----", flush=True)
            lacking[step.name] = step.run(options)
        return conclude(options.out, lacking)
