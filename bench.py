"""Speed and memory of every attention variant, beside the same models in Hugging Face transformers.

    python bench.py                                                         an update of 4 x 512 tokens
    python bench.py --batch_size=24 --micro_batch_sizes=4,8,24              more of it at once
    python bench.py --variants=baseline --peer=none --experts=8,16,32,64    against experts: 14 GB of memory
    python bench.py --batch_size=8 --contexts=512,1024,2048,4096            against the context
    python bench.py --task=decode --prompts=512,8192                        after so many tokens, batch 1 and 8
    python bench.py --variants=mla --peer=none --plain=each                 what is each fast form of kernels.py worth?

Every combination of variant, library, dtype, sizes and --plain is a side. All sides take turns in one process, in
rounds that go from the first side to the last and back alternately, and with them a matrix product of the machine's
own: drift hits all alike. A figure is the median over the rounds with minimum and maximum, a ratio that of the
quotients within a round. Prints Markdown; writes it, and JSON with every single timing.
"""
import os
from pathlib import Path
from typing import Literal

from configurator import as_text, configure, fail, rewrite, say

# ---------------------------------------------------------------------------------------------------------------------
# What is timed
task: Literal['train', 'decode'] = 'train'              # whole updates; prefill and decoding
variants = ['baseline', 'lora', 'enhanced', 'mla']      # attention variants
dtype: Literal['both', 'float32', 'bfloat16'] = 'both'  # train: of the products alone; decode: of weights and cache
peer: Literal['auto', 'none', 'transformers'] = 'auto'  # the same models in another library; auto: if it is installed
plain = ['none']                # functions of kernels.py that run plain, each in a side of its own; each: all in turn
rounds = 5                      # timed rounds
warmup = 2                      # rounds before them that do not count

# Model: Experiment 1
n_layer = 6                     # blocks
n_head = 8                      # query heads
n_embd = 384                    # width
d_ff = 1536                     # hidden width of one expert
top_k = 2                       # experts that each token visits
vocab_size = 4096               # tokens in the vocabulary
experts = ['8']                 # experts in each layer; decode takes the first

# train
contexts = ['512']              # tokens in a sequence; every update has batch_size times the first of them
batch_size = 4                  # sequences in an update
micro_batch_sizes = ['4']       # sequences at once; at longer contexts fewer, so that they are as many tokens
memory_updates = 3              # updates after which the peak memory of a side is read; 0: it is not

# decode
prompts = ['512']               # tokens in the cache before decoding starts
batch_sizes = ['1', '8']        # sequences decoded at once
new_tokens = 64                 # tokens decoded after the prompt, one at a time

# Machine
device = 'auto'                 # auto: cuda, else cpu; or one of them by name
compile: bool | None = None     # torch.compile in train, of both libraries; none: on GPUs
matrix_size = 0                 # the machine's matrix product is n x n x n; 0: 2048, on a GPU 8192
out = ''                        # JSON file, Markdown beside it; empty: out/bench/<task>.json
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())   # config files, then flags, over the block above; first: a typo is answered at once


def numbers(knob):
    """The whole numbers of a comma list, ascending, each once."""
    if not config[knob] or not all(n.strip().isdecimal() and int(n) > 0 for n in config[knob]):
        fail(f'--{knob}={as_text(config[knob])} must be whole numbers above 0 with commas between: --{knob}=128,512')
    return sorted({int(n) for n in config[knob]})


experts, contexts, micro_batch_sizes, prompts, batch_sizes = map(
    numbers, ('experts', 'contexts', 'micro_batch_sizes', 'prompts', 'batch_sizes'))
for knob, least in dict(rounds=1, warmup=0, batch_size=micro_batch_sizes[-1], new_tokens=1, memory_updates=0).items():
    if config[knob] < least:
        fail(f'{knob} must be at least {least}, not {config[knob]}')
if not variants or len(set(variants)) < len(variants):
    fail(f'--variants={as_text(variants)} must be names, each once, with commas between: --variants=baseline,lora')
tokens_in_update = batch_size * contexts[0]
if any(tokens_in_update % n for n in contexts):
    fail(f'--contexts={as_text(config["contexts"])}: each must divide the {tokens_in_update} tokens of an update; '
         f'--batch_size={-(-contexts[-1] // contexts[0])} may do')
path = Path(out or f'out/bench/{task}.json')
try:                                                            # told now, not after an hour of measuring
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open('ab').close()
except OSError as error:
    fail(f'{path} cannot be written to ({error.strerror}); go elsewhere with --out=FILE.json')

import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

os.environ.setdefault('KINETO_LOG_LEVEL', '99')                 # else torch's profiler writes lines of its own
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import kernels
from machine import choose_device, environment, now, peak_memory_gb, write_atomically
from model import LanguageModel, ModelConfig
from moe import LOSS_WEIGHTS
from muon import configure_optimizers

# As in train.py
device = choose_device(device, kinds=('cuda', 'cpu'))
cuda = device.type == 'cuda'
if cuda:
    torch.set_float32_matmul_precision('high')
else:
    kernels.keep_freed_memory()
compile = cuda if compile is None else compile
if compile:     # the variants share code: beyond 8 graphs of a function the rest would run eagerly
    torch._dynamo.config.recompile_limit = 128
matrix_size = matrix_size or (8192 if cuda else 2048)
if peer == 'auto':
    peer = 'transformers' if find_spec('transformers') else 'none'
if plain == ['each']:
    plain = ['none', *kernels.NAMES, 'all']
if not plain or not set(plain) <= {'none', 'all', *kernels.NAMES}:
    fail(f'--plain={as_text(plain)} must be of none, all, each, {", ".join(kernels.NAMES)}')
libraries, dtypes = ['ours'] + [peer] * (peer != 'none'), ['float32', 'bfloat16'] if dtype == 'both' else [dtype]
config |= {'compile': compile, 'matrix_size': matrix_size, 'peer': peer, 'device': str(device)}

# ---------------------------------------------------------------------------------------------------------------------
# Taking turns. A row says what a side is, and holds its seconds, {measure: [of each round]}; turn() does one round

SIDE = ('variant', 'library', 'dtype', 'experts', 'context', 'micro_batch_size', 'prompt', 'batch_size', 'mode',
        'plain')


def take_turns(sides):
    """[(row, turn), ...] -> the machine's own row and the others, with their seconds."""
    sides = [({'variant': 'machine', 'seconds': {}}, yardstick()), *sides]
    for i in range(-warmup, rounds):
        order = sides[::1 if i % 2 == 0 else -1]                # so that no side always follows the same one
        for n, (row, turn) in enumerate(order):
            which = f'round {i + 1} of {rounds}' if i >= 0 else 'warm-up'
            rewrite(f'{which}, {n + 1} of {len(order)}: {label(row)}')
            use_kernels(row)
            for measure, seconds in turn().items():
                if i >= 0:
                    row['seconds'].setdefault(measure, []).append(seconds)
    machine, *rows = [row for row, _ in sides]
    machine |= {f'flops_{d}': rate(2 * matrix_size ** 3, machine['seconds'][d]) for d in ('float32', 'bfloat16')}
    return machine | {'bytes_read': rate(2 ** 28, machine['seconds']['read'])}, rows


def forms(library):
    return plain if library == 'ours' else ['none']


def use_kernels(row):
    form = row.get('plain')
    kernels.use('plain' if form == 'all' else 'fast', **({form: 'plain'} if form in kernels.NAMES else {}))


def yardstick():
    """The machine itself: a matrix product in both dtypes, and 256 MiB of a matrix times a vector, which is reading."""
    a, wide = torch.randn(matrix_size, matrix_size, device=device), torch.ones(2 ** 16, 2 ** 10, device=device)
    b, vector, times = a.bfloat16(), wide[0], 10 if cuda else 1     # one alone is too short for the clock on a GPU
    works = {'float32': lambda: a @ a, 'bfloat16': lambda: b @ b, 'read': lambda: wide @ vector}
    return lambda: {name: timed(lambda: [work() for _ in range(times)]) / times for name, work in works.items()}


def timed(work):
    """Seconds that work() takes, the device's queue empty before and after."""
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    synchronize()
    clock = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - clock


def label(row):
    return ' '.join(f'{k} {row[k]}' if type(row[k]) is int else row[k] for k in SIDE if k in row)


def spread(values):
    values = list(values)
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def rate(work, seconds):
    """Work per second."""
    return spread(work / s for s in seconds)


def compare(rows, measure):
    """Adds to each row how many times as fast it is as others of the same sizes, {column of the table: figure}."""
    for row in rows:
        def like(*but, **wanted):       # the rows that are as this one is, but in some things
            return [r for r in rows if all(r.get(k) == wanted.get(k, row.get(k)) for k in SIDE if k not in but)]
        others = {f'to {variants[0]}': like('mode', variant=variants[0]), 'to float32': like(dtype='float32'),
                  'to fast': like(plain='none')}
        if row['library'] == 'ours' and peer != 'none':
            others[f'to {peer}'] = like('mode', 'plain', library=peer)
            every = sorted(like('mode', 'plain', 'dtype', library=peer),
                           key=lambda r: statistics.median(r['seconds'][measure]))
            others['to its best'] = every
            every[0][f'best_{measure}'] = True
        row[f'{measure}_speed'] = {
            name: spread(theirs / ours for ours, theirs in zip(row['seconds'][measure], found[0]['seconds'][measure]))
            for name, found in others.items() if found and found[0] is not row}


# ---------------------------------------------------------------------------------------------------------------------
# The models, ours and the peer's

def config_of(row, block_size):
    sizes = {k: config[k] for k in ('n_layer', 'n_head', 'n_embd', 'd_ff', 'top_k', 'vocab_size')}
    return ModelConfig(attn=row['variant'], n_expert=row.get('experts', experts[0]), block_size=block_size, **sizes)


def build(row, block_size):
    rewrite(f'building {label(row)}')
    model = LanguageModel(config_of(row, block_size))
    if row['library'] != 'ours':
        import hf                                               # here: what it loads is no memory of ours
        model = hf.peer(model)
    return model.to(device)


def outline(row, block_size):
    """Our model of these sizes without its numbers: it knows what it costs."""
    with torch.device('meta'):
        return LanguageModel(config_of(row, block_size), seed=None)


def fastest_experts(model, work, tokens):
    """-> the experts implementation of a transformers model with which work() is fastest, {name: seconds}.

    tokens: how many work() puts through the experts at once; batched_mm gathers the matrices of every copy of them,
    which beyond a GiB is out of the question.
    """
    trials = {}
    for name in ['eager', 'grouped_mm'] + ['batched_mm'] * (tokens * top_k * 2 * d_ff * n_embd * 4 < 2 ** 30):
        try:
            model.set_experts_implementation(name)
            work()
            trials[name] = min(timed(work), timed(work))
        except Exception:                                       # whatever an implementation lacks on this machine
            if name == 'eager':
                raise
    return min(trials, key=trials.get), trials


def tokens_of(rows, length):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# --task=train

def training_sides():
    sides = []
    for attn, library, n_expert in itertools.product(variants, libraries, experts):
        row = {'variant': attn, 'library': library, 'experts': n_expert}
        model = build(row, contexts[-1])                        # one for all dtypes: weights are float32
        for name, context, micro, form in itertools.product(dtypes, contexts, micro_batch_sizes, forms(library)):
            row = row | {'dtype': name, 'context': context, 'micro_batch_size': micro, 'plain': form, 'seconds': {},
                         'params_total': sum(p.numel() for p in model.parameters())}
            row['flops_per_token'] = outline(row, context).flops_per_token()
            sides.append((row, training_turn(model, row)))
    return sides


def training_turn(model, row):
    """-> turn(). Before it: where the time goes in ours, which experts implementation is the peer's fastest."""
    update, opt = update_of(model, row), optimizer_of(model)
    use_kernels(row)
    if row['library'] == 'ours':
        eager = update_of(model, row, compile=False)
        eager(opt)
        row['parts'] = parts_of(model, lambda: eager(opt))
    else:
        tokens = row['micro_batch_size'] * contexts[0]
        row['experts_implementation'], row['trials'] = fastest_experts(model, lambda: update(opt), tokens)
    del opt

    def turn():
        if row['library'] != 'ours':
            model.set_experts_implementation(row['experts_implementation'])
        opt = optimizer_of(model)       # with new moments: those of all sides at once would fill the memory
        if cuda:
            update(opt)                 # there the first step makes them
        return {'update': timed(lambda: update(opt))}
    return turn


def optimizer_of(model):
    """AdamW as train.py has it; the peer's parameters too are matrices that decay and vectors that don't."""
    return configure_optimizers(model, 1e-4)[0]


def update_of(model, row, compile=compile):
    """-> update(opt): a whole update as train.py does it; micro-batches forward and backward, clip, optimizer."""
    run, (balance, z) = torch.compile(model) if compile else model, LOSS_WEIGHTS['softmax']
    x = tokens_of(tokens_in_update // row['context'], row['context'] + 1)
    micro = max(1, row['micro_batch_size'] * contexts[0] // row['context'])
    model.train()

    def update(opt):
        with torch.autocast(device.type, torch.bfloat16, enabled=row['dtype'] == 'bfloat16'):   # casts the weights once
            for rows in x.split(micro):
                tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
                if row['library'] == 'ours':
                    o = run(tokens, targets)
                    loss = o.nll / targets.numel() + balance * o.balance_loss + z * o.z_loss
                else:
                    loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
                with torch.autocast(device.type, enabled=False):
                    (loss * (len(rows) / len(x))).backward()
        with record_function('part: optimizer'):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
    return update


def parts_of(model, work):
    """Where the time of work() goes, by torch's profiler -> {part: share}: of the CPU's, or on a GPU of its kernels'.

    An operator belongs to the module in whose forward it runs, and what runs in the backward to the module of the
    operator whose gradient it is: autograd gives both the same sequence number.
    """
    scopes, hooks, backward = [], [], 'autograd::engine::evaluate_function'
    for name, module in model.named_modules():
        if name.count('.') <= 2:                                # the model itself, its blocks, their halves
            last = name.split('.')[-1]
            part = 'norms' if 'norm' in last else 'residual' if last.isdecimal() else last or 'head and loss'
            enter = lambda *_, part=part: scopes.append(record_function(f'part: {part}').__enter__())
            leave = lambda *_: scopes.pop().__exit__(None, None, None)
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=kinds, acc_events=True) as profiled, record_function('part: rest'):     # else 2.11 warns
        timed(work)
    for hook in hooks:
        hook.remove()
    part_of, shares = {}, Counter()
    for event in sorted(profiled.events(), key=lambda event: event.time_range.start):
        if event.device_type == torch.autograd.DeviceType.CPU:
            above = event
            while above and not above.name.startswith(('part: ', backward)):
                above = above.cpu_parent
            if above and above.name.startswith(backward):
                part = part_of.get(above.sequence_nr, 'gradients')          # of no operator: they are added up
            else:
                part = above.name.removeprefix('part: ') if above else 'rest'
                if event.sequence_nr >= 0:
                    part_of[event.sequence_nr] = part           # of several with one number the last has the gradient
            shares[part] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {part: share / shares.total() for part, share in shares.most_common()}


def peak_memory(row):
    """Peak memory in GB, before the model and after a few updates of one side: called in a process of its own."""
    before, model = peak_memory_gb(device), build(row, row['context'])
    if row['library'] != 'ours':
        model.set_experts_implementation(row['experts_implementation'])
    use_kernels(row)
    update, opt = update_of(model, row), optimizer_of(model)
    for _ in range(memory_updates):
        update(opt)
    return {'before_gb': before, 'peak_gb': peak_memory_gb(device)}


def task_train():
    machine, rows = take_turns(training_sides())
    compare(rows, 'update')
    for row in rows:
        row |= {'ms': spread(1e3 * s for s in row['seconds']['update']), 'peak_memory': None,
                'tokens_per_second': rate(tokens_in_update, row['seconds']['update'])}
        row['of_matrix_rate'] = (row['tokens_per_second']['median'] * row['flops_per_token']
                                 / machine[f'flops_{row["dtype"]}']['median'])
        try:
            if memory_updates:
                rewrite(f'peak memory of {label(row)}')
                with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                    row['peak_memory'] = pool.submit(peak_memory, row).result()
        except Exception as error:                              # killed for it, say
            say(f'peak memory of {label(row)} is missing: {error}', file=sys.stderr)
    text = table(rows, {
        'tokens/s': lambda r: show(r['tokens_per_second']), 'ms': lambda r: show(r['ms'], '.1f'),
        'MFLOPs/token': lambda r: f'{r["flops_per_token"] / 1e6:.1f}',
        'of matrix rate': lambda r: f'{r["of_matrix_rate"]:.1%}',
        'peak GB': lambda r: f'{r["peak_memory"]["peak_gb"]:.2f}' if r['peak_memory'] else '-',
        **speeds(rows, 'update')})
    ours = [r for r in rows if r['library'] == 'ours']
    parts = dict.fromkeys(part for r in ours for part in r['parts'])
    text += '\n\n' + table(ours, {part: lambda r, part=part: f'{r["parts"].get(part, 0):.1%}' for part in parts})
    return machine, rows, text, [
        f'An update is {tokens_in_update} random tokens: forward, loss, backward, clip, fused AdamW. In bfloat16 are '
        'the products, by autocast; weights, moments and gradients are float32.',
        "of matrix rate: model FLOPs (LanguageModel.flops_per_token) at the machine's own product in the same dtype.",
        'peak GB: of a process that does a few updates of one side alone; on a CPU with Python and all it loads.',
        "Second table: shares of an update under torch's profiler, not compiled, by the module in which an operator or "
        'what it is the gradient of runs; optimizer: with clipping; gradients: adding them up.']


# ---------------------------------------------------------------------------------------------------------------------
# --task=decode

def decoding_sides():
    sides, size = [], prompts[-1] + new_tokens
    for attn, library, name in itertools.product(variants, libraries, dtypes):
        row, kind = {'variant': attn, 'library': library, 'dtype': name}, getattr(torch, name)
        model, plan = build(row, size).eval(), outline(row, size)
        model = model.for_decoding(kind) if library == 'ours' else model.to(kind)
        latent = library == 'ours' and hasattr(model.layers[0].attn, 'decode_mode')
        modes = ['absorb', 'expand'] if latent else ['decode']
        for prompt, batch, mode, form in itertools.product(prompts, batch_sizes, modes, forms(library)):
            # What a step must read: the cache, and once for the batch the weights in use. If all experts are equally
            # likely, 1 - (1 - k/E)^batch of them are in use
            n, cache = plan.parameter_counts(), plan.cache_bytes_per_token(kind) * batch * (prompt + new_tokens / 2)
            weights = n['params_total'] - n['params_experts'] * (1 - top_k / experts[0]) ** batch
            row = row | {'prompt': prompt, 'batch_size': batch, 'mode': mode, 'plain': form, 'seconds': {},
                         'least_bytes': weights * kind.itemsize + cache}
            sides.append((row, decoding_turn(model, tokens_of(batch, prompt + new_tokens), row)))
    return sides


@torch.no_grad()
def decoding_turn(model, tokens, row):
    """-> turn(): the prompt at once, in latent attention in the cheaper way, then the new tokens, in the row's mode.

    In transformers: a DynamicCache and one forward a token, no generate() around it.
    """
    (batch, size), prompt, ours = tokens.shape, row['prompt'], row['library'] == 'ours'

    def choose(way):
        for layer in model.layers if ours else ():
            layer.attn.decode_mode = way                        # means nothing to multi-head attention
        if not ours:
            model.set_experts_implementation(way)

    def new_cache():
        if ours:
            return model.new_cache(batch, size)
        import transformers
        return transformers.DynamicCache(config=model.config)

    def step(cache, start, end):
        if ours:
            model.decode(tokens[:, start:end], cache)
        else:
            model(input_ids=tokens[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def turn():
        cache = new_cache()
        choose('auto' if ours else row['prefill_implementation'])
        seconds = {'prefill': timed(lambda: step(cache, 0, prompt))}
        choose(row['mode'] if ours else row['experts_implementation'])
        seconds['decode'] = timed(lambda: [step(cache, i, i + 1) for i in range(prompt, size)])
        kept = [t for layer in cache.layers for t in (layer.tensors if ours else (layer.keys, layer.values))]
        row['cache_bytes'] = sum(t.numel() * t.element_size() for t in kept)
        return seconds

    if not ours:
        cache, some = new_cache(), range(prompt, min(size, prompt + 8))
        row['prefill_implementation'], row['prefill_trials'] = fastest_experts(
            model, lambda: step(new_cache(), 0, prompt), batch * prompt)
        step(cache, 0, prompt)
        row['experts_implementation'], row['trials'] = fastest_experts(
            model, lambda: [step(cache, i, i + 1) for i in some], batch)
    return turn


def task_decode():
    machine, rows = take_turns(decoding_sides())
    compare(rows, 'prefill')
    compare(rows, 'decode')
    for row in rows:
        seconds, batch = row['seconds'], row['batch_size']
        row |= {'prefill_tokens_per_second': rate(batch * row['prompt'], seconds['prefill']),
                'decode_tokens_per_second': rate(batch * new_tokens, seconds['decode']),
                'ms_per_token': spread(1e3 * s / new_tokens for s in seconds['decode']),
                'least_ms': 1e3 * row['least_bytes'] / machine['bytes_read']['median'],
                'cache_bytes_per_token': row['cache_bytes'] / (batch * (row['prompt'] + new_tokens))}
    text = table(rows, {
        'prefill tokens/s': lambda r: show(r['prefill_tokens_per_second']),
        **({'prefill to its best': speeds(rows, 'prefill')['to its best']} if peer != 'none' else {}),
        'decode tokens/s': lambda r: show(r['decode_tokens_per_second'], ',.1f'),
        'ms/token': lambda r: show(r['ms_per_token'], '.2f'), 'least ms': lambda r: f'{r["least_ms"]:.2f}',
        **speeds(rows, 'decode'), 'cache B/token': lambda r: f'{r["cache_bytes_per_token"]:,.0f}',
        'cache MB': lambda r: f'{r["cache_bytes"] / 1e6:.2f}'})
    return machine, rows, text, [
        f'Random tokens: a prompt at once, then {new_tokens} one at a time. ms/token: one step of the whole batch.',
        'Cache: of prompt and new tokens, in the dtype of the row.',
        'Latent attention reads the prompt in the cheaper way, then decodes absorbed or expanded.',
        'least ms: reading once what a step needs, weights (of the experts those that are visited, if all are equally '
        'likely) and cache, as fast as the machine multiplies a large matrix by a vector.']


# ---------------------------------------------------------------------------------------------------------------------
# Report

def show(s, form=',.0f'):
    """'median (min-max)'; '-' of None."""
    return f'{s["median"]:{form}} ({s["min"]:{form}}-{s["max"]:{form}})' if s else '-'


def speeds(rows, measure):
    names = dict.fromkeys(name for r in rows for name in r[f'{measure}_speed'])
    return {name: lambda r, name=name: show(r[f'{measure}_speed'].get(name), '.2f') for name in names}


def table(rows, columns):
    """Markdown: what tells the sides apart, then the columns, {head: function of a row -> cell}."""
    apart = [k for k in SIDE if k in SIDE[:3] or len({r.get(k) for r in rows}) > 1]
    library = lambda r: 'ours' if r['library'] == 'ours' else (
        f'{peer} ({r["experts_implementation"]})' + ', best' * any(f'best_{m}' in r for m in ('update', 'decode')))
    return markdown([*apart, *columns], [[library(r) if k == 'library' else r[k] for k in apart]
                                         + [cell(r) for cell in columns.values()] for r in rows])


def markdown(head, lines):
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [head, ['---'] * len(head), *lines])


def main():
    started, version = now(), None
    try:
        for attn, n in itertools.product(variants, experts):    # what cannot be built is told before anything runs
            config_of({'variant': attn, 'experts': n}, contexts[0])
        if peer != 'none':
            import transformers
            version = transformers.__version__
    except ValueError as error:
        fail(error)
    except ImportError as error:
        fail(f'--peer={peer}: the package cannot be imported ({error}); pip install {peer}, or --peer=none')
    machine, rows, text, notes = task_train() if task == 'train' else task_decode()
    if peer != 'none':
        notes.append('transformers: the same networks with the same weights, without auxiliary losses; in brackets the '
                     'experts implementation, the fastest in a trial of that side. best: the faster of its dtypes.')
    env = environment(device) | {'transformers': version}
    giga = lambda name: show({k: v / 1e9 for k, v in machine[name].items()}, ',.1f')
    text += (f'\n\n{env["device_name"]}, {env["threads"]} threads, torch {env["torch"]}{", compiled" * compile}, '
             f'{rounds} rounds; its own {matrix_size}^3 matrix product: {giga("flops_float32")} GFLOP/s in float32, '
             f'{giga("flops_bfloat16")} in bfloat16; it reads {giga("bytes_read")} GB/s\n\n'
             + '\n'.join(f'- {note}' for note in notes) + '\n')
    content = {'schema': 2, 'task': task, 'started': started, 'finished': now(), 'config': config, 'environment': env,
               'notes': notes, 'machine': machine, 'rows': rows}
    for suffix, whole in {'.json': json.dumps(content, indent=1, allow_nan=False) + '\n', '.md': text}.items():
        write_atomically(path.with_suffix(suffix), lambda file: file.write(whole.encode()))
    say(f'{text}\n{path}')


if __name__ == '__main__':
    main()
