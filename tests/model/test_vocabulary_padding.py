"""A vocabulary padded for the hardware: the same scores, samples and gradients as without."""

import dataclasses

import jax
import numpy as np
import pytest
from models import TINY, tiny

from opd_jax.config import MeshConfig, SamplingConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.data.records import Record
from opd_jax.errors import DataError, ModelError
from opd_jax.model.load import padding_start
from opd_jax.model.transformer import LanguageModel
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate
from opd_jax.teacher.score import Scorer
from opd_jax.train.step import Objective, batch_loss

ROWS, TOKENS = 72, 64


def padded(mesh=None, tied=True):
    """The tiny model with rows beyond its 64 tokens that would win if they counted."""
    arch = dataclasses.replace(TINY, vocab_size=ROWS, tie_embeddings=tied)
    model = LanguageModel(arch, mesh=mesh, padded_from=padding_start(arch, TOKENS))
    params = jax.device_get(tiny(tie_embeddings=tied)[1])
    extra = 9 * np.random.default_rng(1).normal(size=(ROWS - TOKENS, arch.embed_dim))
    for name in ("embed",) if tied else ("embed", "head"):
        params = params | {name: np.concatenate([params[name], extra]).astype(np.float32)}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, model.abstract())
    return model, jax.device_put(params, shardings if mesh else None)


def records(count=5):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, TOKENS, n).astype(np.int32)  # noqa: E731
    return [
        Record(f"p{i}", 0, draw(4), draw(9), np.zeros(9, np.float32), "length")
        for i in range(count)
    ]


MESHES = pytest.mark.parametrize(
    "mesh", [None, MeshConfig(fsdp=2, tensor=2)], ids=["one device", "vocabulary cut in two"]
)


def test_where_padding_starts():
    assert padding_start(TINY, 64) is None
    assert padding_start(TINY, 63) == 63
    assert LanguageModel(TINY, padded_from=63).vocabulary == 63
    assert LanguageModel(TINY).vocabulary == 64


@pytest.mark.first_by_default
@MESHES
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("top_k", [0, TOKENS])
def test_a_padded_teacher_gives_the_same_scores(mesh, tied, top_k):
    devices = mesh and make_mesh(mesh)  # the same for both: sums are rounded in the same order
    want = Scorer(*tiny(tie_embeddings=tied, mesh=devices), top_k)
    found = Scorer(*padded(devices, tied), top_k)
    want, found = (scorer.score([[r] for r in records()], 16, 8) for scorer in (want, found))
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got.logprob, expected.logprob, atol=2e-6)
        if top_k:
            assert got.topk_ids.max() < TOKENS
            np.testing.assert_allclose(got.topk_logprob, expected.topk_logprob, atol=4e-3)


def test_a_padded_row_is_no_token_to_score():
    model, params = padded()
    bad = dataclasses.replace(records(1)[0], response_ids=np.full(9, TOKENS, np.int32))
    with pytest.raises(DataError, match=r"has token 64, the teacher's vocabulary ends at 63"):
        Scorer(model, params).score([[bad]], 16, 1)
    with pytest.raises(ModelError, match=r"top_k=65 is more than the teacher's vocabulary of 64"):
        Scorer(model, params, TOKENS + 1)


@pytest.mark.first_by_default
@MESHES
@pytest.mark.parametrize("temperature", [1.0, 0.0, 1.7])
def test_a_padded_student_draws_the_same_tokens(mesh, temperature):
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=24, slots=4)
    requests = [Request(f"p{i}", 0, np.arange(3, dtype=np.int32) + i) for i in range(8)]

    def drawn(model, params):
        job = SamplingJob(model, params, sampling, (5,), 0)
        return {s.request.prompt_id: s for s in generate(job, requests)}

    want, got = drawn(*tiny()), drawn(*padded(mesh and make_mesh(mesh)))
    for name, sample in got.items():
        assert max(sample.token_ids) < TOKENS
        np.testing.assert_allclose(
            sample.logprobs[0], logprob_of(name, sample.token_ids[0]), atol=1e-4
        )
    if temperature == 0:
        assert [list(got[n].token_ids) for n in want] == [list(want[n].token_ids) for n in want]


def logprob_of(name, token):
    """Of a first token, from the model without padding."""
    model, params = tiny()
    prompt = np.arange(3, dtype=np.int32)[None] + int(name[1:])
    out = model.forward(params, prompt, np.arange(3, dtype=np.int32)[None])
    logits = out.hidden_btd[0, -1] @ model.head(params).T
    return np.asarray(jax.nn.log_softmax(logits))[token]


@pytest.mark.first_by_default
@MESHES
def test_a_padded_student_learns_the_same_and_its_padding_nothing(mesh):
    batch = {
        "input_bt": np.full((4, 6), 3, np.int32) + np.arange(6, dtype=np.int32),
        "target_bt": np.full((4, 6), 4, np.int32) + np.arange(6, dtype=np.int32),
        "positions_bt": np.broadcast_to(np.arange(6, dtype=np.int32), (4, 6)),
        "mask_bt": np.ones((4, 6), bool),
    }

    def gradient(model, params):
        return jax.jit(
            jax.grad(lambda params: batch_loss(model, Objective("sft"), params, batch).total)
        )(params)

    # Both on one mesh: what a mesh changes in the last digits is no matter of padding.
    want = gradient(*tiny(mesh and make_mesh(mesh), tie_embeddings=False))
    got = gradient(*padded(mesh and make_mesh(mesh), tied=False))
    assert not np.any(got["head"][TOKENS:])
    np.testing.assert_allclose(got["head"][:TOKENS], want["head"], atol=1e-5)
    np.testing.assert_allclose(got["embed"][:TOKENS], want["embed"], atol=1e-5)
