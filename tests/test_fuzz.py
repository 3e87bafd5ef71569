"""About 2,000 inputs that nobody would think of: each is accepted, or refused with an ``InputError`` in one line.

Options go through ``parse``, which loads no model; files through every reader of records, metrics, results, journals.
"""

import gzip
import importlib
import json
import math
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepspeed_chat_tlcr.arguments import default_of, groups_of, parse
from deepspeed_chat_tlcr.asking.journal import RunFolder
from deepspeed_chat_tlcr.asking.models import read_table
from deepspeed_chat_tlcr.data.preferences import parse_data_split
from deepspeed_chat_tlcr.data.sources import read_records
from deepspeed_chat_tlcr.deepspeed_config import read_overrides
from deepspeed_chat_tlcr.errors import InputError, one_line
from deepspeed_chat_tlcr.records import read_json, read_jsonl, read_revisions
from evaluation.curves import read_runs
from evaluation.human.count import read_key, read_votes
from evaluation.pairwise import read_pair_prompt
from evaluation.policies import read_replies
from evaluation.prompts import prompts_of_file
from evaluation.report import refresh_report
from evaluation.results import load_results
from labeling.importing import read_file
from labeling.prompt import load_template
from labeling.selection import Shard

_PROGRAMS = (
    "step1_sft.main step2_discriminator.main step3_ppo_tlcr.main baselines.dpo.main baselines.figa.main "
    "labeling.options labeling.own_answers evaluation.main evaluation.alpaca_eval evaluation.curves "
    "evaluation.discriminator evaluation.heatmap evaluation.human.count evaluation.human.make "
    "evaluation.iterated evaluation.mt_bench evaluation.reward_scores evaluation.side_by_side "
    "evaluation.table1"
)
PROGRAMS = _PROGRAMS.split()


def fuzz(examples: int):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# ---- options ---------------------------------------------------------------------------------------------------------

ODD_WORDS = [
    "",
    " ",
    "nan",
    "-inf",
    "inf",
    "1e400",
    "1e-300",
    "-1",
    "0",
    "1_000",
    "0x10",
    "٣",
    "a\nb",
    "\x00",
    "\ud800",
]
ODD_WORDS += ["9" * 5000, "--", "-x", "--seed", "=", "None", "true", "[]", "é" * 300, "1.5", "2**3", "../..", "~", "%s"]
words = st.one_of(st.sampled_from(ODD_WORDS), st.integers().map(str), st.floats().map(str), st.text(max_size=20))


def accepted_or_refused(call, *arguments):
    """What ``call`` returns, or None where it refuses; the refusal fits on one line of a terminal."""
    try:
        return call(*arguments)
    except InputError as error:
        line = one_line(error)
        assert line.strip()
        assert len(line.splitlines()) == 1
        assert not set(line) & {chr(code) for code in (*range(32), 127)}
        line.encode()
        return None


@pytest.mark.parametrize("program", PROGRAMS)
@fuzz(40)
@given(data=st.data())
def test_options_are_accepted_or_refused(program, data):
    options_class = importlib.import_module(program).Options
    entries = [entry for group in groups_of(options_class) for entry in group.entries]
    chosen = data.draw(st.lists(st.sampled_from(entries), min_size=1, max_size=4))
    line = [
        word
        for entry in entries
        if default_of(options_class, entry) is MISSING and entry not in chosen
        for word in (f"--{entry.name}", "1")
    ]
    for entry in chosen:
        line += [f"--{entry.name}", *data.draw(st.lists(words, max_size=2))]
    options = accepted_or_refused(parse, options_class, line)
    for entry in fields(options_class) if options else ():
        value = getattr(options, entry.name)
        for number in value if isinstance(value, list) else [value]:
            assert not isinstance(number, float) or math.isfinite(number)


@fuzz(150)
@given(text=st.one_of(words, st.lists(words, max_size=4).map(",".join)))
@example(text="0,0,0")
@example(text="nan,1,1")
@example(text="1e308,1e308,1e308")
def test_splits_are_accepted_or_refused(text):
    shares = accepted_or_refused(parse_data_split, text)
    if shares is not None:
        assert math.isclose(sum(shares), 1.0)
        assert all(share >= 0 for share in shares)


@fuzz(100)
@given(text=st.one_of(words, st.tuples(words, words).map("/".join)))
def test_shards_are_accepted_or_refused(text):
    shard = accepted_or_refused(Shard.parse, text)
    assert shard is None or 1 <= shard.index <= shard.count


# ---- files -----------------------------------------------------------------------------------------------------------

_KEYS = (
    "prompt chosen rejected messages role content id modified reasoning model usage instruction question_id "
    "choices turns tokens ended step settings counts seconds sent usd outcome lost study annotator votes "
    "slots models tie name prompt_template question prediction corrected gold context chosen_response "
    "reject_response raw_response response policy/kl input output shutdown efforts train_batch_size "
    "zero_optimization charts runs shares intervals overall"
)
KEYS = _KEYS.split()
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400) | st.integers(-3, 3),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "a\u2028b", "\x00", "x" * 5000]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
records = st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=8)


def as_lines(several: list) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in several).encode()


documents = st.one_of(
    st.lists(records | values, max_size=4).map(as_lines),
    (records | values | st.lists(records, max_size=3)).map(lambda one: json.dumps(one).encode()),
    st.binary(max_size=60),
    st.sampled_from([b"", b"\n\n", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\x00" * 9]),
)
damage = st.sampled_from(
    [
        lambda content: content,
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content.replace(b'"', b"\xff", 1),
    ]
)


def all_of(read):
    return lambda path: list(read(path))


def report_of(path: Path):
    refresh_report(path.parents[1])


def key_of(path: Path):
    read_key(str(path.parents[1]))


def journal(path: Path):
    with RunFolder(path.parent) as folder:
        folder.bind({"n": 1})
        return folder.read_state()


READERS = {
    "records.jsonl": all_of(lambda path: read_records(path, ("prompt", "chosen", "rejected"))),
    "records.json": all_of(lambda path: read_records(path, ("prompt", "chosen", "rejected"))),
    "records.jsonl.gz": all_of(lambda path: read_records(path, ("prompt",))),
    "records.parquet": all_of(lambda path: read_records(path, ("prompt",))),
    "lines.jsonl": all_of(read_jsonl),
    "document.json": read_json,
    "revisions": all_of(read_revisions),
    "imported.jsonl": all_of(read_file),
    "imported.json": all_of(read_file),
    "answers.jsonl": all_of(read_replies),
    "prompts.jsonl": lambda path: prompts_of_file(str(path), 1.0),
    "metrics.jsonl": lambda path: read_runs([f"run={path}"]),
    "pair_prompts.jsonl": read_pair_prompt,
    "template.txt": load_template,
    "prices.json": read_table,
    "deepspeed.json": read_overrides,
    "votes.json": lambda path: read_votes(
        str(path), {"study": "s", "slots": {"ann": {"1": ["a", "b"]}}, "models": ["a", "b"], "tie": True}
    ),
    "human/key.json": key_of,
    **{
        f"{part}/results.json": report_of
        for part in ("mt_bench", "alpaca_eval", "human", "reward_scores", "curves", "discriminator", "side_by_side")
    },
    "audit/results.json": lambda path: load_results(path.parents[1], "audit"),
    **dict.fromkeys(("run.json", "calls.jsonl", "failures.jsonl", "revisions.jsonl"), journal),
}


@pytest.mark.parametrize("name", READERS)
@fuzz(40)
@given(content=documents, harm=damage, cut=st.booleans())
def test_files_are_read_or_refused(name, content, harm, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.parent.mkdir(exist_ok=True)
    content = harm(content)
    if name.endswith(".gz"):
        content = gzip.compress(content)[: -9 if cut else None]
    path.write_bytes(content)
    accepted_or_refused(READERS[name], path)
