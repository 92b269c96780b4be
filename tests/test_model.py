"""model.py: what a model costs is counted in closed form, its first and last losses are what theory and a memorised
batch say, its fused head is F.cross_entropy, its text is what the full forward would write, compiling changes nothing.

The closed forms are written out below from the equations of attention and experts, not read off the module. Attention
and experts by themselves are held to their equations in test_attention.py and test_moe.py.
"""
import dataclasses
import hashlib
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from attention import rope_tables
from model import LanguageModel, LinearCrossEntropy, ModelConfig

F64 = torch.float64
VARIANTS = ('baseline', 'gqa', 'mqa', 'lora', 'enhanced', 'mla')
every_variant = pytest.mark.parametrize('attn', VARIANTS)
TINY = dict(vocab_size=37, block_size=16, n_layer=2, n_head=8, n_embd=32, d_ff=16, n_expert=4, top_k=2)


def randomise(model, seed=0):
    """Every matrix, gain and bias so large that each part shows in the output. The same numbers in every dtype."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            p.copy_(torch.empty(p.shape).uniform_(0.5, 1.5, generator=g) if 'norm' in name else
                    torch.empty(p.shape).normal_(0.0, 0.2, generator=g))
    return model


def token_ids(*shape, vocab=37, seed=1):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def numbers(*shape, dtype=F64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def close(a, b, tolerance):
    """Within `tolerance` of the largest number, which must be no zero."""
    a, b = (torch.as_tensor(t, dtype=F64).detach().cpu() for t in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all() and torch.isfinite(b).all() and b.abs().max() > 0
    assert (a - b).abs().max() <= tolerance * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Counts, in closed form

def attention_parameters(C, H, row):
    """One layer: multi-head from its four matrices; latent from the reference's formula, with the variant's sizes."""
    d = C // H
    if row in ('baseline', 'gqa', 'mqa'):
        G = {'baseline': H, 'gqa': max(1, H // 4), 'mqa': 1}[row]
        return C * H * d + 2 * C * G * d + H * d * C
    rq, r, dn, dr, dv, bias = latent_sizes(C, H, row)
    count = C * rq + rq + rq * H * (dn + dr) + C * (r + dr) + r + r * H * (dn + dv) + H * dv * C
    return count + (rq + r + dr + C if bias else 0)


def latent_sizes(C, H, row):
    """q rank, kv rank, nope, rope, v, biases at the three sizes that are counted."""
    return {(384, 8, 'lora'): (32, 64, 16, 32, 48, False), (384, 8, 'enhanced'): (32, 64, 48, 32, 48, True),
            (384, 8, 'mla'): (112, 40, 48, 24, 48, False), (32, 8, 'lora'): (2, 5, 2, 2, 4, False),
            (32, 8, 'enhanced'): (2, 5, 4, 2, 4, True), (32, 8, 'mla'): (8, 8, 4, 2, 4, False)}[C, H, row]


EXPERIMENT_1 = dict(vocab_size=4096, block_size=512, n_layer=6, n_head=8, n_embd=384, d_ff=1536, n_expert=8, top_k=2)
SIZES = [EXPERIMENT_1, dict(TINY, n_layer=3, top_k=3, n_shared_expert=2),
         dict(TINY, router='sigmoid', n_shared_expert=1, top_k=1)]


def empty_model(config, monkeypatch):
    """Names and shapes only, of a model of any size."""
    monkeypatch.setattr(LanguageModel, 'init_weights', lambda self, seed: None)
    with torch.device('meta'):
        return LanguageModel(config)


@pytest.mark.parametrize('size', SIZES, ids=['experiment-1', 'shared', 'sigmoid'])
@every_variant
def test_parameters_flops_and_cache_are_the_closed_forms(attn, size, monkeypatch):
    config = ModelConfig(**size, attn=attn)
    C, H, L, E, k, V = (size[n] for n in ('n_embd', 'n_head', 'n_layer', 'n_expert', 'top_k', 'vocab_size'))
    shared, one_expert = size.get('n_shared_expert', 0), 3 * C * size['d_ff']
    a = attention_parameters(C, H, attn)
    total = V * C + L * (a + E * one_expert + E * C + shared * one_expert + 2 * C) + C
    active = total - L * (E - k) * one_expert
    model = empty_model(config, monkeypatch)
    assert model.parameter_counts() == {
        'params_total': total, 'params_active': active, 'params_embedding': V * C, 'params_attention': L * a,
        'params_experts': L * E * one_expert, 'params_shared': L * shared * one_expert, 'params_router': L * E * C,
        'params_norm': L * 2 * C + C}
    assert total == sum(p.numel() for p in model.parameters())                  # the tied head once
    if attn in ('lora', 'enhanced', 'mla'):
        _, r, dn, dr, dv, _ = latent_sizes(C, H, attn)
        pair, kept = H * (dn + dr + dv), r + dr
    else:
        pair, kept = 2 * C, 2 * {'baseline': H, 'gqa': max(1, H // 4), 'mqa': 1}[attn] * (C // H)
    assert model.flops_per_token() == 6 * active + 6 * L * size['block_size'] * pair
    for dtype, nbytes in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert model.cache_bytes_per_token(dtype) == L * kept * nbytes


def test_experiment_1_has_the_numbers_that_the_published_code_has_per_layer(monkeypatch):
    """C = 384, 8 heads, 8 experts of 1536: attention 589,824, experts and router 9,440,256 (8 x 3 matrices + 3,072)."""
    assert ModelConfig() == ModelConfig(**EXPERIMENT_1)
    counts = {attn: empty_model(ModelConfig(attn=attn), monkeypatch).parameter_counts() for attn in VARIANTS}
    assert {attn: c['params_attention'] // 6 for attn, c in counts.items()} == {
        'baseline': 589_824, 'gqa': 4 * 384 * 384 // 2 + 2 * 384 * 96, 'mqa': 2 * 384 * 384 + 2 * 384 * 48,
        'lora': 384 * 32 + 32 + 32 * 8 * 48 + 384 * 96 + 64 + 64 * 8 * 64 + 384 * 384,
        'enhanced': 384 * 32 + 32 + 32 * 8 * 80 + 384 * 96 + 64 + 64 * 8 * 96 + 384 * 384 + 32 + 96 + 384,
        'mla': 384 * 112 + 112 + 112 * 8 * 72 + 384 * 64 + 40 + 40 * 8 * 96 + 384 * 384}
    for c in counts.values():
        assert c['params_embedding'] == 4096 * 384 and c['params_router'] == 6 * 8 * 384
        assert c['params_experts'] == 6 * 8 * 3 * 384 * 1536
        assert c['params_total'] - c['params_active'] == 6 * 6 * 3 * 384 * 1536  # 6 of 8 experts stand idle in 6 layers


def test_deepseek_v3s_attention_has_its_published_size(monkeypatch):
    config = ModelConfig(n_embd=7168, n_head=128, n_layer=1, d_ff=1, n_expert=1, top_k=1, attn='mla', q_lora_rank=1536,
                         kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    model = empty_model(config, monkeypatch)
    assert model.parameter_counts()['params_attention'] == 187_107_328
    assert model.cache_bytes_per_token(torch.bfloat16) == 70_272 // 61          # which is 61 layers'


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation

@every_variant
def test_every_tensor_starts_with_the_spread_that_the_table_says(attn):
    config = ModelConfig(vocab_size=256, n_layer=3, n_head=4, n_embd=96, d_ff=64, n_expert=4, attn=attn,
                         attention_bias=True, n_shared_expert=1, router='sigmoid')
    for name, p in LanguageModel(config, seed=5).named_parameters():
        part = name.split('.')[-2] if name.endswith(('weight', 'bias')) else name.split('.')[-1]
        if 'norm' in part:
            assert (p == 1).all(), name
        elif name.endswith('bias'):
            assert (p == 0).all(), name
        else:
            std = 0.02 / math.sqrt(6) if part in ('o_proj', 'down_proj', 'shared_down_proj') else 0.02
            sampling = 4 / math.sqrt(2 * p.numel())         # 4 standard errors of a standard deviation
            assert p.std().item() == pytest.approx(std, rel=max(0.05, sampling) if p.numel() < 3200 else 0.05), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
            if p.dim() == 3:                                # experts: each its own numbers
                assert len({e.sum().item() for e in p}) == len(p)


def test_a_parameter_without_a_rule_is_an_error(monkeypatch):
    class Extra(model_file.Block):
        def __init__(self, config):
            super().__init__(config)
            self.mystery = nn.Parameter(torch.zeros(3))
    monkeypatch.setattr(model_file, 'Block', Extra)
    with pytest.raises(ValueError, match='mystery'):
        LanguageModel(ModelConfig(**TINY))


@every_variant
@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
def test_the_first_loss_is_that_of_a_uniform_guess(attn, router):
    config = ModelConfig(**{**TINY, 'vocab_size': 1024, 'n_embd': 64, 'n_layer': 4}, attn=attn, router=router)
    model, tokens = LanguageModel(config), token_ids(32, 16, vocab=1024)
    out = model(tokens, token_ids(32, 16, vocab=1024, seed=2))
    assert out.nll.item() / tokens.numel() == pytest.approx(math.log(1024), abs=0.1)
    assert out.load.min() > 0  # a router of zeros would send every token to the same experts


def test_the_first_loss_of_experiment_1_is_that_of_a_uniform_guess():
    """Of logits that are N(0, 0.02 sqrt(C)), whose spread costs half its square."""
    config = ModelConfig(attn='lora')
    out = LanguageModel(config)(token_ids(1, 512, vocab=4096), token_ids(1, 512, vocab=4096, seed=2))
    assert out.nll.item() / 512 == pytest.approx(math.log(4096) + 0.02 ** 2 * 384 / 2, abs=0.05)


def test_parameters_that_two_variants_share_start_equal():
    state = {attn: dict(LanguageModel(ModelConfig(**TINY, attn=attn), seed=7).named_parameters()) for attn in VARIANTS}
    for one, other in itertools.combinations(VARIANTS, 2):
        shared = [n for n in state[one] if n in state[other] and state[one][n].shape == state[other][n].shape]
        assert {'embed.weight', 'norm.weight', 'layers.1.moe.router.weight', 'layers.0.moe.gate_proj'} <= set(shared)
        assert all(torch.equal(state[one][n], state[other][n]) for n in shared)
    assert len({tuple(sorted((n, p.shape) for n, p in s.items())) for s in state.values()}) == len(VARIANTS)
    again = LanguageModel(ModelConfig(**TINY), seed=8)
    assert not torch.equal(again.embed.weight, state['baseline']['embed.weight'])


def test_a_parameter_starts_from_the_seed_and_its_name_alone():
    """Not from the global generator, the order or the sizes of the others."""
    torch.manual_seed(1)
    small = dict(LanguageModel(ModelConfig(**TINY), seed=3).named_parameters())
    torch.manual_seed(2)
    config = ModelConfig(**{**TINY, 'd_ff': 24, 'vocab_size': 99, 'n_layer': 4})
    large = dict(LanguageModel(config, seed=3).named_parameters())
    for name in ('layers.1.attn.q_proj.weight', 'layers.0.moe.router.weight', 'layers.1.attn.v_proj.weight'):
        assert torch.equal(small[name], large[name])
    o_proj = 'layers.1.attn.o_proj.weight'
    close(large[o_proj] * math.sqrt(2), small[o_proj], 1e-6)                # 4 layers, not 2
    for name, p in small.items():
        if p.dim() > 1 and 'o_proj' not in name and 'down' not in name:
            key = int.from_bytes(hashlib.sha256(f'3:{name}'.encode()).digest()[:7], 'little')
            draw = torch.empty(p.shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(key))
            assert torch.equal(p, draw)
    values = [p.flatten()[:4].tolist() for p in small.values() if p.dim() > 1]
    assert len({tuple(v) for v in values}) == len(values)   # no two alike


@every_variant
def test_every_parameter_gets_a_gradient_and_every_module_is_used(attn):
    for router, top_k in (('softmax', 2), ('sigmoid', 1)):
        config = ModelConfig(**{**TINY, 'top_k': top_k}, attn=attn, router=router, n_shared_expert=1)
        model, used = randomise(LanguageModel(config)).to(F64), set()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: used.add(name))
        out = model(token_ids(4, 16), token_ids(4, 16, seed=2))
        out.nll.backward()
        idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert not idle, idle
        routers = {f'layers.{i}.moe.router' for i in range(2)}  # its weight is read in float32, past its forward
        assert {name for name, m in model.named_modules() if not isinstance(m, nn.ModuleList)} - used <= routers


# ---------------------------------------------------------------------------------------------------------------------
# The head and its loss

def reference_loss(x, weight, targets):
    """Cross-entropy summed over targets that are not -1, one token at a time."""
    nll, correct = 0.0, 0
    for row, target in zip(x @ weight.T, targets.tolist()):
        if target >= 0:
            nll = nll + torch.log(torch.exp(row).sum()) - row[target]
            correct += int(row.argmax()) == target
    return nll, correct


@pytest.mark.parametrize('chunk', [1, 3, 7, 11, 100])
def test_the_fused_head_is_the_loss_summed_token_by_token_with_its_gradients(chunk):
    x, weight = numbers(11, 6).requires_grad_(), numbers(13, 6, seed=2).requires_grad_()
    targets = token_ids(11, vocab=13)
    targets[[0, 4, 5, 10]] = -1
    expected, correct = reference_loss(x, weight, targets)
    theirs = torch.autograd.grad(expected * 1.7, (x, weight))
    nll, hits = LinearCrossEntropy.apply(x, weight, targets, chunk, True)
    close(nll, expected, 1e-13)
    assert hits == correct
    for one, other in zip(torch.autograd.grad(nll * 1.7, (x, weight)), theirs):
        close(one, other, 1e-12)
    dx, = torch.autograd.grad(LinearCrossEntropy.apply(x, weight, targets, chunk, True)[0], x)
    assert not dx[targets < 0].any() and dx[targets >= 0].any(1).all()


@pytest.mark.parametrize('ignored', [(), (0, 3), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize('chunk', [1, 3, 5])
def test_the_fused_head_passes_gradcheck(ignored, chunk):
    x, weight, targets = numbers(5, 4).requires_grad_(), numbers(7, 4, seed=2).requires_grad_(), token_ids(5, vocab=7)
    targets[list(ignored)] = -1
    assert torch.autograd.gradcheck(lambda a, b: LinearCrossEntropy.apply(a, b, targets, chunk, True)[0], (x, weight))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_the_fused_head_is_cross_entropy_over_a_large_vocabulary(dtype, tolerance):
    x, weight, targets = numbers(40, 16).to(dtype), numbers(5003, 16, seed=2).to(dtype), token_ids(40, vocab=5003)
    targets[::7] = -1
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets, ignore_index=-1, reduction='sum')
    theirs = torch.autograd.grad(expected, wide)
    narrow = [t.clone().requires_grad_() for t in (x, weight)]
    nll, hits = LinearCrossEntropy.apply(*narrow, targets, 9, True)
    assert nll.dtype == torch.float32
    close(nll, expected, tolerance)
    for one, other in zip(torch.autograd.grad(nll, narrow), theirs):
        assert one.dtype == dtype
        close(one, other, 2 * tolerance)
    with torch.no_grad():
        again, _ = LinearCrossEntropy.apply(x, weight, targets, 9, False)
    assert torch.equal(again, nll)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_training_never_makes_a_tensor_of_tokens_times_vocabulary():
    N, V, C = 512, 20000, 8
    model = LanguageModel(ModelConfig(**{**TINY, 'vocab_size': V, 'n_embd': C, 'n_head': 1, 'block_size': 64}))
    with Largest() as largest:
        out = model(token_ids(8, 64, vocab=V), token_ids(8, 64, vocab=V, seed=2))
        out.nll.backward()
    assert 2 ** 20 < largest.elements <= 2 ** 22 < N * V    # 16 MiB of float32 at a time, as head_loss says
    with Largest() as largest:
        model(token_ids(8, 64, vocab=V))
    assert largest.elements == N * V                        # the plain logits: the instrument works


@every_variant
def test_the_output_of_training_is_cross_entropy_and_accuracy_of_the_logits(attn):
    model = randomise(LanguageModel(ModelConfig(**TINY, attn=attn))).to(F64)
    tokens, targets = token_ids(3, 16), token_ids(3, 16, seed=2)
    targets[0, :5] = targets[2, -1] = -1
    targets[1] = model(tokens)[1].argmax(-1)                # some that are right
    logits = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for training in (True, False):
        out = model.train(training)(tokens, targets)
        close(out.nll, expected, 1e-13)
        assert out.correct == (logits.argmax(-1) == targets)[targets >= 0].sum() and out.correct >= 16
        assert not out.correct.requires_grad
        for one, other in zip(torch.autograd.grad(out.nll, list(model.parameters())), theirs):
            close(one, other, 1e-11)
    with torch.no_grad():
        close(model(tokens, targets).nll, expected, 1e-13)


def test_losses_beside_the_cross_entropy_are_apart_from_it_and_kept_by_layer():
    """A coefficient of 0 leaves the same gradient, bit by bit. Layers collapsed onto other experts do not even out."""
    model = randomise(LanguageModel(ModelConfig(**{**TINY, 'top_k': 1})))
    tokens, targets = token_ids(3, 16), token_ids(3, 16, seed=2)
    out = model(tokens, targets)
    alone = torch.autograd.grad(out.nll, list(model.parameters()), retain_graph=True)
    weighted = torch.autograd.grad(out.nll + 0.0 * out.balance_loss + 0.0 * out.z_loss, list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(alone, weighted))
    assert out.load.shape == (2, 4) and out.load.sum(1).tolist() == [48, 48] and out.entropy.shape == (2,)
    with torch.no_grad():
        for layer in model.layers:                          # every token looks the same to the router
            layer.moe_norm.register_forward_hook(lambda module, args, y: torch.ones_like(y))
            layer.moe.router.weight.zero_()
        assert model(tokens, targets).balance_loss.item() == pytest.approx(1.0, abs=1e-6)       # even probabilities
        for i, layer in enumerate(model.layers):
            layer.moe.router.weight[i] = 10.0
        out = model(tokens, targets)
    assert out.load.tolist() == [[48, 0, 0, 0], [0, 48, 0, 0]]
    assert out.balance_loss.item() == pytest.approx(4.0, rel=1e-6)          # E / k; pooled over layers it would be 2


def test_sums_over_micro_batches_are_the_sums_of_the_batch():
    model = randomise(LanguageModel(ModelConfig(**TINY))).to(F64)
    tokens, targets = token_ids(6, 16), token_ids(6, 16, seed=2)
    whole = model(tokens, targets)
    parts = [model(t, y) for t, y in zip(tokens.split(2), targets.split(2))]
    close(sum(p.nll for p in parts), whole.nll, 1e-13)
    assert sum(p.correct for p in parts) == whole.correct and torch.equal(sum(p.load for p in parts), whole.load)
    for field in ('balance_loss', 'z_loss', 'entropy'):
        close(sum(getattr(p, field) for p in parts) / 3, getattr(whole, field), 1e-12)
    grads = [torch.autograd.grad(whole.nll, list(model.parameters()))]
    grads += [torch.autograd.grad(p.nll, list(model.parameters())) for p in parts]
    for whole_grad, *rest in zip(*grads):
        close(sum(rest), whole_grad, 1e-11)


@every_variant
def test_a_batch_is_memorised(attn):
    model = LanguageModel(ModelConfig(**{**TINY, 'vocab_size': 16}, attn=attn))
    tokens = token_ids(2, 17, vocab=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(300):
        out = model(tokens[:, :-1], tokens[:, 1:])
        loss = out.nll / 32
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and step > 5
    control = model(token_ids(2, 16, vocab=16, seed=5), token_ids(2, 16, vocab=16, seed=6)).nll / 32
    assert control > math.log(16)                           # learnt by heart: no better than a guess elsewhere


# ---------------------------------------------------------------------------------------------------------------------
# Text

def greedy(model, prompt, n):
    """By full forwards, with the window that generate() documents: when full, its newest half goes on."""
    size, window, text = model.config.block_size, list(prompt)[-model.config.block_size:], []
    for _ in range(n):
        if len(window) > size:
            window = window[-(size // 2):]
        with torch.no_grad():
            new = model(torch.tensor([window]))[0, -1].argmax().item()
        window.append(new)
        text.append(new)
    return text


def generated(model, prompts, n, **knobs):
    return torch.stack(list(model.generate(prompts, n, **knobs)), 1).tolist()


def text_model(attn, **knobs):
    return randomise(LanguageModel(ModelConfig(**TINY, attn=attn, **knobs))).to(F64).eval()


@every_variant
@pytest.mark.parametrize('static', [False, True])
def test_greedy_text_is_what_full_forwards_write_within_and_far_beyond_the_context(attn, static):
    model = text_model(attn)
    for length, n in ((1, 40), (15, 12), (16, 12), (40, 3)):
        prompt = token_ids(length, seed=length).tolist()
        assert generated(model, [prompt], n, temperature=0, static=static) == [greedy(model, prompt, n)]


@every_variant
@pytest.mark.parametrize('static', [False, True])
def test_prompts_of_different_lengths_are_continued_as_each_alone(attn, static):
    """As long as the longest fits: when its cache is rebuilt, all rows go on from their newest half."""
    model = text_model(attn, router='sigmoid')
    prompts = [token_ids(n, seed=n).tolist() for n in (3, 9, 1, 6)]
    together = generated(model, prompts, 8, temperature=0, static=static)
    assert together == [greedy(model, p, 8) for p in prompts]
    assert together == [generated(model, [p], 8, temperature=0)[0] for p in prompts]
    assert len({tuple(t) for t in together}) > 1


def test_sampling_follows_its_seed_its_temperature_and_its_top_k():
    model, prompts = text_model('lora'), [[1, 2, 3]] * 400
    first = generated(model, prompts, 1, temperature=1.5, top_k=3, seed=4)
    assert first == generated(model, prompts, 1, temperature=1.5, top_k=3, seed=4)
    assert first != generated(model, prompts, 1, temperature=1.5, top_k=3, seed=5)
    logits = model(torch.tensor([[1, 2, 3]]))[0, -1].detach()
    top = logits.topk(3).indices.tolist()
    p = (logits[top] / 1.5).softmax(-1)
    counts = np.array([sum(t == [i] for t in first) for i in top])
    assert counts.sum() == 400                              # nothing outside the three
    assert (abs(counts - 400 * p.numpy()) <= 4.5 * np.sqrt(400 * p.numpy() * (1 - p.numpy())) + 1).all()
    hot = generated(model, prompts, 1, temperature=100.0)
    assert len({t[0] for t in hot}) > 30                    # nearly uniform over 37
    assert generated(model, prompts[:2], 5, top_k=1) == generated(model, prompts[:2], 5, temperature=0)
    assert generated(model, prompts[:2], 3, top_k=1000, seed=2) == generated(model, prompts[:2], 3, seed=2)


def test_text_after_saving_and_loading_is_identical(tmp_path):
    for attn, router in (('enhanced', 'sigmoid'), ('gqa', 'softmax')):
        model = text_model(attn, router=router).float()
        checkpoint = {'model': model.state_dict(), 'config': dataclasses.asdict(model.config)}
        torch.save(checkpoint, tmp_path / 'checkpoint.pt')
        saved = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
        again = LanguageModel(ModelConfig(**saved['config']), seed=99)
        again.load_state_dict(saved['model'], strict=True)
        assert again.config == model.config
        assert torch.equal(again(token_ids(2, 16)), model(token_ids(2, 16)))
        assert generated(again, [[3, 1, 4], [1, 5]], 30, seed=1) == generated(model, [[3, 1, 4], [1, 5]], 30, seed=1)


def test_bad_requests_for_text_are_refused_in_one_line():
    model = text_model('mla')
    for prompts, knobs, words in (([], {}, 'prompt'), ([[1], []], {}, 'prompt'), ([[1]], dict(top_k=0), 'top_k'),
                                  ([[1]], dict(temperature=-1), 'temperature')):
        with pytest.raises(ValueError, match=words) as error:
            next(model.generate(prompts, 3, **knobs))
        assert '\n' not in str(error.value)
    cache = model.new_cache(1, 4)
    model.decode(token_ids(1, 3), cache)
    with pytest.raises(ValueError, match='4 slots, 3 of them filled'):
        model.decode(token_ids(1, 2), cache)
    assert cache.filled == 3                                # and the cache is as it was
    model.decode(token_ids(1, 1), cache)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations that make no model

BAD = [(dict(vocab_size=0), 'vocab_size'), (dict(block_size=0), 'block_size'), (dict(n_layer=0), 'n_layer'),
       (dict(d_ff=0), 'd_ff'), (dict(n_expert=0), 'n_expert'), (dict(top_k=0), 'top_k'), (dict(top_k=5), 'top_k'),
       (dict(n_shared_expert=-1), 'n_shared_expert'), (dict(router='tanh'), 'router'),
       (dict(rope_theta=1.0), 'rope_theta'), (dict(rope_original_context=0), 'rope_original_context'),
       (dict(n_embd=30), 'n_embd'), (dict(n_head=0), 'n_head'), (dict(n_embd=0), 'n_embd'), (dict(attn='lroa'), 'lora'),
       (dict(attn='gqa', n_kv_head=3), 'n_kv_head'), (dict(attn='gqa', n_kv_head=0), 'n_kv_head'),
       (dict(n_embd=24), 'n_embd'), (dict(attn='lora', n_kv_head=2), 'n_kv_head'),
       (dict(kv_lora_rank=8), 'kv_lora_rank'),
       (dict(attn='mla', q_lora_rank=-1), 'q_lora_rank'), (dict(attn='mla', kv_lora_rank=0), 'kv_lora_rank'),
       (dict(attn='mla', v_head_dim=0), 'v_head_dim'), (dict(attn='mla', qk_rope_head_dim=3), 'qk_rope_head_dim'),
       (dict(attn='mla', qk_rope_head_dim=0), 'qk_rope_head_dim'),
       (dict(attn='mla', qk_nope_head_dim=0), 'qk_nope_head_dim'), (dict(attn='lora', n_embd=8), 'n_embd'),
       (dict(rope_scaling='ntk'), 'rope_scaling'), (dict(rope_factor=0.5), 'rope_factor'),
       (dict(rope_factor=math.nan), 'rope_factor'), (dict(rope_factor=math.inf), 'rope_factor'),
       (dict(rope_scaling='dynamic', n_embd=16), 'rope_scaling'),
       (dict(attn='mla', rope_scaling='dynamic', qk_rope_head_dim=2), 'rope_scaling')]


@pytest.mark.parametrize('knobs, name', BAD, ids=str)
def test_a_configuration_that_makes_no_model_is_refused_in_one_line_that_names_the_knob(knobs, name):
    with pytest.raises(ValueError) as error:
        ModelConfig(**{**TINY, **knobs})
    assert name in str(error.value) and '\n' not in str(error.value)


def test_knobs_given_by_hand_override_the_row_and_leave_the_rest_of_it():
    row = ModelConfig(**TINY, attn='enhanced')
    config = ModelConfig(**TINY, attn='enhanced', rope_scaling='yarn', kv_lora_rank=7, attention_bias=False)
    assert (config.rope_scaling, config.kv_lora_rank, config.attention_bias) == ('yarn', 7, False)
    for knob in ('q_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim', 'rope_factor'):
        assert getattr(config, knob) == getattr(row, knob) is not None
    again = ModelConfig(**dataclasses.asdict(config))       # filled in, it is a fixed point: what a checkpoint stores
    assert again == config


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of the whole, compiling, other dtypes and devices

@every_variant
def test_the_whole_model_passes_gradcheck(attn):
    config = ModelConfig(**{**TINY, 'n_embd': 16, 'n_head': 2, 'd_ff': 4, 'vocab_size': 7, 'n_layer': 1}, attn=attn,
                         **({'n_kv_head': 1} if attn == 'gqa' else {}), rope_scaling='yarn', rope_factor=4.0)
    model = randomise(LanguageModel(config)).to(F64)
    names, weights = zip(*model.named_parameters())
    tokens, targets = token_ids(1, 4, vocab=7), token_ids(1, 4, vocab=7, seed=2)

    def function(*tensors):
        out = torch.func.functional_call(model, dict(zip(names, tensors)), (tokens, targets))
        return out.nll, out.balance_loss, out.z_loss
    assert torch.autograd.gradcheck(function, weights, fast_mode=True, atol=1e-7)


def losses_and_gradients(function, model, tokens, targets):
    model.zero_grad()
    out = function(tokens, targets)
    (out.nll / tokens.numel() + 0.01 * out.balance_loss + 0.001 * out.z_loss).backward()
    losses = out.nll.detach(), out.balance_loss.detach(), out.z_loss.detach()
    return [*losses, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize('attn', ['gqa', 'enhanced'])
def test_the_training_step_is_one_graph_that_is_captured_once(attn):
    """In bfloat16, GPUs' default: no graph break (fullgraph), no recompilation for new numbers, and the eager result.
    Captured, not compiled: seconds matter."""
    torch._dynamo.reset()
    model = LanguageModel(ModelConfig(**{**TINY, 'n_layer': 1}, attn=attn)).train()
    graphs = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for seed in range(3):
        tokens, targets = token_ids(2, 16, seed=seed), token_ids(2, 16, seed=seed + 9)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            eager = losses_and_gradients(model, model, tokens, targets)
            for one, other in zip(losses_and_gradients(compiled, model, tokens, targets), eager):
                close(one, other, 3e-2)
    assert graphs.frame_count == 1
    torch._dynamo.reset()


def test_a_training_step_captured_in_float32_gives_the_eager_losses_and_gradients():
    """The experts stay outside of the graphs: torch.compile knows their grouped product in bfloat16 alone."""
    torch._dynamo.reset()
    model = randomise(LanguageModel(ModelConfig(**{**TINY, 'n_layer': 1}, attn='mla', n_shared_expert=1)))
    compiled = torch.compile(model, backend='aot_eager')
    for seed in range(2):
        tokens, targets = token_ids(2, 16, seed=seed), token_ids(2, 16, seed=seed + 9)
        eager = losses_and_gradients(model, model, tokens, targets)
        for one, other in zip(losses_and_gradients(compiled, model, tokens, targets), eager):
            close(one, other, 1e-5)
    torch._dynamo.reset()


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))), reason='torch.compile needs a C++ compiler')
def test_compiled_attention_gives_the_eager_numbers_and_gradients():
    """All the way to machine code, for the part that is small enough to wait for."""
    torch._dynamo.reset()
    config = ModelConfig(**TINY, attn='enhanced')
    layer = randomise(LanguageModel(config)).layers[0].attn
    x, rope = numbers(2, 16, 32, dtype=torch.float32), rope_tables(config, torch.arange(16))
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        out = function(x, rope)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(layer.parameters()))])
    for one, other in zip(*results):
        close(one, other, 2e-5)
    torch._dynamo.reset()


def test_decoding_with_a_static_cache_is_captured_once_and_writes_the_same_text():
    torch._dynamo.reset()
    model = text_model('mla').bfloat16()
    graphs = torch._dynamo.testing.CompileCounterWithBackend('eager')
    trunk = torch.compile(model.trunk, backend=graphs, fullgraph=True, dynamic=False)
    for prompts in ([[5, 6, 7], [1, 2, 3]], [[5, 6, 8], [3, 2, 1]]):      # two rows: one alone has a path of its own in eager
        eager = generated(model, prompts, 12, temperature=0, static=True)
        assert generated(model, prompts, 12, temperature=0, static=True, trunk=trunk) == eager
        assert graphs.frame_count == 2                      # one graph for the prompt, one for all tokens after it
    torch._dynamo.reset()


@every_variant
def test_autocast_to_bfloat16_is_close_to_float32(attn):
    model = randomise(LanguageModel(ModelConfig(**TINY, attn=attn)))
    tokens, targets = token_ids(4, 16), token_ids(4, 16, seed=2)
    full = model(tokens, targets)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = model(tokens, targets)
    assert half.nll.dtype == half.balance_loss.dtype == half.z_loss.dtype == torch.float32
    assert half.nll.item() != full.nll.item() and half.nll.item() == pytest.approx(full.nll.item(), rel=2e-2)
    half.nll.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_moments_made_ahead_give_the_bits_of_moments_made_in_the_first_step():
    ahead, lazy = (LanguageModel(ModelConfig(**TINY, attn='enhanced')) for _ in range(2))
    optimizer, = ahead.configure_optimizers(1e-2)
    names = {id(p): n for n, p in ahead.named_parameters()}
    by_name = dict(lazy.named_parameters())
    groups = [{**g, 'params': [by_name[names[id(p)]] for p in g['params']]} for g in optimizer.param_groups]
    for model, opt in ((ahead, optimizer), (lazy, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True))):
        for seed in range(3):
            model(token_ids(4, 16, seed=seed), token_ids(4, 16, seed=seed + 9)).nll.backward()
            opt.step()
            opt.zero_grad()
    assert all(torch.equal(p, by_name[n]) for n, p in ahead.named_parameters())
    assert {p.ndim for g in optimizer.param_groups if g['weight_decay'] == 0 for p in g['params']} == {1}


def test_the_same_input_gives_the_same_bits():
    model, tokens, targets = LanguageModel(ModelConfig(**TINY)), token_ids(4, 16), token_ids(4, 16, seed=2)
    one, other = (losses_and_gradients(model, model, tokens, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@every_variant
@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
def test_on_cuda_in_bfloat16_losses_gradients_and_text_are_close_to_float32_on_the_cpu(attn, router):
    # all experts chosen: no choice can differ
    config = ModelConfig(**{**TINY, 'n_layer': 1, 'top_k': 4}, attn=attn, router=router)
    model = randomise(LanguageModel(config))
    tokens, targets = token_ids(4, 16), token_ids(4, 16, seed=2)
    full = losses_and_gradients(model, model, tokens, targets)
    logits = model(tokens).detach()
    model.to('cuda')
    with torch.autocast('cuda', dtype=torch.bfloat16):
        half = losses_and_gradients(model, model, tokens.cuda(), targets.cuda())
    for one, other in zip(half, full):
        assert torch.isfinite(one).all()
        if other.abs().max() > 1e-6:
            close(one, other, 8e-2)
    close(model(tokens.cuda()), logits, 1e-2)
    for dtype, tolerance in ((torch.float32, 1e-2), (torch.bfloat16, 5e-2)):
        model.to(dtype).eval()
        for static in (False, True):
            cache = model.new_cache(4, 16, static=static)
            parts = [model.decode(part, cache, last=False) for part in tokens.cuda().split([5, 1, 7, 1, 1, 1], 1)]
            close(torch.cat(parts, 1), logits, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_initial_numbers_do_not_depend_on_the_device():
    with torch.device('cuda'):
        there = LanguageModel(ModelConfig(**TINY), seed=3)
    here = LanguageModel(ModelConfig(**TINY), seed=3)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there.parameters(), here.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@every_variant
def test_compiled_on_cuda_a_training_step_is_captured_once_and_close_to_eager(attn):
    torch._dynamo.reset()
    model = randomise(LanguageModel(ModelConfig(**TINY, attn=attn))).cuda()
    graphs = torch._dynamo.testing.CompileCounterWithBackend('inductor')
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for seed in range(3):
        tokens, targets = token_ids(2, 16, seed=seed).cuda(), token_ids(2, 16, seed=seed + 9).cuda()
        eager = losses_and_gradients(model, model, tokens, targets)
        for one, other in zip(losses_and_gradients(compiled, model, tokens, targets), eager):
            close(one, other, 1e-2)
    assert graphs.frame_count == 1
    torch._dynamo.reset()
