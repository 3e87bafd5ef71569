"""The report's chapter on the discriminator (7.2, Figure 8)."""

from collections.abc import Mapping, Sequence

from deepspeed_chat_tlcr.pictures import (
    Html,
    Series,
    bar_chart,
    columns,
    join,
    legend_html,
    line_chart,
    paragraph,
    table_html,
)
from evaluation.published import MEASURES
from evaluation.sections import counted, fold, nan, sample_of


def facts(results: dict) -> list:
    return ["D of tokens of held-out revisions", f"{results['tokens']:,} tokens"]


def chapter(results: dict) -> Html:
    measures = [[words, results.get(key)] for key, words in MEASURES.items()]
    measures.append(["calibration error (ECE), edited tokens", results["calibration"]["edited"]["ece"]])
    measures.append(["calibration error (ECE), all tokens, neutral = 0.5", results["calibration"]["all"]["ece"]])
    labels = ("negative", "neutral", "positive")
    counts = results["confusion"]
    note = (
        f"{counted(results['revisions'], 'held-out revision')} of {counted(results['prompts'], 'prompt')}, "
        f"{counted(results['tokens'], 'token')}; "
        "neutral: max(D, 1 − D) < 0.6."
    )
    parts = [
        columns(
            table_html(["held-out revisions", ""], measures, digits=3),
            table_html(
                ["label ↓  predicted →", *labels, "right"],
                [
                    [label, *row, share(row[i], sum(row))]
                    for i, (label, row) in enumerate(zip(labels, counts, strict=True))
                ],
                note,
            ),
        ),
        columns(
            reliability(results["calibration"]),
            by_place(results["by_place"]),
            by_kind(results["by_kind"]),
            kind="charts",
        ),
        fold("Accuracy by kind of token as a table", kinds_table(results["by_kind"])),
    ]
    if people := results.get("people"):
        parts.append(people_table(people))
    parts += [paragraph("Labels beside rewards of revisions that the discriminator has not seen (Figure 8).", "note")]
    parts += [legend_html("label"), legend_html(), *map(sample_of, results["samples"])]
    return join(parts)


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "—"


def reliability(calibration: dict) -> Html:
    """Mean target over mean D: on the diagonal where D is calibrated."""
    lines = [Series("calibrated", [0.0, 1.0], [0.0, 1.0])]
    for key, name in (("edited", "edited tokens"), ("all", "all, neutral = 0.5")):
        bins = calibration[key]["bins"]
        lines.append(Series(name, [one["mean_d"] for one in bins], [one["mean_target"] for one in bins]))
    return line_chart(lines, "Calibration: is D as often right as it says?", "D", "share positive", y_range=(0, 1))


def by_place(places: Sequence[dict]) -> Html:
    x = [(place + 0.5) / len(places) for place in range(len(places))]
    names = {"edited_accuracy": "discriminator", "majority_accuracy": "always the majority class"}
    lines = [Series(words, x, [nan(one[key]) for one in places]) for key, words in names.items()]
    return line_chart(lines, "Accuracy on edited tokens by place", "place (0 start, 1 end)", "share", y_range=(0, 1))


def by_kind(kinds: Mapping[str, dict]) -> Html:
    shown = {kind: row for kind, row in kinds.items() if row["edited"]}
    series = {
        "discriminator": [row["edited_accuracy"] for row in shown.values()],
        "always the majority class": [row["majority_accuracy"] for row in shown.values()],
    }
    return bar_chart(list(shown), series, "Accuracy on edited tokens by kind", "share")


def kinds_table(kinds: Mapping[str, dict]) -> Html:
    keys = ("tokens", "edited", "edited_accuracy", "majority_accuracy", "reward")
    header = ["kind of token", "tokens", "edited", "accuracy", "always the majority class", "mean reward"]
    return table_html(header, [[kind, *(row[key] for key in keys)] for kind, row in kinds.items()], digits=3)


def people_table(people: dict) -> Html:
    names = ("precision", "recall", "f1", "auroc")
    rows = [
        ["tokens with D < 0.5", *(people[name] for name in names)],
        ["always negative", *(people["always_negative"].get(name, 0.5) for name in names)],
    ]
    note = (
        f"Against the error spans that people marked in {people['responses']} answers, {people['tokens']:,} tokens of "
        f"which {people['marked']:,} lie in a span; AUROC of −r."
    )
    return table_html(["agreement with people", *names], rows, note, digits=3)
