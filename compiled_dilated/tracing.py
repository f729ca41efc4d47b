"""Whether torch.compile or torch.export traces a call in this thread."""

from __future__ import annotations

import torch
from torch._guards import CompileContext, TracingContext


def in_this_thread() -> bool:
    """Whether a compilation is this thread's own.

    Asked as `torch.compiler.is_compiling() and in_this_thread()`: the first is also True while
    another thread compiles. It is not part of this function, which Dynamo may compile by itself
    behind a graph break.
    """
    # A constant for Dynamo.
    if torch.compiler.is_dynamo_compiling():
        return True
    return (
        CompileContext.try_get() is not None
        or TracingContext.try_get() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
