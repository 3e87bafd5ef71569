"""What a model says about a rollout: one number, or one distribution, for each action."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.generation import Decoding
from deepspeed_chat_tlcr.packing import Pack, Row, forward_pack, forward_packed, packable, packs_of
from step3_ppo_tlcr.experience import Rollout, at_actions, before_actions
from step3_ppo_tlcr.logprobs import token_logprobs
from step3_ppo_tlcr.objectives import counted


def action_logits(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Logits of every choice, ``(B, A, V)``; nothing is computed for the prompt's other positions."""
    if _packs(model, rollout):
        return _forward_packed(
            rollout, lambda pack: forward_pack(model, pack, logits_to_keep=pack.chosen - 1, use_cache=False)[0]
        )
    outputs = _forward(model, rollout, logits_to_keep=rollout.actions + 1, use_cache=False)
    return before_actions(outputs.logits, rollout.actions)


def state_values(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """V of the state in which each action was chosen, ``(B, A)`` in fp32."""
    if _packs(model, rollout):
        return _forward_packed(rollout, lambda pack: forward_pack(model, pack)[0, pack.chosen - 1, 0].float())
    values = _forward(model, rollout).logits.squeeze(-1).float()
    return before_actions(values, rollout.actions)


def positive_probs(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """D(a_t | x, a_<t) of each chosen token, ``(B, A)`` in fp32 (Eq. 7); one soft-max, not two."""
    if _packs(model, rollout):
        logits = _forward_packed(rollout, lambda pack: forward_pack(model, pack)[0, pack.chosen])
    else:
        logits = at_actions(_forward(model, rollout).logits, rollout.actions)
    return logits.float().softmax(-1)[..., 1]


def token_scores(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """A sequence reward model's value at each response token, ``(B, A)`` in fp32; the last one is the score."""
    if _packs(model, rollout):
        return _forward_packed(rollout, lambda pack: forward_pack(model, pack)[0, pack.chosen, 0].float())
    return at_actions(_forward(model, rollout).logits.squeeze(-1).float(), rollout.actions)


def sequence_score(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """A sequence reward model's score of each whole response, its value at the last token: ``(B, 1)`` in fp32."""
    last = (rollout.action_mask.sum(1) - 1).clamp(min=0).long()
    return token_scores(model, rollout).gather(1, last.unsqueeze(1))


def rewriting_probs(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """A language model's probability of each response token where it stands, ``(B, A)`` in fp32."""
    logits = action_logits(model, rollout)
    return token_logprobs(logits, rollout.action_ids, Decoding(rollout.actions), ()).exp()


def last_attention(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """How much each response's last token attends to each of its tokens, in the last layer: ``(B, A)`` in fp32.

    The mean over heads of soft-max weights over all tokens, prompt included, so that rows sum to at most 1. Computed
    from the last layer's queries and keys: nothing of size T x T is kept. ``model`` was loaded with ``ATTENTION``.
    """
    _seen.clear()
    _forward(model, rollout)
    if "query" not in _seen:
        raise InputError(f"--reward abc: the attention of {type(_module(model)).__name__} cannot be looked at")
    query, key, mask, scaling = (_seen.pop(name) for name in ("query", "key", "mask", "scaling"))
    rows = torch.arange(len(query), device=query.device)
    last = rollout.input_ids.size(1) - rollout.actions + (rollout.action_mask.sum(1) - 1).clamp(min=0).long()
    asking = query[rows, :, last].float()  # (B, heads, d)
    keys = key.repeat_interleave(query.size(1) // key.size(1), dim=1).float()
    scores = torch.einsum("bhd,bhtd->bht", asking, keys) * (scaling or query.size(-1) ** -0.5)
    columns = torch.arange(keys.size(2), device=last.device)
    allowed = (rollout.attention_mask > 0) & (columns <= last.unsqueeze(1))
    if mask is not None:  # a layer with a window
        allowed &= mask[rows, 0, last, : keys.size(2)] >= 0 if mask.is_floating_point() else mask[rows, 0, last]
    weights = scores.masked_fill(~allowed.unsqueeze(1), -torch.inf).softmax(-1).mean(1)
    return counted(at_actions(weights, rollout.actions), rollout.action_mask)


ATTENTION = "tlcr_last_attention"
"""What a model has to be loaded with as its attention where ``last_attention`` is to be read in it."""

_seen: dict[str, Any] = {}  # the newest layer's queries (B, heads, T, d), keys (B, groups, T, d), mask and scale


def _noting(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """PyTorch's own attention, whose queries and keys can be looked at until the next layer's."""
    _seen.update(query=query, key=key, mask=attention_mask, scaling=scaling)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _noting)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _module(model: DeepSpeedEngine | PreTrainedModel) -> PreTrainedModel:
    return model.module if isinstance(model, DeepSpeedEngine) else model


def _packs(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout) -> bool:
    return bool(rollout.tokens_at_once) and packable(model, rollout.input_ids.size(1))


def _forward_packed(rollout: Rollout, forward: Callable[[Pack], torch.Tensor]) -> torch.Tensor:
    """What ``forward`` says of each pack's N actions, ``(N, …)``, as ``(B, A, …)``; 0 elsewhere. A collective."""
    first = rollout.input_ids.size(1) - rollout.actions  # where responses start, behind prompts padded on the left
    lengths, actions = torch.stack([rollout.attention_mask.sum(1), rollout.action_mask.sum(1)]).tolist()
    rows = [Row(first + own - length, first, first + own) for length, own in zip(lengths, actions, strict=True)]
    packs = packs_of(rollout.input_ids, rows, rollout.tokens_at_once, origin=first)
    return forward_packed(packs, rollout.action_mask.shape, forward)


def _forward(model: DeepSpeedEngine | PreTrainedModel, rollout: Rollout, **kwargs):
    if "position_ids" in inspect.signature(_module(model).forward).parameters:
        kwargs["position_ids"] = rollout.position_ids
    return model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask, **kwargs)
