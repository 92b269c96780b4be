"""machine.py: the device that was asked for or one line, files that are whole or refused."""
import errno
import mmap
import os
import platform
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import REPOSITORY  # noqa: F401  (puts the scripts on the path)

import machine


@pytest.fixture
def gpus(monkeypatch):
    """gpus(cuda=..., mps=...): so many of them seem to be here -> the list of GPUs that were made the current one."""
    chosen = []

    def pretend(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
        return chosen
    return pretend


@pytest.mark.parametrize('here, kinds, auto', [
    ({}, ('cuda', 'mps', 'cpu'), 'cpu'), ({'mps': True}, ('cuda', 'mps', 'cpu'), 'mps'),
    ({'cuda': 1, 'mps': True}, ('cuda', 'mps', 'cpu'), 'cuda'), ({'mps': True}, ('cuda', 'cpu'), 'cpu')])
def test_auto_is_the_first_kind_that_is_here(gpus, here, kinds, auto):
    chosen = gpus(**here)
    assert machine.choose_device('auto', kinds) == torch.device(auto)
    assert chosen == [0] * (auto == 'cuda')


def test_a_gpu_by_name_or_by_the_number_of_the_process_becomes_the_current_one(gpus):
    chosen = gpus(cuda=4)
    assert machine.choose_device('cuda:3') == torch.device('cuda:3')
    assert machine.choose_device('auto', index=2) == machine.choose_device('cuda:0', index=2) == torch.device('cuda:2')
    assert machine.choose_device('cpu', index=2) == torch.device('cpu')             # processes without GPUs
    assert chosen == [3, 2, 2]


@pytest.mark.parametrize('name, index, words', [
    ('abacus', None, ['--device=abacus is no device', 'cpu, mps']), ('cuda:x', None, ['is no device']),
    ('', None, ['is no device']), ('meta', None, ['no meta', 'sees 0']), ('cuda:7', None, ['no cuda:7', 'sees 2']),
    ('cpu:1', None, ['no cpu:1']), ('mps', None, ['no mps', '--device=auto']), ('auto', 2, ['no cuda:2', 'sees 2'])])
def test_a_device_that_is_none_or_not_here_is_one_line(gpus, capsys, name, index, words):
    chosen = gpus(cuda=2)
    with pytest.raises(SystemExit) as end:
        machine.choose_device(name, index=index)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count('\n') == 1 and all(word in err for word in words), err
    assert not chosen


def test_a_device_that_the_program_cannot_use_is_one_line_though_it_is_here(gpus, capsys):
    gpus(mps=True)
    with pytest.raises(SystemExit):
        machine.choose_device('mps', ('cuda', 'cpu'))
    assert 'runs on cpu and cuda only' in capsys.readouterr().err


def test_auto_is_bfloat16_only_where_the_processor_computes_in_it_and_the_model_is_wide_enough(monkeypatch):
    cpu, cuda, mps = map(torch.device, ('cpu', 'cuda', 'mps'))
    for has in (True, False):
        best = 'bfloat16' if has else 'float32'
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has)
        for amx, avx512 in ((has, False), (False, has)):
            monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
            monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
            assert machine.choose_dtype('auto', cpu, 256) == machine.choose_dtype('auto', cpu, 384) == best
            assert machine.choose_dtype('auto', cpu, 255) == machine.choose_dtype('auto', mps, 384) == 'float32'
        assert machine.choose_dtype('auto', cuda, 64) == best
        assert machine.choose_dtype('float32', cuda, 384) == 'float32'
        assert machine.choose_dtype('bfloat16', cpu, 64) == 'bfloat16'


def test_the_environment_needs_neither_git_nor_proc(monkeypatch, tmp_path):
    fields = ['device_name', 'threads', 'torch', 'python', 'platform', 'git_commit', 'git_dirty']
    whole = machine.environment(torch.device('cpu'))
    assert list(whole) == fields and whole['device_name'] and whole['threads'] == torch.get_num_threads()
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr('builtins.open', lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.delenv('GIT_COMMIT', raising=False)
    bare = machine.environment(torch.device('cpu'))
    assert list(bare) == fields and bare['git_commit'] is bare['git_dirty'] is None
    monkeypatch.setenv('GIT_COMMIT', 'abc')                     # on a copy without .git
    assert machine.environment(torch.device('cpu'))['git_commit'] == 'abc'
    assert isinstance(bare['device_name'], str)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc')
def test_resident_memory_grows_with_what_is_held_and_the_peak_stays():
    before, hog = machine.resident_gb('VmRSS'), mmap.mmap(-1, 300_000_000)     # not the heap, which may keep what it had
    for page in range(0, len(hog), 4096):
        hog[page] = 1
    assert machine.resident_gb('VmRSS') > before + 0.25
    hog.close()
    assert machine.resident_gb('VmRSS') < before + 0.15
    assert machine.peak_memory_gb(torch.device('cpu')) > before + 0.25


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'x'
    machine.write_atomically(path, lambda file: file.write(b'first'))

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(SystemExit):
        machine.write_atomically(path, lambda file: file.write(b'second'))
    assert 'No space left' in capsys.readouterr().err
    assert path.read_bytes() == b'first' and [p.name for p in tmp_path.iterdir()] == ['x']


def test_any_flipped_byte_of_a_saved_file_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / 'x.pt'
    content = {'weights': torch.arange(40.0), 'step': 7, 'name': 'é'}
    torch.save(content, path)
    whole, loaded = path.read_bytes(), 0
    record = whole.index(torch.arange(40.0).numpy().tobytes())
    directory = whole.index(b'PK\1\2')                                              # where one bit may say a lot
    for i, flip in [(i, 255) for i in range(len(whole))] + [(i, 16) for i in range(directory, len(whole))]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1:])
        try:
            there = machine.load_whole(path)
        except Exception:
            continue
        loaded += 1
        assert not record <= i < record + 160
        assert there.keys() == content.keys() and torch.equal(there['weights'], content['weights'])
        assert (there['step'], there['name']) == (7, 'é')
    assert 0 < loaded < len(whole)                                            # padding, times, attributes


def test_what_is_no_archive_is_not_loaded(tmp_path):
    torch.save([1], tmp_path / 'old.pt', _use_new_zipfile_serialization=False)      # has no checksums
    with pytest.raises(zipfile.BadZipFile):
        machine.load_whole(tmp_path / 'old.pt')
