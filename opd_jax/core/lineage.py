"""Who made what: fingerprints of models and files, and the record of an artefact's ancestors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from opd_jax.core.distributed import from_first, is_first
from opd_jax.core.pieces import pieces


def fingerprint_json(value: Any) -> str:
    """sha256 over the canonical JSON text of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_params(params: Any) -> str:
    """sha256 over names, shapes and float32 values: the same in any dtype, file layout or sharding.

    Called by every process; the first one hashes, piece by piece.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(_leaves(params)):
        digest.update(leaf_header(path, leaf.shape))
        for piece in pieces(leaf):
            if is_first():
                host = np.asarray(piece).astype(np.float32, copy=False)
                digest.update(np.ascontiguousarray(host).data)
    return from_first(digest.hexdigest())


def leaf_header(path: str, shape: tuple[int, ...]) -> bytes:
    """What `fingerprint_params` hashes before a parameter's values."""
    return f"{path}{shape}".encode()


def _leaves(params: Any) -> Iterator[tuple[str, jax.Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(path), leaf


def same_lineage(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal, models being equal by fingerprint: one may have moved."""
    if isinstance(first, dict) and isinstance(second, dict):
        if "fingerprint" in first and "fingerprint" in second:
            return first["fingerprint"] == second["fingerprint"]
        return first.keys() == second.keys() and all(
            same_lineage(first[key], second[key]) for key in first
        )
    return first == second


def shown(value: Any) -> str:
    """A value of a lineage in few words: a model by its name and the start of its fingerprint."""
    if isinstance(value, dict) and {"name", "fingerprint"} <= value.keys():
        return f"{value['name']} ({value['fingerprint'][:12]})"
    return f"{value!r:.60}"


@dataclass(frozen=True)
class TokenizerParts:
    """Fingerprints of what a tokenizer consists of, to say which of them differ.

    Attributes:
        vocabulary: tokens with their ids, merges and special tokens.
        texts: token ids of the probe texts: how text is cut.
        chat_template: its text.
        chats: the probe chats as they are rendered.
        end_tokens: ids that end a response.
    """

    vocabulary: str
    texts: str
    chat_template: str
    chats: str
    end_tokens: str

    def differences(self, other: TokenizerParts) -> list[str]:
        """What reaches a model differently, in words; templates that render alike are alike."""
        same_chats = self.chat_template == other.chat_template or self.chats == other.chats
        found = {
            "tokenizer (vocabulary, merges or special tokens)": self.vocabulary == other.vocabulary,
            "tokenizer (how text is cut into tokens)": self.texts == other.texts,
            "chat template": same_chats,
            "end tokens": self.end_tokens == other.end_tokens,
        }
        return [what for what, same in found.items() if not same]


@dataclass(frozen=True)
class Identity:
    """A model as lineage knows it: a name for people, and what makes it the same model or another.

    Attributes:
        name: where it was read from, or the checkpoint's name.
        weights: fingerprint of its parameters.
        architecture: fingerprint of its sizes and switches.
        tokenizer: fingerprint of its tokenizer, chat template and end tokens.
        parts: the same, one by one; `None` in what was recorded before there were any. They decide
            nothing between two teachers: `tokenizer` does.
    """

    name: str
    weights: str
    architecture: str
    tokenizer: str
    parts: TokenizerParts | None = None

    @property
    def fingerprint(self) -> str:
        """Equal for two models exactly if they answer alike."""
        return fingerprint_json([self.weights, self.architecture, self.tokenizer])

    def differences(self, other: Identity) -> list[str]:
        """What makes the other another model, in words."""
        found: list[str] = []
        if self.weights != other.weights:
            found.append("weights")
        if self.architecture != other.architecture:
            found.append("config")
        return found + self.tokenizer_differences(other)

    def tokenizer_differences(self, other: Identity) -> list[str]:
        """What of the two tokenizers differs, in words."""
        if self.tokenizer == other.tokenizer:
            return []
        if self.parts is None or other.parts is None:
            return ["tokenizer, chat template or end tokens"]
        if found := self.parts.differences(other.parts):
            return found
        same = self.parts.chat_template == other.parts.chat_template
        return ["tokenizer files" if same else "chat template (its text alone)"]

    def to_json(self) -> dict[str, Any]:
        """As it stands in `lineage.json` and in a store's metadata."""
        return {**asdict(self), "fingerprint": self.fingerprint}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Identity:
        """The inverse of `to_json`; reads what older versions recorded, too."""
        parts = value.get("parts")
        return Identity(
            value["name"],
            value["weights"],
            value["architecture"],
            value["tokenizer"],
            None if parts is None else TokenizerParts(**parts),
        )

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[:12]})"
