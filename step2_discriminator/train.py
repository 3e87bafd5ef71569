"""Step 2, the reward: a token discriminator (paper 4.2), or a sequence reward model for the baselines."""

from itertools import chain
from typing import Any

import numpy as np
import torch

from deepspeed_chat_tlcr.metrics import token_metrics
from deepspeed_chat_tlcr.models import (
    TOKEN_AGGREGATE,
    fit_vocabulary,
    freeze_head_bias,
    label_count,
    load_token_classifier,
    squash,
)
from deepspeed_chat_tlcr.packing import classify_packed, tokens_at_once
from deepspeed_chat_tlcr.pictures.page import number
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from deepspeed_chat_tlcr.training import (
    StageTrainer,
    evaluate_only,
    prepare_model,
    require_batch,
    run,
    stage_config,
    training_arguments,
)
from step2_discriminator.examples import collate, marked_examples, preference_pairs, text_pairs, token_pairs
from step2_discriminator.objectives import (
    aggregate,
    diverging_pair_loss,
    end_scores,
    pair_loss,
    positive_logit,
    token_loss,
)
from step2_discriminator.options import Options
from step2_discriminator.revisions import load_marked, load_revisions

NOT_COUNTED = -100.0


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
        # Held-out responses come one by one, and those whose spans are marked always.
        logits = self.logits(model, inputs, pairs=model.training and not self.stage.spans)
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
        scores = self.scores(values, inputs)
        if self.stage.score_positions == "end":
            loss = pair_loss(scores[::2], scores[1::2])
        else:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            loss = diverging_pair_loss(values[::2], values[1::2], ids[::2], ids[1::2], mask[::2], mask[1::2])
        return (loss, scores) if return_outputs else loss

    def scores(self, values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Each response's score, from the model's values: ``(B, T)`` to ``(B,)``."""
        return end_scores(values, inputs["response_mask"])

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


class TokenRewardTrainer(RewardModelTrainer):
    """Preference-grounded guidance (Yang et al., 2023): Bradley-Terry on what token rewards sum up to."""

    def scores(self, values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = inputs["response_mask"]
        lengths = mask.sum(1).float().view(-1, 2).mean(1).repeat_interleave(2)  # of each pair's two responses
        return aggregate(squash(values), mask, self.stage.aggregate, lengths)


TRAINERS = {"token": DiscriminatorTrainer, "sequence": RewardModelTrainer, "token_pairs": TokenRewardTrainer}


def train(options: Options, runtime: Runtime) -> None:
    """Step 2 on every rank: read, label, train, save."""
    token_level = options.token_level
    objective = "token" if token_level else options.objective.replace("auto", "sequence")
    tokenizer = load_tokenizer(options.model_name_or_path, options.new_eos)
    revisions, marked = None, load_marked(options, tokenizer) if options.spans else None
    if not marked and (token_level or options.pairs == "modified"):
        revisions = load_revisions(options, tokenizer)
    config = stage_config(options, runtime)

    pairs: dict[str, list[Any]] = {}  # or single responses, of --spans
    for split in ("train", "eval"):
        if marked:
            pairs[split], summary = marked_examples(marked[split], tokenizer, options.max_seq_len, split)
        elif token_level:
            pairs[split], summary = token_pairs(revisions[split], tokenizer, options.max_seq_len, split)
        elif revisions is None:
            pairs[split], summary = preference_pairs(options, tokenizer, split)
        else:
            texts = ((r.prompt, r.modified, r.rejected) for r in revisions[split])
            pairs[split], summary = text_pairs(texts, tokenizer, options.max_seq_len, split)
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
        # So that D = 0.5 everywhere at first. On a real backbone, whose last states have outliers, a random head calls
        # every token positive, and the first steps only undo that.
        zero_head=new_head,
        attention=options.attn_implementation,
    )
    fit_vocabulary(model, tokenizer)
    if objective == "token_pairs":
        setattr(model.config, TOKEN_AGGREGATE, options.aggregate)
    elif hasattr(model.config, TOKEN_AGGREGATE):  # it begins with such a model and becomes another
        delattr(model.config, TOKEN_AGGREGATE)
    if options.save_format == "deepspeed_chat":
        freeze_head_bias(model)
    # Tokens are judged one sequence at a time; pairs must stay together to be compared.
    held_out = list(chain.from_iterable(pairs["eval"])) if token_level and not marked else pairs["eval"]
    # Without an optimiser DeepSpeed is needed only to partition.
    partitioned = config["zero_optimization"]["stage"] == 3
    arguments = training_arguments(options, runtime, config if partitioned or not options.do_eval else None)
    if options.eval_interval > 0:
        arguments.eval_strategy, arguments.eval_steps = "steps", options.eval_interval
        held_out = held_out[: options.eval_iters * options.per_device_eval_batch_size * runtime.world_size]
    trainer_class: Any = TRAINERS[objective]
    trainer = trainer_class(
        prepare_model(model, options),
        arguments,
        data_collator=collate(tokenizer),
        train_dataset=pairs["train"],
        eval_dataset=held_out,
        compute_metrics=trainer_class.measures,
        stage=options,
        train_lengths=[
            max(len(example.input_ids) for example in (pair if isinstance(pair, tuple) else (pair,)))
            for pair in pairs["train"]
        ],
        tokens_at_once=tokens_at_once(model, options.tokens_per_micro_batch, options.max_seq_len, runtime.say),
    )
    facts = {"stage": f"step2_{objective}", "train_responses" if marked else "train_pairs": len(pairs["train"])}
    results = evaluate_only(trainer, facts) if options.do_eval else run(trainer, tokenizer, facts)
    if results and token_level:
        accuracy, majority, auroc = (
            number(results[f"eval/{key}"], 4) for key in ("edited_accuracy", "majority_accuracy", "auroc")
        )
        runtime.say(
            f"discriminator: on held-out edited tokens accuracy {accuracy} (always the majority class: {majority}), "
            f"AUROC {auroc}"
        )
    elif results:
        runtime.say(f"reward model: held-out pair accuracy {results['eval/pair_accuracy']:.4f}")
