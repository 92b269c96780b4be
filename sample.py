"""Continue a prompt with a trained model: python sample.py out/laptop/enhanced-s0 --prompt="def " [--knob=value ...]

A prompt and what follows it go to stdout as they come, in whole characters, until the model ends the text, the text of
--stop comes or --max_new_tokens are reached; a line on stderr then says how fast it went and how large the cache was.
Of several samples the first is shown as it comes, the others after it, each below a line of dashes; of several prompts
one after the other. The same seed gives a prompt the same text, whatever other prompts there are.

A model sees block_size tokens at most: of a longer prompt the last ones, and when the text outgrows the context, the
cache is built anew from the newest half of it. A token then sees between block_size / 2 and block_size tokens.
"""
from typing import Literal

from configurator import configure, fail, say

# ---------------------------------------------------------------------------------------------------------------------
# What is continued
run = ''                        # a run's folder, a checkpoint file, or a folder of Hugging Face's (config.json and
                                # safetensors)
checkpoint: Literal['last', 'best'] = 'last'    # of a run's folder; best: that of the lowest validation loss
prompt = ''                     # the text as it stands; FILE:path: the text of that file; LINES:path: each of its lines
                                # is a prompt, but for blank ones; the path -: standard input, to its end. A FILE keeps
                                # its last line end (printf, not echo). Empty: the start of a new text

# How
max_new_tokens = 300            # at most
num_samples = 1                 # continuations of each prompt, made side by side in one batch
stop = ''                       # a text that ends the continuation and is not shown; in bash a line end is $'\n'
temperature = 0.8               # below 1 likelier tokens gain, above they lose; 0: always the likeliest
top_k = 50                      # draw among so many of the likeliest tokens (of sampling, not the experts'); 0: all
top_p = 1.0                     # and among the fewest likeliest whose probabilities sum to this; 1: all
seed = 0                        # of the draws

# Machine
mla_decode: Literal['auto', 'expand', 'absorb'] = 'auto'    # latent attention: make keys and values from the cache, or
                                # attend over the cached latents themselves; auto: the cheaper; equal but for rounding
device = 'auto'                 # auto: cuda, else mps, else cpu; or one of them by name (cuda:1, ...)
dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'      # of weights and cache; auto: bfloat16 on a GPU that computes
                                # in it, else float32
compile: bool | None = None     # torch.compile, once for each size of cache (prompt and new tokens); none: on GPUs
# ---------------------------------------------------------------------------------------------------------------------
configure(globals(), positional='run')      # before torch is imported, so that a typo is answered at once

import codecs
import itertools
import os
import signal
import sys
import time
import warnings
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# What was asked for, checked before anything slow

signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C before there is anything to report: just the end
warnings.simplefilter('ignore')                             # torch's advice is not for the reader of the text

if not run:
    fail('which run? python sample.py out/EXPERIMENT/NAME-sSEED --prompt=TEXT (--help lists the knobs)')
path = Path(os.path.expanduser(run))
published = os.path.isfile(path / 'config.json')            # a folder of Hugging Face's
if os.path.isdir(path) and not published:
    # without a best.pt the last checkpoint is the best
    path /= 'best.pt' if checkpoint == 'best' and os.path.exists(path / 'best.pt') else 'checkpoint.pt'
if not os.path.exists(path):
    runs = [file.parent for file in sorted(path.parent.glob('*/checkpoint.pt'))]        # of an experiment's folder
    fail(f'{path} is not there: no such run folder, or nothing was saved in it yet'
         + (f'; did you mean {runs[0]}?' if runs else ''))
if max_new_tokens < 1 or num_samples < 1:
    fail(f'max_new_tokens ({max_new_tokens}) and num_samples ({num_samples}) must be at least 1')
if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
    fail(f'temperature ({temperature}) and top_k ({top_k}) must be at least 0, top_p ({top_p}) above 0 and at most 1')

prompts = [prompt]
try:
    if prompt == '-' or prompt.startswith(('FILE:', 'LINES:')):
        kind, _, source = prompt.rpartition(':') if prompt == '-' else prompt.partition(':')
        text = sys.stdin.buffer.read() if source == '-' else Path(os.path.expanduser(source)).read_bytes()
        text = text.decode('utf-16' if text[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else 'utf-8-sig')
        lines = text.replace('\r\n', '\n').split('\n')
        prompts = [line for line in lines if line.strip()] if kind == 'LINES' else [text]
    ''.join([*prompts, stop]).encode('utf-8')               # on the command line, what is no text became surrogates
except OSError as error:
    fail(f'--prompt={prompt} cannot be read ({error.strerror})')
except UnicodeError as error:
    fail(f'the prompt or --stop is not UTF-8 text ({error.reason})')
if not prompts:
    fail(f'--prompt={prompt}: every line of it is blank')

# ---------------------------------------------------------------------------------------------------------------------
# Machine and model

import torch

import hf
from attention import LatentAttention
from decoding import generate
from machine import choose_compile, choose_device, choose_dtype, out_of_memory
from result import read_checkpoint
from tokenizer import fetch_tokenizer


def end(kind, error, trace):
    if out_of_memory(error):
        fail(f'out of memory at {num_samples:,} samples of up to {max_new_tokens:,} tokens; ask for fewer')
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end
device = choose_device(device)
try:
    if published:
        model, tokenizer = hf.from_folder(path, device=device), hf.FolderTokenizer(path)
    else:
        model, tokenizer = hf.from_run(path)
    if tokenizer is None:
        name = read_checkpoint(path)['config']['tokenizer']
        if name in ('bpe', 'unknown'):
            raise ValueError(f'{path} has no tokenizer, so there is no text: its run was given tokens of an unknown '
                             'vocabulary; train it with --tokenizer=NAME')
        tokenizer = fetch_tokenizer(name, lambda line: None)            # out of reach in training, maybe not by now
    if tokenizer.vocab_size > model.config.vocab_size:      # fewer is fine: published models have spare ids
        raise ValueError(f'{path} has {model.config.vocab_size:,} tokens, its tokenizer {tokenizer.vocab_size:,}')
except ValueError as error:
    fail(error)
ends = getattr(tokenizer, 'ends', {tokenizer.eot})

if dtype == 'auto' and device.type == 'cpu':
    dtype = 'float32'                                       # bfloat16 is no faster, unless expanded (results/bench/decode.md)
dtype = getattr(torch, choose_dtype(dtype, device, model.config.n_embd))
model = model.eval().to(device).for_decoding(dtype)
block_size = model.config.block_size
for layer in model.layers:
    if isinstance(layer.attn, LatentAttention):
        layer.attn.decode_mode = mla_decode
    elif mla_decode != 'auto':
        fail(f'--mla_decode={mla_decode} means nothing to {run}, whose attention is {type(layer.attn).__name__}')

encoded = []
for number, prompt in enumerate(prompts, 1):
    try:                                                    # a new text starts where another one ended, or a line did
        ids = tokenizer.encode(prompt) or (tokenizer.encode('\n') if tokenizer.eot is None else [tokenizer.eot])
    except ValueError as error:                             # a vocabulary of characters may lack one
        fail(f'prompt {number}: {error}')
    if not ids:
        fail(f'prompt {number} has no token in this vocabulary; give another --prompt')
    if len(ids) > block_size:
        say(f'prompt {number} has {len(ids):,} tokens; the model sees the last {block_size:,}', sys.stderr)
    encoded.append(ids[-block_size:])
options = {'max_new_tokens': max_new_tokens, 'temperature': temperature, 'top_k': top_k or None,
           'top_p': top_p if top_p < 1 else None, 'seed': seed}

if choose_compile(compile, device, sys.stderr):
    options['compiled'], clock = torch.compile(model.trunk), time.perf_counter()
    list(itertools.islice(generate(model, encoded[:1] * num_samples, **options), 2))
    say(f'compiled in {time.perf_counter() - clock:.0f} s', sys.stderr)

# ---------------------------------------------------------------------------------------------------------------------
# The text


def ask_to_stop(number, frame):
    global interrupted
    interrupted = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)            # a second one ends the process at once


def unsure(text):
    """How many characters at the end of it may change: an unfinished one, or the beginning of `stop`."""
    whole = text.rstrip('\ufffd')
    return len(text) - len(whole) + next(n for n in range(len(stop), -1, -1) if whole.endswith(stop[:n]))


interrupted, dashes = False, '-' * 20 + '\n'
signal.signal(signal.SIGINT, ask_to_stop)
read = reading = decoded = decoding = 0                     # tokens and seconds, of all prompts
try:
    for number, (prompt, ids) in enumerate(zip(prompts, encoded)):
        print(dashes * (number > 0) + prompt, end='', flush=True)
        rows, texts, shown, clock = [[] for _ in range(num_samples)], [''] * num_samples, 0, time.perf_counter()
        live, before = set(range(num_samples)), len(tokenizer.decode(ids))  # live: the samples that have not ended
        for step, new in enumerate(generate(model, [ids] * num_samples, **options)):     # new (num_samples,)
            if step == 0:                                   # the prompt gave this token, from here on it is decoding
                read, reading, clock = read + len(ids), reading + time.perf_counter() - clock, time.perf_counter()
            else:
                decoded += len(live)
            for i in sorted(live):
                rows[i].append(new[i].item())
                if rows[i][-1] in ends:
                    live.remove(i)
                    continue
                texts[i] = tokenizer.decode(ids + rows[i])[before:]         # a token may be half a character
                if stop and stop in texts[i]:
                    texts[i] = texts[i].partition(stop)[0]
                    live.remove(i)
            last = interrupted or not live or step + 1 == max_new_tokens
            sure = len(texts[0]) - (unsure(texts[0]) if 0 in live and not last else 0)
            print(texts[0][shown:sure], end='', flush=True)
            shown = sure
            if last:
                break
        decoding += time.perf_counter() - clock
        print('\n' + ''.join(f'{dashes}{prompt}{text}\n' for text in texts[1:]), end='', flush=True)
        if interrupted:
            break
except OSError as error:                                    # a reader that is gone (`| head`), or a full disk
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())          # at exit the interpreter flushes once more
    sys.exit() if isinstance(error, BrokenPipeError) else fail(f'the text cannot be written ({error.strerror})')

each = model.cache_bytes_per_token(dtype)
slots = min(block_size, max(map(len, encoded)) + max_new_tokens)            # what generate() allocates for each sample
say(f'prompt{"s" * (len(prompts) > 1)}: {read:,} tokens in {reading:.2f} s; '
    f'then {decoded:,} tokens, {decoded / max(decoding, 1e-9):,.1f} tokens/s; cache: {num_samples * slots * each:,} bytes '
    f'for {num_samples} x {slots:,} tokens, {each:,} bytes a token at {dtype.itemsize} bytes a number', sys.stderr)
sys.exit(130 if interrupted else 0)
