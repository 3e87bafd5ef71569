"""A discriminator with its logits multiplied: by a factor, or as its held-out labels say (temperature scaling)."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from deepspeed_chat_tlcr.arguments import option, parse
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.models import load_token_classifier, scale_head
from deepspeed_chat_tlcr.records import read_revisions
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation.scoring import token_probs
from labeling.token_labels import label_revision


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a copy of a discriminator whose D is sharper or softer."""

    discriminator: str = option(MISSING, "folder of the discriminator")
    revisions: str = option(MISSING, "held-out revisions.jsonl")
    factor: float | None = option(
        None, "what its logits are multiplied by; unset: what fits the revisions best", above=0
    )
    output_dir: str = option(MISSING, "folder for the copy and results.json")


def loss(factor: float, logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean binary cross-entropy (Eq. 6) once logits are multiplied by ``factor``."""
    scaled = factor * logits
    return float(np.mean(np.logaddexp(0, scaled) - targets * scaled))


def fitted(logits: np.ndarray, targets: np.ndarray) -> float:
    """The factor of least loss, between 1/20 and 20."""
    found = minimize_scalar(
        lambda log: loss(np.exp(log), logits, targets), bounds=(-np.log(20), np.log(20)), method="bounded"
    )
    return float(np.exp(found.x))


@exits_cleanly
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    tokenizer = load_tokenizer(options.discriminator)
    model = load_token_classifier(options.discriminator, 2, torch.float32).eval()
    labelled = [e for r in read_revisions(options.revisions) for e in label_revision(tokenizer, r, 4096) if e]
    probs = np.concatenate(token_probs(model, labelled, tokenizer.pad_token_id, 64))
    targets = np.concatenate([example.targets for example in labelled])
    logits = logit(np.clip(probs, 1e-7, 1 - 1e-7))
    factor = options.factor or fitted(logits, targets)
    scale_head(model, factor)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    found = {"factor": factor, "loss_before": loss(1.0, logits, targets), "loss": loss(factor, logits, targets)}
    certain = np.maximum(expit(factor * logits), expit(-factor * logits)) >= 0.6
    write_json(Path(options.output_dir) / "results.json", {**found, "certain_share": float(certain.mean())})
