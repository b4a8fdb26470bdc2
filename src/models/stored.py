"""A model's weights, on disk or random, made one tensor at a time: no process has to hold them all.

A model is built without its weights, on the meta device, and its `sources` tell where each is.
`fill` reads them; so does `training/sharding.py`, each process its share.
"""

import copy
import functools
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import cached_file

from src.runtime import distributed
from src.runtime.errors import InputError
from src.runtime.terminal import count

SAVED_WITH = "give the config.json that was saved with these weights, or make the model again"
_SEEDED = torch.Tag.nondeterministic_seeded  # what draws random numbers


class Weight(NamedTuple):
    """Where a weight of a model is."""

    store: "StoredWeights | FreshWeights"
    key: Any

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor, or its rows `first` to `last`, in float32."""
        return self.store.read(self.key, first, last)

    def __deepcopy__(self, memo: dict) -> "Weight":
        return self  # of a copied model


Sources = dict[str, Weight]
Model = TypeVar("Model", bound=nn.Module)


def fill(
    model: nn.Module, read: Callable[[Weight, nn.Parameter], torch.Tensor] = lambda w, _: w.read()
) -> None:
    """Give a model that was built without its weights what `read` returns for each."""
    weights: dict[str, nn.Parameter] = {}
    for name, *others in tied_names(model):
        weight, parameter = model.sources.get(name), model.get_parameter(name)
        parameter = nn.Parameter(read(weight, parameter)) if weight else parameter
        weights |= dict.fromkeys([name, *others], parameter)
    model.load_state_dict(weights, assign=True)
    model.sources = {}


def with_weights(model: Model, sources: Sources, by_shares: bool) -> Model:
    """The model, filled from these sources; by shares, `training/sharding.py` does so later."""
    model.sources = sources
    if not by_shares:
        fill(model)
    return model


class FreshWeights(TorchDispatchMode):
    """While this context is active, new models have parameters on the meta device, and random
    numbers are drawn as ever. What was done to a parameter is noted, and done by `read`.
    (Small parameters that do not begin empty, such as norms of ones, are real.)"""

    by_rows = True

    def __init__(self) -> None:
        super().__init__()
        # By a storage's address: the storage, which keeps it, and what was done to it.
        self._made: dict[int, tuple[torch.UntypedStorage, list[tuple]]] = {}

    def __enter__(self) -> "FreshWeights":
        # It draws until all numbers are within bounds, which a tensor without numbers cannot tell.
        truncated = functools.partial(self._note, init._no_grad_trunc_normal_)
        self._patch = mock.patch.object(init, "_no_grad_trunc_normal_", truncated)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return func(*args, **kwargs | {"device": "meta"})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.is_meta and func._schema.is_mutable:
            return self._note(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Callable, tensor: torch.Tensor, *args: Any, **kwargs: Any):
        """Note that a function is to change a tensor; draw the numbers that it would."""
        view, state = (tensor.shape, tensor.stride(), tensor.storage_offset()), None
        if _SEEDED in getattr(func, "tags", [_SEEDED]):
            state = torch.get_rng_state()
            func(torch.zeros(tensor.shape), *args, **kwargs)
        storage = tensor.untyped_storage()
        _, steps = self._made.setdefault(storage._cdata, (storage, []))
        steps.append((state, func, view, args, kwargs))
        return tensor

    def sources(self, model: nn.Module) -> Sources:
        """Of the parameters on the meta device of a model built in this context."""
        named = model.named_parameters(remove_duplicate=False)
        return {name: Weight(self, p.detach()) for name, p in named if p.is_meta}

    @torch.no_grad()
    def read(self, like: torch.Tensor, first: int, last: int | None) -> torch.Tensor:
        whole = torch.empty(like.shape)
        with torch.random.fork_rng(devices=[]):
            for state, func, view, args, kwargs in self._made[like.untyped_storage()._cdata][1]:
                if state is not None:
                    torch.set_rng_state(state)
                func(whole.as_strided(*view), *args, **kwargs)
        return whole[first:last].clone()


class StoredWeights:
    """The weights in one or several files, safetensors or `.bin`. `shapes` has each one's shape, by
    the name that `rename` gives it.

    `by_rows`: whether each process reads what it needs; else the main one reads for all.
    """

    by_rows = True

    def __init__(self, files: list[str], rename: Callable[[str], str]):
        self.shapes: dict[str, list[int]] = {}
        self.keys: set[str] = set()  # the names in the files
        self._files: dict[str, tuple[str, str]] = {}  # and the names in there
        self._tensors: dict[str, torch.Tensor] = {}  # of .bin files
        for file in files:
            if file.endswith(".bin"):
                mmap = zipfile.is_zipfile(file)  # before 2020, PyTorch wrote others
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

    def described(self) -> "StoredWeights":
        """The same without the contents of `.bin` files, for processes that do not read them."""
        self.by_rows = False
        other = copy.copy(self)
        other._tensors = {name: tensor.to("meta") for name, tensor in self._tensors.items()}
        return other

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        if name in self._tensors:
            return self._tensors[name][first:last].to(torch.float32, copy=True)
        file, key = self._files[name]
        with safe_open(file, framework="pt") as stored:  # (what is read stays mapped while open)
            return stored.get_slice(key)[first:last].to(torch.float32, copy=True)

    def fit(self, model: nn.Module, path: str, prefix: str = "") -> Sources:
        """Check that a model on the meta device has these weights, whose names begin with `prefix`
        here, and return where each is. As Transformers does, tie weights that are stored once or
        are equal, and no others.

        Errors: `InputError` if weights are missing, or have other shapes than in the config.
        """
        missing, shapes, sources = [], {}, {}
        for own_names in tied_names(model):
            names = [prefix + name for name in own_names]
            stored = [name for name in names if name in self.shapes]
            if not stored:
                missing.append(names[0])
                continue
            parameter = model.get_parameter(own_names[0])
            for name in stored:
                shapes[name] = list(parameter.shape), self.shapes[name]
                if not self._are_equal(stored[0], name):
                    owner, _, key = name.removeprefix(prefix).rpartition(".")
                    own = nn.Parameter(torch.empty_like(parameter))
                    setattr(model.get_submodule(owner), key, own)
            for name in names:
                sources[name] = Weight(self, name if name in stored else stored[0])
        for name, (wanted, found) in sorted(shapes.items()):
            if found != wanted:
                raise InputError(
                    f"{path}: by its config.json {_short(name)} is {wanted}, but in the weights it "
                    f"is {found}; {SAVED_WITH}"
                )
        if missing:
            raise InputError(
                f"{path}: the weights lack {count(len(missing), 'tensor')}, such as "
                f"{_short(min(missing))}; {SAVED_WITH}"
            )
        return sources

    def _are_equal(self, one: str, other: str) -> bool:
        def compare() -> bool:
            return torch.equal(self.read(one), self.read(other))

        return one == other or (compare() if self.by_rows else distributed.from_main(compare))


def _short(name: str) -> str:
    return re.sub(r"^(t5|model)\.", "", name)


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def weight_files(path: str, folder: str) -> list[str]:
    """The files with the weights at a folder or hub name, or in `folder/` inside it."""

    def find(name: str) -> str | None:
        return cached_file(path, folder + name, _raise_exceptions_for_missing_entries=False)

    for name in ("model.safetensors", "pytorch_model.bin"):
        if file := find(name):
            return [file]
        if index := find(f"{name}.index.json"):
            parts = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            found = [find(part) for part in parts]
            if None in found:
                raise FileNotFoundError(f"{parts[found.index(None)]} is missing")
            return found
    raise FileNotFoundError("no file named model.safetensors or pytorch_model.bin")
