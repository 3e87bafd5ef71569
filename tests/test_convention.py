"""Differences that nobody sees: they come from the external model's way of writing and are no edits."""

import doctest
import json
import unicodedata

import pytest
from conftest import byte_level_tokenizer, write_jsonl

from deepspeed_chat_tlcr.asking.endpoint import ChatAnswer, Unusable
from deepspeed_chat_tlcr.records import Preference, Revision, read_revisions
from labeling import convention
from labeling.audit_statistics import Audit
from labeling.convention import in_convention_of
from labeling.main import main
from labeling.revising import read_revision
from labeling.token_labels import label_revision

NFD = "cafe\u0301"


def test_the_docstrings_example():
    results = doctest.testmod(convention)
    assert (results.attempted, results.failed) == (1, 0)


@pytest.mark.parametrize(
    ("rejected", "modified", "expected"),
    [
        ("a\r\nbad\r\nc", "a\ngood\nc", "a\r\ngood\r\nc"),
        ("a\r\nbad", "a\ngood\nand more", "a\r\ngood\r\nand more"),  # new lines in the rejected response's convention
        ("a\nbad", "a\r\ngood\r\nmore", "a\ngood\nmore"),
        ("one\r\ntwo\nbad", "one\ntwo\ngood", "one\r\ntwo\ngood"),  # mixed: each as it is there
        ("a  \nbad\t\nc", "a\ngood\nc", "a  \ngood\t\nc"),
        ("a\nbad", "a  \ngood", "a\ngood"),
        ("Yes.  It is bad.", "Yes. It is good.", "Yes.  It is good."),
        (f"{NFD} bad", "caf\xe9 good", f"{NFD} good"),
        (f"{NFD} bad", "caf\xe9 na\xefve", f"{NFD} nai\u0308ve"),
        ("caf\xe9 bad", f"{NFD} good", "caf\xe9 good"),
        (unicodedata.normalize("NFD", "\ud55c bad"), "\ud55c good", unicodedata.normalize("NFD", "\ud55c good")),
        ("It\u2019s \u201cbad\u201d.", 'It\'s "good".', "It\u2019s \u201cgood\u201d."),
        ("It's bad.", "It\u2019s \u201cgood\u201d\u2026", 'It\'s "good"...'),
        ("a bad\u2011ish b", "a good-ish b", "a good\u2011ish b"),
        ("10\xa0km bad", "10 km good", "10\xa0km good"),
        ("soft\xadened bad", "softened good", "soft\xadened good"),
        ("bad", "good\u200b", "good"),
    ],
)
def test_what_looks_alike_stays_as_the_rejected_response_has_it(rejected, modified, expected):
    assert in_convention_of(rejected, modified) == expected
    assert in_convention_of(rejected, expected) == expected


@pytest.mark.parametrize(
    ("rejected", "modified"),
    [
        ("if x:\n  y", "if x:\n    y"),  # indentation is seen
        ("a\nb", "a\n\nb"),
        ("a\tb", "a b"),
        ("a - b", "a \u2014 b"),
        ("word", "Word"),
        ("", "text"),
    ],
)
def test_what_is_seen_stays_an_edit(rejected, modified):
    assert in_convention_of(rejected, modified) == modified


def test_long_texts_are_given_line_ends_without_an_alignment():
    rejected = "word\r\n" * 5000
    assert in_convention_of(rejected, "more\n" * 5000) == "more\r\n" * 5000


PAIR = Preference("\n\nHuman: Hi\n\nAssistant:", " Fine.", " The caf\xe9\r\nis  bad,\r\nisn\u2019t it?")


def answer_with(modified: str) -> Revision:
    text = f"<|Start of Modified Response|>\n{modified}\n<|End of Modified Response|>"
    return read_revision(PAIR, ChatAnswer(text, "stop", {}, ""), {}, "m")


def test_only_the_words_that_changed_are_labelled():
    revision = answer_with(f"The {NFD}\nis good,  \nisn't it?")
    assert revision.modified == " The caf\xe9\r\nis  good,\r\nisn\u2019t it?"
    tokenizer = byte_level_tokenizer(["a"])  # a token for each byte
    rejected, modified = label_revision(tokenizer, revision, 999)

    def edited(example) -> str:
        return tokenizer.decode([i for i, t in zip(example.response_ids, example.targets, strict=True) if t != 0.5])

    assert (edited(rejected), edited(modified)) == ("ba", "goo")


def test_an_answer_that_only_looks_edited_is_none():
    with pytest.raises(Unusable) as unusable:
        answer_with(f"The {NFD}\nis bad,\nisn't it?")
    assert unusable.value.reason == "identical_to_rejected"


def test_imports_are_mended_and_the_audit_counts_what_older_files_hold(tmp_path):
    old = {"prompt": "p", "chosen": " c", "rejected": " a\r\nbad", "modified": " a\ngood"}
    write_jsonl(tmp_path / "old.jsonl", [old])
    text = (tmp_path / "old.jsonl").read_text()
    (tmp_path / "bom.jsonl").write_text(text, encoding="utf-8-sig")
    (tmp_path / "bom.json").write_text(json.dumps([old]), encoding="utf-8-sig")
    for name in ("old.jsonl", "bom.jsonl", "bom.json"):
        assert main(["--from", str(tmp_path / name), "--output_dir", str(tmp_path / f"out-{name}")]) == 0
        (revision,) = read_revisions(tmp_path / f"out-{name}" / "revisions.jsonl")
        assert revision.modified == " a\r\ngood"
    audit = Audit(byte_level_tokenizer(["a"]))
    audit.add(revision)
    assert audit.summary()["unseen_differences"] == 0
    audit.add(Revision("x", "p", " c", " a\r\nbad", " a\ngood", "", "m", {}))
    assert audit.summary()["unseen_differences"] == 1
