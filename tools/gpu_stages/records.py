"""The file of results: one JSON line for each event.

A line is written at once, so that a stop loses nothing.

{"event": "machine", "gpu": ..., "torch": ..., "code": ...}            first line of a file
{"event": "start", "stage": ..., "case": ...}                          before a case runs
{"event": "outcome", "stage": ..., "case": ..., "ok": true, ...}       its numbers, its error, or
                                                                       why it was "skipped"
{"event": "end", "stage": ..., "seconds": ...}                         all cases of a stage ran
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Records:
    """Events of a file; processes append to it one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **fields: Any) -> None:
        """Write an event as a line, and flush it to the disk."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[Event]:
        """All events so far, without a line cut off by a stop."""
        if not self.path.exists():
            return []
        events = []
        for line in self.path.read_text().splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return events

    def machine(self) -> Event | None:
        """The machine and the code that the results are of."""
        return next((x for x in self.events() if x["event"] == "machine"), None)

    def outcomes(self, stage: str) -> dict[str, Event]:
        """The last outcome of each case of a stage, by name."""
        return {event["case"]: event for event in self._of_stage(stage, "outcome")}

    def ended(self, stage: str) -> bool:
        """Whether all cases of a stage have run."""
        return bool(self._of_stage(stage, "end"))

    def under_way(self, stage: str) -> str | None:
        """The case of a stage that has started without an outcome."""
        started = [event["case"] for event in self._of_stage(stage, "start")]
        if not started or started[-1] in self.outcomes(stage):
            return None
        return str(started[-1])

    def _of_stage(self, stage: str, kind: str) -> list[Event]:
        """A stage's events of one kind, in order."""
        out = []
        for event in self.events():
            if event["event"] == kind and event["stage"] == stage:
                out.append(event)
        return out
