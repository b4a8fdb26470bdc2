"""The structure: layers, sizes, no work at import, and a fast set with a test of every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, fast_set, starts_processes

LAYERS = ["options runtime", "data models training", "search evaluation", "tools"]
LAYER = {folder: n for n, folders in enumerate(LAYERS) for folder in folders.split()}
SCRIPTS = [ROOT / f"{name}.py" for name in (
    "train_reader", "test_reader", "train_retriever", "generate_passage_embeddings",
    "passage_retrieval",
)]  # fmt: skip
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in SOURCES + SCRIPTS}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def folder_of(file: Path) -> str:
    return file.relative_to(ROOT / "src").parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """All modules that a file imports, at its top or in a function."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_folders(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(file) if name.startswith("src.")}


@pytest.mark.parametrize("file", SOURCES + SCRIPTS, ids=name_of)
def test_imports_go_down_or_sideways(file):
    assert not {name.split(".")[0] for name in imported(file)} & {s.stem for s in SCRIPTS}
    if file in SOURCES and folder_of(file) != "__init__":
        layer = LAYER[folder_of(file)]  # every folder has one
        assert all(LAYER[folder] <= layer for folder in imported_folders(file))


def test_folders_form_no_cycle():
    below: dict[str, set[str]] = {folder: set() for folder in LAYER}
    for file in SOURCES:
        if folder_of(file) in below:
            below[folder_of(file)] |= imported_folders(file) - {folder_of(file)}
    while below:
        lowest = [folder for folder in below if not below[folder] & below.keys()]
        assert lowest, f"a cycle among {sorted(below)}"
        for folder in lowest:
            del below[folder]


def test_the_root_holds_the_scripts():
    assert sorted(ROOT.glob("*.py")) == sorted(SCRIPTS)


@pytest.mark.parametrize("file", SOURCES + SCRIPTS, ids=name_of)
def test_sizes(file):
    limit = 120 if file in SCRIPTS else 400
    if file.name != "options.py":
        assert len(file.read_text().splitlines()) <= limit
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            is_method = bool(arguments) and arguments[0].arg in ("self", "cls")
            assert len(arguments) - is_method <= 10, node.name
            assert file in SCRIPTS or node.end_lineno - node.lineno + 1 <= 80, node.name


@pytest.mark.parametrize("file", SOURCES + SCRIPTS, ids=name_of)
def test_nothing_happens_at_import(file):
    """The top level of a module holds definitions, constants and loops that fill tables."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    allowed += (ast.AnnAssign, ast.AugAssign, ast.For)
    for node in TREES[file].body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        condition = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        is_known = condition in ("__name__ == '__main__'", "TYPE_CHECKING")
        assert is_docstring or is_known or isinstance(node, allowed), ast.unparse(node)


MODELLESS = "src.data.passages src.evaluation.rankings src.search.exact src.tools.report.__main__"


@pytest.mark.parametrize(
    ("modules", "unused"),
    [
        (MODELLESS, {"torch"}),
        ("passage_retrieval", {"transformers", "tokenizers", "tensorboard"}),  # as BM25 needs it
    ],
)
def test_modules_import_only_what_they_use(modules, unused):
    code = f"import sys, {modules.replace(' ', ', ')}; print({unused} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (b"set()\n", b"")


# ----------------------------------------------------------------------------------------------
# The fast set (tests/conftest.py)


def test_the_fast_set_has_a_test_of_every_file(request):
    """test_xquad.py trains for minutes."""
    files = {item.path.name for item in request.session.items} - {"test_xquad.py"}
    assert {item.path.name for item in fast_set(request.session.items)} == files


def test_functions_that_start_processes_are_found():
    def calls() -> None:
        [test_modules_import_only_what_they_use() for _ in "ab"]

    assert starts_processes(test_modules_import_only_what_they_use, set())
    assert starts_processes(calls, set())
    assert not starts_processes(test_sizes, set())
