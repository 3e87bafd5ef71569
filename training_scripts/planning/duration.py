"""How long work takes on a named card: the model of time behind PLAN's hours and benchmarks/counts.py.

The card computes at ``utilisation`` of the operations that its maker states, or reads and writes its memory at
``share`` of the stated bandwidth, whichever takes longer, while the host launches what comes next. A forward pass costs
2 P operations a token and 4 L a S more for the attention of L blocks, a wide, to S tokens; a backward pass twice that,
recomputed activations once more. A decoded token reads all weights, and the keys and values before it, once.

Its ratios were checked on a CPU (docs/speed.md); on such a card nothing has been measured, hence ``UNCERTAINTY``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """The maker's data sheet, a second: dense 16-bit operations; bytes of its memory, to the node's other GPUs (each
    way) and to host memory (each way). ``utilisation`` and ``share``: what is reached of the first two."""

    flops: float
    bandwidth: float
    link: float
    host: float
    # 45 %: usual for the training of such models. 0.68: gpt-fast decodes Llama-2-7B at 1,397 GB/s of an A100's 2,039
    # (its README's table, 16 bit).
    utilisation: float = 0.45
    share: float = 0.68


CARDS = {
    # NVIDIA's data sheets: A100 80GB SXM (2021; NVLink 600 GB/s and PCIe 4 64 GB/s, both ways together),
    "A100": Card(312e12, 2.039e12, 300e9, 32e9),
    # H100 SXM (2023; 900 and PCIe 5 128 GB/s),
    "H100": Card(989e12, 3.35e12, 450e9, 64e9),
    # H200 SXM (2024).
    "H200": Card(989e12, 4.8e12, 450e9, 64e9),
}
NETWORK = 25e9  # bytes a second of each GPU's own adapter between nodes, 200 Gb/s, as a DGX A100 has
LINK_SHARE = 0.7  # what collectives and copies reach of a link
LAUNCH = 16e-6  # seconds in which the host launches an operator of PyTorch, or replays a CUDA graph
WAIT = 20e-6  # seconds between the end of work that the host waits for and its next launch
KERNEL = 2e-6  # seconds of the smallest kernel
OPERATORS = (54, 42)  # launches of an eager decoding step: of a block, and beside the blocks (counted, Llama)
HOST_ADAM = 0.22  # seconds of a node's processors for Adam on a billion offloaded parameters, transfers included
GPU_ADAM = 28  # bytes that Adam reads and writes of a parameter: it, two moments, 16-bit copy and gradient
PADDING = 0.44  # share of a batch's tokens that is padding, on HH-RLHF's lengths in batches of 16 as they come
FILES = 1e9  # bytes a second that a node's disk reads and writes
UNCERTAINTY = 1.5  # factor within which the hours are expected to be right


def kernel(card: Card, operations: float, size: float) -> float:
    """Seconds of a kernel that reads and writes ``size`` bytes."""
    return max(operations / (card.flops * card.utilisation), size / (card.bandwidth * card.share))


def elapsed(device: float, launches: float, waits: float = 0) -> float:
    """Seconds of work that keeps the card busy for ``device`` and the host for its launches, at the same time."""
    return max(device, launches * LAUNCH) + waits * WAIT


def exchange(card: Card, size: float, ranks: int, nodes: int = 1) -> float:
    """Seconds to gather ``size`` bytes, spread over the ranks, on each of them, or to sum as many and spread them."""
    speed = card.link if nodes == 1 else min(card.link, NETWORK)
    return size * (ranks - 1) / ranks / (speed * LINK_SHARE)


def computing(card: Card, parameters: float, tokens: float, passes: int) -> float:
    """Seconds of ``tokens`` on one GPU; ``passes``: 1 forward, 3 forward and backward, 4 with recomputation."""
    return kernel(card, 2 * parameters * tokens * passes, 0)


def attending(layers: int, width: int, seen: float) -> float:
    """Attention's 4 L a S operations a token as parameters, of which each costs two; ``seen``: S tokens."""
    return 2 * layers * width * seen


def decoding(
    card: Card, parameters: float, answer_tokens: int, size: int = 2, rows: int = 1, cache: float = 0, launches: int = 1
) -> float:
    """Seconds until the longest of ``rows`` answers is written: one reading of weights and ``cache`` bytes a token."""
    device = kernel(card, 2 * parameters * rows, parameters * size + cache)
    return answer_tokens * elapsed(device, launches)


def adam(card: Card, parameters: float, ranks: int, nodes: int, offload: bool) -> float:
    """Seconds of one optimiser step; on the host, a node's processors have its ranks' share."""
    return HOST_ADAM * parameters / 1e9 / nodes if offload else kernel(card, 0, GPU_ADAM * parameters / ranks)


def zero(card: Card, parameters: float, stage: int, passes: int, ranks: int, nodes: int, size: int) -> float:
    """Seconds of an update's exchanges: gradients summed and parameters gathered once, under ZeRO-3 in each pass."""
    gathers = passes if stage == 3 else 1
    return exchange(card, (1 + gathers) * parameters * size, ranks, nodes)
