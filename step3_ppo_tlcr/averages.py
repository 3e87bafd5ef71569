"""Averages over all tokens of all ranks, and the running scale of rewards."""

import torch


class Averages:
    """Sums and counts by name; ``reduce`` turns them into means over ranks. Every rank adds the same names."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Count every entry of ``values``, or those the mask counts; they may be on another device."""
        values = values.detach().to(self.device, torch.float64)
        weights = torch.ones_like(values) if mask is None else mask.to(self.device, torch.float64)
        # Selected rather than multiplied: an infinite value in the padding must not become a NaN.
        total, count = torch.where(weights > 0, values, 0.0).sum(), weights.sum()
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def reduce(self) -> dict[str, float]:
        packed = torch.stack([*self.sums.values(), *self.counts.values()])
        torch.distributed.all_reduce(packed)
        sums, counts = packed.view(2, -1).tolist()
        pairs = zip(self.sums, sums, counts, strict=True)
        return {name: total / count if count else float("nan") for name, total, count in pairs}


class RunningScale:
    """The running standard deviation of rewards per response, over all ranks and updates (Welford, merged by batch).

    ``sample``: of a sample, divided by n - 1 (Bessel), rather than of all there are.
    """

    def __init__(self, count: float = 0.0, mean: float = 0.0, squares: float = 0.0, *, sample: bool = False):
        self.count, self.mean, self.squares, self.sample = count, mean, squares, sample

    def update(self, sums: torch.Tensor) -> float:
        """Take in this rank's rewards per response, ``(B,)``; returns the standard deviation of all so far.

        1 until two different values have been seen, so that dividing by it is always safe.
        """
        packed = torch.stack([torch.ones_like(sums).sum(), sums.sum(), (sums**2).sum()]).double()
        torch.distributed.all_reduce(packed)
        count, total, square = packed.tolist()
        mean = total / count
        gap, whole = mean - self.mean, self.count + count
        self.squares += max(0.0, square - count * mean**2) + gap**2 * self.count * count / whole
        self.mean += gap * count / whole
        self.count = whole
        return self.std

    @property
    def std(self) -> float:
        degrees = self.count - self.sample
        std = (self.squares / degrees) ** 0.5 if degrees > 0 else 1.0
        return std if std > 1e-8 else 1.0

    def state(self) -> list[float]:
        return [self.count, self.mean, self.squares]
