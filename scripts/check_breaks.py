"""Do the tests see it: each deliberate break of a formula, and the tests that then fail.

    pip install -e '.[test,parity]'
    python scripts/check_breaks.py
    python scripts/check_breaks.py --only tail --only clip

Each break is one line of the source, changed in a copy of the checkout; the tests named beside it
have to pass without it and fail with it. Prints a table, and ends with 1 if a break goes unseen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("opd_jax", "tests", "configs", "scripts", "pyproject.toml", "README.md")


class Break(NamedTuple):
    """A line of a file below `opd_jax`, what it is changed to, and the tests that have to fail."""

    what: str
    file: str
    old: str
    new: str
    tests: str


LOSSES, LOSS_TESTS = "algo/losses.py", "tests/algo/test_losses.py"
STEP, STEP_TESTS = "train/step.py", "tests/train/test_step.py"
DRIFT, DRIFT_TESTS = "algo/drift.py", "tests/algo/test_drift.py"
LOGPROBS, LOGPROB_TESTS = "algo/logprobs.py", "tests/algo/test_logprobs.py"
CHOSEN_GRADS = "algo/chosen_grads.py"
COLLATE, COLLATE_TESTS = "data/collate.py", "tests/data/test_collate.py"
OPTIMIZER = "train/optimizer.py"
INSIDE = "jnp.sum(jnp.exp(student_bts) * (student_bts - teacher_bts), axis=-1)"

BREAKS = [
    Break(
        "SFT: the prompt counts as well",
        LOSSES,
        "-jnp.sum(jnp.where(mask_bt, logprob_bt, 0.0))",
        "-jnp.sum(logprob_bt)",
        LOSS_TESTS,
    ),
    Break(
        "advantage: a gradient flows through it",
        LOSSES,
        "return jax.lax.stop_gradient(adv_bt)",
        "return adv_bt",
        LOSS_TESTS,
    ),
    Break(
        "advantage: from the sampler's log-prob, not the current one",
        LOSSES,
        "jnp.clip(_target(tokens, terms) - student_bt,",
        "jnp.clip(_target(tokens, terms) - sampler_bt,",
        LOSS_TESTS,
    ),
    Break(
        "advantage: not clipped below",
        LOSSES,
        "jnp.clip(_target(tokens, terms) - student_bt, -terms.tau, terms.tau)",
        "jnp.minimum(_target(tokens, terms) - student_bt, terms.tau)",
        LOSS_TESTS,
    ),
    Break(
        "sampled objective: the sign",
        LOSSES,
        "return -jnp.sum(weight_bt * adv_bt * student_bt)",
        "return jnp.sum(weight_bt * adv_bt * student_bt)",
        "tests/train/test_exact_gradient.py",
    ),
    Break(
        "sampled objective: the advantage counts twice",
        LOSSES,
        "return -jnp.sum(weight_bt * adv_bt * student_bt)",
        "return -jnp.sum(weight_bt * 2 * adv_bt * student_bt)",
        "tests/train/test_exact_gradient.py",
    ),
    Break(
        "reward scale: without pi_ref",
        LOSSES,
        "sampler_bt + terms.reward_scale * (teacher_bt - sampler_bt)",
        "terms.reward_scale * teacher_bt",
        LOSS_TESTS,
    ),
    Break(
        "anchor: away from pi_ref",
        LOSSES,
        "adv_bt = adv_bt + terms.kl_anchor * pull_bt",
        "adv_bt = adv_bt - terms.kl_anchor * pull_bt",
        LOSS_TESTS,
    ),
    Break(
        "token weight: max(w, c)",
        LOSSES,
        "jnp.minimum(jnp.exp(student_bt - sampler_bt), terms.weight_cap)",
        "jnp.maximum(jnp.exp(student_bt - sampler_bt), terms.weight_cap)",
        LOSS_TESTS,
    ),
    Break(
        "token weight: a gradient flows through it",
        LOSSES,
        "return jax.lax.stop_gradient(weight_bt)",
        "return weight_bt",
        LOSS_TESTS,
    ),
    Break(
        "position weight: grows instead of falling",
        LOSSES,
        "(1.0 - share_bt))",
        "share_bt)",
        LOSS_TESTS,
    ),
    Break(
        "position weight: one share for all responses of a row",
        LOSSES,
        "    if segments_bt is None:\n        return before_bt",
        "    if True:\n        return before_bt",
        LOSS_TESTS,
    ),
    Break(
        "clipped ratio: the larger of both",
        LOSSES,
        "jnp.minimum(r_bt * adv_bt, bounded_bt * adv_bt)",
        "jnp.maximum(r_bt * adv_bt, bounded_bt * adv_bt)",
        LOSS_TESTS,
    ),
    Break(
        "top-k: the forward KL",
        LOSSES,
        f"kl_bt = {INSIDE}",
        "kl_bt = jnp.sum(jnp.exp(teacher_bts) * (teacher_bts - student_bts), axis=-1)",
        LOSS_TESTS,
    ),
    Break(
        "top-k: the student is not renormalised",
        LOSSES,
        "    student_bts = jax.nn.log_softmax(student_bts, axis=-1)\n",
        "",
        LOSS_TESTS,
    ),
    Break(
        "top-k with a tail: the tail is left out",
        LOSSES,
        "inside_bt + _tail_term(student_bts, rest_bt)",
        "inside_bt",
        LOSS_TESTS,
    ),
    Break(
        "top-k with a tail: a floor of 1e-4",
        LOSSES,
        "TAIL_FLOOR = 1e-6",
        "TAIL_FLOOR = 1e-4",
        LOSS_TESTS,
    ),
    Break(
        "stored tail: without the tokens that the support leaves out",
        COLLATE,
        "return scores.topk_rest + mass[:, support:].sum(-1)",
        "return scores.topk_rest",
        COLLATE_TESTS,
    ),
    Break(
        "monitors: the spread of w about 0",
        LOSSES,
        "(w_bt - 1.0) ** 2, 0.0)",
        "w_bt**2, 0.0)",
        LOSS_TESTS,
    ),
    Break(
        "monitors: abs(A) > 1 counts all that are negative",
        LOSSES,
        '"large_advantage": jnp.abs(adv_bt) > 1',
        '"large_advantage": adv_bt < 1',
        LOSS_TESTS,
    ),
    Break(
        "rows: targets are the inputs",
        COLLATE,
        "tokens[1 : count + 1]",
        "tokens[:count]",
        COLLATE_TESTS,
    ),
    Break(
        "rows: the response begins one token late",
        COLLATE,
        ">= len(record.prompt_ids) - 1",
        ">= len(record.prompt_ids)",
        COLLATE_TESTS,
    ),
    Break(
        "rows: each token weighs alike in a mean per sequence",
        COLLATE,
        "1.0 if per_token else 1.0 / len(record.response_ids)",
        "1.0",
        COLLATE_TESTS,
    ),
    Break(
        "rows: scores lie one token late",
        COLLATE,
        "first = start + len(record.prompt_ids) - 1",
        "first = start + len(record.prompt_ids)",
        COLLATE_TESTS,
    ),
    Break(
        "step: divided by tokens, not by weights",
        STEP,
        "divisor = jnp.sum(weight_bt)",
        "divisor = jnp.sum(mask_bt, dtype=jnp.float32)",
        "tests/parity/test_training_parity.py",
    ),
    Break(
        "step: gradients are not divided",
        STEP,
        "lambda g: g * scale, grads",
        "lambda g: g, grads",
        f"{STEP_TESTS} tests/parity/test_training_parity.py",
    ),
    Break(
        "accumulation: the first micro-batch is left out",
        STEP,
        "jax.lax.fori_loop(0, used,",
        "jax.lax.fori_loop(1, used,",
        STEP_TESTS,
    ),
    Break(
        "accumulation: only the last micro-batch of adapters counts",
        STEP,
        "return jax.tree.map(jnp.add, carry, grad_fn(params, piece))",
        "return jax.tree.map(lambda _, x: x, carry, grad_fn(params, piece))",
        "tests/train/test_lora.py",
    ),
    Break(
        "accumulation: only the last micro-batch's layers count",
        "model/gradient_sums.py",
        "stack.at[row].add(",
        "stack.at[row].set(",
        STEP_TESTS,
    ),
    Break(
        "accumulation: only the last micro-batch's embedding counts",
        STEP,
        "jax.tree.map(jnp.add, sums[name], x)",
        "x",
        STEP_TESTS,
    ),
    Break(
        "a step that is not finite changes the parameters",
        OPTIMIZER,
        "jnp.where(sound, x, 0)",
        "x",
        "tests/train/test_nonfinite.py",
    ),
    Break(
        "clipping: to the norm, however small the gradient",
        OPTIMIZER,
        "jnp.minimum(1.0, norm / jnp.maximum(optax.tree.norm(updates), 1e-30))",
        "norm / jnp.maximum(optax.tree.norm(updates), 1e-30)",
        STEP_TESTS,
    ),
    Break(
        "weight decay: of norms and biases as well",
        OPTIMIZER,
        "config.weight_decay, decay_mask(model)",
        "config.weight_decay",
        STEP_TESTS,
    ),
    Break(
        "schedule: the first step has rate 0",
        OPTIMIZER,
        "first = config.learning_rate / config.warmup_steps",
        "first = 0.0",
        STEP_TESTS,
    ),
    Break(
        "head: the largest logit of a block is forgotten",
        LOGPROBS,
        "total_nbt = total_nbt * jnp.exp(moved) +",
        "total_nbt = total_nbt +",
        LOGPROB_TESTS,
    ),
    Break(
        "order on CPUs: the layers' gradients do not wait for the head's",
        "core/in_order.py",
        "return after(x, others, mesh), others",
        "return x, others",
        "tests/core/test_in_order.py",
    ),
    Break(
        "head: the chosen row has no gradient",
        CHOSEN_GRADS,
        "return sums.at[ids_bcs].add(add_bcsd)",
        "return sums",
        LOGPROB_TESTS,
    ),
    Break(
        "head: every copy of it goes on from what is there",
        CHOSEN_GRADS,
        "first_n = jnp.arange(copies) == 0",
        "first_n = jnp.arange(copies) >= 0",
        LOGPROB_TESTS,
    ),
    Break(
        "head: the entropy's sign",
        LOGPROBS,
        "(total * above - spread)",
        "(total * above + spread)",
        LOGPROB_TESTS,
    ),
    Break(
        "head: a position too few where only targets are computed",
        "algo/needed.py",
        "jnp.searchsorted(jnp.array(sizes, jnp.int32), count)",
        "jnp.searchsorted(jnp.array(sizes, jnp.int32), count - 1)",
        "tests/algo/test_needed.py",
    ),
    Break(
        "drift: W is not self-normalised",
        DRIFT,
        "tokens = (weight_r * tokens_r).sum()",
        "tokens = tokens_r.sum()",
        DRIFT_TESTS,
    ),
    Break(
        "drift: the effective share is its reciprocal's",
        DRIFT,
        '"chi2": float(1.0 / share - 1.0)',
        '"chi2": float(share - 1.0)',
        DRIFT_TESTS,
    ),
    Break(
        "reverse KL: the standard error takes records for independent",
        "algo/estimates.py",
        "_sum_by_cluster(sums - ratio * counts, clusters)",
        "_sum_by_cluster(sums - ratio * counts, None)",
        "tests/algo/test_estimates.py",
    ),
    Break(
        "LoRA: merged without alpha / rank",
        "model/lora.py",
        "new = (weight + scale * product",
        "new = (weight + product",
        "tests/train/test_lora.py",
    ),
    Break(
        "guard: the worst state is the best",
        "train/guard.py",
        '("fresh_reverse_kl", -1)',
        '("fresh_reverse_kl", 1)',
        "tests/train/test_guard.py",
    ),
    Break(
        "checkpoint: digests are not compared",
        "train/checkpoint.py",
        "if sha256_of(path) != digest:",
        "if False:",
        "tests/train/test_checkpoint.py",
    ),
    Break(
        "resume: the stream of batches begins anew",
        "train/sources.py",
        "stream = batches(read, range(steps), step)",
        "stream = batches(read, range(steps), 0)",
        "tests/train/test_resume.py tests/train/test_sources.py",
    ),
]


RESULTS = ("FAILED tests/", "ERROR tests/")
"""How pytest's lines begin that name a test, or a file that it could not import."""


def copy(folder: Path) -> None:
    """The checkout's files that the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def run_tests(folder: Path, tests: str) -> tuple[bool, list[str]]:
    """Whether they pass, and the names of those that fail."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "-m", "", "-q", *tests.split()]
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith(RESULTS)]
    failed = [line.partition("::")[2] or line.split()[1] for line in told]  # or a whole file
    if done.returncode not in (0, 1):  # no tests, or a break that is none
        raise SystemExit(f"{tests}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 0, sorted({name.split("[")[0].split(" ")[0] for name in failed})


def seen(folder: Path, one: Break) -> list[str]:
    """The tests that fail with a break; the file is as before afterwards."""
    path = folder / "opd_jax" / one.file
    before = path.read_text("utf-8")
    if before.count(one.old) != 1:
        raise SystemExit(f"{one.what}: {before.count(one.old)} places in {one.file}, not one")
    path.write_text(before.replace(one.old, one.new), "utf-8")
    try:
        return run_tests(folder, one.tests)[1]
    finally:
        path.write_text(before, "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="breaks whose text has this word")
    only = parser.parse_args().only
    chosen = [one for one in BREAKS if only is None or any(word in one.what for word in only)]
    unseen = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy(folder)
        for tests in sorted({one.tests for one in chosen}):
            sound, failed = run_tests(folder, tests)
            if not sound:
                raise SystemExit(f"{tests}: fail without any break: {', '.join(failed)}")
        print("| break | failing tests |\n|---|---|")
        for one in chosen:
            failed = seen(folder, one)
            unseen += not failed
            print(f"| {one.what} | {', '.join(failed) or 'NONE'} |", flush=True)
    print(f"\n{len(chosen) - unseen} of {len(chosen)} breaks are seen")
    return min(unseen, 1)


if __name__ == "__main__":
    sys.exit(main())
