"""Run jobs in one process; print a JSON line as each ends.

python -m emulation.worker JOB..., with EMULATION set as in `pretended`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
import warnings
from typing import Any

from . import jobs, lines


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    with lines.recorded():
        _run(names)


def _run(names: list[str]) -> None:
    for name in names:
        started = time.monotonic()
        try:
            report = _result(name)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            report = {
                "error": f"{type(error).__name__}: {first[:300]}",
                "traceback": traceback.format_exc(limit=-12),
            }
        report = {"job": name, "seconds": round(time.monotonic() - started, 1), **report}
        print(json.dumps(report), flush=True)


def _result(name: str) -> dict[str, Any]:
    """The report of a job: its error or None, its compiled kernels."""
    kind, _, case = name.partition(": ")
    if kind in jobs.MODULES:
        module = importlib.import_module(f".{jobs.MODULES[kind]}", __package__)
        return {"error": module.error_of(module.CASES[case])}
    from . import cubins

    way, dtype, head_dim = case.split()
    built = getattr(cubins, way)(getattr(cubins.torch, dtype), int(head_dim))
    return {
        "error": None,
        "kernels": {f"{case} {part}": cubin.report for part, cubin in built.items()},
    }


if __name__ == "__main__":
    main(sys.argv[1:])
