"""What the tests of the network share: numbers from a seed, closeness, weights that all show, a record of what ran."""
import forked
import torch
from torch.utils._python_dispatch import TorchDispatchMode

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def numbers(*shape, dtype=F64, seed=1, std=1.0):
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)).to(dtype)


def token_ids(*shape, vocab=31, seed=1):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance):
    """Within `tolerance` of the largest number, which must be no zero."""
    a, b = (t.detach().cpu().to(F64) if isinstance(t, torch.Tensor) else torch.as_tensor(t, dtype=F64) for t in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all() and torch.isfinite(b).all() and b.abs().max() > 0
    assert (a - b).abs().max() <= tolerance * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


def randomise(module, seed=0):
    """Every matrix, gain and bias so large that each part shows in the output: what starts as 0 or 1 hides errors. The
    same numbers in every dtype."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            p.copy_(torch.empty(p.shape).uniform_(0.5, 1.5, generator=g) if 'norm' in name else
                    torch.empty(p.shape).normal_(0.0, 0.3, generator=g))
    return module


def gradients(out, wrt):
    """Of a fixed random functional of `out` by each of `wrt`; zeros where none flows."""
    upstream = numbers(*(out.shape or [1]), seed=9).view(out.shape).to(out)
    grads = torch.autograd.grad((out * upstream).sum(), wrt, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wrt, grads)]


class Record(TorchDispatchMode):
    """Every tensor that an operation made: (name of the operation, shape, dtype)."""

    def __enter__(self):
        self.made = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [(str(func), tuple(t.shape), t.dtype) for t in (out if isinstance(out, (tuple, list)) else [out])
                      if isinstance(t, torch.Tensor)]
        return out

    def largest(self):
        return max(torch.Size(shape).numel() for _, shape, _ in self.made)


def printed_by(*arguments):
    """What `python arguments` says on stdout; it must end well within a minute."""
    done = forked.run(*arguments, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
