"""The cases of a stage, run one by one.

Each outcome is recorded at once.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .records import Records

Size = TypeVar("Size")

# Errors after which a process can use its GPU no more.
_FATAL = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")


class DeviceLost(RuntimeError):
    """The process has lost its GPU by a case.

    The other cases need a new process.
    """


@dataclass(frozen=True)
class Stage:
    """A stage under way.

    device: where tensors are, "cuda"; under the emulation "cpu".
    tiny: whether sizes are those of the emulation, whose interpreter is slow.
    """

    name: str
    records: Records
    device: str
    tiny: bool

    def size(self, full: Size, tiny: Size) -> Size:
        """A size of the GPU, or of the emulation."""
        return tiny if self.tiny else full

    def case(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run a case without an outcome; record its result or its error.

        Raises DeviceLost after an error that spoils all later cases of the process.
        """
        if name in self.records.outcomes(self.name):
            return
        self.records.append("start", stage=self.name, case=name)
        started = time.monotonic()
        result: dict[str, Any]
        # Any error is the case's outcome; the cases behind it run all the same.
        try:
            result = {"ok": True, **run()}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            result = {
                "ok": False,
                "error": f"{type(error).__name__}: {lines[0][:300]}",
                "traceback": traceback.format_exc(limit=-8),
            }
        seconds = round(time.monotonic() - started, 2)
        self.records.append("outcome", stage=self.name, case=name, seconds=seconds, **result)
        failure, verdict = "", "ok"
        if "skipped" in result:
            verdict = f"skipped: {result['skipped']}"
        if not result["ok"]:
            failure = str(result["error"])
            verdict = f"FAILED: {failure}"
        print(f"gpu_check: {self.name}: {name}: {verdict} ({seconds:.1f} s)", flush=True)
        if any(words in failure for words in _FATAL):
            raise DeviceLost(name)


def check(condition: bool, message: str) -> None:
    """Raise AssertionError with a message that is recorded."""
    if not condition:
        raise AssertionError(message)
