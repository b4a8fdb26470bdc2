"""The T5 family, small and with random weights, through both scripts of the reader."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    T5ForConditionalGeneration,
)

import test_reader
import train_reader
from src.data.batches import reader_texts
from src.data.examples import load_data, read_example
from src.models.decoder import GreedyDecoder
from src.models.plain import FAMILY
from src.models.reader import load_reader, new_reader
from src.runtime.errors import InputError
from tests.make_models import make_t5_config, make_tokenizer
from tests.test_reader import slow_scores

V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# They differ from T5 in the head's weights, gated GELU, the decoder's depth and the vocabulary.
KINDS = {
    "T5": {"feed_forward_proj": "relu", "tie_word_embeddings": True, "vocab_size": 400},
    "Flan-T5": {**V1_1, "vocab_size": 400, "n_positions": 512, "output_past": True},
    "ByT5": {**V1_1, "vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1},
    "mT5": {**V1_1, "vocab_size": 400, "model_type": "mt5"},
    "umT5": {**V1_1, "vocab_size": 400, "model_type": "umt5"},
}
N_CONTEXT = 3


def make_model(kind: str, data: Path, folder: Path) -> T5ForConditionalGeneration:
    """A model folder as the hub has it: weights, config, tokenizer."""
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    ids["initializer_factor"] = 3.0  # so that answers differ
    torch.manual_seed(0)
    values = {**shape, **ids, **KINDS[kind]}
    model_class = FAMILY[values.pop("model_type", "t5")]
    model = model_class(model_class.config_class(**values))
    if not KINDS[kind]["tie_word_embeddings"]:  # in the hub's weights; Transformers ties fresh ones
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    model.save_pretrained(folder)
    if kind == "ByT5":
        ByT5Tokenizer().save_pretrained(folder)
    else:
        texts = [context["text"] for row in json.loads(data.read_text()) for context in row["ctxs"]]
        make_tokenizer(texts, 400, folder)
    return model


def answer_slowly(folder: Path, data: Path) -> list[str]:
    """What T5 itself generates, question by question: passages encoded one by one, unpadded."""
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = load_data(data)
    answers = []
    for index in range(len(examples)):
        texts = reader_texts(read_example(examples, index), N_CONTEXT)
        with torch.no_grad():
            states = []
            for text in texts:
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                states.append(t5.encoder(input_ids=ids[:, :64]).last_hidden_state)
            hidden = torch.cat(states, dim=1)
            tokens = torch.zeros(1, 1, dtype=torch.long)
            while tokens.shape[1] < 8 and tokens[0, -1] != 1:
                logits = t5(encoder_outputs=(hidden,), decoder_input_ids=tokens).logits
                tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=2)], dim=1)
        text = tokenizer.decode(tokens[0], skip_special_tokens=True)
        answers.append(tokenizer.clean_up_tokenization(text))
    return answers


@pytest.mark.parametrize("kind", ["Flan-T5", "ByT5", "mT5", "umT5"])
def test_it_is_trained_and_tested(kind, reference, tmp_path):
    data = reference / "data.json"
    before = make_model(kind, data, tmp_path / "model").state_dict()
    shared = [
        "--n_context", N_CONTEXT, "--text_maxlength", 64, "--per_gpu_batch_size", 4,
        "--generation_max_length", 8, "--checkpoint_dir", tmp_path, "--num_workers", 0,
    ]  # fmt: skip
    train = ["--train_data", data, "--eval_data", data, "--model_path", tmp_path / "model"]
    train += ["--total_steps", 3, "--lr", 0.0001, "--dropout", 0, "--eval_freq", 3, "--name", "run"]
    train_reader.main(list(map(str, [*train, *shared])))
    trained = tmp_path / "run" / "checkpoint" / "best_dev"
    after = AutoModelForSeq2SeqLM.from_pretrained(trained).state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():  # every weight has learned
        assert not torch.equal(weight, after[name]), name
    tied = torch.equal(after["shared.weight"], after["lm_head.weight"])
    assert tied == KINDS[kind]["tie_word_embeddings"]

    test = ["--eval_data", data, "--model_path", trained, "--write_results", "--name", "test"]
    test_reader.main(list(map(str, [*test, *shared, "--write_crossattention_scores"])))
    lines = (tmp_path / "test" / "final_output.txt").read_text().split("\n")[:-1]
    expected = [" ".join(answer.split()) for answer in answer_slowly(trained, data)]
    assert [line.split("\t")[1] for line in lines] == expected
    assert len(set(expected)) > 1
    scored = json.loads((tmp_path / "test" / "dataset_wscores.json").read_text())
    for row in scored:
        assert all("score" in context for context in row["ctxs"][:N_CONTEXT])
    made_by = json.loads((tmp_path / "test" / "dataset_wscores.json.made_by.json").read_text())
    assert made_by["options"]["model_path"] == str(trained)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_have_the_head_that_the_config_says(kind, tmp_path):
    make_t5_config(tmp_path / "config.json", **KINDS[kind])
    reader = new_reader(str(tmp_path / "config.json"))
    reader.save_pretrained(tmp_path / "saved")
    for t5 in (reader.t5, load_reader(str(tmp_path / "saved")).t5):
        tied = torch.equal(t5.lm_head.weight, t5.shared.weight)
        assert tied == KINDS[kind]["tie_word_embeddings"]
        assert t5.config.model_type != "t5" or tied == t5.config.scale_decoder_outputs
    assert torch.equal(t5.lm_head.weight, reader.t5.lm_head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_scores_over_one_passage_are_those_of_transformers(kind, reference, tmp_path):
    t5 = make_model(kind, reference / "data.json", tmp_path).eval()
    reader = load_reader(str(tmp_path)).eval()
    assert isinstance(reader.decoder(), GreedyDecoder)
    torch.manual_seed(1)
    ids = torch.randint(3, 380, (4, 1, 20))
    mask = torch.arange(20) < torch.tensor([20, 13, 7, 1])[:, None, None]
    tokens, scores = reader.generate_with_scores(ids * mask, mask, 9)
    settings = {"attention_mask": mask[:, 0], "max_new_tokens": 8, "do_sample": False}
    expected = t5.generate(input_ids=(ids * mask)[:, 0], **settings)
    assert torch.equal(tokens, expected)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": tokens[:, 1:].contiguous()}
    with torch.no_grad():
        assert torch.allclose(scores, slow_scores(reader, batch), atol=1e-4)
        logits = t5(input_ids=(ids * mask)[:, 0], attention_mask=mask[:, 0], labels=batch["labels"])
        assert torch.allclose(reader(**batch)[1], logits.logits, atol=1e-3)


@pytest.mark.parametrize("model_type", ["bart", "led", "gpt2"])
def test_other_models_are_refused_in_one_line(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match=f"a {model_type} model.*t5, mt5 or umt5"):
        load_reader(str(tmp_path))
