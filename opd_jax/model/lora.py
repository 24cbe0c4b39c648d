"""Low-rank adapters: what is trained beside weights that stay as they are.

`W + (alpha / rank) A B` takes the place of a dense weight `W`; A is [inputs, rank], B [rank,
outputs]. Source: Hu et al., LoRA, arXiv 2106.09685. Adapters are a tree like the parameters, with
`{"a", "b"}` in the place of an adapted weight and nothing in the place of others; float32 whatever
the parameters are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opd_jax.config_train import LoraConfig
from opd_jax.core.mesh import sharding_for
from opd_jax.core.rng import key_for
from opd_jax.errors import ConfigError
from opd_jax.model.linear import CONTRACTED, Adapted
from opd_jax.model.transformer import LanguageModel, Params

_GROUPS = {name: "layers" if name in ("wq", "wk", "wv", "wo") else "dense" for name in CONTRACTED}


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model, without their values: hashable."""

    model: LanguageModel
    config: LoraConfig

    @property
    def mesh(self) -> Any:
        """Where they lie: the model's mesh."""
        return self.model.mesh

    @property
    def scale(self) -> float:
        """The factor before A B."""
        return self.config.alpha / self.config.rank

    def targets(self) -> tuple[str, ...]:
        """Names of the weights that are adapted.

        Raises:
            ConfigError: the model has no such dense weight, or none at all.
        """
        arch = self.model.arch
        has = [name for name in CONTRACTED if _GROUPS[name] == "layers" or arch.dense_layers]
        for name in self.config.targets or ():
            if name not in has:
                raise ConfigError(
                    f"lora.targets names '{name}', which the student ({arch.family}) has in "
                    f"experts only, and these are not adapted; choose from {', '.join(has)}"
                )
        return tuple(self.config.targets or has)

    def declaration(self) -> Params:
        """As `LanguageModel.declaration`: shape, and metadata `axes` and `decay`."""
        declared, tree = self.model.declaration(), {}
        for name in self.targets():
            group = _GROUPS[name]
            tree.setdefault(group, {})[name] = self._pair(name, declared[group][name])
        return tree

    def _pair(self, name: str, weight: nnx.Param[jax.ShapeDtypeStruct]) -> Params:
        """A has the weight's axes up to its last input, B those from its first output on."""
        shape, axes = weight.get_value().shape, weight.get_metadata("axes")
        border, rank = 1 + CONTRACTED[name], self.config.rank

        def part(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param[Any]:
            return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, decay=True)

        return {
            "a": part((*shape[:border], rank), (*axes[:border], "replicated")),
            "b": part((shape[0], rank, *shape[border:]), (axes[0], "replicated", *axes[border:])),
        }

    def abstract(self, dtype: str = "float32") -> Params:
        """Shape, dtype and (with a mesh) sharding of every adapter.

        Raises:
            ConfigError: as `targets`, or the mesh does not divide an adapter.
        """

        def leaf(path: Any, param: Any) -> jax.ShapeDtypeStruct:
            shape = param.get_value().shape
            where = "lora." + jax.tree_util.keystr(path, simple=True, separator=".")
            sharding = self.mesh and sharding_for(
                self.mesh, param.get_metadata("axes"), shape, where
            )
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

        return jax.tree_util.tree_map_with_path(leaf, self.declaration(), is_leaf=_is_param)

    def init(self, seed: int) -> Params:
        """A normal with variance 1 / inputs, B zero: the model starts as it is."""
        abstract = self.abstract()

        def make() -> Params:
            def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                if where.endswith("b"):
                    return jnp.zeros(like.shape)
                inputs = like.size // (like.shape[0] * like.shape[-1])
                return jax.random.normal(key_for(seed, "lora", where), like.shape) * inputs**-0.5

            return jax.tree_util.tree_map_with_path(leaf, abstract)

        shardings = self.mesh and jax.tree.map(lambda x: x.sharding, abstract)
        return jax.jit(make, out_shardings=shardings)()

    def attach(self, params: Params, adapters: Params) -> Params:
        """The parameters with `Adapted` leaves, for `LanguageModel.forward`."""

        def one(weight: jax.Array, pair: Params) -> Adapted:
            return Adapted(weight, pair["a"], pair["b"], self.scale)

        return _replaced(params, adapters, one)

    def merge(self, params: Params, adapters: Params) -> Params:
        """Plain parameters of the adapted model, in their own dtype; others are not copied."""

        def one(weight: jax.Array, pair: Params) -> jax.Array:
            sharding = None if self.mesh is None else weight.sharding
            return _merged(weight, pair["a"], pair["b"], self.scale, sharding)

        return _replaced(params, adapters, one)


def _is_param(node: object) -> bool:
    return not isinstance(node, dict)


def _replaced(params: Params, adapters: Params, one: Any) -> Params:
    groups = {
        group: {**params[group], **{n: one(params[group][n], pair) for n, pair in pairs.items()}}
        for group, pairs in adapters.items()
    }
    return {**params, **groups}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _merged(
    weight: jax.Array, a: jax.Array, b: jax.Array, scale: float, sharding: Any
) -> jax.Array:
    depth, rank = a.shape[0], a.shape[-1]
    product = a.reshape(depth, -1, rank) @ b.reshape(depth, rank, -1)
    new = (weight + scale * product.reshape(weight.shape)).astype(weight.dtype)
    return new if sharding is None else jax.lax.with_sharding_constraint(new, sharding)
