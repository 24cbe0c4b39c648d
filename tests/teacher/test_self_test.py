"""A teacher that cannot be trusted is found before its first record is stored."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.data.store import create_store
from opd_jax.errors import DataError
from opd_jax.teacher import score
from opd_jax.teacher.batches import score_batches
from opd_jax.teacher.score import Scorer
from opd_jax.teacher.self_test import OTHER_SHAPE, Bound, self_test
from tests.teacher.test_score import make_records


@pytest.fixture
def snapshot(tmp_path):
    store = create_store(tmp_path / "store", {})
    with store.writer() as writer:
        for record in make_records(12):
            writer.append(record)
    return store.freeze()


def run_test(scorer, snapshot):
    """What the score stage does first."""
    batches = score_batches(sum(snapshot.lengths()), scorer)
    return self_test(scorer, snapshot, batches)


@pytest.mark.first_by_default
@pytest.mark.parametrize(
    "mesh", [None, MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=1, context=3)], ids=str
)
def test_a_sound_teacher_passes(snapshot, mesh):
    model, params = tiny(mesh=mesh and make_mesh(mesh), embed_dim=48)
    line = run_test(Scorer(model, params, batch_tokens=256), snapshot)
    assert "the same twice to the bit" in line


@pytest.mark.parametrize("batch_tokens", [40, 256])
def test_there_are_two_shapes_whatever_the_batch(snapshot, monkeypatch, batch_tokens):
    """Of 40 tokens a batch has one row: more columns are the other shape then."""
    model, params = tiny()
    right, seen = Scorer.score, []

    def noted(self, packed, length, rows):
        seen.append((length, rows))
        return right(self, packed, length, rows)

    monkeypatch.setattr(Scorer, "score", noted)
    run_test(Scorer(model, params, batch_tokens=batch_tokens), snapshot)
    assert seen[0] == seen[1] != seen[2]


def test_the_longest_and_the_shortest_rows_are_tested(snapshot, monkeypatch):
    scorer = Scorer(*tiny(), batch_tokens=256)
    (batch, *_) = score_batches(sum(snapshot.lengths()), scorer)
    right, seen = Scorer.score, []

    def noted(self, packed, length, rows):
        seen.append(length)
        return right(self, packed, length, rows)

    monkeypatch.setattr(Scorer, "score", noted)
    more = [dataclasses.replace(batch, length=batch.length + n) for n in (16, 32)]
    self_test(scorer, snapshot, [more[1], more[0], batch])
    assert set(seen) == {batch.length + 32, batch.length}


def test_one_token_is_enough_to_be_found(snapshot, monkeypatch):
    """The mean hides it: these rows are too short for that, so it is allowed more here."""
    scorer = Scorer(*tiny(), batch_tokens=256)
    right = score.score_program

    def program(*static):
        def run(params, arrays):
            out = right(*static)(params, arrays)
            wrong = 0.105 * (len(arrays["input_bt"]) > 1)
            return out._replace(logprob_bt=out.logprob_bt.at[0, 0].add(-wrong))

        return run

    monkeypatch.setattr(score, "score_program", program)
    monkeypatch.setitem(OTHER_SHAPE, "float32", Bound(0.01, OTHER_SHAPE["float32"].largest))
    with pytest.raises(DataError, match=r"differ by 0\.00\d+ on average and 0\.1\d* at most"):
        run_test(scorer, snapshot)


@pytest.mark.parametrize(
    ("field", "words"), [("entropy_bt", "entropy nan"), ("logprob_btk", "top-k log-prob nan")]
)
def test_what_is_stored_beside_log_probs_is_finite_too(snapshot, monkeypatch, field, words):
    scorer = Scorer(*tiny(), top_k=2, batch_tokens=256, entropy=True)
    right = score.score_program

    def program(*static):
        def run(params, arrays):
            out = right(*static)(params, arrays)
            return out._replace(**{field: getattr(out, field) * np.nan})

        return run

    monkeypatch.setattr(score, "score_program", program)
    with pytest.raises(DataError, match=rf"{words} at response token 0 of record 'p\d+'/0"):
        run_test(scorer, snapshot)


def test_a_teacher_that_says_nothing(snapshot):
    model, params = tiny()
    silent = {**params, "final_norm": params["final_norm"] * 0}
    with pytest.raises(DataError, match=r"log-prob -4\.159, minus the logarithm of the vocabulary"):
        run_test(Scorer(model, silent), snapshot)


def test_a_teacher_that_is_not_finite(snapshot):
    model, params = tiny()
    with pytest.raises(DataError, match=r"log-prob nan at response token 0 of record 'p\d+'/0"):
        run_test(Scorer(model, {**params, "final_norm": params["final_norm"] * np.nan}), snapshot)


@pytest.mark.parametrize(
    ("call", "words"), [(1, "scored a second time"), (2, "scored in another batch")]
)
def test_a_device_that_computes_something_else_at_times(snapshot, monkeypatch, call, words):
    """The `call`-th batch from here comes back with one record's scores spoilt."""
    model, params = tiny()
    scorer = Scorer(model, params, batch_tokens=256)
    right, calls = score.score_program, []

    def program(*static):
        def run(params, arrays):
            out = right(*static)(params, arrays)
            calls.append(1)
            return out._replace(logprob_bt=out.logprob_bt - 3.0 * (len(calls) == call + 1))

        return run

    monkeypatch.setattr(score, "score_program", program)
    message = rf"{words}, log-probs differ by 3 on average .* of record 'p\d+'/0 .* cannot be trust"
    with pytest.raises(DataError, match=message):
        run_test(scorer, snapshot)


def test_a_teacher_that_says_the_same_of_everything(snapshot, monkeypatch):
    model, params = tiny()

    def program(*_):
        return lambda _params, arrays: score.ScoreOut(
            jnp.full(arrays["input_bt"].shape, -2.5), *[jnp.zeros((1, 1, 0))] * 3
        )

    monkeypatch.setattr(score, "score_program", program)
    with pytest.raises(DataError, match=r"every token has log-prob -2\.500; the weights are damag"):
        run_test(Scorer(model, params), snapshot)


def test_records_that_see_each_other_are_found(snapshot, monkeypatch):
    """Without segments, a record's scores depend on what stands before it in its row."""
    model, params = tiny()
    pack = score.packed_rows

    def unkept(rows, length):
        batch = pack(rows, length)
        return {**batch, "segments_bt": np.ones_like(batch["segments_bt"])}

    monkeypatch.setattr(score, "packed_rows", unkept)
    scorer = dataclasses.replace(Scorer(model, params), batch_tokens=256)
    with pytest.raises(DataError, match="scored in another batch, log-probs differ"):
        run_test(scorer, snapshot)
