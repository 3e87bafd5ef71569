"""The report of a whole run: one HTML file with its results, its curves and its token rewards, open anywhere."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.pictures import (
    Html,
    Sample,
    Series,
    cards,
    columns,
    escape,
    explained,
    join,
    line_chart,
    missing_chart,
    number,
    origin,
    paragraph,
    sample_html,
    table_html,
    write_page,
)
from deepspeed_chat_tlcr.pictures.charts import Limits
from evaluation.curves import series_of
from evaluation.published import MEASURES, PUBLISHED
from evaluation.sections import paper_table

Stage = Literal["sft", "discriminator", "ppo"]

NAMES = {"sft": "SFT", "tlcr": "TLCR"}
STAGES: dict[Stage, str] = {
    "sft": "Step 1: supervised fine-tuning",
    "discriminator": "Step 2: token-level discriminator",
    "ppo": "Step 3: PPO with a reward for every token",
}

MEASURES_ALWAYS = ("edited_accuracy", "majority_accuracy")


@dataclass(frozen=True)
class Run:
    """The ``metrics.jsonl`` of one run of a stage; ``name`` tells several runs of a stage apart."""

    stage: Stage
    path: str | Path
    name: str = ""


@dataclass(frozen=True)
class Chart:
    """Which metrics are drawn over the steps, by the names of their lines.

    ``limits``: the least and the greatest value that they can have.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    limits: Limits = (None, None)


COLORS = {"SFT": 0, "TLCR": 1}
"""Each policy's colour, the same in every chart."""
SHARE, POSITIVE = (0.0, 1.0), (0.0, None)


CHARTS: dict[Stage, list[Chart]] = {
    "sft": [Chart("Loss on responses", "nats per token", {"training": "train/loss", "held out": "eval/loss"})],
    "discriminator": [
        Chart("Loss (Eq. 6)", "binary cross-entropy", {"training": "train/loss", "held out": "eval/loss"}),
        Chart(
            "Held-out accuracy",
            "share of tokens",
            {
                "edited tokens": "eval/edited_accuracy",
                "always the majority class": "eval/majority_accuracy",
                "three classes": "eval/three_class_accuracy",
            },
            SHARE,
        ),
        Chart(
            "Held-out reward by label",
            "mean 2D − 1",
            {"positive": "eval/reward_positive", "negative": "eval/reward_negative", "neutral": "eval/reward_neutral"},
        ),
    ],
    "ppo": [
        Chart("Reward per token", "mean 2D − 1", {"TLCR": "reward/per_token"}, (-1.0, 1.0)),
        Chart("KL to SFT", "nats per response", {"TLCR": "policy/kl"}, POSITIVE),
        Chart("Response length", "tokens", {"TLCR": "rollout/response_length"}, POSITIVE),
        Chart("Responses that end", "share with EOS", {"TLCR": "rollout/eos_rate"}, SHARE),
        Chart("Entropy", "nats per token", {"TLCR": "policy/entropy"}, POSITIVE),
        Chart("Perplexity of responses", "", {"TLCR": "policy/perplexity", "SFT": "rollout/ref_perplexity"}),
        Chart(
            "Sign of the rewards",
            "share",
            {"positive": "reward/positive_share", "negative": "reward/negative_share"},
            SHARE,
        ),
        Chart("Value loss", "", {"": "value/loss"}, POSITIVE),
    ],
}


def write_report(
    path: str | Path,
    results: Mapping,
    *,
    answers: Sequence[Sample] = (),
    revisions: Sequence[Sample] = (),
    runs: Sequence[Run] = (),
    published: Mapping[str, Mapping[str, float]] = PUBLISHED,
    title: str = "TLCR: from preference pairs to a policy",
    about: str = "",
    scores: Mapping[int, Sequence[float]] | None = None,
    world: str = "",
    made: Mapping[str, str] | None = None,
) -> Path:
    """Write the page and return its path. What is missing is named as missing, never left out silently.

    ``results``: what ``results.json`` holds, ``{"sft": {"true_score", "response_length"}, "tlcr": {…, "kl"},
    "discriminator": {"edited_accuracy", "majority_accuracy", …}, "seconds": {stage: seconds}}``; further policies may
    stand beside ``sft`` and ``tlcr``, such as ``sft_best`` and ``tlcr_best`` with their ``temperature``; ``repeats`` is
    the share of answers that state a fact twice, ``tlcr_over_frontier`` what ``verdict`` reads. ``answers``: one prompt
    with several policies' answers each. ``revisions``: held-out pairs, labels beside rewards. ``about``: what was run,
    on what, in a sentence or two. ``scores``: true scores of the answers that each step of PPO learnt from. ``world``:
    what the true score rewards. ``made``: where the numbers come from (``provenance``).
    """
    words = [paragraph(text, "lead") for text in (verdict(results), about) if text]
    lead = join([*words, headline(results)])
    sections = [
        ("Results", result_tables(results)),
        ("Beside colder sampling", frontier_charts(results)),
        ("Answers, token by token", _samples(answers, "reward", "No answers were given to this report.")),
        ("Held-out revisions", _samples(revisions, "label", "No held-out revisions were given to this report.")),
        ("Training", training_curves(runs, scores)),
        ("The paper’s numbers", published_table(published)),
    ]
    if world:
        sections.insert(1, ("What the true score rewards", paragraph(world)))
    if made:
        sections.append(("How this was made", origin(made)))
    return write_page(path, title, sections, lead)


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


def headline(results: Mapping) -> Html:
    """The few figures a reader wants first, as far as they were measured."""
    tlcr, judge = (results.get(key) or {} for key in ("tlcr", "discriminator"))
    items = []
    for suffix, words in (("_best", ", both at their best temperature"), ("", ", at temperature 1")):
        sft, trained = (results.get(key + suffix) or {} for key in ("sft", "tlcr"))
        if _known(sft, "true_score") and _known(trained, "true_score"):
            gain = trained["true_score"] - sft["true_score"]
            sides = [f"{name}{_error(row, 'true_score')}" for name, row in (("SFT", sft), ("TLCR", trained))]
            shown = f"true score of 10, {' → '.join(sides)} ({gain:+.2f}){words}".replace("-", "−")
            items.append((f"{sft['true_score']:.2f} → {trained['true_score']:.2f}", shown))
    if _known(judge, "edited_accuracy"):
        base = (
            f" (always the majority class: {judge['majority_accuracy']:.2f})"
            if _known(judge, "majority_accuracy")
            else ""
        )
        items.append((f"{judge['edited_accuracy']:.2f}", f"discriminator’s accuracy on edited tokens{base}"))
    if _known(tlcr, "kl"):
        items.append((number(with_error(tlcr, "kl")), "KL of TLCR to SFT, nats per response"))
    if seconds := _seconds(results):
        items.append((duration(sum(seconds.values())), "all stages"))
    return cards(items) if items else Html("")


def result_tables(results: Mapping) -> Html:
    """Policies; then the discriminator beside the time by stage."""
    policies = {key: results.get(key) or {} for key in NAMES}
    policies |= {key: row for key, row in results.items() if isinstance(row, Mapping) and "true_score" in row}
    itself = {"sft": 0.0} if policies["sft"] else {}  # the SFT model's KL to itself
    columns_of = {"true_score": "true score (1–10)", "response_length": "response length, tokens"}
    columns_of["kl"] = "KL to SFT, nats per response"
    if any("repeats" in row for row in policies.values()):
        columns_of["repeats"] = "answers that repeat a fact, %"
    rows = [
        [policy_name(key, row), *(with_error({"kl": itself.get(key), **row}, name) for name in columns_of)]
        for key, row in policies.items()
    ]
    header = ["policy", *columns_of.values()]
    note = "Held-out prompts, ± standard error; the true score is never shown to training. “—”: not measured."
    judge = results.get("discriminator") or {}
    measured = [[words, judge.get(key)] for key, words in MEASURES.items() if key in judge or key in MEASURES_ALWAYS]
    seconds = _seconds(results)
    times = [[stage, duration(value)] for stage, value in seconds.items()]
    return join(
        [
            table_html(header, rows, note),
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
    sets = [("SFT at nine temperatures", swept, 0), ("TLCR at T = 1 and its best T", tlcr, 1)]
    best_of_n = ("SFT, best of n by the discriminator", results.get("sft_best_of_n") or [], 2)
    charts = []
    for cost, title in (("kl", "KL to SFT"), ("entropy", "Entropy")):
        lines = [*sets, best_of_n] if cost == "kl" else sets
        series = [
            Series(name, [row[cost] for row in rows], [row["true_score"] for row in rows], color=color)
            for name, rows, color in ((name, sorted(rows, key=lambda row: row[cost]), c) for name, rows, c in lines)
            if rows
        ]
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


def _error(row: Mapping, name: str) -> str:
    error = row.get(f"{name}_standard_error")
    return "" if error is None else f" ± {error:.2f}"


def training_curves(runs: Sequence[Run], scores: Mapping[int, Sequence[float]] | None = None) -> Html:
    """All charts of every stage; several runs of a stage are drawn over each other. ``scores``: see write_report."""
    parts = []
    for stage, heading in STAGES.items():
        parts.append(Html(f"<h3>{escape(heading)}</h3>"))
        logs = {run.name: read_metrics(run.path) for run in runs if run.stage == stage}
        if not any(logs.values()):
            parts.append(paragraph("No metrics.jsonl of this stage was found.", "quiet"))
            continue
        first = [true_score_chart(scores)] if stage == "ppo" and scores else []
        parts.append(columns(*first, *(draw(chart, logs) for chart in CHARTS[stage]), kind="charts"))
    return join(parts)


def draw(chart: Chart, logs: Mapping[str, Sequence[Mapping]], x_label: str = "step") -> Html:
    """One chart over the metrics of one or several runs (name: lines of its metrics.jsonl).

    Long lines are smoothed, their raw values left faintly behind.
    """
    series = []
    for run, log in logs.items():
        for line, key in chart.lines.items():
            lines = series_of({" · ".join(filter(None, (run, line))) or chart.title: log}, key)
            series += [replace(one, color=None if len(logs) > 1 else COLORS.get(line)) for one in lines]
    if not series:
        return missing_chart(chart.title, "not recorded")
    smoothing = 0.8 if max(len(one.x) for one in series) >= 50 else 0.0
    return line_chart(series, chart.title, x_label, chart.unit, smoothing, limits=chart.limits)


def true_score_chart(scores: Mapping[int, Sequence[float]]) -> Html:
    """The policy's true score over training, by step: the mean of that step's sampled answers ± standard error."""
    steps = sorted(scores)
    means = [statistics.fmean(scores[step]) for step in steps]
    errors = [statistics.stdev(scores[step]) / len(scores[step]) ** 0.5 for step in steps]
    low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
    line = Series("TLCR", steps, means, low, high, COLORS["TLCR"])
    return line_chart(
        [line], "True score of the step’s answers ± standard error", "step", "1 to 10", limits=(1.0, 10.0)
    )


def published_table(published: Mapping[str, Mapping[str, float]]) -> Html:
    """What the paper reports, Llama-2-7B on full-hh-rlhf, for comparison with runs at that scale."""
    if not published:
        return paragraph("None given.", "quiet")
    note = "Llama-2-7B on full-hh-rlhf: MT-Bench by turn, and AlpacaEval. Other data and models are on another scale."
    return paper_table("method", published, note)


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


def _seconds(results: Mapping) -> dict[str, float]:
    return {stage: value for stage, value in (results.get("seconds") or {}).items() if isinstance(value, int | float)}
