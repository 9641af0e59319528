"""What a result depends on besides the code: machine, versions, allocator, commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # committed files
PAGES = ROOT / "docs" / "benchmarks"  # written from them
FOLDERS = ("csrc", "fss_kernels/ops")  # each with a folder an op
# How it is measured, and built.
MEASURING = ["setup.py", "constraints.txt", "benchmarks/suite"]
MEASURING += [f"benchmarks/{name}.py" for name in ("ceilings", "measure", "peers", "sweeps")]
# glibc gives large blocks back to the system at once and PyTorch asks for them again: every call would pay for page
# faults, and eager code 3 to 6 times over. These settings keep the memory in the process.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def output(*command: str) -> str:
    """What a command prints; empty when it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu() -> str:
    """Model of the processor; virtual machines often hide the name, so family and model are part of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def machine_slug() -> str:
    """File name of this machine's committed results."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu()} {cores()} cores".lower()).strip("-")


def sources(*ops: str) -> list[str]:
    """What the kernels in these folders of ops are made of, or all kernels, as git names paths: ops that these do not
    import, directly or through others, are left out."""
    modules = [*ROOT.glob("fss_kernels/ops/*/*.py")]
    needed, found = {*ops}, [*ops]
    while found:
        op = found.pop()
        text = "\n".join(p.read_text() for p in modules if p.parent.name == op)
        new = {*re.findall(r"^from fss_kernels\.ops\.(\w+)", text, re.MULTILINE)} - needed
        needed |= new
        found += new
    others = sorted({p.parent.name for p in modules} - needed) if ops else []
    only_tested = [
        f":(exclude){name}" for name in ("*.md", "*_fuzz.cpp", "fss_kernels/ops/*/fuzz.py", "fss_kernels/ops/*/aot.py")
    ]
    return ["csrc", "fss_kernels", *only_tested, *(f":(exclude){at}/{o}" for o in others for at in FOLDERS)]


def unchanged(commit: str, *paths: str) -> bool:
    """Whether these are as in the commit."""
    command = ["git", "diff", "--quiet", commit, "--", *paths]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def measured(results: dict[str, Any] | None, plan: dict[str, Any], *paths: str) -> bool:
    """Whether results are of this plan and PyTorch, from a clean tree in which these paths did not change; says so."""
    import torch

    if results is None:
        return False
    env = results["environment"]
    same = results.get("plan", {}) == json.loads(json.dumps(plan)) and env["torch"] == torch.__version__
    found = same and env["clean"] and unchanged(env["commit"], *MEASURING, *paths)
    if found:
        ops = ", ".join(plan["ops"])
        print(f"{ops}: measured already, from the same sources; without --resume it is measured again", flush=True)
    return found


def environment() -> dict[str, Any]:
    """The environment block of a result file."""
    import torch

    from fss_kernels import __version__, _loading

    commit = output("git", "rev-parse", "HEAD")
    # what git does not track does not count, nor what earlier runs measured
    own = [f":!{folder.relative_to(ROOT)}" for folder in (RESULTS, PAGES)]
    changed = output("git", "status", "--porcelain", "-uno", "--", ".", *own)
    return {
        "environment": {
            "cpu": cpu(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "isa": _loading.cpu_isa(),
            "fss_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": output("gcc", "--version").partition("\n")[0],
            "os": platform.platform(),
            "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit or None,
            "clean": bool(commit) and not changed,
        },
    }


def write_text(path: str | Path, text: str) -> None:
    """Writes to a temporary name and renames, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: str | Path, data: Any) -> None:
    """The same for JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")
