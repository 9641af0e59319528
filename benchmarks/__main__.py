"""``python -m benchmarks run | check | compare | plot | report | readme | overhead | gate``."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from benchmarks import ceilings, environment, measure, targets
from fss_kernels import testing

RESULTS = environment.RESULTS
# PyTorch's compiler crashed on a peer: it depends on what it timed while it tuned, and the next run has a number again.
CRASH = "raised InductorError"
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
    rounds: int = 7,
    repeats: int = 3,
    seed: int = 0,
    device: str = "cpu",
    sweep: bool = False,
    resume: bool = False,
) -> int:
    """Measures ops against their peers and writes a JSON file for every folder of ops.

    Args:
        ops: names of ops; all of them when none is given
        quick: fewer rounds, one size an op that moves little memory, the eager peers of a sweep
        out: one result file of all; benchmarks/results/<machine>-<folder of the op>.json when empty
        sizes: shell patterns of size labels, and the classes S, M and L
        dtypes: dtypes of the features
        exclude: shell patterns of peers to leave out
        tiny: shrink every size, to test this program
        rounds: rounds in which every provider has a turn
        repeats: timed calls in a turn
        seed: of the order of turns
        sweep: sizes along one axis at a time, for plots, in benchmarks/results/sweeps
        resume: leave out what this machine has measured so from the same sources
        device: cpu, or cuda: the stages core and peers of benchmarks.gpu, for all ops
    """
    if device == "cuda":
        return _on_gpu(out, resume)
    if device != "cpu":
        _say(f"run: device must be cpu or cuda, got {device}")
        return 2
    known = testing.specs()
    if unknown := set(ops) - set(known):
        _say(f"run: unknown ops {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return 2
    try:
        ceilings.native()
    except RuntimeError as error:
        _say(f"run: {error}")
        return 2
    rounds = min(rounds, 3) if quick else rounds
    threads = environment.cores()
    metrics = (line["metric"].partition(":") for line in targets.load())
    named = tuple(sorted({name for kind, _, name in metrics if kind == "peer"} - {"fastest"}))
    groups: dict[Path, list[str]] = {}
    for op in ops or known:
        if sweep and not known[op].axes:
            _say(f"run: {op} has no axes to sweep")
            continue
        folder = RESULTS / "sweeps" if sweep else RESULTS
        path = Path(out) if out else folder / f"{environment.machine_slug()}-{known[op].op.folder or op}.json"
        groups.setdefault(path, []).append(op)
    codes = []
    for path, members in groups.items():
        chosen = (tuple(names) for names in (members, dtypes, sizes, exclude))
        plan = measure.Plan(*chosen, quick, sweep, tiny, named, rounds, repeats, seed, threads)
        folders = [known[op].op.folder or op for op in members]
        if resume and environment.measured(path, asdict(plan), *environment.sources(*folders)):
            continue
        codes.append(_finish(_measured(plan), path))
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


def _measured(plan: measure.Plan) -> dict[str, Any]:
    """The results of a plan, measured in a process of its own."""
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


def _finish(results: dict[str, Any], path: Path) -> int:
    """Prints results and writes them; a run that failed does not replace a good file. The exit code.

    A peer on which PyTorch's compiler crashed has no number in that row, and the file says so: no failure of the run.
    """
    from benchmarks import report

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
    if results["failures"]:
        path = path.with_name(path.name + ".failed")
    environment.write_json(path, results)
    _say(f"{len(results['rows'])} entries -> {path}")
    return 1 if results["failures"] else 0


def _committed() -> list[dict[str, Any]]:
    """The files of benchmarks/results, oldest first."""
    files = [{**json.loads(p.read_text()), "file": p.name} for p in sorted(RESULTS.glob("*.json"))]
    return sorted(files, key=lambda r: r["environment"]["date"])


def _sweeps() -> list[dict[str, Any]]:
    """The committed files of sweeps."""
    return [{**json.loads(p.read_text()), "file": p.name} for p in sorted((RESULTS / "sweeps").glob("*.json"))]


def _newest() -> list[dict[str, Any]]:
    """The committed files that hold a machine's newest results of some op, each with those ops alone."""
    newest = {(r["environment"]["cpu"], op): r for r in _committed() for op in r["plan"]["ops"]}
    files: dict[str, dict[str, Any]] = {}
    for (_, op), results in newest.items():
        mine = files.setdefault(results["file"], {**results, "rows": [], "peers": []})
        mine["rows"] += [r for r in results["rows"] if r["op"] == op]
        mine["peers"] += [p for p in results["peers"] if p["op"] == op]
    return list(files.values())


def check(files: list[str] = (), allow_short: bool = False, lines: str = str(targets.PATH)) -> int:
    """Compares results with every Speed line.

    Args:
        files: result files, each with every line; without, every machine's newest of benchmarks/results for every op
        allow_short: exit with 0 although lines fall short
        lines: the file of lines
    """
    chosen = [{**json.loads(Path(f).read_text()), "file": f} for f in files] or _newest()
    if not chosen:
        _say(f"check: no results in {RESULTS}; run `python -m benchmarks run`")
        return 1
    code, all_lines, states = 0, targets.load(Path(lines)), []
    for results in chosen:
        env = results["environment"]
        tree = "" if env["clean"] else ", tree with changes"
        title = f"{results['file']}: {env['cpu']}, {env['date']}, commit {(env['commit'] or 'unknown')[:10]}{tree}"
        measured = {row["op"] for row in results["rows"]}
        outcomes = [targets.evaluate(line, results) for line in all_lines if files or line["op"] in measured]
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
    if unmeasured and not files:
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

    arguments = [*ops, *(["--sizes", *sizes] if sizes else []), "--rounds", str(rounds)]
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
        files: result files; the newest of benchmarks/results for every op, and the sweeps, when none is given
        out: folder to write
    """
    from benchmarks.report import plots

    count = 0
    for results in [{**json.loads(Path(f).read_text()), "file": Path(f).name} for f in files] or _newest() + _sweeps():
        if not any("share_in_ops" in row for row in results["rows"]):
            for name, svg in plots(results).items():
                environment.write_text(Path(out, Path(results["file"]).stem, f"{name}.svg"), svg)
                count += 1
    _say(f"{count} plots -> {out}")
    return int(count == 0)


def overhead(ops: list[str] = (), out: str = "", resume: bool = False) -> int:
    """Measures what a call costs the host, in microseconds.

    Args:
        ops: names of ops; all of them when none is given
        out: result file; benchmarks/results/overhead/<machine>.json when empty
        resume: not when this machine has measured it from the same sources
    """
    from benchmarks import overhead as costs

    path = Path(out) if out else costs.FOLDER / f"{environment.machine_slug()}.json"
    ops = ops or [*testing.specs()]
    if resume and environment.measured(path, {"ops": ops}, *environment.sources(), "benchmarks/overhead.py"):
        return 0
    if "MALLOC_TOP_PAD_" not in os.environ:
        command = [sys.executable, "-m", "benchmarks", "overhead", *ops, "--out", out]
        return subprocess.run(command, cwd=environment.ROOT, env=_fixed_environment()).returncode
    for line in (costs.header(), *costs.cells(costs.run(tuple(ops), path))):
        _say("  ".join(f"{cell:>24}" for cell in line))
    _say(f"microseconds a call -> {path}")
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

    if "MALLOC_TOP_PAD_" not in os.environ:
        command = [sys.executable, "-m", "benchmarks", "gate", *ops, "--slowed", str(slowed), "--repeat", str(repeat)]
        command += ["--update"] if update else []
        return subprocess.run(command, cwd=environment.ROOT, env=_fixed_environment()).returncode
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


def report(file: str, out: str = "report/index.html", demo: str = "") -> int:
    """Writes one HTML page with tables and plots.

    Args:
        file: result file
        out: page to write
        demo: folder that `fss-models demo` wrote, to show its scores and pictures
    """
    from benchmarks import overhead as costs
    from benchmarks.report import render

    host = costs.committed()
    table = {"header": costs.header(), "rows": costs.cells(host[0])} if host else None
    results = json.loads(Path(file).read_text())
    environment.write_text(out, render(results, Path(demo) if demo else None, table, _sweeps()))
    _say(f"report -> {out}")
    return 0


def readme(check: bool = False, root: str = str(environment.ROOT)) -> int:
    """Regenerates the tables of the README, and of every op's, from the specs and benchmarks/results.

    Args:
        check: only compare; exit with 1 on a difference
        root: the folder that holds the README and fss_kernels/ops
    """
    from benchmarks import reliability
    from benchmarks import overhead as costs
    from benchmarks.report import op_section, op_table, readme_section, replace_section

    committed, lines = _newest(), targets.load()
    if not committed:
        _say(f"readme: skipped, no results in {RESULTS}")
        return 0
    whole = readme_section(committed, costs.markdown(), _sweeps(), lines)
    sections = {
        Path(root, "README.md"): {"benchmarks": whole, "reliability": reliability.markdown(), "ops": op_table()}
    }
    for folder, ops in _folders().items():
        path = Path(root, "fss_kernels", "ops", folder, "README.md")
        sections[path] = {"benchmarks": op_section(committed, ops, lines)}
    stale = {}
    for path, parts in sections.items():
        text = path.read_text() if path.exists() else ""
        new = text
        try:
            for name, section in parts.items():
                new = replace_section(new, section, name)
        except ValueError as error:
            _say(f"readme: {path}: {error}")
            return 1
        if new != text:
            stale[path] = new
    for path, new in stale.items():
        if check:
            _say(f"readme: {path}: tables differ from the results; run `make readme`")
        else:
            environment.write_text(path, new)
    state = "differ" if check else "changed"
    _say(f"readme: tables of {len(committed)} results in {len(sections)} files, {len(stale)} {state}")
    return int(check and bool(stale))


def _folders() -> dict[str, list[str]]:
    """The folders of ops under fss_kernels/ops, each with its ops."""
    folders: dict[str, list[str]] = {}
    for name, spec in testing.specs().items():
        folders.setdefault(spec.op.folder or name, []).append(name)
    return folders


def main(arguments: list[str] | None = None) -> int:
    """Entry point: every function above is a command; its first list, or what has no default, is given by position."""
    functions = {f.__name__: f for f in (run, check, compare, plot, report, readme, overhead, gate)}
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subcommands()
    for name, function in functions.items():
        command = ArgumentParser(description=inspect.getdoc(function).partition("\n")[0])
        special = set()
        for i, parameter in enumerate(inspect.signature(function).parameters.values()):
            if isinstance(parameter.default, bool):
                command.add_argument(f"--{parameter.name.replace('_', '-')}", action="store_true")
            elif isinstance(parameter.default, tuple):
                many = {"nargs": "*"} if i == 0 else {"nargs": "+", "default": list(parameter.default)}
                command.add_argument(parameter.name if i == 0 else f"--{parameter.name}", type=str, **many)
            else:
                continue
            special.add(parameter.name)
        command.add_function_arguments(function, as_group=False, as_positional=True, skip=special)
        commands.add_subcommand(name, command)
    chosen = parser.parse_args(arguments)
    return functions[chosen.subcommand](**chosen[chosen.subcommand].as_dict())


if __name__ == "__main__":
    sys.exit(main())
