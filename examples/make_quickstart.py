"""Invent the quickstart's small world: a corpus, questions about it, and two models to start from.

    python examples/make_quickstart.py --seed 0 -o quickstart/data

Nothing is downloaded: there are people, rivers and companies with names built from syllables, two
short passages about each, and questions that one of the two answers. Both passages have the name
in their title only, so BM25 finds the right subject but has to guess the passage; that is what the
models can learn. In the output folder:

    passages.tsv                      the collection (id, text, title)
    train.json, dev.json, test.json   questions and answers, about different subjects in each
    train_pairs.json                  the train questions, each with the passage that answers it and
                                      the same kind of passage about another subject
    reader_start/                     a tiny T5, with weights ready to copy, and a tokenizer
    retriever_start/                  a tiny BERT's config and tokenizer (no weights)
"""

import argparse
import csv
import dataclasses
import json
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

# ----------------------------------------------------------------------------------------------
# Words

SYLLABLE = [  # its beginning, its vowel, and its end, which is mostly empty
    part.split(" ")
    for part in (
        "b d f g h k l m n p r s t v z br dr gr kr tr st sk th sh pl",
        "a e i o u ai ea",
        "   n r l s m x d",
    )
]
LAST_NAME_ENDINGS = ["", "", "son", "er", "ov", "ini"]
TOWN_ENDINGS = ["ton", "by", "ville", "burg", "mouth", "", "ham"]
COMMON_NOUNS = {
    kind: words.split()
    for kind, words in {
        "profession": "architect botanist painter lawyer composer sculptor chemist farmer surgeon "
        "poet baker sailor judge geologist printer weaver teacher astronomer clockmaker "
        "photographer dentist engineer historian carpenter violinist gardener potter tailor pilot "
        "translator",
        "product": "bicycles clocks paper lamps boats carpets tea pianos glass cameras soap ropes "
        "pumps chairs paint bricks cheese umbrellas ovens toys",
        "animals": "trout salmon eels pike perch carp otters herons beavers crayfish",
    }.items()
}


# ----------------------------------------------------------------------------------------------
# Facts, and the sentences and questions about them


@dataclasses.dataclass(frozen=True)
class Relation:
    """One fact about a subject: the kind of its value, sentences that state it, and questions.

    `{v}` stands for the value, `{name}` for the subject, `{She}` and `{Her}` for the pronouns. No
    sentence names its subject, and only some share a word with their questions: BM25 finds the
    subject's two passages, but seldom the one that answers.
    """

    value: str
    sentences: list[str]
    questions: list[str]


# Each kind of subject has two passages, each with these relations. Those of a passage are similar:
# one is about towns, say, and the other about people and goods. (The reader's score of a passage is
# a mean over its tokens: the more of them are close to the question, the higher.)
# fmt: off
RELATIONS: dict[str, list[list[Relation]]] = {
    "person": [
        [
            Relation("town",
                ["{She} first saw the light in {v}.", "{Her} cradle stood in {v}."],
                ["Where was {name} born?", "In which town was {name} born?",
                 "What is the birthplace of {name}?"]),
            Relation("town",
                ["{She} died in {v}.", "{Her} grave lies in {v}."],
                ["Where did {name} die?", "In which town is {name} buried?"]),
        ],
        [
            Relation("profession",
                ["{She} worked as the local {v}.", "{Her} trade was that of the {v}."],
                ["What did {name} do for a living?", "What was the profession of {name}?"]),
            Relation("person",
                ["{She} shared a home with {v}.", "{Her} wedding with {v} was a quiet one."],
                ["Who was the spouse of {name}?", "Whom did {name} marry?"]),
        ],
    ],
    "river": [
        [
            Relation("town",
                ["It rises near {v}.", "Its first spring is close to {v}."],
                ["Where does the {name} begin?", "Where is the source of the {name}?"]),
            Relation("town",
                ["It reaches the sea at {v}.", "Its waters meet the coast at {v}."],
                ["Where does the {name} end?", "Where is the mouth of the {name}?"]),
        ],
        [
            Relation("number",
                ["Its length is {v} kilometres.", "Surveyors give {v} kilometres."],
                ["How long is the {name}?", "What is the length of the {name}?"]),
            Relation("animals",
                ["Visitors come to see the {v}.", "It is loved for its {v}."],
                ["Which animals live in the {name}?", "Which wildlife has the {name}?"]),
        ],
    ],
    "company": [
        [
            Relation("person",
                ["It was set up by {v}.", "Its first owner was {v}."],
                ["Who founded the {name}?", "Who was the founder of the {name}?"]),
            Relation("person",
                ["It is led by {v} today.", "Its present head is {v}."],
                ["Who runs the {name}?", "Who is the director of the {name}?"]),
        ],
        [
            Relation("town",
                ["It has its seat in {v}.", "Its goods are sent out from {v}."],
                ["Where is the {name} based?", "In which town is the {name} located?"]),
            Relation("product",
                ["It is known for making {v}.", "Its workshops turn out {v}."],
                ["What does the {name} produce?", "What does the {name} sell?"]),
        ],
    ],
}
# fmt: on
KINDS = ["person"] * 5 + ["river"] * 2 + ["company"] * 2  # by frequency


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage of the collection; ids count from 1, as in DPR's Wikipedia."""

    id: int
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its one answer, the passage with the answer, and the question's template."""

    text: str
    answer: str
    passage: Passage
    wording: str  # with {name} for the subject


class World:
    """Names and facts, drawn from one seed.

    There are fewer names than subjects, so many subjects share a first or last name: a retriever
    has to read both, and BM25 finds near misses.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._taken = _template_words()  # a town called "Where" would spoil the fun
        self.first_names = self._invent_names(120, [""])
        self.last_names = self._invent_names(300, LAST_NAME_ENDINGS)
        self.towns = self._invent_names(150, TOWN_ENDINGS)

    def _invent_names(self, count: int, endings: list[str]) -> list[str]:
        names = []
        while len(names) < count:
            syllables = [self._syllable() for _ in range(2)]
            name = "".join(syllables) + self._random.choice(endings)
            if name not in self._taken:
                self._taken.add(name)
                names.append(name.capitalize())
        return names

    def _syllable(self) -> str:
        return "".join(self._random.choice(part) for part in SYLLABLE)

    def subjects(self, count: int) -> list[tuple[str, str]]:
        """`count` different (kind, name) pairs."""
        found: dict[str, str] = {}
        while len(found) < count:
            kind = self._random.choice(KINDS)
            name = self._person()  # rivers are named after people: near misses of their names
            if kind == "river":
                name += " River"
            elif kind == "company":
                name = " ".join(self._random.sample(self.last_names, 2)) + " Company"
            found.setdefault(name, kind)
        return [(kind, name) for name, kind in found.items()]

    def _person(self) -> str:
        return f"{self._random.choice(self.first_names)} {self._random.choice(self.last_names)}"

    def _value(self, kind: str) -> str:
        if kind in COMMON_NOUNS:
            return self._random.choice(COMMON_NOUNS[kind])
        if kind == "number":
            return str(self._random.randint(20, 299))
        return self._random.choice(self.towns) if kind == "town" else self._person()

    def describe(self, kind: str, name: str, first_id: int) -> tuple[list[Passage], list[Question]]:
        """The two passages about a subject, and a question about each of their facts."""
        she, her = self._random.choice([("She", "Her"), ("He", "His")])
        passages, questions = [], []
        for relations in RELATIONS[kind]:
            sentences, asked = [], []
            for relation in relations:
                value = self._value(relation.value)
                sentence = self._random.choice(relation.sentences)
                # Within a sentence the pronoun is not capitalised; at its start it is.
                sentence = re.sub(r"(?<!^)\{Her\}", her.lower(), sentence)
                sentences.append(sentence.format(v=value, She=she, Her=her))
                asked.append((self._random.choice(relation.questions), value))
            self._random.shuffle(sentences)
            passage = Passage(first_id + len(passages), name, " ".join(sentences))
            passages.append(passage)
            questions += [
                Question(wording.format(name=name), answer, passage, wording)
                for wording, answer in asked
            ]
        return passages, questions


def _template_words() -> set[str]:
    relations = [relation for kind in RELATIONS.values() for half in kind for relation in half]
    texts = [text for relation in relations for text in relation.sentences + relation.questions]
    words = set(re.findall(r"\w+", " ".join(texts).lower()))
    return words.union(mark.rstrip(":") for mark in MARKS).union(*COMMON_NOUNS.values())


# ----------------------------------------------------------------------------------------------
# Models to start from

MARKS = ["question:", "title:", "context:"]  # of the texts that reader and retriever get


def count_words(texts: Iterable[str]) -> list[str]:
    """The lower-cased words and marks of the texts, each once, the most frequent first."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: (-counts[word], word))


def reader_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token per word, with T5's special tokens. Answers come back in lower case and with spaces
    between words, which exact match ignores."""
    vocabulary = ["<pad>", "</s>", "<unk>", *words]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    # Punctuation is split off, but the colon stays with its word, as in "question:" and "title:".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w:]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


# Coordinates of the reader's hidden states that no word uses, one for each signal.
ALWAYS, IS_MARK, IS_QUESTION_MARK, IS_TITLE_MARK = 0, 1, 2, 3  # written in the embeddings
IN_QUESTION, IN_TITLE = 4, 5  # written by encoder layer 0
FOUND_IN_QUESTION, NOT_FOUND = 6, 7  # written by encoder layer 1
OTHER_TITLE = 8  # written by encoder layer 2
N_SIGNALS = 9


def reader_start(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """A tiny T5 whose weights make it easy to learn to look things up and to copy them.

    From fresh weights, training would take hours on a CPU to discover two things that a pretrained
    T5 knows: answers are copied from the text, and names can be compared. So the weights start out
    with both: the decoder copies the tokens it attends to, and attends less to passages with
    another title. Which passage and which words answer a question is left to training. Otherwise
    this is an ordinary T5. (Heads that attend to the previous token, or to the same word further
    left, also arise in training: Olsson et al., 2022, "In-context Learning and Induction Heads".)
    """
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=32, d_ff=128, num_layers=3,
        num_decoder_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    t5 = T5ForConditionalGeneration(config)
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in MARKS]
    with torch.no_grad():
        _lay_out_embeddings(t5, marks)
        _lay_out_distances(t5, config)
        _lay_out_title_match(t5, config)
        _lay_out_decoder(t5, config)
    return t5


def _lay_out_embeddings(t5: T5ForConditionalGeneration, marks: list[int]) -> None:
    """Signals for the three marks, and encoder layers that keep words and signals readable."""
    embeddings = t5.shared.weight
    embeddings[:, :N_SIGNALS] = 0.0
    embeddings[:, ALWAYS] = 2.0
    embeddings[marks, IS_MARK] = 4.0
    embeddings[marks[0], IS_QUESTION_MARK] = 4.0
    embeddings[marks[1], IS_TITLE_MARK] = 4.0
    for block in t5.encoder.block:
        for output in (block.layer[0].SelfAttention.o, block.layer[1].DenseReluDense.wo):
            output.weight.mul_(0.5)
            output.weight[:N_SIGNALS] = 0.0


def _lay_out_distances(t5: T5ForConditionalGeneration, config: T5Config) -> None:
    """The encoder's heads attend to: the previous token (head 0), the next one (1), tokens close by
    on the left (2), any token but rather on the left (3)."""
    # The table [bucket, head] is shared by all layers. Its first half is for keys at or before
    # the query, by distance; the second for keys after it.
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    after = config.relative_attention_num_buckets // 2
    bias.zero_()
    bias[1, 0] = 4.0
    bias[after + 1, 1] = 4.0
    bias[:after, 2] = -0.5 * torch.arange(after)
    bias[after:, 2] = -8.0
    bias[0, 3] = -4.0  # itself
    bias[after + 1 :, 3] = -4.0


def _lay_out_title_match(t5: T5ForConditionalGeneration, config: T5Config) -> None:
    """Signal at every token of a passage whether its title has words that are not in the question.

    Layer 0: each token learns from the nearest mark on its left whether it is in the question or
    in the title. Layer 1: it attends to the same word further left or, if there is none, to
    itself; so a title's word gets a signal from the question or from the title. Layer 2: all
    tokens attend to words of the title that were not found.
    """
    layers = [block.layer[0].SelfAttention for block in t5.encoder.block]

    def pass_on(layer: int, head: int, slot: int, source: int, target: int) -> None:
        """Let a head copy a coordinate of the tokens it attends to into one of its own token."""
        row = head * config.d_kv + slot
        layers[layer].v.weight[row] = 0.0
        layers[layer].o.weight[:, row] = 0.0
        layers[layer].v.weight[row, source] = 1.0
        layers[layer].o.weight[target, row] = 1.0

    def look_for(layer: int, head: int, weights: dict[int, float]) -> None:
        """Let a head attend to tokens with these coordinates."""
        rows = slice(head * config.d_kv, (head + 1) * config.d_kv)
        layers[layer].q.weight[rows] = 0.0
        layers[layer].k.weight[rows] = 0.0
        layers[layer].q.weight[rows.start, ALWAYS] = 2.0
        for coordinate, weight in weights.items():
            layers[layer].k.weight[rows.start, coordinate] = weight

    look_for(0, 2, {IS_MARK: 1.0})
    pass_on(0, 2, 0, IS_QUESTION_MARK, IN_QUESTION)
    pass_on(0, 2, 1, IS_TITLE_MARK, IN_TITLE)

    words = slice(3 * config.d_kv, 4 * config.d_kv)
    layers[1].k.weight[words] = 0.0
    torch.nn.init.orthogonal_(layers[1].k.weight[words, N_SIGNALS:])
    # Equal words then have a score of about 12, different ones about 0.
    layers[1].q.weight[words] = 20.0 / config.d_kv * layers[1].k.weight[words]
    pass_on(1, 3, 0, IN_QUESTION, FOUND_IN_QUESTION)
    pass_on(1, 3, 1, IN_TITLE, NOT_FOUND)

    look_for(2, 3, {NOT_FOUND: 1.0, IS_MARK: -2.0})  # marks are never found
    pass_on(2, 3, 0, NOT_FOUND, OTHER_TITLE)


def _lay_out_decoder(t5: T5ForConditionalGeneration, config: T5Config) -> None:
    """Let the decoder copy, and attend less to passages with another title."""
    for block in t5.decoder.block:
        cross_attention = block.layer[1].EncDecAttention
        # The decoder receives tokens unchanged: the output undoes the value projection.
        torch.nn.init.orthogonal_(cross_attention.v.weight)
        cross_attention.o.weight.copy_(cross_attention.v.weight.T)
        first_rows = [head * config.d_kv for head in range(config.num_heads)]
        cross_attention.q.weight[first_rows] = 0.0
        cross_attention.k.weight[first_rows] = 0.0
        cross_attention.q.weight[first_rows, ALWAYS] = 1.0
        cross_attention.k.weight[first_rows, OTHER_TITLE] = -1.0


def write_retriever_start(folder: Path, words: list[str]) -> None:
    """A tiny BERT's config and tokenizer, with one token per word; train_retriever.py makes the
    weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = BertTokenizerFast(
        vocab={word: i for i, word in enumerate(vocabulary)}, do_lower_case=True
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=0,
        # Five times BERT's: from smaller weights, this model is slow to distinguish names.
        initializer_range=0.1,
    )  # fmt: skip
    config.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------
# Files


def write_passages(file: Path, passages: list[Passage]) -> None:
    with open(file, "w", newline="") as target:
        writer = csv.writer(target, delimiter="\t", lineterminator="\n")
        writer.writerow(["id", "text", "title"])
        writer.writerows([passage.id, passage.text, passage.title] for passage in passages)


def write_questions(
    file: Path, questions: list[Question], split: str, others: list[Passage] | None = None
) -> None:
    """A list of questions in the reader's input format. With `others`, a passage for each, the
    contexts are the right passage and this one."""
    examples = []
    for number, question in enumerate(questions):
        example = {"id": f"{split}-{number}", "question": question.text}
        example["answers"] = [question.answer]
        if others is not None:
            found = [dataclasses.asdict(passage) for passage in (question.passage, others[number])]
            example["ctxs"] = [passage | {"id": str(passage["id"])} for passage in found]
        examples.append(example)
    file.write_text(json.dumps(examples, indent=1) + "\n")


def other_subjects(questions: list[Question], rng: random.Random) -> list[Passage]:
    """For each question, the passage for another question with the same wording."""
    alike: dict[str, list[Passage]] = {}
    for question in questions:
        alike.setdefault(question.wording, []).append(question.passage)
    others = []
    for question in questions:
        other = question.passage
        while other.title == question.passage.title:
            other = rng.choice(alike[question.wording])
        others.append(other)
    return others


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world")
    parser.add_argument("-o", "--output", default="quickstart/data", help="folder to write into")
    parser.add_argument("--subjects", type=int, default=5000, help="people, rivers and companies")
    parser.add_argument(
        "--held_out", type=int, default=150, help="subjects for each of dev and test"
    )
    options = parser.parse_args(arguments)
    if options.subjects <= 2 * options.held_out:
        parser.error("--subjects must be more than twice --held_out, or none is left to train on")
    target = Path(options.output)
    if target.exists():
        parser.error(f"{target} is there already: remove it, or give another folder with -o")
    # Written under another name and renamed at the end, so that it is complete or absent.
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    # The world. Subjects are in random order, so the first ones are a random sample.
    world = World(options.seed)
    passages: list[Passage] = []
    questions: dict[str, list[Question]] = {"dev": [], "test": [], "train": []}
    for number, (kind, name) in enumerate(world.subjects(options.subjects)):
        new_passages, new_questions = world.describe(kind, name, first_id=len(passages) + 1)
        passages += new_passages
        split = ["dev", "test"][number // options.held_out] if number < 2 * options.held_out else ""
        questions[split or "train"] += new_questions
    write_passages(folder / "passages.tsv", passages)
    for split, group in questions.items():
        write_questions(folder / f"{split}.json", group, split)
    others = other_subjects(questions["train"], random.Random(options.seed))
    write_questions(folder / "train_pairs.json", questions["train"], "train", others)

    transformers.utils.logging.disable_progress_bar()
    # The models. Their vocabulary is that of the collection and the train questions.
    words = count_words(
        [passage.title for passage in passages]
        + [passage.text for passage in passages]
        + [question.text for question in questions["train"]]
    )
    torch.manual_seed(options.seed)
    tokenizer = reader_tokenizer([*MARKS, *words])
    t5 = reader_start(tokenizer)
    t5.save_pretrained(folder / "reader_start")
    tokenizer.save_pretrained(folder / "reader_start")
    # The retriever's texts have the same marks, which BERT's tokenizer splits at the colon.
    marks = [":", *(mark.rstrip(":") for mark in MARKS)]
    write_retriever_start(folder / "retriever_start", marks + words)
    folder.rename(target)
    counts = ", ".join(f"{len(group)} {split}" for split, group in questions.items())
    print(f"{target}: {len(passages)} passages, {counts} questions, {len(words)} words")


if __name__ == "__main__":
    main()
