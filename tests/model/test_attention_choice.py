from types import SimpleNamespace

import jax
import numpy as np
import pytest

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh, platform_of
from opd_jax.errors import ConfigError
from opd_jax.model.attention_choice import AttentionCase, choose_attention


def case(**changes):
    plain = AttentionCase("cpu", "bfloat16", 4, 4096, 16, 8, 128, packed=False, mesh=None)
    return plain._replace(**changes)


TABLE = [
    ("splash", {"platform": "tpu"}),
    ("splash", {"platform": "tpu", "dtype": "float32", "packed": True, "head_dim": 576}),
    ("chunked", {"platform": "tpu", "tokens": 127}),
    ("triton", {"platform": "gpu"}),
    ("triton", {"platform": "gpu", "packed": True, "dtype": "float32"}),
    ("chunked", {"platform": "gpu", "head_dim": 512}),
    ("chunked", {"tokens": 1024}),
    ("chunked", {"batch": 1, "heads": 1, "kv_heads": 1, "tokens": 16384}),
]


@pytest.mark.parametrize(("name", "changes"), TABLE)
def test_auto(name, changes):
    assert choose_attention("auto", case(**changes)) == name


def test_the_mesh_may_rule_a_kernel_out():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert choose_attention("auto", case(platform="tpu", mesh=mesh)) == "splash"
    assert choose_attention("auto", case(platform="tpu", mesh=mesh, batch=3)) == "chunked"
    assert choose_attention("auto", case(platform="gpu", mesh=mesh, kv_heads=1)) == "chunked"


def test_cut_rows():
    mesh = make_mesh(MeshConfig(fsdp=1, context=4))
    assert choose_attention("auto", case(platform="tpu", mesh=mesh, tokens=512)) == "splash"
    assert choose_attention("auto", case(platform="tpu", mesh=mesh, tokens=508)) == "chunked"
    assert choose_attention("auto", case(platform="gpu", mesh=mesh)) == "chunked"
    with pytest.raises(ConfigError, match=r"reads whole rows, and mesh\.context cuts them; set it"):
        choose_attention("triton", case(platform="gpu", mesh=mesh))


@pytest.mark.parametrize("name", ["xla", "chunked"])
def test_xla_does_everything_that_is_asked_of_it(name):
    assert choose_attention(name, case(platform="tpu")) == name


def test_a_wish_within_reach():
    assert choose_attention("splash", case(platform="tpu", tokens=5)) == "splash"


REFUSED = [
    ("splash", {}, "runs on tpu only, and the devices are cpu; set it to 'chunked'"),
    (
        "triton",
        {"platform": "tpu"},
        "runs on gpu only, and the devices are tpu; set it to 'splash'",
    ),
    ("triton", {"platform": "gpu", "head_dim": 320}, "takes heads up to 128, not 320"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_a_wish_out_of_reach(name, changes, message):
    with pytest.raises(ConfigError, match=rf"^model\.attention: '{name}' .*{message}"):
        choose_attention(name, case(**changes))


def test_a_wish_that_the_mesh_does_not_divide():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    with pytest.raises(ConfigError, match="cuts 'kv_heads'=1 into 2 equal parts"):
        choose_attention("splash", case(platform="tpu", kv_heads=1, mesh=mesh))


def test_the_platform_is_that_of_the_mesh():
    assert platform_of(None) == jax.default_backend() == "cpu"
    assert platform_of(make_mesh(MeshConfig(fsdp=2))) == "cpu"
    for device, name in (("tpu", "tpu"), ("cuda", "gpu"), ("gpu", "gpu")):
        devices = np.array([[SimpleNamespace(platform=device)]])
        assert platform_of(SimpleNamespace(devices=devices)) == name
