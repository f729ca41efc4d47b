"""The passes' identity in inductor's compile cache.

It depends on every source file.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import passes
from passes import package
from passes.planning.inductor_hooks import identity

FOLDER = Path(passes.__file__).parent


def test_the_package_is_named_and_located_once() -> None:
    assert passes.__name__ == package.NAME
    assert package.ROOT == FOLDER
    folders = {file.relative_to(FOLDER).parts[0] for file in package.files()}
    assert {"analysis", "arena", "planning", "rewrites", "protocol.py"} <= folders


def test_a_changed_byte_in_any_file_changes_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes, unchanged = Path.read_bytes, identity(())
    for changed in sorted(FOLDER.rglob("*.py")):

        def read(path: Path, changed: Path = changed) -> bytes:
            return read_bytes(path) + (b"#" if path == changed else b"")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", read)
            assert identity(()) != unchanged, f"{changed} is not part of the identity"
    assert identity(()) == unchanged
