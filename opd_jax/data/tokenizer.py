"""The tokenizer and chat template of a Hugging Face folder or a GGUF file.

`tokenizer.json` is read as it stands. transformers contributes the chat template's rendering, and
the files it reads back; torch is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from opd_jax.core.gguf_file import is_gguf
from opd_jax.core.lineage import fingerprint_json
from opd_jax.data.tokenizer_gguf import read_gguf_tokenizer
from opd_jax.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
MODEL_CONFIG_FILE = "config.json"
_COPIED = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    TEMPLATE_FILE,
    GENERATION_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# Llama 3 templates print today's date unless given one, and prompts must not change overnight.
_FIXED_DATE = "26 Jul 2024"


class Tokenizer:
    """Text to token ids and back, chats to prompts, and the ids that end a response."""

    def __init__(
        self,
        fast: PreTrainedTokenizerFast,
        end_ids: Sequence[int],
        source: str | Path,
        begin_ids: Sequence[int] = (),
    ) -> None:
        self._fast = fast
        self._begin_ids = list(begin_ids)
        self._source = Path(source)
        self.end_ids: tuple[int, ...] = tuple(sorted(set(end_ids)))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._fast.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands: special tokens are recognised, none is added."""
        return self._fast.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_opening(self, text: str) -> list[int]:
        """Token ids of a text that nothing precedes: behind the beginning token, if one is used."""
        ids = self.encode(text)
        begins = not self._begin_ids or ids[:1] == self._begin_ids
        return ids if begins else [*self._begin_ids, *ids]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        enable_thinking: bool = True,
        system: str | None = None,
    ) -> str:
        """The text of a chat, ending where the assistant's next message begins.

        Args:
            enable_thinking: handed to the template; templates without the switch ignore it.
            system: put in front of a chat that has no system message of its own.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        if self._fast.chat_template is None:
            raise DataError(
                f"{self._source}: has no chat template, so {messages!r:.60} cannot be rendered; "
                f"give a text, or add {TEMPLATE_FILE}"
            )
        chat = [dict(message) for message in messages]
        if system is not None and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": system})
        try:
            text = self._fast.apply_chat_template(
                chat,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
                date_string=_FIXED_DATE,
            )
        except TemplateError as error:
            raise DataError(
                f"{self._source}: the chat template refuses a prompt ({error}): {chat!r:.120}"
            ) from error
        return str(text)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        enable_thinking: bool = True,
        system: str | None = None,
    ) -> list[int]:
        """Token ids of `render_chat`."""
        return self.encode(self.render_chat(messages, enable_thinking, system))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; special tokens (the end token among them) are left out."""
        return self._fast.backend_tokenizer.decode(
            [int(token) for token in ids], skip_special_tokens=skip_special
        )

    @property
    def source(self) -> Path:
        """Where it was read from."""
        return self._source

    @property
    def chat_template(self) -> str | None:
        """The template's text."""
        template: Any = self._fast.chat_template
        return template

    def content(self) -> dict[str, Any]:
        """What `tokenizer.json` says, as the `tokenizers` library writes it."""
        return json.loads(self._fast.backend_tokenizer.to_str())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides which ids a chat becomes and where a response ends."""
        content = {
            "tokenizer": self.content(),
            "chat_template": self.chat_template,
            "end_ids": self.end_ids,
        }
        return fingerprint_json(content)

    def check_vocabulary(self, rows: int, model: str | Path) -> None:
        """Raises ModelError when a model of so many embedding rows lacks a row for some token.

        More rows than tokens are usual: they pad the vocabulary for the hardware.
        """
        if self.vocab_size > rows:
            raise ModelError(
                f"{model}: vocab_size={rows}, but its tokenizer {self._source} has token ids up to "
                f"{self.vocab_size - 1}; take the tokenizer that belongs to the model"
            )
        wrong = [token for token in self.end_ids if token >= rows]
        if wrong:
            raise ModelError(
                f"{self._source}: end token id {wrong[0]} is outside the vocabulary of {rows}; "
                f"correct eos_token_id in {GENERATION_FILE}"
            )

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers reads into an existing folder; copy where possible."""
        folder = Path(folder)
        if self._source.is_dir():
            for name in _COPIED:
                if (self._source / name).is_file():
                    shutil.copyfile(self._source / name, folder / name)
        else:
            self._write(folder)
        self._write_generation(folder)

    def _write_generation(self, folder: Path) -> None:
        """Keep a generation config that names every end token; else write one that does."""
        found = _read_json(folder / GENERATION_FILE)
        if set(_listed(found.get("eos_token_id"))) == set(self.end_ids):
            return
        known = {
            key: token
            for key in ("bos_token_id", "pad_token_id")
            if (token := getattr(self._fast, key)) is not None
        }
        _dump(folder / GENERATION_FILE, known | found | {"eos_token_id": list(self.end_ids)})

    def _write(self, folder: Path) -> None:
        fast = self._fast
        fast.backend_tokenizer.save(str(folder / TOKENIZER_FILE))
        (folder / TEMPLATE_FILE).write_text(str(fast.chat_template), encoding="utf-8")
        special = {key: getattr(fast, key) for key in _SPECIAL if getattr(fast, key) is not None}
        # To transformers 4 and 5 alike this class means: use tokenizer.json as it is.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        config["clean_up_tokenization_spaces"] = False
        _dump(folder / CONFIG_FILE, config)


def load_tokenizer(path: str | Path, *, chats: bool = True) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or of a .gguf file.

    Args:
        chats: whether it has to have a chat template.

    Raises:
        ModelError: a file is missing or broken, there is no chat template or no end token.
    """
    begins = False
    if is_gguf(path):
        backend, settings, end_ids, begins = read_gguf_tokenizer(path)
    else:
        backend, settings, end_ids = _read_folder(Path(path))
    if chats and settings.get("chat_template") is None:
        raise ModelError(
            f"{path}: has no chat template; add {TEMPLATE_FILE}, or take the tokenizer of the "
            "instruct model"
        )
    fast = _fast_tokenizer(backend, settings)
    bos, eos = (
        settings.get(key) and backend.token_to_id(settings[key])
        for key in ("bos_token", "eos_token")
    )
    if eos is not None:
        end_ids = [*end_ids, eos]
    if not end_ids:
        raise ModelError(f"{path}: names no end token; set eos_token_id in {GENERATION_FILE}")
    begins = begins or bos in backend.encode("").ids  # of a post-processor
    return Tokenizer(fast, end_ids, path, [bos] if begins and bos is not None else [])


def _fast_tokenizer(backend: Any, settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings
    )


def _read_folder(folder: Path) -> tuple[Any, dict[str, Any], list[int]]:
    """The `tokenizers` object, the settings for transformers, the generation config's end ids."""
    from tokenizers import Tokenizer as Backend

    if not folder.is_dir():
        raise ModelError(
            f"{folder}: no such model folder; give a Hugging Face folder or a .gguf file"
        )
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(
            f"{path}: missing; load the tokenizer with transformers and save it there with "
            "save_pretrained()"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path}: broken tokenizer ({error}); copy the file again") from error
    backend.no_padding()
    backend.no_truncation()
    config = _read_json(folder / CONFIG_FILE)
    settings: dict[str, Any] = {
        key: _token_text(config[key]) for key in _SPECIAL if config.get(key) is not None
    }
    settings |= {"chat_template": _chat_template(folder, config)}
    return backend, settings, _end_ids(folder)


def _token_text(value: Any) -> str:
    """A token in a config: a string, or the object of an added token."""
    return value["content"] if isinstance(value, dict) else value


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own (transformers 5), or in the config: one template, or several by name."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _end_ids(folder: Path) -> list[int]:
    """Of the generation config; where that names none, of the model's, as in transformers."""
    path = folder / GENERATION_FILE
    ids = _read_json(path).get("eos_token_id")
    if ids is None:
        path = folder / MODEL_CONFIG_FILE
        ids = _read_json(path).get("eos_token_id")
    ids = _listed(ids)
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ModelError(f"{path}: eos_token_id={ids!r} is no list of token ids")
    return ids


def _listed(ids: Any) -> list[Any]:
    """Nothing, one token id or several, as a list."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _read_json(path: Path) -> dict[str, Any]:
    """An optional JSON file: empty when it is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return content


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
