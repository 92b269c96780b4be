"""hf.py against transformers and safetensors, implementations that are not ours: the same files, the same logits.

Small networks of every family, with random weights, are written by transformers beside a config.json as it is published
but for the sizes. No published weights are read here.
"""
import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies

from conftest import REPOSITORY, flags, one_line
import forked
import hf
from model import LanguageModel, ModelConfig
from tokenizer import Tokenizer, make_tokenizer

transformers = pytest.importorskip('transformers', reason='the reference of these tests; it needs Python 3.11')
safetensors = pytest.importorskip('safetensors.torch')
tokenizers = pytest.importorskip('tokenizers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings('ignore:Initializing zero-element')

# ---------------------------------------------------------------------------------------------------------------------
# config.json of the published models, whole

DEEPSEEK = json.loads('''
    {"attention_bias": false, "attention_dropout": 0.0, "auto_map": {"AutoConfig":
    "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1,
    "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_layer_freq": 1, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "seq_aux": true, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128}''')
FLOAT8 = {'quantization_config': {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8',
                                  'weight_block_size': [128, 128]}}


def yarn(factor, mscale, **more):
    return {'beta_fast': 32, 'beta_slow': 1, 'factor': factor, 'mscale': mscale, 'mscale_all_dim': mscale,
            'original_max_position_embeddings': 4096, 'type': 'yarn', **more}


V2_LITE = DEEPSEEK | {
    'architectures': ['DeepseekV2ForCausalLM'], 'model_type': 'deepseek_v2', 'hidden_size': 2048, 'intermediate_size':
    10944, 'moe_intermediate_size': 1408, 'first_k_dense_replace': 1, 'n_group': 1, 'topk_group': 1,
    'n_routed_experts': 64, 'n_shared_experts': 2, 'norm_topk_prob': False, 'num_attention_heads': 16,
    'num_key_value_heads': 16, 'num_experts_per_tok': 6, 'num_hidden_layers': 27, 'q_lora_rank': None, 'rope_scaling':
    yarn(40, 0.707), 'routed_scaling_factor': 1.0, 'scoring_func': 'softmax', 'topk_method': 'greedy', 'vocab_size':
    102400}
V2 = V2_LITE | {
    'hidden_size': 5120, 'intermediate_size': 12288, 'moe_intermediate_size': 1536, 'n_group': 8, 'topk_group': 3,
    'n_routed_experts': 160, 'num_attention_heads': 128, 'num_key_value_heads': 128, 'num_hidden_layers': 60,
    'q_lora_rank': 1536, 'routed_scaling_factor': 16.0, 'topk_method': 'group_limited_greedy'}
V3 = DEEPSEEK | {
    'architectures': ['DeepseekV3ForCausalLM'], 'model_type': 'deepseek_v3', 'hidden_size': 7168, 'intermediate_size':
    18432, 'moe_intermediate_size': 2048, 'first_k_dense_replace': 3, 'n_group': 8, 'topk_group': 4,
    'n_routed_experts': 256, 'n_shared_experts': 1, 'norm_topk_prob': True, 'num_attention_heads': 128,
    'num_key_value_heads': 128, 'num_experts_per_tok': 8, 'num_hidden_layers': 61, 'num_nextn_predict_layers': 1,
    'q_lora_rank': 1536, 'rope_scaling': yarn(40, 1.0), 'ep_size': 1, 'routed_scaling_factor': 2.5, 'scoring_func':
    'sigmoid', 'topk_method': 'noaux_tc', 'vocab_size': 129280}
MOONLIGHT = V3 | {
    'hidden_size': 2048, 'intermediate_size': 11264, 'moe_intermediate_size': 1408, 'first_k_dense_replace': 1,
    'n_group': 1, 'topk_group': 1, 'n_routed_experts': 64, 'n_shared_experts': 2, 'num_attention_heads': 16,
    'num_key_value_heads': 16, 'num_experts_per_tok': 6, 'num_hidden_layers': 27, 'num_nextn_predict_layers': 0,
    'q_lora_rank': None, 'rope_scaling': None, 'rope_theta': 50000.0, 'rms_norm_eps': 1e-05, 'routed_scaling_factor':
    2.446, 'vocab_size': 163840, 'max_position_embeddings': 8192, 'bos_token_id': 163584, 'eos_token_id': 163585}
KIMI_K2 = V3 | {
    'model_type': 'kimi_k2', 'n_group': 1, 'topk_group': 1, 'n_routed_experts': 384, 'num_attention_heads': 64,
    'num_key_value_heads': 64, 'first_k_dense_replace': 1, 'num_nextn_predict_layers': 0, 'rope_theta': 50000.0,
    'routed_scaling_factor': 2.827, 'rope_scaling': yarn(32.0, 1.0, beta_fast=1.0, beta_slow=1.0), 'vocab_size':
    163840, 'max_position_embeddings': 131072, 'bos_token_id': 163584, 'eos_token_id': [163585, 163586]}
MIXTRAL = json.loads('''
    {"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true,
    "vocab_size": 32000}''')
QWEN3 = json.loads('''
    {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id":
    151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size":
    2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers":
    48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta":
    1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false, "torch_dtype":
    "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size":
    151936}''')


@pytest.mark.parametrize('published, total, active, cached', [      # cached: numbers per token and layer
    (V2_LITE, 15.7e9, 2.4e9, 576), (V2, 236e9, 21e9, 576), (V3 | FLOAT8, 671e9, 37e9, 576), (MOONLIGHT, 16.0e9, 3e9, 576),
    (KIMI_K2 | FLOAT8, 1.03e12, 32e9, 576), (MIXTRAL, 46.7e9, 12.9e9, 2 * 8 * 128), (QWEN3, 30.5e9, 3.3e9, 2 * 4 * 128)],
    ids=['V2-Lite', 'V2', 'V3', 'Moonlight', 'Kimi-K2', 'Mixtral-8x7B', 'Qwen3-30B-A3B'])
def test_published_configs_give_the_published_sizes_of_model_and_cache(published, total, active, cached):
    family, config, _ = hf.read_config(published)
    with torch.device('meta'):
        model = LanguageModel(config, seed=None)
    counts = model.parameter_counts()
    assert counts['params_total'] == pytest.approx(total, rel=0.005)
    assert counts['params_active'] == pytest.approx(active, rel=0.13)          # they round, and count embeddings or not
    assert model.cache_bytes_per_token(torch.bfloat16) == 2 * cached * config.n_layer
    assert (config.block_size, config.norm_eps) == (published['max_position_embeddings'], published['rms_norm_eps'])


# ---------------------------------------------------------------------------------------------------------------------
# Networks of these families, small

LATENT = {'hidden_size': 32, 'intermediate_size': 40, 'moe_intermediate_size': 24, 'kv_lora_rank': 16,
          'qk_nope_head_dim': 8, 'qk_rope_head_dim': 8, 'v_head_dim': 12, 'n_routed_experts': 16,
          'num_attention_heads': 4, 'num_key_value_heads': 4, 'num_experts_per_tok': 4,
          'num_hidden_layers': 3, 'first_k_dense_replace': 1, 'vocab_size': 97,
          'max_position_embeddings': 640, 'bos_token_id': 0, 'eos_token_id': 1}
HEADS = {'hidden_size': 32, 'intermediate_size': 24, 'num_attention_heads': 4, 'num_hidden_layers': 2, 'vocab_size': 97,
         'max_position_embeddings': 640}


SMALL = {
    'mixtral, multi-head': MIXTRAL | HEADS | {'num_key_value_heads': 4},
    'mixtral, grouped-query': MIXTRAL | HEADS | {'num_key_value_heads': 2},
    'mixtral, multi-query': MIXTRAL | HEADS | {'num_key_value_heads': 1},
    'mixtral, wide heads, yarn, tied': MIXTRAL | HEADS | {
        'num_key_value_heads': 2, 'head_dim': 12, 'tie_word_embeddings': True,
        'rope_scaling': yarn(8, 0.5, original_max_position_embeddings=16)},
    'qwen3': QWEN3 | HEADS | {'head_dim': 12, 'num_key_value_heads': 2, 'num_experts': 8, 'num_experts_per_tok': 3,
                              'moe_intermediate_size': 16},
    'qwen3, biases, dense layer': QWEN3 | HEADS | {
        'head_dim': 8, 'num_key_value_heads': 4, 'num_experts': 8, 'num_experts_per_tok': 3,
        'moe_intermediate_size': 16,
        'attention_bias': True, 'mlp_only_layers': [0], 'norm_topk_prob': False},
    'v2-lite': V2_LITE | LATENT,
    'v2, greedy beside groups': V2_LITE | LATENT | {'n_group': 4, 'topk_group': 2},      # which greedy ignores
    'v2': V2 | LATENT | {'q_lora_rank': 20, 'n_group': 8, 'topk_group': 3},
    'v3': V3 | LATENT | {'q_lora_rank': 20, 'n_group': 8, 'topk_group': 4},
    'v3, half-split, biases, no layer of experts': V3 | LATENT | {
        'q_lora_rank': 20, 'n_group': 4, 'topk_group': 2, 'rope_interleave': False, 'attention_bias': True,
        'first_k_dense_replace': 3, 'rope_scaling': None},
    'v3, half-split': V3 | LATENT | {'q_lora_rank': None, 'n_group': 4, 'topk_group': 2,
                                                 'rope_interleave': False},
    'moonlight': MOONLIGHT | LATENT,
    'kimi-k2': KIMI_K2 | LATENT | {'q_lora_rank': 20},
    'mistral4': json.loads(transformers.Mistral4Config(**LATENT, q_lora_rank=20, rope_parameters=yarn(
        40, 1.0, original_max_position_embeddings=16, rope_theta=10000.0, llama_4_scaling_beta=0.0)).to_json_string())
    | {'architectures': ['Mistral4ForCausalLM']}}


def randomise(model, seed=0):
    """Gains around 1, biases and the biases for choosing well away from 0, weights so large that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if 'norm' in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0.0, 0.3 if 'bias' in name else 0.15, generator=generator)
    return model.eval()


def build(config):
    """config.json -> a transformers model with random weights."""
    kind = getattr(transformers, config['architectures'][0])
    said = {k: v for k, v in config.items() if k not in ('model_type', 'quantization_config', 'auto_map')}
    return randomise(kind(kind.config_class(**json.loads(json.dumps(said)))))


def saved(folder, config, theirs=None, **options):
    """The folder that transformers writes of a network, with the published fields in config.json."""
    (theirs or build(config)).save_pretrained(folder, **options)
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


@pytest.fixture(scope='module', params=SMALL)
def small(request, tmp_path_factory):
    """A family's network in transformers, and the folder that it wrote."""
    config, theirs = SMALL[request.param], build(SMALL[request.param])
    folder = saved(tmp_path_factory.mktemp('theirs'), config, theirs,
                   max_shard_size='40KB' if request.param == 'v3' else '1GB')
    return SimpleNamespace(name=request.param, config=config, theirs=theirs, folder=folder, ours=hf.from_folder(folder))


TOKENS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours, theirs):
    assert theirs.abs().max() > 1 and (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@torch.no_grad()
def test_what_transformers_wrote_gives_its_logits(small):
    assert_same_logits(small.ours(TOKENS), small.theirs(TOKENS).logits)


def test_the_config_that_transformers_itself_writes_says_what_the_published_one_says(small, tmp_path):
    small.theirs.config.save_pretrained(tmp_path)               # num_experts became num_local_experts
    assert hf.read_config(json.loads((tmp_path / 'config.json').read_text())) == hf.read_config(small.config)


@torch.no_grad()
def test_token_by_token_from_the_cache_too(small):
    cache = small.ours.new_cache(2, 40)
    logits = [small.ours.decode(TOKENS[:, :7], cache, last=False)]
    logits += [small.ours.decode(TOKENS[:, t:t + 1], cache, last=False) for t in range(7, 40)]
    assert_same_logits(torch.cat(logits, 1), small.theirs(TOKENS).logits)


@torch.no_grad()
def test_in_batches_padded_on_the_left_too(small):
    mask = torch.arange(40) >= torch.tensor([[0], [11]])
    theirs = small.theirs(TOKENS, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    cache = small.ours.new_cache(2, 40, starts=[0, 11])
    ours = torch.cat([small.ours.decode(part, cache, last=False) for part in TOKENS.split([30, 10], 1)], 1)
    assert_same_logits(ours[mask], theirs[mask])


def tensors(folder):
    return {name: t for file in folder.glob('*.safetensors') for name, t in safetensors.load_file(file).items()}


@torch.no_grad()
def test_written_by_us_transformers_gives_the_same_logits_and_nothing_has_changed_by_a_bit(small, tmp_path):
    hf.to_folder(small.ours, None, tmp_path / 'ours')
    back = getattr(transformers, small.config['architectures'][0]).from_pretrained(tmp_path / 'ours').eval()
    assert_same_logits(back(TOKENS).logits, small.theirs(TOKENS).logits)
    before, after = tensors(small.folder), tensors(tmp_path / 'ours')
    if 'half-split' not in small.name:                          # there the rows come back in DeepSeek's order
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = hf.from_folder(tmp_path / 'ours').state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in small.ours.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Our variants in transformers (these are the models that bench.py times beside ours)

SIZES = dict(vocab_size=97, block_size=300, n_layer=2, n_head=4, n_embd=64, d_ff=48, n_expert=8, top_k=3)
YARN = dict(rope_scaling='yarn', rope_factor=40.0, rope_original_context=256)


@pytest.mark.parametrize('router', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('knobs', [
    dict(attn='lora'), dict(attn='enhanced'), dict(attn='mla'), dict(attn='mla', n_shared_expert=2),
    dict(attn='enhanced', q_lora_rank=0),
    dict(attn='lora', **YARN, rope_beta_fast=16.0, rope_beta_slow=2.0),
    dict(attn='mla', **YARN, rope_mscale=0.707, rope_mscale_all_dim=0.707),
    dict(attn='enhanced', **YARN, rope_mscale=1.0, rope_mscale_all_dim=0.5, qk_rope_head_dim=32, rope_theta=1000.0),
    dict(attn='lora', **YARN, rope_attention_factor=0.8, rope_mscale_all_dim=0.5),
    dict(attn='mla', rope_scaling='dynamic', rope_factor=4.0, rope_original_context=256),
    dict(attn='mla', rope_scaling='linear', rope_factor=2.0),
    dict(attn='mla', routed_scaling_factor=2.5, top_k=2, norm_eps=1e-3),
    dict(attn='mla', norm_topk_prob=False, n_expert_group=4, top_k_group=2),
    dict(attn='mla', top_k=1, tie_embeddings=False, n_dense_layer=1)], ids=str)
def test_latent_attention_gives_the_logits_of_its_peer(knobs, router, tmp_path):
    same_logits_as_its_peer(ModelConfig(**{**SIZES, **knobs}, router=router), tmp_path)


@pytest.mark.parametrize('knobs', [
    dict(attn='baseline'), dict(attn='gqa', rope_scaling='linear', rope_factor=2.0, tie_embeddings=False),
    dict(attn='mqa', rope_scaling='dynamic', rope_factor=4.0, rope_original_context=256), dict(attn='gqa', head_dim=24),
    dict(attn='gqa', **YARN, rope_mscale=0.7, rope_mscale_all_dim=0.4),
    dict(attn='baseline', qk_norm=True, norm_eps=1e-3),
    dict(attn='gqa', qk_norm=True, attention_bias=True, norm_topk_prob=False, n_dense_layer=1, **YARN)], ids=str)
def test_multi_head_attention_gives_the_logits_of_its_peer(knobs, tmp_path):
    same_logits_as_its_peer(ModelConfig(**{**SIZES, **knobs}), tmp_path)


@torch.no_grad()
def same_logits_as_its_peer(config, folder):
    ours = randomise(LanguageModel(config))
    theirs = hf.peer(ours).eval()
    tokens = torch.randint(0, 97, (2, 300), generator=torch.Generator().manual_seed(1))
    assert_same_logits(ours(tokens), theirs(tokens).logits)
    hf.to_folder(ours, None, folder / 'ours')                   # the files that transformers would have written
    theirs.save_pretrained(folder / 'theirs')
    again = hf.from_folder(folder / 'ours')
    assert_same_logits(again(tokens), ours(tokens))
    assert again.config.block_size == config.block_size         # also where theirs calls the original context the maximum
    mine, written = tensors(folder / 'ours'), tensors(folder / 'theirs')
    assert mine.keys() == written.keys() and all(torch.equal(mine[name], written[name]) for name in mine)


@pytest.mark.parametrize('knob, knobs', [
    ('router', dict(router='sigmoid')), ('n_shared_expert', dict(n_shared_expert=1)),
    ('attention_bias', dict(attention_bias=True)),
    ('norm_topk_prob', dict(norm_topk_prob=False)), ('routed_scaling_factor', dict(routed_scaling_factor=2.0)),
    ('top_k', dict(top_k=1)),
    ('n_dense_layer', dict(n_dense_layer=1)), ('n_expert_group', dict(n_expert_group=2, top_k_group=2)),
    ('n_expert_group', dict(attn='mla', n_expert_group=2, top_k_group=2)),
    # what transformers 5.23 crashes with
    ('kv_lora_rank=7', dict(attn='mla', norm_topk_prob=False, kv_lora_rank=7)),
    ('qk_nope_head_dim=5', dict(attn='mla', norm_topk_prob=False, qk_nope_head_dim=5)),
    ('n_expert=1', dict(attn='mla', router='sigmoid', n_expert=1, top_k=1))])
def test_what_no_family_has_is_refused_by_the_name_of_the_knob(knob, knobs, tmp_path):
    with pytest.raises(ValueError, match=knob) as error:
        hf.to_folder(LanguageModel(ModelConfig(**{**SIZES, **knobs})), None, tmp_path / 'x')
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled_whatever_it_is_called_and_a_full_one_left_alone(tmp_path, monkeypatch):
    model = LanguageModel(ModelConfig(**SIZES))
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'empty')
    hf.to_folder(model, None, '.')
    assert (tmp_path / 'empty/config.json').exists() and [p.name for p in tmp_path.iterdir()] == ['empty']
    for full in (tmp_path / 'empty', '/'):
        with pytest.raises(ValueError, match='is there already; name a new folder'):
            hf.to_folder(model, None, full)
    monkeypatch.chdir(tmp_path)
    hf.to_folder(model, None, '~nobody-here/mine')          # no such home: a folder of that name, as the shell takes it
    assert hf.from_folder('~nobody-here/mine').config == model.config and (tmp_path / '~nobody-here/mine').is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Files: dtypes, shards, damage

@pytest.fixture
def folder(tmp_path):
    """A small DeepSeek-V3 as transformers writes it, in shards."""
    return saved(tmp_path / 'v3', SMALL['v3'], max_shard_size='40KB')


def edit(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def test_weights_keep_the_dtype_of_the_file_or_take_the_one_asked_for(tmp_path):
    theirs = build(SMALL['moonlight']).bfloat16()
    for layer in theirs.model.layers[1:]:                       # the biases for choosing stay float32, as published
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float() + 1e-4
    saved(tmp_path / 'theirs', SMALL['moonlight'], theirs)
    ours, wide = hf.from_folder(tmp_path / 'theirs'), hf.from_folder(tmp_path / 'theirs', dtype=torch.float64)
    kinds = {name: tensor.dtype for name, tensor in ours.state_dict().items()}
    assert {kind for name, kind in kinds.items() if name.endswith('correction_bias')} == {torch.float32}
    assert {kind for name, kind in kinds.items() if not name.endswith('correction_bias')} == {torch.bfloat16}
    assert wide.embed.weight.dtype == torch.float64 and torch.equal(wide.embed.weight, ours.embed.weight.double())
    hf.to_folder(ours, None, tmp_path / 'ours')
    before, after = tensors(tmp_path / 'theirs'), tensors(tmp_path / 'ours')
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_multi_token_prediction_and_frequencies_are_left_out(folder):
    expected = hf.from_folder(folder).state_dict()
    extra = {f'model.layers.3.{name}': torch.ones(4, 4) for name in ('eh_proj.weight', 'shared_head.head.weight',
                                                                     'self_attn.o_proj.weight')}
    extra['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    safetensors.save_file(extra, folder / 'more.safetensors')
    index(folder, lambda shard_of: shard_of.update(dict.fromkeys(extra, 'more.safetensors')))
    found = hf.from_folder(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_quantised_weights_are_refused_with_what_to_do(folder):
    edit(folder / 'config.json', lambda config: config | FLOAT8)
    refused(folder, 'quantization_config=', "'fp8'", 'converted to bfloat16')


def first_shard(folder):
    return sorted(folder.glob('model-*.safetensors'))[0]


def shorten(folder, by=5):
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-by])


def index(folder, change):
    edit(folder / 'model.safetensors.index.json', lambda content: change(content['weight_map']))


def to_pickle(folder):
    for file in [*folder.glob('*.safetensors'), folder / 'model.safetensors.index.json']:
        file.unlink()
    torch.save({}, folder / 'pytorch_model.bin')


def header(folder, change):
    """Change the text of the first shard's header, keeping its length."""
    data = first_shard(folder).read_bytes()
    length = int.from_bytes(data[:8], 'little')
    text = change(data[8:8 + length].decode()).encode()
    first_shard(folder).write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + length:])


@pytest.mark.parametrize('damage, words', [
    (shorten, ('model-00001', 'cannot lie at')),
    (lambda f: first_shard(f).write_bytes(b''), ('cannot be read',)),
    (lambda f: first_shard(f).write_bytes(b'\xff' * 100), ('cannot be read',)),
    (lambda f: header(f, lambda text: text.replace('"F32"', '"Q4"', 1)), ('model-00001', 'dtype Q4')),
    (lambda f: header(f, lambda text: text.replace('[0,', '[4,', 1)), ('model-00001', 'cannot lie at 4 to')),
    (lambda f: header(f, lambda text: '[]'), ('cannot be read',)),
    (lambda f: first_shard(f).unlink(), ('model-00001', 'No such file')),
    (lambda f: index(f, lambda m: m.pop('lm_head.weight') and None), ('index.json', 'lm_head.weight')),
    (lambda f: index(f, lambda m: m.update({'model.none': first_shard(f).name})), ('index.json', 'model.none')),
    (lambda f: index(f, lambda m: m.update({'lm_head.weight': sorted({*m.values()} - {m['lm_head.weight']})[0]})),
     ('index.json', 'lm_head.weight')),
    (lambda f: index(f, lambda m: m.update({'lm_head.weight': '../' + first_shard(f).name})),
     ('index.json', 'weight_map')),
    (lambda f: edit(f / 'model.safetensors.index.json', lambda content: {'metadata': {}}),
     ('index.json', 'weight_map')),
    (lambda f: (f / 'model.safetensors.index.json').write_text('{'), ('index.json', 'cannot be read')),
    (lambda f: (f / 'config.json').write_bytes(b'\xff'), ('config.json', 'cannot be read')),
    (lambda f: (f / 'config.json').write_text('[]'), ('config.json', 'no JSON object')),
    (lambda f: (f / 'config.json').unlink(), ('config.json', 'No such file')),
    (to_pickle, ('pickles',))], ids=lambda value: value.__name__.strip("<>") if callable(value) else str(value))
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, words):
    damage(folder)
    refused(folder, *words)


def refused(folder, *words):
    with pytest.raises(ValueError) as error:
        hf.from_folder(folder)
    message = str(error.value)
    assert '\n' not in message and all(word in message for word in (str(folder), *words)), message


@pytest.mark.parametrize('change, words', [
    (lambda t: t.update({'model.layers.9.x': torch.ones(1)}), ('model.layers.9.x is not of this network',)),
    (lambda t: t.update({'model.layers.0.mlp.up_proj.bias': torch.ones(1), 'z': torch.ones(1)}),
     ('mlp.up_proj.bias', '2 tensors')),
    (lambda t: t.pop('lm_head.weight'), ('there is no lm_head.weight',)),
    (lambda t: t.update({'lm_head.weight': torch.ones(96, 32)}), ('lm_head.weight has shape [96, 32]', '[97, 32]'))])
def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path, change, words):
    folder = saved(tmp_path / 'v3', SMALL['v3'])
    content = safetensors.load_file(folder / 'model.safetensors')
    change(content)
    safetensors.save_file(content, folder / 'model.safetensors')
    refused(folder, *words)


@pytest.mark.parametrize('family, field, value', [
    ('v3', 'index_topk', 2048), ('v3', 'hidden_act', 'gelu'), ('v3', 'scoring_func', 'softmax'),
    ('v3', 'topk_method', 'greedy'),
    ('v3', 'moe_layer_freq', 2), ('v3', 'num_key_value_heads', 2),
    ('v3', 'attention_dropout', 0.1),
    ('v3', 'kv_lora_rank', None), ('v3', 'hidden_size', '32'), ('v3', 'hidden_size', 33),
    ('v3', 'num_hidden_layers', -1),
    ('v3', 'num_experts_per_tok', 1), ('v3', 'rope_theta', None), ('v3', 'architectures', ['DeepseekV32ForCausalLM']),
    ('v3', 'architectures', None),
    ('v2', 'norm_topk_prob', True), ('v2', 'topk_method', 'noaux_tc'), ('v2', 'mlp_bias', True),
    ('v2', 'rope_interleave', False),
    ('mistral4', 'n_group', 2),
    ('mixtral, multi-head', 'sliding_window', 4096), ('mixtral, multi-head', 'router_jitter_noise', 0.1),
    ('qwen3', 'mlp_only_layers', [1]), ('qwen3', 'use_sliding_window', True), ('qwen3', 'decoder_sparse_step', 2)])
def test_a_config_that_cannot_be_expressed_is_refused_by_field_and_value(family, field, value):
    with pytest.raises(ValueError) as error:
        hf.read_config(SMALL[family] | {field: value})
    message = str(error.value)
    assert '\n' not in message and (field in message or 'must be' in message), message
    assert str(value) in message or value is None


@pytest.mark.parametrize('family, rope', [
    ('v3', {'rope_type': 'llama3', 'factor': 8.0}), ('v3', {'type': 'longrope'}),
    ('v3', yarn(40, 1.0, truncate=False)), ('v3', {'type': 'linear'}),
    ('v3', {'type': 'linear', 'factor': 2.0, 'mscale_all_dim': 1.0}), ('v3', {'type': 'yarn'}),
    ('v3', yarn(40, 1.0, odd=1)),
    ('v3', {'type': 'yarn', 'factor': 40, 'mscale': 0.707}),
    ('v3', {'type': 'yarn', 'factor': 40, 'mscale_all_dim': 1.0}),
    ('mistral4', yarn(40, 1.0, llama_4_scaling_beta=0.1)),
    ('mixtral, multi-head', {'type': 'linear', 'factor': 2.0, 'partial_rotary_factor': 0.5})])
def test_rotary_positions_that_cannot_be_expressed_are_refused(family, rope):
    fields = {k: v for k, v in SMALL[family].items() if not k.startswith('rope_p')}
    fields |= {'rope_scaling': rope, 'rope_theta': 10000.0}
    with pytest.raises(ValueError, match='|'.join([*rope, 'rope_type', 'factor'])) as error:
        hf.read_config(fields)
    assert '\n' not in str(error.value)


def test_whatever_stands_in_a_field_is_read_or_refused_in_one_line(folder):
    config = SMALL['v3']
    places = [(field,) for field in config]
    places += [(field, inner) for field in ('rope_scaling',) for inner in config[field]]
    refusals = 0
    for place in places:
        for value in ('x', [1], {'a': 1}, -1, 1.5):
            broken = json.loads(json.dumps(config))
            inner = broken if len(place) == 1 else broken[place[0]]
            inner[place[-1]] = value
            (folder / 'config.json').write_text(json.dumps(broken))
            try:
                hf.from_folder(folder)
            except ValueError as error:
                refusals += 1
                assert '\n' not in str(error), (place, value)
    assert refusals > 3 * len(places)


def test_every_field_that_decides_is_needed():
    for field in hf.FAMILIES['DeepseekV3ForCausalLM'].fields.keys() - hf.ABSENT.keys():
        with pytest.raises(ValueError, match=field):
            hf.read_config({k: v for k, v in SMALL['v3'].items() if k != field})


def test_nothing_is_left_half_written_and_nothing_that_is_there_is_touched(tmp_path, monkeypatch):
    model = LanguageModel(ModelConfig(**SIZES))
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='is there already'):
        hf.to_folder(model, None, tmp_path / 'mine')
    with pytest.raises(ValueError, match='File name too long'):
        hf.to_folder(model, None, tmp_path / ('x' * 300))
    (tmp_path / 'new.part').mkdir()                             # a name that an unfinished folder might have had

    def full(path, tensors):
        path.write_bytes(b'1')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(hf, 'write_safetensors', full)
    with pytest.raises(ValueError, match='No space left'):
        hf.to_folder(model, None, tmp_path / 'new')
    monkeypatch.undo()
    hf.to_folder(model, None, tmp_path / 'new')
    assert {path.name for path in tmp_path.iterdir()} == {'mine', 'new.part', 'new'}
    assert (tmp_path / 'mine' / 'notes.txt').read_text() == 'mine'
    (tmp_path / 'empty').mkdir()
    hf.to_folder(model, None, tmp_path / 'empty')
    assert torch.equal(hf.from_folder(tmp_path / 'empty').embed.weight, model.embed.weight)


MEMORY = '''
import resource, sys
import hf, torch
assert not {'transformers', 'safetensors', 'tokenizers'} & set(sys.modules)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = hf.from_folder(sys.argv[1])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss is in other units')
def test_weights_are_never_held_twice_and_no_optional_package_is_imported(tmp_path):
    config = ModelConfig(vocab_size=100, n_embd=256, n_head=4, n_layer=2, n_expert=32, d_ff=512, attn='mla')   # 103 MB
    hf.to_folder(LanguageModel(config, seed=None), None, tmp_path / 'wide')
    ratio = subprocess.run([sys.executable, '-c', MEMORY, tmp_path / 'wide'], cwd=REPOSITORY, capture_output=True,
                           text=True)
    assert float(ratio.stdout) < 1.4, ratio.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers, and a run from its folder to the same text in transformers

@pytest.fixture(scope='module', params=['bpe', 'bytes'])
def exported(request, tmp_path_factory):
    """A tokenizer of ours, and the folder that it was written to."""
    texts = [path.read_text('utf-8') for path in sorted(REPOSITORY.glob('*.py'))[:6]]
    texts += ['the \u00e9t\u00e9 \u4e2d\u6587 ' * 20]
    tokenizer = make_tokenizer(request.param, 700, texts, log=lambda line: None)
    folder = tmp_path_factory.mktemp('tokenizer') / 'x'
    hf.to_folder(LanguageModel(ModelConfig(**SIZES | {'vocab_size': tokenizer.vocab_size})), tokenizer, folder)
    return SimpleNamespace(ours=tokenizer, theirs=transformers.AutoTokenizer.from_pretrained(folder),
                           again=hf.FolderTokenizer(folder))


TEXTS = ['', 'def f(x):\n\treturn x', '<|endoftext|>', 'a<|endoftext|>b <|endoftext|>', ' ' * 4096 + 'x', ' ' * 5000,
         '\n' * 130 + 'x',
         "it's IT'S we'LL '\u017f \u017f", '\u4e2d\u6587 \U0001f600\u200d e\u0301 \u0661\u0662',
         '\r\n\r\n  x\u2003y\x85\xa0z', '1234567.89', 'x' * 300]


@settings(max_examples=150, deadline=None)
@given(text=strategies.sampled_from(TEXTS) | strategies.text('ab \n\'sS1')
       | strategies.text(strategies.characters(exclude_categories=['Cs'])))
def test_the_exported_tokenizer_encodes_and_decodes_as_ours(exported, text):
    ids = exported.ours.encode(text)
    assert exported.theirs(text)['input_ids'] == ids == exported.again.encode(text)
    assert exported.theirs.decode(ids) == text == exported.again.decode(ids)


def test_the_end_of_text_is_a_token_of_its_own_that_only_its_id_makes(exported):
    eot = exported.ours.eot
    assert exported.theirs.eos_token_id == eot == exported.again.eot and exported.again.ends == {eot}
    assert exported.theirs.decode([eot]) == '<|endoftext|>' == exported.ours.decode([eot])
    assert eot not in exported.theirs('<|endoftext|>')['input_ids'] and len(exported.theirs) == exported.ours.vocab_size


def test_the_pattern_of_gpt4_is_written_in_the_other_dialect_of_regular_expressions():
    # cl100k_base, as tiktoken spells it
    pattern = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
               r"|\s*[\r\n]|\s+(?!\S)|\s")
    ours = Tokenizer('cl100k_base', [bytes([i]) for i in range(256)] + [b'34'], pattern)            # 123|45
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hf.tokenizer_json(ours)))
    assert all(ours.encode(text) == theirs.encode(text).ids for text in TEXTS)


def test_a_tokenizer_may_have_fewer_tokens_than_the_model_but_not_more(tmp_path):
    tokenizer = make_tokenizer('bytes', 0, [], None)            # 257
    hf.to_folder(LanguageModel(ModelConfig(**SIZES | {'vocab_size': 300})), tokenizer, tmp_path / 'fewer')
    assert hf.FolderTokenizer(tmp_path / 'fewer').vocab_size == 257
    with pytest.raises(ValueError, match='97 tokens, its tokenizer 257'):
        hf.to_folder(LanguageModel(ModelConfig(**SIZES)), tokenizer, tmp_path / 'more')


def test_a_folders_tokenizer_puts_the_beginning_in_front_and_knows_several_ends(exported, tmp_path):
    content = hf.tokenizer_json(exported.ours)
    content['added_tokens'] += [dict(content['added_tokens'][0], id=exported.ours.vocab_size, content='<s>')]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'add_bos_token': True,
                                                                'bos_token': {'content': '<s>'}}))
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': 7}))
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [9, 8]}))
    tokenizer, bos = hf.FolderTokenizer(tmp_path), exported.ours.vocab_size
    assert tokenizer.encode('ab') == [bos, *exported.ours.encode('ab')] == tokenizer.encode('<s>ab')
    assert tokenizer.decode([bos, *exported.ours.encode('ab')]) == 'ab'
    assert tokenizer.ends == {8, 9} and tokenizer.eot == 8
    content['truncation'] = {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0}
    content['padding'] = {'strategy': {'Fixed': 9}, 'direction': 'Left', 'pad_to_multiple_of': None, 'pad_id': 0,
                          'pad_type_id': 0, 'pad_token': 'x'}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))               # of batches in somebody's training
    assert hf.FolderTokenizer(tmp_path).encode('abc') == [bos, *exported.ours.encode('abc')]
    for name, field in ('tokenizer_config.json', 'bos_token'), ('generation_config.json', 'eos_token_id'):
        sound = (tmp_path / name).read_text()
        edit(tmp_path / name, lambda content: content | {field: 1.5})
        with pytest.raises(ValueError, match='cannot be read'):
            hf.FolderTokenizer(tmp_path)
        (tmp_path / name).write_text(sound)
    (tmp_path / 'tokenizer.json').write_text('{')
    with pytest.raises(ValueError, match='tokenizer.json cannot be read'):
        hf.FolderTokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    with pytest.raises(ValueError, match='has no tokenizer.json'):
        hf.FolderTokenizer(tmp_path)


def export(*arguments, monkeypatch, capfd):
    monkeypatch.setattr(sys, 'argv', ['hf.py', *map(str, arguments)])
    try:
        runpy.run_path(str(REPOSITORY / 'hf.py'), run_name='__main__')
        code = 0
    except SystemExit as error:
        code = error.code
    return SimpleNamespace(code=code, **dict(zip(('out', 'err'), capfd.readouterr())))


@pytest.mark.parametrize('knobs', [dict(attn='mla', tokenizer='bpe', vocab_size=300), dict(attn='gqa')],
                         ids=['mla, bpe', 'gqa, bytes'])
def test_a_run_exported_goes_on_with_the_same_text_in_transformers(train, tmp_path, monkeypatch, capfd, knobs):
    run = train(max_steps=60, eval_interval=60, **knobs)
    assert run.code == 0, run.err
    result = export('export', run.folder, f'--out={tmp_path / "out"}', monkeypatch=monkeypatch, capfd=capfd)
    assert result.code == 0 and 'ForCausalLM.from_pretrained' in result.out, result.err
    prompt = 'the cat'
    sample = forked.run('sample.py', run.folder, f'--prompt={prompt}', *flags(
        temperature=0, max_new_tokens=24, device='cpu', dtype='float32', compile=False))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    kind = json.loads((tmp_path / 'out' / 'config.json').read_text())['architectures'][0]
    model = getattr(transformers, kind).from_pretrained(tmp_path / 'out')
    ids = model.generate(**tokenizer(prompt, return_tensors='pt'), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert len(text) > len(prompt) + 10
    assert sample.stdout.rstrip('\n') == text.rstrip('\n'), sample.stderr
    again = export('export', run.folder, f'--out={tmp_path / "out"}', monkeypatch=monkeypatch, capfd=capfd)
    one_line(again, 'is there already')


@pytest.mark.parametrize('arguments, words', [
    ([], ['hf.py export RUN --out=FOLDER']), (['import', 'x'], ['hf.py export RUN --out=FOLDER']),
    (['export', 'x'], ['hf.py export RUN --out=FOLDER']),
    (['export', 'nowhere', '--out=x'], ['nowhere is not there']),
    (['export', '.', '--out=x'], ['holds no checkpoint.pt']),
    (['export', 'README.md', '--out=x'], ['README.md is no sound checkpoint'])], ids=str)
def test_bad_command_lines_end_in_one_line(arguments, words, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    one_line(export(*arguments, monkeypatch=monkeypatch, capfd=capfd), *words)
    assert not os.path.exists('x')
