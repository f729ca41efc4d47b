"""The machine's GPU, versions and free memory, and which code this is, printed as JSON."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Where the code of stages is; tools/gpu_check has no suffix.
_FOLDERS, _SUFFIXES = ("compiled_dilated", "passes", "tests", "tools"), ("", ".py", ".h", ".cpp")


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
        "commit": commit(ROOT),
        "code": digest(ROOT),
    }


def commit(root: Path) -> str | None:
    """The commit of a checkout, marked if tracked files differ; None outside of one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def digest(root: Path) -> str:
    """A digest of the code that stages run, committed or not."""
    out = hashlib.sha256()
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                out.update(f"{path.relative_to(root)} {content}\n".encode())
    return out.hexdigest()[:12]


if __name__ == "__main__":
    if "--tiny" in sys.argv:
        importlib.import_module("emulation.pretended")
    sys.exit(main())
