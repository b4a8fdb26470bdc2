"""Split documents into passages, a collection to search.

    python -m src.tools.split_documents notes/ articles.jsonl.gz -o passages.jsonl
    python -m src.tools.split_documents wikiextractor_output/ -o passages.tsv --sentences

Reads text, Markdown, JSON, JSONL and wikiextractor's files, gzipped or not, and folders of these. A
passage's id is its document's, a dash and its number: a file's name stands for a missing id.
"""

import argparse
import csv
import gzip
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from src.data.examples import available_cpus, in_order
from src.data.json_files import JsonItems
from src.data.outputs import claim_output, write_whole
from src.data.passages import FIELD_NAMES
from src.options import splitting_parser
from src.runtime.errors import InputError, reports_input_errors, shorten
from src.runtime.terminal import count, progress_bar

_NAMES = r"(\.(txt|text|md|markdown|json|jsonl)|^wiki_\d+)(\.gz)?$"
_WORTH_A_PROCESS, _BATCH, _CHUNK = 1 << 24, 1 << 20, 1 << 20  # bytes
_LONGEST_WORD = 400_000  # bytes
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.*?)[ \t#]*$", re.MULTILINE)
_DOC = re.compile(r'<doc id="([^"]*)" url="([^"]*)" title="(.*)">\s*$')


class Document(NamedTuple):
    """A document: `text` in pieces that end between words."""

    id: str
    title: str
    text: Iterable[str]
    more: dict[str, Any]


def _is_read(batch: list[Document]) -> bool:
    return all(isinstance(document.text, list) for document in batch)


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = splitting_parser().parse_args(arguments)
    claim_output(options.output, "--output", inputs=options.files)
    files = [pair for name in options.files for pair in _find_files(Path(name), options.output)]
    total = sum(path.stat().st_size for path, _ in files)
    workers = min(options.workers or available_cpus(), max(1, total // _WORTH_A_PROCESS))
    n_passages = 0

    def split_all(batch: list[Document]) -> Iterable[tuple[str, int]]:
        lines = _split_all(batch, options)
        return list(lines) if _is_read(batch) else lines

    def lines() -> Iterator[str]:
        nonlocal n_passages
        if options.output.endswith(".tsv"):
            yield "id\ttext\ttitle\n"
        with progress_bar(total, "B", unit_scale=True) as bar:
            batches = (batch for file in files for batch in _batches(*file, options, bar.update))
            for is_read, some in itertools.groupby(batches, _is_read):
                # (A text that is still being read is split here.)
                split_up = in_order(split_all, some, workers if is_read else 1)
                for text, n in itertools.chain.from_iterable(split_up):
                    n_passages += n
                    yield text
        if not n_passages:
            raise InputError(f"{', '.join(options.files)}: no text in these files; give some")

    write_whole(Path(options.output), lines())
    print(f"{options.output}: {count(n_passages, 'passage')} of {count(len(files), 'file')}")


def _find_files(path: Path, output: str) -> list[tuple[Path, str]]:
    """A file, or a folder's that can be read, by name, each with the name that ids begin with."""
    if path.is_file():
        return [(path, path.name)]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name[0] != "."]
    kept = [file for file in files if re.search(_NAMES, file.name)]
    kept = [file for file in kept if file.resolve() != Path(output).resolve()]
    if not kept:
        raise InputError(f"{path}: no documents (.txt, .md, .json, .jsonl, wiki_00) are there")
    if len(kept) < len(files):
        print(f"{path}: skipped {count(len(files) - len(kept), 'file')} of other kinds")
    return [(file, str(file.relative_to(path))) for file in kept]


# ----------------------------------------------------------------------------------------------
# Reading documents


def _batches(
    path: Path, name: str, options: argparse.Namespace, update: Callable[[int], object]
) -> Iterator[list[Document]]:
    """A file's documents, about a megabyte at a time."""
    batch, size = [], 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for document in _documents(path, name, file, options):
                batch.append(document)
                size += len(document.text[0]) if isinstance(document.text, list) else 0
                if size > _BATCH:
                    yield batch
                    batch, size = [], 0
            yield batch
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the file") from None
    update(path.stat().st_size)


def _documents(
    path: Path, name: str, file: io.BufferedReader, options: argparse.Namespace
) -> Iterator[Document]:
    kind = Path(name.removesuffix(".gz")).suffix
    if kind == ".json":
        for number, raw in enumerate(JsonItems(path)):
            yield _from_json(raw, number, name, options)
    elif kind == ".jsonl" or (kind == "" and file.peek(1)[:1] == b"{"):
        for number, line in enumerate(_lines(path, file)):
            if line.strip():
                try:
                    raw = json.loads(line)
                except (ValueError, RecursionError):
                    problem = f"not JSON: {shorten(line)}"
                    raise InputError(f"{path}, line {number + 1}: {problem}; correct it") from None
                yield _from_json(raw, number, name, options)
    elif file.peek(5)[:5] == b"<doc ":
        yield from _from_wikiextractor(_lines(path, file))
    else:
        yield _from_text(path, name, file, kind in (".md", ".markdown"))


def _decode(path: Path, data: bytes, start: int) -> str:
    if 0 in data:
        problem = f"byte {start + data.index(0)} is 0; not a text file, leave it out"
        raise InputError(f"{path}: {problem}")
    try:
        return data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {start + error.start} is not UTF-8 text"
        raise InputError(f"{path}: {problem}; re-encode the file, or leave it out") from None


def _lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    start = 0
    for line in file:
        yield _decode(path, line, start)
        start += len(line)


def _from_json(raw: Any, number: int, name: str, options: argparse.Namespace) -> Document:
    where = f"{name}, object {number} (from 0)"
    if not isinstance(raw, dict):
        raise InputError(f"{where}: must be an object with a text, not {shorten(raw)}")
    fields = {}
    for field, names in FIELD_NAMES.items():
        given = getattr(options, f"{field}_field")
        fields[field] = given or next((known for known in names if known in raw), field)
    identity, title, text = (raw.get(fields[field]) for field in ("id", "title", "text"))
    if not isinstance(text, str) or not isinstance(title or "", str):
        problem = f"its {fields['text']} and title must be texts, not {shorten(text)}"
        raise InputError(f"{where}: {problem}; see --text_field and --title_field")
    more = {key: value for key, value in raw.items() if key not in fields.values()}
    identity = f"{name}-{number}" if identity is None else str(identity)
    return Document(identity, title or "", [text], more)


def _from_wikiextractor(lines: Iterable[str]) -> Iterator[Document]:
    head, text = None, []
    for line in lines:
        if start := _DOC.match(line):
            head, text = [html.unescape(value) for value in start.groups()], []
        elif line.startswith("</doc>") and head:
            identity, url, title = head
            body = "".join(text).strip()
            yield Document(identity, title, [body.removeprefix(f"{title}\n")], {"url": url})
            head = None
        else:
            text.append(line)


def _from_text(path: Path, name: str, file: io.BufferedReader, is_markdown: bool) -> Document:
    """The file as one document. A large one is read while it is split."""
    title = Path(name.removesuffix(".gz")).stem
    pieces = _pieces(path, file, b"\n" if is_markdown else b"\n ")
    first = next(pieces, "")
    text = itertools.chain([first], pieces)
    if is_markdown:
        found = _HEADING.search(first)
        title = found[1] if found else title
        text = (_HEADING.sub(r"\1", piece) for piece in text)
    return Document(name, title, text if path.stat().st_size > _BATCH else list(text), {})


def _pieces(path: Path, file: io.BufferedReader, ends: bytes) -> Iterator[str]:
    """A text in pieces that end with one of these characters, so between words."""
    rest, start = b"", 0
    while chunk := file.read(_CHUNK):
        data = rest + chunk
        end = max(data.rfind(bytes([character])) for character in ends) + 1
        if len(data) - end > _LONGEST_WORD:
            raise InputError(f"{path}: a word of {len(data) - end:,} bytes; is this text?")
        if end:
            yield _decode(path, data[:end], start)
        rest, start = data[end:], start + end
    if rest:
        yield _decode(path, rest, start)


# ----------------------------------------------------------------------------------------------
# Splitting


def split(text: Iterable[str], n: int, overlap: int = 0, sentences: bool = False) -> Iterator[str]:
    """Passages of at most n words of a text in pieces, with single spaces between words. Each
    begins with the last `overlap` words of the one before; with `sentences`, it ends with a
    sentence if one ends in it."""
    words: list[str] = []
    for piece in text:
        words += piece.split()
        start = 0
        while len(words) - start > n:
            end = start + n
            if sentences:
                candidates = range(end - 1, start + overlap - 1, -1)
                ends = (i + 1 for i in candidates if _SENTENCE_END.search(words[i][-3:]))
                end = next(ends, end)
            yield " ".join(words[start:end])
            start = end - overlap
        words = words[start:]
    if words:
        yield " ".join(words)


def _split_all(documents: list[Document], options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The lines of the collection for some documents, many at a time, and how many."""
    out, n = io.StringIO(), 0
    table = csv.writer(out, delimiter="\t", lineterminator="\n")
    for identity, title, text, more in documents:
        identity, title = " ".join(identity.split()), " ".join(title.split())
        passages = split(text, options.words, options.overlap, options.sentences)
        for number, passage in enumerate(passages):
            row = {"id": f"{identity}-{number}", "text": passage, "title": title}
            if options.output.endswith(".tsv"):
                table.writerow(row.values())
            else:
                out.write(json.dumps({**row, **more, **row}, ensure_ascii=False) + "\n")
            n += 1
            if out.tell() > _BATCH:
                yield out.getvalue(), n
                n = out.truncate(out.seek(0))
    yield out.getvalue(), n


if __name__ == "__main__":
    main()
