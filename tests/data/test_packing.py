"""Examples to batches: nothing lost, nothing doubled, the same order again from any position."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_files import RANDOM_LENGTHS, lengths_dataset, section

from jlora.data import packing
from jlora.data.packing import Epochs, batches, pack, pack_row
from jlora.data.prompts import Example

# Packing


@pytest.mark.parametrize("seed", range(5))
def test_pack_holds_every_example_once_within_capacity(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, rng.integers(1, 200)).tolist()
    order = rng.permutation(len(lengths))
    rows = pack(lengths, order, 32, packing=True)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 32 for row in rows)
    assert rows == pack(lengths, order, 32, packing=True)
    # A row that any other row has room for would never have been opened.
    firsts = [row[0] for row in rows]
    place = {int(i): number for number, i in enumerate(order)}
    for later in range(1, len(rows)):
        opened = place[firsts[later]]
        for row in rows[:later]:
            used = sum(lengths[i] for i in row if place[i] < opened)
            assert used + lengths[firsts[later]] > 32


def test_pack_takes_the_fullest_row_that_has_room():
    # 7 and 5 stand alone (of 10); 3 fits both and goes to 7; 4 fits only 5; 2 opens a row of its own.
    assert pack([7, 5, 3, 4, 2], np.arange(5), 10, packing=True) == [[0, 2], [1, 3], [4]]
    # Equally full rows: the oldest.
    assert pack([6, 6, 4, 4], np.arange(4), 10, packing=True) == [[0, 2], [1, 3]]
    # The order given counts, not that of the lengths.
    assert pack([7, 5, 3, 4, 2], np.array([4, 3, 2, 1, 0]), 10, packing=True) == [[4, 3, 2], [1], [0]]


def test_pack_off_gives_each_example_its_row():
    assert pack([7, 5, 3], np.array([2, 0, 1]), 10, packing=False) == [[2], [0], [1]]


def test_pack_row_arrays():
    a = Example(np.array([1, 10, 11, 12], np.int32), np.array([False, False, True, True]))
    b = Example(np.array([1, 20, 21], np.int32), np.array([False, True, True]))
    row = pack_row([a, b], 10)
    np.testing.assert_array_equal(row["tokens"], [1, 10, 11, 12, 1, 20, 21, 0, 0, 0])
    # The end of one example does not predict the start of the next.
    np.testing.assert_array_equal(row["targets"], [10, 11, 12, 0, 20, 21, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["weights"], [0, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["segments"], [1, 1, 1, 1, 2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 0, 1, 2, 0, 0, 0])
    assert row["weights"].dtype == np.float32 and row["tokens"].dtype == np.int32
    assert not any(array.any() for array in pack_row([], 10).values())


def test_pack_row_trains_what_the_examples_say():
    dataset = lengths_dataset([9, 8, 15])
    row = pack_row(dataset.examples, 32)
    assert row["weights"].sum() == sum(example.trained.sum() for example in dataset.examples) == 29
    assert (row["segments"] > 0).all()  # 32 of 32


# Epochs


def epochs(lengths=RANDOM_LENGTHS, batch_size=4, seed=0, **changes):
    return Epochs(lengths_dataset(lengths), section(**changes), batch_size, seed)


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_once_an_epoch_in_an_order_of_its_own(packing):
    one = epochs(packing=packing)
    orders = [[i for row in one.rows(epoch) for i in row] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(len(RANDOM_LENGTHS)))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # Asked for in any order, and again: the same.
    again = epochs(packing=packing)
    assert [again.rows(epoch) for epoch in (2, 0, 1)] == [one.rows(epoch) for epoch in (2, 0, 1)]
    assert epochs(packing=packing, seed=1).rows(0) != one.rows(0)


def test_epochs_may_be_asked_by_many_threads_at_once(monkeypatch):
    """As the iterator does, which reads ahead in threads: an epoch made twice would move all that follow."""
    wanted = [epochs().rows(epoch) for epoch in range(4)]

    def slow_pack(*args):
        time.sleep(0.005)
        return pack(*args)

    monkeypatch.setattr(packing, "pack", slow_pack)
    one = epochs()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(one.rows, [0, 0, 1, 0, 1, 2, 3, 2, 0, 1, 3, 2]))
        last = list(threads.map(one.__getitem__, range(one.num_batches(4) * 4)))
    assert found == [wanted[epoch] for epoch in (0, 0, 1, 0, 1, 2, 3, 2, 0, 1, 3, 2)]
    assert one.num_batches(4) == epochs().num_batches(4) and len(last) == 4 * one.num_batches(4)


def test_a_step_packs_no_epoch_again_that_is_kept_no_more(monkeypatch):
    """Large epochs are forgotten; where a batch begins, and how far a run is, asks for none of them."""
    packed, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *given: packed.append(given) or pack(*given))
    monkeypatch.setattr(packing, "KEPT", 1)
    one = epochs()
    per_epoch = one.steps_in_epoch
    for batch in range(5 * per_epoch):
        assert one.steps_in_epoch == per_epoch and one.first_row(batch) == 4 * batch
        assert one.epoch_at(batch) >= 0.0 and one.tokens_in(batch) > 0
    assert len(packed) <= 6


def test_order_of_evaluation_is_the_file_order():
    assert epochs([5] * 6, packing=False, batch_size=2, seed=None).rows(0) == [[i] for i in range(6)]
    assert epochs([5] * 6, packing=False, batch_size=2, seed=None).rows(1) == [[i] for i in range(6)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_last_batch_is_filled_with_empty_rows(batch_size):
    one = epochs(batch_size=batch_size)
    rows = one.rows(0)
    assert len(rows) % batch_size == 0
    empty = [not row for row in rows]
    assert sum(empty) < batch_size and empty == sorted(empty)
    assert one.num_batches(1) == len(rows) // batch_size
    assert one.num_batches(3) == sum(len(one.rows(epoch)) for epoch in range(3)) // batch_size
    for whole, part in ((0, 0.5), (1, 0.25), (2, 0.999), (1, 0.1)):  # rounded up
        before, after = (one.num_batches(n) if n else 0 for n in (whole, whole + 1))
        assert one.num_batches(whole + part) == before + math.ceil(part * (after - before)), (whole, part)


def test_batches_have_one_shape_and_hold_every_token_once_an_epoch():
    one = epochs(batch_size=4)
    last = one.num_batches(2)
    found = list(batches(one, 4, last=last))
    assert len(found) == last
    assert {array.shape for batch in found for array in batch.values()} == {(4, 32)}
    per_epoch = one.num_batches(1)
    for part in (found[:per_epoch], found[per_epoch:]):
        tokens = np.concatenate([batch["tokens"].ravel() for batch in part])
        segments = np.concatenate([batch["segments"].ravel() for batch in part])
        assert np.bincount(tokens[segments > 0])[10:].tolist() == RANDOM_LENGTHS
        assert sum(batch["weights"].sum() for batch in part) == sum(n - 1 for n in RANDOM_LENGTHS)


def test_epoch_at():
    one = epochs(batch_size=4)
    first, both = one.num_batches(1), one.num_batches(2)
    assert one.epoch_at(0) == 0.0
    assert one.epoch_at(first) == 1.0
    assert one.epoch_at(both) == 2.0
    assert one.epoch_at(1) == pytest.approx(1 / first)
    assert one.epoch_at(first + 1) == pytest.approx(1 + 1 / (both - first))


# The iterator's position


@pytest.mark.parametrize("taken", [0, 1, 3, 11])
def test_iterator_goes_on_exactly_where_it_was_saved(taken):
    def start():
        return batches(epochs(batch_size=4, seed=7), 4)

    def take(iterator, count):
        return [next(iterator) for _ in range(count)]

    expected = take(start(), taken + 12)  # over the end of the first epoch
    assert taken + 12 > epochs(batch_size=4, seed=7).num_batches(1)
    first = start()
    take(first, taken)
    state = json.loads(json.dumps(first.get_state()))
    ahead = take(first, 5)  # the read-ahead of the first iterator is not in its state
    second = start()
    take(second, 2)
    second.set_state(state)
    found = take(second, 12)
    for batch, wanted in zip(found, expected[taken:], strict=True):
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])
    for batch, wanted in zip(ahead, expected[taken:], strict=False):
        np.testing.assert_array_equal(batch["tokens"], wanted["tokens"])
