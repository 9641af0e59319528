"""The GPU stages: ``python -m benchmarks gpu --stage build-test|core|peers|models --out DIR [--dry]``. Offline.

This process builds, runs the GPU tests and watches the process that measures (``benchmarks.gpu_timing``). What was
measured is in ``DIR/<stage>.jsonl``, line by line, and soon after in the result file ``DIR/h200.csv``, where all stages
meet: a stage that hangs or crashes keeps its rows. Exit code 0: the stage is complete and our numbers are right.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import environment, storage

STAGES = ("build-test", "core", "peers", "models")
MERGED, RUN = "h200.csv", "gpu"  # the result file and its run
LOG = "gpu.log"  # what the build and the tests print
LIMIT = 540.0  # the watchdog's seconds; no row begins after 5/6 of them


def append(path: Path, **entry: Any) -> None:
    """Adds one line to a file of lines and makes sure that it is on the disk; a line cut off before it stays alone."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut off does not count."""
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def merge(out: Path) -> dict[str, Any]:
    """Writes all stages into one file; a stage without lines here stays as an earlier run left it in that file."""
    path = out / MERGED
    merged = storage.run(path, RUN) or {"stages": {}, "rows": []}
    for stage in STAGES:
        if not (out / f"{stage}.jsonl").exists():
            continue
        summary: dict[str, Any] = {"status": "not finished", "calibration": [], "steps": []}
        rows = []
        for line in lines(out / f"{stage}.jsonl"):
            kind = line.pop("kind")
            if kind == "row":
                rows.append(line)
            elif kind == "environment":
                found = line["environment"]
                merged["environment"] = summary["environment"] = {
                    **found,
                    "commit": found["commit"] or summary["commit"],
                }
            elif kind in ("start", "end"):
                summary |= line
            elif kind in ("calibration", "step"):
                summary["calibration" if kind == "calibration" else "steps"].append(line)
        merged["stages"][stage] = summary
        merged["rows"] = [r for r in merged["rows"] if r["stage"] != stage] + rows
    storage.write(path, RUN, merged)
    return merged


def watch(command: list[str], until: float, tick: Callable[[], Any] = lambda: None, **options: Any) -> int | None:
    """Runs a command in a process group of its own; its exit code, or None when it had to be ended at ``until``."""
    with subprocess.Popen(command, cwd=environment.ROOT, start_new_session=True, **options) as child:
        try:
            while time.monotonic() < until:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(min(10.0, max(0.01, until - time.monotonic())))
                tick()
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def step(out: Path, stage: str, name: str, command: list[str], until: float, env: dict[str, str]) -> bool:
    """Runs one step with its output in the log and records how it ended; whether it ended well."""
    start = time.monotonic()
    with (out / LOG).open("a") as log:
        print(f"== {stage}: {name}: {' '.join(command)}", file=log, flush=True)
        offset = log.tell()
        code = watch(command, until, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT)
    text = (out / LOG).read_bytes()[offset:].decode(errors="replace").splitlines()
    seconds = round(time.monotonic() - start, 1)
    entry = {"name": name, "code": code, "seconds": seconds, "summary": text[-1] if text else ""}
    entry["failed"] = [line for line in text if line.startswith(("FAILED", "ERROR"))][:100]
    entry["skipped"] = [line for line in text if line.startswith("SKIPPED")][:100]
    if code is None:
        entry["summary"] = f"stopped after {seconds} s; last line: {entry['summary']}"
    append(out / f"{stage}.jsonl", kind="step", **entry)
    print(f"{stage}: {name}: code {code}, {seconds} s: {entry['summary']}", flush=True)
    return code == 0


def build(out: Path, stage: str, dry: bool, until: float) -> bool:
    """Compiles the libraries into the package for this generation of GPU; a dry run only asks setup.py for help."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--help" if dry else "--inplace"]
    environ = {"FSS_KERNELS_BUILD": "auto", "TORCH_CUDA_ARCH_LIST": "9.0"}
    return step(out, stage, "build", command, until, environ)


def tests(out: Path, stage: str, until: float) -> bool:
    """The GPU tests in a process of their own."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-ra", "--tb=short", "-o", "addopts="]
    return step(out, stage, "tests", [*command, "-p", "no:cacheprovider"], until, {"PYTHONUNBUFFERED": "1"})


def failures(merged: dict[str, Any], stage: str) -> list[str]:
    """Our own kernels that were wrong, raised or were above the roof."""
    rows = [r for r in merged["rows"] if r["stage"] == stage and r["provider"].startswith(("fss_kernels:", "all"))]
    wrong = [r for r in rows if r["refused"] and (r["correct"] is not None or r["provider"] == "all")]
    return [f"{r['op']}[{r['size']}, {r['dtype']}, {r['mode']}] {r['provider']}: {r['refused']}" for r in wrong]


def run(
    stage: str,
    out: Path,
    dry: bool = False,
    limit: float = LIMIT,
    resume: bool = False,
    commit: str = "",
    worker: list[str] | None = None,
) -> int:
    """Runs one stage; ``worker`` replaces the command that measures. The exit code."""
    start = time.monotonic()
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{stage}.jsonl"
    if not resume:
        path.unlink(missing_ok=True)
    commit = commit or environment.output("git", "rev-parse", "HEAD")
    append(path, kind="start", stage=stage, dry=dry, limit=limit, commit=commit)
    good = True
    library = environment.ROOT / "fss_kernels" / "_fss_cuda.so"
    sources = any(environment.ROOT.glob("csrc/*/*_cuda.cu"))
    if stage == "build-test" or (sources and not dry and not library.exists()):
        good = build(out, stage, dry, start + 0.4 * limit)
    if stage == "build-test":
        good = tests(out, stage, start + 0.8 * limit) and good
    merge(out)

    code: int | None = 1
    while code not in (0, 2, None):
        begun = sum(line["kind"] == "begin" for line in lines(path))
        left = start + limit - time.monotonic()
        call = f"run({stage!r}, Path({str(path)!r}), {dry}, {max(0.0, left - limit / 6)})"
        program = f"import sys; from pathlib import Path; from benchmarks.gpu_timing import run; sys.exit({call})"
        command = [sys.executable, "-c", program]
        code = watch(worker or command, start + limit, lambda: merge(out))
        if code not in (0, None):
            print(f"{stage}: the measuring process ended with code {code}", flush=True)
            if sum(line["kind"] == "begin" for line in lines(path)) == begun:
                break  # not a row that crashed: starting again would not help
    if code != 0:
        seconds = round(time.monotonic() - start, 1)
        why = f"stopped by the watchdog after {seconds} s" if code is None else f"ended with code {code}"
        append(path, kind="end", status=why)
    merged = merge(out)
    status = merged["stages"][stage]["status"]
    wrong = failures(merged, stage)
    for line in wrong:
        print(f"FAILED: {line}", flush=True)
    rows = sum(r["stage"] == stage for r in merged["rows"])
    print(f"{stage}: {status}; {rows} rows -> {out / MERGED}", flush=True)
    return int(not (good and status == "complete" and not wrong))
