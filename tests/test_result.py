"""result.py: which files are taken, which runs may be compared."""

import copy
import json
import math
import os
import random

import pytest
from conftest import experiment, refusal, result, save

import analyze
from result import FIELDS, disagreements, load, read_run


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
    found = disagreements(load(save(tmp_path, *runs), 'baseline'), 'baseline')
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
    assert disagreements(load(save(tmp_path, *runs), 'baseline'), 'baseline') == []


def test_one_name_for_two_networks_is_a_disagreement(tmp_path):
    runs = [result('baseline', 0), result('lora', 0), result('lora', 1, config__q_lora_rank=64)]
    found = disagreements(load(save(tmp_path, *runs), 'baseline'), 'baseline')
    assert found == ['config.q_lora_rank: null (lora seed 0) against 64 (lora seed 1)']


def test_an_aa_arm_must_be_the_baselines_network(tmp_path):
    runs = [result('baseline', 0), result('baseline-again', 0, model__params_total=13_200_001)]
    found = disagreements(load(save(tmp_path, *runs), 'baseline'), 'baseline')
    assert len(found) == 1 and 'model.params_total' in found[0]


def test_other_source_files_or_commits_are_a_caveat_not_a_refusal(tmp_path):
    runs = experiment(range(3))
    runs[-1]['environment'].update(git_commit='def', git_dirty=True, source_sha256={'model.py': '22'})
    folder = save(tmp_path, *runs)
    assert disagreements(load(folder, 'baseline'), 'baseline') == []
    arms = load(folder, 'baseline')
    text = analyze.report(arms, analyze.compare(arms, 'baseline', 'val_loss', 0.01), [], 'test')
    assert 'environment.git_commit differs' in text and 'source changed between the runs: model.py' in text
    assert 'uncommitted changes: enhanced seed 2' in text


def test_the_same_name_and_seed_twice_is_refused_naming_both_files(tmp_path, capsys):
    save(tmp_path / 'a', result('baseline', 0)), save(tmp_path / 'b', result('baseline', 0))
    line = refusal(capsys, load, str(tmp_path), 'baseline')
    assert os.path.join('a', 'baseline-s0') in line and os.path.join('b', 'baseline-s0') in line


# ---- files that are not what they should be

def read(tmp_path, text):
    file = tmp_path / 'result.json'
    file.write_bytes(text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass'))
    return str(file)


def outcome(tmp_path, capsys, text):
    """None if the file is accepted, else the one line of its refusal, which names it."""
    file = read(tmp_path, text)
    try:
        read_run(file)
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
USED = [tuple(field.split('.')) for field in ('schema', *FIELDS)]


def test_a_missing_field_is_named(tmp_path, capsys):
    for path in USED:
        line = outcome(tmp_path, capsys, json.dumps(changed(result(), path, remove=True)))
        assert line and 'lacks the field ' + '.'.join(path) in line, path
    line = outcome(tmp_path, capsys, json.dumps(changed(result(), ('history', 2, 'val_loss'), remove=True)))
    assert 'history[2].val_loss' in line


def test_a_wrong_type_is_named_with_its_field(tmp_path, capsys):
    for field, kind in FIELDS.items():
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
            arms = load(folder, 'baseline')
            problems = disagreements(arms, 'baseline')
            r = analyze.compare(arms, 'baseline', 'val_loss', 0.01)
            text = analyze.report(arms, r, problems, 'x')
            json.dumps(analyze.rounded(r), allow_nan=False)
            assert ' nan' not in text and ' inf' not in text
            reported += 1
        except SystemExit as stop:
            assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
            refused += 1
    assert refused > 50 and reported > 50
