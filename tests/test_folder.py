"""result.py, a run's folder: what is there already decides, one line says it, and nothing that was written is lost."""
import errno
import hashlib
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import refusal, result, save

from model import LanguageModel, ModelConfig
from result import SCHEMA, RunFolder, command_to_go_on, disagreements, folder_of, load, read_checkpoint, read_weights
from tokenizer import Tokenizer

RESULT = result('lora', 0)
CONFIG = {**RESULT['config'], 'max_steps': 20, 'learning_rate': 0.01, 'compile': True}
DATA = {**RESULT['data'], 'vocab_sha256': 'ef' * 32}


def content(step, loss=None, config=CONFIG, data=DATA, **changes):
    """A checkpoint as train.py hands it over; evaluated at this very step if there is a loss."""
    return {'schema': SCHEMA, 'config': config, 'data': data, 'model_config': {'n_layer': 1}, 'model': {'w': torch.full((3,), float(step))},
            'optimizer': [{'m': torch.zeros(3)}], 'step': step, 'final': loss and {'step': step, 'val_loss': loss},
            'tokenizer': None, **changes}


@pytest.fixture
def place(tmp_path):
    """place(status=None, checkpoint=None, config=CONFIG, data=DATA) -> path of a folder that holds these."""
    def make(status=None, checkpoint=None, config=CONFIG, data=DATA):
        folder = RunFolder(tmp_path / 'run')
        folder.open(config, data, overwrite=True)
        if checkpoint:
            folder.write_checkpoint({**checkpoint, 'config': config})
        if status:
            folder.write_result({**RESULT, 'status': status, 'config': config, 'data': data, 'error': 'nan at step 3'})
        folder.held.close()
        return folder.path
    return make


def opened(path, resume=False, overwrite=False, data=DATA, **config):
    """-> the checkpoint that a run of this config would go on from, and its config."""
    config = {**CONFIG, **config}
    folder = RunFolder(path)
    try:
        return folder.open(config, data, resume, overwrite), config
    finally:
        if hasattr(folder, 'held'):
            folder.held.close()


def refused(capsys, path, *words, **how):
    line = refusal(capsys, lambda: opened(path, **how))
    assert all(word in line for word in words), line


def test_a_new_folder_is_made_locked_and_begins_at_the_beginning(tmp_path, capsys):
    folder = RunFolder(tmp_path / 'a' / 'run')
    assert folder.open(CONFIG, DATA) is None and [p.name for p in folder.path.iterdir()] == ['.lock']
    pytest.importorskip('fcntl', reason='no file locks on this system')
    refused(capsys, folder.path, 'another process is writing')
    folder.held.close()
    assert opened(folder.path) == (None, CONFIG)


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='needs a folder that cannot be written to')
def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, capsys):
    tmp_path.chmod(0o500)
    refused(capsys, tmp_path / 'run', 'cannot be written', '--out_dir')


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path, capsys):
    (tmp_path / 'run').write_text('')
    refused(capsys, tmp_path / 'run', 'cannot be written', '--out_dir')


def test_a_path_that_cannot_be_looked_at_or_a_home_that_is_nobodys_is_one_line(tmp_path, capsys, monkeypatch):
    refused(capsys, tmp_path / ('x' * 300), 'cannot be written', 'name too long')
    assert folder_of('~nobody-here/x', 'laptop', 'a', 0) == Path('~nobody-here/x')
    with pytest.raises(ValueError, match='nobody-here/x is not there'):
        read_checkpoint('~nobody-here/x')


def test_to_go_on_where_there_is_no_run_is_refused_and_makes_no_folder_but_auto_starts_one(tmp_path, capsys):
    refused(capsys, tmp_path / 'mistyped', 'holds no run to go on with', '--resume=auto', resume=True)
    assert not (tmp_path / 'mistyped').exists()
    assert opened(tmp_path / 'mistyped', resume='auto')[0] is None


def test_a_finished_run_is_kept_unless_told_otherwise(place, capsys):
    path = place('complete', content(20, 3.0))
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    refused(capsys, path, 'finished run', '--overwrite=True')
    refused(capsys, path, 'another config', 'seed: 0 there, 5 here', seed=5)
    refused(capsys, path, 'another config', 'max_steps: 20 there, 10 here', resume=True, max_steps=10)
    for resume in (True, 'auto'):
        with pytest.raises(SystemExit) as end:
            opened(path, resume=resume)
        assert end.value.code == 0 and 'complete already' in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    (path / 'tensorboard').mkdir()                          # with the curves of the run that is thrown away
    assert opened(path, overwrite=True, seed=5)[0] is None
    assert [p.name for p in path.iterdir()] == ['.lock']    # killed now, it must not pass for the finished run


def test_a_finished_run_whose_checkpoint_is_gone_is_not_replaced_by_one_from_the_beginning(place, capsys):
    path = place('complete', content(20, 3.0))
    (path / 'checkpoint.pt').unlink()                       # to save room
    refused(capsys, path, 'no checkpoint.pt to go on from', '--overwrite=True', resume=True, max_steps=50)
    with pytest.raises(SystemExit) as end:
        opened(path, resume='auto')
    assert end.value.code == 0


def test_an_unfinished_run_goes_on_only_when_asked(place, capsys):
    for status in ('running', 'interrupted', None):
        path = place(status, content(7))
        refused(capsys, path, 'unfinished run', '--resume=True', '--overwrite=True')
        refused(capsys, path, 'another config', 'learning_rate: 0.01 there, 0.5 here', resume=True, learning_rate=0.5)
        checkpoint, config = opened(path, resume=True)
        assert checkpoint['step'] == 7 and torch.equal(checkpoint['model']['w'], torch.full((3,), 7.0)) and config == CONFIG


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_says_so(place, capsys):
    assert opened(place('running'), resume=True)[0] is None and 'no checkpoint yet' in capsys.readouterr().out


def test_a_diverged_run_is_not_tried_again_in_silence(place, capsys):
    for resume in (False, True, 'auto'):
        with pytest.raises(SystemExit) as end:
            opened(place('diverged', content(3)), resume=resume)
        assert end.value.code == 3 and 'nan at step 3' in capsys.readouterr().out


def test_a_finished_run_is_extended_and_every_extension_is_in_its_config(place, capsys):
    path = place('complete', content(20, 3.0))
    refused(capsys, path, 'finished run', '--resume=True with a larger --max_steps goes on with it', max_steps=50)
    checkpoint, config = opened(path, resume=True, max_steps=50)
    assert checkpoint['step'] == 20 and config['extended_at'] == [20]
    path = place('interrupted', content(30), config=config)                 # under way, then stopped
    checkpoint, again = opened(path, resume=True, max_steps=50)
    assert checkpoint['step'] == 30 and again['extended_at'] == [20]
    assert opened(path, resume=True, max_steps=90)[1]['extended_at'] == [20, 30]


def test_an_extended_run_is_not_compared_with_one_that_had_its_updates_from_the_start(tmp_path):
    runs = [result('baseline', 0), result('lora', 0, config__extended_at=[20])]
    found = disagreements(load(save(tmp_path, *runs), 'baseline'), 'baseline')
    assert len(found) == 1 and 'config.extended_at' in found[0]


def test_killed_between_the_checkpoint_and_the_result_of_an_extension_it_goes_on(place):
    path = place('complete', content(20, 3.0))
    RunFolder(path).write_checkpoint(content(30, config={**CONFIG, 'max_steps': 50, 'extended_at': [20]}))
    checkpoint, config = opened(path, resume=True, max_steps=50)
    assert checkpoint['step'] == 30 and config['extended_at'] == [20]


@pytest.mark.parametrize('changes', [{'micro_batch_size': 2}, {'compile': False}, {'log_interval': 3}, {'checkpoint_interval': 7},
                                     {'eval_interval': 5}, {'out_dir': 'elsewhere'}, {'tracker': 'wandb'}, {'shard': True},
                                     {'dataset': '../x.txt'}], ids=str)
def test_what_changes_no_number_may_change_on_the_way(place, changes):
    assert opened(place('interrupted', content(7)), resume=True, **changes)[0]['step'] == 7


@pytest.mark.parametrize('changed', ['train_sha256', 'val_sha256', 'vocab_sha256', 'train_tokens'])
@pytest.mark.parametrize('where', ['result', 'checkpoint'])
def test_other_tokens_or_another_vocabulary_end_in_one_line(place, capsys, changed, where):
    other = {**DATA, changed: 5 if changed == 'train_tokens' else 'something else'}
    path = place('interrupted', content(7, data=other if where == 'checkpoint' else DATA), data=other if where == 'result' else DATA)
    refused(capsys, path, 'other data', changed, resume=True)


def test_a_hash_that_an_older_run_does_not_have_is_no_contradiction(place):
    older = {k: v for k, v in DATA.items() if k != 'vocab_sha256'}
    for data in (older, {**older, 'vocab_sha256': None}):
        path = place('interrupted', {k: v for k, v in content(7).items() if k != 'data'}, data=data)
        assert opened(path, resume=True)[0]['step'] == 7


def test_a_knob_that_is_younger_than_the_run_has_its_default(place, capsys):
    path = place('interrupted', content(7))                                 # CONFIG knows nothing of these two
    assert opened(path, resume=True, grad_clip=1.0, head_dim=48)[0]['step'] == 7                    # 48: what none became
    refused(capsys, path, 'grad_clip: 1.0 there, 0.5 here', resume=True, grad_clip=0.5)
    refused(capsys, path, 'mine: absent there, 1 here', resume=True, mine=1)                        # no knob of this program


@pytest.mark.parametrize('text', ['', '{', '[]', '{"config": {"max_steps": 20}, "status": "complete"}'])
def test_a_foreign_result_file_is_not_taken_for_a_run(tmp_path, capsys, text):
    (tmp_path / 'result.json').write_text(text)
    for resume in (False, True):
        refused(capsys, tmp_path, 'result.json', '--overwrite=True', resume=resume)
    assert opened(tmp_path, overwrite=True)[0] is None


@pytest.mark.parametrize('damage', ['emptied', 'cut', 'text', 'pickle', 'without checksums', 'folder', 'older', 'newer', 'list'])
def test_a_damaged_checkpoint_ends_in_one_line_and_never_runs_code(place, tmp_path, capsys, damage):
    path = place('interrupted', content(7)) / 'checkpoint.pt'
    whole = path.read_bytes()
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / 'ran').encode() + b"'\ntR."
    torch.save(content(7), tmp_path / 'x.pt', _use_new_zipfile_serialization=False)
    cases = {'emptied': [b''], 'text': [b'hello\n' * 100], 'pickle': [evil, __import__('pickle').dumps([1, 2])], 'folder': [None],
             'cut': [whole[:len(whole) * i // 13] for i in range(1, 13)], 'without checksums': [(tmp_path / 'x.pt').read_bytes()],
             'older': [content(7, schema=SCHEMA - 1)], 'newer': [content(7, schema=SCHEMA + 1)], 'list': [[1]]}[damage]
    for case in cases:
        path.unlink()
        if case is None:
            path.mkdir()
        elif isinstance(case, bytes):
            path.write_bytes(case)
        else:
            torch.save(case, path)
        refused(capsys, path.parent, 'checkpoint.pt', '--overwrite=True', resume=True)
    assert not (tmp_path / 'ran').exists()


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_noticed_or_changes_nothing(tmp_path):
    path, expected, loaded = tmp_path / 'x.pt', content(7, model={'w': torch.arange(40.0)}), []
    torch.save(expected, path)
    whole = path.read_bytes()
    record = whole.index(torch.arange(40.0).numpy().tobytes())
    directory = whole.index(b'PK\1\2')                     # where one bit may say a lot
    for i, flip in [(i, 255) for i in range(0, len(whole), 3)] + [(i, 16) for i in range(directory, len(whole))]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1:])
        try:
            there = read_checkpoint(path)
        except ValueError:
            continue
        loaded.append(i)                                    # in padding, a time, ...
        assert not record <= i < record + 160
        assert torch.equal(there['model']['w'], expected['model']['w']) and there['step'] == 7 and there['data'] == DATA
    assert 0 < len(loaded) < len(whole) / 4


# ---------------------------------------------------------------------------------------------------------------------
# The best checkpoint

def test_the_best_checkpoint_is_kept_beside_the_last_and_said(tmp_path):
    folder = RunFolder(tmp_path)
    step_in = lambda name: torch.load(tmp_path / name, weights_only=True)['step']
    told = lambda: (folder.write_result({**RESULT, 'status': 'running', 'config': CONFIG, 'data': DATA}), json.loads((tmp_path / 'result.json').read_text())['best'])[1]
    assert told() is None
    seen = []
    for step, loss in ((1, None), (2, 5.0), (3, 4.0), (4, 4.5), (5, None), (6, 4.2), (7, 3.9), (8, None)):
        folder.write_checkpoint(content(step, loss))
        assert step_in('checkpoint.pt') == step
        best = told()
        assert best is None or step_in(best['file']) == best['step']
        seen.append((best and (best['step'], best['val_loss'], best['file']), (tmp_path / 'best.pt').exists()))
        if step == 5:                                       # and a run that goes on knows it still
            folder = RunFolder(tmp_path)
            folder.open(CONFIG, DATA, resume=True)
    assert seen == [(None, False), ((2, 5.0, 'checkpoint.pt'), False), ((3, 4.0, 'checkpoint.pt'), False),
                    ((3, 4.0, 'best.pt'), True), ((3, 4.0, 'best.pt'), True), ((3, 4.0, 'best.pt'), True),
                    ((7, 3.9, 'checkpoint.pt'), False), ((7, 3.9, 'best.pt'), True)]


def test_killed_before_an_older_best_checkpoint_was_taken_away_it_is_when_the_run_goes_on(tmp_path):
    folder = RunFolder(tmp_path)
    for step, loss in ((1, 3.0), (2, 4.0)):
        folder.write_checkpoint(content(step, loss))
    older = (tmp_path / 'best.pt').read_bytes()
    folder.write_checkpoint(content(3, 2.0))
    (tmp_path / 'best.pt').write_bytes(older)               # as it stood at that moment
    opened(tmp_path, resume=True)
    assert not (tmp_path / 'best.pt').exists()


@pytest.mark.parametrize('failing', [1, 2])
def test_a_failing_write_of_the_next_checkpoint_loses_neither_the_last_nor_the_best(tmp_path, monkeypatch, capsys, failing):
    folder, writes, fsync = RunFolder(tmp_path), [], os.fsync
    folder.write_checkpoint(content(1, 3.0))

    def full(fd):
        writes.append(fd)
        if len(writes) == failing:                          # best.pt, then checkpoint.pt
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', full)
    assert 'still there' in refusal(capsys, folder.write_checkpoint, content(2, 4.0))
    kept = ['best.pt', 'checkpoint.pt'][2 - failing:]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert all(torch.load(tmp_path / name, weights_only=True)['step'] == 1 for name in kept)


# ---------------------------------------------------------------------------------------------------------------------
# Names and commands

@pytest.mark.parametrize('name, words', [
    ('x' * 61, ['--name=xxx', '60']), ('a\nb', ['--name=a\\nb', 'printable']), (' ', ['blanks']), ('..', ['dots']),
    ('../../x', ['--name=../../x', 'without /']), ('a/b', ['without /']), ('a\\b', ['without /'])])
def test_a_name_that_fits_no_table_or_leads_out_of_the_folder_is_one_line(capsys, name, words):
    line = refusal(capsys, folder_of, '', 'laptop', name, 0)
    assert all(word in line for word in words), line
    assert '--experiment=' in refusal(capsys, folder_of, '', name, 'a', 0)


def test_the_folder_is_by_experiment_name_and_seed_or_where_told_at_home_too(monkeypatch):
    assert folder_of('', 'laptop', 'baseline+norm', 3) == Path('out/laptop/baseline+norm-s3')
    monkeypatch.setenv('HOME', '/home/of-someone'), monkeypatch.setenv('USERPROFILE', '/home/of-someone')
    assert folder_of('~/x', 'laptop', 'a', 0) == Path('/home/of-someone/x')


@pytest.mark.parametrize('argv, overwrite, more, tail', [
    (['train.py', 'a b.py', '--seed=3'], False, {}, ['train.py', 'a b.py', '--seed=3', '--resume=True']),
    (['train.py', '--resume=auto', "--name=it's"], False, {}, ['train.py', "--name=it's", '--resume=True']),
    (['train.py', '--overwrite=True'], True, {}, ['train.py', '--resume=True', '--overwrite=False']),
    (['train.py', 'file.py'], True, {}, ['train.py', 'file.py', '--resume=True', '--overwrite=False']),
    (['train.py', '--micro_batch_size=4'], False, {'micro_batch_size': 2}, ['train.py', '--resume=True', '--micro_batch_size=2'])])
def test_the_command_to_go_on_is_this_one_for_a_shell(monkeypatch, argv, overwrite, more, tail):
    monkeypatch.setattr(sys, 'argv', argv)
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    assert shlex.split(command_to_go_on(overwrite, **more)) == [sys.orig_argv[0], *tail]
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert shlex.split(command_to_go_on(overwrite, **more)) == ['torchrun', '--nproc_per_node=4', *tail]


def byte_tokenizer(*swapped):
    tokens = [bytes([i]) for i in range(256)] + [None]
    for a, b in [swapped] if swapped else []:
        tokens[a], tokens[b] = tokens[b], tokens[a]
    return Tokenizer('bytes', tokens, eot=256)


def test_weights_to_start_from_come_with_their_hash_network_and_vocabulary(tmp_path, capsys):
    config, known = ModelConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=16, d_ff=8, n_expert=2, attn='mla'), byte_tokenizer()
    model, path = LanguageModel(config, seed=3), tmp_path / 'checkpoint.pt'
    saved = content(20, model_config=vars(config), model=model.state_dict())
    torch.save(saved, path)
    for given in (tmp_path, path):
        network, weights, same_vocabulary, digest = read_weights(given, {})
        assert network == vars(config) and torch.equal(weights['embed.weight'], model.embed.weight)
        assert same_vocabulary(known) and same_vocabulary(None)         # a run without a tokenizer says nothing of it
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    torch.save({**saved, 'tokenizer': known.state()}, path)
    same_vocabulary = read_weights(tmp_path, {})[2]
    assert same_vocabulary(known) and not same_vocabulary(byte_tokenizer(97, 98)) and not same_vocabulary(None)
    changed = read_weights(tmp_path, {'block_size': 64, 'rope_theta': 5.0, 'attn': 'mla', 'kv_lora_rank': None, 'vocab_size': 9})[0]
    assert changed == {**vars(config), 'block_size': 64, 'rope_theta': 5.0}
    for scaling in ('dynamic', 'yarn'):                     # they stretch from the context that the weights know
        longer = read_weights(tmp_path, {'block_size': 1024, 'rope_scaling': scaling, 'rope_factor': 2.0})[0]
        assert longer['rope_original_context'] == config.block_size
    for knob, value in (('attn', 'baseline'), ('n_layer', 6), ('kv_lora_rank', 8)):         # the first two are defaults
        assert f'--{knob}={value} is not what' in refusal(capsys, read_weights, tmp_path, {knob: value})
    assert 'is not there' in refusal(capsys, read_weights, tmp_path / 'nowhere', {})
    path.write_bytes(b'hello')
    assert 'is no sound checkpoint' in refusal(capsys, read_weights, tmp_path, {})
    path.unlink()
    assert 'holds no checkpoint.pt' in refusal(capsys, read_weights, tmp_path, {})
