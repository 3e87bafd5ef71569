"""How good a policy truly is: answers at several temperatures, scored; and its learning curve, from its rollouts.

Nothing here is seen by a method: it runs when training is over.
"""

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.generation import Answer, Decoding, seeded_answers
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import load_causal_lm, load_token_classifier
from deepspeed_chat_tlcr.records import parse_json, read_jsonl
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_prompt
from evaluation.logprobs import as_examples, response_logprobs
from evaluation.scoring import sequence_scores, token_probs
from step3_ppo_tlcr.rewards import continuous_reward, fixed_reward
from testbed.study.truth import TESTBED, Scorer, checked, load_scorer

GREEDY = "greedy"
NO_TRUTH = "none"
CURVES = {
    "reward/per_token": "reward_per_token",
    "rollout/response_length": "response_length",
    "policy/kl": "kl",
    "policy/perplexity": "perplexity",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure one policy."""

    policy: str = option(MISSING, "the policy: a Hugging Face folder")
    sft: str = option(MISSING, "the SFT model: what KL is measured from")
    prompts: str = option(MISSING, "JSON lines with prompts")
    scorer: str = option(TESTBED, "python:module:function of prompt, response, ended; higher is better; none: no truth")
    world_seed: int = seed_option(0, "the testbed world of that scorer")
    temperatures: list[float] = option([1.0, 0.7, 0.0], "sampling temperatures; 0: greedy", least=0)
    max_answer_seq_len: int = option(96, "longest answer, tokens")
    batch_size: int = option(128, "answers generated at once")
    seed: int = seed_option(1234, "seed of the sampled answers; the same for every policy, so that they can be paired")
    discriminator: str | None = option(None, "adds the mean token reward 2D - 1 of the answers at temperature 1")
    reward_model: str | None = option(None, "adds the sequence reward of the answers at temperature 1")
    training: str | None = option(None, "the folder of the policy's training, for its learning curve")
    output_dir: str = option(MISSING, "folder for results.json")


def name_of(temperature: float) -> str:
    return f"T={temperature:g}" if temperature else GREEDY


def answer(policy: PreTrainedModel, tokenizer, prompts: Sequence[str], temperature: float, options: Options):
    """One answer to each prompt."""
    ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    decoding = Decoding(options.max_answer_seq_len, temperature)
    return seeded_answers(policy, tokenizer, ids, decoding, options.batch_size, options.seed)


def measures(prompts: Sequence[str], written: Sequence[Answer], scorer: Scorer | None) -> dict:
    """Means and, where the truth is asked for, scores prompt by prompt, for paired comparisons."""
    lengths = [len(one.response_ids) for one in written]
    found = {
        "response_length": statistics.fmean(lengths),
        "eos_rate": statistics.fmean(one.ended for one in written),
    }
    if scorer is None:
        return found
    scores = [scorer(prompt, one.text, one.ended) for prompt, one in zip(prompts, written, strict=True)]
    return {"true_score": statistics.fmean(scores), **found, "scores": [round(score, 4) for score in scores]}


def rewards(options: Options, written: Sequence[Answer], pad_id: int) -> dict[str, float]:
    """What the models that served as rewards say of the answers."""
    examples, found = as_examples(written), {}
    if options.discriminator:
        discriminator = load_token_classifier(options.discriminator, 2, torch.float32).eval()
        probs = [torch.tensor(row) for row in token_probs(discriminator, examples, pad_id)]
        token_rewards = [continuous_reward(row, torch.ones_like(row)) for row in probs]
        found["token_reward"] = torch.cat(token_rewards).mean().item()
        found["continuous_reward_sum"] = statistics.fmean(row.sum().item() for row in token_rewards)
        fixed = (fixed_reward(row, torch.ones_like(row)) for row in probs)
        found["discrete_reward_sum"] = statistics.fmean(row.sum().item() for row in fixed)
    if options.reward_model:
        reward_model = load_token_classifier(options.reward_model, 1, torch.float32).eval()
        scores = torch.tensor(sequence_scores(reward_model, examples, pad_id))
        found["sequence_reward"] = scores.mean().item()
        found["sequence_reward_sd"] = scores.std().item()
    return found


def learning_curve(training: Path, scorer: Scorer | None) -> dict[str, list[float | None]]:
    """By update: what training logged, and the true score of the rollouts that were kept (temperature 1)."""
    log = read_metrics(training / "metrics.jsonl")
    curve = {name: [entry.get(key) for entry in log] for key, name in CURVES.items()}
    rollouts = training / "rollouts.jsonl"
    if log and rollouts.is_file():
        calls = [parse_json(line) for line in rollouts.read_text(encoding="utf-8").splitlines()]
        # ReMax has its greedy answers scored too, behind the sampled ones: they cost tokens, but are not the policy's.
        size = max(1, len(calls) // len(log))
        updates = [calls[begin : begin + size] for begin in range(0, size * len(log), size)]
        curve["generated_tokens"] = [sum(call["tokens"] for call in update) for update in updates]
        if scorer:
            curve["true_score"] = [mean_score(update[0]["texts"], scorer) for update in updates]
    return {"update": [entry["step"] for entry in log], **curve}


def mean_score(texts: Iterable[dict], scorer: Scorer) -> float:
    return round(statistics.fmean(scorer(text["prompt"], text["response"], text["ended"]) for text in texts), 4)


@exits_cleanly
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    os.environ["TESTBED_WORLD_SEED"] = str(options.world_seed)
    scorer = None if options.scorer == NO_TRUTH else checked(load_scorer(options.scorer), options.scorer)
    prompts = [record["prompt"] for _, record in read_jsonl(options.prompts)]
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(options.sft)
    policy, sft = (load_causal_lm(path, torch.float32).eval() for path in (options.policy, options.sft))
    results: dict = {"decodings": {}}
    for temperature in options.temperatures:
        written = answer(policy, tokenizer, prompts, temperature, options)
        found = measures(prompts, written, scorer)
        if temperature == 1:
            pad_id = tokenizer.pad_token_id
            ratios = response_logprobs(policy, written, pad_id) - response_logprobs(sft, written, pad_id)
            found |= {"kl": ratios.mean().item(), **rewards(options, written, pad_id)}
            results |= {key: value for key, value in found.items() if isinstance(value, float) and math.isfinite(value)}
        results["decodings"][name_of(temperature)] = found
    if options.training:
        results["curve"] = learning_curve(Path(options.training), scorer)
    write_json(Path(options.output_dir) / "results.json", results)
