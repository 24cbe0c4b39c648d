"""Every test runs on 4 fake CPU devices, without network, with silent rank promotion an error."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tiny models spend their time in the compiler: it does the same program with less polish. Exactness
# is also tested on what users run, fully optimised: OPD_JAX_OPTIMIZED=1, as .ci/run sets it.
if not os.environ.get("OPD_JAX_OPTIMIZED"):
    jax.config.update("jax_disable_most_optimizations", True)
