"""Shared by all stages that train one model: transformers' Trainer on DeepSpeed, with DeepSpeed-Chat's flags."""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from deepspeed_chat_tlcr.arguments import TrainOptions, record
from deepspeed_chat_tlcr.checkpoints import (
    OTHER_DATA,
    SETTINGS,
    changes_since,
    clear_half_checkpoints,
    delete_checkpoint,
    fingerprint,
    newest_checkpoint,
    own_checkpoints,
    same_command,
    step_of,
)
from deepspeed_chat_tlcr.deepspeed_config import build_config
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.faults import FaultTolerant, SaveAfterEvaluation, StopOnRequest
from deepspeed_chat_tlcr.metrics import MetricsLog
from deepspeed_chat_tlcr.model_card import Card
from deepspeed_chat_tlcr.models import require_attention, require_positions
from deepspeed_chat_tlcr.optim import Rates, add_lora, make_optimizer
from deepspeed_chat_tlcr.records import read_json
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.saving import save_model, write_json
from deepspeed_chat_tlcr.tokenization import TokenizedExample


def pad_examples(examples: Sequence[TokenizedExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad to the longest, on the right.

    Returns ``input_ids``, ``attention_mask`` and ``response_mask``, each ``(B, T)``; masks come from lengths, not from
    the pad id. With targets also ``targets`` ``(B, T)``, 0.5 where nothing counts.
    """
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "response_mask": torch.zeros(shape, dtype=torch.long),
    }
    if examples[0].targets is not None:
        batch["targets"] = torch.full(shape, 0.5)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        batch["input_ids"][row, :end] = torch.tensor(example.input_ids)
        batch["attention_mask"][row, :end] = 1
        batch["response_mask"][row, example.response_start : end] = 1
        if example.targets is not None:
            batch["targets"][row, example.response_start : end] = torch.tensor(example.targets)
    return batch


class LengthGroupedSampler(Sampler[int]):
    """A seeded shuffle in which neighbours have similar lengths, so that batches need little padding.

    ``global_batch_size`` counts all ranks and accumulated micro-batches, so that one rank and two train on the same
    batches.
    """

    def __init__(self, lengths: Sequence[int], global_batch_size: int, seed: int):
        self.lengths, self.global_batch_size, self.seed, self.epoch = lengths, global_batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = 50 * self.global_batch_size
        batches = []
        for begin in range(0, len(order), pool):
            pooled = sorted(order[begin : begin + pool], key=lambda index: -self.lengths[index])
            batches += [pooled[i : i + self.global_batch_size] for i in range(0, len(pooled), self.global_batch_size)]
        # An incomplete batch stays last, where a data loader expects it.
        last = batches.pop() if batches and len(batches[-1]) < self.global_batch_size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return iter([index for batch in shuffled for index in batches[batch]] + last)


class _Epochs(TrainerCallback):
    """Tells the sampler each epoch's number.

    Accelerate does so through at most two wrappers, and on several ranks a resumed epoch has three: it would get the
    order of another epoch.
    """

    def __init__(self, sampler: LengthGroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class StageMixin(FaultTolerant):
    """This library's optimiser, length-grouped batches and checkpoints for transformers' Trainer and its kind."""

    def __init__(
        self, *args: Any, stage: TrainOptions, train_lengths: Sequence[int], tokens_at_once: int = 0, **kwargs: Any
    ):
        self.stage, self.train_lengths, self.tokens_at_once = stage, train_lengths, tokens_at_once
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            stage = self.stage
            rates = (stage.learning_rate, stage.weight_decay, stage.lora_learning_rate)
            self.optimizer = make_optimizer(self.model, *rates, stage.offload)
        return self.optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LRScheduler:
        schedule: Any = super().create_scheduler(*args, **kwargs)
        self.rates = Rates(self.optimizer, schedule)
        return schedule

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Part of resuming, after the engine's own states."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate may have wrapped it
            self.rates.restore(self.model_wrapped.optimizer, schedule)  # type: ignore[arg-type]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        args = self.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        sampler = LengthGroupedSampler(self.train_lengths, batch, args.seed)
        self.add_callback(_Epochs(sampler))
        return sampler


class StageTrainer(StageMixin, Trainer):
    """The trainer of SFT, step 2 and FIGA."""


class _Log(TrainerCallback):
    """Writes every logged dict to metrics.jsonl as ``train/…`` and ``eval/…``."""

    def __init__(self, log: MetricsLog):
        self.log = log

    def on_train_end(self, args, state, control, **kwargs):
        self.log.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        metrics = {}
        for key, value in logs.items():
            if key != "epoch" and isinstance(value, (int, float)):
                metrics[f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"] = value
        self.log.write(state.global_step, metrics)


class _Bar(ProgressCallback):
    """A progress bar with the newest loss. Evaluations print a line, with --print_loss every step does."""

    def __init__(self, print_loss: bool):
        super().__init__()
        self.print_loss = print_loss

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}")
            if self.print_loss:
                self.training_bar.write(f"epoch {logs['epoch']:.2f}, step {state.global_step}: loss {logs['loss']:.6g}")
        measured = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        if measured:
            left_out = ("runtime", "samples_per", "steps_per", "num_tokens", "logits/", "logps/")
            shown = [f"{key} {value:.4g}" for key, value in measured.items() if not key.startswith(left_out)]
            self.training_bar.write(f"epoch {logs['epoch']:.2g}: " + "  ".join(shown))


def stage_config(options: TrainOptions, runtime: Runtime) -> dict[str, Any]:
    """The DeepSpeed config of a stage that trains one model.

    Raises ``InputError``, before anything loads, for missing attention kernels or too few positions.
    """
    require_attention(options.attn_implementation, runtime.dtype)
    require_positions(options.model_name_or_path, options.max_seq_len, "--max_seq_len")
    return build_config(
        dtype=runtime.dtype,
        zero_stage=options.zero_stage,
        micro_batch_size=options.per_device_train_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        world_size=runtime.world_size,
        offload=options.offload,
        max_grad_norm=options.max_grad_norm,
        overrides=options.deepspeed_config,
    )


def require_batch(options: TrainOptions, runtime: Runtime, examples: int) -> None:
    """Raise ``InputError`` for too few examples to make one optimiser step."""
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * runtime.world_size
    if examples < batch:
        raise InputError(
            f"{examples} training examples do not fill one batch of {batch} (--per_device_train_batch_size "
            f"{options.per_device_train_batch_size} x --gradient_accumulation_steps "
            f"{options.gradient_accumulation_steps} x {runtime.world_size} rank(s)); lower one of them"
        )
    warn_of_warmup(options, runtime, math.ceil(examples / batch) * options.num_train_epochs)


def warn_of_warmup(options: Any, runtime: Runtime, steps: int) -> None:
    """Say, before a model is loaded, that the learning rate will not reach its peak in so many optimiser steps."""
    if options.num_warmup_steps >= steps and options.lr_scheduler_type != "constant":
        runtime.say(
            f"warning: --num_warmup_steps {options.num_warmup_steps}: this run has {steps} optimiser steps, so the "
            "learning rate never reaches its peak"
        )


def training_arguments(
    options: TrainOptions,
    runtime: Runtime,
    config: dict[str, Any] | None,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> TrainingArguments:
    """transformers' arguments from this project's flags. ``config``: DeepSpeed's; None to evaluate without it.

    ``kind``: a subclass of transformers' class; ``more``: its further arguments.
    """
    by_step = options.save_interval > 0
    return kind(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_train_epochs=options.num_train_epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.num_warmup_steps,
        max_grad_norm=options.max_grad_norm,
        bf16=runtime.dtype == "bf16",
        fp16=runtime.dtype == "fp16",
        deepspeed=config,
        use_cpu=get_accelerator().device_name() == "cpu",
        seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",  # MetricsLog tells the trackers, under the names of metrics.jsonl
        eval_strategy="epoch",
        save_strategy="steps" if by_step else "epoch",
        save_steps=options.save_interval if by_step else 500,
        save_total_limit=options.save_total_limit,
        remove_unused_columns=False,
        dataloader_pin_memory=runtime.device.type != "cpu",
        **more,
    )


def prepare_model(model: PreTrainedModel, options: TrainOptions) -> PreTrainedModel:
    """Set up gradient checkpointing and LoRA."""
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if options.lora_dim > 0:
        add_lora(model, options.lora_dim, options.lora_alpha, options.lora_module_name, options.only_optimize_lora)
    elif options.only_optimize_lora:
        raise InputError("--only_optimize_lora: there is no LoRA to optimise; give --lora_dim")
    return model


def evaluate_only(trainer: StageTrainer, results: dict[str, Any]) -> dict[str, Any]:
    """Measure the model on the held-out data and write ``results.json``; nothing is trained or saved."""
    trainer.remove_callback(PrinterCallback)
    results = results | _measures(trainer.evaluate())
    if trainer.is_world_process_zero():
        record(trainer.stage, trainer.stage.output_dir)
        write_json(Path(trainer.stage.output_dir) / "results.json", results)
    torch.distributed.barrier()
    return results


def _measures(logged: dict[str, float]) -> dict[str, float]:
    """The Trainer's evaluation as in results.json: ``eval/…``."""
    return {key.replace("eval_", "eval/", 1): value for key, value in logged.items() if key.startswith("eval_")}


def _checkpoint_to_resume(trainer: StageTrainer) -> tuple[str | None, int]:
    """Folder and step of the newest complete checkpoint. Prints which settings have changed since. A collective."""
    folder, main = Path(trainer.stage.output_dir), trainer.is_world_process_zero()
    if main:
        clear_half_checkpoints(folder)
    torch.distributed.barrier()
    newest = newest_checkpoint(folder) if trainer.stage.resume == "auto" else None
    if newest is None:
        return None, 0
    saved = read_json(newest / SETTINGS)
    changes = changes_since(saved, trainer.stage, trainer.args.world_size, newest)
    if main:
        print(f"continuing from {newest}", flush=True)
        for change in changes:
            print(f"warning: continuing with another setting than before: {change}", flush=True)
        if saved.get("data") not in (None, fingerprint(trainer.train_lengths)):
            print(OTHER_DATA, flush=True)
    return str(newest), step_of(newest)


def run(
    trainer: StageTrainer, tokenizer: PreTrainedTokenizerFast, results: dict[str, Any], scratch: Sequence[Path] = ()
) -> dict[str, Any] | None:
    """Train (from the newest checkpoint if there is one), evaluate, save the model, then ``results.json`` last.

    Adds the final ``eval/…`` measures, seconds and steps to ``results``. Returns None if SIGTERM ended it early.
    ``scratch``: further folders of the stage that are deleted at the end, as the checkpoints are.
    """
    options = trainer.stage
    checkpoint, resume_step = _checkpoint_to_resume(trainer)
    stop = StopOnRequest()
    trainer.add_callback(SaveAfterEvaluation())
    trainer.add_callback(stop)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar(options.print_loss))
    if trainer.is_world_process_zero():
        record(options, options.output_dir)
        trackers = (options.tensorboard_folder, options.report_to, asdict(options))
        log = MetricsLog(options.output_dir, resume_step, *trackers)
        trainer.add_callback(_Log(log))
    started = time.monotonic()
    set_seed(options.seed + trainer.args.process_index)  # models are built; each rank has its own dropout
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped:
        if trainer.is_world_process_zero():
            at = f"after step {trainer.state.global_step} of {trainer.state.max_steps}"
            print(f"stopped {at}, all saved; resume with {same_command(options)}", flush=True)
        return None
    seconds = round(time.monotonic() - started, 1)
    measured = [measures for measures in map(_measures, trainer.state.log_history) if measures]
    results = {**results, "steps": trainer.state.global_step, "seconds": seconds, **measured[-1]}
    card = Card(results["stage"], options.model_name_or_path, options, results)
    save_model(trainer.model_wrapped, tokenizer, options.output_dir, card)
    if trainer.is_world_process_zero():
        write_json(Path(options.output_dir) / "results.json", results)
        for path in own_checkpoints(Path(options.output_dir)):
            delete_checkpoint(path)
        for path in map(Path, scratch):
            shutil.rmtree(path)
    torch.distributed.barrier()
    return results
