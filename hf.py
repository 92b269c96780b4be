"""Hugging Face folders in and out: DeepSeek's own networks, and their relatives, in these files.

    model = from_folder('DeepSeek-V2-Lite')             # config.json and safetensors -> LanguageModel
    to_folder(model, tokenizer, 'mine')                 # what transformers opens, with the same logits
    python hf.py export out/laptop/mla-s0 --out=mine    # the same for a run of train.py

    config.json's architectures     attention               router
    MixtralForCausalLM              multi-head              softmax, renormalised over the chosen
    Qwen3MoeForCausalLM             multi-head, qk_norm     softmax, renormalised or not
    DeepseekV2ForCausalLM           latent                  softmax, not renormalised: V2, V2-Lite
    DeepseekV3ForCausalLM           latent                  sigmoid: V3, Moonlight, Kimi-K2
    Mistral4ForCausalLM             latent                  softmax, renormalised or not

A config.json describes a network by fields. FAMILIES says what each family's mean here, SILENT which mean nothing to the
numbers; any other field is an error, not a guess. The tensors have other names than ours, one for each expert, and some
families pair the rotary dims (i, i + d/2) where ours and DeepSeek's pair (2i, 2i + 1): layout(). transformers and
safetensors are not needed, but for peer(). All errors are ValueErrors of one line.
"""
import json
import math
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from attention import yarn_mscale
from model import LanguageModel, ModelConfig
from result import read_checkpoint
from tokenizer import EOT, Tokenizer


@contextmanager
def reading(path, verdict='cannot be read'):
    """Whatever goes wrong inside ends in a ValueError of one line that names the path, or a file in it."""
    try:
        yield
    except Exception as error:                                  # what damaged files make json, zipfile and torch raise
        text = str(error).partition('\n')[0]
        if type(error) is not ValueError:                       # which is ours and says what is wrong
            text = f'{path} {verdict} ({type(error).__name__}: {text})'
        raise ValueError(text if str(path) in text else f'{path}: {text}') from None


def read_json(path):
    with reading(path):
        value = json.loads(Path(path).read_text('utf-8'))
        if not isinstance(value, dict):
            raise ValueError('no JSON object')
        return value


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes (n, little endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors' bytes

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}


class Stored(NamedTuple):
    """Where a tensor lies: the file, and the byte in it at which the tensor starts."""
    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple

    def read(self):
        data = np.fromfile(self.path, np.uint8, math.prod(self.shape) * self.dtype.itemsize, offset=self.start)
        return torch.from_numpy(data).view(self.dtype).view(self.shape)


def read_header(path):
    """A safetensors file -> {name: Stored}."""
    with reading(path), open(path, 'rb') as file:
        size, length, stored = os.path.getsize(path), int.from_bytes(file.read(8), 'little'), {}
        entries = json.loads(file.read(min(length, size)))
        entries.pop('__metadata__', None)
        for name, entry in entries.items():
            if entry['dtype'] not in DTYPES:
                raise ValueError(f'{name} has dtype {entry["dtype"]}, only {", ".join(DTYPES)} can be read')
            dtype, shape, (start, end) = DTYPES[entry['dtype']], tuple(entry['shape']), entry['data_offsets']
            if end - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f'{name} of shape {shape} cannot lie at {start:,} to {end:,} of {size:,} bytes')
            stored[name] = Stored(path, 8 + length + start, dtype, shape)
        return stored


def write_safetensors(path, tensors):
    """tensors: {name: tensor}, on the CPU."""
    header, end, names = {'__metadata__': {'format': 'pt'}}, 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {'dtype': names[t.dtype], 'shape': list(t.shape), 'data_offsets': [start, end]}
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)                         # so that the tensors are aligned
    with open(path, 'wb') as file:
        file.write(len(header).to_bytes(8, 'little') + header)
        for t in tensors.values():
            file.write(t.flatten().view(torch.uint8).numpy())


def find_tensors(folder):
    """model.safetensors, or the shards that model.safetensors.index.json names -> {name: Stored}."""
    whole, index = folder / 'model.safetensors', folder / 'model.safetensors.index.json'
    if whole.is_file():
        return read_header(whole)
    if not index.is_file():
        raise ValueError('it holds no model.safetensors (pickles, .bin or .pt, are not read: they can run code)')
    shard_of, stored = read_json(index).get('weight_map'), {}
    if not isinstance(shard_of, dict) or not all(s and s == Path(str(s)).name for s in shard_of.values()):
        raise ValueError(f'{index} has no weight_map of tensors and files beside it')
    for shard in sorted(set(shard_of.values())):
        stored |= read_header(folder / shard)
    for name in sorted(stored.keys() | shard_of.keys()):
        if name not in stored or stored[name].path.name != shard_of.get(name):
            raise ValueError(f'{index} says that {name} is in {shard_of.get(name)}, which is not so')
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# config.json <-> ModelConfig

COMMON = {'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
          'num_attention_heads': 'n_head', 'max_position_embeddings': 'block_size', 'num_experts_per_tok': 'top_k',
          'rms_norm_eps': 'norm_eps', 'tie_word_embeddings': 'tie_embeddings'}
MULTI_HEAD = COMMON | {'num_key_value_heads': 'n_kv_head', 'head_dim': 'head_dim'}
LATENT = COMMON | {k: k for k in ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim',
                                  'attention_bias', 'routed_scaling_factor')} | {
    'moe_intermediate_size': 'd_ff', 'intermediate_size': 'd_ff_dense', 'n_routed_experts': 'n_expert',
    'n_shared_experts': 'n_shared_expert', 'first_k_dense_replace': 'n_dense_layer'}
GROUPS, RENORMALISED = {'n_group': 'n_expert_group', 'topk_group': 'top_k_group'}, {'norm_topk_prob': 'norm_topk_prob'}


class Family(NamedTuple):
    model_type: str
    settled: dict       # our knobs that the family itself settles
    fields: dict        # its field: our knob
    allowed: dict = {}  # its field: the values we can express; the first is what a missing one means and what we write


FAMILIES = {
    'MixtralForCausalLM': Family(
        'mixtral', {'attn': 'baseline', 'norm_topk_prob': True},
        MULTI_HEAD | {'intermediate_size': 'd_ff', 'num_local_experts': 'n_expert'}),
    'Qwen3MoeForCausalLM': Family(
        'qwen3_moe', {'attn': 'baseline', 'qk_norm': True},
        MULTI_HEAD | RENORMALISED | {'moe_intermediate_size': 'd_ff', 'intermediate_size': 'd_ff_dense',
                                     'num_experts': 'n_expert', 'attention_bias': 'attention_bias'}),
    'DeepseekV2ForCausalLM': Family(
        'deepseek_v2', {'attn': 'mla', 'norm_topk_prob': False}, LATENT | GROUPS,
        # norm_topk_prob: DeepSeek's code would renormalise INSTEAD of scaling, transformers' would not at all
        {'scoring_func': ['softmax'], 'topk_method': ['greedy', 'group_limited_greedy'], 'norm_topk_prob': [False],
         'rope_interleave': [True]}),                           # which transformers' code for it does not look at
    'DeepseekV3ForCausalLM': Family(
        'deepseek_v3', {'attn': 'mla', 'router': 'sigmoid'}, LATENT | GROUPS | RENORMALISED,
        {'scoring_func': ['sigmoid'], 'topk_method': ['noaux_tc']}),
    'Mistral4ForCausalLM': Family(
        'mistral4', {'attn': 'mla'}, LATENT | RENORMALISED, {'n_group': [1], 'topk_group': [1]})}
# the same for every family
EVERY = {'hidden_act': ['silu'], 'attention_dropout': [0.0], 'router_jitter_noise': [0.0], 'sliding_window': [None],
         'use_sliding_window': [False], 'moe_layer_freq': [1], 'decoder_sparse_step': [1], 'mlp_bias': [False],
         'rope_interleave': [True, False]}
SILENT = set('''architectures auto_map model_type torch_dtype dtype transformers_version _name_or_path use_cache
    initializer_range bos_token_id eos_token_id pad_token_id aux_loss_alpha seq_aux router_aux_loss_coef
    output_router_logits pretraining_tp ep_size max_window_layers head_dim qk_head_dim
    num_nextn_predict_layers quantization_config'''.split())     # from_folder() looks at these two
# what it means to leave out a field, and to give it as null
ABSENT = {'tie_word_embeddings': False, 'attention_bias': False, 'head_dim': None}
NULL = {'q_lora_rank': 0, 'n_shared_experts': 0, 'n_group': 1, 'topk_group': 1}
YARN = {'original_max_position_embeddings': 'rope_original_context', 'attention_factor': 'rope_attention_factor'} | {
    field: 'rope_' + field for field in ('beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim')}


def expect(fields, field, values):
    """Takes a field out -> its value; ValueError if it is none of `values`. To leave it out means the first of them."""
    value = fields.pop(field, values[0])
    if value not in values:
        raise ValueError(f'{field}={value!r} cannot be expressed here, only {" or ".join(map(repr, values))}')
    return value


def number(fields, field, kind=float):
    value = fields.pop(field, ABSENT.get(field, 'absent'))
    value = NULL.get(field) if value is None else value
    if not isinstance(value, (int, kind)) and (value, field) != (None, 'head_dim'):
        raise ValueError(f'{field} is {value!r}, not a {"whole " if kind is int else ""}number')
    return value


def read_config(fields):
    """What config.json holds -> its family, ModelConfig, whether rotary dims are paired (2i, 2i + 1).

    The error names the field that is missing, unknown, or says what this code cannot express, and its value.
    """
    if (named := fields.get('architectures')) not in [[name] for name in FAMILIES]:
        raise ValueError(f'architectures={named}: only {", ".join(FAMILIES)} can be read')
    [name] = named
    family, left, kinds = FAMILIES[name], dict(fields), ModelConfig.__annotations__
    if 'num_experts' in family.fields and 'num_local_experts' in left:      # how transformers 5 writes it for Qwen3
        left['num_experts'] = left.pop('num_local_experts')
    knobs = family.settled | {
        knob: number(left, field, float if kinds[knob] is float else int) for field, knob in family.fields.items()}
    latent = knobs['attn'] == 'mla'
    if latent:
        expect(left, 'num_key_value_heads', [knobs['n_head'], None])
    if name == 'Qwen3MoeForCausalLM':
        knobs['n_dense_layer'] = dense = len(left.get('mlp_only_layers') or [])
        expect(left, 'mlp_only_layers', [list(range(dense)), None])
    said = {field: expect(left, field, values) for field, values in (EVERY | family.allowed).items()}
    if said.get('topk_method') == 'greedy':                     # does not look at groups
        knobs |= {'n_expert_group': 1, 'top_k_group': 1}
    if knobs['top_k'] == 1 and knobs['norm_topk_prob']:
        raise ValueError('num_experts_per_tok=1 (top_k) with a weight renormalised to 1 cannot be expressed here')
    rope = {'rope_theta': left.pop('rope_theta', None)} | (
        left.pop('rope_scaling', None) or left.pop('rope_parameters', None) or {})
    knobs |= read_rope(rope, latent)
    if knobs['rope_scaling'] == 'dynamic':                      # their maximum is the context they stretch from
        left.setdefault('model_max_length', knobs['block_size'])
        knobs |= {'rope_original_context': knobs['block_size'], 'block_size': number(left, 'model_max_length', int)}
    for field in left.keys() - SILENT:
        raise ValueError(f'{field}={left[field]!r}: no such field is known here')
    return name, ModelConfig(**knobs), latent and said['rope_interleave']


def read_rope(rope, latent):
    """rope_parameters, or the older rope_scaling and rope_theta -> our rope_ knobs."""
    rope.setdefault('rope_type', rope.pop('type', 'default'))
    kind = expect(rope, 'rope_type', ['default', 'linear', 'dynamic', 'yarn'])
    expect(rope, 'truncate', [True])
    expect(rope, 'llama_4_scaling_beta', [0])
    knobs = {'rope_theta': number(rope, 'rope_theta'), 'rope_scaling': kind}
    if kind != 'default':
        knobs['rope_factor'] = factor = number(rope, 'factor')
    if kind == 'linear' and factor == 1:                        # how a Mistral4 says it, see write_config
        knobs['rope_scaling'] = 'default'
    if kind == 'yarn':
        knobs |= {knob: value for field, knob in YARN.items() if (value := rope.pop(field, None)) is not None}
        m, all_dim, amplitude = (knobs.get('rope_' + knob) for knob in ('mscale', 'mscale_all_dim', 'attention_factor'))
        if not (amplitude or m and all_dim or m is all_dim is None):
            raise ValueError(f'mscale={m} beside mscale_all_dim={all_dim}: transformers and DeepSeek differ')
        if not latent:                                          # whose scores in transformers ignore mscale_all_dim
            amplitude = amplitude or yarn_mscale(factor, m or 1.0) / yarn_mscale(factor, all_dim or 0.0)
            knobs |= {'rope_attention_factor': amplitude, 'rope_mscale_all_dim': 0.0}
    if latent:
        rope.pop('partial_rotary_factor', None)                 # qk_rope_head_dim says it
    for field in rope.keys() - {'original_max_position_embeddings'}:        # which without yarn means nothing
        raise ValueError(f'{field}={rope[field]!r} beside rope_type={kind!r} cannot be expressed here')
    return knobs


def write_config(c, eot=None):
    """ModelConfig -> the nearest family, the fields of config.json. The error names a knob that this family has not."""
    latent, renormalised = c.kv_lora_rank is not None, c.norm_topk_prob and c.top_k > 1    # as in moe.MixtureOfExperts
    if latent:
        name = 'DeepseekV3' if c.router == 'sigmoid' else 'Mistral4' if renormalised else 'DeepseekV2'
    else:
        name = 'Qwen3Moe' if c.qk_norm else 'Mixtral'
    name, kind, original = name + 'ForCausalLM', c.rope_scaling, c.rope_original_context or c.block_size
    family = FAMILIES[name]
    fields = {field: getattr(c, knob) for field, knob in family.fields.items()}
    fields |= {field: values[0] for field, values in family.allowed.items()} | {
        'architectures': [name], 'model_type': family.model_type, 'hidden_act': 'silu', 'eos_token_id': eot,
        'bos_token_id': None, 'pad_token_id': None}
    if 'norm_topk_prob' in family.fields:
        fields['norm_topk_prob'] = renormalised
    if latent:
        fields |= {'num_key_value_heads': c.n_head, 'q_lora_rank': c.q_lora_rank or None, 'rope_interleave': True}
    if name == 'DeepseekV2ForCausalLM' and c.n_expert_group > 1:
        fields['topk_method'] = 'group_limited_greedy'
    if name == 'Qwen3MoeForCausalLM':
        fields['mlp_only_layers'] = list(range(c.n_dense_layer))
    fields['rope_parameters'] = rope = {'rope_theta': c.rope_theta, 'rope_type': kind}
    if kind != 'default':
        rope['factor'] = c.rope_factor
    if kind == 'dynamic':
        fields |= {'max_position_embeddings': original, 'model_max_length': c.block_size}      # see read_config
    if kind == 'yarn':
        temperature = yarn_mscale(c.rope_factor, c.rope_mscale_all_dim)
        amplitude = c.rope_attention_factor or yarn_mscale(c.rope_factor, c.rope_mscale) / temperature
        # multi-head: scores have no temperature of their own, but all dims are turned, so the amplitude does it
        amplitude = float(amplitude if latent else amplitude * temperature)
        rope |= {field: getattr(c, knob) for field, knob in YARN.items()} | {
            'original_max_position_embeddings': original, 'attention_factor': amplitude}
    if name == 'Mistral4ForCausalLM':
        if kind == 'default':                                   # transformers crashes on it here
            rope |= {'rope_type': 'linear', 'factor': 1.0}
        share = (c.qk_rope_head_dim + 0.5) / (c.qk_nope_head_dim + c.qk_rope_head_dim)      # theirs rounds down
        rope |= {'partial_rotary_factor': share, 'original_max_position_embeddings': original,
                 'llama_4_scaling_beta': 0.0}
    if name == 'DeepseekV2ForCausalLM' and (c.kv_lora_rank % 2 or c.qk_nope_head_dim % 2):
        raise ValueError(f'kv_lora_rank={c.kv_lora_rank} and qk_nope_head_dim={c.qk_nope_head_dim} must be even in a {name}: '
                         'theirs turns pairs of numbers where they lie')
    if name == 'DeepseekV3ForCausalLM' and c.n_expert == 1 and c.n_dense_layer < c.n_layer:
        raise ValueError(f'n_expert=1 cannot be said in a {name}: theirs judges a group of experts by its best two')
    understood = read_config(fields)[1]                         # every knob must come back, but those said otherwise
    other = ['attn'] + ['d_ff_dense'] * (not c.n_dense_layer) + ['norm_topk_prob'] * (c.top_k == 1)
    for knob, value in vars(c).items():
        if knob not in other and not knob.startswith('rope_') and value != getattr(understood, knob):
            raise ValueError(f'{knob}={value} cannot be said in a {name}, the family nearest to this model')
    return name, fields


# ---------------------------------------------------------------------------------------------------------------------
# Tensors

class Theirs(NamedTuple):
    """A tensor of theirs, in terms of ours."""
    parts: list                     # our tensors that it holds, side by side along dim 1
    rows: object = slice(None)      # which row of ours each of its rows is

    def gather(self):
        """Ours -> theirs; a view where it can be one."""
        return torch.cat(self.parts, 1) if len(self.parts) > 1 else self.parts[0][self.rows]

    def scatter(self, tensor):
        """Theirs -> ours, in place."""
        for part, own in zip(self.parts, tensor.chunk(len(self.parts), 1) if len(self.parts) > 1 else [tensor]):
            part[self.rows] = own.to(part)


RENAME = {'model.embed.': 'model.embed_tokens.', '.attn.': '.self_attn.', '.attn_norm.': '.input_layernorm.',
          '.moe_norm.': '.post_attention_layernorm.', '.mlp_norm.': '.post_attention_layernorm.',
          '.moe.router.': '.mlp.gate.', '.moe.e_score_': '.mlp.gate.e_score_', '.moe.shared.': '.mlp.shared_experts.',
          '.moe.': '.mlp.experts.'}
MIXTRAL = {'.mlp.': '.block_sparse_moe.', 'gate_proj': 'w1', 'up_proj': 'w3', 'down_proj': 'w2'}


def layout(config, family, state, interleaved=True):
    """{our name: tensor} -> {their name: Theirs}. interleaved: whether theirs pairs rotary dims (2i, 2i + 1)."""

    def halves(before, turned):     # our rows in a head of theirs: the turned ones are 0, 2, 4, ..., 1, 3, 5, ...
        end = before + turned
        return torch.tensor([*range(before), *range(before, end, 2), *range(before + 1, end, 2)])

    plan, head_of, renamed = {}, {}, RENAME | (MIXTRAL if family == 'MixtralForCausalLM' else {})
    if config.kv_lora_rank is None:
        head_of = dict.fromkeys(('q_proj', 'k_proj', 'q_norm', 'k_norm'), halves(0, config.head_dim))
    elif not interleaved:
        head_of = dict.fromkeys(('q_proj', 'q_b_proj'), halves(config.qk_nope_head_dim, config.qk_rope_head_dim))
        head_of['kv_a_proj_with_mqa'] = halves(config.kv_lora_rank, config.qk_rope_head_dim)
    if config.kv_lora_rank is not None and not config.n_shared_expert:      # theirs has them all the same, of width 0
        none = state['norm.weight'].new_empty(0, config.n_embd)
        state = state | {f'layers.{i}.moe.shared.{kind}_proj.weight': none.T if kind == 'down' else none
                         for i in range(config.n_dense_layer, config.n_layer) for kind in ('gate', 'up', 'down')}
    for ours, tensor in state.items():
        name, head = ours if ours.startswith('lm_head') else 'model.' + ours, head_of.get(ours.split('.')[-2])
        for old, new in renamed.items():
            name = name.replace(old, new)
        if head is not None:
            plan[name] = Theirs([tensor], (torch.arange(0, len(tensor), len(head)).unsqueeze(1) + head).flatten())
        elif tensor.ndim < 3 or family == 'Mistral4ForCausalLM' and ours.endswith('down_proj'):
            plan[name] = Theirs([tensor])
        elif family != 'Mistral4ForCausalLM':
            stem, _, matrix = name.rpartition('.')
            plan |= {f'{stem}.{e}.{matrix}.weight': Theirs([own]) for e, own in enumerate(tensor)}
        elif ours.endswith('gate_proj'):
            both = [tensor, state[ours.replace('gate_proj', 'up_proj')]]
            plan[name.replace('gate_proj', 'gate_up_proj')] = Theirs(both)
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# Folders

def from_folder(path, dtype=None, device=None):
    """A folder of Hugging Face's -> LanguageModel, in eval mode, its weights read one by one and never held twice.

    dtype: of all parameters; None: the widest in the files. The biases that choose experts stay float32. Quantised weights,
    as those of V3 and Kimi-K2 are published, are refused.
    """
    path = Path(os.path.expanduser(path))
    with reading(path):
        fields = read_json(path / 'config.json')
        family, config, interleaved = read_config(fields)
        if fields.get('quantization_config'):
            raise ValueError(f'quantization_config={fields["quantization_config"]}: quantised weights are not read; let '
                             'them be converted to bfloat16, and this field be taken out')
        # left out: layers that predict a second token (V3's layer 61), for training and speculation; rotary frequencies
        second = [f'model.layers.{config.n_layer + i}.' for i in range(fields.get('num_nextn_predict_layers') or 0)]
        stored = {name: tensor for name, tensor in find_tensors(path).items() if 0 not in tensor.shape
                  and not name.startswith(tuple(second)) and not name.endswith('rotary_emb.inv_freq')}
        with torch.device('meta'):
            model = LanguageModel(config, seed=None).eval()
        model.to(dtype or reduce(torch.promote_types, (tensor.dtype for name, tensor in stored.items()
                                                       if not name.endswith('correction_bias'))))
        state = {name: torch.empty_like(tensor, device=device or 'cpu') for name, tensor in model.state_dict().items()}
        plan = layout(config, family, state, interleaved)
        for name, theirs in plan.items():
            shape = theirs.gather().shape
            if name not in stored and 0 not in shape:
                raise ValueError(f'there is no {name} among the {len(stored):,} tensors')
            if name in stored and stored[name].shape != shape:
                raise ValueError(f'{name} has shape {list(stored[name].shape)}, but config.json makes it {list(shape)}')
        if surplus := stored.keys() - plan.keys():
            raise ValueError(f'{min(surplus)} is not of this network, as {len(surplus):,} tensors are not')
        for name, tensor in stored.items():
            plan[name].scatter(tensor.read())
        model.load_state_dict(state, assign=True)
        return model


def to_folder(model, tokenizer, path):
    """Writes what transformers opens: config.json, model.safetensors and, unless tokenizer is None, tokenizer.json.

    path must not exist, or be empty; it appears when everything is written. -> the class in transformers
    """
    path = Path(os.path.expanduser(path)).resolve()
    family, fields = write_config(model.config, tokenizer and tokenizer.eot)
    plan = layout(model.config, family, model.state_dict())
    files = {'config.json': fields | {'dtype': str(model.embed.weight.dtype).removeprefix('torch.')}}
    if tokenizer is not None:
        if tokenizer.vocab_size > model.config.vocab_size:      # fewer is fine: spare ids
            raise ValueError(f'the model has {model.config.vocab_size:,} tokens, its tokenizer {tokenizer.vocab_size:,}')
        files |= {'tokenizer.json': tokenizer_json(tokenizer), 'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': model.config.block_size,
            'eos_token': EOT if tokenizer.eot is not None else None, 'clean_up_tokenization_spaces': False,
            'split_special_tokens': True}}      # <|endoftext|> within a text is ordinary text, here as there
    aside = path.parent / f'{path.name}.{os.getpid()}.part'                 # nobody else's
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f'{path} is there already; name a new folder')
        aside.mkdir(parents=True)
        for name, value in files.items():
            (aside / name).write_text(json.dumps(value, indent=2) + '\n', 'utf-8')
        write_safetensors(aside / 'model.safetensors', {name: theirs.gather().cpu() for name, theirs in plan.items()})
        os.replace(aside, path)
        return family
    except OSError as error:
        raise ValueError(f'{path} cannot be written ({error.strerror})') from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def peer(model):
    """The same network with the same weights in transformers. ImportError without it."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family, fields = write_config(model.config)
    kind = getattr(transformers, family)
    state = {name: theirs.gather() for name, theirs in layout(model.config, family, model.state_dict()).items()}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                         # "Initializing zero-element tensors is a no-op": yes
        return kind.from_pretrained(None, config=kind.config_class(**fields), state_dict=state)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

def tokenizer_json(tokenizer):
    """A Tokenizer of tokenizer.py -> tokenizer.json, which encodes every text into the same ids.

    tiktoken merges whichever neighbours make the token of the lowest rank; here each pair that makes a token is a merge
    of its own, in the order of the tokens. Bytes are spelled as GPT-2 spells them: printable ones as themselves.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in spelling)}
    spell = lambda token: ''.join(spelling[byte] for byte in token)
    ids = {token: i for i, token in enumerate(tokenizer.tokens) if token is not None}
    if any(bytes([byte]) not in ids for byte in range(256)):
        raise ValueError(f'the tokenizer {tokenizer.name} cannot be written: it has no token for some bytes')
    merges = [f'{spell(token[:cut])} {spell(token[cut:])}' for token in ids for cut in range(1, len(token))
              if token[:cut] in ids and token[cut:] in ids]
    # tokenizer.encode() cuts long runs of blanks first. The + of cl100k's \p{N}{1,3}+ would be a repetition here
    patterns = [r'\s{4096}', tokenizer.pattern.replace('{1,3}+', '{1,3}')] if tokenizer.pattern else []
    splits = [{'type': 'Split', 'pattern': {'Regex': p}, 'behavior': 'Isolated', 'invert': False} for p in patterns]
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    end = {'id': tokenizer.eot, 'content': EOT, 'special': True, **dict.fromkeys(
        ('single_word', 'lstrip', 'rstrip', 'normalized'), False)}
    return {'version': '1.0', 'added_tokens': [end] if tokenizer.eot is not None else [],
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [*splits, byte_level]}, 'decoder': byte_level,
            'model': {'type': 'BPE', 'ignore_merges': True, 'merges': merges,
                      'vocab': {spell(token): i for token, i in ids.items()}}}


def has_vocabulary(path, tokenizer):
    """Whether the tokenizer.json of a folder has the tokens of a Tokenizer under the same ids; where one is missing, True."""
    file = Path(path) / 'tokenizer.json'
    if tokenizer is None or not file.is_file():
        return True
    try:
        return read_json(file)['model']['vocab'] == tokenizer_json(tokenizer)['model']['vocab']
    except (ValueError, LookupError, TypeError):                # neither bytes nor BPE
        return False


class FolderTokenizer:
    """The tokenizer.json of a folder, by the package `tokenizers`. ends: the set of ids that end a text; eot: one of them."""

    def __init__(self, path):
        path = Path(os.path.expanduser(path))
        file, said = path / 'tokenizer.json', {}
        if not file.is_file():
            raise ValueError(f'{path} has no tokenizer.json')
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise ValueError(f'the tokenizer of {path} needs a package: pip install tokenizers') from None
        with reading(file):
            self.fast = Fast.from_file(str(file))
            self.fast.no_truncation(), self.fast.no_padding()       # what a training's batches may have left in the file
        with reading(path):
            for name in ('config.json', 'generation_config.json', 'tokenizer_config.json'):
                said |= read_json(path / name) if (path / name).is_file() else {}
            self.fast.encode_special_tokens = bool(said.get('split_special_tokens'))
            bos, ends = said.get('bos_token') if said.get('add_bos_token') else None, said.get('eos_token_id')
            self.bos = bos and self.fast.token_to_id(bos['content'] if isinstance(bos, dict) else bos)
            self.ends = {ends} if isinstance(ends, int) else set(ends or ())
            self.eot, self.vocab_size = min(self.ends, default=None), self.fast.get_vocab_size()

    def encode(self, text):
        """str -> list of ids, after the token of the beginning where the folder wants one."""
        ids = self.fast.encode(text).ids
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def decode(self, ids):
        return self.fast.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# Runs of train.py

def from_run(path):
    """A run's folder, or a checkpoint file -> LanguageModel in eval mode, Tokenizer or None."""
    checkpoint = read_checkpoint(path)
    with reading(path, 'is no sound checkpoint of train.py'):
        model = LanguageModel(ModelConfig(**checkpoint['model_config']), seed=None).eval()
        model.load_state_dict(checkpoint['model'])
        return model, checkpoint['tokenizer'] and Tokenizer.from_state(checkpoint['tokenizer'])


if __name__ == '__main__':
    from configurator import configure, fail
    # -----------------------------------------------------------------------------------------------------------------
    # python hf.py export RUN --out=FOLDER
    run = ''        # a run's folder, or a checkpoint file
    out = ''        # the folder to write: new, or empty
    # -----------------------------------------------------------------------------------------------------------------
    verb, *arguments = sys.argv[1:] or ['']
    asked = verb in ('-h', '--help')
    configure(globals(), positional='run', argv=[verb] if asked else arguments)
    if verb != 'export' or not run or not out:
        fail('python hf.py export RUN --out=FOLDER')
    try:
        model, tokenizer = from_run(run)
        family = to_folder(model, tokenizer, out)
    except ValueError as error:
        fail(error)
    print(f'{out}: open it with transformers.{family}.from_pretrained'
          + '; without a tokenizer, for the run keeps none' * (tokenizer is None))
