import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from opd_jax.config import SamplingConfig
from opd_jax.core.rng import key_for, stable_hash
from opd_jax.sampling import transforms
from opd_jax.sampling.keys import root_key, sample_keys, token_keys
from opd_jax.sampling.transforms import bend, draw, transform_of, uses_of
from tests.sampling.reference import BENDS, assert_frequencies, bent_probs

pytestmark = pytest.mark.exact

LOGITS = np.array([2.0, 1.1, 0.3, -0.2, -1.0, 1.3, -3.0], np.float32)
DRAWS = 100_000


def sampling_of(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def bent_rows(logits_bv, *samplings):
    return bend(jnp.asarray(logits_bv), transform_of(samplings), uses_of(samplings))


def drawn(keys, logits_bv, **settings):
    samplings = [SamplingConfig(**settings)] * len(logits_bv)
    transform, uses = transform_of(samplings), uses_of(samplings)
    bent_bv = bend(logits_bv, transform, uses)
    return draw(keys, bent_bv, transform.temperature_b == 0, uses)


WAYS = pytest.mark.parametrize("direct", [6, 7], ids=["by blocks", "direct"])


def set_way(monkeypatch, direct):
    """Draw from the whole vocabulary, or first one of two blocks."""
    monkeypatch.setattr(transforms, "DIRECT", direct)
    monkeypatch.setattr(transforms, "BLOCKS", 2)


@pytest.mark.first_by_default
@pytest.mark.parametrize("name", sorted(BENDS, key=lambda name: name != "all"))
@WAYS
def test_frequencies_are_the_exact_ones(name, direct, monkeypatch):
    set_way(monkeypatch, direct)
    keys = jax.random.split(key_for(0, "test", name), DRAWS)
    logits_bv = jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    token_b = np.asarray(drawn(keys, logits_bv, **BENDS[name]))
    assert_frequencies(token_b, bent_probs(LOGITS, **BENDS[name]))


@WAYS
def test_greedy_is_the_likeliest_token_whatever_the_others_draw(direct, monkeypatch):
    set_way(monkeypatch, direct)
    # The likeliest token is not in the likeliest block.
    logits_v = np.array([0.0, 0.9, 0.9, 0.9, 1.0, -9.0, -9.0], np.float32)
    samplings = [SamplingConfig(temperature=0.0), SamplingConfig()] * 50
    transform, uses = transform_of(samplings), uses_of(samplings)
    keys = jax.random.split(key_for(0, "test"), len(samplings))
    bent_bv = bend(jnp.broadcast_to(logits_v, (len(samplings), 7)), transform, uses)
    token_b = draw(keys, bent_bv, transform.temperature_b == 0, uses)
    assert set(token_b[::2].tolist()) == {4}
    assert len(set(token_b[1::2].tolist())) > 2
    assert drawn(keys, jnp.asarray(logits_v)[None], temperature=0.0).tolist() == [4]


@settings(max_examples=60)
@given(
    arrays(np.int32, 9, elements=st.integers(-40, 40), unique=True),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 12),
    st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    st.sampled_from([0.0, 0.01, 0.6]),
)
def test_bend_is_the_definition(tenths_v, temperature, top_k, top_p, min_p):
    logits_v = tenths_v.astype(np.float32) / 10
    bent = bent_rows(logits_v[None], sampling_of(temperature, top_k, top_p, min_p))[0]
    wanted_v = bent_probs(logits_v, temperature, top_k, top_p, min_p)
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(bent)), wanted_v, atol=2e-5)


@pytest.mark.parametrize("top_p", [1e-45, 1e-50, 1e-20])
def test_the_likeliest_token_stays_however_small_top_p_is(top_p):
    bent = np.asarray(bent_rows(LOGITS[None], SamplingConfig(top_p=top_p)))[0]
    assert np.flatnonzero(np.isfinite(bent)).tolist() == [LOGITS.argmax()]


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    bent = np.asarray(bent_rows(LOGITS[None], SamplingConfig(temperature=temperature)))[0]
    assert not np.isnan(bent).any()
    assert bent.argmax() == 0 or temperature > 1


def test_no_pass_over_the_vocabulary_unless_asked_for():
    def program(**settings):
        keys, logits_bv = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 50))
        return jax.jit(lambda k, x: drawn(k, x, **settings)).lower(keys, logits_bv).as_text()

    plain = program(temperature=0.7, min_p=0.1)
    for text in (plain, program(top_p=0.9, top_k=3)):
        assert "sort" not in text
        assert "top_k" not in text
    assert plain.count("stablehlo.while") == program().count("stablehlo.while")
    assert program(top_p=0.9).count("stablehlo.while") > plain.count("stablehlo.while")


def test_every_row_has_its_own_settings():
    rng = np.random.default_rng(1)
    logits_bv = rng.normal(size=(len(BENDS) + 1, 9)).astype(np.float32)
    samplings = [SamplingConfig(**kind) for kind in BENDS.values()]
    together = bent_rows(logits_bv, *samplings, SamplingConfig(temperature=0.0))
    for row, kind in enumerate(BENDS.values()):
        wanted_v = bent_probs(logits_bv[row], **kind)
        np.testing.assert_allclose(jax.nn.softmax(together[row]), wanted_v, atol=2e-5)
        alone = bent_rows(logits_bv[row : row + 1], samplings[row])
        np.testing.assert_array_equal(jax.nn.softmax(alone[0]), jax.nn.softmax(together[row]))
    assert np.flatnonzero(np.isfinite(together[-1])) == [logits_bv[-1].argmax()]


def test_keys_are_those_of_key_for():
    base = sample_keys(jnp.asarray(root_key(3)), jnp.array([stable_hash("p")]), jnp.array([4]))
    key = token_keys(base, jnp.array([9]))[0]
    assert key == key_for(3, "sample", "p", 4, 9)
