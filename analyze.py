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
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from configurator import configure, did_you_mean, fail, say
from figures import curve, draw
from result import SCHEMAS, VARIANT, complete, differing, disagreements, load, spans, who
from stats import ALPHA, MOST_FLIPPED, MOST_SEEDS, POWER, correlation, holm, needed_n, paired, summary

METRICS = {'val_loss': {'label': 'validation loss', 'unit': 'nats'},        # final.<metric>; lower is better
           'val_bits_per_byte': {'label': 'validation bits per byte', 'unit': 'bits/byte'}}
COSTS = 'params_total', 'params_active', 'kv_cache_bytes_per_token_16bit'      # model.<cost>
MEASURED = [*METRICS, 'val_perplexity', 'peak_memory_gb', 'max_violation', 'router_entropy', 'balance_loss', 'z_loss']


# ---------------------------------------------------------------------------------------------------------------------
# Comparison

def compare(arms, baseline, metric, margin, contrasts=(), pairs=0):
    """{arm: {seed: run}} -> every number and verdict of the report, as one dict that JSON can hold.

    contrasts: pairs of arms. If there are any, they alone are tested, as one family; those without runs yet count too, so
    that no verdict changes when they come. If there are none, every arm is tested against the baseline that has two
    pairs, or may still get them. pairs: how many pairs of seeds a comparison was planned to have. Until they are there it
    has no verdict and counts in Holm as p = 1: whoever looks after each pair and stops when it suits finds differences
    that are not there far more often than p says.
    """
    again, finals = f'{baseline}-again', {name: complete(arm) for name, arm in arms.items()}
    values = {name: {seed: run['final'][metric] for seed, run in runs.items()} for name, runs in finals.items()}
    against = [(name, baseline) for name in arms if name != baseline]
    planned = list(contrasts) or [pair for pair in against if pair[0] != again]         # A/A is no hypothesis
    shared = {(a, b): sorted(set(values.get(a, ())) & set(values.get(b, ()))) for a, b in [*planned, *against]}
    family = [f'{a} - {b}' for a, b in planned if contrasts or pairs or len(shared[a, b]) > 1]
    diverged = {name: [seed for seed, run in arm.items() if run['status'] == 'diverged'] for name, arm in arms.items()}
    r = {'schema': 2, 'baseline': baseline, 'again': again, 'metric': metric, 'margin': margin, 'family': family,
         'tests': max(1, len(family)), 'contrasts': bool(contrasts), 'pairs': pairs, **METRICS[metric],
         'arms': {}, 'comparisons': {}}
    every_seed = set().union(*arms.values())
    for name, arm in arms.items():
        runs, model = finals[name], first(arm)['model']
        r['arms'][name] = {
            'seeds': list(runs), 'values': list(values[name].values()), 'missing': sorted(every_seed - set(arm)),
            'not_complete': [{'seed': seed, 'status': run['status'], 'error': run.get('error')}
                             for seed, run in arm.items() if seed not in runs],
            **{key: model[key] for key in ('attention_class', *COSTS)},
            **{key: summary([run['final'][key] for run in runs.values() if run['final'][key] is not None])
               for key in MEASURED},
            'early': early(runs.values()), 'extremes': extremes(runs.values())}
    for (a, b), seeds in shared.items():
        c = paired([values[a][seed] for seed in seeds], [values[b][seed] for seed in seeds], margin, r['tests'])
        if (a, b) not in planned:
            c.update(dict.fromkeys(('low_all', 'high_all', 'p', 'sign_flip', 'floor', 'tost')))
        lost = {name: diverged[name] for name in (a, b) if diverged.get(name)}
        to_come = max(0, pairs - len({*seeds}.union(*lost.values()))) if (a, b) in planned else 0
        r['comparisons'][f'{a} - {b}'] = {'arms': [a, b], 'planned': (a, b) in planned, 'seeds': seeds,
                                          'to_come': to_come, 'diverged': lost, **c}
    for key in ('p', 'sign_flip', 'tost'):
        tested = (r['comparisons'][name] for name in family)
        adjusted = dict(zip(family, holm([None if c['to_come'] else c[key] for c in tested])))
        for name, c in r['comparisons'].items():
            c[f'{key}_holm'] = adjusted.get(name)
    for c in r['comparisons'].values():
        c['verdict'], c['sentence'] = verdict(c, r)
    return r


def first(arm):
    return next(iter(arm.values()))


def early(runs):
    """Loss at the first evaluation after an update, which all the runs share, and at the last; None without two."""
    steps, losses = curve(runs)
    start = int(0 in steps)
    if len(steps) < 2 + start:
        return None
    sooner, later = losses[:, start].tolist(), losses[:, -1].tolist()
    return {'steps': [steps[start], steps[-1]], 'first': summary(sooner), 'last': summary(later),
            'r': correlation(sooner, later)}


def extremes(runs):
    """Load of the busiest and of the idlest expert of any layer, relative to an even share, mean over runs, or Nones.

    Sorted before averaging: expert 3 of one seed has nothing to do with expert 3 of another.
    """
    loads = [np.array(run['final']['expert_load'], dtype=float) for run in runs]           # (layers, experts) each
    if len({load.shape for load in loads}) != 1 or not loads[0].size:       # no runs, no experts, or forced unlike runs
        return [None, None]
    ranked = np.mean([np.sort(load / load.mean(1, keepdims=True), axis=1) for load in loads], axis=0)
    return [float(ranked.max()), float(ranked.min())]


def verdict(c, r):
    """(verdict, one sentence), by the first of these that holds, so that each comparison gets exactly one:

    descriptive   not in the family: nothing is claimed
    not tested    no pair, or one
    undecided     pairs that were planned are still to come
    undecided     runs diverged, so the pairs that are left are those that went well; but not if the arm that diverged is
                  measurably worse even so
    equivalent    no run diverged, and TOST puts the true difference within the margin (Holm p < 0.05), or every d_i is
                  exactly 0. Asked before better and worse: inside the margin a difference is not worth having, even if it
                  is surely not zero
    better/worse  the paired t test rejects zero (Holm p < 0.05)
    undecided     neither; with the n that would find, at 80% power, a difference of the margin or, with that many
                  pairs already, one of the size observed

    The interval of a tested comparison is corrected over the family (Bonferroni), as its p value is (Holm).
    """
    (name, base), n, m, unit, margin = c['arms'], c['n'], r['tests'], r['unit'], r['margin']
    alone, low, high = interval_text(c['low'], c['high']), c['low_all'], c['high_all']
    if not c['planned'] and name == r['again'] and n:
        same = 'from the machine alone' if any(c['d']) else 'the same to 12 digits'
        return 'descriptive', (f'{name} repeats {n} seed(s) of {base}: largest difference '
                               f'{num(max(map(abs, c["d"])))} {unit}, {same}.')
    if not c['planned']:
        found = f'{num(c["mean"], 4, True)} {unit} (95% interval {alone}, n = {n} pairs)' if n else 'no complete pair'
        return 'descriptive', f'{name} - {base}: {found}.'
    if waiting := [arm for arm in c['arms'] if arm not in r['arms']]:
        return 'not tested', f'{name} - {base}: not tested: no runs of {" and ".join(waiting)}.'
    if n < 2:
        why = 'one pair has no standard deviation, so no interval, no test and no effect size'
        return 'not tested', f'{name} - {base}: not tested (n = {n}): {why if n else "no complete pair"}.'
    within = f'{"simultaneous " * (m > 1)}95% interval {interval_text(low, high)}'
    so_far, interval = f'{num(c["mean"], 4, True)} {unit} ({within})', f'{within}, n = {n} pairs'
    if c['to_come']:
        return 'undecided', (f'{name}: undecided against {base}: {n} of {r["pairs"]} planned pairs, so far {so_far}; a '
                             f'verdict waits for the other {c["to_come"]}.')
    how, size, holm_p = 'lower' if c['mean'] < 0 else 'higher', num(abs(c['mean'])), f'Holm p {p_text(c["p_holm"])}'
    measurable = c['p_holm'] is not None and c['p_holm'] < ALPHA
    if c['diverged'] and not (measurable and [*c['diverged']] == [name if how == 'higher' else base]):
        why = ' and '.join(f'{arm} diverged with seed(s) {spans(seeds)}' for arm, seeds in c['diverged'].items())
        return 'undecided', (f'{name}: undecided against {base}: {why}, and the {n} pairs that are left, {so_far}, are of '
                             'runs that went well.')
    if c['constant']:
        word, why = (('undecided', ', so there is no spread to test them against.') if c['mean']
                     else ('equivalent', '; was it the same network?'))
        all_same = f'all {n} paired differences from {base} are {num(c["mean"], 4, True)} {unit}'
        return word, f'{name}: {word}: {all_same}{why}'
    if c['tost_holm'] < ALPHA and not c['diverged']:
        return 'equivalent', (f'{name}: equivalent to {base}: within {margin:g} {unit} (TOST with Holm, p '
                              f'{p_text(c["tost_holm"])}; {interval})'
                              + f', though measurably {how} ({holm_p})' * measurable + '.')
    if measurable:
        word = 'better' if how == 'lower' else 'worse'
        worth = ('lies wholly beyond the margin' if low * high > 0 and min(abs(low), abs(high)) >= margin
                 else 'reaches inside the margin: perhaps too little to matter')
        return word, (f'{name}: {word} than {base}: {r["label"]} {size} {unit} {how} ({interval}; {holm_p}); the '
                      f'interval {worth}.')
    wanted, what = c['needed_n'], f'{margin:g} {unit}'
    if wanted is not None and wanted <= n:
        wanted, what = needed_n(c['d_z'], ALPHA / m), f'one as small as observed, {size} {unit},'
    about = f'about n = {wanted}' if wanted else f'more than n = {MOST_SEEDS}'
    ruled_out = f'neither zero nor a difference of {margin:g} {unit} is ruled out ({interval})'
    if low > -margin or high < margin:                      # one side is settled; both would have been equivalence
        gone, left = ('better', 'worse') if low > -margin else ('worse', 'better')
        ruled_out = (f'{gone} by {margin:g} {unit} or more is ruled out; no difference, or {left} by as much, is still '
                     f'possible ({interval})')
    if c['p'] < ALPHA:
        ruled_out = (f'its interval by itself excludes zero ({alone}; p {p_text(c["p"])}), but not after correction '
                     f'over {m} comparisons ({interval}; {holm_p})')
    return 'undecided', (f'{name}: undecided against {base}: {ruled_out}; {about} would be needed to find {what} with '
                         f'{POWER:.0%} power, if the sd is the one observed.')


# ---------------------------------------------------------------------------------------------------------------------
# Report: fixed formats, a fixed order, nothing of the clock or of where the files lie

def num(x, digits=4, sign=False):
    """Fixed decimals, '-' for None. To four digits and more, what is not zero does not read as zero."""
    if x is None:
        return '-'
    if x and digits >= 4 and round(abs(x), digits) == 0:
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
    """Markdown, first column to the left, numbers to the right. head: titles; rows: {first: rest}."""
    lines = [head, ['---'] + ['--:'] * (len(head) - 1), *([first, *rest] for first, rest in rows.items())]
    return '\n'.join('| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in line) + ' |' for line in lines)


def what_differs(arms, may_differ):
    """A line per arm: its complete runs, and its value of each knob, and fact of its data, that not all arms share."""
    ones = {name: first(arm) for name, arm in arms.items()}
    named = {'config': {*VARIANT, *may_differ}, 'data': {'tokenizer', 'vocab_size', *may_differ}}
    keys = dict.fromkeys((part, key) for part in named for run in ones.values() for key in run[part] if key in named[part])
    keys = [(part, key) for part, key in keys if differing(ones.values(), part, key)]
    for name, run in ones.items():
        seeds = complete(arms[name])
        values = [f'{key} {run[part][key]}' for part, key in keys if run[part].get(key) is not None]
        yield f'{name}: {len(seeds)} complete (seeds {spans(seeds)})' + ('; ' + ', '.join(values)) * bool(values)


def epochs(run):
    tokens = run['config']['max_steps'] * run['config']['batch_size'] * run['config']['block_size']
    return tokens, tokens / max(1, run['data']['train_tokens'])


def caveats(arms, r):
    """What is missing, and what the numbers themselves say against reading too much into them."""
    base, m = r['baseline'], r['tests']
    runs = [run for arm in arms.values() for run in arm.values()]
    for name, arm in r['arms'].items():
        for run in arm['not_complete']:
            error = f' ({str(run["error"])[:160]})' if run['error'] else ''
            yield f'{name} seed {run["seed"]}: {run["status"]}{error}; not in the tables, not in a pair.'
        if arm['missing']:
            yield f'{name}: no run for seed(s) {spans(arm["missing"])}, which others have: not in its pairs.'
        unigram = first(arms[name])['data']['unigram_loss']
        if arm['values'] and arm['val_loss']['mean'] >= unigram:
            yield (f'{name}: mean loss {num(arm["val_loss"]["mean"])} is not below the {unigram:.4f} of token '
                   'frequencies alone: nothing else of this validation text was learned.')
    if more := [f'{name} ({c["n"]})' for name, c in r['comparisons'].items() if c['planned'] and 0 < r['pairs'] < c['n']]:
        yield (f'More pairs than the {r["pairs"]} planned: {", ".join(more)}. If some were added after a look at the others, '
               'p values are too small and intervals too narrow.')
    for n, floor in sorted({(c['n'], c['floor']) for c in r['comparisons'].values() if c['floor']}):
        if floor * m >= ALPHA:
            yield (f'The sign-flip test cannot fall below {num(floor)} with n = {n}'
                   + f', {num(min(1, floor * m))} after Holm over {m} comparisons' * (m > 1)
                   + f', so it cannot reach {ALPHA:g}.')
    sizes = {name: [100 * (arm[key] / max(1, r['arms'][base][key]) - 1) for key in ('params_total', 'params_active')]
             for name, arm in r['arms'].items()}
    if unlike := [f'{name} {total:+.1f}% ({active:+.1f}% active)' for name, (total, active) in sizes.items()
                  if max(abs(total), abs(active)) >= 1]:
        yield (f'Parameters against {base}: {", ".join(unlike)}: a difference in loss need not be due to the '
               'mechanism alone.')
    if epochs(runs[0])[1] > 1:
        yield f'The model saw its training data {epochs(runs[0])[1]:.2f} times: part of the loss is repetition.'
    steps, losses = curve(complete(arms[base]).values())
    if len(steps) > 1 and (fall := float(np.mean(losses[:, -2] - losses[:, -1]))) > 0:
        yield (f'{base} was still improving at the end: {num(fall)} nats between its evaluations at steps '
               f'{steps[-2]} and {steps[-1]}. A longer budget can change the order.')
    warmup, budget = runs[0]['config']['warmup_steps'], runs[0]['config']['max_steps']
    if warmup >= budget:
        yield f'The learning rate was still rising at the end: {warmup} updates of warm-up, {budget} in all.'
    for field in ('environment.git_commit environment.device_name environment.torch environment.threads '
                  'environment.python environment.platform environment.world_size config.micro_batch_size config.compile '
                  'config.shard').split():
        if text := differing(runs, *field.split('.')):
            yield f'{field} differs: {text}.'
    sources = [run['environment']['source_sha256'] for run in runs]
    if changed := [ascii(file)[1:-1] for file in sorted(set().union(*sources))
                   if any(s.get(file) != sources[0].get(file) for s in sources)]:
        yield f'The source changed between the runs: {", ".join(changed)}.'
    if dirty := [run for run in runs if run['environment'].get('git_dirty')]:
        yield f'From a working tree with uncommitted changes: {who(dirty)}.'
    if moved := [run for run in runs if run.get('earlier_environments')]:
        yield f'Begun in another environment than they ended in (earlier_environments): {who(moved)}.'
    if runs[0]['schema'] == 1:
        yield f'Result files of schema 1: {SCHEMAS[1]}.'
    yield 'n counts seeds. One corpus, model size and budget stand behind them all.'


# of one run, {**config, **data, **environment, 'tokens': ..., 'epochs': ...}
COMPARED = """\
- model: {n_layer} layers, width {n_embd}, {n_head} heads, {n_expert} experts of which {top_k} are active, \
feed-forward {d_ff}, context {block_size}
- data: {dataset}, tokenizer {tokenizer}, vocabulary {vocab_size}, {train_tokens} training and {val_tokens} validation \
tokens (sha256 {train_sha256:.12}, {val_sha256:.12})
- reference losses: {uniform_loss:.4f} nats for a guess, {unigram_loss:.4f} from token frequencies
- budget: {max_steps} updates of {batch_size} x {block_size} = {tokens} tokens, {epochs:.2f} epochs; {optimizer}, \
learning rate {learning_rate:g}
- device: {device_name}, {dtype}, torch {torch}, threads {threads}, processes {world_size}"""


def report(arms, r, may_differ=(), images=()):
    """The report below its title, as the blocks of its Markdown. images: those that show the figures."""
    cs, a, base, m, unit, margin = r['comparisons'], r['arms'], r['baseline'], r['tests'], r['unit'], r['margin']
    have, several = ({name: c for name, c in cs.items() if c['n'] > least} for least in (0, 1))
    run = first(arms[base])
    tokens, share = epochs(run)

    yield '## Verdicts'
    yield bullets([c['sentence'] for c in cs.values() if c['planned']] or ['nothing to compare'])
    what = 'planned contrasts' if r['contrasts'] else f'comparisons with {base}'
    family = 'One comparison at most is tested: nothing is corrected.' if m == 1 else (
        f'The {m} {what} are one family: p values are corrected over it by Holm, simultaneous intervals by Bonferroni, '
        'so that all hold at once with 95%. Holm finds a little more than these intervals: a difference where one still '
        'includes zero. Tests of zero and of equivalence are corrected each by themselves: if differences are normally '
        f'distributed, the probability that any verdict is wrong is at most {2 * ALPHA:.0%}.')
    family += (' Equivalence is tested on each side by itself, so it can be found where an interval, which has two sides, '
               'leaves the margin.')
    if r['pairs']:
        family += (f' The plan has {r["pairs"]} pair{"s" * (r["pairs"] != 1)} a comparison: with fewer it waits for its '
                   'verdict, and counts in Holm as p = 1.')
    yield (f'The margin, the smallest difference worth having, is {margin:g} ({unit}); lower is better. A '
           f'difference is the first arm minus the second within pairs of one seed. p values are judged at {ALPHA:g}. '
           + family)
    if described := [c['sentence'] for c in cs.values() if not c['planned']]:
        yield 'Not in the family: described, not tested, each interval by itself.'
        yield bullets(described)
    yield from images[:1]

    yield '## What was compared'
    yield COMPARED.format(**{**run['config'], **run['data'], **run['environment'], 'tokens': tokens, 'epochs': share})
    yield f'That is {base}\'s. The arms, with what they do not all share:'
    yield bullets(what_differs(arms, may_differ))

    yield '## Results'
    yield 'Mean ± standard deviation over complete runs.'
    yield table(['Configuration', 'n', 'Val Loss', 'Val Perp', 'bits/byte', 'Peak Mem (GB)', 'Params (M)', 'Active (M)',
                 'Cache B/token'], {
        name: [len(x['seeds']), mean_sd(x['val_loss'], 4), mean_sd(x['val_perplexity'], 2),
               mean_sd(x['val_bits_per_byte'], 4), mean_sd(x['peak_memory_gb'], 2), num(x['params_total'] / 1e6, 3),
               num(x['params_active'] / 1e6, 3), num(x['kv_cache_bytes_per_token_16bit'], 0)] for name, x in a.items()})
    memory = {str(run['final'].get('peak_memory_kind')) for arm in arms.values() for run in complete(arm).values()}
    yield f'Memory: {" and ".join(sorted(memory)) or "unknown"}. Cache: all layers, at 2 bytes a number.'

    if have:
        yield '## Paired differences'
        yield table(['Comparison', 'n', f'mean d ({unit})', '%', '95% interval', 'simultaneous', 'p', 'p (Holm)',
                     'sign-flip p', 'its floor', 'sign-flip p (Holm)', 'verdict'], {
            name: [c['n'], num(c['mean'], 4, True), num(c['percent'], 2, True), interval_text(c['low'], c['high']),
                   interval_text(c['low_all'], c['high_all']), *(p_text(c[key]) for key in (
                       'p', 'p_holm', 'sign_flip', 'floor', 'sign_flip_holm')), c['verdict']] for name, c in have.items()})
        yield (f'p: paired t test, two-sided. Holm: over {m} comparison(s). Sign-flip: permutation test, floor 2/2^n, up to '
               f'{MOST_FLIPPED} pairs. Every single difference ({unit}):')
        by_seed = {name: dict(zip(c['seeds'], c['d'])) for name, c in have.items()}
        yield table(['Seed', *have], {seed: [num(d.get(seed), 4, True) for d in by_seed.values()]
                                      for seed in sorted(set().union(*by_seed.values()))})

    if several:
        yield '## Effect sizes'
        yield table(['Comparison', 'n', 'd (pooled sd)', 'Hedges g', '95% interval', 'd_z (pairs)', 'Hedges g_z',
                     '95% interval'], {
            name: [c['n'], num(c['d_pooled'], 2, True), num(c['g_pooled'], 2, True),
                   interval_text(c['d_pooled_low'], c['d_pooled_high'], 2), num(c['d_z'], 2, True), num(c['g_z'], 2, True),
                   interval_text(c['d_z_low'], c['d_z_high'], 2)] for name, c in several.items()})
        yield ('d divides the mean difference by the pooled sd of the two groups, d_z by the sd of the differences; g is d '
               'without its small-sample bias. The intervals are for the population\'s value.')

        yield '## Equivalence, and what this n can see'
        yield table(['Comparison', 'n', 'sd of d', 'r', 'TOST p', 'TOST p (Holm)', f'detectable ({unit})',
                     f'n for {margin:g}'], {
            name: [c['n'], num(c['sd']), num(c['correlation'], 2, True), p_text(c['tost']), p_text(c['tost_holm']),
                   num(c['detectable']), '-' if c['constant'] else c['needed_n'] or f'> {MOST_SEEDS}']
            for name, c in several.items()})
        yield ('r: correlation of the pairs. TOST: two one-sided t tests against the margin. Detectable: the true difference '
               f'that a paired t test at {ALPHA:g} / {m}, the first step of Holm, finds with {POWER:.0%} power if the sd is '
               'the one observed; beside it the pairs that a difference of the margin needs.')

    if both_ends := {name: x['early'] for name, x in a.items() if x['early']}:
        yield '## Early and late'
        yield table(['Configuration', 'n', 'first, at step', 'last, at step', 'r'], {
            name: [e['first']['n'], *(f'{mean_sd(e[key], 4)}, {step}' for key, step in zip(('first', 'last'), e['steps'])),
                   num(e['r'], 2, True)] for name, e in both_ends.items()})
        yield ('Validation loss, and its correlation over seeds. Where r is near 1 and the sd large, the start decided: some '
               'seeds left a plateau earlier than others, by luck, and kept their lead.')

    yield '## Expert balance'
    yield table(['Configuration', 'n', 'busiest / even', 'idlest / even', 'largest excess', 'router entropy (nats)',
                 'balance loss', 'z loss'], {
        name: [len(x['seeds']), *(num(share, 2) for share in x['extremes']), mean_sd(x['max_violation'], 3),
               mean_sd(x['router_entropy'], 3), mean_sd(x['balance_loss'], 4), mean_sd(x['z_loss'], 4)]
        for name, x in a.items()})
    experts = run['config']['n_expert']
    yield (f'Load relative to an even share in the worst layer, mean over runs. Even use of {experts} experts has an '
           f'entropy of {math.log(max(1, experts)):.3f} nats.')

    yield '## Caveats'
    yield bullets(caveats(arms, r))
    yield from ['## Figures'] * (len(images) > 1) + [*images[1:]]


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates

def compare_rates(arms, metric):
    """Runs named ARM@RATE -> `rates`: {arm: {rate: mean of its complete runs, or their status}}."""
    rates = {}
    for name, arm in arms.items():
        losses = [run['final'][metric] for run in complete(arm).values()]
        rate, found = first(arm)['config']['learning_rate'], summary(losses)['mean'] if losses else first(arm)['status']
        grid = rates.setdefault(name.partition('@')[0], {})
        if rate in grid:
            fail(f'{name}: another name has this arm at {rate:g} too; keep one of them in the folder')
        grid[rate] = found
    rates = {arm: dict(sorted(grid.items())) for arm, grid in rates.items()}
    return {'schema': 2, 'metric': metric, **METRICS[metric], 'rates': rates}


def report_rates(arms, r, images=()):
    """Blocks of Markdown: arm x rate, each arm's best in bold; where it lies at the edge of its grid, and what is missing."""
    every, rows, lines = sorted({rate for rates in r['rates'].values() for rate in rates}), {}, []
    for arm, rates in r['rates'].items():
        done = {rate: loss for rate, loss in rates.items() if not isinstance(loss, str)}
        best = min(done, key=done.get, default=None)
        edge = 'lowest' if best == min(rates) else 'highest' if best == max(rates) else ''
        cells = {**rates, **{rate: f'**{num(loss)}**' if rate == best else num(loss) for rate, loss in done.items()}}
        rows[arm] = [cells.get(rate, '-') for rate in every]
        lines.append(f'{arm}: ' + (f'best at {best:g}' if done else 'no complete run')
                     + f', the {edge} rate tried: a better one may lie beyond' * bool(edge) + '.')
    seeds = set().union(*arms.values())
    for name, arm in arms.items():
        if 0 < len(done := complete(arm)) < len(seeds):
            rest = ''.join(f'; seed {seed} {run["status"]}' for seed, run in arm.items() if seed not in done)
            lines.append(f'{name}: the mean is of seed(s) {spans(done)} alone{rest}.')
    machines = Counter(run['environment']['device_name'] for arm in arms.values() for run in arm.values())
    if len(machines) > 1:
        lines.append(f'Not all on one machine: {", ".join(f"{n} runs on {name}" for name, n in machines.items())}.')
    yield table(['Configuration', *(f'{rate:g}' for rate in every)], rows)
    yield (f'{r["label"].capitalize()} ({r["unit"]}) after {first(first(arms))["config"]["max_steps"]} updates, seed(s) '
           f'{spans(seeds)}; the best of each in bold.')
    yield bullets(lines)
    yield from images


# ---------------------------------------------------------------------------------------------------------------------
# The page

HEAD = """\
<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } ul { padding-left: 1.2rem } li { margin: .4rem 0 }
p, li, code { overflow-wrap: anywhere } .wide { overflow-x: auto; margin: 1.5rem 0 }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8886 }
th:first-child, td:first-child { text-align: left }
img { width: 100%; min-width: 32rem; box-sizing: border-box; padding: .4rem; background: #fff; border-radius: 6px }
</style>
"""


def page(blocks, images):
    """The blocks of the report, in Markdown -> one HTML file, pictures inside. images: {block: PNG}."""
    body = []
    for block in blocks:
        text = html.escape(block, quote=False).replace('\\|', '&#124;')         # a | within a cell
        text = re.sub(r'`(.+?)`', r'<code>\1</code>', re.sub(r'\*\*(.+?)\*\*', r'<b>\1</b>', text))
        lines = text.split('\n')
        if block in images:
            source = f'data:image/png;base64,{base64.b64encode(images[block]).decode()}'
            body.append(f'<div class="wide"><img alt="{block[2:].partition("]")[0]}" src="{source}"></div>')
        elif block.startswith('| '):
            head, _, *rows = ('<tr><td>' + line[2:-2].replace(' | ', '</td><td>') + '</td></tr>' for line in lines)
            rows = '\n'.join([head.replace('td>', 'th>'), *rows])
            body.append(f'<div class="wide"><table>{rows}</table></div>')
        elif block.startswith('- '):
            body.append('<ul>' + '\n'.join(f'<li>{line[2:]}</li>' for line in lines) + '</ul>')
        elif block.startswith('#'):
            marks, _, title = text.partition(' ')
            body.append(f'<title>{title}</title>\n' * (marks == '#') + f'<h{len(marks)}>{title}</h{len(marks)}>')
        else:
            body.append(f'<p>{text}</p>')
    return HEAD + '\n'.join(body) + '\n'


# ---------------------------------------------------------------------------------------------------------------------
# The program

def options_of(runs, arguments):
    """The flags in options.json beside the runs that the command line does not give itself."""
    file = Path(os.path.expanduser(runs), 'options.json')
    try:
        options = [str(flag) for flag in json.loads(file.read_text(encoding='utf-8'))] if file.exists() else []
    except (OSError, ValueError, TypeError) as error:
        fail(f'{file}: must be a list of flags ({error})')
    given = {argument.partition('=')[0] for argument in arguments}
    theirs = next((flag for flag in options if flag.startswith('--metric=')), '--metric=val_loss')
    margin = next((flag for flag in options if flag.startswith('--margin=')), None)
    if '--metric' in given and theirs not in arguments and margin and '--margin' not in given:
        fail(f'--metric: the {margin} of {file} is in the unit of {theirs[2:]}; give a --margin in the unit of this one')
    return [flag for flag in options if flag.partition('=')[0] not in given]


def arms_of(contrasts, arms, planned=False):
    """['mla48:mqa'] -> [('mla48', 'mqa')]; fails unless both are arms, or planned and may still have no runs."""
    pairs = list(dict.fromkeys(tuple(text.split(':')) for text in contrasts))
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            fail(f'--contrasts: {":".join(pair)} is not FIRST:SECOND, two arms')
        for name in {*pair} - {*arms} if not planned else ():           # typed by hand: a typo
            fail(f'--contrasts: no runs named {name}; there are {", ".join(arms)}' + did_you_mean(name, list(arms)))
    return pairs


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # what to read
    runs = 'out/laptop'         # a folder with result.json or <name>-s<seed>.json at any depth
    # what to claim
    baseline = 'baseline'       # the name that the others are compared against
    contrasts = []              # planned comparisons FIRST:SECOND,...; none: each arm against the baseline
    pairs = 0                   # pairs of seeds that a comparison is planned to have: with fewer it gets no verdict yet
    metric: Literal['val_loss', 'val_bits_per_byte'] = 'val_loss'   # the number compared
    margin = 0.01               # smallest difference worth having, in the metric's unit; choose it first
    may_differ = []             # knobs in which arms may differ besides the variant's, as in learning_rate,d_ff
    force = False               # report on runs that are not comparable; it then says what they disagree in
    rates = False               # instead: each arm's best learning rate, of runs named ARM@RATE
    # output
    plots = True                # draw the figures too; needs matplotlib
    out = ''                    # folder of the report; empty: where the runs are
    # -----------------------------------------------------------------------------
    configure(globals(), positional='runs')                 # where the runs are; then with the flags beside them
    beside = options_of(runs, sys.argv[1:])
    flags = [*beside, *sys.argv[1:]]
    configure(globals(), positional='runs', argv=flags)
    options = [flag for flag in flags if flag.startswith('--') and not flag.startswith(('--runs', '--plots', '--out'))]
    planned = any(flag.startswith('--contrasts=') for flag in beside)       # not typed: arms in them may still have no runs
    if margin <= 0:
        fail(f'--margin={margin:g}: must be above 0, it is the smallest difference worth having')
    if pairs < 0:
        fail(f'--pairs={pairs}: must be 0 (no plan) or more')
    runs, out = os.path.expanduser(runs), os.path.expanduser(out)
    may_wait = planned and not any(flag.startswith('--baseline=') for flag in options)
    arms = load(runs, None if rates or may_wait else baseline)
    if may_wait:                                            # another arm stands in for a baseline whose runs are to come
        baseline = baseline if baseline in arms else next(iter(arms))
        arms = {baseline: arms[baseline], **arms}
    for run in [run for arm in arms.values() for run in complete(arm).values()]:
        if run['final'][metric] is None:
            fail(f'{run["file"]}: final.{metric} is null; --metric=val_loss does without it')
    problems = disagreements(arms, baseline, may_differ + ['learning_rate'] * rates, metric)
    if problems and not force:
        fail(f'{runs}: not comparable (--force=True reports all the same): ' + ' | '.join(problems))
    r = (compare_rates(arms, metric) if rates
         else compare(arms, baseline, metric, margin, arms_of(contrasts, arms, planned), pairs))

    folder, title = out or runs, os.path.basename(os.path.abspath(runs))
    pictures = draw({name: complete(arm) for name, arm in arms.items()}, r, folder) if plots else []
    images = {f'![{caption}]({file})': png for file, caption, png in pictures}
    blocks = [f'# {title}: {r["label"]}' + ' by learning rate' * rates,
              f'`{" ".join(["python analyze.py", title, *options])}`']
    if problems:
        blocks += ['**These runs are not comparable; the report was forced. They disagree in**', bullets(problems)]
    blocks += report_rates(arms, r, [*images]) if rates else report(arms, r, may_differ, [*images])
    sys.stdout.reconfigure(encoding='utf-8', errors='backslashreplace')
    say('\n\n'.join(blocks))
    exact = json.dumps({**r, 'disagreements': problems}, allow_nan=False)
    # to 12 significant digits, so that another machine's last bit does not show
    rounded = json.loads(exact, parse_float=lambda text: float(f'{float(text):.12g}'))
    texts = {'report.md': '\n\n'.join(blocks) + '\n', 'report.json': json.dumps(rounded, indent=1) + '\n',
             'report.html': page(blocks, images)}
    files = {name: content.encode('utf-8', 'backslashreplace') for name, content in texts.items()}
    files |= {name: png for name, _, png in pictures}
    aside = Path(folder, 'report.tmp')                      # on a full disk the last report stays as it was
    try:
        os.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            aside.write_bytes(content)
            aside.replace(Path(folder, name))
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        fail(f'{error.filename or folder}: no report written ({error.strerror}); --out=FOLDER goes elsewhere')
