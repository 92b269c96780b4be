"""Against Hugging Face transformers, an implementation that is not ours: same weights, same logits. Skipped where it is not installed."""
import pytest
import torch

from model import LanguageModel, ModelConfig

transformers = pytest.importorskip('transformers', reason='transformers, the reference of these tests, is not installed')

SIZES = dict(vocab_size=97, block_size=300, n_layer=2, n_head=4, n_embd=64, d_ff=48, n_expert=8, top_k=3)
YARN = dict(rope_scaling='yarn', rope_factor=40.0, rope_original_context=256)


def randomise(model, seed=0):
    """Gains around 1, biases and selection biases well away from 0, weights large enough that every part matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'norm' in name:
                p.uniform_(0.5, 1.5, generator=g)
            else:
                p.normal_(0.0, 0.15, generator=g)
        for layer in model.layers:
            if layer.moe.e_score_correction_bias is not None:
                layer.moe.e_score_correction_bias.normal_(0.0, 0.3, generator=g)
    return model


def copy_into(hf, ours):
    """Our weights into a transformers DeepseekV3 or Mixtral. Every parameter of theirs must be written."""
    state, d = {}, ours.config.n_embd // ours.config.n_head
    # Mixtral pairs rotary dims (i, i + d/2), we pair (2i, 2i + 1): reorder the rows of q and k within each head
    halves = torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2)))
    rename = {'attn_norm': 'input_layernorm', 'moe_norm': 'post_attention_layernorm', 'attn': 'self_attn'}
    for name, p in ours.state_dict().items():
        part = name.split('.')
        if part[0] != 'layers':
            state[{'embed': 'model.embed_tokens.weight', 'norm': 'model.norm.weight'}[part[0]]] = p
        elif part[2] != 'moe':
            if part[3] in ('q_proj', 'k_proj') and 'Mixtral' in type(hf).__name__:
                p = p.view(-1, d, p.size(-1))[:, halves].reshape(p.shape)
            state['.'.join(['model', *part[:2], rename[part[2]], *part[3:]])] = p
    for i, layer in enumerate(ours.layers):
        moe, at = layer.moe, f'model.layers.{i}.mlp.'
        state[at + 'gate.weight'] = moe.router.weight
        state[at + 'experts.gate_up_proj'] = torch.cat((moe.gate_proj, moe.up_proj), 1)
        state[at + 'experts.down_proj'] = moe.down_proj
        if moe.e_score_correction_bias is not None:
            state[at + 'gate.e_score_correction_bias'] = moe.e_score_correction_bias
            for part in ('gate', 'up', 'down'):
                state[at + f'shared_experts.{part}_proj.weight'] = getattr(moe, f'shared_{part}_proj').weight
    state['lm_head.weight'] = ours.embed.weight
    hf.load_state_dict(state, strict=True)
    return hf.eval()


def deepseek(config):
    rope = {'rope_type': config.rope_scaling, 'rope_theta': config.rope_theta}
    if config.rope_scaling != 'default':
        rope |= {'factor': config.rope_factor, 'original_max_position_embeddings': config.rope_original_context or config.block_size,
                 'mscale': config.rope_mscale, 'mscale_all_dim': config.rope_mscale_all_dim}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.d_ff, moe_intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_head,
        n_shared_experts=config.n_shared_expert, n_routed_experts=config.n_expert, num_experts_per_tok=config.top_k,
        routed_scaling_factor=config.routed_scaling_factor, kv_lora_rank=config.kv_lora_rank, q_lora_rank=config.q_lora_rank or None,
        qk_rope_head_dim=config.qk_rope_head_dim, v_head_dim=config.v_head_dim, qk_nope_head_dim=config.qk_nope_head_dim,
        n_group=1, topk_group=1, first_k_dense_replace=0, norm_topk_prob=True, max_position_embeddings=config.block_size,
        rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=rope, attention_bias=config.attention_bias))


def mixtral(config):
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.d_ff, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, num_local_experts=config.n_expert,
        num_experts_per_tok=config.top_k, max_position_embeddings=config.block_size, rms_norm_eps=1e-6, tie_word_embeddings=True,
        sliding_window=None, rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_theta}))


@pytest.mark.parametrize('knobs', [
    dict(attn='lora'), dict(attn='enhanced'), dict(attn='mla'), dict(attn='mla', q_lora_rank=0), dict(attn='enhanced', q_lora_rank=0),
    dict(attn='lora', **YARN), dict(attn='mla', **YARN, rope_mscale=0.707, rope_mscale_all_dim=0.707),
    dict(attn='enhanced', **YARN, rope_mscale=1.0, rope_mscale_all_dim=0.5, qk_rope_head_dim=32, rope_theta=1000.0),
    dict(attn='mla', rope_scaling='dynamic', rope_factor=4.0, rope_original_context=300),
    dict(attn='mla', routed_scaling_factor=2.5, top_k=2)], ids=str)
def test_latent_attention_with_sigmoid_routing_gives_the_logits_of_deepseek_v3(knobs):
    config = ModelConfig(**{**SIZES, **knobs}, router='sigmoid', n_shared_expert=2)
    ours = randomise(LanguageModel(config)).eval()
    theirs = copy_into(deepseek(config), ours)
    tokens = torch.randint(0, config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert a.abs().max() > 2
    assert (a - b).abs().max() <= 2e-5 * a.abs().max()


@pytest.mark.parametrize('attn', ['baseline', 'gqa', 'mqa'])
def test_multi_head_attention_with_softmax_routing_gives_the_logits_of_mixtral(attn):
    config = ModelConfig(**SIZES, attn=attn)
    ours = randomise(LanguageModel(config)).eval()
    theirs = copy_into(mixtral(config), ours)
    tokens = torch.randint(0, config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert a.abs().max() > 2
    assert (a - b).abs().max() <= 2e-5 * a.abs().max()
