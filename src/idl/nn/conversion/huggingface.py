"""GPT-2 and BERT of Hugging Face's transformers; imported only with such a model at hand."""

import functools
from collections.abc import Iterator
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from idl.attention.equilibrium import Past
from idl.nn.attention import IDLAttention
from idl.nn.conversion.sites import Site, allowed_keys, linear, scaled


class CachedAttention(nn.Module):
    """Implicit attention with the call of a self-attention module of transformers.

    Keys and values at the equilibrium are what a cache remembers.

    Args:
        attention: The attention.
        layer_idx: Which layer of a cache is its own.
        dropout: Probability of dropping outputs in training.
    """

    def __init__(self, attention: IDLAttention, layer_idx: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention, self.layer_idx, self.dropout = attention, layer_idx, nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Return the outputs, and no weights; the arguments are those of transformers.

        Raises:
            TypeError: If the cache does not keep all tokens.
            ValueError: If ``encoder_hidden_states`` are given, or the mask adds to scores.
        """
        if encoder_hidden_states is not None:
            raise ValueError("`encoder_hidden_states` must be None: implicit attention is self-attention.")
        cache = past_key_values if cache is None else cache  # the older name of the argument
        cache = getattr(cache, "self_attention_cache", cache)
        o, extras = self.attention.outputs(
            hidden_states,
            allowed=None if attention_mask is None else allowed_keys("attention_mask", attention_mask),
            past=None if cache is None else _remembered(cache, self.layer_idx),
            return_past=cache is not None,
        )
        if cache is not None:
            k, v = (tensor[:, :, -hidden_states.shape[1] :].to(hidden_states.dtype) for tensor in extras[0])
            cache.update(k, v, self.layer_idx)
        return self.dropout(self.attention.projection(o.flatten(2))), None


def _remembered(cache: Any, layer_idx: int) -> Past | None:
    """Return keys and values of the tokens that a cache holds."""
    if layer_idx >= len(cache.layers):  # some caches begin without
        return None
    layer = cache.layers[layer_idx]
    if type(layer) is not DynamicLayer:
        raise TypeError(
            f"`cache` must keep all tokens and nothing else, as DynamicCache does; got a {type(cache).__name__} of "
            f"{type(layer).__name__}."
        )
    if layer.keys is None or layer.values is None or not layer.keys.numel():  # nothing was remembered yet
        return None
    return layer.keys, layer.values


def sites(parent: nn.Module) -> Iterator[Site]:
    """Return the sites of the children of a module."""
    for name, child in parent.named_children():
        if isinstance(child, GPT2Attention) and not child.is_cross_attention:
            yield Site(parent, name, functools.partial(_of_gpt2, child))
        if isinstance(child, BertSelfAttention):
            yield Site(parent, name, functools.partial(_of_bert, child))
        if isinstance(child, CachedAttention):
            yield Site(parent, name, None)


def _refuse_causal(settings: dict[str, Any], causal: bool) -> None:
    if settings.get("causal", causal) != causal:
        raise ValueError(
            f"`causal` must be {causal}, as the attention of this model is; got {settings['causal']!r}. Leave it out."
        )


def _of_gpt2(explicit: GPT2Attention, settings: dict[str, Any]) -> nn.Module:
    _refuse_causal(settings, True)
    pairs = zip(explicit.c_attn.weight.T.chunk(3), explicit.c_attn.bias.chunk(3), strict=True)
    query, key, value = (linear(weight, bias) for weight, bias in pairs)
    query = scaled(query, explicit.scaling * explicit.head_dim**0.5)
    projection = linear(explicit.c_proj.weight.T, explicit.c_proj.bias)
    settings = {"dropout": explicit.attn_dropout.p, **settings}
    attention = IDLAttention.from_explicit(key, query, value, projection, explicit.num_heads, **settings)
    return CachedAttention(attention, explicit.layer_idx, explicit.resid_dropout.p)


def _of_bert(explicit: BertSelfAttention, settings: dict[str, Any]) -> nn.Module:
    _refuse_causal(settings, explicit.is_causal)
    maps = (explicit.key, explicit.query, explicit.value)
    settings = {"causal": explicit.is_causal, "dropout": explicit.dropout.p, **settings}
    unused = nn.Linear(explicit.all_head_size, explicit.key.in_features)
    attention = IDLAttention.from_explicit(*maps, unused, explicit.num_attention_heads, **settings)
    attention.projection = nn.Identity()  # the module above projects
    return CachedAttention(attention, explicit.layer_idx)


def remember(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Add the conversion to the model's configuration, and give the model the class that reads it from there."""
    model.config.implicit_attention = [*getattr(model.config, "implicit_attention", []), settings]
    if type(model) not in _CLASSES.values():
        model.__class__ = implicit_class(type(model))


_CLASSES: dict[Any, Any] = {}


def implicit_class(model_class: Any) -> Any:
    """Return the class of converted models; see :func:`idl.nn.conversion.implicit_class`."""
    from idl.nn.conversion.convert import convert_sites  # which imports this file once it has such a model

    if model_class in _CLASSES:
        return _CLASSES[model_class]

    def __init__(self: Any, config: Any, *arguments: Any, **keywords: Any) -> None:
        conversions = getattr(config, "implicit_attention", None)
        if conversions is None:
            raise ValueError(
                f"`config` must be that of a converted {model_class.__name__}; got one without implicit attention. "
                "Load the explicit model and call idl.nn.convert_attention(model)."
            )
        model_class.__init__(self, config, *arguments, **keywords)
        for conversion in conversions:
            convert_sites(self, **conversion)

    name = f"Implicit{model_class.__name__}"
    members = {"__init__": __init__, "__module__": __name__, "__doc__": model_class.__doc__}
    return _CLASSES.setdefault(model_class, type(name, (model_class,), members))


def __getattr__(name: str) -> Any:
    """Find a class of converted models by its name, as pickle does."""
    explicit = getattr(transformers, name.removeprefix("Implicit"), None) if name.startswith("Implicit") else None
    if explicit is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return implicit_class(explicit)
