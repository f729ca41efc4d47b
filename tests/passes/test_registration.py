"""The operators of passes, and their table.

They are registered with the estimates once passes run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import passes
from passes.analysis import costs, workspaces
from passes.rewrites.chunk import chunked

IMPORTS = """
from passes.analysis import costs, workspaces
from passes.rewrites.rows import attentions
tables = (costs._REGISTERED, workspaces._REGISTERED, attentions._ATTENTIONS)
before = [len(table) for table in tables]
from passes.planning import backend, reports
from passes import BudgetError, Causal, Materialize, Reorder, Spill
print([len(table) for table in tables] == before)
backend.inductor_hooks.inductor_configs([])
print([len(table) for table in tables] == before)
"""


def test_importing_passes_registers_nothing(fresh_python: Callable[..., Any]) -> None:
    """The first options for inductor do."""
    run = fresh_python("-c", IMPORTS)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", "False"]


def test_every_operator_of_passes_is_in_the_table() -> None:
    passes.inductor_configs([])
    names = torch._C._dispatch_get_all_op_names()
    own = sorted(name for name in names if name.startswith("passes::"))
    registered = {op.name() for op in costs._REGISTERED}
    assert len(own) >= 8
    assert [name for name in own if name not in registered] == []


def test_a_users_registration_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def bytes_of(*args: Any) -> int:
        return 7

    monkeypatch.setitem(workspaces._REGISTERED, chunked._opoverload, bytes_of)
    passes.inductor_configs([])
    assert workspaces._REGISTERED[chunked._opoverload] is bytes_of
