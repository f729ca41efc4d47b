"""Whether torch.compile or torch.export traces a call in this thread."""

from __future__ import annotations

from torch._C import _len_torch_dispatch_stack
from torch._guards import CompileContext, TracingContext
from torch.compiler import is_compiling, is_dynamo_compiling


def is_traced() -> bool:
    """Whether this thread traces the call.

    torch.compiler.is_compiling() is also True while another thread compiles. Behind a graph break
    Dynamo would compile a function that names the module `torch` by itself, with True as result:
    this one names functions only.
    """
    if not is_compiling():
        return False
    # A constant for Dynamo.
    if is_dynamo_compiling():
        return True
    return (
        CompileContext.try_get() is not None
        or TracingContext.try_get() is not None
        or _len_torch_dispatch_stack() > 0
    )
