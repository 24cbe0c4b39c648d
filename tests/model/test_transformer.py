import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import filled
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import constrain, make_mesh, sharding_for
from opd_jax.errors import ConfigError
from opd_jax.model.cache import Pages
from opd_jax.model.decode import decode, split_layers
from opd_jax.model.transformer import LanguageModel

KINDS = [{}, {"qkv_bias": True, "qk_norm": False}, {"qk_norm": False, "tie_embeddings": False}]


forward = jax.jit(LanguageModel.forward, static_argnums=0)


def inputs(b=2, t=10):
    tokens = np.random.default_rng(0).integers(0, 64, (b, t)).astype(np.int32)
    return tokens, np.tile(np.arange(t, dtype=np.int32), (b, 1))


@pytest.mark.first_by_default
@pytest.mark.parametrize("kind", KINDS, ids=["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("cut", [1, 6])
def test_prefix_in_a_cache_then_single_tokens_equal_the_whole(kind, cut):
    model, params = tiny(**kind)
    tokens, positions = inputs()
    whole = forward(model, params, tokens, positions)
    first = forward(model, params, tokens[:, :cut], positions[:, :cut])
    rows, lengths = np.arange(2, dtype=np.int32), np.full(2, cut, np.int32)
    pages = Pages((2, 2), 5)
    cache, table = filled(model, pages, first[1:3], rows, lengths, 10)
    split = split_layers(model, params)
    for t in range(cut, 10):
        hidden_bd, cache = decode(model, pages, split, tokens[:, t], cache, table)
        np.testing.assert_allclose(hidden_bd, whole.hidden_btd[:, t], atol=1e-5)


def test_packed_rows_equal_separate_rows():
    model, params = tiny()
    tokens, positions = inputs(1, 10)
    segments = np.array([[1] * 4 + [2] * 5 + [0]], np.int32)
    packed_positions = np.concatenate([positions[:, :4], positions[:, :5], positions[:, :1]], 1)
    packed = forward(model, params, tokens, packed_positions, segments).hidden_btd
    first = forward(model, params, tokens[:, :4], positions[:, :4]).hidden_btd
    second = forward(model, params, tokens[:, 4:9], positions[:, :5]).hidden_btd
    np.testing.assert_allclose(packed[:, :9], jnp.concatenate([first, second], 1), atol=1e-5)


def test_a_later_token_changes_nothing_before_it():
    model, params = tiny()
    tokens, positions = inputs()
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 64
    a = forward(model, params, tokens, positions).hidden_btd
    b = forward(model, params, changed, positions).hidden_btd
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert np.abs(np.asarray(a[:, 7:] - b[:, 7:])).max() > 1e-3


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2)])
def test_sharded_equals_unsharded(mesh):
    tokens, positions = inputs(4)
    model, params = tiny(tie_embeddings=False)
    sharded, on_mesh = tiny(tie_embeddings=False, mesh=make_mesh(mesh))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(on_mesh), strict=True):
        np.testing.assert_array_equal(a, b)  # initial values do not depend on the mesh
    want = forward(model, params, tokens, positions).hidden_btd
    got = forward(sharded, on_mesh, tokens, positions).hidden_btd
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_remat_changes_no_gradient(remat):
    tokens, positions = inputs()
    plain, params = tiny()
    frugal = type(plain)(plain.arch, remat=remat)

    def loss(model, params):
        return jnp.sum(jnp.sin(forward(model, params, tokens, positions).hidden_btd))

    want = jax.jit(jax.grad(lambda p: loss(plain, p)))(params)
    got = jax.jit(jax.grad(lambda p: loss(frugal, p)))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_mesh_that_does_not_divide_the_model_is_refused_by_name():
    model, _ = tiny(num_heads=3, num_kv_heads=3)
    cut = type(model)(model.arch, mesh=make_mesh(MeshConfig(fsdp=1, tensor=4)))
    message = r"\.layers\.wk: dim 'kv_heads'=3 is not divisible by mesh axis 'tensor'=4"
    with pytest.raises(ConfigError, match=message):
        cut.abstract()


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError, match="needs 8 devices, 4 are here"):
        make_mesh(MeshConfig(fsdp=8))
    with pytest.raises(ConfigError, match="4 devices are not divisible by 3"):
        make_mesh(MeshConfig(tensor=3))


def test_sharding_rules_refuse_unknown_axes_and_collisions():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    with pytest.raises(ConfigError, match="unknown logical axis 'colour'"):
        sharding_for(mesh, ("colour",), (4,), ".x")
    with pytest.raises(ConfigError, match="both go to mesh axis 'tensor'"):
        sharding_for(mesh, ("ffn", "heads"), (4, 4), ".x")
    with pytest.raises(ConfigError, match="'batch'=3 is not divisible"):
        constrain(jnp.ones((3, 4)), mesh, ("batch", "time"), "x")


@pytest.mark.slow
def test_the_gradient_of_a_frequent_token_s_embedding_is_a_float32_sum():
    """In bfloat16 its sum over 1,200 positions would stop growing."""
    plain, params = tiny(num_layers=1)
    half = type(plain)(plain.arch, compute_dtype="bfloat16")
    rng = np.random.default_rng(0)
    t = 4096
    tokens = np.where(rng.random((1, t)) < 0.3, 7, rng.integers(0, 64, (1, t))).astype(np.int32)
    positions = np.broadcast_to(np.arange(t, dtype=np.int32), (1, t))

    def grads(model):
        def loss(embed):
            out = model.forward(params | {"embed": embed}, tokens, positions).hidden_btd
            return jnp.sum(out.astype(jnp.float32) @ jnp.arange(1.0, 1 + out.shape[-1]))

        return np.asarray(jax.jit(jax.grad(loss))(params["embed"]), np.float64)

    want, got = grads(plain), grads(half)
    off = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert off[7] < 3 * np.median(off)
    assert off[7] < 0.05
