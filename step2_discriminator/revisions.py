"""What labels are made of, revisions or marked spans: read, checked against the data's split, and partly held out."""

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.arguments import DataOptions
from deepspeed_chat_tlcr.data.preferences import part_of_prompts
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Revision, read_revisions
from deepspeed_chat_tlcr.spans import MarkedResponse, read_marked
from step2_discriminator.options import Options, RevisionOptions

Labelled = TypeVar("Labelled", Revision, MarkedResponse)


def load_revisions(options: RevisionOptions, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Revision]]:
    """Revisions for ``train`` and ``eval``. Raises ``InputError`` for missing, empty or foreign ones.

    ``tokenizer``: its chat template renders the prompts of chat data.
    """
    if not options.revisions:
        raise InputError("--revisions is missing: give the revisions.jsonl that labeling/main.py wrote")
    train = _read(options.revisions)
    if not train:
        raise InputError(f"--revisions {' '.join(options.revisions)}: no revisions in it; run labeling/main.py first")
    if all(revision.modified == revision.rejected for revision in train):
        raise InputError(
            f"--revisions {' '.join(options.revisions)}: none of its {len(train)} revisions edits anything: there is "
            "nothing to learn; label again with another model or prompt"
        )
    if not options.allow_foreign_revisions:
        refuse_foreign(train, options, tokenizer)
    if options.eval_revisions:
        return {"train": train, "eval": _read(options.eval_revisions)}
    if len({revision.prompt for revision in train}) < 2:
        raise InputError("--revisions: all have one prompt, so none can be held out; give --eval_revisions")
    train, held_out = hold_out(train, options.eval_share)
    return {"train": train, "eval": held_out}


def load_marked(options: Options, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[MarkedResponse]]:
    """As ``load_revisions``, of ``--spans``: responses with the spans that a chat model marked in them."""
    marked = list(chain.from_iterable(map(read_marked, options.spans)))
    if len({one.prompt for one in marked}) < 2:
        raise InputError(f"--spans {' '.join(options.spans)}: fewer than two prompts, so that none can be held out")
    if not options.allow_foreign_revisions:
        refuse_foreign(marked, options, tokenizer, "--spans")
    train, held_out = hold_out(marked, options.eval_share)
    return {"train": train, "eval": held_out}


def _read(paths: Sequence[str]) -> list[Revision]:
    for path in paths:
        if Path(path).suffix in (".pkl", ".pickle"):
            raise InputError(
                f"--revisions {path}: pickles are not read, they can run code; import the .json beside it with "
                "`python labeling/main.py --from FILE.json --output_dir FOLDER`"
            )
    return list(chain.from_iterable(map(read_revisions, paths)))


def hold_out(revisions: list[Labelled], share: float) -> tuple[list[Labelled], list[Labelled]]:
    """Split by prompt, so that no prompt is on both sides. The choice depends only on the prompts' text."""
    ranked = sorted({r.prompt for r in revisions}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    held = set(ranked[: max(1, round(share * len(ranked)))])
    train = [revision for revision in revisions if revision.prompt not in held]
    return train, [revision for revision in revisions if revision.prompt in held]


def refuse_foreign(
    labelled: Sequence[Revision | MarkedResponse],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerFast,
    flag: str = "--revisions",
) -> None:
    """Raise ``InputError`` if a label's prompt is in the SFT or RL part of the data and not in the reward part.

    Such labels would leak. A prompt may be in several parts, because data sets repeat prompts; one that is in none is
    the user's own.
    """
    where = (options.data_path, options.data_split, options.data_seed)
    parts = part_of_prompts(*where, tokenizer, options.data_output_path)
    for part, purpose in (("sft", "SFT"), ("rl", "RL")):
        foreign = [r for r in labelled if r.prompt in parts[part] and r.prompt not in parts["reward"]]
        if foreign:
            raise InputError(
                f"{flag}: {len(foreign)} of {len(labelled)} labels have prompts of the {purpose} part under "
                f"--data_split {options.data_split} --data_seed {options.data_seed} (first: id {foreign[0].id}); label "
                "the reward part with the same split and seed, or pass --allow_foreign_revisions"
            )
