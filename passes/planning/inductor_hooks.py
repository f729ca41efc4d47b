"""Where passes meet inductor: one CustomGraphPass for each stage, whose name in the compile cache tells all that it depends on.

DYNAMO   pre_grad_custom_pass
JOINT    joint_custom_post_pass
LOWERED  post_grad_custom_post_pass
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from .. import arguments, package
from ..protocol import Pass, Stage

_HOOKS = {
    Stage.DYNAMO: "pre_grad_custom_pass",
    Stage.JOINT: "joint_custom_post_pass",
    Stage.LOWERED: "post_grad_custom_post_pass",
}
Told = Callable[[Pass, Sequence[str]], None]


class StagePasses(CustomGraphPass):
    """The passes of one stage, in turn, the graph linted after each. One hook takes one of these: torch 2.11 takes no lists.

    told: called with each pass and its lines. With a warm compile cache nothing here runs, so results must not depend on it.
    """

    def __init__(self, passes: Sequence[Pass], told: Told | None = None) -> None:
        self.passes, self.told = tuple(passes), told

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            lines = each(graph)
            graph.lint()
            if self.told is not None:
                self.told(each, lines)

    def uuid(self) -> str | None:
        return identity(self.passes)


def inductor_configs(passes: Sequence[Pass], *, told: Told | None = None) -> dict[str, Any]:
    """Options of inductor that make it run `passes`, for compile_fx(config_patches=...), AOTInductor's inductor_configs=....

    Passes of one stage run in the order given. Raises TypeError of what is no pass.
    """
    check("passes", passes)
    if told is not None:
        arguments.function("told", told)
    stages = {stage: [each for each in passes if each.stage is stage] for stage in Stage}
    return options(passes) | {_HOOKS[stage]: StagePasses(found, told) for stage, found in stages.items() if found}


def options(passes: Sequence[Pass]) -> dict[str, Any]:
    """What passes want inductor to be set to: of each its mapping `options`, if it has one.

    Raises ValueError where two of them want different things.
    """
    wanted: dict[str, Any] = {}
    for each in passes:
        for name, value in getattr(each, "options", {}).items():
            if wanted.setdefault(name, value) != value:
                raise ValueError(f"{each!r} wants {name}={value!r}, another pass wants {wanted[name]!r}. Leave one of them out")
    return wanted


def identity(passes: Sequence[Pass]) -> str | None:
    """A hash of every option of some passes, of the source of their files, and of this package.

    None, which keeps inductor from caching what it compiles, where a pass has no file, as one typed in at a prompt.
    """
    files = set(package.files())
    for each in passes:
        module = sys.modules.get(type(each).__module__)
        if module is None or not getattr(module, "__file__", None):
            return None
        files.add(Path(str(module.__file__)))
    found = hashlib.sha256(repr(tuple(passes)).encode())
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()


def check(name: str, passes: Sequence[Pass]) -> None:
    """Raises TypeError where `passes` is no tuple or list, or a member not a pass whose repr tells all its options.

    name: that of the argument, for the message.
    """
    for place, each in enumerate(arguments.sequence(name, passes, "passes")):
        if isinstance(each, type) or not isinstance(each, Pass) or not isinstance(each.stage, Stage):
            raise TypeError(
                f"{name}[{place}] must be a pass, with stage (a passes.Stage), keeps_bits and __call__(graph); "
                f"got {arguments.shown(each)}. See passes.Pass"
            )
        if not (dataclasses.is_dataclass(each) and type(each).__dataclass_params__.frozen):
            raise TypeError(
                f"{name}[{place}] must be a frozen dataclass, for its repr is its name in the compile cache; "
                f"got {arguments.shown(each)}. Put @dataclass(frozen=True) before its class"
            )
