import jax
import pytest

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.model.decode import split_layers
from opd_jax.model.spread import cuts
from tests.sampling.reference import random_params, tiny_model


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(8, ("tensor", "fsdp", "expert", "context")), (6, ("tensor",)), (3, ())],
)
def test_as_many_axes_as_divide_it(size, wanted):
    assert cuts(make_mesh(MeshConfig(tensor=2, fsdp=2)), size) == wanted


@pytest.mark.parametrize("sizes", [{"tensor": 2, "fsdp": 2}, {"fsdp": 2, "expert": 2}])
def test_a_device_holds_its_part_of_every_weight(sizes):
    """All but the router, norms and biases."""
    model = tiny_model("qwen3_moe", make_mesh(MeshConfig(**sizes)), num_kv_heads=4)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, model.abstract())
    split = split_layers(model, jax.device_put(random_params(model), shardings))
    for layer in split.pop("layers"):
        split |= {name: x for name, x in layer.items() if name.startswith("w")}
    assert {"embed", "head", "wq", "wk", "wo", "w_gate", "w_down"} <= split.keys()
    for name, weight in split.items():
        if weight.ndim > 1:
            assert weight.addressable_shards[0].data.size == weight.size / 4, name
