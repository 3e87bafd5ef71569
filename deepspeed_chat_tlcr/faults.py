"""Fault tolerance for transformers' Trainer: complete checkpoints, SIGTERM, losses that are not finite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import DeepSpeedEngine
from transformers import TrainerCallback, TrainerState, TrainingArguments

from deepspeed_chat_tlcr.checkpoints import (
    SETTINGS,
    UNFINISHED,
    begin_checkpoint,
    delete_checkpoint,
    fingerprint,
    newest_checkpoint,
    own_checkpoints,
)
from deepspeed_chat_tlcr.engine_checkpoints import lean_checkpoints
from deepspeed_chat_tlcr.errors import RunError
from deepspeed_chat_tlcr.finite import save_faulty_batch, watch_gradients, weights_are_finite
from deepspeed_chat_tlcr.runtime import Preemption
from deepspeed_chat_tlcr.saving import write_json, writing

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin for it


class FaultTolerant(_Trainer):
    """Atomic checkpoints, and updates from the micro-batches whose loss is finite."""

    faults_in_a_row = 0  # updates without one such micro-batch
    skipped_updates = 0
    left_out = 0  # micro-batches so far
    finite_batch: dict[str, Any] | None = None  # the newest one of the coming update
    stage: Any  # the stage's options
    train_lengths: Sequence[int]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch. If its loss is not finite on some rank, all ranks skip and count it.

        Raises ``RunError`` after ``--max_faults`` updates in a row without any finite loss, with the batch and a
        checkpoint saved.
        """
        self.loss_was_finite, self.only_steps = True, False
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.loss_was_finite:
            self.finite_batch = inputs
        else:
            self.left_out += 1
            loss = torch.zeros_like(loss)  # a NaN would stay in the Trainer's running sum
        if self.accelerator.sync_gradients:
            self._end_update(model, inputs, *args, **kwargs)
        return loss

    def _end_update(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """After an update's last micro-batch: apply the others' gradients if it was skipped itself."""
        finite, self.finite_batch = self.finite_batch, None
        if finite is None:
            self.faults_in_a_row += 1
            self.skipped_updates += 1
            if self.faults_in_a_row >= self.stage.max_faults:
                self._give_up(model, inputs)
            return
        self.faults_in_a_row = 0
        if not self.loss_was_finite:
            # An engine reduces and steps only in a backward pass, so run one with zero gradients.
            self.only_steps = True
            super().training_step(model, finite, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        backward, prepare = self.accelerator.backward, self.accelerator.prepare

        def prepare_and_watch(*parts: Any, **kwargs: Any) -> Any:
            prepared = prepare(*parts, **kwargs)
            for part in prepared if isinstance(prepared, tuple) else (prepared,):
                if isinstance(part, DeepSpeedEngine):
                    watch_gradients(part)
                    lean_checkpoints(part)
            return prepared

        def backward_of_finite(loss: torch.Tensor, **kwargs: Any) -> None:
            # Under DeepSpeed this is the backward pass and, at an accumulation boundary, the step.
            if self.only_steps:
                backward(0 * loss, **kwargs)
                return
            finite = torch.isfinite(loss.detach()).all().float()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)  # on every rank
            self.loss_was_finite = bool(finite)
            if self.loss_was_finite:
                backward(loss, **kwargs)

        self.accelerator.backward, self.accelerator.prepare = backward_of_finite, prepare_and_watch

    def _give_up(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> None:
        folder = Path(self.args.output_dir)
        batch = save_faulty_batch(folder, inputs)
        if weights_are_finite([model], self.args.device):
            self._save_checkpoint(model, trial=None)
        raise RunError(
            f"step {self.state.global_step}: {self.faults_in_a_row} updates in a row had no finite loss; the newest "
            f"batch is in {batch}, the newest checkpoint is {newest_checkpoint(folder) or 'none'}. Lower the learning "
            "rate, use bf16 or fp32, or look for what is wrong with this batch"
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Part of resuming: catch up on the evaluation if SIGTERM came between an epoch's last step and it."""
        super()._load_rng_state(checkpoint)
        history = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        if checkpoint and ends_epoch(self.args, self.state) and not any("eval_loss" in entry for entry in history):
            self.evaluate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log NaN, not 0, for a step that was skipped."""
        if "loss" in logs:
            logs["left_out"], logs["skipped_updates"] = self.left_out, self.skipped_updates
            if self.faults_in_a_row:
                logs["loss"] = logs["grad_norm"] = math.nan
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints hold the engine's state and need no model folder beside it."""
        if not _internal_call:
            super().save_model(output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint, mark it complete, and only then delete older ones."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(f"the checkpoint {folder}", lambda: newest_checkpoint(folder.parent)):
                if self.is_world_process_zero():
                    begin_checkpoint(folder)
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        torch.distributed.barrier()
        if self.is_world_process_zero():
            state = {"world_size": self.args.world_size, "options": asdict(self.stage)}
            write_json(folder / SETTINGS, {**state, "data": fingerprint(self.train_lengths)})
            (folder / UNFINISHED).unlink()
            for old in own_checkpoints(folder.parent)[:-keep]:
                delete_checkpoint(old)
        torch.distributed.barrier()


def ends_epoch(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether an evaluation follows this step because it is its epoch's last."""
    return args.eval_strategy == "epoch" and bool(state.epoch) and state.epoch == int(state.epoch)


class SaveAfterEvaluation(TrainerCallback):
    """Delays the checkpoint of an epoch's last step until after the epoch's evaluation.

    Otherwise a resumed run would lack that measurement and have other random numbers than an uninterrupted one. Add it
    before ``StopOnRequest``, whose checkpoint does not wait.
    """

    def __init__(self):
        self.waiting = False

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and ends_epoch(args, state):
            self.waiting, control.should_save = True, False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.waiting:
            self.waiting, control.should_save = False, True


class StopOnRequest(TrainerCallback):
    """On SIGTERM, save after the running step and end. ``stopped``: whether that has happened."""

    def __init__(self):
        self.preemption = Preemption()
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.preemption.agreed(args.device) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # all is saved, and an evaluation could outlast the time that is left
            control.should_evaluate = control.should_save = False
