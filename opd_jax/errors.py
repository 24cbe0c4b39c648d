"""The exceptions that a user can cause. The command line prints their one line and exits with 2,
but with 1 after what may pass (`main.PASSING`, `JoinError`).

A message names the thing, the value, the place and the repair.
"""


class OPDError(Exception):
    """Base of everything that a user can cause and repair."""


class ConfigError(OPDError):
    """A config key, type or value is wrong, or two of them contradict each other."""


class MeshError(ConfigError):
    """Mesh, batches or model do not suit the number of devices; they may suit another."""


class ModelError(OPDError):
    """A model folder is missing, broken or unknown, or does not fit its tokenizer or the mesh."""


class DataError(OPDError):
    """A prompt file, a store or a checkpoint cannot be read as what it claims to be."""


class ConsistencyError(OPDError):
    """Two artefacts that must descend from the same model, tokenizer or config do not."""


class StageError(OPDError):
    """A stage's inputs are missing or have changed since it ran."""


class JoinError(OPDError):
    """Several processes cannot join; at the next start they may, so the exit code is 1."""


class Preempted(BaseException):
    """The machine is about to go; what was done is saved, and the message says where."""


def unwritable(path: object, error: OSError) -> DataError:
    """The line for a file that cannot be written: a full disk names none by itself."""
    cause = error.strerror or str(error)
    return DataError(f"{path}: cannot be written ({cause}); free space or choose another folder")
