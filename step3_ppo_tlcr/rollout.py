"""Rollouts behind DeepSpeed's own rollout interface: prompts in, prompts with responses out."""

from collections.abc import Sequence

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.generation import Decoding, generate, left_pad, response_mask
from step3_ppo_tlcr.records import Rollout


def request(prompts: Sequence[list[int]], pad_token_id: int, device: torch.device) -> RolloutRequest:
    """Prompts of several lengths as one request, padded on the left to the longest of them."""
    ids, mask = left_pad(prompts, pad_token_id)
    return RolloutRequest(ids.to(device), mask.to(device))


class GenerateRollout(RolloutEngine):
    """transformers' ``generate`` on the training engine's own weights; under ZeRO-3 all ranks step together."""

    name = "hf"

    def __init__(self, engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerFast, min_new_tokens: int = 0):
        self.engine, self.tokenizer, self.min_new_tokens = engine, tokenizer, min_new_tokens
        self.synced = engine.zero_optimization_partition_weights() and torch.distributed.get_world_size() > 1

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Sample one response per prompt; temperature 0 takes the likeliest tokens."""
        decoding = Decoding(
            sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k, self.min_new_tokens
        )
        ids = generate(
            self.engine.module,
            self.tokenizer,
            request.prompt_ids,
            request.prompt_attention_mask,
            decoding,
            synced_gpus=self.synced,
        )
        prompt_length = request.prompt_ids.size(1)
        responses = response_mask(ids[:, prompt_length:], self.tokenizer.eos_token_id)
        return RolloutBatch(
            input_ids=ids,
            attention_mask=torch.cat([request.prompt_attention_mask, responses], dim=1),
            response_start_idx=torch.full((len(ids),), prompt_length, device=ids.device),
        )

    def sync_weights(self, step: int) -> None:
        """Nothing to do: the weights that generate are the weights that train."""


def to_rollout(batch: RolloutBatch) -> Rollout:
    """Split a generated batch into tokens and actions, dropping columns where no response has a token."""
    start = int(batch.response_start_idx[0])
    longest = max(1, int(batch.attention_mask[:, start:].sum(1).max()))
    kept = slice(0, start + longest)
    return Rollout(batch.input_ids[:, kept], batch.attention_mask[:, kept], batch.attention_mask[:, start : kept.stop])
