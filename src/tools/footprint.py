"""The formulas behind `--plan`: a model's parameters, operations and memory, by its shape alone.

Shapes: B questions, N passages of each, W tokens of a passage, P tokens of all, S tokens of a
question's passages, T tokens of an answer; in `Shape`, D model size, A heads * head size, F
feed-forward size, H heads, V vocabulary.
"""

import argparse
import sys
from typing import Any, NamedTuple

from src.runtime.errors import process_number

T5 = {  # t5-SIZE: D, head size, F, layers, H (Raffel et al., 2020, section 3.7)
    "small": (512, 64, 2048, 6, 8),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 24, 16),
    "3b": (1024, 128, 16384, 24, 32),
    "11b": (1024, 128, 65536, 24, 128),
}
RUNTIME = {"cuda": 0.8e9, "cpu": 0.45e9}  # Python and its libraries; on a GPU, CUDA's context
ANSWER = 16  # tokens, where --answer_maxlength sets none

Options = argparse.Namespace
Memory = dict[str, float]  # bytes by component


class Device(NamedTuple):
    """One of `n` equal devices; `flops` is the peak in half precision and in float32."""

    name: str
    memory: float
    flops: tuple[float, float]
    kind: str = "cuda"
    n: int = 1


def parse_args(parser: argparse.ArgumentParser, words: list[str] | None = None) -> Options:
    """The options of a command; with --plan, print its plan instead, and end. (Here, where nothing
    heavy is imported.)"""
    options = parser.parse_args(words)
    if options.plan is None:
        return options
    from src.tools.plan import lines

    if process_number() == "0":
        print("\n".join(lines(options)))
    sys.exit(0)


# ----------------------------------------------------------------------------------------------
# Shapes


class Shape(NamedTuple):
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

    def is_folded(self, T: int) -> bool:
        """Whether cross-attention from T tokens reads passages without keys and values."""
        return 2 * T * self.H <= self.A


def _path(options: Options, *names: str) -> str | None:
    paths = (getattr(options, name, "none") for name in names)
    return next((path for path in paths if path != "none"), None)


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def reader_shape(options: Options) -> Shape:
    import torch
    from transformers import T5Config

    from src.models.plain import FAMILY
    from src.models.reader import reader_config

    D, head, F, layers, H = T5[options.model_size]
    path = _path(options, "model_path", "model_config")
    c = T5Config(d_model=D, d_kv=head, d_ff=F, num_layers=layers, num_heads=H)
    c = reader_config(path, None) if path else c
    with torch.device("meta"):
        t5 = FAMILY[c.model_type](c)
    own_head = 0 if getattr(c, "scale_decoder_outputs", False) else c.vocab_size * c.d_model
    block = _size(t5.decoder.block[0])
    return Shape(
        c.d_model, c.num_heads * c.d_kv, c.d_ff, c.num_heads, c.vocab_size, c.num_layers,
        _size(t5) + own_head, c.num_decoder_layers, c.num_decoder_layers * block,
        max(block, c.vocab_size * c.d_model + own_head), int(c.is_gated_act),
    )  # fmt: skip


def retriever_shape(options: Options) -> Shape:
    import torch
    from transformers import BertConfig

    from src.models import encoders
    from src.models.pretrained import load_config
    from src.models.retriever import Retriever

    path = _path(options, "model_path", "model_config", "retriever_model") or "bert-base-uncased"
    c = BertConfig() if path == "bert-base-uncased" else load_config(path, *encoders.KINDS, "dpr")
    if hasattr(c, "indexing_dimension"):
        values = encoders.settings_of(c, path)
    else:
        is_new = getattr(options, "model_path", "none") == "none"
        projection = is_new and not getattr(options, "no_projection", False)
        default = 768 if projection else c.hidden_size
        dimension = getattr(options, "indexing_dimension", None) or default
        values = {"projection": projection, "indexing_dimension": dimension}
    if c.model_type == "dpr":
        c = BertConfig(**{k: v for k, v in c.to_dict().items() if k != "model_type"})
    for name, value in vars(encoders.Settings(**values)).items():
        setattr(c, name, value)
    d_ff = c.hidden_dim if c.model_type == "distilbert" else c.intermediate_size
    with torch.device("meta"):
        parameters = _size(Retriever(c))
    return Shape(
        c.hidden_size, c.hidden_size, d_ff, c.num_attention_heads, c.vocab_size,
        c.num_hidden_layers, parameters, block=c.vocab_size * c.hidden_size,
        embedding=c.indexing_dimension,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Work: 2 operations a weight and token, and attention's two products of all pairs of tokens (Kaplan
# et al., 2020, table 1). Backward takes twice what forward takes; --use_checkpoint adds a forward.


def encoder_flops(s: Shape, passages: float, W: float) -> float:
    return passages * W * s.layers * (2 * s.layer_weights() + 4 * W * s.A)


def decoder_flops(s: Shape, B: float, S: float, T: float) -> float:
    """Answers [B, T] in one pass: from the hidden states themselves (`_Folded` in
    src/models/encoder.py), long ones with keys and values of all S tokens."""
    if s.is_folded(T):
        layer = T * (2 * s.layer_weights(8) + 4 * T * s.A + 4 * S * s.H * s.D)
    else:
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


class Format(NamedTuple):
    """Bytes of an `element` in products, of a dropout mask's, and of what is kept of each attention
    score: softmax, mask and their product on a CPU, nothing in a GPU's fused kernels."""

    element: int
    mask: int
    score: int

    @classmethod
    def of(cls, device: Device, precision: str, dropout: float) -> "Format":
        mask = 1 if dropout else 0
        score = 4 + 5 * mask if device.kind == "cpu" else 0
        return cls(4 if precision == "fp32" else 2, mask, score)


def layer_bytes(s: Shape, f: Format, W: float, is_t5: bool) -> float:
    """What a block keeps of a token: input and output of both norms (of T5's on a CPU, also what is
    in between; in half precision, each product's copy), dropout masks, queries, keys, values and
    their mixture, scores, and feed-forward."""
    norms = 2 * (4 + f.element) + (8 if is_t5 and f.score else 0) + (6 if f.element == 2 else 0)
    # ReLU keeps its result, GELU its input and, in Transformers' own, four steps on the way.
    wide = (7 if s.gated else 1 + bool(f.mask)) * f.element + f.mask if is_t5 else 2 * f.element
    attention = s.A * (4 if f.score else 5) * f.element + s.H * W * f.score
    return s.D * (norms + 2 * f.mask) + attention + s.F * wide


def reader_activations(s: Shape, f: Format, options: Options) -> tuple[float, float]:
    """Kept at the end of the forward pass: of the encoder, and of everything."""
    B, N, W = options.per_gpu_batch_size, options.n_context, options.text_maxlength
    T = options.answer_maxlength if options.answer_maxlength > 0 else ANSWER
    P, states = B * N * W, B * N * W * s.D * 4
    block = P * layer_bytes(s, f, W, True)
    across = P * (2 * s.D * 2 if f.element == 2 else 0) + 2 * B * T * layer_bytes(s, f, T, True)
    if s.is_folded(T):
        across += B * T * s.H * (N * W * (4 + 5 * f.mask) + 2 * s.D * f.element)
    else:
        across += P * 2 * s.A * f.element + B * T * N * W * s.H * max(f.score, 1)
    logits = 3 * B * T * s.V * 4  # and their logarithms, and a gradient
    # Final norm, the states by question, and their gradient; the bias and its gradient.
    encoder = 5 * states + 3 * s.H * W * W * 4
    if options.use_checkpoint:  # the inputs of blocks, and all of one block at a time
        encoder += s.layers * states + max(block, 3 * states)
        return encoder, encoder + across + logits - min(block, across)
    encoder += s.layers * block
    return encoder, encoder + s.decoder_layers * across + logits


def training_memory(s: Shape, options: Options, device: Device, precision: str) -> Memory:
    """Weights, gradients and Adam's two averages in float32 (Rajbhandari et al., 2020, section
    3.1), with --shard a share of each. A single process makes gradients while it frees activations;
    accumulation and DDP's buckets keep them."""
    B, N = options.per_gpu_batch_size, options.n_context
    f = Format.of(device, precision, options.dropout)
    shards = device.n if options.shard else 1
    own = 4 * s.parameters / shards
    if hasattr(options, "model_size"):  # a reader
        encoder, everything = reader_activations(s, f, options)
        late = 4 * (s.decoder + s.V * s.D) / shards  # gradients made before the encoder's
    else:
        W, Q = options.passage_maxlength or 200, options.question_maxlength or 40
        flash = f if f.mask or not f.score else f._replace(score=0)
        ends = s.D * (2 * 4 + f.mask) + (s.D + 2 * s.embedding) * 4  # embeddings and projection
        texts = ((B * N * W, W), (B * Q, Q))
        everything = sum(P * (s.layers * layer_bytes(s, flash, w, False) + ends) for P, w in texts)
        encoder = late = 0.0
    kept = options.accumulation_steps > 1 or (device.n > 1 and shards == 1)
    highest = max(everything + (own if kept else 0), encoder + (own if kept else late), own)
    found = {"weights": own, "gradients": own, "optimizer": 2 * own, "activations": highest - own}
    if shards > 1:  # a block at work, the next one on its way, and a gradient
        found["gathered weights"] = 3 * s.block * f.element
    return found


def answering_memory(s: Shape, options: Options, device: Device, precision: str) -> Memory:
    """The reader, the decoder's layout, and one encoder block at work."""
    e = 4 if precision == "fp32" else 2
    P = options.per_gpu_batch_size * options.n_context * options.text_maxlength
    work = P * (4 * s.D * 4 + (4 * s.A + (1 + s.gated) * s.F) * e)
    weights = 4 * s.parameters / (device.n if options.shard else 1)
    # In float32, only queries, keys and values of self-attention are copied, to be side by side.
    decoding = 12 * s.D * s.A * s.decoder_layers if e == 4 else s.decoder * e
    return {"weights": weights, "decoding": decoding, "activations": work}


def embedding_memory(s: Shape, tokens: float, precision: str) -> Memory:
    """The retriever, and one of its blocks at work on a batch of so many tokens."""
    e = 4 if precision == "fp32" else 2
    return {"weights": e * s.parameters, "activations": tokens * (4 * s.D + 2 * s.F) * e}
