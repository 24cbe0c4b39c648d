import json

import pytest

from opd_jax.data.prompts import Prompt, load_prompts
from opd_jax.errors import DataError


def _write(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_prompts_in_the_order_of_the_file(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = _write(
        tmp_path,
        {"id": "b", "prompt": "2+2=?", "answer": "4", "level": 3},
        "",
        {"id": 7, "messages": chat, "answer": 42},
    )
    assert load_prompts(path) == [
        Prompt("b", ({"role": "user", "content": "2+2=?"},), "4"),
        Prompt("7", tuple(chat), "42"),
    ]


def test_limit_reads_no_further(tmp_path):
    path = _write(tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, "{")
    assert [prompt.id for prompt in load_prompts(path, 2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["JSON"]),
        ("[]", ["list"]),
        ({"prompt": "x"}, ["id=None"]),
        ({"id": "", "prompt": "x"}, ["id=''"]),
        ({"id": True, "prompt": "x"}, ["id=True"]),
        ({"id": "a", "prompt": "x"}, ["'a' is already used on line 1"]),
        ({"id": "b"}, ["'prompt' or 'messages'"]),
        ({"id": "b", "prompt": "x", "messages": []}, ["'prompt' or 'messages'"]),
        ({"id": "b", "prompt": 3}, ["'prompt' must be a string"]),
        ({"id": "b", "messages": []}, ["'messages' a list"]),
        ({"id": "b", "messages": [{"role": "user"}]}, ["'content'"]),
        ({"id": "b", "messages": [{"role": "assistant", "content": "x"}]}, ["assistant"]),
        ({"id": "b", "prompt": "x", "answer": [4]}, ["answer=[4]", "quotes"]),
        ({"id": "b", "prompt": "half \ud83d of it"}, ["'\\ud83d'", "surrogate"]),
        ({"id": "\udc00", "prompt": "x"}, ["'\\udc00'", "surrogate"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = _write(tmp_path, {"id": "a", "prompt": "x"}, line)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": "a", "prompt": "\xff"}')
    with pytest.raises(DataError, match=":1: not a line of JSON"):
        load_prompts(path)


def test_empty_and_missing_files(tmp_path):
    with pytest.raises(DataError, match="holds no prompts"):
        load_prompts(_write(tmp_path, "", "  "))
    with pytest.raises(DataError, match="no such prompt file"):
        load_prompts(tmp_path / "nowhere.jsonl")


def test_text_for_people_is_what_the_user_said():
    alone = Prompt("a", ({"role": "user", "content": "6*7="},))
    assert alone.text() == "6*7="
    more = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7="})
    assert Prompt("a", more).text() == "system: Be brief.\n\nuser: 6*7="
