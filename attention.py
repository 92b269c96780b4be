"""Attention: rotary positions and their scalings, multi-head attention, DeepSeek's latent attention, and their caches.

Read it with the papers beside you: RoPE (Su et al. 2021, arXiv 2104.09864), YaRN (Peng et al. 2023, arXiv 2309.00071),
grouped queries (Ainslie et al. 2023, arXiv 2305.13245), and multi-head latent attention, MLA (DeepSeek-V2, arXiv
2405.04434, section 2.1, eq. 9-19). Parameters carry DeepSeek's names, so that its published weights fit by name.

What is in here, in reading order:
    rope_...()             frequencies (default, linear, dynamic NTK, YaRN) and the rotation
    attend(), RMSNorm      the softmax over keys, handed to torch's fused kernels; the norm of blocks and latents
    MultiHeadAttention     q, k, v per head; fewer key/value heads make it grouped-query (gqa) or multi-query (mqa)
    LatentAttention        k and v of all heads through one small latent, which is all that decoding has to keep
    variants()             the named rows of knobs behind --attn: a new variant is one row, or one class and one row
    attention_settings()   a row, with the knobs that were given by hand laid over it, checked

Shapes: B sequences, T new tokens, S tokens that can be attended (cached + new), C = n_embd, H = n_head,
dn = qk_nope_head_dim, dr = qk_rope_head_dim, dv = v_head_dim, r = kv_lora_rank, rq = q_lora_rank.

Both classes are called in the same way, attention(x, rope, mask, cache, slots, span); rope is what rope_tables() made
for the positions of x (B, T, C). They serve two situations:
    training   x and rope alone: causal over itself, nothing is kept.
    decoding   cache is what new_cache() allocated, for `capacity` slots. `slots` (T,) says into which of them the T new
               tokens go, `span` how many slots from the first are attended, `mask` (1 or B, 1, T, span) which of those
               each token may see (None: all of them). `slots` None: the T tokens are a prompt that fills the empty cache
               from slot 0 and attends to itself alone, causally. (Prompts of several lengths come with slots and mask.)
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions

def rope_dim(config):
    """How many dims of each query and key head are rotated: all of them in multi-head, dr in latent attention."""
    return config.qk_rope_head_dim or config.n_embd // config.n_head


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
    """[cos, sin] of every angle at `positions`, (T,) or (B, T) integers -> (..., T, 1, dr/2, 2), 1 for the heads.

    Never in a dtype below float32: bfloat16 cannot tell integers above 256 apart. Nothing is kept in a buffer, which
    model.to(bfloat16) would cast. `length` is the longest sequence these tables serve; only dynamic scaling looks at it.
    """
    frequencies = rope_frequencies(rope_dim(config), config.rope_theta, config.rope_scaling, config.rope_factor,
                                   config.rope_original_context or config.block_size, config.rope_beta_fast,
                                   config.rope_beta_slow, length)
    frequencies = torch.tensor(frequencies, dtype=dtype, device=positions.device)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(-2)      # (..., T, 1, dr/2)
    amplitude = 1.0
    if config.rope_scaling == 'yarn':
        # q and k are both turned, and attention_scale multiplies by a(all_dim)^2: rotary scores get a(mscale)^2 in all,
        # content scores a(all_dim)^2
        amplitude = (yarn_mscale(config.rope_factor, config.rope_mscale)
                     / yarn_mscale(config.rope_factor, config.rope_mscale_all_dim))
    return torch.stack((angles.cos(), angles.sin()), dim=-1) * amplitude


def apply_rope(x, rope):
    """Turn the pairs of dims (2i, 2i+1) of x (..., T, heads, dr) by their angles: DeepSeek's interleaved layout.

    A pair is a complex number, turning it by an angle a multiplies it by e^(ia) = cos a + i sin a (RoFormer, eq. 12-13).
    Written in complex numbers that is one pass over memory instead of eight, and a fifth of the time on a CPU
    (results/notes.md); torch.compile does not know complex numbers, and fuses the real ones into one pass itself.
    """
    pairs = x.unflatten(-1, (-1, 2))                                    # (..., T, heads, dr/2, 2)
    if (not torch.compiler.is_compiling() and x.is_cpu and x.dtype == rope.dtype
            and all(n % 2 == 0 for n in (x.storage_offset(), *x.stride()[:-1]))):       # what view_as_complex asks for
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def attention_scale(config, width):
    """What scores are multiplied by: 1/sqrt(width of a query), under YaRN times a(mscale_all_dim)^2, its temperature."""
    temperature = yarn_mscale(config.rope_factor, config.rope_mscale_all_dim) if config.rope_scaling == 'yarn' else 1.0
    return width ** -0.5 * temperature ** 2


def attend(q, k, v, scale, mask=None, causal=False):
    """softmax(scale q k^T) v over (B, heads, T or S, width) tensors; heads of k and v may be a divisor of q's.

    Flash kernels want values as wide as keys. Whichever is narrower is padded with zeros: in values they stay zeros in
    the output and are cut off, in q and k they add nothing to a score. On a CPU that is 1.5x faster, forward and
    backward, than torch's fallback, which would build the T x T matrix. A single query's heads that share a key become
    rows of one matrix, so that each key is read once and not H / G times (both: results/notes.md).
    """
    B, H, T, _ = q.shape
    dv, dk, G = v.size(-1), k.size(-1), k.size(1)
    if dv < dk:
        v = F.pad(v, (0, dk - dv))
    elif dv > dk:
        q, k = F.pad(q, (0, dv - dk)), F.pad(k, (0, dv - dk))
    if T == 1 and G != H:
        q = q.reshape(B, G, H // G, -1)                                 # heads as rows
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and T > 1, scale=scale,
                                       enable_gqa=q.size(1) != G)
    return o.reshape(B, H, T, -1)[..., :dv]


class NormAndGain(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps): RMSNorm that keeps x and one r per token for the backward.

    F.rms_norm keeps x r as well, 40 MB at Experiment 1's size, and takes twice the time on a CPU (results/notes.md).
    out= writes into a temporary that is no longer needed: fresh memory often leaves a hole of its size in a CPU's heap.
    With n = x r and g = dL/dy: dL/dw = sum over tokens of g n, and dL/dx = r (g w - n mean(g w n)).
    """

    @staticmethod
    def forward(ctx, x, w, eps):
        y = x.square()
        r = y.mean(-1, keepdim=True).add_(eps).rsqrt_()                             # (..., 1)
        ctx.save_for_backward(x, w, r)
        return torch.mul(x, r, out=y).mul_(w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        n = x * r
        gn = g * n
        dw, mean = gn.flatten(0, -2).sum(0), (gn @ w).div_(len(w)).unsqueeze(-1)    # (C,), (..., 1)
        return torch.mul(g, w, out=gn).addcmul_(n, mean, value=-1).mul_(r), dw, None


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dim (arXiv 1910.07467), in the gain's dtype: float32 also where x is bfloat16."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.to(self.weight.dtype)
        if x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return NormAndGain.apply(wide, self.weight, self.eps).to(x.dtype)
        # the same numbers. GPUs have one kernel for it; and torch.compile of 2.11 loses the gradient, without a word, of a
        # function written by hand that returns what it changed in place
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Multi-head attention, and with fewer key/value heads grouped-query and multi-query attention

class MultiHeadAttention(nn.Module):
    """q, k, v of d = C/H dims a head, rotary positions on all of them. Query head h reads key head h // (H / n_kv_head).

    With qk_norm each query and key head is normed before it is turned (as in Qwen3 and Gemma 3): latent attention has
    norms on its latents, and a fair baseline may have its own.
    Cached per token: k and v of the n_kv_head heads, 2 n_kv_head d numbers.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        C, bias = config.n_embd, config.attention_bias
        self.q_proj = nn.Linear(C, self.n_head * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(C, self.n_kv_head * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(C, self.n_kv_head * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, C, bias=bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.scale = attention_scale(config, self.head_dim)

    def head_dims(self):
        """Sizes for the result file, read off the live layer."""
        return {'n_kv_head': self.n_kv_head, 'qk_head_dim': self.head_dim, 'v_head_dim': self.head_dim,
                'qk_rope_head_dim': self.head_dim}

    def score_and_value_width(self):
        """Multiply-adds for one query-key pair, over all heads: those of the score, those of the value."""
        return self.n_head * self.head_dim, self.n_head * self.head_dim

    def new_cache(self, batch, capacity, dtype=None, device=None):
        """Room for the keys and values of `capacity` tokens: (2, B, n_kv_head, capacity, d)."""
        return torch.zeros(2, batch, self.n_kv_head, capacity, self.head_dim, dtype=dtype, device=device)

    def forward(self, x, rope, mask=None, cache=None, slots=None, span=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        if hasattr(self, 'q_norm'):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # (B, heads, T, d)
        if cache is not None:
            write(cache[0], 2, slots, k)
            write(cache[1], 2, slots, v)
            if slots is not None:                                                   # (B, n_kv_head, span, d)
                k, v = cache[0, :, :, :span].to(q.dtype), cache[1, :, :, :span].to(q.dtype)
        o = attend(q, k, v, self.scale, mask, causal=slots is None and mask is None)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))                     # heads side by side again


def write(cache, dim, slots, new):
    """Put `new` into the slots (along `dim`) of a preallocated cache, in place; slots None: the first ones."""
    if slots is None:
        cache.narrow(dim, 0, new.size(dim)).copy_(new)
    else:
        cache.index_copy_(dim, slots, new.to(cache.dtype))


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
    The two norms stand in the paper's text (section 3.1.2), not in its equations. With biases, DeepSeek has them on
    q_a_proj, kv_a_proj_with_mqa and o_proj, nowhere else.

    The trick of decoding: k_nope = W_UK c and v = W_UV c are linear in the cached latent c. One way to use the cache,
    `expand`, makes both for all S cached tokens and attends as usual. The other, `absorb`, moves the matrices to the other
    side of the products,
        q_nope . (W_UK c) = (W_UK^T q_nope) . c         and         sum_s p_s (W_UV c_s) = W_UV (sum_s p_s c_s),
    and attends over the cached latents themselves: multi-query attention, H query heads over one key head [c | k_pe] of
    width r + dr, whose first r numbers are its value too (V2, section 2.1.2). The numbers are the same; which way is
    cheaper depends on how many new tokens share the expansion (self.absorbs).
    This is also why position has a part of its own: a rotation between q and W_UK would differ from token to token, and
    W_UK could not change sides (V2, section 2.1.3).
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
        self.kv_a_layernorm = RMSNorm(r)
        self.kv_b_proj = nn.Linear(r, H * (dn + dv), bias=False)
        self.o_proj = nn.Linear(H * dv, C, bias=bias)
        # of the width that the scores are made of, nope + rope: also when absorbed queries are r + dr wide
        self.scale = attention_scale(config, dn + dr)
        self.decode_mode = 'auto'                                       # auto | expand | absorb, for tests and bench.py

    def head_dims(self):
        return {'q_lora_rank': self.q_lora_rank, 'kv_lora_rank': self.kv_lora_rank,
                'qk_nope_head_dim': self.qk_nope_head_dim, 'qk_rope_head_dim': self.qk_rope_head_dim,
                'qk_head_dim': self.qk_nope_head_dim + self.qk_rope_head_dim, 'v_head_dim': self.v_head_dim}

    def score_and_value_width(self):
        return self.n_head * (self.qk_nope_head_dim + self.qk_rope_head_dim), self.n_head * self.v_head_dim

    def new_cache(self, batch, capacity, dtype=None, device=None):
        """Room for [latent | rotary key] of `capacity` tokens: (B, capacity, r + dr). There is no head axis."""
        return torch.zeros(batch, capacity, self.kv_lora_rank + self.qk_rope_head_dim, dtype=dtype, device=device)

    def absorbs(self, T, S):
        """Whether T new tokens should attend to S cached ones in the latent space: compares the multiply-adds a head needs.

        Expanding makes S keys and values, S r (dn + dv), absorbing turns T queries and results, T r (dn + dv); then a
        pair of tokens costs dn + dr + dv expanded, 2r + dr absorbed. If 2r > dn + dv, absorbing pays for few new tokens:
        for S >> T, fewer than r (dn + dv) / (2r - dn - dv), which is 64 for `lora`, 192 for `enhanced` at C = 384, 170.7
        at DeepSeek-V3's sizes. If not, as in `mla` here with its small rank, it always does.
        """
        if self.decode_mode != 'auto':
            return self.decode_mode == 'absorb'
        r, dn, dr, dv = self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        expand = S * r * (dn + dv) + T * S * (dn + dr + dv)
        absorb = T * r * (dn + dv) + T * S * (2 * r + dr)
        return absorb < expand

    def forward(self, x, rope, mask=None, cache=None, slots=None, span=None):
        B, T, _ = x.shape
        H, r, dn, dr = self.n_head, self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_lora_rank else self.q_proj(x)     # eq. 12-14
        q_nope, q_pe = q.view(B, T, H, dn + dr).split([dn, dr], dim=-1)             # (B, T, H, dn), (B, T, H, dr)
        c, k_pe = self.kv_a_proj_with_mqa(x).split([r, dr], dim=-1)                 # (B, T, r), (B, T, dr): eq. 9, 15
        c = self.kv_a_layernorm(c)
        q_pe, k_pe = apply_rope(q_pe, rope), apply_rope(k_pe.unsqueeze(2), rope).squeeze(2)     # k_pe: one head for all
        if cache is not None:
            new = torch.cat((c, k_pe), dim=-1)                                      # (B, T, r + dr)
            write(cache, 1, slots, new)
            kept = new if slots is None else cache[:, :span].to(q.dtype)            # (B, S, r + dr)
            c, k_pe = kept.split([r, dr], dim=-1)
        causal = slots is None and mask is None
        if cache is not None and self.absorbs(T, c.size(1)):
            o = self.absorbed(q_nope, q_pe, kept, mask, causal)
        else:
            o = self.expanded(q_nope, q_pe, c, k_pe, mask, causal)
        return self.o_proj(o.reshape(B, T, -1))                                     # eq. 19

    def expanded(self, q_nope, q_pe, c, k_pe, mask, causal):
        """Attention as it is trained: keys and values of every head from c (B, S, r), k_pe (B, S, dr) -> (B, T, H, dv)"""
        B, S, H, dn, dv = *c.shape[:2], self.n_head, self.qk_nope_head_dim, self.v_head_dim
        k_nope, v = self.kv_b_proj(c).view(B, S, H, dn + dv).split([dn, dv], dim=-1)            # eq. 10-11
        k_pe = k_pe.unsqueeze(2).expand(-1, -1, H, -1)                              # (B, S, H, dr)
        q, k = torch.cat((q_nope, q_pe), dim=-1), torch.cat((k_nope, k_pe), dim=-1)             # eq. 16-17
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale, mask, causal).transpose(1, 2)

    def absorbed(self, q_nope, q_pe, kept, mask, causal):
        """The same as multi-query attention over the cache, kept (B, S, r + dr) = [c | k_pe]: key and, up to r, value."""
        B, T, H, dn = q_nope.shape
        r, dv = self.kv_lora_rank, self.v_head_dim
        W_uk, W_uv = self.kv_b_proj.weight.to(q_nope.dtype).view(H, dn + dv, r).split([dn, dv], dim=1)      # (H, dn|dv, r)
        q_c = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), W_uk)                 # (H, B T, r): W_uk^T q, head by head
        q = torch.cat((q_c.transpose(0, 1).view(B, T, H, r), q_pe), dim=-1)         # (B, T, H, r + dr)
        kept = kept.unsqueeze(1)                                                    # (B, 1, S, r + dr)
        # the whole of kept as values too, because kernels want them as wide as keys; the sums over k_pe are cut off below
        o = attend(q.transpose(1, 2), kept, kept, self.scale, mask, causal).transpose(1, 2)     # (B, T, H, r + dr)
        o = torch.bmm(o[..., :r].flatten(0, 1).transpose(0, 1), W_uv.mT)            # (H, B T, dv)
        return o.transpose(0, 1).view(B, T, H, dv)


# ---------------------------------------------------------------------------------------------------------------------
# The variants

def variants(n_embd, n_head):
    """The rows behind --attn: name -> {'class': ..., knob: value}, as proportions of the width, so that they hold at any.

    With C = n_embd and d = C / n_head. At Experiment 1's C = 384 and 8 heads (d = 48) the lora row reads: ranks 32 and
    64, nope 16 + rope 32, v 48, which are the numbers of the report that this project repeats.
    """
    C, d = n_embd, n_embd // n_head
    two_thirds = 2 * round(d / 3)                                       # 2d/3, rounded to an even number of dims
    lora = {'class': LatentAttention, 'q_lora_rank': C // 12, 'kv_lora_rank': C // 6,
            'qk_nope_head_dim': d - two_thirds, 'qk_rope_head_dim': two_thirds, 'v_head_dim': d}
    return {
        'baseline': {'class': MultiHeadAttention, 'n_kv_head': n_head, 'qk_norm': False},
        'gqa': {'class': MultiHeadAttention, 'n_kv_head': max(1, n_head // 4), 'qk_norm': False},
        'mqa': {'class': MultiHeadAttention, 'n_kv_head': 1, 'qk_norm': False},
        # DeepSeek's attention inside the baseline's head sizes: nope + rope = v = d
        'lora': lora,
        # ... and what the report added: content width that does not pay for the rotary part, RoPE scaling, bias
        'enhanced': {**lora, 'qk_nope_head_dim': d, 'rope_scaling': 'linear', 'rope_factor': 2.0,
                     'attention_bias': True},
        # DeepSeek-V2-Lite's recipe, the published model whose heads are C / H wide as here (2048 wide, 16 heads of 128):
        # no query bottleneck, r = C / 4, rope half of nope = v = d
        'mla': {'class': LatentAttention, 'q_lora_rank': 0, 'kv_lora_rank': C // 4,
                'qk_nope_head_dim': d, 'qk_rope_head_dim': 2 * round(d / 4), 'v_head_dim': d},
    }


# What a row leaves open. None: the knob means nothing to that row's class (giving it by hand is an error).
DEFAULTS = {'n_kv_head': None, 'q_lora_rank': None, 'kv_lora_rank': None, 'qk_nope_head_dim': None,
            'qk_rope_head_dim': None, 'v_head_dim': None, 'qk_norm': None, 'rope_scaling': 'default',
            'rope_factor': 1.0, 'attention_bias': False}
ROPE_SCALINGS = ('default', 'linear', 'dynamic', 'yarn')


def attention_settings(attn, n_embd, n_head, **given):
    """The knobs of variant `attn` with those in `given` that are not None laid over its row. -> dict with DEFAULTS' keys.

    Raises ValueError, in one line, for an unknown variant, a knob that the variant's class does not have, and sizes
    that make no attention (odd rotary width, no width at all, key/value heads that do not divide the heads, ...).
    """
    if n_embd < 1 or n_head < 1 or n_embd % n_head:
        raise ValueError(f'n_embd ({n_embd}) must be a multiple of n_head ({n_head}): a head gets n_embd / n_head dims')
    rows = variants(n_embd, n_head)
    if attn not in rows:
        import difflib                                                  # only on the way out
        close = difflib.get_close_matches(str(attn), rows, n=1)
        raise ValueError(f'unknown attention variant {attn!r}{f"; did you mean {close[0]}?" if close else ""}'
                         f' (one of {", ".join(rows)})')
    row = {**DEFAULTS, **rows[attn]}
    for knob, value in given.items():
        if value is None:
            continue
        if row[knob] is None:
            raise ValueError(f'--{knob} means nothing to --attn={attn}, which is {row["class"].__name__}')
        row[knob] = value
    row.pop('class')

    if row['n_kv_head'] is not None:                                    # multi-head
        if row['n_kv_head'] < 1 or n_head % row['n_kv_head']:
            raise ValueError(f'n_kv_head ({row["n_kv_head"]}) must divide n_head ({n_head})')
        if (n_embd // n_head) % 2:
            raise ValueError(f'n_embd / n_head is {n_embd // n_head}, an odd number: rotary positions turn pairs of dims')
    if row['kv_lora_rank'] is not None:                                 # latent
        if row['q_lora_rank'] < 0:
            raise ValueError(f'q_lora_rank ({row["q_lora_rank"]}) must be 0 (no bottleneck for the queries) or positive')
        for knob in ('kv_lora_rank', 'v_head_dim', 'qk_rope_head_dim'):
            if row[knob] < 1:
                raise ValueError(f'{knob} is {row[knob]} with n_embd={n_embd}, n_head={n_head}; it must be at least 1')
        if row['qk_nope_head_dim'] < 1:
            raise ValueError(f'qk_nope_head_dim is {row["qk_nope_head_dim"]}: the rotary part (qk_rope_head_dim = '
                             f'{row["qk_rope_head_dim"]}) leaves the content no width; make it smaller or n_embd larger')
        if row['qk_rope_head_dim'] % 2:
            raise ValueError(f'qk_rope_head_dim ({row["qk_rope_head_dim"]}) must be even: rotary positions turn pairs of dims')
    if row['rope_scaling'] not in ROPE_SCALINGS:
        raise ValueError(f'unknown rope_scaling {row["rope_scaling"]!r} (one of {", ".join(ROPE_SCALINGS)})')
    if row['rope_scaling'] == 'dynamic' and (row['qk_rope_head_dim'] or n_embd // n_head) == 2:
        raise ValueError('rope_scaling=dynamic needs a rotary width above 2: its exponent is width / (width - 2)')
    if not 1 <= row['rope_factor'] < math.inf:
        raise ValueError(f'rope_factor ({row["rope_factor"]}) must be at least 1: positions are divided by it')
    return row


def build_attention(config):
    """A new attention layer for `config` (model.ModelConfig): the class that the variant's row names."""
    return variants(config.n_embd, config.n_head)[config.attn]['class'](config)
