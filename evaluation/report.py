"""report.html of an evaluation: one file with every part's results beside the paper's, open anywhere.

python evaluation/report.py OUTPUT      draws it again from the results that are there
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed_chat_tlcr.arguments import parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly, reading
from deepspeed_chat_tlcr.pictures import Html, cards, join, origin, paragraph, table_html, write_page
from deepspeed_chat_tlcr.provenance import provenance
from deepspeed_chat_tlcr.records import read_json
from evaluation import discriminator_chapter, sections
from evaluation.judging import Shortfall
from evaluation.results import load_results

EXIT_STOPPED, EXIT_MISSING = 3, 4


@dataclass(frozen=True)
class Part:
    """A part of the evaluation: its folder, its heading, how it is drawn, and its program where it has another name."""

    folder: str
    heading: str
    draw: Callable[[dict], Html]
    facts: Callable[[dict], list]  # what was measured, on how many items, and where there is one by which judge, US$
    program: str = ""


PARTS = [
    Part("mt_bench", "MT-Bench", sections.mt_bench, sections.mt_bench_facts),
    Part("alpaca_eval", "AlpacaEval and head to head", sections.alpaca_eval, sections.alpaca_eval_facts),
    Part("human", "Human votes", sections.human, sections.human_facts, "human/make.py, then count.py,"),
    Part("reward_scores", "Reward scores", sections.reward_scores, sections.reward_scores_facts),
    Part("curves", "Training curves", sections.curves, sections.curves_facts),
    Part("discriminator", "Discriminator", discriminator_chapter.chapter, discriminator_chapter.facts),
    Part("side_by_side", "Answers side by side", sections.side_by_side, sections.side_by_side_facts),
]


def refresh_report(out: str | Path) -> Path:
    """Draw OUT/report.html from the parts' results: the verdicts, what was measured, how, and what was not."""
    out = Path(out)
    found = {part.folder: load_results(out, part.folder) for part in PARTS}
    drawn = [(part.heading, drawn_part(part, out, results)) for part in PARTS if (results := found[part.folder])]
    chapters: list[tuple[str, Html]] = [("What was measured", overview(found)), *drawn]
    chapters.append(("How this was made", join([origin(provenance()), options_of(out)])))
    if missing := [part for part in PARTS if not found[part.folder]]:
        told = [
            f"{part.heading}: not run. evaluation/{part.program or part.folder + '.py'} measures it."
            for part in missing
        ]
        chapters.append(("Missing", join([paragraph(words, "quiet") for words in told])))
    figures = [cards(items)] if (items := sections.headline(found)) else []
    lead = join([*(paragraph(words, "lead") for words in sections.verdicts(found)), *figures])
    names = dict.fromkeys(name for results in found.values() if results for name in results.get("models", ()))
    title = f"Evaluation: {', '.join(names)}" if names else "Evaluation"
    page = write_page(out / "report.html", title, chapters, lead)
    print(f"report: {page}", flush=True)
    return page


def options_of(out: Path) -> Html:
    """The options of evaluation/main.py, where it was run."""
    try:
        options = read_json(out / "run_options.json")
    except (OSError, ValueError):
        return Html("")
    rows = [
        [f"--{name} {shlex.join(map(str, value)) if isinstance(value, list) else value}"]
        for name, value in options.items()
        if value is not False and value not in (None, "", [])
    ]
    return sections.fold("All options, defaults included", table_html(["evaluation/main.py"], rows))


def drawn_part(part: Part, out: Path, results: dict) -> Html:
    """A part's chapter. Raises ``InputError`` for results that were damaged since."""
    with reading(out / part.folder / "results.json", "remove it and run the part again"):
        # The headline and the overview read it too: what is wrong is said here, where the file is known.
        sections.headline({part.folder: results})
        sections.verdicts({part.folder: results})
        part.facts(results)
        list(results.get("models", ()))
        return part.draw(results)


def conclude(out: str | Path, parts: Mapping[str, Shortfall | None]) -> int:
    """Draw the report after parts that may be judged, and say which verdicts are missing.

    Exit code: 3 where a judge stopped early, 4 where verdicts are missing although it did not; else 0.
    """
    refresh_report(out)
    judged = {name: lacks for name, lacks in parts.items() if lacks}
    for name, lacks in judged.items():
        if lacks.stopped:
            print(f"{name} stopped early ({lacks.stopped}); the same command continues", flush=True)
        elif lacks.missing:
            told = f"{name}: {lacks.missing:,} of {lacks.asked:,} verdicts are missing, and the results are of the rest"
            print(f"{told}; --retry_failed asks again for those that failed", file=sys.stderr, flush=True)
    if any(lacks.stopped for lacks in judged.values()):
        return EXIT_STOPPED
    return EXIT_MISSING if any(lacks.missing for lacks in judged.values()) else 0


def part_program(name: str, options: type, run: Callable[[Any], Shortfall | None]) -> Callable[..., int]:
    """A part as a program: ``run`` on its options, which says what verdicts lack where it judges; then the report."""

    @exits_cleanly
    def main(argv: Sequence[str] | None = None) -> int:
        given = parse(options, argv)
        return conclude(given.out, {name: run(given)})

    return main


def overview(found: dict[str, dict | None]) -> Html:
    facts = {part.heading: part.facts(results) for part in PARTS if (results := found[part.folder])}
    rows = [[heading, *told, *[None] * (4 - len(told))] for heading, told in facts.items()]
    missing = [part.heading for part in PARTS if not found[part.folder]]
    words = f"Missing: {', '.join(missing)}." if missing else "Every part was run."
    if spent := [row[-1] for row in rows if row[-1]]:
        words += f" Together US$ {sum(spent):,.2f}, calls without an answer taken at the most they can have cost."
    note = "“—”: does not apply or is not known. The paper’s numbers are Llama-2-7B’s on full-hh-rlhf, judged by GPT-4."
    table = table_html(["part", "measured", "items", "judge", "US$"], rows)
    return join([table, paragraph(f"{words} {note}", "note")])


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else list(argv)
    if given in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(given) != 1:
        raise InputError(f"give one folder, the --out of an evaluation (given: {' '.join(given) or 'nothing'})")
    if not Path(given[0]).is_dir():
        raise InputError(f"{given[0]}: no such folder; give the --out of an evaluation")
    refresh_report(given[0])


if __name__ == "__main__":
    main()
