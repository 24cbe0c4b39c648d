"""The order of training batches: a function of (records, seed, batch, step) and of nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.data.loader import batches, sequence_steps, token_steps
from opd_jax.errors import DataError


def take(steps, records, global_batch, seed=3):
    return sequence_steps(records, global_batch, seed, steps)


@settings(max_examples=10)
@given(st.integers(8, 40), st.sampled_from([4, 8]), st.integers(0, 2**31), st.integers(1, 9))
def test_the_steps_of_a_longer_run_begin_with_those_of_a_shorter(records, batch, seed, steps):
    assert take(9, records, batch, seed)[:steps] == take(steps, records, batch, seed)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=30), st.integers(9, 40))
def test_steps_by_tokens_take_all_records_in_turn_and_no_more_than_fits(lengths, room):
    steps = token_steps(lengths, room, 3, 12)
    flat = [record for step in steps for record in step]
    assert all(0 < sum(lengths[i] for i in step) <= room for step in steps)
    for start in range(0, len(flat) - len(lengths) + 1, len(lengths)):
        assert sorted(flat[start : start + len(lengths)]) == list(range(len(lengths)))


def test_resuming_at_a_step_goes_on_as_before():
    steps = take(12, 10, 4)
    for start in (1, 5, 11):
        assert list(batches(list, steps, start)) == steps[start:]


def test_an_epoch_has_no_record_twice_and_the_next_is_shuffled_anew():
    epochs = np.array(take(40, 33, 8)).reshape(10, 32)
    assert all(len(set(epoch)) == 32 for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 10
    assert set(epochs.ravel().tolist()) == set(range(33)), "the cut must not drop the same one"


def test_neighbouring_seeds_share_no_epoch():
    epochs = [np.array(take(24, 64, 8, seed=seed)).reshape(3, 64) for seed in range(3)]
    assert len({tuple(epoch) for run in epochs for epoch in run.tolist()}) == 9


def test_whole_batches_are_read_at_once():
    calls = []

    def read_many(indices):
        calls.append(list(indices))
        return np.array(indices)

    stream = batches(read_many, take(40, 100, 16))
    for _, batch in zip(range(3), stream, strict=False):
        assert batch.shape == (16,)
    assert {len(call) for call in calls} == {16}
    assert len(calls) <= 12, "reads ahead without bound"
    assert all(isinstance(index, int) for call in calls for index in call)


def test_errors_of_the_reader_reach_the_trainer():
    def read_many(indices):
        raise DataError(f"record {indices[0]}: damaged")

    with pytest.raises(DataError, match="damaged"):
        next(batches(read_many, take(1, 8, 4)))


def test_too_few_records_are_refused_at_once():
    with pytest.raises(DataError, match="7 records do not fill one batch of 8; lower batch_size"):
        take(1, 7, 8)
