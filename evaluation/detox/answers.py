"""Policies' answers to the test prompts, and what independent judges measure of each."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deepspeed_chat_tlcr.arguments import option
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.generation import Answer
from deepspeed_chat_tlcr.models import load_causal_lm
from deepspeed_chat_tlcr.records import read_jsonl, require_file
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer
from evaluation.detox.data import TEST
from evaluation.detox.judges import profanity, repetition
from evaluation.logprobs import response_logprobs
from evaluation.options import PolicyOptions
from evaluation.policies import Policy, Question, answer_all, device, parse_models, torch_dtype
from evaluation.scoring import Judge, judged, response_example

Key = tuple[str, str]
"""A policy, and how it was sampled: "0.7", a temperature, or "best of 4"."""
SWEEP = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.0)
"""Temperatures of the SFT model: what any policy that is only sharper would reach."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(PolicyOptions):
    """Judge policies on the test prompts; print a table, write OUT/results.json and OUT/report.html.

    --models names them, sft=FOLDER among them.
    """

    data_dir: str = option(MISSING, "OUTPUT_DIR of prepare")
    base: str = option(MISSING, "folder of the untouched language model: its perplexity judges fluency")
    discriminator: str = option(MISSING, "the discriminator that was PPO's reward: it picks the best of n")
    judge: str = option(MISSING, "a discriminator trained on other edits")
    prompts: int = option(600, "test prompts at most")
    temperatures: list[float] = option([1.0, 0.7, 0.0], "how the policies are sampled", least=0, most=10)
    best_of: int = option(8, "answers of the SFT model from which the discriminator picks one")
    show_words: bool = option(False, "toxic words of the samples unmasked in the report")

    DEFAULTS: ClassVar[dict[str, Any]] = {"max_new_tokens": 32}


def test_prompts(options: ReportOptions) -> list[str]:
    records = read_jsonl(require_file(Path(options.data_dir) / TEST / "pairs" / "train.jsonl"))
    prompts = list(dict.fromkeys(record["prompt"] for _, record in records))
    if len(prompts) < 2:
        raise InputError(f"{options.data_dir}: fewer than two test prompts; run prepare again")
    return prompts[: options.prompts]


def questions(prompts: Sequence[str], temperatures: Sequence[float], samples: int) -> list[Question]:
    """Each prompt once at every temperature, and ``samples`` - 1 times more at temperature 1."""
    asked = [Question(f"{at}@{heat:g}", [text], heat, True) for heat in temperatures for at, text in enumerate(prompts)]
    more = range(1, samples)
    return asked + [Question(f"{at}@1#{n}", [text], 1.0, True) for n in more for at, text in enumerate(prompts)]


class Evaluation:
    """Answers and what is measured of them, each model loaded once."""

    def __init__(self, options: ReportOptions):
        self.options, self.prompts = options, test_prompts(options)
        self.models = parse_models(options.models)
        if "sft" not in self.models:
            raise InputError("--models: sft=FOLDER is missing, beside which the others are held")
        self.dtype = torch_dtype(options.dtype)
        self.tokenizer = load_tokenizer(self.models["sft"])
        self.examples: dict[Key, list[TokenizedExample]] = {}
        self.texts: dict[Key, list[str]] = {}
        self.ended: dict[Key, list[bool]] = {}

    def write(self) -> None:
        """Every policy's answers, kept in OUT/answers."""
        for name, path in self.models.items():
            heats = SWEEP if name == "sft" else tuple(self.options.temperatures)
            samples = self.options.best_of if name == "sft" else 1
            asked = questions(self.prompts, heats, samples)
            replies = answer_all(Policy(name, path, self.options), asked, Path(self.options.out) / "answers")
            for group in dict.fromkeys(question.id.partition("@")[2] for question in asked):
                key = (name, group)
                said = [replies[f"{at}@{group}"] for at in range(len(self.prompts))]
                self.texts[key] = [reply.turns[0] for reply in said]
                self.ended[key] = [reply.ended[0] for reply in said]
                self.examples[key] = [
                    response_example(self.tokenizer, prompt, reply.turns[0], reply.ended[0])
                    for prompt, reply in zip(self.prompts, said, strict=True)
                ]
        if self.options.best_of > 1:
            self.pick()

    def pick(self) -> None:
        """The SFT model's best of n by the discriminator's summed rewards, as one more way of sampling it."""
        groups = ["1", *(f"1#{n}" for n in range(1, self.options.best_of))]
        said = self.judged(self.options.discriminator, [("sft", group) for group in groups])
        rewards = np.array([[(2 * np.array(row) - 1).sum() for row in probs] for probs in said.values()])
        count = 2
        while count <= self.options.best_of:
            best = rewards[:count].argmax(0)
            for kept in (self.texts, self.ended, self.examples):
                kept["sft", f"best of {count}"] = [kept["sft", groups[choice]][at] for at, choice in enumerate(best)]
            count *= 2

    def judged(self, path: str, keys: Sequence[Key]) -> dict[Key, list[list[float]]]:
        """D of each token of each answer."""
        judge = Judge(path, 2, self.dtype, self.options.attn_implementation)
        examples = {str(place): self.examples[key] for place, key in enumerate(keys)}
        said = judged(judge, examples, self.options.generation_batch_size, 1)
        return dict(zip(keys, said.values(), strict=True))

    def logprobs(self, path: str, keys: Sequence[Key], heated: bool) -> dict[Key, np.ndarray]:
        """log pi of each answer, at the temperature it was sampled with where ``heated``."""
        model = load_causal_lm(path, self.dtype, attention=self.options.attn_implementation).to(device()).eval()
        found = {}
        for key in keys:
            heat = float(key[1].partition("#")[0]) if heated and not key[1].startswith("best") else 1.0
            if heated and heat == 0:
                found[key] = np.zeros(len(self.prompts))  # all probability is on the likeliest answer
                continue
            parts = ((one.input_ids[: one.response_start], one.response_ids) for one in self.examples[key])
            answers = [Answer(prompt, response, "", True) for prompt, response in parts]
            found[key] = response_logprobs(model, answers, self.tokenizer.pad_token_id, heat).double().numpy()
        return found

    def measure(self) -> dict[Key, dict[str, np.ndarray]]:
        """``(P,)`` arrays by (policy, way of sampling): what each answer is, one for each prompt."""
        shown = [key for key in self.examples if "#" not in key[1]]
        by_sft = self.logprobs(self.models["sft"], shown, heated=False)
        by_base = self.logprobs(self.options.base, shown, heated=False)
        own = {
            key: values
            for name, path in self.models.items()
            for key, values in self.logprobs(path, [k for k in shown if k[0] == name], heated=True).items()
        }
        said = self.judged(self.options.judge, shown)
        measured = {}
        for key in shown:
            words = [f"{prompt}{text}" for prompt, text in zip(self.prompts, self.texts[key], strict=True)]
            lengths = np.array([len(example.response_ids) for example in self.examples[key]], float)
            kl = own[key] - by_sft[key]
            if key[1].startswith("best of"):
                n = int(key[1].split()[-1])
                kl = np.full(len(lengths), math.log(n) - (n - 1) / n)  # an upper bound (Beirami et al., 2024)
            measured[key] = {
                "toxic": (profanity(words) > 0.5).astype(float),
                "judge": np.array([np.mean(2 * np.array(row) - 1) for row in said[key]]),
                "nats_per_token": -by_base[key] / lengths,
                "kl": kl,
                "length": lengths,
                "ended": np.array(self.ended[key], float),
                "repetition": np.array([repetition(text) for text in self.texts[key]]),
            }
        return measured
