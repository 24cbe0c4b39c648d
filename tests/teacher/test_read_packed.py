"""A process reads the records of its devices' rows; of the others it knows the lengths."""

import numpy as np
import pytest

from opd_jax.data.records import Record
from opd_jax.data.store import create_store
from opd_jax.teacher import score_pass
from opd_jax.teacher.batches import ScoreBatch


@pytest.mark.parametrize("mine", [(True, False, True), (False, True, False), (False,) * 3])
def test_of_rows_that_others_hold_lengths_and_names_alone(tmp_path, monkeypatch, mine):
    store = create_store(tmp_path, {})
    with store.writer() as writer:
        for i in range(1, 5):
            ids = np.full(i, i, np.int32)
            writer.append(Record(f"p{i}", 0, ids, ids, -ids.astype(np.float32), "stop"))
    snapshot = store.freeze()
    batch = ScoreBatch(packed=((3, 0), (1, 2)), length=16, rows=3)
    whole = score_pass.read_packed(snapshot, batch)
    monkeypatch.setattr(score_pass, "rows_here", lambda _mesh, rows: np.array(mine[:rows]))
    for row, wanted, here in zip(
        score_pass.read_packed(snapshot, batch), whole, mine, strict=False
    ):
        for record, other in zip(row, wanted, strict=True):
            assert record.prompt_id == other.prompt_id
            assert record.prompt_ids.shape == other.prompt_ids.shape
            same = np.array_equal(record.response_ids, other.response_ids)
            assert same == here
            assert here or not record.response_ids.any()
