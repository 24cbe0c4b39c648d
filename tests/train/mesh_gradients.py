"""Losses and gradients of packed rows on a mesh; as a program, on 8 devices against one."""

import functools
import json
import sys

import jax
import numpy as np
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh, put_batch
from opd_jax.data.collate import Scored
from opd_jax.data.records import Record, Scores
from opd_jax.train.sources import Packing
from opd_jax.train.step import Objective, gradients

EXPERTS = {
    "family": "qwen3_moe",
    "sparse_layers": (1,),
    "num_experts": 8,
    "experts_per_token": 3,
    "expert_ffn_dim": 12,
}
ROWS, ROW_TOKENS, SUPPORT = 8, 48, 3
EIGHT = {
    "fsdp 8": ({"fsdp": 8}, {}, 1),
    "data 2 x fsdp 4": ({"data": 2, "fsdp": 4}, {}, 1),
    "data 2 x fsdp 2 x context 2": ({"data": 2, "fsdp": 2, "context": 2}, {}, 2),
    "fsdp 4 x tensor 2": ({"fsdp": 4, "tensor": 2}, {}, 2),
    "fsdp 2 x expert 4": ({"fsdp": 2, "expert": 4}, EXPERTS, 1),
    "fsdp 2 x context 4": ({"fsdp": 2, "context": 4}, {}, 1),
    "context 2 x expert 4": ({"fsdp": 1, "context": 2, "expert": 4}, EXPERTS, 2),
}
"""Mesh, model, and micro-batches."""


@functools.cache
def packed_batch():
    """Each row holds three records; of those cuts of a row that fall on no border, most do not."""
    rng = np.random.default_rng(3)

    def one(length):
        prompt = int(rng.integers(1, 6))
        ids = rng.integers(0, 64, length + 1).astype(np.int32)
        response = length + 1 - prompt
        sampled, teacher = -rng.exponential(2, (2, response)).astype(np.float32)
        top = rng.integers(0, 64, (response, SUPPORT)).astype(np.int32)
        likely = (-1.5 - rng.exponential(1, (response, SUPPORT))).astype(np.float16)
        return Scored(
            Record("p", 0, ids[:prompt], ids[prompt:], sampled, "stop"),
            Scores(teacher, top, likely),
        )

    lengths = [[int(rng.integers(7, 16)), int(rng.integers(10, 20)), 12] for _ in range(ROWS)]
    scored = [one(length) for row in lengths for length in row]
    rows = np.arange(3 * ROWS).reshape(ROWS, 3).tolist()
    return Packing(ROW_TOKENS, support=SUPPORT).batch(rows, scored, (1, ROWS))


@functools.cache
def loss_and_gradients(objective, mesh=None, pieces=1, **changes):
    """Both over the loss's divisor, as a step uses them."""
    model, params = tiny(mesh and make_mesh(mesh), **changes)
    batch = packed_batch()
    if model.mesh is not None:
        batch = put_batch(model.mesh, batch)

    @jax.jit
    def run(params, batch):
        grads, loss = gradients(model, objective, params, batch, pieces)
        return loss.total / loss.divisor, jax.tree.map(lambda g: g / loss.divisor, grads)

    return jax.device_get(run(params, batch))


def largest_differences(objective, mesh, pieces=1, **changes):
    """Of the loss, and of any gradient."""
    loss, grads = loss_and_gradients(objective, mesh, pieces, **changes)
    wanted, want = loss_and_gradients(objective, **changes)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(want))
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), grads, want)
    return abs(float(loss) - float(wanted)), max(jax.tree.leaves(apart))


def main():
    jax.config.update("jax_disable_most_optimizations", True)  # as in `conftest.py`
    for name, (sizes, changes, pieces) in EIGHT.items():
        found = largest_differences(Objective("sampled"), MeshConfig(**sizes), pieces, **changes)
        json.dump({name: found}, sys.stdout)
        print(flush=True)


if __name__ == "__main__":
    main()
