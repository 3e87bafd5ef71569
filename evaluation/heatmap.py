"""Token rewards of any prompt and answers (Figure 8), on the terminal, as a page or as a picture.

python evaluation/heatmap.py --discriminator OUT/step2_discriminator --prompt "What is a tree?" \
    --text "A plant." "An animal." [--html tree.html] [--png tree.png]
"""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace

from rich.console import Console

from deepspeed_chat_tlcr.arguments import option, parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.pictures import (
    Sample,
    TokenScores,
    heatmap_terminal,
    join,
    legend_html,
    sample_html,
    write_page,
)
from deepspeed_chat_tlcr.pictures.png import heatmap_png
from deepspeed_chat_tlcr.records import require_new_file
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation.options import DeviceOptions
from evaluation.policies import Question, in_context, prompt_text, torch_dtype
from evaluation.scoring import Judge, heatmap, response_example


@dataclass(frozen=True, kw_only=True)
class Options(DeviceOptions):
    """Colour the tokens of answers by their rewards."""

    discriminator: str = option(MISSING, "folder of the token discriminator (step 2)")
    prompt: str = option("", "the prompt that the texts answer")
    raw_prompt: bool = option(False, "the prompt already has its dialogue's markers: leave it as it is")
    text: list[str] = option([], "answers")
    html: str | None = option(None, "write a page here")
    png: str | None = option(None, "write a picture here")


def score(options: Options) -> list[TokenScores]:
    if not options.text:
        raise InputError("--text is missing: one or more answers")
    tokenizer = load_tokenizer(options.discriminator)
    discriminator = Judge(options.discriminator, 2, torch_dtype(options.dtype), options.attn_implementation).load()
    question = Question(0, [options.prompt], raw=options.raw_prompt)
    prompt = prompt_text(tokenizer, question, [])
    scored = []
    for text in options.text:
        example = response_example(tokenizer, prompt, in_context(tokenizer, question, text))
        scores = heatmap(tokenizer, discriminator, example)
        mean = sum(scores.values) / len(scores.values)
        caption = f"mean reward {mean:+.3f} over {len(scores.values)} tokens".replace("-", "−")
        scored.append(replace(scores, caption=caption))
    return scored


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    for flag, path in (("--html", options.html), ("--png", options.png)):
        if path:
            require_new_file(flag, path)
    scored = score(options)
    if options.html:
        body = join([legend_html(), sample_html(Sample(options.prompt, scored))])
        print(write_page(options.html, "Token rewards", [("Answers", body)]))
    if options.png:
        heatmap_png(options.png, scored)
        print(options.png)
    if not options.html and not options.png:
        console = Console()
        for scores in scored:
            console.print(heatmap_terminal(scores, console))
            console.print(scores.caption, style="dim")


if __name__ == "__main__":
    sys.exit(main())
