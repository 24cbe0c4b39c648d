"""Large arrays come to the host piece by piece, bit for bit, and never whole to one device."""

import hashlib
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from processes import run_two

from opd_jax.config import MeshConfig
from opd_jax.core import pieces as module
from opd_jax.core.lineage import fingerprint_params, leaf_header
from opd_jax.core.mesh import make_mesh
from opd_jax.core.pieces import _cutter, cuts, pieces

bf16 = jnp.dtype("bfloat16")
SHAPES = {
    "experts": (3, 8, 6, 10),
    "embed": (32, 24),
    "scale": (12, 8),
    "bias": (40,),
    "scalar": (),
    "none": (0, 4),
}
SPECS = {
    "experts": (None, "expert", ("fsdp", "context"), "tensor"),
    "embed": ("tensor", ("fsdp", "expert")),
    "scale": (("fsdp", "expert"), "tensor"),
    "bias": ("expert",),
}
MESHES = (
    {"expert": 4},
    {"fsdp": 2, "expert": 2},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "tensor": 2},
    {"data": 4},
)


def values_of(name, dtype):
    """Noise with what sums of floats would change: -0 and a subnormal number."""
    shape = SHAPES[name]
    noise = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    odd = np.array([0x80000000, 0x00010000, 0x80030000, 0x7F800000], np.uint32).view(np.float32)
    noise.reshape(-1)[: 4 * (noise.size > 4)] = odd[: noise.size]
    return (noise.view(np.uint32) >> 16).astype(np.uint16).view(dtype) if dtype == bf16 else noise


def leaves(mesh, dtype):
    """Device arrays that are cut in every way, and one that lies on one device."""
    found = {
        name: jax.device_put(
            values_of(name, dtype), NamedSharding(mesh, PartitionSpec(*SPECS.get(name, ())))
        )
        for name in SHAPES
    }
    return found | {"alone": jax.device_put(values_of("embed", dtype), jax.devices()[0])}


def whole_fingerprint(params):
    """As `fingerprint_params` was: each leaf at once."""
    digest = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(p), x) for p, x in named(params)):
        digest.update(leaf_header(path, leaf.shape))
        digest.update(np.ascontiguousarray(np.asarray(leaf).astype(np.float32)).data)
    return digest.hexdigest()


def named(params):
    return jax.tree_util.tree_leaves_with_path(params)


@pytest.mark.parametrize("limit", [100, 1000])
@pytest.mark.parametrize("dtype", [jnp.dtype("float32"), bf16], ids=str)
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_pieces_are_bounded_and_together_the_array_bit_for_bit(axes, dtype, limit, monkeypatch):
    params = leaves(make_mesh(MeshConfig(**{"fsdp": 1, **axes})), dtype)
    for name, leaf in params.items():
        found = list(pieces(leaf, limit))
        assert (len(found) > 1) == (leaf.nbytes > limit), name
        for piece in found:
            assert piece.nbytes <= limit, name
            assert piece is leaf or piece.is_fully_replicated, name
        joined = b"".join(np.asarray(piece).tobytes() for piece in found)
        assert joined == np.asarray(leaf).tobytes(), name
    monkeypatch.setattr(module, "PIECE_BYTES", limit)
    assert fingerprint_params(params) == whole_fingerprint(params)


def test_no_device_ever_holds_more_than_its_shard_or_a_piece():
    """Nor within the program that cuts: the compiler would gather whole what is cut there."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    for name, limit in itertools.product(("experts", "embed", "scale"), (100, 200)):
        leaf = leaves(mesh, jnp.float32)[name]
        starts, sizes = next(cuts(leaf.shape, 4, limit))
        text = _cutter(leaf.sharding, leaf.ndim, sizes).lower(leaf, starts).compile().as_text()
        held = [
            4 * math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)
        ]
        shard = leaf.addressable_shards[0].data.nbytes
        assert shard in held
        assert max(held) <= max(shard, limit), name


def test_a_piece_is_begun_when_the_one_before_is_there(monkeypatch):
    """Programs of several devices that pile up can wait for each other for ever."""
    seen = []

    class Piece:
        def block_until_ready(self):
            seen.append("there")

    monkeypatch.setattr(module, "_cutter", lambda *_: lambda *_: seen.append("begun") or Piece())
    assert len(list(pieces(jnp.zeros(8), 16))) == 2
    assert seen == ["begun", "there"] * 2


@pytest.mark.parametrize(
    ("shape", "limit", "count", "largest"),
    [
        ((48, 128, 2048, 768), 256 * 2**20, 48 * 2, (1, 64)),
        ((48, 2048, 4096), 256 * 2**20, 3, (16,)),
        ((151936, 2048), 256 * 2**20, 3, (50646,)),
        ((48, 2048), 256 * 2**20, 1, ()),
        ((7, 5), 20, 4, (2,)),
        ((7, 5), 1, 35, (1, 1)),
    ],
)
def test_cuts_are_few_and_cover_the_array_in_order(shape, limit, count, largest):
    found = list(cuts(shape, 2, limit))
    assert len(found) == count
    assert found[0][1] == largest
    inner = math.prod(shape[len(largest) :])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(largest))]
    end = 0
    for starts, sizes in found:
        assert sum(map(math.prod, zip(starts, strides, strict=True))) == end
        end += math.prod(sizes) * inner
    assert end == math.prod(shape)


TWO = """
import hashlib
import numpy as np
from jax.experimental import multihost_utils
from opd_jax.config import MeshConfig
from opd_jax.core import lineage, pieces
from opd_jax.core.mesh import make_mesh
from jax.sharding import NamedSharding, PartitionSpec

pieces.PIECE_BYTES = 400
gather, cutter, sizes = multihost_utils.process_allgather, pieces._cutter, []

def watched(x, tiled=False):
    sizes.append(x.nbytes)
    return gather(x, tiled=tiled)

def cutting(*given):
    def cut(*arrays):
        piece = cutter(*given)(*arrays)
        sizes.append(piece.nbytes)
        return piece
    return cut

multihost_utils.process_allgather, pieces._cutter = watched, cutting
n = jax.device_count()
for axes, spec in (({"fsdp": n}, ("fsdp",)), ({"expert": n}, (None, "expert"))):
    sharding = NamedSharding(make_mesh(MeshConfig(**{"fsdp": 1, **axes})), PartitionSpec(*spec))
    value = np.random.default_rng(0).standard_normal((8, 16, 10)).astype(np.float32)
    params = {
        "large": jax.make_array_from_callback(value.shape, sharding, lambda at: value[at]),
        "small": jax.make_array_from_callback((8, 8), sharding, lambda at: value[:, :8, 0][at]),
    }
    found = lineage.fingerprint_params(params)
    want = hashlib.sha256()
    for name, host in (("large", value), ("small", value[:, :8, 0])):
        want.update(lineage.leaf_header(f"['{name}']", host.shape))
        want.update(np.ascontiguousarray(host).data)
    say(found == want.hexdigest(), 0 < max(sizes) <= 400)
"""


@pytest.mark.slow
def test_two_processes_have_one_fingerprint_from_bounded_gathers(tmp_path):
    for output in run_two(TWO, tmp_path):
        assert output.splitlines() == ["True True"] * 2
