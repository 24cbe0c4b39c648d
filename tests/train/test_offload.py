"""Optimizer state in the host's memory: the same arithmetic, tree and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.config_train import LoopConfig, OptimConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.train import checkpoint
from opd_jax.train.optimizer import make_optimizer, result_of
from opd_jax.train.step import abstract_state, init_state

VARIANTS = [{}, {"moments": "int8", "ema": 0.5}, {"moments": "bfloat16"}]


def optimizer_of(model, offload, **optim):
    config = OptimConfig(learning_rate=1e-2, offload=offload, **optim)
    return make_optimizer(model, LoopConfig(steps=8, optim=config))


def after_updates(offload, sound, **optim):
    model, params = tiny(num_layers=1)
    optimizer = optimizer_of(model, offload, **optim)
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for size in (0.5, -2.0):
        grads = jax.tree.map(lambda x, size=size: size * jnp.cos(7 * x), params)
        updates, state = update(grads, state, params, sound=jnp.asarray(sound))
    return jax.device_get((updates, state))


@pytest.mark.first_by_default
@pytest.mark.parametrize("optim", VARIANTS, ids=["float32", "int8", "bfloat16"])
@pytest.mark.parametrize("sound", [True, False])
def test_updates_and_state_are_those_of_the_optimizer_as_a_whole(optim, sound):
    """Compiled in other pieces, so float32 may differ in its last bits."""
    plain, offloaded = (after_updates(x, sound, **optim) for x in (False, True))
    assert jax.tree.structure(plain) == jax.tree.structure(offloaded)
    assert any(x.any() for x in jax.tree.leaves(plain[0])) == sound
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(offloaded), strict=True):
        if np.issubdtype(a.dtype, np.integer):
            assert np.mean(a != b) < 1e-3
        else:
            rtol = 1e-5 if a.dtype == np.float32 else 1e-2  # a step of bfloat16
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9)


@pytest.mark.first_by_default
@pytest.mark.parametrize("optim", VARIANTS, ids=["float32", "int8", "bfloat16"])
def test_what_is_shaped_like_parameters_lies_on_the_host_and_checkpoints_fit_both(tmp_path, optim):
    model, params = tiny(make_mesh(MeshConfig(fsdp=2, tensor=2)), num_layers=1)
    optimizers = [optimizer_of(model, offload, **optim) for offload in (False, True)]
    abstract = [abstract_state(model, optimizer) for optimizer in optimizers]
    for tree, kind in zip(abstract, ("device", "pinned_host"), strict=True):
        assert {x.sharding.memory_kind for x in jax.tree.leaves(tree.params)} == {"device"}
        for x in jax.tree.leaves(tree.opt_state):
            assert x.sharding.memory_kind == (kind if x.ndim else "device")
    for i in (0, 1):
        state = init_state(model, optimizers[i], params)
        saved = jax.tree.map(lambda x: x.sharding, state)
        assert saved == jax.tree.map(lambda x: x.sharding, abstract[i])
        checkpoint.save(tmp_path / str(i), 1, state, {})
        for wanted in abstract:
            found, _, _ = checkpoint.restore(tmp_path / str(i), 1, wanted)
            assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
                lambda x: x.sharding, wanted
            )
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_average_comes_back_to_where_the_parameters_are():
    model, params = tiny(make_mesh(MeshConfig(fsdp=2, tensor=2)), num_layers=1)
    state = init_state(model, optimizer_of(model, True, ema=0.5), params)
    for x, like in zip(*map(jax.tree.leaves, (result_of(*state[:2]), params)), strict=True):
        assert x.sharding == like.sharding
        assert x.sharding.memory_kind == "device"
