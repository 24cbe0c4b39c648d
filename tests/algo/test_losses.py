import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.algo.losses import (
    Terms,
    TokenLogprobs,
    advantage,
    anchor_loss,
    averages,
    diagnostics,
    sampled_opd,
    sft_loss,
    token_weights,
    topk_reverse_kl,
)

SEEDS = st.integers(0, 100_000)


def batch(seed, b=3, t=6, spread=3.0):
    rng = np.random.default_rng(seed)
    student = -rng.exponential(spread, (b, t)).astype(np.float32)
    teacher = -rng.exponential(spread, (b, t)).astype(np.float32)
    mask = rng.random((b, t)) < 0.6
    mask[:, 0] = True
    weight = (mask / mask.sum(1, keepdims=True)).astype(np.float32)
    return student, teacher, mask, weight


def support(seed, k=4, v=9):
    """Log-probs of the student and the teacher on `k` tokens, and the teacher's other mass."""
    rng = np.random.default_rng(seed)
    student = oracles.log_softmax(rng.normal(size=(2, 3, v)) * 2)[..., :k]
    teacher = oracles.log_softmax(rng.normal(size=(2, 3, v)) * 2)
    rest = np.exp(teacher[..., k:]).sum(-1)
    return student.astype(np.float32), teacher[..., :k].astype(np.float32), rest.astype(np.float32)


def plain(student, teacher, weight, tau):
    """The paper's objective from a student, a teacher and weights alone."""
    mask = weight > 0
    return sampled_opd(TokenLogprobs(student, teacher, student, mask), weight, Terms(tau))


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([0.5, 2.0, 10.0]))
def test_sampled_loss_equals_the_oracle(seed, tau):
    student, teacher, mask, weight = batch(seed)
    got = plain(student, teacher, weight, tau) / weight.sum()
    want = oracles.lightning_loss(student, teacher, mask, tau)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([0.5, 2.0, 10.0]))
def test_sampled_gradient_is_that_of_half_the_squared_gap(seed, tau):
    """METHOD: the surrogate's gradient is that of (l_theta - l_T)^2 / 2, Huber's once clipped."""
    student, teacher, _, weight = batch(seed)
    got = jax.grad(plain)(student, teacher, weight, tau)
    gap = np.clip(student.astype(np.float64) - teacher, -tau, tau)
    np.testing.assert_allclose(got, weight * gap, atol=1e-5)
    step = 1e-6
    for x in (0.3, tau * 0.9, tau * 1.5, -tau * 2):
        slope = (oracles.huber(x + step, tau) - oracles.huber(x - step, tau)) / (2 * step)
        assert slope == pytest.approx(np.clip(x, -tau, tau), abs=1e-5)


def test_nothing_masked_reaches_the_loss_or_its_gradient():
    student, teacher, mask, weight = batch(1)
    poison_s, poison_t = student.copy(), teacher.copy()
    poison_s[~mask], poison_t[~mask] = np.nan, -np.inf
    clean = jax.value_and_grad(plain)(student, teacher, weight, 10.0)
    dirty = jax.value_and_grad(plain)(poison_s, poison_t, weight, 10.0)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    sides = ((student, teacher, student - 0.1), (poison_s, poison_t, poison_s - 0.1))
    a, b = (diagnostics(TokenLogprobs(*arrays, mask), Terms()) for arrays in sides)
    assert averages(jax.device_get(a)) == averages(jax.device_get(b))


TERMS = st.builds(
    Terms,
    tau=st.sampled_from([0.5, 2.0, 10.0]),
    reward_scale=st.sampled_from([1.0, 0.5, 1.5]),
    kl_anchor=st.sampled_from([0.0, 0.3]),
    weight_cap=st.sampled_from([None, 0.7, 2.0]),
    position_gamma=st.sampled_from([0.0, 0.5]),
    ratio_clip=st.sampled_from([None, 0.2]),
)


def packed(seed):
    """Two rows with responses behind prompts, several in a row; also the places of each."""
    rng = np.random.default_rng(seed)
    segments, mask = np.zeros((2, 14), np.int32), np.zeros((2, 14), bool)
    responses = []
    for row in range(2):
        at = 0
        for segment in range(1, int(rng.integers(2, 4))):
            prompt, response = rng.integers(1, 3), rng.integers(1, 5)
            segments[row, at : at + prompt + response] = segment
            at += prompt
            mask[row, at : at + response] = True
            responses.append([(row, t) for t in range(at, at + response)])
            at += response
    student, teacher, sampler = -rng.exponential(1.0, (3, 2, 14)).astype(np.float32)
    return TokenLogprobs(student, teacher, sampler, mask, segments), responses


@settings(max_examples=60)
@given(SEEDS, TERMS, st.booleans())
def test_every_term_equals_the_oracle_in_packed_rows(seed, terms, per_token):
    tokens, responses = packed(seed)
    weight = np.zeros(tokens.mask_bt.shape, np.float32)
    for places in responses:
        for at in places:
            weight[at] = 1.0 if per_token else 1.0 / len(places)
    final = token_weights(tokens, weight, advantage(tokens, terms), terms)
    got = sampled_opd(tokens, final, terms) / weight.sum()
    arrays = [np.asarray(x, np.float64) for x in tokens[:3]]
    want = oracles.opd_loss(*arrays, responses, terms, per_token=per_token)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([Terms(weight_cap=2.0), Terms(position_gamma=0.5)]))
def test_weights_and_advantages_carry_no_gradient(seed, terms):
    tokens, _ = packed(seed)
    weight = tokens.mask_bt.astype(np.float32)

    def final(student):
        given = tokens._replace(student_bt=student)
        return given, token_weights(given, weight, advantage(given, terms), terms)

    def loss(student):
        return sampled_opd(*final(student), terms)

    student = jnp.asarray(tokens.student_bt)
    fixed = final(student)[1] * advantage(tokens, terms)
    np.testing.assert_allclose(jax.grad(loss)(student), -fixed, rtol=1e-6, atol=1e-7)


def test_a_position_weighs_at_most_1_plus_gamma_however_small_its_response_s_advantages():
    """Behind a response with large ones, the running sum has no digits left for them."""
    segments = np.array([[1] * 482 + [2] * 30], np.int32)
    zeros, mask = np.zeros((1, 512), np.float32), np.ones((1, 512), bool)
    tokens = TokenLogprobs(zeros, zeros, zeros, mask, segments)
    for seed in range(6):
        for scale in (0.0, 1e-9, 1e-6, 1e-4):
            rng = np.random.default_rng(seed)
            adv = np.concatenate([rng.exponential(7.0, 482), scale * rng.exponential(1.0, 30)])
            given = adv[None].astype(np.float32)
            weights = token_weights(tokens, mask * 1.0, given, Terms(position_gamma=0.5))
            assert weights.min() >= 1.0
            assert weights.max() <= 1.5


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_no_term_reads_what_is_masked(poison):
    terms = Terms(2.0, 1.5, 0.3, 2.0, 0.5, 0.2)
    tokens, _ = packed(3)
    weight = tokens.mask_bt.astype(np.float32)

    def loss(student, teacher, sampler):
        given = TokenLogprobs(student, teacher, sampler, tokens.mask_bt, tokens.segments_bt)
        final = token_weights(given, weight, advantage(given, terms), terms)
        return sampled_opd(given, final, terms) + anchor_loss(given, final, terms)

    def dirty(x):
        return np.where(tokens.mask_bt, x, np.float32(poison))

    clean = jax.value_and_grad(loss)(*tokens[:3])
    found = jax.value_and_grad(loss)(*map(dirty, tokens[:3]))
    np.testing.assert_array_equal(clean[0], found[0])
    np.testing.assert_array_equal(clean[1], found[1])


@settings(max_examples=20)
@given(SEEDS)
def test_the_clipped_ratio_starts_with_the_paper_s_gradient(seed):
    """At the policy that drew the samples the ratio is 1, and nothing is clipped."""
    student, teacher, mask, weight = batch(seed)

    def loss(x, terms):
        return sampled_opd(TokenLogprobs(x, teacher, student, mask), weight, terms)

    slope, clip = jax.grad(loss), Terms(ratio_clip=0.2)
    np.testing.assert_allclose(slope(student, clip), slope(student, Terms()), atol=1e-6)
    far = slope(student + np.where(teacher > student, 0.5, -0.5), clip)
    # Moved too far towards the teacher: no slope, unless it went past the teacher.
    past = abs(teacher - student) < 0.5
    np.testing.assert_array_equal(np.asarray(far)[mask & ~past], 0.0)


@settings(max_examples=20)
@given(SEEDS)
def test_the_anchor_pulls_to_the_sampler_in_either_objective(seed):
    """Gradient of c weight (l - l_R)^2 / 2, Huber's once clipped."""
    student, sampler, mask, weight = batch(seed)
    terms = Terms(tau=2.0, kl_anchor=0.3)
    want = 0.3 * weight * np.clip(student - sampler, -2, 2)

    def alone(x):
        return anchor_loss(TokenLogprobs(x, sampler, sampler, mask), weight, terms)

    def added(x):
        tokens = TokenLogprobs(x, student, sampler, mask)  # the teacher agrees with the student
        return sampled_opd(tokens, weight, terms)

    np.testing.assert_allclose(jax.grad(alone)(student), want, atol=1e-6)
    np.testing.assert_allclose(jax.grad(added)(student), want, atol=1e-6)


@settings(max_examples=30)
@given(SEEDS, st.booleans())
def test_topk_kl_equals_the_oracle_and_is_never_negative(seed, tail):
    student, teacher, rest = support(seed)
    mask = np.ones((2, 3), bool)
    got = topk_reverse_kl(student, teacher, rest if tail else None, mask)
    for b in range(2):
        for t in range(3):
            want = oracles.topk_kl(student[b, t], teacher[b, t], rest[b, t] if tail else None)
            assert float(got[b, t]) == pytest.approx(want, abs=1e-4)
    assert float(got.min()) > -1e-5


@pytest.mark.parametrize("tail", [False, True])
def test_topk_kl_of_a_distribution_with_itself_is_zero_with_no_slope(tail):
    student = support(3)[0]
    mask, rest = np.ones((2, 3), bool), 1 - np.exp(student).sum(-1) if tail else None
    value, slope = jax.value_and_grad(
        lambda s: jnp.sum(topk_reverse_kl(s, jnp.asarray(student), rest, mask))
    )(jnp.asarray(student))
    assert abs(float(value)) < 1e-5
    np.testing.assert_allclose(slope, np.zeros(slope.shape), atol=2e-5)


@pytest.mark.parametrize("tail", [False, True])
def test_topk_at_full_vocabulary_is_the_exact_reverse_kl_with_its_gradient(tail):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(1, 2, 7)).astype(np.float32)
    teacher = oracles.log_softmax(rng.normal(size=(1, 2, 7))).astype(np.float32)
    mask, rest = np.ones((1, 2), bool), np.zeros((1, 2), np.float32) if tail else None

    def ours(logits):
        return jnp.sum(topk_reverse_kl(jax.nn.log_softmax(logits), teacher, rest, mask))

    def exact(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - teacher))

    np.testing.assert_allclose(ours(logits), exact(logits), atol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(exact)(logits), atol=1e-5)


def test_a_small_tail_of_the_teacher_is_what_is_stored_not_what_float16_leaves():
    student = np.log(np.array([[[0.6, 0.3, 0.08]]], np.float32))
    mask, rest = np.ones((1, 1), bool), np.full((1, 1), 3e-5, np.float32)
    exact = np.log(np.array([[[0.65, 0.3, 0.05 - 3e-5]]]))
    got = topk_reverse_kl(student, exact.astype(np.float16), rest, mask)
    want = oracles.topk_kl(student[0, 0].astype(np.float64), exact[0, 0], 3e-5)
    assert float(got[0, 0]) == pytest.approx(want, abs=2e-4)  # float16 log-probs: 5e-4 of each
    rounded = oracles.topk_kl(student[0, 0], exact[0, 0].astype(np.float16), 1e-4)
    assert abs(rounded - want) > 0.02


def test_topk_masked_positions_change_nothing():
    student, teacher, mass = support(8)
    mask = np.array([[True, False, True], [True, True, False]])
    poison = student.copy()
    poison[~mask] = np.nan
    for rest in (None, mass):
        clean = jax.grad(lambda s, r=rest: topk_reverse_kl(s, teacher, r, mask).sum())(student)
        dirty = jax.grad(lambda s, r=rest: topk_reverse_kl(s, teacher, r, mask).sum())(poison)
        np.testing.assert_array_equal(clean, dirty)
        assert np.all(np.asarray(clean)[~mask] == 0)


def test_diagnostics_are_the_paper_s_monitors():
    student, teacher, mask, _ = batch(4, spread=1.0)
    sampler = student - np.float32(0.2)
    tokens = TokenLogprobs(student, teacher, sampler, mask)
    found = averages(jax.device_get(diagnostics(tokens, Terms(0.5))))
    gap = (teacher.astype(np.float64) - student)[mask]
    adv = np.clip(gap, -0.5, 0.5)
    w = np.exp(np.full(mask.sum(), 0.2))
    want = {
        "half_squared_advantage": np.mean(adv**2) / 2,
        "reverse_kl_estimate": -np.mean(gap),
        "abs_advantage": np.mean(abs(adv)),
        "large_advantage": 0.0,
        "clipped": np.mean(abs(gap) > 0.5),
        "w": np.mean(w),
        "w_std": 0.0,
        "tokens": mask.sum(),
    }
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name] == pytest.approx(value, abs=2e-3), name


def test_the_deviation_of_weights_is_exact_where_all_are_near_1():
    """Two programs that round differently give weights like these; float32 must not add to them."""
    student, teacher, mask, _ = batch(5, b=16, t=64, spread=1.0)
    tiny = np.random.default_rng(0).normal(scale=5e-5, size=student.shape).astype(np.float32)
    sampler = (student - tiny).astype(np.float32)
    tokens = TokenLogprobs(student, teacher, sampler, mask)
    found = averages(jax.device_get(diagnostics(tokens, Terms(0.5))))["w_std"]
    want = np.std(np.exp(student.astype(np.float64) - sampler)[mask])
    assert found == pytest.approx(want, rel=0.01)


def test_figures_are_of_the_advantage_that_is_used():
    """With a reward scale the target is not the teacher; the reverse KL is still the teacher's."""
    student, teacher, mask, _ = batch(4, spread=1.0)
    sampler = student - np.float32(0.2)
    tokens = TokenLogprobs(student, teacher, sampler, mask)
    found = averages(jax.device_get(diagnostics(tokens, Terms(reward_scale=1.5))))
    gap = (sampler + 1.5 * (teacher - sampler) - student)[mask]
    assert found["half_squared_advantage"] == pytest.approx(np.mean(gap**2) / 2, rel=1e-4)
    assert found["reverse_kl_estimate"] == pytest.approx(
        np.mean((student - teacher)[mask]), rel=1e-4
    )


def test_sft_loss_is_a_sum_and_a_count():
    logprob = np.array([[-1.0, -2.0, np.nan], [-3.0, np.nan, np.nan]], np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    loss = sft_loss(logprob, mask)
    assert (float(loss.total), float(loss.divisor)) == (6.0, 3.0)
