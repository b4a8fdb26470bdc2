"""What a person at a terminal sees: first and last lines, the next command, bars, Ctrl-C."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import generate_passage_embeddings
import passage_retrieval
import test_reader
import train_reader
import train_retriever
from src import options as all_options
from src.tools.report import __main__ as report
from tests.conftest import ROOT
from tests.terminal import Terminal

PROGRAMS = {
    "train_reader.py": train_reader.main,
    "test_reader.py": test_reader.main,
    "train_retriever.py": train_retriever.main,
    "generate_passage_embeddings.py": generate_passage_embeddings.main,
    "passage_retrieval.py": passage_retrieval.main,
    "-m src.tools.report": report.main,
}
PROMISE = 2.0  # seconds from Ctrl-C to a script's end


def facts(printed: str) -> dict[str, str]:
    """What a script said in aligned lines, by name; of a name that comes twice, the last."""
    lines = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (dev data|\w+) {2,}(.*)$", printed, re.M)
    return dict(lines)


def next_commands(printed: str) -> list[list[str]]:
    """The commands that a script ended with, as a shell would read them."""
    return [shlex.split(line) for line in re.findall(r"^    (python .*)$", printed, re.M)]


# ----------------------------------------------------------------------------------------------
# First and last lines


@pytest.fixture
def do(capsys):
    """Runs a command such as scripts print, in this process; gives what was printed."""

    def run_here(command: list) -> str:
        command = [str(word) for word in command]
        assert command[0] == "python"
        n_words = 3 if command[1] == "-m" else 2
        capsys.readouterr()
        PROGRAMS[" ".join(command[1:n_words])](command[n_words:])
        printed = capsys.readouterr()
        assert printed.err == ""  # no bars where there is no terminal
        return printed.out

    return run_here


def small_data(reference: Path, folder: Path) -> Path:
    """Questions of the reference with passages, which have scores."""
    examples = json.loads((reference / "data.json").read_text())
    file = folder / "data.json"
    file.write_text(json.dumps([example for example in examples if example.get("ctxs")]))
    return file


def test_the_circle_by_the_commands_that_scripts_end_with(reference, tmp_path, do):
    folder = tmp_path / "it's here"  # to be quoted
    folder.mkdir()
    passages = shutil.copy(reference / "passages.tsv", folder / "passages.tsv")
    data, runs = small_data(reference, folder), folder / "runs"
    small = ["--text_maxlength", 48, "--generation_max_length", 5]
    training = ["--total_steps", 2, "--eval_freq", 1]

    printed = do(
        ["python", "train_reader.py", "--train_data", data, "--eval_data", data, "--n_context", 2,
         "--model_path", reference / "t5", "--checkpoint_dir", runs, "--name", "reader",
         "--per_gpu_batch_size", 2, "--accumulation_steps", 3, *small, *training]
    )  # fmt: skip
    said = facts(printed)
    n = len(json.loads(data.read_text()))
    assert list(said) == [
        "train", "device", "results", "data", "dev data", "model", "updates", "done", "weights",
        "next",
    ]  # fmt: skip
    assert re.fullmatch(r"CPU, \d+ threads?; fp32; 1 process", said["device"])
    assert said["data"] == f"training on {n} of {n} examples of {data}, at most 2 passages each"
    assert said["model"] == f"0.1M parameters, from {reference / 't5'}"
    assert said["updates"].startswith("1 to 2, of 2 x 3 x 1 questions")
    assert re.match(r"2 updates in 0:\d\d:\d\d; the best exact match on dev is", said["done"])
    assert said["weights"] == str(runs / "reader" / "checkpoint" / "best_dev")
    score_train, score_dev = next_commands(printed)
    assert score_train[-2:] == ["--write_results", "--write_crossattention_scores"]

    again = do(["python", "train_reader.py", "--train_data", data, "--eval_data", data,
                "--n_context", 2, "--model_path", reference / "t5", "--checkpoint_dir", runs,
                "--name", "reader", "--per_gpu_batch_size", 2, *small, *training])  # fmt: skip
    assert "all 2 updates are done" in facts(again)["done"]
    assert next_commands(again) == next_commands(printed)

    do(score_dev)
    printed = do(score_train)
    said = facts(printed)
    assert list(said) == [
        "test", "device", "results", "data", "model", "answers", "scores", "judged", "done", "next",
    ]  # fmt: skip
    assert said["data"] == f"using {n} of {n} examples of {data}, at most 2 passages each"
    assert said["scores"] == str(runs / "reader_train" / "dataset_wscores.json")
    assert re.match(rf"{n} questions in 0:\d\d:\d\d: ", said["done"])

    (distil,) = next_commands(printed)
    dev = runs / "reader_dev" / "dataset_wscores.json"
    distil[distil.index("DEV_WSCORES.json")] = dev
    shape = reference / "legacy_retriever_mask_mean"
    tokenizer = ["--tokenizer", reference / "bert"]
    printed = do([*distil, "--model_path", shape, *tokenizer, *training])
    said = facts(printed)
    assert list(said)[:7] == [
        "train", "device", "results", "data", "dev data", "model", "updates",
    ]  # fmt: skip
    assert said["model"] == f"0.1M parameters, embeddings of size 32, from {shape}"
    assert re.match(r"2 updates in 0:\d\d:\d\d; the best loss on dev is", said["done"])

    (embed,) = next_commands(printed)
    embed[embed.index("PASSAGES.tsv")] = passages
    printed = do([*embed, "--num_shards", 3, "--shard_id", 2])
    said = facts(printed)
    assert list(said) == ["embed", "device", "results", "data", "model", "done", "next"]
    assert said["data"] == f"shard 2 of 3: 40 of 120 passages of {passages}"
    assert said["done"].endswith(f": {runs / 'reader_train_retriever' / 'embeddings' / 'wiki_02'}")
    for missing in ("2 of 3", "1 of 3"):
        assert missing in said["next"]
        (embed,) = next_commands(printed)
        printed = do(embed)
        said = facts(printed)

    (search,) = next_commands(printed)
    search[search.index("QUESTIONS.json")] = data
    search[search.index("RETRIEVED.json")] = folder / "retrieved.json"
    printed = do([*search, "--n-docs", 4])
    said = facts(printed)
    assert list(said) == [
        "retrieve", "device", "results", "data", "passages", "search", "retriever", "answers",
        "done", "next",
    ]  # fmt: skip
    assert said["data"] == f"{n} of {n} questions of {data}, 4 passages for each"
    assert re.match(
        r"120 embeddings of size 32 in 3 shards; exact search takes about [\d.]+ MB of memory$",
        said["search"],
    )
    train, answer = next_commands(printed)
    train[train.index("DEV_DATA.json")] = data
    answer[answer.index("READER")] = runs / "reader" / "checkpoint" / "best_dev"
    more = [*small, "--checkpoint_dir", runs]
    do([*train, *more, "--total_steps", 1, "--model_path", reference / "t5"])
    printed = do([*answer, *more, "--name", "last"])
    (look,) = next_commands(printed)
    do(look)
    assert (runs / "last" / "report.html").exists()


def test_a_test_that_keeps_nothing_says_how_to_keep_it(reference, tmp_path, do):
    command = ["python", "test_reader.py", "--eval_data", reference / "data.json", "--model_path",
               reference / "t5", "--text_maxlength", 48, "--generation_max_length", 4,
               "--checkpoint_dir", tmp_path, "--name", "run"]  # fmt: skip
    (keep,) = next_commands(do(command))
    do(keep)
    assert (tmp_path / "run" / "final_output.txt").exists()
    assert (tmp_path / "run" / "dataset_wscores.json").exists()


# ----------------------------------------------------------------------------------------------
# Bars and Ctrl-C


def many_questions(reference: Path, folder: Path, times: int) -> Path:
    file = folder / "many.jsonl"
    examples = json.loads(small_data(reference, folder).read_text()) * times
    lines = [json.dumps({**example, "id": str(n)}) for n, example in enumerate(examples)]
    file.write_text("\n".join(lines))
    return file


def assert_left_well(left: tuple[float, int, str], line: str) -> None:
    """Ctrl-C ended a script in time, with the line and nothing else but the bar that was there."""
    seconds, status, printed = left
    assert seconds < PROMISE, printed
    assert status == 128 + signal.SIGINT
    lines = [text for text in re.split(r"[\r\n]+", printed.replace("^C", "")) if text.strip()]
    assert re.search(line, lines[-1]), printed
    assert all("it/s" in text or "/s" in text for text in lines[:-1]), printed


def training(reference: Path, folder: Path, *more) -> list:
    data = reference / "data.json"
    return [
        "--train_data", data, "--eval_data", data, "--model_path", reference / "t5",
        "--n_context", 2, "--text_maxlength", 48, "--per_gpu_batch_size", 2,
        "--generation_max_length", 4, "--eval_freq", 1000, "--save_freq", 2,
        "--keep_checkpoints", 1, "--checkpoint_dir", folder, "--name", "run", *more,
    ]  # fmt: skip


def newest(folder: Path) -> Path:
    """The newest checkpoint, which opens."""
    path = (folder / "run" / "checkpoint" / "latest").resolve()
    assert len(load_file(path / "model.safetensors")) > 10
    return path


def test_training_on_a_terminal(reference, tmp_path, capsys):
    command = training(reference, tmp_path, "--total_steps", 100_000)
    terminal = Terminal("train_reader.py", *command)
    terminal.read(until="examples/s, loss")
    assert re.search(r"\d/100000 \[.* update/s", terminal.screen)
    assert "saved" in terminal.read(until="saved")
    left = terminal.press_ctrl_c()
    assert_left_well(left, r"^stopped by Ctrl-C; the same command resumes from .*/step-\d+$")
    step = int(re.search(r"resumes from .*/step-(\d+)", terminal.screen)[1])
    assert newest(tmp_path).name == f"step-{step}"
    # No line of the log is torn: each stands at the beginning of a line.
    for text in re.findall(r"[^\r\n]*saved /", terminal.screen):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d saved /", text), repr(text)
    train_reader.main([str(word) for word in [*command, "--total_steps", step + 1]])
    printed = capsys.readouterr().out
    assert f"resuming from {tmp_path}/run/checkpoint/step-{step}" in printed
    assert facts(printed)["done"].startswith("1 update in")


SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, train_reader
save = torch.save
def slow_save(state, path):
    save(state, path)
    if "step-4" in str(path):
        print("writing", path, flush=True)
        time.sleep(600)
torch.save = slow_save
train_reader.main(sys.argv[1:])
"""


def test_ctrl_c_while_a_checkpoint_is_written(reference, tmp_path, capsys):
    (tmp_path / "slow.py").write_text(SLOW)
    command = training(reference, tmp_path, "--total_steps", 100_000, "--eval_data", "none")
    terminal = Terminal(tmp_path / "slow.py", *command)
    terminal.read(until=f"writing {re.escape(str(tmp_path))}")
    left = terminal.press_ctrl_c()
    place = tmp_path / "run" / "checkpoint" / "step-2"
    assert_left_well(left, f"^stopped by Ctrl-C; the same command resumes from {place}$")
    assert newest(tmp_path) == place
    train_reader.main([str(word) for word in [*command, "--total_steps", 3]])
    assert f"resuming from {place}" in capsys.readouterr().out
    assert newest(tmp_path).name == "step-3"
    assert not list(place.parent.glob(".*"))


def test_ctrl_c_in_testing(reference, tmp_path, capsys):
    data = many_questions(reference, tmp_path, 40)
    command = [
        "--eval_data", data, "--model_path", reference / "t5", "--text_maxlength", 48,
        "--per_gpu_batch_size", 4, "--generation_max_length", 4, "--write_results",
        "--checkpoint_dir", tmp_path, "--name", "run",
    ]  # fmt: skip
    terminal = Terminal("test_reader.py", *command)
    terminal.read(until=r"[1-9]\d*/\d+ \[.* batch/s\]")
    left = terminal.press_ctrl_c()
    assert_left_well(
        left, "^stopped by Ctrl-C; the same command resumes after the last finished batch$"
    )
    assert not (tmp_path / "run" / "final_output.txt").exists()
    test_reader.main([str(word) for word in command])
    assert re.search(r"resuming after [1-9]\d* of", capsys.readouterr().out)
    lines = (tmp_path / "run" / "final_output.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(n) for n in range(len(lines))]
    assert len(lines) == len(data.read_text().splitlines())


def many_passages(reference: Path, folder: Path, times: int) -> Path:
    file = folder / "passages.tsv"
    header, *rows = (reference / "passages.tsv").read_text().splitlines()
    texts = [row.split("\t", 1)[1] for row in rows] * times
    file.write_text("\n".join([header, *(f"{n}\t{text}" for n, text in enumerate(texts))]))
    return file


def test_ctrl_c_in_embedding_and_in_retrieval(reference, tmp_path, capsys):
    passages = many_passages(reference, tmp_path, 100)
    model = ["--model_path", reference / "legacy_retriever_mask_mean"]
    model += ["--tokenizer", reference / "bert"]
    command = [*model, "--passages", passages, "--output_path", tmp_path / "x"]
    terminal = Terminal("generate_passage_embeddings.py", *command)
    terminal.read(until=" 2048/")
    line = "^stopped by Ctrl-C; the same command resumes after the last finished block$"
    assert_left_well(terminal.press_ctrl_c(), line)
    assert not (tmp_path / "x_00").exists()
    generate_passage_embeddings.main([str(word) for word in command])
    assert "resuming after" in capsys.readouterr().out

    data = many_questions(reference, tmp_path, 100)
    command = [*model, "--passages", passages, "--passages_embeddings", tmp_path / "x_00"]
    command += ["--data", data, "--output_path", tmp_path / "out.json", "--n-docs", 5]
    terminal = Terminal("passage_retrieval.py", *command)
    terminal.read(until=" search ")
    left = terminal.press_ctrl_c()
    assert_left_well(left, "^stopped by Ctrl-C; the same command starts again$")
    assert not list(tmp_path.glob("*out.json*"))
    passage_retrieval.main([str(word) for word in command])
    assert (tmp_path / "out.json").exists()


def test_ctrl_c_under_torchrun(reference, tmp_path):
    """torchrun says what it likes, and we one line."""
    command = training(reference, tmp_path, "--total_steps", 100_000)
    terminal = Terminal("train_reader.py", *command, processes=2)
    terminal.read(until="saved")
    seconds, status, printed = terminal.press_ctrl_c()
    assert seconds < 3 * PROMISE  # torchrun has its own way out
    assert status != 0
    (step,) = re.findall(r"stopped by Ctrl-C; the same command resumes from .*/step-(\d+)", printed)
    assert len(re.findall("stopped by", terminal.screen)) == 1
    assert "error" not in re.sub("torch/.*", "", printed)
    assert newest(tmp_path).name == f"step-{step}"


WAITS = {  # what a script does when Ctrl-C comes, and what the line says
    "by itself": ("ready(); time.sleep(600)", "starts again"),
    "in a loop": ("on_interrupt(lambda: 'resumes'); ready(); time.sleep(600)", "resumes"),
    # The first Ctrl-C unwinds, to where the script waits for something else.
    "while it cleans up": ("""
    try: ready(); time.sleep(600)
    finally: ready(); time.sleep(600)""", "starts again"),
    # Another process, which had it first, has gone: our own Ctrl-C comes with that error.
    "with an error": ("""
    try: ready(); time.sleep(600)
    except KeyboardInterrupt: signal.raise_signal(signal.SIGINT); raise RuntimeError
    """, "starts again"),
    "with processes": ("""
    for _ in range(2): multiprocessing.Process(target=time.sleep, args=(600,)).start()
    ready(); time.sleep(600)""", "starts again"),
}  # fmt: skip


@pytest.mark.parametrize("case", WAITS)
def test_ctrl_c_without_a_terminal(case, tmp_path):
    does, line = WAITS[case]
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from src.runtime.errors import on_interrupt, reports_input_errors\n"
        "def ready():\n"
        "    print('ready', flush=True)\n"
        "@reports_input_errors\n"
        "def main():\n"
        f"    {does}\n"
        "main()\n"
    )
    process = subprocess.Popen(
        # (Tests can be run in the background, where shells have Ctrl-C ignored.)
        ["env", "--default-signal", sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(does.count("ready")):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # until no child has its output open any more
    assert process.returncode == 128 + signal.SIGINT
    assert errors == f"stopped by Ctrl-C; the same command {line}\n"


@pytest.mark.parametrize(
    ("does", "status"),
    [
        ("print('a result')", 141),
        ("print('a result', flush=True)", 141),
        ("from src import options; options.test_reader_parser().parse_args(['--help'])", 141),
        # A run goes on.
        ("from src.training.metrics import start_log; start_log(None).info('said')", 0),
        ("print('a result'); raise InputError('x.json: empty')", 2),
    ],
)
def test_output_that_nobody_reads(does, status, tmp_path):
    script, done = tmp_path / "script.py", tmp_path / "done"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from src.runtime.errors import InputError, reports_input_errors\n"
        "@reports_input_errors\n"
        "def main():\n"
        f"    {does}\n"
        f"    open({str(done)!r}, 'w')\n"
        "main()\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, script],
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.PIPE,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        text=True,
        check=False,
    )
    os.close(writing)
    assert process.returncode == status
    assert done.exists() == ("log" in does or does == "print('a result')")
    assert process.stderr == ("error: x.json: empty\n" if status == 2 else "")


def test_a_bar_shows_rate_and_time_left_on_a_terminal_alone(monkeypatch, capsys):
    from src.runtime.terminal import passing_bar, progress_bar

    for shown in (False, True):
        monkeypatch.setattr("src.runtime.terminal.has_bars", lambda shown=shown: shown)
        with progress_bar(10, "update") as bar:
            bar.update(5)
            bar.refresh()
        printed = capsys.readouterr().err
        assert bool(re.search(r"5/10 \[00:00<\S+ +\S+ update/s\]", printed)) == shown
        with passing_bar(10, "B", "opening") as bar:  # done within its second: never seen
            bar.update(10)
        assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------------
# --help


PARSERS = [make for name, make in vars(all_options).items() if name.endswith("_parser")]


@pytest.mark.parametrize("make", PARSERS)
def test_help_fits_a_terminal_and_shows_every_default(make, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    text = make().format_help()
    assert re.match(r"usage: python (script\.py|-m src\.tools\.\w+) ", text)
    assert max(map(len, text.splitlines())) <= 80
    groups = dict(re.findall(r"^([^\s].*):\n((?:  .*\n)+)", text, re.M))
    assert " ".join(groups.pop("options").split()) == "-h, --help show this help message and exit"
    for name, group in groups.items():
        entries = re.split(r"^  (?=\S)", group, flags=re.M)[1:]
        assert entries, name
        for entry in entries:
            if entry.startswith("-"):
                assert re.search(r"\((new,\s+)?(default:\s+\S.*|needed)\)$", entry, re.S), entry


def test_help_says_what_is_new():
    text = " ".join(all_options.train_reader_parser().format_help().split())
    assert "beams in generation (1: greedy) (new, default: 1)" in text
    assert "learning rate (default: 0.0001)" in text
    assert "random seed (default: 0)" in text
