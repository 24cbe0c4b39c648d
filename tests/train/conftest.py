"""Runs of one model and config share their compiled step."""

import functools

import pytest

from opd_jax.train import loop


@pytest.fixture(scope="session")
def cached_makers():
    return {
        name: functools.cache(getattr(loop, name)) for name in ("make_optimizer", "make_train_step")
    }


@pytest.fixture
def compiled_once(monkeypatch, cached_makers):
    """For tests of what the loop does around a step."""
    for name, maker in cached_makers.items():
        monkeypatch.setattr(loop, name, maker)
