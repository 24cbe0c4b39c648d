"""No program of a run lets processes on CPUs meet in different collectives."""

import subprocess
import sys

import pytest
from collective_order import unordered
from processes import LIMIT_SECONDS, quick_environment
from tiny_run import FRESH, ROOT, arguments

TEXT = """
HloModule jit_step, is_scheduled=true

%body (p: (s32[], u32[8])) -> (s32[], u32[8]) {
  %p = (s32[], u32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = u32[8]{0} get-tuple-element(%p), index=1
  %all = u32[16]{0} all-gather(%x), channel_id=1, dimensions={0}
  ROOT %out = (s32[], u32[8]{0}) tuple(%i, %x)
}

%end (p: (s32[], u32[8])) -> pred[] {
  %p = (s32[], u32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[8], b: (s32[], u32[8])) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %b = (s32[], u32[8]{0}) parameter(1)
  %before = f32[16]{0} all-gather(%a), channel_id=2, dimensions={0}
  %loop = (s32[], u32[8]{0}) while(%b), condition=%end, body=%body
  %y = u32[8]{0} get-tuple-element(%loop), index=1
  %held = u32[16]{0} all-gather(%y), channel_id=3, dimensions={0}
  %other = f32[8]{0} all-reduce(%a), channel_id=4, to_apply=%add
  ROOT %free = f32[16]{0} all-gather(%a), channel_id=5, dimensions={0}
}
"""


def test_a_collective_that_a_loop_does_not_hold_back_is_found():
    assert unordered(TEXT) == [("loop", "free")]


@pytest.mark.slow
def test_every_program_of_a_run_keeps_its_collectives_in_order(tmp_path):
    environment = quick_environment(4) | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["XLA_FLAGS"] += f" --xla_dump_to={tmp_path / 'programs'} --xla_dump_hlo_as_text"
    words = arguments(tmp_path / "run", *FRESH, "train.enabled=[opd,opd_topk,opd_online]")
    command = [sys.executable, "-m", "opd_jax.main", *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=LIMIT_SECONDS)
    files = list((tmp_path / "programs").glob("*.cpu_after_optimizations.txt"))
    names = {file.name.split(".")[1] for file in files}
    assert names >= {"jit_prefill", "jit_start", "jit_decode_round", "jit_program", "jit_step"}
    found = {file.name: unordered(file.read_text()) for file in files}
    assert not {name: pairs for name, pairs in found.items() if pairs}
