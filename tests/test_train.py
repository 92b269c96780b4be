"""train.py: what is reported was run, and a run that is repeated, split up, interrupted or resumed ends in the same numbers."""
import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

import data
import hf
import machine
import muon
import tracker
from configurator import configure, run_knobs
from conftest import REPOSITORY, TINY, flags, one_line
from model import LanguageModel, ModelConfig
from result import SCHEMA

VARIANTS = ['baseline', 'gqa', 'mqa', 'lora', 'enhanced', 'mla']


def written(folder):
    """The result file in it, however the run ended."""
    return json.loads((folder / 'result.json').read_text())


def result_of(run):
    assert run.code == 0, run.err
    return written(run.folder)


def weights_of(run):
    return torch.load(run.folder / 'checkpoint.pt', weights_only=True)['model']


def losses_of(run):
    return [(r['train_loss'], r['val_loss'], r['grad_norm']) for r in result_of(run)['history']]


def assert_same_bits(a, b):
    assert losses_of(a) == losses_of(b)
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def call_at_step(monkeypatch, step, what):
    """what() at the moment when update number `step` (from 0) asks for its batch."""
    batch = data.Corpus.batch
    monkeypatch.setattr(data.Corpus, 'batch', lambda self, seed, t, n: (what() if t == step else None, batch(self, seed, t, n))[1])


@pytest.fixture
def program(corpus, data_root, tmp_path):
    """program(**knobs): train.py and the flags for a run as the fixture `train` makes it, for a process of its own."""
    return lambda **knobs: [str(REPOSITORY / 'train.py'), *flags(**{
        **TINY, 'dataset': corpus, 'data_root': data_root, 'out_dir': tmp_path / 'run', **knobs})]


@pytest.fixture
def interrupted(train, monkeypatch):
    """interrupted(name, ..., at=2, number=SIGINT, **knobs): a run that gets this signal in update number `at`."""
    def run(*arguments, at=2, number=signal.SIGINT, **knobs):
        with monkeypatch.context() as m:
            call_at_step(m, at, lambda: signal.raise_signal(number))
            return train(*arguments, **knobs)
    return run


# ---------------------------------------------------------------------------------------------------------------------
# What is reported was run

@pytest.mark.parametrize('attn', VARIANTS)
def test_the_result_describes_the_network_that_was_trained(train, attn):
    run = train(attn, attn=attn)
    result, weights = result_of(run), weights_of(run)
    C, H, L = TINY['n_embd'], TINY['n_head'], TINY['n_layer']
    latent = attn in ('lora', 'enhanced', 'mla')
    m = result['model']
    assert m['attention_class'] == ('LatentAttention' if latent else 'MultiHeadAttention')
    assert m['params_total'] == sum(p.numel() for p in weights.values())
    assert m['params_attention'] == sum(p.numel() for name, p in weights.items() if '.attn.' in name)
    assert any('kv_a_proj_with_mqa' in name for name in weights) == latent
    # attention's parameters and the cache in closed form, from the sizes in the config (reference, section 1)
    c, d = result['config'], C // H
    if latent:
        q, r, dn, dr, dv = (c[k] for k in ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'))
        size = (C * q + q + q * H * (dn + dr) if q else C * H * (dn + dr)) + C * (r + dr) + r + r * H * (dn + dv) + H * dv * C
        size += (q + r + dr + C) if attn == 'enhanced' else 0
        assert m['kv_cache_bytes_per_token'] == L * (r + dr) * 4
    else:
        size = 2 * C * C + 2 * C * c['n_kv_head'] * d
        assert m['kv_cache_bytes_per_token'] == L * 2 * c['n_kv_head'] * d * 4
    assert m['params_attention'] == L * size
    assert m['kv_cache_bytes_per_token_16bit'] * 2 == m['kv_cache_bytes_per_token']
    assert m['params_total'] - m['params_active'] == L * (4 - 2) * 3 * C * TINY['d_ff']
    assert result['best'] == {'step': 6, 'val_loss': result['final']['val_loss'], 'file': 'checkpoint.pt'}
    assert result['status'] == 'complete' and result['final']['updates'] == 6 and result['final']['tokens'] == 6 * 6 * 32


def test_a_run_whose_optimizer_holds_another_model_is_refused(train, monkeypatch):
    adamw, other = torch.optim.AdamW, LanguageModel(ModelConfig(vocab_size=257, n_layer=2, n_head=2, n_embd=32, d_ff=32, n_expert=4))
    monkeypatch.setattr(torch.optim, 'AdamW', lambda groups, **kw: adamw([{'params': list(other.parameters())}], **kw))
    with pytest.raises(RuntimeError, match='not those of the model that would be reported'):
        train()


def test_the_result_file_has_the_fields_of_its_schema(train):
    result = result_of(train(attn='mla'))
    assert set(result) == {'schema', 'status', 'name', 'started', 'finished', 'error', 'config', 'model', 'data', 'environment',
                           'earlier_environments', 'history', 'final', 'best'}
    assert result['earlier_environments'] == []
    assert result['schema'] == SCHEMA
    knobs = [*run_knobs()[0], *run_knobs()[1]]
    assert set(knobs) <= set(result['config']) and len(knobs) > 50          # every knob, with the row applied:
    assert all(result['config'][k] is not None for k in ('kv_lora_rank', 'rope_scaling', 'balance_loss_weight', 'eval_interval'))
    assert {'train_sha256', 'val_sha256', 'val_bytes', 'uniform_loss', 'unigram_loss'} <= set(result['data'])
    assert {'device_name', 'threads', 'torch', 'python', 'platform', 'git_commit', 'git_dirty', 'source_sha256'} <= set(result['environment'])
    assert {'train.py', 'model.py', 'attention.py', 'moe.py'} <= set(result['environment']['source_sha256'])
    assert [r['step'] for r in result['history']] == [1, 2, 3, 4, 5, 6]
    for r in result['history']:
        assert set(r) == {'step', 'tokens', 'seconds', 'learning_rate', 'train_loss', 'val_loss', 'grad_norm', 'balance'}
        assert (r['val_loss'] is not None) == (r['step'] in (3, 6)) and r['tokens'] == r['step'] * 6 * 32
    final = result['final']
    assert {'step', 'updates', 'tokens', 'val_loss', 'val_perplexity', 'val_accuracy', 'val_bits_per_byte', 'seconds_training', 'seconds_total',
            'step_ms_median', 'tokens_per_second', 'mfu', 'peak_memory_gb', 'peak_memory_kind'} <= set(final)
    assert final['peak_memory_kind'] == 'resident' and 0.1 < final['peak_memory_gb'] < 24
    assert final['val_perplexity'] == pytest.approx(math.exp(final['val_loss']))
    assert np.allclose(np.sum(final['expert_load'], 1), 1) and np.shape(final['expert_load']) == (2, 4)


def test_the_validation_loss_is_that_of_every_target_once_and_of_cross_entropy_alone(train, corpus, data_root):
    run = train(attn='enhanced', micro_batch_size=4, balance_loss_weight=3.0)       # windows do not fill the last micro-batch
    result = result_of(run)
    model = LanguageModel(ModelConfig(**{k: result['config'][k] for k in ModelConfig.__dataclass_fields__})).double()
    model.load_state_dict(weights_of(run))
    tokens = torch.from_numpy(np.array(data.Corpus(data.prepare(str(corpus), 'bytes', 0, root=data_root), 0, 0, 32).val, dtype=np.int64))
    nll = right = 0
    for start in range(0, len(tokens) - 1, 32):                                     # one window after the other, the last one short
        window = tokens[start:start + 33]
        logits = model(window[None, :-1])[0]
        nll += torch.nn.functional.cross_entropy(logits, window[1:], reduction='sum').item()
        right += (logits.argmax(-1) == window[1:]).sum().item()
    assert result['final']['val_loss'] == pytest.approx(nll / (len(tokens) - 1), rel=1e-6)
    assert result['final']['val_accuracy'] == pytest.approx(right / (len(tokens) - 1), abs=2 / len(tokens))
    assert result['final']['val_bits_per_byte'] == pytest.approx(nll / math.log(2) / result['data']['val_bytes'], rel=1e-6)


def test_figures_of_balance_are_those_of_the_validation_tokens_and_of_no_padding(train, corpus, data_root):
    run = train(attn='mla', max_val_tokens=32 + 2, micro_batch_size=4)             # a full window, and one of a single token
    result = result_of(run)
    model = LanguageModel(ModelConfig(**{k: result['config'][k] for k in ModelConfig.__dataclass_fields__})).double()
    model.load_state_dict(weights_of(run))
    tokens = torch.from_numpy(np.array(data.Corpus(data.prepare(str(corpus), 'bytes', 0, root=data_root), 0, 34, 32).val, dtype=np.int64))
    parts = [model(tokens[None, a:b], tokens[None, a + 1:b + 1]) for a, b in ((0, 32), (32, 33))]
    load = sum(o.load for o in parts).double()
    assert torch.allclose(torch.tensor(result['final']['expert_load']).double(), load / load.sum(1, keepdim=True))
    assert load.sum() == 2 * 33 * 2
    assert result['final']['max_violation'] == pytest.approx((load / (33 * 2 / 4)).max().item() - 1)
    for field, value in (('balance_loss', lambda o: o.balance_loss), ('z_loss', lambda o: o.z_loss), ('router_entropy', lambda o: o.entropy.mean())):
        assert result['final'][field] == pytest.approx((32 * value(parts[0]).item() + value(parts[1]).item()) / 33, rel=1e-5), field


def test_layers_without_experts_train_and_have_no_figures_of_balance(train):
    some, none = (result_of(train(f'd{n}', n_dense_layer=n)) for n in (1, 2))
    assert np.shape(some['final']['expert_load']) == (1, 4) and some['final']['max_violation'] >= 0
    assert none['final']['expert_load'] == [] and none['final']['max_violation'] is none['final']['router_entropy'] is None
    assert none['final']['val_loss'] < none['data']['uniform_loss']


def test_evaluation_reads_the_experts_load_in_an_order_that_a_mac_allows(train, monkeypatch):
    class OnAMac:                                           # MPS has no float64
        def __init__(self, tensor):
            self.flatten = tensor.flatten

        def double(self):
            raise TypeError('Cannot convert a MPS Tensor to float64 dtype')
    forward = LanguageModel.forward

    def evaluated(self, *arguments):
        o = forward(self, *arguments)
        return o if self.training else o._replace(load=OnAMac(o.load))
    plain = result_of(train('plain'))
    monkeypatch.setattr(LanguageModel, 'forward', evaluated)
    assert result_of(train('mac'))['final']['expert_load'] == plain['final']['expert_load']


@pytest.mark.parametrize('gpu, dtype, peak', [
    ('NVIDIA L4', 'bfloat16', 121e12), ('NVIDIA L4', 'float32', None), ('NVIDIA L40', 'bfloat16', None),
    ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'bfloat16', None)])
def test_mfu_is_by_the_rate_of_exactly_this_gpu_in_this_dtype_or_null(train, monkeypatch, gpu, dtype, peak):
    monkeypatch.setattr(machine, 'device_name', lambda device: gpu)
    result = result_of(train(dtype=dtype, max_steps=1))
    mfu = peak and result['final']['tokens_per_second'] * result['model']['flops_per_token'] / peak
    assert result['environment']['device_name'] == gpu and result['final']['mfu'] == (mfu and pytest.approx(mfu))


def test_the_log_says_what_its_numbers_are(train):
    run = train(max_train_tokens=1152)
    result = result_of(run)
    assert f'cache {result["model"]["kv_cache_bytes_per_token"]:,} bytes a token in float32\n' in run.out
    assert '1,152 for training, seen 1.00 times; ' in run.out           # 6 updates of 6 x 32
    assert f'busiest expert {1 + result["final"]["max_violation"]:.2f} x even, ' in run.out


def test_a_longer_run_learns_more_than_unigram_frequencies_know(train):
    result = result_of(train(attn='enhanced', max_steps=150, eval_interval=150))
    assert result['final']['val_loss'] < 0.6 * result['data']['unigram_loss'] < result['data']['uniform_loss']


def test_the_auxiliary_losses_do_not_enter_the_reported_training_loss(train):
    with_, without = (result_of(train(f'w{w}', balance_loss_weight=w, z_loss_weight=w, max_steps=2)) for w in (50.0, 0.0))
    assert with_['history'][0]['train_loss'] == without['history'][0]['train_loss']     # the same weights, before any update
    assert with_['history'][1]['train_loss'] != without['history'][1]['train_loss']     # which they did steer


def test_the_learning_rate_never_starts_at_zero_and_ends_where_configured(train):
    rates = [r['learning_rate'] for r in result_of(train(max_steps=8, warmup_steps=3, min_lr_ratio=0.2))['history']]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01]) and rates[-1] == pytest.approx(0.002)
    assert all(a > b for a, b in zip(rates[3:], rates[4:]))


# ---------------------------------------------------------------------------------------------------------------------
# Pairs, repetition, micro-batches, interruption

def test_two_variants_at_one_seed_start_equal_and_see_the_same_batches(train, monkeypatch):
    seen = []
    batch = data.Corpus.batch
    monkeypatch.setattr(data.Corpus, 'batch', lambda *a: (seen.append(batch(*a)), seen[-1])[1])
    first, second = train('a', attn='baseline', learning_rate=0.0), train('b', attn='lora', learning_rate=0.0)
    assert len(seen) == 12 and all(np.array_equal(seen[i][0], seen[6 + i][0]) for i in range(6))
    a, b = weights_of(first), weights_of(second)                                    # never moved: learning rate 0
    shared = [k for k in a if k in b and a[k].shape == b[k].shape]
    assert {'embed.weight', 'layers.0.moe.gate_proj', 'layers.1.moe.router.weight'} <= set(shared)
    assert all(torch.equal(a[k], b[k]) for k in shared)


def test_the_same_variant_and_seed_give_the_same_bits_and_another_seed_does_not(train):
    first, again, other = train('a', attn='enhanced'), train('b', attn='enhanced'), train('c', attn='enhanced', seed=1)
    assert_same_bits(first, again)
    assert losses_of(first)[0][0] != losses_of(other)[0][0]


@pytest.mark.parametrize('attn', ['baseline', 'enhanced'])
def test_the_micro_batch_changes_the_result_by_rounding_only(train, attn):
    whole, *parts = (result_of(train(f'm{m}', attn=attn, micro_batch_size=m)) for m in (6, 4, 1))
    for part in parts:
        assert part['final']['val_loss'] == pytest.approx(whole['final']['val_loss'], rel=1e-5)
        for a, b in zip(whole['history'], part['history']):
            assert b['train_loss'] == pytest.approx(a['train_loss'], rel=1e-5)
            assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=1e-3)
            assert b['balance']['balance_loss'] == pytest.approx(a['balance']['balance_loss'], rel=1e-4)


@pytest.mark.parametrize('dtype, resolved', [('float32', 4), ('bfloat16', 8)])
def test_left_alone_the_micro_batch_is_larger_in_bfloat16_and_the_result_says_so(train, dtype, resolved):
    run = train(dtype=dtype, micro_batch_size=None, max_steps=1)
    assert result_of(run)['config']['micro_batch_size'] == resolved


@pytest.mark.parametrize('name, status, knobs', [
    ('SIGINT', 130, dict(attn='enhanced')), ('SIGTERM', 143, dict(attn='mla', router='sigmoid', bias_update_rate=0.05)),
    ('SIGHUP', 129, dict(optimizer='muon'))], ids=str)
def test_interrupted_and_resumed_ends_in_the_bits_of_a_run_left_alone(train, interrupted, name, status, knobs):
    number = getattr(signal, name, None) or pytest.skip('no such signal on this system')
    alone = train('alone', **knobs)
    stopped = interrupted('stopped', at=3, number=number, resume='auto', **knobs)
    assert stopped.code == status and stopped.out.count('--resume=True') == 1      # twice would be refused
    result = written(stopped.folder)
    assert result['status'] == 'interrupted' and len(result['history']) == 4       # the step under way was finished
    resumed = train('stopped', resume=True, **knobs)
    assert 'going on after step 4' in resumed.out
    assert_same_bits(alone, resumed)


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='no such signal on this system')
def test_under_nohup_a_closed_terminal_is_ignored(interrupted):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert interrupted(number=signal.SIGHUP).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_resume_may_change_what_changes_no_number(train, interrupted):
    alone = result_of(train('alone'))
    interrupted('run')
    changed = result_of(train('run', resume=True, micro_batch_size=2, log_interval=2, checkpoint_interval=5))
    assert changed['final']['val_loss'] == pytest.approx(alone['final']['val_loss'], rel=1e-5)
    assert changed['config']['micro_batch_size'] == 2


def test_a_run_that_goes_on_elsewhere_tells_where_it_has_been(train, interrupted, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(machine, 'device_name', lambda device: 'another processor')
        assert interrupted('run').code == 130
        assert interrupted('run', at=3, resume=True).code == 130
    result = result_of(train('run', resume=True))
    assert [e['device_name'] for e in result['earlier_environments']] == ['another processor']
    assert result['environment']['device_name'] != 'another processor'


def test_a_finished_run_that_is_extended_ends_in_the_bits_of_a_long_one_where_the_schedule_is_the_same(train):
    long = train('long', max_steps=9, min_lr_ratio=1.0)
    train('run', max_steps=6, min_lr_ratio=1.0)
    extended = train('run', max_steps=9, min_lr_ratio=1.0, resume=True)
    assert 'extended from 6 updates: from here on the learning rate is that of a run of 9, next 1.00e-02' in extended.out
    assert_same_bits(long, extended)
    assert result_of(extended)['config']['extended_at'] == [6] and 'extended_at' not in result_of(long)['config']


def test_other_text_in_the_folder_that_a_run_was_trained_on_is_noticed_and_another_path_to_the_same_is_not(train, interrupted, corpus, tmp_path):
    mine = shutil.copytree(corpus, tmp_path / 'mine')
    assert interrupted(dataset=mine).code == 130
    (mine / 'more.txt').write_text('a new text\n' * 1000)
    one_line(train(dataset=mine, resume=True), 'other data', 'train_sha256')
    assert train(dataset=os.path.relpath(corpus), resume=True).code == 0


def test_out_of_memory_is_one_line_with_the_way_on_and_the_result_says_that_the_run_has_ended(train, monkeypatch):
    alone = train('alone')
    with monkeypatch.context() as m:
        m.setattr(LanguageModel, 'forward', failing_at(9, torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')))
        run = train(micro_batch_size=3)                     # two micro-batches an update
    one_line(run, 'out of memory after step 4 ', 'at --micro_batch_size=3; less changes no number', 'to go on: ', '--micro_batch_size=1\n')
    result = written(run.folder)
    assert result['status'] == 'interrupted' and 'out of memory' in result['error'] and result['final']['step'] == 3
    done = train(micro_batch_size=1, resume=True)
    assert result_of(done)['final']['val_loss'] == pytest.approx(result_of(alone)['final']['val_loss'], rel=1e-5)


def test_a_model_that_does_not_fit_is_one_line_and_leaves_no_result(train):
    run = train(d_ff=10**12)                                # 512 TB in one tensor
    one_line(run, 'out of memory before the first step: take a smaller model')
    assert not (run.folder / 'result.json').exists()


def test_a_fault_of_the_program_is_told_in_full_and_the_result_says_that_the_run_has_ended(train, monkeypatch, tmp_path):
    monkeypatch.setattr(LanguageModel, 'forward', failing_at(2, IndexError('a fault\nin lines')))
    with pytest.raises(IndexError):
        train()
    result = written(tmp_path / 'run')
    assert (result['status'], result['error']) == ('interrupted', 'IndexError: a fault')


def failing_at(n, error):
    """A LanguageModel.forward that raises at its n-th call in training."""
    forward, calls = LanguageModel.forward, []

    def fails(self, *arguments):
        calls.extend([1] * self.training)
        if len(calls) == n:
            raise type(error)(*error.args)                  # one kept here would keep the run's lock
        return forward(self, *arguments)
    return fails


@pytest.mark.parametrize('how', ['resume', 'overwrite', 'overwrite in a file'])
def test_the_command_that_an_interrupted_run_prints_can_be_pasted_into_a_shell(train, interrupted, tmp_path, how):
    (tmp_path / 'mine.py').write_text('overwrite = True\n')
    files = [tmp_path / 'mine.py'] * (how == 'overwrite in a file')
    knobs = {} if files else {how: 'auto' if how == 'resume' else True}
    alone = train('alone', attn='mla')
    stopped = interrupted('a run', *files, attn='mla', experiment="it's mine", **knobs)     # both need quotes
    command = re.search('to go on: (.*)', stopped.out)[1]
    assert '--overwrite=True' not in command and command.count('--resume=') == 1
    if how == 'resume':
        done = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    else:                                                   # the same, but forked once the shell has taken it to pieces
        words = subprocess.run(f"printf '%s\\n' {command}", shell=True, capture_output=True, text=True).stdout
        python, *arguments = words.splitlines()
        assert python == sys.orig_argv[0]
        done = forked.run(*arguments)
    assert done.returncode == 0 and 'going on after step 3' in done.stdout, (command, done.stderr)
    assert losses_of(alone) == [(r['train_loss'], r['val_loss'], r['grad_norm']) for r in written(stopped.folder)['history']]


def test_the_selection_bias_moves_once_per_update_over_the_whole_batch(train):
    bias = weights_of(train(router='sigmoid', bias_update_rate=0.25, micro_batch_size=1, max_steps=5))['layers.0.moe.e_score_correction_bias']
    assert bias.abs().max() > 0 and bias.abs().max() <= 5 * 0.25
    assert torch.equal(bias / 0.25, (bias / 0.25).round())                          # whole steps, at most one per update


TORCHRUN = 'import os, sys; os.setsid(); from torch.distributed.run import main; main(sys.argv[2:])'


@pytest.fixture
def torchrun(program, tmp_path):
    """torchrun(processes, **knobs): start it, in a session of its own; all write to tmp_path / 'log' -> its process."""
    def run(processes, **knobs):
        log = str(tmp_path / 'log')
        started.append(forked.start(['-c', TORCHRUN, '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0',
                                     f'--nproc_per_node={processes}', *program(**knobs)], streams=(log, log)))
        return started[-1]
    if not hasattr(os, 'fork'):
        pytest.skip('no fork')
    started = []
    yield run
    for process in started:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def ranks(program, tmp_path):
    """ranks(processes, **knobs): start train.py as torchrun would, but forked: in a quarter of the time -> the processes."""
    if not hasattr(os, 'fork'):
        pytest.skip('no fork')

    def run(processes, **knobs):
        with socket.create_server(('127.0.0.1', 0)) as free:
            where = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': str(processes)}
        log = str(tmp_path / 'log')
        started.extend(forked.start(program(**knobs), REPOSITORY, (log, log), RANK=str(i), LOCAL_RANK=str(i), **where)
                       for i in range(processes))
        return started
    started = []
    yield run
    for process in started:
        process.kill()


@pytest.fixture
def several(ranks, torchrun, tmp_path):
    """several(processes, **knobs) -> what they say, ended well."""
    def run(processes, by_torchrun=False, **knobs):
        started = [torchrun(processes, **knobs)] if by_torchrun else ranks(processes, **knobs)
        for process in started:
            process.join(120)
        said = (tmp_path / 'log').read_text()
        assert all(process.exitcode == 0 for process in started), said
        return said
    return run


@pytest.mark.parametrize('processes, knobs', [(2, dict(by_torchrun=True)), (3, {}), (2, dict(shard=True, micro_batch_size=1))],
                         ids=['2 under torchrun', '3', '2 sharded'])
def test_several_processes_give_the_curve_of_one(train, several, tmp_path, processes, knobs):
    knobs = dict(attn='enhanced', micro_batch_size=2, router='sigmoid', bias_update_rate=0.05) | knobs
    alone = result_of(train('alone', **{k: v for k, v in knobs.items() if k not in ('shard', 'by_torchrun')}))
    assert several(processes, **knobs).count('step 6/6') == 1                       # one of them speaks
    together = written(tmp_path / 'run')
    assert together['environment']['world_size'] == processes
    assert together['model'] == alone['model'] and together['data'] == alone['data']
    assert together['final']['val_loss'] == pytest.approx(alone['final']['val_loss'], rel=1e-5)
    assert np.allclose(together['final']['expert_load'], alone['final']['expert_load'], atol=2e-3)
    for a, b in zip(alone['history'], together['history'], strict=True):
        assert b['train_loss'] == pytest.approx(a['train_loss'], rel=1e-5)
        assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=1e-3)
        assert b['balance']['balance_loss'] == pytest.approx(a['balance']['balance_loss'], rel=1e-4)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_run_goes_on_with_another_number_of_processes(train, interrupted, several, tmp_path, optimizer):
    alone = result_of(train('alone', attn='mla', optimizer=optimizer))
    assert interrupted('run', attn='mla', optimizer=optimizer).code == 130
    several(2, attn='mla', optimizer=optimizer, resume=True)
    moved = written(tmp_path / 'run')
    assert [r['train_loss'] for r in moved['history']] == pytest.approx([r['train_loss'] for r in alone['history']], rel=1e-5)
    assert moved['final']['val_loss'] == pytest.approx(alone['final']['val_loss'], rel=1e-5)


def test_shards_start_from_the_numbers_of_one_process_and_one_process_goes_on_with_what_they_wrote(train, several, tmp_path):
    knobs = dict(attn='mla', router='sigmoid', dtype='bfloat16', learning_rate=0.0, max_steps=2, eval_interval=1)
    alone = result_of(train('alone', **knobs))
    several(2, shard=True, **knobs)
    shards = written(tmp_path / 'run')
    assert shards['final']['val_loss'] == pytest.approx(alone['final']['val_loss'], rel=1e-4)      # bfloat16 here and there
    for a, b in zip(alone['history'], shards['history'], strict=True):
        assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=0.02)
    weights = torch.load(tmp_path / 'run/checkpoint.pt', weights_only=True)['model']
    started = LanguageModel(ModelConfig(**{k: shards['config'][k] for k in ModelConfig.__dataclass_fields__}), seed=0).state_dict()
    assert weights.keys() == started.keys()
    for name in started:
        assert torch.equal(weights[name], started[name]) or name.endswith('bias'), name
    more = train('run', **{**knobs, 'max_steps': 3}, resume=True, shard=False)
    assert result_of(more)['final']['val_loss'] == pytest.approx(alone['final']['val_loss'], rel=1e-4)


def test_of_several_processes_one_says_what_is_wrong(ranks, tmp_path):
    first, second = ranks(2, n_embd=33)
    first.join(60)                                          # torchrun ends the others then
    second.join(3)                                          # by now it has met the same
    assert first.exitcode == 2 and second.is_alive()
    log = (tmp_path / 'log').read_text()
    assert log.count('train.py: ') == 1 and 'n_embd (33)' in log


ENDLESS = dict(max_steps=100_000, eval_interval=50_000, log_interval=5)


def test_a_dead_process_of_two_takes_the_other_with_it_within_a_minute(torchrun, tmp_path):
    whole, log = torchrun(2, **ENDLESS), tmp_path / 'log'
    wait_for(lambda: log.exists() and 'step ' in log.read_text(), 60)
    workers = subprocess.run(['pgrep', '-P', str(whole.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    whole.join(60)
    assert whole.exitcode == 1 and 'FAILED' in log.read_text()


def test_one_interrupted_process_of_two_stops_both(ranks, tmp_path):
    started, log = ranks(2, **ENDLESS), tmp_path / 'log'
    wait_for(lambda: log.exists() and 'step ' in log.read_text(), 60)
    os.kill(started[-1].pid, signal.SIGINT)
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [143, 130]          # the other one as if by SIGTERM
    said = re.search('to go on: (.*)', log.read_text())[1]
    assert said.startswith('torchrun --nproc_per_node=2 ') and said.endswith(' --resume=True')
    assert torch.load(tmp_path / 'run/checkpoint.pt', weights_only=True)['step'] < 100_000
    assert written(tmp_path / 'run')['status'] == 'interrupted'


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


def test_killed_between_the_last_checkpoint_and_the_result_a_run_is_completed(train):
    whole = train('whole')
    killed = train('killed')
    path = killed.folder / 'result.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'status': 'running'}))     # as it stood at that moment
    assert_same_bits(whole, train('killed', resume=True))
    assert json.loads(path.read_text())['status'] == 'complete'


@pytest.mark.skipif(sys.platform == 'win32', reason='no fork')
def test_killed_fifteen_times_at_any_moment_a_run_ends_in_the_bits_of_one_left_alone(tmp_path, program):
    knobs = dict(max_steps=30, eval_interval=10, checkpoint_interval=1, n_layer=1, attn='enhanced', resume='auto')
    rng, kills, chains = random.Random(0), 0, 0

    def run(folder, seconds=None):
        """Start or go on in folder, for so long at most -> exit status, None if it had to be killed."""
        process = forked.start(program(**knobs, out_dir=folder))
        process.join(seconds)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
        return status

    def outcome(folder):
        history = written(folder)['history']
        return [(r['train_loss'], r['val_loss']) for r in history], torch.load(folder / 'checkpoint.pt', weights_only=True)['model']

    begun = time.monotonic()
    assert run(tmp_path / 'alone', 120) == 0
    whole = time.monotonic() - begun                        # scales the moments of the kills to the machine
    losses, weights = outcome(tmp_path / 'alone')
    while kills < 15:
        folder, chains = tmp_path / f'killed{chains}', chains + 1
        while (status := run(folder, rng.uniform(0.1, 0.6) * whole if kills < 15 else 120)) is None:
            kills += 1
            if (folder / 'result.json').exists():           # whole at every moment, and so is the checkpoint
                assert written(folder)['status'] in ('running', 'complete')
            if (folder / 'checkpoint.pt').exists():
                torch.load(folder / 'checkpoint.pt', weights_only=True)
        assert status == 0
        killed_losses, killed_weights = outcome(folder)
        assert killed_losses == losses and all(torch.equal(killed_weights[k], weights[k]) for k in weights)


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='counts memory and files through /proc')
def test_neither_memory_nor_open_files_grow_over_a_thousand_updates(train, monkeypatch):
    seen, step = [], iter(range(10 ** 6))

    def look():
        if next(step) in (300, 999):
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            seen.append((pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20, len(os.listdir('/proc/self/fd'))))
    batch = data.Corpus.batch
    monkeypatch.setattr(data.Corpus, 'batch', lambda *a: (look(), batch(*a))[1])
    run = train(n_layer=1, n_embd=16, d_ff=16, n_expert=2, top_k=1, block_size=16, batch_size=2, micro_batch_size=2, max_steps=1000,
                eval_interval=500)
    assert run.code == 0 and run.out.count('\n') < 220                              # the log stays short, too
    (early, files_early), (late, files_late) = seen
    assert late - early < 3.5 and files_late == files_early                         # MiB: 5 KiB an update would be too many


# ---------------------------------------------------------------------------------------------------------------------
# Folders

def test_a_finished_folder_is_not_overwritten_without_being_told_to(train):
    first = train()
    content = (first.folder / 'result.json').read_bytes()
    one_line(train(), 'finished run', '--overwrite=True')
    one_line(train(seed=5), 'another config', 'seed: 0 there, 5 here')
    one_line(train(resume=True, learning_rate=0.5), 'another config', 'learning_rate: 0.01 there, 0.5 here')
    assert (first.folder / 'result.json').read_bytes() == content
    again = train(resume=True)
    assert again.code == 0 and 'complete already' in again.out and (first.folder / 'result.json').read_bytes() == content
    assert train(seed=5, overwrite=True).code == 0


def test_overwriting_throws_the_old_checkpoint_away_before_anything_else(train, monkeypatch):
    folder, there = train().folder, []
    call_at_step(monkeypatch, 0, lambda: there.append((folder / 'checkpoint.pt').exists()))
    assert train(overwrite=True).code == 0 and there == [False]         # or, killed now, it would be gone on with


def test_a_full_disk_leaves_the_previous_checkpoint_whole_and_says_so(train, monkeypatch):
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 4:                                 # result.json, checkpoint.pt, result.json, then this one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd)
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', fsync)
        run = train(max_steps=9)
    one_line(run, 'checkpoint.pt', 'No space left', 'still there')
    assert torch.load(run.folder / 'checkpoint.pt', weights_only=True)['step'] == 3
    assert sorted(p.name for p in run.folder.iterdir()) == ['.lock', 'checkpoint.pt', 'result.json']
    assert losses_of(train(max_steps=9, resume=True)) == losses_of(train('other', max_steps=9))


def test_a_run_that_diverges_stops_at_once_and_keeps_the_last_good_checkpoint(train, monkeypatch):
    clip = muon.clip_gradients
    seen = []

    def poisoned(parameters, limit):
        seen.append(1)
        return clip(parameters, limit) * (math.nan if len(seen) == 5 else 1)
    monkeypatch.setattr(muon, 'clip_gradients', poisoned)
    run = train()
    assert run.code == 3 and 'diverged at step 5' in run.err
    result = written(run.folder)
    assert result['status'] == 'diverged' and 'step 5' in result['error'] and result['final']['step'] == 3
    assert torch.load(run.folder / 'checkpoint.pt', weights_only=True)['step'] == 3
    assert train(resume=True).code == 3                                             # not silently tried again


def test_a_grad_clip_of_0_clips_nothing(train):
    whole = losses_of(train(grad_clip=0))
    assert whole == losses_of(train('never reached', grad_clip=1e9)) != losses_of(train('clipped', grad_clip=0.01))


def test_a_learning_rate_beyond_reason_is_recorded_as_diverged(train):
    run = train(learning_rate=1e30, grad_clip=0, max_steps=20, eval_interval=20)
    result = written(run.folder)
    assert run.code == 3 and result['status'] == 'diverged' and 'nan' in result['error'] and result['final'] is None


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize('knobs, words', [
    (dict(attn='lorra'), ['lorra', 'one of baseline']), (dict(n_embd=33), ['n_embd (33)', 'n_head (2)']),
    (dict(rope_scaling='yarm'), ['yarm', 'yarn']), (dict(block_size=100_000), ['block_size']),
    (dict(beta1=1), ['beta1 (1.0)', 'below 1']), (dict(beta2=-0.1), ['beta2 (-0.1)']),
    (dict(resume=True, overwrite=True), ['--resume=True', '--overwrite=True', 'keep one']),
    (dict(max_steps=0), ['max_steps']), (dict(max_train_tokens=-1), ['max_train_tokens', 'at least 0']), (dict(micro_batch_size=0), ['micro_batch_size']), (dict(learning_rate=-1), ['learning_rate']),
    (dict(shard=True), ['--shard=True', 'torchrun']), (dict(dataset='no/such/place'), ['no/such/place']),
    (dict(device='cuda:99'), ['cuda']), (dict(routr='sigmoid'), ['routr', 'router'])], ids=str)
def test_bad_input_ends_in_one_line_and_writes_nothing(train, tmp_path, knobs, words):
    one_line(train(**knobs), *words)
    assert not (tmp_path / 'run').exists()


# ---------------------------------------------------------------------------------------------------------------------
# Weights to start from

def test_training_goes_on_from_the_weights_of_a_run_with_a_fresh_optimizer(train, tmp_path):
    source = train('source', attn='mla', n_layer=1, kv_lora_rank=8)
    network = {'attn': ..., 'n_layer': ..., 'n_head': ..., 'n_embd': ..., 'd_ff': ..., 'n_expert': ..., 'block_size': ...}
    run = train(init_from=source.folder, **network, learning_rate=0.0, seed=5)         # its network, without being told
    result, before = result_of(run), result_of(source)
    assert result['model'] == {**before['model'], 'initialisation': 'as init_from says'}
    assert result['final']['val_loss'] == before['final']['val_loss']
    digest = hashlib.sha256((source.folder / 'checkpoint.pt').read_bytes()).hexdigest()
    assert result['config']['init_from'] == f'source sha256:{digest}' and result['config']['kv_lora_rank'] == 8
    assert all(torch.equal(a, b) for a, b in zip(weights_of(run).values(), weights_of(source).values()))
    longer = result_of(train('longer', init_from=source.folder, **network))
    assert longer['final']['updates'] == 6 and longer['final']['val_loss'] < before['final']['val_loss']
    assert longer['name'] == 'mla'                          # what was trained, not what --attn says by default
    one_line(train('x', init_from=source.folder, **{**network, 'n_layer': 3}), '--n_layer=3', 'source has: 1')
    (tmp_path / 'mine.py').write_text("attn = 'baseline'\n")                       # the default, but it was asked for
    one_line(train('x', init_from=source.folder, **{**network, 'attn': 'baseline'}), '--attn=baseline', 'source has: mla')
    one_line(train('x', tmp_path / 'mine.py', init_from=source.folder, **network), '--attn=baseline', 'source has: mla')
    one_line(train('x', init_from=source.folder, **network, tokenizer='bpe', vocab_size=280), 'another vocabulary', '257')
    one_line(train('x', init_from=tmp_path / 'nowhere', **network), 'nowhere is not there')
    wider = result_of(train('wider', init_from=source.folder, **{**network, 'block_size': 64}, rope_scaling='yarn', rope_factor=2.0))
    assert wider['config']['block_size'] == 64 and wider['config']['rope_scaling'] == 'yarn'       # neither has weights


def test_training_goes_on_from_a_hugging_face_folder_and_a_damaged_one_is_one_line(train, tmp_path):
    source = train('source', attn='mla', router='sigmoid')
    model, tokenizer = hf.from_run(source.folder)
    hf.to_folder(model, tokenizer, tmp_path / 'published')
    (tmp_path / 'published/special_tokens_map.json').touch()        # an empty file, of a download that was cut off
    network = {'attn': ..., 'n_layer': ..., 'n_head': ..., 'n_embd': ..., 'd_ff': ..., 'n_expert': ..., 'block_size': ...}
    run = train(init_from=tmp_path / 'published', **network, learning_rate=0.0, bias_update_rate=0)
    assert result_of(run)['final']['val_loss'] == pytest.approx(result_of(source)['final']['val_loss'], rel=1e-6)
    assert re.fullmatch('published sha256:[0-9a-f]{64}', result_of(run)['config']['init_from'])
    other = json.loads((tmp_path / 'published/tokenizer.json').read_text())     # as many tokens, two of them exchanged
    vocab = other['model']['vocab']
    vocab['a'], vocab['b'] = vocab['b'], vocab['a']
    (tmp_path / 'published/tokenizer.json').write_text(json.dumps(other))
    one_line(train('x', init_from=tmp_path / 'published', **network), 'published', 'another vocabulary')
    (tmp_path / 'published/config.json').write_text('{"model_type": "gpt2"}')
    one_line(train('x', init_from=tmp_path / 'published', **network), 'published', 'only MixtralForCausalLM')


# ---------------------------------------------------------------------------------------------------------------------
# Places to look on

def test_tensorboard_reads_back_the_numbers_of_the_result(train):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = train(tracker='tensorboard')
    result = result_of(run)
    events = EventAccumulator(str(run.folder / 'tensorboard')).Reload()
    read = lambda name: [(e.step, e.value) for e in events.Scalars(name)]
    assert [step for step, _ in read('train_loss')] == [1, 2, 3, 4, 5, 6]
    assert [v for _, v in read('train_loss')] == pytest.approx([r['train_loss'] for r in result['history']])
    assert read('val_loss') == [(r['step'], pytest.approx(r['val_loss'])) for r in result['history'] if r['val_loss']]
    assert read('balance/max_violation')[5][1] == pytest.approx(result['history'][5]['balance']['max_violation'])
    assert read('final/tokens_per_second') == [(6, pytest.approx(result['final']['tokens_per_second']))]
    assert 'config/text_summary' in events.Tags()['tensors']


def test_tensorboard_shows_no_step_twice_of_a_run_that_goes_on_from_an_older_checkpoint(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for history, steps in (([], range(1, 8)), ([{'step': 4}], range(5, 9))):        # killed in step 8, saved after 4
        track = tracker.Tracker('tensorboard', tmp_path, {'config': {}, 'history': history})
        for step in steps:
            track.log({'step': step, 'loss': float(step)})
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert [e.step for e in events.Scalars('loss')] == [1, 2, 3, 4, 5, 6, 7, 8]


def log_records(content):
    """wandb's file: 7 bytes of its own, then LevelDB's log: blocks of 32 KiB of (crc 4, length 2, type 1, bytes)."""
    at, whole = 7, b''
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:                          # no header fits: the rest of the block is empty
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4:at + 6], 'little'), content[at + 6]        # 1 whole, 2 first, 3 middle, 4 last
        whole += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b''


def test_wandb_offline_keeps_the_numbers_of_the_result(train, monkeypatch):
    pytest.importorskip('wandb')
    from wandb.proto.wandb_internal_pb2 import Record
    monkeypatch.setenv('WANDB_MODE', 'offline'), monkeypatch.setenv('WANDB_SILENT', 'true')
    run = train(tracker='wandb')
    result = result_of(run)
    rows, summary, config = [], {}, {}
    for block in log_records(next(run.folder.glob('wandb/offline-run-*/*.wandb')).read_bytes()):
        record = Record()
        record.ParseFromString(block)
        values = lambda items: {i.key or '/'.join(i.nested_key): json.loads(i.value_json) for i in items}
        rows += [values(record.history.item)] if record.HasField('history') else []
        summary |= values(record.summary.update)
        config |= values(record.run.config.update)
    assert [r['train_loss'] for r in rows] == [r['train_loss'] for r in result['history']]
    assert [r['val_loss'] for r in rows if 'val_loss' in r] == [r['val_loss'] for r in result['history'] if r['val_loss']]
    assert summary['final/val_loss'] == result['final']['val_loss'] and config['n_embd'] == TINY['n_embd']


def test_a_tracker_that_fails_says_so_once_and_the_run_goes_on(train, monkeypatch):
    monkeypatch.setattr(tracker.Tracker, 'start', lambda *a: None)
    monkeypatch.setattr(tracker.Tracker, 'send', lambda *a: (_ for _ in ()).throw(ConnectionError('the service is away')))
    monkeypatch.setattr(tracker, 'check', lambda kind: None)
    run = train(tracker='wandb')
    assert run.code == 0 and run.out.count('the service is away') == 1 and 'going on without' in run.out


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_written(train, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    one_line(train(tracker='wandb'), '--tracker=wandb', 'pip install wandb')
    assert not (tmp_path / 'run').exists()


@pytest.mark.skipif(os.name != 'posix', reason='a terminal as POSIX has it')
def test_a_terminal_shows_what_goes_on_within_a_step_and_a_file_does_not(program, train):
    status, seen = forked.on_a_terminal(*program(micro_batch_size=2, max_steps=2, overwrite=True))
    assert status == 0 and b'\rstep 2/2: micro-batch 3 of 3 ' in seen and b'\rvalidation: 1 of ' in seen
    out = train(micro_batch_size=2, max_steps=2, overwrite=True).out
    assert 'step 2/2 | ' in out and '\r' not in out and 'micro-batch' not in out


@pytest.mark.skipif(os.name != 'posix', reason='pipes as POSIX has them')
def test_a_closed_pipe_or_a_name_that_the_terminal_cannot_show_stops_no_training(program, tmp_path):
    process = subprocess.Popen([sys.executable, *program(name='\u6a21\u578b')], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, 'PYTHONIOENCODING': 'cp1252'})
    assert process.stdout.readline().startswith(b'??, seed 0')          # with the data prepared, the first line of a run
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) == 0
    assert written(tmp_path / 'run')['status'] == 'complete'


def test_importing_it_is_refused_in_one_line_that_names_what_to_import(tmp_path):
    done = subprocess.run([sys.executable, '-c', 'import train'], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert 'from model import LanguageModel, ModelConfig' in done.stderr and 'subprocess.run(' in done.stderr


def test_every_configuration_that_is_shipped_is_accepted():
    for path in sorted((REPOSITORY / 'config').glob('*.py')):
        values = configure({'__file__': REPOSITORY / 'train.py'}, run_knobs()[0], argv=[str(path)])
        assert values != configure({'__file__': REPOSITORY / 'train.py'}, run_knobs()[0], argv=[])


# ---------------------------------------------------------------------------------------------------------------------
# Machines that lack something

def test_it_runs_from_another_folder_out_of_a_read_only_one_with_blanks_and_umlauts_in_its_path(tmp_path, corpus):
    home, elsewhere = tmp_path / 'ein Ordner für alles', tmp_path / 'anderswo ☂'
    home.mkdir(), elsewhere.mkdir()
    for path in REPOSITORY.glob('*.py'):
        (home / path.name).write_bytes(path.read_bytes())
    home.chmod(0o555)
    try:
        done = forked.run(home / 'train.py', *flags(**{**TINY, 'dataset': corpus, 'data_root': elsewhere / 'däta'}), cwd=elsewhere)
    finally:
        home.chmod(0o755)
    assert done.returncode == 0, done.stderr
    environment = written(elsewhere / 'out/experiment1/baseline-s0')['environment']
    assert environment['git_commit'] is None                                        # no repository there, and no failure


def test_without_a_compiler_torch_compile_is_left_out_with_a_line_that_says_so(program, tmp_path):
    done = subprocess.run([sys.executable, *program(compile=True, max_steps=1)], capture_output=True, text=True,
                          env={**os.environ, 'CXX': '/no/such/compiler', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert 'torch.compile does not work here' in done.stdout
    assert written(tmp_path / 'run')['config']['compile'] is False


def test_help_and_typos_are_answered_without_loading_torch(tmp_path):
    (tmp_path / 'torch.py').write_text('raise SystemExit("torch was loaded")')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    for program in ('train.py', 'sample.py', 'bench.py', 'data.py', 'analyze.py'):
        done = subprocess.run([sys.executable, REPOSITORY / program, '--help'], capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and '--' in done.stdout, (program, done.stderr)
        done = subprocess.run([sys.executable, REPOSITORY / program, '--sede=1'], capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'sede' in done.stderr, (program, done.stderr)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('attn', VARIANTS)
def test_on_a_gpu_a_compiled_bfloat16_run_follows_the_cpus(train, attn):
    knobs = dict(attn=attn, n_embd=64, n_head=4, block_size=64, max_steps=12)
    cpu = result_of(train('cpu', **knobs))
    gpu = result_of(train('gpu', **{**knobs, 'device': 'cuda', 'dtype': 'bfloat16', 'compile': True}))
    assert gpu['final']['val_loss'] == pytest.approx(cpu['final']['val_loss'], rel=0.02)
    assert gpu['final']['peak_memory_kind'] == 'device'
