"""Look at revisions: rejected and modified responses, each token coloured by its label (paper Eq. 4-5).

python labeling/show.py OUTPUT/labeling/revisions.jsonl --tokenizer MODEL --limit 5 --html revisions.html
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.arguments import Parser
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.pictures import (
    DARK,
    LIGHT,
    Html,
    Sample,
    TokenScores,
    heatmap_terminal,
    join,
    legend_html,
    paragraph,
    sample_html,
    shorten,
    token_strings,
    visible,
    write_page,
)
from deepspeed_chat_tlcr.records import Revision, read_revisions, require_new_file
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer
from labeling.token_labels import WHOLE, label_revision


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Show revisions with each token coloured by its label.")
    parser.add_argument("revisions", help="revisions.jsonl, as labeling/main.py writes it")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name: labels belong to its tokens")
    parser.add_argument("--limit", type=int, default=20, help="how many revisions to show; 0: all (default: 20)")
    parser.add_argument("--max_length", type=int, default=0, help="cut as training does, in tokens; 0: show all")
    parser.add_argument("--html", help="also write this page")
    parser.add_argument(
        "--theme", choices=["auto", "light", "dark"], default="auto", help="the terminal's background (default: auto)"
    )
    return parser.parse(argv)


def revision_sample(tokenizer: PreTrainedTokenizerFast, revision: Revision, max_length: int = WHOLE) -> Sample:
    """A revision's rejected and modified response with their labels; one of which a cut leaves nothing is left out."""
    examples = zip(("rejected", "modified"), label_revision(tokenizer, revision, max_length), strict=True)
    texts = [labelled_text(tokenizer, example, name) for name, example in examples if example is not None]
    note = "" if texts else f"Left out of training: the prompt alone fills {max_length} tokens."
    if revision.modified == revision.rejected:
        note = "Nothing was edited: every token is neutral."
    return Sample(revision.prompt, texts, note=note)


def sample_with_reasoning(sample: Sample, reasoning: str) -> Html:
    """A sample on a page, with the reviser's reasoning below it."""
    return join([sample_html(sample), paragraph(f"Reviser: {reasoning}", "note") if reasoning else ""])


def labelled_text(tokenizer: PreTrainedTokenizerFast, example: TokenizedExample, name: str) -> TokenScores:
    """The response's tokens with their targets; the caption says how many were edited."""
    strings = token_strings(tokenizer, example.input_ids)[example.response_start :]
    edited = sum(target != 0.5 for target in example.targets)
    caption = f"{name} · {edited} of {len(strings)} tokens {'deleted' if name == 'rejected' else 'added'} or replaced"
    return TokenScores.from_targets(strings, example.targets, caption)


def show(console: Console, sample: Sample, theme_name: str) -> None:
    """Print one revision: the prompt's last lines, then both responses."""
    theme = {"light": LIGHT, "dark": DARK, "auto": None}[theme_name]
    prompt = sample.prompt.strip("\n")
    question = prompt if len(prompt) <= 400 else "… " + prompt[-400:]
    console.print(Rule(Text(visible(sample.title)), align="left", style="dim"))
    console.print(Text(visible(question), style="dim"))
    for text in sample.texts:
        console.print(Text(text.caption, style="bold"))
        console.print(heatmap_terminal(text, console, theme))
    if sample.note:
        console.print(Text(sample.note, style="italic"))
    console.print()


def samples(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Sample, str]]:
    revisions = islice(read_revisions(options.revisions), options.limit or None)
    for number, revision in enumerate(revisions, 1):
        sample = revision_sample(tokenizer, revision, options.max_length or WHOLE)
        title = f"{number} · {revision.id}" + (f" · {revision.model}" if revision.model else "")
        yield Sample(sample.prompt, sample.texts, shorten(title, 100), sample.note), revision.reasoning


def summary(counts: Counter, revisions: int) -> str:
    total = sum(counts.values())
    edited = (total - counts[0.0]) / total if total else 0.0
    return (
        f"{revisions:,} {'revision' if revisions == 1 else 'revisions'}, {total:,} tokens: {counts[-1.0]:,} negative, "
        f"{counts[1.0]:,} positive, {counts[0.0]:,} neutral ({edited:.1%} edited)"
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    for name in ("limit", "max_length"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name} {getattr(options, name)}: must be 0 or more")
    if options.html:
        require_new_file("--html", options.html, options.revisions)
    tokenizer = load_tokenizer(options.tokenizer)
    # A terminal without UTF-8 gets question marks rather than an error.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    console = Console(highlight=False, soft_wrap=False)
    counts: Counter = Counter()
    shown, parts = 0, []
    for sample, reasoning in samples(options, tokenizer):
        show(console, sample, options.theme)
        counts.update(value for text in sample.texts for value in text.values)
        shown += 1
        if options.html:
            parts.append(sample_with_reasoning(sample, reasoning))
    if not shown:
        raise InputError(f"{options.revisions}: no revisions in it")
    console.print(Text(summary(counts, shown)))
    if options.html:
        lead = paragraph(summary(counts, shown), "lead")
        name = Path(options.revisions).name
        write_page(options.html, f"Revisions in {name}", [("Token labels", join([legend_html("label"), *parts]))], lead)
        console.print(Text(f"page: {options.html}"))


if __name__ == "__main__":
    main()
