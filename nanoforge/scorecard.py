"""
The scorecard: what evaluate.py found, as tables for a terminal, a Markdown page and an HTML page that holds its pictures.
"""
import base64
import html
import io
import itertools
import re

from nanoforge.metrics import ERRORS

COLOURS = ['#3b6fb6', '#d9622b', '#4a9b6e', '#8d62a9', '#b8912f', '#5aa9c4', '#b5527a', '#777777']
ERROR_COLOURS = dict(zip(('correct', *ERRORS), ['#4a9b6e', '#1f1f1f', '#5d3a7a', '#8d62a9', '#b5527a', '#d9622b', '#e8a15f', '#5aa9c4',
                                               '#8fb8e0', '#d8c25a', '#b0b0b0']))
PALE = {'#e8a15f', '#8fb8e0', '#d8c25a', '#b0b0b0'}      # dark writing on these
MEASURES = {'accuracy': ('accuracy', '{:.1%}'), 'reward': ('reward', '{:.3f}'), 'exact_call': ('exact call', '{:.1%}'),
            'right_tool': ('right tool', '{:.1%}'), 'right_arguments': ('right arguments', '{:.1%}'),
            'perplexity': ('perplexity', '{:,.4g}'), 'token_accuracy': ('token accuracy', '{:.1%}'),
            'exact_match': ('exact match', '{:.1%}'), 'f1': ('F1', '{:.1%}'),
            'rouge1': ('ROUGE-1', '{:.1%}'), 'rouge2': ('ROUGE-2', '{:.1%}'), 'rougeL': ('ROUGE-L', '{:.1%}'),
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
    unique, taken = {}, set()
    for row in rows:
        unique.setdefault(row['question'], row)

    def pick(found):
        found = [row for row in found if row['question'] not in taken][:num]
        taken.update(row['question'] for row in found)
        return found

    ranked = sorted(unique.values(), key=lambda row: (-row['correct'], -row['f1'], row['loss'] or 0.0))
    groups = [('best responses', pick([row for row in ranked if row['correct'] or row['f1'] > 0])),
              ('worst responses', pick([row for row in reversed(ranked) if not row['correct']]))]
    for kind in ERRORS:
        groups.append((kind, pick([row for row in unique.values() if row['error'] == kind])))
    return [(heading, found) for heading, found in groups if found]


def canvas(height, columns=1):
    """A matplotlib Figure and its plots in the project's look; without pyplot, which looks for a screen."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, height), dpi=110, layout='constrained')
    plots = figure.subplots(1, columns, squeeze=False)[0]
    for axes in plots:
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(color='#e6e6e6', linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=10)
    return figure, plots


def share_axis(axis):
    from matplotlib.ticker import PercentFormatter
    axis.set_major_formatter(PercentFormatter(1))


def bars(labels, results, values, pale=None, label=True):
    """A picture of shares: a group of bars for each label, in it one for each result. values, pale: functions of (result, label), None
    where there is no value; pale bars stand behind."""
    figure, (axes,) = canvas(1.2 + 0.16 * len(labels) * (len(results) + 1.2))
    height = 0.8 / len(results)
    for i, (result, colour) in enumerate(zip(results, itertools.cycle(COLOURS))):
        places = [j + (i - (len(results) - 1) / 2) * height for j in range(len(labels))]
        if pale:
            axes.barh(places, [pale(result, name) for name in labels], height * 0.92, color=colour, alpha=0.3)
        found = [values(result, name) for name in labels]
        axes.barh(places, [value or 0 for value in found], height * 0.92, color=colour, label=result['name'])
        for place, value in zip(places, found) if label else ():
            if value is not None:
                axes.text(value + 0.008, place, f'{value:.1%}', va='center', fontsize=7 if len(results) > 2 else 8, color='#444444')
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1.08 if label else 1.02)
    share_axis(axes.xaxis)
    axes.grid(visible=False, axis='y')
    figure.legend(loc='outside upper left', ncols=3, frameon=False, fontsize=9)
    return figure, axes


def picture_of_scores(results):
    shares = [key for key, (_, form) in MEASURES.items() if form.endswith('%}') and any(key in result['scores'] for result in results)]
    figure, axes = bars(shares, results, lambda result, key: result['scores'].get(key))
    axes.set_yticks(range(len(shares)), [MEASURES[key][0] for key in shares])
    return figure


def picture_of_tools(results):
    tools = results[0]['tools']
    figure, axes = bars(list(tools), results, lambda result, tool: result['tools'][tool]['exact_call'] / tools[tool]['wanted'],
                        lambda result, tool: result['tools'][tool]['right_tool'] / tools[tool]['wanted'], label=False)
    axes.set_yticks(range(len(tools)), [f'{tool} ({row["wanted"]})' for tool, row in tools.items()])
    axes.set_xlabel('calls that are exactly right; pale: the right tool')
    return figure


def picture_of_errors(results):
    """One bar a result, from correct to wrong answer."""
    figure, (axes,) = canvas(1.6 + 0.45 * len(results))
    left, places = [0.0] * len(results), range(len(results))
    for kind, colour in ERROR_COLOURS.items():
        counts = [result['errors'].get(kind, sum(row['correct'] for row in result['rows'])) for result in results]
        widths = [count / len(result['rows']) for count, result in zip(counts, results)]
        if not any(widths):
            continue
        axes.barh(places, widths, left=left, color=colour, label=kind, edgecolor='white', height=0.7)
        for place, start, width in zip(places, left, widths):
            if width > 0.06:
                axes.text(start + width / 2, place, f'{width:.0%}', ha='center', va='center', fontsize=9,
                          color='#222222' if colour in PALE else 'white')
        left = [start + width for start, width in zip(left, widths)]
    axes.set_yticks(places, [result['name'] for result in results])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    share_axis(axes.xaxis)
    axes.grid(visible=False)
    figure.legend(loc='outside upper left', ncols=6, frameon=False, fontsize=9)
    return figure


def picture_of_rows(models):
    """Left, how many rows have a loss below each value; right, the length of each response over that of its right answer."""
    figure, (losses, lengths) = canvas(3.4, columns=2)
    longest = max(row['answer_tokens'] for result in models for row in result['rows'])
    lengths.plot([0, longest], [0, longest], color='#777777', linewidth=1, linestyle=':')
    for result, colour in zip(models, itertools.cycle(COLOURS)):
        rows = result['rows']
        losses.plot(sorted(row['loss'] for row in rows), [(i + 1) / len(rows) for i in range(len(rows))], color=colour, linewidth=1.8,
                    label=result['name'])
        lengths.scatter([row['answer_tokens'] for row in rows], [row['num_tokens'] for row in rows], s=14, color=colour, alpha=0.35,
                        linewidths=0)
    losses.set_xlabel('loss of the right answer (nats a token)')
    losses.set_ylabel('share of rows below')
    losses.set_xscale('log')
    share_axis(losses.yaxis)
    lengths.set_xlabel('tokens of the right answer')
    lengths.set_ylabel('tokens of the response')
    if len(models) > 1:
        figure.legend(loc='outside upper left', ncols=3, frameon=False, fontsize=9)
    return figure


def picture_of_progress(models):
    """Scores over the number in which the names of checkpoints end."""
    figure, (axes,) = canvas(3.4)
    points = sorted((int(re.search(r'(\d+)\D*$', result['name'])[1]), result['scores']) for result in models)
    for key, colour, line in zip(('accuracy', 'token_accuracy', 'f1', 'rougeL'), COLOURS, ('-', '-', '-', ':')):
        axes.plot(*zip(*((number, scores[key]) for number, scores in points)), line, color=colour, marker='o', label=MEASURES[key][0])
    axes.set_xlabel('checkpoint')
    axes.xaxis.get_major_locator().set_params(integer=True)
    share_axis(axes.yaxis)
    figure.legend(loc='outside upper left', ncols=4, frameon=False, fontsize=9)
    return figure


def pictures_of(results):
    """[(title, matplotlib Figure)]"""
    models = [result for result in results if is_model(result)]
    found = [('Scores', picture_of_scores(results)), ('What is right, and what is wrong', picture_of_errors(results))]
    numbers = {match[1] for result in models if (match := re.search(r'(\d+)\D*$', result['name']))}
    if len(numbers) == len(models) > 2:
        found.append(('From checkpoint to checkpoint', picture_of_progress(models)))
    if results[0]['tools']:
        found.append(('Calls by tool', picture_of_tools(results)))
    return [*found, ('Loss and length, row by row', picture_of_rows(models))]


def pages_of(evaluation, num_examples=5):
    """What evaluate.py found -> (Markdown, HTML): the tables, the pictures (in the HTML, inside the file), examples."""
    results = evaluation['results']
    blocks = [('text', f'{evaluation["num_rows"]:,} rows of {evaluation["data"]}.'), ('table', *score_rows(results)),
              ('text', ' '.join(HELP.split())), ('heading', 'What is right, and what is wrong'),
              ('table', *error_rows(results, meanings=True))]
    models = [result for result in results if is_model(result)]
    for result in models:
        if result['tools']:
            blocks += [('heading', f'{result["name"]}: calls by tool'),
                       ('table', ['tool', 'wanted', 'right tool', 'exact call', 'most often instead'],
                        [[tool, str(row['wanted']), f'{row["right_tool"] / row["wanted"]:.1%}', f'{row["exact_call"] / row["wanted"]:.1%}',
                          row['instead']] for tool, row in result['tools'].items()])]
    for result in models:
        for heading, rows in examples_of(result['rows'], num_examples) if num_examples else ():
            blocks.append(('heading', f'{result["name"]}: {heading}'))
            blocks += [('example', row) for row in rows]
    title = 'Evaluation of ' + ', '.join(result['name'] for result in models)
    return markdown_page(title, blocks), html_page(title, blocks, pictures_of(results))


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
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #e6e6e6}
td:first-child,th:first-child,td.words{text-align:left}
th{border-bottom:2px solid #999}img{max-width:100%}h2{margin-top:2.5rem;font-size:1.2rem}
.example{border-left:4px solid #d9622b;padding:.2rem 1rem;margin:1rem 0;background:#fafafa}.correct{border-color:#4a9b6e}
.example b{display:inline-block;width:6rem;color:#777;font-weight:normal}
.example div{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0}
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
            kind = 'example correct' if row['correct'] else 'example'
            parts.append(f'<div class="{kind}">{texts}<div class=facts>{html.escape(described(row))}</div></div>')
        else:
            tag = {'heading': 'h2', 'text': 'p'}[kind]
            parts.append(f'<{tag}>{html.escape(block[0])}</{tag}>')
    place = next((i for i, block in enumerate(blocks) if block[0] == 'heading'), len(parts))       # behind the first table
    body = '\n'.join([*parts[:place], *drawn, *parts[place:]])
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n')
