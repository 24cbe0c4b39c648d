"""Run in a process of its own: compile the sampler's programs for absent devices.

python tests/fit/compile_sampler.py v5e:2x4 shared
python tests/fit/compile_sampler.py h100:8 experts
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from compilers import serve

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh, replicated
from opd_jax.fit.topology import devices_of
from opd_jax.model.architecture import Architecture
from opd_jax.model.cache import Pages, PromptPages, cache_token_bytes, page_table
from opd_jax.model.decode import split_layers
from opd_jax.model.transformer import LanguageModel
from opd_jax.sampling import engine
from opd_jax.sampling.transforms import BLOCKS, Transform, Uses

PROMPT, ROWS = 256, 8
DENSE = Architecture(  # Qwen3-0.6B with two layers
    family="qwen3",
    vocab_size=151936,
    embed_dim=1024,
    ffn_dim=3072,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=True,
    max_position=4096,
)
EXPERTS = dataclasses.replace(
    DENSE,
    family="qwen3_moe",
    sparse_layers=(0, 1),
    num_experts=32,
    experts_per_token=4,
    expert_ffn_dim=768,
    norm_topk_prob=True,
)
CASES = {
    "shared": (DENSE, MeshConfig(fsdp=2, tensor=2, data=2), PromptPages(2, 4, PROMPT)),
    "experts": (EXPERTS, MeshConfig(fsdp=2, tensor=2, expert=2), None),
}
COLLECTIVE = re.compile(
    r"= (?P<result>[^=]*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute"
    r"|reduce-scatter|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
ARRAY = re.compile(r"(?P<dtype>pred|bf16|[suf]\d+)\[(?P<dims>[\d,]*)\]")


def collectives(program: str) -> list[dict]:
    """Kind, shape and bytes of the arrays that a program's collectives make."""
    found = []
    for line in COLLECTIVE.finditer(program):
        for array in ARRAY.finditer(line["result"]):
            dims = [int(x) for x in array["dims"].split(",") if x]
            width = 8 if array["dtype"] == "pred" else int(re.sub(r"\D", "", array["dtype"]))
            size = width // 8
            for dim in dims:
                size *= dim
            found.append({"kind": line["kind"], "dims": dims, "bytes": size})
    return found


def outputs(compiled, lowered):
    """What a program returns, as arguments of the next."""
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )


def compiled_programs(program, tokens):
    """Each program of the sampler with abstract arguments, compiled."""
    everywhere = replicated(program.mesh)

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def compile_(function, *args):
        lowered = function.lower(*args)
        compiled = lowered.compile()
        return compiled, outputs(compiled, lowered)

    params = program.model.abstract()
    split = compile_(split_layers, program.model, params)[1]
    state = compile_(engine.empty_state, program)[1]
    prompts = array((ROWS, tokens)), array((ROWS,))
    prefill, prefilled = compile_(engine.prefill, program, params, *prompts)
    ints, floats = array((ROWS,)), array((ROWS,), jnp.float32)
    pages = program.pages
    levels = (ints,) * len(pages.arrays)
    new = engine.Start(ints, ints, levels, *[ints] * 4, Transform(floats, ints, floats, floats))
    root = array((2,), jnp.uint32)
    start = compile_(engine.start, program, split, state, prefilled, new, root)[0]
    table = page_table(pages, array)
    wake, halt = array(()), array((program.slots,), jnp.bool_)
    decode = compile_(engine.decode_round, program, split, state, table, wake, halt)[0]
    return {"prefill": prefill, "start": start, "decode": decode}


def main(target: str, case: str) -> dict:
    arch, sizes, prompts = CASES[case]
    mesh = make_mesh(sizes, devices_of(target)[:8])
    model = LanguageModel(arch, "bfloat16", mesh=mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    pages = Pages((2, 1), 512, shards, prompts)
    uses = Uses(temperature=True, top_p=True)
    program = engine.Program(model, pages, uses, (151645,), mesh, 64)
    programs = compiled_programs(program, PROMPT)
    memory = {name: compiled.memory_analysis() for name, compiled in programs.items()}
    return {
        "devices": mesh.size,
        "hidden_bytes": 4 * program.slots * arch.embed_dim,
        "noise_bytes": 4 * program.slots * arch.vocab_size // BLOCKS,  # of one block of tokens
        "cache_bytes": pages.tokens * cache_token_bytes(model) // shards // mesh.shape["tensor"],
        "collectives": collectives(programs["decode"].as_text()),
        "programs": {
            name: {"alias_bytes": x.alias_size_in_bytes, "temp_bytes": x.temp_size_in_bytes}
            for name, x in memory.items()
        },
    }


if __name__ == "__main__":
    serve(main)
