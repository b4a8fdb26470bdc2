"""Start each of the five scripts twice at once with the same output, and check what comes of it.

    python -m tests.concurrent_pairs --pairs 10 [--processes 2] [--scripts test_reader ...]

Both commands end well, or one does and the other ends with status 2 and one line that says why. The
output is that of a single command to the bit, and nothing else is left in its folder.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import tempfile
import time
from pathlib import Path

import torch

from tests.conftest import REFERENCE
from tests.forks import start

BERT = ["--tokenizer", REFERENCE / "bert", "--model_path", REFERENCE / "legacy_retriever_mask_mean"]
TRAIN = [
    "--per_gpu_batch_size", 1, "--n_context", 2, "--lr", 1e-3, "--total_steps", 6, "--save_freq", 2,
    "--eval_freq", 3, "--keep_checkpoints", 2, "--num_workers", 0, "--optim", "adamw",
    "--accumulation_steps", 2, "--scheduler", "linear", "--warmup_steps", 2,
    "--train_data", "scored.json", "--eval_data", "scored.json",
]  # fmt: skip
RUN = ["--checkpoint_dir", "out", "--name", "run"]
T5 = ["--model_path", REFERENCE / "t5", "--text_maxlength", 48]
PASSAGES = ["--passages", "passages.tsv"]
SCRIPTS = {
    "train_reader": [*TRAIN, *RUN, *T5],
    "train_retriever": [*TRAIN, *RUN, *BERT],
    "test_reader": [
        *RUN, *T5, "--n_context", 2, "--per_gpu_batch_size", 1, "--num_workers", 0, "--eval_data",
        REFERENCE / "data.json", "--write_results", "--write_crossattention_scores",
    ],
    "generate_passage_embeddings": [*BERT, *PASSAGES, "--output_path", "out/wiki"],
    "passage_retrieval": [
        "--bm25", "--save_or_load_index", *PASSAGES, "--data", REFERENCE / "questions.json",
        "--output_path", "out/found.json", "--n-docs", 5,
    ],
}  # fmt: skip


@contextlib.contextmanager
def work_folder(base: Path):
    """A new folder with the inputs that lie beside caches, and `out`; it is the working folder."""
    before = Path.cwd()
    os.chdir(tempfile.mkdtemp(dir=base))
    Path("out").mkdir()
    passages = (REFERENCE / "passages.tsv").read_text()
    header, *lines = passages.splitlines(keepends=True)
    more = [re.sub(r"^\S+", f"n{number}", lines[number % len(lines)]) for number in range(4500)]
    Path("passages.tsv").write_text(header + "".join(lines + more))
    examples = json.loads((REFERENCE / "data.json").read_text())
    Path("scored.json").write_text(json.dumps([e for e in examples if e.get("ctxs")]))
    try:
        yield
    finally:
        os.chdir(before)


def snapshot() -> dict[str, object]:
    """All that is in the working folder; without what holds times, and TensorBoard's file names."""
    found = {}
    for path in Path().rglob("*"):
        if path.is_symlink() or path.is_dir():
            found[str(path)] = os.readlink(path).encode() if path.is_symlink() else b""
        elif "tfevents" not in path.name:
            is_timed = path.name == "run.log" or path.suffix in (".offsets", ".ids")
            found[str(path)] = b"" if is_timed else path.read_bytes()
        if path.name == "training_state.pt":  # equal states can be pickled differently
            found[str(path)] = plain(torch.load(path))
        if path.name == "checkpoint.json":
            found[str(path)] = re.sub(rb'"training_state.pt": \d+', b"", path.read_bytes())
    return found


def plain(value: object) -> object:
    """A training state with its tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def begin(script: str, processes: int, number: int = 0, arm=lambda rank: None) -> list[int]:
    """Start a script's processes; what they print is in the files `N.err` of the parent folder."""

    def prepare(rank: int) -> None:
        with open(f"../{Path.cwd().name}.{number}.{rank}.err", "wb") as file:
            os.dup2(file.fileno(), 2)
        with open(os.devnull, "wb") as file:
            os.dup2(file.fileno(), 1)
        arm(rank)

    return start(script, list(map(str, SCRIPTS[script])), processes, prepare)


def end(children: list[int], number: int = 0) -> tuple[int, list[str]]:
    """Wait for processes. Returns the highest status, and the first one's lines on stderr."""
    status = max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    return status, Path(f"../{Path.cwd().name}.{number}.0.err").read_text().splitlines()


def undisturbed(script: str, processes: int, base: Path) -> tuple[dict[str, object], float]:
    """What one command leaves, and the seconds that it takes."""
    with work_folder(base):
        began = time.monotonic()
        status, lines = end(begin(script, processes))
        assert status == 0, lines
        return snapshot(), time.monotonic() - began


def check_pair(
    script: str, processes: int, base: Path, whole: dict[str, object], delay: float
) -> str:
    """Start a pair, the second command `delay` seconds after the first. Returns how it ended."""
    with work_folder(base):
        pair = []
        for number in range(2):
            pair.append(begin(script, processes, number))
            time.sleep(0 if number else delay)
        ended = [end(children, number) for number, children in enumerate(pair)]
        assert min(status for status, _ in ended) == 0, ended
        for status, lines in ended:
            if status != 0:
                assert status == 2, ended
                assert len(lines) == 1, ended
                assert re.match(r"error: .*another command is writing", lines[0])
        assert not differences(whole, snapshot()), differences(whole, snapshot())
    return "one ended with the line" if max(ended)[0] else "both ended well"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    options = parser.parse_args()
    draw = random.Random(options.processes)
    with tempfile.TemporaryDirectory() as base:
        for script in options.scripts:
            importlib.import_module(script)
            whole, seconds = undisturbed(script, options.processes, Path(base))
            ends = []
            for _ in range(options.pairs):
                delay = draw.choice([0, draw.uniform(0, 0.2), draw.uniform(0, 1.2 * seconds)])
                ends.append(check_pair(script, options.processes, Path(base), whole, delay))
            counts = {kind: ends.count(kind) for kind in sorted(set(ends))}
            print(script, len(ends), "pairs:", counts, flush=True)


if __name__ == "__main__":
    main()
