"""Drawings inside a page, as SVG: curves with their axes, and boards of signs.

They take their colours from the page's stylesheet, so that they follow its light and dark.
"""
import math
from html import escape

LEFT, BOTTOM, TOP, RIGHT = 44, 22, 8, 8         # of a curve's drawing, around the plot
CELL = 22
# A board is lines of these signs, as Plan-Path and Sokoban write them: what stands in a cell
SIGNS = {'#': 'wall', '.': 'floor', '@': 'player', 'G': 'goal', '$': 'box', '*': 'box on the goal',
         '+': 'player on the goal'}


def curves(series, colours, width=460, height=170):
    """Curves of {name: ([steps], [values])} over steps, and each one's first and last value; '' where none
    has two points. colours: {name: colour}, of those to draw."""
    shown = {name: series[name] for name in colours if len(series.get(name, ([], []))[0]) > 1}
    if not shown:
        return ''
    last = max(steps[-1] for steps, _ in shown.values()) or 1
    low, high, ticks = axis_of([value for _, values in shown.values() for value in values])
    plot_width, plot_height = width - LEFT - RIGHT, height - TOP - BOTTOM

    def x(step):
        return LEFT + plot_width * step / last

    def y(value):
        return TOP + plot_height * (high - value) / (high - low)

    parts = [f'<line class=grid x1="{LEFT}" x2="{width - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
             f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
             for tick in ticks]
    for step, anchor in ((0, 'start'), (last, 'end')):
        label = f'{step:,}' if step else 'step 0'
        parts.append(f'<text x="{x(step):.1f}" y="{height - 6}" text-anchor="{anchor}">{label}</text>')
    captions = []
    for name, (steps, values) in shown.items():
        points = ' '.join(f'{x(step):.1f},{y(value):.1f}' for step, value in zip(steps, values))
        parts.append(f'<polyline fill="none" stroke-width="2" stroke="{colours[name]}" points="{points}"/>')
        captions.append(f'<span style="color:{colours[name]}">{escape(name)} {short(values[0])} &rarr; '
                        f'{short(values[-1])}</span>')
    return (f'<figure><svg viewBox="0 0 {width} {height}" width="{width}">{"".join(parts)}</svg>'
            f'<figcaption>{"<br>".join(captions)}</figcaption></figure>')


def axis_of(values):
    """(low, high, ticks) of an axis for values: round numbers around them, three to six ticks."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 3))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def short(value):
    return f'{value:.3f}' if abs(value) < 100 else f'{value:.0f}'


def is_board(text):
    """Whether a text is lines of equal length of a map's signs."""
    lines = text.split('\n')
    return len(lines) > 1 and len({*map(len, lines)}) == 1 and set(text) <= {*SIGNS, '\n'}


def board(text):
    """A map as a drawing; every cell says what stands in it."""
    lines = text.split('\n')
    cells = ''.join(cell(sign, column * CELL, row * CELL)
                    for row, line in enumerate(lines) for column, sign in enumerate(line))
    width, height = CELL * len(lines[0]), CELL * len(lines)
    return (f'<svg class=board viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-label="{escape(text)}">{cells}</svg>')


def cell(sign, x, y):
    middle = f'cx="{x + CELL / 2}" cy="{y + CELL / 2}"'
    ground = 'wall' if sign == '#' else 'floor'
    drawn = f'<rect class={ground} x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>'
    if sign in 'G*+':
        drawn += f'<circle class=goal {middle} r="{CELL * 0.36}"/>'
    if sign in '$*':
        drawn += f'<rect class=box x="{x + 4}" y="{y + 4}" width="{CELL - 8}" height="{CELL - 8}" rx="2"/>'
    if sign in '@+':
        drawn += f'<circle class=player {middle} r="{CELL * 0.27}"/>'
    return f'<g><title>{SIGNS[sign]}</title>{drawn}</g>'
