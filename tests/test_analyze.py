"""analyze.py and figures.py: honest reports, and the program as it is used."""

import copy
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import NETWORKS, experiment, result, save

import analyze
import figures
import stats
from result import disagreements, load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def cli(*arguments, **environment):
    return subprocess.run([sys.executable, os.path.join(ROOT, 'analyze.py'), *map(str, arguments)], text=True,
                          capture_output=True, encoding='utf-8', timeout=60,
                          env={**os.environ, **environment})


def analysed(folder, baseline='baseline', metric='val_loss', margin=0.01):
    arms = load(str(folder), baseline)
    return arms, analyze.compare(arms, baseline, metric, margin)


def report_of(folder, **options):
    arms, r = analysed(folder, **options)
    return analyze.report(arms, r, [], 'test')


# ---- what can and cannot be said

def verdict_of(tmp_path, d, margin=0.01, metric='val_loss'):
    runs = [run for seed, x in enumerate(d) for run in (result('baseline', seed, 4 + seed / 100),
                                                        result('lora', seed, 4 + seed / 100 + x))]
    _, r = analysed(save(tmp_path, *runs), margin=margin, metric=metric)
    return r['comparisons']['lora']


@pytest.mark.parametrize('d, verdict', [
    ([-0.030, -0.031, -0.028, -0.033, -0.029], 'better'),
    ([0.030, 0.031, 0.028, 0.033, 0.029], 'worse'),
    ([0.0003, -0.0002, 0.0001, -0.0004, 0.0002], 'equivalent'),
    ([0.0030, 0.0031, 0.0028, 0.0033, 0.0029], 'equivalent'),
    ([0.03, -0.02, 0.01, -0.04, 0.02], 'undecided'),
    ([0.0, 0.0, 0.0], 'equivalent'),
    ([0.25, 0.25, 0.25], 'undecided'),
    ([0.02], 'not tested'),
])
def test_each_comparison_gets_the_one_verdict_that_its_numbers_allow(tmp_path, d, verdict):
    c = verdict_of(tmp_path, d)
    assert c['verdict'] == verdict
    assert c['sentence'].startswith('lora: ' + verdict) and f'{len(d)}' in c['sentence']


def test_equivalence_too_is_corrected_for_the_number_of_variants(tmp_path):
    d = [0.011, -0.003, 0.008, -0.006, 0.003]
    assert 0.025 < verdict_of(tmp_path / 'one', d)['tost'] < 0.05
    assert verdict_of(tmp_path / 'one', d)['verdict'] == 'equivalent'
    runs = [result(name, seed, 4 + seed / 100 + (name != 'baseline') * x)
            for seed, x in enumerate(d) for name in ('baseline', 'lora', 'enhanced')]
    _, r = analysed(save(tmp_path / 'two', *runs))
    assert [c['verdict'] for c in r['comparisons'].values()] == ['undecided', 'undecided']


def test_undecided_tells_an_interval_that_excludes_zero_until_corrected_from_one_that_does_not(tmp_path):
    d = [0.035, 0.005, 0.030, 0.002, 0.028]
    assert verdict_of(tmp_path / 'one', d)['verdict'] == 'worse'
    runs = [result(name, seed, 4 + seed / 100 + (name != 'baseline') * x)
            for seed, x in enumerate(d) for name in ('baseline', 'lora', 'enhanced')]
    _, r = analysed(save(tmp_path / 'two', *runs))
    for c in r['comparisons'].values():
        assert c['verdict'] == 'undecided' and c['low'] > 0 and c['p'] < 0.05 < c['p_holm']
        assert 'by itself excludes zero' in c['sentence'] and 'neither zero' not in c['sentence']
    assert 'neither zero' in verdict_of(tmp_path / 'three', [0.03, -0.02, 0.01, -0.04, 0.02])['sentence']


def test_a_small_difference_that_is_measurable_is_equivalent_and_says_so(tmp_path):
    assert 'though measurably higher' in verdict_of(
        tmp_path, [0.0030, 0.0031, 0.0028, 0.0033, 0.0029])['sentence']


def test_higher_accuracy_is_better_although_the_difference_is_positive(tmp_path):
    c = verdict_of(tmp_path, [-0.30, -0.31, -0.28, -0.33, -0.29], metric='val_accuracy')   # -0.1 x the loss
    assert c['mean'] > 0 and c['verdict'] == 'better'


def test_undecided_names_an_n_above_the_present_one(tmp_path):
    for i, d in enumerate([[0.03, -0.02, 0.01, -0.04, 0.02], [0.011, 0.001, 0.010, -0.001, 0.007]]):
        c = verdict_of(tmp_path / str(i), d)
        assert c['verdict'] == 'undecided' and (c['needed_n'] <= len(d)) == (i == 1)
        assert int(c['sentence'].split('about n = ')[1].split()[0]) > len(d)


def test_differences_equal_up_to_rounding_give_no_t_statistic():
    """0.1 - 0.0, 0.3 - 0.2, ... differ in the last bit; a t from that spread would be 1e15."""
    base = [4.1, 4.2, 4.3, 4.7]
    c = stats.paired([x + 0.1 for x in base], base, 0.01)
    assert c['constant'] and c['t'] is c['p'] is c['d_z'] is None and c['mean'] == pytest.approx(0.1)


def test_one_seed_gives_no_sd_no_interval_and_no_effect_size_and_says_why(tmp_path):
    text = report_of(save(tmp_path, *experiment(seeds=[0])))
    assert 'lora: not tested (n = 1)' in text and 'no standard deviation' in text
    effects = text.split('## Effect sizes')[1].split('d divides')[0]
    rows = text.split('Cache B/token')[1].split('Time:')[0]
    assert 'lora' not in effects and 'lora' in rows and '±' not in rows


def test_two_seeds_say_that_one_degree_of_freedom_is_little(tmp_path):
    text = report_of(save(tmp_path, *experiment(seeds=[0, 1])))
    assert 'n = 2. The spread is estimated from one degree of freedom' in text
    assert 'cannot fall below 0.5000 with n = 2' in text


def test_the_sign_flip_floor_is_a_caveat_at_five_seeds_and_none_at_eight(tmp_path):
    assert 'cannot fall below 0.0625 with n = 5' in report_of(save(tmp_path / 'five', *experiment(range(5))))
    assert 'cannot fall below' not in report_of(save(tmp_path / 'eight', *experiment(range(8))))


def test_unpaired_seeds_are_named_and_left_out_of_the_pairs(tmp_path):
    runs = experiment(range(4)) + [result('lora', 9, 5.9), result('baseline', 7, 1.0)]
    arms, r = analysed(save(tmp_path, *runs))
    c = r['comparisons']['lora']
    assert c['seeds'] == [0, 1, 2, 3] and c['only_variant'] == [9] and c['only_baseline'] == [7]
    assert abs(c['mean']) < 0.05
    text = analyze.report(arms, r, [], 'test')
    assert 'lora seed(s) 9: no complete baseline run of that seed' in text
    assert 'lora: no run for seed(s) 7' in text


@pytest.mark.parametrize('status', ['diverged', 'interrupted', 'running'])
def test_a_run_that_is_not_complete_is_named_and_not_counted(tmp_path, status):
    runs = experiment(range(4)) + [result('baseline', 4, 4.0),
                      result('lora', 4, 4.0, status=status, error='loss is NaN')]
    runs[-1]['final'] = None if status == 'running' else {**runs[-1]['final'], 'val_loss': None}
    arms, r = analysed(save(tmp_path, *runs))
    assert r['arms']['lora']['seeds'] == [0, 1, 2, 3] and r['comparisons']['lora']['n'] == 4
    text = analyze.report(arms, r, [], 'test')
    assert f'lora seed 4: {status}' in text and 'loss is NaN' in text and 'over the seeds that did' in text


def test_an_arm_without_any_complete_run_is_reported_without_numbers(tmp_path):
    runs = experiment(range(3)) + [result('mla', s, 4.0, status='diverged', final=None) for s in range(3)]
    text = report_of(save(tmp_path, *runs))
    assert 'mla: not tested (n = 0' in text and '| mla | 0 | - | - |' in text


def test_the_aa_arm_is_reported_as_noise_floor_and_left_out_of_holm(tmp_path):
    runs = experiment(range(4))
    runs += [{**copy.deepcopy(run), 'name': 'baseline-again'} for run in runs if run['name'] == 'baseline']
    arms, r = analysed(save(tmp_path, *runs))
    assert r['family'] == ['lora', 'enhanced'] and r['comparisons']['baseline-again']['d'] == [0.0] * 4
    text = analyze.report(arms, r, [], 'test')
    assert 'largest difference 0.0000 nats. The same seed gives the same number' in text
    assert 'baseline over 4 seeds: sd ' in text


def test_a_variant_that_is_the_baseline_to_the_last_digit_is_suspected(tmp_path):
    runs = [result(name, seed, 4 + seed / 50, model__params_total=13_200_000) for seed in range(3)
            for name in ('baseline', 'lora')]
    assert 'was it the same network?' in report_of(save(tmp_path, *runs))


def test_the_report_states_epochs_parameters_and_a_loss_above_unigram(tmp_path):
    runs = [{**run} for run in experiment(range(3))]
    for run in runs:
        run['data'].update(train_tokens=51200, unigram_loss=3.0)
    text = report_of(save(tmp_path, *runs))
    assert 'saw its training data 2.00 times' in text
    assert 'lora has -9.1% parameters against baseline (-16.9% active)' in text
    assert 'is not below the 3.0000 of token frequencies' in text


def test_pareto_holds_whatever_nothing_else_beats_on_both(tmp_path):
    runs = [result(name, 0, loss)
                   for name, loss in [('baseline', 4.0), ('gqa', 4.1), ('mqa', 4.2), ('lora', 4.05)]]
    runs += [result('baseline-again', 0, 3.9)]         # the same network: does not beat the baseline
    _, r = analysed(save(tmp_path, *runs))
    assert r['pareto']['params_total'] == ['baseline', 'lora']         # gqa, mqa: larger and worse than lora
    assert r['pareto']['kv_cache_bytes_per_token_16bit'] == ['baseline', 'lora']


def test_the_table_has_the_mean_and_the_spread_of_numpy(tmp_path):
    runs = experiment()
    losses = [run['final']['val_loss'] for run in runs if run['name'] == 'lora']
    row = next(line for line in report_of(save(tmp_path, *runs)
               ).splitlines() if line.startswith('| lora | 8 |'))
    assert f'{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}' in row
    assert '| 12.000 | 5.900 | 1152 |' in row


def test_expert_load_is_sorted_before_it_is_averaged(tmp_path):
    """Two seeds whose busiest experts differ: averaged by index they would look even."""
    runs = [result('baseline', seed, final__expert_load=[load])
                   for seed, load in enumerate([[0.7, 0.3], [0.3, 0.7]])]
    _, r = analysed(save(tmp_path, *runs))
    assert np.allclose(r['arms']['baseline']['load_by_rank'], [[1.4, 0.6]])


def test_the_text_forest_has_a_line_per_variant_with_zero_margin_and_mean(tmp_path):
    _, r = analysed(save(tmp_path, *experiment()))
    lines = analyze.text_forest(r)
    lora, enhanced = (next(line for line in lines if line.startswith(name)) for name in ('lora', 'enhanced'))
    assert lora.index('o', 6) > lora.index('|') > enhanced.index('o', 9)
    assert lora.count(':') >= 1 and '---' in lora


# ---- the program as it is used

def test_importing_analyze_needs_neither_torch_nor_scipy_nor_matplotlib():
    code = 'import sys, analyze; print(sorted({"torch", "scipy", "matplotlib"} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stderr


def test_the_report_is_printed_and_written_and_the_same_bytes_each_time(tmp_path):
    one, two = tmp_path / 'one' / 'laptop', tmp_path / 'two' / 'laptop'
    runs = experiment(range(3))
    save(one, *runs)
    two.mkdir(parents=True)
    random.Random(0).shuffle(runs)
    for run in runs:                                    # flat files, in another order, their keys as well
        shuffled = {key: run[key] for key in sorted(run, reverse=True)}
        (two / f'{run["name"]}-s{run["config"]["seed"]}.json').write_text(json.dumps(shuffled))
    a, b = cli(one, PYTHONHASHSEED='1'), cli(two, '--plots=False', PYTHONHASHSEED='2')
    assert (a.returncode, b.returncode) == (0, 0), a.stderr + b.stderr
    assert a.stdout == b.stdout == (
        one / 'report.md').read_text('utf-8') == (two / 'report.md').read_text('utf-8')
    assert (one / 'report.json').read_bytes() == (two / 'report.json').read_bytes()
    assert str(tmp_path) not in a.stdout + (one / 'report.json').read_text()
    again = cli(one, '--plots=False')                 # its own report.json among the runs changes nothing
    assert again.stdout == a.stdout


def test_report_json_is_strict_json_with_the_numbers_of_the_report(tmp_path):
    folder = save(tmp_path, *experiment(range(2)), result('mla', 0, status='diverged', final=None))
    assert cli(folder, '--plots=False').returncode == 0
    def refuse(text):
        raise AssertionError(text)
    data = json.loads((tmp_path / 'report.json').read_text(), parse_constant=refuse)
    _, r = analysed(folder)
    assert data['comparisons']['lora']['mean'] == pytest.approx(r['comparisons']['lora']['mean'], rel=1e-11)
    assert data['comparisons']['lora']['verdict'] == r['comparisons']['lora']['verdict']


def test_disagreeing_runs_exit_2_and_with_force_stand_in_the_report(tmp_path):
    folder = save(tmp_path, *experiment(range(3)), result('baseline', 3),
                  result('lora', 3, data__val_sha256='ef' * 32))
    refused = cli(folder, '--plots=False')
    assert refused.returncode == 2 and refused.stdout == '' and len(refused.stderr.splitlines()) == 1
    assert all(word in refused.stderr for word in ('data.val_sha256', 'lora seed 3', '--force=True'))
    assert not (tmp_path / 'report.md').exists()
    forced = cli(folder, '--force=True', '--plots=False')
    assert forced.returncode == 0 and 'not comparable' in forced.stdout and 'data.val_sha256' in forced.stdout


@pytest.mark.parametrize('arguments, words', [
    (['nowhere'], ['nowhere', 'no such folder']),
    (['{}', '--margin=0'], ['margin', 'above 0']),
    (['{}', '--baseline=basline'], ['basline', 'baseline']),
    (['{}', '--metric=loss'], ['metric']),
    (['{}', '--margni=0.1'], ['margin']),
    (['{}/empty'], ['empty', 'no result files']),
])
def test_a_wrong_command_line_is_one_line_on_stderr_and_exit_2(tmp_path, arguments, words):
    save(tmp_path, result())
    (tmp_path / 'empty').mkdir()
    done = cli(*(argument.replace('{}', str(tmp_path)) for argument in arguments))
    assert done.returncode == 2 and done.stdout == '' and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words)


def test_another_metric_and_baseline_are_used_and_named(tmp_path):
    done = cli(save(tmp_path, *experiment(range(3))),
               '--metric=val_bits_per_byte', '--baseline=lora', '--plots=False')
    assert done.returncode == 0, done.stderr
    assert 'validation bits per byte against lora' in done.stdout
    assert 'is bits/byte here, not nats' in done.stdout
    assert 'baseline: ' in done.stdout.split('## What')[0]


def test_without_matplotlib_one_line_says_so_and_the_report_is_the_same(tmp_path):
    pytest.importorskip('matplotlib', reason='compares with and without matplotlib')
    folder = save(tmp_path / 'runs', *experiment(range(3)))
    with_it = cli(folder)
    hide = tmp_path / 'hide' / 'matplotlib'
    hide.mkdir(parents=True)
    (hide / '__init__.py').write_text('raise ImportError("hidden")')
    without = cli(folder, PYTHONPATH=str(hide.parent))
    assert without.returncode == 0 and without.stdout == with_it.stdout
    assert len(without.stderr.splitlines()) == 1 and 'pip install matplotlib' in without.stderr


def test_every_figure_the_report_shows_is_written(tmp_path):
    pytest.importorskip('matplotlib', reason='no figures without matplotlib')
    runs = experiment(range(3), {name: 0.01 * i for i, name in enumerate(NETWORKS)})
    folder = save(tmp_path, *runs, result('gqa', 3, status='diverged', final=None))
    arms, r = analysed(folder)
    figures.draw(arms, r, folder)
    shown = [line.split('](')[1].rstrip(')') for line in analyze.report(
        arms, r, [], 'x').splitlines() if line.startswith('![')]
    assert shown == ['forest.png', 'pairs.png', 'curves.png', 'efficiency.png', 'experts.png']
    for file in shown:
        content = (tmp_path / file).read_bytes()
        assert content.startswith(b'\x89PNG') and len(content) > 10_000


@pytest.mark.parametrize('runs', [[result('baseline', 0)], [result('baseline', 0, history=[])],
                                  [result('baseline', 0, status='diverged', final=None)],
                                  [result('baseline', 0), result('lora', 1)],
                                  [result('baseline', 0, final__expert_load=[]), result('lora', 0)]])
def test_figures_and_report_survive_runs_with_little_in_them(tmp_path, runs):
    pytest.importorskip('matplotlib', reason='no figures without matplotlib')
    arms, r = analysed(save(tmp_path, *runs))
    text = analyze.report(arms, r, [], 'x')
    figures.draw(arms, r, str(tmp_path))
    assert sorted(p.name for p in tmp_path.glob('*.png')) == sorted(
        line.split('](')[1].rstrip(')') for line in text.splitlines() if line.startswith('!['))
    assert 'nan' not in text.lower().replace('finance', '') and 'None' not in text.replace('None:', '')


@pytest.mark.parametrize('names, seeds', [(6, 167), (125, 8)])
def test_a_thousand_result_files_take_less_than_5_seconds(tmp_path, names, seeds):
    labels = ['baseline', *(f'arm{i}' for i in range(names - 1))]
    rng = np.random.default_rng(0)
    for name in labels:
        for seed in range(seeds):
            save(tmp_path, result(name, seed, 4 + float(rng.normal(0, 0.01))))
    start = time.process_time()
    arms, r = analysed(tmp_path)
    assert disagreements(arms, 'baseline') == []
    text = analyze.report(arms, r, [], 'many')
    assert sum(len(arm) for arm in arms.values()) >= 1000 and len(text) > 10_000
    assert time.process_time() - start < 5
