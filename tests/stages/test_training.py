"""What a training stage shows on its line."""

from __future__ import annotations

import pytest

from opd_jax.stages.training import _note
from opd_jax.train.step import Objective

VALUES = {"loss": -1.634, "half_squared_advantage": 1.2208}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("sampled", "A^2/2 1.2208"), ("topk", "loss -1.6340"), ("sft", "loss -1.6340")],
)
def test_the_value_of_a_surrogate_is_not_shown(kind, expected):
    assert _note(Objective(kind), VALUES) == expected
