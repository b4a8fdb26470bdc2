"""Opening collections and matching answers against the straightforward ways.

    python bench/bench_data.py [--rows 1000000] [--pairs 2000000] [--examples 20000]
        [--passages passages.tsv --data questions.json]

Collections: the first and later openings of a DPR-style TSV by byte offsets, against reading it
with `csv` into a list; and the anonymous memory (RssAnon) that either leaves a process with.
Matching: `has_answer` against the rule written naively (cut text and answers into tokens, compare
runs), over invented texts of 100 words, one in four of them not ASCII; five answers a question, as
often in the text as in a retriever's first 100 passages (about one in ten); or over real passages,
cut to 100 words, and real questions' answers. Verdicts must be equal.

Examples: the memory of a process that trains on a file of questions with 100 passages each, and its
time to the first batch, against reading the file with `json`. "of reading" is the share of the time
that reading the bytes alone would take: what the machine allows, as the peak in matrix products
is for the models.
"""

import argparse
import csv
import gc
import json
import multiprocessing
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import table
from src.data.batches import ReaderCollator, ReaderDataset, make_loader, training_batches
from src.data.examples import load_data, read_example
from src.data.passages import Passages
from src.evaluation.answers import has_answer, tokenize


def naive_has_answer(answers: list[str], text: str) -> bool:
    tokens = tokenize(text)
    for answer in answers:
        wanted = tokenize(answer)
        for start in range(len(tokens) - len(wanted) + 1):
            if tokens[start : start + len(wanted)] == wanted:
                return True
    return False


def invent_words(rng: random.Random, count: int) -> list[str]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)})


def invent_text(rng: random.Random, words: list[str], accents: bool) -> str:
    # Frequencies fall as in language: a few words make up most of a text.
    chosen = [words[int(len(words) * rng.random() ** 4)] for _ in range(100)]
    text = " ".join(word.capitalize() if rng.random() < 0.15 else word for word in chosen) + "."
    return text.replace("e", "é").replace("an", "ään") if accents else text


def invent_questions(n_pairs: int) -> list[tuple[list[str], list[str]]]:
    """Five answers and 100 texts of each question."""
    rng = random.Random(0)
    words = invent_words(rng, 20_000)
    questions = []
    for _ in range(n_pairs // 500):
        texts = [invent_text(rng, words, rng.random() < 0.25) for _ in range(100)]
        pieces = rng.choice(texts).split()
        start = rng.randrange(98)
        answers = [" ".join(pieces[start : start + rng.randint(1, 3)])]
        answers += [f"{rng.choice(words)} {rng.choice(words)}".title() for _ in range(4)]
        questions.append((answers, texts))
    return questions


def real_questions(
    n_pairs: int, passages: str, data: str, n_answers: int
) -> list[tuple[list[str], list[str]]]:
    """So many answers, the first its own, and 100 texts of each question."""
    rng = random.Random(0)
    collection, examples = Passages(passages), load_data(data)
    texts = [" ".join(passage.text.split()[:100]) for passage in collection]
    answers = [read_example(examples, index).answers for index in range(len(examples))]
    questions = []
    for number in range(n_pairs // (100 * n_answers)):
        own = answers[number % len(answers)]
        others = [rng.choice(answers)[0] for _ in range(n_answers)]
        questions.append(((own + others)[:n_answers], rng.choices(texts, k=100)))
    return questions


def bench_matching(name: str, questions: list[tuple[list[str], list[str]]]) -> None:
    n_pairs = sum(len(answers) * len(texts) for answers, texts in questions)
    seconds, verdicts = {"naive": 0.0, "ours": 0.0}, {"naive": [], "ours": []}
    for answers, texts in questions:
        for way, match in (("naive", naive_has_answer), ("ours", has_answer)):
            began = time.process_time()  # one thread: what others do counts less
            verdicts[way] += [match(answers, text) for text in texts]
            seconds[way] += time.process_time() - began
    if verdicts["naive"] != verdicts["ours"]:
        sys.exit("the two ways give different verdicts")
    rows = [
        {
            f"matching, {name}": way,
            "pairs": n_pairs,
            "texts with one": sum(verdicts[way]) / len(verdicts[way]),
            "us a pair": 1e6 * value / n_pairs,
            "speed": seconds["naive"] / value,
        }
        for way, value in seconds.items()
    ]
    table(rows)


def anonymous_memory() -> float:
    """MB of this process that are not pages of a file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


def read_through(path: Path) -> float:
    """The seconds that reading a file's bytes takes, once they are in the page cache."""
    for _ in range(2):
        began = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        seconds = time.perf_counter() - began
    return seconds


def bench_opening(n_rows: int, folder: Path) -> None:
    rng = random.Random(0)
    words = invent_words(rng, 5000)
    texts = [invent_text(rng, words, False) for _ in range(1000)]
    path = folder / "passages.tsv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["id", "text", "title"])
        writer.writerows(
            (i, f'"{i}" {texts[i % 1000]}', f"Title {i}") for i in range(1, n_rows + 1)
        )
    rows = []

    def measure(name: str, task: Callable[[], Sequence]) -> None:
        gc.collect()
        before, began = anonymous_memory(), time.perf_counter()
        kept = task()
        seconds = time.perf_counter() - began
        row = {"opening": name, "passages": len(kept), "s": seconds}
        rows.append({**row, "MB kept": anonymous_memory() - before})
        if len(kept) != n_rows or kept[n_rows // 2][0] != str(n_rows // 2 + 1):
            sys.exit(f"{name}: other passages than were written")

    def by_csv() -> list:
        with open(path, newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            next(reader)
            return list(reader)

    bytes_only = read_through(path)  # all ways find the file in the page cache
    measure("first, by offsets", lambda: Passages(path))
    measure("later, by offsets", lambda: Passages(path))
    measure("csv, into a list", by_csv)
    for row in rows:
        row |= {"speed": rows[-1]["s"] / row["s"], "of reading": bytes_only / row["s"]}
    table(rows)


def _first_batch(path: str, pipe: Connection) -> None:
    """What train_reader.py does with its data until it has a batch, with a tokenizer of words."""
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    # As in a script: this process was spawned, to begin empty, and so would its workers be.
    multiprocessing.set_start_method("fork", force=True)
    before, began = anonymous_memory(), time.perf_counter()
    data = load_data(path, needs_target=True)
    dataset, collate = ReaderDataset(data, 100, True), ReaderCollator(tokenizer, 200)
    batches = training_batches(len(data), 1, 0, 1, 0, 0)
    loaded = iter(make_loader(dataset, batches, collate, 2, False))
    next(loaded)
    seconds = time.perf_counter() - began
    for _ in range(20):
        next(loaded)
    pipe.send((seconds, anonymous_memory() - before))


def bench_examples(n_examples: int, folder: Path) -> None:
    rng = random.Random(0)
    words = invent_words(rng, 5000)
    texts = [invent_text(rng, words, False) for _ in range(1000)]
    path = folder / "train.json"
    with open(path, "w") as file:
        for number in range(n_examples):
            contexts = [
                {"id": str(n), "title": f"Title {n}", "text": text, "score": -n}
                for n, text in enumerate(rng.choices(texts, k=100))
            ]
            example = {"question": f"who is {number}?", "target": "a b", "answers": ["a b"]}
            file.write(("[" if number == 0 else ",\n") + json.dumps({**example, "ctxs": contexts}))
        file.write("]\n")
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_first_batch, args=(str(path), theirs))
    process.start()
    first, kept = ours.recv()
    process.join()
    before, began = anonymous_memory(), time.perf_counter()
    with open(path) as file:
        plain = json.load(file)
    seconds = time.perf_counter() - began
    row = {"GB": path.stat().st_size / 1e9, "examples": len(plain)}
    rows = [
        {"training data": "ours, 20 batches", **row, "first batch s": first, "MB kept": kept},
        {
            **{"training data": "json, into a list", **row, "first batch s": seconds},
            "MB kept": anonymous_memory() - before,
        },
    ]
    bytes_only = read_through(path)
    for row in rows:
        row["speed"] = seconds / row["first batch s"]
        row["of reading"] = bytes_only / row["first batch s"]
    table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=2_000_000)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--passages", help="real passages to match answers in ...")
    parser.add_argument("--data", help="... and the questions with the answers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench_opening(options.rows, Path(folder))
        bench_examples(options.examples, Path(folder))
    bench_matching("invented text, 5 answers", invent_questions(options.pairs))
    if options.passages:
        for n_answers in (1, 5):
            questions = real_questions(options.pairs, options.passages, options.data, n_answers)
            bench_matching(f"{options.passages}, {n_answers} answer(s)", questions)


if __name__ == "__main__":
    main()
