"""How good a token discriminator is (paper 7.2, Figure 8), on revisions it has not seen.

python evaluation/discriminator.py --discriminator OUT/step2_discriminator --revisions OUT/labeling/revisions.jsonl \
    --out OUTPUT

Accuracy, confusion, AUROC; calibration, because D itself is the reward; accuracy by place and by kind of token; with
--error_spans the agreement with the errors that people marked.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import auroc, predicted_targets, token_metrics
from deepspeed_chat_tlcr.pictures import token_strings
from deepspeed_chat_tlcr.pictures.page import number
from deepspeed_chat_tlcr.records import Revision, read_revisions
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer
from deepspeed_chat_tlcr.turns import end_ids
from deepspeed_chat_tlcr.workers import processes_of
from evaluation.options import DiscriminatorOptions, NodeOptions, OutOptions
from evaluation.policies import torch_dtype
from evaluation.report import part_program
from evaluation.results import save_results
from evaluation.scoring import Judge, as_record, judged, revision_heatmaps, token_probs
from labeling.audit import read_error_spans
from labeling.audit_statistics import Span, SpanAgreement, is_marked, visible_tokens
from labeling.token_labels import NEGATIVE, NEUTRAL, POSITIVE, WHOLE, label_revision
from step2_discriminator.examples import token_pairs
from step2_discriminator.revisions import hold_out

BINS = 10
PLACES = 10
SHOWN = 4
LABELS = {"negative": NEGATIVE, "neutral": NEUTRAL, "positive": POSITIVE}


@dataclass(frozen=True, kw_only=True)
class Options(DiscriminatorOptions, NodeOptions, OutOptions):
    """Measure a token discriminator on held-out revisions."""


@dataclass(frozen=True)
class Tokens:
    """Judged tokens, one entry each, ``(N,)``."""

    probs: np.ndarray  # D
    targets: np.ndarray  # 0 negative, 0.5 neutral, 1 positive (soft where a pair has several revisions)
    places: np.ndarray  # of PLACES parts of the response
    kinds: np.ndarray  # see kind_of

    @property
    def edited(self) -> np.ndarray:
        return (self.targets == POSITIVE) | (self.targets == NEGATIVE)


def kind_of(token: str, is_end: bool, starts: bool) -> str:
    """The kind of a token. ``starts``: it is the response's first."""
    if is_end:
        return "end of sequence"
    if not token.strip():
        return "white space"
    if any(character.isdigit() for character in token):
        return "number"
    if not any(character.isalpha() for character in token):
        return "punctuation"
    return "start of a word" if starts or not token[0].isalpha() else "rest of a word"


def gather(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[TokenizedExample], probs: Sequence[Sequence[float]]
) -> Tokens:
    columns: list[tuple[float, float, int, str]] = []
    for example, found in zip(examples, probs, strict=True):
        strings = token_strings(tokenizer, example.input_ids)[example.response_start :]
        ids, count = example.response_ids, len(found)
        for place, (prob, target, token, id) in enumerate(zip(found, example.targets, strings, ids, strict=True)):
            kind = kind_of(token, id in end_ids(tokenizer), place == 0)
            columns.append((prob, target, place * PLACES // count, kind))
    return Tokens(*(np.array(column) for column in zip(*columns, strict=True)))


# ---- measures --------------------------------------------------------------------------------------------------------


def confusion(probs: np.ndarray, targets: np.ndarray) -> list[list[int]]:
    """Counts, rows by label and columns by prediction: negative, neutral, positive."""
    found = predicted_targets(probs)
    values = list(LABELS.values())
    return [[int(((targets == label) & (found == guess)).sum()) for guess in values] for label in values]


def calibration(probs: np.ndarray, targets: np.ndarray) -> dict:
    """Reliability in ``BINS`` equal bins of D; ``ece``: their |mean D - mean target|, averaged over tokens."""
    bins = np.minimum((probs * BINS).astype(int), BINS - 1)
    rows = []
    for index in range(BINS):
        inside = bins == index
        if inside.any():
            rows.append(
                {
                    "low": index / BINS,
                    "high": (index + 1) / BINS,
                    "tokens": int(inside.sum()),
                    "mean_d": float(probs[inside].mean()),
                    "mean_target": float(targets[inside].mean()),
                }
            )
    error = sum(row["tokens"] * abs(row["mean_d"] - row["mean_target"]) for row in rows) / max(len(probs), 1)
    return {"bins": rows, "ece": error}


def accuracy_within(tokens: Tokens, inside: np.ndarray) -> dict:
    """Accuracy on the edited tokens among those ``inside``, and that of always guessing their majority class."""
    found = token_metrics(tokens.probs[inside], tokens.targets[inside])
    return {
        "tokens": int(inside.sum()),
        "edited": int((inside & tokens.edited).sum()),
        **{name: found[name] for name in ("edited_accuracy", "majority_accuracy", "three_class_accuracy")},
        "reward": float(2 * tokens.probs[inside].mean() - 1),
    }


def measure(tokens: Tokens) -> dict:
    kinds = sorted(set(tokens.kinds.tolist()), key=lambda kind: -(tokens.kinds == kind).sum())
    edited = tokens.edited
    return {
        "tokens": len(tokens.probs),
        **token_metrics(tokens.probs, tokens.targets),
        "confusion": confusion(tokens.probs, tokens.targets),
        "calibration": {
            "edited": calibration(tokens.probs[edited], tokens.targets[edited]),
            "all": calibration(tokens.probs, tokens.targets),
        },
        "by_place": [accuracy_within(tokens, tokens.places == place) for place in sorted(set(tokens.places.tolist()))],
        "by_kind": {kind: accuracy_within(tokens, tokens.kinds == kind) for kind in kinds},
    }


def agreement_with_people(
    tokenizer: PreTrainedTokenizerFast,
    discriminator: PreTrainedModel,
    revisions: Sequence[Revision],
    spans_of: Mapping[str, list[Span]],
    batch_size: int,
) -> dict | None:
    """Tokens that the discriminator calls negative (D < 0.5) against the error spans that people marked in y_r.

    Precision, recall and F1 by token; AUROC of -r for "inside an error span"; beside them the same measures of always
    saying negative. None where none of the revisions has spans.
    """
    known = {r.rejected: r for r in revisions if r.rejected.strip() in spans_of}
    if not known:
        return None
    examples = [label_revision(tokenizer, revision, WHOLE)[0] for revision in known.values()]
    found = token_probs(discriminator, examples, tokenizer.pad_token_id, batch_size)
    agreement, rewards, marks = SpanAgreement(), [], []
    for revision, example, probs in zip(known.values(), examples, found, strict=True):
        spans = spans_of[revision.rejected.strip()]
        visible = visible_tokens(tokenizer, revision, example)
        guesses = [NEGATIVE if probs[place] < 0.5 else POSITIVE for place, _ in visible]
        agreement.add([token for _, token in visible], guesses, spans)
        rewards += [2 * probs[place] - 1 for place, _ in visible]
        marks += [is_marked(token, spans) for _, token in visible]
    scores, inside = -np.array(rewards), np.array(marks, bool)
    share = float(inside.mean())
    always = {"precision": share, "recall": 1.0, "f1": 2 * share / (1 + share)}
    return {**agreement.summary(), "auroc": auroc(scores[inside], scores[~inside]), "always_negative": always}


# ---- the part --------------------------------------------------------------------------------------------------------


def held_out_revisions(options: DiscriminatorOptions) -> list[Revision]:
    if not options.revisions:
        raise InputError("--revisions is missing: revisions.jsonl files of labeling/main.py")
    revisions = list(chain.from_iterable(map(read_revisions, options.revisions)))
    if not revisions:
        raise InputError(f"--revisions {' '.join(options.revisions)}: no revisions in it")
    return revisions if options.eval_share == 1 else hold_out(revisions, options.eval_share)[1]


def samples(tokenizer, discriminator, revisions: Sequence[Revision], max_length: int) -> list[dict]:
    """The first edited revisions: labels beside rewards (Figure 8)."""
    records = []
    for revision in [revision for revision in revisions if revision.modified != revision.rejected][:SHOWN]:
        maps = revision_heatmaps(tokenizer, discriminator, revision, max_length)
        records.append({"prompt": revision.prompt, "texts": list(map(as_record, maps))})
    return records


def run(options: Options) -> None:
    if not options.discriminator:
        raise InputError("--discriminator is missing: the folder of step 2's model")
    revisions = held_out_revisions(options)
    spans = read_error_spans(options.error_spans) if options.error_spans else {}
    tokenizer = load_tokenizer(options.discriminator)
    pairs, summary = token_pairs(revisions, tokenizer, options.max_seq_len, "held out")
    print(summary, flush=True)
    examples = list(chain.from_iterable(pairs))
    judge = Judge(options.discriminator, 2, torch_dtype(options.dtype), options.attn_implementation)
    processes = processes_of(options.num_processes)
    probs = judged(judge, {"held out": examples}, options.scoring_batch_size, processes)["held out"]
    discriminator = judge.load()
    results = {
        "discriminator": options.discriminator,
        "attn_implementation": options.attn_implementation,
        "revisions": len(pairs),
        "prompts": len({revision.prompt for revision in revisions}),
        **measure(gather(tokenizer, examples, probs)),
        "samples": samples(tokenizer, discriminator, revisions, options.max_seq_len),
    }
    if options.error_spans:
        people = agreement_with_people(tokenizer, discriminator, revisions, spans, options.scoring_batch_size)
        if people is None:
            raise InputError(
                f"--error_spans {options.error_spans}: none of its answers is among the held-out revisions"
            )
        results["people"] = people
    save_results(options.out, "discriminator", results)
    accuracy, majority, area = (number(results[key], 3) for key in ("edited_accuracy", "majority_accuracy", "auroc"))
    print(
        f"discriminator: {accuracy} accuracy on edited tokens of {results['revisions']} held-out revisions (always the "
        f"majority class: {majority}), AUROC {area}, calibration error "
        f"{number(results['calibration']['edited']['ece'], 3)}"
    )


main = part_program("discriminator", Options, run)


if __name__ == "__main__":
    sys.exit(main())
