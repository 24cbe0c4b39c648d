"""Run in a process of its own: compile a train step for several TPU slices, print what it sends.

python tests/fit/compile_slices.py 2xv5e:2x2 2 4    # data 2, fsdp 4
"""

import dataclasses

from compile_step import ARCHITECTURE, compiled_step
from compilers import serve

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.core.mesh_layout import island_of
from opd_jax.fit.collectives import collectives
from opd_jax.fit.draft import device_bytes
from opd_jax.fit.hlo import parse_module
from opd_jax.fit.topology import devices_of
from opd_jax.model.transformer import LanguageModel

ARCH = dataclasses.replace(ARCHITECTURE, num_layers=4)


def main(target: str, data: str, fsdp: str) -> dict:
    mesh = make_mesh(MeshConfig(data=int(data), fsdp=int(fsdp)), devices_of(target))
    compiled, _ = compiled_step(mesh, ARCH, "full", mesh.size)
    islands = [island_of(device) for device in mesh.devices.flat]
    found = collectives(parse_module(compiled.as_text()), dict(mesh.shape), 1, islands)
    model = LanguageModel(ARCH, "bfloat16", "full", mesh)
    return {
        "islands": islands,
        "sent": [dataclasses.asdict(x) for x in found],
        "parameters": device_bytes(model.abstract()),
    }


if __name__ == "__main__":
    serve(main)
