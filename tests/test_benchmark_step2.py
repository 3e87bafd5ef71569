"""benchmarks/step2.py through its entry point: the released recipe's batches against ours."""

import json

import pytest

from benchmarks.step2 import main, released_collate
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer


def test_both_ways_of_batching_are_measured(tiny, in_process, capsys):
    in_process(
        main,
        *("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--data_split", "0,10,0"),
        *("--per_device_train_batch_size", 2, "--dtype", "fp32", "--steps", 2, "--warmup", 1),
    )
    measured = json.loads(capsys.readouterr().out)
    released, ours = measured["released"], measured["by_length"]
    assert measured["ratio"] == pytest.approx(
        ours["useful_tokens_per_second"] / released["useful_tokens_per_second"], rel=0.01
    )
    # 512 against about 40 tokens, and a third sequence.
    assert released["useful_share_of_tokens"] < 0.1
    assert ours["useful_share_of_tokens"] > 0.8


def test_released_batches_are_three_rows_of_512_with_a_loss_on_two(tiny):
    tokenizer = load_tokenizer(tiny / "model")
    modified, rejected, chosen = (TokenizedExample([5] * n, 2, [1.0] * (n - 2)) for n in (6, 5, 4))
    batch = released_collate(tokenizer)([(modified, rejected, chosen)] * 2)
    assert batch["input_ids"].shape == (6, 512)
    assert batch["attention_mask"].sum(1).tolist() == [6, 5, 4] * 2
    assert batch["response_mask"].sum(1).tolist() == [4, 3, 0] * 2
