"""Step 2, the reward: a token discriminator (paper 4.2), or a sequence reward model for the baselines.

deepspeed step2_discriminator/main.py --model_name_or_path MODEL --revisions revisions.jsonl --output_dir OUTPUT
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.arguments import DataOptions, RunOptions, TrainOptions, announce, option, parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.metrics import token_metrics
from deepspeed_chat_tlcr.models import label_count, load_token_classifier
from deepspeed_chat_tlcr.preference_data import load_preferences
from deepspeed_chat_tlcr.records import Revision, read_revisions
from deepspeed_chat_tlcr.saving import require_writable
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer, tokenize_response, truncate
from deepspeed_chat_tlcr.training import (
    StageTrainer,
    pad_examples,
    prepare_model,
    require_batch,
    run,
    stage_config,
    training_arguments,
)
from labeling.token_labels import label_revisions
from step2_discriminator.objectives import diverging_pair_loss, end_scores, pair_loss, positive_logit, token_loss
from step2_discriminator.provenance import refuse_foreign_revisions

Pair = tuple[TokenizedExample, TokenizedExample]
"""(better, worse): modified and rejected, or chosen and rejected."""

NOT_COUNTED = -100.0


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, DataOptions, RunOptions):
    """Step 2: the token discriminator (--objective token), or a sequence reward model (--objective sequence)."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"learning_rate": 5e-5}

    objective: Literal["token", "sequence"] = option("token", "token: D per token (Eq. 6); sequence: Bradley-Terry")
    revisions: list[str] = option([], "revisions.jsonl files of labeling/main.py")
    eval_revisions: list[str] = option([], "held-out revisions; unset: --eval_share of the prompts is held out")
    eval_share: float = option(0.05, "share of prompts held out for evaluation, chosen by hash")
    neutral_weight: float = option(1.0, "weight of unedited tokens in the token loss")
    pairs: Literal["preferences", "modified"] = option(
        "preferences", "pairs of the sequence objective: chosen or modified (PPO_synthetic) over rejected"
    )
    score_positions: Literal["end", "all"] = option(
        "end", "sequence loss at the last token, or averaged from the first difference on as DeepSpeed-Chat does"
    )
    allow_foreign_revisions: bool = option(False, "accept revisions of prompts from the SFT or RL part of the data")
    eval_interval: int = option(0, "optimiser steps between evaluations; 0: at the end of each epoch")
    eval_iters: int = option(100, "batches per evaluation when --eval_interval is set")
    num_padding_at_beginning: int = option(1, "OPT's padding", "masks come from lengths, padding is never counted")


def parse_args(argv: Sequence[str] | None = None) -> Options:
    return parse(Options, argv)


def hold_out(revisions: list[Revision], share: float) -> tuple[list[Revision], list[Revision]]:
    """Split by prompt, so that no prompt is on both sides; which prompts depends on nothing but their text."""
    ranked = sorted({r.prompt for r in revisions}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    held = set(ranked[: max(1, round(share * len(ranked)))])
    train = [revision for revision in revisions if revision.prompt not in held]
    return train, [revision for revision in revisions if revision.prompt in held]


def load_revisions(options: Options) -> dict[str, list[Revision]]:
    """Revisions for ``train`` and ``eval``. Raises ``InputError`` for missing, empty or foreign ones."""
    if not options.revisions:
        raise InputError("--revisions is missing: give the revisions.jsonl that labeling/main.py wrote")
    train = list(chain.from_iterable(read_revisions(path) for path in options.revisions))
    if not train:
        raise InputError(f"--revisions {' '.join(options.revisions)}: no revisions in it; run labeling/main.py first")
    if not options.allow_foreign_revisions:
        refuse_foreign_revisions(train, options.data_path, options.data_split, options.data_seed)
    if options.eval_revisions:
        return {"train": train, "eval": list(chain.from_iterable(map(read_revisions, options.eval_revisions)))}
    if len({revision.prompt for revision in train}) < 2:
        raise InputError("--revisions: all have one prompt, so none can be held out; give --eval_revisions")
    train, held_out = hold_out(train, options.eval_share)
    return {"train": train, "eval": held_out}


def token_pairs(revisions: Iterable[Revision], tokenizer, max_length: int, what: str) -> tuple[list[Pair], str]:
    """Labelled (modified, rejected) pairs, and one sentence on what was dropped, cut or unedited."""
    pairs: list[Pair] = []
    dropped = identical = cut = 0
    # Several revisions of one rejected response (labeling's --n) label it together, softly.
    samples: dict[str, list[Revision]] = {}
    for revision in revisions:
        samples.setdefault(revision.id, []).append(revision)
        identical += revision.modified == revision.rejected
    for group in samples.values():
        rejected, modified = label_revisions(tokenizer, group, max_length)
        kept = [(side, rejected) for side in modified if side is not None and rejected is not None]
        dropped += len(group) - len(kept)
        cut += sum(side.input_ids[-1] != tokenizer.eos_token_id for pair in kept for side in pair)
        pairs += kept
    if not pairs:
        raise InputError(f"no {what} revision has a prompt shorter than --max_seq_len {max_length} tokens")
    return pairs, (
        f"{what}: {len(pairs)} revisions, {dropped} dropped (prompt too long), {cut} responses cut, "
        f"{identical} unedited (all neutral)"
    )


def text_pairs(texts: Iterable[tuple[str, str, str]], tokenizer, max_length: int, what: str) -> tuple[list[Pair], str]:
    """(prompt, better, worse) texts as pairs for the sequence objective."""
    pairs: list[Pair] = []
    dropped = cut = 0
    for prompt, *responses in texts:
        whole = [tokenize_response(tokenizer, prompt, response) for response in responses]
        better, worse = (truncate(example, max_length) for example in whole)
        if better is None or worse is None:
            dropped += 1
            continue
        cut += sum(len(example.input_ids) > max_length for example in whole)
        pairs.append((better, worse))
    if not pairs:
        raise InputError(f"no {what} prompt is shorter than --max_seq_len {max_length} tokens")
    return pairs, f"{what}: {len(pairs)} pairs, {dropped} dropped (prompt too long), {cut} responses cut"


def sequence_pairs(options: Options, tokenizer, split: str, revisions: dict[str, list[Revision]] | None):
    if revisions is not None:
        texts = ((r.prompt, r.modified, r.rejected) for r in revisions[split])
    else:
        preferences = load_preferences(
            options.data_path, "reward", split, options.data_split, options.data_seed, tokenizer=tokenizer
        )
        texts = ((p.prompt, p.chosen, p.rejected) for p in preferences)
    return text_pairs(texts, tokenizer, options.max_seq_len, split)


class DiscriminatorTrainer(StageTrainer):
    """Eq. 6 on (modified, rejected) pairs. The chosen response is not forwarded: it has no loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        loss = token_loss(logits, inputs["targets"], inputs["response_mask"], self.stage.neutral_weight)
        return (loss, logits) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        targets = inputs["targets"].masked_fill(inputs["response_mask"] == 0, NOT_COUNTED)
        return loss, positive_logit(logits).sigmoid(), targets

    @staticmethod
    def measures(predictions) -> dict[str, float]:
        counted = predictions.label_ids != NOT_COUNTED
        return token_metrics(predictions.predictions[counted], predictions.label_ids[counted])


class RewardModelTrainer(StageTrainer):
    """Bradley-Terry on pairs; rows alternate better, worse."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        values = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(-1)
        scores = end_scores(values, inputs["response_mask"])
        if self.stage.score_positions == "end":
            loss = pair_loss(scores[::2], scores[1::2])
        else:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            loss = diverging_pair_loss(values[::2], values[1::2], ids[::2], ids[1::2], mask[::2], mask[1::2])
        return (loss, scores) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, scores = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        pairs = scores.view(-1, 2)
        return loss, pairs, torch.ones(len(pairs), device=pairs.device)

    @staticmethod
    def measures(predictions) -> dict[str, float]:
        better, worse = predictions.predictions.T
        return {
            "pair_accuracy": float(np.mean(better > worse)),
            "margin": float(np.mean(better - worse)),
            "score_better": float(np.mean(better)),
            "score_worse": float(np.mean(worse)),
        }


def collate(tokenizer):
    """Batches of pairs (rows alternate better, worse) or of single examples."""

    def collated(items: list[Pair] | list[TokenizedExample]) -> dict[str, torch.Tensor]:
        examples = chain.from_iterable(items) if isinstance(items[0], tuple) else items
        return pad_examples(list(examples), tokenizer.pad_token_id)

    return collated


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    require_writable(options.output_dir)
    token_level = options.objective == "token"
    revisions = load_revisions(options) if token_level or options.pairs == "modified" else None
    runtime = runtimes.start(options.precision, options.seed)
    if runtime.is_main:
        announce(options, options.output_dir)
    config = stage_config(options, runtime)

    tokenizer = load_tokenizer(options.model_name_or_path, options.eot_token if options.add_eot_token else None)
    pairs: dict[str, list[Pair]] = {}
    for split in ("train", "eval"):
        if token_level:
            pairs[split], summary = token_pairs(revisions[split], tokenizer, options.max_seq_len, split)
        else:
            pairs[split], summary = sequence_pairs(options, tokenizer, split, revisions)
        runtime.say(summary)
    require_batch(options, runtime, len(pairs["train"]))

    labels = 2 if token_level else 1
    model = load_token_classifier(
        options.model_name_or_path,
        labels,
        runtime.torch_dtype,
        config,
        options.dropout,
        new_head=label_count(options.model_name_or_path) != labels,
    )
    if options.add_eot_token and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    # Tokens are judged one sequence at a time; pairs must stay together to be compared.
    held_out = list(chain.from_iterable(pairs["eval"])) if token_level else pairs["eval"]
    arguments = training_arguments(options, runtime, config)
    if options.eval_interval > 0:
        arguments.eval_strategy, arguments.eval_steps = "steps", options.eval_interval
        held_out = held_out[: options.eval_iters * options.per_device_eval_batch_size * runtime.world_size]
    trainer_class = DiscriminatorTrainer if token_level else RewardModelTrainer
    trainer = trainer_class(
        prepare_model(model, options),
        arguments,
        data_collator=collate(tokenizer),
        train_dataset=pairs["train"],
        eval_dataset=held_out,
        compute_metrics=trainer_class.measures,
        stage=options,
        train_lengths=[max(len(example.input_ids) for example in pair) for pair in pairs["train"]],
    )
    results = run(trainer, tokenizer, {"stage": f"step2_{options.objective}", "train_pairs": len(pairs["train"])})
    measure = "edited_accuracy" if token_level else "pair_accuracy"
    runtime.say(f"{options.objective} reward: held-out {measure} {results[f'eval/{measure}']:.4f}")
    runtime.finish()


if __name__ == "__main__":
    main()
    runtimes.leave()
