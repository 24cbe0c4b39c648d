"""The command line: `python -m opd_jax.main --config PATH [key=value ...]`.

Also `--inspect`, `--verify` and `--gc`, which take a rollout store in place of a config.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from opd_jax.config_load import load_config
from opd_jax.core import platform_flags
from opd_jax.errors import ConfigError, JoinError, OPDError, Preempted

if TYPE_CHECKING:
    from opd_jax.core.liveness import Liveness

_NOISY = ("absl", "jax", "orbax", "flax", "transformers", "tensorstore", "matplotlib")

LOST_CONNECTION = r"(?i)gloo|nccl|unavailable|connection|deadline|heartbeat|coordination"
"""In an error that may come from another process being gone."""
PASSING = ("EIO", "ESTALE", "ETIMEDOUT", "ECONNRESET", "EREMOTEIO")
"""Errors of a network folder that may be gone at the next start."""
STORE_TOOLS = ("inspect", "verify", "gc")
NOT_WITH_STORE = (
    *("config", "stages", "force", "plan", "fit", "profile", "prompt", "chat", "checkpoint"),
    *("coordinator", "processes", "rank", "distributed"),
)

NOT_WITH_FIT = (
    *("force", "share", "plan", "profile", "prompt", "chat", "checkpoint"),
    *("coordinator", "processes", "rank", "distributed"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline, or look after a store.

    The exit code is 2 for what the user can repair, 3 for a store that `--verify` finds damaged or
    a config that `--fit` finds too large, 4 if another process is gone, 130 for Ctrl-C, 143 for
    SIGTERM. It is 1 for what a restart may get over: processes that cannot join or never come, a
    network folder that fails for a while (`PASSING`), and errors of this program.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    goes_on = ""
    try:
        arguments = _parse(words)
        alone = _talks(arguments) or _store_tool(arguments)
        goes_on = "" if alone else "; the same command goes on from here"
        code = _run(arguments)
    except (OPDError, OSError) as error:
        if "--debug" in words:
            _tell(traceback.format_exc())
        _tell(f"opd_jax: error: {_one_line(error)}")
        code = 1 if _may_pass(error) else 2
        if (watcher := _watcher()) is not None:
            watcher.failed(_one_line(error), code)
    except Preempted as notice:
        _tell(f"opd_jax: {notice}{goes_on}")
        code = 143
    except KeyboardInterrupt:
        _tell(f"opd_jax: interrupted{goes_on}")
        code = 130
        if (watcher := _watcher()) is not None:  # else the others would wait in a collective
            watcher.failed("interrupted", code)
    except Exception as error:
        if (watcher := _watcher()) is None:
            raise
        if re.search(LOST_CONNECTION, str(error)):
            watcher.await_verdict()
        _tell(traceback.format_exc())
        watcher.failed(f"{type(error).__name__}: {_one_line(error)}", 1)
    if (watcher := _watcher()) is not None:
        watcher.stop()
    return code


def _tell(text: str) -> None:
    """On standard error. Where nobody reads that any more, the other processes still are told."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m opd_jax.main",
        description="Offline on-policy distillation: from prompts to a distilled student.",
    )
    parser.add_argument("--config", metavar="PATH", help="the run's YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a dotted config key and its YAML value"
    )
    parser.add_argument("--stages", metavar="a,b", help="do only these stages")
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="redo a stage that is done"
    )
    parser.add_argument(
        "--share", metavar="I/N", help="do the I-th of N shares of answer, rollout or score alone"
    )
    parser.add_argument("--plan", action="store_true", help="print what is done and what is not")
    parser.add_argument(
        "--fit",
        metavar="TARGET",
        help="compile for devices that are absent, such as v5e-16 or h100:8: does it fit, how fast",
    )
    parser.add_argument("--profile", action="store_true", help="trace a few steps of each training")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and library logs")
    group = parser.add_argument_group("try a model of the run")
    group.add_argument("--prompt", metavar="TEXT", help="print its answer to this")
    group.add_argument("--chat", action="store_true", help="talk with it")
    group.add_argument(
        "--checkpoint", metavar="NAME", help="base, sft, opd, ..., teacher (default: last trained)"
    )
    group = parser.add_argument_group("several processes (the same command on each)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--rank", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find them: TPU slice, Slurm step, Kubernetes JobSet, mpirun",
    )
    group = parser.add_argument_group(
        "look after a store (a folder, gs://... or s3://...; no --config)"
    )
    group.add_argument("--inspect", metavar="STORE", help="show what it holds")
    group.add_argument("--tokenizer", metavar="PATH", help="a model, for the text of --inspect")
    group.add_argument(
        "--verify", metavar="STORE", help="name everything that is wrong with it; exit code 3 if so"
    )
    group.add_argument("--gc", metavar="STORE", help="remove segments that were never committed")
    group.add_argument(
        "--older-than", type=float, metavar="HOURS", help="and not written to for so long (24)"
    )
    group.add_argument("--dry-run", action="store_true", help="only list what --gc would remove")
    arguments = parser.parse_intermixed_args(words)
    if arguments.config is None and not _store_tool(arguments):
        parser.error("the following arguments are required: --config")
    return arguments


def _talks(arguments: argparse.Namespace) -> bool:
    return arguments.chat or arguments.prompt is not None


def _store_tool(arguments: argparse.Namespace) -> str:
    """Which of the flags that take a store is given; empty if none is."""
    given = [name for name in STORE_TOOLS if getattr(arguments, name) is not None]
    return given[0] if given else ""


def _run(arguments: argparse.Namespace) -> int:
    _check_store_flags(arguments)
    if _store_tool(arguments):
        return _run_store_tool(arguments)
    _check_flags(arguments)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.fit is None:
        platform_flags.set_flags()
    # jax and what builds on it take seconds to import: a misspelt key should not wait for them.
    from opd_jax.core import compile_cache

    if _talks(arguments):
        from opd_jax.stages import chat

        compile_cache.keep_compiled(config.compile_cache)
        chat.run(config, arguments.checkpoint, arguments.prompt)
        return 0
    stages = None if arguments.stages is None else _names([arguments.stages])
    if arguments.fit is not None:
        from opd_jax.fit import driver

        return driver.run(config, arguments.fit, stages)
    from opd_jax.core import distributed

    given = arguments.coordinator, arguments.processes, arguments.rank
    compile_cache.keep_compiled(config.compile_cache)
    distributed.start(*given, found=arguments.distributed)
    from opd_jax.core import preemption
    from opd_jax.stages import pipeline

    share = None if arguments.share is None else _share(arguments)
    force = _names(arguments.force)
    with preemption.raising():
        pipeline.run(
            config,
            stages=stages,
            force=force,
            plan_only=arguments.plan,
            share=share,
            profile=arguments.profile,
        )
    return 0


def _run_store_tool(arguments: argparse.Namespace) -> int:
    from opd_jax.stages import store_tools

    if arguments.inspect is not None:
        return store_tools.inspect(arguments.inspect, arguments.tokenizer)
    if arguments.verify is not None:
        return store_tools.verify(arguments.verify)
    return store_tools.gc(arguments.gc, arguments.older_than, arguments.dry_run)


def _check_store_flags(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together, as far as stores are concerned."""
    tool = _store_tool(arguments)
    for name, owner in (("tokenizer", "inspect"), ("older_than", "gc"), ("dry_run", "gc")):
        if getattr(arguments, name) not in (None, False) and getattr(arguments, owner) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is for --{owner}; give it a store")
    if not tool:
        return
    if not getattr(arguments, tool).strip():
        raise ConfigError(f"--{tool} is empty; give it a folder or a gs:// or s3:// address")
    if arguments.older_than is not None and not arguments.older_than >= 0:
        raise ConfigError(f"--older-than {arguments.older_than:g}: give hours, 0 or more")
    if arguments.overrides:
        raise ConfigError(f"--{tool} takes no config key: leave out {arguments.overrides[0]!r}")
    for name in (*STORE_TOOLS, *NOT_WITH_STORE):
        if name != tool and getattr(arguments, name) not in (None, [], False):
            raise ConfigError(f"--{tool} and --{name} do not go together; leave one of them out")


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together."""
    if arguments.fit is not None:
        for name in NOT_WITH_FIT:
            if getattr(arguments, name) not in (None, [], False):
                raise ConfigError(f"--fit and --{name} do not go together; leave one of them out")
    if not _talks(arguments):
        if arguments.checkpoint is not None:
            raise ConfigError("--checkpoint is for --chat and --prompt; give one of them")
        return
    one = "--chat" if arguments.chat else "--prompt"
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ConfigError("--prompt is empty; give it a text")
    for name in ("coordinator", "processes", "rank", "distributed"):
        if getattr(arguments, name) not in (None, False):
            raise ConfigError(f"{one} runs in one process; leave out --{name}")
    for name in ("stages", "force", "share", "plan", *(("prompt",) if arguments.chat else ())):
        if getattr(arguments, name) not in (None, [], False):
            raise ConfigError(f"{one} and --{name} do not go together; leave one of them out")


def _share(arguments: argparse.Namespace) -> tuple[int, int]:
    """(index from 0, count); raises ConfigError where the flag makes no sense."""
    found = re.fullmatch(r"(\d+)/(\d+)", arguments.share)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--share {arguments.share}: give I/N, as in 1/4, 2/4, 3/4 and 4/4")
    if arguments.stages not in ("answer", "rollout", "score") or arguments.force or arguments.plan:
        raise ConfigError(
            "--share goes with one of --stages answer, rollout and score, and not with --force or "
            "--plan"
        )
    return int(found[1]) - 1, int(found[2])


def _watcher() -> Liveness | None:
    """What tells the other processes how this one ends, if there are others."""
    module = sys.modules.get("opd_jax.core.liveness")
    return None if module is None else module.Liveness.here


def _may_pass(error: BaseException | None) -> bool:
    """Whether a restart may get over it, or over what it was raised for."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, JoinError) or errno.errorcode.get(number or 0) in PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False


def _names(texts: Sequence[str]) -> list[str]:
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _quiet_libraries() -> None:
    """Keep third-party chatter off the terminal; must come before those libraries are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises, too
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_NOISY)})\b")


if __name__ == "__main__":
    # Models are folders on this machine; nothing may reach for a hub behind the user's back.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "--debug" not in sys.argv:
        _quiet_libraries()
    sys.exit(main())
