"""Choices stored on disk.

A choice is loaded if all that it depends on is the same, else planned anew.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch import config as functorch_config
from torch._inductor import config

from passes import LinearCrossEntropy, Spill
from passes.analysis import workspaces
from passes.planning import candidates, choice_cache, choose, reports
from passes.planning.choose import Choice, Pipeline
from passes.planning.tracing import Captured, capture
from tests.caches import empty_inductor_caches
from tests.graphs import Gelu

SPILL = Spill(least_bytes=2**12)
CANDIDATES = ((), (SPILL,))


@pytest.fixture(autouse=True)
def _cache() -> Iterator[None]:
    with empty_inductor_caches():
        yield


def _choose(pipeline: Pipeline, tokens: int = 64, model: nn.Module | None = None) -> Choice:
    torch.manual_seed(0)
    return capture(model or Gelu(), (torch.empty(1, tokens, 64),), pipeline.choose, train=True)


def _fail_if_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(*arguments: Any) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(choose, "estimate", planned)


def _files() -> list[Path]:
    return sorted(choice_cache._path("any").parent.glob("*"))


def test_a_choice_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _choose(Pipeline(None, CANDIDATES)).chosen.peak_bytes
    tight = Pipeline(plain - 1, CANDIDATES)
    first = _choose(tight)
    assert first.chosen.passes == (SPILL,)
    _fail_if_planned(monkeypatch)
    again = _choose(tight)
    assert (again.chosen, again.estimates) == (first.chosen, first.estimates)
    assert again.traced.passes == first.traced.passes
    lines = [change.lines for change in first.traced.changes]
    assert [change.lines for change in again.traced.changes] == lines


CHANGED: dict[str, Callable[[], Choice]] = {
    "budget": lambda: _choose(Pipeline(2**31, CANDIDATES)),
    "candidates": lambda: _choose(Pipeline(2**30, ((), (Spill(least_bytes=2**13),)))),
    "tokens": lambda: _choose(Pipeline(2**30, CANDIDATES), tokens=65),
    "model": lambda: _choose(Pipeline(2**30, CANDIDATES), model=nn.Sequential(Gelu(), nn.ReLU())),
    "option": lambda: config.patch(epilogue_fusion=not config.epilogue_fusion)(_choose)(
        Pipeline(2**30, CANDIDATES)
    ),
    "partition": lambda: functorch_config.patch(activation_memory_budget=0.1)(_choose)(
        Pipeline(2**30, CANDIDATES)
    ),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_changed_dependency_is_planned_anew(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _choose(Pipeline(2**30, CANDIDATES))
    _fail_if_planned(monkeypatch)
    with pytest.raises(BackendCompilerFailed, match="planned again"):
        CHANGED[changed]()
    _choose(Pipeline(2**30, CANDIDATES))


def test_changed_source_of_a_registered_workspace_is_planned_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages that register workspaces are part of a choice's name."""
    (tmp_path / "registering").mkdir()
    source = tmp_path / "registering" / "__init__.py"
    source.write_text("def bytes_of(*args, **kwargs):\n    return 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    bytes_of = importlib.import_module("registering").bytes_of
    monkeypatch.setitem(workspaces._REGISTERED, torch.ops.aten.erf.default, bytes_of)
    _choose(Pipeline(2**30, CANDIDATES))
    source.write_text("def bytes_of(*args, **kwargs):\n    return 4096\n")
    _fail_if_planned(monkeypatch)
    with pytest.raises(BackendCompilerFailed, match="planned again"):
        _choose(Pipeline(2**30, CANDIDATES))


def test_a_torn_file_is_planned_anew() -> None:
    first = _choose(Pipeline(2**30, CANDIDATES))
    (file,) = _files()
    file.write_text(file.read_text()[:20])
    assert _choose(Pipeline(2**30, CANDIDATES)).estimates == first.estimates
    assert choice_cache.load(file.stem) is not None


# Files that json cannot read, and JSON that is no choice.
ESTIMATE = json.dumps(
    {"passes": ["Unknown()"], "peak_bytes": 1, "input_bytes": 1, "seconds": 1.0, "changed": True}
)
FOREIGN: dict[str, str | bytes] = {
    "an empty object": "{}",
    "a list": "[1]",
    "null": "null",
    "a number": "NaN",
    "an unknown pass": f'{{"estimates": [{ESTIMATE}], "chosen": 0}}',
    "no estimate": '{"estimates": [], "chosen": 0}',
    "nested deeply": "[" * 100_000,
    "no text": b"\xff\xfe",
}


def _study(
    monkeypatch: pytest.MonkeyPatch, study: Callable[[Callable[[], Choice], Path, Choice], None]
) -> None:
    """Study a stored choice; it also replaces what would be planned anew.

    study: takes a function that chooses again, the stored file, and the choice
    """
    pipeline = Pipeline(2**30, CANDIDATES)

    def examine(graph: Captured) -> None:
        first = pipeline.choose(graph)
        (file,) = _files()
        monkeypatch.setattr(choice_cache, "name_of", lambda *parts: file.stem)
        monkeypatch.setattr(choose, "trace", lambda graph, passes: first.traced)
        monkeypatch.setattr(Pipeline, "_chosen", lambda self, graph: first)
        study(lambda: pipeline.choose(graph), file, first)

    capture(Gelu(), (torch.empty(1, 64, 64),), examine, train=True)


def test_a_foreign_file_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def study(choose_again: Callable[[], Choice], file: Path, first: Choice) -> None:
        own = file.read_bytes()
        for content, foreign in FOREIGN.items():
            file.write_bytes(foreign if isinstance(foreign, bytes) else foreign.encode())
            assert choose_again() is first, content
            assert file.read_bytes() == own, content

    _study(monkeypatch, study)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([repr(SPILL), 0, -1, 99, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["estimates", "chosen", "passes"]), inner)
    ),
    max_leaves=8,
)


@st.composite
def damaged(draw: Any, value: Any) -> Any:
    """A JSON value with one part replaced, left out or doubled.

    Other values are drawn too.
    """
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    place = draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
    damage = draw(st.sampled_from(["inside", "inside", "left out", "added"]))
    if damage == "left out":
        del copy[place]
    elif damage == "added" and isinstance(copy, list):
        copy.append(copy[place])
    elif damage == "added":
        copy["another"] = draw(JSON)
    else:
        copy[place] = draw(damaged(value[place]))
    return copy


def test_damaged_json_is_a_valid_choice_or_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Damage may leave a valid choice with other bytes.

    Such a choice is within the budget, and of passes that are offered.
    """

    def study(choose_again: Callable[[], Choice], file: Path, first: Choice) -> None:
        own = json.loads(file.read_text())

        @settings(max_examples=300)
        @given(damaged(own))
        def check(value: Any) -> None:
            file.write_text(json.dumps(value))
            choice = choose_again()
            assert choice.chosen in choice.estimates
            assert choice.chosen.peak_bytes <= 2**30
            assert all(estimate.passes in CANDIDATES for estimate in choice.estimates)
            candidates.described(choice.chosen.passes)
            reports.table(choice.estimates, choice.chosen)

        check()

    _study(monkeypatch, study)


def test_nothing_is_stored_if_caches_are_off() -> None:
    with config.patch(force_disable_caches=True):
        _choose(Pipeline(2**30, CANDIDATES))
    assert not _files()


def test_nothing_is_stored_under_a_solver_of_unknown_source() -> None:
    """A partitioner's option may be a function."""

    def solver(*arguments: Any) -> tuple[float, list[int], list[int]]:
        return 0.0, [], []

    with functorch_config.patch(activation_memory_budget_solver=solver):
        _choose(Pipeline(2**30, CANDIDATES))
    assert not _files()


def test_idle_passes_are_left_out_of_stored_choices_too() -> None:
    first, again = (_choose(Pipeline(2**30)) for _ in range(2))
    assert first.chosen == again.chosen
    assert LinearCrossEntropy() not in again.chosen.passes
