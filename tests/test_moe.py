"""moe.py against plain loops: one token, one choice, one expert at a time, in float64.

Held to the equations that moe.py names: Switch (arXiv 2101.03961, eq. 2, 4-6), ST-MoE (arXiv 2202.08906, eq. 5),
DeepSeek-V2 and V3 (arXiv 2405.04434, section 2.2.2; 2412.19437, eq. 12-20), and to what dropless experts promise: a
token's result depends on that token alone. How the products are made is tested in test_kernels.py.
"""
import itertools
import math
import re

import numpy as np
import pytest
import torch

from model import ModelConfig
from moe import MixtureOfExperts
from tensors import BF16, F32, F64, close, gradients, numbers, printed_by

ROUTERS = ('softmax', 'sigmoid')
both_routers = pytest.mark.parametrize('router', ROUTERS)


def experts(router='softmax', dtype=F64, seed=0, C=8, **knobs):
    """A layer with random weights; the selection bias is large enough to change choices."""
    sizes = dict(n_embd=C, n_head=1, head_dim=2, d_ff=12, n_expert=6, top_k=2)
    layer = MixtureOfExperts(ModelConfig(**{**sizes, **knobs}, router=router)).to(F64)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0.0, 0.5, generator=g)
        if router == 'sigmoid':
            layer.e_score_correction_bias.normal_(0.0, 0.3, generator=g)
    return layer.to(dtype)


def network(x, gate, up, down):
    """One SwiGLU on one token, out of sums and exponentials."""
    g, u = gate @ x, up @ x
    return down @ (g / (1 + torch.exp(-g)) * u)


def reference_choice(layer, z, knobs):
    """Logits z (E,) of one token -> the expert ids chosen, best first, and what each one's output is multiplied by.
    Differentiable by z; knobs as given to experts()."""
    E, k, groups = len(z), knobs.get('top_k', 2), knobs.get('n_expert_group', 1)
    scores = torch.exp(z) / torch.exp(z).sum() if not layer.sigmoid else 1 / (1 + torch.exp(-z))
    bias = [0.0] * E if not layer.sigmoid else layer.e_score_correction_bias.tolist()
    rank = [s + b for s, b in zip(scores.tolist(), bias)]
    group = lambda e: e // (E // groups)                    # as good as its best expert (V2), or its two best (V3)
    counted = 2 if layer.sigmoid else 1
    quality = [sum(sorted((rank[e] for e in range(E) if group(e) == g), reverse=True)[:counted]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -quality[g])[:knobs.get('top_k_group', 1)]
    chosen = sorted((e for e in range(E) if group(e) in best), key=lambda e: -rank[e])[:k]
    total = sum(scores[e] for e in chosen) if k > 1 and knobs.get('norm_topk_prob', True) else 1.0
    return chosen, [scores[e] / total * knobs.get('routed_scaling_factor', 1.0) for e in chosen]


def reference_experts(layer, x, knobs):
    """x (B, T, C) float64 -> (B, T, C), differentiable."""
    rows, stacks = [], (layer.gate_proj, layer.up_proj, layer.down_proj)
    for token in x.flatten(0, 1):
        chosen, weights = reference_choice(layer, layer.router.weight @ token, knobs)
        y = sum(w * network(token, *(stack[e] for stack in stacks)) for e, w in zip(chosen, weights))
        if knobs.get('n_shared_expert'):
            y = y + network(token, *(getattr(layer.shared, f'{part}_proj').weight for part in ('gate', 'up', 'down')))
        rows.append(y)
    return torch.stack(rows).view(x.shape)


KNOBS = [dict(), dict(top_k=1), dict(top_k=6), dict(top_k=3, routed_scaling_factor=2.5), dict(n_shared_expert=2),
         dict(n_shared_expert=1, routed_scaling_factor=1.7), dict(n_expert=1, top_k=1), dict(n_expert=16, top_k=4),
         dict(norm_topk_prob=False, routed_scaling_factor=2.5), dict(n_expert_group=2),
         dict(n_expert_group=3, top_k_group=2), dict(n_expert=16, top_k=4, n_expert_group=4, top_k_group=2)]
every_knob = pytest.mark.parametrize('knobs', KNOBS, ids=str)


# ---------------------------------------------------------------------------------------------------------------------
# Forward and gradients

@both_routers
@every_knob
@pytest.mark.parametrize('shape', [(2, 5), (1, 1), (1, 7)], ids=str)
def test_a_layer_is_its_tokens_one_by_one_forward_and_in_all_gradients(router, knobs, shape):
    layer, x = experts(router, **knobs), numbers(*shape, 8).requires_grad_()
    wrt = [x, *layer.parameters()]
    expected = reference_experts(layer, x, knobs)
    for training in (True, False):
        out, _ = layer.train(training)(x)
        close(out, expected, 1e-12)
        for ours, theirs in zip(gradients(out, wrt), gradients(expected, wrt)):
            if theirs.abs().max() > 1e-12:
                close(ours, theirs, 1e-11)
            else:                                           # the router of a single expert has nothing to decide
                assert ours.abs().max() < 1e-12
    with torch.no_grad():                                   # decoding, one token included
        y, routing = layer(x, with_balance=False)
        close(y, expected, 1e-12)
    assert routing is None


# ---------------------------------------------------------------------------------------------------------------------
# The router

@both_routers
@every_knob
def test_choices_weights_and_counts_are_those_of_a_loop_over_tokens(router, knobs):
    layer, x = experts(router, **knobs), numbers(3, 6, 8)
    chosen, weights, routing = layer.route(x)
    counts, k = [0] * layer.router.out_features, knobs.get('top_k', 2)
    for b, t in itertools.product(range(3), range(6)):
        ids, expected = reference_choice(layer, layer.router.weight.detach() @ x[b, t], knobs)
        assert chosen[b, t].tolist() == ids
        close(weights[b, t], torch.stack(expected), 1e-13)
        for e in ids:
            counts[e] += 1
    assert routing.load.tolist() == counts == torch.bincount(chosen.flatten(), minlength=len(counts)).tolist()
    assert routing.load.sum() == 3 * 6 * k                  # nothing is dropped
    if k > 1:                                               # a softmax over the chosen ones, or less than all there is
        assert torch.allclose(weights.sum(-1), weights.new_tensor(layer.scaling)) == knobs.get('norm_topk_prob', True)


def test_groups_bind_where_every_biased_score_is_below_0():
    """A mask of 0 would be the largest score there: experts of other groups (DeepSeek-V3's code, issue 741)."""
    knobs = dict(n_expert=16, top_k=4, n_expert_group=4, top_k_group=2)
    for router in ROUTERS:
        layer, x = experts(router, **knobs), numbers(3, 20, 8)
        free = experts(router, n_expert=16, top_k=4)
        free.load_state_dict(layer.state_dict())
        groups = lambda chosen: max(len(set(row)) for row in (chosen.flatten(0, 1) // 4).tolist())
        assert groups(layer.route(x)[0]) == 2 < groups(free.route(x)[0])
        if router == 'sigmoid':
            before = layer.route(x)
            layer.e_score_correction_bias -= 5.0            # alike for all: the same choices, the same weights
            for one, other in zip(layer.route(x)[:2], before):
                assert torch.equal(one, other)


@both_routers
def test_routing_is_float32_under_autocast_and_chooses_as_the_float32_model(router):
    layer, x = experts(router, F32, n_expert=16, top_k=4), numbers(4, 64, 8, dtype=F32)
    chosen, weights, _ = layer.route(x)
    with torch.autocast('cpu', dtype=BF16):
        again = layer.route(x)
        y, _ = layer(x)
        assert layer.router(x).dtype == F32
        assert torch.nn.functional.linear(x, layer.router.weight).dtype == BF16     # which it must not be
    assert torch.equal(again[0], chosen) and torch.equal(again[1], weights)
    assert again[1].dtype == again[2].z_loss.dtype == again[2].balance_loss.dtype == F32
    full = layer(x)[0].detach()
    assert y.dtype == F32
    assert 1e-4 < (y - full).abs().max() / full.abs().max() < 3e-2          # the products did run in bfloat16


def test_the_selection_bias_is_saved_is_no_parameter_and_stays_float32_in_a_bfloat16_model():
    layer, other = experts('sigmoid', F32), experts('sigmoid', F32, seed=5)
    bias = layer.e_score_correction_bias.clone()
    assert 'e_score_correction_bias' not in dict(layer.named_parameters())
    assert not torch.equal(other.e_score_correction_bias, bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.e_score_correction_bias, bias)
    assert 'e_score_correction_bias' not in experts('softmax').state_dict()
    for cast in (layer.bfloat16(), layer.half(), layer.to(BF16), layer.to('cpu', BF16)):
        assert cast.e_score_correction_bias.dtype == F32 and torch.equal(cast.e_score_correction_bias, bias)
    assert layer.router.weight.dtype == BF16
    layer.update_bias(torch.tensor([9, 0, 0, 0, 0, 0]), 0.001)
    assert not torch.equal(layer.e_score_correction_bias, bias)             # 0.001 beside 0.3: lost in bfloat16
    y, routing = layer(numbers(1, 5, 8, dtype=BF16))
    assert y.dtype == BF16 and torch.isfinite(y).all() and routing.z_loss.dtype == F32


# ---------------------------------------------------------------------------------------------------------------------
# What must hold of any experts

@both_routers
def test_a_tokens_result_is_the_same_alone_in_any_company_and_in_any_order(router):
    layer, x = experts(router, n_shared_expert=1), numbers(4, 9, 8)
    for training in (True, False):
        y, routing = layer.train(training)(x)
        for b, t in itertools.product(range(4), range(9)):
            close(layer(x[b:b + 1, t:t + 1])[0], y[b:b + 1, t:t + 1], 1e-13)
        order = torch.tensor([2, 0, 3, 1])
        close(layer(x[order])[0], y[order], 1e-13)
        crowd = torch.cat((x, x[:1, :1].expand(4, 200, 8)), 1)  # 800 copies of one token: no capacity to run out of
        close(layer(crowd)[0][:, :9], y, 1e-13)
        again, repeated = layer(x)                              # and the same bits every time
        assert torch.equal(again, y) and all(torch.equal(one, other) for one, other in zip(repeated, routing))


# ---------------------------------------------------------------------------------------------------------------------
# The losses

def router_of(E, top_k, router='softmax'):
    """A layer whose logits are its input: x (B, T, E)."""
    layer = experts(router, C=E, n_expert=E, top_k=top_k)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E, dtype=F64))
    return layer


def told(layer, x):
    return layer.route(x)[2]


def balance_of(p, top_k):
    return told(router_of(p.size(-1), top_k), p.clamp_min(1e-300).log()).balance_loss.item()


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
    collapsed = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=F64).expand(1, 5, 4)
    assert balance_of(collapsed, 1) == pytest.approx(2.8, rel=1e-13)
    turn_about = torch.eye(4, dtype=F64)[None]                              # every expert once: even load
    assert balance_of(turn_about, 1) == pytest.approx(1.0, abs=1e-13)
    p = torch.zeros(2, 6, 2, dtype=F64)                                     # two collapsed sequences, side by side:
    p[0, :, 0] = p[1, :, 1] = 1.0                                           # pooled they would look even
    assert balance_of(p, 1) == pytest.approx(2.0, rel=1e-13)


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
    layer, z = router_of(8, 2), numbers(2, 3, 8)
    assert told(layer, torch.zeros_like(z)).z_loss.item() == pytest.approx(math.log(8) ** 2, rel=1e-14)
    lse = np.log(np.exp(z.numpy()).sum(-1))
    for c in (0.0, 3.0, -0.5):                                              # not shift-invariant, by design
        assert told(layer, z + c).z_loss.item() == pytest.approx(((lse + c) ** 2).mean(), rel=1e-13)
    for dtype in (F64, F32):
        x = (1000.0 * z.sign()).to(dtype).requires_grad_()
        routing = told(layer.to(dtype), x)
        (routing.z_loss + routing.balance_loss).backward()
        assert routing.z_loss.item() == pytest.approx(1e6, rel=1e-2) and torch.isfinite(x.grad).all()


def test_entropy_is_that_of_each_tokens_distribution():
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.5, 0.5, 1e-9, 1e-9]], dtype=F64)
    expected = [math.log(4), -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)), math.log(2)]
    entropy = told(router_of(4, 1), p.log()[None]).entropy
    assert entropy.item() == pytest.approx(sum(expected) / 3, abs=1e-7) and not entropy.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Balancing without a loss

def violation(load):
    """MaxVio: how far the busiest expert is above even load (arXiv 2408.15664)."""
    return (load.max() / load.double().mean() - 1).item()


def test_the_selection_bias_evens_out_a_skewed_load_within_range_over_rate_updates():
    z, rate, layers = numbers(1, 512, 8) + numbers(8, seed=2), 0.005, {}
    for sign in (1, -1):
        layers[sign] = router_of(8, 2, 'sigmoid')
        layers[sign].e_score_correction_bias.zero_()
    skewed = violation(told(layers[1], z).load)
    assert skewed > 0.5
    centred = torch.zeros(8)
    for step in range(200):                                                 # scores lie within 1: 1 / rate
        chosen, _, routing = layers[1].route(z)
        assert torch.equal(chosen, (z.sigmoid() + centred).topk(2, dim=-1).indices)         # Moonlight's form: the same
        sign = torch.sign(routing.load.float().mean() - routing.load)
        centred += rate * (sign - sign.mean())
        layers[1].update_bias(routing.load, rate)
        layers[-1].update_bias(told(layers[-1], z).load, -rate)
    assert violation(told(layers[1], z).load) < 0.15
    load = told(layers[-1], z).load                                         # the other way: the rich get everything
    assert violation(load) > skewed and (load == 0).sum() >= 3


def test_one_update_nudges_overloaded_experts_down_underloaded_up_and_even_ones_not_at_all():
    layer = router_of(4, 1, 'sigmoid')
    layer.e_score_correction_bias.zero_()
    layer.update_bias(torch.tensor([5, 5, 5, 5]), 0.1)
    assert not layer.e_score_correction_bias.any()
    layer.update_bias(torch.tensor([9, 5, 5, 1]), 0.1)
    for _ in range(3):
        close(layer.e_score_correction_bias, [-0.1, 0.0, 0.0, 0.1], 1e-6)
        layer(numbers(1, 5, 4))                             # forwards alone, in training too, change nothing


def test_the_worked_example_tells_the_truth():
    """What it says of load and bias is what its eight lines of choices add up to."""
    for text in printed_by('moe.py').split('\nsigmoid'):
        tokens = [[(float(w), int(e)) for w, e in re.findall(r'(\d\.\d\d) x expert (\d)', line)]
                  for line in text.splitlines() if 'token ' in line]
        assert len(tokens) == 8 and all(len(choices) == 2 for choices in tokens)
        assert all(sum(w for w, _ in choices) == pytest.approx(1, abs=0.011) for choices in tokens)
        load = [sum(e == expert for choices in tokens for _, e in choices) for expert in range(4)]
        assert f'load {load}, even would be 4' in text
        entropy, most = re.search(r'entropy (\S+) of at most (\S+)', text).groups()
        assert 0 < float(entropy) < float(most) == pytest.approx(math.log(4), abs=1e-3)
    assert 'one update: ' + ', '.join(f'{0.001 * np.sign(4 - n):+.3f}' for n in load) in text


def test_a_layer_on_meta_gets_memory_and_its_selection_bias_stays_float32():
    with torch.device('meta'):
        layer = MixtureOfExperts(ModelConfig(n_embd=8, n_head=1, head_dim=2, d_ff=12, n_expert=6, router='sigmoid'))
    layer = layer.bfloat16().to_empty(device='cpu')
    assert layer.gate_proj.device.type == layer.e_score_correction_bias.device.type == 'cpu'
    assert (layer.gate_proj.dtype, layer.e_score_correction_bias.dtype) == (BF16, F32)
