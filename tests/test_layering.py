"""The structure: layers of src import only their own layer or lower ones."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = [
    {"options", "runtime"},
    {"data", "models", "training"},
    {"search", "evaluation"},
    {"tools"},
]
LAYER = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}
SCRIPTS = {
    "train_reader",
    "test_reader",
    "train_retriever",
    "generate_passage_embeddings",
    "passage_retrieval",
}
FILES = sorted(path for path in (ROOT / "src").rglob("*.py") if path.parent != ROOT / "src")
FILES.append(ROOT / "src" / "options.py")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def folder_of(file: Path) -> str:
    return file.relative_to(ROOT / "src").parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """All modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_folders(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(file) if name.startswith("src.")}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_or_sideways(file: Path):
    assert {LAYER[folder] for folder in imported_folders(file)} <= set(
        range(LAYER[folder_of(file)] + 1)
    )
    assert not imported(file) & SCRIPTS
    if folder_of(file) != "tools":
        assert "tools" not in imported_folders(file)


def test_folders_do_not_import_each_other():
    below: dict[str, set[str]] = {folder: set() for folder in LAYER}
    for file in FILES:
        below[folder_of(file)] |= imported_folders(file) - {folder_of(file)}
    done: set[str] = set()
    while len(done) < len(below):
        ready = {folder for folder in below if below[folder] <= done} - done
        assert ready, f"a cycle among {set(below) - done}"
        done |= ready


def test_every_folder_has_a_layer():
    assert {folder_of(file) for file in FILES} == set(LAYER)
    assert {path.name for path in (ROOT / "src").glob("*.py")} == {"__init__.py", "options.py"}


def test_scripts_do_not_import_one_another():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS
    for script in SCRIPTS:
        assert not imported(ROOT / f"{script}.py") & SCRIPTS


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


@pytest.mark.parametrize(
    "module",
    [
        "src.options",
        "src.data.examples",
        "src.data.passages",
        "src.evaluation.answers",
        "src.evaluation.rankings",
        "src.search.exact",
        "src.tools.evaluate",
        "src.tools.report.page",
    ],
)
def test_what_needs_no_torch_imports_none(module: str):
    seen: set[Path] = set()
    waiting = {module_file(module)}
    while waiting:
        seen |= waiting
        names = {name for file in waiting for name in imported(file)}
        assert not {name.split(".")[0] for name in names} & {"torch", "transformers"}, waiting
        waiting = {module_file(name) for name in names if name.startswith("src.")} - seen - {None}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_happens_at_import(file: Path):
    """A module's top level holds definitions and constants, no statements that act."""
    for node in ast.parse(file.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        allowed = (
            ast.Import,
            ast.ImportFrom,
            ast.FunctionDef,
            ast.ClassDef,
            ast.Assign,
            ast.AnnAssign,
            ast.AugAssign,
            ast.For,  # over a few names, to fill a table
            ast.If,
        )
        assert is_docstring or isinstance(node, allowed), ast.unparse(node)
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"
