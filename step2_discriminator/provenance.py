"""Refuse labels that leak: the discriminator may only see prompts of the reward part of the data."""

from collections.abc import Sequence

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.preference_data import part_of_prompts
from deepspeed_chat_tlcr.records import Revision


def refuse_foreign_revisions(
    revisions: Sequence[Revision], data_path: Sequence[str], data_split: str, data_seed: int, tokenizer=None
) -> None:
    """Raise ``InputError`` if a revision's prompt is in the SFT or RL part of the data and not in the reward part.

    A prompt may stand in several parts (data sets repeat prompts); one that is in none of them is the user's own.
    """
    parts = part_of_prompts(data_path, data_split, data_seed, tokenizer=tokenizer)
    for part, purpose in (("sft", "SFT"), ("rl", "RL")):
        foreign = [r for r in revisions if r.prompt in parts[part] and r.prompt not in parts["reward"]]
        if foreign:
            raise InputError(
                f"--revisions: {len(foreign)} of {len(revisions)} revisions have prompts of the {purpose} part under "
                f"--data_split {data_split} --data_seed {data_seed} (first: id {foreign[0].id}); label the reward part "
                "with the same split and seed, or pass --allow_foreign_revisions"
            )
