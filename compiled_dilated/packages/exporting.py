"""Packages from models and programs, by torch.export and AOTInductor."""

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

from .. import arguments, version
from ..attend import Attend
from ..graphs import without_python
from ..masks import Mask
from ..native import cpp
from ..programs import Program, as_program
from .about import About, about_path, digest, gpu_isa, library_path
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
    """Write a package: `path`, native kernels and a description beside it.

    model: a program or mask, called with q, k, v and its data; a model whose attention is
        computed by `compile(program)`; or one wrapped by `compile(model, attention=...)`.
    example_inputs: tensors (batch, heads, tokens, width), (batch, tokens, width) or
        (batch, tokens), all on a CPU or all on a GPU: the device that runs the package.
    lengths: the least and the most tokens; None: the example's alone.
    batches: the least and the most of the batch; None: the example's alone.
    decode: True, for a program: a second entry whose queries, one or more, are the last tokens of
        k and v; `lengths` are those of the cache. For a model: (module, example inputs), a module
        that takes and returns the tensors of its cache.
    isa: instruction set of the generated code. "avx2": any CPU with AVX2; attention uses AVX-512
        and AMX where present. "native": this CPU's. None: "avx2" if torch supports it. Always
        None on a GPU, whose kernels are those of lanes, for GPUs of its kind.

    The package computes a forward. It runs by `load`, or without this library:

        # C++: dlopen("model.pt2.so", RTLD_NOW | RTLD_GLOBAL)
        torch.ops.load_library("model.pt2.so")
        # C++: torch::inductor::AOTIModelPackageLoader
        model = torch._inductor.aoti_load_package("model.pt2")

    Raises TypeError or ValueError for bad arguments, native.build.NativeUnavailable without a
    compiler, and the errors of torch.export for a model that it cannot capture.
    """
    package = Path(path)
    if package.suffix != ".pt2":
        raise ValueError(f"path must end with .pt2; got {str(path)!r}")
    if not package.absolute().parent.is_dir():
        raise ValueError(f"path must be in a directory that exists; got {str(path)!r}. Create it")
    sources = _sources_of(model, example_inputs, ranges_of(lengths, batches), decode)
    isa = _isa_of(isa, sources["model"].inputs[0].device)
    return _write(_about(model, isa, sources), sources, package)


@dataclass(frozen=True)
class _Source:
    """A module to export, its example inputs and its entry."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    entry: Entry


def _about(model: nn.Module | Program | Mask, isa: str, sources: Mapping[str, _Source]) -> About:
    """The description before the export, without files."""
    name, cuda = type(model).__name__, ""
    if isinstance(model, (Program, Mask)):
        name = repr(model)
    if sources["model"].entry.device == "cuda":
        cuda = str(torch.version.cuda)
    return About(
        name=name,
        entries={entry_name: source.entry for entry_name, source in sources.items()},
        isa=isa,
        cpu=torch.backends.cpu.get_cpu_capability(),
        machine=platform.machine(),
        torch=torch.__version__.partition("+")[0],
        compiled_dilated=version.installed() or "not installed",
        kernel=cpp.sources_digest(),
        files={},
        cuda=cuda,
    )


def _sources_of(
    model: object, example_inputs: Any, ranges: Ranges, decode: object
) -> dict[str, _Source]:
    """Sources of entries by name, after checks of the arguments."""
    if isinstance(model, Attend):
        raise TypeError(
            "export takes the program itself: export(program, ...), not compile(program)"
        )
    if not isinstance(model, (nn.Module, Program, Mask)):
        raise TypeError(
            f"model must be a torch.nn.Module, a program or a mask; got {type(model).__name__}"
        )
    inputs = tensors_of("example_inputs", example_inputs)
    if not isinstance(model, nn.Module):
        names = as_program(model).names
        if len(inputs) != 3 + len(names):
            raise ValueError(
                f"example_inputs must be {', '.join(('q', 'k', 'v', *names))}; "
                f"got {len(inputs)} tensors"
            )
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
    """The source of the entry "decode"."""
    if not isinstance(model, nn.Module):
        arguments.flag("decode", decode)
        if inputs[0].shape[2] < 3:
            raise ValueError(
                "example_inputs must have at least 3 tokens for decode=True; "
                f"got {inputs[0].shape[2]}"
            )
        # An example of two queries: torch.export would make one query a constant.
        example = (inputs[0][:, :, -2:].contiguous(), *inputs[1:])
        entry = entry_of("example_inputs", example, ranges, decodes=True, queries_last=True)
        return _Source(Attention(model, decodes=True), example, entry)
    if not (isinstance(decode, tuple) and len(decode) == 2 and isinstance(decode[0], nn.Module)):
        raise TypeError(
            "decode must be (module, example inputs) for a model, a module that takes and returns "
            f"the tensors of its cache; got {type(decode).__name__}. True is for a program"
        )
    tensors = tensors_of("decode[1]", decode[1])
    if tensors[0].device != inputs[0].device:
        raise ValueError(
            f"decode[1] must be on the device of example_inputs, {inputs[0].device}; "
            f"got {tensors[0].device}"
        )
    return _Source(decode[0], tensors, entry_of("decode[1]", tensors, ranges, decodes=True))


def _isa_of(isa: object, device: torch.device) -> str:
    """The instruction set of generated code.

    Raises ValueError if torch cannot generate it here.
    """
    if device.type == "cuda":
        if isa is not None:
            raise ValueError(
                f"isa is of CPUs, and example_inputs are on {device}; got {isa!r}. Leave isa out"
            )
        return gpu_isa(device)
    if isa is not None:
        arguments.choice("isa", isa, cpp.ISAS)
    if isa == "native":
        return "native"
    reason = cpp.why_not_portable()
    if reason is None:
        return "avx2"
    if isa == "avx2":
        raise ValueError(f"isa='avx2' is not possible here: {reason}. Leave isa out")
    return "native"


def _write(about: About, sources: Mapping[str, _Source], package: Path) -> About:
    """Write all files of a package; its description, completed.

    about: without digests, attention and strides, which the export determines.
    """
    # In a temporary folder first, so that an interruption leaves no incomplete package.
    # Its name says whose it is, if the process is killed and cannot remove it.
    prefix = f"{package.name}.unfinished-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=package.absolute().parent) as folder:
        unfinished = Path(folder, package.name)
        if about.is_of_gpu:
            libraries = cpp.write_checks(library_path(unfinished))
        else:
            libraries = cpp.write(library_path(unfinished), about.isa)
        # Graphs first: only they name the attention and strides of the entries.
        graphs = {name: _capture(source) for name, source in sources.items()}
        about = replace(about, entries={name: entry for name, (_, entry) in graphs.items()})
        _compile({name: exported for name, (exported, _) in graphs.items()}, unfinished, about)
        files = {".pt2": unfinished}
        files |= {f".pt2{suffix}": file for suffix, file in libraries.items()}
        about = replace(about, files={suffix: digest(file) for suffix, file in files.items()})
        about_path(unfinished).write_text(json.dumps(about.to_json(), indent=1) + "\n")
        # The description last: without it the files are no package.
        for file in (*files.values(), about_path(unfinished)):
            os.replace(file, package.absolute().parent / file.name)
    return about


def _capture(source: _Source) -> tuple[torch.export.ExportedProgram, Entry]:
    """Capture a module's graph.

    Returns it, and the entry with its attention and strides.
    """
    # Imported late: it imports Dynamo, which takes longer than all of this package.
    from ..wrapping.graphs import exportable

    module = source.module
    was_training = {part: part.training for part in module.modules()}
    shapes = dims_of(source.entry)
    try:
        with torch.no_grad(), exportable(module.eval(), source.inputs, shapes) as model:
            exported = torch.export.export(
                Checked(model, source.entry.code), source.inputs, dynamic_shapes=(shapes,)
            )
            attention = attention_of(exported)
            # Traced again without gradients: on a CPU attention becomes the native operator.
            exported = exported.run_decompositions({})
    finally:
        # One by one: a part may be in evaluation mode within a model that trains.
        for part, training in was_training.items():
            part.training = training
    if source.entry.device == "cpu":
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
                f"input {number} of the example must be contiguous, as generated code reads it; "
                "call contiguous()"
            )
    Checked.set_code(exported, entry.code)
    return exported, entry


def _compile(
    exported: Mapping[str, torch.export.ExportedProgram], path: Path, about: About
) -> None:
    """Compile the graphs of all entries and write the .pt2."""
    # Imported late: they import inductor, which takes longer than all of this package.
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from torch._inductor.package.package import package_aoti
    from torch._inductor.utils import fresh_cache

    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.metadata": about.metadata(),
    }
    # Also of a package for a GPU, whose own code runs on a CPU.
    if about.isa != "native" and cpp.why_not_portable() is None:
        options |= {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
    # Inductor tries instruction sets by compiling for each: its own cache has the results, whereas
    # a new one would not.
    valid_vec_isa_list()
    # A separate cache: two processes that export the same graph would overwrite each other's files.
    # On a GPU attention becomes lanes here, or is refused.
    with fresh_cache(), torch.no_grad(), without_python():
        files: dict[str, Any] = {}
        for name, program in exported.items():
            inputs, keywords = program.example_inputs
            graph = program.module(check_guards=False)
            files[name] = torch._inductor.aot_compile(
                graph, inputs, keywords, options=dict(options)
            )
        package_aoti(str(path), files)
