"""An overview of a labelling's revisions: audit.html for people, audit.json for programs, beside the revisions.

python labeling/audit.py OUTPUT/labeling/revisions.jsonl --tokenizer MODEL
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.arguments import Parser
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.pictures import (
    Html,
    Series,
    cards,
    columns,
    histogram,
    join,
    legend_html,
    line_chart,
    number,
    paragraph,
    table_html,
    write_page,
)
from deepspeed_chat_tlcr.records import Revision, read_jsonl, read_revisions, require_file
from deepspeed_chat_tlcr.saving import require_writable, write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from labeling.audit_statistics import POSITIONS, Audit, Span
from labeling.importing import qa_feedback_preference
from labeling.revising import MAX_EDIT_RATIO
from labeling.show import revision_sample, sample_with_reasoning

WORDS_SHOWN = 15
"""Words in each list on the page. audit.json has more."""


def read_error_spans(path: str) -> dict[str, list[Span]]:
    """The error spans of a QA-feedback file, by rejected response. Raises ``InputError`` for another kind of file."""
    spans = {}
    for line, record in read_jsonl(path):
        try:
            response = qa_feedback_preference(record).rejected.strip()
            shift = len(record["prediction"]) - len(record["prediction"].lstrip())
            spans[response] = [(error["start"] - shift, error["end"] - shift) for error in record["errors"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"--error_spans {path}:{line}: not a QA-feedback record ({error})") from None
    return spans


def sections(audit: Audit, summary: dict) -> list[tuple[str, object]]:
    tokens, ratio, growth = summary["tokens"], summary["edit_ratio"], summary["length_change_tokens"]
    middle = [(place + 0.5) / POSITIONS for place in range(POSITIONS)]
    by_position = [
        Series(name, middle, [float("nan") if share is None else share for share in summary["by_position"][name]])
        for name in ("negative", "positive")
    ]
    names = ("mean", "p10", "median", "p90")
    charts = columns(
        histogram(audit.ratios, "Edit ratio: share of words edited", "edit ratio", "revisions", x_range=(0.0, 1.0)),
        histogram(audit.growth, "Change in length", "tokens modified − rejected", "revisions"),
        line_chart(by_position, "Edited tokens by place", "place in the response (0 start, 1 end)", "share"),
        kind="charts",
    )
    counts = table_html(
        ["tokens", "edited", "neutral", "share edited"],
        [
            ["rejected", tokens["rejected"]["negative"], tokens["rejected"]["neutral"], tokens["share_negative"]],
            ["modified", tokens["modified"]["positive"], tokens["modified"]["neutral"], tokens["share_positive"]],
        ],
        digits=3,
    )
    spread = table_html(
        ["", "mean", "10 %", "median", "90 %"],
        [
            ["edit ratio", *(ratio[name] for name in names)],
            ["length change, tokens", *(growth[name] for name in names)],
        ],
    )
    words = columns(
        table_html(["most often deleted", "times"], summary["most_deleted_words"][:WORDS_SHOWN]),
        table_html(["most often added", "times"], summary["most_added_words"][:WORDS_SHOWN]),
    )
    rewrites = summary["suspected_rewrites"]
    doubts = table_html(
        ["what", "revisions"],
        [
            [f"suspected rewrites: edit ratio above {rewrites['above']:g}", rewrites["count"]],
            ["unedited", summary["unedited"]],
            ["identical to the chosen response", summary["identical_to_chosen"]],
            ["with invisible differences (line ends, spaces, quotes)", summary["unseen_differences"]],
            ["further revisions of a pair", summary["repeated_pairs"]],
            ["the same text for the same pair again", summary["repeated_revisions"]],
        ],
    )
    result: list[tuple[str, object]] = [
        ("Overview", join([charts, columns(counts, spread)])),
        ("Words", words),
        ("What to look at", doubts),
    ]
    if "agreement_with_people" in summary:
        figures = summary["agreement_with_people"]
        text = (
            "Tokens that the revision deletes or replaces, against the error spans that people marked in the same "
            f"{figures['responses']} responses."
        )
        shown = ("precision", "recall", "f1", "edited", "marked", "tokens")
        table = table_html(["", *shown], [["tokens", *(figures[name] for name in shown)]], digits=3)
        result.append(("Agreement with people", join([paragraph(text), table])))
    most = [revision for _, _, revision in sorted(audit.most_edited, key=lambda entry: entry[:2], reverse=True)]
    result.append(("Most edited", pictures(audit.tokenizer, most)))
    result.append(("At random", pictures(audit.tokenizer, audit.random_ones)))
    return result


def pictures(tokenizer: PreTrainedTokenizerFast, revisions: Sequence[Revision]) -> Html:
    parts = [legend_html("label")]
    for revision in revisions:
        sample = replace(revision_sample(tokenizer, revision), title=revision.id)
        parts.append(sample_with_reasoning(sample, revision.reasoning))
    return join(parts)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", help="revisions.jsonl, as labeling/main.py writes it")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name: labels belong to its tokens")
    parser.add_argument("--output_dir", help="folder for audit.html and audit.json (default: that of the revisions)")
    parser.add_argument("--error_spans", help="QA-feedback file whose people's error spans to compare the labels with")
    parser.add_argument("--max_edit_ratio", type=float, default=MAX_EDIT_RATIO, help="above it a rewrite is suspected")
    options = parser.parse(argv)
    if not 0 <= options.max_edit_ratio <= 1:
        raise InputError(f"--max_edit_ratio {options.max_edit_ratio}: must be from 0 to 1")
    require_file(options.revisions)
    folder = Path(options.output_dir or Path(options.revisions).parent)
    require_writable(folder)
    spans = read_error_spans(options.error_spans) if options.error_spans else {}
    audit = Audit(load_tokenizer(options.tokenizer), options.max_edit_ratio, spans)
    for revision in tqdm(read_revisions(options.revisions), desc="audit", unit=" revisions", mininterval=1.0):
        audit.add(revision)
    if not audit.ratios:
        raise InputError(f"{options.revisions}: no revisions in it")
    summary = audit.summary()
    write_json(folder / "audit.json", summary)
    tokens = summary["tokens"]
    lead = cards(
        [
            (number(summary["revisions"]), "revisions"),
            (f"{tokens['share_negative'] or 0:.1%}", "of rejected tokens negative"),
            (f"{tokens['share_positive'] or 0:.1%}", "of modified tokens positive"),
            (number(summary["edit_ratio"]["median"]), "median edit ratio"),
            (number(summary["suspected_rewrites"]["count"]), "suspected rewrites"),
        ]
    )
    page = write_page(folder / "audit.html", f"Audit of {Path(options.revisions).name}", sections(audit, summary), lead)
    print(f"{page} and {folder / 'audit.json'}: {summary['revisions']} revisions")
    if figures := summary.get("agreement_with_people"):
        shown = (f"{name} {figures[name]}" for name in ("precision", "recall", "f1"))
        print("agreement with people: " + ", ".join(shown))


if __name__ == "__main__":
    sys.exit(main())
