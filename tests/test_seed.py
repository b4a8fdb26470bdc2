"""The commands of the original's README, as printed there, on small files of those names.

Changed are only the two scripts that have new names (`test.py`, `generate_retriever_embedding.py`)
and the placeholder `<model_dir>`. Trainings are stopped by SIGTERM once they have begun: they would
take 15,000 updates and more.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from src.models.pretrained import load_tokenizer
from src.models.reader import load_reader
from tests.conftest import ROOT

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


@pytest.fixture
def folder(reference: Path, tmp_path: Path) -> Path:
    """A folder with the scripts, and small files under the names that the commands mention."""
    for script in ROOT.glob("*.py"):
        (tmp_path / script.name).symlink_to(script)
    (tmp_path / "src").symlink_to(ROOT / "src")
    examples = json.loads((reference / "data.json").read_text())
    (tmp_path / "train_data.json").write_text(json.dumps(examples[:16]))
    (tmp_path / "eval_data.json").write_text(json.dumps(examples[16:]))
    (tmp_path / "data.json").write_text((reference / "questions.json").read_text())
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


def start(command: str, folder: Path) -> subprocess.Popen:
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": binaries + os.pathsep + os.environ["PATH"],
    }
    # (bash, not `exec`: the signal goes to its child by the group)
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_command(command: str, folder: Path) -> str:
    process = start(command, folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def train_for_a_moment(command: str, folder: Path) -> str:
    """Start a training, ask it to stop when its model is built, and see it save and leave."""
    process = start(command, folder)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "parameters" in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    lines += process.stdout.readlines()
    process.wait()
    assert "stopped by a signal after update 1" in "".join(lines), "".join(lines)
    return "".join(lines)


def test_reader_commands(folder):
    train_for_a_moment(READER, folder)
    assert (folder / "checkpoint/my_experiment/checkpoint/step-1/model.safetensors").exists()
    train_for_a_moment(LARGE_READER, folder)
    options = json.loads((folder / "checkpoint/experiment_name/options.json").read_text())
    assert (options["options"]["total_steps"], options["options"]["warmup_steps"]) == (15000, 1000)
    assert "exact match" in run_command(TEST, folder)


@pytest.mark.fast
def test_retriever_commands(folder):
    printed = run_command(SCORES, folder)
    assert "40 of 40" in printed
    scored = json.loads((folder / "checkpoint/my_test/dataset_wscores.json").read_text())
    assert len(scored) == 40
    train_for_a_moment(RETRIEVER, folder)
    run_command(EMBEDDING, folder)
    assert (folder / "wikipedia_embeddings" / "wiki_00").exists()
    run_command(RETRIEVAL, folder)
    found = json.loads((folder / "retrieved_data.json").read_text())
    assert [len(row["ctxs"]) for row in found] == [100] * 40
