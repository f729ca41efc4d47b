"""The machine's GPU, versions and free memory, printed as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from typing import Any


def main() -> int:
    """Print the line; without a GPU, a reason and exit code 2."""
    try:
        import torch
    except ImportError:
        print(
            f"{sys.executable} has no torch. Run this file with the Python that has it",
            file=sys.stderr,
        )
        return 2
    if not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} finds no GPU (torch.cuda.is_available() is False). "
            "Run this on a machine with a GPU and a CUDA build of torch; on a CPU, tools/test runs "
            "everything that can run, and tools/gpu_emulated what an interpreter can",
            file=sys.stderr,
        )
        return 2
    print(json.dumps(about(torch)))
    return 0


def about(torch: Any) -> dict[str, Any]:
    """The fields of the event `machine`."""
    triton = importlib.util.find_spec("triton")
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu": torch.cuda.get_device_name(),
        "memory_bytes": total,
        "free_bytes": free,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__ if triton else None,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    if "--tiny" in sys.argv:
        importlib.import_module("emulation.pretended")
    sys.exit(main())
