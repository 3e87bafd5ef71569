"""Revisions made elsewhere (--from FILE): the released code's files, QA-feedback, or our own lines.

Reads .json (one list of objects) and .jsonl, also with .gz. The keys of the first record decide the schema.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from deepspeed_chat_tlcr.asking.endpoint import Unusable
from deepspeed_chat_tlcr.asking.journal import RunFolder
from deepspeed_chat_tlcr.asking.progress import Totals
from deepspeed_chat_tlcr.data.sources import read_records, suffix_of
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference, Revision, sha256_of
from labeling.convention import in_convention_of
from labeling.options import Options
from labeling.prompt import framed_as, has_stray_tag, parse_answer, prompt_of
from labeling.revising import describe, revision_of

Read = Callable[[dict], Revision]


def released_revision(record: dict) -> Revision:
    """A record of the released code: ``context``, ``chosen_response``, ``reject_response`` and ``raw_response``
    (GPT-4's whole answer) or ``response`` (the modified text cut out of it, often with an end tag).

    The result has HH-RLHF's form: responses begin with a space.
    """
    prompt = prompt_of(record["context"])
    chosen, rejected = (_response(record[key]) for key in ("chosen_response", "reject_response"))
    answer = parse_answer(record.get("raw_response") or "", rejected)
    if answer.modified is None and record.get("response"):
        answer = parse_answer(record["response"], rejected)
        if answer.modified is None:
            answer = parse_answer("<|Start of Modified Response|>\n" + record["response"], rejected)
    if not (answer.modified or "").strip():
        raise Unusable("tags_missing" if record.get("raw_response") else "empty")
    if has_stray_tag(answer.modified, rejected):
        raise Unusable("tags_missing")
    pair, model = Preference(prompt, chosen, rejected), record.get("model", "imported")
    return _revision(pair, answer.modified, answer.reasoning, model)


def qa_feedback_revision(record: dict, passages: int = 0) -> Revision:
    """A QA-feedback record, with a person's minimal correction of a model's answer as the modified response."""
    preference = qa_feedback_preference(record, passages)
    modified = framed_as(preference.rejected, record["corrected"])
    return _revision(preference, modified, "", "person")


def qa_feedback_preference(record: dict, passages: int = 0) -> Preference:
    """Prompt = the question, after the first ``passages`` of its passages; rejected = the model's answer; chosen = the
    reference answer."""
    shown = [f"{title}\n{' '.join(sentences)}" for title, *sentences in record["passages"][:passages]]
    question = "\n\n".join([*shown, record["question"].strip()])
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return Preference(prompt, _response(record["gold"]), _response(record["prediction"]))


def own_revision(record: dict) -> Revision:
    """A line that labelling wrote; its id is computed anew."""
    preference = Preference(*(_text(record[key]) for key in ("prompt", "chosen", "rejected")))
    model = record.get("model", "imported")
    return _revision(preference, record["modified"], record.get("reasoning", ""), model, record.get("usage") or {})


def reader_for(record: dict, passages: int = 0) -> Read:
    """The reader for a record's schema. Raises ``InputError`` for an unknown one."""
    has_response = "raw_response" in record or "response" in record
    if {"context", "chosen_response", "reject_response"} <= record.keys() and has_response:
        return released_revision
    if {"question", "prediction", "corrected", "gold"} <= record.keys():
        return lambda record: qa_feedback_revision(record, passages)
    if {"prompt", "chosen", "rejected", "modified"} <= record.keys():
        return own_revision
    raise InputError(
        f"unknown schema (keys {', '.join(sorted(record))}). Known: the released code's (context, chosen_response, "
        "reject_response, raw_response or response), QA-feedback's (question, prediction, corrected, gold), ours "
        "(prompt, chosen, rejected, modified)"
    )


def _revision(preference: Preference, modified: str, reasoning: str, model: str, usage: dict | None = None) -> Revision:
    modified = in_convention_of(preference.rejected, _text(modified))
    return revision_of(preference, modified, _text(reasoning), _text(model), usage or {})


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, found {type(value).__name__}")
    value.encode()  # half of a surrogate pair is not text
    return value


def _response(text: str) -> str:
    return f" {_text(text).strip()}"


# ---- reading and writing ---------------------------------------------------------------------------------------------


def read_file(path: Path, passages: int = 0) -> Iterator[Revision | tuple[str, str, str]]:
    """Revisions, and (id, reason, raw text) of records without a modified response, one at a time.

    Raises ``InputError`` with the place of a record that does not fit the schema.
    """
    if not path.is_file():
        raise InputError(f"--from {path}: no such file")
    if suffix_of(path) in (None, ".parquet"):
        raise InputError(f"--from {path}: expected .json, .jsonl, or either with .gz")
    read = None
    by_line = suffix_of(path).startswith(".jsonl")  # else all records may stand on one line
    for number, (line, record) in enumerate(read_records(path, ()), 1):
        try:
            read = read or reader_for(record, passages)
            yield read(record)
        except Unusable as unusable:
            id = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:24]
            yield id, unusable.reason, record.get("raw_response") or record.get("response") or ""
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}:{line}: {what}" if by_line else f"{path}: record {number}: {what}") from None


def import_revisions(options: Options) -> int:
    """Write ``--from``'s records as revisions; those without a modified response become failures."""
    path = Path(options.import_file)
    if not sum(1 for _ in read_file(path, options.passages)):  # the whole file is checked before one line is written
        raise InputError(f"--from {path}: no records in it")
    settings = {"reviser": "import", "data": f"sha256 {sha256_of(path).hex()[:16]}", "passages": options.passages}
    seen: set[int] = set()
    identical = repeated = 0
    with RunFolder(options.output_dir) as folder:
        folder.bind(settings)
        state = folder.read_state()
        done = {int(id[:16], 16) for id in (*state.results, *state.failures)}
        failures: list[str] = []

        def lines() -> Iterator[str]:
            nonlocal identical, repeated
            for item in read_file(path, options.passages):
                id = item.id if isinstance(item, Revision) else item[0]
                key = int(id[:16], 16)
                is_new = key not in seen
                seen.add(key)
                repeated += not is_new
                if not isinstance(item, Revision):
                    if is_new and key not in done:
                        failures.append(json.dumps(dict(zip(("id", "reason", "raw"), item, strict=True))))
                    continue
                identical += item.modified == item.rejected
                if is_new and key not in done:
                    yield item.to_json()

        folder.add_lines(folder.results, lines())
        folder.add_lines(folder.failures, failures)
        after = folder.read_state()
        results, failed = len(after.results), len(after.failures)
        totals = Totals(results + failed, results, failed, after, None, 0.0, 0.0)
        about = {"from": path.name, "identical_to_rejected": identical, "repeated": repeated}
        summary = totals.summary(settings, about, complete=True, stopped=None)
        folder.write_summary(summary)
    print(describe(summary, folder.path))
    print(f"  {identical} unedited (kept: all neutral), {repeated} repeated pairs left out")
    return 0
