"""Training batches through Grain, ordered by (number of records, seed, batch, step) alone.

    epoch      = a permutation of all records, cut to whole global batches; a new one each epoch
    step s     = G consecutive entries of it; process p of P takes entries p, p + P, p + 2P, …

so a run can go on with another number of processes, and no process ends before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grain

from opd_jax.core.rng import stable_hash
from opd_jax.errors import ConfigError, DataError

T = TypeVar("T")


def step_order(num_records: int, global_batch: int, seed: int) -> grain.MapDataset[int]:
    """Record indices in training order, cut to whole batches; indexed past its end it reshuffles.

    Raises:
        DataError: there are fewer records than one batch takes.
    """
    if num_records < global_batch:
        raise DataError(
            f"{num_records} records do not fill one batch of {global_batch};"
            " lower batch_size or make more records"
        )
    # Grain adds the epoch to the seed: neighbouring seeds would share permutations, so spread them.
    spread = stable_hash(f"loader/{seed}")
    records = grain.MapDataset.source(range(num_records)).shuffle(spread)
    return records[: num_records // global_batch * global_batch]


def batches(
    read_many: Callable[[Sequence[int]], T],
    num_records: int,
    global_batch: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[T]:
    """Endless batches from `start_step` on: this process's share, read ahead by two threads.

    Args:
        read_many: turns record indices into a batch; called from several threads.

    Raises:
        DataError: too few records for a batch.
        ConfigError: a batch that the processes cannot share evenly.
    """
    if global_batch % process_count:
        raise ConfigError(
            f"batch_size {global_batch} is not divisible by {process_count} processes;"
            f" use a multiple of {process_count}"
        )
    order = step_order(num_records, global_batch, seed)
    share = order[process_index::process_count].repeat(None)
    steps = share.batch(global_batch // process_count, drop_remainder=True)[start_step:]
    # Grain does not push batching down to a source, so the source is a map over batches of indices.
    read = steps.map(lambda indices: read_many(indices.tolist()))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(read.to_iter_dataset(options))
