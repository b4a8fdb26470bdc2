"""The pages can be run: every `bash` or `console` block of README.md, docs/ and examples/, as is.

Blocks run in order in a fresh copy of the repository's tracked files, with small files of the names
they use and tiny models in the hub's cache. A comment in a block that begins with one of the MARKS
names what a test lacks; such a block is skipped. A `console` block shows commands, each after `$ `,
and their output: equal but for numbers and white space; a line `...` stands for omitted lines.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from examples import make_quickstart
from src import options
from tests.conftest import ROOT
from tests.warm_python import warm_python

MARKS = ("needs a download", "needs several GPUs", "needs SLURM", "takes minutes")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))
PARSERS = [make for name, make in vars(options).items() if name.endswith("_parser")]
# Options of other programs and of our shell scripts.
OTHERS_OPTIONS = {"--nproc_per_node", "--help", "--only", "--fresh", "--seed", "--signal"}
OTHERS_OPTIONS |= {"--kill-on-bad-exit", "--fast", "--fetch"}
OTHERS_OPTIONS |= {"--gpus-per-node", "--ntasks-per-node", "--nodes", "--array", "--fast"}


class Block(NamedTuple):
    """A code block: its page and line, `bash` or `console`, and its text."""

    page: Path
    line: int
    kind: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(bash|console)\n(.*?)^```$", text, re.S | re.M)
    return [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def name_of(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


def marks(block: Block) -> list[str]:
    """What the block's comments say it needs or takes."""
    return re.findall(r"# ((?:needs|takes) .*)", block.text)


def mark(block: Block) -> str | None:
    return next((known for known in MARKS for said in marks(block) if said.startswith(known)), None)


class Step(NamedTuple):
    """A command, and the lines it must print (None: any)."""

    command: str
    printed: list[str] | None


def steps(block: Block) -> list[Step]:
    if block.kind == "bash":
        return [Step(block.text, None)]
    found: list[Step] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = [line[2:]]
            while command[-1].endswith("\\"):
                command.append(next(lines))
            found.append(Step("\n".join(command), []))
        else:
            found[-1].printed.append(line)
    return found


def plain(line: str) -> str:
    """A line without what differs between runs: numbers, times, the spaces that align them."""
    line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", line)
    line = re.sub(r"(?<![\w.])-?\d[\d.,]*(e[-+]?\d+)?", "N", line)
    return re.sub(r"\s+", " ", line).strip()


def same_output(shown: list[str], printed: list[str]) -> bool:
    """Whether the lines are equal but for what `plain` removes and `...` omits."""
    pattern = "".join(
        r"(.*\n)*" if line == "..." else re.escape(plain(line) + "\n") for line in shown
    )
    return re.fullmatch(pattern, "".join(plain(line) + "\n" for line in printed)) is not None


# ----------------------------------------------------------------------------------------------
# The folders where blocks run


def put_into_hub(cache: Path, name: str) -> Path:
    """A folder whose files Transformers takes for the hub's model of that name."""
    model, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    for folder in ("refs", f"snapshots/{commit}"):
        (model / folder).mkdir(parents=True, exist_ok=True)
    (model / "refs" / "main").write_text(commit)
    return model / "snapshots" / commit


def make_world(folder: Path, cache: Path) -> None:
    """Small files and models of the names on the pages."""
    world = folder / "world"
    make_quickstart.main(["--subjects", "60", "--held_out", "1", "-o", str(world)])
    pairs = json.loads((world / "train_pairs.json").read_text())
    questions = json.loads((world / "test.json").read_text())
    for name, rows in (
        ("train_data", pairs[:8]), ("eval_data", pairs[8:11]), ("test_data", pairs[11:14]),
        ("questions", questions),
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(rows))
    shutil.move(world / "passages.tsv", folder / "psgs_w100.tsv")
    shutil.copytree(world / "reader_start", put_into_hub(cache, "t5-base"), dirs_exist_ok=True)
    bert = put_into_hub(cache, "bert-base-uncased")
    start = world / "retriever_start"
    BertModel(BertConfig.from_pretrained(start, max_position_embeddings=512)).save_pretrained(bert)
    BertTokenizerFast.from_pretrained(start).save_pretrained(bert)
    shutil.rmtree(world)


class Copy:
    """A copy of the repository where a page's blocks run, each once and after those before it."""

    def __init__(self, page: Path, folder: Path, environment: dict[str, str]):
        self.blocks = [block for block in blocks_of(page) if mark(block) is None]
        self.folder, self.environment = folder, environment
        self.problems: list[str | None] = []

    def problem(self, block: Block) -> str | None:
        """What is wrong with a block, or None."""
        while len(self.problems) <= self.blocks.index(block):
            self.problems.append(self._run(self.blocks[len(self.problems)]))
        return self.problems[self.blocks.index(block)]

    def _run(self, block: Block) -> str | None:
        for step in steps(block):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", step.command], cwd=self.folder,
                env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                return f"{step.command}\nends with {done.returncode}:\n{done.stdout}"
            if step.printed is not None and not same_output(step.printed, done.stdout.splitlines()):
                shown = "\n".join(step.printed)
                return f"{step.command}\nprints\n{done.stdout}\nbut the page shows\n{shown}"
        return None


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Iterator[dict[Path, Copy]]:
    """A copy of the repository for each page that has blocks to run."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("needs git and the repository's own folder, to list its files")
    at = tmp_path_factory.mktemp("readme")
    environment = {**os.environ, "HF_HUB_CACHE": str(at / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    folders = {}
    for number, page in enumerate(sorted({block.page for block in BLOCKS if not mark(block)})):
        folder = folders[page] = at / str(number)
        for name in filter(None, listed.stdout.decode().split("\0")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        make_world(folder, at / "hub")
    with warm_python(at, environment) as environment:
        yield {page: Copy(page, folder, environment) for page, folder in folders.items()}


RUNNABLE = [
    pytest.param(
        block, id=name_of(block), marks=[pytest.mark.skip(mark(block))] if mark(block) else []
    )
    for block in BLOCKS
]


@pytest.mark.parametrize("block", RUNNABLE)
def test_block(block, copies):
    problem = copies[block.page].problem(block)
    assert problem is None, problem


def test_marks_are_known():
    for block in BLOCKS:
        assert all(said.startswith(MARKS) for said in marks(block)), name_of(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_files_and_links_of_the_pages_exist(page):
    text = page.read_text()
    known = {name for make in PARSERS for name in make()._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
    assert named <= known | OTHERS_OPTIONS
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:src|tests|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    titles = re.findall("^#+ (.*)", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#(.*?)\)", text)) <= anchors


def test_the_tree_names_every_module():
    tree = (ROOT / "README.md").read_text().split("## Where everything is")[1]
    modules = [path.stem for path in (ROOT / "src").rglob("*.py") if "__" not in path.stem]
    shell = [path.name for path in itertools.chain(ROOT.glob("*.py"), ROOT.glob("*.sh"))]
    named = set(re.findall(r"[\w.-]+", tree)) | {"options"}
    assert [name for name in modules + shell if name not in named] == []
