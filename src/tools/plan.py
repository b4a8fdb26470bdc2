"""What a command needs and produces, computed from shapes alone: `python SCRIPT.py ... --plan`.

    python train_reader.py --model_size large --n_context 100 --text_maxlength 250 --plan H100-80GB:8
    python -m src.tools.plan H100-80GB        # what NaturalQuestions takes: the table in the README

No weight is loaded and no data file is read to its end. Memory is for passages of the full
`text_maxlength`, so it is an upper bound; time is for passages as long as they usually are. Sizes
are in bytes, and GB are 10^9 of them.

Shapes: B questions, N passages of each, W tokens of a passage, P tokens in all, T tokens of an
answer; D model size, H heads, A = H * head size, F feed-forward size, V vocabulary.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.options import SearchOptions, _Parser, select
from src.runtime.errors import InputError, process_number, reports_input_errors
from src.runtime.launch import detect_launch
from src.runtime.terminal import count, duration, size

T5 = {  # the shapes of t5-SIZE: D, head size, F, layers, H (Raffel et al., 2020, section 3.7)
    "small": (512, 64, 2048, 6, 8),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 24, 16),
    "3b": (1024, 128, 16384, 24, 32),
    "11b": (1024, 128, 65536, 24, 128),
}
DEVICES = {  # GB, and TFLOP/s of dense products in bf16 (V100: fp16) and fp32: NVIDIA's data sheets
    "A100-40GB": (40, 312, 19.5),
    "A100-80GB": (80, 312, 19.5),
    "H100-80GB": (80, 989, 67),
    "H200": (141, 989, 67),
    "L40S": (48, 362, 91.6),
    "V100-32GB": (32, 125, 15.7),
}
SHARE = {"cuda": 0.25, "cpu": 0.6}  # of peak, in training: the estimate of, and as measured here
RUNTIME = {"cuda": 0.8e9, "cpu": 0.42e9}  # Python, libraries, and a CUDA context
FILL = 0.68  # real tokens of a NaturalQuestions passage, of 250
WIKIPEDIA, NQ_TRAIN, NQ_TEST = 21_015_324, 79_168, 3_610
ANSWER = 16  # tokens of a long answer, where --answer_maxlength sets none


@dataclasses.dataclass(frozen=True)
class Device:
    """One of `n` equal devices."""

    name: str
    memory: float
    flops: dict[str, float]  # peak operations a second, by number format
    kind: str = "cuda"
    n: int = 1

    def seconds(self, flops: float, precision: str) -> float:
        """How long all devices take over this work together."""
        return flops / (self.n * SHARE[self.kind] * self.flops[precision])


def parse_args(parser: _Parser, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command; with --plan, print the plan instead, and end."""
    options = parser.parse_args(arguments)
    if getattr(options, "plan", None) is not None:
        if process_number() == "0":
            print("\n".join(lines(options)))
        sys.exit(0)
    return options


def find_device(text: str) -> Device:
    """`NAME[:N]`, `GB,TFLOPs[:N]`, or `this` machine's. Errors: `InputError` for another name."""
    name, _, n = text.partition(":")
    if n and not (n.isdigit() and int(n)):
        raise InputError(f"--plan {text}: {n!r} is not a number of devices; give NAME:8, say")
    processes = int(n or detect_launch(os.environ).world_size)
    if name == "this":
        return dataclasses.replace(_this_device(), n=processes)
    numbers = [part for part in name.split(",") if part.replace(".", "", 1).isdigit()]
    if name in DEVICES or (len(numbers) == 2 and name.count(",") == 1):
        gigabytes, half, full = DEVICES.get(name) or (*map(float, numbers), float(numbers[1]) / 8)
        flops = {"bf16": half * 1e12, "fp16": half * 1e12, "fp32": full * 1e12}
        return Device(name, gigabytes * 1e9, flops, n=processes)
    known = ", ".join(DEVICES)
    raise InputError(f"--plan {text}: give one of {known}, or its GB,TFLOPs such as 80,989")


def _this_device() -> Device:
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        known = [values for name, values in DEVICES.items() if name.split("-")[0] in found.name]
        _, half, full = known[0] if known else DEVICES["A100-40GB"]
        flops = {"bf16": half * 1e12, "fp16": half * 1e12, "fp32": full * 1e12}
        return Device(found.name, found.total_memory, flops)
    matrix = torch.randn(1024, 1024)
    torch.mm(matrix, matrix)
    started = time.perf_counter()
    for _ in range(4):
        torch.mm(matrix, matrix)
    peak = 4 * 2 * 1024**3 / (time.perf_counter() - started)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory, dict.fromkeys(("fp32", "bf16", "fp16"), peak), "cpu")


# ----------------------------------------------------------------------------------------------
# Shapes


@dataclasses.dataclass(frozen=True)
class Shape:
    """What formulas read of a model. `parameters` are counted in the module itself, built on the
    meta device; `largest` are those that FSDP gathers at a time."""

    D: int
    A: int
    F: int
    H: int
    V: int
    layers: int
    decoder_layers: int
    gated: int  # 1 where the feed-forward is, else 0
    tied: bool
    parameters: int
    decoder: int
    largest: int
    projection: int = 0  # a retriever's embedding size, or 0


def reader_shape(options: argparse.Namespace) -> Shape:
    import torch
    from transformers import T5Config

    from src.models.reader import family, reader_config

    path = next((p for p in (options.model_path, getattr(options, "model_config", "none"))
                 if p != "none"), None)  # fmt: skip
    if path is None:
        D, head, F, layers, H = T5[options.model_size]
        config = T5Config(d_model=D, d_kv=head, d_ff=F, num_layers=layers, num_heads=H)
    else:
        config = reader_config(path, None)
    with torch.device("meta"):
        t5 = family(config)(config)
    tied = getattr(config, "scale_decoder_outputs", False)
    sizes = _sizes(t5) + (0 if tied else config.vocab_size * config.d_model)
    return Shape(
        D=config.d_model, A=config.num_heads * config.d_kv, F=config.d_ff, H=config.num_heads,
        V=config.vocab_size, layers=config.num_layers, decoder_layers=config.num_decoder_layers,
        gated=int(config.is_gated_act), tied=tied, parameters=sizes,
        decoder=sum(map(_sizes, t5.decoder.block)),
        largest=max(config.vocab_size * config.d_model, _sizes(t5.decoder.block[0])),
    )  # fmt: skip


def retriever_shape(options: argparse.Namespace) -> Shape:
    import torch
    from transformers import BertConfig

    from src.models.pretrained import load_config
    from src.models.retriever import Retriever, RetrieverConfig

    start = getattr(options, "model_config", "none"), getattr(options, "retriever_model", "none")
    path = next((p for p in (options.model_path, *start) if p != "none"), "bert-base-uncased")
    bert = BertConfig() if path == "bert-base-uncased" else load_config(path, "bert", "dpr")
    values = {k: v for k, v in bert.to_dict().items() if k != "model_type"}
    projection = not getattr(options, "no_projection", False)
    if not hasattr(bert, "indexing_dimension"):
        dimension = getattr(options, "indexing_dimension", None) or bert.hidden_size
        is_new = options.model_path == "none"
        values |= {"indexing_dimension": dimension, "projection": is_new and projection}
    config = RetrieverConfig(**values)
    with torch.device("meta"):
        model = Retriever(config)
    D = config.hidden_size
    return Shape(
        D=D, A=D, F=config.intermediate_size, H=config.num_attention_heads, V=config.vocab_size,
        layers=config.num_hidden_layers, decoder_layers=0, gated=0, tied=True,
        parameters=_sizes(model), decoder=0, largest=config.vocab_size * D,
        projection=config.indexing_dimension,
    )  # fmt: skip


def _sizes(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------
# Work: 2 operations a weight and token, and attention's two products of all pairs of tokens
# (Kaplan et al., 2020, table 1). Backward takes twice as much as forward; recomputing, once more.


def encoder_flops(s: Shape, passages: float, W: float) -> float:
    weights = 4 * s.D * s.A + (2 + s.gated) * s.D * s.F
    return s.layers * passages * W * (2 * weights + 4 * W * s.A)


def decoder_flops(s: Shape, B: float, S: float, T: float) -> float:
    """One pass over answers [B, T] that attend to S tokens each, whose keys and values it makes."""
    own = 6 * s.D * s.A + (2 + s.gated) * s.D * s.F
    layer = T * (2 * own + 4 * (T + S) * s.A) + S * 2 * 2 * s.D * s.A
    return B * (s.decoder_layers * layer + 2 * T * s.D * s.V)


def decoding_flops(s: Shape, B: float, S: float, T: float) -> float:
    """T steps that attend to the hidden states themselves (src/models/decoder.py)."""
    own = 8 * s.D * s.A + (2 + s.gated) * s.D * s.F
    return B * T * (s.decoder_layers * (2 * own + 4 * S * s.H * s.D) + 2 * s.D * s.V)


def reader_flops(s: Shape, B: float, N: float, W: float, T: float, recompute: bool) -> float:
    """One training step on passages of W tokens."""
    encoder, decoder = encoder_flops(s, B * N, W), decoder_flops(s, B, N * W, T)
    return (4 if recompute else 3) * encoder + (4 if recompute else 3) * decoder


def retriever_flops(s: Shape, B: float, N: float, W: float, questions: float) -> float:
    head = 2 * s.D * s.projection
    return 3 * (
        encoder_flops(s, B * N, W) + encoder_flops(s, B, questions)
        + head * B * (N * W + questions)
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Activations kept for the backward pass, in bytes. What autograd saves of each operation of
# src/models/encoder.py and of Transformers' blocks; compare Korthikanti et al., 2022, section 4.


@dataclasses.dataclass(frozen=True)
class Format:
    """Bytes of an element in matrix products and of a dropout mask, and of an attention score:
    a CPU keeps softmax, mask and product of all of them, a GPU's kernels none."""

    element: int
    mask: int
    score: int
    casts: bool  # autocast keeps a copy of each product's input

    @classmethod
    def of(cls, device: Device, precision: str, dropout: float) -> "Format":
        cpu, half = device.kind == "cpu", precision != "fp32"
        mask = (4 if cpu else 1) if dropout else 0
        score = (12 if dropout else 4) if cpu else 0
        return cls(2 if half else 4, mask, score, half)


def t5_layer(s: Shape, f: Format, W: float) -> float:
    """A token in an encoder block: residual and normed input twice, queries, keys, values and
    their mixture, feed-forward."""
    normed = (3 + 1 + s.gated if f.casts else 2) * f.element
    wide = 1 + (2 - 1 if f.mask else 0) + 6 * s.gated - s.gated
    return (
        s.D * (2 * 4 + normed + 2 * f.mask)
        + s.A * (4 if f.score else 5) * f.element + s.H * W * f.score
        + s.F * (wide * f.element + f.mask)
    )  # fmt: skip


def bert_layer(s: Shape, f: Format, W: float) -> float:
    """A token in a BERT block: LayerNorms' inputs and outputs, attention, feed-forward (GELU)."""
    inputs = (3 + 1) * f.element if f.casts else 0
    return (
        s.D * (4 * 4 + inputs + 2 * f.mask)
        + s.A * (4 if f.score else 5) * f.element + s.H * W * f.score
        + 2 * s.F * f.element
    )  # fmt: skip


def decoder_activations(s: Shape, f: Format, B: float, S: float, T: float) -> float:
    """Keys and values of all passages in each layer, the scores of T queries, and the logits:
    themselves, their logarithms and the gradients of both."""
    copies = 2 * s.D * f.element if f.casts else 0
    across = B * S * (2 * s.A * f.element + copies + T * s.H * max(f.score, 1))
    own = B * T * (2 * t5_layer(s, f, T))
    return s.decoder_layers * (across + own) + 3 * B * T * s.V * 4


def reader_memory(
    s: Shape, options: argparse.Namespace, device: Device, precision: str
) -> dict[str, float]:
    """A training process's memory at its fullest, by component."""
    B, N, W = options.per_gpu_batch_size, options.n_context, options.text_maxlength
    f = Format.of(device, precision, options.dropout)
    T = options.answer_maxlength if options.answer_maxlength > 0 else ANSWER
    P = B * N * W
    layer, decoder = P * t5_layer(s, f, W), decoder_activations(s, f, B, N * W, T)
    residual, bias = P * s.D * 4, (3 if f.score else 1) * s.H * W * W * 4
    if options.use_checkpoint:  # each block's input, and all of one block at a time
        decoder = decoder / max(1, s.decoder_layers) + 2 * B * N * W * s.D * 4
        encoder, kept = s.layers * residual + layer, s.layers * residual
    else:
        encoder = kept = s.layers * layer
    # Hidden states, packed and by question, and their gradients.
    encoder += 4 * residual + bias
    late = s.decoder + s.V * s.D  # gradients made before the encoder's
    points = [kept + 3 * residual + bias + decoder, encoder + 4 * late * _divisor(options, device)]
    return _training_memory(s, options, device, precision, points)


def retriever_memory(
    s: Shape, options: argparse.Namespace, device: Device, precision: str
) -> dict[str, float]:
    B, N = options.per_gpu_batch_size, options.n_context
    W, questions = options.passage_maxlength or 200, options.question_maxlength or 40
    f = Format.of(device, precision, options.dropout)
    P, Q = B * N * W, B * questions
    end = (2 * s.projection + s.D) * 4 + s.D * (4 + f.mask)  # projection, LayerNorm; embeddings
    kept = P * (s.layers * bert_layer(s, f, W) + end)
    kept += Q * (s.layers * bert_layer(s, f, questions) + end)
    return _training_memory(s, options, device, precision, [kept])


def _divisor(options: argparse.Namespace, device: Device) -> float:
    return 1 / device.n if getattr(options, "shard", False) else 1.0


def _training_memory(
    s: Shape, options: argparse.Namespace, device: Device, precision: str, points: list[float]
) -> dict[str, float]:
    """Weights, gradients and Adam's two averages in float32 (Rajbhandari et al., 2020, section
    3.1), divided among the processes with --shard. Gradients are made while activations are
    freed; with accumulation or DDP's buckets they are there all the time."""
    own = s.parameters * _divisor(options, device)
    together = options.accumulation_steps > 1 or device.n > 1
    largest = max(points)
    found = {"weights": 4 * own, "gradients": 4 * own, "optimizer": 8 * own}
    found["activations"] = largest if together else max(0.0, largest - 4 * own)
    if _divisor(options, device) < 1:  # one block at work, the next on its way, a gradient
        found["gathered blocks"] = 3 * s.largest * (2 if precision != "fp32" else 4)
    found["Python, PyTorch"] = RUNTIME[device.kind]
    return found


def answering_memory(
    s: Shape, options: argparse.Namespace, device: Device, precision: str
) -> dict[str, float]:
    """What `test_reader.py` takes: one encoder block at work, and the decoder's layout."""
    B, N, W = options.per_gpu_batch_size, options.n_context, options.text_maxlength
    e, P = 2 if precision != "fp32" else 4, B * N * W
    work = P * (s.D * 4 * 4 + (s.A * 4 + s.F * (1 + s.gated)) * e)
    copied = s.D * (3 * s.A + (1 + s.gated) * s.F) * s.decoder_layers + s.D * s.V
    laid_out = copied * 4 if device.kind == "cpu" else s.decoder * e
    found = {"weights": 4 * s.parameters * _divisor(options, device), "decoding": laid_out}
    return found | {"activations": work, "Python, PyTorch": RUNTIME[device.kind]}


def embedding_memory(
    s: Shape, batch_tokens: float, device: Device, precision: str
) -> dict[str, float]:
    """A retriever at work on a batch without gradients."""
    e = 2 if precision != "fp32" else 4
    work = batch_tokens * (4 * s.D + 2 * s.F) * e
    found = {"weights": e * s.parameters, "activations": work}
    return found | {"Python, PyTorch": RUNTIME[device.kind]}


# ----------------------------------------------------------------------------------------------
# Plans


@dataclasses.dataclass
class Plan:
    """What a command needs; `other` options, in words, that a smaller plan would have."""

    title: str
    memory: dict[str, float]
    seconds: float
    work: str
    disk: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def lines(options: argparse.Namespace) -> list[str]:
    """The plan of a command, as it is printed."""
    device = find_device(options.plan)
    planner, alternatives = _planner(options)
    plan = planner(options, device)
    devices = f"{device.n} x {device.name}" if device.n > 1 else device.name
    peak = device.flops[_precision(options, device)] / 1e12
    share = f"{SHARE[device.kind]:.0%} of {peak:.3g} TFLOP/s"
    rows = [("plan", f"{plan.title}, on {devices}")]
    rows += [("memory", f"{size(plan.total)} of {size(device.memory)} in each process")]
    rows += [("", f"{size(value):>8} {name}") for name, value in plan.memory.items()]
    took = duration(max(1, plan.seconds))
    rows += [("time", f"{took} at {share}: {plan.work}")]
    rows += [("disk", ", ".join(f"{size(value)} {name}" for name, value in plan.disk.items()))]
    if plan.total <= device.memory:
        rows += [("fits", "yes")]
    else:
        fitting = _fitting(options, device, planner, alternatives)
        rows += [("fits", f"no; it would {' or '.join(fitting[:3])}" if fitting else "no")]
    return [f"{name:<10} {text}".rstrip() for name, text in rows]


Planner = Callable[[argparse.Namespace, Device], Plan]
Alternatives = list[dict[str, Any]]  # options that need less memory, the cheapest first


def _fitting(
    options: argparse.Namespace, device: Device, planner: Planner, alternatives: Alternatives
) -> list[str]:
    """What would fit, in words: "with --use_checkpoint (11 GB)"."""
    found = []
    for values in alternatives:
        words = [f"--{name}" if value is True else f"--{name} {value}"
                 for name, value in values.items()]  # fmt: skip
        changed = argparse.Namespace(**{**vars(options), **values})
        numbers = {device.n, 2, 4, 8, 16, 32, 64} if values.get("shard") else {device.n}
        for n in sorted(n for n in numbers if n >= max(device.n, 2 if values.get("shard") else 1)):
            total = planner(changed, dataclasses.replace(device, n=n)).total
            if total <= device.memory:
                more = f" on {n} devices" if n != device.n else ""
                found.append(f"with {' '.join(words)}{more} ({size(total)})")
                break
    return found


def _planner(options: argparse.Namespace) -> tuple[Planner, Alternatives]:
    """The planner of the script that has these options, and what could be changed."""
    has = vars(options).keys()
    if "num_shards" in has:
        return plan_embedding, [{"per_gpu_batch_size": 8}]
    if "n_docs" in has:
        blocks = [{"indexing_batch_size": n} for n in (10_000, 1_000)]
        return plan_search, [*blocks, {"index_factory": "IVF4096,PQ64"}, {"index_factory": "PQ64"}]
    B = options.per_gpu_batch_size
    smaller = [{"per_gpu_batch_size": n} for n in (8, 4, 2, 1) if n < B]
    if "train_data" not in has:
        return plan_answering, [*smaller, {"shard": True}]
    smaller = [
        {"per_gpu_batch_size": n, "accumulation_steps": options.accumulation_steps * B // n}
        for n in (B // 2, B // 4, B // 8, 1) if 0 < n < B and B % n == 0
    ]  # fmt: skip
    base: Alternatives = [{}, *smaller]
    if "use_checkpoint" in has:
        base = [{"use_checkpoint": True}, *smaller]
        base += [{"use_checkpoint": True, **values} for values in smaller]
    tried = [*base, {"shard": True}, *({"shard": True, **values} for values in base)]
    return plan_training, [values for n, values in enumerate(tried) if values not in tried[:n]]


def _precision(options: argparse.Namespace, device: Device) -> str:
    """As `resolve_precision` and `--no_fp16` have it."""
    asked = getattr(options, "precision", None)
    if asked is None:
        return "fp16" if device.kind == "cuda" and not options.no_fp16 else "fp32"
    if asked == "auto":
        return "bf16" if device.kind == "cuda" and not device.name.startswith("V100") else "fp32"
    return asked


def plan_training(options: argparse.Namespace, device: Device) -> Plan:
    precision, B, N = _precision(options, device), options.per_gpu_batch_size, options.n_context
    questions = options.total_steps * B * options.accumulation_steps * device.n
    if hasattr(options, "model_size"):
        s, what = reader_shape(options), "a reader"
        memory = reader_memory(s, options, device, precision)
        T = options.answer_maxlength if options.answer_maxlength > 0 else ANSWER
        each = reader_flops(s, 1, N, FILL * options.text_maxlength, T, options.use_checkpoint)
    else:
        s, what = retriever_shape(options), "a retriever"
        memory = retriever_memory(s, options, device, precision)
        each = retriever_flops(s, 1, N, FILL * (options.passage_maxlength or 200), 20)
    steps = options.keep_checkpoints or -(-options.total_steps // options.save_freq)
    kept = min(steps, -(-options.total_steps // options.save_freq)) + (options.eval_data != "none")
    disk = {f"in {count(kept, 'checkpoint')} of {size(12 * s.parameters)}": kept * 12 * s.parameters}
    work = f"{each / 1e12:.3g} TFLOP for each of {count(questions, 'question')}, and evaluations"
    title = f"train {what} of {s.parameters / 1e6:.1f}M parameters in {precision}"
    return Plan(title, memory, device.seconds(each * questions, precision), work, disk)


def plan_answering(options: argparse.Namespace, device: Device) -> Plan:
    precision, s = _precision(options, device), reader_shape(options)
    W, N = FILL * options.text_maxlength, options.n_context
    each = encoder_flops(s, N, W) + decoding_flops(s, 1, N * W, 6)
    n, how = _questions(options.eval_data, NQ_TEST)
    memory = answering_memory(s, options, device, precision)
    work = f"{each / 1e12:.3g} TFLOP for each of {how}, and waiting while answers are decoded"
    title = f"answer with a reader of {s.parameters / 1e6:.1f}M parameters in {precision}"
    disk = {"for data with scores": n * N * 650.0} if options.write_crossattention_scores else {}
    disk |= {"for answers": n * 30.0}
    return Plan(title, memory, device.seconds(each * n, precision), work, disk)


def plan_embedding(options: argparse.Namespace, device: Device) -> Plan:
    precision, s = _precision(options, device), retriever_shape(options)
    W = options.passage_maxlength or 200
    n, how = _passages(options.passages)
    n //= options.num_shards
    each = encoder_flops(s, 1, FILL * W) + 2 * s.D * s.projection * FILL * W
    memory = embedding_memory(s, options.per_gpu_batch_size * W, device, precision)
    disk = {f"for {count(n, 'embedding')}": n * (s.projection * (2 if precision == "fp16" else 4))}
    work = f"{each / 1e9:.3g} GFLOP for each passage; the collection has {how}"
    title = f"embed with a retriever of {s.parameters / 1e6:.1f}M parameters in {precision}"
    return Plan(title, memory, device.seconds(each * n, precision), work, disk)


def plan_search(options: argparse.Namespace, device: Device) -> Plan:
    from src.search.embeddings import open_shards
    from src.search.faiss_index import expected_memory

    search = select(SearchOptions, options)
    questions, how = _questions(options.data, NQ_TEST)
    rows, _ = _passages(options.passages)
    precision, runtime = _precision(options, device), {"Python, PyTorch": RUNTIME[device.kind]}
    results = questions * options.n_docs * (8 + 4) * 3.0  # scores, positions, and their merging
    disk = {"for retrieved passages": questions * options.n_docs * 700.0}
    if options.bm25:  # 3.4 kB a passage, measured (bench/RESULTS.md)
        return Plan("search with BM25", {"index": 3400.0 * rows, **runtime}, 1, how, disk)
    s = retriever_shape(options)
    dimension = s.projection
    if Path(options.passages_embeddings).exists() or "*" in options.passages_embeddings:
        try:
            shards = open_shards(options.passages_embeddings, allow_mismatch=True)
            rows, dimension = sum(map(len, shards)), shards[0].embeddings.shape[1]
        except InputError:
            pass  # a plan may be made before the embeddings
    block = min(rows, options.indexing_batch_size)
    memory = {"retriever": (2 if precision == "fp16" else 4) * s.parameters}
    memory["embedding questions"] = options.per_gpu_batch_size * 40 * 4 * (4 * s.D + 2 * s.F)
    if device.kind == "cuda" and not search.factory:  # src/search/gpu.py
        kept, work = 2.0 * dimension * rows, 16 * 2**27 + 2.0 * dimension * 8 * block
        memory["blocks"] = work
        if sum(memory.values()) + kept < 0.9 * device.memory:
            memory["embeddings"] = kept
    else:
        index = expected_memory(rows, dimension, options.indexing_batch_size, search.factory)
        memory["blocks of embeddings" if not search.factory else "index"] = index
    memory |= {"results": results + questions * dimension * 8, **runtime}
    flops = 2.0 * questions * rows * dimension
    if search.factory and options.save_or_load_index:
        index -= 4 * block * dimension
        disk[f"for the index {search.factory}"] = index
    work = f"{how} in {count(rows, 'passage')} of {dimension} dimensions"
    kind = search.factory or "exact"
    return Plan(f"{kind} search", memory, device.seconds(flops, precision), work, disk)


def _questions(path: str, otherwise: int) -> tuple[int, str]:
    n = _estimate(path, b'"question"')
    return (n, f"about {n:,} questions") if n else (otherwise, f"{otherwise:,} questions (assumed)")


def _passages(path: str) -> tuple[int, str]:
    n = _estimate(path, b"\n")
    return (n, f"about {n:,}") if n else (WIKIPEDIA, f"{WIKIPEDIA:,} (assumed)")


def _estimate(path: str, mark: bytes) -> int:
    """How often a file has a mark, by its first megabytes; 0 if there is no such file."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 23)
            return round(head.count(mark) * os.fstat(file.fileno()).st_size / max(1, len(head)))
    except OSError:
        return 0


# ----------------------------------------------------------------------------------------------
# The table of the README and docs/scale.md


def table(device_name: str) -> list[str]:
    """What NaturalQuestions takes on such devices, as Markdown."""
    from src import options as o

    reader = "--n_context 100 --text_maxlength 250 --accumulation_steps 8 --eval_data none"
    rows = [
        ("train a base reader", o.train_reader_parser, f"{reader} --total_steps 10000"),
        ("train a large reader", o.train_reader_parser,
         f"{reader} --total_steps 15000 --model_size large --use_checkpoint"),
        ("train a 3b reader", o.train_reader_parser,
         f"{reader} --total_steps 15000 --model_size 3b --use_checkpoint --shard"),
        ("train an 11b reader", o.train_reader_parser,
         f"{reader} --total_steps 15000 --model_size 11b --use_checkpoint --shard"),
        ("answer and score the test questions", o.test_reader_parser,
         "--n_context 100 --text_maxlength 250 --write_crossattention_scores"),
        ("train a retriever", o.train_retriever_parser,
         "--n_context 100 --accumulation_steps 8 --total_steps 20000 --eval_data none"),
        ("embed Wikipedia", o.passage_embeddings_parser, "--passages - --model_path bert-base-uncased"),
        ("exact search", o.passage_retrieval_parser,
         "--passages - --output_path - --model_path bert-base-uncased --passages_embeddings -"),
    ]  # fmt: skip
    found = [f"| on {device_name} | time | memory of a process | fits | disk |", "|---|---|---|---|---|"]
    device = find_device(device_name)
    for name, make_parser, words in rows:
        options = make_parser().parse_args(words.split())
        plan = _planner(options)[0](options, device)
        fits = "yes" if plan.total <= device.memory else "no"
        disk = size(sum(plan.disk.values()))
        found.append(f"| {name} | {duration(plan.seconds)} | {size(plan.total)} | {fits} | {disk} |")
    return found


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    description = "What NaturalQuestions takes on a kind of GPU, as a table."
    parser = _Parser(description, None, "", "-m src.tools.plan")
    add, _ = parser.group("device")
    add("device", "GPU[:N]", "H100-80GB:8", f"one of {', '.join(DEVICES)}, or GB,TFLOPs", nargs="?")
    print("\n".join(table(parser.parse_args(arguments).device)))


if __name__ == "__main__":
    main()
