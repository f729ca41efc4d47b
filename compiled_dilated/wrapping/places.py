"""Where in a model, and in its source, a node of a graph comes from."""

from __future__ import annotations

import os
import re

import torch
from torch import nn
from torch.fx import Node


def path_of(node: Node, model: nn.Module) -> str:
    """The path of the module that makes a call."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    # As L['self']._modules['layers']._modules['0'], or L['self'].layers[0].
    written: str = next(reversed(stack.values()))[0]
    words = [word for word in re.findall(r"\w+", written) if word != "_modules"]
    names = [name for name, _ in model.named_modules() if words[-len(name.split(".")) :] == name.split(".")]
    return max(names, key=len, default="")


def line_of(node: Node) -> str:
    """Where the user's code makes a call, for messages."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    # Innermost outside of torch, whose folder every installation has somewhere else.
    torch_folder = os.path.dirname(torch.__file__)
    places = [line for line in lines if line.startswith("File") and torch_folder not in line]
    return f" ({places[-1]})" if places else ""
