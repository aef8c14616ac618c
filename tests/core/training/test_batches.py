"""The order of an epoch's batches, and processes and workers that share it."""

from itertools import chain

import numpy as np
import pytest
import torch
from data_files import make_data, same_samples, settings
from torch.utils.data import DataLoader

from core.training.batches import EpochBatches
from dataset import CaseDataset, find_cases


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        batches = EpochBatches([None] * 20, 1, seed)
        batches.epoch = epoch
        return [case for batch in batches for case in batch]

    orders = {tuple(order(seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(row) == list(range(20)) for row in orders)
    np.random.seed(3)  # noqa: NPY002 - the global generator must not matter
    torch.manual_seed(3)
    batches = EpochBatches([None] * 20, 3, 2)
    first = list(batches)
    assert [len(batch) for batch in first] == [3] * 6 + [2]
    batches.epoch = 4
    assert list(chain(*batches)) == order(2, 4)
    batches.epoch = 0
    assert list(batches) == first
    assert list(chain(*first)) == order(2, 0)
    batches.start = 5
    assert list(batches) == first[5:]
    assert len(batches) == 7


@pytest.mark.parametrize(("length", "batch_size", "processes"), [(5, 1, 2), (5, 2, 2), (9, 2, 3), (4, 1, 2), (1, 1, 3)])
def test_processes_share_out_the_batches_of_one(length, batch_size, processes):
    whole = list(EpochBatches([None] * length, batch_size * processes, seed=1))
    shares = [EpochBatches([None] * length, batch_size, 1, rank, processes) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(whole)}
    rows = [list(share) for share in shares]
    for step, expected in enumerate(whole):
        weights = [share.weight(step) for share in shares]
        assert sum(weights) == pytest.approx(1)
        # What has weight is the batch of one process, in order; the rest only keeps everybody company.
        assert list(chain(*(row[step] for row, weight in zip(rows, weights, strict=True) if weight))) == expected
        assert all(row[step] for row in rows)
        for row, share, weight in zip(rows, shares, weights, strict=True):
            assert weight == pytest.approx(len(share.positions(step)) / len(expected))
            assert not weight or len(row[step]) == len(share.positions(step))


def test_cases_with_a_weight_are_drawn_beside_the_others():
    weights = [None, 0.1, None, 1.0, 1.0, 0.1]
    epochs = [EpochBatches(weights, 1, 0, made_per_labelled=0.5 * k) for k in (1, 2, 4)]
    assert [len(each) for each in epochs] == [3, 4, 6]
    drawn = np.zeros(6, int)
    for epoch in range(300):
        epochs[0].epoch = epoch
        order = list(chain(*epochs[0]))
        assert set(order) >= {0, 2}
        drawn[order] += 1
    # One of four by its weight: 0.1 of 2.2 and 1 of 2.2.
    np.testing.assert_allclose(drawn / 300, [1, 1 / 22, 1, 10 / 22, 10 / 22, 1 / 22], atol=0.08)
    assert sorted(chain(*epochs[2])) == list(range(6))
    halves = [EpochBatches(weights, 1, 0, rank, 2) for rank in (0, 1)]
    assert sorted(chain(*halves[0], *halves[1])) == sorted(chain(*epochs[1]))


def test_workers_change_nothing(tmp_path):
    cases = find_cases(make_data(tmp_path / "data", tuple("abcde")))
    config = settings(cache_dir=str(tmp_path / "cache"))

    def epochs(workers: int, batch_size: int = 1) -> list[dict]:
        batches_of = EpochBatches([None] * len(cases), batch_size, seed=1)
        loader = DataLoader(
            CaseDataset(cases, config),
            batch_sampler=batches_of,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        batches = []
        for epoch in (1, 2):
            batches_of.epoch = epoch
            batches += list(loader)
        return batches

    first = epochs(2)  # the workers fill the cache
    for other in (epochs(0), epochs(2)):
        assert len(other) == 10
        assert all(same_samples(a, b) for a, b in zip(first, other, strict=True))
    seen = [batch["case"][0] for batch in first]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list("abcde")
    assert seen[:5] != seen[5:]
    assert [case for batch in epochs(0, batch_size=2) for case in batch["case"]] == seen
