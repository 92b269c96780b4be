"""Figures, drawn by matplotlib if it is there: all of analyze.py's, by draw(); bench.py draws its own on a canvas().

Opaque white ground for light and dark pages; Okabe & Ito's colours, which the colour-blind can tell apart. Each
figure_...() takes arms, {name: {seed: complete run}}, and r, what analyze.compare() made of them.
"""
import os
import sys

import numpy as np

from stats import summary

MOST_DRAWN = 12                             # arms in a figure; the tables hold all of them
COLOURS = ['#444444', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9']


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


def style(i):
    return {'color': COLOURS[i % len(COLOURS)], 'ls': ('-', '--', ':')[i // len(COLOURS) % 3]}


def styles(r):
    """{arm: style} of the arms to draw, without the A/A arm, which lies on the baseline."""
    drawn = [name for name, arm in r['arms'].items() if arm['values'] and name != r['again']][:MOST_DRAWN]
    return {name: style(i) for i, name in enumerate(drawn)}


def curve(runs, key='val_loss'):
    """The steps at which each of the runs has that loss in its history, and the losses there (runs x steps)."""
    rows = [{row['step']: row[key] for row in run['history'] if row[key] is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, rows))) if rows else []
    return steps, np.array([[row[step] for step in steps] for row in rows])


def band(ax, steps, curves, style, label):
    """The mean of the runs, and its 95% t interval shaded."""
    mean = [summary(list(column)) for column in curves.T]
    ax.plot(steps, [s['mean'] for s in mean], **style, lw=2, label=label)
    if len(curves) > 1:
        ax.fill_between(steps, [s['low'] for s in mean], [s['high'] for s in mean], color=style['color'], alpha=0.15,
                        lw=0)


def legend(figure, ax):
    handles, labels = ax.get_legend_handles_labels()
    columns = 6 if len(labels) < 7 else 4
    figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False)


def figure_curves(arms, r):
    figure, (left, right) = canvas(8, 4, 1, 2)
    base = arms[r['baseline']]
    for name, style in styles(r).items():
        runs = arms[name]
        both = [seed for seed in runs if seed in base and name != r['baseline']]
        if (steps_losses := curve(runs.values()))[0]:
            band(left, *steps_losses, style, name)
        steps, losses = curve([runs[seed] for seed in both] + [base[seed] for seed in both])
        if steps:
            band(right, steps, losses[:len(both)] - losses[len(both):], style, name)
    right.axhline(0, color='#444444', lw=1)
    left.set(xlabel='optimizer updates', ylabel='validation loss (nats)', title='Mean and 95% interval')
    right.set(xlabel='optimizer updates', ylabel=f'loss minus {r["baseline"]} (nats)', title='Difference within pairs')
    legend(figure, left)
    return figure


def figure_training(arms, r):
    """Mean over runs, each point the mean of 5% of the log lines up to it: single batches are noisy."""
    figure, (ax,) = canvas(8, 4)
    for name, style in styles(r).items():
        steps, losses = curve(arms[name].values(), 'train_loss')
        width, start = 1 + len(steps) // 20, len(steps) // 5         # its fall from the start would hide what follows
        if len(steps) > 1:
            smooth = np.convolve(losses[:, start:].mean(0), np.full(width, 1 / width), 'valid')
            ax.plot(steps[start + width - 1:], smooth, **style, lw=1.5, label=name)
    ax.set(xlabel='optimizer updates, after the first fifth', ylabel='training loss (nats)',
           title='Mean over runs, smoothed over 5% of the updates')
    legend(figure, ax)
    return figure


def figure_forest(arms, r):
    drawn = dict([(name, c) for name, c in r['comparisons'].items() if c['n']][:2 * MOST_DRAWN])
    figure, (ax,) = canvas(8, 1.5 + 0.4 * len(drawn))
    ax.axvspan(-r['margin'], r['margin'], color='#999999', alpha=0.22, lw=0)
    ax.axvline(0, color='#444444', lw=1)
    for i, c in enumerate(drawn.values()):
        colour = '#0072B2' if c['planned'] else '#888888'
        if c['low'] is not None:
            ax.plot([c['low'], c['high']], [i, i], color=colour, lw=3, solid_capstyle='butt')
        if c['planned'] and c['low_all'] is not None:
            ax.plot([c['low_all'], c['high_all']], [i, i], color=colour, lw=1)
        ax.plot(c['d'], [i + 0.24] * c['n'], '.', color=colour, ms=4, alpha=0.7)
        ax.plot(c['mean'], i, 'o', color=colour, ms=8, mec='white')
    ax.set(yticks=range(len(drawn)), yticklabels=drawn, ylim=(len(drawn) - 0.5, -0.5),
           xlabel=f'difference in {r["label"]} ({r["unit"]}), {r["better"]} is better')
    right = ax.secondary_yaxis('right')
    right.set_yticks(range(len(drawn)), [f'{c["verdict"]}, n = {c["n"]}' for c in drawn.values()])
    right.tick_params(length=0)
    right.spines['right'].set_visible(False)
    ax.set_title(f'Mean, 95% interval (thick), simultaneous (thin); dots: each pair; grey: ± {r["margin"]:g} '
                 f'{r["unit"]}', fontsize=10)
    return figure


def figure_cache(arms, r):
    """Loss against the cache; of each class of attention the best arms of their size are joined by a line."""
    figure, (ax,) = canvas(8, 4.6)
    drawn = {name: r['arms'][name] for name in styles(r)}
    size = {name: arm['kv_cache_bytes_per_token_16bit'] for name, arm in drawn.items()}
    sizes, sign, named = sorted(set(size.values())), 1 if r['better'] == 'lower' else -1, {}
    for name, arm in drawn.items():
        beside = [other for other in drawn if size[other] == size[name]]        # arms of one size stand side by side
        side = beside.index(name) - (len(beside) - 1) / 2
        named[name] = size[name] * 1.04 ** side, arm[r['metric']]['mean'], side
    kinds = {name: arm['attention_class'] for name, arm in drawn.items()}
    for kind, colour, marker in zip(dict.fromkeys(kinds.values()), COLOURS[1:], 'oDs^vP'):
        members = sorted((name for name in drawn if kinds[name] == kind), key=lambda name: sign * named[name][1])
        best = sorted(named[next(name for name in members if size[name] == x)] for x in sizes
                      if x in {size[name] for name in members})
        ax.plot(*list(zip(*best))[:2], color=colour, lw=2, alpha=0.4, zorder=1)
        for name in members:
            (x, y, side), s = named[name], drawn[name][r['metric']]
            if s['n'] > 1:
                ax.plot([x, x], [s['low'], s['high']], color=colour, lw=1.5)
            ax.plot(x, y, marker, color=colour, ms=8, mec='white')
            named[name] = x, y, side, colour
        label = {'MultiHeadAttention': 'heads, shared or not', 'LatentAttention': 'latents'}.get(kind, kind)
        ax.plot([], [], marker + '-', color=colour, label=label)
    ax.set_xscale('log')
    ax.set_xticks(list(sizes), [f'{size:g}' for size in sizes])
    ax.minorticks_off()
    ax.margins(0.2, 0.1)
    n = [len(arm['values']) for arm in drawn.values()]
    ax.set(xlabel='cache, bytes per token (all layers, 2 bytes a number)', ylabel=f'{r["label"]} ({r["unit"]})')
    n = ' to '.join(map(str, sorted({min(n), max(n)})))
    ax.set_title(f'Mean and 95% interval, n = {n} seeds; lines join the best of each size', fontsize=10)
    legend(figure, ax)
    name_points(figure, ax, named)
    return figure


def name_points(figure, ax, named):
    """{name: (x, y, side, colour)}: each name beside its point, where it covers little else."""
    figure.draw_without_rendering()
    figure.set_layout_engine('none')                        # names move nothing any more
    taken, frame = [], ax.get_window_extent()
    for line in ax.lines:
        path = ax.transData.transform(line.get_xydata())
        for a, b in zip(path, [*path[1:], *path[-1:]]):     # a line as a row of small squares
            weight = 1 if len(path) > 1 else 30
            taken += [[*(p - 5), *(p + 5), weight] for p in np.linspace(a, b, 2 + int(np.hypot(*(b - a)) / 7))]
    for name, (x, y, side, colour) in named.items():
        text = ax.annotate(name, (x, y), (0, 0), textcoords='offset points', fontsize=9.5, color=colour)

        def cost(place):
            text.set(position=place, ha=('right', 'center', 'left')[int(np.sign(place[0])) + 1],
                     va=('top', 'center', 'bottom')[int(np.sign(place[1])) + 1])
            box, (left, low, right, high, weight) = text.get_window_extent(), np.array(taken).T
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            covered = weight @ ((left < box.x1) & (box.x0 < right) & (low < box.y1) & (box.y0 < high))
            beyond = place[0] * side < 0                    # a neighbour: whose name would it be?
            return 1000 * outside + covered + 4 * beyond + np.dot(place, place) / 160
        place = min([(far * dx, far * dy) for far in (9, 16, 26, 40) for dx, dy in (
            (1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7), (0, 1), (0, -1))], key=cost)
        cost(place)
        taken.append([*text.get_window_extent().extents, 100])
        if max(np.abs(place)) > 9:                          # far off: with a line to its point
            ax.annotate('', (x, y), place, textcoords='offset points', arrowprops={
                'arrowstyle': '-', 'color': colour, 'lw': 0.7, 'shrinkA': 1, 'shrinkB': 5})


def figure_rates(arms, r):
    figure, (ax,) = canvas(8, 4.6)
    for i, (arm, rates) in enumerate(r['rates'].items()):
        done = {rate: x for rate, x in rates.items() if not isinstance(x, str)}
        ax.plot(done.keys(), done.values(), **style(i), marker='o', ms=5, label=arm)
    rates = sorted({rate for rates in r['rates'].values() for rate in rates})
    ax.set_xscale('log')
    ax.set_xticks(rates, [f'{rate:g}' for rate in rates])
    ax.minorticks_off()
    ax.set(xlabel='learning rate', ylabel=f'{r["label"]} ({r["unit"]})', title='Each arm at each learning rate')
    legend(figure, ax)
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
    if 'rates' in r:
        return [('rates.png', 'each arm at each learning rate', figure_rates)]
    possible = [
        ('cache.png', 'loss against bytes of cache per token, at 2 bytes a number', figure_cache, len(styles(r)) > 1),
        ('forest.png', 'paired differences with 95% intervals and the margin', figure_forest,
         any(c['n'] for c in r['comparisons'].values())),
        ('curves.png', 'validation loss during training, and its paired difference', figure_curves,
         any(len(curve(arms[name].values())[0]) > 1 for name in styles(r))),
        ('training.png', 'training loss', figure_training,
         any(len(curve(arms[name].values(), 'train_loss')[0]) > 1 for name in styles(r))),
        ('experts.png', 'load of the experts by layer', figure_experts,
         any(r['arms'][name]['load_by_rank'] for name in styles(r)))]
    return [figure[:3] for figure in possible if figure[3]]


def draw(arms, r, folder):
    """Writes the figures, or says in one line on stderr how to get them -> (file, caption) of those that are there."""
    possible = figures(arms, r)
    try:
        import matplotlib.figure      # noqa: F401
        for file, _, make in possible:
            make(arms, r).savefig(os.path.join(folder, file), metadata={'Software': None})
    except ImportError:
        print('analyze.py: no figures drawn without matplotlib; pip install matplotlib', file=sys.stderr)
    return [figure[:2] for figure in possible if os.path.exists(os.path.join(folder, figure[0]))]
