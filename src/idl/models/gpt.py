"""A small GPT, explicit until some of its heads are replaced."""

import inspect
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from idl import checks
from idl.transforms import transforms_are_active

_NO_TARGET = -100  # what torch's cross entropy passes over


class Head(nn.Module):
    """One explicit head of causal self-attention.

    Args:
        head_size: Size of keys, queries, values and output.
        n_embd: Size of a token.
        dropout: Probability of dropping a weight in training.
    """

    def __init__(self, head_size: int, n_embd: int, dropout: float) -> None:
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.dropout = dropout

    def forward(self, u: Tensor, *, past: Any = None, return_past: bool = False) -> Any:
        """Return outputs ``(batch, time, head_size)``, and with ``return_past`` keys and values up to now as well."""
        q, k, v = self.query(u), self.key(u), self.value(u)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        queries, keys = q.shape[1], k.shape[1]
        mask = None
        if past is not None and queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=u.device).tril_(keys - queries)
        dropout = self.dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=past is None)
        return (output, (k, v)) if return_past else output


class SelfAttention(nn.Module):
    """Heads side by side, and a projection of what they give.

    A head is any module with the call of :class:`Head` or :class:`~idl.IDLHead`; those in ``heads`` may be replaced.

    Args:
        n_embd: Size of a token.
        n_head: Number of heads.
        dropout: See :class:`Head`.
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(n_embd // n_head, n_embd, dropout) for _ in range(n_head))
        self.projection = nn.Linear(n_embd, n_embd)

    def forward(self, u: Tensor, *, past: Any = None, return_past: bool = False) -> Any:
        """Return outputs ``(batch, time, n_embd)``, and with ``return_past`` what each head remembers as well."""
        if past is None and not return_past:
            return self.projection(torch.cat([head(u) for head in self.heads], -1))
        pasts = [None] * len(self.heads) if past is None else past
        pairs = [head(u, past=p, return_past=True) for head, p in zip(self.heads, pasts, strict=True)]
        output = self.projection(torch.cat([o for o, _ in pairs], -1))
        return (output, [p for _, p in pairs]) if return_past else output


class Block(nn.Module):
    """Self-attention and a feed-forward network, each on what is normalised before and added to what came in.

    Args:
        n_embd: Size of a token.
        n_head: Number of heads.
        dropout: Probability of dropping, of weights of attention and of what is added.
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.sa: nn.Module = SelfAttention(n_embd, n_head, dropout)
        self.ffwd = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, past: Any = None, return_past: bool = False) -> Any:
        """Return tokens ``(batch, time, n_embd)``, and with ``return_past`` what attention remembers as well."""
        if past is None and not return_past:
            attended, past = self.sa(self.ln1(x)), None
        else:
            attended, past = self.sa(self.ln1(x), past=past, return_past=True)
        x = x + self.dropout(attended)
        x = x + self.dropout(self.ffwd(self.ln2(x)))
        return (x, past) if return_past else x


class GPTLanguageModel(nn.Module):
    """Predict the next token of a sequence: a decoder of blocks with learned positions.

    ``blocks[i].sa.heads`` are the heads of block ``i``, which may be replaced by :class:`~idl.IDLHead`, and
    ``blocks[i].sa`` may be replaced by :class:`~idl.IDLAttention` (or all of them by
    :func:`idl.nn.convert_attention`).

    Args:
        vocab_size: Number of tokens that there are.
        n_embd: Size of a token inside.
        block_size: Most tokens of a sequence.
        n_layer: Number of blocks.
        n_head: Number of heads of each; must divide ``n_embd``.
        dropout: Probability of dropping in training, in [0, 1].

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> model = GPTLanguageModel(vocab_size=65, n_embd=32, block_size=16, n_layer=2, n_head=4, dropout=0.0)
        >>> logits, loss = model(torch.zeros(2, 16, dtype=torch.long))
        >>> logits.shape
        torch.Size([2, 16, 65])
    """

    def __init__(
        self, vocab_size: int, n_embd: int, block_size: int, n_layer: int, n_head: int, dropout: float
    ) -> None:
        super().__init__()
        self.vocab_size = checks.positive_integer("vocab_size", vocab_size)
        self.n_embd = checks.positive_integer("n_embd", n_embd)
        self.block_size = checks.positive_integer("block_size", block_size)
        n_layer, n_head = checks.positive_integer("n_layer", n_layer), checks.positive_integer("n_head", n_head)
        if n_embd % n_head:
            raise ValueError(f"`n_head` must divide n_embd={n_embd}; got {n_head}.")
        dropout = checks.in_unit("dropout", dropout)
        self.token_embedding = nn.Embedding(self.vocab_size, self.n_embd)
        self.position_embedding = nn.Embedding(self.block_size, self.n_embd)
        self.blocks = nn.ModuleList(Block(self.n_embd, n_head, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(self.n_embd)
        self.lm_head = nn.Linear(self.n_embd, self.vocab_size)
        self.apply(_initialise)

    def forward(
        self, idx: Int[Tensor, "batch time"], targets: Int[Tensor, "batch time"] | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], Float[Tensor, ""] | None]:
        """Return the logits of each next token, and the mean cross entropy of ``targets``, ``None`` without.

        Args:
            idx: Tokens, integers from 0 to ``vocab_size - 1``.
            targets: Next tokens; -100 where there is none to predict.

        Raises:
            TypeError, ValueError: If shapes do not fit, there are more than ``block_size`` tokens, or one is not in the
                vocabulary (seen on a CPU; other devices have errors of their own).
        """
        x = self._embedded(idx, 0)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        _check_tokens("targets", targets)
        _check_range("targets", targets[targets != _NO_TARGET], self.vocab_size)
        if targets.shape != idx.shape:
            raise ValueError(f"`targets` must have the shape {tuple(idx.shape)} of idx; got {tuple(targets.shape)}.")
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())

    @torch.no_grad()
    def generate(
        self,
        idx: Int[Tensor, "batch time"],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Return the tokens followed by new ones, drawn one after another, without dropout.

        Keys and values of earlier tokens are remembered, so that a token costs what it reads: linear in the tokens
        before it. Once there are more than ``block_size`` every position is another one, and the last ``block_size``
        are computed anew for each token.

        Args:
            idx: Tokens to go on from, at least one.
            max_new_tokens: Number of new ones.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Draw from this many most likely tokens only.
            use_cache: Whether to remember; heads of one's own without ``past`` and ``return_past`` need ``False``.
            generator: Source of randomness; torch's own if ``None``.

        Raises:
            TypeError, ValueError: If an argument is out of range.
        """
        checks.non_negative_integer("max_new_tokens", max_new_tokens)
        checks.boolean("use_cache", use_cache)
        if generator is not None:
            advice = "Try torch.Generator().manual_seed(0)."
            checks.instance("generator", generator, torch.Generator, advice)
        temperature = checks.non_negative("temperature", temperature)
        top_k = None if top_k is None else checks.positive_integer("top_k", top_k)
        _check_tokens("idx", idx)
        if use_cache:
            for block in self.blocks:
                attention = cast(Block, block).sa
                for head in attention.heads if isinstance(attention, SelfAttention) else (attention,):
                    _check_remembers(head)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            past = None
            for _ in range(max_new_tokens):
                if use_cache and idx.shape[1] <= self.block_size:
                    new = idx if past is None else idx[:, -1:]
                    logits, past = self._continued(new, past)
                else:
                    logits, _ = self(idx[:, -self.block_size :])
                idx = torch.cat((idx, _drawn(logits[:, -1], temperature, top_k, generator)), 1)
        finally:
            for module, training in modes.items():
                module.training = training
        return idx

    def _continued(self, idx: Tensor, past: list[Any] | None) -> tuple[Tensor, list[Any]]:
        """Return logits after new tokens, and what each block remembers, with the number of tokens before it."""
        before, pasts = (0, [None] * len(self.blocks)) if past is None else past
        x, now = self._embedded(idx, before), []
        for block, p in zip(self.blocks, pasts, strict=True):
            x, p = block(x, past=p, return_past=True)
            now.append(p)
        return self.lm_head(self.ln_f(x)), [before + idx.shape[1], now]

    def _embedded(self, idx: Tensor, before: int) -> Tensor:
        _check_tokens("idx", idx)
        _check_range("idx", idx, self.vocab_size)
        if before + idx.shape[1] > self.block_size:
            raise ValueError(
                f"`idx` must have at most block_size={self.block_size} tokens; got {before + idx.shape[1]}. "
                f"Cut the sequence: idx[:, -{self.block_size}:]."
            )
        positions = torch.arange(before, before + idx.shape[1], device=idx.device)
        embedded: Tensor = self.token_embedding(idx) + self.position_embedding(positions)
        return embedded


def _check_remembers(head: nn.Module) -> None:
    parameters = inspect.signature(head.forward).parameters
    if not {"past", "return_past"} <= parameters.keys() and not any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    ):
        raise TypeError(
            f"`use_cache` must be False with a head of type {type(head).__name__}, whose forward has no `past` and "
            "`return_past`; got True."
        )


def _check_tokens(name: str, tokens: Tensor) -> None:
    checks.instance(name, tokens, Tensor, f"Try torch.tensor({name}).")
    if tokens.dim() != 2 or not tokens.shape[1] or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`{name}` must be integers (int32 or int64) of shape (batch, time) with at least one time; got "
            f"{tokens.dtype} {tuple(tokens.shape)}."
        )


def _check_range(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Check that there are such tokens, where that needs no wait for a device."""
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or transforms_are_active() or not tokens.numel():
        return
    least, largest = int(tokens.min()), int(tokens.max())
    if least < 0 or largest >= vocab_size:
        wrong = least if least < 0 else largest
        raise ValueError(f"`{name}` must lie in 0..{vocab_size - 1}, below vocab_size; got {wrong}.")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _drawn(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Return a token for each row, ``(batch, 1)``."""
    if temperature < torch.finfo(logits.dtype).tiny:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: a small temperature gives no infinity
    if top_k is not None and top_k < logits.shape[-1]:
        largest, places = logits.topk(top_k)  # not what is as large as the least of them: there may be more than k
        logits = torch.full_like(logits, -torch.inf).scatter(-1, places, largest)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
