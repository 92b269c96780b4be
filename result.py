"""What a result file is, and which of them may be compared. train.py writes them, analyze.py reads them; no torch here.

    run = read_run('out/laptop/lora-s0/result.json')    # sound, or one line and the end
    arms = load('out/laptop', 'baseline')               # {arm: {seed: run}}: an arm is the runs of one name
    for line in disagreements(arms, 'baseline'): ...    # what they differ in beyond variant and seed

The README describes the fields ("Read a result").
"""

import json
import math
import os
import re

from configurator import fail, read_block

SCHEMA = 2      # of result.json and checkpoint.pt. 1: every weight N(0, 0.02), router losses averaged over the layers
STATUSES = ('running', 'complete', 'interrupted', 'diverged')
NAME_LENGTH = 60                                        # of a run's name, at most: what fits a table
CONTINUATION = {'resume', 'overwrite', 'out_dir', 'data_root'}      # may differ between a run and its continuation


def json_ready(value):
    """NaN and infinities become null, as JSON has none."""
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, list):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Reading: what analyze.py computes with is checked here, once, so that later code meets no surprise

SCHEMAS = {1: 'every weight N(0, 0.02), router losses averaged over the layers',
           2: 'weights by fan-in, router losses summed over the layers'}
FIELDS = {field: kind for kind, fields in {         # final.* are needed in complete runs only
    'an object': 'config model data environment environment.source_sha256',
    'a list': 'history final.expert_load',
    'a line of text': 'name config.optimizer config.dtype model.attention_class data.dataset data.tokenizer '
                      'data.train_sha256 data.val_sha256 environment.device_name environment.torch',
    'a whole number': 'config.seed config.n_layer config.n_head config.n_embd config.d_ff config.n_expert config.top_k '
                      'config.block_size config.batch_size config.max_steps data.vocab_size data.train_tokens '
                      'data.val_tokens environment.world_size',
    'a number': 'config.learning_rate model.params_total model.params_active model.kv_cache_bytes_per_token_16bit '
                'data.uniform_loss data.unigram_loss final.val_loss final.val_accuracy',
    'a number or null': 'environment.threads final.val_perplexity final.val_bits_per_byte final.peak_memory_gb '
                        'final.max_violation final.router_entropy final.balance_loss final.z_loss',
}.items() for field in fields.split()}


def check(file, value, field, kind, within=''):
    """The dotted field of an object; fails, naming file and field, if it is not there or not of that kind."""
    for part in field.split('.'):
        if not isinstance(value, dict) or part not in value:
            fail(f'{file}: lacks the field {within}{field}')
        value = value[part]
    number = type(value) in (int, float) and abs(value) < 1e150         # false for NaN
    if not {'an object': isinstance(value, dict), 'a list': isinstance(value, list),
            'a line of text': isinstance(value, str) and value.isprintable() and value.strip(),
            'a whole number': number and type(value) is int and value >= 0,
            'a number': number, 'a number or null': number or value is None}[kind]:
        fail(f'{file}: {within}{field} is {"null" if value is None else ascii(value)[:60]}, expected {kind}')
    return value


def read_run(file):
    """One result file -> its object plus `file` and `seed`. Fails, naming file and field, if unsound."""
    def not_a_number(text):
        raise ValueError(f'{text} is not JSON, train.py writes null')
    try:
        with open(file, encoding='utf-8') as f:
            run = json.loads(f.read(), parse_constant=not_a_number)
    except OSError as error:
        fail(f'{file}: cannot be read ({error.strerror})')
    except (ValueError, RecursionError) as error:
        fail(f'{file}: not valid JSON, perhaps truncated ({error})')
    if (schema := check(file, run, 'schema', 'a whole number')) not in SCHEMAS:
        fail(f'{file}: schema is {schema}, this program reads {" and ".join(map(str, SCHEMAS))}')
    status = check(file, run, 'status', 'a line of text')
    if status not in STATUSES:
        fail(f'{file}: status is {status[:60]}, expected {", ".join(STATUSES[:-1])} or {STATUSES[-1]}')
    for field, kind in FIELDS.items():
        if status == 'complete' or not field.startswith('final.'):
            check(file, run, field, kind)
    for i, row in enumerate(run['history']):
        for field, kind in [('step', 'a whole number'), ('val_loss', 'a number or null'),
                            ('train_loss', 'a number or null')]:
            check(file, row, field, kind, f'history[{i}].')
    if status == 'complete':
        perplexity, loss, load = (run['final'][key] for key in ('val_perplexity', 'val_loss', 'expert_load'))
        if perplexity is not None and abs(math.log(max(perplexity, 1e-300)) - loss) > 0.01:
            fail(f'{file}: final.val_perplexity {perplexity:g} is not exp(final.val_loss) = exp({loss:g})')
        if not all(isinstance(layer, list) and len(layer) == len(load[0]) and all(
                type(x) in (int, float) and 0 <= x <= 1 for x in layer) and sum(layer) > 0 for layer in load):
            fail(f'{file}: final.expert_load is not a list of layers with the share of each expert')
    return {**run, 'file': file, 'seed': run['config']['seed']}


def load(path, baseline=None):
    """Every run at or below the path -> {arm: {seed: run}}: baseline first, then from the largest cache down."""
    if not os.path.exists(path):
        fail(f'{path}: no such folder or file; train.py makes runs, reproduce.sh all of them')
    files = [path] if os.path.isfile(path) else sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
        if name == 'result.json' or re.search(r'-s\d+\.json$', name))
    arms, first = {}, {}
    for file in files or fail(f'{path}: no result files below it (result.json or <name>-s<seed>.json)'):
        run = read_run(file)
        if (twin := arms.setdefault(run['name'], {}).setdefault(run['seed'], run)) is not run:
            fail(f'{twin["file"]} and {file} are both {run["name"]} seed {run["seed"]}; if these are two'
                 ' experiments, name the folder of one')
        first.setdefault(run['schema'], file)
    if len(first) > 1:
        fail('not comparable, keep them in two folders: ' + ', '.join(
            f'{file} is of schema {schema} ({SCHEMAS[schema]})' for schema, file in sorted(first.items())))
    if baseline is not None and baseline not in arms:
        fail(f'{path}: no runs named {ascii(baseline)}, the baseline; there are {", ".join(sorted(arms)[:20])};'
             ' --baseline=... takes one of them')

    def order(name):
        model = next(iter(arms[name].values()))['model']
        return (name != baseline, -model['kv_cache_bytes_per_token_16bit'], model['params_total'], name)
    return {name: dict(sorted(arms[name].items())) for name in sorted(arms, key=order)}


# ---------------------------------------------------------------------------------------------------------------------
# Comparability: runs may differ in the variant's knobs and the seed, in nothing else

def run_knobs():
    """A stand-in for configurator.run_knobs(), see there: ({name: Knob} of the network, {name: Knob} of train.py)."""
    block = read_block(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'))[0]
    model = {name for name, knob in block.items() if knob.section.startswith(('What', 'Ingredients', 'Rotary'))}
    return {k: block[k] for k in model}, {k: v for k, v in block.items() if k not in model}


NETWORK, REST = run_knobs()
DEFAULTS = {name: knob.default for name, knob in {**NETWORK, **REST}.items()}
VARIANT = {'attn'} | {name for name, knob in NETWORK.items() if knob.default is None}   # what is being compared
DATA = {name for name, knob in REST.items() if knob.section.startswith('Data')}         # `data` says what came of these
BOOKKEEPING = CONTINUATION | DATA | {'name', 'seed', 'experiment', 'log_interval',
                                     'checkpoint_interval'}     # may differ between runs: no influence on numbers
TOKENS = ('train_sha256', 'val_sha256', 'train_tokens', 'val_tokens', 'vocab_size')     # of data: not names, not paths


def complete(arm):
    return {seed: run for seed, run in arm.items() if run['status'] == 'complete'}


def spans(seeds):
    """[0, 1, 2, 5] -> '0-2, 5'."""
    parts = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in parts) or 'none'


def who(runs):
    """Some runs -> 'baseline seeds 0-7; lora seed 3'."""
    seeds = {}
    for run in runs:
        seeds.setdefault(run['name'], []).append(run['seed'])
    return '; '.join(f'{name} seed{"s" * (len(s) > 1)} {spans(s)}' for name, s in seeds.items())


def value_of(run, part, key):
    """run[part][key] as JSON; of a knob that is younger than the run, its default; None where that tells nothing."""
    if key in run[part]:
        return json.dumps(run[part][key], sort_keys=True)
    if part != 'config' or key in VARIANT:          # a fact that was not recorded, a knob that its row fills in
        return None
    return json.dumps(DEFAULTS[key]) if key in DEFAULTS else 'absent'


def differing(runs, part, key):
    """'' if all runs have the same run[part][key], else 'value (runs) against value (runs)'."""
    groups = {}
    for run in runs:
        if (value := value_of(run, part, key)) is not None:
            groups.setdefault(value, []).append(run)
    named = [f'{value[:80]} ({who(group)})' for value, group in groups.items()]
    return ' against '.join(named) if len(named) > 1 else ''


def disagreements(arms, baseline, may_differ=(), metric='val_loss'):
    """What keeps the runs from being comparable, as texts naming field, values and runs. Empty: comparable.

    Over all runs: the tokens, device, torch, every knob but the variant's and bookkeeping; over complete runs: the
    budget they used. Within an arm (and its A/A twin): the model, the variant's knobs and what may_differ names.
    Bits per byte compare tokenizers: there the text has to be one over all runs, the tokens within an arm.
    """
    runs = [run for arm in arms.values() for run in arm.values()]
    keys = {part: sorted({key for run in runs for key in run[part]}) for part in ('config', 'model')}
    by_text = metric == 'val_bits_per_byte' and all(run['data'].get('val_text_sha256') for run in runs)
    networks, own, may_differ = {}, {*VARIANT, *may_differ}, set(may_differ)
    for run in runs:
        networks.setdefault(baseline if run['name'] == f'{baseline}-again' else run['name'], []).append(run)
    finished = [run for run in runs if run['status'] == 'complete']
    budget = {'updates': {'max_steps'}, 'tokens': {'max_steps', 'batch_size', 'block_size'}}
    checks = [(runs, 'config', key) for key in keys['config'] if key not in own | BOOKKEEPING]
    checks += [(runs, 'data', key) for key in (('val_text_sha256',) if by_text else TOKENS) if key not in may_differ]
    checks += [(runs, 'environment', key) for key in ('device_name', 'torch') if key not in may_differ]
    checks += [(finished, 'final', key) for key, knobs in budget.items() if not knobs & may_differ]
    for same in networks.values():
        checks += [(same, 'config', key) for key in keys['config'] if key in own]
        checks += [(same, 'model', key) for key in keys['model']] + [(same, 'data', key) for key in TOKENS if by_text]
    return [f'{part}.{ascii(key)[1:-1]}: {text}' for some, part, key in checks if (text := differing(some, part, key))]
