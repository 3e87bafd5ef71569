"""TLCR on people's corrections of model answers (QA-feedback, Wu et al. 2023): before the stages and after them.

python evaluation/qa_feedback.py prepare …   what the stages start from: data, tokenizer, an untrained Llama
python evaluation/qa_feedback.py report …    what a run has brought: results.json, a table

training_scripts/run_qa_feedback.sh calls both; docs/qa_feedback.md explains the measures.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
    set_seed,
)

from deepspeed_chat_tlcr.arguments import option, parse, run_command, seed_option
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.generation import Decoding, seeded_answers
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import POSITIVE, TOKEN_LABELS, load_token_classifier
from deepspeed_chat_tlcr.pictures.page import number
from deepspeed_chat_tlcr.records import Preference, read_jsonl, read_revisions, results_of_stages, write_jsonl
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_prompt
from evaluation.logprobs import as_examples, response_logprobs
from evaluation.policies import device
from evaluation.scoring import token_probs
from labeling.importing import qa_feedback_preference
from step2_discriminator.objectives import positive_logit
from step2_discriminator.revisions import hold_out
from step3_ppo_tlcr.rewards import continuous_reward

EOS = "</s>"
SHOWN = ("reward/per_token", "policy/kl", "rollout/response_length", "rollout/eos_rate", "value/loss")
"""What the report repeats of the first and the last update's metrics."""
AT_ONCE = 64
"""Answers that are generated at once."""
STAGES = {
    "data": "prepared/results.json",
    "audit": "audit/audit.json",
    "labeling": "labeling/run.json",
    "base": "base/step1_sft/results.json",
    "sft": "step1_sft/results.json",
    "discriminator": "step2_discriminator/results.json",
    "ppo": "step3_ppo_tlcr/results.json",
}
"""What each stage of a run writes last."""

# ---- before the stages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Hold out prompts, and write what the stages start from: pairs, revisions, raw texts, tokenizer, untrained Llama.

    No stage trains on a held-out prompt or an answer to it.
    """

    qa_feedback: str = option(MISSING, "QA-feedback records, .jsonl or .jsonl.gz")
    revisions: str = option(MISSING, "the same records as labeling/main.py --from has imported them")
    output_dir: str = option(MISSING, "folder for pairs/, revisions/, texts/ (train and eval) and model/")
    passages: int = option(0, "how many passages stand before the question in the revisions' prompts", least=0)
    held_out_share: float = option(0.2, "share of the prompts that are held out, chosen by hash", above=0, below=1)
    vocabulary: int = option(4096, "tokens of the byte-level BPE")
    hidden_size: int = option(128, "width of the Llama; a head for every 32", least=32, most=4096, multiple=32)
    layers: int = option(2, "layers of the Llama", most=100)
    max_positions: int = option(512, "longest text that the Llama can read, tokens")
    seed: int = seed_option(1234, "seed of the Llama's initial weights")


def raw_texts(path: str, prompts: set[str], passages: int = 0) -> list[dict]:
    """What the base model reads of the records with these prompts, as records that step 1 takes: passages behind their
    titles, and sampled answers of any quality behind the questions.

    Raises ``InputError`` naming the line of a record of another schema.
    """
    texts = {}  # each once: questions share passages
    for line, record in read_jsonl(path):
        try:
            prompt = qa_feedback_preference(record, passages).prompt
            if prompt in prompts:
                for title, *sentences in record["passages"]:
                    texts[f"{title}\n", " ".join(sentences)] = None
                for answer in (record["prediction"], *record["others"]):
                    texts[prompt, f" {answer.strip()}"] = None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"--qa_feedback {path}:{line}: not a QA-feedback record ({error!r})") from None
    return [{"prompt": prompt, "chosen": text} for prompt, text in texts]


def byte_level_bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer that loses no text; its only special token is EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def untrained_llama(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    layers: int,
    max_positions: int,
    seed: int,
    heads: int = 0,
    pad_id: int | None = None,
) -> LlamaForCausalLM:
    """A small Llama with random weights; unless given, a head for every 32 of its width and the tokenizer's pad."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=heads or max(1, hidden_size // 32),
            max_position_embeddings=max_positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if pad_id is None else pad_id,
            tie_word_embeddings=False,
            initializer_range=0.06,  # at the usual 0.02 so small a model takes several times as many steps
        )
    )


def prepare(argv: Sequence[str]) -> None:
    options = parse(PrepareOptions, argv)
    folder = Path(options.output_dir)
    train, held_out = hold_out(list(read_revisions(options.revisions)), options.held_out_share)
    revisions = {"train": train, "eval": held_out}
    texts = {
        split: raw_texts(options.qa_feedback, {r.prompt for r in revisions[split]}, options.passages)
        for split in revisions
    }
    for split, kept in revisions.items():
        if not texts[split]:
            raise InputError(f"{options.qa_feedback}: none of its {split} questions are in {options.revisions}")
        pairs = (Preference(r.prompt, r.chosen, r.rejected).as_pair() for r in kept)
        write_jsonl(folder / "pairs" / f"{split}.jsonl", pairs)
        write_jsonl(folder / "revisions" / f"{split}.jsonl", map(asdict, kept))
        write_jsonl(folder / "texts" / f"{split}.jsonl", texts[split])
    corpus = [text["prompt"] + text["chosen"] for text in texts["train"]]
    corpus += [r.prompt + answer for r in revisions["train"] for answer in (r.chosen, r.modified)]
    tokenizer = byte_level_bpe(corpus, options.vocabulary)
    model = untrained_llama(tokenizer, options.hidden_size, options.layers, options.max_positions, options.seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    counts = {f"{split}_prompts": len({r.prompt for r in kept}) for split, kept in revisions.items()}
    results = {**counts, "vocabulary": len(tokenizer), "parameters": model.num_parameters()}
    write_json(folder / "results.json", results)
    print(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in results.items()))


# ---- after the stages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Measure a finished run on its held-out prompts; print a table, write RUN_DIR/results.json."""

    run_dir: str = option(MISSING, "OUTPUT of run_qa_feedback.sh")
    more_methods: list[str] = option([], "other methods that were run beside TLCR, from RUN_DIR/step3_METHOD/actor")
    answers: int = option(4, "sampled answers to each held-out prompt, by each policy")
    max_answer_seq_len: int = option(128, "longest answer, tokens")
    seed: int = seed_option(1234, "seed of the sampled answers")


@dataclass(frozen=True)
class Scored:
    """A policy's sampled answers: ``(N,)`` each, the answers to one prompt next to each other."""

    rewards: torch.Tensor  # sum of r_t = 2 D - 1 over the answer's tokens, EOS included
    lengths: torch.Tensor  # tokens, EOS included
    ended: torch.Tensor  # 1 where the policy ended the answer itself
    kl: torch.Tensor  # log pi - log pi_SFT of the answer, nats


def rate_with_error(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """Sum of ``sums`` over sum of ``counts``, with its standard error. Both ``(P,)``, one entry for each prompt.

    The error is the ratio estimator's: deviations of sums from rate x counts, prompts taken as independent draws.
    """
    rate = sums.sum() / counts.sum()
    deviations = sums - rate * counts
    error = deviations.std() / math.sqrt(len(sums)) / counts.mean()
    return rate.item(), error.item()


def sample(
    policy: PreTrainedModel,
    sft: PreTrainedModel,
    discriminator: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    options: ReportOptions,
    name: str,
) -> Scored:
    """Answers as PPO samples and scores them: temperature 1, the whole distribution, a reward for every token."""
    rows = [prompt for prompt in prompts for _ in range(options.answers)]
    decoding, words = Decoding(options.max_answer_seq_len), f"answers of {name}"
    written = seeded_answers(policy, tokenizer, rows, decoding, AT_ONCE, options.seed, words)
    pad_id = tokenizer.pad_token_id
    probs = [torch.tensor(row) for row in token_probs(discriminator, as_examples(written), pad_id)]
    logprobs, sft_logprobs = (response_logprobs(model, written, pad_id) for model in (policy, sft))
    return Scored(
        rewards=torch.stack([continuous_reward(row, torch.ones_like(row)).sum() for row in probs]).double(),
        lengths=torch.tensor([len(answer.response_ids) for answer in written]).double(),
        ended=torch.tensor([answer.ended for answer in written]).double(),
        kl=(logprobs - sft_logprobs).double(),
    )


def summary(scored: Scored, answers: int) -> dict[str, float]:
    by_prompt = (column.view(-1, answers).sum(1) for column in (scored.rewards, scored.lengths))
    reward, error = rate_with_error(*by_prompt)
    return {
        "reward_per_token": reward,
        "reward_per_token_standard_error": error,
        "reward_per_sequence": scored.rewards.mean().item(),
        "response_length": scored.lengths.mean().item(),
        "eos_rate": scored.ended.mean().item(),
        "kl": scored.kl.mean().item(),
        "answers": len(scored.rewards),
    }


@torch.no_grad()
def pipeline_difference(folder: Path, discriminator: PreTrainedModel, text: str) -> float:
    """Largest difference between D as transformers' token-classification pipeline gives it and as training does."""
    classify = pipeline("token-classification", model=str(folder), aggregation_strategy="none", device="cpu")
    found = [
        entry["score"] if entry["entity"] == TOKEN_LABELS[POSITIVE] else 1 - entry["score"] for entry in classify(text)
    ]
    # The pipeline, too, cuts where the model's positions end.
    ids = classify.tokenizer(text, return_tensors="pt", truncation=True)["input_ids"].to(discriminator.device)
    own = positive_logit(discriminator(input_ids=ids).logits[0]).sigmoid().cpu()
    return (own - torch.tensor(found)).abs().max().item()


def policy_folders(run: Path, more_methods: Sequence[str]) -> dict[str, Path]:
    """Where the policy of SFT and of each method is. Raises ``InputError`` for one that has not finished."""
    folders = {"sft": run / "step1_sft", "tlcr": run / "step3_ppo_tlcr" / "actor"}
    folders |= {method: run / f"step3_{method}" / "actor" for method in more_methods}
    for method, folder in folders.items():
        if not folder.is_dir():
            raise InputError(f"{folder} is not there: {method} has not finished in {run}")
    return folders


def report(argv: Sequence[str]) -> None:
    options = parse(ReportOptions, argv)
    run = Path(options.run_dir)
    stages = results_of_stages(run, STAGES, "run_qa_feedback.sh")
    tokenizer = load_tokenizer(run / "step1_sft")
    held_out = list(read_revisions(run / "prepared" / "revisions" / "eval.jsonl"))
    prompts = [tokenize_prompt(tokenizer, prompt) for prompt in dict.fromkeys(r.prompt for r in held_out)]

    # The way any user would load them: transformers' own classes, nothing of ours.
    folders = policy_folders(run, options.more_methods)
    policies = {
        name: AutoModelForCausalLM.from_pretrained(folder).float().to(device()) for name, folder in folders.items()
    }
    folder = run / "step2_discriminator"
    discriminator = load_token_classifier(str(folder), 2, torch.float32).to(device()).eval()
    difference = pipeline_difference(folder, discriminator, held_out[0].prompt + held_out[0].rejected)
    if difference > 1e-3:
        raise InputError(f"{folder}: its D in pipeline('token-classification') is off by {difference:.4f}")

    log = read_metrics(run / "step3_ppo_tlcr" / "metrics.jsonl")
    judge = {key.removeprefix("eval/"): v for key, v in stages["discriminator"].items() if key.startswith("eval/")}
    results = {
        "prompts": {"train": stages["data"]["train_prompts"], "held_out": len(prompts)},
        "agreement_with_people": stages["audit"]["agreement_with_people"],
        "discriminator": {**judge, "pipeline_difference": difference},
        **{
            name: summary(
                sample(model, policies["sft"], discriminator, tokenizer, prompts, options, name), options.answers
            )
            for name, model in policies.items()
        },
        "methods": list(policies),
        "ppo": {"updates": len(log), "first": log[0], "last": log[-1]},
        "parameters": stages["data"]["parameters"],
        "seconds": {name: stages[name]["seconds"] for name in ("labeling", "base", "sft", "discriminator", "ppo")},
        "seed": options.seed,
    }
    show(results)
    write_json(run / "results.json", results)
    print(f"{run / 'results.json'}; people's corrections token by token: {run / 'audit' / 'audit.html'}")


def show(results: dict) -> None:
    """The report on the terminal."""
    people, judge, ppo = results["agreement_with_people"], results["discriminator"], results["ppo"]
    held_out = results["prompts"]["held_out"]
    table = Table(title="TLCR on people's corrections", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row(f"labels against people's error spans, {people['responses']} answers")
    table.add_row("  precision of the negative tokens", f"{people['precision']:.3f}")
    table.add_row("  recall", f"{people['recall']:.3f}")
    table.add_row("  F1", f"{people['f1']:.3f}")
    table.add_section()
    table.add_row(f"discriminator, revisions of {held_out} held-out prompts")
    table.add_row("  accuracy on edited tokens", number(judge["edited_accuracy"], 3))
    table.add_row("  always the majority class", number(judge["majority_accuracy"], 3))
    table.add_row("  AUROC, positive against negative tokens", number(judge["auroc"], 3))
    for name in results["methods"]:
        row = results[name]
        table.add_section()
        table.add_row(f"{TITLES.get(name, name)}, {row['answers']} answers to those prompts")
        reward, error = row["reward_per_token"], row["reward_per_token_standard_error"]
        table.add_row("  reward per token, 2D - 1", f"{reward:+.3f} ± {error:.3f}")
        table.add_row("  response length, tokens", f"{row['response_length']:.1f}")
        table.add_row("  answers that end themselves", f"{row['eos_rate']:.2f}")
        table.add_row("  KL to SFT, nats per response", f"{row['kl']:.2f}")
    table.add_section()
    table.add_row("TLCR's PPO on the other prompts, by update", f"1 -> {ppo['updates']}")
    for key in SHOWN:
        table.add_row(f"  {key}", " -> ".join(f"{ppo[when][key]:.3f}" for when in ("first", "last")))
    Console().print(table)


TITLES = {"sft": "SFT", "tlcr": "TLCR"}
COMMANDS = {"prepare": prepare, "report": report}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    run_command(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    main()
