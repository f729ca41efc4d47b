"""C++ programs that use torch without Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch


def program_of(source: str, folder: Path) -> str:
    """The path of a program, compiled and linked against this torch; it holds no Python."""
    (folder / "main.cpp").write_text(source)
    at = Path(torch.__file__).parent
    links = (f"-L{at / 'lib'}", f"-Wl,-rpath,{at / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")
    includes = (f"-I{at / 'include'}", f"-I{at / 'include/torch/csrc/api/include'}")
    program = str(folder / "main")
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-std=c++20", "-O0", str(folder / "main.cpp"), *includes, *links, "-o", program],
        check=True,
    )
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in linked
    return program
