"""Continue a prompt with a trained model: python sample.py out/laptop/enhanced-s0 --prompt="def " [--knob=value ...]

The prompt and what follows it go to stdout as they come, in whole characters, until the model ends the text or
--max_new_tokens are reached; a line on stderr then says how fast it went and how large the cache was. Of several
samples the first is shown as it comes, the others after it, each below a line of dashes. The same seed, the same text.

A model sees block_size tokens at most: of a longer prompt the last ones, and when the text outgrows the context, the
cache is built anew from the newest half of it. A token then sees between block_size / 2 and block_size tokens.
"""
from typing import Literal

from configurator import configure, fail

# ---------------------------------------------------------------------------------------------------------------------
# What is continued
run = ''                        # a run's folder, or a checkpoint file
prompt = ''                     # the text as it stands; FILE:path: the text of that file; -: standard input, to its end
                                # and with its last line end (printf, not echo); empty: the start of a new text

# How
max_new_tokens = 300            # at most
num_samples = 1                 # continuations of the one prompt, made side by side in one batch
temperature = 0.8               # below 1 likelier tokens gain, above they lose; 0: always the likeliest
top_k = 50                      # draw among so many of the likeliest tokens (of sampling, not the experts'); 0: all
seed = 0                        # of the draws

# Machine
mla_decode: Literal['auto', 'expand', 'absorb'] = 'auto'    # latent attention: make keys and values from the cache, or
                                # attend over the cached latents themselves; auto: the cheaper; equal but for rounding
device = 'auto'                 # auto: cuda, else mps, else cpu; or one of them by name (cuda:1, ...)
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'      # of weights and cache; auto: bfloat16 on GPUs that have it,
                                # else float32
compile: bool | None = None     # torch.compile, over a cache whose shape never changes; none: on GPUs
# ---------------------------------------------------------------------------------------------------------------------
configure(globals(), positional='run')      # before torch is imported, so that a typo is answered at once

import codecs
import itertools
import logging
import os
import signal
import sys
import time
import warnings

# ---------------------------------------------------------------------------------------------------------------------
# What was asked for, checked before anything slow

signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C before there is anything to report: just the end
sys.stdout.reconfigure(errors='replace')                    # a terminal that lacks a character shows ?
warnings.simplefilter('ignore')                             # torch's advice is not for the reader of the text

if not run:
    fail('which run? python sample.py out/EXPERIMENT/NAME-sSEED --prompt=TEXT (--help lists the knobs)')
path = os.path.join(run, 'checkpoint.pt') if os.path.isdir(run) else run
if not os.path.isfile(path):
    fail(f'{run} holds no checkpoint.pt' if path != run else f'{run}: no such run folder or checkpoint file')
if max_new_tokens < 1 or num_samples < 1:
    fail(f'max_new_tokens ({max_new_tokens}) and num_samples ({num_samples}) must be at least 1')
if temperature != 0 and not 0.001 <= temperature <= 1000:
    fail(f'temperature must be 0 or between 0.001 and 1000, not {temperature}')
if top_k < 0:
    fail(f'top_k must be at least 0 (all tokens), not {top_k}')

try:
    if prompt == '-' or prompt.startswith('FILE:'):
        with open(0 if prompt == '-' else prompt.removeprefix('FILE:'), 'rb') as file:
            prompt = file.read().decode('utf-8')
    prompt.encode('utf-8')                                  # on the command line, what is no text became surrogates
except OSError as error:
    fail(f'--prompt={prompt} cannot be read ({error.strerror})')
except ValueError as error:
    fail(f'the prompt is not UTF-8 text ({error.reason if isinstance(error, UnicodeError) else error})')

# ---------------------------------------------------------------------------------------------------------------------
# Machine and model

import torch

from attention import LatentAttention
from machine import choose_device, choose_dtype, load_whole
from model import LanguageModel, ModelConfig
from result import SCHEMA
from tokenizer import Tokenizer

device = choose_device(device)
dtype = choose_dtype(dtype, device)

try:
    checkpoint = load_whole(path)
except Exception as error:                                  # whatever a damaged or foreign file makes torch raise
    fail(f'{path} cannot be read ({type(error).__name__}): it is damaged, or no checkpoint of train.py')
if not isinstance(checkpoint, dict) or 'schema' not in checkpoint:
    fail(f'{path} is no checkpoint of train.py')
if checkpoint['schema'] != SCHEMA:
    fail(f'{path} has schema {checkpoint["schema"]}, this program reads {SCHEMA}')
try:
    if checkpoint['tokenizer'] is None:
        fail(f'{path} has no tokenizer, so there is no text: its run was given tokens of an unknown vocabulary; train it '
             'with --tokenizer=NAME')
    tokenizer = Tokenizer.from_state(checkpoint['tokenizer'])
    model = LanguageModel(ModelConfig(**checkpoint['model_config'])).eval().to(device).narrow(getattr(torch, dtype))
    model.load_state_dict(checkpoint['model'])
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(f'{tokenizer.vocab_size} tokens in the tokenizer, {model.config.vocab_size} in the model')
except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
    reason = str(error).partition('\n')[0]                  # the first of many lines
    fail(f'{path} is no sound checkpoint of train.py ({type(error).__name__}: {reason})')
del checkpoint

for layer in model.layers:
    if isinstance(layer.attn, LatentAttention):
        layer.attn.decode_mode = mla_decode
    elif mla_decode != 'auto':
        fail(f'--mla_decode={mla_decode} means nothing to {run}, whose attention is {type(layer.attn).__name__}')

ids = tokenizer.encode(prompt) or [tokenizer.eot]           # a text starts where another one ended
if ids == [None]:
    fail('an empty prompt starts from the end of text, which this tokenizer lacks; give a --prompt')
prompts = [ids[-model.config.block_size:]] * num_samples
options = {'max_new_tokens': max_new_tokens, 'temperature': temperature, 'top_k': top_k or None, 'seed': seed}

if compile or compile is None and device.type == 'cuda':
    compiled, clock = torch.compile(model.trunk), time.perf_counter()
    # prompts are read once and differ in length, so only the steps of one token are compiled
    fast = {'static': True, 'trunk': lambda x, *rest: (compiled if x.size(1) == 1 else model.trunk)(x, *rest)}
    try:
        logging.disable()                                   # one line will do
        list(itertools.islice(model.generate(prompts, **options, **fast), 2))
        options |= fast
        print(f'compiled in {time.perf_counter() - clock:.0f} s', file=sys.stderr)
    except Exception as error:                              # it needs a C++ compiler, and triton on a GPU
        print(f'torch.compile does not work here ({type(error).__name__}); going on without', file=sys.stderr)
    logging.disable(logging.NOTSET)

# ---------------------------------------------------------------------------------------------------------------------
# The text

stop = False


def ask_to_stop(number, frame):
    global stop
    stop = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)            # a second one ends the process at once


def show(text):
    """Write it, now. A reader that is gone (`| head`) ends the program quietly, a full disk with a line."""
    try:
        print(text, end='', flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # at exit the interpreter flushes once more
        if not isinstance(error, BrokenPipeError):
            fail(f'the text cannot be written ({error.strerror})')
        sys.exit()


signal.signal(signal.SIGINT, ask_to_stop)
texts, live, decoded = [[] for _ in prompts], range(num_samples), 0         # live: the samples that have not ended
decoder = codecs.getincrementaldecoder('utf-8')('replace')  # holds the bytes of a character until the last one is there
show(prompt)
start = time.perf_counter()
for step, new in enumerate(model.generate(prompts, **options)):             # new (num_samples,)
    if step == 0:
        first = time.perf_counter()                         # the prompt gave this token, from here on it is decoding
    else:
        decoded += len(live)
    new = new.tolist()
    live = [row for row in live if new[row] != tokenizer.eot]
    for row in live:
        texts[row].append(new[row])
    if 0 in live:
        show(decoder.decode(tokenizer.decode_bytes([new[0]])))
    if stop or not live:
        break
seconds = max(time.perf_counter() - first, 1e-9)
show(decoder.decode(b'', final=True) + '\n')
for text in texts[1:]:
    show(f'{"-" * 20}\n{prompt}{tokenizer.decode(text)}\n')

length, each = len(prompts[0]), model.cache_bytes_per_token(getattr(torch, dtype))
slots = min(model.config.block_size, length + max_new_tokens)               # what generate() allocates for each sample
print(f'prompt: {length:,} tokens in {first - start:.2f} s; '
      f'then {decoded:,} tokens, {decoded / seconds:,.1f} tokens/s; '
      f'cache: {num_samples * slots * each:,} bytes for {num_samples} x {slots:,} tokens, {each:,} bytes a token',
      file=sys.stderr)
sys.exit(130 if stop else 0)
