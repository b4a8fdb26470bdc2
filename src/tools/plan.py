"""What a command needs and produces, computed from shapes alone: `--plan` of all scripts.

    python train_reader.py --model_size large --n_context 100 --plan H100-80GB:8
    python -m src.tools.plan H100-80GB:8        # a table: what NaturalQuestions takes

No weight is loaded, and no data file is read to its end. Memory is for passages of full length, an
upper bound; time, for passages as long as they usually are. Sizes are in bytes; a GB is 10^9.
"""

import argparse
import os
import time
from typing import Any, NamedTuple

from src import options as options_of
from src.runtime.errors import InputError, reports_input_errors
from src.runtime.launch import detect_launch
from src.runtime.terminal import count, duration, size
from src.tools import footprint
from src.tools.footprint import ANSWER, RUNTIME, Device, Memory, Options

DEVICES = {  # GB; TFLOP/s of dense products in bf16 (V100: fp16) and fp32 (NVIDIA's data sheets)
    "A100-40GB": (40, 312, 19.5),
    "A100-80GB": (80, 312, 19.5),
    "H100-80GB": (80, 989, 67),
    "H200": (141, 989, 67),
    "L40S": (48, 362, 91.6),
    "V100-32GB": (32, 125, 15.7),
}
SHARE = {"cuda": 0.25, "cpu": 0.6}  # of the peak: an assumption, and as bench/RESULTS.md has it
FILL = 0.68  # of a passage's maximum length, in NaturalQuestions: 170 of 250 tokens
WIKIPEDIA, NQ_TEST = 21_015_324, 3_610  # passages, questions: assumed where a file is missing


class Plan(NamedTuple):
    """`disk` in bytes by what takes it."""

    title: str
    memory: Memory
    total: float
    seconds: float
    work: str
    disk: dict[str, float]


def find_device(text: str) -> Device:
    """`NAME[:N]`, `GB,TFLOPs[:N]`, or `this` machine's. Errors: `InputError` for anything else."""
    name, _, n = text.partition(":")
    processes = detect_launch(os.environ).world_size
    if text == "this":
        return _this_device()._replace(n=processes)
    try:
        gigabytes, half, *full = DEVICES.get(name) or map(float, name.split(","))
        flops = half * 1e12, (full or [half / 8])[0] * 1e12
        device = Device(name, gigabytes * 1e9, flops, n=int(n or processes))
        if len(full) > 1 or not min(device.n, device.memory, *flops) > 0:
            raise ValueError
    except ValueError:
        raise InputError(
            f"--plan {text}: give one of {', '.join(DEVICES)}, or GB,TFLOPs such as 80,989; "
            "followed by :8 for eight of them"
        ) from None
    return device


def _this_device() -> Device:
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        alike = (v for name, v in DEVICES.items() if name.split("-")[0] in found.name)
        _, half, full = next(alike, DEVICES["A100-40GB"])
        return Device(found.name, found.total_memory, (half * 1e12, full * 1e12))
    matrix = torch.randn(1024, 1024)
    for _ in range(2):  # the second time counts
        started = time.perf_counter()
        matrix @ matrix
        peak = 2 * 1024**3 / (time.perf_counter() - started)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory, (peak, peak), "cpu")


# ----------------------------------------------------------------------------------------------
# Plans: a planner returns a plan's fields, with operations instead of seconds


def _precision(options: Options, device: Device) -> str:
    """As `resolve_precision` and `--no_fp16` have it."""
    on_gpu = device.kind == "cuda"
    if not hasattr(options, "precision"):
        return "fp16" if on_gpu and not options.no_fp16 else "fp32"
    auto = "bf16" if on_gpu and not device.name.startswith("V100") else "fp32"
    return auto if options.precision == "auto" else options.precision


def plan(options: Options, device: Device) -> Plan:
    """The plan of the command with these options."""
    planners = {"train_data": _training, "num_shards": _embedding, "n_docs": _search}
    planner = next((p for name, p in planners.items() if hasattr(options, name)), _answering)
    precision = _precision(options, device)
    title, memory, flops, work, disk = planner(options, device, precision)
    memory["Python, PyTorch"] = RUNTIME[device.kind]
    all_devices = device.n * SHARE[device.kind] * device.flops[precision == "fp32"]
    return Plan(title, memory, sum(memory.values()), flops / all_devices, work, disk)


def _training(options: Options, device: Device, precision: str) -> tuple:
    N, kind = options.n_context, "reader" if hasattr(options, "model_size") else "retriever"
    s = getattr(footprint, f"{kind}_shape")(options)
    questions = options.total_steps * options.accumulation_steps * device.n
    questions *= options.per_gpu_batch_size
    if kind == "reader":
        W, T = FILL * options.text_maxlength, max(options.answer_maxlength, ANSWER // 2)
        each = footprint.encoder_flops(s, N, W) + footprint.decoder_flops(s, 1, N * W, T)
    else:
        W, Q = FILL * (options.passage_maxlength or 200), (options.question_maxlength or 40) / 2
        each = footprint.retriever_flops(s, N, W) + footprint.retriever_flops(s, 1, Q)
    each *= 4 if getattr(options, "use_checkpoint", False) else 3
    periodic = -(-options.total_steps // options.save_freq)
    kept = min(periodic, options.keep_checkpoints or periodic) + (options.eval_data != "none")
    checkpoint = 12 * s.parameters
    disk = {f"for {count(kept, 'checkpoint')} of {size(checkpoint)}": kept * checkpoint}
    work = f"{each / 1e12:.3g} TFLOP for each of {count(questions, 'question')}; plus evaluations"
    title = f"train a {kind} of {s.parameters / 1e6:.1f}M parameters in {precision}"
    memory = footprint.training_memory(s, options, device, precision)
    return title, memory, each * questions, work, disk


def _answering(options: Options, device: Device, precision: str) -> tuple:
    s, N, W = footprint.reader_shape(options), options.n_context, FILL * options.text_maxlength
    each = footprint.encoder_flops(s, N, W) + footprint.decoding_flops(s, 1, N * W, ANSWER // 2)
    n, questions = _estimate(options.eval_data, b'"question"', NQ_TEST, "question")
    work = f"{each / 1e12:.3g} TFLOP for each of {questions}; plus waiting between tokens"
    title = f"answer with a reader of {s.parameters / 1e6:.1f}M parameters in {precision}"
    memory = footprint.answering_memory(s, options, device, precision)
    disk = {"for answers": n * 30.0}
    if options.write_crossattention_scores:
        disk["for passages with scores"] = n * N * 650.0
    return title, memory, each * n, work, disk


def _embedding(options: Options, device: Device, precision: str) -> tuple:
    s, W = footprint.retriever_shape(options), options.passage_maxlength or 200
    n, passages = _estimate(options.passages, b"\n", WIKIPEDIA, "passage")
    each, n = footprint.retriever_flops(s, 1, FILL * W), n // options.num_shards
    work = f"{each / 1e9:.3g} GFLOP for each of {n:,} of {passages}"
    title = f"embed with a retriever of {s.parameters / 1e6:.1f}M parameters in {precision}"
    memory = footprint.embedding_memory(s, options.per_gpu_batch_size * W, precision)
    disk = {"for embeddings": n * (s.embedding * (4 if precision == "fp32" else 2) + 8)}
    return title, memory, each * n, work, disk


def _search(options: Options, device: Device, precision: str) -> tuple:
    from src.search.faiss_index import expected_memory

    search = options_of.select(options_of.SearchOptions, options)
    questions, how = _estimate(options.data, b'"question"', NQ_TEST, "question")
    rows, passages = _estimate(options.passages, b"\n", WIKIPEDIA, "passage")
    disk = {"for passages found": questions * options.n_docs * 700.0}
    if options.bm25:  # as bench/RESULTS.md has it
        memory = {"index": 1730.0 * rows}
        return "search with BM25", memory, 0, f"building the index of {passages}", disk
    s, block = footprint.retriever_shape(options), options.indexing_batch_size
    memory = footprint.embedding_memory(s, options.per_gpu_batch_size * 40, precision)
    if device.kind == "cuda" and not search.factory:  # as src/search/gpu.py reserves it
        memory["blocks"] = 16.0 * 2**27 + 2 * s.embedding * 8 * min(rows, block)
        if sum(memory.values()) + 2 * s.embedding * rows < 0.9 * (device.memory - RUNTIME["cuda"]):
            memory["embeddings"] = 2 * s.embedding * rows
    else:
        needed = expected_memory(rows, s.embedding, block, search.factory)
        if search.factory:  # which exact search is compared with
            needed += expected_memory(rows, s.embedding, block)
        memory["index" if search.factory else "blocks"] = needed
    # The collection's row offsets and ids; scores and positions found, and what merges them.
    memory["results"] = 24 * rows + questions * (3 * 12 * options.n_docs + 8 * s.embedding)
    flops = 2 * questions * (rows * s.embedding + s.parameters * 20)
    work = f"{how} in {passages}, embeddings of size {s.embedding}"
    return f"{search.factory or 'exact'} search", memory, flops, work, disk


def _estimate(path: str, mark: bytes, otherwise: int, unit: str) -> tuple[int, str]:
    """How often a file has a mark, by its first megabytes; and that in words."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 23)
            n = round(head.count(mark) * os.fstat(file.fileno()).st_size / max(1, len(head)))
            return n, f"about {count(n, unit)}"
    except OSError:
        return otherwise, f"{count(otherwise, unit)} (assumed: {path} cannot be read)"


def lines(options: Options) -> list[str]:
    """A command's plan as it is printed."""
    device = find_device(options.plan)
    found, precision = plan(options, device), _precision(options, device)
    peak = f"{SHARE[device.kind]:.0%} of {device.flops[precision == 'fp32'] / 1e12:.3g} TFLOP/s"
    facts = [("plan", f"{found.title}, on {device.n} x {device.name}")]
    facts += [("memory", f"{size(found.total)} of {size(device.memory)} in each process:")]
    facts += [("", f"{size(value):>8} {name}") for name, value in found.memory.items()]
    facts += [("time", f"{duration(max(1, found.seconds))} at {peak}: {found.work}")]
    facts += [("disk", ", ".join(f"{size(value)} {name}" for name, value in found.disk.items()))]
    if found.total <= device.memory:
        facts += [("fits", "yes")]
    else:
        others = fitting(options, device)
        facts += [("fits", f"no; it would with {' or '.join(others)}" if others else "no")]
    return [f"{name:<10} {text}" for name, text in facts]


def fitting(options: Options, device: Device) -> list[str]:
    """Changes, in words, with which a command fits: up to three, the smallest ones first."""
    has, B = vars(options), options.per_gpu_batch_size
    changes: list[dict[str, Any]] = [{}]
    for n in (n for n in (B // 2, B // 4, B // 8) if n):
        more = {"accumulation_steps": options.accumulation_steps * B // n} if "lr" in has else {}
        changes += [{"per_gpu_batch_size": n} | more]
    for name in (name for name in ("use_checkpoint", "shard") if has.get(name) is False):
        changes += [{name: True} | values for values in changes]
    if "n_docs" in has:
        changes = [{"indexing_batch_size": n} for n in (20_000, 5_000)]
        changes += [{"index_factory": factory} for factory in ("IVF4096,PQ64", "PQ64")]
    texts = []
    for values in changes:
        changed = argparse.Namespace(**has | values)
        is_shared = getattr(changed, "shard", False)
        for n in [n for n in (device.n, 2, 4, 8, 16, 32) if n == device.n or is_shared]:
            total = plan(changed, device._replace(n=max(n, device.n))).total
            if total <= device.memory:
                words = [f"--{k}" if v is True else f"--{k} {v}" for k, v in values.items()]
                words += [f"on {n} devices"] if n > device.n else []
                texts += [f"{' '.join(words)} ({size(total)})"]
                break
    return texts[:3]


READING, TRAINING = "--n_context 100 --text_maxlength 250", "--accumulation_steps 8"
READER = f"{READING} {TRAINING} --answer_maxlength 32 --use_checkpoint"
BERT = "--passages - --model_path bert-base-uncased"
TABLE = [  # what NaturalQuestions takes: a name, the parser, options
    ("train a base reader", "train_reader", f"{READER} --total_steps 10000"),
    ("train a large one", "train_reader", f"{READER} --total_steps 15000 --model_size large"),
    ("train a 3b one", "train_reader", f"{READER} --total_steps 15000 --model_size 3b --shard"),
    ("train an 11b one", "train_reader", f"{READER} --total_steps 15000 --model_size 11b --shard"),
    ("score the test questions", "test_reader", f"{READING} --write_crossattention_scores"),
    ("train a retriever", "train_retriever", f"--n_context 100 {TRAINING} --total_steps 20000"),
    ("embed Wikipedia", "passage_embeddings", BERT),
    ("search in it", "passage_retrieval", f"{BERT} --output_path - --passages_embeddings -"),
]


def table(name: str) -> list[str]:
    """What NaturalQuestions takes on such devices, as Markdown."""
    device, rows = find_device(name), [f"| on {name} | time | memory | disk |", "|---|---|---|---|"]
    for what, parser, words in TABLE:
        found = plan(getattr(options_of, f"{parser}_parser")().parse_args(words.split()), device)
        memory = size(found.total) + ("" if found.total <= device.memory else ": does not fit")
        disk = size(sum(found.disk.values()))
        rows.append(f"| {what} | {duration(found.seconds)} | {memory} | {disk} |")
    return rows


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    print("\n".join(table(options_of.plan_parser().parse_args(arguments).device)))


if __name__ == "__main__":
    main()
