"""The made-up run for every test of the report."""

from __future__ import annotations

import copy

import pytest
from synthetic_run import SUMMARY, make_run


@pytest.fixture
def summary():
    return copy.deepcopy(SUMMARY)


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "toy <run>")
