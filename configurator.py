"""Knobs of a program: the defaults in its own source, then config files, then --name=value flags.

A program keeps its knobs as plain variables between two ruler lines (comments of twenty dashes or more) and then calls
configure(globals()):

    # --------------------
    # data
    dataset = 'stdlib'                    # a name or a path
    max_tokens: int | None = None         # use the first so many;
                                          # none: all
    kind: Literal['a', 'b'] = 'a'         # one of these
    # --------------------
    configure(globals())

The block is parsed, not executed, and is its own documentation: a comment line at the knobs' own indentation titles a
section, one indented deeper goes on with the comment above it. The type is that of the default; an annotation adds None
or choices. The fields of ModelConfig in model.py are knobs of train.py in the same way and stand nowhere else.

Config files are `name = literal` lines (numbers may be calculated: 4 * 1024, 10**6), parsed as well. The text of a flag
is taken as it is, without quotes. Setting a knob twice, in one file or by two flags, is an error: one would be lost.
Nothing slow is imported, so that --help and typos are answered at once.
"""
import ast
import difflib
import operator
import os
import re
import sys
import textwrap
import time
import warnings
from collections import namedtuple

Knob = namedtuple('Knob', 'name default types choices section comment')

# what a type accepts, in words; the pickiest type is tried first
NEEDS = {'None': 'none', 'bool': 'True or False', 'int': 'a whole number of at most 64 bits',
         'float': 'a finite number', 'str': 'text', 'list': 'texts'}
# what nanoGPT and Hugging Face call it: the knob, and what else is to be said
ELSEWHERE = {
    'max_iters': 'max_steps', 'lr_decay_iters': 'max_steps', 'warmup_iters': 'warmup_steps',
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
    if os.environ.get('LOCAL_RANK', '0') != '0':            # of several processes the first speaks, and its end ends
        time.sleep(10)                                      # the others, but for what one of them alone has met
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
    """'; did you mean ...?' with up to three names, or ''. By another's word for it, initials, beginning, likeness."""
    plain = name.strip('-').replace('-', '_').lower()
    knob = ELSEWHERE.get(plain, '').partition(',')[0]
    if knob in names:
        return f'; that is {ELSEWHERE[plain]} here'
    found = [n for n in names if n.lower() == plain]
    if len(plain) > 1:
        found = found or [n for n in names if ''.join(word[:1] for word in n.split('_')) == plain]
        found = found or [n for n in names if n.startswith(plain)]
        found = found or difflib.get_close_matches(plain, names) or [n for n in names if plain in n]
    return '; did you mean ' + ' or '.join(form.replace('{}', n) for n in found[:3]) + '?' if found else ''


def unknown(name, knobs, form='{}'):
    hint = did_you_mean(name, knobs, form)
    return f'unknown knob {name}{hint} (python {os.path.basename(sys.argv[0])} --help lists them)'


# ---------------------------------------------------------------------------------------------------------------------
# Values

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Pow: lambda a, b: float(a) ** b}               # an OverflowError, not a number of a million digits


def literal(node):
    """The value of a literal's syntax tree; ValueError for what would have to be executed."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = literal(node.left), literal(node.right)
        if not {type(left), type(right)} <= {int, float}:       # 'x' * 10**9 is no literal
            raise ValueError('arithmetic is for numbers')
        return OPERATORS[type(node.op)](left, right)
    return ast.literal_eval(node)


def as_text(value):
    """A value as it is typed after `--name=`: from_text(knob, as_text(value)) == value."""
    if isinstance(value, (list, tuple)):
        return ','.join(value)
    return 'none' if value is None else str(value)


def from_text(knob, text):
    """`--name=text` -> the value in the knob's own type; ValueError, saying what is needed, if it is none."""
    for choice in knob.choices:
        if text == as_text(choice):
            return choice
    low = text.strip().lower()
    for kind in knob.types:
        try:
            if kind == 'None' and low == 'none':
                return None
            if kind == 'bool' and low in ('true', 'false', '1', '0'):
                return low in ('true', '1')
            if kind == 'int':                                   # 12, 1_000, 1e3
                value = int(low) if low.lstrip('+-').replace('_', '').isdigit() else float(low)
                if value == int(value) and -2**63 <= value < 2**63:
                    return int(value)
            if kind == 'float' and abs(float(low)) <= sys.float_info.max:       # neither nan nor infinity
                return float(low)
        except (ValueError, OverflowError):
            continue
        if kind == 'str':
            return text
        if kind == 'list':
            return [item for item in text.split(',') if item]
    words = [as_text(choice) for choice in knob.choices]
    needed = ['one of ' + ', '.join(words)] * bool(words) + [NEEDS[kind] for kind in knob.types]
    raise ValueError('must be ' + ' or '.join(needed) + did_you_mean(text, words))


# ---------------------------------------------------------------------------------------------------------------------
# Knobs, read from the text of a program

def read(path):
    with open(path, encoding='utf-8') as file:
        source = file.read()
    return ast.parse(source), source.splitlines()


def read_block(path):
    """-> {name: Knob} of the block above the call of configure(), in its order, and the program's docstring."""
    tree, lines = read(path)
    nodes = list(ast.walk(tree))
    call = next(n.lineno for n in nodes if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'configure')
    start, end = [i for i, line in enumerate(lines[:call], 1) if re.fullmatch(r'\s*# ?-{20,}', line)][-2:]
    inside = [n for n in nodes if isinstance(n, (ast.Assign, ast.AnnAssign)) and start < n.lineno < end]
    return read_knobs(inside, lines, start + 1, end), ast.get_docstring(tree) or ''


def read_class(path, name):
    """-> {name: Knob} of the fields of a dataclass that have defaults."""
    tree, lines = read(path)
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    fields = [n for n in body if isinstance(n, ast.AnnAssign) and n.value]
    end = next((n.lineno for n in body if n.lineno > fields[-1].lineno), fields[-1].end_lineno + 1)
    return read_knobs(fields, lines, body[0].end_lineno, end)


def run_knobs():
    """The knobs of a training run -> (its network's, all others), two {name: Knob}: ModelConfig's, train.py's."""
    here = os.path.dirname(os.path.abspath(__file__))
    return read_class(os.path.join(here, 'model.py'), 'ModelConfig'), read_block(os.path.join(here, 'train.py'))[0]


def read_knobs(nodes, lines, start, end):
    """Assignments and the lines start to end - 1 around them -> {name: Knob}; raises if one is not `name = literal`."""
    knobs, section, name, titled = {}, '', None, False
    statements, indent = {n.lineno: n for n in nodes}, min(n.col_offset for n in nodes)
    for number in range(start, end):
        line = lines[number - 1]
        text, alone = line.strip().lstrip('# '), line.lstrip().startswith('#')
        title = alone and len(line) - len(line.lstrip()) <= indent
        if node := statements.get(number):
            name = (node.targets[0] if isinstance(node, ast.Assign) else node.target).id
            types, choices, default = [], [], literal(node.value)
            annotation = node.annotation if isinstance(node, ast.AnnAssign) else ast.Name(type(default).__name__)
            for part in ast.unparse(annotation).split(' | '):
                if part.startswith('Literal['):
                    choices += ast.literal_eval(part[7:])
                else:
                    types.append(part.partition('[')[0])        # list[str] is a list
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip().lstrip('# ')
            knobs[name] = Knob(name, default, sorted(types, key=list(NEEDS).index), choices, section, comment)
        elif title:
            section = f'{section} {text}' if titled else text
        elif alone and name:
            knobs[name] = knobs[name]._replace(comment=f'{knobs[name].comment} {text}'.strip())
        titled = title
    return knobs


# ---------------------------------------------------------------------------------------------------------------------
# Config files, help, flags

def read_config(path, knobs):
    """A config file -> {name: value}. Fails with file:line at anything but literals that fit the knobs."""
    try:
        with open(path, encoding='utf-8-sig') as file, warnings.catch_warnings():
            warnings.simplefilter('ignore')              # a stray backslash would print lines of its own
            body = ast.parse(file.read()).body
    except OSError as error:
        fail(f'{path}: {error.strerror} (a config file is looked for from {os.getcwd()})')
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:     # no Python, not UTF-8, absurd nesting
        fail(f'{path}:{getattr(error, "lineno", 0) or 1}: {getattr(error, "msg", error) or type(error).__name__}; '
             'a config file holds lines of name = literal')
    values = {}
    for node in body:
        where = f'{path}:{node.lineno}'
        if isinstance(node, ast.Expr) and type(getattr(node.value, 'value', None)) is str:
            continue                                     # a docstring
        try:
            (name,), value = [target.id for target in node.targets], literal(node.value)
        except (AttributeError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
            fail(f'{where}: only lines of name = literal (number, text, True, False, None) are read here, '
                 'nothing is executed')
        if name not in knobs:
            fail(f'{where}: {unknown(name, knobs)}')
        if name in values:
            fail(f'{where}: {name} is set a second time in this file')
        try:
            values[name] = from_text(knobs[name], as_text(value))
            if (type(value) is str) != (type(values[name]) is str):             # n_layer = '6', dataset = 6
                raise ValueError('must not be in quotes' if type(value) is str else 'must be text in quotes')
        except (ValueError, TypeError) as error:
            fail(f'{where}: {name} = {ast.unparse(node.value)[:60]}: {error}')
    return values


def print_help(knobs, values, docstring, argument):
    """Prints every knob with its section, value and comment in 100 columns; ends the program, status 0."""
    usage = f'usage: python {os.path.basename(sys.argv[0])} [{argument}] [--name=value ...]'
    lines, section, indent = [*textwrap.wrap(docstring.split('\n\n')[0], 100), '', usage], None, ' ' * 32
    for knob in knobs.values():
        if knob.section != section:
            section = knob.section
            lines += ['', *textwrap.wrap(section, 100)]
        flag = f'  --{knob.name}={as_text(values[knob.name])}'
        choices = f' [{", ".join(map(as_text, knob.choices))}]' if knob.choices else ''
        comment = textwrap.wrap(knob.comment + choices, 100, initial_indent=indent, subsequent_indent=indent)
        if comment and len(flag) < 31:
            flag = flag.ljust(32) + comment.pop(0).lstrip()
        lines += [flag, *comment]
    say('\n'.join(lines))
    raise SystemExit(0)


def configure(namespace, more=None, positional=None, argv=None, given=None):
    """Lays config files and flags over the defaults -> {name: value}; writes the program's own knobs into namespace.

    namespace: globals() of the caller, whose source is namespace['__file__']. more: {name: Knob} of knobs that stand
    elsewhere (run_knobs); they are in what is returned only. positional: None: arguments that end in .py are config
    files, a later one overriding an earlier one; a knob's name: the one such argument is its value. argv: by default of
    the program. Bad input ends the program with one line and status 2, --help with status 0. given: a dict that gets what
    files and flags set, be it the default or not.
    """
    given = {} if given is None else given
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')                # a terminal that lacks a character shows ?
    argv = sys.argv[1:] if argv is None else list(argv)
    own, docstring = read_block(namespace['__file__'])
    knobs = {**(more or {}), **own}
    values = {name: knob.default for name, knob in knobs.items()}
    flags, extra = {}, []
    for arg in argv:
        name, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('-'):
            extra.append(arg)
        elif arg not in ('-h', '--help'):
            if not arg.startswith('--') or name not in knobs:
                fail(unknown(arg.partition('=')[0], knobs, '--{}=' + (text or '...')))
            if not equals:
                example = as_text(True if type(values[name]) is bool else values[name])
                fail(f'{arg} needs a value after =; type {arg}=VALUE, as in {arg}={example}')
            if name in flags:
                fail(f'--{name} is given twice ({as_text(flags[name])} and {text}); keep one of them')
            try:
                flags[name] = from_text(knobs[name], text)
            except ValueError as error:
                fail(f'--{name}={text}: {error}')

    if positional is None:
        for path in extra:
            if not path.endswith('.py'):
                fail(f'unexpected argument {path}; flags are --name=value, config files end in .py')
            given.update(read_config(path, knobs))
            values.update(given)
    elif extra:
        if positional in flags or len(extra) > 1:
            fail(f'{positional} is given more than once ({" ".join(extra)}); keep one of them')
        flags[positional] = extra[0]
    if '-h' in argv or '--help' in argv:
        print_help(knobs, values, docstring, positional or 'config/file.py ...')
    values.update(flags)
    namespace.update({name: values[name] for name in own})
    given.update(flags)
    return values
