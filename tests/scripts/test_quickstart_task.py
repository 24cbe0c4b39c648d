"""The quickstart's task is right, its splits are disjoint, and its tokenizer loses nothing."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quickstart_task import (
    ALL_MULTIPLIERS,
    END,
    SPLITS,
    VOCABULARY,
    Problem,
    build_tokenizer,
    problems,
    write_prompts,
)

from opd_jax.evals.graders import grade

SHIPPED = Path(__file__).parents[2] / "configs" / "quickstart"
NAMES = ("sft", "opd", "eval", "dev")
PROBLEMS = st.builds(Problem, st.integers(10_000, 99_999), st.integers(2, 9))


def shipped(name: str) -> list[dict]:
    lines = (SHIPPED / f"prompts_{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_example_of_the_docstring():
    problem = Problem(86556, 6)
    columns = "6*6+0=36,5*6+3=33,5*6+3=33,6*6+3=39,8*6+3=51"
    assert problem.response(worked=True) == f"<think>{columns}</think>519336"
    assert problem.response(worked=False) == "519336"


@given(PROBLEMS)
def test_columns_lead_to_the_answer(problem: Problem):
    """The last value and the last digits of the others, read backwards, are the product."""
    values = [column.split("=")[1] for column in problem.columns.split(",")]
    assert values[-1] + "".join(value[-1] for value in reversed(values[:-1])) == problem.answer
    for column in problem.columns.split(","):
        left, right = column.split("=")
        assert eval(left) == int(right)
    for worked in (True, False):
        assert grade("exact", problem.response(worked), problem.answer)


def test_no_two_prompt_files_share_a_problem_or_an_id():
    for left, right in itertools.combinations(NAMES, 2):
        for key in ("prompt", "id"):
            assert not {p[key] for p in shipped(left)} & {p[key] for p in shipped(right)}


def test_every_prompt_file_has_the_problems_it_promises():
    for name, count in zip(NAMES, (1000, 4000, 2000, 2000), strict=True):
        lines = shipped(name)
        prompts = {line["prompt"] for line in lines}
        assert len(lines) == len(prompts) == count
        for line in lines:
            number, multiplier = map(int, line["prompt"].rstrip("=").split("*"))
            assert line["answer"] == str(number * multiplier)
            assert Problem(number, multiplier).split == name
        multipliers = Counter(prompt[-2] for prompt in prompts)
        assert set(multipliers) == set("2345" if name == "sft" else "23456789")
        assert min(multipliers.values()) > 0.8 * count / len(multipliers)


def test_prompt_files_are_what_the_script_writes(tmp_path):
    write_prompts(tmp_path)
    for name in NAMES:
        file = f"prompts_{name}.jsonl"
        assert (tmp_path / file).read_bytes() == (SHIPPED / file).read_bytes()


def test_pretraining_never_sees_a_prompt():
    drawn = itertools.islice(problems("pretrain", ALL_MULTIPLIERS, np.random.default_rng(0)), 2000)
    assert not {p.prompt for p in drawn} & {p["prompt"] for name in NAMES for p in shipped(name)}
    buckets = [bucket for split in SPLITS.values() for bucket in split]
    assert sorted(buckets) == list(range(16))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@given(PROBLEMS, st.booleans())
def test_a_response_is_encoded_without_loss(problem: Problem, worked: bool):
    tokenizer = build_tokenizer()
    text = problem.response(worked) + END
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == problem.response(worked)
    assert len(ids) <= 53
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    ("thinking", "ending"), [(True, "\n"), (False, "\n<think></think>"), (None, "\n")]
)
def test_the_chat_template_is_like_qwens(tokenizer, thinking, ending):
    messages = [{"role": "system", "content": "+"}, {"role": "user", "content": "12345*6="}]
    extra = {} if thinking is None else {"enable_thinking": thinking}
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **extra
    )
    head = "<|im_start|>system\n+<|im_end|>\n<|im_start|>user\n12345*6=<|im_end|>\n"
    assert text == head + "<|im_start|>assistant" + ending
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_token_of_the_vocabulary_is_one_token(tokenizer):
    assert len(tokenizer) == len(VOCABULARY) == 24
    for i, token in enumerate(VOCABULARY):
        assert tokenizer.encode(token) == [i]
    assert tokenizer.encode("x") == [tokenizer.unk_token_id]
