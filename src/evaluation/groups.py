"""Questions by kind: results are printed for each."""

from collections.abc import Callable, Sequence

from src.data.examples import Example, Examples, load_data, read_example
from src.evaluation.answers import normalize_answer
from src.runtime.errors import InputError

TYPES = ("how many", "how much", "who", "what", "when", "where", "which", "why", "how", "other")
Group = Callable[[Example], tuple[int, str]]  # a group's position in a table, and its name


def question_type(question: str) -> str:
    """The first word, or "how many" and "how much"; "other" for a word that asks nothing."""
    beginning = f"{normalize_answer(question)} "
    return next((kind for kind in TYPES if beginning.startswith(f"{kind} ")), TYPES[-1])


def answer_length(answers: Sequence[str]) -> int:
    """Words of the shortest gold answer, normalised."""
    return min(len(normalize_answer(answer).split()) for answer in answers)


def by_type(example: Example) -> tuple[int, str]:
    kind = question_type(example.question)
    return TYPES.index(kind), kind


def by_length(example: Example) -> tuple[int, str]:
    n = min(answer_length(example.answers), 6)
    return n, "1 word" if n == 1 else f"{n}{'+' * (n == 6)} words"


def by_overlap(train: Examples) -> Group:
    """Groups by whether training had the question (after normalisation), or else one of its gold
    answers. Paraphrased questions are not found (Lewis et al., 2021, marked those by hand)."""
    questions, answers = set(), set()
    for index in range(len(train)):
        example = read_example(train, index)
        questions.add(normalize_answer(example.question))
        answers.update(map(normalize_answer, [*example.answers, example.target or ""]))
    answers.discard("")

    def group(example: Example) -> tuple[int, str]:
        if normalize_answer(example.question) in questions:
            return 0, "question in training data"
        if answers & set(map(normalize_answer, example.answers)):
            return 1, "only answer in training data"
        return 2, "neither in training data"

    return group


def group_questions(
    data: Examples, indices: Sequence[int], by: Sequence[str], train_data: str | None
) -> dict[str, list[int]]:
    """For each kind by "type", "length" and "overlap" (with `train_data`, a data file), which of
    the examples at these indices are of it, as positions in `indices`. Errors: `InputError`."""
    if "overlap" in by and not train_data:
        raise InputError("--by overlap: --train_data must name the file of training questions")
    kinds: dict[str, Group] = {"type": by_type, "length": by_length}
    if "overlap" in by:
        kinds["overlap"] = by_overlap(load_data(train_data))
    groups: dict[tuple[int, int, str], list[int]] = {}
    for number, name in enumerate(by):
        for position, index in enumerate(indices):
            key = number, *kinds[name](read_example(data, index))
            groups.setdefault(key, []).append(position)
    return {key[-1]: groups[key] for key in sorted(groups)}
