"""Train one model and write down what happened: python train.py [config/FILE.py] [--knob=value ...]

The defaults are Experiment 1: the report's model and budget (384 wide, 6 layers, 8 heads, 8 experts of 1536, top-2; 20
updates of 24 x 512 tokens) on the Python standard library's own source text. Change --attn and nothing else, and two
runs of one seed start from the same weights wherever they share a parameter, see the same batches, and differ in the
attention alone.

A run writes its folder, out/<experiment>/<name>-s<seed>/:
    result.json      config, model, data, environment, history, final: read by analyze.py, described in the README
    checkpoint.pt    weights, optimizer, step, history: --resume=True goes on from here, sample.py reads it
Ctrl-C finishes the step, saves, and says how to go on. On several GPUs: torchrun --nproc_per_node=4 train.py ...
"""
from typing import Literal

from configurator import configure, fail

# ---------------------------------------------------------------------------------------------------------------------
# What is compared
attn = 'baseline'               # attention variant: baseline, gqa, mqa, lora, enhanced, mla; attention.py explains each
seed = 0                        # initial weights and order of the data; runs of one seed form a pair

# Ingredients of the variant; none: as in the variant's row. One given by hand overrides the row
n_kv_head: int | None = None            # key/value heads (multi-head variants); must divide n_head
q_lora_rank: int | None = None          # rank of the query bottleneck (latent variants); 0: queries straight from x
kv_lora_rank: int | None = None         # rank of the latent that k and v are made from, the part of it that is cached
qk_nope_head_dim: int | None = None     # width of a head's content score
qk_rope_head_dim: int | None = None     # width of its rotary score, even; also the width of the one cached rotary key
v_head_dim: int | None = None           # width of a head's value
attention_bias: bool | None = None      # biases in attention (latent: on q_a_proj, kv_a_proj_with_mqa and o_proj only)
qk_norm: bool | None = None             # RMSNorm on each query and key head before the rotation (multi-head variants)
rope_scaling: Literal['default', 'linear', 'dynamic', 'yarn'] | None = None    # how rotary frequencies are stretched
rope_factor: float | None = None        # by how much, 1 (nothing) or more; needs rope_scaling

# Rotary positions, whatever the variant
rope_theta = 10000.0                    # base of the frequencies
rope_original_context: int | None = None    # context that dynamic and yarn stretch from; none: block_size
rope_beta_fast = 32.0                   # yarn: pairs that turn more often than this within that context stay
rope_beta_slow = 1.0                    # yarn: pairs that turn less often than this are stretched by the whole factor
rope_mscale = 1.0                       # yarn: temperature multiplier on cos and sin (DeepSeek's mscale)
rope_mscale_all_dim = 0.0               # yarn: temperature multiplier on whole scores; DeepSeek-V2/V3: as rope_mscale

# Model
n_layer = 6                     # blocks
n_head = 8                      # query heads
n_embd = 384                    # width
block_size = 512                # context in tokens
d_ff = 1536                     # hidden width of one expert
n_expert = 8                    # experts in each layer
top_k = 2                       # experts that each token visits (experts' choice)
n_shared_expert = 0             # experts that every token visits besides
router: Literal['softmax', 'sigmoid'] = 'softmax'   # sigmoid: DeepSeek-V3's, balanced by a bias instead of a loss
routed_scaling_factor = 1.0     # multiplies the routed experts' sum; DeepSeek-V3: 2.5 at top-8
balance_loss_weight: float | None = None    # of each layer's load-balancing loss; none: 0.01 for softmax, 0 for sigmoid
z_loss_weight: float | None = None          # of each layer's router z-loss; none: 0.001 for softmax, 0 for sigmoid
bias_update_rate = 0.001        # sigmoid: step of the selection bias after each update; hundreds of updates to settle

# Data
dataset = 'stdlib'              # stdlib, a text file, a folder of text files, or a folder with train.bin and val.bin
tokenizer = 'bpe'               # bpe (trained here), bytes, gpt2 or another tiktoken name (a download)
vocab_size = 4096               # tokens in the vocabulary that bpe trains
max_train_tokens = 500_000      # use the first so many training tokens; 0: all
max_val_tokens = 32_768         # the first so many validation tokens are the validation split; 0: all
data_root = ''                  # where token files are kept; empty: the folder data/ beside data.py

# Budget and optimizer
max_steps = 20                  # optimizer updates
batch_size = 24                 # sequences in one update, over all micro-batches and processes
micro_batch_size = 4            # sequences at once; changes memory and speed, the result only by rounding
learning_rate = 1e-3            # peak, the same for all variants; baseline's best of three, results/sweep-experiment1
min_lr_ratio = 0.1              # the cosine ends at this fraction of the peak
warmup_steps = 2                # updates to reach the peak; the first one already moves
optimizer: Literal['adamw', 'muon'] = 'adamw'       # muon: orthogonalised updates for the matrices, adamw for the rest
beta1 = 0.9                     # adamw
beta2 = 0.95                    # adamw
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # largest norm of the whole gradient; 0: no clipping

# Machine
device = 'auto'                 # auto: cuda, else mps, else cpu; or one of them by name (cuda:1, ...)
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the products; auto: bfloat16 on GPUs that have it,
                                # else float32
compile: bool | None = None     # torch.compile; none: on GPUs
shard = False                   # several GPUs: split parameters and optimizer over them (FSDP2); otherwise copies (DDP)

# Folder and log
experiment = 'experiment1'      # runs that belong together
name = ''                       # of the arm, in tables and folder names; empty: the value of attn
out_dir = ''                    # empty: out/<experiment>/<name>-s<seed>
eval_interval = 10              # updates between evaluations of the whole validation split; one always comes last
checkpoint_interval = 0         # updates between checkpoints; 0: at evaluations
log_interval = 0                # updates between log lines; 0: so that a run has at most 200
resume = False                  # go on from the checkpoint, if there is one
overwrite = False               # throw away what the folder holds
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())   # config files, then flags, over the block above; first: a typo is answered at once

import os
import sys


def end_quietly(kind, *rest):
    """Ctrl-C before there is anything to save ends the program at once, without a traceback."""
    if kind is KeyboardInterrupt:
        os._exit(130)
    sys.__excepthook__(kind, *rest)


sys.excepthook = end_quietly                                # now: the imports below take seconds

import hashlib
import json
import math
import shlex
import signal
import statistics
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import data
from machine import (choose_device, choose_dtype, environment, keep_freed_memory, load_whole, now, peak_memory_gb,
                     write_atomically)
from model import LanguageModel, ModelConfig
from moe import LOSS_WEIGHTS
from result import CONTINUATION, NAME_LENGTH, SCHEMA, STATUSES, json_ready

# Dense bfloat16 matrix rate in FLOP/s (vendors' data sheets), for mfu, by the whole name that the driver gives: an H100
# NVL or a MIG slice is no H100 SXM. Elsewhere, and in float32, mfu is null
PEAK_FLOPS = {'NVIDIA H200': 989e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA A100-SXM4-40GB': 312e12,
              'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA A100-PCIE-40GB': 312e12, 'NVIDIA A100 80GB PCIe': 312e12,
              'NVIDIA L40S': 362e12, 'NVIDIA L4': 121e12, 'NVIDIA GeForce RTX 4090': 165e12}


# ---------------------------------------------------------------------------------------------------------------------
# Machine: processes, device, dtype

rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))    # set by torchrun
local_rank = int(os.environ.get('LOCAL_RANK', 0))
main_process = rank == 0                                    # the one that prints and writes
say = print if main_process else lambda *args, **kwargs: None

device = choose_device(device, index=local_rank if world_size > 1 else None)
dtype = choose_dtype(dtype, device)
keep_freed_memory(device)
if device.type == 'cuda' and dtype == 'float32':            # tf32; in bfloat16 runs the router's product stays exact
    torch.set_float32_matmul_precision('high')
if compile is None:
    compile = device.type == 'cuda'
if compile:
    try:                                                    # it needs a C++ compiler, and triton on a GPU
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:
        reason = str(error).strip().partition('\n')[0]
        say(f'torch.compile does not work here ({type(error).__name__}: {reason}); going on without')
        compile = False
autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16')

# ---------------------------------------------------------------------------------------------------------------------
# What was asked for, checked before anything slow or destructive

for knob in ('max_steps', 'batch_size', 'micro_batch_size'):
    if config[knob] < 1:
        fail(f'{knob} must be at least 1, not {config[knob]}')
for knob in ('n_shared_expert', 'max_train_tokens', 'max_val_tokens', 'warmup_steps', 'eval_interval', 'seed',
             'checkpoint_interval', 'log_interval', 'min_lr_ratio', 'weight_decay', 'grad_clip', 'learning_rate',
             'bias_update_rate'):
    if config[knob] < 0:
        fail(f'{knob} must be at least 0, not {config[knob]}')
for knob in ('beta1', 'beta2'):
    if not 0 <= config[knob] < 1:
        fail(f'{knob} must be at least 0 and below 1, not {config[knob]}')
if resume and overwrite:
    fail('--resume=True goes on with what the folder holds, --overwrite=True throws it away; keep one of them')
if shard and (world_size == 1 or optimizer == 'muon'):
    fail('--shard=True needs several processes (torchrun) and --optimizer=adamw: muon needs whole matrices')
if batch_size % world_size:
    fail(f'batch_size ({batch_size}) must be a multiple of the number of processes ({world_size})')
balance_loss_weight = LOSS_WEIGHTS[router][0] if balance_loss_weight is None else balance_loss_weight
z_loss_weight = LOSS_WEIGHTS[router][1] if z_loss_weight is None else z_loss_weight
name = name or attn
if len(name) > NAME_LENGTH or not name.isprintable() or not name.strip():
    fail(f'--name={ascii(name)[1:-1]}: must be 1 to {NAME_LENGTH} printable characters, not all blank')
out = Path(out_dir or f'out/{experiment}/{name}-s{seed}')
eval_interval = eval_interval or max_steps
checkpoint_interval = checkpoint_interval or eval_interval
log_interval = log_interval or math.ceil(max_steps / 200)

try:
    model_config = ModelConfig(**{k: config[k] for k in ModelConfig.__dataclass_fields__ if k in config})     # tells of bad sizes
    folder = data.prepare(dataset, tokenizer, vocab_size, root=data_root, log=say)
    corpus = data.Corpus(folder, max_train_tokens, max_val_tokens, block_size)
    model_config = replace(model_config, vocab_size=corpus.vocab_size)
except ValueError as error:
    fail(error)

# `config` becomes what was used: the variant's row applied, every 'auto' resolved
config |= vars(model_config)
config |= {k: globals()[k] for k in ('dtype', 'compile', 'balance_loss_weight', 'z_loss_weight', 'name',
                                     'eval_interval', 'checkpoint_interval', 'log_interval')}
config |= {'device': device.type, 'out_dir': out.as_posix()}

# ---------------------------------------------------------------------------------------------------------------------
# The output folder: what is there already?

def differences(before):
    """'learning_rate: 0.001 there, 0.002 here, ...' between the config of a run on disk and this one's."""
    return ', '.join(f'{k}: {before.get(k, "absent")} there, {config.get(k, "absent")} here'
                     for k in sorted((config.keys() | before.keys()).difference(CONTINUATION))
                     if before.get(k) != config.get(k))


def read_result(path):
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        fail(f'{path} cannot be read ({error}); --overwrite=True replaces it')
    if not (isinstance(content, dict) and isinstance(content.get('config'), dict)
            and content.get('status') in STATUSES):
        fail(f'{path} is no result of this program; --overwrite=True replaces it')
    return content


result_path, checkpoint_path = out / 'result.json', out / 'checkpoint.pt'
checkpoint = None
if result_path.exists() and not overwrite:
    before = read_result(result_path)
    different = differences(before['config'])
    if different:
        fail(f'{out} holds a run of another config ({different}); '
             '--overwrite=True replaces it, --out_dir=... goes elsewhere')
    if before['status'] == 'complete':
        if not resume:
            fail(f'{out} holds a finished run; --overwrite=True runs it again, --out_dir=... goes elsewhere')
        say(f'{out} is complete already')
        sys.exit(0)
    if before['status'] == 'diverged':
        say(f'{out} diverged ({before.get("error")}); --overwrite=True runs it again')
        sys.exit(3)
    if not resume:
        fail(f'{out} holds an unfinished run; --resume=True goes on with it, --overwrite=True starts again')

if resume and checkpoint_path.exists():
    try:
        checkpoint = load_whole(checkpoint_path)
        if checkpoint['schema'] != SCHEMA:
            fail(f'{checkpoint_path} has schema {checkpoint["schema"]}, this program reads {SCHEMA}; '
                 '--overwrite=True starts again')
        different = differences(checkpoint['config'])
    except Exception as error:                              # whatever a damaged archive makes torch raise
        fail(f'{checkpoint_path} cannot be read ({type(error).__name__}); --overwrite=True starts again')
    if different:
        fail(f'{checkpoint_path} belongs to another config ({different}); --overwrite=True starts again')

lock = None
if main_process:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / '.lock', 'w')
        try:
            import fcntl                                    # not on Windows, where nothing guards the folder
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # the system lets go of it when this process ends
        except ImportError:
            pass
        if overwrite:
            checkpoint_path.unlink(missing_ok=True)         # or --resume=True would find the one of before
    except BlockingIOError:
        fail(f'another process is writing to {out}; wait for it, or go elsewhere with --out_dir=...')
    except OSError as error:
        fail(f'{out} cannot be written to ({error.strerror}); go elsewhere with --out_dir=...')

# ---------------------------------------------------------------------------------------------------------------------
# Model and optimizer

if world_size > 1:
    # a process that dies takes the others with it: they give up waiting for it after a minute
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(seconds=60))

raw_model = LanguageModel(model_config, seed)
if shard:       # FSDP2: each block's parameters are gathered when it runs, so that the whole never lies on one GPU
    for layer in raw_model.layers:
        if compile:
            layer.compile()
        fully_shard(layer, mesh=init_device_mesh(device.type, (world_size,)))
    model = fully_shard(raw_model, mesh=init_device_mesh(device.type, (world_size,)))
    raw_model.to(device)                                    # what is not a parameter: the routers' selection bias
else:
    raw_model.to(device)
    model = torch.compile(raw_model) if compile else raw_model
    if world_size > 1:
        model = DistributedDataParallel(model, device_ids=[local_rank] if device.type == 'cuda' else None)

optimizers = raw_model.configure_optimizers(learning_rate, weight_decay, (beta1, beta2), muon=optimizer == 'muon')

# Whole tensors on the CPU, by parameter name: any number of processes, sharded or not, reads what any other wrote
whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
if checkpoint:
    try:
        set_model_state_dict(raw_model, checkpoint['model'], options=whole)
        # none in a finished run's checkpoint: killed between it and the result's last word, only that word is missing
        for opt, state in zip(optimizers, checkpoint['optimizer'], strict=True) if checkpoint['optimizer'] else ():
            set_optimizer_state_dict(raw_model, opt, state, options=whole)
    except Exception as error:
        fail(f'{checkpoint_path} does not fit this model ({type(error).__name__}); --overwrite=True starts again')


def learning_rate_at(step):
    """Of update `step`, from 0 on: linear up, never 0; then a cosine that ends at min_lr_ratio in the last update."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)     # 0 .. 1
    return learning_rate * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


# ---------------------------------------------------------------------------------------------------------------------
# The result, read off the live objects

def describe_model():
    """The `model` part of the result. RuntimeError unless the optimizer moves exactly the model that is described."""
    owned = [id(p) for opt in optimizers for group in opt.param_groups for p in group['params']]
    if len(owned) != len(set(owned)) or set(owned) != {id(p) for p in raw_model.parameters()}:
        raise RuntimeError('the parameters in the optimizer are not those of the model that would be reported')
    classes = {type(layer.attn).__name__ for layer in raw_model.layers}
    return {'initialisation': 'N(0, 1/fan_in), embedding and router N(0, 0.02), o_proj and down_proj 0',
            'router_losses': 'mean over sequences, sum over layers', 'attention_class': '/'.join(sorted(classes)), **raw_model.layers[0].attn.head_dims(),
            **raw_model.parameter_counts(), 'flops_per_token': raw_model.flops_per_token(),
            'kv_cache_bytes_per_token': raw_model.cache_bytes_per_token(getattr(torch, dtype)),
            'kv_cache_bytes_per_token_16bit': raw_model.cache_bytes_per_token(torch.bfloat16)}


def describe_environment():
    here = Path(__file__).resolve().parent
    sources = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(here.glob('*.py'))}
    return {'device_name': None, 'world_size': world_size, **environment(device), 'source_sha256': sources}


def write_result(status, error=None):
    result.update(status=status, error=error, finished=now() if status != 'running' else None,
                  history=history, final=final)
    if main_process:
        text = json.dumps(json_ready(result), indent=1, allow_nan=False) + '\n'
        write_atomically(result_path, lambda file: file.write(text.encode()))


def diverge(cause):
    """End the run with exit status 3. What was saved last is from before the trouble and is left alone."""
    write_result('diverged', cause)
    saved = 'the last checkpoint still stands' if checkpoint_path.exists() else 'no checkpoint was written yet'
    say(f'diverged at {cause}; {saved}; to try again: a smaller --learning_rate with --overwrite=True', file=sys.stderr)
    sys.exit(3)


def save_checkpoint(finished=False):
    """All that going on needs. Batches are a function of (seed, step), nothing else is random: no generator states."""
    weights = get_model_state_dict(raw_model, options=whole)            # of all processes, where they hold parts
    moments = None if finished else [get_optimizer_state_dict(raw_model, opt, options=whole) for opt in optimizers]
    if main_process:
        content = {'schema': SCHEMA, 'config': config, 'model_config': vars(model_config), 'model': weights,
                   'optimizer': moments, 'step': step, 'history': history, 'final': final,
                   'step_seconds': step_seconds, 'seconds_total': seconds_before + time.perf_counter() - start,
                   'started': result['started'], 'tokenizer': corpus.tokenizer.state() if corpus.tokenizer else None}
        write_atomically(checkpoint_path, lambda file: torch.save(content, file))


result = {'schema': SCHEMA, 'status': 'running', 'name': name,
          'started': checkpoint['started'] if checkpoint else now(), 'finished': None,
          'config': config, 'model': describe_model(), 'data': corpus.describe(),
          'environment': describe_environment()}
history = checkpoint['history'] if checkpoint else []
final = checkpoint['final'] if checkpoint else None
step = checkpoint['step'] if checkpoint else 0              # updates done
step_seconds = checkpoint['step_seconds'] if checkpoint else []
seconds_before = checkpoint['seconds_total'] if checkpoint else 0.0
del checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def tensors(x, y):
    """Two (B, T) arrays -> two tensors on the device, without waiting for the copy."""
    pair = torch.from_numpy(x), torch.from_numpy(y)
    return [t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else t.to(device) for t in pair]


@torch.no_grad()
def evaluate():
    """The whole validation split, in fixed windows, shared out over the processes -> dict of val_* and balance figures.

    Sums over targets are added up in float64 and divided once, so the result is exact whatever the micro-batch.
    """
    model.eval()
    x, y = corpus.val_windows()                             # (windows, T), targets -1 where the last window is padded
    sums = np.zeros(6)                                      # nll, correct, balance, z, entropy (by window), windows
    load = torch.zeros(model_config.n_layer, model_config.n_expert, dtype=torch.float64)
    evaluator = raw_model if isinstance(model, DistributedDataParallel) else model      # no gradients to average here
    for i in range(0, len(x), world_size * micro_batch_size):
        i += rank * micro_batch_size
        # sharded processes must run the same number of forwards: one without windows of its own runs the first again
        xb, yb = tensors(*(a[i:i + micro_batch_size] if i < len(x) else a[:1] for a in (x, y)))
        with autocast:
            o = evaluator(xb, yb)
        if i < len(x):
            n = len(xb)
            sums += [o.nll.item(), o.correct.item(),
                     o.balance_loss.item() * n, o.z_loss.item() * n, o.entropy.mean().item() * n, n]
            load += o.load.cpu().double()                   # in this order: MPS has no float64
    if world_size > 1:
        sums, load = add_up(torch.from_numpy(sums)).numpy(), add_up(load)
    model.train()
    (nll, correct, balance_loss, z_loss, entropy, windows), targets = sums.tolist(), int((y >= 0).sum())
    fractions = load / load.sum(1, keepdim=True)            # (n_layer, E)
    val_bytes = result['data']['val_bytes']
    return {'val_loss': nll / targets, 'val_perplexity': math.exp(nll / targets) if nll / targets < 700 else math.inf,
            'val_accuracy': correct / targets,
            'val_bits_per_byte': nll / math.log(2) / val_bytes if val_bytes else None,
            'balance_loss': balance_loss / windows, 'z_loss': z_loss / windows, 'router_entropy': entropy / windows,
            'expert_load': fractions.tolist(),
            'max_violation': (fractions.max() * model_config.n_expert - 1).item()}


def add_up(tensor):
    """Sum over the processes; what NCCL adds must lie on the GPU."""
    tensor = tensor.to(device) if device.type == 'cuda' else tensor
    dist.all_reduce(tensor)
    return tensor.cpu()


# ---------------------------------------------------------------------------------------------------------------------
# What is about to happen

network, text = result['model'], result['data']
say(f'{name}, seed {seed}: {network["attention_class"]}, {network["params_total"] / 1e6:.1f}M parameters, '
    f'{network["params_active"] / 1e6:.1f}M active per token, {network["params_attention"] / 1e6:.2f}M in attention; '
    f'cache {network["kv_cache_bytes_per_token"]:,} bytes a token in {dtype}')
say(f'data: {text["dataset"]} in {text["vocab_size"]:,} tokens ({text["tokenizer"]}); '
    f'{text["train_tokens"]:,} for training, '
    f'seen {max_steps * batch_size * block_size / text["train_tokens"]:.2f} times; '
    f'{text["val_tokens"]:,} for validation')
say(f'a uniform guess costs {text["uniform_loss"]:.3f} nats a token, one by frequency {text["unigram_loss"]:.3f}')
say(f'{max_steps} updates of {batch_size} x {block_size} tokens on {result["environment"]["device_name"]}'
    f'{f" x {world_size}" if world_size > 1 else ""}, {dtype}{", compiled" if compile else ""} -> {out}/')
if step:
    say(f'going on after step {step}')


# ---------------------------------------------------------------------------------------------------------------------
# Compilation, and what a signal does

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


def command_to_go_on():
    """The command line of this run with --resume=True for --resume and --overwrite, ready to be pasted into a shell."""
    arguments = [a for a in sys.argv if not a.startswith(('--resume=', '--overwrite='))] + ['--resume=True']
    if overwrite and '--overwrite=True' not in sys.argv:
        arguments.append('--overwrite=False')               # a config file asks for it
    launcher = [sys.orig_argv[0]]
    if world_size > 1:
        launcher = ['torchrun', f'--nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE", world_size)}']
    several = int(os.environ.get('GROUP_WORLD_SIZE', 1)) > 1
    where = " on each machine, with torchrun's --nnodes, --node_rank and --master_... as before" * several
    return shlex.join(launcher + arguments) + where


signal.signal(signal.SIGINT, ask_to_stop)
signal.signal(signal.SIGTERM, ask_to_stop)

# ---------------------------------------------------------------------------------------------------------------------
# The loop

if not step:
    write_result('running')
# the rows of every batch that this process takes
mine = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
start = time.perf_counter()
first, first_done = step, start                                         # for the time left; moved past the first update

while step < max_steps:
    clock = time.perf_counter()
    lr = learning_rate_at(step)
    for group in (g for opt in optimizers for g in opt.param_groups):
        group['lr'] = lr

    # Gradients of the whole batch, one micro-batch at a time. Every loss is scaled by its share of the batch, so that
    # neither the micro-batch nor the number of processes enters.
    x, y = tensors(*(a[mine] for a in corpus.batch(seed, step, batch_size)))            # (rows, T) each
    losses = torch.zeros(3, device=device)                              # cross-entropy, balance, z: means over batch
    load = torch.zeros(model_config.n_layer, model_config.n_expert, device=device)
    for i in range(0, len(x), micro_batch_size):
        xb, yb = x[i:i + micro_batch_size], y[i:i + micro_batch_size]
        if world_size > 1:                                  # gradients travel once, with the last micro-batch
            last = i + micro_batch_size >= len(x)
            if shard:
                model.set_requires_gradient_sync(last)
            else:
                model.require_backward_grad_sync = last
        with autocast:
            o = model(xb, yb)
        share = len(xb) / batch_size
        parts = torch.stack((o.nll / (batch_size * block_size), o.balance_loss * share, o.z_loss * share))
        loss = parts[0] + balance_loss_weight * parts[1] + z_loss_weight * parts[2]
        if world_size > 1:                                  # DDP averages gradients, here they are to be summed
            loss = loss * world_size
        loss.backward()
        losses += parts.detach()
        load += o.load

    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    grad_norm = grad_norm.full_tensor() if shard else grad_norm
    for opt in optimizers:
        opt.step()
    raw_model.zero_grad()
    stopping = torch.tensor([float(stop is not None)], device=device)
    if world_size > 1:
        total = torch.cat((losses, load.flatten(), stopping))
        dist.all_reduce(total)
        losses, load, stopping = total[:3], total[3:-1].view_as(load), total[-1:]
    if router == 'sigmoid':
        for layer, layer_load in zip(raw_model.layers, load):
            layer.moe.update_bias(layer_load, bias_update_rate)
    train_loss, grad_norm, stopping = losses[0].item(), float(grad_norm), stopping.item() > 0   # waits for the device
    step += 1
    step_seconds.append(time.perf_counter() - clock)

    if not (math.isfinite(train_loss) and math.isfinite(grad_norm)):
        diverge(f'step {step}: training loss {train_loss:.4g}, gradient norm {grad_norm:.4g}')

    evaluated = None
    if step % eval_interval == 0 or step == max_steps:
        evaluated = evaluate()
        tokens = step * batch_size * block_size
        rate = tokens / sum(step_seconds)
        peak = PEAK_FLOPS.get(result['environment']['device_name']) if dtype == 'bfloat16' else None
        final = {'step': step, 'updates': step, 'tokens': tokens, **evaluated, 'seconds_training': sum(step_seconds),
                 'seconds_total': seconds_before + time.perf_counter() - start,
                 'step_ms_median': 1e3 * statistics.median(step_seconds), 'tokens_per_second': rate,
                 'mfu': rate * network['flops_per_token'] / (peak * world_size) if peak else None,
                 'peak_memory_gb': peak_memory_gb(device),
                 'peak_memory_kind': 'device' if device.type == 'cuda' else 'resident'}
        if not math.isfinite(evaluated['val_loss']):
            diverge(f'step {step}: validation loss {evaluated["val_loss"]}')

    if evaluated or step % log_interval == 0:
        record = {'step': step, 'tokens': step * batch_size * block_size, 'seconds': sum(step_seconds),
                  'learning_rate': lr, 'train_loss': train_loss,
                  'val_loss': evaluated['val_loss'] if evaluated else None, 'grad_norm': grad_norm,
                  'balance': {'balance_loss': losses[1].item(), 'z_loss': losses[2].item(),
                              'max_violation': (load.max(1).values / load.mean(1) - 1).max().item()}}
        history.append(record)
        pace = (time.perf_counter() - first_done) / (step - first) if step > first else step_seconds[-1]
        left = timedelta(seconds=round((max_steps - step) * pace))
        line = (f'step {step}/{max_steps} | loss {train_loss:.4f} | lr {lr:.2e} | '
                f'{batch_size * block_size / step_seconds[-1]:,.0f} tokens/s | {left} left')
        if evaluated:
            bits = evaluated['val_bits_per_byte']
            line += (f' | val {evaluated["val_loss"]:.4f}{f" = {bits:.3f} bits/byte" if bits else ""} | '
                     f'busiest expert {1 + evaluated["max_violation"]:.2f} x even, '
                     f'router entropy {evaluated["router_entropy"]:.2f} of {math.log(n_expert):.2f}')
        say(line, flush=True)
    if step - first == 1 and len(step_seconds) == 1:
        first, first_done = step, time.perf_counter()

    if step == max_steps:
        break
    if stopping or step % checkpoint_interval == 0:
        save_checkpoint()
    if stopping:
        write_result('interrupted')
        say(f'interrupted after step {step}; to go on: {command_to_go_on()}')
        sys.exit(128 + (stop or signal.SIGTERM))
    if evaluated:
        write_result('running')

save_checkpoint(finished=True)
write_result('complete')
say(f'validation loss {final["val_loss"]:.4f} after {final["tokens"]:,} tokens '
    f'in {final["seconds_training"]:.0f} s of updates; {result_path}')
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)         # gloo's threads once aborted the interpreter's own way out, and torchrun called the run failed
