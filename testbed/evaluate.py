"""What a run on the testbed achieved: true scores of SFT and TLCR, and the report.

python testbed/evaluate.py --run_dir OUTPUT   ->  OUTPUT/results.json, OUTPUT/report.html
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from deepspeed_chat_tlcr.arguments import option, parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.generation import Answer, Decoding, answers
from deepspeed_chat_tlcr.models import load_causal_lm, load_token_classifier
from deepspeed_chat_tlcr.pictures import Sample
from deepspeed_chat_tlcr.records import read_jsonl, read_revisions
from deepspeed_chat_tlcr.report import Run, write_report
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.scoring import as_examples, response_logprobs
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_prompt
from evaluation.scoring import heatmap, revision_heatmaps
from step2_discriminator.revisions import hold_out
from testbed.world import World

SHOWN = 4
"""Prompts, and revisions, whose tokens the report shows."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Score the policies of a run with the world's true score; write results.json and report.html."""

    run_dir: str = option(MISSING, "OUTPUT of run_tiny.sh")
    world_seed: int = option(0, "the world that the run's data came from")
    seed: int = option(1234, "seed of the sampled answers")
    max_answer_seq_len: int = option(96, "longest answer, tokens")
    batch_size: int = option(128, "answers generated at once")


@dataclass(frozen=True)
class Policy:
    """A policy's sampled answers to the test prompts, and how good they truly are."""

    answers: list[Answer]
    scores: list[float]

    def summary(self) -> dict[str, float]:
        count = len(self.answers)
        return {
            "true_score": statistics.fmean(self.scores),
            "true_score_standard_error": statistics.stdev(self.scores) / count**0.5,
            "response_length": statistics.fmean(len(answer.response_ids) for answer in self.answers),
            "eos_rate": sum(answer.ended for answer in self.answers) / count,
            "prompts": count,
        }


def sample(model: PreTrainedModel, tokenizer, prompts: Sequence[str], world: World, options: Options, name: str):
    """Sample one answer per prompt at temperature 1, and score it."""
    set_seed(options.seed)
    ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    generated = answers(model, tokenizer, ids, Decoding(options.max_answer_seq_len), options.batch_size)
    written = list(tqdm(generated, total=len(ids), desc=f"answers of {name}", dynamic_ncols=True))
    scores = [world.score(prompt, a.text, a.ended) for prompt, a in zip(prompts, written, strict=True)]
    return Policy(written, scores)


def answer_samples(
    prompts: Sequence[str], policies: dict[str, Policy], tokenizer: PreTrainedTokenizerFast, discriminator
) -> list[Sample]:
    """The first test prompts with each policy's answer, coloured by the discriminator."""
    samples = []
    for index in range(min(SHOWN, len(prompts))):
        texts = []
        for name, policy in policies.items():
            caption = f"{name}: true score {policy.scores[index]:.1f}"
            example = as_examples([policy.answers[index]])[0]
            texts.append(heatmap(tokenizer, discriminator, example, caption))
        samples.append(Sample(prompts[index], texts, title=f"Test prompt {index + 1}"))
    return samples


def revision_samples(path: Path, tokenizer: PreTrainedTokenizerFast, discriminator) -> list[Sample]:
    """Held-out revisions: labels beside what the discriminator, which never saw them, says."""
    _, held_out = hold_out(list(read_revisions(path)), share=0.05)
    shown = [revision for revision in held_out if revision.modified != revision.rejected][:SHOWN]
    return [Sample(r.prompt, revision_heatmaps(tokenizer, discriminator, r, 4096)) for r in shown]


def stage_results(run: Path) -> dict[str, dict]:
    """``results.json`` of every stage (labelling's is ``run.json``). Raises ``InputError`` for an unfinished one."""
    names = {
        "base": "base/results.json",
        "sft": "step1_sft/results.json",
        "labeling": "labeling/run.json",
        "discriminator": "step2_discriminator/results.json",
        "ppo": "step3_ppo_tlcr/results.json",
    }
    for name, path in names.items():
        if not (run / path).is_file():
            raise InputError(f"{run / path} is not there: the {name} stage has not finished")
    return {name: json.loads((run / path).read_text()) for name, path in names.items()}


def print_table(results: dict) -> None:
    table = Table(title="Held-out prompts, sampled at temperature 1; the true score is never shown to training")
    for column in ("policy", "true score (1-10)", "response length", "KL to SFT"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name in ("sft", "tlcr"):
        row = results[name]
        score = f"{row['true_score']:.2f} ± {row['true_score_standard_error']:.2f}"
        table.add_row(name.upper(), score, f"{row['response_length']:.1f}", f"{row['kl']:.2f}")
    judge = results["discriminator"]
    console = Console()
    console.print(table)
    console.print(
        f"discriminator: {judge['edited_accuracy']:.3f} accuracy on held-out edited tokens "
        f"(majority guess {judge['majority_accuracy']:.3f})"
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    run = Path(options.run_dir)
    stages = stage_results(run)
    prompts = [record["prompt"] for _, record in read_jsonl(run / "data" / "test_prompts.jsonl")]
    world = World(seed=options.world_seed)

    tokenizer = load_tokenizer(run / "step1_sft")
    models = {
        "SFT": load_causal_lm(str(run / "step1_sft"), torch.float32).eval(),
        "TLCR": load_causal_lm(str(run / "step3_ppo_tlcr" / "actor"), torch.float32).eval(),
    }
    policies = {name: sample(model, tokenizer, prompts, world, options, name) for name, model in models.items()}
    written = policies["TLCR"].answers
    log_ratio = response_logprobs(models["TLCR"], written, tokenizer.pad_token_id) - response_logprobs(
        models["SFT"], written, tokenizer.pad_token_id
    )
    judge = {key.removeprefix("eval/"): v for key, v in stages["discriminator"].items() if key.startswith("eval/")}
    results = {
        "sft": {**policies["SFT"].summary(), "kl": 0.0},
        "tlcr": {**policies["TLCR"].summary(), "kl": log_ratio.mean().item()},
        "discriminator": judge,
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "seed": options.seed,
    }

    discriminator = load_token_classifier(str(run / "step2_discriminator"), 2, torch.float32).eval()
    write_report(
        run / "report.html",
        results,
        answers=answer_samples(prompts, policies, tokenizer, discriminator),
        revisions=revision_samples(run / "labeling" / "revisions.jsonl", tokenizer, discriminator),
        runs=[
            Run("sft", run / "step1_sft" / "metrics.jsonl"),
            Run("discriminator", run / "step2_discriminator" / "metrics.jsonl"),
            Run("ppo", run / "step3_ppo_tlcr" / "metrics.jsonl"),
        ],
        about=(
            f"A run on the testbed, a made-up world whose true score is known: a Llama of "
            f"{sum(p.numel() for p in models['SFT'].parameters()) / 1e6:.1f} million parameters, "
            f"{len(prompts)} held-out prompts, seed {options.seed}."
        ),
    )
    print_table(results)
    print(f"report: {run / 'report.html'}")
    write_json(run / "results.json", results)


if __name__ == "__main__":
    main()
