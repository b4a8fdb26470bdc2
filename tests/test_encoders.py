"""Other encoders, and other projects' folders: embeddings are those that their own projects say,
computed here text by text, without padding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from src.models.embedder import TextEmbedder
from src.models.encoders import KINDS, longest
from src.models.retriever import fingerprint, load_retriever, open_retriever, start_retriever
from src.runtime.errors import InputError
from tests.conftest import REFERENCE

WORDS = ["a", "the", "tidal", "river", "is", "long", "title", "context", "question", "query"]
WORDS += ["passage", ":", "How", "Nile"]
TEXTS = ["a tidal river is long", "the Nile", "a", "a tidal river " * 7, "How long is the river"]
SIZE = 16


def make_tokenizer(folder: Path, pad: int, lower: bool = False) -> PreTrainedTokenizerFast:
    special = ["<s>", "</s>", "<unk>"]
    special.insert(pad, "<pad>")
    words = [*special, *WORDS, *[word.lower() for word in WORDS if not word.islower()]]
    own = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if lower:
        own.normalizer = normalizers.Lowercase()
    ids = [(name, words.index(name)) for name in ("<s>", "</s>")]
    own.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>"}
    tokens = {f"{name}_token": token for name, token in (names | {"pad": "<pad>"}).items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=30, **tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_encoder(folder: Path, kind: str, lower: bool = False) -> tuple[Any, Any]:
    """A small random encoder and its tokenizer, as Transformers saves them."""
    pad = 0 if kind in ("bert", "distilbert", "electra", "modernbert") else 1
    shape = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 24, "hidden_dim": 24, "embedding_size": 12}
    shape |= {"vocab_size": 40, "max_position_embeddings": 34, "pad_token_id": pad}
    torch.manual_seed(len(kind))
    config = AutoConfig.for_model(kind, **shape, initializer_range=0.4)
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(folder)
    return model, make_tokenizer(folder, pad, lower)


def by_hand(model, tokenizer, texts: list[str], pooling: str, most: int = 30, skip: int = 0):
    """Embeddings [len(texts), D] by the plain model, one text at a time."""
    rows = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=most)
        with torch.no_grad():
            states = model(tokens["input_ids"]).last_hidden_state[0, skip:]
        how = {"cls": states[0], "lasttoken": states[-1], "mean": states.mean(dim=0)}
        rows.append(how.get(pooling, states.max(dim=0).values))
    return torch.stack(rows)


def embed(retriever, tokenizer, texts: list[str], side: str = "passages", most: int = 30):
    retriever.eval()
    return TextEmbedder(retriever, tokenizer, side, most, 3, torch.device("cpu"))(texts)


def close(ours: np.ndarray, expected: torch.Tensor, atol: float = 1e-5) -> bool:
    return np.allclose(ours, expected.numpy(), atol=atol)


# --- kinds of encoders


@pytest.mark.parametrize("kind", KINDS)
def test_any_encoder_embeds_padded_texts_as_it_does_alone(kind, tmp_path):
    model, own = make_encoder(tmp_path / "encoder", kind)
    for pooling, is_unit in (("cls", True), ("mean", False)):
        settings = {"pooling": pooling, "normalize": is_unit}
        retriever, tokenizer = open_retriever(str(tmp_path / "encoder"), "none", **settings)
        expected = by_hand(model, own, TEXTS, pooling)
        expected = torch.nn.functional.normalize(expected) if is_unit else expected
        assert close(embed(retriever, tokenizer, TEXTS), expected)
    assert len(retriever.layers) == 2
    most = longest(retriever.config)
    full = "a " * 50  # reads as many tokens as it says, and no more
    if kind != "modernbert":
        assert embed(retriever, tokenizer, [full], most=most).shape == (1, SIZE)
        with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
            model(torch.full((1, most + 1), 6))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_retriever_opens_in_transformers(kind, tmp_path):
    make_encoder(tmp_path / "encoder", kind)
    torch.manual_seed(0)
    sizes = {"question_maxlength": 9, "passage_maxlength": 20, "indexing_dimension": 8}
    retriever = start_retriever(str(tmp_path / "encoder"), 0.3, **sizes, question_prefix="query: ")
    assert {p.p for p in retriever.modules() if isinstance(p, torch.nn.Dropout)} <= {0.3, 0.0}
    retriever.save_pretrained(tmp_path / "saved")
    opened, report = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not {key for key in report["missing_keys"] if "pooler" not in key}
    weights = opened.state_dict()
    for name, tensor in retriever.model.state_dict().items():
        assert torch.equal(weights[name], tensor)
    again = load_retriever(str(tmp_path / "saved"))
    assert fingerprint(again) == fingerprint(retriever)
    assert (again.config.question_prefix, again.config.question_maxlength) == ("query: ", 9)


def test_earlier_checkpoints_are_still_read(tmp_path):
    """Those whose weights are named `model.*`."""
    retriever = load_retriever(str(REFERENCE / "legacy_retriever_cls"))
    retriever.save_pretrained(tmp_path)
    for extra in ("modules.json", "model.safetensors"):
        (tmp_path / extra).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("pooling", "head", "side", "two_towers")}
    (tmp_path / "config.json").write_text(json.dumps(kept | {"architectures": ["Retriever"]}))
    save_file(retriever.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert fingerprint(load_retriever(str(tmp_path))) == fingerprint(retriever)


# --- folders of sentence-transformers

CLASSES = "sentence_transformers.models."


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def make_folder(folder: Path, changes: dict[str, Any], modules: str, at: str = "") -> tuple:
    """A RoBERTa in a folder with these modules, and files with other contents."""
    model, tokenizer = make_encoder(folder / at, "roberta")
    names = modules.split()
    listed = [
        {"idx": n, "name": str(n), "path": f"{n}_{name}" if n else at, "type": CLASSES + name}
        for n, name in enumerate(names)
    ]
    files = {"modules.json": listed, f"{at}/sentence_bert_config.json": {"max_seq_length": 24}}
    pooling = {"word_embedding_dimension": SIZE, "pooling_mode_cls_token": True}
    files["1_Pooling/config.json"] = pooling
    for n, name in enumerate(names):
        if name == "Dense":
            dense = {"in_features": SIZE, "out_features": 6, "bias": True}
            activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
            files[f"{n}_Dense/config.json"] = dense | activation
            torch.manual_seed(5)
            linear = torch.nn.Linear(SIZE, 6)
            (folder / f"{n}_Dense").mkdir()
            weights = {f"linear.{key}": value for key, value in linear.state_dict().items()}
            save_file(weights, folder / f"{n}_Dense" / "model.safetensors")
            model.dense = linear
    for name, values in (files | changes).items():
        write(folder / name.lstrip("/"), values)
    return model, tokenizer


E5 = {"prompts": {"query": "query : ", "passage": "passage : "}, "similarity_fn_name": "cosine"}
OLD = {"word_embedding_dimension": SIZE, "pooling_mode_cls_token": False}
# Files changed, modules, and what they mean: pooling, query prefix, passage prefix, tokens skipped.
FOLDERS: dict[str, tuple[dict, str, tuple]] = {
    "cls": ({}, "Transformer Pooling", ("cls", "", "", 0)),
    "normalized": (
        {"1_Pooling/config.json": {**OLD, "pooling_mode_mean_tokens": True}},
        "Transformer Pooling Normalize",
        ("mean", "", "", 0),
    ),
    "e5": (
        {"1_Pooling/config.json": {"embedding_dimension": SIZE, "pooling_mode": "mean"},
         "config_sentence_transformers.json": E5},
        "Transformer Pooling Normalize",
        ("mean", "query : ", "passage : ", 0),
    ),
    "without its prompts": (
        {"1_Pooling/config.json": {**OLD, "pooling_mode_max_tokens": True, "include_prompt": False},
         "config_sentence_transformers.json": E5},
        "Transformer Pooling Dense Normalize",
        ("max", "query : ", "passage : ", 3),
    ),
    "last": (
        {"1_Pooling/config.json": {"pooling_mode": "lasttoken", "embedding_dimension": SIZE}},
        "Transformer Pooling Dense",
        ("lasttoken", "", "", 0),
    ),
    "one prompt": (
        {"config_sentence_transformers.json":
         {"prompts": {"query": "query : "}, "default_prompt_name": None}},
        "Transformer Pooling",
        ("cls", "query : ", "", 0),
    ),
}  # fmt: skip
ONES = [
    pytest.param(name, at, id=f"{name} {at}") for name in FOLDERS for at in ["", "0_Transformer"]
]


@pytest.mark.parametrize(("name", "at"), ONES[:2] + ONES[2::2])
def test_a_folder_of_sentence_transformers_is_applied(name, at, tmp_path):
    changes, modules, (pooling, query, passage, skip) = FOLDERS[name]
    model, own = make_folder(tmp_path / "st", changes, modules, at)
    retriever, tokenizer = open_retriever(str(tmp_path / "st"), "none")
    for side, prefix in (("questions", query), ("passages", passage)):
        rows = by_hand(model, own, [prefix + text for text in TEXTS], pooling, 24, skip)
        if "Dense" in modules:
            rows = torch.tanh(model.dense(rows)).detach()
        rows = torch.nn.functional.normalize(rows) if "Normalize" in modules else rows
        write_question, write_passage = retriever.texts
        texts = [write_passage("", t) if side == "passages" else write_question(t) for t in TEXTS]
        assert close(embed(retriever, tokenizer, texts, side, 24), rows)
    assert retriever.config.passage_maxlength == retriever.config.question_maxlength == 24
    assert write_passage("a title", "is long") == f"{passage}a title is long"
    retriever.save_pretrained(tmp_path / "saved")  # and what is saved here is the same
    assert fingerprint(load_retriever(str(tmp_path / "saved"))) == fingerprint(retriever)


def test_a_folder_says_lower_case(tmp_path):
    sizes = {"max_seq_length": 24, "do_lower_case": True}
    make_folder(tmp_path, {"sentence_bert_config.json": sizes}, "Transformer Pooling")
    retriever, tokenizer = open_retriever(str(tmp_path), "none")
    upper, lower = embed(retriever, tokenizer, ["How long", "how long"])
    assert np.array_equal(upper, lower)


POOLING, CONFIG = "1_Pooling/config.json", "config_sentence_transformers.json"
REFUSED = {
    "LSTM": ({}, "Transformer Pooling LSTM", "modules.json is .*LSTM"),
    "no pooling": ({}, "Transformer", r"modules.json is \['Transformer'\]"),
    "an order": ({}, "Transformer Pooling Normalize Dense", "modules.json is .*Dense"),
    "weights": ({POOLING: {"pooling_mode_weightedmean_tokens": True}}, "Transformer Pooling",
                "pooling_mode_weightedmean_tokens in 1_Pooling/config.json is True"),
    "two": ({POOLING: {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}},
            "Transformer Pooling", r"pooling is \['cls', 'max'\]"),
    "a mode": ({POOLING: {"pooling_mode": "first"}}, "Transformer Pooling",
               "pooling_mode in 1_Pooling/config.json is 'first'"),
    "code": ({"modules.json": [{"path": "", "type": "custom.Transformer"},
                               {"path": "1_Pooling", "type": CLASSES + "Pooling"}]},
             "Transformer Pooling", "modules.json is .*custom"),
    "outside": ({"modules.json": [{"path": "../x", "type": CLASSES + "Transformer"}]},
                "Transformer Pooling", "its modules.json cannot be used .'../x' is outside"),
    "no list": ({"modules.json": {}}, "Transformer Pooling", "its modules.json cannot be used"),
    "distance": ({CONFIG: {"similarity_fn_name": "euclidean"}}, "Transformer Pooling",
                 "similarity_fn_name in .* is 'euclidean'"),
    "activation": ({"2_Dense/config.json": {"out_features": 6, "activation_function": "my.Act"}},
                   "Transformer Pooling Dense", "activation_function in 2_Dense/.* is 'my.Act'"),
    "residual": ({"2_Dense/config.json": {"out_features": 6, "use_residual": True}},
                 "Transformer Pooling Dense", "use_residual in 2_Dense/config.json is True"),
    "a size": ({"2_Dense/config.json": {"out_features": 7}}, "Transformer Pooling Dense",
               r"by its config.json linear.bias is \[7\], but in the weights it is \[6\]"),
    "expansion": ({"sentence_bert_config.json": {"query_expansion": {"length": 32}}},
                  "Transformer Pooling", "query_expansion in sentence_bert_config.json is"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_named(name, tmp_path):
    changes, modules, problem = REFUSED[name]
    make_folder(tmp_path, changes, modules)
    with pytest.raises(InputError, match=problem) as caught:
        load_retriever(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folders_own_settings_are_kept(tmp_path):
    make_folder(tmp_path, FOLDERS["e5"][0], FOLDERS["e5"][1])
    same = {"pooling": "mean", "normalize": True, "question_prefix": "query : "}
    own = fingerprint(load_retriever(str(tmp_path)))
    assert fingerprint(load_retriever(str(tmp_path), **same)) == own
    for name, other in (("pooling", "cls"), ("question_prefix", ""), ("passage_prefix", "x: ")):
        with pytest.raises(InputError, match=f"has {name} .*, not {other}.*leave out --{name}"):
            load_retriever(str(tmp_path), **{name: other})
    plain = Path(tmp_path / "plain")
    make_folder(plain, {}, "Transformer Pooling")  # says nothing of prefixes or length
    given = {"question_prefix": "query: ", "passage_prefix": "passage: ", "normalize": True}
    prints = {fingerprint(load_retriever(str(plain), **{name: given[name]})) for name in given}
    assert len(prints | {fingerprint(load_retriever(str(plain)))}) == 4


# --- sentence-transformers itself, where it is installed


@pytest.mark.parametrize("name", FOLDERS)
def test_equal_to_sentence_transformers(name, tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    make_folder(tmp_path / "st", *FOLDERS[name][:2])
    retriever, tokenizer = open_retriever(str(tmp_path / "st"), "none")
    retriever.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    query, passage = FOLDERS[name][2][1:3]
    for folder in ("st", "saved"):
        theirs = package.SentenceTransformer(str(tmp_path / folder), device="cpu")
        for side, prefix in (("questions", query), ("passages", passage)):
            expected = theirs.encode(TEXTS, prompt=prefix or None, convert_to_tensor=True)
            texts = [prefix + text for text in TEXTS]
            assert close(embed(retriever, tokenizer, texts, side, 24), expected)
    assert theirs.prompts["query"] == query


@pytest.mark.parametrize("why", ["projection_before_pooling", "two_encoders", "unmasked_padding"])
def test_sentence_transformers_refuses_what_it_cannot_express(why, tmp_path):
    make_encoder(tmp_path / "encoder", "bert")
    settings = {"projection": why == "projection_before_pooling", "question_maxlength": 9}
    settings |= {"passage_maxlength": 20, "apply_passage_mask": why != "unmasked_padding"}
    retriever = start_retriever(str(tmp_path / "encoder"), **settings)
    if why == "two_encoders":
        retriever.begin_training(make_tokenizer(tmp_path, 0), two_towers=True)
    retriever.save_pretrained(tmp_path / "saved")
    (module,) = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert module["type"] == f"not_in_sentence_transformers.{why}"
    package = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    with pytest.raises((ImportError, ValueError), match="not_in_sentence_transformers"):
        package.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
