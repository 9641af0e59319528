"""What may import what inside the package."""

import ast
from pathlib import Path

import fss_kernels

OPS = Path(fss_kernels.__file__).parent / "ops"


def imported(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_op_imports_another():
    """What two ops share lies above their folders."""
    within = 0
    for path in OPS.glob("*/*.py"):
        own = f"fss_kernels.ops.{path.parent.name}."
        for name in imported(path):
            within += name.startswith(own)
            assert not name.startswith("fss_kernels.ops.") or name.startswith(own), f"{path} imports {name}"
    assert within  # the test sees imports
