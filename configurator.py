"""Knobs of a program: the defaults in its own source, then config files, then --name=value flags.

A program keeps its knobs as plain variables between two ruler lines (comments of twenty dashes or more):

    # --------------------
    # data
    dataset = 'stdlib'                    # a name or a path
    max_tokens: int | None = None         # use the first so many;
                                          # none: all
    kind: Literal['a', 'b'] = 'a'         # one of these
    # --------------------
    configure(globals())

The block is read, not executed, a knob a line, and is its own documentation: a comment line at the knobs' own
indentation titles a section, one indented deeper continues the comment above it. The type is that of the default; an
annotation adds None or choices. The fields of ModelConfig in model.py are knobs of train.py in the same way.

Config files are `name = literal` lines (numbers may be calculated: 4 * 1024, 10**6), not executed either. The text of a
flag is taken as it is, without quotes. Setting a knob twice, in one file or by two flags, is an error: one would be
lost. Nothing slow is imported, so that --help and typos are answered at once.
"""
import ast
import difflib
import math
import operator
import os
import re
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path

Knob = namedtuple('Knob', 'name default types choices section comment')

# what nanoGPT, Hugging Face and the hurried call it: the knob, and what else is to be said
ELSEWHERE = {
    'lr': 'learning_rate', 'max_iters': 'max_steps', 'lr_decay_iters': 'max_steps', 'warmup_iters': 'warmup_steps',
    'min_lr': 'min_lr_ratio, a fraction of learning_rate', 'decay_lr': 'min_lr_ratio, 1 for no decay',
    'gradient_accumulation_steps': 'batch_size, the sequences of a whole update; micro_batch_size of them run at once',
    'eval_iters': 'max_val_tokens, all of which are scored', 'wandb_log': 'tracker', 'wandb_project': 'experiment',
    'wandb_run_name': 'name', 'bias': 'attention_bias', 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head',
    'num_key_value_heads': 'n_kv_head', 'hidden_size': 'n_embd', 'intermediate_size': 'd_ff',
    'num_experts_per_tok': 'top_k'}


# ---------------------------------------------------------------------------------------------------------------------
# What a program says

def fail(message):
    """Ends the program as every bad input ends it: one line on stderr, exit status 2."""
    if os.environ.get('LOCAL_RANK', '0') != '0':            # the first of several processes speaks and torchrun ends
        time.sleep(10)                                      # the others; what one alone has met it says later
    say(f'{os.path.basename(sys.argv[0])}: ' + ' '.join(str(message).splitlines()), file=sys.stderr)
    raise SystemExit(2)


def say(line, file=None):
    """Prints a line at once; of several processes only the first does. Where nobody reads any more (`| head`, a closed
    terminal), what follows goes nowhere."""
    if file is None and os.environ.get('RANK', '0') != '0':
        return
    file = file or sys.stdout
    try:
        print(('\r' + 79 * ' ' + '\r') * file.isatty() + line, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def rewrite(line):
    """Shows a line on a terminal until the next one takes its place; files and pipes do not get it."""
    if sys.stdout.isatty() and os.environ.get('RANK', '0') == '0':
        print(f'\r{line[:79]:79}', end='\r', flush=True)


def did_you_mean(name, names, form='{}'):
    """'; did you mean ...?' with up to three names like this one or with it in them, or ''; or what we call it."""
    plain = name.strip('-').replace('-', '_').lower()
    if plain in ELSEWHERE and ELSEWHERE[plain].partition(',')[0] in names:
        return f'; that is {ELSEWHERE[plain]} here'
    found = difflib.get_close_matches(plain, names) or [n for n in names if len(plain) > 1 and plain in n][:3]
    return '; did you mean ' + ' or '.join(form.replace('{}', n) for n in found) + '?' if found else ''


def unknown(name, knobs, form='{}'):
    hint = did_you_mean(name, knobs, form)
    return f'unknown knob {name}{hint} (python {os.path.basename(sys.argv[0])} --help lists them)'


# ---------------------------------------------------------------------------------------------------------------------
# Values

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Pow: lambda a, b: float(a) ** b and a ** b}    # an OverflowError, not a number of a million digits


def literal(node):
    """The value of a literal's syntax tree; ValueError for what would have to be executed."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = literal(node.left), literal(node.right)
        if not {type(left), type(right)} <= {int, float}:       # 'x' * 10**9 is no literal
            raise ValueError('arithmetic is for numbers')
        return OPERATORS[type(node.op)](left, right)
    return ast.literal_eval(node)


def whole(text):
    value = int(text) if text.lstrip('+-').replace('_', '').isdigit() else float(text)      # 12, 1_000, 1e3
    if value != int(value) or not -2**63 <= value < 2**63:
        raise ValueError
    return int(value)


def finite(text):
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


# what a type accepts, in words, and its value; the pickiest type is tried first
TYPES = {'None': ('none', lambda text: {'none': None}[text.lower()]),
         'bool': ('True or False', lambda text: {'true': True, '1': True, 'false': False, '0': False}[text.lower()]),
         'int': ('a whole number of at most 64 bits', whole), 'float': ('a finite number', finite), 'str': ('text', str),
         'list': ('texts', lambda text: [item for item in text.split(',') if item])}


def as_text(value):
    """A value as it is typed after `--name=`: from_text(knob, as_text(value), '') == value."""
    if isinstance(value, (list, tuple)):
        return ','.join(map(str, value))
    return 'none' if value is None else str(value)


def from_text(knob, text, typed):
    """The text after `--name=` -> the value in the knob's own type. typed: what to name if it is none."""
    words = {as_text(choice): choice for choice in knob.choices}
    if text in words:
        return words[text]
    for kind in knob.types:
        try:
            return TYPES[kind][1](text)
        except (ValueError, KeyError, OverflowError):
            continue
    needed = ['one of ' + ', '.join(words)] * bool(words) + [TYPES[kind][0] for kind in knob.types]
    fail(f'{typed}: must be {" or ".join(needed)}{did_you_mean(text, words)}')


# ---------------------------------------------------------------------------------------------------------------------
# Knobs, read from the text of a program

KNOB = re.compile(r' *(\w+)(?:: ([^=]+))? = (.+?)(?:  +# (.*))?')        # name: annotation = literal    # comment


def read_block(path):
    """-> {name: Knob} of the block above the call of configure(), in its order."""
    above = Path(path).read_text(encoding='utf-8').partition('configure(globals()')[0]
    return read_knobs(re.split(r'^ *# ?-{20,}\n', above, flags=re.M)[-2])


def read_class(path, name):
    """-> {name: Knob} of the fields of a dataclass that have defaults; they stand above its methods."""
    return read_knobs(Path(path).read_text(encoding='utf-8').partition(f'class {name}:\n')[2].partition('  def ')[0])


def run_knobs():
    """The knobs of a training run -> (its network's, all others), two {name: Knob}: ModelConfig's, train.py's."""
    here = Path(__file__).resolve().parent
    return read_class(here / 'model.py', 'ModelConfig'), read_block(here / 'train.py')


def read_knobs(text):
    """Lines of knobs, titles and comments, as at the top of this file -> {name: Knob}."""
    knobs, section, indent, titled = {}, '', 100, False
    for line in text.splitlines():
        margin, comment = len(line) - len(line.lstrip()), line.lstrip().startswith('#')
        title = comment and margin <= indent
        if found := KNOB.fullmatch(line):
            name, annotation, default, said = found.groups()
            default, indent = literal(ast.parse(default, mode='eval').body), margin
            kinds = (annotation or type(default).__name__).split(' | ')
            choices = [choice for kind in kinds if kind.startswith('Literal') for choice in ast.literal_eval(kind[7:])]
            types = [kind for kind in TYPES if kind in kinds]
            knobs[name] = Knob(name, default, types, choices, section, said or '')
        elif title:
            section = f'{section} {line.strip("# ")}' if titled else line.strip('# ')
        elif comment:
            knobs[name] = knobs[name]._replace(comment=f'{knobs[name].comment} {line.strip("# ")}'.strip())
        titled = title
    return knobs


# ---------------------------------------------------------------------------------------------------------------------
# Config files, help, flags

def read_config(path, knobs):
    """A config file -> {name: value}. Fails with file:line at anything but literals that fit the knobs."""
    values, line = {}, 1
    try:
        for node in ast.parse(Path(path).read_text(encoding='utf-8-sig')).body:
            where = f'{path}:{(line := node.lineno)}'
            if isinstance(node, ast.Expr) and type(ast.literal_eval(node.value)) is str:
                continue                                     # a docstring
            (name,), value = [target.id for target in node.targets], literal(node.value)
            if name not in knobs:
                fail(f'{where}: {unknown(name, knobs)}')
            if name in values:
                fail(f'{where}: {name} is set a second time in this file')
            typed = f'{where}: {name} = {ast.unparse(node.value)[:60]}'
            values[name] = from_text(knobs[name], as_text(value), typed)
            kinds = {type(value), type(values[name])}
            if len(kinds) > 1 and kinds & {str, list}:       # n_layer = '6', dataset = 6
                fail(f'{typed}: text stands in quotes, texts in brackets, all else in neither')
    except OSError as error:
        fail(f'{path}: {error.strerror} (a config file is looked for from {os.getcwd()})')
    except Exception as error:                               # no Python, no assignment, no literal, absurd nesting
        fail(f'{path}:{getattr(error, "lineno", None) or line}: only lines of name = literal (number, text, True, False, '
             'None) are read here, nothing is executed')
    return values


def print_help(knobs, values, docstring, argument):
    """Prints every knob with its section, value and comment in 100 columns; ends the program, status 0."""
    usage = f'usage: python {os.path.basename(sys.argv[0])} [{argument}] [--name=value ...]'
    lines, section = [*textwrap.wrap(docstring.split('\n\n')[0], 100), '', usage], None
    for knob in knobs.values():
        if knob.section != section:
            section = knob.section
            lines += ['', *textwrap.wrap(section, 100)]
        flag = f'  --{knob.name}={as_text(values[knob.name])}'
        choices = f' [{", ".join(map(as_text, knob.choices))}]' if knob.choices else ''
        lines += textwrap.wrap(f'{flag:31} {knob.comment}{choices}', 100, subsequent_indent=' ' * 32)
    say('\n'.join(lines))
    raise SystemExit(0)


def configure(namespace, more=None, positional=None, argv=None, given=None):
    """Lays config files and flags over the defaults -> {name: value}; writes the program's own knobs into namespace.

    namespace: globals() of the caller, whose source is namespace['__file__']. more: {name: Knob} of knobs that stand
    elsewhere (run_knobs); they are in what is returned only. positional: None: arguments without dashes are config
    files, a later one overriding an earlier one; a knob's name: the one such argument is its value. argv: by default of
    the program. Bad input ends the program with one line and status 2, --help with status 0. given: a dict that gets what
    files and flags set, be it the default or not.
    """
    given = {} if given is None else given
    sys.stdout = sys.stdout or open(os.devnull, 'w')            # none: closed by whoever started the program (>&-)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')                # a terminal that lacks a character shows ?
    argv = sys.argv[1:] if argv is None else list(argv)
    own = read_block(namespace['__file__'])
    knobs = {**(more or {}), **own}
    values = {name: knob.default for name, knob in knobs.items()}
    flags, help_wanted = {}, False
    for arg in argv:
        if positional and not arg.startswith('-'):
            arg = f'--{positional}={arg}'
        name, equals, text = arg.removeprefix('--').partition('=')
        if arg.endswith('.py') and not arg.startswith('-'):
            given.update(read_config(arg, knobs))
        elif not arg.startswith('-'):
            fail(f'unexpected argument {arg}; flags are --name=value, config files end in .py')
        elif arg in ('-h', '--help'):
            help_wanted = True
        elif not arg.startswith('--') or name not in knobs:
            fail(unknown(arg.partition('=')[0], knobs, '--{}=' + (text or '...')))
        elif not equals:
            example = as_text(True if type(values[name]) is bool else values[name])
            fail(f'{arg} needs a value after =; type {arg}=VALUE, as in {arg}={example}')
        elif name in flags:
            fail(f'--{name} is given twice ({as_text(flags[name])} and {text}); keep one of them')
        else:
            flags[name] = from_text(knobs[name], text, arg)
    given.update(flags)
    values.update(given)
    if help_wanted:
        print_help(knobs, values, namespace['__doc__'], positional or 'config/file.py ...')
    namespace.update({name: values[name] for name in own})
    return values
