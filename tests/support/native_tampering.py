"""Calls of the native operator with tampered code, for processes of their own."""

from __future__ import annotations

import torch

from compiled_dilated.lowerings.native import Work
from tests.cases import by_name
from tests.support.native import Problem, problem_of

# In a process of its own: no number in a code may end it.
TAMPERING = """
import random, sys, time
import torch
from tests.support.native_tampering import tamper
tamper(int(sys.argv[1]), int(sys.argv[2]))
print("alive")
"""
EXTREMES = (
    0,
    1,
    -1,
    2,
    3,
    16,
    255,
    2**15,
    2**30,
    2**30 + 1,
    -(2**30),
    2**31,
    -(2**31),
    2**32,
    2**60,
    2**62,
    2**63 - 1,
    -(2**63),
)


def tamper(seed: int, count: int) -> None:
    """Calls with codes that nobody wrote; each ends with an error or a result."""
    import random

    rng = random.Random(seed)
    names = (
        "window", "longnet causal", "neighborhood dilated, shifted", "padding and documents", "tiles", "hilbert window within",
        "global positions", "from_mod within", "congruent in segments", "block window", "documents by lengths, window",
    )  # fmt: skip
    problems = [problem_of(by_name(name), 40, torch.float32)[0] for name in names]
    outcomes = {"errors": 0, "results": 0}
    for _ in range(count):
        problem = rng.choice(problems)
        code = list(problem.work.code)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = rng.randrange(len(code)) if code else 0
            kind = rng.random()
            if not code or kind < 0.1:
                code.insert(at, rng.choice(EXTREMES))
            elif kind < 0.2:
                del code[at]
            elif kind < 0.25:
                code = code[:at]
            elif kind < 0.6:
                code[at] += rng.choice((-1, 1, 2, -2))
            elif kind < 0.9:
                code[at] = rng.choice(EXTREMES)
            else:
                code[at] = rng.choice(code)
        code = [min(2**63 - 1, max(-(2**63), number)) for number in code]
        changed = Problem(
            Work(tuple(code), problem.work.names, ()),
            problem.q,
            problem.k,
            problem.v,
            problem.grad_out,
            None,
            problem.data,
        )
        try:
            changed.results()
            outcomes["results"] += 1
        except RuntimeError:
            outcomes["errors"] += 1
    print(outcomes)
    assert min(outcomes.values()) > count // 50, outcomes
