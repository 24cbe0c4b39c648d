"""No program of a run on four CPU devices lets them meet in different collectives."""

import subprocess
import sys

import pytest
from collective_order import unordered
from processes import LIMIT_SECONDS, quick_environment
from tiny_run import FRESH, ROOT, arguments

TEXT = """
HloModule jit_step, is_scheduled=true

%body (p: (s32[], u32[8], f32[8])) -> (s32[], u32[8], f32[8]) {
  %p = (s32[], u32[8]{0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = u32[8]{0} get-tuple-element(%p), index=1
  %same = f32[8]{0} get-tuple-element(%p), index=2
  %all = u32[16]{0} all-gather(%x), channel_id=1, dimensions={0}
  %next = u32[8]{0} slice(%all), slice={[0:8]}
  ROOT %out = (s32[], u32[8]{0}, f32[8]{0}) tuple(%i, %next, %same)
}

%end (p: (s32[], u32[8], f32[8])) -> pred[] {
  %p = (s32[], u32[8]{0}, f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %sum = s32[] all-reduce(%n), channel_id=6, to_apply=%add
  ROOT %less = pred[] compare(%sum, %sum), direction=LT
}

%called (c: f32[8]) -> f32[16] {
  %c = f32[8]{0} parameter(0)
  ROOT %inner = f32[16]{0} all-gather(%c), channel_id=7, dimensions={0}
}

ENTRY %main (a: f32[8], i: s32[], x: u32[8]) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  %x = u32[8]{0} parameter(2)
  %before = f32[16]{0} all-gather(%a), channel_id=2, dimensions={0}
  %b = (s32[], u32[8]{0}, f32[8]{0}) tuple(%i, %x, %a)
  %loop = (s32[], u32[8]{0}, f32[8]{0}) while(%b), condition=%end, body=%body
  %y = u32[8]{0} get-tuple-element(%loop), index=1
  %held = u32[16]{0} all-gather(%y), channel_id=3, dimensions={0}
  %z = f32[8]{0} get-tuple-element(%loop), index=2
  %unchanged = f32[16]{0} all-gather(%z), channel_id=8, dimensions={0}
  %other = f32[8]{0} all-to-all(%a), channel_id=4, dimensions={0}
  %two = f32[16]{0} all-gather(%a), channel_id=10, replica_groups={{0,1},{2,3}}, dimensions={0}
  %in_call = f32[16]{0} call(%a), to_apply=%called
  %as_condition = f32[8]{0} all-reduce(%a), channel_id=9, to_apply=%add
  ROOT %free = f32[16]{0} all-gather(%in_call), channel_id=5, dimensions={0}
}
"""


def test_collectives_that_a_loop_does_not_hold_back_are_found():
    free = ["unchanged", "other", "two", "in_call", "as_condition", "free"]
    found = [("loop", x) for x in free]
    assert unordered(TEXT) == [*found[:5], ("in_call", "as_condition"), *found[5:]]


@pytest.mark.slow
@pytest.mark.exact
@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2 fsdp=2", "data=2 tensor=2", "fsdp=2 context=2"])
def test_every_program_of_a_run_keeps_its_collectives_in_order(tmp_path, mesh):
    environment = quick_environment(4) | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["XLA_FLAGS"] += f" --xla_dump_to={tmp_path / 'programs'} --xla_dump_hlo_as_text"
    several = "train.runs.opd.micro_batch_size=4"  # with sums of micro-batches; others are whole
    trained = "train.enabled=[opd,opd_topk,opd_online]"
    axes = [f"mesh.{axis}" for axis in mesh.split()]
    words = arguments(tmp_path / "run", *FRESH, several, trained, *axes)
    command = [sys.executable, "-m", "opd_jax.main", *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=LIMIT_SECONDS)
    files = list((tmp_path / "programs").glob("*.cpu_after_optimizations.txt"))
    names = {file.name.split(".")[1] for file in files}
    assert names >= {"jit_prefill", "jit_start", "jit_decode_round", "jit_program", "jit_step"}
    found = {file.name: unordered(file.read_text()) for file in files}
    assert not {name: pairs for name, pairs in found.items() if pairs}
