"""The overnight scripts of the guide, run with tiny settings; and evaluate.py on what they leave."""
import glob
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import evaluate
import train_sft
from conftest import ROOT
from configurator import UserError, as_dict, from_dict, parse
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


def test_the_guides_commands_go_on_with_the_run_that_they_name(tmp_path, monkeypatch, capsys):
    """--load-checkpoint and evaluate.py take data, columns, rate and names from the run that wrote the
    checkpoint, whatever run is in the folder by then; what is typed beats them."""
    monkeypatch.chdir(tmp_path)
    rows = [{'asked': row['question'], 'said': row['answer']} for row in questions.rows('train', 40, 5)]
    for name in ('mine.json', 'yours.json'):
        Path(name).write_text(json.dumps([{**row, 'asked': f'{name}: {row["asked"]}'} for row in rows]))
    theta = os.path.join(ROOT, 'recipes', 'training', 'sft', 'theta.yaml')
    short = ['--device=cpu', '--matmul=float32', '--report_to=none', '--sample_rows=0']
    columns = ['--prompt_column=asked', '--answer_column=said']

    def train(*argv):
        train_sft.main(parse(Training, [*argv, *short]))
        with open('models/run_config.json') as file:
            return from_dict(Training, json.load(file)['config'])

    def evaluated_on(path):
        evaluation = parse(evaluate.Config, ['--model-path', path])
        return evaluate.read_data(evaluation, path).name

    train('--recipe', theta, '--dataset_path=mine.json', *columns, '--epochs=2', '--max_grad_norm=0.5')
    capsys.readouterr()
    cfg = train('--epochs', '1', '--batch-size', '4', '--load-checkpoint', 'models/theta_checkpoint_epoch_2')
    said = capsys.readouterr().out
    assert 'models/theta_checkpoint_epoch_2, with what was set in its run: ' in said
    assert 'learning_rate=5e-05' in said and 'dataset_path=mine.json' in said and 'chosen' not in said
    assert (cfg.prompt_column, cfg.learning_rate, cfg.num_train_epochs, cfg.max_grad_norm) == ('asked', 5e-5, 1, 0.5)
    assert {'theta_checkpoint_epoch_2', 'theta_checkpoint_epoch_3'} <= set(os.listdir('models'))
    cfg = train('--max_steps=1', '--load-checkpoint=models/theta_checkpoint_epoch_3', '--learning-rate=1e-4',
                '--dataset_path=yours.json', *columns, '--weight-decay=0')
    assert (cfg.learning_rate, cfg.weight_decay, cfg.max_grad_norm) == (1e-4, 0.0, 0.5)
    assert evaluated_on('models') == 'yours.json'
    for path in ('models/theta_checkpoint_epoch_3', 'models/earlier-1/theta_checkpoint_epoch_1', 'models/earlier-2'):
        assert evaluated_on(path) == 'mine.json'
    assert evaluate.read_data(parse(evaluate.Config, []), 'models/earlier-2').records[0].prompt[0]['content'].startswith('mine')
    # the tiny model's own directory was written by no run: everything is a default
    cfg = train('--max_steps=1', '--load-checkpoint', os.path.join(ROOT, 'data', 'tiny'), '--dataset_path=yours.json', *columns)
    assert (cfg.learning_rate, cfg.checkpoint_name, cfg.max_grad_norm) == (train_sft.SMALL_MODEL_RATE, 'checkpoint-{step}', 1.0)


def test_the_manual_command_leaves_a_checkpoint_after_each_epoch_and_the_best_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, _ = question_file(tmp_path, 40)
    manual = ['--epochs', '4', '--batch-size', '4', '--grad-accum', '4', '--learning-rate', '5e-5',
              '--checkpoint-dir', 'models/theta_custom']
    train_sft.main(parse(Training, [*manual, '--dataset_path', data, '--device=cpu', '--report_to=none', '--sample_rows=0']))
    steps = sorted(int(name[11:]) for name in os.listdir('models/theta_custom') if name.startswith('checkpoint-'))
    assert [step // 3 for step in steps if step % 3 == 0] == [1, 2, 3, 4] and steps[-1] == 12
    for name in ('best/model.safetensors', 'model.safetensors', 'last/optimizer.safetensors'):
        assert os.path.exists(os.path.join('models/theta_custom', name))
    assert set(os.listdir('models')) == {'theta_custom'}
    for argv, strategy in ((['--max_steps=4'], 'steps'), (['--save_steps=2', '--epochs=1'], 'steps'), ([], 'epoch')):
        assert parse(Training, argv).save_strategy == strategy
    saved = as_dict(parse(Training, []))                # a run by epochs, resumed by steps
    cfg = from_dict(Training, saved, parse(Training, ['--save_steps=2']))
    cfg.check()
    assert cfg.save_strategy == 'steps'


def test_an_evaluation_whose_results_cannot_be_written_stops_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'evaluation').write_text('a file')
    with pytest.raises(UserError, match='cannot write evaluation/tiny: .*--output-dir names another folder'):
        evaluate.main(parse(evaluate.Config, ['tiny', '--device=cpu', '--num_samples=1']))
