"""Embedding passages against sentence-transformers, and against Transformers the plain way.

    python bench/bench_retriever.py --passages FILE [--model FOLDER] [--rounds 3] [--batch 32]

The plain way: eager attention, float32, batches in the file's order, every passage padded to
`passage_maxlength`, mean over real tokens. sentence-transformers, if installed (with pip), sorts
texts by length as we do: it is the honest baseline. `--model` names any BERT that takes a mean,
such as all-MiniLM-L6-v2; without it, fresh weights in
the shape of all-MiniLM-L6-v2 and a tokenizer learned from the passages. Ratios are of medians of
interleaved runs; all tokenize, and give the same embeddings, scaled to length 1, to 1e-5. Memory is
the peak of a fresh process, less that of one that only imports what both do.
"""

import argparse
import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import interleaved, matrix_peak, nothing, peak_memory, table
from src.data.batches import passage_text
from src.data.passages import Passages
from src.models.embedder import TextEmbedder
from src.models.pretrained import quiet_transformers
from src.models.retriever import load_retriever

MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
MAX_LENGTH = 200


def make_model(texts: list[str], folder: str) -> None:
    """Fresh weights in MiniLM's shape, and a vocabulary of the size of BERT's."""
    learned = BertWordPieceTokenizer()
    learned.train_from_iterator(texts, vocab_size=30522, min_frequency=1, show_progress=False)
    learned.save_model(folder)
    BertTokenizerFast(vocab=f"{folder}/vocab.txt").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(**MINILM)).save_pretrained(folder)


def read_texts(passages: str) -> list[str]:
    return [passage_text(passage.title, passage.text) for passage in Passages(passages)]


def plain(folder: str, batch: int) -> Callable[[list[str]], np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bert = BertModel.from_pretrained(folder, attn_implementation="eager").eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), batch):
            tokens = tokenizer(
                texts[start : start + batch],
                padding="max_length",
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            )
            states = bert(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(2)
            rows.append((states * mask).sum(dim=1) / mask.sum(dim=1))
        return torch.cat(rows).numpy()

    return embed


def ours(folder: str, batch: int) -> Callable[[list[str]], np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    retriever = load_retriever(folder).eval()
    return TextEmbedder(retriever, tokenizer, "passages", MAX_LENGTH, batch, torch.device("cpu"))


def sentence_transformers(folder: str, batch: int) -> Callable[[list[str]], np.ndarray]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    model.max_seq_length = MAX_LENGTH
    return functools.partial(model.encode, batch_size=batch)


WAYS = {"plain": plain, "ours": ours}
if importlib.util.find_spec("sentence_transformers"):
    WAYS["sentence-transformers"] = sentence_transformers


def directions(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embed_once(way: str, passages: str, folder: str, batch: int) -> None:
    quiet_transformers()
    WAYS[way](folder, batch)(read_texts(passages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", required=True, help="TSV or JSONL")
    parser.add_argument("--model", default="none", help="folder of a BERT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    quiet_transformers()
    texts = read_texts(options.passages)
    with tempfile.TemporaryDirectory() as made:
        if options.model == "none":
            make_model(texts, made)
        folder = made if options.model == "none" else options.model
        embed = {way: load(folder, options.batch) for way, load in WAYS.items()}
        rows = {way: directions(embed[way](texts)) for way in WAYS}
        if max(np.abs(rows["plain"] - rows[way]).max() for way in WAYS) > 1e-5:
            sys.exit("the ways embed differently")
        seconds = interleaved(
            {way: lambda way=way: embed[way](texts) for way in WAYS}, options.rounds
        )
        empty = peak_memory(nothing)
        memory = {
            way: peak_memory(embed_once, way, options.passages, folder, options.batch) - empty
            for way in WAYS
        }
        config = BertConfig.from_pretrained(folder)
        tokens = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    lengths = [min(MAX_LENGTH, len(text)) for text in tokens]
    per_token = 8 * config.hidden_size**2 + 4 * config.hidden_size * config.intermediate_size
    flops = config.num_hidden_layers * sum(
        length * per_token + 4 * config.hidden_size * length**2 for length in lengths
    )
    peak = matrix_peak()
    print(
        f"{len(texts)} passages of {np.mean(lengths):.0f} tokens on average, at most {MAX_LENGTH}"
    )
    table(
        [
            {
                "embedding": way,
                "passages/s": len(texts) / seconds[way],
                "speed": seconds["plain"] / seconds[way],
                "to sentence-transformers": seconds.get("sentence-transformers", np.nan)
                / seconds[way],
                "peak MB": memory[way],
                "memory": memory[way] / memory["plain"],
                "of peak FLOPs": flops / seconds[way] / peak,
            }
            for way in WAYS
        ]
    )


if __name__ == "__main__":
    main()
