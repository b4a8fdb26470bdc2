"""Our greedy decoding against Transformers' own `generate`, over the same encoded passages."""

import pytest
import torch

from src.models.decoder import Encoded, GreedyDecoder
from src.models.reader import FiDT5, load_reader, new_reader
from tests.make_models import make_t5_config

SHAPES = {
    "t5, more layers below, wide heads": {
        "num_layers": 3, "num_decoder_layers": 1, "d_kv": 24, "num_heads": 2,
    },
    "t5 v1.1, more layers above": {
        "num_layers": 1, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def by_transformers(reader: FiDT5, encoded: Encoded, max_length: int) -> torch.Tensor:
    reader._key_positions = encoded.positions
    return reader.decoder("transformers").decode(encoded, max_length).tokens


def some_passages(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Six questions with up to 3 passages of up to 20 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (6, 3, 1), generator=generator)
    lengths[:, 1:] *= torch.randint(0, 2, (6, 2, 1), generator=generator)  # some are missing
    mask = torch.arange(20) < lengths
    return torch.randint(3, 800, (6, 3, 20), generator=generator) * mask, mask


@pytest.mark.parametrize("table", [False, True], ids=["no table", "legacy table"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_are_those_of_transformers(shape, table, tmp_path, monkeypatch):
    """With answers of all lengths: the end token is made about as likely as the others."""
    make_t5_config(tmp_path / "config.json", initializer_factor=3.0, **SHAPES[shape])
    torch.manual_seed(7)
    made = new_reader(str(tmp_path / "config.json"))
    width = made.config.num_heads
    reader = FiDT5(made.t5, torch.randn(32, width) if table else None).eval()
    answers = set()
    for seed in range(8):
        encoded = reader.encode(*some_passages(seed))
        with torch.no_grad():
            expected = by_transformers(reader, encoded, 14)
            # The end token's row becomes that of one of the tokens that come up on the way.
            for weight in (reader.t5.lm_head.weight, reader.t5.shared.weight):
                weight[1] = weight[expected[seed % 6, 1 + seed % 9]]
        expected = by_transformers(reader, encoded, 14)
        monkeypatch.setattr(torch, "get_num_threads", lambda seed=seed: 1 + seed % 3)
        decoder = reader.decoder()
        assert isinstance(decoder, GreedyDecoder)
        tokens = decoder.decode(encoded, 14).tokens
        assert torch.equal(tokens, expected)
        answers |= {tuple(row) for row in tokens.tolist()}
    ends = [row.index(1) if 1 in row else len(row) for row in answers]
    assert len(set(ends)) > 3  # or this test shows little


def test_only_queries_keys_and_values_are_copied(reference):
    reader = load_reader(str(reference / "legacy_reader/checkpoint/step-20")).eval()
    decoder = reader.decoder()
    own = {parameter.untyped_storage().data_ptr() for parameter in reader.parameters()}
    matrices = [decoder._head]
    for layer in decoder.layers:
        matrices += [layer.self_out, layer.query, layer.key, layer.value, layer.cross_out]
        matrices += [*layer.wi, layer.wo]
    assert all(matrix.untyped_storage().data_ptr() in own for matrix in matrices)


def test_unfinished_answers_continue_alone(reference, monkeypatch):
    """When half of the answers have ended, steps compute the others only, and come out the same."""
    reader = load_reader(str(reference / "legacy_reader/checkpoint/step-20")).eval()
    encoded = reader.encode(*some_passages(1))
    decoder, step = reader.decoder(), GreedyDecoder._step
    ends = [3, 1, 5, 1, 3, 4]  # the position of each question's end token
    seen: dict[int, list[int]] = {}  # step -> its questions, known by their passages
    whole = encoded.hidden[:, 0]

    def ending(self, tokens, position, caches, passages, *rest):
        logits, queries = step(self, tokens, position, caches, passages, *rest)
        firsts = passages.hidden[:, 0, 0]
        seen[position] = [next(b for b in range(6) if torch.equal(whole[b], one)) for one in firsts]
        for row, question in enumerate(seen[position]):
            logits[row, 1] = torch.inf if position + 1 == ends[question] else -torch.inf
        return logits, queries

    monkeypatch.setattr(GreedyDecoder, "_step", ending)
    tokens, _, _, queries = decoder.decode(encoded, 20)
    everyone = [0, 1, 2, 3, 4, 5]
    # Two of six ended at step 1: not yet half. Four at step 3; one of the two left at 4.
    assert seen == {0: everyone, 1: everyone, 2: everyone, 3: [2, 5], 4: [2]}
    assert [row.index(1) for row in tokens.tolist()] == ends
    assert all(set(row[end + 1 :]) <= {0} for row, end in zip(tokens.tolist(), ends, strict=True))
    assert tokens.shape[1] == 6
    assert [len(query) for query in queries] == [6] * len(decoder.layers)

    def never_ending(self, *arguments):
        logits, queries = step(self, *arguments)
        logits[:, 1] = -torch.inf
        return logits, queries

    monkeypatch.setattr(GreedyDecoder, "_step", never_ending)
    endless = decoder.decode(encoded, 6).tokens
    for question, end in enumerate(ends):
        assert torch.equal(tokens[question, :end], endless[question, :end])
