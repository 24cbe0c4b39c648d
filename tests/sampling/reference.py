"""A slow sampler to compare with: one request at a time, the whole sequence at every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.core.rng import key_for
from opd_jax.model.architecture import Architecture
from opd_jax.model.transformer import LanguageModel

PADDED = 64
BENDS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
}
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}

FAMILIES = {
    "llama": {"tie_embeddings": True, "qkv_bias": False, "qk_norm": False},
    "qwen2": {"tie_embeddings": False, "qkv_bias": True, "qk_norm": False},
    "qwen3": {"tie_embeddings": True, "qkv_bias": False, "qk_norm": True},
    "qwen3_moe": {
        "tie_embeddings": False,
        "qkv_bias": False,
        "qk_norm": True,
        "sparse_layers": (0, 1),
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_ffn_dim": 12,
        "norm_topk_prob": True,
    },
}


def tiny_model(family="llama", mesh=None, compute_dtype="float32", **changes):
    sizes = {
        "vocab_size": 28,
        "embed_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rope_theta": 1e4,
        "norm_eps": 1e-6,
        "max_position": PADDED,
    }
    arch = Architecture(family, **{**sizes, **FAMILIES[family], **changes})
    return LanguageModel(arch, compute_dtype, mesh=mesh)


def random_params(model, seed=0):
    """Random weights, constants (norms, biases) included, so that none goes unnoticed."""
    rng = np.random.default_rng(seed)

    def leaf(path, spec):
        head = "head" in jax.tree_util.keystr(path)  # [v, d]: its inputs come last
        fan_in = spec.shape[-1 if head else -2] if len(spec.shape) > 1 else 1
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        width = 0.1 if centre else max(fan_in, 16) ** -0.5
        return jnp.asarray(centre + width * rng.standard_normal(spec.shape), jnp.float32)

    return jax.tree.map_with_path(leaf, model.abstract())


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens_t):
    position_bt = jnp.arange(len(tokens_t))[None]
    hidden_btd = model.forward(params, tokens_t[None], position_bt).hidden_btd
    return (hidden_btd[0] @ model.head(params).T).astype(jnp.float32)


def log_softmax(logits_v):
    shifted = np.asarray(logits_v, np.float64) - np.max(logits_v)
    return shifted - np.log(np.sum(np.exp(shifted)))


def bent_probs(logits_v, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution to draw from, in float64, written out in the order of the definition."""
    prob_v = np.exp(log_softmax(np.asarray(logits_v, np.float64) / temperature))
    order = np.argsort(-prob_v, kind="stable")
    if top_k:
        prob_v[order[top_k:]] = 0
        prob_v /= prob_v.sum()
    if top_p < 1:
        mass = 0.0
        for token in order:
            if mass >= top_p:
                prob_v[token] = 0
            mass += prob_v[token]
        prob_v /= prob_v.sum()
    prob_v[prob_v < min_p * prob_v.max()] = 0
    return prob_v / prob_v.sum()


def forced_logits(model, params, prompt_ids, response_ids):
    """[n, v]: what each response token was drawn from, by one forward over prompt and response."""
    ids = np.zeros(PADDED, np.int32)
    ids[: len(prompt_ids) + len(response_ids)] = [*prompt_ids, *response_ids]
    logits_tv = np.asarray(all_logits(model, params, ids))
    return logits_tv[len(prompt_ids) - 1 : len(prompt_ids) + len(response_ids) - 1]


def teacher_forced(model, params, prompt_ids, response_ids):
    """Log-probs of a response, from one forward over prompt and response."""
    logits_nv = forced_logits(model, params, prompt_ids, response_ids)
    return np.array(
        [log_softmax(x)[token] for x, token in zip(logits_nv, response_ids, strict=True)]
    )


def sample_slowly(model, params, request, sampling, end_ids, seed):
    """Token ids of one response."""
    ids, response = list(request.prompt_ids), []
    for position in range(sampling.max_new_tokens):
        padded = np.zeros(PADDED, np.int32)
        padded[: len(ids)] = ids
        logits_v = np.asarray(all_logits(model, params, padded))[len(ids) - 1]
        token = _draw(logits_v, sampling, token_key(seed, request, position))
        ids.append(token)
        response.append(token)
        if token in end_ids:
            break
    return response


def token_key(seed, request, position):
    """The key of one token of a response."""
    return key_for(seed, "sample", request.prompt_id, request.sample_index, position)


def gumbel_of(key, vocab):
    """The noise that is added to a token's logits."""
    return np.asarray(jax.random.gumbel(key, (vocab,), jnp.float32))


def _draw(logits_v, sampling, key):
    if sampling.temperature == 0:
        return int(np.argmax(logits_v))
    prob_v = bent_probs(
        logits_v, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    )
    with np.errstate(divide="ignore"):
        return int(np.argmax(np.log(prob_v) + gumbel_of(key, len(logits_v))))


def assert_frequencies(tokens, prob_v):
    """That the tokens were drawn so: chi-square at one error in a thousand; returns it."""
    expected_v, seen_v = len(tokens) * prob_v, np.bincount(tokens, minlength=len(prob_v))
    possible = expected_v > 0
    assert not seen_v[~possible].any()
    difference = seen_v[possible] - expected_v[possible]
    chi_square = np.sum(difference**2 / expected_v[possible])
    assert chi_square < CHI_SQUARE_999[possible.sum() - 1]
    return chi_square
