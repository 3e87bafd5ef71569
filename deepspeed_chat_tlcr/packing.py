"""Forward passes without padding: the rows of a batch one after another, in packs of a number of tokens.

On HH-RLHF's lengths 44 % of the tokens of step 3's padded batches are padding. Rows in one pack do not see each other:
each has its own positions, and a mask (or flash attention's bounds) ends at its first token. A prefix that the rows of
a pair share is computed once.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from transformers import PreTrainedModel


def fill(lengths: Sequence[int], budget: int, least: int = 1) -> list[list[int]]:
    """Distribute rows over packs: the longest first, each into the first pack with room; a longer row has its own.

    There are at least ``least`` packs, if there are as many rows: packs with most rows are cut in two.
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


def packable(model: DeepSpeedEngine | PreTrainedModel, longest: int) -> bool:
    """Whether a family's attention can keep rows apart, by a ready-made mask or by positions that start anew.

    Layers that mix tokens without attention (state spaces, convolutions) cannot, nor can ALiBi, whose distances come
    from the padding mask.
    """
    module = _module(model)
    config = module.config
    window = getattr(config, "sliding_window", None)
    known = config._attn_implementation in ("sdpa", "eager") or _flash(module)
    known &= set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    known &= not getattr(config, "alibi", False)
    positions = "position_ids" in inspect.signature(module.forward).parameters
    return known and positions and (not window or window >= longest)


def tokens_at_once(model: PreTrainedModel, asked: int, longest: int, say: Callable[[str], None]) -> int:
    """``--tokens_per_micro_batch``; 0, with a warning, for a model that cannot be packed."""
    if asked and not packable(model, longest):
        say(
            f"warning: --tokens_per_micro_batch {asked}: {type(model).__name__} with {longest} tokens and attention by "
            f"{model.config._attn_implementation} cannot keep packed rows apart; they are padded"
        )
        return 0
    return asked


class Row(NamedTuple):
    """The columns of a row's tokens in a padded batch, and of those whose output is wanted."""

    begin: int
    wanted: int  # from this column on
    end: int
    shared: int = 0  # of its first tokens equal those of the row before it


@dataclass(frozen=True)
class Pack:
    """One forward pass of ``T`` tokens with N wanted outputs; a shared token counts once for each row."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    owners: torch.Tensor  # (1, T), which row, or pair of rows, each token is of
    branches: torch.Tensor  # (1, T), 0 where all rows of the owner see the token, else which of them
    chosen: torch.Tensor  # (N,), places in the pack of the tokens whose output is wanted
    rows: torch.Tensor  # (N,), the rows of the batch that these are of
    columns: torch.Tensor  # (N,), and their columns, counted from ``packs_of``'s ``origin``

    @property
    def visible(self) -> torch.Tensor:
        """``(1, 1, T, T)``: whether a token (third axis) sees another (fourth)."""
        owners, branches = self.owners[0], self.branches[0]
        same = owners[:, None] == owners[None, :]
        same &= (branches[None, :] == 0) | (branches[:, None] == branches[None, :])
        return same.tril()[None, None]


def packs_of(
    input_ids: torch.Tensor, rows: Sequence[Row], budget: int, together: int = 1, origin: int = 0
) -> list[Pack]:
    """A batch ``(B, T)`` in packs of ``budget`` tokens; equally many on all ranks, which ZeRO-3 needs. A collective.

    ``together``: the number of neighbouring rows that stay in one pack, 2 for pairs; only these may share tokens.
    """
    owners = [rows[first : first + together] for first in range(0, len(rows), together)]
    lengths = [sum(row.end - row.begin - row.shared for row in owner) for owner in owners]
    many = len(fill(lengths, budget))
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        most = torch.tensor(many, device=input_ids.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        many = int(most)
    packs = []
    for members in fill(lengths, budget, many):
        tokens: list[tuple[int, int, int, int, int]] = []  # row, column, position, owner, branch
        chosen: list[tuple[int, int, int]] = []  # place in the pack, row, column
        for member in members:
            first, common = len(tokens), max(row.shared for row in owners[member])
            for branch, row in enumerate(owners[member], 1):
                number, behind = member * together + branch - 1, len(tokens) - row.shared
                places = range(row.shared, row.end - row.begin)
                tokens += [(number, row.begin + at, at, member, 0 if at < common else branch) for at in places]
                for at in range(row.wanted - row.begin, row.end - row.begin):
                    chosen.append(((first if at < row.shared else behind) + at, number, row.begin + at - origin))
        row, column, position, owner, branch = torch.tensor(tokens, device=input_ids.device).T
        wanted = torch.tensor(chosen, dtype=torch.long, device=input_ids.device).view(-1, 3).T
        packs.append(Pack(input_ids[row, column][None], position[None], owner[None], branch[None], *wanted))
    return packs


def forward_pack(model: DeepSpeedEngine | PreTrainedModel, pack: Pack, **kwargs) -> torch.Tensor:
    """``(1, T, …)`` logits of a pack, or those of ``logits_to_keep``."""
    module, mask = _module(model), None
    if not _flash(module):  # which finds the rows' bounds in the positions
        mask = pack.visible
    if module.config._attn_implementation == "eager":  # which adds it to the scores
        lowest = torch.finfo(module.dtype).min
        mask = torch.zeros(mask.shape, dtype=module.dtype, device=mask.device).masked_fill_(~mask, lowest)
    return model(input_ids=pack.input_ids, position_ids=pack.position_ids, attention_mask=mask, **kwargs).logits


def forward_packed(packs: Sequence[Pack], shape: torch.Size, forward: Callable[[Pack], torch.Tensor]) -> torch.Tensor:
    """The outputs of ``forward`` for each pack's N tokens, ``(N, …)``, as ``(*shape, …)``; 0 elsewhere.

    ``shape``: ``(B, T)``, or ``(B, A)`` if ``packs_of``'s ``origin`` is the first of the last A columns.
    """
    outputs = torch.cat([forward(pack) for pack in packs])
    rows, columns = (torch.cat([getattr(pack, name) for pack in packs]) for name in ("rows", "columns"))
    return outputs.new_zeros(*shape, *outputs.shape[1:]).index_put((rows, columns), outputs)


def classify_packed(
    model: DeepSpeedEngine | PreTrainedModel, batch: dict[str, torch.Tensor], budget: int, pairs: bool
) -> torch.Tensor:
    """Logits ``(B, T, K)`` of each response's tokens, by ``budget`` tokens at a time; 0 elsewhere. A collective.

    ``batch``: from ``pad_examples``. ``pairs``: rows alternate, and a pair's shared prefix is computed once, but with
    flash attention, which has no mask, for each row.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shared = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    if pairs and not _flash(_module(model)):
        same = (ids[::2] == ids[1::2]) & (mask[::2] & mask[1::2]).bool()
        shared[1::2] = same.cumprod(1).sum(1)
    ends = mask.sum(1)
    starts = ends - batch["response_mask"].sum(1)
    spans = torch.stack([torch.zeros_like(ends), starts, ends, shared], 1).tolist()
    packs = packs_of(ids, [Row(*span) for span in spans], budget, together=2 if pairs else 1)
    return forward_packed(packs, ids.shape, lambda pack: forward_pack(model, pack)[0, pack.chosen])


def _module(model: DeepSpeedEngine | PreTrainedModel) -> PreTrainedModel:
    return model.module if isinstance(model, DeepSpeedEngine) else model


def _flash(module: PreTrainedModel) -> bool:
    return module.config._attn_implementation.startswith("flash")
