"""A model's weights, on disk or random, made one tensor at a time: no process has to hold them all.

A model is built without its weights, on the meta device, and its `sources` tell where each is.
`fill` reads them; so does `training/sharding.py`, each process its share.
"""

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
from src.runtime.errors import InputError, shorten
from src.runtime.terminal import count

SAVED_WITH = "give the config.json that was saved with these weights, or make the model again"
_SEEDED = torch.Tag.nondeterministic_seeded  # what draws random numbers


class Weight(NamedTuple):
    """A weight that is still to be read: by `read(first=0, last=None)`, which returns these rows in
    float32. `by_rows`: each process reads what it needs; else the main one, which alone can, reads
    for all. `key`: its name in the file."""

    shape: list[int]
    read: Callable[..., torch.Tensor]
    by_rows: bool = True
    key: str = ""

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
    numbers are drawn as ever. What was done to a parameter is noted, and done when it is read.
    (Small parameters that do not begin empty, such as norms of ones, are real.)

    Args: draws: False where nothing will be read, because all weights are stored."""

    def __init__(self, draws: bool = True) -> None:
        super().__init__()
        self._draws = draws
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
        if self._draws and _SEEDED in getattr(func, "tags", [_SEEDED]):
            state = torch.get_rng_state()
            func(torch.zeros(tensor.shape), *args, **kwargs)
        storage = tensor.untyped_storage()
        _, steps = self._made.setdefault(storage._cdata, (storage, []))
        steps.append((state, func, view, args, kwargs))
        return tensor

    def sources(self, model: nn.Module) -> Sources:
        """Of the parameters on the meta device of a model built in this context."""
        named = model.named_parameters(remove_duplicate=False)
        read = functools.partial
        return {n: Weight([*p.shape], read(self._read, p.detach())) for n, p in named if p.is_meta}

    @torch.no_grad()
    def _read(self, like: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        whole = torch.empty(like.shape)
        with torch.random.fork_rng(devices=[]):
            for state, func, view, args, kwargs in self._made[like.untyped_storage()._cdata][1]:
                if state is not None:
                    torch.set_rng_state(state)
                func(whole.as_strided(*view), *args, **kwargs)
        return whole[first:last].clone()


def stored_weights(files: list[str], rename: Callable[[str], str]) -> Sources:
    """The weights in files, safetensors or `.bin`, by the names that `rename` gives them."""
    found: Sources = {}
    for file in files:
        if file.endswith(".bin"):
            mmap = zipfile.is_zipfile(file)  # before 2020, PyTorch wrote others
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap).items()
            tensors = {key: value for key, value in tensors if isinstance(value, torch.Tensor)}
            shapes = {key: [*tensor.shape] for key, tensor in tensors.items()}
            reads = {key: functools.partial(_copy, tensor) for key, tensor in tensors.items()}
        else:
            with safe_open(file, framework="pt") as stored:
                keys = stored.keys()
                shapes = {key: stored.get_slice(key).get_shape() for key in keys}
            reads = {key: functools.partial(_read_rows, file, key) for key in shapes}
        for key, shape in shapes.items():
            found[rename(key)] = Weight(shape, reads[key], key=key)
    return found


def _copy(tensor: Any, first: int = 0, last: int | None = None) -> torch.Tensor:
    return tensor[first:last].to(torch.float32, copy=True)


def _read_rows(file: str, key: str, first: int = 0, last: int | None = None) -> torch.Tensor:
    with safe_open(file, framework="pt") as stored:  # (what is read stays mapped while open)
        return _copy(stored.get_slice(key), first, last)


def fit(model: nn.Module, found: Sources, path: str) -> Sources:
    """Check that the weights of a model on the meta device are among those found, and return where
    each is. As Transformers does, tie weights that are stored once or are equal, and no others.

    Errors: `InputError` if weights are missing, or have other shapes than in the config.
    """
    missing, misshapen, sources = [], [], {}
    for names in tied_names(model):
        stored = [found[name] for name in names if name in found]
        if not stored:
            missing.append(names[0])
            continue
        parameter = model.get_parameter(names[0])
        for name in names:
            sources[name] = weight = found.get(name, stored[0])
            if weight.shape != [*parameter.shape]:
                misshapen.append((name, weight.key, [*parameter.shape], weight.shape))
            elif not _are_equal(stored[0], weight):
                owner, _, key = name.rpartition(".")
                own = nn.Parameter(torch.empty_like(parameter))
                setattr(model.get_submodule(owner), key, own)
    if misshapen:
        _, key, wanted, is_there = min(misshapen)
        raise InputError(
            f"{path}: by its config.json {key} is {wanted}, but in the weights it is {is_there}; "
            f"{SAVED_WITH}"
        )
    if missing:
        name = re.sub(r"^(t5|model)\.", "", min(missing))
        raise InputError(
            f"{path}: the weights lack {count(len(missing), 'tensor')}, such as {name}; "
            f"{SAVED_WITH}"
        )
    return sources


def _are_equal(one: Weight, other: Weight) -> bool:
    def compare() -> bool:
        return torch.equal(one.read(), other.read())

    return one is other or (compare() if one.by_rows else distributed.from_main(compare))


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
            for part in parts:
                if Path(part).name != part:
                    raise ValueError(f"{name}.index.json: {shorten(part)} is outside its folder")
            found = [find(part) for part in parts]
            if None in found:
                raise FileNotFoundError(f"{parts[found.index(None)]} is missing")
            return found
    raise FileNotFoundError(
        "no file named model.safetensors or pytorch_model.bin; those of TensorFlow or Flax must "
        "be converted"
    )
