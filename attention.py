"""Attention: rotary positions and their scalings, multi-head attention, DeepSeek's latent attention, the variants.

Read it with the papers beside you: RoPE (Su et al. 2021, arXiv 2104.09864), YaRN (Peng et al. 2023, arXiv 2309.00071),
grouped queries (Ainslie et al. 2023, arXiv 2305.13245), and multi-head latent attention, MLA (DeepSeek-V2, arXiv
2405.04434, section 2.1, eq. 9-19). Parameters carry DeepSeek's names, so that its published weights fit by name.

A new variant is a row in variants(), at the end, or a class and a row.

Shapes: B sequences, T new tokens, S tokens that can be attended (cached + new), C = n_embd, H = n_head,
dn = qk_nope_head_dim, dr = qk_rope_head_dim, dv = v_head_dim, r = kv_lora_rank, rq = q_lora_rank.

Both classes are called in the same way, attention(x, rope, cache=None) for x (B, T, C) -> (B, T, C):
    rope     rope_tables() at the positions of x's tokens
    cache    None in training: every token attends to itself and to those before it, nothing is kept. When decoding, the
             layer's own decoding.LayerCache: it takes what is kept of the new tokens and gives back that of all tokens.
python attention.py runs a worked example: the shapes, what is cached, and the two ways to use the cache.
"""
import math

import torch
import torch.nn as nn

import kernels


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dim (Zhang & Sennrich 2019, arXiv 1910.07467), computed in float32 at least."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions

def rope_frequencies(dim, theta=10000.0, scaling='default', factor=1.0, original=512, beta_fast=32.0, beta_slow=1.0,
                     length=0):
    """Radians per position of each of the dim/2 rotated pairs -> list of floats, fastest first.

    default   theta^(-2i/dim)                                                              (RoFormer, section 3.2.2)
    linear    the same divided by factor: position p turns as far as p/factor did          (Chen et al., arXiv 2306.15595)
    dynamic   a larger theta once `length` exceeds `original`; up to there exactly default (NTK-aware, YaRN section 3.3)
    yarn      pairs that turn more than beta_fast times within `original` tokens stay, those that turn less than
              beta_slow times are divided by factor, a ramp in between, linear in the pair's index as in YaRN's code and
              DeepSeek's (the paper's eq. 18 is linear in the number of turns)              (YaRN, section 3.2)
    """
    if scaling == 'dynamic' and length > original:
        theta = theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
    frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if scaling == 'linear':
        return [f / factor for f in frequencies]
    if scaling == 'yarn':
        # the (fractional) pair that turns n times within `original` tokens
        pair = lambda n: dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(theta))
        low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), dim - 1)
        high = high + 0.001 if low == high else high                    # a step, not a division by zero
        ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)]
        return [f * (1 - m) + f / factor * m for f, m in zip(frequencies, ramp)]
    return frequencies


def yarn_mscale(factor, mscale):
    """YaRN's attention temperature, a(x) = 0.1 x ln(factor) + 1, eq. 22 with DeepSeek's multiplier x = mscale."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_tables(config, positions, length=0, dtype=torch.float32):
    """[cos, sin] of every angle at `positions`, (T,) or (B, 1, T) integers -> (..., T, dr/2, 2).

    Never in a dtype below float32: bfloat16 cannot tell integers above 256 apart. Nothing is kept in a buffer, which
    model.to(bfloat16) would cast. `length` is the longest sequence these tables serve; only dynamic scaling looks at it.
    """
    frequencies = rope_frequencies(config.qk_rope_head_dim or config.head_dim, config.rope_theta, config.rope_scaling,
                                   config.rope_factor, config.rope_original_context or config.block_size,
                                   config.rope_beta_fast, config.rope_beta_slow, length)
    angles = positions.unsqueeze(-1) * torch.tensor(frequencies, dtype=dtype, device=positions.device)
    amplitude = 1.0
    if config.rope_scaling == 'yarn':
        # q and k both have this amplitude, and attention_scale multiplies every score by a(all_dim)^2: that makes
        # amplitude^2 a(all_dim)^2 = a(mscale)^2 for rotary scores, and a(all_dim)^2 for content scores
        amplitude = config.rope_attention_factor or (yarn_mscale(config.rope_factor, config.rope_mscale)
                                                     / yarn_mscale(config.rope_factor, config.rope_mscale_all_dim))
    return torch.stack((angles.cos(), angles.sin()), dim=-1) * amplitude


def attention_scale(config, width):
    """What scores are multiplied by: 1/sqrt(width of a query), under YaRN times a(mscale_all_dim)^2, its temperature."""
    temperature = yarn_mscale(config.rope_factor, config.rope_mscale_all_dim) if config.rope_scaling == 'yarn' else 1.0
    return width ** -0.5 * temperature ** 2


# ---------------------------------------------------------------------------------------------------------------------
# Multi-head attention, and with fewer key/value heads grouped-query and multi-query attention

class MultiHeadAttention(nn.Module):
    """q, k, v of d dims a head, rotary positions on all of them. Query head h reads key head h // (H / n_kv_head).

    With qk_norm each query and key head is normed before it is turned (as in Qwen3 and Gemma 3): latent attention has
    norms on its latents, and a fair baseline may have its own.
    Cached per token: k and v of the n_kv_head heads, 2 n_kv_head d numbers.
    """

    def __init__(self, config):
        super().__init__()
        C, bias = config.n_embd, config.attention_bias
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = nn.Linear(C, self.n_head * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(C, self.n_kv_head * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(C, self.n_kv_head * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, C, bias=bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, config.norm_eps), RMSNorm(self.head_dim, config.norm_eps)
        self.scale = attention_scale(config, self.head_dim)

    def head_dims(self):
        """Sizes for the result file, read off the live layer."""
        return {'n_kv_head': self.n_kv_head, 'qk_head_dim': self.head_dim, 'v_head_dim': self.head_dim,
                'qk_rope_head_dim': self.head_dim}                      # all of a head is turned

    def new_cache(self, batch, capacity, dtype=None, device=None):
        """Room for the keys and the values of `capacity` tokens: two tensors (B, n_kv_head, capacity, d)."""
        shape = batch, self.n_kv_head, capacity, self.head_dim
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)               # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)            # (B, n_kv_head, T, d)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)            # (B, n_kv_head, T, d)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kernels.rotate(q, rope), kernels.rotate(k, rope)
        mask = 'causal'
        if cache is not None:
            (k, v), mask = cache.append(k, v), cache.mask                                       # (B, n_kv_head, S, d)
        o = kernels.attention(q, k, v, self.scale, mask)                                        # (B, H, T, d)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))                     # heads side by side again


# ---------------------------------------------------------------------------------------------------------------------
# Multi-head latent attention

class LatentAttention(nn.Module):
    r"""DeepSeek's multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 9-19), decoupled RoPE included.

                    x (C)
           +----------+--------------------+
        q_a_proj              kv_a_proj_with_mqa            the two ways down
           |                   |           |
       c_q (rq)            c_kv (r)     k_pe (dr)           c = norm(c_kv), k_pe is turned by its position:
         norm                norm         rope              THESE TWO, r + dr numbers, are the cache
        q_b_proj           kv_b_proj       |                the ways up, H heads
       /        \           /     \        |
    q_nope     q_pe     k_nope     v       |                (dn)  (dr)  (dn)  (dv) a head
       |       rope        |       |       |
       +---------|---------+       |       |
     score = ( q_nope . k_nope  +  q_pe . k_pe ) scale      one k_pe serves all heads
    out = o_proj( concat over heads of softmax(score) v )

    The paper's matrices, as (out, in) like nn.Linear's:
        W_DQ           = q_a_proj             (rq, C)           W_DKV and W_KR = kv_a_proj_with_mqa   (r + dr, C)
        W_UQ and W_QR  = q_b_proj             (H (dn + dr), rq) W_UK and W_UV  = kv_b_proj            (H (dn + dv), r)
        W_O            = o_proj               (C, H dv)         without a query rank q_proj replaces q_a and q_b
    The two norms stand in the paper's text (section 3.1.2), not in its equations; _with_mqa: the last dr rows make the one
    rotary key of all heads. With biases, DeepSeek has them on q_a_proj, kv_a_proj_with_mqa and o_proj, nowhere else.

    The trick of decoding: k_nope = W_UK c and v = W_UV c are linear in the cached latent c. One way to use the cache,
    `expand`, makes both for all S cached tokens and attends as usual. The other, `absorb`, moves the matrices to the other
    side of the products,
        q_nope . (W_UK c) = (W_UK^T q_nope) . c         and         sum_s p_s (W_UV c_s) = W_UV (sum_s p_s c_s),
    and attends over the cached latents themselves: multi-query attention, H query heads over one key head [c | k_pe] of
    width r + dr, whose first r numbers are its value too (V2, section 2.1.2). The numbers are the same, the costs are not
    (see absorbs). This is also why position has a part of its own: a rotation between q and W_UK would differ from token
    to token, and W_UK could not change sides (V2, section 2.1.3).
    """

    def __init__(self, config):
        super().__init__()
        C, H, r, bias = config.n_embd, config.n_head, config.kv_lora_rank, config.attention_bias
        dn, dr, dv = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.n_head, self.q_lora_rank, self.kv_lora_rank = H, config.q_lora_rank, r
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = dn, dr, dv
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(C, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * (dn + dr), bias=False)
        else:
            self.q_proj = nn.Linear(C, H * (dn + dr), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(C, r + dr, bias=bias)
        self.kv_a_layernorm = RMSNorm(r)        # the latents' norms keep an epsilon of 1e-6 whatever norm_eps is (DeepSeek)
        self.kv_b_proj = nn.Linear(r, H * (dn + dv), bias=False)
        self.o_proj = nn.Linear(H * dv, C, bias=bias)
        self.scale = attention_scale(config, dn + dr)                   # also when absorbed queries are r + dr wide
        self.decode_mode = 'auto'                                       # auto | expand | absorb, for tests and bench.py

    def head_dims(self):
        return {'q_lora_rank': self.q_lora_rank, 'kv_lora_rank': self.kv_lora_rank,
                'qk_nope_head_dim': self.qk_nope_head_dim, 'qk_rope_head_dim': self.qk_rope_head_dim,
                'qk_head_dim': self.qk_nope_head_dim + self.qk_rope_head_dim, 'v_head_dim': self.v_head_dim}

    def new_cache(self, batch, capacity, dtype=None, device=None):
        """Room for [latent | rotary key] of `capacity` tokens: one tensor (B, 1, capacity, r + dr), one for all heads."""
        return [torch.zeros(batch, 1, capacity, self.kv_lora_rank + self.qk_rope_head_dim, dtype=dtype, device=device)]

    def absorbs(self, T, S):
        """Whether T new tokens should attend to S cached ones in the latent space: compares the multiply-adds a head needs.

        If 2r <= dn + dv, absorbing never costs more. Else it pays for few new tokens: where S is much larger than T, for
        T below r (dn + dv) / (2r - dn - dv): 64 for `lora` and 96 for `mla` at C = 384, 170.7 at DeepSeek-V3's sizes.
        """
        if self.decode_mode != 'auto':
            return self.decode_mode == 'absorb'
        r, dn, dr, dv = self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        expand = S * r * (dn + dv) + T * S * (dn + dr + dv)             # makes S keys and values; then each pair's cost
        absorb = T * r * (dn + dv) + T * S * (2 * r + dr)               # turns T queries and results
        return absorb < expand

    def forward(self, x, rope, cache=None):
        B, T, _ = x.shape
        H, r, dn, dr = self.n_head, self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_lora_rank else self.q_proj(x)     # eq. 12-14
        q_nope, q_pe = q.view(B, T, H, dn + dr).transpose(1, 2).split([dn, dr], dim=-1)     # (B, H, T, dn), (B, H, T, dr)
        c, k_pe = self.kv_a_proj_with_mqa(x).unsqueeze(1).split([r, dr], dim=-1)    # (B, 1, T, r), (B, 1, T, dr): eq. 9
        c = self.kv_a_layernorm(c)
        q_pe, k_pe = kernels.rotate(q_pe, rope), kernels.rotate(k_pe, rope)                 # eq. 14, 15
        if cache is None:
            o = self.expanded(q_nope, q_pe, c, k_pe, 'causal')
        else:
            [kept] = cache.append(torch.cat((c, k_pe), dim=-1))                             # (B, 1, S, r + dr)
            if self.absorbs(T, kept.size(2)):
                o = self.absorbed(q_nope, q_pe, kept, cache.mask)
            else:
                o = self.expanded(q_nope, q_pe, *kept.split([r, dr], dim=-1), cache.mask)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))                             # eq. 19

    def expanded(self, q_nope, q_pe, c, k_pe, mask):
        """As it is trained: keys and values of every head, made from c (B, 1, S, r) and k_pe (B, 1, S, dr) -> (B, H, T, dv)"""
        B, _, S, _ = c.shape
        H, dn, dv = self.n_head, self.qk_nope_head_dim, self.v_head_dim
        k_nope, v = self.kv_b_proj(c).view(B, S, H, dn + dv).transpose(1, 2).split([dn, dv], dim=-1)        # eq. 10-11
        q = torch.cat((q_nope, q_pe), dim=-1)                                               # (B, H, T, dn + dr): eq. 16
        k = torch.cat((k_nope, k_pe.expand(-1, H, -1, -1)), dim=-1)                         # (B, H, S, dn + dr): eq. 17
        return kernels.attention(q, k, v, self.scale, mask)                                 # eq. 18

    def absorbed(self, q_nope, q_pe, kept, mask):
        """The same as multi-query attention over the cache, kept (B, 1, S, r + dr) = [c | k_pe]: key and, up to r, value."""
        r, dn, dv = self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        W_uk, W_uv = self.kv_b_proj.weight.to(q_nope.dtype).view(-1, dn + dv, r).split([dn, dv], dim=1)     # (H, dn|dv, r)
        q_c = torch.einsum('bhtn,hnr->bhtr', q_nope, W_uk)                                  # W_UK^T q, head by head
        # all of `kept` as values too: torch's fused kernels want them as wide as keys; the sums over k_pe are cut off
        o = kernels.attention(torch.cat((q_c, q_pe), dim=-1), kept, kept, self.scale, mask)[..., :r]        # (B, H, T, r)
        return torch.einsum('bhtr,hvr->bhtv', o, W_uv)                                      # (B, H, T, dv)


# ---------------------------------------------------------------------------------------------------------------------
# The variants

def variants(n_embd, n_head):
    """The rows behind --attn: name -> {'class': ..., knob: value}, as proportions of the width, so that they hold at any.

    At C = 384 and 8 heads the lora row has the numbers of the report that this project repeats: ranks 32 and 64, nope 16 +
    rope 32, v 48. A knob that a row does not name means nothing to its class.
    """
    C, d = n_embd, n_embd // n_head
    two_thirds = 2 * round(d / 3)                                       # 2d/3, rounded to an even number of dims
    common = {'rope_scaling': 'default', 'rope_factor': 1.0, 'attention_bias': False}
    heads = {**common, 'class': MultiHeadAttention, 'n_kv_head': n_head, 'head_dim': d, 'qk_norm': False}
    lora = {**common, 'class': LatentAttention, 'q_lora_rank': C // 12, 'kv_lora_rank': C // 6,
            'qk_nope_head_dim': d - two_thirds, 'qk_rope_head_dim': two_thirds, 'v_head_dim': d}
    return {
        'baseline': heads,
        'gqa': {**heads, 'n_kv_head': max(1, n_head // 4)},
        'mqa': {**heads, 'n_kv_head': 1},
        # DeepSeek's attention inside the baseline's head sizes: nope + rope = v = d
        'lora': lora,
        # ... and what the report added: content as wide as the baseline's head beside the rotary part, RoPE scaling, bias
        'enhanced': {**lora, 'qk_nope_head_dim': d, 'rope_scaling': 'linear', 'rope_factor': 2.0, 'attention_bias': True},
        # DeepSeek-V2-Lite's recipe, the published model whose heads are C / H wide as here (2048 wide, 16 heads of 128):
        # no query bottleneck, r = C / 4, nope = v = d, rope = d / 2
        'mla': {**lora, 'q_lora_rank': 0, 'kv_lora_rank': C // 4, 'qk_nope_head_dim': d,
                'qk_rope_head_dim': 2 * round(d / 4)}}


def lay_over_row(config):
    """Fill in the knobs of `config` that are None from the row of its variant, and check them. Changes config.

    Raises ValueError for an unknown variant, a knob that its class does not have, and sizes that make no attention.
    """
    C, H = config.n_embd, config.n_head
    require(H >= 1 and C >= 1 and C % H == 0,
            f'n_embd ({C}) must be a multiple of n_head ({H}): a head gets n_embd / n_head dims')
    rows = variants(C, H)
    require(config.attn in rows, f'unknown attention variant {config.attn!r} (one of {", ".join(rows)})')
    row = rows[config.attn]
    for knob in sorted({knob for r in rows.values() for knob in r} - {'class'}):
        if getattr(config, knob) is None:
            setattr(config, knob, row.get(knob))
        require(knob in row or getattr(config, knob) is None,
                f'--{knob} means nothing to --attn={config.attn}, which is {row["class"].__name__}')

    for knob in ('q_lora_rank', 'n_kv_head', 'head_dim', 'kv_lora_rank', 'v_head_dim', 'qk_nope_head_dim'):
        least = 0 if knob == 'q_lora_rank' else 1                       # 0: no bottleneck for the queries
        require(knob not in row or getattr(config, knob) >= least,
                f'{knob} is {getattr(config, knob)} with n_embd={C}, n_head={H}; it must be at least {least}')
    require(H % (config.n_kv_head or H) == 0, f'n_kv_head ({config.n_kv_head}) must divide n_head ({H})')
    knob = 'head_dim' if config.qk_rope_head_dim is None else 'qk_rope_head_dim'
    rotary = getattr(config, knob)
    require(rotary >= 2 and rotary % 2 == 0, f'{knob} is {rotary} with n_embd={C}, n_head={H}; it must be even, 2 or '
                                             f'more: rotary positions turn pairs of dims')
    require(config.rope_scaling in ('default', 'linear', 'dynamic', 'yarn'),
            f'unknown rope_scaling {config.rope_scaling!r} (one of default, linear, dynamic, yarn)')
    require(config.rope_scaling != 'dynamic' or rotary > 2,
            'rope_scaling=dynamic needs a rotary width above 2: its exponent is width / (width - 2)')
    require(1 <= config.rope_factor < math.inf,
            f'rope_factor ({config.rope_factor}) must be at least 1: positions are divided by it')
    require(config.rope_scaling != 'default' or config.rope_factor in (1.0, row['rope_factor']),     # enhanced's 2 is left be
            f'rope_factor ({config.rope_factor}) means nothing to rope_scaling=default: linear, dynamic and yarn have one')
    if (amplitude := config.rope_attention_factor) is not None:
        require(config.rope_scaling == 'yarn',
                f'rope_attention_factor means nothing to rope_scaling={config.rope_scaling}: only yarn has one')
        require(0 < amplitude < math.inf, f'rope_attention_factor must be above 0, not {amplitude}')
    require(config.rope_scaling not in ('linear', 'yarn') or config.rope_factor > 1 or amplitude,
            f'rope_scaling={config.rope_scaling} changes nothing at rope_factor=1: give --rope_factor=2, say')


def require(holds, otherwise):
    if not holds:
        raise ValueError(otherwise)


def build_attention(config):
    """A new layer of the class that the variant's row names, for a model.ModelConfig."""
    return variants(config.n_embd, config.n_head)[config.attn]['class'](config)


# ---------------------------------------------------------------------------------------------------------------------
# A worked example

if __name__ == '__main__':
    from decoding import Cache
    from model import LanguageModel, ModelConfig
    for attn, modes in ('baseline', ['']), ('mla', ['expand', 'absorb']):
        config = ModelConfig(attn=attn, n_embd=384, n_head=8, n_layer=1, d_ff=64, block_size=16)
        attention = LanguageModel(config, seed=0).layers[0].attn.double()
        nn.init.normal_(attention.o_proj.weight, std=0.05)              # zeros at first: nothing would be seen
        print(f'\n{attn}: {type(attention).__name__}, {dict(attention.head_dims())}')
        for name, p in attention.named_parameters():
            print(f'    {name:26} {tuple(p.shape)}')
        x = torch.randn(1, 6, 384, dtype=torch.float64)
        whole = attention(x, rope_tables(config, torch.arange(6), dtype=x.dtype))
        print(f'  six tokens {tuple(x.shape)} -> {tuple(whole.shape)}, all at once')
        for attention.decode_mode in modes:
            cache, steps = Cache([attention.new_cache(1, 16, dtype=x.dtype)], capacity=16), []
            for t in range(6):
                rope = rope_tables(config, cache.advance(1), dtype=x.dtype)
                steps.append(attention(x[:, t:t + 1], rope, cache.layers[0]))
            kept = sum(t.size(1) * t.size(3) for t in cache.layers[0].tensors)
            print(f'  one by one from the cache, {kept} numbers a token{", " * bool(attention.decode_mode)}'
                  f'{attention.decode_mode}: differs by {(torch.cat(steps, 1) - whole).abs().max():.1e}')
