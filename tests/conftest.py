"""What the tests share: the scripts on the path, a corpus of seconds, and train.py run inside this process."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')              # many small tensors, two test processes: more threads are slower

import gc
import random
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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
        lines = [f'{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}.' for _ in range(80)]
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
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            runpy.run_path(str(REPOSITORY / 'train.py'), run_name='__main__')
            code = 0
        except SystemExit as error:
            code = error.code
        finally:
            signal.signal(signal.SIGINT, before[0])
            signal.signal(signal.SIGTERM, before[1])
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
