"""The GPU stages without a GPU: every code path, refusals, the watchdog and the one merged file."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time

import pytest
import sanitize
import torch

from benchmarks import environment, gpu, gpu_timing, measure, models, peers, storage
from fss_kernels import _loading, _op, testing

pytestmark = pytest.mark.slow

ROW = measure.rows(measure.Plan(("masked_avg_pool",), tiny=True))[0]
CEILINGS = dict.fromkeys(("read_gbps", "write_gbps", "copy_gbps", "gemm_fp32_gflops", "gemm_bf16_gflops"), 1e6)
OURS = f"{measure.OURS}:reference"
NETWORK_PROVIDERS = tuple(f"{measure.OURS}:{name}" for name in ("default", "triton", "reference"))


@pytest.fixture
def no_compiler(monkeypatch):
    """Peers are traced, not compiled."""
    monkeypatch.setattr(peers, "COMPILE", {**peers.COMPILE, "backend": "aot_eager", "mode": None})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All stages, dry, in one folder."""
    out = tmp_path_factory.mktemp("gpu")
    codes = {stage: gpu.run(stage, out, dry=True) for stage in gpu.STAGES}
    assert codes == dict.fromkeys(gpu.STAGES, 0)
    return out


def entries(stage: str = "core", ceilings: dict = CEILINGS) -> dict[str, dict]:
    group = gpu_timing.Group(ROW, stage, gpu_timing.Clock(dry=True), ceilings)
    return {e["provider"]: e for e in group.entries()}


def test_a_dry_run_needs_nothing_but_a_clone(tmp_path):
    """Where there is no .venv yet it is made first; on a GPU, without DRY, Python is the machine's own."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(environment.ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()

    def commands(*options: str) -> str:
        call = ["make", "-n", "gpu", *options]
        return subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    dry, real = commands("DRY=1"), commands("OUT=out", "STAGE=core")
    assert 0 <= dry.find("-m venv .venv") < dry.find(".venv/bin/python -m benchmarks gpu")
    assert " python3 -m benchmarks gpu" in real and ".venv" not in real


def test_stages_meet_in_one_file(folder):
    assert len(list(folder.iterdir())) <= 8 and not [p for p in folder.iterdir() if p.is_dir()]
    merged = storage.run(folder / gpu.MERGED, gpu.RUN)
    assert list(merged["stages"]) == list(gpu.STAGES)
    assert {s["status"] for s in merged["stages"].values()} == {"complete"}
    steps = {s["name"]: s for s in merged["stages"]["build-test"]["steps"]}
    assert [steps["build"]["code"], steps["tests"]["code"]] == [0, 0]
    assert "skipped" in steps["tests"]["summary"] or torch.cuda.is_available()
    found = merged["stages"]["build-test"]["calibration"][0]
    probes = {"copy_gbps", "write_gbps", "read_gbps", "launch_cpp", "launch_triton"}
    probes |= {f"gemm_{kind}_gflops" for kind in ("bf16", "tf32", "fp32", "fp8")}
    assert probes == (set(found) | set(found["unavailable"])) - {"kind", "when", "device", "unavailable"}
    for stage in ("core", "peers"):
        assert [c["when"] for c in merged["stages"][stage]["calibration"]] == ["before", "after"]
    assert merged["environment"]["dry"] and merged["environment"]["gpu"]["name"]


def test_calibration_leaves_the_precision_flags_readable():
    """torch.compile reads the older flags and fails when they disagree with `fp32_precision`."""
    before = torch.get_float32_matmul_precision()
    gpu_timing.calibrate(gpu_timing.Clock(dry=True))
    assert torch.get_float32_matmul_precision() == before and not torch.backends.cuda.matmul.allow_tf32


def test_every_row_is_checked_or_refused(folder):
    rows = storage.run(folder / gpu.MERGED, gpu.RUN)["rows"]
    providers = {stage: {r["provider"] for r in rows if r["stage"] == stage} for stage in gpu.STAGES}
    assert {r["op"] for r in rows if r["stage"] in ("core", "peers")} == set(testing.specs())
    assert {OURS, "panet", "compile(panet)", "grouped", "compile(grouped)"} <= providers["core"]
    assert providers["peers"] >= providers["core"] | {"adjoint-bmm", "max-autotune(panet)", "max-autotune(grouped)"}
    assert providers["models"] == set(NETWORK_PROVIDERS) and not providers["build-test"]
    for row in rows:
        assert row["device"] and (row["refused"] is None) == (row["seconds"] is not None), row
        if row["seconds"] is not None:
            assert row["correct"] is True
            if row["stage"] == "models":
                continue
            assert 0 < row["roof_fraction"] <= measure.ROOF_SLACK
            assert set(row["clocks"]) == {"graph", "do_bench", "wall"} and row["clock"] == "graph"


def test_networks_are_measured_in_both_modes(folder):
    """The default backends and the reference have times; Triton has them, or the reason why not."""
    rows = [r for r in storage.run(folder / gpu.MERGED, gpu.RUN)["rows"] if r["stage"] == "models"]
    keys = [(r["op"], r["mode"], r["dtype"], r["provider"]) for r in rows]
    wanted = {(n, m, d, p) for n in ("dpcn", "dpnet") for m in ("train", "evaluate") for d in gpu_timing.DTYPES
              for p in NETWORK_PROVIDERS}  # fmt: skip
    assert set(keys) == wanted and len(keys) == len(wanted)
    seconds = {key: row["seconds"] for key, row in zip(keys, rows, strict=True)}
    for (op, mode, dtype, provider), row in zip(keys, rows, strict=True):
        if provider.endswith("triton"):
            assert row["refused"] == _loading.missing("triton") and row["correct"] is None
            continue
        assert row["refused"] is None and row["size"] == models.QUICK.label and row["batch"] == 1
        assert row["max_error"] <= models.TOLERANCE[dtype] and (row["max_error"] == 0 or "default" in provider)
        assert row["clock"] == "events" and set(row["clocks"]) == {"events", "wall"}
        assert row["seconds"]["samples"] == 3 and row["throughput"] == pytest.approx(1 / row["seconds"]["median"])
        default = seconds[op, mode, dtype, f"{measure.OURS}:default"]["median"]
        assert row["ratio_to_ours"] == pytest.approx(row["seconds"]["median"] / default)
        assert row["extra_bytes"] > 0 and row["peak_bytes"] is None


def test_a_network_with_wrong_numbers_gets_no_speed(monkeypatch):
    """Wrong gradients of one kernel refuse the training step of the default backends; evaluation has its time."""
    implementation = _op.ops["masked_avg_pool"].backends["cpp"]
    backward = implementation.backward
    monkeypatch.setattr(implementation, "backward", lambda *args: [g * 1.5 for g in backward(*args)])
    clock = gpu_timing.Clock(dry=True)
    points = {p.mode: p for p in gpu_timing.network_points(clock) if (p.op, p.dtype) == ("dpcn", "float32")}
    for mode, wrong in (("evaluate", False), ("train", True)):
        found = {e["provider"]: e for e in points[mode].entries()}
        ours, reference = found[f"{measure.OURS}:default"], found[OURS]
        assert ours["correct"] is not wrong and (ours["seconds"] is None) == wrong == bool(ours["refused"])
        assert reference["correct"] and reference["seconds"] and (reference["ratio_to_ours"] is None) == wrong
        assert ours["extra_bytes"] is None if wrong else ours["extra_bytes"] > 0
        lines = gpu.failures(
            {"rows": [{"stage": "models", **vars(points[mode]), **e} for e in found.values()]}, "models"
        )
        assert len(lines) == wrong and all("differs from the reference" in line for line in lines)


def test_networks_resume_and_a_crash_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "models.jsonl"
    ids = [p.id for p in gpu_timing.network_points(gpu_timing.Clock(dry=True))]
    assert len(set(ids)) == 8 and "dpcn[tiny-65, bfloat16, train]" in ids
    assert gpu_timing.run("models", path, True, 0.0) == 0
    assert gpu.lines(path)[-1]["status"].startswith("out of time: 8 of 8 rows left")
    for group in ids[:-1]:
        gpu.append(path, kind="begin", group=group)
    monkeypatch.setattr(models, "network_tasks", lambda *args: 1 / 0)
    assert gpu_timing.run("models", path, True, 60.0) == 0
    found = gpu.lines(path)
    assert [ln["group"] for ln in found if ln["kind"] == "begin"] == ids and found[-1]["status"] == "complete"
    (row,) = (ln for ln in found if ln["kind"] == "row")
    assert (row["op"], row["dtype"], row["mode"]) == ("dpnet", "bfloat16", "train")
    assert row["provider"] == "all" and "ZeroDivisionError" in row["refused"]


def test_a_check_of_a_network_leaves_the_precision_flags_as_they_were():
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision, torch.backends.cudnn.deterministic
    with gpu_timing._full_precision():
        assert (convolutions.fp32_precision, torch.backends.cudnn.deterministic) == ("ieee", True)
    assert (convolutions.fp32_precision, torch.backends.cudnn.deterministic) == before
    assert torch.backends.cudnn.allow_tf32 in (True, False)  # raises when the flags disagree


def test_a_wrong_and_a_crashing_provider_get_no_speed(monkeypatch, no_compiler):
    spec = testing.specs()[ROW.op]
    wrong = dataclasses.replace(spec, function=lambda *args, **options: spec.function(*args, **options) * 1.001)

    def crash(*args, **options):
        raise RuntimeError("out of order")

    good = next(p for p in peers.of(ROW.op) if p.name == "eager")
    crashing = dataclasses.replace(good, name="crashing", function=crash)
    unbuilt = dataclasses.replace(good, name="unbuilt", form="unknown")
    monkeypatch.setattr(peers, "of", lambda op: (good, crashing, unbuilt))
    monkeypatch.setattr(testing, "specs", lambda: {ROW.op: wrong})
    found = entries("peers")
    assert found["eager"]["seconds"] is not None and found["eager"]["ratio_to_ours"] is None
    assert found[OURS]["correct"] is False and "times the allowed" in found[OURS]["refused"]
    assert "out of order" in found["crashing"]["refused"] and "'unknown'" in found["unbuilt"]["refused"]
    refused = [e for e in found.values() if e["refused"]]
    assert all(e["seconds"] is None and e["gbps"] is None and e["roof_fraction"] is None for e in refused)
    assert any(OURS in line for line in gpu.failures({"rows": list(found.values())}, "peers"))


def test_a_speed_above_the_roof_is_refused(no_compiler):
    found = entries(ceilings=dict.fromkeys(CEILINGS, 1e-9))
    timed = [e for e in found.values() if e["correct"]]
    assert timed and all("of the roof" in e["refused"] and e["seconds"] is None for e in timed)
    assert gpu.failures({"rows": timed}, "core")


def test_a_provider_that_cannot_be_captured_is_timed_by_events(monkeypatch, no_compiler):
    monkeypatch.setattr(gpu_timing.Clock, "replay", lambda *args: 1 / 0)
    found = entries()[OURS]
    assert found["clock"] == "do_bench" and found["seconds"] and "ZeroDivisionError" in found["note"]


def worker(tmp_path, body: str) -> list[str]:
    """A stand-in for the measuring process: writes rows, then does what ``body`` says."""
    path = tmp_path / "core.jsonl"
    code = f"""
import json, sys, time
def write(**line):
    with open({str(path)!r}, "a") as file:
        file.write(json.dumps(line) + "\\n")
row = dict(stage="core", op="o", size="s", dtype="d", mode="m", provider="p", correct=True, seconds=None, refused=None)
write(kind="begin", group="a"); write(kind="row", **row)
{body}
"""
    return [sys.executable, "-c", code]


def test_the_watchdog_keeps_what_was_measured(tmp_path):
    start = time.monotonic()
    hang = worker(tmp_path, f"open({str(tmp_path / 'core.jsonl')!r}, 'a').write('{{\"cut'); time.sleep(60)")
    assert gpu.run("core", tmp_path, dry=True, limit=2.0, worker=hang) == 1
    assert time.monotonic() - start < 20
    merged = storage.run(tmp_path / gpu.MERGED, gpu.RUN)
    assert "watchdog" in merged["stages"]["core"]["status"] and len(merged["rows"]) == 1


def test_a_crash_starts_again_while_rows_advance(tmp_path):
    seen = f"n = open({str(tmp_path / 'core.jsonl')!r}).read().count('begin')"
    body = f"{seen}\nif n < 3: sys.exit(9)\nwrite(kind='end', status='complete')"
    assert gpu.run("core", tmp_path, dry=True, limit=30.0, worker=worker(tmp_path, body)) == 0
    merged = storage.run(tmp_path / gpu.MERGED, gpu.RUN)
    assert len(merged["rows"]) == 3 and merged["stages"]["core"]["status"] == "complete"
    assert gpu.run("core", tmp_path, dry=True, limit=30.0, worker=[sys.executable, "-c", "raise SystemExit(9)"]) == 1
    merged = storage.run(tmp_path / gpu.MERGED, gpu.RUN)
    assert merged["stages"]["core"]["status"] == "ended with code 9" and merged["rows"] == []


def test_resume_and_deadline(tmp_path, monkeypatch, no_compiler):
    """No row begins after the deadline; what is left is measured when the stage resumes."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "core.jsonl"
    assert gpu_timing.run("core", path, True, 0.0) == 0
    lines = gpu.lines(path)
    count = len(testing.specs())
    assert lines[-1]["status"].startswith(f"out of time: {count} of {count}")
    assert not [ln for ln in lines if ln["kind"] == "row"]
    last = measure.rows(measure.Plan(("masked_avg_pool",), gpu_timing.DTYPES, tiny=True))[-1]
    gpu.append(path, kind="begin", group=last.id)
    assert gpu_timing.run("core", path, True, 3600.0) == 0  # all of it, however slow the machine
    groups = [ln["group"] for ln in gpu.lines(path) if ln["kind"] == "begin"]
    assert groups[0] == last.id and len(groups) == count == len(set(groups))


def test_supervisor_needs_only_the_standard_library():
    code = "import sys, benchmarks.gpu; print(sorted({'torch', 'rich', 'jsonargparse'} & set(sys.modules)))"
    assert environment.output(sys.executable, "-c", code) == "[]"


def test_sanitizer_says_when_it_does_not_run(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "program", lambda: None)
    assert sanitize.main([]) == 0 and "not run: compute-sanitizer is not installed" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "program", lambda: "/bin/true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == 0 and "not run: no GPU" in capsys.readouterr().out
