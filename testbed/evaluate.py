"""What a run on the testbed achieved: true scores of TLCR beside what SFT reaches by colder sampling; the report.

python testbed/evaluate.py --run_dir OUTPUT   ->  OUTPUT/results.json, OUTPUT/answers.jsonl.xz, OUTPUT/report.html
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.models import load_causal_lm, load_token_classifier
from deepspeed_chat_tlcr.pictures import Sample
from deepspeed_chat_tlcr.pictures.page import number
from deepspeed_chat_tlcr.provenance import provenance
from deepspeed_chat_tlcr.records import read_jsonl, read_revisions, results_of_stages
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation.logprobs import as_examples
from evaluation.scoring import heatmap, revision_heatmaps
from step2_discriminator.revisions import hold_out
from testbed.measures import (
    TEMPERATURES,
    Measured,
    Sampler,
    frontier,
    interval,
    judged,
    scores_in_training,
    write_answers,
)
from testbed.report import policy_name, verdict, write_report
from testbed.world import WORLDS

SHOWN = 4
"""Prompts, and revisions, whose tokens the report shows."""
ANSWERS = 8
"""Answers to each test prompt."""
STAGES = {
    "base": "base/results.json",
    "sft": "step1_sft/results.json",
    "labeling": "labeling/run.json",
    "discriminator": "step2_discriminator/results.json",
    "ppo": "step3_ppo_tlcr/results.json",
}
"""What each stage of a run writes last."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Score the policies of a run with the world's true score; write results.json and report.html."""

    run_dir: str = option(MISSING, "OUTPUT of run_tiny.sh")
    world: Literal[1, 2] = option(2, "the kind of world that the run's data came from")
    world_seed: int = seed_option(0, "which world of that kind")
    seed: int = seed_option(1234, "seed of the sampled answers")
    max_answer_seq_len: int = option(96, "longest answer, tokens")
    batch_size: int = option(128, "answers generated at once")


def over_frontier(measured: Measured, sft: Sequence[Measured]) -> dict[str, dict]:
    """How far answers lie above what the SFT model reaches at their KL and at their entropy, paired by prompt."""
    costs = {"kl": lambda one: float(one.kls.mean()), "entropy": lambda one: -float(one.entropies.mean())}
    scores = np.array([one.scores.mean(1) for one in sft])
    return {
        name: interval(measured.scores.mean(1) - frontier([cost(one) for one in sft], scores, cost(measured)))
        for name, cost in costs.items()
    }


def answer_samples(
    prompts: Sequence[str], policies: dict[str, Measured], tokenizer: PreTrainedTokenizerFast, discriminator
) -> list[Sample]:
    """The first test prompts with each policy's first answer, coloured by the discriminator."""
    samples = []
    for index in range(min(SHOWN, len(prompts))):
        texts = []
        for name, policy in policies.items():
            caption = f"{name}: true score {policy.scores[index, 0]:.1f}"
            example = as_examples([policy.answers[index * policy.scores.shape[1]]])[0]
            texts.append(heatmap(tokenizer, discriminator, example, caption))
        samples.append(Sample(prompts[index], texts, title=f"Test prompt {index + 1}"))
    return samples


def revision_samples(path: Path, tokenizer: PreTrainedTokenizerFast, discriminator) -> list[Sample]:
    """Held-out revisions: labels beside what the discriminator, which never saw them, says."""
    _, held_out = hold_out(list(read_revisions(path)), share=0.05)
    shown = [revision for revision in held_out if revision.modified != revision.rejected][:SHOWN]
    return [Sample(r.prompt, revision_heatmaps(tokenizer, discriminator, r, 4096)) for r in shown]


def print_table(results: dict) -> None:
    table = Table(title="Held-out prompts; the true score is never shown to training")
    for column in ("policy", "true score (1-10)", "repeat a fact", "response length", "KL to SFT at T=1", "entropy"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name in ("sft", "tlcr", "sft_best", "tlcr_best"):
        row = results[name]
        score = f"{row['true_score']:.2f} ± {row['true_score_standard_error']:.2f}"
        numbers = (f"{row[key]:.{digits}f}" for key, digits in (("response_length", 1), ("kl", 2), ("entropy", 2)))
        table.add_row(policy_name(name, row), score, f"{row['repeats']:.0%}", *numbers)
    judge = results["discriminator"]
    console = Console()
    console.print(table)
    console.print(verdict(results))
    console.print(
        f"discriminator: {number(judge['edited_accuracy'], 3)} accuracy on held-out edited tokens "
        f"(always the majority class: {number(judge['majority_accuracy'], 3)})"
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    run = Path(options.run_dir)
    stages = results_of_stages(run, STAGES, "run_tiny.sh")
    asked = [record for _, record in read_jsonl(run / "data" / "test_prompts.jsonl")]
    prompts, kinds = [record["prompt"] for record in asked], [record["kind"] for record in asked]
    others = [record["prompt"] for _, record in read_jsonl(run / "data" / "validation_prompts.jsonl")]
    world = WORLDS[options.world](seed=options.world_seed)

    tokenizer = load_tokenizer(run / "step1_sft")
    sft, tlcr = (
        load_causal_lm(str(run / path), torch.float32).eval() for path in ("step1_sft", "step3_ppo_tlcr/actor")
    )
    discriminator = load_token_classifier(str(run / "step2_discriminator"), 2, torch.float32).eval()
    sampler = Sampler(tokenizer, sft, world.score, options.max_answer_seq_len, options.batch_size, options.seed)
    swept = {t: sampler.measure(sft, prompts, t, ANSWERS, f"SFT at temperature {t:g}") for t in TEMPERATURES}
    tried = {name: sampler.sweep(model, others, name) for name, model in (("sft", sft), ("tlcr", tlcr))}
    best = {name: max(scores, key=scores.__getitem__) for name, scores in tried.items()}
    policies = {"sft": swept[1.0], "sft_best": swept[best["sft"]]}
    for name, temperature in (("tlcr", 1.0), ("tlcr_best", best["tlcr"])):
        policies[name] = sampler.measure(tlcr, prompts, temperature, ANSWERS, f"TLCR at temperature {temperature:g}")
    write_answers(run / "answers.jsonl.xz", prompts, {f"SFT T={t:g}": one for t, one in swept.items()} | policies)
    judge = {key.removeprefix("eval/"): v for key, v in stages["discriminator"].items() if key.startswith("eval/")}
    made = provenance(["bash", "training_scripts/run_tiny.sh", str(run)])
    gaps = {
        name: policies[f"tlcr{name}"].scores.mean(1) - policies[f"sft{name}"].scores.mean(1) for name in ("", "_best")
    }
    results = {
        **{name: {**policy.summary(), "by_kind": policy.by_kind(kinds)} for name, policy in policies.items()},
        "tlcr_over_frontier": over_frontier(policies["tlcr_best"], list(swept.values())),
        "tlcr_over_sft": {"temperature_1": interval(gaps[""]), "best": interval(gaps["_best"])},
        "sft_sweep": [one.summary() for one in swept.values()],
        "sft_best_of_n": swept[1.0].best_of_n(judged(discriminator, swept[1.0], tokenizer.pad_token_id)),
        "temperatures": {name: {f"{t:g}": score for t, score in row.items()} for name, row in tried.items()},
        "discriminator": judge,
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "seed": options.seed,
        "made": made,
    }
    write_report(
        run / "report.html",
        results,
        answers=answer_samples(
            prompts, {"SFT": policies["sft_best"], "TLCR": policies["tlcr_best"]}, tokenizer, discriminator
        ),
        revisions=revision_samples(run / "labeling" / "revisions.jsonl", tokenizer, discriminator),
        metrics={
            name: run / STAGES[name].replace("results.json", "metrics.jsonl")
            for name in ("sft", "discriminator", "ppo")
        },
        about=(
            f"A run on the testbed, a made-up world whose true score is known: a Llama of "
            f"{sum(p.numel() for p in sft.parameters()) / 1e6:.1f} million parameters, "
            f"{ANSWERS} answers to each of {len(prompts)} held-out prompts, seed {options.seed}. A policy’s best "
            f"temperature was chosen on {len(others)} other prompts."
        ),
        scores=scores_in_training(run / "step3_ppo_tlcr", world.score, tokenizer.eos_token),
        world=world.rewarded,
        made=made,
    )
    print_table(results)
    print(f"report: {run / 'report.html'}")
    write_json(run / "results.json", results)


if __name__ == "__main__":
    main()
