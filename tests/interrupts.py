"""Ctrl-C at chosen moments."""

from opd_jax.data.store_files import StoreFiles


def interrupt_commits(monkeypatch, moment):
    """Ctrl-C comes at the first commit of a segment, before or after it is written."""
    write, came = StoreFiles.write, []

    def interrupted(files, key, data):
        first = "commits/" in key and not came
        if first and moment == "before":
            came.append(key)
            raise KeyboardInterrupt
        write(files, key, data)
        if first:
            came.append(key)
            raise KeyboardInterrupt

    monkeypatch.setattr(StoreFiles, "write", interrupted)
