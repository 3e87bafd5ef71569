"""Keeps what a policy writes during training, to be scored afterwards: the learning curves of the study.

Named as a reward term of weight 0, ``--reward … python:testbed.study.recorder:record@0``, so that step 3 runs as it
is and never hears of a score.
"""

import json
import os

import torch
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.turns import end_ids
from step3_ppo_tlcr.experience import Rollout
from testbed.study.schedule import ROLLOUTS

KEPT = 16
"""Rollouts of each call that are kept."""


def record(rollout: Rollout, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Append the first rollouts, and how many tokens all have, to the file that the environment names.

    Returns zeros, ``(B, A)``.
    """
    lines = []
    prompt_length = rollout.input_ids.size(1) - rollout.actions
    for row in range(min(KEPT, len(rollout.input_ids))):
        ids = rollout.action_ids[row][rollout.action_mask[row].bool()].tolist()
        ended = ids[-1] in end_ids(tokenizer)
        prompt = rollout.input_ids[row, :prompt_length][rollout.attention_mask[row, :prompt_length].bool()].tolist()
        texts = {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            "response": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        }
        lines.append({**texts, "ended": ended})
    with open(os.environ[ROLLOUTS], "a", encoding="utf-8") as file:
        file.write(json.dumps({"tokens": int(rollout.action_mask.sum()), "texts": lines}) + "\n")
    return torch.zeros_like(rollout.action_mask, dtype=torch.float32)
