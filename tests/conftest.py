"""What the tests share: the scripts on the path, a corpus of seconds, train.py run inside this process, result files."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')              # many small tensors, two test processes: more threads are slower

import gc
import importlib
import json
import math
import random
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:                      # the process that hands out the tests runs none
    for module in forked.PRELOADED:
        importlib.import_module(module)
    gc.freeze()                                             # `train` collects after every run: not the imports, again and again

# nohup and a shell's & let signals be ignored, also by what the tests start: here they are not, however the suite is started
for name, handler in {'SIGINT': signal.default_int_handler, 'SIGHUP': signal.SIG_DFL}.items():
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

# A model and a budget of a fraction of a second
TINY = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32, 'd_ff': 32, 'n_expert': 4, 'tokenizer': 'bytes', 'batch_size': 6,
        'micro_batch_size': 6, 'max_steps': 6, 'eval_interval': 3, 'warmup_steps': 2, 'learning_rate': 0.01, 'max_train_tokens': 0,
        'max_val_tokens': 0, 'device': 'cpu', 'dtype': 'float32', 'compile': False}


def flags(**knobs):
    return [f'--{k}={v}' for k, v in knobs.items()]


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A folder of text files with some structure to learn: sentences of a small grammar."""
    folder, rng = tmp_path_factory.mktemp('corpus'), random.Random(0)
    who, does, what = ('the cat', 'a dog', 'every bird', 'no fish'), ('sees', 'hears', 'follows'), ('the moon', 'a stone', 'water')
    for i in range(20):
        lines = [f'{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}.' for _ in range(20)]
        (folder / f'text{i:02}.txt').write_text(f'text number {i}\n' + '\n'.join(lines) + '\n')
    return folder


@pytest.fixture(scope='session')
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp('data')


@pytest.fixture
def train(corpus, data_root, tmp_path, monkeypatch, capfd):
    """train(name, **knobs): run train.py with TINY's knobs and these, in this process, out_dir = tmp_path / name.

    -> code (exit status, 0 at the end of the script), out, err, folder.
    """
    def run(name='run', *arguments, **knobs):
        folder = tmp_path / name
        knobs = {**TINY, 'dataset': corpus, 'data_root': data_root, 'out_dir': folder, **knobs}
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, arguments), *flags(**{k: v for k, v in knobs.items() if v is not ...})])
        signals = [getattr(signal, n) for n in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, n)]
        before = [signal.getsignal(number) for number in signals]
        capfd.readouterr()
        try:
            runpy.run_path(str(REPOSITORY / 'train.py'), run_name='__main__')
            code = 0
        except SystemExit as error:
            code = error.code
        except Exception:                                   # as the interpreter would
            try:
                sys.excepthook(*sys.exc_info())
            except SystemExit as error:
                code = error.code
            else:
                raise
        finally:
            for number, handler in zip(signals, before):
                signal.signal(number, handler)
            sys.excepthook = sys.__excepthook__
            gc.collect()                                    # the script's globals, and with them its lock on the folder
        return SimpleNamespace(code=code, folder=folder, **dict(zip(('out', 'err'), capfd.readouterr())))
    return run


def one_line(run, *words):
    """Assert that `run` ended as bad input does: exit status 2, one line on stderr that has these words, no traceback."""
    assert run.code == 2 and run.err.count('\n') == 1 and 'Traceback' not in run.err, (run.code, run.err)
    for word in words:
        assert str(word) in run.err, (word, run.err)


os.environ.setdefault('HF_HUB_OFFLINE', '1')                # transformers, where a test uses it, must not go looking


# A corpus of text files, prepared

WORDS = ('attention latent rotary expert router key value query head rank '
         '\u00e9t\u00e9 \u4e2d\u6587 loss := (x) \t == 12345').split(' ')


def text(seed, words=120):
    rng = random.Random(seed)
    return f'document {seed}\n' + ''.join(rng.choice(WORDS) + rng.choice(['  ', ' ', '\n', ', '])
                                          for _ in range(words))


def silent(line):
    pass


@pytest.fixture(scope='session')
def texts(tmp_path_factory):
    """A folder of 60 text files, one of them twice, one blank, one hidden, one of another ending."""
    folder = tmp_path_factory.mktemp('texts with \u00e4 and blanks')
    for i in range(60):
        path = folder / f'part {i % 3}' / f'{i}.txt'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text(i).encode())
    (folder / 'copy.md').write_bytes(text(7).encode())
    (folder / 'blank.txt').write_text(' \n')
    (folder / 'picture.png').write_bytes(b'\xff\xd8')
    (folder / '.hidden').mkdir()
    (folder / '.hidden' / 'x.txt').write_bytes(b'\xff')
    return folder


@pytest.fixture(scope='session')
def prepared(texts, tmp_path_factory):
    from data import prepare
    return prepare(str(texts), 'bpe', 400, tmp_path_factory.mktemp('root'), silent)


def message_of(error):
    """Of a caught exception: one line."""
    message = str(error.value)
    assert message and '\n' not in message
    return message


# Result files, made up

NETWORKS = {    # name: class, parameters, active, cache bytes per token at 2 bytes a number
    'baseline': ('MultiHeadAttention', 13_200_000, 7_100_000, 18432),
    'gqa': ('MultiHeadAttention', 12_500_000, 6_400_000, 4608),
    'mqa': ('MultiHeadAttention', 12_300_000, 6_300_000, 2304),
    'lora': ('LatentAttention', 12_000_000, 5_900_000, 1152),
    'enhanced': ('LatentAttention', 12_400_000, 6_200_000, 1150),
    'mla': ('LatentAttention', 12_600_000, 6_500_000, 3120),
}


def result(name='baseline', seed=0, loss=4.0, **changes):
    """A valid result file as an object; `changes`: fields with __ for the dot, e.g. config__n_layer=2."""
    rng = random.Random(f'{name} {seed}')
    kind, total, active, cache = NETWORKS.get(name.removesuffix('-again'), NETWORKS['baseline'])
    run = {
        'schema': 2, 'status': 'complete', 'name': name, 'started': '2024-01-01T00:00:00',
        'finished': '2024-01-01T00:02:00',
        'config': {
            'attn': name.removesuffix('-again'), 'name': name, 'seed': seed, 'dataset': 'stdlib',
            'tokenizer': 'bpe', 'n_layer': 4, 'n_head': 4, 'n_kv_head': 4, 'n_embd': 128, 'd_ff': 256,
            'n_expert': 4, 'top_k': 2,
            'block_size': 128, 'batch_size': 8, 'micro_batch_size': 8, 'max_steps': 100, 'warmup_steps': 10,
            'learning_rate': 1e-3, 'optimizer': 'adamw', 'device': 'cpu', 'dtype': 'float32',
            'compile': False, 'q_lora_rank': None,
            'rope_theta': 10000.0, 'rope_factor': 1.0, 'out_dir': 'out', 'experiment': 'laptop'},
        'model': {
            'attention_class': kind, 'params_total': total, 'params_active': active,
            'params_attention': total // 10, 'params_embedding': 524288, 'flops_per_token': 4e7,
            'kv_cache_bytes_per_token': 2 * cache,
            'kv_cache_bytes_per_token_16bit': cache},
        'data': {
            'dataset': 'stdlib', 'tokenizer': 'bpe', 'vocab_size': 4096, 'train_tokens': 3_000_000,
            'val_tokens': 100_000, 'val_bytes': 340_000, 'train_sha256': 'ab' * 32, 'val_sha256': 'cd' * 32,
            'val_text_sha256': 'ef' * 32,
            'uniform_loss': 8.3178, 'unigram_loss': 6.3},
        'environment': {
            'device_name': 'a CPU', 'threads': 2, 'torch': '2.9.0', 'python': '3.11.2', 'platform': 'Linux',
            'git_commit': 'abc', 'git_dirty': False, 'source_sha256': {'model.py': '11'}, 'world_size': 1},
        'history': [{'step': step, 'tokens': 1024 * step, 'seconds': 0.5 * step, 'learning_rate': 1e-3,
                     'train_loss': loss, 'val_loss': None if step == 25 else loss + 4 * (100 - step) / 100,
                     'grad_norm': 1.0, 'balance': {'max_violation': 0.2}} for step in (0, 25, 50, 75, 100)],
        'final': {
            'step': 100, 'updates': 100, 'tokens': 102400, 'val_loss': loss, 'val_perplexity': math.exp(loss),
            'val_accuracy': 0.2 + (4 - loss) / 10, 'val_bits_per_byte': loss / math.log(2) / 3.4,
            'seconds_training': 100 + rng.random(), 'seconds_total': 130.0,
            'step_ms_median': 1000 + rng.random(), 'tokens_per_second': 1024.0, 'mfu': None,
            'peak_memory_gb': 1.25, 'peak_memory_kind': 'resident',
            'expert_load': [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], 'max_violation': 0.6,
            'router_entropy': 1.2, 'balance_loss': 1.1, 'z_loss': 0.01}}
    for field, value in changes.items():
        *path, last = field.split('__')
        at = run
        for key in path:
            at = at[key]
        at[last] = value
    return run


def save(folder, *runs):
    """Each run into <folder>/<name>-s<seed>/result.json; the folder as text."""
    for run in runs:
        place = folder / f'{run["name"]}-s{run["config"]["seed"]}'
        place.mkdir(parents=True, exist_ok=True)
        (place / 'result.json').write_text(json.dumps(run), encoding='utf-8')
    return str(folder)


def experiment(seeds=range(8), effects=None, noise=0.004, rng_seed=0):
    """Runs of the effects' arms whose losses share a per-seed noise, so that pairs correlate."""
    effects = effects or {'baseline': 0, 'lora': 0.02, 'enhanced': -0.03}
    rng = np.random.default_rng(rng_seed)
    runs = []
    for seed in seeds:
        shared = 4 + rng.normal(0, 0.02)
        runs += [result(name, seed, float(shared + effect + rng.normal(0, noise)))
                        for name, effect in effects.items()]
    return runs


def refusal(capsys, call, *arguments):
    """The one line on stderr with which the call ends the program."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def dynamo():
    """A counter of the graphs that torch.compile captures, around a compiler that has forgotten earlier tests."""
    import torch._dynamo.testing
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend
    torch._dynamo.reset()
