"""``python -m benchmarks``: one way of writing options, and none is taken and ignored."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import ceilings, compare, environment, gpu, measure, models, overhead, storage
from fss_kernels import testing

OPS = tuple(testing.specs())
ROW = {"op": OPS[0], "size": "a", "dtype": "float32", "mode": "forward"}


def result(op: str = OPS[0], **fields) -> dict:
    """Results of one row, in which ours takes as long as half of the roof allows."""
    seconds = {"median": 2e-3, "p20": 2e-3, "p80": 2e-3, "samples": 6}
    row = {**ROW, "op": op, "provider": measure.OURS, "correct": True, "max_error": 0.0, "seconds": seconds}
    row |= {"ratio_to_ours": 1.0, "roof_fraction": 0.5, "bytes": 3e6, "extra_bytes": 4e5, "scratch_bytes": 4e5}
    moved = {"before": {"read_gbps": 1.0}, "after": {"read_gbps": 1.0}}
    parts = {"plan": {"ops": [op], "quick": False, "rounds": 7, "repeats": 3}, "peers": [], "ceilings": moved}
    return {**environment.environment(), **parts, "rows": [row], "failures": [], "notes": []} | fields


def refusal(arguments: list[str], capsys) -> str:
    """What a command that ends with code 2 says."""
    try:
        code = command.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2, arguments
    found = capsys.readouterr()
    return found.out + found.err


def test_options_are_spelled_alike(capsys):
    """Words joined by dashes, flags without a value; results and revisions by position, all else by name."""
    helps = {}
    for name, function in command.COMMANDS.items():
        with pytest.raises(SystemExit, match="0"):
            command.main([name, "--help"])
        helps[name] = capsys.readouterr().out
        for parameter in inspect.signature(function).parameters.values():
            option = f"--{parameter.name.replace('_', '-')}"
            positional = parameter.name in ("files", "kind", "file", "before", "after")
            assert (option in helps[name]) is not positional, (name, option)
            assert inspect.getdoc(function).count(f"\n    {parameter.name}: ") == 1, (name, parameter.name)
    assert set(helps) == {"run", "check", "compare", "plot", "report", "readme", "overhead", "gate", "networks", "gpu",
                          "record"}  # fmt: skip
    assert not re.search(r"--\w+_", "".join(helps.values()))


@pytest.mark.parametrize(
    ("option", "value"),
    [("--ops", [OPS[0]]), ("--quick", []), ("--sizes", ["S"]), ("--dtypes", ["float32"]), ("--exclude", ["x"]),
     ("--tiny", []), ("--rounds", ["7"]), ("--repeats", ["3"]), ("--seed", ["0"]), ("--sweep", [])],
)  # fmt: skip
def test_what_a_gpu_run_ignores_is_an_error(option, value, monkeypatch, capsys):
    """Also where the value is the default."""
    monkeypatch.setattr(command, "_on_gpu", lambda *arguments: pytest.fail("it ran"))
    assert f"run: --device cuda ignores {option}\n" in refusal(["run", "--device", "cuda", option, *value], capsys)


def test_what_a_gpu_run_takes(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(command, "_on_gpu", lambda *arguments: seen.append(arguments) or 0)
    assert command.main(["run", "--device", "cuda"]) == 0
    assert command.main(["run", "--device", "cuda", "--out", "folder", "--resume"]) == 0
    assert seen == [("", False), ("folder", True)]
    said = refusal(["run", "--device", "cuda", "--quick", "--tiny", "--resume"], capsys)
    assert "run: --device cuda ignores --quick, --tiny\n" in said


def test_a_parameter_of_run_is_taken_or_refused_on_a_gpu():
    """A new option cannot slip through: whatever `_on_gpu` does not get is refused."""
    names = {*inspect.signature(command.run).parameters}
    refused = {n for n in names if command._ignored("run", {"device": "cuda"}, {n})}
    assert names - refused == {"device", "out", "resume"} and not command._ignored("run", {"device": "cpu"}, names)


def test_two_files_need_no_measurement(tmp_path, monkeypatch, capsys):
    """Options of a measurement are for revisions; with one revision they have an effect."""
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file in files:
        storage.write(file, "ops", result())
    names = [str(file) for file in files]
    assert command.main(["compare", *names, "--threshold", "1.2"]) == 0
    said = refusal(["compare", *names, "--rounds", "7", "--ops", OPS[0]], capsys)
    assert "compare: a comparison of two result files ignores --ops, --rounds\n" in said
    seen = []
    monkeypatch.setattr(compare, "measured", lambda source, arguments: seen.append(arguments) or result())
    assert command.main(["compare", names[0], "HEAD", "--ops", *OPS[:2], "--sizes", "S", "--rounds", "2"]) == 0
    assert seen == [["--ops", *OPS[:2], "--sizes", "S", "--rounds", "2"]] * 2
    chosen = command._parser().parse_args(["run", *seen[0]]).run  # what the revision's own program gets
    assert (chosen.ops, chosen.sizes, chosen.rounds) == ([*OPS[:2]], ["S"], 2)


def test_a_slowed_gate_writes_no_baseline(capsys):
    """Nor does --update judge: the two have nothing to do with each other."""
    said = refusal(["gate", "--slowed", "2", "--update"], capsys)
    assert "gate: --update, which writes a baseline of the ops as they are, ignores --slowed\n" in said
    assert not command._ignored("gate", {"update": True}, {"update", "ops", "repeat"})
    assert not command._ignored("gate", {"update": False}, {"slowed", "ops", "repeat"})


def test_a_revision_from_before_these_files_is_refused(monkeypatch):
    """No build is tried: its program writes JSON."""
    if not environment.output("git", "rev-parse", "--verify", "--quiet", "6e3e291cc2cf^{commit}"):
        pytest.skip("no git history back to the results in JSON")
    with pytest.raises(ValueError, match="compare: 6e3e291cc2cf writes results in JSON"):
        compare.measured("6e3e291cc2cf", [])
    assert "6e3e291cc2cf" not in environment.output("git", "worktree", "list")


@pytest.mark.parametrize("option", ["--ops", "--dry", "--quick", "--device"])
@pytest.mark.parametrize("name", ["check", "readme", "plot"])
def test_what_a_command_does_not_know_is_an_error(name, option, capsys):
    assert option in refusal([name, option], capsys)


def test_a_quick_run_has_one_class_and_its_own_rounds(tmp_path, monkeypatch, capsys):
    assert "run: --quick measures one size of class S and ignores --sizes L M\n" in refusal(
        ["run", "--quick", "--sizes", "M", "L", "1x*"], capsys
    )
    plans = []
    monkeypatch.setattr(ceilings, "native", lambda: None)
    monkeypatch.setattr(command, "_measured", lambda plan: plans.append(plan) or result())
    for options in ([], ["--rounds", "5"]):
        for quick in ([], ["--quick"]):
            arguments = ["run", "--ops", OPS[0], "--out", str(tmp_path / "x.csv"), *options, *quick]
            assert command.main(arguments) == 0
    assert [plan.rounds for plan in plans] == [7, 3, 5, 5]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Every folder of ops is a run in this machine's file, written as it is done; --resume leaves out what is there."""
    monkeypatch.setattr(storage, "RESULTS", tmp_path)
    monkeypatch.setattr(ceilings, "native", lambda: None)
    monkeypatch.setattr(environment, "unchanged", lambda *arguments: True)
    done = []

    def measured(plan):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(plan.ops)
        found = result(plan.ops[0], plan=dataclasses.asdict(plan))
        found["environment"]["clean"] = True
        return found

    monkeypatch.setattr(command, "_measured", measured)
    with pytest.raises(KeyboardInterrupt):
        command.main(["run"])
    folders = list(dict.fromkeys(spec.op.folder for name, spec in testing.specs().items()))
    assert {*storage.read(storage.here("ops"))} == {*folders[:2]}
    first = [*done]
    done.clear()
    monkeypatch.setattr(command, "_measured", lambda plan: measured(plan) if plan.ops not in first else 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        command.main(["run", "--resume"])
    assert len(done) == 2 and {*storage.read(storage.here("ops"))} == {*folders[:4]}
    assert capsys.readouterr().out.count("measured already, from the same sources") == 2
    assert not storage.here("sweeps").exists()


def test_a_report_is_of_one_run(tmp_path, monkeypatch, capsys):
    """A file of several runs needs --ops; one run needs nothing."""
    monkeypatch.setattr(storage, "RESULTS", tmp_path / "none")
    file, page = tmp_path / "x.csv", tmp_path / "page.html"
    for name, op in (("one", OPS[0]), ("two", OPS[1])):
        storage.write(file, name, result(op))
    arguments = ["report", str(file), "--out", str(page)]
    said = refusal(arguments, capsys)
    assert "choose them with --ops" in said and f"has runs of: {OPS[0]}; {OPS[1]}" in said
    refusal([*arguments, "--ops", "nothing"], capsys)
    assert command.main([*arguments, "--ops", OPS[1]]) == 0
    assert f"{OPS[1]} · a" in page.read_text() and f"{OPS[0]} · a" not in page.read_text()


def test_processes_that_measure_start_with_a_fixed_allocator(monkeypatch):
    """The same command runs again in an environment of its own, and only once."""
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    calls = []
    monkeypatch.setattr(
        command.subprocess, "run", lambda c, env: calls.append((c, env)) or subprocess.CompletedProcess(c, 7)
    )
    given = {"overhead": ["--ops", OPS[0], "--out", "o.csv"], "gate": ["--slowed", "2"], "networks": ["--quick"]}
    assert {*given} == {*command.FIXED}
    for name, options in given.items():
        assert command.main([name, *options]) == 7
        assert calls[-1][0] == [sys.executable, "-m", "benchmarks", name, *options]
        assert environment.ALLOCATOR.items() <= calls[-1][1].items() and "OMP_NUM_THREADS" in calls[-1][1]
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    monkeypatch.setattr(overhead, "run", lambda ops, path: {"rows": []})
    monkeypatch.setattr(models, "run", lambda plan, path: (plan, path))
    assert command.main(["overhead", *given["overhead"]]) == 0 and len(calls) == 3
    plan = dataclasses.replace(models.QUICK, rounds=2, network_rounds=2)
    assert command.main(["networks", "--quick", "--rounds", "2", "--out", "n.csv"]) == (plan, Path("n.csv"))
    assert command.main(["networks"]) == (models.Plan(), storage.here("networks"))


def test_gpu_stages_are_named(tmp_path, monkeypatch, capsys):
    assert "stage" in refusal(["gpu", "--out", str(tmp_path)], capsys)
    assert "all-of-it" in refusal(["gpu", "--stage", "all-of-it", "--out", str(tmp_path)], capsys)
    seen = []
    monkeypatch.setattr(gpu, "run", lambda *arguments: seen.append(arguments) or 5)
    options = ["--dry", "--resume", "--limit", "60", "--commit", "abc"]
    for stage in gpu.STAGES:
        assert command.main(["gpu", "--stage", stage, "--out", str(tmp_path), *options]) == 5
    assert seen == [(stage, tmp_path, True, 60.0, True, "abc") for stage in gpu.STAGES]
    assert command._parser().parse_args(["gpu", "--stage", "core", "--out", "x"]).gpu.limit == gpu.LIMIT


def test_the_watchdog_needs_no_pytorch():
    """`gpu` builds the libraries and survives a crash of what measures: its own process has little in it."""
    code = """
import sys
from benchmarks import __main__, gpu
__main__._parser().parse_args(["gpu", "--stage", "core", "--out", "x"])
print("torch" in sys.modules)
"""
    assert environment.output(sys.executable, "-c", code) == "False"
