"""Checks what `make dist` built, then installs the wheel beside several PyTorch releases and verifies it there.

    python tests/distribution.py [--python PYTHON] [--out FILE] [release ...]        (make dist-check)

A release is a version of PyTorch or "newest". Each has a fresh environment outside the checkout: that PyTorch, the
wheel and what it depends on, no compiler on the PATH. --out writes what was verified, as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What PyTorch promises to keep (the C shims), and what the platform does. PyTorch also exports pieces of libstdc++, in
# every release other ones: those have no version.
STABLE = re.compile(r"(aoti_)?torch_\w+$|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$")
UNSTABLE = re.compile(r"\b(c10|at|torch)::")
WEAK = {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")
STATE = """
import importlib.metadata, json, platform
import torch, fss_kernels
from fss_kernels import _loading, _op
versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print(json.dumps({
    "torch": torch.__version__, "python": platform.python_version(), "numpy": versions.get("numpy"),
    "triton": versions.get("triton"), "isa": _loading.cpu_isa(), "threads": torch.get_num_threads(),
    "file": fss_kernels.__file__, "unavailable": _loading.unavailable,
    "defaults": {op.name: op.default_backend("cpu") for op in _op.ops.values()},
}))
"""


def foreign_symbols(library: Path) -> list[str]:
    """Undefined symbols of a library beyond PyTorch's stable C shims, libstdc++ and libc."""
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", "-C", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split(maxsplit=1)[1] for line in lines]
    return [s for s in symbols if UNSTABLE.search(s) or not (STABLE.match(s) or s in WEAK)]


def required_versions(library: Path) -> dict[str, str]:
    """The newest version of every symbol set that a library needs, as {"GLIBC": "2.32"}."""
    command = ["readelf", "-V", "-W", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Name: (\w+?)_([0-9.]+)", text)
    newest = sorted(found, key=lambda pair: [int(part) for part in pair[1].split(".")])
    return dict(sorted(dict(newest).items()))


def faults(wheel: Path, sdist: Path, folder: Path) -> list[str]:
    """What is wrong with the two files, before anything is installed."""
    found = []
    if not re.fullmatch(r"fss_kernels-[0-9.]+-py3-none-\w+\.whl", wheel.name):
        found.append(f"{wheel.name}: the tag is not py3-none-<platform>")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top = {name.partition("/")[0] for name in names}
        found += [f"{wheel.name} contains {t}" for t in top - {"fss_kernels", "fss_models"} if ".dist-info" not in t]
        libraries = [name for name in names if name.endswith(".so")]
        if libraries != ["fss_kernels/_fss_cpu.so"]:
            found.append(f"{wheel.name}: libraries {libraries}, expected _fss_cpu.so alone")
        for name in libraries:
            library = Path(archive.extract(name, folder))
            found += [f"{name} needs {symbol}" for symbol in foreign_symbols(library)]
            command = ["readelf", "-S", "-W", library]
            sections = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found += [f"{name} carries debug information"] * (".debug_info" in sections)
    tracked = subprocess.run(["git", "ls-files", "csrc", "fss_kernels", "fss_models", "tests"], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout.split()  # fmt: skip
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        for name in tracked:
            if name not in packed:
                found.append(f"{sdist.name} lacks {name}")
            elif archive.extractfile(packed[name]).read() != (ROOT / name).read_bytes():
                found.append(f"{sdist.name} is old: {name} has changed since; run `make dist`")
    found += [f"{sdist.name} contains {name}" for name in packed if name.endswith((".so", ".pyc"))]
    return found


def install(folder: Path, python: str, release: str, wheel: Path) -> None:
    """A fresh environment with a PyTorch and the wheel; pip reads the wheel's own dependencies."""
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    torch = "torch" if release == "newest" else f"torch=={release}"
    options = ["-q", "--no-compile", "--only-binary=:all:", "--disable-pip-version-check"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [folder / "bin" / "python", "-m", "pip", "install", *options, torch, wheel]
    subprocess.run(command, check=True, cwd=folder, env=environment)


def verify(folder: Path, release: str) -> dict[str, Any]:
    """`fss-kernels info` and `fss-kernels verify` of every op in the environment: one record for the log."""
    # threads that wait do not spin: tests share their machine
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder), "LANG": "C.UTF-8", "OMP_WAIT_POLICY": "passive"}
    wrong = [f"{c} is on the PATH" for c in COMPILERS if shutil.which(c, path=environment["PATH"])]

    def run(program: str, *arguments: str) -> str:
        command = [str(folder / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            wrong.append(f"{program} {arguments[0]}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    state = json.loads(run("python", "-c", STATE) or "{}")
    if not wrong and not Path(state.pop("file")).is_relative_to(folder):
        wrong.append("fss_kernels was imported from elsewhere")
    if set(state.get("defaults", {}).values()) != {"cpp"}:
        wrong.append(f"not every op runs the CPU kernels: {state}")
    run("fss-kernels", "info")
    verdicts, before = {}, os.times()
    for op in [] if wrong else state["defaults"]:
        lines = run("fss-kernels", "verify", op).splitlines()
        verdicts[op] = [line for line in lines if line.startswith("verify: ")]
        print(f"{op}: {'; '.join(verdicts[op])}", flush=True)
    after = os.times()
    return {
        "release": release,
        **state,
        "verify": verdicts,
        "cpu_seconds": round(sum(after[2:4]) - sum(before[2:4])),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "wrong": wrong,
    }


def about(wheel: Path, folder: Path) -> dict[str, Any]:
    """What identifies a wheel, and what its library needs."""
    with zipfile.ZipFile(wheel) as archive:
        needs = required_versions(Path(archive.extract("fss_kernels/_fss_cpu.so", folder)))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {"file": wheel.name, "sha256": digest, "bytes": wheel.stat().st_size, "needs": needs}


def main(arguments: list[str] | None = None) -> int:
    """Checks the files in dist/, then every release."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("releases", nargs="*", default=["2.10.0", "newest"], help="versions of PyTorch, or newest")
    parser.add_argument("--python", default=sys.executable, help="the Python of the environments")
    parser.add_argument("--out", type=Path, help="where to write what was verified")
    chosen = parser.parse_args(arguments)
    wheels, sdists = sorted((ROOT / "dist").glob("*.whl")), sorted((ROOT / "dist").glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        print(f"dist-check: dist/ holds {len(wheels)} wheels and {len(sdists)} sdists, not one each; run `make dist`")
        return 2
    with tempfile.TemporaryDirectory() as directory:
        if found := faults(wheels[0], sdists[0], Path(directory)):
            print("\n".join(found))
            return 1
    runs = []
    for release in chosen.releases:
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            print(f"dist-check: {wheels[0].name}, PyTorch {release}, {chosen.python}", flush=True)
            install(folder, chosen.python, release, wheels[0])
            run = verify(folder, release)
            if wrong := run.pop("wrong"):
                print("\n".join(wrong))
                return 1
            print(f"PyTorch {run['torch']}, Python {run['python']}: every op within bounds", flush=True)
            runs.append(run)
            if chosen.out:
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                chosen.out.write_text(json.dumps({"wheel": about(wheels[0], folder), "runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
