"""Opening collections and matching answers against the straightforward ways.

    python bench/bench_data.py [--rows 1000000] [--pairs 2000000]

Collections: the first and later openings of a DPR-style TSV by byte offsets, against reading it
with `csv` into a list; and the anonymous memory (RssAnon) that either leaves a process with.
Matching: `has_answer` against the rule written naively (cut text and answers into tokens, compare
runs), over invented texts of 100 words, one in four of them not ASCII; five answers a question, as
often in the text as in a retriever's first 100 passages (about one in ten). Verdicts must be equal.
"""

import argparse
import csv
import gc
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import table
from src.evaluation import has_answer, tokenize
from src.passages import Passages


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


def bench_matching(n_pairs: int) -> None:
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
    seconds, verdicts = {"naive": 0.0, "ours": 0.0}, {"naive": [], "ours": []}
    for answers, texts in questions:
        for name, match in (("naive", naive_has_answer), ("ours", has_answer)):
            began = time.perf_counter()
            verdicts[name] += [match(answers, text) for text in texts]
            seconds[name] += time.perf_counter() - began
    if verdicts["naive"] != verdicts["ours"]:
        sys.exit("the two ways give different verdicts")
    rows = [
        {
            "matching": name,
            "pairs": 500 * len(questions),
            "found": sum(verdicts[name]) / len(verdicts[name]),
            "us a pair": 1e6 * value / (500 * len(questions)),
            "speed": seconds["naive"] / value,
        }
        for name, value in seconds.items()
    ]
    table(rows)


def anonymous_memory() -> float:
    """MB of this process that are not pages of a file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


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

    path.read_bytes()  # all ways find the file in the page cache
    measure("first, by offsets", lambda: Passages(path))
    measure("later, by offsets", lambda: Passages(path))
    measure("csv, into a list", by_csv)
    for row in rows:
        row["speed"] = rows[-1]["s"] / row["s"]
    table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=2_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench_opening(options.rows, Path(folder))
    bench_matching(options.pairs)


if __name__ == "__main__":
    main()
