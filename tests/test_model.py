"""model.py: what a model costs is counted in closed form, its first and last losses are what theory and a memorised
batch say, compiling changes nothing.

The closed forms are written out below from the equations of attention and experts, not read off the module. Attention,
experts and the loss by themselves are held to their equations in test_attention.py, test_moe.py and test_kernels.py.
"""
import copy
import dataclasses
import hashlib
import math
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import model as model_file
from attention import rope_tables
from model import LanguageModel, ModelConfig
from muon import Muon, configure_optimizers
from tensors import BF16, F32, F64, close, numbers, randomise, token_ids

VARIANTS = ('baseline', 'gqa', 'mqa', 'lora', 'enhanced', 'mla')
every_variant = pytest.mark.parametrize('attn', VARIANTS)
TINY = dict(vocab_size=31, block_size=16, n_layer=2, n_head=8, n_embd=32, d_ff=16, n_expert=4, top_k=2)
# one knob of each kind that adds or moves parameters
MORE = dict(n_layer=3, n_dense_layer=1, tie_embeddings=False, n_shared_expert=1, router='sigmoid')


def more_of(attn):
    """MORE, and what else this variant may have."""
    own = {'qk_norm': True} if attn in ('baseline', 'gqa', 'mqa') else {'q_lora_rank': 5}
    return {**MORE, 'attention_bias': True, **own}


def random_model(attn='baseline', dtype=F64, **knobs):
    return randomise(LanguageModel(ModelConfig(**{**TINY, 'attn': attn, **knobs}))).to(dtype)


def batch(rows=3, length=16):
    return token_ids(rows, length), token_ids(rows, length, seed=2)


# ---------------------------------------------------------------------------------------------------------------------
# Counts, in closed form

# q rank, kv rank, nope, rope, v, biases at the sizes that are counted
LATENT = {(384, 8, 'lora'): (32, 64, 16, 32, 48, False), (384, 8, 'enhanced'): (32, 64, 48, 32, 48, True),
          (384, 8, 'mla'): (0, 96, 48, 24, 48, False), (32, 8, 'lora'): (2, 5, 2, 2, 4, False),
          (32, 8, 'enhanced'): (2, 5, 4, 2, 4, True), (32, 8, 'mla'): (0, 8, 4, 2, 4, False)}


def attention_costs(C, H, attn):
    """One layer's parameters, multiply-adds for a pair of tokens, numbers cached for a token."""
    d = C // H
    if attn in ('baseline', 'gqa', 'mqa'):
        G = {'baseline': H, 'gqa': max(1, H // 4), 'mqa': 1}[attn]
        return C * H * d + 2 * C * G * d + H * d * C, 2 * C, 2 * G * d
    rq, r, dn, dr, dv, bias = LATENT[C, H, attn]
    queries = C * rq + rq + rq * H * (dn + dr) if rq else C * H * (dn + dr)
    count = queries + C * (r + dr) + r + r * H * (dn + dv) + H * dv * C
    return count + (rq + r + dr + C if bias else 0), H * (dn + dr + dv), r + dr


EXPERIMENT_1 = dict(vocab_size=4096, block_size=512, n_layer=6, n_head=8, n_embd=384, d_ff=1536, n_expert=8, top_k=2)
SIZES = {'experiment-1': EXPERIMENT_1, 'shared': dict(TINY, n_layer=3, top_k=3, n_shared_expert=2),
         'sigmoid, dense, untied': dict(TINY, **MORE),
         'dense of a width, one choice': dict(TINY, n_dense_layer=1, d_ff_dense=50, top_k=1)}


def empty_model(**knobs):
    """Names and shapes only, of a model of any size."""
    with torch.device('meta'):
        return LanguageModel(ModelConfig(**knobs), seed=None)


@pytest.mark.parametrize('size', SIZES)
@every_variant
def test_parameters_flops_and_cache_are_the_closed_forms(attn, size):
    size = SIZES[size]
    C, H, L, E, k, V = (size[n] for n in ('n_embd', 'n_head', 'n_layer', 'n_expert', 'top_k', 'vocab_size'))
    shared, D, one_expert = size.get('n_shared_expert', 0), size.get('n_dense_layer', 0), 3 * C * size['d_ff']
    a, pair, kept = attention_costs(C, H, attn)
    dense = 3 * C * size['d_ff_dense'] if 'd_ff_dense' in size else (k + shared) * one_expert
    tables = V * C * (1 if size.get('tie_embeddings', True) else 2)                 # the tied head once
    always = D * dense + (L - D) * shared * one_expert
    total = tables + L * a + always + (L - D) * (E * one_expert + E * C) + L * 2 * C + C
    active = total - (L - D) * (E - k) * one_expert
    model = empty_model(**size, attn=attn)
    assert model.parameter_counts() == {
        'params_total': total, 'params_active': active, 'params_embedding': tables, 'params_attention': L * a,
        'params_experts': (L - D) * E * one_expert, 'params_shared': always, 'params_router': (L - D) * E * C,
        'params_norm': L * 2 * C + C}
    assert total == sum(p.numel() for p in model.parameters())
    looked_up = tables - V * C                                                      # costs no product
    assert model.flops_per_token() == 6 * (active - looked_up) + 6 * L * size['block_size'] * pair
    for dtype, nbytes in ((F32, 4), (BF16, 2)):
        assert model.cache_bytes_per_token(dtype) == L * kept * nbytes


def test_experiment_1_has_the_numbers_that_the_published_code_has_per_layer():
    """C = 384, 8 heads, 8 experts of 1536: attention 589,824, experts and router 9,440,256 (8 x 3 matrices + 3,072)."""
    assert ModelConfig() == ModelConfig(**EXPERIMENT_1)
    counts = empty_model().parameter_counts()
    assert counts['params_attention'] == 6 * 589_824 and counts['params_embedding'] == 4096 * 384
    assert counts['params_router'] == 6 * 8 * 384 and counts['params_experts'] == 6 * 8 * 3 * 384 * 1536
    assert counts['params_total'] - counts['params_active'] == 6 * 6 * 3 * 384 * 1536   # 6 of 8 idle in 6 layers


def test_deepseek_v3s_attention_has_its_published_size():
    model = empty_model(n_embd=7168, n_head=128, n_layer=1, d_ff=1, n_expert=1, top_k=1, attn='mla', q_lora_rank=1536,
                        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    assert model.parameter_counts()['params_attention'] == 187_107_328
    assert model.cache_bytes_per_token(BF16) == 70_272 // 61                    # which is 61 layers'


def test_layers_with_different_attentions_are_counted_as_they_are():
    """Every cost is a sum over layers, so half of one and half of the other is their mean."""
    one, other, mixed = (random_model(attn) for attn in ('baseline', 'mla', 'baseline'))
    mixed.layers[1].attn = other.layers[1].attn
    costs = [[m.flops_per_token(), m.parameter_counts()['params_total'], m.cache_bytes_per_token(F32)]
             for m in (one, other, mixed)]
    assert [2 * cost for cost in costs[2]] == [a + b for a, b in zip(*costs[:2])] and costs[0] != costs[1]


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation

@every_variant
def test_every_parameter_starts_as_the_table_says_from_its_seed_and_its_name_alone(attn):
    """Not from the global generator, the order or the variant: what two variants share starts equal."""
    drawn = {}
    for name, p in LanguageModel(ModelConfig(**{**TINY, **more_of(attn)}, attn=attn), seed=3).named_parameters():
        if 'norm' in name.split('.')[-2]:
            assert (p == 1).all(), name
        elif name.endswith('bias') or 'o_proj' in name or 'down_proj' in name:
            assert (p == 0).all(), name
        else:
            std = 0.02 if name.startswith(('embed', 'lm_head')) or 'router' in name else p.shape[-1] ** -0.5
            key = int.from_bytes(hashlib.sha256(f'3:{name}'.encode()).digest()[:7], 'little')
            drawn[name] = torch.empty(p.shape).normal_(0.0, std, generator=torch.Generator().manual_seed(key))
            assert torch.equal(p, drawn[name]), name
    assert len({tuple(p.flatten()[:4].tolist()) for p in drawn.values()}) == len(drawn) > 10    # no two alike


def test_at_first_every_block_is_the_identity():
    for knobs in ({}, MORE):
        model, tokens = LanguageModel(ModelConfig(**{**TINY, **knobs})), token_ids(2, 9)
        assert torch.equal(model(tokens), model.head(model.norm(model.embed(tokens))))


# of a small model with all defaults, as they were when the reference curve was recorded
WEIGHTS = {'baseline': 'b350d1859a197c25', 'mla': '6d2a550744c82512'}


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'), reason='other last bits of log')
@pytest.mark.parametrize('attn', WEIGHTS)
def test_names_and_initial_weights_are_those_that_results_and_checkpoints_rest_on(attn):
    """They change only with a change that means to change them, and then tests/reference_curve.json does too."""
    config = ModelConfig(attn=attn, n_layer=2, n_head=4, n_embd=96, d_ff=64, vocab_size=128, block_size=32)
    digest = hashlib.sha256()
    for name, p in LanguageModel(config, seed=1).named_parameters():
        digest.update(name.encode() + p.detach().numpy().tobytes())
    assert digest.hexdigest()[:16] == WEIGHTS[attn]


def test_a_parameter_without_a_rule_is_an_error(monkeypatch):
    class Extra(model_file.Block):
        def __init__(self, *args, **knobs):
            super().__init__(*args, **knobs)
            self.mystery = nn.Parameter(torch.zeros(3))
    monkeypatch.setattr(model_file, 'Block', Extra)
    with pytest.raises(ValueError, match='mystery'):
        LanguageModel(ModelConfig(**TINY))
    LanguageModel(ModelConfig(**TINY), seed=None)           # nothing is initialised


@every_variant
@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
def test_the_first_loss_is_that_of_a_uniform_guess(attn, router):
    """Of logits that are N(0, 0.02 sqrt(C)), whose spread costs half its square."""
    config = ModelConfig(**{**TINY, 'vocab_size': 1024, 'n_embd': 64, 'n_layer': 4}, attn=attn, router=router)
    out = LanguageModel(config)(token_ids(32, 16, vocab=1024), token_ids(32, 16, vocab=1024, seed=2))
    assert out.nll.item() / 512 == pytest.approx(math.log(1024) + 0.02 ** 2 * 64 / 2, abs=0.05)
    assert out.load.min() > 0  # a router of zeros would send every token to the same experts


@every_variant
@pytest.mark.parametrize('top_k', [1, 2])
def test_every_parameter_gets_a_gradient_and_every_module_is_used(attn, top_k):
    model, used = random_model(attn, top_k=top_k, **(more_of(attn) if top_k == 1 else {})), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: used.add(name))
    model(*batch(4)).nll.backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not idle, idle
    unused = {name for name, m in model.named_modules() if not isinstance(m, nn.ModuleList)} - used
    assert all(name.endswith(('router', 'lm_head')) for name in unused)     # whose weight is read past their forward


# ---------------------------------------------------------------------------------------------------------------------
# Losses

@every_variant
@pytest.mark.parametrize('knobs', [dict(), MORE, dict(n_dense_layer=2)], ids=['', 'more', 'dense'])
def test_the_output_of_training_is_cross_entropy_and_accuracy_of_the_logits(attn, knobs):
    model, (tokens, targets) = random_model(attn, **knobs), batch()
    targets[0, :5] = targets[2, -1] = -1
    targets[1] = model(tokens)[1].argmax(-1)                # some that are right
    logits, weights = model(tokens), list(model.parameters())
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')
    theirs = torch.autograd.grad(expected, weights)
    for training in (True, False):
        out = model.train(training)(tokens, targets)
        close(out.nll, expected, 1e-13)
        assert out.correct == (logits.argmax(-1) == targets)[targets >= 0].sum() and out.correct >= 16
        assert not out.correct.requires_grad
        for one, other in zip(torch.autograd.grad(out.nll, weights), theirs):
            close(one, other, 1e-11)
    with torch.no_grad():
        close(model(tokens, targets).nll, expected, 1e-13)


def test_losses_beside_the_cross_entropy_are_apart_from_it_and_summed_over_layers():
    """A coefficient of 0 leaves the same gradient, bit by bit. Layers collapsed onto other experts do not even out."""
    model, (tokens, targets) = random_model(dtype=F32, top_k=1, n_layer=3, n_dense_layer=1), batch()
    out, weights = model(tokens, targets), list(model.parameters())
    alone = torch.autograd.grad(out.nll, weights, retain_graph=True)
    weighted = torch.autograd.grad(out.nll + 0.0 * out.balance_loss + 0.0 * out.z_loss, weights)
    assert all(torch.equal(one, other) for one, other in zip(alone, weighted))
    assert out.load.shape == (2, 4) and out.load.sum(1).tolist() == [48, 48] and out.entropy.shape == (2,)
    with torch.no_grad():
        for layer in model.layers[1:]:                      # every token looks the same to the router
            layer.moe_norm.register_forward_hook(lambda module, args, y: torch.ones_like(y))
            layer.moe.router.weight.zero_()
        out = model(tokens, targets)                        # even probabilities, in two layers
        assert out.balance_loss.item() == pytest.approx(2.0, abs=1e-6)
        assert out.z_loss.item() == pytest.approx(2 * math.log(4) ** 2)
        for i, layer in enumerate(model.layers[1:]):
            layer.moe.router.weight[i] = 10.0
        out = model(tokens, targets)
    assert out.load.tolist() == [[48, 0, 0, 0], [0, 48, 0, 0]]
    assert out.balance_loss.item() == pytest.approx(2 * 4.0, rel=1e-6)      # E / k a layer; pooled it would be 2


def test_a_model_of_dense_layers_alone_has_no_router_and_no_losses_of_one():
    model = random_model(n_dense_layer=2)
    out = model(*batch())
    assert out.balance_loss == out.z_loss == 0 and out.load.shape == (0, 4) and out.entropy.shape == (0,)
    assert not [name for name, _ in model.named_parameters() if 'moe' in name]
    x = numbers(2, 3, 32)
    g, u, d = (p.detach() for p in model.layers[1].mlp.parameters())
    assert g.shape == u.shape == d.T.shape == (2 * 16, 32)
    close(model.layers[1].mlp(x), (F.silu(x @ g.T) * (x @ u.T)) @ d.T, 1e-13)


def test_sums_over_micro_batches_are_the_sums_of_the_batch():
    model, (tokens, targets) = random_model(), batch(6)
    whole = model(tokens, targets)
    parts = [model(t, y) for t, y in zip(tokens.split(2), targets.split(2))]
    close(sum(p.nll for p in parts), whole.nll, 1e-13)
    assert sum(p.correct for p in parts) == whole.correct and torch.equal(sum(p.load for p in parts), whole.load)
    for field in ('balance_loss', 'z_loss', 'entropy'):
        close(sum(getattr(p, field) for p in parts) / 3, getattr(whole, field), 1e-12)
    for whole_grad, *rest in zip(*(torch.autograd.grad(out.nll, list(model.parameters())) for out in (whole, *parts))):
        close(sum(rest), whole_grad, 1e-11)


@pytest.mark.parametrize('attn, knobs', [*((attn, {}) for attn in VARIANTS), ('mla', MORE)], ids=str)
def test_a_batch_is_memorised_and_every_parameter_learns(attn, knobs):
    model = LanguageModel(ModelConfig(**{**TINY, 'vocab_size': 16, **knobs}, attn=attn))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = token_ids(2, 17, vocab=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(300):
        loss = model(tokens[:, :-1], tokens[:, 1:]).nll / 32
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and step > 5
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]    # all woke
    control = model(token_ids(2, 16, vocab=16, seed=5), token_ids(2, 16, vocab=16, seed=6)).nll / 32
    assert control > math.log(16)                           # learnt by heart: no better than a guess elsewhere


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

@every_variant
def test_for_decoding_everything_is_in_the_dtype_but_gains_router_and_selection_bias(attn):
    model, (tokens, _) = random_model(attn, F32, **MORE, top_k=4), batch()
    full, before = model(tokens).detach(), {name: t.clone() for name, t in model.state_dict().items()}
    assert model.for_decoding(BF16) is model
    assert all(torch.equal(t, before[name].to(t.dtype)) for name, t in model.state_dict().items())  # none was rounded first
    wide = {name for name, t in model.state_dict().items() if t.dtype == F32}
    assert wide == {name for name in model.state_dict() if 'norm' in name or 'router' in name or 'e_score' in name}
    assert {t.dtype for t in model.state_dict().values()} == {F32, BF16}
    cache = model.new_cache(3, 16)
    assert {t.dtype for layer in cache.layers for t in layer.tensors} == {BF16}
    parts = [model.decode(part, cache, last=False) for part in tokens.split([5, 1, 7, 3], 1)]
    assert parts[0].dtype == F32
    close(torch.cat(parts, 1), copy.deepcopy(model).float()(tokens), 1e-1)     # the same weights, computed with in float32
    assert (torch.cat(parts, 1) - full).abs().mean() < 1e-2 * full.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Configurations that make no model

SIGMOID = dict(router='sigmoid', n_expert_group=4, top_k_group=4)
BAD = [(dict(vocab_size=0), 'vocab_size'), (dict(block_size=0), 'block_size'), (dict(n_layer=0), 'n_layer'),
       (dict(d_ff=0), 'd_ff'), (dict(n_expert=0), 'n_expert'), (dict(top_k=0), 'top_k'), (dict(top_k=5), 'top_k'),
       (dict(n_shared_expert=-1), 'n_shared_expert'), (dict(router='tanh'), 'router'),
       (dict(n_dense_layer=-1), 'n_dense_layer'), (dict(d_ff_dense=-1), 'd_ff_dense'),
       (dict(n_expert_group=0), 'n_expert_group'), (dict(top_k_group=0), 'top_k_group'),
       (dict(n_expert_group=3), 'n_expert_group'), (dict(n_expert_group=2, top_k_group=3), 'top_k_group'),
       (dict(n_expert_group=4), 'top_k_group'), (SIGMOID, 'n_expert_group'),
       (dict(norm_eps=-1.0), 'norm_eps'), (dict(norm_eps=math.nan), 'norm_eps'),
       (dict(rope_theta=1.0), 'rope_theta'), (dict(rope_original_context=0), 'rope_original_context'),
       (dict(rope_beta_slow=0), 'rope_beta_slow'), (dict(rope_beta_slow=33), 'rope_beta_fast'),
       (dict(n_embd=30), 'n_embd'), (dict(n_head=0), 'n_head'), (dict(n_embd=0), 'n_embd'), (dict(attn='lroa'), 'lora'),
       (dict(attn='gqa', n_kv_head=3), 'n_kv_head'), (dict(attn='gqa', n_kv_head=0), 'n_kv_head'),
       (dict(n_embd=24), 'n_embd'), (dict(attn='lora', n_kv_head=2), 'n_kv_head'), (dict(head_dim=0), 'head_dim'),
       (dict(head_dim=7), 'head_dim'), (dict(attn='mla', head_dim=8), 'head_dim'),
       (dict(attn='mla', qk_norm=True), 'qk_norm'),
       (dict(kv_lora_rank=8), 'kv_lora_rank'),
       (dict(attn='mla', q_lora_rank=-1), 'q_lora_rank'), (dict(attn='mla', kv_lora_rank=0), 'kv_lora_rank'),
       (dict(attn='mla', v_head_dim=0), 'v_head_dim'), (dict(attn='mla', qk_rope_head_dim=3), 'qk_rope_head_dim'),
       (dict(attn='mla', qk_rope_head_dim=0), 'qk_rope_head_dim'),
       (dict(attn='mla', qk_nope_head_dim=0), 'qk_nope_head_dim'), (dict(attn='lora', n_embd=8), 'n_embd'),
       (dict(rope_scaling='ntk'), 'rope_scaling'), (dict(rope_factor=0.5), 'rope_factor'),
       (dict(rope_factor=math.nan), 'rope_factor'), (dict(rope_factor=math.inf), 'rope_factor'),
       (dict(rope_factor=2.0), 'rope_factor (2.0) means nothing to rope_scaling=default'),
       (dict(rope_scaling='linear'), 'changes nothing at rope_factor=1'), (dict(rope_scaling='yarn'), 'changes nothing at rope_factor=1'),
       (dict(rope_attention_factor=1.2, rope_scaling='linear'), 'rope_attention_factor means nothing to rope_scaling=linear'),
       *((dict(rope_attention_factor=x, rope_scaling='yarn'), 'rope_attention_factor must be above 0')
         for x in (0.0, -1.0, math.nan, math.inf)),
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
    assert ModelConfig(**TINY, attn='enhanced', rope_scaling='default', rope_factor=1.0).rope_factor == 1.0
    again = ModelConfig(**dataclasses.asdict(config))       # filled in, it is a fixed point: what a checkpoint stores
    assert again == config
    widths = [ModelConfig(**TINY, **knobs).d_ff_dense for knobs in (dict(n_shared_expert=1), dict(d_ff_dense=5))]
    assert widths == [3 * 16, 5]


def test_norm_eps_reaches_every_norm_but_those_of_the_latents():
    for attn, knobs in (('baseline', dict(qk_norm=True)), ('lora', {})):
        model = random_model(attn, norm_eps=0.5, n_dense_layer=1, **knobs)
        norms = {name: m.eps for name, m in model.named_modules() if hasattr(m, 'eps')}
        assert norms == {name: 1e-6 if name.endswith('layernorm') else 0.5 for name in norms} and len(norms) == 9


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers

def test_every_parameter_has_one_owner_and_decays_only_if_it_is_a_matrix():
    model = random_model('enhanced', F32, **MORE)
    names = {id(p): name for name, p in model.named_parameters()}
    for muon in (False, True):
        groups = [g for optimizer in configure_optimizers(model, 0.01, muon=muon) for g in optimizer.param_groups]
        owned = [names[id(p)] for g in groups for p in g['params']]
        assert sorted(owned) == sorted(names.values())
        assert all((g['weight_decay'] > 0) == (p.ndim > 1) for g in groups for p in g['params'])
    adamw, orthogonal = configure_optimizers(model, 0.01, muon=True)
    assert isinstance(orthogonal, Muon)
    by_muon = {names[id(p)] for g in orthogonal.param_groups for p in g['params']}
    assert by_muon == {name for name, p in model.named_parameters()
                       if p.ndim > 1 and name.startswith('layers') and 'router' not in name}


def test_moments_made_ahead_give_the_bits_of_moments_made_in_the_first_step():
    ahead, lazy = random_model('enhanced', F32), random_model('enhanced', F32)
    optimizer, = configure_optimizers(ahead, 1e-2)
    names, by_name = {id(p): n for n, p in ahead.named_parameters()}, dict(lazy.named_parameters())
    groups = [{**g, 'params': [by_name[names[id(p)]] for p in g['params']]} for g in optimizer.param_groups]
    for model, opt in ((ahead, optimizer), (lazy, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True))):
        for seed in range(3):
            model(token_ids(4, 16, seed=seed), token_ids(4, 16, seed=seed + 9)).nll.backward()
            opt.step()
            opt.zero_grad()
    assert all(torch.equal(p, by_name[n]) for n, p in ahead.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of the whole, compiling, other dtypes and devices

@every_variant
def test_the_whole_model_passes_gradcheck(attn):
    """With both routers' losses: softmax in half of the variants, sigmoid and groups in the others."""
    heads = attn in ('baseline', 'gqa', 'mqa')
    sizes = dict(n_embd=16, n_head=2, d_ff=4, vocab_size=7, n_layer=2, rope_scaling='yarn', rope_factor=4.0)
    latent = dict(n_expert_group=2, norm_topk_prob=False, qk_rope_head_dim=4)
    multi_head = dict(router='softmax', n_kv_head=1)
    model = random_model(attn, **{**more_of(attn), **sizes, **(multi_head if heads else latent)})
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


def check_compiled(model, compiled, tolerance, seeds=3, device='cpu'):
    for seed in range(seeds):
        tokens, targets = (token_ids(2, 16, seed=s).to(device) for s in (seed, seed + 9))
        eager = losses_and_gradients(model, model, tokens, targets)
        for one, other in zip(losses_and_gradients(compiled, model, tokens, targets), eager):
            close(one, other, tolerance)


@pytest.mark.parametrize('attn', ['gqa', 'enhanced'])
def test_the_training_step_is_one_graph_that_is_captured_once(attn, dynamo):
    """In bfloat16, GPUs' default: no graph break (fullgraph), no recompilation for new numbers, and the eager result.
    Captured, not compiled: seconds matter. All experts chosen: no rounding makes another choice."""
    model, graphs = random_model(attn, F32, n_layer=1, top_k=4), dynamo('aot_eager')
    with torch.autocast('cpu', dtype=BF16):
        check_compiled(model, torch.compile(model, backend=graphs, fullgraph=True), 8e-2)
    assert graphs.frame_count == 1


def test_a_training_step_captured_in_float32_gives_the_eager_losses_and_gradients(dynamo):
    """The experts stay outside of the graphs: torch.compile knows their grouped product in bfloat16 alone."""
    model = random_model('mla', F32, n_layer=1, n_shared_expert=1)
    check_compiled(model, torch.compile(model, backend='eager'), 1e-5, seeds=2)


def test_in_float32_no_batch_is_captured_anew_whatever_it_sends_to_which_expert(dynamo):
    model, graphs, counts = random_model('mla', F32, n_layer=1), dynamo('eager'), []
    compiled = torch.compile(model, backend=graphs)
    for seed in range(4):
        tokens = torch.randint(model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))
        compiled(tokens[:, :-1], tokens[:, 1:]).nll.backward()
        counts.append(graphs.frame_count)
    assert counts[1:] == counts[:1] * 3


def test_attention_over_another_length_is_captured_whole(dynamo):
    attention = torch.compile(kernels.attention, backend=dynamo('eager'), fullgraph=True)
    for T in (16, 12, 9, 1):
        q, k, v = (numbers(2, 4, T, 8, seed=seed) for seed in (1, 2, 3))
        close(attention(q, k, v, 0.3, 'causal'), kernels.attention(q, k, v, 0.3, 'causal'), 1e-12)


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))), reason='torch.compile needs a C++ compiler')
def test_compiled_attention_gives_the_eager_numbers_and_gradients(dynamo):
    """All the way to machine code, for the part that is small enough to wait for."""
    model = random_model('enhanced', F32)
    layer, x, rope = model.layers[0].attn, numbers(2, 16, 32, dtype=F32), rope_tables(model.config, torch.arange(16))
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        out = function(x, rope)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(layer.parameters()))])
    for one, other in zip(*results):
        close(one, other, 2e-5)


def test_initial_numbers_depend_neither_on_the_device_nor_on_the_default_dtype():
    weights = lambda: [p.cpu().double() for p in LanguageModel(ModelConfig(**TINY), seed=3).parameters()]
    here = weights()
    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):
        assert all(map(torch.equal, weights(), here))
    torch.set_default_dtype(F64)
    try:
        assert all(map(torch.equal, weights(), here))
    finally:
        torch.set_default_dtype(F32)


@pytest.mark.parametrize('device', ['cuda', 'mps'])
@pytest.mark.parametrize('scaling', [dict(), dict(rope_scaling='yarn', rope_factor=4.0)], ids=['', 'yarn'])
@every_variant
def test_on_a_gpu_losses_gradients_and_logits_of_decoding_are_close_to_float32_on_the_cpu(attn, scaling, device):
    if not getattr(torch, device).is_available():
        pytest.skip(f'needs a device: {device}')
    model, (tokens, targets) = random_model(attn, F32, **MORE, top_k=4, **scaling), batch(4)    # no choice can differ
    full = losses_and_gradients(model, model, tokens, targets)
    logits = model(tokens).detach()
    model.to(device)
    with torch.autocast(device, dtype=BF16, enabled=device == 'cuda'):
        half = losses_and_gradients(model, model, tokens.to(device), targets.to(device))
    for one, other in zip(half, full):
        close(one, other, 8e-2)
    close(model(tokens.to(device)), logits, 1e-2)
    for dtype, tolerance in ((F32, 1e-2), (BF16, 8e-2)):
        model.for_decoding(dtype)
        for static in (False, True):
            cache = model.new_cache(4, 16, static=static)
            parts = [model.decode(part, cache, last=False) for part in tokens.to(device).split([5, 1, 7, 1, 1, 1], 1)]
            close(torch.cat(parts, 1), logits, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@every_variant
def test_compiled_on_cuda_a_training_step_is_captured_once_and_close_to_eager(attn, dynamo):
    model, graphs = random_model(attn, F32).cuda(), dynamo('inductor')
    check_compiled(model, torch.compile(model, backend=graphs, fullgraph=True), 1e-2, device='cuda')
    assert graphs.frame_count == 1
