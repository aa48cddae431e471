"""Claims about docs/BORROW.md: every block runs where nothing is but the files that it says to copy."""
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from conftest import ROOT

DOCUMENT = "docs/BORROW.md"
TEXT = (ROOT / DOCUMENT).read_text(encoding="utf-8")
BLOCK = re.compile(r"^Copy: (.+)\. Needs: (.+?)\.(?: Save as: `(.+)`\.)?\n\n"
                   r"```python\n((?:.*\n)*?)```$", re.M)
ITEM = r"(`[^`]+`(?: and `[^`]+`)*)(?: of `([^`]+)`)?"  # `a` and `b` of `folder`
Snippet = namedtuple("Snippet", "copied needed name code")


def read_snippets():
    """What each block of the document says to copy, as (name, place or None), and to install; its code."""
    for copied, needed, saved_as, code in BLOCK.findall(TEXT):
        items = []
        for item in copied.split("; "):
            names, place = re.fullmatch(ITEM, item).groups()
            items += [(name, place or None) for name in re.findall("`([^`]+)`", names)]
        yield Snippet(items, re.findall("`([^`]+)`", needed), saved_as or "snippet.py", code)


SNIPPETS = list(read_snippets())
RUN = [snippet for snippet in SNIPPETS if snippet.name == "snippet.py"]  # the adapter is part of two others


def each(snippets):
    names = [f"{number}-{snippet.copied[0][0]}" for number, snippet in enumerate(snippets)]
    return pytest.mark.parametrize("snippet", snippets, ids=names)


def fill(folder, snippet):
    """Copy what a block names, and it: files of the root; the lines of a function; another block; files of
    some folder, which keeps its name. Returns the paths of the copies."""
    paths = []
    for name, place in snippet.copied:
        path = folder / name
        if place is None:
            text = (ROOT / name).read_bytes()
        elif place == DOCUMENT:
            [text] = [other.code.encode() for other in SNIPPETS if other.name == name]
        elif place.endswith(".py"):
            path = folder / f"{name}.py"
            source = (ROOT / place).read_text(encoding="utf-8")
            [node] = [node for node in ast.parse(source).body if getattr(node, "name", None) == name]
            text = ast.get_source_segment(source, node).encode()
        else:
            path = folder / Path(place).name / name
            text = (ROOT / place / name).read_bytes()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)
        paths.append(path)
    (folder / snippet.name).write_text(snippet.code, encoding="utf-8")
    return paths


def imports_of(path):
    """First parts of the names of all modules without which a file cannot be imported."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_no_python_of_the_document_goes_untested():
    """Every block has its line; the eight parts are there."""
    assert TEXT.count("```python") == len(SNIPPETS) == 11
    assert re.findall(r"^## (\d)\. ", TEXT, re.M) == list("12345678")


@each(SNIPPETS)
def test_a_block_is_short_and_its_line_is_true(snippet, tmp_path):
    """At most 30 lines of 110 columns, that end in an assertion; what is imported is copied, needed or
    Python's own; what is copied or needed is imported."""
    lines = snippet.code.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 110
    copies = [path for path in fill(tmp_path, snippet) if path.suffix == ".py"]
    imported = imports_of(tmp_path / snippet.name)
    everything = imported.union(*map(imports_of, copies))
    modules = {path.stem for path in copies}
    assert everything - modules - set(snippet.needed) <= sys.stdlib_module_names
    assert set(snippet.needed) - {"nothing"} <= everything
    if snippet in RUN:
        assert modules <= everything
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(snippet.code).body[-1]))


@each(RUN)
def test_a_block_runs_in_a_folder_of_its_own(snippet, tmp_path):
    """In a fresh interpreter that does not know this project; its assertions hold."""
    for package in snippet.needed:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    expected = {*fill(tmp_path, snippet), tmp_path / snippet.name}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == expected
    environment = {"PATH": os.defpath, "HOME": f"{tmp_path}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # -E, -s: neither PYTHONPATH nor the user's packages; the script's folder comes first.
    done = subprocess.run([sys.executable, "-E", "-s", snippet.name], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
