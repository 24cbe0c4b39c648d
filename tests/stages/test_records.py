"""Notes about stages on disk."""

import pytest

from opd_jax.errors import DataError
from opd_jax.stages.records import write_json


def test_what_cannot_be_written_is_one_line_and_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    (tmp_path / "b.json").mkdir()
    (tmp_path / "b.json" / "file").touch()  # a folder that is not empty cannot be replaced
    with pytest.raises(DataError, match=r"b\.json: cannot be written \(.*\); free space or choose"):
        write_json(tmp_path / "b.json", {"x": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
