"""Pictures, drawn with matplotlib from what was written down: a resumed run's picture is whole.

    sparkline                               a curve as one line of text
    loss_picture, reward_picture, curves    a run's log.jsonl over its steps -> PNG
    margins                                 reward margins of preference pairs -> PNG
"""
import functools
import importlib.util
import io
import itertools
import json
import math
from pathlib import Path

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

def picture(draw):
    """A decorator: without matplotlib nothing is drawn, which ends no run."""
    @functools.wraps(draw)
    def drawn(*given, **more):
        if has_matplotlib():
            draw(*given, **more)
    return drawn


@functools.cache
def has_matplotlib():
    """Says so once where it is not."""
    found = importlib.util.find_spec('matplotlib') is not None
    if not found:
        print('no pictures: pip install matplotlib', flush=True)
    return found


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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


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
    if len(values) == 1:        # of which no line would be seen
        style = {**style, **dots(steps)}
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

@picture
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


@picture
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


@picture
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            axes.legend(fontsize=8 if axes is panels['A'] else 7, frameon=False)
    panels['A'].set_title(title, fontsize=13, loc='left')
    panels['A'].set_xlabel('optimizer step', fontsize=9)
    write_png(figure, png_path)


@picture
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
