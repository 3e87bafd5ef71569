"""The decoding loop against transformers' generate, and against the probabilities it says it draws from."""

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from deepspeed_chat_tlcr import decode as decoding_loop
from deepspeed_chat_tlcr.decode import decode
from deepspeed_chat_tlcr.generation import Decoding, generate, left_pad, response_mask
from step3_ppo_tlcr.logprobs import token_logprobs

EOS, PAD = 3, 0
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
}
FAMILIES = {
    "llama": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "gemma": {},
    "phi": {},
}


@dataclass(frozen=True)
class Tokens:
    """What ``generate`` asks of a tokenizer."""

    eos_token_id: int
    bos_token_id: int = 1
    pad_token_id: int = PAD
    eos_token: str = "</s>"
    chat_template: str | None = None
    name_or_path: str = ""


def model_of(family: str, **sizes):
    set_seed(1)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **sizes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform, so that no two tokens tie; OPT, which has more biases, would say one thing for ever.
            parameter.normal_(0, 0.1 if family == "opt" else 0.4)
    return model.eval()


def prompts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return left_pad([torch.randint(4, 24, (n,), generator=generator).tolist() for n in lengths], PAD)


def end_that_comes_at_many_times(responses: torch.Tensor) -> int:
    """The token that, taken as the end, would end the rows at as many different places as possible."""
    return max(range(4, 24), key=lambda token: len(response_mask(responses, token).sum(1).unique()))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family, monkeypatch):
    """Over several relayings of the cache, with rows that end at different times and leave it."""
    monkeypatch.setattr(decoding_loop, "CHUNK", 4)
    model, (ids, mask) = model_of(family).double(), prompts(8)
    greedy, attention = Decoding(21, temperature=0.0), model.config._attn_implementation
    eos = end_that_comes_at_many_times(decode(model, ids, mask, greedy, -1, PAD)[:, ids.size(1) :])
    ours = decode(model, ids, mask, greedy, eos, PAD)
    kept = response_mask(ours[:, ids.size(1) :], eos)
    assert len(kept.sum(1).unique()) > 1
    assert kept.sum(1).max() == kept.size(1)
    theirs = generate(model, Tokens(eos), ids, mask, greedy)
    assert torch.equal(ours[:, ids.size(1) :] * kept, theirs[:, ids.size(1) :] * kept)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 6, "top_p": 0.9}],
)
def test_tokens_are_drawn_from_the_distribution_whose_logprobs_are_learnt(settings):
    """20,000 draws of the second token: each frequency within 5 standard errors of its probability."""
    model, draws = model_of("llama"), 20_000
    prompt = torch.tensor([[5, 9, 4]])
    drawn = decode(
        model, prompt.expand(draws, -1), torch.ones(draws, 3, dtype=torch.long), Decoding(1, **settings), EOS, PAD
    )[:, 3]
    every = torch.arange(24).unsqueeze(0)
    logits = model(prompt).logits[:, -1:].expand(1, 24, -1)
    probabilities = token_logprobs(logits, every, Decoding(1, **settings), EOS).exp()[0]
    kept = drawn.unique()
    frequencies = torch.bincount(drawn, minlength=24) / draws
    # A chosen token always keeps a probability, so what is cut is judged by the tokens that were drawn.
    error = (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((frequencies - probabilities).abs()[kept] < 5 * error[kept] + 1e-9).all()
    assert frequencies[kept].sum() == pytest.approx(1)
    if "top_k" in settings:
        assert len(kept) <= settings["top_k"]
    assert probabilities[kept].sum().item() == pytest.approx(1, abs=1e-4)


def test_the_end_is_impossible_before_the_minimum_length():
    ids, mask = prompts(200)
    model = model_of("llama")
    lengths = response_mask(decode(model, ids, mask, Decoding(9, min_new_tokens=5), EOS, PAD)[:, ids.size(1) :], EOS)
    assert int(lengths.sum(1).min()) == 6  # five tokens, and the end as the sixth
    free = response_mask(decode(model, ids, mask, Decoding(9), EOS, PAD)[:, ids.size(1) :], EOS)
    assert int(free.sum(1).min()) < 5


def test_what_a_row_says_does_not_depend_on_its_neighbours(monkeypatch):
    monkeypatch.setattr(decoding_loop, "CHUNK", 3)
    model, (ids, mask) = model_of("llama").double(), prompts(6)
    set_seed(7)
    together = decode(model, ids, mask, Decoding(15), EOS, PAD)[:, ids.size(1) :]
    monkeypatch.setattr(decoding_loop, "CHUNK", 100)  # nobody leaves
    set_seed(7)
    again = decode(model, ids, mask, Decoding(15), EOS, PAD)[:, ids.size(1) :]
    assert torch.equal(together, again)


def test_an_answer_that_is_only_its_end_is_legal():
    model, (ids, mask) = model_of("llama"), prompts(3)
    model.lm_head = torch.nn.Linear(16, 24)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.constant_(model.lm_head.bias, -100.0)
    torch.nn.init.constant_(model.lm_head.bias[EOS : EOS + 1], 0.0)
    written = decode(model, ids, mask, Decoding(15), EOS, PAD)[:, ids.size(1) :]
    assert written.tolist() == [[EOS]] * 3
