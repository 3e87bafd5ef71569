"""Attention in 16 bits on a CPU: plain products a few rows at a time, in the place of SDPA's kernel.

That kernel keeps no scores either, but on a CPU its backward pass takes up to four times as long as the products that
make it up. Here they are computed for so few rows at once that the scores stay in the processor's cache, and once more
in the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

from deepspeed_chat_tlcr.errors import InputError

SCORES_AT_ONCE = 1 << 19
QUERIES_AT_ONCE = 128
"""So many that the products stay large, and the scores with their gradients in a few megabytes of cache."""
KEYS_BY = 16
"""Blocks begin and end at multiples of it: products of odd sizes are slower, and oneDNN compiles each new size."""


def install() -> None:
    """Let transformers' ``sdpa`` compute by this module what it can."""
    AttentionInterface.register("sdpa", attention)


def require(name: str, precision: str) -> None:
    """Raise ``InputError`` for an ``--attn_implementation`` that this machine or precision cannot have."""
    packages = {
        "flash_attention_2": (is_flash_attn_2_available, "the package flash-attn (pip install flash-attn)"),
        "flash_attention_3": (is_flash_attn_3_available, "FlashAttention 3, built from its sources, and a Hopper GPU"),
        "flex_attention": (is_torch_flex_attn_available, "a PyTorch that has it"),
    }
    available, needs = packages.get(name, (lambda: True, ""))
    if not available():
        raise InputError(f"--attn_implementation {name}: needs {needs}, on a GPU; use sdpa")
    if name.startswith("flash") and precision == "fp32":
        raise InputError(f"--attn_implementation {name}: has 16-bit kernels only; use sdpa with --dtype fp32")


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' ``sdpa_attention_forward``: query ``(B, H, T, D)`` to ``(B, T, H, D)``.

    A single query, dropout, 32 bits, another device, a mask of numbers, by head, or none at all go to SDPA.
    """
    plain = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.size(1) == 1
    plain = plain and all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap"))
    short = query.element_size() == 2 and query.device.type == "cpu"
    if not (plain and short) or dropout or query.size(2) == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = (repeat_kv(states, groups) for states in (key, value))
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    states = (one.contiguous() for one in (query, key, value))  # strided views make 16-bit products slow
    return _Attention.apply(*states, _blocks_of(query, attention_mask), scale).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Block:
    """Rows of the batch and queries whose products are computed at once, and the keys that any of these sees."""

    rows: slice
    queries: slice
    keys: slice
    hidden: torch.Tensor  # (b, 1, t, s): 0, and the lowest number where a query does not see a key


class _Attention(torch.autograd.Function):
    """softmax(scale * q k^T) v under a mask; saves what came in, and the mask as blocks that all layers share."""

    @staticmethod
    def forward(ctx, query, key, value, blocks, scale):
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        attended = query.new_empty(*query.shape[:3], value.size(-1))
        for block in blocks:
            rows, queries, keys = block.rows, block.queries, block.keys
            weights = _weights(query[rows, :, queries] * scale, key[rows, :, keys], block.hidden)
            attended[rows, :, queries] = weights @ value[rows, :, keys]
        return attended

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        found = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        gradient = gradient.contiguous()
        for block in ctx.blocks:
            rows, queries, keys = block.rows, block.queries, block.keys
            # Scaled here and in what comes of them, since scores are many times as many numbers as queries.
            scaled, its_keys, its_values = query[rows, :, queries] * ctx.scale, key[rows, :, keys], value[rows, :, keys]
            weights = _weights(scaled, its_keys, block.hidden)
            upstream = gradient[rows, :, queries]
            of_weights = upstream @ its_values.transpose(-1, -2)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query, of_key, of_value = found
            of_query[rows, :, queries] = (of_scores @ its_keys).mul_(ctx.scale)
            of_key[rows, :, keys] += of_scores.transpose(-1, -2) @ scaled
            of_value[rows, :, keys] += weights.transpose(-1, -2) @ upstream
        return *found, None, None


def _weights(scaled: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Attention weights ``(b, H, t, s)``; a query to which all of these keys are hidden attends to all alike."""
    # Adding to all heads at once is several times as fast as filling each one's scores.
    return (scaled @ key.transpose(-1, -2)).add_(hidden).softmax(-1)


def _blocks_of(query: torch.Tensor, attention_mask: torch.Tensor) -> list[_Block]:
    """The blocks of a mask ``(B or 1, 1, T, S)``; what is hidden from all queries of a block costs nothing.

    They are kept at the mask, which is one tensor for all layers of a forward pass.
    """
    kept = getattr(attention_mask, "_blocks", None)
    shape = (*query.shape[:3], query.dtype)
    if kept is None or kept[0] != shape:
        kept = attention_mask._blocks = shape, list(_blocks(query, attention_mask.expand(len(query), 1, -1, -1)))
    return kept[1]


def _blocks(query: torch.Tensor, mask: torch.Tensor) -> Iterator[_Block]:
    batch, heads, length, _ = query.shape
    at_once = max(1, SCORES_AT_ONCE // (heads * min(length, QUERIES_AT_ONCE) * mask.size(-1)))
    for row in range(0, batch, at_once):
        for first in range(0, length, QUERIES_AT_ONCE):
            rows, queries = slice(row, row + at_once), slice(first, first + QUERIES_AT_ONCE)
            # As bytes, one dimension after the other: any() over a boolean's outer dimensions is several times as slow.
            seen = mask[rows, :, queries].view(torch.uint8).amax(2).amax((0, 1)).nonzero()
            # Queries that see no key get a block of none, and from it zeros.
            keys = slice(0, 0)
            if len(seen):
                first_key, end = int(seen[0]) // KEYS_BY * KEYS_BY, (int(seen[-1]) // KEYS_BY + 1) * KEYS_BY
                keys = slice(first_key, min(end, mask.size(-1)))
            shown = mask[rows, :, queries, keys]
            hidden = torch.zeros(shown.shape, dtype=query.dtype).masked_fill_(~shown, torch.finfo(query.dtype).min)
            yield _Block(rows, queries, keys, hidden)
