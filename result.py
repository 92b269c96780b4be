"""What a result file is, and which of them may be compared. train.py writes them, analyze.py reads them; no torch here.

    run = read_run('out/laptop/lora-s0/result.json')    # all fields there and sound, or one line and the end
    arms = load('out/laptop', 'baseline')               # {arm: {seed: run}}: an arm is the runs of one name
    for line in disagreements(arms, 'baseline'): ...    # what they differ in beyond variant and seed

The README describes the fields ("Read a result"). A knob that your own variant adds goes into VARIANT.
"""

import json
import math
import os
import re

from configurator import fail

SCHEMA = 2      # of result.json and checkpoint.pt. 1: every weight N(0, 0.02), router losses averaged over the layers
STATUSES = ('running', 'complete', 'interrupted', 'diverged')
NAME_LENGTH = 60                                        # of a run's name, at most: what fits a table
ORDER = ['gqa', 'mqa', 'lora', 'enhanced', 'mla']       # of arms, after the baseline; then the alphabet
VARIANT = {'attn', 'n_kv_head', 'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim',
           'v_head_dim', 'attention_bias', 'qk_norm'}  # what is being compared; so is every rope_* except rope_theta
CONTINUATION = {'resume', 'overwrite', 'out_dir', 'data_root'}      # may differ between a run and its continuation
BOOKKEEPING = CONTINUATION | {'name', 'seed', 'experiment', 'log_interval',
                              'checkpoint_interval'}                # may differ between runs: no influence on numbers


def json_ready(value):
    """NaN and infinities become null, as JSON has none."""
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, list):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Reading: every field that analyze.py uses is checked here, once, so that later code meets no surprise

KINDS = {
    'object': ('an object', lambda v: isinstance(v, dict)),
    'list': ('a list', lambda v: isinstance(v, list)),
    'text': ('a line of text', lambda v: isinstance(v, str) and v.strip() and v.isprintable()),
    'bool': ('true or false', lambda v: isinstance(v, bool)),
    'count': ('a whole number, not negative', lambda v: type(v) is int and 0 <= v < 2**63),
    'number': ('a finite number', lambda v: type(v) in (int, float) and abs(v) < 1e150),     # false for NaN
    'size': ('a finite number, not negative', lambda v: type(v) in (int, float) and 0 <= v < 1e150),
    'share': ('a number from 0 to 1', lambda v: type(v) in (int, float) and 0 <= v <= 1),
}
FIELDS = {field: kind for kind, *fields in map(str.split, '''
object  config model data environment environment.source_sha256
list    history final.expert_load
text    name status config.attn config.optimizer config.device config.dtype model.attention_class data.dataset
text    data.tokenizer data.train_sha256 data.val_sha256
text    environment.device_name environment.torch environment.python environment.platform
text?   environment.git_commit final.peak_memory_kind
bool?   environment.git_dirty
count   config.seed config.n_layer config.n_head config.n_embd config.d_ff config.n_expert config.top_k config.block_size
count   config.batch_size config.max_steps environment.world_size
count   data.vocab_size data.train_tokens data.val_tokens
count   model.params_total model.params_active model.params_attention model.params_embedding
count   final.step final.updates final.tokens
count?  data.val_bytes environment.threads
size    config.learning_rate data.uniform_loss data.unigram_loss model.flops_per_token
size    model.kv_cache_bytes_per_token model.kv_cache_bytes_per_token_16bit
size    final.val_loss final.seconds_training final.seconds_total final.step_ms_median final.tokens_per_second
size?   final.val_perplexity final.val_bits_per_byte final.mfu final.peak_memory_gb
share   final.val_accuracy
number? final.max_violation final.router_entropy final.balance_loss final.z_loss
'''.strip().splitlines()) for field in fields}     # ? = may be null; final.* are needed in complete runs only
FINAL = [field[6:] for field, kind in FIELDS.items() if field.startswith('final.')       # its plain numbers
         and kind.rstrip('?') not in ('text', 'list')]


def check(file, field, value, kind):
    """Fails, naming file and field, unless the value is of that kind."""
    needed, fits = KINDS[kind.rstrip('?')]
    if not (value is None and kind.endswith('?')) and not fits(value):
        fail(f'{file}: {field} is {"null" if value is None else ascii(value)[:60]}, expected {needed}')


def lookup(file, run, field):
    """The value of a dotted field; fails if the file lacks it."""
    for part in field.split('.'):
        if not isinstance(run, dict) or part not in run:
            fail(f'{file}: lacks the field {field}')
        run = run[part]
    return run


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
    schema = lookup(file, run, 'schema')
    if type(schema) is not int or schema != SCHEMA:
        fail(f'{file}: schema is {ascii(schema)[:60]}, this program reads {SCHEMA}')
    status, final = lookup(file, run, 'status'), lookup(file, run, 'final')
    if status not in STATUSES:
        fail(f'{file}: status is {ascii(status)[:60]}, expected {", ".join(STATUSES[:-1])} or {STATUSES[-1]}')
    if status == 'complete' or final is not None:
        check(file, 'final', final, 'object')
    for field, kind in FIELDS.items():
        if status == 'complete' or not field.startswith('final.'):
            check(file, field, lookup(file, run, field), kind)
    if len(run['name']) > NAME_LENGTH:
        fail(f'{file}: name is {len(run["name"])} characters long, at most {NAME_LENGTH} fit a table')
    for i, row in enumerate(run['history']):
        check(file, f'history[{i}]', row, 'object')
        for field, kind in [('step', 'count'), ('val_loss', 'size?')]:
            if field not in row:
                fail(f'{file}: lacks the field history[{i}].{field}')
            check(file, f'history[{i}].{field}', row[field], kind)
    if status == 'complete':
        perplexity, loss = final['val_perplexity'], final['val_loss']
        if perplexity is not None and abs(math.log(max(perplexity, 1e-300)) - loss) > 0.01:
            fail(f'{file}: final.val_perplexity {perplexity:g} is not exp(final.val_loss) = exp({loss:g})')
        if run['model']['params_active'] > run['model']['params_total']:
            fail(f'{file}: model.params_active is above model.params_total')
        for i, layer in enumerate(final['expert_load']):
            check(file, f'final.expert_load[{i}]', layer, 'list')
            for load in layer:
                check(file, f'final.expert_load[{i}]', load, 'share')
            if len(layer) != len(final['expert_load'][0]) or sum(layer) <= 0:
                fail(f'{file}: final.expert_load[{i}] has no load, or not the number of experts of layer 0')
    return {**run, 'file': file, 'seed': run['config']['seed']}


def load(path, baseline):
    """Every run at or below the path -> {arm: {seed: run}}: baseline first, then ORDER, then the alphabet."""
    if not os.path.exists(path):
        fail(f'{path}: no such folder or file; train.py makes runs, reproduce.sh all of them')
    files = [path] if os.path.isfile(path) else sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
        if name == 'result.json' or re.search(r'-s\d+\.json$', name))
    arms = {}
    for file in files or fail(f'{path}: no result files below it (result.json or <name>-s<seed>.json)'):
        run = read_run(file)
        twin = arms.setdefault(run['name'], {}).setdefault(run['seed'], run)
        if twin is not run:
            fail(f'{twin["file"]} and {file} are both {run["name"]} seed {run["seed"]}; if these are two'
                 ' experiments, name the folder of one')
    if baseline not in arms:
        names = ', '.join(sorted(arms)[:20])
        fail(f'{path}: no runs named {ascii(baseline)}, the baseline; there are {names};'
             ' --baseline=... takes one of them')
    rank = {name: i for i, name in enumerate([baseline] + ORDER)}
    return {name: dict(sorted(arms[name].items()))
            for name in sorted(arms, key=lambda name: (rank.get(name, len(rank)), name))}


# ---------------------------------------------------------------------------------------------------------------------
# Comparability: runs may differ in the variant's knobs and the seed, in nothing else

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


def differing(runs, section, key):
    """'' if all runs have the same run[section][key], else 'value (runs) against value (runs)'."""
    groups = {}
    for run in runs:
        value = json.dumps(run[section][key], sort_keys=True)[:80] if key in run[section] else 'absent'
        groups.setdefault(value, []).append(run)
    named = [f'{value} ({who(group)})' for value, group in groups.items()]
    return ' against '.join(named) if len(named) > 1 else ''


def disagreements(arms, baseline):
    """What keeps the runs from being comparable, as texts naming field, values and runs. Empty: comparable.

    Over all runs: data (by the tokens' sha256, not by the name, which depends on where the folder lies),
    device, torch, every knob but the variant's and bookkeeping; over complete runs: the budget they used.
    Within an arm (and its A/A twin): the model and the variant's knobs.
    """
    runs = [run for arm in arms.values() for run in arm.values()]
    keys = {part: sorted({key for run in runs for key in run[part]}) for part in ('config', 'data', 'model')}
    networks, variant, common = {}, [], []
    for key in set(keys['config']) - BOOKKEEPING:
        ingredient = key in VARIANT or key.startswith('rope_') and key != 'rope_theta'
        (variant if ingredient else common).append(key)
    for run in runs:
        networks.setdefault(baseline if run['name'] == f'{baseline}-again' else run['name'], []).append(run)
    checks = [(runs, 'config', key) for key in sorted(common)] + [
        (runs, 'data', key) for key in keys['data'] if key != 'dataset']
    checks += [(runs, 'environment', key) for key in ('device_name', 'torch')]
    finished = [run for run in runs if run['status'] == 'complete']
    checks += [(finished, 'final', key) for key in ('updates', 'tokens')]
    for same in networks.values():
        checks += [(same, 'config', key) for key in sorted(variant)]
        checks += [(same, 'model', key) for key in keys['model']]
    return [f'{part}.{ascii(key)[1:-1]}: {text}' for some, part, key in checks
            if (text := differing(some, part, key))]
