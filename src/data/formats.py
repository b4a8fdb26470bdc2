"""Questions in other people's formats, under our names; docs/formats.md lists them."""

import ast
import contextlib
import csv
import json
import re
import unicodedata
import warnings

import regex

from src.data.files import tsv_reader
from src.data.json_files import BadValue
from src.data.passages import split_contents
from src.runtime.errors import shorten

ROWS = (".csv", ".tsv", ".txt")  # names of files with DPR's rows
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_STRINGS = re.compile(rf"\[\s*(?:{_STRING}\s*(?:,\s*{_STRING}\s*)*,?)?\s*\]")


def parse_row(line: str) -> dict:
    """An example from a row of DPR's: question, tab, the answers as a Python list of texts; or of
    MS MARCO's: a number, tab, question.

    Fields are quoted as `csv` writes them. Errors: `BadValue`.
    """
    line = line + "\n"
    try:
        fields = next(tsv_reader([line]))
    except csv.Error as error:
        raise BadValue(f"not a row of TSV ({error}); correct it, or give JSON") from None
    if len(fields) != 2 or fields[1].endswith("\n"):  # an open quote mark takes the line's end in
        raise BadValue(
            "a row must be a question, a tab and a list of answers like ['Paris', 'Lyon'], not "
            f"{shorten(line, 60)}; correct it, or give JSON"
        )
    question, answers = fields[0], fields[1].strip()
    if re.fullmatch("[0-9]+", question) and answers and answers[0] not in "[(\"'":
        return {"id": question, "question": answers}
    with warnings.catch_warnings(), contextlib.suppress(ValueError, SyntaxError):
        warnings.simplefilter("ignore")  # about backslashes that mean nothing
        if _STRINGS.fullmatch(answers):  # Python's parser of literals sees nothing but strings
            return {"question": question, "answers": ast.literal_eval(answers)}
    raise BadValue(
        "the answers of a row must be a list of texts like ['Paris', 'Lyon'], not "
        f"{shorten(answers, 60)}; correct it, or give JSON"
    )


FIELDS = ("id", "question", "target", "answers", "ctxs")
_THEIRS = {  # other people's names of our fields (docs/formats.md says whose)
    "question": ("query", "Question"),
    "id": ("_id", "query_id", "question_id", "QuestionId"),
    "answers": ("answer", "golden_answers", "possible_answers", "Answer"),
}


def with_our_names(example: dict) -> dict:
    """The example under the names of our format, if it has those of another. Errors: `BadValue`."""
    present = {
        ours: [name for name in (ours, *theirs) if name in example]
        for ours, theirs in _THEIRS.items()
    }
    found = {ours: names[0] for ours, names in present.items() if names}
    outputs, contexts = example.get("output", []), example.get("contexts")
    if "question" not in found:
        if "input" in example and "instruction" not in example and isinstance(outputs, list):
            found["question"] = "input"  # KILT
            if outputs:
                found.setdefault("answers", "output")
        elif "_id" in example and "text" in example:
            found["question"] = "text"  # BEIR
    names = {theirs: ours for ours, theirs in found.items()}
    ours = {names.get(name, name): value for name, value in example.items()}
    if "answers" in found:
        ours = _with_texts(ours, found["answers"])
    is_run = "ctxs" not in ours and isinstance(contexts, list) and contexts
    if is_run and all(isinstance(one, dict) and "docid" in one for one in contexts):
        ours["ctxs"] = list(map(_pyserini_context, ours.pop("contexts")))
    return ours


def _with_texts(example: dict, name: str) -> dict:
    """The example with its `answers`, which were called `name`, as a list of texts."""
    answers = example["answers"]
    if isinstance(answers, str) and name != "answers":
        is_json = re.match(r"\s*\[\s*[\"\]]", answers)  # PopQA's list is a text of JSON
        try:
            answers = json.loads(answers) if is_json else [answers]
        except (ValueError, RecursionError):
            raise BadValue(f'"{name}" is not a list in JSON: {shorten(answers)}') from None
    elif isinstance(answers, dict):  # TriviaQA's, or a row of SQuAD in Hugging Face's datasets
        value = answers.get("Value", answers.get("value"))
        if isinstance(value, str) and "target" not in example:  # as FiD's own data has it
            example = {**example, "target": value.title() if value.isupper() else value}
        lists = [answers[part] for part in ("Aliases", "aliases", "text") if part in answers]
        answers = lists[0] if lists else answers
    elif name == "output":  # KILT: some only have a source
        answers = [one["answer"] for one in answers if isinstance(one, dict) and "answer" in one]
    return {**example, "answers": answers}


def _pyserini_context(context: dict) -> dict:
    """A passage of a run that pyserini wrote in DPR's format."""
    context = {{"docid": "id", "has_answer": "hasanswer"}.get(k, k): v for k, v in context.items()}
    if isinstance(context.get("text"), str) and "title" not in context:
        context["title"], context["text"] = split_contents(context["text"])
    return context


class Pattern(str):
    """An answer that is a regular expression, as CuratedTREC's are."""

    def __init__(self, pattern: str):
        try:
            self._compile()
        except regex.error as error:
            raise BadValue(f": {shorten(pattern)} is no regular expression ({error})") from None

    def _compile(self) -> regex.Pattern:  # the library keeps what it has compiled
        pattern = unicodedata.normalize("NFD", self)
        return regex.compile(pattern, regex.IGNORECASE | regex.UNICODE | regex.MULTILINE)

    def finds(self, text: str, from_start: bool = False) -> bool:
        """Whether it is in the text, or at its start. Source: DrQA (Chen et al., 2017) and DPR."""
        find = self._compile().match if from_start else self._compile().search
        return find(unicodedata.normalize("NFD", text)) is not None
