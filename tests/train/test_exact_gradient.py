"""The surrogate's expected gradient at step 0 is the gradient of the enumerated reverse KL."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import tiny

from opd_jax.algo.logprobs import chosen_logprobs
from opd_jax.algo.losses import Terms
from opd_jax.train.step import Objective, gradients

pytestmark = pytest.mark.exact

VOCAB, LENGTH = 5, 3
PROMPT = 1  # one prompt token, so that the first response token has a state


@functools.partial(jax.jit, static_argnums=0)
def sequence_logprobs(model, params, tokens):
    """[r, t] log-probs of the response tokens of every enumerated sequence."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), inputs.shape)
    out = model.forward(params, inputs, positions)
    logprob = chosen_logprobs(out.hidden_btd, model.head(params), targets[..., None])
    return logprob.logprob_bts[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def surrogate_gradient(model, student, batch):
    return gradients(model, Objective("sampled", Terms(tau=1e9)), student, batch, 1)[0]


def setup():
    sizes = {"vocab_size": VOCAB, "embed_dim": 8, "num_heads": 2, "num_kv_heads": 1}
    model, student = tiny(num_layers=1, **sizes)
    teacher = model.init(jax.random.key(99))
    rows = list(itertools.product(range(VOCAB), repeat=LENGTH))
    tokens = np.array([(PROMPT, *row) for row in rows], np.int32)
    return model, student, teacher, tokens


def batch_of(tokens, teacher_logprob, weight):
    shape = (len(tokens), LENGTH)
    return {
        "input_bt": tokens[:, :-1],
        "target_bt": tokens[:, 1:],
        "positions_bt": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        "mask_bt": np.ones(shape, bool),
        "teacher_bt": teacher_logprob,
        "sampler_bt": teacher_logprob,
        "weight_bt": weight,
    }


def test_expected_sampled_gradient_is_the_enumerated_reverse_kl_s():
    """E over sequences of pi_theta of the surrogate's gradient, token by token.

    The reverse KL of the sequence is the sum over steps of the expected KL at that step. With the
    states held at the student's own distribution, its gradient is E[sum_t (l_theta - l_T) grad
    l_theta]: what the surrogate sums. The sampled future return is left out on both sides.
    """
    model, student, teacher, tokens = setup()
    teacher_lp = np.asarray(sequence_logprobs(model, teacher, tokens))
    student_lp = np.asarray(sequence_logprobs(model, student, tokens))
    probability = np.exp(student_lp.sum(axis=1, keepdims=True))
    weight = np.broadcast_to(probability, student_lp.shape).astype(np.float32)
    batch = batch_of(tokens, teacher_lp, weight)
    got = surrogate_gradient(model, student, batch)

    def stepwise_kl(params):
        # Exact: sum over states of their probability (held) times the KL of the next token there.
        lp = sequence_logprobs(model, params, tokens)
        held = jnp.asarray(student_lp)
        before = jnp.exp(jnp.cumsum(held, axis=1) - held)  # probability of the state before t
        count_after = VOCAB ** np.arange(LENGTH - 1, -1, -1, dtype=np.float32)  # rows per prefix
        term = before * jnp.exp(lp) * (lp - teacher_lp)
        return jnp.sum(term / count_after[None, :])

    want = jax.jit(jax.grad(stepwise_kl))(student)
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, atol=1e-5)


def test_with_the_future_in_the_advantage_it_is_the_whole_reverse_kl_s():
    """The enumerated reverse KL of whole sequences, its value and its gradient.

    A token also moves the states that follow, which the method leaves out. Handed sum over t' >= t
    of A_t' in place of A_t, the same step gives the gradient of the KL over all 125 sequences.
    """
    model, student, teacher, tokens = setup()
    teacher_lp = np.asarray(sequence_logprobs(model, teacher, tokens))
    student_lp = np.asarray(sequence_logprobs(model, student, tokens))
    to_go = np.cumsum((teacher_lp - student_lp)[:, ::-1], axis=1)[:, ::-1]
    probability = np.exp(student_lp.sum(axis=1, keepdims=True))
    weight = np.broadcast_to(probability, student_lp.shape).astype(np.float32)
    got = surrogate_gradient(model, student, batch_of(tokens, student_lp + to_go, weight))

    def sequence_kl(params):
        lp = sequence_logprobs(model, params, tokens).sum(axis=1)
        return jnp.sum(jnp.exp(lp) * (lp - teacher_lp.sum(axis=1)))

    value, want = jax.jit(jax.value_and_grad(sequence_kl))(student)
    total = {
        tuple(row[1:].tolist()): (float(a), float(b))
        for row, a, b in zip(tokens, student_lp.sum(1), teacher_lp.sum(1), strict=True)
    }
    oracle = oracles.enumerated_reverse_kl(
        lambda row: total[row][0], lambda row: total[row][1], VOCAB, LENGTH
    )
    np.testing.assert_allclose(value, oracle, rtol=1e-5)
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, atol=1e-5)


def test_at_length_one_it_is_the_whole_reverse_kl():
    model, student, teacher, _ = setup()
    tokens = np.array([(PROMPT, v, 0, 0) for v in range(VOCAB)], np.int32)
    teacher_lp = np.asarray(sequence_logprobs(model, teacher, tokens))
    student_lp = np.asarray(sequence_logprobs(model, student, tokens))
    weight = np.zeros((VOCAB, LENGTH), np.float32)
    weight[:, 0] = np.exp(student_lp[:, 0])
    got = surrogate_gradient(model, student, batch_of(tokens, teacher_lp, weight))

    def kl(params):
        lp = sequence_logprobs(model, params, tokens)[:, 0]
        return jnp.sum(jnp.exp(lp) * (lp - teacher_lp[:, 0]))

    want = jax.jit(jax.grad(kl))(student)
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, atol=1e-5)
