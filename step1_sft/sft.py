"""Step 1, supervised fine-tuning: the policy learns to answer like the chosen responses."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.data.preferences import load_part
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.models import fit_vocabulary, load_causal_lm
from deepspeed_chat_tlcr.packing import Pack, Row, forward_pack, packs_of, tokens_at_once
from deepspeed_chat_tlcr.records import Preference
from deepspeed_chat_tlcr.runtime import Runtime
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
from step1_sft.options import Options

IGNORED = -100
"""The label that transformers' language-model loss skips."""


def tokenize_chosen(
    preferences: Iterable[Preference], tokenizer, max_length: int, what: str
) -> tuple[list[TokenizedExample], str]:
    """Chosen responses as examples, and a summary of what was dropped or cut. Raises ``InputError`` if none fit."""
    whole = [tokenize_response(tokenizer, record.prompt, record.chosen) for record in preferences]
    kept = [example for example in (truncate(example, max_length) for example in whole) if example is not None]
    if not kept:
        raise InputError(f"no {what} prompt is shorter than --max_seq_len {max_length} tokens")
    cut = sum(len(example.input_ids) > max_length > example.response_start for example in whole)
    return kept, f"{what}: {len(kept)} responses, {len(whole) - len(kept)} dropped (prompt too long), {cut} cut"


def collate(tokenizer, loss_on_prompt: bool):
    """Batches of a causal language model: labels are the tokens that count, the rest is ignored."""

    def collated(examples: list[TokenizedExample]) -> dict[str, torch.Tensor]:
        batch = pad_examples(examples, tokenizer.pad_token_id)
        counted = batch["attention_mask" if loss_on_prompt else "response_mask"]
        labels = batch["input_ids"].masked_fill(counted == 0, IGNORED)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    return collated


class SftTrainer(StageTrainer):
    """The mean NLL of the counted tokens of all ranks and accumulated micro-batches."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.tokens_at_once:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = packed_nll(model, inputs, self.tokens_at_once)
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"][:, 1:] != IGNORED).sum()
        else:  # counted over all ranks, whose gradients are averaged
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def packed_nll(model, batch: dict[str, torch.Tensor], budget: int) -> torch.Tensor:
    """The summed NLL of a ``collate``d batch's labels, without padding and without logits of other positions."""
    ids, counted = batch["input_ids"], batch["labels"] != IGNORED
    ends = batch["attention_mask"].sum(1)
    starts = (ends - counted.sum(1)).clamp(min=1)  # nothing says what a first token should be
    spans = torch.stack([torch.zeros_like(ends), starts, ends], 1).tolist()

    def nll(pack: Pack) -> torch.Tensor:
        logits = forward_pack(model, pack, logits_to_keep=pack.chosen - 1, use_cache=False)[0]
        return F.cross_entropy(logits.float(), pack.input_ids[0, pack.chosen], reduction="sum")

    return torch.stack([nll(pack) for pack in packs_of(ids, [Row(*span) for span in spans], budget)]).sum()


def fine_tune(
    options: Any,
    runtime: Runtime,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    records: Mapping[str, Sequence[Preference]],
    stage: str,
    loss_on_prompt: bool = False,
) -> dict[str, Any] | None:
    """Train on the chosen responses of ``records["train"]``, measure on those of ``eval``, save; the results.

    ``options``: a stage's, with TrainOptions and PackingOptions; ``config``: DeepSpeed's, of ``training.stage_config``.
    None where the run was stopped.
    """
    examples = {}
    for split in ("train", "eval"):
        examples[split], summary = tokenize_chosen(records[split], tokenizer, options.max_seq_len, split)
        runtime.say(summary)
    require_batch(options, runtime, len(examples["train"]))

    model = load_causal_lm(
        options.model_name_or_path, runtime.torch_dtype, config, options.dropout_rate, options.attn_implementation
    )
    fit_vocabulary(model, tokenizer)
    trainer = SftTrainer(
        prepare_model(model, options),
        training_arguments(options, runtime, config),
        data_collator=collate(tokenizer, loss_on_prompt),
        train_dataset=examples["train"],
        eval_dataset=examples["eval"],
        stage=options,
        train_lengths=[len(example.input_ids) for example in examples["train"]],
        tokens_at_once=tokens_at_once(model, options.tokens_per_micro_batch, options.max_seq_len, runtime.say),
    )
    return run(trainer, tokenizer, {"stage": stage, "train_examples": len(examples["train"])})


def train(options: Options, runtime: Runtime) -> None:
    """Step 1 on every rank: read, tokenise, train, save."""
    config = stage_config(options, runtime)
    tokenizer = load_tokenizer(options.model_name_or_path, options.new_eos)
    records: dict[str, list[Preference]] = {}
    for split in ("train", "eval"):
        records[split] = list(load_part(options, "sft", split, tokenizer, require_rejected=False))
        if options.sft_only_data_path:
            chosen_only = replace(options, data_path=options.sft_only_data_path)
            records[split] += load_part(chosen_only, "all", split, tokenizer, require_rejected=False)
    results = fine_tune(options, runtime, config, tokenizer, records, "sft", options.loss_on_prompt)
    if results:
        runtime.say(f"SFT: held-out loss {results['eval/loss']:.4f}; saved in {options.output_dir}")
