"""`compile` of models.

A budget goes to passes, and arguments of programs are refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import compiled_dilated as cd
import passes
from compiled_dilated import masks
from compiled_dilated.cli import app
from tests.graphs import Gelu


def test_a_model_under_a_budget() -> None:
    model, x = Gelu().double(), torch.randn(300, 64, dtype=torch.float64)
    step = cd.compile(model, memory_budget="1GiB")
    with torch.no_grad():
        torch.testing.assert_close(step(x), model(x))
    assert "predicted peak" in str(passes.report(step))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (Gelu(), {}, "got neither"),
        (Gelu(), {"memory_budget": "1GiB", "ranks": 2}, "got ranks"),
        (Gelu(), {"memory_budget": "1GiB", "lowering": "dense"}, "got lowering"),
        (Gelu(), {"memory_budget": "-1GiB"}, "memory_budget"),
        (masks.causal(), {"memory_budget": "1GiB"}, "memory_budget and dynamic are for models"),
        (masks.causal(), {"dynamic": True}, "memory_budget and dynamic are for models"),
    ],
)
def test_arguments_of_the_wrong_target_are_refused(
    target: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cd.compile(target, **options)


def test_the_command_is_that_of_passes() -> None:
    result = CliRunner().invoke(app, ["memory", "--help"])
    assert result.exit_code == 0
    assert "--budget" in result.output
    assert CliRunner().invoke(app, ["memory", "nowhere"]).exit_code == 2
