"""muon.py: the orthogonalised update against a singular value decomposition; clipping against torch's own."""
import math

import pytest
import torch

from muon import Muon, clip_gradients, orthogonalise


@pytest.mark.parametrize('shape', [(24, 24), (48, 16), (16, 48), (3, 20, 12)])
def test_the_update_has_the_singular_vectors_of_the_momentum_and_singular_values_near_1(shape):
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ orthogonalise(g, steps=8) @ vt.mT                  # diagonal, if the singular vectors are kept
    values = torch.diagonal(inside, dim1=-2, dim2=-1)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-8
    assert 0.6 < values.min() and values.max() < 1.3


def test_a_stack_of_experts_is_updated_as_if_each_were_a_parameter_of_its_own():
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(4, 12, 20, dtype=torch.float64))
    single = [torch.nn.Parameter(w.detach().clone()) for w in stacked]
    whole, parts = Muon([stacked], lr=0.1), Muon(single, lr=0.1)
    for _ in range(3):
        stacked.grad = torch.randn_like(stacked)
        for p, g in zip(single, stacked.grad):
            p.grad = g.clone()
        whole.step()
        parts.step()
    assert torch.allclose(stacked, torch.stack([*single]), atol=1e-12)


def test_one_step_is_weight_decay_and_an_update_of_adamws_size():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 256, dtype=torch.float64))
    before, p.grad = p.detach().clone(), torch.randn(64, 256, dtype=torch.float64)
    Muon([p], lr=0.01, weight_decay=0.5).step()
    update = (before * (1 - 0.01 * 0.5) - p.detach()) / 0.01
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.15)      # Moonlight's aim, about AdamW's
    assert (update * p.grad).sum() > 0


def test_a_parameter_without_a_gradient_stays_as_it_is():
    moving, frozen = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    moving.grad = torch.eye(2)
    Muon([moving, frozen], lr=0.1).step()
    assert torch.equal(frozen, torch.ones(2, 2)) and not torch.equal(moving, frozen)


def test_momentum_is_nesterovs():
    p = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    first, second = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [1.0, 0.0]]], dtype=torch.float64)
    opt = Muon([p], lr=1.0, momentum=0.9, weight_decay=0.0)
    p.grad = first
    opt.step()
    at = p.detach().clone()
    p.grad = second
    opt.step()
    m = 0.9 * (0.1 * first) + 0.1 * second
    expected = orthogonalise(0.1 * second + 0.9 * m) * 0.2 * 2 ** 0.5
    assert torch.allclose(at - p.detach(), expected, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping

def parameters_with_gradients(scale=1.0):
    g = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((5,), (2, 3, 4), (), (3,))]
    for p in parameters[:-1]:                                           # the last one is frozen
        p.grad = scale * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return parameters


@pytest.mark.parametrize('largest', [0.01, 1.0, 3.0, 100.0, math.inf])
def test_gradients_are_clipped_as_torch_clips_them(largest):
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    total = clip_gradients((p for p in ours), largest)                  # a generator, as module.parameters() is one
    assert total.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, largest).item(), rel=1e-12)
    for p, q in zip(ours[:-1], theirs[:-1]):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=0)
    assert ours[-1].grad is None


def test_what_is_not_clipped_is_not_written_either():
    parameters = parameters_with_gradients()
    versions = [p.grad._version for p in parameters[:-1]]
    clip_gradients(parameters, 100.0)
    assert [p.grad._version for p in parameters[:-1]] == versions
    clip_gradients(parameters, 0.1)
    assert [p.grad._version for p in parameters[:-1]] != versions


def test_gradients_that_are_shards_are_left_to_torch(monkeypatch):
    class Shard(torch.Tensor):
        pass
    p, given = torch.nn.Parameter(torch.zeros(3)), []
    p.grad = torch.ones(3).as_subclass(Shard)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda parameters, largest: given.append((list(parameters), largest)))
    clip_gradients((p for p in [p]), 0.5)
    assert given == [([p], 0.5)]


def test_a_nan_among_the_gradients_reaches_all_of_them():
    parameters = parameters_with_gradients()
    parameters[0].grad[0] = math.nan
    assert math.isnan(clip_gradients(parameters, math.inf)) and all(p.grad.isnan().all() for p in parameters[:-1])
    assert clip_gradients([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0                   # nothing has a gradient
