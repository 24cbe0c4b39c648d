# ruff: noqa: E501  (lines as XLA writes them)
"""What is read from XLA's text of a compiled program: loops, collectives, memory traffic."""

import jax
import jax.numpy as jnp
import pytest

from opd_jax.fit.collectives import (
    Collective,
    axes_of,
    collectives,
    group_of,
    network_share,
    sent_bytes,
)
from opd_jax.fit.compiling import said_bytes
from opd_jax.fit.hlo import Instruction, array_bytes, executed, parse_module
from opd_jax.fit.traffic import memory_traffic
from opd_jax.model.experts import Weights, expected_blocks, product_on

MESH = {"data": 1, "fsdp": 2, "tensor": 2}
TEXT = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%layer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %gathered = f32[16,4]{1,0} all-gather(%w), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %reduced-start = f32[8,4]{1,0} all-reduce-start(%w), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  %reduced = f32[8,4]{1,0} all-reduce-done(%reduced-start)
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %reduced)
}

%layer_end (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%piece (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %layers = (s32[], f32[8,4]{1,0}) while(%p), condition=%layer_end, body=%layer
}

%piece_end (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[8,4]{1,0} get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %w), direction=LT
}

%all-reduce-scatter (x: f32[8,4]) -> f32[4,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %whole = f32[8,4]{1,0} all-reduce(%x), channel_id=7, replica_groups={{0,2},{1,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[4,4]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={4,4}
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %pieces = (s32[], f32[8,4]{1,0}) while(%start), condition=%piece_end, body=%piece
  %counted = (s32[], f32[8,4]{1,0}) while(%pieces), condition=%piece_end, body=%layer, backend_config={"known_trip_count":{"n":"10"},"other":"{}"}
  %b = f32[8,4]{1,0} get-tuple-element(%counted), index=1
  %part = f32[4,4]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter
  %turned = f32[8,4]{1,0} collective-permute(%b), channel_id=9, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %alone = f32[8,4]{1,0} all-reduce(%turned), channel_id=11, replica_groups={{0},{1},{2},{3}}, to_apply=%add
  ROOT %c = f32[8,4]{1,0} copy(%alone)
}
"""


def instruction(attributes):
    return Instruction("x", "all-reduce", "f32[]", (), attributes)


def test_loops_run_as_often_as_their_counts_and_conditions_say():
    module = parse_module(TEXT)
    times = {}
    for _, found, count in executed(module, unknown_trips=5):
        times.setdefault(found.name, []).append(count)
    # 5 micro-batches of 3 layers, then 10 more layers.
    assert times["gathered"] == [15, 10]
    assert times["pieces"] == [1]
    assert "whole" not in times
    assert "sum" not in times


def test_collectives_are_counted_by_kind_and_axes():
    found = {(x.kind, x.axes): x for x in collectives(parse_module(TEXT), MESH, 5)}
    size = 8 * 4 * 4
    assert found["all-gather", "fsdp"].count == 25
    assert found["all-gather", "fsdp"].sent_bytes == 25 * size
    assert found["all-reduce", "tensor"].count == 25
    assert found["all-reduce", "tensor"].sent_bytes == 25 * size  # 2 x half of it
    assert found["reduce-scatter", "fsdp"].sent_bytes == size / 2
    assert found["collective-permute", "tensor"].sent_bytes == size
    assert len(found) == 4  # one among single devices sends nothing


def test_a_collective_in_several_parts_counts_once():
    text = TEXT.replace(
        "  ROOT %c =",
        "  %again = f32[8,4]{1,0} collective-permute(%b), channel_id=9, "
        "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}\n  ROOT %c =",
    )
    assert collectives(parse_module(text), MESH, 5) == collectives(parse_module(TEXT), MESH, 5)


def test_what_leaves_a_node_is_told_apart():
    found = collectives(parse_module(TEXT), MESH, 5, [0, 0, 1, 1])
    assert {x.axes: x.network_bytes for x in found if x.kind.startswith("all-")} == {
        "fsdp": 25 * 8 * 4 * 4,
        "tensor": 0,
    }
    assert not any(x.network_bytes for x in collectives(parse_module(TEXT), MESH, 5))


@pytest.mark.parametrize(
    ("kind", "size"),
    [("all-gather", 1), ("reduce-scatter", 16), ("all-reduce", 16), ("all-to-all", 16)],
)
def test_an_exchange_in_two_steps_sends_as_much_and_little_of_it_between_islands(kind, size):
    """16 devices on 2 nodes of 8: of the shards of an all-gather only one leaves a node by each."""
    ways, islands = 16, 2
    inside = ways // islands
    between = {
        "all-gather": sent_bytes(kind, size, islands),
        "reduce-scatter": sent_bytes(kind, size // inside, islands),
        "all-reduce": sent_bytes(kind, size // inside, islands),
        "all-to-all": size / ways * (ways - inside),
    }[kind]
    total = sent_bytes(kind, size, ways)
    assert total * network_share(kind, ways, islands) == pytest.approx(between)
    assert network_share(kind, ways, 1) == 0
    assert network_share(kind, islands, islands) == 1
    assert network_share("collective-permute", 2, 2) == 1


SLICED = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (w: f32[8,4]) -> f32[8,4] {
  %w = f32[8,4]{1,0} parameter(0)
  %token = token[] after-all()
  %reduced = f32[8,4]{1,0} all-reduce(%w), channel_id=4, replica_groups={{0,1}}, to_apply=%add
  %send.2 = (f32[8,4]{1,0}, u32[], token[]) send(%reduced, %token), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.3_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.2 = (f32[8,4]{1,0}, u32[], token[]) recv(%token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent.2 = token[] send-done(%send.2), channel_id=4, is_host_transfer=true
  %offloaded = (f32[8,4]{1,0}, u32[], token[]) send(%w, %token), channel_id=9, is_host_transfer=true
  ROOT %out = (f32[8,4]{1,0}, token[]) recv-done(%recv.2), channel_id=3, is_host_transfer=true
}
"""


def test_what_slices_send_each_other_by_their_hosts_is_a_collective():
    mesh = {"data": 3, "fsdp": 2}
    found = collectives(parse_module(SLICED), mesh, 1, [0, 0, 1, 1, 2, 2])
    size = 8 * 4 * 4
    assert sorted(found, key=lambda x: x.axes) == [
        Collective(
            "all-reduce", "data", 1, pytest.approx(2 * 2 / 3 * size), pytest.approx(4 / 3 * size)
        ),
        Collective("all-reduce", "fsdp", 1, size, 0),
    ]


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [0, 2]),
        ("replica_groups=[2,2]<=[4], to_apply=%add", [0, 1]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", [0, 2]),
        ("replica_groups=[1,4]<=[4]", [0, 1, 2, 3]),
        ("replica_groups={}, to_apply=%add", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=1] {'axis_0'}, x", [0, 2]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [0, 1]),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", [0, 2]),
    ],
)
def test_groups_are_read_from(attributes, group):
    assert group_of(instruction(attributes), MESH) == group


def test_axes_are_those_along_which_a_group_differs():
    assert axes_of([0, 1], MESH) == "tensor"
    assert axes_of([0, 3], MESH) == "fsdp+tensor"


def test_what_is_sent_on_a_ring():
    assert sent_bytes("all-gather", 10, 4) == 30
    assert sent_bytes("all-reduce", 10, 4) == 15
    assert sent_bytes("reduce-scatter", 8, 4) == 6
    assert sent_bytes("collective-permute", 8, 4) == 8


def test_bytes_of_arrays():
    assert array_bytes("f32[8,4]{1,0}") == 128
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/pred[7], s32[])") == 12 + 7 + 4
    on_chip = "f32[8]{0:T(8)S(1)}"
    assert array_bytes(on_chip) == 32
    assert array_bytes(on_chip, everywhere=False) == 0


TRAFFIC = """
%slice_of (stack: f32[10,8], at: s32[]) -> f32[8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,8}
  ROOT %row = f32[8]{0} bitcast(%one)
}

%write_to (stack: f32[10,8], row: f32[1,8], at: s32[]) -> f32[10,8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[10,8]{1,0} dynamic-update-slice(%stack, %row, %at, %zero)
}

%scatter_to (stack: f32[10,8], at: s32[2,1], rows: f32[2,8]) -> f32[10,8] {
  %stack = f32[10,8]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(1)
  %rows = f32[2,8]{1,0} parameter(2)
  ROOT %new = f32[10,8]{1,0} scatter(%stack, %at, %rows), to_apply=%put
}

ENTRY %main (a: f32[10,8], r: f32[1,8], i: s32[]) -> f32[10,8] {
  %a = f32[10,8]{1,0} parameter(0)
  %r = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[8]{0} fusion(%a, %i), kind=kLoop, calls=%slice_of
  %near = f32[8]{0:S(1)} negate(%row)
  %new = f32[10,8]{1,0} fusion(%a, %r, %i), kind=kLoop, calls=%write_to
  %places = s32[2,1]{1,0} constant({ {1}, {4} })
  %two = f32[2,8]{1,0} broadcast(%row), dimensions={1}
  %last = f32[10,8]{1,0} fusion(%new, %places, %two), kind=kLoop, calls=%scatter_to
  ROOT %sum = f32[10,8]{1,0} add(%last, %a)
}
"""


def test_slices_and_updates_in_place_move_no_more_than_themselves():
    row, whole, index = 8 * 4, 10 * 8 * 4, 4
    sliced = row + index + row
    to_chip = row
    written = row + index + row
    repeated = row + 2 * row
    scattered = 2 * index + 2 * row + 2 * row
    added = 3 * whole
    parts = sliced + to_chip + written + repeated + scattered + added
    assert memory_traffic(parse_module(TRAFFIC)) == parts


@pytest.mark.parametrize(
    ("problem", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (35.30G) exceeds available HBM (15.75G).",
            35.30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 24.87G of 15.75G hbm. Exceeded hbm capacity by 9.12G.",
            24.87,
        ),
        ("RESOURCE_EXHAUSTED: out of memory", 0),
    ],
)
def test_a_refusal_names_the_memory_that_it_would_take(problem, gib):
    assert said_bytes(problem) == int(gib * 2**30)


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        parse_module("HloModule empty")


def test_the_loops_over_blocks_of_experts_run_as_often_as_is_expected():
    """Forward and backward, each within a loop whose end XLA does not know."""
    experts, tokens, d, f = 8, 64, 4, 6
    shapes = [(experts, d, f), (experts, d, f), (experts, f, d)]
    weights = Weights(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes))
    x_td = jax.ShapeDtypeStruct((tokens, d), "float32")
    product = product_on("cpu", 2 * tokens, experts)  # two experts a token: 16 pairs each, by 8

    def grads(times, x_td, weights):
        expert_ts = jnp.argsort(x_td @ weights.gate_edf[:, :, 0].T)[:, :2]

        def loss(weights):
            return jnp.sum(product(x_td, jnp.ones((tokens, 2)), expert_ts, weights) ** 2)

        def step(_, weights):
            return jax.tree.map(jnp.subtract, weights, jax.grad(loss)(weights))

        return jax.lax.fori_loop(0, times, step, weights)

    shaped = jax.ShapeDtypeStruct((), "int32"), x_td, weights
    module = parse_module(jax.jit(grads).lower(*shaped).compile().as_text())
    found = [(where.name, x, n) for where, x, n in executed(module, 3)]
    loops = [x for _, x, _ in found if x.opcode == "while" and module.trips(x) == 20]
    assert len(loops) == 2  # 8 experts x (16 / 8 + 1 / 2) blocks
    bodies = {x.called[0] for x in loops}
    assert {n for name, _, n in found if name in bodies} == {3 * 20}


@pytest.mark.parametrize(
    ("share", "rows", "blocks"), [(16, 8, 2.5), (8, 8, 1.5), (0.5, 8, 0.39347), (0, 8, 0)]
)
def test_expected_blocks_of_an_expert(share, rows, blocks):
    assert expected_blocks(share, rows) == pytest.approx(blocks, abs=1e-5)
