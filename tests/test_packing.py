"""Packs: which rows go together, and that what models say of them is what they say of padded rows.

A pair's rows begin alike: that part is computed once, and counted.
"""

import functools

import pytest
import torch
from test_decode import FAMILIES, SIZES, Tokens, model_of
from transformers import AutoConfig, AutoModelForTokenClassification, set_seed

from deepspeed_chat_tlcr.generation import left_pad
from deepspeed_chat_tlcr.models import dropout_names
from deepspeed_chat_tlcr.packing import Row, classify_packed, fill, packs_of, tokens_at_once
from deepspeed_chat_tlcr.tokenization import TokenizedExample
from deepspeed_chat_tlcr.training import pad_examples
from step1_sft.sft import collate as collate_sft
from step1_sft.sft import packed_nll
from step2_discriminator.objectives import end_scores, pair_loss, token_loss
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.scores import action_logits, positive_probs, state_values


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
    return Rollout(
        torch.cat([ids, chosen], 1), torch.cat([mask, action_mask], 1), action_mask, tokens_at_once=tokens_at_once
    )


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3", "mistral", "bloom"])
def test_packed_forward_passes_say_what_padded_ones_say(family):
    """Also where a family cannot be packed (bloom, a short sliding window), and then is not."""
    lengths = ([3, 17, 9, 1, 5], [4, 2, 11, 6, 1])
    model = model_of(family)
    padded, packed = (action_logits(model, rollout_of(*lengths, tokens)) for tokens in (0, 30))
    counted = rollout_of(*lengths, 0).action_mask > 0
    torch.testing.assert_close(packed[counted], padded[counted], atol=2e-5, rtol=1e-5)
    packs_there = bool((packed[~counted] == 0).all())
    assert packs_there == (family not in ("mistral", "bloom"))


def test_packed_values_and_probabilities_have_the_same_gradients():
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


def test_a_pair_shares_what_it_begins_with():
    """``a b c d`` and ``a b e`` as ``a b c d e``: e stands at position 2 and sees a and b, not c and d."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 5, 0, 0], [5, 5, 0, 0]])
    rows = [Row(0, 1, 4), Row(0, 1, 3, shared=2), Row(0, 1, 2), Row(0, 1, 2, shared=2)]
    (pack,) = packs_of(ids, rows, 10, together=2)
    assert pack.input_ids.tolist() == [[5, 6, 7, 8, 9, 5, 5]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert pack.visible[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    wanted = list(zip(pack.rows.tolist(), pack.columns.tolist(), pack.chosen.tolist(), strict=True))
    assert wanted == [(0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 1, 1), (1, 2, 4), (2, 1, 6), (3, 1, 6)]


def pairs_batch() -> dict[str, torch.Tensor]:
    """Pairs that part in the response's middle, at its start, never, and before it (a token over the boundary)."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for start, common, *lengths in ((6, 9, 14, 11), (4, 4, 7, 20), (5, 8, 8, 8), (3, 2, 6, 5)):
        shared = torch.randint(4, 14, (common,), generator=generator)
        for length, low in zip(lengths, (4, 14), strict=True):
            own = torch.randint(low, low + 10, (length - common,), generator=generator)
            targets = (torch.randint(0, 3, (length - start,), generator=generator) / 2).tolist()
            examples.append(TokenizedExample([*shared.tolist(), *own.tolist()], start, targets))
    return pad_examples(examples, 0)


def loss_and_gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def classifier_of(family: str, labels: int, attention: str = "sdpa"):
    set_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), "num_labels": labels})
    config.classifier_dropout = 0.0
    for name in dropout_names(config):
        setattr(config, name, 0.0)
    return AutoModelForTokenClassification.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("budget", [24, 200])
@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "sdpa") for family in ("llama", "opt", "gpt2", "qwen2", "gpt_neox")), ("llama", "eager")],
)
def test_step_2_learns_the_same_of_shared_prompts_as_of_padded_rows(family, attention, budget):
    batch = pairs_batch()
    model = classifier_of(family, 2, attention)
    padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    packed = classify_packed(model, batch, budget, pairs=True)
    losses = [token_loss(logits, batch["targets"], batch["response_mask"]) for logits in (padded, packed)]
    found = [loss_and_gradients(model, loss) for loss in losses]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)

    model = classifier_of(family, 1, attention)
    padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    packed = classify_packed(model, batch, budget, pairs=True)
    scores = [end_scores(logits.squeeze(-1), batch["response_mask"]) for logits in (padded, packed)]
    found = [loss_and_gradients(model, pair_loss(score[::2], score[1::2])) for score in scores]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_what_a_pair_shares_is_computed_once(monkeypatch):
    """Of 79 tokens of the eight rows, 23 stand in both rows of a pair; padded to 20 they are 160."""
    batch, model, seen = pairs_batch(), classifier_of("llama", 2), []
    forward = type(model).forward

    def counted(self, input_ids, **kwargs):
        seen.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    assert batch["input_ids"].numel() == 160
    monkeypatch.setattr(type(model), "forward", functools.wraps(forward)(counted))
    classify_packed(model, batch, 200, pairs=True)
    classify_packed(model, batch, 200, pairs=False)
    assert seen == [79 - 23, 79]


@pytest.mark.parametrize("loss_on_prompt", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2"])
def test_step_1_learns_the_same_of_packs_as_of_padded_rows(family, loss_on_prompt):
    generator = torch.Generator().manual_seed(3)
    rows = [(torch.randint(4, 24, (length,), generator=generator).tolist(), start) for length, start in LENGTHS]
    batch = collate_sft(Tokens(3), loss_on_prompt)([TokenizedExample(ids, start) for ids, start in rows])
    model = model_of(family)
    count = (batch["labels"][:, 1:] != -100).sum()
    padded = model(**batch, num_items_in_batch=count).loss
    packed = packed_nll(model, batch, 20) / count
    found = [loss_and_gradients(model, loss) for loss in (padded, packed)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


LENGTHS = ((12, 7), (5, 1), (19, 3), (8, 0))


def test_a_model_that_cannot_be_packed_is_padded_and_says_so():
    said: list[str] = []
    assert tokens_at_once(model_of("bloom"), 512, 64, said.append) == 0
    assert tokens_at_once(model_of("mistral"), 512, 64, said.append) == 0  # its window of 6 tokens is shorter
    assert [line.split("attention")[0] for line in said] == [
        "warning: --tokens_per_micro_batch 512: BloomForCausalLM with 64 tokens and ",
        "warning: --tokens_per_micro_batch 512: MistralForCausalLM with 64 tokens and ",
    ]
    assert tokens_at_once(model_of("llama"), 512, 64, said.append) == 512
    assert tokens_at_once(model_of("bloom"), 0, 64, said.append) == 0
    assert len(said) == 2
