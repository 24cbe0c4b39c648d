"""Compilers of absent devices that several tests ask."""

import pytest
from compilers import Compilers


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    with Compilers(tmp_path_factory.mktemp("compilers")) as compilers:
        yield compilers
