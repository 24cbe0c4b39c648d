import json

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import rope_frequencies
from tiny_models import CONFIG

from opd_jax.errors import ModelError
from opd_jax.model.hf_config import architecture_from_hf, architecture_to_hf
from opd_jax.model.rope import frequencies, rope_tables, rotate

LENGTH = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, LENGTH: 64}
VARIANTS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {**LLAMA3, LENGTH: 64},
    "yarn": YARN,
    "yarn-whole-ramp": {**YARN, LENGTH: 4096, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-not-truncated": {**YARN, LENGTH: 4096, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7},
    "yarn-mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.3},
    "yarn-mscale-alone": {**YARN, "mscale": 0.8},
    "yarn-one-step": {**YARN, LENGTH: 7, "beta_fast": 1.0},
}


def arch_of(rope, **changes):
    sizes = {"head_dim": 16, "rope_parameters": {"rope_theta": 10000.0, **rope}}
    return architecture_from_hf(CONFIG | sizes | changes, "here")


@pytest.mark.parametrize("name", VARIANTS)
def test_tables_are_the_oracles(name):
    rope = VARIANTS[name]
    expected, factor = rope_frequencies(16, 10000.0, rope)
    np.testing.assert_allclose(frequencies(arch_of(rope)), expected, rtol=1e-12)
    cos, sin = rope_tables(jnp.array([[0, 1, 50]]), arch_of(rope))
    angle = np.array([0, 1, 50])[:, None] * np.array(expected)
    np.testing.assert_allclose(cos[0, :, 0], factor * np.cos(angle), atol=2e-5)
    np.testing.assert_allclose(sin[0, :, 0], factor * np.sin(angle), atol=2e-5)


def test_variants_differ_in_this_test():
    rows = [tuple(frequencies(arch_of(VARIANTS[name]))) for name in list(VARIANTS)[:6]]
    assert len(set(rows)) == 6
    for name in ("llama3", "yarn-whole-ramp"):  # one end kept, the other divided, some between
        ratio = frequencies(arch_of(VARIANTS["default"])) / frequencies(arch_of(VARIANTS[name]))
        factor = VARIANTS[name]["factor"]
        assert ratio[0] == pytest.approx(1)
        assert ratio[-1] == pytest.approx(factor)
        assert ((ratio > 1.01) & (ratio < factor - 0.01)).any()


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        arch = arch_of(VARIANTS["llama3"])
        q_at, k_at = (
            rotate(x, rope_tables(jnp.array([[p]]), arch)) for x, p in ((q, at_q), (k, at_k))
        )
        return float(jnp.sum(q_at * k_at))

    assert score(9, 4) == pytest.approx(score(45, 40), abs=1e-4)
    assert abs(score(9, 4) - score(9, 7)) > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
def test_transformers_4_and_5_say_the_same(name, kind_key):
    rope = dict(VARIANTS[name])
    old = {**rope, kind_key: rope.pop("rope_type")}
    if kind_key == "type":
        old.pop("rope_type")
    four = arch_of({}, rope_parameters=None, rope_scaling=old, rope_theta=10000.0)
    assert four == arch_of(VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dropped", ["rope_scaling", "rope_parameters", None])
def test_the_export_reads_back_by_either_generation(name, dropped):
    arch = arch_of(VARIANTS[name])
    written = json.loads(json.dumps(architecture_to_hf(arch)))
    if dropped == "rope_parameters" or name != "default":
        written.pop(dropped, None)
    assert architecture_from_hf(written, "there") == arch


def test_the_original_length_may_stand_beside_or_be_left_out():
    missing = {key: value for key, value in YARN.items() if key != LENGTH}
    assert arch_of(missing, **{LENGTH: 32}).rope_scaling.original_max_position == 32
    assert arch_of(missing).rope_scaling.original_max_position == 64  # max_position_embeddings
    derived = arch_of({**YARN, "factor": None, LENGTH: 32})
    assert derived.rope_scaling.factor == 2.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'", "yarn"]),
        ({"rope_scaling": {"type": "longrope"}}, ["rope_type='longrope'", "linear, llama3, yarn"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor=None"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, ["factor=-1"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, ["factor='x'"]),
        ({"rope_parameters": {**YARN, "short_factor": [1.0]}}, ["short_factor=[1.0]", "yarn"]),
        ({"rope_parameters": {**YARN, "truncate": 1}}, ["truncate=1"]),
        ({"rope_parameters": {**YARN, LENGTH: 0}}, [f"{LENGTH}=0"]),
        ({"rope_parameters": YARN, LENGTH: 32}, [f"{LENGTH}=64", "32"]),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, ["high_freq_factor=1.0"]),
        ({"rope_parameters": {"mrope_section": [1, 2]}}, ["mrope_section=[1, 2]"]),
        ({"rope_parameters": {"rope_theta": 0}}, ["rope_theta=0"]),
        ({"rope_theta": 7000.0}, ["rope_theta=5000.0", "rope_theta=7000.0", "disagree"]),
        ({"rope_scaling": {"rope_theta": 7e3}}, ["rope_theta=7000.0", "5000.0", "disagree"]),
        ({"rope_parameters": "yarn"}, ["rope_parameters='yarn'"]),
        ({"rope_parameters": YARN, "rope_scaling": LLAMA3}, ["disagree", "'llama3'", "'yarn'"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            ["full_attention="],
        ),
    ],
)
def test_refuses_by_name(changes, words):
    with pytest.raises(ModelError) as caught:
        architecture_from_hf(CONFIG | changes, "here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert "\n" not in message
    for word in words:
        assert word in message
