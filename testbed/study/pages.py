"""study.html: the study's tables and figures on one page, from what results.json holds."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deepspeed_chat_tlcr.pictures import (
    Html,
    Series,
    bar_chart,
    columns,
    join,
    line_chart,
    number,
    origin,
    paragraph,
    point_chart,
    smooth,
    table_html,
    write_page,
)
from deepspeed_chat_tlcr.provenance import provenance
from testbed.study.analysis import band
from testbed.study.methods import AS_TLCR
from testbed.study.results import DECODINGS

NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "figa": "FIGA",
    "ppo_synthetic": "PPO_synthetic",
    "ppo_seq": "PPO_seq",
    "remax": "ReMax",
    "tlcr_fixed": "TLCR_fixed",
    "tlcr": "TLCR",
    "tlcr_positive_only": "positive only",
    "tlcr_negative_only": "negative only",
    "tlcr_released_code": "released code",
    "random": "random reward",
}
COLORS = {"sft": 0, "tlcr": 1, "ppo_seq": 2, "tlcr_fixed": 3, "ppo_synthetic": 4, "remax": 5, "dpo": 6, "figa": 7}
COLORS |= {"tlcr_positive_only": 2, "tlcr_negative_only": 3, "tlcr_released_code": 4, "random": 5}
"""Each method's colour, the same in every chart of curves."""
VARIANTS = {
    "paper": (
        "At the paper's settings",
        "The paper's KL coefficient, 0.1, and rewards as they are; each method at the grid's best learning rate.",
    ),
    "best": (
        "Each method at its best",
        "Learning rate, KL coefficient (DPO: beta) and reward scale as the grid chose them for each method.",
    ),
}
SCORES = {
    **{f"true score, {name}": (f"true_score {name}", 2) for name in DECODINGS},
    "best in training": ("best_true_score_in_training", 2),
    "last in training": ("last_true_score_in_training", 2),
    "at equal tokens": ("true_score_at_equal_tokens", 2),
}
COSTS = {
    "length": ("response_length", 1),
    "EOS": ("eos_rate", 2),
    "KL to SFT": ("kl", 2),
    "generated tokens": ("generated_tokens", 0),
    "seconds": ("seconds", 0),
}
"""Columns of the two tables: the measure's name in results.json, and decimals."""
CURVE_GROUPS = {
    "Table 1": ("ppo_synthetic", "ppo_seq", "remax", "tlcr_fixed", "tlcr"),
    "Figure 7": ("tlcr", "tlcr_positive_only", "tlcr_negative_only"),
    "Controls": ("tlcr", "tlcr_released_code", "random"),
}
"""Which methods share a chart of learning curves: few enough to tell apart."""
FIGURE_6 = ("ppo_seq", "tlcr_fixed", "tlcr")
SMOOTHING = 0.7
CURVES = {
    "true_score": ("true score of sampled answers", "true score", (1, 10)),
    "response_length": ("response length", "tokens", (0, None)),
    "kl": ("KL to SFT", "nats per response", (0, None)),
    "perplexity": ("perplexity of answers", "perplexity", (1, None)),
}
"""Charts of a measure over the updates: title, unit, and what the measure can be."""


def write_study_page(path: Path, results: Mapping) -> Path:
    """What is not there yet is said to be missing, never left out silently."""
    sections: list[tuple[str, object]] = []
    for variant, rows in results["tables"].items():
        records = [one for one in results["runs"] if one["variant"] == variant]
        heading, told = VARIANTS.get(variant, (variant, ""))
        absent = [NAMES[method] for method in results["settings"] if method not in rows]
        missing = [paragraph(f"No finished run: {', '.join(absent)}.", "quiet")] if absent and rows else []
        body = [paragraph(told), *missing, method_section(rows, results["comparisons"][variant])]
        sections.append((heading, join(body)))
        sections.append((f"Learning curves ({variant})", curve_section(records)))
        sections.append((f"What the rewards say ({variant})", reward_section(rows)))
    sections.append(("Sensitivity", sensitivity_section(results["sensitivity"])))
    sections.append(("The grid", grid_section(results["grid"], results["settings"])))
    sections.append(("Judges", judge_section(results["judges"])))
    sections.append(("The world", world_section(results)))
    each = (
        "each of which is another split of the same pairs and other models, tested on the same prompts: the intervals "
        "say what another training would bring, not other prompts"
        if results["world"].get("preferences")
        else "each seed being a world of its own"
    )
    lead = paragraph(
        "True scores on prompts that no method trained on and no setting was chosen on. Intervals are 95 %; methods "
        f"are compared seed by seed, {each}. Whatever sharpens a policy can raise its score at temperature 1, as "
        "sampling SFT colder does: a method is better than SFT only where its best decoding beats SFT's best.",
        "lead",
    )
    sections.append(("How this was made", origin(results.get("made") or provenance())))
    return write_page(path, "Which reward pays", sections, join([*verdicts(results["comparisons"]), lead]))


def verdicts(comparisons: Mapping[str, Mapping]) -> list[Html]:
    """For each variant, whether TLCR is better than SFT, above all greedily, where sampling SFT colder gains nothing;
    no word where it was not measured."""
    told = []
    for variant, compared in comparisons.items():
        found = {name: compared.get(name, {}).get("differences", {}).get("tlcr - sft") for name in DECODINGS}
        last = found[DECODINGS[-1]]
        if not last or last["low"] is None:
            continue
        words = "higher than" if last["low"] > 0 else "lower than" if last["high"] < 0 else "no other than"
        gaps = "; ".join(f"{difference(gap)} {name}" for name, gap in reversed(found.items()) if gap)
        heading = VARIANTS.get(variant, (variant, ""))[0]
        over = "the prompts of one seed" if last["unit"] == "prompt" else "seeds"
        sentence = f"{heading}, {DECODINGS[-1]} TLCR measures {words} SFT in true score."
        sentence += f" TLCR − SFT: {gaps} (95 % intervals over {over})."
        told.append(paragraph(sentence, "lead"))
    return told


def spread(entry: Mapping | None, digits: int = 2) -> str:
    """A mean with its standard deviation over seeds."""
    if entry is None:
        return "—"
    sd = entry["sd"]
    return number(entry["mean"], digits) + (
        f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(sd, digits)}" if sd is not None else ""
    )


def method_section(rows: Mapping[str, Mapping], compared: Mapping[str, Mapping]) -> Html:
    if not rows:
        return paragraph("No run has finished.", "quiet")
    counts = {row[f"true_score {DECODINGS[0]}"]["seeds"] for row in rows.values()}
    seeds = f"{max(counts)} seed" + "s" * (max(counts) > 1)
    if len(counts) > 1:
        seeds = f"{min(counts)} to {seeds}, as some runs are missing"
    scored = (
        f"Mean ± standard deviation over {seeds}. In training: the best five consecutive updates, and the last five, "
        "of the answers that the policy learns from; and five updates when as many tokens had been generated as by the "
        "method that generates fewest (ablations apart)."
    )
    spent = (
        "Length (tokens), EOS (share of answers that end by themselves) and KL to SFT (nats per response): at "
        "temperature 1. Generated tokens and seconds: of training."
    )
    return join(
        [
            paragraph(scored, "note"),
            summary_table(rows, SCORES),
            paragraph(spent, "note"),
            summary_table(rows, COSTS),
            score_bars(rows),
            *(difference_table(list(rows), compared[name]["differences"], name) for name in DECODINGS),
            win_table(compared[DECODINGS[0]]["win_rates"]),
        ]
    )


def summary_table(rows: Mapping[str, Mapping], measures: Mapping[str, tuple[str, int]]) -> Html:
    body = [
        [NAMES[method], *(spread(row.get(key), digits) for key, digits in measures.values())]
        for method, row in rows.items()
    ]
    return table_html(["method", *measures], body)


def score_bars(rows: Mapping[str, Mapping]) -> Html:
    """Table 1 as bars, one chart for each decoding on the same axis, with the intervals over seeds."""
    groups = [NAMES[method] for method in rows]
    drawn = {name: bars([row.get(f"true_score {name}") for row in rows.values()]) for name in DECODINGS}
    values = [value for heights, _ in drawn.values() for value in heights if value is not None]
    edges = [edge for _, whiskers in drawn.values() for pair in whiskers if pair for edge in pair]
    shared = (min(values + edges), max(values + edges))
    charts = [
        bar_chart(groups, {name: heights}, f"True score, {name}", "true score", {name: whiskers}, shared)
        for name, (heights, whiskers) in drawn.items()
    ]
    return columns(*charts, kind="charts")


def bars(entries: Sequence[Mapping | None]) -> tuple[list, list]:
    """Heights and whiskers of summaries, None where there is none."""
    values = [entry["mean"] if entry else None for entry in entries]
    return values, [tuple(entry["interval"]) if entry and entry["interval"] else None for entry in entries]


def difference_table(methods: Sequence[str], differences: Mapping[str, Mapping | None], decoding: str) -> Html:
    """Every method minus SFT, PPO_seq and TLCR_fixed: the claims that a reader looks for."""
    others = [method for method in ("sft", "ppo_seq", "tlcr_fixed") if method in methods]

    body = [[NAMES[method], *(difference(differences.get(f"{method} - {o}")) for o in others)] for method in methods]
    header = [f"{decoding}: paired difference of true score", *(f"minus {NAMES[other]}" for other in others)]
    return table_html(header, body, intervals_of(differences.values()))


def difference(found: Mapping | None) -> str:
    if found is None:
        return "—"
    low, high = found["low"], found["high"]
    shown = f"{found['difference']:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")
    return shown.replace("-", "−")


def intervals_of(differences: Iterable[Mapping | None]) -> str:
    warning = " One seed: the intervals are over its prompts, and say nothing of other worlds."
    return "With 95 % intervals." + warning * any(found and found["unit"] == "prompt" for found in differences)


def win_table(rates: Mapping[str, Mapping[str, float | None]]) -> Html:
    """Figure 4, by true score."""
    header = ["wins of … against, % at T=1", *(NAMES[method] for method in rates)]

    def cell(one: str, other: str) -> str:
        rate = rates[one][other]
        return "—" if one == other or rate is None else f"{100 * rate:.0f}"

    body = [[NAMES[one], *(cell(one, other) for other in rates)] for one in rates]
    return table_html(header, body, "Share of test prompts on which the row's answer truly scores higher; ties half.")


def curves(records: Sequence[Mapping], methods: Sequence[str], measure: str) -> list[Series]:
    """A line for each method, mean over seeds, its band one standard deviation."""
    series = []
    for method in methods:
        mine = [one.get("curve", {}).get(measure) for one in records if one["method"] == method]
        found = [curve for curve in mine if curve]
        if found:
            means, lows, highs = (smooth(line, SMOOTHING) for line in band(found))
            updates = list(range(1, len(means) + 1))
            series.append(Series(NAMES[method], updates, means, lows, highs, COLORS[method]))
    return series


def curve_section(records: Sequence[Mapping]) -> Html:
    text = "Means over seeds, smoothed over neighbouring updates; bands: one standard deviation."
    return join([paragraph(text, "note"), *(curve_group(name, records) for name in CURVE_GROUPS)])


def curve_group(name: str, records: Sequence[Mapping]) -> Html:
    """The curves of methods that are compared in one chart, and which of them have not been run."""
    run = {one["method"] for one in records}
    methods = [method for method in CURVE_GROUPS[name] if method in run]
    absent = [NAMES[method] for method in CURVE_GROUPS[name] if method not in run]
    told = [paragraph(f"{name}, not run: {', '.join(absent)}.", "quiet")] if absent else []
    if methods in ([], ["tlcr"]) and absent:  # TLCR alone is no comparison
        return join(told)
    charts = [
        line_chart(curves(records, methods, measure), f"{name}: {title}", "update", unit, limits=limits)
        for measure, (title, unit, limits) in CURVES.items()
    ]
    return join([columns(*charts), *told])


def reward_section(rows: Mapping[str, Mapping]) -> Html:
    """Figure 6: what the sequence reward model and the discriminator say of the policies' answers."""
    measures = {
        "sequence_reward": "sequence reward",
        "continuous_reward_sum": "token rewards, sum of 2D − 1",
        "discrete_reward_sum": "token rewards, sum of ±1",
    }
    methods = [method for method in FIGURE_6 if method in rows]
    charts = []
    for key, title in measures.items():
        values, whiskers = bars([rows[method].get(key) for method in methods])
        groups = [NAMES[method] for method in methods]
        charts.append(bar_chart(groups, {title: values}, f"Figure 6: {title}", "", {title: whiskers}))
    header = ["method", "KL to SFT", "true score, T=1", "reward per token 2D − 1", "sequence reward"]
    keys = ("kl", "true_score T=1", "token_reward", "sequence_reward")
    body = [[NAMES[method], *(spread(row.get(key), 3) for key in keys)] for method, row in rows.items()]
    caption = "True score at temperature 1 against the KL to SFT that it was paid with."
    table_1 = [method for method in rows if method not in AS_TLCR]
    charts.append(score_against_kl(rows, table_1, "True score against KL to SFT, T=1"))
    if len(table_1) < len(rows):
        others = ["sft", "tlcr", *(method for method in rows if method in AS_TLCR)]
        charts.append(score_against_kl(rows, others, "The same of ablations and controls"))
    return join([columns(*charts, kind="charts"), table_html(header, body, caption)])


def score_against_kl(rows: Mapping[str, Mapping], methods: Sequence[str], title: str) -> Html:
    scored = {method: rows[method] for method in methods if "kl" in rows.get(method, ())}
    points = [(NAMES[method], row["kl"]["mean"], row["true_score T=1"]["mean"]) for method, row in scored.items()]
    whiskers = [row["true_score T=1"]["interval"] for row in scored.values()]
    return point_chart(points, title, "KL to SFT, nats per response", "true score", whiskers)


def sensitivity_section(questions: Mapping[str, Mapping[str, Mapping | None]]) -> Html:
    """One chart for each question of which two levels or more are measured, the others being said to be missing; and
    all levels in a table, paired with the standard one."""
    charts, absent, body, differences = [], [], [], []
    for question, levels in questions.items():
        entries = [(row or {}).get("true_score T=1") for row in levels.values()]
        if sum(entry is not None for entry in entries) < 2:
            absent.append(question)
            continue
        values, whiskers = bars(entries)
        title = question[0].upper() + question[1:]
        charts.append(bar_chart(list(levels), {"T=1": values}, title, "true score, T=1", {"T=1": whiskers}))
        for level, row in levels.items():
            measured = row or {}
            differences.append(measured.get("difference"))
            costs = [spread(measured.get(COSTS[name][0]), COSTS[name][1]) for name in ("length", "KL to SFT")]
            body.append([f"{question}: {level}", spread(measured.get("true_score T=1")), difference(differences[-1])])
            body[-1] += [spread(measured.get("best_true_score_in_training")), *costs]
    told = [paragraph(f"Not run (--stage sensitivity): {', '.join(absent)}.", "quiet")] if absent else []
    if not charts:
        return join(told)
    header = ["varied", "true score, T=1", "minus TLCR's standard run", "best in training", "length", "KL to SFT"]
    lead = paragraph("TLCR, where nothing else is said, with one thing varied at a time.")
    return join([lead, *told, columns(*charts, kind="charts"), table_html(header, body, intervals_of(differences))])


def grid_section(grid: Mapping, settings: Mapping[str, Mapping[str, Mapping]]) -> Html:
    names = ("learning_rate", "kl", "reward_scale")
    tried_by = {method: [t["setting"] for t in grid["trials"] if t["method"] == method] for method in settings}
    chosen = [
        [f"{NAMES[method]}, {variant}", *(f"{setting[name]:g}" for name in names), at_edge(setting, tried_by[method])]
        for method, variants in settings.items()
        for variant, setting in variants.items()
    ]
    tried = [
        [NAMES[trial["method"]], *(f"{trial['setting'][name]:g}" for name in names), trial["true_score"], trial["kl"]]
        for trial in grid["trials"]
    ]
    header = ["learning rate", "KL coefficient", "reward scale"]
    text = (
        f"{len(grid['trials'])} of {grid['of']} trials are finished, on the world of seed {grid['seed']}, scored on "
        "validation prompts at T=1. A method whose trials are not all finished is reported at the default setting."
    )
    parts = [paragraph(text), table_html(["reported", *header, "at the grid's edge"], chosen)]
    if tried:
        table = table_html(["tried", *header, "true score", "KL to SFT"], tried)
        parts.append(Html(f"<details><summary>All trials</summary>{table}</details>"))
    return join(parts)


def at_edge(setting: Mapping[str, float], tried: Sequence[Mapping[str, float]]) -> str:
    """What of a chosen setting is the smallest or the largest that was tried: what lies beyond might be better."""
    words = {"learning_rate": "learning rate", "kl": "KL coefficient", "reward_scale": "reward scale"}
    found = []
    for name, word in words.items():
        values = sorted({one[name] for one in tried})
        if len(values) > 1 and setting[name] in (values[0], values[-1]):
            found.append(f"{word}: {'smallest' if setting[name] == values[0] else 'largest'}")
    return ", ".join(found)


def judge_section(judges: Sequence[Mapping]) -> Html:
    header = ["judge", "accuracy on edited tokens", "always the majority class", "AUROC", "pair accuracy", "margin"]
    keys = ("edited_accuracy", "majority_accuracy", "auroc", "pair_accuracy", "margin")
    names = [f"{one['judge'].replace('_', ' ')}, seed {one['seed']}" for one in judges]
    body = [[name, *map(one.get, keys)] for name, one in zip(names, judges, strict=True)]
    return table_html(header, body, digits=3) if body else paragraph("None is trained yet.", "quiet")


def world_section(results: Mapping) -> Html:
    def rows(told: Mapping) -> list[list[str]]:
        return [[name.replace("_", " "), words(value)] for name, value in told.items() if value is not None]

    def words(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    tables = [
        table_html(["world", "value"], rows(results["world"])),
        table_html(["scale", "value"], rows(results["scale"])),
    ]
    return columns(*tables)
