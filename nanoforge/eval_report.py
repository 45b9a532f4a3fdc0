"""What evaluate.py found, for people: tables, figures, and the page that holds them.

    evaluation_pages            evaluation.md and .html
    score_table, error_table    what the console shows
    evaluation_figures          scores, tools, errors, rows and progress, drawn with matplotlib
"""
import base64
import itertools
import re
from functools import partial
from html import escape

from nanoforge.metrics import ERRORS, SCORES, count_of, models_in
from nanoforge.pages import element, html_page, html_table
from nanoforge.plots import (
    BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, figure_legend, has_matplotlib, new_figure, percent_axis,
    plain_style, png_bytes)

ERROR_COLOURS = dict(zip(('correct', *ERRORS), (
    GREEN, '#1f1f1f', '#5d3a7a', PURPLE, '#b5527a', ORANGE, '#e8a15f', '#5aa9c4', '#8fb8e0', '#d8c25a',
    '#b0b0b0')))
PALE = ('#e8a15f', '#8fb8e0', '#d8c25a', '#b0b0b0')     # dark writing on these


# ---- the page ----------------------------------------------------------------------------------------------

HELP = (
    'Accuracy: all tool calls the same in order, where there are any; the reward of the task, where there is '
    'one; else the same words but for case, punctuation and articles. Perplexity and token accuracy are of '
    'the right answers, read with the prompt and the right tokens before each; all else is of what the model '
    'wrote. Exact match: the same text but for white space. F1: words in common, as SQuAD counts them. '
    'ROUGE: F-measures by rouge-score, no stemming. BLEU: of the whole set, 0 to 100, by sacrebleu.')
EXAMPLE = ('question', 'reference', 'response')         # texts of a row that an example shows


def evaluation_pages(evaluation, num_examples=5):
    """What evaluate.py found -> (Markdown, HTML): tables, pictures (inside the HTML file), examples."""
    results = evaluation['results']
    models = models_in(results)
    title = 'Evaluation of ' + ', '.join(result['name'] for result in models)
    blocks = [('text', f'{evaluation["num_rows"]:,} rows of {evaluation["data"]}.'),
              ('table', *score_table(results)),
              ('text', HELP)]
    blocks += [('picture', *picture) for picture in evaluation_figures(results)]
    blocks += [('heading', 'What is right, and what is wrong'),
               ('table', *error_table(results, meanings=True))]
    for result in models:
        if result['tools']:
            blocks += [('heading', f'{result["name"]}: calls by tool'),
                       ('table', *tool_table(result))]
    for result in models:
        for heading, rows in examples_of(result['rows'], num_examples):
            blocks.append(('heading', f'{result["name"]}: {heading}'))
            blocks += [('example', row) for row in rows]

    markdown = [MARKDOWN[kind](*content) for kind, *content in blocks if kind in MARKDOWN]
    html = [HTML[kind](*content) for kind, *content in blocks]
    return '\n\n'.join([f'# {title}', *markdown]) + '\n', html_page(title, '\n'.join(html))


def score_table(results):
    """(headers, rows) of the scores side by side; a score that none has is left out."""
    rows = []
    for key, (label, form) in SCORES.items():
        values = [result['scores'].get(key) for result in results]
        if any(value is not None for value in values):
            rows.append([label, *('' if value is None else form.format(value) for value in values)])
    return ['', *(result['name'] for result in results)], rows


def error_table(results, meanings=False):
    """(headers, rows) of how many responses were right, and what was wrong with the others."""
    headers, rows = ['', *(result['name'] for result in results)], []
    for kind in ('correct', *ERRORS):
        counts = [count_of(kind, result) for result in results]
        if any(counts):
            rows.append([kind, *(f'{count:,} ({count / len(result["rows"]):.1%})' if count else ''
                                 for count, result in zip(counts, results))])
    if meanings:
        headers.append('what it means')
        rows = [[*row, ERRORS.get(row[0], '')] for row in rows]
    return headers, rows


def tool_table(result):
    """(headers, rows) of the tools that were wanted."""
    rows = []
    for tool, row in result['tools'].items():
        wanted = row['wanted']
        shares = f'{row["right_tool"] / wanted:.1%}', f'{row["exact_call"] / wanted:.1%}'
        rows.append([tool, str(wanted), *shares, row['instead']])
    return ['tool', 'wanted', 'right tool', 'exact call', 'most often instead'], rows


def text_table(headers, rows):
    """A table for a terminal: the first column to the left, the others to the right."""
    lines = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ''
    for line in lines:
        first, *others = [cell.rjust(width) for cell, width in zip(line, widths)]
        text += '  '.join([line[0].ljust(len(first)), *others]) + '\n'
    return text


def examples_of(rows, count):
    """[(heading, rows)]: the best responses, the worst, and the first of each kind of error, at most `count`
    each; each row once, equal questions once."""
    unique, taken, examples = {}, set(), []
    for row in rows:
        unique.setdefault(row['question'], row)

    def add(heading, candidates):
        chosen = [row for row in candidates if row['question'] not in taken][:count]
        taken.update(row['question'] for row in chosen)
        if chosen:
            examples.append((heading, chosen))

    ranked = sorted(unique.values(), key=lambda row: (-row['correct'], -row['f1'], row['loss'] or 0.0))
    add('best responses', [row for row in ranked if row['correct'] or row['f1'] > 0])
    add('worst responses', [row for row in reversed(ranked) if not row['correct']])
    for kind in ERRORS:
        add(kind, [row for row in unique.values() if row['error'] == kind])
    return examples


def facts_about(row):
    """One line about an example."""
    facts = ['correct' if row['correct'] else row['error'], f'F1 {row["f1"]:.2f}']
    if row['loss'] is not None:
        facts.append(f'loss {row["loss"]:.3f}')
    return ', '.join(filter(None, [*facts, row['where']]))


def markdown_table(headers, rows):
    lines = [headers, ['---'] + ['---:'] * (len(headers) - 1), *rows]
    cells = [[' '.join(cell.split()).replace('|', '\\|') for cell in line] for line in lines]
    return '\n'.join(f'| {" | ".join(line)} |' for line in cells)


def markdown_example(row):
    text = '\n'.join(f'{name}: {row[name]}' for name in EXAMPLE)
    longest = max(map(len, re.findall('`+', text)), default=0)
    fence = '`' * max(3, longest + 1)           # longer than any in the text
    return f'{facts_about(row)}\n\n{fence}\n{text}\n{fence}'


def html_example(row):
    texts = ''.join(f'<div><b>{name}</b> {escape(row[name])}</div>' for name in EXAMPLE)
    kind = 'example correct' if row['correct'] else 'example'
    return f'<div class="{kind}">{texts}<div class=facts>{escape(facts_about(row))}</div></div>'


def html_picture(heading, figure):
    data = base64.b64encode(png_bytes(figure)).decode()
    return f'{element("h2", heading)}<img alt="{escape(heading)}" src="data:image/png;base64,{data}">'


# kind of a block: what writes it
MARKDOWN = {'text': str, 'heading': '## {}'.format, 'table': markdown_table, 'example': markdown_example}
HTML = {'text': partial(element, 'p'), 'heading': partial(element, 'h2'), 'table': html_table,
        'example': html_example, 'picture': html_picture}


# ---- figures -----------------------------------------------------------------------------------------------

def evaluation_figures(results):
    """[(title, Figure)] of the results of evaluate.py (metrics.result_of); none without matplotlib."""
    if not has_matplotlib():
        return []
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
