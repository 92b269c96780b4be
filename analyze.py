"""Result files -> table, paired statistics, one verdict per variant, figures. Reads nothing else; no torch.

    python analyze.py out/laptop                 report to stdout; report.md, report.json, *.png beside it
    python analyze.py out/laptop --margin=0.02   the smallest difference worth having, chosen BEFORE the runs

An arm is the runs of one `name`, a pair is two runs of one seed, and every claim is about paired differences
d_i = variant_i - baseline_i. The same result files give the same report.md, byte for byte.
"""

import json
import math
import os
import re
import sys
from bisect import bisect_left
from functools import lru_cache
from typing import Literal

import numpy as np

from configurator import configure, fail

SCHEMA = 1
ALPHA, POWER = 0.05, 0.80
EXACT_FLIPS, SAMPLED_FLIPS = 20, 100_000    # sign flips: to 20 pairs all 2^n patterns, beyond so many drawn
MOST_SEEDS = 10_000                         # a needed n above this is reported as "more than"
MOST_DRAWN = 12                             # arms in a figure; the tables hold all of them
ORDER = ['gqa', 'mqa', 'lora', 'enhanced', 'mla']       # after the baseline; then the alphabet
METRICS = {'val_loss': ('validation loss', 'nats', 'lower'),        # final.<metric>: name, unit, better is
           'val_bits_per_byte': ('validation bits per byte', 'bits/byte', 'lower'),
           'val_accuracy': ('validation accuracy', 'as a fraction', 'higher')}
PARETO = {'params_total': 'parameters', 'params_active': 'active parameters',
          'kv_cache_bytes_per_token_16bit': 'cache', 'step_ms_median': 'time per update'}
VARIANT = {'attn', 'n_kv_head', 'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim',
           'v_head_dim', 'attention_bias'}  # what is being compared; so is every rope_* except rope_theta
BOOKKEEPING = {'name', 'seed', 'out_dir', 'data_root', 'experiment', 'resume', 'overwrite', 'log_interval',
               'checkpoint_interval', 'checkpoint'}                 # without influence on the numbers

# ---- reading: every field that is used below is checked here, once, so that later code meets no surprise

KINDS = {
    'object': ('an object', lambda v: isinstance(v, dict)),
    'list': ('a list', lambda v: isinstance(v, list)),
    'text': ('a line of text', lambda v: isinstance(v, str) and v.strip() and v.isprintable()),
    'bool': ('true or false', lambda v: isinstance(v, bool)),
    'int': ('a whole number', lambda v: type(v) is int and abs(v) < 2**63),
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
int     config.seed
count   config.n_layer config.n_head config.n_embd config.d_ff config.n_expert config.top_k config.block_size
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
        fail(f'{file}: {field} is {"null" if value is None else ascii(value)[:60]}, needed is {needed}')


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
        fail(f'{file}: schema is {ascii(schema)[:60]}, this analyze.py reads schema {SCHEMA}')
    status, final = lookup(file, run, 'status'), lookup(file, run, 'final')
    if status not in ('running', 'complete', 'interrupted', 'diverged'):
        fail(f'{file}: status is {ascii(status)[:60]}, needed is running, complete, interrupted or diverged')
    if status == 'complete' or final is not None:
        check(file, 'final', final, 'object')
    for field, kind in FIELDS.items():
        if status == 'complete' or not field.startswith('final.'):
            check(file, field, lookup(file, run, field), kind)
    if len(run['name']) > 60:
        fail(f'{file}: name is {len(run["name"])} characters long, at most 60 fit a table')
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


# ---- comparability: runs may differ in the variant's knobs and the seed, in nothing else

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

    Over all runs: data (the tokens' sha256 among it), device, torch, every knob but the variant's and
    bookkeeping; over complete runs: the budget they used. Within an arm (and its A/A twin): the model and
    the variant's knobs.
    """
    runs = [run for arm in arms.values() for run in arm.values()]
    keys = {part: sorted({key for run in runs for key in run[part]}) for part in ('config', 'data', 'model')}
    networks, variant, common = {}, [], []
    for key in set(keys['config']) - BOOKKEEPING:
        ingredient = key in VARIANT or key.startswith('rope_') and key != 'rope_theta'
        (variant if ingredient else common).append(key)
    for run in runs:
        networks.setdefault(baseline if run['name'] == f'{baseline}-again' else run['name'], []).append(run)
    checks = [(runs, 'config', key) for key in sorted(common)] + [(runs, 'data', key) for key in keys['data']]
    checks += [(runs, 'environment', key) for key in ('device_name', 'torch')]
    finished = [run for run in runs if run['status'] == 'complete']
    checks += [(finished, 'final', key) for key in ('updates', 'tokens')]
    for same in networks.values():
        checks += [(same, 'config', key) for key in sorted(variant)]
        checks += [(same, 'model', key) for key in keys['model']]
    return [f'{part}.{ascii(key)[1:-1]}: {text}' for some, part, key in checks
            if (text := differing(some, part, key))]


# ---- statistics

def root(f, low, high, rounds=60):
    """Where the increasing f changes sign between low and high, by bisection."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def t_tail(t, df):
    """P(T > t) of Student's t, whole df, to 1e-15: Abramowitz & Stegun 26.7.3 (odd df), 26.7.4 (even)."""
    theta, odd = math.atan(abs(t) / math.sqrt(df)), df % 2
    sin, cos = math.sin(theta), math.cos(theta)
    term = cos if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    area = 2 / math.pi * (theta + sin * total) if odd else sin * total      # P(-|t| < T < |t|)
    return (1 - math.copysign(min(1.0, area), t)) / 2


@lru_cache(maxsize=None)
def t_quantile(p, df):
    """The t with P(T <= t) = p, for 0.5 <= p < 1; bisection over the angle of A&S 26.7."""
    t = lambda angle: math.sqrt(df) * math.tan(angle)       # noqa: E731
    return t(root(lambda angle: 1 - p - t_tail(t(angle), df), 0, math.pi / 2 * (1 - 1e-15)))


NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def noncentral_t_cdf(t, df, ncp):
    """P((Z + ncp) / U <= t), Z normal, U^2 a chi-square over its df: the integral of Phi(t u - ncp) f(u) du.

    Gauss-Legendre with 64 nodes before, across and after the step of Phi at u = ncp / t.
    """
    if t < 0:
        return 1 - noncentral_t_cdf(-t, df, -ncp)
    low, high = max(0.0, 1 - 9 / math.sqrt(df)), 1 + 9 / math.sqrt(df)
    edges = np.clip([low, (ncp - 8) / max(t, 1e-9), (ncp + 8) / max(t, 1e-9), high], low, high)
    total, log_scale = 0.0, math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    for a, b in zip(edges[:-1], edges[1:]):
        if b > a:
            u = (a + b) / 2 + (b - a) / 2 * NODES
            f = np.exp(log_scale + (df - 1) * np.log(u) - df * u * u / 2)
            phi = np.array([math.erfc((ncp - t * x) / math.sqrt(2)) / 2 for x in u])
            total += float((b - a) / 2 * np.sum(WEIGHTS * f * phi))
    return total


def ncp_interval(t, df, level=0.95):
    """The noncentralities that an observed t does not reject (Steiger & Fouladi 1997); / sqrt(n): d_z's."""
    reach = 20 * math.sqrt(1 + t * t / (2 * df))
    return [root(lambda ncp: p - noncentral_t_cdf(t, df, ncp), t - reach, t + reach, 50)
            for p in ((1 + level) / 2, (1 - level) / 2)]


@lru_cache(maxsize=None)
def power(effect, n, alpha=ALPHA):
    """Power of the two-sided paired t test with n pairs; effect: true mean difference over the sd of d."""
    t, ncp = t_quantile(1 - alpha / 2, n - 1), abs(effect) * math.sqrt(n)
    return 1 - noncentral_t_cdf(t, n - 1, ncp) + noncentral_t_cdf(-t, n - 1, ncp)


@lru_cache(maxsize=None)
def detectable(n, alpha=ALPHA):
    """The true difference, in standard deviations of d, that n pairs find with the wanted power."""
    high = 2 * t_quantile(1 - alpha / 2, n - 1) + 6
    return root(lambda effect: power(effect, n, alpha) - POWER, 0, high, 40)


def needed_n(effect, alpha=ALPHA):
    """The fewest pairs (2 or more) that find it with the wanted power; None if more than MOST_SEEDS."""
    n = 2 + bisect_left(range(2, MOST_SEEDS + 1), POWER, key=lambda n: power(effect, n, alpha))
    return n if n <= MOST_SEEDS else None


def holm(ps):
    """Holm's (1979) step-down adjusted p values, in the order given; None stays None and does not count."""
    ranked = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted, worst = list(ps), 0.0
    for rank, (p, i) in enumerate(ranked):
        worst = max(worst, min(1.0, p * (len(ranked) - rank)))
        adjusted[i] = worst
    return adjusted


def sign_flip(d):
    """Two-sided p of the sign-flip permutation test on the mean (Fisher 1935), and whether it is exact.

    The share of the 2^n sign patterns whose |sum| is at least the observed one, so never below 2 / 2^n. Past
    EXACT_FLIPS pairs: patterns drawn from a fixed seed, (1 + hits) / (1 + drawn) as in Phipson & Smyth 2010.
    """
    d = np.asarray(d, dtype=float)
    enough = abs(d.sum()) - 1e-9 * np.abs(d).sum()          # ties count: the slack is for rounding
    if len(d) <= EXACT_FLIPS:
        sums = d[:1]                                        # the other half of the patterns mirrors this one
        for value in d[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= enough)), True
    generator, hits, words = np.random.PCG64(0), 0, -(-len(d) // 64)
    for _ in range(SAMPLED_FLIPS // 1000):                  # random_raw: the same bits with every numpy
        bits = generator.random_raw(1000 * words).astype('<u8').reshape(1000, words).view(np.uint8)
        flipped = np.unpackbits(bits, axis=1)[:, :len(d)] @ d
        hits += int(np.sum(np.abs(d.sum() - 2 * flipped) >= enough))
    return (1 + hits) / (1 + SAMPLED_FLIPS), False


def tost(mean, se, df, margin):
    """p of two one-sided t tests (Schuirmann 1987) of |true difference| >= margin; small: within it."""
    return max(t_tail((mean + margin) / se, df), t_tail((margin - mean) / se, df))


def hedges(df):
    """Hedges' (1981) exact factor against the small-sample bias of a standardised mean, or None."""
    return math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2) if df > 1 else None


def summary(values):
    """n, mean, sd (over n - 1) and the 95% t interval of the mean; None for what this n cannot give."""
    n, s = len(values), dict.fromkeys(['mean', 'sd', 'low', 'high'])
    if n:
        s['mean'] = math.fsum(values) / n
    if n > 1:
        s['sd'] = math.sqrt(math.fsum((v - s['mean']) ** 2 for v in values) / (n - 1))
        if s['sd'] <= 1e-12 * max(map(abs, values)):        # equal but for rounding: an sd of 0, not of 1e-17
            s['sd'] = 0.0
        half = t_quantile(1 - ALPHA / 2, n - 1) * s['sd'] / math.sqrt(n)
        s['low'], s['high'] = s['mean'] - half, s['mean'] + half
    return {'n': n, **s}


def paired(variant, base, margin, alpha=ALPHA):
    """Two lists in the order of their seeds -> all that is said about d_i = variant_i - base_i, as a dict.

    margin in the unit of the values; alpha for the power figures. n = 1: the difference itself, nothing else.
    All d_i one number: no spread, no t statistic; `constant` is True and what would need a spread stays None.
    """
    scale = max(map(abs, [*variant, *base]), default=0.0)
    d = [0.0 if abs(v - b) <= 1e-12 * scale else v - b for v, b in zip(variant, base)]
    n, base_mean = len(d), summary(base)['mean']
    c = {'d': d, **summary(d), 'constant': False, 'sign_flip_exact': None,
         'floor': 2 / 2 ** n if n > 1 else None,
         'percent': 100 * math.fsum(d) / n / base_mean if base_mean else None, **dict.fromkeys(
             ['t', 'p', 'sign_flip', 'tost', 'd_z', 'g_z', 'd_z_low', 'd_z_high', 'd_pooled', 'g_pooled',
              'd_pooled_low', 'd_pooled_high', 'correlation', 'detectable', 'needed_n'])}
    if n < 2:
        return c
    c['sign_flip'], c['sign_flip_exact'] = sign_flip(d)
    if c['sd'] <= 1e-11 * scale:
        return {**c, 'constant': True, 'sd': 0.0, 'low': None, 'high': None}
    se, df = c['sd'] / math.sqrt(n), n - 1
    c['t'], c['d_z'] = c['mean'] / se, c['mean'] / c['sd']
    c['p'], c['tost'] = 2 * t_tail(abs(c['t']), df), tost(c['mean'], se, df, margin)
    c['detectable'], c['needed_n'] = c['sd'] * detectable(n, alpha), needed_n(margin / c['sd'], alpha)
    c['d_z_low'], c['d_z_high'] = (ncp / math.sqrt(n) for ncp in ncp_interval(c['t'], df))
    c['g_z'] = hedges(df) and hedges(df) * c['d_z']
    sd_v, sd_b = summary(variant)['sd'], summary(base)['sd']
    ratio = c['sd'] / math.sqrt((sd_v ** 2 + sd_b ** 2) / 2)        # d_z -> d: Algina & Keselman 2003
    for key in ('', '_low', '_high'):
        c[f'd_pooled{key}'] = c[f'd_z{key}'] * ratio
    r = (sd_v ** 2 + sd_b ** 2 - c['sd'] ** 2) / (2 * sd_v * sd_b) if sd_v and sd_b else 0.0
    c['correlation'] = max(-1.0, min(1.0, r))
    # sds of correlated groups carry fewer degrees of freedom than 2(n-1): Cousineau 2020, TQMP 16(4)
    factor = hedges(2 * df / (1 + c['correlation'] ** 2))
    c['g_pooled'] = factor and factor * c['d_pooled']
    return c


# ---- comparison

def complete(arm):
    return {seed: run for seed, run in arm.items() if run['status'] == 'complete'}


def compare(arms, baseline, metric, margin):
    """{arm: {seed: run}} -> every number and verdict of the report, as one dict that JSON can hold."""
    finals = {name: complete(arm) for name, arm in arms.items()}
    values = {name: {seed: run['final'][metric] for seed, run in runs.items()}
              for name, runs in finals.items()}
    for name, seed in [(name, seed) for name in values for seed, x in values[name].items() if x is None]:
        fail(f'{arms[name][seed]["file"]}: final.{metric} is null; --metric=val_loss does without it')
    again, every_seed = f'{baseline}-again', {seed for arm in arms.values() for seed in arm}
    shared = {name: sorted(set(values[name]) & set(values[baseline])) for name in arms if name != baseline}
    family = [name for name in shared if name != again and len(shared[name]) > 1]   # A/A is no hypothesis
    r = {'schema': 1, 'baseline': baseline, 'again': again, 'metric': metric, 'margin': margin,
         'family': family}
    r['label'], r['unit'], r['better'] = METRICS[metric]
    r['arms'] = {name: {
        'seeds': list(runs), 'values': list(values[name].values()),
        'missing': sorted(every_seed - set(arms[name])),
        'not_complete': [{'seed': seed, 'status': run['status'], 'error': run.get('error')}
                         for seed, run in arms[name].items() if seed not in runs],
        'attention_class': sorted({run['model']['attention_class'] for run in arms[name].values()}),
        **{key: sorted({run['model'][key] for run in arms[name].values()}) for key in (
            'params_total', 'params_active', 'params_attention', 'kv_cache_bytes_per_token_16bit')},
        **{key: summary([run['final'][key] for run in runs.values() if run['final'][key] is not None])
           for key in FINAL},
        'load_by_rank': load_by_rank(runs.values())} for name, runs in finals.items()}
    cs = r['comparisons'] = {name: {
        'seeds': seeds, 'only_variant': sorted(set(values[name]) - set(seeds)),
        'only_baseline': sorted(set(values[baseline]) - set(seeds)),
        **paired([values[name][s] for s in seeds], [values[baseline][s] for s in seeds], margin,
                 ALPHA / max(1, len(family) if name in family else 1))} for name, seeds in shared.items()}
    for key in ('p', 'sign_flip', 'tost'):
        adjusted = dict(zip(family, holm([cs[name][key] for name in family])))
        for name, c in cs.items():
            c[f'{key}_holm'] = adjusted.get(name, c[key])
    for name, c in cs.items():
        c['verdict'], c['sentence'] = verdict(name, c, r)
    r['pareto'] = {cost: pareto(r, cost) for cost in PARETO}
    return r


def load_by_rank(runs):
    """Mean over runs of load relative to even, experts of a layer from busiest on: (layers x experts), or [].

    Sorted before averaging: expert 3 of one seed has nothing to do with expert 3 of another.
    """
    loads = [np.array(run['final']['expert_load'], dtype=float) for run in runs]
    loads = [load for load in loads if load.size and load.shape == loads[0].shape]
    ranked = [-np.sort(-load / load.sum(1, keepdims=True), axis=1) * load.shape[1] for load in loads]
    return np.mean(ranked, axis=0).tolist() if ranked else []


def pareto(r, cost):
    """Arms that no other beats on the metric AND the cost (as good in both, better in one), by means."""
    sign = 1 if r['better'] == 'lower' else -1
    points = {name: (sign * arm[r['metric']]['mean'],
                     arm[cost]['mean'] if isinstance(arm[cost], dict) else arm[cost][-1])
              for name, arm in r['arms'].items() if arm['values'] and name != r['again']}
    return [name for name, (loss, price) in points.items()
            if not any(x <= loss and y <= price and (x, y) != (loss, price) for x, y in points.values())]


def verdict(name, c, r):
    """(verdict, one sentence), by the first of these that holds, so that each comparison gets exactly one:

    not tested    no pair, or one
    equivalent    TOST puts the true difference within the margin (Holm p < 0.05), or every d_i is exactly 0.
                  First: the margin is the smallest difference worth having, so one inside it is not, even
                  when it is measurably not zero, and the sentence then says so
    better/worse  the paired t test rejects zero (Holm p < 0.05)
    undecided     neither; with the n that would find, at 80% power, a difference of the margin or, with
                  that many pairs already, one of the size observed
    """
    n, unit, margin, base = c['n'], r['unit'], r['margin'], r['baseline']
    if n < 2:
        return 'not tested', f'{name}: not tested (n = {n}{"" if n else ", no complete pair with " + base}).'
    if c['constant'] and c['mean'] == 0:
        return 'equivalent', f'{name}: equivalent to {base}: all {n} paired differences are exactly 0.'
    if c['constant']:
        return 'undecided', (f'{name}: undecided: all {n} paired differences are {num(c["mean"], 4, True)} '
                             f'{unit}, '
                             'so there is no spread to test them against.')
    how, size = 'lower' if c['mean'] < 0 else 'higher', num(abs(c['mean']))
    interval = f'95% interval {interval_text(c["low"], c["high"])}, n = {n} pairs'
    measurable = f'Holm p {p_text(c["p_holm"])}' if c['p_holm'] < ALPHA else ''
    if c['tost_holm'] < ALPHA:
        also = f', though measurably {how} ({measurable})' if measurable else ''
        return 'equivalent', (f'{name}: equivalent to {base}: within {margin:g} {unit} (TOST with Holm, p '
                              f'{p_text(c["tost_holm"])}; {interval}){also}.')
    if measurable:
        word = 'better' if how == r['better'] else 'worse'
        near = min(abs(c['low']), abs(c['high'])) < margin
        worth = ('reaches inside the margin: perhaps too little to matter' if near
                 else 'lies wholly beyond the margin')
        return word, (f'{name}: {word} than {base}: {r["label"]} {size} {unit} {how} ({interval}; '
                      f'{measurable}); '
                      f'the interval {worth}.')
    target, what = c['needed_n'], f'{margin:g} {unit}'
    if target is not None and target <= n:
        target = needed_n(c['d_z'], ALPHA / max(1, len(r['family']) if name in r['family'] else 1))
        what = f'one as small as observed, {size} {unit},'
    about = f'about n = {target}' if target else f'more than n = {MOST_SEEDS}'
    return 'undecided', (f'{name}: undecided against {base}: neither zero nor a difference of {margin:g} '
                         f'{unit} is ruled out ({interval}); {about} would be needed to find {what} with '
                         f'{POWER:.0%} power.')


# ---- report: fixed formats, a fixed order, nothing of the clock or of where the files lie

def num(x, digits=4, sign=False):
    """Fixed decimals, '-' for None. To four digits and more, what is not zero does not read as zero."""
    if x is None:
        return '-'
    if abs(x) >= 1e9 or x and digits >= 4 and round(abs(x), digits) == 0:
        return f'{x:+.1e}' if sign else f'{x:.1e}'
    return f'{x or 0.0:{"+" if sign and x else ""}.{digits}f}'


def p_text(p):
    return '-' if p is None else '< 0.0001' if p < 0.0001 else f'{p:.4f}'


def interval_text(low, high, digits=4):
    return '-' if low is None else f'{num(low, digits, True)} to {num(high, digits, True)}'


def mean_sd(s, digits, factor=1.0):
    return '-' if not s['n'] else num(s['mean'] * factor, digits) + (
        f' ± {num(s["sd"] * factor, digits)}' if s['n'] > 1 else '')


def shared(values, digits, factor=1.0):
    """A figure that all runs of an arm share; both ends where (with --force) they do not."""
    return ' to '.join(dict.fromkeys(num(value * factor, digits) for value in (values[0], values[-1])))


def table(head, rows):
    """Markdown, first column to the left, numbers to the right. head: titles with | between them."""
    head = head.split(' | ')
    lines = [head, ['---'] + ['--:'] * (len(head) - 1), *rows]
    cells = [[str(cell).replace('|', '\\|') for cell in line] for line in lines]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in cells)


def text_forest(r, width=57):
    """The forest plot in characters."""
    drawn = {name: c for name, c in r['comparisons'].items() if c['n']}
    points = [x for c in drawn.values() for x in (c['mean'], c['low'], c['high']) if x is not None]
    low, high = min(points + [-r['margin']]), max(points + [r['margin']])
    column = lambda x: round((x - low) / (high - low) * (width - 1))        # noqa: E731
    pad, lines = max(map(len, drawn), default=0), []
    for name, c in drawn.items():
        cells = [' '] * width
        if c['low'] is not None:
            cells[column(c['low']):column(c['high']) + 1] = '-' * (column(c['high']) - column(c['low']) + 1)
        for x, mark in [(-r['margin'], ':'), (r['margin'], ':'), (0, '|'), (c['mean'], 'o')]:
            cells[column(x)] = mark
        lines.append(f'{name.ljust(pad)}  {"".join(cells)}  {num(c["mean"], 4, True)}  n = {c["n"]}')
    left, right = num(low, 4, True), num(high, 4, True)
    return lines + [' ' * (pad + 2) + left + right.rjust(width - len(left)) + f'  {r["unit"]}',
                    f'o mean   --- 95% interval   | zero   : margin, {r["margin"]:g} to each side']


def noise_floor(r):
    """What the baseline does against itself: no difference below this is evidence of anything."""
    base, c = r['arms'][r['baseline']], r['comparisons'].get(r['again'], {'n': 0})
    s = base[r['metric']]
    lines = [f'{r["baseline"]} has {s["n"]} complete run(s): its spread over seeds is unknown.'
             if s['n'] < 2 else
             f'{r["baseline"]} over {s["n"]} seeds: sd {num(s["sd"])} {r["unit"]}, from '
             f'{num(min(base["values"]))} to {num(max(base["values"]))}. Two unpaired runs that differ in '
             f'the seed alone differ with an sd of '
             f'{num(math.sqrt(2) * s["sd"])} (sqrt 2 times as much).']
    lines += [f'{name}: paired differences have an sd of {num(x["sd"])} (correlation of the pairs '
              f'{x["correlation"]:+.2f}).' for name, x in r['comparisons'].items()
              if x['correlation'] is not None]
    if not c['n']:
        return lines + [f'No A/A pairs ({r["again"]}, the same seeds a second time) among these runs.']
    same = 'This is from the machine alone.' if any(c['d']) else 'The same seed gives the same number.'
    return lines + [f'A/A check: {r["again"]} repeats {c["n"]} seed(s), largest difference '
                    f'{num(max(map(abs, c["d"])))} {r["unit"]}. {same} It is no hypothesis and not in Holm.']


def left_out(r):
    """Runs that did not finish, seeds without a file, seeds without a partner."""
    lines, base = [], r['baseline']
    for name, arm in r['arms'].items():
        lines += [f'{name} seed {run["seed"]}: {run["status"]}'
                  + (f' ({str(run["error"])[:160]})' if run['error'] else '')
                  + '; not in the table, not in a pair.' for run in arm['not_complete']]
        if arm['missing']:
            lines.append(f'{name}: no run for seed(s) {spans(arm["missing"])}, which others have.')
    for name, c in r['comparisons'].items():
        for mine, other, seeds in [(name, base, c['only_variant']), (base, name, c['only_baseline'])]:
            lines += [f'{mine} seed(s) {spans(seeds)}: no complete {other} run of that seed; in the table, '
                      'left out of the pairs.'] * bool(seeds)
    return lines or ['None: every configuration has a complete run for every seed.']


def caveats(arms, r):
    """What the numbers themselves say against reading too much into them."""
    base, networks, lines = r['baseline'], {}, []
    runs = [run for arm in arms.values() for run in arm.values()]
    first, arm = runs[0], r['arms']
    for name, c in r['comparisons'].items():
        n, m = c['n'], len(r['family']) if name in r['family'] else 1
        if n == 1:
            lines.append(f'{name}: n = 1. One pair has no standard deviation: no interval, no test, no '
                         'effect size.')
        if n == 2:
            lines.append(f'{name}: n = 2. The spread is estimated from one degree of freedom: the interval '
                         'is 9.0 standard deviations wide on each side, the bias of d_z has no correction.')
        if n > 1 and c['floor'] * m >= ALPHA:
            lines.append(f'{name}: the sign-flip test cannot fall below {num(c["floor"])} with n = {n}'
                         + f', {num(min(1, c["floor"] * m))} after Holm over {m} comparisons' * (m > 1)
                         + f', so it cannot reach {ALPHA:g}.')
        if c['sign_flip_exact'] is False:
            lines.append(f'{name}: n = {n}, so the sign-flip p is from {SAMPLED_FLIPS} drawn patterns.')
        if name != r['again'] and c['constant'] and c['mean'] == 0:
            lines.append(f'{name}: equal to {base} to the last digit on every seed: was it the same network?')
        change, active = (100 * (arm[name][key][-1] / max(1, arm[base][key][-1]) - 1)
                          for key in ('params_total', 'params_active'))
        if max(abs(change), abs(active)) >= 1:
            lines.append(f'{name} has {change:+.1f}% parameters against {base} ({active:+.1f}% active): a '
                         'difference in loss is not due to the mechanism alone.')
    for name in arm:
        facts = [arm[name][key] for key in ('attention_class', 'params_total',
                                            'kv_cache_bytes_per_token_16bit')]
        networks.setdefault(str(facts), []).append(name) if name != r['again'] else None
    lines += [f'{", ".join(names)}: the same attention class, parameters and cache. Settings of one network, '
              'or one network.'
              for names in networks.values() if len(names) > 1]
    lines += [f'{name}: mean loss {num(arm[name]["val_loss"]["mean"])} is not below the '
              f'{first["data"]["unigram_loss"]:.4f} of token frequencies alone: nothing else was learned.'
              for name in arm
              if arm[name]['values'] and arm[name]['val_loss']['mean'] >= first['data']['unigram_loss']]
    if (epochs := tokens_seen(first) / max(1, first['data']['train_tokens'])) > 1:
        lines.append(f'The model saw its training data {epochs:.2f} times: part of the loss is repetition.')
    steps, losses = curve(complete(arms[base]).values())
    if len(steps) > 1 and (fall := float(np.mean(losses[:, -2] - losses[:, -1]))) > 0:
        lines.append(f'{base} was still improving at the end: {num(fall)} nats between its evaluations at '
                     f'steps {steps[-2]} and {steps[-1]}. A longer budget can change the order.')
    if r['metric'] != 'val_loss':
        lines.append(f'The margin of {r["margin"]:g} is {r["unit"]} here, not nats.')
    lines += [f'environment.{key} differs: {text}.'
              for key in ('git_commit', 'threads', 'python', 'platform', 'world_size')
              if (text := differing(runs, 'environment', key))]
    sources = [run['environment']['source_sha256'] for run in runs]
    changed = [ascii(file)[1:-1] for file in sorted(set().union(*sources))
               if any(s.get(file) != sources[0].get(file) for s in sources)]
    if changed:
        lines.append(f'The source changed between the runs: {", ".join(changed)}.')
    if dirty := [run for run in runs if run['environment']['git_dirty']]:
        lines.append(f'From a working tree with uncommitted changes: {who(dirty)}.')
    if any(a['not_complete'] for a in arm.values()):
        lines.append('Some runs did not finish: the comparison is over the seeds that did.')
    return lines + ['n counts seeds. One corpus, model size, budget and learning rate stand behind them all.']


def tokens_seen(run):
    return run['config']['max_steps'] * run['config']['batch_size'] * run['config']['block_size']


REPORT = '''\
# {title}: {label} against {baseline}
{forced}
## Verdicts

{verdicts}

The margin, the smallest difference worth having, is {margin:g} ({unit}). Differences are variant minus
{baseline} within pairs of one seed; {better} is better. A variant is called better, worse or equivalent at
{alpha:g} after Holm's correction over the variants.

```
{forest}
```

## What was compared

- model: {config[n_layer]} layers, width {config[n_embd]}, {config[n_head]} heads, {config[n_expert]} experts
  of which {config[top_k]} are active, feed-forward {config[d_ff]}, context {config[block_size]}
- data: {data[dataset]}, tokenizer {data[tokenizer]}, vocabulary {data[vocab_size]}, {data[train_tokens]}
  training and {data[val_tokens]} validation tokens (sha256 {data[train_sha256]:.12}, {data[val_sha256]:.12})
- reference losses: {data[uniform_loss]:.4f} nats for a guess, {data[unigram_loss]:.4f} from token frequencies
- budget: {config[max_steps]} updates of {config[batch_size]} x {config[block_size]} = {tokens} tokens,
  {epochs:.2f} epochs; {config[optimizer]}, learning rate {config[learning_rate]:g}
- device: {environment[device_name]}, {config[dtype]}, torch {environment[torch]}, threads
  {environment[threads]}, processes {environment[world_size]}
- complete runs: {complete}

## Results

Mean ± standard deviation over complete runs.

{results}

Time: updates only, without compilation and evaluation, and no claim of speed (that is for bench.py). Memory:
{memory}. Cache: all layers, at 2 bytes a number.

## Paired differences

{differences}

p: paired t test, two-sided. Holm: over {m} variant(s). Sign-flip: permutation test, floor 2/2^n. Every single
difference ({unit}):

{singles}

## Effect sizes

{effects}

d divides the mean difference by the pooled sd of the two groups, d_z by the sd of the differences; g is d
without its small-sample bias (Hedges 1981; for pooled d with 2(n-1)/(1+r^2) degrees of freedom, Cousineau
2020). The intervals are for the population's value: noncentral t inverted (Steiger & Fouladi 1997), for
pooled d rescaled (Algina & Keselman 2003).

## Equivalence, and what this n can see

{sensitivity}

TOST: two one-sided t tests against the margin. Detectable: the true difference that a two-sided paired t test
finds with {power:.0%} power if the sd is the one observed; beside it the pairs that a difference of the
margin needs. Both at alpha = {alpha:g} / {m}, the first step of Holm; power from the noncentral t.

## Noise floor

{noise}

## Parameter efficiency

{efficiency}

Loss per million parameters falls for any larger model. Unbeaten: no other configuration is as good in both
{label} and that cost and better in one, by the means alone; whether a difference is real is for the verdicts.

## Expert balance

{balance}

Load relative to an even share in the worst layer, mean over runs. Even use of {config[n_expert]} experts has
an entropy of {entropy:.3f} nats.

## Not in the comparison

{left_out}

## Caveats

{caveats}

## Figures

{figures}
'''


def report(arms, r, problems, title):
    """The whole report as Markdown text. problems: what disagreements() found and --force=True went past."""
    cs, marked = r['comparisons'], lambda lines: '\n'.join('- ' + line for line in lines)
    first = next(iter(arms[r['baseline']].values()))
    have = {name: c for name, c in cs.items() if c['n']}
    several = {name: c for name, c in cs.items() if c['n'] > 1}
    by_seed = {name: dict(zip(c['seeds'], c['d'])) for name, c in have.items()}
    memory = {run['final']['peak_memory_kind'] or 'unknown'
              for arm in arms.values() for run in complete(arm).values()}
    return REPORT.format(
        **r | {key: first[key] for key in ('config', 'data', 'environment')}, title=title, alpha=ALPHA,
        power=POWER,
        m=max(1, len(r['family'])), tokens=tokens_seen(first),
        memory=' and '.join(sorted(memory)) or 'unknown',
        epochs=tokens_seen(first) / max(1, first['data']['train_tokens']),
        entropy=math.log(max(1, first['config']['n_expert'])),
        forced='' if not problems else '\n**These runs are not comparable; the report was forced. They '
        'disagree in**\n\n'
        + marked(problems) + '\n',
        verdicts=marked([c['sentence'] for c in cs.values()] or ['nothing to compare with the baseline']),
        forest='\n'.join(text_forest(r)),
        complete='; '.join(f'{name} {len(a["seeds"])} (seeds {spans(a["seeds"])})'
                           for name, a in r['arms'].items()),
        results=table('Configuration | n | Val Loss | Val Perp | bits/byte | Time (min) | Peak Mem (GB) | '
                      'Params (M) | Active (M) | Cache B/token', [[
                          name, len(a['seeds']), mean_sd(a['val_loss'], 4), mean_sd(a['val_perplexity'], 2),
                          mean_sd(a['val_bits_per_byte'], 4), mean_sd(a['seconds_training'], 2, 1 / 60),
                          mean_sd(a['peak_memory_gb'], 2), shared(a['params_total'], 3, 1e-6),
                          shared(a['params_active'], 3, 1e-6), shared(a['kv_cache_bytes_per_token_16bit'], 0)]
                          for name, a in r['arms'].items()]),
        differences=table(f'Variant | n | mean d ({r["unit"]}) | % | 95% interval | p | p (Holm) | '
                          'sign-flip p | its floor | sign-flip p (Holm) | verdict', [[
                              name, c['n'], num(c['mean'], 4, True), num(c['percent'], 2, True),
                              interval_text(c['low'], c['high']), p_text(c['p']), p_text(c['p_holm']),
                              p_text(c['sign_flip']),
                              p_text(c['floor']), p_text(c['sign_flip_holm']), c['verdict']]
                              for name, c in have.items()]),
        singles=table(' | '.join(['Seed', *have]), [
            [seed, *(num(d.get(seed), 4, True) for d in by_seed.values())]
            for seed in sorted(set().union(*by_seed.values()))]),
        effects=table('Variant | n | d (pooled sd) | Hedges g | 95% interval | d_z (pairs) | Hedges g_z | '
                      '95% interval', [[
            name, c['n'], num(c['d_pooled'], 2, True), num(c['g_pooled'], 2, True),
            interval_text(c['d_pooled_low'], c['d_pooled_high'], 2), num(c['d_z'], 2, True),
            num(c['g_z'], 2, True),
            interval_text(c['d_z_low'], c['d_z_high'], 2)] for name, c in several.items()]),
        sensitivity=table(f'Variant | n | sd of d | TOST p | TOST p (Holm) | detectable ({r["unit"]}) | '
                          f'n for {r["margin"]:g}', [[
            name, c['n'], num(c['sd']), p_text(c['tost']), p_text(c['tost_holm']), num(c['detectable']),
            '-' if c['constant'] else c['needed_n'] or f'> {MOST_SEEDS}'] for name, c in several.items()]),
        noise=marked(noise_floor(r)), left_out=marked(left_out(r)), caveats=marked(caveats(arms, r)),
        efficiency=table('Configuration | loss / M params | attention (M) | ms per update | ' + ' | '.join(
            f'unbeaten: {text}' for text in PARETO.values()), [[
                name, num(a['val_loss']['mean'] / max(1, a['params_total'][-1]) * 1e6),
                shared(a['params_attention'], 3, 1e-6),
                mean_sd(a['step_ms_median'], 1),
                *('-' if name == r['again'] else 'yes' if name in r['pareto'][cost] else 'no'
                  for cost in PARETO)]
                for name, a in r['arms'].items() if a['values']]),
        balance=table('Configuration | n | busiest / even | idlest / even | largest excess | '
                      'router entropy (nats) | balance loss | z loss', [[
                          name, len(a['seeds']), num(max(map(max, a['load_by_rank']), default=None), 2),
                          num(min(map(min, a['load_by_rank']), default=None), 2),
                          mean_sd(a['max_violation'], 3),
                          mean_sd(a['router_entropy'], 3), mean_sd(a['balance_loss'], 4),
                          mean_sd(a['z_loss'], 4)]
                          for name, a in r['arms'].items()]),
        figures='\n\n'.join(f'![{text}]({file})' for file, text, _ in figures(arms, r)) or 'Nothing to draw.')


# ---- figures: opaque white ground for light and dark pages; Okabe & Ito's colours, and a marker to each

COLOURS = ['#444444', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9']
MARKERS = 'os^DvPX*<>hd'


def canvas(width, height, rows=1, columns=1, **keywords):
    """A figure in inches and the list of its axes; without pyplot, so without a display or global state."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=150, facecolor='white', layout='constrained')
    axes = list(figure.subplots(rows, columns, squeeze=False, **keywords).flat)
    for ax in axes:
        ax.spines[['top', 'right']].set_visible(False)
        ax.grid(color='#e4e4e4', linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def styles(r, again=False):
    """{arm: (colour, marker)} of the arms to draw; the A/A arm, which lies on the baseline, on demand."""
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
            for i, name in enumerate(list(r['arms'])[:MOST_DRAWN])
            if r['arms'][name]['values'] and (again or name != r['again'])}


def curve(runs):
    """The steps at which each of the runs was evaluated, and the validation losses there (runs x steps)."""
    rows = [{row['step']: row['val_loss'] for row in run['history'] if row['val_loss'] is not None}
            for run in runs]
    steps = sorted(set.intersection(*map(set, rows))) if rows else []
    return steps, np.array([[row[step] for step in steps] for row in rows])


def thin(ax, x, curves, **style):
    """Many curves as one artist with gaps: quick with a thousand of them."""
    gap = np.full((len(curves), 1), np.nan)
    ax.plot(np.tile([*x, np.nan], len(curves)), np.hstack([curves, gap]).ravel(), **style)


def band(ax, steps, curves, colour, label):
    """Every run thin, the mean thick, its 95% t interval shaded."""
    thin(ax, steps, curves, color=colour, lw=0.6, alpha=0.35)
    mean = [summary(list(column)) for column in curves.T]
    ax.plot(steps, [s['mean'] for s in mean], color=colour, lw=2, label=label)
    if len(curves) > 1:
        ax.fill_between(steps, [s['low'] for s in mean], [s['high'] for s in mean], color=colour, alpha=0.2,
                        lw=0)


def legend(figure, ax):
    handles, labels = ax.get_legend_handles_labels()
    columns = 6 if len(labels) < 7 else 4
    figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False)


def figure_curves(arms, r):
    figure, (left, right) = canvas(8, 4, 1, 2)
    base = complete(arms[r['baseline']])
    for name, (colour, _) in styles(r).items():
        runs = complete(arms[name])
        both = [seed for seed in runs if seed in base and name != r['baseline']]
        if (steps_losses := curve(runs.values()))[0]:
            band(left, *steps_losses, colour, name)
        steps, losses = curve([runs[seed] for seed in both] + [base[seed] for seed in both])
        if steps:
            band(right, steps, losses[:len(both)] - losses[len(both):], colour, name)
    right.axhline(0, color='#444444', lw=1)
    left.set(xlabel='optimizer updates', ylabel='validation loss (nats)',
             title='Every run, mean, 95% interval')
    right.set(xlabel='optimizer updates', ylabel=f'loss minus {r["baseline"]} (nats)',
              title='Difference within pairs')
    legend(figure, left)
    return figure


def figure_pairs(arms, r):
    figure, (ax,) = canvas(8, 4.2)
    drawn = styles(r, again=True)
    by_seed = [dict(zip(r['arms'][name]['seeds'], r['arms'][name]['values'])) for name in drawn]
    lines = [[values.get(seed, math.nan) for values in by_seed] for seed in sorted(set().union(*by_seed))]
    thin(ax, range(len(drawn)), lines, color='#888888', lw=0.8, alpha=0.7, zorder=1)
    for i, (values, (colour, marker)) in enumerate(zip(by_seed, drawn.values())):
        ax.plot([i] * len(values), values.values(), marker, color=colour, ms=7, alpha=0.85, mec='white')
    ax.set_xticks(range(len(drawn)), [f'{name}\nn = {len(values)}' for name, values in zip(drawn, by_seed)],
                  rotation=0 if len(drawn) < 8 else 40)
    ax.set(ylabel=f'{r["label"]} ({r["unit"]})', title='One line per seed', xlim=(-0.5, len(drawn) - 0.5))
    return figure


def figure_forest(arms, r):
    drawn = {name: c for name, c in r['comparisons'].items() if c['n'] and name in styles(r, again=True)}
    figure, (ax,) = canvas(8, 1.5 + 0.5 * len(drawn))
    ax.axvspan(-r['margin'], r['margin'], color='#999999', alpha=0.22, lw=0)
    ax.axvline(0, color='#444444', lw=1)
    for i, (name, c) in enumerate(drawn.items()):
        colour, marker = styles(r, again=True)[name]
        if c['low'] is not None:
            ax.plot([c['low'], c['high']], [i, i], color=colour, lw=2.5, solid_capstyle='butt')
        ax.plot(c['d'], [i + 0.24] * c['n'], '.', color=colour, ms=5, alpha=0.7)
        ax.plot(c['mean'], i, marker, color=colour, ms=9, mec='white')
    ax.set(yticks=range(len(drawn)), yticklabels=drawn, ylim=(len(drawn) - 0.5, -0.5),
           xlabel=f'{r["label"]} minus {r["baseline"]} ({r["unit"]}), {r["better"]} is better')
    right = ax.secondary_yaxis('right')
    right.set_yticks(range(len(drawn)), [f'{c["verdict"]}, n = {c["n"]}' for c in drawn.values()])
    right.tick_params(length=0)
    right.spines['right'].set_visible(False)
    ax.set_title(f'Mean and 95% interval; small dots: each pair; grey: the margin, '
                 f'± {r["margin"]:g} {r["unit"]}', fontsize=10)
    return figure


def figure_efficiency(arms, r):
    figure, axes = canvas(8, 4, 1, 2, sharey=True)
    for ax, key, unit, label in [(axes[0], 'params_active', 1e-6, 'active parameters (millions)'), (
            axes[1], 'kv_cache_bytes_per_token_16bit', 1, 'cache (bytes per token, 2 bytes a number)')]:
        for name, (colour, marker) in styles(r).items():
            s, x = r['arms'][name][r['metric']], r['arms'][name][key][-1] * unit
            if s['n'] > 1:
                ax.plot([x, x], [s['low'], s['high']], color=colour, lw=1.5)
            ax.plot(x, s['mean'], marker, color=colour, ms=9, mec='white', label=name)
        ax.set_xlabel(label)
        ax.locator_params(axis='x', nbins=5)
        ax.margins(0.1)
    axes[0].set_ylabel(f'{r["label"]} ({r["unit"]})')
    figure.suptitle('Mean and 95% interval over seeds', fontsize=12)
    legend(figure, axes[0])
    return figure


def figure_experts(arms, r):
    from matplotlib.colors import TwoSlopeNorm
    loads = {name: np.array(r['arms'][name]['load_by_rank']) for name in styles(r)
             if r['arms'][name]['load_by_rank']}
    columns = min(4, len(loads))
    rows = -(-len(loads) // columns)
    layers = max(len(load) for load in loads.values())
    figure, axes = canvas(8, 1.2 + rows * (0.9 + 0.14 * layers), rows, columns)
    norm = TwoSlopeNorm(1, 0, max(2, max(load.max() for load in loads.values())))
    for ax in axes[len(loads):]:
        ax.remove()
    for ax, (name, load) in zip(axes, loads.items()):
        image = ax.imshow(load, cmap='PuOr_r', norm=norm, aspect='auto', interpolation='nearest')
        ax.grid(False)
        ax.set_title(name, fontsize=10)
        for axis, size in [(ax.xaxis, load.shape[1]), (ax.yaxis, load.shape[0])]:
            axis.set_ticks(range(0, size, -(-size // 8)), [str(k + 1) for k in range(0, size, -(-size // 8))])
    figure.supxlabel('experts of a layer, busiest first (rank)', fontsize=10)
    figure.supylabel('layer', fontsize=10)
    figure.colorbar(image, ax=axes[:len(loads)], label='load / even share', shrink=0.9)
    return figure


def figures(arms, r):
    """(file, caption, function) of each figure these runs have something for, with or without matplotlib."""
    drawn = styles(r, again=True)
    possible = [
        ('forest.png', 'paired differences with 95% intervals and the margin', figure_forest,
         any(r['comparisons'].get(name, {'n': 0})['n'] for name in drawn)),
        ('pairs.png', 'every run, one line per seed', figure_pairs, drawn),
        ('curves.png', 'validation loss during training, and its paired difference', figure_curves,
         any(len(curve(complete(arms[name]).values())[0]) > 1 for name in styles(r))),
        ('efficiency.png', 'loss against active parameters and cache', figure_efficiency, styles(r)),
        ('experts.png', 'load of the experts by layer', figure_experts,
         any(r['arms'][name]['load_by_rank'] for name in styles(r)))]
    return [figure[:3] for figure in possible if figure[3]]


def draw(arms, r, folder):
    """Writes the figures, or says in one line on stderr how to get them."""
    try:
        import matplotlib.figure      # noqa: F401
    except ImportError:
        print('analyze.py: no figures without matplotlib; pip install matplotlib', file=sys.stderr)
        return
    for file, _, make in figures(arms, r):
        make(arms, r).savefig(os.path.join(folder, file), metadata={'Software': None})


# ---- the program

def rounded(x):
    """For report.json: 12 significant digits, so that another machine's last bit does not show."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return float(f'{x:.12g}') if isinstance(x, float) else x


def main(runs, baseline, metric, margin, force, plots):
    if margin <= 0:
        fail(f'--margin={margin:g}: must be above 0, it is the smallest difference worth having')
    arms = load(runs, baseline)
    problems = disagreements(arms, baseline)
    if problems and not force:
        fail(f'{runs}: not comparable (--force=True reports all the same): ' + ' | '.join(problems))
    r = compare(arms, baseline, metric, margin)
    folder = runs if os.path.isdir(runs) else os.path.dirname(runs) or '.'
    text = report(arms, r, problems, os.path.basename(os.path.abspath(folder)))
    data = json.dumps(rounded({**r, 'disagreements': problems}), indent=1, allow_nan=False) + '\n'
    try:
        for name, content in [('report.md', text), ('report.json', data)]:
            path = os.path.join(folder, name)
            with open(path, 'w', encoding='utf-8', errors='backslashreplace', newline='\n') as f:
                f.write(content)
        if plots:
            draw(arms, r, folder)
    except OSError as error:
        fail(f'{error.filename or folder}: the report cannot be written ({error.strerror})')
    sys.stdout.reconfigure(encoding='utf-8', errors='backslashreplace')
    print(text, end='')


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # what to read
    runs = 'out/laptop'         # a folder with result.json or <name>-s<seed>.json at any depth, or one file
    # what to claim
    baseline = 'baseline'       # the name that the others are compared against
    metric: Literal['val_loss', 'val_bits_per_byte', 'val_accuracy'] = 'val_loss'   # the number compared
    margin = 0.01               # smallest difference worth having, in the metric's unit; choose it first
    force = False               # report on runs that are not comparable; it then says what they disagree in
    # output
    plots = True                # draw the figures too; needs matplotlib
    # -----------------------------------------------------------------------------
    configure(globals(), positional='runs')
    main(runs, baseline, metric, margin, force, plots)
