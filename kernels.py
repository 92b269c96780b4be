"""The machine: every computation that the model asks for by name, plain and beside it fast.

attention.py, moe.py and model.py are the paper; what knows about processors, memory, strides, or writes a backward by hand
stands here. Each function has a plain form, a few lines of tensor operations that autograd differentiates: the definition.
Under it stands the fast form, with what it gains and why (what else was tried: results/README.md).

                                                                                                    plain: slower by
    rms_norm(x, weight, eps)            x / rms(x) * weight                                          4% of an update
    rotate(x, angles)                   pairs of dims turned by their angles                         3%
    attention(q, k, v, scale, mask)     softmax(scale q k^T) v                                       15%
    cross_entropy(x, weight, targets)   of the logits x weight^T, and how many are right             6%, and less memory
    experts(x, chosen, weights, ...)    a token's weighted sum of the SwiGLU networks that it chose  38%; a decoded token 17%
    linear(x, weight)                   x weight^T for the few rows of decoding                      a decoded token 6%, on AMD
    norm(x)                             sqrt of the sum of x^2                                       2%
    (mla in 2 layers of Experiment 1's width, bfloat16, a Xeon with AMX; linear and norm in float32: results/README.md)

    use('plain')                            all of them plain: slower, but double backward and torch.func work
    use('fast', rms_norm='plain')           all fast but one
"""
import ctypes
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

NAMES = ('rms_norm', 'rotate', 'attention', 'cross_entropy', 'experts', 'linear', 'norm')
_fast = dict.fromkeys(NAMES, True)


def use(form='fast', **exceptions):
    """Choose 'fast' or 'plain' for all functions, and another form for some by name. Raises ValueError for others."""
    chosen = {**dict.fromkeys(NAMES, form), **exceptions}
    for name, value in chosen.items():
        if name not in NAMES or value not in ('fast', 'plain'):
            raise ValueError(f'{name}={value!r}: kernels are fast or plain, and named {", ".join(NAMES)}')
    _fast.update({name: value == 'fast' for name, value in chosen.items()})


def wide(dtype):
    """float32, or float64 where the numbers are: what sums, softmax and losses are computed in."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(x):
    """What products with x run in: autocast's dtype where it is on, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def no_autocast(x):
    return torch.autocast(x.device.type, enabled=False)


def by_hand(x):
    """Whether autograd functions written for a CPU serve: not inside torch.compile, which fuses the plain form itself."""
    return x.is_cpu and not torch.compiler.is_compiling()


# ---------------------------------------------------------------------------------------------------------------------
# Norm

def rms_norm(x, weight, eps):
    """x (..., C) / sqrt(mean(x^2) + eps) * weight (C,), computed in float32 at least -> (..., C) in x's dtype."""
    dtype = wide(weight.dtype)
    if not _fast['rms_norm']:
        x_wide = x.to(dtype)
        return (x_wide * (x_wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)
    if by_hand(x) and torch.is_grad_enabled():
        return RMSNormByHand.apply(x.to(dtype), weight.to(dtype), eps).to(x.dtype)
    # GPUs have one kernel for it
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


class RMSNormByHand(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), keeping x and one r per token for the backward.

    F.rms_norm keeps x r as well, 40 MB at Experiment 1's size, and takes twice the time on a CPU. out= writes into a
    temporary that is no longer needed: fresh memory often leaves a hole of its size in a CPU's heap.
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


# ---------------------------------------------------------------------------------------------------------------------
# Rotation

def rotate(x, angles):
    """Turn the pairs of dims (2i, 2i+1) of x (B, heads, T, width): DeepSeek's interleaved layout (RoFormer, eq. 34).

    angles (T, width/2, 2) or (B, 1, T, width/2, 2) are [cos, sin] of each pair's angle.
    """
    if _fast['rotate'] and by_hand(x):
        # a pair is a complex number, turning it a product with e^(ia): one pass over memory instead of eight
        pairs = x.to(angles.dtype).unflatten(-1, (-1, 2))
        if any(n % 2 for n in (pairs.storage_offset(), *pairs.stride()[:-1])):      # pairs lie apart: behind an odd width
            pairs = pairs.clone(memory_format=torch.contiguous_format)
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(angles)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    (even, odd), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), angles.unbind(-1)     # (B, heads, T, width/2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention

def attention(q, k, v, scale, mask):
    """softmax(scale q k^T) v, row by row of q -> (B, H, T, dv).

    q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv); G divides H, query head h reads key head h // (H / G).
    mask: 'causal' (T = S, each row sees itself and those before), None (all), or True where a row sees: (T, S) or
    (B, 1, T, S).
    """
    if _fast['attention']:
        return fast_attention(q, k, v, scale, mask)
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.mT).to(wide(q.dtype)) * scale                                   # (B, H, T, S)
    if mask is not None:
        allowed = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if isinstance(mask, str) else mask
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def fast_attention(q, k, v, scale, mask):
    """A CPU trains in blocks of queries (BlockedAttention); elsewhere torch's fused kernels, which want values as wide as
    keys: whichever is narrower is padded with zeros.

    Added to values, zeros come out as zeros and are cut off; added to q and k, they change no score. On a CPU that is 1.4
    times as fast as torch's fallback, which builds the T x S matrix. A single query's heads that share a key become rows
    of one matrix, so that each key is read once and not H / G times: 2 to 2.7 times as fast (results/README.md).
    """
    (B, H, T, _), G, causal = q.shape, k.size(1), isinstance(mask, str)
    if causal and by_hand(q) and torch.is_grad_enabled() and T > 1:
        q, k, v = (t.to(product_dtype(t)) for t in (q, k, v))           # before autocast is off: it is in no backward
        with no_autocast(q):
            o = BlockedAttention.apply(q.reshape(B * G, H // G, T, -1), k.flatten(0, 1), v.flatten(0, 1), scale)
        return o.view(B, H, T, -1)
    dv, dk = v.size(-1), k.size(-1)
    if dv < dk:
        v = F.pad(v, (0, dk - dv))
    elif dv > dk:
        q, k = F.pad(q, (0, dv - dk)), F.pad(k, (0, dv - dk))
    if T == 1 and G != H:
        q = q.reshape(B, G, H // G, -1)                                 # heads as rows
    if q.is_cuda and not torch.compiler.is_compiling():                 # which sees to it itself
        v = aligned(v)
    # a T that varies is a symbol inside torch.compile, and so is T > 1: the kernel wants a bool
    is_causal = True if causal and T > 1 else False
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, is_causal=is_causal, scale=scale,
                                       enable_gqa=q.size(1) != G)
    return o.reshape(B, H, T, -1)[..., :dv]


def aligned(t):
    """t, or a copy if not all its rows start at multiples of 16 bytes, as CUDA's fused kernels read them and do not check:
    latent attention's values are cut out of kv_b_proj's output behind dn numbers of content."""
    rows = (t.storage_offset(), *t.stride()[:-1])
    return t.contiguous() if any(n * t.element_size() % 16 for n in rows) else t


BLOCK, KEPT = 128, 1024         # queries in a block; the largest T whose probabilities are kept for the backward


class BlockedAttention(torch.autograd.Function):
    """Causal attention of q (B G, R, T, d) to k (B G, T, d) and v (B G, T, dv) -> (B G, R, T, dv), BLOCK queries at a time
    against the keys up to the last of them, so that a block's scores stay in the cache and the half above the diagonal is
    not computed. The R = H / G query heads of a key head are rows of one matrix. Softmax is in float32 inside its kernel,
    probabilities are in q's dtype, gradients add up in float32.

    torch's kernel for CPUs has no faster backward in bfloat16 than in float32, and needs values padded to the keys' width:
    4 x 8 heads x 512, forward and backward, two threads of a Xeon with AMX, ms: bfloat16 32 against 57 (48 wide), 36 against
    68 (80 wide with values of 48), 24 against 51 (one key head); float32 48 against 47, 60 against 77, 42 against 45.
    The probabilities are kept for the backward where they are small, and made again where T^2 would outgrow the rest.
    """

    @staticmethod
    def probabilities(q, k, scale, mask):
        """softmax over scores of q (B G, R, n, d), the last n of the rows k (B G, S, d) -> (B G, R n, S)"""
        n = q.size(2)
        scores = torch.bmm((q * scale).flatten(1, 2), k.mT)
        scores.view(*q.shape[:3], -1)[..., -n:] += mask[:n, :n]         # sooner than by masked_fill_
        return scores.softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v, scale):
        T, o, kept = q.size(2), q.new_empty(*q.shape[:3], v.size(-1)), []
        mask = torch.full((BLOCK, BLOCK), -torch.inf, dtype=q.dtype).triu(1)
        for i in range(0, T, BLOCK):
            end = min(i + BLOCK, T)
            p = BlockedAttention.probabilities(q[:, :, i:end], k[:, :end], scale, mask)
            o[:, :, i:end] = torch.bmm(p, v[:, :end]).view_as(o[:, :, i:end])
            if T <= KEPT:
                kept.append(p)
        ctx.save_for_backward(q, k, v, mask, *kept)
        ctx.scale = scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, mask, *kept = ctx.saved_tensors
        T, d_q = q.size(2), torch.empty_like(q)
        d_k, d_v = (torch.zeros_like(t, dtype=wide(t.dtype)) for t in (k, v))
        for i in range(0, T, BLOCK):
            end = min(i + BLOCK, T)
            p = (kept[i // BLOCK] if kept else
                 BlockedAttention.probabilities(q[:, :, i:end], k[:, :end], ctx.scale, mask))       # (B G, R n, S)
            rows, d_rows = q[:, :, i:end].flatten(1, 2), do[:, :, i:end].flatten(1, 2)              # (B G, R n, d | dv)
            d_v[:, :end] += torch.bmm(p.mT, d_rows)
            d_scores = torch._softmax_backward_data(torch.bmm(d_rows, v[:, :end].mT), p, -1, p.dtype)
            d_q[:, :, i:end] = torch.bmm(d_scores, k[:, :end]).view_as(d_q[:, :, i:end])
            d_k[:, :end] += torch.bmm(d_scores.mT, rows)
        return d_q.mul_(ctx.scale), d_k.mul_(ctx.scale).to(k.dtype), d_v.to(v.dtype), None


# ---------------------------------------------------------------------------------------------------------------------
# Head and loss

def cross_entropy(x, weight, targets):
    """Of logits x weight^T: x (N, C), weight (V, C), targets (N,), -1 where there is nothing to predict
    -> nll summed over the targets, in nats, and how many had the largest logit. Softmax in float32 at least."""
    dtype = product_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    with no_autocast(x):
        if _fast['cross_entropy']:
            # as many rows at a time as make 8 MiB of logits on a CPU (its cache), 256 MiB elsewhere
            rows = max(1, 2 ** (21 if x.device.type == 'cpu' else 26) // len(weight))
            return ChunkedCrossEntropy.apply(x, weight, targets, rows, torch.is_grad_enabled())
        logits = (x @ weight.T).to(wide(dtype))                         # (N, V)
        nll = F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')
        return nll, ((logits.argmax(1) == targets) & (targets >= 0)).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Over chunks of rows, so that the (N, V) logits never exist whole: 0.3 GB less at a vocabulary of 50,257.

    The gradient, softmax - onehot, is finished while a chunk's logits are at hand, so nothing is computed twice and
    nothing but the (N, C) and (V, C) results is kept. torch 2.13 has F.linear_cross_entropy for this, 2.11 has not.
    Nothing that is returned was changed in place: torch.compile of 2.11 silently loses the gradient of such a tensor.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, rows, with_grad):
        dtype = wide(x.dtype)
        nll, correct = x.new_zeros((), dtype=dtype), targets.new_zeros(())
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight, dtype=dtype)) if with_grad else (None, None)
        for i in range(0, len(x), rows):
            s = slice(i, i + rows)
            logits, target = (x[s] @ weight.T).to(dtype), targets[s].unsqueeze(1)       # (n, V), (n, 1)
            counts = target >= 0
            target = target.clamp_min(0)
            largest, best = logits.max(1, keepdim=True)
            correct = correct + ((best == target) & counts).sum()
            logits -= largest                                                           # so that no exp overflows
            at_target = logits.gather(1, target)
            p = logits.exp_()
            total = p.sum(1, keepdim=True)
            nll = nll + torch.where(counts, total.log() - at_target, 0).sum()
            if with_grad:
                p = p.mul_(counts / total)                                              # softmax; 0 where nothing counts
                p = p.scatter_add_(1, target, -counts.to(dtype)).to(x.dtype)
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


# ---------------------------------------------------------------------------------------------------------------------
# Experts

def experts(x, chosen, weights, gate, up, down):
    """y_n = sum over the k networks e that row n chose of weights_n,e  down_e (silu(gate_e x_n) * up_e x_n) -> (N, C).

    x (N, C); chosen (N, k), no network twice in a row; weights (N, k), float32 at least; gate, up (E, F, C); down (E, C, F).
    Nothing is dropped, and every sum has a fixed order. Summed in the weights' dtype, returned in x's.
    """
    dtype = product_dtype(x)
    with no_autocast(x):
        if _fast['experts']:
            return fast_experts(x, chosen, weights, gate, up, down, dtype).to(x.dtype)
        rows, gate, up, down = (t.to(dtype) for t in (x, gate, up, down))
        y = torch.zeros_like(x, dtype=weights.dtype)
        for e in range(len(gate)):
            n, choice = (chosen == e).nonzero(as_tuple=True)            # the rows that chose this network
            h = F.silu(rows[n] @ gate[e].T) * (rows[n] @ up[e].T)
            y = y.index_add(0, n, (h @ down[e].T) * weights[n, choice].unsqueeze(1))
        return y.to(x.dtype)


def fast_experts(x, chosen, weights, gate, up, down, dtype):
    """The M = N k copies of the rows, sorted by network:  [ network 0's | network 1's | ... ].

    On a CPU one network after the other, each gathering its rows and adding its results to theirs (ExpertsByHand); on a
    GPU and inside torch.compile all at once over one sorted copy (F.grouped_mm): on Hopper and Blackwell in bfloat16 one
    launch for each matrix, which reads on the device where each network's rows end, so that the host does not wait. One row
    has nothing to sort (experts_of_one).
    """
    N, k = chosen.shape
    if N == 1 and by_hand(x) and not torch.is_grad_enabled():
        return experts_of_one(x.to(dtype), chosen, weights, gate, up, down)
    order = chosen.flatten().argsort(stable=True)                       # (M,) which copy stands at each sorted row
    load = occurrences(chosen.flatten(), len(gate))
    if grouped_serves(x, gate, dtype):
        inverse = order.argsort()                                       # (M,) at which sorted row each copy stands
        ends = load.cumsum(0).to(torch.int32)                           # (E,) where each network's rows end
        gate, up, down = (p.to(dtype).mT for p in (gate, up, down))
        rows = Gather.apply(x.to(dtype), order // k, inverse)           # (M, C)
        h = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
        y = Gather.apply(F.grouped_mm(h, down, offs=ends), inverse, order)          # (M, C), the copies of each row in line
        return (y.unflatten(0, (N, k)) * weights.unsqueeze(-1)).sum(1)
    return experts_by_hand(x, weights.flatten(), gate, up, down, dtype, order, load.tolist(), torch.is_grad_enabled())


def occurrences(chosen, n):
    """chosen (..., M) numbers below n -> (..., n): how often each is among them. Not bincount, which makes a host wait."""
    return (chosen.unsqueeze(-1) == torch.arange(n, device=chosen.device)).sum(-2)


def grouped_serves(x, gate, dtype):
    """Whether F.grouped_mm is the way to go: on a GPU, inside torch.compile, and where few tokens are decoded on a CPU.
    With many rows the loop is faster there; with few, and but for AMD (see linear), it is 10% slower.

    It takes no float64 and only strides that are multiples of 16 bytes; and torch.compile knows it in bfloat16 alone
    (the shape rule, torch._meta_registrations of 2.13, refuses float32, which the kernel itself takes). Where it does
    not serve there, the experts run eagerly (experts_by_hand).
    """
    compiling = torch.compiler.is_compiling()
    few = len(x) <= 4 * FEW_ROWS and not (torch.is_grad_enabled() or WEIGHTS_FIRST)
    fits = dtype == torch.bfloat16 or (dtype == torch.float32 and not compiling)
    return fits and (x.is_cuda or compiling or few) and all(n * dtype.itemsize % 16 == 0 for n in gate.shape[1:])


class Gather(torch.autograd.Function):
    """x (N, C) -> x[index] (M, C), where row n of x goes to k = M / N places: inverse[k n], ..., inverse[k n + k - 1].

    The gradient gathers too, and adds up what comes back from those places. Plain indexing would scatter-add, atomically on
    a GPU.
    """

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        ctx.N = len(x)
        return x[index]

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad[inverse].unflatten(0, (ctx.N, -1)).sum(1), None, None


class ExpertsByHand(torch.autograd.Function):
    """One network after the other, forward and backward, so that its rows are gathered, used and added up in the cache.

    dtype: of the products; a network's matrices are cast just before them, while they are in the cache, which takes no longer
    than to cast all of them once per update and to read them again. sizes: how many rows each network has. For the backward
    only g = gate x and u = up x are kept. With h = silu(g) u, y = w down h:
        dh = w down^T dy      du = dh silu(g)      dg = dh u silu'(g)      dx = up^T du + gate^T dg
        dw = dy . (down h) = dh . h / w = du . u / w = x . (up^T du) / w
    The last form needs no stored output and sums over C numbers, not F. Where w underflowed to 0, so did its derivative by
    the router's logit.
    """

    @staticmethod
    def forward(ctx, x, weights, gate, up, down, dtype, order, sizes, with_grad):
        x_low, y = x.to(dtype), torch.zeros_like(x, dtype=weights.dtype)
        filled = [F.pad(part, (0, filled_up(len(part), dtype) - len(part)), value=len(order)) for part in order.split(sizes)]
        sizes = [len(part) for part in filled]
        # of every network that has any: the network, and where its rows are
        spans = [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(sizes, itertools.accumulate(sizes))) if n]
        order = torch.cat(filled)                                       # (M',), M in rows that only fill up
        w = F.pad(weights, (0, 1))[order].unsqueeze(1)                  # (M', 1), and there 0
        rows_of = (order // (len(weights) // len(x))).clamp_max(len(x) - 1)         # (M',) which row of x stands there
        # without a backward: one network at a time. One tensor: when it is freed, a gradient fits in its place
        g, u = x_low.new_empty(2, len(order) if with_grad else max(sizes), gate.size(1))
        space = x_low.new_empty(max(sizes), gate.size(1))               # for h, of every network in turn
        for e, s in spans:
            own = s if with_grad else slice(sizes[e])
            rows, h = x_low.index_select(0, rows_of[s]), space[:sizes[e]]       # (n, C), sooner than by x[...]
            linear(rows, gate[e].to(dtype), out=g[own])
            linear(rows, up[e].to(dtype), out=u[own])
            torch.ops.aten.silu.out(g[own], out=h).mul_(u[own])         # (n, F)
            y.index_add_(0, rows_of[s], linear(h, down[e].to(dtype)) * w[s])
        ctx.save_for_backward(x_low, gate, up, down, g, u, w, order, rows_of)
        ctx.sizes, ctx.spans, ctx.copies = sizes, spans, len(weights)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, gate, up, down, g, u, w, order, rows_of = ctx.saved_tensors
        dx, dw = torch.zeros_like(x, dtype=w.dtype), torch.empty_like(w)
        # a network without rows gets a gradient of zeros
        empty = torch.empty_like if all(ctx.sizes) else torch.zeros_like
        d_gate, d_up, d_down = (empty(p, dtype=w.dtype) for p in (gate, up, down))
        spaces = x.new_empty(3, max(ctx.sizes), g.size(1))              # written over for every network
        for e, s in ctx.spans:
            n, own = ctx.sizes[e], rows_of[s]
            silu, dh, h = spaces[:, :n]                                 # (n, F) each
            rows, dy_e = x.index_select(0, own), (dy.index_select(0, own) * w[s]).to(x.dtype)       # (n, C)
            torch.ops.aten.silu.out(g[s], out=silu)
            product_into(d_down[e], dy_e.T, torch.mul(silu, u[s], out=h))
            torch.mm(dy_e, down[e].to(x.dtype), out=dh)
            d_u = silu.mul_(dh)
            d_g = torch.ops.aten.silu_backward.grad_input(dh.mul_(u[s]), g[s], grad_input=h)
            product_into(d_up[e], d_u.T, rows)
            product_into(d_gate[e], d_g.T, rows)
            d_rows = d_u @ up[e].to(x.dtype)                            # (n, C), half of it
            dw[s] = torch.where(w[s] != 0, (d_rows * rows).sum(1, keepdim=True) / w[s], 0)
            dx.index_add_(0, own, d_rows.addmm_(d_g, gate[e].to(x.dtype)).to(dx.dtype))
        d_weights = dw.new_empty(ctx.copies + 1).index_copy_(0, order, dw[:, 0])    # the last one: of rows that fill up
        return dx, d_weights[:-1], d_gate, d_up, d_down, None, None, None, None


# Not compiled: the sizes would be constants there, and every batch has others
experts_by_hand = torch.compiler.disable(ExpertsByHand.apply)


def filled_up(n, dtype):
    """How many rows a network gets that has n: in bfloat16 rows of weight 0 fill them up to a multiple of 32, from 512 on of
    a sixteenth of the next power of two.

    For every new number of rows oneDNN generates code, which takes as long as several products and stays in memory, between
    the tensors. 2,048 tokens through a layer of Experiment 1, forward and backward on a Xeon with AMX: 110 ms in multiples
    of 32, 625 without. With multiples of 32 alone a run of 30 updates peaked at 4.3 GB, with these numbers at 3.0.
    """
    step = max(32, 2 ** (n - 1).bit_length() // 16) if dtype == torch.bfloat16 and n else 1
    return n + -n % step


def product_into(out, a, b):
    """out = a b, where out may be wider than the product."""
    torch.mm(a, b, out=out) if out.dtype == a.dtype else out.copy_(a @ b)


def experts_of_one(x, chosen, weights, gate, up, down):
    """Decoding's path for a single row x (1, C) on a CPU: nothing to sort."""
    y = torch.zeros_like(x, dtype=weights.dtype)
    for e, weight in zip(chosen[0].tolist(), weights[0].tolist()):
        h = F.silu(linear(x, gate[e].to(x.dtype))).mul_(linear(x, up[e].to(x.dtype)))
        y.add_(linear(h, down[e].to(x.dtype)), alpha=weight)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Products of few rows

# Whether products of few rows have the weights on the left: on AMD. There MKL reads w at 7 to 10 GB/s for x w^T with one or
# two rows x, and at 30 for w x^T; on Intel it is the other way round, 27 and 12. No such file: not Linux
cpuinfo = Path('/proc/cpuinfo')
WEIGHTS_FIRST = cpuinfo.exists() and 'AuthenticAMD' in cpuinfo.read_text()
FEW_ROWS = 8


def linear(x, w, out=None):
    """x w^T for x (rows, in) and w (out, in). With few rows, reading w is all that it costs."""
    if not (_fast['linear'] and WEIGHTS_FIRST and len(x) <= FEW_ROWS and x.is_cpu and x.dtype == torch.float32):
        return torch.mm(x, w.T, out=out)
    columns = (x if len(x) > 1 else x.expand(2, -1)).contiguous().T     # one column would be that slow product again
    y = (w @ columns)[:, :len(x)].T
    return y if out is None else out.copy_(y)


# ---------------------------------------------------------------------------------------------------------------------
# Length

def norm(x):
    """sqrt of the sum of x^2 over all of x, whatever its shape -> scalar."""
    if _fast['norm'] and x.is_cpu and x.dtype in (torch.float32, torch.float64):
        # BLAS takes half the time of torch's norm, and is off by 2e-6 where that is by 1e-4: it sums in many lanes
        return torch.dot(x.flatten(), x.flatten()).sqrt()
    return torch.linalg.vector_norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def keep_freed_memory():
    """With glibc: keep what is freed for the next update instead of handing it back to the system.

    Tensors above 32 MB (the experts' gradients, from 16 experts on) are otherwise fresh pages in every update, and the
    first touch of a page costs more than what is computed on it: 1.4 times the time at 32 experts (results/README.md).
    """
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-4, 0)                                                  # M_MMAP_MAX: everything in the heap
        mallopt(-1, -1)                                                 # M_TRIM_THRESHOLD: which never shrinks
    except (OSError, AttributeError):                                   # another C library
        pass


def make_moments(adamw):
    """Make AdamW's moments as its first step would, but now: made among activations that come and go, they leave 0.1 GB
    of holes in a CPU's heap."""
    for p in (p for group in adamw.param_groups for p in group['params'] if p.is_cpu):
        adamw.state[p] = {'step': torch.zeros(()), 'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}
