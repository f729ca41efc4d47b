"""`import compiled_dilated`: its public names, and few modules beyond torch's."""

from __future__ import annotations

import json
from typing import Any

import pytest

import compiled_dilated

PUBLIC = {
    "Attend",
    "Branch",
    "DilatedAttention",
    "MultiheadDilatedAttention",
    "Plan",
    "Program",
    "RingPlan",
    "Streamed",
    "big_bird",
    "block_mask",
    "block_masks",
    "block_sparse",
    "compile",
    "export",
    "hf",
    "hilbert_window",
    "inspect",
    "load",
    "local_window",
    "longnet",
    "masks",
    "orders",
    "plan",
    "reference",
    "show",
    "sites",
    "variant",
}

# Imported with their first use, since few uses need them. Some versions of torch import some of
# these.
ON_FIRST_USE = {
    "matplotlib",
    "rich",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "triton",
    "typer",
}

PROBE = """
import json, sys, torch
threads, before = torch.get_num_threads(), set(sys.modules)
import compiled_dilated
print(json.dumps({
    "new": sorted(set(sys.modules) - before),
    "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "gpu in use": torch.cuda.is_initialized(),
    "threads unchanged": torch.get_num_threads() == threads,
}))
"""


@pytest.fixture
def imported(fresh_python: Any) -> dict[str, Any]:
    """The state of an interpreter after `import torch` and `import compiled_dilated`."""
    run = fresh_python("-c", PROBE)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def test_public_names_exist() -> None:
    assert set(compiled_dilated.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(compiled_dilated, name) is not None


def test_import_is_light(imported: dict[str, Any]) -> None:
    new = set(imported["new"])
    assert new & ON_FIRST_USE == set()
    foreign = {name for name in new if name.partition(".")[0] not in ("compiled_dilated", "passes")}
    # Eight of them are torch.distributed.nn, which transports import before a process group exists.
    assert len(foreign) <= 24, sorted(foreign)


def test_import_starts_nothing(imported: dict[str, Any]) -> None:
    assert not imported["process group"]
    assert not imported["gpu in use"]
    assert imported["threads unchanged"]
