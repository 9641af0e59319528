"""Compares the bits that two versions of the kernels compute on this machine.

    python tests/bits.py BASE [HEAD] [--allow FILE] [--values] [--trees FOLDER]
                         [--ops OP ...] [--samples PATTERN ...] [--backends BACKEND ...]

BASE and HEAD (the default is the commit HEAD) are commits, or folders that hold the project. Each is copied and its CPU
library built. Then processes of one thread call every op on every sample of its spec, dtype and backend (the reference,
C++ for every instruction set of this machine, Triton's interpreter), and hash the results and the gradients.

The file of FILE lists the differences that are meant, each with its reason; patterns are those of a shell:

    [[allowed]]
    op = "dense_cosine_*"
    backend = "cpp-*"           # reference, cpp-<instruction set> or triton
    tensor = "grad_*"           # "output 0", "output 0 without gradients", "grad_<tensor>", or "call" where it raises
    reason = "the squares are scaled before they are added"

Exits with 1 where anything else differs. An entry that matches nothing is reported. Samples that one side lacks, or has
with other values, are counted and not compared. ``--trees`` keeps the built copies of commits for the next comparison.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
BACKENDS = ("triton", "reference", *(f"cpp-{isa}" for isa in ISAS))  # the slowest first
LAYOUTS = ("contiguous", "channels_last")
DTYPES = ("float32", "float64", "bfloat16", "float16")
INTERPRETED = 360  # elements of the largest tensor of a sample: the interpreter takes milliseconds a program
INPUTS = "inputs"  # stands for a tensor's name: the hash of what the call gets
SHOWN = 40  # differences


class Key(NamedTuple):
    """Which tensor of which call."""

    op: str
    backend: str
    sample: str
    dtype: str
    layout: str
    tensor: str


Bits = dict[Key, str]


# ---- in a process of one of the trees: only what both versions have --------------------------------------------------


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of dtypes, shapes and bits."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype} {tuple(t.shape)} ".encode())
        found.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def listed(results: Any) -> list[torch.Tensor]:
    """The tensors that a call returns."""
    return [results] if isinstance(results, torch.Tensor) else list(results)


def results_of(spec: Any, tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Name -> tensor: the outputs of a call with and without gradients, and the gradients for fixed ones of the
    outputs."""
    wanted = [n for n in spec.differentiable if n in tensors and tensors[n].is_floating_point()]
    leaves = {n: tensors[n].detach().requires_grad_() for n in wanted}
    outputs = listed(spec.function(*{**tensors, **leaves}.values(), **options))
    with torch.no_grad():
        inference = listed(spec.function(*tensors.values(), **options))
    found = {f"output {i}": t for i, t in enumerate(outputs)}
    found |= {f"output {i} without gradients": t for i, t in enumerate(inference)}
    reached = [t for t in outputs if t.requires_grad]
    generator = torch.Generator().manual_seed(7)
    seeds = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in reached]
    if reached:
        grads = torch.autograd.grad(reached, list(leaves.values()), seeds)
        found |= {f"grad_{n}": g for n, g in zip(wanted, grads, strict=True)}
    return found


def work(
    backend: str, ops: Sequence[str], samples: Sequence[str], kept: set[Key]
) -> Iterator[tuple[Key, str, torch.Tensor | None]]:
    """The hash of every tensor of a backend, and the tensor itself where it is to be kept."""
    import fss_kernels
    from fss_kernels import testing

    torch.set_num_threads(1)
    for op, spec in testing.specs().items():
        for sample in spec.samples() if not ops or op in ops else ():
            if not any(fnmatch.fnmatchcase(sample.id, pattern) for pattern in samples):
                continue
            if backend == "triton" and max(t.numel() for t in sample.tensors.values()) > INTERPRETED:
                continue
            for dtype in DTYPES:
                cast = spec.cast(sample, getattr(torch, dtype))
                for layout in LAYOUTS:
                    tensors = {name: testing.LAYOUTS[layout](t) for name, t in cast.items()}
                    at = (op, backend, sample.id, dtype, layout)
                    yield Key(*at, INPUTS), digest(tensors.values()) + repr(sample.options), None
                    try:
                        with fss_kernels.use_backend(backend.partition("-")[0]):
                            results = results_of(spec, tensors, sample.options)
                    except RuntimeError:  # not available, or not for this dtype
                        yield Key(*at, "call"), "raises RuntimeError", None
                        continue
                    for name, t in results.items():
                        key = Key(*at, name)
                        yield key, digest([t]), t.detach().clone() if key in kept else None


def worker(request: dict[str, Any]) -> None:
    """Writes what `work` yields."""
    kept = {Key(*key) for key in request["kept"]}
    bits, values = [], []
    for key, found, tensor in work(request["backend"], request["ops"], request["samples"], kept):
        bits.append([*key, found])
        if tensor is not None:
            values.append((tuple(key), tensor))
    Path(request["out"], "bits.json").write_text(json.dumps(bits))
    torch.save(values, Path(request["out"], "values.pt"))


# ---- both trees ------------------------------------------------------------------------------------------------------


def prepare(version: str, trees: Path, scratch: Path) -> Path:
    """A copy with its CPU library: of a commit among the trees, where it may be already, of a folder in scratch."""
    if Path(version).is_dir():
        tree = Path(tempfile.mkdtemp(dir=scratch), "tree")
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "report", "__pycache__", ".*_cache", "*.so")
        shutil.copytree(version, tree, ignore=ignored)
    else:
        command = ["git", "rev-parse", "--verify", "--quiet", f"{version}^{{commit}}"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(f"bits: {version} is neither a commit nor a folder")
        tree = trees.resolve() / found.stdout.strip()
        if (tree / "fss_kernels" / "_fss_cpu.so").exists():
            return tree
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", tree.name], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=tree, env=variables(tree), capture_output=True, text=True)
    if built.returncode:
        raise SystemExit(f"bits: {version} does not build:\n{(built.stdout + built.stderr)[-4000:]}")
    return tree


def variables(tree: Path, backend: str = "reference") -> dict[str, str]:
    """For a process of one thread that imports this tree."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("FSS_KERNELS_", "TRITON_INTERPRET"))}
    own |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "FSS_KERNELS_BUILD": "cpu"}
    name, _, isa = backend.partition("-")
    return own | ({"FSS_KERNELS_CPU_ISA": isa} if isa else {}) | ({"TRITON_INTERPRET": "1"} if name == "triton" else {})


@dataclass(frozen=True)
class Calls:
    """Which calls to make: all where nothing is named."""

    ops: Sequence[str] = ()
    samples: Sequence[str] = ("*",)  # shell patterns
    backends: Sequence[str] = BACKENDS


def run(tree: Path, backend: str, calls: Calls, kept: Iterable[Key] = ()) -> tuple[Bits, dict[Key, torch.Tensor]]:
    """The bits of a backend in a tree, and the values of the tensors to keep."""
    with tempfile.TemporaryDirectory() as out:
        request = {"backend": backend, "ops": [*calls.ops], "samples": [*calls.samples], "kept": [*kept], "out": out}
        Path(out, "request.json").write_text(json.dumps(request))
        command = [sys.executable, __file__, "--worker", str(Path(out, "request.json"))]
        done = subprocess.run(command, cwd=tree, env=variables(tree, backend), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bits: {backend} in {tree}:\n{done.stderr[-4000:]}")
        bits = {Key(*key): found for *key, found in json.loads(Path(out, "bits.json").read_text())}
        values = {Key(*key): tensor for key, tensor in torch.load(Path(out, "values.pt"))}
    return bits, values


def collect(trees: Sequence[Path], calls: Calls) -> list[Bits]:
    """The bits of each tree."""
    jobs = [(tree, backend) for backend in calls.backends for tree in trees]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [*pool.map(lambda job: run(job[0], job[1], calls)[0], jobs)]
    return [{k: v for bits in found[i :: len(trees)] for k, v in bits.items()} for i in range(len(trees))]


@dataclass(frozen=True)
class Comparison:
    """What differs of the calls that both trees have with the same values."""

    compared: Counter[tuple[str, str]]  # op, backend -> tensors
    different: list[Key]
    one_sided: dict[str, set[tuple[str, str]]]  # "base", "head", "changed" -> (op, sample)

    def empty(self) -> list[str]:
        """Ops and kinds of backends without a single tensor: the comparison says nothing of them."""
        kinds: Counter[tuple[str, str]] = Counter()
        for (op, backend), count in self.compared.items():
            kinds[op, backend.partition("-")[0]] += count  # not every processor has every instruction set
        return sorted(" ".join(pair) for pair, count in kinds.items() if not count)


def compare(base: Bits, head: Bits) -> Comparison:
    """A tensor that only one side has is a difference; a sample that only one side has is none."""
    samples = [{(key.op, key.sample) for key in bits} for bits in (base, head)]
    common = samples[0] & samples[1]
    inputs = {key for key in base.keys() | head.keys() if key.tensor == INPUTS and (key.op, key.sample) in common}
    changed = {(key.op, key.sample) for key in inputs if base.get(key) != head.get(key)}
    keys = {k for k in base.keys() | head.keys() if k.tensor != INPUTS and (k.op, k.sample) in common - changed}
    compared = Counter({(op, backend): 0 for op, backend, *_ in keys})
    compared.update((k.op, k.backend) for k in keys if k.tensor != "call")
    different = sorted(k for k in keys if base.get(k) != head.get(k))
    one_sided = {"base": samples[0] - common, "head": samples[1] - common, "changed": changed}
    return Comparison(compared, different, one_sided)


# ---- what may differ -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowed:
    """An entry of the allow-list."""

    op: str
    backend: str
    tensor: str
    reason: str

    def matches(self, key: Key) -> bool:
        return all(fnmatch.fnmatchcase(getattr(key, n), getattr(self, n)) for n in ("op", "backend", "tensor"))


def allow_list(path: Path) -> list[Allowed]:
    """The entries of a file."""
    entries = tomllib.loads(path.read_text()).get("allowed", [])
    for i, entry in enumerate(entries):
        if {*entry} != {"op", "backend", "tensor", "reason"} or not all(map(str.strip, entry.values())):
            raise SystemExit(f"bits: {path}: entry {i + 1} needs op, backend, tensor and reason, has {entry}")
    return [Allowed(**entry) for entry in entries]


def distance(base: torch.Tensor | None, head: torch.Tensor | None) -> str:
    """How far two tensors are apart."""
    if base is None or head is None:
        return "only in the base" if head is None else "only in the head"
    if base.shape != head.shape or base.dtype != head.dtype:
        return f"{base.dtype} {tuple(base.shape)} and {head.dtype} {tuple(head.shape)}"
    a, b = base.double(), head.double()
    bits = (t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (base, head))
    count = int(torch.ne(*bits).any(1).sum())
    difference = (a - b).abs().nan_to_num(math.inf).max().item()
    largest = a.abs().nan_to_num(0).max().item()
    return f"{count} of {a.numel()} elements, by at most {difference:.3g} beside values up to {largest:.3g}"


def main(arguments: Sequence[str]) -> int:
    """Prints what differs; 1 where something does that the allow-list does not name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a commit or a folder")
    parser.add_argument("head", nargs="?", default="HEAD", help="a commit or a folder")
    parser.add_argument("--allow", type=Path, help="the file of the differences that are meant")
    parser.add_argument("--ops", nargs="*", default=[], help="only these ops")
    parser.add_argument("--samples", nargs="*", default=["*"], help="shell patterns of samples")
    parser.add_argument("--backends", nargs="*", default=BACKENDS, choices=BACKENDS, help="only these backends")
    parser.add_argument("--values", action="store_true", help="compute what differs once more and say by how much")
    parser.add_argument("--trees", type=Path, help="where to keep the built copies of commits")
    options = parser.parse_args(arguments)
    allowed = allow_list(options.allow) if options.allow else []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        trees = [prepare(version, options.trees or scratch, scratch) for version in (options.base, options.head)]
        calls = Calls(options.ops, options.samples, options.backends)
        bits = collect(trees, calls)
        found = compare(*bits)
        unmatched = [key for key in found.different if not any(entry.matches(key) for entry in allowed)]
        values: list[dict[Key, torch.Tensor]] = [{}, {}]
        for backend in sorted({key.backend for key in unmatched if options.values}):
            for side, tree in zip(values, trees, strict=True):
                side |= run(tree, backend, calls, [k for k in unmatched if k.backend == backend])[1]
    return report(found, unmatched, allowed, values if options.values else None)


def report(
    found: Comparison,
    unmatched: Sequence[Key],
    allowed: Sequence[Allowed],
    values: Sequence[dict[Key, torch.Tensor]] | None = None,
) -> int:
    """Prints a comparison; the exit code."""
    different, left = (Counter((k.op, k.backend) for k in keys) for keys in (found.different, unmatched))
    table = Table("op", "backend", "tensors", "different", "not allowed")
    for pair, count in sorted(found.compared.items()):
        table.add_row(*pair, *(str(n) for n in (count, different[pair], left[pair])))
    console = Console(width=160)
    console.print(table)
    for entry in allowed:
        if not any(entry.matches(key) for key in found.different):
            print(f"stale: nothing differs at op {entry.op}, backend {entry.backend}, tensor {entry.tensor}")
    for key in unmatched[:SHOWN]:
        apart = f": {distance(*(side.get(key) for side in values))}" if values else ""
        console.print(escape(" ".join(key) + apart), soft_wrap=True)
    if len(unmatched) > SHOWN:
        print(f"... and {len(unmatched) - SHOWN} more")
    counts = {side: len(samples) for side, samples in found.one_sided.items()}
    print(f"samples only in the base: {counts['base']}, only in the head: {counts['head']}, "
          f"with other values: {counts['changed']}")  # fmt: skip
    if empty := found.empty():
        print(f"nothing was compared: {', '.join(empty)}")
    total = sum(found.compared.values())
    print(f"bits: {total} tensors, {len(found.different)} different, {len(unmatched)} of them not allowed")
    return 1 if unmatched or empty or not total else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(Path(sys.argv[2]).read_text()))
    else:
        sys.exit(main(sys.argv[1:]))
