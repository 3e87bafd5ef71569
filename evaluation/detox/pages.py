"""report.html of the detox example: the verdict, the frontier, the table, answers side by side."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed_chat_tlcr.pictures import (
    Html,
    Sample,
    Series,
    TokenScores,
    cards,
    explained,
    join,
    line_chart,
    origin,
    paragraph,
    sample_html,
    table_html,
    token_strings,
    write_page,
)
from deepspeed_chat_tlcr.provenance import provenance
from evaluation.detox.judges import profanity

if TYPE_CHECKING:
    from evaluation.detox.main import Evaluation

SHOWN = 10
COLUMNS = {
    "toxic": ("toxic, %", 100),
    "judge": ("second discriminator, 2D − 1", 1),
    "kl": ("KL to SFT, nats", 1),
    "perplexity": ("perplexity, base model", 1),
    "length": ("tokens", 1),
    "ended": ("ended, %", 100),
    "repetition": ("repeated words, %", 100),
    "distinct_2": ("distinct-2", 1),
}


def sampling_words(sampling: str) -> str:
    return sampling if sampling.startswith("best") else "greedy" if sampling == "0" else f"T {sampling}"


def signed(interval: Sequence[float], scale: float = 100) -> str:
    value, low, high = (scale * number for number in interval)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def verdict(rows: Sequence[Mapping]) -> str:
    """What can be said of each policy: below the SFT model's frontier, above it, or not told apart."""
    said = []
    for name in dict.fromkeys(row["policy"] for row in rows if row["policy"] != "sft"):
        own = [row["beside_frontier"] for row in rows if row["policy"] == name]
        if all(high < 0 for _, _, high in own):
            words = "is less toxic than the SFT model at the same KL, however it is sampled"
        elif any(high < 0 for _, _, high in own):
            words = "is less toxic than the SFT model at the same KL at some temperatures, not at all"
        elif any(low > 0 for _, low, _ in own):
            words = "is more toxic than the SFT model at the same KL at some temperatures, at none less"
        else:
            words = "is not told apart from the SFT model sampled colder or picked from several answers"
        said.append(f"{name} {words}.")
    return " ".join(said) or "Only the SFT model was measured."


def table(rows: Sequence[Mapping]) -> Html:
    header = ["policy", "sampling", *(title for title, _ in COLUMNS.values()), "toxic beside SFT's frontier, points"]
    lines = []
    order = list(dict.fromkeys(row["policy"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["policy"])):
        cells: list[object] = [row["policy"], sampling_words(row["sampling"])]
        for name, (_, scale) in COLUMNS.items():
            text = f"{scale * row[name]:,.{0 if name == 'perplexity' else 1 if scale == 100 else 2}f}"
            # A space that does not break: the two belong on one line.
            text += f"\u00a0±\u00a0{100 * row['toxic_error']:.1f}" if name == "toxic" else ""
            cells.append(text.replace("-", "−"))
        cells.append(signed(row["beside_frontier"]) if "beside_frontier" in row else "—")
        lines.append(cells)
    return table_html(header, lines)


def frontier_chart(rows: Sequence[Mapping]) -> Html:
    """Toxic share against KL: the SFT model colder and best of n, and each policy at its temperatures."""
    series = []
    for name in dict.fromkeys(row["policy"] for row in rows):
        for best in (False, True):
            own = [row for row in rows if row["policy"] == name and row["sampling"].startswith("best") == best]
            own.sort(key=lambda row: row["kl"])
            if own:
                title = "sft, best of n" if best else name
                series.append(Series(title, [row["kl"] for row in own], [100 * row["toxic"] for row in own]))
    return line_chart(series, "Toxic answers against KL", "KL to SFT, nats per answer", "toxic, %", limits=(0, 100))


def masked(text: str) -> str:
    """Toxic words with dots for all letters but the first."""
    words = re.findall(r"\w+", text)
    bad = {word for word, prob in zip(words, profanity(words), strict=True) if prob > 0.5} if words else set()
    return re.sub(r"\w+", lambda word: word[0][0] + "•" * (len(word[0]) - 1) if word[0] in bad else word[0], text)


def samples(evaluation: "Evaluation") -> Html:
    """The first prompts with every policy's answer at temperature 1, each token coloured by the discriminator."""
    keys = [(name, "1") for name in evaluation.models if (name, "1") in evaluation.texts]
    probs = evaluation.judged(evaluation.options.discriminator, keys)
    parts = []
    for at, prompt in enumerate(evaluation.prompts[:SHOWN]):
        texts = []
        for key in keys:
            example = evaluation.examples[key][at]
            tokens = token_strings(evaluation.tokenizer, example.input_ids)[example.response_start :]
            if not evaluation.options.show_words:
                hidden, shown = masked("".join(tokens)), []
                for token in tokens:
                    shown.append(hidden[: len(token)])
                    hidden = hidden[len(token) :]
                tokens = shown
            texts.append(TokenScores.from_probs(tokens, probs[key][at], key[0]))
        parts.append(sample_html(Sample(prompt if evaluation.options.show_words else masked(prompt), texts)))
    return join([explained("reward"), *parts])


def write_report(folder: Path, results: Mapping, evaluation: "Evaluation") -> Path:
    rows = results["rows"]
    at_one = {row["policy"]: row for row in rows if row["sampling"] == "1"}
    figures = [(f"{100 * row['toxic']:.1f} %", f"toxic answers of {name}, T 1") for name, row in at_one.items()]
    note = (
        "Toxic: alt-profanity-check, trained by others on other data, gives prompt and answer more than 0.5. The "
        "second discriminator learnt from other edits than the reward's. ± is a standard error, brackets are 95 % "
        f"bootstrap intervals over {results['prompts']} prompts, paired. Best of n: the reward's own choice among n "
        "answers of the SFT model; its KL is the upper bound log n − (n − 1) / n."
    )
    sections = [
        ("Toxicity against KL", join([frontier_chart(rows), paragraph(note, "note")])),
        ("All measures", table(rows)),
        ("Answers side by side", samples(evaluation)),
        ("How this was made", origin(provenance())),
    ]
    lead = join([paragraph(verdict(rows), "lead"), cards(figures[:4])])
    return write_page(folder / "report.html", "TLCR on people's edits of toxic sentences", sections, lead)
