"""The reader's numbers equal the reference's, plain T5's, and those of the slow way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from src.data.batches import (
    ReaderCollator,
    ReaderDataset,
    ReaderItem,
    make_loader,
    reader_texts,
)
from src.data.examples import Example, load_data
from src.evaluation.answers import exact_match
from src.models import encoder
from src.models.answering import answer_questions
from src.models.decoder import GreedyDecoder
from src.models.losses import reader_loss
from src.models.pretrained import load_tokenizer
from src.models.reader import (
    POSITION_TABLE_KEY,
    CrossAttentionPositions,
    Encoded,
    FiDT5,
    load_reader,
    new_reader,
)
from src.models.scores import passage_scores
from src.options import GenerationOptions
from src.runtime.device import autocast
from src.runtime.errors import InputError
from src.training.loop import move_to
from tests.conftest import REFERENCE
from tests.make_models import make_t5_config


@pytest.fixture
def tokenizer(reference: Path):
    return load_tokenizer(str(reference / "t5"), "none")


@pytest.fixture
def batch(reference: Path, tokenizer) -> dict:
    dataset = ReaderDataset(load_data(reference / "data.json"), 5, with_target=True)
    return ReaderCollator(tokenizer, 96)([dataset[0, index] for index in range(0, 16, 2)])


def load(reference: Path, name: str) -> FiDT5:
    if name == "t5":
        return load_reader(str(reference / "t5"), use_position_table=True).eval()
    return load_reader(str(reference / "legacy_reader/checkpoint/step-20")).eval()


def forward(reader: FiDT5, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return reader(batch["input_ids"], batch["attention_mask"], batch["labels"])


def changed_passages(batch: dict, present: list[int]) -> dict:
    """The batch with the last passages of some questions taken away."""
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    for question, n in enumerate(present):
        ids[question, n:], mask[question, n:] = 0, False
    return {**batch, "input_ids": ids, "attention_mask": mask}


# --- the reference's numbers


@pytest.mark.parametrize("name", ["t5", "legacy"])
def test_loss_logits_scores_and_tokens_equal_the_reference(name, reference, batch):
    numbers = np.load(reference / f"reader_{name}.npz")
    reader = load(reference, name)
    loss, logits = forward(reader, batch)
    passages = batch["input_ids"], batch["attention_mask"]
    tokens, scores = reader.generate_with_scores(*passages, max_length=20)
    assert np.array_equal(tokens.numpy(), numbers["generated"])
    assert torch.equal(reader.generate(*passages, max_length=20), tokens)
    assert loss.item() == pytest.approx(float(numbers["loss"]), abs=1e-4)
    assert np.abs(logits.numpy() - numbers["logits"]).max() < 1e-4
    assert np.abs(scores.numpy() - numbers["crossattention_scores"]).max() < 1e-4


def test_answers_of_a_legacy_reader(reference, tokenizer):
    expected = json.loads((reference / "reader_legacy_answers.json").read_text())
    data = load_data(reference / "data.json")
    batches = [[(0, 0), (0, 2), (0, 4)], [(0, 6), (0, 8), (0, 10)], [(0, 12), (0, 14)]]
    loader = make_loader(ReaderDataset(data, 5), batches, ReaderCollator(tokenizer, 96), 0)
    reader = load(reference, "legacy").train()
    answers = [
        answer
        for answers in answer_questions(
            reader, tokenizer, loader, torch.device("cpu"), with_scores=True
        )
        for answer in answers
    ]
    assert [answer.text for answer in answers] == expected["answers"]
    right = [data[answer.index]["answers"] for answer in answers]
    assert [
        exact_match(answer.text, answers_) for answer, answers_ in zip(answers, right, strict=True)
    ] == expected["exact_match"]
    scores = np.load(reference / "reader_legacy.npz")["crossattention_scores"]
    assert np.abs(np.array([answer.scores for answer in answers]) - scores).max() < 1e-4
    assert reader.training  # left as it was


def test_the_position_table_matters(reference, batch):
    numbers = np.load(reference / "reader_t5.npz")
    plain = load_reader(str(reference / "t5")).eval()
    assert plain.positions is None
    _, logits = forward(plain, batch)
    assert np.abs(logits.numpy() - numbers["logits"]).max() > 0.05


def test_buckets_equal_t5s_own():
    config = T5Config(num_heads=3, relative_attention_num_buckets=32)
    positions, all_positions = CrossAttentionPositions(config), torch.arange(400)
    buckets = T5Attention._relative_position_bucket(
        all_positions[None, :] - all_positions[:, None], bidirectional=False
    )
    expected = positions.table(buckets).permute(2, 0, 1)[None]
    assert torch.equal(positions(all_positions, all_positions[None]), expected)


# --- second ways to compute the same


def test_one_passage_is_t5(reference, batch):
    reader = load_reader(str(reference / "t5")).eval()
    t5 = T5ForConditionalGeneration.from_pretrained(reference / "t5").eval()
    one = {**batch, "input_ids": batch["input_ids"][:, :1]}
    one["attention_mask"] = batch["attention_mask"][:, :1]
    ids, mask = one["input_ids"][:, 0], one["attention_mask"][:, 0]
    loss, logits = forward(reader, one)
    with torch.no_grad():
        expected = t5(input_ids=ids, attention_mask=mask, labels=batch["labels"])
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    assert torch.allclose(logits, expected.logits, atol=1e-5)
    for beams in (1, 3):
        tokens = reader.generate(one["input_ids"], one["attention_mask"], 12, beams)
        expected = t5.generate(input_ids=ids, attention_mask=mask, max_length=12, num_beams=beams)
        assert torch.equal(tokens, expected)


# (Share of padding, tokens) of the encoder's groups.
GROUPINGS = {"equal lengths": (0.0, 1), "similar lengths": (0.3, 8)}


def padded_encode(reader: FiDT5, batch: dict) -> Encoded:
    """The slow twin of `encode`: every passage at its full padded length, missing ones too."""
    B, N, L = batch["input_ids"].shape
    ids, mask = batch["input_ids"].view(B * N, L), batch["attention_mask"].view(B * N, L)
    hidden = reader.t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    positions = torch.arange(N * L).expand(B, N * L)
    reader._key_positions = positions
    return Encoded(hidden.view(B, N * L, -1), mask.view(B, N * L), positions)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", ["t5", "legacy"])
def test_nothing_changes_by_leaving_out_the_padding(name, grouping, reference, batch, monkeypatch):
    """Loss, gradients, logits and answers, with passages of many lengths and some missing."""
    reader = load(reference, name)
    B, N, L = batch["input_ids"].shape
    kept = torch.arange(L) < torch.randint(2, L, (B, N, 1), generator=torch.manual_seed(3))
    cut = changed_passages(batch, [5, 1, 3, 5, 2, 4, 5, 5])
    cut["attention_mask"] &= kept
    cut["input_ids"] = cut["input_ids"].masked_fill(~cut["attention_mask"], 0)
    monkeypatch.setattr(encoder, "GROUPING", {"cpu": GROUPINGS[grouping]})
    if grouping == "similar lengths":  # as on a GPU, whose biases have aligned rows, too
        monkeypatch.setattr(encoder, "ALIGNMENT", {"cpu": 8})
    results = []
    for encode in (reader.encode, lambda *_: padded_encode(reader, cut)):
        with monkeypatch.context() as patch:
            patch.setattr(reader, "encode", encode)
            reader.zero_grad()
            loss, logits = reader(cut["input_ids"], cut["attention_mask"], cut["labels"])
            loss.backward()
            gradients = [p.grad.clone() for p in reader.parameters() if p.grad is not None]
            tokens = reader.generate(cut["input_ids"], cut["attention_mask"], 8, num_beams=2)
        results.append(([loss.detach()], logits.detach(), gradients, tokens))
    for ours, slow in zip(*results, strict=True):
        for one, other in zip(ours, slow, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_biases_of_a_gpu_have_aligned_rows(reference, monkeypatch):
    monkeypatch.setattr(encoder, "ALIGNMENT", {"cpu": 8})
    attention = load(reference, "t5").t5.encoder.block[0].layer[0].SelfAttention
    groups = encoder._make_groups([13, 13, 9, 8], torch.device("cpu"))
    for group, bias in zip(groups, encoder._make_biases(attention, groups), strict=True):
        W = group.shape[1]
        assert bias.shape[2:] == (W, W)
        assert torch.equal(bias[0], attention.compute_bias(W, W)[0])
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1])


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_the_feed_forward_equals_transformers_to_the_bit(kind, reference, tmp_path):
    """Also inside autocast, where Transformers converts to float32 and back."""
    shape = json.loads((reference / "t5/config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shape | {"feed_forward_proj": kind, "dropout_rate": 0.0}))
    dense = new_reader(str(file)).t5.encoder.block[0].layer[1].DenseReluDense
    assert type(dense) is not type(dense).stands_for
    tokens = torch.randn(5, shape["d_model"], generator=torch.manual_seed(0))
    for precision in ("fp32", "bf16"):
        found = []
        for forward in (type(dense).forward, type(dense).stands_for.forward):
            dense.zero_grad()
            with autocast(torch.device("cpu"), precision):
                output = forward(dense, tokens)
            output.float().square().sum().backward()
            found.append([output.detach(), *(p.grad.clone() for p in dense.parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)


def test_half_precision_is_near(reference, batch):
    """bf16 autocast, as on a GPU: other numbers, by no more than its 8 bits."""
    reader = load(reference, "legacy")
    results = []
    for precision in ("fp32", "bf16"):
        with autocast(torch.device("cpu"), precision):
            loss, logits = reader(batch["input_ids"], batch["attention_mask"], batch["labels"])
            passages = batch["input_ids"], batch["attention_mask"]
            _, scores = reader.generate_with_scores(*passages, 4)
        results.append([loss.detach(), logits.detach().float(), scores])
    for full, half in zip(*results, strict=True):
        assert not torch.equal(full, half)
        assert torch.allclose(full, half, atol=0.02 * full.abs().max().item())


def test_the_decoder_gets_real_tokens_only(reference, batch):
    encoded = load(reference, "t5").encode(batch["input_ids"], batch["attention_mask"])
    counts = batch["attention_mask"].sum(dim=(1, 2))
    assert encoded.hidden.shape[1] == counts.max() < batch["attention_mask"][0].numel()
    assert torch.equal(encoded.mask.sum(dim=1), counts)
    for positions, real, mask in zip(
        encoded.positions, encoded.mask, batch["attention_mask"].flatten(1), strict=True
    ):
        assert torch.equal(positions[real], mask.nonzero()[:, 0])


def slow_scores(reader: FiDT5, batch: dict) -> torch.Tensor:
    """The definition, word by word: all pre-softmax scores of the first token, then their mean."""
    B, N, L = batch["attention_mask"].shape
    H, K = reader.config.num_heads, reader.config.d_kv
    hidden = padded_encode(reader, batch).hidden
    layers = [block.layer[1] for block in reader.t5.decoder.block]
    inputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for layer in layers
    ]
    forward(reader, batch)
    for handle in handles:
        handle.remove()
    total = torch.zeros(B, N)
    for layer, states in zip(layers, inputs, strict=True):
        query = layer.EncDecAttention.q(layer.layer_norm(states))[:, 0].view(B, H, 1, K)
        key = layer.EncDecAttention.k(hidden).view(B, N * L, H, K).transpose(1, 2)
        scores = (query @ key.transpose(2, 3)).view(B, H, N * L)
        if reader.positions is not None:
            scores = (
                scores + reader.positions(torch.zeros(1).long(), torch.arange(N * L)[None])[:, :, 0]
            )
        scores = scores.view(B, H, N, L).mean(dim=1)
        for b in range(B):
            for n in range(N):
                total[b, n] += scores[b, n][batch["attention_mask"][b, n]].mean() / len(layers)
    return total


@pytest.mark.parametrize("name", ["t5", "legacy"])
def test_scores_equal_their_definition(name, reference, batch):
    reader = load(reference, name)
    ragged = changed_passages(batch, [5, 1, 3, 5, 2, 4, 5, 5])
    missing = ~ragged["attention_mask"].any(dim=2)
    with torch.no_grad():
        expected = slow_scores(reader, ragged).masked_fill(missing, -torch.inf)
    for beams in (1, 3):
        passages = ragged["input_ids"], ragged["attention_mask"]
        tokens, scores = reader.generate_with_scores(*passages, 6, num_beams=beams)
        assert torch.allclose(scores, expected, atol=1e-5)
        assert torch.equal(tokens, reader.generate(*passages, 6, num_beams=beams))
        assert missing.any()


@pytest.mark.parametrize("name", ["t5", "legacy"])
def test_folded_cross_attention_equals_transformers(name, reference, batch):
    """Loss and gradients; and what is attached to the layers it leaves out is called."""
    results, called = [], []
    for kind in (encoder.FoldedAttention, T5Attention):
        reader = load(reference, name)
        for block in reader.t5.decoder.block:
            assert type(block.layer[1].EncDecAttention) is encoder.FoldedAttention
            block.layer[1].EncDecAttention.__class__ = kind
        loss, _ = reader(batch["input_ids"], batch["attention_mask"], batch["labels"])
        loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in reader.named_parameters()})
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], atol=2e-5, rtol=1e-4)
    reader = load(reference, name)
    keys = reader.t5.decoder.block[1].layer[1].EncDecAttention.k
    keys.register_forward_hook(lambda *_: called.append(1))
    changed, _ = forward(reader, batch)
    assert called == [1]
    torch.testing.assert_close(changed, results[0]["loss"], atol=1e-6, rtol=1e-5)


class _SameOnEveryRun(TorchDispatchMode):
    """No operation whose sums are in another order each time on a GPU (from PyTorch's list, see
    `torch.use_deterministic_algorithms`)."""

    sums = ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "put", "cumsum")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").strip("_").removesuffix("_impl")
        in_any_order = name in self.sums and args[0].is_floating_point()
        assert not in_any_order, func
        accumulates = name == "index_put" and (args[3:4] or (kwargs or {}).get("accumulate"))
        assert not accumulates, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoder", ["fast", "transformers"])
def test_scores_are_the_same_on_every_run_of_a_gpu(decoder, reference, batch):
    reader = load(reference, "legacy")
    passages = batch["input_ids"], batch["attention_mask"]
    with _SameOnEveryRun():
        reader.generate_with_scores(*passages, max_length=4, decoder=reader.decoder(decoder))
        with pytest.raises(AssertionError, match="index_add"):
            torch.zeros(2).index_add_(0, torch.tensor([1, 1]), torch.ones(2))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("n_questions", [1, 3])
def test_training_does_not_wait_for_the_device(attention, n_questions, reference, monkeypatch):
    """A micro-batch works on the meta device, where looking at a number is an error, and so does an
    update: only the mask is on the CPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # unknown on this device
    monkeypatch.setitem(encoder.GROUPING, "meta", (0.1, 8))
    monkeypatch.setitem(encoder.ALIGNMENT, "meta", 8)
    reader = load_reader(
        str(reference / "legacy_reader/checkpoint/step-20"), by_shares=True
    ).train()
    reader.config._attn_implementation = attention
    lengths = torch.tensor([[12, 5, 9], [7, 0, 0], [3, 12, 0]])[:n_questions]
    ids = torch.zeros(n_questions, 3, 12, dtype=torch.long)
    batch = {"attention_mask": torch.arange(12) < lengths[:, :, None], "input_ids": ids}
    batch |= {"labels": torch.ones(n_questions, 4, dtype=torch.long)}
    batch = move_to(batch, torch.device("meta"))
    loss, _ = reader_loss(reader, batch)
    loss.backward()
    assert all(p.grad is not None for p in reader.parameters())
    torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


def test_missing_passages_do_not_matter(reference, batch):
    """A question with fewer passages than others in its batch is answered as it is alone."""
    reader = load(reference, "legacy")
    ragged = changed_passages(batch, [5, 1, 3, 5, 2, 4, 5, 5])
    _, together = forward(reader, ragged)
    tokens = reader.generate(ragged["input_ids"], ragged["attention_mask"], 12)
    for question, n in [(1, 1), (2, 3), (4, 2)]:
        alone = {
            "input_ids": ragged["input_ids"][question : question + 1, :n],
            "attention_mask": ragged["attention_mask"][question : question + 1, :n],
            "labels": ragged["labels"][question : question + 1],
        }
        assert torch.allclose(forward(reader, alone)[1][0], together[question], atol=1e-5)
        own = reader.generate(alone["input_ids"], alone["attention_mask"], 12)[0]
        assert torch.equal(own, tokens[question, : len(own)])


def test_checkpointing_the_encoder_changes_memory_only(reference, batch, monkeypatch):
    calls, gradients, layer = [], [], encoder._packed_layer
    monkeypatch.setattr(encoder, "_packed_layer", lambda *given: calls.append(0) or layer(*given))
    for use_checkpoint in (False, True):
        reader = load(reference, "t5").train()
        if use_checkpoint:
            reader.checkpoint_blocks()
            assert isinstance(reader.decoder(), GreedyDecoder)  # no block counts as changed
        calls.clear()
        loss, _ = reader(batch["input_ids"], batch["attention_mask"], batch["labels"])
        assert len(calls) == reader.config.num_layers
        loss.backward()
        assert len(calls) == (1 + use_checkpoint) * reader.config.num_layers
        gradients.append({name: p.grad for name, p in reader.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name  # DDP waits for every parameter
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


# --- number formats


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_scores_are_computed_in_float32(precision, reference, batch):
    reader = load(reference, "legacy")
    encoded = reader.encode(batch["input_ids"], batch["attention_mask"])
    queries = reader.decoder().decode(encoded, 2).queries
    expected = passage_scores(reader, encoded, batch["attention_mask"], queries)
    with autocast(torch.device("cpu"), precision):
        scores = passage_scores(reader, encoded, batch["attention_mask"], queries)
    assert torch.equal(scores, expected)


def enlarge_feed_forward(reader: FiDT5, factor: float) -> None:
    """Make `wo` give larger numbers without changing what the rest computes much."""
    with torch.no_grad():
        for name, parameter in reader.named_parameters():
            if name.endswith("wo.weight"):
                parameter.mul_(factor)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_the_feed_forward_does_not_overflow_in_fp16(kind, reference, batch, tmp_path):
    if kind == "plain":
        reader = load(reference, "t5")
    else:
        make_t5_config(tmp_path / "config.json", feed_forward_proj="gated-gelu")
        reader = new_reader(str(tmp_path / "config.json"), dropout=0.0).eval()
    enlarge_feed_forward(reader, 1e6)
    passages = batch["input_ids"], batch["attention_mask"]
    encoded = reader.encode(*passages)
    with autocast(torch.device("cpu"), "fp16"), torch.no_grad():
        half = reader.encode(*passages)
        for decoder in ("fast", "transformers"):
            reader.generate_with_scores(*passages, 6, decoder=reader.decoder(decoder))
        loss, logits = reader(*passages, batch["labels"])
    assert half.hidden.isfinite().all()
    assert torch.allclose(
        half.hidden, encoded.hidden, atol=0.05 * float(encoded.hidden.abs().max())
    )
    assert loss.isfinite()
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["fast", "transformers"])
def test_the_likeliest_token_is_chosen_in_float32(kind, reference, batch):
    """Of two tokens whose logits differ by less than bf16 shows, the likelier one."""
    reader = load(reference, "t5")
    reader.t5.lm_head.weight = torch.nn.Parameter(reader.t5.lm_head.weight.detach().clone())
    passages = batch["input_ids"], batch["attention_mask"]
    with autocast(torch.device("cpu"), "bf16"), torch.no_grad():
        best = int(reader.generate(*passages, 2)[0, 1])
        other = 2 if best > 2 else 799
        for factor in (1 - 1e-4, 1 + 1e-4):
            reader.t5.lm_head.weight[other] = reader.t5.lm_head.weight[best] * factor
            chosen = int(reader.generate(*passages, 2, decoder=reader.decoder(kind))[0, 1])
            assert chosen == (best if factor < 1 else other)


# --- numbers that are not finite


BREAK = {
    "encoder": ("encoder.block.0.layer.1.DenseReluDense.wo.weight", np.nan),
    "decoder": ("decoder.block.1.layer.2.DenseReluDense.wo.weight", np.inf),
    "head": ("lm_head.weight", -np.inf),
    "keys": ("decoder.block.1.layer.1.EncDecAttention.k.weight", np.nan),
}


@pytest.mark.parametrize("decoder", ["fast", "transformers"])
@pytest.mark.parametrize("part", BREAK)
def test_numbers_that_are_not_finite_are_an_error(part, decoder, reference, batch):
    reader = load(reference, "t5")
    name, value = BREAK[part]
    with torch.no_grad():
        reader.t5.get_parameter(name).view(-1)[0] = value
    answers = answer_questions(
        reader, load_tokenizer(str(reference / "t5"), "none"), [batch], torch.device("cpu"),
        "fp32", GenerationOptions(4, decoder=decoder), with_scores=True, source="data.json",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"data.json: example 0 .*--precision bf16 or fp32"):
        next(answers)
    if part != "keys":
        for beams in (1, 2):
            with pytest.raises(InputError, match="example 0 "):
                reader.generate(
                    batch["input_ids"], batch["attention_mask"], 4, beams, reader.decoder(decoder)
                )


@pytest.mark.parametrize("decoder", ["fast", "transformers"])
def test_the_example_that_is_not_finite_is_named(decoder, reference, batch):
    """One token's embedding is nan: that of a passage of the third question alone."""
    reader = load(reference, "t5")
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == 790, 791)
    batch["input_ids"][2, 1, 3] = 790
    reader.t5.lm_head.weight = torch.nn.Parameter(reader.t5.lm_head.weight.detach().clone())
    with torch.no_grad():
        reader.t5.shared.weight[790] = np.nan
    tokenizer = load_tokenizer(str(reference / "t5"), "none")
    options = GenerationOptions(4, decoder=decoder)
    answers = answer_questions(reader, tokenizer, [batch], torch.device("cpu"), options=options)
    with pytest.raises(InputError, match=f"example {batch['index'][2]} "):
        next(answers)


def test_a_question_without_text_or_passages_is_read_and_learned(tokenizer):
    torch.manual_seed(0)
    questions = [Example(n, "", text, "a", [], []) for n, text in enumerate(["", " ", "who?"])]
    items = [ReaderItem(e.index, reader_texts(e, 5), e.target) for e in questions]
    batch = ReaderCollator(tokenizer, 16)(items)
    reader = load_reader(str(REFERENCE / "t5"), 0.0)
    loss, _ = reader(batch["input_ids"], batch["attention_mask"], batch["labels"])
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in reader.parameters())
    (answers,) = answer_questions(reader, tokenizer, [batch], torch.device("cpu"), with_scores=True)
    assert all(np.isfinite(answer.scores).all() for answer in answers)


# --- saving and loading


@pytest.mark.parametrize("name", ["t5", "legacy", "fresh"])
def test_saved_and_loaded_readers_are_the_same(name, reference, batch, tmp_path):
    if name == "fresh":
        make_t5_config(tmp_path / "config.json", dropout_rate=0.0)
        reader = new_reader(str(tmp_path / "config.json")).eval()
    else:
        reader = load(reference, name)
    reader.save_pretrained(tmp_path / "saved")
    loaded = load_reader(str(tmp_path / "saved")).eval()
    weights, loaded_weights = reader.state_dict(), loaded.state_dict()
    assert weights.keys() == loaded_weights.keys()
    assert all(torch.equal(weights[key], loaded_weights[key]) for key in weights)
    assert torch.equal(forward(reader, batch)[1], forward(loaded, batch)[1])
    t5, report = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values()), report
    assert torch.equal(t5.state_dict()["shared.weight"], weights["t5.shared.weight"])


def test_dropout_is_what_was_asked_for(reference):
    reader = load_reader(str(reference / "t5"), dropout=0.37)
    rates = {m.p for m in reader.modules() if isinstance(m, torch.nn.Dropout)}
    rates |= {m.dropout for m in reader.modules() if isinstance(m, T5Attention)}
    assert rates == {0.37}


# --- broken models


def test_a_broken_reader_is_reported_in_one_line(reference, tmp_path):
    config = (reference / "t5" / "config.json").read_text()
    legacy = torch.load(reference / "legacy_reader/checkpoint/step-20/pytorch_model.bin")
    legacy.pop("decoder.block.2.layer.1.EncDecAttention.q.weight")
    torch.save(legacy, tmp_path / "legacy.bin")
    cases = {
        "empty": (None, b"", "no config.json"),
        "bert": ('{"model_type": "bert"}', b"", "a bert model, but a t5"),
        "legacy": (config, (tmp_path / "legacy.bin").read_bytes(), r"block.2.*EncDecAttention.q"),
    }
    for name, (config, weights, message) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin").write_bytes(weights)
        if config:
            (tmp_path / name / "config.json").write_text(config)
        with pytest.raises(InputError, match=message) as caught:
            load_reader(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no such"):
        load_reader("./nowhere")
    with pytest.raises(InputError, match=r"no-such-hub-model: .* hub name"):
        load_reader("no-such-hub-model")
    with pytest.raises(InputError, match="--tokenizer"):
        load_tokenizer(str(reference / "legacy_reader/checkpoint/step-20"), "no-such-hub-model")


def test_a_missing_position_table_is_an_error(reference, tmp_path):
    reader = load_reader(str(reference / "t5"))
    reader.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=POSITION_TABLE_KEY):
        load_reader(str(tmp_path), use_position_table=True)
