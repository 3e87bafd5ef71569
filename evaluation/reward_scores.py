"""Reward scores (Figure 6): every model's answers under the sequence, discrete and continuous token rewards.

python evaluation/reward_scores.py --models sft=OUT/step1_sft tlcr=OUT/step3_ppo_tlcr/actor --data_path DATA \
    --discriminator OUT/step2_discriminator --sequence_reward OUT/reward_model --out OUTPUT
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer
from deepspeed_chat_tlcr.workers import processes_of
from evaluation.options import PolicyOptions, PromptOptions, RewardOptions
from evaluation.policies import Question, Reply, in_context, parse_models, prompt_text, torch_dtype
from evaluation.prompts import answer_prompts, read_prompts
from evaluation.report import part_program
from evaluation.results import save_results
from evaluation.scoring import Judge, judged, response_example
from evaluation.stats import ratio_interval
from step3_ppo_tlcr.rewards import continuous_reward, fixed_reward

SEQUENCE, DISCRETE, CONTINUOUS = "sequence", "discrete token", "continuous token"


@dataclass(frozen=True, kw_only=True)
class Options(RewardOptions, PromptOptions, PolicyOptions):
    """Score every model's answers with every reward."""


@dataclass(frozen=True)
class Answered:
    """A model's answers to the prompts, as texts: ``(prompt with its markers, response, ended, tokens)`` each."""

    rows: list[tuple[str, str, bool, int]]

    def examples(self, tokenizer) -> list[TokenizedExample]:
        return [response_example(tokenizer, prompt, text, ended) for prompt, text, ended, _ in self.rows]


def answers_in_context(path: str, questions: Sequence[Question], replies: Mapping[int | str, Reply]) -> Answered:
    """Prompts as the model at ``path`` saw them, with its answers."""
    tokenizer = load_tokenizer(path)
    rows = []
    for question in questions:
        reply = replies[question.id]
        prompt, text = prompt_text(tokenizer, question, []), in_context(tokenizer, question, reply.turns[0])
        rows.append((prompt, text, reply.ended[0], reply.tokens[0]))
    return Answered(rows)


def said(path: str, labels: int, answered: Mapping[str, Answered], options: Options) -> dict[str, list]:
    """What a reward model of 2 labels says of each answer's tokens, or one of 1 of each answer; by policy."""
    tokenizer = load_tokenizer(path)
    examples = {name: texts.examples(tokenizer) for name, texts in answered.items()}
    judge = Judge(path, labels, torch_dtype(options.dtype), options.attn_implementation)
    return judged(judge, examples, options.scoring_batch_size, processes_of(options.num_processes))


def token_sums(path: str, answered: Mapping[str, Answered], options: Options) -> dict[str, dict[str, np.ndarray]]:
    """Sums over each answer's tokens, EOS included, ``(N,)``, by model and reward (Eq. 7, Eq. 2)."""
    sums: dict[str, dict[str, np.ndarray]] = {}
    for name, found in said(path, 2, answered, options).items():
        probs = [torch.tensor(one) for one in found]
        sums[name] = {
            DISCRETE: np.array([fixed_reward(one, torch.ones_like(one)).sum().item() for one in probs]),
            CONTINUOUS: np.array([continuous_reward(one, torch.ones_like(one)).sum().item() for one in probs]),
        }
    return sums


def summarise(sums: Mapping[str, np.ndarray], lengths: np.ndarray) -> dict:
    """Mean sum per answer, and mean per token of all answers, with 95 % bootstrap intervals over prompts."""
    ones = np.ones_like(lengths)
    return {
        reward: {
            "sum": float(values.mean()),
            "sum_interval": ratio_interval(values, ones),
            "per_token": float(values.sum() / lengths.sum()) if lengths.sum() else math.nan,
            "per_token_interval": ratio_interval(values, lengths),
        }
        for reward, values in sums.items()
    }


def run(options: Options) -> None:
    models = parse_models(options.models)
    if not options.discriminator and not options.sequence_reward:
        raise InputError("name --discriminator, --sequence_reward or both: there is nothing to score with")
    questions = read_prompts(options, next(iter(models.values())))
    replies = answer_prompts(models, questions, options)
    answered = {name: answers_in_context(path, questions, replies[name]) for name, path in models.items()}
    sums: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
    if options.sequence_reward:
        for name, scores in said(options.sequence_reward, 1, answered, options).items():
            sums[name][SEQUENCE] = np.array(scores)  # Eq. 1
    if options.discriminator:
        for name, rewards in token_sums(options.discriminator, answered, options).items():
            sums[name] |= rewards
    lengths = {name: np.array([tokens for *_, tokens in one.rows], float) for name, one in answered.items()}
    results = {
        "prompts": len(questions),
        "temperature": options.temperature,
        "discriminator": options.discriminator,
        "sequence_reward": options.sequence_reward,
        "attn_implementation": options.attn_implementation,
        "rewards": list(next(iter(sums.values()))),
        "models": {
            name: {
                "rewards": summarise(sums[name], lengths[name]),
                "response_length": float(lengths[name].mean()),
                "ended": float(np.mean([ended for _, _, ended, _ in answered[name].rows])),
            }
            for name in models
        },
    }
    save_results(options.out, "reward_scores", results)
    show(results)


def show(results: dict) -> None:
    header = "".join(f"{f'{reward} (per token)':>30}" for reward in results["rewards"])
    print(f"{'reward scores':<16}{'tokens':>8}{header}")
    for name, row in results["models"].items():
        found = (row["rewards"][reward] for reward in results["rewards"])
        cells = (f"{one['sum']:.2f} ({one['per_token']:+.3f})" for one in found)
        print(f"{name:<16}{row['response_length']:>8.1f}" + "".join(f"{cell:>30}" for cell in cells))


main = part_program("reward_scores", Options, run)


if __name__ == "__main__":
    sys.exit(main())
