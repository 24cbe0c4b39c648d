"""SIGTERM among several processes is seen whenever it comes."""

import contextlib

import pytest
from processes import run_two

from opd_jax.core.preemption import Preemption
from opd_jax.errors import Preempted

TELL = """
import os, signal, time
from opd_jax.core.preemption import Preemption
def tell():
    jax.experimental.multihost_utils.sync_global_devices("tell")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(8)  # XLA looks once a second, and tells the other process
"""
TRAINED = """
with Preemption() as notice:
    for _ in range(60):
        notice.ask()
"""
TRAINING = """
tell()
with Preemption() as notice:
    for asked in range(1, 60):
        notice.ask()
        if notice.came:
            break
        time.sleep(0.05)
say(notice.came, asked)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", TRAINED], ids=["before", "between"])
def test_a_notice_before_a_training_is_seen_by_it(before, tmp_path):
    for said in run_two(TELL + before + TRAINING, tmp_path):
        came, asked = said.split()
        assert came == "True"
        assert int(asked) <= 2


def test_a_notice_that_work_within_has_used_up_came():
    """As sampling does among several processes: it asks, and ends by itself."""
    with Preemption() as notice:
        with contextlib.suppress(Preempted), notice.raised(wanted=False):
            raise Preempted("SIGTERM")
        notice.ask()
        assert notice.came
