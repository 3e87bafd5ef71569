"""results.json of a study: every run with its setting, and the comparisons between methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from testbed.study.analysis import (
    best_of_curve,
    interval,
    mean_and_sd,
    paired_difference,
    score_at_tokens,
    win_rate,
)
from testbed.study.artefacts import Output, Step, Store
from testbed.study.methods import AS_TLCR, Condition, Setting

DECODINGS = ("T=1", "T=0.7", "greedy")


@dataclass(frozen=True)
class Run:
    """One method, one seed, one setting."""

    method: str
    variant: str  # "paper": KL 0.1 and the reward as it is; "best": the best of the grid; or a sensitivity's name
    seed: int
    setting: Setting
    condition: Condition
    policy: Output
    measured: Step


def collect(store: Store, runs: Sequence[Run]) -> list[dict]:
    """The finished runs as they stand in results.json."""
    return [record(store, run) for run in runs if store.is_known(run.measured)]


def record(store: Store, run: Run) -> dict:
    found = store.results(run.measured)
    curve = found.pop("curve", None)
    kept = {
        "method": run.method,
        "variant": run.variant,
        "seed": run.seed,
        "setting": asdict(run.setting),
        "condition": asdict(run.condition),
        "artefact": store.folder(run.policy.step).name,
        "seconds": store.seconds(run.policy.step),
        **found,
    }
    if curve:
        kept["generated_tokens"] = sum(curve.get("generated_tokens", ()))
        if curve.get("true_score"):
            kept["best_true_score_in_training"] = best_of_curve(curve["true_score"])
            kept["last_true_score_in_training"] = best_of_curve(curve["true_score"][-5:])
        kept["curve"] = curve
    return kept


def with_equal_tokens(records: Sequence[dict]) -> list[dict]:
    """Each run with the true score it had in training once it had generated as many tokens as the method of its seed
    and table that generates fewest; ablations, whose answers are shorter by design, do not set that measure."""
    budgets: dict[tuple[str, int], float] = {}
    for one in records:
        if one.get("generated_tokens") and one["method"] not in AS_TLCR:
            key = one["variant"], one["seed"]
            budgets[key] = min(budgets.get(key, math.inf), one["generated_tokens"])
    found = []
    for one in records:
        budget, curve = budgets.get((one["variant"], one["seed"])), one.get("curve", {})
        if budget and curve.get("true_score"):
            score = score_at_tokens(curve["true_score"], curve["generated_tokens"], budget)
            one = one if score is None else one | {"true_score_at_equal_tokens": score}
        found.append(one)
    return found


def of(records: Sequence[dict], method: str, variant: str) -> list[dict]:
    return [one for one in records if one["method"] == method and one["variant"] == variant]


def scores(records: Sequence[dict], method: str, variant: str, decoding: str) -> dict[int, list[float]]:
    """``{seed: score of each test prompt}``."""
    found = of(records, method, variant)
    return {one["seed"]: one["decodings"][decoding]["scores"] for one in found if decoding in one["decodings"]}


def table(records: Sequence[dict], methods: Sequence[str], variant: str) -> dict[str, dict]:
    """By method: mean, sd over seeds and 95 % interval of each measure; what was not measured is left out."""
    rows = {}
    for method in methods:
        found = of(records, method, variant)
        if not found:
            continue
        measured = {f"true_score {name}": [one["decodings"][name]["true_score"] for one in found] for name in DECODINGS}
        names = ("response_length", "eos_rate", "kl", "seconds", "generated_tokens", "token_reward", "sequence_reward")
        names += ("continuous_reward_sum", "discrete_reward_sum")
        names += ("best_true_score_in_training", "last_true_score_in_training", "true_score_at_equal_tokens")
        measured |= {name: [one[name] for one in found if name in one] for name in names}
        rows[method] = {name: summary(values) for name, values in measured.items() if values}
    return rows


def summary(values: Sequence[float]) -> dict:
    mean, sd = mean_and_sd(values)
    return {"mean": mean, "sd": None if sd != sd else sd, "interval": interval(values), "seeds": len(values)}


def comparisons(records: Sequence[dict], methods: Sequence[str], variant: str) -> dict[str, dict]:
    """By decoding: the paired difference of every two methods, and the win-rate matrix (Figure 4, by true score)."""
    found = {}
    for decoding in DECODINGS:
        by_method = {method: scores(records, method, variant, decoding) for method in methods}
        present = [method for method in methods if by_method[method]]
        pairs = [(a, b) for a in present for b in present if a != b]
        found[decoding] = {
            "differences": {f"{a} - {b}": paired_difference(by_method[a], by_method[b]) for a, b in pairs},
            "win_rates": {a: {b: win_rate(by_method[a], by_method[b]) for b in present} for a in present},
        }
    return found


def sensitivity(records: Sequence[dict], question: str, levels: Mapping[str, str], standard: str) -> dict[str, dict]:
    """By level of ``question``, ``{level: method}``: its row of ``table``, None where nothing is finished, with the
    paired difference at temperature 1 from the level ``standard``."""

    def scored(level: str) -> dict[int, list[float]]:
        return scores(records, levels[level], f"{question}: {level}", DECODINGS[0])

    found = {}
    for level, method in levels.items():
        row = table(records, [method], f"{question}: {level}").get(method)
        found[level] = row and row | {"difference": paired_difference(scored(level), scored(standard))}
    return found


def judges(store: Store, steps: Sequence[tuple[str, int, Step]]) -> list[dict]:
    """How good discriminators and reward models are on held-out pairs: ``(name, seed, step)`` of each."""
    found = []
    for name, seed, step in steps:
        if store.is_known(step):
            measured = {k.removeprefix("eval/"): v for k, v in store.results(step).items() if k.startswith("eval/")}
            found.append({"judge": name, "seed": seed, **measured})
    return found


def chosen_settings(trials: Sequence[dict], default: Setting) -> dict[str, dict[str, dict]]:
    """By method: the setting with the best validation score, once among those at the paper's KL and scale, once of all.

    ``trials``: ``{"method", "setting", "true_score"}``; ties go to the earlier.
    """
    found: dict[str, dict[str, dict]] = {}
    for method in dict.fromkeys(trial["method"] for trial in trials):
        mine = [trial for trial in trials if trial["method"] == method]
        plain = [
            t for t in mine if (t["setting"]["kl"], t["setting"]["reward_scale"]) == (default.kl, default.reward_scale)
        ]
        found[method] = {
            name: max(among, key=lambda trial: trial["true_score"])["setting"]
            for name, among in (("paper", plain), ("best", mine))
            if among
        }
    return found
