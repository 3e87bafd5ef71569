"""The true score, by a function that is named as ``python:package.module:function``; and as a reward of step 3."""

import functools
import importlib
import inspect
import math
import os

import torch
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError, describe_error
from deepspeed_chat_tlcr.turns import end_ids
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.rewards import last_action
from testbed.measures import Scorer

TESTBED = "python:testbed.world:true_score"
SCORER = "TLCR_STUDY_SCORER"
"""The variable that tells ``true_reward`` its scorer."""


def load_scorer(name: str) -> Scorer:
    """Raises ``InputError`` for a name of another form, that cannot be imported, or that takes other arguments."""
    kind, _, path = name.partition(":")
    module, _, function = path.partition(":")
    if kind != "python" or not module or not function:
        raise InputError(f"--scorer {name}: expected python:package.module:function")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a stranger's module raises
        raise InputError(f"--scorer {name}: {describe_error(error)}") from None
    try:
        inspect.signature(scorer).bind("prompt", "response", True)
    except (TypeError, ValueError) as error:
        raise InputError(f"--scorer {name}: {error}; expected a function of prompt, response, ended") from None
    return scorer


def checked(scorer: Scorer, name: str) -> Scorer:
    """``scorer``, but with ``InputError`` that names prompt and response where it fails or gives no finite number."""

    def scored(prompt: str, response: str, ended: bool) -> float:
        where = f"--scorer {name}, prompt {shortened(prompt)}, response {shortened(response)}, ended {ended}"
        try:
            score = float(scorer(prompt, response, ended))
        except Exception as error:
            raise InputError(f"{where}: {describe_error(error)}") from error
        if not math.isfinite(score):
            raise InputError(f"{where}: {score}; expected a finite number")
        return score

    return scored


def shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


def true_reward(rollout: Rollout, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The true score on the last action, ``(B, A)``, by the scorer that the environment names: for --reward."""
    scorer, scores = load_scorer(os.environ[SCORER]), []
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    first = rollout.input_ids.size(1) - rollout.actions
    for ids, attention, actions in zip(rollout.input_ids, rollout.attention_mask, rollout.action_mask, strict=True):
        prompt, response = ids[:first][attention[:first].bool()].tolist(), ids[first:][actions.bool()].tolist()
        scores.append(scorer(decode(prompt), decode(response), response[-1] in end_ids(tokenizer)))
    return torch.tensor(scores, dtype=torch.float32)[:, None] * last_action(rollout.action_mask)
