"""Claims about the layout: a star of files that stand alone, short functions, short lines, a pinned torch."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for path in ROOT.glob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))
EVERY_FILE = FILES + [path for folder in ("bench", "examples", "tests")
                      for path in sorted((ROOT / folder).rglob("*.py"))]
OURS = {path.stem for path in ROOT.glob("*.py")} | {"kernels"}


def named(paths):
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def imports_of(path):
    """First parts of the names of all modules that a file imports from outside its folder, wherever it does
    so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def functions_of(path):
    """(name, node, whether it is public) of every function and method; what stands inside a function is
    private."""
    def walk(node, prefix, is_public):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                public = is_public and not child.name.startswith("_")
                if not isinstance(child, ast.ClassDef):
                    yield prefix + child.name, child, public
                    public = False
                yield from walk(child, f"{prefix}{child.name}.", public)
            elif not isinstance(child, ast.expr):
                yield from walk(child, prefix, is_public)
    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "", True)


@pytest.mark.parametrize("path", named(path for path in FILES if path.name != "bread.py"))
def test_only_bread_imports_files_of_ours(path):
    """A star, not a web: everything else can be copied out on its own. (Inside kernels/ imports are
    relative.)"""
    assert not imports_of(path) & OURS


def test_bread_imports_every_file():
    """A file that bread.py does not use has no business at the root."""
    assert imports_of(ROOT / "bread.py") >= OURS - {"bread"}


@pytest.mark.parametrize("name", sorted(OURS - {"bread"}))
def test_a_file_imports_from_an_empty_folder(name, tmp_path):
    """Copied alone, in a fresh interpreter that does not know this project."""
    if name == "kernels":
        pytest.importorskip("triton")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", f"import {name}; print({name}.__file__)"], cwd=tmp_path,
                          env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


@pytest.mark.parametrize("path", named(EVERY_FILE))
def test_no_function_is_longer_than_50_lines(path):
    """From `def` to the last line, docstring included."""
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node, _ in functions_of(path)}
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_train_reads_as_the_algorithm():
    """At most 45 lines."""
    train, = [node for name, node, _ in functions_of(ROOT / "bread.py") if name == "train"]
    assert train.end_lineno - train.lineno + 1 <= 45


@pytest.mark.parametrize("path", named(EVERY_FILE))
def test_no_line_is_longer_than_120_columns(path):
    """Characters, not bytes; and no tabs, no blanks at the end of a line."""
    wrong = [number for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
             if len(line) > 120 or "\t" in line or line != line.rstrip()]
    assert wrong == []


@pytest.mark.parametrize("path", named(FILES))
def test_every_file_says_what_it_is(path):
    """A module docstring, and one for every public function that is longer than 5 lines and not a framework's
    hook."""
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    missing = [name for name, node, is_public in functions_of(path) if is_public and not ast.get_docstring(node)
               and not node.name.startswith("_") and node.name not in ("forward", "backward")
               and node.end_lineno - node.lineno + 1 > 5]
    assert missing == []


def test_torch_is_pinned():
    """One tested version; an open range may replace a CPU build by gigabytes of CUDA packages."""
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in
                                  [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]])
def test_links_of_the_documentation_lead_somewhere(path):
    """Files exist, and `[bread.train](../bread.py#L82)` names the line where `train` is defined."""
    for text, file, number in re.findall(r"\[([^\]]+)\]\(([^):#]+)(?:#L(\d+))?\)", path.read_text(encoding="utf-8")):
        target = (path.parent / file).resolve()
        assert target.exists(), f"{path.name} links to {file}"
        if number:
            name, lines = text.rsplit(".", 1)[1], target.read_text(encoding="utf-8").split("\n")
            found = [i for i, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", line)]
            assert int(number) in found, f"{path.name}: {text} is defined in {file} at line {found}"
