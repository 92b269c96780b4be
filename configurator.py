"""Knobs of a program: the defaults in its own source, then config files, then --name=value flags.

A program keeps its knobs as plain variables between two ruler lines (comments of twenty dashes or more), at
module level or inside `if __name__ == '__main__':`, and then calls configure(globals()):

    # --------------------
    # model
    n_layer = 6                           # blocks
    q_lora_rank: int | None = None        # rank of the query bottleneck;
                                          # none: queries straight from x
    attn: Literal['mha', 'mla'] = 'mha'   # kind of attention
    # --------------------
    configure(globals())

The block is parsed, not executed, and is its own documentation:
  - a comment line at the knobs' own indentation titles a section (several such lines in a row join);
  - a comment line indented deeper goes on with the comment of the knob above it;
  - the type is that of the default; an annotation adds None or choices.
Config files are `name = literal` lines (numbers may be sums and products, as in 4 * 1024), parsed as well:
what is misspelt, of the wrong type or not a literal is named with its line. The text of a flag is taken as it
is, without quotes. Setting a knob twice, in one file or by two flags, is an error: one would be lost unseen.
"""

import ast
import difflib
import io
import operator
import os
import sys
import textwrap
import tokenize
import warnings
from collections import namedtuple

Knob = namedtuple('Knob', 'name default types choices section comment')

# what a type accepts, in words; the pickiest type is tried first
NEEDS = {'None': 'none', 'bool': 'True or False', 'int': 'a whole number of at most 64 bits',
         'float': 'a finite number', 'str': 'text', 'list': 'texts'}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def fail(message):
    """Ends the program as every bad input ends it: one line on stderr, exit status 2."""
    print(f'{os.path.basename(sys.argv[0])}: ' + ' '.join(str(message).splitlines()), file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Values and names

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


def did_you_mean(name, names, form='{}'):
    """'; did you mean ...?' with up to three names, or ''. By spelling, initials, beginning, likeness."""
    plain = name.strip('-').replace('-', '_').lower()
    found = [n for n in names if n.lower() == plain]
    if len(plain) > 1:
        found = found or [n for n in names if ''.join(word[:1] for word in n.split('_')) == plain]
        found = found or [n for n in names if n.startswith(plain)]
        found = found or difflib.get_close_matches(plain, names) or [n for n in names if plain in n]
    return '; did you mean ' + ' or '.join(form.format(n) for n in found[:3]) + '?' if found else ''


def unknown(name, knobs, form):
    return did_you_mean(name, knobs, form) + f' (python {os.path.basename(sys.argv[0])} --help lists them)'


# ---------------------------------------------------------------------------------------------------------------------
# The block of the program

def read_block(path):
    """The knobs between a program's first two consecutive rulers that enclose only literal assignments.

    Returns ({name: Knob} in the order of the block, the program's docstring). RuntimeError without a block.
    """
    with tokenize.open(path) as file:
        source = file.read()
    tree, comments, reason = ast.parse(source), {}, 'fewer than two rulers'
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:               # line -> (column, text, stands alone on its line)
            alone = not token.line[:token.start[1]].strip()
            comments[token.start[0]] = token.start[1], token.string.lstrip('#').strip(), alone
    rulers = [line for line, (_, text, alone) in comments.items()
              if alone and len(text) >= 20 and not text.strip('-')]
    statements = sorted((n for n in ast.walk(tree) if isinstance(n, ast.stmt)), key=lambda n: n.lineno)
    for start, end in zip(rulers, rulers[1:]):
        inside = {node.lineno: node for node in statements if start < node.lineno < end}
        try:
            if inside:
                return read_knobs(inside, comments, range(start + 1, end)), ast.get_docstring(tree) or ''
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f'lines {start}-{end}: {error!r}'   # rulers around something else, or a mistake
    raise RuntimeError(f'{path}: no block of name = literal lines between two rulers ({reason})')


def read_knobs(statements, comments, lines):
    """Walks the lines of the block -> {name: Knob}; raises if a statement is not `name = literal`."""
    knobs, section, name, titled, done = {}, '', None, False, 0
    indent = min(node.col_offset for node in statements.values())
    for line in lines:
        column, text, alone = comments.get(line, (0, '', False))
        title = alone and line > done and column <= indent
        if line in statements:
            node = statements[line]
            name = (node.targets[0] if isinstance(node, ast.Assign) else node.target).id
            default, done = literal(node.value), node.end_lineno
            types, choices = [type(default).__name__], []
            if isinstance(node, ast.AnnAssign):
                types, choices = read_annotation(node.annotation)
            types.sort(key=list(NEEDS).index)
            knobs[name] = Knob(name, default, types, choices, section, comments.get(done, (0, '', False))[1])
        elif title:
            section = f'{section} {text}' if titled else text
        elif alone and line > done and name:
            knobs[name] = knobs[name]._replace(comment=f'{knobs[name].comment} {text}'.strip())
        titled = title
    return knobs


def read_annotation(node):
    """Syntax tree of `int | None`, `Literal['a', 'b'] | None`, `list[str]` ... -> ([types], [choices])."""
    if isinstance(node, ast.BinOp):
        (types, choices), (more_types, more_choices) = read_annotation(node.left), read_annotation(node.right)
        return types + more_types, choices + more_choices
    if isinstance(node, ast.Subscript) and node.value.id == 'Literal':
        choices = ast.literal_eval(node.slice)
        return [], list(choices) if isinstance(choices, tuple) else [choices]
    if isinstance(node, ast.Constant) and node.value is None:
        return ['None'], []
    return [(node.value if isinstance(node, ast.Subscript) else node).id], []


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
    except SyntaxError as error:
        fail(f'{path}:{error.lineno or 1}: {error.msg}; a config file holds lines of name = literal')
    except (ValueError, RecursionError, MemoryError) as error:      # not UTF-8, null bytes, absurd nesting
        fail(f'{path}: not a config file ({error or type(error).__name__})')
    values = {}
    for node in body:
        where = f'{path}:{node.lineno}'
        if isinstance(node, ast.Expr) and type(getattr(node.value, 'value', None)) is str:
            continue                                     # a docstring
        names = [getattr(target, 'id', None) for target in getattr(node, 'targets', [])]
        if not isinstance(node, ast.Assign) or len(names) != 1 or names[0] is None:
            fail(f'{where}: only lines of name = literal are read here, nothing is executed')
        name = names[0]
        if name not in knobs:
            fail(f'{where}: unknown knob {name}' + unknown(name, knobs, '{}'))
        if name in values:
            fail(f'{where}: {name} is set a second time in this file')
        try:
            value = literal(node.value)
        except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
            fail(f'{where}: {name} must be a literal (number, text, True, False, None), nothing is executed')
        try:
            values[name] = from_text(knobs[name], as_text(value))
            if (type(value) is str) != (type(values[name]) is str):             # n_layer = '6', dataset = 6
                raise ValueError('must not be in quotes' if type(value) is str else 'must be text in quotes')
        except (ValueError, TypeError) as error:
            fail(f'{where}: {name} = {ast.unparse(node.value)[:60]}: {error}')
    return values


def print_help(knobs, values, docstring, usage):
    """Prints every knob with its section, value and comment in 100 columns; ends the program, status 0."""
    lines, section = [*textwrap.wrap(docstring.split('\n\n')[0], 100), '', usage], None
    for knob in knobs.values():
        if knob.section != section:
            section = knob.section
            lines += ['', *textwrap.wrap(section, 100)]
        flag = f'  --{knob.name}={as_text(values[knob.name])}'
        choices = f' [{", ".join(map(as_text, knob.choices))}]' if knob.choices else ''
        indent = ' ' * 32
        comment = textwrap.wrap(knob.comment + choices, 100, initial_indent=indent, subsequent_indent=indent)
        if comment and len(flag) < 31:
            comment[0] = flag.ljust(32) + comment[0].lstrip()
            flag = None
        lines += [flag] * bool(flag) + comment
    text = '\n'.join(lines)
    try:
        encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
        print(text.encode(encoding, 'replace').decode(encoding), flush=True)
    except BrokenPipeError:      # `--help | head -1`; at exit the interpreter would flush again and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def configure(namespace, positional=None, argv=None):
    """Lays config files and flags over the defaults of the calling program, writes the result into namespace.

    namespace: globals() of the caller, whose source is namespace['__file__'].
    positional: None: arguments that end in .py are config files, a later one overriding an earlier one.
    The name of a knob: the one such argument is its value instead.
    argv: the arguments, default sys.argv[1:]. Returns {name: value} of every knob in the order of the block.
    Ends the program with one line on stderr and status 2 on bad input, with status 0 after --help.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    knobs, docstring = read_block(namespace['__file__'])
    values = {name: knob.default for name, knob in knobs.items()}
    flags, extra = {}, []
    for i, arg in enumerate(argv):
        name, equals, text = arg.removeprefix('--').partition('=')
        if arg in ('-h', '--help'):
            continue
        if not arg.startswith('-'):
            extra.append(arg)
        elif not arg.startswith('--') or name not in knobs:
            form = '--{}=' + (text.replace('{', '{{').replace('}', '}}') if text else '...')
            fail(f'unknown knob {arg.partition("=")[0]}' + unknown(name, knobs, form))
        elif not equals:
            default = knobs[name].default
            follows = as_text(True if type(default) is bool else default)
            if i + 1 < len(argv) and not argv[i + 1].startswith('-'):
                follows = argv[i + 1]
            fail(f'{arg} needs a value after =; type {arg}={follows}')
        elif name in flags:
            fail(f'--{name} is given twice ({as_text(flags[name])} and {text}); keep one of them')
        else:
            try:
                flags[name] = from_text(knobs[name], text)
            except ValueError as error:
                fail(f'--{name}={text}: {error}')

    if positional is None:
        for path in extra:
            if not path.endswith('.py'):
                fail(f'unexpected argument {path}; flags are --name=value, config files end in .py')
            values.update(read_config(path, knobs))
    elif extra:
        if positional in flags or len(extra) > 1:
            fail(f'{positional} is given more than once ({" ".join(extra)}); keep one of them')
        flags[positional] = extra[0]
    if '-h' in argv or '--help' in argv:
        before = '[config/file.py ...]' if positional is None else f'[{positional}]'
        usage = f'usage: python {os.path.basename(sys.argv[0])} {before} [--name=value ...]'
        print_help(knobs, values, docstring, usage)
    values.update(flags)
    namespace.update(values)
    return values
