"""Choices remembered from process to process, beside what inductor keeps on the disk: planning takes long and comes out the same.

A choice bears the name of all that it depends on: the graph and its inputs, the pipeline, the source of its passes and of the
packages whose operators say what they hold, torch and its settings. torch._inductor.config.force_disable_caches turns it off.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.codecache import write_atomic
from torch._inductor.runtime.cache_dir_utils import cache_dir

from .. import package
from ..analysis.workspaces import registered
from ..protocol import Pass
from . import inductor_hooks
from .tracing import Captured


def name_of(graph: Captured, pipeline: str, passes: Sequence[Pass]) -> str | None:
    """The name of what `pipeline` chooses for a graph among `passes`; None where nothing is to be remembered."""
    source = inductor_hooks.identity(passes)
    if config.force_disable_caches or source is None:
        return None
    inputs = [_kind(each) for each in graph.inputs]
    held = [(name, _kind(each)) for name, each in (*graph.module.named_parameters(), *graph.module.named_buffers())]
    code = graph.module.print_readable(print_output=False, include_stride=True, include_device=True)
    about = (source, pipeline, code, inputs, held, graph.training, torch.__version__, torch.get_num_threads(), config.get_hash())
    found = hashlib.sha256(repr(about).encode())
    # The source of this package is part of `source`.
    for file in sorted(_sources({function.__module__.partition(".")[0] for function in registered()} - {package.NAME})):
        found.update(file.read_bytes())
    return found.hexdigest()


def load(name: str) -> Any:
    """The JSON value stored under a name; None where there is no file, or no JSON in it.

    Anybody may have written the file, so that the value may be any at all: the caller checks it.
    """
    try:
        return json.loads(_path(name).read_text())
    except (OSError, ValueError, RecursionError):  # not there, torn, or nested beyond any choice: it is made anew
        return None


def store(name: str, found: Any) -> None:
    """Keeps what json can say, whole or not at all."""
    write_atomic(str(_path(name)), json.dumps(found), make_dirs=True)


def _path(name: str) -> Path:
    return Path(cache_dir()) / "passes" / f"{name}.json"


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    parts = (type(value), tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad, value.is_leaf)
    return repr(parts)


def _sources(packages: Iterable[str]) -> set[Path]:
    modules = [sys.modules[package] for package in packages]
    roots = [Path(str(module.__file__)).parent for module in modules if getattr(module, "__file__", None)]
    return {file for root in roots for file in root.rglob("*.py")}
