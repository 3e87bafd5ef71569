"""Step 2, the reward: a token discriminator (paper 4.2), or a sequence reward model for the baselines.

deepspeed step2_discriminator/main.py --model_name_or_path MODEL --revisions revisions.jsonl --output_dir OUTPUT
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.arguments import PackingOptions, RunOptions, TrainOptions, announce, option, parse
from deepspeed_chat_tlcr.checkpoints import is_finished
from deepspeed_chat_tlcr.data.preferences import load_part
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.hub import finish, require_repository
from deepspeed_chat_tlcr.metrics import token_metrics
from deepspeed_chat_tlcr.models import fit_vocabulary, freeze_head_bias, label_count, load_token_classifier
from deepspeed_chat_tlcr.packing import classify_packed, tokens_at_once
from deepspeed_chat_tlcr.records import Revision
from deepspeed_chat_tlcr.saving import require_writable
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer, tokenize_response, truncate
from deepspeed_chat_tlcr.training import (
    StageTrainer,
    evaluate_only,
    pad_examples,
    prepare_model,
    require_batch,
    run,
    stage_config,
    training_arguments,
)
from deepspeed_chat_tlcr.turns import end_ids
from labeling.token_labels import label_revisions
from step2_discriminator.objectives import diverging_pair_loss, end_scores, pair_loss, positive_logit, token_loss
from step2_discriminator.revisions import RevisionOptions, load_revisions

Pair = tuple[TokenizedExample, TokenizedExample]
"""(better, worse): modified and rejected, or chosen and rejected."""

NOT_COUNTED = -100.0


@dataclass(frozen=True, kw_only=True)
class ForkOptions:
    """flags of the RLHF-TLCR fork's step 2"""

    discriminate_reward: bool = option(False, "the fork's spelling of --objective token", compatibility=True)
    uni_discriminator_head: bool = option(False, "one head", "the discriminator has one head, as with this flag")
    holistic_reward: bool = option(
        False, "a sequence reward too", "train it by itself and sum both in step 3: --reward tlcr:PATH sequence:PATH"
    )
    token_level_reward: bool = option(False, "sums of token scores", "the fork's trial, not in the paper")
    reward_aggregate_top_k: float = option(
        1.0, "share of tokens in them", "the fork's trial, not in the paper", least=-1e9
    )
    bidirectional_reward: bool = option(False, "no causal mask on top", "the fork's trial, not in the paper")
    bidirectional_layer_num: int = option(1, "layers of it", "the fork's trial, not in the paper", least=0)
    custom_template: bool = option(False, "data with a template", "masks come from lengths, whatever the template")


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, PackingOptions, RevisionOptions, RunOptions, ForkOptions):
    """Step 2: the token discriminator (--objective token), or a sequence reward model (--objective sequence)."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"learning_rate": 5e-5}

    objective: Literal["auto", "token", "sequence"] = option(
        "auto",
        "token: D per token (Eq. 6); sequence: Bradley-Terry; auto: token with --revisions or --discriminate_reward, "
        "else sequence, which is what DeepSpeed-Chat's command line means",
    )
    neutral_weight: float = option(1.0, "weight of unedited tokens in the token loss")
    pairs: Literal["preferences", "modified"] = option(
        "preferences", "pairs of the sequence objective: chosen or modified (PPO_synthetic) over rejected"
    )
    score_positions: Literal["end", "all"] = option(
        "end", "sequence loss at the last token, or averaged from the first difference on as DeepSpeed-Chat does"
    )
    eval_interval: int = option(0, "optimiser steps between evaluations; 0: at the end of each epoch")
    eval_iters: int = option(100, "batches per evaluation when --eval_interval is set")
    do_eval: bool = option(False, "evaluate --model_name_or_path on the held-out data and train nothing")
    num_padding_at_beginning: int = option(
        1, "OPT's padding", "masks come from lengths, padding is never counted", least=0
    )

    @property
    def token_level(self) -> bool:
        """Whether the objective is the token discriminator's."""
        if self.objective == "auto":
            return self.discriminate_reward or (bool(self.revisions) and self.pairs == "preferences")
        return self.objective == "token"


def parse_args(argv: Sequence[str] | None = None) -> Options:
    return parse(Options, argv)


def token_pairs(
    revisions: Iterable[Revision], tokenizer, max_length: int, what: str, soft: bool = True
) -> tuple[list[Pair], str]:
    """Labelled (modified, rejected) pairs, and one sentence on what was dropped, cut or unedited.

    Several revisions of one rejected response (labeling's ``--n``) label it together, softly; each by itself, hard,
    where ``soft`` is false.
    """
    pairs: list[Pair] = []
    dropped = identical = cut = 0
    samples: dict[str | int, list[Revision]] = {}
    for number, revision in enumerate(revisions):
        samples.setdefault(revision.id if soft else number, []).append(revision)
        identical += revision.modified == revision.rejected
    for group in samples.values():
        rejected, modified = label_revisions(tokenizer, group, max_length)
        kept = [(side, rejected) for side in modified if side is not None and rejected is not None]
        dropped += len(group) - len(kept)
        cut += sum(side.input_ids[-1] not in end_ids(tokenizer) for pair in kept for side in pair)
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


def preference_pairs(options, tokenizer, split: str) -> tuple[list[Pair], str]:
    """The reward part's (chosen, rejected) pairs, by any stage's data options, and one sentence on them."""
    preferences = load_part(options, "reward", split, tokenizer)
    texts = ((p.prompt, p.chosen, p.rejected) for p in preferences)
    return text_pairs(texts, tokenizer, options.max_seq_len, split)


def sequence_pairs(options: Options, tokenizer, split: str, revisions: dict[str, list[Revision]] | None):
    if revisions is None:
        return preference_pairs(options, tokenizer, split)
    texts = ((r.prompt, r.modified, r.rejected) for r in revisions[split])
    return text_pairs(texts, tokenizer, options.max_seq_len, split)


class ClassifierTrainer(StageTrainer):
    """Trains on pairs, whose rows alternate better, worse."""

    def logits(self, model, inputs: dict[str, torch.Tensor], pairs: bool) -> torch.Tensor:
        """``(B, T, K)``, without padding where ``--tokens_per_micro_batch`` says so: then of responses alone."""
        if self.tokens_at_once:
            return classify_packed(model, inputs, self.tokens_at_once, pairs)
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


class DiscriminatorTrainer(ClassifierTrainer):
    """Eq. 6 on (modified, rejected) pairs. The chosen response is not forwarded: it has no loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = self.logits(model, inputs, pairs=model.training)  # held-out responses come one by one
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


class RewardModelTrainer(ClassifierTrainer):
    """Bradley-Terry on pairs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        values = self.logits(model, inputs, pairs=True).squeeze(-1)
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


def require_meaning(options: Options) -> None:
    """Raise ``InputError`` for options of one objective given with the other, which would not be looked at."""
    if options.do_eval and options.push_to_hub:
        raise InputError("--push_to_hub: --do_eval saves no model that could be uploaded; leave one of them out")
    if options.score_positions == "all" and options.tokens_per_micro_batch:
        raise InputError(
            "--score_positions all: averages over padding too, as DeepSpeed-Chat does, and --tokens_per_micro_batch "
            "leaves none; keep one of them"
        )
    if options.token_level:
        if options.pairs != "preferences" or options.score_positions != "end":
            raise InputError("--pairs and --score_positions are the sequence objective's; give --objective sequence")
        return
    if options.pairs == "preferences" and (options.revisions or options.eval_revisions):
        raise InputError(
            "--revisions: --objective sequence learns from chosen and rejected responses; --pairs modified makes it "
            "learn from revisions (PPO_synthetic), --objective token is the discriminator"
        )
    if options.neutral_weight != 1.0:
        raise InputError("--neutral_weight is the token objective's; the sequence objective has no tokens to weigh")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    require_writable(options.output_dir)
    require_repository(options)
    token_level = options.token_level
    if token_level and options.save_format == "deepspeed_chat":
        raise InputError("--save_format deepspeed_chat: DeepSpeed-Chat has no token discriminators")
    require_meaning(options)
    objective = "token" if token_level else "sequence"
    tokenizer = load_tokenizer(options.model_name_or_path, options.new_eos)
    revisions = load_revisions(options, tokenizer) if token_level or options.pairs == "modified" else None
    runtime = runtimes.start(options.precision, options.seed)
    if is_finished(options, runtime):
        finish(options, runtime)
        return
    if runtime.is_main:
        announce(options, options.output_dir)
    config = stage_config(options, runtime)

    pairs: dict[str, list[Pair]] = {}
    for split in ("train", "eval"):
        if token_level:
            pairs[split], summary = token_pairs(revisions[split], tokenizer, options.max_seq_len, split)
        else:
            pairs[split], summary = sequence_pairs(options, tokenizer, split, revisions)
        runtime.say(summary)
    require_batch(options, runtime, len(pairs["train"]))

    labels = 2 if token_level else 1
    new_head = not options.do_eval and label_count(options.model_name_or_path) != labels
    model = load_token_classifier(
        options.model_name_or_path,
        labels,
        runtime.torch_dtype,
        config,
        options.dropout_rate,
        new_head=new_head,
        # D = 0.5 everywhere at first. A random head on a real backbone, whose last states have outliers, calls every
        # token positive, and the first steps are spent on coming back.
        zero_head=new_head,
        attention=options.attn_implementation,
    )
    fit_vocabulary(model, tokenizer)
    if options.save_format == "deepspeed_chat":
        freeze_head_bias(model)
    # Tokens are judged one sequence at a time; pairs must stay together to be compared.
    held_out = list(chain.from_iterable(pairs["eval"])) if token_level else pairs["eval"]
    # Without an optimiser DeepSpeed has nothing to do but to partition.
    partitioned = config["zero_optimization"]["stage"] == 3
    arguments = training_arguments(options, runtime, config if partitioned or not options.do_eval else None)
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
        tokens_at_once=tokens_at_once(model, options.tokens_per_micro_batch, options.max_seq_len, runtime.say),
    )
    facts = {"stage": f"step2_{objective}", "train_pairs": len(pairs["train"])}
    results = evaluate_only(trainer, facts) if options.do_eval else run(trainer, tokenizer, facts)
    if results:
        measure = "edited_accuracy" if token_level else "pair_accuracy"
        runtime.say(f"{objective} reward: held-out {measure} {results[f'eval/{measure}']:.4f}")
    finish(options, runtime)


if __name__ == "__main__":
    main()
    runtimes.leave()
