"""An S3-compatible server on this machine, in a process of its own."""

import contextlib
import re
import subprocess
import sys
import threading
import urllib.request

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def running():
    """Yields the server's address while it runs, on a port that was free."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    # It writes a line a request: a pipe that nobody empties would stop it.
    drain = threading.Thread(target=server.stderr.read)
    try:
        for line in server.stderr:
            if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            raise RuntimeError("moto's server ended before it began")
        drain.start()
        yield found[1]
    finally:
        server.kill()
        if drain.is_alive():
            drain.join()
        server.stderr.close()
        server.wait()


def make_bucket(endpoint, name):
    """Creates a bucket; returns its `s3://` address."""
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    urllib.request.urlopen(request).close()
    return f"s3://{name}"
