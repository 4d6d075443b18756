"""The order of the training rows."""

import numpy as np
import pytest

from recipes.training.order import MEGA_BATCHES, EpochSampler, group

COSTS = np.random.default_rng(0).lognormal(size=1003)


def batches(sampler, size):
    rows = list(sampler)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize("costs", [None, COSTS])
def test_every_row_comes_once_and_the_order_is_of_seed_and_epoch(costs):
    sampler = EpochSampler(1003, 0, costs, batch_size=8)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and len(sampler) == 1003
    assert list(sampler) == first == list(EpochSampler(1003, 0, costs, batch_size=8))
    assert list(EpochSampler(1003, 1, costs, batch_size=8)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_batches_hold_rows_of_like_cost():
    def waste(costs):
        """Return the share of padding, if rows are padded to the most expensive one of their batch."""
        found = batches(EpochSampler(1003, 0, costs, batch_size=8), 8)
        return sum(COSTS[rows].max() * len(rows) for rows in found) / COSTS.sum() - 1

    assert waste(COSTS) < waste(None) / 5


def test_the_most_expensive_batch_comes_first_and_the_rest_do_not_go_downhill():
    found = batches(EpochSampler(1003, 0, COSTS, batch_size=8), 8)
    assert COSTS[found[0]].max() == COSTS.max()
    means = [COSTS[rows].mean() for rows in found[1:-1]]
    assert 0.4 < np.mean(np.diff(means) < 0) < 0.6


def test_only_the_last_batch_is_not_full():
    order = group(COSTS, 8, np.random.default_rng(0))
    assert sorted(order) == list(range(len(COSTS)))
    group_of_last = COSTS[len(COSTS) // (8 * MEGA_BATCHES) * 8 * MEGA_BATCHES :]
    assert len(COSTS) % 8 == 3 and sorted(COSTS[order[-3:]]) == sorted(group_of_last)[:3]


@pytest.mark.parametrize("length", [0, 1, 7, 8])
def test_sets_smaller_than_a_batch(length):
    assert sorted(EpochSampler(length, 0, COSTS[:length], batch_size=8)) == list(range(length))
