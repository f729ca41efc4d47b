"""Run the cases of one stage in this process.

python -m gpu_stages.worker STAGE FILE [--tiny]

Exit codes: 0 all cases have run; 3 the process has lost its GPU, the other cases need a new one.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from .records import Records
from .stage import DeviceLost, Stage

LOST = 3


def main() -> int:
    """Import the stage and run it.

    Under the emulation, the GPU is pretended first.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage")
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        importlib.import_module("emulation.project")
    module = importlib.import_module(f".{options.stage}", __package__)
    records = Records(options.file)
    stage = Stage(options.stage, records, "cpu" if options.tiny else "cuda", options.tiny)
    if "start" in records.outcomes(options.stage):
        # A process before could not start, and this one could.
        records.append("outcome", stage=options.stage, case="start", ok=True, seconds=0.0)
    started = time.monotonic()
    try:
        module.run(stage)
    except DeviceLost:
        return LOST
    seconds = round(time.monotonic() - started, 1)
    records.append("end", stage=options.stage, seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
