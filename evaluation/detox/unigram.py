"""A bag of words as PPO's reward, ``--reward python:evaluation.detox.unigram:reward``: TLCR without a discriminator."""

import functools
import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError
from evaluation.detox.data import TRAIN
from evaluation.detox.judges import Unigrams
from evaluation.detox.main import labelled
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.rewards import continuous_reward


@functools.cache
def probs(path: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """D of every token of the vocabulary, from the labels that the discriminator learns from too."""
    examples = labelled(Path(path) / TRAIN / "revisions.jsonl", tokenizer, max_length=64)
    return torch.tensor(Unigrams(examples, len(tokenizer)).probs, dtype=torch.float32)


def reward(rollout: Rollout, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """2 D(a_t) - 1, whatever stands before a_t; ``(B, A)``. ``DETOX_DATA`` names the folder that prepare wrote."""
    path = os.environ.get("DETOX_DATA")
    if not path:
        raise InputError("DETOX_DATA is not set: the folder that evaluation/detox/main.py prepare wrote")
    table = probs(path, tokenizer).to(rollout.input_ids.device)
    return continuous_reward(table[rollout.action_ids], rollout.action_mask)
