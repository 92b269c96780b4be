"""The optimizers: AdamW, and Muon: momentum, orthogonalised, for the matrices of the network (Jordan et al. 2024,
kellerjordan.github.io/posts/muon); and the clipping of gradients before their step.

The update of a matrix is U V^T of its momentum's singular value decomposition U S V^T: every direction moves equally far.
torch.optim.Muon exists, but takes two-dimensional parameters only; the experts here are stacked (E, rows, cols), and each
of them is a matrix of its own.
"""
import torch

import kernels


def orthogonalise(g, steps=5):
    """About U V^T for each matrix of g (..., rows, cols), by Newton-Schulz iteration: all singular values near 1.

    The quintic's coefficients are Muon's: steep at 0, so that 5 steps suffice; they leave singular values within about
    0.7 to 1.2 (of a square matrix a few of the smallest lower), which serves as well as exactly 1. In bfloat16 on a GPU, in
    float32 on a CPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x                                             # the smaller Gram matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)                 # spectral norm at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, decoupled weight decay. For parameters of two dims, or stacks of such.

    Updates are scaled by 0.2 sqrt(max(rows, cols)), which gives their entries the root mean square that AdamW's have
    (Moonlight, arXiv 2502.16982, eq. 4), so that AdamW's learning rate is where to start.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):                           # torch's loader of optimizer states passes None
        for group in self.param_groups:
            lr, momentum = group['lr'], group['momentum']
            for p in group['params']:
                if p.grad is None:                          # frozen
                    continue
                if 'momentum_buffer' not in self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                m = self.state[p]['momentum_buffer']
                m.lerp_(p.grad, 1 - momentum)
                update = orthogonalise(p.grad.lerp(m, momentum))
                p.mul_(1 - lr * group['weight_decay'])
                p.add_(update, alpha=-lr * 0.2 * max(p.shape[-2:]) ** 0.5)


def clip_gradients(parameters, largest):
    """Scale all gradients by one factor so that their norm together is at most `largest` (Pascanu et al. 2013, arXiv
    1211.5063) -> the norm as it was. torch's clip_grad_norm_, but on a CPU nothing is written if nothing is clipped."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or any(type(g) is not torch.Tensor or not g.is_cpu for g in gradients):    # shards; a GPU would wait
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    total = kernels.norm(torch.stack([kernels.norm(g) for g in gradients]))
    if not total <= largest:                                            # NaN too: it spreads, as there
        for g in gradients:
            g.mul_(largest / (total + 1e-6))
    return total


def configure_optimizers(model, learning_rate, weight_decay=0.1, betas=(0.9, 0.95), muon=False):
    """-> [AdamW], or [AdamW, Muon]. Each parameter has exactly one owner and decays only if it is a matrix.

    With muon=True the matrices inside the blocks go to Muon, each expert being a matrix of its own; embedding, head, router,
    norms and biases stay with AdamW. Fused AdamW: one pass over parameters, gradients and moments.
    """
    named = list(model.named_parameters())
    of_muon = {n for n, p in named if muon and p.ndim >= 2 and not n.startswith(('embed', 'lm_head')) and '.router.' not in n}
    matrices = [p for n, p in named if p.ndim >= 2 and n not in of_muon]
    vectors = [p for n, p in named if p.ndim < 2]                       # norm gains and biases
    groups = [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors, 'weight_decay': 0.0}]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    kernels.make_moments(adamw)
    if not muon:
        return [adamw]
    return [adamw, Muon([p for n, p in named if n in of_muon], lr=learning_rate, weight_decay=weight_decay)]
