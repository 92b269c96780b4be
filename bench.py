"""Speed and memory of every attention variant, side by side in one process: python bench.py --task=train [--knob=value ...]

    --task=train      one whole update: tokens/s, share of the machine's own matrix rate, peak memory
    --task=parts      where an update's time goes: attention, router, dispatch, experts, head, optimizer, rest
    --task=scaling    tokens/s against the number of experts and against the context, with a figure
    --task=decode     prefill and decoding with a cache, expand against absorb; with several --prompts a figure
    --peer=transformers sets the same model in Hugging Face transformers beside train and decode

Every figure is a median over rounds with minimum and maximum. A round runs all sides once, forwards and backwards
alternately, together with a matrix product and a copy of the machine's own, so that drift hits all of them alike. A ratio
is the quotient of two medians, its range that of the quotients within a round. Prints Markdown, writes strict JSON.
"""
from typing import Literal

from configurator import as_text, configure, fail

# ---------------------------------------------------------------------------------------------------------------------
# What is timed
task: Literal['train', 'parts', 'scaling', 'decode', 'memory'] = 'train'    # memory: what train starts for each peak, by itself
variants = ['all']              # attention variants, separated by commas; all: every one, in parts and scaling baseline, lora, enhanced
peer: Literal['none', 'transformers'] = 'none'      # the same model in another library; in train and decode
peer_experts = 'auto'           # its experts implementation: eager, grouped_mm, batched_mm; auto: the fastest in a trial
rounds = 5                      # timed rounds
warmup = 2                      # rounds before them that are not counted
quick = False                   # a tiny model and few rounds, to see that everything works; other knobs still count

# Model: Experiment 1
n_layer = 6                     # blocks
n_head = 8                      # query heads
n_embd = 384                    # width
d_ff = 1536                     # hidden width of one expert
n_expert = 8                    # experts in each layer
top_k = 2                       # experts that each token visits
vocab_size = 4096               # tokens in the vocabulary

# train, parts, scaling
batch_size = 4                  # sequences in one update
block_size = 512                # context in tokens
micro_batch_size = 4            # sequences at once
memory_steps = 3                # updates after which the peak memory is read; 0: not measured
experts = ['8', '16', '32', '64']               # scaling: numbers of experts, top_k and d_ff staying as they are
contexts = ['512', '1024', '2048', '4096']      # scaling: contexts at a constant number of tokens

# decode
prompts = ['512']               # tokens in the cache before decoding starts
batch_sizes = ['1', '8']        # sequences decoded at once
new_tokens = 64                 # tokens decoded after the prompt, one at a time
prefill_chunk = 512             # tokens of the prompt at once
generate = False                # also times whole generate() calls, greedy: prompt and new tokens, ours and the peer's

# Machine
device = 'auto'                 # auto: cuda, else cpu; or one of them by name
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the products; auto: bfloat16 on GPUs that have it, else float32
compile: bool | None = None     # torch.compile, for train, scaling and decoding steps; none: on GPUs
matrix_size = 0                 # the machine's matrix product is n x n x n; 0: 2048, on a GPU 8192
copy_mib = 256                  # the machine's copy, into memory that was touched before
out = ''                        # JSON file, a figure beside it; empty: out/bench/<task>.json
# ---------------------------------------------------------------------------------------------------------------------
defaults = {k: v for k, v in globals().items() if not k.startswith('_')}
config = configure(globals())   # config files, then flags, over the block above; first, so that a typo is answered at once
QUICK = dict(n_layer=2, n_head=4, n_embd=64, d_ff=48, n_expert=4, vocab_size=128, block_size=32, micro_batch_size=2, rounds=3,
             warmup=1, memory_steps=1, experts=['4', '8'], contexts=['16', '32'], prompts=['8', '24'], batch_sizes=['1', '2'],
             new_tokens=4, prefill_chunk=16, matrix_size=128, copy_mib=1)
if quick:
    config |= {k: v for k, v in QUICK.items() if config[k] == defaults[k]}
    globals().update(config)


def numbers(knob):
    """The whole numbers of a comma list, positive and each only once."""
    if not config[knob] or not all(n.strip().isdigit() and int(n) > 0 for n in config[knob]):
        fail(f'--{knob}={as_text(config[knob])}: must be whole numbers above 0, separated by commas, as in --{knob}=128,512')
    return sorted({int(n) for n in config[knob]})


experts, contexts, prompts, batch_sizes = (numbers(k) for k in ('experts', 'contexts', 'prompts', 'batch_sizes'))
for knob in ('rounds', 'batch_size', 'block_size', 'micro_batch_size', 'new_tokens', 'prefill_chunk', 'copy_mib'):
    if config[knob] < 1:
        fail(f'{knob} must be at least 1, not {config[knob]}')
for knob in ('warmup', 'memory_steps', 'matrix_size'):
    if config[knob] < 0:
        fail(f'{knob} must not be negative, it is {config[knob]}')
if not variants or len(set(variants)) < len(variants):
    fail(f'--variants={as_text(variants)}: must be names, each once, separated by commas, as in --variants=baseline,lora')

import contextlib
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

import attention
import moe
from model import LanguageModel, ModelConfig

if variants == ['all']:
    variants = ['baseline', 'lora', 'enhanced'] if task in ('parts', 'scaling') else list(attention.variants(384, 8))
transformers = None
if peer == 'transformers' and task in ('train', 'decode', 'memory'):
    try:
        import transformers
        transformers.logging.set_verbosity_error()
    except ImportError as error:
        fail(f'--peer=transformers needs the package transformers, which cannot be imported ({error}); pip install transformers')

# ---------------------------------------------------------------------------------------------------------------------
# Machine, as in train.py

if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
if device.split(':')[0] not in ('cpu', 'cuda') or device.startswith('cuda') and not torch.cuda.is_available():
    fail(f'--device={device} is not here; try auto, cpu or cuda')
device = torch.device(device)
cuda = device.type == 'cuda'
if cuda:
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')
if dtype == 'auto':
    dtype = 'bfloat16' if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else 'float32'
compile = cuda if compile is None else compile
autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16')
synchronize = torch.cuda.synchronize if cuda else lambda: None
matrix_size = matrix_size or (8192 if cuda else 2048)
micro_batch_size = min(micro_batch_size, batch_size)
config |= {'variants': variants, 'device': device.type, 'dtype': dtype, 'compile': compile, 'matrix_size': matrix_size,
           'micro_batch_size': micro_batch_size}


def environment():
    def git(*command):
        try:
            return subprocess.run(['git', '-C', Path(__file__).resolve().parent, *command], capture_output=True, text=True, timeout=10,
                                  check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None                                         # no git, or no repository
    try:
        name = next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    changes = git('status', '--porcelain', '--untracked-files=no')
    return {'device_name': torch.cuda.get_device_name(device) if cuda else name, 'threads': torch.get_num_threads(),
            'torch': torch.__version__, 'transformers': transformers.__version__ if transformers else None,
            'python': platform.python_version(), 'platform': platform.platform(), 'git_commit': git('rev-parse', 'HEAD'),
            'git_dirty': None if changes is None else bool(changes), 'load_average': os.getloadavg()[0] if hasattr(os, 'getloadavg') else None}


# ---------------------------------------------------------------------------------------------------------------------
# Timing

def timed(work):
    """Seconds that work() takes, the device's queue empty before and after."""
    synchronize()
    clock = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - clock


def interleave(sides, timings):
    """Runs {name: function -> {measure: seconds}} in rounds, appends to timings {name: {measure: [seconds of each round]}}."""
    for i in range(-warmup, rounds):
        for name in list(sides)[::1 if i % 2 == 0 else -1]:         # so that no side always follows the same one
            for measure, seconds in sides[name]().items():
                if i >= 0:
                    timings.setdefault(name, {}).setdefault(measure, []).append(seconds)
    return timings


def machine():
    """The yardstick, a side like any other: one matrix product in the model's dtype, one copy."""
    a, b, c = (torch.randn(matrix_size, matrix_size, device=device, dtype=getattr(torch, dtype)) for _ in range(3))
    source, target = torch.ones(2, copy_mib * 2 ** 18, device=device)
    times = 10 if cuda else 1                                   # one of a GPU's is too short for the clock
    return lambda: {'matmul': timed(lambda: [torch.mm(a, b, out=c) for _ in range(times)]) / times,
                    'copy': timed(lambda: [target.copy_(source) for _ in range(times)]) / times}


def summary(values):
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def rate(work, seconds):
    """work per second; the median is that of the time."""
    s = summary(seconds)
    return {'median': work / s['median'], 'min': work / s['max'], 'max': work / s['min']}


def ratio(ours, theirs):
    """How many times as fast as `theirs`, two lists of seconds of the same rounds."""
    quotients = [t / o for o, t in zip(ours, theirs)]
    return {'of_medians': statistics.median(theirs) / statistics.median(ours), 'min': min(quotients), 'max': max(quotients)}


def machine_rates(seconds):
    return {'matmul_size': matrix_size, 'matmul_flops': rate(2 * matrix_size ** 3, seconds['matmul']),
            'copy_bytes_read_and_written': rate(copy_mib * 2 ** 21, seconds['copy'])}


# ---------------------------------------------------------------------------------------------------------------------
# The sides: our models, and the same ones in transformers

def build(attn, **changes):
    sizes = {k: config[k] for k in ('n_layer', 'n_head', 'n_embd', 'd_ff', 'n_expert', 'top_k', 'vocab_size', 'block_size')}
    try:
        return LanguageModel(ModelConfig(attn=attn, **{**sizes, **changes})).to(device)
    except ValueError as error:
        fail(error)


def build_peer(c):
    """ModelConfig -> its DeepseekV3 (latent) or Mixtral (multi-head). DeepseekV3 always has shared experts: here of width 0."""
    rope = {'rope_type': c.rope_scaling, 'rope_theta': c.rope_theta} | ({'factor': c.rope_factor} if c.rope_scaling != 'default' else {})
    common = dict(vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
                  num_attention_heads=c.n_head, num_experts_per_tok=c.top_k, max_position_embeddings=c.block_size, rms_norm_eps=1e-6,
                  tie_word_embeddings=True, rope_parameters=rope, attn_implementation='sdpa', bos_token_id=None, eos_token_id=None)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                         # initialising a matrix of width 0 is a no-op: yes
        if c.kv_lora_rank is None:
            return transformers.MixtralForCausalLM(transformers.MixtralConfig(
                **common, num_key_value_heads=c.n_kv_head, num_local_experts=c.n_expert, sliding_window=None)).to(device)
        return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
            **common, num_key_value_heads=c.n_head, moe_intermediate_size=c.d_ff, n_shared_experts=0, n_routed_experts=c.n_expert,
            routed_scaling_factor=1.0, kv_lora_rank=c.kv_lora_rank, q_lora_rank=c.q_lora_rank or None, v_head_dim=c.v_head_dim,
            qk_rope_head_dim=c.qk_rope_head_dim, qk_nope_head_dim=c.qk_nope_head_dim, n_group=1, topk_group=1,
            first_k_dense_replace=0, norm_topk_prob=True, attention_bias=c.attention_bias)).to(device)


def fastest_experts(model, work, tokens):
    """Sets the experts implementation of a peer that runs work() fastest -> its name, {name: seconds, None if it failed}."""
    # batched_mm gathers the matrices of every token copy; beyond a gibibyte of them it is out of the question
    gathered = tokens * top_k * 2 * d_ff * n_embd * 4
    names = ('eager', 'grouped_mm') + ('batched_mm',) * (gathered < 2 ** 30) if peer_experts == 'auto' else (peer_experts,)
    trials, errors = {}, []
    for name in names:
        try:
            model.set_experts_implementation(name)
            work()
            trials[name] = min(timed(work) for _ in range(2))
        except Exception as error:                              # whatever an implementation lacks on this machine
            trials[name] = None
            errors.append(f'{name}: {type(error).__name__}: {error}')
    works = {k: v for k, v in trials.items() if v is not None}
    if not works:
        fail(f'none of transformers\' experts implementations runs here ({"; ".join(errors)[:300]})')
    best = min(works, key=works.get)
    model.set_experts_implementation(best)
    return best, trials


def tokens_of(rows, length):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


def our_loss(model):
    """-> function of (x, y, tokens in the update): the loss as train.py has it, auxiliary losses at their default weights."""
    def loss(x, y, total):
        with autocast:
            o = model(x, y)
        return o.nll / total + (0.01 * o.balance_loss + 0.001 * o.z_loss) * (x.numel() / total)
    return loss


def peer_loss(model):
    def loss(x, y, total):
        with autocast:
            return model(input_ids=x, labels=x, use_cache=False).loss * (x.numel() / total)
    return loss


def backward(loss, x, y, micro):
    for i in range(0, len(x), micro):
        loss(x[i:i + micro], y[i:i + micro], x.numel()).backward()


def adamw(model):
    groups = [{'params': [p for p in model.parameters() if p.ndim >= 2], 'weight_decay': 0.1},
              {'params': [p for p in model.parameters() if p.ndim < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)


def update_of(model, loss, lap=lambda part: None):
    """-> function that does one whole update as train.py does: micro-batches forward and backward, clip, optimizer."""
    opt, x, y = adamw(model), tokens_of(batch_size, block_size), tokens_of(batch_size, block_size).flip(1)

    def update():
        backward(loss, x, y, micro_batch_size)
        lap('rest')
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        lap('optimizer')
    return update


# ---------------------------------------------------------------------------------------------------------------------
# --task=train

def attention_kernels(work):
    """Names of the attention kernels (on a CPU: operators) that work() runs, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        work()
        synchronize()
    pattern = r'aten::_scaled_dot_product_\w+|\w*(?:flash|fmha|sdpa)\w*' if cuda else r'aten::_scaled_dot_product_\w+'
    return sorted({m.group()[:80] for e in profile.key_averages() if (m := re.search(pattern, e.key)) and 'backward' not in m.group()})


def resident_gb(field):
    """VmHWM, the peak, or VmRSS of this process in 10^9 bytes. (ru_maxrss would also count the process that started this one.)"""
    try:
        return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(field)) * 1024 / 1e9
    except (OSError, StopIteration):
        import resource                                         # not on Windows; bytes on a Mac
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def task_memory():
    """The process behind peak_memory(): one side alone, a few updates, one line of JSON."""
    before, ours = resident_gb('VmRSS'), build(variants[0])
    model, loss = (ours, our_loss(ours)) if not transformers else (m := build_peer(ours.config), peer_loss(m))
    if transformers:
        model.set_experts_implementation(peer_experts if peer_experts != 'auto' else 'grouped_mm')
    del ours
    gc.collect()
    update = update_of(model.train(), loss)
    for _ in range(memory_steps):
        update()
    print(json.dumps({'peak_gb': resident_gb('VmHWM'), 'before_model_gb': before}))


def peak_memory(attn, experts_implementation=None):
    """Peak resident memory of one side: of a fresh process that runs nothing else -> {'peak_gb', 'before_model_gb'} or None."""
    if not memory_steps:
        return None
    knobs = {k: config[k] for k in defaults if k in config} | {
        'task': 'memory', 'variants': [attn], 'quick': False, 'peer': 'transformers' if experts_implementation else 'none',
        'peer_experts': experts_implementation or 'auto'}
    done = subprocess.run([sys.executable, __file__, *(f'--{k}={as_text(v)}' for k, v in knobs.items())], capture_output=True, text=True)
    if done.returncode:
        print(f'peak memory of {attn} is missing: {(done.stderr.strip().splitlines() or ["killed"])[-1]}', file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def task_train():
    updates, sides, rows, trials = {}, {'machine': machine()}, {}, {}
    for attn in variants:
        for library in ['ours'] + ['transformers'] * bool(transformers):
            gc.collect()
            before = torch.cuda.memory_allocated() if cuda else 0
            side, ours = f'{attn} {library}', None
            if library == 'ours':
                model = build(attn).train()
                rows[side] = {'flops_per_token': model.flops_per_token(), **model.parameter_counts(), 'experts_implementation': None}
                updates[side] = update_of(model, our_loss(torch.compile(model) if compile else model))
            else:
                model = build_peer(rows_config).train()
                updates[side] = update_of(model, peer_loss(model))
                best, trials[side] = fastest_experts(model, updates[side], micro_batch_size * block_size)
                rows[side] = {k: rows[f'{attn} ours'][k] for k in ('flops_per_token',)}
                rows[side] |= {'params_total': sum(p.numel() for p in model.parameters()), 'experts_implementation': best}
            rows_config = model.config
            if cuda:                                            # what this side adds to what the others keep there
                gc.collect()
                torch.cuda.reset_peak_memory_stats()
                for _ in range(memory_steps):
                    updates[side]()
                rows[side]['peak_memory'] = {'peak_gb': (torch.cuda.max_memory_allocated() - before) / 1e9} if memory_steps else None
            sides[side] = lambda update=updates[side]: {'update': timed(update)}
            del model
    timings = interleave(sides, {})
    for side, update in updates.items():
        rows[side]['attention_kernels'] = attention_kernels(update)
    updates.clear(), sides.clear(), gc.collect()
    del update

    tokens, speed = batch_size * block_size, machine_rates(timings['machine'])
    for side, row in rows.items():
        attn, library = side.split()
        seconds = timings[side]['update']
        if not cuda:
            row['peak_memory'] = peak_memory(attn, row['experts_implementation'])
        row |= {'variant': attn, 'library': library, 'ms': summary([1e3 * s for s in seconds]), 'tokens_per_second': rate(tokens, seconds),
                'of_matrix_rate': tokens / statistics.median(seconds) * row['flops_per_token'] / speed['matmul_flops']['median'],
                'speed_to_first': ratio(seconds, timings[f'{variants[0]} ours']['update']),
                'speed_to_peer': ratio(seconds, timings[f'{attn} transformers']['update']) if transformers and library == 'ours' else None}
    gb = lambda row: f'{row["peak_memory"]["peak_gb"]:.2f}' if row['peak_memory'] else '-'
    text = table(['variant', 'library', 'tokens/s', 'ms', 'MFLOPs/token', 'of matrix rate', 'peak GB', 'parameters',
                  f'speed to {variants[0]}', 'to transformers'],
                 [[r['variant'], with_experts(r), show(r['tokens_per_second']), show(r['ms'], '.1f'), f'{r["flops_per_token"] / 1e6:.1f}',
                   f'{r["of_matrix_rate"]:.1%}', gb(r), f'{r["params_total"] / 1e6:.1f}M', show(r['speed_to_first'], '.2f'),
                   show(r['speed_to_peer'], '.2f')] for r in rows.values()])
    notes = [f'One update is {batch_size} x {block_size} tokens in micro-batches of {micro_batch_size}: forward, loss, backward, clip, fused AdamW.',
             'Model FLOPs: LanguageModel.flops_per_token; 6 per active parameter, attention counted without the half causality spares.',
             'Peak memory: ' + ('device memory allocated above what the other sides keep there.' if cuda else
                                f'resident peak (VmHWM) of a fresh process that runs this side alone for {memory_steps} updates, Python and '
                                'torch included.')]
    notes += ['transformers: the fastest experts implementation in a trial; DeepseekV3 routes by sigmoid without auxiliary losses, its '
              'shared experts have width 0; its loss is its own.'] * bool(transformers)
    notes += [f'{side}: {", ".join(row["attention_kernels"])}' for side, row in rows.items()]
    return {'machine': speed, 'rows': list(rows.values()), 'trials': trials, 'timings': timings}, text, notes, None


# ---------------------------------------------------------------------------------------------------------------------
# --task=parts: a stopwatch that is pressed where one part ends and the next begins, in the forward and in the backward

PARTS = ('attention', 'router', 'dispatch', 'experts', 'head', 'optimizer', 'rest')
laps = []                                                       # (part that ended, when)


def lap(part):
    if cuda:                                                    # events: nothing waits for the device
        stamp = torch.cuda.Event(enable_timing=True)
        stamp.record()
    laps.append((part, stamp if cuda else time.perf_counter()))


class Mark(torch.autograd.Function):
    """The identity, on the border of two parts. Forward it ends the one before, backward the one after.

    Autograd runs backwards what was recorded forwards, latest first, so that every moment between two marks belongs to one
    part; a border that several tensors cross is one Mark of them all, which waits for all their gradients.
    """

    @staticmethod
    def forward(ctx, before, after, *tensors):
        ctx.after = after
        lap(before)
        return tensors

    @staticmethod
    def backward(ctx, *grads):
        lap(ctx.after)
        return None, None, *grads


@contextlib.contextmanager
def marked(model):
    """Puts marks around the parts of a model, for the time being."""
    def around(part, work, outside):
        def wrapped(x, *rest):
            y = work(Mark.apply(outside, part, x)[0], *rest)
            if torch.is_tensor(y):
                return Mark.apply(part, outside, y)[0]
            if part == 'router':                                # chosen, weights, Routing
                weights, balance, z = Mark.apply(part, outside, y[1], y[2].balance_loss, y[2].z_loss)
                return y[0], weights, y[2]._replace(balance_loss=balance, z_loss=z)
            first = Mark.apply(part, outside, y[0])[0]          # the MoE layer's (y, Routing), the head's Output
            return y._replace(nll=first) if part == 'head' else (first, *y[1:])
        return wrapped

    plain = moe.swiglu_experts
    moe.swiglu_experts = around('experts', plain, 'dispatch')
    model.head_loss = around('head', model.head_loss, 'rest')
    for layer in model.layers:
        layer.attn.forward = around('attention', layer.attn.forward, 'rest')
        layer.moe.forward = around('dispatch', layer.moe.forward, 'rest')
        layer.moe.route = around('router', layer.moe.route, 'dispatch')
    try:
        yield
    finally:
        moe.swiglu_experts = plain
        del model.head_loss
        for layer in model.layers:
            del layer.attn.forward, layer.moe.forward, layer.moe.route


def seconds_of_parts(update, model):
    """One update with marks -> {part: seconds}."""
    laps.clear()
    synchronize()
    lap('start')
    with marked(model):
        update()
    synchronize()
    seconds = dict.fromkeys(PARTS, 0.0)
    for (_, start), (part, end) in zip(laps, laps[1:]):
        seconds[part] += start.elapsed_time(end) / 1e3 if cuda else end - start
    return seconds


def task_parts():
    sides, models, flops = {'machine': machine()}, {}, {}
    for attn in variants:
        model = models[attn] = build(attn).train()
        update = update_of(model, our_loss(model), lambda part: lap(part))
        sides[f'{attn} whole'] = lambda update=update: {'update': timed(update)}
        sides[f'{attn} parts'] = lambda update=update, model=model: seconds_of_parts(update, model)
        # what flops_per_token adds up, part by part
        count, pairs = model.parameter_counts(), sum(sum(layer.attn.score_and_value_width()) for layer in model.layers)
        flops[attn] = {'attention': 6 * count['params_attention'] + 6 * block_size * pairs, 'router': 6 * count['params_router'],
                       'dispatch': 0, 'experts': 6 * count['params_experts'] * top_k // n_expert, 'head': 6 * count['params_embedding'],
                       'optimizer': 0, 'rest': 6 * count['params_norm']}
        assert sum(flops[attn].values()) == model.flops_per_token()
    timings = interleave(sides, {})

    rows, lines, speed = [], [], machine_rates(timings['machine'])
    for attn in variants:
        whole = statistics.median(timings[f'{attn} whole']['update'])
        parts = []
        for part, seconds in timings[f'{attn} parts'].items():
            ideal = batch_size * block_size * flops[attn][part] / speed['matmul_flops']['median']
            parts.append({'part': part, 'ms': summary([1e3 * s for s in seconds]), 'share': statistics.median(seconds) / whole,
                          'flops_per_token': flops[attn][part], 'ms_at_matrix_rate': 1e3 * ideal,
                          'share_lost': (statistics.median(seconds) - ideal) / whole})
            lines.append([attn, part, show(parts[-1]['ms'], '.1f'), f'{parts[-1]["share"]:.1%}', f'{1e3 * ideal:.1f}',
                          f'{parts[-1]["share_lost"]:.1%}'])
        total = sum(p['ms']['median'] for p in parts)
        share = {p['part']: p['share'] for p in parts}
        rows.append({'variant': attn, 'parts': parts, 'whole_ms': summary([1e3 * s for s in timings[f'{attn} whole']['update']]),
                     'parts_ms': total, 'remainder_ms': 1e3 * whole - total, 'routing_share': share['router'] + share['dispatch'],
                     'flops_per_token': models[attn].flops_per_token(),
                     'of_matrix_rate': batch_size * block_size * models[attn].flops_per_token() / whole / speed['matmul_flops']['median']})
        lines.append([attn, 'remainder', f'{rows[-1]["remainder_ms"]:.1f}', f'{rows[-1]["remainder_ms"] / 1e3 / whole:.1%}', '', ''])
        lines.append([attn, '**whole**', show(rows[-1]['whole_ms'], '.1f'), '100%', f'{10 * rows[-1]["of_matrix_rate"] * whole * 1e2:.1f}',
                      f'{1 - rows[-1]["of_matrix_rate"]:.1%}'])
    text = table(['variant', 'part', 'ms', 'of the whole', 'ms at matrix rate', 'lost'], lines)
    notes = [f'{row["variant"]}: routing (router + dispatch, all of the MoE layer but the experts\' products) is {row["routing_share"]:.1%} of '
             f'an update; {row["of_matrix_rate"]:.1%} of the matrix rate' for row in rows]
    notes += ['Parts are timed inside real updates, at their borders, forward and backward; the whole is an update without marks in the '
              'same rounds, and the remainder is what the marks cost or the noise moved.' + ' Not compiled.' * compile,
              'head: with the loss; optimizer: with clipping; dispatch: sort, permute, weighted sum; rest: embedding, norms, residuals. '
              'lost: time above that of the part\'s model FLOPs at the matrix rate, as a share of the whole.']
    return {'machine': speed, 'rows': rows, 'timings': timings}, text, notes, None


# ---------------------------------------------------------------------------------------------------------------------
# --task=scaling

def task_scaling():
    tokens = max(batch_size * block_size, *contexts)
    if any(tokens % n for n in contexts):
        fail(f'--contexts={as_text(config["contexts"])}: each must divide the {tokens} tokens of a batch')
    if experts[0] < top_k:
        fail(f'--experts={as_text(config["experts"])}: each must be at least top_k ({top_k})')
    speed_of, sides, rows, first = {}, {'machine': machine()}, [], variants[0]

    def expert_side(model):
        run, x = our_loss(torch.compile(model) if compile else model), tokens_of(batch_size, block_size)

        def side():
            work = timed(lambda: backward(run, x, x.flip(1), micro_batch_size))
            opt = adamw(model)                                  # moments of one side at a time: together they would fill the memory
            opt.step()

            def finish():
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
            seconds = {'forward_backward': work, 'optimizer': timed(finish)}
            opt.zero_grad()
            return seconds
        return side

    def context_side(model, n):
        run, x = our_loss(torch.compile(model) if compile else model), tokens_of(tokens // n, n)

        def side():
            seconds = timed(lambda: backward(run, x, x.flip(1), len(x)))
            model.zero_grad()
            return {'forward_backward': seconds}
        return side

    for n in experts:
        model = build(first, n_expert=n).train()
        sides[f'experts {n}'] = expert_side(model)
        rows.append({'kind': 'experts', 'variant': first, 'n': n, 'tokens': batch_size * block_size, 'flops_per_token': model.flops_per_token(),
                     'params_total': model.parameter_counts()['params_total']})
    timings = interleave(sides, {})
    sides = {'machine': sides['machine']}                       # the models of the first table make room
    gc.collect()
    for attn in variants:
        model = build(attn, block_size=contexts[-1]).train()    # one model for all contexts: its weights do not depend on them
        whole = model.config
        for n in contexts:
            sides[f'{attn} context {n}'] = context_side(model, n)
            model.config = replace(whole, block_size=n)
            rows.append({'kind': 'context', 'variant': attn, 'n': n, 'tokens': tokens, 'flops_per_token': model.flops_per_token()})
        model.config = whole
    interleave(sides, timings)

    for row in rows:
        side = f'experts {row["n"]}' if row['kind'] == 'experts' else f'{row["variant"]} context {row["n"]}'
        start = next(r for r in rows if (r['kind'], r['variant']) == (row['kind'], row['variant']))
        seconds = timings[side]['forward_backward']
        speed_of[side] = seconds
        origin = f'experts {start["n"]}' if row['kind'] == 'experts' else f'{row["variant"]} context {start["n"]}'
        row |= {'tokens_per_second': rate(row['tokens'], seconds), 'ms': summary([1e3 * s for s in seconds]),
                'speed_to_first': ratio(seconds, speed_of[origin]), 'expected_by_flops': start['flops_per_token'] / row['flops_per_token'],
                'optimizer_ms': summary([1e3 * s for s in timings[side]['optimizer']]) if row['kind'] == 'experts' else None}
    cells = lambda r: [show(r['tokens_per_second']), show(r['speed_to_first'], '.3f'), f'{r["expected_by_flops"]:.3f}']
    text = table(['experts', 'variant', 'tokens/s', 'to the first', 'by FLOPs', 'parameters', 'clip + optimizer ms'],
                 [[r['n'], r['variant'], *cells(r), f'{r["params_total"] / 1e6:.1f}M', show(r['optimizer_ms'], '.1f')]
                  for r in rows if r['kind'] == 'experts'])
    text += '\n\n' + table(['context', 'variant', 'tokens/s', 'to the first', 'by FLOPs'],
                           [[r['n'], r['variant'], *cells(r)] for r in rows if r['kind'] == 'context'])
    notes = [f'tokens/s of forward and backward: {batch_size * block_size} tokens in the first table, {tokens} at every context in the second. '
             'The optimizer grows with all parameters, whatever the tokens; it is given apart.',
             'by FLOPs: the quotient that model FLOPs per token alone would give; what is above 1 / it in the second table is not attention\'s own.']
    curve = lambda kind, attn: [(r['n'], r['tokens_per_second']) for r in rows if (r['kind'], r['variant']) == (kind, attn)]
    by_flops = [(r['n'], dict.fromkeys(('median', 'min', 'max'), r['expected_by_flops'] * rows[len(experts)]['tokens_per_second']['median']))
                for r in rows if (r['kind'], r['variant']) == ('context', first)]
    figure = [('experts', 'tokens/s', {first: curve('experts', first)}),
              ('context', 'tokens/s', {a: curve('context', a) for a in variants} | {f'{first}, by FLOPs': by_flops})]
    return {'machine': machine_rates(timings['machine']), 'rows': rows, 'timings': timings}, text, notes, figure


# ---------------------------------------------------------------------------------------------------------------------
# --task=decode

def chunks(prompt):
    return [slice(i, min(i + prefill_chunk, prompt)) for i in range(0, prompt, prefill_chunk)]


def our_decoding(model, trunk, tokens, prompt):
    """-> a side: prefill, then the same new tokens in each way this attention has of decoding; and what it allocated."""
    modes = ('absorb', 'expand') if isinstance(model.layers[0].attn, attention.LatentAttention) else ('decode',)
    facts = {}

    def ways(mode):
        for layer in model.layers:
            layer.attn.decode = mode                            # means nothing to multi-head attention

    def side():
        cache = model.new_cache(len(tokens), prompt + new_tokens)
        facts['bytes'] = cache.bytes()
        ways('auto')
        seconds = {'prefill': timed(lambda: [model.decode(tokens[:, s], cache) for s in chunks(prompt)])}
        for mode in modes:
            ways(mode)
            cache.filled, cache.static = prompt, trunk is not None      # a compiled trunk wants shapes that stay
            seconds[mode] = timed(lambda: [model.decode(tokens[:, i:i + 1], cache, trunk) for i in range(prompt, prompt + new_tokens)])
        ways('auto')
        if generate:
            texts = tokens[:, :prompt].tolist()
            seconds['generate'] = timed(lambda: list(model.generate(texts, new_tokens, temperature=0)))
        return seconds
    return side, facts


def peer_decoding(model, tokens, prompt):
    """The same of a transformers model: its DynamicCache, one forward a token, no generate() around it unless asked for."""
    state, facts = {}, {}
    step = lambda s: model(input_ids=tokens[:, s], past_key_values=state['cache'], use_cache=True, logits_to_keep=1)

    def prefill():
        state['cache'] = transformers.DynamicCache(config=model.config)
        for s in chunks(prompt):
            step(s)

    def decode(count=new_tokens):
        for i in range(prompt, prompt + count):
            step(slice(i, i + 1))

    with torch.no_grad():
        facts['prefill_experts'], facts['prefill_trials'] = fastest_experts(model, prefill, len(tokens) * min(prompt, prefill_chunk))
        facts['decode_experts'], facts['decode_trials'] = fastest_experts(model, lambda: decode(min(8, new_tokens)), len(tokens))

    @torch.no_grad()
    def side():
        model.set_experts_implementation(facts['prefill_experts'])
        seconds = {'prefill': timed(prefill)}
        model.set_experts_implementation(facts['decode_experts'])
        seconds['decode'] = timed(decode)
        facts['bytes'] = sum(t.numel() * t.element_size() for layer in state['cache'].layers for t in (layer.keys, layer.values))
        if generate:
            state['cache'] = None
            seconds['generate'] = timed(lambda: model.generate(
                tokens[:, :prompt], attention_mask=torch.ones_like(tokens[:, :prompt]), do_sample=False, max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, pad_token_id=0))
        state['cache'] = None
        return seconds
    return side, facts


def task_decode():
    size = prompts[-1] + new_tokens
    ours = {attn: build(attn, block_size=size).to(getattr(torch, dtype)).eval() for attn in variants}
    trunks = {attn: torch.compile(model.trunk) if compile else None for attn, model in ours.items()}
    theirs = {attn: build_peer(model.config).to(getattr(torch, dtype)).eval() for attn, model in ours.items() if transformers}
    yardstick, timings, rows = machine(), {}, []
    for prompt in prompts:
        for batch in batch_sizes:
            tokens, sides, facts = tokens_of(batch, prompt + new_tokens), {'machine': yardstick}, {}
            where = f'batch {batch} prompt {prompt}'
            for attn in variants:
                sides[f'{attn} ours {where}'], facts[attn, 'ours'] = our_decoding(ours[attn], trunks[attn], tokens, prompt)
                if transformers:
                    sides[f'{attn} transformers {where}'], facts[attn, 'transformers'] = peer_decoding(theirs[attn], tokens, prompt)
            interleave(sides, timings)
            for (attn, library), fact in facts.items():
                seconds = timings[f'{attn} {library} {where}']
                other = timings.get(f'{attn} transformers {where}') if library == 'ours' else None
                for mode in sorted(seconds.keys() - {'prefill', 'generate'}):
                    rows.append({
                        'variant': attn, 'library': library, 'mode': mode, 'batch_size': batch, 'prompt': prompt, 'new_tokens': new_tokens,
                        'prefill_tokens_per_second': rate(batch * prompt, seconds['prefill']),
                        'decode_tokens_per_second': rate(batch * new_tokens, seconds[mode]),
                        'ms_per_token': summary([1e3 * s / new_tokens for s in seconds[mode]]), 'cache_bytes': fact['bytes'],
                        'cache_bytes_per_token': fact['bytes'] / (batch * (prompt + new_tokens)),
                        'experts_implementation': fact.get('decode_experts'), 'prefill_experts_implementation': fact.get('prefill_experts'),
                        'trials': {k: fact[f'{k}_trials'] for k in ('prefill', 'decode') if library == 'transformers'},
                        'generate_tokens_per_second': rate(batch * new_tokens, seconds['generate']) if generate else None,
                        'decode_speed_to_peer': ratio(seconds[mode], other['decode']) if other else None,
                        'prefill_speed_to_peer': ratio(seconds['prefill'], other['prefill']) if other else None,
                        'generate_speed_to_peer': ratio(seconds['generate'], other['generate']) if other and generate else None,
                        'absorb_speed_to_expand': ratio(seconds['absorb'], seconds['expand']) if mode == 'absorb' else None})
            print(f'{where}: done', file=sys.stderr, flush=True)
    text = table(['prompt', 'batch', 'variant', 'library', 'mode', 'prefill tokens/s', 'decode tokens/s', 'ms/token', 'cache B/token', 'cache MB',
                  'absorb to expand', 'decode to transformers'],
                 [[r['prompt'], r['batch_size'], r['variant'], with_experts(r), r['mode'], show(r['prefill_tokens_per_second']),
                   show(r['decode_tokens_per_second'], ',.1f'), show(r['ms_per_token'], '.2f'), f'{r["cache_bytes_per_token"]:,.0f}',
                   f'{r["cache_bytes"] / 1e6:.2f}', show(r['absorb_speed_to_expand'], '.2f'), show(r['decode_speed_to_peer'], '.2f')] for r in rows])
    if generate:
        text += '\n\n' + table(['prompt', 'batch', 'variant', 'library', 'generate() tokens/s', 'to transformers'],
                               [[r['prompt'], r['batch_size'], r['variant'], r['library'], show(r['generate_tokens_per_second'], ',.1f'),
                                 show(r['generate_speed_to_peer'], '.2f')] for r in rows if r['mode'] != 'expand'])
    notes = [f'Random tokens, {new_tokens} decoded one at a time after the prompt, which is read {prefill_chunk} at a time. ms/token is the time of '
             'one step of the whole batch. Cache: what is allocated for prompt and new tokens, one number in ' + dtype + '.',
             'Latent attention: the prompt is read in the cheaper way (auto); then the same tokens are decoded absorbed and expanded.']
    notes += ['transformers: DynamicCache, one forward a token without generate(), the fastest experts implementation in a trial, for '
              'prompt and decoding apart; DeepseekV3 routes by sigmoid, its shared experts have width 0.'] * bool(transformers)
    figure = None
    if len(prompts) > 1:
        names = {(r['variant'], r['library'], r['mode']): ' '.join([r['variant'], *([r['mode']] * (r['mode'] != 'decode')),
                 *(['transformers'] * (r['library'] != 'ours'))]) for r in rows}
        of = lambda key, value: [(r['prompt'], value(r)) for r in rows
                                 if (r['variant'], r['library'], r['mode']) == key and r['batch_size'] == batch_sizes[0]]
        flat = lambda x: dict.fromkeys(('median', 'min', 'max'), x)
        figure = [('context', f'ms per token, batch {batch_sizes[0]}', {n: of(k, lambda r: r['ms_per_token']) for k, n in names.items()}),
                  ('context', f'cache in MB, batch {batch_sizes[0]}',
                   {n: of(k, lambda r: flat(r['cache_bytes'] / 1e6)) for k, n in names.items() if k[2] != 'expand'})]
    return {'machine': machine_rates(timings['machine']), 'rows': rows, 'timings': timings}, text, notes, figure


# ---------------------------------------------------------------------------------------------------------------------
# Report

def show(s, form=',.0f'):
    """'median (min-max)' of a summary, a rate or a ratio; '-' of None."""
    return '-' if s is None else f'{s.get("median", s.get("of_medians")):{form}} ({s["min"]:{form}}-{s["max"]:{form}})'


def with_experts(row):
    return row['library'] + (f' ({row["experts_implementation"]})' if row['experts_implementation'] else '')


def table(head, lines):
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [head, ['---'] * len(head), *lines])


def draw(path, panels):
    """Panels (x label, y label, {name: [(x, summary), ...]}) side by side, bars from minimum to maximum."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot
    except ImportError:
        print('no figure: matplotlib is not installed', file=sys.stderr)
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False)
    for ax, (xlabel, ylabel, curves) in zip(axes[0], panels):
        for name, points in curves.items():
            x, y = [p[0] for p in points], [p[1]['median'] for p in points]
            bars = [[s['median'] - s['min'] for _, s in points], [s['max'] - s['median'] for _, s in points]]
            ax.errorbar(x, y, bars, marker='o', capsize=3, label=name, linestyle='--' if 'transformers' in name or 'FLOPs' in name else '-')
        ax.set_xscale('log', base=2)
        ax.set_xticks(x, map(str, x))
        ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path.name


def json_ready(value):
    """NaN and infinities become null, as JSON has none."""
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == '__main__':
    for attn in variants:
        try:
            ModelConfig(attn=attn, n_embd=n_embd, n_head=n_head, n_expert=n_expert, top_k=top_k)    # an unknown one is told before the others run
        except ValueError as error:
            fail(error)
    if task == 'memory':
        task_memory()
        sys.exit()
    path = Path(out or f'out/bench/{task}.json')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + '.tmp')
        aside.touch()                                           # told now, not after ten minutes
    except OSError as error:
        fail(f'{path} cannot be written to ({error.strerror}); go elsewhere with --out=...')
    started = datetime.now().astimezone().isoformat(timespec='seconds')
    result, text, notes, panels = {'train': task_train, 'parts': task_parts, 'scaling': task_scaling, 'decode': task_decode}[task]()
    env, speed = environment(), result['machine']
    result = {'schema': 1, 'task': task, 'started': started, 'finished': datetime.now().astimezone().isoformat(timespec='seconds'),
              'config': config, 'environment': env, 'notes': notes, 'figure': draw(path.with_suffix('.png'), panels) if panels else None, **result}
    print(f'{text}\n\n{env["device_name"]}, {env["threads"]} threads, torch {env["torch"]}, {dtype}{", compiled" if compile else ""}, {rounds} rounds: '
          f'{matrix_size}^3 matrix product {show({k: v / 1e9 for k, v in speed["matmul_flops"].items()}, ",.1f")} GFLOP/s, copy '
          f'{show({k: v / 1e9 for k, v in speed["copy_bytes_read_and_written"].items()}, ",.1f")} GB/s read and written\n')
    print('\n'.join(f'- {note}' for note in notes))
    aside.write_text(json.dumps(json_ready(result), indent=1, allow_nan=False) + '\n', encoding='utf-8')
    os.replace(aside, path)
    print(f'\n{path}' + (f', {path.with_suffix(".png")}' if result['figure'] else ''))
