"""
Pictures drawn from what a run wrote down: they are made from log.jsonl alone, so a resumed run's picture is whole.
"""
import html
import itertools
import json
import math
from pathlib import Path

COLOURS = ('#3b6fb6', '#d9622b', '#4c9a52', '#8a5fb0')


def read_log(path):
    """({name: ([steps], [values])}, header) of a log.jsonl; lines that a kill cut short, and null, are left out."""
    series, header = {}, {}
    for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        header = header or entry.get('run', {})
        for key, value in entry.items():
            if 'step' in entry and key != 'step' and isinstance(value, (int, float)):
                steps, values = series.setdefault(key, ([], []))
                steps.append(entry['step'])
                values.append(value)
    return series, header


def sparkline(values, width=60):
    """A curve as one line of text: '▁▂▄▆█'; `values` are taken at `width` evenly spaced places."""
    values = list(values)
    width = min(width, len(values))
    picked = [values[round(i * (len(values) - 1) / max(width - 1, 1))] for i in range(width)]
    low, high = min(picked), max(picked)
    bars = '▁▂▃▄▅▆▇█'
    return ''.join(bars[round((value - low) / (high - low) * 7)] if high > low else bars[3] for value in picked)


def smooth(values, span):
    """The mean over `span` values around each: it never lags. Near the start fewer, as many on either side, because the
    curve is steep there; near the end those that there are."""
    sums = [0.0, *itertools.accumulate(values)]
    ranges = [(max(0, i - span // 2), min(len(values), i + min(i, span // 2) + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ranges]


def loss_picture(log_path, png_path, title):
    """Draw training and validation loss (nats per token), and below them the learning rate, over steps; writes a PNG.

    The scale is that of the curves after their start, so that the first steps do not flatten the rest. A log without
    a loss leaves no picture.
    """
    from matplotlib.figure import Figure    # 0.3 s; without pyplot, which looks for a screen
    from matplotlib.ticker import EngFormatter, MaxNLocator

    series, header = read_log(log_path)
    if 'loss' not in series and 'eval_loss' not in series:
        return
    blue, orange, grey = '#3b6fb6', '#d9622b', '#777777'
    figure = Figure(figsize=(9, 5.6), dpi=120, layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])

    shown = []
    if 'loss' in series:
        steps, values = series['loss']
        span = len(values) // 50
        if span > 1:
            upper.plot(steps, values, color=blue, linewidth=0.8, alpha=0.3)
        curve = smooth(values, span)
        upper.plot(steps, curve, color=blue, linewidth=1.8, marker='o', markersize=4 if len(steps) < 40 else 0,
                   label=f'training {curve[-1]:.4f}')
        shown += curve[len(curve) // 20:]
    if 'eval_loss' in series:
        steps, values = series['eval_loss']
        best = min(range(len(values)), key=values.__getitem__)
        upper.plot(steps, values, color=orange, linewidth=1.8, marker='o', markersize=4 if len(steps) < 40 else 0,
                   label=f'validation {values[-1]:.4f}')
        upper.plot(steps[best], values[best], color=orange, marker='*', markersize=15, markeredgecolor='white',
                   linestyle='none', zorder=5, label=f'best {values[best]:.4f} at step {steps[best]:,}')
        shown += values[len(values) > 2:]       # the first is of the untrained model
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or 0.1
    upper.set_ylim(low - margin, high + margin)
    upper.set_ylabel('loss (nats)', fontsize=11)
    upper.set_title(title, fontsize=13, loc='left', pad=32)
    if header.get('stand_in'):
        upper.set_title('stand-in data', fontsize=13, color=orange, loc='right', pad=32)
    upper.legend(loc='lower left', bbox_to_anchor=(-0.01, 1), ncols=3, frameon=False, fontsize=11)   # above the curves

    rates = series.get('learning_rate', ([], []))
    lower.plot(*rates, color=grey, linewidth=1.5)
    lower.set_ylabel('learning\nrate', fontsize=9)
    peak = max(rates[1], default=0) or 1
    lower.set_ylim(0, 1.1 * peak)
    lower.set_yticks([0, peak], ['0', f'{peak:.2g}'])
    lower.set_xlabel('step', fontsize=11)
    lower.xaxis.set_major_formatter(EngFormatter(sep=''))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', color='#e6e6e6', linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        axes.tick_params(labelsize=10)
    write_png(figure, png_path)


def curves(log_path, png_path, title, panels):
    """Draw curves of a log.jsonl over steps, one panel below the other, and write a PNG. panels: [(label of the axis, {key of the
    log: name of the curve})]; keys that the log lacks are left out, and panels without any."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    series, _ = read_log(log_path)
    panels = [(label, {key: name for key, name in keys.items() if key in series}) for label, keys in panels]
    panels = [(label, keys) for label, keys in panels if keys]
    if not panels:
        return
    figure = Figure(figsize=(9, 1 + 2.2 * len(panels)), dpi=120, layout='constrained')
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, keys) in zip(all_axes, panels):
        for colour, (key, name) in zip(COLOURS, keys.items()):
            steps, values = series[key]
            axes.plot(steps, values, color=colour, linewidth=1.6, marker='o', markersize=4 if len(steps) < 40 else 0,
                      label=f'{name} {values[-1]:.3g}')
        axes.set_ylabel(label, fontsize=11)
        axes.legend(loc='lower left', bbox_to_anchor=(-0.01, 1), ncols=4, frameon=False, fontsize=10, borderaxespad=0.2)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', color='#e6e6e6', linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
    figure.suptitle(title, fontsize=13, x=0.02, ha='left')
    all_axes[-1].set_xlabel('step', fontsize=11)
    all_axes[-1].xaxis.set_major_formatter(EngFormatter(sep=''))
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    write_png(figure, png_path)


def margins(values, png_path, title):
    """Draw a histogram of reward margins of preference pairs, those above 0 (ordered as wanted) in another colour; writes a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout='constrained')
    axes = figure.subplots()
    low, high = min(*values, 0.0), max(*values, 0.0)
    width = (high - low) / 30 or 0.1
    start = -math.ceil(-low / width) * width                    # an edge at 0
    edges = [start + width * i for i in range(math.ceil((high - start) / width) + 2)]
    for colour, name, part in ((COLOURS[1], 'rejected preferred', [v for v in values if v < 0]),
                               ('#777777', 'ties', [v for v in values if v == 0]),
                               (COLOURS[0], 'chosen preferred', [v for v in values if v > 0])):
        if part:
            axes.hist(part, edges, color=colour, label=f'{name}: {len(part):,} ({len(part) / len(values):.0%})')
    axes.axvline(0, color='black', linewidth=1)
    axes.set_xlabel('reward margin', fontsize=11)
    axes.set_ylabel('pairs', fontsize=11)
    axes.set_title(title, fontsize=13, loc='left')
    axes.legend(frameon=False, fontsize=11)
    axes.spines[['top', 'right']].set_visible(False)
    write_png(figure, png_path)


def write_png(figure, png_path):
    """Whole or not at all."""
    temporary = Path(png_path).with_name('.nanoforge-tmp-' + Path(png_path).name)
    figure.savefig(temporary, format='png')
    temporary.replace(png_path)


# ---- episodes of agents -----------------------------------------------------------------------------------------------------

PAGE = '''<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; background: #fff }}
details {{ border: 1px solid #ddd; border-radius: 6px; margin: .5em 0; padding: .4em .8em }}
summary {{ cursor: pointer }} h2 {{ margin-top: 1.6em }}
.turn {{ display: flex; gap: 1.4em; align-items: flex-start; margin: .8em 0; flex-wrap: wrap }}
pre {{ font: 15px/1.2 ui-monospace, monospace; margin: 0; padding: .5em .7em; background: #f5f5f5; border-radius: 4px; white-space: pre-wrap }}
table {{ border-collapse: collapse; flex: 1; min-width: 24em }} td, th {{ padding: .15em .6em; text-align: left; vertical-align: top;
border-bottom: 1px solid #eee }} td.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
tr.executed {{ background: #fff3c4; font-weight: 600 }} .good {{ color: #1a7f37 }} .bad {{ color: #b3261e }} .prompt {{ color: #666 }}
</style><h1>{title}</h1><p>What every agent was asked in each state, its candidates with reward and advantage, and in yellow the one that
was executed. An episode's reward is the sum over its turns: a team that solves sooner may be paid less often.</p>{body}
'''


def episodes_page(directory, newest=40):
    """episodes.html in the folder of a run of agents: the newest episodes of episodes.jsonl as trees, and some of the last validation."""
    directory = Path(directory)
    found = sorted((directory / 'validate').glob('step-*.jsonl'), key=lambda path: int(path.stem.split('-')[1]))
    sections = [svg_curves(read_log(directory / 'log.jsonl')[0], {'reward': '#3b6fb6'}),
                svg_curves(read_log(directory / 'log.jsonl')[0], {'validation/success_rate': '#1a7f37', 'validation/greedy_success_rate': '#d9622b'})]
    for title, path, count in (('Training', directory / 'episodes.jsonl', newest), ('Validation', found[-1] if found else None, 20)):
        lines = path.read_text(encoding='utf-8').splitlines() if path and path.exists() else []
        if lines:
            sections.append(f'<h2>{title}</h2>' + ''.join(map(episode_html, map(json.loads, lines[-count:][::-1]))))
    temporary = directory / '.nanoforge-tmp-episodes.html'
    temporary.write_text(PAGE.format(title=html.escape(directory.parent.parent.name), body=''.join(sections)), encoding='utf-8')
    temporary.replace(directory / 'episodes.html')


def svg_curves(series, colours, width=440, height=150):
    """Curves of {name: ([steps], [values])} as one SVG with its first and last values; '' where there are none."""
    shown = {name: series[name] for name in colours if len(series.get(name, ([], []))[0]) > 1}
    if not shown:
        return ''
    steps, values = ([x for pair in shown.values() for x in pair[i]] for i in (0, 1))
    low, high, last = min(values), max(values), max(steps) or 1
    place = lambda step, value: f'{width * step / last:.1f},{10 + (height - 20) * (high - value) / ((high - low) or 1):.1f}'
    lines = ''.join(f'<polyline fill="none" stroke-width="2" stroke="{colours[name]}" points="{" ".join(map(place, *pair))}"/>'
                    for name, pair in shown.items())
    words = '<br>'.join(f'<span style="color:{colours[name]}">{html.escape(name)} {short(pair[1][0])} &rarr; {short(pair[1][-1])}</span>'
                        for name, pair in shown.items())
    return f'<div class=turn><svg width="{width}" height="{height}" style="background:#fafafa">{lines}</svg><p>{words}</p></div>'


def short(value):
    return f'{value:.3f}' if abs(value) < 100 else f'{value:.0f}'


def episode_html(episode):
    """One episode as <details>: a row for every turn of every agent."""
    end = '<b class="good">solved</b>' if episode['success'] else '<b class="bad">not solved</b>'
    manner = f', {episode["manner"]}' if 'manner' in episode else ''
    parts = []
    for turn in episode['turns']:
        rows = ''.join(
            f'<tr{" class=executed" if k == turn["executed"] else ""}><td>{html.escape(c["text"])}</td><td>{html.escape(c["note"])}</td>'
            f'<td class=n>{c["reward"]:.2f}</td><td class=n>{c["advantage"]:+.2f}</td></tr>' for k, c in enumerate(turn['candidates']))
        parts.append(f'<p><b>turn {turn["turn"] + 1}, {html.escape(turn["agent"])}</b> '
                     f'<span class=prompt>{html.escape(turn["messages"][-1]["content"])}</span></p><div class=turn>'
                     f'<pre>{html.escape(turn["view"])}</pre><table><tr><th>answer<th>outcome<th>reward<th>advantage</tr>{rows}</table></div>')
    return (f'<details><summary>step {episode["step"]}{manner}, problem {episode["episode"]}: {end}, reward {episode["reward"]:.2f}, '
            f'{len(episode["turns"])} answers</summary>{"".join(parts)}<pre>{html.escape(episode["end"])}</pre></details>')
