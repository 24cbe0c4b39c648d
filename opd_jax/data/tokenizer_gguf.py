"""The byte-level BPE tokenizer inside a GGUF file, rebuilt with the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from opd_jax.core.gguf_file import metadata, open_gguf
from opd_jax.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_GPT2 = ("gpt-2", "gpt2")
PRE_TOKENIZERS = (*_BY_DIGIT, *_LLAMA3, *_QWEN2, *_GPT2)


class GGUFTokenizer(NamedTuple):
    """What a GGUF file says of its tokenizer."""

    backend: Backend
    settings: dict[str, Any]
    """Special tokens and chat template, by transformers' names."""
    end_ids: list[int]
    begins: bool
    """Whether a text is read behind the beginning token."""


def read_gguf_tokenizer(path: str | Path) -> GGUFTokenizer:
    """Rebuild the tokenizer; raises ModelError when it is of a kind that is not built here."""
    reader = open_gguf(path)
    pre = _pre(reader, path)
    tokens = metadata(reader, "tokenizer.ggml.tokens", [])
    ends = [metadata(reader, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    return GGUFTokenizer(
        _backend(reader, tokens, pre),
        _settings(reader, tokens),
        [end for end in ends if end is not None],
        bool(metadata(reader, "tokenizer.ggml.add_bos_token", pre in _LLAMA3)),
    )


def _pre(reader: GGUFReader, path: str | Path) -> str:
    """The name of the text's split, checked."""
    kind, pre = (metadata(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    # llama.cpp warns and splits by a rule of its own, which no model here was trained with.
    if kind == "gpt2" and pre in (None, "default"):
        raise ModelError(
            f"{path}: tokenizer.ggml.pre={pre!r} does not say how the text is split, as in files "
            "of early 2024; give the Hugging Face folder, or a copy made by gguf-new-metadata "
            f"--pre-tokenizer NAME IN OUT; supported names: {', '.join(PRE_TOKENIZERS)}"
        )
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported: 'gpt2' with {', '.join(PRE_TOKENIZERS)}: "
            "convert the model to a Hugging Face folder"
        )
    return pre


def _backend(reader: GGUFReader, tokens: list[str], pre: str) -> Backend:
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges", [])]
    # Llama 3 takes a word that is in the vocabulary whole, even where the merges lead elsewhere.
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3))
    if pre in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    types = metadata(reader, "tokenizer.ggml.token_type", [])
    for number, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind in (_CONTROL, _USER_DEFINED) and vocab[token] == number:
            _add_token(backend, token, kind)
    return backend


def _add_token(backend: Backend, token: str, kind: int) -> None:
    """Control tokens are special (left out of decoded text), user-defined ones (`<think>`) not."""
    added = AddedToken(token, special=kind == _CONTROL, normalized=False)
    if kind == _CONTROL:
        backend.add_special_tokens([added])
    else:
        backend.add_tokens([added])


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _BY_DIGIT:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    split = Regex(_LLAMA3_SPLIT if pre in _LLAMA3 else _QWEN2_SPLIT)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _settings(reader: GGUFReader, tokens: list[str]) -> dict[str, Any]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings: dict[str, Any] = {}
    for name, key in keys.items():
        number = metadata(reader, f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            settings[name] = tokens[number]
    return settings | {"chat_template": metadata(reader, "tokenizer.chat_template")}
