"""The emulation's virtual environment, with the versions that it patches.

The emulation patches private names of these versions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("COMPILED_DILATED_EMULATION_VENV", ROOT / ".venv-gpu-emulated"))
_TORCH_INDEX = os.environ.get(
    "COMPILED_DILATED_TORCH_INDEX", "https://download.pytorch.org/whl/cpu"
)
# numpy 2.4 breaks the interpreter of Triton 3.6.
_PINNED = {"torch": "2.13.0", "triton": "3.6.0", "numpy": "2.2.6"}
# Imports of the project and of its tests on a GPU, at the versions of constraints.txt.
_PACKAGES = ("lazy-loader", "psutil", "tabulate", "setuptools", "pytest", "hypothesis")


class Unavailable(RuntimeError):
    """The environment cannot be built here; the message has the reason."""


def python() -> Path:
    """The environment's Python.

    Makes the environment where it is missing or has other versions.

    Raises Unavailable.
    """
    executable, stamp = FOLDER / "bin/python", FOLDER / "stamp"
    versions = f"{_PINNED} {_PACKAGES} {sys.version_info[:2]}"
    if stamp.exists() and stamp.read_text() == versions:
        return executable
    if shutil.which("g++") is None:
        raise Unavailable("it needs g++ on PATH")
    print(f"gpu_emulated: making {FOLDER} (about 400 MB of packages)", flush=True)
    venv.create(FOLDER, clear=True, with_pip=True)
    pip = [str(executable), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    pinned = [f"{name}=={version}" for name, version in _PINNED.items()]
    # The CPU build of torch; where its index is out of reach, pip's own index.
    index = ["--retries", "1", "--timeout", "10", "--no-deps", "--index-url", _TORCH_INDEX]
    if subprocess.run([*pip, *index, pinned[0]]).returncode:
        print("gpu_emulated: PyTorch's index does not give torch; pip's own will", flush=True)
    packages = [*pinned, *_constrained()]
    if subprocess.run([*pip, *packages]).returncode:
        raise Unavailable(f"pip cannot install {', '.join(packages)}")
    stamp.write_text(versions)
    return executable


def _constrained() -> list[str]:
    """The other packages at the versions that the project is tested with."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    packages = []
    for name in _PACKAGES:
        if name in versions:
            packages.append(f"{name}=={versions[name]}")
        else:
            packages.append(name)
    return packages
