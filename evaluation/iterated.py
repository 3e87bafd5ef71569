"""What the rounds of iterated TLCR brought -> RUN_DIR/iterated.json, and a table.

python evaluation/iterated.py --run_dir OUTPUT --rounds 3
"""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepspeed_chat_tlcr.arguments import option, parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly, reading
from deepspeed_chat_tlcr.pictures.page import number
from deepspeed_chat_tlcr.records import read_json
from deepspeed_chat_tlcr.saving import write_json
from evaluation.results import load_results

PPO_MEASURES = ("reward/per_token", "policy/kl", "rollout/response_length")
"""What is kept of a round's last update; the KL is to the SFT model, as in every round."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Gather the measures of every round of run_iterated.sh."""

    run_dir: str = option(MISSING, "OUTPUT of run_iterated.sh")
    rounds: int = option(MISSING, "how many rounds are finished")


def made_by_stage(path: Path) -> dict:
    """Raises ``InputError`` where a stage has not written it."""
    if not path.is_file():
        raise InputError(f"{path} is not there: that stage of run_iterated.sh has not finished")
    return read_json(path)


def labels(folder: Path) -> dict[str, float]:
    """How much of the answers the reviser changed."""
    audit = made_by_stage(folder / "audit" / "audit.json")
    return {
        "share_negative": float(audit["tokens"]["share_negative"]),
        "share_positive": float(audit["tokens"]["share_positive"]),
        "edit_ratio": float(audit["edit_ratio"]["mean"]),
        "unedited_share": audit["unedited"] / audit["revisions"],
    }


def paid(folder: Path) -> float | None:
    """US dollars for a round's labels, those of its held-out answers included; None where a price is not known."""
    runs = [made_by_stage(part / "labeling" / "run.json") for part in (folder, folder / "held_out")]
    return None if any(run.get("usd") is None for run in runs) else sum(run["usd"] for run in runs)


def judged(folder: Path) -> dict[str, float]:
    """The discriminator on the held-out answers of a round."""
    found = load_results(folder, "discriminator")
    if found is None:
        raise InputError(f"{folder}/discriminator/results.json is not there: run_iterated.sh has not finished")
    return {name: found[name] for name in ("edited_accuracy", "majority_accuracy", "auroc")}


def round_of(folder: Path, before: dict[str, float]) -> dict:
    """One round; ``before``: the labels of the round before, from which these have shifted."""
    now = labels(folder)
    ppo = made_by_stage(folder / "step3_ppo_tlcr" / "results.json")
    counts = made_by_stage(folder / "labeling" / "run.json")["counts"]
    return {
        "labels": now,
        # Answers without a usable revision: mostly those in which the reviser found nothing to mend.
        "unrevised_share": counts["failures"] / counts["pairs"],
        "label_shift": {name: now[name] - before[name] for name in now},
        "discriminator_before": judged(folder / "before"),
        "discriminator_after": judged(folder / "after"),
        "ppo": {name: ppo[name] for name in PPO_MEASURES if name in ppo},
        "labelling_usd": paid(folder),
    }


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    run = Path(options.run_dir)
    with reading(run / "audit" / "audit.json"):
        first = labels(run)
    rounds: list[dict] = []
    for place in range(1, options.rounds + 1):
        folder = run / f"round{place}"
        with reading(f"{folder}: one of its stages' results"):
            rounds.append(round_of(folder, rounds[-1]["labels"] if rounds else first))
    write_json(run / "iterated.json", {"labels_at_first": first, "rounds": rounds})

    table = Table(title="Iterated TLCR: the discriminator on the policy's own, held-out answers")
    for name in ("round", "negative tokens", "positive tokens", "accuracy before", "after", "majority", "AUROC after"):
        table.add_column(name, justify="right")
    table.add_row("0", f"{first['share_negative']:.3f}", f"{first['share_positive']:.3f}", "", "", "", "")
    for place, one in enumerate(rounds, 1):
        before, after = one["discriminator_before"], one["discriminator_after"]
        figures = (one["labels"]["share_negative"], one["labels"]["share_positive"], before["edited_accuracy"])
        figures += (after["edited_accuracy"], after["majority_accuracy"], after["auroc"])
        table.add_row(str(place), *(number(figure, 3) for figure in figures))
    Console().print(table)
    print(run / "iterated.json")


if __name__ == "__main__":
    sys.exit(main())
