"""Kill each of the five scripts at random moments, start it again until it is done, and compare.

    python -m tests.kill_chains --chains 15 --processes 1 [--scripts test_reader ...] [--shard]

Half of the kills come after a random time, half when a file is opened, renamed or removed. At the
end of a chain the output equals that of an undisturbed run to the bit, and so does the list of all
files beside it.
"""

import argparse
import functools
import importlib
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from tests.concurrent_pairs import (
    SCRIPTS,
    begin,
    differences,
    end,
    snapshot,
    undisturbed,
    work_folder,
)
from tests.forks import die_writing, wait


def run_chain(
    script: str, processes: int, base: Path, whole: dict[str, object], seconds: float, seed: int
) -> tuple[int, list[str]]:
    """Returns how often the script was killed, and the files that differ in the end."""
    draw, kills = random.Random(seed), 0
    with work_folder(base):
        for number in range(draw.randrange(1, 5)):
            if number % 2 == seed % 2:
                arm = functools.partial(die_writing, draw.randrange(1, 60))
                children = begin(script, processes, arm=lambda rank, arm=arm: rank or arm())
            else:
                children = begin(script, processes)
                time.sleep(draw.uniform(0, seconds))
                os.kill(draw.choice(children), signal.SIGKILL)
            kills += wait(children)
        status, lines = end(begin(script, processes))
        assert status == 0, lines
        return kills, differences(whole, snapshot())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chains", type=int, default=15)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--shard", action="store_true", help="add --shard to the commands")
    options = parser.parse_args()
    for script in options.scripts if options.shard else ():
        SCRIPTS[script].append("--shard")
    with tempfile.TemporaryDirectory() as base:
        for script in options.scripts:
            importlib.import_module(script)
            whole, seconds = undisturbed(script, options.processes, Path(base))
            kills, wrong = 0, {}
            for seed in range(options.chains):
                more, differ = run_chain(
                    script, options.processes, Path(base), whole, seconds, seed
                )
                kills += more
                wrong |= {seed: differ} if differ else {}
            chains = f"{options.chains} chains, {kills} kills, {options.processes} process(es)"
            print(f"{script}: {chains}: {len(wrong)} differ", *wrong.items(), flush=True)


if __name__ == "__main__":
    main()
