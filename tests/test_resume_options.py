"""What becomes of each training option that has changed when a run is resumed."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train_reader
import train_retriever
from src import options as all_options
from src.data.batches import RetrieverDataset, _passage_key, training_batches
from src.data.examples import load_data
from src.models import pretrained
from src.models.pretrained import load_tokenizer
from src.options import LossOptions
from src.training import run
from tests.conftest import REFERENCE

SCRIPTS = {"reader": train_reader, "retriever": train_retriever}
PARSERS = {
    "reader": all_options.train_reader_parser,
    "retriever": all_options.train_retriever_parser,
}


class Reached(Exception):
    """The run has come as far as the test wants to see."""


def command(kind: str, data: Path, folder: Path) -> list[str]:
    at = REFERENCE / "t5" if kind == "reader" else REFERENCE / "legacy_retriever_mask_mean"
    more = ["--text_maxlength", 32] if kind == "reader" else ["--tokenizer", REFERENCE / "bert"]
    command = [
        "--train_data", data, "--eval_data", data, "--model_path", at, "--n_context", 2,
        "--scheduler", "linear", "--warmup_steps", 4, "--total_steps", 2, "--eval_freq", 9,
        "--num_workers", 0, "--checkpoint_dir", folder, "--name", "run", *more,
    ]  # fmt: skip
    return [str(word) for word in command]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with a run of two updates of each script."""
    folder = tmp_path_factory.mktemp("begun")
    examples = json.loads((REFERENCE / "data.json").read_text())
    examples = [example for example in examples if example.get("ctxs")]
    for context in (context for example in examples for context in example["ctxs"]):
        context["scores"] = {"attention": context["score"], "perplexity": 7.0, "has_answer": 0.0}
    for example in examples:
        example["ctxs"][0]["scores"]["has_answer"] = 1.0
    (folder / "data.json").write_text(json.dumps(examples[:9]))
    (folder / "other.json").write_text(json.dumps(examples[9:14]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_reader.answer_questions", lambda *_, **__: itertools.repeat([]))
        patch.setattr("src.training.metrics.Average.value", lambda self: 1.0)
        for kind, script in SCRIPTS.items():
            script.main(command(kind, folder / "data.json", folder / kind))
    return folder


def resume(kind: str, begun: Path, folder: Path, *more: object) -> SimpleNamespace:
    """What the loop is given when the run is resumed with more options."""
    shutil.copytree(begun / kind, folder / kind, symlinks=True)
    seen = SimpleNamespace(compiled=False, sharded=False, data=begun / "data.json")

    def train(state, loss_function, batches, learning_rate, checkpoints, *others, **_):
        seen.state, seen.batch, seen.rate = state, next(batches), learning_rate
        seen.loss_function, seen.keep = loss_function, checkpoints._keep
        (*_, seen.settings, seen.evaluation) = others
        raise Reached

    def tokenizer_files(tokenizer, checkpoint):
        seen.cleans_up = tokenizer.clean_up_tokenization_spaces
        return {}

    def make_loader(dataset, batches, collate, num_workers, *others):
        seen.n_workers = num_workers
        return original(dataset, batches, collate, 0, *others)

    original = run.make_loader
    words = [*command(kind, begun / "data.json", folder / kind), "--total_steps", "12"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train", train)
        patch.setattr(pretrained, "compile_layers", lambda layers: setattr(seen, "compiled", True))
        patch.setattr(run.sharding, "shard", lambda *given: setattr(seen, "sharded", given[3]))
        patch.setattr(run, "make_loader", make_loader)
        patch.setattr(run, "_tokenizer_files", tokenizer_files)
        patch.setattr(
            run.distributed, "start", lambda _, timeout: setattr(seen, "timeout", timeout)
        )
        with pytest.raises(Reached):
            SCRIPTS[kind].main([*words, *map(str, more)])
    assert seen.state.position.step == 2
    return seen


@pytest.fixture(scope="module")
def unchanged(begun, tmp_path_factory) -> dict[str, SimpleNamespace]:
    return {kind: resume(kind, begun, tmp_path_factory.mktemp("same")) for kind in SCRIPTS}


def group(seen: SimpleNamespace) -> dict[str, Any]:
    (group,) = seen.state.optimizer.param_groups
    return group


def indexes(seen: SimpleNamespace) -> list[int]:
    return seen.batch["index"]


def expected(n: int, size: int, seed: int) -> list[int]:
    return [index for _, index in next(training_batches(n, size, 0, 1, seed, 2))]


def answering(seen: SimpleNamespace) -> tuple:
    """What the dev evaluation asks of generation."""
    asked = []

    def answer(*arguments, **more):
        options = arguments[-1]
        asked.extend([options.generation_max_length, options.num_beams, options.decoder])
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_reader.answer_questions", answer)
        with pytest.raises(Reached):
            seen.evaluation.run()
    return tuple(asked)


def has_title(seen: SimpleNamespace) -> bool:
    tokenizer = load_tokenizer(str(REFERENCE / "t5"), "none")
    return "title:" in tokenizer.decode(seen.batch["input_ids"][0, 0])


def has_title_key(seen: SimpleNamespace) -> bool:
    """Whether the first passage's key is that of its text with its title."""
    item = RetrieverDataset(load_data(seen.data), 2)[0, indexes(seen)[0]]
    return seen.batch["passage_keys"][0, 0].item() == _passage_key(item.passages[0])


def loss_options(seen: SimpleNamespace) -> LossOptions:
    return seen.loss_function.keywords["options"]


def dropouts(seen: SimpleNamespace) -> set[float]:
    return {module.p for module in seen.state.model.modules() if hasattr(module, "p")} - {0.0}


# What an option becomes, and where it shows: (the new words, what is seen, its value with and
# without them). None of them: the option cannot change.
Change = tuple[list, Callable[[SimpleNamespace], Any], Any, Any]
BOTH: dict[str, Change] = {
    "lr": ([0.5], lambda seen: seen.rate(2), 0.25, 5e-5),
    "optim": (["adamw"], lambda seen: (group(seen)["weight_decay"],
              group(seen)["decoupled_weight_decay"]), (0.1, True), (0.0, False)),
    "weight_decay": ([0.3, "--optim", "adamw"], lambda seen: group(seen)["weight_decay"], 0.3, 0.0),
    "scheduler": (["fixed"], lambda seen: seen.rate(2), 1e-4, 5e-5),
    "warmup_steps": ([8], lambda seen: seen.rate(2), 2.5e-5, 5e-5),
    "total_steps": ([20], lambda seen: (seen.settings.total_steps, round(seen.rate(8), 9)),
                    (20, 7.5e-5), (12, 5e-5)),
    "scheduler_steps": ([36], lambda seen: seen.rate(20), 5e-5, 0.0),
    "fixed_lr": ([], lambda seen: seen.rate(20), 1e-4, 0.0),
    "accumulation_steps": ([3], lambda seen: seen.settings.accumulation_steps, 3, 1),
    "clip": ([0.2], lambda seen: seen.settings.clip, 0.2, 1.0),
    "dropout": ([0.4], dropouts, {0.4}, {0.1}),
    "precision": (["fp16"], lambda seen: (seen.settings.precision,
                  seen.state.scaler.is_enabled()), ("fp16", True), ("fp32", False)),
    "eval_freq": ([7], lambda seen: seen.settings.eval_freq, 7, 9),
    "save_freq": ([7], lambda seen: seen.settings.save_freq, 7, 5000),
    "keep_checkpoints": ([4], lambda seen: seen.keep, 4, 0),
    "seed": ([5], indexes, expected(9, 1, 5), expected(9, 1, 0)),
    "per_gpu_batch_size": ([3], indexes, expected(9, 3, 0), expected(9, 1, 0)),
    "train_data": (["OTHER"], indexes, expected(5, 1, 0), expected(9, 1, 0)),
    "eval_data": (["none"], lambda seen: seen.evaluation is None, True, False),
    "num_workers": ([3], lambda seen: seen.n_workers, 3, 0),
    "compile": ([], lambda seen: seen.compiled, True, False),
    "shard": ([], lambda seen: seen.sharded, True, False),
    "dist_timeout": ([7], lambda seen: seen.timeout, 7.0, 600.0),
}  # fmt: skip
CHANGES: dict[str, dict[str, Change]] = {
    "reader": BOTH | {
        "n_context": ([3], lambda seen: seen.batch["input_ids"].shape[1], 3, 2),
        "text_maxlength": ([40], lambda seen: seen.batch["input_ids"].shape[2], 40, 32),
        "answer_maxlength": ([9], lambda seen: seen.batch["labels"].shape[1] == 9, True, False),
        "no_title": ([], has_title, False, True),
        "num_beams": ([2], answering, (50, 2, "fast"), (50, 1, "fast")),
        "generation_max_length": ([7], answering, (7, 1, "fast"), (50, 1, "fast")),
        "decoder": (["transformers"], answering, (50, 1, "transformers"), (50, 1, "fast")),
        "no_clean_up": ([], lambda seen: seen.cleans_up, False, True),
        "use_checkpoint": ([], lambda seen: seen.state.model.t5.encoder
                           .is_gradient_checkpointing, True, False),
    },
    "retriever": BOTH | {
        "n_context": ([3], lambda seen: seen.batch["gold_scores"].shape[1], 3, 2),
        "no_title": ([], has_title_key, False, True),
        "in_batch_negatives": ([], lambda seen: seen.loss_function.keywords["use_negatives"],
                               True, False),
        "target": (["perplexity"], lambda seen: seen.batch["gold_scores"].unique().tolist() == [7],
                   True, False),
        "loss": (["mse"], lambda seen: loss_options(seen).loss, "mse", "kl"),
        # (1 is --n_context's default: instead of the command's 2)
        "negatives": ([3, "--loss", "contrastive", "--n_context", 1],
                      lambda seen: seen.batch["gold_scores"].shape[1], 4, 2),
        "temperature": ([0.5], lambda seen: loss_options(seen).temperature, 0.5, 1.0),
        "target_temperature": ([2], lambda seen: loss_options(seen).target_temperature, 2.0, 1.0),
        "margin": ([0.3, "--loss", "margin"], lambda seen: loss_options(seen).margin, 0.3, 0.1),
    },
}  # fmt: skip
FIXED = {
    "reader": {
        "model_path": REFERENCE, "model_size": "small", "model_config": "shape.json",
        "tokenizer": "other", "legacy_position_table": None,
    },
    "retriever": {
        "model_path": REFERENCE, "model_config": "shape.json", "tokenizer": "other",
        "retriever_model": "other", "indexing_dimension": 16, "question_maxlength": 7,
        "passage_maxlength": 7, "no_projection": None, "no_question_mask": None,
        "no_passage_mask": None, "extract_cls": None, "best_by": "inversions", "pooling": "cls",
        "normalize": None, "question_prefix": "query: ", "passage_prefix": "passage: ",
        "two_towers": None,
    },
}  # fmt: skip
# Where the run is; and what ends before there is one.
ELSEWHERE = {"help", "name", "checkpoint_dir", "local_rank", "plan"}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_every_option_is_in_these_tables(kind):
    options = {action.dest for action in PARSERS[kind]()._actions}
    assert options - ELSEWHERE == CHANGES[kind].keys() | FIXED[kind].keys()


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in CHANGES.items() for name in names]
)
def test_a_changed_option_is_used(kind, name, begun, unchanged, tmp_path, capsys):
    words, see, changed, before = CHANGES[kind][name]
    words = [begun / "other.json" if word == "OTHER" else word for word in words]
    seen = resume(kind, begun, tmp_path, f"--{name}", *words)
    for found, value in ((unchanged[kind], before), (seen, changed)):
        assert see(found) == (pytest.approx(value) if isinstance(value, float) else value)
    assert f"since that checkpoint, {name} was" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in FIXED.items() for name in names]
)
def test_an_option_that_cannot_change_is_refused(kind, name, begun, tmp_path, capsys):
    shutil.copytree(begun / kind, tmp_path / kind, symlinks=True)
    before = sorted((tmp_path / kind).rglob("*"))
    words = command(kind, begun / "data.json", tmp_path / kind)
    if name == "model_config":
        words = [*words, "--model_path", "none"]
    value = FIXED[kind][name]
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[kind].main([*words, f"--{name}", *([] if value is None else [str(value)])])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    named = "model_(path|config)" if name == "model_config" else name
    assert re.search(rf"step-2: .*--{named} .*cannot become", error)
    assert sorted((tmp_path / kind).rglob("*")) == before


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_that_was_moved_resumes(kind, begun, tmp_path):
    shutil.copytree(begun / kind / "run", tmp_path / "elsewhere" / kind / "moved", symlinks=True)
    more = ["--checkpoint_dir", tmp_path / "elsewhere" / kind, "--name", "moved"]
    resume(kind, begun, tmp_path, *more)
