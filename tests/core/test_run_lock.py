"""Who may be in a run folder together."""

import pytest

from opd_jax.core.run_lock import file_lock, run_lock
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


def test_a_file_lock_says_what_it_guards_and_what_else_can_be_done(tmp_path):
    path = tmp_path / "new" / "lock"
    with (
        file_lock(path, "share 1/2", "do another share"),
        pytest.raises(ConfigError, match=r"share 1/2 is in use by process .* or do another share"),
        file_lock(path, "share 1/2", "do another share"),
    ):
        pass
