"""Decoding: what is kept of the tokens so far, and the choice of the next one.

    cache = model.new_cache(batch, capacity)            # a Cache; what a layer keeps of a token is attention.py's affair
    logits = model.decode(tokens, cache)                # of the last token, appended to what the cache holds
    for new in generate(model, prompts, 100):           # prompts of any lengths, texts longer than the context

B sequences, T new tokens, S tokens that can be attended to (cached and new), V tokens in the vocabulary.
"""
import math

import torch


class Cache:
    """What decoding keeps of up to `capacity` tokens: tensors for every layer, and how many slots are filled.

    model.decode() takes slots for T new tokens with advance(T), which says at which positions they stand; then every
    layer appends to its own LayerCache, cache.layers[i].

    starts: per row, how many slots at the front stay empty, for prompts of different lengths (padded on the left).
    static: tokens after the prompt attend over all slots and leave the rest to the mask, so that no shape changes from
    token to token and a compiled model is not compiled again; otherwise only the filled slots are touched.
    """

    def __init__(self, layers, capacity, starts=None, static=False):
        self.layers = [LayerCache(self, *tensors) for tensors in layers]
        self.capacity, self.filled, self.static = capacity, 0, static
        device = layers[0][0].device
        self.starts = torch.tensor(starts, device=device).view(-1, 1, 1) if starts and any(starts) else None
        self.slot_numbers = torch.arange(capacity, device=device)

    def advance(self, T):
        """Take the next T slots -> their positions, (T,) or (B, 1, T). Raises ValueError when there is no room."""
        if self.filled + T > self.capacity:
            raise ValueError(f'the cache has {self.capacity} slots, {self.filled} of them filled: '
                             f'no room for {T} more tokens')
        first, self.filled = self.filled, self.filled + T
        self.slots = self.slot_numbers[first:self.filled]               # (T,) of the new tokens
        self.alone = first == 0                                         # a prompt attends to itself, not to the cache
        self.attended = self.capacity if self.static and not self.alone else self.filled
        if self.starts is None and (self.alone or (T == 1 and not self.static)):
            self.mask = 'causal' if self.alone else None                # the newest token sees everything
        else:
            key, query = self.slot_numbers[:self.attended], self.slots.unsqueeze(1)
            self.mask = key <= query                                    # (T, S)
            if self.starts is not None:         # an empty slot sees itself, lest its softmax be over nothing: NaN
                self.mask = self.mask & ((key >= self.starts) | (key == query))
                self.mask = self.mask.unsqueeze(1)                      # (B, 1, T, S)
        return self.slots if self.starts is None else (self.slots - self.starts).clamp_min(0)

    def bytes(self):
        return sum(t.nbytes for layer in self.layers for t in layer.tensors)


class LayerCache:
    """One layer's part of a Cache: tensors (B, heads, capacity, width)."""

    def __init__(self, cache, *tensors):
        self.cache, self.tensors = cache, tensors

    @property
    def mask(self):
        """Which tokens the new ones may attend to: see kernels.attention."""
        return self.cache.mask

    @property
    def slots(self):
        """(T,) where among all slots the new tokens stand."""
        return self.cache.slots

    def append(self, *new):
        """Keep the new tokens' tensors (B, heads, T, width) -> those of all tokens to be attended (B, heads, S, width)."""
        for kept, tensor in zip(self.tensors, new):
            kept.index_copy_(2, self.slots, tensor.to(kept.dtype))
        if self.cache.alone:
            return new
        return [kept[:, :, :self.cache.attended].to(new[0].dtype) for kept in self.tensors]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=0, compiled=None):
    """Yield max_new_tokens times the next token of every prompt, an int64 tensor (B,) on the CPU.

    prompts: B lists of token ids, at least one each, of any lengths; each gets the logits it would get alone until the
    longest fills the cache; not under `dynamic` scaling, whose angles follow the size of the cache that all share.
    temperature 0 (below 1e-6) takes the largest logit; else a draw from softmax(logits / temperature) over the top_k
    largest (None: all) and, of these, the fewest that together have probability top_p (nucleus sampling, Holtzman et al.
    2020, arXiv 1904.09751), by one CPU generator seeded with `seed`. A full cache (block_size tokens) is rebuilt from its
    newest half, so that text can be longer than the context. compiled: a torch.compile(model.trunk), which then runs on
    every token after the prompts, over a static Cache; prompts are read once and differ in length, so they are not
    compiled. Raises ValueError.
    """
    if not prompts or not all(prompts):
        raise ValueError('every prompt needs at least one token')
    if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f'temperature ({temperature}) must be 0 or more, top_k ({top_k}) at least 1, '
                         f'top_p ({top_p}) above 0 and at most 1')
    size, device = model.config.block_size, model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    texts, cache = [list(p)[-size:] for p in prompts], None
    capacity = min(size, max(map(len, texts)) + max_new_tokens)                     # of every cache: one shape to compile
    for _ in range(max_new_tokens):
        if cache and cache.filled < capacity:
            tokens, trunk = new.to(device).unsqueeze(1), compiled
        else:
            texts = [t[-(size // 2 or 1):] for t in texts] if cache else texts
            longest = max(map(len, texts))
            starts = [longest - len(t) for t in texts]                              # empty slots to the left of short ones
            tokens, trunk = torch.tensor([[0] * s + t for s, t in zip(starts, texts)], device=device), None
            cache = model.new_cache(len(texts), capacity, starts, compiled is not None)
        new = choose(model.decode(tokens, cache, trunk).float().cpu(), temperature, top_k, top_p, generator)
        for text, token in zip(texts, new.tolist()):
            text.append(token)
        yield new


def choose(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> the next token of every row, (B,): see generate."""
    if temperature < 1e-6 or top_k == 1:                        # nothing to draw; logits / temperature could overflow
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.size(-1):           # exactly top_k, also among equal logits
        largest, which = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(1, which, largest)
    p = (logits / temperature).softmax(-1)
    if top_p is not None:
        ranked, order = p.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked                                         # what the likelier tokens have together
        before[:, 0] = -1.0                                         # the likeliest stays, even if top_p rounds to 0
        p = torch.zeros_like(p).scatter(1, order, ranked.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(p, 1, generator=generator).squeeze(1)
