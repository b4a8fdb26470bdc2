"""Imports between the modules only go down (the README's map), and scripts stay apart."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each module of src, and what it may import from src. A new room gets a line here and in README.md.
MAY_IMPORT = {
    "__init__": set(),
    "interrupt": set(),
    "errors": {"interrupt"},
    "options": set(),
    "optim": set(),
    "device": {"errors", "terminal"},
    "slurm": {"errors", "interrupt"},
    "files": {"errors", "terminal"},
    "json_files": {"errors", "files"},
    "examples": {"errors", "json_files", "terminal"},
    "evaluation": {"errors", "examples", "options"},
    "passages": {"errors", "files", "terminal"},
    "pretrained": {"errors"},
    "legacy_pickle": {"errors"},
    "shards": {"errors", "legacy_pickle"},
    "index": {"errors", "shards"},
    "gpu_search": {"errors", "index", "shards"},
    "compressed": {"errors", "index", "shards"},
    "bm25": {"errors", "index", "passages"},
    "data": {"examples", "errors"},
    "decoding": {"encoder"},
    "encoder": {"device", "lengths"},
    "lengths": set(),
    "reader": {"decoding", "device", "encoder", "errors", "pretrained"},
    "retriever": {"errors", "lengths", "pretrained"},
    "terminal": set(),
    "search": {
        "bm25",
        "compressed",
        "data",
        "distributed",
        "errors",
        "gpu_search",
        "index",
        "passages",
        "pretrained",
        "retriever",
        "shards",
        "terminal",
    },
    "watch": set(),
    "distributed": {"errors", "slurm", "watch"},
    "checkpoint": {"distributed", "errors"},
    "metrics": {"distributed", "errors", "terminal"},
    "training": {"checkpoint", "device", "distributed", "errors", "metrics"},
    "charts": set(),
    "survey": {"errors", "evaluation", "examples"},
    "report": {"charts", "errors", "evaluation", "examples", "files", "options", "survey"},
    "results": {
        "errors",
        "evaluation",
        "examples",
        "files",
        "json_files",
        "passages",
        "reader",
    },
    "conversation": {
        "data",
        "evaluation",
        "examples",
        "interrupt",
        "passages",
        "reader",
        "search",
        "terminal",
    },
    "preprocess": {
        "errors",
        "examples",
        "files",
        "json_files",
        "metrics",
        "options",
        "passages",
    },
}
SCRIPTS = [
    "train_reader",
    "test_reader",
    "train_retriever",
    "generate_passage_embeddings",
    "passage_retrieval",
]


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


@pytest.mark.parametrize("file", sorted((ROOT / "src").glob("*.py")), ids=lambda file: file.stem)
def test_modules_import_only_what_lies_below(file: Path):
    from_src = {name.split(".")[1] for name in imported(file) if name.startswith("src.")}
    from_src &= {path.stem for path in (ROOT / "src").glob("*.py")}
    assert from_src <= MAY_IMPORT[file.stem]
    assert not imported(file) & set(SCRIPTS)


def test_the_layers_have_no_circle():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, below in MAY_IMPORT.items() if below <= done} - done
        assert ready, f"a circle among {set(MAY_IMPORT) - done}"
        done |= ready


def test_scripts_do_not_import_one_another():
    assert sorted(SCRIPTS) == sorted(path.stem for path in ROOT.glob("*.py"))
    for script in SCRIPTS:
        assert not imported(ROOT / f"{script}.py") & set(SCRIPTS)


@pytest.mark.parametrize(
    "module", ["evaluation", "examples", "passages", "index", "report", "shards"]
)
def test_what_needs_no_torch_imports_none(module):
    seen, waiting = set(), {module}
    while waiting:
        seen |= waiting
        waiting = {below for name in waiting for below in MAY_IMPORT[name]} - seen
    for name in seen:
        packages = {path.split(".")[0] for path in imported(ROOT / "src" / f"{name}.py")}
        assert not packages & {"torch", "transformers"}, name


@pytest.mark.parametrize("file", sorted((ROOT / "src").glob("*.py")), ids=lambda file: file.stem)
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
