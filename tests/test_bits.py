"""What tests/bits.py reports of two versions: of equal ones nothing, of a faulty one the tensors that it gets wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import bits
import pytest

ROOT = Path(__file__).parents[1]
OP = "masked_avg_pool"
# The reference's output by a little too large; nothing that the backward uses.
FAULT = f"""
_right = {OP}_fwd


def {OP}_fwd(*args, **kwargs):
    output, *kept = _right(*args, **kwargs)
    return output * 1.0625, *kept
"""


def key(tensor="grad_x", backend="cpp-avx2", sample="plain", op="an_op"):
    return bits.Key(op, backend, sample, "float32", "contiguous", tensor)


BASE = {key(): "1", key("output 0"): "2", key(bits.INPUTS): "x", key(sample="old"): "3"}


def test_what_is_compared():
    same = bits.compare(BASE, BASE)
    assert same.different == [] and same.compared == {("an_op", "cpp-avx2"): 3} and not any(same.one_sided.values())
    head = {key(): "changed", key(bits.INPUTS): "x", key(sample="new"): "4"}
    found = bits.compare(BASE, head)  # the output is gone, and a sample replaced
    assert found.different == [key(), key("output 0")]
    assert found.one_sided == {"base": {("an_op", "old")}, "head": {("an_op", "new")}, "changed": set()}
    other = bits.compare(BASE, {**head, key(bits.INPUTS): "y"})  # the sample has other values
    assert other.different == [] and other.one_sided["changed"] == {("an_op", "plain")}


def test_a_backend_that_never_runs_is_reported(capsys):
    never = {key("call", backend=f"cpp-{isa}"): "raises RuntimeError" for isa in bits.ISAS}
    found = bits.compare(never, never)
    assert found.empty() == ["an_op cpp"] and bits.compare(BASE | never, BASE).empty() == []
    assert bits.report(found, [], []) == 1
    assert "nothing was compared: an_op cpp" in capsys.readouterr().out
    assert bits.report(bits.compare({}, {}), [], []) == 1


def test_the_allow_list(tmp_path, capsys):
    path = tmp_path / "allowed.toml"
    entry = '[[allowed]]\nop = "an_*"\nbackend = "cpp-*"\ntensor = "grad_*"\nreason = "other order"\n'
    path.write_text(entry + entry.replace("cpp-*", "triton"))
    allowed, stale = bits.allow_list(path)
    assert allowed.matches(key()) and not allowed.matches(key("output 0")) and not stale.matches(key())
    assert bits.report(bits.compare(BASE, {**BASE, key(): "0"}), [], [allowed, stale]) == 0
    assert "stale: nothing differs at op an_*, backend triton, tensor grad_*" in capsys.readouterr().out
    path.write_text(entry.replace('"other order"', '" "'))
    with pytest.raises(SystemExit, match="entry 1 needs op, backend, tensor and reason"):
        bits.allow_list(path)


def test_neither_a_commit_nor_a_folder():
    with pytest.raises(SystemExit, match="no-such-version is neither a commit nor a folder"):
        bits.main(["no-such-version"])


@pytest.mark.slow
def test_a_planted_fault_differs(tmp_path, monkeypatch, capsys):
    """With the libraries that are built already: whether a copy builds is what test_installation.py asks."""
    trees = [tmp_path / name for name in ("base", "head")]
    for tree in trees:
        shutil.copytree(ROOT / "fss_kernels", tree / "fss_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(bits, "prepare", lambda version, *_: Path(version))
    base, head = map(str, trees)
    some = ["--ops", OP, "--samples", "soft", "*empty*", "--backends", "reference", "cpp-generic"]
    assert bits.main([base, base, *some]) == 0
    assert " 0 different, 0 of them not allowed" in capsys.readouterr().out
    with Path(trees[1], "fss_kernels", "ops", OP, "reference.py").open("a") as file:
        file.write(FAULT)
    assert bits.main([base, head, *some, "--values"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{OP} ")]
    assert lines and all(line.startswith(f"{OP} reference ") and " output 0" in line for line in lines)
    assert all("elements, by at most " in line for line in lines)
