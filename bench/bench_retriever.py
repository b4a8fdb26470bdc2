"""Embedding passages against Transformers' own BERT, the plain way.

    python bench/bench_retriever.py --passages FILE [--model FOLDER] [--rounds 3] [--batch 32]

The plain way: eager attention, float32, batches in the file's order, every passage padded to
`passage_maxlength`, mean over real tokens. `--model` names any BERT; without it, fresh weights in
the shape of all-MiniLM-L6-v2 and a tokenizer learned from the passages. Ratios are of medians of
interleaved runs; both ways tokenize, and give the same embeddings to 1e-4.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import interleaved, matrix_peak, table
from src.data import passage_text
from src.passages import Passages
from src.retriever import TextEmbedder, load_retriever

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", required=True, help="TSV or JSONL")
    parser.add_argument("--model", default="none", help="folder of a BERT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    texts = [passage_text(passage.title, passage.text) for passage in Passages(options.passages)]
    with tempfile.TemporaryDirectory() as made:
        if options.model == "none":
            make_model(texts, made)
        folder = made if options.model == "none" else options.model
        tokenizer = AutoTokenizer.from_pretrained(folder)
        plain = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
        retriever = load_retriever(folder).eval()
    device = torch.device("cpu")
    embed = TextEmbedder(retriever, tokenizer, "passages", MAX_LENGTH, options.batch, device)

    @torch.no_grad()
    def embed_plainly() -> np.ndarray:
        rows = []
        for start in range(0, len(texts), options.batch):
            tokens = tokenizer(
                texts[start : start + options.batch],
                padding="max_length",
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            )
            states = plain(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(2)
            rows.append((states * mask).sum(dim=1) / mask.sum(dim=1))
        return torch.cat(rows).numpy()

    if np.abs(embed_plainly() - embed(texts)).max() > 1e-4:
        sys.exit("the two ways embed differently")
    seconds = interleaved({"plain": embed_plainly, "ours": lambda: embed(texts)}, options.rounds)
    lengths = [min(MAX_LENGTH, len(ids)) for ids in tokenizer(texts)["input_ids"]]
    config = plain.config
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
                "passages/s": len(texts) / value,
                "speed": seconds["plain"] / value,
                "of peak FLOPs": flops / value / peak,
            }
            for way, value in seconds.items()
        ]
    )


if __name__ == "__main__":
    main()
