"""The decoding loop of rollouts: transformers' models and caches without the cost of ``generate`` per token.

One call decodes any number of prompts. Every ``CHUNK`` tokens the key-value cache is rebuilt: rows that have ended
leave it, and it grows by one chunk, so that short responses do not pay for the longest one.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from deepspeed_chat_tlcr.generation import Decoding, Ends, response_mask, warp

CHUNK = 32
_CHECK_EVERY = 8  # tokens between checks whether all rows have ended, which wait for the device


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer with spare room: attention runs over the whole buffer, and a mask hides the rest.

    Appending writes in place instead of copying everything, and attention reads contiguous memory: on a CPU, bfloat16
    products of strided views take four times as long.
    """

    def __init__(self):
        super().__init__()
        self.length = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self.length = key_states, value_states, key_states.size(2)
            return key_states, value_states
        end = self.length + key_states.size(2)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def rebuild(self, rows: torch.Tensor, room: int) -> None:
        """Keep these rows, in this order, and make room for ``room`` tokens."""
        self.keys, self.values = (self._rebuilt(states, rows, room) for states in (self.keys, self.values))

    def _rebuilt(self, states: torch.Tensor, rows: torch.Tensor, room: int) -> torch.Tensor:
        wide = states.new_empty(len(rows), states.size(1), room, states.size(3))
        kept = states if len(rows) == len(states) else states[rows]  # rows are in order: if all stay, no copy
        wide[:, :, : self.length] = kept[:, :, : self.length]
        # Attention gives the rest weight 0; it must not be NaN, as 0 x NaN is NaN.
        wide[:, :, self.length :] = 0
        return wide


@dataclass
class Live:
    """The rows that are still being decoded, and the tokens that they attend to."""

    rows: torch.Tensor  # (b,), their numbers among the B rows
    mask: torch.Tensor  # (b, room), 1 on tokens seen
    positions: torch.Tensor  # (b, 1) of the newest token


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    decoding: Decoding,
    eos_id: Ends,
    pad_id: int,
    synced: bool = False,
) -> torch.Tensor:
    """Continue left-padded prompts ``(B, P)``; returns ``(B, P + A)``, A as long as the longest response.

    A token is sampled from exactly the distribution of ``token_logprobs`` (both use ``warp``), by inverting its
    cumulative distribution in float64. Each row has its own random numbers, so it does not depend on the other rows.
    ``synced``: all ranks take equally many forward passes, because ZeRO-3 gathers parameters in each. Leaves the model
    in evaluation mode.
    """
    model.eval()
    batch, prompt_length = ids.shape
    limit = decoding.max_new_tokens
    responses = torch.full((batch, limit), pad_id, device=ids.device)
    uniforms = torch.rand(batch, limit, dtype=torch.float64, device=ids.device) if decoding.temperature else None
    roomy, cache = new_cache(model)
    forward = forward_of(model, roomy)
    live = Live(torch.arange(batch, device=ids.device), mask, (mask.cumsum(1) - 1).clamp(min=0))
    ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    ends = torch.tensor(eos_id, device=ids.device)
    logits = forward(ids, live, cache)
    live.positions = live.positions[:, -1:]
    with _decoding_attention(model):
        for step in range(limit):
            chosen = choose(logits, decoding, eos_id, step, None if uniforms is None else uniforms[live.rows, step])
            # A row that has ended goes on until it leaves the cache, with padding.
            chosen = torch.where(ended[live.rows], pad_id, chosen)
            responses[live.rows, step] = chosen
            ended[live.rows] |= torch.isin(chosen, ends)
            if step == limit - 1 or (step % _CHECK_EVERY == 0 and _all_ended(ended, synced)):
                break
            if step % CHUNK == 0:
                chosen = _rebuild(live, cache, chosen, ended, prompt_length + min(step + CHUNK, limit), roomy)
            live.positions = live.positions + 1
            live.mask[:, prompt_length + step] = 1
            seen = live if roomy else Live(live.rows, live.mask[:, : prompt_length + step + 1], live.positions)
            logits = forward(chosen.unsqueeze(1), seen, cache)
    longest = int(response_mask(responses[:, : step + 1], eos_id).sum(1).max())
    return torch.cat([ids, responses[:, :longest]], dim=1)


def new_cache(model: PreTrainedModel) -> tuple[bool, DynamicCache]:
    """The model's cache, with spare room if every layer attends to all of the past and accepts a ready-made mask."""
    cache = DynamicCache(config=model.config)
    plain = bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
    # A family without position_ids derives them, or its attention's slopes, from the plain two-dimensional mask.
    roomy = plain and "position_ids" in inspect.signature(model.forward).parameters
    # Other kernels take no additive mask.
    roomy = roomy and model.config._attn_implementation in ("sdpa", "eager")
    if roomy:
        cache.layers = [_RoomyLayer() for _ in cache.layers]
    return roomy, cache


def forward_of(model: PreTrainedModel, roomy: bool) -> Callable[[torch.Tensor, Live, DynamicCache], torch.Tensor]:
    """A function from new token ids ``(b, t)`` to the last one's logits ``(b, V)``."""
    parameters = inspect.signature(model.forward).parameters
    lowest = torch.finfo(model.dtype).min

    def forward(ids: torch.Tensor, live: Live, cache: DynamicCache) -> torch.Tensor:
        attention_mask = live.mask
        if roomy and ids.size(1) == 1:
            # transformers would build the same from the plain mask, in every step.
            hidden = (attention_mask == 0)[:, None, None]
            attention_mask = torch.zeros(hidden.shape, dtype=model.dtype, device=ids.device)
            attention_mask.masked_fill_(hidden, lowest)
        extra: dict[str, Any] = {"position_ids": live.positions} if "position_ids" in parameters else {}
        if "logits_to_keep" in parameters:
            extra["logits_to_keep"] = 1
        outputs = model(input_ids=ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **extra)
        return outputs.logits[:, -1]

    return forward


def choose(
    logits: torch.Tensor, decoding: Decoding, eos_id: Ends, step: int, uniform: torch.Tensor | None
) -> torch.Tensor:
    """One token per row, ``(b, V)`` logits to ``(b,)``: the likeliest, or the one that ``uniform`` in [0, 1) hits."""
    warped = warp(logits.unsqueeze(1), decoding, eos_id, first_action=step).squeeze(1)
    if uniform is None:
        return warped.argmax(-1)
    cumulative = warped.float().softmax(-1).double().cumsum(-1)
    threshold = (uniform * cumulative[:, -1]).unsqueeze(1)
    # The first token whose cumulative probability exceeds the threshold; never one of probability 0.
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.size(-1) - 1)


def _rebuild(
    live: Live, cache: DynamicCache, chosen: torch.Tensor, ended: torch.Tensor, room: int, roomy: bool
) -> torch.Tensor:
    """Drop rows that have ended and make room for another chunk. Returns the kept rows' newest tokens."""
    kept = (~ended[live.rows]).nonzero().squeeze(1)
    if not len(kept):
        kept = torch.zeros(1, dtype=torch.long, device=chosen.device)  # other ranks still need this one's forward pass
    if roomy:
        for layer in cache.layers:
            layer.rebuild(kept, room)  # type: ignore[union-attr] # all are _RoomyLayer
    elif len(kept) < len(live.rows):
        cache.batch_select_indices(kept)
    live.rows, live.positions = live.rows[kept], live.positions[kept]
    live.mask = torch.nn.functional.pad(live.mask[kept], (0, room - live.mask.size(1)))
    return chosen[kept]


def _all_ended(ended: torch.Tensor, synced: bool) -> bool:
    running = (~ended).any().float()
    if synced:
        torch.distributed.all_reduce(running, torch.distributed.ReduceOp.MAX)
    return not bool(running)


@contextlib.contextmanager
def _decoding_attention(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU, use eager attention within it: for a single query it is several times as fast as SDPA's kernel."""
    usual = model.config._attn_implementation
    if model.device.type != "cpu" or usual != "sdpa":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
