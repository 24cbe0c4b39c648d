"""Read a config: a YAML file, dotted `key=value` overrides laid over it, one validation.

A relative path of a model or of prompts is relative to the place it is written in: in a YAML file
to that file's folder, in an override to the working directory. `run_dir` is relative to the working
directory in both. `package:NAME/FILE` is a file that an installed Python package carries. The
resolved config holds absolute paths alone.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from opd_jax.config import Config
from opd_jax.config_base import Frozen, PathMark
from opd_jax.config_errors import block_at, describe
from opd_jax.config_train import TrainConfig
from opd_jax.errors import ConfigError

Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML where `1e-5` is a number (YAML 1.1 wants `1.0e-5`) and a key may be given only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping. Raises: ConstructorError on a repeated key (in PyYAML the last wins)."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                problem = f"key {key!r:.60} is a list or a block; write a word"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"key {key!r} is given twice; delete one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a file under overrides such as `sft.steps=10`, `train.enabled=[opd, topk]`.

    Raises: ConfigError, one line with the file or override, the key, the value and the repair.
    """
    file = Path(path)
    tree = _resolve_paths(_read_yaml(file), Config, file.absolute().parent, str(file))
    origins: dict[tuple[str, ...], str] = {}
    for text in overrides:
        keys, value = _parse_override(text)
        source = f"override '{text}'"
        for key in reversed(keys[1:]):
            value = {key: value}
        resolved = _resolve_paths({keys[0]: value}, Config, Path.cwd(), source)
        _lay_over(tree, resolved, keys, source)
        origins[keys] = source
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, str(file), origins)) from None
    folders = {"run_dir": config.run_dir, "store": config.store}
    return config.model_copy(update={key: _from_here(value) for key, value in folders.items()})


def _from_here(folder: str | None) -> str | None:
    """A folder from the working directory on; an address of an object store is one already."""
    if folder is None or "://" in folder:
        return folder
    return os.path.abspath(os.path.expanduser(folder))


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every default written out; `load_config` gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(file: Path) -> Tree:
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such config file; give an existing one to --config"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}{_yaml_problem(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file}: holds {type(tree).__name__} {tree!r:.60}, not 'key: value' lines"
        )
    return tree


def _yaml_problem(error: yaml.YAMLError) -> str:
    """`:LINE: broken YAML: what`, without the line when the parser knows none."""
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{line}: broken YAML: {problem}"


def _parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    dotted, equals, value = text.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"override '{text}': not of the form key=value, such as sft.steps=10")
    try:
        return keys, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        problem = _yaml_problem(error).split(": ", 1)[1]
        raise ConfigError(f"override '{text}': value '{value}': {problem}; quote it") from None


def _lay_over(tree: Tree, resolved: Tree, keys: tuple[str, ...], source: str) -> None:
    """Put the value that `resolved` holds at `keys` into `tree`, making the blocks on the way."""
    if keys[:2] == ("train", "runs") and len(keys) > 3:
        _check_run(tree, keys[2], source)
    *blocks, last = list(keys)
    for depth, key in enumerate(blocks):
        resolved = resolved[key]
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            here = ".".join(keys[: depth + 1])
            raise ConfigError(f"{source}: {here} is {tree!r:.60}, which has no keys of its own")
    tree[last] = resolved[last]


def _check_run(tree: Tree, name: str, source: str) -> None:
    """An override deep inside a run that nobody defined is a misspelt name, not a new run."""
    train = tree.get("train")
    runs = train.get("runs") if isinstance(train, dict) else None
    known = list(runs) if isinstance(runs, dict) else list(TrainConfig().runs)
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"the runs are {', '.join(known)}"
        raise ConfigError(
            f"{source}: train.runs: no run named '{name}'; {hint} "
            f"(a new one is given whole: train.runs.{name}={{steps: 10}})"
        )


def _resolve_paths(tree: Tree, block: type[Frozen], base: Path, source: str) -> Tree:
    """A copy of `tree` with its path keys made absolute; an empty block (`sft:`) becomes `{}`.

    A block that may be absent (`lora:`) then is.
    """
    result: Tree = {}
    for key, value in tree.items():
        inner = block_at(block, key)
        if inner is not None and value is None:
            result[key] = None if block.model_fields[key].default is None else {}
        elif inner is not None and isinstance(value, dict):
            result[key] = _resolve_paths(value, inner, base, source)
        elif isinstance(value, dict):
            result[key] = _resolve_entries(value, block, key, base, source)
        elif isinstance(value, str) and value and _is_path(block, key):
            result[key] = _absolute(value, base, f"{source}: {key}")
        else:
            result[key] = value
    return result


def _resolve_entries(tree: Tree, block: type[Frozen], key: str, base: Path, source: str) -> Tree:
    """The same for a field that maps names to blocks, such as `train.runs`."""
    inner = block_at(block, key, entry=True)
    if inner is None:
        return tree
    entries = {name: {} if value is None else value for name, value in tree.items()}
    return {
        name: _resolve_paths(value, inner, base, source) if isinstance(value, dict) else value
        for name, value in entries.items()
    }


def _is_path(block: type[Frozen], key: str) -> bool:
    field = block.model_fields.get(key)
    return field is not None and any(isinstance(mark, PathMark) for mark in field.metadata)


def _absolute(value: str, base: Path, source: str) -> str:
    if value.startswith("package:"):
        return _package_file(value, source)
    return os.path.abspath(base / os.path.expanduser(value))


def _package_file(value: str, source: str) -> str:
    """The file that `package:NAME/FILE` names. Raises: ConfigError without that package."""
    name, _, inside = value.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{source}: '{value}': no Python package {name!r} here; "
            f"pip install {name.replace('_', '-')}"
        )
    return os.path.join(spec.submodule_search_locations[0], inside)
