"""Result files: no figure is lost, an interrupted write leaves the old run, and what is committed stays small."""

from __future__ import annotations

import json
import math
import subprocess

import pytest

from benchmarks import environment, reliability, storage

BASE = "6e3e291cc2cf"  # the last commit whose results were JSON
RECORDED_ON = "amd-epyc-family-25-model-1-2-cores"  # where the reliability runs of that commit ran
NO_HISTORY = "no git history back to the results in JSON"
VALUES = [None, True, False, 0, -3, 10**30, 0.1, 1e-300, -0.0, "", "text", "a, b", 'say "x"', "1", "1e5", "null"]
VALUES += [
    "true",
    "NaN",
    "[]",
    "{}",
    '"x"',
    " padded ",
    "two\nlines",
    "tab\t",
    "µs ÷ 2",
    {},
    [],
    [1.5, None, ""],
    ["1"],
]


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=environment.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(NO_HISTORY)
    return done.stdout


def before() -> list[tuple[str, str, str, dict]]:
    """Kind, machine, name and content of every result file of that commit."""
    found = []
    for path in git("ls-tree", "-r", "--name-only", BASE, "benchmarks/results").split():
        content = json.loads(git("show", f"{BASE}:{path}"))
        assert content.pop("schema") == 1
        kind, _, stem = path.removeprefix("benchmarks/results/").removesuffix(".json").rpartition("/")
        machine, _, last = stem.rpartition("-")
        if kind == "reliability":
            found.append((kind, RECORDED_ON, stem, content))
        elif kind in ("overhead", "wheel"):
            found.append((kind, stem, kind, content))
        elif last == "models":
            found.append(("networks", machine, "networks", content))
        else:
            found.append((kind or "ops", machine, last, content))
    assert len(found) == 35
    return found


def stored(kind: str, name: str, content: dict) -> dict:
    return reliability._stored(name, content) if kind in ("reliability", "wheel") else content


def content_of(kind: str, name: str, results: dict) -> dict:
    return reliability._content(name, results) if kind in ("reliability", "wheel") else results


def test_every_figure_of_the_old_files_survives(tmp_path):
    """What the JSON files said, written and read again, is the same; the committed files say it too, or newer runs."""
    old = before()
    for kind, machine, name, content in old:
        storage.write(tmp_path / kind / f"{machine}.csv", name, stored(kind, name, content))
    for kind, machine, name, content in old:
        again = storage.run(tmp_path / kind / f"{machine}.csv", name)
        assert exactly(content_of(kind, name, again)) == exactly(content), (kind, machine, name)
        committed = storage.run(storage.RESULTS / kind / f"{machine}.csv", name)
        dates = [results["environment"]["date"] for results in (content, committed)]
        assert dates[0] <= dates[1], (kind, machine, name)
        if dates[0] == dates[1]:
            assert exactly(content_of(kind, name, committed)) == exactly(content), (kind, machine, name)


def exactly(content: object) -> str:
    """Text in which 1, 1.0 and True differ, and every digit counts."""
    return json.dumps(content, sort_keys=True)


def test_committed_results_are_small():
    files = [p for p in storage.RESULTS.rglob("*") if p.is_file()]
    if not files:
        pytest.skip("no committed results")
    assert {p.suffix for p in files} == {".csv", ".json"}
    lines = {p.name: len(p.read_text().splitlines()) for p in files}
    assert sum(len(p.read_text().splitlines()) for p in files) < 15_000, lines
    tables = [p for p in files if p.suffix == ".csv" and not p.name.endswith(".curves.csv")]
    assert sum(len(run["rows"]) for p in tables for run in storage.read(p).values()) == (
        sum(len(p.read_text().splitlines()) - 1 for p in tables)
    )  # one line each


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_keeps_its_type(value, tmp_path):
    """In a row, nested in it, in a list of it and in the header; absent is not None."""
    row = {"a": {"b": {"c": value}, "d": [value, value] if not isinstance(value, (list, dict)) else 1}, "e": value}
    results = {"about": value, "rows": [row, {"f": 1}, {"e": None}]}
    storage.write(tmp_path / "x.csv", "one", results)
    again = storage.read(tmp_path / "x.csv")["one"]
    assert exactly(again) == exactly(results)
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4


def test_infinity_and_nan_survive(tmp_path):
    storage.write(tmp_path / "x.csv", "one", {"rows": [{"a": math.inf, "b": [-math.inf, math.nan]}]})
    (row,) = storage.read(tmp_path / "x.csv")["one"]["rows"]
    assert row["a"] == math.inf and row["b"][0] == -math.inf and math.isnan(row["b"][1])


def test_runs_share_a_file(tmp_path):
    """A run replaces its older one and no other; curves go with the last run that has any."""
    path, curves = tmp_path / "x.csv", tmp_path / "x.curves.csv"
    storage.write(path, "a-b", {"n": 1, "rows": [{"x": 1, "all": [1, 2]}]})
    storage.write(path, "a", {"n": 2, "rows": [{"y": 2}]})
    storage.write(path, "a-b", {"n": 3, "rows": [{"x": 3, "all": [3]}, {"x": 4}]})
    assert storage.read(path) == {
        "a": {"n": 2, "rows": [{"y": 2}]},
        "a-b": {"n": 3, "rows": [{"x": 3, "all": [3]}, {"x": 4}]},
    }
    assert storage.run(path, "a") == {"n": 2, "rows": [{"y": 2}]} and storage.run(path, "c") is None
    assert storage.run(tmp_path / "none.csv", "a") is None
    assert curves.read_text().splitlines() == ["run,row,name,index,value", "a-b-2,0,all,0,3"]
    storage.write(path, "a-b", {"rows": []})
    assert not curves.exists() and storage.read(path)["a-b"] == {"rows": []}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.csv", "x.json"]


@pytest.mark.parametrize("writes", range(6))
def test_an_interrupted_write_leaves_one_run_whole(tmp_path, monkeypatch, writes):
    """Power may go after any of the files: what is read is the old run or the new one, and the next write succeeds."""
    path = tmp_path / "x.csv"
    other = {"n": 0, "rows": [{"x": 0, "all": [0]}]}
    old, new = ({"n": n, "rows": [{"x": n, "all": [n] * n}] * n} for n in (1, 2))
    storage.write(path, "a", old)
    storage.write(path, "b", other)
    count, write_text = [0], environment.write_text

    def interrupted(*arguments):
        if count[0] == writes:
            raise KeyboardInterrupt
        count[0] += 1
        write_text(*arguments)

    monkeypatch.setattr(environment, "write_text", interrupted)
    if writes < 5:
        with pytest.raises(KeyboardInterrupt):
            storage.write(path, "a", new)
    else:
        storage.write(path, "a", new)
    assert count[0] == writes
    assert storage.read(path) == {"a": new if writes >= 3 else old, "b": other}
    monkeypatch.setattr(environment, "write_text", write_text)
    last = {"n": 3, "rows": [{"x": 3}]}
    storage.write(path, "a", last)
    assert storage.read(path) == {"a": last, "b": other}


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "x.csv"
    with pytest.raises(FileNotFoundError, match=r"there is no .*x\.csv"):
        storage.read(path)
    storage.write(path, "a", {"rows": [{"x": 1}, {"x": 2}]})
    path.write_text("run,x\na-1,1\n")
    with pytest.raises(ValueError, match=r"x\.csv has 1 rows of a-1, its header says 2"):
        storage.read(path)
    path.with_suffix(".json").write_text('{"schema": 1, "runs": {}}')
    with pytest.raises(ValueError, match=r"x\.json has schema 1, this program reads 2"):
        storage.read(path)


@pytest.mark.parametrize("row", [{"a.b": 1}, {"": 1}, {"run": 1}, {"a": [[1]]}, {"a": [{"b": 1}]}], ids=repr)
def test_what_cannot_be_stored_is_refused(row, tmp_path):
    with pytest.raises(ValueError, match="storage: "):
        storage.write(tmp_path / "x.csv", "a", {"rows": [row]})
    with pytest.raises(ValueError, match=r"must end in \.csv, got .*x\.json"):
        storage.write(tmp_path / "x.json", "a", {"rows": []})
    assert not [*tmp_path.iterdir()]


def test_committed_files_of_a_kind(tmp_path, monkeypatch):
    """Oldest first; what failed is not among them."""
    monkeypatch.setattr(storage, "RESULTS", tmp_path)
    for name, date in (("late", "2026-02"), ("early", "2026-01"), ("late.failed", "2026-03")):
        storage.write(tmp_path / "ops" / f"{name}.csv", "a", {"environment": {"date": date}, "rows": [{"x": [1]}]})
    found = storage.committed("ops")
    assert [(f["machine"], f["name"]) for f in found] == [("early", "a"), ("late", "a")]
    assert found[0]["file"] == str(tmp_path / "ops" / "early.csv") and storage.committed("sweeps") == []
    assert storage.here("ops") == tmp_path / "ops" / f"{environment.machine_slug()}.csv"
