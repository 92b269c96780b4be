"""README.md says what is so: its figures stand in committed result files, its commands and its walk-through work."""
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from attention import variants
from configurator import read_block
from conftest import REPOSITORY, TINY, flags
from result import read_run

README = (REPOSITORY / 'README.md').read_text(encoding='utf-8')
PROGRAMS = 'train', 'sample', 'bench', 'data', 'analyze'


def blocks(kind):
    """[(argument, text)] of the parts between <!-- kind argument --> and <!-- end -->."""
    return re.findall(rf'<!-- {kind} (\S+) -->\n(.*?)<!-- end -->', README, re.S)


def numbers(text):
    return re.findall(r'\d+(?:[.,]\d+)*', text)


def test_tables_quoted_from_a_report_stand_in_it_line_by_line():
    assert blocks('from')
    for path, text in blocks('from'):
        report = (REPOSITORY / path).read_text(encoding='utf-8').splitlines()
        lines = [line for line in text.splitlines() if line.strip()]
        assert lines and all(line in report for line in lines), path


def test_every_number_in_a_paragraph_about_results_stands_in_the_report_it_names():
    assert blocks('figures')
    for path, text in blocks('figures'):
        source = (REPOSITORY / path).read_text(encoding='utf-8')
        missing = [n for n in numbers(text) if not re.search(rf'(?<![\d.]){re.escape(n)}(?![\d])', source)]
        assert not missing, (path, missing)


@pytest.mark.parametrize('folder', [p.parent.name for p in sorted((REPOSITORY / 'results').glob('*/report.md'))])
def test_a_committed_report_is_what_analyze_makes_of_the_committed_result_files(tmp_path, folder):
    source = REPOSITORY / 'results' / folder
    shutil.copytree(source, tmp_path / folder, ignore=shutil.ignore_patterns('*.png', 'report.*'))
    options = json.loads((source / 'options.json').read_text()) if (source / 'options.json').exists() else []
    done = subprocess.run([sys.executable, REPOSITORY / 'analyze.py', tmp_path / folder, '--plots=False', *options], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (source / 'report.md').read_bytes()
    assert (tmp_path / folder / 'report.json').read_bytes() == (source / 'report.json').read_bytes()


def test_committed_result_files_are_complete_runs_of_one_clean_commit_each():
    """git_dirty is null where no .git was at hand (GIT_COMMIT named the commit): the hashes of the sources tell as well."""
    for path in sorted((REPOSITORY / 'results').rglob('*-s*.json')):
        run = read_run(str(path))
        here = run['environment']
        assert run['status'] in ('complete', 'diverged') and path.name == f'{run["name"]}-s{run["config"]["seed"]}.json'
        assert here['git_commit'] and not here['git_dirty'], path
        there = sources_of(here['git_commit'])
        assert there is None or here['source_sha256'] == there, path


@functools.cache
def sources_of(commit):
    """{file: SHA-256} of the scripts in a commit; None where its history is not at hand (a shallow clone)."""
    git = lambda *command: subprocess.run(['git', *command], cwd=REPOSITORY, capture_output=True)
    names = git('ls-tree', '--name-only', commit)
    if names.returncode:
        return None
    scripts = [name for name in names.stdout.decode().split() if name.endswith('.py')]
    return {name: hashlib.sha256(git('show', f'{commit}:{name}').stdout).hexdigest() for name in scripts}


def test_the_table_of_variants_is_that_of_the_code():
    C, H = 384, 8
    rows = {line.split('`')[1]: line for line in README.splitlines() if re.match(r'\| `\w+` \|', line)}
    for name, row in variants(C, H).items():
        cell = [int(n) for n in numbers(rows[name].rsplit('|', 2)[1])]
        if 'kv_lora_rank' in row:
            assert cell == [row['kv_lora_rank'], row['qk_rope_head_dim'], row['kv_lora_rank'] + row['qk_rope_head_dim']]
            heads = [row[k] for k in ('q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')]
            assert [int(n) for n in numbers(rows[name].split('|')[3])] == heads
        else:
            assert cell[-1] == 2 * row['n_kv_head'] * C // H
            assert [int(n) for n in numbers(rows[name].split('|')[3])] == [8, 48, row['n_kv_head']]


def test_every_file_is_in_the_table_of_files_and_the_other_way_round():
    named = set(re.findall(r'`(\w+\.py|\w+\.sh|\w+/)`', README.split('## The files')[1].split('## ')[0]))
    present = {p.name for p in REPOSITORY.iterdir() if p.suffix in ('.py', '.sh')} | {'config/', 'results/', 'tests/'}
    assert present <= named | {'laptop.py', 'smoke.py', 'gpu.py'} and named - {'laptop.py', 'smoke.py', 'gpu.py'} <= present


def test_knobs_and_files_that_the_readme_names_exist():
    knobs = {name: set(read_block(REPOSITORY / f'{name}.py')[0]) | {'help'} for name in PROGRAMS}
    outside = {'nproc_per_node', 'nnodes', 'node_rank', 'master_addr', 'master_port'}            # torchrun's
    checked = set()
    for paragraph in re.split(r'\n\s*\n', README):
        program = None                                          # named last in this paragraph: the flags are its own
        for name, knob in re.findall(rf'\b({"|".join(PROGRAMS)})\.py\b|--(\w+)', paragraph):
            program = name or program
            if knob and knob not in outside:
                assert knob in (knobs[program] if program else set().union(*knobs.values())), (program, knob)
                checked.add(program)
    assert checked >= {'train', 'sample', 'bench', 'analyze'}
    for path in set(re.findall(r'\]\((results/[^)]+)\)', README)):
        assert (REPOSITORY / path).exists(), path


@pytest.fixture
def fork(tmp_path, corpus, data_root):
    """A copy of the repository with the README's own code pasted where it says; fork.run('train.py', flag, ...)."""
    code = re.findall(r'```python\n(.*?)```', README, re.S)
    assert len(code) == 2 and len(''.join(code).splitlines()) <= 20
    for path in REPOSITORY.glob('*.py'):
        shutil.copy(path, tmp_path)
    insert(tmp_path / 'attention.py', "        'mqa': {", code[1])
    (tmp_path / 'attention.py').write_text((tmp_path / 'attention.py').read_text() + '\n\n' + code[0])

    def run(program, *arguments):
        if program == 'train.py':
            knobs = {**TINY, 'block_size': 128, 'batch_size': 2, 'dataset': corpus, 'data_root': data_root}
            arguments = *arguments, *flags(**knobs)
        done = subprocess.run([sys.executable, program, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return SimpleNamespace(folder=tmp_path, run=run)


def insert(path, before, line):
    """Put `line` before the one place in a file that begins with `before`."""
    text = path.read_text()
    assert text.count(before) == 1, (path.name, before)
    path.write_text(text.replace(before, line + before))


def test_the_walk_through_adds_a_variant_that_trains_causally_within_its_window(fork):
    fork.run('train.py', '--attn=window', '--out_dir=run')
    result = json.loads((fork.folder / 'run/result.json').read_text())
    assert result['model']['attention_class'] == 'SlidingWindowAttention' and result['status'] == 'complete'
    fork.run('-c', '''
import torch
from model import LanguageModel, ModelConfig
m = LanguageModel(ModelConfig(vocab_size=50, block_size=128, n_layer=1, n_head=2, n_embd=32, d_ff=32, n_expert=2, attn='window')).double()
x = torch.randint(0, 50, (1, 128)); y = x.clone(); y[0, 20] = (y[0, 20] + 1) % 50
moved = (m(x) - m(y)).abs().amax(-1)[0] > 1e-12
assert moved[20:84].all() and not moved[:20].any() and not moved[84:].any(), moved
cache, parts = m.new_cache(1, 128), []
for i in range(0, 128, 16):
    parts.append(m.decode(x[:, i:i + 16], cache, last=False))
assert torch.allclose(torch.cat(parts, 1), m(x), atol=1e-12)
''')


def test_a_knob_of_its_own_takes_one_line_in_each_of_the_four_places_that_are_named(fork):
    """Runs of different windows then go through analyze.py as what is compared, not as a disagreement."""
    insert(fork.folder / 'train.py', 'v_head_dim: int | None = None', 'window: int | None = None    # tokens that a token sees\n')
    insert(fork.folder / 'model.py', '    v_head_dim: int | None = None', '    window: int | None = None\n')
    insert(fork.folder / 'attention.py', "            'qk_rope_head_dim': None, 'v_head_dim': None,", "            'window': None,\n")
    insert(fork.folder / 'result.py', "           'v_head_dim', 'attention_bias'}", "           'window',\n")
    attention = (fork.folder / 'attention.py').read_text()
    attention = attention.replace("'class': SlidingWindowAttention, 'n_kv_head'", "'class': SlidingWindowAttention, 'window': 64, 'n_kv_head'")
    attention = attention.replace('    window = 64\n', '''
    def __init__(self, config):
        super().__init__(config)
        self.window = config.window
''')
    (fork.folder / 'attention.py').write_text(attention)
    for name, *more in (('baseline', '--attn=baseline'), ('wide', '--attn=window'), ('narrow', '--attn=window', '--window=2')):
        fork.run('train.py', f'--name={name}', f'--out_dir=out/{name}-s0', *more)
    report = fork.run('analyze.py', 'out', '--plots=False')
    assert '- wide: not tested (n = 1)' in report and '- narrow: not tested (n = 1)' in report
    wide, narrow = (json.loads((fork.folder / f'out/{name}-s0/result.json').read_text()) for name in ('wide', 'narrow'))
    assert wide['config']['window'] == 64 and narrow['config']['window'] == 2
    assert wide['final']['val_loss'] != narrow['final']['val_loss']


def test_the_commands_for_a_fresh_machine_are_what_ci_runs():
    command = README.split('<!-- test command -->')[1].split('```')[1].strip()
    assert 'requirements-test.txt' in command and command.endswith('-m pytest -q')
    assert '<!-- test command -->' in (REPOSITORY / '.ci/run').read_text()
