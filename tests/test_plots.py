"""plots.py: pictures from a log."""
import json
import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from nanoforge import svg
from nanoforge.plots import curves, loss_picture, margins, read_log, reward_picture, smooth, sparkline

pytestmark = pytest.mark.pictures


def write_log(path, lines):
    path.write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def test_read_log(tmp_path):
    write_log(tmp_path / 'log.jsonl', [
        {'run': {'stand_in': True}}, {'step': 1, 'loss': 3.0, 'grad_norm': None},
        {'step': 2, 'loss': 2, 'sample': 'To be'}, {'run': {}, 'resumed_at': 2},
        {'step': 3, 'eval_loss': 2.5}, '{"step": 4, "loss": 1.'])
    series, header = read_log(tmp_path / 'log.jsonl')
    assert series == {'loss': ([1, 2], [3.0, 2]), 'eval_loss': ([3], [2.5])} and header == {'stand_in': True}


def test_sparkline():
    assert sparkline(range(8)) == '▁▂▃▄▅▆▇█'
    assert sparkline([2.0, 2.0]) == '▄▄' and sparkline([5]) == '▄'
    curve = sparkline([math.cos(math.pi * i / 999) for i in range(1000)], width=40)
    assert len(curve) == 40 and curve[0] == '█' and curve[-1] == '▁'
    assert list(curve) == sorted(curve, reverse=True)


def test_smooth_does_not_lag():
    ramp = [3.0 * i for i in range(100)]
    assert np.allclose(smooth(ramp, 11)[:95], ramp[:95], atol=1e-12)
    values = list(np.random.default_rng(0).normal(size=50))
    assert np.allclose(smooth(values, 1), values)
    assert np.isclose(smooth(values, 7)[20], np.mean(values[17:24]))
    assert np.isclose(smooth(values, 7)[-1], np.mean(values[-4:]))


def has_colour(picture, colour):
    return (np.abs(picture[..., :3] * 255 - colour).max(-1) < 3).sum()


def test_loss_picture(tmp_path):
    log, png = tmp_path / 'log.jsonl', tmp_path / 'loss.png'
    steps = [{'step': s, 'loss': 4 * math.exp(-s / 50) + 1, 'learning_rate': 1e-3} for s in range(1, 301)]
    write_log(log, [{'run': {}}, *steps])
    loss_picture(log, png, 'title')
    plain = imread(png)
    assert plain.shape[:2] == (672, 1080) and has_colour(plain, (0x3b, 0x6f, 0xb6)) > 500
    assert not has_colour(plain, (0xd9, 0x62, 0x2b))
    write_log(log, [{'run': {'stand_in': True}}, *steps, {'step': 300, 'eval_loss': 1.2}])
    loss_picture(log, png, 'title')
    assert has_colour(imread(png), (0xd9, 0x62, 0x2b)) > 100
    assert [path.name for path in sorted(tmp_path.iterdir())] == ['log.jsonl', 'loss.png']


def test_no_picture_without_a_loss(tmp_path):
    write_log(tmp_path / 'log.jsonl', [{'run': {}}])
    loss_picture(tmp_path / 'log.jsonl', tmp_path / 'loss.png', 'title')
    assert not (tmp_path / 'loss.png').exists()


def test_reward_picture(tmp_path):
    """One line where success is the reward; nothing without a reward."""
    log, png = tmp_path / 'log.jsonl', tmp_path / 'reward.png'
    write_log(log, [{'step': 1, 'loss': 1.0}])
    reward_picture(log, png, 'run')
    assert not png.exists()
    green, steps = (0x7f, 0xb0, 0x69), range(1, 9)
    for slope, has_line in ((0.25, False), (0.5, True)):
        write_log(log, [{'step': n, 'reward': 0.25 * n, 'success_rate': slope * n} for n in steps])
        reward_picture(log, png, 'run')
        assert imread(png).shape[:2] == (792, 1100)
        assert (has_colour(imread(png), green) > 100) == has_line


def test_curves_and_margins(tmp_path):
    """Panels for what the log has; a histogram with an edge at 0, so that no bar mixes both signs."""
    log, png = tmp_path / 'log.jsonl', tmp_path / 'a.png'
    write_log(log, [{'step': n, 'loss': 1 / (n + 1), 'reward': n} for n in range(5)])
    curves(log, png, 'run', [('loss', {'loss': 'training', 'eval_loss': 'held out'}),
                             ('accuracy', {'accuracy': 'none'}),
                             ('reward', {'reward': 'mean'})])
    assert imread(png).shape[:2] == (648, 1080)     # two panels of three
    bars, hist = [], Axes.hist

    def listen(self, part, edges, **style):
        bars.append((part, edges))
        return hist(self, part, edges, **style)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, 'hist', listen)
        for values in ([-1.5, 0.0, 0.25, 2.0], [0.0], [3.0, 4.0], [-2.0]):
            margins(values, tmp_path / 'b.png', 'run')
            edges = bars[-1][1]
            assert any(abs(edge) < 1e-12 for edge in edges)
            assert edges[0] <= min(values) and edges[-1] >= max(values)
    assert [part for part, _ in bars[:3]] == [[-1.5], [0.0], [0.25, 2.0]]


def test_axes_and_boards_of_pages():
    assert svg.axis_of([0.16, 0.2, 0.22]) == (0.16, 0.22, [0.16, 0.18, 0.2, 0.22])
    assert svg.axis_of([0.0, 1.0]) == (0, 1, [0, 0.5, 1]) and svg.axis_of([3.52, 7.1])[:2] == (3, 8)
    for values in ([0.0, 0.0], [5.0, 5.0], [-3e4, 2e6], [-2.0, -1.0]):
        low, high, ticks = svg.axis_of(values)
        assert low <= min(values) and high >= max(values) and low < high and 2 <= len(ticks) <= 6
    points = svg.curves({'a<b': ([0, 10], [1.0, 3.0])}, {'a<b': 'red'}, width=152, height=130)
    assert 'points="44.0,108.0 144.0,8.0"' in points and 'a&lt;b 1.000 &rarr; 3.000' in points     # both corners
    assert svg.curves({'a': ([1], [1.0])}, {'a': 'red'}) == ''
    assert svg.is_board('.@\n#G') and not svg.is_board('.@\n#') and not svg.is_board('1 .\n. 2') and not svg.is_board('.@')
    drawn = svg.board('.@\n#+')
    assert [drawn.count(f'class={name}') for name in ('wall', 'floor', 'player', 'goal')] == [1, 3, 2, 1]
