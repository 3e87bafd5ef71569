"""FIGA (Guo et al., 2024): weighted likelihood of what a revision added and removed, without a reward model."""

import numpy as np
import torch
import torch.nn.functional as F

from baselines.figa.options import Options
from deepspeed_chat_tlcr.models import fit_vocabulary, load_causal_lm
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from deepspeed_chat_tlcr.training import (
    StageTrainer,
    prepare_model,
    require_batch,
    run,
    stage_config,
    training_arguments,
)
from deepspeed_chat_tlcr.turns import end_ids
from step2_discriminator.examples import collate, token_pairs
from step2_discriminator.revisions import load_revisions


def is_weighted(targets: torch.Tensor, response_mask: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tokens that FIGA weighs: ``(added, removed)``, booleans ``(B, T)``.

    All arguments are ``(B, T)``; rows alternate modified, rejected. ``targets``: 1 positive, 0 negative, 0.5 neutral;
    ``ends``: tokens that are EOS. The EOS of a modified response counts as added, that of a rejected one never counts.
    """
    counted = response_mask.bool()
    is_modified = (torch.arange(len(targets), device=targets.device) % 2 == 0).unsqueeze(1)
    added = counted & is_modified & ((targets == 1) | ends)
    removed = counted & ~is_modified & (targets == 0) & ~ends
    return added, removed


def figa_loss(
    nll: torch.Tensor, added: torch.Tensor, removed: torch.Tensor, weights: tuple[float, float], nll_limit: float
) -> torch.Tensor:
    """sum(weight * NLL) / number of tokens that count, over the whole batch; 0 where none does.

    ``nll`` ``(B, T)``, any value where neither mask is set. A removed token that is already unlikely
    (NLL > ``nll_limit``) does not count; that decision has no gradient.
    """
    kept = removed & (nll.detach() <= nll_limit)
    total = weights[0] * nll[added].sum() + weights[1] * nll[kept].sum()
    return total / (added.sum() + kept.sum()).clamp(min=1)


def chosen_nll(logits: torch.Tensor, input_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """NLL of the tokens marked in ``wanted``, in fp32, else 0; ``(B, T, V)`` logits and ``(B, T)`` ids to ``(B, T)``.

    A token's logits are those one position before it, so the first token has none. Only wanted rows become fp32.
    """
    wanted = wanted[:, 1:]
    nll = torch.zeros(input_ids.shape, device=logits.device)
    values = F.cross_entropy(logits[:, :-1][wanted].float(), input_ids[:, 1:][wanted], reduction="none")
    nll[:, 1:] = nll[:, 1:].masked_scatter(wanted, values)
    return nll


class FigaTrainer(StageTrainer):
    """Weighted likelihood on (modified, rejected) pairs; rows alternate."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
        ends = torch.isin(ids, torch.tensor(end_ids(self.processing_class), device=ids.device))
        added, removed = is_weighted(inputs["targets"], inputs["response_mask"], ends)
        nll = chosen_nll(logits, ids, added | removed)
        weights = (self.stage.added_weight, self.stage.removed_weight)
        loss = figa_loss(nll, added, removed, weights, self.stage.removed_nll_limit)
        return (loss, (nll, added, removed)) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, (nll, added, removed) = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        sums = [((nll * mask).sum(1), mask.sum(1)) for mask in (added, removed)]
        # One row a pair: NLL and number of the modified response's added tokens, then of the rejected one's removed.
        (added_nll, added_count), (removed_nll, removed_count) = sums
        table = torch.stack([added_nll[::2], added_count[::2], removed_nll[1::2], removed_count[1::2]], dim=1)
        return loss, table, torch.ones(len(table), device=table.device)

    @staticmethod
    def measures(predictions) -> dict[str, float]:
        """Mean NLL, in nats per token, of held-out added tokens (should fall) and removed ones (should rise)."""
        added, added_count, removed, removed_count = predictions.predictions.sum(0)
        return {
            "added_nll": float(added / np.maximum(added_count, 1)),
            "removed_nll": float(removed / np.maximum(removed_count, 1)),
        }


def train(options: Options, runtime: Runtime) -> None:
    """FIGA's work on every rank: read, label, train, save."""
    tokenizer = load_tokenizer(options.model_name_or_path, options.new_eos)
    revisions = load_revisions(options, tokenizer)
    config = stage_config(options, runtime)

    pairs = {}
    for split in ("train", "eval"):
        pairs[split], summary = token_pairs(revisions[split], tokenizer, options.max_seq_len, split, soft=False)
        runtime.say(summary)
    require_batch(options, runtime, len(pairs["train"]))

    model = load_causal_lm(
        options.model_name_or_path, runtime.torch_dtype, config, options.dropout_rate, options.attn_implementation
    )
    fit_vocabulary(model, tokenizer)
    trainer = FigaTrainer(
        prepare_model(model, options),
        training_arguments(options, runtime, config),
        data_collator=collate(tokenizer),
        train_dataset=pairs["train"],
        eval_dataset=pairs["eval"],
        compute_metrics=FigaTrainer.measures,
        processing_class=tokenizer,
        stage=options,
        train_lengths=[max(len(example.input_ids) for example in pair) for pair in pairs["train"]],
    )
    results = run(trainer, tokenizer, {"stage": "figa", "train_pairs": len(pairs["train"])})
    if results:
        runtime.say(
            f"FIGA: held-out NLL of added tokens {results['eval/added_nll']:.4f}, of removed ones "
            f"{results['eval/removed_nll']:.4f}; saved in {options.output_dir}"
        )
