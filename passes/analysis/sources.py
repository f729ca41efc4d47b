"""The source lines that graph nodes come from."""

from __future__ import annotations

import re

from torch.fx import Node

# Operands of operands that are searched for a node's source.
_MOST_VISITED = 32
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n +(.*)')


def source_of(node: Node) -> str:
    """The source of a node, as "file.py:12 in forward: return self.mlp(x)".

    The innermost line outside of torch. For what torch.nn computes the module instead, as
    "activation.py:1250 in MultiheadAttention of encoder.layers.0.self_attn". A node with neither,
    such as a sum of gradients, has the source of its operands.
    """
    waiting, visited = [node], set[Node]()
    while waiting and len(visited) < _MOST_VISITED:
        candidate = waiting.pop(0)
        visited.add(candidate)
        source = _line_of(candidate) or _module_of(candidate)
        if source:
            return source
        waiting += [operand for operand in candidate.all_input_nodes if operand not in visited]
    return ""


def _line_of(node: Node) -> str:
    """The user's source line that a node was traced from, or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    # Frames of torch itself and of generated code count only if there are no others.
    user_frames = [
        frame for frame in frames if "/torch/" not in frame[0] and not frame[0].startswith("<")
    ]
    file, line, function, code = (user_frames or frames)[-1]
    return f"{file.rpartition('/')[2]}:{line} in {function}: {code.strip()}"


def _module_of(node: Node) -> str:
    """The module that a node was traced in.

    Dynamo keeps no lines of torch's own modules.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    expression, kind = list(stack.values())[-1]
    # As L['self']._modules['layers']._modules['0'], or L['self'].layers[0].
    words = re.findall(r"\w+", expression)[2:]
    path = ".".join(word for word in words if word != "_modules")
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    if code is None:
        return ""
    suffix = f" of {path}" if path else ""
    return f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno} in {kind.__name__}{suffix}"
