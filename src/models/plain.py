"""Which modules of a T5 are still as Transformers builds them.

The packed encoder and the greedy decoder compute what some modules would, without calling them.
They would ignore an adapter, hook or parametrization, so anything that differs from a fresh T5 of
the same config counts as changed.
"""

import functools
import json
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers import (
    MT5ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5 import modeling_umt5

# Readers by `model_type`. (T5 v1.1, Flan-T5 and ByT5 are of type t5.)
FAMILY: dict[str, type[PreTrainedModel]] = {
    "t5": T5ForConditionalGeneration,
    "mt5": MT5ForConditionalGeneration,
    "umt5": UMT5ForConditionalGeneration,
}
# Their modules are copies of T5's, except that all of umT5's self-attentions have a position bias.
_COPIES = {
    getattr(module, f"{prefix}{name}"): getattr(modeling_t5, name)
    for module, prefix in ((modeling_mt5, "M"), (modeling_umt5, "UM"))
    for name in dir(modeling_t5)
    if name.startswith("T5") and hasattr(module, f"{prefix}{name}") and "Config" not in name
}

# Implementations of attention that compute the same numbers.
_ATTENTIONS = ("eager", "sdpa", "flex_attention")
# What a module's result depends on beyond its class and weights.
_SETTINGS = ("n_heads", "key_value_proj_dim", "scaling", "has_relative_attention_bias", "model_dim")


def is_plain(module: nn.Module, kind: type[nn.Module], own_hook: Callable | None = None) -> bool:
    """Whether a module is of exactly this class with nothing attached: no hooks (but `own_hook`),
    no method replaced on the instance, no quantized or parametrized weights."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return (
        original_class(module) is kind
        and not _has_any_global_hook()
        and not has_own_methods(module)
        and all(
            hook == own_hook or _is_sharding(hook) for group in hooks for hook in group.values()
        )
        and all(
            type(p) is nn.Parameter or isinstance(p, DTensor)
            for p in module._parameters.values()
            if p is not None
        )
        and (kind is not T5Attention or module.config._attn_implementation in _ATTENTIONS)
    )


def original_class(module: nn.Module | None) -> type:
    """A module's class; for our versions of T5's modules and the copies in mT5 and umT5, the one
    that they stand for."""
    kind = type(module)
    if issubclass(kind, FSDPModule):  # made by sharding: (itself, FSDPModule, the class before)
        kind = kind.__mro__[2]
    kind = vars(kind).get("stands_for", kind)
    return _COPIES.get(kind, kind)


def output_scale(config: PreTrainedConfig) -> float:
    """What a T5 multiplies the decoder's last states by, before the head."""
    if config.model_type == "mt5":
        return 1.0
    is_scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return config.d_model**-0.5 if is_scaled else 1.0


def has_own_methods(module: nn.Module) -> bool:
    """Whether a method, such as `forward`, was replaced on the instance."""
    return any(callable(getattr(type(module), name, None)) for name in vars(module))


def changed_decoder_part(t5: nn.Module, own_hook: Callable) -> str | None:
    """The name of the first module whose class, shape or attachments (other than `own_hook`) make
    a T5's decoder differ from the one that Transformers builds from its config; or None."""
    config = json.dumps(t5.config.to_dict(), sort_keys=True, default=str)
    expected, found = _built_decoder(t5.config.model_type, config), _decoder_modules(t5)
    for name in [*found, *expected]:
        module, (kind, properties) = found.get(name), expected.get(name, (None, None))
        if module is None or not is_plain(module, kind, own_hook):
            return name
        if _properties(module) != properties:
            return name
    return None


def _decoder_modules(t5: nn.Module) -> dict[str, nn.Module]:
    """All modules that decoding runs, by name."""
    decoder = {f"decoder.{name}": module for name, module in t5.decoder.named_modules()}
    return {"the T5 itself": t5, "lm_head": t5.lm_head, **decoder}


def _properties(module: nn.Module) -> dict[str, object]:
    shapes = {name: p.shape for name, p in module._parameters.items() if p is not None}
    return {name: vars(module)[name] for name in _SETTINGS if name in vars(module)} | shapes


def _is_sharding(hook: Callable) -> bool:
    return isinstance(getattr(hook, "__self__", None), FSDPState)


def gathered(t5: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A T5 with all weights of the decoder, gathered from all processes if they are sharded; those
    of products, except for the head, in this number format. (The keys' projections give passage
    scores, too, and stay as they are.)"""
    if not any(isinstance(p, DTensor) for p in t5.parameters()):
        return t5
    with torch.device("meta"):
        copy = FAMILY[t5.config.model_type](t5.config).eval()
    for name, parameter in t5.named_parameters(remove_duplicate=False):
        if name.startswith("encoder."):
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        is_product = ".block." in name and whole.dim() == 2 and "relative" not in name
        if is_product and not name.endswith("EncDecAttention.k.weight"):
            whole = whole.to(dtype)
        owner, _, key = name.rpartition(".")
        setattr(copy.get_submodule(owner), key, nn.Parameter(whole.detach(), False))
    return copy


@functools.lru_cache(maxsize=4)
def _built_decoder(
    model_type: str, config: str
) -> dict[str, tuple[type[nn.Module], dict[str, object]]]:
    """The classes and properties of the modules that Transformers builds."""
    model_class = FAMILY[model_type]
    with torch.device("meta"):
        t5 = model_class(model_class.config_class(**json.loads(config)))
    parts = _decoder_modules(t5).items()
    return {name: (original_class(part), _properties(part)) for name, part in parts}
