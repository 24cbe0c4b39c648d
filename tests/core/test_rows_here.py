"""Which rows of a batch the devices of a process hold."""

import json

import pytest
from processes import run_two

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh, rows_here

TWO = """
import json
from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh, rows_here
cut = make_mesh(MeshConfig(fsdp=-1))
whole = make_mesh(MeshConfig(fsdp=1, tensor=jax.device_count()))
say(json.dumps([rows_here(*x).tolist() for x in ((cut, 16), (whole, 3), (cut, 3))]))
"""


def test_one_process_holds_all_rows():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    for where, rows in ((None, 3), (mesh, 4), (mesh, 3)):
        assert rows_here(where, rows).tolist() == [True] * rows


@pytest.mark.slow
def test_two_processes_hold_half_the_rows_each_or_all_that_are_not_cut(tmp_path):
    first, second = (json.loads(text) for text in run_two(TWO, tmp_path))
    assert first[0] == [True] * 8 + [False] * 8
    assert second[0] == [False] * 8 + [True] * 8
    assert first[1] == second[1] == first[2] == second[2] == [True] * 3
