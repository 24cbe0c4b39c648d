"""Run in a process of its own: compile a train step for absent devices, print its memory.

python tests/fit/compile_step.py v5e:2x2 offload
python tests/fit/compile_step.py h100:4 full 0 host   # with optim.offload
python tests/fit/compile_step.py h100:4 full 64    # two layers, each with 64 experts
python tests/fit/compile_step.py v5e:2x2 full 0 host 400    # on a TPU that has 400 MiB
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from compilers import serve

from opd_jax.config import MeshConfig
from opd_jax.config_train import LoopConfig, OptimConfig
from opd_jax.core.mesh import batch_sharding, make_mesh
from opd_jax.fit.draft import device_bytes
from opd_jax.fit.topology import devices_of
from opd_jax.model.architecture import Architecture
from opd_jax.model.transformer import LanguageModel
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.step import Objective, abstract_state, make_train_step

ROWS, TOKENS = 4, 1024
V5E_BYTES = round(15.75 * 2**30)
KERNEL = r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)"'
ARCHITECTURE = Architecture(
    family="qwen3",
    vocab_size=4096,
    embed_dim=512,
    ffn_dim=1024,
    num_layers=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=True,
    max_position=4096,
)


def with_experts(experts: int) -> Architecture:
    return dataclasses.replace(
        ARCHITECTURE,
        family="qwen3_moe",
        num_layers=2,
        sparse_layers=(0, 1),
        num_experts=experts,
        experts_per_token=8,
        expert_ffn_dim=256,
    )


def compiled_step(mesh, arch, remat, rows, moments="device", options=None):
    """The step, and its abstract state."""
    model = LanguageModel(arch, "bfloat16", remat, mesh)
    optim = OptimConfig(offload=moments == "host")
    optimizer = make_optimizer(model, LoopConfig(optim=optim))

    def array(dtype):
        return jax.ShapeDtypeStruct((rows, TOKENS), dtype, sharding=batch_sharding(mesh))

    batch = {name: array(jnp.int32) for name in ("input_bt", "target_bt", "positions_bt")}
    batch |= {name: array(jnp.float32) for name in ("teacher_bt", "sampler_bt", "weight_bt")}
    batch["mask_bt"] = array(jnp.bool_)
    step = make_train_step(model, Objective("sampled"), optimizer, 1)
    state = abstract_state(model, optimizer)
    return step.lower(state, batch).compile(options), state


def main(
    target: str, remat: str, experts: str = "0", moments: str = "device", room: str = ""
) -> dict:
    mesh = make_mesh(MeshConfig(), devices_of(target)[:4])
    arch = with_experts(int(experts)) if int(experts) else ARCHITECTURE
    reserved = V5E_BYTES - int(room or 0) * 2**20
    options = {"xla_tpu_user_reserved_hbm_bytes": str(reserved)} if room else None
    compiled, state = compiled_step(mesh, arch, remat, ROWS, moments, options)
    memory = compiled.memory_analysis()
    inputs = arch.num_layers * ROWS // mesh.size * TOKENS * arch.embed_dim * 2
    weights = len(arch.sparse_layers) * arch.num_experts * 3 * arch.embed_dim * arch.expert_ffn_dim
    return {
        "device_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "host_argument_bytes": memory.host_argument_size_in_bytes,
        "moments": device_bytes(state.opt_state),
        "largest_parameter": max(map(device_bytes, jax.tree.leaves(state.params))),
        "host_bytes": memory.host_temp_size_in_bytes,
        "layer_inputs": inputs,
        # In the loops over layers: forward, two backward, and what is repeated.
        "kernels": len(re.findall(KERNEL, compiled.as_text())),
        "expert_weights": weights,
        "pipelined": len(re.findall('"is_pipelined":true', compiled.as_text())),
    }


if __name__ == "__main__":
    serve(main)
