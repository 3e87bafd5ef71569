"""Judges of answers that had no part in training, and what a reward must beat before a policy learns from it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import auroc
from deepspeed_chat_tlcr.tokenization import TokenizedExample
from evaluation.stats import CONFIDENCE, RESAMPLES


def profanity(texts: Sequence[str]) -> np.ndarray:
    """Probability that each text is toxic, by alt-profanity-check: others' model, trained on others' data."""
    try:
        from profanity_check import predict_prob
    except ImportError:
        raise InputError("alt-profanity-check is not installed: pip install 'deepspeed-chat-tlcr[detox]'") from None
    return np.asarray(predict_prob(list(texts)), float)


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of all n-grams of words that are different ones (Li et al., 2016)."""
    grams = Counter(gram for text in texts for gram in ngrams(text.split(), n))
    return len(grams) / max(1, grams.total())


def repetition(text: str) -> float:
    """Share of a text's words that stood in it before."""
    words = text.split()
    return 1 - len(set(words)) / len(words) if words else 0.0


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[at:] for at in range(n)), strict=False))


class Unigrams:
    """A bag of words: how often each token was labelled positive among its edits. What any discriminator must beat."""

    def __init__(self, examples: Sequence[TokenizedExample], vocabulary: int):
        counts = np.full((2, vocabulary), 0.5)  # of negative and positive edits, half an edit of each beforehand
        for example in examples:
            for token, target in zip(example.response_ids, example.targets, strict=True):
                if target != 0.5:
                    counts[int(target), token] += 1
        self.probs = counts[1] / counts.sum(0)

    def judge(self, examples: Sequence[TokenizedExample]) -> list[np.ndarray]:
        """D of each response token, an array for each example."""
        return [self.probs[example.response_ids] for example in examples]


def edited(examples: Sequence[TokenizedExample], probs: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """``(E, 2)`` for each example: D and target of its edited tokens, the end left out."""
    rows = []
    for example, own in zip(examples, probs, strict=True):
        targets = np.asarray(example.targets)
        keep = targets != 0.5
        rows.append(np.stack([np.asarray(own)[keep], targets[keep]], 1))
    return rows


def measures(rows: Sequence[np.ndarray]) -> dict[str, float]:
    """Accuracy, AUROC, the majority's accuracy and the calibration error (ten bins) on edited tokens."""
    probs, targets = np.concatenate(rows).T
    positive = targets == 1
    bins = np.minimum((probs * 10).astype(int), 9)
    gaps = [abs(probs[bins == bin].sum() - positive[bins == bin].sum()) for bin in range(10)]
    return {
        "accuracy": float(np.mean((probs > 0.5) == positive)),
        "majority": float(max(positive.mean(), 1 - positive.mean())),
        "auroc": auroc(probs[positive], probs[~positive]),
        "calibration_error": float(sum(gaps) / len(probs)),
    }


def ahead(
    mine: Sequence[np.ndarray], others: Sequence[np.ndarray], name: str, group: int = 2, seed: int = 0
) -> tuple[float, float, float]:
    """Difference in a measure and its 95 % interval: pairs, ``group`` examples in sequence, are resampled together."""
    rng, pairs = np.random.default_rng(seed), len(mine) // group
    drawn = []
    for _ in range(RESAMPLES // 4):
        places = [group * pair + at for pair in rng.integers(0, pairs, pairs) for at in range(group)]
        sides = [measures([rows[place] for place in places])[name] for rows in (mine, others)]
        drawn.append(sides[0] - sides[1])
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return measures(mine)[name] - measures(others)[name], float(low), float(high)
