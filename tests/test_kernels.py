"""kernels.py: the plain form of every computation against torch's own function or a loop, and the fast form against the
same, forward and in all gradients, at odd shapes, in every dtype that runs.

Inputs are numbers that bfloat16 holds exactly, so that one reference in float64 serves all dtypes. Tolerances are
relative to the largest number compared: 1e-12 in float64, 1e-5 in float32, 2e-2 in bfloat16 and under autocast to it;
gradients may have twice that. Everything is called through the public functions: what is fast behind them may change.
"""
import itertools
import math
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from conftest import REPOSITORY
from model import LanguageModel, ModelConfig
from muon import configure_optimizers
from tensors import BF16, F32, F64, Record, close, gradients, numbers, randomise, token_ids

PRECISIONS = {'float64': (F64, 1e-12, 'cpu'), 'float32': (F32, 1e-5, 'cpu'),
              'bfloat16': (BF16, 2e-2, 'cpu'), 'autocast': (F32, 2e-2, 'cpu')}
if torch.cuda.is_available():
    PRECISIONS.update({'cuda float32': (F32, 1e-3, 'cuda'), 'cuda bfloat16': (BF16, 3e-2, 'cuda'),
                       'cuda autocast': (F32, 3e-2, 'cuda')})
every_precision = pytest.mark.parametrize('precision', PRECISIONS)
WIDE = ('rms_norm', 'weight'), ('rotate', 'angles'), ('experts', 'weights')    # never below float32, as in the model


@pytest.fixture(autouse=True)
def everything_fast_again():
    yield
    kernels.use('fast')


def exact(*shape, seed=1, std=1.0):
    """Numbers that bfloat16 holds exactly, in float64."""
    return numbers(*shape, seed=seed, std=std).bfloat16().double()


def case(name, reference, options, view=lambda x: x, **tensors):
    """One call of kernels.<name>: tensors are what is differentiated, the first of them seen through `view`; options
    are the other arguments. `reference` is the same function of both, in float64."""
    return SimpleNamespace(name=name, reference=reference, tensors=tensors, options=options, view=view, cached=None)


def call(c, function, leaves, options):
    """-> the function's results, always as a tuple."""
    named = dict(zip(c.tensors, leaves))
    first = next(iter(named))
    out = function(**{**named, first: c.view(named[first])}, **options)
    return out if isinstance(out, tuple) else (out,)


def run(c, precision, form=None):
    """-> (results of kernels.<name> in this precision and form, the leaves that they were made from)."""
    dtype, _, device = PRECISIONS[precision]
    cast = {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in {**c.tensors, **c.options}.items()}
    for k, t in cast.items():
        if isinstance(t, torch.Tensor) and t.dtype == F64:
            cast[k] = t.to(kernels.wide(dtype) if (c.name, k) in WIDE else dtype)
    leaves = [cast.pop(k).clone().requires_grad_() for k in c.tensors]
    if form:
        kernels.use(form)
    with torch.autocast(device, dtype=BF16, enabled='autocast' in precision):
        return call(c, getattr(kernels, c.name), leaves, cast), leaves


def expected(c):
    """-> the reference's results and gradients, worked out once."""
    if c.cached is None:
        leaves = [t.clone().requires_grad_() for t in c.tensors.values()]
        out = call(c, c.reference, leaves, c.options)
        c.cached = [out[0].detach(), *out[1:]], gradients(out[0], leaves)
    return c.cached


# ---------------------------------------------------------------------------------------------------------------------
# The references

def turned_by_matrices(x, angles):
    cos, sin = angles.unbind(-1)
    R = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)           # (..., T, width/2, 2, 2)
    return torch.einsum('...ij,...j->...i', R.expand(*x.shape[:-1], -1, 2, 2), x.unflatten(-1, (-1, 2))).flatten(-2)


def attention_row_by_row(q, k, v, scale, mask):
    (B, H, T, _), S, out = q.shape, k.size(2), []
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        g = h // (H // k.size(1))
        sees = (torch.arange(S) <= t if isinstance(mask, str) else torch.ones(S, dtype=torch.bool) if mask is None else
                mask.expand(B, 1, T, S)[b, 0, t])
        e = torch.exp(scale * (k[b, g, sees] @ q[b, h, t]))
        out.append(e @ v[b, g, sees] / e.sum())
    return torch.stack(out).view(B, H, T, -1)


def loss_of_whole_logits(x, weight, targets):
    logits = x @ weight.T
    return (F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum'),
            sum(int(row.argmax()) == t for row, t in zip(logits, targets.tolist())))


def networks_row_by_row(x, weights, gate, up, down, chosen):
    rows = []
    for n, row in enumerate(x):
        y = torch.zeros_like(row)
        for choice, e in enumerate(chosen[n].tolist()):
            g = gate[e] @ row
            y = y + weights[n, choice] * (down[e] @ (g / (1 + torch.exp(-g)) * (up[e] @ row)))
        rows.append(y)
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The cases

def norm_case(*shape, eps=1e-6, view=lambda x: x):
    x = exact(*shape)
    return case('rms_norm', lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps), dict(eps=eps), view,
                x=x, weight=exact(view(x).size(-1), seed=2))


def rotation_case(*shape, angles=(), view=lambda x: x):
    x = exact(*shape)
    a = numbers(*angles, view(x).size(-2), view(x).size(-1) // 2, seed=3, std=3.0)
    return case('rotate', turned_by_matrices, dict(angles=1.3 * torch.stack((a.cos(), a.sin()), -1)), view, x=x)


def attention_case(mask, H, G, T, S, d, dv, B=2):
    """mask: causal, none, all rows alike (1, 1, T, S) or each its own (B, 1, T, S); a row sees at least one."""
    sees = torch.rand(1 if mask == 'alike' else B, 1, T, S, generator=torch.Generator().manual_seed(5)) < 0.6
    sees[..., 0] = True
    options = dict(scale=0.7 / math.sqrt(d), mask={'causal': 'causal', 'none': None}.get(mask, sees))
    return case('attention', attention_row_by_row, options,
                q=exact(B, H, T, d), k=exact(B, G, S, d, seed=2), v=exact(B, G, S, dv, seed=3))


def loss_case(N, V, C, padding=()):
    x, weight, targets = exact(N, C), exact(V, C, seed=2), token_ids(N, vocab=V)
    targets[::3] = (x @ weight.T).argmax(1)[::3]            # some are right
    targets[list(padding)] = -1
    return case('cross_entropy', loss_of_whole_logits, dict(targets=targets), x=x, weight=weight)


def experts_case(chosen, E=5, C=8, width=16):
    chosen = torch.tensor(chosen)
    N, k = chosen.shape
    return case('experts', networks_row_by_row, dict(chosen=chosen), x=exact(N, C), weights=exact(N, k, seed=6).abs(),
                gate=exact(E, width, C, seed=2, std=0.5), up=exact(E, width, C, seed=3, std=0.5),
                down=exact(E, C, width, seed=4, std=0.5))


def product_case(rows):
    reference = lambda x, w: torch.einsum('ni,oi->no', x, w)
    return case('linear', reference, {}, x=exact(rows, 5), w=exact(7, 5, seed=2))


def length_case(*shape, view=lambda x: x):
    return case('norm', lambda x: x.square().sum().sqrt(), {}, view, x=exact(*shape))


def choices(N, k, E):
    return torch.rand(N, E, generator=torch.Generator().manual_seed(0)).topk(k).indices.tolist()


heads_first, part = lambda x: x.transpose(1, 2), lambda x: x[..., 3:]       # as the layers make them
NORMS = [(2, 5, 8), (1, 33), (1, 3, 5, 64)]
ROTATIONS = [(2, 3, 5, 8), (1, 1, 4, 2), (3, 2, 1, 16)]
ATTENTIONS = [      # mask, H, G, T, S, d, dv
    ('causal', 4, 4, 9, 9, 8, 8), ('causal', 4, 2, 1, 1, 8, 8), ('causal', 6, 3, 7, 7, 8, 8),
    ('causal', 4, 1, 7, 7, 16, 16), ('causal', 2, 2, 7, 7, 6, 11), ('causal', 4, 2, 7, 7, 12, 5),
    ('causal', 2, 2, 128, 128, 8, 8), ('causal', 2, 1, 263, 263, 12, 8),
    ('none', 4, 4, 1, 9, 8, 8), ('none', 4, 2, 1, 9, 8, 11), ('none', 6, 1, 1, 70, 12, 12), ('none', 4, 2, 3, 9, 8, 6),
    ('alike', 4, 1, 1, 9, 8, 5), ('alike', 4, 2, 3, 9, 8, 10), ('own', 4, 2, 1, 9, 8, 8), ('own', 4, 4, 5, 9, 8, 8),
    ('own', 2, 1, 67, 131, 8, 6)]
LOSSES = [(11, 13, 6, (0, 4, 5, 10)), (5, 7, 4), (1, 13, 3), (40, 5003, 16, (7, 39)), (300, 2 ** 13 + 3, 2, (1, 4, 299)),
          (8, 2 ** 19 + 3, 2, (1, 4))]
CASES = {
    **{f'norm {shape}': norm_case(*shape) for shape in NORMS}, 'norm of heads': norm_case(2, 5, 3, 8, view=heads_first),
    'norm, large epsilon': norm_case(7, 9, eps=0.5), 'norm of a part': norm_case(2, 5, 13, view=part),
    **{f'rotation {shape}': rotation_case(*shape) for shape in ROTATIONS},
    'rotation of heads': rotation_case(2, 5, 3, 8, view=heads_first),
    'rotation by row': rotation_case(2, 3, 5, 8, angles=(2, 1)),
    'rotation at an odd place': rotation_case(2, 3, 5, 13, view=part),
    'rotation of one vector at an odd place': rotation_case(1, 1, 1, 13, view=part),
    'rotation at odd strides': rotation_case(2, 3, 5, 13, view=lambda x: x[..., :12]),
    **{f'attention {sizes}': attention_case(*sizes) for sizes in ATTENTIONS},
    **{f'loss {sizes}': loss_case(*sizes) for sizes in LOSSES},
    'experts': experts_case(choices(70, 2, 4), E=4), 'experts, few rows': experts_case(choices(9, 2, 5)),
    'experts, many rows': experts_case(choices(600, 2, 2)),
    'experts, some empty': experts_case([[3, 1], [1, 3], [3, 1]]), 'experts, one each': experts_case(choices(9, 1, 5)),
    'experts, all to the last': experts_case([[4]] * 9), 'experts, all to the first': experts_case([[0]] * 3),
    'experts, all chosen': experts_case(choices(4, 5, 5)), 'experts, one row': experts_case([[2, 4]]),
    'experts, one': experts_case([[0]] * 6, E=1), 'experts, odd': experts_case(choices(9, 3, 6), E=6, C=7, width=5),
    **{f'few rows: {n}': product_case(n) for n in (1, 2, 8, 9)},
    **{f'length {shape}': length_case(*shape) for shape in ((7,), (3, 4, 5))},
    'length of a part': length_case(2, 3, 13, view=part)}
each = pytest.mark.parametrize('name', CASES)


@every_precision
@each
def test_plain_and_fast_are_the_reference_forward_and_in_all_gradients(name, precision):
    if (name, precision) == (f'loss {LOSSES[-1]}', 'float32'):
        pytest.skip('a sum of half a million products in float32: how it is rounded is up to the BLAS of the machine')
    c, (dtype, tolerance, _) = CASES[name], PRECISIONS[precision]
    results, grads = expected(c)
    for form in ('plain', 'fast'):
        out, leaves = run(c, precision, form)
        if c.name == 'cross_entropy':
            assert out[0].dtype == kernels.wide(dtype) and not out[1].requires_grad
            assert abs(out[1] - results[1]) <= (tolerance > 1e-3)           # in bfloat16 two logits may be equal
        elif 'autocast' not in precision:
            assert out[0].dtype == dtype
        close(out[0], results[0], tolerance)
        for ours, leaf, theirs in zip(gradients(out[0], leaves), leaves, grads):
            assert ours.dtype == leaf.dtype
            if theirs.abs().max() > 1e-12:
                close(ours, theirs, 2 * tolerance)
            else:                                           # one token attends to itself, whatever the score
                assert ours.abs().max() <= tolerance
        with torch.no_grad():                               # evaluation and decoding: other ways, the same numbers
            again, _ = run(c, precision, form)
            close(again[0], results[0], tolerance)
        again, _ = run(c, precision, form)
        assert torch.equal(again[0], out[0])                # the same bits every time


@pytest.mark.parametrize('weights_first', [True, False])
def test_on_either_make_of_processor_few_rows_are_multiplied_to_the_same_numbers(weights_first, monkeypatch):
    monkeypatch.setattr(kernels, 'WEIGHTS_FIRST', weights_first)
    for c in (c for c in CASES.values() if c.name in ('linear', 'experts')):
        reference = expected(c)[0][0]
        with torch.no_grad():
            close(run(c, 'float32')[0][0], reference, 1e-5)
    x, w, out = numbers(3, 5, dtype=F32), numbers(7, 5, dtype=F32), torch.empty(3, 7)
    assert kernels.linear(x, w, out=out) is out
    close(out, x @ w.T, 1e-6)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_grouped_products_give_the_same_forward_and_in_all_gradients(precision, monkeypatch):
    """What a GPU and torch.compile take."""
    monkeypatch.setattr(kernels, 'grouped_serves', lambda *_: True)
    products, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, 'grouped_mm', lambda *a, **k: products.append(1) or grouped_mm(*a, **k))
    cases = [c for name, c in CASES.items() if c.name == 'experts' and 'odd' not in name]       # strides of 16 bytes
    for c in cases:
        out, leaves = run(c, precision)
        for ours, theirs in zip([out[0], *gradients(out[0], leaves)], [expected(c)[0][0], *expected(c)[1]]):
            close(ours, theirs, 2 * PRECISIONS[precision][1])
    assert len(products) >= 3 * len(cases)


def test_without_anything_to_predict_the_loss_and_its_gradients_are_zero():
    for form in ('plain', 'fast'):
        kernels.use(form)
        x, weight = numbers(5, 4).requires_grad_(), numbers(7, 4, seed=2).requires_grad_()
        nll, correct = kernels.cross_entropy(x, weight, torch.full((5,), -1))
        assert nll == 0 and correct == 0 and not any(g.any() for g in torch.autograd.grad(nll, (x, weight)))


def test_the_norm_of_millions_of_numbers_is_right_to_2e_5_in_float32():
    """torch's own is off by 1e-4: a sum of so many squares needs more than a few running totals."""
    x = numbers(4_000_000, dtype=F32)
    close(kernels.norm(x), x.double().square().sum().sqrt(), 2e-5)


@each
def test_plain_forms_pass_gradcheck_to_the_second_order_and_fast_ones_to_the_first(name):
    c = CASES[name]
    if sum(t.numel() for t in c.tensors.values()) > 3000:
        pytest.skip('as in the smaller cases')
    for form, order in (('plain', 1), ('plain', 2), ('fast', 1)):
        kernels.use(form)
        leaves = [t.clone().requires_grad_() for t in c.tensors.values()]

        def function(*leaves):
            return call(c, getattr(kernels, c.name), leaves, c.options)[0]
        check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
        assert check(function, leaves, fast_mode=True, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# use()

def operations(name):
    """What runs, by name, for the first case of this kernel."""
    with Record() as record:
        run(next(c for c in CASES.values() if c.name == name), 'float32')
    return [operation for operation, _, _ in record.made]


def test_use_switches_each_computation_by_its_name_and_no_other(monkeypatch):
    monkeypatch.setattr(kernels, 'WEIGHTS_FIRST', True)     # else a product of few rows is plain anyway
    ran = {}
    for form in ('plain', 'fast'):
        kernels.use(form)
        ran[form] = {name: operations(name) for name in kernels.NAMES}
    assert all(ran['plain'][name] != ran['fast'][name] for name in kernels.NAMES)
    for one, (form, other) in itertools.product(kernels.NAMES, (('fast', 'plain'), ('plain', 'fast'))):
        kernels.use(form, **{one: other})
        for name in kernels.NAMES:
            assert operations(name) == ran[other if name == one else form][name], (one, name)
    kernels.use()
    assert {name: operations(name) for name in kernels.NAMES} == ran['fast']


@pytest.mark.parametrize('with_grad', [True, False])
@pytest.mark.parametrize('form', ['plain', 'fast'])
def test_gains_in_bfloat16_as_published_weights_have_them_round_the_result_once(form, with_grad):
    x, gain = exact(40, 96), exact(96, seed=2)
    kernels.use(form)
    with torch.set_grad_enabled(with_grad):
        y = kernels.rms_norm(x.bfloat16(), gain.bfloat16(), 1e-6)
    reference = F.rms_norm(x, gain.shape, gain, 1e-6)
    assert y.dtype == BF16 and ((y.double() - reference).abs() <= 2 ** -8 * reference.abs()).all()


@pytest.mark.parametrize('form, exceptions, words', [('quick', {}, 'quick'), ('fast', dict(rope='plain'), 'rope'),
                                                     ('plain', dict(linear=True), 'linear')], ids=str)
def test_a_form_or_a_name_that_there_is_not_is_refused_in_one_line_and_changes_nothing(form, exceptions, words):
    kernels.use('fast', rms_norm='plain')
    before = [operations(name) for name in kernels.NAMES]
    with pytest.raises(ValueError, match=words) as error:
        kernels.use(form, **exceptions)
    assert '\n' not in str(error.value) and 'rms_norm' in str(error.value)
    assert [operations(name) for name in kernels.NAMES] == before


def small_model(**knobs):
    sizes = dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, d_ff=6, n_expert=3, top_k=2, attn='mla',
                 qk_rope_head_dim=4, n_shared_expert=1, n_dense_layer=1)
    return randomise(LanguageModel(ModelConfig(**{**sizes, **knobs})))


@every_precision
def test_a_whole_model_has_the_losses_and_gradients_of_plain_float64(precision):
    dtype, tolerance, device = PRECISIONS[precision]

    def results(model, precision='float64', device='cpu'):
        with torch.autocast(device, dtype=BF16, enabled='autocast' in precision):
            out = model.to(device)(*(token_ids(2, 8, vocab=11, seed=seed).to(device) for seed in (1, 2)))
        assert out.nll.dtype == out.balance_loss.dtype == out.z_loss.dtype == kernels.wide(model.embed.weight.dtype)
        (out.nll + out.balance_loss + out.z_loss).backward()
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        return [out.nll, out.balance_loss, out.z_loss, out.entropy, *(p.grad for p in model.parameters())]
    kernels.use('plain')
    expected = results(small_model(top_k=3).double())       # all experts chosen: no choice can differ
    for form in ('plain', 'fast'):
        kernels.use(form)
        model = small_model(top_k=3).double() if dtype == F64 else small_model(top_k=3).for_decoding(dtype)
        for ours, theirs in zip(results(model, precision, device), expected):
            close(ours, theirs, 10 * tolerance)


def test_plain_a_model_has_second_derivatives_and_works_under_torch_func():
    kernels.use('plain')
    model, tokens, targets = small_model().double(), token_ids(3, 1, 6, vocab=11), token_ids(3, 1, 6, vocab=11, seed=2)

    def loss(weights, tokens=tokens[:, 0], targets=targets[:, 0]):
        return torch.func.functional_call(model, weights, (tokens, targets)).nll
    weights, p = {name: p.detach() for name, p in model.named_parameters()}, list(model.parameters())
    direction = {name: numbers(*w.shape, seed=i) for i, (name, w) in enumerate(weights.items())}
    grads = torch.autograd.grad(loss(dict(model.named_parameters())), p, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(grads, direction.values()))
    close(torch.func.jvp(loss, (weights,), (direction,))[1], slope, 1e-12)                      # forward mode
    first, second = torch.func.jvp(torch.func.grad(loss), (weights,), (direction,))             # forward over reverse
    for name, g, twice in zip(weights, grads, torch.autograd.grad(slope, p)):                   # reverse over reverse
        close(first[name], g, 1e-12)
        close(second[name], twice, 1e-10)
    model = small_model(n_dense_layer=2).double()                           # vmap cannot batch which rows an expert has
    weights = {name: p.detach() for name, p in model.named_parameters()}
    by_sequence = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, tokens, targets)
    for i in range(3):
        for name, alone in torch.func.grad(loss)(weights, tokens[i], targets[i]).items():
            close(by_sequence[name][i], alone, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Copies in another dtype, memory

@pytest.mark.parametrize('change', ['adamw', 'sgd', 'muon', 'load_state_dict', 'in place', 'new tensor', 'double'])
def test_under_autocast_weights_are_never_stale_whatever_changed_them(change):
    """Under autocast a model gives the numbers of a new one with the same weights, after every change."""
    small = lambda: small_model(n_dense_layer=0, tie_embeddings=False)
    model, tokens, targets = small(), token_ids(2, 8, vocab=11), token_ids(2, 8, vocab=11, seed=2)
    optimizers = {'adamw': lambda: configure_optimizers(model, 0.1),
                  'muon': lambda: configure_optimizers(model, 0.1, muon=True),
                  'sgd': lambda: [torch.optim.SGD(model.parameters(), 0.1)]}.get(change, list)()

    def results(model):
        with torch.autocast('cpu', dtype=BF16):
            loss = model(tokens, targets).nll
            loss.backward()
            with torch.no_grad():
                return loss.detach(), model(tokens)
    before = results(model)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            if change == 'load_state_dict':
                model.load_state_dict({name: 1.5 * t for name, t in model.state_dict().items()})
            if change == 'double':
                model.double()
            for p in model.parameters():
                if change in ('in place', 'double'):
                    p.mul_(1.5)
                elif change == 'new tensor':
                    p.data = 1.5 * p.data
        model.float()
        new = small()
        new.load_state_dict(model.state_dict())
        after = results(model)
        for ours, fresh, old in zip(after, results(new), before):
            assert torch.equal(ours, fresh) and (ours - old).abs().max() > 1e-2 * old.abs().max()
        before = after


@pytest.mark.parametrize('training', [True, False])
def test_networks_are_cast_one_at_a_time_and_no_copy_of_a_layer_of_them_is_made(training):
    weights = (torch.randn(3, 6, 8), torch.randn(3, 6, 8), torch.randn(3, 8, 6))
    leaves = [w.requires_grad_(training) for w in weights]
    with torch.autocast('cpu', dtype=BF16), Record() as record:
        y = kernels.experts(torch.randn(5, 8), torch.tensor([[0, 2]] * 5), torch.rand(5, 2), *leaves)
        if training:
            y.sum().backward()
    copies = [shape for name, shape, dtype in record.made if dtype == BF16 and name.startswith('aten._to_copy')]
    assert copies.count((6, 8)) >= 4 and copies.count((8, 6)) >= 2                      # of networks 0 and 2
    assert not {(3, 6, 8), (3, 8, 6)} & {shape for _, shape, dtype in record.made if dtype == BF16}


def test_in_bfloat16_few_different_numbers_of_rows_are_multiplied_and_an_eighth_more_at_most():
    sizes = [kernels.filled_up(n, BF16) for n in range(4097)]
    assert sizes[0] == 0 and all(n <= size < n + max(32, n / 8) and size % 32 == 0 for n, size in enumerate(sizes))
    assert sizes == sorted(sizes) and len(set(sizes)) <= 1 + 16 + 3 * 8
    assert all(kernels.filled_up(n, dtype) == n for n in range(99) for dtype in (F32, F64))


def test_rows_that_a_gpu_could_not_read_16_bytes_at_a_time_are_copied_and_others_are_not():
    whole = numbers(2, 5, 4, 150, dtype=BF16)               # values behind content, as in kv_b_proj's output
    for width, start, step, copied in ((48, 48, 96, False), (64, 64, 128, False), (64, 22, 86, True), (64, 64, 130, True),
                                       (64, 20, 128, True)):
        v = whole[..., :step].contiguous()[..., start:start + width].transpose(1, 2)
        ours = kernels.aligned(v)
        assert torch.equal(ours, v) and (ours is not v) == copied
        assert ours.data_ptr() % 16 == 0 and all(n % 8 == 0 for n in ours.stride()[:-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_cuda_values_that_start_between_two_reads_give_the_plain_result():
    q, k, both = (numbers(2, T, 8, width, dtype=BF16, seed=width).cuda() for T, width in ((40, 64), (40, 64), (40, 86)))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), both[..., 22:].transpose(1, 2)
    fast = kernels.attention(q, k, v, 0.125, 'causal')
    kernels.use('plain')
    close(fast, kernels.attention(q, k, v, 0.125, 'causal'), 3e-2)


def test_neither_scores_nor_logits_ever_exist_whole_and_long_contexts_have_the_same_gradients():
    """Plain they do exist: the instrument works."""
    T, V, tokens = 1031, 20011, 600
    qkv = [numbers(1, H, T, width, dtype=F32, seed=H).requires_grad_() for H, width in ((4, 16), (2, 16), (2, 12))]
    x, weight = (numbers(n, 4, dtype=F32).requires_grad_() for n in (tokens, V))
    largest, grads = {}, {}
    for form in ('plain', 'fast'):
        kernels.use(form)
        with Record() as attention:
            grads[form] = gradients(kernels.attention(*qkv, 0.25, 'causal'), qkv)
        with Record() as loss:
            kernels.cross_entropy(x, weight, token_ids(tokens, vocab=V))[0].backward()
        largest[form] = attention.largest(), loss.largest()
    assert largest['plain'][0] >= 4 * T * T and largest['plain'][1] >= tokens * V
    assert largest['fast'][0] < T * T and 2 ** 20 < largest['fast'][1] <= 2 ** 21
    for fast, plain in zip(grads['fast'], grads['plain']):
        close(fast, plain, 2e-5)


FAULTS = '''
import resource, torch, kernels
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for tell in (lambda: None, kernels.keep_freed_memory):
    tell()
    for i in range(30):
        before = faults() if i == 10 else before if i else 0
        torch.ones(10_000_000)                              # 40 MB, 9,766 pages
    print(faults() - before)
'''


@pytest.mark.skipif('glibc' not in platform.libc_ver(), reason='it is glibc that is told')
def test_freed_memory_is_kept_for_the_next_update():
    done = subprocess.run([sys.executable, '-c', FAULTS], cwd=REPOSITORY, capture_output=True, text=True)  # forked, it has another heap
    left, kept = map(int, done.stdout.split())
    assert left > 20 * 9_000 and kept < left / 4            # it may still grow
