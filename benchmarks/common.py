"""What every benchmark does: it runs the checkout it lies in and ends on one line of JSON."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Whatever version is installed.
sys.path.insert(0, str(ROOT))


def environment():
    """Versions and devices."""
    from opd_jax.stages.summary import environment

    return environment()


def report(name, figures, where=None):
    """The last line: the figures, and `where` they were measured (here if left out)."""
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    line = {"benchmark": name, "figures": rounded, "environment": where or environment()}
    print(json.dumps(line), flush=True)
