"""The report's chapters, each from a part's ``results.json`` to HTML, beside what the paper reports."""

from collections.abc import Mapping

from deepspeed_chat_tlcr.pictures import (
    Html,
    bar_chart,
    columns,
    join,
    number,
    paragraph,
    radar_chart,
    table_html,
)
from deepspeed_chat_tlcr.report import PUBLISHED

TURNS = ("turn 1", "turn 2", "overall")


def headline(found: Mapping[str, dict | None]) -> list[tuple[str, str]]:
    """The few figures a reader wants first, as far as they were measured."""
    items = []
    if bench := found.get("mt_bench"):
        name, row = max(bench["models"].items(), key=lambda entry: entry[1]["overall"] or 0)
        items.append((number(row["overall"]), f"MT-Bench, {name}: the best of {len(bench['models'])}"))
    return items


def interval(pair, digits: int = 2, percent: bool = False) -> str:
    """``low to high`` as a cell's text."""
    if not pair or pair[0] is None:
        return "—"
    scale = 100 if percent else 1
    return f"{pair[0] * scale:.{digits}f} to {pair[1] * scale:.{digits}f}".replace("-", "−")


def missing_note(results: dict) -> Html:
    """What kept a judged part from being complete, if anything."""
    parts = []
    if results.get("stopped"):
        parts.append(f"Stopped early ({results['stopped']}): the same command continues.")
    if results.get("missing"):
        parts.append(f"{results['missing']} of {results['verdicts']} verdicts are missing; averages leave them out.")
    if cut := {name: count for name, count in (results.get("empty_answers") or {}).items() if count}:
        parts.append("Empty answers: " + ", ".join(f"{name} {count}" for name, count in cut.items()) + ".")
    return paragraph(" ".join(parts), "note") if parts else Html("")


# ---- MT-Bench --------------------------------------------------------------------------------------------------------


def mt_bench_facts(results: dict) -> list:
    return ["ratings 1 to 10 of two-turn answers", results["questions"], results["judge"], results["usd"]]


def mt_bench(results: dict) -> Html:
    models = results["models"]
    own = table_html(
        ["this run", *TURNS, "95 % interval of overall"],
        [[name, *(row[turn] for turn in TURNS), interval(row["intervals"]["overall"])] for name, row in models.items()],
        f"{results['questions']} questions, rated by {results['judge']}; bootstrap over questions.",
    )
    paper = table_html(
        ["paper, Table 1", *TURNS],
        [[method, *(row.get(turn) for turn in TURNS)] for method, row in PUBLISHED.items()],
        "80 questions, rated by GPT-4.",
    )
    bars = bar_chart(
        TURNS,
        {name: [row[turn] for turn in TURNS] for name, row in models.items()},
        "Rating by turn",
        "1 to 10",
        {name: [whisker(row["intervals"][turn]) for turn in TURNS] for name, row in models.items()},
    )
    categories = results["categories"]
    by_category = {name: [row["categories"][c] for c in categories] for name, row in models.items()}
    radar = radar_chart(categories, by_category, "Rating by category", 10)
    parts = [columns(own, paper), missing_note(results), columns(bars, radar)]
    if results["differences"]:
        rows = [
            [f"{name} − {row['against']}", row["overall"], interval(row["interval"])]
            for name, row in results["differences"].items()
        ]
        note = "Paired: the same resampled questions for both models."
        parts.append(table_html(["difference", "overall", "95 % interval"], rows, note))
    table = table_html(
        ["category", *models], [[c, *(by_category[n][i] for n in models)] for i, c in enumerate(categories)]
    )
    return join([*parts, fold("Ratings by category as a table", table)])


def whisker(pair) -> tuple[float, float] | None:
    return (pair[0], pair[1]) if pair and pair[0] is not None else None


def fold(summary: str, body: Html) -> Html:
    """Details that open on a click."""
    return Html(f"<details><summary>{summary}</summary>{body}</details>")
