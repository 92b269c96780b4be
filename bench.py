"""Speed and memory of every attention variant, side by side in one process: python bench.py [--knob=value ...]

    --task=train      one whole update: tokens/s, share of the machine's own matrix rate, peak memory
    --task=parts      where an update's time goes: attention, router, dispatch, experts, head, optimizer, rest
    --task=scaling    tokens/s against the number of experts and against the context, with a figure
    --task=decode     prefill and decoding with a cache, expand against absorb; with several --prompts a figure
    --peer=transformers sets the same models in Hugging Face transformers beside ours, in train and decode

Every figure is a median over rounds with minimum and maximum. A round runs every side once, from first to last and from
last to first in turn, and with them a matrix product and a copy of the machine's own, so that drift hits all of them
alike. A ratio is the quotient of two medians, its range that of the quotients within a round. Prints Markdown, writes
strict JSON with every single timing.
"""
import os
from pathlib import Path
from typing import Literal

from configurator import as_text, configure, fail

# ---------------------------------------------------------------------------------------------------------------------
# What is timed
task: Literal['train', 'parts', 'scaling', 'decode', 'memory'] = 'train'    # memory: train starts that itself
variants = ['all']              # attention variants, comma list; all of them (parts, scaling: baseline, lora, enhanced)
peer: Literal['none', 'transformers'] = 'none'      # the same models in another library; in train and decode
peer_experts = 'auto'           # its experts implementation: eager, grouped_mm, batched_mm; auto: the fastest
rounds = 5                      # timed rounds
warmup = 2                      # rounds before them that do not count
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
memory_steps = 3                # updates after which the peak memory is read; 0: it is not
experts = ['8', '16', '32', '64']               # scaling: how many, top_k and d_ff staying; these need 14 GB of memory
contexts = ['512', '1024', '2048', '4096']      # scaling: tokens of context, at a constant number of tokens

# decode
prompts = ['512']               # tokens in the cache before decoding starts
batch_sizes = ['1', '8']        # sequences decoded at once
new_tokens = 64                 # tokens decoded after the prompt, one at a time
prefill_chunk = 512             # tokens of the prompt at once

# Machine
device = 'auto'                 # auto: cuda, else cpu; or one of them by name
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the products; auto: bfloat16 on GPUs that have it
compile: bool | None = None     # torch.compile for train, scaling and decoding steps, also of the peer's; none: on GPUs
matrix_size = 0                 # the machine's matrix product is n x n x n; 0: 2048, on a GPU 8192
copy_mib = 256                  # the machine's copy, into memory that was touched before
out = ''                        # JSON file, a figure beside it; empty: out/bench/<task>.json
# ---------------------------------------------------------------------------------------------------------------------
defaults = dict(globals())
config = configure(globals())   # config files, then flags, over the block above; first: a typo is answered at once
QUICK = dict(n_layer=2, n_head=4, n_embd=64, d_ff=48, n_expert=4, vocab_size=128, block_size=32, micro_batch_size=2,
             rounds=3, warmup=1, memory_steps=1, experts=['4', '8'], contexts=['16', '32'], prompts=['8', '24'],
             batch_sizes=['1', '2'], new_tokens=4, prefill_chunk=16, matrix_size=128, copy_mib=1)
if quick:
    config |= {k: v for k, v in QUICK.items() if config[k] == defaults[k]}
    globals().update(config)


def numbers(knob):
    """The whole numbers of a comma list, ascending, each once."""
    if not config[knob] or not all(n.strip().isdecimal() and int(n) > 0 for n in config[knob]):
        fail(f'--{knob}={as_text(config[knob])} must be whole numbers above 0 with commas between: --{knob}=128,512')
    return sorted({int(n) for n in config[knob]})


experts, contexts, prompts, batch_sizes = (numbers(k) for k in ('experts', 'contexts', 'prompts', 'batch_sizes'))
for knob in ('rounds', 'batch_size', 'block_size', 'micro_batch_size', 'new_tokens', 'prefill_chunk', 'copy_mib',
             'warmup', 'memory_steps', 'matrix_size'):
    least = int(knob not in ('warmup', 'memory_steps', 'matrix_size'))
    if config[knob] < least:
        fail(f'{knob} must be at least {least}, not {config[knob]}')
if peer != 'none' and task in ('parts', 'scaling'):
    fail(f'--peer={peer} is for --task=train and --task=decode, not for --task={task}')
if not variants or len(set(variants)) < len(variants):
    fail(f'--variants={as_text(variants)} must be names, each once, with commas between: --variants=baseline,lora')
tokens_of_scaling = max(batch_size * block_size, *contexts)
if task == 'scaling' and any(tokens_of_scaling % n for n in contexts):
    fail(f'--contexts={as_text(config["contexts"])}: each must divide the {tokens_of_scaling} tokens of a batch')
if task == 'scaling' and experts[0] < top_k:
    fail(f'--experts={as_text(config["experts"])}: each must be at least top_k, {top_k}')

path = Path(out or f'out/bench/{task}.json')
if path.is_dir():
    fail(f'{path} is a folder; name a file in it: --out={path / task}.json')
try:                                                            # told now, not after an hour of measuring
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + '.tmp')
    aside.touch()
    aside.unlink()
except OSError as error:
    fail(f'{path} cannot be written to ({error.strerror}); go elsewhere with --out=...')

import gc
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace

os.environ.setdefault('KINETO_LOG_LEVEL', '99')                 # else torch's profiler writes lines of its own
import torch

import attention
from figures import canvas
from machine import (choose_device, choose_dtype, environment, keep_freed_memory, now, resident_gb,
                     write_atomically)
from muon import configure_optimizers
from model import LanguageModel, ModelConfig
from moe import LOSS_WEIGHTS
from stopwatch import PARTS, Stopwatch

if variants == ['all']:
    every = list(attention.variants(384, 8))
    variants = ['baseline', 'lora', 'enhanced'] if task in ('parts', 'scaling') else every
sizes = {k: config[k] for k in ('n_layer', 'n_head', 'n_embd', 'd_ff', 'n_expert', 'top_k', 'vocab_size', 'block_size')}
try:
    for attn in variants:
        ModelConfig(attn=attn, **sizes)                         # what cannot be built is told before anything runs
except ValueError as error:
    fail(error)
transformers = None
if peer == 'transformers':
    try:
        import transformers

        from peers import build_peer, fastest_experts
    except ImportError as error:
        fail(f'--peer=transformers: the package cannot be imported ({error}); pip install transformers')

# ---------------------------------------------------------------------------------------------------------------------
# Machine, as in train.py

device = choose_device(device, kinds=('cuda', 'cpu'))
dtype, cuda = choose_dtype(dtype, device), device.type == 'cuda'
keep_freed_memory(device)
if cuda and dtype == 'float32':
    torch.set_float32_matmul_precision('high')
compile = cuda if compile is None else compile
autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16')
synchronize = torch.cuda.synchronize if cuda else lambda: None
matrix_size = matrix_size or (8192 if cuda else 2048)
micro_batch_size = min(micro_batch_size, batch_size)
config |= {k: globals()[k] for k in ('variants', 'dtype', 'compile', 'matrix_size', 'micro_batch_size')}
config |= {'device': str(device)}
compiled = torch.compile if compile else lambda model: model
if compile:     # the variants share their code, so their graphs count together: beyond 8 the rest would run eagerly
    torch._dynamo.config.recompile_limit = 128

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
    """Runs {name: function -> {measure: seconds}} in rounds; appends to timings {name: {measure: [seconds]}}."""
    for i in range(-warmup, rounds):
        for name in list(sides)[::1 if i % 2 == 0 else -1]:     # so that no side always follows the same one
            for measure, seconds in sides[name]().items():
                if i >= 0:
                    timings.setdefault(name, {}).setdefault(measure, []).append(seconds)
    return timings


def yardstick():
    """The machine itself, a side like any other: a matrix product, a matrix-vector product (all reading) and a copy."""
    kind = {'device': device, 'dtype': getattr(torch, dtype)}
    a, b, c = (torch.randn(matrix_size, matrix_size, **kind) for _ in range(3))
    wide, vector = torch.ones(copy_mib * 2 ** 20 // 1024 // kind['dtype'].itemsize, 1024, **kind), torch.ones(1024, **kind)
    source, target = torch.ones(2, copy_mib * 2 ** 18, device=device)
    times = 10 if cuda else 1                                   # a single one is too short for the clock on a GPU
    return lambda: {'matmul': timed(lambda: [torch.mm(a, b, out=c) for _ in range(times)]) / times,
                    'read': timed(lambda: [torch.mv(wide, vector) for _ in range(times)]) / times,
                    'copy': timed(lambda: [target.copy_(source) for _ in range(times)]) / times}


def machine_rates(seconds):
    return {'matmul_size': matrix_size, 'matmul_flops': rate(2 * matrix_size ** 3, seconds['matmul']),
            'bytes_read': rate(copy_mib * 2 ** 20, seconds['read']),
            'copy_bytes_read_and_written': rate(copy_mib * 2 ** 21, seconds['copy'])}


def summary(values, unit=1.0):
    return {'median': unit * statistics.median(values), 'min': unit * min(values), 'max': unit * max(values)}


def rate(work, seconds):
    """Work per second; its median is that of the time."""
    s = summary(seconds)
    return {'median': work / s['median'], 'min': work / s['max'], 'max': work / s['min']}


def ratio(ours, theirs):
    """How many times as fast as `theirs`; two lists of seconds from the same rounds. None without them."""
    if theirs is None:
        return None
    within = [t / o for o, t in zip(ours, theirs)]
    return {'of_medians': statistics.median(theirs) / statistics.median(ours), 'min': min(within), 'max': max(within)}


# ---------------------------------------------------------------------------------------------------------------------
# The sides: our models, and the same ones in transformers

def build(attn, **changes):
    return LanguageModel(ModelConfig(attn=attn, **{**sizes, **changes})).to(device)


PEER_NOTE = ('transformers: the experts implementation that was fastest in a trial; DeepseekV3 routes by sigmoid and '
             'has shared experts of width 0; neither it nor Mixtral computes auxiliary losses here.')


def fastest(model, work, tokens):
    """Sets the experts implementation of a peer with which work() runs fastest -> its name, {name: seconds or None}.

    tokens: how many work() puts through the experts at once.
    """
    # batched_mm gathers the matrices of every token copy: beyond a GiB of them it is out of the question
    batched = tokens * top_k * 2 * d_ff * n_embd * 4 < 2 ** 30
    names = ('eager', 'grouped_mm') + ('batched_mm',) * batched if peer_experts == 'auto' else (peer_experts,)
    try:
        return fastest_experts(model, lambda: timed(work), names)
    except RuntimeError as error:
        fail(error)


def tokens_of(rows, length):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


def our_loss(model):
    """-> function (x, y, tokens in the update): train.py's loss with the default weights of the auxiliary ones."""
    balance, z = LOSS_WEIGHTS['softmax']

    def loss(x, y, total):
        with autocast:
            o = model(x, y)
        return o.nll / total + (balance * o.balance_loss + z * o.z_loss) * (x.numel() / total)
    return loss


def peer_loss(model):
    def loss(x, y, total):
        with autocast:
            return model(input_ids=x, labels=x, use_cache=False).loss * (x.numel() / total)
    return loss


def backward(loss, x, micro):
    """Forward and backward over x (rows, T), `micro` rows at once; the targets are tokens, as random as x."""
    for i in range(0, len(x), micro):
        loss(x[i:i + micro], x.flip(1)[i:i + micro], x.numel()).backward()


def adamw(model):
    """AdamW as train.py has it; the peer's parameters too are matrices that decay and vectors that don't."""
    return configure_optimizers(model, 1e-4)[0]


def update_of(model, loss, lap=lambda part: None):
    """-> function that does one whole update as train.py does: micro-batches forward and backward, clip, optimizer."""
    opt, x = adamw(model), tokens_of(batch_size, block_size)

    def update():
        backward(loss, x, micro_batch_size)
        lap('rest')
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        lap('optimizer')
    return update


# ---------------------------------------------------------------------------------------------------------------------
# --task=train

def attention_kernels(work):
    """Names of the attention kernels (on a CPU: operators) that work() runs forward, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:     # else 2.11 warns
        work()
        synchronize()
    pattern = r'aten::_scaled_dot_product_\w+' + r'|[\w:]*(flash|fmha|sdpa)[\w:]*' * cuda
    found = {m.group()[:80] for event in profile.key_averages() if (m := re.search(pattern, event.key))}
    return sorted(name for name in found if not re.search('backward|bwd|bprop|cutlassB', name))


def task_memory():
    """The process behind peak_memory(): one side alone, a few updates, one line of JSON."""
    before, model = resident_gb('VmRSS'), build(variants[0])
    if transformers:
        model = build_peer(model.config).to(device)
        model.set_experts_implementation(peer_experts)
    update = update_of(model.train(), (peer_loss if transformers else our_loss)(compiled(model)))
    for _ in range(memory_steps):
        update()
    print(json.dumps({'peak_gb': resident_gb(), 'before_model_gb': before}))


def peak_memory(attn, experts_implementation):
    """Peak resident memory of a fresh process that runs one side alone -> what task_memory prints, or None."""
    if not memory_steps:
        return None
    library = 'transformers' if experts_implementation else 'none'
    knobs = config | {'task': 'memory', 'variants': [attn], 'quick': False, 'peer': library,
                      'peer_experts': experts_implementation or 'auto'}
    flags = [f'--{k}={as_text(v)}' for k, v in knobs.items()]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['killed'])[-1]
        print(f'peak memory of {attn} is missing: {reason}', file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def task_train():
    sides, updates, rows = {'machine': yardstick()}, {}, {}
    for attn in variants:
        for library in ['ours'] + ['transformers'] * bool(transformers):
            gc.collect()
            before = torch.cuda.memory_allocated() if cuda else 0
            row = rows[f'{attn} {library}'] = {'variant': attn, 'library': library}
            if library == 'ours':
                model = build(attn).train()
                facts, sizes_of_ours = {'flops_per_token': model.flops_per_token()}, model.config
                row |= facts | {'experts_implementation': None}
                update = update_of(model, our_loss(compiled(model)))
            else:
                model = build_peer(sizes_of_ours).to(device).train()
                update = update_of(model, peer_loss(compiled(model)))
                best, trials = fastest(model, update, micro_batch_size * block_size)
                row |= facts | {'experts_implementation': best, 'trials': trials}
            row['params_total'] = sum(p.numel() for p in model.parameters())
            if cuda and memory_steps:                           # what this side adds to what the others keep there
                torch.cuda.reset_peak_memory_stats()
                for _ in range(memory_steps):
                    update()
                row['peak_memory'] = {'peak_gb': (torch.cuda.max_memory_allocated() - before) / 1e9}
            updates[f'{attn} {library}'] = update
            sides[f'{attn} {library}'] = lambda update=update: {'update': timed(update)}
    timings = interleave(sides, {})
    for side, row in rows.items():
        row['attention_kernels'] = attention_kernels(updates[side])
    del model, update
    sides.clear(), updates.clear(), gc.collect()                # the processes below need the memory

    tokens, speed = batch_size * block_size, machine_rates(timings['machine'])
    seconds = {side: measures.get('update') for side, measures in timings.items()}
    for side, row in rows.items():
        attn, ours = row['variant'], row['library'] == 'ours'
        if not cuda:
            row['peak_memory'] = peak_memory(attn, row['experts_implementation'])
        row |= {'ms': summary(seconds[side], 1e3), 'tokens_per_second': rate(tokens, seconds[side]),
                'speed_to_first': ratio(seconds[side], seconds[f'{variants[0]} ours']),
                'speed_to_peer': ratio(seconds[side], seconds.get(f'{attn} transformers')) if ours else None}
        row['of_matrix_rate'] = (row['tokens_per_second']['median'] * row['flops_per_token']
                                 / speed['matmul_flops']['median'])
    gb = lambda row: f'{row["peak_memory"]["peak_gb"]:.2f}' if row.get('peak_memory') else '-'
    text = table(['variant', 'library', 'tokens/s', 'ms', 'MFLOPs/token', 'of matrix rate', 'peak GB', 'parameters',
                  f'speed to {variants[0]}', 'to transformers'],
                 [[r['variant'], library_of(r), show(r['tokens_per_second']), show(r['ms'], '.1f'),
                   f'{r["flops_per_token"] / 1e6:.1f}', f'{r["of_matrix_rate"]:.1%}', gb(r),
                   f'{r["params_total"] / 1e6:.1f}M', show(r['speed_to_first'], '.2f'), show(r['speed_to_peer'], '.2f')]
                  for r in rows.values()])
    notes = [f'An update is {batch_size} x {block_size} tokens in micro-batches of {micro_batch_size}: forward, loss, '
             'backward, clip, fused AdamW.',
             'Model FLOPs: LanguageModel.flops_per_token, 6 per active parameter, and attention as if nothing were '
             'masked.']
    notes += ['Peak memory: ' + ('device memory above what the other sides keep there.' if cuda else
                                f'resident peak (VmHWM) of a fresh process that does {memory_steps} updates of this '
                                'side alone, Python included.')] * bool(memory_steps)
    notes += [PEER_NOTE + ' The loss is its own.'] * bool(transformers)
    notes += [f'{side} attends by {", ".join(row["attention_kernels"])}' for side, row in rows.items()]
    return {'machine': speed, 'rows': list(rows.values()), 'timings': timings}, text, notes, None


# ---------------------------------------------------------------------------------------------------------------------
# --task=parts

def flops_of_parts(model):
    """model.flops_per_token() part by part."""
    n, pairs = model.parameter_counts(), sum(sum(layer.attn.score_and_value_width()) for layer in model.layers)
    flops = {'attention': 6 * n['params_attention'] + 6 * block_size * pairs, 'router': 6 * n['params_router'],
             'experts': 6 * n['params_experts'] * model.config.top_k // model.config.n_expert, 'head': 6 * n['params_embedding'],
             'rest': 6 * n['params_norm']}
    assert sum(flops.values()) == model.flops_per_token()
    return dict.fromkeys(PARTS, 0) | flops


def task_parts():
    watch, models = Stopwatch(cuda), {attn: build(attn).train() for attn in variants}
    sides = {'machine': yardstick()}
    for attn, model in models.items():
        update = update_of(model, our_loss(model), watch.lap)
        sides[f'{attn} whole'] = lambda update=update: {'update': timed(update)}
        sides[f'{attn} parts'] = lambda update=update, model=model: watch.time(update, model)
    timings = interleave(sides, {})

    rows, lines, speed, tokens = [], [], machine_rates(timings['machine']), batch_size * block_size
    for attn, model in models.items():
        whole, flops, parts = summary(timings[f'{attn} whole']['update'], 1e3), flops_of_parts(model), []
        at_matrix_rate = lambda n: 1e3 * tokens * n / speed['matmul_flops']['median']           # FLOPs per token -> ms
        for part, seconds in timings[f'{attn} parts'].items():
            ms, ideal = summary(seconds, 1e3), at_matrix_rate(flops[part])
            parts.append({'part': part, 'ms': ms, 'share': ms['median'] / whole['median'],
                          'flops_per_token': flops[part], 'ms_at_matrix_rate': ideal,
                          'share_lost': (ms['median'] - ideal) / whole['median']})
        total, share = sum(p['ms']['median'] for p in parts), {p['part']: p['share'] for p in parts}
        left, ideal = whole['median'] - total, at_matrix_rate(model.flops_per_token())
        rows.append({'variant': attn, 'whole_ms': whole, 'parts': parts, 'parts_ms': total, 'remainder_ms': left,
                     'routing_share': share['router'] + share['dispatch'], 'flops_per_token': model.flops_per_token(),
                     'of_matrix_rate': ideal / whole['median']})
        lines += [[attn, p['part'], show(p['ms'], '.1f'), f'{p["share"]:.1%}', f'{p["ms_at_matrix_rate"]:.1f}',
                   f'{p["share_lost"]:.1%}'] for p in parts]
        lines += [[attn, 'remainder', f'{left:.1f}', f'{left / whole["median"]:.1%}', '', ''],
                  [attn, 'the whole', show(whole, '.1f'), '100%', f'{ideal:.1f}', f'{1 - ideal / whole["median"]:.1%}']]
    text = table(['variant', 'part', 'ms', 'of the whole', 'ms at matrix rate', 'lost'], lines)
    notes = [f'{r["variant"]}: routing (router + dispatch, all of the MoE layer but its products) is '
             f'{r["routing_share"]:.1%} of an update, which runs at {r["of_matrix_rate"]:.1%} of the matrix rate.'
             for r in rows]
    notes += ['Parts are timed inside real updates, at their borders, forward and backward. The whole is an update '
              'without marks in the same rounds; the remainder is what marks cost or noise moved.'
              + ' Not compiled.' * compile,
              'head: with the loss. optimizer: with clipping. dispatch: sort, gather, sum. rest: embedding, '
              'norms, residuals. lost: time above that of the part\'s model FLOPs at the matrix rate, of the whole.']
    return {'machine': speed, 'rows': rows, 'timings': timings}, text, notes, None


# ---------------------------------------------------------------------------------------------------------------------
# --task=scaling

def training_side(model, x, micro, with_optimizer):
    """-> a side: forward and backward over x; apart from it clip and optimizer, which work on all parameters."""
    loss = our_loss(compiled(model))

    def finish(opt):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()

    def side():
        seconds = {'forward_backward': timed(lambda: backward(loss, x, micro))}
        if with_optimizer:
            opt = adamw(model)                                  # moments of all sides at once would fill the memory
            finish(opt)
            seconds['optimizer'] = timed(lambda: finish(opt))
        model.zero_grad()
        return seconds
    return side


def task_scaling():
    machine, rows, sides, tokens = yardstick(), [], {}, tokens_of_scaling

    def add(kind, model, n, x, micro):
        side = f'experts {n}' if kind == 'experts' else f'{model.config.attn} context {n}'
        sides[side] = training_side(model, x, micro, with_optimizer=kind == 'experts')
        rows.append({'kind': kind, 'variant': model.config.attn, 'n': n, 'tokens': x.numel(), 'side': side,
                     'flops_per_token': model.flops_per_token(),
                     'params_total': model.parameter_counts()['params_total']})

    for n in experts:
        add('experts', build(variants[0], n_expert=n).train(), n, tokens_of(batch_size, block_size), micro_batch_size)
    timings = interleave({'machine': machine, **sides}, {})
    sides.clear()
    for attn in variants:
        model = build(attn, block_size=contexts[-1]).train()    # one for all contexts: its weights are the same
        for n in contexts:
            model.config = replace(model.config, block_size=n)  # for flops_per_token
            add('context', model, n, tokens_of(tokens // n, n), tokens // n)
    interleave({'machine': machine, **sides}, timings)

    for row in rows:
        first = next(r for r in rows if (r['kind'], r['variant']) == (row['kind'], row['variant']))
        seconds = timings[row['side']]
        row |= {'tokens_per_second': rate(row['tokens'], seconds['forward_backward']),
                'ms': summary(seconds['forward_backward'], 1e3),
                'optimizer_ms': summary(seconds['optimizer'], 1e3) if 'optimizer' in seconds else None,
                'speed_to_first': ratio(seconds['forward_backward'], timings[first['side']]['forward_backward']),
                'speed_to_first_by_flops': first['flops_per_token'] / row['flops_per_token']}
    cells = lambda r: [r['n'], r['variant'], show(r['tokens_per_second']), show(r['speed_to_first'], '.3f'),
                       f'{r["speed_to_first_by_flops"]:.3f}']
    head = ['variant', 'tokens/s', 'speed to the first', 'by FLOPs']
    text = table(['experts', *head, 'parameters', 'clip + optimizer ms'],
                 [cells(r) + [f'{r["params_total"] / 1e6:.1f}M', show(r['optimizer_ms'], '.1f')]
                  for r in rows if r['kind'] == 'experts'])
    text += '\n\n' + table(['context', *head], [cells(r) for r in rows if r['kind'] == 'context'])
    notes = [f'tokens/s: forward and backward, of {batch_size * block_size} tokens in the first table, of {tokens} at '
             'each context in the second. The optimizer\'s work grows with all parameters, whatever the tokens: it '
             'stands apart.',
             'by FLOPs: the quotient of the model FLOPs per token, attention\'s own share. In the first table it is '
             'below 1 because a router has a row for each expert.']

    def curve(kind, attn):
        return [(r['n'], r['tokens_per_second']) for r in rows if (r['kind'], r['variant']) == (kind, attn)]

    first = [r for r in rows if (r['kind'], r['variant']) == ('context', variants[0])]
    expected = [(r['n'], flat(r['speed_to_first_by_flops'] * first[0]['tokens_per_second']['median'])) for r in first]
    figure = [('experts', 'tokens/s', {variants[0]: curve('experts', variants[0])}),
              ('context', 'tokens/s', {attn: curve('context', attn) for attn in variants}
               | {f'{variants[0]} by FLOPs': expected})]
    return {'machine': machine_rates(timings['machine']), 'rows': rows, 'timings': timings}, text, notes, figure


# ---------------------------------------------------------------------------------------------------------------------
# --task=decode

def chunks(prompt):
    return [slice(i, min(i + prefill_chunk, prompt)) for i in range(0, prompt, prefill_chunk)]


def our_decoding(model, trunk, tokens, prompt):
    """-> a side: the prompt, then the same new tokens in each way its attention can decode; facts about its run."""
    latent = isinstance(model.layers[0].attn, attention.LatentAttention)
    facts, new = {}, range(prompt, prompt + new_tokens)

    def choose(way):
        for layer in model.layers:
            layer.attn.decode_mode = way                             # means nothing to multi-head attention

    def side():
        cache = model.new_cache(len(tokens), prompt + new_tokens)
        facts['bytes'] = cache.bytes()
        choose('auto')
        seconds = {'prefill': timed(lambda: [model.decode(tokens[:, s], cache) for s in chunks(prompt)])}
        cache.static = trunk is not None                        # a compiled trunk wants shapes that stay
        for way in ('absorb', 'expand') if latent else ('decode',):
            choose(way)
            cache.filled = prompt
            seconds[way] = timed(lambda: [model.decode(tokens[:, i:i + 1], cache, trunk) for i in new])
        choose('auto')
        return seconds
    return side, facts


def least_bytes(model, batch, cached):
    """What one step of decoding must read: every weight that a token uses, once for the batch, and the cache.

    Of the experts those that are visited, if all are equally likely: of E a share of 1 - (1 - k/E)^batch.
    """
    n, kind = model.parameter_counts(), getattr(torch, dtype)
    weights = n['params_total'] - n['params_experts'] * (1 - model.config.top_k / model.config.n_expert) ** batch
    return weights * kind.itemsize + batch * cached * model.cache_bytes_per_token(kind)


def peer_decoding(model, tokens, prompt):
    """The same of a transformers model: its DynamicCache and one forward a token, no generate() around it."""
    state, facts = {}, {}

    def step(s):
        model(input_ids=tokens[:, s], past_key_values=state['cache'], use_cache=True, logits_to_keep=1)

    def prefill():
        state['cache'] = transformers.DynamicCache(config=model.config)
        for s in chunks(prompt):
            step(s)

    def decode(count=new_tokens):
        for i in range(prompt, prompt + count):
            step(slice(i, i + 1))

    @torch.no_grad()
    def side():
        model.set_experts_implementation(facts['prefill_experts'])
        seconds = {'prefill': timed(prefill)}
        model.set_experts_implementation(facts['experts'])
        seconds['decode'] = timed(decode)
        kept = [t for layer in state['cache'].layers for t in (layer.keys, layer.values)]
        facts['bytes'] = sum(t.numel() * t.element_size() for t in kept)
        state.clear()
        return seconds

    with torch.no_grad():
        at_once = len(tokens) * min(prompt, prefill_chunk)
        facts['prefill_experts'], prefill_trials = fastest(model, prefill, at_once)
        facts['experts'], decode_trials = fastest(model, lambda: decode(min(8, new_tokens)), len(tokens))
    facts['trials'] = {'prefill': prefill_trials, 'decode': decode_trials}
    return side, facts


def task_decode():
    size = prompts[-1] + new_tokens
    ours = {attn: build(attn, block_size=size).narrow(getattr(torch, dtype)).eval() for attn in variants}
    theirs = {attn: build_peer(model.config).to(device, getattr(torch, dtype)).eval()
              for attn, model in ours.items() if transformers}
    trunks = {attn: torch.compile(model.trunk) if compile else None for attn, model in ours.items()}
    machine, timings, rows = yardstick(), {}, []
    for prompt, batch in ((p, b) for p in prompts for b in batch_sizes):
        tokens, sides, facts = tokens_of(batch, prompt + new_tokens), {'machine': machine}, {}
        for attn in variants:
            side = f'{attn} ours batch {batch} prompt {prompt}'
            sides[side], facts[side] = our_decoding(ours[attn], trunks[attn], tokens, prompt)
            if transformers:
                side = side.replace('ours', 'transformers')
                sides[side], facts[side] = peer_decoding(theirs[attn], tokens, prompt)
        interleave(sides, timings)
        for side, fact in facts.items():
            attn, library, *_ = side.split()
            seconds, least = timings[side], least_bytes(ours[attn], batch, prompt + new_tokens / 2)
            other = timings.get(side.replace('ours', 'transformers'), {}) if library == 'ours' else {}
            for mode in sorted(seconds.keys() - {'prefill'}):
                rows.append({
                    'variant': attn, 'library': library, 'mode': mode, 'batch_size': batch, 'prompt': prompt,
                    'side': side, 'experts_implementation': fact.get('experts'),
                    'prefill_experts_implementation': fact.get('prefill_experts'), 'trials': fact.get('trials'),
                    'prefill_tokens_per_second': rate(batch * prompt, seconds['prefill']),
                    'decode_tokens_per_second': rate(batch * new_tokens, seconds[mode]),
                    'ms_per_token': summary(seconds[mode], 1e3 / new_tokens),
                    'least_bytes': least, 'cache_bytes': fact['bytes'],
                    'cache_bytes_per_token': fact['bytes'] / (batch * (prompt + new_tokens)),
                    'prefill_speed_to_peer': ratio(seconds['prefill'], other.get('prefill')),
                    'decode_speed_to_peer': ratio(seconds[mode], other.get('decode')),
                    'absorb_speed_to_expand': ratio(seconds[mode], seconds['expand'] if mode == 'absorb' else None)})
        print(f'prompt {prompt}, batch {batch}: done', file=sys.stderr, flush=True)

    speed = machine_rates(timings['machine'])
    text = table(['prompt', 'batch', 'variant', 'library', 'mode', 'prefill tokens/s', 'to transformers',
                  'decode tokens/s', 'ms/token', 'least ms', 'absorb to expand', 'to transformers', 'cache B/token', 'cache MB'],
                 [[r['prompt'], r['batch_size'], r['variant'], library_of(r), r['mode'],
                   show(r['prefill_tokens_per_second']), show(r['prefill_speed_to_peer'], '.2f'),
                   show(r['decode_tokens_per_second'], ',.1f'), show(r['ms_per_token'], '.2f'),
                   f'{1e3 * r["least_bytes"] / speed["bytes_read"]["median"]:.2f}',
                   show(r['absorb_speed_to_expand'], '.2f'), show(r['decode_speed_to_peer'], '.2f'),
                   f'{r["cache_bytes_per_token"]:,.0f}', f'{r["cache_bytes"] / 1e6:.2f}'] for r in rows])
    notes = [f'Random tokens: a prompt, {prefill_chunk} at a time, then {new_tokens} one at a time. ms/token: one step '
             f'of the whole batch. Cache: what is allocated for prompt and new tokens, in {dtype}.',
             'Latent attention reads the prompt in the cheaper way (auto), then decodes the same tokens absorbed and '
             'expanded.',
             'least ms: reading once what a step needs, weights (of the experts those that are visited, if all are '
             'equally likely) and cache, at the rate at which the machine multiplies a large matrix by a vector.']
    notes += [PEER_NOTE + ' DynamicCache, one forward a token without generate().'] * bool(transformers)
    figure = panels_of_decoding(rows) if len(prompts) > 1 else None
    return {'machine': speed, 'rows': rows, 'timings': timings}, text, notes, figure


def panels_of_decoding(rows):
    """Time and cache against the context, of the smallest batch; variants whose caches are equal share a curve."""
    times, sizes, caches, batch = {}, {}, {}, min(r['batch_size'] for r in rows)
    for r in rows:
        if r['batch_size'] == batch:
            words = [r['variant']] + [r['mode']] * (r['mode'] != 'decode') + [r['library']] * (r['library'] != 'ours')
            times.setdefault(' '.join(words), []).append((r['prompt'], r['ms_per_token']))
            if r['library'] == 'ours' and r['mode'] != 'expand':
                sizes.setdefault(r['variant'], []).append((r['prompt'], flat(r['cache_bytes'] / 1e6)))
    for attn, points in sizes.items():
        same = next((name for name, others in caches.items() if others == points), None)
        caches[f'{same}, {attn}' if same else attn] = caches.pop(same, points)
    return [('context', f'ms per token, batch {batch}', times), ('context', f'cache in MB, batch {batch}', caches)]


# ---------------------------------------------------------------------------------------------------------------------
# Report

def show(s, form=',.0f'):
    """'median (min-max)' of a summary, rate or ratio; '-' of None."""
    return '-' if s is None else f'{s.get("median", s.get("of_medians")):{form}} ({s["min"]:{form}}-{s["max"]:{form}})'


def flat(x):
    return {'median': x, 'min': x, 'max': x}


def library_of(row):
    return row['library'] + (f' ({row["experts_implementation"]})' if row['experts_implementation'] else '')


def table(head, lines):
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [head, ['---'] * len(head), *lines])


def draw(path, panels):
    """Panels (x label, y label, {name: [(x, summary), ...]}) side by side, bars from least to most -> file name

    A curve has the colour of the variant that its name begins with; expanded, expected and the peer's are broken lines.
    """
    try:
        figure, axes = canvas(6.5 * len(panels), 4.5, columns=len(panels))
    except ImportError:
        print('bench.py: no figure without matplotlib; pip install matplotlib', file=sys.stderr)
        return None
    colours = {}
    for ax, (xlabel, ylabel, curves) in zip(axes, panels):
        for name, points in curves.items():
            x, stats = [p[0] for p in points], [p[1] for p in points]
            bars = [[s['median'] - s['min'] for s in stats], [s['max'] - s['median'] for s in stats]]
            style = ':' if 'transformers' in name else '--' if 'expand' in name or 'FLOPs' in name else '-'
            colour = colours.setdefault(name.replace(',', ' ').split()[0], f'C{len(colours)}')
            ax.errorbar(x, [s['median'] for s in stats], bars, color=colour, linestyle=style, marker='o', markersize=4,
                        capsize=3, label=name)
        ax.set_xscale('log', base=2)
        ax.set_xticks(x, [str(n) for n in x])
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if 'tokens/s' in ylabel:
            ax.set_ylim(0, None)
        else:                                                   # costs, of which the small ones matter too
            ax.set_yscale('log', base=2)
            ax.yaxis.set_major_formatter('{x:g}')
        ax.legend(fontsize=7)
    figure.savefig(path)
    return path.name


def main():
    started = now()
    tasks = {'train': task_train, 'parts': task_parts, 'scaling': task_scaling, 'decode': task_decode}
    content, text, notes, panels = tasks[task]()
    figure, speed = draw(path.with_suffix('.png'), panels) if panels else None, content['machine']
    env = environment(device) | {'transformers': transformers and transformers.__version__}
    content = {'schema': 1, 'task': task, 'started': started, 'finished': now(), 'config': config, 'environment': env,
               'notes': notes, 'figure': figure, **content}
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1, allow_nan=False) + '\n').encode()))
    giga = lambda r: show({k: v / 1e9 for k, v in r.items()}, ',.1f')
    print(f'{text}\n\n{env["device_name"]}, {env["threads"]} threads, torch {env["torch"]}, {dtype}'
          f'{", compiled" if compile else ""}, {rounds} rounds; its own {matrix_size}^3 matrix product '
          f'{giga(speed["matmul_flops"])} GFLOP/s, it reads {giga(speed["bytes_read"])} GB/s and copies '
          f'{giga(speed["copy_bytes_read_and_written"])} GB/s (read and written)\n')
    print('\n'.join(f'- {note}' for note in notes))
    print(f'\n{path}' + (f', {path.with_suffix(".png")}' if figure else ''))


if __name__ == '__main__':
    task_memory() if task == 'memory' else main()
