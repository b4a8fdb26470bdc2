"""Which modules of a T5 are still as Transformers builds them.

The packed encoder and the greedy decoder compute what some modules would, without calling them. An
adapter, hook, parametrization or other class on one of these would be ignored, so anything that
differs from a fresh T5 of the same config counts as changed.
"""

import functools
import json
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

# Implementations of attention that compute the same numbers.
_ATTENTIONS = ("eager", "sdpa", "flex_attention")


def is_plain(module: nn.Module, kind: type[nn.Module], own_hook: Callable | None = None) -> bool:
    """Whether a module is of exactly this class with nothing attached: no hooks (but `own_hook`),
    no method replaced on the instance, no sharded, quantized or parametrized weights."""
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
        and all(hook == own_hook for group in hooks for hook in group.values())
        and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
        and (kind is not T5Attention or module.config._attn_implementation in _ATTENTIONS)
    )


def original_class(module: nn.Module) -> type[nn.Module]:
    """A module's class; for our versions of T5's modules, the one that they stand for."""
    return vars(type(module)).get("stands_for", type(module))


def has_own_methods(module: nn.Module) -> bool:
    """Whether a method, such as `forward`, was replaced on the instance."""
    return any(callable(getattr(type(module), name, None)) for name in vars(module))


def changed_decoder_part(t5: nn.Module, own_hook: Callable) -> str | None:
    """The name of the first module that makes a T5's decoder differ from the one that Transformers
    builds from its config, by its class, its weights' shapes or something attached to it (other
    than `own_hook`); or None."""
    config = json.dumps(t5.config.to_dict(), sort_keys=True, default=str)
    expected, found = _built_decoder(config), dict(_decoder_modules(t5))
    for name in [*found, *expected]:
        if name not in found or name not in expected:
            return name
        module, (kind, properties) = found[name], expected[name]
        if not is_plain(module, kind, own_hook) or _properties(module) != properties:
            return name
    return None


def _decoder_modules(t5: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules that decoding runs, by name."""
    decoder = [(f"decoder.{name}", module) for name, module in t5.decoder.named_modules()]
    return [("the T5 itself", t5), ("lm_head", t5.lm_head), *decoder]


def _properties(module: nn.Module) -> dict[str, object]:
    """What a module's result depends on beyond its class and the values of its weights."""
    names = ("n_heads", "key_value_proj_dim", "scaling", "has_relative_attention_bias", "model_dim")
    properties = {name: vars(module)[name] for name in names if name in vars(module)}
    shapes = {name: p.shape for name, p in module._parameters.items() if p is not None}
    return properties | shapes


@functools.lru_cache(maxsize=4)
def _built_decoder(config: str) -> dict[str, tuple[type[nn.Module], dict[str, object]]]:
    """The classes and properties of the modules that Transformers builds."""
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(T5Config(**json.loads(config)))
    return {name: (type(module), _properties(module)) for name, module in _decoder_modules(t5)}
