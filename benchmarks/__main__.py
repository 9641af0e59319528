"""The command line: ``python -m benchmarks COMMAND``, one of the functions below."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import docstring_parser
from jsonargparse import ArgumentParser
from rich.console import Console

# What measures imports PyTorch: the commands import it themselves, so that --help and the watchdog of `gpu` need not.
from benchmarks import environment, storage

# PyTorch's compiler crashed on a peer: it depends on what it timed while it tuned, and the next run has a number again.
CRASH = "raised InductorError"
FIXED = ("overhead", "gate", "networks")  # commands whose process must start with the allocator and the threads fixed
console = Console(width=None if sys.stdout.isatty() else 160)


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def run(
    ops: list[str] = (),
    quick: bool = False,
    out: str = "",
    sizes: list[str] = (),
    dtypes: list[str] = ("float32",),
    exclude: list[str] = (),
    tiny: bool = False,
    rounds: int | None = None,
    repeats: int = 3,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    sweep: bool = False,
    resume: bool = False,
) -> int:
    """Measures ops against their peers.

    Args:
        ops: names of ops; all of them when none is given
        quick: three rounds, one size per op that moves little memory, and only the eager peers of a sweep
        out: result file (.csv); benchmarks/results/ops or sweeps/<machine>.csv when empty. With cuda a folder
        sizes: shell patterns of size labels, and the classes S, M and L
        dtypes: dtypes of the features
        exclude: shell patterns of peers to leave out
        tiny: shrink every size, to test this program
        rounds: rounds in which every provider has a turn; 7, or 3 of a quick run, when not given
        repeats: timed calls in a turn
        seed: of the order of turns
        sweep: vary one number at a time, for plots
        resume: leave out what this machine has measured already from the same sources
        device: cpu, or cuda, which runs the stages core and peers of `gpu`
    """
    from benchmarks import ceilings, measure, targets
    from fss_kernels import testing

    if device == "cuda":
        return _on_gpu(out, resume)
    known = testing.specs()
    if unknown := set(ops) - set(known):
        _say(f"run: unknown ops {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return 2
    if quick and (classes := set(sizes) & set(measure.CLASSES)):
        _say(f"run: --quick measures one size of class S and ignores --sizes {' '.join(sorted(classes))}")
        return 2
    try:
        ceilings.native()
    except RuntimeError as error:
        _say(f"run: {error}")
        return 2
    rounds = rounds or (3 if quick else 7)
    threads = environment.cores()
    metrics = (line["metric"].partition(":") for line in targets.load())
    named = tuple(sorted({name for kind, _, name in metrics if kind == "peer"} - {"fastest"}))
    path = Path(out) if out else storage.here("sweeps" if sweep else "ops")
    groups: dict[str, list[str]] = {}
    for op in ops or known:
        if sweep and not known[op].axes:
            _say(f"run: {op} has no axes to sweep")
            continue
        groups.setdefault("ops" if out else known[op].op.folder, []).append(op)
    codes = []
    for name, members in groups.items():
        chosen = (tuple(names) for names in (members, dtypes, sizes, exclude))
        plan = measure.Plan(*chosen, quick, sweep, tiny, named, rounds, repeats, seed, threads)
        folders = [known[op].op.folder for op in members]
        before = storage.run(path, name) if resume else None
        if environment.measured(before, asdict(plan), *environment.sources(*folders)):
            continue
        codes.append(_finish(_measured(plan), path, name))
    return max(codes, default=0)


def _on_gpu(out: str, resume: bool) -> int:
    """Calibration, our kernels, then their peers, each in at most ten minutes."""
    import torch

    from benchmarks import gpu

    if not torch.cuda.is_available():
        _say("run: device cuda: PyTorch sees no GPU; `make gpu DRY=1` runs the same code on a CPU")
        return 2
    folder = Path(out or environment.ROOT / "build" / "gpu")
    return max(gpu.run(stage, folder, resume=resume) for stage in ("core", "peers"))


def _fixed_environment() -> dict[str, str]:
    """This process' environment with the allocator and the threads fixed: both are read once, at the start."""
    return {**os.environ, **environment.ALLOCATOR, "OMP_NUM_THREADS": str(environment.cores())}


def _measured(plan: Any) -> dict[str, Any]:
    """The results of a `measure.Plan`, measured in a process of its own."""
    env = {k: v for k, v in _fixed_environment().items() if not k.startswith("PYTEST_")}  # this may run in a test
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder, "plan.json"))
        raw = Path(folder, "results.json")
        command = [sys.executable, "-m", "pytest", "benchmarks/suite", "-x", "-q", "-s", "-o", "addopts="]
        command += [
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--disable-warnings",
            "--benchmark-disable-gc",
            "--benchmark-quiet",
        ]
        command += ["--plan", f"{folder}/plan.json", "--results", str(raw)]
        done = subprocess.run(command, cwd=environment.ROOT, env=env, stdout=subprocess.PIPE, text=True)
        results = json.loads(raw.read_text()) if raw.exists() else {"failures": [], "rows": []}
    if done.returncode:
        _say(done.stdout[-6000:])
        results["failures"].append(f"the measurement ended with code {done.returncode}")
    elif not results["rows"]:
        results["failures"].append("no row matches")
    return results


def _finish(results: dict[str, Any], path: Path, name: str = "ops") -> int:
    """Prints results and writes them; a run that failed does not replace a good one. The exit code.

    A peer on which PyTorch's compiler crashed has no number in that row, and the file says so: no failure of the run.
    """
    from benchmarks import measure, report

    crashed = [f for f in results["failures"] if CRASH in f and f" {measure.OURS}:" not in f]
    results["notes"] = [*results.get("notes", []), *crashed]
    results["failures"] = [f for f in results["failures"] if f not in crashed]
    for row in report.tables(results) if results["rows"] else []:
        _say(row["title"])
        for e in row["entries"]:
            if e["seconds"]:
                speed = (
                    f"{e['seconds']['median'] * 1e3:9.3f} ms {e['ratio_to_ours']:8.2f}x ours {e['roof_fraction']:5.0%}"
                )
                _say(f"  {e['provider']:28} {speed} of the roof, {(e['extra_bytes'] or 0) / 1e6:8.2f} MB extra")
            else:
                _say(f"  {e['provider']:28} refused: it is wrong or crashed")
    quick = results.get("plan", {}).get("quick")
    if quick:
        _say("a quick run: released code and the best eager form of every op, no other peer and none compiled")
    for record in [] if quick else results.get("peers", []):
        if record["error"] is not None and record["optional"]:
            _say(f"optional peer {record['name']} of {record['op']} is missing: {record['error']}")
    for note in results["notes"]:
        _say(f"note: {note}")
    for failure in results["failures"]:
        _say(f"FAILED: {failure}")
    path = storage.write_checked(path, name, results)
    _say(f"{len(results['rows'])} entries -> {path}")
    return 1 if results["failures"] else 0


def check(files: list[str] = (), allow_short: bool = False, lines: str = "") -> int:
    """Compares results with every Speed line.

    Args:
        files: result files; without, the newest committed results of every machine and op
        allow_short: exit with 0 although lines fall short
        lines: the file of lines; benchmarks/targets.toml when empty
    """
    from benchmarks import targets

    chosen = storage.load(files) if files else storage.newest("ops", "networks")
    if not chosen:
        _say(f"check: no results in {storage.RESULTS}; run `python -m benchmarks run`")
        return 1
    code, all_lines, states = 0, targets.load(Path(lines) if lines else targets.PATH), []
    for results in chosen:
        env = results["environment"]
        tree = "" if env["clean"] else ", tree with changes"
        source = f"{Path(results['file']).name}, {results['name']}"
        title = f"{source}: {env['cpu']}, {env['date']}, commit {(env['commit'] or 'unknown')[:10]}{tree}"
        measured = {row["op"] for row in results["rows"]}
        outcomes = [targets.evaluate(line, results) for line in all_lines if line["op"] in measured]
        if outcomes:
            console.print(targets.table(outcomes, title))
        for record in results["peers"]:
            if record["error"] is not None:
                kind = "optional peer" if record["optional"] else "PEER"
                _say(f"{kind} {record['name']} of {record['op']} is missing: {record['error']}")
        for note in results["notes"]:
            _say(f"note: {note}")
        for failure in results["failures"]:
            _say(f"FAILED: {failure}")
        states += [o.state for o in outcomes]
        code = max(code, targets.exit_code(outcomes, results, allow_short))
    unmeasured = {line["op"] for line in all_lines} - {row["op"] for results in chosen for row in results["rows"]}
    if unmeasured:
        _say(f"not measured: {', '.join(sorted(unmeasured))}")
        states += ["MISSING" for line in all_lines if line["op"] in unmeasured]
        code = 1
    _say(", ".join(f"{states.count(s)} {s}" for s in ("pass", "SHORT", "MISSING")))
    return code


def compare(
    before: str,
    after: str,
    ops: list[str] = (),
    sizes: list[str] = (),
    rounds: int = 7,
    threshold: float = 1.5,
) -> int:
    """Compares two results; exits with 1 when a row reaches that much less of the roof, or the two share no row.

    Args:
        before: a result file, or a git revision that is built and measured in a worktree
        after: the same
        ops: what revisions measure; every op when none is given
        sizes: what revisions measure: patterns, or the classes S, M and L
        rounds: of the measurement of a revision
        threshold: the factor that counts
    """
    from benchmarks import compare as comparison

    arguments = [*(["--ops", *ops] if ops else []), *(["--sizes", *sizes] if sizes else []), "--rounds", str(rounds)]
    try:
        results = [comparison.measured(source, arguments) for source in (before, after)]
    except ValueError as error:
        _say(str(error))
        return 2
    found = comparison.changes(*results)
    if not found:
        _say("compare: the two results share no row")
        return 1
    console.print(comparison.table(found, threshold, (before, after)))
    return int(any(c.slowdown > threshold for c in found))


def plot(files: list[str] = (), out: str = "report/plots") -> int:
    """Writes the plots of result files as SVG files: every row, and time against size; of a sweep along its axes.

    Args:
        files: result files; without, the newest committed results of every op, and the sweeps
        out: folder to write
    """
    from benchmarks.report import plots

    count = 0
    for results in storage.load(files) if files else storage.newest("ops") + storage.committed("sweeps"):
        if not any("share_in_ops" in row for row in results["rows"]):
            for name, svg in plots(results).items():
                environment.write_text(Path(out, results["machine"], f"{name}.svg"), svg)
                count += 1
    _say(f"{count} plots -> {out}")
    return int(count == 0)


def overhead(ops: list[str] = (), out: str = "", resume: bool = False) -> int:
    """Measures what a call costs the host, in microseconds.

    Args:
        ops: names of ops; all of them when none is given
        out: result file (.csv); benchmarks/results/overhead/<machine>.csv when empty
        resume: not when this machine has measured it from the same sources
    """
    from benchmarks import overhead as costs
    from fss_kernels import testing

    path = Path(out) if out else storage.here("overhead")
    ops = ops or [*testing.specs()]
    before = storage.run(path, "overhead") if resume else None
    if environment.measured(before, {"ops": ops}, *environment.sources(), "benchmarks/overhead.py"):
        return 0
    for line in (costs.header(), *costs.cells(costs.run(tuple(ops), path))):
        _say("  ".join(f"{cell:>24}" for cell in line))
    _say(f"microseconds per call -> {path}")
    return 0


def gate(ops: list[str] = (), slowed: int = 1, update: bool = False, repeat: int = 1) -> int:
    """Compares every op with a stand-in bound by the same resource; exits with 1 when one has become 1.5x slower.

    Args:
        ops: names of ops; all of them when none is given
        slowed: how often an op is called in place of once, to see the gate fail
        update: write the ratios as this machine's new baseline, their medians with ``repeat``
        repeat: how often to do it all
    """
    from benchmarks import gate as regression
    from fss_kernels import testing

    failed, found = 0, []
    for _ in range(repeat):
        outcomes = regression.run(tuple(ops) or tuple(testing.specs()), slowed, not update)
        for outcome in outcomes:
            _say(str(outcome))
        failed += any(o.failed for o in outcomes)
        found += outcomes
    if update:
        regression.update(found)
        _say(f"gate: medians of {repeat} -> {regression.BASELINE}")
        return 0
    _say(f"gate: {repeat - failed} of {repeat} passed")
    return int(failed > 0)


def networks(quick: bool = False, out: str = "", rounds: int | None = None, resume: bool = False) -> int:
    """Measures networks on the kernels against the same networks on the reference, and SAM against literal code.

    Args:
        quick: a tiny network, to test this program
        out: result file (.csv); benchmarks/results/networks/<machine>.csv when empty
        rounds: in which every provider has a turn; 20 of SAM, 8 of a network when not given
        resume: not when this machine has measured it from the same sources
    """
    from benchmarks import models

    plan = models.QUICK if quick else models.Plan()
    plan = replace(plan, rounds=rounds, network_rounds=rounds) if rounds else plan
    path = Path(out) if out else storage.here("networks")
    code = (*environment.sources(), "fss_models", "benchmarks/models.py")
    before = storage.run(path, "networks") if resume else None
    if environment.measured(before, {**asdict(plan), "ops": models.OPS}, *code):
        return 0
    return models.run(plan, path)


def gpu(
    stage: Literal["build-test", "core", "peers", "models"],
    out: str,
    dry: bool = False,
    resume: bool = False,
    limit: float = 540.0,
    commit: str = "",
) -> int:
    """Runs one stage on a GPU, offline: builds and tests, or measures under a watchdog.

    Args:
        stage: what to do
        out: folder of the results
        dry: the same code path on a CPU with tiny shapes
        resume: keep the rows that are there, measure the others
        limit: seconds after which the watchdog ends the stage; no row begins after 5/6 of them
        commit: commit of the tree, where git is not at hand
    """
    from benchmarks import gpu as stages

    return stages.run(stage, Path(out), dry, limit, resume, commit)


def report(file: str, ops: list[str] = (), out: str = "report/index.html", demo: str = "") -> int:
    """Writes one HTML page with tables and plots.

    Args:
        file: result file
        ops: the ops to show, for a file that holds several runs; all of them when none is given
        out: page to write
        demo: folder that `fss-models demo` wrote, to show its scores and pictures
    """
    from benchmarks import overhead as costs
    from benchmarks.report import render

    runs = [r for r in storage.load([file]) if not ops or {*ops} & {row["op"] for row in r["rows"]}]
    if len(runs) != 1:
        held = "; ".join(", ".join(dict.fromkeys(row["op"] for row in r["rows"])) for r in storage.load([file]))
        _say(f"report: a page shows the ops of one run, choose them with --ops; {file} has runs of: {held}")
        return 2
    host = storage.committed("overhead")
    table = {"header": costs.header(), "rows": costs.cells(host[-1])} if host else None
    html = render(runs[0], Path(demo) if demo else None, table, storage.committed("sweeps"))
    environment.write_text(out, html)
    _say(f"report -> {out}")
    return 0


def readme(check: bool = False, root: str = str(environment.ROOT)) -> int:
    """Writes what the documents show of the results: pages in docs/benchmarks, and blocks between markers.

    Args:
        check: only compare; exit with 1 on a difference
        root: the folder that holds the documents
    """
    from benchmarks import pages

    if not pages.any_results():
        _say(f"readme: there are no results in {storage.RESULTS}; the pages that show results are left as they are")
    try:
        stale = pages.stale(Path(root))
    except ValueError as error:
        _say(f"readme: {error}")
        return 1
    for path, text in stale.items():
        if check:
            _say(f"readme: {path} differs from the results; run `make readme`")
        elif text is None:
            path.unlink()
        else:
            environment.write_text(path, text)
    _say(f"readme: {len(stale)} files {'differ' if check else 'changed'}")
    return int(check and bool(stale))


def record(kind: str, file: str) -> int:
    """Adds the outcome of a long run to the committed results: `make fuzz`, `sanitize` or `dist-check` with RECORD=1.

    Args:
        kind: fuzz (a line of JSON per round), sanitize or wheel
        file: what the run wrote
    """
    from benchmarks import reliability

    try:
        reliability.record_file(kind, Path(file))
    except (OSError, ValueError, KeyError) as error:
        _say(f"record: {file}: {error}")
        return 2
    return 0


def _ignored(name: str, chosen: dict[str, Any], given: set[str]) -> str:
    """What to say of options that were given and have no effect; empty where there are none."""
    takes, why = given, ""
    if name == "run" and chosen["device"] == "cuda":
        takes, why = {"device", "out", "resume"}, "--device cuda"
    elif name == "compare" and Path(chosen["before"]).is_file() and Path(chosen["after"]).is_file():
        takes, why = {"before", "after", "threshold"}, "a comparison of two result files"
    elif name == "gate" and chosen["update"]:
        takes, why = given - {"slowed"}, "--update, which writes a baseline of the ops as they are,"
    options = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(given - takes))
    return f"{name}: {why} ignores {options}" if options else ""


def _parser() -> ArgumentParser:
    """Every function above is a command. Result files and revisions are given by position, all else by name."""
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        command = ArgumentParser(description=inspect.getdoc(function).partition("\n")[0])
        helps = {p.arg_name: p.description for p in docstring_parser.parse(inspect.getdoc(function)).params}
        special = set()
        for parameter in inspect.signature(function).parameters.values():
            option = f"--{parameter.name.replace('_', '-')}"
            if isinstance(parameter.default, bool):
                command.add_argument(option, action="store_true", help=helps[parameter.name])
            elif isinstance(parameter.default, tuple):
                given, many = ("files", "*") if parameter.name == "files" else (option, "+")
                default = list(parameter.default)
                command.add_argument(given, type=str, nargs=many, default=default, help=helps[parameter.name])
            else:
                continue
            special.add(parameter.name)
        by_position = name in ("compare", "record", "report")
        command.add_function_arguments(function, as_group=False, as_positional=by_position, skip=special)
        commands.add_subcommand(name, command)
    return parser


COMMANDS = {f.__name__: f for f in (run, check, compare, plot, report, readme, overhead, gate, networks, gpu, record)}


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    found = parser.parse_args(arguments)
    name, chosen = found.subcommand, found[found.subcommand].as_dict()
    given = parser.parse_args(arguments, defaults=False)[name].as_dict()
    if message := _ignored(name, chosen, {*given}):
        _say(message)
        return 2
    if name in FIXED and "MALLOC_TOP_PAD_" not in os.environ:
        command = [sys.executable, "-m", "benchmarks", *arguments]
        return subprocess.run(command, env=_fixed_environment()).returncode
    return COMMANDS[name](**chosen)


if __name__ == "__main__":
    sys.exit(main())
