"""The order of the rows. It depends only on seed and epoch, so that a resumed training continues in the same order."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

MEGA_BATCHES = 50  # batches that are sorted together; with more, there is less padding and less randomness


def group(costs: Sequence[float], batch_size: int, random: np.random.Generator) -> np.ndarray:
    """Order rows so that a batch has rows of similar cost.

    As in transformers' `LengthGroupedSampler`, rows are sorted within groups of 50 batches, and the most expensive row
    comes first, so that a training that runs out of memory fails in the first step. Unlike there, the batches are
    shuffled instead of going from expensive to cheap.

    Args:
        costs: costs of the rows, in random order.
        batch_size: rows of a step on all devices, so that all devices get rows of similar cost.
        random: generator that shuffles the batches.

    Returns:
        The positions of the rows in the new order, `(rows,)` int64.
    """
    costs, ordered, rest = np.asarray(costs), [], None
    for start in range(0, len(costs), MEGA_BATCHES * batch_size):
        span = np.arange(start, min(start + MEGA_BATCHES * batch_size, len(costs)))
        span = span[np.argsort(-costs[span], kind="stable")]
        batches = [span[first : first + batch_size] for first in range(0, len(span), batch_size)]
        rest = batches.pop() if len(batches[-1]) < batch_size else None  # must come last: batches are cut by position
        ordered += [batches[index] for index in random.permutation(len(batches))]
    if ordered:
        costliest = max(range(len(ordered)), key=lambda index: costs[ordered[index][0]])
        ordered[0], ordered[costliest] = ordered[costliest], ordered[0]
    if rest is not None:
        ordered.append(rest)
    return np.concatenate(ordered) if ordered else np.array([], dtype=np.int64)


class EpochSampler(Sampler[int]):
    """Sampler of rows in an order that depends on seed and epoch. If `costs` are given, in any unit, a batch of
    `batch_size` rows, those of a step on all devices, has similar costs."""

    def __init__(self, length: int, seed: int, costs: Sequence[float] | None = None, batch_size: int = 1):
        self.length, self.seed, self.batch_size = length, seed, batch_size
        self.costs = None if costs is None else np.asarray(costs)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(self.length)
        if self.costs is not None:
            order = order[group(self.costs[order], self.batch_size, random)]
        return iter(order.tolist())
