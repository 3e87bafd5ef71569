"""Preference data: every named format, local files, chat messages, the split, bad input, the cache, memory."""

import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from conftest import ROOT, byte_level_tokenizer, patience, preferences, shared, write_jsonl
from datasets import Dataset, DatasetDict
from fake_hub import fake_hub

from deepspeed_chat_tlcr.data import preferences as preference_data
from deepspeed_chat_tlcr.data import sources
from deepspeed_chat_tlcr.data.formats import FORMATS
from deepspeed_chat_tlcr.data.preferences import (
    PARTS,
    load_preferences,
    parse_data_split,
    part_of_prompts,
    split_indices,
)
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(preference_data, "_default_cache", lambda: tmp_path / "cache")


def record(number: int) -> dict:
    return {"prompt": f"\n\nHuman: {number}?\n\nAssistant:", "chosen": f" good {number}", "rejected": f" bad {number}"}


def everything(path, split="train", **options) -> list[Preference]:
    return list(load_preferences(str(path), "all", split, **options))


def in_own_split(count: int, split: str) -> list[int]:
    """Which records DeepSpeed-Chat's 9:1 split gives to train or eval, by other means than the code under test."""
    order = list(range(count))
    np.random.RandomState(1234).shuffle(order)
    cut = count - round(0.1 * count)
    return order[:cut] if split == "train" else order[cut:]


# ---- data sets known by name -----------------------------------------------------------------------------------------

PAIR = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " Go."}
WEB = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "Why is the sky blue?"},
    "answer_0": "It scatters [1, 2] light (Rayleigh).",
    "answer_1": "It[3] is paint.",
}
PASSAGES = {
    "query_id": "0",
    "query": "谁写了红楼梦",
    "positive_passages": [
        {"docid": "1", "text": "曹雪芹", "title": "a"},
        {"docid": "2", "text": "second", "title": "b"},
    ],
    "negative_passages": [{"docid": "3", "text": "吴承恩", "title": "c"}],
}
MKQA = {
    "query": "who",
    "queries": {"en": "who", "zh_cn": "谁", "ja": "誰"},
    "answers": {"zh_cn": [{"type": "entity", "text": "他"}], "ja": [{"type": "entity", "text": "彼"}]},
}

NAMED = [  # name, eval split (None: 9:1 of train), record, prompt, chosen, rejected
    ("Dahoas/rm-static", "test", PAIR | {"response": "x"}, "\n\nHuman: Hi\n\nAssistant:", " Hello!", " Go."),
    ("Dahoas/full-hh-rlhf", "test", PAIR, "\n\nHuman: Hi\n\nAssistant:", " Hello!", " Go."),
    (
        "Dahoas/template-full-hh-rlhf",
        "test",
        PAIR | {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"},
        "[INST] a</s>[/INST] b</s>[INST] c</s>[/INST]",
        " Hello!",
        " Go.",
    ),
    (
        "Dahoas/synthetic-instruct-gptj-pairwise",
        None,
        {"prompt": "Hi?", "chosen": "Hello!", "rejected": "Go."},
        " Human: Hi? Assistant:",
        " Hello!",
        " Go.",
    ),
    (
        "yitingxie/rlhf-reward-datasets",
        "test",
        {"prompt": "\n\nHuman: Hi\n\n", "chosen": "Assistant: Hello!", "rejected": "Assistant: Go. Assistant: x"},
        "\n\nHuman: Hi\n\nAssistant:",
        " Hello!",
        " Go. Assistant: x",
    ),
    (
        "openai/webgpt_comparisons",
        None,
        WEB | {"score_0": -0.5, "score_1": 0.5},
        " Human: Why is the sky blue? Assistant:",
        " It is paint.",
        " It scatters light.",
    ),
    (
        "stanfordnlp/SHP",
        "validation",
        {"history": "Title", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        " Human: Title Assistant:",
        " a",
        " b",
    ),
    (
        "pvduy/sharegpt_alpaca_oa_vicuna_format",
        "test",
        {"prompt": "USER: Hi ASSISTANT:", "label": "Hello!"},
        "Human: Hi Assistant:",
        " Hello!",
        None,
    ),
    ("wangrui6/Zhihu-KOL", None, {"INSTRUCTION": "问", "RESPONSE": "答"}, " Human: 问 Assistant:", " 答", None),
    ("Cohere/miracl-zh-queries-22-12", "dev", PASSAGES, " Human: 谁写了红楼梦 Assistant:", " 曹雪芹", " 吴承恩"),
    (
        "Hello-SimpleAI/HC3-Chinese",
        None,
        {"question": "问", "human_answers": ["答", "二"], "chatgpt_answers": ["机"]},
        " Human: 问 Assistant:",
        " 答",
        None,
    ),
    ("mkqa-Chinese", None, MKQA, " Human: 谁 Assistant:", " 他", None),
    ("mkqa-Japanese", None, MKQA, " Human: 誰 Assistant:", " 彼", None),
    ("Cohere/miracl-ja-queries-22-12", "dev", PASSAGES, " Human: 谁写了红楼梦 Assistant:", " 曹雪芹", " 吴承恩"),
    (
        "lmqg/qg_jaquad",
        "validation",
        {"question": "問", "sentence": "文", "paragraph": "段"},
        " Human: 問 Assistant:",
        " 文",
        None,
    ),
    (
        "lmqg/qag_jaquad",
        "validation",
        {"questions": ["問", "二"], "paragraph": "段"},
        " Human: 問 Assistant:",
        " 段",
        None,
    ),
]


def test_every_name_of_deepspeed_chat_is_known():
    assert [known.name for known in FORMATS] == [name for name, *_ in NAMED] + ["local/jsonfile"]


@pytest.mark.parametrize(
    ("name", "eval_split", "row", "prompt", "chosen", "rejected"), NAMED, ids=lambda x: str(x)[:30]
)
def test_named_format_from_a_saved_dataset_whose_path_has_the_name(
    tmp_path, name, eval_split, row, prompt, chosen, rejected
):
    folder = tmp_path / f"{name}-saved"
    splits = {"train": [row] * 20, "test": [row]} | ({eval_split: [row] * 3} if eval_split else {})
    DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()}).save_to_disk(str(folder))
    expected = Preference(prompt, chosen, rejected)
    for split, count in (("train", 20 if eval_split else 18), ("eval", 3 if eval_split else 2)):
        assert everything(folder, split, require_rejected=rejected is not None) == [expected] * count
    if rejected is None:
        with pytest.raises(InputError, match=f"{name} has no rejected responses"):
            load_preferences(str(folder), "reward", "train")


def test_webgpt_tie_takes_the_first_answer_and_shp_zero_the_second(tmp_path):
    ties = [WEB | {"score_0": score, "score_1": 0.0} for score in (0.0, 0.25)] * 10
    Dataset.from_list(ties).save_to_disk(str(tmp_path / "openai" / "webgpt_comparisons"))
    assert {p.chosen for p in everything(tmp_path / "openai" / "webgpt_comparisons")} == {" It scatters light."}
    rows = [{"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": label} for label in (0, 1)]
    (tmp_path / "stanfordnlp" / "SHP").mkdir(parents=True)
    write_jsonl(tmp_path / "stanfordnlp" / "SHP" / "train.jsonl", rows)
    write_jsonl(tmp_path / "stanfordnlp" / "SHP" / "validation.jsonl", rows)
    assert [p.chosen for p in everything(tmp_path / "stanfordnlp" / "SHP")] == [" b", " a"]


def test_sets_with_an_own_split_ignore_other_files(tmp_path):
    folder = tmp_path / "wangrui6" / "Zhihu-KOL"
    folder.mkdir(parents=True)
    for split, count in (("train", 20), ("test", 5)):
        write_jsonl(folder / f"{split}.jsonl", [{"INSTRUCTION": str(n), "RESPONSE": "x"} for n in range(count)])
    for split in ("train", "eval"):
        expected = [f" Human: {number} Assistant:" for number in in_own_split(20, split)]
        assert [p.prompt for p in everything(folder, split, require_rejected=False)] == expected


def test_named_records_that_lack_something_are_left_out_after_the_split(tmp_path, caplog):
    """As in DeepSpeed-Chat: the indices count them, the parts do not contain them."""
    row = {"prompt": "USER: Hi ASSISTANT:", "label": "Hello!"}
    rows = [row | {"prompt": f"USER: {number} ASSISTANT:"} for number in range(20)]
    rows[3]["label"], rows[5]["prompt"] = None, ""
    folder = tmp_path / "pvduy" / "sharegpt_alpaca_oa_vicuna_format"
    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows)).save_to_disk(str(folder))
    order = np.arange(20)
    np.random.RandomState(1234).shuffle(order)
    for part, (start, end) in zip(PARTS, ((0, 4), (4, 12), (12, 20)), strict=True):
        found = load_preferences(str(folder), part, "train", require_rejected=False)
        expected = [f"Human: {n} Assistant:" for n in order[start:end] if n not in (3, 5)]
        assert [p.prompt for p in found] == expected
    assert "2 of 20 records lack a prompt or response and are left out" in caplog.text

    passages = [PASSAGES, PASSAGES | {"negative_passages": []}]
    folder = tmp_path / "Cohere" / "miracl-ja-queries-22-12"
    DatasetDict(train=Dataset.from_list(passages), dev=Dataset.from_list(passages)).save_to_disk(str(folder))
    assert len(everything(folder)) == 1
    assert len(everything(folder, require_rejected=False)) == 2


def test_local_jsonfile(tmp_path, monkeypatch):
    rows = [{"prompt": "Human: Hi Assistant:", "chosen": "Hello!", "rejected": "Go."}]
    data = tmp_path / "run" / "data"
    data.mkdir(parents=True)
    write_jsonl(data / "train.json", rows)
    (data / "eval.json").write_text(json.dumps(rows * 2, indent=2))
    monkeypatch.chdir(data.parent)
    expected = Preference(" Human: Hi Assistant:", " Hello!", " Go.")
    assert everything("local/jsonfile") == [expected]
    assert everything("local/jsonfile", "eval") == [expected] * 2

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"needs train.json and eval.json"):
        load_preferences("local/jsonfile", "sft", "train")
    folder = tmp_path / "local" / "jsonfile"
    folder.mkdir(parents=True)
    for name in ("train", "eval"):
        (data / f"{name}.json").rename(folder / f"{name}.json")
    assert everything(folder) == [expected]
    del rows[0]["rejected"]
    write_jsonl(folder / "train.json", rows)
    with pytest.raises(InputError, match=r"train\.json:1: no 'rejected'"):
        load_preferences(str(folder), "sft", "train")


def on_the_hub(program: str, endpoint: str, home: Path, offline: bool = False) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_DATASETS_OFFLINE": "1"} if offline else {}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=patience(60)
    )


def test_hub_data_sets_as_files_and_as_a_former_script(tmp_path):
    def parquet(rows: list[dict]) -> bytes:
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file.getvalue()

    hc3, jaquad = "Hello-SimpleAI/HC3-Chinese", "lmqg/qg_jaquad"
    questions = [{"question": f"q{number}", "sentence": f"s{number}"} for number in range(3)]
    answers = [{"question": f"q{number}", "human_answers": [f"a{number}"]} for number in range(20)]
    trees = {
        ("Dahoas/rm-static", "main"): {
            "data/train-00000-of-00001.parquet": parquet([record(number) for number in range(4)]),
            "data/test-00000-of-00001.parquet": parquet([record(9)]),
        },
        (jaquad, "main"): {"qg_jaquad.py": b"raise RuntimeError('never run')"},
        (jaquad, "refs/convert/parquet"): {
            "default/train/0000.parquet": parquet(questions),
            "default/validation/0000.parquet": parquet(questions[:1]),
        },
        (hc3, "main"): {"HC3-Chinese.py": b"raise RuntimeError('never run')"},
        (hc3, "refs/convert/parquet"): {  # the Hub's export: one folder per configuration; "all" holds all of them
            "all/train/0000.parquet": parquet(answers),
            "baike/train/0000.parquet": parquet(answers[:7]),
        },
    }
    program = f"""
from deepspeed_chat_tlcr.data.preferences import load_preferences
print([p.chosen for p in load_preferences("Dahoas/rm-static", "all", "train")])
print([p.chosen for p in load_preferences("Dahoas/rm-static", "all", "eval")])
print([p.chosen for p in load_preferences("{jaquad}", "all", "train", require_rejected=False)])
print([p.chosen for p in load_preferences("{jaquad}", "all", "eval", require_rejected=False)])
"""
    others = """
print(sorted(p.chosen for p in load_preferences("Hello-SimpleAI/HC3-Chinese", "all", "train", require_rejected=False)))
print(load_preferences("Dahoas/full-hh-rlhf", "all", "train"))
"""
    with fake_hub(trees) as endpoint:
        done = on_the_hub(program + others, endpoint, tmp_path / "home")
    answers = done.stdout.splitlines()
    assert answers == [
        str([f" good {number}" for number in range(4)]),
        str([" good 9"]),
        str([" s0", " s1", " s2"]),
        str([" s0"]),
        str(sorted(f" a{number}" for number in in_own_split(20, "train"))),
    ]
    assert "Hub data set Dahoas/full-hh-rlhf cannot be loaded (Dataset 'Dahoas/full-hh-rlhf' doesn't" in done.stderr

    # The filled cache serves without the Hub.
    again = on_the_hub(program, endpoint, tmp_path / "home", offline=True)
    assert again.stdout.splitlines() == answers[:4], again.stderr[-2000:]


def test_offline_hub_data_set_says_what_to_do():
    with pytest.raises(InputError, match=r"Hub data set Dahoas/rm-static cannot be loaded .*Offline.*save_to_disk"):
        load_preferences(["Dahoas/rm-static"], "sft", "train")


# ---- the split -------------------------------------------------------------------------------------------------------


def test_split_of_ten_and_seven_records():
    """DeepSpeed-Chat's own index files for 10 and 7 records with seed 1234."""
    assert [part.tolist() for part in split_indices(10, (0.2, 0.4, 0.4), 1234)] == [[7, 2], [9, 1, 0, 8], [4, 5, 6, 3]]
    assert [part.tolist() for part in split_indices(7, (0.2, 0.4, 0.4), 1234)] == [[2], [1, 6, 0], [4, 5, 3]]
    assert [part.tolist() for part in split_indices(10, (0.9, 0.1), 1234)] == [[7, 2, 9, 1, 0, 8, 4, 5, 6], [3]]


@pytest.mark.parametrize("text", ["2,4,4", "1,1,1", "10,0,0", "0,5,5", ".2,.4,.4", "3,3,4", "1,2,7"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11, 101, 1500])
def test_split_against_independent_arithmetic(text, size):
    numbers = [float(number) for number in text.split(",")]
    shares = [number / sum(numbers) for number in numbers]
    lengths = [round(share * size) for share in shares]
    surplus = sum(lengths) - size
    taken = min(lengths[0], surplus)  # a negative surplus is given
    lengths[0] -= taken
    lengths[1] -= surplus - taken  # only where the first part has too little, which breaks DeepSpeed-Chat's own
    order = list(range(size))
    np.random.RandomState(7).shuffle(order)
    expected = [[order.pop(0) for _ in range(length)] for length in lengths]
    assert [part.tolist() for part in split_indices(size, parse_data_split(text), 7)] == expected
    assert sorted(index for part in expected for index in part) == list(range(size))


@pytest.mark.parametrize("text", ["", "2,4", "2,4,4,1", "a,b,c", "2,4,-4", "0,0,0", "nan,1,1", "inf,1,1", "2;4;4"])
def test_splits_that_make_no_sense(text):
    with pytest.raises(InputError, match=r"--data_split .* expected three numbers"):
        load_preferences("unread", "sft", "train", text)


def test_unusual_split_is_scaled_and_said(caplog):
    assert parse_data_split("1,2,2") == (0.2, 0.4, 0.4)
    assert "--data_split 1,2,2 adds up to 5, not 1, 10 or 100: read as 20.0 %, 40.0 %, 40.0 %" in caplog.text


def test_single_file_is_split_nine_to_one_then_into_parts():
    path = shared("hh_harmless_base_test.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    for split, bounds in (("train", (0, 270, 810, 1350)), ("eval", (0, 30, 90, 150))):
        rows = in_own_split(1500, split)
        order = list(range(len(rows)))
        np.random.RandomState(1234).shuffle(order)
        for part, start, end in zip(PARTS, bounds, bounds[1:], strict=False):
            found = load_preferences([str(path)], part, split)
            expected = [records[rows[index]] for index in order[start:end]]
            assert [(p.prompt, p.chosen, p.rejected) for p in found] == [tuple(r.values()) for r in expected]


def test_entries_are_split_each_and_concatenated(tmp_path):
    for name, numbers in (("a", range(10)), ("b", range(100, 110))):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [record(number) for number in numbers])
        write_jsonl(tmp_path / name / "eval.jsonl", [record(number + 50) for number in numbers])
    found = load_preferences([str(tmp_path / "b"), str(tmp_path / "a")], "reward", "train")
    assert [p.chosen for p in found] == [f" good {n}" for n in (109, 101, 100, 108, 9, 1, 0, 8)]
    found = load_preferences([str(tmp_path / "a"), str(tmp_path / "b")], "rl", "eval", data_seed=1234)
    assert [p.chosen for p in found] == [f" good {n}" for n in (54, 55, 56, 53, 154, 155, 156, 153)]


def test_indexing_slicing_and_pickling(tmp_path):
    for name, numbers in (("a", range(5)), ("b", range(5, 8))):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [record(number) for number in numbers])
        write_jsonl(tmp_path / name / "test.jsonl", [record(0)])
    found = load_preferences([str(tmp_path / "a"), str(tmp_path / "b")], "all", "train")
    texts = [f" good {number}" for number in range(8)]
    assert len(found) == 8
    assert found[-1].chosen == texts[-1]
    assert found[np.int64(5)].chosen == texts[5]
    assert [p.chosen for p in found[1:7:2]] == texts[1:7:2]
    assert [p.chosen for p in found[::-1]] == texts[::-1]
    assert len(found[8:]) == 0
    assert [p.chosen for p in pickle.loads(pickle.dumps(found))] == texts
    assert len(pickle.dumps(found)) < 2000  # the text stays on disk
    for index in (8, -9):
        with pytest.raises(IndexError):
            found[index]


def test_prompts_of_the_parts(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [record(number) for number in range(10)])
    write_jsonl(tmp_path / "eval.jsonl", [record(10)])
    parts = part_of_prompts([str(path)])
    inside = {part: [n for n in range(11) if record(n)["prompt"] in prompts] for part, prompts in parts.items()}
    assert inside == {"sft": [2, 7], "reward": [0, 1, 8, 9], "rl": [3, 4, 5, 6]}
    assert [len(parts[part]) for part in PARTS] == [2, 4, 4]
    assert len(part_of_prompts(str(path), "10,0,0")["rl"]) == 0


# ---- local files -----------------------------------------------------------------------------------------------------

ROWS = [record(number) for number in range(3)]


def write_parquet(path: Path, rows: list[dict]):
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_gzip(path: Path, text: str):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
WRITERS = {
    "jsonl": lambda path: write_jsonl(path, ROWS),
    "jsonl.gz": lambda path: write_gzip(path, LINES.replace("\n", "\n\n")),
    "json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "json.gz": lambda path: write_gzip(path, json.dumps(ROWS)),
    "parquet": lambda path: write_parquet(path, [row | {"more": 1} for row in ROWS]),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_local_folder_and_its_eval_file(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"train.{suffix}")
    for evaluation in ("test", "validation", "eval"):  # each one written takes precedence over those before it
        write_jsonl(tmp_path / f"{evaluation}.jsonl", [record(len(evaluation))])
        expected = Preference(**record(len(evaluation)))
        assert everything(tmp_path, "eval") == [expected]
        assert everything(tmp_path / f"train.{suffix}", "eval") == [expected]
    assert everything(tmp_path) == [Preference(**row) for row in ROWS]


def test_shards_in_the_data_folder_of_a_cloned_repository(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in range(3):
        write_parquet(tmp_path / "data" / f"train-0000{shard}-of-00003.parquet", [ROWS[shard]])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS)
    assert everything(tmp_path) == [Preference(**row) for row in ROWS]


def test_a_clone_with_several_train_splits_is_read_one_at_a_time(tmp_path):
    for number, kind in enumerate(("prefs", "sft", "gen")):
        for side, offset in (("train", 0), ("test", 10)):
            name = f"{side}_{kind}-00000-of-00001.parquet"
            (tmp_path / "data").mkdir(exist_ok=True)
            write_parquet(tmp_path / "data" / name, [record(number + offset)])
    with pytest.raises(InputError, match=r"several train splits \(train_gen, train_prefs, train_sft\).*/train_gen"):
        everything(tmp_path)
    for path in ("train_prefs", "data/train_prefs", "data/train_prefs-00000-of-00001.parquet"):
        assert everything(tmp_path / path) == [Preference(**record(0))]
        assert everything(tmp_path / path, "eval") == [Preference(**record(10))]
    assert everything(tmp_path / "train_sft", "eval") == [Preference(**record(11))]


def test_names_of_shards_and_of_an_only_train_split(tmp_path):
    for shard, hashed in enumerate(("", "-6ef3991c06080e14", "-0f3991c06080e146")):
        write_parquet(tmp_path / f"train_hh-0000{shard}-of-00003{hashed}.parquet", [ROWS[shard]])
    write_jsonl(tmp_path / "eval.jsonl", [record(9)])
    assert everything(tmp_path) == [Preference(**row) for row in ROWS]
    assert everything(tmp_path, "eval") == [Preference(**record(9))]


def test_json_that_is_no_chat_is_text(tmp_path):
    rows = [{**row, "chosen": '{"value": 3, "from": "here"}', "rejected": '[{"role": "admin"}]'} for row in ROWS]
    assert everything(write_jsonl(tmp_path / "train.jsonl", rows).parent)[0].rejected == '[{"role": "admin"}]'


def test_two_forms_of_one_split_are_not_read_as_more_records(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_parquet(tmp_path / "train.parquet", ROWS)
    with pytest.raises(InputError, match=r"train\.jsonl and train\.parquet are two forms of one split; name one file"):
        everything(tmp_path)
    assert everything(tmp_path / "train.parquet") == [Preference(**row) for row in ROWS]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json", "data.json.gz"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    content = b"\xef\xbb\xbf" + LINES.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / f"plain-{name.removesuffix('.gz')}").write_text(LINES)
    assert everything(tmp_path / name) == everything(tmp_path / f"plain-{name.removesuffix('.gz')}")


def test_responses_that_repeat_the_prompt_are_refused_unless_by_chance(tmp_path):
    doubled = [{**row, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + "x"} for row in ROWS]
    by_chance = [record(number) for number in range(3)]
    with pytest.raises(InputError, match=r"a\.jsonl: in 3 of 3 records the responses begin with the prompt"):
        everything(write_jsonl(tmp_path / "a.jsonl", doubled))
    without = [{key: text for key, text in row.items() if key != "rejected"} for row in doubled]
    with pytest.raises(InputError, match=r"c\.jsonl: in 3 of 3 records"):
        everything(write_jsonl(tmp_path / "c.jsonl", without), require_rejected=False)
    path = write_jsonl(tmp_path / "b.jsonl", doubled + by_chance)
    assert len(load_preferences(str(path), "all", "train")) == 5  # nine tenths of six


def test_saved_dataset_without_eval_is_split_nine_to_one(tmp_path):
    Dataset.from_list([record(number) for number in range(30)]).save_to_disk(str(tmp_path / "mine"))
    for split in ("train", "eval"):
        expected = [Preference(**record(number)) for number in in_own_split(30, split)]
        assert everything(tmp_path / "mine", split) == expected
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(str(tmp_path / "two"))
    assert everything(tmp_path / "two") == [Preference(**row) for row in ROWS]
    assert everything(tmp_path / "two", "eval") == [Preference(**ROWS[0])]


def test_records_without_rejected_serve_for_sft(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "chosen": "b"}, {**record(1), "rejected": None}])
    write_jsonl(tmp_path / "eval.jsonl", ROWS)
    assert [p.rejected for p in everything(path, require_rejected=False)] == [None, None]
    with pytest.raises(InputError, match=r"train\.jsonl:1: no 'rejected' response \(so 2 of 2 records\)"):
        everything(path)


def test_many_records_in_order(tmp_path):
    """More than two of the batches that the file on disk is made of."""
    count = 2 * sources.ROWS_AT_ONCE + 345
    rows = preferences(count)
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "eval.jsonl", rows[:1])
    assert [vars_of(p) for p in everything(tmp_path)] == rows


def vars_of(preference: Preference) -> dict:
    return {"prompt": preference.prompt, "chosen": preference.chosen, "rejected": preference.rejected}


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 13, 64, 1000])
@pytest.mark.parametrize("layout", ["array", "pretty", "lines", "pretty objects"])
def test_json_is_the_same_through_any_window(tmp_path, monkeypatch, window, layout):
    rows = [
        {**record(1), "extra": [1.5e3, True, None, {"a": []}]},
        {**record(2), "chosen": ' "\\\né\u4e2d😀 ],['},
        ROWS[0],
    ]
    texts = {
        "array": json.dumps(rows),
        "pretty": "\ufeff" + json.dumps(rows, indent=3, ensure_ascii=False),
        "lines": LINES,
        "pretty objects": "\n\n".join(json.dumps(row, indent=1) for row in rows),
    }
    (tmp_path / "train.json").write_text(texts[layout], encoding="utf-8")
    monkeypatch.setattr(sources, "_CHARACTERS_AT_ONCE", window)
    read = list(sources.read_records(tmp_path / "train.json", ()))
    assert [row for _, row in read] == (ROWS if layout == "lines" else rows)
    first_lines = {"array": [1, 1, 1], "lines": [1, 2, 3], "pretty": [2, 15, 20], "pretty objects": [1, 15, 21]}
    assert [line for line, _ in read] == first_lines[layout]


# ---- chat messages ---------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
USER = [{"role": "user", "content": "Hi"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("Yes <b>", "No"))
CHATS = {
    "prompt and responses as messages": {"prompt": USER, "chosen": YES, "rejected": NO},
    "responses as strings": {"prompt": USER, "chosen": "Yes <b>", "rejected": "No"},
    "whole conversations": {"chosen": USER + YES, "rejected": USER + NO},
    "whole conversations with the prompt as string": {"prompt": "Hi", "chosen": USER + YES, "rejected": USER + NO},
    "prompt as string": {"prompt": "Hi", "chosen": YES, "rejected": NO},
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(["<|im_start|>user\nHi there\n"] * 3)


def chat_folder(tmp_path: Path, rows: list[dict], suffix: str = "jsonl") -> Path:
    for split in ("train", "eval"):
        path = tmp_path / f"{split}.{suffix}"
        write_parquet(path, rows) if suffix == "parquet" else write_jsonl(path, rows)
    return tmp_path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", CHATS)
def test_chat_forms(tmp_path, tokenizer, form, suffix):
    tokenizer.chat_template = CHATML
    (found,) = everything(chat_folder(tmp_path, [CHATS[form]], suffix), tokenizer=tokenizer)
    assert found == Preference("<|im_start|>user\nHi</s>\n<|im_start|>assistant\n", "Yes <b>", "No")


@pytest.mark.parametrize(
    ("template", "ending"),
    [(CHATML, "</s>\n"), (WITH_BOS, "</s>"), (THINKING, "</s>\n")],
    ids=["chatml", "bos", "think"],
)
def test_chat_text_is_the_template_s_rendering(tmp_path, tokenizer, template, ending):
    tokenizer.chat_template = template
    prompt = [{"role": "system", "content": ""}, *USER, *NO, {"role": "user", "content": "Sure?"}]
    folder = chat_folder(tmp_path, [{"prompt": prompt, "chosen": YES, "rejected": NO}, {"messages": USER + NO}])
    first, second = everything(folder, require_rejected=False, tokenizer=tokenizer)

    def rendered(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False)

    assert first.prompt + first.chosen + ending == rendered(prompt + YES)
    assert first.prompt + first.rejected + ending == rendered(prompt + NO)
    assert second.prompt + second.chosen + ending == rendered(USER + NO)
    assert first.chosen.strip() == "Yes <b>"  # with the thinking tag, too: "<" is the response's and not the header's
    assert second.rejected is None


def test_bos_of_the_template_is_left_to_a_tokenizer_that_adds_it(tmp_path):
    from tokenizers import processors

    tokenizer = byte_level_tokenizer(["[INST] Hi [/INST]"] * 3)
    tokenizer.chat_template = WITH_BOS
    folder = chat_folder(tmp_path, [{"prompt": USER, "chosen": YES, "rejected": NO}])
    assert everything(folder, tokenizer=tokenizer)[0].prompt == "<s>[INST] Hi [/INST]"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (found,) = everything(folder, tokenizer=tokenizer)
    assert found.prompt == "[INST] Hi [/INST]"
    ids = [*tokenizer(found.prompt + found.chosen)["input_ids"], tokenizer.eos_token_id]
    assert ids == tokenizer.apply_chat_template(USER + YES, return_dict=False)


def test_another_template_is_another_text(tmp_path, tokenizer):
    folder = chat_folder(tmp_path, [CHATS["prompt as string"]])
    tokenizer.chat_template = CHATML
    assert everything(folder, tokenizer=tokenizer)[0].prompt.startswith("<|im_start|>user")
    tokenizer.chat_template = CHATML.replace("im_start", "turn")
    assert everything(folder, tokenizer=tokenizer)[0].prompt.startswith("<|turn|>user")


UNEQUAL = "chosen and rejected have to be equal up to their last message, one answer each"
BAD_CHATS = [
    ({"prompt": USER, "chosen": YES + USER, "rejected": NO}, UNEQUAL),
    ({"chosen": USER + YES, "rejected": [{"role": "user", "content": "Other"}] + NO}, UNEQUAL),
    ({"prompt": USER, "chosen": [{"role": "tool", "content": "x"}]}, "'chosen' begins neither with the assistant's"),
    ({"messages": USER}, "the prompt is empty: a conversation needs a message before the assistant's answer"),
    ({"messages": USER + USER}, "the last message is the user's, expected the assistant's answer"),
    ({"messages": []}, "'messages' is empty, expected a list of messages"),
    ({"messages": ["Hi"]}, "'messages', message 1 is of type str, expected role and content"),
    (
        {"prompt": USER, "chosen": [{"role": "assistant", "content": 3}]},
        "'chosen', message 1: 'content' is of type int",
    ),
    ({"prompt": USER, "chosen": [{"role": "assistant", "content": ""}]}, "'chosen', message 1: 'content' is empty"),
    ({"prompt": USER, "chosen": [{"role": "assistant"}]}, "'chosen', message 1: 'content' is missing"),
    ({"prompt": USER, "chosen": ""}, "'chosen', message 1: 'content' is empty"),
    ({"prompt": USER}, "no 'chosen' and no 'messages'"),
    ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "strings, while the first record has chat messages"),
    ({"prompt": [{"role": "clown", "content": "x"}], "chosen": "x"}, "the tokenizer's chat template refuses these"),
    ({"prompt": USER, "chosen": json.dumps(YES)}, "'chosen' is a list of chat messages written as a string"),
    ({"prompt": str(USER), "chosen": YES}, "'prompt' is a list of chat messages written as a string"),
    ({"prompt": "Other", "chosen": USER + YES}, "'prompt' is none of the messages in front of the answer"),
]


@pytest.mark.parametrize(("row", "message"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_bad_chats(tmp_path, tokenizer, row, message):
    tokenizer.chat_template = CHATML.replace(
        "%}<|im", "%}{% if m['role'] == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}<|im", 1
    )
    path = write_jsonl(tmp_path / "chats.jsonl", [CHATS["prompt as string"], row])
    with pytest.raises(InputError) as error:
        load_preferences(str(path), "all", "train", require_rejected=False, tokenizer=tokenizer)
    assert f"chats.jsonl:2: {message}" in str(error.value)


def test_chats_need_a_tokenizer_with_a_template(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "chats.jsonl", [CHATS["prompt as string"]])
    with pytest.raises(InputError, match=r"chats\.jsonl: the records are chat messages; name a model"):
        load_preferences(str(path), "all", "train")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"chats\.jsonl: the records are chat messages but .* has no chat template"):
        load_preferences(str(path), "all", "train", tokenizer=tokenizer)


# ---- docs/data.md ----------------------------------------------------------------------------------------------------

DOCS = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(jsonl?)\n(.*?)```\n```python\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize(("suffix", "text", "expected"), EXAMPLES)
def test_documented_records(tmp_path, tokenizer, suffix, text, expected):
    tokenizer.chat_template = re.search(r"```jinja\n(.*?)```", DOCS, re.DOTALL)[1].removesuffix("\n")
    folder = tmp_path / ("local/jsonfile" if suffix == "json" else "mine")
    folder.mkdir(parents=True)
    for split in ("train", "eval"):
        (folder / f"{split}.{suffix}").write_text(text)
    (found,) = everything(folder, require_rejected=False, tokenizer=tokenizer)
    assert found == eval(expected, {"Preference": Preference})


def test_documented_split_and_names():
    assert len(EXAMPLES) == 5
    documented = re.findall(r"N = (\d+), seed (\d+): .*?sft (\[.*?\])  reward (\[.*?\])  rl (\[.*?\])", DOCS)
    assert len(documented) == 2
    for size, seed, *parts in documented:
        computed = split_indices(int(size), (0.2, 0.4, 0.4), int(seed))
        assert [part.tolist() for part in computed] == [json.loads(part) for part in parts]
    assert all(f"`{known.name}`" in DOCS for known in FORMATS)


# ---- bad input -------------------------------------------------------------------------------------------------------

GOOD = json.dumps(record(0)).encode() + b"\n"


def bad_line(**change) -> bytes:
    return GOOD + json.dumps({key: value for key, value in (record(1) | change).items() if value is not ...}).encode()


BAD_FILES = [
    (
        "data.jsonl",
        json.dumps({"prompt": str(USER), "chosen": str(YES), "rejected": str(NO)}).encode(),
        "data.jsonl:1: 'prompt' is a list of chat messages written as a string, which would be trained on as it stands",
    ),
    (
        "data.jsonl",
        json.dumps({"prompt": " x", "chosen": json.dumps(YES[0]), "rejected": " n"}).encode(),
        "data.jsonl:1: 'chosen' is a list of chat messages written as a string",
    ),
    ("data.jsonl", b"", "data.jsonl: no records"),
    ("data.json", b"[]", "data.json: no records"),
    ("data.json", b" \n", "data.json: no records"),
    ("data.jsonl", bad_line(rejected=...), "data.jsonl:2: no 'rejected' response (so 1 of 2 records)"),
    ("data.jsonl", bad_line(rejected=None), "data.jsonl:2: no 'rejected' response"),
    ("data.jsonl", bad_line(rejected=""), "data.jsonl:2: 'rejected' is empty"),
    ("data.jsonl", bad_line(chosen=...), "data.jsonl:2: no 'chosen'"),
    ("data.jsonl", bad_line(chosen=""), "data.jsonl:2: 'chosen' is empty"),
    ("data.jsonl", bad_line(prompt=""), "data.jsonl:2: 'prompt' is empty"),
    ("data.jsonl", bad_line(prompt=7), "data.jsonl:2: 'prompt' is of type int, expected a string"),
    ("data.jsonl", bad_line(chosen={"text": "x"}), "data.jsonl:2: 'chosen' is of type dict, expected a string"),
    ("data.jsonl", bad_line(chosen=[{}]), "data.jsonl:2: chat messages, while the first record has strings"),
    ("data.jsonl", GOOD + b"[1]", "data.jsonl:2: expected a JSON object, found list"),
    ("data.jsonl", GOOD + b'{"prompt": ', "data.jsonl:2: not JSON"),
    ("data.jsonl", GOOD + b'{"prompt": "\xff"}', "data.jsonl:2: not UTF-8"),
    ("data.jsonl", bad_line(chosen="\ud800"), "data.jsonl:2: half of a surrogate pair"),
    ("data.json", b"[" + GOOD + b", 3]", "data.json:2: expected a JSON object, found int"),
    ("data.json", b"[" + GOOD + b" {}]", "data.json:2: not JSON (expected , or ])"),
    ("data.json", b"[" + GOOD, "data.json:2: not JSON (the array of records is not closed)"),
    ("data.json", b"[" + GOOD + b"] x", "data.json:2: not JSON (text after the end of the array)"),
    ("data.json", b"[" + GOOD + b",\n\n" + b'{"prompt": tru' + b" " * 99 + b"}]", "data.json:4: not JSON"),
    ("data.json", b"[" + GOOD + b',\n{"a": "\xff"}]', "data.json:3: not UTF-8"),
    ("data.json", b'"text"', "data.json:1: expected a JSON object, found str"),
    ("data.parquet", b"PAR1 but not really", "data.parquet: not a readable Parquet file"),
    ("data.jsonl.gz", GOOD, "data.jsonl.gz: not a complete gzip file"),
    ("data.json.gz", gzip.compress(GOOD * 99, mtime=0)[:-20], "data.json.gz: not a complete gzip file"),
    ("data.csv", GOOD, "data.csv: unknown kind of file; known are .jsonl, .jsonl.gz, .json, .json.gz, .parquet"),
    (
        "stanfordnlp/SHP.jsonl",
        GOOD,
        "SHP.jsonl:1: not a record of stanfordnlp/SHP, whose name is in the path and whose",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=lambda value: str(value)[:50])
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_preferences([str(path)], "all", "train")
    assert f"{path.parent}{os.sep}{message}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.glob("cache/*.unfinished"))


def test_all_records_are_checked_also_those_of_other_parts(tmp_path):
    rows = [record(number) for number in range(3000)]
    rows[2345]["chosen"] = 1
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    for part in PARTS:
        with pytest.raises(InputError, match=r"data\.jsonl:2346: 'chosen' is of type int"):
            load_preferences(str(path), part, "eval")


def test_bad_records_elsewhere_are_named_by_number(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"rejected": None}]
    write_parquet(tmp_path / "data.parquet", rows)
    with pytest.raises(InputError, match=r"data\.parquet: record 2: no 'rejected'"):
        everything(tmp_path / "data.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match=r"saved \(train\): record 2: no 'rejected'"):
        everything(tmp_path / "saved")
    Dataset.from_list([{"text": "x"}]).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(InputError, match=r"text \(train\): none of the columns prompt, chosen, .* \(found: text\)"):
        everything(tmp_path / "text")
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(str(tmp_path / "eval_only"))
    with pytest.raises(InputError, match=r"eval_only: no train split, only test"):
        everything(tmp_path / "eval_only")
    (tmp_path / "saved" / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="saved: the saved data set cannot be opened"):
        everything(tmp_path / "saved")


def test_paths_that_are_nothing(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file or folder.*Dahoas/rm-static, .*local/jsonfile"):
        everything(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="Dahoas/rm-statik: no such file or folder, and no data set known by name"):
        everything("Dahoas/rm-statik")
    with pytest.raises(InputError, match=r"/Dahoas/rm-static: no such file or folder"):
        everything(tmp_path / "Dahoas" / "rm-static")
    with pytest.raises(InputError, match="neither a saved data set nor a folder with train"):
        everything(tmp_path)
    with pytest.raises(InputError, match="--data_path is empty"):
        load_preferences([], "sft", "train")


def test_bad_arguments_and_empty_parts(tmp_path):
    path = str(write_jsonl(tmp_path / "train.jsonl", ROWS))
    write_jsonl(tmp_path / "eval.jsonl", ROWS[:1])
    with pytest.raises(InputError, match="unknown part 'rm'"):
        load_preferences(path, "rm", "train")
    with pytest.raises(InputError, match="unknown split 'test'"):
        load_preferences(path, "sft", "test")
    with pytest.raises(
        InputError, match=r"rl part of the eval data is empty at --data_split 2,4,4 \(1 records in .*eval"
    ):
        load_preferences(path, "rl", "eval")
    with pytest.raises(InputError, match=r"cannot be read into the cache .*HF_DATASETS_CACHE names another place"):
        load_preferences(path, "all", "train", cache_dir=tmp_path / "train.jsonl")


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_edited_file_is_never_served_stale(tmp_path):
    path = tmp_path / "train.jsonl"
    write_jsonl(tmp_path / "eval.jsonl", ROWS)
    for answer in (" one", " two"):
        write_jsonl(path, [record(0) | {"chosen": answer}])
        os.utime(path, (1e9, 1e9))  # same size, same time
        assert everything(path)[0].chosen == answer
    Dataset.from_list([record(1)] * 10).save_to_disk(str(tmp_path / "saved"))
    assert everything(tmp_path / "saved")[0].chosen == " good 1"
    Dataset.from_list([record(2)] * 10).save_to_disk(str(tmp_path / "saved"))
    assert everything(tmp_path / "saved")[0].chosen == " good 2"


def test_same_content_is_read_once_and_errors_name_the_file_at_hand(tmp_path, monkeypatch):
    first, second = (
        write_jsonl(tmp_path / name, [record(0) | {"rejected": None}] * 10) for name in ("a.jsonl", "b.jsonl")
    )
    everything(first, require_rejected=False)
    monkeypatch.setattr(preference_data, "_write", None)  # a second pass would fail
    assert len(everything(second, require_rejected=False)) == 9
    with pytest.raises(InputError, match=r"b\.jsonl:1: no 'rejected'"):
        everything(second)


def test_ranks_that_start_together_read_the_same(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", preferences(5000))
    (tmp_path / "read.py").write_text(
        "import sys; from deepspeed_chat_tlcr.data.preferences import load_preferences;"
        "print(hash(tuple(p.id for p in load_preferences(sys.argv[1], 'rl', 'train', cache_dir=sys.argv[2]))))"
    )
    arguments = [tmp_path / "data.jsonl", tmp_path / "shared"]
    ranks = [warm.Program(tmp_path / "read.py", arguments) for _ in range(3)]
    answers = [rank.communicate(timeout=patience(60))[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert len(set(answers)) == 1
    assert len(list((tmp_path / "shared").glob("*.arrow"))) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    filler = "word " * 200
    with (tmp_path / "data.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"prompt": f"{number} {filler}", "chosen": filler, "rejected": filler}) + "\n"
            for number in range(40_000)
        )
    assert (tmp_path / "data.jsonl").stat().st_size > 120e6
    program = """
import sys
from deepspeed_chat_tlcr.data.preferences import load_preferences, part_of_prompts
def private_mib():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
warm = load_preferences(sys.argv[2], "all", "train", cache_dir=sys.argv[3])
before = private_mib()
data = load_preferences(sys.argv[1], "all", "train", cache_dir=sys.argv[3])
assert sum(len(p.prompt) for p in data) > 36_000_000
part_of_prompts(sys.argv[1], cache_dir=sys.argv[3])
print(private_mib() - before)
"""
    small = write_jsonl(tmp_path / "small.jsonl", preferences(10))
    arguments = [sys.executable, "-c", program, str(tmp_path / "data.jsonl"), str(small), str(tmp_path / "cache")]
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 40
