"""What a run on the testbed achieved: true scores of SFT and TLCR, and the report.

Whatever sharpens a policy raises its score at temperature 1 here, as sampling it colder does. So each policy is also
measured at the temperature that suits it best, chosen on prompts other than those that are reported.

python testbed/evaluate.py --run_dir OUTPUT   ->  OUTPUT/results.json, OUTPUT/report.html
"""

import statistics
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.generation import Answer, Decoding, seeded_answers
from deepspeed_chat_tlcr.models import load_causal_lm, load_token_classifier
from deepspeed_chat_tlcr.pictures import Sample
from deepspeed_chat_tlcr.pictures.page import number
from deepspeed_chat_tlcr.provenance import provenance
from deepspeed_chat_tlcr.records import read_jsonl, read_revisions, results_of_stages
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_prompt
from evaluation.logprobs import as_examples, response_logprobs
from evaluation.scoring import heatmap, revision_heatmaps
from step2_discriminator.revisions import hold_out
from testbed.base import BOS
from testbed.report import Run, policy_name, verdict, write_report
from testbed.world import REWARDED, World, repeats_a_fact

SHOWN = 4
"""Prompts, and revisions, whose tokens the report shows."""
TEMPERATURES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0)
"""Those a policy's best one is chosen from; 0: greedy."""
CHOSEN_ON = 256
"""Prompts of the evaluation data that it is chosen on, at most."""
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
    world_seed: int = seed_option(0, "the world that the run's data came from")
    seed: int = seed_option(1234, "seed of the sampled answers")
    max_answer_seq_len: int = option(96, "longest answer, tokens")
    batch_size: int = option(128, "answers generated at once")


@dataclass(frozen=True)
class Policy:
    """A policy's answers at one temperature, and how good they truly are."""

    answers: list[Answer]
    scores: list[float]
    temperature: float = 1.0

    def summary(self) -> dict[str, float]:
        repeats = [float(repeats_a_fact(answer.text)) for answer in self.answers]
        return {
            **with_error("true_score", self.scores),
            **with_error("response_length", [float(len(answer.response_ids)) for answer in self.answers]),
            "eos_rate": sum(answer.ended for answer in self.answers) / len(self.answers),
            **with_error("repeats", repeats),
            "temperature": self.temperature,
            "prompts": len(self.answers),
        }


def with_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """A measure's mean over the prompts and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return {name: statistics.fmean(values), f"{name}_standard_error": error}


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    world: World,
    options: Options,
    name: str,
    temperature: float = 1.0,
) -> Policy:
    """One scored answer to each prompt."""
    ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    words = f"answers of {name} at temperature {temperature:g}"
    decoding = Decoding(options.max_answer_seq_len, temperature)
    written = seeded_answers(model, tokenizer, ids, decoding, options.batch_size, options.seed, words)
    scores = [world.score(prompt, a.text, a.ended) for prompt, a in zip(prompts, written, strict=True)]
    return Policy(written, scores, temperature)


def kl(policy: Policy, model: PreTrainedModel, sft: PreTrainedModel, pad_id: int) -> dict[str, float]:
    """KL of the policy, as it was sampled, to the SFT model at temperature 1, with its error: nats per response."""
    own = response_logprobs(model, policy.answers, pad_id, policy.temperature) if policy.temperature else 0.0
    return with_error("kl", (own - response_logprobs(sft, policy.answers, pad_id)).tolist())


def difference(policy: Policy, other: Policy) -> dict[str, float]:
    """Mean true score of ``policy`` less that of ``other`` on the same prompts, with its standard error."""
    gaps = [one - two for one, two in zip(policy.scores, other.scores, strict=True)]
    return {"mean": statistics.fmean(gaps), "standard_error": statistics.stdev(gaps) / len(gaps) ** 0.5}


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


def scores_in_training(run: Path, world: World, eos: str) -> dict[int, list[float]]:
    """True scores of the answers that each step of PPO learnt from, where the run has saved them."""
    scores: dict[int, list[float]] = {}
    for file in sorted((run / "step3_ppo_tlcr").glob("answers-*.jsonl")):
        for _, line in read_jsonl(file):
            prompt = line["prompt"].removeprefix(BOS)
            score = world.score(prompt, line["answer"].removesuffix(eos), line["answer"].endswith(eos))
            scores.setdefault(line["step"], []).append(score)
    return scores


def print_table(results: dict) -> None:
    table = Table(title="Held-out prompts; the true score is never shown to training")
    for column in ("policy", "true score (1-10)", "repeat a fact", "response length", "KL to SFT at T=1"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name in ("sft", "tlcr", "sft_best", "tlcr_best"):
        row = results[name]
        score = f"{row['true_score']:.2f} ± {row['true_score_standard_error']:.2f}"
        words = policy_name(name, row)
        table.add_row(words, score, f"{row['repeats']:.0%}", f"{row['response_length']:.1f}", f"{row['kl']:.2f}")
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
    prompts = [record["prompt"] for _, record in read_jsonl(run / "data" / "test_prompts.jsonl")]
    others = [record["prompt"] for _, record in islice(read_jsonl(run / "data" / "eval.jsonl"), CHOSEN_ON)]
    world = World(seed=options.world_seed)

    tokenizer = load_tokenizer(run / "step1_sft")
    models = {
        "SFT": load_causal_lm(str(run / "step1_sft"), torch.float32).eval(),
        "TLCR": load_causal_lm(str(run / "step3_ppo_tlcr" / "actor"), torch.float32).eval(),
    }
    policies = {name: sample(model, tokenizer, prompts, world, options, name) for name, model in models.items()}
    tried: dict[str, dict[float, float]] = {}
    best: dict[str, Policy] = {}
    for name, model in models.items():
        of_each = {t: sample(model, tokenizer, others, world, options, name, t).scores for t in TEMPERATURES}
        tried[name] = {t: statistics.fmean(scores) for t, scores in of_each.items()}
        chosen = max(TEMPERATURES, key=tried[name].__getitem__)
        best[name] = sample(model, tokenizer, prompts, world, options, name, chosen)
    pad_id, measured = tokenizer.pad_token_id, {}
    for suffix, of in (("", policies), ("_best", best)):
        for name, policy in of.items():
            away = kl(policy, models[name], models["SFT"], pad_id)
            measured[name.lower() + suffix] = {**policy.summary(), **away}
    judge = {key.removeprefix("eval/"): v for key, v in stages["discriminator"].items() if key.startswith("eval/")}
    made = provenance(["bash", "training_scripts/run_tiny.sh", str(run)])
    results = {
        **measured,
        "tlcr_over_sft": {
            "temperature_1": difference(policies["TLCR"], policies["SFT"]),
            "best": difference(best["TLCR"], best["SFT"]),
        },
        "temperatures": {name.lower(): {f"{t:g}": score for t, score in row.items()} for name, row in tried.items()},
        "discriminator": judge,
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "seed": options.seed,
        "made": made,
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
            f"{len(prompts)} held-out prompts, seed {options.seed}. A policy’s best temperature was chosen on "
            f"{len(others)} other prompts."
        ),
        scores=scores_in_training(run, world, tokenizer.eos_token),
        world=REWARDED,
        made=made,
    )
    print_table(results)
    print(f"report: {run / 'report.html'}")
    write_json(run / "results.json", results)


if __name__ == "__main__":
    main()
