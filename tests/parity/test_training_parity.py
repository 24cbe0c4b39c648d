"""Twenty steps of the method, restated in torch float64 a sequence at a time, against ours.

python -m pytest -m parity tests/parity/test_training_parity.py
"""

import jax
import numpy as np
import pytest
from side_by_side import random_hf_model

from opd_jax.algo.losses import Terms
from opd_jax.config_train import LoopConfig, OptimConfig
from opd_jax.data.collate import Scored, best_fit
from opd_jax.data.records import Record, Scores
from opd_jax.model.hf_export import _hf_arrays
from opd_jax.model.hf_tensors import expected_shapes
from opd_jax.model.load import read_model
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.sources import Packing
from opd_jax.train.step import Objective, init_state, make_train_step

pytestmark = pytest.mark.parity

STEPS, SEQUENCES, ROW_TOKENS, TAU = 20, 6, 24, 2.0
RATE, WARMUP = 1e-3, 5


def scored_steps():
    """The responses of every step, of 1 to 13 tokens."""
    rng = np.random.default_rng(4)

    def one():
        prompt, response = rng.integers(1, 9), rng.integers(1, 14)
        ids = rng.integers(0, 37, prompt + response).astype(np.int32)
        sampled, teacher = -rng.exponential(3, (2, response)).astype(np.float32)
        record = Record("p", 0, ids[:prompt], ids[prompt:], sampled, "stop")
        return Scored(record, Scores(teacher))

    return [[one() for _ in range(SEQUENCES)] for _ in range(STEPS)]


def our_run(folder, steps):
    """Losses, metrics of the last step and parameters by their names in the checkpoint."""
    model, params = read_model(folder)
    optim = OptimConfig(learning_rate=RATE, warmup_steps=WARMUP)
    optimizer = make_optimizer(model, LoopConfig(steps=STEPS, optim=optim))
    packing = Packing(ROW_TOKENS, micro_rows=2)
    packed = [best_fit([len(tokens(s)) - 1 for s in scored], ROW_TOKENS) for scored in steps]
    shape = packing.shape(max(map(len, packed)))
    assert shape[0] > 1
    step = make_train_step(model, Objective("sampled", Terms(tau=TAU)), optimizer, shape[0])
    state = init_state(model, optimizer, params)
    seen = []
    for rows, scored in zip(packed, steps, strict=True):
        state, metrics = step(state, packing.batch(rows, scored, shape))
        seen.append(jax.device_get(metrics))
    arrays = _hf_arrays(model, state.params)
    return seen, dict(zip(expected_shapes(model), arrays, strict=True))


def tokens(scored):
    return np.concatenate([scored.record.prompt_ids, scored.record.response_ids])


def their_loss(model, scored):
    """The mean over a response of minus advantage times log-prob; and how many are clipped."""
    import torch

    ids = torch.tensor(tokens(scored), dtype=torch.long)
    logprob_tv = torch.log_softmax(model(ids[None, :-1]).logits[0], -1)
    response = len(scored.record.response_ids)
    chosen = logprob_tv.gather(1, ids[1:, None])[-response:, 0]
    gap = torch.tensor(scored.scores.logprob, dtype=torch.float64) - chosen.detach()
    return -(gap.clamp(-TAU, TAU) * chosen).mean(), int((gap.abs() > TAU).sum())


def their_run(model, steps):
    """Losses, gradient norms, clipped tokens and parameters, with AdamW written out."""
    import torch

    model = model.double()
    named = dict(model.named_parameters())
    first = {name: torch.zeros_like(x) for name, x in named.items()}
    second = {name: torch.zeros_like(x) for name, x in named.items()}
    seen = []
    for number, scored in enumerate(steps, 1):
        model.zero_grad()
        found = [their_loss(model, one) for one in scored]
        loss = sum(value for value, _ in found) / len(found)
        loss.backward()
        norm = sum(x.grad.square().sum() for x in named.values()).sqrt()
        seen.append((loss.item(), norm.item(), sum(clipped for _, clipped in found)))
        rate = RATE * min(1.0, number / WARMUP)
        with torch.no_grad():
            for name, x in named.items():
                grad = x.grad * min(1.0, 1.0 / norm.item())
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.98 * second[name] + 0.02 * grad**2
                mean, square = first[name] / (1 - 0.9**number), second[name] / (1 - 0.98**number)
                decay = 0.1 * x if x.ndim > 1 else 0.0
                x.sub_(rate * (mean / (square.sqrt() + 1e-8) + decay))
    return seen, {name: x.detach().numpy() for name, x in named.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_twenty_steps_are_those_of_torch(tmp_path, family):
    theirs = random_hf_model(tmp_path, family, {})
    start = {name: x.detach().numpy().copy() for name, x in theirs.named_parameters()}
    steps = scored_steps()
    ours, params = our_run(tmp_path, steps)
    seen, expected = their_run(theirs, steps)
    losses, norms, clipped = zip(*seen, strict=True)
    assert max(norms) > 1
    assert 0 < sum(clipped) < sum(m["tokens"] for m in ours)
    np.testing.assert_allclose([m["loss"] for m in ours], losses, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([m["grad_norm"] for m in ours], norms, rtol=1e-4)
    np.testing.assert_array_equal([m["clipped"] for m in ours], clipped)
    assert params.keys() == expected.keys()
    for name, want in expected.items():
        assert np.abs(want - start[name]).max() > 5e-3, name
        worst = np.abs(params[name] - want).max()
        print(f"{name}: {worst:.1e}")
        assert worst < 1e-4, name
