"""Revisions made elsewhere, and the audit of them."""

import gzip
import json

import pytest

from deepspeed_chat_tlcr.records import Preference, read_revisions
from labeling.audit import main as audit
from labeling.main import main
from tests.conftest import byte_level_tokenizer, shared
from tests.labeling_helpers import ids, lines, run_json

TEXT = "Lions eat grass and never sleep."
ANSWER = (
    "<|Start of Reasoning|>\nLions eat meat.\n<|End of Reasoning|>\n<|Start {of} Modified Response|>\n"
    "Lions eat meat and seldom sleep.\n<|End {of} Modified Response|>"
)


def released(**more):
    row = {
        "context": "###Human: Hi\n###Assistant: Hello.\n###Human: What do lions eat?",
        "chosen_response": "Meat.",
        "reject_response": TEXT,
        "rejected_token_edit": ["U", "D"],
        "modified_token_edit": ["U", "S"],
    }
    return {**row, **more}


def run(tmp_path, records, name="data.json", **options):
    path = tmp_path / name
    text = json.dumps(records) if ".jsonl" not in name else "".join(json.dumps(row) + "\n" for row in records)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    try:
        return main(["--from", str(path), "--output_dir", str(tmp_path / "out"), *flags])
    except SystemExit as exit:
        return exit.code


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz", "data.jsonl.gz"])
@pytest.mark.parametrize(
    "fields",
    [
        {"raw_response": ANSWER.format(of="Of")},
        {"raw_response": ANSWER.format(of="of")},
        {"raw_response": ANSWER.format(of="Of"), "response": "ignored"},
        {"response": "Lions eat meat and seldom sleep."},
        {"response": "Lions eat meat and seldom sleep.\n<|End of Modified Response|>"},  # as the released code cuts
        {"response": ANSWER.format(of="of")},  # what it keeps where the answer has the paper's capitals
    ],
)
def test_the_released_codes_records(name, fields, tmp_path):
    assert run(tmp_path, [released(**fields)], name) == 0
    (revision,) = read_revisions(tmp_path / "out" / "revisions.jsonl")
    assert revision.prompt == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What do lions eat?\n\nAssistant:"
    assert (revision.chosen, revision.rejected) == (" Meat.", f" {TEXT}")
    assert revision.modified == " Lions eat meat and seldom sleep."
    assert revision.id == Preference(revision.prompt, revision.chosen, revision.rejected).id
    assert revision.reasoning in ("Lions eat meat.", "")


def test_records_without_a_modified_response_are_failures_and_unedited_ones_are_kept(tmp_path, capsys):
    records = [
        released(raw_response="I cannot do that."),
        released(response="Lions eat meat and seldom sleep.\n<|End of Modified Respones|>"),
        released(reject_response="No.", response="No."),
        released(reject_response="No.", response="No."),
        released(raw_response=ANSWER.format(of="Of")),
    ]
    for _ in range(2):  # a second time changes nothing
        assert run(tmp_path, records) == 0
        output = tmp_path / "out"
        assert len(lines(output / "revisions.jsonl")) == 2
        without, misspelt = lines(output / "failures.jsonl")
        assert (without["reason"], without["raw"]) == ("tags_missing", "I cannot do that.")
        assert (misspelt["reason"], misspelt["raw"]) == ("tags_missing", records[1]["response"])
        assert set(ids(output).values()) == {1}
    assert run_json(output)["identical_to_rejected"] == 2
    assert run_json(output)["repeated"] == 1


@pytest.mark.parametrize(
    ("records", "name", "complaint"),
    [
        ([{"a": 1}], "x.json", "record 1: unknown schema (keys a)"),
        ([released(response="x"), {"context": "y"}], "x.jsonl", "x.jsonl:2: no 'chosen_response'"),
        ([released(response="x"), released(response="x", reject_response=3)], "x.json", "record 2: text expected"),
        ([], "x.json", "no records in it"),
        ([released(response="x")], "x.txt", "expected .json, .jsonl"),
    ],
)
def test_records_that_are_wrong_are_named_before_anything_is_written(records, name, complaint, tmp_path, capsys):
    assert run(tmp_path, records, name) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_list_is_read_piece_by_piece(tmp_path, capsys):
    rows = [released(response=f"{i} " + "x " * 3000, reject_response=f"{i}") for i in range(300)]  # 2 MB
    assert run(tmp_path, rows) == 0
    assert len(lines(tmp_path / "out" / "revisions.jsonl")) == 300
    (tmp_path / "cut.json").write_text(json.dumps(rows)[:-5000])
    with pytest.raises(SystemExit):
        main(["--from", str(tmp_path / "cut.json"), "--output_dir", str(tmp_path / "cut")])
    assert "cut.json:1: not JSON" in capsys.readouterr().err


def test_our_own_lines_and_people_s_corrections(tmp_path):
    path = shared("qa_feedback_dev.jsonl.gz")
    assert main(["--from", str(path), "--output_dir", str(tmp_path / "qa")]) == 0
    revisions = list(read_revisions(tmp_path / "qa" / "revisions.jsonl"))
    assert len(revisions) == 300
    assert all(r.prompt.startswith("\n\nHuman: ") and r.prompt.endswith("\n\nAssistant:") for r in revisions)
    assert revisions[0].prompt == "\n\nHuman: When did fast and furious 6 come out?\n\nAssistant:"
    assert revisions[0].model == "person"
    assert all(r.rejected[0] == r.modified[0] == r.chosen[0] == " " for r in revisions)
    assert main(["--from", str(path), "--passages", "1", "--output_dir", str(tmp_path / "qa1")]) == 0
    (first, *_) = read_revisions(tmp_path / "qa1" / "revisions.jsonl")
    assert "is a 2013 American action film directed by Justin Lin" in first.prompt
    assert first.prompt.endswith("\n\nWhen did fast and furious 6 come out?\n\nAssistant:")
    assert main(["--from", str(tmp_path / "qa" / "revisions.jsonl"), "--output_dir", str(tmp_path / "again")]) == 0
    assert list(read_revisions(tmp_path / "again" / "revisions.jsonl")) == revisions


def test_the_audit_of_people_s_corrections(tmp_path):
    path = shared("qa_feedback_dev.jsonl.gz")
    assert main(["--from", str(path), "--output_dir", str(tmp_path)]) == 0
    texts = [r.rejected + r.modified + r.prompt for r in read_revisions(tmp_path / "revisions.jsonl")]
    byte_level_tokenizer(texts, 4096).save_pretrained(tmp_path / "tokenizer")
    arguments = [str(tmp_path / "revisions.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    audit([*arguments, "--error_spans", str(path)])
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["revisions"] == 300
    assert found["unedited"] == 5
    assert sum(found["edit_ratio"]["histogram"]["counts"]) == 300
    figures = found["agreement_with_people"]
    assert figures["responses"] == 300
    assert figures["precision"] == pytest.approx(0.875, abs=0.01)
    assert figures["recall"] == pytest.approx(0.900, abs=0.01)
    assert figures["f1"] == pytest.approx(0.887, abs=0.01)
    html = (tmp_path / "audit.html").read_text()
    assert "Agreement with people" in html
    assert "Most edited" in html


def test_the_audits_figures_by_hand(tmp_path):
    """Two revisions whose words and tokens can be counted: each word is one token."""
    tokenizer = word_tokenizer()
    rows = [
        {"prompt": "a", "chosen": " b", "rejected": " c d c d", "modified": " c e c d"},
        {"prompt": "a", "chosen": " f", "rejected": " g", "modified": " <b>"},
        {"prompt": "a", "chosen": " f", "rejected": " g", "modified": " <b>"},
    ]
    write = "".join(
        json.dumps({"id": str(i // 2 + i % 2), **row, "reasoning": "<i>", "model": "m", "usage": {}}) + "\n"
        for i, row in enumerate(rows)
    )
    (tmp_path / "revisions.jsonl").write_text(write)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    audit([str(tmp_path / "revisions.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")])
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["revisions"] == 3
    assert found["repeated_pairs"] == found["repeated_revisions"] == 1
    assert found["tokens"]["rejected"] == {"negative": 3, "neutral": 3}
    assert found["tokens"]["modified"] == {"positive": 3, "neutral": 3}
    assert found["most_deleted_words"] == [["g", 2], ["d", 1]]
    assert found["most_added_words"] == [["<b>", 2], ["e", 1]]
    assert found["suspected_rewrites"]["count"] == 2
    assert found["edit_ratio"]["mean"] == pytest.approx((0.25 + 1 + 1) / 3, abs=1e-6)
    assert found["length_change_tokens"]["mean"] == 0
    # Of four tokens the second is edited, and stands a quarter in: in the third tenth. Single ones stand in the first.
    assert found["by_position"]["negative"][:3] == [pytest.approx(2 / 3, abs=1e-5), None, 1.0]
    html = (tmp_path / "audit.html").read_text()
    assert "&lt;b&gt;" in html
    assert (
        "<b>" not in html.split("</style>")[1].replace("<b>3</b>", "").replace("<b>2</b>", "").split("Most edited")[-1]
    )
    assert "<i>" not in html


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "a", "b", "c", "d", "e", "f", "g", "<b>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
