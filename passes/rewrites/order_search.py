"""In which order steps hold least at their peak: a search over the sets of steps that may have been done.

    done = {}  ->  {a}  ->  {a, b}  ->  ...     a state is a set of done steps; of two orders that lead to it, the one
           ->  {b}  ->  {a, b}                  of the lower peak so far is kept, for what follows is the same for both

Of the sets of one size the `width` best are kept; where that is all of them, the order found is optimal. After Ahn et al.,
Ordering Chaos: Memory-Aware Scheduling of Irregularly Wired Neural Networks for Edge Devices (2003.02369).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Steps:
    """Steps numbered in an order that is legal, and the storages that they make and use, by number.

    sizes: bytes of each storage. made, used: storages per step; a step uses what it makes. before: per step, earlier steps that
    must precede it. kept: storages that are not freed. workspace: bytes that a step alone holds, or () where none does. Storages
    that no step makes are there from the start; they matter where they are freed.
    """

    sizes: tuple[int, ...]
    made: tuple[tuple[int, ...], ...]
    used: tuple[tuple[int, ...], ...]
    before: tuple[tuple[int, ...], ...]
    kept: frozenset[int] = frozenset()
    workspace: tuple[int, ...] = ()

    @cached_property
    def _users(self) -> list[int]:
        """Per storage, the set of its users, a bit for each."""
        users = [0] * len(self.sizes)
        for step, storages in enumerate(self.used):
            for storage in storages:
                users[storage] |= 1 << step
        return users

    @cached_property
    def _needs(self) -> list[int]:
        return [sum(1 << each for each in before) for before in self.before]

    @cached_property
    def _followers(self) -> list[list[int]]:
        followers: list[list[int]] = [[] for _ in self.before]
        for step, before in enumerate(self.before):
            for each in before:
                followers[each].append(step)
        return followers

    def rise(self, step: int) -> int:
        """The bytes that are held during a step beyond those before it."""
        return sum(self.sizes[each] for each in self.made[step]) + (self.workspace[step] if self.workspace else 0)

    def change(self, step: int, done: int) -> int:
        """The bytes that are held after a step beyond those before it. done: the set of done steps, this one included."""
        freed = (each for each in self.used[step] if each not in self.kept and not self._users[each] & ~done)
        return sum(self.sizes[each] for each in self.made[step]) - sum(self.sizes[each] for each in freed)

    def after(self, step: int, done: int) -> list[int]:
        """The steps that become possible with it."""
        return [each for each in self._followers[step] if not self._needs[each] & ~done]

    def peak(self, order: Sequence[int]) -> int:
        """The most bytes that an order holds at once beyond those there from the start."""
        done = held = peak = 0
        for step in order:
            peak = max(peak, held + self.rise(step))
            done |= 1 << step
            held += self.change(step, done)
        return peak


@dataclass(frozen=True)
class _State:
    """A set of done steps, the best known way to it, and what is possible next. last: the step done last."""

    done: int
    peak: int
    held: int
    ready: frozenset[int]
    last: int = -1
    way: _State | None = None

    def next(self, steps: Steps, step: int) -> _State:
        done = self.done | 1 << step
        return _State(
            done,
            max(self.peak, self.held + steps.rise(step)),
            self.held + steps.change(step, done),
            self.ready - {step} | set(steps.after(step, done)),
            step,
            self,
        )

    def settled(self, steps: Steps) -> _State:
        """After all steps that cost nothing now, and so nothing ever: no new peak, and no more held than before."""
        state, waiting = self, sorted(self.ready)
        while waiting:
            step = waiting.pop()
            if step in state.ready and state.held + steps.rise(step) <= state.peak:
                following = state.next(steps, step)
                if following.held <= state.held:
                    state, waiting = following, sorted(following.ready)
        return state

    def order(self) -> list[int]:
        found, state = [], self
        while state.way is not None:
            found.append(state.last)
            state = state.way
        return found[::-1]


def search(steps: Steps, *, width: int = 128) -> list[int]:
    """An order of low peak, never above that of the steps as numbered; optimal for up to 9 steps, where width is 126 or more."""
    if width < 1:
        raise ValueError(f"width must be at least 1; got {width}")
    count = len(steps.before)
    given = list(range(count))
    bound = steps.peak(given)
    start = _State(0, 0, 0, frozenset(step for step in given if not steps.before[step])).settled(steps)
    levels: defaultdict[int, dict[int, _State]] = defaultdict(dict)
    levels[start.done.bit_count()][start.done] = start
    for size in given:
        for state in sorted(levels.pop(size, {}).values(), key=lambda state: (state.peak, state.held, state.done))[:width]:
            for step in sorted(state.ready):
                if state.held + steps.rise(step) < bound:
                    following = state.next(steps, step).settled(steps)
                    level = levels[following.done.bit_count()]
                    if following.done not in level or following.peak < level[following.done].peak:
                        level[following.done] = following
    finished = levels[count].get((1 << count) - 1)
    return finished.order() if finished is not None and finished.peak < bound else given
