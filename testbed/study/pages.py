"""study.html: the study's tables and figures on one page, from what results.json holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from deepspeed_chat_tlcr.pictures import (
    Html,
    Series,
    bar_chart,
    columns,
    join,
    line_chart,
    number,
    paragraph,
    table_html,
    write_page,
)
from testbed.study.analysis import band
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
VARIANTS = {
    "paper": "At the paper's KL coefficient and rewards as they are, each method at its best learning rate",
    "best": "Each method at the best setting of its grid",
}
FIGURE_7 = {"tlcr": "TLCR", "tlcr_positive_only": "positive only", "tlcr_negative_only": "negative only"}
FIGURE_6 = ("ppo_seq", "tlcr_fixed", "tlcr")
CURVES = {
    "true_score": ("True score of the answers sampled in training", "true score"),
    "response_length": ("Response length", "tokens"),
    "kl": ("KL to SFT", "nats per response"),
    "perplexity": ("Perplexity of answers", ""),
}


def write_study_page(path: Path, results: Mapping) -> Path:
    """What is not there yet is said to be missing, never left out silently."""
    sections: list[tuple[str, object]] = []
    for variant, rows in results["tables"].items():
        records = [one for one in results["runs"] if one["variant"] == variant]
        sections.append((VARIANTS.get(variant, variant), method_section(rows, results["comparisons"][variant])))
        sections.append((f"Learning curves ({variant})", curve_section(records, list(rows))))
        sections.append((f"What the rewards say ({variant})", reward_section(rows)))
    sections.append(("Sensitivity of TLCR", sensitivity_section(results["sensitivity"])))
    sections.append(("The grid", grid_section(results["grid"], results["settings"])))
    sections.append(("Judges", judge_section(results["judges"])))
    sections.append(("The world", world_section(results)))
    lead = paragraph(
        "True scores on prompts that no method trained on and no setting was chosen on. Intervals are 95 %; methods "
        "are compared seed by seed, each seed being a world of its own.",
        "lead",
    )
    return write_page(path, "Which reward pays", sections, lead)


def spread(entry: Mapping | None, digits: int = 2) -> str:
    """A mean with its standard deviation over seeds."""
    if entry is None:
        return "—"
    sd = entry["sd"]
    return number(entry["mean"], digits) + (f" ± {number(sd, digits)}" if sd is not None else "")


def method_section(rows: Mapping[str, Mapping], compared: Mapping[str, Mapping]) -> Html:
    if not rows:
        return paragraph("No run has finished.", "quiet")
    header = ["method", *(f"true score, {name}" for name in DECODINGS), "best in training", "length", "EOS", "KL", "s"]
    keys = [f"true_score {name}" for name in DECODINGS]
    keys += ["best_true_score_in_training", "response_length", "eos_rate", "kl", "seconds"]
    body = [[NAMES[method], *(spread(row.get(key)) for key in keys)] for method, row in rows.items()]
    seeds = max(entry["seeds"] for row in rows.values() for entry in row.values())
    caption = f"Mean ± standard deviation over up to {seeds} seeds; s: seconds of training."
    return join(
        [
            table_html(header, body, caption),
            score_bars(rows),
            *(difference_table(list(rows), compared[name]["differences"], name) for name in DECODINGS),
            win_table(compared[DECODINGS[0]]["win_rates"]),
        ]
    )


def score_bars(rows: Mapping[str, Mapping]) -> Html:
    """Table 1 as bars, one chart for each decoding, with the intervals over seeds."""
    groups = [NAMES[method] for method in rows]
    charts = []
    for name in DECODINGS:
        values, whiskers = bars([row.get(f"true_score {name}") for row in rows.values()])
        charts.append(bar_chart(groups, {name: values}, f"True score, {name}", "true score", {name: whiskers}))
    return columns(*charts, kind="charts")


def bars(entries: Sequence[Mapping | None]) -> tuple[list, list]:
    """Heights and whiskers of summaries, None where there is none."""
    values = [entry["mean"] if entry else None for entry in entries]
    return values, [tuple(entry["interval"]) if entry and entry["interval"] else None for entry in entries]


def difference_table(methods: Sequence[str], differences: Mapping[str, Mapping | None], decoding: str) -> Html:
    """Every method minus SFT, PPO_seq and TLCR_fixed: the claims that a reader looks for."""
    others = [method for method in ("sft", "ppo_seq", "tlcr_fixed") if method in methods]

    def cell(method: str, other: str) -> str:
        found = differences.get(f"{method} - {other}")
        if found is None:
            return "—"
        if found["low"] is None:
            return f"{found['difference']:+.2f}"
        return f"{found['difference']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"

    units = {found["unit"] for found in differences.values() if found}
    warning = " One seed: the intervals are over its prompts, and say nothing of other worlds."
    body = [[NAMES[method], *(cell(method, other) for other in others)] for method in methods]
    header = [f"{decoding}: paired difference of true score", *(f"minus {NAMES[other]}" for other in others)]
    return table_html(header, body, "With 95 % intervals." + warning * ("prompt" in units))


def win_table(rates: Mapping[str, Mapping[str, float | None]]) -> Html:
    """Figure 4, by true score."""
    header = ["wins of … against, % at T=1", *(NAMES[method] for method in rates)]

    def cell(one: str, other: str) -> str:
        rate = rates[one][other]
        return "—" if one == other or rate is None else f"{100 * rate:.0f}"

    body = [[NAMES[one], *(cell(one, other) for other in rates)] for one in rates]
    return table_html(header, body, "Share of test prompts on which the row's answer truly scores higher; ties half.")


def curves(records: Sequence[Mapping], methods: Mapping[str, str], measure: str) -> list[Series]:
    """A line for each method, mean over seeds, its band one standard deviation."""
    series = []
    for method, name in methods.items():
        mine = [one.get("curve", {}).get(measure) for one in records if one["method"] == method]
        found = [curve for curve in mine if curve]
        if found:
            means, lows, highs = band(found)
            series.append(Series(name, list(range(1, len(means) + 1)), means, lows, highs))
    return series


def curve_section(records: Sequence[Mapping], methods: Sequence[str]) -> Html:
    all_methods = {method: NAMES[method] for method in methods}
    charts = [
        line_chart(curves(records, all_methods, measure), title, "update", unit, smoothing=0.7)
        for measure, (title, unit) in CURVES.items()
    ]
    seven = [
        line_chart(curves(records, FIGURE_7, measure), f"Figure 7: {title}", "update", unit, smoothing=0.7)
        for measure, (title, unit) in list(CURVES.items())[1:]
    ]
    return join([columns(*charts, kind="charts"), columns(*seven, kind="charts")])


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
    return join([columns(*charts, kind="charts"), table_html(header, body, "Score against the KL it was paid with.")])


def sensitivity_section(questions: Mapping[str, Mapping[str, Mapping | None]]) -> Html:
    charts = []
    for question, levels in questions.items():
        values, whiskers = bars([(row or {}).get("true_score T=1") for row in levels.values()])
        title = question[0].upper() + question[1:]
        charts.append(bar_chart(list(levels), {"T=1": values}, title, "true score", {"T=1": whiskers}))
    return columns(*charts, kind="charts")


def grid_section(grid: Mapping, settings: Mapping[str, Mapping[str, Mapping]]) -> Html:
    names = ("learning_rate", "kl", "reward_scale")
    chosen = [
        [f"{NAMES[method]}, {variant}", *(f"{setting[name]:g}" for name in names)]
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
    parts = [paragraph(text), table_html(["reported", *header], chosen)]
    if tried:
        parts.append(table_html(["tried", *header, "true score", "KL to SFT"], tried))
    return join(parts)


def judge_section(judges: Sequence[Mapping]) -> Html:
    header = ["judge", "accuracy on edited tokens", "always the commoner label", "AUROC", "pair accuracy", "margin"]
    keys = ("edited_accuracy", "majority_accuracy", "auroc", "pair_accuracy", "margin")
    names = [f"{one['judge'].replace('_', ' ')}, seed {one['seed']}" for one in judges]
    body = [[name, *map(one.get, keys)] for name, one in zip(names, judges, strict=True)]
    return table_html(header, body, digits=3) if body else paragraph("None is trained yet.", "quiet")


def world_section(results: Mapping) -> Html:
    told = {**results["world"], **results["scale"]}
    rows = [[name.replace("_", " "), str(value)] for name, value in told.items()]
    return table_html(["what", "value"], rows)
