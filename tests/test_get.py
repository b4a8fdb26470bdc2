"""get-data.sh and get-model.sh, whole, against a server on this machine that serves small files in
the layouts of the real ones, and misbehaves as servers and networks do."""

import gzip
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from src.data.passages import Passages
from tests.conftest import REFERENCE, ROOT, on_small_disk

FETCHERS = ["curl", "wget"]
VARIABLES = ["FID_DPR_URL", "FID_NQ_URL", "FID_TRIVIAQA_URL", "FID_DATA_URL", "FID_MODELS_URL"]


# ----------------------------------------------------------------------------------------------
# A server of files, and what goes wrong with it


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path, at `url`, with Range. `requests` keeps what was fetched: the path,
    and the byte it was asked from.

    `cut`: how often a path's answer ends halfway. `slow`: paths whose answers stop halfway until
    `released`. `without_ranges`: answers are whole files. `refused`: a status instead of a file.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = files
        self.requests: list[tuple[str, int]] = []
        self.cut: dict[str, float] = {}
        self.slow: set[str] = set()
        self.halfway, self.released = threading.Event(), threading.Event()
        self.refused: dict[str, int] = {}
        self.without_ranges = self.without_lengths = False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        server, path = self.server, self.path.lstrip("/")
        if path not in server.files or path in server.refused:
            self.send_error(server.refused.get(path, 404))
            return
        content, start = server.files[path], 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and with_content:
            start = int(asked[1])
        if with_content:
            server.requests.append((path, start))
        if server.without_ranges:
            start = 0
        content = content[start:]
        self.send_response(206 if start else 200)
        if start:
            end = start + len(content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        if not server.without_lengths:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not with_content:
            return
        if path in server.slow:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            server.halfway.set()
            server.released.wait()
        elif server.cut.get(path, 0) > 0:
            server.cut[path] -= 1
            self.wfile.write(content[: len(content) // 2])
        else:
            self.wfile.write(content)


@pytest.fixture
def server(data):
    running = Server(dict(data["served"]))
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()


def tar_gz(files: dict[str, bytes | str], links: dict[str, str] | None = None) -> bytes:
    """An archive of files, and of links by their targets."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o6644  # with another user's rights
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return packed.getvalue()


@pytest.fixture(scope="module")
def data() -> dict:
    """Made-up data in the real layouts, as it is served, and what is to come out of it."""
    rng = random.Random(0)
    passages = []
    for i in range(1, 301):
        text = f'Thing {i} is "{rng.random()}", a\u0301é — 日本 {"x" * rng.randrange(300)}.'
        passages.append((str(i), text, f"T {i}"))
    rows = ["id\ttext\ttitle"] + [
        '{}\t"{}"\t"{}"'.format(name, text.replace('"', '""'), title)
        for name, text, title in passages
    ]
    nq = {
        part: [{"question": f"nq {part} {i} é", "answer": [f"a{i}", f"b {i}"]} for i in range(size)]
        for part, size in (("train", 40), ("dev", 15))
    }
    values = ["LONDON BRIDGE", "McDonald", "U.S.", "1984", "ÉCLAIR", "Oslo"]
    tqa = {
        part: [
            {
                "Answer": {"Aliases": [f"alias {i}", values[i % 6]], "Value": values[i % 6]},
                "EntityPages": [{"Title": 'odd "[{', "Data": [1, [2]]}],
                "Question": f"tqa {part} {i}\u00df?",
                "QuestionId": f"{part}_{i}",
                "SearchResults": [{"Description": "cut \ud83d"}],
            }
            for i in range(size)
        ]
        for part, size in (("train", 35), ("dev", 12))
    }
    splits = {"train": ("train", 20), "dev": ("train", 6), "test": ("dev", 8)}
    index, maps, expected = {}, {"NQ": {}, "TQA": {}}, {}
    for name, published in (("NQ", nq), ("TQA", tqa)):
        for split, (part, size) in splits.items():
            chosen = rng.sample(range(len(published[part])), size)
            index[f"dataindex/{name}.{split}.idx.json"] = json.dumps(chosen)
            by_question, examples = {}, []
            for position, row in enumerate(chosen):
                item = published[part][row]
                found = rng.sample(passages, rng.randrange(1, 12))
                identity = str(position) if name == "NQ" else item["QuestionId"]
                by_question[identity] = [passage[0] for passage in found]
                example = {"id": identity}
                if name == "NQ":
                    example |= {"question": item["question"], "answers": item["answer"]}
                else:
                    value = item["Answer"]["Value"]
                    titled = {"LONDON BRIDGE": "London Bridge", "ÉCLAIR": "Éclair"}
                    example |= {"question": item["Question"], "answers": item["Answer"]["Aliases"]}
                    example["target"] = titled.get(value, value)
                example["ctxs"] = [{"id": i, "title": title, "text": t} for i, t, title in found]
                examples.append(example)
            maps[name][f"{name.lower()}_passages/{split}.json"] = json.dumps(by_question)
            expected[f"{name}/{split}.json"] = examples
    triviaqa = {
        f"triviaqa-unfiltered/unfiltered-web-{part}.json": json.dumps(
            {"Data": items, "Domain": "Web", "VerifiedEval": False, "Version": 1.0}, indent=4
        )
        for part, items in tqa.items()
    }
    served = {
        "psgs_w100.tsv.gz": gzip.compress(("\n".join(rows) + "\n").encode()),
        "triviaqa-unfiltered.tar.gz": tar_gz(triviaqa),
        "dataindex.tar.gz": tar_gz(index),
        "nq_passages.tar.gz": tar_gz(maps["NQ"]),
        "tqa_passages.tar.gz": tar_gz(maps["TQA"]),
    }
    for part, items in nq.items():
        served[f"NQ-open.{part}.jsonl"] = "".join(json.dumps(i) + "\n" for i in items).encode()
    return {"served": served, "passages": passages, "expected": expected}


# ----------------------------------------------------------------------------------------------
# Running the scripts


@pytest.fixture(scope="module", params=FETCHERS)
def tools(request, tmp_path_factory) -> str:
    """A PATH with all tools of the system, but only one that fetches."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return only_fetcher(request.param, tmp_path_factory.mktemp("bin"))


def only_fetcher(fetcher: str, folder: Path) -> str:
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for tool in Path(place).glob("*"):
            link = folder / tool.name
            if tool.name not in FETCHERS or tool.name == fetcher:
                link.unlink(missing_ok=True)
                link.symlink_to(tool)
    # (A link to a virtual environment's Python would not be in that environment.)
    return os.pathsep.join([str(Path(sys.executable).parent), str(folder)])


def start(script: str, *options: object, path: str, server: Server, **more) -> subprocess.Popen:
    environment = {
        **os.environ,
        **dict.fromkeys(VARIABLES, server.url),
        "PATH": path,
        "VIRTUAL_ENV": sys.prefix,
        "no_proxy": "127.0.0.1",
        "FID_PAUSE": "0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        ["bash", ROOT / script, *map(str, options)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def get(script: str, *options: object, path: str, server: Server) -> tuple[int, str, str]:
    process = start(script, *options, path=path, server=server)
    out, err = process.communicate()
    return process.returncode, out, err


def get_well(script: str, *options: object, **kwargs) -> str:
    status, out, err = get(script, *options, **kwargs)
    assert (status, err) == (0, ""), out + err
    return out


def get_badly(script: str, *options: object, **kwargs) -> tuple[int, str]:
    status, _, err = get(script, *options, **kwargs)
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return status, line


def files(folder: Path) -> dict[str, int]:
    """All files of a folder, with the times when they were written."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def check_results(folder: Path, data: dict, names: set[str]) -> None:
    """The data files of these datasets are there, item by item as expected; others are not."""
    opened = Passages(folder / "psgs_w100.tsv")
    assert [(p.id, p.text, p.title) for p in opened] == data["passages"]
    for name, examples in data["expected"].items():
        if name.split("/")[0] in names:
            assert json.loads((folder / name).read_text()) == examples, name
        else:
            assert not (folder / name).exists()


# ----------------------------------------------------------------------------------------------
# get-data.sh


def test_all_the_data(tools, server, data, tmp_path):
    """One connection is cut halfway. The second run fetches nothing and writes nothing."""
    server.cut["psgs_w100.tsv.gz"] = 1
    out = tmp_path / "data"
    said = get_well("get-data.sh", "-o", out, path=tools, server=server)
    check_results(out, data, {"NQ", "TQA"})
    size = len(data["served"]["psgs_w100.tsv.gz"])
    of_passages = [start for path, start in server.requests if path == "psgs_w100.tsv.gz"]
    assert of_passages == [0, size // 2]
    assert sorted({path for path, _ in server.requests}) == sorted(data["served"])
    assert len(server.requests) == len(data["served"]) + 1
    total = sum(map(len, data["served"].values()))
    assert f"into {out}: {total / 1e6:.3g} MB to fetch, up to about" in said
    kept = {name for name in files(out) if not name.startswith(".")}
    assert kept == {"psgs_w100.tsv", *data["expected"]}

    server.requests.clear()
    before = files(out)
    said = get_well("get-data.sh", "-o", out, path=tools, server=server)
    assert said == f"done already: {out}\n"
    assert files(out) == before
    assert not server.requests


@pytest.mark.parametrize(("only", "names"), [("nq", {"NQ"}), ("tqa", {"TQA"})])
def test_only_a_part(only, names, server, data, tmp_path):
    options = ["--only", only, "-o", tmp_path / "data"]
    get_well("get-data.sh", *options, path=os.environ["PATH"], server=server)
    check_results(tmp_path / "data", data, names)
    assert (only == "tqa") == any(path.startswith("triviaqa") for path, _ in server.requests)
    assert (only == "nq") == any(path.startswith("NQ-open") for path, _ in server.requests)
    server.requests.clear()
    said = get_well("get-data.sh", *options, path=os.environ["PATH"], server=server)
    assert "done already" in said
    assert not server.requests


def test_downloads_are_kept(server, data, tmp_path):
    options = ["--keep", "-o", tmp_path]
    get_well("get-data.sh", *options, path=os.environ["PATH"], server=server)
    for name, content in data["served"].items():
        assert (tmp_path / "download" / name).read_bytes() == content
    # What is made of them is made again without a server.
    shutil.rmtree(tmp_path / "NQ")
    (tmp_path / "psgs_w100.tsv").unlink()
    shutil.rmtree(tmp_path / "download" / "nq_passages")
    server.requests.clear()
    get_well("get-data.sh", *options, path=os.environ["PATH"], server=server)
    check_results(tmp_path, data, {"NQ", "TQA"})
    assert not server.requests


def test_a_connection_that_cannot_be_held(tools, server, data, tmp_path):
    """Each try brings half of what is missing; then nothing more comes. The next run goes on."""
    name = "psgs_w100.tsv.gz"
    server.cut[name] = float("inf")
    options = ["-o", tmp_path, "--only", "wiki"]
    status, line = get_badly("get-data.sh", *options, path=tools, server=server)
    assert status == 1
    size = len(data["served"][name])
    found = re.fullmatch(
        rf"error: {server.url}/{name}: stopped at (\d+) of {size} bytes \((curl|wget)'s status is "
        r"\d+\); the same command resumes from there",
        line,
    )
    assert found, line
    assert 0.9 * size < int(found[1]) < size
    assert (tmp_path / "download" / f"{name}.part").stat().st_size == int(found[1])
    server.requests.clear()
    server.cut.clear()
    get_well("get-data.sh", *options, path=tools, server=server)
    check_results(tmp_path, data, set())
    assert server.requests == [(name, int(found[1]))]


@pytest.mark.parametrize("missing", ["without_ranges", "without_lengths"])
def test_a_server_without_ranges_or_lengths(missing, tools, server, data, tmp_path):
    setattr(server, missing, True)
    server.cut["psgs_w100.tsv.gz"] = missing == "without_ranges"
    get_well("get-data.sh", "-o", tmp_path, "--only", "wiki", path=tools, server=server)
    check_results(tmp_path, data, set())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("psgs_w100.tsv.gz", "truncated"),
        ("nq_passages.tar.gz", "truncated"),
        ("NQ-open.dev.jsonl", "a page of HTML"),
    ],
)
def test_what_is_not_whole_is_not_unpacked(name, kind, server, data, tmp_path):
    whole = data["served"][name]
    server.files[name] = whole[:-20] if kind == "truncated" else b"<html>Sign in</html>"
    only = "wiki" if name.startswith("psgs") else "nq"
    options = ["-o", tmp_path, "--keep", "--only", only]
    status, line = get_badly("get-data.sh", *options, path=os.environ["PATH"], server=server)
    assert status == 1
    assert re.fullmatch(
        rf"error: {tmp_path}/download/{name}: the download was truncated or damaged .* again", line
    )
    left = files(tmp_path)
    assert not any("partial" in path or Path(path).name == name for path in left)
    fetched = {path for path, _ in server.requests} - {name}
    assert all(f"download/{path}" in left for path in fetched)
    server.requests.clear()
    server.files[name] = whole
    get_well("get-data.sh", *options, path=os.environ["PATH"], server=server)
    check_results(tmp_path, data, {"NQ"} if only == "nq" else set())
    assert not fetched & {path for path, _ in server.requests}


def test_ctrl_c(tools, server, data, tmp_path):
    name = "psgs_w100.tsv.gz"
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # (a test run in the background has none)
    server.slow.add(name)
    options = ["-o", tmp_path, "--only", "wiki"]
    process = start("get-data.sh", *options, path=tools, server=server, start_new_session=True)
    assert server.halfway.wait(60)
    part = tmp_path / "download" / f"{name}.part"
    half = len(data["served"][name]) // 2
    while part.stat().st_size < half:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip() == "error: stopped; the same command resumes from here"
    assert part.stat().st_size == half
    server.slow.clear()
    server.requests.clear()
    get_well("get-data.sh", *options, path=tools, server=server)
    assert server.requests == [(name, half)]
    check_results(tmp_path, data, set())


def small_disk(folder: Path, free: int) -> str:
    """A PATH on which `df` finds so many KiB free."""
    (folder / "df").write_text(f"#!/bin/sh\necho header; echo disk 999999999 9 {free} 9% /\n")
    (folder / "df").chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def test_a_small_disk(server, data, tmp_path):
    (tmp_path / "bin").mkdir()
    path, out = small_disk(tmp_path / "bin", 10), tmp_path / "data"
    status, line = get_badly("get-data.sh", "-o", out, path=path, server=server)
    assert status == 2
    found = re.fullmatch(
        rf"error: {out}: what remains to fetch and unpack takes about ([\d.]+) MB, and "
        r"0.0102 MB are free; make room, or name another folder with -o",
        line,
    )
    assert found, line
    size = {name: len(content) / 1e6 for name, content in data["served"].items()}
    archives = {name: size for name, size in size.items() if name.endswith(".gz")}
    needed = 3 * sum(archives.values()) + 3 * size["psgs_w100.tsv.gz"] + max(size.values())
    needed += sum(size.values()) - sum(archives.values())
    assert float(found[1]) == pytest.approx(needed, rel=0.01)
    assert not server.requests
    assert not files(out)


# ----------------------------------------------------------------------------------------------
# get-model.sh

READER = REFERENCE / "legacy_reader" / "checkpoint" / "step-20"


def pack(name: str, folder: Path) -> bytes:
    return tar_gz({f"{name}/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())})


@pytest.mark.parametrize("keep", [False, True])
def test_a_model(keep, tools, server, tmp_path):
    archive = pack("nq_reader_base", READER)
    server.files["nq_reader_base.tar.gz"] = archive
    server.cut["nq_reader_base.tar.gz"] = 1
    options = ["-m", "nq_reader_base", "-o", tmp_path, *(["--keep"] if keep else [])]
    get_well("get-model.sh", *options, path=tools, server=server)
    assert server.requests == [
        ("nq_reader_base.tar.gz", 0),
        ("nq_reader_base.tar.gz", len(archive) // 2),
    ]
    assert (tmp_path / "nq_reader_base.tar.gz").exists() == keep
    for path in READER.iterdir():
        assert (tmp_path / "nq_reader_base" / path.name).read_bytes() == path.read_bytes()
    before = files(tmp_path)
    server.requests.clear()
    said = get_well("get-model.sh", *options, path=tools, server=server)
    assert said == f"done already: {tmp_path}/nq_reader_base\n"
    assert files(tmp_path) == before
    assert not server.requests


HOSTILE = {
    "an absolute path": ({"ok/config.json": "{}", "{outside}": "x"}, {}),
    "a path that goes up": ({"ok/config.json": "{}", "../evil": "x"}, {}),
    "a link that goes up": ({"ok/config.json": "{}"}, {"ok/link": "../../evil"}),
    "a link to the folder above": ({"ok/config.json": "{}"}, {"ok/link": ".."}),
    "an absolute link": ({"ok/config.json": "{}"}, {"ok/link": "{outside}"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused(case, server, tmp_path):
    outside = tmp_path / "evil"
    contents, links = HOSTILE[case]
    contents = {name.replace("{outside}", str(outside)): text for name, text in contents.items()}
    links = {name: target.replace("{outside}", str(outside)) for name, target in links.items()}
    server.files["nq_retriever.tar.gz"] = tar_gz(contents, links)
    out = tmp_path / "a" / "models"
    options = ["-m", "nq_retriever", "-o", out]
    status, line = get_badly("get-model.sh", *options, path=os.environ["PATH"], server=server)
    assert status == 2
    assert re.match(
        f"error: {out}/nq_retriever.tar.gz: refused, because it contains '.*', which", line
    )
    assert files(tmp_path).keys() == {"a/models/nq_retriever.tar.gz"}


@pytest.mark.parametrize(
    ("megabytes", "message"), [(1, "part: cannot be written"), (3, "retriever: cannot be unpacked")]
)
def test_a_disk_that_fills_up(megabytes, message, tools, disk, server):
    """By other things than ours, that is: `df` found it large enough."""
    weights = random.Random(0).randbytes(2_000_000)
    server.files["nq_retriever.tar.gz"] = tar_gz({"nq_retriever/weights": weights})
    bin_folder = disk.parent / "bin"
    bin_folder.mkdir()
    path = small_disk(bin_folder, 10**9).split(os.pathsep)[0] + os.pathsep + tools
    settings = [f"PATH={path}", f"FID_MODELS_URL={server.url}", "no_proxy=127.0.0.1", "FID_PAUSE=0"]
    command = ["bash", ROOT / "get-model.sh", "-m", "nq_retriever", "-o", disk]
    keep = f'"$@"; status=$?; ls {disk}; exit $status'
    done = on_small_disk(disk, megabytes, "env", *settings, "sh", "-c", keep, "sh", *command)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.splitlines()
    assert re.match(f"error: {disk}/.*{message} .*; make room, and the same command resumes", line)
    left = done.stdout.splitlines()[-1]
    assert left == "nq_retriever.tar.gz" + (".part" if megabytes == 1 else "")


@pytest.mark.parametrize("folder", ["x/", ""])
def test_an_archive_with_or_without_a_folder_of_its_own(folder, server, tmp_path):
    """And with a harmless link, and files that would run with their owner's rights."""
    contents = {f"{folder}a": "1", f"{folder}b": "2"}
    server.files["nq_retriever.tar.gz"] = tar_gz(contents, {f"{folder}link": "a"})
    options = ["-m", "nq_retriever", "-o", tmp_path]
    get_well("get-model.sh", *options, path=os.environ["PATH"], server=server)
    assert files(tmp_path).keys() == {f"nq_retriever/{name}" for name in ("a", "b", "link")}
    assert (tmp_path / "nq_retriever" / "link").read_text() == "1"
    assert not any(path.stat().st_mode & 0o6000 for path in (tmp_path / "nq_retriever").iterdir())


# ----------------------------------------------------------------------------------------------
# Bad use, and servers that refuse

BAD = {
    "an unknown option": ("get-data.sh", "--ony nq", 2, "--ony: no such option .*--help"),
    "no value": ("get-data.sh", "--only", 2, "an option's value is missing .*--help"),
    "an unknown part": ("get-data.sh", "--only x", 2, "--only 'x': must be nq, tqa or wiki"),
    "a file as folder": ("get-data.sh", "-o {file}", 2, "-o '.*file': this folder .*; name"),
    "no folder": ("get-data.sh", "-o ''", 2, "-o '': this folder .*; name another"),
    "no model": ("get-model.sh", "", 2, "-m '': no such model; the models are nq_reader_base, nq_"),
    "an unknown model": ("get-model.sh", "-m bart", 2,
        "-m 'bart': no such model; the models are nq_reader_base, .*, tqa_retriever$"),
    "a model that is not there": ("get-model.sh", "-m nq_retriever -o {out}", 1,
        "http.*/nq_retriever.tar.gz: the server responds with HTTP 404; .*with FID_MODELS_URL"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_use(case, server, tmp_path):
    script, options, expected, message = BAD[case]
    (tmp_path / "file").write_text("")
    names = {"file": tmp_path / "file", "out": tmp_path / "out"}
    words = ["" if word == "''" else word.format(**names) for word in options.split()]
    before = sorted(os.listdir(ROOT))
    status, line = get_badly(script, *words, path=os.environ["PATH"], server=server)
    assert status == expected
    assert re.match("error: " + message, line), line
    assert files(tmp_path).keys() == {"file"}
    assert sorted(os.listdir(ROOT)) == before


def test_servers_that_refuse(tools, server, tmp_path):
    """The error comes at once, before the gigabytes."""
    server.refused["tqa_passages.tar.gz"] = 403
    code, line = get_badly("get-data.sh", "-o", tmp_path, path=tools, server=server)
    assert code == 1
    assert line == (
        f"error: {server.url}/tqa_passages.tar.gz: the server responds with HTTP 403; try later, "
        "or name a mirror with FID_DATA_URL"
    )
    assert not server.requests


def test_a_server_that_is_not_there(tools, server, tmp_path):
    server.url = "http://127.0.0.1:9"
    code, line = get_badly("get-data.sh", "-o", tmp_path, path=tools, server=server)
    assert code == 1
    assert line.startswith(
        "error: http://127.0.0.1:9/psgs_w100.tsv.gz: the server cannot be reached"
    )


def test_neither_curl_nor_wget(server, tmp_path):
    path = only_fetcher("none", tmp_path)
    status, line = get_badly("get-data.sh", "-o", tmp_path, path=path, server=server)
    assert (status, line) == (2, "error: neither curl nor wget is installed; install one of them")


@pytest.mark.parametrize("script", ["get-data.sh", "get-model.sh"])
def test_help(script, server):
    said = get_well(script, "--help", path=os.environ["PATH"], server=server)
    assert f"bash {script}" in said
    assert said.rstrip().endswith("_URL.")
