"""configurator.py: defaults, config files, flags; every mistake is one line on stderr and exit status 2."""

import ast
import contextlib
import os
import subprocess
import sys
import textwrap

import pytest

import configurator
from conftest import REPOSITORY

PROGRAM = '''\
"""Trains a thing,
quite \u2192 quickly.

Not part of the help."""
# ------------------------------
# A banner, not a block of knobs
# ------------------------------
from typing import Literal
from configurator import configure
SPEED = len('abc')
# ------------------------------
# size of the
# model
n_layer = 6              # blocks
learning_rate = 1e-3     # peak of the schedule;
                         # the same for all
block_size = 4 * 2**7    # tokens
batch_size = -24
# attention

attn: Literal['baseline', 'lora', 'enhanced'] = 'baseline'   # kind # of it
q_lora_rank: int | None = None  # rank
dropout: float | None = 0.0
device: Literal['auto', 'cpu'] | None = 'auto'
name: str | None = None
# input
dataset = 'std # lib'
compile = True           # or not
runs = ['a', 'b']
# ------------------------------
if __name__ == '__main__':
    values = configure(globals())
    assert all(globals()[key] == value for key, value in values.items())
    print(values)
'''
DEFAULTS = {'n_layer': 6, 'learning_rate': 1e-3, 'block_size': 512, 'batch_size': -24, 'attn': 'baseline',
            'q_lora_rank': None, 'dropout': 0.0, 'device': 'auto', 'name': None, 'dataset': 'std # lib',
            'compile': True, 'runs': ['a', 'b']}


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp('a folder with \u00e4') / 'train.py'
    path.write_text(PROGRAM, encoding='utf-8')
    return path


@pytest.fixture
def run(program, tmp_path, monkeypatch, capsys):
    """run(*argv) -> the values, or the (exit status, stdout, stderr) of the program's end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train.py'])

    def run(*argv, **options):
        namespace = {'__file__': str(program), '__doc__': ast.get_docstring(ast.parse(PROGRAM))}
        try:
            values = configurator.configure(namespace, argv=argv, **options)
        except SystemExit as end:
            printed = capsys.readouterr()
            return end.code, printed.out, printed.err
        assert {key: namespace[key] for key in DEFAULTS} == {key: values[key] for key in DEFAULTS}
        return values
    return run


def error(run, *argv, **options):
    """The one line a bad input ends with."""
    status, out, err = run(*argv, **options)
    assert status == 2 and out == '' and err.startswith('train.py: ') and err.count('\n') == 1
    assert err.endswith('\n'), err
    return err


# ---- reading the block -------------------------------------------------------------------------------------

def test_defaults_come_from_the_block_in_its_order_and_with_their_types(run):
    values = run()
    assert values == DEFAULTS and list(values) == list(DEFAULTS)
    assert [type(value) for value in values.values()] == [type(value) for value in DEFAULTS.values()]


def test_sections_comments_and_types_are_read_from_the_text_of_the_block(program):
    knobs = configurator.read_block(program)
    assert knobs['n_layer'].section == 'size of the model' and knobs['dataset'].section == 'input'
    assert knobs['learning_rate'].comment == 'peak of the schedule; the same for all'
    assert knobs['attn'].comment == 'kind # of it'
    assert knobs['attn'].choices == ['baseline', 'lora', 'enhanced']
    assert knobs['q_lora_rank'].types == ['None', 'int'] and knobs['device'].types == ['None']
    assert knobs['dataset'].comment == ''


def test_a_block_may_stand_indented_under_main(tmp_path):
    path = tmp_path / 'data.py'
    path.write_text("if __name__ == '__main__':\n" + textwrap.indent(
        f'# {"-" * 40}\n# part\nroot = 1  # one\n          # two\nb = 2\n# {"-" * 40}\nconfigure(globals())\n', '    '))
    knobs = configurator.read_block(path)
    assert list(knobs) == ['root', 'b'] and knobs['root'].comment == 'one two'
    assert knobs['b'].section == 'part'


def test_fields_of_a_dataclass_are_knobs_with_sections_comments_choices_and_types(tmp_path, run):
    path = tmp_path / 'model.py'
    path.write_text('''@dataclass
class Config:
    """Not a knob."""
    # first part
    width: int = 3 * 8          # of it
                                # in numbers
    rank: int | None = None     # none: \u00e4 # b

    # second
    kind: Literal['a', 'b'] | None = None
    rate: float = 1.0           # a step
    needed: int

    def f(self):
        # not a title
        other: int = 3
''', encoding='utf-8')
    knobs = configurator.read_class(path, 'Config')
    assert list(knobs) == ['width', 'rank', 'kind', 'rate']
    assert knobs['width'] == ('width', 24, ['int'], [], 'first part', 'of it in numbers')
    assert knobs['rank'] == ('rank', None, ['None', 'int'], [], 'first part', 'none: \u00e4 # b')
    assert knobs['kind'] == ('kind', None, ['None'], ['a', 'b'], 'second', '') and knobs['rate'].types == ['float']
    values = run('--width=7', '--kind=b', more=knobs)
    assert (values['width'], values['kind'], values['rank'], values['n_layer']) == (7, 'b', None, 6)
    assert 'one of a, b or none' in error(run, '--kind=c', more=knobs)
    assert '\nsecond\n' in run('--help', more=knobs)[1]


def test_the_knobs_of_a_run_are_the_fields_of_the_network_and_the_block_of_train_and_none_stands_twice():
    from model import ModelConfig
    network, rest = configurator.run_knobs()
    fields = ModelConfig.__dataclass_fields__
    assert {name: knob.default for name, knob in network.items()} == {name: f.default for name, f in fields.items()}
    assert 'max_steps' in rest and not network.keys() & rest.keys()
    assert all(knob.comment and knob.section for knob in [*network.values(), *rest.values()])


# ---- the order of the sources ------------------------------------------------------------------------------

def test_flags_override_config_files_which_override_defaults(run, tmp_path):
    (tmp_path / 'a.py').write_text('"""What for."""\nn_layer = 2 * 4\nlearning_rate = 1\nq_lora_rank = 3\n')
    (tmp_path / 'b.py').write_text("q_lora_rank = None\nattn = 'lora'\ncompile = False\nruns = ['x']\n")
    (tmp_path / 'c.py').write_text("batch_size = 10**18 + 1\n")
    values = run('--n_layer=3', 'a.py', 'b.py', '--dataset=a=b c', 'c.py')
    assert values == {**DEFAULTS, 'batch_size': 10**18 + 1, 'n_layer': 3, 'learning_rate': 1.0, 'attn': 'lora', 'compile': False,
                      'dataset': 'a=b c', 'runs': ['x']}
    assert type(values['learning_rate']) is float


@pytest.mark.parametrize('flag, value', [
    ('n_layer=1_000', 1000), ('n_layer=1e3', 1000), ('n_layer=-4', -4), ('n_layer=9007199254740993', 2**53 + 1),
    ('learning_rate=3', 3.0), ('learning_rate=-1e-4', -1e-4), ('compile=false', False), ('compile=0', False),
    ('compile=1', True), ('compile=TRUE', True), ('q_lora_rank=None', None), ('q_lora_rank=none', None),
    ('q_lora_rank=7', 7), ('dropout=none', None), ('dropout=0.5', 0.5), ('device=none', None), ('name=none', None),
    ('name=', ''), ('dataset=', ''), ('dataset=none', 'none'), ("dataset='x'", "'x'"), ('runs=p,q', ['p', 'q']),
    ('runs=', [])])
def test_a_flag_is_read_in_the_type_of_its_knob(run, flag, value):
    got = run('--' + flag)[flag.split('=')[0]]
    assert got == value and type(got) is type(value)


def test_a_positional_argument_may_be_the_value_of_a_knob(run):
    assert run('some/folder', '--n_layer=2', positional='dataset')['dataset'] == 'some/folder'
    assert run('x.py', positional='dataset')['dataset'] == 'x.py' and run(positional='dataset')['dataset'] == run()['dataset']
    assert 'dataset is given twice (a and b)' in error(run, 'a', 'b', positional='dataset')
    assert 'dataset is given twice (a and b)' in error(run, 'a', '--dataset=b', positional='dataset')


# ---- mistakes ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flag, hint', [
    ('--rate=3', '--learning_rate=3?'), ('--rate', '--learning_rate=...?'), ('--n-layer=3', '--n_layer=3?'),
    ('--N_LAYER=3', '--n_layer=3?'), ('--learning_rte=1', '--learning_rate=1?'), ('--drop=1', '--dropout=1?'),
    ('--size=2', '--block_size=2 or --batch_size=2?'), ('--lora_rank=4', '--q_lora_rank=4?'),
    ('-n_layer=3', '--n_layer=3?'), ('--rate={0}', '--learning_rate={0}?')])
def test_an_unknown_flag_is_told_what_it_may_have_meant(run, flag, hint):
    line = error(run, flag)
    assert f'unknown knob {flag.split("=")[0]}; did you mean {hint} (python train.py --help' in line


@pytest.mark.parametrize('argv, part', [
    (['--zzz=1'], 'unknown knob --zzz (python'), (['-x'], 'unknown knob -x'), (['--'], 'unknown knob'),
    (['-'], 'unknown'), (['--=3'], 'unknown knob'), (['foo'], 'unexpected argument foo'),
    (['--help=1'], 'unknown knob --help'), (['--compile'], 'as in --compile=True'),
    (['--n_layer', '9'], 'as in --n_layer=6'), (['--attn'], 'as in --attn=baseline'),
    (['--n_layer=six'], 'whole number'), (['--n_layer=2.5'], 'whole number'), (['--n_layer='], 'whole number'),
    (['--n_layer=True'], 'whole number'), (['--n_layer=1e30'], '64 bits'), (['--n_layer=inf'], 'whole number'),
    (['--n_layer=' + '9' * 5000], 'whole number'), (['--n_layer=none'], 'whole number'),
    (['--learning_rate=nan'], 'finite'), (['--learning_rate=-inf'], 'finite'), (['--learning_rate=1e999'], 'finite'),
    (['--compile=maybe'], 'True or False'), (['--compile=2'], 'True or False'),
    (['--q_lora_rank=x'], 'none or a whole'),
    (['--attn=lara'], 'one of baseline, lora, enhanced; did you mean lora?'),
    (['--attn=enh'], 'did you mean enhanced?'), (['--device=gpu'], 'one of auto, cpu or none'),
    (['--n_layer=1', '--n_layer=2'], 'given twice (1 and 2)'), (['no/such.py'], 'no/such.py: No such file')])
def test_a_bad_argument_ends_in_one_line_that_says_what_is_needed(run, argv, part):
    assert part in error(run, *argv)


@pytest.mark.parametrize('text, line, part', [
    ('n_layer = 2\nlearning_rte = 1\n', 2, 'unknown knob learning_rte; did you mean learning_rate?'),
    ('\n\nlr = 1\n', 3, 'that is learning_rate here'), ('n_layer = len("abc")\n', 1, 'literal'),
    ('import os\n', 1, 'nothing is executed'), ('print("x")\n', 1, 'nothing is executed'),
    ('n_layer += 1', 1, 'only lines'), ('a = b = 1', 1, 'only lines'), ('n_layer, attn = 1, 2', 1, 'only lines'),
    ('if True:\n  n_layer = 1', 1, 'only lines'), ('n_layer: int = 1', 1, 'only lines'),
    ("n_layer = '6'", 1, 'quotes'), ('dataset = 6', 1, 'in quotes'), ('dataset = ["x"]', 1, 'in quotes'),
    ('n_layer = 2.5', 1, 'whole number'), ('n_layer = True', 1, 'whole number'), ('n_layer = [1]', 1, ''),
    ('runs = "x"', 1, ''), ('n_layer = 1/0', 1, 'literal'), ('n_layer = 9**9**9', 1, 'literal'),
    ('n_layer = 2**0.5', 1, 'whole'), ('dataset = "x" * 1000000000', 1, 'literal'),
    ('learning_rate = 1e999', 1, 'finite'), ('n_layer = 3j', 1, 'whole'), ('n_layer = {}', 1, ''),
    ('n_layer = ...', 1, ''), ('dataset = b"x"', 1, 'quotes'), ('n_layer = 1\nn_layer = 2', 2, 'second time'),
    ('n_layer = (1', 1, 'lines of name = literal'), ('attn = "mla"', 1, 'one of'),
    ('dataset = f"{1}"', 1, 'literal'), ('n_layer = n_layer', 1, 'literal'), ('x\n', 1, 'only lines'),
    ('dataset = None', 1, '')])
def test_a_bad_config_file_is_named_with_its_line(run, tmp_path, text, line, part):
    (tmp_path / 'c.py').write_text(text)
    assert f'c.py:{line}: ' in (message := error(run, 'c.py')) and part in message


@pytest.mark.parametrize('content', [b'\xff\xfe', b'n_layer = 1\x00', b'(' * 5000, b'-' * 200000 + b'1',
                                     b'n_layer = ' + b'1+' * 50000 + b'1',
                                     b'n_layer = ' + b'9' * 5000, b'dataset = "\\d" + 1', b'\x0c\r\r n_layer',
                                     b'# coding: wat\nx', 'a folder'])
def test_what_is_not_even_python_ends_in_one_line(run, tmp_path, content):
    (tmp_path / 'c.py').mkdir() if content == 'a folder' else (tmp_path / 'c.py').write_bytes(content)
    assert 'c.py' in error(run, 'c.py')


def test_fail_prints_one_line_whatever_the_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['some/where/bench.py'])
    with pytest.raises(SystemExit) as end:
        configurator.fail(ValueError('one\ntwo\r\nthree\u2028four'))
    assert end.value.code == 2 and capsys.readouterr().err == 'bench.py: one two three four\n'


@pytest.mark.parametrize('flag, hint', [
    ('--max_iters=600', 'unknown knob --max_iters; that is max_steps here'), ('--hidden_size=64', '; that is n_embd here'),
    ('--gradient_accumulation_steps=40', '; that is batch_size, the sequences of a whole update; micro_batch_size'),
    ('--num-experts-per-tok=2', '; that is top_k here'), ('--n_layers=2', 'did you mean --n_layer=2'),
    ('--lr=1', '; that is learning_rate here'), ('--tracker=wand', 'did you mean wandb?'), ('--tracker=x', 'tensorboard')])
def test_what_others_call_a_knob_is_told_what_it_is_called_here(run, flag, hint):
    network, rest = configurator.run_knobs()
    assert hint in error(run, flag, more={**network, **rest})
    assert 'unknown knob --max_iters (python' in error(run, '--max_iters=3')        # a program that has no such knob


# ---- what a program says -----------------------------------------------------------------------------------

SPEAK = """
import os, sys, configurator
configurator.rewrite('under way')
configurator.say('one')
configurator.rewrite('once more')
configurator.say('two')
print('went on', file=sys.stderr, flush=True)
os._exit(0)                     # whatever is not out by now is lost
"""


def test_a_pipe_gets_whole_lines_at_once_and_nothing_of_what_is_rewritten(program):
    assert start('-c', SPEAK, env={'PYTHONUNBUFFERED': ''}).stdout.decode().splitlines() == ['one', 'two']
    assert start('-c', SPEAK, env={'RANK': '1'}).stdout == b''                  # the first process speaks


@pytest.mark.skipif(os.name != 'posix', reason='a terminal as POSIX has it')
def test_a_terminal_sees_the_rewritten_line_and_no_rest_of_it_before_the_next():
    import pty
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, '-c', SPEAK], stdout=follower, stderr=subprocess.DEVNULL, cwd=REPOSITORY)
    os.close(follower)
    seen = b''
    with contextlib.suppress(OSError):                      # Linux has an error at the end, macOS an empty read
        while part := os.read(leader, 10_000):              # each write may come by itself
            seen += part
    os.close(leader)
    seen = seen.decode()
    screen, line, at = [], [' '] * 200, 0
    for c in seen:                                          # what a terminal makes of it
        if c == '\n':
            screen, line = screen + [''.join(line).rstrip()], [' '] * 200
        elif c == '\r':
            at = 0
        else:
            line[at], at = c, at + 1
    assert 'under way' in seen and 'once more' in seen and screen == ['one', 'two']


@pytest.mark.skipif(os.name != 'posix', reason='pipes as POSIX has them')
def test_where_nobody_reads_any_more_a_program_goes_on(program):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, '-c', SPEAK], stdout=writing, stderr=subprocess.PIPE, cwd=REPOSITORY)
    os.close(writing)
    assert done.returncode == 0 and done.stderr == b'went on\n'


def test_of_several_processes_the_first_says_what_is_wrong_and_another_only_what_it_alone_has_met(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(configurator.time, 'sleep', waited.append)
    for rank in '0', '1':
        monkeypatch.setenv('LOCAL_RANK', rank)
        monkeypatch.setenv('RANK', rank)
        with pytest.raises(SystemExit) as end:
            configurator.fail('wrong')
        assert end.value.code == 2 and capsys.readouterr().err.endswith(': wrong\n')
    assert len(waited) == 1                                 # torchrun ends it meanwhile, if the first has ended


# ---- help --------------------------------------------------------------------------------------------------

def test_help_shows_every_knob_with_section_value_and_comment_within_100_columns(run, tmp_path):
    (tmp_path / 'c.py').write_text('n_layer = 12\n')
    for argv in (['--help'], ['-h', 'c.py'], ['--n_layer=3', '--help']):
        status, out, err = run(*argv)
        assert status == 0 and err == '' and max(map(len, out.splitlines())) <= 100
        assert out.startswith('Trains a thing, quite \u2192 quickly.\n') and 'Not part' not in out
        assert all(f'--{name}=' in out for name in DEFAULTS)
        assert 'peak of the schedule; the same for all' in out
        assert '\nsize of the model\n' in out and '[baseline, lora, enhanced]' in out
        assert '--q_lora_rank=none' in out
        assert f'--n_layer={12 if "c.py" in argv else 3 if "--n_layer=3" in argv else 6} ' in out


def start(program, *argv, **options):
    env = {**os.environ, 'PYTHONPATH': str(REPOSITORY), **options.pop('env', {})}
    return subprocess.run([sys.executable, str(program), *argv], capture_output=True, env=env, timeout=60,
                          **options)


def test_as_a_program_it_answers_a_typo_and_help_with_the_right_status(program, tmp_path):
    (tmp_path / 'c.py').write_text('dataset = "a b"\n')
    bad = start(program, '--lr=1')
    assert bad.returncode == 2 and bad.stdout == b'' and bad.stderr.count(b'\n') == 1
    good = start(program, '--n_layer=2', 'c.py', cwd=tmp_path)
    assert good.returncode == 0 and good.stderr == b''
    assert ast.literal_eval(good.stdout.decode())['dataset'] == 'a b'
    plain = start(program, '--help', env={'PYTHONIOENCODING': 'ascii'})
    assert plain.returncode == 0 and b'quite ? quickly' in plain.stdout and plain.stderr == b''


@pytest.mark.skipif(os.name != 'posix', reason='descriptors as POSIX has them')
def test_without_a_standard_output_a_program_does_its_work(program):
    done = start(program, '--help', preexec_fn=lambda: os.close(1))         # a shell's >&-
    assert done.returncode == 0 and done.stderr == b''


@pytest.mark.skipif(os.name != 'posix', reason='byte arguments as POSIX has them')
def test_an_argument_that_is_not_unicode_leaves_no_traceback(program):
    odd = start(program, b'--\xff=1')
    assert odd.returncode == 2 and odd.stderr.count(b'\n') == 1 and b'Traceback' not in odd.stderr


def test_importing_it_pulls_in_neither_torch_nor_numpy():
    code = "import sys, configurator; assert not {'torch', 'numpy', 'data', 'model'} & set(sys.modules)"
    assert start('-c', code).returncode == 0


# ---- fuzzing -----------------------------------------------------------------------------------------------

def settings(examples):
    from hypothesis import HealthCheck, settings
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
                    database=None)


def strategies():
    pytest.importorskip('hypothesis')
    from hypothesis import strategies
    return strategies


def check(result, names):
    """Any input ends in values for just the known knobs, in status 0 (help), or in one line and status 2."""
    if isinstance(result, dict):
        assert result.keys() == DEFAULTS.keys() and names <= DEFAULTS.keys()
    else:
        status, out, err = result
        one_line = err.startswith('train.py: ') and err.count('\n') == 1
        assert (status, err) == (0, '') or status == 2 and one_line


def test_random_arguments_never_end_in_a_traceback_nor_pass_an_unknown_name(run):
    st = strategies()
    from hypothesis import given
    names = st.sampled_from([*DEFAULTS, 'lr', 'help', 'n-layer']) | st.text(max_size=8)
    flags = st.builds('{}{}{}{}'.format, st.sampled_from(['--', '-', '']), names, st.sampled_from(['=', '']),
                      st.text(max_size=8)
                      | st.sampled_from(['1', 'none', 'True', 'nan', '1e400', '{}', '0x3', '1_']))

    @settings(400)
    @given(st.lists(flags, max_size=4))
    def fuzz(argv):
        set_names = {arg[2:].partition('=')[0] for arg in argv if arg.startswith('--') and arg != '--help'}
        check(run(*argv), set_names)
    fuzz()


def test_random_config_files_never_end_in_a_traceback_nor_pass_an_unknown_name(run, tmp_path):
    st = strategies()
    from hypothesis import given
    names = st.sampled_from([*DEFAULTS, 'lr', 'n_layers']) | st.from_regex(r'[a-z_]{1,6}', fullmatch=True)
    literals = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
                            | st.binary(max_size=3),
                            lambda inner: st.lists(inner, max_size=3)
                            | st.dictionaries(st.text(max_size=2), inner, max_size=2))
    code = st.text(alphabet='abn_layer=1.+-*/()[]{}"\'\\#: \n\t', max_size=20)
    lines = st.builds('{} = {}'.format, names, literals.map(repr) | code) | code
    path = tmp_path / 'c.py'

    @settings(400)
    @given(st.lists(lines, max_size=4).map('\n'.join) | st.text(max_size=30),
           st.sampled_from(['utf-8', 'utf-16']))
    def fuzz(text, encoding):
        path.write_bytes(text.encode(encoding, 'surrogatepass'))
        result, set_names = run('c.py'), set()
        if isinstance(result, dict):
            set_names = {node.targets[0].id for node in ast.parse(path.read_text('utf-8-sig')).body
                         if isinstance(node, ast.Assign)}
        check(result, set_names)
    fuzz()


def test_every_value_survives_being_typed_as_a_flag_and_as_a_line_of_a_config_file(run, tmp_path):
    st = strategies()
    from hypothesis import given
    whole, finite = st.integers(-2**63, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
    plain = st.text(st.characters(blacklist_categories=['Cs'], blacklist_characters='\0'))
    item = st.text(st.characters(blacklist_categories=['Cs'], blacklist_characters='\0,'), min_size=1)
    values = st.fixed_dictionaries({}, optional={
        'n_layer': whole, 'learning_rate': finite, 'block_size': whole, 'batch_size': whole,
        'attn': st.sampled_from(['baseline', 'lora', 'enhanced']), 'q_lora_rank': whole | st.none(),
        'dropout': finite | st.none(), 'device': st.sampled_from(['auto', 'cpu', None]), 'dataset': plain,
        'compile': st.booleans(), 'runs': st.lists(item, max_size=3)})

    @settings(300)
    @given(values)
    def round_trip(values):
        (tmp_path / 'c.py').write_text(''.join(f'{k} = {v!r}\n' for k, v in values.items()), encoding='utf-8')
        typed = run(*(f'--{key}={configurator.as_text(value)}' for key, value in values.items()))
        assert repr(typed) == repr(run('c.py')) == repr({**DEFAULTS,
                                                         **values})     # repr: -0.0 is not 0.0, 1 is not True
    round_trip()
