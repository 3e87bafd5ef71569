"""DPO and FIGA: their losses against arithmetic done another way, and both through their entry points."""

import json
import math

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from datasets import Dataset
from transformers import AutoModelForCausalLM

import baselines.dpo.main
import baselines.dpo.train as dpo
import baselines.figa.main
import baselines.figa.train as figa
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.runtime import Runtime
from step2_discriminator.examples import text_pairs

ONE_RANK = Runtime(0, 1, torch.device("cpu"), "fp32")


def response_logprob(model, example) -> float:
    """Sum of log pi over the response, EOS included, one token at a time from its own prefix."""
    total = 0.0
    for position in range(example.response_start, len(example.input_ids)):
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids[:position]])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[example.input_ids[position]])
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_loss_against_token_by_token_arithmetic(tiny, tmp_path, smoothing):
    tokenizer = byte_level_tokenizer(["Human: hi Assistant: yes no maybe"] * 3)
    tokenizer.pad_token = tokenizer.eos_token  # pad = EOS must not hide the EOS of a response
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / str(seed), tokenizer, seed)) for seed in (1, 2)
    )
    texts = [("Human: hi Assistant:", " yes", " no, maybe"), ("Human: hi hi Assistant:", " maybe yes", " yes")]
    pairs, _ = text_pairs(texts, tokenizer, 64, "train")
    data = Dataset.from_list(dpo.rows(pairs))
    options = baselines.dpo.main.parse_args(
        ["--model_name_or_path", "x", "--output_dir", str(tmp_path), "--beta", "0.3"]
        + ["--label_smoothing", str(smoothing)]
    )
    trainer = dpo.PreferenceTrainer(
        policy,
        reference,
        dpo.dpo_arguments(options, ONE_RANK, None),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        stage=options,
        train_lengths=[1, 1],
    )
    loss = trainer.compute_loss(policy, trainer.data_collator(list(data))).item()

    policy, reference = (AutoModelForCausalLM.from_pretrained(tmp_path / str(seed)) for seed in (1, 2))
    expected = 0.0
    for chosen, rejected in pairs:
        delta = response_logprob(policy, chosen) - response_logprob(reference, chosen)
        delta -= response_logprob(policy, rejected) - response_logprob(reference, rejected)
        right, wrong = (math.log(1 + math.exp(-sign * 0.3 * delta)) for sign in (1, -1))
        expected += ((1 - smoothing) * right + smoothing * wrong) / len(pairs)
    assert loss == pytest.approx(expected, abs=1e-5)


def test_dpo_refuses_a_smoothing_that_is_none():
    with pytest.raises(InputError, match=r"--label_smoothing 0\.5"):
        baselines.dpo.main.parse_args(["--model_name_or_path", "m", "--label_smoothing", "0.5"])


def test_figa_looks_at_edits_and_at_the_modified_eos():
    # Row 0 modified, row 1 rejected; one prompt token, three response tokens of which the last is EOS, one of padding.
    targets = torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.5], [0.5, 0.0, 0.5, 0.0, 0.5]])
    mask = torch.tensor([[0, 1, 1, 1, 0]] * 2)
    ends = torch.tensor([[False, False, False, True, True]] * 2)  # padded with EOS
    added, removed = figa.is_weighted(targets, mask, ends)
    assert added.int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert removed.int().tolist() == [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]  # a rejected EOS is never held against it


def test_figa_loss_by_hand():
    nll = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.5, 0.7, 0.2]], requires_grad=True)
    added = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    removed = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    loss = figa.figa_loss(nll, added, removed, (1.0, -0.5), 0.6)
    # 0.7 is over the limit: (2 + 1 - 0.5 * (0.5 + 0.2)) / 4 tokens
    assert loss.item() == pytest.approx(2.65 / 4)
    loss.backward()
    assert nll.grad.tolist() == [[0, 0.25, 0, 0.25], [0, -0.125, 0, -0.125]]
    assert figa.figa_loss(nll, added & False, removed & False, (1.0, -0.5), 0.6).item() == 0.0


def test_nll_of_chosen_tokens_belongs_to_the_logits_before_them():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=generator, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    wanted = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()
    nll = figa.chosen_nll(logits, ids, wanted)
    for row in range(2):
        for position in range(4):
            expected = 0.0  # unwanted, or the first token, which nothing predicts
            if wanted[row, position] and position:
                before = logits[row, position - 1].double()
                expected = math.log(before.exp().sum()) - before[ids[row, position]].item()
            assert nll[row, position].item() == pytest.approx(expected, abs=1e-5)


def test_both_through_their_entry_points(tiny, tmp_path, in_process):
    common = ("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--dtype", "fp32")
    common = (*common, "--per_device_train_batch_size", 4, "--learning_rate", 3e-3)
    in_process(baselines.dpo.main.main, *common, "--output_dir", tmp_path / "dpo")
    in_process(baselines.dpo.main.main, *common, "--output_dir", tmp_path / "once", "--offload_reference_model")
    revisions = ("--revisions", tiny / "revisions.jsonl", "--num_train_epochs", 2)
    in_process(baselines.figa.main.main, *common, *revisions, "--output_dir", tmp_path / "figa")
    logs = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("dpo", "once", "figa")}
    losses = {name: [line["train/loss"] for line in log if "train/loss" in line] for name, log in logs.items()}
    assert losses["dpo"][0] == pytest.approx(math.log(2), abs=1e-6)  # the policy still is the reference
    assert losses["dpo"][-1] < 0.69
    assert losses["once"] == pytest.approx(losses["dpo"], abs=1e-5)  # the reference's log-probs computed beforehand
    assert losses["figa"][-1] < losses["figa"][0]
    for name in logs:
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["stage"] in (name, "dpo")
        assert results["steps"] == len(losses[name])
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert not list((tmp_path / name).glob("pairs-*"))
