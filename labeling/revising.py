"""From a preference to a question, and from the answer to a revision, or to the reason why there is none."""

import re
from collections import Counter

from rapidfuzz.distance import LCSseq

from deepspeed_chat_tlcr.asking.endpoint import ChatAnswer, ChatRequest, Unusable
from deepspeed_chat_tlcr.records import Preference, Revision
from labeling.prompt import TEMPLATE, build_messages, has_stray_tag, parse_answer

MAX_EDIT_RATIO = 0.85

UNUSABLE = {
    "empty": "no text",
    "refusal": "the model declined, or a filter stopped it",
    "cut_by_max_tokens": "the answer hit --max_tokens before the modified response ended",
    "tags_missing": "no modified response between its tags",
    "echo_of_instruction": "the instruction repeated instead of an answer",
    "identical_to_rejected": "nothing was edited",
    "identical_to_chosen": "the chosen response was copied",
    "rewrite": "a new text rather than an edit: edit ratio above --max_edit_ratio",
}

_REFUSAL = re.compile(
    r"\b(i['’]?m sorry|i am sorry|i apologi[sz]e|i (can['’]?t|cannot|can not|won['’]?t|am unable to|['’]m unable to)"
    r"|i['’]m (not able|unable) to|as an ai)\b",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\(?(the modified non-preferred response|your reasoning)\)?", re.IGNORECASE)


def edit_ratio(rejected: str, modified: str) -> float:
    """The share of the words of both responses that the edit does not keep: 0 no edit, 1 nothing in common.

    Of the 300 corrections that people made in QA-feedback 97 % stay below 0.85; of 1,500 pairs of unrelated responses
    to one prompt (HH-RLHF, harmless-base) 20 % do.
    """
    before, after = rejected.split(), modified.split()
    words = len(before) + len(after)
    return 1 - 2 * LCSseq.similarity(before, after) / words if words else 0.0


def read_revision(
    preference: Preference, answer: ChatAnswer, usage: dict, model: str, max_edit_ratio: float = MAX_EDIT_RATIO
) -> Revision:
    """The revision that an answer holds. Raises ``Unusable`` with one of the reasons in ``UNUSABLE``."""
    if answer.finish_reason == "content_filter":
        raise Unusable("refusal")
    if not answer.text.strip():
        raise Unusable("empty")
    parsed = parse_answer(answer.text, preference.rejected)
    if answer.finish_reason == "length" and not parsed.complete:
        raise Unusable("cut_by_max_tokens")
    if parsed.modified is None:
        if "<|end of non-preferred response|>" in answer.text.lower():
            raise Unusable("echo_of_instruction")
        raise Unusable("refusal" if _REFUSAL.search(answer.text[:300]) else "tags_missing")
    modified = parsed.modified
    if _PLACEHOLDER.fullmatch(modified.strip()):
        raise Unusable("echo_of_instruction")
    if not modified.strip():
        raise Unusable("empty")
    if has_stray_tag(modified, preference.rejected):
        raise Unusable("tags_missing")
    if modified.strip() == preference.rejected.strip():
        raise Unusable("identical_to_rejected")
    if modified.strip() == preference.chosen.strip():
        raise Unusable("identical_to_chosen")
    if edit_ratio(preference.rejected, modified) > max_edit_ratio:
        raise Unusable("rewrite")
    return revision_of(preference, modified, parsed.reasoning, model, usage)


def revision_of(pair: Preference, modified: str, reasoning: str, model: str, usage: dict) -> Revision:
    return Revision(pair.id, pair.prompt, pair.chosen, pair.rejected, modified, reasoning, model, usage)


def question(
    preference: Preference,
    id: str,
    model: str,
    template: str = TEMPLATE,
    max_edit_ratio: float = MAX_EDIT_RATIO,
    seed: int | None = None,
) -> ChatRequest:
    """The request for a revision of ``preference``, whose id is given so that it is computed only once."""

    def accept(answer: ChatAnswer, usage: dict) -> str:
        return read_revision(preference, answer, usage, model, max_edit_ratio).to_json()

    return ChatRequest(id, build_messages(preference, template), accept, seed)


def describe(summary: dict, path) -> str:
    """The last lines of a run: results, costs, and the number of failures of each kind."""
    counts, tokens = summary["counts"], summary["tokens"]
    cost = f", US$ {summary['usd']:.2f}" if summary["usd"] else ""
    results = f"{counts['revisions']} revisions, {counts['failures']} failures of {counts['pairs']} pairs"
    spent = f"{tokens['prompt']:,} tokens in, {tokens['completion']:,} out{cost}, {summary['seconds']:.0f} s"
    lines = [f"{path}: {results}; {spent}"]
    unusable = Counter(counts["unusable_answers"]).most_common()
    lines += [f"  {count} answers unusable: {reason} ({UNUSABLE.get(reason, '')})" for reason, count in unusable]
    faults = Counter(counts["calls_without_answer"]).most_common()
    lines += [f"  {count} calls without an answer: {kind}" for kind, count in faults]
    if counts["failures"]:
        lines.append("  failures.jsonl holds reasons and raw texts; --retry_failed asks for those again")
    return "\n".join(lines)
