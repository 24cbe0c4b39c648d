"""Optimizer state in the host's memory, which visits the device one parameter at a time.

Left to themselves compilers fetch all of it before the backward pass, where memory is scarcest.
So a fetch waits for the gradients' norm, and then for what the parameter before it sent back.
TPUs heed that where memory is scarce, and fetch two parameters' early where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

HOST = "pinned_host"
"""JAX's name for the host's memory that devices can copy from and to by themselves."""


class OnHost(optax.GradientTransformationExtraArgs):
    """An optimizer whose state, where it is shaped like parameters, lies in the host's memory."""


def one_at_a_time(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`inner` with its state on the host; the same arithmetic and the same tree of state.

    Args:
        inner: treats each parameter alone, and leaves out those given as `optax.MaskedNode`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return optax.tree_utils.tree_map_params(
            inner, lambda x: jax.device_put(x, jax.memory.Space.Host), inner.init(params)
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, sound: Any = True, **extra: Any
    ) -> tuple[Any, Any]:
        grads, tree = jax.tree.flatten(updates)
        values = tree.flatten_up_to(params)
        leaves, state_tree = jax.tree.flatten(state)
        owners = jax.tree.leaves(_owners(inner, state, tree))
        sent: tuple[list[int], Any] = [], sound  # what the next fetch waits for
        found: list[Any] = []
        after: list[Any] = leaves
        for i in range(len(grads)):
            own = [at for at, owner in enumerate(owners) if owner == i]
            waiting = [leaves[at] for at in own], sent[1]
            fetched, waited = jax.lax.optimization_barrier(waiting)
            _put(leaves, sent[0], waited)
            here = {
                at: jax.device_put(x, jax.memory.Space.Device)
                for at, x in zip(own, fetched, strict=True)
            }
            mine = state_tree.unflatten(
                here.get(at, x if owners[at] < 0 else optax.MaskedNode())
                for at, x in enumerate(leaves)
            )
            one = [tree.unflatten(_alone(xs, i)) for xs in (grads, values)]
            new, mine = inner.update(one[0], mine, one[1], sound=sound, **extra)
            found += jax.tree.leaves(new)
            after = jax.tree.leaves(mine, is_leaf=_masked)
            sent = own, [jax.device_put(after[at], jax.memory.Space.Host) for at in own]
        _put(leaves, *sent)
        shared = [at for at, owner in enumerate(owners) if owner < 0]
        _put(leaves, shared, [after[at] for at in shared])
        return tree.unflatten(found), state_tree.unflatten(leaves)

    return optax.GradientTransformationExtraArgs(init, update)


def _owners(inner: optax.GradientTransformation, state: Any, tree: Any) -> Any:
    """For every leaf of the state the number of its parameter, -1 for counters."""
    numbers = tree.unflatten(range(tree.num_leaves))
    return optax.tree_utils.tree_map_params(
        inner, lambda _, i: i, state, numbers, transform_non_params=lambda _: -1
    )


def _alone(leaves: Sequence[Any], wanted: int) -> list[Any]:
    return [x if i == wanted else optax.MaskedNode() for i, x in enumerate(leaves)]


def _masked(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


def _put(leaves: list[Any], places: Sequence[int], values: Any) -> None:
    for at, value in zip(places, values if places else (), strict=True):
        leaves[at] = value
