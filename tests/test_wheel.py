"""The wheel contains the two packages alone.

It runs without the checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USE = """
import torch, compiled_dilated as cd, passes
q, k, v = torch.randn(3, 1, 2, 100, 16)
out = cd.compile(cd.masks.causal())(q, k, v)
torch.testing.assert_close(out, cd.reference(cd.masks.causal(), q, k, v).float())
print(cd.__file__, passes.__file__)
"""


@pytest.mark.slow
def test_the_wheel_runs_by_itself(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"compiled_dilated", "passes"}
    assert "compiled_dilated/native/src/operators.cpp" in names
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", USE]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(tmp_path)) for path in run.stdout.split())
