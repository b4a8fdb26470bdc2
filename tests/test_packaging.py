"""`pip install -e .` in an environment of its own, and docs/python.md from another folder."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from src.models.pretrained import load_tokenizer, save_tokenizer
from src.models.reader import load_reader
from src.models.retriever import load_retriever
from tests.conftest import REFERENCE, ROOT, run_well


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of a fresh environment with this project installed. The other packages are those
    of the environment that runs the tests: nothing is downloaded."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools (requirements-dev.txt) to install without a network")
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    shown = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "packages.pth").write_text(sysconfig.get_path("purelib"))
    # A copy: what setuptools leaves beside the source is not left in this folder.
    copy = folder / "project"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "tests", "checkpoint", "quickstart")
    shutil.copytree(ROOT, copy, ignore=ignored)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    install += ["--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*install, "-e", copy], check=True, cwd=folder)
    return python


def run_elsewhere(python: Path, code: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names(file: str) -> set[str]:
    lines = (ROOT / file).read_text().splitlines()
    return {re.match(r"[\w-]+", line)[0] for line in lines if re.match(r"\w", line)}


def test_what_is_installed(python, tmp_path):
    code = """
import json, importlib.metadata, importlib.resources, importlib.util
import src, src.tools.report
found = importlib.metadata.distribution("fusion-in-decoder")
print(json.dumps({
    "requires": found.requires,
    "python": found.metadata["Requires-Python"],
    "src": src.__file__,
    "page": importlib.resources.files("src.tools.report").joinpath("page.html").is_file(),
    "top": [n for n in ("tests", "bench", "examples", "data", "models", "train_reader")
            if importlib.util.find_spec(n)],
}))
"""
    found = json.loads(run_elsewhere(python, code, tmp_path))
    required = {re.match(r"[\w-]+", line)[0]: "extra" in line for line in found["requires"]}
    assert {name for name, extra in required.items() if not extra} == names("requirements.txt")
    assert {name for name, extra in required.items() if extra} == names("requirements-dev.txt")
    assert found["python"] == ">=3.11"
    assert found["top"] == []
    assert found["page"]
    assert Path(found["src"]).parent.parent.name == "project"


def test_a_wheel_holds_src_alone(python, tmp_path):
    """An editable install finds files by folder; an ordinary one only what is declared."""
    project = tmp_path / "project"
    code = "import src; print(src.__file__)"
    shutil.copytree(Path(run_elsewhere(python, code, tmp_path).strip()).parent.parent, project)
    install = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--disable-pip-version-check", "-w", tmp_path, project]
    subprocess.run(install, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    unpacked = {str(file.relative_to(tmp_path / "unpacked"))
                for file in (tmp_path / "unpacked").rglob("*") if file.is_file()}  # fmt: skip
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "src").rglob("*.py")}
    shown = "report/page.html", "serve.html", "style.css", "frame.js"
    files |= {f"src/tools/{name}" for name in shown}
    assert {file for file in unpacked if ".dist-info/" not in file} == files


def test_the_page_runs_from_another_folder(python, tmp_path):
    load_reader(str(REFERENCE / "t5")).save_pretrained(tmp_path / "reader")
    save_tokenizer(load_tokenizer(str(REFERENCE / "t5"), "none"), tmp_path / "reader")
    retriever = load_retriever(str(REFERENCE / "legacy_retriever_mask_mean"))
    retriever.save_pretrained(tmp_path / "retriever")
    save_tokenizer(load_tokenizer(str(REFERENCE / "bert"), "none"), tmp_path / "retriever")
    shutil.copy(REFERENCE / "passages.tsv", tmp_path)
    run_well(
        "generate_passage_embeddings.py", "--model_path", tmp_path / "retriever",
        "--passages", tmp_path / "passages.tsv", "--output_path", tmp_path / "embeddings" / "wiki",
    )  # fmt: skip
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
    assert len(blocks) >= 3
    printed = run_elsewhere(python, "\n".join(blocks), tmp_path)
    assert len(re.findall(r"-?\d+\.\d+", printed.splitlines()[-1])) == 5  # scores of 5 passages
