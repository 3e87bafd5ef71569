"""How long a stage takes on a named card, as formulas: seconds from parameters, tokens and the card's figures.

A forward pass costs 2 P floating-point operations a token, a backward pass 4 P, recomputed activations 2 P more. Large
products reach ``UTILISATION`` of what the maker states. A decoded token reads all weights once, at ``BANDWIDTH_SHARE``
of the stated bandwidth. None of it has been measured on such a card: take it within a factor of 1.5.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """The maker's data sheet: dense 16-bit operations and bytes of memory a second."""

    flops: float
    bandwidth: float


CARDS = {
    "A100": Card(312e12, 2.039e12),  # NVIDIA A100 80GB SXM data sheet, 2021
    "H100": Card(989e12, 3.35e12),  # NVIDIA H100 SXM data sheet, 2023
    "H200": Card(989e12, 4.8e12),  # NVIDIA H200 SXM data sheet, 2024
}
UTILISATION = 0.45
BANDWIDTH_SHARE = 0.6
HOST_ADAM = 0.22
"""Seconds that a node's processors take for Adam on a billion offloaded parameters, transfers included."""
UNCERTAINTY = 1.5


def computing(card: Card, parameters: int, tokens: float, passes: int) -> float:
    """Seconds of ``tokens`` on one GPU; ``passes``: 1 forward, 3 forward and backward, 4 with recomputation."""
    return 2 * parameters * tokens * passes / (card.flops * UTILISATION)


def training(card: Card, parameters: int, tokens: float, ranks: int, checkpointing: bool, offload: bool, steps: int):
    """Seconds of a stage that trains one model on ``tokens`` in all, in ``steps`` updates."""
    learning = computing(card, parameters, tokens / ranks, 4 if checkpointing else 3)
    return learning + steps * HOST_ADAM * parameters / 1e9 * offload


def decoding(card: Card, parameters: int, answer_tokens: int, size: int = 2) -> float:
    """Seconds until the longest of a batch's answers is written, one reading of the weights a token."""
    return answer_tokens * parameters * size / (card.bandwidth * BANDWIDTH_SHARE)


def ppo_step(
    card: Card,
    parameters: int,
    *,
    sequences: int,
    prompt_tokens: float,
    answer_tokens: float,
    longest_answer: int,
    checkpointing: bool,
    offload: bool,
    with_critic: bool,
    size: int = 2,
) -> dict[str, float]:
    """Seconds of each part of one update on ``sequences`` answers a GPU, all models of equally many parameters."""
    tokens, trained = sequences * (prompt_tokens + answer_tokens), 2 if with_critic else 1
    return {
        "decoding": decoding(card, parameters, longest_answer, size),
        "scoring": computing(card, parameters, tokens, 2 + with_critic),
        "learning": trained * computing(card, parameters, tokens, 4 if checkpointing else 3),
        "Adam on the host": trained * HOST_ADAM * parameters / 1e9 * offload,
    }
