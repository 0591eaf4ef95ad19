import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idl import IDLAttention, IDLHead
from idl.models.gpt import GPTLanguageModel, Head

VOCAB, E, T, LAYERS, HEADS = 11, 12, 10, 2, 3


def gpt(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    model = GPTLanguageModel(VOCAB, E, T, LAYERS, HEADS, dropout)
    with torch.no_grad():
        for name, p in model.named_parameters():  # the small first weights would hardly tell one token from another
            if "ln" not in name:
                p.mul_(8)
    return model


def implicit(version="softmax", together=False, dropout=0.0):
    """The call of the specification: heads replaced block by block; or all heads of a block in one."""
    model = gpt(dropout)
    for block in model.blocks:
        if together:
            block.sa = IDLAttention(E, HEADS, T, attention_version=version, tol=1e-6)
        else:
            block.sa.heads = nn.ModuleList(
                [IDLHead(E // HEADS, E, T, 100, version, True, 2, tol=1e-6) for _ in range(HEADS)]
            )
    return model


MODELS = {
    "explicit": gpt,
    "softmax heads": implicit,
    "lipschitz heads": lambda: implicit("lipschitz"),
    "softmax, together": lambda: implicit(together=True),
}
over = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def tokens(batch=2, time=T, seed=1):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def by_hand(model, idx):
    """Logits of an explicit model from its weights alone."""
    x = model.token_embedding.weight[idx] + model.position_embedding.weight[: idx.shape[1]]
    mask = torch.ones(idx.shape[1], idx.shape[1]).tril() == 0
    for block in model.blocks:
        u = F.layer_norm(x, (E,), block.ln1.weight, block.ln1.bias)
        outputs = []
        for head in block.sa.heads:
            scores = (u @ head.query.weight.T) @ (u @ head.key.weight.T).mT / (E // HEADS) ** 0.5
            outputs.append(scores.masked_fill(mask, -torch.inf).softmax(-1) @ (u @ head.value.weight.T))
        x = x + torch.cat(outputs, -1) @ block.sa.projection.weight.T + block.sa.projection.bias
        u = F.layer_norm(x, (E,), block.ln2.weight, block.ln2.bias)
        x = x + block.ffwd[2](block.ffwd[0](u).relu())
    return model.lm_head(F.layer_norm(x, (E,), model.ln_f.weight, model.ln_f.bias))


def test_logits_and_loss_are_those_of_a_transformer():
    model, idx, targets = gpt(), tokens(), tokens(seed=2)
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, by_hand(model, idx), rtol=1e-4, atol=1e-4)
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss, -picked.mean())
    assert model(idx)[1] is None


@over
def test_later_tokens_do_not_change_earlier_logits_and_all_parameters_learn(make):
    model, idx = make(), tokens()
    other = idx.clone()
    other[:, 6:] = (other[:, 6:] + 1) % VOCAB
    torch.testing.assert_close(model(other)[0][:, :6], model(idx)[0][:, :6], rtol=0, atol=1e-4)
    model(idx, idx)[1].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0] == []


@over
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 3}], ids=str)
def test_remembered_keys_and_values_give_the_same_tokens_as_computing_everything_anew(make, settings):
    model, start = make(), tokens(time=3)
    results = [
        model.generate(start, 12, use_cache=use_cache, generator=torch.Generator().manual_seed(5), **settings)
        for use_cache in (True, False)
    ]
    assert results[0].shape == (2, 15)  # beyond block_size
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][:, :3], start)
    assert int(results[0].max()) < VOCAB


def test_a_remembered_token_reads_only_the_new_one(monkeypatch):
    model, seen = gpt(), []
    forward = Head.forward

    def noted(self, u, **keywords):
        seen.append(u.shape[1])
        return forward(self, u, **keywords)

    monkeypatch.setattr(Head, "forward", noted)
    model.generate(tokens(time=3), 4)
    assert seen == [3] * LAYERS * HEADS + [1] * 3 * LAYERS * HEADS


def test_drawing_follows_temperature_and_top_k():
    model, start = gpt(), tokens(1, 4)
    likely = model(start)[0][0, -1].softmax(-1)
    many = start.expand(4000, -1)

    def frequencies(**settings):
        drawn = model.generate(many, 1, generator=torch.Generator().manual_seed(0), **settings)[:, -1]
        return torch.bincount(drawn, minlength=VOCAB) / len(drawn)

    torch.testing.assert_close(frequencies(), likely, rtol=0, atol=0.03)
    assert int((frequencies(top_k=2) > 0).sum()) == 2
    assert float(frequencies(temperature=0.0).max()) == 1
    assert torch.equal(frequencies(top_k=1), frequencies(temperature=0.0))
    hot = likely.log().div(2).softmax(-1)
    torch.testing.assert_close(frequencies(temperature=2.0), hot, rtol=0, atol=0.03)


def test_generation_is_without_dropout_and_leaves_the_mode_as_it_was():
    model = gpt(dropout=0.5)
    first, second = (model.generate(tokens(time=3), 5, temperature=0.0) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert not torch.equal(model(tokens())[0], model(tokens())[0])


def test_an_implicit_gpt_learns_a_sequence():
    model = implicit(together=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    idx = torch.arange(64).remainder(VOCAB)[None].unfold(1, T + 1, 1)[0]
    losses = []
    for _ in range(100):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 < losses[0]
    assert model.generate(torch.tensor([[3, 4, 5]]), 5, temperature=0.0)[0].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_is_named():
    model = gpt()
    for call, words in (
        (lambda: model(tokens(time=11)), r"`idx` must have at most block_size=10 tokens; got 11"),
        (lambda: model(tokens()[0]), r"`idx` must be integers \(int32 or int64\) of shape \(batch, time\)"),
        (lambda: model(tokens().float()), r"`idx` must be integers"),
        (lambda: model(tokens()[:, :0]), r"at least one time"),
        (lambda: model(tokens().byte()), r"`idx` must be integers \(int32 or int64\).*got torch\.uint8"),
        (lambda: model(tokens().tolist()), r"`idx` must be an instance of Tensor.*torch\.tensor\(idx\)"),
        (lambda: model(tokens(), tokens().tolist()), r"`targets` must be an instance of Tensor"),
        (lambda: model.generate(tokens()[0], 1), r"`idx` must be integers"),
        (lambda: model(tokens() + 11), r"`idx` must lie in 0\.\.10, below vocab_size; got 2"),
        (lambda: model(-1 - tokens()), r"`idx` must lie in 0\.\.10, below vocab_size; got -"),
        (lambda: model(tokens(), tokens() + 11), r"`targets` must lie in 0\.\.10"),
        (lambda: model.generate(tokens(), 1, use_cache="no"), r"`use_cache` must be True or False; got 'no'"),
        (lambda: model.generate(tokens(), 1, generator=42), r"`generator` must be an instance of Generator; got 42"),
        (lambda: model(tokens(), tokens()[:, :3]), r"`targets` must have the shape \(2, 10\)"),
        (lambda: model.generate(tokens(), -1), r"`max_new_tokens`"),
        (lambda: model.generate(tokens(), 1, temperature=-1.0), r"`temperature`"),
        (lambda: model.generate(tokens(), 1, top_k=0), r"`top_k`"),
        (lambda: GPTLanguageModel(11, 10, 4, 1, 3, 0.0), r"`n_head` must divide n_embd=10; got 3"),
        (lambda: GPTLanguageModel(0, 10, 4, 1, 2, 0.0), r"`vocab_size`"),
        (lambda: GPTLanguageModel(5, 10, 4, 1, 2, 2.0), r"`dropout`"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_a_head_that_remembers_nothing_needs_no_cache():
    class Own(torch.nn.Linear):
        def forward(self, u):
            return super().forward(u)

    model = gpt()
    model.blocks[0].sa.heads[0] = Own(E, model.blocks[0].sa.heads[0].key.out_features)
    with pytest.raises(TypeError, match=r"`use_cache` must be False with a head of type Own"):
        model.generate(tokens(time=3), 2)
    assert model.generate(tokens(time=3), 2, use_cache=False).shape == (2, 5)


def test_what_has_no_target_is_passed_over():
    model, idx = gpt(), tokens()
    targets = idx.roll(-1, 1)
    targets[:, -1] = -100
    loss = model(idx, targets)[1]
    torch.testing.assert_close(loss, model(idx, targets.int())[1])
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(model(idx)[0][:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    )


@pytest.mark.parametrize("temperature", [1e-40, 1e-46])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature):
    model, start = gpt(), tokens(time=3)
    assert torch.equal(model.generate(start, 4, temperature=temperature), model.generate(start, 4, temperature=0.0))


def test_generation_leaves_every_module_in_its_mode():
    model = gpt(dropout=0.5).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    model.generate(torch.zeros(1, 1, dtype=torch.long), 2)
    assert [module.training for module in model.modules()] == before


def test_of_equal_logits_no_more_than_k_are_drawn():
    model = gpt()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
    drawn = model.generate(torch.zeros(100, 1, dtype=torch.long), 1, top_k=2)[:, 1]
    assert len(drawn.unique()) == 2
