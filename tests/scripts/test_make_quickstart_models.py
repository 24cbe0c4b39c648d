"""The shipped quickstart models are small, share a tokenizer and know what the script promises."""

import itertools
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from make_quickstart_models import (
    STUDENT,
    TEACHER,
    encode_rows,
    main,
    student_batches,
    target_logprobs,
)
from quickstart_task import ALL_MULTIPLIERS, SFT_MULTIPLIERS, Problem, distinct_problems

from opd_jax.data.tokenizer import load_tokenizer
from opd_jax.model.load import read_model

SHIPPED = Path(__file__).parents[2] / "configs" / "quickstart"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED / "student")


def test_the_folders_are_small_and_share_a_tokenizer(tokenizer):
    files = [f for name in ("teacher", "student") for f in (SHIPPED / name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    assert load_tokenizer(SHIPPED / "teacher").fingerprint == tokenizer.fingerprint


def test_the_folders_hold_the_declared_architectures():
    for name, model in (("teacher", TEACHER), ("student", STUDENT)):
        assert read_model(SHIPPED / name)[0] == model


def test_the_teacher_writes_columns_and_is_right(tokenizer):
    """Greedy decoding follows the truth if and only if every true token is the most likely one."""
    model, params = read_model(SHIPPED / "teacher")
    problems = distinct_problems("eval", ALL_MULTIPLIERS, 64, seed=3)
    tokens_bt, weight_bt = encode_rows(tokenizer, [(p, True) for p in problems])
    _, best_bt = target_logprobs(model, params, jnp.asarray(tokens_bt))
    right_b = (np.asarray(best_bt) | (weight_bt[:, 1:] == 0)).all(axis=1)
    assert right_b.mean() >= 0.98


def test_the_student_prefers_columns_for_small_multipliers_alone(tokenizer):
    model, params = read_model(SHIPPED / "student")
    problems = distinct_problems("eval", ALL_MULTIPLIERS, 64, seed=4)
    tokens_bt, weight_bt = encode_rows(tokenizer, [(p, True) for p in problems])
    logprob_bt, _ = target_logprobs(model, params, jnp.asarray(tokens_bt))
    columns_b = np.exp(np.asarray(logprob_bt)[:, int(weight_bt[0].argmax()) - 1])
    small_b = np.array([p.multiplier in SFT_MULTIPLIERS for p in problems])
    assert columns_b[small_b].min() > 0.7
    assert columns_b[~small_b].max() < 0.5


def test_rows_weigh_the_response_and_its_end_token_alone(tokenizer):
    problem = Problem(86556, 6)
    tokens_bt, weight_bt = encode_rows(tokenizer, [(problem, True), (problem, False)])
    for row, worked in enumerate((True, False)):
        weighted = tokens_bt[row][weight_bt[row] == 1].tolist()
        assert tokenizer.decode(weighted) == problem.response(worked)
        assert weighted[-1] == tokenizer.end_ids[0]
    assert weight_bt.sum(axis=1).tolist() == [53, 7]


def test_batches_of_the_student_mix_the_styles_as_told(tokenizer):
    thought = tokenizer.encode("<think>")[0]
    counts = {True: [], False: []}
    for tokens_bt, weight_bt in itertools.islice(student_batches(tokenizer, 0), 20):
        first = int(weight_bt[0].argmax())
        multipliers_b = [int(tokenizer.decode([token])) for token in tokens_bt[:, first - 7]]
        for multiplier, token in zip(multipliers_b, tokens_bt[:, first], strict=True):
            counts[multiplier in SFT_MULTIPLIERS].append(token == thought)
    assert abs(np.mean(counts[True]) - 0.9) < 0.05
    assert abs(np.mean(counts[False]) - 0.25) < 0.07


@pytest.mark.slow
def test_the_script_runs(tmp_path, monkeypatch, capsys):
    steps = ["--teacher-steps", "2", "--student-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["make", "--out", str(tmp_path), *steps])
    main()
    assert read_model(tmp_path / "student")[0] == STUDENT
    assert capsys.readouterr().out.count("multiplier, right with columns") == 2
