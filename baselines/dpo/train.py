"""DPO (Rafailov et al., 2023) on the reward part's preference pairs, by TRL's trainer with DeepSpeed-Chat's flags."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from trl import DPOConfig, DPOTrainer

from baselines.dpo.options import Options
from deepspeed_chat_tlcr.models import fit_vocabulary, load_causal_lm
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from deepspeed_chat_tlcr.training import StageMixin, prepare_model, require_batch, run, stage_config, training_arguments
from step2_discriminator.examples import Pair, preference_pairs


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
    """The records as a data set in one file for all ranks: TRL keeps the reference's log-probs beside it."""
    if runtime.is_main:
        Dataset.from_list(records).save_to_disk(folder)
    torch.distributed.barrier()
    return load_from_disk(folder)


def dpo_arguments(options: Options, runtime: Runtime, config: dict | None) -> DPOConfig:
    """TRL's arguments from this stage's flags."""
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
    """TRL's trainer on tokenised records, without its model card (every stage writes one) and its telemetry."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """transformers calls this when a run resumes: TRL's count of tokens is restored here too."""
        super()._load_rng_state(checkpoint)
        counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._total_train_tokens = int(counts[-1]) if checkpoint and counts else 0

    def create_model_card(self, *args, **kwargs) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass


def train(options: Options, runtime: Runtime) -> None:
    """DPO's work on every rank: read, tokenise, train, save."""
    # TRL still uses names that transformers 5 has replaced, which would warn several times in every evaluation.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    config = stage_config(options, runtime)
    arguments = dpo_arguments(options, runtime, config)

    tokenizer = load_tokenizer(options.model_name_or_path, options.new_eos)
    pairs, data = {}, {}
    folders = {split: Path(options.output_dir) / f"pairs-{split}" for split in ("train", "eval")}
    for split, folder in folders.items():
        pairs[split], summary = preference_pairs(options, tokenizer, split)
        data[split] = on_disk(rows(pairs[split]), folder, runtime)
        runtime.say(summary)
    require_batch(options, runtime, len(pairs["train"]))

    def load():
        model = load_causal_lm(
            options.model_name_or_path, runtime.torch_dtype, config, options.dropout_rate, options.attn_implementation
        )
        fit_vocabulary(model, tokenizer)
        return model

    # With --offload_reference_model the policy before its first step is the reference (LoRA starts at zero).
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
    results = run(trainer, tokenizer, {"stage": "dpo", "train_pairs": len(pairs["train"])}, list(folders.values()))
    if results:
        accuracy = results["eval/rewards/accuracies"]
        runtime.say(f"DPO: held-out pair accuracy {accuracy:.4f}; saved in {options.output_dir}")
