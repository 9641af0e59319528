"""Every Triton kernel that can be launched, compiled ahead of time for NVIDIA and AMD GPUs: no spills, no stack.

The test compiles every variant for one GPU, two of each kernel for the others: each takes minutes.
python tests/test_triton_aot.py --write      all of them, recorded in benchmarks/resources/triton.json
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
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
TABLE = Path(__file__).parents[1] / "benchmarks" / "resources" / "triton.json"
POINTER, INTEGER = "*", "i32"
DTYPES = ("fp32", "bf16", "fp16")  # of features


def masked_avg_pool(k):
    acc = {"ACC": triton.language.float32}
    modes = {"bilinear": (False, True), "corners-off": (False, False), "nearest": (True, True)}
    for x in DTYPES:
        pooled = {"x_ptr": x, "grad_ptr": x, "pooled_ptr": x, "out_ptr": x}
        for masks in (1, 2, 4):
            block_c = 16 if masks == 1 else 8
            tile = {**acc, "MASKS": masks, "BLOCK_C": block_c, "BLOCK_N": 128, "PIECE": k.PIECE}
            yield k.pool_kernel, f"{x}-{masks}", pooled, tile
            yield k.moments_kernel, f"{x}-{masks}", pooled, {**acc, "MASKS": masks, "BLOCK_C": 16, "BLOCK_N": 64}
        yield k.finish_pool_kernel, x, pooled, {**acc, "BLOCK": 256}
        for block_c, block_n in ((8, 256), (128, 16)):
            yield k.grad_features_kernel, f"{x}-{block_c}", pooled, {**acc, "BLOCK_C": block_c, "BLOCK_N": block_n}
    yield k.area_kernel, "fp32", {}, {**acc, "BLOCK": 1024}
    yield k.grad_weights_kernel, "fp32", {}, {"BLOCK": 1024}
    for name, (nearest, align) in modes.items():
        options = {**acc, "NEAREST": nearest, "ALIGN": align, "BLOCK": k.BLOCK}
        for source, target in (("u8", "fp32"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")):
            pointers = {"source_ptr": source, "target_ptr": target}
            yield k.resize_kernel, f"{name}-{source}-{target}", pointers, options
            yield k.transposed_axis_kernel, f"{name}-{source}-{target}", pointers, options


def prototype_cosine(k):
    for x, add in (("fp32", False), ("fp32", True), ("bf16", False), ("fp16", False)):
        pointers = dict.fromkeys(("x_ptr", "w_ptr", "grad_ptr", "scores_ptr", "out_ptr"), x)
        base = {"ADD": add, "ACC": triton.language.float32}
        name = f"cosine-{x}-{'add' if add else 'clamp'}"
        for block_c, block_n in ((64, 16), (16, 64)):
            for shared in (1, 2, 4):
                tile = {**base, "PROTOTYPES": shared, "BLOCK_C": block_c, "BLOCK_N": block_n}
                yield k.scores_kernel, f"{name}-{block_c}-{shared}", pointers, tile
        for block_c, block_n in ((128, 16), (8, 128)):
            tile = {**base, "BLOCK_C": block_c, "BLOCK_N": block_n}
            yield k.grad_features_kernel, f"{name}-{block_c}", pointers, tile
        for shared in (1, 2, 4):
            tile = {**base, "PROTOTYPES": shared, "BLOCK_C": 16 if shared == 1 else 8, "BLOCK_N": 128}
            yield k.sums_kernel, f"{name}-{shared}", pointers, {**tile, "PIECE": k.PIECE}
        yield k.unit_kernel, name, pointers, {**base, "BLOCK": k.BLOCK}
        yield k.grad_prototypes_kernel, name, pointers, {**base, "BLOCK": k.BLOCK}


def hypercorrelation(k):
    for x in DTYPES:
        for last in (False, True):
            for clamp in (True, False):
                name = f"{x}-{'last' if last else 'planes'}-{'clamp' if clamp else 'signed'}"
                pointers = {**dict.fromkeys(("x_ptr", "grad_ptr", "out_ptr"), x), "signs_ptr": "u8"}
                for layers in (1, 6) if x == "bf16" and not last else (1,):
                    lists = {"queries_ptr": (x,) * layers, "supports_ptr": (x,) * layers, "channels": layers}
                    options = {"LAYERS": layers, "QUERY_LAST": last, "SUPPORT_LAST": last, "ADD": clamp, "CLAMP": clamp}
                    tile = k.TILE if x == "fp32" else k.HALF_TILE
                    id = f"{name}-{layers}"
                    yield k.level_kernel, id, {**pointers, **lists}, {**options, "WIDEN": False, **tile}
                for query in (True, False):
                    options = {"OF_QUERY": query, "LAST": last, "ADD": clamp, "CLAMP": clamp, **k.PRODUCT_TILE}
                    yield k.product_kernel, f"{name}-{'query' if query else 'support'}", pointers, options
                options = {"WEIGHTED": clamp, "LAST": last, "ADD": clamp, "BLOCK_C": 32, "BLOCK_N": 32}
                yield k.finish_kernel, name, pointers, options


def dynamic_conv2d(k):
    """DPCN's three kernels, apart and merged; 9 x 9, the most taps there are; what a second launch adds."""
    dpcn, nine = ((5, 1), (1, 5), (5, 5)), ((9, 9),)
    cases = [(x, "dpcn", dpcn, False, 0) for x in DTYPES]
    cases += [("bf16", "dpcn", dpcn, True, 0), ("bf16", "nine", nine, False, 0)]
    cases += [("bf16", "fourth", (*dpcn, (1, 3)), merge, 1) for merge in (False, True)]
    for x, name, sizes, merge, launch in cases:
        plan = k._Plan([torch.empty(1, 1, *size) for size in sizes], merge)
        id = f"{x}-{name}{'-merged' * merge}"
        half = {f"k{i}_ptr": x for i in range(3)} | {"x_ptr": x, "grad_ptr": x, "out_ptr": x}
        _, _, options = list(plan.branches(range(len(sizes))))[launch]
        add = {"ADD": launch > 0}
        yield k.pack_kernel, id, half, {**options, **add, "BLOCK": k.ROWS}
        yield k.unpack_kernel, id, half, {**options, "BLOCK": k.ROWS}
        groups = [masks for _, _, masks in plan.groups(range(len(plan.outputs)))]
        if launch == len(groups):
            continue
        layouts = list(k.TILES)[: 1 if name == "nine" else None]  # they take minutes
        for layout in layouts:
            block_c, block_n = k.TILES[layout]
            tile = {**groups[launch], "BLOCK_C": block_c, "BLOCK_N": block_n}
            yield k.conv_kernel, f"{id}-{layout}", half, tile
            yield k.grad_x_kernel, f"{id}-{layout}", half, {**tile, **add}
            block_c, block_n = k.SUM_TILES[layout]
            tile = {**groups[launch], "BLOCK_C": block_c, "BLOCK_N": block_n}
            yield k.grad_taps_kernel, f"{id}-{layout}", half, tile


def dense_cosine(k):
    """A stride that is 1 is a constant of the compiled kernel."""

    def unit(last, *operands):
        return {f"stride_{operand}{'c' if last else 'n'}": 1 for operand in operands}

    features = ("x_ptr", "query_ptr", "support_ptr", "other_ptr", "grad_ptr", "out_ptr", "scores_ptr")
    lists = dict.fromkeys(("before_ptr", "list_ptr", "facts_ptr", "starts_ptr"), "i32") | {"kept_ptr": "i8"}
    partial = {**lists, **dict.fromkeys(("index_ptr", "across_index_ptr", "best_index_ptr"), "i32")}
    saved = {**lists, **dict.fromkeys(("index_ptr", "order_ptr"), "i64"), "others_ptr": "i32"}
    pairs = {"index_ptr": "i64", "to_ptr": "i32", "other_ptr": "i32"}
    for x in DTYPES:
        own = dict.fromkeys(features, x)
        for last in (False, True) if x != "fp16" else (False,):
            name = f"{x}-{'last' if last else 'planes'}"
            for mask in ("fp32", None) if last else ("u8", "fp32", None):
                options = {"MASKED": mask is not None, **unit(last, ""), **k.NORM_TILES[last]}
                yield k.norm_kernel, f"{name}-{mask}", {**own, **lists, "mask_ptr": mask or "fp32"}, options
            for precision in ("ieee", "tf32") if x == "fp32" and not last else ("ieee",):
                tile = k.TILES[precision if x == "fp32" else "half"]
                options = {"ADD": last, "PRECISION": precision, "WIDEN": False, **unit(last, "q", "s"), **tile}
                yield k.ring_kernel, f"{name}-{precision}", {**own, **lists}, options
                for match in (False, True):
                    id = f"{name}-{precision}-{'match' if match else 'max'}"
                    yield k.best_kernel, id, {**own, **partial}, {**options, "MATCH": match, "CHUNK": k.CHUNK}
            for windows in (1, 3) if x == "bf16" else (1,):
                for write in (False, True):
                    id = f"{name}-{windows}-{'write' if write else 'sum'}"
                    pointers = {**own, **saved, "windows": 2 * windows}
                    options = {"L": windows, "WRITE": write, "ADD": last}
                    tile = {**unit(last, "q", "s", "o"), **k.GATHER_TILES[last]}
                    yield k.grad_query_kernel, id, pointers, {**options, **tile}
            for write in (False, True):
                options = {"WRITE": write, "ADD": last, **unit(last, "x", "t", "o"), **k.LIST_TILE}
                yield k.grad_listed_kernel, f"{name}-{'write' if write else 'sum'}", {**own, **saved}, options
        for side in (False, True):
            options = {"OWN": side, "ADD": side, "BLOCK": k.BLOCK}
            yield k.pairs_kernel, f"{x}-{'own' if side else 'other'}", {**own, **pairs}, options
        for id, listed, zero in (("zero", False, True), ("exclude", False, False), ("support", True, False)):
            pointers = {**own, **partial, "index_ptr": "i64"}
            yield k.finish_kernel, f"{x}-{id}", pointers, {"LISTED": listed, "ZERO": zero, "BLOCK": k.FINISH}
    yield k.compact_kernel, "lists", lists, {"BLOCK": k.BLOCK}
    for id, every, exclude in (("zero", False, False), ("exclude", False, True), ("query", True, False)):
        yield k.candidates_kernel, id, lists, {"EVERY": every, "EXCLUDE": exclude, "BLOCK": k.BLOCK}
    for id, exclude in (("zero", False), ("exclude", True)):
        yield k.window_kernel, id, partial, {"EXCLUDE": exclude, **k.WINDOW_TILE}


# Folder of ops -> a generator of (kernel, id, pointer types, constants): what its launchers instantiate.
OPS = {
    "masked_avg_pool": masked_avg_pool,
    "dynamic_conv2d": dynamic_conv2d,
    "prototype_cosine": prototype_cosine,
    "hypercorrelation": hypercorrelation,
    "dense_cosine": dense_cosine,
}


def module(folder):
    return importlib.import_module(f"fss_kernels.ops.{folder}.triton_kernels")


def variants():
    """(kernel, id, signature, constants) of everything the launchers of all ops instantiate."""
    for folder, of in OPS.items():
        yield from of(module(folder))


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
    """Registers, shared memory and spilled bytes of a compiled kernel."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        count = {key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1)) for key in ("vgpr_count", "vgpr_spill_count")}
        return {
            "registers": count["vgpr_count"],
            "shared": compiled.metadata.shared,
            "spills": count["vgpr_spill_count"],
        }
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "SHARED", "STACK", "LOCAL")}
    return {"registers": found["REG"], "shared": compiled.metadata.shared, "spills": found["STACK"] + found["LOCAL"]}


def compile_one(target_name: str, index: int) -> tuple[str, dict[str, int]]:
    """Name and resources of one variant."""
    target, (kernel, id, pointers, constants) = TARGETS[target_name], list(variants())[index]
    constants, options = dict(constants), {"enable_fp_fusion": True}
    if "num_warps" in constants:
        options["num_warps"] = constants.pop("num_warps")
    source = ASTSource(kernel, signature(kernel, pointers, constants), constants)
    compiled = triton.compile(source, target=target, options=options)
    return f"{kernel.__name__}[{id}]", resources(compiled, target)


def first_and_last() -> list[int]:
    """Two variants of each kernel."""
    names = [kernel.__name__ for kernel, *_ in variants()]
    return sorted({i for name in names for i in (names.index(name), len(names) - 1 - names[::-1].index(name))})


def compile_all(target_name: str, chosen: list[int] | None = None) -> dict[str, dict[str, int]]:
    """Kernel variant -> resources, of the chosen or all, compiled in as many processes as there are processors."""
    indices = list(range(len(list(variants())))) if chosen is None else chosen
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return dict(pool.map(compile_one, [target_name] * len(indices), indices, chunksize=4))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target):
    table = compile_all(target, None if target == "sm_90" else first_and_last())
    assert {name.partition("[")[0] for name in table} == {kernel.__name__ for kernel, *_ in variants()}
    assert not {name: r for name, r in table.items() if r["spills"]}
    recorded = json.loads(TABLE.read_text()).get(triton.__version__, {}).get(target) if TABLE.exists() else None
    changed = {n: (recorded.get(n), r) for n, r in table.items() if recorded.get(n) != r} if recorded else table
    if changed:  # informational: another compiler version may allocate differently
        print(f"resources that differ from {TABLE.name}: {changed}")


@pytest.mark.parametrize("folder", OPS)
def test_any_size_or_stride_may_be_one(folder):
    """Triton compiles an integer that is 1 into the kernel, as a constant without the methods of a tensor."""
    backend = make_backend(TARGETS["sm_90"])
    first = {kernel.__name__: variant for kernel, *variant in reversed(list(OPS[folder](module(folder))))}
    refused = {}
    for name, (_, pointers, constants) in first.items():
        kernel, options = getattr(module(folder), name), backend.parse_options({})
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


@pytest.mark.parametrize("folder", sorted({o.folder or o.name for o in _op.ops.values() if "triton" in o.backends}))
def test_every_kernel_is_listed(folder):
    """A kernel that is not among the variants would never be compiled here."""
    kernels = {name for name in vars(module(folder)) if name.endswith("_kernel")}
    assert kernels and kernels == {kernel.__name__ for kernel, *_ in OPS[folder](module(folder))}


if __name__ == "__main__" and "--write" in sys.argv:
    everything = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    everything[triton.__version__] = {target: compile_all(target) for target in TARGETS}
    TABLE.parent.mkdir(exist_ok=True)
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(json.dumps(everything, indent=1) + "\n")
    temporary.replace(TABLE)
