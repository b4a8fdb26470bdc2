"""Several commands in one Python process, one after the other, for many short ones: importing the
libraries takes each process seconds.

    python -m examples.one_process passage_retrieval.py OPTIONS... then test_reader.py OPTIONS...
"""

import importlib
import itertools
import sys


def main(words: list[str]) -> None:
    for is_separator, command in itertools.groupby(words, lambda word: word == "then"):
        if not is_separator:
            script, *arguments = command
            importlib.import_module(script.removesuffix(".py")).main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
