"""Which device stands where: fake devices that know their slice, their place and their node."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import MESH_AXES, make_mesh
from opd_jax.core.mesh_layout import across_islands, device_grid, island_of, islands_of
from opd_jax.errors import ConfigError


@dataclass(frozen=True)
class Fake:
    id: int
    platform: str
    device_kind: str
    coords: tuple[int, ...]
    slice_index: int = 0
    process_index: int = 0
    core_on_chip: int = 0


def slices(count: int, sides: Sequence[int], kind: str = "TPU v5 lite") -> list[Fake]:
    """Devices as JAX lists them: slice by slice, x fastest."""
    places = [place[::-1] for place in itertools.product(*map(range, reversed(sides)))]
    return [
        Fake(1000 * number + at, "tpu", kind, place, number)
        for number in range(count)
        for at, place in enumerate(places)
    ]


def nodes(count: int, cards: int = 8) -> list[Fake]:
    """Absent cards, whose slice is 0 everywhere."""
    return [
        Fake(cards * node + card, "gpu", "NVIDIA H100", (node, card, 0))
        for node in range(count)
        for card in range(cards)
    ]


def layout(devices, **sizes):
    """Islands of a mesh's devices, in its shape, and the devices."""
    grid = device_grid(devices, {axis: sizes.get(axis, 1) for axis in MESH_AXES})
    assert sorted(x.id for x in grid.flat) == sorted(x.id for x in devices)
    return np.vectorize(island_of)(grid), grid


def crossing(islands):
    """The axes along which some neighbours are in different islands."""
    return {
        axis for number, axis in enumerate(MESH_AXES) if (np.diff(islands, axis=number) != 0).any()
    }


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 16},
        {"data": 4, "fsdp": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "tensor": 4, "context": 2},
        {"data": 32},
    ],
)
def test_only_data_crosses_slices(sizes):
    mixed = random.Random(0).sample(slices(2, (4, 4, 1)), 32)
    islands, _ = layout(mixed, **sizes)
    assert crossing(islands) == {"data"}
    assert (np.diff(islands, axis=0) >= 0).all()  # a slice's rows stay together


@pytest.mark.parametrize(
    ("sizes", "crossed"),
    [
        ({"fsdp": 16}, {"fsdp"}),
        ({"data": 2, "fsdp": 8}, {"data"}),
        ({"data": 2, "fsdp": 4, "tensor": 2}, {"data"}),
        ({"fsdp": 2, "tensor": 8}, {"fsdp"}),
        ({"data": 8, "expert": 2}, {"data"}),
    ],
)
def test_of_gpu_nodes_data_crosses_and_else_fsdp(sizes, crossed):
    islands, grid = layout(nodes(2), **sizes)
    assert crossing(islands) == crossed
    assert [x.id for x in grid.flat] == list(range(16))


def test_data_takes_what_it_can_and_fsdp_the_rest():
    islands, _ = layout(nodes(4), data=2, fsdp=4, tensor=4)
    assert crossing(islands) == {"data", "fsdp"}
    assert islands[:, :, 0, 0, 0].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert across_islands({"data": 2, "fsdp": 4, "tensor": 4}, 4) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 1,
    }


def test_three_nodes_of_two_halves():
    """`data` holds no 3: it stays inside the nodes, which a plain order would tear."""
    islands, _ = layout(nodes(3), data=2, fsdp=12)
    assert crossing(islands) == {"fsdp"}


def test_what_neither_can_hold_stays_in_order():
    assert across_islands({"data": 1, "fsdp": 1, "tensor": 16}, 2) is None
    _, grid = layout(nodes(2), tensor=16)
    assert [x.id for x in grid.flat] == list(range(16))
    _, grid = layout(nodes(2)[:12], fsdp=12)  # 8 and 4 of them
    assert [x.id for x in grid.flat] == list(range(12))


def neighbours_apart(grid, axis):
    """Links between devices next to each other along an axis of a mesh."""
    places = np.array([x.coords for x in grid.flat]).reshape(*grid.shape, 3)
    return np.abs(np.diff(places, axis=axis)).sum(-1).max()


def test_inside_a_slice_axes_follow_the_torus():
    devices = slices(1, (4, 4, 1))
    _, grid = layout(devices, fsdp=16)
    assert neighbours_apart(grid, 1) == 1  # a ring through all chips; in order there are jumps
    assert neighbours_apart(np.array(devices).reshape(1, 16, 1, 1, 1), 1) > 1
    _, grid = layout(slices(1, (4, 4, 4), "TPU v5"), fsdp=16, tensor=4)
    assert neighbours_apart(grid, 2) == 1
    _, grid = layout(slices(2, (4, 4, 1)), data=2, fsdp=8, tensor=2)
    assert neighbours_apart(grid, 2) == 1


def test_a_shape_that_has_no_place_on_the_torus_stays_in_order():
    """Chips with a hole among them: `mesh_utils` refuses, the order of JAX is kept."""
    devices = [x for x in slices(1, (4, 4, 1)) if x.coords[0] != 1]
    _, grid = layout(devices, fsdp=4, tensor=3)
    assert list(grid.flat) == devices


def test_cpus_are_in_one_island_and_in_order():
    devices = jax.devices()
    assert islands_of(devices) == [devices]
    grid = device_grid(devices, {"data": 2, "fsdp": 1, "tensor": 2})
    assert grid.flatten().tolist() == devices
    assert make_mesh(MeshConfig(fsdp=2, tensor=2)).devices.flatten().tolist() == devices


def test_one_slice_may_not_say_which_it_is():
    class Bare:
        platform, device_kind = "tpu", "TPU v5 lite"

    assert island_of(Bare()) == 0


@pytest.mark.parametrize("sizes", [{}, {"data": 3}, {"tensor": 16}])
def test_slices_that_data_does_not_hold_are_one_clear_line(sizes):
    config = MeshConfig(**({"fsdp": -1} | sizes))
    devices = slices(2, (4, 4, 1)) if sizes != {"data": 3} else slices(2, (2, 3, 1))
    with pytest.raises(ConfigError, match=r"set mesh\.data=2 or a multiple of it$") as caught:
        make_mesh(config, devices)
    assert "between the 2 TPU slices" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_slices_must_all_be_taken():
    with pytest.raises(ConfigError, match="takes 16 of 32 devices; with several TPU slices"):
        make_mesh(MeshConfig(data=2, fsdp=8), slices(2, (4, 4, 1)))


def test_a_mesh_of_slices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1), slices(2, (4, 4, 1)))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "tensor": 1, "expert": 1, "context": 1}
    assert [x.slice_index for x in mesh.devices.flat] == [0] * 16 + [1] * 16
