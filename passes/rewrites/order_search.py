"""A beam search for the order of steps with the lowest peak.

    done = {}  ->  {a}  ->  {a, b}  ->  ...     a state is a set of done steps; of two orders that
           ->  {b}  ->  {a, b}                  reach it, the one with the lower peak so far stays,
                                                for what follows is the same for both

Of the sets of one size the `width` best stay; if that is all of them, the order is optimal. After
Ahn et al., Ordering Chaos: Memory-Aware Scheduling of Irregularly Wired Neural Networks for Edge
Devices (2003.02369).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Steps:
    """Steps numbered in a legal order, and the storages they use.

    sizes: bytes of each storage
    allocated: the storages that each step allocates; a storage that no step allocates is an input,
        and matters only if it is freed
    used: the storages that each step uses, those that it allocates among them
    before: for each step, earlier steps that must precede it
    permanent: storages that are not freed
    workspace: bytes of each step itself, or () for none
    """

    sizes: tuple[int, ...]
    allocated: tuple[tuple[int, ...], ...]
    used: tuple[tuple[int, ...], ...]
    before: tuple[tuple[int, ...], ...]
    permanent: frozenset[int] = frozenset()
    workspace: tuple[int, ...] = ()

    @cached_property
    def _users(self) -> list[int]:
        """The users of each storage, a bit for each step."""
        users = [0] * len(self.sizes)
        for step, storages in enumerate(self.used):
            for storage in storages:
                users[storage] |= 1 << step
        return users

    @cached_property
    def _needs(self) -> list[int]:
        """The predecessors of each step, a bit for each."""
        needs = [0] * len(self.before)
        for step, before in enumerate(self.before):
            for earlier in before:
                needs[step] |= 1 << earlier
        return needs

    @cached_property
    def _followers(self) -> list[list[int]]:
        """For each step those that it must precede."""
        followers: list[list[int]] = [[] for _ in self.before]
        for step, before in enumerate(self.before):
            for earlier in before:
                followers[earlier].append(step)
        return followers

    def rise(self, step: int) -> int:
        """Bytes live during a step beyond those before it."""
        rise = sum(self.sizes[storage] for storage in self.allocated[step])
        if self.workspace:
            rise += self.workspace[step]
        return rise

    def change(self, step: int, done: int) -> int:
        """Bytes live after a step beyond those before it.

        done: the set of done steps, this one included
        """
        change = sum(self.sizes[storage] for storage in self.allocated[step])
        for storage in self.used[step]:
            has_users = self._users[storage] & ~done
            if storage not in self.permanent and not has_users:
                change -= self.sizes[storage]
        return change

    def after(self, step: int, done: int) -> list[int]:
        """The steps that become possible after this one.

        done: as for `change`
        """
        return [later for later in self._followers[step] if not self._needs[later] & ~done]

    def peak(self, order: Sequence[int]) -> int:
        """The peak of an order in bytes, beyond the inputs."""
        done = live = peak = 0
        for step in order:
            peak = max(peak, live + self.rise(step))
            done |= 1 << step
            live += self.change(step, done)
        return peak


@dataclass(frozen=True)
class _State:
    """A set of done steps, and their best order so far.

    done: a bit for each step
    ready: the steps that are possible next
    last, previous: the step done last, and the state before it
    """

    done: int
    peak: int
    live: int
    ready: frozenset[int]
    last: int = -1
    previous: _State | None = None

    def next(self, steps: Steps, step: int) -> _State:
        done = self.done | 1 << step
        return _State(
            done=done,
            peak=max(self.peak, self.live + steps.rise(step)),
            live=self.live + steps.change(step, done),
            ready=self.ready - {step} | set(steps.after(step, done)),
            last=step,
            previous=self,
        )

    def settled(self, steps: Steps) -> _State:
        """The state after all steps that raise neither peak nor live bytes.

        Taking such a step at once is never worse than taking it later.
        """
        state, waiting = self, sorted(self.ready)
        while waiting:
            step = waiting.pop()
            if step not in state.ready or state.live + steps.rise(step) > state.peak:
                continue
            following = state.next(steps, step)
            if following.live <= state.live:
                state, waiting = following, sorted(following.ready)
        return state

    def order(self) -> list[int]:
        order: list[int] = []
        state = self
        while state.previous is not None:
            order.append(state.last)
            state = state.previous
        return order[::-1]


def search(steps: Steps, *, width: int = 128) -> list[int]:
    """An order of low peak, never above the numbered order's.

    Optimal for up to 9 steps if width is 126 or more.

    width: states of each size that stay
    """
    if width < 1:
        raise ValueError(f"width must be at least 1; got {width}")
    count = len(steps.before)
    numbered = list(range(count))
    bound = steps.peak(numbered)
    ready = frozenset(step for step in numbered if not steps.before[step])
    start = _State(done=0, peak=0, live=0, ready=ready).settled(steps)
    # levels[size]: the states with so many done steps, by their sets
    levels: defaultdict[int, dict[int, _State]] = defaultdict(dict)
    levels[start.done.bit_count()][start.done] = start
    for size in numbered:
        states = levels.pop(size, {}).values()
        best = sorted(states, key=lambda state: (state.peak, state.live, state.done))[:width]
        for state in best:
            for step in sorted(state.ready):
                # Only orders below the steps as numbered are of interest.
                if state.live + steps.rise(step) >= bound:
                    continue
                following = state.next(steps, step).settled(steps)
                # Of two orders of the same steps, the one with the lower peak stays.
                level = levels[following.done.bit_count()]
                rival = level.get(following.done)
                if rival is None or following.peak < rival.peak:
                    level[following.done] = following
    finished = levels[count].get((1 << count) - 1)
    if finished is None or finished.peak >= bound:
        return numbered
    return finished.order()
