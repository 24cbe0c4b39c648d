"""The quickstart's task: multiply five digits by one, with the columns written out.

    prompt    86556*6=
    worked    <think>6*6+0=36,5*6+3=33,5*6+3=33,6*6+3=39,8*6+3=51</think>519336
    bare      519336

A column is `digit*multiplier+carry=`, from the last digit to the first. The final answer can be
checked; the columns are what makes it reachable for a small network. Every problem belongs to one
split, by a checksum of its text, so no two splits can share a problem.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|im_end|>", "<|endoftext|>"
ROLES = ("system", "user", "assistant")
VOCABULARY = (PAD, "<|im_start|>", END, "<think>", "</think>", "<unk>", *ROLES, "\n")
VOCABULARY += tuple("0123456789*+=,")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think></think>' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
)

SPLITS = {"eval": range(2), "dev": range(2, 4), "sft": range(4, 6), "opd": range(6, 9)}
SPLITS["pretrain"] = range(9, 16)
SFT_MULTIPLIERS = range(2, 6)
ALL_MULTIPLIERS = range(2, 10)


@dataclass(frozen=True)
class Problem:
    """One multiplication of a five-digit number by one digit."""

    number: int
    multiplier: int

    @property
    def prompt(self) -> str:
        return f"{self.number}*{self.multiplier}="

    @property
    def answer(self) -> str:
        return str(self.number * self.multiplier)

    @property
    def columns(self) -> str:
        """The written-out columns, last digit first, each with the carry it receives."""
        parts, carry = [], 0
        for digit in map(int, reversed(str(self.number))):
            value = digit * self.multiplier + carry
            parts.append(f"{digit}*{self.multiplier}+{carry}={value}")
            carry = value // 10
        return ",".join(parts)

    def response(self, worked: bool) -> str:
        """The ground-truth response in the worked or the bare style, without its end token."""
        return f"<think>{self.columns}</think>{self.answer}" if worked else self.answer

    @property
    def split(self) -> str:
        bucket = zlib.crc32(self.prompt.encode()) % 16
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def problems(split: str, multipliers: Sequence[int], rng: np.random.Generator) -> Iterator[Problem]:
    """Endless random problems of one split; repetitions are possible."""
    while True:
        problem = Problem(int(rng.integers(10_000, 100_000)), int(rng.choice(multipliers)))
        if problem.split == split:
            yield problem


def distinct_problems(
    split: str, multipliers: Sequence[int], count: int, seed: int
) -> list[Problem]:
    """The first `count` different problems of a split."""
    found: dict[Problem, None] = {}
    for problem in problems(split, multipliers, np.random.default_rng(seed)):
        found[problem] = None
        if len(found) == count:
            break
    return list(found)


def write_prompts(folder: Path) -> None:
    """Write the four prompt files of the quickstart."""
    plan = (("sft", SFT_MULTIPLIERS, 1000), ("opd", ALL_MULTIPLIERS, 4000))
    plan += (("eval", ALL_MULTIPLIERS, 2000), ("dev", ALL_MULTIPLIERS, 2000))
    for seed, (split, multipliers, count) in enumerate(plan):
        lines = [
            json.dumps({"id": f"{split}-{i:04d}", "prompt": p.prompt, "answer": p.answer})
            for i, p in enumerate(distinct_problems(split, multipliers, count, seed))
        ]
        (folder / f"prompts_{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 24 tokens: digits and signs one by one, roles and markers whole."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    pieces = Regex("|".join(ROLES) + r"|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = CHAT_TEMPLATE
    return fast


if __name__ == "__main__":
    write_prompts(Path(__file__).parents[1] / "configs" / "quickstart")
