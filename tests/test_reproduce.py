"""reproduce.sh: what a plan says is run, in its order, once; what ends badly stops it, what diverges does not."""
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='a bash script')

PLAN = '''# a plan
config       config/x.py
experiment   tried
seeds        0 1
rates        1e-3 2e-3
rates_seed   100
rates_steps  7
margin       0.03
contrasts    lora:baseline,extra:baseline     # the question
may_differ   learning_rate
arm          baseline  6e-3   --attn=baseline
# a comment between
arm          lora      3e-3   --attn=lora --n_layer=2   # 96 numbers
extra        extra     0,1    6e-3  --attn=mqa
'''
# In Python's place: notes how it was called, leaves a result, ends as the file `status-NAME` says; `slow` waits for a signal
FAKE = '''#!/usr/bin/env bash
echo "$*" >> calls
[ "$1" = train.py ] || exit 0
for flag in "$@"; do case $flag in --name=*) name=${flag#--name=};; --seed=*) seed=${flag#--seed=};; --experiment=*) e=${flag#*=};; esac; done
if [ -e slow ]; then trap 'echo saved >> calls; exit 143' TERM; echo ready > started; while :; do sleep 0.05; done; fi
mkdir -p "out/$e/$name-s$seed"; echo "{}" > "out/$e/$name-s$seed/result.json"
[ ! -e "status-$name" ] || exit "$(cat "status-$name")"
'''


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / 'a place'
    (folder / 'config').mkdir(parents=True)
    shutil.copy(REPOSITORY / 'reproduce.sh', folder)
    (folder / 'config/laptop.plan').write_text(PLAN)
    (folder / 'fake python').write_text(FAKE)
    (folder / 'fake python').chmod(0o755)
    return folder


def run(place, *arguments, **env):
    """-> exit status, calls of train.py by 'NAME SEED', all calls, stderr."""
    (place / 'calls').unlink(missing_ok=True)
    done = subprocess.run(['bash', 'reproduce.sh', *arguments], cwd=place, capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'PYTHON': './fake python', **env})
    calls = (place / 'calls').read_text().splitlines() if (place / 'calls').exists() else []
    flags = [dict(f[2:].split('=', 1) for f in c.split() if f.startswith('--')) for c in calls if c.startswith('train.py')]
    return done.returncode, [f'{f["name"]} {f["seed"]}' for f in flags], calls, done.stderr


def test_seeds_are_outside_arms_inside_extras_last_and_then_the_report(place):
    status, runs, calls, _ = run(place, '--device=cpu')
    assert status == 0 and runs == ['baseline 0', 'lora 0', 'baseline 1', 'lora 1', 'extra 0', 'extra 1']
    assert calls[1] == ('train.py config/x.py --attn=lora --n_layer=2 --learning_rate=3e-3 --name=lora --seed=0 --experiment=tried '
                        '--resume=auto --device=cpu')
    assert calls[-1] == 'analyze.py out/tried'
    assert json.loads((place / 'out/tried/options.json').read_text()) == [
        '--margin=0.03', '--contrasts=lora:baseline,extra:baseline', '--may_differ=learning_rate', '--pairs=2']


def test_rates_are_searched_on_a_seed_that_does_not_count_with_fewer_steps(place):
    status, runs, calls, _ = run(place, 'rates', JOBS='2')
    assert status == 0 and sorted(runs) == ['baseline@1e-3 100', 'baseline@2e-3 100', 'lora@1e-3 100', 'lora@2e-3 100']
    assert all('--max_steps=7' in c and '--experiment=tried-rates' in c for c in calls[:-1]) and calls[-1] == 'analyze.py out/tried-rates'
    assert json.loads((place / 'out/tried-rates/options.json').read_text()) == ['--rates=True', '--may_differ=learning_rate']


def test_only_the_arms_that_are_named_run_also_in_the_search_for_rates(place):
    assert run(place, ARMS='lora extra')[1] == ['lora 0', 'lora 1', 'extra 0', 'extra 1']
    assert run(place, 'rates', ARMS='lora')[1] == ['lora@1e-3 100', 'lora@2e-3 100']


@pytest.mark.parametrize('env, words', [
    ({'ARMS': 'lora baselin'}, 'has no arm baselin'), ({'JOBS': 'two'}, 'JOBS=two'), ({'JOBS': '0'}, 'JOBS=0'),
    ({'KEEP': 'reproduce.sh/kept'}, 'reproduce.sh')])
def test_a_typo_runs_nothing_and_is_one_line(place, env, words):
    status, runs, calls, err = run(place, **env)
    assert status == 2 and not calls and err.count('\n') == 1 and words in err


@pytest.mark.parametrize('old, new, arguments, words', [
    ('margin ', 'margn ', (), 'no such word as margn'), ('contrasts', 'contrast', (), 'no such word as contrast'),
    ('rates  ', '#', ('rates',), 'has no rates')])
def test_a_word_that_plans_do_not_have_would_change_the_claim_and_runs_nothing(place, old, new, arguments, words):
    (place / 'config/laptop.plan').write_text(PLAN.replace(old, new))
    status, runs, calls, err = run(place, *arguments)
    assert status == 2 and not calls and err.count('\n') == 1 and words in err


def test_extras_take_no_part_in_the_search_for_rates(place):
    status, runs, calls, err = run(place, 'rates', ARMS='extra')
    assert status == 2 and not calls and err.count('\n') == 1 and 'has no arm extra' in err


def test_a_result_that_could_not_be_kept_stops_the_rest_and_none_that_was_cut_off_passes_for_one(place):
    (place / 'cp').write_text('#!/bin/sh\nprintf { > "$2"; exit 1\n')
    (place / 'cp').chmod(0o755)
    status, runs, _, err = run(place, KEEP='kept', PATH=f'{place}:{os.environ["PATH"]}')
    assert status != 0 and runs == ['baseline 0'] and not list((place / 'kept').glob('*.json'))
    assert run(place, KEEP='kept')[0] == 0 and len(list((place / 'kept').glob('*-s*.json'))) == 6


def test_kept_results_are_not_run_again(place):
    assert run(place, KEEP='kept')[0] == 0
    assert sorted(p.name for p in (place / 'kept').glob('*-s*.json')) == [
        f'{name}-s{seed}.json' for name in ('baseline', 'extra', 'lora') for seed in (0, 1)]
    (place / 'kept/lora-s1.json').unlink()
    status, runs, calls, _ = run(place, KEEP='kept')
    assert (status, runs, calls[-1]) == (0, ['lora 1'], 'analyze.py kept')


def test_a_run_that_diverges_is_named_kept_and_gone_over_and_one_that_fails_stops_the_rest(place):
    (place / 'status-lora').write_text('3')
    status, runs, _, err = run(place, KEEP='kept')
    assert status == 0 and len(runs) == 6 and 'lora-s0 diverged' in err and (place / 'kept/lora-s1.json').exists()
    (place / 'status-lora').write_text('2')
    shutil.rmtree(place / 'kept')
    status, runs, calls, err = run(place, KEEP='kept')
    assert status == 2 and runs == ['baseline 0', 'lora 0'] and 'lora-s0 ended with exit status 2' in err
    assert 'the same command goes on' in err and not (place / 'kept/lora-s0.json').exists() and 'analyze' not in calls[-1]


def test_a_plan_without_arms_or_without_a_file_runs_nothing_and_one_without_a_config_runs_the_defaults(place):
    (place / 'config/empty.plan').write_text('config config/x.py\nexperiment tried\nseeds 0\nmargin 0.1\n')
    (place / 'out/tried').mkdir(parents=True)
    assert run(place, PLAN='config/empty.plan')[1] == []
    assert json.loads((place / 'out/tried/options.json').read_text()) == ['--margin=0.1', '--pairs=1']
    (place / 'config/plain.plan').write_text('experiment tried\nseeds 0\narm lora 1e-3 --attn=lora\n')
    assert run(place, PLAN='config/plain.plan')[2][0].startswith('train.py --attn=lora ')         # no config file: defaults
    status, runs, _, err = run(place, PLAN='config/none.plan')
    assert status == 2 and runs == [] and 'no plan config/none.plan' in err


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_is_handed_on_and_what_is_going_on_is_waited_for(place, number, status):
    (place / 'slow').touch()
    script = subprocess.Popen(['bash', 'reproduce.sh'], cwd=place, env={**os.environ, 'PYTHON': './fake python', 'JOBS': '2'},
                              stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while not (place / 'started').exists() or (place / 'calls').read_text().count('train.py') < 2:
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)
    time.sleep(0.3)
    script.send_signal(number)
    assert script.wait(20) == status and (place / 'calls').read_text().splitlines()[2:] == ['saved', 'saved']
    assert script.stderr.read() == 'reproduce.sh: stopped; the same command goes on\n'      # nothing has failed


def test_plans_that_are_shipped_name_files_that_exist_and_arms_once():
    plans = sorted((REPOSITORY / 'config').glob('*.plan'))
    for plan in plans:
        rows = [line.split('#')[0].split() for line in plan.read_text().splitlines() if line.split('#')[0].strip()]
        names = [row[1] for row in rows if row[0] in ('arm', 'extra')]
        value = {row[0]: row[1:] for row in rows if row[0] not in ('arm', 'extra')}
        assert len(names) == len(set(names)) and all((REPOSITORY / config).exists() for config in value.get('config', []))
        pairs = value.get('contrasts', [''])[0].split(',')
        assert all(name in names for pair in pairs if pair for name in pair.split(':'))
    assert plans
