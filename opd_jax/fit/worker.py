"""The process that compiles: `python -m opd_jax.fit.worker FOLDER`.

It reads `request.json` in the folder and leaves `answer.json` there: a report, or an error and
whether other devices may suit the config better (`mesh`). A line on its output is a step
that it begins. `driver` starts it with the environment that the compilers need.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from opd_jax.config import Config
from opd_jax.errors import MeshError, OPDError

REQUEST, ANSWER, MARK = "request.json", "answer.json", "fit: "
"""Files, and how lines begin that are meant for people: plugins print, too."""


def main(folder: str) -> None:
    """Answer one request."""
    from opd_jax.fit.assess import assess
    from opd_jax.fit.best import assess_meshes

    logging.disable(logging.WARNING)
    request = json.loads(Path(folder, REQUEST).read_text(encoding="utf-8"))
    answer: dict[str, Any]
    try:
        config = Config.model_validate_json(json.dumps(request["config"]))
        judge = assess_meshes if request["auto"] else assess
        answer = judge(config, request["target"], request["stages"], _say).to_json()
    except OPDError as error:
        answer = {"error": str(error), "mesh": isinstance(error, MeshError)}
    Path(folder, ANSWER).write_text(json.dumps(answer), encoding="utf-8")


def _end_with(parent: int) -> None:
    """A compilation takes minutes that nobody waits for once whoever asked for it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _say(text: str) -> None:
    print(f"{MARK}{text}", flush=True)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    main(sys.argv[1])
