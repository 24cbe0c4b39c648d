import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.data.collate import Scored, best_fit, opd_batch, pack, packed_rows, spread_rows
from opd_jax.data.records import Record, Scores


def record(prompt, response, name="p", logprob=-0.5):
    t = len(response)
    ids = [np.array(x, np.int32) for x in (prompt, response)]
    return Record(name, 0, *ids, np.full(t, logprob, np.float32), "stop")


DRAWN = record([10, 11, 12], [20, 21, 1])


def test_a_row_is_the_drawing_in_the_docstring():
    batch = packed_rows([[DRAWN]], 6)
    assert batch["input_bt"].tolist() == [[10, 11, 12, 20, 21, 0]]
    assert batch["target_bt"].tolist() == [[11, 12, 20, 21, 1, 0]]
    assert batch["mask_bt"].astype(int).tolist() == [[0, 0, 1, 1, 1, 0]]


def test_opd_batch_puts_every_log_prob_at_its_token():
    scores = Scores(
        np.array([-1, -2, -3], np.float32),
        np.array([[20, 5], [6, 21], [1, 7]], np.int32),
        np.array([[-0.1, -3], [-0.2, -4], [-0.3, -5]], np.float16),
    )
    other = record([9], [8, 1])
    last = Scored(other, Scores(np.array([-4, -5], np.float32)))
    batch = opd_batch([[Scored(DRAWN, scores), last], [last]], 8)
    assert batch["teacher_bt"].tolist() == [[0, 0, -1, -2, -3, -4, -5, 0], [-4, -5, *[0] * 6]]
    assert batch["segments_bt"].tolist() == [[1] * 5 + [2] * 2 + [0], [1, 1, *[0] * 6]]
    np.testing.assert_allclose(batch["weight_bt"].sum(1), [2.0, 1.0], rtol=1e-6)
    assert (batch["weight_bt"] > 0).tolist() == batch["mask_bt"].tolist()
    with_support = opd_batch([[Scored(DRAWN, scores)]], 5, support=1)
    assert with_support["support_ids_bts"][0, :, 0].tolist() == [0, 0, 20, 6, 1]
    outside = 1 - np.exp(scores.topk_logprob[:, 0].astype(np.float64))  # no mass is stored
    np.testing.assert_allclose(with_support["support_rest_bt"], [[0, 0, *outside]], rtol=1e-6)
    per_token = opd_batch([[Scored(DRAWN, scores)]], 5, per_token=True)
    assert per_token["weight_bt"].tolist() == [[0, 0, 1, 1, 1]]


def test_the_mass_outside_a_support_is_the_stored_one_and_what_the_support_leaves_out():
    likeliest = np.array([[-0.1, -4], [-0.01, -6], [-1e-4, -11]], np.float16)
    stored = np.array([0.05, 1e-5, 2e-6], np.float32)
    ids = np.array([[20, 5], [6, 21], [1, 7]], np.int32)
    scores = Scores(np.array([-1, -2, -3], np.float32), ids, likeliest, stored)
    for support, left_out in ((2, 0.0), (1, np.exp(likeliest[:, 1].astype(np.float64)))):
        batch = opd_batch([[Scored(DRAWN, scores)]], 5, support)
        want = [[0, 0, *(stored + left_out)]]
        np.testing.assert_allclose(batch["support_rest_bt"], want, rtol=1e-6)


def test_rows_are_spread_so_that_a_step_cuts_them_into_full_micro_batches():
    arranged = spread_rows([["a"], ["b"], ["c"], ["d"], ["e"]], pieces=4, micro_rows=2)
    pieces = [arranged[i::4] for i in range(4)]
    assert pieces == [[["a"], ["b"]], [["c"], ["d"]], [["e"], []], [[], []]]


@settings(max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_packing_keeps_every_item_once_and_no_row_overflows(lengths):
    rows = pack(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_keeps_every_item_once_and_fills_rows(lengths):
    rows = best_fit(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(fill <= 20 or len(row) == 1 for fill, row in zip(filled, rows, strict=True))
    # No row could take the longest item of a later one when that came: else it had been put there.
    for at, row in enumerate(rows):
        for later in rows[at + 1 :]:
            longer = sum(lengths[i] for i in row if lengths[i] >= lengths[later[0]])
            assert longer + lengths[later[0]] > 20


def test_packed_rows_keep_records_apart_and_cut_what_is_too_long():
    second = record([7, 8], [9, 1], "q")
    batch = packed_rows([[DRAWN, second]], 9)
    assert batch["segments_bt"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch["positions_bt"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0]]
    assert batch["input_bt"].tolist() == [[10, 11, 12, 20, 21, 7, 8, 9, 0]]
    assert batch["target_bt"].tolist() == [[11, 12, 20, 21, 1, 8, 9, 1, 0]]
    assert batch["mask_bt"].astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 1, 1, 0]]
    cut = packed_rows([[DRAWN]], 4)
    assert cut["mask_bt"].astype(int).tolist() == [[0, 0, 1, 1]]
