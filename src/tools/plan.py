"""What a command needs and produces, computed from shapes alone: `--plan` of all scripts.

    python train_reader.py --model_size large --n_context 100 --plan H100-80GB:8
    python -m src.tools.plan H100-80GB:8        # a table: what NaturalQuestions takes

No weight is loaded, and no data file is read to its end. Memory is for passages of full length, an
upper bound; time, for passages as long as they usually are. Sizes are in bytes; a GB is 10^9.

Shapes: B questions, N passages of each, W tokens of a passage, P tokens of all, S tokens of a
question's passages, T tokens of an answer; in `Shape`, D model size, A heads * head size, F
feed-forward size, H heads, V vocabulary.
"""

import argparse
import copy
import dataclasses
import itertools
import os
import sys
import time
from typing import Any

from src import options as options_of
from src.runtime.errors import InputError, process_number, reports_input_errors
from src.runtime.launch import detect_launch
from src.runtime.terminal import count, duration, size

T5 = {  # t5-SIZE: D, head size, F, layers, H (Raffel et al., 2020, section 3.7)
    "small": (512, 64, 2048, 6, 8),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 24, 16),
    "3b": (1024, 128, 16384, 24, 32),
    "11b": (1024, 128, 65536, 24, 128),
}
DEVICES = {  # GB; TFLOP/s of dense products in bf16 (V100: fp16) and fp32 (NVIDIA's data sheets)
    "A100-40GB": (40, 312, 19.5),
    "A100-80GB": (80, 312, 19.5),
    "H100-80GB": (80, 989, 67),
    "H200": (141, 989, 67),
    "L40S": (48, 362, 91.6),
    "V100-32GB": (32, 125, 15.7),
}
SHARE = {"cuda": 0.25, "cpu": 0.6}  # of the peak: an assumption, and as bench/RESULTS.md has it
RUNTIME = {"cuda": 0.8e9, "cpu": 0.45e9}  # Python and its libraries; on a GPU, CUDA's context
FILL = 0.68  # of a passage's maximum length, in NaturalQuestions: 170 of 250 tokens
WIKIPEDIA, NQ_TEST = 21_015_324, 3_610  # passages, questions: assumed where a file is missing
ANSWER = 16  # tokens, where --answer_maxlength sets none

Memory = dict[str, float]  # bytes by component


@dataclasses.dataclass(frozen=True)
class Device:
    """One of `n` equal devices; `flops` is the peak in half precision and in float32."""

    name: str
    memory: float
    flops: tuple[float, float]
    kind: str = "cuda"
    n: int = 1

    def seconds(self, flops: float, precision: str) -> float:
        """How long all devices take over this work together."""
        return flops / (self.n * SHARE[self.kind] * self.flops[precision == "fp32"])


@dataclasses.dataclass(frozen=True)
class Plan:
    """`disk` in bytes by what takes it."""

    title: str
    memory: Memory
    seconds: float
    work: str
    disk: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def parse_args(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> argparse.Namespace:
    """The options of a command; with --plan, print its plan instead, and end."""
    options = parser.parse_args(arguments)
    if options.plan is not None:
        text = "\n".join(lines(options))
        print(text if process_number() == "0" else "", end="\n" if process_number() == "0" else "")
        sys.exit(0)
    return options


def find_device(text: str) -> Device:
    """`NAME[:N]`, `GB,TFLOPs[:N]`, or `this` machine's. Errors: `InputError` for anything else."""
    name, _, n = text.partition(":")
    try:
        n_devices = int(n or detect_launch(os.environ).world_size)
        numbers = DEVICES.get(name) or [float(number) for number in name.split(",")]
        if name == "this":
            return dataclasses.replace(_this_device(), n=n_devices)
        gigabytes, half, *full = numbers
        device = Device(name, gigabytes * 1e9, (half * 1e12, (full or [half / 8])[0] * 1e12))
        if n_devices < 1 or len(full) > 1 or not min(device.memory, *device.flops) > 0:
            raise ValueError(text)
    except ValueError:
        if name == "this" and not n:
            return _this_device()
        known = ", ".join(DEVICES)
        raise InputError(
            f"--plan {text}: give one of {known}, or GB,TFLOPs such as 80,989, followed by :8 for "
            "eight of them"
        ) from None
    return dataclasses.replace(device, n=n_devices)


def _this_device() -> Device:
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        alike = [v for name, v in DEVICES.items() if name.split("-")[0] in found.name]
        _, half, full = alike[0] if alike else DEVICES["A100-40GB"]
        return Device(found.name, found.total_memory, (half * 1e12, full * 1e12))
    matrix = torch.randn(1024, 1024)
    for _ in range(2):  # the second time counts
        started = time.perf_counter()
        matrix @ matrix
        peak = 2 * 1024**3 / (time.perf_counter() - started)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory, (peak, peak), "cpu")


# ----------------------------------------------------------------------------------------------
# Shapes


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the formulas read of a model. Parameters are counted in the model itself, built on the
    meta device; `block` is the largest part that FSDP gathers at a time."""

    D: int
    A: int
    F: int
    H: int
    V: int
    layers: int
    parameters: int
    decoder_layers: int = 0
    decoder: int = 0  # parameters of its blocks
    block: int = 0
    gated: int = 0  # 1 where the feed-forward is
    embedding: int = 0  # size of a retriever's

    def layer_weights(self, attention: int = 4) -> int:
        return attention * self.D * self.A + (2 + self.gated) * self.D * self.F


def _path(options: argparse.Namespace, *names: str) -> str | None:
    paths = (getattr(options, name, "none") for name in names)
    return next((path for path in paths if path != "none"), None)


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def reader_shape(options: argparse.Namespace) -> Shape:
    import torch
    from transformers import T5Config

    from src.models.reader import family, reader_config

    D, head, F, layers, H = T5[options.model_size]
    path = _path(options, "model_path", "model_config")
    c = T5Config(d_model=D, d_kv=head, d_ff=F, num_layers=layers, num_heads=H)
    c = reader_config(path, None) if path else c
    with torch.device("meta"):
        t5 = family(c)(c)
    own_head = 0 if getattr(c, "scale_decoder_outputs", False) else c.vocab_size * c.d_model
    block = _size(t5.decoder.block[0])
    return Shape(
        c.d_model, c.num_heads * c.d_kv, c.d_ff, c.num_heads, c.vocab_size, c.num_layers,
        _size(t5) + own_head, c.num_decoder_layers, c.num_decoder_layers * block,
        max(block, c.vocab_size * c.d_model + own_head), int(c.is_gated_act),
    )  # fmt: skip


def retriever_shape(options: argparse.Namespace) -> Shape:
    import torch
    from transformers import BertConfig

    from src.models.pretrained import load_config
    from src.models.retriever import Retriever, RetrieverConfig

    path = _path(options, "model_path", "model_config", "retriever_model") or "bert-base-uncased"
    bert = BertConfig() if path == "bert-base-uncased" else load_config(path, "bert", "dpr")
    values = {name: value for name, value in bert.to_dict().items() if name != "model_type"}
    if not hasattr(bert, "indexing_dimension"):
        is_new = getattr(options, "model_path", "none") == "none"
        values["projection"] = is_new and not getattr(options, "no_projection", False)
        default = 768 if values["projection"] else bert.hidden_size
        values["indexing_dimension"] = getattr(options, "indexing_dimension", None) or default
    c = RetrieverConfig(**values)
    with torch.device("meta"):
        parameters = _size(Retriever(c))
    return Shape(
        c.hidden_size, c.hidden_size, c.intermediate_size, c.num_attention_heads, c.vocab_size,
        c.num_hidden_layers, parameters, block=c.vocab_size * c.hidden_size,
        embedding=c.indexing_dimension,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Work: 2 operations a weight and token, and attention's two products of all pairs of tokens (Kaplan
# et al., 2020, table 1). Backward takes twice what forward takes; --use_checkpoint adds a forward.


def encoder_flops(s: Shape, passages: float, W: float) -> float:
    return passages * W * s.layers * (2 * s.layer_weights() + 4 * W * s.A)


def decoder_flops(s: Shape, B: float, S: float, T: float) -> float:
    """Answers [B, T] in one pass, with keys and values of all S tokens."""
    layer = T * (2 * s.layer_weights(6) + 4 * (T + S) * s.A) + 4 * S * s.D * s.A
    return B * (s.decoder_layers * layer + 2 * T * s.D * s.V)


def decoding_flops(s: Shape, B: float, S: float, T: float) -> float:
    """Answers token by token, from the hidden states themselves (src/models/decoder.py)."""
    layer = 2 * s.layer_weights(8) + 4 * S * s.H * s.D
    return B * T * (s.decoder_layers * layer + 2 * s.D * s.V)


def retriever_flops(s: Shape, texts: float, W: float) -> float:
    """Embeddings of texts of W tokens."""
    return encoder_flops(s, texts, W) + 2 * texts * W * s.D * s.embedding


# ----------------------------------------------------------------------------------------------
# Memory: what autograd keeps of each operation in src/models/encoder.py and Transformers' blocks
# (as Korthikanti et al., 2022, section 4.1, count it), and what works on it.


@dataclasses.dataclass(frozen=True)
class Format:
    """Bytes of an `element` in products, of a dropout mask's, and of what is kept of each attention
    score: softmax, mask and their product on a CPU, nothing in a GPU's fused kernels."""

    element: int
    mask: int
    score: int

    @classmethod
    def of(cls, device: Device, precision: str, dropout: float) -> "Format":
        on_cpu = device.kind == "cpu"
        mask = (4 if on_cpu else 1) if dropout else 0
        return cls(4 if precision == "fp32" else 2, mask, (4 + 2 * mask) if on_cpu else 0)


def layer_bytes(s: Shape, f: Format, W: float, is_t5: bool) -> float:
    """What a block keeps of a token: input and output of both norms (of T5's on a CPU, also what is
    in between; in half precision, each product's copy), dropout masks, queries, keys, values and
    their mixture, scores, and feed-forward."""
    norms = 2 * (4 + f.element) + (8 if is_t5 and f.score else 0) + (6 if f.element == 2 else 0)
    # ReLU keeps its result, GELU its input and, in Transformers' own, four steps on the way.
    wide = (7 if s.gated else 1 + bool(f.mask)) * f.element + f.mask if is_t5 else 2 * f.element
    attention = s.A * (4 if f.score else 5) * f.element + s.H * W * f.score
    return s.D * (norms + 2 * f.mask) + attention + s.F * wide


def reader_activations(s: Shape, f: Format, options: argparse.Namespace) -> tuple[float, float]:
    """Kept at the end of the forward pass: of the encoder, and of everything."""
    B, N, W = options.per_gpu_batch_size, options.n_context, options.text_maxlength
    T = options.answer_maxlength if options.answer_maxlength > 0 else ANSWER
    P, states = B * N * W, B * N * W * s.D * 4
    block = P * layer_bytes(s, f, W, True)
    across = P * (2 * s.A * f.element + (2 * s.D * 2 if f.element == 2 else 0))
    across += B * T * (N * W * s.H * max(f.score, 1) + 2 * layer_bytes(s, f, T, True))
    logits = 3 * B * T * s.V * 4  # and their logarithms, and a gradient
    # Final norm, the states by question, and their gradient; the bias and its gradient.
    encoder = 5 * states + 3 * s.H * W * W * 4
    if options.use_checkpoint:  # the inputs of blocks, and all of one block at a time
        encoder += s.layers * states + max(block, 3 * states)
        return encoder, encoder + across + logits - min(block, across)
    return (
        encoder + s.layers * block,
        encoder + s.layers * block + s.decoder_layers * across + logits,
    )


def training_memory(
    s: Shape, options: argparse.Namespace, device: Device, precision: str
) -> Memory:
    """Weights, gradients and Adam's two averages in float32 (Rajbhandari et al., 2020, section
    3.1), with --shard a share of each. A single process makes gradients while it frees activations;
    accumulation and DDP's buckets keep them."""
    f, B, N = (
        Format.of(device, precision, options.dropout),
        options.per_gpu_batch_size,
        options.n_context,
    )
    shards = device.n if options.shard else 1
    own = 4 * s.parameters / shards
    if is_reader(options):
        encoder, everything = reader_activations(s, f, options)
        late = 4 * (s.decoder + s.V * s.D) / shards  # gradients made before the encoder's
    else:
        W, Q = options.passage_maxlength or 200, options.question_maxlength or 40
        flash = f if f.mask or not f.score else dataclasses.replace(f, score=0)
        ends = s.D * (2 * 4 + f.mask) + (s.D + 2 * s.embedding) * 4  # embeddings and projection
        texts = ((B * N * W, W), (B * Q, Q))
        everything = sum(P * (s.layers * layer_bytes(s, flash, w, False) + ends) for P, w in texts)
        encoder = late = 0.0
    kept = options.accumulation_steps > 1 or (device.n > 1 and shards == 1)
    highest = max(everything + (own if kept else 0), encoder + (own if kept else late), own)
    found = {"weights": own, "gradients": own, "optimizer": 2 * own, "activations": highest - own}
    if shards > 1:  # a block at work, the next one on its way, and a gradient
        found["gathered weights"] = 3 * s.block * f.element
    return found | {"Python, PyTorch": RUNTIME[device.kind]}


def answering_memory(
    s: Shape, options: argparse.Namespace, device: Device, precision: str
) -> Memory:
    """The reader, the decoder's layout, and one encoder block at work."""
    e = 4 if precision == "fp32" else 2
    P = options.per_gpu_batch_size * options.n_context * options.text_maxlength
    on_cpu = s.D * ((3 * s.A + (1 + s.gated) * s.F) * s.decoder_layers + s.V) * 4
    work = P * (4 * s.D * 4 + (4 * s.A + (1 + s.gated) * s.F) * e)
    weights = 4 * s.parameters / (device.n if options.shard else 1)
    found = {"weights": weights, "decoding": on_cpu if device.kind == "cpu" else s.decoder * e}
    return found | {"activations": work, "Python, PyTorch": RUNTIME[device.kind]}


def embedding_memory(s: Shape, tokens: float, device: Device, precision: str) -> Memory:
    """The retriever, and one of its blocks at work on a batch of so many tokens."""
    e = 4 if precision == "fp32" else 2
    found = {"weights": e * s.parameters, "activations": tokens * (4 * s.D + 2 * s.F) * e}
    return found | {"Python, PyTorch": RUNTIME[device.kind]}


# ----------------------------------------------------------------------------------------------
# Plans


def is_reader(options: argparse.Namespace) -> bool:
    return hasattr(options, "model_size")


def _precision(options: argparse.Namespace, device: Device) -> str:
    """As `resolve_precision` and `--no_fp16` have it."""
    on_gpu = device.kind == "cuda"
    if not hasattr(options, "precision"):
        return "fp16" if on_gpu and not options.no_fp16 else "fp32"
    auto = "bf16" if on_gpu and not device.name.startswith("V100") else "fp32"
    return auto if options.precision == "auto" else options.precision


def plan(options: argparse.Namespace, device: Device) -> Plan:
    """The plan of the command with these options."""
    planners = {"train_data": _training, "num_shards": _embedding, "n_docs": _search}
    found = next((p for name, p in planners.items() if hasattr(options, name)), _answering)
    return found(options, device, _precision(options, device))


def _training(options: argparse.Namespace, device: Device, precision: str) -> Plan:
    N, kind = options.n_context, "reader" if is_reader(options) else "retriever"
    s = reader_shape(options) if is_reader(options) else retriever_shape(options)
    questions = options.total_steps * options.accumulation_steps * device.n
    questions *= options.per_gpu_batch_size
    if is_reader(options):
        W, T = FILL * options.text_maxlength, max(options.answer_maxlength, ANSWER // 2)
        each = encoder_flops(s, N, W) + decoder_flops(s, 1, N * W, T)
    else:
        W, Q = FILL * (options.passage_maxlength or 200), (options.question_maxlength or 40) / 2
        each = retriever_flops(s, N, W) + retriever_flops(s, 1, Q)
    each *= 4 if getattr(options, "use_checkpoint", False) else 3
    periodic = -(-options.total_steps // options.save_freq)
    kept = min(periodic, options.keep_checkpoints or periodic) + (options.eval_data != "none")
    checkpoint = 12 * s.parameters
    disk = {f"for {count(kept, 'checkpoint')} of {size(checkpoint)}": kept * checkpoint}
    work = f"{each / 1e12:.3g} TFLOP for each of {count(questions, 'question')}; plus evaluations"
    title = f"train a {kind} of {s.parameters / 1e6:.1f}M parameters in {precision}"
    memory = training_memory(s, options, device, precision)
    return Plan(title, memory, device.seconds(each * questions, precision), work, disk)


def _answering(options: argparse.Namespace, device: Device, precision: str) -> Plan:
    s, N, W = reader_shape(options), options.n_context, FILL * options.text_maxlength
    each = encoder_flops(s, N, W) + decoding_flops(s, 1, N * W, ANSWER // 2)
    n, questions = _estimate(options.eval_data, b'"question"', NQ_TEST, "question")
    work = f"{each / 1e12:.3g} TFLOP for each of {questions}; plus waiting between tokens"
    title = f"answer with a reader of {s.parameters / 1e6:.1f}M parameters in {precision}"
    memory = answering_memory(s, options, device, precision)
    disk = (
        {"for passages with scores": n * N * 650.0} if options.write_crossattention_scores else {}
    )
    disk |= {"for answers": n * 30.0}
    return Plan(title, memory, device.seconds(each * n, precision), work, disk)


def _embedding(options: argparse.Namespace, device: Device, precision: str) -> Plan:
    s, W = retriever_shape(options), options.passage_maxlength or 200
    n, passages = _estimate(options.passages, b"\n", WIKIPEDIA, "passage")
    each, n = retriever_flops(s, 1, FILL * W), n // options.num_shards
    work = f"{each / 1e9:.3g} GFLOP for each of {n:,} of {passages}"
    title = f"embed with a retriever of {s.parameters / 1e6:.1f}M parameters in {precision}"
    memory = embedding_memory(s, options.per_gpu_batch_size * W, device, precision)
    disk = {"for embeddings": n * (s.embedding * (4 if precision == "fp32" else 2) + 8)}
    return Plan(title, memory, device.seconds(each * n, precision), work, disk)


def _search(options: argparse.Namespace, device: Device, precision: str) -> Plan:
    from src.search.faiss_index import expected_memory

    search = options_of.select(options_of.SearchOptions, options)
    questions, how = _estimate(options.data, b'"question"', NQ_TEST, "question")
    rows, passages = _estimate(options.passages, b"\n", WIKIPEDIA, "passage")
    disk = {"for passages found": questions * options.n_docs * 700.0}
    if options.bm25:  # as bench/RESULTS.md has it
        index = {"index": 3400.0 * rows, "Python, PyTorch": RUNTIME["cpu"]}
        return Plan("search with BM25", index, 1, f"building the index of {passages}", disk)
    s, block = retriever_shape(options), options.indexing_batch_size
    memory = embedding_memory(s, options.per_gpu_batch_size * 40, device, precision)
    if device.kind == "cuda" and not search.factory:  # as src/search/gpu.py reserves it
        memory["blocks"] = 16.0 * 2**27 + 2 * s.embedding * 8 * min(rows, block)
        if sum(memory.values()) + 2 * s.embedding * rows < 0.9 * device.memory:
            memory["embeddings"] = 2 * s.embedding * rows
    else:
        memory["index" if search.factory else "blocks"] = expected_memory(
            rows, s.embedding, block, search.factory
        )
    # The collection's row offsets and ids; scores and positions found, and what merges them.
    memory["results"] = 24 * rows + questions * (3 * 12 * options.n_docs + 8 * s.embedding)
    flops = 2 * questions * (rows * s.embedding + s.parameters * 20)
    work = f"{how} in {passages}, embeddings of size {s.embedding}"
    title = f"{search.factory or 'exact'} search"
    return Plan(title, memory, device.seconds(flops, precision), work, disk)


def _estimate(path: str, mark: bytes, otherwise: int, unit: str) -> tuple[int, str]:
    """How often a file has a mark, by its first megabytes; and that in words."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 23)
            n = round(head.count(mark) * os.fstat(file.fileno()).st_size / max(1, len(head)))
            return n, f"about {count(n, unit)}"
    except OSError:
        return otherwise, f"{count(otherwise, unit)} (assumed: {path} cannot be read)"


def lines(options: argparse.Namespace) -> list[str]:
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


def fitting(options: argparse.Namespace, device: Device, at_most: int = 3) -> list[str]:
    """Changes, in words, with which a command fits: the smallest ones first."""
    B, has = getattr(options, "per_gpu_batch_size", 1), vars(options)
    smaller: list[dict[str, Any]] = [{}]
    for n in (B // 2, B // 4, B // 8):
        more = (
            {"accumulation_steps": options.accumulation_steps * B // n} if n and "lr" in has else {}
        )
        smaller += [{"per_gpu_batch_size": n} | more] if n else []
    switches = [name for name in ("use_checkpoint", "shard") if has.get(name) is False]
    chosen = (itertools.combinations(switches, n) for n in range(len(switches) + 1))
    changes = [
        dict.fromkeys(names, True) | some for names in itertools.chain(*chosen) for some in smaller
    ]
    if "n_docs" in has:
        changes = [{"indexing_batch_size": n} for n in (20_000, 5_000)]
        changes += [{"index_factory": factory} for factory in ("IVF4096,PQ64", "PQ64")]
    texts: list[str] = []
    for values in changes:
        shards = values.get("shard") or has.get("shard")
        for n in (
            [n for n in (device.n, 2, 4, 8, 16, 32) if n >= device.n] if shards else [device.n]
        ):
            changed = copy.copy(options)
            vars(changed).update(values)
            total = plan(changed, dataclasses.replace(device, n=n)).total
            if total <= device.memory and len(texts) < at_most:
                words = [f"--{k}" if v is True else f"--{k} {v}" for k, v in values.items()]
                words += [f"on {n} devices"] if n != device.n else []
                texts.append(f"{' '.join(words)} ({size(total)})")
                break
    return texts


def table(name: str) -> list[str]:
    """What NaturalQuestions takes on such devices, as Markdown."""
    reading = "--n_context 100 --text_maxlength 250"
    training = f"{reading} --accumulation_steps 8 --answer_maxlength 32 --use_checkpoint"
    commands = {
        f"train a {size_} reader": (options_of.train_reader_parser,
                                    f"{training} --model_size {size_} --total_steps {steps}{more}")
        for size_, steps, more in (("base", 10000, ""), ("large", 15000, ""),
                                   ("3b", 15000, " --shard"), ("11b", 15000, " --shard"))
    }  # fmt: skip
    bert = "--passages - --model_path bert-base-uncased"
    commands |= {
        "answer and score the test questions": (
            options_of.test_reader_parser, f"{reading} --write_crossattention_scores"),
        "train a retriever": (options_of.train_retriever_parser,
                              "--n_context 100 --accumulation_steps 8 --total_steps 20000"),
        "embed Wikipedia": (options_of.passage_embeddings_parser, bert),
        "search in it": (options_of.passage_retrieval_parser,
                         f"{bert} --output_path - --passages_embeddings -"),
    }  # fmt: skip
    device, rows = find_device(name), [f"| on {name} | time | memory | disk |", "|---|---|---|---|"]
    for what, (make_parser, words) in commands.items():
        found = plan(make_parser().parse_args(words.split()), device)
        memory = size(found.total) + ("" if found.total <= device.memory else ": does not fit")
        disk = size(sum(found.disk.values()))
        rows.append(f"| {what} | {duration(found.seconds)} | {memory} | {disk} |")
    return rows


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    print("\n".join(table(options_of.plan_parser().parse_args(arguments).device)))


if __name__ == "__main__":
    main()
