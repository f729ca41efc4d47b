"""Where in a model, and in its source, a node of a graph comes from."""

from __future__ import annotations

import os
import re

import torch
from torch import nn
from torch.fx import GraphModule, Node


def path_of(node: Node, model: nn.Module) -> str:
    """The path of the module that makes a call."""
    stack = node.meta.get("nn_module_stack") or {}
    return _path(next(reversed(stack.values()))[0], model) if stack else ""


def _path(written: str, model: nn.Module) -> str:
    """The path of a module as Dynamo writes it: L['self']._modules['layers']._modules['0'], or L['self'].layers[0]."""
    words = [word for word in re.findall(r"\w+", written) if word != "_modules"]
    names = [
        name
        for name, _ in model.named_modules()
        if words[-len(name.split(".")) :] == name.split(".")
    ]
    return max(names, key=len, default="")


def line_of(node: Node) -> str:
    """Where the user's code makes a call, for messages."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    # Innermost outside of torch, whose folder every installation has somewhere else.
    torch_folder = os.path.dirname(torch.__file__)
    places = [line for line in lines if line.startswith("File") and torch_folder not in line]
    if places:
        return f" ({places[-1]})"
    # Dynamo keeps no lines of torch's own modules.
    stack = node.meta.get("nn_module_stack") or {}
    words = re.findall(r"\w+", next(reversed(stack.values()))[0])[2:] if stack else []
    path = ".".join(word for word in words if word != "_modules")
    return f" (in {path})" if path else ""


def leave_out_own(graph: GraphModule, file: str, model: nn.Module) -> None:
    """Let nodes say that they come from a model alone, without what runs its forward.

    file: whose frames are left out of their stacks. Modules are named from the model on.
    """
    written: dict[str, str] = {}
    for node in graph.graph.nodes:
        frames = re.split(r'(?m)^(?= *File ")', node.meta.get("stack_trace") or "")
        kept = "".join(frame for frame in frames if f'File "{file}"' not in frame)
        if kept != "".join(frames):
            node.meta["stack_trace"] = kept
        stack = node.meta.get("nn_module_stack") or {}
        for key, (name, kind) in stack.items():
            if name not in written:
                written[name] = f"L['self'].{_path(name, model)}"
            stack[key] = (written[name], kind)
