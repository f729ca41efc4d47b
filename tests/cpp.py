"""C++ programs that use torch without Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch


def program_of(source: str, folder: Path) -> str:
    """Compile a program against this torch; returns its path.

    Asserts that the program is not linked to Python.
    """
    main, program = folder / "main.cpp", str(folder / "main")
    main.write_text(source)
    torch_folder = Path(torch.__file__).parent
    libraries, headers = torch_folder / "lib", torch_folder / "include"
    links = (f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10")
    includes = (f"-I{headers}", f"-I{headers / 'torch/csrc/api/include'}")
    compiler = (os.environ.get("CXX", "g++"), "-std=c++20", "-O0")
    subprocess.run([*compiler, str(main), *includes, *links, "-o", program], check=True)
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in linked
    return program
