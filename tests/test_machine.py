"""machine.py: the device that was asked for or one line, memory, files that are written whole or not at all."""
import errno
import mmap
import os
import subprocess
import sys

import pytest
import torch
from conftest import refusal

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


@pytest.mark.parametrize('name, how, words', [
    ('abacus', {}, ['--device=abacus is no device', 'cpu, mps']), ('cuda:x', {}, ['is no device']),
    ('', {}, ['is no device']), ('meta', {}, ['no meta', 'sees 0']), ('cuda:7', {}, ['no cuda:7', 'sees 2']),
    ('cpu:1', {}, ['no cpu:1']), ('auto', {'index': 2}, ['no cuda:2', 'sees 2']),
    ('mps', {'kinds': ('cuda', 'cpu')}, ['no mps for this program', '--device=auto'])])         # though it is here
def test_a_device_that_is_none_or_not_here_is_one_line(gpus, capsys, name, how, words):
    chosen = gpus(cuda=2, mps=True)
    line = refusal(capsys, lambda: machine.choose_device(name, **how))
    assert all(word in line for word in words) and not chosen, line


def test_auto_is_bfloat16_only_where_the_processor_computes_in_it_and_the_model_is_wide_enough(monkeypatch):
    cpu, cuda, mps = map(torch.device, ('cpu', 'cuda', 'mps'))
    for has in (True, False):
        best = 'bfloat16' if has else 'float32'
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has)
        for amx, avx512 in ((has, False), (False, has)):
            monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
            monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
            least = 128 if amx else 256
            assert machine.choose_dtype('auto', cpu, least) == machine.choose_dtype('auto', cpu, 384) == best
            assert machine.choose_dtype('auto', cpu, least - 1) == machine.choose_dtype('auto', mps, 384) == 'float32'
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


def test_the_commit_is_not_that_of_a_repository_that_it_is_only_copied_into(monkeypatch, tmp_path):
    git = lambda *words: subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=x', '-c', 'user.email=x', *words], check=True,
                                        capture_output=True, text=True).stdout.strip()
    git('init')
    git('commit', '--allow-empty', '-m', 'theirs')
    (tmp_path / 'machine.py').write_text('')
    monkeypatch.setattr(machine, '__file__', str(tmp_path / 'machine.py'))
    monkeypatch.setenv('GIT_COMMIT', 'abc')
    found = machine.environment(torch.device('cpu'))
    assert (found['git_commit'], found['git_dirty']) == ('abc', None)
    git('add', 'machine.py')
    found = machine.environment(torch.device('cpu'))
    assert (found['git_commit'], found['git_dirty']) == (git('rev-parse', 'HEAD'), True)


@pytest.mark.skipif(sys.platform == 'win32', reason='nothing tells')
def test_the_peak_of_resident_memory_stays_where_it_was_and_is_none_where_nothing_tells(monkeypatch):
    cpu, hog = torch.device('cpu'), mmap.mmap(-1, 300_000_000)         # not the heap, which may keep what it had
    for page in range(0, len(hog), 4096):
        hog[page] = 1
    hog.close()
    peak = machine.peak_memory_gb(cpu)
    assert 0.3 < peak < 64
    monkeypatch.setattr('builtins.open', lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    assert 0.9 * peak < machine.peak_memory_gb(cpu) < 64                           # getrusage
    monkeypatch.setitem(sys.modules, 'resource', None)                             # Windows has neither
    assert machine.peak_memory_gb(cpu) is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'x'
    machine.write_atomically(path, lambda file: file.write(b'first'))

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    assert 'No space left' in refusal(capsys, machine.write_atomically, path, lambda file: file.write(b'second'))
    assert path.read_bytes() == b'first' and [p.name for p in tmp_path.iterdir()] == ['x']


def test_a_checkpoint_that_outgrows_the_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, capsys):
    resource = pytest.importorskip('resource', reason='no limit on the size of files')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))     # in the midst of a tensor torch.save hides the cause
    try:
        line = refusal(capsys, machine.write_atomically, tmp_path / 'x', lambda file: torch.save(torch.zeros(10**6), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'File too large' in line and not list(tmp_path.iterdir())
