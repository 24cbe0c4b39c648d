"""Who may be in a run folder together."""

import pytest

from opd_jax.core.run_lock import run_lock
from opd_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_only_shares_are_in_a_run_folder_together(tmp_path, first, second, together):
    with run_lock(tmp_path, shared=first):
        if together:
            with run_lock(tmp_path, shared=second):
                pass
        else:
            with (
                pytest.raises(ConfigError, match="is in use by process"),
                run_lock(tmp_path, shared=second),
            ):
                pass
    with run_lock(tmp_path):
        pass
