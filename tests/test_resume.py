"""What every training script's --resume has in common."""
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanoforge.checkpoint import read_manifest, resume_config, write_json, write_manifest
from configurator import UserError, from_dict, parse
from data.fingerprint import fingerprint
from data.prepare import prepare_files

RUNS = {'train_gpt': ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--max_iters=1', '--eval_iters=1',
                      '--sample_tokens=0', '--dataset=letters', '--tensorboard=false'],
        'train_sft': ['--max_steps=1', '--batch-size=1', '--grad-accum=1', '--sample_rows=0', '--eval_strategy=no', '--dataset_path=rows.jsonl', '--report_to=none'],
        'train_dpo': ['--max_steps=1', '--per_device_train_batch_size=1', '--eval_fraction=0', '--eval_samples=0', '--tensorboard=false',
                      '--dataset_path=pairs.jsonl'],
        'train_rl': ['--max_steps=1', '--per_device_train_batch_size=2', '--num_generations=2', '--eval_steps=0', '--eval_problems=1',
                     '--num_problems=8', '--max_completion_length=4', '--tensorboard=false']}


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    os.symlink(small, 'model')
    write_data('abcd\n', 'is')


def write_data(text, verb):
    Path('letters.txt').write_text(text * 200)
    prepare_files('letters', ['letters.txt'], 'char', 'written by the test')
    questions = [f'Who {verb} {i}?' for i in range(40)]
    for name, rows in (('rows', [{'question': asked, 'answer': 'Tom.'} for asked in questions]),
                       ('pairs', [{'prompt': asked, 'chosen': 'Tom.', 'rejected': 'No.'} for asked in questions])):
        Path(f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def words(script):
    return RUNS[script] + ([] if script == 'train_gpt' else ['--base_model_name=model'])


@pytest.mark.parametrize('script', RUNS)
def test_a_run_goes_on_with_the_device_and_precision_that_it_had(script, tmp_path, monkeypatch):
    """Both must be known before setup(): what the command line says, else what the run had,
    not what is the default."""
    module = importlib.import_module(script)
    resume, out = ('--init_from=resume', '--out_dir=o') if script == 'train_gpt' else ('--resume', '--output_dir=o')
    module.main(parse(module.Config, [*words(script), out, '--device=cpu', '--matmul=float32']))
    asked = []

    def setup(device, dtype, matmul):
        asked.append((device, matmul))
        raise InterruptedError
    monkeypatch.setattr('nanoforge.run.setup', setup)
    for typed in ([], ['--matmul=bf16']):
        with pytest.raises(InterruptedError):
            module.main(parse(module.Config, [resume, out, *typed]))
    assert asked == [('cpu', 'float32'), ('cpu', 'bf16')]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    longer = 'max_iters' if script == 'train_gpt' else 'max_steps'
    assert module.main(parse(module.Config, [resume, out, f'--{longer}=2']))['step'] == 2
    with open('o/run_config.json') as file:             # what was typed is what the next resume goes on with
        saved = from_dict(module.Config, json.load(file)['config'])
    assert (getattr(saved, longer), saved.matmul, saved.device) == (2, 'float32', 'cpu')


@pytest.mark.parametrize('script', ['train_sft', 'train_dpo', 'train_rl'])
def test_another_number_of_processes_is_said(script, tmp_path, capsys):
    module = importlib.import_module(script)
    module.main(parse(module.Config, [*words(script), '--output_dir=o']))
    for processes in (1, 4):
        folder = tmp_path / 'o' / 'last'
        write_manifest(folder, {**read_manifest(folder / 'manifest.json'), 'processes': processes})
        module.main(parse(module.Config, ['--resume', '--output_dir=o', f'--max_steps={processes + 1}']))
        assert ('of 4 processes, this is 1: from here on an optimizer step has 0.25 times' in capsys.readouterr().out) == (processes == 4)


@dataclass
class Small:
    rate: float = 1.0
    resume: bool | str = False

    def check(self):
        pass


def test_only_a_run_with_a_checkpoint_is_gone_on_with(tmp_path):
    auto = Small(resume='auto')

    def found(cfg, script='train.py'):
        return resume_config(cfg, tmp_path, script)
    assert found(auto) == (auto, None)
    write_json(tmp_path / 'run_config.json', {'written_by': 'nanoforge', 'run': 'a', 'script': 'train.py', 'config': {'rate': 2.0}})
    for run in (None, 'b'):                             # no checkpoint, then one of another run
        if run:
            os.mkdir(tmp_path / 'checkpoint-1')
            write_json(tmp_path / 'checkpoint-1' / 'manifest.json', {'written_by': 'nanoforge', 'run': run, 'step': 1})
        assert found(auto) == (auto, None)
        with pytest.raises(UserError, match='no run of train.py with a checkpoint'):
            found(Small(resume=True))
    write_json(tmp_path / 'checkpoint-1' / 'manifest.json', {'written_by': 'nanoforge', 'run': 'a', 'step': 1})
    cfg, saved = found(auto)
    assert cfg.rate == 2.0 and saved['run'] == 'a'
    assert found(auto, 'other.py') == (auto, None)
    auto.typed = frozenset({'rate'})
    assert found(auto)[0].rate == 1.0


@pytest.mark.parametrize('harm', ['cut', 'empty'])
def test_settings_that_are_damaged_come_from_the_newest_checkpoint(harm, tmp_path, capsys):
    from train_gpt import Config, main
    main(parse(Config, [*RUNS['train_gpt'], '--out_dir=o', '--learning_rate=0.003']))
    path = tmp_path / 'o' / 'run_config.json'
    before = path.read_bytes()
    path.write_bytes(before[:len(before) // 2] if harm == 'cut' else b'')
    capsys.readouterr()
    assert main(parse(Config, ['--resume=auto', '--out_dir=o', '--max_iters=2']))['step'] == 2
    said = capsys.readouterr().out
    assert said.startswith('o/run_config.json is damaged: as checkpoint-1 has it\nresume    o/checkpoint-1')
    assert json.loads(path.read_text())['config']['learning_rate'] == 0.003


@pytest.mark.parametrize('script', RUNS)
def test_a_run_that_has_ended_says_how_it_goes_on(script, capsys):
    """Resumed once more, as by a scheduler that does not know: one line, and nothing is written;
    with what the line says it goes on, and data that changed meanwhile are named."""
    module = importlib.import_module(script)
    evaluated = {'train_sft': '--eval_strategy=steps', 'train_dpo': '--eval_fraction=0.1', 'train_rl': '--eval_steps=1'}
    resume, out = ('--init_from=resume', '--out_dir=o') if script == 'train_gpt' else ('--resume', '--output_dir=o')
    module.main(parse(module.Config, [*words(script), out, *([evaluated[script]] if script in evaluated else [])]))

    def left():
        with open('o/log.jsonl') as file, open('o/last/trainer_state.json') as state:
            return [line for line in file if 'step' in json.loads(line)], json.load(state)
    before = left()
    assert any('eval' in line for line in before[0])
    capsys.readouterr()
    assert module.main(parse(module.Config, [resume, out]))['step'] == 1
    longer, said = 'max_iters' if script == 'train_gpt' else 'max_steps', capsys.readouterr().out
    assert said.endswith(f'o: the run has ended at step 1; {resume} --{longer}=N goes on, with N above 1\n')
    assert 'the model is in' not in said and left() == before
    if script in ('train_gpt', 'train_dpo'):                        # a length that is behind the run
        assert module.main(parse(module.Config, [resume, out, f'--{longer}=2']))['step'] == 2
        assert module.main(parse(module.Config, [resume, out, f'--{longer}=1']))['step'] == 2
        assert capsys.readouterr().out.endswith(f'step 2; {resume} --{longer}=N goes on, with N above 2\n')
    for steps, changes in ((2, False), (3, True), (4, False)):      # said once
        if changes:
            write_data('abdc\n', 'was')
        assert module.main(parse(module.Config, [resume, out, f'--{longer}={steps}']))['step'] == steps
        said = capsys.readouterr().out
        has_files = script != 'train_rl'                            # which has embedded data here
        assert ('has changed since this run was saved' in said) == (changes and has_files)


@pytest.mark.parametrize('script, flags', [
    ('train_dpo', ['--dataset_path=pairs.jsonl']),
    ('train_rl', ['data.datasets[0].name=sums', '--reward=exact', '--steps_per_generation=1'])])
def test_preferences_and_problems_that_changed_are_named(script, flags, capsys):
    module = importlib.import_module(script)
    os.mkdir('sums')
    for answer in ('1', '2'):
        pairs = [{'prompt': f'Who is {i}?', 'chosen': f'Tom {answer}.', 'rejected': 'No.'} for i in range(40)]
        sums = [{'question': f'What is {i} less {i}?', 'answer': answer} for i in range(40)]
        for path, rows in (('pairs.jsonl', pairs), ('sums/train.jsonl', sums)):
            Path(path).write_text(''.join(json.dumps(row) + '\n' for row in rows))
        resumed = answer == '2'
        argv = ['--resume', '--max_steps=2'] if resumed else [*words(script), *flags]
        module.main(parse(module.Config, [*argv, '--output_dir=o']))
        assert ('has changed since this run was saved' in capsys.readouterr().out) == resumed


def test_pretraining_goes_on_with_the_tokenizer_that_it_had(capsys):
    from train_gpt import Config, main
    main(parse(Config, [*RUNS['train_gpt'], '--out_dir=o']))
    before = Path('o/tokenizer.json').read_bytes()
    Path('letters.txt').write_text('wxyz\n' * 200)                  # as many ids, of other letters
    prepare_files('letters', ['letters.txt'], 'char', 'written by the test')
    resume = ['--init_from=resume', '--out_dir=o', '--max_iters=2']
    with pytest.raises(UserError, match="'letters' .* another tokenizer.*--tokenizer=o/checkpoint-1,"):
        main(parse(Config, resume))
    assert Path('o/tokenizer.json').read_bytes() == before
    Path('letters.txt').write_text('dcba\n' * 200)
    prepare_files('letters', ['letters.txt'], 'o/checkpoint-1', 'written by the test')
    assert main(parse(Config, resume))['step'] == 2                 # as the message says
    assert 'letters has changed since this run was saved' in capsys.readouterr().out


def test_a_fingerprint_sees_both_ends_and_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr('data.fingerprint.BLOCK', 16)
    monkeypatch.setattr('data.fingerprint.BLOCKS', 8)
    path, text = tmp_path / 'rows.jsonl', bytes(range(250)) * 4
    marks = set()
    for place in (None, 0, 500, 999):           # 1000 bytes: blocks of 16 begin 125 apart, and 16 from the end
        changed = bytearray(text)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        marks.add(fingerprint([path]))
    path.write_bytes(text + b'.')
    marks.add(fingerprint([path]))
    path.write_bytes(text)
    assert len(marks) == 5 and fingerprint([path]) in marks
    assert fingerprint([path, path]) not in marks
