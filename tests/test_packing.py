"""Packs: which rows go together, and that what models say of them is what they say of padded rows."""

import pytest
import torch
from test_decode import model_of
from transformers import AutoConfig, AutoModelForTokenClassification, set_seed

from deepspeed_chat_tlcr.generation import left_pad
from step3_ppo_tlcr import packing
from step3_ppo_tlcr.engines import action_logits, positive_probs, state_values
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.packing import fill


def test_rows_go_into_the_first_pack_with_room():
    # 9 | 7 + 3 | 5 + 4 of a budget of 10; a row longer than it is alone.
    assert fill([5, 9, 3, 7, 4], 10) == [[1], [3, 2], [0, 4]]
    assert fill([12, 3], 10) == [[0], [1]]
    # Another rank needs three: the pack with most rows is cut; more packs than rows there never are.
    assert fill([2, 2, 2, 2], 10, least=3) == [[0], [2, 3], [1]]
    assert fill([2, 2], 10, least=5) == [[0], [1]]


def rollout_of(prompts: list[int], answers: list[int], tokens_at_once: int) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    ids, mask = left_pad([torch.randint(4, 24, (n,), generator=generator).tolist() for n in prompts], 0)
    longest = max(answers)
    action_mask = torch.tensor([[int(a < n) for a in range(longest)] for n in answers])
    chosen = torch.randint(4, 24, action_mask.shape, generator=generator) * action_mask
    return Rollout(torch.cat([ids, chosen], 1), torch.cat([mask, action_mask], 1), action_mask, tokens_at_once)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(packing.torch.distributed, "get_world_size", lambda: 1)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3", "mistral", "bloom"])
def test_packed_forward_passes_say_what_padded_ones_say(family, alone):
    """Also where a family cannot be packed (bloom, a short sliding window), and then is not."""
    lengths = ([3, 17, 9, 1, 5], [4, 2, 11, 6, 1])
    model = model_of(family)
    padded, packed = (action_logits(model, rollout_of(*lengths, tokens)) for tokens in (0, 30))
    counted = rollout_of(*lengths, 0).action_mask > 0
    torch.testing.assert_close(packed[counted], padded[counted], atol=2e-5, rtol=1e-5)
    packs_there = bool((packed[~counted] == 0).all())
    assert packs_there == (family not in ("mistral", "bloom"))


def test_packed_values_and_probabilities_have_the_same_gradients(alone):
    set_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    for labels, said in ((1, state_values), (2, positive_probs)):
        config.num_labels, config.classifier_dropout = labels, 0.0
        model = AutoModelForTokenClassification.from_config(config)
        gradients = []
        for tokens in (0, 25):
            rollout = rollout_of([3, 17, 9, 1, 5], [4, 2, 11, 6, 1], tokens)
            model.zero_grad()
            loss = (said(model, rollout) ** 2 * rollout.action_mask).sum() / rollout.action_mask.sum()
            loss.backward()
            gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
