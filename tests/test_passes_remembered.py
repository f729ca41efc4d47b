"""Choices that were made before are made again without planning, and only where nothing that they depend on has changed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config
from torch._inductor.utils import fresh_cache

from passes import LinearCrossEntropy, Spill, planning, remembered, workspaces
from passes.planning import Choice, Pipeline
from passes.traced import capture
from tests.graphs import Gelu

SPILL = Spill(least_bytes=2**12)
CANDIDATES = ((), (SPILL,))


@pytest.fixture(autouse=True)
def _cache() -> Iterator[None]:
    with fresh_cache():
        yield


def _choose(pipeline: Pipeline, tokens: int = 64, model: nn.Module | None = None) -> Choice:
    torch.manual_seed(0)
    return capture(model or Gelu(), (torch.empty(1, tokens, 64),), pipeline.choose, train=True)


def _refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(*arguments: Any) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(planning, "estimate", planned)


def _files() -> list[Path]:
    return sorted(remembered._path("any").parent.glob("*"))


def test_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _choose(Pipeline(None, CANDIDATES)).chosen.peak_bytes
    tight = Pipeline(plain - 1, CANDIDATES)
    first = _choose(tight)
    assert first.chosen.passes == (SPILL,)
    _refuse(monkeypatch)
    again = _choose(tight)
    assert (again.chosen, again.estimates) == (first.chosen, first.estimates)
    assert again.traced.passes == first.traced.passes
    assert [change.lines for change in again.traced.changes] == [change.lines for change in first.traced.changes]


OTHER: dict[str, Callable[[], Choice]] = {
    "budget": lambda: _choose(Pipeline(2**31, CANDIDATES)),
    "candidates": lambda: _choose(Pipeline(2**30, ((), (Spill(least_bytes=2**13),)))),
    "tokens": lambda: _choose(Pipeline(2**30, CANDIDATES), tokens=65),
    "model": lambda: _choose(Pipeline(2**30, CANDIDATES), model=nn.Sequential(Gelu(), nn.ReLU())),
    "option": lambda: config.patch(epilogue_fusion=not config.epilogue_fusion)(_choose)(Pipeline(2**30, CANDIDATES)),
}


@pytest.mark.parametrize("other", OTHER)
def test_what_has_changed_is_planned_anew(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _choose(Pipeline(2**30, CANDIDATES))
    _refuse(monkeypatch)
    with pytest.raises(BackendCompilerFailed, match="planned again"):
        OTHER[other]()
    _choose(Pipeline(2**30, CANDIDATES))


def test_operators_that_say_otherwise_what_they_hold_are_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of those who tell are part of the name."""
    (tmp_path / "telling").mkdir()
    source = tmp_path / "telling" / "__init__.py"
    source.write_text("def held(*args, **kwargs):\n    return 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    held = importlib.import_module("telling").held
    monkeypatch.setitem(workspaces._KNOWN, torch.ops.aten.erf.default, held)
    _choose(Pipeline(2**30, CANDIDATES))
    source.write_text("def held(*args, **kwargs):\n    return 4096\n")
    _refuse(monkeypatch)
    with pytest.raises(BackendCompilerFailed, match="planned again"):
        _choose(Pipeline(2**30, CANDIDATES))


def test_a_torn_file_is_planned_anew() -> None:
    first = _choose(Pipeline(2**30, CANDIDATES))
    (file,) = _files()
    file.write_text(file.read_text()[:20])
    assert _choose(Pipeline(2**30, CANDIDATES)).estimates == first.estimates
    assert remembered.load(file.stem) is not None


def test_nothing_is_remembered_where_caches_are_off() -> None:
    with config.patch(force_disable_caches=True):
        _choose(Pipeline(2**30, CANDIDATES))
    assert not _files()


def test_own_candidates_come_back_as_what_they_did() -> None:
    """Of ours, passes that found nothing to do are left out of the choice; also of one that is remembered."""
    first, again = (_choose(Pipeline(2**30)) for _ in range(2))
    assert first.chosen == again.chosen
    assert LinearCrossEntropy() not in again.chosen.passes
