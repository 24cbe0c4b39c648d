"""The order of training batches: a function of (records, seed, batch, step) and of nothing else."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.data.loader import batches
from opd_jax.errors import ConfigError, DataError


def take(steps, records, global_batch, **where):
    stream = batches(list, records, global_batch, **{"seed": 3, **where})
    return list(itertools.islice(stream, steps))


@settings(max_examples=10, deadline=None)
@given(st.integers(8, 40), st.sampled_from([4, 8]), st.integers(0, 2**31), st.integers(0, 9))
def test_same_records_per_step_on_1_2_and_4_processes(records, global_batch, seed, start):
    whole = take(6, records, global_batch, seed=seed, start_step=start)
    for count in (2, 4):
        shares = [
            take(6, records, global_batch, seed=seed, start_step=start, process_index=i,
                 process_count=count)
            for i in range(count)
        ]  # fmt: skip
        for step, wanted in enumerate(whole):
            parts = [share[step] for share in shares]
            assert {len(part) for part in parts} == {global_batch // count}
            interleaved = [index for row in zip(*parts, strict=True) for index in row]
            assert interleaved == wanted


def test_resuming_at_a_step_goes_on_as_before():
    straight = take(12, 10, 4)
    for start in (1, 5, 11):
        assert take(12 - start, 10, 4, start_step=start) == straight[start:]


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

    stream = batches(read_many, 100, 16, seed=0)
    for _, batch in zip(range(3), stream, strict=False):
        assert batch.shape == (16,)
    assert {len(call) for call in calls} == {16}
    assert len(calls) <= 12, "reads ahead without bound"
    assert all(isinstance(index, int) for call in calls for index in call)


def test_errors_of_the_reader_reach_the_trainer():
    def read_many(indices):
        raise DataError(f"record {indices[0]}: damaged")

    with pytest.raises(DataError, match="damaged"):
        next(batches(read_many, 8, 4, seed=0))


def test_too_few_records_and_uneven_shares_are_refused_at_once():
    with pytest.raises(DataError, match="7 records do not fill one batch of 8; lower batch_size"):
        batches(list, 7, 8, seed=0)
    with pytest.raises(ConfigError, match="batch_size 6 is not divisible by 4 processes"):
        batches(list, 7, 6, seed=0, process_count=4)
