"""A model's weights on disk, read one tensor at a time, so that no process has to hold them all."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from src.runtime.errors import InputError

SAVED_WITH = "give the config.json that was saved with these weights, or make the model again"
_ROWS = 4096  # that are compared at a time


class StoredWeights:
    """The weights at a folder or hub name, or in `folder/` inside it: in safetensors or `.bin`, one
    file or several. `shapes` has each one's shape, by the name that `rename` gives it.

    `by_rows`: whether each process can read some rows without the others. (A `.bin` of before 2020
    cannot be mapped into memory, only loaded.)
    """

    def __init__(self, path: str, rename: Callable[[str], str] = str, folder: str = ""):
        self.shapes: dict[str, list[int]] = {}
        self.keys: set[str] = set()  # the names in the files
        self._files: dict[str, tuple[str, str]] = {}  # and the names in there
        self._tensors: dict[str, torch.Tensor] = {}  # of .bin files
        for file in _weight_files(path, folder):
            if file.endswith(".bin"):
                mmap = zipfile.is_zipfile(file)
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
                self.keys |= set(tensors)
                self._tensors |= {
                    rename(name): tensor
                    for name, tensor in tensors.items()
                    if isinstance(tensor, torch.Tensor)
                }
            else:
                with safe_open(file, framework="pt") as stored:
                    self.keys |= (names := set(stored.keys()))
                    for name in names:
                        self._files[rename(name)] = file, name
                        self.shapes[rename(name)] = stored.get_slice(name).get_shape()
        self.shapes |= {name: list(tensor.shape) for name, tensor in self._tensors.items()}
        self.by_rows = not self._tensors

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """A tensor, or its rows `first` to `last`, in float32."""
        if name in self._tensors:
            return self._tensors[name][first:last].float()
        file, key = self._files[name]
        with safe_open(file, framework="pt") as stored:  # (what is read stays mapped while open)
            return stored.get_slice(key)[first:last].to(torch.float32, copy=True)

    def fit(self, model: nn.Module, path: str) -> None:
        """Check that a model on the meta device has these weights. As Transformers does, tie
        weights that are stored once or are equal, and no others; and know each by all its names.

        Errors: `InputError` if weights are missing, or have other shapes than in the config.
        """
        missing, shapes = [], {}
        for names in tied_names(model):
            stored = [name for name in names if name in self.shapes]
            if not stored:
                missing.append(names[0].removeprefix("t5."))
                continue
            parameter = model.get_parameter(names[0])
            for name in stored:
                shapes[name.removeprefix("t5.")] = list(parameter.shape), self.shapes[name]
                if not self._are_equal(stored[0], name):
                    owner, _, key = name.rpartition(".")
                    own = nn.Parameter(torch.empty_like(parameter))
                    setattr(model.get_submodule(owner), key, own)
            for name in names:
                for known in (self.shapes, self._files, self._tensors):
                    if stored[0] in known:
                        known.setdefault(name, known[stored[0]])
        for name, (wanted, found) in sorted(shapes.items()):
            if found != wanted:
                raise InputError(
                    f"{path}: by its config.json {name} is {wanted}, but in the weights it is "
                    f"{found}; {SAVED_WITH}"
                )
        if missing:
            raise InputError(
                f"{path}: the weights lack {len(missing)} tensors, such as {min(missing)}; "
                f"{SAVED_WITH}"
            )

    def _are_equal(self, one: str, other: str) -> bool:
        return one == other or all(
            torch.equal(*(self.read(name, first, first + _ROWS) for name in (one, other)))
            for first in range(0, self.shapes[one][0], _ROWS)
        )


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _weight_files(path: str, folder: str) -> list[str]:
    def find(name: str) -> str | None:
        return cached_file(path, folder + name, _raise_exceptions_for_missing_entries=False)

    for name in ("model.safetensors", "pytorch_model.bin"):
        if file := find(name):
            return [file]
        if index := find(f"{name}.index.json"):
            parts = json.loads(Path(index).read_text())["weight_map"].values()
            return [str(find(part)) for part in sorted(set(parts))]
    return []
