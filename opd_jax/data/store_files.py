"""Small immutable objects under a store's root, on any key-value store that TensorStore knows.

The root is a local folder or a URL (`gs://`, `s3://`). A write is atomic: a reader sees the whole
object or none. Every JSON object carries the schema version and a sha256 over its own canonical
text, so no flipped bit passes.

`s3://` reads the environment variables of the AWS tools: `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, and for S3-compatible servers `AWS_ENDPOINT_URL_S3` or
`AWS_ENDPOINT_URL` with `AWS_REGION` or `AWS_DEFAULT_REGION`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import tensorstore as ts

from opd_jax.errors import DataError

SCHEMA_VERSION = 1
TENSORSTORE_ERRORS = (ValueError, IndexError, OSError, RuntimeError)


class SchemaVersionError(DataError):
    """A document of a version that this reader does not know."""


def is_url(root: str) -> bool:
    """Whether a root is the address of an object store, not a local folder."""
    return "://" in root


def _spec_of(url: str) -> dict[str, Any]:
    """TensorStore's words for an address; an `s3://` one has no place for the server's name.

    Raises:
        ValueError: TensorStore knows no such address.
    """
    spec: dict[str, Any] = ts.KvStore.Spec(url.rstrip("/") + "/").to_json()
    endpoint = _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if spec["driver"] == "s3" and endpoint is not None:
        region = _variable("AWS_REGION", "AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    return spec


def _variable(*names: str) -> str | None:
    """The first of these environment variables that is set to something."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def shared_context() -> ts.Context:
    """One pool per process, and one way to find credentials."""
    # Given ones are said to be: else TensorStore also looks for files in ~/.aws, and complains that
    # there are none.
    return _context(_variable("AWS_ACCESS_KEY_ID") is not None)


@functools.cache
def _context(given: bool) -> ts.Context:
    """One pool. The default of 32 requests is 4 times slower at 30 ms latency.

    The pool serves the shards' indices: no two records share a chunk. 256 MB in place of 64 take
    280 MB more and read a tenth faster, in ten million tokens of records of 50; of 2,000, no faster
    (benchmarks/store_open.py).

    A store that does not answer is given up after 3 minutes; by default it would take 15.
    """
    requests = {"limit": 256}
    retries = {"max_retries": 10}
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 64_000_000},
            "aws_credentials": {"type": "environment" if given else "default"},
            "s3_request_retries": retries,
            "gcs_request_retries": retries,
            "file_io_concurrency": {"limit": 32},
            "gcs_request_concurrency": requests,
            "s3_request_concurrency": requests,
            "http_request_concurrency": requests,
        }
    )


def short_cause(error: Exception) -> str:
    """What TensorStore says of an error, without where in its source."""
    return str(error).splitlines()[0].split(" [source locations")[0][:300]


@contextmanager
def damage_named(path: str, repair: str) -> Generator[None]:
    """Turns what TensorStore raises inside into one line that names the file and the repair."""
    try:
        yield
    except TENSORSTORE_ERRORS as error:
        raise DataError(f"{path}: cannot be read ({short_cause(error)}); {repair}") from error


@contextmanager
def write_failure_named(path: str) -> Generator[None]:
    """The same for what is written: a full disk, a folder that is not ours."""
    try:
        yield
    except TENSORSTORE_ERRORS as error:
        cause = short_cause(error)
        repair = "free space or choose another folder"
        raise DataError(f"{path}: cannot be written ({cause}); {repair}") from error


_INDENT = re.compile(rb"\n *")


def encode_document(body: dict[str, Any]) -> bytes:
    """The one text of a JSON object: version and digest added, keys sorted."""
    return (json.dumps(_with_digest(body), sort_keys=True, indent=1) + "\n").encode()


def _with_digest(body: dict[str, Any]) -> dict[str, Any]:
    content = {"schema_version": SCHEMA_VERSION, **body}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _is_text_of(raw: bytes, body: dict[str, Any]) -> bool:
    """Whether `raw` is what `encode_document` gives, but for how far lines are indented.

    To indent is slow: it would take half of the time in which a store of many segments opens.
    """
    text = json.dumps(_with_digest(body), sort_keys=True, separators=(",", ": "))
    return raw.endswith(b"}\n") and _INDENT.sub(b"", raw) == text.encode()


class StoreFiles:
    """Reads and writes whole objects below one root; `root` is its name in messages."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        text = os.fspath(root)
        self.root = text.rstrip("/") if is_url(text) else os.path.abspath(text)
        with damage_named(self.root, "give a folder or a gs:// or s3:// address"):
            local = {"driver": "file", "path": self.root + "/"}
            spec = _spec_of(text) if is_url(text) else local
            self.kvstore = ts.KvStore.open(spec, context=shared_context()).result()

    def path(self, key: str) -> str:
        """The object's full name, for messages."""
        return f"{self.root}/{key}"

    def names(self, folder: str, ending: str = ".json") -> list[str]:
        """Sorted names in `folder` (which ends in a slash), `ending` taken off."""
        with damage_named(self.path(folder), "make the folder readable"):
            keys = (self.kvstore / folder).list().result()
        texts = (key.decode() for key in keys)
        return sorted(t.removesuffix(ending) for t in texts if t.endswith(ending) and "/" not in t)

    def check_writable(self, key: str) -> None:
        """Writes an object and removes it; raises DataError where that cannot be done."""
        self.write(key, b"")
        self.delete(key)

    def delete(self, key: str) -> None:
        """Removes an object, if it is there."""
        with damage_named(self.path(key), "allow to delete it"):
            self.kvstore.write(key, None).result()

    def remove(self) -> None:
        """Removes everything below the root, and nothing beside it.

        Documents go first: what a kill leaves is without commits, so no reader lists it.
        """
        with damage_named(self.root, "make it writable"):
            keys = [key for key in self.kvstore.list().result() if key.endswith(b".json")]
            for deletion in [self.kvstore.write(key, None) for key in keys]:
                deletion.result()
            self.kvstore.delete_range(ts.KvStore.KeyRange()).result()

    def is_empty(self) -> bool:
        """Whether there is nothing below the root."""
        with damage_named(self.root, "make it readable"):
            return not self.kvstore.list().result()

    def read(self, key: str, repair: str) -> bytes:
        """The object's bytes.

        Raises:
            DataError: it is missing or unreadable.
        """
        with damage_named(self.path(key), repair):
            found = self.kvstore.read(key).result()
        if found.state != "value":
            raise DataError(f"{self.path(key)}: file is missing; {repair}")
        return bytes(found.value)

    def exists(self, key: str) -> bool:
        """Whether an object of that name is there."""
        with damage_named(self.path(key), "make it readable"):
            return self.kvstore.read(key).result().state == "value"

    def write(self, key: str, data: bytes) -> None:
        """Writes the object atomically and durably, replacing one of that name."""
        with write_failure_named(self.path(key)):
            self.kvstore.write(key, data).result()

    def write_new(self, key: str, data: bytes) -> None:
        """Writes the object unless one of that name is there; of two writers one wins."""
        with damage_named(self.path(key), "make it readable"):
            found = self.kvstore.read(key).result()
        if found.state == "missing":
            with write_failure_named(self.path(key)):
                self.kvstore.write(key, data, if_equal=found.stamp.generation).result()
        if not self.exists(key):  # S3 takes a bucket that is not there for another's write
            self.write(key, data)

    def write_document(self, key: str, body: dict[str, Any]) -> str:
        """Writes a JSON object and returns its digest."""
        data = encode_document(body)
        self.write(key, data)
        return json.loads(data)["sha256"]

    def read_document(self, key: str, repair: str) -> dict[str, Any]:
        """Reads a JSON object, `schema_version` and `sha256` included.

        Raises:
            DataError: it is missing, of another schema version, or not the text that was written.
        """
        raw = self.read(key, repair)
        try:
            document = json.loads(raw)
            version = document["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path(key)}: damaged, not the JSON written; {repair}") from error
        if version != SCHEMA_VERSION:
            raise SchemaVersionError(
                f"{self.path(key)}: schema version {version!r}, this opd_jax reads"
                f" {SCHEMA_VERSION}; install the version that wrote it; if it is damaged: {repair}"
            )
        body = {name: value for name, value in document.items() if name != "sha256"}
        if not _is_text_of(raw, body):
            raise DataError(f"{self.path(key)}: damaged, its digest does not match; {repair}")
        return document
