"""scripts/tour.sh with tiny sizes, from nothing to its page; interrupted once, and gone on with."""
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest

from configurator import parse
from conftest import ROOT

ENV = {**os.environ, 'PYTHON': sys.executable}
STAGES = ['data', '1-pretrain', '2-sft', '3-dpo', '4-grpo', '5-team']


def test_the_commands_of_all_stages_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location('tour', os.path.join(ROOT, 'scripts', 'tour.py'))
    module = importlib.util.module_from_spec(spec)
    sys.modules['tour'] = module                # where dataclasses look
    spec.loader.exec_module(module)
    for quick in (False, True):
        for stage in module.stages(module.Config(out_dir='a tour/of mine', seed=3, quick=quick))[1:]:
            script, *flags = stage.command
            cfg = parse(importlib.import_module(script.removesuffix('.py')).Config, flags)
            assert cfg.seed == 3 and cfg.resume == 'auto'
            assert any('a tour/of mine/' in str(value) for value in vars(cfg).values())


def tour(folder, *flags):
    return ['bash', os.path.join(ROOT, 'scripts', 'tour.sh'), f'--out_dir={folder}', *flags]


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
    """(folder of a tour, what its two starts printed): the first was stopped while it fine-tuned."""
    folder = tmp_path_factory.mktemp('a tour') / 'out'
    process = subprocess.Popen(tour(folder, '--quick'), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if 'fine-tuning, step' in line:
            process.send_signal(signal.SIGINT)
            break
    printed += process.stdout.readlines()
    assert process.wait() == 130, ''.join(printed)
    again = subprocess.run(tour(folder, '--quick'), env=ENV, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    return folder, ''.join(printed), again.stdout


def test_an_interrupted_tour_goes_on_where_it_was(ended):
    folder, first, second = ended
    assert 'go on with: bash scripts/tour.sh' in first and 'a team' not in first
    assert 'pretraining' not in second                              # had ended
    printed = (folder / '2-sft.txt').read_text()
    assert 'stopped at step' in printed and 'resume ' in printed
    assert 'ETA' in second and '100%' not in first
    assert '\r' not in first + second                               # no bar where it is no terminal
    notes = json.loads((folder / 'tour.json').read_text())['stages']
    assert list(notes) == STAGES and all(notes[name]['ended'] for name in STAGES)


def test_every_stage_begins_with_the_one_before(ended):
    folder, _, _ = ended
    began = {'2-sft': '1-pretrain', '3-dpo': '2-sft', '4-grpo': '3-dpo', '5-team/latest/checkpoints': '4-grpo'}
    for name, before in began.items():
        config = json.dumps(json.loads((folder / name / 'run_config.json').read_text())['config'])
        assert json.dumps(str(folder / before)) in config


def test_the_page_needs_no_other_file_and_has_what_changed(ended):
    folder, _, _ = ended
    page = (folder / 'report.html').read_text()
    for part in ('<img', 'http', '<link', 'src='):
        assert part not in page
    assert '--quick: a few steps of each stage, which teach nothing' in page
    notes = json.loads((folder / 'tour.json').read_text())['stages']
    for name in STAGES[1:]:
        assert notes[name]['command'].replace("'", '&#x27;') in page
        assert set(notes[name]['answers']) == set(notes['1-pretrain']['answers'])
        assert f'{notes[name]["scores"]["text"]:.2f}' in page
    assert page.count('<td>a team</td>') == 1 + len(notes['5-team']['answers'])
    assert page.count('<svg') > 5 and 'class=frame data-n=1 hidden' in page and 'class=board' in page
    assert 'width=device-width' in page and 'prefers-color-scheme:dark' in page


def test_a_tour_that_has_ended_repeats_nothing(ended):
    folder, _, _ = ended
    before = (folder / 'tour.json').read_bytes()
    again = subprocess.run(tour(folder, '--quick'), env=ENV, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.startswith('the tour has ended')
    assert (folder / 'tour.json').read_bytes() == before


@pytest.mark.parametrize('flags, wanted', [
    (['--quick', '--seed=2'], "'seed': 2"),
    (['--quik'], 'there is no flag --quik'),
])
def test_mistakes_are_one_line(ended, flags, wanted):
    folder, _, _ = ended
    result = subprocess.run(tour(folder, *flags), env=ENV, capture_output=True, text=True)
    assert result.returncode == 2 and wanted in result.stderr and result.stderr.count('\n') == 1


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    result = subprocess.run(tour(tmp_path, '--quick'), env=ENV, capture_output=True, text=True)
    assert result.returncode == 2 and 'something else than a tour' in result.stderr
    assert os.listdir(tmp_path) == ['mine.txt']
