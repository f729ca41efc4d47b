"""The environment of the emulation: the versions whose private names it patches, in a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("COMPILED_DILATED_EMULATION_VENV", ROOT / ".venv-gpu-emulated"))
_TORCH_INDEX = os.environ.get(
    "COMPILED_DILATED_TORCH_INDEX", "https://download.pytorch.org/whl/cpu"
)
# numpy 2.4 breaks the interpreter of Triton 3.6. What the project imports beside them comes at the versions of constraints.txt.
_PINNED = {"torch": "2.13.0", "triton": "3.6.0", "numpy": "2.2.6"}
_OTHERS = ("lazy-loader", "psutil", "tabulate", "setuptools")


def python() -> Path:
    """The environment's Python; makes the environment where it is missing or of other versions."""
    executable, stamp = FOLDER / "bin/python", FOLDER / "stamp"
    wanted = f"{_PINNED} {_OTHERS} {sys.version_info[:2]}"
    if stamp.exists() and stamp.read_text() == wanted:
        return executable
    print(f"gpu_emulated: making {FOLDER} (about 400 MB of packages)", flush=True)
    venv.create(FOLDER, clear=True, with_pip=True)
    pip = [str(executable), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    pinned = [f"{name}=={version}" for name, version in _PINNED.items()]
    # The CPU build of torch; where its index is out of reach, pip's own index.
    from_index = [
        *pip,
        "--retries",
        "1",
        "--timeout",
        "10",
        "--no-deps",
        "--index-url",
        _TORCH_INDEX,
        pinned[0],
    ]
    if subprocess.run(from_index).returncode:
        print("gpu_emulated: PyTorch's index does not give torch; pip's own will", flush=True)
    subprocess.run([*pip, *pinned, *_constrained()], check=True)
    stamp.write_text(wanted)
    return executable


def _constrained() -> list[str]:
    """The other packages at the versions that the project is tested with."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    return [f"{name}=={versions[name]}" if name in versions else name for name in _OTHERS]
