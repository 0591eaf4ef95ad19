"""Which parts of a model are converted, and their exchange."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from idl import checks
from idl.models.gpt import GPTLanguageModel
from idl.nn.attention import IDLAttention, check_options
from idl.nn.conversion import encoder, gpt
from idl.nn.conversion.sites import Site
from idl.nn.implicit_heads import Version


def convert_attention(
    model: nn.Module,
    fixed_point_iter: int = 100,
    attention_version: Version = "softmax",
    *,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Replace the self-attention of a model by implicit attention that starts where it was, in place.

    With softmax the model gives what it gave before; training then moves ``A`` away from zero. Weights that do not
    require a gradient stay so: of a model that was frozen before, ``A`` alone trains. Known are
    :class:`~idl.models.gpt.GPTLanguageModel`, :class:`torch.nn.TransformerEncoderLayer`, and GPT-2 and BERT of
    Hugging Face's transformers (extra ``transformers``), each as a whole or inside of another module.

    A model of transformers also becomes an instance of :func:`implicit_class`, so that ``save_pretrained`` and
    ``type(model).from_pretrained`` round-trip. Convert the model that is saved: one that holds it does not learn of it.

    Args:
        model: The model.
        fixed_point_iter: Most steps of a solve.
        attention_version: ``"softmax"`` or ``"lipschitz"``; the latter does not start at the same function.
        layers: Which of the model's self-attentions, by their place in the model, from 0; ``None`` for all that are
            explicit.
        options: Other settings of :class:`~idl.IDLAttention` by name.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: If nothing known and explicit is in the model, a layer does not exist or is implicit
            already, or a setting does not fit.

    Example:
        >>> import torch
        >>> encoder = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
        >>> u = torch.randn(2, 10, 32)
        >>> before = encoder(u)
        >>> torch.allclose(convert_attention(encoder)(u), before, atol=1e-5)
        True
    """
    checks.instance("model", model, nn.Module, "Build the model first.")
    settings = {"fixed_point_iter": fixed_point_iter, "attention_version": attention_version, **options}
    check_options(IDLAttention, options.keys() - {"block_size"})
    chosen = None if layers is None else _places(layers)
    pretrained = _is_pretrained(model)
    if pretrained and settings.get("solver") is not None:
        raise ValueError("`solver` must be None for a model of transformers: its settings are saved as JSON.")
    convert_sites(model, chosen, settings)
    if pretrained:
        from idl.nn.conversion import huggingface

        huggingface.remember(cast(Any, model), {"layers": chosen, "settings": settings})
    return model


def implicit_class(model_class: type[Any]) -> type[Any]:
    """Return the class of a converted model of transformers, to load one.

    As in ``implicit_class(GPT2LMHeadModel).from_pretrained(folder)``, which a converted model has saved itself to.
    ``GPT2LMHeadModel`` itself, or ``AutoModelForCausalLM``, loads the rest and draws new explicit attention, with no
    more than transformers' own warning.

    Args:
        model_class: The class of the model before its conversion, as ``GPT2LMHeadModel``.

    Returns:
        A subclass of ``model_class``, the same one each time.

    Raises:
        TypeError: If ``model_class`` is no model class of transformers.
        ImportError: If transformers is missing; install ``implicit-deep-learning[transformers]``.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> model = convert_attention(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     type(implicit_class(BertModel).from_pretrained(folder)).__name__
        'ImplicitBertModel'
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(
            "implicit_class needs transformers, which is not installed. "
            "Try: pip install 'implicit-deep-learning[transformers]'"
        ) from error

    from idl.nn.conversion import huggingface

    if not _is_subclass(model_class, PreTrainedModel):
        raise TypeError(
            f"`model_class` must be a model class of transformers, as GPT2LMHeadModel; got {model_class!r}."
        )
    made: type[Any] = huggingface.implicit_class(model_class)
    return made


def _places(layers: object) -> list[int]:
    if not isinstance(layers, Iterable) or not (places := list(layers)):
        raise TypeError(f"`layers` must be None or a list of at least one integer; got {layers!r}. Try [0].")
    return [checks.non_negative_integer("layers", place) for place in places]


def convert_sites(model: nn.Module, layers: Sequence[int] | None, settings: dict[str, Any]) -> None:
    """Replace the chosen sites of a model, all explicit ones if ``None``."""
    sites = list(_sites(model))
    explicit = [layer for layer, site in enumerate(sites) if site.make is not None]
    if sites and not explicit:
        raise TypeError(f"`model` must hold explicit self-attention; in this {type(model).__name__} all is implicit.")
    if not explicit:
        raise TypeError(
            "`model` must hold explicit self-attention of a GPTLanguageModel, nn.TransformerEncoderLayer, or GPT-2 or "
            f"BERT of transformers; found none in {type(model).__name__}."
        )
    chosen = explicit if layers is None else list(dict.fromkeys(layers))
    if not set(chosen) <= set(explicit):
        raise ValueError(f"`layers` must be of those that are explicit, {explicit}; got {chosen}.")
    with torch.enable_grad():  # what is made of weights that train must be seen to, wherever this is called
        replacements = [(site, site.make(settings)) for site in map(sites.__getitem__, chosen) if site.make is not None]
    for site, made in replacements:
        setattr(site.parent, site.name, made.train(site.parent.training))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a form of batch that only its fused inference reads


def _sites(model: nn.Module) -> Iterator[Site]:
    for module in model.modules():
        if isinstance(module, GPTLanguageModel):
            yield from gpt.sites(module)
        elif isinstance(module, nn.TransformerEncoderLayer):
            yield from encoder.sites(module)
        elif "transformers" in sys.modules:
            from idl.nn.conversion import huggingface

            yield from huggingface.sites(module)


def _is_subclass(value: object, of: type) -> bool:
    return isinstance(value, type) and issubclass(value, of)


def _is_pretrained(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)
