"""Whether torch.compile or torch.export traces a call."""

from __future__ import annotations

import torch
from torch._guards import CompileContext, TracingContext


def is_compiling() -> bool:
    """Whether this thread traces or compiles.

    torch.compiler.is_compiling is also True while another thread does.
    """
    # A constant for Dynamo, which traces this function.
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and _is_tracing()


def _is_tracing() -> bool:
    """Whether this thread has a compiler's context or an operators' mode."""
    return (
        CompileContext.try_get() is not None
        or TracingContext.try_get() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
