"""What the study hands to step 3 as rewards of its own: a recorder, and the truth for whoever is to know it.

``--reward … python:testbed.study.recorder:record@0`` keeps what a policy writes during training, to be scored
afterwards, so that step 3 runs as it is and never hears of a score. ``true_reward`` is the ceiling of sparse rewards.
"""

import functools
import json
import os

import torch
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.turns import end_ids
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.rewards import last_action
from testbed.study.schedule import ROLLOUTS
from testbed.study.truth import load_scorer

KEPT = 16
"""Rollouts of each call that are kept."""
SCORER = "TLCR_STUDY_SCORER"


def texts_of(rollout: Rollout, tokenizer: PreTrainedTokenizerFast, rows: int) -> list[dict]:
    """Prompt, response and whether it ended by itself, of the first rows."""
    found = []
    prompt_length = rollout.input_ids.size(1) - rollout.actions
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for row in range(min(rows, len(rollout.input_ids))):
        ids = rollout.action_ids[row][rollout.action_mask[row].bool()].tolist()
        prompt = rollout.input_ids[row, :prompt_length][rollout.attention_mask[row, :prompt_length].bool()].tolist()
        found.append({"prompt": decode(prompt), "response": decode(ids), "ended": ids[-1] in end_ids(tokenizer)})
    return found


def record(rollout: Rollout, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Append the first rollouts, and how many tokens all have, to the file that the environment names.

    Returns zeros, ``(B, A)``.
    """
    line = {"tokens": int(rollout.action_mask.sum()), "texts": texts_of(rollout, tokenizer, KEPT)}
    with open(os.environ[ROLLOUTS], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return torch.zeros_like(rollout.action_mask, dtype=torch.float32)


def true_reward(rollout: Rollout, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The true score on the last action, ``(B, A)``, by the scorer that the environment names."""
    scorer = load_scorer(os.environ[SCORER])
    texts = texts_of(rollout, tokenizer, len(rollout.input_ids))
    scores = torch.tensor([scorer(one["prompt"], one["response"], one["ended"]) for one in texts])
    return scores[:, None] * last_action(rollout.action_mask).float()
