"""Texts to token ids and back, compared with plain code that follows transformers 3.0.2's rules."""

import itertools
import json
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import ByT5Tokenizer, T5Tokenizer

import test_reader
import train_reader
from src.data.batches import ReaderCollator, ReaderItem, TextCollator, encode_texts
from src.models.pretrained import decode_answers, load_tokenizer, save_tokenizer
from tests.conftest import REFERENCE

SPIECE = SentencePieceProcessor(model_file=str(REFERENCE / "t5" / "spiece.model"))
# Characters of an old Unicode version, which every library's tables know.
KNOWN = [
    chr(i)
    for i in range(0x110000)
    if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Co", "Cs")
]
MARKS = [c for c in KNOWN if unicodedata.category(c).startswith("M")]
COMPATIBILITY = [c for c in KNOWN if unicodedata.normalize("NFKC", c) != c]
SPACES = [" ", "  ", "\n", "\t", "\r", "\x0b", "\x1c", "\x85", "\xa0", "\u1680", "\u200b", "\u2028",
          "\u3000", "\ufeff", "\0", "\x7f", "\u2581"]  # fmt: skip


def make_texts(special: list[str]) -> list[str]:
    """Strings that tokenizers disagree about, of a few kinds."""
    draw = random.Random(0)
    kinds = {
        "compatibility character with a mark": lambda: (
            "ab" + draw.choice(COMPATIBILITY) + draw.choice(MARKS) + "cd e"
        ),
        "stacked marks": lambda: (
            draw.choice("aeiouAE\u0130") + "".join(draw.choices(MARKS, k=draw.randint(1, 4))) + "x"
        ),
        "any characters": lambda: "".join(draw.choices(KNOWN, k=6)),
        "spaces": lambda: "".join(draw.choices(["a", "b", ".", *SPACES], k=8)),
        "special tokens": lambda: "".join(
            draw.choices(["a", "b c", "<", ">", "<s>", *SPACES[:10], *special], k=7)
        ),
    }
    texts = [make() for make in kinds.values() for _ in range(300)]
    return texts + ["", " ", "\x85", "\ufb01\u0301", "\u00bd\u0301", "\ufdf2\u064f", "a\x85b"]


def split_at_special(text: str, special: list[str]) -> list[str]:
    """As slow tokenizers did: split at one special token after the other, without the spaces
    around them."""
    parts = [text]
    for token in special:
        split = []
        for part in parts:
            pieces = [part] if part in special else part.split(token)
            for i, piece in enumerate(pieces):
                piece = piece.rstrip() if i + 1 < len(pieces) else piece
                split += [token] if i else []
                split.append(piece.lstrip() if i else piece)
        parts = split
    return [part for part in parts if part.strip()]


def t5_ids(text: str) -> list[int]:
    special = {f"<extra_id_{i}>": 799 - i for i in range(100)}
    special |= {"<pad>": 0, "</s>": 1, "<unk>": 2}
    parts = split_at_special(text, list(special))
    rows = [[special[part]] if part in special else SPIECE.encode(part) for part in parts]
    return list(itertools.chain(*rows))


@pytest.fixture(scope="module")
def t5() -> T5Tokenizer:
    return load_tokenizer(str(REFERENCE / "t5"), "none")


# ----------------------------------------------------------------------------------------------
# Token ids


def test_ids_of_unusual_text(t5):
    texts = make_texts(["</s>", "<pad>", "<unk>", "<extra_id_1>", "<extra_id_10>", "<extra_id_"])
    found = encode_texts(t5, texts, None)
    different = [ascii(text) for text, ids in zip(texts, found, strict=True) if ids != t5_ids(text)]
    assert not different
    assert encode_texts(t5, texts, 3) == [ids[:3] for ids in found]


def test_batches_of_unusual_text(t5):
    texts = make_texts(["</s>"])[::50]
    items = [ReaderItem(i, [text, "b " + text], text) for i, text in enumerate(texts)]
    batch = ReaderCollator(t5, 8, answer_maxlength=5)(items)
    for row, text in enumerate(texts):
        for n, passage in enumerate([text, "b " + text]):
            ids = t5_ids(passage)[:8]
            assert batch["input_ids"][row, n].tolist() == ids + [0] * (8 - len(ids)), ascii(text)
        # The original appended " </s>", and lost it when a target was cut.
        ids = t5_ids(text + " </s>")[:-1][:4] + [1]
        assert batch["labels"][row].tolist() == ids + [-100] * (5 - len(ids)), ascii(text)


def test_a_saved_tokenizer_gives_the_same_ids(t5, tmp_path):
    texts = make_texts(["</s>"])
    save_tokenizer(t5, tmp_path / "a")
    again = load_tokenizer(str(tmp_path / "a"), "none")
    save_tokenizer(again, tmp_path / "b")
    (tmp_path / "a" / "spiece.model").unlink()  # nothing is read from there any more
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert encode_texts(again, texts, None) == encode_texts(t5, texts, None)
    saved = load_tokenizer(str(tmp_path / "b"), "none")
    assert encode_texts(saved, texts, None) == encode_texts(t5, texts, None)


def test_a_tokenizer_json_with_another_vocabulary_counts(t5, tmp_path):
    """`spiece.model` is used where it has the vocabulary that Transformers uses, not otherwise."""
    save_tokenizer(t5, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[300], vocabulary[301] = vocabulary[301], vocabulary[300]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    changed = load_tokenizer(str(tmp_path), "none")
    text = SPIECE.decode([300, 301, 302])
    expected = changed(text, add_special_tokens=False)["input_ids"]
    assert encode_texts(changed, [text], None) == [expected]


def test_tokenizers_without_a_spiece_model(tmp_path):
    save_tokenizer(ByT5Tokenizer(), tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "none")
    assert encode_texts(tokenizer, ["a b", "é"], None) == [[100, 35, 101], [198, 172]]
    assert encode_texts(tokenizer, ["abc"], 2) == [[100, 101]]


# ----------------------------------------------------------------------------------------------
# The retriever's

BERT_SPECIAL = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
CJK = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2F800, 0x2FA1F)]
# Their category has changed since; transformers 3.0.2 and the tokenizers library differ on them.
CHANGED = {"\u166d", "\u1734", "\u1885", "\u1886"}


def bert_words(text: str) -> list[str]:
    """BERT's uncased words: no controls, CJK apart, lower case, no accents, punctuation apart."""
    spaced = ""
    for c in text:
        category = unicodedata.category(c)
        if c in "\t\n\r" or category == "Zs":
            spaced += " "
        elif any(low <= ord(c) <= high for low, high in CJK):
            spaced += f" {c} "
        elif category[0] != "C" and c != "\ufffd":
            spaced += c
    words = []
    for word in spaced.split():
        for c in unicodedata.normalize("NFD", word.lower()):
            category = unicodedata.category(c)
            ascii_symbol = c < "\x7f" and not c.isalnum()
            if category != "Mn":
                words += [f" {c} "] if category[0] == "P" or ascii_symbol else [c]
        words.append(" ")
    return "".join(words).split()


def bert_ids(text: str, vocabulary: dict[str, int]) -> list[int]:
    ids = []
    for part in split_at_special(text, BERT_SPECIAL):
        for word in [part] if part in BERT_SPECIAL else bert_words(part):
            start, pieces = 0, []
            while start < len(word) and word not in BERT_SPECIAL and len(word) <= 100:
                prefix = "##" if start else ""
                ends = range(len(word), start, -1)
                end = next((e for e in ends if prefix + word[start:e] in vocabulary), None)
                if end is None:
                    pieces = []
                    break
                pieces.append(vocabulary[prefix + word[start:end]])
                start = end
            ids += pieces or [vocabulary[word if word in BERT_SPECIAL else "[UNK]"]]
    return ids


def test_ids_of_unusual_text_for_a_retriever():
    lines = (REFERENCE / "bert" / "vocab.txt").read_text().split("\n")
    vocabulary = {word: i for i, word in enumerate(lines)}
    texts = [t for t in make_texts(["[SEP]", "[MASK]", "[UNK]", "[X]"]) if not set(t) & CHANGED]
    tokenizer = load_tokenizer(str(REFERENCE / "bert"), "none")
    ids, mask = TextCollator(tokenizer, 64, fixed_length=False)(texts)
    begin, end = vocabulary["[CLS]"], vocabulary["[SEP]"]
    different = [
        ascii(text)
        for text, row, real in zip(texts, ids, mask, strict=True)
        if row[real].tolist() != [begin, *bert_ids(text, vocabulary)[:62], end]
    ]
    assert not different


# ----------------------------------------------------------------------------------------------
# Answers


class Texts:
    """Decodes each row of ids to a text of this list."""

    clean_up_tokenization = T5Tokenizer.clean_up_tokenization

    def __init__(self, texts: list[str], clean_up: bool):
        self.texts = texts
        self.clean_up_tokenization_spaces = clean_up

    def batch_decode(self, tokens: torch.Tensor, **kwargs) -> list[str]:
        assert kwargs == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.texts


def decode(*texts: str, clean_up: bool = True) -> list[str]:
    return decode_answers(Texts(list(texts), clean_up), torch.zeros(len(texts), 1))


def test_answers_are_cleaned_up():
    written = [
        "Bob 's",
        "do n't",
        "Mr . X",
        "a , b",
        "who ?",
        "I 'm",
        "they 've we 're",
        "rock ' n",
    ]
    cleaned = ["Bob's", "don't", "Mr. X", "a, b", "who?", "I'm", "they've we're", "rock'n"]
    assert decode(*written, clean_up=False) == written
    assert decode(*written) == cleaned
    # In their order: the apostrophe between spaces goes first. Other spaces stay.
    written, cleaned = "a ' s|a  .|' s|a ; b| . |5 'll|X ' .", "a's|a .|' s|a ; b|.|5 'll|X '."
    assert decode(*written.split("|")) == cleaned.split("|")


def test_tokens_are_decoded_as_sentencepiece_does(tmp_path):
    """A folder's tokenizer_config.json does not decide whether they are cleaned up."""
    save_tokenizer(load_tokenizer(str(REFERENCE / "t5"), "none"), tmp_path)
    file = tmp_path / "tokenizer_config.json"
    content = json.loads(file.read_text())
    for in_folder in (True, False):
        file.write_text(json.dumps({**content, "clean_up_tokenization_spaces": in_folder}))
        tokenizer = load_tokenizer(str(tmp_path), "none")
        assert decode_answers(tokenizer, torch.tensor([SPIECE.encode("a , b .")])) == ["a, b."]
        tokenizer.clean_up_tokenization_spaces = False
        tokens = torch.randint(0, 800, (400, 12), generator=torch.Generator().manual_seed(0))
        raw = [SPIECE.decode([i for i in row if 3 <= i < 700]).strip() for row in tokens.tolist()]
        assert decode_answers(tokenizer, tokens) == raw


@pytest.mark.parametrize("clean_up", [True, False])
def test_the_scripts_judge_and_write_clean_answers(clean_up, tmp_path, monkeypatch):
    monkeypatch.setattr(T5Tokenizer, "batch_decode", lambda self, rows, **_: ["Bob 's"] * len(rows))
    examples = json.loads((REFERENCE / "data.json").read_text())[:2]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{**example, "answers": ["Bob's"]} for example in examples]))
    shared = ["--eval_data", data, "--model_path", REFERENCE / "t5", "--checkpoint_dir", tmp_path]
    shared += ["--text_maxlength", 16, "--num_workers", 0, *([] if clean_up else ["--no_clean_up"])]
    train = ["--train_data", data, "--total_steps", 1, "--eval_freq", 1, "--name", "run"]
    train_reader.main(list(map(str, [*train, *shared])))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scores = {key: value for line in lines for key, value in json.loads(line).items()}
    assert scores["dev/exact_match"] == (100.0 if clean_up else 0.0)
    test_reader.main(list(map(str, ["--name", "test", "--write_results", *shared])))
    lines = Path(tmp_path / "test" / "final_output.txt").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines] == ["Bob's" if clean_up else "Bob 's"] * 2
