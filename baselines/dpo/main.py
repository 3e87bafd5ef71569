"""DPO (Rafailov et al., 2023) on the reward part's preference pairs, by TRL's trainer with DeepSpeed-Chat's flags.

deepspeed baselines/dpo/main.py --model_name_or_path SFT --data_path DATA --output_dir OUTPUT
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from trl import DPOConfig, DPOTrainer

from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.arguments import DataOptions, RunOptions, TrainOptions, announce, option, parse
from deepspeed_chat_tlcr.checkpoints import is_finished
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.hub import finish, require_repository
from deepspeed_chat_tlcr.models import fit_vocabulary, load_causal_lm
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.saving import require_writable
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from deepspeed_chat_tlcr.training import StageMixin, prepare_model, require_batch, run, stage_config, training_arguments
from step2_discriminator.main import Pair, preference_pairs


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, DataOptions, RunOptions):
    """DPO: the policy learns from preference pairs without a reward model; start from the SFT model."""

    beta: float = option(0.1, "strength of the pull towards the reference, --model_name_or_path as it was")
    label_smoothing: float = option(
        0.0, "share of pairs taken to be labelled the wrong way round; below 0.5", below=0.5
    )
    offload_reference_model: bool = option(
        False,
        "compute the reference's log-probs once, before training, so that it takes no memory",
        better="not in host memory but nowhere, and its forward pass is paid once",
    )
    num_padding_at_beginning: int = option(1, "in DeepSpeed-Chat's sweep script", "masks come from lengths", least=0)


def parse_args(argv: Sequence[str] | None = None) -> Options:
    return parse(Options, argv)


def smoothed_loss(label_smoothing: float) -> dict:
    """TRL's arguments for -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), DeepSpeed-Chat's loss.

    TRL has the two parts of it: "sigmoid", s = -log sigmoid(beta d), which ignores e, and
    "robust" = ((1 - e) s + e log sigmoid(-beta d)) / (1 - 2e); the sum 2 (1 - e) s - (1 - 2e) robust is that loss.
    """
    if label_smoothing == 0:
        return {"loss_type": ["sigmoid"]}
    weights = [2 * (1 - label_smoothing), -(1 - 2 * label_smoothing)]
    return {"loss_type": ["sigmoid", "robust"], "loss_weights": weights, "label_smoothing": label_smoothing}


def rows(pairs: Iterable[Pair]) -> list[dict[str, list[int]]]:
    """(chosen, rejected) examples as TRL's tokenised records.

    A token that straddles prompt and response may differ between the two: the prompt ends where the shorter one does.
    """
    records = []
    for chosen, rejected in pairs:
        start = min(chosen.response_start, rejected.response_start)
        records.append(
            {
                "prompt_ids": chosen.input_ids[:start],
                "chosen_ids": chosen.input_ids[start:],
                "rejected_ids": rejected.input_ids[start:],
            }
        )
    return records


def on_disk(records: list[dict[str, list[int]]], folder: Path, runtime: Runtime) -> Dataset:
    """The records as a data set that every rank maps from one file: TRL keeps the reference's log-probs beside it."""
    if runtime.is_main:
        Dataset.from_list(records).save_to_disk(folder)
    torch.distributed.barrier()
    return load_from_disk(folder)


def dpo_arguments(options: Options, runtime: Runtime, config: dict | None) -> DPOConfig:
    """TRL's arguments from this stage's flags. Raises ``InputError`` for a label smoothing that is none."""
    return training_arguments(
        options,
        runtime,
        config,
        DPOConfig,
        beta=options.beta,
        max_length=options.max_seq_len,
        precompute_ref_log_probs=options.offload_reference_model,
        gradient_checkpointing=False,  # prepare_model does it
        disable_dropout=False,  # --dropout says it; the reference never drops out
        **smoothed_loss(options.label_smoothing),
    )


class PreferenceTrainer(StageMixin, DPOTrainer):
    """TRL's trainer on records that are tokenised already; it reports to nobody and writes no model card."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Part of resuming: TRL's count of tokens goes on too."""
        super()._load_rng_state(checkpoint)
        counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._total_train_tokens = int(counts[-1]) if checkpoint and counts else 0

    def create_model_card(self, *args, **kwargs) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    # TRL still calls by their old names what transformers 5 has renamed, several times an evaluation.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    options = parse_args(argv)
    require_writable(options.output_dir)
    require_repository(options)
    runtime = runtimes.start(options.precision, options.seed)
    if is_finished(options, runtime):
        finish(options, runtime)
        return
    if runtime.is_main:
        announce(options, options.output_dir)
    config = stage_config(options, runtime)
    arguments = dpo_arguments(options, runtime, config)

    tokenizer = load_tokenizer(options.model_name_or_path, options.new_eos)
    pairs, data = {}, {}
    for split in ("train", "eval"):
        pairs[split], summary = preference_pairs(options, tokenizer, split)
        data[split] = on_disk(rows(pairs[split]), Path(options.output_dir) / f"pairs-{split}", runtime)
        runtime.say(summary)
    require_batch(options, runtime, len(pairs["train"]))

    def load():
        model = load_causal_lm(
            options.model_name_or_path, runtime.torch_dtype, config, options.dropout_rate, options.attn_implementation
        )
        fit_vocabulary(model, tokenizer)
        return model

    # With --offload_reference_model the policy itself is the reference, before its first step: LoRA starts as nothing.
    reference = None if options.offload_reference_model else load()
    trainer = PreferenceTrainer(
        prepare_model(load(), options),
        reference,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
        stage=options,
        train_lengths=[max(len(example.input_ids) for example in pair) for pair in pairs["train"]],
    )
    results = run(trainer, tokenizer, {"stage": "dpo", "train_pairs": len(pairs["train"])}, scratch="pairs-*")
    if results:
        accuracy = results["eval/rewards/accuracies"]
        runtime.say(f"DPO: held-out pair accuracy {accuracy:.4f}; saved in {options.output_dir}")
    finish(options, runtime)


if __name__ == "__main__":
    main()
    runtimes.leave()
