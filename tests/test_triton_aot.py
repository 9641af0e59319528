"""Every Triton kernel that can be launched, compiled ahead of time for NVIDIA and AMD GPUs: no spills, no stack, and no
more shared memory than a block may have.

The test compiles every variant (`ops/*/aot.py`) for one GPU, two of each kernel for the others: each takes minutes.
python tests/test_triton_aot.py      every variant for every GPU
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fss_kernels import _op, testing

pytestmark = pytest.mark.slow

testing.specs()  # registers the ops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a block, at most
POINTER, INTEGER = "*", "i32"


# Folders of ops with Triton kernels.
FOLDERS = sorted({op.folder for op in _op.ops.values() if "triton" in op.backends})


def variants_of(folder: str) -> list[testing.Variant]:
    """What the launchers of the ops in this folder instantiate."""
    op = next(op for op in _op.ops.values() if (op.folder) == folder)
    purpose = "a function that yields a fss_kernels.testing.Variant for all that its launchers instantiate"
    return list(testing.part(op, "aot", "variants", purpose)())


def variants() -> list[testing.Variant]:
    """The same of all folders."""
    return [variant for folder in FOLDERS for variant in variants_of(folder)]


def signature(kernel, pointers, constants):
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif isinstance(pointers.get(name), tuple):
            types[name] = tuple(POINTER + p for p in pointers[name])
        elif name in pointers and not name.endswith("_ptr"):
            types[name] = (INTEGER,) * pointers[name]
        elif name.endswith("_ptr"):
            types[name] = POINTER + pointers.get(name, "fp32")
        else:
            types[name] = "fp32" if name in ("eps", "scale") else "i64" if name.startswith("stride") else INTEGER
    return types


def resources(compiled, target) -> dict[str, int]:
    """Shared memory and spilled bytes of a compiled kernel."""
    if target.backend == "hip":
        spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        return {"shared": compiled.metadata.shared, "spills": int(spills.group(1))}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("STACK", "LOCAL")}
    return {"shared": compiled.metadata.shared, "spills": found["STACK"] + found["LOCAL"]}


def name_of(kernel) -> str:
    """Folder and name: several ops have a finish_kernel."""
    return f"{kernel.fn.__module__.split('.')[-2]}.{kernel.__name__}"


def compile_one(target_name: str, index: int) -> tuple[str, dict[str, int]]:
    """Name and resources of one variant."""
    target, (kernel, id, pointers, constants) = TARGETS[target_name], variants()[index]
    constants, options = dict(constants), {"enable_fp_fusion": True}
    if "num_warps" in constants:
        options["num_warps"] = constants.pop("num_warps")
    source = ASTSource(kernel, signature(kernel, pointers, constants), constants)
    compiled = triton.compile(source, target=target, options=options)
    return f"{name_of(kernel)}[{id}]", resources(compiled, target)


def first_and_last() -> list[int]:
    """Two variants of each kernel."""
    names = [name_of(kernel) for kernel, *_ in variants()]
    return sorted({i for name in names for i in (names.index(name), len(names) - 1 - names[::-1].index(name))})


def compile_all(target_name: str, chosen: list[int] | None = None) -> dict[str, dict[str, int]]:
    """Kernel variant -> resources, of the chosen or all, compiled in as many processes as there are processors."""
    indices = list(range(len(variants()))) if chosen is None else chosen
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return dict(pool.map(compile_one, [target_name] * len(indices), indices, chunksize=4))


def over(target_name: str, table: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The kernels that spill, or that a GPU would not launch."""
    return {name: r for name, r in table.items() if r["spills"] or r["shared"] > SHARED[target_name]}


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=() if t in ("sm_90", "gfx942") else pytest.mark.long) for t in TARGETS]
)
def test_compiles_within_the_limits(target):
    chosen = None if target == "sm_90" else first_and_last()
    table = compile_all(target, chosen)
    assert len(table) == len(variants() if chosen is None else chosen)
    assert {name.partition("[")[0] for name in table} == {name_of(kernel) for kernel, *_ in variants()}
    assert not over(target, table)


@pytest.mark.parametrize("folder", FOLDERS)
def test_any_size_or_stride_may_be_one(folder):
    """Triton compiles an integer that is 1 into the kernel, as a constant without the methods of a tensor."""
    backend = make_backend(TARGETS["sm_90"])
    first = {variant[0].__name__: variant for variant in reversed(variants_of(folder))}
    refused = {}
    for name, (kernel, _, pointers, constants) in first.items():
        options = backend.parse_options({})
        constants = {n: value for n, value in constants.items() if n != "num_warps"}
        types = signature(kernel, pointers, constants)
        integers = [n for n, kind in types.items() if kind in (INTEGER, "i64")]
        for ones in [integers, *([n] for n in integers)]:
            source = ASTSource(kernel, types | dict.fromkeys(ones, "constexpr"), constants | dict.fromkeys(ones, 1))
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
            try:
                source.make_ir(TARGETS["sm_90"], options, functions, modules, context)
            except triton.CompilationError as error:
                refused[(name, *ones)] = str(error).splitlines()[-1]
    assert not refused


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_kernel_is_listed(folder):
    """A kernel that is not among the variants would never be compiled here."""
    module = importlib.import_module(f"fss_kernels.ops.{folder}.triton_kernels")
    kernels = {name for name in vars(module) if name.endswith("_kernel")}
    assert kernels and kernels == {kernel.__name__ for kernel, *_ in variants_of(folder)}


if __name__ == "__main__":
    failures = {target: found for target in TARGETS if (found := over(target, compile_all(target)))}
    print(failures or f"{len(variants())} variants within the limits of {', '.join(TARGETS)}")
    sys.exit(bool(failures))
