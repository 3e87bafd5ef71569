"""Useful tokens per second of step 2's training: batches as here, against those of the released recipe.

    python benchmarks/step2.py --model_name_or_path MODEL --data_path HH.jsonl.gz --per_device_train_batch_size 4

The released recipe forwards chosen, rejected and modified response of each example, every one padded to 512 tokens;
the chosen one has no loss. Here the two that have one are padded to the longest of a batch that is formed by length.
Same model, same examples in a batch, same trainer on DeepSpeed. A token is useful if it is not padding and its
sequence has a loss; with --tokens_per_micro_batch, which computes shared prompts once, there may be more useful
tokens than computed ones. Without --revisions, each rejected response of the data with one word more stands for its
revision: the time depends on lengths alone. Takes step2_discriminator/main.py's options; prints one JSON object.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch.utils.data import RandomSampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.data.preferences import load_preferences
from deepspeed_chat_tlcr.models import load_token_classifier
from deepspeed_chat_tlcr.packing import tokens_at_once
from deepspeed_chat_tlcr.records import Revision
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer, tokenize_response, truncate
from deepspeed_chat_tlcr.training import pad_examples, prepare_model, stage_config, training_arguments
from step2_discriminator.examples import collate, token_pairs
from step2_discriminator.options import Options, parse_args
from step2_discriminator.revisions import load_revisions
from step2_discriminator.train import DiscriminatorTrainer

RELEASED_LENGTH = 512


class ReleasedTrainer(DiscriminatorTrainer):
    """The same loss on batches that are shuffled, not formed by length."""

    def _get_train_sampler(self, train_dataset=None):
        return RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(self.args.seed))


class Clock(TrainerCallback):
    """Time, and tokens that the model has computed so far, at the end of every optimiser step."""

    def __init__(self, model: torch.nn.Module):
        self.ends: list[float] = []
        self.computed: list[int] = []
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs):
        self.tokens += kwargs["input_ids"].numel()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())
        self.computed.append(self.tokens)


def released_collate(tokenizer):
    """Triples (modified, rejected, chosen) as 3 x B rows of 512; the chosen rows have no token that counts."""

    def collated(triples: list[tuple[TokenizedExample, ...]]) -> dict[str, torch.Tensor]:
        filler = [TokenizedExample([tokenizer.pad_token_id] * RELEASED_LENGTH, 0, [0.5] * RELEASED_LENGTH)]
        examples = list(chain.from_iterable(triples))
        batch = pad_examples(examples + filler, tokenizer.pad_token_id)
        batch = {name: tensor[:-1] for name, tensor in batch.items()}
        batch["response_mask"][2::3] = 0
        return batch

    return collated


def counting(collator, log: list[int], with_loss: int, sequences: int):
    """A collator that notes how many useful tokens each batch has."""

    def collated(items):
        batch = collator(items)
        mask = batch["attention_mask"].view(-1, sequences, batch["attention_mask"].size(1))[:, :with_loss]
        log.append(int(mask.sum()))
        return batch

    return collated


def load_examples(options: Options, tokenizer) -> list[tuple[TokenizedExample, ...]]:
    """(modified, rejected, chosen) as tokens, each at most ``--max_seq_len``."""
    if options.revisions:
        revisions = load_revisions(options, tokenizer)["train"]
    else:
        pairs = load_preferences(
            options.data_path, "reward", "train", options.data_split, options.data_seed, tokenizer=tokenizer
        )
        revisions = [Revision(p.id, p.prompt, p.chosen, p.rejected, p.rejected + " indeed", "", "", {}) for p in pairs]
    triples = []
    for revision in revisions:
        whole = tokenize_response(tokenizer, revision.prompt, revision.chosen)
        chosen = truncate(replace(whole, targets=[0.5] * len(whole.response_ids)), options.max_seq_len)
        if chosen is not None:
            (pair,), _ = token_pairs([revision], tokenizer, options.max_seq_len, "train")
            triples.append((*pair, chosen))
    return triples


def measure(options: Options, way: str, triples: list, tokenizer, runtime, warmup: int, steps: int) -> dict[str, float]:
    """Train ``warmup + steps`` optimiser steps one way; the numbers are those of the last ``steps``."""
    config = stage_config(options, runtime)
    model = load_token_classifier(options.model_name_or_path, 2, runtime.torch_dtype, config, new_head=True)
    arguments = training_arguments(options, runtime, config)
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.max_steps = warmup + steps
    released = way == "released"
    log: list[int] = []
    collator = released_collate(tokenizer) if released else collate(tokenizer)
    budget = 0 if released else options.tokens_per_micro_batch
    trainer = (ReleasedTrainer if released else DiscriminatorTrainer)(
        prepare_model(model, options),
        arguments,
        data_collator=counting(collator, log, with_loss=2, sequences=3 if released else 2),
        train_dataset=triples if released else [triple[:2] for triple in triples],
        stage=options,
        train_lengths=[max(len(example.input_ids) for example in triple[:2]) for triple in triples],
        tokens_at_once=tokens_at_once(model, budget, options.max_seq_len, runtime.say),
    )
    clock = Clock(model)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(clock)
    trainer.train()
    per_step = options.gradient_accumulation_steps
    useful = sum(log[warmup * per_step : (warmup + steps) * per_step])
    seconds, computed = (series[-1] - series[warmup - 1] for series in (clock.ends, clock.computed))
    return {
        "seconds_per_step": seconds / steps,
        "useful_tokens_per_second": useful * runtime.world_size / seconds,
        "useful_share_of_tokens": useful / computed,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured optimiser steps of each way")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts, at least 1")
    own, rest = parser.parse_known_args(argv)
    # Only the result goes to standard output.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = parse_args([*rest, "--output_dir", folder])
        runtime = runtimes.start(options.precision, options.seed)
        tokenizer = load_tokenizer(options.model_name_or_path)
        triples = load_examples(options, tokenizer)
        ways = {
            way: measure(options, way, triples, tokenizer, runtime, own.warmup, own.steps)
            for way in ("released", "by_length")
        }
    ratio = ways["by_length"]["useful_tokens_per_second"] / ways["released"]["useful_tokens_per_second"]
    if runtime.is_main:
        facts = {"device": str(runtime.device), "ranks": runtime.world_size, "dtype": runtime.dtype}
        facts |= {"examples": len(triples), "batch": options.per_device_train_batch_size, "steps": own.steps}
        rounded = {way: {key: round(value, 4) for key, value in row.items()} for way, row in ways.items()}
        print(json.dumps({**facts, **rounded, "ratio": round(ratio, 2)}, indent=1), flush=True)


if __name__ == "__main__":
    main()
    runtimes.leave()
