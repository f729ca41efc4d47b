"""Inductor's generated program for a graph, loaded without its kernels.

The program allocates, calls and frees as the compiled graph would, but on tensors without data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

Program = Callable[[list[Any]], Sequence[Any]]

# An estimate must neither time kernels nor run the passes that call it.
_CONFIG = {
    "max_autotune": False,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "benchmark_harness": False,
    "cpp_wrapper": False,
    # Scalar kernels: they are not compiled, and vectorizing takes as long as all the rest.
    "cpp.simdlen": 1,
    "post_grad_custom_pre_pass": None,
    "post_grad_custom_post_pass": None,
}


def copied(module: GraphModule) -> GraphModule:
    """Copy a module and its subgraphs, so that they may be changed.

    Tensors are shared.
    """
    result = GraphModule(module, copied_graph(module.graph))
    result.meta = dict(module.meta)
    for node in result.graph.find_nodes(op="get_attr"):
        subgraph = getattr(result, str(node.target), None)
        if isinstance(subgraph, GraphModule):
            setattr(result, str(node.target), copied(subgraph))
    return result


def copied_graph(graph: Graph) -> Graph:
    """Copy a graph, so that it may be changed.

    The code generator is shared: torch's own deepcopy copies it as well, and warns.
    """
    result = Graph(tracer_cls=graph._tracer_cls)
    output = result.output(result.graph_copy(graph, {}))
    output.meta = copy.copy(graph.output_node().meta)
    result.set_codegen(graph._codegen)
    return result


def written(module: GraphModule, inputs: list[Any], inference: bool, donated: list[int]) -> Program:
    """Generate inductor's program for a graph and load it without its kernels.

    Repeats the steps of torch._inductor.compile_fx up to the program's text.

    module: a graph of aten operators; it is changed
    inputs: fake tensors and symbols, one for each placeholder
    donated: places of the inputs that the program may free
    """
    from torch._inductor import compile_fx, config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import shape_env_from_inputs
    from torch._inductor.virtualized import V

    with ExitStack() as stack:
        stack.enter_context(config.patch(_CONFIG))
        stack.enter_context(torch.no_grad())
        stack.enter_context(V.set_debug_handler(DebugContext()))
        # Passes on the graph, as inductor runs them after autograd.
        view_to_reshape(module)
        fake_mode = compile_fx.fake_tensor_prop(module, inputs)
        compile_fx._recursive_record_original_output_strides(module)
        stack.enter_context(V.set_fake_mode(fake_mode))
        compile_fx._recursive_post_grad_passes(module, is_inference=inference)
        # Lowering to inductor's own representation, then code.
        stack.enter_context(compile_fx.maybe_disable_comprehensive_padding(inputs))
        lowering = GraphLowering(
            module,
            inputs,
            shape_env_from_inputs(inputs),
            is_inference=inference,
            is_backward=bool(donated),
        )
        lowering.bw_donated_idxs = donated
        lowering.freeze_runtime_asserts()
        stack.enter_context(V.set_graph_handler(lowering))
        stack.enter_context(V.set_extern_kernel_nodes([]))
        lowering.run(*inputs)
        text = lowering.codegen()[0].value
    return _loaded(text, lowering.constants)


def _loaded(text: str, constants: Mapping[str, Any]) -> Program:
    """Execute a program's text with kernels, checks and allocators replaced."""
    scope: dict[str, Any] = {"__name__": f"{__name__}.text"}
    with mock.patch("torch._inductor.async_compile.AsyncCompile", _NoCompiler):
        exec(compile(text, "<inductor's program>", "exec"), scope)
    # Inductor allocates with functions of its own in C++, which no dispatch mode sees.
    for name in list(scope):
        if name.startswith("empty_strided_"):
            scope[name] = _allocator(name.removeprefix("empty_strided_"))
    scope.update(
        reinterpret_tensor=_reinterpret,
        assert_size_stride=_do_nothing,
        assert_alignment=_do_nothing,
        **constants,
    )
    program: Program = scope["call"]
    return program


def _allocator(device: str) -> Callable[..., Tensor]:
    name = device.partition("_")[0]
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=name)


def _reinterpret(
    tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0
) -> Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replace a kernel or a check."""


class _NoKernel:
    """Replaces a compiled kernel."""

    run = staticmethod(_do_nothing)
    __call__ = staticmethod(_do_nothing)


class _NoCompiler:
    """Replaces inductor's compiler of kernels, in whatever language they are."""

    def wait(self, scope: Mapping[str, Any]) -> None:
        """Return at once: nothing is being compiled."""

    def __getattr__(self, language: str) -> Callable[..., _NoKernel]:
        return lambda *args, **kwargs: _NoKernel()
