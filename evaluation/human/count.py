"""Count what annotators sent back: preference shares with intervals, head-to-heads, Fleiss' kappa.

python evaluation/human/count.py --votes votes-ann.json votes-bob.json votes-cy.json --out OUTPUT
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.arguments import option, parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly, reading
from deepspeed_chat_tlcr.records import read_json
from evaluation.options import OutOptions
from evaluation.report import refresh_report
from evaluation.results import save_results
from evaluation.stats import fleiss_kappa, share_interval

TIE = "tie"


@dataclass(frozen=True, kw_only=True)
class Options(OutOptions):
    """Count votes."""

    votes: list[str] = option(MISSING, "the files that the annotators exported")
    allow_missing_annotators: bool = option(False, "count although not every annotator's file is here")


def read_key(out: str) -> dict:
    path = Path(out) / "human" / "key.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: --out must be that of evaluation/human/make.py, which writes it")
    key = read_json(path)
    with reading(path, "make.py writes it with the pages"):
        # Its parts, each made into the kind that it must have.
        slots = {name: {id: list(models) for id, models in shown.items()} for name, shown in key["slots"].items()}
        return {"study": str(key["study"]), "models": list(key["models"]), "tie": bool(key["tie"]), "slots": slots}


def read_votes(path: str, key: Mapping) -> tuple[str, dict[str, str]]:
    """Who voted, and for which model (or ``TIE``) by item. Raises ``InputError`` for a file that cannot be counted."""
    try:
        content = read_json(Path(path))
        study, annotator, votes = content["study"], content["annotator"], content["votes"]
        given = dict(votes.items())
    except OSError as error:
        raise InputError(f"--votes {path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"--votes {path}: not a file that a voting page exported ({error!r})") from None
    if study != key["study"]:
        raise InputError(f"--votes {path}: votes on other items (study {study}, the key is of {key['study']})")
    if not isinstance(annotator, str) or annotator not in key["slots"]:
        raise InputError(f"--votes {path}: {annotator!r} has no page in this study")
    shown = key["slots"][annotator]
    if foreign := [id for id in given if id not in shown]:
        raise InputError(f"--votes {path}: a vote on an item that is not on the page ({foreign[0]!r})")
    if missing := len(shown) - len(given):
        raise InputError(f"--votes {path}: incomplete, {missing} of {len(shown)} items are not voted on")
    chosen = {}
    for id, vote in given.items():
        whole = isinstance(vote, int) and not isinstance(vote, bool)
        if not (vote == TIE and key["tie"]) and not (whole and 0 <= vote < len(shown[id])):
            raise InputError(f"--votes {path}: {vote!r} is not a vote on item {id}")
        chosen[id] = TIE if vote == TIE else shown[id][vote]
    return annotator, chosen


def read_all(paths: Sequence[str], key: Mapping) -> dict[str, dict[str, str]]:
    """Votes by annotator. Raises ``InputError`` for an annotator who is counted twice."""
    everybody: dict[str, dict[str, str]] = {}
    files: dict[str, str] = {}
    for path in paths:
        annotator, chosen = read_votes(path, key)
        if annotator in everybody:
            raise InputError(f"--votes {path}: {annotator} is counted already, from {files[annotator]}")
        everybody[annotator], files[annotator] = chosen, path
    return everybody


def count(everybody: Mapping[str, Mapping[str, str]], models: Sequence[str], tie: bool) -> dict:
    """Shares of all votes with 95 % intervals over items, shares by annotator, and agreement."""
    categories = [*models, TIE] if tie else list(models)
    items = sorted(next(iter(everybody.values())))
    counts = np.array([[sum(v[id] == c for v in everybody.values()) for c in categories] for id in items])
    raters = len(everybody)
    majority = Counter(categories[row.argmax()] if (row == row.max()).sum() == 1 else "no majority" for row in counts)
    return {
        "items": len(items),
        "annotators": raters,
        "votes": int(counts.sum()),
        "shares": {c: float(counts[:, place].sum() / counts.sum()) for place, c in enumerate(categories)},
        "intervals": {c: share_interval(counts[:, place], raters) for place, c in enumerate(categories)},
        "majority": {c: majority[c] for c in [*categories, "no majority"] if majority[c]},
        "by_annotator": {
            name: {c: sum(vote == c for vote in votes.values()) / len(items) for c in categories}
            for name, votes in everybody.items()
        },
        "fleiss_kappa": fleiss_kappa(counts) if raters >= 2 else None,
    }


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    key = read_key(options.out)
    everybody = read_all(options.votes, key)
    absent = sorted(set(key["slots"]) - set(everybody))
    if not everybody or (absent and not options.allow_missing_annotators):
        raise InputError(f"--votes: nothing from {', '.join(absent)} (--allow_missing_annotators counts the others)")
    results = {"models": key["models"], **count(everybody, key["models"], key["tie"]), "absent": absent}
    save_results(options.out, "human", results)
    for name, share in results["shares"].items():
        low, high = results["intervals"][name]
        print(f"{name:<20} {share:6.1%}   {low:.1%} to {high:.1%}")
    kappa = results["fleiss_kappa"]
    print(f"Fleiss' kappa: {'needs two annotators' if kappa is None else f'{kappa:.3f}'}")
    refresh_report(options.out)


if __name__ == "__main__":
    sys.exit(main())
