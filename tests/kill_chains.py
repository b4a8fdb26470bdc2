"""Kill each of the five scripts at random moments, start it again until it is done, and compare.

    python -m tests.kill_chains --chains 15 --processes 1 [--scripts test_reader ...] [--shard]

Half of the kills come after a random time, half when a file is opened, renamed or removed. At the
end of a chain the output equals that of an undisturbed run to the bit, and so does the list of all
files beside it.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import re
import signal
import tempfile
import time
from pathlib import Path

import torch

from tests.conftest import REFERENCE
from tests.forks import die_writing, start, wait

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


def begin(script: str, processes: int, arm=lambda rank: None) -> list[int]:
    """Start a script's processes; what they print is in files of the parent folder."""

    def prepare(rank: int) -> None:
        with open(f"../{Path.cwd().name}.{rank}.err", "wb") as file:
            os.dup2(file.fileno(), 2)
        with open(os.devnull, "wb") as file:
            os.dup2(file.fileno(), 1)
        arm(rank)

    return start(script, list(map(str, SCRIPTS[script])), processes, prepare)


def end(children: list[int]) -> tuple[int, list[str]]:
    """Wait for processes. Returns the highest status, and the first one's lines on stderr."""
    status = max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    return status, Path(f"../{Path.cwd().name}.0.err").read_text().splitlines()


def undisturbed(script: str, processes: int, base: Path) -> tuple[dict[str, object], float]:
    """What one command leaves, and the seconds that it takes."""
    with work_folder(base):
        began = time.monotonic()
        status, lines = end(begin(script, processes))
        assert status == 0, lines
        return snapshot(), time.monotonic() - began


def run_chain(
    script: str, processes: int, base: Path, whole: dict[str, object], seconds: float, seed: int
) -> tuple[int, list[str]]:
    """Returns how often the script was killed, and the files that differ in the end."""
    draw, kills = random.Random(seed), 0
    with work_folder(base):
        for number in range(draw.randrange(1, 5)):
            if number % 2 == seed % 2:
                arm = functools.partial(die_writing, draw.randrange(1, 60))
                children = begin(script, processes, arm=lambda rank, arm=arm: rank or arm())
            else:
                children = begin(script, processes)
                time.sleep(draw.uniform(0, seconds))
                os.kill(draw.choice(children), signal.SIGKILL)
            kills += wait(children)
        status, lines = end(begin(script, processes))
        assert status == 0, lines
        return kills, differences(whole, snapshot())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chains", type=int, default=15)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--shard", action="store_true", help="add --shard to the commands")
    options = parser.parse_args()
    for script in options.scripts if options.shard else ():
        SCRIPTS[script].append("--shard")
    with tempfile.TemporaryDirectory() as base:
        for script in options.scripts:
            importlib.import_module(script)
            whole, seconds = undisturbed(script, options.processes, Path(base))
            kills, wrong = 0, {}
            for seed in range(options.chains):
                more, differ = run_chain(
                    script, options.processes, Path(base), whole, seconds, seed
                )
                kills += more
                wrong |= {seed: differ} if differ else {}
            chains = f"{options.chains} chains, {kills} kills, {options.processes} process(es)"
            print(f"{script}: {chains}: {len(wrong)} differ", *wrong.items(), flush=True)


if __name__ == "__main__":
    main()
