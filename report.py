"""Pictures and pages of a run, drawn from its log.jsonl, so that they survive a resume."""
import json
import os

BLOCKS = '▁▂▃▄▅▆▇█'
INK, TRAIN, EVAL, RATE = '#22272e', '#8fb3d9', '#c8442d', '#9a9a9a'


def sparkline(values, width=60):
    """Numbers as a line of block characters, 0 at the bottom, at most `width` of them."""
    values = list(values)
    if len(values) > width:
        values = [values[i * len(values) // width] for i in range(width)]
    top = max(values, default=0) or 1
    return ''.join(BLOCKS[min(len(BLOCKS) - 1, max(0, int(v / top * len(BLOCKS) - 1e-9)))] for v in values)


def read_log(path):
    """log.jsonl -> {name: ([steps], [values])}; header lines and values that were not finite are left out."""
    series = {}
    with open(path) as f:
        for line in f:
            record = json.loads(line)
            for name, value in record.items():
                if 'step' in record and name != 'step' and isinstance(value, (int, float)):
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(record['step'])
                    values.append(value)
    return series


def smooth(values, share=0.02):
    """Exponential moving average over about `share` of the series, unbiased at its start."""
    decay, mean, weight, out = 1 - 1 / max(1.0, share * len(values)), 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        out.append(mean / weight)
    return out


def loss_picture(log_path, png_path, title):
    """loss.png: training and validation loss over steps, the best point marked, the learning rate below. Replaced atomically."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    series = read_log(log_path)
    if 'loss' not in series and 'eval_loss' not in series:
        return
    with plt.rc_context({'font.size': 10, 'axes.edgecolor': '#c8c8c8', 'axes.labelcolor': INK, 'xtick.color': INK, 'ytick.color': INK}):
        figure, (top, low) = plt.subplots(2, 1, figsize=(8, 5.4), sharex=True, height_ratios=[5, 1], layout='constrained')
        if 'loss' in series:
            steps, values = series['loss']
            top.plot(steps, values, color=TRAIN, alpha=0.35, linewidth=0.8)
            top.plot(steps, smooth(values), color=TRAIN, linewidth=1.8, label=f'training  {smooth(values)[-1]:.3f}')
        if 'eval_loss' in series:
            steps, values = series['eval_loss']
            top.plot(steps, values, color=EVAL, linewidth=1.8, marker='o', markersize=3.5, label=f'validation  {values[-1]:.3f}')
            best = min(range(len(values)), key=values.__getitem__)
            top.plot(steps[best], values[best], marker='o', markersize=9, markerfacecolor='none', markeredgecolor=EVAL)
            top.annotate(f'best {values[best]:.3f}', (steps[best], values[best]), xytext=(0, 14), textcoords='offset points',
                         ha='right', color=EVAL)
        # The first steps fall so fast that they would flatten all the rest
        shown = sorted(v for name in ('loss', 'eval_loss') if name in series for v in series[name][1])
        low_end, high_end = shown[0], shown[min(len(shown) - 1, int(0.985 * len(shown)))]
        margin = 0.06 * (high_end - low_end) or 0.1
        top.set_ylim(low_end - margin, high_end + 2 * margin)
        top.set_ylabel('loss (nats per token)')
        top.set_title(title, loc='left', color=INK, fontsize=12, fontweight='bold')
        top.legend(frameon=False)
        if 'learning_rate' in series:
            low.fill_between(*series['learning_rate'], color=RATE, alpha=0.25, linewidth=0)
            low.plot(*series['learning_rate'], color=RATE, linewidth=1.2)
            low.set_ylim(bottom=0)
            low.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
        low.set_ylabel('learning rate')
        low.set_xlabel('step')
        for axis in (top, low):
            axis.spines[['top', 'right']].set_visible(False)
            axis.grid(axis='y', color='#ececec', linewidth=0.8)
            axis.set_axisbelow(True)
        figure.savefig(png_path + '.tmp', dpi=130, format='png')
        plt.close(figure)
    os.replace(png_path + '.tmp', png_path)
