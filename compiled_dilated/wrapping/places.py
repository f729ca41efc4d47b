"""Origin of a graph's node: the model's module and the source line."""

from __future__ import annotations

import os
import re

import torch
from torch import nn
from torch.fx import GraphModule, Node


def path_of(node: Node, model: nn.Module) -> str:
    """The path of the module that makes a call."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    return _path(next(reversed(stack.values()))[0], model)


def _path(name: str, model: nn.Module) -> str:
    """The path of a module by Dynamo's name for it.

    name: L['self']._modules['layers']._modules['0'], or L['self'].layers[0].
    """
    words = [word for word in re.findall(r"\w+", name) if word != "_modules"]
    # The longest path whose words end the name.
    longest = ""
    for path, _ in model.named_modules():
        path_words = path.split(".")
        if words[-len(path_words) :] == path_words and len(path) > len(longest):
            longest = path
    return longest


def line_of(node: Node) -> str:
    """The source line of a call, in parentheses, for messages."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    # The innermost frame outside of torch, wherever that is installed.
    torch_folder = os.path.dirname(torch.__file__)
    frames = [line for line in lines if line.startswith("File") and torch_folder not in line]
    if frames:
        return f" ({frames[-1]})"
    # Dynamo records no lines of torch's own modules.
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    words = re.findall(r"\w+", next(reversed(stack.values()))[0])[2:]
    path = ".".join(word for word in words if word != "_modules")
    if not path:
        return ""
    return f" (in {path})"


def leave_out_own(graph: GraphModule, file: str, model: nn.Module) -> None:
    """Remove this library's frames and module names from the origins of nodes.

    file: its frames are removed from stack traces. Modules are named from the model on.
    """
    names: dict[str, str] = {}
    for node in graph.graph.nodes:
        # The stack trace without this library's frames.
        frames = re.split(r'(?m)^(?= *File ")', node.meta.get("stack_trace") or "")
        users = [frame for frame in frames if f'File "{file}"' not in frame]
        if len(users) < len(frames):
            node.meta["stack_trace"] = "".join(users)
        # The modules, named from the model on.
        stack = node.meta.get("nn_module_stack") or {}
        for key, (name, kind) in stack.items():
            if name not in names:
                names[name] = f"L['self'].{_path(name, model)}"
            stack[key] = (names[name], kind)
