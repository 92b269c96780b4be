"""The figures of analyze.py, drawn by matplotlib if it is there.

Opaque white ground for light and dark pages; Okabe & Ito's colours, which the colour-blind can tell apart. Each
figure_...() takes arms, {name: {seed: complete run}}, and r, what analyze.compare() made of them; it returns None if
these runs have nothing for it.
"""
import io
import itertools
import sys
from pathlib import Path

import numpy as np

from result import NETWORK
from stats import summary

CACHE_KNOBS = {'attn', 'n_kv_head', 'kv_lora_rank'}     # knobs of an attention that make its cache larger or smaller
MOST_DRAWN = 12                             # arms in a figure; the tables hold all of them
COLOURS = ['#444444', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9']


def canvas(width, height, columns=1):
    """A figure in inches and its axes, side by side; without pyplot, so without a display or global state."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=150, facecolor='white', layout='constrained')
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[['top', 'right']].set_visible(False)
        ax.grid(color='#e4e4e4', linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def style(i):
    return {'color': COLOURS[i % len(COLOURS)], 'ls': ('-', '--', ':')[i // len(COLOURS) % 3]}


def styles(r):
    """{arm: style} of the arms to draw, without the A/A arm, which lies on the baseline."""
    drawn = [name for name, arm in r['arms'].items() if arm['values'] and name != r['again']][:MOST_DRAWN]
    return {name: style(i) for i, name in enumerate(drawn)}


def curve(runs):
    """The steps at which each of the runs has a validation loss in its history, and the losses there (runs x steps)."""
    rows = [{row['step']: row['val_loss'] for row in run['history'] if row['val_loss'] is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, rows))) if rows else []
    return steps, np.array([[row[step] for step in steps] for row in rows])


def band(ax, steps, curves, style, label):
    """The mean of the runs, and its 95% t interval shaded; nothing without steps."""
    if not steps:
        return
    mean = [summary(list(column)) for column in curves.T]
    ax.plot(steps, [s['mean'] for s in mean], **style, lw=2, label=label)
    if len(curves) > 1:
        ax.fill_between(steps, [s['low'] for s in mean], [s['high'] for s in mean], color=style['color'], alpha=0.15,
                        lw=0)


def legend(figure, ax):
    handles, labels = ax.get_legend_handles_labels()
    columns = 6 if len(labels) < 7 else 4
    figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False)


def log_axis(ax, values):
    ax.set_xscale('log')
    ax.set_xticks(values, [f'{x:g}' for x in values])
    ax.minorticks_off()
    ax.tick_params(axis='x', labelsize=8.5)                 # neighbours may stand close together


def figure_curves(arms, r):
    drawn, base = styles(r), arms[r['baseline']]
    curves = {name: curve(arms[name].values()) for name in drawn}
    if not any(len(steps) > 1 for steps, _ in curves.values()):
        return None
    figure, axes = canvas(8, 4, 2 if len(drawn) > 1 else 1)
    left, right = axes[0], axes[-1]                         # of one arm there are no differences
    for name, style in drawn.items():
        band(left, *curves[name], style, name)
        both = [seed for seed in arms[name] if seed in base and name != r['baseline']]
        steps, losses = curve([arms[name][seed] for seed in both] + [base[seed] for seed in both])
        band(right, steps, losses[:len(both)] - losses[len(both):], style, name)
    if right is not left:
        right.axhline(0, color='#444444', lw=1)
        right.set(xlabel='optimizer updates', ylabel=f'loss minus {r["baseline"]} (nats)', title='Difference within pairs')
    left.set(xlabel='optimizer updates', ylabel='validation loss (nats)', title='Mean and 95% interval')
    legend(figure, left)
    return figure


def figure_forest(arms, r):
    drawn = dict([(name, c) for name, c in r['comparisons'].items() if c['n']][:2 * MOST_DRAWN])
    if not drawn:
        return None
    figure, (ax,) = canvas(8, 1.5 + 0.4 * len(drawn))
    ax.axvspan(-r['margin'], r['margin'], color='#999999', alpha=0.22, lw=0)
    ax.axvline(0, color='#444444', lw=1)
    for i, c in enumerate(drawn.values()):
        colour = '#0072B2' if c['planned'] else '#888888'
        ax.plot([c['low'], c['high']], [i, i], color=colour, lw=3, solid_capstyle='butt')      # None: draws nothing
        ax.plot([c['low_all'], c['high_all']], [i, i], color=colour, lw=1)
        ax.plot(c['d'], [i + 0.24] * c['n'], '.', color=colour, ms=4, alpha=0.7)
        ax.plot(c['mean'], i, 'o', color=colour, ms=8, mec='white')
    # wide enough for every pair and for the comparison with most of them; the intervals of few run off the frame
    most = max(drawn.values(), key=lambda c: c['n'])
    ends = [-r['margin'], r['margin'], most['low'], most['high'], most['low_all'], most['high_all']]
    ends = [x for x in [*ends, *(x for c in drawn.values() for x in c['d'])] if x is not None]
    room = 0.05 * (max(ends) - min(ends))
    ax.set(yticks=range(len(drawn)), yticklabels=drawn, ylim=(len(drawn) - 0.5, -0.5),
           xlim=(min(ends) - room, max(ends) + room),
           xlabel=f'difference in {r["label"]} ({r["unit"]}), lower is better')
    right = ax.secondary_yaxis('right')
    right.set_yticks(range(len(drawn)), [f'{c["verdict"]}, n = {c["n"]}' for c in drawn.values()])
    right.tick_params(length=0)
    right.spines['right'].set_visible(False)
    ax.set_title(f'Mean, 95% interval (thick), simultaneous (thin); dots: each pair; grey: ± {r["margin"]:g} '
                 f'{r["unit"]}', fontsize=10)
    return figure


def figure_cache(arms, r):
    """Loss against the cache. A line joins arms that differ in its size alone; grey: the baseline's mean ± the margin."""
    drawn = {name: r['arms'][name] for name in styles(r)}
    if len(drawn) < 2:
        return None
    figure, (ax,) = canvas(8, 4.6)
    size = {name: arm['kv_cache_bytes_per_token_16bit'] for name, arm in drawn.items()}
    looks = dict(zip(dict.fromkeys(arm['attention_class'] for arm in drawn.values()), zip(COLOURS[1:], 'oDs^vP')))
    rest, lines, named = sorted(NETWORK.keys() - CACHE_KNOBS), {}, {}
    for name, arm in drawn.items():
        beside = [other for other in drawn if size[other] == size[name]]        # arms of one size stand side by side
        side = beside.index(name) - (len(beside) - 1) / 2
        x, s, (colour, marker) = size[name] * 1.04 ** side, arm[r['metric']], looks[arm['attention_class']]
        ax.plot([x, x], [s['low'], s['high']], color=colour, lw=1.5)
        ax.plot(x, s['mean'], marker, color=colour, ms=8, mec='white')
        named[name] = x, s, side, colour
        config = next(iter(arms[name].values()))['config']
        lines.setdefault((colour, *(config.get(knob) for knob in rest)), []).append((x, s['mean']))
    for (colour, *_), points in lines.items():
        if len(points) > 1:
            ax.plot(*zip(*sorted(points)), color=colour, lw=2, alpha=0.4, zorder=1)
    for kind, (colour, marker) in looks.items():
        label = {'MultiHeadAttention': 'multi-head attention', 'LatentAttention': 'latent attention'}.get(kind, kind)
        ax.plot([], [], marker + '-', color=colour, label=label)
    log_axis(ax, ticks := sorted(set(size.values())))
    ax.margins(0.25, 0.1)
    if ticks[-1] < 2 * ticks[0]:                            # or arms of one size would stand as far apart as the axis is long
        ax.set_xlim(ticks[0] / 2, 2 * ticks[-1])
    n = [len(arm['values']) for arm in drawn.values()]
    title, x_label = f'Mean and 95% interval, n = {" to ".join(map(str, sorted({min(n), max(n)})))} seeds', ''
    if base := drawn.get(r['baseline']):
        middle, whole = base[r['metric']]['mean'], max(1, size[r['baseline']])
        ax.axhspan(middle - r['margin'], middle + r['margin'], color='#999999', alpha=0.2, lw=0, zorder=0)
        ax.set_xticks(ticks, [f'{x:g}\n{x / whole:.0%}' for x in ticks])
        title += f'; grey: {r["baseline"]} ± {r["margin"]:g} {r["unit"]}, the margin'
        x_label = f'; below: in % of {r["baseline"]}\'s'
    ax.set(xlabel='cache, bytes per token (all layers, 2 bytes a number)' + x_label,
           ylabel=f'{r["label"]} ({r["unit"]}), lower is better')
    ax.set_title(title, fontsize=10)
    legend(figure, ax)
    name_points(figure, ax, named)
    return figure


def name_points(figure, ax, named):
    """{name: (x, summary, side, colour)}: each name at the first place around its point where it covers no point, interval or
    name. side: below 0 if a neighbour stands to the right, above 0 if to the left; no name goes to that side.
    """
    from matplotlib.transforms import Bbox
    figure.draw_without_rendering()
    figure.set_layout_engine('none')                        # names move nothing any more
    points = ax.transData.transform([(x, s['mean']) for x, s, _, _ in named.values()])
    frame, taken = ax.get_window_extent(), [Bbox([point - 6, point + 6]) for point in points]
    intervals = [[(x, s['low']), (x, s['high'])] for x, s, _, _ in named.values() if s['n'] > 1]
    taken += [Bbox([low - 6, high + 6]) for low, high in map(ax.transData.transform, intervals)]
    around = [(0.7, 0.7), (0.7, -0.7), (1, 0), (-0.7, 0.7), (-0.7, -0.7), (-1, 0), (0, 1), (0, -1)]
    for name, (x, s, side, colour) in named.items():
        y = s['mean']
        text = ax.annotate(name, (x, y), (0, 0), textcoords='offset points', fontsize=9.5, color=colour)
        for far, (dx, dy) in itertools.product((9, 16, 26, 40), [place for place in around if place[0] * side >= 0]):
            text.set(position=(far * dx, far * dy), ha=('right', 'center', 'left')[int(np.sign(dx)) + 1],
                     va=('top', 'center', 'bottom')[int(np.sign(dy)) + 1])
            box = text.get_window_extent()
            if not box.count_overlaps(taken) and frame.count_contains(box.corners()) == 4:
                break
        taken.append(box)
        if far > 9:                                         # with a line to its point
            ax.annotate('', (x, y), (far * dx, far * dy), textcoords='offset points', arrowprops={
                'arrowstyle': '-', 'color': colour, 'lw': 0.7, 'shrinkA': 1, 'shrinkB': 5})


def figure_rates(arms, r):
    figure, (ax,) = canvas(8, 4.6)
    for i, (arm, rates) in enumerate(r['rates'].items()):
        done = {rate: x for rate, x in rates.items() if not isinstance(x, str)}
        ax.plot(done.keys(), done.values(), **style(i), marker='o', ms=5, label=arm)
    log_axis(ax, sorted({rate for rates in r['rates'].values() for rate in rates}))
    ax.set(xlabel='learning rate', ylabel=f'{r["label"]} ({r["unit"]})', title='Each arm at each learning rate')
    legend(figure, ax)
    return figure


FIGURES = [('cache.png', 'loss against bytes of cache per token, at 2 bytes a number, each arm over its own seeds; lines join '
            'arms that differ in that alone', figure_cache),
           ('forest.png', 'paired differences with 95% intervals and the margin', figure_forest),
           ('curves.png', 'validation loss during training, and its paired difference', figure_curves)]
FIGURES_OF_RATES = [('rates.png', 'each arm at each learning rate', figure_rates)]


def draw(arms, r, folder):
    """-> [(file, caption, PNG)]. Without matplotlib: of those that are in the folder, and a line on stderr."""
    possible, pictures = FIGURES_OF_RATES if 'rates' in r else FIGURES, []
    try:
        import matplotlib.figure
    except ImportError:
        print('analyze.py: no figures drawn without matplotlib; pip install matplotlib', file=sys.stderr)
        return [(file, caption, path.read_bytes()) for file, caption, _ in possible if (path := Path(folder, file)).exists()]
    matplotlib.rcParams['text.parse_math'] = False              # an arm's name may hold a $
    for file, caption, make in possible:
        if figure := make(arms, r):
            figure.savefig(png := io.BytesIO(), format='png', metadata={'Software': None})
            pictures.append((file, caption, png.getvalue()))
    return pictures
