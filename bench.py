"""Speed and memory of every attention variant, beside the same models in Hugging Face transformers.

    python bench.py                                                         an update of 4 x 512 tokens
    python bench.py --batch_size=24 --micro_batch_sizes=4,8,24              more of it at once
    python bench.py --variants=baseline --peer=none --experts=8,16,32,64    against experts: 14 GB of memory
    python bench.py --batch_size=8 --contexts=512,1024,2048,4096            against the context
    python bench.py --task=decode --prompts=512,8192                        after so many tokens, batch 1 and 8
    python bench.py --variants=mla --peer=none --plain=each                 what is each fast form of kernels.py worth?
    python bench.py --variants=mla --peer=none --parts=20                   where does the time of an update go?

Every combination of variant, library, dtype, sizes and --plain is a side. All sides take turns in one process, in
rounds that go from the first side to the last and back alternately, and with them a matrix product of the machine's
own: drift hits all alike. A turn begins with an update, or a prompt, that is not timed. A figure is the median over the
rounds with minimum and maximum, a ratio that of the quotients within a round. Prints Markdown; writes it, and JSON with
every single timing.
"""
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from configurator import as_text, configure, fail, rewrite, run_knobs, say

# ---------------------------------------------------------------------------------------------------------------------
# What is timed
task: Literal['train', 'decode'] = 'train'              # whole updates; prefill and decoding
variants = ['baseline', 'lora', 'enhanced', 'mla']      # attention variants
dtype: Literal['auto', 'both', 'float32', 'bfloat16'] = 'auto'  # train: of the products alone; decode: of weights and
                                # cache; auto: both where the machine computes in bfloat16, which else takes minutes
peer: Literal['auto', 'none', 'transformers'] = 'auto'  # the same models in another library; auto: if it is installed
plain = ['none']                # functions of kernels.py that run plain, each in a side of its own; each: all in turn
experts = ['8']                 # experts in each layer; decode takes the smallest of these numbers
rounds = 5                      # timed rounds
warmup = 2                      # rounds before them that do not count
parts = 0                       # lines of torch.profiler's table of one more turn of each side, by time; 0: no table

# train
contexts = ['512']              # tokens in a sequence; every update has batch_size times the smallest of them
batch_size = 4                  # sequences in an update
micro_batch_sizes = ['4']       # sequences at once; at longer contexts fewer, so that they are as many tokens
memory_updates = 3              # updates after which the peak memory of a side is read; 0: it is not

# decode
prompts = ['512']               # tokens in the cache before decoding starts
batch_sizes = ['1', '8']        # sequences decoded at once
new_tokens = 64                 # tokens decoded after the prompt, one at a time

# Machine
device = 'auto'                 # auto: cuda, else cpu; or one of them by name
compile: bool | None = None     # train: torch.compile, of both libraries; none: on GPUs
matrix_size = 0                 # the machine's matrix product is n x n x n; 0: 2048, on a GPU 8192
out = ''                        # FILE.json, Markdown goes beside it; empty: out/bench/<task>.json
# ---------------------------------------------------------------------------------------------------------------------
# The network is Experiment 1's, ModelConfig's defaults; each of its knobs is one here too, but for those that are lists
network = {name: knob for name, knob in run_knobs()[0].items() if name not in ('attn', 'n_expert', 'block_size')}
config = configure(globals(), network)      # first: a typo is answered at once


def numbers(knob):
    """The whole numbers of a comma list, ascending, each once."""
    if not config[knob] or not all(n.strip().isdecimal() and int(n) > 0 for n in config[knob]):
        fail(f'--{knob}={as_text(config[knob])} must be whole numbers above 0 with commas between: --{knob}=128,512')
    return sorted({int(n) for n in config[knob]})


experts, contexts, micro_batch_sizes, prompts, batch_sizes = map(
    numbers, ('experts', 'contexts', 'micro_batch_sizes', 'prompts', 'batch_sizes'))
for knob, least in dict(rounds=1, warmup=0, parts=0, batch_size=micro_batch_sizes[-1], new_tokens=1, memory_updates=0,
                        matrix_size=0).items():
    if config[knob] < least:
        fail(f'{knob} must be at least {least}, not {config[knob]}')
if not variants or len(set(variants)) < len(variants):
    fail(f'--variants={as_text(variants)} must be names, each once, with commas between: --variants=baseline,lora')
tokens_in_update = batch_size * contexts[0]
if any(tokens_in_update % n for n in contexts):
    fail(f'--contexts={as_text(config["contexts"])}: each must divide the {tokens_in_update} tokens of an update; '
         f'--batch_size={-(-contexts[-1] // contexts[0])} may do')
path = Path(os.path.expanduser(out) or f'out/bench/{task}.json')
if path.suffix != '.json' or path.is_dir():
    fail(f'--out={out}: give a FILE.json that is no directory')
try:                                                            # told now, not after an hour of measuring
    path.parent.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=path.parent).close()                      # leaves nothing
except OSError as error:
    fail(f'{path} cannot be written to ({error.strerror}); go elsewhere with --out=FILE.json')

import itertools
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec

import torch

import kernels
from decoding import Cache
from machine import choose_compile, choose_device, choose_dtype, environment, now, peak_memory_gb, write_atomically
from model import LanguageModel, ModelConfig
from moe import LOSS_WEIGHTS
from muon import clip_gradients, configure_optimizers

# As in train.py
device = choose_device(device, kinds=('cuda', 'cpu'))
cuda = device.type == 'cuda'
if cuda:
    torch.set_float32_matmul_precision('high')
else:
    kernels.keep_freed_memory()
compile = task == 'train' and choose_compile(compile, device)
if compile:     # the variants share code: beyond 8 graphs of a function the rest would run eagerly
    torch._dynamo.config.recompile_limit = 128
matrix_size = matrix_size or (8192 if cuda else 2048)
if peer == 'auto':
    peer = 'transformers' if find_spec('transformers') else 'none'
if plain == ['each']:
    plain = ['none', *kernels.NAMES, 'all']
if not plain or not set(plain) <= {'none', 'all', *kernels.NAMES}:
    fail(f'--plain={as_text(plain)} must be of none, all, each, {", ".join(kernels.NAMES)}')
dtypes = ['float32', 'bfloat16'] if dtype == 'both' else [dtype]
if dtype == 'auto':
    dtypes = ['float32'] + ['bfloat16'] * (choose_dtype('auto', device, 384) == 'bfloat16')
libraries = ['ours'] + [peer] * (peer != 'none')
forms = {'ours': plain, peer: ['none']}                         # of the kernels, in each library
config |= {'compile': compile, 'matrix_size': matrix_size, 'peer': peer, 'device': str(device)}

# ---------------------------------------------------------------------------------------------------------------------
# Taking turns. A row says what a side is, how many tokens each measure of it is about, {measure: tokens}, and holds its
# seconds, {measure: [of each round]}; turn() does one round -> {measure: seconds}

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
    work = 2e-9 * matrix_size ** 3
    return machine | {f'gflops_{d}': spread([work / s for s in all_]) for d, all_ in machine['seconds'].items()}, rows


def use_kernels(row):
    form = row.get('plain')
    kernels.use('plain' if form == 'all' else 'fast', **({form: 'plain'} if form in kernels.NAMES else {}))


def yardstick():
    """The turn of the machine itself: a matrix product in each of the dtypes."""
    times = 10 if cuda else 1                                   # one alone is too short for the clock on a GPU
    square = torch.randn(matrix_size, matrix_size, device=device)
    matrices = {name: square.to(getattr(torch, name)) for name in dtypes}
    return lambda: {name: timed(lambda: [m @ m for _ in range(times)]) / times for name, m in matrices.items()}


def timed(work):
    """Seconds that work() takes, the device's queue empty before and after."""
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    synchronize()
    clock = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - clock


def parts_of(row, turn):
    """Where the time of one more turn goes, as torch.profiler tells it."""
    rewrite(f'parts of {label(row)}')
    use_kernels(row)
    with torch.profiler.profile() as profile:
        turn()
    parts_by_time = profile.key_averages().table(sort_by=f'self_{device.type}_time_total', row_limit=parts)
    return f'\n{label(row)}:\n\n```\n{parts_by_time}```\n'


def label(row):
    return ' '.join(f'{k} {row[k]}' if type(row[k]) is int else row[k] for k in SIDE if k in row)


def spread(values):
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def compare(rows, measure):
    """Adds to each row its tokens per second, and how many times as fast it is as others of the same sizes, by name."""
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
            name: spread([theirs / ours for ours, theirs in zip(row['seconds'][measure], found[0]['seconds'][measure])])
            for name, found in others.items() if found and found[0] is not row}
        row[f'{measure}_tokens_per_second'] = spread([row['tokens'][measure] / s for s in row['seconds'][measure]])


# ---------------------------------------------------------------------------------------------------------------------
# The models, ours and the peer's

def config_of(row, block_size):
    return ModelConfig(attn=row['variant'], n_expert=row.get('experts', experts[0]), block_size=block_size,
                       **{k: config[k] for k in network})


def build(row, block_size):
    rewrite(f'building {label(row)}')
    model = LanguageModel(config_of(row, block_size))
    if row['library'] != 'ours':
        import hf                                               # here: what it loads is no memory of ours
        model = hf.peer(model)
    return model.to(device)


def fastest_experts(model, work, tokens):
    """-> the experts implementation of a transformers model with which work() is fastest.

    tokens: how many work() puts through the experts at once; batched_mm gathers the matrices of every copy of them,
    which beyond a GiB is out of the question.
    """
    trials, matrices = {}, config['top_k'] * 3 * config['d_ff'] * config['n_embd'] * 4
    for name in ['eager', 'grouped_mm'] + ['batched_mm'] * (tokens * matrices < 2 ** 30):
        try:
            model.set_experts_implementation(name)
            work()
            trials[name] = min(timed(work), timed(work))
        except Exception:                                       # whatever an implementation lacks on this machine
            if name == 'eager':
                raise
    return min(trials, key=trials.get)


def tokens_of(rows, length):
    return torch.randint(config['vocab_size'], (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# --task=train

def training_sides():
    sides = []
    for attn, library, n_expert in itertools.product(variants, libraries, experts):
        row = {'variant': attn, 'library': library, 'experts': n_expert}
        model = build(row, contexts[-1])                        # one for all dtypes: weights are float32
        for name, context, micro, form in itertools.product(dtypes, contexts, micro_batch_sizes, forms[library]):
            with torch.device('meta'):                          # ours of these sizes: it knows what it costs
                flops = LanguageModel(config_of(row, context), seed=None).flops_per_token()
            row = row | {'dtype': name, 'context': context, 'micro_batch_size': micro, 'plain': form, 'seconds': {},
                         'tokens': {'update': tokens_in_update}, 'flops_per_token': flops,
                         'params_total': sum(p.numel() for p in model.parameters())}
            sides.append((row, training_turn(model, row)))
    return sides


def training_turn(model, row):
    update = update_of(model, row)
    if row['library'] != 'ours':
        row['experts_implementation'] = fastest_experts(
            model, partial(update, optimizer_of(model)), row['micro_batch_size'] * contexts[0])

    def turn():
        if row['library'] != 'ours':
            model.set_experts_implementation(row['experts_implementation'])
        opt = optimizer_of(model)       # with new moments: those of all sides at once would fill the memory
        # one that does not count: while others took their turns oneDNN forgot the products of this side, which a run would
        # have prepared once; on a GPU it makes the moments
        update(opt)
        return {'update': timed(lambda: update(opt))}
    return turn


def optimizer_of(model):
    """AdamW as train.py has it; the peer's parameters too are matrices that decay and vectors that don't."""
    return configure_optimizers(model, 1e-4)[0]


def update_of(model, row):
    """-> update(opt): a whole update as train.py does it; micro-batches forward and backward, clip, optimizer."""
    run, (balance, z) = torch.compile(model) if compile else model, LOSS_WEIGHTS[config['router']]
    x = tokens_of(tokens_in_update // row['context'], row['context'] + 1)
    micro = max(1, row['micro_batch_size'] * contexts[0] // row['context'])
    clip = clip_gradients if row['library'] == 'ours' else torch.nn.utils.clip_grad_norm_
    model.train()

    def update(opt):
        with torch.autocast(device.type, torch.bfloat16, enabled=row['dtype'] == 'bfloat16'):   # as in train.py
            for rows in x.split(micro):
                tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
                if row['library'] == 'ours':
                    o = run(tokens, targets)
                    loss = o.nll / targets.numel() + balance * o.balance_loss + z * o.z_loss
                else:
                    loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
                with torch.autocast(device.type, enabled=False):
                    (loss * (len(rows) / len(x))).backward()
        clip(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    return update


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


def training_cells(row, machine):
    """Adds the last figures to a row -> its cells in the table, {head: text}."""
    try:
        if memory_updates:
            rewrite(f'peak memory of {label(row)}')
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                row['peak_memory'] = pool.submit(peak_memory, row).result()
    except Exception as error:                                  # killed for it, say
        say(f'peak memory of {label(row)} is missing: {error}', file=sys.stderr)
    row['of_matrix_rate'] = (1e-9 * row['flops_per_token'] * row['update_tokens_per_second']['median']
                             / machine[f'gflops_{row["dtype"]}']['median'])
    return {'tokens/s': show(row['update_tokens_per_second']),
            'ms': show(spread([1e3 * s for s in row['seconds']['update']]), '.1f'),
            'MFLOPs/token': f'{row["flops_per_token"] / 1e6:.1f}', 'of matrix rate': f'{row["of_matrix_rate"]:.1%}',
            'peak GB': f'{row["peak_memory"]["peak_gb"]:.2f}' if 'peak_memory' in row else '-'}


TRAINING_NOTES = [
    f'An update is {tokens_in_update} random tokens: forward, loss, backward, clip, fused AdamW. In bfloat16 are the '
    'products, by autocast; weights, moments and gradients are float32.',
    "of matrix rate: model FLOPs (LanguageModel.flops_per_token) at the machine's own product in the same dtype.",
    'peak GB: of a process that does a few updates of one side alone; on a CPU with Python and all it loads.']


# ---------------------------------------------------------------------------------------------------------------------
# --task=decode

def decoding_sides():
    sides, size = [], prompts[-1] + new_tokens
    for attn, library, name in itertools.product(variants, libraries, dtypes):
        row, kind = {'variant': attn, 'library': library, 'dtype': name}, getattr(torch, name)
        model = build(row, size).eval()
        model = model.for_decoding(kind) if library == 'ours' else model.to(kind)
        latent = library == 'ours' and hasattr(model.layers[0].attn, 'decode_mode')
        modes = ['absorb', 'expand'] if latent else ['decode']
        for prompt, batch, mode, form in itertools.product(prompts, batch_sizes, modes, forms[library]):
            row = row | {'prompt': prompt, 'batch_size': batch, 'mode': mode, 'plain': form, 'seconds': {},
                         'tokens': {'prefill': batch * prompt, 'decode': batch * new_tokens}}
            sides.append((row, decoding_turn(model, tokens_of(batch, prompt + new_tokens), row)))
    return sides


@torch.no_grad()
def decoding_turn(model, tokens, row):
    """-> turn(): the prompt at once, in latent attention in the cheaper way, then the new tokens, in the row's mode.

    In transformers: a DynamicCache and one forward a token, no generate() around it.
    """
    (batch, size), prompt = tokens.shape, row['prompt']
    if row['library'] == 'ours':
        new_cache = lambda: model.new_cache(batch, size)
        step = lambda cache, start, end: model.decode(tokens[:, start:end], cache)
        bytes_of = Cache.bytes

        def choose(mode):
            for layer in model.layers:
                layer.attn.decode_mode = mode                   # means nothing to multi-head attention
    else:
        from transformers import DynamicCache
        new_cache = lambda: DynamicCache(config=model.config)
        step = lambda cache, start, end: model(input_ids=tokens[:, start:end], past_key_values=cache, use_cache=True,
                                               logits_to_keep=1)
        bytes_of = lambda cache: sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        choose = model.set_experts_implementation

    def one_by_one(cache, end=size):
        for i in range(prompt, end):
            step(cache, i, i + 1)

    def read_and_write(cache, end):
        choose(row.get('prefill_implementation', 'auto'))
        prefill = timed(lambda: step(cache, 0, prompt))
        choose(row.get('experts_implementation', row['mode']))
        return {'prefill': prefill, 'decode': timed(lambda: one_by_one(cache, end))}

    @torch.no_grad()
    def turn():
        read_and_write(new_cache(), prompt + 1)                 # does not count, as in training_turn
        seconds = read_and_write(cache := new_cache(), size)
        row['cache_bytes'] = bytes_of(cache)
        return seconds

    if row['library'] != 'ours':
        row['prefill_implementation'] = fastest_experts(model, lambda: step(new_cache(), 0, prompt), batch * prompt)
        step(cache := new_cache(), 0, prompt)
        row['experts_implementation'] = fastest_experts(model, lambda: one_by_one(cache, min(size, prompt + 8)), batch)
    return turn


def decoding_cells(row, machine):
    """Adds the last figures to a row -> its cells in the table, {head: text}."""
    row['cache_bytes_per_token'] = row['cache_bytes'] / (row['batch_size'] * (row['prompt'] + new_tokens))
    prefill = row['prefill_speed'].get('to its best')
    return {'prefill tokens/s': show(row['prefill_tokens_per_second']),
            **({'prefill to its best': show(prefill, '.2f')} if prefill else {}),
            'decode tokens/s': show(row['decode_tokens_per_second'], ',.1f'),
            'ms/token': show(spread([1e3 * s / new_tokens for s in row['seconds']['decode']]), '.2f'),
            'cache B/token': f'{row["cache_bytes_per_token"]:,.0f}', 'cache MB': f'{row["cache_bytes"] / 1e6:.2f}'}


DECODING_NOTES = [
    f'Random tokens: a prompt at once, then {new_tokens} one at a time. ms/token: one step of the whole batch.',
    'Cache: of prompt and new tokens, in the dtype of the row.',
    'Latent attention reads the prompt in the cheaper way, then decodes absorbed or expanded.']


# ---------------------------------------------------------------------------------------------------------------------
# Report

def show(s, form=',.0f'):
    return f'{s["median"]:{form}} ({s["min"]:{form}}-{s["max"]:{form}})'


def table(rows, cells):
    """Markdown: what tells the sides apart, then the cells of each row, {head: text}, in the order of the heads."""
    apart = [k for k in SIDE if k in SIDE[:3] or len({r.get(k) for r in rows}) > 1]
    heads = list(dict.fromkeys(head for own in cells for head in own))
    lines = [[*apart, *heads], ['---'] * len(apart + heads)]
    for row, own in zip(rows, cells):
        best = ', best' * ('best_update' in row or 'best_decode' in row)
        library = 'ours' if row['library'] == 'ours' else f'{peer} ({row["experts_implementation"]}){best}'
        lines.append([(row | {'library': library})[k] for k in apart] + [own.get(head, '-') for head in heads])
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def main():
    started, version, hint = now(), None, ''
    try:                                                        # what cannot be built is told before anything runs
        with torch.device('meta'):
            models = [LanguageModel(config_of({'variant': attn, 'experts': n}, contexts[0]), seed=None)
                      for attn in variants for n in experts]
        if peer != 'none':
            hint = f'; --peer=none goes without {peer}'
            import hf
            import transformers
            version = transformers.__version__
            for model in models:
                hf.write_config(model.config)
    except (ImportError, ValueError) as error:
        fail(f'{error}{hint}')
    sides = training_sides() if task == 'train' else decoding_sides()
    machine, rows = take_turns(sides)
    for measure in rows[0]['seconds']:                          # the last is the one that the table compares
        compare(rows, measure)
    cells_of, notes = (training_cells, TRAINING_NOTES) if task == 'train' else (decoding_cells, DECODING_NOTES)
    cells = [cells_of(row, machine) | {name: show(speed, '.2f') for name, speed in row[f'{measure}_speed'].items()}
             for row in rows]
    if peer != 'none':
        notes.append('transformers: the same networks with the same weights, without auxiliary losses; in brackets the '
                     'experts implementation, the fastest in a trial of that side. best: the faster of its dtypes.')
    env = environment(device) | {'transformers': version}
    own = ', '.join(f'{show(machine[f"gflops_{name}"], ",.1f")} GFLOP/s in {name}' for name in dtypes)
    text = (f'{table(rows, cells)}\n\n{env["device_name"]}, {env["threads"]} threads, torch {env["torch"]}'
            f'{", compiled" * compile}, {rounds} rounds; its own {matrix_size}^3 matrix product: {own}\n\n'
            + '\n'.join(f'- {note}' for note in notes) + '\n'
            + ''.join(parts_of(row, turn) for row, turn in sides if parts))
    content = {'schema': 3, 'task': task, 'started': started, 'finished': now(), 'config': config, 'environment': env,
               'notes': notes, 'machine': machine, 'rows': rows}
    for suffix, whole in {'.json': json.dumps(content, indent=1, allow_nan=False) + '\n', '.md': text}.items():
        write_atomically(path.with_suffix(suffix), lambda file: file.write(whole.encode()))
    say(f'{text}\n{path}')


if __name__ == '__main__':
    main()
