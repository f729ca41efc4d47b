"""Choices of passes stored on disk, beside inductor's cache.

Planning is slow and deterministic.

A choice is stored under a hash of all that it depends on: the graph and its inputs, the pipeline,
the source of the passes and of the packages that register workspaces, torch and the options of
torch._inductor.config and torch._functorch.config. force_disable_caches of the former turns the
cache off, and so does a function among the options of the latter: its source is unknown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.codecache import write_atomic
from torch._inductor.runtime.cache_dir_utils import cache_dir

from .. import package
from ..analysis import workspaces
from ..protocol import Pass
from . import inductor_hooks
from .candidates import Passes
from .estimates import Estimate
from .tracing import Captured


def name_of(graph: Captured, pipeline: str, passes: Sequence[Pass]) -> str | None:
    """The name to store a choice under; None to store none.

    pipeline: the repr of what chooses
    passes: all that it may choose
    """
    source, partitioning = inductor_hooks.identity(passes), functorch_config.get_config_copy()
    if config.force_disable_caches or source is None or any(map(callable, partitioning.values())):
        return None
    tensors = (*graph.module.named_parameters(), *graph.module.named_buffers())
    parts = (
        source,
        pipeline,
        graph.module.print_readable(print_output=False, include_stride=True, include_device=True),
        [_kind(value) for value in graph.inputs],
        [(name, _kind(tensor)) for name, tensor in tensors],
        graph.training,
        torch.__version__,
        torch.get_num_threads(),
        config.get_hash(),
        sorted(partitioning.items()),
    )
    digest = hashlib.sha256(repr(parts).encode())
    # The source of this package is part of `source` already.
    functions = workspaces.registered()
    packages = {function.__module__.partition(".")[0] for function in functions}
    for file in sorted(_files(packages - {package.NAME})):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load(name: str) -> Any:
    """The JSON value stored under a name.

    None if there is no file, or no JSON in it. The file is not trusted: `decoded` checks the value.
    """
    try:
        return json.loads(_path(name).read_text())
    except (OSError, ValueError, RecursionError):  # missing, torn, or nested too deep
        return None


def store(name: str, value: Any) -> None:
    """Store a JSON value, entirely or not at all."""
    write_atomic(str(_path(name)), json.dumps(value), make_dirs=True)


def encoded(chosen: Estimate, estimates: Sequence[Estimate]) -> dict[str, Any]:
    """A choice as a JSON value."""
    rows: list[dict[str, Any]] = []
    for estimate in estimates:
        rows.append(dataclasses.asdict(estimate) | {"passes": [*map(repr, estimate.passes)]})
    return {"estimates": rows, "chosen": list(estimates).index(chosen)}


def decoded(
    value: object, offered: Sequence[Passes], budget_bytes: int | None
) -> tuple[Estimate, tuple[Estimate, ...]] | None:
    """The chosen estimate and all estimates, from a loaded value.

    None if it is not a choice: a damaged file counts as missing, and is written anew.

    offered: the candidates; passes are looked up among them by their repr
    """
    if not isinstance(value, dict) or value.keys() != {"estimates", "chosen"}:
        return None
    if not isinstance(value["estimates"], list) or not value["estimates"]:
        return None
    estimates: list[Estimate] = []
    for row in value["estimates"]:
        estimate = _decoded_estimate(row, offered)
        if estimate is None:
            return None
        estimates.append(estimate)
    # The plain step is the first: reports compare the others with it.
    if estimates[0].passes:
        return None
    place = value["chosen"]
    if not _is_count(place) or place >= len(estimates):
        return None
    chosen = estimates[place]
    if budget_bytes is not None and chosen.peak_bytes > budget_bytes:
        return None
    return chosen, tuple(estimates)


def _decoded_estimate(row: object, offered: Sequence[Passes]) -> Estimate | None:
    """An estimate from its fields.

    None if one is invalid, or its passes were never offered.
    """
    if not isinstance(row, dict):
        return None
    if row.keys() != {field.name for field in dataclasses.fields(Estimate)}:
        return None
    if not _is_count(row["peak_bytes"]) or not _is_count(row["input_bytes"]):
        return None
    if not isinstance(row["changed"], bool) or not isinstance(row["seconds"], float):
        return None
    if not 0 <= row["seconds"] < math.inf:
        return None
    for candidate in offered:
        passes = _subset(row["passes"], candidate)
        if passes is not None:
            return Estimate(**row | {"passes": passes})
    return None


def _subset(reprs: object, passes: Passes) -> Passes | None:
    """The passes with these reprs, in order; None if one is missing."""
    if not isinstance(reprs, list):
        return None
    missing = list(reprs)
    subset: list[Pass] = []
    for member in passes:
        if missing and missing[0] == repr(member):
            subset.append(member)
            missing.pop(0)
    if missing:
        return None
    return tuple(subset)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _path(name: str) -> Path:
    return Path(cache_dir()) / "passes" / f"{name}.json"


def _kind(value: Any) -> str:
    """A tensor without its data, or another value, as text."""
    if not isinstance(value, Tensor):
        return repr(value)
    layout = (tuple(value.shape), value.stride(), value.dtype, value.device)
    return repr((type(value), *layout, value.requires_grad, value.is_leaf))


def _files(packages: Iterable[str]) -> set[Path]:
    """The Python files of imported packages.

    A module without a file has none.
    """
    files = set[Path]()
    for name in packages:
        file = getattr(sys.modules[name], "__file__", None)
        if file:
            files.update(Path(file).parent.rglob("*.py"))
    return files
