"""On several CPU devices a step's collectives stay in order, however it is compiled."""

import jax
import optax
import pytest
from collective_order import unordered
from mesh_gradients import EXPERTS, packed_batch
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.train.step import Objective, abstract_state, make_train_step

UNTIED = {"tie_embeddings": False}


@pytest.mark.exact
@pytest.mark.first_by_default
@pytest.mark.parametrize(
    ("axes", "changes", "objective", "pieces"),
    [
        ({"data": 2, "fsdp": 2}, UNTIED, "sampled", 2),
        ({"data": 2, "fsdp": 2}, UNTIED, "sampled", 1),
        ({"data": 4}, UNTIED, "sft", 1),
        ({"data": 2, "tensor": 2}, UNTIED, "topk", 2),
        ({"fsdp": 2, "tensor": 2}, {}, "topk", 1),
        ({"data": 2, "context": 2}, {}, "sampled", 1),
        ({"fsdp": 2, "expert": 2}, EXPERTS, "sampled", 2),
        ({"data": 2, "expert": 2}, EXPERTS, "sampled", 1),
    ],
)
def test_what_stands_behind_a_loop_needs_it(axes, changes, objective, pieces):
    mesh = make_mesh(MeshConfig(**axes))
    model, _ = tiny(mesh, **changes)
    optimizer = optax.adamw(1e-3)
    step = make_train_step(model, Objective(objective), optimizer, pieces)
    cut = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in packed_batch().items()}
    text = step.lower(abstract_state(model, optimizer), cut).compile().as_text()
    assert "all-" in text
    assert unordered(text) == []
