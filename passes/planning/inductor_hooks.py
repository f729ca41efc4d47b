"""Passes as inductor's custom graph passes, one for each stage.

DYNAMO   pre_grad_custom_pass
JOINT    joint_custom_post_pass
LOWERED  post_grad_custom_post_pass
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from .. import arguments, package
from ..protocol import Pass, Stage
from .operator_workspaces import register_all

_HOOKS = {
    Stage.DYNAMO: "pre_grad_custom_pass",
    Stage.JOINT: "joint_custom_post_pass",
    Stage.LOWERED: "post_grad_custom_post_pass",
}
OnRun = Callable[[Pass, Sequence[str]], None]


class StagePasses(CustomGraphPass):
    """The passes of one stage as one custom pass.

    Torch 2.11 takes no lists of passes. The graph is linted after each pass.

    on_run: called with each pass and its lines; not called if the compile cache is warm
    """

    def __init__(self, passes: Sequence[Pass], on_run: OnRun | None = None) -> None:
        self.passes, self.on_run = tuple(passes), on_run

    def __call__(self, graph: Graph) -> None:
        for member in self.passes:
            lines = member(graph)
            graph.lint()
            if self.on_run is not None:
                self.on_run(member, lines)

    def uuid(self) -> str | None:
        return identity(self.passes)


def inductor_configs(passes: Sequence[Pass], *, on_run: OnRun | None = None) -> dict[str, Any]:
    """Inductor's options to run passes, those of one stage in order.

    For compile_fx(config_patches=...) and AOTInductor's inductor_configs=... All passes run by
    these options, so the workspaces of their operators are registered here.

    on_run: called with each pass and the lines that it returned

    Raises TypeError for what is no pass.
    """
    check("passes", passes)
    if on_run is not None:
        arguments.function("on_run", on_run)
    register_all()
    # One hook for each stage that has passes: inductor compiles without a hook otherwise.
    configs = options(passes)
    for stage in Stage:
        members = [member for member in passes if member.stage is stage]
        if members:
            configs[_HOOKS[stage]] = StagePasses(members, on_run)
    return configs


def options(passes: Sequence[Pass]) -> dict[str, Any]:
    """The options of torch._inductor.config that passes set.

    Raises ValueError if two of them set one differently.
    """
    merged: dict[str, Any] = {}
    for member in passes:
        for name, value in getattr(member, "options", {}).items():
            if merged.setdefault(name, value) != value:
                raise ValueError(
                    f"{member!r} sets {name}={value!r}, another pass {merged[name]!r}. "
                    "Leave one of them out"
                )
    return merged


def identity(passes: Sequence[Pass]) -> str | None:
    """A hash of passes, their options and source, and this package's source.

    None if a pass has no file, as one typed in at a prompt; inductor then caches nothing.
    """
    # A change anywhere in this package may change what its passes do; a user's pass counts by the
    # file of its class.
    files = set(package.files())
    for member in passes:
        module = sys.modules.get(type(member).__module__)
        if module is None or not getattr(module, "__file__", None):
            return None
        files.add(Path(str(module.__file__)))
    digest = hashlib.sha256(repr(tuple(passes)).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def check(name: str, passes: Sequence[Pass]) -> None:
    """Raise TypeError unless `passes` are passes, as frozen dataclasses.

    name: of the argument, for the message
    """
    for place, member in enumerate(arguments.sequence(name, passes, "passes")):
        is_pass = not isinstance(member, type) and isinstance(member, Pass)
        if not is_pass or not isinstance(member.stage, Stage):
            raise TypeError(
                f"{name}[{place}] must be a pass, with stage (a passes.Stage), keeps_bits and "
                f"__call__(graph); got {arguments.shown(member)}. See passes.Pass"
            )
        parameters = getattr(type(member), "__dataclass_params__", None)
        if parameters is None or not parameters.frozen:
            raise TypeError(
                f"{name}[{place}] must be a frozen dataclass, for its repr is its name in the "
                f"compile cache; got {arguments.shown(member)}. "
                "Put @dataclass(frozen=True) before its class"
            )
