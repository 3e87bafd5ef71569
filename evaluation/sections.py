"""The report's chapters, each from a part's ``results.json`` to HTML, beside what the paper reports."""

import math
from collections.abc import Mapping

from deepspeed_chat_tlcr.pictures import (
    Html,
    Sample,
    Series,
    TokenScores,
    bar_chart,
    columns,
    explained,
    join,
    line_chart,
    missing_chart,
    number,
    paragraph,
    point_chart,
    radar_chart,
    sample_html,
    table_html,
)
from evaluation.options import CURVES
from evaluation.published import PUBLISHED, PUBLISHED_REWARDS

TURNS = ("turn 1", "turn 2", "overall")


def headline(found: Mapping[str, dict | None]) -> list[tuple[str, str]]:
    """The few figures a reader wants first, as far as they were measured."""
    items = []
    if bench := found.get("mt_bench"):
        name, row = max(bench["models"].items(), key=lambda entry: entry[1]["overall"] or 0)
        rank = f", the highest of {len(bench['models'])}" if len(bench["models"]) > 1 else ""
        items.append(
            (number(row["overall"]), f"MT-Bench, {name}{rank} (95 %: {interval(row['intervals']['overall'])})")
        )
    if (alpaca := found.get("alpaca_eval")) and alpaca["head_to_head"]:
        row = alpaca["head_to_head"][0]
        gap = f"; {row['missing']} of {alpaca['questions']} prompts without a verdict" if row.get("missing") else ""
        words = (
            f"{row['model']} preferred to {row['against']} (95 %: {interval(row['interval'], 0, percent=True)}{gap})"
        )
        items.append((f"{number(percent(row['win_rate']), 0)} %", words))
    if votes := found.get("human"):
        name, part = max(((n, p) for n, p in votes["shares"].items() if n != "tie"), key=lambda entry: entry[1])
        words = f"of people’s votes for {name} (95 %: {interval(votes['intervals'][name], 0, percent=True)})"
        items.append((f"{number(percent(part), 0)} %", words))
    if judge := found.get("discriminator"):
        guess = number(judge["majority_accuracy"])
        words = f"discriminator’s accuracy on edited tokens (always the majority class: {guess})"
        items.append((number(judge["edited_accuracy"]), words))
    return items


def verdicts(found: Mapping[str, dict | None]) -> list[str]:
    """For each comparison that was made, in a sentence, whether the last model is better than the others."""
    told = []
    for name, row in ((found.get("mt_bench") or {}).get("differences") or {}).items():
        gap = f"MT-Bench {number(row['overall'])}, 95 % interval {interval(row['interval'])}"
        told.append(f"{name} is rated {compared(row['interval'], 0)} {row['against']} ({gap}).")
    alpaca = found.get("alpaca_eval") or {}
    for row in alpaca.get("head_to_head", []):
        if row["model"] == alpaca["models"][-1]:
            rate = f"{number(percent(row['win_rate']), 0)} % of prompts"
            gap = f"{rate}, 95 % interval {interval(row['interval'], 0, percent=True)}"
            told.append(f"{row['model']} is judged {compared(row['interval'], 0.5)} {row['against']} ({gap}).")
    return told


def compared(pair, even: float) -> str:
    if not pair or pair[0] is None:
        return "(no interval) against"
    return (
        "better than" if pair[0] > even else "worse than" if pair[1] < even else "not measurably better or worse than"
    )


def interval(pair, digits: int = 2, percent: bool = False) -> str:
    """``low to high`` as a cell's text."""
    if not pair or pair[0] is None:
        return "—"
    scale = 100 if percent else 1
    low, high = (number(edge * scale, digits) for edge in pair)
    return f"{low}\u00a0to\u00a0{high}"


def missing_note(results: dict) -> Html:
    """What kept a judged part from being complete, if anything."""
    parts = []
    if results.get("stopped"):
        parts.append(f"Stopped early ({results['stopped']}): the same command continues.")
    if results.get("missing"):
        parts.append(f"{results['missing']} of {results['verdicts']} verdicts are missing; averages leave them out.")
    if cut := {name: count for name, count in (results.get("empty_answers") or {}).items() if count}:
        counts = ", ".join(f"{name} {count}" for name, count in cut.items())
        parts.append(f"Empty answers: {counts} (ended at once, or no room left behind the prompt).")
    return paragraph(" ".join(parts), "note") if parts else Html("")


# ---- MT-Bench --------------------------------------------------------------------------------------------------------


def mt_bench_facts(results: dict) -> list:
    measured = "ratings 1 to 10 of two-turn answers"
    return [measured, counted(results["questions"], "question"), results["judge"], results["usd"]]


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
    left = [own]
    if results["differences"]:
        rows = [
            [f"{name} − {row['against']}", row["overall"], interval(row["interval"])]
            for name, row in results["differences"].items()
        ]
        note = "Paired: the same resampled questions for both models."
        left.append(table_html(["difference", "overall", "95 % interval"], rows, note))
    rows = [[category, *(by_category[name][place] for name in models)] for place, category in enumerate(categories)]
    table = fold("Ratings by category as a table", table_html(["category", *models], rows))
    left.append(missing_note(results))
    return join([columns(Html(f"<div>{join(left)}</div>"), paper), columns(bars, radar), table])


# ---- AlpacaEval ------------------------------------------------------------------------------------------------------


def alpaca_eval_facts(results: dict) -> list:
    judges = [name for name in (results["judge"], results["annotators_config"]) if name]
    spent = [usd for usd in (results["usd"], *(row.get("usd") for row in results["package"])) if usd is not None]
    items = counted(results["questions"], "prompt")
    return ["win rates, two answers to one prompt", items, ", ".join(judges), sum(spent) if spent else None]


def alpaca_eval(results: dict) -> Html:
    rows = results["head_to_head"]
    parts = [missing_note(results)]
    chart = Html("")
    if rows:
        last = results["models"][-1]
        own = [row for row in rows if row["model"] == last]  # as the paper draws its own method against each other
        rates = {"preferred": [percent(row["win_rate"]) for row in own]}
        ranges = {"preferred": [whisker([percent(edge) for edge in row["interval"]]) for row in own]}
        chart = bar_chart([row["against"] for row in own], rates, f"{last} preferred to", "% of prompts", ranges)
        header = ["head to head", "win rate, %", "95 % interval", "wins", "ties", "losses", "p"]
        header += ["first shown preferred, %", "longer preferred, %", "orders disagree", "left out"]
        note = (
            f"{results['questions']} prompts, each pair of answers judged in both orders by {results['judge']}. A win: "
            "preferred in one order and not beaten in the other; ties count half; Wilson intervals, exact sign test. "
            "First shown preferred: 50 % is no position bias; where the orders disagree the item is a tie. Longer "
            "preferred: of the verdicts, the share for the answer of more characters; far from 50 %, length may decide."
        )
        table = [
            [
                f"{row['model']} against {row['against']}",
                percent(row["win_rate"]),
                interval(row["interval"], 1, percent=True),
                *(row[key] for key in ("wins", "ties", "losses")),
                number(row["p_value"], 3),
                percent(row["first_shown_preferred"]),
                percent(row.get("longer_preferred")),
                *(row[key] for key in ("inconsistent", "missing")),
            ]
            for row in rows
        ]
        parts += [table_html(header, table, digits=1), paragraph(note, "note")]
    if package := results["package"]:
        parts.append(package_table(package, results["annotators_config"]))
    published = {
        method: {"TLCR preferred, %": row["TLCR preferred, %"]}
        for method, row in PUBLISHED.items()
        if "TLCR preferred, %" in row
    }
    paper = paper_table("paper, Figure 4: against", published)
    return join([*parts, columns(chart, paper) if chart else paper])


def package_table(rows: list[dict], judge: str) -> Html:
    """What the package alpaca_eval says; length-controlled rates where it was asked for them."""
    header = ["alpaca_eval’s own", "against", "win rate, %", "standard error", "length-controlled, %", "items", "US$"]
    table = [
        [
            row["model"],
            row["reference"],
            *(percent(row.get(key)) for key in ("win_rate", "standard_error", "length_controlled")),
            row["items"],
            None if row.get("usd") is None else number(row["usd"]),
        ]
        for row in rows
    ]
    return table_html(header, table, f"Judged by the package with {judge}.", 1)


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


# ---- human votes -----------------------------------------------------------------------------------------------------


def human_facts(results: dict) -> list:
    people = "1 person" if results["annotators"] == 1 else f"{results['annotators']} people"
    return [f"votes of {people}", counted(results["items"], "item"), "people"]


def human(results: dict) -> Html:
    names = list(results["shares"])
    bars = bar_chart(
        names,
        {"share": [percent(results["shares"][name]) for name in names]},
        "Preferred answers",
        "% of votes",
        {"share": [whisker([percent(edge) for edge in results["intervals"][name]]) for name in names]},
    )
    kappa = results["fleiss_kappa"]
    agreement = "one annotator: no agreement to measure" if kappa is None else f"Fleiss’ kappa {number(kappa, 3)}"
    shares = table_html(
        ["preferred", "share, %", "95 % interval", *results["by_annotator"]],
        [
            [
                name,
                percent(results["shares"][name]),
                interval(results["intervals"][name], 1, percent=True),
                *(percent(row[name]) for row in results["by_annotator"].values()),
            ]
            for name in names
        ],
        f"{results['votes']} votes of {results['annotators']} annotators on {results['items']} items; {agreement}. "
        "Blind, answers shuffled for every item. Intervals: items resampled.",
        digits=1,
    )
    missing = f"Missing annotators: {', '.join(results['absent'])}."
    absent = paragraph(missing, "note") if results["absent"] else Html("")
    paper = paragraph("Paper, Figure 5: 45.23 % of the votes for TLCR.", "note")
    return join([columns(bars, shares), absent, paper])


# ---- side by side ----------------------------------------------------------------------------------------------------


def side_by_side_facts(results: dict) -> list:
    return [f"answers of {counted(len(results['models']), 'model')}", counted(len(results["samples"]), "prompt")]


def side_by_side(results: dict) -> Html:
    if not results["discriminator"]:
        note = "No --discriminator was given: answers without rewards."
        return join([paragraph(note, "note"), *map(sample_of, results["samples"])])
    return join([explained("reward"), *map(sample_of, results["samples"])])


# ---- reward scores ---------------------------------------------------------------------------------------------------


def reward_scores_facts(results: dict) -> list:
    models, rewards = counted(len(results["models"]), "model"), counted(len(results["rewards"]), "reward")
    return [f"answers of {models} under {rewards}", counted(results["prompts"], "prompt")]


def reward_scores(results: dict) -> Html:
    models, rewards = results["models"], results["rewards"]

    def chart(key: str, title: str, unit: str) -> Html:
        values = {name: [row["rewards"][one][key] for one in rewards] for name, row in models.items()}
        ranges = {
            name: [whisker(row["rewards"][one][f"{key}_interval"]) for one in rewards] for name, row in models.items()
        }
        return bar_chart(rewards, values, title, unit, ranges)

    header = ["model", "length, tokens", "end themselves"]
    header += [words for one in rewards for words in (f"{one}: sum", "per token")]
    rows = [
        [name, row["response_length"], f"{100 * row['ended']:.0f} %"]
        + [row["rewards"][one][key] for one in rewards for key in ("sum", "per_token")]
        for name, row in models.items()
    ]
    note = (
        f"{results['prompts']} prompts, one answer each at temperature {results['temperature']:g}; sums are means over "
        "answers and grow with length, per token is over all tokens; 95 % bootstrap intervals over prompts. "
        "Discrete: ±1, and 0 where max(D, 1 − D) < 0.6; continuous: 2D − 1."
    )
    parts = [
        columns(
            chart("sum", "Reward per answer", "mean sum"),
            chart("per_token", "Reward per token", "mean"),
        ),
        table_html(header, rows, note),
    ]
    if absent := [name for name in ("discriminator", "sequence_reward") if not results[name]]:
        parts.append(paragraph(f"Missing: no --{' and no --'.join(absent)} was given.", "note"))
    return join([*parts, paper_table("paper, Figure 6", PUBLISHED_REWARDS)])


def paper_table(corner: str, published: Mapping[str, Mapping[str, float]], caption: object = "") -> Html:
    """Numbers of the paper, a row for each method."""
    names = list(dict.fromkeys(name for row in published.values() for name in row))
    rows = [[method, *(row.get(name) for name in names)] for method, row in published.items()]
    return table_html([corner, *names], rows, caption)


# ---- curves ----------------------------------------------------------------------------------------------------------


def curves_facts(results: dict) -> list:
    metrics, runs = counted(len(results["charts"]), "metric"), counted(len(results["runs"]), "run")
    return [f"{metrics} of {runs}", counted(max(results["runs"].values()), "step")]


def curves(results: dict) -> Html:
    drawn = []
    for chart in results["charts"]:
        lines = [Series(one["name"], one["x"], [nan(y) for y in one["y"]]) for one in chart["series"]]
        drawn.append(line_chart(lines, chart["title"], "step", chart["unit"], results["smoothing"]))
    titles = [CURVES.get(key, (key, ""))[0] for key in results["absent"]]
    drawn += [missing_chart(title, "not recorded by any run") for title in titles]
    if both := results.get("frontier"):
        points = [(name, *place) for name, place in both["points"].items()]
        drawn.append(point_chart(points, "Frontier of two objectives", *both["keys"], line=both["on"]))
    note = "Lines are smoothed, with the raw values behind them. " if results["smoothing"] else ""
    return join([columns(*drawn, kind="charts"), paragraph(f"{note}The same charts as PNG are in curves/.", "note")])


# ---- shared ---------------------------------------------------------------------------------------------------------


def sample_of(record: dict) -> Html:
    texts = [TokenScores(**text) for text in record["texts"]]
    return sample_html(Sample(record["prompt"], texts, record.get("title", ""), record.get("note", "")))


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + "s" * (count != 1)


def nan(value: float | None) -> float:
    """JSON's null as a chart's gap."""
    return math.nan if value is None else value


def whisker(pair) -> tuple[float, float] | None:
    return (pair[0], pair[1]) if pair and pair[0] is not None else None


def fold(summary: str, body: Html) -> Html:
    """Details that open on a click."""
    return Html(f"<details><summary>{summary}</summary>{body}</details>")
