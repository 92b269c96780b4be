"""The numerics held still: training losses that every change to the code must reproduce, whatever computes them.

tests/reference_curve.json has the losses of the first 20 updates of config/smoke.py in float32 on a CPU, over a corpus that
is made here (the default one is another text under another Python). A change that means to change the numbers writes the
file anew, and says so in its commit: python tests/test_reference.py
"""
import json
import random
from pathlib import Path

import forked
import pytest

CURVE = Path(__file__).with_name('reference_curve.json')


def losses(attn, folder, *flags):
    """-> the 20 training losses and the last validation loss of config/smoke.py with this attention."""
    rng, texts = random.Random(0), folder / 'texts'
    texts.mkdir()
    words = 'def return for in if else import self None True ( ) : = + [ ] 0 1 2 token loss head key value query'.split()
    for i in range(40):
        (texts / f'{i}.txt').write_text(' '.join(words[int(rng.random() ** 2 * len(words))] for _ in range(600)))
    forked.run('train.py', 'config/smoke.py', f'--attn={attn}', f'--dataset={texts}', f'--data_root={folder}',
               f'--out_dir={folder / "run"}', '--device=cpu', '--dtype=float32', '--compile=False', '--log_interval=1',
               *flags).check_returncode()
    run = json.loads((folder / 'run' / 'result.json').read_text())
    return [row['train_loss'] for row in run['history']] + [run['final']['val_loss']]


@pytest.mark.parametrize('plain', [False, True])
@pytest.mark.parametrize('attn', ['baseline', 'mla'])
def test_twenty_updates_give_the_committed_losses(attn, plain, tmp_path):
    assert losses(attn, tmp_path, f'--plain_kernels={plain}') == pytest.approx(json.loads(CURVE.read_text())[attn], abs=1e-4)


if __name__ == '__main__':
    import tempfile
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        curves = {'baseline': losses('baseline', Path(one)), 'mla': losses('mla', Path(other))}
    CURVE.write_text(json.dumps(curves, indent=1) + '\n')
