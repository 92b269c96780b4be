"""bench.py: every task at a tiny size, its figures held against each other and the models. No speed is asserted.

And gpu.sh, with a Python that writes down what it is asked for.
"""
import contextlib
import io
import json
import math
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import REPOSITORY, one_line

import kernels
from model import LanguageModel, ModelConfig
from muon import configure_optimizers

SIZES = dict(n_layer=2, n_head=4, n_embd=64, d_ff=48, vocab_size=128)
QUICK = {**SIZES, 'device': 'cpu', 'experts': 4, 'contexts': 32, 'micro_batch_sizes': 2, 'rounds': 3, 'warmup': 1,
         'memory_updates': 0, 'prompts': 8, 'batch_sizes': '1,2', 'new_tokens': 4, 'matrix_size': 128, 'peer': 'none',
         'dtype': 'both'}


def command(**knobs):
    return [sys.executable, str(REPOSITORY / 'bench.py'), *(f'--{k}={v}' for k, v in {**QUICK, **knobs}.items())]


def measure(folder, **knobs):
    """A quick run -> its JSON, with what it printed under `out`."""
    path = folder / 'deeper' / 'figures.json'
    run = forked.run(*command(out=path, **knobs)[1:])
    assert run.returncode == 0 and run.stderr == '', run.stderr     # neither progress nor torch's own lines

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')
    result = json.loads(path.read_text(), parse_constant=refuse)
    markdown = path.with_suffix('.md').read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ['figures.json', 'figures.md']
    assert run.stdout == f'{markdown}\n{path}\n'
    return result | {'markdown': markdown}


@pytest.fixture(scope='module')
def updates(tmp_path_factory):
    return measure(tmp_path_factory.mktemp('updates'), variants='baseline,enhanced', rounds=4, warmup=0)


@pytest.fixture(scope='module')
def sizes(tmp_path_factory):
    return measure(tmp_path_factory.mktemp('sizes'), variants='mqa', dtype='float32', experts='8,4', contexts='16,32',
                   batch_size=4, micro_batch_sizes='1,4', rounds=1, warmup=0)


@pytest.fixture(scope='module')
def decode(tmp_path_factory):
    return measure(tmp_path_factory.mktemp('decode'), task='decode', variants='gqa,lora', prompts='24,8', compile=True)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    knobs = dict(task='decode', variants='mla', plain='each', batch_sizes=1, dtype='float32')
    return measure(tmp_path_factory.mktemp('plain'), **knobs)


@pytest.fixture(scope='module')
def beside(tmp_path_factory):
    """Both tasks beside transformers, in this process: a new one would have to import it anew."""
    pytest.importorskip('transformers', reason='transformers, the peer of these runs, is not installed')
    folder, results = tmp_path_factory.mktemp('peer'), {}
    for task in ('train', 'decode'):
        knobs = dict(task=task, peer='transformers', variants='gqa,mla', batch_sizes=2, out=folder / f'{task}.json')
        with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(io.StringIO()):
            m.setattr(sys, 'argv', command(**knobs)[1:])
            runpy.run_path(str(REPOSITORY / 'bench.py'), run_name='__main__')
        results[task] = json.loads(knobs['out'].read_text()) | {'markdown': knobs['out'].with_suffix('.md').read_text()}
    return results


@pytest.fixture
def program(monkeypatch, tmp_path):
    """program(**knobs): the names in a quick bench.py that has measured nothing yet; with run_name='__main__' it runs."""
    def load(run_name='bench', **knobs):
        monkeypatch.setattr(sys, 'argv', command(**{'out': tmp_path / 'x.json', **knobs})[1:])
        return SimpleNamespace(**runpy.run_path(str(REPOSITORY / 'bench.py'), run_name=run_name))
    return load


@pytest.fixture
def refused(program, capfd, tmp_path):
    """refused(*words, **knobs): bench.py ends with one line that has these words, and leaves no file behind."""
    def check(*words, **knobs):
        before = set(tmp_path.rglob('*'))
        with pytest.raises(SystemExit) as end:
            program('__main__', **knobs)
        one_line(SimpleNamespace(code=end.value.code, err=capfd.readouterr().err), *words)
        assert set(tmp_path.rglob('*')) == before
    return check


def approximately(x):
    return pytest.approx(x, rel=1e-9)


def spreads_in(value):
    """Every median with its range in a result, however deep."""
    if isinstance(value, dict):
        if {'min', 'max'} <= value.keys():
            yield value
        for inner in value.values():
            yield from spreads_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from spreads_in(inner)


def find(result, **wanted):
    [row] = [row for row in result['rows'] if all(row[k] == v for k, v in wanted.items())]
    return row


def same_ratio(figure, ours, theirs):
    """Whether a ratio is the median, smallest and largest quotient of two lists of seconds."""
    quotients = [t / o for o, t in zip(ours, theirs, strict=True)]
    assert (figure['median'], figure['min'], figure['max']) == approximately(
        (statistics.median(quotients), min(quotients), max(quotients)))


def live(attn, **sizes):
    return LanguageModel(ModelConfig(attn=attn, **{**SIZES, 'n_expert': 4, 'block_size': 32, **sizes}))


# ---------------------------------------------------------------------------------------------------------------------
# What holds for every task

def test_a_ratio_is_the_median_of_the_quotients_within_the_rounds_and_the_best_peer_is_its_faster_dtype(program):
    b = program(variants='baseline,mla', peer='transformers')

    rows = [{'variant': variant, 'library': library, 'dtype': dtype, 'plain': 'none', 'seconds': {'update': seconds},
             'tokens': {'update': 8}}
            for variant, library, dtype, seconds in [
                ('baseline', 'ours', 'float32', [1.0, 2.0, 4.0]), ('baseline', 'ours', 'bfloat16', [1.0, 1.0, 1.0]),
                ('baseline', 'transformers', 'float32', [3.0, 2.0, 20.0]),
                ('baseline', 'transformers', 'bfloat16', [2.0, 8.0, 2.0]), ('mla', 'ours', 'bfloat16', [2.0, 4.0, 2.0]),
                ('mla', 'transformers', 'float32', [9.0, 9.0, 9.0]),
                ('mla', 'transformers', 'bfloat16', [10.0, 10.0, 10.0])]]
    b.compare(rows, 'update')
    figures = [{name: (s['median'], s['min'], s['max']) for name, s in r['update_speed'].items()} for r in rows]
    assert figures[0] == {'to transformers': (3.0, 1.0, 5.0), 'to its best': (2.0, 0.5, 4.0)}
    assert figures[1] == {'to float32': (2.0, 1.0, 4.0), 'to transformers': (2.0, 2.0, 8.0),
                          'to its best': (2.0, 2.0, 8.0)}
    assert figures[3] == {'to float32': (1.5, 0.25, 10.0)}
    assert figures[4] == {'to baseline': (0.5, 0.25, 0.5), 'to transformers': (5.0, 2.5, 5.0),
                          'to its best': (4.5, 2.25, 4.5)}
    assert [r.get('best_update') for r in rows] == [None, None, None, True, None, True, None]
    assert rows[0]['update_tokens_per_second'] == {'median': 4.0, 'min': 2.0, 'max': 8.0}


def test_sides_take_turns_from_first_to_last_and_back_and_warm_up_first(program):
    b, order = program(rounds=2, warmup=1), []
    turn = lambda name: lambda: order.append(name) or {'work': len(order)}
    _, rows = b.take_turns([({'variant': name, 'seconds': {}}, turn(name)) for name in 'abc'])
    assert order == list('cbaabccba')
    assert [row['seconds']['work'] for row in rows] == [[4, 9], [5, 8], [6, 7]]


@pytest.mark.parametrize('task, columns', [('updates', 10), ('sizes', 11), ('decode', 13), ('plain', 12)])
def test_every_round_is_in_the_file_and_every_figure_in_a_table_of_equal_lines(task, columns, request):
    result = request.getfixturevalue(task)
    found = list(spreads_in(result))
    assert len(found) >= 8 and all(0 <= s['min'] <= s['median'] <= s['max'] for s in found)
    for row in [result['machine'], *result['rows']]:
        for seconds in row['seconds'].values():
            assert len(seconds) == result['config']['rounds'] and all(math.isfinite(s) and s > 0 for s in seconds)
    lines = result['markdown'].split('\n\n')[0].splitlines()
    assert len(lines) == 2 + len(result['rows']) and lines[1].replace(' ', '') == '|' + '---|' * columns
    assert all(line.count('|') == columns + 1 for line in lines)
    assert all(f'- {note}\n' in result['markdown'] for note in result['notes'])


@pytest.mark.parametrize('task, fixture', [('train', 'updates'), ('decode', 'decode')])
def test_the_file_says_where_it_was_measured_and_how_fast_the_machine_itself_was(task, fixture, request):
    result = request.getfixturevalue(fixture)
    assert (result['schema'], result['task'], result['config']['task']) == (3, task, task)
    environment, machine = result['environment'], result['machine']
    assert environment['device_name'] and environment['threads'] == 1 and environment['torch']
    assert environment.keys() >= {'git_commit', 'git_dirty', 'python', 'platform'}
    for kind in ('float32', 'bfloat16'):
        rates = [2e-9 * 128 ** 3 / s for s in machine['seconds'][kind]]
        assert machine[f'gflops_{kind}']['median'] == approximately(statistics.median(rates))


def test_without_a_working_compiler_it_goes_on_without(program, monkeypatch, capfd):
    def broken(x):
        raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', lambda function: broken)
    assert program(compile=True).config['compile'] is False and 'does not work here' in capfd.readouterr().out


@pytest.mark.parametrize('computes', [True, False])
def test_what_a_machine_does_not_compute_in_is_not_timed_unless_asked_for(computes, program, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: computes)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    expected = ['float32', 'bfloat16'][:1 + computes]
    b = program(dtype='auto', variants='mqa')
    assert b.dtypes == expected and list(b.yardstick()()) == expected
    assert [row['dtype'] for row, _ in b.training_sides()] == expected


@pytest.mark.skipif(os.name != 'posix', reason='a terminal as POSIX has it')
def test_on_a_terminal_one_line_is_rewritten_until_the_report_stands_there(tmp_path):
    status, shown = forked.on_a_terminal(*command(out=tmp_path / 'x.json', variants='mqa', dtype='float32')[1:])
    assert status == 0
    rewritten, *report = shown.decode().split('| variant |')
    assert '\n' not in rewritten and 'round 3 of 3, 2 of 2: mqa ours float32' in rewritten and len(report) == 1


# ---------------------------------------------------------------------------------------------------------------------
# train

def test_train_reports_the_models_own_counts_and_quotients_of_its_timings(updates):
    assert [(r['variant'], r['dtype']) for r in updates['rows']] == [
        (attn, dtype) for attn in ('baseline', 'enhanced') for dtype in ('float32', 'bfloat16')]
    for row in updates['rows']:
        model, seconds = live(row['variant']), row['seconds']['update']
        assert row['flops_per_token'] == model.flops_per_token()
        assert row['params_total'] == sum(p.numel() for p in model.parameters())
        rate = statistics.median(4 * 32 / s for s in seconds)
        assert row['update_tokens_per_second']['median'] == approximately(rate)
        assert f'| {1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f}' in updates['markdown']
        own = updates['machine'][f'gflops_{row["dtype"]}']['median']
        assert row['of_matrix_rate'] == approximately(1e-9 * rate * row['flops_per_token'] / own)
    row = find(updates, variant='enhanced', dtype='bfloat16')
    assert row['update_speed'].keys() == {'to baseline', 'to float32'}
    for name, other in {'to baseline': find(updates, variant='baseline', dtype='bfloat16'),
                        'to float32': find(updates, variant='enhanced', dtype='float32')}.items():
        same_ratio(row['update_speed'][name], row['seconds']['update'], other['seconds']['update'])


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='the peak is read from /proc')
def test_the_peak_memory_is_that_of_a_process_with_one_side_alone(tmp_path):
    """Weights, gradients and moments of the second side are 0.4 GB, which the first one would show too if it had them."""
    small, large = (row['peak_memory'] for row in measure(
        tmp_path, variants='lora', dtype='float32', d_ff=1024, experts='4,64', rounds=1, warmup=0, memory_updates=1)['rows'])
    assert 0.05 < small['before_gb'] < small['peak_gb'] < large['peak_gb'] - 0.2
    assert abs(small['before_gb'] - large['before_gb']) < 0.1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_update_is_the_one_of_train_py(program, dtype, monkeypatch):
    b = program(variants='lora')
    row = {'variant': 'lora', 'library': 'ours', 'dtype': dtype, 'context': 32, 'micro_batch_size': 1}
    model, reference, x = b.build(row, 32), live('lora').train(), b.tokens_of(4, 33)
    for m in (model, reference):
        for p in m.parameters():
            if not p.any():                                         # behind zeros no weight has a gradient
                torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(0))
    start, cast = [p.detach().clone() for p in reference.parameters()], []
    model.register_forward_pre_hook(lambda *_: cast.append(torch.is_autocast_enabled('cpu')))
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setitem(b.update_of.__globals__, 'clip_gradients', lambda *arguments: norms.append(clip(*arguments).item()))
    b.update_of(model, row)(b.optimizer_of(model))
    assert cast == [dtype == 'bfloat16'] * 4
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
        o = reference(x[:, :-1], x[:, 1:])                          # all at once
    (o.nll / 128 + 0.01 * o.balance_loss + 0.001 * o.z_loss).backward()
    norms.append(clip(reference.parameters(), 1.0).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-4 if dtype == 'float32' else 0.02)
    [opt] = configure_optimizers(reference, 1e-4)
    opt.step()
    for p, q, before in zip(model.parameters(), reference.parameters(), start, strict=True):
        # Adam's first step is the sign of the gradient, which rounding may turn where the gradient is almost 0
        turned = ((p - q).abs() > 1e-5).float().mean()
        assert turned < (0.01 if dtype == 'float32' else 0.2) and (p - before).abs().max() > 0.5e-4


def test_the_first_update_of_a_turn_is_not_timed(program, monkeypatch):
    b, done = program(variants='mqa', dtype='float32'), []
    row = {'variant': 'mqa', 'library': 'ours', 'dtype': 'float32', 'context': 32, 'micro_batch_size': 2}
    model = b.build(row, 32)
    model.register_forward_pre_hook(lambda *_: done.append('micro-batch'))
    monkeypatch.setitem(b.training_turn.__globals__, 'timed', lambda work: done.append('clock') or work() or 1.0)
    assert b.training_turn(model, row)() == {'update': 1.0}
    assert done == ['micro-batch'] * 2 + ['clock'] + ['micro-batch'] * 2


def test_sizes_are_sides_too_and_an_update_has_as_many_tokens_in_all_of_them(sizes, program):
    assert [(r['experts'], r['context'], r['micro_batch_size']) for r in sizes['rows']] == [
        (e, c, m) for e in (4, 8) for c in (16, 32) for m in (1, 4)]
    for row in sizes['rows']:
        model = live('mqa', n_expert=row['experts'], block_size=row['context'])
        assert row['flops_per_token'] == model.flops_per_token()
        assert row['params_total'] == model.parameter_counts()['params_total']
        assert row['update_tokens_per_second']['max'] == approximately(4 * 16 / min(row['seconds']['update']))
        assert row['update_speed'] == {}
    b = program(variants='mqa', contexts='16,32', batch_size=8, micro_batch_sizes='1,4')
    for context, micro, shapes in [(16, 1, [(1, 16)] * 8), (16, 4, [(4, 16)] * 2), (32, 1, [(1, 32)] * 4),
                                   (32, 4, [(2, 32)] * 2)]:
        row = {'variant': 'mqa', 'library': 'ours', 'dtype': 'float32', 'context': context, 'micro_batch_size': micro}
        model, seen = b.build(row, 32), []
        model.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape)))
        b.update_of(model, row)(b.optimizer_of(model))
        assert seen == shapes


def test_twenty_updates_in_bfloat16_have_the_losses_of_float32(train, tmp_path):
    curves = []
    for dtype in ('float32', 'bfloat16'):
        run = train(dtype, dtype=dtype, attn='mla', n_embd=64, max_steps=20, log_interval=1, learning_rate=1e-3)
        assert run.code == 0, run.err
        curves.append([row['train_loss'] for row in json.loads((run.folder / 'result.json').read_text())['history']])
    apart = [abs(a - b) for a, b in zip(*curves, strict=True)]
    assert len(apart) >= 20 and 0 < max(apart) < 0.005 and curves[0][-1] < curves[0][0] - 0.2


# ---------------------------------------------------------------------------------------------------------------------
# decode

def test_decode_has_every_dtype_prompt_and_batch_and_latent_attention_both_ways(decode):
    assert [tuple(r[k] for k in ('variant', 'dtype', 'prompt', 'batch_size', 'mode')) for r in decode['rows']] == [
        (attn, dtype, prompt, batch, mode) for attn, modes in {'gqa': ['decode'], 'lora': ['absorb', 'expand']}.items()
        for dtype in ('float32', 'bfloat16') for prompt in (8, 24) for batch in (1, 2) for mode in modes]


def test_decode_reports_the_caches_own_bytes_and_quotients_of_its_timings(decode):
    for row in decode['rows']:
        dtype, batch, seconds = getattr(torch, row['dtype']), row['batch_size'], row['seconds']
        model = live(row['variant'], block_size=28).for_decoding(dtype)
        assert row['cache_bytes'] == model.new_cache(batch, row['prompt'] + 4).bytes()
        assert row['cache_bytes_per_token'] == model.cache_bytes_per_token(dtype)
        assert row['prefill_tokens_per_second']['max'] == approximately(batch * row['prompt'] / min(seconds['prefill']))
        assert row['decode_tokens_per_second']['max'] == approximately(batch * 4 / min(seconds['decode']))
        others = dict(prompt=row['prompt'], batch_size=batch)
        if row['dtype'] == 'bfloat16':
            same_ratio(row['decode_speed']['to float32'], seconds['decode'], find(
                decode, variant=row['variant'], dtype='float32', mode=row['mode'], **others)['seconds']['decode'])
        if row['variant'] == 'lora':
            same_ratio(row['prefill_speed']['to gqa'], seconds['prefill'], find(
                decode, variant='gqa', dtype=row['dtype'], **others)['seconds']['prefill'])


@pytest.mark.parametrize('mode', ['absorb', 'expand'])
def test_latent_attention_decodes_every_new_token_in_the_mode_of_its_row(program, mode, monkeypatch):
    b = program(task='decode', variants='lora')
    sides, seen = b.decoding_sides(), []
    [turn] = [turn for row, turn in sides if (row['mode'], row['batch_size'], row['dtype']) == (mode, 2, 'bfloat16')]

    def note(self, tokens, *rest, decode=LanguageModel.decode):
        seen.append((tuple(tokens.shape), self.layers[0].attn.decode_mode, self.embed.weight.dtype))
        return decode(self, tokens, *rest)
    monkeypatch.setattr(LanguageModel, 'decode', note)
    assert turn().keys() == {'prefill', 'decode'}
    prompt, token = ((2, 8), 'auto', torch.bfloat16), ((2, 1), mode, torch.bfloat16)
    assert seen == [prompt, token] + [prompt, *[token] * 4]             # first what does not count


# ---------------------------------------------------------------------------------------------------------------------
# The kernels, one by one

def test_each_kernel_takes_turns_at_being_plain(plain):
    forms = ['none', *kernels.NAMES, 'all']
    assert [(r['plain'], r['mode']) for r in plain['rows']] == [
        (form, mode) for mode in ('absorb', 'expand') for form in forms]
    for row in plain['rows']:
        if row['plain'] == 'none':
            assert 'to fast' not in row['decode_speed']
        else:
            fast = find(plain, plain='none', mode=row['mode'])
            same_ratio(row['decode_speed']['to fast'], row['seconds']['decode'], fast['seconds']['decode'])


def test_decoding_is_not_compiled_and_does_not_say_so(decode):
    assert decode['config']['compile'] is False and 'compiled' not in decode['markdown']


def test_in_its_turn_a_kernel_alone_is_plain_and_afterwards_fast_again(program, monkeypatch):
    b, used = program(rounds=1, warmup=0), []
    monkeypatch.setattr(kernels, 'use', lambda form, **others: used.append((form, others)))
    forms = 'none', 'rms_norm', 'all'
    b.take_turns([({'variant': 'mla', 'plain': form, 'seconds': {}}, lambda: {'work': 1.0}) for form in forms])
    assert used == [('fast', {}), ('fast', {}), ('fast', {'rms_norm': 'plain'}), ('plain', {})]       # first the machine


def test_parts_are_the_profilers_lines_of_one_turn_in_the_form_of_its_row(program):
    b, square, forms = program(parts=2), torch.ones(300, 300), []

    def turn():
        forms.append(dict(kernels._fast))
        return [square @ square for _ in range(3)]
    label, *lines = b.parts_of({'variant': 'mla', 'plain': 'rms_norm'}, turn).strip().splitlines()
    [product] = [line.split() for line in lines if 'aten::mm' in line]
    assert label == 'mla rms_norm:' and product[-1] == '3'            # calls
    assert forms == [{name: name != 'rms_norm' for name in kernels.NAMES}]
    kernels.use('fast')


# ---------------------------------------------------------------------------------------------------------------------
# Beside transformers

def test_the_peer_trains_the_same_model_in_both_dtypes(beside):
    result = beside['train']
    assert [(r['variant'], r['library'], r['dtype']) for r in result['rows']] == [
        (attn, library, dtype) for attn in ('gqa', 'mla') for library in ('ours', 'transformers')
        for dtype in ('float32', 'bfloat16')]
    for attn in ('gqa', 'mla'):
        peers = {r['dtype']: r for r in result['rows'] if (r['variant'], r['library']) == (attn, 'transformers')}
        best = min(peers.values(), key=lambda r: statistics.median(r['seconds']['update']))
        assert [d for d, r in peers.items() if r.get('best_update')] == [best['dtype']]
        for dtype, theirs in peers.items():
            ours, seconds = find(result, variant=attn, library='ours', dtype=dtype), theirs['seconds']['update']
            assert all(theirs[k] == ours[k] for k in ('params_total', 'flops_per_token'))
            same_ratio(ours['update_speed']['to transformers'], ours['seconds']['update'], seconds)
            same_ratio(ours['update_speed']['to its best'], ours['seconds']['update'], best['seconds']['update'])
            assert theirs['experts_implementation'] in ('eager', 'grouped_mm', 'batched_mm')
    assert result['markdown'].count(', best |') == 2 and result['environment']['transformers']


def test_the_peer_decodes_with_a_cache_of_the_same_size(beside):
    result = beside['decode']
    ours = [r for r in result['rows'] if r['library'] == 'ours']
    assert [r['mode'] for r in ours] == ['decode'] * 2 + ['absorb', 'expand'] * 2
    for row in ours:
        peers = [r for r in result['rows'] if (r['variant'], r['library']) == (row['variant'], 'transformers')]
        same = next(r for r in peers if r['dtype'] == row['dtype'])
        assert same['cache_bytes'] == row['cache_bytes']
        for measure in ('prefill', 'decode'):
            best = min(peers, key=lambda r: statistics.median(r['seconds'][measure]))
            mine = row['seconds'][measure]
            same_ratio(row[f'{measure}_speed']['to transformers'], mine, same['seconds'][measure])
            same_ratio(row[f'{measure}_speed']['to its best'], mine, best['seconds'][measure])


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be done

@pytest.mark.parametrize('knob, value, words', [
    ('variants', 'baseline,enhansed', ['enhansed', 'one of', 'enhanced']), ('variants', '', ['--variants=']),
    ('variants', 'lora,lora', ['each once']), ('prompts', '128,x', ['--prompts=128,x', 'whole numbers']),
    ('prompts', '', ['whole numbers']), ('batch_sizes', '0', ['--batch_sizes=0']),
    ('dtype', 'float16', ['float16', 'bfloat16']), ('rounds', 0, ['rounds', 'at least 1']),
    ('warmup', -1, ['warmup', 'at least 0']), ('matrix_size', -1, ['matrix_size', 'at least 0']), ('micro_batch_sizes', 8, ['batch_size', 'at least 8']),
    ('contexts', '3,7', ['--contexts=3,7', 'divide', '--batch_size=3']), ('n_embd', 62, ['n_embd', 'n_head']),
    ('experts', '1,8', ['top_k', 'n_expert']), ('kv_lora_rank', 8, ['kv_lora_rank', 'baseline']),
    ('plain', 'rope', ['--plain=rope', 'rms_norm']),
    ('device', 'tpu', ['tpu', 'cpu']), ('device', 'mps', ['mps', '--device=auto']),
    ('device', 'cuda:99', ['no cuda:99']), ('generate', True, ['unknown knob']),
    ('task', 'trian', ['trian', 'did you mean train']), ('round', 3, ['did you mean', 'rounds'])])
def test_what_cannot_be_done_is_said_in_one_line(knob, value, words, refused):
    refused(*words, **{knob: value})


def test_a_folder_for_a_file_and_a_place_that_cannot_be_written_to_are_told_at_once(refused, tmp_path):
    (tmp_path / 'x.json').mkdir()
    refused(tmp_path, 'directory', '--out=', out=tmp_path / 'x.json')
    (tmp_path / 'x.json').rmdir()
    for out in (tmp_path / 'x', tmp_path / 'x.md', '.'):                    # JSON and Markdown go where it says, or nowhere
        refused(f'--out={out}: give a FILE.json', out=out)
    (tmp_path / 'file').write_text('')
    refused('x.json', '--out=', out=tmp_path / 'file' / 'x.json')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file']


def test_without_transformers_its_peer_is_refused_in_one_line(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)          # as if it were not installed
    refused('transformers', '--peer=none', peer='transformers')


def test_a_network_that_transformers_does_not_have_is_refused_in_one_line(refused):
    pytest.importorskip('transformers', reason='transformers, the peer, is not installed')
    refused('router=sigmoid', '--peer=none', peer='transformers', variants='mla,baseline', router='sigmoid')


# ---------------------------------------------------------------------------------------------------------------------
# gpu.sh

@pytest.fixture
def gpu(tmp_path):
    """gpu(**environment): gpu.sh with a Python that is killed, or takes its time, where the files fails, slow say so."""
    if not shutil.which('timeout'):
        pytest.skip('gpu.sh is for Linux, where timeout is')
    log, fake = tmp_path / 'log', tmp_path / 'python'
    fake.write_text(f"""#!/usr/bin/env bash
echo "$@" >> {log}
if [ -e {tmp_path}/fails ] && [[ "$*" == *$(cat {tmp_path}/fails)* ]]; then exit 137; fi
if [ -e {tmp_path}/slow ] && [[ "$*" == *$(cat {tmp_path}/slow)* ]]; then sleep 30; fi
if [ "$1" = train.py ]; then
    for a in "$@"; do declare "${{a#--}}" 2> /dev/null; done
    mkdir -p "out/$experiment/$name-s$seed" && echo '{{}}' > "out/$experiment/$name-s$seed/result.json"
fi
""")
    fake.chmod(0o755)
    (tmp_path / 'repository').mkdir()
    shutil.copytree(REPOSITORY / 'config', tmp_path / 'repository/config')
    plan = tmp_path / 'repository/config/gpu.plan'
    plan.write_text(re.sub('(?m)^seeds .*', 'seeds 0 1', plan.read_text()))
    for name in ('gpu.sh', 'reproduce.sh'):                         # they go to the folder in which they lie
        shutil.copy(REPOSITORY / name, tmp_path / 'repository')

    def run(*arguments, **environment):
        log.write_text('')
        done = subprocess.run(['./gpu.sh', *arguments], cwd=tmp_path / 'repository', capture_output=True, text=True,
                              env={'PATH': os.environ['PATH'], 'PYTHON': str(fake), **environment})
        return SimpleNamespace(code=done.returncode, out=done.stdout + done.stderr, asked=log.read_text().splitlines())
    run.folder = tmp_path
    return run


def programs(run):
    return [line.split()[0] for line in run.asked]


def test_gpu_sh_skips_what_is_done_and_tries_again_what_failed(gpu):
    (gpu.folder / 'fails').write_text('--prompts=8192')
    first = gpu('--dataset=/data/code', OUT=str(gpu.folder / 'results'))
    assert first.code == 1 and 'failed: decode-8192' in first.out
    assert programs(first) == ['-m', *['bench.py'] * 5, *['train.py'] * 14, 'analyze.py']
    assert all('--dataset=/data/code' in line for line in first.asked if line.startswith('train.py'))
    assert len(list((gpu.folder / 'results/experiment').glob('*-s*.json'))) == 14
    (gpu.folder / 'fails').unlink()
    second = gpu(OUT=str(gpu.folder / 'results'))
    assert second.code == 0 and 'all is done' in second.out
    assert programs(second) == ['bench.py'] and '--prompts=8192' in second.asked[0]
    assert gpu(OUT=str(gpu.folder / 'results')).asked == []


def test_gpu_sh_stops_when_its_time_is_over_and_goes_on_in_the_next_call(gpu):
    (gpu.folder / 'slow').write_text('--prompts=32768')
    first = gpu(BUDGET='2')
    assert first.code == 75 and 'call again' in first.out and programs(first) == ['-m', *['bench.py'] * 5]
    (gpu.folder / 'slow').write_text('--name=mqa --seed=0')
    second = gpu(BUDGET='5')
    assert second.code == 75 and programs(second)[:3] == ['bench.py', 'train.py', 'train.py']
    (gpu.folder / 'slow').unlink()
    third = gpu(BUDGET='0')
    assert third.code == 0 and '--name=mqa --seed=0' in third.asked[0], 'finished runs are not run again'


def test_a_rehearsal_is_the_same_list_of_stages_at_a_size_of_seconds_on_the_cpu(gpu):
    run = gpu(REHEARSE='1')
    assert run.code == 0 and programs(run) == ['-m', *['bench.py'] * 4, *['train.py'] * 7, 'analyze.py']
    assert all('--device=cpu' in line for line in run.asked if line.startswith(('bench.py', 'train.py')))
    assert all(word in line for line in run.asked if line.startswith('train.py')
               for word in ('config/smoke.py', '--experiment=rehearsal'))
