"""study.html: what a study decided and what it is read from, on one page, from what results.json holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.pictures import (
    Html,
    Series,
    columns,
    join,
    line_chart,
    number,
    origin,
    paragraph,
    point_chart,
    table_html,
    write_page,
)
from deepspeed_chat_tlcr.provenance import provenance
from testbed.measures import interval
from testbed.study.results import at_equal_tokens, collapses, of_method

COLUMNS = {
    "score, best T": ("score", None, 2),
    "T = 1": ("score", "1", 2),
    "over SFT at its KL": ("over_kl", None, 2),
    "over SFT at its entropy": ("over_entropy", None, 2),
    "KL": ("kl", None, 1),
    "entropy": ("entropy", None, 1),
    "length": ("response_length", None, 1),
    "repeats": ("repeats", None, 2),
    "repeats, T = 1": ("repeats", "1", 2),
}
"""Columns of the main tables: a measure of ``of_method``, the decoding (None: each run's best), decimals."""
JUDGES = ("edited_accuracy", "majority_accuracy", "auroc", "pair_accuracy", "pair_accuracy_ceiling")


def write_study_page(path: Path, results: Mapping) -> Path:
    """What is not there yet is said to be missing, never left out silently."""
    told, runs = results["registration"], results["runs"]
    lead = [paragraph(sentence, "lead") for sentence in verdicts(results)]
    if not runs:
        lead = [paragraph("No run has finished: settings are chosen first, and frozen.", "lead")]
    sections: list[tuple[str, object]] = [("What was asked, and what came out", families(results))]
    for stage, methods in told["stages"].items():
        sections.append((f"Stage {stage}: equal optimiser steps", stage_section(results, methods)))
    sections.append(("Equal tokens", token_section(results)))
    sections.append(("Beside colder sampling and best-of-n", frontier_section(results)))
    sections.append(("Learning curves", curve_section(results)))
    sections.append(("Judges", judge_section(results["judges"])))
    sections.append(("The grid", grid_section(results)))
    sections.append(("The rules, as registered", rules_section(results)))
    sections.append(("How this was made", origin(results.get("made") or provenance())))
    return write_page(path, told["title"], sections, join(lead))


def title(results: Mapping, name: str) -> str:
    """How a method, or a difference of two, is called."""
    titles = results["registration"]["titles"]
    return " − ".join(titles.get(part, part) for part in name.split(" - "))


def verdicts(results: Mapping) -> list[str]:
    """For each family, what held after correction, in a sentence."""
    sentences = []
    for name, rows in results["families"].items():
        decided = [row for row in rows if row.get("verdict") not in (None, "undecided")]
        told = "; ".join(f"{title(results, row['of'])}: {row['verdict']}" for row in decided)
        if any(row["p"] is not None for row in rows):
            sentences.append(f"{name[0].upper()}{name[1:]}: {told or 'nothing is decided'}.")
    return sentences


def told_interval(found: Mapping | None) -> str:
    if not found:
        return "—"
    low = f" [{found['low']:+.2f}, {found['high']:+.2f}]" if "low" in found else ""
    return f"{found['mean']:+.2f}{low}".replace("-", "−")


def families(results: Mapping) -> Html:
    """A table for each family: the comparisons, their intervals, p before and after correction, the verdict."""
    parts = []
    names = {"score": "difference of scores", "over_kl": "at equal KL", "over_entropy": "at equal entropy"}
    for name, rows in results["families"].items():
        kept = [measure for measure in names if any(measure in row for row in rows)]
        header = [name, *(names[measure] for measure in kept), "p", "p, Holm", "verdict"]
        body = [
            [
                title(results, row["of"]),
                *(told_interval(row.get(measure)) for measure in kept),
                *("—" if row.get(p) is None else f"{row[p]:.4f}" for p in ("p", "p_corrected")),
                row.get("verdict", "not run on two seeds"),
            ]
            for row in rows
        ]
        parts.append(table_html(header, body))
    return join(parts) if parts else paragraph("Nothing is decided yet.", "quiet")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "—"
    sd = (
        f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(float(np.std(values, ddof=1)), digits)}"
        if len(values) > 1
        else ""
    )
    return number(float(np.mean(values)), digits) + sd


def stage_section(results: Mapping, methods: Sequence[str]) -> Html:
    runs = results["runs"]
    shown = ["sft", *(name for name in methods if name != "sft")]
    done = [name for name in shown if any(run["method"] == name for run in runs)]
    if not set(done) & set(methods):
        return paragraph("No run has finished.", "quiet")
    body = []
    for name in done:
        mine = [run for run in runs if run["method"] == name]
        cells = [
            spread(list(of_method(runs, name, measure, decoding).values()), digits)
            for measure, decoding, digits in COLUMNS.values()
        ]
        best = ", ".join(dict.fromkeys(run["best"] for run in mine))
        seconds = [run["seconds"] for run in mine if run["seconds"]]
        body.append([title(results, name), *cells, best, spread(seconds, 0), str(len(mine))])
    note = (
        "Mean ± standard deviation over seeds; true score 1 to 10, each run at the temperature that its validation "
        "prompts chose (best T), KL and entropy in nats per response."
    )
    header = ["method", *COLUMNS, "best T", "seconds", "seeds"]
    absent = [title(results, name) for name in shown if name not in done]
    missing = [paragraph(f"No finished run: {', '.join(absent)}.", "quiet")] if absent else []
    return join([*missing, table_html(header, body, note), kinds_table(results, done)])


def kinds_table(results: Mapping, methods: Sequence[str]) -> Html:
    """True scores by what is new in the prompts."""
    rows = {name: of_method(results["runs"], name, "by_kind") for name in methods}
    kinds = list(dict.fromkeys(kind for row in rows.values() for of in row.values() for kind in of))
    body = [
        [title(results, name), *(spread([of[k] for of in row.values()], 2) for k in kinds)]
        for name, row in rows.items()
    ]
    return table_html(["new in the prompt", *kinds], body)


def token_section(results: Mapping) -> Html:
    """Scores in training once every method had generated as many tokens as the thriftiest of its seed."""
    found = at_equal_tokens(results["runs"])
    if not found:
        return paragraph("No run of RL has finished.", "quiet")
    tokens = {run["method"]: [] for run in results["runs"]}
    for run in results["runs"]:
        tokens[run["method"]] += [run["tokens"]] if run["tokens"] else []
    body = [[title(results, name), spread(list(of.values()), 2), spread(tokens[name], 0)] for name, of in found.items()]
    note = (
        "True score of the answers that RL learnt from, temperature 1, mean of five updates, when it had generated as "
        "many tokens as the method of its seed that generates fewest; and all that it generated. DPO and FIGA learn "
        "from as many answers as RL in the other tables."
    )
    return table_html(["method", "score at equal tokens", "tokens in all"], body, note)


def frontier_section(results: Mapping) -> Html:
    """Score against KL and against entropy: SFT at nine temperatures and as best-of-n, every method's best decoding."""
    runs = results["runs"]
    sft = [run for run in runs if run["method"] == "sft"]
    if not sft:
        return paragraph("SFT is not measured yet.", "quiet")

    def over_seeds(rows: Sequence[Sequence[Mapping]], measure: str) -> list[float]:
        return [float(np.mean([row[measure] for row in same])) for same in zip(*rows, strict=True)]

    swept = [list(run["decodings"].values()) for run in sft]
    parts = []
    for cost, words in (("kl", "KL to SFT"), ("entropy", "entropy")):
        series = [Series("SFT, nine temperatures", over_seeds(swept, cost), over_seeds(swept, "true_score"))]
        for judge in sft[0]["best_of"] if cost == "kl" else ():
            rows = [run["best_of"][judge] for run in sft]
            name = f"best of n by the {judge.replace('_', ' ')}"
            series.append(Series(name, over_seeds(rows, "kl"), over_seeds(rows, "true_score")))
        parts.append(line_chart(series, f"SFT: score against {words}", f"{words}, nats per response", "true score"))
        points, whiskers = [], []
        for name in dict.fromkeys(run["method"] for run in runs):
            scores = list(of_method(runs, name).values())
            points.append(
                (
                    title(results, name),
                    float(np.mean(list(of_method(runs, name, cost).values()))),
                    float(np.mean(scores)),
                )
            )
            ends = interval(scores)
            whiskers.append((ends["low"], ends["high"]) if "low" in ends else None)
        label = f"{words}, nats per response"
        parts.append(
            point_chart(points, f"All methods at their best: score against {words}", label, "true score", whiskers)
        )
    return columns(*parts, kind="charts")


def curve_section(results: Mapping) -> Html:
    """True score in training, mean over seeds, by stage; and when a run first fell below half of its best."""
    parts, fallen = [], []
    for stage in results["registration"]["stages"]:
        series = []
        for name in dict.fromkeys(run["method"] for run in results["runs"] if run["stage"] == stage):
            mine = [run for run in results["runs"] if run["method"] == name and run.get("curve", {}).get("true_score")]
            if not mine:
                continue
            shortest = min(len(run["curve"]["true_score"]) for run in mine)
            means = np.mean([run["curve"]["true_score"][:shortest] for run in mine], 0)
            series.append(Series(title(results, name), list(range(1, shortest + 1)), means.tolist()))
            falls = [str(collapses(run) or "never") for run in mine]
            fallen.append([title(results, name), ", ".join(falls)])
        if series:
            parts.append(line_chart(series, f"Stage {stage}", "update", "true score, T = 1", 0.7))
    if not parts:
        return paragraph("No run of RL has finished.", "quiet")
    note = "The update at which the mean of five updates fell below half of its best so far (above 1), by seed."
    return join([columns(*parts, kind="charts"), table_html(["method", "fell at"], fallen, note)])


def judge_section(judges: Sequence[Mapping]) -> Html:
    body = [[f"{one['judge'].replace('_', ' ')}, seed {one['seed']}", *map(one.get, JUDGES)] for one in judges]
    header = ["judge", *(name.replace("_", " ") for name in JUDGES)]
    note = "The ceiling: the accuracy of who knows every true score; the rest is noise of the preferences."
    return table_html(header, body, note, digits=3) if body else paragraph("None is trained yet.", "quiet")


def grid_section(results: Mapping) -> Html:
    grid, frozen = results["grid"], results["frozen"]
    models = [
        [
            f"{row['start']}, rate {row['learning_rate']:g}, {row['epochs']} epochs, {row['positions']}",
            spread(row["pair_accuracies"], 3),
        ]
        for row in grid["reward_models"]
    ]
    chosen = frozen["settings"] if frozen else {}
    trials = [
        [
            title(results, row["method"]),
            f"{row['learning_rate']:g}",
            f"{row['kl']:g}",
            ", ".join(f"{score:.2f}" for score in row["scores"]) or "—",
            "chosen" if chosen.get(row["method"]) == {"learning_rate": row["learning_rate"], "kl": row["kl"]} else "",
        ]
        for row in grid["trials"]
    ]
    text = "Frozen." if frozen else "Not finished, so nothing is frozen."
    return join(
        [
            paragraph(text),
            table_html(["reward model", "pair accuracy"], models),
            table_html(["tried", "learning rate", "KL coefficient", "validation scores by world", ""], trials),
        ]
    )


def rules_section(results: Mapping) -> Html:
    rules = [[name.replace("_", " "), str(rule)] for name, rule in results["registration"]["rules"].items()]
    told = {**results["world"], **results["scale"], "registration": results["registration"]["digest"]}
    sizes = [[name.replace("_", " "), str(value)] for name, value in told.items()]
    return columns(table_html(["rule", ""], rules), table_html(["world and sizes", ""], sizes))
