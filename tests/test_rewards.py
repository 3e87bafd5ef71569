"""The discriminator as a reward function for other trainers, by itself and in TRL's GRPO."""

import runpy

import pytest
import torch
from conftest import ROOT, preferences, write_jsonl
from transformers import AutoModelForTokenClassification, AutoTokenizer

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.rewards import discriminator_reward


@pytest.fixture(scope="module")
def discriminator(tiny, tmp_path_factory):
    """The tiny model with a head whose logits are 0 and ln 3 whatever the text: D = 3/4, so r = 1/2 on every token."""
    folder = tmp_path_factory.mktemp("discriminator")
    model = AutoModelForTokenClassification.from_pretrained(tiny / "model", num_labels=2)
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.bias.copy_(torch.tensor([0.0, 3.0]).clamp(min=1).log())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder)
    return folder


def test_every_token_counts_a_half(discriminator):
    asked = {
        "prompts": ["\n\nHuman: Hi\n\nAssistant:", "x"],
        "completions": [" a", ""],
        "completion_ids": [[5, 6, 1], []],
    }
    assert discriminator_reward(discriminator)(**asked) == pytest.approx([1.5, 0.0])
    assert discriminator_reward(discriminator, reduce="mean", batch_size=1)(**asked) == pytest.approx([0.5, 0.0])
    with pytest.raises(ValueError, match="known are sum and mean"):
        discriminator_reward(discriminator, reduce="max")


def test_padding_changes_nothing_and_each_token_is_judged_in_its_place(discriminator, tiny):
    model = AutoModelForTokenClassification.from_pretrained(tiny / "model", num_labels=2)
    folder = discriminator.with_name("random")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.save_pretrained(folder)
    prompt, answer = "\n\nHuman: Tell me of the sea.\n\nAssistant:", [70, 71, 72, 1]
    ids = torch.tensor([tokenizer(prompt)["input_ids"] + answer])
    slow = (2 * model.eval()(ids).logits.softmax(-1)[0, -4:, 1] - 1).sum().item()
    others = {"prompts": [prompt * 3, prompt], "completions": ["", ""], "completion_ids": [[9] * 7, answer]}
    assert discriminator_reward(folder)(**others)[1] == pytest.approx(slow, abs=1e-5)


def test_a_model_without_a_discriminators_head_is_refused(tiny):
    with pytest.raises(InputError, match="not a trained discriminator"):
        discriminator_reward(tiny / "model")


def test_the_grpo_example_trains_on_it(discriminator, tiny, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", preferences(4))
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "max_completion_length": 5, "use_cpu": True}
    settings |= {"report_to": [], "logging_steps": 1, "bf16": False}
    main = runpy.run_path(str(ROOT / "examples/grpo.py"))["main"]
    paths = map(str, (tiny / "model", discriminator, prompts, tmp_path / "out"))
    trainer = main(*paths, **settings)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["reward"] for entry in logged] == pytest.approx([0.5, 0.5])  # every token's, whatever it writes
    assert (tmp_path / "out/model.safetensors").is_file()
