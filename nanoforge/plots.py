"""Pictures, drawn with matplotlib from what was written down: a resumed run's picture is whole.

    sparkline                               a curve as one line of text
    loss_picture, reward_picture, curves    a run's log.jsonl over its steps -> PNG
    margins                                 reward margins of preference pairs -> PNG
    evaluation_figures                      what evaluate.py found -> figures for its page
"""
import io
import itertools
import json
import math
import re
from pathlib import Path

from nanoforge.metrics import ERRORS, SCORES, count_of, models_in

BLUE, ORANGE, GREEN, PURPLE, GREY = '#3b6fb6', '#d9622b', '#4a9b6e', '#8d62a9', '#777777'
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, '#b8912f', '#5aa9c4', '#b5527a', GREY)
REWARD_COLOURS = (BLUE, '#999999', '#7fb069', ORANGE, '#e8a87c', '#8e5ea2')
# panels of reward.png, the first above the others: (label of the axis, keys of the log)
REWARD_PANELS = (
    ('reward',
     'reward rewards success_rate eval_accuracy eval_accuracy_sampled eval_reward'),
    ('completion length (tokens)', 'completions/mean_length'),
    ('shares',
     'completions/clipped_ratio frac_reward_zero_std clip_ratio/region_mean explained_variance'),
    ('entropy and KL (nats per token)', 'entropy kl approx_kl'),
)
ERROR_COLOURS = dict(zip(('correct', *ERRORS), (
    GREEN, '#1f1f1f', '#5d3a7a', PURPLE, '#b5527a', ORANGE, '#e8a15f', '#5aa9c4', '#8fb8e0', '#d8c25a',
    '#b0b0b0')))
PALE = ('#e8a15f', '#8fb8e0', '#d8c25a', '#b0b0b0')     # dark writing on these


# ---- a run's log ------------------------------------------------------------------------------------------

def read_log(path):
    """({name: ([steps], [values])}, header) of a log.jsonl, without null and lines that a kill cut short."""
    series, header = {}, {}
    for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        header = header or entry.get('run', {})
        if 'step' not in entry:
            continue
        step = entry.pop('step')
        for key, value in entry.items():
            if isinstance(value, (int, float)):
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return series, header


def sparkline(values, width=60):
    """A curve as one line of text: '▁▂▄▆█'; `values` are taken at `width` evenly spaced places."""
    values = list(values)
    width = min(width, len(values))
    picked = [values[round(i * (len(values) - 1) / max(width - 1, 1))] for i in range(width)]
    low, high = min(picked), max(picked)
    bars = '▁▂▃▄▅▆▇█'
    if low == high:
        return bars[3] * width
    return ''.join(bars[round((value - low) / (high - low) * 7)] for value in picked)


def smooth(values, span):
    """The mean over `span` values around each: it never lags. Near the start fewer, as many on either side,
    because the curve is steep there; near the end those that there are."""
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for i in range(len(values)):
        start = max(0, i - span // 2)
        stop = min(len(values), i + min(i, span // 2) + 1)
        means.append((sums[stop] - sums[start]) / (stop - start))
    return means


# ---- what all pictures share ------------------------------------------------------------------------------

def new_figure(width, height, dpi=110):
    """A matplotlib Figure of width x height inches."""
    from matplotlib.figure import Figure    # 0.3 s; without pyplot, which looks for a screen
    return Figure(figsize=(width, height), dpi=dpi, layout='constrained')


def plain_style(axes, grid='y', fontsize=10):
    """The look of all pictures: two edges, and a pale grid behind the curves. grid: 'x', 'y' or 'both'."""
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis=grid, color='#e6e6e6', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=fontsize)


def step_axis(axes):
    """Steps are whole numbers; 20000 is written 20k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator
    axes.set_xlabel('step', fontsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def percent_axis(axis):
    from matplotlib.ticker import PercentFormatter
    axis.set_major_formatter(PercentFormatter(1))


def legend_above(axes, **style):
    """Outside the plot, where it hides no curve."""
    axes.legend(loc='lower left', bbox_to_anchor=(-0.01, 1), frameon=False, **style)


def figure_legend(figure, columns=3):
    figure.legend(loc='outside upper left', ncols=columns, frameon=False, fontsize=9)


def noisy_curve(axes, steps, values, label, color, **style):
    """What is measured at every step: pale as it is, and its mean over a fiftieth of the run, which is
    returned. label: may name the last value of that mean, {last}, or of what was measured, {value}."""
    span = len(values) // 50
    curve = smooth(values, span)
    if span > 1:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    label = label.format(last=curve[-1], value=values[-1])
    axes.plot(steps, curve, color=color, linewidth=1.8, label=label, **style)
    return curve


def dots(steps):
    """Single measurements are told apart while they are few."""
    return {'marker': 'o', 'markersize': 4 if len(steps) < 40 else 0}


def write_png(figure, png_path):
    """Whole or not at all."""
    temporary = Path(png_path).with_name('.nanoforge-tmp-' + Path(png_path).name)
    figure.savefig(temporary, format='png')
    temporary.replace(png_path)


def png_bytes(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


# ---- pictures of a run ------------------------------------------------------------------------------------

def loss_picture(log_path, png_path, title):
    """Training and validation loss (nats per token) over steps, below them the learning rate; writes a PNG.

    The scale is that of the curves after their start, so that the first steps do not flatten the rest. A log
    without a loss leaves no picture.
    """
    series, header = read_log(log_path)
    if 'loss' not in series and 'eval_loss' not in series:
        return
    figure = new_figure(9, 5.6, dpi=120)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    plain_style(losses)
    plain_style(rates)

    in_view = []        # losses that set the scale
    if 'loss' in series:
        steps, values = series['loss']
        curve = noisy_curve(losses, steps, values, 'training {last:.4f}', BLUE, **dots(steps))
        in_view += curve[len(curve) // 20:]
    if 'eval_loss' in series:
        steps, values = series['eval_loss']
        best = values.index(min(values))
        label = f'validation {values[-1]:.4f}'
        losses.plot(steps, values, color=ORANGE, linewidth=1.8, label=label, **dots(steps))
        losses.plot(steps[best], values[best], color=ORANGE, marker='*', markersize=15, zorder=5,
                    markeredgecolor='white', linestyle='none',
                    label=f'best {values[best]:.4f} at step {steps[best]:,}')
        in_view += values[1:] if len(values) > 2 else values       # the first is of the untrained model
    low, high = min(in_view), max(in_view)
    margin = 0.06 * (high - low) or 0.1
    losses.set_ylim(low - margin, high + margin)
    losses.set_ylabel('loss (nats)', fontsize=11)
    losses.set_title(title, fontsize=13, loc='left', pad=32)
    if header.get('stand_in'):
        losses.set_title('stand-in data', fontsize=13, color=ORANGE, loc='right', pad=32)
    legend_above(losses, ncols=3, fontsize=11)

    steps, values = series.get('learning_rate', ([], []))
    rates.plot(steps, values, color=GREY, linewidth=1.5)
    peak = max(values, default=0) or 1
    rates.set_ylim(0, 1.1 * peak)
    rates.set_yticks([0, peak], ['0', f'{peak:.2g}'])
    rates.set_ylabel('learning\nrate', fontsize=9)
    step_axis(rates)
    for axes in (losses, rates):
        axes.margins(x=0.02)
    write_png(figure, png_path)


def curves(log_path, png_path, title, panels):
    """Draw curves of a log.jsonl over steps, one panel below the other, and write a PNG.

    panels: [(label of the axis, {key of the log: name of the curve})]; keys that the log lacks are left out,
    and panels without any.
    """
    series, _ = read_log(log_path)
    known = [(label, {key: name for key, name in keys.items() if key in series}) for label, keys in panels]
    known = [(label, keys) for label, keys in known if keys]
    if not known:
        return
    figure = new_figure(9, 1 + 2.2 * len(known), dpi=120)
    column = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, keys) in zip(column, known):
        plain_style(axes)
        for colour, (key, name) in zip(COLOURS, keys.items()):
            steps, values = series[key]
            label_of_curve = f'{name} {values[-1]:.3g}'
            axes.plot(steps, values, color=colour, linewidth=1.6, label=label_of_curve, **dots(steps))
        axes.set_ylabel(label, fontsize=11)
        axes.margins(x=0.02)
        legend_above(axes, ncols=4, fontsize=10, borderaxespad=0.2)
    figure.suptitle(title, fontsize=13, x=0.02, ha='left')
    step_axis(column[-1])
    write_png(figure, png_path)


def reward_picture(log_path, png_path, title):
    """Reward and accuracy over optimizer steps, and below them length, shares, entropy and KL; writes a PNG.
    A log without a reward leaves none."""
    from matplotlib.ticker import MaxNLocator

    series, _ = read_log(log_path)
    if 'reward' not in series and 'eval_reward' not in series:
        return
    if 'eval_accuracy' in series:       # says more than the reward
        series.pop('eval_reward', None)
    if series.get('success_rate') == series.get('reward'):
        series.pop('success_rate', None)            # where success is the reward, one line is enough
    figure = new_figure(10, 7.2)
    panels = figure.subplot_mosaic('AAA;BCD', height_ratios=[3, 2])
    for axes, (label, keys) in zip(panels.values(), REWARD_PANELS):
        plain_style(axes, fontsize=8)
        for colour, key in zip(REWARD_COLOURS, keys.split()):
            if key not in series:
                continue
            steps, values = series[key]
            if key.startswith('eval'):
                axes.plot(steps, values, color=colour, linewidth=1.8, marker='o', markersize=3.5,
                          label=f'{key} {values[-1]:.3g}')
            else:
                noisy_curve(axes, steps, values, key + ' {value:.3g}', colour)
        axes.set_ylabel(label, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(fontsize=8 if axes is panels['A'] else 7, frameon=False)
    panels['A'].set_title(title, fontsize=13, loc='left')
    panels['A'].set_xlabel('optimizer step', fontsize=9)
    write_png(figure, png_path)


def margins(values, png_path, title):
    """Draw a histogram of the reward margins of preference pairs, those above 0 (ordered as wanted) in
    another colour; writes a PNG."""
    figure = new_figure(9, 3.6, dpi=120)
    axes = figure.subplots()
    low, high = min(*values, 0.0), max(*values, 0.0)
    width = (high - low) / 30 or 0.1
    start = -math.ceil(-low / width) * width            # an edge at 0: no bar mixes both signs
    edges = [start + width * i for i in range(math.ceil((high - start) / width) + 2)]
    for colour, name, part in ((ORANGE, 'rejected preferred', [value for value in values if value < 0]),
                               (GREY, 'ties', [value for value in values if value == 0]),
                               (BLUE, 'chosen preferred', [value for value in values if value > 0])):
        if part:
            share = len(part) / len(values)
            axes.hist(part, edges, color=colour, label=f'{name}: {len(part):,} ({share:.0%})')
    axes.axvline(0, color='black', linewidth=1)
    axes.set_xlabel('reward margin', fontsize=11)
    axes.set_ylabel('pairs', fontsize=11)
    axes.set_title(title, fontsize=13, loc='left')
    axes.legend(frameon=False, fontsize=11)
    axes.spines[['top', 'right']].set_visible(False)
    write_png(figure, png_path)


# ---- pictures of an evaluation ----------------------------------------------------------------------------

def evaluation_figures(results):
    """[(title, Figure)] of the results of evaluate.py (metrics.result_of)."""
    models = models_in(results)
    numbers = {checkpoint_number(result) for result in models} - {None}
    figures = [('Scores', figure_of_scores(results)),
               ('What is right, and what is wrong', figure_of_errors(results))]
    if len(numbers) == len(models) > 2:
        figures.append(('From checkpoint to checkpoint', figure_of_progress(models)))
    if results[0]['tools']:
        figures.append(('Calls by tool', figure_of_tools(results)))
    return [*figures, ('Loss and length, row by row', figure_of_rows(models))]


def checkpoint_number(result):
    """The number in which the name of a checkpoint ends, None where it has none."""
    match = re.search(r'(\d+)\D*$', result['name'])
    return int(match[1]) if match else None


def bars(labels, results, values, pale=None):
    """Shares as a group of bars for each label, in it one for each result. values, pale: for each result one
    value a label, None where there is none; pale bars stand behind, in place of figures beside the bars."""
    figure = new_figure(9, 1.2 + 0.16 * len(labels) * (len(results) + 1.2))
    axes = figure.subplots()
    plain_style(axes, grid='x')
    height = 0.8 / len(results)
    for i, (result, colour) in enumerate(zip(results, itertools.cycle(COLOURS))):
        offset = (i - (len(results) - 1) / 2) * height
        positions = [offset + row for row in range(len(labels))]
        style = {'height': height * 0.92, 'color': colour}
        drawn = axes.barh(positions, [value or 0 for value in values[i]], label=result['name'], **style)
        if pale:
            axes.barh(positions, pale[i], alpha=0.3, **style)
        else:
            shares = ['' if value is None else f'{value:.1%}' for value in values[i]]
            axes.bar_label(drawn, shares, padding=3, color='#444444', fontsize=7 if len(results) > 2 else 8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1.02 if pale else 1.08)
    percent_axis(axes.xaxis)
    figure_legend(figure)
    return figure


def figure_of_scores(results):
    """All that are shares."""
    shares = [key for key, (_, form) in SCORES.items() if form == '{:.1%}']
    shares = [key for key in shares if any(key in result['scores'] for result in results)]
    return bars([SCORES[key][0] for key in shares], results,
                [[result['scores'].get(key) for key in shares] for result in results])


def figure_of_tools(results):
    """The calls of each tool, most wanted first."""
    tools = results[0]['tools']

    def shares(result, count):
        # a model with a shorter context has fewer rows, and may lack a tool
        return [result['tools'].get(tool, {count: 0})[count] / tools[tool]['wanted'] for tool in tools]

    figure = bars([f'{tool} ({row["wanted"]})' for tool, row in tools.items()], results,
                  [shares(result, 'exact_call') for result in results],
                  pale=[shares(result, 'right_tool') for result in results])
    figure.axes[0].set_xlabel('calls that are exactly right; pale: the right tool')
    return figure


def figure_of_errors(results):
    """One bar a result, from correct to wrong answer."""
    figure = new_figure(9, 1.6 + 0.45 * len(results))
    axes = figure.subplots()
    plain_style(axes)
    axes.grid(visible=False)
    rows, left = range(len(results)), [0.0] * len(results)
    for kind, colour in ERROR_COLOURS.items():
        widths = [count_of(kind, result) / len(result['rows']) for result in results]
        if not any(widths):
            continue
        drawn = axes.barh(rows, widths, left=left, color=colour, label=kind, edgecolor='white', height=0.7)
        shares = [f'{width:.0%}' if width > 0.06 else '' for width in widths]      # where there is room
        axes.bar_label(drawn, shares, label_type='center', fontsize=9,
                       color='#222222' if colour in PALE else 'white')
        left = [start + width for start, width in zip(left, widths)]
    axes.set_yticks(rows, [result['name'] for result in results])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    figure_legend(figure, columns=6)
    return figure


def figure_of_rows(models):
    """Left, how many rows have a loss below each value; right, the length of each response over that of its
    right answer."""
    figure = new_figure(9, 3.4)
    losses, lengths = figure.subplots(1, 2)
    longest = max(row['answer_tokens'] for result in models for row in result['rows'])
    lengths.plot([0, longest], [0, longest], color=GREY, linewidth=1, linestyle=':')
    for result, colour in zip(models, itertools.cycle(COLOURS)):
        loss, wanted, written = zip(*((row['loss'], row['answer_tokens'], row['num_tokens'])
                                      for row in result['rows']))
        losses.ecdf(loss, color=colour, linewidth=1.8, label=result['name'])
        lengths.scatter(wanted, written, color=colour, s=14, alpha=0.35, linewidths=0)
    losses.set_xlabel('loss of the right answer (nats a token)')
    losses.set_ylabel('share of rows below')
    losses.set_xscale('log')
    percent_axis(losses.yaxis)
    lengths.set_xlabel('tokens of the right answer')
    lengths.set_ylabel('tokens of the response')
    for axes in (losses, lengths):
        plain_style(axes, grid='both')
    if len(models) > 1:
        figure_legend(figure)
    return figure


def figure_of_progress(models):
    """Scores over the number in which the names of checkpoints end."""
    figure = new_figure(9, 3.4)
    axes = figure.subplots()
    plain_style(axes, grid='both')
    models = sorted(models, key=checkpoint_number)
    numbers = [checkpoint_number(result) for result in models]
    for key, colour in (('accuracy', BLUE), ('token_accuracy', ORANGE), ('f1', GREEN), ('rougeL', PURPLE)):
        if key in models[0]['scores']:
            axes.plot(numbers, [result['scores'][key] for result in models], color=colour, marker='o',
                      linestyle=':' if key == 'rougeL' else '-', label=SCORES[key][0])
    axes.set_xlabel('checkpoint')
    axes.xaxis.get_major_locator().set_params(integer=True)
    percent_axis(axes.yaxis)
    figure_legend(figure, columns=4)
    return figure
