"""Speed and memory of every attention variant, beside the same models in Hugging Face transformers.

    --task=train      whole updates: tokens/s, share of the machine's own matrix rate, peak memory, where the time goes
    --task=decode     prefill and decoding with a cache; latent attention absorbed and expanded
    --task=kernels    what each fast form of kernels.py gains: updates and decoded tokens with that form alone plain

Every combination of --variants, --dtypes, library and sizes is a side. All sides take turns in one process: a round gives
each a turn, from first to last and from last to first alternately, and with them a matrix product of the machine's own,
so that drift hits all alike. A figure is a median over the rounds with minimum and maximum; a ratio is the quotient of
two medians with the range of the quotients within a round. Prints Markdown; writes it, and strict JSON with every timing.

    python bench.py                                                             an update of 4 x 512 tokens
    python bench.py --batch_size=24 --micro_batch_sizes=4,8,24                  more of it at once
    python bench.py --variants=baseline --experts=8,16,32,64 --peer=none        against experts: 14 GB of memory
    python bench.py --variants=baseline,mla --contexts=512,1024,2048,4096 --batch_size=8        against the context
    python bench.py --task=decode --prompts=512,8192                            after so many tokens, batch 1 and 8
"""
import os
from pathlib import Path
from typing import Literal

from configurator import as_text, configure, fail

# ---------------------------------------------------------------------------------------------------------------------
# What is timed
task: Literal['train', 'decode', 'kernels'] = 'train'
variants = ['baseline', 'lora', 'enhanced', 'mla']      # attention variants
dtypes = ['float32', 'bfloat16']        # train: of the products, weights staying float32; decode: of weights and cache
peer: Literal['auto', 'none', 'transformers'] = 'auto'  # the same models in another library; auto: if it is installed
rounds = 5                      # timed rounds
warmup = 2                      # rounds before them that do not count

# Model: Experiment 1
n_layer = 6                     # blocks
n_head = 8                      # query heads
n_embd = 384                    # width
d_ff = 1536                     # hidden width of one expert
experts = ['8']                 # experts in each layer; decode takes the first
top_k = 2                       # experts that each token visits
vocab_size = 4096               # tokens in the vocabulary

# train, kernels
contexts = ['512']              # tokens in a sequence; an update has batch_size times the first of them, at every context
batch_size = 4                  # sequences in an update, at the first context
micro_batch_sizes = ['4']       # sequences at once, at the first context; at others as many as make the same tokens
memory_updates = 3              # updates after which the peak memory of a side is read; 0: it is not

# decode, kernels
prompts = ['512']               # tokens in the cache before decoding starts
batch_sizes = ['1', '8']        # sequences decoded at once
new_tokens = 64                 # tokens decoded after the prompt, one at a time

# Machine
device = 'auto'                 # auto: cuda, else cpu; or one of them by name
compile: bool | None = None     # torch.compile: in train of both libraries, none: on GPUs; in decode of ours, none: not
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
for knob, least in dict(rounds=1, batch_size=1, new_tokens=1, warmup=0, memory_updates=0, matrix_size=0).items():
    if config[knob] < least:
        fail(f'{knob} must be at least {least}, not {config[knob]}')
if not variants or len(set(variants)) < len(variants):
    fail(f'--variants={as_text(variants)} must be names, each once, with commas between: --variants=baseline,lora')
if dtypes not in (['float32'], ['bfloat16'], ['float32', 'bfloat16']):
    fail(f'--dtypes={as_text(dtypes)} must be float32, bfloat16 or float32,bfloat16')
tokens_in_update = batch_size * contexts[0]
if any(tokens_in_update % n for n in contexts):
    fail(f'--contexts={as_text(config["contexts"])}: each must divide the {tokens_in_update} tokens of an update; '
         f'--batch_size={-(-contexts[-1] // contexts[0])} may do')
if micro_batch_sizes[-1] > batch_size:
    fail(f'--micro_batch_sizes={as_text(config["micro_batch_sizes"])} must be at most the batch_size of {batch_size}')
path = Path(out or f'out/bench/{task}.json')
try:                                                            # told now, not after an hour of measuring
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open('ab').close()
except OSError as error:
    fail(f'{path} cannot be written to ({error.strerror}); go elsewhere with --out=FILE.json')

import concurrent.futures
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace

os.environ.setdefault('KINETO_LOG_LEVEL', '99')                 # else torch's profiler writes lines of its own
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from machine import choose_device, environment, keep_freed_memory, now, peak_memory_gb, write_atomically
from model import LanguageModel, ModelConfig
from moe import LOSS_WEIGHTS

sizes = {k: config[k] for k in ('n_layer', 'n_head', 'n_embd', 'd_ff', 'top_k', 'vocab_size')}
try:
    for attn in variants:
        ModelConfig(attn=attn, n_expert=experts[0], **sizes)    # what cannot be built is told before anything runs
except ValueError as error:
    fail(error)
transformers = None
try:
    if peer != 'none' and task != 'kernels':
        import transformers

        from peers import build_peer                            # ModelConfig -> a transformers model of the same sizes
except ImportError as error:
    if peer == 'transformers':
        fail(f'--peer=transformers: the package cannot be imported ({error}); pip install transformers')
libraries = ['ours'] + ['transformers'] * bool(transformers)

# As in train.py
device = choose_device(device, kinds=('cuda', 'cpu'))
cuda = device.type == 'cuda'
keep_freed_memory(device)
if cuda:
    torch.set_float32_matmul_precision('high')
compile = (cuda and task == 'train') if compile is None else compile
matrix_size = matrix_size or (8192 if cuda else 2048)
config |= {'compile': compile, 'matrix_size': matrix_size, 'peer': libraries[-1], 'device': str(device)}
torch._dynamo.config.recompile_limit = 128      # the variants share code: beyond 8 graphs of it the rest would run eagerly

# ---------------------------------------------------------------------------------------------------------------------
# Taking turns. A row says what a side is and holds its seconds, {measure: [of each round]}; turn() -> {measure: seconds}

SIDE = ('variant', 'library', 'dtype', 'experts', 'context', 'micro_batch_size', 'prompt', 'batch_size', 'mode', 'plain')


def timed(work):
    """Seconds that work() takes, the device's queue empty before and after."""
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    synchronize()
    clock = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - clock


def take_turns(sides):
    """[(row, turn), ...] -> the rows with their seconds, the machine's own first."""
    sides = [({'variant': 'machine', 'seconds': {}}, yardstick()), *sides]
    for i in range(-warmup, rounds):
        order = sides[::1 if i % 2 == 0 else -1]                # so that no side always follows the same one
        for n, (row, turn) in enumerate(order):
            progress(f'{f"round {i + 1} of {rounds}" if i >= 0 else "warm-up"}, {n + 1} of {len(order)}: {label(row)}')
            for measure, seconds in turn().items():
                if i >= 0:
                    row['seconds'].setdefault(measure, []).append(seconds)
    return [row for row, _ in sides]


def yardstick():
    """The machine itself: a matrix product in both dtypes, and 256 MiB of a matrix times a vector, which is reading."""
    a, wide = torch.randn(matrix_size, matrix_size, device=device), torch.ones(2 ** 16, 2 ** 10, device=device)
    b, vector, times = a.bfloat16(), wide[0], 10 if cuda else 1     # one alone is too short for the clock on a GPU
    works = {'float32': lambda: a @ a, 'bfloat16': lambda: b @ b, 'read': lambda: wide @ vector}
    return lambda: {name: timed(lambda: [work() for _ in range(times)]) / times for name, work in works.items()}


def machine_rates(row):
    return {'matmul_size': matrix_size, 'bytes_read': rate(2 ** 28, row['seconds']['read']),
            **{f'matmul_flops_{d}': rate(2 * matrix_size ** 3, row['seconds'][d]) for d in ('float32', 'bfloat16')}}


def summary(values, unit=1.0):
    return {'median': unit * statistics.median(values), 'min': unit * min(values), 'max': unit * max(values)}


def rate(work, seconds):
    """Work per second; its median is that of the time."""
    s = summary(seconds)
    return {'median': work / s['median'], 'min': work / s['max'], 'max': work / s['min']}


def ratio(ours, theirs):
    """How many times as fast as `theirs`; two lists of seconds from the same rounds."""
    within = [t / o for o, t in zip(ours, theirs, strict=True)]
    return {'of_medians': statistics.median(theirs) / statistics.median(ours), 'min': min(within), 'max': max(within)}


def compare(rows, measure):
    """Adds to each row how many times as fast it is as the first variant, as itself in float32, and as the peer."""
    for row in rows:
        alike = [r for r in rows if all(r[k] == row[k] for k in r if k in SIDE[3:-2])]
        peers = [r for r in alike if r['variant'] == row['variant'] and r['library'] != 'ours']
        best = min(peers, key=lambda r: statistics.median(r['seconds'][measure]), default=None)
        own = [r for r in alike if r['library'] == row['library']]
        others = {
            'first': next(r for r in own if r['dtype'] == row['dtype']),
            'float32': next((r for r in own if (r['variant'], r.get('mode'), r['dtype'])
                             == (row['variant'], row.get('mode'), 'float32')), None),
            'peer': next((r for r in peers if r['dtype'] == row['dtype']), None), 'best_peer': best}
        row['best'] = row is best
        for name, r in others.items():
            wanted = r and (row['library'] == 'ours' or 'peer' not in name)
            row[f'{measure}_speed_to_{name}'] = ratio(row['seconds'][measure], r['seconds'][measure]) if wanted else None


def progress(line=''):
    """One line that is rewritten, on a terminal; nothing in files and pipes."""
    if sys.stderr.isatty():
        print(f'\r\x1b[K{line[:110]}', end='', file=sys.stderr, flush=True)


def label(row):
    return ' '.join(f'{k} {row[k]}' if type(row[k]) is int else row[k] for k in SIDE if row.get(k))


# ---------------------------------------------------------------------------------------------------------------------
# The models, ours and transformers'

def build(attn, library, **changes):
    c = ModelConfig(attn=attn, **{'n_expert': experts[0], **sizes, **changes})
    return (LanguageModel(c) if library == 'ours' else build_peer(c)).to(device)


def fastest_experts(model, work, tokens):
    """-> the experts implementation of a transformers model with which work() is fastest, {name: seconds or None}.

    tokens: how many work() puts through the experts at once; batched_mm gathers the matrices of every copy of them, which
    beyond a GiB is out of the question.
    """
    trials = {}
    for name in ['eager', 'grouped_mm'] + ['batched_mm'] * (tokens * top_k * 2 * d_ff * n_embd * 4 < 2 ** 30):
        try:
            model.set_experts_implementation(name)
            work()
            trials[name] = min(timed(work), timed(work))
        except Exception as error:                              # whatever an implementation lacks on this machine
            trials[name], reason = None, f'{name}: {type(error).__name__}: {str(error)[:200]}'
    if not any(trials.values()):
        fail(f'no experts implementation of transformers runs here ({reason})')
    return min(filter(trials.get, trials), key=trials.get), trials


def tokens_of(rows, length):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# --task=train

def training_sides(libraries):
    """The dtypes, contexts and micro-batch sizes share a model, whose weights are float32 in all of them."""
    sides, flops = [], {}
    for attn, library, n_expert in itertools.product(variants, libraries, experts):
        progress(f'building {attn} {library}')
        model = build(attn, library, n_expert=n_expert, block_size=contexts[-1])
        for dtype, context, micro in itertools.product(dtypes, contexts, micro_batch_sizes):
            row = {'variant': attn, 'library': library, 'dtype': dtype, 'experts': n_expert, 'context': context,
                   'micro_batch_size': micro, 'params_total': sum(p.numel() for p in model.parameters()), 'seconds': {}}
            if library == 'ours':
                model.config = replace(model.config, block_size=context)
                flops[attn, n_expert, context] = model.flops_per_token()
            row['flops_per_token'] = flops[attn, n_expert, context]     # the peer's are those of the same sizes
            sides.append((row, training_turn(model, row)))
    return sides


def training_turn(model, row):
    """-> turn(). What the trials and the profiler find out beforehand goes into the row."""
    update, opt = update_of(model, row), optimizer_of(model)
    if row['library'] == 'ours':
        plain = update_of(model, row, compile=False)
        plain(opt)
        row['parts'] = parts_of(model, lambda: plain(opt))
    else:
        row['experts_implementation'], row['trials'] = fastest_experts(
            model, lambda: update(opt), row['micro_batch_size'] * contexts[0])
    del opt

    def turn():
        if row['library'] != 'ours':
            model.set_experts_implementation(row['experts_implementation'])
        opt = optimizer_of(model)       # new moments: those of all sides at once would fill the memory
        if cuda:
            update(opt)                 # there the first step makes them
        return {'update': timed(lambda: update(opt))}
    return turn


def optimizer_of(model):
    """AdamW as train.py has it; the peer's parameters too are matrices that decay and vectors that don't."""
    return LanguageModel.configure_optimizers(model, 1e-4)[0]


def update_of(model, row, compile=compile):
    """-> update(opt): a whole update as train.py does it; micro-batches forward and backward, clip, optimizer."""
    run, (balance, z) = torch.compile(model) if compile else model, LOSS_WEIGHTS['softmax']
    x = tokens_of(tokens_in_update // row['context'], row['context'] + 1)
    micro = max(1, row['micro_batch_size'] * contexts[0] // row['context'])
    model.train()

    def update(opt):
        for rows in x.split(micro):
            tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            with torch.autocast(device.type, torch.bfloat16, enabled=row['dtype'] == 'bfloat16'):
                if row['library'] == 'ours':
                    o = run(tokens, targets)
                    loss = o.nll / targets.numel() + balance * o.balance_loss + z * o.z_loss
                else:
                    loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
            (loss * (len(rows) / len(x))).backward()
        with record_function('part: optimizer'):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
    return update


def parts_of(model, work):
    """Where the time of work() goes, by torch's profiler -> {part: share}, of the CPU's time or, on a GPU, its kernels'.

    An operator belongs to the module in whose forward it runs, and what runs in the backward to the module of the operator
    whose gradient it is: autograd gives both the same sequence number.
    """
    scopes, hooks, backward = [], [], 'autograd::engine::evaluate_function'
    for name, module in model.named_modules():                  # the model itself, blocks and their halves
        last = name.split('.')[-1]
        if name.count('.') <= 2:
            part = 'norms' if 'norm' in last else 'residual' if last.isdecimal() else last or 'head and loss'
            hooks += [module.register_forward_pre_hook(
                          lambda *_, part=part: scopes.append(record_function(f'part: {part}').__enter__())),
                      module.register_forward_hook(lambda *_: scopes.pop().__exit__(None, None, None))]
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
                part = part_of.get(above.sequence_nr, 'gradients')              # of no operator: they are added up
            else:       # of several operators with one number the last has the gradient
                part = part_of[event.sequence_nr] = above.name.removeprefix('part: ') if above else 'rest'
            shares[part] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {part: share / shares.total() for part, share in shares.most_common()}


def peak_memory(row):
    """Peak memory in GB after a few updates of this side alone, and before: to be called in a process of its own."""
    before, model = peak_memory_gb(device), build(row['variant'], row['library'], n_expert=row['experts'],
                                                  block_size=row['context'])
    if row['library'] != 'ours':
        model.set_experts_implementation(row['experts_implementation'])
    update, opt = update_of(model, row), optimizer_of(model)
    for _ in range(memory_updates):
        update(opt)
    return {'peak_gb': peak_memory_gb(device), 'before_model_gb': before}


def in_a_process_of_its_own(function, row):
    progress(f'{function.__name__} of {label(row)}')
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
            return pool.submit(function, row).result()
    except Exception as error:                                  # killed for its memory, say
        print(f'{function.__name__} of {label(row)} is missing: {error}', file=sys.stderr)


def task_train():
    machine, *rows = take_turns(training_sides(libraries))
    compare(rows, 'update')
    speed = machine_rates(machine)
    for row in rows:
        row |= {'ms': summary(row['seconds']['update'], 1e3), 'tokens_per_second': rate(tokens_in_update, row['seconds']['update']),
                'peak_memory': in_a_process_of_its_own(peak_memory, row) if memory_updates else None}
        row['of_matrix_rate'] = (row['tokens_per_second']['median'] * row['flops_per_token']
                                 / speed[f'matmul_flops_{row["dtype"]}']['median'])
    text = table(rows, {
        'tokens/s': lambda r: show(r['tokens_per_second']), 'ms': lambda r: show(r['ms'], '.1f'),
        'MFLOPs/token': lambda r: f'{r["flops_per_token"] / 1e6:.1f}', 'of matrix rate': lambda r: f'{r["of_matrix_rate"]:.1%}',
        'peak GB': lambda r: f'{r["peak_memory"]["peak_gb"]:.2f}' if r['peak_memory'] else '-', **speeds('update')})
    ours = [r for r in rows if r['library'] == 'ours']
    parts = dict.fromkeys(part for r in ours for part in r['parts'])
    text += '\n\n' + table(ours, {part: lambda r, part=part: f'{r["parts"].get(part, 0):.1%}' for part in parts})
    notes = [f'An update is {tokens_in_update} random tokens: forward, loss, backward, clip, fused AdamW. bfloat16: products by '
             'autocast; weights, moments and gradients are float32.',
             'of matrix rate: model FLOPs (LanguageModel.flops_per_token) at the machine\'s own product in the same dtype.',
             'Peak memory: of a process that does a few updates of one side alone; on a CPU with Python and all it loads.',
             'Second table: shares of an update under torch\'s profiler, not compiled, by the module in which an operator runs '
             'or whose gradient it is; optimizer: with clipping; gradients: adding them up.']
    return speed, rows, text, notes


# ---------------------------------------------------------------------------------------------------------------------
# --task=decode

def decoding_sides(libraries):
    sides = []
    for attn, library, dtype in itertools.product(variants, libraries, dtypes):
        progress(f'building {attn} {library} {dtype}')
        model, kind = build(attn, library, block_size=prompts[-1] + new_tokens).eval(), getattr(torch, dtype)
        model = model.narrow(kind) if library == 'ours' else model.to(kind)
        latent = library == 'ours' and hasattr(model.layers[0].attn, 'decode_mode')
        for prompt, batch, mode in itertools.product(prompts, batch_sizes, ['absorb', 'expand'] if latent else ['decode']):
            row = {'variant': attn, 'library': library, 'dtype': dtype, 'prompt': prompt, 'batch_size': batch, 'mode': mode,
                   'seconds': {}}
            turn = our_decoding if library == 'ours' else peer_decoding
            sides.append((row, turn(model, tokens_of(batch, prompt + new_tokens), row)))
    return sides


def our_decoding(model, tokens, row):
    """-> turn(): the prompt in the way that is cheaper, then the new tokens one at a time in the row's mode."""
    trunk, (batch, size), prompt = torch.compile(model.trunk) if compile else None, tokens.shape, row['prompt']
    # What a step must read: the weights that are used, once for the batch, and the cache. If all experts are equally
    # likely, 1 - (1 - k/E)^batch of them are
    n, kind = model.parameter_counts(), model.embed.weight.dtype
    weights = n['params_total'] - n['params_experts'] * (1 - top_k / experts[0]) ** batch
    row['least_bytes'] = (weights * kind.itemsize
                          + batch * (prompt + new_tokens / 2) * model.cache_bytes_per_token(kind))

    def choose(mode):
        for layer in model.layers:
            layer.attn.decode_mode = mode                       # means nothing to multi-head attention

    def turn():
        cache = model.new_cache(batch, size)
        row['cache_bytes'] = cache.bytes()
        choose('auto')
        prefill = timed(lambda: model.decode(tokens[:, :prompt], cache))
        choose(row['mode'])
        cache.static = compile                                  # a compiled trunk wants shapes that stay
        return {'prefill': prefill,
                'decode': timed(lambda: [model.decode(tokens[:, i:i + 1], cache, trunk) for i in range(prompt, size)])}
    return turn


def peer_decoding(model, tokens, row):
    """-> turn(): the same of a transformers model: its DynamicCache and one forward a token, no generate() around it."""
    (batch, size), prompt, caches = tokens.shape, row['prompt'], []

    @torch.no_grad()
    def prefill():
        caches[:] = [transformers.DynamicCache(config=model.config)]
        step(0, prompt)

    @torch.no_grad()
    def step(start, end):
        model(input_ids=tokens[:, start:end], past_key_values=caches[0], use_cache=True, logits_to_keep=1)

    def decode(end=size):
        for i in range(prompt, end):
            step(i, i + 1)

    def turn():
        model.set_experts_implementation(row['prefill_implementation'])
        seconds = {'prefill': timed(prefill)}
        model.set_experts_implementation(row['experts_implementation'])
        seconds['decode'] = timed(decode)
        kept = [t for layer in caches.pop().layers for t in (layer.keys, layer.values)]
        row['cache_bytes'] = sum(t.numel() * t.element_size() for t in kept)
        return seconds

    row['prefill_implementation'], row['prefill_trials'] = fastest_experts(model, prefill, batch * prompt)
    row['experts_implementation'], row['trials'] = fastest_experts(model, lambda: decode(prompt + 8), batch)
    return turn


def task_decode():
    machine, *rows = take_turns(decoding_sides(libraries))
    compare(rows, 'prefill')
    compare(rows, 'decode')
    speed = machine_rates(machine)
    for row in rows:
        seconds, batch = row['seconds'], row['batch_size']
        row |= {'prefill_tokens_per_second': rate(batch * row['prompt'], seconds['prefill']),
                'decode_tokens_per_second': rate(batch * new_tokens, seconds['decode']),
                'ms_per_token': summary(seconds['decode'], 1e3 / new_tokens),
                'cache_bytes_per_token': row['cache_bytes'] / (batch * (row['prompt'] + new_tokens))}
    text = table(rows, {
        'prefill tokens/s': lambda r: show(r['prefill_tokens_per_second']),
        'to best': lambda r: show(r['prefill_speed_to_best_peer'], '.2f'),
        'decode tokens/s': lambda r: show(r['decode_tokens_per_second'], ',.1f'), 'ms/token': lambda r: show(r['ms_per_token'], '.2f'),
        'least ms': lambda r: f'{1e3 * r["least_bytes"] / speed["bytes_read"]["median"]:.2f}' if 'least_bytes' in r else '-',
        **speeds('decode'), 'cache B/token': lambda r: f'{r["cache_bytes_per_token"]:,.0f}',
        'cache MB': lambda r: f'{r["cache_bytes"] / 1e6:.2f}'})
    notes = [f'Random tokens: a prompt at once, then {new_tokens} one at a time. ms/token: one step of the whole batch. Cache: what '
             'is allocated for prompt and new tokens, in the dtype of the row.',
             'Latent attention reads the prompt in the cheaper way, then decodes absorbed or expanded.',
             'least ms: reading once what a step needs, weights (of the experts those that are visited, if all are equally '
             'likely) and cache, as fast as the machine multiplies a large matrix by a vector.']
    return speed, rows, text, notes + ['Compiled: ours alone.'] * compile


# ---------------------------------------------------------------------------------------------------------------------
# --task=kernels

def task_kernels():
    import kernels
    sides, forms = [], ['none', *kernels.FAST, 'all']
    for (row, turn), plain in itertools.product(training_sides(['ours']) + decoding_sides(['ours']), forms):
        def with_plain(turn=turn, plain=plain):
            kernels.use('plain' if plain == 'all' else 'fast', **{plain: 'plain'} if plain in kernels.FAST else {})
            seconds = turn()
            kernels.use('fast')
            return seconds
        sides.append((row | {'plain': plain, 'seconds': {}}, with_plain))
    machine, *rows = take_turns(sides)
    lines = []
    for i in range(0, len(rows), len(forms)):                   # of one side: all fast, each form plain, all plain
        fast, *plain = rows[i:i + len(forms)]
        measure = 'update' if 'update' in fast['seconds'] else 'decode'
        for row in plain:
            left = ratio(row['seconds'][measure], fast['seconds'][measure])
            row['gain'] = {'median': 1 - left['of_medians'], 'min': 1 - left['max'], 'max': 1 - left['min']}
        side = [fast['variant'], fast['dtype'], measure, fast.get('batch_size', batch_size), fast.get('mode', '')]
        lines.append(side + [show(row['gain'], '.1%') for row in plain])
    notes = ['What the time falls by when the fast form takes the place of the plain one, all others being fast; last: of all '
             'together.', f'An update of {tokens_in_update} tokens; tokens decoded after a prompt of {prompts[0]}.']
    return machine_rates(machine), rows, markdown(['variant', 'dtype', 'measure', 'batch', 'mode', *forms[1:]], lines), notes


# ---------------------------------------------------------------------------------------------------------------------
# Report

def speeds(measure):
    columns = {f'to {variants[0]}': 'first', 'to float32': 'float32', 'to transformers': 'peer', 'to its best': 'best_peer'}
    return {head: lambda r, name=name: show(r[f'{measure}_speed_to_{name}'], '.2f') for head, name in columns.items()}


def show(s, form=',.0f'):
    """'median (min-max)' of a summary, rate or ratio; '-' of None."""
    return '-' if s is None else f'{s.get("median", s.get("of_medians")):{form}} ({s["min"]:{form}}-{s["max"]:{form}})'


def table(rows, columns):
    """Markdown: what tells the sides apart, then the columns, {head: function of a row -> cell}."""
    apart = ['variant', 'library', 'dtype'] + [k for k in SIDE[3:] if len({r.get(k) for r in rows}) > 1]
    name = lambda r: r['library'] + f' ({r.get("experts_implementation")})' * (r['library'] != 'ours') + ', best' * r['best']
    return markdown(apart + list(columns), [[(r | {'library': name(r)})[k] for k in apart] + [cell(r) for cell in columns.values()]
                                            for r in rows])


def markdown(head, lines):
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [head, ['---'] * len(head), *lines])


def main():
    started, tasks = now(), {'train': task_train, 'decode': task_decode, 'kernels': task_kernels}
    speed, rows, text, notes = tasks[task]()
    progress()
    notes += ['transformers: DeepseekV3 for latent attention, which routes by sigmoid, Mixtral otherwise, both without '
              'auxiliary losses; in brackets the experts implementation, the fastest in a trial of that side. best: its '
              'faster dtype.'] * bool(transformers)
    env = environment(device) | {'transformers': transformers and transformers.__version__}
    giga = lambda name: show({k: v / 1e9 for k, v in speed[name].items()}, ',.1f')
    text += (f'\n\n{env["device_name"]}, {env["threads"]} threads, torch {env["torch"]}{", compiled" * compile}, {rounds} rounds; its '
             f'own {matrix_size}^3 matrix product: {giga("matmul_flops_float32")} GFLOP/s in float32, {giga("matmul_flops_bfloat16")} '
             f'in bfloat16; it reads {giga("bytes_read")} GB/s\n\n' + '\n'.join(f'- {note}' for note in notes) + '\n')
    content = {'schema': 2, 'task': task, 'started': started, 'finished': now(), 'config': config, 'environment': env,
               'notes': notes, 'machine': speed, 'rows': rows}
    for suffix, whole in {'.json': json.dumps(content, indent=1, allow_nan=False) + '\n', '.md': text}.items():
        write_atomically(path.with_suffix(suffix), lambda file: file.write(whole.encode()))
    print(f'{text}\n{path}')


if __name__ == '__main__':
    main()
