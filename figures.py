"""Figures, drawn by matplotlib if it is there: all of analyze.py's, by draw(); bench.py draws its own on a canvas().

Opaque white ground for light and dark pages; Okabe & Ito's colours, which the colour-blind can tell apart, and a marker
to each. Each figure_...() takes arms, {name: {seed: complete run}}, and r, what analyze.compare() made of them.
"""
import math
import os
import sys

import numpy as np

from stats import summary

MOST_DRAWN = 12                             # arms in a figure; the tables hold all of them
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
    base = arms[r['baseline']]
    for name, (colour, _) in styles(r).items():
        runs = arms[name]
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
         any(len(curve(arms[name].values())[0]) > 1 for name in styles(r))),
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
