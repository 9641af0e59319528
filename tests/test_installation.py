"""Installing and importing where something is missing: no compiler, no library, a broken one, another processor."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import distribution
import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutants"))
import faults

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RUN_ONE = """
import torch, fss_kernels
from fss_kernels import _loading, _op
x, m = torch.randn(2, 3, 5, 5, requires_grad=True), torch.rand(2, 9, 9)
out = fss_kernels.masked_avg_pool(x, m)
out.sum().backward()
r = torch.nn.functional.interpolate(m[:, None], (5, 5), mode="bilinear", align_corners=True)
torch.testing.assert_close(out, (x * r).sum((2, 3)) / (r.sum((2, 3)) + 5e-4))
print(fss_kernels.__file__, _op.ops["masked_avg_pool"].default_backend("cpu"), _loading.unavailable.get("cpp"))
"""


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in ``cwd`` with only that folder's packages before the installed ones."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FSS_KERNELS_")}
    env |= {"PYTHONPATH": str(cwd), **environment}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


def source_copy(to: Path) -> Path:
    """The project as a stranger unpacks it: no compiled library."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json", "build", "*.egg-info")
    for name in ("csrc", "fss_kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    return to


def install(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(target), "-q"]
    return run("-m", "pip", "install", *options, str(source), cwd=source, **environment)


def test_without_a_compiler(tmp_path):
    """It installs, works through the reference, verifies, and `info` gives the reason."""
    source, target = source_copy(tmp_path / "source"), tmp_path / "target"
    result = install(source, target, CC="/bin/false", CXX="/bin/false")
    assert result.returncode == 0, result.stderr
    assert not list(target.glob("fss_kernels/*.so"))
    one = run("-c", RUN_ONE, cwd=target)
    assert one.returncode == 0, one.stderr
    assert str(target) in one.stdout and "reference _fss_cpu.so did not compile" in one.stdout
    info = run("-m", "fss_kernels", "info", cwd=target)
    assert info.returncode == 0 and "_fss_cpu.so did not compile" in info.stdout
    verify = run("-m", "fss_kernels", "verify", "masked_avg_pool", "--backend", "reference", cwd=target)
    assert verify.returncode == 0 and "verify: 12 rows, " in verify.stdout, verify.stdout
    assert "all within bounds" in verify.stdout


def test_asked_for_by_name_without_a_compiler(tmp_path):
    source = source_copy(tmp_path / "source")
    assert install(source, tmp_path / "a", CC="/bin/false", CXX="/bin/false", FSS_KERNELS_BUILD="cpu").returncode != 0
    wrong = install(source, tmp_path / "b", FSS_KERNELS_BUILD="gpu")
    assert wrong.returncode != 0
    assert "FSS_KERNELS_BUILD must be auto, none, cpu, cuda or native, got 'gpu'" in wrong.stdout + wrong.stderr


def test_pure_python_on_request(tmp_path):
    source, target = source_copy(tmp_path / "source"), tmp_path / "target"
    (source / "fss_kernels" / "_fss_cpu.so").write_bytes(b"an earlier build in the checkout is not part of this one")
    assert install(source, target, FSS_KERNELS_BUILD="none").returncode == 0
    assert not list(target.glob("fss_kernels/*.so"))
    assert "reference left out by FSS_KERNELS_BUILD=none" in run("-c", RUN_ONE, cwd=target).stdout


@pytest.mark.parametrize("state", ["missing", "broken"])
def test_without_a_working_library(tmp_path, state):
    source = source_copy(tmp_path)
    if state == "broken":
        (source / "fss_kernels" / "_fss_cpu.so").write_bytes(b"not a library")
    one = run("-c", RUN_ONE, cwd=source)
    assert one.returncode == 0, one.stderr
    reason = "_fss_cpu.so does not load" if state == "broken" else "_fss_cpu.so was not built"
    assert f"reference {reason}" in one.stdout
    forced = run("-c", "import fss_kernels\nwith fss_kernels.use_backend('cpp'): pass", cwd=source)
    assert forced.returncode != 0 and reason in forced.stderr


def test_instruction_set_that_is_not_there():
    one = run("-c", RUN_ONE, cwd=ROOT, FSS_KERNELS_CPU_ISA="avx1024")
    assert one.returncode == 0, one.stderr
    assert "reference FSS_KERNELS_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, got avx1024" in one.stdout
    assert "the CPU kernels are off" in one.stderr


def test_import_is_light():
    """Importing compiles nothing, touches no GPU and needs torch and numpy only."""
    code = """
import sys, torch
before = set(sys.modules)
import fss_kernels
new = {m.partition('.')[0] for m in set(sys.modules) - before}
assert not new & {'triton', 'rich', 'matplotlib', 'pytest', 'jsonargparse', 'fss_models'}, new
assert not torch.cuda.is_initialized()
"""
    result = run("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_library_is_free_of_python_and_unstable_symbols():
    """One binary serves every PyTorch >= 2.10 and every Python: only the stable C interface is left undefined."""
    library = ROOT / "fss_kernels" / "_fss_cpu.so"
    assert distribution.foreign_symbols(library) == []
    needed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout
    assert "torch_call_dispatcher" in needed and "aoti_torch_get_sizes" in needed


@pytest.mark.parametrize(
    ("declaration", "use", "symbol"),
    [
        ('extern "C" void* PyLong_FromLong(long);', "PyLong_FromLong(1);", "PyLong_FromLong"),
        ("namespace c10 { void f(); }", "c10::f();", "c10::f()"),
        ("namespace at { struct T { T(); }; }", "at::T t;", "at::T::T()"),
        ("namespace torch { void g(); }", "torch::g();", "torch::g()"),
        ("namespace c10 { struct S {}; } namespace std { void h(c10::S); }", "std::h({});", "std::h(c10::S)"),
        ("namespace std { void of_some_pytorch(); }", "std::of_some_pytorch();", "std::of_some_pytorch()"),
        ("void torch_call(int);", "torch_call(1);", "torch_call(int)"),
        ('extern "C" void THPVariable_Wrap();', "THPVariable_Wrap();", "THPVariable_Wrap"),
        ('extern "C" void torch_get_num_threads();', "torch_get_num_threads();", None),
        ("#include <stdexcept>", 'throw std::runtime_error("");', None),
    ],
)
def test_foreign_symbols_are_found(tmp_path, declaration, use, symbol):
    (tmp_path / "a.cpp").write_text(f"{declaration}\nvoid user() {{ {use} }}\n")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", tmp_path / "a.so", tmp_path / "a.cpp"], check=True)
    assert distribution.foreign_symbols(tmp_path / "a.so") == ([symbol] if symbol else [])


def test_verify_fails_on_a_planted_fault(tmp_path):
    """A build of one op whose kernel forgets eps: `verify` reports it and exits non-zero."""
    source = source_copy(tmp_path)
    for other in (source / "csrc").glob("*/*_cpu.cpp"):
        if other.parent.name not in ("common", "masked_avg_pool"):
            other.unlink()
    faults.find("masked_avg_pool/forget-eps").plant(source)
    built = run("setup.py", "-q", "build_ext", "--inplace", cwd=source, FSS_KERNELS_BUILD="cpu")
    assert built.returncode == 0, built.stderr
    verify = run("-m", "fss_kernels", "verify", "masked_avg_pool", "--backend", "cpp", cwd=source)
    assert verify.returncode == 1 and "cpp" in verify.stdout and "times the allowed" in verify.stdout


def test_other_compilers_build_the_generic_code(tmp_path):
    """Where several instruction sets cannot be had in one file, the core compiles without any x86 header."""
    source = tmp_path / "core.cpp"
    source.write_text('#define FSS_CORE "masked_avg_pool/masked_avg_pool.h"\n#include "common/each_isa.h"\n')
    command = [
        "g++",
        "-std=c++17",
        "-fsyntax-only",
        "-DFSS_X86_VARIANTS=0",
        "-I",
        ROOT / "csrc",
        "-I",
        ROOT / "csrc/common",
    ]
    result = subprocess.run([*command, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
