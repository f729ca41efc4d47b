"""The program that inductor writes for a graph, loaded without its kernels: it runs on tensors without data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

# Estimating must neither run kernels to time them nor start the passes that ask for the estimate.
_QUIET = {
    "max_autotune": False,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "benchmark_harness": False,
    "cpp_wrapper": False,
    "cpp.simdlen": 1,  # no vectors: nobody reads the kernels, and to write them takes as long as all else
    "post_grad_custom_pre_pass": None,
    "post_grad_custom_post_pass": None,
}


def copied(module: GraphModule) -> GraphModule:
    """A module whose graphs may be changed. Tensors are shared."""
    made = GraphModule(module, copied_graph(module.graph))
    made.meta = dict(module.meta)
    for node in made.graph.find_nodes(op="get_attr"):
        if isinstance(inner := getattr(made, str(node.target), None), GraphModule):
            setattr(made, str(node.target), copied(inner))
    return made


def copied_graph(graph: Graph) -> Graph:
    """A graph that may be changed. How its code takes arguments is shared; torch's own deepcopy copies that too, and warns."""
    made = Graph(tracer_cls=graph._tracer_cls)
    made.output(made.graph_copy(graph, {})).meta = copy.copy(graph.output_node().meta)
    made.set_codegen(graph._codegen)
    return made


def written(module: GraphModule, inputs: list[Any], inference: bool, donated: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Inductor's program for a graph: the steps of torch._inductor.compile_fx up to the text, loaded without its kernels."""
    from torch._inductor import compile_fx, config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import shape_env_from_inputs
    from torch._inductor.virtualized import V

    with ExitStack() as stack:
        stack.enter_context(config.patch(_QUIET))
        stack.enter_context(torch.no_grad())
        stack.enter_context(V.set_debug_handler(DebugContext()))
        view_to_reshape(module)
        fakes = compile_fx.fake_tensor_prop(module, inputs)
        compile_fx._recursive_record_original_output_strides(module)
        stack.enter_context(V.set_fake_mode(fakes))
        compile_fx._recursive_post_grad_passes(module, is_inference=inference)
        stack.enter_context(compile_fx.maybe_disable_comprehensive_padding(inputs))
        lowering = GraphLowering(module, inputs, shape_env_from_inputs(inputs), is_inference=inference, is_backward=bool(donated))
        lowering.bw_donated_idxs = donated
        lowering.freeze_runtime_asserts()
        stack.enter_context(V.set_graph_handler(lowering))
        stack.enter_context(V.set_extern_kernel_nodes([]))
        lowering.run(*inputs)
        text = lowering.codegen()[0].value
    return _loaded(text, lowering.constants)


def _loaded(text: str, constants: Mapping[str, Any]) -> Callable[[list[Any]], Sequence[Any]]:
    scope: dict[str, Any] = {"__name__": "passes.footprint.program"}
    with mock.patch("torch._inductor.async_compile.AsyncCompile", _NoCompiler):
        exec(compile(text, "<inductor's program>", "exec"), scope)
    for name in [name for name in scope if name.startswith("empty_strided_")]:
        scope[name] = _allocator(name.removeprefix("empty_strided_"))
    scope.update(reinterpret_tensor=_reinterpreted, assert_size_stride=_nothing, assert_alignment=_nothing, **constants)
    call: Callable[[list[Any]], Sequence[Any]] = scope["call"]
    return call


def _allocator(device: str) -> Callable[..., Tensor]:
    name = device.partition("_")[0]
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=name)


def _reinterpreted(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a kernel or a check."""


class _NoKernel:
    run = staticmethod(_nothing)
    __call__ = staticmethod(_nothing)


class _NoCompiler:
    """In place of inductor's compiler of kernels, whatever language they are in."""

    def wait(self, scope: Mapping[str, Any]) -> None:
        """There is nothing to wait for."""

    def __getattr__(self, language: str) -> Callable[..., _NoKernel]:
        return lambda *args, **kwargs: _NoKernel()
