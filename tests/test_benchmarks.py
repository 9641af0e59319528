"""The benchmarks refuse wrong numbers and impossible speeds, and their reports show what was measured."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

import fss_kernels
from benchmarks import __main__ as command
from benchmarks import (
    ceilings,
    compare,
    environment,
    gate,
    measure,
    models,
    overhead,
    pages,
    peers,
    reliability,
    report,
    storage,
    sweeps,
    targets,
)
from fss_kernels import _op, testing
from fss_kernels.ops.dense_cosine.peers import maxsim_map

sys.path.insert(0, str(Path(__file__).parent / "mutants"))
import run as mutants

OPS = tuple(testing.specs())
COMPILED = ("*compile*", "max-autotune*", "flex-attention")
PLAN = measure.Plan(OPS, tiny=True, exclude=COMPILED)
ROWS = measure.rows(PLAN)[:2] + measure.rows(PLAN)[-2:]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """A few rotating buffers are enough where no time counts."""
    monkeypatch.setattr(measure, "cache_bytes", lambda: 1)


def eager_peers(row: measure.Row) -> list[peers.Peer]:
    usable, _ = peers.resolve(row.op)
    return [p for p in usable if not measure.selected([p.name], COMPILED)]


def fake_samples(prepared: measure.Prepared, ours: float = 1.0, peer: float = 2.0) -> dict:
    """Two rounds in which the ceilings move the row's bytes in half a second; products take next to nothing."""
    moving = {f"ceiling:{kind}": 0.5 for kind in ceilings.MEMORY}
    seconds = {measure.OURS: ours, **moving, "ceiling:fma": 1e-6, "ceiling:screen": 1e-6}
    return {name: {n: [seconds.get(name, peer)] * 3 for n in range(2)} for name in [*prepared.verdicts, *seconds]}


@pytest.fixture(scope="module")
def results():
    """A small result file of every row: all peers twice as slow as ours, ours at half of the roof."""
    entries = []
    for row in ROWS:
        prepared = measure.Prepared(row, eager_peers(row))
        rows, wrong, impossible = measure.summarise(prepared, fake_samples(prepared))
        assert not wrong and not impossible
        entries += rows
    ceilings = {"read_gbps": 50.0, "copy_gbps": 60.0, "write_gbps": 40.0, "fma_gflops": 200.0}
    return {
        **environment.environment(),
        "plan": dataclasses.asdict(PLAN),
        "peers": [record for op in OPS for record in peers.resolve(op)[1]],
        "ceilings": {"before": ceilings, "after": ceilings, "read_pattern": 0},
        "rows": entries,
        "failures": [],
        "notes": [],
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_peers_compute_the_op(row):
    names = {p.name for p in eager_peers(row)}
    prepared = measure.Prepared(row, eager_peers(row))
    assert names and {n: v.message for n, v in prepared.verdicts.items() if v.message} == {}
    assert set(prepared.calls) - {measure.OURS} == {
        p.name for p in eager_peers(row) if p.takes(row.arguments, row.mode)
    }


@pytest.mark.parametrize("op", OPS)
def test_autotuned_peers_compute_the_op(op, monkeypatch):
    """Traced, not tuned: the backend that only traces takes no options."""
    monkeypatch.setattr(peers, "COMPILE", {**peers.COMPILE, "backend": "aot_eager", "mode": None})
    chosen = [p for p in peers.of(op) if p.form == "max-autotune"]
    assert chosen
    last = {r.mode: r for p in chosen for r in measure.rows(measure.Plan((op,), tiny=True)) if p.applies(r.arguments)}
    for row in last.values():
        prepared = measure.Prepared(row, chosen)
        assert {n: v.message for n, v in prepared.verdicts.items() if v.message} == {}
        assert set(prepared.calls) - {measure.OURS} == {p.name for p in chosen if p.applies(row.arguments)}


def test_a_product_is_autotuned(monkeypatch, capfd):
    """Several codes are timed, and the table of them does not reach the terminal."""
    from torch._inductor import config, select_algorithm

    tried = []
    monkeypatch.setattr(select_algorithm, "_log_autotune_choices_stats", lambda name, timings: tried.append(timings))
    a, b = torch.randn(2, 8, 64), torch.randn(2, 64, 32)
    with config.patch(fx_graph_cache=False, autotune_local_cache=False), torch.no_grad():
        product = peers.autotuned(torch.bmm)(a, b)
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert len(tried[0]) > 1 and "AUTOTUNE" not in capfd.readouterr().err


@pytest.mark.parametrize("mode", measure.MODES)
def test_peers_of_a_gpu_compute_the_op(mode, monkeypatch):
    """With plain code in place of the kernels: sums over a query, and attention that returns its largest scores."""
    from torch.nn.attention import flex_attention as flex

    def sums(tokens, others):
        return torch.einsum("qic,njc->qnij", tokens, others).amax(3).sum(2)

    def attention(q, s, values, scale, return_aux):
        assert return_aux.max_scores and values.shape == (*s.shape[:3], 16)
        return q, SimpleNamespace(max_scores=scale * (q @ s.mT).amax(-1))

    monkeypatch.setattr(peers, "compiled", lambda function: function)
    peer = next(p for p in peers.of("dense_cosine_max") if p.name == "flex-attention")
    assert peer.part is flex.flex_attention
    functions = {"sums": maxsim_map(sums)}
    if mode == "forward":
        functions["attention"] = peers.build(dataclasses.replace(peer, part=attention))
    spec = testing.specs()["dense_cosine_max"]
    rows = measure.rows(measure.Plan((spec.name,), tiny=True))
    for row in (r for r in rows if r.mode == mode and not r.arguments.get("dpcn")):
        sample = spec.benchmark_sample(**row.arguments)
        first = spec.cast(sample, torch.float32)
        verdicts = measure.gate(spec, torch.float32, sample, first, spec.gradients_of(mode, first), functions)
        assert {n: v.message for n, v in verdicts.items()} == dict.fromkeys(functions, ""), row.id


def test_peers_of_a_gpu_are_named(monkeypatch):
    """Neither installed nor a GPU: one line each. A peer without gradient has no place in rows with one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    modules = {"flash-maxsim": "flash_maxsim", "late-interaction-kernels": "late_interaction_kernels"}
    for module in modules.values():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(__version__="1.2"))
    usable, records = peers.resolve("dense_cosine_max")
    errors = {r["name"]: r["error"] for r in records if r["optional"]}
    assert not {p.name for p in usable} & {"flex-attention", *modules}
    assert all("GPU only" in errors[n] and "\n" not in errors[n] for n in ("flex-attention", *modules))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, module, None)
        errors = {r["name"]: r["error"] for r in peers.resolve("dense_cosine_max")[1]}
        assert module in errors[name] and "gpu-peers" in errors[name]
    flex = next(p for p in peers.of("dense_cosine_max") if p.name == "flex-attention")
    assert [flex.takes({}, mode) for mode in measure.MODES] == [True, False]
    assert not flex.takes({"dpcn": True}, "forward")
    plan = dataclasses.replace(PLAN, ops=("dense_cosine_max",), rounds=1)
    modes = {v.row.mode for v in measure.schedule(plan, {"dense_cosine_max": [flex]}) if v.provider == flex.name}
    assert modes == {"forward"}


def folders() -> dict[str, set[str]]:
    """The folders of ops that have a peers.py, each with its ops."""
    found: dict[str, set[str]] = {}
    for name, spec in testing.specs().items():
        found.setdefault(spec.op.folder, set()).add(name)
    return {f: ops for f, ops in found.items() if (environment.ROOT / "fss_kernels/ops" / f / "peers.py").exists()}


def test_every_size_has_peers():
    """Of every op whose folder lists peers, under names of their own; none is listed for another op."""
    assert len(folders()) >= 5
    for folder, ops in folders().items():
        assert set(importlib.import_module(f"fss_kernels.ops.{folder}.peers").PEERS) == ops
        for op in ops:
            for size in testing.specs()[op].sizes.values():
                assert any(p.applies(size) for p in peers.of(op)), (op, size)
            assert len({p.name for p in peers.of(op)}) == len(peers.of(op))


def test_peers_are_frozen():
    """They import the class that they are made of, and nothing else of ours."""
    for folder in folders():
        tree = ast.parse((environment.ROOT / "fss_kernels/ops" / folder / "peers.py").read_text())
        found = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                found += [f"{'.' * node.level}{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                found += [name.name for name in node.names]
        assert [n for n in found if n.startswith((".", "fss", "benchmarks"))] == ["fss_kernels.testing.Peer"], folder


def test_only_benchmarks_import_peers():
    code = "import sys, fss_kernels.__main__\nfrom fss_kernels import testing\ntesting.specs()\n"
    code += "print([m for m in sys.modules if m.endswith('.peers') or m.partition('.')[0] == 'benchmarks'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_peer_has_a_known_form():
    """In each of them it is called as the op; a part of it that is compiled comes first."""
    plain = peers.Peer("double", lambda x: 2 * x, "halves")
    forms = (plain, plain.compiled(), plain.autotuned(cannot="thirds", released=True))
    assert [(p.name, p.released) for p in forms] == [
        ("double", False), ("compile(double)", False), ("max-autotune(double)", True),
    ]  # fmt: skip
    assert forms[1].cannot == "halves; needs seconds of compilation per shape"
    assert forms[2].cannot == "thirds; needs up to a minute of compilation per shape"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "COMPILE", {"backend": "eager"})
        for peer in forms:
            assert peers.build(peer)(torch.ones(2)).tolist() == [2, 2]
        part = dataclasses.replace(plain, function=lambda add, x: add(x, 3), part=torch.add)
        assert peers.build(part)(torch.ones(2)).tolist() == [4, 4]
    with pytest.raises(ValueError, match="peer double: form must be one of eager, compile, max-autotune, got 'fast'"):
        peers.build(dataclasses.replace(plain, form="fast"))


def test_an_op_may_have_neither_peers_nor_axes(monkeypatch, tmp_path, capsys):
    """It is measured all the same, and every table shows it; a sweep leaves it out."""
    op, spec = "masked_avg_pool", testing.specs()["masked_avg_pool"]
    bare = dataclasses.replace(spec, base={}, axes={}, units={}, computes="", replaces="")
    monkeypatch.setattr(testing, "specs", lambda: {op: bare})
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.of(op) == () and peers.resolve(op) == ([], []) and peers.of("no_op") == ()
    fake = SimpleNamespace(measure=dict, pattern=0, timers=dict)
    monkeypatch.setattr(measure.ceilings, "Ceilings", lambda *args: fake)
    plan = measure.Plan((op,), quick=True, tiny=True, threads=torch.get_num_threads())
    session = measure.Session(plan)
    assert session.visits and {v.provider for v in session.visits if ":" not in v.provider} == {measure.OURS}
    assert measure.rows(dataclasses.replace(plan, quick=False, sweep=True)) == []
    row = measure.rows(plan)[0]
    prepared = measure.Prepared(row, [])
    entries, wrong, _ = measure.summarise(prepared, fake_samples(prepared))
    found = {**environment.environment(), "plan": dataclasses.asdict(plan), "peers": [], "rows": entries}
    found |= {"ceilings": {"before": {}, "after": {}}, "failures": wrong, "notes": []}
    dash = "\N{EN DASH}"
    assert f"| {dash} | {dash} | {dash} | {dash} |" in page([found]) and not wrong
    assert report.render(found).count('href="#row') == 1
    assert report.op_table().count("\n") == 2 and "|  |  |" in report.op_table()
    costs = overhead.run((op,), tmp_path / "overhead.csv", rounds=1, count=1)
    assert overhead.cells(costs)[0][-2:] == ["not measured"] * 2
    assert overhead.markdown(costs).endswith("| not measured | not measured |")
    assert command.main(["run", "--ops", op, "--sweep", "--out", str(tmp_path / "sweep.csv")]) == 0
    assert f"{op} has no axes to sweep" in capsys.readouterr().out and not (tmp_path / "sweep.csv").exists()


def test_the_table_of_ops():
    """A row a folder, with every public function and the states of its backends."""
    lines = report.op_table().splitlines()
    assert len(lines) == 2 + len({spec.op.folder for name, spec in testing.specs().items()})
    pyramid, match, pool = (next(line for line in lines if f"`{name}`" in line) for name in
                            ("hypercorrelation_pyramid", "dense_cosine_match", "masked_avg_pool"))  # fmt: skip
    names = "[`hypercorrelation`, `hypercorrelation_pyramid`](fss_kernels/ops/hypercorrelation/README.md)"
    assert pyramid.startswith(f"| {names} | cosine of every query pixel with every support pixel")
    assert match.startswith("| [`dense_cosine_max`, `dense_cosine_match`](") and match.endswith("| none |")
    assert pool.endswith("| ✓ | ✓ default on CPU | compiled, run in the interpreter | compiled, never run |")
    assert all(spec.computes and spec.replaces for spec in testing.specs().values())


@pytest.mark.parametrize("row", ROWS[:2], ids=lambda row: row.id)
def test_a_wrong_kernel_gets_no_speed(row, tmp_path, capsys):
    spec = testing.specs()[row.op]
    wrong = dataclasses.replace(spec, function=lambda *args, **options: spec.function(*args, **options) * 1.001)
    prepared = measure.Prepared(row, eager_peers(row), wrong)
    entries, messages, _ = measure.summarise(prepared, fake_samples(prepared))
    assert len(messages) == 1 and measure.OURS in messages[0] and "times the allowed" in messages[0]
    assert [e["seconds"] for e in entries] == [None] * len(entries)
    assert not entries[0]["correct"]
    out = tmp_path / "results.csv"
    assert command._finish({"rows": entries, "peers": [], "failures": messages}, out) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and " ms " not in printed
    assert not out.exists() and storage.read(tmp_path / "results.failed.csv")["ops"]["failures"] == messages


def test_a_wrong_or_crashing_peer_gets_no_speed():
    row = ROWS[0]
    good = eager_peers(row)[0]

    def crash(*args, **options):
        raise RuntimeError("out of order")

    shifted = dataclasses.replace(good, name="wrong", function=lambda *a, **k: good.function(*a, **k) + 0.1)
    crashing = dataclasses.replace(good, name="crashing", function=crash)
    prepared = measure.Prepared(row, [good, shifted, crashing])
    entries, messages, _ = measure.summarise(prepared, fake_samples(prepared))
    assert set(prepared.calls) == {measure.OURS, good.name}
    assert [e["provider"] for e in entries if not e["seconds"]] == ["wrong", "crashing"]
    assert len(messages) == 2 and "relative error" in messages[0] and "RuntimeError: out of order" in messages[1]
    assert {e["provider"]: e["correct"] for e in entries if e["correct"] is not None} == {
        measure.OURS: True, good.name: True, "wrong": False, "crashing": False,
    }  # fmt: skip


@pytest.mark.parametrize("row", ROWS[:2], ids=lambda row: row.id)
def test_a_speed_above_the_roof_is_refused(row):
    prepared = measure.Prepared(row, eager_peers(row))
    reading = prepared.buffers[0].nbytes / 0.5
    floor = prepared.cost.bytes / reading  # both ceilings are equal here
    for factor, expected in ((1.02, 0), (1.05, 1)):
        samples = fake_samples(prepared, ours=floor / factor, peer=2.0)
        entries, wrong, impossible = measure.summarise(prepared, samples)
        assert entries[0]["roof_fraction"] == pytest.approx(factor)
        assert (len(wrong), len(impossible)) == (0, expected)
    session = measure.Session.__new__(measure.Session)
    full, quick = measure.Plan(OPS), measure.Plan(OPS, quick=True)
    # the first time the row is measured once more; a quick run only says so, every time
    for plan, samples_of, outcomes in (
        (full, (samples, samples), [(True, 0, 0, 1), (False, 1, 1, 1)]),
        (full, (samples, fake_samples(prepared)), [(True, 0, 0, 1), (False, 1, 0, 1)]),
        (quick, (samples,), [(False, 1, 0, 1)]),
    ):
        session.plan, session.entries, session.twice, session.failures, session.notes = plan, {}, set(), [], []
        found = []
        for one in samples_of:
            session.prepared, session.samples = prepared, one
            again = session.close_row()
            found.append((again, len(session.entries), len(session.failures), len(session.notes)))
        assert found == outcomes
        ours = session.entries[row][0]
        assert ours["roof_fraction"] == pytest.approx(factor if one is samples else floor, rel=0.01)


def test_the_roof_is_of_what_takes_longer():
    """Products against moving memory; bfloat16 products where candidates are screened with them."""
    row = next(r for r in measure.rows(PLAN) if r.op == "dense_cosine_max" and r.mode == "forward")
    prepared = measure.Prepared(row, [])
    samples = fake_samples(prepared, ours=1.0) | {"ceiling:fma": {0: [0.9], 1: [0.9]}}
    for screened, products, bound, fraction in (
        (False, 0.8, "products", 0.9),
        (True, 0.8, "products", 0.8),
        (True, 1e-6, "memory", None),
    ):
        prepared.cost = dataclasses.replace(prepared.cost, screened=screened)
        ours = measure.summarise(prepared, samples | {"ceiling:screen": {0: [products], 1: [products]}})[0][0]
        moving = prepared.cost.bytes / (prepared.buffers[0].nbytes / 0.5)
        assert ours["bound"] == bound and ours["roof_fraction"] == pytest.approx(fraction or moving)


def test_classes_of_sizes_are_disjoint_and_complete():
    ops = ("masked_avg_pool", "dense_cosine_max")
    chosen = [{(r.op, r.size) for r in measure.rows(measure.Plan(ops, sizes=(c,)))} for c in "SML"]
    every = {(r.op, r.size) for r in measure.rows(measure.Plan(ops))}
    assert set.union(*chosen) == every and sum(map(len, chosen)) == len(every)
    assert ("masked_avg_pool", "4x256x60x60") in chosen[0] and ("dense_cosine_max", "1x2048x60x60") in chosen[2]
    small = measure.rows(measure.Plan(ops, sizes=("S",)))
    first = {op: next(r.size for r in small if r.op == op) for op in ops}
    assert measure.rows(measure.Plan(ops, quick=True)) == [r for r in small if r.size == first[r.op]]
    assert len(small) > len(first)


def test_compare_judges_by_the_share_of_the_roof(results, tmp_path, capsys):
    """A machine that is twice as slow in everything is no change; a kernel that is twice as slow is one."""
    before, same, slower = (copy.deepcopy(results) for _ in range(3))
    for changed, roof in ((same, 1.0), (slower, 0.5)):
        for e in changed["rows"]:
            if e["provider"] == measure.OURS:
                e["seconds"]["median"] *= 2
                e["roof_fraction"] *= roof
    files = {}
    for name, content in (("before", before), ("same", same), ("slower", slower)):
        files[name] = tmp_path / f"{name}.csv"
        storage.write(files[name], "ops", content)
    assert command.main(["compare", str(files["before"]), str(files["same"])]) == 0
    assert "SLOWER" not in capsys.readouterr().out
    assert command.main(["compare", str(files["before"]), str(files["slower"])]) == 1
    assert capsys.readouterr().out.count("SLOWER") == len(ROWS)
    assert {c.slowdown for c in compare.changes(before, slower)} == {2.0}
    assert command.main(["compare", str(files["before"]), "no-such-revision"]) == 2
    assert "compare: no-such-revision is neither a result file nor a revision" in capsys.readouterr().out
    storage.write(files["same"], "ops", {**same, "rows": []})
    assert command.main(["compare", str(files["before"]), str(files["same"])]) == 1


def test_plot_writes_every_row(results, tmp_path):
    file, out = tmp_path / "results.csv", tmp_path / "plots"
    storage.write(file, "ops", results)
    assert command.main(["plot", str(file), "--out", str(out)]) == 0
    written = sorted((out / file.stem).glob("*.svg"))
    assert len(written) == len(ROWS)  # of one size each
    assert all(measure.OURS in p.read_text() for p in written)


def test_plot_draws_the_committed_sweeps(results, tmp_path, monkeypatch):
    """Without files it draws the newest results and the sweeps; an axis has its unit."""
    monkeypatch.setattr(storage, "RESULTS", tmp_path / "results")
    rows = [{**entry("masked_avg_pool", 1.0), "size": f"grid={n}"} for n in (30, 60)]
    storage.write(tmp_path / "results" / "sweeps" / "machine.csv", "a", result_file(rows) | {"plan": {"sweep": 1}})
    assert command.main(["plot", "--out", str(tmp_path)]) == 0
    assert [p.name for p in tmp_path.glob("machine/*.svg")] == ["masked_avg_pool-against-grid.svg"]
    assert ">grid, pixels a side<" in (tmp_path / "machine" / "masked_avg_pool-against-grid.svg").read_text()
    storage.write(tmp_path / "results" / "ops" / "machine.csv", "a", results)
    assert command.main(["plot", "--out", str(tmp_path / "both")]) == 0
    assert len([*(tmp_path / "both" / "machine").glob("*.svg")]) > len(ROWS)
    assert all(
        set(spec.units) <= {a for s in testing.specs().values() for a in s.axes} for spec in testing.specs().values()
    )


def test_a_run_has_the_peers_of_its_kind(monkeypatch):
    """A quick run the eager peers of a sweep and the best eager form; no run on a CPU what compiling leaves alone."""
    monkeypatch.setattr(measure.ceilings, "Ceilings", lambda *args: SimpleNamespace(measure=dict))

    def names(op, **kind):
        session = measure.Session(dataclasses.replace(PLAN, ops=(op,), exclude=(), **kind))
        return {p.name for p in session.usable[op]}

    assert names("prototype_cosine", quick=True) == {"cosine_similarity", "folded-bmm"} < names("prototype_cosine")
    eager = {"pfenet", "packed-foreground"}
    assert names("dense_cosine_max", quick=True) == eager | {"argmax-gather"}
    assert names("dense_cosine_max", sweep=True) == eager | {"compile(argmax-gather)"}
    compiled = {n for n in names("dynamic_conv2d") if n.startswith("compile")}
    assert compiled == {"compile(shifted)"} and {"grouped", "per-sample", "merged-taps"} <= names("dynamic_conv2d")
    assert {"compile(grouped)"} <= {p.name for p in peers.of("dynamic_conv2d")}


def test_records_tell_released_code():
    """As it was released: no compiled form counts, nor what one library or another would do in its place."""
    records = {op: {r["name"]: r["released"] for r in peers.resolve(op)[1]} for op in OPS}
    for op, found in records.items():
        assert found == {p.name: p.released for p in peers.of(op)}
        assert not measure.selected([name for name, released in found.items() if released], COMPILED)
    pooling = {name for name, released in records["masked_avg_pool"].items() if released}
    assert pooling == {"eager", "pfenet", "panet"} and not any(records["dense_cosine_match"].values())


def test_sweeps_vary_one_number(tmp_path):
    """Every axis of an op has sizes that differ from the base in it (and its image); the plots show them all."""
    for spec in testing.specs().values():
        assert set(spec.axes) <= set(spec.base) | set(inspect.signature(spec.benchmark_sample).parameters)
        for label, arguments in sweeps.sizes(spec).items():
            axis, _, value = label.partition("=")
            other = {k: v for k, v in arguments.items() if k not in (axis, "modes", "image")}
            assert arguments[axis] == float(value) and arguments["modes"] == ("forward",)
            assert other.items() <= spec.base.items()
    entries = []
    plan = measure.Plan(("masked_avg_pool",), sweep=True, tiny=True, sizes=("foreground=0.1", "batch=*"))
    for row in measure.rows(plan):
        prepared = measure.Prepared(row, [])
        entries += measure.summarise(prepared, fake_samples(prepared))[0]
    assert [r.size for r in measure.rows(plan)] == [*(f"batch={n}" for n in (1, 2, 4, 8, 20)), "foreground=0.1"]
    found = {"rows": entries, "peers": [], "plan": dataclasses.asdict(plan)}
    storage.write(tmp_path / "sweep.csv", "a", found)
    assert command.main(["plot", str(tmp_path / "sweep.csv"), "--out", str(tmp_path)]) == 0
    names = {"masked_avg_pool-against-batch", "masked_avg_pool-against-foreground"}
    assert {p.stem for p in tmp_path.glob("sweep/*.svg")} == names
    assert "fss_kernels" in (tmp_path / "sweep" / "masked_avg_pool-against-batch.svg").read_text()
    ratios = dict(zip((r.size for r in measure.rows(plan)), (0.5, 2, 3, 4, 5, 1.25), strict=True))
    ours = [r for r in entries if r["provider"] == measure.OURS]
    peer = [{**r, "provider": "peer", "ratio_to_ours": ratios[r["size"]]} for r in ours]
    table = page(sweeps=[{**environment.environment(), **found, "rows": [*entries, *peer]}])
    assert "| masked_avg_pool | batch, samples | 1, 2, 4, 8, 20 | **0.50**, 2.00, 3.00, 4.00, 5.00 |" in table
    assert "| masked_avg_pool | foreground, fraction | 0.1 | 1.25 |" in table and table.count("| peer |") == 2
    assert "Each row has 6 samples of our time." in table
    html = report.render({**environment.environment(), **found, "failures": [], "notes": [],
                          "ceilings": {"before": {}, "after": {}}}, sweeps=[found])  # fmt: skip
    assert "masked_avg_pool against foreground" in html


def test_the_base_of_a_sweep_is_measured_once(monkeypatch):
    """It stands under the label of every axis, in their order; without the first label the next one is measured."""
    op = "dynamic_conv2d"
    plan = measure.Plan((op,), sweep=True, tiny=True, rounds=2)
    spec = testing.specs()[op]
    base = {f"{axis}={spec.base[axis]}" for axis in spec.axes}
    found = measure.rows(plan)
    assert [r.size for r in found] == list(sweeps.sizes(spec))
    assert {r.size for r in found if r.size in base} == base and len(base) == 3
    same = {r.size: r.same_as for r in found if r.same_as}
    assert same == dict.fromkeys(base - {"grid=60"}, "grid=60")
    visits = measure.schedule(plan, {op: []})
    assert {v.row.size for v in visits} == {r.size for r in found} - set(same)
    some = measure.rows(dataclasses.replace(plan, sizes=("batch=*", "channels=*")))
    assert {r.size: r.same_as for r in some if r.same_as} == {"batch=4": "channels=256"}
    fake = SimpleNamespace(measure=dict, pattern=0)
    monkeypatch.setattr(measure.ceilings, "Ceilings", lambda *args: fake)
    session = measure.Session(plan)
    for n, row in enumerate(r for r in found if not r.same_as):
        session.entries[row] = [{"op": op, "size": row.size, "provider": measure.OURS, "seconds": n}]
    rows = session.results()["rows"]
    assert [r["size"] for r in rows] == [r.size for r in found]
    seconds = {r["size"]: r["seconds"] for r in rows}
    assert {seconds[label] for label in base} == {seconds["grid=60"]} and len(set(seconds.values())) == len(rows) - 2
    assert {r["size"]: r["same_as"] for r in rows if "same_as" in r} == same


def test_the_share_of_foreground_is_that_of_the_mask():
    masks = testing.disc(3, 40, 0.1)
    assert masks.sum((1, 2)).tolist() == [160.0] * 3 and set(masks.unique().tolist()) == {0.0, 1.0}
    assert testing.disc(1, 5, 1.0).all()
    for spec in (s for s in testing.specs().values() if "foreground" in s.axes):
        arguments = {**spec.base, "channels": 1, "foreground": 0.25}
        mask = spec.benchmark_sample(**arguments).tensors["mask"]
        first = mask[:, 0] if mask.ndim == 4 else mask
        assert first.mean().item() == pytest.approx(0.25, rel=1e-3), spec.name


def test_the_gate_fails_a_kernel_that_is_slowed_down():
    """The ratio just measured is the baseline; the same kernel called three times fails, once passes. Not twice: one
    taken in a second beside a busy neighbour may be a third too high itself. The next test has a clock of its own.
    """
    row = next(r for r in gate.rows(("prototype_cosine",)) if r.mode == "forward")
    quiet = gate.measure_row(row, None)
    assert not quiet.failed and quiet.stand_in == "x.sum()" and "no baseline" in str(quiet)
    assert not gate.measure_row(row, quiet.ratio).failed
    slowed = gate.measure_row(row, quiet.ratio, slowed=3)
    assert slowed.failed and "SLOWER" in str(slowed)
    assert gate.stand_in(SimpleNamespace(cost=testing.Cost(bytes=1, flops=100)))[0] == "torch.mm"


def test_the_baseline_of_the_gate_is_the_median_of_its_repeats(monkeypatch, tmp_path):
    baseline = tmp_path / "gate.json"
    baseline.write_text('{"other machine": {"a": 1.0}}')
    monkeypatch.setattr(gate, "BASELINE", baseline)
    ratios = iter((9, 7, 3, 2))
    judged = []

    def run(ops, slowed, judge):
        judged.append(judge)
        return [gate.Outcome("a", "x.sum()", next(ratios), None), gate.Outcome("b", "x.sum()", 5, None)]

    monkeypatch.setattr(gate, "run", run)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")  # or it starts a process with the allocator fixed
    assert command.gate(update=True) == 0 and command.gate(update=True, repeat=3) == 0 and not any(judged)
    assert json.loads(baseline.read_text()) == {
        "other machine": {"a": 1.0},
        environment.machine_slug(): {"a": 3, "b": 5},
    }


@pytest.mark.parametrize("neighbour", [0.0, 0.5], ids=["quiet", "busy"])
def test_the_gate_tells_twice_from_once(monkeypatch, neighbour):
    """On a clock that calls move: 20 repeats pass, and every one with two calls in place of one fails. A busy neighbour
    makes every call longer by a random part, on average a half."""
    clock, noise = [0.0], random.Random(0)

    def lasts(seconds):
        clock[0] += seconds * (1 + (noise.expovariate(1 / neighbour) if neighbour else 0.0))

    fake = SimpleNamespace(
        refused="", wanted=[], cost=testing.Cost(bytes=100, flops=1), next_input=dict,
        calls={measure.OURS: lambda tensors: lasts(0.03)},
        next_buffer=lambda: SimpleNamespace(sum=lambda: lasts(0.02)),
    )  # fmt: skip
    monkeypatch.setattr(measure, "Prepared", lambda row, usable: fake)
    monkeypatch.setattr(gate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    outcomes = {slowed: [gate.measure_row(ROWS[0], 1.5, slowed) for _ in range(20)] for slowed in (1, 2)}
    assert [o.failed for o in outcomes[1]] == [False] * 20 and [o.failed for o in outcomes[2]] == [True] * 20
    if not neighbour:
        assert outcomes[1][0].ratio == pytest.approx(1.5) and outcomes[2][0].ratio == pytest.approx(3)


def test_overhead_measures_every_column(tmp_path):
    results = overhead.run(("masked_avg_pool",), tmp_path / "overhead.csv", rounds=1, count=1)
    assert storage.read(tmp_path / "overhead.csv") == {"overhead": results}
    (line,) = overhead.cells(results)
    assert line[0] == "masked_avg_pool" and len(line) == len(overhead.header())
    assert all(float(cell) > 0 for cell in line[1:])


def test_overhead_is_bold_where_pytorch_is_faster():
    """Compared with our forward, and with the backward; within 3 % neither is."""
    times = dict(zip(overhead.COLUMNS, (100, 150, 200, 120, 98, 190), strict=True))
    row = {"op": "an_op", "microseconds": {name: {"median": t} for name, t in times.items()}}
    text = page(overhead=[{**environment.environment(), "rounds": 20, "calls": 100, "rows": [row]}])
    assert text.endswith("| an_op | 100 | 150 | 200 | 120 | 98 | **190** |\n")
    assert "the median of 20 rounds of 100 calls" in text


def test_cuda_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["run", "--device", "cuda"]) == 2
    assert "run: device cuda: PyTorch sees no GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["run", "--device", "tpu"])
    assert "device" in capsys.readouterr().err


def test_ratios_pair_values_of_the_same_round():
    row = ROWS[0]
    prepared = measure.Prepared(row, eager_peers(row))
    peer = next(iter(set(prepared.calls) - {measure.OURS}))
    samples = fake_samples(prepared)
    for provider in samples:  # the machine is three times slower in the second and third round
        samples[provider] = {n: [s * slow for s in samples[provider][0]] for n, slow in enumerate((1, 3, 3))}
    entries = {e["provider"]: e for e in measure.summarise(prepared, samples)[0]}
    assert entries[peer]["ratio_to_ours"] == pytest.approx(2)
    assert entries[measure.OURS]["roof_fraction"] == pytest.approx(0.5, rel=0.02)
    assert entries[measure.OURS]["seconds"] == {"min": 1, "p20": 1, "median": 3, "p80": 3, "samples": 9}


def test_providers_take_turns():
    usable = {op: peers.resolve(op)[0] for op in OPS}
    visits = measure.schedule(dataclasses.replace(PLAN, rounds=6), usable)
    assert visits == measure.schedule(dataclasses.replace(PLAN, rounds=6), usable)
    first = [v for v in visits if v.row == ROWS[0]]
    assert visits[: len(first)] == first
    rounds = [[v.provider for v in first if v.round == n] for n in range(6)]
    assert [p for order in rounds for p in order] == [v.provider for v in first]
    assert all(sorted(order) == sorted(rounds[0]) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_far_slower_peers_sit_out():
    """One that a bound names has its three rounds even where it is hopeless, and no more."""
    session = measure.Session.__new__(measure.Session)
    session.prepared = None
    session.plan = measure.Plan(OPS, named=("bound",))
    seconds = {measure.OURS: 0.1, "ceiling:read": 0.01, "fast": 1.0, "close": 1.9, "slow": 2.1, "bound": 9.0}
    session.samples = {name: {n: [s] * 3 for n in range(3)} for name, s in seconds.items()}
    session.samples |= {"hopeless": {0: [21.0]}, "bound-hopeless": {0: [90.0]}}
    session.plan = dataclasses.replace(session.plan, named=("bound", "bound-hopeless", "close"))
    slow = {"slow", "hopeless", "bound", "bound-hopeless"}
    for n, out in ((0, set()), (1, {"hopeless"}), (2, {"hopeless"}), (3, slow)):
        assert {name for name in session.samples if session.sits_out(measure.Visit(ROWS[0], n, name))} == out


@pytest.mark.parametrize("screened, written", [(False, 0), (True, 8)])
def test_only_ceilings_of_the_roof_have_a_turn(screened, written):
    session = measure.Session.__new__(measure.Session)
    session.plan, session.samples = PLAN, {}
    session.prepared = measure.Prepared(ROWS[0], [])
    session.prepared.cost = dataclasses.replace(session.prepared.cost, screened=screened, written=written)
    visits = [measure.Visit(ROWS[0], n, f"ceiling:{kind}") for kind in ceilings.KINDS for n in (0, 3)]
    turns = {v.provider for v in visits if not session.sits_out(v)}
    assert turns == {"ceiling:read"} | ({"ceiling:write", "ceiling:screen"} if screened else {"ceiling:fma"})
    samples = {n: s for n, s in fake_samples(session.prepared).items() if n in {measure.OURS, *turns}}
    seconds = {e["provider"]: e["seconds"] for e in measure.summarise(session.prepared, samples)[0]}
    assert set(seconds) == {measure.OURS, *turns} and all(seconds.values())


@pytest.mark.parametrize("limit, often", [(0.0, (1, 0)), (60.0, (3, 1))])
def test_a_long_call_is_timed_once_a_visit(monkeypatch, limit, often):
    monkeypatch.setattr(measure, "LONG", limit)
    session = measure.Session.__new__(measure.Session)
    session.plan, session.prepared = PLAN, measure.Prepared(ROWS[0], eager_peers(ROWS[0])[:1])
    for provider in session.prepared.calls:
        times = session.times(provider)
        assert (times["rounds"], times["warmup_rounds"]) == often and times["iterations"] == 1
    assert session.times("ceiling:read")["rounds"] == PLAN.repeats == 3


def test_extra_bytes_are_exact():
    x = torch.ones(1000)

    def call():
        y = x + 1  # 4000
        z = (y * 2).sum()  # 4000 more at the same time
        del y
        w = torch.empty(5000)  # 20000 on its own
        del w
        return z  # 4, not counted

    assert measure.extra_bytes(call) == measure.extra_bytes(call, warm=True) == 20000


def test_three_calls_come_before_the_first_round():
    """Of the gate, of the clock and of the memory; the first one compiles, and no later one again."""
    row = next(r for r in ROWS if r.mode == "forward+backward")
    good, count = eager_peers(row)[0], [0]

    def call(*args, **kwargs):
        count[0] += 1
        return good.function(*args, **kwargs)

    assert measure.Prepared(row, [dataclasses.replace(good, function=call)]).extra[good.name] > 0 and count == [3]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = dataclasses.replace(good, function=torch.compile(good.function, backend="aot_eager"))
    prepared = measure.Prepared(row, [compiled])
    assert good.name in prepared.calls
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_our_extra_memory_is_the_stated_scratch_memory():
    for row in ROWS:
        if row.mode == "forward":
            prepared = measure.Prepared(row, [])
            assert prepared.extra[measure.OURS] <= 1.05 * prepared.scratch_bytes, row.id


def test_a_row_above_the_roof_is_measured_once_more(tmp_path):
    """With a roof that anything is above: every row has its visits twice, then fails, and the order is kept."""
    plan = measure.Plan(("masked_avg_pool",), sizes=("4x256x60x60",), exclude=("*",), rounds=1, repeats=1)
    assert [r.mode for r in measure.rows(plan)] == list(measure.MODES)
    plan.save(tmp_path / "plan.json")
    code = f"""
import sys, pytest
from benchmarks import measure
measure.ROOF_SLACK = 0.0
options = ["-q", "-x", "-s", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
options += ["--plan", r"{tmp_path}/plan.json", "--results", r"{tmp_path}/results.json"]
sys.exit(pytest.main(["benchmarks/suite", *options]))"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "14 passed" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [e["mode"] for e in found["rows"] if e["provider"] == measure.OURS] == list(measure.MODES)
    assert [e["seconds"]["samples"] for e in found["rows"] if e["provider"] == measure.OURS] == [1, 1]
    above = [note for note in found["notes"] if "measured once more" in note]
    assert len(above) == len(found["failures"]) == 2 and all("of the measured roof" in f for f in found["failures"])


def test_a_ceiling_that_moved_is_named():
    before = {"read_gbps": 20.0, "write_gbps": 10.0, "fma_gflops": 114.0, "screen_gflops": 100.0}
    after = {"read_gbps": 17.0, "write_gbps": 10.0, "fma_gflops": 100.0, "screen_gflops": 117.0}
    (note,) = ceilings.moved(before, after)
    assert "read_gbps 20.0 before and 17.0 after, screen_gflops 100.0 before and 117.0 after:" in note
    assert "write_gbps" not in note and "fma_gflops" not in note and "ratios" in note
    assert ceilings.moved(before, before) == []


def test_environment_names_commit_and_tree():
    env = environment.environment()["environment"]
    assert isinstance(env["clean"], bool) and (env["commit"] is None or len(env["commit"]) == 40)
    assert {"cpu", "cores", "threads", "isa", "torch", "python", "compiler", "os", "allocator", "date"} <= set(env)
    assert environment.machine_slug().replace("-", "").isalnum()


def test_only_what_the_change_concerns_is_measured_again(tmp_path, monkeypatch, capsys):
    """Of four ops `convolution` is alone, and `cosine` imports `pooling`, which imports `resizing`."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for op in ("convolution", "resizing", "pooling", "cosine"):
        for folder in environment.FOLDERS:
            (tmp_path / folder / op).mkdir(parents=True)
        (tmp_path / "csrc" / op / "kernel.cpp").write_text("// first\n")
        (tmp_path / "fss_kernels" / "ops" / op / "op.py").write_text("import torch\n")
    (tmp_path / "fss_kernels/ops/cosine/op.py").write_text("from fss_kernels.ops.pooling import op\n")
    (tmp_path / "fss_kernels/ops/pooling/op.py").write_text("from fss_kernels.ops.resizing import op\n")
    (tmp_path / "setup.py").write_text("# first\n")

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    file, plan = tmp_path / "results.csv", {"ops": ("cosine",), "rounds": 7}
    env = {"clean": True, "commit": git("rev-parse", "HEAD"), "torch": torch.__version__}

    def ran(op="cosine", **change) -> bool:
        storage.write(file, "ops", {"environment": env, "plan": plan, "rows": []} | change)
        return environment.measured(storage.run(file, "ops"), plan, *environment.sources(op))

    assert not environment.measured(storage.run(file, "ops"), plan)
    assert ran() and "measured already" in capsys.readouterr().out
    assert not ran(plan={**plan, "rounds": 8})
    assert not ran(environment={**env, "clean": False}) and not ran(environment={**env, "torch": "1.0"})
    assert not ran(environment={**env, "commit": "0" * 40})
    for changed, same, imported_same in (
        ("csrc/convolution/kernel.cpp", True, True),
        ("fss_kernels/ops/pooling/README.md", True, True),
        ("csrc/resizing/kernel.cpp", False, False),
        ("csrc/pooling/kernel.cpp", False, True),
        ("csrc/cosine/kernel.cpp", False, True),
        ("fss_kernels/compositions.py", False, False),
        ("setup.py", False, False),
    ):
        (tmp_path / changed).write_text("// second\n")
        git("add", "-A")
        git("commit", "-qm", changed)
        assert ran() is same, changed
        assert ran("resizing") is imported_same, changed
        git("reset", "-q", "--hard", "HEAD~1")


def test_the_commands_of_make_bench_are_understood():
    recipe = re.search(r"^bench:.*\n((?:\t.*\n)+)", (environment.ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    commands = re.findall(r"^\t\$\(PY\) (-m .*)", recipe, re.MULTILINE)
    assert len(commands) == recipe.count("\n") > 0
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": environment.ROOT}
    calls = [subprocess.Popen([sys.executable, *c.split(), "--help"], **pipes) for c in commands]
    for c, call in zip(commands, calls, strict=True):
        assert (call.communicate()[1], call.returncode) == ("", 0), c


def line(metric: str, bound: float, results: dict, key: str = "at_least") -> dict:
    row = {k: results["rows"][0][k] for k in ("op", "size", "dtype", "mode")}
    return {**row, "metric": metric, key: bound, "level": "must", "issue": "a line"}


@pytest.mark.parametrize(
    ("metric", "key", "bound", "state"),
    [
        ("roof", "at_least", 0.4, "pass"),
        ("roof", "at_least", 0.6, "SHORT"),
        ("peer:fastest", "at_least", 1.9, "pass"),
        ("peer:fastest", "at_least", 2.1, "SHORT"),
        ("peer:nobody", "at_least", 1.0, "MISSING"),
        ("extra_bytes", "at_most", 1.05, "pass"),
        ("extra_bytes", "at_most", 0.01, "SHORT"),
    ],
)
def test_check_judges_a_line(results, tmp_path, capsys, metric, key, bound, state):
    file, lines = tmp_path / "results.csv", tmp_path / "targets.toml"
    storage.write(file, "ops", results)
    fields = {**line(metric, bound, results, key), "short": "tried two things"}
    lines.write_text("[[line]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in fields.items()))
    assert targets.evaluate(fields, results).state == state
    arguments = ["check", str(file), "--lines", str(lines)]
    assert command.main(arguments) == (0 if state == "pass" else 1)
    printed = capsys.readouterr().out
    assert state in printed and ("tried two things" in printed) == (state == "SHORT")
    assert command.main([*arguments, "--allow-short"]) == (1 if state == "MISSING" else 0)


def test_check_misses_rows_and_wrong_numbers(results):
    wanted = line("roof", 0.1, results)
    assert targets.evaluate({**wanted, "size": "another"}, results).state == "MISSING"
    wrong = copy.deepcopy(results)
    wrong["rows"][0]["correct"] = False
    assert targets.evaluate(wanted, wrong).state == "MISSING"
    with pytest.raises(ValueError, match="unknown metric 'speed'"):
        targets.evaluate({**wanted, "metric": "speed"}, results)
    assert targets.exit_code([], results, True) == 1
    assert targets.exit_code([targets.evaluate(wanted, results)], {**results, "failures": ["x"]}, True) == 1


def test_every_line_has_a_row_and_a_bound():
    for wanted in targets.load():
        assert ("at_least" in wanted) != ("at_most" in wanted)
        if wanted["op"] in models.OPS:
            assert wanted["size"] == models.Plan().label and wanted["mode"] in ("forward+backward", "train", "evaluate")
            assert wanted["metric"] in ("peer:literal", "peer:reference", "memory:reference")
            continue
        spec = testing.specs()[wanted["op"]]
        assert wanted["size"] in spec.sizes and wanted["mode"] in measure.MODES
        kind, _, name = wanted["metric"].partition(":")
        if kind == "own":
            op, _, size = name.partition("/")
            assert size in testing.specs()[op].sizes
        else:
            names = {"fastest", *(p.name for p in peers.of(wanted["op"]))}
            assert wanted["metric"] in ("roof", "extra_bytes") or name in names


def test_only_a_crash_of_the_compiler_is_no_failure(results, tmp_path, capsys):
    crash = "row peer: raised InductorError: AssertionError"
    wrong = "row fss_kernels: raised InductorError: AssertionError"
    path = tmp_path / "results.csv"
    assert command._finish(results | {"failures": [crash]}, path) == 0
    written = storage.run(path, "ops")
    assert written["failures"] == [] and written["notes"] == [crash] and crash in capsys.readouterr().out
    assert command.main(["check", str(path), "--allow-short"]) in (0, 1) and crash in capsys.readouterr().out
    assert command._finish(results | {"failures": [crash, wrong]}, path) == 1
    failed = storage.run(path.with_suffix(".failed.csv"), "ops")
    assert failed["failures"] == [wrong] and storage.run(path, "ops") == written


@pytest.mark.parametrize("optional", [False, True])
def test_a_missing_peer_fails_unless_optional(results, monkeypatch, tmp_path, capsys, optional):
    every = peers.of
    absent = dataclasses.replace(every(OPS[0])[0], name="absent", module="absent", optional=optional)
    monkeypatch.setattr(peers, "of", lambda op: (*every(op), absent) if op == OPS[0] else every(op))
    fake = SimpleNamespace(measure=dict, pattern=0, timers=dict)
    monkeypatch.setattr(measure.ceilings, "Ceilings", lambda *args: fake)
    session = measure.Session(dataclasses.replace(PLAN, rounds=1, threads=torch.get_num_threads()))
    assert "absent" not in {v.provider for v in session.visits}
    found = {**results, **{k: v for k, v in session.results().items() if k in ("peers", "failures")}}
    assert bool(found["failures"]) != optional
    assert command._finish(found, tmp_path / "results.csv") == (0 if optional else 1)
    printed = capsys.readouterr().out
    assert "No module named 'absent'" in printed and ("optional peer absent" in printed) == optional
    outcomes = [targets.evaluate(line("roof", 0.1, results), found)]
    assert targets.exit_code(outcomes, {**found, "failures": []}, False) == (0 if optional else 1)


def test_report_shows_every_provider(results, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RESULTS", tmp_path / "no-sweeps")
    file, written = tmp_path / "results.csv", tmp_path / "page" / "index.html"
    storage.write(file, "ops", results)
    assert command.main(["report", str(file), "--out", str(written)]) == 0
    html = written.read_text()
    assert html.count("<svg") == len(ROWS) and "Time against size" not in html  # one size each
    for entry in results["rows"]:
        assert entry["provider"].removeprefix("ceiling:") in html and entry["size"] in html
    assert str(results["environment"]["commit"]) in html and "src=" not in html and 'href="http' not in html


def test_report_plots_time_against_size(results):
    """A log-log plot of every op, dtype and mode with several sizes."""
    entries = results["rows"]
    larger = [{**e, "size": "larger", "bytes": e["bytes"] and 4 * e["bytes"]} for e in entries if e["op"] == ROWS[0].op]
    html = report.render({**results, "rows": [*entries, *larger]})
    again = [(r.dtype, r.mode) for r in ROWS if r.op == ROWS[0].op]
    assert html.count("<svg") == len(ROWS) + len(again) + len(set(again))
    assert "Time against size" in html and "MB that must move" in html
    same = [{**e, "size": "same"} for e in entries]
    assert "Time against size" not in report.render({**results, "rows": [*entries, *same]})


@pytest.mark.parametrize("limits, between", [((20, 60), ["20", "30", "40", "60"]), ((2, 6000), [])])
def test_labels_of_logarithmic_axes(limits, between):
    figure = Figure()
    axes = figure.subplots()
    axes.set(yscale="log", ylim=limits)
    report._label(axes.yaxis)
    figure.canvas.draw()
    found = [t.get_text() for t in axes.get_yticklabels(minor=True)]
    assert [t for t in found if t] == between


def test_report_shows_a_trained_network(results, tmp_path):
    scores = {"DPCN, trained": {"miou": 43.21, "fb_iou": 60}, "untrained": {"miou": 10, "fb_iou": 20}}
    demo = {"scores": scores, "steps": 400, "episodes": 200, "columns": ["support", "query", "prediction", "truth"]}
    environment.write_json(tmp_path / "demo.json", demo)
    (tmp_path / "grid.png").write_bytes(b"picture")
    html = report.render(results, tmp_path)
    assert "<td>43.2</td>" in html and "data:image/png;base64,cGljdHVyZQ==" in html and "400 steps" in html


def test_report_marks_a_peer_that_wins(results):
    won = copy.deepcopy(results)
    next(e for e in won["rows"] if e["provider"] not in (measure.OURS, "ceiling:read"))["ratio_to_ours"] = 0.9
    assert report.render(won).count("faster than ours") == 1 and "faster than ours" not in report.render(results)


def test_a_peak_is_that_of_its_own_process():
    """Whatever the process holds that starts it."""
    large = torch.ones(200_000_000)
    code = """
from types import SimpleNamespace
from benchmarks import models
models.tasks = lambda plan, ops: [SimpleNamespace(mode="train", calls={"ours": lambda: None})]
print(models.peak(None, "dpcn:train:ours"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < large.nbytes


def test_a_page_shows_networks(tmp_path, monkeypatch):
    """The program measures small networks; their rows have a table of their own."""
    out = tmp_path / "networks.csv"
    monkeypatch.setattr(models, "peak_of_a_process", lambda *_: 10**6)
    assert models.run(dataclasses.replace(models.QUICK, rounds=2, network_rounds=1), out) == 0
    found = storage.run(out, "networks")
    text = page(networks=[found])
    for name, mode in ((n, m) for n in models.NETWORKS for m in models.MODES):
        assert f"| {name} | tiny-65 | {mode} | our kernels | 1 |" in text
        assert f"| {name} | tiny-65 | {mode} | reference | 1 |" in text
    assert "| support_activation | tiny-65 | forward+backward | literal | 2 |" in text
    used = {
        "dpcn": {"dense_cosine_max", "dynamic_conv2d", "masked_avg_pool"},
        "support_activation": {"dense_cosine_max"},
    }
    used["dpnet"] = {"dense_cosine_max", "dense_cosine_match", "masked_avg_pool"}
    for e in found["rows"]:
        assert set(e["shares"]) == (used[e["op"]] if e["provider"] != "literal" else set())
        assert sum(e["shares"].values()) == pytest.approx(e["share_in_ops"]) and 0 <= e["share_in_ops"] < 1
        assert e["throughput"] * e["seconds"]["median"] == pytest.approx(1)


def test_a_page_says_where_the_time_of_a_network_goes():
    """The largest share first, and no op below half a percent; files from before these fields show what they have."""
    e = {"op": "dpcn", "size": "a", "dtype": "float32", "mode": "train", "provider": measure.OURS, "correct": True}
    e |= {"seconds": {"median": 0.5, "all": [0.5, 0.4, 0.75]}, "ratio_to_ours": 1.0, "roof_fraction": None}
    e |= {"share_in_ops": 0.084, "extra_bytes": 2e6, "peak_resident_bytes": 3e6}
    file = {**environment.environment(), "plan": {"ops": ["dpcn"]}, "peers": [], "rows": [e]}
    assert "| 3 | 0.500 | 0.400 to 0.750 | 1 |  | 8 % | 2 | 3 |" in page(networks=[file])
    e |= {"throughput": 4.0, "shares": {"a_small": 0.004, "b_less": 0.03, "c_more": 0.05}}
    assert "| 4 | 8 % (c_more 5, b_less 3) | 2 | 3 |" in page(networks=[file])


def test_time_in_ops_is_kept_apart(monkeypatch):
    """Forward and backward of an op count for it and for no other; afterwards everything is as it was."""
    slow = {"masked_avg_pool": ("forward", 0.02), "prototype_cosine": ("backward", 0.3)}
    for name, (direction, seconds) in slow.items():
        implementation = _op.ops[name].backends["reference"]
        kept = getattr(implementation, direction)
        late = lambda *args, run=kept, seconds=seconds: (time.sleep(seconds), run(*args))[1]  # noqa: E731
        monkeypatch.setattr(implementation, direction, late)

    def functions():
        return {n: (op.backends["reference"].forward, op.backends["reference"].backward) for n, op in _op.ops.items()}

    before = functions()
    x, p = torch.ones(1, 2, 4, 4, requires_grad=True), torch.ones(1, 1, 2)
    with models.time_in_ops() as inside, fss_kernels.use_backend("reference"):
        fss_kernels.masked_avg_pool(x, torch.ones(1, 4, 4))
        fss_kernels.prototype_cosine(x, p).sum().backward()
    assert set(inside) == set(slow)
    assert 0.02 <= inside["masked_avg_pool"] < 0.3 <= inside["prototype_cosine"]
    assert before == functions()


def task(calls: dict, plan: models.Plan = models.QUICK) -> models.Task:
    """A row of calls that take no time."""
    return models.Task("support_activation", plan, "forward+backward", calls)


def test_a_network_with_wrong_numbers_gets_no_speed(tmp_path, monkeypatch, capsys):
    right = torch.linspace(0, 1, 5)

    def crash():
        raise RuntimeError("out of order")

    calls = {measure.OURS: right.clone, "reference": right.clone, "crashing": crash}
    calls |= {"close": lambda: right * 1.0009, "wrong": lambda: right * 1.0011, "nan": lambda: right / 0}
    one = task(calls)
    monkeypatch.setattr(models, "tasks", lambda plan: [one])
    monkeypatch.setattr(models, "peak_of_a_process", lambda *_: 10**6)
    out = tmp_path / "networks.csv"
    assert models.run(models.QUICK, out) == 1 and not out.exists()
    found = storage.run(tmp_path / "networks.failed.csv", "networks")
    refused = {"crashing", "wrong", "nan"}
    for e in found["rows"]:
        bad = e["provider"] in refused
        assert e["correct"] is not bad and (e["seconds"] is None) == bad and (e["throughput"] is None) == bad
    assert len(found["failures"]) == 3 and "RuntimeError: out of order" in found["failures"][0]
    assert "wrong: differs from the reference by 1.1e-03" in found["failures"][1]
    assert capsys.readouterr().out.count(" ms ") == 3
    assert models.distance((right, right), (right, right / 0)) == float("inf")
    broken = task({measure.OURS: right.clone, "reference": lambda: right / 0})
    assert set(models.measure_task(broken, models.QUICK)) == {measure.OURS, "reference"}


@pytest.mark.parametrize("name", models.NETWORKS)
def test_a_training_step_is_checked_by_its_gradients(name, monkeypatch):
    """A backward pass that is wrong in the head or in the backbone alone is found; nothing is learnt in a check."""
    plan = models.QUICK
    step = models.network_tasks(plan, name)[1]
    results = step.checks["reference"]()
    assert len(results) == 3  # loss, gradients of the backbone and of the head
    assert all(torch.equal(a, b) for a, b in zip(results, step.checks["reference"](), strict=True))
    assert {n: v.message for n, v in models.verdicts(step).items()} == {measure.OURS: "", "reference": ""}
    implementation = _op.ops["masked_avg_pool"].backends["cpp"]
    backward = implementation.backward
    monkeypatch.setattr(implementation, "backward", lambda *args: [g * 1.5 for g in backward(*args)])
    found = models.verdicts(step)
    assert "differs from the reference" in found[measure.OURS].message and not found["reference"].message


def test_a_hopeless_provider_sits_out_after_two_rounds(monkeypatch):
    """Ours and what is within 20 times of it have every round, and throughput counts the batch."""
    plan = dataclasses.replace(models.QUICK, rounds=4, batch=3)
    one = task(dict.fromkeys((measure.OURS, "reference", "literal"), torch.ones(1).clone), plan)
    for name, seconds in ((measure.OURS, 1.0), ("reference", 19.0), ("literal", 21.0)):
        one.seconds[name] = [seconds] * 2
    assert [models.sits_out(one, n, d) for d in (1, 2) for n in one.calls] == [False] * 5 + [True]
    one = task(one.calls, plan)
    calls = dict.fromkeys(one.calls, 0)
    for name, seconds in ((measure.OURS, 0.001), ("reference", 0.001), ("literal", 0.2)):
        one.calls[name] = lambda name=name, seconds=seconds: (
            time.sleep(seconds),
            calls.update({name: calls[name] + 1}),
        )
    assert models.measure_task(one, plan) == {} and calls == {measure.OURS: 4, "reference": 4, "literal": 2}
    one.calls = dict.fromkeys(one.calls, torch.ones(1).clone)
    monkeypatch.setattr(models, "peak_of_a_process", lambda *_: 10**6)
    for e in models.rows(one, plan, {}):
        assert e["throughput"] == pytest.approx(3 / e["seconds"]["median"])
        assert len(e["seconds"]["all"]) == (2 if e["provider"] == "literal" else 4)


def test_readme_round_trip(results, tmp_path, monkeypatch, capsys):
    """Stale pages and blocks are found and replaced, and nothing beside them; a page without a machine goes."""
    monkeypatch.setattr(storage, "RESULTS", tmp_path / "results")
    blocks = {"docs/benchmarks/index.md": "machines", "docs/reliability.md": "reliability", "README.md": "ops"}
    for file, name in blocks.items():
        text = f"before\n<!-- {name}:begin -->\nstale text\n<!-- {name}:end -->\nafter\n"
        environment.write_text(tmp_path / file, text)
    index, reliable, first = (tmp_path / file for file in blocks)
    folder = index.parent
    environment.write_text(folder / "gone.md", f"# A machine without results\n\n{pages.GENERATED}\n")
    environment.write_text(folder / "by-hand.md", "# Not generated\n")
    arguments = ["readme", "--root", str(tmp_path)]
    for more in ([], ["--check"]):
        assert command.main([*arguments, *more]) == 0
        assert "there are no results in" in capsys.readouterr().out and "stale text" in index.read_text()
    storage.write(tmp_path / "results" / "ops" / "machine.csv", "a", results)
    assert command.main([*arguments, "--check"]) == 1 and "stale text" in index.read_text()
    assert "machine.md differs" in capsys.readouterr().out and not (folder / "machine.md").exists()
    assert command.main(arguments) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["by-hand.md", "index.md", "machine.md", "overview.svg"]
    for file in (index, reliable, first):
        text = file.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale text" not in text
    count = len({row.op for row in ROWS})
    assert "](machine.md) |" in index.read_text() and f"| {count} of {len(OPS)} |" in index.read_text()
    assert "| `make fuzz` |" in reliable.read_text() and report.op_table() in first.read_text()
    text = (folder / "machine.md").read_text()
    sections = {part.partition("\n")[0]: part for part in text.split("\n### ")[1:]}
    for op in OPS:
        own = [row for row in ROWS if row.op == op]
        assert all(f"| {row.size} | {row.dtype} | {row.mode} |" in sections[op] for row in own)
        assert ("This op is not measured on this machine." in sections[op]) == (not own)
    assert command.main([*arguments, "--check"]) == 0
    picture = folder / "overview.svg"
    for file, before, after in (
        (folder / "machine.md", "easured", "easuring"),
        (index, "machine.md", "other.md"),
        (picture, "fastest", "slowest"),
    ):
        environment.write_text(file, file.read_text().replace(before, after))
        capsys.readouterr()
        assert command.main([*arguments, "--check"]) == 1 and str(file) in capsys.readouterr().out
        assert command.main(arguments) == 0
    reliable.write_text("no markers")
    assert command.main([*arguments, "--check"]) == 1
    assert f"{reliable}: no <!-- reliability:begin -->" in capsys.readouterr().out


def test_lint_needs_no_results(tmp_path):
    """A copy without the folder of results: every module is imported and the documents count as right."""
    tree = tmp_path / "tree"
    for folder in ("benchmarks", "docs"):
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(environment.ROOT / folder, tree / folder, ignore=ignored)
    (tree / "fss_kernels").symlink_to(environment.ROOT / "fss_kernels")
    (tree / "fss_models").symlink_to(environment.ROOT / "fss_models")
    env = {**os.environ, "PYTHONPATH": str(tree)}
    modules = ", ".join(f"benchmarks.{p.stem}" for p in sorted((tree / "benchmarks").glob("[a-z]*.py")))
    for options in (["-c", f"import fss_kernels, {modules}"], ["-m", "benchmarks", "readme", "--check"]):
        done = subprocess.run([sys.executable, *options], cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"there are no results in {tree / 'benchmarks' / 'results'}" in done.stdout


def page(ops: tuple = (), networks: tuple = (), sweeps: tuple = (), overhead: tuple = (), lines: tuple = ()) -> str:
    """The page of a machine with these results; every op that has rows is shown."""
    runs = {"ops": ops, "networks": networks, "sweeps": sweeps, "overhead": overhead}
    return pages.machine_page({kind: [*results] for kind, results in runs.items()}, [], [*lines])


def entry(op: str, ratio: float, provider: str = measure.OURS, **fields) -> dict:
    """A row that takes 2 ms times the ratio, moves 3 MB and reaches half of the roof."""
    e = {"op": op, "size": "a", "dtype": "float32", "mode": "forward", "provider": provider, "correct": True}
    e |= {"seconds": {"median": 2e-3 * ratio, "samples": 6}, "ratio_to_ours": ratio, "roof_fraction": 0.5}
    return e | {"bytes": 3e6, "extra_bytes": 4e5, "scratch_bytes": 4e5, "gflops": 7.0, "bound": "memory"} | fields


def result_file(rows: list[dict], peers: tuple = (), **fields) -> dict:
    ops = list(dict.fromkeys(r["op"] for r in rows))
    return {**environment.environment(), "plan": {"ops": ops}, "peers": list(peers), "rows": rows, "notes": []} | fields


@pytest.mark.parametrize(
    ("value", "text", "winner"),
    [
        (0.5, "**0.50**", "peer"),
        (0.964, "**0.96**", "peer"),
        (0.966, "0.97 (tie)", "tie"),
        (1.034, "1.03 (tie)", "tie"),
        (1.036, "1.04", "ours"),
        (12.34, "12.3", "ours"),
        (1234.5, "1234", "ours"),
    ],
)
def test_a_ratio_says_who_wins(value, text, winner):
    assert (report.ratio(value), report.verdict(value)) == (text, winner)


def test_a_page_lists_where_we_do_not_win():
    """Rows in which a peer is faster, or as fast, and the promises that are not kept, of the ops measured."""
    ratios = {"a": 0.9, "b": 1.01, "c": 2.0}
    rows = [
        entry("an_op", r, name, size=size) for size, x in ratios.items() for name, r in ((measure.OURS, 1), ("p", x))
    ]
    key = {"op": "an_op", "dtype": "float32", "mode": "forward", "level": "must"}
    lines = [
        {**key, "size": "a", "metric": "roof", "at_least": 0.6, "issue": "most of the roof", "short": "two things"},
        {**key, "size": "a", "metric": "peer:p", "at_least": 1.6, "issue": "faster than p"},
        {**key, "size": "c", "metric": "peer:p", "at_least": 1.6, "issue": "much faster than p"},
        {**key, "size": "d", "metric": "extra_bytes", "at_most": 1.05, "issue": "no row"},
        {**key, "op": "another_op", "size": "a", "metric": "roof", "at_least": 0.6, "issue": "not measured"},
    ]
    text = page([result_file(rows)], lines=lines)
    assert "\nA peer is faster in 1 of 3 rows: an_op a forward (p 0.90).\n" in text
    assert "\nA peer is as fast in 1 of 3 rows: an_op b forward (p 1.01).\n" in text
    assert "| p | **0.90** |" in text and "| p | 1.01 (tie) |" in text and "| p | 2.00 |" in text
    assert "This machine keeps 1 of 4 promises of `benchmarks/targets.toml` for these rows." in text
    short = text.partition("It misses these:")[2].partition("---:|---|\n")[2].splitlines()
    assert short[:3] == [
        "| most of the roof | an_op a forward | roof ≥ 0.6 | 0.500 | two things |",
        "| faster than p | an_op a forward | peer:p ≥ 1.6 | 0.900 | \N{EN DASH} |",
        "| no row | an_op d forward | extra_bytes ≤ 1.05 | \N{EN DASH} | \N{EN DASH} |",
    ]
    assert "much faster than p" not in text and "not measured" not in text
    kept = page([result_file(rows[4:])], lines=lines[2:3])
    assert "keeps all 1 promises" in kept and "It misses" not in kept and "A peer is" not in kept


def test_a_page_compares_with_released_code(monkeypatch):
    """The fastest of it, not the slowest peer; a file from before the field asks the op's peers; a dash without any."""
    rows = [entry("an_op", r, name) for name, r in ((measure.OURS, 1), ("fast", 2), ("slow", 50), ("late", 60))]
    records = [{"op": "an_op", "name": name, "error": None, "version": ""} for name in ("fast", "slow", "late")]
    ours = "| a | float32 | forward | 2.00 | 7 | 3.0 | 50 | memory | fast | 2.00 |"
    assert f"{ours} \N{EN DASH} | \N{EN DASH} | 0.4 |" in page([result_file(rows, records)])
    known = [SimpleNamespace(name="fast", released=False), SimpleNamespace(name="late", released=True)]
    monkeypatch.setattr(peers, "of", lambda op: known)
    assert f"{ours} late | 60.0 | 0.4 |" in page([result_file(rows, records)])
    new = [r | {"released": r["name"] != "fast"} for r in records]
    assert f"{ours} slow | 50.0 | 0.4 |" in page([result_file(rows, new)])


def test_a_page_names_what_a_run_lacked():
    """Peers that were missing, those on which the compiler crashed, and a roof that did not count products."""
    errors = {"here": None, "absent": "No module named 'absent'", "other": "does this on a GPU only"}
    records = [{"op": "an_op", "name": n, "error": e, "version": ""} for n, e in errors.items()]
    rows = [entry("an_op", 1), entry("an_op", 2, "here")]
    notes = ["an_op[a, float32, forward] here: raised InductorError: AssertionError", "b_op[a] p: raised InductorError"]
    text = page([result_file(rows, records, notes=notes)])
    assert "Each row has 6 samples of our time. These peers were missing: absent, other (GPU only). PyTorch" in text
    assert "PyTorch's compiler crashed on an_op[a, float32, forward] here.\n" in text
    assert "b_op" not in text and "memory traffic alone" not in text
    before = [{k: v for k, v in r.items() if k != "bound"} for r in rows]
    assert "of our time. The roof counts memory traffic alone.\n" in page([result_file(before)])


def test_an_op_has_its_own_rows():
    """Of results with several ops; peers of other ops stay away, and an op without rows is not measured."""
    rows = [entry(op, r, name) for op in ("one", "two") for name, r in ((measure.OURS, 1), (f"peer of {op}", 2))]
    records = [{"op": op, "name": f"absent of {op}", "error": "no", "version": ""} for op in ("one", "two")]
    runs = {**{kind: [] for kind in pages.KINDS}, "ops": [result_file(rows, records)]}
    sections = pages.machine_page(runs, ["three", "two", "one"], []).split("\n### ")[1:4]
    assert [part.partition("\n")[0] for part in sections] == ["three", "two", "one"]
    assert "This op is not measured on this machine." in sections[0] and "|" not in sections[0]
    for part, own, other in ((sections[1], "two", "one"), (sections[2], "one", "two")):
        assert part.count(f"| peer of {own} |") == 1 and f"absent of {own}." in part and f"of {other}" not in part
        assert "not measured" not in part


@pytest.mark.parametrize("worker, recorded", [(False, 1), (True, 0)])
def test_a_round_is_recorded_once(monkeypatch, tmp_path, worker, recorded):
    """By the process that starts the workers; too few examples of an op count as failures."""
    import conftest

    rounds = tmp_path / "rounds.jsonl"
    rounds.touch()
    monkeypatch.setattr(conftest, "STARTED", 5)
    monkeypatch.setenv("FUZZ_EXAMPLES", "200")
    monkeypatch.setenv("FUZZ_OUT", str(rounds))
    counts = {name: 500 for name in OPS} | {OPS[0]: 499}
    reports = [SimpleNamespace(user_properties=[("examples", counts)])]
    reporter = SimpleNamespace(
        stats={"failed": ["one"]}, getreports=lambda name: reports, write_line=lambda *args, **kwargs: None
    )
    plugins = SimpleNamespace(get_plugin=lambda name: reporter)
    config = SimpleNamespace(
        pluginmanager=plugins, getoption=lambda name: "7", **({"workerinput": {}} if worker else {})
    )
    session = SimpleNamespace(config=config, exitstatus=0)
    conftest.pytest_sessionfinish(session, 0)
    wanted = {"start": 5, "seed": "7", "examples": dict(sorted(counts.items())), "failed": 2}
    assert [json.loads(line) for line in rounds.read_text().splitlines()] == [wanted] * recorded
    added = []
    monkeypatch.setattr(reliability, "add_round", lambda *args: added.append(args))
    assert command.main(["record", "fuzz", str(rounds)]) == 0
    assert added == [("5", "7", wanted["examples"], 2)] * recorded
    assert bool(session.exitstatus) == bool(recorded)


def test_every_mended_bug_has_a_test():
    tests = Path(__file__).parent
    text = "".join(path.read_text() for path in tests.rglob("*.py"))
    mended = (tests.parent / "CHANGELOG.md").read_text().partition("### Fixed")[2].split("\n- ")[1:]
    assert mended
    for bug in mended:
        names = re.findall(r"`(test_\w+(?:\.py)?)`", bug)
        missing = [n for n in names if not ([*tests.rglob(n)] if n.endswith(".py") else f"def {n}(" in text)]
        assert names and not missing, bug


def test_a_planted_fault_is_taken_back(tmp_path, monkeypatch):
    """Source and compiled library: the next fault, in Python, runs on kernels without any."""
    fault = mutants.faults.find("dynamic_conv2d/grad-x-not-flipped")
    header, library = fault.file, tmp_path / "fss_kernels" / "_fss_cpu.so"
    for path, content in ((tmp_path / header, (mutants.ROOT / header).read_bytes()), (library, b"built")):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    seen = []
    monkeypatch.setattr(mutants, "build", lambda copy: library.write_bytes(b"faulty"))
    monkeypatch.setattr(mutants, "failure", lambda copy, call: seen.append((library.read_bytes(), call)) or "a test")
    before = (tmp_path / header).read_text()
    assert mutants.catch(fault, tmp_path) == "a test" and seen[0][0] == b"faulty"
    assert library.read_bytes() == b"built" and (tmp_path / header).read_text() == before


def test_long_runs_are_counted(tmp_path, monkeypatch):
    """Rounds of one fuzz run add up, those of an earlier run do not; a run that was never made says so."""
    monkeypatch.setattr(storage, "RESULTS", tmp_path)
    assert reliability.markdown().count("no whole run is recorded yet") == 3
    reliability.add_round("1", "7", {"masked_avg_pool": 9000}, 1)
    started = str(int(time.time()) - 1800)
    for seed, count in ((8, 500), (9, 700)):
        reliability.add_round(started, str(seed), {"masked_avg_pool": count, "dense_cosine_max": 1}, 0)
    assert [r["seed"] for r in reliability.read("fuzz")["rounds"]] == ["8", "9"]
    cases = [{"op": op, "isa": "avx2", "sanitizer": s, "count": 30} for op in ("a", "b") for s in ("thread", "address")]
    reliability.record("sanitize", {"seed": 1, "cases": cases, "failures": ["x"]})
    faults = {"a/one": "test", "a/two": None, "b/one": "test"}
    reliability.record("mutants", {"whole": 5, "planted": 3, "caught": 2, "faults": faults, "not_run": ["a/z"]})
    assert "| `make mutants` | no whole run is recorded yet" in reliability.markdown()
    reliability.record("mutants", {"whole": 4, "planted": 3, "caught": 2, "faults": faults, "not_run": ["a/z"]})
    log = {**environment.environment(), "wheel": {"file": "w.whl"}, "runs": [{"torch": "2.15.0"}, {"torch": "2.10.0"}]}
    assert reliability.wheel_log("linux") is None
    assert reliability.record_wheel("linux", log) == tmp_path / "wheel" / "linux.csv"
    assert reliability.wheel_log("linux") == log
    found = reliability.read("mutants")
    assert (found["faults"], found["not_run"], found["whole"]) == (faults, ["a/z"], 4)
    fuzzed, sanitized, mutants, wheel = reliability.markdown().splitlines()[2:]
    assert "2 rounds in 30 minutes, 1,202 random calls: dense_cosine_max 2, masked_avg_pool 1,200 | 0 tests" in fuzzed
    assert "60 calls under thread, 60 calls under address: a, b | 1 failed" in sanitized
    assert "3 planted faults: a 2, b 1; 1 more, of" in mutants and "| 2 caught" in mutants and "2.10.0, 2.15.0" in wheel


def test_the_newest_results_of_every_op_count(results, tmp_path, monkeypatch, capsys):
    """An older run keeps the ops that a newer one has not, and another machine its own; a line of an op without
    results is missing."""
    monkeypatch.setattr(storage, "RESULTS", tmp_path)

    def write(name, op, date, machine="machine"):
        one = copy.deepcopy(results)
        one["environment"]["date"] = date
        one["plan"]["ops"] = [op]
        for record in one["rows"] + one["peers"]:
            record["op"] = op
        storage.write(tmp_path / "ops" / f"{machine}.csv", name, one)
        return one["rows"]

    write("a", "one", "2026-01-01T00:00:00+00:00")
    rows = write("b", "one", "2026-01-03T00:00:00+00:00")
    write("c", "two", "2026-01-02T00:00:00+00:00")
    write("d", "two", "2026-01-01T00:00:00+00:00", "another")
    chosen = {(r["machine"], r["name"]): {row["op"] for row in r["rows"]} for r in storage.newest("ops", "networks")}
    assert chosen == {("machine", "b"): {"one"}, ("machine", "c"): {"two"}, ("another", "d"): {"two"}}
    ours = next(r for r in rows if r["provider"] == measure.OURS)
    lines = tmp_path / "lines.toml"
    line = '[[line]]\nop = "{}"\nsize = "{}"\ndtype = "{}"\nmode = "{}"\nmetric = "roof"\nat_least = 0\nissue = "x"\n'
    key = [ours[n] for n in ("size", "dtype", "mode")]
    lines.write_text(line.format("one", *key) + line.format("two", *key))
    assert command.main(["check", "--lines", str(lines)]) == 0
    assert "3 pass, 0 SHORT, 0 MISSING" in capsys.readouterr().out
    lines.write_text(line.format("one", *key) + line.format("three", *key))
    assert command.main(["check", "--lines", str(lines)]) == 1
    assert "not measured: three" in capsys.readouterr().out


def test_run_refuses_unknown_ops(capsys):
    assert command.main(["run", "--ops", "nothing"]) == 2
    assert "unknown ops nothing" in capsys.readouterr().out


def test_run_says_how_to_get_the_ceilings(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fss_kernels._native", None)
    assert command.main(["run", "--ops", OPS[0]]) == 2
    assert "run `FSS_KERNELS_BUILD=native python setup.py build_ext --inplace`" in capsys.readouterr().out


def test_numerics_need_no_command_line_packages():
    code = "import sys, benchmarks.measure; print(sorted({'jsonargparse', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_run_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "results.csv"
    spec = testing.specs()["masked_avg_pool"]
    size = next(iter(spec.sizes))
    options = ["--tiny", "--sizes", size, "--exclude", *COMPILED, "--rounds", "2", "--repeats", "2"]
    assert command.main(["run", "--ops", "masked_avg_pool", *options, "--out", str(out)]) == 0, capsys.readouterr().out
    found = storage.run(out, "ops")
    assert found["failures"] == [] and "clean" in found["environment"] and "commit" in found["environment"]
    assert found["environment"]["allocator"] == environment.ALLOCATOR
    assert found["environment"]["threads"] == environment.cores()
    assert min(found["ceilings"][when]["read_gbps"] for when in ("before", "after")) > 0
    assert {e["provider"] for e in found["rows"]} >= {measure.OURS, "ceiling:read", "ceiling:write", "ceiling:fma"}
    assert "ceiling:copy" not in {e["provider"] for e in found["rows"]} and found["ceilings"]["after"]["copy_gbps"] > 0
    counts = {e["provider"]: e["seconds"]["samples"] for e in found["rows"]}
    assert counts[measure.OURS] == 4 and set(counts.values()) <= {2, 4}  # a hopeless peer has one round
    assert "max_error" in found["rows"][0] and found["rows"][0]["correct"]
