"""The experts: a router that sends every token to top_k of n_expert SwiGLU networks, and what keeps their load even.

Papers: Shazeer et al. 2017 (arXiv 1701.06538) for the gate, Switch Transformer (Fedus et al., arXiv 2101.03961) for the
load-balancing loss, ST-MoE (Zoph et al., arXiv 2202.08906) for the router z-loss, MegaBlocks (Gale et al., arXiv
2211.15841) for dropless dispatch, DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) for balancing without a loss.

Shapes: B sequences of T tokens, N = B T, C = n_embd, F = d_ff, E = n_expert, k = top_k, M = N k token copies.

    x (N, C) -> router -> chosen (N, k), weights (N, k)
    the M copies, sorted by expert:   [ expert 0's rows | expert 1's rows | ... | expert E-1's rows ]
    each expert's network over its own rows, times their weights, added up by token -> (N, C)

No token is dropped and there is no capacity: a token's result depends on that token alone. Every sum has a fixed order,
so the same input gives the same bits. Read MixtureOfExperts first. Below it are the networks, in three ways: one expert
after the other, each gathering its rows and adding its results to their tokens (SegmentedSwiGLU, for CPUs, and the one
to read); all experts at once over one sorted copy of the rows (grouped_swiglu, for GPUs); a single token
(one_token_swiglu).
"""
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


LOSS_WEIGHTS = {'softmax': (0.01, 0.001), 'sigmoid': (0.0, 0.0)}    # of a layer's balance loss and z-loss, by default


class Routing(NamedTuple):
    """What one layer tells about its routing. The losses are unweighted and carry gradient; load feeds update_bias too."""
    balance_loss: torch.Tensor      # scalar, 1 when load or probability is even
    z_loss: torch.Tensor            # scalar, nats squared
    load: torch.Tensor              # (E,) token copies that each expert got; sums to M
    entropy: torch.Tensor           # scalar, nats: mean entropy of a token's distribution over experts, at most ln E


class MixtureOfExperts(nn.Module):
    """x (B, T, C) -> (B, T, C), Routing. Experts are stored stacked, each matrix as (out, in) like nn.Linear's.

    router='softmax'  p = softmax over all E; the k largest, renormalised to sum to 1 (Mixtral, Qwen; the same as a
                      softmax over the k largest logits). With k = 1 that would be a constant 1, which tells the router
                      nothing, so there p itself is the weight (Switch Transformer, eq. 2).
    router='sigmoid'  DeepSeek-V3, eq. 12-16: s = sigmoid(logits); a bias per expert is added for CHOOSING only, the
                      weights are the chosen s, renormalised if k > 1. The bias is no parameter: update_bias() nudges
                      it.
    Either way the weights are multiplied by routed_scaling_factor at last.
    """

    def __init__(self, config):
        super().__init__()
        C, width, E = config.n_embd, config.d_ff, config.n_expert
        self.top_k, self.kind, self.scaling = config.top_k, config.router, config.routed_scaling_factor
        self.router = nn.Linear(C, E, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(E, width, C))
        self.up_proj = nn.Parameter(torch.empty(E, width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))
        if config.n_shared_expert:          # always on, ungated: one network, n_shared_expert times as wide
            shared = config.n_shared_expert * width
            self.shared_gate_proj = nn.Linear(C, shared, bias=False)
            self.shared_up_proj = nn.Linear(C, shared, bias=False)
            self.shared_down_proj = nn.Linear(shared, C, bias=False)
        # float32 whatever the model's dtype: steps of 0.001 are lost in bfloat16. None for the softmax router.
        self.register_buffer('e_score_correction_bias', torch.zeros(E) if self.kind == 'sigmoid' else None)

    def _apply(self, fn, recurse=True):
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)         # .to(), .bfloat16(), ...: the bias moves, but stays float32
        if bias is not None:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def route(self, x, with_balance=True):
        """x (B, T, C) -> chosen (B, T, k) expert ids, weights (B, T, k), Routing or None."""
        # float32 also under autocast: small differences between logits decide the routing
        with without_autocast(x):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = self.router(x.to(wide))                                                    # (B, T, E)
        if self.kind == 'softmax':
            scores = probs = logits.softmax(-1)
            chosen = scores.topk(self.top_k, dim=-1).indices                                    # (B, T, k)
        else:
            scores = logits.sigmoid()
            chosen = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
            probs = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        weights = scores.gather(-1, chosen)                                                     # never the biased ones
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.scaling
        return chosen, weights, self.balance(logits, probs, chosen) if with_balance else None

    def balance(self, logits, probs, chosen):
        """How evenly the experts are used -> Routing. logits, probs (B, T, E), chosen (B, T, k).

        Switch eq. 4-6 with the load counted per choice, E sum_e f_e P_e: f_e is expert e's share of the choices, P_e the
        mean of its probability (normalised over all E experts, not over the chosen k). Both are taken per sequence
        (DeepSeek-V3 eq. 17-20), so that neither the micro-batch nor the number of processes matters. The choices counted
        are those made, with the bias; V3's eq. 18 counts those without it. f counts, so it has no gradient; P has, and pushes probability
        away from the experts that are full. The loss is 1 when f or P is even. With E = 4, k = 1, every token on expert 0
        and p = (.7, .1, .1, .1) it is 4 x 1 x .7 = 2.8; if k experts get everything with certainty, E/k.
        """
        (_, T, k), E = chosen.shape, logits.size(-1)
        counts = loads(chosen.flatten(1), E)                                                    # (B, E)
        balance_loss = E * (counts.to(probs.dtype) / (T * k) * probs.mean(1)).sum(-1).mean()
        z_loss = logits.logsumexp(-1).square().mean()                                           # ST-MoE eq. 5
        entropy = -(probs * probs.clamp_min(1e-20).log()).sum(-1).mean()
        return Routing(balance_loss, z_loss, counts.sum(0), entropy.detach())

    def forward(self, x, with_balance=True):
        B, T, C = x.shape
        N, E = B * T, self.router.out_features
        chosen, weights, routing = self.route(x, with_balance)
        if N == 1 and x.is_cpu and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            y = one_token_swiglu(x.view(1, C), chosen.flatten().tolist(), weights.flatten().tolist(),
                                 self.gate_proj, self.up_proj, self.down_proj)
            return self.add_shared(x, y.view(B, T, C)), routing
        load = routing.load if with_balance else loads(chosen.flatten(), E)
        order = chosen.flatten().argsort(stable=True)           # (M,) which copy stands at each sorted row
        # under autocast the products run in its dtype; functions written by hand are not cast by it, so cast here
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        networks = [p.to(dtype) for p in (self.gate_proj, self.up_proj, self.down_proj)]
        with without_autocast(x):
            y = swiglu_experts(x.view(N, C).to(dtype), weights.flatten(), *networks, order, load)
        return self.add_shared(x, y.to(x.dtype).view(B, T, C)), routing

    def add_shared(self, x, y):
        if hasattr(self, 'shared_gate_proj'):
            y = y + self.shared_down_proj(F.silu(self.shared_gate_proj(x)) * self.shared_up_proj(x))
        return y

    @torch.no_grad()
    def update_bias(self, load, rate):
        """DeepSeek-V3's auxiliary-loss-free balancing (arXiv 2408.15664): once per optimizer update, nudge every
        overloaded expert down and every underloaded one up by `rate`. load (E,): copies over the whole global batch."""
        load = load.to(self.e_score_correction_bias.dtype)
        self.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def loads(chosen, n_expert):
    """chosen (..., M) expert ids -> (..., E): how often each is among them. Not bincount, which makes a host wait."""
    return (chosen.unsqueeze(-1) == torch.arange(n_expert, device=chosen.device)).sum(-2)


# ---------------------------------------------------------------------------------------------------------------------
# The experts' networks

def swiglu_experts(x, weights, gate, up, down, order, load):
    """Every token's weighted sum over its experts, sum over e of w_e down_e(silu(gate_e x) * up_e x) -> (N, C).

    x (N, C); weights (M,): copy m belongs to token m // k; gate, up (E, F, C); down (E, C, F); order (M,): which copy
    stands at each row when they are sorted by expert; load (E,): how many rows each expert has. Summed in the weights'
    dtype, which is float32 at least.
    """
    if not grouped_serves(x, gate):
        return SegmentedSwiGLU.apply(x, weights, gate, up, down, order, load.tolist(), torch.is_grad_enabled())
    inverse = order.argsort()                                   # (M,) at which sorted row each copy stands
    rows, weights = ToExperts.apply(x, order, inverse), ToExperts.apply(weights, order, inverse)    # (M, C), (M,)
    return FromExperts.apply(grouped_swiglu(rows, weights, gate, up, down, load), order, inverse, len(order) // len(x))


def grouped_serves(x, gate):
    """Whether F.grouped_mm is the way to go: on a GPU, inside torch.compile, and where few tokens are decoded on a CPU.
    With many rows the loop is faster there; with few, and but for AMD (see product), it is 10% slower.

    It takes no float64 and only strides that are multiples of 16 bytes; and torch.compile knows it in bfloat16 alone
    (the shape rule, torch._meta_registrations of 2.13, refuses float32, which the kernel itself takes). Where it does
    not serve there, load.tolist() above breaks the graph, and the experts run eagerly.
    """
    compiling = torch.compiler.is_compiling()
    few = x.dtype == torch.float32 and len(x) <= 4 * FEW_ROWS and not (torch.is_grad_enabled() or WEIGHTS_FIRST)
    fits = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not compiling)
    return fits and (x.is_cuda or compiling or few) and all(n * x.element_size() % 16 == 0 for n in gate.shape[1:])


def grouped_swiglu(rows, weights, gate, up, down, load):
    """Over rows (M, C) sorted by expert, weights (M,) along -> (M, C): all experts in one launch per matrix; their row
    counts are read on the device, so the host does not wait."""
    ends = load.cumsum(0).to(torch.int32)                       # (E,) where each expert's rows end
    g = F.grouped_mm(rows, gate.transpose(1, 2), offs=ends)
    u = F.grouped_mm(rows, up.transpose(1, 2), offs=ends)
    return F.grouped_mm(F.silu(g) * u, down.transpose(1, 2), offs=ends) * weights.unsqueeze(1)


class ToExperts(torch.autograd.Function):
    """x (N, ...) -> (M, ...): the k = M / N copies of every token, sorted by expert.

    Plain indexing would scatter-add in its backward, atomically on a GPU. But the gradient of handing out copies is
    adding them up again, FromExperts, and the other way round: both gather.
    """

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        ctx.k = len(order) // len(x)
        return x[order // ctx.k]

    @staticmethod
    def backward(ctx, grad):
        return FromExperts.apply(grad, *ctx.saved_tensors, ctx.k), None, None


class FromExperts(torch.autograd.Function):
    """rows (M, ...), sorted by expert -> (N, ...): the sum over each token's k copies."""

    @staticmethod
    def forward(ctx, rows, order, inverse, k):
        ctx.save_for_backward(order, inverse)
        return rows[inverse].unflatten(0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx, grad):
        return ToExperts.apply(grad, *ctx.saved_tensors), None, None, None


class SegmentedSwiGLU(torch.autograd.Function):
    """What swiglu_experts says, one expert after the other. sizes: load as a list.

    Written out by hand, forward and backward, so that an expert's rows are gathered, used and added up while they are
    in the cache. For the backward only g = gate x and u = up x are kept. With h = silu(g) u, y = w down h:
        dh = w down^T dy      du = dh silu(g)      dg = dh u silu'(g)      dx = up^T du + gate^T dg
        dw = dy . (down h) = dh . h / w = du . u / w = x . (up^T du) / w
    The last saves keeping the output, and is C wide, not F. Where w underflowed to 0, so did its derivative by the
    router's logit.
    """

    @staticmethod
    def forward(ctx, x, weights, gate, up, down, order, sizes, with_grad):
        y, w = torch.zeros_like(x, dtype=weights.dtype), weights[order].unsqueeze(1)            # (N, C), (M, 1)
        tokens = order // (len(order) // len(x))                # (M,) whose copy stands at each row
        kept = len(order) if with_grad else max(sizes)          # without a backward: one expert at a time
        g, u = x.new_empty(kept, gate.size(1)), x.new_empty(kept, gate.size(1))
        for e, s in segments(sizes):
            t, own = tokens[s], s if with_grad else slice(sizes[e])
            rows = gather_rows(x, t)                            # (n, C)
            product(rows, gate[e], out=g[own])
            product(rows, up[e], out=u[own])
            add_rows(y, t, product(F.silu(g[own]).mul_(u[own]), down[e]) * w[s])
        ctx.save_for_backward(x, gate, up, down, g, u, w, order, tokens)
        ctx.sizes = sizes
        return y.clone() if torch.compiler.is_compiling() else y        # see attention.RMSNorm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, gate, up, down, g, u, w, order, tokens = ctx.saved_tensors
        dx, dw = torch.zeros_like(x), torch.empty_like(w)
        # an expert without rows gets a gradient of zeros
        d_gate, d_up, d_down = (torch.empty_like(p) if all(ctx.sizes) else torch.zeros_like(p) for p in (gate, up, down))
        for e, s in segments(ctx.sizes):
            t, silu = tokens[s], F.silu(g[s])
            rows, dy_e = gather_rows(x, t), (gather_rows(dy, t) * w[s]).to(x.dtype)
            dh = dy_e @ down[e]                                 # (n, F)
            torch.mm(dy_e.T, silu * u[s], out=d_down[e])
            d_u = silu.mul_(dh)
            d_g = torch.ops.aten.silu_backward(dh.mul_(u[s]), g[s])
            torch.mm(d_u.T, rows, out=d_up[e])
            torch.mm(d_g.T, rows, out=d_gate[e])
            d_rows = d_u @ up[e]                                # (n, C), half of it
            dw[s] = torch.where(w[s] != 0, (d_rows * rows).sum(1, keepdim=True) / w[s], 0)
            add_rows(dx, t, d_rows.addmm_(d_g, gate[e]))
        d_weights = torch.empty_like(dw[:, 0]).index_copy_(0, order, dw[:, 0])
        return dx, d_weights, d_gate, d_up, d_down, None, None, None


def segments(sizes):
    """Yield (expert, slice of the sorted rows that are its own) for every expert that has any."""
    start = 0
    for e, n in enumerate(sizes):
        if n:
            yield e, slice(start, start + n)
        start += n


def gather_rows(x, tokens):
    return x.index_select(0, tokens)                            # a third of the time of x[tokens]


def add_rows(y, tokens, rows):
    y.index_add_(0, tokens, rows)                               # a token visits an expert once: no two rows meet in y


def one_token_swiglu(x, chosen, weights, gate, up, down):
    """Decoding's path for a single token x (1, C) on a CPU: nothing to sort. chosen, weights: lists of k -> (1, C)"""
    y = torch.zeros_like(x)
    for e, weight in zip(chosen, weights):
        h = F.silu(product(x, gate[e])).mul_(product(x, up[e]))
        y.add_(product(h, down[e]), alpha=weight)
    return y


def weights_first():
    """Whether products of few rows have the weights on the left: on AMD. There MKL reads w at 7 to 10 GB/s for x w^T with
    one or two rows x, and at 30 for w x^T; on Intel it is the other way round, 27 and 12 (results/notes.md)."""
    try:
        with open('/proc/cpuinfo') as file:
            return 'AuthenticAMD' in file.read()
    except OSError:
        return False                                            # not Linux


WEIGHTS_FIRST, FEW_ROWS = weights_first(), 8


def product(x, w, out=None):
    """x w^T for x (rows, in) and w (out, in). With few rows, reading w is all that it costs."""
    if not (WEIGHTS_FIRST and len(x) <= FEW_ROWS and x.is_cpu):
        return torch.mm(x, w.T, out=out)
    columns = (x if len(x) > 1 else x.expand(2, -1)).contiguous().T         # one column would be that slow product again
    y = (w @ columns)[:, :len(x)].T
    return y if out is None else out.copy_(y)


def without_autocast(x):
    """A context in which nothing is cast. Entering torch.autocast costs as much as a small product: only if it is on."""
    return torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()
