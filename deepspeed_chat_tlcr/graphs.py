"""The decoding loop on a GPU: one launch of a CUDA graph per token, instead of a thousand launches of kernels.

A graph is recorded once for each bucket of rows and of room in the key-value cache, and then serves all later rollouts.
It uses the same memory every time, so the cache stays allocated. A replay depends on ``state`` and ``step``, which two
small kernels advance after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from deepspeed_chat_tlcr.decode import Live, choose, decode, forward_of, new_cache
from deepspeed_chat_tlcr.errors import describe_error
from deepspeed_chat_tlcr.generation import Decoding, Ends, response_mask

ROOM = 128
"""Tokens by which the room grows: attention runs over all of it."""
_CHECK_EVERY = 12  # tokens between checks how many rows are still being decoded, which wait for the device


class _SlotLayer(DynamicLayer):
    """One layer's keys and values ``(b, H, room, D)``; the newest go to ``slot``, which is in the device's memory."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.slot, self.is_initialized = keys, values, slot, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.size(2) - 1


@dataclass
class _Buffers:
    """The memory of all graphs. Row r is the batch's row ``rows[r]``, but for ``responses`` and ``uniforms``."""

    cache: torch.Tensor  # (2 layers, B, H, R, D): keys and values in turn
    mask: torch.Tensor  # (B, R), 1 on tokens seen
    first: torch.Tensor  # (B, 1), position of the prompt's last token
    rows: torch.Tensor  # (B,)
    state: torch.Tensor  # (2, B): the newest token, and whether the row has ended
    following: torch.Tensor  # (2, B), the state after the coming replay
    responses: torch.Tensor  # (B, A)
    uniforms: torch.Tensor  # (B, A)
    prompt: torch.Tensor  # (1,), length of the padded prompts
    step: torch.Tensor  # (1,), which action comes next

    def hold(self, cache: torch.Size, actions: int) -> bool:
        have = self.cache.shape
        same = (have[0], have[2], have[4]) == (cache[0], cache[2], cache[4])
        return same and have[1] >= cache[1] and have[3] >= cache[3] and self.responses.size(1) >= actions


class GraphedLoop:
    """``decode`` by CUDA graphs where that is possible; where it is not, ``say`` gets the reason, once."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.buffers: _Buffers | None = None
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None
        self.failed = False

    def _possible(self, model: PreTrainedModel, synced: bool) -> bool:
        if self.failed:
            return False
        if synced or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            return self._fail("ZeRO-3 gathers the weights anew for every token")
        if not new_cache(model)[0]:
            return self._fail(f"{type(model).__name__}'s cache or attention cannot stand in place")
        return True

    def _fail(self, why: str) -> bool:
        self.failed = True
        self.graphs.clear()
        self.say(f"decoding without CUDA graphs, several times slower: {why}")
        return False

    @torch.no_grad()
    def decode(
        self,
        model: PreTrainedModel,
        ids: torch.Tensor,
        mask: torch.Tensor,
        decoding: Decoding,
        eos_id: Ends,
        pad_id: int,
        synced: bool = False,
    ) -> torch.Tensor:
        """As ``decode``, with the same tokens from the same random numbers; by the plain loop if graphs cannot work."""
        if not self._possible(model, synced):
            return decode(model, ids, mask, decoding, eos_id, pad_id, synced)
        model.eval()
        batch, prompt_length = ids.shape
        limit, stops = decoding.max_new_tokens, ((eos_id,) if isinstance(eos_id, int) else tuple(eos_id))
        uniforms = torch.rand(batch, limit, dtype=torch.float64, device=ids.device) if decoding.temperature else None
        cache = DynamicCache(config=model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        forward = forward_of(model, True)
        logits = forward(ids, Live(torch.arange(batch, device=ids.device), mask, positions), cache)
        if len({states.shape for states in states_of(cache)}) > 1:
            self._fail(f"the layers of {type(model).__name__} keep states of different sizes")
            return decode(model, ids, mask, decoding, eos_id, pad_id)
        chosen = choose(logits, decoding, eos_id, 0, None if uniforms is None else uniforms[:, 0])
        buffers = self._filled(cache, mask, positions[:, -1:], chosen, limit, uniforms)
        ends = torch.zeros(logits.size(-1), dtype=torch.bool, device=ids.device)
        ends[list(stops)] = True
        buffers.state[1, :batch] = ends[chosen].long()
        del cache
        rows = _bucket(batch)
        for step in range(1, limit):
            if step % _CHECK_EVERY == 0:
                running = int((buffers.state[1, :rows] == 0).sum())
                if not running:
                    break
                if _bucket(running) < rows:
                    rows = _bucket(running)
                    _keep(buffers, rows, prompt_length + step)
            room = -(-(prompt_length + step) // ROOM) * ROOM
            self._advance(model, (rows, room), decoding, stops, pad_id)
            buffers.state.copy_(buffers.following)
            buffers.step.add_(1)
        responses = buffers.responses[:batch, :limit]
        longest = int(response_mask(responses, eos_id).sum(1).max())
        return torch.cat([ids, responses[:, :longest]], dim=1)

    def _filled(
        self,
        cache: DynamicCache,
        mask: torch.Tensor,
        first: torch.Tensor,
        chosen: torch.Tensor,
        actions: int,
        uniforms: torch.Tensor | None,
    ) -> _Buffers:
        """Buffers with the prompts and the first action; the earlier ones if they are large enough."""
        states = states_of(cache)
        batch, heads, length, width = states[0].shape
        shape = torch.Size((len(states), _bucket(batch), heads, -(-(length + actions) // ROOM) * ROOM, width))
        if self.buffers is None or not self.buffers.hold(shape, actions):
            self.graphs.clear()
            self.buffers = None  # free before the larger one is made
            self.buffers = _new_buffers(shape, actions, states[0])
        buffers = self.buffers
        for number, one in enumerate(states):
            buffers.cache[number, :batch, :, :length] = one
        buffers.mask.zero_()
        buffers.mask[:batch, :length] = mask
        buffers.mask[batch:, 0] = 1  # rows that fill up the bucket see one token, so that no soft-max is empty
        buffers.first.zero_()
        buffers.first[:batch] = first
        torch.arange(len(buffers.rows), out=buffers.rows)
        buffers.state.fill_(1)
        buffers.state[0].zero_()
        buffers.state[0, :batch] = chosen
        # Rows that have ended, and those that only fill up the bucket, are padding.
        buffers.responses.zero_()
        buffers.responses[:batch, 0] = chosen
        if uniforms is not None:
            buffers.uniforms[:batch, :actions] = uniforms
        buffers.prompt.fill_(length)
        buffers.step.fill_(1)
        return buffers

    def _advance(
        self, model: PreTrainedModel, size: tuple[int, int], decoding: Decoding, stops: Sequence[int], pad_id: int
    ) -> None:
        """One token for every row, by the graph of this size, which is recorded at first use."""
        key = (*size, decoding, tuple(stops), pad_id)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self._step(model, *size, decoding, stops, pad_id)  # also warms kernels up before they are recorded
        if self.failed:
            return
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self._step(model, *size, decoding, stops, pad_id)
        except RuntimeError as error:  # a model whose forward asks the device for numbers, or copies from the host
            self._fail(describe_error(error))
            return
        self.pool = graph.pool()
        self.graphs[key] = graph

    def _step(
        self, model: PreTrainedModel, rows: int, room: int, decoding: Decoding, stops: Sequence[int], pad_id: int
    ) -> None:
        """From ``state`` to ``following``; no shape, address or number of it depends on what is on the device."""
        buffers = self.buffers
        tokens, ended = buffers.state[0, :rows], buffers.state[1, :rows] > 0
        slot = buffers.prompt + buffers.step - 1
        buffers.mask.index_fill_(1, slot, 1)
        cache = DynamicCache()
        keys, values = buffers.cache[0::2, :rows, :, :room], buffers.cache[1::2, :rows, :, :room]
        cache.layers = [_SlotLayer(*pair, slot) for pair in zip(keys, values, strict=True)]
        live = Live(buffers.rows[:rows], buffers.mask[:rows, :room], buffers.first[:rows] + buffers.step)
        logits = forward_of(model, True)(tokens.unsqueeze(1), live, cache)
        if decoding.min_new_tokens:
            too_early = buffers.step < decoding.min_new_tokens
            for stop in stops:
                logits[:, stop] = logits[:, stop].masked_fill(too_early, -torch.inf)
        uniform = buffers.uniforms[live.rows, buffers.step] if decoding.temperature else None
        chosen = choose(logits, replace(decoding, min_new_tokens=0), stops[0], 0, uniform)
        chosen = chosen.masked_fill(ended, pad_id)
        buffers.responses[live.rows, buffers.step] = chosen
        for stop in stops:
            ended = ended | (chosen == stop)
        buffers.following[0, :rows] = chosen
        buffers.following[1, :rows] = ended.long()


def _bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(0, rows - 1).bit_length()


def _keep(buffers: _Buffers, rows: int, filled: int) -> None:
    """Move the rows that are still being decoded to the front; ``filled`` tokens of the cache are in use."""
    kept = buffers.state[1].argsort(stable=True)[:rows]
    buffers.cache[:, :rows, :, :filled] = buffers.cache[:, kept, :, :filled]
    for name in ("mask", "first", "rows"):
        tensor = getattr(buffers, name)
        tensor[:rows] = tensor[kept]
    buffers.state[:, :rows] = buffers.state[:, kept]
    buffers.state[1, rows:] = 1


def states_of(cache: DynamicCache) -> list[torch.Tensor]:
    """Keys and values of every layer."""
    layers: list[Any] = cache.layers
    return [states for layer in layers for states in (layer.keys, layer.values)]


def _new_buffers(shape: torch.Size, actions: int, like: torch.Tensor) -> _Buffers:
    rows = shape[1]
    whole: dict[str, Any] = {"dtype": torch.long, "device": like.device}
    return _Buffers(
        cache=like.new_zeros(shape),
        mask=torch.zeros(rows, shape[3], **whole),
        first=torch.zeros(rows, 1, **whole),
        rows=torch.zeros(rows, **whole),
        state=torch.zeros(2, rows, **whole),
        following=torch.zeros(2, rows, **whole),
        responses=torch.zeros(rows, actions, **whole),
        uniforms=torch.zeros(rows, actions, dtype=torch.float64, device=like.device),
        prompt=torch.zeros(1, **whole),
        step=torch.zeros(1, **whole),
    )
