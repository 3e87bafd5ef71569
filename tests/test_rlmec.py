"""RLMEC: a model that rewrites answers, its training and the rewards that it gives."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from test_dense_rewards import TEXTS, close, rollout_of, step3_arguments, worlds  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

import step2_grm.main as step2_grm
import step3_ppo_tlcr.main as step3
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.records import Revision
from deepspeed_chat_tlcr.rewriting import rewriting_prompt
from step2_grm.train import rewriting_records
from step3_ppo_tlcr.reward_models import RewardModel, last_number
from step3_ppo_tlcr.rewards import rewriting_reward
from step3_ppo_tlcr.texts import answers_of


def test_rlmec_by_hand():
    probs, mask = torch.tensor([[0.9, 0.3, 0.55, 1.0], [0.9, 0.3, 0.55, 0.45]]), torch.tensor([[1.0, 1, 1, 0], [1] * 4])
    rewards = rewriting_reward(probs, torch.tensor([[True], [False]]), mask)
    close(rewards, [[0.4, 0.0, 0.05, 0.0], [0.0, -0.1, 0.0, -0.05]])


def test_the_last_number_of_an_answer():
    assert last_number("First 3, then 1,250.50 dollars.") == 1250.5
    assert last_number("It is -7") == last_number("so the result is -7.0!") == -7
    assert last_number("none") is None


def test_wrong_answers_are_rewritten_and_right_ones_stay():
    one = Revision("1", "Q", " good", " bad one", " good one", "", "m", {})
    wrong, right = rewriting_records([one], copy_share=1.0)
    assert (wrong.prompt, wrong.chosen) == (rewriting_prompt("Q", "good", "bad one"), " good one")
    assert (right.prompt, right.chosen) == (rewriting_prompt("Q", "good", "good one"), " good one")
    assert rewriting_records([one], copy_share=0.0) == [wrong]
    many = [Revision(str(n), f"Q{n}", " g", " b", " m", "", "m", {}) for n in range(400)]
    assert 400 + 70 < len(rewriting_records(many, copy_share=0.25)) < 400 + 130


def test_its_probabilities_are_those_of_the_policy_s_tokens_behind_the_task(tmp_path):
    """As a plain forward pass over the whole text has them, also where the rows of a batch differ in length."""
    tokenizer = byte_level_tokenizer(TEXTS)
    tokenizer.pad_token = tokenizer.eos_token
    tiny_llama(tmp_path, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rollout = rollout_of(tokenizer, "Say: ", ["it is", "the sea is lovely", "no"])
    asked = [rewriting(answer) for answer in answers_of(rollout, tokenizer)]
    with torch.no_grad():
        found = RewardModel(model, tokenizer).scores("rewriting_probs", rollout, lambda: asked)
        for row, answer in enumerate(asked):
            response = rollout.action_ids[row][rollout.action_mask[row] > 0]
            ids = torch.cat([torch.tensor(tokenizer(answer.prompt)["input_ids"]), response])
            probs = model(ids.unsqueeze(0)).logits[0].softmax(-1)[len(ids) - len(response) - 1 : -1]
            expected = probs.gather(1, response.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(found[row, : len(response)], expected, atol=1e-5, rtol=1e-4)


def rewriting(answer):
    from dataclasses import replace

    return replace(answer, prompt=f"Rewrite: {answer.prompt}\n")


@pytest.fixture
def base(tiny: Path, tmp_path) -> Path:
    """The tiny policy with room for the task's words."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in (tiny / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


def test_from_revisions_to_rewards(tiny, worlds, base, in_process, capsys):  # noqa: F811
    grm = worlds / "grm"
    in_process(
        step2_grm.main,
        *("--model_name_or_path", base, "--data_path", tiny / "data.jsonl", "--revisions", tiny / "revisions.jsonl"),
        *("--output_dir", grm, "--dtype", "fp32", "--learning_rate", 1e-2, "--per_device_train_batch_size", 4),
        *("--num_train_epochs", 6, "--tokens_per_micro_batch", 2048),
    )
    assert json.loads((grm / "results.json").read_text())["eval/loss"] < 3  # log 320 = 5.8 of any token
    for folder, more in (("score", ("--rlmec_judge", worlds / "rm")), ("number", ("--rlmec_judge", "number"))):
        reward = ("--reward", f"rlmec:{grm}@2", f"sequence:{worlds / 'rm'}", "--eval_interval", 1, "--eval_prompts", 4)
        in_process(step3.main, *step3_arguments(tiny, worlds / folder, worlds / "disc", *reward, *more))
        for line in read_metrics(worlds / folder / "metrics.jsonl")[1:]:  # the first is of before any set
            assert math.isfinite(line["eval/reward/rlmec"])
            assert 0 <= line["reward/right"] <= 1
            length = line["rollout/response_length"]
            assert -0.1001 * length <= line["reward/rlmec"] <= 0.5001 * length
    # No reference of this data has a number, so no answer is right, and no reward is above 0.
    for line in read_metrics(worlds / "number" / "metrics.jsonl")[1:]:
        assert line["reward/right"] == 0
        assert line["reward/rlmec"] <= 0
    for reward, said in ((f"rlmec:{grm}", "--rlmec_judge"), (f"rlmec:{worlds / 'disc'}", "not a language model")):
        with pytest.raises(SystemExit):
            in_process(step3.main, *step3_arguments(tiny, worlds / "no", worlds / "disc", "--reward", reward))
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        in_process(step3.main, *step3_arguments(tiny, worlds / "no", worlds / "disc", "--reward", "rlmec"))
    assert "name its model" in capsys.readouterr().err
