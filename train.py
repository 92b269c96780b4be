"""Train one model and write down what happened: python train.py [config/FILE.py] [--knob=value ...]

The defaults are Experiment 1: the report's model and budget (384 wide, 6 layers, 8 heads, 8 experts of 1536, top-2; 20
updates of 24 x 512 tokens) on the Python standard library's own source text. Change --attn and nothing else, and two
runs of one seed start from the same weights wherever they share a parameter, see the same batches, and differ in the
attention alone. The network's knobs are the fields of ModelConfig in model.py; --help shows them with those below.

A run writes its folder, out/<experiment>/<name>-s<seed>/:
    result.json      config, model, data, environment, history, final: read by analyze.py, described in the README
    checkpoint.pt    weights, optimizer, step, history: --resume=True goes on from here, sample.py reads it
    best.pt          the checkpoint with the smallest validation loss, if that is not the last one
Ctrl-C finishes the step, saves, and says how to go on. On several GPUs: torchrun --nproc_per_node=4 train.py ...
"""
from typing import Literal

from configurator import configure, fail, rewrite, run_knobs, say

if __name__ != '__main__':
    fail('train.py is a program: importing it would begin to train. For the network: from model import LanguageModel, '
         'ModelConfig; for a run: subprocess.run([sys.executable, "train.py", "--max_steps=20"])')
# ---------------------------------------------------------------------------------------------------------------------
# Run
seed = 0                        # initial weights and order of the data; runs of one seed form a pair
init_from = ''                  # weights to start from, with a fresh optimizer: a run's folder or a Hugging Face folder

# Data
dataset = 'stdlib'              # stdlib, a text file, a folder of them, or a folder with train.bin and val.bin; see data.py
text_field = 'text'             # of rows in .jsonl and .parquet: the field that holds a document's text
tokenizer = 'bpe'               # bpe (trained here), bytes, gpt2 or another tiktoken name (a download)
max_train_tokens = 500_000      # use the first so many training tokens; 0: all
max_val_tokens = 32_768         # the first so many validation tokens are the validation split; 0: all
data_root = ''                  # where token files are kept; empty: the folder data/ beside data.py

# Budget and optimizer
max_steps = 20                  # optimizer updates; a finished run is extended by --resume=True with a larger number
batch_size = 24                 # sequences in one update, over all micro-batches and processes
micro_batch_size: int | None = None     # sequences at once; changes memory and speed, the result only by rounding;
                                # none: 8 in bfloat16, else 4
learning_rate = 1e-3            # peak, the same for all variants unless their own was searched for
min_lr_ratio = 0.1              # the cosine ends at this fraction of the peak
warmup_steps = 2                # updates to reach the peak; the first one already moves
optimizer: Literal['adamw', 'muon'] = 'adamw'       # muon: orthogonalised updates for the matrices, adamw for the rest
beta1 = 0.9                     # adamw
beta2 = 0.95                    # adamw
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # largest norm of the whole gradient; 0: no clipping
balance_loss_weight: float | None = None    # of each layer's load-balancing loss; none: 0.01 for softmax, 0 for sigmoid
z_loss_weight: float | None = None          # of each layer's router z-loss; none: 0.001 for softmax, 0 for sigmoid
bias_update_rate = 0.001        # sigmoid: step of the selection bias after each update; hundreds of updates to settle

# Machine
device = 'auto'                 # auto: cuda, else mps, else cpu; or one of them by name (cuda:1, ...)
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the products; auto: bfloat16 if the processor computes in it
                                # (a CPU with AMX from a width of 128 on, with AVX512-BF16 256), else float32
compile: bool | None = None     # torch.compile; none: on GPUs
plain_kernels = False           # every computation of kernels.py in its plain form: slower; for double backward, for doubt
shard = False                   # several GPUs: split parameters and optimizer over them (FSDP2); otherwise copies (DDP)

# Folder and log
experiment = 'experiment1'      # runs that belong together
name = ''                       # of the arm, in tables and folder names; empty: the value of attn
out_dir = ''                    # empty: out/<experiment>/<name>-s<seed>
eval_interval = 10              # updates between evaluations of the whole validation split; one always comes last
checkpoint_interval = 0         # updates between checkpoints; 0: at evaluations
log_interval = 0                # updates between log lines; 0: at most 200, and one at each evaluation
tracker: Literal['', 'wandb', 'tensorboard'] = ''   # show the numbers there too; an installed package
resume: Literal['auto'] | bool = False  # go on from the checkpoint; auto: if there is one, and else start
overwrite = False               # throw away what the folder holds
# ---------------------------------------------------------------------------------------------------------------------
given = {}                      # what config files and flags set; asked: every knob
asked = configure(globals(), run_knobs()[0], given=given)       # before torch: a typo is answered at once

import os
import sys


def end(kind, error, trace):
    """What an exception leads to: a result that says that the run has ended, and one line where that is enough."""
    if kind is KeyboardInterrupt:                           # before there is anything to save
        os._exit(130)
    begun = 'result' in globals()
    if begun:
        write_result('interrupted', f'{kind.__name__}: {error}'.partition('\n')[0])
    if 'out_of_memory' in globals() and out_of_memory(error):
        fail(f'out of memory after step {step} at --micro_batch_size={micro_batch_size}; less changes no number (at 1, take '
             'a smaller model); to go on: '
             f'{command_to_go_on(overwrite, micro_batch_size=max(1, micro_batch_size // 2))}' if begun else
             'out of memory before the first step: take a smaller model')
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end                                        # now: the imports below take seconds

import hashlib
import math
import signal
import statistics
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.nn.parallel import DistributedDataParallel

import data
import kernels
import parallel
import tracker as trackers
from machine import PEAK_FLOPS, choose_compile, choose_device, choose_dtype, environment, now, out_of_memory, peak_memory_gb
from model import LanguageModel, ModelConfig
from moe import LOSS_WEIGHTS
from muon import clip_gradients, configure_optimizers
from parallel import rank, world_size
from result import SCHEMA, RunFolder, command_to_go_on, folder_of, read_weights

# ---------------------------------------------------------------------------------------------------------------------
# What was asked for, checked before anything slow or destructive

device = choose_device(device, index=parallel.local_rank if world_size > 1 else None)
for least, knobs in ((1, 'max_steps batch_size micro_batch_size'),
                     (0, 'seed learning_rate min_lr_ratio warmup_steps weight_decay grad_clip bias_update_rate '
                         'eval_interval checkpoint_interval log_interval max_train_tokens max_val_tokens')):
    for knob in knobs.split():
        if asked[knob] is not None and asked[knob] < least:
            fail(f'{knob} must be at least {least}, not {asked[knob]}')
if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
    fail(f'beta1 ({beta1}) and beta2 ({beta2}) must be at least 0 and below 1')
if resume and overwrite:
    fail('--resume=True goes on with what the folder holds, --overwrite=True throws it away; keep one of them')
if shard and (world_size == 1 or optimizer == 'muon'):
    fail('--shard=True needs several processes (torchrun) and --optimizer=adamw: muon needs whole matrices')
if batch_size % world_size:
    fail(f'batch_size ({batch_size}) must be a multiple of the number of processes ({world_size})')
trackers.check(tracker)
network, weights = {k: asked[k] for k in ModelConfig.__dataclass_fields__}, None
if init_from:
    network, weights, same_vocabulary, digest = read_weights(init_from, given)
name = name or network['attn']
folder = RunFolder(folder_of(out_dir, experiment, name, seed))
try:
    network = ModelConfig(**network)                        # tells of bad sizes now, and a class of attention of its knobs
    with torch.device('meta'):
        LanguageModel(network, seed=None)
    corpus = data.Corpus(data.prepare(dataset, tokenizer, asked['vocab_size'], data_root, say, text_field),
                         max_train_tokens, max_val_tokens, network.block_size)
except ValueError as error:
    fail(error)
if not init_from:
    network = replace(network, vocab_size=corpus.vocab_size)
elif corpus.vocab_size > network.vocab_size or not same_vocabulary(corpus.tokenizer):
    fail(f'{init_from} has another vocabulary ({network.vocab_size:,} tokens) than {dataset} in --tokenizer={tokenizer}'
         f' ({corpus.vocab_size:,} tokens)')
block_size, expert_layers = network.block_size, max(0, network.n_layer - network.n_dense_layer)

# ---------------------------------------------------------------------------------------------------------------------
# Machine, and `config`: what is used, every none and auto resolved

dtype = choose_dtype(dtype, device, network.n_embd)
micro_batch_size = micro_batch_size or (8 if dtype == 'bfloat16' else 4)        # measured: results/README.md, "Benchmarks"
kernels.use('plain' if plain_kernels else 'fast')
if device.type == 'cpu':
    kernels.keep_freed_memory()
if device.type == 'cuda' and dtype == 'float32':            # tf32; in bfloat16 runs the router's product stays exact
    torch.set_float32_matmul_precision('high')
compile = choose_compile(compile, device)
autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16')
exactly = torch.autocast(device.type, enabled=False)

balance_loss_weight = LOSS_WEIGHTS[network.router][0] if balance_loss_weight is None else balance_loss_weight
z_loss_weight = LOSS_WEIGHTS[network.router][1] if z_loss_weight is None else z_loss_weight
eval_interval = eval_interval or max_steps
checkpoint_interval = checkpoint_interval or eval_interval
log_interval = log_interval or math.ceil(max_steps / 200)
config = {**asked, **{knob: globals()[knob] for knob in asked.keys() - vars(network).keys()}, **vars(network),
          'device': device.type, 'out_dir': folder.path.as_posix(), 'tokenizer': corpus.tokenizer_name,
          'init_from': init_from and f'{Path(init_from).name} sha256:{digest}'}
described = corpus.describe()
checkpoint = folder.open(config, described, resume, overwrite, writer=rank == 0, mmap=shard)

# ---------------------------------------------------------------------------------------------------------------------
# Model and optimizer

if world_size > 1:
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
if shard:
    evaluator = model = raw_model = parallel.sharded(network, seed, device, dtype, compile)
else:
    raw_model = LanguageModel(network, seed).to(device)
    evaluator = torch.compile(raw_model) if compile else raw_model
    model = DistributedDataParallel(evaluator) if world_size > 1 else evaluator
optimizers = configure_optimizers(raw_model, learning_rate, weight_decay, (beta1, beta2), muon=optimizer == 'muon')

# Whole tensors on the CPU, by parameter name: any number of processes, sharded or not, reads what any other wrote
whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
if checkpoint:
    set_model_state_dict(raw_model, checkpoint['model'], options=whole)
    for opt, state in zip(optimizers, checkpoint['optimizer'], strict=True):
        set_optimizer_state_dict(raw_model, opt, state, options=whole)
elif init_from:
    set_model_state_dict(raw_model, weights, options=whole)


def learning_rate_at(step):
    """Of update `step`, from 0 on: linear up, never 0; then a cosine that ends at min_lr_ratio in the last update."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)     # 0 .. 1
    return learning_rate * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def tensors(x, y):
    """Two (B, T) arrays -> two tensors on the device, without waiting for the copy."""
    pair = torch.from_numpy(x), torch.from_numpy(y)
    return [t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else t.to(device) for t in pair]


def worst(load):
    """load (L, E), choices of each expert in each layer -> how far the busiest is above an even share; None if L 0."""
    return (load.max(1).values / load.mean(1) - 1).max().item() if len(load) else None


@torch.no_grad()
def evaluate():
    """The whole validation split, in fixed windows, shared out over the processes -> dict of val_* and balance figures.

    Sums over targets are added up in float64 and divided once, so the result is exact whatever the micro-batch. A last
    window that is not full is not padded: that would count in the routers' figures.
    """
    parts = corpus.val_windows(micro_batch_size)
    # nll, correct; balance, z, entropy times tokens; tokens; load of each expert in each layer
    sums = torch.zeros(6 + expert_layers * network.n_expert, dtype=torch.float64)
    model.eval()
    with autocast:
        for i in range(rank, math.ceil(len(parts) / world_size) * world_size, world_size):
            rewrite(f'validation: {i + 1} of {len(parts)}')
            # sharded processes must run the same number of forwards: one without a part of its own runs the first again
            xb, yb = tensors(*parts[i if i < len(parts) else 0])
            o = (evaluator if xb.size(1) == block_size else raw_model)(xb, yb)      # not compiled anew for the rest
            if i < len(parts):
                n = xb.numel()
                means = [n * value.item() for value in (o.balance_loss, o.z_loss, o.entropy.sum())]
                sums += torch.tensor([o.nll.item(), o.correct.item(), *means, n, *o.load.flatten().tolist()], dtype=sums.dtype)
    model.train()
    if world_size > 1:
        sums = sums.to(device)                              # what NCCL adds must lie on the GPU
        dist.all_reduce(sums)
        sums = sums.cpu()
    nll, correct, balance_loss, z_loss, entropy, tokens = sums[:6].tolist()         # a target for every token
    load = sums[6:].view(expert_layers, network.n_expert)
    loss, val_bytes = nll / tokens, described['val_bytes']
    return {'val_loss': loss, 'val_perplexity': math.exp(loss) if loss < 700 else math.inf,
            'val_accuracy': correct / tokens, 'val_bits_per_byte': nll / math.log(2) / val_bytes if val_bytes else None,
            'balance_loss': balance_loss / tokens, 'z_loss': z_loss / tokens,
            'router_entropy': entropy / tokens / expert_layers if expert_layers else None,
            'expert_load': (load / load.sum(1, keepdim=True)).tolist(), 'max_violation': worst(load)}


# ---------------------------------------------------------------------------------------------------------------------
# The result, read off the live objects

owned = [id(p) for opt in optimizers for group in opt.param_groups for p in group['params']]
if sorted(owned) != sorted(id(p) for p in raw_model.parameters()):
    raise RuntimeError('the parameters in the optimizer are not those of the model that would be reported')
attentions = [layer.attn for layer in raw_model.layers]
facts = {'initialisation': 'as init_from says' if init_from else
                           'N(0, 1/fan_in), embedding and router N(0, 0.02), o_proj and down_proj 0',
         'router_losses': 'mean over sequences, sum over layers',
         'attention_class': '/'.join(sorted({type(attention).__name__ for attention in attentions})),
         **attentions[0].head_dims(), **raw_model.parameter_counts(),
         'flops_per_token': raw_model.flops_per_token(),
         'kv_cache_bytes_per_token': raw_model.cache_bytes_per_token(getattr(torch, dtype)),
         'kv_cache_bytes_per_token_16bit': raw_model.cache_bytes_per_token(torch.bfloat16)}
so_far = checkpoint or {'started': now(), 'environments': [], 'history': [], 'final': None, 'step': 0, 'step_seconds': [],
                        'seconds_total': 0.0}
history, final, step, step_seconds, seconds_before = (                          # step: updates done
    so_far[k] for k in ('history', 'final', 'step', 'step_seconds', 'seconds_total'))
result = {'schema': SCHEMA, 'status': 'running', 'name': name, 'started': so_far['started'], 'finished': None,
          'config': config, 'model': facts, 'data': described,
          'environment': {**environment(device), 'world_size': world_size,
                          'source_sha256': {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
                                            for p in sorted(Path(__file__).resolve().parent.glob('*.py'))}}}
result['earlier_environments'] = [place for place in so_far.get('environments', []) if place != result['environment']]


def describe_end(figures):
    """The `final` part of the result, after an evaluation that found these figures."""
    seconds, tokens = sum(step_seconds), step * batch_size * block_size
    peak = PEAK_FLOPS.get(result['environment']['device_name']) if dtype == 'bfloat16' else None
    return {'step': step, 'updates': step, 'tokens': tokens, **figures, 'seconds_training': seconds,
            'seconds_total': seconds_before + time.perf_counter() - start,
            'step_ms_median': 1e3 * statistics.median(step_seconds), 'tokens_per_second': tokens / seconds,
            'mfu': tokens / seconds * facts['flops_per_token'] / (peak * world_size) if peak else None,
            'peak_memory_gb': peak_memory_gb(device),
            'peak_memory_kind': 'device' if device.type == 'cuda' else 'resident'}


def write_result(status, error=None):
    result.update(status=status, error=error, finished=now() if status != 'running' else None,
                  history=history, final=final)
    if rank == 0:
        folder.write_result(result)


def save_checkpoint():
    """All that going on needs. Batches are a function of (seed, step), nothing else is random: no generator states."""
    weights = get_model_state_dict(raw_model, options=whole)            # of all processes, where they hold parts
    moments = [get_optimizer_state_dict(raw_model, opt, options=whole) for opt in optimizers]
    if rank == 0:
        folder.write_checkpoint({
            'schema': SCHEMA, 'config': config, 'model_config': vars(network), 'data': described, 'model': weights,
            'optimizer': moments, 'step': step, 'history': history, 'final': final, 'step_seconds': step_seconds,
            'seconds_total': seconds_before + time.perf_counter() - start, 'started': result['started'],
            'environments': [*result['earlier_environments'], result['environment']],
            'tokenizer': corpus.tokenizer.state() if corpus.tokenizer else None})


def diverge(cause):
    """End the run with exit status 3. What was saved last is from before the trouble and is left alone."""
    write_result('diverged', cause)
    if rank == 0:
        say(f'diverged at {cause}; to try again: a smaller --learning_rate with --overwrite=True', sys.stderr)
    sys.exit(3)


# ---------------------------------------------------------------------------------------------------------------------
# What is about to happen

say(f'{name}, seed {seed}: {facts["attention_class"]}, {facts["params_total"] / 1e6:.1f}M parameters, '
    f'{facts["params_active"] / 1e6:.1f}M active per token, {facts["params_attention"] / 1e6:.2f}M in attention; '
    f'cache {facts["kv_cache_bytes_per_token"]:,} bytes a token in {dtype}')
times = max_steps * batch_size * block_size / described['train_tokens']
say(f'data: {described["dataset"]} in {described["vocab_size"]:,} tokens ({described["tokenizer"]}); '
    f'{described["train_tokens"]:,} for training, seen {times:.2f} times; {described["val_tokens"]:,} for validation')
say(f'a uniform guess costs {described["uniform_loss"]:.3f} nats a token, one by frequency {described["unigram_loss"]:.3f}')
say(f'{max_steps} updates of {batch_size} x {block_size} tokens on {result["environment"]["device_name"]}'
    f'{f" x {world_size}" if world_size > 1 else ""}, {dtype}{", compiled" if compile else ""} -> {folder.path}/')
if step:
    say(f'going on after step {step}')
if checkpoint and max_steps > checkpoint['config']['max_steps']:
    say(f'extended from {checkpoint["config"]["max_steps"]} updates: from here on the learning rate is that of a run '
        f'of {max_steps}, next {learning_rate_at(step):.2e}; analyze.py does not take it for one from the start')
del checkpoint, so_far, weights

model.train()
if compile:                                                 # now, so that no update's time contains it
    clock = time.perf_counter()
    rows = batch_size // world_size                         # of a batch, in this process
    for size in sorted({min(micro_batch_size, rows), rows % micro_batch_size or micro_batch_size}):
        with autocast:
            o = model(*tensors(*corpus.batch(seed, 0, size)))
        (o.nll + o.balance_loss + o.z_loss).backward()
    raw_model.zero_grad()
    say(f'compiled in {time.perf_counter() - clock:.0f} s')

stop = None                                                 # the signal that asked for an end, if one did


def ask_to_stop(number, frame):
    global stop
    stop = number
    signal.signal(number, signal.SIG_DFL)                   # a second one ends the process at once


signal.signal(signal.SIGINT, ask_to_stop)                   # what a script starts with & ignores it otherwise
signal.signal(signal.SIGTERM, ask_to_stop)
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:         # ignored under nohup
    signal.signal(signal.SIGHUP, ask_to_stop)               # the terminal was closed


def log_line(row, figures):
    bits = figures and figures['val_bits_per_byte']
    pace = (time.perf_counter() - start) / (step - first)
    line = (f'step {step}/{max_steps} | loss {row["train_loss"]:.4f} | lr {row["learning_rate"]:.2e} | '
            f'{batch_size * block_size / step_seconds[-1]:,.0f} tokens/s | '
            f'{timedelta(seconds=round((max_steps - step) * pace))} left')
    if figures:
        line += f' | val {figures["val_loss"]:.4f}{f" = {bits:.3f} bits/byte" if bits else ""}'
    if figures and expert_layers:
        line += (f' | busiest expert {1 + figures["max_violation"]:.2f} x even, '
                 f'router entropy {figures["router_entropy"]:.2f} of {math.log(network.n_expert):.2f}')
    return line


# ---------------------------------------------------------------------------------------------------------------------
# The loop

write_result('running')
track = trackers.Tracker(tracker if rank == 0 else '', folder.path, result)
mine = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)        # rows of every batch
start = time.perf_counter()
micro_batches = math.ceil(batch_size // world_size / micro_batch_size)
first = step                                                # of this process, for the time left

while step < max_steps:
    clock = time.perf_counter()
    lr = learning_rate_at(step)
    for group in (g for opt in optimizers for g in opt.param_groups):
        group['lr'] = lr

    # Gradients of the whole batch, one micro-batch at a time. Every loss is scaled by its share of the batch, so that
    # neither the micro-batch nor the number of processes enters.
    x, y = tensors(*(a[mine] for a in corpus.batch(seed, step, batch_size)))            # (rows, T) each
    losses = torch.zeros(3, device=device)                  # cross-entropy, balance, z: means over batch
    load = torch.zeros(expert_layers, network.n_expert, device=device)
    with autocast:                                          # one for all micro-batches: what it casts, it casts once
        for i in range(0, len(x), micro_batch_size):
            rewrite(f'step {step + 1}/{max_steps}: micro-batch {i // micro_batch_size + 1} of {micro_batches}')
            xb, yb = x[i:i + micro_batch_size], y[i:i + micro_batch_size]
            parallel.sync_gradients(model, i + micro_batch_size >= len(x))
            o = model(xb, yb)
            share = len(xb) / batch_size
            parts = torch.stack((o.nll / (batch_size * block_size), o.balance_loss * share, o.z_loss * share))
            loss = parts[0] + balance_loss_weight * parts[1] + z_loss_weight * parts[2]
            with exactly:
                (loss * world_size).backward()              # DDP averages gradients, here they are to be summed
            losses += parts.detach()
            load += o.load.view_as(load)

    grad_norm = clip_gradients(raw_model.parameters(), grad_clip or math.inf)
    grad_norm = grad_norm.full_tensor() if shard else grad_norm
    for opt in optimizers:
        opt.step()
    raw_model.zero_grad()
    stopping = torch.tensor([float(stop is not None)], device=device)
    total = torch.cat((losses, load.flatten(), stopping))
    if world_size > 1:
        dist.all_reduce(total)
    losses, load, stopping = total[:3], total[3:-1].view_as(load), total[-1:]
    if network.router == 'sigmoid':
        for layer, layer_load in zip(raw_model.layers[network.n_dense_layer:], load):
            layer.moe.update_bias(layer_load, bias_update_rate)
    train_loss, grad_norm, stopping = losses[0].item(), float(grad_norm), stopping.item() > 0   # waits for the device
    step += 1
    step_seconds.append(time.perf_counter() - clock)

    figures = None
    if not (math.isfinite(train_loss) and math.isfinite(grad_norm)):
        diverge(f'step {step}: training loss {train_loss:.4g}, gradient norm {grad_norm:.4g}')
    if step % eval_interval == 0 or step == max_steps:
        figures = evaluate()
        final = describe_end(figures)
        if not math.isfinite(figures['val_loss']):
            diverge(f'step {step}: validation loss {figures["val_loss"]}')
    if figures or step % log_interval == 0:
        history.append({'step': step, 'tokens': step * batch_size * block_size, 'seconds': sum(step_seconds),
                        'learning_rate': lr, 'train_loss': train_loss, 'val_loss': figures and figures['val_loss'],
                        'grad_norm': grad_norm,
                        'balance': {'balance_loss': losses[1].item(), 'z_loss': losses[2].item(),
                                    'max_violation': worst(load)}})
        track.log(history[-1], figures)
        say(log_line(history[-1], figures))

    if stopping or step == max_steps or step % checkpoint_interval == 0:
        save_checkpoint()
    if stopping and step < max_steps:
        write_result('interrupted')
        say(f'interrupted after step {step}; to go on: {command_to_go_on(overwrite)}')
        sys.exit(128 + (stop or signal.SIGTERM))
    if figures and step < max_steps:
        write_result('running')

write_result('complete')
track.finish(final)
say(f'validation loss {final["val_loss"]:.4f} after {final["tokens"]:,} tokens '
    f'in {final["seconds_training"]:.0f} s of updates; {folder.result}')
for remark in corpus.remarks:                               # what was asked of the data and not had
    say(remark)
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)         # gloo's threads once aborted the interpreter's own way out, and torchrun called the run failed
