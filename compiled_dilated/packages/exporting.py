"""From a model or a program to files, by torch.export and AOTInductor."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..attend import Attend
from ..masks import Mask
from ..native import build
from ..programs import Program
from .about import About, Input, about_path, digest, library_path

TOKENS, BATCH = "tokens", "batch"


class _Attention(nn.Module):
    """A program as a model of q, k, v and its data, in the order of names."""

    def __init__(self, program: Program | Mask) -> None:
        super().__init__()
        self.attend = Attend(program)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        named = dict(zip(self.attend.program.names, data, strict=True))
        out: Tensor = self.attend(q, k, v, data=named or None)
        return out


def export(
    model: nn.Module | Program | Mask,
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    lengths: tuple[int, int] | None = None,
    batches: tuple[int, int] | None = None,
) -> About:
    """Write a package: path, and beside it path.so and path.json.

    model: a program or mask, of q, k, v and its data; or a model of tensors that computes its attention by `compile(program)`.
    example_inputs: tensors (batch, heads, tokens, width), (batch, tokens, width) or (batch, tokens).
    lengths: the least and the most tokens; None: those of the example alone. batches: the same of the batch.

    The package computes a forward. It runs on CPUs with the instructions of this one, by `load`, or without this package:

        torch.ops.load_library("model.pt2.so")                            C++: dlopen("model.pt2.so", RTLD_NOW | RTLD_GLOBAL)
        model = torch._inductor.aoti_load_package("model.pt2")            C++: torch::inductor::AOTIModelPackageLoader

    Raises TypeError or ValueError for bad arguments, native.build.NativeUnavailable without a compiler, and what torch.export
    raises for a model that it cannot capture.
    """
    package = Path(path)
    if package.suffix != ".pt2":
        raise ValueError(f"path must end with .pt2; got {str(path)!r}")
    name, module = _module_of(model)
    inputs = tuple(example_inputs)
    for number, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.device.type != "cpu":
            raise TypeError(f"example_inputs[{number}] must be a tensor on a CPU; got {_kind(x)}")
    shapes, ranges = _shapes_of(inputs, lengths, batches)
    dims = {of_range: torch.export.Dim(of_range, min=least, max=most) for of_range, (least, most) in ranges.items()}
    dynamic = tuple({axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)} for shape in shapes)

    library = build.library_for_cpp()
    training = module.training
    # It imports the compiler, which takes longer than all of this package.
    from torch._inductor.utils import fresh_cache

    try:
        with torch.no_grad():
            exported = torch.export.export(module.eval(), inputs, dynamic_shapes=_matching(module, dynamic))
            # Traced once more, now for a forward alone: attention becomes the native operator.
            exported = exported.run_decompositions({})
            _check_graph(exported)
            # All in a folder of its own first: a stop leaves no half of a package.
            with tempfile.TemporaryDirectory(dir=package.absolute().parent) as folder:
                made = Path(folder, package.name)
                # In a cache of its own: two processes that export the same would write into each other's files.
                with fresh_cache():
                    torch._inductor.aoti_compile_and_package(exported, package_path=str(made))
                shutil.copyfile(library, library_path(made))
                about = About(
                    name,
                    tuple(Input(str(x.dtype).removeprefix("torch."), shape) for x, shape in zip(inputs, shapes, strict=True)),
                    ranges,
                    torch.__version__.partition("+")[0],
                    torch.backends.cpu.get_cpu_capability(),
                    platform.machine(),
                    {".pt2": digest(made), ".pt2.so": digest(library_path(made))},
                )
                about_path(made).write_text(json.dumps(about.to_json(), indent=1) + "\n")
                for file in (library_path(made), made, about_path(made)):
                    os.replace(file, package.absolute().parent / file.name)
    finally:
        module.train(training)
    return about


def _module_of(model: object) -> tuple[str, nn.Module]:
    if isinstance(model, (Program, Mask)):
        return repr(model), _Attention(model)
    if isinstance(model, Attend):
        raise TypeError("export takes the program itself: export(program, ...), not compile(program)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, a program or a mask; got {type(model).__name__}")
    return type(model).__name__, model


def _kind(x: object) -> str:
    return f"one on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _shapes_of(
    inputs: Sequence[Tensor], lengths: tuple[int, int] | None, batches: tuple[int, int] | None
) -> tuple[list[tuple[int | str, ...]], dict[str, tuple[int, int]]]:
    """Each input's shape with names for what varies, and the ranges of these."""
    ranges: dict[str, tuple[int, int]] = {}
    for name, given in ((TOKENS, lengths), (BATCH, batches)):
        if given is not None:
            argument = "lengths" if name == TOKENS else "batches"
            numbers = arguments.integers(argument, given, 1)
            if len(numbers) != 2 or numbers[0] > numbers[1]:
                raise ValueError(f"{argument} must be the least and the most, as (1, 65536); got {given!r}")
            ranges[name] = (numbers[0], numbers[1])
    shapes: list[tuple[int | str, ...]] = []
    sizes: dict[str, int] = {}
    for number, x in enumerate(inputs):
        if x.dim() < 2:
            raise ValueError(f"example_inputs[{number}] must have a batch and tokens; got the shape {tuple(x.shape)}")
        shape: list[int | str] = list(x.shape)
        for name, axis in ((BATCH, 0), (TOKENS, x.dim() - 2 if x.dim() > 2 else 1)):
            if name not in ranges:
                continue
            size = sizes.setdefault(name, x.shape[axis])
            if x.shape[axis] != size:
                raise ValueError(
                    f"all inputs must have as many {name} as the first, {size}; example_inputs[{number}] has {x.shape[axis]}"
                )
            shape[axis] = name
        shapes.append(tuple(shape))
    for name, size in sizes.items():
        if size < 2:
            # torch.export takes a size of 1 for a constant.
            raise ValueError(f"an example must have at least 2 {name} where that varies; got {size}")
        if not ranges[name][0] <= size <= ranges[name][1]:
            raise ValueError(f"the example's {name}, {size}, must be within its range {ranges[name]}")
    return shapes, ranges


def _matching(module: nn.Module, dynamic: tuple[Any, ...]) -> Any:
    """Dynamic shapes as the module's signature has its arguments."""
    if isinstance(module, _Attention) and len(dynamic) > 3:
        return (*dynamic[:3], dynamic[3:])
    return dynamic


def _check_graph(exported: torch.export.ExportedProgram) -> None:
    """Raise ValueError where attention in a graph would need Python."""
    for node in exported.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("compiled_dilated.attend"):
            raise ValueError(
                "the graph holds attention that the native kernel does not compute for all lengths (a ring, another lowering, or "
                "a function that reads what varies). Use lowering='auto' without ranks"
            )
