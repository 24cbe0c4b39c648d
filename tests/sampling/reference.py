"""A slow sampler to compare with: one request at a time, the whole sequence at every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.core.rng import key_for
from opd_jax.model.architecture import Architecture
from opd_jax.model.transformer import LanguageModel

PADDED = 64

FAMILIES = {
    "llama": {"tie_embeddings": True, "qkv_bias": False, "qk_norm": False},
    "qwen2": {"tie_embeddings": False, "qkv_bias": True, "qk_norm": False},
    "qwen3": {"tie_embeddings": True, "qkv_bias": False, "qk_norm": True},
}


def tiny_model(family="llama", mesh=None, **changes):
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
    return LanguageModel(
        Architecture(family, **{**sizes, **FAMILIES[family], **changes}), mesh=mesh
    )


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


def teacher_forced(model, params, prompt_ids, response_ids):
    """Log-probs of a response, from one forward over prompt and response."""
    ids = np.zeros(PADDED, np.int32)
    ids[: len(prompt_ids) + len(response_ids)] = [*prompt_ids, *response_ids]
    logits_tv = np.asarray(all_logits(model, params, ids))
    before = range(len(prompt_ids) - 1, len(prompt_ids) + len(response_ids) - 1)
    return np.array([log_softmax(logits_tv[t])[ids[t + 1]] for t in before])


def sample_slowly(model, params, request, sampling, end_ids, seed):
    """Token ids of one response."""
    ids, response = list(request.prompt_ids), []
    base = key_for(seed, "sample", request.prompt_id, request.sample_index)
    for position in range(sampling.max_new_tokens):
        padded = np.zeros(PADDED, np.int32)
        padded[: len(ids)] = ids
        logits_v = np.asarray(all_logits(model, params, padded))[len(ids) - 1]
        token = _draw(logits_v, sampling, jax.random.fold_in(base, position))
        ids.append(token)
        response.append(token)
        if token in end_ids:
            break
    return response


def _draw(logits_v, sampling, key):
    if sampling.temperature == 0:
        return int(np.argmax(logits_v))
    prob_v = bent_probs(
        logits_v, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    )
    noise_v = np.asarray(jax.random.gumbel(key, logits_v.shape, jnp.float32))
    with np.errstate(divide="ignore"):
        return int(np.argmax(np.log(prob_v) + noise_v))
