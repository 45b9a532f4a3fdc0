"""The overnight scripts of the guide, run with tiny settings; and evaluate.py on what they leave."""
import glob
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from conftest import ROOT
from configurator import parse
from data.tasks import questions
from train_sft import Config as Training

SCRIPTS = ['train_overnight', 'train_overnight_enhanced']
ENV = {**os.environ, 'PYTHON': sys.executable}
SHORT = ['--batch-size', '2', '--grad-accum', '1', '--device=cpu', '--report_to=none', '--sample_rows=0']


def script(name):
    return ['bash', os.path.join(ROOT, 'scripts', name + '.sh')]


def question_file(folder, count):
    rows = [{key: row[key] for key in ('question', 'answer')} for row in questions.rows('train', count, 5)]
    (folder / 'my questions.json').write_text(json.dumps({'qa_pairs': rows}))
    return str(folder / 'my questions.json'), rows


@pytest.mark.parametrize('name', SCRIPTS)
def test_both_shells_say_the_same(name):
    subprocess.run(['bash', '-n', script(name)[1]], check=True)
    with open(os.path.join(ROOT, 'scripts', name + '.bat'), 'rb') as file:
        batch = file.read()
    assert batch.count(b'\r\n') == batch.count(b'\n')
    with open(script(name)[1]) as file:
        shell = file.read()
    recipe = 'theta_enhanced.yaml' if 'enhanced' in name else 'theta.yaml'
    assert f'/sft/{recipe}' in shell and '"$@"' in shell
    for words in (f'\\sft\\{recipe}', '%*', 'exit /b %status%'):
        assert words in batch.decode()


def test_the_enhanced_recipe_explains_each_parameter_and_is_enhanced():
    path = os.path.join(ROOT, 'recipes', 'training', 'sft', 'theta_enhanced.yaml')
    with open(path) as file:
        lines = file.read().splitlines()
    settings = [line for line in lines if line.strip() and line[0] != '#' and line[-1] != ':']
    assert all('  # ' in line for line in settings)
    cfg, plain = parse(Training, [path]), parse(Training, [path.replace('theta_enhanced', 'theta')])
    assert cfg.bf16 and cfg.augment and cfg.lr_scheduler_type == 'plateau' and cfg.patience
    assert not plain.augment and not plain.patience
    with open(path) as file:
        assert yaml.safe_load(file)['training']['learning_rate'] == plain.learning_rate == 5e-5


def test_enhanced_run_and_its_evaluation(tmp_path):
    """Arguments with spaces pass on, the log holds what was said, rows held out of training are evaluated."""
    data, rows = question_file(tmp_path, 30)
    words = ['--dataset_path', data, '--epochs', '1', '--output_dir', 'my models', *SHORT]
    command = [*script('train_overnight_enhanced'), *words]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (log,) = glob.glob(str(tmp_path / 'logs' / 'train_overnight_enhanced_*.log'))
    with open(log) as file:
        said = file.read()
    assert 'augmentation: ' in said and 'eval_loss' in said and said in done.stdout
    checkpoint = os.path.join('my models', 'theta_checkpoint_epoch_1')
    words = ['--model-path', checkpoint, '--device=cpu', '--max_new_tokens=8']
    command = [sys.executable, os.path.join(ROOT, 'evaluate.py'), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'rouge' in done.stdout.lower(), done.stderr
    with open(tmp_path / 'evaluation' / 'theta_checkpoint_epoch_1' / 'evaluation.json') as file:
        asked = {row['question'] for row in json.load(file)['results'][0]['rows']}
    held_out = int(said.partition(' rows without "metadata" are held out')[0].split()[-1])
    assert len(asked) == held_out < 10 and asked <= {row['question'] for row in rows}


def test_exit_status_of_a_mistake(tmp_path):
    command = [*script('train_overnight'), '--dataset_path', 'no such.json']
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and 'no such.json: no such file' in done.stdout + done.stderr


def test_a_signal_reaches_the_training(tmp_path):
    data, _ = question_file(tmp_path, 30)
    command = [*script('train_overnight'), '--dataset_path', data, *SHORT]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not glob.glob(str(tmp_path / 'models' / '*' / 'manifest.json')) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and '--resume' in said
