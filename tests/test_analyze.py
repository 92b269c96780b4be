"""analyze.py and figures.py: honest reports, and the program as it is used."""

import base64
import copy
import json
import os
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import forked
import numpy as np
import pytest
from conftest import experiment, refusal, result, save

import analyze
import figures
import stats
from result import disagreements, load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def cli(*arguments, **environment):
    if any(name.startswith('PYTHON') for name in environment):          # only a new interpreter looks at these
        return subprocess.run([sys.executable, 'analyze.py', *map(str, arguments)], cwd=ROOT, timeout=60,
                              capture_output=True, encoding='utf-8', env={**os.environ, **environment})
    return forked.run('analyze.py', *arguments, timeout=60, **environment)


def analysed(folder, baseline='baseline', metric='val_loss', margin=0.01, contrasts=(), pairs=0):
    arms = load(str(folder), baseline)
    return arms, analyze.compare(arms, baseline, metric, margin, contrasts, pairs)


def report_of(folder, **options):
    return '\n\n'.join(analyze.report(*analysed(folder, **options)))


def section(text, heading):
    return text.split(f'## {heading}\n')[1].split('\n## ')[0]


# ---- what can and cannot be said

def verdict_of(tmp_path, d, margin=0.01, arms=('lora',)):
    """lora - baseline, where each of the arms differs from the baseline by the same d."""
    runs = [result(name, seed, 4 + seed / 100 + (name != 'baseline') * x)
            for seed, x in enumerate(d) for name in ('baseline', *arms)]
    return analysed(save(tmp_path, *runs), margin=margin)[1]['comparisons']['lora - baseline']


@pytest.mark.parametrize('d, verdict, words', [
    ([-0.030, -0.031, -0.028, -0.033, -0.029], 'better', 'lies wholly beyond the margin'),
    ([0.030, 0.031, 0.028, 0.033, 0.029], 'worse', 'n = 5 pairs'),
    ([0.0003, -0.0002, 0.0001, -0.0004, 0.0002], 'equivalent', 'within 0.01 nats (TOST'),
    ([0.0030, 0.0031, 0.0028, 0.0033, 0.0029], 'equivalent', 'though measurably higher'),
    ([0.03, -0.02, 0.01, -0.04, 0.02], 'undecided', 'neither zero nor a difference of 0.01 nats is ruled out'),
    ([0.02, -0.004, 0.012, 0.0, 0.006], 'undecided', 'better by 0.01 nats or more is ruled out; no difference, or worse by'),
    ([-0.02, 0.004, -0.012, 0.0, -0.006], 'undecided', 'worse by 0.01 nats or more is ruled out; no difference, or better by'),
    ([0.0, 0.0, 0.0], 'equivalent', 'all 3 paired differences from baseline are 0.0000 nats; was it the same network?'),
    ([0.25, 0.25, 0.25], 'undecided', 'all 3 paired differences from baseline are +0.2500 nats, so there is no spread'),
    ([0.02], 'not tested', '(n = 1): one pair has no standard deviation'),
])
def test_each_comparison_gets_the_one_verdict_that_its_numbers_allow(tmp_path, d, verdict, words):
    c = verdict_of(tmp_path, d)
    assert c['verdict'] == verdict
    named = 'lora - baseline' if verdict == 'not tested' else 'lora'
    assert c['sentence'].startswith(f'{named}: {verdict}') and words in c['sentence']


def test_equivalence_too_is_corrected_for_the_number_of_variants(tmp_path):
    d = [0.011, -0.003, 0.008, -0.006, 0.003]
    alone = verdict_of(tmp_path / 'one', d)
    assert alone['verdict'] == 'equivalent' and 0.025 < alone['tost'] < 0.05
    assert verdict_of(tmp_path / 'two', d, arms=('lora', 'enhanced'))['verdict'] == 'undecided'


def test_undecided_tells_an_interval_that_excludes_zero_until_corrected_from_one_that_does_not(tmp_path):
    d = [0.035, 0.005, 0.030, 0.002, 0.028]
    assert verdict_of(tmp_path / 'one', d)['verdict'] == 'worse'
    c = verdict_of(tmp_path / 'two', d, arms=('lora', 'enhanced'))
    assert c['verdict'] == 'undecided' and c['low'] > 0 and c['p'] < 0.05 < c['p_holm']
    assert 'by itself excludes zero' in c['sentence'] and 'neither zero' not in c['sentence']


def test_undecided_names_an_n_above_the_present_one(tmp_path):
    for i, d in enumerate([[0.03, -0.02, 0.01, -0.04, 0.02], [0.011, 0.001, 0.010, -0.001, 0.007]]):
        c = verdict_of(tmp_path / str(i), d)
        assert c['verdict'] == 'undecided' and (c['needed_n'] <= len(d)) == (i == 1)
        assert int(c['sentence'].split('about n = ')[1].split()[0]) > len(d)


def test_a_comparison_waits_for_its_planned_pairs_and_takes_back_no_verdict_of_another_when_they_come(tmp_path):
    """From this project: after six of eight pairs two arms were `equivalent` and two others `worse`; both were taken back."""
    rng = np.random.default_rng(0)
    runs = [result(name, seed, 3 + shift + rng.normal(0, 0.002)) for name, seeds, shift in
            (('baseline', 8, 0), ('gqa', 8, 0.0033), ('mqa', 6, 0.5)) for seed in range(seeds)]
    contrasts, folder = [('gqa', 'baseline'), ('mqa', 'baseline')], save(tmp_path, *runs)
    early, (arms, waiting) = (analysed(folder, contrasts=contrasts, pairs=pairs) for pairs in (0, 8))
    c = early[1]['comparisons']['mqa - baseline']
    assert c['verdict'] == 'worse' and c['p_holm'] < 1e-6
    c, gqa = (waiting['comparisons'][f'{name} - baseline'] for name in ('mqa', 'gqa'))
    assert c['verdict'] == 'undecided' and c['p_holm'] is c['tost_holm'] is c['sign_flip_holm'] is None and c['p'] < 1e-6
    assert '6 of 8 planned pairs' in c['sentence'] and c['sentence'].endswith('a verdict waits for the other 2.')
    assert gqa['p_holm'] == pytest.approx(2 * gqa['p']) and early[1]['comparisons']['gqa - baseline']['p_holm'] == gqa['p']
    assert 'The plan has 8 pairs a comparison' in '\n'.join(analyze.report(arms, waiting))
    last = [result('mqa', seed, 3 + rng.normal(0, 0.002)) for seed in (6, 7)]
    c = analysed(save(tmp_path, *last), contrasts=contrasts, pairs=8)[1]['comparisons']['mqa - baseline']
    assert c['n'] == 8 and c['to_come'] == 0 and c['p_holm'] is not None and 'planned pairs' not in c['sentence']
    save(tmp_path, *(result('lora', seed, 3) for seed in range(8)))     # in no contrast: described, not tested
    for pairs, words in ((8, ''), (5, 'More pairs than the 5 planned: gqa - baseline (8), mqa - baseline (8). If some')):
        arms, r = analysed(folder, contrasts=contrasts, pairs=pairs)
        assert words in (caveats := '\n'.join(analyze.caveats(arms, r))) and ('More pairs' in caveats) == bool(words)


def test_without_contrasts_too_an_arm_that_is_still_to_get_its_pairs_counts_in_the_family(tmp_path):
    losses = [3.535, 3.505, 3.530, 3.502, 3.528]            # a p of 0.043 alone, and twice that beside another
    runs = [result(name, seed, 3.5 if name == 'baseline' else loss) for name in ('baseline', 'lora', 'mqa')
            for seed, loss in enumerate(losses) if name != 'mqa' or seed == 0]
    early = analysed(save(tmp_path, *runs), pairs=5)[1]
    late = analysed(save(tmp_path, *(result('mqa', seed, loss) for seed, loss in enumerate(losses))), pairs=5)[1]
    for r in (early, late):
        c = r['comparisons']['lora - baseline']
        assert r['tests'] == 2 and c['verdict'] == 'undecided' and c['p'] < 0.05 < c['p_holm'] == 2 * c['p']


@pytest.mark.parametrize('shift, lost, verdict', [
    (-0.05, ['lora'], 'undecided'), (0.0, ['lora'], 'undecided'), (0.05, ['lora'], 'worse'), (0.005, ['lora'], 'worse'),
    (-0.05, ['baseline'], 'better'), (-0.005, ['baseline'], 'better'), (0.05, ['baseline'], 'undecided'),
    (0.05, ['lora', 'baseline'], 'undecided')])
def test_runs_that_diverged_leave_no_verdict_in_favour_of_their_arm(tmp_path, shift, lost, verdict):
    runs = [result(name, seed, 4 + seed / 100 + (name == 'lora') * (shift + d))
            for seed, d in enumerate([0.0003, -0.0002, 0.0001, -0.0004, 0.0002]) for name in ('baseline', 'lora')]
    runs += [result(name, seed, 4.0, status='diverged' if name in lost else 'complete', error='loss is NaN')
             for name in ('baseline', 'lora') for seed in (5, 7)]
    c = analysed(save(tmp_path, *runs), pairs=7)[1]['comparisons']['lora - baseline']
    assert (c['n'], c['to_come'], c['verdict']) == (5, 0, verdict)
    if verdict == 'undecided':
        assert all(f'{name} diverged with seed(s) 5, 7' in c['sentence'] for name in lost)
        assert 'the 5 pairs that are left' in c['sentence'] and 'of runs that went well' in c['sentence']


def test_differences_equal_up_to_rounding_give_no_t_statistic():
    """0.1 - 0.0, 0.3 - 0.2, ... differ in the last bit; a t from that spread would be 1e15."""
    base = [4.1, 4.2, 4.3, 4.7]
    c = stats.paired([x + 0.1 for x in base], base, 0.01)
    assert c['constant'] and c['t'] is c['p'] is c['d_z'] is None and c['mean'] == pytest.approx(0.1)


def test_one_seed_gives_no_sd_no_interval_and_no_effect_size_and_says_why(tmp_path):
    text = report_of(save(tmp_path, *experiment(seeds=[0])))
    assert 'lora - baseline: not tested (n = 1): one pair has no standard deviation' in text
    alone = report_of(save(tmp_path / 'alone', result()))
    assert '## Effect sizes' not in text and '## Equivalence' not in text         # rather than empty tables
    assert '## Paired differences' in text and '## Paired differences' not in alone and 'nothing to compare' in alone
    rows = section(text, 'Results').split('Cache B/token')[1]
    assert '| lora | 1 |' in rows and ' ± ' not in rows


def test_the_sign_flip_floor_is_a_caveat_at_five_seeds_and_none_at_eight(tmp_path):
    assert 'cannot fall below 0.0625 with n = 5' in report_of(save(tmp_path / 'five', *experiment(range(5))))
    assert 'cannot fall below' not in report_of(save(tmp_path / 'eight', *experiment(range(8))))


def test_a_budget_that_never_leaves_the_warm_up_is_a_caveat(tmp_path):
    warm = [result(seed=seed, config__warmup_steps=100) for seed in range(2)]
    assert 'still rising at the end: 100 updates of warm-up, 100 in all' in report_of(save(tmp_path / 'warm', *warm))
    past = [result(seed=seed, config__warmup_steps=99) for seed in range(2)]
    assert 'still rising' not in report_of(save(tmp_path / 'past', *past))


def test_unpaired_seeds_are_named_and_left_out_of_the_pairs(tmp_path):
    runs = experiment(range(4)) + [result('lora', 9, 5.9), result('baseline', 7, 1.0)]
    arms, r = analysed(save(tmp_path, *runs))
    c = r['comparisons']['lora - baseline']
    assert c['seeds'] == [0, 1, 2, 3] and abs(c['mean']) < 0.05
    text = '\n'.join(analyze.report(arms, r))
    assert 'baseline: no run for seed(s) 9, which' in text and 'lora: no run for seed(s) 7, which' in text


@pytest.mark.parametrize('status', ['diverged', 'interrupted', 'running'])
def test_a_run_that_is_not_complete_is_named_and_not_counted(tmp_path, status):
    runs = experiment(range(4)) + [result('baseline', 4, 4.0),
                      result('lora', 4, 4.0, status=status, error='loss is NaN')]
    runs[-1]['final'] = None if status == 'running' else {**runs[-1]['final'], 'val_loss': None}
    arms, r = analysed(save(tmp_path, *runs))
    assert r['arms']['lora']['seeds'] == [0, 1, 2, 3] and r['comparisons']['lora - baseline']['n'] == 4
    assert f'- lora seed 4: {status} (loss is NaN); not in the tables' in '\n'.join(analyze.report(arms, r))


def test_an_arm_without_any_complete_run_is_reported_without_numbers(tmp_path):
    runs = experiment(range(3)) + [result('mla', s, 4.0, status='diverged', final=None) for s in range(3)]
    text = report_of(save(tmp_path, *runs))
    assert 'mla - baseline: not tested (n = 0' in text and '| mla | 0 | - | - |' in text


def test_the_aa_arm_is_the_noise_floor_and_no_hypothesis(tmp_path):
    runs = experiment(range(4))
    runs += [{**copy.deepcopy(run), 'name': 'baseline-again'} for run in runs if run['name'] == 'baseline']
    arms, r = analysed(save(tmp_path, *runs))
    assert sorted(r['family']) == ['enhanced - baseline', 'lora - baseline']
    assert r['comparisons']['baseline-again - baseline']['d'] == [0.0] * 4
    same = 'baseline-again repeats 4 seed(s) of baseline: largest difference 0.0000 nats, the same to 12 digits.'
    assert same in '\n'.join(analyze.report(arms, r))
    runs[-1]['final']['val_loss'] += 1e-5
    runs[-1]['final']['val_perplexity'] = None
    assert 'largest difference 1.0e-05 nats, from the machine alone.' in report_of(save(tmp_path, *runs))


# ---- planned contrasts

def planned(tmp_path, seeds=8):
    effects = {'baseline': 0, 'gqa': 0.05, 'mqa': 0.07, 'lora': 0.11, 'mla': 0.02}
    return save(tmp_path, *experiment(range(seeds), effects))


def test_contrasts_are_the_family_and_what_is_not_planned_is_only_described(tmp_path):
    contrasts = [('lora', 'mqa'), ('mqa', 'baseline')]
    arms, r = analysed(planned(tmp_path), contrasts=contrasts)
    assert r['family'] == ['lora - mqa', 'mqa - baseline']
    c, values = r['comparisons']['lora - mqa'], {name: r['arms'][name]['values'] for name in arms}
    assert c['d'] == pytest.approx(np.subtract(values['lora'], values['mqa']))
    assert c['verdict'] == 'worse' and c['sentence'].startswith('lora: worse than mqa: validation loss 0.03')
    assert [c['p_holm'] for c in r['comparisons'].values() if c['planned']] == stats.holm(
        [r['comparisons'][name]['p'] for name in r['family']])
    described = {name for name, c in r['comparisons'].items() if c['verdict'] == 'descriptive'}
    assert described == {'gqa - baseline', 'lora - baseline', 'mla - baseline'}
    assert all(r['comparisons'][name]['p_holm'] is None for name in described)
    text = '\n\n'.join(analyze.report(arms, r))
    verdicts, after = section(text, 'Verdicts').split('Not in the family: described, not tested')
    assert 'The 2 planned contrasts are one family' in verdicts and 'mla' not in verdicts
    assert '- mla - baseline: +0.02' in after and 'better' not in after and 'worse' not in after
    row = next(line for line in text.splitlines() if line.startswith('| mla - baseline | 8 |'))
    assert row.endswith(' | - | - | - | - | - | - | descriptive |')
    seed_3 = next(line for line in section(text, 'Paired differences').splitlines() if line.startswith('| 3 |'))
    assert f'| {c["d"][3]:+.4f} |' in seed_3                               # every single difference


def test_beyond_the_margin_speaks_of_the_simultaneous_interval(tmp_path):
    """Five tests: Bonferroni's interval reaches inside a margin that the single one clears."""
    d = [0.0165, 0.0195, 0.0180, 0.0150, 0.0210, 0.0170, 0.0190, 0.0180]
    alone = verdict_of(tmp_path / 'one', d, margin=0.016)
    assert alone['low'] == alone['low_all'] > 0.016 and 'lies wholly beyond the margin' in alone['sentence']
    assert '(95% interval' in alone['sentence']
    c = verdict_of(tmp_path / 'five', d, margin=0.016, arms=('gqa', 'mqa', 'lora', 'enhanced', 'mla'))
    assert c['verdict'] == 'worse' and c['low'] > 0.016 > c['low_all'] > 0
    assert 'reaches inside the margin' in c['sentence']
    assert f'simultaneous 95% interval {c["low_all"]:+.4f} to {c["high_all"]:+.4f}' in c['sentence']
    half = stats.t_quantile(1 - 0.05 / 5 / 2, 7) * np.std(d, ddof=1) / 8 ** 0.5
    assert (c['low_all'], c['high_all']) == pytest.approx((np.mean(d) - half, np.mean(d) + half))


@pytest.mark.parametrize('contrasts, words', [
    ('lora:mqqa', ['no runs named mqqa', 'did you mean mqa']), ('lora', ['lora is not FIRST:SECOND']),
    ('lora:lora', ['FIRST:SECOND']), ('lora:mqa:mla', ['FIRST:SECOND'])])
def test_a_contrast_that_names_no_two_arms_is_refused(tmp_path, capsys, contrasts, words):
    line = refusal(capsys, analyze.arms_of, [contrasts], load(planned(tmp_path), 'baseline'))
    assert all(word in line for word in words)


def test_a_plan_beside_the_runs_is_reported_while_arms_and_seeds_are_still_missing(tmp_path):
    runs = [run for run in experiment(range(6), {'baseline': 0, 'gqa': 0.05, 'mqa': 0.07, 'lora': 0.14})
            if run['name'] != 'gqa' or run['config']['seed'] < 4]
    runs[-1]['environment']['device_name'] = 'another CPU'
    folder = save(tmp_path / 'laptop', *runs)
    flags = ['--contrasts=lora:mqa,mla48:mqa,gqa:baseline,mla:mla96', '--margin=0.03', '--may_differ=device_name']
    (tmp_path / 'laptop/options.json').write_text(json.dumps(flags))
    done = cli(folder, '--plots=False')
    assert done.returncode == 0, done.stderr
    verdicts = section(done.stdout, 'Verdicts')
    assert '- mla48 - mqa: not tested: no runs of mla48.' in verdicts
    assert '- mla - mla96: not tested: no runs of mla and mla96.' in verdicts
    assert '- lora: worse than mqa' in verdicts and 'n = 6 pairs' in verdicts and 'n = 4 pairs' in verdicts
    caveats = section(done.stdout, 'Caveats')
    assert 'gqa: no run for seed(s) 4-5, which others have' in caveats and '"another CPU" (lora seed 5)' in caveats
    assert 'mla' not in section(done.stdout, 'Paired differences')
    # what waits is in the family: the runs to come take no verdict back
    c = json.loads((tmp_path / 'laptop/report.json').read_text())['comparisons']
    assert 'The 4 planned contrasts are one family' in verdicts and c['lora - mqa']['p'] < c['gqa - baseline']['p']
    assert c['lora - mqa']['p_holm'] == pytest.approx(4 * c['lora - mqa']['p'])
    assert c['gqa - baseline']['p_holm'] == pytest.approx(3 * c['gqa - baseline']['p'])
    figures.draw(*analysed(folder, contrasts=[('mla48', 'mqa'), ('mla', 'mla96')]), str(tmp_path))
    # a baseline without runs can be waited for, too: the arm with the largest cache stands in
    for run in runs:
        if run['name'] == 'baseline':
            (tmp_path / f'laptop/baseline-s{run["config"]["seed"]}/result.json').unlink()
    without = cli(folder, '--plots=False').stdout
    assert '- gqa - baseline: not tested: no runs of baseline.' in without and "That is gqa's." in without
    assert '--baseline=... takes one of them' in cli(folder, '--plots=False', '--baseline=baseline').stderr
    # typed by hand it is a typo
    typed = cli(folder, flags[0], '--baseline=mqa', '--plots=False')
    assert typed.returncode == 2 and typed.stdout == '' and 'no runs named mla48' in typed.stderr


def test_arms_may_differ_in_what_is_named_and_the_report_lists_it(tmp_path):
    runs = experiment(range(2))
    for run in runs:
        run['config']['learning_rate'] = 2e-3 if run['name'] == 'lora' else 1e-3
    folder = save(tmp_path, *runs)
    refused = cli(folder, '--plots=False')
    assert refused.returncode == 2 and 'config.learning_rate: 0.001 (baseline' in refused.stderr
    done = cli(folder, '--may_differ=learning_rate,d_ff', '--plots=False')
    assert done.returncode == 0, done.stderr
    assert re.search(r'- lora: 2 complete \(seeds 0-1\); attn lora, .*learning_rate 0.002', done.stdout)
    assert 'not comparable' not in done.stdout and '--may_differ=learning_rate,d_ff`' in done.stdout
    assert 'd_ff 256' not in done.stdout                                   # named, but all the same
    assert cli(folder, '--may_differ=learning_rates', '--plots=False').stderr == refused.stderr
    runs[-1]['config']['learning_rate'] = 5e-3                             # not within one arm
    assert cli(save(tmp_path, *runs), '--may_differ=learning_rate', '--plots=False').returncode == 2
    runs[-1]['config']['learning_rate'] = 1e-3
    for run in runs:                                                       # a knob younger than the first arm's runs; data
        if run['name'] != 'baseline':
            run['config']['kv_lora_rank'] = {'lora': 36, 'enhanced': 48}[run['name']]
        run['data']['train_tokens'] = 5000 if run['name'] == 'lora' else 7000
    more = cli(save(tmp_path, *runs), '--may_differ=learning_rate,train_tokens', '--plots=False').stdout
    assert re.search(r'- lora: .*kv_lora_rank 36.*train_tokens 5000', more)
    assert re.search('- baseline: .*train_tokens 7000', more)


# ---- early and late, learning rates

def test_early_and_late_losses_are_correlated_over_seeds(tmp_path):
    early, late = [5.0, 5.2, 5.1, 5.4], [3.5, 3.7, 3.55, 3.8]
    runs = [result('baseline', seed, b, history=[{'step': step, 'val_loss': loss, 'train_loss': None} for step, loss in (
        (0, 8.0), (25, None), (50, a), (100, b))]) for seed, (a, b) in enumerate(zip(early, late))]
    _, r = analysed(save(tmp_path, *runs))
    e = r['arms']['baseline']['early']
    assert e['steps'] == [50, 100] and e['r'] == pytest.approx(np.corrcoef(early, late)[0, 1])
    row = f'| baseline | 4 | {np.mean(early):.4f} ± {np.std(early, ddof=1):.4f}, 50 | {np.mean(late):.4f} ± '
    assert row in section(report_of(tmp_path), 'Early and late')
    short = result('baseline', 0, history=[{'step': 100, 'val_loss': 4.0, 'train_loss': None}])         # with one evaluation
    assert 'Early and late' not in report_of(save(tmp_path / 'short', short))


def rates(folder, **losses):
    """Runs ARM@RATE on seed 100 from {arm: {rate: loss, or None for a diverged run}}."""
    return save(folder, *(
        result(f'{arm}@{rate:g}', 100, loss or 4.0, config__attn=arm, config__learning_rate=rate,
               **({} if loss else {'status': 'diverged', 'final': None}))
        for arm, grid in losses.items() for rate, loss in grid.items()))


def test_the_best_rate_of_each_arm_is_marked_and_an_edge_is_said(tmp_path):
    folder = rates(tmp_path / 'laptop-rates', baseline={0.001: 4.2, 0.002: 4.1, 0.004: 4.15}, mqa={
        0.001: 4.3, 0.002: 4.25, 0.004: 4.2}, lora={0.001: 4.0, 0.002: 4.05, 0.004: None})
    done = cli(folder, '--rates=True')
    assert done.returncode == 0, done.stderr
    for line in ('| Configuration | 0.001 | 0.002 | 0.004 |', '| baseline | 4.2000 | **4.1000** | 4.1500 |',
                 '| lora | **4.0000** | 4.0500 | diverged |', 'seed(s) 100', '- baseline: best at 0.002.',
                 '- mqa: best at 0.004, the highest rate tried', '- lora: best at 0.001, the lowest rate tried'):
        assert line in done.stdout, line
    assert 'rates.png' not in done.stdout or (tmp_path / 'laptop-rates/rates.png').stat().st_size > 10_000
    assert json.loads((tmp_path / 'laptop-rates/report.json').read_text())['rates']['lora']['0.004'] == 'diverged'
    folder = rates(tmp_path / 'two-seeds', baseline={0.001: 4.2, 0.002: 4.1})
    save(tmp_path / 'two-seeds', result('baseline@0.002', 101, config__attn='baseline', config__learning_rate=0.002,
                                        status='diverged', final=None))
    done = cli(folder, '--rates=True', '--plots=False').stdout
    assert '- baseline@0.001: the mean is of seed(s) 100 alone.' in done            # a rate with fewer runs is no secret
    assert '- baseline@0.002: the mean is of seed(s) 100 alone; seed 101 diverged.' in done
    runs = [result('baseline@0.001', 100, config__learning_rate=0.001), result(
        'baseline@0.002', 100, config__learning_rate=0.002, config__max_steps=50)]
    assert 'config.max_steps' in cli(save(tmp_path / 'other', *runs), '--rates=True').stderr
    twice = save(tmp_path / 'twice', *(result(name, 100, config__learning_rate=0.006) for name in ('mqa@6e-3', 'mqa@0.006')))
    assert 'mqa@6e-3: another name has this arm at 0.006 too' in cli(twice, '--rates=True').stderr
    mixed = save(tmp_path / 'mixed', *(result(f'mqa@{rate}', 100, config__learning_rate=rate, environment__device_name=cpu)
                                       for rate, cpu in ((0.003, 'Intel Xeon'), (0.006, 'AMD EPYC'))))
    done = cli(mixed, '--rates=True', '--may_differ=device_name', '--plots=False').stdout
    assert '- Not all on one machine: 1 runs on Intel Xeon, 1 runs on AMD EPYC.' in done


def test_a_metric_that_a_run_lacks_is_refused(tmp_path):
    runs = [result('baseline@0.001', 100, final__val_bits_per_byte=None)]
    for more in ('--rates=True', '--baseline=baseline@0.001'):
        done = cli(save(tmp_path, *runs), '--metric=val_bits_per_byte', '--plots=False', more)
        assert done.returncode == 2 and 'final.val_bits_per_byte is null' in done.stderr and done.stderr.count('\n') == 1


# ---- what the report says

def test_the_report_states_epochs_parameters_and_a_loss_above_unigram(tmp_path):
    runs = [{**run} for run in experiment(range(3))]
    for run in runs:
        run['data'].update(train_tokens=51200, unigram_loss=3.0)
    text = report_of(save(tmp_path, *runs))
    assert 'saw its training data 2.00 times' in text
    assert 'Parameters against baseline: lora -9.1% (-16.9% active), enhanced -6.1%' in text
    assert 'is not below the 3.0000 of token frequencies' in text


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
    assert r['arms']['baseline']['extremes'] == pytest.approx([1.4, 0.6])


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
    a, b = cli(one, '--plots=False', PYTHONHASHSEED='1'), cli(two, '--plots=False', PYTHONHASHSEED='2')
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
    name = 'lora - baseline'
    assert data['comparisons'][name]['mean'] == pytest.approx(r['comparisons'][name]['mean'], rel=1e-11)
    assert data['comparisons'][name]['verdict'] == r['comparisons'][name]['verdict']


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
    (['laptop-first'], ['laptop-first', 'did you mean results/laptop-first?']),
    (['results/laptop-first/lora-s0.json'], ['no such folder', 'did you mean results/laptop-first?']),
    (['{}', '--margin=0'], ['margin', 'above 0']), (['{}', '--pairs=-3'], ['pairs', '0 (no plan)']),
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
    assert done.stdout.splitlines()[0].endswith(': validation bits per byte')
    assert 'is 0.01 (bits/byte)' in done.stdout and '--metric=val_bits_per_byte --baseline=lora`' in done.stdout
    assert '- baseline: ' in section(done.stdout, 'Verdicts')


def without_matplotlib(folder, *arguments):
    hide = os.path.join(folder, os.pardir, 'hide')
    os.makedirs(os.path.join(hide, 'matplotlib'), exist_ok=True)
    with open(os.path.join(hide, 'matplotlib', '__init__.py'), 'w') as file:
        file.write('raise ImportError("hidden")')
    return cli(folder, *arguments, PYTHONPATH=hide)


def test_pictures_are_shown_only_where_they_are(tmp_path):
    pytest.importorskip('matplotlib', reason='compares with and without matplotlib')
    folder = save(tmp_path / 'runs', *experiment(range(3)))
    bare, without = cli(folder, '--plots=False'), without_matplotlib(folder)
    assert '![' not in bare.stdout and without.stdout == bare.stdout and without.returncode == 0
    assert without.stderr.count('\n') == 1 and 'pip install matplotlib' in without.stderr
    drawn = cli(folder)
    shown = re.findall(r'\]\((.*)\)', drawn.stdout)
    assert shown == ['cache.png', 'forest.png', 'curves.png']
    assert without_matplotlib(folder).stdout == drawn.stdout       # committed pictures: the report is reprinted
    for file in shown:
        content = (tmp_path / 'runs' / file).read_bytes()
        assert content.startswith(b'\x89PNG') and len(content) > 10_000


@pytest.mark.parametrize('seed', range(3))
def test_names_in_the_figure_of_the_cache_cover_no_point_and_no_other_name(tmp_path, seed):
    """The arms of config/laptop.plan at losses near those expected, of which three share one size."""
    pytest.importorskip('matplotlib', reason='a figure')
    sizes = {'baseline': 192, 'baseline+norm': 192, 'gqa2': 96, 'mla96': 96, 'mqa': 48, 'mla48': 48, 'mqa+params': 48,
             'mla': 36, 'lora': 32, 'enhanced': 32}
    runs = experiment(range(3), {name: 0.3 / x ** 0.5 for name, x in sizes.items()}, noise=0.01, rng_seed=seed)
    for run in runs:
        run['model'].update(kv_cache_bytes_per_token_16bit=8 * sizes[run['name']], attention_class=(
            'LatentAttention' if run['name'].startswith(('mla', 'lora', 'enh')) else 'MultiHeadAttention'))
    figure = figures.figure_cache(*analysed(save(tmp_path, *runs)))
    ax, = figure.axes
    names = {text.get_text(): text.get_window_extent() for text in ax.texts if text.get_text()}
    assert set(names) == set(sizes)
    frame, boxes = ax.get_window_extent(), list(names.values())
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    points = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 1 and line.get_marker() != 'None']
    assert len(points) == len(sizes)
    assert not any(box.contains(*ax.transData.transform(point)[0]) for point in points for box in boxes)


def test_names_in_the_figure_of_the_committed_runs_cover_no_interval():
    """mla48 has an arm on either side: to its right the interval of one is in the way."""
    pytest.importorskip('matplotlib', reason='a figure')
    ax, = figures.figure_cache(*analysed(os.path.join(ROOT, 'results', 'laptop'))).axes
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    lines = [ax.transData.transform(line.get_xydata()) for line in ax.lines if len(line.get_xdata()) == 2]
    bars = [(x, low, high) for (x, low), (x_high, high) in lines if x == x_high]
    assert len(bars) == len(boxes) > 8
    assert not any(box.x0 < x < box.x1 and box.y0 < high and low < box.y1 for x, low, high in bars for box in boxes)


def test_arms_of_one_size_stand_close_together_in_the_figure_of_the_cache(tmp_path):
    pytest.importorskip('matplotlib', reason='a figure')
    runs = experiment(range(2), {'baseline': 0, 'mla48': 0.05})
    for run in runs:
        run['model']['kv_cache_bytes_per_token_16bit'] = 384
    ax, = figures.figure_cache(*analysed(save(tmp_path, *runs))).axes
    points = [line.get_xydata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
    places = ax.transAxes.inverted().transform(ax.transData.transform(points))[:, 0]
    assert np.ptp(places) > 0 and np.abs(places - 0.5).max() < 0.05


def test_in_the_figure_of_the_cache_lines_join_what_differs_in_that_alone_and_grey_is_the_margin(tmp_path):
    pytest.importorskip('matplotlib', reason='a figure')
    runs = [result(name, seed, loss) for seed in range(2) for name, loss in
            (('baseline', 4.0), ('gqa', 4.1), ('mqa', 4.2), ('lora', 4.3), ('mla', 4.4), ('enhanced', 4.5))]
    for run in runs:
        if run['name'] in ('lora', 'mla'):                  # of these two the rank alone differs
            run['config'].update(q_lora_rank=8, kv_lora_rank=16 if run['name'] == 'lora' else 40)
    arms, r = analysed(save(tmp_path, *runs), margin=0.03)
    ax, = figures.figure_cache(arms, r).axes
    drawn = [line for line in ax.lines if len(line.get_xdata()) > 1 and np.ptp(line.get_xdata())]
    assert [sorted(line.get_ydata()) for line in drawn] == [[4.0, 4.1, 4.2], [4.3, 4.4]]
    band, = ax.patches
    assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx([3.97, 4.03])
    assert [label.get_text().split('\n')[1] for label in ax.get_xticklabels()] == ['6%', '6%', '12%', '17%', '25%', '100%']


def test_the_curves_of_one_arm_have_no_empty_panel_of_differences_beside_them(tmp_path):
    pytest.importorskip('matplotlib', reason='a figure')
    for names in (['baseline'], ['baseline', 'lora']):
        runs = [result(name, seed) for name in names for seed in range(2)]
        assert len(figures.figure_curves(*analysed(save(tmp_path / str(len(names)), *runs))).axes) == len(names)


def test_the_forest_holds_every_pair_and_is_not_stretched_by_the_intervals_of_two(tmp_path):
    pytest.importorskip('matplotlib', reason='a figure')
    runs = experiment(range(8), {'baseline': 0, 'lora': 0.02}) + [result('mla', seed, 4 + seed / 20) for seed in range(2)]
    arms, r = analysed(save(tmp_path, *runs))
    low, high = figures.figure_forest(arms, r).axes[0].get_xlim()
    known, few = r['comparisons']['lora - baseline'], r['comparisons']['mla - baseline']
    assert all(low < d < high for c in (known, few) for d in c['d']) and low < -r['margin'] < r['margin'] < high
    assert low < known['low_all'] < known['high_all'] < high and few['low_all'] < low and high < few['high_all']


def test_options_beside_the_runs_hold_unless_the_command_line_says_otherwise(tmp_path):
    folder = planned(tmp_path / 'laptop', 3)
    flags = ['--contrasts=lora:mqa,mqa:baseline', '--margin=0.03']
    by_hand = cli(folder, '--plots=False', *flags).stdout
    assert '`python analyze.py laptop --contrasts=lora:mqa,mqa:baseline --margin=0.03`' in by_hand
    (tmp_path / 'laptop/options.json').write_text(json.dumps(flags))
    assert cli(folder, '--plots=False').stdout == by_hand
    other = cli(folder, '--plots=False', '--margin=0.5').stdout
    assert '--contrasts=lora:mqa,mqa:baseline --margin=0.5`' in other and 'worth having, is 0.5 (nats)' in other
    per_byte = cli(folder, '--plots=False', '--metric=val_bits_per_byte')                # whose unit is another
    assert per_byte.returncode == 2 and per_byte.stderr.count('\n') == 1
    assert 'the --margin=0.03 of ' in per_byte.stderr and 'in the unit of metric=val_loss; give a --margin' in per_byte.stderr
    per_byte = cli(folder, '--plots=False', '--metric=val_bits_per_byte', '--margin=0.02').stdout
    assert 'worth having, is 0.02 (bits/byte)' in per_byte
    assert 'worth having, is 0.03 (nats)' in cli(folder, '--plots=False', '--metric=val_loss').stdout
    for broken in ('["--margni=0.03"]', '{', '3', '[3]'):
        (tmp_path / 'laptop/options.json').write_text(broken)
        done = cli(folder, '--plots=False')
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr


def test_a_report_that_cannot_be_written_is_printed_all_the_same(tmp_path):
    folder = save(tmp_path / 'runs', *experiment(range(2)))
    wanted = cli(folder, '--plots=False').stdout
    for file in ('report.md', 'report.json', 'report.html'):
        (tmp_path / 'runs' / file).unlink()
        (tmp_path / 'runs' / file).mkdir()                         # root, who runs tests too, may write anything else
    done = cli(folder, '--plots=False')
    assert done.stdout == wanted and done.returncode == 2
    assert done.stderr.count('\n') == 1 and '--out=' in done.stderr
    done = cli(folder, '--plots=False', f'--out={tmp_path / "new" / "place"}')
    assert done.stdout == wanted and done.returncode == 0, done.stderr
    assert (tmp_path / 'new/place/report.md').read_text('utf-8') == wanted
    cli(folder, '--plots=False', '--out=~/new', HOME=str(tmp_path))
    assert (tmp_path / 'new/report.md').exists()
    assert not list(tmp_path.rglob('*.tmp'))


def test_on_a_full_disk_the_last_report_stays_as_it_was(tmp_path):
    resource = pytest.importorskip('resource', reason='limits the size of a file')
    folder = save(tmp_path, *experiment(range(2)))
    assert cli(folder, '--plots=False').returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob('report.*')}
    (tmp_path / 'mqa-s0.json').write_text(json.dumps(result('mqa')))        # there would be more to say
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'analyze.py'), folder, '--plots=False'], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'no report written' in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.glob('report.*')} == before


def test_a_closed_pipe_ends_the_program_in_silence_with_everything_written(tmp_path):
    folder = save(tmp_path, *experiment(range(2), {'baseline': 0, **{f'arm{i}': i / 1000 for i in range(150)}}))
    done = subprocess.Popen([sys.executable, os.path.join(ROOT, 'analyze.py'), folder, '--plots=False'],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                            env={key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'})
    assert done.stdout.read(1) == b'#'
    done.stdout.close()                                            # as `head` does; the rest is more than a pipe holds
    assert done.stderr.read() == b'' and (tmp_path / 'report.md').stat().st_size > 2 ** 16 and done.wait() != 1


class Page(HTMLParser):
    """What a browser would find: the text by tag, and everything that would be fetched."""
    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.fetched = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open += [tag] * (tag not in ('meta', 'img'))
        self.fetched += [value for key, value in attributes if key in ('src', 'href')]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else '', []).append(data)


def test_the_page_holds_the_whole_report_and_its_pictures_and_fetches_nothing(tmp_path):
    pytest.importorskip('matplotlib', reason='no pictures without matplotlib')
    runs = experiment(range(3), {'baseline': 0, 'a | <i>&amp;': 0.02})
    folder = save(tmp_path, *runs[::2])
    for run in runs[1::2]:                                         # a name that is no file name everywhere
        (tmp_path / f'a-s{run["config"]["seed"]}.json').write_text(json.dumps(run))
    assert cli(folder).returncode == 0
    text, page = (tmp_path / 'report.md').read_text('utf-8'), Page((tmp_path / 'report.html').read_text('utf-8'))
    assert page.open == ['html']                                   # every other tag is closed again
    assert [base64.b64decode(source.removeprefix('data:image/png;base64,')) for source in page.fetched] == [
        (tmp_path / file).read_bytes() for file in re.findall(r'\]\((.*)\)', text)]
    assert page.texts['h2'] == re.findall('^## (.*)', text, re.M) and page.texts['h1'] == page.texts['title']
    cells = [cell.replace('\\|', '|') for line in text.splitlines() if line.startswith('| ') and '--:' not in line
             for cell in re.split(r'(?<!\\) \| ', line[2:-2])]
    assert sorted(page.texts['th'] + page.texts['td']) == sorted(cells) and 'a | <i>&amp; - baseline' in page.texts['th']
    assert page.texts['li'][0] == re.search('^- (.*)', text, re.M)[1]


@pytest.mark.parametrize('runs', [[result('baseline', 0)], [result('baseline', 0, history=[])],
                                  [result('baseline', 0, status='diverged', final=None)],
                                  [result('baseline', 0), result('lora', 1)],
                                  [result('baseline', 0, final__expert_load=[]), result('lora', 0)],
                                  [result('baseline', 0), result('$_$', 0)]])       # no formula
def test_figures_and_report_survive_runs_with_little_in_them(tmp_path, runs):
    pytest.importorskip('matplotlib', reason='no figures without matplotlib')
    arms, r = analysed(save(tmp_path, *runs))
    pictures = figures.draw(arms, r, str(tmp_path))
    assert all(png.startswith(b'\x89PNG') for _, _, png in pictures)
    text = '\n'.join(analyze.report(arms, r))
    assert 'nan' not in text.lower().replace('finance', '') and 'None' not in text.replace('None:', '')


def test_a_thousand_result_files_take_less_than_5_seconds(tmp_path):
    rng = np.random.default_rng(0)
    for name in ['baseline', *(f'arm{i}' for i in range(124))]:
        save(tmp_path, *(result(name, seed, 4 + float(rng.normal(0, 0.01))) for seed in range(8)))
    start = time.process_time()
    arms, r = analysed(tmp_path)
    assert disagreements(arms, 'baseline') == []
    text = '\n'.join(analyze.report(arms, r))
    assert sum(len(arm) for arm in arms.values()) == 1000 and len(text) > 10_000
    assert time.process_time() - start < 5
