"""``python -m benchmarks.record fuzz|sanitize|wheel FILE``: what a long run tried becomes a committed result.

The runs write plain files and know nothing of results: ``make fuzz``, ``make sanitize`` and ``make dist-check`` call
this with ``RECORD=1``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment, reliability


def record(kind: str, file: str | Path) -> None:
    """Adds what a run wrote to a file.

    Args:
        kind: ``fuzz`` (a line of JSON a round), ``sanitize`` or ``wheel``
        file: what the run wrote
    """
    text = Path(file).read_text()
    if kind == "fuzz":
        rounds = [json.loads(line) for line in text.splitlines()]
        for r in rounds:
            reliability.add_round(str(rounds[0]["start"]), r["seed"], r["examples"], r["failed"])
    elif kind == "sanitize":
        reliability.record("sanitize", json.loads(text))
    elif kind == "wheel":
        _record_wheel(json.loads(text))
    else:
        raise ValueError(f"record: kind must be fuzz, sanitize or wheel, got {kind!r}")


def _record_wheel(content: dict[str, Any]) -> None:
    """Adds runs to the log of their wheel; a new wheel starts a new log."""
    path = reliability.WHEELS / f"{Path(content['wheel']['file']).stem.rpartition('-')[2]}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = before.get("runs", []) if before.get("wheel") == content["wheel"] else []
    new = {(r["torch"], r["python"]) for r in content["runs"]}
    kept = [r for r in kept if (r["torch"], r["python"]) not in new]
    environment.write_json(path, environment.environment() | {**content, "runs": [*kept, *content["runs"]]})


if __name__ == "__main__":
    record(*sys.argv[1:])
