"""The shipped prompts are the script's, in full, and no two are alike."""

import json
from pathlib import Path

import pytest
from make_smollm2_prompts import SPLITS, TEMPLATES, all_prompts, write_prompts

SHIPPED = Path(__file__).parents[2] / "configs" / "smollm2"


def test_shipped_prompts_are_what_the_script_writes(tmp_path):
    write_prompts(tmp_path)
    for split in SPLITS:
        file = f"prompts_{split}.jsonl"
        assert (tmp_path / file).read_bytes() == (SHIPPED / file).read_bytes()


def test_no_prompt_is_used_twice():
    prompts = []
    for split, count in SPLITS.items():
        lines = (SHIPPED / f"prompts_{split}.jsonl").read_text().splitlines()
        assert len(lines) == count
        prompts += [json.loads(line)["prompt"] for line in lines]
    assert len(set(prompts)) == len(prompts) == sum(SPLITS.values())


def test_prompts_are_short_and_filled_in():
    for prompt in all_prompts():
        assert len(prompt) < 160
        assert "{" not in prompt
        assert "  " not in prompt


def test_too_few_prompts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("make_smollm2_prompts.TEMPLATES", dict(list(TEMPLATES.items())[:2]))
    with pytest.raises(ValueError, match="add to TEMPLATES"):
        write_prompts(tmp_path)
