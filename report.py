"""
Pictures and pages of what a run or an evaluation wrote down. A loss curve is drawn from log.jsonl alone, so a resumed run's is whole.
"""
import base64
import html
import io
import itertools
import json
import re
from pathlib import Path


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
    temporary = Path(png_path).with_name('.nanoforge-tmp-' + Path(png_path).name)
    figure.savefig(temporary, format='png')
    temporary.replace(png_path)


# ---- the pages of evaluate.py -----------------------------------------------------------------------------------------------

COLOURS = ['#3b6fb6', '#d9622b', '#4a9b6e', '#8d62a9', '#b8912f', '#5aa9c4', '#b5527a', '#777777']
ERROR_COLOURS = ['#4a9b6e', '#1f1f1f', '#5d3a7a', '#8d62a9', '#b5527a', '#d9622b', '#e8a15f', '#5aa9c4', '#8fb8e0', '#d8c25a', '#b0b0b0']
MEASURES = {'accuracy': ('accuracy', '{:.1%}'), 'reward': ('reward', '{:.3f}'), 'exact_call': ('exact call', '{:.1%}'),
            'right_tool': ('right tool', '{:.1%}'), 'right_arguments': ('right arguments', '{:.1%}'),
            'perplexity': ('perplexity', '{:,.4g}'), 'token_accuracy': ('token accuracy', '{:.1%}'), 'exact_match': ('exact match', '{:.1%}'),
            'f1': ('F1', '{:.1%}'), 'rouge1': ('ROUGE-1', '{:.1%}'), 'rouge2': ('ROUGE-2', '{:.1%}'), 'rougeL': ('ROUGE-L', '{:.1%}'),
            'bleu': ('BLEU', '{:.1f}'), 'bleu1': ('BLEU-1', '{:.1f}'), 'bleu2': ('BLEU-2', '{:.1f}'), 'bleu3': ('BLEU-3', '{:.1f}'),
            'stopped': ('stopped by itself', '{:.1%}'), 'mean_tokens': ('tokens a response', '{:.1f}')}
HELP = '''Accuracy: all tool calls the same in order, where there are any; the reward of the task, where there is one; else the same words
but for case, punctuation and articles. Perplexity and token accuracy are of the right answers, read with the prompt and the right tokens
before each; all else is of what the model wrote. Exact match: the same text but for white space. F1: words in common, as SQuAD counts
them. ROUGE: F-measures by rouge-score, no stemming. BLEU: of the whole set, 0 to 100, by sacrebleu.'''


def is_model(result):
    """Whether it is a model's, and not a trivial solver's, which has no loss."""
    return 'loss' in result['scores']


def score_rows(results):
    """(headers, rows) of the scores side by side; a measure that none has is left out."""
    rows = [[label, *('' if result['scores'].get(key) is None else form.format(result['scores'][key]) for result in results)]
            for key, (label, form) in MEASURES.items()]
    return ['', *(result['name'] for result in results)], [row for row in rows if any(row[1:])]


def error_rows(results, meanings=False):
    """(headers, rows) of how many responses were right, and what was wrong with the others."""
    from metrics import ERRORS
    totals = [len(result['rows']) for result in results]
    counts = {'correct': [sum(row['correct'] for row in result['rows']) for result in results],
              **{kind: [result['errors'][kind] for result in results] for kind in ERRORS}}
    rows = [[kind, *(f'{count:,} ({count / total:.1%})' if count else '' for count, total in zip(found, totals))] +
            ([ERRORS.get(kind, '')] if meanings else []) for kind, found in counts.items() if any(found)]
    return ['', *(result['name'] for result in results)] + (['what it means'] if meanings else []), rows


def text_table(headers, rows):
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(str(line[i])) for line in [headers, *rows]) for i in range(len(headers))]
    return '\n'.join('  '.join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths)))
                     for line in [headers, *rows]) + '\n'


def examples_of(rows, num):
    """[(heading, rows)]: the best responses, the worst, and the first of each kind of error; each row once, equal questions once."""
    unique, taken = {row['question']: row for row in reversed(rows)}, set()

    def pick(found):
        found = [row for row in found if row['question'] not in taken][:num]
        taken.update(row['question'] for row in found)
        return found

    ranked = sorted(unique.values(), key=lambda row: (-row['correct'], -row['f1'], row['loss'] or 0.0))
    groups = [('Best responses', pick([row for row in ranked if row['correct'] or row['f1'] > 0])),
              ('Worst responses', pick([row for row in reversed(ranked) if not row['correct']]))]
    for kind in dict.fromkeys(row['error'] for row in rows if row['error']):
        groups.append((f'Error: {kind}', pick([row for row in unique.values() if row['error'] == kind])))
    return [(heading, found) for heading, found in groups if found]


def clean(axes):
    """The project's look of a plot."""
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='#e6e6e6', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)


def evaluation_pictures(results):
    """[(title, matplotlib Figure)]: the scores side by side, what is wrong, calls by tool, loss and length of the answers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from metrics import ERRORS
    names = [result['name'] for result in results]
    pictures, models = [], [result for result in results if is_model(result)]

    shares = [key for key, (_, form) in MEASURES.items() if form.endswith('%}') and all(key in result['scores'] for result in models)]
    figure = Figure(figsize=(9, 1.2 + 0.16 * len(shares) * (len(results) + 1.2)), dpi=110, layout='constrained')
    axes = figure.subplots()
    height = 0.8 / len(results)
    for i, (result, colour) in enumerate(zip(results, itertools.cycle(COLOURS))):
        places = [-j - (i - (len(results) - 1) / 2) * height for j in range(len(shares))]
        values = [result['scores'].get(key) or 0 for key in shares]
        axes.barh(places, values, height * 0.92, color=colour, label=result['name'])
        for place, value, key in zip(places, values, shares):
            if key in result['scores']:
                axes.text(value + 0.008, place, f'{value:.1%}', va='center', fontsize=7 if len(results) > 2 else 8, color='#444444')
    axes.set_yticks([-j for j in range(len(shares))], [MEASURES[key][0] for key in shares])
    axes.set_ylim(0.5 - len(shares), 0.5)
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    clean(axes)
    axes.grid(visible=False, axis='y')
    figure.legend(loc='outside upper left', ncols=3, frameon=False, fontsize=9)
    pictures.append(('Scores', figure))

    kinds = [kind for kind in ('correct', *ERRORS) if kind == 'correct' or any(result['errors'][kind] for result in results)]
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(results)), dpi=110, layout='constrained')
    axes, colours = figure.subplots(), dict(zip(('correct', *ERRORS), ERROR_COLOURS))
    left = [0.0] * len(results)
    for kind in kinds:
        widths = [(sum(row['correct'] for row in result['rows']) if kind == 'correct' else result['errors'][kind]) / len(result['rows'])
                  for result in results]
        axes.barh(range(len(results)), widths, left=left, color=colours[kind], label=kind, edgecolor='white', height=0.7)
        for place, (start, width) in enumerate(zip(left, widths)):
            if width > 0.06:
                axes.text(start + width / 2, place, f'{width:.0%}', ha='center', va='center', fontsize=9,
                          color='white' if kind in ('correct', *list(ERRORS)[:5]) else '#222222')
        left = [start + width for start, width in zip(left, widths)]
    axes.set_yticks(range(len(results)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    clean(axes)
    axes.grid(visible=False)
    figure.legend(loc='outside upper left', ncols=6, frameon=False, fontsize=9)
    pictures.append(('What is right, and what is wrong', figure))

    tools = list(results[0]['tools'])
    if tools:
        figure = Figure(figsize=(9, 1.2 + 0.2 * len(tools) * (len(results) + 0.5)), dpi=110, layout='constrained')
        axes = figure.subplots()
        for i, (result, colour) in enumerate(zip(results, itertools.cycle(COLOURS))):
            places = [j + (i - (len(results) - 1) / 2) * height for j in range(len(tools))]
            found = [result['tools'][tool] for tool in tools]
            axes.barh(places, [row['right_tool'] / row['wanted'] for row in found], height * 0.92, color=colour, alpha=0.3)
            axes.barh(places, [row['exact_call'] / row['wanted'] for row in found], height * 0.92, color=colour, label=result['name'])
        axes.set_yticks(range(len(tools)), [f'{tool} ({results[0]["tools"][tool]["wanted"]})' for tool in tools])
        axes.set_ylim(len(tools) - 0.5, -0.5)
        axes.set_xlim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel('calls that are exactly right; pale: the right tool')
        clean(axes)
        axes.grid(visible=False, axis='y')
        figure.legend(loc='outside upper left', ncols=3, frameon=False, fontsize=9)
        pictures.append(('Calls by tool', figure))

    figure = Figure(figsize=(9, 3.4), dpi=110, layout='constrained')
    losses, lengths = figure.subplots(1, 2)
    for result, colour in zip(models, itertools.cycle(COLOURS)):
        rows = result['rows']
        curve = sorted(row['loss'] for row in rows)
        losses.plot(curve, [(i + 1) / len(curve) for i in range(len(curve))], color=colour, linewidth=1.8, label=result['name'])
        lengths.scatter([row['answer_tokens'] for row in rows], [row['num_tokens'] for row in rows], s=14, color=colour, alpha=0.35, linewidths=0)
    losses.set_xlabel('loss of the right answer (nats a token)')
    losses.set_ylabel('share of rows below')
    losses.set_xscale('symlog', linthresh=0.1)
    losses.set_xlim(left=0)
    losses.yaxis.set_major_formatter(PercentFormatter(1))
    longest = max(row['answer_tokens'] for result in models for row in result['rows'])
    lengths.plot([0, longest], [0, longest], color='#777777', linewidth=1, linestyle=':')
    lengths.set_xlabel('tokens of the right answer')
    lengths.set_ylabel('tokens of the response')
    clean(losses)
    clean(lengths)
    if len(models) > 1:
        losses.legend(frameon=False, fontsize=8, loc='lower right')
    pictures.append(('Loss and length, row by row', figure))
    return pictures


def evaluation_pages(evaluation, num_examples=5):
    """What evaluate.py found -> (Markdown, HTML): the tables, the pictures (in the HTML, inside the file), examples."""
    results = evaluation['results']
    blocks = [('text', f'{evaluation["num_rows"]:,} rows of {evaluation["data"]}.'), ('table', *score_rows(results)), ('text', ' '.join(HELP.split())),
              ('heading', 'What is right, and what is wrong'), ('table', *error_rows(results, meanings=True))]
    models = [result for result in results if is_model(result)]
    for result in models:
        if result['tools']:
            blocks += [('heading', f'Calls by tool: {result["name"]}'),
                       ('table', ['tool', 'wanted', 'right tool', 'exact call', 'most often instead'],
                        [[tool, str(row['wanted']), f'{row["right_tool"] / row["wanted"]:.1%}', f'{row["exact_call"] / row["wanted"]:.1%}',
                          row['instead']] for tool, row in result['tools'].items()])]
    for result in models:
        for heading, rows in examples_of(result['rows'], num_examples) if num_examples else ():
            blocks.append(('heading', f'{heading}: {result["name"]}'))
            blocks += [('example', row) for row in rows]
    title = 'Evaluation of ' + ', '.join(result['name'] for result in models)
    return markdown_page(title, blocks), html_page(title, blocks, evaluation_pictures(results))


def described(row):
    """One line about an example."""
    facts = ['correct' if row['correct'] else row['error'], f'F1 {row["f1"]:.2f}']
    return ', '.join(facts + ([f'loss {row["loss"]:.3f}'] if row['loss'] is not None else []) + ([row['where']] if row['where'] else []))


def markdown_page(title, blocks):
    def cell(text):
        return ' '.join(text.split()).replace('|', '\\|')

    parts = [f'# {title}']
    for kind, *block in blocks:
        if kind == 'table':
            headers, rows = block
            lines = [headers, ['---'] + ['---:'] * (len(headers) - 1), *rows]
            parts.append('\n'.join('| ' + ' | '.join(map(cell, line)) + ' |' for line in lines))
        elif kind == 'example':
            text = '\n'.join(f'{name}: {block[0][name]}' for name in ('question', 'reference', 'response'))
            fence = '`' * max(3, 1 + max((len(run) for run in re.findall('`+', text)), default=0))
            parts.append(f'{described(block[0])}\n\n{fence}\n{text}\n{fence}')
        else:
            parts.append({'heading': '## ', 'text': ''}[kind] + block[0])
    return '\n\n'.join(parts) + '\n'


STYLE = '''body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:62rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #e6e6e6}
td:first-child,th:first-child,td.words{text-align:left}th{border-bottom:2px solid #999}img{max-width:100%}h2{margin-top:2.5rem;font-size:1.2rem}
.example{border-left:4px solid #d9622b;padding:.2rem 1rem;margin:1rem 0;background:#fafafa}.correct{border-color:#4a9b6e}
.example b{display:inline-block;width:6rem;color:#777;font-weight:normal}.example div{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0}
.facts{color:#777;font-size:.85rem}'''


def html_page(title, blocks, pictures):
    """One file that needs no other: pictures are PNG in base64, all that a model wrote is escaped."""
    def picture(heading, figure):
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png')
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<h2>{html.escape(heading)}</h2><img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'

    parts, drawn = [], [picture(*entry) for entry in pictures]
    for kind, *block in blocks:
        if kind == 'table':
            headers, rows = block
            head = ''.join(f'<th>{html.escape(header)}</th>' for header in headers)
            body = ''.join('<tr>' + ''.join(f'<td{" class=words" if header.startswith(("what", "most")) else ""}>{html.escape(text)}</td>'
                                            for header, text in zip(headers, row)) + '</tr>' for row in rows)
            parts.append(f'<table><tr>{head}</tr>{body}</table>')
        elif kind == 'example':
            row = block[0]
            texts = ''.join(f'<div><b>{name}</b> {html.escape(row[name])}</div>' for name in ('question', 'reference', 'response'))
            parts.append(f'<div class="example{" correct" if row["correct"] else ""}">{texts}<div class=facts>{html.escape(described(row))}</div></div>')
        else:
            tag = {'heading': 'h2', 'text': 'p'}[kind]
            parts.append(f'<{tag}>{html.escape(block[0])}</{tag}>')
    place = next((i for i, block in enumerate(blocks) if block[0] == 'heading'), len(parts))       # behind the first table
    body = '\n'.join([*parts[:place], *drawn, *parts[place:]])
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n'
            f'<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n')
