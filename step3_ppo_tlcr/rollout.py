"""Rollouts behind DeepSpeed's own rollout interface: prompts in, prompts with responses out."""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.rollout import HybridEngineRollout, RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from deepspeed_chat_tlcr.decode import decode
from deepspeed_chat_tlcr.errors import InputError, describe_error
from deepspeed_chat_tlcr.generation import Decoding, Ends, generate, left_pad, response_mask
from deepspeed_chat_tlcr.graphs import GraphedLoop
from deepspeed_chat_tlcr.operators import load_operator
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.turns import end_ids
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.servers import ServedBatch, Servers, VllmRollout

_PAGE = 64  # tokens of one page of the continuous batching's cache
_CHECKED_TOKENS = 8  # greedy tokens that the hybrid engine must get right


def request(prompts: Sequence[list[int]], pad_token_id: int, device: torch.device) -> RolloutRequest:
    """Prompts of several lengths as one request, padded on the left to the longest of them."""
    ids, mask = left_pad(prompts, pad_token_id)
    return RolloutRequest(ids.to(device), mask.to(device))


class _EngineRollout(RolloutEngine):
    """Rollouts by the training engine's own weights."""

    def __init__(self, engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerFast, min_new_tokens: int = 0):
        self.engine, self.tokenizer, self.min_new_tokens = engine, tokenizer, min_new_tokens
        self.synced = engine.zero_optimization_partition_weights() and torch.distributed.get_world_size() > 1

    def sync_weights(self, step: int) -> None:
        """Nothing to do: the weights that generate are the weights that train."""

    def _decoding(self, sampling: SamplingConfig) -> Decoding:
        return Decoding(
            sampling.max_new_tokens, sampling.temperature, sampling.top_p, max(0, sampling.top_k), self.min_new_tokens
        )

    def _batch(self, request: RolloutRequest, ids: torch.Tensor) -> RolloutBatch:
        """Generated ids ``(B, P + A)`` with the exact mask of their responses."""
        prompt_length = request.prompt_ids.size(1)
        responses = response_mask(ids[:, prompt_length:], end_ids(self.tokenizer))
        return RolloutBatch(
            input_ids=ids,
            attention_mask=torch.cat([request.prompt_attention_mask, responses], dim=1),
            response_start_idx=torch.full((len(ids),), prompt_length, device=ids.device),
        )


class LoopRollout(_EngineRollout):
    """This project's decoding loop; under ZeRO-3 all ranks step together."""

    name = "loop"
    graphs: GraphedLoop | None = None  # set on a GPU

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Sample one response per prompt; temperature 0 takes the likeliest tokens."""
        decoded = self.graphs.decode if self.graphs else decode
        ids = decoded(
            self.engine.module,
            request.prompt_ids,
            request.prompt_attention_mask,
            self._decoding(sampling),
            end_ids(self.tokenizer),
            self.tokenizer.pad_token_id,
            synced=self.synced,
        )
        return self._batch(request, ids)


class GenerateRollout(_EngineRollout):
    """transformers' ``generate``; under ZeRO-3 all ranks step together."""

    name = "hf"

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Sample one response per prompt; temperature 0 takes the likeliest tokens."""
        ids = generate(
            self.engine.module,
            self.tokenizer,
            request.prompt_ids,
            request.prompt_attention_mask,
            self._decoding(sampling),
            synced_gpus=self.synced,
        )
        return self._batch(request, ids)


class ContinuousRollout(_EngineRollout):
    """transformers' continuous batching: a paged cache, and a row's place goes to the next prompt when it ends."""

    name = "continuous"

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Sample one response per prompt; temperature 0 takes the likeliest tokens."""
        prompts = [
            row[mask > 0].tolist() for row, mask in zip(request.prompt_ids, request.prompt_attention_mask, strict=True)
        ]
        longest = max(map(len, prompts))
        pages = -(-(longest + sampling.max_new_tokens) // _PAGE) + 1
        greedy = sampling.temperature == 0
        self.engine.module.eval()
        outputs = self.engine.module.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=not greedy,
                temperature=1.0 if greedy else sampling.temperature,
                top_p=1.0 if greedy else sampling.top_p,
                top_k=0 if greedy else max(0, sampling.top_k),
                eos_token_id=list(end_ids(self.tokenizer)),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
            ),
            # Sized by the work: left to itself it takes all memory there is, and minutes to fill it on a CPU.
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE, num_blocks=pages * len(prompts), max_batch_tokens=max(1024, longest)
            ),
            warmup=False,
            progress_bar=False,
        )
        if len(outputs) != len(prompts):
            raise RuntimeError(f"continuous batching answered {len(outputs)} of {len(prompts)} prompts")
        # Requests finish in any order; their names end in the number of the prompt.
        ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[1]))
        failed = [output.error for output in ordered if output.error]
        if failed:
            raise RuntimeError(f"continuous batching: {failed[0]}")
        responses = torch.full((len(prompts), sampling.max_new_tokens), self.tokenizer.pad_token_id)
        for row, output in enumerate(ordered):
            tokens = output.generated_tokens[: sampling.max_new_tokens]
            responses[row, : len(tokens)] = torch.tensor(tokens)
        return self._batch(request, torch.cat([request.prompt_ids, responses.to(request.prompt_ids.device)], dim=1))


class HybridRollout(_EngineRollout):
    """DeepSpeed's hybrid engine: its inference kernels on the training weights."""

    name = "hybrid"

    def __init__(self, engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerFast):
        super().__init__(engine, tokenizer)
        self.inner = HybridEngineRollout(engine, tokenizer)

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Sample one response per prompt; temperature 0 takes the likeliest tokens."""
        self.engine.eval()
        # A checkpoint's own top_p or penalties would slip in where a call leaves them open.
        self.engine.module.generation_config = GenerationConfig(pad_token_id=self.tokenizer.pad_token_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = self.inner.generate(request, sampling)
        # Its mask searches for the pad id; ours is exact.
        return self._batch(request, written.input_ids)


def agrees(
    rollouts: RolloutEngine, logits_of: Callable[[Rollout], torch.Tensor], request: RolloutRequest, eos_id: Ends
) -> bool:
    """Whether a rollout engine's first greedy tokens are those that the training forward finds likeliest, on all ranks.

    ``logits_of`` gives ``(B, A, V)`` logits of the choices. Near-ties may fall either way in 16 bits: a token counts as
    right if its logit comes within 2 % of the range of the best one's.
    """
    rollout = to_rollout(rollouts.generate(request, SamplingConfig(_CHECKED_TOKENS, temperature=0.0)))
    logits = logits_of(rollout).float()
    chosen = logits.gather(-1, rollout.action_ids.unsqueeze(-1)).squeeze(-1)
    best, lowest = logits.amax(-1), logits.amin(-1)
    wrong = ((best - chosen) > 0.02 * (best - lowest)) & (rollout.action_mask > 0)
    count = wrong.any().float()
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return not bool(count)


@functools.cache
def hybrid_obstacle(runtime: Runtime) -> str | None:
    """What DeepSpeed's hybrid engine lacks on this machine, None where it can run; compiles its kernels (minutes)."""
    if runtime.dtype == "fp32" or get_accelerator().device_name() != "cuda":
        return "needs a CUDA device and 16-bit weights"
    try:
        load_operator("InferenceBuilder")
    except Exception as error:  # whatever a missing or unfit compiler brings
        return f"its kernels cannot be compiled ({describe_error(error)})"
    return None


def make_rollouts(
    options: Options,
    runtime: Runtime,
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    logits_of: Callable[[Rollout], torch.Tensor],
    servers: Servers | None = None,
) -> RolloutEngine:
    """The rollout engine that ``--rollout`` names; ``hybrid`` only where its first greedy tokens prove right."""
    if options.rollout_name == "vllm":
        return VllmRollout(engine, tokenizer, servers, options)
    loop = LoopRollout(engine, tokenizer, options.min_answer_seq_len)
    if runtime.device.type == "cuda" and not options.eager_decoding:
        loop.graphs = GraphedLoop(runtime.say)
    if options.rollout_name == "loop":
        return loop
    if options.rollout_name == "hf":
        return GenerateRollout(engine, tokenizer, options.min_answer_seq_len)
    if options.rollout_name == "continuous":
        if not hasattr(engine.module, "generate_batch"):
            raise InputError(
                f"--rollout continuous: transformers has no continuous batching for {type(engine.module).__name__}"
            )
        return ContinuousRollout(engine, tokenizer)
    if obstacle := hybrid_obstacle(runtime):
        runtime.say(f"hybrid engine: {obstacle}; rollouts go on with --rollout loop")
        return loop
    if options.min_answer_seq_len:
        raise InputError("--min_answer_seq_len: the hybrid engine has no minimum length; use --rollout loop")
    return checked(HybridRollout(engine, tokenizer), loop, runtime, prompts, logits_of)


def checked(
    hybrid: RolloutEngine,
    fallback: _EngineRollout,
    runtime: Runtime,
    prompts: Sequence[list[int]],
    logits_of: Callable[[Rollout], torch.Tensor],
) -> RolloutEngine:
    """``hybrid`` if it writes what the model would, else ``fallback``, saying so."""
    tokenizer = fallback.tokenizer
    few = request(prompts[:4], tokenizer.pad_token_id, runtime.device)
    if agrees(hybrid, logits_of, few, end_ids(tokenizer)):
        return hybrid
    runtime.say(
        "hybrid engine: its first greedy tokens are not the model's own, it would write gibberish; rollouts go on with "
        "--rollout loop"
    )
    return fallback


def to_rollout(batch: RolloutBatch) -> Rollout:
    """Split a generated batch into tokens and actions, dropping columns where no response has a token."""
    start = int(batch.response_start_idx[0])
    longest = max(1, int(batch.attention_mask[:, start:].sum(1).max()))
    kept = slice(0, start + longest)
    sampled = batch.logprobs[:, :longest] if isinstance(batch, ServedBatch) else None
    mask = batch.attention_mask[:, start : kept.stop]
    return Rollout(batch.input_ids[:, kept], batch.attention_mask[:, kept], mask, sampled)
