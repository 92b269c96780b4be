"""The language model: token embedding, n_layer blocks of attention and experts, one tied head. And what it costs.

    tokens (B, T) -> embed -> [ x + attn(norm(x));  x + moe(norm(x)) ] x n_layer -> norm -> embed^T -> logits (B, T, V)

RMSNorm before each half, rotary positions inside attention, no biases outside attention, no dropout; the head is the
embedding (tied) unless told otherwise. Everything that a run reports about its model is read off the live module by the
methods below.

    model = LanguageModel(ModelConfig(vocab_size=4096, attn='lora'), seed=0)
    out = model(tokens, targets)                # training and evaluation: Output, losses apart from each other
    logits = model(tokens)                      # (B, T, V); with a cache: decoding.py
"""
import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn

import kernels
from attention import RMSNorm, build_attention, lay_over_row, require, rope_tables
from decoding import Cache
from moe import MixtureOfExperts, SwiGLU


@dataclass
class ModelConfig:
    """Every knob of the network, once: configurator.py reads these lines, and they are flags of train.py.

    A knob whose default is None is filled in from the variant's row, where that names it. ValueError: they make no model.
    """
    # What is compared
    attn: str = 'baseline'                  # attention variant: baseline, gqa, mqa, lora, enhanced, mla; see attention.py

    # Ingredients of the variant; none: as in the variant's row. One given by hand overrides the row
    n_kv_head: int | None = None            # key/value heads (multi-head variants); must divide n_head
    head_dim: int | None = None             # width of a head (multi-head variants)
    qk_norm: bool | None = None             # RMSNorm on each query and key head before the rotation (multi-head variants)
    q_lora_rank: int | None = None          # rank of the query bottleneck (latent variants); 0: queries straight from x
    kv_lora_rank: int | None = None         # rank of the latent that k and v are made from, and that is cached for them
    qk_nope_head_dim: int | None = None     # width of a head's content part of q and k
    qk_rope_head_dim: int | None = None     # width of its rotary part, even; also the width of the one cached rotary key
    v_head_dim: int | None = None           # width of a head's value
    attention_bias: bool | None = None      # biases in attention (latent: on q_a_proj, kv_a_proj_with_mqa, o_proj only)
    rope_scaling: Literal['default', 'linear', 'dynamic', 'yarn'] | None = None     # how rotary frequencies are stretched
    rope_factor: float | None = None        # by how much, 1 (nothing) or more; needs rope_scaling
    rope_original_context: int | None = None    # context that dynamic and yarn stretch from; none: block_size
    rope_attention_factor: float | None = None  # yarn: amplitude of cos and sin; none: as the two mscales below say

    # Rotary positions, whatever the variant
    rope_theta: float = 10000.0             # base of the frequencies
    rope_beta_fast: float = 32.0            # yarn: pairs that turn more often than this in the original context stay
    rope_beta_slow: float = 1.0             # yarn: pairs that turn less often than this there are stretched in full
    rope_mscale: float = 1.0                # yarn: temperature multiplier on cos and sin (DeepSeek's mscale)
    rope_mscale_all_dim: float = 0.0        # yarn: temperature multiplier on whole scores; DeepSeek: as rope_mscale

    # Model
    n_layer: int = 6                        # blocks
    n_head: int = 8                         # query heads
    n_embd: int = 384                       # width
    block_size: int = 512                   # context in tokens
    vocab_size: int = 4096                  # tokens in the vocabulary; train.py: as many as bpe trains
    tie_embeddings: bool = True             # whether the head is the embedding
    norm_eps: float = 1e-6                  # epsilon of the norms; those of the latents keep 1e-6

    # Experts
    d_ff: int = 1536                        # hidden width of one expert
    n_expert: int = 8                       # experts in each layer
    top_k: int = 2                          # experts that each token chooses
    n_shared_expert: int = 0                # experts that every token visits besides
    n_dense_layer: int = 0                  # so many layers, the first ones, have one network instead of experts
    d_ff_dense: int = 0                     # its hidden width; 0: of all experts that a token visits together
    router: Literal['softmax', 'sigmoid'] = 'softmax'   # sigmoid: DeepSeek-V3's, balanced by a bias instead of a loss
    norm_topk_prob: bool = True             # whether the weights of the chosen experts are made to sum to 1
    routed_scaling_factor: float = 1.0      # multiplies the routed experts' sum; DeepSeek-V3: 2.5 at top-8
    n_expert_group: int = 1                 # groups that the experts are divided into, and
    top_k_group: int = 1                    # groups that a token may choose from

    def __post_init__(self):
        for knob in ('vocab_size', 'block_size', 'n_layer', 'd_ff', 'n_expert', 'n_expert_group', 'top_k_group'):
            require(getattr(self, knob) >= 1, f'{knob} must be at least 1, not {getattr(self, knob)}')
        for knob in ('n_shared_expert', 'n_dense_layer', 'd_ff_dense'):
            require(getattr(self, knob) >= 0, f'{knob} must be 0 (none) or more, not {getattr(self, knob)}')
        require(1 <= self.top_k <= self.n_expert, f'top_k ({self.top_k}) must be between 1 and n_expert ({self.n_expert})')
        require(self.router in ('softmax', 'sigmoid'), f'unknown router {self.router!r} (one of softmax, sigmoid)')
        size, rest = divmod(self.n_expert, self.n_expert_group)
        least = 2 if self.router == 'sigmoid' and self.n_expert_group > 1 else 1        # V3 judges a group by its best two
        require(rest == 0 and size >= least and self.top_k_group <= self.n_expert_group
                and self.top_k <= self.top_k_group * size,
                f'n_expert ({self.n_expert}) in n_expert_group ({self.n_expert_group}) equal groups, of which a '
                f'token may use top_k_group ({self.top_k_group}), must leave room for top_k ({self.top_k})')
        require(self.norm_eps >= 0, f'norm_eps must be 0 or more, not {self.norm_eps}')
        require(self.rope_theta > 1, f'rope_theta must be above 1, not {self.rope_theta}')
        require(0 < self.rope_beta_slow <= self.rope_beta_fast, f'rope_beta_slow ({self.rope_beta_slow}) must be above 0 '
                                                                f'and at most rope_beta_fast ({self.rope_beta_fast})')
        require(self.rope_original_context is None or self.rope_original_context >= 1,
                f'rope_original_context must be at least 1, not {self.rope_original_context}')
        lay_over_row(self)
        self.d_ff_dense = self.d_ff_dense or (self.top_k + self.n_shared_expert) * self.d_ff


class Block(nn.Module):
    def __init__(self, config, dense):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.n_embd, config.norm_eps), build_attention(config)
        if dense:
            self.mlp_norm, self.mlp = RMSNorm(config.n_embd, config.norm_eps), SwiGLU(config.n_embd, config.d_ff_dense)
        else:
            self.moe_norm, self.moe = RMSNorm(config.n_embd, config.norm_eps), MixtureOfExperts(config)
        self.dense = dense

    def forward(self, x, rope, cache=None):
        """x (B, T, C) -> the same, and the layer's moe.Routing, which a dense layer and decoding do without."""
        x = x + self.attn(self.attn_norm(x), rope, cache)
        if self.dense:
            return x + self.mlp(self.mlp_norm(x)), None
        y, routing = self.moe(self.moe_norm(x), with_balance=cache is None)
        return x + y, routing


class Output(NamedTuple):
    """What a forward with targets returns. nll, correct and load are sums over what was given, the routers' losses and
    entropy means; the losses are summed over layers, so that a router feels the same pressure in a model of any depth."""
    nll: torch.Tensor               # scalar, nats: cross-entropy summed over the targets
    correct: torch.Tensor           # scalar: how many targets had the largest logit
    balance_loss: torch.Tensor      # scalar: the number of layers with experts when even, see moe.Routing
    z_loss: torch.Tensor            # scalar
    load: torch.Tensor              # (layers with experts, E) choices
    entropy: torch.Tensor           # (layers with experts,) nats


class LanguageModel(nn.Module):
    def __init__(self, config, seed=0):
        """seed None: weights stay as torch made them, for those who fill them in (hf.py) or want none (device meta)."""
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, dense=i < config.n_dense_layer) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """Every parameter from its own generator, seeded with (seed, its name): what two variants share starts equal.

            norm gains                                       1
            biases                                           0
            o_proj, down_proj (they write to the residual)   0
            embedding, router, an untied head                N(0, 0.02)
            all other matrices                               N(0, 1 / fan_in)

        fan_in, because a fixed 0.02 suits GPT-2's width of 768 and starts a narrow model on a plateau, which each seed
        leaves at its own time (results/README.md, "Why the first answer was wrong"); zeros, so that a block is the identity
        at first; no zeros in the router, which would send all tokens to the same experts. Drawn on the CPU in float32,
        whatever the device.
        """
        for name, p in self.named_parameters():
            kind = name.split('.')[-2] if name.endswith(('.weight', '.bias')) else name.split('.')[-1]      # q_proj, ...
            if name.endswith('.bias') or kind.endswith(('o_proj', 'down_proj')):
                p.zero_()
            elif kind.endswith('norm'):
                p.fill_(1.0)
            elif kind.endswith('_proj') or kind in ('embed', 'router', 'lm_head', 'kv_a_proj_with_mqa'):
                std = 0.02 if kind in ('embed', 'router', 'lm_head') else p.size(-1) ** -0.5
                key = int.from_bytes(hashlib.sha256(f'{seed}:{name}'.encode()).digest()[:7], 'little')      # below 2^63
                empty = torch.empty(p.shape, dtype=torch.float32, device='cpu')
                p.copy_(empty.normal_(0.0, std, generator=torch.Generator().manual_seed(key)))
            else:
                raise ValueError(f'init_weights has no rule for {name}: name it like what it is, or add a rule')

    # ------------------------------------------------------------------------------------------------------------------
    # Forward

    def forward(self, tokens, targets=None):
        """tokens (B, T) int64, T <= block_size -> logits (B, T, V); with targets (B, T), -1 for none -> Output."""
        T = tokens.size(1)
        x, routing = self.trunk(self.embed(tokens), self.rope(torch.arange(T, device=tokens.device), T))
        if targets is None:
            return self.head(x)
        nll, correct = kernels.cross_entropy(x.flatten(0, 1), self.head_weight(), targets.flatten())
        if not routing:                                                 # dense layers alone
            none = x.new_zeros(0)
            return Output(nll, correct, none.sum(), none.sum(), none.view(0, self.config.n_expert), none)
        balance_loss, z_loss, load, entropy = (torch.stack(s) for s in zip(*routing))
        return Output(nll, correct, balance_loss.sum(), z_loss.sum(), load, entropy)

    def trunk(self, x, rope, cache=None):
        """The blocks and the last norm: x (B, T, C) -> (B, T, C), and moe.Routing of the layers that have one."""
        routing = []
        for i, layer in enumerate(self.layers):
            x, r = layer(x, rope, cache and cache.layers[i])
            routing.append(r)
        return self.norm(x), [r for r in routing if r is not None]

    def rope(self, positions, length):
        """The table of rotary angles, in float32 at least (attention.rope_tables)."""
        return rope_tables(self.config, positions, length, kernels.wide(self.embed.weight.dtype))

    def head_weight(self):
        return self.embed.weight if self.config.tie_embeddings else self.lm_head.weight

    def head(self, x):
        """x (..., C) -> logits (..., V), float32 at least."""
        logits = kernels.linear(x.reshape(-1, x.size(-1)), self.head_weight().to(x.dtype))
        return logits.view(*x.shape[:-1], -1).to(kernels.wide(x.dtype))

    # ------------------------------------------------------------------------------------------------------------------
    # Decoding

    def for_decoding(self, dtype):
        """Everything in `dtype` but gains and router, which are float32 in training too. Changes the model. -> self"""
        for name, module in self.named_modules():
            for p in module.parameters(recurse=False):
                p.data = p.data.to(torch.float32 if name.endswith(('norm', 'router')) else dtype)
        return self

    def new_cache(self, batch, capacity, starts=None, static=False):
        """An empty cache for `batch` sequences of up to `capacity` tokens, in the weights' dtype (decoding.Cache)."""
        weight = self.embed.weight
        layers = [layer.attn.new_cache(batch, capacity, dtype=weight.dtype, device=weight.device) for layer in self.layers]
        return Cache(layers, capacity, starts, static)

    @torch.no_grad()
    def decode(self, tokens, cache, trunk=None, last=True):
        """Append tokens (B, T) to what `cache` holds -> logits (B, V) of the last one, or (B, T, V) with last=False.

        The numbers of forward() over the whole sequence. Under dynamic scaling the angles are those of `capacity` tokens
        from the start: keys are cached turned, so frequencies must not change. `trunk` may be a compiled self.trunk.
        """
        positions = cache.advance(tokens.size(1))
        x, _ = (trunk or self.trunk)(self.embed(tokens), self.rope(positions, cache.capacity), cache)
        return self.head(x[:, -1] if last else x)

    # ------------------------------------------------------------------------------------------------------------------
    # What it costs

    def parameter_counts(self):
        """-> dict: params_total, params_active (without routed experts that a token does not visit), params_attention, ..."""
        # the first of these that is in a parameter's name says what it counts as; a dense layer's network as shared
        parts = {'embed.': 'embedding', 'lm_head.': 'embedding', '.attn.': 'attention', '.router.': 'router',
                 '.moe.shared.': 'shared', '.mlp.': 'shared', '.moe.': 'experts', 'norm.': 'norm'}
        config, groups = self.config, dict.fromkeys(parts.values(), 0)
        for name, p in self.named_parameters():
            groups[next(group for part, group in parts.items() if part in name)] += p.numel()
        total = sum(groups.values())
        idle = groups['experts'] // config.n_expert * (config.n_expert - config.top_k)
        return {'params_total': total, 'params_active': total - idle, **{f'params_{k}': v for k, v in groups.items()}}

    def flops_per_token(self):
        """Model FLOPs to train on one token at full context, by the convention of PaLM (arXiv 2204.02311, appendix B).

        6 for each active parameter: 2 forward (multiply, add), 4 backward; the head is the embedding as a product, looking
        a token up costs nothing. A query meets block_size keys in each layer, 6 per dim of score and of value; the half
        that causality spares is counted; softmax, norms and the optimizer are not.
        """
        dims = [layer.attn.head_dims() for layer in self.layers]
        pair = self.config.n_head * sum(d['qk_head_dim'] + d['v_head_dim'] for d in dims)
        looked_up = 0 if self.config.tie_embeddings else self.embed.weight.numel()
        return 6 * (self.parameter_counts()['params_active'] - looked_up) + 6 * self.config.block_size * pair

    def cache_bytes_per_token(self, dtype):
        """Bytes that decoding keeps for each token, all layers: the size of what new_cache() really allocates."""
        return sum(t.nbytes for layer in self.layers for t in layer.attn.new_cache(1, 1, dtype=dtype, device='meta'))
