"""attention.py against its equations, written out once more in float64 with plain loops, and against what must hold of
any attention: no look at later tokens, positions that only count relatively, and a cache that changes nothing.

Held to the sources that attention.py names: RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071), grouped queries (arXiv
2305.13245), latent attention (arXiv 2405.04434, eq. 9-19). Norm gains and biases are random here: 1 and 0 hide errors.
Tolerances are relative to the largest number compared: 1e-12 in float64, 1e-5 in float32, 2e-2 in bfloat16.
"""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import attention
from attention import (LatentAttention, apply_rope, attention_scale, build_attention, rope_frequencies, rope_tables,
                       variants, yarn_mscale)
from model import LanguageModel, ModelConfig

F64 = torch.float64
# heads of 12 dims
SIZES = dict(vocab_size=31, block_size=32, n_layer=2, n_head=4, n_embd=48, d_ff=16, n_expert=4, top_k=2)

# every variant, and the knobs that take other branches
ROWS = {'baseline': dict(attn='baseline'), 'baseline+bias': dict(attn='baseline', attention_bias=True),
        'gqa': dict(attn='gqa', n_kv_head=2), 'mqa': dict(attn='mqa'),
        'lora': dict(attn='lora'), 'enhanced': dict(attn='enhanced'), 'mla': dict(attn='mla'),
        'mla-no-q-rank': dict(attn='mla', q_lora_rank=0),
        'enhanced-no-q-rank': dict(attn='enhanced', q_lora_rank=0), 'mla-wide-values': dict(attn='mla', v_head_dim=26),
        'mla-large-rank': dict(attn='mla', kv_lora_rank=40)}
LATENT = [name for name, row in ROWS.items() if row['attn'] in ('lora', 'enhanced', 'mla')]
# base 100 and 512 tokens put several pairs onto yarn's ramp, at dr = 6 as at 12
SCALINGS = {'default': dict(rope_scaling='default'), 'linear': dict(rope_scaling='linear', rope_factor=2.5),
            'dynamic-within': dict(rope_scaling='dynamic', rope_factor=3.0, rope_original_context=64),
            'dynamic-beyond': dict(rope_scaling='dynamic', rope_factor=3.0, rope_original_context=5),
            'yarn': dict(rope_scaling='yarn', rope_factor=8.0, rope_original_context=512, rope_theta=100.0,
                         rope_mscale=0.707, rope_mscale_all_dim=1.3)}
everywhere = pytest.mark.parametrize('row, scaling', list(itertools.product(ROWS, SCALINGS)))


def config_of(row, scaling='default', **knobs):
    return ModelConfig(**{**SIZES, **ROWS[row], **SCALINGS[scaling], **knobs})


def randomise(module, seed=0):
    """Every matrix, gain and bias so large that each part shows in the output. The same numbers in every dtype."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.empty(p.shape).uniform_(0.5, 1.5, generator=g) if 'norm' in name else
                    torch.empty(p.shape).normal_(0.0, 0.3, generator=g))
        for name, b in module.named_buffers():
            b.copy_(torch.empty(b.shape).normal_(0.0, 0.3, generator=g))
    return module


def layer_of(config, dtype=F64):
    return randomise(build_attention(config)).to(dtype)


def model_of(config, dtype=F64):
    return randomise(LanguageModel(config)).to(dtype)


def inputs(*shape, dtype=F64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def token_ids(*shape, seed=1):
    return torch.randint(0, SIZES['vocab_size'], shape, generator=torch.Generator().manual_seed(seed))


def run_layer(layer, config, x, shift=0):
    """The layer as training calls it, on tokens at positions shift, shift + 1, ..."""
    T = x.size(1)
    return layer(x, rope_tables(config, torch.arange(shift, shift + T), T, torch.promote_types(x.dtype, torch.float32)))


def close(a, b, tolerance):
    """Within `tolerance` of the largest number, which must be no zero."""
    a, b = (torch.as_tensor(t, dtype=F64) for t in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all() and torch.isfinite(b).all() and b.abs().max() > 0
    assert (a - b).abs().max() <= tolerance * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


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


def reference_norm(x, gain):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + 1e-6) * gain


def reference_attention(layer, config, x, length=None):
    """x (T, C) -> (T, C), both numpy. Equations of MHA/GQA, or of DeepSeek-V2 9-19."""
    W = {k: v.detach().double().numpy() for k, v in layer.state_dict().items()}
    H, T, C = config.n_head, len(x), config.n_embd

    def linear(name, v):
        return W[name + '.weight'] @ v + W.get(name + '.bias', 0.0)

    latent = 'kv_a_proj_with_mqa.weight' in W
    turned = config.qk_rope_head_dim if latent else C // H
    frequencies = reference_frequencies(config, turned, length or T)
    amplitude = scale = 1.0
    if config.rope_scaling == 'yarn':
        amplitude = a(config.rope_mscale, config.rope_factor) / a(config.rope_mscale_all_dim, config.rope_factor)
        scale = a(config.rope_mscale_all_dim, config.rope_factor) ** 2
    q, k, v = ([[None] * H for _ in range(T)] for _ in range(3))
    for t, h in itertools.product(range(T), range(H)):
        if latent:
            dn, dr, dv, r = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
            if config.q_lora_rank:
                c_q = reference_norm(linear('q_a_proj', x[t]), W['q_a_layernorm.weight'])
                query = linear('q_b_proj', c_q)[h * (dn + dr):(h + 1) * (dn + dr)]
            else:
                query = linear('q_proj', x[t])[h * (dn + dr):(h + 1) * (dn + dr)]
            z = linear('kv_a_proj_with_mqa', x[t])
            up = linear('kv_b_proj', reference_norm(z[:r], W['kv_a_layernorm.weight']))
            up = up[h * (dn + dv):(h + 1) * (dn + dv)]
            q[t][h] = np.concatenate((query[:dn], reference_turn(query[dn:], t, frequencies, amplitude)))
            k[t][h] = np.concatenate((up[:dn], reference_turn(z[r:], t, frequencies, amplitude)))
            v[t][h] = up[dn:]
        else:
            d, g = C // H, h // (H // config.n_kv_head)
            q[t][h] = reference_turn(linear('q_proj', x[t])[h * d:(h + 1) * d], t, frequencies, amplitude)
            k[t][h] = reference_turn(linear('k_proj', x[t])[g * d:(g + 1) * d], t, frequencies, amplitude)
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
    layer, x = layer_of(config), inputs(2, 9, 48)
    expected = np.stack([reference_attention(layer, config, sequence) for sequence in x.numpy()])
    for training in (True, False):
        layer.train(training)
        close(run_layer(layer, config, x).detach(), expected, 1e-12)
    close(run_layer(layer.float(), config, x.float()).detach(), expected, 1e-5)


@pytest.mark.parametrize('row', ROWS)
def test_attention_passes_gradcheck(row):
    config = config_of(row, 'yarn', n_embd=16, n_head=2, **({'n_kv_head': 1} if row == 'gqa' else {}),
                       **({'qk_nope_head_dim': 4, 'qk_rope_head_dim': 4} if row in LATENT else {}))
    layer = layer_of(config)
    names, weights = zip(*layer.named_parameters())

    def function(x, *tensors):
        rope = rope_tables(config, torch.arange(3), 3, F64)
        return torch.func.functional_call(layer, dict(zip(names, tensors)), (x, rope))
    assert torch.autograd.gradcheck(function, (inputs(1, 3, 16).requires_grad_(), *weights), fast_mode=True)


@everywhere
def test_training_hands_every_attention_to_the_fused_kernel_with_its_own_scale(row, scaling, monkeypatch):
    """SDPA's default scale goes by the width of the query, which is padded or absorbed here."""
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *args, **kw: calls.append(kw) or fused(*args, **kw))
    config = config_of(row, scaling)
    model_of(config)(token_ids(2, 7))
    width = config.qk_nope_head_dim + config.qk_rope_head_dim if row in LATENT else 12
    m = a(config.rope_mscale_all_dim, config.rope_factor) if scaling == 'yarn' else 1.0
    assert len(calls) == config.n_layer
    for call in calls:
        assert call['attn_mask'] is None and call['is_causal'] and call.get('dropout_p', 0) == 0
        assert call['scale'] == pytest.approx(m ** 2 / math.sqrt(width), rel=1e-14)


@pytest.mark.parametrize('row', ROWS)
def test_training_never_makes_a_tensor_of_tokens_times_tokens(row):
    T, seen = 61, []                                        # no size in the model is 61

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else [out]
            seen.extend(list(t.shape) for t in outs if isinstance(t, torch.Tensor))
            return out

    config = config_of(row, block_size=64)
    model = model_of(config, torch.float32)
    with Record():
        model(token_ids(2, T), token_ids(2, T)).nll.backward()
    assert any(T in shape for shape in seen)
    assert not [shape for shape in seen if shape.count(T) > 1 or T * T in shape]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding with a cache

def decode_in(model, tokens, splits, capacity=None, starts=None, static=False):
    """Logits at every position, tokens going in by `splits`."""
    cache = model.new_cache(len(tokens), capacity or tokens.size(1), starts, static)
    return torch.cat([model.decode(part, cache, last=False) for part in tokens.split(splits, dim=1)], dim=1)


def set_mode(model, mode):
    for layer in model.layers:
        layer.attn.decode_mode = mode


SPLITS = ([1] * 14, [14], [5, 1, 7, 1], [1, 12, 1])


@everywhere
def test_decoding_with_a_cache_gives_the_logits_of_the_full_forward_at_every_position(row, scaling):
    config = config_of(row, scaling)
    model, tokens = model_of(config).eval(), token_ids(2, 14)
    full = model(tokens).detach()
    for mode in ('auto', 'expand', 'absorb') if row in LATENT else ('auto',):
        set_mode(model, mode)
        for static, splits in itertools.product((False, True), SPLITS if mode != 'auto' else SPLITS[2:]):
            close(decode_in(model, tokens, splits, static=static), full, 1e-12)
    model.float()
    for static in (False, True):
        close(decode_in(model, tokens, SPLITS[2], static=static), full, 1e-5)


@pytest.mark.parametrize('row', ROWS)
def test_room_to_spare_in_the_cache_changes_no_logit(row):
    model, tokens = model_of(config_of(row, 'linear')).eval(), token_ids(3, 14)
    for static in (False, True):
        close(decode_in(model, tokens, SPLITS[2], capacity=23, static=static), model(tokens).detach(), 1e-12)


@pytest.mark.parametrize('row', ROWS)
def test_dynamic_scaling_keeps_the_angles_of_the_whole_cache_from_the_first_token_to_the_last(row):
    """Keys are cached turned. Angles that grew with the text would leave old keys turned by other ones."""
    config = config_of(row, 'dynamic-beyond')
    model, tokens = model_of(config).eval(), token_ids(2, 14)
    full = model(torch.cat((tokens, token_ids(2, 6, seed=2)), 1))[:, :14].detach()      # 20 tokens, of which 14 count
    assert (full - model(tokens)).abs().max() > 1e-3
    for static, splits in itertools.product((False, True), SPLITS):
        close(decode_in(model, tokens, splits, capacity=20, static=static), full, 1e-12)


def test_dynamic_scaling_goes_back_when_the_sequence_is_short_again():
    model = model_of(config_of('mla', 'dynamic-beyond'))
    before = model(token_ids(1, 4))
    model(token_ids(1, 20))
    assert torch.equal(model(token_ids(1, 4)), before)


@pytest.mark.parametrize('row, scaling', list(itertools.product(LATENT, SCALINGS)))
@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_absorbed_attention_equals_expanded_attention(row, scaling, dtype, tolerance):
    config = config_of(row, scaling)
    layer, x, outs = layer_of(config, dtype), inputs(3, 11, 48, dtype=dtype), {}
    up_projected = []
    layer.kv_b_proj.register_forward_hook(lambda *_: up_projected.append(1))
    for mode in ('expand', 'absorb'):
        layer.decode_mode, cache, filled = mode, layer.new_cache(3, 11, dtype), 0
        up_projected.clear()
        for T in (4, 1, 6):
            slots = torch.arange(filled, filled + T)
            rope = rope_tables(config, slots, 11, torch.promote_types(dtype, torch.float32))
            mask = torch.arange(filled + T) <= slots.unsqueeze(1)
            some = layer(x[:, filled:filled + T], rope, mask.view(1, 1, T, -1) if filled else None, cache,
                         slots if filled else None, filled + T)
            outs.setdefault(mode, []).append(some)
            filled += T
        assert len(up_projected) == {'expand': 3, 'absorb': 0}[mode]        # it really went the other way
    close(torch.cat(outs['absorb'], 1).detach(), torch.cat(outs['expand'], 1).detach(), tolerance)


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


# numbers a token needs in one layer, from the equations: C = 48, H = 4, d = 12; lora r = 8, dr = 8; mla r = 8, dr = 6
NUMBERS = {'baseline': 2 * 4 * 12, 'baseline+bias': 2 * 4 * 12, 'gqa': 2 * 2 * 12, 'mqa': 2 * 12, 'lora': 8 + 8,
           'enhanced': 8 + 8, 'enhanced-no-q-rank': 8 + 8, 'mla': 8 + 6, 'mla-no-q-rank': 8 + 6,
           'mla-wide-values': 8 + 6, 'mla-large-rank': 40 + 6}


@pytest.mark.parametrize('row', ROWS)
@pytest.mark.parametrize('dtype, size', [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_the_cache_is_exactly_what_the_formula_says_and_decoding_allocates_no_other(row, dtype, size):
    model = model_of(config_of(row), dtype).eval()
    cache = model.new_cache(3, 20)
    assert cache.bytes() == 3 * 20 * 2 * NUMBERS[row] * size                                    # 2 layers
    assert sum(c.untyped_storage().nbytes() for c in cache.layers) == cache.bytes()
    assert model.cache_bytes_per_token(dtype) == 2 * NUMBERS[row] * size
    where = [c.data_ptr() for c in cache.layers]
    for part in token_ids(3, 20).split([7] + [1] * 13, dim=1):
        model.decode(part, cache)
    assert [c.data_ptr() for c in cache.layers] == where  # filled in place, never grown
    attributes = [v for layer in model.layers for module in layer.modules() for v in vars(module).values()]
    assert not any(isinstance(v, torch.Tensor) for v in attributes)  # nor anything kept on the side


@pytest.mark.parametrize('row', LATENT)
def test_a_latent_cache_holds_the_normed_latent_and_the_turned_key_of_each_token_and_nothing_further(row):
    config = config_of(row, 'yarn')
    layer, x = layer_of(config), inputs(2, 5, 48)
    cache, r, dr = layer.new_cache(2, 8, F64), config.kv_lora_rank, config.qk_rope_head_dim
    rope = rope_tables(config, torch.arange(5), 8, F64)
    layer(x, rope, None, cache, None, 5)
    assert cache.shape == (2, 8, r + dr) and not cache[:, 5:].any()
    W = {k: v.detach().numpy() for k, v in layer.state_dict().items()}
    amplitude = a(0.707, 8) / a(1.3, 8)
    for b, t in itertools.product(range(2), range(5)):
        z = W['kv_a_proj_with_mqa.weight'] @ x[b, t].numpy() + W.get('kv_a_proj_with_mqa.bias', 0)
        expected = np.concatenate((reference_norm(z[:r], W['kv_a_layernorm.weight']),
                                   reference_turn(z[r:], t, reference_frequencies(config, dr, 8), amplitude)))
        close(cache[b, t], expected, 1e-12)


@pytest.mark.parametrize('row', ['baseline', 'gqa', 'mqa', 'lora', 'enhanced', 'mla'])
@pytest.mark.parametrize('static', [False, True])
def test_prompts_of_different_lengths_in_one_batch_give_the_logits_that_each_gives_alone(row, static):
    model = model_of(config_of(row, 'yarn')).eval()
    lengths, more, longest = (3, 9, 1, 6), 6, 9
    texts = [token_ids(1, n + more, seed=n) for n in lengths]
    for mode in ('expand', 'absorb') if row in LATENT else ('auto',):
        set_mode(model, mode)
        for filler, splits in itertools.product((0, 17), ([longest] + [1] * more, [longest, 2, 4], [2, 7, 6])):
            rows = [F.pad(t, (longest - n, 0), value=filler) for t, n in zip(texts, lengths)]
            starts = [longest - n for n in lengths]
            logits = decode_in(model, torch.cat(rows), splits, longest + more + 2, starts, static)
            for i, (text, n) in enumerate(zip(texts, lengths)):
                close(logits[i, longest - n:], model(text)[0].detach(), 1e-12)


def test_with_dynamic_scaling_a_row_beside_longer_ones_is_as_it_is_alone_in_a_cache_of_that_size():
    model, texts = model_of(config_of('mla', 'dynamic-beyond')).eval(), [token_ids(1, n, seed=n) for n in (4, 12, 9)]
    rows = torch.cat([F.pad(t, (12 - t.size(1), 0)) for t in texts])
    logits = decode_in(model, rows, [8, 1, 3], 20, [12 - t.size(1) for t in texts])
    for row, text in zip(logits, texts):
        close(row[12 - text.size(1):], decode_in(model, text, [text.size(1)], 20)[0], 1e-12)


def test_angles_are_computed_in_float32_and_survive_a_model_of_bfloat16():
    """Integers from 257 on collide in bfloat16."""
    config = config_of('mla')
    model = model_of(config, torch.bfloat16)
    assert model.wide() == torch.float32
    cos, sin = rope_tables(config, torch.arange(1024), 0, model.wide()).unbind(-1)
    assert cos.dtype == torch.float32
    for p in (257, 511, 1023):
        assert cos[p, 0, 0].item() == pytest.approx(math.cos(p), abs=1e-6)
        assert sin[p, 0, 1].item() == pytest.approx(math.sin(p * 10000 ** (-1 / 3)), abs=5e-5)
    assert not list(model.layers[0].attn.buffers())


# ---------------------------------------------------------------------------------------------------------------------
# What no attention may do

@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('row', ROWS)
def test_no_output_depends_on_a_later_token(row, router):
    """Through the training model, token by token: the capacity of experts leaks as a missing mask does."""
    T = 8
    model, tokens = model_of(config_of(row, router=router, n_shared_expert=1)), token_ids(2, T)
    for training in (True, False):
        model.train(training)
        before = model(tokens)
        for j in range(T):
            other = tokens.clone()
            other[:, j] = (other[:, j] + 7) % SIZES['vocab_size']
            after = model(other)
            change = (after - before).abs().amax((0, 2)) / before.abs().max()                   # by position
            assert change[:j].max() <= 1e-13 if j else True
            assert change[j] > 1e-3 and (change[j:] > 1e-9).all()


@pytest.mark.parametrize('row', ['baseline', 'gqa', 'mqa', 'lora', 'enhanced', 'mla'])
def test_the_training_loss_of_a_position_does_not_depend_on_a_later_token(row):
    T, model, tokens = 6, model_of(config_of(row)).train(), token_ids(2, 6)
    for t in range(T):
        targets = torch.full((2, T), -1)
        targets[:, t] = 3
        losses = []
        for filler in (0, 11):
            other = tokens.clone()
            other[:, t + 1:] = filler
            losses.append(model(other, targets).nll.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-13) and losses[0] > 0


@pytest.mark.parametrize('row', ROWS)
def test_no_gradient_flows_from_an_output_to_a_later_token(row):
    T, leaves = 6, []
    model = model_of(config_of(row))
    model.embed.register_forward_hook(lambda _, args, out: leaves.append(out.detach().requires_grad_()) or leaves[-1])
    for training in (True, False):
        logits = model.train(training)(token_ids(2, T))
        for t in range(T):
            grad, = torch.autograd.grad((logits[:, t] * inputs(2, 31)).sum(), leaves[-1], retain_graph=True)
            assert not grad[:, t + 1:].any()                                                    # exactly zero
            assert (grad[:, :t + 1].abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize('row, scaling', list(itertools.product(ROWS, ['default', 'linear', 'dynamic-beyond', 'yarn'])))
def test_only_the_distance_between_tokens_counts(row, scaling):
    config = config_of(row, scaling)
    layer, x = layer_of(config), inputs(2, 9, 48)
    at_zero = run_layer(layer, config, x).detach()
    for shift in (1, 13, 1000):
        close(run_layer(layer, config, x, shift).detach(), at_zero, 1e-11)  # cos(1000) costs a digit
    close(run_layer(layer.float(), config, x.float(), 13).detach(), at_zero, 1e-5)


def test_a_vector_is_turned_by_its_time_and_alike_in_every_head():
    config = config_of('baseline')
    x = inputs(12).expand(1, 6, 4, 12)                                                          # the same everywhere
    y = apply_rope(x, rope_tables(config, torch.arange(6), 6, F64))
    assert torch.equal(y[:, :, :1].expand_as(y), y)
    for s, t in itertools.combinations(range(6), 2):
        assert (y[0, s] - y[0, t]).abs().max() > 0.1
    assert torch.equal(y[0, 0], x[0, 0])                                                        # time 0: not at all


@everywhere
def test_the_order_of_earlier_tokens_matters_to_the_last_one(row, scaling):
    config = config_of(row, scaling, n_layer=1)
    model, tokens = model_of(config), torch.tensor([[4, 8, 15, 16, 23, 42 - 12]])
    last, permuted = model(tokens)[0, -1], model(tokens[:, [2, 0, 4, 1, 3, 5]])[0, -1]
    assert (last - permuted).abs().max() > 1e-3 * last.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions

def test_a_rotation_keeps_the_length_of_every_pair():
    config = config_of('baseline', 'default')
    x = inputs(2, 50, 4, 12)
    y = apply_rope(x, rope_tables(config, torch.arange(50), 50, F64))
    close(y.unflatten(-1, (-1, 2)).norm(dim=-1), x.unflatten(-1, (-1, 2)).norm(dim=-1), 1e-14)


def test_with_two_dims_a_vector_is_turned_by_its_position_in_radians():
    config = config_of('mla', qk_rope_head_dim=2)
    x = torch.tensor([1.0, 0.0], dtype=F64).expand(1, 7, 1, 2)
    y = apply_rope(x, rope_tables(config, torch.arange(7), 7, F64))[0, :, 0]
    for p in range(7):
        close(y[p], [math.cos(p), math.sin(p)], 1e-15)


@pytest.mark.parametrize('scaling', ['default', 'yarn'])
def test_turning_in_complex_numbers_is_turning_in_real_ones_forward_and_backward(scaling, monkeypatch):
    """The first is what a CPU does, the second what torch.compile, GPUs and vectors at odd places in memory get."""
    config = config_of('mla', scaling, qk_rope_head_dim=12)
    rope = rope_tables(config, torch.arange(9), 9, F64)
    x, upstream, results = inputs(2, 9, 4, 13)[..., :12].requires_grad_(), inputs(2, 9, 4, 12), []     # odd strides: real
    for view in (lambda x: x, lambda x: x.contiguous()):
        y = apply_rope(view(x), rope)
        results.append((y, *torch.autograd.grad(y, x, upstream)))
    for one, other in zip(*results):
        close(one, other, 1e-15)
    monkeypatch.setattr(torch, 'view_as_complex', None)     # was it really two ways?
    apply_rope(x, rope)
    with pytest.raises(TypeError):
        apply_rope(x.contiguous(), rope)


@pytest.mark.parametrize('shape', [(2, 5, 8), (7, 8)], ids=str)
def test_the_norm_is_torchs_and_passes_gradcheck(shape):
    norm, x = attention.RMSNorm(8).double(), inputs(*shape).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(inputs(8))
    close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6), 1e-15)
    assert torch.autograd.gradcheck(lambda x, w: attention.NormAndGain.apply(x, w, 1e-6), (x, norm.weight))


@pytest.mark.parametrize('row', ['baseline', 'gqa', 'lora', 'enhanced'])
@pytest.mark.parametrize('scaling', ['default', 'yarn'])
def test_interleaved_pairs_with_permuted_weights_are_the_half_split_layout(row, scaling, monkeypatch):
    config = config_of(row, scaling)
    layer, x = layer_of(config), inputs(2, 9, 48)
    width = config.qk_rope_head_dim or 12
    order = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))

    def half_split(x, rope):  # GPT-NeoX, Llama in transformers: x cos + rotate_half(x) sin
        cos, sin = (torch.cat((table, table), -1) for table in rope.unbind(-1))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    rope, q = rope_tables(config, torch.arange(9), 9, F64), inputs(2, 9, 4, width)
    close(half_split(q[..., order], rope), apply_rope(q, rope)[..., order], 1e-15)
    with monkeypatch.context() as patch:                    # in real numbers: bit by bit
        patch.setattr(torch.compiler, 'is_compiling', lambda: True)
        assert torch.equal(half_split(q[..., order], rope), apply_rope(q, rope)[..., order])
    expected = run_layer(layer, config, x).detach()
    rows_of = {}                                            # where the rotated rows of each matrix stand
    if row in LATENT:
        dn, r = config.qk_nope_head_dim, config.kv_lora_rank
        head = torch.cat((torch.arange(dn), dn + order))
        rows_of['q_b_proj'] = torch.cat([head + h * (dn + width) for h in range(4)])
        rows_of['kv_a_proj_with_mqa'] = torch.cat((torch.arange(r), r + order))
    else:
        rows_of['q_proj'] = torch.cat([order + h * 12 for h in range(4)])
        rows_of['k_proj'] = torch.cat([order + h * 12 for h in range(config.n_kv_head)])
    with torch.no_grad():
        for name, rows in rows_of.items():
            for p in getattr(layer, name).parameters():
                p.copy_(p[rows].clone())
    monkeypatch.setattr(attention, 'apply_rope', half_split)
    close(run_layer(layer, config, x).detach(), expected, 1e-13)


def test_linear_scaling_by_s_is_the_default_at_positions_divided_by_s():
    plain, scaled = rope_frequencies(64), rope_frequencies(64, scaling='linear', factor=4.0)
    for p in (1, 7, 400):
        np.testing.assert_allclose([p * f for f in scaled], [p / 4 * f for f in plain], rtol=1e-15)
    config = config_of('baseline', 'linear', rope_factor=2.0)
    ours = rope_tables(config, torch.arange(0, 40, 2), 40, F64)
    theirs = rope_tables(config_of('baseline'), torch.arange(20), 20, F64)
    for one, other in zip(ours, theirs):
        close(one, other, 1e-14)


@pytest.mark.parametrize('scaling', ['linear', 'dynamic', 'yarn'])
def test_factor_one_of_every_scaling_is_the_default(scaling):
    ours = rope_frequencies(64, scaling=scaling, factor=1.0, original=512, length=512)
    np.testing.assert_allclose(ours, rope_frequencies(64), rtol=1e-14)
    plain = config_of('mla')
    config = config_of('mla', rope_scaling=scaling, rope_factor=1.0, rope_mscale=0.7, rope_mscale_all_dim=0.3)
    layer, x = layer_of(plain), inputs(1, 9, 48)
    close(run_layer(layer_of(config), config, x).detach(), run_layer(layer, plain, x).detach(), 1e-14)


@pytest.mark.parametrize('factor', [1.0, 2.0, 40.0])
def test_dynamic_scaling_is_exactly_the_default_up_to_the_original_context_and_not_beyond(factor):
    plain = rope_frequencies(32)
    for length in (0, 1, 511, 512):
        assert rope_frequencies(32, scaling='dynamic', factor=factor, original=512, length=length) == plain
    beyond = rope_frequencies(32, scaling='dynamic', factor=factor, original=512, length=1024)
    base = 10000.0 * (2 * factor - (factor - 1)) ** (32 / 30)
    np.testing.assert_allclose(beyond, [base ** (-i / 16) for i in range(16)], rtol=1e-14)
    assert beyond[0] == 1.0 and beyond[1] < plain[1]
    # NTK-aware: the slowest pair is slowed by exactly the factor by which the context grew (YaRN, section 3.1)
    assert plain[-1] / beyond[-1] == pytest.approx(factor + 1, rel=1e-12)


YARNS = [dict(dim=64, theta=10000.0, factor=40.0, original=4096), dict(dim=64, theta=1e6, factor=4.0, original=32768),
         dict(dim=32, theta=10000.0, factor=16.0, original=2048, beta_fast=16.0, beta_slow=2.0),
         dict(dim=12, theta=1000.0, factor=8.0, original=512), dict(dim=32, theta=10000.0, factor=2.0, original=64)]


@pytest.mark.parametrize('knobs', YARNS, ids=str)
def test_yarn_keeps_fast_pairs_slows_slow_ones_by_the_factor_and_has_a_ramp_between(knobs):
    ours, plain = rope_frequencies(scaling='yarn', **knobs), rope_frequencies(knobs['dim'], knobs['theta'])
    turns = [knobs['original'] * f / (2 * math.pi) for f in plain]          # within the original context
    share = [(1 - o / p) / (1 - 1 / knobs['factor']) for o, p in zip(ours, plain)]      # 0: kept, 1: divided
    fast, slow = knobs.get('beta_fast', 32.0), knobs.get('beta_slow', 1.0)
    first = max([i for i, n in enumerate(turns) if n >= fast], default=0)
    last = min([i for i, n in enumerate(turns) if n <= slow], default=len(turns))
    assert np.allclose(share[:first + 1], 0, atol=1e-12) and np.allclose(share[last:], 1, atol=1e-12)
    ramp = share[first:last + 1]
    assert len(ramp) > 2 and np.allclose(np.diff(ramp), 1 / (last - first), atol=1e-12)         # one straight line


def test_yarn_at_deepseeks_sizes_has_twelve_pairs_on_the_ramp():
    """dr 64, 4096 tokens, base 10000: the ramp runs from pair 10 to pair 23 (DeepSeek's own precompute_freqs_cis)."""
    ours, plain = rope_frequencies(64, scaling='yarn', factor=40.0, original=4096), rope_frequencies(64)
    expected = [10000.0 ** (-i / 32) * (1 - min(max((i - 10) / 13, 0), 1) * (1 - 1 / 40)) for i in range(32)]
    np.testing.assert_allclose(ours, expected, rtol=1e-13)
    assert sum(p / 40 * 1.0001 < o < p * 0.9999 for o, p in zip(ours, plain)) == 12


@pytest.mark.parametrize('knobs', YARNS, ids=str)
def test_yarn_and_dynamic_frequencies_are_those_of_transformers(knobs):
    utils = pytest.importorskip('transformers.modeling_rope_utils', reason='transformers is not installed')
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')

    def theirs(kind, **more):
        rope = {'rope_type': kind, 'rope_theta': knobs['theta'], 'factor': knobs['factor'], **more}
        config = transformers.LlamaConfig(hidden_size=2 * knobs['dim'], num_attention_heads=2, head_dim=knobs['dim'],
                                          max_position_embeddings=knobs['original'], rope_parameters=rope)
        return config, utils.ROPE_INIT_FUNCTIONS[kind]
    config, function = theirs('yarn', original_max_position_embeddings=knobs['original'],
                              beta_fast=knobs.get('beta_fast', 32.0), beta_slow=knobs.get('beta_slow', 1.0))
    expected, ours = function(config, 'cpu')[0].double(), rope_frequencies(scaling='yarn', **knobs)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    config, function = theirs('dynamic')
    for length in (knobs['original'], 3 * knobs['original']):
        expected = function(config, 'cpu', seq_len=length)[0].double()
        ours = rope_frequencies(knobs['dim'], knobs['theta'], 'dynamic', knobs['factor'], knobs['original'],
                                length=length)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_configs_of_these_tests_put_several_pairs_onto_the_ramp_of_yarn():
    """Else the yarn cases above would test a step."""
    for row in ROWS:
        config = config_of(row, 'yarn')
        width = config.qk_rope_head_dim or 12
        plain = [100.0 ** (-2 * i / width) for i in range(width // 2)]
        assert sum(p / 8 * 1.001 < f < p * 0.999 for f, p in zip(reference_frequencies(config, width, 0), plain)) >= 2


def test_the_temperatures_of_yarn_are_those_of_deepseek():
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1.2608, abs=5e-5)
    for all_dim, squared in ((0.707, 1.5896), (1.0, 1.8739)):               # DeepSeek-V2 and V3 at factor 40
        config = config_of('mla', 'yarn', rope_factor=40.0, rope_mscale=all_dim, rope_mscale_all_dim=all_dim)
        assert attention_scale(config, 192) * math.sqrt(192) == pytest.approx(squared, abs=5e-5)
        cos, sin = rope_tables(config, torch.arange(9), 9, F64).unbind(-1)
        close(cos ** 2 + sin ** 2, torch.ones_like(cos), 1e-14)  # equal mscales: amplitude 1, only m^2 is left
    config = config_of('mla', 'yarn', rope_factor=40.0, rope_mscale=1.0, rope_mscale_all_dim=0.0)
    assert attention_scale(config, 192) == 192 ** -0.5  # the temperature is in the angles' amplitude then
    cos, sin = rope_tables(config, torch.arange(9), 9, F64).unbind(-1)
    close(cos ** 2 + sin ** 2, torch.full_like(cos, 1.8739), 3e-5)
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0
    linear = config_of('mla', 'linear', rope_mscale_all_dim=1.0)
    assert attention_scale(linear, 192) == 192 ** -0.5                      # YaRN's alone


# ---------------------------------------------------------------------------------------------------------------------
# Heads, splits, biases

def rows_of_kv_b(config, part):
    """Which rows of kv_b_proj make k_nope (part 0) or v (part 1)."""
    dn, dv = config.qk_nope_head_dim, config.v_head_dim
    rows = torch.arange(config.n_head * (dn + dv)).view(config.n_head, dn + dv)
    return rows[:, :dn].flatten() if part == 0 else rows[:, dn:].flatten()


@pytest.mark.parametrize('row', LATENT)
def test_without_content_keys_the_scores_come_from_the_rotary_parts_alone(row):
    config = config_of(row, 'yarn')
    layer, x = layer_of(config), inputs(2, 9, 48)
    dn, dr = config.qk_nope_head_dim, config.qk_rope_head_dim
    with torch.no_grad():
        layer.kv_b_proj.weight[rows_of_kv_b(config, 0)] = 0.0
        before = run_layer(layer, config, x)
        query = (layer.q_b_proj if config.q_lora_rank else layer.q_proj).weight.view(4, dn + dr, -1)
        query[:, :dn] = inputs(*query[:, :dn].shape)                        # meets keys of zeros
        assert torch.equal(run_layer(layer, config, x), before)
        query[:, dn:] = inputs(*query[:, dn:].shape)
        assert (run_layer(layer, config, x) - before).abs().max() > 1e-3


@pytest.mark.parametrize('row', LATENT)
def test_without_rotary_keys_latent_attention_sees_a_set(row):
    config = config_of(row, 'linear')
    layer, x = layer_of(config), inputs(2, 9, 48)
    shuffled = x[:, [3, 0, 7, 5, 1, 2, 6, 4, 8]]
    with torch.no_grad():
        assert (run_layer(layer, config, x)[:, -1] - run_layer(layer, config, shuffled)[:, -1]).abs().max() > 1e-3
        for p in layer.kv_a_proj_with_mqa.parameters():
            p[config.kv_lora_rank:] = 0.0
        close(run_layer(layer, config, shuffled)[:, -1], run_layer(layer, config, x)[:, -1], 1e-13)


def test_biases_are_where_deepseek_has_them_and_nowhere_else():
    def biased(row, **knobs):
        names = dict(build_attention(config_of(row, **knobs)).named_parameters())
        return {name.split('.')[0] for name in names if name.endswith('bias')}
    for row in LATENT:
        assert biased(row, attention_bias=False) == set()
        expected = {'q_a_proj', 'kv_a_proj_with_mqa', 'o_proj'} - ({'q_a_proj'} if 'no-q-rank' in row else set())
        assert biased(row, attention_bias=True) == expected
    for row in ('baseline', 'gqa', 'mqa'):
        assert biased(row, attention_bias=True) == {'q_proj', 'k_proj', 'v_proj', 'o_proj'} and not biased(row)
    assert biased('enhanced') and not biased('lora') and not biased('mla')


def test_grouped_queries_with_as_many_key_heads_as_heads_are_the_baseline_bit_by_bit():
    one = LanguageModel(config_of('gqa', n_kv_head=4), seed=3)
    other = LanguageModel(config_of('baseline'), seed=3)
    assert torch.equal(one(token_ids(2, 9)), other(token_ids(2, 9)))


@pytest.mark.parametrize('row, groups', [('gqa', 2), ('mqa', 1)])
def test_grouped_queries_are_the_baseline_with_each_key_head_repeated_for_its_group(row, groups):
    config, full = config_of(row), config_of('baseline')
    grouped, layer, x = layer_of(config), layer_of(full), inputs(2, 9, 48)

    def with_heads(order):
        state = grouped.state_dict()
        for name in ('k_proj.weight', 'v_proj.weight'):
            state[name] = state[name].view(groups, 12, 48)[order].flatten(0, 1)
        layer.load_state_dict(state)
        return run_layer(layer, full, x).detach()
    ours = run_layer(grouped, config, x).detach()
    close(ours, with_heads([0, 0, 1, 1] if groups == 2 else [0] * 4), 1e-13)
    if groups == 2:
        assert (ours - with_heads([0, 1, 0, 1])).abs().max() > 1e-3 * ours.abs().max()          # not tiled


def test_a_new_variant_is_a_row(monkeypatch):
    def more(n_embd, n_head):
        return {**variants(n_embd, n_head), 'thin': {**variants(n_embd, n_head)['mla'], 'kv_lora_rank': 4}}
    monkeypatch.setattr(attention, 'variants', more)
    config = ModelConfig(**SIZES, attn='thin')
    assert config.kv_lora_rank == 4 and isinstance(LanguageModel(config).layers[0].attn, LatentAttention)


def test_the_rows_of_experiment_1_are_the_numbers_of_the_report():
    sizes = ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
    rows = {name: ModelConfig(n_embd=384, n_head=8, attn=name) for name in variants(384, 8)}
    assert [getattr(rows['lora'], k) for k in sizes] == [32, 64, 16, 32, 48]
    assert [getattr(rows['enhanced'], k) for k in sizes] == [32, 64, 48, 32, 48]
    assert [getattr(rows['mla'], k) for k in sizes] == [112, 40, 48, 24, 48]
    enhanced = rows['enhanced']
    assert (enhanced.rope_scaling, enhanced.rope_factor, enhanced.attention_bias) == ('linear', 2.0, True)
    assert [rows[name].n_kv_head for name in ('baseline', 'gqa', 'mqa')] == [8, 2, 1]
    paper = ModelConfig(n_embd=5120, n_head=40, attn='mla')                 # V2's proportions, heads of 128
    assert [getattr(paper, k) for k in sizes] == [1536, 512, 128, 64, 128]


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@everywhere
def test_attention_on_cuda_in_bfloat16_is_close_to_float32_on_the_cpu(row, scaling):
    check_on_device('cuda', row, scaling, torch.bfloat16, 3e-2)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason='needs an Apple GPU')
@pytest.mark.parametrize('row', ROWS)
def test_attention_on_mps_in_float32_is_close_to_the_cpu(row):
    check_on_device('mps', row, 'default', torch.float32, 1e-4)


def check_on_device(device, row, scaling, dtype, tolerance):
    config = config_of(row, scaling)
    layer, x = layer_of(config, torch.float32), inputs(2, 14, 48, dtype=torch.float32)
    full = run_layer(layer, config, x).detach()
    layer, x = layer.to(device, dtype), x.to(device, dtype)
    rope = rope_tables(config, torch.arange(14, device=device), 14)
    out = layer(x, rope)
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    close(out.detach().cpu(), full, tolerance)
    for mode in ('expand', 'absorb'):
        layer.decode_mode, cache, outs = mode, layer.new_cache(2, 14, dtype, device), []
        for first, last in ((0, 5), (5, 6), (6, 14)):
            slots = torch.arange(first, last, device=device)
            mask = (torch.arange(last, device=device) <= slots.unsqueeze(1)).view(1, 1, last - first, last)
            rope = rope_tables(config, slots, 14)
            outs.append(layer(x[:, first:last], rope, mask if first else None, cache, slots if first else None, last))
        close(torch.cat(outs, 1).detach().cpu(), full, tolerance)
