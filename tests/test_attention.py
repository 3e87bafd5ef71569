"""16-bit attention on a CPU against plain arithmetic in double precision."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deepspeed_chat_tlcr import attention as ours
from deepspeed_chat_tlcr.runtime import cpu_multiplies_bf16

SCALE = 0.3


def inputs(
    batch: int, heads: int, key_heads: int, length: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Query, key, value ``(B, H, T, 8)``, a causal mask with another number of hidden keys on each row, upstream."""
    torch.manual_seed(length)
    states = [torch.randn(batch, n, length, 8).bfloat16() for n in (heads, key_heads, key_heads)]
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    upstream = torch.randn(batch, length, heads, 8).bfloat16()
    for row in range(batch):  # padding on the left: its queries see nothing, and nothing depends on them
        mask[row, :, :, : 5 * row] = False
        upstream[row, : 5 * row] = 0
    return states, mask, upstream


def by_hand(query, key, value, mask):
    groups = query.size(1) // key.size(1)
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = (SCALE * query @ key.transpose(-1, -2)).masked_fill(~mask, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def with_gradients(function, states, dtype, upstream):
    leaves = [one.detach().clone().to(dtype).requires_grad_() for one in states]
    attended = function(*leaves)
    attended.backward(upstream.to(dtype))
    seen = (upstream != 0).any(-1, keepdim=True)  # what a padding query says is nobody's business
    return [attended.detach().double() * seen, *(one.grad.double() for one in leaves)]


@pytest.mark.parametrize(("heads", "key_heads", "length"), [(2, 2, 20), (4, 2, 300), (1, 1, 129)])
def test_values_and_gradients_are_those_of_plain_arithmetic(heads, key_heads, length, monkeypatch):
    monkeypatch.setattr(ours, "SCORES_AT_ONCE", heads * 128 * length * 2)  # two of the three rows at once
    states, mask, upstream = inputs(3, heads, key_heads, length)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // key_heads
    expected = with_gradients(lambda *s: by_hand(*s, mask), states, torch.float64, upstream)
    found = with_gradients(
        lambda *s: ours.attention(module, *s, mask, scaling=SCALE)[0], states, torch.bfloat16, upstream
    )
    theirs = with_gradients(
        lambda *s: sdpa_attention_forward(module, *s, mask, scaling=SCALE)[0], states, torch.bfloat16, upstream
    )
    for right, one, other in zip(expected, found, theirs, strict=True):
        error, usual = ((x - right).abs().max().item() for x in (one, other))
        assert error <= 3 * usual + 0.01 * right.abs().max().item()


def test_a_model_computes_with_it(tiny, monkeypatch):
    # A stage that ran in this process may have installed it already.
    ours.AttentionInterface.register("sdpa", sdpa_attention_forward)
    calls = {"_blocks": 0, "_weights": 0}

    def counted(name, plain):
        def function(*args):
            calls[name] += 1
            return plain(*args)

        monkeypatch.setattr(ours, name, function)

    for name in calls:
        counted(name, getattr(ours, name))
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.bfloat16, attn_implementation="sdpa")
    ids = torch.randint(3, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        ours.install()
        try:
            after = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        finally:
            ours.AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert calls == {"_blocks": 1, "_weights": model.config.num_hidden_layers}, "one mask, read once for all layers"
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("change", ["fp32", "no mask", "one query"])
def test_what_it_does_not_do_is_left_to_sdpa(change, monkeypatch):
    monkeypatch.setattr(ours, "_blocks", lambda *args: pytest.fail("computed here"))
    states, mask, _ = inputs(2, 1, 1, 6)
    if change == "fp32":
        states = [one.float() for one in states]
    if change == "one query":
        states[0], mask = states[0][:, :, -1:], mask[:, :, -1:]
    given = None if change == "no mask" else mask
    attended, _ = ours.attention(torch.nn.Module(), *states, given, scaling=SCALE)
    expected, _ = sdpa_attention_forward(torch.nn.Module(), *states, given, scaling=SCALE)
    torch.testing.assert_close(attended, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_only_an_x86_without_bf16_instructions_is_warned_of(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert cpu_multiplies_bf16() is expected


def test_queries_that_see_nothing_get_zeros_and_give_none():
    states, mask, upstream = inputs(2, 2, 2, 140)
    mask[:, :, :128] = False  # the whole of the first block
    upstream[:] = 1
    module = torch.nn.Module()
    leaves = [one.clone().requires_grad_() for one in states]
    attended = ours.attention(module, *leaves, mask, scaling=SCALE)[0]
    assert attended[:, :128].eq(0).all()
    attended.backward(upstream)
    alone = [one.clone().requires_grad_() for one in states]
    ours.attention(module, alone[0][:, :, 128:], *alone[1:], mask[:, :, 128:], scaling=SCALE)[0].sum().backward()
    for one, other in zip(leaves, alone, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
