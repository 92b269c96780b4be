"""Result files -> table, paired statistics, one verdict per variant, figures. Reads nothing else, needs no torch.

    python analyze.py out/laptop                       report to stdout; report.md, report.json, *.png beside the runs
    python analyze.py out/laptop --margin=0.02         another smallest difference worth having (decide BEFORE the runs)
    python analyze.py out/laptop --metric=val_bits_per_byte --baseline=gqa

An arm is the runs of one `name`, a pair is two runs of one seed, and every claim is about paired differences
d_i = variant_i - baseline_i. The same result files give the same report.md, byte for byte. In this order below:
reading, comparability, statistics (plain functions, each with its source), comparison, report, figures, knobs.
"""

import json
import math
import os
import re
import sys
from functools import lru_cache
from typing import Literal

import numpy as np

from configurator import configure, fail

SCHEMA = 1
ALPHA, POWER = 0.05, 0.80
EXACT_FLIPS = 20            # up to 2^20 sign patterns are enumerated, beyond that they are sampled
SAMPLED_FLIPS = 100_000
MOST_SEEDS = 10_000         # a needed n above this is reported as "more than"
MOST_DRAWN = 12             # arms in a figure; the tables hold all of them
ORDER = ['gqa', 'mqa', 'lora', 'enhanced', 'mla']       # after the baseline; then the alphabet
METRICS = {                 # final.<metric>: what it is, its unit, whether lower is better
    'val_loss': ('validation loss', 'nats', True),
    'val_bits_per_byte': ('validation bits per byte', 'bits/byte', True),
    'val_accuracy': ('validation accuracy', 'as a fraction', False),
}
VARIANT = {'attn', 'n_kv_head', 'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim',
           'attention_bias'}                            # and every rope_* except rope_theta: what is being compared
BOOKKEEPING = {'name', 'seed', 'out_dir', 'experiment', 'resume', 'overwrite', 'log_interval', 'checkpoint_interval',
               'checkpoint', 'force'}                   # no influence on the numbers

# ---- reading: every field that is used below is checked here, once, so that nothing after this can meet a surprise

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
FIELDS = {                  # a kind with ? may be null
    'name': 'text', 'status': 'text', 'config': 'object', 'model': 'object', 'data': 'object',
    'environment': 'object', 'history': 'list', 'final': 'object?',
    **{f'config.{k}': 'int' for k in ['seed']},
    **{f'config.{k}': 'text' for k in ['attn', 'optimizer', 'device', 'dtype']},
    **{f'config.{k}': 'count' for k in ['n_layer', 'n_head', 'n_embd', 'd_ff', 'n_expert', 'top_k', 'block_size',
                                        'batch_size', 'max_steps']},
    'config.learning_rate': 'size', 'model.attention_class': 'text',
    **{f'model.{k}': 'count' for k in ['params_total', 'params_active', 'params_attention', 'params_embedding']},
    **{f'model.{k}': 'size' for k in ['flops_per_token', 'kv_cache_bytes_per_token',
                                      'kv_cache_bytes_per_token_16bit']},
    **{f'data.{k}': 'text' for k in ['dataset', 'tokenizer', 'train_sha256', 'val_sha256']},
    **{f'data.{k}': 'count' for k in ['vocab_size', 'train_tokens', 'val_tokens']},
    'data.val_bytes': 'count?', 'data.uniform_loss': 'size', 'data.unigram_loss': 'size',
    **{f'environment.{k}': 'text' for k in ['device_name', 'torch', 'python', 'platform']},
    'environment.threads': 'count?', 'environment.git_commit': 'text?', 'environment.git_dirty': 'bool?',
    'environment.source_sha256': 'object', 'environment.world_size': 'count',
}
FINAL = {                   # of a complete run
    **{k: 'count' for k in ['step', 'updates', 'tokens']}, 'val_loss': 'size', 'val_perplexity': 'size?',
    'val_accuracy': 'share', 'val_bits_per_byte': 'size?', 'seconds_training': 'size', 'seconds_total': 'size',
    'step_ms_median': 'size', 'tokens_per_second': 'size', 'mfu': 'size?', 'peak_memory_gb': 'size?',
    'peak_memory_kind': 'text?', 'expert_load': 'list', 'max_violation': 'number?', 'router_entropy': 'number?',
    'balance_loss': 'number?', 'z_loss': 'number?',
}
STATUSES = ('running', 'complete', 'interrupted', 'diverged')


def check(file, field, value, kind):
    """Fails, naming file and field, unless the value is of that kind."""
    if value is None and kind.endswith('?'):
        return
    needed, fits = KINDS[kind.rstrip('?')]
    if not fits(value):
        shown = 'null' if value is None else ascii(value)
        fail(f'{file}: {field} is {shown[:60]}, needed is {needed}')


def lookup(file, run, field):
    """The value of a dotted field; fails if the file lacks it."""
    for part in field.split('.'):
        if not isinstance(run, dict) or part not in run:
            fail(f'{file}: lacks the field {field}')
        run = run[part]
    return run


def find_files(path):
    """The result files at or below a path: result.json and <name>-s<seed>.json, sorted."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        fail(f'{path}: no such folder or file; results are made by train.py, see reproduce.sh')
    found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                   if name == 'result.json' or re.search(r'-s\d+\.json$', name))
    return found or fail(f'{path}: no result files below it (result.json or <name>-s<seed>.json)')


def read_run(file):
    """One result file -> its object, with `file` added. Fails with one line naming file and field if it is unsound."""
    def not_a_number(text):
        raise ValueError(f'{text} is not JSON, train.py writes null')
    try:
        with open(file, encoding='utf-8') as f:
            run = json.loads(f.read(), parse_constant=not_a_number)
    except OSError as error:
        fail(f'{file}: cannot be read ({error.strerror})')
    except (ValueError, RecursionError) as error:
        fail(f'{file}: not valid JSON, perhaps truncated ({error or "nested too deep"})')
    if not isinstance(run, dict):
        fail(f'{file}: holds {type(run).__name__}, needed is one JSON object')
    schema = lookup(file, run, 'schema')
    if type(schema) is not int or schema != SCHEMA:
        fail(f'{file}: schema is {ascii(schema)[:60]}, this analyze.py reads schema {SCHEMA}')
    for field, kind in FIELDS.items():
        check(file, field, lookup(file, run, field), kind)
    if run['status'] not in STATUSES:
        fail(f'{file}: status is {ascii(run["status"])[:60]}, needed is one of {", ".join(STATUSES)}')
    if len(run['name']) > 60:
        fail(f'{file}: name is {len(run["name"])} characters long, at most 60 fit a table')
    for i, row in enumerate(run['history']):
        check(file, f'history[{i}]', row, 'object')
        for field, kind in [('step', 'count'), ('val_loss', 'size?')]:
            if field not in row:
                fail(f'{file}: lacks the field history[{i}].{field}')
            check(file, f'history[{i}].{field}', row[field], kind)
    if run['status'] == 'complete':
        check_final(file, run)
    return {**run, 'file': file, 'seed': run['config']['seed']}


def check_final(file, run):
    """The numbers of a complete run: all there, and not contradicting each other."""
    check(file, 'final', run['final'], 'object')
    final = run['final']
    for field, kind in FINAL.items():
        check(file, f'final.{field}', lookup(file, run, f'final.{field}'), kind)
    perplexity, loss = final['val_perplexity'], final['val_loss']
    if perplexity is not None and abs(math.log(max(perplexity, 1e-300)) - loss) > 0.01:
        fail(f'{file}: final.val_perplexity {perplexity:g} is not exp(final.val_loss) = exp({loss:g})')
    if run['model']['params_active'] > run['model']['params_total']:
        fail(f'{file}: model.params_active is above model.params_total')
    for i, layer in enumerate(final['expert_load']):
        check(file, f'final.expert_load[{i}]', layer, 'list')
        for j, load in enumerate(layer):
            check(file, f'final.expert_load[{i}][{j}]', load, 'share')
        if len(layer) != len(final['expert_load'][0]) or sum(layer) <= 0:
            fail(f'{file}: final.expert_load[{i}] has no load, or another number of experts than layer 0')


def load(path, baseline):
    """Every run at or below the path -> {arm: {seed: run}}, baseline first, then ORDER, then the alphabet."""
    arms = {}
    for file in find_files(path):
        run = read_run(file)
        twin = arms.setdefault(run['name'], {}).setdefault(run['seed'], run)
        if twin is not run:
            fail(f'{twin["file"]} and {file} are both {run["name"]} seed {run["seed"]}; a pair needs one run a seed'
                 ' (several experiments below one folder? name one: python analyze.py out/laptop)')
    if baseline not in arms:
        fail(f'{path}: no runs named {ascii(baseline)}, the baseline; there are {", ".join(sorted(arms)[:20])};'
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
    return ', '.join(str(a) if a == b else f'{a}-{b}' if b > a + 1 else f'{a}, {b}' for a, b in parts)


def who(runs):
    """Some runs -> 'baseline seeds 0-7; lora seed 3'."""
    arms = {}
    for run in runs:
        arms.setdefault(run['name'], []).append(run['seed'])
    return '; '.join(f'{name} seed{"s" * (len(seeds) > 1)} {spans(seeds)}' for name, seeds in arms.items())


def split_by(runs, value):
    """Runs that share a value, together: {value as JSON: [runs]}; an absent field counts as a value."""
    groups = {}
    for run in runs:
        groups.setdefault(value(run), []).append(run)
    return groups


def as_json(section, key):
    return lambda run: json.dumps(run[section][key], sort_keys=True) if key in (run[section] or {}) else 'absent'


def is_variant(knob):
    return knob in VARIANT or knob.startswith('rope_') and knob != 'rope_theta'


def disagreements(arms, baseline):
    """What keeps the runs from being comparable, as sentences naming field, values and runs. Empty: comparable.

    Over all runs: data (the tokens' sha256 among it), device, torch, every knob but the variant's and bookkeeping;
    over complete runs: the budget that was used. Within an arm (and its A/A twin): the variant's knobs, the model.
    """
    runs = [run for arm in arms.values() for run in arm.values()]
    keys = {section: sorted({key for run in runs for key in run[section]}) for section in ('config', 'data', 'model')}
    knobs = [key for key in keys['config'] if key not in BOOKKEEPING]
    complete = [run for run in runs if run['status'] == 'complete']
    checks = [(runs, 'config', key) for key in knobs if not is_variant(key)]
    checks += [(runs, 'data', key) for key in keys['data']]
    checks += [(runs, 'environment', key) for key in ('device_name', 'torch')]
    checks += [(complete, 'final', key) for key in ('updates', 'tokens')]
    networks = {}
    for run in runs:
        networks.setdefault(baseline if run['name'] == f'{baseline}-again' else run['name'], []).append(run)
    for same in networks.values():
        checks += [(same, 'config', key) for key in knobs if is_variant(key)]
        checks += [(same, 'model', key) for key in keys['model']]
    found = []
    for some, section, key in checks:
        groups = split_by(some, as_json(section, key))
        if len(groups) > 1:
            found.append(f'{section}.{ascii(key)[1:-1]}: '
                         + ' against '.join(f'{value[:80]} ({who(group)})' for value, group in groups.items()))
    return found


# ---- statistics

def bisect(f, low, high, rounds=60):
    """Where the increasing f goes from negative to positive; an end of the bracket if it does not."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def t_area(t, df):
    """P(-|t| < T < |t|) for Student's t with whole df >= 1: a finite sum, Abramowitz & Stegun 26.7.3 (odd), 26.7.4."""
    theta = math.atan(abs(t) / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    odd = df % 2
    term = cos if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    return min(1.0, 2 / math.pi * (theta + sin * total)) if odd else min(1.0, sin * total)


def t_tail(t, df):
    """P(T > t), to about 1e-15 absolute."""
    return (1 - math.copysign(t_area(t, df), t)) / 2


@lru_cache(maxsize=None)
def t_quantile(p, df):
    """The t with P(T <= t) = p, for 0.5 <= p < 1; bisection over the angle of A&S 26.7."""
    return math.sqrt(df) * math.tan(bisect(lambda a: t_area(math.sqrt(df) * math.tan(a), df) - (2 * p - 1), 0,
                                           math.pi / 2 * (1 - 1e-15)))


def normal_cdf(x):
    return 0.5 * np.array([math.erfc(-value / math.sqrt(2)) for value in np.atleast_1d(x)])


NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def noncentral_t_cdf(t, df, ncp):
    """P((Z + ncp) / U <= t), Z standard normal and U^2 a chi-square over its df: integral of Phi(t u - ncp) f(u) du.

    Gauss-Legendre, 64 nodes on each side of and across the step of Phi at u = ncp / t; absolute error below 1e-8.
    """
    if t < 0:
        return 1 - noncentral_t_cdf(-t, df, -ncp)
    if t == 0:
        return float(normal_cdf(-ncp)[0])
    low, high = max(0.0, 1 - 9 / math.sqrt(df)), 1 + 9 / math.sqrt(df)
    edges = np.clip([low, (ncp - 8) / t, (ncp + 8) / t, high], low, high)
    total = 0.0
    for a, b in zip(edges[:-1], edges[1:]):
        if b > a:
            u = (a + b) / 2 + (b - a) / 2 * NODES
            log_f = (math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
                     + (df - 1) * np.log(u) - df * u * u / 2)
            total += (b - a) / 2 * float(np.sum(WEIGHTS * np.exp(log_f) * normal_cdf(t * u - ncp)))
    return total


def ncp_interval(t, df, level=0.95):
    """The noncentralities that an observed t does not reject (Steiger & Fouladi 1997): exact for normal differences.

    Divided by sqrt(n) it is the interval of the population's d_z.
    """
    reach = 20 * math.sqrt(1 + t * t / (2 * df))
    return tuple(bisect(lambda ncp: p - noncentral_t_cdf(t, df, ncp), t - reach, t + reach, 50)
                 for p in ((1 + level) / 2, (1 - level) / 2))


@lru_cache(maxsize=None)
def power(effect, n, alpha=ALPHA):
    """Power of the two-sided paired t test with n pairs at a true mean difference of `effect` standard deviations."""
    critical, ncp = t_quantile(1 - alpha / 2, n - 1), abs(effect) * math.sqrt(n)
    return 1 - noncentral_t_cdf(critical, n - 1, ncp) + noncentral_t_cdf(-critical, n - 1, ncp)


@lru_cache(maxsize=None)
def detectable(n, alpha=ALPHA, wanted=POWER):
    """The true difference, in standard deviations of the differences, that n pairs detect with the wanted power."""
    high = 2 * (t_quantile(1 - alpha / 2, n - 1) + 3)
    return bisect(lambda effect: power(effect, n, alpha) - wanted, 0, high, 40)


def needed_n(effect, alpha=ALPHA, wanted=POWER):
    """The fewest pairs (2 or more) that give the wanted power; None if that is more than MOST_SEEDS."""
    if power(effect, MOST_SEEDS, alpha) < wanted:
        return None
    low, high = 1, 2                                    # low fails, high succeeds
    while power(effect, high, alpha) < wanted:
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, alpha) >= wanted else (middle, high)
    return high


def holm(ps):
    """Holm (1979) step-down adjusted p values, in the order given; None stays None and does not count."""
    ranked = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted, worst = list(ps), 0.0
    for rank, (p, i) in enumerate(ranked):
        worst = max(worst, min(1.0, p * (len(ranked) - rank)))
        adjusted[i] = worst
    return adjusted


def sign_flip(d):
    """Two-sided p of the sign-flip permutation test on the mean (Fisher 1935) -> (p, exact?).

    Share of the 2^n sign patterns whose |sum| is at least the observed one; never below 2 / 2^n. Beyond EXACT_FLIPS
    pairs, SAMPLED_FLIPS patterns from a fixed seed, (1 + hits) / (1 + drawn) as in Phipson & Smyth 2010.
    """
    d = np.asarray(d, dtype=float)
    enough = abs(d.sum()) - 1e-9 * np.abs(d).sum()      # ties count: the slack is for rounding
    if len(d) <= EXACT_FLIPS:
        sums = d[:1]                                    # the other half of the patterns mirrors this one
        for value in d[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= enough)), True
    raw, hits, done = np.random.PCG64(0), 0, 0
    width = -(-len(d) // 64)                            # 64-bit words a pattern; random_raw is stable across numpy
    while done < SAMPLED_FLIPS:
        rows = min(max(1, 2_000_000 // len(d)), SAMPLED_FLIPS - done)
        bits = np.unpackbits(raw.random_raw(rows * width).reshape(rows, width).view(np.uint8), axis=1)[:, :len(d)]
        hits += int(np.sum(np.abs(2 * (bits @ d) - d.sum()) >= enough))
        done += rows
    return (1 + hits) / (1 + done), False


def tost(mean, se, df, margin):
    """p of two one-sided t tests (Schuirmann 1987) of |true difference| >= margin; small: within the margin."""
    return max(t_tail((mean + margin) / se, df), t_tail((margin - mean) / se, df))


def hedges(df):
    """Hedges' (1981) exact factor that takes the small-sample bias out of a standardised mean difference."""
    if df <= 1:
        return None                                     # no finite mean with one degree of freedom
    return math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)


def summary(values):
    """n, mean, sd (n - 1 in the denominator; None for n < 2) and the 95% t interval of the mean."""
    n = len(values)
    if n == 0:
        return {'n': 0, 'mean': None, 'sd': None, 'low': None, 'high': None}
    mean = math.fsum(values) / n
    if n == 1:
        return {'n': 1, 'mean': mean, 'sd': None, 'low': None, 'high': None}
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    if sd <= 1e-12 * max(abs(v) for v in values):       # equal but for rounding: an sd of 0, not of 1e-17
        sd = 0.0
    half = t_quantile(1 - ALPHA / 2, n - 1) * sd / math.sqrt(n)
    return {'n': n, 'mean': mean, 'sd': sd, 'low': mean - half, 'high': mean + half}


def paired(variant, base, margin, alpha=ALPHA):
    """Two lists in the order of their seeds -> everything that is said about d_i = variant_i - base_i, as a dict.

    margin in the unit of the values, alpha for the power figures. With n = 1 only the difference itself; where all
    d_i are one number there is no spread, so no t statistic: `constant` is True and what needs one stays None.
    """
    scale = max(map(abs, [*variant, *base]), default=0.0)
    d = [0.0 if abs(v - b) <= 1e-12 * scale else v - b for v, b in zip(variant, base)]
    n = len(d)
    c = {'d': d, **summary(d), 'constant': False, 'percent': None, 'sign_flip': None, 'sign_flip_exact': None,
         'floor': 2 / 2 ** n if n else None, **dict.fromkeys(
             ['t', 'p', 'tost', 'd_z', 'g_z', 'd_z_low', 'd_z_high', 'd_pooled', 'g_pooled', 'd_pooled_low',
              'd_pooled_high', 'correlation', 'detectable', 'needed_n'])}
    if n:
        base_mean = math.fsum(base) / n
        c['percent'] = 100 * c['mean'] / base_mean if base_mean else None
    if n < 2:
        return c
    c['sign_flip'], c['sign_flip_exact'] = sign_flip(d)
    if c['sd'] <= 1e-11 * scale:
        c.update(constant=True, sd=0.0, low=None, high=None)
        return c
    se, df = c['sd'] / math.sqrt(n), n - 1
    c['t'] = c['mean'] / se
    c['p'] = max(0.0, 1 - t_area(c['t'], df))
    c['tost'] = tost(c['mean'], se, df, margin)
    c['detectable'] = c['sd'] * detectable(n, alpha)
    c['needed_n'] = needed_n(margin / c['sd'], alpha)
    c['d_z'] = c['mean'] / c['sd']
    low, high = (ncp / math.sqrt(n) for ncp in ncp_interval(c['t'], df))
    c['d_z_low'], c['d_z_high'] = low, high
    c['g_z'] = hedges(df) and hedges(df) * c['d_z']
    var_v, var_b = summary(variant)['sd'] ** 2, summary(base)['sd'] ** 2
    pooled = math.sqrt((var_v + var_b) / 2)
    if pooled > 0:
        ratio = c['sd'] / pooled                        # Algina & Keselman 2003: the interval of d_z, rescaled
        c['d_pooled'], c['d_pooled_low'], c['d_pooled_high'] = c['mean'] / pooled, low * ratio, high * ratio
        r = (var_v + var_b - c['sd'] ** 2) / (2 * math.sqrt(var_v * var_b)) if var_v and var_b else 0.0
        # two sds from correlated groups carry fewer degrees of freedom than 2(n-1): Cousineau 2020
        factor = hedges(2 * df / (1 + min(1.0, r * r)))
        c['correlation'], c['g_pooled'] = max(-1.0, min(1.0, r)), factor and factor * c['d_pooled']
    return c


# ---- comparison

def complete(arm):
    return {seed: run for seed, run in arm.items() if run['status'] == 'complete'}


def metric_of(run, metric):
    value = run['final'][metric]
    if value is None:
        fail(f'{run["file"]}: final.{metric} is null; --metric=val_loss works without it')
    return value


def compare(arms, baseline, metric, margin):
    """{arm: {seed: run}} -> everything the report says, as one dict that JSON can hold."""
    label, unit, lower_is_better = METRICS[metric]
    again = f'{baseline}-again'
    finals = {name: complete(arm) for name, arm in arms.items()}
    family = [name for name in arms if name not in (baseline, again) and len(set(finals[name]) & set(finals[baseline])) > 1]
    every_seed = {seed for arm in arms.values() for seed in arm}
    r = {'schema': 1, 'baseline': baseline, 'metric': metric, 'label': label, 'unit': unit, 'margin': margin,
         'lower_is_better': lower_is_better, 'alpha': ALPHA, 'power': POWER, 'family': family, 'arms': {},
         'comparisons': {}}
    for name, runs in finals.items():
        columns = {key: [run['final'][key] for run in runs.values() if run['final'][key] is not None] for key in FINAL
                   if key not in ('expert_load', 'peak_memory_kind')}
        r['arms'][name] = {
            'seeds': list(runs), 'missing': sorted(every_seed - set(arms[name])),
            'not_complete': [{'seed': seed, 'status': run['status'], 'step': (run['final'] or {}).get('step'),
                              'error': run.get('error')} for seed, run in arms[name].items() if seed not in runs],
            'attention_class': sorted({run['model']['attention_class'] for run in arms[name].values()}),
            'values': [metric_of(run, metric) for run in runs.values()],
            **{key: summary(values) for key, values in columns.items()},
            **{key: sorted({run['model'][key] for run in arms[name].values()}) for key in
               ('params_total', 'params_active', 'params_attention', 'kv_cache_bytes_per_token',
                'kv_cache_bytes_per_token_16bit')},
            'load_by_rank': load_by_rank(runs.values())}
    base = finals[baseline]
    for name, runs in finals.items():
        if name == baseline:
            continue
        seeds = sorted(set(runs) & set(base))
        alpha = ALPHA / max(1, len(family)) if name != again else ALPHA
        r['comparisons'][name] = {
            'seeds': seeds, 'only_variant': sorted(set(runs) - set(base)), 'only_baseline': sorted(set(base) - set(runs)),
            **paired([metric_of(runs[s], metric) for s in seeds], [metric_of(base[s], metric) for s in seeds], margin, alpha)}
    for key in ('p', 'sign_flip', 'tost'):
        adjusted = holm([r['comparisons'][name][key] for name in family])
        for name in r['comparisons']:
            c = r['comparisons'][name]
            c[f'{key}_holm'] = adjusted[family.index(name)] if name in family else c[key]
    for name, c in r['comparisons'].items():
        c['verdict'], c['sentence'] = verdict(name, c, r)
    r['pareto'] = {cost: pareto(r, cost) for cost in PARETO}
    return r


def load_by_rank(runs):
    """Mean over runs of load relative to even, experts of a layer sorted from busiest: (layers x experts), or [].

    Sorted before averaging: expert 3 of one seed has nothing to do with expert 3 of another.
    """
    loads = [np.array(run['final']['expert_load'], dtype=float) for run in runs]
    loads = [load for load in loads if load.ndim == 2 and load.size and load.shape == loads[0].shape]
    relative = [-np.sort(-load / load.sum(1, keepdims=True) * load.shape[1], axis=1) for load in loads]
    return np.mean(relative, axis=0).tolist() if relative else []


PARETO = {'params_total': 'parameters', 'params_active': 'active parameters',
          'kv_cache_bytes_per_token_16bit': 'cache bytes per token', 'step_ms_median': 'time per update'}


def pareto(r, cost):
    """Arms that no other arm beats on the metric AND the cost (as good in both, better in one), by their means."""
    points = {}
    for name, arm in r['arms'].items():
        if arm['values'] and name != f'{r["baseline"]}-again':
            price = arm[cost]['mean'] if isinstance(arm[cost], dict) else arm[cost][-1]
            points[name] = (arm[r['metric']]['mean'] * (1 if r['lower_is_better'] else -1), price)
    return [name for name, (loss, price) in points.items()
            if not any(x <= loss and y <= price and (x < loss or y < price) for x, y in points.values())]


def verdict(name, c, r):
    """(verdict, one sentence). In this order, so that each comparison gets exactly one:

    not tested   no pair, or one
    equivalent   TOST puts the true difference within the margin (Holm p < 0.05), or every d_i is exactly 0. This comes
                 first: the margin is the smallest difference worth having, so a difference inside it is not worth
                 having even when it is measurably not zero; the sentence then says that it is
    better/worse the paired t test rejects zero (Holm p < 0.05)
    undecided    neither; with the n that would see a difference of the margin or, if there are as many pairs
                 already, a difference of the size observed, at 80% power
    """
    n, unit, margin, base = c['n'], r['unit'], r['margin'], r['baseline']
    if n < 2:
        return 'not tested', (f'{name}: not tested (n = {n}{": no seed in common with " + base if n == 0 else ""}).')
    pairs = f'n = {n} pairs'
    if c['constant']:
        if c['mean'] == 0:
            return 'equivalent', f'{name}: equivalent to {base}: all {n} paired differences are exactly 0.'
        return 'undecided', (f'{name}: undecided: all {n} paired differences are the same number, '
                             f'{num(c["mean"], 4, True)} {unit}, so there is no spread to test it against.')
    how = 'lower' if c['mean'] < 0 else 'higher'
    size = f'{num(abs(c["mean"]), 4)} {unit} {how}'
    interval = f'95% interval {num(c["low"], 4, True)} to {num(c["high"], 4, True)}, {pairs}'
    different = c['p_holm'] < ALPHA
    if c['tost_holm'] < ALPHA:
        also = f', though measurably {how} (Holm p {p_text(c["p_holm"])})' if different else ''
        return 'equivalent', (f'{name}: equivalent to {base}: within {margin:g} {unit} (TOST with Holm '
                              f'p {p_text(c["tost_holm"])}; {interval}){also}.')
    if different:
        word = 'better' if (c['mean'] < 0) == r['lower_is_better'] else 'worse'
        inside = min(abs(c['low']), abs(c['high'])) < margin
        worth = ('the interval reaches inside the margin, so the difference may be too small to matter' if inside
                 else 'the whole interval lies beyond the margin')
        return word, f'{name}: {word} than {base}: {r["label"]} {size} ({interval}; Holm p {p_text(c["p_holm"])}); {worth}.'
    alpha = ALPHA / max(1, len(r['family'])) if name in r['family'] else ALPHA
    target, which = c['needed_n'], f'a difference of {margin:g} {unit}'
    if target is not None and target <= n:              # enough for the margin: what is open is a smaller difference
        target, which = needed_n(c['d_z'], alpha), f'a difference as small as the one observed, {num(abs(c["mean"]), 4)} {unit},'
    about = f'about n = {target}' if target else f'more than n = {MOST_SEEDS}'
    return 'undecided', (f'{name}: undecided against {base}: neither zero nor a difference of {margin:g} {unit} is ruled '
                         f'out ({interval}); {about} would be needed to see {which} with {POWER:.0%} power.')


# ---- report: fixed formats and a fixed order, nothing of the clock or of where the files lie

def num(x, digits=4, sign=False):
    """Fixed decimals; what is not zero never reads as zero; '-' where there is no number."""
    if x is None:
        return '-'
    if x == 0:
        return f'{0:.{digits}f}'
    if round(abs(x), digits) == 0 or abs(x) >= 1e9:
        return f'{x:+.1e}' if sign else f'{x:.1e}'
    return f'{x:+.{digits}f}' if sign else f'{x:.{digits}f}'


def p_text(p):
    return '-' if p is None else '< 0.0001' if p < 0.0001 else f'= {p:.4f}'


def p_cell(p):
    return p_text(p).removeprefix('= ')


def plus_minus(s, digits, factor=1.0):
    if s['mean'] is None:
        return '-'
    return num(s['mean'] * factor, digits) + (f' ± {num(s["sd"] * factor, digits)}' if s['sd'] is not None else '')


def span(values, digits, factor=1.0):
    """A figure that all runs of an arm share; both ends where (with --force) they do not."""
    ends = dict.fromkeys(num(value * factor, digits) for value in (values[0], values[-1]))
    return ' to '.join(ends)


def interval_cell(low, high, digits=4):
    return '-' if low is None else f'{num(low, digits, True)} to {num(high, digits, True)}'


def table(head, rows):
    """A Markdown table, first column to the left, numbers to the right."""
    lines = [head, ['---'] + ['--:'] * (len(head) - 1), *rows]
    return ['| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in line) + ' |' for line in lines] + ['']


def text_forest(r, width=57):
    """The forest plot in characters: o mean, --- 95% interval, | zero, : margin."""
    drawn = {name: c for name, c in r['comparisons'].items() if c['n']}
    points = [v for c in drawn.values() for v in (c['mean'], c['low'], c['high']) if v is not None]
    low, high = min(points + [-r['margin']]), max(points + [r['margin']])
    column = lambda x: round((x - low) / (high - low) * (width - 1))
    pad = max(map(len, drawn))
    lines = []
    for name, c in drawn.items():
        cells = [' '] * width
        if c['low'] is not None:
            cells[column(c['low']):column(c['high']) + 1] = '-' * (column(c['high']) - column(c['low']) + 1)
        for x, mark in [(-r['margin'], ':'), (r['margin'], ':'), (0, '|'), (c['mean'], 'o')]:
            cells[column(x)] = mark
        lines.append(f'{name.ljust(pad)}  {"".join(cells)}  {num(c["mean"], 4, True)}  n = {c["n"]}')
    ends = num(low, 4, True), num(high, 4, True)
    lines.append(' ' * (pad + 2) + ends[0] + ends[1].rjust(width - len(ends[0])) + f'  {r["unit"]}')
    lines.append(f'o mean   --- 95% interval   | zero   : margin, {r["margin"]:g} to each side')
    return lines


def what_was_compared(arms, r):
    first = next(iter(arms[r['baseline']].values()))
    config, data, env = first['config'], first['data'], first['environment']
    tokens = config['max_steps'] * config['batch_size'] * config['block_size']
    return [
        f'- model: {config["n_layer"]} layers, width {config["n_embd"]}, {config["n_head"]} heads, {config["n_expert"]} '
        f'experts of which {config["top_k"]} are active, feed-forward {config["d_ff"]}, context {config["block_size"]}',
        f'- data: {data["dataset"]}, tokenizer {data["tokenizer"]}, vocabulary {data["vocab_size"]}; '
        f'{data["train_tokens"]} training and {data["val_tokens"]} validation tokens '
        f'(sha256 {data["train_sha256"][:12]}, {data["val_sha256"][:12]})',
        f'- a guess costs {data["uniform_loss"]:.4f} nats, token frequencies alone {data["unigram_loss"]:.4f}',
        f'- budget: {config["max_steps"]} updates of {config["batch_size"]} x {config["block_size"]} tokens = {tokens} '
        f'tokens, {tokens / max(1, data["train_tokens"]):.2f} epochs; {config["optimizer"]}, learning rate '
        f'{config["learning_rate"]:g}',
        f'- device: {env["device_name"]}, {config["dtype"]}, torch {env["torch"]}, '
        f'{env["threads"] or "unknown number of"} threads, {env["world_size"]} process{"es" * (env["world_size"] > 1)}',
        '- complete runs: ' + '; '.join(f'{name} {len(a["seeds"])} (seeds {spans(a["seeds"]) or "none"})'
                                        for name, a in r['arms'].items()), '']


def main_table(r):
    rows = [[name, len(a['seeds']), plus_minus(a['val_loss'], 4), plus_minus(a['val_perplexity'], 2),
             plus_minus(a['val_bits_per_byte'], 4), plus_minus(a['seconds_training'], 2, 1 / 60),
             plus_minus(a['peak_memory_gb'], 2), span(a['params_total'], 3, 1e-6), span(a['params_active'], 3, 1e-6),
             span(a['kv_cache_bytes_per_token_16bit'], 0)] for name, a in r['arms'].items()]
    return table(['Configuration', 'n', 'Val Loss', 'Val Perp', 'bits/byte', 'Time (min)', 'Peak Mem (GB)', 'Params (M)',
                  'Active (M)', 'Cache B/token'], rows)


def noise_floor(r):
    """What the baseline does against itself: no difference below this is evidence of anything."""
    base, again = r['arms'][r['baseline']][r['metric']], f'{r["baseline"]}-again'
    lines = []
    if base['sd'] is None:
        lines.append(f'- {r["baseline"]} has {base["n"]} complete run(s): its spread over seeds is unknown.')
    else:
        values = r['arms'][r['baseline']]['values']
        lines.append(f'- {r["baseline"]} over {base["n"]} seeds: sd {num(base["sd"])} {r["unit"]}, from {num(min(values))} to '
                     f'{num(max(values))}. Two unpaired runs that differ in nothing but the seed differ with an sd of '
                     f'{num(math.sqrt(2) * base["sd"])} (sqrt 2 times as much).')
    for name, c in r['comparisons'].items():
        if c['n'] > 1 and name in r['family'] and c['correlation'] is not None:
            lines.append(f'- {name}: paired differences have an sd of {num(c["sd"])} (correlation of the pairs '
                         f'{c["correlation"]:+.2f}).')
    c = r['comparisons'].get(again)
    if c is None or not c['n']:
        lines.append(f'- No A/A pairs ({again}, the same seeds run a second time) among these runs.')
    else:
        lines.append(f'- A/A check: {again} repeats {c["n"]} seed(s); largest difference '
                     f'{num(max(map(abs, c["d"])))} {r["unit"]}' + (': the same seed gives the same number.'
                     if not any(c['d']) else '. This much comes from the machine alone.')
                     + ' It is no hypothesis and stays out of the Holm correction.')
    return lines + ['']


def not_in_it(r):
    """Runs that did not finish, seeds without a partner, seeds without a file."""
    lines = []
    for name, a in r['arms'].items():
        for run in a['not_complete']:
            at = f' at step {run["step"]}' if run['step'] is not None else ''
            why = f': {str(run["error"])[:160]}' if run['error'] else ''
            lines.append(f'- {name} seed {run["seed"]}: {run["status"]}{at}{why}; not in the table, not in a pair.')
        if a['missing']:
            lines.append(f'- {name}: no run for seed(s) {spans(a["missing"])}, which another configuration has.')
    for name, c in r['comparisons'].items():
        if c['only_variant']:
            lines.append(f'- {name} seed(s) {spans(c["only_variant"])}: no complete {r["baseline"]} run of that seed; '
                         'in the table, left out of the pairs.')
        if c['only_baseline']:
            lines.append(f'- {r["baseline"]} seed(s) {spans(c["only_baseline"])}: no complete {name} run of that seed; '
                         f'left out of the pairs with {name}.')
    return (lines or ['None: every configuration has a complete run for every seed.']) + ['']


def caveats(arms, r):
    """What the numbers themselves say against reading too much into them."""
    lines, m = [], len(r['family'])
    base = r['arms'][r['baseline']]
    runs = [run for arm in arms.values() for run in arm.values()]
    for name, c in r['comparisons'].items():
        if c['n'] == 1:
            lines.append(f'{name}: n = 1. One pair has no standard deviation, hence no interval, no test, no effect size.')
        elif c['n'] == 2:
            lines.append(f'{name}: n = 2. The spread is estimated from one degree of freedom; the interval is 9.0 standard '
                         'deviations wide on each side, and Hedges\' correction of d_z does not exist.')
        if c['n'] > 1 and c['floor'] * (m if name in r['family'] else 1) >= ALPHA:
            lines.append(f'{name}: the sign-flip test cannot fall below {num(c["floor"])} with n = {c["n"]}'
                         + (f', {num(min(1, c["floor"] * m))} after Holm over {m} comparisons' * (m > 1))
                         + f': it cannot reach {ALPHA:g}.')
        if c['sign_flip_exact'] is False:
            lines.append(f'{name}: with n = {c["n"]} the sign-flip p is from {SAMPLED_FLIPS} sampled patterns, fixed seed.')
        if name in r['family'] and c['constant'] and c['mean'] == 0:
            lines.append(f'{name}: equal to {r["baseline"]} to the last digit on every seed: was it the same network?')
        for key, text in [('params_total', 'parameters'), ('params_active', 'active parameters')]:
            change = 100 * (r['arms'][name][key][-1] / max(1, base[key][-1]) - 1)
            if abs(change) >= 1:
                lines.append(f'{name} has {abs(change):.1f}% {"more" if change > 0 else "fewer"} {text} than '
                             f'{r["baseline"]}: a difference in loss is not due to the mechanism alone.')
    seen = {}
    for name, a in r['arms'].items():
        if name != f'{r["baseline"]}-again':
            facts = tuple(map(tuple, (a['attention_class'], a['params_total'], a['params_attention'],
                                      a['kv_cache_bytes_per_token'])))
            seen.setdefault(facts, []).append(name)
    lines += [f'{" and ".join(names)} agree in attention class, parameters and cache: different settings of one network, '
              'or the same network.' for names in seen.values() if len(names) > 1]
    first = next(iter(arms[r['baseline']].values()))
    config, data = first['config'], first['data']
    epochs = config['max_steps'] * config['batch_size'] * config['block_size'] / max(1, data['train_tokens'])
    if epochs > 1:
        lines.append(f'The model saw its training data {epochs:.2f} times: part of the loss is about repetition.')
    lines += [f'{name}: mean validation loss {num(a["val_loss"]["mean"])} is not below the {data["unigram_loss"]:.4f} of token '
              'frequencies alone: nothing about the text beyond them was learned.' for name, a in r['arms'].items()
              if a['val_loss']['n'] and a['val_loss']['mean'] >= data['unigram_loss']]
    steps, curves = curve(complete(arms[r['baseline']]).values())
    if len(steps) > 1:
        fall = float(np.mean(curves[:, -2] - curves[:, -1]))
        if fall > 0:
            lines.append(f'{r["baseline"]} was still improving at the end: {num(fall)} nats between its evaluations at steps '
                         f'{steps[-2]} and {steps[-1]}. A longer budget can change the order.')
    if r['metric'] != 'val_loss':
        lines.append(f'The metric is {r["metric"]}; the margin of {r["margin"]:g} is {r["unit"]}, not nats.')
    for key, text in [('git_commit', 'git commits'), ('threads', 'numbers of threads'), ('python', 'Python versions'),
                      ('platform', 'platforms'), ('world_size', 'numbers of processes')]:
        groups = split_by(runs, as_json('environment', key))
        if len(groups) > 1:
            lines.append(f'The runs come from different {text}: '
                         + ', '.join(f'{value[:50]} ({who(group)})' for value, group in groups.items()) + '.')
    sources = sorted({file for run in runs for file in run['environment']['source_sha256']})
    changed = [ascii(file)[1:-1] for file in sources
               if len({json.dumps(run['environment']['source_sha256'].get(file), sort_keys=True) for run in runs}) > 1]
    if changed:
        lines.append(f'The source changed between the runs: {", ".join(changed)}.')
    dirty = [run for run in runs if run['environment']['git_dirty']]
    if dirty:
        lines.append(f'From a working tree with uncommitted changes: {who(dirty)}.')
    if any(a['not_complete'] for a in r['arms'].values()):
        lines.append('Some runs did not finish: the comparison is over the seeds that did.')
    lines.append('n counts seeds. One corpus, one model size, one budget and one learning rate stand behind all of them.')
    return ['- ' + line for line in lines] + ['']


def report(arms, r, problems, title):
    """The whole report as Markdown text."""
    unit, base, margin, m = r['unit'], r['baseline'], r['margin'], len(r['family'])
    cs, rule = r['comparisons'], f'alpha = {ALPHA:g}' + (f' / {m}' if m > 1 else '')
    out = [f'# {title}: {r["label"]} against {base}', '']
    if problems:
        out += ['**These runs are not comparable; the report was forced (--force=True). They disagree in:**', '',
                *('- ' + problem for problem in problems), '']
    out += ['## Verdicts', '', *('- ' + c['sentence'] for c in cs.values()), *([] if cs else [f'- Only {base}: nothing to compare.']),
            '', f'The margin, the smallest difference worth having, is {margin:g} ({unit}). Differences are variant minus {base} '
            f'within pairs of one seed; {"lower" if r["lower_is_better"] else "higher"} is better.', '']
    if any(c['n'] for c in cs.values()):
        out += ['```', *text_forest(r), '```', '']
    out += ['## What was compared', '', *what_was_compared(arms, r)]
    out += ['## Results', '', 'Mean ± standard deviation over complete runs.', '', *main_table(r)]
    kinds = sorted({run['final']['peak_memory_kind'] or 'of unknown kind' for arm in arms.values() for run in complete(arm).values()})
    out += [f'Time: updates only, without compilation and evaluation; no claim of speed (that is for bench.py). Memory: '
            f'{" and ".join(kinds) or "unknown"}. Cache: all layers, at 2 bytes a number.', '']
    tested = {name: c for name, c in cs.items() if c['n'] > 1}
    if any(c['n'] for c in cs.values()):
        out += ['## Paired differences', '']
        out += table(['Variant', 'n', f'mean d ({unit})', '%', '95% interval', 'sd of d', 'p', 'p (Holm)', 'sign-flip p',
                      'its floor', 'sign-flip p (Holm)', 'TOST p', 'TOST p (Holm)', 'verdict'],
                     [[name, c['n'], num(c['mean'], 4, True), num(c['percent'], 2, True), interval_cell(c['low'], c['high']),
                       num(c['sd']), p_cell(c['p']), p_cell(c['p_holm']), p_cell(c['sign_flip']),
                       p_cell(c['floor'] if c['n'] > 1 else None), p_cell(c['sign_flip_holm']), p_cell(c['tost']),
                       p_cell(c['tost_holm']), c['verdict']] for name, c in cs.items() if c['n']])
        out += [f'p: paired t test, two-sided. Holm: over {m} variant(s). Sign-flip: exact permutation test, floor 2/2^n. '
                f'TOST: two one-sided t tests against the margin.', '', f'Every single difference ({unit}):', '']
        shown = [name for name, c in cs.items() if c['n']]
        by_seed = {name: dict(zip(cs[name]['seeds'], cs[name]['d'])) for name in shown}
        out += table(['Seed', *shown], [[seed, *(num(by_seed[name].get(seed), 4, True) for name in shown)]
                                        for seed in sorted({seed for name in shown for seed in by_seed[name]})])
    if tested:
        out += ['## Effect sizes', '']
        out += table(['Variant', 'n', 'd (pooled sd)', 'Hedges g', '95% interval', 'd_z (pairs)', 'Hedges g_z', '95% interval'],
                     [[name, c['n'], num(c['d_pooled'], 2, True), num(c['g_pooled'], 2, True),
                       interval_cell(c['d_pooled_low'], c['d_pooled_high'], 2), num(c['d_z'], 2, True), num(c['g_z'], 2, True),
                       interval_cell(c['d_z_low'], c['d_z_high'], 2)] for name, c in tested.items()])
        out += ['d divides the mean difference by the pooled sd of the two groups, d_z by the sd of the paired differences; '
                'g is d without its small-sample bias (Hedges 1981; for pooled d with 2(n-1)/(1+r^2) degrees of freedom, '
                'Cousineau 2020). Intervals are for the population value: noncentral t inverted (Steiger & Fouladi 1997), '
                'rescaled for pooled d (Algina & Keselman 2003).', '', '## What this n can see', '']
        out += table(['Variant', 'n', 'sd of d', f'detectable ({unit})', f'n for {margin:g}'],
                     [[name, c['n'], num(c['sd']), num(c['detectable']), '-' if c['constant'] else
                       c['needed_n'] or f'> {MOST_SEEDS}'] for name, c in tested.items()])
        out += [f'The true difference that a two-sided paired t test finds with {POWER:.0%} power, and the pairs needed to find '
                f'one of the margin, if the sd is the one observed ({rule}, the first step of Holm; power from the noncentral t).', '']
    out += ['## Noise floor', '', *noise_floor(r)]
    out += ['## Parameter efficiency', '']
    efficiency = []
    for name, a in r['arms'].items():
        if a['values']:
            marks = ['yes' if name in r['pareto'][cost] else '-' if name == f'{base}-again' else 'no' for cost in PARETO]
            efficiency.append([name, num(a['val_loss']['mean'] / max(1, a['params_total'][-1]) * 1e6, 4),
                               span(a['params_attention'], 3, 1e-6), plus_minus(a['step_ms_median'], 1), *marks])
    out += table(['Configuration', 'loss / M params', 'Attention params (M)', 'ms per update',
                  *(f'unbeaten on {text}' for text in PARETO.values())], efficiency)
    out += [f'Loss per million parameters falls for any larger model. Unbeaten: no other configuration is as good in both '
            f'{r["label"]} and that cost and better in one, by the means alone; whether a difference is real is for the verdicts.', '']
    out += ['## Expert balance', '']
    out += table(['Configuration', 'n', 'busiest / even', 'least busy / even', 'largest excess', 'router entropy (nats)', 'balance loss',
                  'z loss'], [[name, len(a['seeds']), *((num(max(map(max, a['load_by_rank'])), 2), num(min(map(min, a['load_by_rank'])), 2))
                                                        if a['load_by_rank'] else '--'),
                               plus_minus(a['max_violation'], 3), plus_minus(a['router_entropy'], 3),
                               plus_minus(a['balance_loss'], 4), plus_minus(a['z_loss'], 4)] for name, a in r['arms'].items()])
    experts = first_config(arms, r)['n_expert']
    out += [f'Load relative to an even share, worst layer, mean over runs. Even use of {experts} experts has an entropy of '
            f'{math.log(max(1, experts)):.3f} nats.', '']
    out += ['## Not in the comparison', '', *not_in_it(r), '## Caveats', '', *caveats(arms, r)]
    drawn = [(file, text) for file, text, _, possible in FIGURES if possible(arms, r)]
    if drawn:
        out += ['## Figures', '', *(f'![{text}]({file})\n' for file, text in drawn)]
        if len(arms) > MOST_DRAWN:
            out += [f'Drawn are the first {MOST_DRAWN} of {len(arms)} configurations.', '']
    return '\n'.join(out).rstrip('\n') + '\n'


def first_config(arms, r):
    return next(iter(arms[r['baseline']].values()))['config']


def rounded(x):
    """For report.json: 12 significant digits, so that the last bit of another machine's arithmetic does not show."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return float(f'{x:.12g}') if isinstance(x, float) else x


# ---- figures: an opaque white ground for light and dark pages; Okabe & Ito's colours, and a marker to each as well

COLOURS = ['#444444', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9']
MARKERS = 'os^DvPX*<>hd'


def canvas(width, height, rows=1, columns=1, **keywords):
    """A figure in inches and its axes in one list; without pyplot, so without a display or global state."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=150, facecolor='white', layout='constrained')
    axes = list(figure.subplots(rows, columns, squeeze=False, **keywords).flat)
    for ax in axes:
        ax.spines[['top', 'right']].set_visible(False)
        ax.grid(color='#e4e4e4', linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def styles(arms):
    """{arm: (colour, marker)} of the arms that are drawn."""
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(list(arms)[:MOST_DRAWN])}


def curve(runs):
    """Steps at which every run was evaluated, and the validation losses there (runs x steps)."""
    rows = [{row['step']: row['val_loss'] for row in run['history'] if row['val_loss'] is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, rows))) if rows else []
    return steps, np.array([[row[step] for step in steps] for row in rows])


def band(ax, steps, curves, colour, label):
    """Every run thin, the mean thick, its 95% t interval shaded."""
    gap = np.full((len(curves), 1), np.nan)             # all thin lines as one artist: quick with many runs
    ax.plot(np.tile([*steps, np.nan], len(curves)), np.hstack([curves, gap]).ravel(), color=colour, lw=0.6, alpha=0.35)
    mean = curves.mean(0)
    ax.plot(steps, mean, color=colour, lw=2, label=label)
    if len(curves) > 1:
        half = t_quantile(1 - ALPHA / 2, len(curves) - 1) * curves.std(0, ddof=1) / math.sqrt(len(curves))
        ax.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, lw=0)


def figure_curves(arms, r):
    figure, (left, right) = canvas(8, 3.9, 1, 2)
    base = complete(arms[r['baseline']])
    for name, (colour, _) in styles(arms).items():
        runs = complete(arms[name])
        steps, curves = curve(runs.values())
        if steps:
            band(left, steps, curves, colour, name)
        shared = [seed for seed in runs if seed in base]
        steps, both = curve([runs[s] for s in shared] + [base[s] for s in shared])
        if steps and name != r['baseline']:
            band(right, steps, both[:len(shared)] - both[len(shared):], colour, name)
    right.axhspan(-r['margin'], r['margin'], color='#999999', alpha=0.18, lw=0) if r['metric'] == 'val_loss' else None
    right.axhline(0, color='#444444', lw=1)
    left.set(xlabel='optimizer updates', ylabel='validation loss (nats)', title='Every run, mean, 95% interval')
    right.set(xlabel='optimizer updates', ylabel=f'loss minus {r["baseline"]} (nats)', title='Difference within pairs')
    figure.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncols=6, frameon=False)
    return figure


def figure_pairs(arms, r):
    names = list(styles(arms))
    figure, (ax,) = canvas(8, 4.2)
    seeds = sorted({seed for name in names for seed in r['arms'][name]['seeds']})
    for seed in seeds:
        values = [dict(zip(r['arms'][name]['seeds'], r['arms'][name]['values'])).get(seed, math.nan) for name in names]
        ax.plot(range(len(names)), values, color='#888888', lw=0.8, alpha=0.7, zorder=1)
    for i, (name, (colour, marker)) in enumerate(styles(arms).items()):
        values = r['arms'][name]['values']
        ax.plot([i] * len(values), values, marker, color=colour, ms=6, alpha=0.85, mec='white', mew=0.5)
    ax.set_xticks(range(len(names)), [f'{name}\nn = {len(r["arms"][name]["seeds"])}' for name in names],
                  rotation=0 if len(names) < 8 else 40)
    ax.set(ylabel=f'{r["label"]} ({r["unit"]})', title='One line per seed', xlim=(-0.4, len(names) - 0.6))
    return figure


def figure_forest(arms, r):
    drawn = [(name, r['comparisons'][name]) for name in styles(arms) if r['comparisons'].get(name, {'n': 0})['n']]
    figure, (ax,) = canvas(8, 1.5 + 0.5 * len(drawn))
    margin, style = r['margin'], styles(arms)
    ax.axvspan(-margin, margin, color='#999999', alpha=0.22, lw=0, label=f'margin, ± {margin:g}')
    ax.axvline(0, color='#444444', lw=1)
    for i, (name, c) in enumerate(drawn):
        colour, marker = style[name]
        if c['low'] is not None:
            ax.plot([c['low'], c['high']], [i, i], color=colour, lw=2.5, solid_capstyle='butt')
        ax.plot(c['d'], [i + 0.24] * c['n'], '.', color=colour, ms=4, alpha=0.6)
        ax.plot(c['mean'], i, marker, color=colour, ms=8, mec='white')
    ax.set_yticks(range(len(drawn)), [name for name, _ in drawn])
    ax.set_ylim(len(drawn) - 0.5, -0.5)
    verdicts = ax.secondary_yaxis('right')
    verdicts.set_yticks(range(len(drawn)), [f'{c["verdict"]}, n = {c["n"]}' for _, c in drawn])
    verdicts.tick_params(length=0)
    verdicts.spines['right'].set_visible(False)
    better = 'lower is better' if r['lower_is_better'] else 'higher is better'
    ax.set(xlabel=f'{r["label"]} minus {r["baseline"]} ({r["unit"]}), {better}',
           title=f'Mean and 95% interval; small dots: each pair; grey: the margin, ± {margin:g} {r["unit"]}')
    ax.title.set_fontsize(10)
    return figure


def figure_efficiency(arms, r):
    figure, axes = canvas(8, 3.9, 1, 2, sharey=True)
    for ax, key, label, unit in [(axes[0], 'params_active', 'active parameters (millions)', 1e-6),
                                 (axes[1], 'kv_cache_bytes_per_token_16bit', 'cache (bytes per token, 2 bytes a number)', 1)]:
        for name, (colour, marker) in styles(arms).items():
            s, x = r['arms'][name][r['metric']], r['arms'][name][key][-1] * unit
            if s['n']:
                half = [[s['high'] - s['mean']]] * 2 if s['n'] > 1 else None
                ax.errorbar(x, s['mean'], yerr=half, fmt=marker, color=colour, ms=8, mec='white', capsize=3, lw=1.5, label=name)
        ax.set(xlabel=label)
        ax.margins(0.12)
    axes[0].set(ylabel=f'{r["label"]} ({r["unit"]})')
    figure.suptitle('Mean and 95% interval over seeds', fontsize=12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=6, frameon=False)
    return figure


def figure_experts(arms, r):
    from matplotlib.colors import TwoSlopeNorm
    loads = {name: np.array(r['arms'][name]['load_by_rank']) for name in styles(arms) if r['arms'][name]['load_by_rank']}
    columns = min(4, len(loads))
    rows = -(-len(loads) // columns)
    tallest = max(load.shape[0] for load in loads.values())
    figure, axes = canvas(8, 1.2 + rows * (0.9 + 0.14 * tallest), rows, columns)
    norm = TwoSlopeNorm(1, 0, max(2, max(load.max() for load in loads.values())))
    for ax in axes[len(loads):]:
        ax.remove()
    for i, (ax, (name, load)) in enumerate(zip(axes, loads.items())):
        image = ax.imshow(load, cmap='PuOr_r', norm=norm, aspect='auto', interpolation='nearest')
        ax.grid(False)
        ax.set_title(name, fontsize=10)
        for axis, size in [(ax.xaxis, load.shape[1]), (ax.yaxis, load.shape[0])]:
            every = -(-size // 8)
            axis.set_ticks(range(0, size, every), [str(k + 1) for k in range(0, size, every)])
    figure.supxlabel('experts of a layer, busiest first (rank)', fontsize=10)
    figure.supylabel('layer', fontsize=10)
    figure.colorbar(image, ax=axes[:len(loads)], label='load / even share', shrink=0.9)
    return figure


def any_curve(arms, r):
    return any(len(curve(complete(arms[name]).values())[0]) > 1 for name in styles(arms))


FIGURES = [                 # file, caption, function, whether there is anything to draw
    ('forest.png', 'paired differences with 95% intervals and the margin', figure_forest,
     lambda arms, r: any(r['comparisons'].get(name, {'n': 0})['n'] for name in styles(arms))),
    ('pairs.png', 'every run, one line per seed', figure_pairs, lambda arms, r: any(a['values'] for a in r['arms'].values())),
    ('curves.png', 'validation loss during training, and its paired difference', figure_curves, any_curve),
    ('efficiency.png', 'loss against active parameters and cache', figure_efficiency,
     lambda arms, r: any(a['values'] for a in r['arms'].values())),
    ('experts.png', 'load of the experts by layer', figure_experts,
     lambda arms, r: any(r['arms'][name]['load_by_rank'] for name in styles(arms))),
]


def draw(arms, r, folder):
    """Writes the figures, or says in one line on stderr how to get them."""
    try:
        import matplotlib.figure      # noqa: F401
    except ImportError:
        print('analyze.py: no figures without matplotlib; pip install matplotlib', file=sys.stderr)
        return
    for file, _, make, possible in FIGURES:
        if possible(arms, r):
            make(arms, r).savefig(os.path.join(folder, file), metadata={'Software': None})


def main(runs, baseline, metric, margin, force, figures):
    if margin <= 0:
        fail(f'--margin={margin:g}: must be above 0, it is the smallest difference worth having')
    arms = load(runs, baseline)
    problems = disagreements(arms, baseline)
    if problems and not force:
        fail(f'{runs}: these runs are not comparable (--force=True reports all the same): ' + ' | '.join(problems))
    r = compare(arms, baseline, metric, margin)
    folder = runs if os.path.isdir(runs) else os.path.dirname(runs) or '.'
    text = report(arms, r, problems, os.path.basename(os.path.abspath(folder)))
    data = json.dumps(rounded({**r, 'disagreements': problems}), indent=1, allow_nan=False, sort_keys=False)
    try:
        for name, content in [('report.md', text), ('report.json', data + '\n')]:
            with open(os.path.join(folder, name), 'w', encoding='utf-8', errors='backslashreplace', newline='\n') as f:
                f.write(content)
        if figures:
            draw(arms, r, folder)
    except OSError as error:
        fail(f'{error.filename or folder}: the report cannot be written ({error.strerror})')
    sys.stdout.reconfigure(encoding='utf-8', errors='backslashreplace')
    print(text, end='')


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # what to read
    runs = 'out/laptop'                 # a folder of runs (result.json, <name>-s<seed>.json below it), or one file
    baseline = 'baseline'               # the name that the others are compared against
    # what to claim
    metric: Literal['val_loss', 'val_bits_per_byte', 'val_accuracy'] = 'val_loss'    # the number that is compared
    margin = 0.01                       # smallest difference worth having, in the metric's unit; set it before the runs
    force = False                       # report on runs that are not comparable; what they disagree in is listed
    # output
    figures = True                      # draw the figures (needs matplotlib)
    # -----------------------------------------------------------------------------
    configure(globals(), positional='runs')
    main(runs, baseline, metric, margin, force, figures)
