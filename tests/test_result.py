"""result.py: which files are taken, which runs may be compared."""

import copy
import json
import os
import random

import pytest
from conftest import experiment, refusal, result, save

import analyze
from result import DEFAULTS, FIELDS, VARIANT, disagreements, load, read_run


# ---- comparability

@pytest.mark.parametrize('field, value', [
    ('config__learning_rate', 0.002), ('config__max_steps', 101), ('config__batch_size', 9), ('config__dtype', 'bfloat16'),
    ('config__rope_theta', 5000.0), ('config__new_knob', 1), ('config__extended_at', [50]), ('data__val_sha256', 'ef' * 32),
    ('data__train_tokens', 2_000_000), ('data__vocab_size', 4097), ('environment__device_name', 'a GPU'),
    ('environment__torch', '2.8.0'), ('final__tokens', 102399),
])
def test_runs_that_disagree_are_refused_naming_field_values_and_runs(tmp_path, field, value):
    runs = experiment(range(3)) + [result('baseline', 3), result('lora', 3, **{field: value})]
    found = disagreements(load(save(tmp_path, *runs), 'baseline'), 'baseline')
    assert len(found) == 1
    assert field.replace('__', '.') in found[0] and json.dumps(value) in found[0] and '(lora seed 3)' in found[0]


@pytest.mark.parametrize('field, value', [
    ('config__rope_factor', 2.0), ('config__rope_scaling', 'linear'), ('config__n_kv_head', 2), ('config__q_lora_rank', 32),
    ('config__qk_norm', True), ('config__out_dir', 'elsewhere'), ('config__experiment', 'other'), ('config__resume', True),
    ('config__log_interval', 7), ('config__dataset', '/the/same/text.txt'), ('config__vocab_size', 5000),
    ('config__max_train_tokens', 10 ** 9), ('config__data_root', 'elsewhere'), ('data__tokenizer', 'the same by another name'),
    ('data__dataset', 'the-same-text-in-another-folder'),
])
def test_a_variants_own_knobs_bookkeeping_and_names_of_the_same_tokens_are_no_disagreement(tmp_path, field, value):
    runs = [result('baseline', s) for s in range(2)] + [result('lora', s, **{field: value}) for s in range(2)]
    assert disagreements(load(save(tmp_path, *runs), 'baseline'), 'baseline') == []


def test_a_knob_that_is_younger_than_a_run_had_its_default_there(tmp_path, monkeypatch):
    monkeypatch.setitem(DEFAULTS, 'dropout', 0.0)
    older = [result('baseline', s) for s in range(2)]
    same, other = ([result('lora', s, config__dropout=x) for s in range(2)] for x in (0.0, 0.5))
    assert disagreements(load(save(tmp_path / 'same', *older, *same), 'baseline'), 'baseline') == []
    found = disagreements(load(save(tmp_path / 'other', *older, *other), 'baseline'), 'baseline')
    assert found == ['config.dropout: 0.0 (baseline seeds 0-1) against 0.5 (lora seeds 0-1)']


def test_within_an_arm_a_knob_of_the_variant_may_be_younger_than_some_runs(tmp_path):
    """Which value its row filled in there the file does not know; two values are two networks all the same."""
    runs = [result('baseline', 0), result('baseline', 1, config__qk_norm=False, model__new_count=3)]
    assert disagreements(load(save(tmp_path, *runs), 'baseline'), 'baseline') == []
    runs.append(result('baseline', 2, config__qk_norm=True))
    assert 'config.qk_norm: false (baseline seed 1) against true (baseline seed 2)' in disagreements(
        load(save(tmp_path, *runs), 'baseline'), 'baseline')


def test_the_variants_knobs_are_those_whose_default_its_row_fills_in():
    assert {'attn', 'n_kv_head', 'kv_lora_rank', 'attention_bias', 'qk_norm', 'rope_factor'} <= VARIANT
    assert not VARIANT & {'rope_theta', 'n_layer', 'd_ff', 'router', 'balance_loss_weight', 'learning_rate', 'seed'}


@pytest.mark.parametrize('may_differ, field, value', [
    ('d_ff', 'config__d_ff', 300), ('optimizer', 'config__optimizer', 'muon'), ('device_name', 'environment__device_name', 'x'),
    ('train_tokens', 'data__train_tokens', 5)])
def test_arms_may_differ_in_what_is_named(tmp_path, may_differ, field, value):
    runs = [result('baseline', s) for s in range(2)] + [result('lora', s, **{field: value}) for s in range(2)]
    arms = load(save(tmp_path, *runs), 'baseline')
    assert len(disagreements(arms, 'baseline')) == 1 and disagreements(arms, 'baseline', [may_differ]) == []


def test_a_budget_may_differ_if_it_is_named(tmp_path):
    runs = [result('baseline', 0), result('short', 0, config__max_steps=50, final__updates=50, final__tokens=51200)]
    arms = load(save(tmp_path, *runs), 'baseline')
    assert len(disagreements(arms, 'baseline')) == 3 and disagreements(arms, 'baseline', ['max_steps']) == []


def other_tokenizer(seed, **changes):
    return result('bytes', seed, **{'config__tokenizer': 'bytes', 'config__vocab_size': 256, 'data__tokenizer': 'bytes',
                                    'data__vocab_size': 256, 'data__train_sha256': '12' * 32, 'data__val_sha256': '34' * 32,
                                    'data__train_tokens': 10_000_000, 'data__val_tokens': 340_000, **changes})


def test_bits_per_byte_compare_tokenizers_that_scored_the_same_text(tmp_path):
    runs = [result('baseline', s) for s in range(2)]
    arms = load(save(tmp_path / 'same', *runs, *map(other_tokenizer, range(2))), 'baseline')
    assert disagreements(arms, 'baseline', metric='val_bits_per_byte') == []
    assert 'data.val_sha256' in ' '.join(disagreements(arms, 'baseline'))          # losses per token do not compare
    cut = [other_tokenizer(s, data__val_text_sha256='56' * 32) for s in range(2)]
    found = disagreements(load(save(tmp_path / 'cut', *runs, *cut), 'baseline'), 'baseline', metric='val_bits_per_byte')
    assert len(found) == 1 and found[0].startswith('data.val_text_sha256: ')
    for unknown in (None, ...):                                                     # no vocabulary at hand; an older file
        older = [other_tokenizer(s, data__val_text_sha256=unknown) for s in range(2)]
        for run in older:
            if unknown is ...:
                del run['data']['val_text_sha256']
        arms = load(save(tmp_path / str(unknown), *runs, *older), 'baseline')
        assert any('data.val_sha256' in x for x in disagreements(arms, 'baseline', metric='val_bits_per_byte'))
    mixed = [other_tokenizer(0), other_tokenizer(1, data__val_sha256='78' * 32)]    # within an arm the tokens are one
    arms = load(save(tmp_path / 'mixed', *runs, *mixed), 'baseline')
    assert [x.split(':')[0] for x in disagreements(arms, 'baseline', metric='val_bits_per_byte')] == ['data.val_sha256']


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
    runs[-2]['earlier_environments'] = [{**runs[-2]['environment'], 'device_name': 'another'}]
    folder = save(tmp_path, *runs)
    assert disagreements(load(folder, 'baseline'), 'baseline') == []
    arms = load(folder, 'baseline')
    text = '\n'.join(analyze.report(arms, analyze.compare(arms, 'baseline', 'val_loss', 0.01)))
    assert 'environment.git_commit differs' in text and 'source changed between the runs: model.py' in text
    assert 'uncommitted changes: enhanced seed 2' in text and '(earlier_environments): lora seed 2.' in text


def test_the_same_name_and_seed_twice_is_refused_naming_both_files(tmp_path, capsys):
    save(tmp_path / 'a', result('baseline', 0)), save(tmp_path / 'b', result('baseline', 0))
    line = refusal(capsys, load, str(tmp_path), 'baseline')
    assert os.path.join('a', 'baseline-s0') in line and os.path.join('b', 'baseline-s0') in line


def test_files_of_two_schemas_are_not_mixed_and_what_changed_is_said(tmp_path, capsys):
    old, new = [result('baseline', 0, schema=1), result('lora', 0, schema=1)], [result('baseline', 0), result('lora', 0)]
    assert list(load(save(tmp_path / 'old', *old), 'baseline')) == ['baseline', 'lora']
    line = refusal(capsys, load, save(tmp_path / 'mixed', old[0], new[1]), 'baseline')
    for words in ('baseline-s0', 'schema 1 (every weight N(0, 0.02), router losses averaged', 'lora-s0', 'schema 2 ('):
        assert words in line


def test_arms_come_in_the_order_of_their_caches_after_the_baseline(tmp_path):
    runs = [result(name, 0) for name in ('mla', 'lora', 'baseline', 'gqa', 'mqa', 'enhanced')]
    assert list(load(save(tmp_path, *runs), 'mqa')) == ['mqa', 'baseline', 'gqa', 'mla', 'lora', 'enhanced']


# ---- files that are not what they should be

def outcome(tmp_path, text):
    """None if the file is accepted, else the one line of its refusal, which names it."""
    file = tmp_path / 'result.json'
    file.write_bytes(text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass'))
    try:
        read_run(file)
    except ValueError as error:
        assert '\n' not in str(error) and str(file) in str(error)
        return str(error)


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


def test_a_file_truncated_at_any_byte_is_refused(tmp_path):
    text = json.dumps(result(), indent=1).encode()
    for end in range(len(text)):
        assert 'no sound result' in outcome(tmp_path, text[:end])
    assert outcome(tmp_path, text) is None


# what the report is computed from; other fields of a file are not read
USED = [tuple(field.split('.')) for field in ('schema', *FIELDS)]


def test_a_missing_field_is_named(tmp_path):
    for path in USED:
        line = outcome(tmp_path, json.dumps(changed(result(), path, remove=True)))
        assert line and 'lacks the field ' + '.'.join(path) in line, path
    line = outcome(tmp_path, json.dumps(changed(result(), ('history', 2, 'val_loss'), remove=True)))
    assert 'history[2].val_loss' in line


def test_a_wrong_type_is_named_with_its_field(tmp_path):
    fits = {'an object': [{}], 'a list': [[], [None]], 'a line of text': ['text'], 'a whole number': [7],
            'a number': [7, -1.5], 'a number or null': [7, -1.5, None]}
    for field, kind in FIELDS.items():
        for value in (None, True, 'text', '', -1.5, [], {}, [None], 10 ** 400, -7, 7):
            line = outcome(tmp_path, json.dumps(changed(result(), tuple(field.split('.')), value)))
            if not any(value is ok or value == ok for ok in fits[kind]) and not (value == -7 and kind.startswith('a number')):
                assert line and f'{field} is ' in line and f'expected {kind}' in line, (field, value, line)


def test_nan_infinity_and_overflow_are_refused(tmp_path):
    for path in (('final', 'val_loss'), ('config', 'learning_rate'), ('history', 0, 'train_loss')):
        for text in ('NaN', 'Infinity', '-Infinity', '1e999', '1e200'):
            json_text = json.dumps(changed(result(), path, '@')).replace('"@"', text)
            assert outcome(tmp_path, json_text), (path, text)


@pytest.mark.parametrize('text', [
    '', ' ', 'null', '[]', '1', '"x"', '{}', '{"schema": 1}', '[' * 100_000,
    '{"a":' * 100_000, '\ufeff{}', b'\xff\xfe\x00', b'\x00' * 100, '{"schema": "1"}', '{"schema": true}'])
def test_what_is_not_a_result_file_at_all_is_refused(tmp_path, text):
    assert outcome(tmp_path, text)


@pytest.mark.parametrize('schema', [0, 3, 99, '1', 1.5, None, True])
def test_another_schema_is_named(tmp_path, schema):
    assert 'schema' in outcome(tmp_path, json.dumps(result(schema=schema)))


@pytest.mark.parametrize('changes', [
    {'status': 'done'},
    {'final__expert_load': [[0.5, 0.5], [1.0]]}, {'final__expert_load': [[0.0, 0.0]]}, {'final__expert_load': [3]},
    {'final__expert_load': [['a']]}, {'name': 'two\nlines'}, {'final': None}, {'name': '\ud800'},
    {'history': [3]}, {'history': [{'step': -1, 'val_loss': 3.0, 'train_loss': 3.0}]},
    {'history': [{'step': 1, 'val_loss': 'x', 'train_loss': 3.0}]},
])
def test_a_file_of_another_form_is_refused(tmp_path, changes):
    run = result()
    for field, value in changes.items():
        run = changed(run, field.split('__'), value)
    assert outcome(tmp_path, json.dumps(run))


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
            disagreements(arms, 'baseline')
            r = analyze.compare(arms, 'baseline', 'val_loss', 0.01)
            text = '\n'.join(analyze.report(arms, r))
            json.dumps(r, allow_nan=False)
            assert ' nan' not in text and ' inf' not in text
            reported += 1
        except SystemExit as stop:
            assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
            refused += 1
    assert refused > 50 and reported > 50
