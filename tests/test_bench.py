"""bench.py: every task at a tiny size, its figures held against each other and the models. No speed is asserted."""
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, one_line

from attention import variants
from model import LanguageModel, ModelConfig

SIZES = dict(n_layer=2, n_head=4, n_embd=64, d_ff=48, n_expert=4, top_k=2, vocab_size=128)      # those of --quick
TOKENS = 4 * 32                                                                                 # of an update there


def bench(*arguments, path=None):
    """bench.py in a process of its own -> code, out, err; path: a folder that is searched for modules first."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **({'PYTHONPATH': str(path)} if path else {})}
    command = [sys.executable, str(REPOSITORY / 'bench.py'), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def program(monkeypatch, *arguments):
    """The names in a quick bench.py on the CPU that has measured nothing yet."""
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--quick=True', '--device=cpu', *arguments])
    return SimpleNamespace(**runpy.run_path(str(REPOSITORY / 'bench.py')))


def measure(folder, task, *arguments):
    """A quick run on the CPU -> its JSON, with what it printed under `out`."""
    path = folder / 'deeper' / f'{task}.json'
    run = bench(f'--task={task}', '--quick=True', '--device=cpu', f'--out={path}', *arguments)
    assert run.code == 0, run.err
    assert 'profiler' not in run.err                                # torch's own lines about itself

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')
    result = json.loads(path.read_text(), parse_constant=refuse)
    assert [p.name for p in path.parent.iterdir() if p.name.endswith('.tmp')] == []
    return result | {'out': run.out, 'folder': path.parent}


@pytest.fixture(scope='module')
def train(tmp_path_factory):
    knobs = ['--variants=baseline,enhanced', '--rounds=4', '--warmup=0']
    return measure(tmp_path_factory.mktemp('train'), 'train', *knobs)


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    return measure(tmp_path_factory.mktemp('parts'), 'parts', '--rounds=8')


@pytest.fixture(scope='module')
def scaling(tmp_path_factory):
    return measure(tmp_path_factory.mktemp('scaling'), 'scaling', '--variants=lora,mqa')


@pytest.fixture(scope='module')
def decode(tmp_path_factory):
    return measure(tmp_path_factory.mktemp('decode'), 'decode')


@pytest.fixture(scope='module')
def with_peer(tmp_path_factory):
    pytest.importorskip('transformers', reason='transformers, the peer of these runs, is not installed')
    folder, knobs = tmp_path_factory.mktemp('peer'), ['--peer=transformers', '--variants=gqa,enhanced', '--warmup=0']
    return {'train': measure(folder, 'train', *knobs, '--memory_steps=0'),
            'decode': measure(folder, 'decode', *knobs, '--prompts=8', '--batch_sizes=2')}


def approximately(x):
    return pytest.approx(x, rel=1e-9)


def statistics_in(value):
    """Every summary, rate and ratio in a result, however deep."""
    if isinstance(value, dict):
        if {'min', 'max'} <= value.keys():
            yield value
        for inner in value.values():
            yield from statistics_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from statistics_in(inner)


def same_ratio(figure, ours, theirs):
    """Whether a ratio is the quotient of the medians of two lists of seconds, its range that within the rounds."""
    quotients = [t / o for o, t in zip(ours, theirs, strict=True)]
    assert figure['of_medians'] == approximately(statistics.median(theirs) / statistics.median(ours))
    assert (figure['min'], figure['max']) == approximately((min(quotients), max(quotients)))


def test_a_ratio_is_how_many_times_as_fast_and_its_range_that_within_the_rounds(monkeypatch):
    b = program(monkeypatch)
    # rounds of 1, 2, 4 s against 3, 2, 20 s: 3, 1 and 5 times as fast, medians 2 s and 3 s
    assert b.ratio([1.0, 2.0, 4.0], [3.0, 2.0, 20.0]) == {'of_medians': 1.5, 'min': 1.0, 'max': 5.0}
    assert b.ratio([1.0], None) is None
    assert b.rate(12, [4.0, 2.0, 3.0]) == {'median': 4.0, 'min': 3.0, 'max': 6.0}
    assert b.summary([0.004, 0.002, 0.003], 1e3) == pytest.approx({'median': 3.0, 'min': 2.0, 'max': 4.0})


def test_a_measure_is_how_long_its_work_takes_each_round_in_turn(monkeypatch):
    b, order = program(monkeypatch), []
    sides = {name: lambda name=name, s=s: order.append(name) or {'work': b.timed(lambda: time.sleep(s))}
             for name, s in (('short', 0.01), ('long', 0.04))}
    timings = b.interleave(sides, {})
    assert order == ['long', 'short', 'short', 'long'] * 2          # one round of warm-up, three that count
    for name, least in (('short', 0.01), ('long', 0.04)):
        assert len(timings[name]['work']) == 3 and all(least <= s < least + 1 for s in timings[name]['work'])
    assert b.ratio(timings['short']['work'], timings['long']['work'])['max'] > 1


def live(attn, **sizes):
    return LanguageModel(ModelConfig(attn=attn, **{**SIZES, 'block_size': 32, **sizes}))


@pytest.mark.parametrize('task', ['train', 'parts', 'scaling', 'decode'])
def test_every_median_lies_between_its_minimum_and_maximum_and_every_round_is_in_the_file(task, request):
    result = request.getfixturevalue(task)
    found = list(statistics_in(result))
    assert len(found) >= 8
    for s in found:
        middle = s.get('median', s.get('of_medians'))
        assert 0 <= s['min'] <= middle * (1 + 1e-9) and middle <= s['max'] * (1 + 1e-9), s
    rounds = result['config']['rounds']
    assert rounds == {'train': 4, 'parts': 8}.get(task, 3), 'a knob given by hand counts, also under --quick'
    for side, measures in result['timings'].items():
        for what, seconds in measures.items():
            again = side == 'machine'                               # it runs along with every set of sides
            assert len(seconds) % rounds == 0 if again else len(seconds) == rounds, (side, what)
            assert all(math.isfinite(s) and s > 0 for s in seconds)


@pytest.mark.parametrize('task', ['train', 'parts', 'scaling', 'decode'])
def test_the_file_says_where_it_was_measured_and_how_fast_the_machine_itself_was(task, request):
    result = request.getfixturevalue(task)
    assert (result['schema'], result['task'], result['config']['task']) == (1, task, task)
    environment = result['environment']
    assert environment['device_name'] and environment['threads'] == 1 and environment['torch']
    assert environment.keys() >= {'git_commit', 'git_dirty', 'python', 'platform'}
    machine, seconds = result['machine'], result['timings']['machine']
    assert machine['matmul_size'] == result['config']['matrix_size'] == 128
    assert machine['matmul_flops']['median'] == approximately(2 * 128 ** 3 / statistics.median(seconds['matmul']))
    assert machine['bytes_read']['median'] == approximately(2 ** 20 / statistics.median(seconds['read']))
    copied = machine['copy_bytes_read_and_written']
    assert copied['median'] == approximately(2 * 2 ** 20 / statistics.median(seconds['copy']))
    for note in result['notes']:
        assert note in result['out']


@pytest.mark.parametrize('task, columns', [('train', 10), ('parts', 6), ('scaling', 7), ('decode', 14)])
def test_the_table_is_markdown_with_as_many_cells_in_each_line(task, columns, request):
    lines = [line for line in request.getfixturevalue(task)['out'].split('\n\n')[0].splitlines()]
    assert len(lines) > 2 and lines[1].replace(' ', '') == '|' + '---|' * columns
    assert all(line.count('|') == columns + 1 for line in lines)


def test_train_reports_the_models_own_counts_and_quotients_of_its_timings(train):
    assert [row['variant'] for row in train['rows']] == ['baseline', 'enhanced']
    base = train['timings']['baseline ours']['update']
    for row in train['rows']:
        model, seconds = live(row['variant']), train['timings'][f'{row["variant"]} ours']['update']
        assert row['flops_per_token'] == model.flops_per_token()
        assert row['params_total'] == sum(p.numel() for p in model.parameters())
        rate = TOKENS / statistics.median(seconds)
        assert row['tokens_per_second']['median'] == approximately(rate)
        assert row['ms']['median'] == approximately(1e3 * statistics.median(seconds))
        share = rate * row['flops_per_token'] / train['machine']['matmul_flops']['median']
        assert row['of_matrix_rate'] == approximately(share)
        same_ratio(row['speed_to_first'], seconds, base)
        assert row['speed_to_peer'] is None
        assert row['attention_kernels'] and all('scaled_dot_product' in name for name in row['attention_kernels'])


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='the peak is read from /proc')
def test_the_peak_memory_is_that_of_a_process_of_its_own(train):
    for row in train['rows']:
        memory = row['peak_memory']
        assert 0.05 < memory['before_model_gb'] < memory['peak_gb'] < 2


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='the peak is read from /proc')
def test_the_peak_memory_leaves_out_whoever_starts_the_process():
    hog = b'\1' * 1_500_000_000                                     # resident here, and none of the measured process's
    run = bench('--task=memory', '--quick=True', '--device=cpu', '--variants=baseline')
    assert run.code == 0 and json.loads(run.out)['peak_gb'] < 1.4, (run.out, run.err)
    del hog


def test_the_parts_and_the_remainder_are_the_whole(parts):
    assert [row['variant'] for row in parts['rows']] == ['baseline', 'lora', 'enhanced']
    for row in parts['rows']:
        ms = {p['part']: p['ms']['median'] for p in row['parts']}
        assert list(ms) == ['attention', 'router', 'dispatch', 'experts', 'head', 'optimizer', 'rest']
        assert all(value > 0 for value in ms.values())
        assert sum(ms.values()) == approximately(row['parts_ms'])
        assert row['parts_ms'] + row['remainder_ms'] == approximately(row['whole_ms']['median'])
        assert row['routing_share'] == approximately((ms['router'] + ms['dispatch']) / row['whole_ms']['median'])
        assert row['flops_per_token'] == live(row['variant']).flops_per_token()
        assert sum(p['flops_per_token'] for p in row['parts']) == row['flops_per_token']
        lost = sum(p['share_lost'] for p in row['parts']) + row['remainder_ms'] / row['whole_ms']['median']
        assert lost == approximately(1 - row['of_matrix_rate'])


def test_scaling_compares_with_the_first_row_and_with_what_flops_foretell(scaling):
    rows = scaling['rows']
    assert [(r['kind'], r['variant'], r['n']) for r in rows] == [
        ('experts', 'lora', 4), ('experts', 'lora', 8), *(('context', a, n) for a in ('lora', 'mqa') for n in (16, 32))]
    for row in rows:
        changes = {'n_expert': row['n']} if row['kind'] == 'experts' else {'block_size': row['n']}
        model, seconds = live(row['variant'], **changes), scaling['timings'][row['side']]['forward_backward']
        first = next(r for r in rows if (r['kind'], r['variant']) == (row['kind'], row['variant']))
        assert row['tokens'] == TOKENS and row['flops_per_token'] == model.flops_per_token()
        assert row['params_total'] == model.parameter_counts()['params_total']
        assert row['tokens_per_second']['median'] == approximately(TOKENS / statistics.median(seconds))
        assert row['speed_to_first_by_flops'] == approximately(first['flops_per_token'] / row['flops_per_token'])
        same_ratio(row['speed_to_first'], seconds, scaling['timings'][first['side']]['forward_backward'])
        assert (row['optimizer_ms'] is not None) == (row['kind'] == 'experts')


def test_decode_has_every_variant_prompt_and_batch_and_latent_ones_both_ways(decode):
    kinds = [(attn, mode) for attn, row in variants(64, 4).items()
             for mode in (('absorb', 'expand') if row['class'].__name__ == 'LatentAttention' else ('decode',))]
    assert len(kinds) == 9
    assert [(r['prompt'], r['batch_size'], r['variant'], r['mode']) for r in decode['rows']] == [
        (prompt, batch, *kind) for prompt in (8, 24) for batch in (1, 2) for kind in kinds]


def test_decode_reports_the_caches_own_bytes_and_quotients_of_its_timings(decode):
    for row in decode['rows']:
        model, seconds, batch = live(row['variant']), decode['timings'][row['side']], row['batch_size']
        assert row['cache_bytes'] == model.new_cache(batch, row['prompt'] + 4).bytes()
        assert row['cache_bytes_per_token'] == model.cache_bytes_per_token(model.embed.weight.dtype)
        assert row['prefill_tokens_per_second']['median'] == approximately(
            batch * row['prompt'] / statistics.median(seconds['prefill']))
        assert row['decode_tokens_per_second']['median'] == approximately(
            batch * 4 / statistics.median(seconds[row['mode']]))
        assert row['ms_per_token']['median'] * row['decode_tokens_per_second']['median'] == approximately(1e3 * batch)
        # 4 experts, top-2: one token visits 2 of them, two tokens 3 on average; half of the new tokens are in the cache
        idle = model.parameter_counts()['params_experts'] * {1: 2 / 4, 2: 1 / 4}[batch]
        weights = 4 * (sum(p.numel() for p in model.parameters()) - idle)
        assert row['least_bytes'] == weights + row['cache_bytes_per_token'] * batch * (row['prompt'] + 2)
        if row['mode'] == 'absorb':
            same_ratio(row['absorb_speed_to_expand'], seconds['absorb'], seconds['expand'])
        else:
            assert row['absorb_speed_to_expand'] is None


@pytest.mark.parametrize('task', ['scaling', 'decode'])
def test_curves_are_drawn_where_matplotlib_is_installed(task, request):
    pytest.importorskip('matplotlib', reason='matplotlib, which draws the figures, is not installed')
    result = request.getfixturevalue(task)
    assert result['figure'] == f'{task}.png'
    assert (result['folder'] / result['figure']).read_bytes().startswith(b'\x89PNG')


def test_without_matplotlib_a_line_takes_the_place_of_the_figure(tmp_path):
    (tmp_path / 'matplotlib.py').write_text('raise ImportError')
    out = tmp_path / 'decode.json'
    knobs = ['--task=decode', '--quick=True', '--device=cpu', '--variants=mqa', '--rounds=1', '--warmup=0']
    run = bench(*knobs, f'--out={out}', path=tmp_path)
    assert run.code == 0 and 'no figure' in run.err
    assert json.loads(out.read_text())['figure'] is None


def test_the_peer_trains_the_same_model(with_peer):
    result = with_peer['train']
    assert [(r['variant'], r['library']) for r in result['rows']] == [
        (attn, library) for attn in ('gqa', 'enhanced') for library in ('ours', 'transformers')]
    for ours, theirs in zip(result['rows'][::2], result['rows'][1::2]):
        assert theirs['params_total'] == ours['params_total'] and theirs['flops_per_token'] == ours['flops_per_token']
        timings = result['timings']
        same_ratio(ours['speed_to_peer'], timings[f'{ours["variant"]} ours']['update'],
                   timings[f'{ours["variant"]} transformers']['update'])
        trials = {name: seconds for name, seconds in theirs['trials'].items() if seconds is not None}
        assert theirs['experts_implementation'] == min(trials, key=trials.get) and 'eager' in trials
        assert theirs['speed_to_peer'] is None


def test_the_peer_decodes_with_a_cache_of_the_same_size(with_peer):
    result = with_peer['decode']
    ours = [r for r in result['rows'] if r['library'] == 'ours']
    theirs = {r['variant']: r for r in result['rows'] if r['library'] == 'transformers'}
    assert [(r['variant'], r['mode']) for r in ours] == [
        ('gqa', 'decode'), ('enhanced', 'absorb'), ('enhanced', 'expand')]
    for row in ours:
        peer, timings = theirs[row['variant']], result['timings']
        assert peer['cache_bytes'] == row['cache_bytes']
        for figure in ('prefill', 'decode'):
            mine = timings[row['side']][row['mode'] if figure == 'decode' else figure]
            same_ratio(row[f'{figure}_speed_to_peer'], mine, timings[peer['side']][figure])


@pytest.mark.parametrize('argument, words', [
    ('--variants=baseline,enhansed', ['enhansed', 'did you mean', 'enhanced']), ('--variants=', ['--variants=']),
    ('--variants=lora,lora', ['each once']), ('--prompts=128,x', ['--prompts=128,x', 'whole numbers']),
    ('--prompts=', ['whole numbers']), ('--batch_sizes=0', ['--batch_sizes=0']),
    ('--rounds=0', ['rounds', 'at least 1']), ('--warmup=-1', ['warmup', 'at least 0']),
    ('--n_embd=100', ['n_embd', 'n_head']), ('--device=tpu', ['tpu', 'cpu']),
    ('--device=mps', ['mps', 'cpu and cuda only']),
    ('--device=cuda:99', ['no cuda:99']), ('--generate=True', ['unknown knob']),
    ('--task=trian', ['trian', 'did you mean train']), ('--round=3', ['did you mean', 'rounds'])])
def test_what_cannot_be_done_is_said_in_one_line(argument, words, tmp_path):
    one_line(bench(argument, f'--out={tmp_path}/x.json'), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('arguments, words', [
    (['--contexts=3,7'], ['--contexts=3,7', 'divide']), (['--experts=1,8'], ['--experts', 'top_k']),
    (['--peer=transformers'], ['--peer=transformers', '--task=train', '--task=scaling'])])
def test_scaling_names_what_does_not_fit(arguments, words):
    one_line(bench('--task=scaling', '--quick=True', *arguments), *words)


def test_a_folder_for_a_file_and_a_place_that_cannot_be_written_to_are_told_at_once(tmp_path):
    one_line(bench('--quick=True', f'--out={tmp_path}'), tmp_path, 'folder')
    (tmp_path / 'file').write_text('')
    one_line(bench('--quick=True', f'--out={tmp_path / "file" / "x.json"}'), 'x.json', '--out=')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file']


def test_without_transformers_its_peer_is_refused_in_one_line(tmp_path):
    (tmp_path / 'transformers.py').write_text("raise ImportError('no transformers here')")
    run = bench('--peer=transformers', f'--out={tmp_path}/x.json', path=tmp_path)
    one_line(run, 'pip install transformers', 'no transformers here')
