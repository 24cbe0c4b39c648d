"""Processes go on from what all of them see."""

import numpy as np
import pytest
from processes import run_two

from opd_jax.core import distributed
from opd_jax.core.distributed import agreed

LATE = """
import numpy as np
from opd_jax.core import distributed
from opd_jax.errors import DataError
distributed.LOOK_SECONDS = 0.01
looks = 0

def see():  # what process 0 has put there, process 1 sees at its third look
    global looks
    looks += 1
    return np.array([True, rank == 0 or looks > 2, False] * 3)

say(distributed.agreed(see, "here").tolist() == [True, True, False] * 3, looks)
distributed.LOOKS = 3
try:
    distributed.agreed(lambda: np.array([rank == 0]), "here")
except DataError as error:
    say(error)
"""


def test_one_process_is_told_at_once():
    seen = np.array([True, False])
    assert agreed(lambda: seen, "here") is seen


@pytest.mark.slow
def test_two_look_until_they_see_the_same(tmp_path):
    assert distributed.LOOKS * distributed.LOOK_SECONDS == 120
    for output in run_two(LATE, tmp_path):
        same, error = output.splitlines()
        assert same == "True 3"
        assert error.startswith("here: after 0 s hosts still see different files there; put it")
