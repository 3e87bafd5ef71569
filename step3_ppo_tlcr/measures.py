"""What step 3 reports of rollouts and updates; docs/metrics.md is the glossary."""

import math
import resource

import torch
from deepspeed.accelerator import get_accelerator

from deepspeed_chat_tlcr.generation import Ends
from step3_ppo_tlcr.averages import Averages
from step3_ppo_tlcr.experience import Experience

_GIB = 2**30


def measure_rollout(
    experience: Experience,
    terms: dict[str, torch.Tensor],
    eos_id: Ends,
    averages: Averages,
    prefix: str = "",
) -> None:
    """Rewards, lengths and the reference's view of a batch of rollouts; ``prefix`` stands before every name."""
    mask, rewards = experience.rollout.action_mask, experience.rewards
    lengths = mask.sum(1)
    last_ids = experience.rollout.action_ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    averages.add(f"{prefix}reward/per_token", rewards, mask)
    averages.add(f"{prefix}reward/per_sequence", (rewards * mask).sum(1))
    averages.add(f"{prefix}reward/positive_share", (rewards > 0).float(), mask)
    averages.add(f"{prefix}reward/negative_share", (rewards < 0).float(), mask)
    for name, term in terms.items() if len(terms) > 1 else ():
        averages.add(f"{prefix}reward/{name}", (term * mask).sum(1))
    averages.add(f"{prefix}rollout/response_length", lengths)
    ends = torch.tensor(eos_id, device=last_ids.device)
    averages.add(f"{prefix}rollout/eos_rate", torch.isin(last_ids, ends).float())
    averages.add(f"{prefix}rollout/ref_perplexity", -experience.ref_logprobs, mask)


def measure_policy(experience: Experience, averages: Averages, prefix: str = "") -> None:
    """Perplexity of the policy's own tokens and its KL to the reference, from an experience's log-probs."""
    mask, divergence = experience.rollout.action_mask, experience.kl_logprobs - experience.ref_logprobs
    averages.add(f"{prefix}policy/perplexity", -experience.old_logprobs, mask)
    averages.add(f"{prefix}policy/kl_per_token", divergence, mask)
    averages.add(f"{prefix}policy/kl", (divergence * mask).sum(1))


def finished(means: dict[str, float]) -> dict[str, float]:
    """Means over all tokens and ranks, with what is computed from them put in place of its parts."""
    metrics = dict(means)
    for name in means:
        if name.endswith("perplexity"):
            metrics[name] = _exp(means[name])  # from nats per token
    if "value/squared_return" in metrics:
        variance = metrics.pop("value/squared_return") - metrics["value/return"] ** 2
        error = metrics.pop("value/squared_error")
        metrics["value/explained_variance"] = 1 - error / variance if variance > 0 else math.nan
    return metrics


def peak_memory() -> float:
    """Most memory that any rank has held so far, GiB: the accelerator's, on CPU the process's; a collective."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        held = accelerator.max_memory_allocated()
    peak = torch.tensor(held / _GIB, device=accelerator.current_device_name(), dtype=torch.float64)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return float(peak)


def throughputs(tokens: dict[str, int], seconds: dict[str, float], device: torch.device) -> dict[str, float]:
    """Tokens per second of each phase, over all ranks; ``tokens`` counts this rank's."""
    names = [name for name in tokens if seconds.get(name)]
    counts = torch.tensor([tokens[name] for name in names], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(counts)
    return {
        f"throughput/{name}_tokens_per_second": count / seconds[name]
        for name, count in zip(names, counts.tolist(), strict=True)
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
