"""Damages every kind of file that is read, and checks what becomes of it.

    python -m tests.fuzz --seconds 60 [--seed 0]

Whatever is in a file, reading it ends in time, and with what `json` or `csv` make of it or an
`InputError`, never another exception.
"""

import argparse
import ast
import contextlib
import csv
import gzip
import io
import json
import logging
import pickle
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from src.data import files
from src.data.examples import Examples, load_data, read_example
from src.data.json_files import JsonItems
from src.data.passages import Passages
from src.evaluation.answers import read_answers
from src.evaluation.results import AnswerFile
from src.runtime.errors import InputError
from src.search.embeddings import open_shard
from src.search.shards import ShardWriter
from src.training.checkpoint import read_meta, read_state
from src.training.metrics import _keep_until

_PIECES = [
    b"[", b"]", b"{", b"}", b'"', b"'", b"\\", b",", b":", b"\n", b"\r", b"\t", b" ", b"\x0c",
    b"\0", b"null", b"NaN", b"1e999", b"\xef\xbb\xbf", b"\xff", b"\xe2\x82", b"\\ud83d", b"-1",
    b"\xc3\xa9", b"9" * 30, b"   \n", b"\n\n", b'""', b"[" * 50, b"\xc2\x85", b"\xe2\x80\xa8",
]  # fmt: skip


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A few changes: cut, put in, replace, repeat, exchange."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = b if rng.random() < 0.2 else min(b, a + rng.randrange(1, 9))
        change = rng.choice([0, 1, 2, 3, 4] * 5 + [5])
        if change == 0:
            data = data[:a] + data[b:]
        elif change == 1:
            data = data[:a] + rng.choice(_PIECES) + data[a:]
        elif change == 2:
            data = data[:a] + bytes(rng.randrange(256) for _ in data[a:b]) + data[b:]
        elif change == 3:
            data = data[:b] + data[a:]
        elif change == 4:
            data = data[:a] + rng.choice(_PIECES) + data[b:]
        else:
            data = data[:a]
    return data


def _text(rng: random.Random) -> str:
    return "".join(rng.choice("ab c\"'\\[]{}é日:,") for _ in range(rng.randrange(9)))


def _items(rng: random.Random) -> list[dict]:
    return [{"x": _text(rng), "y": [_text(rng), {"z": 1.5}]} for _ in range(rng.randrange(1, 5))]


def _strict(text: str) -> object:
    """JSON as `json` reads it; without surrogates, which are no text."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _expect(read: Callable[[], list], oracle: Callable[[], list | None]) -> bool:
    """Whether a file was read. Both must agree; None is an oracle without an opinion."""
    try:
        wanted = oracle()
    except (ValueError, RecursionError, csv.Error, SyntaxError):
        wanted = []
    try:
        found = read()
    except InputError as error:
        if "\n" in str(error) or wanted:
            raise AssertionError(f"refused: {error}") from error
        return False
    # (As text: a NaN, which `json` reads, is not equal to itself.)
    assert wanted is None or repr(found) == repr(wanted), f"{found} instead of {wanted}"
    return True


def _decoded(data: bytes) -> str:
    if b"\0" in data:
        raise ValueError("binary")
    return data.decode("utf-8-sig")


def fuzz_json(rng: random.Random, folder: Path) -> bool:
    indent = rng.choice([None, 1])
    path, text = folder / "a.json", json.dumps(_items(rng), ensure_ascii=False, indent=indent)
    path.write_bytes(mutate(rng, text.encode()))

    def oracle() -> list | None:
        text = _decoded(path.read_bytes())
        if not text.lstrip(" \t\r\n").startswith("["):
            return None
        value = json.loads(text)
        return value if all(isinstance(item, dict) for item in value) else []

    return _expect(lambda: list(JsonItems(path)), oracle)


def fuzz_jsonl(rng: random.Random, folder: Path) -> bool:
    path, text = folder / "a.jsonl", "\n".join(json.dumps(item) for item in _items(rng))
    path.write_bytes(mutate(rng, text.encode()))

    def oracle() -> list | None:
        text = _decoded(path.read_bytes())
        if not text.lstrip(" \t\r\n").startswith("{") or '"Data"' in text:
            return None
        lines = [line for line in text.split("\n") if line.encode().strip()]
        items = [json.loads(line) for line in lines]
        return items if all(isinstance(item, dict) for item in items) else []

    return _expect(lambda: list(JsonItems(path)), oracle)


def fuzz_questions(rng: random.Random, folder: Path) -> bool:
    """Names of other formats; nothing but an `InputError` may come of them."""
    names = "question answers answer _id text input output query possible_answers golden_answers "
    names = (names + "Answer Question contexts ctxs target id").split()
    values = [
        *["a", ["b"]] * 6,
        '["c"]',
        "[",
        {"aliases": ["d"]},
        {"Value": 1, "Aliases": None},
        None,
        7,
    ]
    values += [[{"answer": "e"}], [{"docid": "1", "text": '"t"\nu', "score": "x"}], [None], [[]]]
    rows = [{n: rng.choice(values) for n in rng.sample(names, 4)} for _ in range(2)]
    path = folder / "q.json"
    kind = rng.choice([rows, dict(enumerate(rows)), {"Data": rows}])
    path.write_text(json.dumps(kind))

    def read() -> list:
        data = load_data(path)
        return [read_example(data, i).answers for i in range(len(data))]

    return _expect(read, lambda: None)


def fuzz_rows(rng: random.Random, folder: Path) -> bool:
    rows = [[_text(rng) + "?", repr([_text(rng) for _ in range(rng.randrange(3))])] for _ in "123"]
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    path = folder / "a.csv"
    path.write_bytes(mutate(rng, file.getvalue().encode()))

    def oracle() -> list | None:
        text = _decoded(path.read_bytes())
        if text.lstrip(" \t\r\n")[:1] in ("{", "[") or "\r" in text or text.count('"') % 2:
            return None
        found = []
        for line in filter(str.strip, text.split("\n")):
            line = line.rstrip(" \t")  # a tab at the end begins no column
            question, answers = next(csv.reader([line], delimiter="\t"))
            if not answers.strip().startswith("["):
                return None
            value = ast.literal_eval(answers.strip())
            if not question.strip() or not all(isinstance(one, str) for one in value):
                return None
            found.append((question, value))
        return None if "\\" in text or '"' in text or "'" in text.replace("['", "") else found

    def read() -> list:
        data = Examples(path)
        return [(data[i]["question"], data[i].get("answers")) for i in range(len(data))]

    return _expect(read, oracle)


def _collection(rng: random.Random) -> bytes:
    file = io.StringIO()
    rows = [[str(i), _text(rng) + "\n" * rng.randrange(2) + ".", _text(rng)] for i in range(7, 12)]
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows(
        [["id", "text", "title"], *rows]
    )
    return file.getvalue().encode()


def fuzz_tsv(rng: random.Random, folder: Path) -> bool:
    path = folder / "p.tsv"
    path.write_bytes(mutate(rng, _collection(rng)))

    def oracle() -> list | None:
        text = _decoded(path.read_bytes())
        with_end = io.StringIO(f"{text}\nEND", newline="")
        *rows, end = csv.reader(with_end, delimiter="\t", strict=False)
        rows = [row for row in rows if len(row) > 1 or "".join(row).strip()]
        ids = [row[0] for row in rows[1:]]
        # (The end is its own row unless a quote mark is left open.)
        is_plain = rows[:1] == [["id", "text", "title"]] and end == ["END"]
        if not is_plain or {len(row) for row in rows} != {3} or len({*ids}) < len(ids):
            return None
        return [(row[0], row[2], row[1]) for row in rows[1:]]

    return _expect(lambda: [passage[:3] for passage in Passages(path)], oracle)


def fuzz_gzip(rng: random.Random, folder: Path) -> bool:
    path, content = folder / "p.tsv.gz", _collection(rng)
    path.write_bytes(mutate(rng, gzip.compress(content, mtime=0)))
    (folder / "plain.tsv").write_bytes(content)
    good = [passage[:3] for passage in Passages(folder / "plain.tsv")]

    def read() -> list:
        found = [passage[:3] for passage in Passages(path)]
        return good if found == good[: len(found)] else found  # (a member may be cut off whole)

    def oracle() -> list | None:
        with contextlib.suppress(OSError, EOFError, ValueError, files.zlib.error):
            return good if gzip.decompress(path.read_bytes()) == content else None
        return []

    return _expect(read, oracle)


def fuzz_caches(rng: random.Random, folder: Path) -> bool:
    path = folder / "p.tsv"
    path.write_bytes(_collection(rng).replace(b"\n8\t", b"\nx\t"))
    good = list(Passages(path))
    for cache in folder.glob(".p.tsv.*"):
        cache.write_bytes(mutate(rng, cache.read_bytes()))
    return _expect(lambda: [*Passages(path), Passages(path).find(["x"])], lambda: [*good, [1]])


def fuzz_shards(rng: random.Random, folder: Path) -> bool:
    path = folder / "wiki_00"
    metadata = {"format_version": "1", "model": "a", "passages": "b", "options": "{}"}
    metadata |= {"shard_id": "0", "num_shards": "1", "first": "0"}
    with ShardWriter(path, 3, 4, np.dtype(np.float32), metadata) as writer:
        writer.append(["7", "é", ""], np.ones((3, 4), np.float32))
        writer.finish()
    path.write_bytes(mutate(rng, path.read_bytes()))

    def read() -> list:
        shard = open_shard(path)
        return [len([shard.ids[i] for i in range(len(shard))]), shard.embeddings.shape]

    return _expect(read, lambda: None)


def fuzz_pickles(rng: random.Random, folder: Path) -> bool:
    path, array = folder / "wiki_00", np.ones((2, 3), rng.choice([np.float16, np.float32]))
    content = rng.choice([(["1", "2"], array), [("1", array[0]), ("2", array[1])]])
    data = pickle.dumps(content, protocol=rng.randrange(2, 6))
    path.write_bytes(data[:2] + mutate(rng, data[2:]))
    return _expect(lambda: [open_shard(path).embeddings.shape], lambda: None)


def fuzz_checkpoint(rng: random.Random, folder: Path) -> bool:
    tensor = torch.nn.Parameter(torch.ones(2, 3))
    optimizer, state = torch.optim.Adam([tensor]), folder / "training_state.pt"
    tensor.grad = torch.ones(2, 3)
    optimizer.step()
    saved = {"optimizer": optimizer.state_dict(), "scaler": {}}
    torch.save({**saved, "random_states": [{"cpu": torch.get_rng_state()}]}, state)
    meta = {"step": 1, "periodic": True, "position": {"step": 1, "examples_seen": 4}}
    meta |= {"options": {}, "files": {state.name: state.stat().st_size}}
    (folder / "checkpoint.json").write_bytes(mutate(rng, json.dumps(meta).encode()))
    if found := read_meta(folder):
        assert found["position"]["step"] == found["step"]
    state.write_bytes(mutate(rng, state.read_bytes()))
    with contextlib.suppress(OverflowError):
        return _expect(lambda: [bool(read_state(folder, optimizer, 0, 1))], lambda: None)
    return False


def fuzz_answers(rng: random.Random, folder: Path) -> bool:
    data, path = folder / "q.json", folder / "final_output.txt"
    data.write_text(json.dumps([{"id": f"q{i}", "question": "a"} for i in range(3)]))
    path.write_bytes(mutate(rng, "".join(f"q{i}\té {i}\n" for i in range(3)).encode()))
    parts = AnswerFile(folder, 0, {"model": "a"})
    parts.path.write_bytes(mutate(rng, parts.path.read_bytes() + b'[[0, "a", [1.5]]]\n'))
    assert len(AnswerFile(folder, 0, {"model": "a"}).finished) <= 9
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(mutate(rng, b'{"step": 1, "x": 2}\n{"step": 2, "dev/y": 1}\n'))
    _keep_until(metrics, 2, True)
    return _expect(lambda: read_answers(str(path), Examples(data)), lambda: None)


KINDS = {name[5:]: task for name, task in sorted(globals().items()) if name.startswith("fuzz_")}


def _too_long(*_: object) -> None:
    raise AssertionError("no end after 20 seconds")


def fuzz(seed: int, seconds: float = 1e9, most: int = 10**9) -> Counter:
    """Cases of every kind in turn, until a time or number. Returns how many of each were read.

    Errors: AssertionError, with kind and seed, for a wrong result.
    """
    signal.signal(signal.SIGALRM, _too_long)
    counts, end = Counter(), time.monotonic() + seconds
    for number in range(most):
        if time.monotonic() > end:
            break
        kind = list(KINDS)[number % len(KINDS)]
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(20)
            try:
                was_read = KINDS[kind](random.Random(f"{seed} {number}"), Path(folder))
            except Exception as error:
                raise AssertionError(f"{kind}, case {number} of seed {seed}: {error!r}") from error
            finally:
                signal.alarm(0)
        counts[f"{kind} read" if was_read else f"{kind} refused"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("fid").setLevel(logging.CRITICAL)
    counts = fuzz(options.seed, options.seconds)
    print(f"{sum(counts.values()):,} damaged files, no wrong result:", dict(sorted(counts.items())))


if __name__ == "__main__":
    main()
