"""The planted faults of every op and of fss_models, a TOML file each in this folder.

    [[fault]]
    id = "forget-eps"
    file = "csrc/masked_avg_pool/masked_avg_pool.h"
    why = "The average is divided by the area alone."     # one sentence: what is wrong then
    find = "return area + A(args.eps);"                   # once in the file
    replace = "return area;"

A fault in several places has further pairs of ``find`` and ``replace`` in ``[[fault.also]]``. ``isa = "avx512_bf16"``
names the only instruction set whose kernels run the code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
KEYS = {"id", "file", "why", "find", "replace"}


class Unfit(ValueError):
    """A fault that is no fault, or does not fit the sources any more."""


@dataclass(frozen=True)
class Fault:
    """One planted fault: what to replace in which file."""

    op: str  # or "models"
    id: str
    file: str
    why: str = field(compare=False)
    edits: tuple[tuple[str, str], ...]  # find, replace
    isa: str | None = None

    @property
    def name(self) -> str:
        """As the committed score names it."""
        return f"{self.op}/{self.id}"

    def faulty(self, root: Path = ROOT) -> str:
        """The text of the file with the fault."""
        path = root / self.file
        if not path.is_file():
            raise Unfit(f"{self.op}.toml: {self.id}: there is no {self.file}")
        text = path.read_text()
        for find, replace in self.edits:
            if (count := text.count(find)) != 1:
                raise Unfit(f"{self.op}.toml: {self.id}: {self.file} has this {count} times, not once: {find}")
            if find == replace:
                raise Unfit(f"{self.op}.toml: {self.id}: replaces this by itself: {find}")
            text = text.replace(find, replace)
        return text

    def plant(self, root: Path) -> None:
        """Puts the fault into the file under this root."""
        Path(root, self.file).write_text(self.faulty(root))


def parse(op: str, text: str) -> list[Fault]:
    """The faults of one TOML file."""
    found = []
    for entry in tomllib.loads(text)["fault"]:
        name = f"{op}.toml: {entry.get('id', '(no id)')}"
        if (keys := {*entry} - {"also", "isa"}) != KEYS:
            raise Unfit(f"{name}: needs {', '.join(sorted(KEYS))}, has {', '.join(sorted(keys))}")
        edits = tuple((e["find"], e["replace"]) for e in (entry, *entry.get("also", ())))
        found.append(Fault(op, entry["id"], entry["file"], entry["why"], edits, entry.get("isa")))
    return found


def load(folder: Path = FOLDER) -> list[Fault]:
    """All faults, by op and in the order of its file."""
    return [fault for path in sorted(folder.glob("*.toml")) for fault in parse(path.stem, path.read_text())]


def find(name: str) -> Fault:
    """The fault of this name, op/id."""
    return next(fault for fault in load() if fault.name == name)


def unfit(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """Why faults do not fit the sources, one message each."""
    messages = []
    for fault in faults:
        try:
            fault.faulty(root)
        except Unfit as error:
            messages.append(str(error))
    return messages
