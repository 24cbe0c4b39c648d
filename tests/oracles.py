"""Slow float64 restatements of every formula, with loops, written from the paper's definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np


def log_softmax(logits):
    """Along the last axis, float64."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def lightning_loss(student, teacher, mask, tau):
    """Mean over sequences of the mean over response tokens of -A * log pi_theta; A is a number."""
    total = 0.0
    for row in range(len(student)):
        terms = []
        for t in range(len(student[row])):
            if mask[row][t]:
                gap = float(teacher[row][t]) - float(student[row][t])
                terms.append(-max(-tau, min(tau, gap)) * float(student[row][t]))
        total += sum(terms) / len(terms)
    return total / len(student)


def opd_loss(student, teacher, sampler, responses, terms, *, per_token=False):
    """The sampled-token objective with every term, token by token; `responses` are lists of places.

    METHOD: A = clip(l_R + s (l_T - l_R) - l, +-tau) + c clip(l_R - l, +-tau), a number; a token
    weighs min(w, cap) (1 + gamma (1 - sum abs(A) before / sum abs(A))).
    """
    total, count = 0.0, 0
    for places in responses:
        adv = []
        for at in places:
            target = sampler[at] + terms.reward_scale * (teacher[at] - sampler[at])
            clipped = max(-terms.tau, min(terms.tau, target - student[at]))
            pull = max(-terms.tau, min(terms.tau, sampler[at] - student[at]))
            adv.append(clipped + terms.kl_anchor * pull)
        whole, before, summed = sum(map(abs, adv)), 0.0, 0.0
        for at, a in zip(places, adv, strict=True):
            w = math.exp(student[at] - sampler[at])
            weight = 1.0 if terms.weight_cap is None else min(w, terms.weight_cap)
            weight *= 1 + terms.position_gamma * (1 - (before / whole if whole else 0.0))
            before += abs(a)
            if terms.ratio_clip is None:
                summed += -weight * a * student[at]
            else:
                bounded = max(1 - terms.ratio_clip, min(1 + terms.ratio_clip, w))
                summed += -weight * min(w * a, bounded * a)
        total += summed if per_token else summed / len(places)
        count += len(places) if per_token else 1
    return total / count


def huber(gap, tau):
    """gap^2 / 2 up to tau, linear beyond."""
    return gap * gap / 2 if abs(gap) <= tau else tau * (abs(gap) - tau / 2)


def topk_kl(student, teacher, rest=None):
    """KL(student || teacher) over a support, from true log-probs of one position.

    `rest` is the teacher's mass outside of it; `None`: both are divided by their mass inside.
    """
    p = [math.exp(x) for x in student]
    q = [math.exp(x) for x in teacher]
    if rest is not None:
        rest_p, rest_q = 1 - sum(p), max(rest, 1e-6)
        inside = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        return inside + (rest_p * math.log(rest_p / rest_q) if rest_p > 0 else 0.0)
    p = [x / sum(p) for x in p]
    q = [x / sum(q) for x in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def enumerated_reverse_kl(logprob_fn, teacher_fn, vocab, length):
    """KL(pi_theta || pi_T) over every sequence of `length`, from functions sequence -> log-prob."""
    total = 0.0
    for sequence in itertools.product(range(vocab), repeat=length):
        lp = logprob_fn(sequence)
        total = total + np.exp(lp) * (lp - teacher_fn(sequence))
    return total


def attention(q, k, v, segments, out_grad):
    """Causal attention within segments, and its gradients, one query at a time.

    q and out_grad are [b][t][n][h], k and v [b][t][k][h], segments [b][t]. With p = softmax(s),
    s = q.k / sqrt(h) and out = sum p v:  dp = out_grad.v,  ds = p (dp - sum p dp).
    """
    q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    for b, t, n in itertools.product(*map(range, q.shape[:3])):
        read = [s for s in range(t + 1) if segments[b][s] == segments[b][t]]
        head = n // group
        p = np.exp(log_softmax(k[b, read, head] @ q[b, t, n] * scale))
        out[b, t, n] = p @ v[b, read, head]
        dp = v[b, read, head] @ out_grad[b, t, n]
        ds = p * (dp - p @ dp)
        dq[b, t, n] = ds @ k[b, read, head] * scale
        dk[b, read, head] += np.outer(ds, q[b, t, n]) * scale
        dv[b, read, head] += np.outer(p, out_grad[b, t, n])
    return out, dq, dk, dv


def _half(block, at):
    """The little-endian float16 that begins at a byte."""
    return float(np.array(block[at : at + 2], np.uint8).view(np.float16)[0])


def _scales_and_minima(packed):
    """Eight pairs of 6-bit numbers in 12 bytes: ggml's get_scale_min_k4."""
    pairs = []
    for j in range(8):
        if j < 4:
            pairs.append((packed[j] & 63, packed[j + 4] & 63))
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            pairs.append((scale, (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)))
    return pairs


def ggml_q4_k(block):
    """256 weights of a block: float16 d, float16 dmin, 12 bytes of scales, 128 bytes of nibbles."""
    pairs, nibbles = _scales_and_minima(block[4:16]), block[16:144]
    weights = []
    for part in range(8):
        scale, minimum = pairs[part]
        for i in range(32):
            quant = (nibbles[32 * (part // 2) + i] >> (4 * (part % 2))) & 15
            weights.append(_half(block, 0) * scale * quant - _half(block, 2) * minimum)
    return weights


def ggml_q5_k(block):
    """As Q4_K, with 32 bytes of fifth bits between scales and nibbles."""
    pairs, high, nibbles = _scales_and_minima(block[4:16]), block[16:48], block[48:176]
    weights = []
    for part in range(8):
        scale, minimum = pairs[part]
        for i in range(32):
            quant = (nibbles[32 * (part // 2) + i] >> (4 * (part % 2))) & 15
            quant += 16 * ((high[i] >> part) & 1)
            weights.append(_half(block, 0) * scale * quant - _half(block, 2) * minimum)
    return weights


def ggml_q6_k(block):
    """128 bytes of low nibbles, 64 of upper pairs of bits, 16 signed scales, float16 d."""
    low, high = block[:128], block[128:192]
    scales = [byte - 256 if byte > 127 else byte for byte in block[192:208]]
    weights = []
    for half in range(2):
        for part in range(4):
            for i in range(32):
                nibble = low[64 * half + 32 * (part % 2) + i] >> (4 * (part // 2)) & 15
                quant = (nibble | (((high[32 * half + i] >> (2 * part)) & 3) << 4)) - 32
                scale = scales[8 * half + 2 * part + i // 16]
                weights.append(_half(block, 208) * scale * quant)
    return weights


def ggml_q2_k(block):
    """16 bytes of 4-bit scales and minima, 64 bytes of pairs of bits, float16 d, float16 dmin."""
    weights = []
    for group in range(16):
        half, part, side = group // 8, group // 2 % 4, group % 2
        scale = _half(block, 80) * (block[group] & 15)
        minimum = _half(block, 82) * (block[group] >> 4)
        for i in range(16):
            quant = (block[16 + 32 * half + 16 * side + i] >> (2 * part)) & 3
            weights.append(scale * quant - minimum)
    return weights


def ggml_q3_k(block):
    """32 bytes of third bits, 64 of pairs of bits, 12 of 6-bit scales, float16 d."""
    packed = block[96:108]
    weights = []
    for group in range(16):
        half, part, side = group // 8, group // 2 % 4, group % 2
        scale = (packed[group % 8] >> (4 * (group // 8))) & 15
        scale |= ((packed[8 + group % 4] >> (2 * (group // 4))) & 3) << 4
        for i in range(16):
            quant = (block[32 + 32 * half + 16 * side + i] >> (2 * part)) & 3
            third = (block[16 * side + i] >> (4 * half + part)) & 1
            weights.append(_half(block, 108) * (scale - 32) * (quant + 4 * third - 4))
    return weights


def rope_frequencies(head_dim, base, rope):
    """Radians per position of every pair and the factor of cos and sin, from a config's rope keys.

    Each frequency f is a mix of f (kept) and f / factor; the variants differ in the share kept.
    """
    found = []
    for i in range(head_dim // 2):
        frequency = base ** (-2 * i / head_dim)
        if rope["rope_type"] == "default":
            kept = 1.0
        elif rope["rope_type"] == "linear":
            kept = 0.0
        elif rope["rope_type"] == "llama3":
            wavelength = 2 * math.pi / frequency
            original = rope["original_max_position_embeddings"]
            if wavelength < original / rope["high_freq_factor"]:
                kept = 1.0
            elif wavelength > original / rope["low_freq_factor"]:
                kept = 0.0
            else:
                span = rope["high_freq_factor"] - rope["low_freq_factor"]
                kept = (original / wavelength - rope["low_freq_factor"]) / span
        else:
            first, last = yarn_bounds(head_dim, base, rope)
            kept = 1.0 if i <= first else 0.0 if i >= last else (last - i) / (last - first)
        found.append(kept * frequency + (1 - kept) * frequency / rope.get("factor", 1.0))
    return found, yarn_attention(rope) if rope["rope_type"] == "yarn" else 1.0


def yarn_bounds(head_dim, base, rope):
    """The pairs that turn beta_fast and beta_slow times in the original context."""
    bounds = []
    for key, usual in (("beta_fast", 32), ("beta_slow", 1)):
        wavelength = rope["original_max_position_embeddings"] / rope.get(key, usual)
        bounds.append(head_dim / 2 * math.log(wavelength / (2 * math.pi), base))
    if rope.get("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    return max(bounds[0], 0), min(bounds[1], head_dim - 1)


def yarn_attention(rope):
    """As written, else 0.1 ln(factor) + 1, or the ratio of two such terms."""
    if "attention_factor" in rope:
        return rope["attention_factor"]
    logarithm = math.log(rope["factor"])
    if "mscale" in rope and "mscale_all_dim" in rope:
        return (0.1 * rope["mscale"] * logarithm + 1) / (
            0.1 * rope["mscale_all_dim"] * logarithm + 1
        )
    return 0.1 * logarithm + 1


def mixture_of_experts(x_td, layer, chosen, *, normed):
    """Token by token, expert by expert; returns the outputs and the experts of each token."""
    weights = {name: np.asarray(value, np.float64) for name, value in layer.items()}
    outputs, experts = [], []
    for x in np.asarray(x_td, np.float64):
        prob = np.exp(log_softmax(x @ weights["router"]))
        picked = sorted(range(len(prob)), key=lambda e: -prob[e])[:chosen]
        total = sum(prob[e] for e in picked) if normed else 1.0
        out = np.zeros_like(x)
        for e in picked:
            gate, up = x @ weights["w_gate"][e], x @ weights["w_up"][e]
            out += prob[e] / total * ((gate / (1 + np.exp(-gate)) * up) @ weights["w_down"][e])
        outputs.append(out)
        experts.append(picked)
    return np.array(outputs), experts
