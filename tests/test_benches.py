"""The benchmark for a GPU works from end to end, here on a CPU at tiny sizes."""

import json
import subprocess
import time
from pathlib import Path

import torch

from bench.bench_gpu import in_a_process

REPOSITORY = Path(__file__).parent.parent


def test_the_gpu_bench_measures_everything_at_tiny_sizes():
    command = ["bash", str(REPOSITORY / "bench/on_gpu.sh"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    found = json.loads(last)
    rows = {row["measured"]: row for row in found["rows"]}
    assert {name.split()[0] for name in rows} == {"training", "generation", "embedding", "search"}
    assert all(row["rate"] > 0 and 0 < row["of peak"] < 1 for row in rows.values())
    assert not any(row["note"] for row in rows.values())
    ours, plain = (rows[f"training tiny, {way}"] for way in ("ours", "plain bf16"))
    assert ours["times plain"] == ours["rate"] / plain["rate"]
    assert found["device"] in printed[-len(rows) - 2]
    assert [line.partition("  ")[0] for line in printed[-len(rows) :]] == list(rows)


def _no_memory() -> dict:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_part_that_fails_leaves_a_note(capfd):
    assert in_a_process(lambda: {"rate": 1.0}, 60) == {"rate": 1.0}
    assert in_a_process(_no_memory, 60) == {"note": "out of memory"}
    assert in_a_process(lambda: time.sleep(60), 0.01) == {"note": "stopped: too slow"}
    assert in_a_process(lambda: {}, 0) == {"note": "skipped: no time left"}
    assert in_a_process(lambda: 1 // 0, 60) == {"note": "failed, see above"}
    assert "ZeroDivisionError" in capfd.readouterr().err
