"""Opening a GGUF file: the one place that needs the `gguf` package."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_jax.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader


def is_gguf(path: str | Path) -> bool:
    """Whether a model path names a GGUF file."""
    return str(path).endswith(".gguf")


def open_gguf(path: str | Path) -> GGUFReader:
    """The parsed header and memory-mapped tensors of a GGUF file.

    Raises:
        ModelError: no such file, not GGUF, truncated, or the extra `gguf` is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file; give a Hugging Face folder or a .gguf file")
    stat = path.stat()
    return _open(path, stat.st_mtime_ns, stat.st_size)


# Parsing a large vocabulary takes seconds, and weights and tokenizer are read one after the other.
@functools.lru_cache(maxsize=2)
def _open(path: Path, _mtime: int, size: int) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"{path}: reading GGUF needs an extra: pip install 'opd_jax[gguf]'"
        ) from error
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path}: truncated or no GGUF file of {size} bytes ({reason}); copy it again"
        ) from error
    return reader


def metadata(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a metadata field."""
    field = reader.get_field(key)
    return default if field is None else field.contents()
