"""attention.py against its equations, written out once more in float64 with plain loops, and against what must hold of
any attention: no look at later tokens, positions that only count relatively, and a cache that changes nothing.

Held to the sources that attention.py names: RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071), grouped queries (arXiv
2305.13245), latent attention (arXiv 2405.04434, eq. 9-19). Norm gains and biases are random here: 1 and 0 hide errors.
Tolerances are relative to the largest number compared: 1e-12 in float64, 1e-5 in float32, 2e-2 in bfloat16.
"""
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention
import kernels
from attention import (LatentAttention, attention_scale, build_attention, rope_frequencies, rope_tables,
                       variants, yarn_mscale)
from decoding import Cache
from model import LanguageModel, ModelConfig
from tensors import BF16, F32, F64, close, numbers, printed_by, randomise, token_ids

# heads of 12 dims; an epsilon that shows which norm has it; experts only where a test asks for them: test_moe.py has theirs
SIZES = dict(vocab_size=31, block_size=32, n_layer=2, n_dense_layer=2, n_head=4, n_embd=48, d_ff=16, n_expert=4, top_k=2,
             norm_eps=0.01)

# every variant, and the knobs that take other branches
ROWS = {'baseline': dict(attn='baseline'), 'baseline+bias': dict(attn='baseline', attention_bias=True),
        'baseline+norm': dict(attn='baseline', qk_norm=True), 'gqa': dict(attn='gqa', n_kv_head=2),
        'mqa': dict(attn='mqa'), 'gqa-wide-heads': dict(attn='gqa', n_kv_head=2, head_dim=18, qk_norm=True),
        'lora': dict(attn='lora'), 'enhanced': dict(attn='enhanced'), 'mla': dict(attn='mla'),
        'mla-q-rank': dict(attn='mla', q_lora_rank=14), 'enhanced-no-q-rank': dict(attn='enhanced', q_lora_rank=0),
        'mla-wide-values': dict(attn='mla', v_head_dim=26), 'mla-large-rank': dict(attn='mla', kv_lora_rank=40)}
VARIANTS = ('baseline', 'gqa', 'mqa', 'lora', 'enhanced', 'mla')
LATENT = [name for name, row in ROWS.items() if row['attn'] in ('lora', 'enhanced', 'mla')]
# base 100 and 512 tokens put several pairs onto yarn's ramp, at dr = 6 as at 12
YARN = dict(rope_scaling='yarn', rope_factor=8.0, rope_original_context=512, rope_theta=100.0)
SCALINGS = {'default': dict(rope_scaling='default'), 'linear': dict(rope_scaling='linear', rope_factor=2.5),
            'dynamic-within': dict(rope_scaling='dynamic', rope_factor=3.0, rope_original_context=64),
            'dynamic-beyond': dict(rope_scaling='dynamic', rope_factor=3.0, rope_original_context=5),
            'yarn': dict(YARN, rope_mscale=0.707, rope_mscale_all_dim=1.3),
            'yarn-by-hand': dict(YARN, rope_attention_factor=1.1, rope_mscale_all_dim=0.8)}
everywhere = pytest.mark.parametrize('row, scaling', list(itertools.product(ROWS, SCALINGS)))
each_row, each_latent = pytest.mark.parametrize('row', ROWS), pytest.mark.parametrize('row', LATENT)


def config_of(row, scaling='default', **knobs):
    return ModelConfig(**{**SIZES, **ROWS[row], **SCALINGS[scaling], **knobs})


def layer_of(config, dtype=F64):
    return randomise(build_attention(config)).to(dtype)


def model_of(config, dtype=F64):
    return randomise(LanguageModel(config)).to(dtype)


def run_layer(layer, config, x, shift=0):
    """The layer as training calls it, on tokens at positions shift, shift + 1, ..."""
    T = x.size(1)
    return layer(x, rope_tables(config, torch.arange(shift, shift + T, device=x.device), T, kernels.wide(x.dtype)))


def run_cached(layer, config, x, sizes, capacity=None):
    """The same over a cache, so many tokens at a time -> outputs, and the cache."""
    capacity, outs = capacity or x.size(1), []
    cache = Cache([layer.new_cache(len(x), capacity, dtype=x.dtype, device=x.device)], capacity)
    for part in x.split(sizes, dim=1):
        rope = rope_tables(config, cache.advance(part.size(1)), cache.capacity, kernels.wide(x.dtype))
        outs.append(layer(part, rope, cache.layers[0]))
    return torch.cat(outs, 1).detach(), cache


# ---------------------------------------------------------------------------------------------------------------------
# The reference: one sequence, one head, one pair of tokens at a time

def a(x, factor):
    return 0.1 * x * math.log(factor) + 1.0 if factor > 1 else 1.0


def reference_frequencies(config, width, length):
    kind, s, base = config.rope_scaling, config.rope_factor, config.rope_theta
    L = config.rope_original_context or config.block_size
    if kind == 'dynamic':
        t = max(length, L)
        base = base * (s * t / L - (s - 1)) ** (width / (width - 2))
    f = [1.0 / base ** (2 * i / width) for i in range(width // 2)]
    if kind == 'linear':
        f = [x / s for x in f]
    if kind == 'yarn':
        def pair_that_turns(n):                 # by bisection, not by the logarithm that solves it
            low, high = -1000.0, 1000.0
            for _ in range(200):
                mid = (low + high) / 2
                low, high = (mid, high) if L / (2 * math.pi) * base ** (-2 * mid / width) > n else (low, mid)
            return low
        first = max(math.floor(pair_that_turns(config.rope_beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(config.rope_beta_slow)), width - 1)
        for i in range(len(f)):
            share = 0.0 if i <= first else 1.0 if i >= last else (i - first) / (last - first)
            f[i] = (1 - share) * f[i] + share * f[i] / s
    return f


def reference_turn(vector, position, frequencies, amplitude):
    """Dims 2i and 2i + 1 as one complex number, turned."""
    z = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * position * np.array(frequencies)) * amplitude
    out = np.empty_like(vector)
    out[0::2], out[1::2] = z.real, z.imag
    return out


def reference_norm(x, gain, eps=1e-6):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * gain


def amplitude_of(config):
    if config.rope_scaling != 'yarn':
        return 1.0
    by_mscales = a(config.rope_mscale, config.rope_factor) / a(config.rope_mscale_all_dim, config.rope_factor)
    return config.rope_attention_factor or by_mscales


def reference_attention(layer, config, x, length=None):
    """x (T, C) -> (T, C), both numpy. Equations of MHA/GQA, or of DeepSeek-V2 9-19."""
    W = {k: v.detach().double().numpy() for k, v in layer.state_dict().items()}
    H, T = config.n_head, len(x)

    def linear(name, v):
        return W[name + '.weight'] @ v + W.get(name + '.bias', 0.0)

    def norm(name, v):
        return reference_norm(v, W[name + '.weight'], config.norm_eps) if name + '.weight' in W else v

    latent = 'kv_a_proj_with_mqa.weight' in W
    frequencies = reference_frequencies(config, config.qk_rope_head_dim if latent else config.head_dim, length or T)
    turn = lambda v, t: reference_turn(v, t, frequencies, amplitude_of(config))
    scale = a(config.rope_mscale_all_dim, config.rope_factor) ** 2 if config.rope_scaling == 'yarn' else 1.0
    q, k, v = ([[None] * H for _ in range(T)] for _ in range(3))
    for t, h in itertools.product(range(T), range(H)):
        if latent:
            dn, dr, dv, r = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
            query = (linear('q_b_proj', reference_norm(linear('q_a_proj', x[t]), W['q_a_layernorm.weight']))
                     if config.q_lora_rank else linear('q_proj', x[t]))[h * (dn + dr):(h + 1) * (dn + dr)]
            z = linear('kv_a_proj_with_mqa', x[t])
            up = linear('kv_b_proj', reference_norm(z[:r], W['kv_a_layernorm.weight']))
            up = up[h * (dn + dv):(h + 1) * (dn + dv)]
            q[t][h] = np.concatenate((query[:dn], turn(query[dn:], t)))
            k[t][h] = np.concatenate((up[:dn], turn(z[r:], t)))
            v[t][h] = up[dn:]
        else:
            d, g = config.head_dim, h // (H // config.n_kv_head)
            q[t][h] = turn(norm('q_norm', linear('q_proj', x[t])[h * d:(h + 1) * d]), t)
            k[t][h] = turn(norm('k_norm', linear('k_proj', x[t])[g * d:(g + 1) * d]), t)
            v[t][h] = linear('v_proj', x[t])[g * d:(g + 1) * d]
    out = []
    for t in range(T):
        heads = []
        for h in range(H):
            e = [math.exp(scale * (q[t][h] @ k[s][h]) / math.sqrt(len(q[t][h]))) for s in range(t + 1)]
            heads.append(sum(e[s] / sum(e) * v[s][h] for s in range(t + 1)))
        out.append(linear('o_proj', np.concatenate(heads)))
    return np.array(out)


@everywhere
def test_attention_is_its_equations(row, scaling):
    config = config_of(row, scaling)
    layer, x = layer_of(config), numbers(2, 9, 48)
    assert hasattr(layer, 'q_norm') == bool(config.qk_norm)
    expected = np.stack([reference_attention(layer, config, sequence) for sequence in x.numpy()])
    for training in (True, False):
        close(run_layer(layer.train(training), config, x), expected, 1e-12)
    close(run_layer(layer.float(), config, x.float()), expected, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding with a cache

def decode_in(model, tokens, splits, capacity=None, starts=None, static=False):
    """Logits at every position, tokens going in by `splits`."""
    cache = model.new_cache(len(tokens), capacity or tokens.size(1), starts, static)
    return torch.cat([model.decode(part, cache, last=False) for part in tokens.split(splits, dim=1)], dim=1)


def modes(model, row):
    """Both ways of using the cache, one after the other; the rule's own choice first."""
    for mode in ('auto', 'expand', 'absorb') if row in LATENT else ('auto',):
        for layer in model.layers:
            layer.attn.decode_mode = mode
        yield mode


SPLITS = ([1] * 14, [14], [5, 1, 7, 1], [1, 12, 1])


@everywhere
def test_decoding_with_a_cache_gives_the_logits_of_the_full_forward_at_every_position(row, scaling):
    """In a cache that they fill, and in one with room to spare; under each scaling split in a way that has every kind of step."""
    config = config_of(row, scaling)
    model, tokens = model_of(config), token_ids(2, 14)
    full = model(tokens).detach()
    room = 14 if scaling == 'dynamic-beyond' else 23                        # the angles go by the cache's size there
    for mode in modes(model, row):
        for splits in SPLITS if scaling == 'default' else SPLITS[2:3]:
            close(decode_in(model, tokens, splits), full, 1e-12)
            close(decode_in(model, tokens, splits, room, static=True), full, 1e-12)
    model.float()
    for static in (False, True):
        close(decode_in(model, tokens, SPLITS[2], static=static), full, 1e-5)


@each_row
def test_dynamic_scaling_keeps_the_angles_of_the_whole_cache_from_the_first_token_to_the_last(row):
    """Keys are cached turned. Angles that grew with the text would leave old keys turned by other ones."""
    model, tokens = model_of(config_of(row, 'dynamic-beyond')), token_ids(2, 14)
    before = model(tokens)
    full = model(torch.cat((tokens, token_ids(2, 6, seed=2)), 1))[:, :14].detach()      # 20 tokens, of which 14 count
    assert (full - before).abs().max() > 1e-3
    assert torch.equal(model(tokens), before)                               # and back, when the sequence is short again
    for static, splits in itertools.product((False, True), SPLITS):
        close(decode_in(model, tokens, splits, capacity=20, static=static), full, 1e-12)


@pytest.mark.parametrize('row, scaling', list(itertools.product(LATENT, SCALINGS)))
def test_absorbed_attention_equals_expanded_attention_in_every_dtype(row, scaling):
    config = config_of(row, scaling)
    for dtype, tolerance in ((F64, 1e-12), (F32, 1e-5), (BF16, 2e-2)):
        layer, x, outs, expanded = layer_of(config, dtype), numbers(3, 11, 48, dtype=dtype), [], []
        for name, module in layer.named_modules():
            module.float() if dtype == BF16 and 'norm' in name else module
        layer.kv_b_proj.register_forward_hook(lambda *_: expanded.append(1))
        for mode, times in (('expand', 3), ('absorb', 0)):
            layer.decode_mode = mode
            expanded.clear()
            outs.append(run_cached(layer, config, x, [4, 1, 6])[0])
            assert len(expanded) == times                                   # it really went that way
        close(*outs, tolerance)


def test_decoding_absorbs_exactly_when_that_takes_fewer_multiplications():
    """DeepSeek-V3's sizes, r 512, nope 128, rope 64, v 128: below r (dn + dv) / (2r - dn - dv) = 170.7 new tokens."""
    config = ModelConfig(n_embd=1024, n_head=8, n_layer=1, attn='mla', kv_lora_rank=512,
                         qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    with torch.device('meta'):
        layer = build_attention(config)
    assert layer.absorbs(1, 4096) and layer.absorbs(170, 10**7) and not layer.absorbs(171, 10**7)
    for T, S in itertools.product((1, 2, 5, 64, 130, 170, 300), (1, 2, 10, 64, 300, 1000, 10000)):
        if T <= S:
            assert layer.absorbs(T, S) == (1 / T - 1 / S > (2 * 512 - 256) / (512 * 256)), (T, S)
    layer.decode_mode = 'absorb'
    assert layer.absorbs(300, 300)
    layer.decode_mode = 'expand'
    assert not layer.absorbs(1, 4096)


# numbers a token needs in one layer, from the equations: C = 48, H = 4, d = 12; lora r = 8, dr = 8; mla r = 12, dr = 6
NUMBERS = {'baseline': 2 * 4 * 12, 'baseline+bias': 2 * 4 * 12, 'baseline+norm': 2 * 4 * 12, 'gqa': 2 * 2 * 12,
           'gqa-wide-heads': 2 * 2 * 18, 'mqa': 2 * 12, 'lora': 8 + 8, 'enhanced': 8 + 8, 'enhanced-no-q-rank': 8 + 8,
           'mla': 12 + 6, 'mla-q-rank': 12 + 6, 'mla-wide-values': 12 + 6, 'mla-large-rank': 40 + 6}


@each_row
@pytest.mark.parametrize('dtype, size', [(F32, 4), (BF16, 2)], ids=str)
def test_the_cache_is_exactly_what_the_formula_says_and_decoding_allocates_no_other(row, dtype, size):
    model = model_of(config_of(row)).for_decoding(dtype)
    cache = model.new_cache(3, 20)
    tensors = [t for layer in cache.layers for t in layer.tensors]
    assert cache.bytes() == 3 * 20 * 2 * NUMBERS[row] * size                                    # 2 layers
    assert sum(t.untyped_storage().nbytes() for t in tensors) == cache.bytes()
    assert model.cache_bytes_per_token(dtype) == 2 * NUMBERS[row] * size
    where = [t.data_ptr() for t in tensors]
    for part in token_ids(3, 20).split([7] + [1] * 13, dim=1):
        model.decode(part, cache)
    assert [t.data_ptr() for layer in cache.layers for t in layer.tensors] == where     # filled in place, never grown
    attributes = [v for layer in model.layers for module in layer.modules() for v in vars(module).values()]
    assert not any(isinstance(v, torch.Tensor) for v in attributes)                     # nor anything kept on the side


@pytest.mark.parametrize('row', VARIANTS)
@pytest.mark.parametrize('static', [False, True])
def test_prompts_of_different_lengths_in_one_batch_give_the_logits_that_each_gives_alone(row, static):
    model = model_of(config_of(row, 'yarn'))
    lengths, more, longest = (3, 9, 1, 6), 6, 9
    texts = [token_ids(1, n + more, seed=n) for n in lengths]
    alone = [model(text)[0].detach() for text in texts]
    starts = [longest - n for n in lengths]
    for mode in modes(model, row):
        for filler, splits in itertools.product((0, 17), ([longest] + [1] * more, [longest, 2, 4], [2, 7, 6])):
            rows = torch.cat([F.pad(t, (start, 0), value=filler) for t, start in zip(texts, starts)])
            logits = decode_in(model, rows, splits, longest + more + 2, starts, static)
            for ours, start, theirs in zip(logits, starts, alone):
                close(ours[start:], theirs, 1e-12)


def test_with_dynamic_scaling_a_row_beside_longer_ones_is_as_it_is_alone_in_a_cache_of_that_size():
    model, texts = model_of(config_of('mla', 'dynamic-beyond')), [token_ids(1, n, seed=n) for n in (4, 12, 9)]
    rows = torch.cat([F.pad(t, (12 - t.size(1), 0)) for t in texts])
    logits = decode_in(model, rows, [8, 1, 3], 20, [12 - t.size(1) for t in texts])
    for row, text in zip(logits, texts):
        close(row[12 - text.size(1):], decode_in(model, text, [text.size(1)], 20)[0], 1e-12)


def test_angles_are_computed_in_float32_and_survive_a_model_of_bfloat16():
    """Integers from 257 on collide in bfloat16."""
    model = model_of(config_of('mla')).for_decoding(BF16)
    cos, sin = model.rope(torch.arange(1024), 1024).unbind(-1)
    assert cos.dtype == F32 and model.double().rope(torch.arange(2), 2).dtype == F64
    for p in (257, 511, 1023):
        assert cos[p, 0].item() == pytest.approx(math.cos(p), abs=1e-6)
        assert sin[p, 1].item() == pytest.approx(math.sin(p * 10000 ** (-1 / 3)), abs=5e-5)
    assert not list(model.layers[0].attn.buffers())


# ---------------------------------------------------------------------------------------------------------------------
# What no attention may do

@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
@each_row
def test_no_output_depends_on_a_later_token_nor_sends_it_a_gradient(row, router):
    """Through the training model, token by token: the capacity of experts leaks as a missing mask does."""
    T, leaves = 8, []
    model, tokens = model_of(config_of(row, router=router, n_shared_expert=1, n_dense_layer=1)), token_ids(2, T)
    before = model(tokens)
    for j in range(T):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 7) % SIZES['vocab_size']
        change = (model(other) - before).abs().amax((0, 2)) / before.abs().max()                # by position
        assert not (change[:j] > 1e-13).any() and change[j] > 1e-3 and (change[j:] > 1e-9).all()
    model.embed.register_forward_hook(lambda _, args, out: leaves.append(out.detach().requires_grad_()) or leaves[-1])
    logits = model(tokens)
    for t in range(T):
        grad, = torch.autograd.grad((logits[:, t] * numbers(2, 31)).sum(), leaves[-1], retain_graph=True)
        assert not grad[:, t + 1:].any()                                                        # exactly zero
        assert (grad[:, :t + 1].abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize('row, scaling', list(itertools.product(ROWS, ['default', 'linear', 'dynamic-beyond', 'yarn'])))
def test_only_the_distance_between_tokens_counts_and_their_order_does(row, scaling):
    config = config_of(row, scaling)
    layer, x = layer_of(config), numbers(2, 9, 48)
    at_zero = run_layer(layer, config, x)
    for shift in (1, 13, 1000):
        close(run_layer(layer, config, x, shift), at_zero, 1e-11)                       # cos(1000) costs a digit
    permuted = run_layer(layer, config, x[:, [2, 0, 4, 1, 3, 7, 5, 6, 8]])
    assert (at_zero - permuted)[:, -1].abs().max() > 1e-3 * at_zero.abs().max()
    close(run_layer(layer.float(), config, x.float(), 13), at_zero, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions

YARNS = [dict(dim=64, theta=10000.0, factor=40.0, original=4096), dict(dim=64, theta=1e6, factor=4.0, original=32768),
         dict(dim=32, theta=10000.0, factor=16.0, original=2048, beta_fast=16.0, beta_slow=2.0),
         dict(dim=12, theta=1000.0, factor=8.0, original=512), dict(dim=32, theta=10000.0, factor=2.0, original=64)]


@pytest.mark.parametrize('knobs', YARNS, ids=str)
def test_yarn_and_dynamic_frequencies_are_those_of_transformers(knobs):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def theirs(kind, length=None, **more):
        rope = {'rope_type': kind, 'rope_theta': knobs['theta'], 'factor': knobs['factor'], **more}
        config = transformers.LlamaConfig(hidden_size=2 * knobs['dim'], num_attention_heads=2, head_dim=knobs['dim'],
                                          max_position_embeddings=knobs['original'], rope_parameters=rope)
        return ROPE_INIT_FUNCTIONS[kind](config, 'cpu', **({'seq_len': length} if length else {}))[0].double()
    expected = theirs('yarn', original_max_position_embeddings=knobs['original'],
                      beta_fast=knobs.get('beta_fast', 32.0), beta_slow=knobs.get('beta_slow', 1.0))
    np.testing.assert_allclose(rope_frequencies(scaling='yarn', **knobs), expected, rtol=1e-6)
    for length in (knobs['original'], 3 * knobs['original']):
        ours = rope_frequencies(scaling='dynamic', length=length, **knobs)
        np.testing.assert_allclose(ours, theirs('dynamic', length), rtol=1e-6)


def test_frequencies_have_the_values_worked_out_by_hand():
    plain = rope_frequencies(64)
    np.testing.assert_allclose([4 * f for f in rope_frequencies(64, scaling='linear', factor=4.0)], plain, rtol=1e-15)
    for scaling in ('linear', 'dynamic', 'yarn'):                           # a factor of 1 changes nothing
        np.testing.assert_allclose(rope_frequencies(64, scaling=scaling, factor=1.0, length=512), plain, rtol=1e-14)
    dynamic = lambda length: rope_frequencies(64, scaling='dynamic', factor=3.0, original=512, length=length)
    assert dynamic(0) == dynamic(512) == plain
    # NTK-aware: the slowest pair is slowed by exactly the factor by which the context grew (YaRN, section 3.1)
    assert plain[-1] / dynamic(1024)[-1] == pytest.approx(3 + 1, rel=1e-12) and dynamic(1024)[0] == 1.0
    # DeepSeek's own sizes: yarn's ramp runs from pair 10 to pair 23
    expected = [10000.0 ** (-i / 32) * (1 - min(max((i - 10) / 13, 0), 1) * (1 - 1 / 40)) for i in range(32)]
    np.testing.assert_allclose(rope_frequencies(64, scaling='yarn', factor=40.0, original=4096), expected, rtol=1e-13)
    for row in ROWS:                                                        # and the yarn cases above are no step
        config = config_of(row, 'yarn')
        width = config.qk_rope_head_dim or config.head_dim
        ours = reference_frequencies(config, width, 0)
        assert sum(p / 8 * 1.001 < f < p * 0.999 for f, p in zip(ours, rope_frequencies(width, 100.0))) >= 2


def test_the_temperatures_of_yarn_are_those_of_deepseek():
    def of(**knobs):
        config = config_of('mla', **{'rope_scaling': 'yarn', 'rope_factor': 40.0, **knobs})
        cos, sin = rope_tables(config, torch.arange(9), 9, F64).unbind(-1)
        lengths = cos ** 2 + sin ** 2
        close(lengths, lengths[:1, :1].expand_as(lengths), 1e-14)
        return attention_scale(config, 192) * math.sqrt(192), lengths[0, 0].item()
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1.2608, abs=5e-5)
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0
    for all_dim, squared in ((0.707, 1.5896), (1.0, 1.8739)):               # DeepSeek-V2 and V3 at factor 40
        scale, amplitude = of(rope_mscale=all_dim, rope_mscale_all_dim=all_dim)
        assert scale == pytest.approx(squared, abs=5e-5) and amplitude == pytest.approx(1)      # only m^2 is left
    scale, amplitude = of(rope_mscale=1.0, rope_mscale_all_dim=0.0)         # the temperature is in the amplitude then
    assert scale == pytest.approx(1, abs=1e-15) and amplitude == pytest.approx(1.8739, abs=5e-5)
    scale, amplitude = of(rope_attention_factor=1.5, rope_mscale_all_dim=0.707)                 # by hand
    assert scale == pytest.approx(1.5896, abs=5e-5) and amplitude == pytest.approx(2.25)
    linear = of(rope_scaling='linear', rope_mscale_all_dim=1.0)             # they are YaRN's alone
    assert linear == (pytest.approx(1), pytest.approx(1))


# ---------------------------------------------------------------------------------------------------------------------
# Heads, splits, biases

def test_biases_are_where_deepseek_has_them_and_nowhere_else():
    def biased(row, **knobs):
        names = dict(build_attention(config_of(row, **knobs)).named_parameters())
        return {name.split('.')[0] for name in names if name.endswith('bias')}
    for row in LATENT:
        assert biased(row, attention_bias=False) == set()
        expected = {'kv_a_proj_with_mqa', 'o_proj'} | ({'q_a_proj'} if config_of(row).q_lora_rank else set())
        assert biased(row, attention_bias=True) == expected
    for row in ('baseline', 'gqa', 'mqa'):
        assert biased(row, attention_bias=True) == {'q_proj', 'k_proj', 'v_proj', 'o_proj'} and not biased(row)
    assert biased('enhanced') and not biased('lora') and not biased('mla')


def test_a_new_variant_is_a_row(monkeypatch):
    def more(n_embd, n_head):
        return {**variants(n_embd, n_head), 'thin': {**variants(n_embd, n_head)['mla'], 'kv_lora_rank': 4}}
    monkeypatch.setattr(attention, 'variants', more)
    config = ModelConfig(**SIZES, attn='thin')
    assert config.kv_lora_rank == 4 and isinstance(LanguageModel(config).layers[0].attn, LatentAttention)


def test_the_rows_are_the_numbers_of_the_report_and_of_deepseek_v2_lite():
    def row(attn, n_embd=384, n_head=8):
        config = ModelConfig(n_embd=n_embd, n_head=n_head, attn=attn)
        return [getattr(config, knob) for knob in ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim',
                                                   'qk_rope_head_dim', 'v_head_dim')]
    assert (row('lora'), row('enhanced')) == ([32, 64, 16, 32, 48], [32, 64, 48, 32, 48])
    assert (row('mla'), row('mla', 2048, 16)) == ([0, 96, 48, 24, 48], [0, 512, 128, 64, 128])
    rows = {name: ModelConfig(n_embd=384, n_head=8, attn=name) for name in VARIANTS}
    assert set(VARIANTS) <= set(variants(384, 8))          # beside which a fork has its own
    plain = ('default', 1.0, False)
    assert {name: (c.rope_scaling, c.rope_factor, c.attention_bias) for name, c in rows.items()} == {
        **dict.fromkeys(VARIANTS, plain), 'enhanced': ('linear', 2.0, True)}
    assert [(c.n_kv_head, c.head_dim, c.qk_norm) for c in rows.values()][:3] == [(n, 48, False) for n in (8, 2, 1)]


def test_the_worked_example_tells_the_truth():
    """Shapes, numbers cached by the formulas, and results that do not differ."""
    text = printed_by('attention.py')
    mha, mla = text.split('\nmla: ')
    assert 'MultiHeadAttention' in mha and 'LatentAttention' in mla and mla.count('from the cache') == 2
    assert re.findall(r'(\d+) numbers a token', text) == [str(2 * 8 * 48), str(96 + 24), str(96 + 24)]
    for name, shape in (('q_proj', (8 * 72, 384)), ('kv_a_proj_with_mqa', (96 + 24, 384)), ('kv_b_proj', (8 * 96, 96)),
                        ('kv_a_layernorm', (96,))):
        assert f'{name + ".weight":26} {shape}' in mla
    assert text.count('six tokens (1, 6, 384) -> (1, 6, 384)') == 2
    differences = [float(d) for d in re.findall(r'differs by (\S+)', text)]
    assert len(differences) == 3 and max(differences) < 1e-13
