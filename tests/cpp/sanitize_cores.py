"""Fuzzes the torch-free cores under sanitizers: out of bounds, undefined behaviour, data races, unwritten results.

    python tests/cpp/sanitize_cores.py [--out FILE] [op ...]        (make sanitize)

Builds csrc/<op>/<op>_fuzz.cpp for every instruction set of this processor with address,undefined and, for the widest,
thread, and runs new random cases; their values are compared with loops in double. A failure names the command that
repeats it. --out writes what a run over all ops tried, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADER = Path(__file__).with_name("fuzz.h")
PROGRAMS = ROOT / "build" / "sanitize"
OPS = sorted(path.parent.name for path in ROOT.glob("csrc/*/*_fuzz.cpp"))
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=fast", "-Wno-psabi", "-pthread"]
FLAGS += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# Scratch that a core allocates itself starts as NaN; a failure ends in SIGABRT, at which a program prints its case.
OPTIONS = {
    "ASAN_OPTIONS": "abort_on_error=1:max_malloc_fill_size=1000000000:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "abort_on_error=1:halt_on_error=1",
}
TYPES = "float,bfloat16,float16,double"
SECONDS = 600  # for all cases of one program; they take a minute or two
CASES = {"address,undefined": 2000, "thread": 1000}


def build(op: str, isa: str, sanitizer: str, directory: Path = PROGRAMS, types: str = TYPES, root: Path = ROOT) -> Path:
    """The fuzzer of one op for one instruction set, of the cores under ``root``."""
    program = directory / f"{op}-{isa}-{sanitizer.split(',')[0]}"
    source = root / "csrc" / op / f"{op}_fuzz.cpp"
    sources = [*root.glob("csrc/**/*.h"), HEADER, source]
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return program
    directory.mkdir(parents=True, exist_ok=True)
    own = [f"-DFUZZ_ISA={isa}", f"-DFUZZ_TYPES={types}"]
    own += [f"-I{path}" for path in (root / "csrc", root / "csrc" / "common", HEADER.parent)]
    command = ["c++", *FLAGS, f"-fsanitize={sanitizer}", *own, source, "-o", program]
    subprocess.run([*map(str, command)], check=True)
    return program


def fuzz(program: Path, seed: int, first: int, count: int) -> str | None:
    """What went wrong in `count` cases from case `first` of a seed, if anything did."""
    command = [str(program), str(seed), str(first), str(count)]
    try:
        done = subprocess.run(command, env={**os.environ, **OPTIONS}, capture_output=True, text=True, errors="replace",
                              timeout=SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{' '.join(command)}: not done after {SECONDS} s"
    if done.returncode == 0:
        return None
    options = " ".join(f"{k}={v}" for k, v in OPTIONS.items())
    return f"{done.stdout}{done.stderr}{options} {' '.join(command)}: exit code {done.returncode}"


def main(arguments: list[str] | None = None) -> int:
    """Fuzzes the named ops, or all."""
    from fss_kernels import _loading

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ops", nargs="*", default=OPS, metavar="op")
    parser.add_argument("--out", type=Path, help="where a run over all ops says what it tried")
    chosen = parser.parse_args(arguments)
    ops = chosen.ops
    if unknown := sorted({*ops} - {*OPS}):
        parser.error(f"no csrc/<op>/<op>_fuzz.cpp of {', '.join(unknown)}; there are {', '.join(OPS)}")
    if chosen.out and {*ops} != {*OPS}:
        parser.error("--out: only a run over all ops is written")
    isas = [isa for isa in _loading.supported_isas() if isa != "avx512_bf16"]  # its screen is part of avx512
    seed = int(time.time())
    print(f"seed {seed}; exit code 1 after a failure")
    jobs = [(op, isa, "address,undefined") for op in ops for isa in isas] + [(op, isas[-1], "thread") for op in ops]

    def job(op: str, isa: str, sanitizer: str) -> str | None:
        failure = fuzz(build(op, isa, sanitizer), seed, 0, CASES[sanitizer])
        print(f"{op} {isa} {sanitizer}: " + (failure or f"{CASES[sanitizer]} cases passed"), flush=True)
        return failure

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = [failure for failure in pool.map(job, *zip(*jobs, strict=True)) if failure]
    if chosen.out:
        cases = [dict(zip(("op", "isa", "sanitizer"), j, strict=True), count=CASES[j[2]]) for j in jobs]
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps({"seed": seed, "cases": cases, "failures": failures}))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
