"""A user's own passes, run and reported.

Caches name them by options and source.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import passes
from passes import Spill
from passes.planning.inductor_hooks import identity
from tests.caches import empty_inductor_caches
from tests.support.user_passes import Doubled, Twice, WithOptions

SPILL = Spill(least_bytes=2**12)


def test_a_warm_cache_keeps_the_report_of_a_users_pass() -> None:
    x = torch.randn(64, 64)
    with empty_inductor_caches():
        texts: list[str] = []
        runs: list[int] = []
        for _ in range(2):
            torch._dynamo.reset()
            Doubled.runs.clear()
            with torch.no_grad():
                step = passes.compile(Twice(), passes=[], extra=[Doubled()], dynamic=False)
                torch.testing.assert_close(step(x), x.cos() * 2)
            texts.append(str(passes.report(step)))
            runs.append(len(Doubled.runs))
    # Once for the plan, and once in inductor unless its cache is warm.
    assert runs == [2, 1]
    assert texts[0] == texts[1]
    assert "Doubled()\n  mul is a sum" in texts[0]


def test_the_identity_depends_on_passes_options_and_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    combinations = ((), (Spill(),), (SPILL,), (Doubled(),), (SPILL, Doubled()))
    assert len({identity(members) for members in combinations}) == 5
    assert identity((SPILL,)) == identity((Spill(least_bytes=2**12),))
    # A user's pass counts by the file of its class.
    before, copy = identity((Doubled(),)), tmp_path / "copy.py"
    copy.write_text("# another source")
    monkeypatch.setattr(sys.modules[Doubled.__module__], "__file__", str(copy))
    assert identity((Doubled(),)) != before


def test_options_of_a_pass_are_set() -> None:
    configs = passes.inductor_configs([WithOptions({"allow_buffer_reuse": False}), Doubled()])
    assert configs["allow_buffer_reuse"] is False
    assert set(configs) == {"allow_buffer_reuse", "post_grad_custom_post_pass"}


@pytest.mark.slow
def test_a_package_of_aotinductor_runs_the_passes(tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    Doubled.runs.clear()
    dynamic = ({0: torch.export.Dim("n", min=2)},)
    program = torch.export.export(Twice(), (x,), dynamic_shapes=dynamic)
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "m.pt2"),
        inductor_configs=passes.inductor_configs([Doubled()]),
    )
    assert len(Doubled.runs) == 1
    run = torch._inductor.aoti_load_package(path)
    for tokens in (64, 7):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(run(x), x.cos() * 2)
