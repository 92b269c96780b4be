"""Result files -> table, paired statistics, one verdict per variant, figures. Reads nothing else; no torch.

    python analyze.py out/laptop                 report to stdout; report.md, report.json, *.png beside it
    python analyze.py out/laptop --margin=0.02   the smallest difference worth having, chosen BEFORE the runs

An arm is the runs of one `name`, a pair is two runs of one seed, and every claim is about paired differences
d_i = variant_i - baseline_i. The same result files give the same report.md, byte for byte.
"""

import json
import math
import os
import sys
from typing import Literal

import numpy as np

from configurator import configure, fail
from figures import curve, draw, figures
from result import FINAL, complete, differing, disagreements, load, spans, who
from stats import ALPHA, MOST_SEEDS, POWER, SAMPLED_FLIPS, holm, needed_n, paired, summary

METRICS = {'val_loss': ('validation loss', 'nats', 'lower'),        # final.<metric>: name, unit, better is
           'val_bits_per_byte': ('validation bits per byte', 'bits/byte', 'lower'),
           'val_accuracy': ('validation accuracy', 'as a fraction', 'higher')}
PARETO = {'params_total': 'parameters', 'params_active': 'active parameters',
          'kv_cache_bytes_per_token_16bit': 'cache', 'step_ms_median': 'time per update'}


# ---------------------------------------------------------------------------------------------------------------------
# Comparison

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
    ruled_out = f'neither zero nor a difference of {margin:g} {unit} is ruled out ({interval})'
    if c['p'] < ALPHA:
        ruled_out = (f'its interval by itself excludes zero ({interval}; p {p_text(c["p"])}), but not after '
                     f'correction over {len(r["family"])} variants (Holm p {p_text(c["p_holm"])})')
    return 'undecided', (f'{name}: undecided against {base}: {ruled_out}; {about} would be needed to find '
                         f'{what} with {POWER:.0%} power.')


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
- budget{whose}: {config[max_steps]} updates of {config[batch_size]} x {config[block_size]} = {tokens} tokens,
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
    finished = {name: complete(arm) for name, arm in arms.items()}
    memory = {run['final']['peak_memory_kind'] or 'unknown' for arm in finished.values() for run in arm.values()}
    return REPORT.format(
        **r | {key: first[key] for key in ('config', 'data', 'environment')}, title=title, alpha=ALPHA,
        whose=f' of {r["baseline"]}' if problems else '',
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
        figures='\n\n'.join(f'![{text}]({file})' for file, text, _ in figures(finished, r)) or 'Nothing to draw.')


# ---------------------------------------------------------------------------------------------------------------------
# The program

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
            draw({name: complete(arm) for name, arm in arms.items()}, r, folder)
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
