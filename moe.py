"""The experts: a router that sends every token to top_k of n_expert SwiGLU networks, and what keeps their load even.

Papers: Shazeer et al. 2017 (arXiv 1701.06538) for the gate, Switch Transformer (Fedus et al., arXiv 2101.03961) for the
load-balancing loss, ST-MoE (Zoph et al., arXiv 2202.08906) for the router z-loss, MegaBlocks (Gale et al., arXiv
2211.15841) for dropless dispatch, DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437, section 2.1.2) for groups of experts
and for balancing without a loss.

    x -> router -> which k experts, with which weights
    y = sum over the chosen e of  weight_e  down_e( silu(gate_e x) * up_e x )

No token is dropped: a token's result depends on that token alone.
Shapes: B sequences of T tokens, C = n_embd, F = d_ff, E = n_expert, k = top_k.
python moe.py routes eight tokens, and shows what they chose and what the losses say of it.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels

LOSS_WEIGHTS = {'softmax': (0.01, 0.001), 'sigmoid': (0.0, 0.0)}    # of a layer's balance loss and z-loss, by default


class SwiGLU(nn.Module):
    """down( silu(gate x) * up x ), x (..., C) (Shazeer 2020, arXiv 2002.05202): a dense layer's network."""

    def __init__(self, C, width):
        super().__init__()
        self.gate_proj = nn.Linear(C, width, bias=False)
        self.up_proj = nn.Linear(C, width, bias=False)
        self.down_proj = nn.Linear(width, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Linear):
    """Logits in float32 also where the rest is not: small differences between them decide the routing."""

    def forward(self, x):
        with kernels.no_autocast(x):
            dtype = kernels.wide(x.dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype))


class Routing(NamedTuple):
    """What one layer tells about its routing. The losses are unweighted and carry gradient; load feeds update_bias too."""
    balance_loss: torch.Tensor      # scalar, 1 when load or probability is even
    z_loss: torch.Tensor            # scalar, nats squared: keeps logits small, where float32 and bfloat16 are finer
    load: torch.Tensor              # (E,) how many times each expert was chosen; sums to B T k
    entropy: torch.Tensor           # scalar, nats: mean entropy of a token's distribution over experts, at most ln E


class MixtureOfExperts(nn.Module):
    """x (B, T, C) -> (B, T, C), Routing. Experts are stored stacked, for grouped products, each matrix as (out, in).

    router='softmax'  scores are probabilities, softmax over all E (Mixtral, Qwen, DeepSeek-V2).
    router='sigmoid'  DeepSeek-V3, eq. 12-16: sigmoid scores; a bias per expert is added for CHOOSING only. The bias is no
                      parameter: update_bias() nudges it.
    The k experts with the largest scores are chosen. Their weights are their scores, divided by their sum if
    norm_topk_prob (for softmax that is a softmax over the k largest logits), times routed_scaling_factor. With k = 1 they
    are not divided: a constant 1 would tell the router nothing (Switch Transformer, eq. 2).
    """

    def __init__(self, config):
        super().__init__()
        C, width, E = config.n_embd, config.d_ff, config.n_expert
        self.top_k, self.sigmoid, self.scaling = config.top_k, config.router == 'sigmoid', config.routed_scaling_factor
        self.normalise = config.norm_topk_prob and config.top_k > 1
        self.n_group, self.top_k_group = config.n_expert_group, config.top_k_group
        self.router = Router(C, E, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(E, width, C))
        self.up_proj = nn.Parameter(torch.empty(E, width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))
        # always on, ungated: one network, n_shared_expert times as wide
        self.shared = SwiGLU(C, config.n_shared_expert * width) if config.n_shared_expert else None
        # the bias for choosing, by DeepSeek's name; float32 whatever the model's dtype: steps of 0.001 are lost in bfloat16
        self.register_buffer('e_score_correction_bias', torch.zeros(E) if self.sigmoid else None)

    def _apply(self, fn, recurse=True):
        """.to(), .bfloat16(), ...: the bias goes along, but stays float32 and keeps its numbers (on meta it has none)."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None:
            moved = self.e_score_correction_bias
            self.e_score_correction_bias = moved.float() if bias.is_meta else bias.to(moved.device)
        return self

    def forward(self, x, with_balance=True):
        B, T, C = x.shape
        chosen, weights, routing = self.route(x, with_balance)
        y = kernels.experts(x.view(B * T, C), chosen.flatten(0, 1), weights.flatten(0, 1),
                            self.gate_proj, self.up_proj, self.down_proj).view(B, T, C)
        return (y if self.shared is None else y + self.shared(x)), routing

    def route(self, x, with_balance=True):
        """x (B, T, C) -> chosen (B, T, k) expert ids, weights (B, T, k), Routing or (where decoding needs none) None."""
        logits = self.router(x)                                                                 # (B, T, E)
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        for_choice = scores + self.e_score_correction_bias if self.sigmoid else scores
        if self.n_group > 1:
            for_choice = self.within_best_groups(for_choice)
        chosen = for_choice.topk(self.top_k, dim=-1).indices                                    # (B, T, k)
        weights = scores.gather(-1, chosen)                                                     # never the biased ones
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        routing = self.balance(logits, scores, chosen) if with_balance else None
        return chosen, weights * self.scaling, routing

    def within_best_groups(self, scores):
        """scores (B, T, E) with -inf outside each token's top_k_group best groups of E / n_group experts side by side.

        A group is as good as its best expert (DeepSeek-V2, group-limited greedy) or, with the sigmoid router, as its best
        two together (V3). Not 0 but -inf: biased scores may be below 0.
        """
        groups = scores.unflatten(-1, (self.n_group, -1))                                       # (B, T, groups, E/groups)
        quality = groups.topk(2 if self.sigmoid else 1, dim=-1).values.sum(-1)                  # (B, T, groups)
        best = torch.zeros_like(quality).scatter(-1, quality.topk(self.top_k_group, dim=-1).indices, 1.0)
        return groups.masked_fill(best.unsqueeze(-1) == 0, -torch.inf).flatten(-2)

    def balance(self, logits, scores, chosen):
        """How evenly the experts are used -> Routing. logits, scores (B, T, E), chosen (B, T, k).

        Switch eq. 4-6 with the load counted per choice, E sum_e f_e P_e: f_e is expert e's share of the choices, P_e the
        mean of its probability (normalised over all E experts, not over the chosen k). Both are taken per sequence
        (DeepSeek-V3 eq. 17-20), so that neither the micro-batch nor the number of processes matters. The choices counted
        are those made, with the bias; V3's eq. 18 counts those without it. f counts, so it has no gradient; P has, and
        pushes probability away from the experts that are full. The loss is 1 when f or P is even, and E/k when k experts
        get everything with certainty.
        """
        (_, T, k), E = chosen.shape, logits.size(-1)
        p = scores / (scores.sum(-1, keepdim=True) + 1e-20) if self.sigmoid else scores
        counts = kernels.occurrences(chosen.flatten(1), E)                                      # (B, E)
        balance_loss = E * (counts.to(p.dtype) / (T * k) * p.mean(1)).sum(-1).mean()
        z_loss = logits.logsumexp(-1).square().mean()                                           # ST-MoE eq. 5
        entropy = -(p * p.clamp_min(1e-20).log()).sum(-1).mean()
        return Routing(balance_loss, z_loss, counts.sum(0), entropy.detach())

    @torch.no_grad()
    def update_bias(self, load, rate):
        """DeepSeek-V3's auxiliary-loss-free balancing (arXiv 2408.15664): once per optimizer update, nudge every
        overloaded expert down and every underloaded one up by `rate`. load (E,): choices over the whole global batch."""
        load = load.to(self.e_score_correction_bias.dtype)
        self.e_score_correction_bias += rate * torch.sign(load.mean() - load)


# ---------------------------------------------------------------------------------------------------------------------
# A worked example

if __name__ == '__main__':
    from model import LanguageModel, ModelConfig
    for router in ('softmax', 'sigmoid'):
        config = ModelConfig(n_embd=16, n_head=2, n_layer=1, d_ff=32, n_expert=4, top_k=2, router=router)
        moe = LanguageModel(config, seed=0).layers[0].moe
        torch.manual_seed(4)
        nn.init.normal_(moe.router.weight, std=0.5)                     # wide enough to have something to see
        x = torch.randn(1, 8, 16)
        chosen, weights, routing = moe.route(x)
        print(f'\n{router}: eight tokens, 2 of 4 experts each')
        for t in range(8):
            print(f'  token {t}: ' + ' + '.join(f'{w:.2f} x expert {e}' for w, e in zip(weights[0, t], chosen[0, t])))
        print(f'  load {routing.load.tolist()}, even would be 4; balance loss {routing.balance_loss:.3f}, z-loss '
              f'{routing.z_loss:.3f}, entropy {routing.entropy:.3f} of at most 1.386')
        if router == 'sigmoid':
            moe.update_bias(routing.load, 0.001)
            print(f'  the bias for choosing after one update: ' + ', '.join(
                f'{b:+.3f}' for b in moe.e_score_correction_bias.tolist()))
