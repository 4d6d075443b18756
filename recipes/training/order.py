"""In which order rows are learned: a function of seed and epoch alone, so that an interrupted run goes on with it."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

MEGA_BATCHES = 50  # batches that are sorted together: more pad less and are less random


def group(costs: Sequence[float], batch_size: int, random: np.random.Generator) -> np.ndarray:
    """Lay rows out so that batches hold rows of like cost.

    As in transformers' `LengthGroupedSampler`, rows are sorted within groups of 50 batches, and the most expensive row
    comes first, so that what does not fit into memory fails at the first step. Unlike there, whole batches are shuffled
    and do not follow one another from expensive to cheap.

    Args:
        costs: of the rows in random order.
        batch_size: rows of one step's batches on all devices, which are thus of like cost too.

    Returns:
        Their positions, rearranged.
    """
    costs, laid, rest = np.asarray(costs), [], None
    for start in range(0, len(costs), MEGA_BATCHES * batch_size):
        span = np.arange(start, min(start + MEGA_BATCHES * batch_size, len(costs)))
        span = span[np.argsort(-costs[span], kind="stable")]
        batches = [span[first : first + batch_size] for first in range(0, len(span), batch_size)]
        rest = batches.pop() if len(batches[-1]) < batch_size else None  # comes last, as the sampler cuts by number
        laid += [batches[index] for index in random.permutation(len(batches))]
    if laid:
        costliest = max(range(len(laid)), key=lambda index: costs[laid[index][0]])
        laid[0], laid[costliest] = laid[costliest], laid[0]
    if rest is not None:
        laid.append(rest)
    return np.concatenate(laid) if laid else np.array([], dtype=np.int64)


class EpochSampler(Sampler[int]):
    """Row numbers in an order that (seed, epoch) decides; of like cost together if `costs` are given.

    Args:
        length: rows.
        seed: of the order.
        costs: of the rows, in any unit.
        batch_size: rows of one step's batches on all devices.
    """

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
