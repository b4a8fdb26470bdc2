"""The training loop: the reference's losses; a stopped run equals one that never stopped."""

import dataclasses
import itertools
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.data.batches import ReaderCollator, ReaderDataset, make_loader, training_batches
from src.data.examples import load_data
from src.models.losses import reader_loss
from src.models.pretrained import load_tokenizer
from src.models.reader import load_reader
from src.options import LoopOptions, OptimOptions
from src.runtime.errors import InputError
from src.training import loop
from src.training.checkpoint import Checkpoints, find_newest, read_meta
from src.training.loop import Evaluation, Position, train
from src.training.metrics import Metrics
from src.training.optim import build_optimizer, build_schedule
from src.training.run import State

LOG = logging.getLogger("tests")
CPU = torch.device("cpu")
LOOP = {
    "total_steps": 12, "accumulation_steps": 2, "eval_freq": 3, "save_freq": 4, "clip": 1.0,
    "keep_checkpoints": 0, "precision": "fp32",
}  # fmt: skip


def read_metrics(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_twenty_updates_equal_the_reference(reference, tmp_path):
    record = json.loads((reference / "reader_training.json").read_text())
    options = record["options"]
    reader = load_reader(str(reference / "t5"), dropout=0.0, use_position_table=True)
    reader.checkpoint_blocks()
    tokenizer = load_tokenizer(str(reference / "t5"), "none")
    dataset = ReaderDataset(
        load_data(reference / "data.json"), record["n_context"], with_target=True
    )
    batches = [[(0, index) for index in batch] for batch in record["batches"]]
    collate = ReaderCollator(tokenizer, record["text_maxlength"])
    optimizer = build_optimizer(reader, options["optim"], options["lr"], options["weight_decay"])
    names = [field.name for field in dataclasses.fields(OptimOptions)]
    learning_rate = build_schedule(OptimOptions(**{name: options[name] for name in names}))
    metrics = Metrics(tmp_path, 0)
    train(
        State(reader, optimizer, CPU, fp16=False),
        reader_loss,
        iter(make_loader(dataset, batches, collate, 0)),
        learning_rate,
        Checkpoints(tmp_path / "checkpoint", reader.save_pretrained, 0, {}),
        metrics,
        LOG,
        LoopOptions(**LOOP | {"total_steps": 20, "clip": options["clip"], "accumulation_steps": 1}),
    )
    metrics.close()
    assert read_metrics(tmp_path, "train/loss") == pytest.approx(record["loss"], rel=1e-3)
    assert read_metrics(tmp_path, "train/grad_norm") == pytest.approx(record["grad_norm"], rel=1e-3)
    # Ours is the rate of the update itself, the record's the one set after it.
    rates = [*read_metrics(tmp_path, "train/lr")[1:], learning_rate(20)]
    assert rates == pytest.approx(record["lr"], abs=1e-9)


class Dropped(nn.Module):
    """A small regression with dropout, so that a lost random state shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def regression_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor]:
    return (((model(batch["x"]) - batch["y"]) ** 2).mean(),)


def regression_batches(start: int, size: int = 2):
    inputs = torch.randn(11, 3, generator=torch.Generator().manual_seed(1))
    for batch in training_batches(11, size, 0, 1, seed=0, start=start):
        index = [i for _, i in batch]
        x = inputs[index]
        yield {"index": index, "x": x, "y": x.sum(dim=1, keepdim=True), "n_elements": len(index)}


def run(
    folder: Path,
    total_steps: int = 12,
    loss_function=regression_loss,
    cuts_off=lambda: False,
    stop_at: int = 99,
    dev_factor: float = 1.0,
    **kwargs,
) -> tuple[Dropped, Position, dict]:
    """Train in a folder as the scripts do, from its newest checkpoint if there is one.
    `cuts_off` says whether a signal arrives during an evaluation."""
    model = Dropped()
    optimizer = build_optimizer(model, "adamw", 0.05, 0.1)
    signals = []

    def save_model(path: Path) -> None:
        torch.save(model.state_dict(), path / "weights.pt")

    def evaluate() -> dict[str, float]:
        signals.append(cuts_off())
        assert not model.training
        with torch.no_grad():
            error = regression_loss(model, next(regression_batches(0, 11)))[0].item()
            return {"error": dev_factor * error}

    options = LoopOptions(**LOOP | {"total_steps": total_steps} | kwargs)
    newest, _ = find_newest(folder / "checkpoint")
    torch.manual_seed(7)
    state = State(model, optimizer, CPU, options.precision == "fp16")
    if newest:
        model.load_state_dict(torch.load(newest / "weights.pt"))
        state.restore(newest, seed=0)
    metrics = Metrics(folder, state.position.step, state.position.evaluation_due)
    train(
        state,
        loss_function,
        regression_batches(state.position.examples_seen),
        build_schedule(OptimOptions("adamw", 0.05, 0.1, "linear", 2, 12, None, False)),
        Checkpoints(folder / "checkpoint", save_model, 0, {"seed": 0}),
        metrics,
        LOG,
        options,
        Evaluation(evaluate, "error", higher_is_better=False),
        lambda: any(signals) or state.position.step >= stop_at,
    )
    metrics.close()
    return model, state.position, optimizer.state_dict()


def metrics_lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def assert_same(one: Path, other: Path) -> None:
    """Equal metrics, weights and training states, to the bit."""
    assert metrics_lines(one) == metrics_lines(other)
    for name in ("step-12", "best_dev"):
        folders = [path / "checkpoint" / name for path in (one, other)]
        assert read_meta(folders[0])["position"] == read_meta(folders[1])["position"]
        weights = [torch.load(path / "weights.pt") for path in folders]
        assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())
        moments = [torch.load(path / "training_state.pt")["optimizer"]["state"] for path in folders]
        for key, values in moments[0].items():
            assert all(torch.equal(value, moments[1][key][n]) for n, value in values.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.mark.parametrize("stops", [[1], [3], [4], [2, 5, 6, 9], [12], list(range(1, 13))])
def test_a_stopped_run_equals_one_that_never_stopped(stops, whole, tmp_path):
    for stop in stops:
        _, reached, _ = run(tmp_path, stop_at=stop)
        assert reached.step == stop
    run(tmp_path)
    assert_same(whole, tmp_path)


@pytest.mark.parametrize("number", [1, 2, 4])  # after updates 3, 6 and 12, the last one
def test_a_run_stopped_while_evaluating_makes_up_for_it(number, whole, tmp_path):
    count = itertools.count(1)
    _, reached, _ = run(tmp_path, cuts_off=lambda: next(count) == number)
    assert reached.step == 3 * number
    assert reached.evaluation_due
    _, still, _ = run(tmp_path, cuts_off=lambda: True)  # and once more, at its start
    assert still == reached
    run(tmp_path)
    assert_same(whole, tmp_path)


def test_a_run_that_failed_while_evaluating_resumes_before_it(whole, tmp_path, monkeypatch):
    def failing(self, *more):
        raise LookupError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_best", failing)
        with pytest.raises(LookupError):
            run(tmp_path)
    run(tmp_path)
    assert_same(whole, tmp_path)


def test_processes_exchange_counts_once_an_update(whole, tmp_path, monkeypatch):
    """As if a second process read the same batches, which changes nothing."""
    sums = []

    def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
        sums.append(tensor)
        return 2 * tensor

    others = {"any_process": lambda flag: flag, "is_main": lambda: True}
    two = SimpleNamespace(world_size=lambda: 2, sum_tensor=sum_tensor, **others)
    monkeypatch.setattr(loop, "distributed", two)
    run(tmp_path)
    monkeypatch.undo()
    examples = [json.loads(line) for line in metrics_lines(whole)]
    assert [json.loads(line) for line in metrics_lines(tmp_path)] == examples
    weights = [torch.load(path / "checkpoint/step-12/weights.pt") for path in (whole, tmp_path)]
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())
    n_written = len({3, 4, 6, 8, 9, 12})  # evaluated or saved
    assert len(sums) == 12 + n_written


def test_gradients_stay_in_the_buckets_of_ddp():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Dropped()
        state = State(model, build_optimizer(model, "adamw", 0.05, 0.1), CPU, False)
        state.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        batches, places = regression_batches(0), []
        for _ in range(4):
            loop._update(state, regression_loss, batches, LoopOptions(**LOOP))
            places.append([p.grad.data_ptr() for p in model.parameters()])
        assert places[3] == places[2]  # (after the first update DDP lays them out anew)
        assert not any(p.grad.any() for p in model.parameters())
        state.release()
    finally:
        dist.destroy_process_group()


def test_best_and_latest(whole):
    errors = read_metrics(whole, "dev/error")
    assert len(errors) == 4  # after updates 3, 6, 9, 12
    best = read_meta(whole / "checkpoint" / "best_dev")
    assert best["position"]["best"] == min(errors)
    assert best["step"] == 3 * (1 + errors.index(min(errors)))
    folders = sorted(path.name for path in (whole / "checkpoint").iterdir())
    assert folders == ["best_dev", "latest", "step-12", "step-4", "step-8"]
    assert (whole / "checkpoint" / "latest").resolve().name == "step-12"


def test_the_last_update_is_saved_once(tmp_path, monkeypatch):
    """`step-N` and, when it is the best, `best_dev`, and the next start has nothing to do."""
    saved = []
    original = torch.save
    monkeypatch.setattr(
        torch, "save", lambda what, path: (saved.append(path), original(what, path))
    )
    run(tmp_path, eval_freq=12, save_freq=12)
    assert [path.name for path in saved] == ["weights.pt", "training_state.pt"]
    folder = tmp_path / "checkpoint"
    positions = [read_meta(folder / name)["position"] for name in ("step-12", "best_dev")]
    assert positions[0] == positions[1]
    assert not positions[0]["evaluation_due"]
    assert (folder / "latest").resolve().name == "step-12"


def test_an_update_averages_its_batches(tmp_path):
    """Two updates with accumulation, against the same by hand."""
    run(tmp_path, total_steps=2, eval_freq=100, save_freq=100)
    model = Dropped()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    torch.manual_seed(7)
    batches = regression_batches(0)
    losses = []
    for factor in (0.0, 0.5):  # the linear schedule's warm-up over 2 updates
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        loss = sum(regression_loss(model, next(batches))[0] / 2 for _ in range(2))
        loss.backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert read_metrics(tmp_path, "train/loss") == pytest.approx(losses, rel=1e-6)
    trained = torch.load(tmp_path / "checkpoint" / "step-2" / "weights.pt")
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, trained[name], atol=1e-6), name


def test_half_precision_keeps_full_weights(tmp_path):
    for precision in ("bf16", "fp16"):
        model, _, state = run(tmp_path / precision, precision=precision)
        assert all(weight.dtype == torch.float32 for weight in model.state_dict().values())
        assert all(v["exp_avg"].dtype == torch.float32 for v in state["state"].values())
        errors = read_metrics(tmp_path / precision, "dev/error")
        assert errors[-1] < errors[0]


# ----------------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.parametrize(
    ("value", "precision"), [(math.nan, "fp32"), (math.inf, "bf16"), (math.nan, "fp16")]
)
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(value, precision, tmp_path):
    calls = itertools.count()  # two an update

    def spoiled(model, batch):
        (loss,) = regression_loss(model, batch)
        return (loss * (value if next(calls) >= 8 else 1.0),)

    remedy = "--precision bf16" if precision == "fp16" else "--lr"
    with pytest.raises(InputError, match=rf"loss of update 5 is (nan|inf).*{remedy}"):
        run(tmp_path, loss_function=spoiled, precision=precision)
    assert find_newest(tmp_path / "checkpoint")[0].name == "step-4"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


class Overflow(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


def overflowing(until_update: float):
    calls = itertools.count()

    def loss(model, batch):
        (value,) = regression_loss(model, batch)
        return (Overflow.apply(value) if next(calls) // 2 < until_update else value,)

    return loss


def test_only_a_few_skipped_updates_are_normal_in_fp16(tmp_path):
    more = {"precision": "fp16", "eval_freq": 100, "save_freq": 100}
    run(tmp_path / "a", 40, overflowing(19), **more)
    assert len(read_metrics(tmp_path / "a", "train/loss")) == 40
    assert len(read_metrics(tmp_path / "a", "train/grad_norm")) == 21
    with pytest.raises(InputError, match=r"20 updates in a row, up to 20.*--precision bf16"):
        run(tmp_path / "b", 40, overflowing(math.inf), **more)
    with pytest.raises(InputError, match="gradient of update 1 is"):
        run(tmp_path / "c", loss_function=overflowing(3))  # fp32
    run(tmp_path / "d", 12, overflowing(math.inf), stop_at=5, **more)
    with pytest.raises(InputError, match=r"every update has been skipped.*--precision bf16"):
        run(tmp_path / "d", 12, overflowing(math.inf), **more)
    assert find_newest(tmp_path / "d" / "checkpoint")[0].name == "step-5"


def test_weights_that_are_not_finite_are_neither_trained_nor_saved(tmp_path, monkeypatch):
    """The last update before a checkpoint breaks them, and no loss has shown it yet."""

    def step(self, *args, **kwargs):
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(InputError, match=r"weight net\.0\.weight is not finite after update 1"):
        run(tmp_path, save_freq=1)
    assert find_newest(tmp_path / "checkpoint")[0] is None
    monkeypatch.setattr(
        nn.init, "kaiming_uniform_", lambda tensor, **_: tensor.data.fill_(math.nan)
    )
    with pytest.raises(InputError, match=r"weight net\.0\.weight is not finite before training"):
        run(tmp_path)


def test_a_dev_value_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(InputError, match="dev error is nan after update 3"):
        run(tmp_path, dev_factor=math.nan)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
