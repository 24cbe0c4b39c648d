"""Who may be in a run folder together."""

import pytest

from opd_jax.core.run_lock import run_lock, share_lock
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


def test_a_share_is_done_once_at_a_time(tmp_path):
    first, second = (share_lock(tmp_path, f"rollout.share-{i}-of-2") for i in (1, 2))
    again = share_lock(tmp_path, "rollout.share-1-of-2")
    with first, second, pytest.raises(ConfigError) as caught, again:
        pass
    told = str(caught.value)
    assert told.startswith(f"rollout.share-1-of-2 in '{tmp_path}' is being done by process ")
    assert told.endswith("; wait until it ends, or start another share")
    with share_lock(tmp_path, "rollout.share-1-of-2"):
        pass
