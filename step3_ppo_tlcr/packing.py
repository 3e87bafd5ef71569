"""Forward passes without padding: rows of a rollout behind one another, up to a number of tokens at a time.

On HH-RLHF's lengths 44 % of the tokens of padded batches are padding. Rows in one pack do not see each other: each has
its own positions, and a mask (or flash attention's own bounds) ends at its first token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from transformers import PretrainedConfig

from step3_ppo_tlcr.experience import Rollout


def fill(lengths: Sequence[int], budget: int, least: int = 1) -> list[list[int]]:
    """Rows by pack: the longest first, each into the first pack with room for it; a longer row has its own.

    At least ``least`` packs, for which the ones with most rows are cut in two; there are never more packs than rows.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((number for number, left in enumerate(room) if lengths[row] <= left), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(budget)
        packs[place].append(row)
        room[place] -= lengths[row]
    while len(packs) < min(least, len(lengths)):
        largest = max(packs, key=len)
        packs.append(largest[len(largest) // 2 :])
        del largest[len(largest) // 2 :]
    return packs


def packable(config: PretrainedConfig, parameters: Sequence[str], longest: int) -> bool:
    """Whether a family's attention can be told where rows end: by a ready-made mask or by positions that start anew."""
    window = getattr(config, "sliding_window", None)
    known = config._attn_implementation in ("sdpa", "eager") or config._attn_implementation.startswith("flash")
    return known and "position_ids" in parameters and (not window or window >= longest)


@dataclass(frozen=True)
class Pack:
    """One forward pass of ``T`` tokens, N of which a policy chose."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    owners: torch.Tensor  # (1, T), which row of the rollout each token is of
    chosen: torch.Tensor  # (N,), places in the pack of the chosen tokens
    actions: torch.Tensor  # (N,), their places in the rollout's (B, A), counted row by row

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """``(1, 1, T, T)``: 0 where a token sees another, the lowest number where it does not."""
        same = self.owners[0, :, None] == self.owners[0, None, :]
        hidden = ~same.tril()
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
            hidden, torch.finfo(dtype).min
        )[None, None]


def packs_of(rollout: Rollout) -> list[Pack]:
    """A rollout's rows in packs of ``tokens_at_once``; equally many on all ranks, which ZeRO-3 needs. A collective."""
    width = rollout.input_ids.size(1)
    lengths, actions = torch.stack([rollout.attention_mask.sum(1), rollout.action_mask.sum(1)]).tolist()
    many = len(fill(lengths, rollout.tokens_at_once))
    if torch.distributed.get_world_size() > 1:
        most = torch.tensor(many, device=rollout.input_ids.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        many = int(most)
    first = width - rollout.actions  # where responses start, behind prompts padded on the left
    packs = []
    for members in fill(lengths, rollout.tokens_at_once, many):
        ends = list(accumulate(lengths[row] for row in members))
        starts = [row * width + first + actions[row] - lengths[row] for row in members]
        columns = {
            "input_ids": [range(start, start + lengths[row]) for start, row in zip(starts, members, strict=True)],
            "position_ids": [range(lengths[row]) for row in members],
            "owners": [[row] * lengths[row] for row in members],
            "chosen": [range(end - actions[row], end) for end, row in zip(ends, members, strict=True)],
            "actions": [range(row * rollout.actions, row * rollout.actions + actions[row]) for row in members],
        }
        flat = {
            name: torch.tensor(list(chain.from_iterable(parts)), device=rollout.input_ids.device)
            for name, parts in columns.items()
        }
        packs.append(
            Pack(
                rollout.input_ids.flatten()[flat["input_ids"]][None],
                flat["position_ids"][None],
                flat["owners"][None],
                flat["chosen"],
                flat["actions"],
            )
        )
    return packs


def forward_packed(rollout: Rollout, forward: Callable[[Pack], torch.Tensor]) -> torch.Tensor:
    """What ``forward`` says of each pack's N actions, ``(N, …)``, in the rollout's order ``(B, A, …)``; 0 elsewhere."""
    parts = [(pack.actions, forward(pack)) for pack in packs_of(rollout)]
    places, found = torch.cat([place for place, _ in parts]), torch.cat([values for _, values in parts])
    whole = found.new_zeros(rollout.action_mask.numel(), *found.shape[1:])
    return whole.index_copy(0, places, found).view(*rollout.action_mask.shape, *found.shape[1:])
