"""Write samples of two checkpoints to the same prompts side by side, as Markdown.

python scripts/compare_samples.py runs/smollm2 sft opd_topk > docs/smollm2_samples.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def samples(run_dir, name):
    """The stored sample texts of a checkpoint."""
    lines = (run_dir / "evaluate" / name / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def question(prompt):
    """The last user message of a rendered chat."""
    return prompt.strip().removesuffix("assistant").strip().split("user\n")[-1].strip()


def quote(text):
    return "\n".join(f"> {line}" for line in text.strip().splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--count", type=int, default=10)
    arguments = parser.parse_args()
    names = (arguments.before, arguments.after)
    print(f"# Samples of `{names[0]}` and `{names[1]}` to the same held-out prompts\n")
    print("Temperature 1, the first prompts of the evaluation file, nothing picked. Made by")
    print(f"`python scripts/compare_samples.py {arguments.run_dir} {' '.join(names)}`.")
    rows = zip(*(samples(arguments.run_dir, name) for name in names), strict=True)
    for number, row in zip(range(1, arguments.count + 1), rows, strict=False):
        print(f"\n## {number}. {question(row[0]['prompt'])}")
        for name, sample in zip(names, row, strict=True):
            print(f"\n`{name}`\n\n{quote(sample['response'])}")


if __name__ == "__main__":
    main()
