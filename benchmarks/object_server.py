"""A read-only object server on loopback that speaks S3 and answers late, as a distant one does.

    python benchmarks/object_server.py FOLDER MILLISECONDS

Serves the files of FOLDER as objects of any bucket, whole or by ranges, and lists them; every
answer comes MILLISECONDS after its request. Prints its port.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class Objects:
    """The files in memory."""

    def __init__(self, folder):
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.data = {str(path.relative_to(folder)): path.read_bytes() for path in files}
        self.tags = {key: hashlib.md5(data).hexdigest() for key, data in self.data.items()}

    def answer(self, target, headers):
        """Status line, further headers and body."""
        path, _, query = target.partition("?")
        key = urllib.parse.unquote(path).lstrip("/").partition("/")[2]
        asked = urllib.parse.parse_qs(query)
        if "list-type" in asked:
            return "200 OK", [], self.listing(asked.get("prefix", [""])[0])
        if key not in self.data:
            return "404 Not Found", [], b"<Error><Code>NoSuchKey</Code></Error>"
        data, tag = self.data[key], f'ETag: "{self.tags[key]}"'
        wanted = re.search(r"(?im)^range: *bytes=(\d*)-(\d*)", headers)
        if not wanted:
            return "200 OK", [tag], data
        first, last = wanted.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        where = f"Content-Range: bytes {start}-{end - 1}/{len(data)}"
        return "206 Partial Content", [tag, where], data[start:end]

    def listing(self, prefix):
        """All keys that start so; never cut short."""
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size></Contents>"
            for key, data in self.data.items()
            if key.startswith(prefix)
        )
        head = '<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>'
        return f"{head}<KeyCount>{len(self.data)}</KeyCount>{rows}</ListBucketResult>".encode()


class Connection(asyncio.Protocol):
    """One client; requests have no body."""

    def __init__(self, objects, seconds):
        self.objects, self.seconds, self.waiting = objects, seconds, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.waiting += data
        while b"\r\n\r\n" in self.waiting:
            head, _, self.waiting = self.waiting.partition(b"\r\n\r\n")
            asyncio.get_running_loop().call_later(self.seconds, self.respond, head.decode())

    def respond(self, head):
        method, target, _ = head.split(" ", 2)
        status, more, body = self.objects.answer(target, head)
        fields = [f"Content-Length: {len(body)}", f"Last-Modified: {DATE}", *more]
        text = "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode()
        if not self.transport.is_closing():
            self.transport.write(text if method == "HEAD" else text + body)


async def main(folder, milliseconds):
    objects = Objects(Path(folder))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(objects, float(milliseconds) / 1000), "127.0.0.1", 0
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
