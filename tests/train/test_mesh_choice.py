"""The mesh of a config that names none."""

import json
import math
from pathlib import Path

import jax
import pytest

from opd_jax.config import MeshConfig
from opd_jax.config_load import load_config
from opd_jax.errors import ConfigError
from opd_jax.train.mesh_choice import choices, mesh_of, proposals
from tests.core.test_mesh_layout import nodes, slices

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STUDENT = QUICKSTART.parent / "quickstart" / "student" / "config.json"


def config_with(tmp_path, *words, **sizes):
    """The quickstart with another student and other settings."""
    (tmp_path / "config.json").write_text(json.dumps(json.loads(STUDENT.read_text()) | sizes))
    return load_config(str(QUICKSTART), [f"model.student={tmp_path}", *words])


def test_fsdp_takes_all_devices_where_rows_and_widths_allow(tmp_path):
    config = config_with(tmp_path)
    assert MeshConfig(**mesh_of(config).shape) == MeshConfig(fsdp=4)
    given = load_config(str(QUICKSTART), ["mesh.tensor=2"])
    assert mesh_of(given).shape["tensor"] == 2


@pytest.mark.parametrize(
    ("words", "sizes", "chosen"),
    [
        (("sft.batch_size=2", "sft.micro_batch_size=2"), {}, MeshConfig(fsdp=2, tensor=2)),
        (
            ("sft.batch_size=2", "sft.micro_batch_size=2"),
            {"num_attention_heads": 3, "num_key_value_heads": 1},
            MeshConfig(fsdp=2, context=2),
        ),
        ((), {"hidden_size": 66}, MeshConfig(data=2, fsdp=2)),
        (
            ("sft.batch_size=1", "sft.micro_batch_size=1"),
            {},
            MeshConfig(fsdp=1, tensor=2, context=2),
        ),
    ],
    ids=["too few rows", "heads that cannot be cut", "an odd width", "one row"],
)
def test_what_fsdp_cannot_take_goes_to_other_axes(tmp_path, words, sizes, chosen):
    assert choices(config_with(tmp_path, *words, **sizes), jax.devices(), 1) == [chosen]


def test_a_model_that_is_not_here_has_no_say(tmp_path):
    config = config_with(tmp_path, "model.teacher=nowhere", hidden_size=66)
    assert choices(config, jax.devices(), 1) == [MeshConfig(data=2, fsdp=2)]
    config = config_with(tmp_path, "model.teacher=nowhere", "model.student=nowhere")
    assert choices(config, jax.devices(), 1) == [MeshConfig(fsdp=4)]


def test_a_mesh_that_cannot_be_is_one_line_that_names_the_batch(tmp_path):
    config = config_with(tmp_path, "sft.batch_size=5", "sft.row_tokens=135")
    with pytest.raises(ConfigError, match=r"no mesh of 4 devices.*sft\.batch_size=5 is not"):
        mesh_of(config)


def test_others_worth_compiling_use_other_axes(tmp_path):
    found = choices(config_with(tmp_path), jax.devices())
    assert found[0] == MeshConfig(fsdp=4)
    assert found[1:] == [
        MeshConfig(fsdp=2, tensor=2),
        MeshConfig(fsdp=2, context=2),
        MeshConfig(fsdp=1, tensor=2, context=2),
    ]


def test_slices_lie_along_data_and_experts_are_spread():
    first, second = list(proposals(32, slices=2, experts=128))[:2]
    assert first == MeshConfig(data=2, fsdp=16)
    assert second == MeshConfig(data=2, fsdp=1, expert=16)
    assert next(proposals(8, slices=1, experts=0)) == MeshConfig(fsdp=8)
    first, second = list(proposals(16, slices=1, experts=8, experts_first=True))[:2]
    assert first == MeshConfig(fsdp=2, expert=8)
    assert second == MeshConfig(fsdp=16)
    for mesh in proposals(24, slices=2, experts=8):
        assert math.prod(mesh.model_dump().values()) == 24
        assert mesh.data % 2 == 0


def test_a_mixtures_experts_go_to_the_devices_of_a_node(tmp_path):
    """Of CPUs, all are one; 6 experts are cut in two. Of two nodes, not to all; on a TPU, not."""
    sizes = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    sizes |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = config_with(tmp_path, f"model.teacher={tmp_path}", **sizes)
    assert choices(config, jax.devices(), 2) == [MeshConfig(fsdp=2, expert=2), MeshConfig(fsdp=4)]
    many = config_with(tmp_path, f"model.teacher={tmp_path}", **sizes | {"num_experts": 16})
    assert choices(many, nodes(2), 1) == [MeshConfig(fsdp=2, expert=8)]
    tpus = slices(1, (4, 4, 1), "of no known memory")
    assert choices(many, tpus, 1) == [MeshConfig(fsdp=16)]
    dense = config_with(tmp_path)
    assert choices(dense, jax.devices(), 1) == [MeshConfig(fsdp=4)]
    # Across nodes a copy in each is worth a look, on slices of a TPU it is settled before.
    assert choices(dense, nodes(2), 2) == [MeshConfig(fsdp=16), MeshConfig(data=2, fsdp=8)]


@pytest.mark.parametrize(
    ("kind", "sides", "chosen"),
    [
        ("TPU v5", (2, 2, 2), MeshConfig(fsdp=8)),
        ("TPU v5", (2, 2, 4), MeshConfig(fsdp=16)),
        ("TPU v5", (4, 4, 4), MeshConfig(data=4, fsdp=16)),
        ("TPU v5 lite", (8, 8, 1), MeshConfig(fsdp=64)),
        ("TPU v5 lite", (8, 16, 1), MeshConfig(fsdp=128)),
        ("TPU v5 lite", (16, 16, 1), MeshConfig(data=2, fsdp=128)),
        ("TPU of tomorrow", (4, 4, 4), MeshConfig(fsdp=64)),
    ],
)
def test_a_state_that_is_small_in_memory_is_not_cut_further(tmp_path, kind, sides, chosen):
    """8 billion parameters, 16 bytes each: a tenth of 95 GiB on 13 devices, of 16 GiB on 77."""
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    sizes |= {"vocab_size": 151936, "tie_word_embeddings": False}
    words = ("model.teacher=nowhere", "sft.batch_size=512", "train.runs.opd.batch_size=512")
    config = config_with(tmp_path, *words, **sizes)
    assert choices(config, slices(1, sides, kind), 1) == [chosen]
    two = choices(config, slices(2, sides, kind), 1)
    assert two == [chosen.model_copy(update={"data": 2 * chosen.data})]
    whole = MeshConfig(fsdp=math.prod(sides))  # least memory: --fit auto compiles it, too
    assert whole in choices(config, slices(1, sides, kind), 2)
