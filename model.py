"""The language model: token embedding, n_layer blocks of attention and experts, one tied head. And what it costs.

    tokens (B, T) -> embed -> [ x + attn(norm(x));  x + moe(norm(x)) ] x n_layer -> norm -> embed^T -> logits (B, T, V)

RMSNorm before each half, rotary positions inside attention, no biases outside attention, no dropout; the head is the
embedding (tied). Everything that a run reports about its model is read off the live module by the methods below.

    config = ModelConfig(vocab_size=4096, attn='lora')
    model = LanguageModel(config, seed=0)
    out = model(tokens, targets)                # training and evaluation: Output, losses apart from each other
    logits = model(tokens)                      # (B, T, V)
    for new in model.generate([prompt], 100):   # decoding with a cache
"""
import hashlib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn

from attention import DEFAULTS, RMSNorm, attention_settings, build_attention, rope_tables
from moe import MixtureOfExperts, product
from muon import Muon


@dataclass
class ModelConfig:
    """Sizes and kinds. __post_init__ raises ValueError for what makes no model, and fills in `attn`'s row where None."""
    # Attention: the variant, and its ingredients; none: as in the variant's row. One given by hand overrides the row
    attn: str = 'baseline'                  # baseline, gqa, mqa, lora, enhanced, mla; attention.py explains each
    n_kv_head: int | None = None            # key/value heads (multi-head variants); must divide n_head
    q_lora_rank: int | None = None          # rank of the query bottleneck (latent variants); 0: queries straight from x
    kv_lora_rank: int | None = None         # rank of the latent that k and v are made from, the part of it that is cached
    qk_nope_head_dim: int | None = None     # width of a head's content score
    qk_rope_head_dim: int | None = None     # width of its rotary score, even; also the width of the one cached rotary key
    v_head_dim: int | None = None           # width of a head's value
    attention_bias: bool | None = None      # biases in attention (latent: on q_a_proj, kv_a_proj_with_mqa and o_proj only)
    qk_norm: bool | None = None             # RMSNorm on each query and key head before the rotation (multi-head variants)
    rope_scaling: Literal['default', 'linear', 'dynamic', 'yarn'] | None = None    # how rotary frequencies are stretched
    rope_factor: float | None = None        # by how much, 1 (nothing) or more; needs rope_scaling

    # Rotary positions, whatever the variant
    rope_theta: float = 10000.0             # base of the frequencies
    rope_original_context: int | None = None    # context that dynamic and yarn stretch from; none: block_size
    rope_beta_fast: float = 32.0            # yarn: pairs that turn more often than this within that context stay
    rope_beta_slow: float = 1.0             # yarn: pairs that turn less often than this are stretched by the whole factor
    rope_mscale: float = 1.0                # yarn: temperature multiplier on cos and sin (DeepSeek's mscale)
    rope_mscale_all_dim: float = 0.0        # yarn: temperature multiplier on whole scores; DeepSeek-V2/V3: as rope_mscale

    # Model
    n_layer: int = 6                        # blocks
    n_head: int = 8                         # query heads
    n_embd: int = 384                       # width
    block_size: int = 512                   # context in tokens
    vocab_size: int = 4096                  # tokens in the vocabulary that bpe trains

    # Experts
    d_ff: int = 1536                        # hidden width of one expert
    n_expert: int = 8                       # experts in each layer
    top_k: int = 2                          # experts that each token visits (experts' choice)
    n_shared_expert: int = 0                # experts that every token visits besides
    router: Literal['softmax', 'sigmoid'] = 'softmax'   # sigmoid: DeepSeek-V3's, balanced by a bias instead of a loss
    routed_scaling_factor: float = 1.0      # multiplies the routed experts' sum; DeepSeek-V3: 2.5 at top-8

    def __post_init__(self):
        for knob in ('vocab_size', 'block_size', 'n_layer', 'd_ff', 'n_expert'):
            if getattr(self, knob) < 1:
                raise ValueError(f'{knob} must be at least 1, not {getattr(self, knob)}')
        if not 1 <= self.top_k <= self.n_expert:
            raise ValueError(f'top_k ({self.top_k}) must be between 1 and n_expert ({self.n_expert})')
        if self.n_shared_expert < 0:
            raise ValueError(f'n_shared_expert must be 0 (none) or more, not {self.n_shared_expert}')
        if self.router not in ('softmax', 'sigmoid'):
            raise ValueError(f'unknown router {self.router!r} (one of softmax, sigmoid)')
        if self.rope_theta <= 1:
            raise ValueError(f'rope_theta must be above 1, not {self.rope_theta}')
        if not 0 < self.rope_beta_slow < self.rope_beta_fast:
            raise ValueError(f'rope_beta_slow ({self.rope_beta_slow}) must be above 0 and below rope_beta_fast '
                             f'({self.rope_beta_fast})')
        if self.rope_original_context is not None and self.rope_original_context < 1:
            raise ValueError(f'rope_original_context must be at least 1, not {self.rope_original_context}')
        given = {knob: getattr(self, knob) for knob in DEFAULTS}
        self.__dict__.update(attention_settings(self.attn, self.n_embd, self.n_head, **given))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.n_embd), build_attention(config)
        self.moe_norm, self.moe = RMSNorm(config.n_embd), MixtureOfExperts(config)

    def forward(self, x, rope, mask=None, cache=None, slots=None, span=None):
        x = x + self.attn(self.attn_norm(x), rope, mask, cache, slots, span)
        y, routing = self.moe(self.moe_norm(x), with_balance=cache is None)     # for the loss and the log
        return x + y, routing


class Output(NamedTuple):
    """What a forward with targets returns. nll, correct and load are sums, so that micro-batches and processes simply add
    up; the routers' losses and entropy are means over sequences or tokens, to be weighted by the share of the batch. The
    losses are summed over layers, so that a layer's router feels the same pressure in a model of any depth."""
    nll: torch.Tensor               # scalar, nats: cross-entropy summed over the targets
    correct: torch.Tensor           # scalar: how many targets had the largest logit
    balance_loss: torch.Tensor      # scalar: mean over sequences, sum over layers: n_layer when even, see moe.Routing
    z_loss: torch.Tensor            # scalar: mean over tokens, sum over layers
    load: torch.Tensor              # (n_layer, E) token copies
    entropy: torch.Tensor           # (n_layer,) nats


class LinearCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy in one, over chunks of tokens, so that the (N, V) logits never exist whole.

    x (N, C), weight (V, C), targets (N,), -1 where there is nothing to predict -> nll summed, number correct. Logits and
    softmax are float32 whatever dtype the product ran in. The gradient, softmax - onehot, is finished while a chunk's
    logits are at hand, so nothing is computed twice and nothing but the (N, C) and (V, C) results is kept.
    torch 2.13 has F.linear_cross_entropy for this, 2.11 has not.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, with_grad):
        wide = torch.promote_types(x.dtype, torch.float32)
        nll, correct = x.new_zeros((), dtype=wide), targets.new_zeros(())
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight, dtype=wide)) if with_grad else (None, None)
        for i in range(0, len(x), chunk):
            s = slice(i, i + chunk)
            logits, target = (x[s] @ weight.T).to(wide), targets[s].unsqueeze(1)        # (n, V), (n, 1)
            counts = target >= 0
            target = target.clamp_min(0)
            largest, best = logits.max(1, keepdim=True)
            correct = correct + ((best == target) & counts).sum()                       # not +=, see attention.RMSNorm
            logits -= largest                                                           # so that no exp overflows
            at_target = logits.gather(1, target)
            p = logits.exp_()
            total = p.sum(1, keepdim=True)
            nll = nll + torch.where(counts, total.log() - at_target, 0).sum()
            if with_grad:
                p = p.mul_(counts / total)                                              # softmax; 0 where nothing counts
                p = p.scatter_add_(1, target, -counts.to(wide)).to(x.dtype)
                torch.mm(p, weight, out=dx[s])
                dw += p.T @ x[s]
        if with_grad:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_nll, _):
        dx, dw = ctx.saved_tensors
        return dx * d_nll.to(dx.dtype), dw * d_nll.to(dw.dtype), None, None, None


class LanguageModel(nn.Module):
    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """Every parameter from its own generator, seeded with (seed, its name): what two variants share starts equal.

            norm gains                                       1
            biases                                           0
            o_proj, down_proj (they write to the residual)   0
            embedding, router                                N(0, 0.02)
            all other matrices                               N(0, 1 / fan_in)

        fan_in, because a fixed 0.02, which suits GPT-2's width of 768, starts a narrow model on a plateau: at 96 wide its
        seeds then differ by when they leave it (results/README.md, "Why the first answer was wrong"). Zeros, so that a
        block is the identity at first and no layer's noise reaches the others. A router of zeros would send every token
        to the same experts. Numbers are drawn on the CPU in float32, so that they do not depend on the device.
        """
        for name, p in self.named_parameters():
            kind = name.split('.')[-2] if name.endswith(('.weight', '.bias')) else name.split('.')[-1]
            if name.endswith('.bias') or kind.endswith(('o_proj', 'down_proj')):
                p.zero_()
            elif kind.endswith('norm'):
                p.fill_(1.0)
            elif kind.endswith('_proj') or kind in ('embed', 'router', 'kv_a_proj_with_mqa'):
                std = 0.02 if kind in ('embed', 'router') else p.size(-1) ** -0.5
                key = int.from_bytes(hashlib.sha256(f'{seed}:{name}'.encode()).digest()[:7], 'little')
                p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=torch.Generator().manual_seed(key)))
            else:
                raise ValueError(f'init_weights has no rule for {name}: name it like what it is, or add a rule')

    # ------------------------------------------------------------------------------------------------------------------
    # Forward

    def forward(self, tokens, targets=None):
        """tokens (B, T) int64, T <= block_size -> logits (B, T, V); with targets (B, T), -1 for none -> Output."""
        B, T = tokens.shape
        rope = rope_tables(self.config, torch.arange(T, device=tokens.device), T, self.wide())
        x, routing = self.trunk(self.embed(tokens), rope)
        return self.head(x) if targets is None else self.head_loss(x, targets, routing)

    def trunk(self, x, rope, mask=None, caches=None, slots=None, span=None):
        """The blocks and the last norm: x (B, T, C) -> (B, T, C), and a moe.Routing per layer (None when decoding)."""
        routing = []
        for i, layer in enumerate(self.layers):
            x, r = layer(x, rope, mask, caches[i] if caches is not None else None, slots, span)
            routing.append(r)
        return self.norm(x), routing

    def head(self, x):
        """x (..., C) -> logits (..., V)."""
        return product(x.reshape(-1, x.size(-1)), self.embed.weight).view(*x.shape[:-1], -1).to(self.wide())

    def head_loss(self, x, targets, routing):
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        # as many rows at a time as make 8 MiB of logits on a CPU (its cache), 256 MiB elsewhere
        chunk = max(1, 2 ** (21 if x.device.type == 'cpu' else 26) // self.config.vocab_size)
        with torch.autocast(x.device.type, enabled=False):
            nll, correct = LinearCrossEntropy.apply(x.flatten(0, 1).to(dtype), self.embed.weight.to(dtype),
                                                    targets.flatten(), chunk, torch.is_grad_enabled())
        balance_loss, z_loss, load, entropy = (torch.stack(s) for s in zip(*routing))
        return Output(nll, correct, balance_loss.sum(), z_loss.sum(), load, entropy)

    def narrow(self, dtype):
        """For decoding: everything in `dtype` but gains and router, which are float32 in training too. -> self"""
        self.to(dtype)
        for name, module in self.named_modules():
            if name.endswith(('norm', 'router')):
                module.float()
        return self

    def wide(self):
        """float32, or float64 in a float64 model: the dtype of angles and logits."""
        return torch.promote_types(self.embed.weight.dtype, torch.float32)

    # ------------------------------------------------------------------------------------------------------------------
    # Optimizer

    def configure_optimizers(self, learning_rate, weight_decay=0.1, betas=(0.9, 0.95), muon=False):
        """-> [AdamW], or [AdamW, Muon]. Each parameter has exactly one owner and decays only if it is a matrix.

        With muon=True the matrices inside the blocks go to Muon, each expert being a matrix of its own; embedding, router,
        norms and biases stay with AdamW. Fused AdamW: one pass over parameters, gradients and moments.
        """
        named = list(self.named_parameters())
        of_muon = {n for n, p in named if muon and p.ndim >= 2 and not n.startswith('embed') and '.router.' not in n}
        matrices = [p for n, p in named if p.ndim >= 2 and n not in of_muon]
        vectors = [p for n, p in named if p.ndim < 2]                               # norm gains and biases
        groups = [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors, 'weight_decay': 0.0}]
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
        # AdamW's moments, made as its first step would make them, but now: made among activations that come and go, they
        # leave 0.1 GB of holes in a CPU's heap (results/notes.md)
        for p in matrices + vectors:
            if p.is_cpu:
                adamw.state[p] = {'step': torch.zeros(()), 'exp_avg': torch.zeros_like(p),
                                  'exp_avg_sq': torch.zeros_like(p)}
        if not muon:
            return [adamw]
        return [adamw, Muon([p for n, p in named if n in of_muon], lr=learning_rate, weight_decay=weight_decay)]

    # ------------------------------------------------------------------------------------------------------------------
    # What it costs

    def parameter_counts(self):
        """-> dict: params_total, params_active (what one token uses), params_attention, params_experts, ...

        Active leaves out the routed experts that a token does not visit. The tied embedding counts once, in both.
        """
        config, groups = self.config, dict.fromkeys(('embedding', 'attention', 'experts', 'shared', 'router', 'norm'), 0)
        for name, p in self.named_parameters():
            group = ('embedding' if name.startswith('embed.') else 'attention' if '.attn.' in name else
                     'router' if '.router.' in name else 'shared' if '.moe.shared_' in name else
                     'experts' if '.moe.' in name else 'norm')
            groups[group] += p.numel()
        total = sum(groups.values())
        idle = groups['experts'] // config.n_expert * (config.n_expert - config.top_k)
        return {'params_total': total, 'params_active': total - idle, **{f'params_{k}': v for k, v in groups.items()}}

    def flops_per_token(self):
        """Model FLOPs to train on one token at full context: 6 per active parameter, and attention's own products.

        A weight costs 2 FLOPs forward (multiply, add) and 4 backward; the head is the embedding matrix as a product, its
        look-up costs nothing. A query meets block_size keys in each layer, 2 FLOPs per dim of score and of value forward,
        twice that backward: 6 T (score width + value width), the 12 L H Q T of PaLM (arXiv 2204.02311, appendix B) where
        the widths are equal. By that convention the half that causality spares is counted, and softmax, norms and the
        optimizer are not.
        """
        pairs = sum(sum(layer.attn.score_and_value_width()) for layer in self.layers)
        return 6 * self.parameter_counts()['params_active'] + 6 * self.config.block_size * pairs

    def cache_bytes_per_token(self, dtype):
        """Bytes that decoding keeps for each token, all layers: the size of what new_cache() really allocates."""
        caches = [layer.attn.new_cache(1, 1, dtype=dtype, device='meta') for layer in self.layers]
        return sum(c.numel() * c.element_size() for c in caches)

    # ------------------------------------------------------------------------------------------------------------------
    # Decoding

    def new_cache(self, batch, capacity, starts=None, static=False):
        return Cache(self, batch, capacity, starts, static)

    @torch.no_grad()
    def decode(self, tokens, cache, trunk=None, last=True):
        """Append tokens (B, T) to what `cache` holds -> logits (B, V) of the last one, or (B, T, V) with last=False.

        The numbers of forward() over the whole sequence (under dynamic scaling, with the angles of `capacity` tokens).
        `trunk` may be a compiled self.trunk. Raises ValueError when the cache is full.
        """
        B, T = tokens.shape
        if cache.filled + T > cache.capacity:
            raise ValueError(f'the cache has {cache.capacity} slots, {cache.filled} of them filled: '
                             f'no room for {T} more tokens')
        slots, span, positions, mask = cache.advance(T)
        rope = rope_tables(self.config, positions, cache.capacity, self.wide())
        x, _ = (trunk or self.trunk)(self.embed(tokens), rope, mask, cache.layers, slots, span)
        return self.head(x[:, -1] if last else x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, seed=0, trunk=None, static=False):
        """Yield max_new_tokens times the next token of every prompt, an int64 tensor (B,) on the CPU.

        prompts: B lists of token ids, at least one each; they may differ in length. temperature 0 takes the largest
        logit; otherwise softmax(logits / temperature) over the top_k largest (None: all), drawn from a CPU generator
        seeded with `seed`. A full cache (block_size tokens) is rebuilt from its newest half, so that text can be longer
        than the context: a token then sees between block_size / 2 and block_size tokens. Until then each prompt gets
        the logits it would get alone (but under dynamic scaling past its original context, where angles are those of the
        whole cache); draws come from one generator for all. trunk: see decode(); static: see Cache. Raises ValueError.
        """
        if not prompts or not all(prompts):
            raise ValueError('every prompt needs at least one token')
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f'temperature ({temperature}) must be 0 or more, top_k ({top_k}) at least 1')
        size, device = self.config.block_size, self.embed.weight.device
        generator = torch.Generator().manual_seed(seed)
        texts = [list(p)[-size:] for p in prompts]
        cache = new = None
        for _ in range(max_new_tokens):
            if cache is None or cache.filled == cache.capacity:
                if cache is not None:
                    texts = [t[-(size // 2 or 1):] for t in texts]
                longest = max(map(len, texts))
                starts = [longest - len(t) for t in texts]                          # empty slots to the left of short ones
                tokens = torch.tensor([[0] * s + t for s, t in zip(starts, texts)], device=device)
                cache = self.new_cache(len(texts), min(size, longest + max_new_tokens), starts, static)
                logits = self.decode(tokens, cache, trunk)
            else:
                logits = self.decode(new.to(device).unsqueeze(1), cache, trunk)
            logits = logits.float().cpu()                                           # (B, V)
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                if top_k is not None and top_k < logits.size(-1):
                    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
            for text, token in zip(texts, new.tolist()):
                text.append(token)
            yield new


class Cache:
    """What decoding keeps: one preallocated tensor per layer, and how many of its `capacity` slots are filled.

    starts: per row, how many slots at the front are empty, for prompts of different lengths (padded on the left).
    static: after the prompt every call attends over all slots and leaves the rest to the mask, so that no shape changes
    from token to token and a compiled trunk is never compiled again; without it only the filled slots are touched.
    Angles of dynamic RoPE scaling are those of a sequence of `capacity` tokens from the first to the last: keys are
    cached turned, so the frequencies must not change under way.
    """

    def __init__(self, model, batch, capacity, starts=None, static=False):
        weight = model.embed.weight
        self.layers = [layer.attn.new_cache(batch, capacity, weight.dtype, weight.device) for layer in model.layers]
        self.capacity, self.filled, self.static = capacity, 0, static
        self.device = weight.device
        self.starts = torch.tensor(starts, device=weight.device).unsqueeze(1) if starts and any(starts) else None  # (B, 1)

    def advance(self, T):
        """Take the next T slots -> slots (T,), span, positions (T,) or (B, T), mask (1 or B, 1, T, span) or None."""
        first, self.filled = self.filled, self.filled + T
        span = self.capacity if self.static else self.filled
        slots = torch.arange(first, self.filled, device=self.device)
        positions = slots if self.starts is None else (slots - self.starts).clamp_min(0)
        if first == 0 and self.starts is None and not (self.static and T == 1):
            return None, T, positions, None                                         # plain causal attention among themselves
        if T == 1 and self.starts is None and not self.static:
            return slots, span, positions, None                                     # the newest token sees everything
        key, query = torch.arange(span, device=self.device), slots.unsqueeze(1)
        mask = key <= query                                                         # (T, span)
        if self.starts is not None:                     # an empty slot sees itself, lest its softmax be over nothing: NaN
            mask = mask & ((key >= self.starts.unsqueeze(-1)) | (key == query))     # (B, T, span)
        return slots, span, positions, mask.view(-1, 1, T, span)

    def bytes(self):
        return sum(c.numel() * c.element_size() for c in self.layers)
