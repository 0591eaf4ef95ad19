"""Explicit models whose attention becomes implicit: the same function at first, then one that learns more."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from idl import IDLAttention, IDLHead
from idl.models.gpt import GPTLanguageModel
from idl.nn import convert_attention, implicit_class

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of transformers, when it is imported
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
VOCAB, WIDTH, LAYERS, HEADS, LONGEST = 29, 32, 3, 4, 24
TINY = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def tokens(batch=3, time=10, seed=1):
    return torch.randint(1, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def gpt(dropout=0.0):
    torch.manual_seed(0)
    return GPTLanguageModel(VOCAB, WIDTH, LONGEST, LAYERS, HEADS, dropout).eval()


def gpt2(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LONGEST}
    config = transformers.GPT2Config(**sizes, **TINY, initializer_range=0.3, **settings)
    return transformers.GPT2LMHeadModel(config).eval()


def bert(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=LONGEST, **settings)
    return transformers.BertModel(config).eval()


def encoder(**settings):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, **settings)
    # Its fused inference of padded batches does not exist for norm_first, and torch warns.
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=not layer.norm_first).eval()


def far(model):
    """Make the converted heads matter: move A away from zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, IDLAttention):
                module.A.normal_(std=0.05)
    return model


def logits(model, idx, **keywords):
    found = model(idx, **keywords)
    return found[0] if isinstance(found, tuple) else found.logits if hasattr(found, "logits") else found[0]


# --- before training ------------------------------------------------------------------------------------------------

ORIGINALS = {
    "gpt": gpt,
    "GPT-2": gpt2,
    "GPT-2, scaled by layer": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "GPT-2, eager": lambda: gpt2(attn_implementation="eager"),
    "BERT": bert,
}


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("make", ORIGINALS.values(), ids=ORIGINALS.keys())
def test_a_converted_model_gives_what_it_gave_before(make, layers):
    model, idx = make(), tokens()
    before = logits(model, idx).detach()
    converted = convert_attention(model, 50, "softmax", layers=layers)
    assert converted is model
    assert sum(isinstance(m, IDLAttention) for m in model.modules()) == (LAYERS if layers is None else 1)
    torch.testing.assert_close(logits(model, idx), before, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(far(model), idx), before, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "make", [gpt2, bert, lambda: gpt2(attn_implementation="eager")], ids=["GPT-2", "BERT", "eager"]
)
def test_padding_is_read_as_the_original_reads_it(make):
    model, idx = make(), tokens()
    mask = torch.ones_like(idx)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    before = logits(model, idx, attention_mask=mask)[mask.bool()].detach()
    convert_attention(model)
    torch.testing.assert_close(logits(model, idx, attention_mask=mask)[mask.bool()], before, rtol=0, atol=1e-5)
    other = torch.where(mask.bool(), idx, (idx + 5) % VOCAB)
    far(model)
    one, two = (logits(model, i, attention_mask=mask)[mask.bool()] for i in (idx, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", ["not", "causal", "padded", "both", "per head"])
def test_an_encoder_of_torch_gives_what_it_gave_before(masked, norm_first):
    model, u = encoder(norm_first=norm_first), torch.randn(3, 10, WIDTH)
    keywords = {}
    if masked in ("causal", "both"):
        keywords["mask"] = nn.Transformer.generate_square_subsequent_mask(10)
    if masked == "per head":
        keywords["mask"] = (torch.rand(3 * HEADS, 10, 10) < 0.3) & ~torch.eye(10, dtype=torch.bool)
    padding = torch.zeros(3, 10, dtype=torch.bool)
    if masked in ("padded", "both"):
        padding[1, -3:] = True
        keywords["src_key_padding_mask"] = (
            padding.float().masked_fill(padding, -torch.inf) if masked == "both" else padding
        )
    before = model(u, **keywords)[~padding].detach()
    convert_attention(model)
    torch.testing.assert_close(model(u, **keywords)[~padding], before, rtol=0, atol=1e-5)
    model(u, **keywords)[~padding].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_layer_of_torch_keeps_its_order_of_axes(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=batch_first, bias=False).eval()
    u, one = torch.randn(3, 10, WIDTH), torch.randn(10, WIDTH)
    before = layer(u), layer(one)
    convert_attention(layer)
    torch.testing.assert_close((layer(u), layer(one)), before, rtol=0, atol=1e-5)


def test_a_model_inside_of_a_module_is_found():
    inner = gpt()
    outer = nn.Sequential(inner, nn.Identity())
    convert_attention(outer)
    assert all(isinstance(block.sa, IDLAttention) for block in inner.blocks)


# --- training, saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [gpt, gpt2, bert, encoder])
def test_what_was_frozen_stays_frozen_and_A_trains(make, frozen):
    model = make().requires_grad_(not frozen)
    with torch.no_grad():  # which says nothing about the weights
        convert_attention(model)
    trained = {name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"A"} if frozen else all(parameter.requires_grad for parameter in model.parameters())


def test_fine_tuning_moves_A_and_lowers_the_loss():
    model = convert_attention(gpt2()).train()
    idx = torch.arange(200).remainder(7).unfold(0, 12, 3) + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(idx, labels=idx).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(float(m.A.detach().abs().max()) > 0 for m in model.modules() if isinstance(m, IDLAttention))


def test_the_trainer_of_transformers_trains_and_a_saved_model_comes_back(tmp_path):
    pytest.importorskip("accelerate")
    model = convert_attention(gpt2(), 40, layers=[0, 2], kappa=0.9)
    idx = tokens(16, 12)
    data = [{"input_ids": row, "labels": row} for row in idx]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(model, arguments, train_dataset=data).train()
    model = far(model).eval()
    model.save_pretrained(tmp_path / "model")
    for loader in (type(model), implicit_class(transformers.GPT2LMHeadModel)):
        again = loader.from_pretrained(tmp_path / "model").eval()
        assert torch.equal(again(idx).logits, model(idx).logits)
        assert again.transformer.h[0].attn.attention.kappa == 0.9
        assert not isinstance(again.transformer.h[1].attn, type(again.transformer.h[0].attn))


@pytest.mark.parametrize("make", [gpt, gpt2, bert, encoder])
def test_converted_models_are_copied_and_pickled(make):
    model = far(convert_attention(make()))
    u = torch.randn(2, 5, WIDTH) if make is encoder else tokens(2, 5)
    expected = logits(model, u)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, u), expected)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_cache_gives_the_same_tokens_as_computing_everything_anew(settings):
    model, idx = far(convert_attention(gpt2())), tokens(3, 4)
    mask = torch.ones_like(idx)
    mask[1, :2] = 0
    keywords = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    with_cache, without = (model.generate(idx, use_cache=use, **keywords) for use in (True, False))
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (3, 16)


def test_a_cache_that_does_not_keep_exactly_the_tokens_is_refused():
    model = convert_attention(gpt2())
    cache = transformers.StaticCache(config=model.config, max_cache_len=LONGEST)
    with pytest.raises(TypeError, match=r"as DynamicCache does; got a StaticCache of StaticLayer"):
        model(tokens(1, 5), past_key_values=cache)


def test_a_cached_token_solves_only_for_itself(monkeypatch):
    model, seen = convert_attention(gpt2()), []
    outputs = IDLAttention.outputs

    def noted(self, u, *arguments, **keywords):
        seen.append(u.shape[1])
        return outputs(self, u, *arguments, **keywords)

    monkeypatch.setattr(IDLAttention, "outputs", noted)
    model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen == [4] * LAYERS + [1] * 2 * LAYERS


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_is_named():
    for call, kind, words in (
        (lambda: convert_attention(nn.Linear(2, 2)), TypeError, r"found none in Linear"),
        (lambda: convert_attention("gpt2"), TypeError, r"`model` must be an instance of Module; got 'gpt2'"),
        (lambda: convert_attention(convert_attention(gpt())), TypeError, r"in this GPTLanguageModel all is implicit"),
        (lambda: convert_attention(gpt(), layers=[]), TypeError, r"`layers` must be None or a list of .*; got \[\]"),
        (lambda: convert_attention(gpt(), causal=False), ValueError, r"`causal` must be True in a GPTLanguageModel"),
        (
            lambda: convert_attention(gpt2(), causal=False),
            ValueError,
            r"`causal` must be True, as the attention of this",
        ),
        (lambda: convert_attention(bert(), causal=True), ValueError, r"`causal` must be False, as .*; got True"),
        (lambda: convert_attention(gpt(), rank=0), ValueError, r"`rank` must be an integer >= 1; got 0"),
        (lambda: implicit_class("gpt2"), TypeError, r"`model_class` must be a model class of transformers.*got 'gpt2'"),
        (lambda: implicit_class(nn.Linear), TypeError, r"`model_class` must be a model class of transformers"),
        (
            lambda: convert_attention(gpt(), layers=[3]),
            ValueError,
            r"`layers` must be of those that are explicit, \[0, 1, 2\]; got \[3\]",
        ),
        (lambda: convert_attention(gpt(), layers=[-1]), ValueError, r"`layers`"),
        (lambda: convert_attention(gpt(), attention_version="linear"), ValueError, r"`attention_version`"),
        (lambda: convert_attention(gpt2(), solver=object()), ValueError, r"`solver` must be None"),
        (lambda: convert_attention(gpt(), step=3), TypeError, r"`options` must be of .*; got step"),
        (lambda: convert_attention(gpt(), n_head=3), TypeError, r"got n_head\. Sizes are those of the maps"),
        (
            lambda: convert_attention(gpt(), layers=1),
            TypeError,
            r"`layers` must be None or a list of .* integer; got 1",
        ),
    ):
        with pytest.raises(kind, match=words):
            call()
    layer = convert_attention(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True))
    with pytest.raises(ValueError, match="no bias on its scores"):
        layer(torch.randn(1, 4, WIDTH), torch.rand(4, 4))
    for mask in (torch.ones(1, 4), torch.ones(4, 1), torch.ones(2, 4, 4), torch.ones(3, 4, 4)):
        with pytest.raises(ValueError, match=r"`attn_mask` must have shape \(4, 4\), or \(8, 4, 4\) for each sequence"):
            layer(torch.randn(2, 4, WIDTH), mask.bool())
    model = gpt()
    model.blocks[0].sa.heads[0] = IDLHead(8, WIDTH, LONGEST)
    with pytest.raises(ValueError, match="got \\[2\\]"):  # a block with heads of its own is left as it is
        convert_attention(model, layers=[2])


def test_a_failed_conversion_leaves_the_model_as_it_was():
    model = gpt()
    with pytest.raises(ValueError, match="kappa"):
        convert_attention(model, kappa=2.0)
    assert not any(isinstance(module, IDLAttention) for module in model.modules())


@pytest.mark.parametrize("make", [gpt, gpt2, encoder])
def test_layers_keep_their_numbers_when_some_are_implicit_already(make):
    model = convert_attention(make(), layers=[1], kappa=0.5)
    with pytest.raises(ValueError, match=r"explicit, \[0, 2\]; got \[1\]"):
        convert_attention(model, layers=[1])
    convert_attention(model, layers=[2], kappa=0.9)
    found = [m for m in model.modules() if isinstance(m, IDLAttention)]
    assert [attention.kappa for attention in found] == [0.5, 0.9]
    convert_attention(model)
    assert sum(isinstance(m, IDLAttention) for m in model.modules()) == LAYERS


def test_two_conversions_of_a_model_are_both_saved(tmp_path):
    model = convert_attention(convert_attention(gpt2(), layers=[1], kappa=0.5), layers=[2], kappa=0.9)
    far(model)
    model.save_pretrained(tmp_path)
    again = implicit_class(transformers.GPT2LMHeadModel).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match=r"`config` must be that of a converted GPT2LMHeadModel"):
        type(model)(gpt2().config)


def test_what_would_start_at_another_function_is_refused():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
    with pytest.raises(ValueError, match="`bias` must be True"):
        convert_attention(copy.deepcopy(layer), bias=False)
    with pytest.raises(ValueError, match="`bias` must be True"):
        IDLHead.from_explicit(*(nn.Linear(4, 2) for _ in range(3)), bias=False)
    odd = copy.deepcopy(layer)
    odd.self_attn = nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True, batch_first=True)
    with pytest.raises(ValueError, match="add_zero_attn"):
        convert_attention(odd)
    with pytest.raises(ValueError, match="`attn_mask` must be given with is_causal"):
        convert_attention(layer)(torch.randn(2, 5, WIDTH), is_causal=True)
