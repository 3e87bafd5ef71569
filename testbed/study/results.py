"""What the runs say: gaps over SFT's frontier, and the registered comparisons with their corrections."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.data.preferences import load_preferences
from testbed.measures import frontier, holm, interval
from testbed.study.registration import Family, Registration
from testbed.world import WORLDS

COSTS = {"kl": lambda row: row["kl"], "entropy": lambda row: -row["entropy"]}
"""What is spent on a score: KL to SFT, or entropy given up."""
MEASURES = ("score", "over_kl", "over_entropy")


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def held_out(results: Mapping) -> dict[str, float]:
    return {key.removeprefix("eval/"): value for key, value in results.items() if key.startswith("eval/")}


def pair_ceiling(data: Path, version: int, seed: int) -> float:
    """Mean over the held-out pairs of max(p, 1 - p), p the true probability that the chosen one is preferred."""
    world = WORLDS[version](seed=seed)
    pairs = load_preferences([str(data)], "all", "eval")
    gaps = (world.score(pair.prompt, pair.chosen) - world.score(pair.prompt, pair.rejected) for pair in pairs)
    return mean([max(p, 1 - p) for p in map(world.preference_probability, gaps)])


def with_gaps(runs: Sequence[dict]) -> list[dict]:
    """Each run with its mean gaps over the frontier of its seed's SFT model, at its best decoding and at T = 1."""
    sft = {run["seed"]: list(run["decodings"].values()) for run in runs if run["method"] == "sft"}
    found = []
    for run in runs:
        if run["seed"] in sft:
            decodings = {name: gaps(row, sft[run["seed"]]) for name, row in run["decodings"].items()}
            run = {**run, "gaps": decodings}
        found.append({**run, "tokens": sum(run.get("curve", {}).get("generated_tokens", ())) or None})
    return found


def gaps(row: Mapping, sft: Sequence[Mapping]) -> dict[str, float]:
    """How far a decoding lies above what the SFT model reaches at its cost, mean over prompts."""
    swept = np.array([one["scores"] for one in sft])
    found = {}
    for name, cost in COSTS.items():
        reached = frontier([cost(one) for one in sft], swept, cost(row))
        found[f"over_{name}"] = mean(np.array(row["scores"]) - reached)
    return found


def of_method(
    runs: Sequence[Mapping], method: str, measure: str = "score", decoding: str | None = None
) -> dict[int, float]:
    """``{seed: value}`` of ``MEASURES`` or a measure of a decoding, by default the best one."""
    found = {}
    for run in runs:
        name = decoding or run["best"]
        if run["method"] == method and name in run["decodings"]:
            row = {
                "score": run["decodings"][name]["true_score"],
                **run["decodings"][name],
                **run.get("gaps", {}).get(name, {}),
            }
            if measure in row:
                found[run["seed"]] = row[measure]
    return found


def paired(runs: Sequence[Mapping], one: str, other: str, measure: str) -> list[float]:
    a, b = of_method(runs, one, measure), of_method(runs, other, measure)
    return [a[seed] - b[seed] for seed in sorted(set(a) & set(b))]


def decide(registration: Registration, runs: Sequence[Mapping]) -> dict[str, list[dict]]:
    """Every family's comparisons: intervals, p corrected within the family, and what the rule says of them."""
    alpha = float(registration.rules["alpha"])
    found = {}
    for name, family in registration.families.items():
        rows = rows_of(family, runs)
        known = [row for row in rows if row["p"] is not None]
        for row, corrected in zip(known, holm([row["p"] for row in known]), strict=True):
            row["p_corrected"] = corrected
            row["verdict"] = verdict(family, row) if corrected < alpha else "undecided"
        found[name] = rows
    return found


def rows_of(family: Family, runs: Sequence[Mapping]) -> list[dict]:
    """Comparisons with their intervals and p-values before correction; p is None of fewer than two seeds."""
    rows = []
    for name in family.methods:
        gap = {m: interval(values) if (values := list(of_method(runs, name, m).values())) else {} for m in MEASURES[1:]}
        p_values = [one["p"] for one in gap.values() if "p" in one]
        rows.append({"of": name, **gap, "p": max(p_values) if len(p_values) == len(gap) else None})
    for one, other in family.pairs:
        gap = {m: interval(values) if (values := paired(runs, one, other, m)) else {} for m in MEASURES}
        rows.append({"of": f"{one} - {other}", **gap, "p": gap["score"].get("p")})
    return rows


def verdict(family: Family, row: Mapping) -> str:
    """What a comparison whose p holds says: by the rules ``helps`` and ``differences`` of the registration."""
    read = MEASURES[1:] if family.rule == "helps" else MEASURES[:2]
    signs = {float(np.sign(row[measure]["mean"])) for measure in read if row[measure]}
    if family.rule == "helps":
        return "undecided" if len(signs) > 1 else "helps" if signs == {1.0} else "below SFT's frontier"
    return "undecided" if len(signs) > 1 else "higher" if signs == {1.0} else "lower"


def at_equal_tokens(runs: Sequence[Mapping], window: int = 5) -> dict[str, dict[int, float]]:
    """By method and seed: the score in training at as many tokens as the seed's thriftiest method generated."""
    curves = {
        (run["method"], run["seed"]): run["curve"] for run in runs if run.get("curve", {}).get("generated_tokens")
    }
    found: dict[str, dict[int, float]] = {}
    for (method, seed), curve in curves.items():
        budget = min(sum(other["generated_tokens"]) for (_, of), other in curves.items() if of == seed)
        afforded = sum(spent <= budget for spent in itertools.accumulate(curve["generated_tokens"]))
        if afforded:
            found.setdefault(method, {})[seed] = mean(curve["true_score"][max(0, afforded - window) : afforded])
    return found


def collapses(run: Mapping, share: float = 0.5) -> int | None:
    """The update at which the mean of five scores in training, less 1, first falls below ``share`` of its best."""
    scores = run.get("curve", {}).get("true_score") or []
    best = 0.0
    for at in range(5, len(scores) + 1):
        now = mean(scores[at - 5 : at]) - 1
        best = max(best, now)
        if now < share * best:
            return at
    return None
