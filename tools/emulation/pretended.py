"""A pretended H100, for which inductor writes Triton.

Triton's interpreter runs the kernels, or ptxas compiles them.

    EMULATION=interpret   kernels run in Triton's interpreter, on CPU tensors
    EMULATION=compile     kernels are compiled for sm_90 and not run
    EMULATION=package     AOTInductor packs compiled kernels; launches of its code are interpreted

Dynamo, guards, AOTAutograd and inductor are the real ones. A graph is traced on CPU tensors; only
inductor sees it as a graph of fake tensors of cuda:0. For packages tensors themselves are of
cuda:0, in the memory of the host (`toolkit`). Patches private names of torch 2.13 and
Triton 3.6: `environment` pins both. Imported before torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import subprocess
import tempfile
import time
import types
from pathlib import Path
from typing import Any

MODE = os.environ["EMULATION"]
if MODE == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="emulation-")
if MODE == "package":
    from . import toolkit

import torch  # noqa: E402
import torch._dynamo.device_interface as device_interface  # noqa: E402
import torch._inductor.async_compile as async_compile  # noqa: E402
import torch._inductor.compile_fx as compile_fx  # noqa: E402
import torch._inductor.config as inductor_config  # noqa: E402
import torch._inductor.runtime.triton_helpers as triton_helpers  # noqa: E402
import torch._inductor.runtime.triton_heuristics as triton_heuristics  # noqa: E402
import torch._subclasses.fake_tensor as fake_tensor  # noqa: E402
import torch.nn.attention.flex_attention as flex_attention  # noqa: E402
import triton  # noqa: E402
from torch import Tensor, fx  # noqa: E402
from torch._guards import TracingContext, detect_fake_mode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

DEVICE = torch.device("cuda", 0)
TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024
# What inductor has written, (name, source), in order.
KERNELS: list[tuple[str, str]] = []
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3 (pretended)", major=9, minor=0, multi_processor_count=132,
    total_memory=80 * 2**30, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED_BYTES,
    shared_memory_per_multiprocessor=228 * 1024, L2_cache_size=50 * 2**20, gcnArchName="", uuid="0",
    pci_bus_id=0, pci_device_id=0, pci_domain_id=0, is_integrated=0, is_multi_gpu_board=0,
)  # fmt: skip


class _NoGuard:
    """A device guard that guards nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __enter__(self) -> _NoGuard:
        return self

    def __exit__(self, *error: Any) -> bool:
        return False


class _Event:
    """An event of CUDA by the host's clock.

    Kernels run where they are launched.
    """

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds until another event, as many as a division takes at least."""
        return max(1e3 * (end.seconds - self.seconds), 1e-6)


class _Graph:
    """A CUDA graph whose calls run while they are captured."""

    def replay(self) -> None:
        pass


class _Driver:
    """Triton's driver of the pretended GPU."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "max_num_regs": 65536,
            "warpSize": 32, "sm_clock_rate": 1980000, "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        },
        # Module, function, registers, spills, most threads of a program.
        load_binary=lambda name, code, shared, device: (0, 0, 0, 0, 1024),
    )  # fmt: skip

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """The launch of a compiled kernel, which does nothing here."""
        return lambda *arguments, **options: None

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


class _Libdevice:
    """Functions of libdevice, which are declarations alone in the interpreter."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl

        if name == "isnan":
            return lambda x: x != x
        if name == "isinf":
            return lambda x: (x == float("inf")) | (x == -float("inf"))
        return getattr(tl.math, name)


def _zeros(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype).zero_()


def _register_guard() -> None:
    """Register c10's empty device guard for CUDA.

    A CPU build of torch lacks it.
    """
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    folder, torch_folder = Path(tempfile.mkdtemp(prefix="emulation-")), Path(torch.__file__).parent
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "using namespace c10;\n"
        "static impl::DeviceGuardImplRegistrar registrar(\n"
        "    DeviceType::CUDA, new impl::NoOpDeviceGuardImpl<DeviceType::CUDA>());\n"
    )
    include, libraries = f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"
    compiler = ["g++", "-std=c++20", "-fPIC", "-shared"]
    subprocess.run(
        [*compiler, str(source), include, libraries, "-lc10", "-o", str(library)], check=True
    )
    ctypes.CDLL(str(library))


def _answer(owner: Any, answers: dict[str, Any], as_static: bool = False) -> None:
    """Replace functions by ones that return a constant, whatever their arguments."""
    for name, answer in answers.items():

        def function(*arguments: Any, _answer: Any = answer, **options: Any) -> Any:
            return _answer

        setattr(owner, name, staticmethod(function) if as_static else function)


# What functions of torch.cuda return.
_OF_CUDA: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "_is_compiled": True,
    "device_count": 1,
    "current_device": 0,
    "is_bf16_supported": True,
    "get_device_properties": PROPERTIES,
    "_get_device_properties": PROPERTIES,
    "get_device_capability": (9, 0),
    "get_device_name": PROPERTIES.name,
    "mem_get_info": (79 * 2**30, 80 * 2**30),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), 0),
    **dict.fromkeys(("_lazy_init", "_lazy_call", "manual_seed", "manual_seed_all"), None),
    **dict.fromkeys(("set_device", "synchronize", "set_rng_state", "_sleep"), None),
    "reset_peak_memory_stats": None,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    # A graph is "captured" by running it.
    "graph": contextlib.nullcontext(),
}
# What Dynamo's interface of CUDA returns.
_OF_INTERFACE = {
    **dict.fromkeys(("exchange_device", "maybe_exchange_device"), 0),
    "current_device": 0,
    "set_device": None,
    "device_count": 1,
    "is_available": True,
    "get_raw_stream": 0,
    "synchronize": None,
    "is_bf16_supported": True,
    "is_triton_capable": True,
    "raise_if_triton_unavailable": None,
    "get_compute_capability": 90,
    "get_device_properties": PROPERTIES,
}


def _pretend_device() -> None:
    """Replace what torch, Dynamo and fake tensors call of CUDA."""
    cuda = torch.cuda
    _answer(cuda, _OF_CUDA)
    cuda._cached_device_count = 1
    cuda._DeviceGuard = cuda.device = _NoGuard
    cuda.Event, cuda.CUDAGraph = _Event, _Graph
    torch._C._cuda_getCurrentRawStream = lambda *arguments: 0
    torch._C._cuda_getDevice = lambda: 0
    # Not empty: where kernels are compiled alone, no kernel fills it, and it must contain no NaN.
    torch._C._dynamo.guards._empty_strided_cuda = _zeros
    fake_tensor.init_gpu_context = lambda *arguments: None
    interface = device_interface.CudaInterface
    interface.device = _NoGuard
    _answer(interface, _OF_INTERFACE, as_static=True)
    _answer(interface.Worker, {"get_device_properties": PROPERTIES, "current_device": 0}, True)


def _mend_interpreter() -> None:
    """Give the interpreter libdevice's functions, and products of bfloat16.

    Triton 3.6 multiplies the raw bits of bfloat16.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    triton_helpers.libdevice = _Libdevice()
    product = interpreter.InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle(
            (x.data.astype(np.uint32) << 16).view(np.float32), tl.float32
        )

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        return product(self, wide(a), wide(b), d, *precision)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _pretend_inductor() -> None:
    """Pass inductor graphs of CPU tensors as graphs of cuda:0.

    Its kernels are recorded.
    """
    # In this process, which is patched, and without the caches of other runs.
    inductor_config.compile_threads = 1
    inductor_config.force_disable_caches = True
    inductor_config.triton.cudagraphs = False
    inductor_config.use_static_triton_launcher = False
    triton_helpers.set_driver_to_gpu = lambda: None
    make = async_compile.AsyncCompile.triton

    def of_source(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
        KERNELS.append((kernel_name, source_code))
        if MODE != "compile":
            return make(self, kernel_name, source_code, device_str)
        return types.SimpleNamespace(
            run=lambda *arguments, **options: None, kernel_name=kernel_name
        )

    async_compile.AsyncCompile.triton = of_source
    if MODE == "package":
        # They include headers of torch's CUDA build.
        inductor_config.cpp_cache_precompile_headers = False
        # Of several configurations, the first: nothing has a time here.
        triton_heuristics.CachingAutotuner.bench = lambda self, *arguments, **options: 1.0
        return
    compile_graph, compile_inner = compile_fx.compile_fx, compile_fx.compile_fx_inner

    def on_the_device(graph: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        return compile_inner(*_moved(graph, inputs), **options)

    def compile_moved(model: Any, inputs: Any, inner_compile: Any = None, **options: Any) -> Any:
        return compile_graph(model, inputs, inner_compile=on_the_device, **options)

    compile_fx.compile_fx = compile_moved


def _launch_user_kernels() -> None:
    """Pass the interpreter the constants of kernels that inductor did not write.

    Inductor passes them to compiled kernels alone.
    """
    # Analysed for what they write, kernels do not compile beside the interpreter. They then count
    # as writing all of their arguments, which a graph copies: values are right all the same.
    logging.getLogger("torch._higher_order_ops.triton_kernel_wrap").setLevel(logging.ERROR)
    autotuner = triton_heuristics.CachingAutotuner
    grid_of = autotuner._interpret_args_grid

    def with_constants(self: Any, arguments: Any, config: Any) -> Any:
        constants = self.triton_meta.get("constants", {})
        for name in self.inductor_meta.get("declared_constexpr_names", ()):
            config.kwargs[name] = constants[name]
        return grid_of(self, arguments, config)

    autotuner._interpret_args_grid = with_constants


def _moved(graph: fx.GraphModule, inputs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """Move a graph and its inputs to fake tensors of the GPU.

    The graph is changed in place.
    """
    mode = detect_fake_mode(inputs) or TracingContext.get().fake_mode

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with mode:
            return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=DEVICE)

    def device_moved(x: Any) -> Any:
        if isinstance(x, torch.device):
            return DEVICE
        return x

    def change(module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            # Devices as arguments, then the fake tensors of the node's results.
            node.args = fx.node.map_aggregate(node.args, device_moved)
            if isinstance(node.kwargs.get("device"), torch.device):
                node.kwargs = {**node.kwargs, "device": DEVICE}
            for key in ("val", "example_value"):
                if key in node.meta:
                    node.meta[key] = fx.node.map_aggregate(node.meta[key], moved)
        module.recompile()
        for child in module.children():
            if isinstance(child, fx.GraphModule):
                change(child)

    change(graph)
    return graph, [moved(x) for x in inputs]


def _open_flex() -> None:
    """Make FlexAttention take CPU tensors for a backward and an lse.

    On a GPU it takes them.
    """
    import inspect

    flex_attention._validate_device = lambda q, k, v: None
    source = inspect.getsource(flex_attention._apply_kernel_options)
    changed = source.replace('device.type == "cpu"', 'device.type == "nowhere"')
    assert changed != source, "FlexAttention's checks have moved"
    exec(compile(changed, flex_attention.__file__, "exec"), vars(flex_attention))


if MODE == "package":
    # CUDA's libraries are as those of this version.
    torch.version.cuda = toolkit.CUDA
else:
    _register_guard()
_pretend_device()
triton.runtime.driver.set_active(_Driver())
if MODE != "compile":
    _mend_interpreter()
if MODE == "interpret":
    _launch_user_kernels()
_pretend_inductor()
_open_flex()
