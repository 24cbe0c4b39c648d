"""The teacher's log-probs of stored responses, in batches of similar length.

Which records share a batch follows from the snapshot, `batch_tokens` and the mesh alone, and a
batch is always computed whole: a pass that was killed and continued ends with the same bits as an
undisturbed one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from opd_jax.algo.logprobs import chosen_logprobs, top_k_logprobs
from opd_jax.core.mesh import axis_size, put_batch, replicated
from opd_jax.data.collate import padded_rows
from opd_jax.data.records import Record, Scores
from opd_jax.errors import DataError, ModelError
from opd_jax.model.transformer import LanguageModel, Params

POSITIVE_TOLERANCE = 1e-4  # float32 log-sum-exp can round a certain token's log-prob above 0


class _Out(NamedTuple):
    """What the program returns."""

    logprob_bt: jax.Array  # float32
    ids_btk: jax.Array  # int32; k is 0 without a top-k
    logprob_btk: jax.Array  # float32


@dataclass(frozen=True)
class Scorer:
    """A model ready to score: its program, its parameters and how much to do at once.

    Attributes:
        top_k: also return the likeliest `top_k` tokens at every response position; 0: none.
        batch_tokens: about how many tokens (padding included) a batch holds.
    """

    model: LanguageModel
    params: Params
    top_k: int = 0
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.top_k > self.model.vocabulary:
            raise ModelError(
                f"score.top_k={self.top_k} is more than the teacher's vocabulary of "
                f"{self.model.vocabulary}; make it smaller"
            )

    def rows(self, length: int) -> int:
        """How many rows of that length make a batch; a multiple of what the mesh cuts rows into."""
        mesh = self.model.mesh
        ways = 1 if mesh is None else axis_size(mesh, "batch")
        return max(self.batch_tokens // length // ways, 1) * ways

    def score_all(self, records: Sequence[Record], length: int) -> list[Scores]:
        """Score records in their order, in batches of `batch_tokens`."""
        rows = min(self.rows(length), len(records))
        return [
            scores
            for start in range(0, len(records), rows)
            for scores in self.score(records[start : start + rows], length, rows)
        ]

    def score(self, records: Sequence[Record], length: int, rows: int) -> list[Scores]:
        """Score records in one batch of `rows` x `length` tokens; missing rows are padding.

        Raises:
            DataError: a token the teacher has no row for, or a score that is no log-prob.
        """
        for record in records:
            _check_ids(record, self.model.vocabulary)
        filled = [*records, *[records[-1]] * (rows - len(records))]
        batch = padded_rows(filled, length)
        names = ("input_bt", "target_bt", "positions_bt")
        arrays: Any = {name: batch[name] for name in names}
        if self.model.mesh is not None:
            arrays = put_batch(self.model.mesh, arrays)
        out = jax.device_get(_program(self.model, self.top_k)(self.params, arrays))
        return [self._scores(record, row, out) for row, record in enumerate(records)]

    def _scores(self, record: Record, row: int, out: _Out) -> Scores:
        start = len(record.prompt_ids) - 1
        columns = slice(start, start + len(record.response_ids))
        logprob = np.asarray(out.logprob_bt[row, columns], np.float32)
        _check(logprob, record)
        logprob = np.minimum(logprob, 0.0)
        if not self.top_k:
            return Scores(logprob)
        return Scores(
            logprob,
            np.asarray(out.ids_btk[row, columns], np.int32),
            np.minimum(out.logprob_btk[row, columns], 0.0).astype(np.float16),
        )


def _check_ids(record: Record, vocab_size: int) -> None:
    """Rows of embedding and head beyond the tokenizer's tokens only pad the vocabulary."""
    largest = max(int(ids.max(initial=0)) for ids in (record.prompt_ids, record.response_ids))
    if largest >= vocab_size:
        raise DataError(
            f"teacher: record '{record.prompt_id}'/{record.sample_index} has token {largest}, the "
            f"teacher's vocabulary ends at {vocab_size - 1}; sample again with --force rollout"
        )


def _check(logprob: np.ndarray, record: Record) -> None:
    bad = ~np.isfinite(logprob) | (logprob > POSITIVE_TOLERANCE)
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(
            f"teacher: log-prob {logprob[at]} at response token {at} of record "
            f"'{record.prompt_id}'/{record.sample_index}; the teacher's weights are damaged, or "
            "its compute dtype overflows: check the folder, or use model.compute_dtype=float32"
        )


@functools.lru_cache(maxsize=16)
def _program(model: LanguageModel, top_k: int) -> Callable[[Params, Any], _Out]:
    def program(params: Params, batch: dict[str, jax.Array]) -> _Out:
        out = model.forward(params, batch["input_bt"], batch["positions_bt"])
        head, target_bt = model.head_parameter(params), batch["target_bt"]
        mesh, padded = model.mesh, model.padded_from
        if top_k:
            found = top_k_logprobs(out.hidden_btd, head, target_bt, top_k, mesh, padded_from=padded)
            return _Out(found.logprob_bt, found.ids_btk, found.logprob_btk)
        chosen = chosen_logprobs(
            out.hidden_btd, head, target_bt[..., None], mesh, padded_from=padded
        )
        logprob = chosen.logprob_bts[..., 0]
        empty = logprob[..., None][..., :0]
        return _Out(logprob, empty.astype(np.int32), empty)

    return jax.jit(program, out_shardings=model.mesh and replicated(model.mesh))


@dataclass(frozen=True)
class ScoreBatch:
    """Which records to score together, at which static shape."""

    indices: tuple[int, ...]
    length: int
    rows: int


def length_bucket(tokens: int) -> int:
    """A length of which there are few: at most four per power of two, and multiples of 16."""
    step = max(16, (1 << (tokens - 1).bit_length()) // 8) if tokens > 1 else 16
    return -(-tokens // step) * step


def score_batches(tokens_r: np.ndarray, scorer: Scorer) -> Iterator[ScoreBatch]:
    """Cut a snapshot into batches of similar length.

    Args:
        tokens_r: prompt + response tokens of every record.
    """
    order = np.argsort(tokens_r, kind="stable")
    buckets = np.array([length_bucket(int(n) - 1) for n in tokens_r[order]])
    for length in np.unique(buckets):
        members = order[buckets == length]
        rows = scorer.rows(int(length))
        for start in range(0, len(members), rows):
            yield ScoreBatch(tuple(members[start : start + rows].tolist()), int(length), rows)
