"""SIGTERM among several processes is seen whenever it comes."""

import pytest
from processes import run_two

BEFORE = """
import os, signal, time
from opd_jax.core.preemption import Preemption
if rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)
with Preemption() as notice:
    for asked in range(1, 100):
        notice.ask()
        if notice.came:
            break
        time.sleep(0.05)
print(notice.came, asked)
"""
BETWEEN = """
import os, signal, time
from opd_jax.core.preemption import Preemption
with Preemption() as notice:
    for _ in range(60):
        notice.ask()
if rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)
with Preemption() as notice:
    for asked in range(1, 60):
        notice.ask()
        if notice.came:
            break
        time.sleep(0.05)
print(notice.came, asked)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [BEFORE, BETWEEN], ids=["before", "between"])
def test_a_notice_before_a_training_is_seen_by_it(code, tmp_path):
    for said in run_two(code, tmp_path):
        came, asked = said.split()
        assert came == "True"
        assert int(asked) <= 2
