"""The same models in Hugging Face transformers: what bench.py times beside ours and tests/test_peers.py compares.

    theirs = build_peer(ours.config)        # Mixtral for multi-head attention, DeepseekV3 for latent attention
    copy_weights(ours, theirs)              # from here on they give the same logits
    fastest_experts(theirs, seconds_of_work, ['eager', 'grouped_mm'])       # tries them, keeps the fastest

transformers is not among this project's requirements: without it, importing this file raises ImportError.
"""
import warnings

import torch
import transformers

transformers.logging.set_verbosity_error()


def build_peer(c):
    """ModelConfig -> a transformers model of the same sizes, with weights of its own.

    DeepseekV3 always routes by sigmoid, Mixtral by softmax. Without shared experts DeepseekV3's get width 0.
    """
    rope = {'rope_type': c.rope_scaling, 'rope_theta': c.rope_theta}
    if c.rope_scaling != 'default':
        rope |= {'factor': c.rope_factor, 'original_max_position_embeddings': c.rope_original_context or c.block_size,
                 'beta_fast': c.rope_beta_fast, 'beta_slow': c.rope_beta_slow,
                 'mscale': c.rope_mscale, 'mscale_all_dim': c.rope_mscale_all_dim}
    knobs = dict(vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
                 num_attention_heads=c.n_head, num_experts_per_tok=c.top_k, max_position_embeddings=c.block_size,
                 rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=rope, attn_implementation='sdpa',
                 bos_token_id=None, eos_token_id=None)
    if c.kv_lora_rank is None:
        knobs |= dict(num_key_value_heads=c.n_kv_head, num_local_experts=c.n_expert, sliding_window=None)
        kind, kind_config = transformers.MixtralForCausalLM, transformers.MixtralConfig
    else:
        knobs |= dict(num_key_value_heads=c.n_head, moe_intermediate_size=c.d_ff, n_routed_experts=c.n_expert,
                      n_shared_experts=c.n_shared_expert, n_group=1, topk_group=1, first_k_dense_replace=0,
                      norm_topk_prob=True, routed_scaling_factor=c.routed_scaling_factor,
                      q_lora_rank=c.q_lora_rank or None, kv_lora_rank=c.kv_lora_rank,
                      qk_nope_head_dim=c.qk_nope_head_dim, qk_rope_head_dim=c.qk_rope_head_dim,
                      v_head_dim=c.v_head_dim, attention_bias=c.attention_bias)
        kind, kind_config = transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                         # "initializing zero-element tensors is a no-op": yes
        return kind(kind_config(**knobs))


def copy_weights(ours, theirs):
    """Our LanguageModel's weights into its peer. RuntimeError unless every parameter of theirs is written."""
    state, d = {}, ours.config.n_embd // ours.config.n_head
    # Mixtral pairs rotary dims (i, i + d/2), we pair (2i, 2i + 1): reorder the rows of q and k within each head
    halves = torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2)))
    rename = {'attn_norm': 'input_layernorm', 'moe_norm': 'post_attention_layernorm', 'attn': 'self_attn'}
    for name, p in ours.state_dict().items():
        part = name.split('.')
        if part[0] != 'layers':
            state[{'embed': 'model.embed_tokens.weight', 'norm': 'model.norm.weight'}[part[0]]] = p
        elif part[2] != 'moe':
            if part[3] in ('q_proj', 'k_proj') and isinstance(theirs, transformers.MixtralForCausalLM):
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
    theirs.load_state_dict(state, strict=True)


def fastest_experts(theirs, seconds_of_work, names):
    """Sets the experts implementation, one of `names`, that runs fastest -> its name, {name: seconds or None}.

    RuntimeError if none of them runs on this machine.
    """
    trials, reason = {}, None
    for name in names:
        try:
            theirs.set_experts_implementation(name)
            seconds_of_work()
            trials[name] = min(seconds_of_work() for _ in range(2))
        except Exception as error:                              # whatever an implementation lacks on this machine
            trials[name], reason = None, f'{name}: {type(error).__name__}: {str(error)[:200]}'
    if not any(trials.values()):
        raise RuntimeError(f'no experts implementation of transformers runs here ({reason})')
    best = min((name for name in trials if trials[name]), key=trials.get)
    theirs.set_experts_implementation(best)
    return best, trials
