"""The report of a whole run: one HTML file with its results, its curves and its token rewards, open anywhere."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.pictures import (
    Html,
    Sample,
    Series,
    columns,
    escape,
    explained,
    join,
    line_chart,
    missing_chart,
    origin,
    paragraph,
    sample_html,
    table_html,
    write_page,
)
from evaluation.curves import series_of
from evaluation.published import MEASURES

NAMES = {"sft": "SFT", "tlcr": "TLCR"}
STAGES = {
    "sft": "Step 1: supervised fine-tuning",
    "discriminator": "Step 2: token-level discriminator",
    "ppo": "Step 3: PPO with a reward for every token",
}
COLUMNS = {
    "true_score": "true score (1–10)",
    "response_length": "response length, tokens",
    "kl": "KL to SFT, nats per response",
    "entropy": "entropy, nats per response",
    "repeats": "answers that repeat a fact, %",
}
MEASURES_ALWAYS = ("edited_accuracy", "majority_accuracy")
COLORS = {"SFT": 0, "TLCR": 1}
"""Each policy's colour, the same in every chart."""
SHARE, POSITIVE = (0.0, 1.0), (0.0, None)
LABELS = ("positive", "negative", "neutral")
CHARTS = {
    "sft": [("Loss on responses", "nats per token", {"training": "train/loss", "held out": "eval/loss"}, POSITIVE)],
    "discriminator": [
        ("Loss (Eq. 6)", "binary cross-entropy", {"training": "train/loss", "held out": "eval/loss"}, POSITIVE),
        ("Held-out accuracy", "share of tokens", {MEASURES[key]: f"eval/{key}" for key in MEASURES_ALWAYS}, SHARE),
        ("Held-out reward by label", "mean 2D − 1", {name: f"eval/reward_{name}" for name in LABELS}, (-1.0, 1.0)),
    ],
    "ppo": [
        ("Reward per token", "mean 2D − 1", {"TLCR": "reward/per_token"}, (-1.0, 1.0)),
        ("KL to SFT", "nats per response", {"TLCR": "policy/kl"}, POSITIVE),
        ("Response length", "tokens", {"TLCR": "rollout/response_length"}, POSITIVE),
        ("Responses that end", "share with EOS", {"TLCR": "rollout/eos_rate"}, SHARE),
        ("Entropy", "nats per token", {"TLCR": "policy/entropy"}, POSITIVE),
        ("Value loss", "", {"": "value/loss"}, POSITIVE),
    ],
}
"""By stage, what is drawn over its steps: title, unit, metric by the name of its line, bounds of the values."""


def write_report(
    path: str | Path,
    results: Mapping,
    *,
    answers: Sequence[Sample] = (),
    revisions: Sequence[Sample] = (),
    metrics: Mapping[str, str | Path] | None = None,
    about: str = "",
    scores: Mapping[int, Sequence[float]] | None = None,
    world: str = "",
    made: Mapping[str, str] | None = None,
) -> Path:
    """Write the page and return its path. What is missing is named as missing, never left out silently.

    ``results``: what ``testbed.evaluate`` writes: policies such as ``sft`` and ``tlcr_best``, each with the measures of
    ``COLUMNS``; ``discriminator``; ``seconds`` by stage; what ``verdict`` and ``frontier_charts`` read. ``answers``:
    one prompt with several policies' answers each. ``revisions``: held-out pairs, labels beside rewards. ``metrics``: a
    stage's metrics.jsonl. ``about``: what was run. ``scores``: true scores of the answers that each step of PPO learnt
    from. ``world``: what the true score rewards. ``made``: where the numbers come from (``provenance``).
    """
    lead = join([paragraph(text, "lead") for text in (verdict(results), about) if text])
    sections = [
        ("Results", result_tables(results)),
        ("Beside colder sampling", frontier_charts(results)),
        ("Answers, token by token", _samples(answers, "reward", "No answers were given to this report.")),
        ("Held-out revisions", _samples(revisions, "label", "No held-out revisions were given to this report.")),
        ("Training", training_curves(metrics or {}, scores)),
    ]
    if world:
        sections.insert(1, ("What the true score rewards", paragraph(world)))
    if made:
        sections.append(("How this was made", origin(made)))
    return write_page(path, "TLCR: from preference pairs to a policy", sections, lead)


def policy_name(key: str, row: Mapping) -> str:
    """How a table calls a policy: ``sft_best`` at temperature 0.1 is "SFT, best T (0.1)"."""
    base = key.removesuffix("_best")
    name = NAMES.get(base, base)
    if not _known(row, "temperature"):
        return name
    return f"{name}, best T ({row['temperature']:g})" if key != base else f"{name}, T = {row['temperature']:g}"


def verdict(results: Mapping) -> str:
    """Whether TLCR gains what colder sampling of SFT does not, in a sentence; "" where it was not measured.

    It must lie above SFT's frontier at its KL and at its entropy alike, each with a 95 % interval over prompts.
    """
    over = [(results.get("tlcr_over_frontier") or {}).get(cost) or {} for cost in ("kl", "entropy")]
    if not all(_known(gap, "low") and _known(gap, "high") for gap in over):
        return ""
    if all(gap["low"] > 0 for gap in over):
        words = "TLCR scores higher than SFT sampled colder"
    elif all(gap["high"] < 0 for gap in over):
        words = "TLCR scores lower than SFT sampled colder"
    else:
        words = "TLCR does not differ measurably from SFT sampled colder"
    kl, entropy = (f"{gap['mean']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]" for gap in over)
    gain = ((results.get("tlcr_over_sft") or {}).get("best") or {}).get("mean")
    beside = "" if gain is None else f"; with both at their best temperature the difference is {gain:+.2f}"
    told = f"{words}: {kl} at its KL, {entropy} at its entropy, 95 % intervals over the prompts of one run{beside}."
    return told.replace("-", "−")


def result_tables(results: Mapping) -> Html:
    """Policies; then the discriminator beside the time by stage."""
    policies = {key: results.get(key) or {} for key in NAMES}
    policies |= {key: row for key, row in results.items() if isinstance(row, Mapping) and "true_score" in row}
    rows = [[policy_name(key, row), *(with_error(row, name) for name in COLUMNS)] for key, row in policies.items()]
    note = "Held-out prompts, ± standard error; the true score is never shown to training. “—”: not measured."
    judge = results.get("discriminator") or {}
    measured = [[words, judge.get(key)] for key, words in MEASURES.items() if key in judge or key in MEASURES_ALWAYS]
    times = [[stage, duration(value)] for stage, value in (results.get("seconds") or {}).items()]
    return join(
        [
            table_html(["policy", *COLUMNS.values()], rows, note),
            columns(
                table_html(["discriminator, held-out revisions", ""], measured, digits=3),
                table_html(["stage", "time"], times) if times else paragraph("Time by stage: not recorded.", "quiet"),
            ),
        ]
    )


def frontier_charts(results: Mapping) -> Html:
    """True score against what it costs: SFT at every temperature and as best-of-n, TLCR at 1 and at its best."""
    swept, tlcr = results.get("sft_sweep"), [results.get(key) or {} for key in ("tlcr", "tlcr_best")]
    if not swept or not all(_known(row, "entropy") for row in tlcr):
        return paragraph("SFT was not measured at several temperatures.", "quiet")
    sets = {"SFT at nine temperatures": (swept, 0), "TLCR at T = 1 and its best T": (tlcr, 1)}
    best_of_n = {"SFT, best of n by the discriminator": (results.get("sft_best_of_n") or [], 2)}
    charts = []
    for cost, title in (("kl", "KL to SFT"), ("entropy", "Entropy")):
        series = []
        for name, (rows, color) in (sets | best_of_n if cost == "kl" else sets).items():
            points = sorted((row[cost], row["true_score"]) for row in rows)
            series += [Series(name, *map(list, zip(*points, strict=True)), color=color)] if points else []
        charts.append(line_chart(series, f"True score against {title}", f"{title}, nats per response", "1 to 10"))
    kinds = {key: results[key].get("by_kind") or {} for key in ("sft_best", "tlcr_best") if results.get(key)}
    header = ["true score by what is new in the prompts", *next(iter(kinds.values()), {})]
    rows = [[policy_name(key, results[key]), *row.values()] for key, row in kinds.items()]
    return join([columns(*charts, kind="charts"), table_html(header, rows) if rows else Html("")])


def with_error(row: Mapping, name: str) -> object:
    """A measure with its standard error, where that is known; repeats in %."""
    scale = 100 if name == "repeats" else 1
    error = f"{name}_standard_error"
    if not _known(row, name) or not _known(row, error):
        return None if row.get(name) is None else scale * row[name]
    return f"{scale * row[name]:.2f} ± {scale * row[error]:.2f}"


def training_curves(metrics: Mapping[str, str | Path], scores: Mapping[int, Sequence[float]] | None = None) -> Html:
    """All charts of every stage; ``scores``: see write_report."""
    parts = []
    for stage, heading in STAGES.items():
        parts.append(Html(f"<h3>{escape(heading)}</h3>"))
        log = read_metrics(metrics[stage]) if stage in metrics else []
        if not log:
            parts.append(paragraph("No metrics.jsonl of this stage was found.", "quiet"))
            continue
        first = [true_score_chart(scores)] if stage == "ppo" and scores else []
        parts.append(columns(*first, *(draw(log, *chart) for chart in CHARTS[stage]), kind="charts"))
    return join(parts)


def draw(log: Sequence[Mapping], title: str, unit: str, lines: Mapping[str, str], limits: tuple) -> Html:
    """One of ``CHARTS`` over the lines of a metrics.jsonl. Long lines are smoothed, raw values left faintly behind."""
    series = []
    for line, key in lines.items():
        series += [replace(one, color=COLORS.get(line)) for one in series_of({line or title: log}, key)]
    if not series:
        return missing_chart(title, "not recorded")
    smoothing = 0.8 if max(len(one.x) for one in series) >= 50 else 0.0
    return line_chart(series, title, "step", unit, smoothing, limits=limits)


def true_score_chart(scores: Mapping[int, Sequence[float]]) -> Html:
    """The policy's true score over training, by step: the mean of that step's sampled answers ± standard error."""
    steps = sorted(scores)
    means = [statistics.fmean(scores[step]) for step in steps]
    errors = [statistics.stdev(scores[step]) / len(scores[step]) ** 0.5 for step in steps]
    low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
    title = "True score of the step’s answers ± standard error"
    return line_chart(
        [Series("TLCR", steps, means, low, high, COLORS["TLCR"])], title, "step", "1 to 10", limits=(1.0, 10.0)
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _samples(samples: Sequence[Sample], kind: Literal["reward", "label"], absent: str) -> Html:
    if not samples:
        return paragraph(absent, "quiet")
    legends = explained("label", "reward") if kind == "label" else explained("reward")
    return join([legends, *map(sample_html, samples)])


def _known(row: Mapping, key: str) -> bool:
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])
