"""Against Hugging Face transformers, an implementation that is not ours: same weights, same logits.

These are the very models that bench.py times beside ours (peers.py). Skipped where transformers is not installed.
"""
import pytest
import torch

from model import LanguageModel, ModelConfig

peers = pytest.importorskip('peers', reason='transformers, the reference of these tests, is not installed', exc_type=ImportError)

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


def same_logits(config):
    """Our model with random weights against its peer with the same ones, over 2 x 300 tokens."""
    ours = randomise(LanguageModel(config)).eval()
    theirs = peers.build_peer(config).eval()
    peers.copy_weights(ours, theirs)
    tokens = torch.randint(0, config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert a.abs().max() > 2
    assert (a - b).abs().max() <= 2e-5 * a.abs().max()


@pytest.mark.parametrize('knobs', [
    dict(attn='lora'), dict(attn='enhanced'), dict(attn='mla'), dict(attn='mla', q_lora_rank=0), dict(attn='enhanced', q_lora_rank=0),
    dict(attn='lora', **YARN, rope_beta_fast=16.0, rope_beta_slow=2.0), dict(attn='mla', **YARN, rope_mscale=0.707, rope_mscale_all_dim=0.707),
    dict(attn='enhanced', **YARN, rope_mscale=1.0, rope_mscale_all_dim=0.5, qk_rope_head_dim=32, rope_theta=1000.0),
    dict(attn='mla', rope_scaling='dynamic', rope_factor=4.0, rope_original_context=300),
    dict(attn='mla', routed_scaling_factor=2.5, top_k=2)], ids=str)
def test_latent_attention_with_sigmoid_routing_gives_the_logits_of_deepseek_v3(knobs):
    same_logits(ModelConfig(**{**SIZES, **knobs}, router='sigmoid', n_shared_expert=2))


@pytest.mark.parametrize('attn', ['baseline', 'gqa', 'mqa'])
def test_multi_head_attention_with_softmax_routing_gives_the_logits_of_mixtral(attn):
    same_logits(ModelConfig(**SIZES, attn=attn))
