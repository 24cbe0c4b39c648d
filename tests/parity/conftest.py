"""Torch is imported inside the tests: without the marker nothing here needs it."""

import pytest


@pytest.fixture(autouse=True)
def _deterministic():
    import torch

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    # Two threads that wait for each other on busy cores took four times as long to generate.
    torch.set_num_threads(1)
