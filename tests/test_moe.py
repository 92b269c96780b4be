"""moe.py against plain loops: one token, one choice, one expert at a time, in float64.

Held to the equations that moe.py names: Switch (arXiv 2101.03961, eq. 2, 4-6), ST-MoE (arXiv 2202.08906, eq. 5),
DeepSeek-V3 (arXiv 2412.19437, eq. 12-20), and to what dropless experts promise: a token's result depends on that token
alone. Both ways of multiplying, hand-written segments and F.grouped_mm, give the loop's numbers and gradients, experts
without tokens included.
"""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moe
from moe import FromExperts, MixtureOfExperts, SegmentedSwiGLU, ToExperts, swiglu_experts

F64 = torch.float64
ROUTERS = ('softmax', 'sigmoid')
both_routers = pytest.mark.parametrize('router', ROUTERS)


def numbers(*shape, dtype=F64, seed=1, std=1.0):
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)).to(dtype)


def experts(router='softmax', dtype=F64, seed=0, C=8, **knobs):
    """A layer with random weights; the selection bias is large enough to change choices."""
    sizes = dict(n_embd=C, d_ff=12, n_expert=6, top_k=2, n_shared_expert=0, routed_scaling_factor=1.0)
    layer = MixtureOfExperts(SimpleNamespace(**{**sizes, **knobs}, router=router)).to(F64)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0.0, 0.5, generator=g)
        if router == 'sigmoid':
            layer.e_score_correction_bias.normal_(0.0, 0.3, generator=g)
    return layer.to(dtype)


def close(a, b, tolerance):
    """Within `tolerance` of the largest number, which must be no zero."""
    a, b = (torch.as_tensor(t, dtype=F64).detach().cpu() for t in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all() and torch.isfinite(b).all() and b.abs().max() > 0
    assert (a - b).abs().max() <= tolerance * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


def network(x, gate, up, down):
    """One SwiGLU on one token, out of sums and exponentials."""
    g, u = gate @ x, up @ x
    return down @ (g / (1 + torch.exp(-g)) * u)


def reference_choice(layer, z):
    """Logits z (E,) of one token -> the expert ids chosen, best first, and what each one's output is multiplied by."""
    z = z.tolist()
    if layer.kind == 'softmax':
        scores = [math.exp(v) / sum(math.exp(w) for w in z) for v in z]
        rank = scores
    else:
        scores = [1 / (1 + math.exp(-v)) for v in z]
        rank = [s + b for s, b in zip(scores, layer.e_score_correction_bias.tolist())]
    chosen = sorted(range(len(z)), key=lambda e: -rank[e])[:layer.top_k]
    total = sum(scores[e] for e in chosen) if layer.top_k > 1 else 1.0
    return chosen, [scores[e] / total * layer.scaling for e in chosen]


def reference_experts(layer, x):
    """x (B, T, C) float64 -> (B, T, C), differentiable, with the weights recomputed from the scores by autograd."""
    rows = []
    for token in x.flatten(0, 1):
        z = layer.router.weight @ token
        chosen, _ = reference_choice(layer, z.detach())
        scores = torch.exp(z) / torch.exp(z).sum() if layer.kind == 'softmax' else 1 / (1 + torch.exp(-z))
        total = sum(scores[e] for e in chosen) if layer.top_k > 1 else 1.0
        stacks = layer.gate_proj, layer.up_proj, layer.down_proj
        y = sum(scores[e] / total * layer.scaling * network(token, *(stack[e] for stack in stacks)) for e in chosen)
        if hasattr(layer, 'shared_gate_proj'):
            shared = layer.shared_gate_proj, layer.shared_up_proj, layer.shared_down_proj
            y = y + network(token, *(linear.weight for linear in shared))
        rows.append(y)
    return torch.stack(rows).view(x.shape)


def gradients(out, x, layer):
    """Of a fixed random functional of `out`, by input and by every parameter; zeros where none flows."""
    wrt = [x, *layer.parameters()]
    grads = torch.autograd.grad((out * numbers(*out.shape, dtype=out.dtype, seed=9)).sum(), wrt, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wrt, grads)]


@pytest.fixture(params=['segments', 'grouped'])
def path(request, monkeypatch):
    """Both ways of multiplying, told whether they serve. The second is chosen on a GPU, in torch.compile and for few tokens."""
    monkeypatch.setattr(moe, 'grouped_serves', lambda x, gate: request.param == 'grouped')
    return request.param


def only_path(path, monkeypatch):
    """Fail where the other way is taken."""
    def forbidden(*args, **kwargs):
        raise AssertionError(f'took the other way than {path}')
    if path == 'grouped':
        monkeypatch.setattr(SegmentedSwiGLU, 'apply', forbidden)
    else:
        monkeypatch.setattr(F, 'grouped_mm', forbidden)


KNOBS = [dict(), dict(top_k=1), dict(top_k=6), dict(top_k=3, routed_scaling_factor=2.5), dict(n_shared_expert=2),
         dict(n_shared_expert=1, routed_scaling_factor=1.7), dict(n_expert=1, top_k=1), dict(n_expert=16, top_k=4)]


# ---------------------------------------------------------------------------------------------------------------------
# Forward and gradients

@both_routers
@pytest.mark.parametrize('knobs', KNOBS, ids=str)
@pytest.mark.parametrize('shape', [(2, 5), (1, 1), (1, 7)], ids=str)
def test_a_layer_is_its_tokens_one_by_one_forward_and_in_all_gradients(router, knobs, shape):
    layer, x = experts(router, **knobs), numbers(*shape, 8).requires_grad_()
    expected = reference_experts(layer, x)
    by_loop = gradients(expected, x, layer)
    for training in (True, False):
        out, _ = layer.train(training)(x)
        close(out, expected, 1e-12)
        for ours, theirs in zip(gradients(out, x, layer), by_loop):
            if theirs.abs().max() > 1e-12:
                close(ours, theirs, 1e-11)
            else:                                           # the router of a single expert has nothing to decide
                assert ours.abs().max() < 1e-12


@both_routers
@pytest.mark.parametrize('knobs', KNOBS, ids=str)
def test_both_ways_of_multiplying_give_the_loop_in_float32(router, knobs, path, monkeypatch):
    only_path(path, monkeypatch)
    layer, x = experts(router, **knobs), numbers(2, 9, 8).requires_grad_()
    expected = reference_experts(layer, x)
    by_loop = gradients(expected, x, layer)
    narrow, y = layer.float(), x.detach().float().requires_grad_()
    out, routing = narrow(y)
    close(out, expected, 1e-5)
    for ours, theirs in zip(gradients(out, y, narrow), by_loop):
        if theirs.abs().max() > 1e-12:
            close(ours, theirs, 2e-5)
        else:
            assert ours.abs().max() < 1e-5
    assert routing.load.sum() == 18 * layer.top_k


LOADS = [[3, 0, 5, 1, 0], [9, 0, 0, 0, 0], [0, 0, 0, 0, 9], [0, 1, 0, 0, 0], [2, 2, 2, 2, 1]]


@pytest.mark.parametrize('load', LOADS, ids=str)
@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-13), (torch.float32, 1e-5)], ids=str)
def test_experts_with_no_row_one_row_or_all_rows_give_the_loop(load, dtype, tolerance, path, monkeypatch):
    if dtype == F64 and path == 'grouped':
        pytest.skip('F.grouped_mm takes no float64')
    only_path(path, monkeypatch)
    tensors = [numbers(sum(load), 8), numbers(sum(load), seed=6), numbers(5, 12, 8, seed=2), numbers(5, 12, 8, seed=3),
               numbers(5, 8, 12, seed=4)]
    wide = [t.clone().requires_grad_() for t in tensors]
    owner = torch.tensor([e for e, n in enumerate(load) for _ in range(n)])
    owner = owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(8))]       # tokens come in no order
    expected = torch.stack([weight * network(row, *(w[e] for w in wide[2:])) for row, weight, e in zip(*wide[:2], owner)])
    upstream = numbers(*expected.shape, seed=5)
    theirs = torch.autograd.grad(expected, wide, upstream)
    narrow = [t.to(dtype).requires_grad_() for t in tensors]
    out = swiglu_experts(*narrow, owner.argsort(stable=True), torch.tensor(load))
    close(out, expected, tolerance)
    with torch.no_grad():                                   # nothing is kept then
        assert torch.equal(swiglu_experts(*narrow, owner.argsort(stable=True), torch.tensor(load)), out)
    ours = torch.autograd.grad(out, narrow, upstream.to(dtype))
    for one, other in zip(ours, theirs):
        close(one, other, 2 * tolerance)
    for weights in ours[2:]:
        for e, n in enumerate(load):
            assert weights[e].any() == (n > 0)              # exactly zero for an expert without rows


def test_grouped_products_are_asked_only_for_what_they_take(monkeypatch):
    """On a GPU and in torch.compile, where it knows bfloat16 alone; no float64, strides of multiples of 16 bytes."""
    class Tokens(SimpleNamespace):
        __len__ = lambda self: self.count

    def serves(dtype, C=8, width=8, cuda=False, count=33):
        x = Tokens(dtype=dtype, element_size=lambda: dtype.itemsize, is_cuda=cuda, count=count)
        return moe.grouped_serves(x, torch.empty(2, width, C, device='meta'))
    bf16, f32 = torch.bfloat16, torch.float32
    assert not serves(bf16) and not serves(f32)             # eager on a CPU: the segments are faster
    with torch.no_grad():                                   # but for few tokens, though not on AMD
        for amd in (False, True):
            monkeypatch.setattr(moe, 'WEIGHTS_FIRST', amd)
            assert serves(f32, count=32) != amd and not serves(f32) and not serves(bf16, count=8) and not serves(F64, count=8)
    assert not serves(f32, count=8)                         # with gradients
    assert serves(bf16, cuda=True) and serves(f32, cuda=True) and serves(f32, 4, 12, cuda=True)
    assert not serves(F64, cuda=True)
    assert not serves(f32, 6, 8, cuda=True) and not serves(f32, 8, 6, cuda=True) and not serves(bf16, 12, 8, cuda=True)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    assert serves(bf16) and serves(bf16, cuda=True) and not serves(f32) and not serves(f32, cuda=True)


@pytest.mark.parametrize('sizes', [[2, 0, 3], [0, 0, 4], [1, 1, 1]], ids=str)
def test_hand_written_experts_pass_gradcheck(sizes):
    tensors = [numbers(sum(sizes), 3), numbers(sum(sizes), seed=5), numbers(3, 4, 3, seed=2), numbers(3, 4, 3, seed=3),
               numbers(3, 3, 4, seed=4)]
    tensors, order = [t.requires_grad_() for t in tensors], torch.arange(sum(sizes)).flip(0)
    assert torch.autograd.gradcheck(lambda *t: SegmentedSwiGLU.apply(*t, order, sizes, True), tensors, atol=1e-9)


@pytest.mark.parametrize('k', [1, 2])
def test_handing_out_copies_and_adding_them_up_are_indexing_and_pass_gradcheck_to_the_second_order(k):
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    inverse, x, rows = order.argsort(), numbers(6 // k, 3).requires_grad_(), numbers(6, 3, seed=2).requires_grad_()
    assert torch.equal(ToExperts.apply(x, order, inverse), torch.stack([x[m // k] for m in order.tolist()]))
    summed = torch.zeros(6 // k, 3, dtype=F64).index_add(0, order // k, rows)
    close(FromExperts.apply(rows, order, inverse, k), summed, 1e-15)
    for function, t in ((lambda t: ToExperts.apply(t, order, inverse) ** 2, x),
                        (lambda t: FromExperts.apply(t, order, inverse, k) ** 2, rows)):
        assert torch.autograd.gradcheck(function, (t,)) and torch.autograd.gradgradcheck(function, (t,))


@both_routers
@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_the_layer_passes_gradcheck_with_both_losses(router, top_k):
    layer, x = experts(router, C=4, d_ff=3, n_expert=4, top_k=top_k, n_shared_expert=1), numbers(1, 3, 4, std=2.0)
    scores = layer.router(x) if router == 'softmax' else layer.router(x).sigmoid() + layer.e_score_correction_bias
    ranked = scores.sort(-1).values
    assert ranked.diff(dim=-1).min() > 1e-3                 # away from ties, where choices jump
    names, weights = zip(*layer.named_parameters())

    def function(x, *tensors):
        y, routing = torch.func.functional_call(layer, dict(zip(names, tensors)), (x,))
        return y, routing.balance_loss, routing.z_loss
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *weights), atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The router

@both_routers
@pytest.mark.parametrize('knobs', KNOBS, ids=str)
def test_choices_weights_and_counts_are_those_of_a_loop_over_tokens(router, knobs):
    layer, x = experts(router, **knobs), numbers(3, 6, 8)
    chosen, weights, routing = layer.route(x)
    counts = [0] * layer.router.out_features
    for b, t in itertools.product(range(3), range(6)):
        ids, expected = reference_choice(layer, layer.router.weight @ x[b, t])
        assert chosen[b, t].tolist() == ids
        close(weights[b, t], expected, 1e-13)
        for e in ids:
            counts[e] += 1
    assert routing.load.tolist() == counts == torch.bincount(chosen.flatten(), minlength=len(counts)).tolist()
    assert routing.load.sum() == 3 * 6 * layer.top_k        # nothing is dropped
    if layer.top_k > 1:
        close(weights.sum(-1), torch.full((3, 6), layer.scaling, dtype=F64), 1e-13)


def test_entropy_is_that_of_each_tokens_distribution():
    layer = router_of(4, 1)
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.5, 0.5, 1e-9, 1e-9]], dtype=F64)
    expected = [math.log(4), -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)), math.log(2)]
    assert layer.route(p.log()[None])[2].entropy.item() == pytest.approx(sum(expected) / 3, abs=1e-7)
    assert not layer.route(p.log()[None])[2].entropy.requires_grad


def test_softmax_then_top_k_then_renormalised_is_top_k_then_softmax():
    layer, x = experts('softmax', n_expert=16, top_k=4), numbers(4, 9, 8)
    top = layer.router(x).topk(4, dim=-1)
    chosen, weights, _ = layer.route(x)
    assert torch.equal(chosen, top.indices)
    close(weights, top.values.softmax(-1), 1e-13)


def test_the_selection_bias_chooses_and_never_weighs():
    layer, x = experts('sigmoid', n_expert=8, top_k=3), numbers(2, 20, 8)
    chosen, weights, _ = layer.route(x)
    layer.e_score_correction_bias += 0.4                    # the same for all
    again = layer.route(x)
    assert torch.equal(again[0], chosen) and torch.equal(again[1], weights)
    layer.e_score_correction_bias[5] += 10.0
    chosen, weights, routing = layer.route(x)
    assert (chosen == 5).any(-1).all() and routing.load[5] == 40
    scores = layer.router(x).sigmoid().gather(-1, chosen)
    close(weights, scores / scores.sum(-1, keepdim=True), 1e-13)
    layer.e_score_correction_bias.fill_(-1.0)               # all sums negative: still the largest scores
    assert torch.equal(layer.route(x)[0], layer.router(x).topk(3, dim=-1).indices)


@both_routers
def test_with_one_choice_the_weight_is_the_probability_itself_so_that_the_router_learns(router):
    """Renormalised over one it would be a constant 1, whose gradient is 0 (Switch, eq. 2)."""
    layer, x = experts(router, top_k=1), numbers(2, 7, 8)
    chosen, weights, _ = layer.route(x)
    z = layer.router(x)
    p = z.softmax(-1) if router == 'softmax' else z.sigmoid()
    close(weights, p.gather(-1, chosen), 1e-13)
    assert weights.std() > 1e-3 and weights.max() < 1
    (layer(x)[0] * numbers(2, 7, 8, seed=3)).sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-3 and not (layer.router.weight.grad == 0).all(1).all()


@both_routers
def test_routing_is_float32_under_autocast_and_chooses_as_the_float32_model(router):
    layer, x = experts(router, torch.float32, n_expert=16, top_k=4), numbers(4, 64, 8, dtype=torch.float32)
    chosen, weights, _ = layer.route(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        again = layer.route(x)
        y, _ = layer(x)
        assert layer.router(x).dtype == torch.bfloat16      # which is what route() must not do
    assert torch.equal(again[0], chosen) and torch.equal(again[1], weights)
    assert again[1].dtype == again[2].z_loss.dtype == again[2].balance_loss.dtype == torch.float32
    full = layer(x)[0].detach()
    assert y.dtype == torch.float32
    assert 1e-4 < (y - full).abs().max() / full.abs().max() < 3e-2          # the products did run in bfloat16


def test_the_selection_bias_stays_float32_in_a_bfloat16_model():
    layer = experts('sigmoid', torch.float32)
    bias = layer.e_score_correction_bias.clone()
    for cast in (layer.bfloat16(), layer.half(), layer.to(torch.bfloat16), layer.to('cpu', torch.bfloat16)):
        assert cast.e_score_correction_bias.dtype == torch.float32 and torch.equal(cast.e_score_correction_bias, bias)
    assert layer.router.weight.dtype == torch.bfloat16
    layer.update_bias(torch.tensor([9, 0, 0, 0, 0, 0]), 0.001)
    assert not torch.equal(layer.e_score_correction_bias, bias)             # 0.001 beside 0.3: lost in bfloat16
    y, routing = layer(numbers(1, 5, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all() and routing.z_loss.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# What must hold of any experts

@both_routers
def test_all_experts_chosen_is_the_dense_mixture_of_all(router):
    layer, x = experts(router, top_k=6), numbers(2, 5, 8)
    z = layer.router(x)
    p = z.softmax(-1) if router == 'softmax' else z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
    hidden = F.silu(torch.einsum('btc,efc->btef', x, layer.gate_proj)) * torch.einsum('btc,efc->btef', x, layer.up_proj)
    close(layer(x)[0], torch.einsum('bte,btef,ecf->btc', p, hidden, layer.down_proj), 1e-12)


def test_one_expert_is_a_dense_network_of_that_width():
    layer, x = experts(n_expert=1, top_k=1), numbers(2, 5, 8)
    dense = (F.silu(x @ layer.gate_proj[0].T) * (x @ layer.up_proj[0].T)) @ layer.down_proj[0].T
    close(layer(x)[0], dense, 1e-13)


@both_routers
def test_equal_experts_give_that_network_times_the_scaling_whatever_the_routing(router):
    layer, x = experts(router, top_k=3, routed_scaling_factor=2.5), numbers(2, 5, 8)
    with torch.no_grad():
        for stack in (layer.gate_proj, layer.up_proj, layer.down_proj):
            stack.copy_(stack[0].clone().expand_as(stack))
    dense = (F.silu(x @ layer.gate_proj[0].T) * (x @ layer.up_proj[0].T)) @ layer.down_proj[0].T
    close(layer(x)[0], 2.5 * dense, 1e-13)


@both_routers
def test_renumbering_the_experts_changes_nothing(router):
    layer, x = experts(router), numbers(2, 9, 8)
    before, routing = layer(x)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    with torch.no_grad():
        for stack in (layer.router.weight, layer.gate_proj, layer.up_proj, layer.down_proj):
            stack.copy_(stack[order].clone())
    if router == 'sigmoid':
        layer.e_score_correction_bias.copy_(layer.e_score_correction_bias[order].clone())
    after, again = layer(x)
    close(after, before, 1e-13)
    assert torch.equal(again.load, routing.load[order])
    for field in ('balance_loss', 'z_loss', 'entropy'):
        close(getattr(again, field), getattr(routing, field), 1e-13)


@both_routers
def test_a_tokens_result_is_the_same_alone_in_any_company_and_in_any_order(router):
    layer, x = experts(router, n_shared_expert=1), numbers(4, 9, 8)
    for training in (True, False):
        y, _ = layer.train(training)(x)
        for b, t in itertools.product(range(4), range(9)):
            close(layer(x[b:b + 1, t:t + 1])[0], y[b:b + 1, t:t + 1], 1e-13)
        order = torch.tensor([2, 0, 3, 1])
        close(layer(x[order])[0], y[order], 1e-13)
        crowd = torch.cat((x, x[:1, :1].expand(4, 200, 8)), 1)  # 800 copies of one token: no capacity to run out of
        close(layer(crowd)[0][:, :9], y, 1e-13)
        assert torch.equal(layer(x)[0], y)                                  # and the same bits every time


@both_routers
def test_shared_experts_are_added_and_not_scaled(router):
    with_shared, x = experts(router, n_shared_expert=2, routed_scaling_factor=2.5), numbers(2, 5, 8)
    routed = experts(router, routed_scaling_factor=2.5)
    routed.load_state_dict({k: v for k, v in with_shared.state_dict().items() if 'shared' not in k})
    gate, up, down = (getattr(with_shared, f'shared_{part}_proj').weight for part in ('gate', 'up', 'down'))
    assert gate.shape == up.shape == (24, 8) and down.shape == (8, 24)      # one network, twice as wide
    close(with_shared(x)[0] - routed(x)[0], (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The losses

def router_of(E, top_k, router='softmax'):
    """A layer whose logits are its input: x (B, T, E)."""
    layer = experts(router, C=E, n_expert=E, top_k=top_k)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E, dtype=F64))
    return layer


def balance_of(p, top_k, router='softmax'):
    return router_of(p.size(-1), top_k, router).route(p.clamp_min(1e-300).log())[2].balance_loss.item()


def test_the_balance_loss_has_the_values_worked_out_by_hand():
    even = torch.full((2, 8, 4), 0.25, dtype=F64)
    assert balance_of(even, 1) == pytest.approx(1.0, abs=1e-14)             # uniform P, whatever the ties chose
    assert balance_of(even, 2) == pytest.approx(1.0, abs=1e-14)
    # 1 is no lower bound: f = (1/2, 1/2, 0), P = (.2505, .2505, .499)
    below = torch.tensor([[[0.501, 0.0, 0.499], [0.0, 0.501, 0.499]]], dtype=F64)
    assert balance_of(below, 1) == pytest.approx(0.7515, abs=1e-12)
    for k in (1, 2, 4):                                                     # k of 8 experts get everything: E / k
        p = torch.zeros(1, 5, 8, dtype=F64)
        p[..., 2:2 + k] = 1 / k
        assert balance_of(p, k) == pytest.approx(8 / k, rel=1e-13)
    turn_about = torch.eye(4, dtype=F64)[None]                              # every expert once: even load
    assert balance_of(turn_about, 1) == pytest.approx(1.0, abs=1e-13)


def test_the_balance_loss_is_taken_per_sequence_and_averaged():
    """Two collapsed sequences stay collapsed beside each other. Pooled, this batch would look even: 1."""
    p = torch.zeros(2, 6, 2, dtype=F64)
    p[0, :, 0] = p[1, :, 1] = 1.0
    assert balance_of(p, 1) == pytest.approx(2.0, rel=1e-13)
    x = numbers(6, 5, 8)
    for router in ROUTERS:
        layer = experts(router)
        each = [layer.route(x[i:i + 1])[2].balance_loss.item() for i in range(6)]
        assert layer.route(x)[2].balance_loss.item() == pytest.approx(sum(each) / 6, rel=1e-13)
        halves = [layer.route(half)[2].balance_loss.item() for half in x.split(3)]
        # nor do micro-batches matter
        assert layer.route(x)[2].balance_loss.item() == pytest.approx(sum(halves) / 2, rel=1e-13)


@both_routers
@pytest.mark.parametrize('top_k', [1, 2, 3])
def test_the_balance_loss_and_its_gradient_are_the_closed_form(router, top_k):
    """Load has no gradient: dL/dz_j = E / (B T) p_j (f_j - sum_e f_e p_e), times 1 - s_j where p = s / sum s."""
    layer, x, B, T, E = experts(router, top_k=top_k), numbers(3, 7, 8), 3, 7, 6
    chosen, _, routing = layer.route(x)
    z = layer.router(x).detach().numpy()
    s = 1 / (1 + np.exp(-z))
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True) if router == 'softmax' else s / s.sum(-1, keepdims=True)
    loss, d_z = 0.0, np.zeros_like(z)
    for b in range(B):
        f = np.array([(chosen[b] == e).sum().item() for e in range(E)]) / (T * top_k)
        loss += E * sum(f[e] * p[b, :, e].mean() for e in range(E)) / B
        for t, j in itertools.product(range(T), range(E)):
            d_z[b, t, j] = E / (B * T) * p[b, t, j] * (f[j] - f @ p[b, t])
            if router == 'sigmoid':
                d_z[b, t, j] *= 1 - s[b, t, j]
    assert routing.balance_loss.item() == pytest.approx(loss, rel=1e-13)
    routing.balance_loss.backward()
    close(layer.router.weight.grad, np.einsum('bte,btc->ec', d_z, x.numpy()), 1e-12)
    assert all(p.grad is None for name, p in layer.named_parameters() if 'router' not in name)


def test_the_z_loss_is_the_mean_squared_logarithm_of_the_partition():
    layer, zeros = router_of(8, 2), torch.zeros(2, 3, 8, dtype=F64)
    assert layer.route(zeros)[2].z_loss.item() == pytest.approx(math.log(8) ** 2, rel=1e-14)
    z = numbers(2, 3, 8)
    lse = np.log(np.exp(z.numpy()).sum(-1))
    assert layer.route(z)[2].z_loss.item() == pytest.approx((lse ** 2).mean(), rel=1e-13)
    for c in (3.0, -0.5):                                                   # not shift-invariant, by design
        moved = layer.route(z + c)[2].z_loss.item() - layer.route(z)[2].z_loss.item()
        assert moved == pytest.approx((2 * c * lse + c * c).mean(), rel=1e-11)
    for dtype in (F64, torch.float32):
        x = (1000.0 * z.sign()).to(dtype).requires_grad_()
        routing = layer.to(dtype).route(x)[2]
        (routing.z_loss + routing.balance_loss).backward()
        assert routing.z_loss.item() == pytest.approx(1e6, rel=1e-2) and torch.isfinite(x.grad).all()


@both_routers
def test_losses_and_load_tell_the_same_in_training_and_evaluation(router):
    layer, x = experts(router), numbers(3, 7, 8)
    for one, other in zip(layer.train().route(x)[2], layer.eval().route(x)[2]):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# Balancing without a loss

def violation(load):
    """MaxVio: how far the busiest expert is above even load (arXiv 2408.15664)."""
    return (load.max() / load.double().mean() - 1).item()


def skewed_scores(T=512, E=8):
    return numbers(1, T, E) + numbers(E, seed=2)


def test_the_selection_bias_evens_out_a_skewed_load_within_range_over_rate_updates():
    layer, z, rate = router_of(8, 2, 'sigmoid'), skewed_scores(), 0.005
    layer.e_score_correction_bias.zero_()
    plain_vio = violation(layer.route(z)[2].load)
    assert plain_vio > 0.5
    centred, before = torch.zeros(8, dtype=torch.float32), z.sigmoid()
    for step in range(200):                                                 # scores lie within 1: 1 / rate
        chosen, _, routing = layer.route(z)
        # Moonlight's centred form chooses the same
        assert torch.equal(chosen, (before + centred).topk(2, dim=-1).indices)
        sign = torch.sign(routing.load.float().mean() - routing.load)
        centred += rate * (sign - sign.mean())
        layer.update_bias(routing.load, rate)
    assert violation(layer.route(z)[2].load) < 0.15
    wrong = router_of(8, 2, 'sigmoid')
    wrong.e_score_correction_bias.zero_()
    for step in range(200):
        wrong.update_bias(wrong.route(z)[2].load, -rate)
    load = wrong.route(z)[2].load                                           # the rich get everything
    assert violation(load) > plain_vio and (load == 0).sum() >= 3


def test_one_update_nudges_overloaded_experts_down_underloaded_up_and_even_ones_not_at_all():
    layer = router_of(4, 1, 'sigmoid')
    layer.e_score_correction_bias.zero_()
    layer.update_bias(torch.tensor([5, 5, 5, 5]), 0.1)
    assert not layer.e_score_correction_bias.any()
    layer.update_bias(torch.tensor([9, 5, 5, 1]), 0.1)
    close(layer.e_score_correction_bias, [-0.1, 0.0, 0.0, 0.1], 1e-6)
    for _ in range(3):
        layer(numbers(1, 5, 4))  # forwards alone, in training too, change nothing
    close(layer.e_score_correction_bias, [-0.1, 0.0, 0.0, 0.1], 1e-6)


def test_the_selection_bias_is_saved_and_is_no_parameter():
    layer = experts('sigmoid')
    assert 'e_score_correction_bias' in layer.state_dict()
    assert 'e_score_correction_bias' not in dict(layer.named_parameters())
    assert not layer.e_score_correction_bias.requires_grad
    other = experts('sigmoid', seed=5)
    assert not torch.equal(other.e_score_correction_bias, layer.e_score_correction_bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.e_score_correction_bias, layer.e_score_correction_bias)
    assert 'e_score_correction_bias' not in experts('softmax').state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@both_routers
@pytest.mark.parametrize('knobs', KNOBS, ids=str)
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 4e-2), (torch.float32, 1e-3)], ids=str)
def test_grouped_products_on_cuda_are_close_to_the_loop_on_the_cpu(router, knobs, dtype, tolerance, monkeypatch):
    only_path('grouped', monkeypatch)
    # weights that bfloat16 holds exactly and a router in float32, so that no choice differs
    layer = experts(router, dtype, C=16, d_ff=32, **knobs).double()
    x = numbers(2, 9, 16, dtype=dtype).double().requires_grad_()
    expected = reference_experts(layer, x)
    by_loop = gradients(expected, x, layer)
    narrow, y = layer.to('cuda', dtype), x.detach().to('cuda', dtype).requires_grad_()
    out, routing = narrow(y)
    close(out, expected, tolerance)
    wrt = [y, *narrow.parameters()]
    grads = torch.autograd.grad((out * numbers(*out.shape, seed=9).to(out)).sum(), wrt, allow_unused=True)
    for ours, theirs in zip(grads, by_loop):
        if theirs.abs().max() > 1e-12:
            close(ours, theirs, 2 * tolerance)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason='needs an Apple GPU')
@both_routers
def test_experts_on_mps_are_close_to_the_loop_on_the_cpu(router):
    layer, x = experts(router), numbers(2, 9, 8)
    expected = reference_experts(layer, x)
    close(layer.float().to('mps')(x.float().to('mps'))[0], expected, 1e-4)


@both_routers
@pytest.mark.parametrize('top_k', [1, 3])
def test_decoding_one_token_takes_its_own_path_to_the_same_numbers(router, top_k, monkeypatch):
    layer, x = experts(router, n_shared_expert=1, routed_scaling_factor=1.5, top_k=top_k), numbers(1, 1, 8)
    calls, one = [], moe.one_token_swiglu
    monkeypatch.setattr(moe, 'one_token_swiglu', lambda *a: (calls.append(1), one(*a))[1])
    expected, routing = layer(x)                                # gradients are on: the path of training
    assert not calls and routing is not None
    with torch.no_grad():
        y, routing = layer(x, with_balance=False)
    assert calls and routing is None
    close(y, expected, 1e-13)


@pytest.mark.parametrize('weights_first', [False, True])
@pytest.mark.parametrize('rows', [1, 2, 8, 9])
def test_few_rows_are_multiplied_to_the_same_numbers_whichever_factor_is_on_the_left(weights_first, rows, monkeypatch):
    monkeypatch.setattr(moe, 'WEIGHTS_FIRST', weights_first)
    x, w, out = numbers(rows, 5), numbers(7, 5, seed=2), torch.empty(rows, 7, dtype=F64)
    close(moe.product(x, w), x @ w.T, 1e-14)
    assert moe.product(x, w, out=out) is out
    close(out, x @ w.T, 1e-14)
