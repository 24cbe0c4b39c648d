import jax
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.data.records import Record
from opd_jax.data.store import create_store
from opd_jax.errors import DataError, ModelError
from opd_jax.model.transformer import LanguageModel
from opd_jax.teacher.batches import padding_share, score_batches
from opd_jax.teacher.score import Scorer
from opd_jax.teacher.score_pass import score_snapshot

forward = jax.jit(LanguageModel.forward, static_argnums=0)


def make_records(count=9, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        p, t = rng.integers(1, 9), rng.integers(1, 30)
        prompt = rng.integers(0, 64, p).astype(np.int32)
        response = rng.integers(0, 64, t).astype(np.int32)
        logprob = -rng.exponential(1, t).astype(np.float32)
        found.append(Record(f"p{i}", 0, prompt, response, logprob, "length"))
    return found


def oracle_logprobs(model, params, record):
    """[t, v] from one unpadded forward, log-softmax in float64."""
    tokens = np.concatenate([record.prompt_ids, record.response_ids])[None]
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    hidden = forward(model, params, tokens[:, :-1], positions[:, :-1]).hidden_btd
    logits = np.asarray(hidden, np.float64)[0] @ np.asarray(model.head(params), np.float64).T
    return oracles.log_softmax(logits)[len(record.prompt_ids) - 1 :]


@pytest.mark.exact
@pytest.mark.parametrize(
    "mesh", [None, MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=2, context=2)]
)
def test_scores_equal_an_unpadded_forward_in_float64(mesh):
    model, params = tiny(mesh=mesh and make_mesh(mesh))
    plain, _ = tiny()
    records = make_records(6)
    packed = [records[:1], records[1:3], records[3:]]
    found = Scorer(model, params, top_k=3, entropy=True).score(packed, length=128, rows=4)
    for record, scores in zip(records, found, strict=True):
        full = oracle_logprobs(plain, jax.device_get(params), record)
        want = full[np.arange(len(full)), record.response_ids]
        np.testing.assert_allclose(scores.logprob, want, atol=1e-4)
        probs = np.exp(full)
        np.testing.assert_allclose(scores.entropy, -(probs * full).sum(-1), atol=1e-4)
        order = np.argsort(-full, axis=-1)[:, :3]
        rest = 1 - np.take_along_axis(probs, order, -1).sum(-1)
        np.testing.assert_allclose(scores.topk_rest, rest, atol=1e-5)
        np.testing.assert_array_equal(scores.topk_ids, order)
        # float16: worst error 0.004 at these sizes
        np.testing.assert_allclose(
            scores.topk_logprob, np.take_along_axis(full, order, -1), atol=0.004
        )


@settings(max_examples=25)
@given(st.lists(st.integers(2, 400), min_size=1, max_size=60), st.integers(16, 2000))
def test_batches_cover_every_record_once_within_their_shape(tokens, batch_tokens):
    model, params = tiny()
    batches = score_batches(np.array(tokens), Scorer(model, params, 0, batch_tokens))
    assert sorted(i for b in batches for i in b.indices) == list(range(len(tokens)))
    for length in (lengths := {batch.length for batch in batches}):
        shapes = {(b.length, b.rows) for b in [b for b in batches if b.length == length][:-1]}
        assert len(shapes) <= 1  # the last of a length may have fewer rows
    assert len(lengths) <= 8
    assert [b.length for b in batches] == sorted((b.length for b in batches), reverse=True)
    for batch in batches:
        assert len(batch.packed) == batch.rows
        assert all(sum(tokens[i] - 1 for i in row) <= batch.length for row in batch.packed)
        assert batch.rows == 1 or batch.rows * batch.length <= batch_tokens


@pytest.mark.parametrize("longest", [300, 1200, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_padding_is_little_where_records_are_short_against_a_batch(longest, spread):
    model, params = tiny()
    rng = np.random.default_rng(0)
    tokens = np.minimum(np.exp(rng.normal(5.5, spread, 1000)).astype(int) + 8, longest)
    batches = score_batches(tokens, Scorer(model, params, 0, 8192))
    assert padding_share(batches, tokens) < 0.05


LONG = {  # of batches of 8,192 tokens; one record a row fits, two do not
    "much alike, one longer": lambda rng, n: np.r_[rng.integers(4150, 4250, n - 1), 6100],
    "0.51 to 0.6, one longer": lambda rng, n: np.r_[rng.integers(4178, 4915, n - 1), 8000],
    "two clusters": lambda rng, n: np.r_[
        rng.integers(1650, 1750, n // 2), rng.integers(4700, 4900, n // 2)
    ],
    "half a batch to a whole one": lambda rng, n: rng.integers(4100, 8192, n),
    "around half a batch": lambda rng, n: rng.integers(3277, 4915, n),
    "all longer than a batch": lambda rng, n: rng.integers(9000, 18_000, n),
    "one longer than two batches": lambda rng, n: np.r_[rng.integers(4150, 4900, n - 1), 20_000],
}


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=4)], ids=["one way", "four ways"])
@pytest.mark.parametrize("kind", LONG)
def test_padding_is_little_where_records_are_long_against_a_batch(kind, mesh):
    model, params = tiny(mesh=mesh and make_mesh(mesh))
    tokens = LONG[kind](np.random.default_rng(0), 1200)
    scorer = Scorer(model, params, 0, 8192)
    batches = score_batches(tokens, scorer)
    assert padding_share(batches, tokens) < 0.05
    assert len({batch.length for batch in batches}) <= 8
    most = max(8192, max(tokens) + 15)  # a device's rows: no longer than the longest record
    assert all(b.rows * b.length <= scorer.ways * most for b in batches)
    order = np.random.default_rng(1).permutation(len(tokens))
    shuffled = score_batches(tokens[order], scorer)
    assert [(b.rows, b.length) for b in batches] == [(b.rows, b.length) for b in shuffled]


def test_a_live_batch_has_no_more_rows_than_a_power_of_two_needs(monkeypatch):
    """Packed records need fewer rows than there are records."""
    model, params = tiny(mesh=make_mesh(MeshConfig(fsdp=2)))
    scorer, seen = Scorer(model, params, batch_tokens=6 * 128), []
    score = Scorer.score

    def noted(self, packed, length, rows):
        seen.append((len(packed), rows))
        return score(self, packed, length, rows)

    monkeypatch.setattr(Scorer, "score", noted)
    for count in (1, 9, 24, 60):
        assert len(scorer.score_all(make_records(count), 128)) == count
    assert {rows for _, rows in seen} == {2, 4, 6}
    for needed, rows in seen:
        assert needed <= rows < 2 * max(needed, 2)


@pytest.mark.exact
def test_a_pass_that_was_cut_off_ends_with_the_same_bits(tmp_path):
    model, params = tiny()
    scorer = Scorer(model, params, top_k=2, batch_tokens=64)
    results = []
    for name, cut in (("straight", None), ("cut", 2)):
        store = create_store(tmp_path / name, {})
        with store.writer() as writer:
            for record in make_records():
                writer.append(record)
        snapshot = store.freeze()
        scores = store.create_pass("teacher", {})
        if cut is not None:
            with pytest.raises(KeyboardInterrupt):
                score_snapshot(scorer, snapshot, scores, interrupt_after(cut), 0.0)
            done = len(scores.committed_records(snapshot))
            assert 0 < done < len(snapshot)
            scores = store.open_pass("teacher")
        score_snapshot(scorer, snapshot, scores, lambda *_: None, 0.0)
        results.append(scores.read_many(snapshot, range(len(snapshot))))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.logprob, b.logprob)
        np.testing.assert_array_equal(a.topk_logprob, b.topk_logprob)


def test_shares_are_whole_batches_and_make_the_pass_of_one(tmp_path):
    model, params = tiny()
    scorer = Scorer(model, params, top_k=2, batch_tokens=64)
    store = create_store(tmp_path, {})
    with store.writer() as writer:
        for record in make_records():
            writer.append(record)
    snapshot = store.freeze()
    whole, shared = (store.create_pass(name, {}) for name in ("whole", "shared"))
    score_snapshot(scorer, snapshot, whole, lambda *_: None, 0.0)
    batches = [set(b.indices) for b in score_batches(sum(snapshot.lengths()), scorer)]
    assert len(batches) > 4
    for index, wanted in ((2, batches[2::3]), (0, batches[0::3] + batches[2::3])):
        score_snapshot(scorer, snapshot, shared, lambda *_: None, 0.0, (index, 3))
        assert shared.committed_records(snapshot) == set.union(*wanted)
    score_snapshot(scorer, snapshot, shared, lambda *_: None, 0.0)  # alone, it does the rest
    everything = range(len(snapshot))
    pairs = zip(*(p.read_many(snapshot, everything) for p in (whole, shared)), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.logprob, b.logprob)
        np.testing.assert_array_equal(a.topk_logprob, b.topk_logprob)


def interrupt_after(batches):
    seen = []

    def on_batch(*_):
        seen.append(1)
        if len(seen) > batches:
            raise KeyboardInterrupt

    return on_batch


def test_a_broken_teacher_is_named_with_the_record():
    model, params = tiny()
    params = {**params, "final_norm": params["final_norm"] * np.nan}
    with pytest.raises(DataError, match="log-prob nan at response token 0 of record 'p0'/0"):
        Scorer(model, params).score([make_records(1)], length=48, rows=1)


def test_more_top_k_than_vocabulary():
    model, params = tiny()
    with pytest.raises(ModelError, match="top_k=65 is more than the teacher's vocabulary of 64"):
        Scorer(model, params, top_k=65)


@pytest.mark.exact
def test_all_at_once_and_in_batches_give_the_same_scores():
    model, params = tiny()
    records = make_records(7)
    whole = Scorer(model, params, top_k=2, batch_tokens=48 * 8).score_all(records, 48)
    pieces = Scorer(model, params, top_k=2, batch_tokens=48 * 3).score_all(records, 48)
    assert len(whole) == len(pieces) == 7
    for record, a, b in zip(records, whole, pieces, strict=True):
        assert a.logprob.shape == record.response_ids.shape
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-5)
        np.testing.assert_array_equal(a.topk_ids, b.topk_ids)


def test_a_token_beyond_the_teachers_vocabulary_is_named():
    model, params = tiny()
    record = make_records(1)[0]
    last = model.arch.vocab_size
    record.response_ids[0] = last
    with pytest.raises(DataError, match=rf"record 'p0'/0 has token {last}, .* ends at {last - 1}"):
        Scorer(model, params).score([[record]], length=48, rows=1)
