"""The README and results/README.md say what is so: figures stand in committed result files, commands and code work."""
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import forked
import pytest
import torch

from attention import variants
from configurator import read_block, run_knobs
from conftest import REPOSITORY, TINY, flags
from model import LanguageModel, ModelConfig
from result import read_run

RESULTS = REPOSITORY / 'results'
PAGES = {page: (REPOSITORY / page).read_text(encoding='utf-8') for page in ('README.md', 'results/README.md', 'tests/README.md')}
README, TEXT = PAGES['README.md'], '\n'.join(PAGES.values())
PROGRAMS = 'train', 'sample', 'bench', 'data', 'analyze', 'hf'


def blocks(kind):
    """[(argument, text)] of the parts between <!-- kind argument --> and <!-- end -->."""
    return re.findall(rf'<!-- {kind} (\S+) -->\n(.*?)<!-- end -->', TEXT, re.S)


def numbers(text):
    return re.findall(r'\d+(?:[.,]\d+)*', text)


def section(page, title):
    return re.split(r'^#+ ', PAGES[page].split(f'# {title}\n')[1], maxsplit=1, flags=re.M)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def test_tables_quoted_from_a_report_stand_in_it_line_by_line():
    assert blocks('from')
    for path, text in blocks('from'):
        report = (REPOSITORY / path).read_text(encoding='utf-8').splitlines()
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) > 2 and all(line in report for line in lines), path     # a head, its rule, and rows


def test_every_number_in_a_paragraph_about_results_stands_in_the_reports_it_names():
    """<!-- figures A,B -->: in A or in B."""
    assert blocks('figures')
    for paths, text in blocks('figures'):
        source = '\n'.join((REPOSITORY / path).read_text(encoding='utf-8') for path in paths.split(','))
        missing = [n for n in numbers(text) if not re.search(rf'(?<![\d.]){re.escape(n)}(?![\d])', source)]
        assert not missing, (paths, missing)


@pytest.mark.parametrize('folder', sorted({path.parent.name for path in RESULTS.glob('*/*-s*.json')}))
def test_a_committed_report_is_what_analyze_makes_of_the_committed_result_files(tmp_path, folder):
    """Without matplotlib, so that the pictures are the committed ones: the report names only those that are there."""
    hidden = tmp_path / 'hide' / 'matplotlib'
    hidden.mkdir(parents=True)
    (hidden / '__init__.py').write_text('raise ImportError("hidden")')
    shutil.copytree(RESULTS / folder, tmp_path / folder, ignore=shutil.ignore_patterns('report.*'))
    done = subprocess.run([sys.executable, REPOSITORY / 'analyze.py', tmp_path / folder], capture_output=True,
                          env={**os.environ, 'PYTHONPATH': str(hidden.parent)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == (RESULTS / folder / 'report.md').read_bytes()
    assert (tmp_path / folder / 'report.json').read_bytes() == (RESULTS / folder / 'report.json').read_bytes()
    assert all((RESULTS / folder / file).exists() for file in re.findall(r'!\[.*\]\((.*)\)', done.stdout.decode()))


def test_committed_result_files_are_complete_runs_of_one_clean_commit_each():
    """git_dirty is null where no .git was at hand (GIT_COMMIT named the commit): the hashes of the sources tell as well."""
    files = sorted(RESULTS.rglob('*-s*.json'))
    assert files
    for path in files:
        run = read_run(str(path))
        here = run['environment']
        assert run['status'] in ('complete', 'diverged') and path.name == f'{run["name"]}-s{run["config"]["seed"]}.json'
        assert here['git_commit'] and not here['git_dirty'], path
        there = sources_of(here['git_commit'])
        assert there is None or here['source_sha256'] == there, path


@functools.cache
def sources_of(commit):
    """{file: SHA-256} of the scripts in a commit; None where its history is not at hand (a shallow clone)."""
    git = lambda *command: subprocess.run(['git', *command], cwd=REPOSITORY, capture_output=True)       # noqa: E731
    names = git('ls-tree', '--name-only', commit)
    if names.returncode:
        return None
    scripts = [name for name in names.stdout.decode().split() if name.endswith('.py')]
    return {name: hashlib.sha256(git('show', f'{commit}:{name}').stdout).hexdigest() for name in scripts}


def costs(**knobs):
    """What the code says: (bytes of cache a token at 2 bytes a number, parameters, active parameters)."""
    model = LanguageModel(ModelConfig(**knobs), seed=None)
    counts = model.parameter_counts()
    return model.cache_bytes_per_token(torch.bfloat16), counts['params_total'], counts['params_active']


def test_the_table_of_variants_is_that_of_the_code():
    rows = {line.split('`')[1]: line.split('|')[3:6] for line in section('README.md', 'The variants').splitlines()
            if re.match(r'\| `\w+` \|', line)}
    assert rows.keys() == variants(384, 8).keys()
    for name, row in variants(384, 8).items():
        sizes, cached, bytes_cached = ([int(n) for n in numbers(cell)] for cell in rows[name])
        if 'kv_lora_rank' in row:
            knobs = 'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'
            assert sizes == [row[knob] for knob in knobs], name
            kept = [row['kv_lora_rank'], row['qk_rope_head_dim']]
            assert cached == [*kept, sum(kept)], name
        else:
            assert sizes == [8, 48, row['n_kv_head']] and cached[-1] == 2 * row['n_kv_head'] * 48, name
        assert bytes_cached == [costs(attn=name)[0]] == [2 * 6 * cached[-1]], name


def test_the_table_of_arms_is_that_of_the_plan_and_of_the_code():
    shape = dict(n_layer=4, n_head=4, n_embd=96, block_size=128, vocab_size=1024)
    plan = (REPOSITORY / 'config/laptop.plan').read_text()
    arms = {name: [f.split('=') for f in shlex.split(rest) if '=' in f]
            for name, rest in re.findall(r'^(?:arm|extra) +(\S+) +([^#\n]*)', plan, re.M)}
    rows = [[cell.strip(' `') for cell in line.split('|')[1:-1]]
            for line in section('results/README.md', 'The experiment').splitlines() if line.startswith('| `')]
    assert [row[0] for row in rows] == list(arms)
    for name, given, *cells in rows:
        assert given == ' '.join(f'--{knob.lstrip("-")}={value}' for knob, value in arms[name]), name
        knobs = {knob.lstrip('-'): value if knob == '--attn' else eval(value) for knob, value in arms[name]}
        cache, total, active = costs(**{**shape, 'd_ff': 256, **knobs})
        assert [int(cell.replace(',', '')) for cell in cells] == [cache, total, active], name


# ---------------------------------------------------------------------------------------------------------------------
# Files, knobs, links, commands

def test_the_files_stand_in_the_order_to_read_them_with_their_lines_within_a_tenth():
    listed = [(re.findall(r'`(\w+\.(?:py|sh))`', line.split('|')[1]), int(line.split('|')[2]))
              for line in section('README.md', 'Read the code').splitlines() if line.startswith('| `')]
    assert sorted(name for names, _ in listed for name in names) == sorted(
        path.name for path in REPOSITORY.iterdir() if path.suffix in ('.py', '.sh'))
    for names, said in listed:
        lines = sum(len((REPOSITORY / name).read_text(encoding='utf-8').splitlines()) for name in names)
        assert abs(said - lines) <= lines / 10, (names, said, lines)
    paper = [len((REPOSITORY / name).read_text(encoding='utf-8').splitlines()) for name in ('attention.py', 'moe.py', 'model.py')]
    own = len(variants(384, 8)) - 6                         # rows of a fork, which has a measure of its own
    assert own or len(README.splitlines()) <= 200 and sum(paper) < 800          # what is read in one sitting


def test_knobs_that_the_pages_name_exist():
    knobs = {name: set(read_block(REPOSITORY / f'{name}.py')) | {'help'} for name in PROGRAMS}
    knobs['train'] |= set().union(*run_knobs())
    outside = {'nproc_per_node', 'window'}                  # torchrun's, and the one that a reader adds
    checked = set()
    for paragraph in re.split(r'\n\s*\n|\n- ', TEXT):
        program = None                                      # named last in this paragraph: the flags are its own
        for name, knob in re.findall(rf'\b({"|".join(PROGRAMS)})\.py\b|--(\w+)', paragraph):
            program = name or program
            if knob and knob not in outside:
                assert any(knob in known for known in knobs.values()), (program, knob)
                checked.add(knob)
    assert len(checked) > 20
    for program, arguments in re.findall(r'python (\w+)\.py ?([^`\n;#]*)', TEXT):
        for knob in re.findall(r'--(\w+)', arguments):
            assert knob in knobs[program] | outside, (program, knob)


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    slug = lambda title: re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')                       # noqa: E731
    for target, _, anchor in (link.partition('#') for link in re.findall(r'\]\(\s*([^)\s]+)\)', PAGES[page])):
        if target.startswith('http'):
            continue
        path = (REPOSITORY / page).parent / target if target else REPOSITORY / page
        path = path / 'README.md' if anchor and path.is_dir() else path
        assert path.exists(), target
        if anchor:
            titles = re.findall(r'^#+ (.*)$', path.read_text(encoding='utf-8'), re.M)
            assert anchor in map(slug, titles), (target, anchor)


def test_the_page_about_tests_names_tests_that_exist():
    named = set(re.findall(r'`(test_\w+\.py)`', PAGES['tests/README.md']))
    assert len(named) > 5 and all((REPOSITORY / 'tests' / name).exists() for name in named)


def test_the_commands_for_a_fresh_machine_are_what_ci_runs():
    command = README.split('<!-- test command -->')[1].split('```')[1].strip()
    assert 'requirements-test.txt' in command and command.endswith('-m pytest -q')
    assert '<!-- test command -->' in (REPOSITORY / '.ci/run').read_text()
    assert 'train.py --attn=enhanced' in README.split('<!-- train command -->')[1].split('```')[1]


@pytest.mark.parametrize('file, took', [('experiment1/enhanced-s0.json', 'it took '), ('bench/first-command.json', '')])
def test_what_the_readme_says_of_its_first_command_is_what_that_run_left(file, took):
    run = read_run(str(RESULTS / file))
    final, here = run['final'], run['environment']
    said = ' '.join(section('README.md', 'Install, and a first run').split())
    assert (f'`validation loss {final["val_loss"]:.4f} after {final["tokens"]:,} tokens in {final["seconds_training"]:.0f} s of '
            'updates`') in said
    assert f'({here["device_name"]}, {run["config"]["dtype"]}) {took}{final["seconds_total"] / 60:.0f} minutes' in said


# ---------------------------------------------------------------------------------------------------------------------
# A forker's walk: the README's code in a copy of the repository

def insert(path, before, text):
    """Put `text` before the one place in a file that begins with `before`."""
    content = path.read_text(encoding='utf-8')
    assert content.count(before) == 1, (path.name, before)
    path.write_text(content.replace(before, text + before), encoding='utf-8')


@pytest.fixture(scope='module')
def fork(tmp_path_factory, corpus, data_root):
    """A copy of the repository with the README's variant in it; fork.run('train.py', flag, ...) -> stdout."""
    if 'window' in variants(384, 8):
        pytest.skip('this is a fork with that variant')
    folder = tmp_path_factory.mktemp('fork')
    for path in REPOSITORY.glob('*.py'):
        shutil.copy(path, folder)
    shutil.copytree(REPOSITORY / 'config', folder / 'config')
    code = re.search(r'```python\n(.*?)```', section('README.md', 'Add a variant'), re.S)[1]
    (knob, row), window = code.partition('\n\n')[0].splitlines(), code.partition('\n\n')[2]
    insert(folder / 'model.py', '    n_kv_head: int | None', f'{knob}\n')
    insert(folder / 'attention.py', "        'mqa': {", f'{row}\n')
    insert(folder / 'attention.py', '# Multi-head latent attention\n', f'{window}\n\n')

    def run(program, *arguments):
        if program == 'train.py':
            knobs = {**TINY, 'block_size': 64, 'batch_size': 2, 'dataset': corpus, 'data_root': data_root}
            given = {argument.partition('=')[0] for argument in arguments}
            arguments = *arguments, *(flag for flag in flags(**knobs) if flag.partition('=')[0] not in given)
        done = forked.run(program, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return SimpleNamespace(folder=folder, run=run)


def test_the_window_is_exactly_what_a_token_sees_in_training_and_from_the_cache(fork):
    """In float64, with every zero of the initialisation made random: they would hide what attention does."""
    fork.run('-c', '''
import torch
from model import LanguageModel, ModelConfig
config = ModelConfig(vocab_size=50, block_size=64, n_layer=1, n_head=2, n_embd=32, d_ff=32, n_expert=2, attn='window', window=9)
m = LanguageModel(config).double()
torch.manual_seed(0)
for p in m.parameters():
    torch.nn.init.normal_(p, std=0.3)
x = torch.randint(0, 50, (1, 64)); y = x.clone(); y[0, 20] = (y[0, 20] + 1) % 50
moved = (m(x) - m(y)).abs().amax(-1)[0] > 1e-12
assert moved[20:29].all() and not moved[:20].any() and not moved[29:].any(), moved
for static in False, True:
    cache, parts = m.new_cache(1, 64, static=static), []
    for i in (0, 20, 21, 22, 40):
        parts.append(m.decode(x[:, i:{0: 20, 22: 40, 40: 64}.get(i, i + 1)], cache, last=False))
    assert torch.allclose(torch.cat(parts, 1), m(x), atol=1e-10)
starts = [0, 5]                                             # the second prompt is shorter: padded on the left
padded = torch.stack((x[0, :30], torch.cat((x.new_zeros(5), x[0, :25]))))
cache = m.new_cache(2, 64, starts)
last = [m.decode(padded, cache), m.decode(x[:, 25:26].expand(2, 1), cache)]
assert torch.allclose(last[0][1], m(x[:, :25])[0, -1], atol=1e-10) and torch.allclose(last[1][1], m(x[:, :26])[0, -1], atol=1e-10)
''')


def test_a_variant_with_a_knob_of_its_own_gets_a_verdict(fork):
    for seed in '01':
        fork.run('train.py', '--attn=baseline', f'--seed={seed}', f'--out_dir=out/baseline-s{seed}')
        fork.run('train.py', '--attn=window', '--window=2', f'--seed={seed}', f'--out_dir=out/window-s{seed}')
    fork.run('train.py', '--attn=window', '--name=wide', '--out_dir=out/wide-s0')
    report = fork.run('analyze.py', 'out', '--plots=False')
    verdicts = report.split('## Verdicts')[1].split('##')[0]
    assert re.search(r'^- window: (better|worse|equivalent|undecided)', verdicts, re.M)
    assert re.search(r'^- wide - baseline: not tested \(n = 1\)', verdicts, re.M) and 'window 64' in report and 'window 2' in report
    narrow, wide = (json.loads((fork.folder / f'out/{name}-s0/result.json').read_text()) for name in ('window', 'wide'))
    assert narrow['model']['attention_class'] == 'SlidingWindowAttention' and narrow['status'] == 'complete'
    assert narrow['config']['window'] == 2 and wide['config']['window'] == 64
    assert narrow['final']['val_loss'] != wide['final']['val_loss']
    assert '--window=none' in fork.run('train.py', '--help').replace(' ', '')
    refused = forked.run('train.py', '--attn=window', '--window=0', '--out_dir=out/none', cwd=fork.folder)
    assert refused.returncode == 2 and refused.stderr == 'train.py: window must be at least 1, not 0\n'
    assert not (fork.folder / 'out/none').exists()
    refused = forked.run('bench.py', '--variants=window', '--window=0', '--peer=none', cwd=fork.folder)
    assert refused.returncode == 2 and refused.stderr == 'bench.py: window must be at least 1, not 0\n'


def test_the_lines_for_a_notebook_run(fork):
    lines = section('README.md', 'Three runs and a table').split('```python\n')[1].split('```')[0]
    corpus_and_root = "'--max_steps=2', '--dataset=config', '--out_dir=out/notebook'"      # not the standard library: seconds
    fork.run('-c', lines.replace("'--out_dir=out/notebook'", corpus_and_root) + '\nassert 0 < loss < 10')
