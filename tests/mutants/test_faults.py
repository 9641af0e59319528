"""The planted faults still fit the sources; tests/mutants/run.py plants them and looks for the test that fails."""

from __future__ import annotations

import faults
import pytest

from fss_kernels import testing

ALL = faults.load()
LEAST = 10  # faults of an op
FOLDERS = sorted({spec.op.folder for name, spec in testing.specs().items()})


def test_planted_faults_fit_the_sources():
    """The file exists and has every text to replace exactly once."""
    messages = faults.unfit(ALL)
    assert not messages, f"{len(messages)} of {len(ALL)} faults do not fit:\n" + "\n".join(messages)


def test_every_fault_has_a_name_of_its_own_and_says_what_is_wrong():
    names = [fault.name for fault in ALL]
    assert sorted({*names}) == sorted(names)
    assert not [f.name for f in ALL if not (f.why[:1].isalnum() and f.why.endswith(".") and len(f.why.split()) >= 5)]


@pytest.mark.parametrize("folder", [*FOLDERS, "models"])
def test_every_op_has_faults(folder):
    assert sum(fault.op == folder for fault in ALL) >= LEAST


ENTRY = '[[fault]]\nid = "a"\nfile = "f.py"\nwhy = "It is wrong."\n'


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ('find = "x = 1"\nreplace = "x = 2"', None),
        ('find = "x = 3"\nreplace = "x = 2"', "op.toml: a: f.py has this 0 times, not once: x = 3"),
        ('find = "y"\nreplace = "z"', "op.toml: a: f.py has this 2 times, not once: y"),
        ('find = "x = 1"\nreplace = "x = 1"', "op.toml: a: replaces this by itself: x = 1"),
    ],
)
def test_a_fault_that_does_not_fit_is_named(tmp_path, edit, message):
    (tmp_path / "f.py").write_text("x = 1\ny = y\n")
    found = faults.parse("op", ENTRY + edit)
    assert faults.unfit(found, tmp_path) == ([message] if message else [])
    assert faults.unfit(found, tmp_path / "elsewhere") == ["op.toml: a: there is no f.py"]


def test_a_fault_in_two_places(tmp_path):
    (tmp_path / "f.py").write_text("x = 1\ny = 2\n")
    also = '[[fault.also]]\nfind = "y = 2"\nreplace = "y = x"\n'
    (fault,) = faults.parse("op", f'{ENTRY}find = "x = 1"\nreplace = "x = 2"\n{also}')
    fault.plant(tmp_path)
    assert (tmp_path / "f.py").read_text() == "x = 2\ny = x\n"


def test_a_fault_lacks_a_key():
    with pytest.raises(faults.Unfit, match=r"op\.toml: a: needs file, find, id, replace, why, has file, id, why"):
        faults.parse("op", ENTRY)
