"""Result files -> tables, paired statistics, one verdict per comparison, figures. Reads nothing else; no torch.

    python analyze.py out/laptop                 report to stdout; report.md, .html, .json and *.png beside it
    python analyze.py out/laptop --margin=0.02   the smallest difference worth having, chosen BEFORE the runs
    python analyze.py out/laptop --contrasts=mla48:mqa,mqa:baseline     planned comparisons, one family
    python analyze.py out/laptop-rates --rates=True     runs named ARM@RATE: the best learning rate of each arm

An arm is the runs of one `name`, a pair is two runs of one seed, and every claim is about paired differences
d_i = first_i - second_i. options.json in the folder, a list of flags, holds where the command line says nothing
else. The same folder gives the same report.md, byte for byte.
"""

import base64
import html
import json
import math
import os
import re
import signal
import sys
from typing import Literal

import numpy as np

from configurator import as_text, configure, did_you_mean, fail
from figures import curve, draw
from result import DEFAULTS, SCHEMAS, VARIANT, complete, differing, disagreements, load, spans, who
from stats import ALPHA, EXACT_FLIPS, MOST_SEEDS, POWER, SAMPLED_FLIPS, correlation, holm, needed_n, paired, summary

METRICS = {'val_loss': ('validation loss', 'nats', 'lower'),        # final.<metric>: name, unit, better is
           'val_bits_per_byte': ('validation bits per byte', 'bits/byte', 'lower'),
           'val_accuracy': ('validation accuracy', 'as a fraction', 'higher')}
COSTS = {'params_total': 'parameters', 'params_active': 'active parameters',
         'kv_cache_bytes_per_token_16bit': 'cache'}                 # model.<cost>
MEASURED = [*METRICS, 'val_perplexity', 'peak_memory_gb', 'max_violation', 'router_entropy', 'balance_loss', 'z_loss']


# ---------------------------------------------------------------------------------------------------------------------
# Comparison

def compare(arms, baseline, metric, margin, contrasts=()):
    """{arm: {seed: run}} -> every number and verdict of the report, as one dict that JSON can hold.

    contrasts: pairs of arms. If there are any, they are the family that is tested, and what else there is against the
    baseline is only described; if there are none, every arm against the baseline is in the family.
    """
    again, finals = f'{baseline}-again', {name: complete(arm) for name, arm in arms.items()}
    values = {name: {seed: run['final'][metric] for seed, run in runs.items()} for name, runs in finals.items()}
    for name, seed in [(name, seed) for name in values for seed, x in values[name].items() if x is None]:
        fail(f'{arms[name][seed]["file"]}: final.{metric} is null; --metric=val_loss does without it')
    against = [(name, baseline) for name in arms if name != baseline]
    planned = list(contrasts) or [pair for pair in against if pair[0] != again]         # A/A is no hypothesis
    pairs = {(a, b): sorted(set(values[a]) & set(values[b])) for a, b in [*planned, *against]}
    family = [f'{a} - {b}' for a, b in planned if len(pairs[a, b]) > 1]
    every_seed = {seed for arm in arms.values() for seed in arm}
    r = {'schema': 2, 'baseline': baseline, 'again': again, 'metric': metric, 'margin': margin, 'family': family,
         'contrasts': bool(contrasts), **dict(zip(('label', 'unit', 'better'), METRICS[metric]))}
    r['arms'] = {name: {
        'seeds': list(runs), 'values': list(values[name].values()), 'missing': sorted(every_seed - set(arms[name])),
        'not_complete': [{'seed': seed, 'status': run['status'], 'error': run.get('error')}
                         for seed, run in arms[name].items() if seed not in runs],
        **{key: next(iter(arms[name].values()))['model'][key] for key in ('attention_class', *COSTS)},
        **{key: summary([run['final'][key] for run in runs.values() if run['final'][key] is not None])
           for key in MEASURED},
        'early': early(runs.values()), 'load_by_rank': load_by_rank(runs.values())} for name, runs in finals.items()}
    cs = r['comparisons'] = {f'{a} - {b}': {
        'arms': [a, b], 'planned': (a, b) in planned, 'seeds': seeds,
        'unpaired': {arm: sorted(set(values[arm]) - set(seeds)) for arm in (a, b)},
        **paired([values[a][s] for s in seeds], [values[b][s] for s in seeds], margin, max(1, len(family)))}
        for (a, b), seeds in pairs.items()}
    for key in ('p', 'sign_flip', 'tost'):
        adjusted = dict(zip(family, holm([cs[name][key] for name in family])))
        for name, c in cs.items():
            c[f'{key}_holm'] = adjusted.get(name)
    for c in cs.values():
        c['verdict'], c['sentence'] = verdict(c, r)
    r['unbeaten'] = {cost: unbeaten(r, cost) for cost in COSTS}
    return r


def early(runs):
    """Loss at the first evaluation after an update, which all the runs share, and at the last; None without two."""
    steps, losses = curve(runs)
    if len(steps) < 2 + (0 in steps):
        return None
    first, last = losses[:, int(0 in steps)].tolist(), losses[:, -1].tolist()
    return {'steps': [steps[int(0 in steps)], steps[-1]], 'first': summary(first), 'last': summary(last),
            'r': correlation(first, last)}


def load_by_rank(runs):
    """Mean over runs of load relative to even, experts of a layer from busiest on: (layers x experts), or [].

    Sorted before averaging: expert 3 of one seed has nothing to do with expert 3 of another.
    """
    loads = [np.array(run['final']['expert_load'], dtype=float) for run in runs]
    loads = [load for load in loads if load.size and load.shape == loads[0].shape]
    ranked = [-np.sort(-load / load.sum(1, keepdims=True), axis=1) * load.shape[1] for load in loads]
    return np.mean(ranked, axis=0).tolist() if ranked else []


def unbeaten(r, cost):
    """Arms that no other beats on the metric AND the cost (as good in both, better in one), by means."""
    sign = 1 if r['better'] == 'lower' else -1
    points = {name: (sign * arm[r['metric']]['mean'], arm[cost])
              for name, arm in r['arms'].items() if arm['values'] and name != r['again']}
    return [name for name, (loss, price) in points.items()
            if not any(x <= loss and y <= price and (x, y) != (loss, price) for x, y in points.values())]


def verdict(c, r):
    """(verdict, one sentence), by the first of these that holds, so that each comparison gets exactly one:

    descriptive   not in the family: nothing is claimed
    not tested    no pair, or one
    equivalent    TOST puts the true difference within the margin (Holm p < 0.05), or every d_i is exactly 0. First:
                  one inside the margin is not worth having, even when measurably not zero; the sentence says so
    better/worse  the paired t test rejects zero (Holm p < 0.05)
    undecided     neither; with the n that would find, at 80% power, a difference of the margin or, with that many
                  pairs already, one of the size observed

    The interval of a tested comparison is corrected over the family (Bonferroni), as its p value is (Holm).
    """
    (name, base), n, m, unit, margin = c['arms'], c['n'], max(1, len(r['family'])), r['unit'], r['margin']
    if not c['planned'] and name == r['again'] and n:
        return 'descriptive', (f'{name} repeats {n} seed(s) of {base}: largest difference {num(max(map(abs, c["d"])))} '
                               f'{unit}, ' + ('from the machine alone.' if any(c['d']) else 'the same to the last bit.'))
    if not c['planned']:
        return 'descriptive', f'{name} - {base}: ' + (
            f'{num(c["mean"], 4, True)} {unit} (95% interval {interval_text(c["low"], c["high"])}, n = {n} pairs).'
            if n else 'no complete pair.')
    if n < 2:
        return 'not tested', (f'{name}: not tested (n = {n}): ' + (
            'one pair has no standard deviation, so no interval, no test and no effect size.' if n
            else f'no complete pair with {base}.'))
    if c['constant'] and c['mean'] == 0:
        return 'equivalent', (f'{name}: equivalent to {base}: all {n} paired differences are exactly 0; was it the same '
                              'network?')
    if c['constant']:
        return 'undecided', (f'{name}: undecided: all {n} paired differences are {num(c["mean"], 4, True)} {unit}, '
                             'so there is no spread to test them against.')
    how, size, holm_p = 'lower' if c['mean'] < 0 else 'higher', num(abs(c['mean'])), f'Holm p {p_text(c["p_holm"])}'
    measurable, low, high = c['p_holm'] < ALPHA, c['low_all'], c['high_all']
    interval = f'{"simultaneous " * (m > 1)}95% interval {interval_text(low, high)}, n = {n} pairs'
    if c['tost_holm'] < ALPHA:
        return 'equivalent', (f'{name}: equivalent to {base}: within {margin:g} {unit} (TOST with Holm, p '
                              f'{p_text(c["tost_holm"])}; {interval})'
                              + f', though measurably {how} ({holm_p})' * measurable + '.')
    if measurable:
        word = 'better' if how == r['better'] else 'worse'
        worth = ('lies wholly beyond the margin' if low * high > 0 and min(abs(low), abs(high)) >= margin
                 else 'reaches inside the margin: perhaps too little to matter')
        return word, (f'{name}: {word} than {base}: {r["label"]} {size} {unit} {how} ({interval}; {holm_p}); the interval '
                      f'{worth}.')
    target, what = c['needed_n'], f'{margin:g} {unit}'
    if target is not None and target <= n:
        target, what = needed_n(c['d_z'], ALPHA / m), f'one as small as observed, {size} {unit},'
    about = f'about n = {target}' if target else f'more than n = {MOST_SEEDS}'
    ruled_out = f'neither zero nor a difference of {margin:g} {unit} is ruled out ({interval})'
    if c['p'] < ALPHA:
        ruled_out = (f'its interval by itself excludes zero ({interval_text(c["low"], c["high"])}; p {p_text(c["p"])}), '
                     f'but not after correction over {m} comparisons ({interval}; {holm_p})')
    return 'undecided', (f'{name}: undecided against {base}: {ruled_out}; {about} would be needed to find {what} with '
                         f'{POWER:.0%} power.')


# ---------------------------------------------------------------------------------------------------------------------
# Report: fixed formats, a fixed order, nothing of the clock or of where the files lie

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


def mean_sd(s, digits):
    return '-' if not s['n'] else num(s['mean'], digits) + (f' ± {num(s["sd"], digits)}' if s['n'] > 1 else '')


def bullets(lines):
    return '\n'.join('- ' + line for line in lines)


def table(head, rows):
    """Markdown, first column to the left, numbers to the right. head: titles with | between them; rows: {first: rest}."""
    head = head.split(' | ')
    lines = [head, ['---'] + ['--:'] * (len(head) - 1), *([first, *rest] for first, rest in rows.items())]
    return '\n'.join('| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in line) + ' |' for line in lines)


def tokens_seen(run):
    return run['config']['max_steps'] * run['config']['batch_size'] * run['config']['block_size']


def what_differs(arms, may_differ):
    """A line per arm: its complete runs, and its value of each knob (or fact) that not all arms share."""
    firsts = {name: next(iter(arm.values())) for name, arm in arms.items()}
    keys = [('config', key) for key in next(iter(firsts.values()))['config'] if key in {*VARIANT, *may_differ}]
    keys += [('data', 'tokenizer'), ('data', 'vocab_size')] + [('environment', key) for key in may_differ]
    keys = [(part, key) for part, key in keys if differing(firsts.values(), part, key)]
    for name, run in firsts.items():
        seeds, values = complete(arms[name]), [f'{key} {run[part][key]}' for part, key in keys
                                               if run[part].get(key) is not None]
        yield f'{name}: {len(seeds)} complete (seeds {spans(seeds)})' + ('; ' + ', '.join(values)) * bool(values)


def caveats(arms, r, may_differ):
    """What is missing, and what the numbers themselves say against reading too much into them."""
    base, arm, networks, sizes, lines = r['baseline'], r['arms'], {}, [], []
    runs, m = [run for arm in arms.values() for run in arm.values()], max(1, len(r['family']))
    first = runs[0]
    for name, a in arm.items():
        lines += [f'{name} seed {run["seed"]}: {run["status"]}' + f' ({str(run["error"])[:160]})' * bool(run['error'])
                  + '; not in the tables, not in a pair.' for run in a['not_complete']]
        lines += [f'{name}: no run for seed(s) {spans(a["missing"])}, which others have.'] * bool(a['missing'])
    for name, c in r['comparisons'].items():
        lines += [f'{name}: seed(s) {spans(seeds)} of {one} have no complete partner; in the tables, not in the pairs.'
                  for one, seeds in c['unpaired'].items() if seeds and c['n']]
        if c['n'] > 1 and c['planned'] and c['floor'] * m >= ALPHA:
            lines.append(f'{name}: the sign-flip test cannot fall below {num(c["floor"])} with n = {c["n"]}'
                         + f', {num(min(1, c["floor"] * m))} after Holm over {m} comparisons' * (m > 1)
                         + f', so it cannot reach {ALPHA:g}.')
    for name, a in arm.items():
        total, active = (100 * (a[key] / max(1, arm[base][key]) - 1) for key in ('params_total', 'params_active'))
        if max(abs(total), abs(active)) >= 1:
            sizes.append(f'{name} {total:+.1f}% ({active:+.1f}% active)')
        if name != r['again']:
            networks.setdefault(str([a[key] for key in ('attention_class', *COSTS)]), []).append(name)
        unigram = next(iter(arms[name].values()))['data']['unigram_loss']
        if a['values'] and a['val_loss']['mean'] >= unigram:
            lines.append(f'{name}: mean loss {num(a["val_loss"]["mean"])} is not below the {unigram:.4f} of token '
                         'frequencies alone: nothing else was learned.')
    if sizes:
        lines.append(f'Parameters against {base}: {", ".join(sizes)}: a difference in loss is not due to the mechanism '
                     'alone.')
    lines += [f'{", ".join(names)}: the same attention class, parameters and cache. Settings of one network, or one '
              'network.' for names in networks.values() if len(names) > 1]
    if (epochs := tokens_seen(first) / max(1, first['data']['train_tokens'])) > 1:
        lines.append(f'The model saw its training data {epochs:.2f} times: part of the loss is repetition.')
    steps, losses = curve(complete(arms[base]).values())
    if len(steps) > 1 and (fall := float(np.mean(losses[:, -2] - losses[:, -1]))) > 0:
        lines.append(f'{base} was still improving at the end: {num(fall)} nats between its evaluations at steps '
                     f'{steps[-2]} and {steps[-1]}. A longer budget can change the order.')
    lines += [f'environment.{key} differs: {text}.' for key in ('git_commit', 'threads', 'python', 'platform',
                                                                'world_size')
              if (text := differing(runs, 'environment', key))]
    sources = [run['environment']['source_sha256'] for run in runs]
    changed = [ascii(file)[1:-1] for file in sorted(set().union(*sources))
               if any(s.get(file) != sources[0].get(file) for s in sources)]
    lines += [f'The source changed between the runs: {", ".join(changed)}.'] * bool(changed)
    if dirty := [run for run in runs if run['environment'].get('git_dirty')]:
        lines.append(f'From a working tree with uncommitted changes: {who(dirty)}.')
    if first['schema'] == 1:
        lines.append(f'Result files of schema 1: {SCHEMAS[1]}.')
    return lines + ['n counts seeds. One corpus, model size and budget stand behind them all.']


REPORT = """\
# {title}: {label}

`python analyze.py {title}{options}`
{forced}
## Verdicts

{verdicts}

The margin, the smallest difference worth having, is {margin:g} ({unit}); {better} is better. A difference is the first arm
minus the second within pairs of one seed. {tested} p values are corrected over it by Holm and judged
at {alpha:g}; simultaneous intervals by Bonferroni (each at 1 - {alpha:g} / {m}, so that all hold at once with 95%; where a Holm p
below {alpha:g} stands beside one that includes zero, Holm's test is the sharper of the two).
{described}{headline}
## What was compared

- model: {config[n_layer]} layers, width {config[n_embd]}, {config[n_head]} heads, {config[n_expert]} experts of which \
{config[top_k]} are active, feed-forward {config[d_ff]}, context {config[block_size]}
- data: {data[dataset]}, tokenizer {data[tokenizer]}, vocabulary {data[vocab_size]}, {data[train_tokens]} training and \
{data[val_tokens]} validation tokens (sha256 {data[train_sha256]:.12}, {data[val_sha256]:.12})
- reference losses: {data[uniform_loss]:.4f} nats for a guess, {data[unigram_loss]:.4f} from token frequencies
- budget: {config[max_steps]} updates of {config[batch_size]} x {config[block_size]} = {tokens} tokens, {epochs:.2f} \
epochs; {config[optimizer]}, learning rate {config[learning_rate]:g}
- device: {environment[device_name]}, {config[dtype]}, torch {environment[torch]}, threads {environment[threads]}, \
processes {environment[world_size]}

That is {baseline}'s. The arms, with what they do not all share:

{arms_differ}

## Results

Mean ± standard deviation over complete runs.

{results}

Memory: {memory}. Cache: all layers, at 2 bytes a number. Unbeaten, by means alone: no other arm is as good in both
{label} and that cost and better in one.

{unbeaten_on}

## Paired differences

{differences}

p: paired t test, two-sided. Holm: over {m} comparison(s). Sign-flip: permutation test, floor 2/2^n; past {exact} pairs from
{sampled} drawn patterns. Every single difference ({unit}):

{singles}

## Effect sizes

{effects}

d divides the mean difference by the pooled sd of the two groups, d_z by the sd of the differences; g is d without its
small-sample bias (Hedges 1981; for pooled d with 2(n-1)/(1+r^2) degrees of freedom, Cousineau 2020). The intervals are
for the population's value: noncentral t inverted (Steiger & Fouladi 1997), for pooled d rescaled (Algina & Keselman 2003).

## Equivalence, and what this n can see

{sensitivity}

r: correlation of the pairs. TOST: two one-sided t tests against the margin. Detectable: the true difference that a
two-sided paired t test finds with {power:.0%} power if the sd is the one observed; beside it the pairs that a difference of
the margin needs. Both at alpha = {alpha:g} / {m}, the first step of Holm; power from the noncentral t.

## Early and late

{early}

Validation loss at the first evaluation and at the last, and their correlation over seeds. An r near 1 beside a large
sd: the seeds were sorted by then, as where leaving a plateau is a matter of luck, and the end shows who left it first.

## Expert balance

{balance}

Load relative to an even share in the worst layer, mean over runs. Even use of {config[n_expert]} experts has an entropy of \
{entropy:.3f} nats.

## Caveats

{caveats}
{figures}"""


def report(arms, r, title, options=(), problems=(), may_differ=(), pictures=()):
    """The whole report as Markdown text.

    options: the flags that made it. problems: what disagreements() found and --force=True went past. pictures: file
    and caption of the figures that lie beside it; the first is shown first.
    """
    cs, a, m = r['comparisons'], r['arms'], max(1, len(r['family']))
    first, planned = next(iter(arms[r['baseline']].values())), lambda c, cells: cells if c['planned'] else '-' * len(cells)
    have, several = ({name: c for name, c in cs.items() if c['n'] > least} for least in (0, 1))
    by_seed = {name: dict(zip(c['seeds'], c['d'])) for name, c in have.items()}
    described = [c['sentence'] for c in cs.values() if not c['planned']]
    memory = {str(run['final'].get('peak_memory_kind')) for arm in arms.values() for run in complete(arm).values()}
    what = 'planned contrasts' if r['contrasts'] else f'comparisons with {r["baseline"]}'
    return REPORT.format(
        **r | {key: first[key] for key in ('config', 'data', 'environment')}, title=title, m=m, alpha=ALPHA, power=POWER,
        exact=EXACT_FLIPS, sampled=SAMPLED_FLIPS, options=''.join(f' {option}' for option in options),
        tokens=tokens_seen(first), epochs=tokens_seen(first) / max(1, first['data']['train_tokens']),
        entropy=math.log(max(1, first['config']['n_expert'])), memory=' and '.join(sorted(memory)) or 'unknown',
        tested=f'The {len(r["family"])} {what} are one family:',
        forced='\n**These runs are not comparable; the report was forced. They disagree in**\n\n' * bool(problems)
        + bullets(problems) + '\n' * bool(problems),
        verdicts=bullets([c['sentence'] for c in cs.values() if c['planned']] or ['nothing to compare']),
        described='\nNot in the family: described, not tested, each interval by itself.\n\n' * bool(described)
        + bullets(described) + '\n' * bool(described),
        headline=''.join(f'\n![{caption}]({file})\n' for file, caption in pictures[:1]),
        figures='\n## Figures\n' * (len(pictures) > 1) + ''.join(f'\n![{text}]({file})\n' for file, text in pictures[1:]),
        arms_differ=bullets(what_differs(arms, may_differ)), caveats=bullets(caveats(arms, r, may_differ)),
        results=table('Configuration | n | Val Loss | Val Perp | bits/byte | Peak Mem (GB) | Params (M) | Active (M) | '
                      'Cache B/token', {name: [
                          len(x['seeds']), mean_sd(x['val_loss'], 4), mean_sd(x['val_perplexity'], 2),
                          mean_sd(x['val_bits_per_byte'], 4), mean_sd(x['peak_memory_gb'], 2),
                          num(x['params_total'] / 1e6, 3), num(x['params_active'] / 1e6, 3),
                          num(x['kv_cache_bytes_per_token_16bit'], 0)] for name, x in a.items()}),
        unbeaten_on=bullets(f'on {text}: {", ".join(r["unbeaten"][cost]) or "-"}' for cost, text in COSTS.items()),
        differences=table(f'Comparison | n | mean d ({r["unit"]}) | % | 95% interval | simultaneous | p | p (Holm) | '
                          'sign-flip p | its floor | sign-flip p (Holm) | verdict', {name: [
                              c['n'], num(c['mean'], 4, True), num(c['percent'], 2, True),
                              interval_text(c['low'], c['high']), *planned(c, [
                                  interval_text(c['low_all'], c['high_all']), p_text(c['p']), p_text(c['p_holm']),
                                  p_text(c['sign_flip']), p_text(c['floor']), p_text(c['sign_flip_holm'])]),
                              c['verdict']] for name, c in have.items()}),
        singles=table(' | '.join(['Seed', *have]), {seed: [num(d.get(seed), 4, True) for d in by_seed.values()]
                                                    for seed in sorted(set().union(*by_seed.values()))}),
        effects=table('Comparison | n | d (pooled sd) | Hedges g | 95% interval | d_z (pairs) | Hedges g_z | 95% interval', {
            name: [c['n'], num(c['d_pooled'], 2, True), num(c['g_pooled'], 2, True),
                   interval_text(c['d_pooled_low'], c['d_pooled_high'], 2), num(c['d_z'], 2, True),
                   num(c['g_z'], 2, True), interval_text(c['d_z_low'], c['d_z_high'], 2)] for name, c in several.items()}),
        sensitivity=table(f'Comparison | n | sd of d | r | TOST p | TOST p (Holm) | detectable ({r["unit"]}) | '
                          f'n for {r["margin"]:g}', {name: [
                              c['n'], num(c['sd']), num(c['correlation'], 2, True),
                              *planned(c, [p_text(c['tost']), p_text(c['tost_holm'])]), num(c['detectable']),
                              '-' if c['constant'] else c['needed_n'] or f'> {MOST_SEEDS}'] for name, c in several.items()}),
        early=table('Configuration | n | first, at step | last, at step | r', {
            name: [e['first']['n'], *(f'{mean_sd(e[key], 4)}, {step}' for key, step in zip(('first', 'last'), e['steps'])),
                   num(e['r'], 2, True)] for name, x in a.items() if (e := x['early'])}),
        balance=table('Configuration | n | busiest / even | idlest / even | largest excess | router entropy (nats) | '
                      'balance loss | z loss', {name: [
                          len(x['seeds']), num(max(map(max, x['load_by_rank']), default=None), 2),
                          num(min(map(min, x['load_by_rank']), default=None), 2), mean_sd(x['max_violation'], 3),
                          mean_sd(x['router_entropy'], 3), mean_sd(x['balance_loss'], 4), mean_sd(x['z_loss'], 4)]
                          for name, x in a.items()}))


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates

def compare_rates(arms, metric):
    """Runs named ARM@RATE -> {arm: {rate: mean of its complete runs, or the status that they have instead}}."""
    grid = {}
    for run in [run for runs in arms.values() for run in runs.values()]:
        rates = grid.setdefault(run['name'].partition('@')[0], {})
        rates.setdefault(run['config']['learning_rate'], []).append(run)
    return {arm: {rate: summary(values)['mean'] if (values := [
        run['final'][metric] for run in rates[rate] if run['status'] == 'complete' and run['final'][metric] is not None])
        else rates[rate][0]['status'] for rate in sorted(rates)} for arm, rates in grid.items()}


def report_rates(arms, grid, metric, title, options, problems, pictures):
    """Arm x rate as Markdown, each arm's best in bold, and where it lies at the edge of the grid."""
    every, rows, lines = sorted({rate for rates in grid.values() for rate in rates}), {}, []
    label, unit, better = METRICS[metric]
    for arm, rates in grid.items():
        done = {rate: x for rate, x in rates.items() if not isinstance(x, str)}
        best = (min if better == 'lower' else max)(done, key=done.get, default=None)
        rows[arm] = [x if isinstance(x := rates.get(rate, '-'), str) else f'**{num(x)}**' if rate == best else num(x)
                     for rate in every]
        edges = ['lowest'] * (best == min(rates)) + ['highest'] * (best == max(rates))
        lines.append(f'{arm}: ' + ('no complete run.' if best is None else f'best at {best:g}' + (
            f', the {" and ".join(edges)} of its grid: there may be a better one beyond.' if edges else '.')))
    runs = [run for runs in arms.values() for run in runs.values()]
    return '\n\n'.join([
        f'# {title}: {label} by learning rate', f'`python analyze.py {title}{"".join(f" {x}" for x in options)}`',
        *(['**These runs are not comparable; they disagree in**', bullets(problems)] if problems else []),
        table(f'Configuration | {" | ".join(f"{rate:g}" for rate in every)}', rows),
        f'{label.capitalize()} ({unit}) after {runs[0]["config"]["max_steps"]} updates, seed(s) '
        f'{spans({run["seed"] for run in runs})}; the best of each in bold.', bullets(lines),
        *(f'![{caption}]({file})' for file, caption in pictures)]) + '\n'


# ---------------------------------------------------------------------------------------------------------------------
# The program

STYLE = """\
:root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } li { margin: .4rem 0 } p, li, code { overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8886 }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; background: #fff; border-radius: 6px }
figure { margin: 1.5rem 0 } figcaption { font-size: 14px; opacity: .8 }"""


def page(text, folder):
    """The report's Markdown (headings, lists, tables, pictures, paragraphs) as one HTML file, pictures of the folder inside."""
    def inline(text):
        text = re.sub(r'`(.+?)`', r'<code>\1</code>', html.escape(text, quote=False))
        return re.sub(r'\*\*(.+?)\*\*', r'<b>\1</b>', text)

    def row(line, tag):
        cells = re.split(r'(?<!\\) \| ', line[2:-2])
        return f'<tr>{"".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in cells)}</tr>'.replace('\\|', '|')
    body = []
    for block in re.split(r'\n\n+', text.strip()):
        lines = block.split('\n')
        if heading := re.match(r'(#+) (.*)', block):
            body.append(f'<h{len(heading[1])}>{inline(heading[2])}</h{len(heading[1])}>')
        elif picture := re.match(r'!\[(.*)\]\((.*)\)', block):
            with open(os.path.join(folder, picture[2]), 'rb') as file:
                data = base64.b64encode(file.read()).decode()
            body.append(f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(picture[1])}">'
                        f'<figcaption>{inline(picture[1])}</figcaption></figure>')
        elif block.startswith('| '):
            body.append(f'<div class="wide"><table>{row(lines[0], "th")}'
                        + ''.join(row(line, 'td') for line in lines[2:]) + '</table></div>')
        elif block.startswith('- '):
            body.append('<ul>' + ''.join(f'<li>{inline(line[2:])}</li>' for line in lines) + '</ul>')
        else:
            body.append(f'<p>{inline(block)}</p>')
    return (f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
            f'<title>{html.escape(text.splitlines()[0][2:])}</title>\n<style>\n{STYLE}\n</style>\n' + '\n'.join(body) + '\n')


def rounded(x):
    """For report.json: 12 significant digits, so that another machine's last bit does not show."""
    if isinstance(x, dict):
        return {str(key): rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return float(f'{x:.12g}') if isinstance(x, float) else x


def folder_of(runs):
    return runs if os.path.isdir(runs) else os.path.dirname(runs) or '.'


def options_of(runs, arguments):
    """The flags in options.json beside the runs, but for those that the command line gives."""
    try:
        with open(os.path.join(folder_of(runs), 'options.json'), encoding='utf-8') as file:
            options = json.load(file)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        fail(f'{runs}/options.json: {error}')
    name = lambda flag: str(flag).partition('=')[0]                     # noqa: E731
    return [flag for flag in options if name(flag) not in map(name, arguments)]


def arms_of(contrasts, arms):
    """['mla48:mqa'] -> [('mla48', 'mqa')]; fails unless both are arms."""
    pairs = [tuple(text.split(':')) for text in contrasts]
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            fail(f'--contrasts: {":".join(pair)} is not FIRST:SECOND, two arms')
        for name in pair:
            if name not in arms:
                fail(f'--contrasts: no runs named {name}' + did_you_mean(name, list(arms)) + f'; there are {", ".join(arms)}')
    return list(dict.fromkeys(pairs))


def main(runs, baseline, metric, margin, contrasts, may_differ, rates, force, plots, out, options=()):
    if margin <= 0:
        fail(f'--margin={margin:g}: must be above 0, it is the smallest difference worth having')
    arms = load(runs, None if rates else baseline)
    contrasts = [] if rates else arms_of(contrasts, arms)
    every = [run for arm in arms.values() for run in arm.values()]
    known = {*DEFAULTS, *(key for run in every for part in ('config', 'data', 'environment') for key in run[part])}
    for key in set(may_differ) - known:
        fail(f'--may_differ: no knob {key}' + did_you_mean(key, sorted(known)))
    problems = disagreements(arms, baseline, [*may_differ, *['learning_rate'] * rates], metric)
    if problems and not force:
        fail(f'{runs}: not comparable (--force=True reports all the same): ' + ' | '.join(problems))
    folder = out or folder_of(runs)
    title, problem = os.path.basename(os.path.abspath(folder_of(runs))), None
    r = compare_rates(arms, metric) if rates else compare(arms, baseline, metric, margin, contrasts)
    try:
        os.makedirs(folder, exist_ok=True)
        pictures = draw({name: complete(arm) for name, arm in arms.items()}, r, folder) if plots else []
    except OSError as error:
        pictures, problem = [], error
    text = (report_rates(arms, r, metric, title, options, problems, pictures) if rates
            else report(arms, r, title, options, problems, may_differ, pictures))
    data = json.dumps(rounded({'rates': r} if rates else {**r, 'disagreements': problems}), indent=1, allow_nan=False) + '\n'
    try:
        for name, content in [('report.md', text), ('report.json', data), ('report.html', page(text, folder))]:
            with open(os.path.join(folder, name), 'w', encoding='utf-8', errors='backslashreplace', newline='\n') as f:
                f.write(content)
    except OSError as error:
        problem = error
    sys.stdout.reconfigure(encoding='utf-8', errors='backslashreplace')
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends the program, all is written by now
    print(text, end='', flush=True)
    if problem:
        fail(f'{problem.filename or folder}: the report cannot be written ({problem.strerror}); --out=FOLDER takes another')


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # what to read
    runs = 'out/laptop'         # a folder with result.json or <name>-s<seed>.json at any depth, or one file
    # what to claim
    baseline = 'baseline'       # the name that the others are compared against
    contrasts = []              # planned comparisons FIRST:SECOND,...; none: each arm against the baseline
    metric: Literal['val_loss', 'val_bits_per_byte', 'val_accuracy'] = 'val_loss'   # the number compared
    margin = 0.01               # smallest difference worth having, in the metric's unit; choose it first
    may_differ = []             # knobs in which arms may differ besides the variant's, as in learning_rate,d_ff
    force = False               # report on runs that are not comparable; it then says what they disagree in
    rates = False               # instead: each arm's best learning rate, of runs named ARM@RATE
    # output
    plots = True                # draw the figures too; needs matplotlib
    out = ''                    # folder of the report; empty: where the runs are
    # -----------------------------------------------------------------------------
    usual = dict(globals())
    configure(globals(), positional='runs')
    values = configure(globals(), positional='runs', argv=[*options_of(runs, sys.argv[1:]), *sys.argv[1:]])
    main(**values, options=[f'--{name}={as_text(value)}' for name, value in values.items()
                            if value != usual[name] and name not in ('runs', 'plots', 'out')])
