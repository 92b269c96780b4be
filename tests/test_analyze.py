"""analyze.py and figures.py: honest reports, comparability, and damaged files."""

import copy
import json
import math
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

import analyze
import figures
import stats

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

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
        'schema': 1, 'status': 'complete', 'name': name, 'started': '2024-01-01T00:00:00',
        'finished': '2024-01-01T00:02:00',
        'config': {
            'attn': name.removesuffix('-again'), 'name': name, 'seed': seed, 'dataset': 'stdlib',
            'tokenizer': 'bpe', 'n_layer': 4, 'n_head': 4, 'n_kv_head': 4, 'n_embd': 128, 'd_ff': 256,
            'n_expert': 4, 'top_k': 2,
            'block_size': 128, 'batch_size': 8, 'micro_batch_size': 8, 'max_steps': 100,
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


def cli(*arguments, **environment):
    return subprocess.run([sys.executable, os.path.join(ROOT, 'analyze.py'), *map(str, arguments)], text=True,
                          capture_output=True, encoding='utf-8', timeout=60,
                          env={**os.environ, **environment})


def analysed(folder, baseline='baseline', metric='val_loss', margin=0.01):
    arms = analyze.load(str(folder), baseline)
    return arms, analyze.compare(arms, baseline, metric, margin)


def report_of(folder, **options):
    arms, r = analysed(folder, **options)
    return analyze.report(arms, r, [], 'test')


def refusal(capsys, call, *arguments):
    """The one line on stderr with which the call ends the program."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


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


# ---- comparability

@pytest.mark.parametrize('field, value', [
    ('config__learning_rate', 0.002), ('config__max_steps',
     101), ('config__batch_size', 9), ('config__dtype', 'bfloat16'),
    ('config__rope_theta', 5000.0), ('config__new_knob',
     1), ('data__val_sha256', 'ef' * 32), ('data__vocab_size', 4097),
    ('environment__device_name', 'a GPU'), ('environment__torch', '2.8.0'), ('final__tokens', 102399),
])
def test_runs_that_disagree_are_refused_naming_field_values_and_runs(tmp_path, capsys, field, value):
    runs = experiment(range(3)) + [result('baseline', 3), result('lora', 3, **{field: value})]
    found = analyze.disagreements(analyze.load(save(tmp_path, *runs), 'baseline'), 'baseline')
    assert len(found) == 1
    assert field.replace('__', '.') in found[0] and json.dumps(
        value) in found[0] and '(lora seed 3)' in found[0]


@pytest.mark.parametrize('field, value', [
    ('config__rope_factor', 2.0), ('config__rope_scaling',
     'linear'), ('config__n_kv_head', 2), ('config__q_lora_rank', 32),
    ('config__out_dir', 'elsewhere'), ('config__experiment', 'other'), ('config__resume', True),
    ('data__dataset', 'the-same-text-in-another-folder'),
])
def test_a_variants_own_knobs_and_bookkeeping_are_no_disagreement(tmp_path, field, value):
    runs = [result('baseline', s) for s in range(2)] + [result('lora', s, **{field: value}) for s in range(2)]
    assert analyze.disagreements(analyze.load(save(tmp_path, *runs), 'baseline'), 'baseline') == []


def test_one_name_for_two_networks_is_a_disagreement(tmp_path):
    runs = [result('baseline', 0), result('lora', 0), result('lora', 1, config__q_lora_rank=64)]
    found = analyze.disagreements(analyze.load(save(tmp_path, *runs), 'baseline'), 'baseline')
    assert found == ['config.q_lora_rank: null (lora seed 0) against 64 (lora seed 1)']


def test_an_aa_arm_must_be_the_baselines_network(tmp_path):
    runs = [result('baseline', 0), result('baseline-again', 0, model__params_total=13_200_001)]
    found = analyze.disagreements(analyze.load(save(tmp_path, *runs), 'baseline'), 'baseline')
    assert len(found) == 1 and 'model.params_total' in found[0]


def test_other_source_files_or_commits_are_a_caveat_not_a_refusal(tmp_path):
    runs = experiment(range(3))
    runs[-1]['environment'].update(git_commit='def', git_dirty=True, source_sha256={'model.py': '22'})
    folder = save(tmp_path, *runs)
    assert analyze.disagreements(analyze.load(folder, 'baseline'), 'baseline') == []
    text = report_of(folder)
    assert 'environment.git_commit differs' in text and 'source changed between the runs: model.py' in text
    assert 'uncommitted changes: enhanced seed 2' in text


def test_the_same_name_and_seed_twice_is_refused_naming_both_files(tmp_path, capsys):
    save(tmp_path / 'a', result('baseline', 0)), save(tmp_path / 'b', result('baseline', 0))
    line = refusal(capsys, analyze.load, str(tmp_path), 'baseline')
    assert os.path.join('a', 'baseline-s0') in line and os.path.join('b', 'baseline-s0') in line


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
    assert analyze.disagreements(arms, 'baseline') == []
    text = analyze.report(arms, r, [], 'many')
    assert sum(len(arm) for arm in arms.values()) >= 1000 and len(text) > 10_000
    assert time.process_time() - start < 5


# ---- files that are not what they should be

def read(tmp_path, text):
    file = tmp_path / 'result.json'
    file.write_bytes(text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass'))
    return str(file)


def outcome(tmp_path, capsys, text):
    """None if the file is accepted, else the one line of its refusal, which names it."""
    file = read(tmp_path, text)
    try:
        analyze.read_run(file)
    except SystemExit as stop:
        lines = capsys.readouterr().err.splitlines()
        assert stop.code == 2 and len(lines) == 1 and file in lines[0], lines
        return lines[0]
    return None


def leaves(value, path=()):
    """Every (path) in a result file, containers included, lists by their first entry."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, path + (key,))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], path + (0,))


def changed(run, path, value=None, remove=False):
    run = copy.deepcopy(run)
    at = run
    for key in path[:-1]:
        at = at[key]
    if remove:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return run


def test_a_file_truncated_at_any_byte_is_refused(tmp_path, capsys):
    text = json.dumps(result(), indent=1).encode()
    for end in range(len(text)):
        assert 'not valid JSON' in outcome(tmp_path, capsys, text[:end])
    assert outcome(tmp_path, capsys, text) is None


# what the report is computed from; other fields of a file are not read
USED = [tuple(field.split('.')) for field in ('schema', *analyze.FIELDS)]


def test_a_missing_field_is_named(tmp_path, capsys):
    for path in USED:
        line = outcome(tmp_path, capsys, json.dumps(changed(result(), path, remove=True)))
        assert line and 'lacks the field ' + '.'.join(path) in line, path
    line = outcome(tmp_path, capsys, json.dumps(changed(result(), ('history', 2, 'val_loss'), remove=True)))
    assert 'history[2].val_loss' in line


def test_a_wrong_type_is_named_with_its_field(tmp_path, capsys):
    for field, kind in analyze.FIELDS.items():
        path = tuple(field.split('.'))
        for value in (None, True, 'text', '', -1.5, [], {}, [None], 10 ** 400, -7):
            fits = (value is None and kind.endswith('?') or value is True and kind.startswith('bool')
                    or value == 'text' and kind.startswith('text')
                    or isinstance(value, dict) and kind.startswith('object')
                    or isinstance(value, list) and kind.startswith('list')
                    or value == -1.5 and kind.startswith('number')
                    or value == -7 and kind.startswith(('number', 'int')))
            line = outcome(tmp_path, capsys, json.dumps(changed(result(), path, value)))
            if not fits:
                assert line and field in line, (path, value, line)


def test_nan_infinity_and_overflow_are_refused(tmp_path, capsys):
    for path in (('final', 'val_loss'), ('final', 'seconds_training'), ('config', 'learning_rate')):
        for text in ('NaN', 'Infinity', '-Infinity', '1e999', '1e200'):
            json_text = json.dumps(changed(result(), path, '@')).replace('"@"', text)
            assert outcome(tmp_path, capsys, json_text), (path, text)
    unread = changed(result(), ('history', 0, 'train_loss'), math.nan)
    assert 'NaN is not JSON' in outcome(tmp_path, capsys, json.dumps(unread))


@pytest.mark.parametrize('text', [
    '', ' ', 'null', '[]', '1', '"x"', '{}', '{"schema": 1}', '[' * 100_000,
    '{"a":' * 100_000, '\ufeff{}', b'\xff\xfe\x00', b'\x00' * 100, '{"schema": "1"}', '{"schema": true}'])
def test_what_is_not_a_result_file_at_all_is_refused(tmp_path, capsys, text):
    assert outcome(tmp_path, capsys, text)


@pytest.mark.parametrize('schema', [0, 2, 99, '1', 1.5, None, True])
def test_another_schema_is_named(tmp_path, capsys, schema):
    assert 'schema' in outcome(tmp_path, capsys, json.dumps(result(schema=schema)))


@pytest.mark.parametrize('changes', [
    {'final__val_perplexity': 60.0}, {'final__val_accuracy': 1.5}, {
        'final__val_loss': -4.0}, {'status': 'done'},
    {'model__params_active': 99_000_000}, {'final__expert_load': [
        [0.5, 0.5], [1.0]]}, {'final__expert_load': [[0.0, 0.0]]},
    {'final__expert_load': [['a']]}, {'name': 'two\nlines'}, {
        'name': 'x' * 100}, {'final': None}, {'name': '\ud800'},
    {'history': [3]}, {'history': [{'step': -1, 'val_loss': 3.0}]
        }, {'history': [{'step': 1, 'val_loss': 'x'}]},
])
def test_a_file_that_contradicts_itself_is_refused(tmp_path, capsys, changes):
    run = result()
    for field, value in changes.items():
        run = changed(run, field.split('__'), value)
    assert outcome(tmp_path, capsys, json.dumps(run))


def test_damaged_files_by_the_hundred_end_in_one_line_or_in_a_report_of_finite_numbers(tmp_path, capsys):
    """One value of one run replaced at random: refused with one line, or reported without a nan."""
    rng = random.Random(7)
    runs = [result(name, seed, 4 + seed / 100) for seed in range(2) for name in ('baseline', 'lora')]
    folder = save(tmp_path, *runs)
    paths = [path for path in leaves(runs[0]) if path]
    refused = reported = 0
    for _ in range(400):
        path = rng.choice(paths)
        value = rng.choice([None, True, 'x', 'NaN', '\x00', 0, -1, 3,
                           1e30, 1e-30, 2 ** 62, [], {}, [1], {'a': 1}])
        save(tmp_path, changed(runs[0], path, value, remove=rng.random() < 0.2) | {'name': 'baseline'}
             if path not in (('config',), ('config', 'seed')) else runs[0])
        try:
            arms = analyze.load(folder, 'baseline')
            problems = analyze.disagreements(arms, 'baseline')
            r = analyze.compare(arms, 'baseline', 'val_loss', 0.01)
            text = analyze.report(arms, r, problems, 'x')
            json.dumps(analyze.rounded(r), allow_nan=False)
            assert ' nan' not in text and ' inf' not in text
            reported += 1
        except SystemExit as stop:
            assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
            refused += 1
    assert refused > 50 and reported > 50
