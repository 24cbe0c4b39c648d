"""Between the rotary keys of a Hugging Face `config.json` and a `RopeScaling`.

transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes `rope_parameters` with both inside.
What a key would change and is not built here is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from opd_jax.errors import ModelError
from opd_jax.model.architecture import Architecture, RopeKind, RopeScaling

KINDS: tuple[str, ...] = ("default", *get_args(RopeKind))
_ORIGINAL = "original_max_position_embeddings"
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        *("factor", _ORIGINAL, "attention_factor", "mscale", "mscale_all_dim"),
        *("beta_fast", "beta_slow", "truncate"),
    ),
}
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def rope_from_hf(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of a config.json.

    Raises:
        ModelError: an unknown kind or key, a value out of range, or two places that disagree.
    """
    given = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    for rope in given:
        if not isinstance(rope, Mapping):
            raise ModelError(f"{where}: rope_parameters={rope!r} is not an object")
    scalings = [_scaling(rope, config, where) for rope in given]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ModelError(
            f"{where}: rope_scaling (rope_type={_kind(given[0])!r}) and rope_parameters "
            f"(rope_type={_kind(given[1])!r}) disagree; remove the wrong one"
        )
    return _base([*given, config], where), scalings[0] if scalings else None


def _base(places: list[Mapping[str, Any]], where: str) -> float:
    """transformers 4 reads the key beside the rope keys, 5 the one among them."""
    bases = [place["rope_theta"] for place in places if place.get("rope_theta") is not None]
    theta = bases[0] if bases else 10000.0
    if not _is_number(theta) or theta <= 1:
        raise ModelError(f"{where}: rope_theta={theta!r} is not a number above 1")
    for other in bases:
        if other != theta:
            raise ModelError(
                f"{where}: rope_theta={theta!r} and rope_theta={other!r} disagree; "
                "remove the wrong one"
            )
    return float(theta)


def rope_to_hf(arch: Architecture) -> dict[str, Any]:
    """The rotary keys of a config.json, for transformers 4 and 5."""
    scaling: dict[str, Any] = _scaling_to_hf(arch.rope_scaling)
    keys = {
        "rope_theta": arch.rope_theta,
        "rope_parameters": {"rope_theta": arch.rope_theta, **scaling},
    }
    return keys if arch.rope_scaling is None else {**keys, "rope_scaling": scaling}


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        keys[_ORIGINAL] = scaling.original_max_position
    if scaling.kind == "llama3":
        keys["low_freq_factor"] = scaling.low_freq_factor
        keys["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        for key in ("attention_factor", "beta_fast", "beta_slow"):
            keys[key] = getattr(scaling, key)
        if not scaling.truncate:  # transformers 4 before 4.55 does not know the key
            keys["truncate"] = False
    return keys


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = _kind(rope)
    if kind not in KINDS:
        raise ModelError(
            f"{where}: rope_type={kind!r} is not supported; supported: {', '.join(KINDS)}"
        )
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ModelError(
            f"{where}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported; "
            "only 1.0 is"
        )
    for key, value in rope.items():
        if value is not None and key not in (*_ALWAYS, *_KEYS[kind]):
            raise ModelError(
                f"{where}: rope key {key}={value!r} is not known for rope_type={kind!r}; "
                f"known: {', '.join(_KEYS[kind]) or 'none'}"
            )
    if kind == "linear":
        return RopeScaling("linear", _number(rope, "factor", where))
    if kind == "llama3":
        return _llama3(rope, config, where)
    return _yarn(rope, config, where) if kind == "yarn" else None


def _llama3(rope: Mapping[str, Any], config: Mapping[str, Any], where: str) -> RopeScaling:
    low, high = (_number(rope, f"{end}_freq_factor", where) for end in ("low", "high"))
    if high <= low:
        raise ModelError(
            f"{where}: rope key high_freq_factor={high} is not above low_freq_factor={low}"
        )
    original = _original(rope, config, where)
    return RopeScaling("llama3", _number(rope, "factor", where), original, low, high)


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any], where: str) -> RopeScaling:
    original = _original(rope, config, where)
    stretched = config.get("max_position_embeddings", original) / original
    factor = _number(rope, "factor", where, stretched if "factor" in rope else None)
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ModelError(f"{where}: rope key truncate={truncate!r} is neither true nor false")
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=_number(rope, "beta_fast", where, 32.0),
        beta_slow=_number(rope, "beta_slow", where, 1.0),
        attention_factor=_number(rope, "attention_factor", where, _magnitude(rope, factor, where)),
        truncate=truncate,
    )


def _magnitude(rope: Mapping[str, Any], factor: float, where: str) -> float:
    """The attention factor that transformers derives when none is written."""
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return yarn_magnitude(factor)
    of_all = yarn_magnitude(factor, _number(rope, "mscale_all_dim", where))
    return yarn_magnitude(factor, _number(rope, "mscale", where)) / of_all


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """How much longer contexts sharpen attention. Source: arXiv 2309.00071, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _original(rope: Mapping[str, Any], config: Mapping[str, Any], where: str) -> int:
    """Inside the rope keys, beside them, or else the model's own length."""
    inside, beside = rope.get(_ORIGINAL), config.get(_ORIGINAL)
    if None not in (inside, beside) and inside != beside:
        raise ModelError(
            f"{where}: {_ORIGINAL}={inside!r} among the rope keys and {beside!r} beside them "
            "disagree; remove the wrong one"
        )
    value = next(
        (x for x in (inside, beside) if x is not None), config.get("max_position_embeddings", 2048)
    )
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {_ORIGINAL}={value!r} is not a positive integer")
    return value


def _number(rope: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = default if rope.get(key) is None else rope[key]
    if value is None or not _is_number(value) or value <= 0:
        raise ModelError(f"{where}: rope key {key}={value!r} is not a positive number")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
