"""What is missing or broken costs speed, never a result: the import works, `info` says why, the numbers are right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fss_kernels import _loading, _op

ROOT = Path(__file__).parents[1]
ISAS = _loading.supported_isas()

# One process imports PyTorch and forks once for every case: what is there is decided when fss_kernels is imported.
MATRIX = """
import io, json, os, sys, warnings
import torch
from rich.console import Console

def report(case):
    sys.path[:0] = case["path"]
    os.environ.update(case["environment"])
    exec(case["before"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import fss_kernels
    from fss_kernels import __main__, _backends, _loading, _op, testing
    text = io.StringIO()
    wrong, forced, compared = [], {}, {}
    for spec in testing.specs().values():
        sample = next(s for s in spec.samples() if not s.large)
        for backend in (None, *_loading.BACKENDS):
            try:
                with _backends.use_backend(backend):
                    results = testing.evaluate(spec, sample, backend, torch.float32, "contiguous")
                wrong += [c.message for _, c in results if not c.passed]
                compared[str(backend)] = compared.get(str(backend), 0) + len(results)
            except RuntimeError as error:
                forced[str(backend)] = str(error)
    import fss_models
    generator = torch.manual_seed(0)
    images = torch.randn(2, 3, 33, 33, generator=generator), torch.randn(2, 1, 3, 33, 33, generator=generator)
    mask = (torch.rand(2, 1, 33, 33, generator=generator) < 0.5).long()
    networks = []
    for name in ("dpcn", "dpnet", "panet"):
        model = fss_models.build(name, "tiny", **({} if name == "panet" else {"channels": 8})).eval()
        with torch.no_grad():
            logits = model(*images, mask)
            with _backends.use_backend("reference"):
                wanted = model(*images, mask)
        networks.append(name)
        if not torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5):
            wrong.append(f"{name}: {(logits - wanted).abs().max()}")
    code = __main__.info(Console(file=text, width=1000))
    return {
        "from": fss_kernels.__file__, "info": text.getvalue(), "code": code, "wrong": wrong, "refused": forced,
        "defaults": sorted({op.default_backend("cpu") for op in _op.ops.values()}), "isa": _loading.cpu_isa(),
        "compared": compared, "networks": networks,
        "warnings": [str(w.message) for w in caught if "fss_kernels" in str(w.message)],
    }

for name, case in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if os.fork() == 0:
        print(json.dumps([name, report(case)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What every case of the matrix reports."""
    folder = tmp_path_factory.mktemp("fallback")
    for name in ("without", "broken"):
        shutil.copytree(ROOT / "fss_kernels", folder / name / "fss_kernels", ignore=shutil.ignore_patterns("*.so"))
    (folder / "broken" / "fss_kernels" / "_fss_cpu.so").write_bytes(b"\x7fELF, but not a library")
    (folder / "raises" / "triton").mkdir(parents=True)
    (folder / "raises" / "triton" / "__init__.py").write_text("raise OSError('libcuda.so.1: no such file\\nmore')\n")
    no_triton = "sys.modules['triton'] = None"
    a_gpu = "torch.cuda.is_available = lambda: True"
    described = {
        "all there": {},
        "no library": {"path": ["without"]},
        "broken library": {"path": ["broken"]},
        "no Triton": {"before": no_triton},
        "no library, no Triton": {"path": ["without"], "before": no_triton},
        "Triton does not import": {"path": ["raises"], "environment": {"TRITON_INTERPRET": "1"}},
        "no driver for Triton": {"before": a_gpu},
        "unknown ISA": {"environment": {"FSS_KERNELS_CPU_ISA": "avx1024"}},
        **{isa: {"environment": {"FSS_KERNELS_CPU_ISA": isa}} for isa in ISAS},
    }
    cases = {
        name: {
            "path": [str(folder / p) for p in case.get("path", [])] + [str(ROOT)],
            "environment": case.get("environment", {}),
            "before": case.get("before", ""),
        }
        for name, case in described.items()
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FSS_KERNELS_", "TRITON_", "PYTHONPATH"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", MATRIX, json.dumps(cases)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.keys() == cases.keys(), done.stderr
    return found


NO_GPU = "PyTorch sees no GPU"
# case -> default backend, and what `info` and a forced backend say of the backends that cannot run
EXPECTED = {
    "all there": ("cpp", {"triton": NO_GPU}),
    "no library": ("reference", {"cpp": "_fss_cpu.so was not built", "triton": NO_GPU}),
    "broken library": ("reference", {"cpp": "_fss_cpu.so does not load", "triton": NO_GPU}),
    "no Triton": ("cpp", {"triton": "Triton is not installed"}),
    "no library, no Triton": ("reference", {"cpp": "was not built", "triton": "Triton is not installed"}),
    "Triton does not import": (
        "cpp",
        {"triton": "Triton does not work here: OSError: libcuda.so.1: no such file"},
    ),
    "no driver for Triton": ("cpp", {"triton": "Triton does not work here: "}),
    "unknown ISA": (
        "reference",
        {
            "cpp": "FSS_KERNELS_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, got avx1024",
            "triton": NO_GPU,
        },
    ),
    **{isa: ("cpp", {"triton": NO_GPU}) for isa in ISAS},
}


@pytest.mark.parametrize("case", EXPECTED)
def test_fallbacks(reports, case):
    found, (default, reasons) = reports[case], EXPECTED[case]
    assert found["wrong"] == [] and found["code"] == 0 and found["defaults"] == [default]
    for backend, reason in reasons.items():
        assert reason in found["info"] and reason in found["refused"][backend]
    assert found["refused"].keys() == {"cuda", *reasons}
    said = [line.partition(", cuda: ")[2] for line in found["info"].splitlines() if ", cuda: " in line]
    assert said and all(reason and reason in found["refused"]["cuda"] for reason in said)
    assert found["compared"].keys() == {"None", *_loading.BACKENDS} - found["refused"].keys()
    assert min(found["compared"].values()) >= 2 * len(_op.ops)
    assert found["networks"] == ["dpcn", "dpnet", "panet"]
    assert found["warnings"] == [f"fss_kernels: the CPU kernels are off: {r}" for r in reasons.values() if "ISA" in r]
    assert found["isa"] == (case if case in ISAS else None if default == "reference" else _loading.cpu_isa())
    assert ("fallback" in found["from"]) == ("library" in case)
