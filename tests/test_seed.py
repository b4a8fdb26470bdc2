"""The commands of the original's README, as printed there, on small files of those names.

Changed are only the two scripts that have new names (`test.py`, `generate_retriever_embedding.py`)
and the placeholder `<model_dir>`. Trainings are asked to stop after their first update.
"""

import importlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from src.models.pretrained import load_tokenizer
from src.models.reader import load_reader
from src.runtime.launch import StopRequest

READER = """
python train_reader.py \\
--train_data train_data.json \\
--eval_data eval_data.json \\
--model_size base \\
--per_gpu_batch_size 1 \\
--n_context 100 \\
--name my_experiment \\
--checkpoint_dir checkpoint \\
"""
LARGE_READER = """
python train_reader.py \\
--use_checkpoint \\
--lr 0.00005 \\
--optim adamw \\
--scheduler linear \\
--weight_decay 0.01 \\
--text_maxlength 250 \\
--per_gpu_batch_size 1 \\
--n_context 100 \\
--total_step 15000 \\
--warmup_step 1000 \\
"""
TEST = """
python test_reader.py \\
--model_path checkpoint_dir/my_experiment/my_model_dir/checkpoint/best_dev \\
--eval_data eval_data.json \\
--per_gpu_batch_size 1 \\
--n_context 100 \\
--name my_test \\
--checkpoint_dir checkpoint \\
"""
SCORES = """
python test_reader.py \\
--model_path my_model_path \\
--eval_data data.json \\
--per_gpu_batch_size 4 \\
--n_context 100 \\
--name my_test \\
--checkpoint_dir checkpoint \\
--write_crossattention_scores \\
"""
RETRIEVER = """
python train_retriever.py \\
--lr 1e-4 \\
--optim adamw \\
--scheduler linear \\
--train_data train_data.json \\
--eval_data eval_data.json \\
--n_context 100 \\
--total_steps 20000 \\
--scheduler_steps 30000 \\
"""
EMBEDDING = """
python3 generate_passage_embeddings.py \\
--model_path model_dir \\
--passages passages.tsv \\
--output_path wikipedia_embeddings \\
--shard_id 0 \\
--num_shards 1 \\
--per_gpu_batch_size 500 \\
"""
RETRIEVAL = """
python passage_retrieval.py \\
--model_path model_dir \\
--passages psgs_w100.tsv \\
--data_path data.json \\
--passages_embeddings "wikipedia_embeddings/wiki_*" \\
--output_path retrieved_data.json \\
--n-docs 100 \\
"""


@pytest.fixture(autouse=True)
def folder(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with small files under the names that the commands mention."""
    monkeypatch.chdir(tmp_path)
    examples = json.loads((reference / "data.json").read_text())
    for name, part in {"train": examples[:16], "eval": examples[16:]}.items():
        (tmp_path / f"{name}_data.json").write_text(json.dumps(part))
    shutil.copy(reference / "data.json", tmp_path)
    for name in ("passages.tsv", "psgs_w100.tsv"):
        shutil.copy(reference / "passages.tsv", tmp_path / name)
    t5 = load_reader(str(reference / "t5"))
    for name in ("t5-base", "my_model_path",
                 "checkpoint_dir/my_experiment/my_model_dir/checkpoint/best_dev"):  # fmt: skip
        t5.save_pretrained(tmp_path / name)
        load_tokenizer(str(reference / "t5"), "none").save_pretrained(tmp_path / name)
    shape = BertConfig(
        vocab_size=700, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertModel(shape).save_pretrained(tmp_path / "bert-base-uncased")
    load_tokenizer(str(reference / "bert"), "none").save_pretrained(tmp_path / "bert-base-uncased")
    shutil.copytree(reference / "legacy_retriever_mask_mean", tmp_path / "model_dir")
    return tmp_path


def run(command: str) -> None:
    """What the command does, in this process."""
    _, script, *arguments = shlex.split(command.replace("\\\n", " "))
    importlib.import_module(script.removesuffix(".py")).main(arguments)


def train_for_a_moment(command: str, monkeypatch, capsys) -> None:
    """Start a training that is asked to stop at once, and see it save and leave."""
    stopping = property(lambda self: True, lambda self, value: None)
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", stopping, raising=False)
        with pytest.raises(SystemExit):
            run(command)
    assert "stopped by a signal after update 1" in capsys.readouterr().out


def test_reader_commands(folder, monkeypatch, capsys):
    train_for_a_moment(READER, monkeypatch, capsys)
    assert (folder / "checkpoint/my_experiment/checkpoint/step-1/model.safetensors").exists()
    train_for_a_moment(LARGE_READER, monkeypatch, capsys)
    options = json.loads((folder / "checkpoint/experiment_name/options.json").read_text())
    assert (options["options"]["total_steps"], options["options"]["warmup_steps"]) == (15000, 1000)
    run(TEST)
    assert "exact match" in capsys.readouterr().out


@pytest.mark.fast
def test_retriever_commands(folder, monkeypatch, capsys):
    run(SCORES)
    data = json.loads((folder / "data.json").read_text())
    scored = json.loads((folder / "checkpoint/my_test/dataset_wscores.json").read_text())
    assert len(scored) == len(data)
    train_for_a_moment(RETRIEVER, monkeypatch, capsys)
    run(EMBEDDING)
    assert (folder / "wikipedia_embeddings" / "wiki_00").exists()
    run(RETRIEVAL)
    found = json.loads((folder / "retrieved_data.json").read_text())
    assert [len(row["ctxs"]) for row in found] == [100] * len(data)
