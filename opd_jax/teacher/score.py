"""The teacher's log-probs of stored responses, in packed batches.

    row 0   [prompt response | prompt response | prompt response .]
    row 1   [prompt response             | prompt response . . . .]

Batches have few shapes, and there is hardly any padding. Only the response tokens meet the
output head: their hidden states are moved to the front of each row, and the head runs over as many
columns as the fullest row has. Which records share a batch follows from the snapshot,
`batch_tokens` and the mesh alone, and a batch is always computed whole: a pass that was killed and
continued ends with the same bits as an undisturbed one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.algo.logprobs import chosen_logprobs
from opd_jax.algo.top_k import CHUNK_TOKENS, top_k_logprobs
from opd_jax.core.mesh import axis_size, constrain, put_batch, replicated
from opd_jax.data.collate import best_fit, packed_rows
from opd_jax.data.records import Record, Scores
from opd_jax.errors import DataError, ModelError
from opd_jax.model.transformer import HIDDEN_AXES, LanguageModel, Params

REPAIR = {"teacher": "check the folder", "student": "lower optim.learning_rate"}
POSITIVE_TOLERANCE = 1e-4  # float32 log-sum-exp can round a certain token's log-prob above 0


class ScoreOut(NamedTuple):
    """What the program returns: of each row its response tokens, one record after the other."""

    logprob_bt: jax.Array  # float32
    entropy_bt: jax.Array  # float32
    ids_btk: jax.Array  # int32; k is 0 without a top-k
    logprob_btk: jax.Array  # float32


@dataclass(frozen=True)
class Scorer:
    """A model ready to score: its program, its parameters and how much to do at once.

    Attributes:
        top_k: also return the likeliest `top_k` tokens at every response position; 0: none.
        batch_tokens: about how many tokens (padding included) a batch holds.
        entropy: also return the entropy at every response position.
    """

    model: LanguageModel
    params: Params
    top_k: int = 0
    batch_tokens: int = 8192
    entropy: bool = False
    role: str = "teacher"
    """What messages call it."""

    def __post_init__(self) -> None:
        if self.top_k > self.model.vocabulary:
            raise ModelError(
                f"score.top_k={self.top_k} is more than the teacher's vocabulary of "
                f"{self.model.vocabulary}; make it smaller"
            )

    @property
    def ways(self) -> int:
        """Into how many parts the mesh cuts the rows of a batch."""
        return 1 if self.model.mesh is None else axis_size(self.model.mesh, "batch")

    @property
    def parts(self) -> int:
        """Into how many parts the mesh cuts the tokens of a row."""
        return 1 if self.model.mesh is None else axis_size(self.model.mesh, "time")

    def rows(self, length: int) -> int:
        """How many rows of that length make a batch; a multiple of `ways`."""
        return max(self.batch_tokens // length // self.ways, 1) * self.ways

    def score_all(self, records: Sequence[Record], length: int) -> list[Scores]:
        """Score records in their order, in packed rows of `length` tokens, a multiple of `parts`.

        A batch that is not full has as few rows as a power of two times `ways` allows: few shapes.
        """
        tokens = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in records]
        most = self.rows(length)
        found: dict[int, Scores] = {}
        packed = best_fit(tokens, length)
        for start in range(0, len(packed), most):
            members = packed[start : start + most]
            needed = -(-len(members) // self.ways)
            rows = min(most, self.ways << (needed - 1).bit_length())
            scores = self.score([[records[i] for i in row] for row in members], length, rows)
            found.update(zip((i for row in members for i in row), scores, strict=True))
        return [found[i] for i in range(len(records))]

    def score(self, packed: Sequence[Sequence[Record]], length: int, rows: int) -> list[Scores]:
        """Score one batch of `rows` x `length` tokens; the records' scores in the order given.

        Args:
            packed: records of each row; missing rows are padding.

        Raises:
            DataError: a token the teacher has no row for, or a score that is no log-prob.
        """
        return self.scores_of(packed, self.start(packed, length, rows))

    def start(self, packed: Sequence[Sequence[Record]], length: int, rows: int) -> ScoreOut:
        """Begin with a batch; `scores_of` awaits it."""
        for record in (record for row in packed for record in row):
            _check_ids(record, self.model.vocabulary)
        filled = [*packed, *[packed[-1][:1]] * (rows - len(packed))]
        arrays: Any = response_first(packed_rows(filled, length))
        if self.model.mesh is not None:
            arrays = put_batch(self.model.mesh, arrays)
        return score_program(self.model, self.top_k)(self.params, arrays)

    def scores_of(self, packed: Sequence[Sequence[Record]], out: ScoreOut) -> list[Scores]:
        """What was begun with these records."""
        out = jax.device_get(out)
        found: list[Scores] = []
        for number, row in enumerate(packed):
            at = 0
            for record in row:
                columns = slice(at, at + len(record.response_ids))
                found.append(self._scores(record, (number, columns), out))
                at = columns.stop
        return found

    def _scores(self, record: Record, place: tuple[int, slice], out: ScoreOut) -> Scores:
        logprob = np.asarray(out.logprob_bt[place], np.float32)
        _check("log-prob", logprob, record, self.role)
        entropy = None
        if self.entropy:
            entropy = np.asarray(out.entropy_bt[place], np.float32)
            _check("entropy", entropy, record, self.role, math.inf)
        logprob = np.minimum(logprob, 0.0)
        if not self.top_k:
            return Scores(logprob, entropy=entropy)
        top = np.asarray(out.logprob_btk[place], np.float32)
        _check("top-k log-prob", top, record, self.role)
        top = np.minimum(top, 0.0)
        rest = 1.0 - np.sum(np.exp(top.astype(np.float64)), axis=-1)
        return Scores(
            logprob,
            np.asarray(out.ids_btk[place], np.int32),
            top.astype(np.float16),
            np.maximum(rest, 0.0).astype(np.float32),
            entropy,
        )


def response_first(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Packed rows as the program takes them: `column_bt` leads to the response tokens of a row.

    `target_bt` becomes those columns' targets, and `count_b` says how many there are.
    """
    mask_bt = batch["mask_bt"]
    column_bt = np.argsort(~mask_bt, axis=1, kind="stable").astype(np.int32)
    kept = ("input_bt", "positions_bt", "segments_bt")
    return {
        **{name: batch[name] for name in kept},
        "target_bt": np.take_along_axis(batch["target_bt"], column_bt, axis=1),
        "column_bt": column_bt,
        "count_b": mask_bt.sum(1, dtype=np.int32),
    }


def _check_ids(record: Record, vocab_size: int) -> None:
    """Rows of embedding and head beyond the tokenizer's tokens only pad the vocabulary."""
    largest = max(int(ids.max(initial=0)) for ids in (record.prompt_ids, record.response_ids))
    if largest >= vocab_size:
        raise DataError(
            f"teacher: record '{record.prompt_id}'/{record.sample_index} has token {largest}, the "
            f"teacher's vocabulary ends at {vocab_size - 1}; sample again with --force rollout"
        )


def _check(
    what: str,
    values: np.ndarray,
    record: Record,
    role: str,
    largest: float = POSITIVE_TOLERANCE,
) -> None:
    """Raises DataError where `values` of the record's tokens, [t] or [t, k], are impossible."""
    bad = ~np.isfinite(values) | (values > largest)
    if bad.any():
        at, *_ = place = np.unravel_index(np.argmax(bad), bad.shape)
        cause = "its weights are damaged" if role == "teacher" else "it has diverged"
        raise DataError(
            f"{role}: {what} {values[place]} at response token {at} of record "
            f"'{record.prompt_id}'/{record.sample_index}; {cause}, or its compute dtype overflows: "
            f"{REPAIR[role]}, or use model.compute_dtype=float32"
        )


@functools.lru_cache(maxsize=16)
def score_program(model: LanguageModel, top_k: int) -> Callable[[Params, Any], ScoreOut]:
    """The jitted program of a batch: parameters, and arrays as `response_first` makes them."""

    def program(params: Params, batch: dict[str, jax.Array]) -> ScoreOut:
        inputs = batch["input_bt"], batch["positions_bt"], batch["segments_bt"]
        hidden_btd = model.forward(params, *inputs).hidden_btd

        # Columns move across cuts of the tokens; a device takes its share of each loop's columns.
        def whole(x: jax.Array) -> jax.Array:
            return constrain(x, model.mesh, ("batch", *["replicated"] * (x.ndim - 1)), "columns")

        column_bt1, target_bt = whole(batch["column_bt"][..., None]), whole(batch["target_bt"])
        hidden_btd = jnp.take_along_axis(whole(hidden_btd), column_bt1, axis=1)
        head = model.head_parameter(params)
        b, t = target_bt.shape
        ways = 1 if model.mesh is None else axis_size(model.mesh, "time")
        width = min(t, max(CHUNK_TOKENS // b // ways, 1) * ways)

        # The last columns may be computed twice, to the same values: slices stop at the end.
        def body(number: jax.Array, out: ScoreOut) -> ScoreOut:
            def cut(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, number * width, width, axis=1)

            hidden = constrain(cut(hidden_btd), model.mesh, HIDDEN_AXES, "hidden")
            found = _some(model, top_k, head, hidden, cut(target_bt))
            return jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, number * width, axis=1),
                out,
                found,
            )

        zeros, wide = jnp.zeros((b, t)), jnp.zeros((b, t, top_k))
        out = ScoreOut(zeros, zeros, wide.astype(jnp.int32), wide)
        return jax.lax.fori_loop(0, -(-jnp.max(batch["count_b"]) // width), body, out)

    return jax.jit(program, out_shardings=model.mesh and replicated(model.mesh))


def _some(
    model: LanguageModel, top_k: int, head: jax.Array, hidden: jax.Array, target: jax.Array
) -> ScoreOut:
    if top_k:
        found = top_k_logprobs(
            hidden, head, target, top_k, model.mesh, padded_from=model.padded_from
        )
        return ScoreOut(found.logprob_bt, found.entropy_bt, found.ids_btk, found.logprob_btk)
    chosen = chosen_logprobs(
        hidden, head, target[..., None], model.mesh, padded_from=model.padded_from
    )
    empty = jnp.zeros((*target.shape, 0))
    return ScoreOut(chosen.logprob_bts[..., 0], chosen.entropy_bt, empty.astype(jnp.int32), empty)
