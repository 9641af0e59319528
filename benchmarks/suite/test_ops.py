"""Times one provider of one row in one round; the order of the items interleaves the providers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ceilings


def test_visit(visit, session, benchmark):
    prepared = session.prepare(visit.row)
    if prepared.refused or (visit.provider in prepared.verdicts and visit.provider not in prepared.calls):
        pytest.skip("refused by the correctness gate")
    if session.sits_out(visit):
        pytest.skip("decides nothing: another peer is far faster, or no part of the roof")
    times = session.times(visit.provider)
    if visit.provider.startswith("ceiling:"):
        # timed by its own threads from a common start: starting them is not part of moving memory
        timers, seconds = session.ceilings.timers(prepared.cost.flops), []
        timer = timers[visit.provider.removeprefix("ceiling:")]
        ceilings.settle()
        benchmark.pedantic(
            lambda data: seconds.append(timer(data)), setup=lambda: ((prepared.next_buffer(),), {}), **times
        )
        session.record(visit, seconds[1:])
        return
    with torch.set_grad_enabled(bool(prepared.wanted)):
        benchmark.pedantic(prepared.calls[visit.provider], setup=lambda: ((prepared.next_input(),), {}), **times)
    session.record(visit, list(benchmark.stats.stats.data))
