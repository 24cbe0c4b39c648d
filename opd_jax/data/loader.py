"""Training batches through Grain, ordered by (number of records, seed, batch, step) alone.

    epoch      = a permutation of all records, cut to whole global batches; a new one each epoch
    step s     = the next G entries of it, or the next entries that fit a number of tokens

so a run can go on with another number of processes, and none ends before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grain

from opd_jax.core.rng import stable_hash
from opd_jax.errors import DataError

S = TypeVar("S")
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


def sequence_steps(num_records: int, global_batch: int, seed: int, steps: int) -> list[list[int]]:
    """Which records each step takes: `global_batch` of them.

    Raises:
        DataError: there are fewer records than one batch takes.
    """
    order = step_order(num_records, global_batch, seed)
    flat = [_record(order, i) for i in range(steps * global_batch)]
    return [flat[i : i + global_batch] for i in range(0, len(flat), global_batch)]


def token_steps(
    tokens_r: Sequence[int], batch_tokens: int, seed: int, steps: int
) -> list[list[int]]:
    """Which records each step takes: as many as have at most `batch_tokens` tokens together.

    Raises:
        DataError: a record has more tokens than that.
    """
    longest = int(max(tokens_r))
    if longest > batch_tokens:
        raise DataError(
            f"batch_tokens={batch_tokens} is less than the {longest} tokens of the longest record; "
            "raise it"
        )
    order = step_order(len(tokens_r), 1, seed)
    taken: list[list[int]] = []
    at = 0
    for _ in range(steps):
        step: list[int] = []
        room = batch_tokens
        while tokens_r[record := _record(order, at)] <= room and len(step) < len(tokens_r):
            step.append(record)
            room -= int(tokens_r[record])
            at += 1
        taken.append(step)
    return taken


def _record(order: grain.MapDataset[int], at: int) -> int:
    found = order[at]
    assert found is not None  # no filter leaves one out
    return found


def batches(read: Callable[[S], T], steps: Sequence[S], start_step: int = 0) -> Iterator[T]:
    """The batches of `steps` from `start_step` on, read ahead by two threads.

    Args:
        read: turns what a step takes into a batch; called from several threads.
    """
    # Grain does not push batching down to a source, so the source is a map over steps.
    dataset = grain.MapDataset.source(steps)[start_step:].map(read)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))
