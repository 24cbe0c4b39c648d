"""Every test runs on 4 fake CPU devices, without network, with silent rank promotion an error."""

import gc
import os
import tempfile

from processes import QUICK_FLAGS

# One folder of compiled programs for all workers and processes of these tests, and for no others:
# a new one, unless .ci/run names one for several calls.
if "PYTEST_XDIST_WORKER" not in os.environ:
    kept = tempfile.TemporaryDirectory(prefix="opd_jax_compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("OPD_JAX_COMPILED", kept.name)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `QUICK_FLAGS`, unless OPD_JAX_OPTIMIZED=1 asks for what users run, as .ci/run does for exactness.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4"
    if os.environ.get("OPD_JAX_OPTIMIZED")
    else f" --xla_force_host_platform_device_count=4 {QUICK_FLAGS}"
)

import uuid

import hypothesis
import jax
import pytest
import s3_server

# Files that take longest come first, so that no worker ends with one alone; those whose processes
# wait for each other and those that compile take turns. xdist would go by how many tests they have.
LONGEST = (
    *("test_lost_process", "test_fit_command", "test_step_compiles", "test_processes"),
    *("test_sampler_compiles", "test_kill", "test_endurance", "test_attention_compiles"),
    *("test_refresh", "test_shares", "test_kill_store", "test_mismatches", "test_store_tools"),
    *("test_lora_run", "test_transformers_parity", "test_smollm2_parity", "test_long_rows"),
    *("test_entry", "test_requests", "test_logprobs", "test_repair"),
)

hypothesis.settings.register_profile(  # no property is about time
    "here", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("here")
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.freeze()  # what was imported stays: the collector need not look at it over and over
gc.set_threshold(50_000, 20, 50)
if not os.environ.get("OPD_JAX_OPTIMIZED"):
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    begun = set()
    for item in items:
        if item.get_closest_marker("first_by_default"):
            case_of = item.path, item.originalname
            if case_of in begun:
                item.add_marker(pytest.mark.slow)
            begun.add(case_of)
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def s3_endpoint():
    """The address of an S3 server on this machine."""
    with s3_server.running() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint, monkeypatch):
    """The `s3://` address of an empty bucket, with the environment that reaches it."""
    for name, value in {**s3_server.KEYS, "AWS_ENDPOINT_URL_S3": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    return s3_server.make_bucket(s3_endpoint, f"bucket-{uuid.uuid4().hex[:12]}")
