"""From a model or a program to files, by torch.export and AOTInductor."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..attend import Attend
from ..masks import Mask
from ..native import cpp
from ..programs import Program
from .about import About, about_path, digest, library_path
from .entries import TOKENS, Entry
from .graphs import Attention, Checked, attention_of, check_graph, read_by_code
from .shapes import Ranges, dims_of, entry_of, ranges_of, tensors_of

Decode = bool | tuple[nn.Module, Sequence[Tensor]]


def export(
    model: nn.Module | Program | Mask,
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    lengths: tuple[int, int] | None = None,
    batches: tuple[int, int] | None = None,
    decode: Decode = False,
    isa: str | None = None,
) -> About:
    """Write a package: path, and beside it the native kernels and a description.

    model: a program or mask, of q, k, v and its data; or a model of tensors that computes its attention by `compile(program)`.
    example_inputs: tensors (batch, heads, tokens, width), (batch, tokens, width) or (batch, tokens).
    lengths: the least and the most tokens; None: those of the example alone.
    batches: the same of the batch.
    decode: for a program True: a second entry, whose queries are the last of the tokens of k and v, one or more; `lengths` are
        those of the cache. For a model: a module of its cache's tensors and example inputs, as (module, inputs).
    isa: the instructions that its code uses. "avx2": it runs on every CPU with AVX2, and attention uses AVX-512 and AMX where
        there are any. "native": those of this CPU. None: "avx2" where torch can do that.

    The package computes a forward. It runs by `load`, or without this library:

        torch.ops.load_library("model.pt2.so")                            C++: dlopen("model.pt2.so", RTLD_NOW | RTLD_GLOBAL)
        model = torch._inductor.aoti_load_package("model.pt2")            C++: torch::inductor::AOTIModelPackageLoader

    Raises TypeError or ValueError for bad arguments, native.build.NativeUnavailable without a compiler, and what torch.export
    raises for a model that it cannot capture.
    """
    package = Path(path)
    if package.suffix != ".pt2":
        raise ValueError(f"path must end with .pt2; got {str(path)!r}")
    isa = _isa_of(isa)
    sources = _sources_of(model, example_inputs, ranges_of(lengths, batches), decode)
    about = About(
        repr(model) if isinstance(model, (Program, Mask)) else type(model).__name__,
        {name: source.entry for name, source in sources.items()},
        isa,
        torch.backends.cpu.get_cpu_capability(),
        platform.machine(),
        torch.__version__.partition("+")[0],
        _version(),
        cpp.sources_digest(),
        {},
    )
    return _write(about, sources, package)


@dataclass(frozen=True)
class _Source:
    """What becomes an entry."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    entry: Entry


def _sources_of(
    model: object, example_inputs: Any, ranges: Ranges, decode: object
) -> dict[str, _Source]:
    """The entries' modules and examples, by name."""
    if isinstance(model, Attend):
        raise TypeError(
            "export takes the program itself: export(program, ...), not compile(program)"
        )
    if not isinstance(model, (nn.Module, Program, Mask)):
        raise TypeError(
            f"model must be a torch.nn.Module, a program or a mask; got {type(model).__name__}"
        )
    inputs = tensors_of("example_inputs", example_inputs)
    entry = entry_of("example_inputs", inputs, ranges, False)
    module = model if isinstance(model, nn.Module) else Attention(model)
    sources = {"model": _Source(module, inputs, entry)}
    if decode is not False:
        if TOKENS not in ranges:
            raise ValueError("decode needs lengths, the range of the cache's tokens")
        sources["decode"] = _decode_source(model, inputs, ranges, decode)
    return sources


def _decode_source(
    model: nn.Module | Program | Mask, inputs: tuple[Tensor, ...], ranges: Ranges, decode: object
) -> _Source:
    if not isinstance(model, nn.Module):
        arguments.flag("decode", decode)
        if inputs[0].shape[2] < 3:
            raise ValueError(
                f"example_inputs must have at least 3 tokens for decode=True; got {inputs[0].shape[2]}"
            )
        # Two queries stand for any number of them.
        shorter = (inputs[0][:, :, -2:].contiguous(), *inputs[1:])
        return _Source(
            Attention(model, True), shorter, entry_of("example_inputs", shorter, ranges, True, True)
        )
    if not (isinstance(decode, tuple) and len(decode) == 2 and isinstance(decode[0], nn.Module)):
        raise TypeError(
            "decode must be (module, example inputs) for a model, a module that takes and returns the tensors of its cache; "
            f"got {type(decode).__name__}. True is for a program"
        )
    tensors = tensors_of("decode[1]", decode[1])
    return _Source(decode[0], tensors, entry_of("decode[1]", tensors, ranges, True))


def _isa_of(isa: object) -> str:
    """The instructions of generated code. Raises ValueError where they cannot be had."""
    if isa is not None:
        arguments.choice("isa", isa, cpp.ISAS)
    if isa == "native":
        return "native"
    reason = cpp.why_not_portable()
    if reason is not None and isa == "avx2":
        raise ValueError(f"isa='avx2' is not possible here: {reason}. Leave isa out")
    return "native" if reason is not None else "avx2"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("compiled-dilated")
    except PackageNotFoundError:
        return "not installed"


def _write(about: About, sources: Mapping[str, _Source], package: Path) -> About:
    """Write all files of a package, and return its description with what was found out."""
    # All in a folder of its own first: a stop leaves no half of a package.
    with tempfile.TemporaryDirectory(dir=package.absolute().parent) as folder:
        unfinished = Path(folder, package.name)
        libraries = cpp.write(library_path(unfinished), about.isa)
        graphs = {name: _capture(source) for name, source in sources.items()}
        about = replace(about, entries={name: entry for name, (_, entry) in graphs.items()})
        _compile({name: exported for name, (exported, _) in graphs.items()}, unfinished, about)
        files = {
            ".pt2": unfinished,
            **{f".pt2{suffix}": file for suffix, file in libraries.items()},
        }
        about = replace(about, files={suffix: digest(file) for suffix, file in files.items()})
        about_path(unfinished).write_text(json.dumps(about.to_json(), indent=1) + "\n")
        for file in (*files.values(), about_path(unfinished)):
            os.replace(file, package.absolute().parent / file.name)
    return about


def _capture(source: _Source) -> tuple[torch.export.ExportedProgram, Entry]:
    """A module's graph, whose attention is the native operator, and its entry with what was found out."""
    module, training = source.module, source.module.training
    try:
        with torch.no_grad():
            exported = torch.export.export(
                Checked(module.eval(), source.entry.code),
                source.inputs,
                dynamic_shapes=(dims_of(source.entry),),
            )
            attention = attention_of(exported)
            # Traced once more, now for a forward alone.
            exported = exported.run_decompositions({})
    finally:
        module.train(training)
    check_graph(exported)
    contiguous = read_by_code(exported)
    inputs = tuple(
        replace(x, contiguous=by_code)
        for x, by_code in zip(source.entry.inputs, contiguous, strict=True)
    )
    entry = replace(source.entry, inputs=inputs, attention=attention)
    for number, (x, expected) in enumerate(zip(source.inputs, inputs, strict=True)):
        if expected.contiguous and not x.is_contiguous():
            raise ValueError(
                f"input {number} of the example must be contiguous, as generated code reads it; call contiguous()"
            )
    Checked.set_code(exported, entry.code)
    return exported, entry


def _compile(
    exported: Mapping[str, torch.export.ExportedProgram], path: Path, about: About
) -> None:
    """Write the .pt2 of all entries."""
    # It imports the compiler, which takes longer than all of this package.
    from torch._inductor.package.package import package_aoti
    from torch._inductor.utils import fresh_cache

    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.metadata": about.metadata(),
    }
    if about.isa == "avx2":
        options |= {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
    # In a cache of its own: two processes that export the same would write into each other's files.
    with fresh_cache(), torch.no_grad():
        files: dict[str, Any] = {}
        for name, program in exported.items():
            inputs, keywords = program.example_inputs
            graph = program.module(check_guards=False)
            files[name] = torch._inductor.aot_compile(
                graph, inputs, keywords, options=dict(options)
            )
        package_aoti(str(path), files)
