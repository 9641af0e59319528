"""The Markdown files: the README's length and examples, links, names of files and environment variables."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = {"build", "dist", "report", "gpu-wheels"}  # folders that git ignores, besides hidden ones
FOLDERS = "benchmarks|csrc|docs|fss_kernels|fss_models|tests"
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    folders = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in BUILT and not p.name.startswith(".")]
    return sorted([*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))])


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """Relative links of a document to files that are not there, or to headings that these do not have."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def test_the_readme_can_be_read_in_a_minute():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150, "README.md: at most 150 lines; tables and details belong in docs/"
    assert len(text.encode()) <= 10240, "README.md: at most 10,240 bytes; tables and details belong in docs/"


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert not broken_links(path)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    """In the changelog, files may be of the past."""
    names = set() if path.name == "CHANGELOG.md" else set(re.findall(rf"`((?:{FOLDERS})/[\w./*-]+)`", path.read_text()))
    assert not {name for name in names if not list(ROOT.glob(name.rstrip("/")))}


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `name`, and more\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#a-name-and-more) [c](#here) [d](https://x.org/y) `[e](code.md)`\n## Here\n"
    page.write_text(good + "```\n[f](block.md)\n```\n")
    assert broken_links(page) == []
    page.write_text(good + "[a](gone.md) [![b](gone.svg)](other.md#gone) [c](other.md#no-heading)\n")
    assert broken_links(page) == ["gone.md", "gone.svg", "other.md#gone", "other.md#no-heading"]


def test_environment_variables_are_described():
    sources = [ROOT / "setup.py", ROOT / "Makefile"]
    for folder in ("benchmarks", "csrc", "fss_kernels", "fss_models", "tests"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu")]
    named = {name for path in sources for name in re.findall(r"\bFSS_KERNELS_[A-Z_]*[A-Z]\b", path.read_text())}
    described = (ROOT / "docs" / "environment.md").read_text()
    assert "FSS_KERNELS_CPU_ISA" in named and not {name for name in named if f"`{name}`" not in described}


def test_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    ops, networks = {}, {}
    exec(compile(blocks[0], "README.md", "exec"), ops)
    assert ops["prototypes"].shape == (4, 2, 256) and ops["features"].grad.abs().sum() > 0
    exec(compile(blocks[1], "README.md", "exec"), networks)
    assert networks["prediction"].shape == (2, 65, 65)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in networks["model"].parameters())
