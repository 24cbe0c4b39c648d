"""The mesh of a config that names none, and others that may be faster.

Proposals come in an order of preference; the first that divides both models, the batches and the
rows is taken. It is the one with the most devices along `data` x `fsdp` x `expert`, which cut rows:
they send least as long as there are rows enough. What rows are too few for goes to `tensor`, inside
a node, and then to `context`. `data` holds the slices of a TPU, whatever the width of the weights
cannot be cut into, and further copies once a TPU's share of the state is small beside its memory:
of narrower shards the compiler sends more. A mixture's experts are cut over the devices of a GPU
node, which then gather the other weights alone; on TPUs they stay on `fsdp`, for there the buffers
of `model.moe` grow with the devices along `expert`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from opd_jax.config import Config, MeshConfig
from opd_jax.core.mesh import axis_size, make_mesh
from opd_jax.core.mesh_layout import islands_of
from opd_jax.core.peak import TPU_MEMORY
from opd_jax.errors import ConfigError, MeshError, ModelError
from opd_jax.model.architecture import Architecture
from opd_jax.model.load import architecture_of
from opd_jax.model.transformer import LanguageModel
from opd_jax.train.jobs import check_row_tokens, spread_batches

MOST_TENSOR = 8
"""Devices along `tensor`: as many as a node of GPUs has."""
SMALL = 0.1
"""Of a device's memory: a state that takes no more is not cut further."""
TRAINED, SCORING = 16, 4
"""Bytes of a parameter in float32: with its gradient and moments; alone."""
MOST_COMPILED = 4
"""Meshes that are worth compiling, the preferred one among them."""


def mesh_of(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The config's mesh on the devices, all of JAX's by default; chosen if the config names none.

    Raises:
        ConfigError: it does not fit the devices; or none of the proposals fits models and batches.
    """
    devices = jax.devices() if devices is None else devices
    return make_mesh(config.mesh or choices(config, devices, 1)[0], devices)


def choices(config: Config, devices: Sequence[Any], most: int = MOST_COMPILED) -> list[MeshConfig]:
    """Meshes that fit the devices, both models and the batches, the preferred one first.

    Each uses other axes than those before, or cuts another number of ways: not other copies, but
    for one in each of several nodes of GPUs, whose network is slower than what joins their cards,
    and on TPUs for one in each slice, which takes the least memory.

    A model that cannot be read has no say; whatever needs it tells what is wrong with it.

    Raises:
        MeshError: there is none; it says what is wrong with the preferred one.
    """
    models = list(_readable((config.model.student, config.model.teacher)))
    islands, tpu = islands_of(devices), devices[0].platform == "tpu"
    experts = math.gcd(*(arch.num_experts for arch in models))
    memory = TPU_MEMORY.get(devices[0].device_kind, 0) if tpu else 0
    found: dict[tuple[int | bool, ...], MeshConfig] = {}
    refused: ConfigError | None = None
    for mesh in proposals(
        len(devices),
        slices=len(islands) if tpu else 1,
        experts=math.gcd(experts, *map(len, islands)) if experts else 0,
        experts_first=not tpu,
        least=_least_devices(config, memory),
    ):
        one_each = mesh.data == len(islands) and (tpu or len(islands) > 1)
        kind = mesh.tensor, mesh.context, mesh.expert, one_each
        if kind in found:
            continue
        try:
            _check(config, models, make_mesh(mesh, devices))
        except ConfigError as error:
            refused = refused or error
            continue
        found[kind] = mesh
        if len(found) == most:
            break
    if not found:
        raise MeshError(
            f"mesh: no mesh of {len(devices)} devices fits models and batches; the first one: "
            f"{refused}"
        )
    return list(found.values())


def _readable(paths: Sequence[str]) -> Iterator[Architecture]:
    """Of the models that are here: not everything a run can do needs both."""
    for path in paths:
        with contextlib.suppress(ModelError):
            yield architecture_of(path)


def _least_devices(config: Config, memory: int) -> float:
    """Devices over which a share of the state is `SMALL` in so many bytes each; 0: unknown."""
    if not memory:
        return math.inf
    used = ((config.model.student, TRAINED), (config.model.teacher, SCORING))
    sizes = (each * _parameters(arch) for path, each in used for arch in _readable((path,)))
    return max(sizes, default=math.inf) / (SMALL * memory)


def _parameters(arch: Architecture) -> int:
    return sum(x.size for x in jax.tree.leaves(LanguageModel(arch).abstract()))


def _check(config: Config, models: Sequence[Architecture], mesh: Mesh) -> None:
    """Raises ConfigError if a batch, a row or a weight cannot be cut over the mesh."""
    spread_batches(config, axis_size(mesh, "batch"))
    check_row_tokens(config, axis_size(mesh, "time"))
    for arch in models:
        LanguageModel(arch, mesh=mesh).abstract()


def proposals(
    devices: int,
    slices: int,
    experts: int,
    *,
    experts_first: bool = False,
    least: float = math.inf,
) -> Iterator[MeshConfig]:
    """All meshes worth a thought, the preferred one first.

    Args:
        slices: of a TPU, with a slow network between them.
        experts: into how many parts a mixture's experts may be cut; 0 without a mixture.
        experts_first: prefer them in as many parts as possible, not in one.
        least: devices that a copy of the models should have, and no more than it takes.
    """

    def least_first(copies: int) -> tuple[bool, int]:
        """All copies that `least` leaves room for, or fewer; then more of them."""
        too_many = devices // slices // copies < least
        return too_many, copies if too_many else -copies

    for rest in _divisors(devices // slices):  # what rows are not cut over: nothing, if possible
        for tensor in reversed(_divisors(math.gcd(rest, MOST_TENSOR))):
            ways = devices // slices // rest
            for copies in sorted(_divisors(ways), key=least_first):
                cuts = {1, math.gcd(ways // copies, max(experts, 1))}
                for expert in sorted(cuts, reverse=experts_first):
                    yield MeshConfig(
                        data=slices * copies,
                        fsdp=ways // copies // expert,
                        tensor=tensor,
                        expert=expert,
                        context=rest // tensor,
                    )


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
