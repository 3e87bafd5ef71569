"""How good a policy truly is (``testbed.measures``), and its learning curve, from its rollouts.

Nothing here is seen by a method: it runs when training is over.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import load_causal_lm, load_token_classifier
from deepspeed_chat_tlcr.records import read_jsonl
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from testbed.measures import BEST_OF, TEMPERATURES, Measured, Sampler, Scorer, judged, scores_in_training, write_answers
from testbed.study.truth import TESTBED, checked, load_scorer

CURVES = {
    "reward/per_token": "reward_per_token",
    "rollout/response_length": "response_length",
    "policy/kl": "kl",
    "policy/entropy": "entropy",
}


@dataclass(frozen=True, kw_only=True)
class ScorerOptions:
    """truth"""

    scorer: str = option(TESTBED, "python:module:function of prompt, response, ended; higher is better")
    world: int = option(2, "which of the testbed's worlds", least=1, most=2)
    world_seed: int = seed_option(0, "the testbed world of that scorer")
    max_answer_seq_len: int = option(96, "longest answer, tokens")
    batch_size: int = option(128, "answers generated at once")


@dataclass(frozen=True, kw_only=True)
class Options(ScorerOptions):
    """Measure one policy."""

    policy: str = option(MISSING, "the policy: a Hugging Face folder")
    sft: str = option(MISSING, "the SFT model: what KL is measured from, and as policy measured at all temperatures")
    validation: str = option(MISSING, "prompts that its temperature is chosen on")
    prompts: str | None = option(None, "prompts to report on; unset: only those of --validation are answered")
    answers: int = option(8, "answers to each prompt")
    discriminator: str | None = option(None, "adds best-of-n of the answers by the discriminator's total")
    reward_model: str | None = option(None, "adds best-of-n of the answers by the reward model")
    training: str | None = option(None, "the folder of the policy's training, for its learning curve")
    seed: int = seed_option(1234, "seed of the sampled answers; the same for every policy, so that they can be paired")
    output_dir: str = option(MISSING, "folder for results.json and answers.jsonl.xz")


def prompts_of(file: str) -> tuple[list[str], list[str]]:
    """Prompts, and what is new in each."""
    records = [record for _, record in read_jsonl(file)]
    return [record["prompt"] for record in records], [record.get("kind", "prompts") for record in records]


def sampler_of(options: ScorerOptions, tokenizer: PreTrainedTokenizerFast, sft: PreTrainedModel) -> Sampler:
    os.environ |= {"TESTBED_WORLD": str(options.world), "TESTBED_WORLD_SEED": str(options.world_seed)}
    scorer = checked(load_scorer(options.scorer), options.scorer)
    return Sampler(tokenizer, sft, scorer, options.max_answer_seq_len, options.batch_size, options.seed)


def told(measured: Measured, kinds: Sequence[str]) -> dict:
    """Means, and each prompt's, for paired comparisons."""
    by_prompt = [round(score, 4) for score in measured.scores.mean(1).tolist()]
    return {**measured.summary(), "by_kind": measured.by_kind(kinds), "scores": by_prompt}


def best_of_judges(options: Options, measured: Measured, pad_id: int) -> dict[str, list[dict]]:
    """Best-of-n of the answers by each judge and, as a limit that nobody can have, by the truth."""
    found = {"truth": measured.best_of_n(measured.scores.ravel().tolist())}
    for name, labels in (("discriminator", 2), ("reward_model", 1)):
        if path := getattr(options, name):
            model = load_token_classifier(path, labels, torch.float32).eval()
            found[name] = measured.best_of_n(judged(model, measured, pad_id))
    return found


def learning_curve(training: Path, scorer: Scorer, eos: str) -> dict[str, list[float | None]]:
    """By update: what training logged, the true score of its answers (temperature 1), and the tokens generated.

    ReMax's greedy answers, which are not kept, count as as many tokens as its sampled ones.
    """
    log = read_metrics(training / "metrics.jsonl")
    curve = {name: [entry.get(key) for entry in log] for key, name in CURVES.items()}
    scores = scores_in_training(training, scorer, eos)
    if scores:
        each = 2 if "reward/greedy_per_sequence" in log[0] else 1
        lengths = {entry["step"]: entry["rollout/response_length"] for entry in log}
        curve["generated_tokens"] = [round(each * len(of) * lengths[step]) for step, of in scores.items()]
        curve["true_score"] = [round(statistics.fmean(of), 4) for of in scores.values()]
    return {"update": [entry["step"] for entry in log], **curve}


@exits_cleanly
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(options.sft)
    policy, sft = (load_causal_lm(path, torch.float32).eval() for path in (options.policy, options.sft))
    sampler = sampler_of(options, tokenizer, sft)
    others = prompts_of(options.validation)[0]
    tried = sampler.sweep(policy, others)
    best = max(TEMPERATURES, key=tried.__getitem__)
    results: dict = {"validation": {f"{t:g}": score for t, score in tried.items()}, "best": f"{best:g}"}
    if options.prompts:
        prompts, kinds = prompts_of(options.prompts)
        wanted = TEMPERATURES if options.policy == options.sft else dict.fromkeys((1.0, best))
        measured = {f"{t:g}": sampler.measure(policy, prompts, t, options.answers) for t in wanted}
        results["decodings"] = {name: told(one, kinds) for name, one in measured.items()}
        if options.policy == options.sft:
            many = sampler.measure(sft, prompts, 1.0, max(BEST_OF))
            results["best_of"] = best_of_judges(options, many, tokenizer.pad_token_id)
        write_answers(Path(options.output_dir) / "answers.jsonl.xz", prompts, measured)
    if options.training:
        results["curve"] = learning_curve(Path(options.training), sampler.scorer, tokenizer.eos_token)
    write_json(Path(options.output_dir) / "results.json", results)
