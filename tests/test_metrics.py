"""What a run says of itself."""

import json

from src.training.metrics import Average, Metrics, start_log, write_options


def test_a_resumed_run_writes_its_numbers_once(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step, {"train/loss": step / 2})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/lo')  # killed while it wrote
    metrics = Metrics(tmp_path, 2)
    metrics.write(3, {"train/loss": 7.0})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": s, "train/loss": v} for s, v in [(1, 0.5), (2, 1.0), (3, 7.0)]]


def test_tensorboard_has_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, 0)
    for step in (1, 2):
        metrics.write(step, {"train/loss": step / 2})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]


def test_average():
    average = Average()
    assert average.value() is None
    average.add(1.0, weight=3.0)
    average.add(5.0)
    assert average.value() == 2.0
    assert average.over_all().value() == 2.0


def test_log_goes_to_screen_and_file(tmp_path, capsys):
    log = start_log(tmp_path / "run" / "run.log")
    log.info("step %d", 3)
    log = start_log(tmp_path / "run" / "run.log")  # started again: appended, and said once
    log.info("step %d", 4)
    lines = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["step 3", "step 4"]
    assert capsys.readouterr().out.splitlines() == lines


def test_options_are_kept(tmp_path):
    write_options(tmp_path, {"lr": 0.1})
    assert json.loads((tmp_path / "options.json").read_text())["options"] == {"lr": 0.1}
