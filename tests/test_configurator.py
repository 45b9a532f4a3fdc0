"""The grammar of flags, files and overrides, on configurations like those of the documented commands."""
import dataclasses
import importlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass, field
from typing import Optional

import pytest

import configurator
from conftest import ROOT
from configurator import (Accepted, UserError, accepted_key, as_dict, check_settings, closest, configclass, fill_in,
                          from_dict, parse, run_script, setting, spellings, without_effect)
from nanoforge import errors, launch
from nanoforge.launch import launched
from nanoforge.synonyms import SYNONYMS

sys.path.insert(0, os.path.join(ROOT, 'scripts'))
from document_recipes import MARK, RECIPES, config_of, documented


@dataclass
class Gpt:
    """Like pretraining's: flat."""
    # Data
    dataset: str = 'shakespeare_char'  # a folder of data/
    dataset_list: list[str] = setting([])  # data sets to draw from
    dataset_sampling_probs: list[float] = setting([])  # their probabilities
    # Optimizer
    optimizer: str = setting('adamw', choices=('adamw', 'sgd'))  # 100% by hand
    batch_size: int = 64  # sequences
    # in a multi-line comment the first line
    # and the second
    learning_rate: float = 1e-3
    decay_lr: bool = False
    gradient_accumulation_steps: int = 1
    compile: Optional[bool] = None
    wandb_run_name: str = 'run'
    resume: bool | str = setting(False, choices=('auto',))
    lr_scheduler: str = 'none'
    patience: Optional[int] = None

    def check(self):
        if self.dataset_sampling_probs and len(self.dataset_sampling_probs) != len(self.dataset_list):
            raise UserError('dataset_sampling_probs: one for each of dataset_list')


@dataclass
class Dataset:
    name: str = ''  # hub name or path
    prompt_column: str = 'prompt'
    weight: float = 1.0


@dataclass
class Policy:
    path: Optional[str] = None  # model name or directory


@dataclass
class Window:
    size: int = 0


@dataclass
class Sft:
    """Like fine-tuning's: every setting has a documented path."""
    algorithm: str = setting('sft', path='training.algorithm', choices=('sft',))
    base_model_name: str = setting('tiny', path='model.base_model_name')
    use_lora: bool = setting(False, path='model.use_lora')
    lora_target_modules: list[str] | None = setting(None, path='model.lora_target_modules')
    learning_rate: Optional[float] = setting(None, path='training.learning_rate')
    num_train_epochs: float = setting(3.0, path='training.num_train_epochs', also=('epochs',))
    batch_size: int = setting(1, path='training.per_device_train_batch_size', also=('batch-size',))
    eval_strategy: str = setting('steps', path='training.eval_strategy', choices=('no', 'steps', 'epoch'))
    output_dir: str = setting('models', path='training.output_dir', also=('checkpoint_dir',))
    max_length: int = setting(512, path='data.max_length', also=('max_seq_length',))
    datasets: list[Dataset] = setting([Dataset('tiny')], path='data.datasets')
    base_models: dict[str, Policy] = field(default_factory=dict)
    window: Window = field(default_factory=Window)
    wandb: bool = setting(False, path='wandb.enabled')
    wandb_project: str = setting('', path='wandb.project')
    gpu_num: int = setting(1, path='GPU_num')
    num_gpus: int = 1
    distributed: bool = False


RECIPE = """
model:
  base_model_name: meta-llama/Llama-3.2-3B-Instruct
  use_lora: true
  lora_target_modules: [q_proj, v_proj]
data:
  max_length: 2_048
  datasets:
    - name: first   # a comment
    - {name: second, weight: 2}
training:
  algorithm: sft
  learning_rate: 3e-4   # YAML 1.1 calls this a string
  eval_strategy: no     # and this false
wandb:
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text(RECIPE)
    return str(path)


def mistake(capsys, cls, *argv):
    """The one line that a mistake prints."""
    with pytest.raises(SystemExit) as stop:
        parse(cls, list(argv))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == '' and err.count('\n') == 1 and err.endswith('\n')
    return err


@pytest.mark.parametrize('words, expected', [
    ('--batch_size=32 --learning-rate 3e-4', dict(batch_size=32, learning_rate=3e-4)),
    ('--gradient-accumulation_steps 1e2', dict(gradient_accumulation_steps=100)),
    ('--learning_rate -1e-5 --dataset -', dict(learning_rate=-1e-5, dataset='-')),
    ('--dataset_list a b --dataset_sampling_probs 0.5 0.5',
     dict(dataset_list=['a', 'b'], dataset_sampling_probs=[0.5, 0.5])),
    ('--dataset_list=a,b', dict(dataset_list=['a', 'b'])),
    ('dataset_list=[a,b] --decay_lr', dict(dataset_list=['a', 'b'], decay_lr=True)),
    ('--dataset_list a b batch_size=2', dict(dataset_list=['a', 'b'], batch_size=2)),
    ('--decay_lr --no-decay_lr', dict(decay_lr=False)),
    ('--decay_lr=True', dict(decay_lr=True)),
    ('--decay-lr true batch_size=3', dict(decay_lr=True, batch_size=3)),
    ('--decay_lr false', dict(decay_lr=False)),
    ('--no_compile', dict(compile=False)),
    ('--compile --compile=null', dict(compile=None)),
    ('--resume', dict(resume=True)),
    ('--resume auto --batch_size=2', dict(resume='auto', batch_size=2)),
    ('--resume=auto', dict(resume='auto')),
    ('--lr_scheduler none --patience none', dict(lr_scheduler='none', patience=None)),
    ('--dataset a.py', dict(dataset='a.py')),
    ('--dataset x=y', dict(dataset='x=y')),
    ('batch_size=1 --batch_size=2 batch_size=3', dict(batch_size=3)),
])
def test_flags(words, expected):
    cfg = parse(Gpt, words.split())
    assert {name: getattr(cfg, name) for name in expected} == expected
    assert all(type(getattr(cfg, name)) is type(value) for name, value in expected.items())
    assert cfg.typed == set(expected)
    assert {name for name, value in vars(Gpt()).items() if getattr(cfg, name) != value} <= set(expected)


def test_a_list_in_one_word_and_defaults_are_copies():
    assert parse(Gpt, ['--dataset_list', 'a b']).dataset_list == ['a', 'b']
    assert parse(Gpt, ['''--dataset_list="a b", 'c, d' e''']).dataset_list == ['a b', 'c, d', 'e']
    parse(Sft, ['data.datasets.name=changed'])
    assert Sft().datasets == [Dataset('tiny')]


def test_paths_with_spaces_in_lists(tmp_path, monkeypatch):
    """A file that is there is one word of a list, however the list is typed."""
    monkeypatch.chdir(tmp_path)
    for path in ('my rewards/a.py', 'my rewards/b, c.py', 'plain/d.py'):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text('')
    paths = ['my rewards/a.py:score', f'{tmp_path}/my rewards/b, c.py:other', 'plain/d.py:score']
    for path in paths:
        assert parse(Gpt, [f'--dataset_list={path}']).dataset_list == [path]
        assert parse(Gpt, ['--dataset_list', 'exact', path, 'tags', 'batch_size=2']).dataset_list == ['exact', path, 'tags']
        assert parse(Gpt, [f'dataset_list=exact,{path},tags']).dataset_list == ['exact', path, 'tags']
    assert parse(Gpt, ['--dataset_list', *paths]).dataset_list == paths
    assert parse(Gpt, ['--dataset_list=my rewards']).dataset_list == ['my rewards']       # a folder is a path, too
    assert parse(Gpt, ['--dataset_list=your rewards']).dataset_list == ['your', 'rewards']


def test_an_empty_text_may_be_a_value(tmp_path):
    @configclass
    class Mine:
        prompt: str | None = setting(None, path='data.prompt', empty=True)  # '' = none
        name: str | None = setting('x', path='data.name')  # whose

    for argv, prompt in (([], None), (['--prompt='], ''), (['--prompt', ''], ''), (['data.prompt='], ''),
                         (['--prompt=null'], None), (['--prompt=hi'], 'hi')):
        assert parse(Mine, argv).prompt == prompt, argv
    path = tmp_path / 'r.yaml'
    for text, prompt in (("''", ''), ('""', ''), ('', None), ('null', None), ('~', None), ("'hi'", 'hi')):
        path.write_text(f'data:\n  prompt: {text}\n  name:\n')
        cfg = parse(Mine, [str(path)])
        assert (cfg.prompt, cfg.name) == (prompt, None), text
    for prompt in ('', None, 'hi'):
        assert from_dict(Mine, json.loads(json.dumps(as_dict(Mine(prompt=prompt))))).prompt == prompt


def test_theta_and_dotted_spellings():
    cfg = parse(Sft, '--epochs 100 --batch-size 4 GPU_num=2 base_models.policy_0.path=org/m --checkpoint-dir '
                     'models/t --max-seq-length 64 window.size=5 --model.use_lora'.split()
                + ['wandb.project=my project'])
    assert (cfg.num_train_epochs, cfg.batch_size, cfg.gpu_num) == (100.0, 4, 2)
    assert (cfg.output_dir, cfg.max_length) == ('models/t', 64)
    assert cfg.base_models == {'policy_0': Policy('org/m')} and cfg.window == Window(5)
    assert cfg.use_lora is True and cfg.wandb_project == 'my project' and 'base_models' in cfg.typed


def test_recipe(recipe):
    cfg = parse(Sft, ['--recipe', recipe])
    assert (cfg.base_model_name, cfg.learning_rate, cfg.max_length) == ('meta-llama/Llama-3.2-3B-Instruct',
                                                                        3e-4, 2048)
    assert cfg.eval_strategy == 'no' and cfg.use_lora is True and cfg.lora_target_modules == ['q_proj',
                                                                                              'v_proj']
    assert cfg.datasets == [Dataset('first'), Dataset('second', weight=2.0)]
    assert {'learning_rate', 'datasets'} <= cfg.typed and 'output_dir' not in cfg.typed


def test_what_a_file_says_and_what_the_command_line_says_are_told_apart(recipe):
    cfg = parse(Sft, ['--recipe', recipe, '--max-seq-length', '64', 'wandb.project=p'])
    assert cfg.flags == {'max_length', 'wandb_project'} < cfg.typed


def test_overrides_between_flags_and_precedence(recipe, tmp_path):
    second = tmp_path / 'second.yaml'
    second.write_text('data: {max_length: 9}\ntraining.output_dir: two\n')
    cfg = parse(Sft, ['training.learning_rate=5.0e-5', '--num-gpus', '1', 'data.datasets[1].name=x', '--recipe', recipe,
                      'data.datasets.weight=0.5', str(second), '--output_dir', 'cli', 'wandb.enabled=false',
                      'data.datasets[2].name=y'])
    assert cfg.learning_rate == 5e-5 and cfg.max_length == 9 and cfg.output_dir == 'cli' and cfg.wandb is False
    assert cfg.datasets == [Dataset('first', weight=0.5), Dataset('x', weight=0.5), Dataset('y')]


def test_python_files(tmp_path):
    path = tmp_path / 'finetune.py'
    path.write_text("# nanoGPT's kind of file\nimport time\n\nbatch_size = 12\ngradient_accumulation_steps = "
                    "5 * 8\nlearning_rate = 6e-4 / 2 # half\ndecay_lr = True\nwandb_run_name = 'ft-' + "
                    "str(time.time())\ndataset_list = ['a', 'b c']\npatience = None\n")
    cfg = parse(Gpt, ['--batch_size=3', str(path)])
    assert (cfg.batch_size, cfg.gradient_accumulation_steps, cfg.learning_rate, cfg.decay_lr) == (3, 40, 3e-4,
                                                                                                  True)
    assert re.fullmatch(r'ft-\d+\.\d+', cfg.wandb_run_name) and cfg.dataset_list == ['a', 'b c']


@pytest.mark.parametrize('text, says', [
    ('batch_sise = 3', ['batch_sise', "'batch_size'"]),
    ('x = 1\nbatch_size = open("f")', ['line 2']),
    ('batch_size = 1 +', ['line 1']),
    ('batch_size = 1 / 0', ['line 1']),
    ('for i in range(3): pass', ['line 1']),
    ('batch_size = "a" * 10', ['line 1']),
    ('batch_size: int = 3', ['line 1']),
    ('seed = 1\nbatch_size += 3', ['line 2']),
    ('cfg.batch_size = 3', ['line 1']),
])
def test_python_files_that_are_refused(tmp_path, capsys, text, says):
    path = tmp_path / 'bad.py'
    path.write_text(text)
    assert all(word in mistake(capsys, Gpt, str(path)) + str(path) for word in says + ['bad.py'])


@pytest.mark.parametrize('text, says', [
    ('training: {learning_rte: 1}', ['training.learning_rte', "'training.learning_rate'"]),
    ('trainng: {learning_rate: 1}', ["'training.learning_rate'"]),
    ('data: {datasets: [{nam: x}]}', ["'nam'", "'name'"]),
    ('data: {max_length: 1.5}', ['data.max_length', "'1.5' is not int"]),
    ('training: {beta: 1, algorithm: dpo}', ["'dpo'", 'train_dpo.py']),
    ('training: [1', ['not YAML', 'line']),
    ('training:\n  beta: 1\nmodel: {}\ntraining:\n  x: 2', ["line 4: 'training' stands in line 1 already"]),
    ('training:\n  seed: 1\n  seed: 2', ["line 3: 'seed' stands in line 2 already"]),
    ('data: {datasets: [{name: x,\n name: y}]}', ["line 2: 'name' stands in line 1"]),
    ('training: {x: 1, x: 1}', ["line 1: 'x' stands in line 1"]),
    ('training: {epochs: 1}\nnum_train_epochs: 2', ['training.epochs and num_train_epochs are one setting']),
    ('training.learning_rate: 1\ntraining: {learning_rate: 2}', ['are one setting']),
    ('just words', ['section']),
])
def test_recipes_that_are_refused(tmp_path, capsys, text, says):
    path = tmp_path / 'bad.yaml'
    path.write_text(text)
    err = mistake(capsys, Sft, '--recipe', str(path))
    assert all(word in err for word in says + [str(path)])


@pytest.mark.parametrize('cls, words, says', [
    (Gpt, '--learning_rat=1e-3', ['learning_rat', "'--learning_rate'"]),
    (Gpt, '--optimizer=adamv', ['adamv', "'adamw'"]),
    (Gpt, '--batch_size=many', ['batch_size', "'many' is not int"]),
    (Gpt, '--batch_size=1.5', ['batch_size', '1.5']),
    (Gpt, '--learning_rate=nan', ['learning_rate', 'nan']),
    (Gpt, '--decay_lr=maybe', ['decay_lr', 'maybe']),
    (Gpt, '--batch=32', ['--batch', "'--batch_size'"]),
    (Gpt, '--dataset_list a b --dataset_sampling_probs 0.5', ['dataset_sampling_probs']),
    (Gpt, '--dataset_list a --dataset_sampling_probs half', ['dataset_sampling_probs', 'half']),
    (Gpt, '--batch_size', ['--batch_size needs a value']),
    (Gpt, '--batch_size --decay_lr', ['--batch_size needs a value']),
    (Gpt, 'stray', ["'stray'"]),
    (Gpt, '--no-batch_size', ['batch_size']),
    (Gpt, '--decay_lr stray', ["'stray'"]),
    (Sft, 'training.learning_rte=1', ['training.learning_rte', "'training.learning_rate'"]),
    (Sft, 'trainng.learning_rate=1', ['trainng', "'training.learning_rate'"]),
    (Sft, '--recipe recipes/none.yaml', ['recipes/none.yaml']),
    (Sft, '--num_gpu 8', ['num_gpu', "'--num_gpus'"]),
    (Sft, 'data.datasets[7].name=x', ['data.datasets[7].name', '1 entries']),
    (Sft, 'data.datasets[0].nam=x', ["'nam'", "'name'"]),
    (Sft, 'data.datasets=x', ['data.datasets', 'Dataset']),
    (Sft, 'training.learning_rate.x=1', ['training.learning_rate.x']),
    (Sft, 'training.algorithm=gspo', ['gspo', 'train_rl.py']),
    (Sft, 'base_models.path=x', ['base_models.path']),
])
def test_mistakes(capsys, cls, words, says):
    err = mistake(capsys, cls, *words.split())
    assert all(word in err for word in says), err


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, capsys):
    python, yaml = tmp_path / 'r.py', tmp_path / 'r.yaml'
    python.write_bytes(b'\xef\xbb\xbfbatch_size = 5\r\n')
    yaml.write_bytes(b'\xef\xbb\xbftraining:\r\n  learning_rate: 0.5\r\n')
    assert parse(Gpt, [str(python)]).batch_size == 5 and parse(Sft, [str(yaml)]).learning_rate == 0.5
    yaml.write_text('training: {}', encoding='utf-16')              # what Windows' PowerShell writes
    assert 'r.yaml is not UTF-8: save it in that encoding' in mistake(capsys, Sft, str(yaml))


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'latin-1', 'utf-8'])
def test_text_survives_any_console(monkeypatch, encoding):
    for printing in (lambda: parse(Gpt, ['--help']), lambda: run_script(print, '\u2584 caf\xe9 \ud83d')):
        stream = io.BytesIO()
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(stream, encoding=encoding))
        try:
            printing()
        except SystemExit as stop:
            assert stop.code == 0
        sys.stdout.flush()
    assert re.fullmatch('[\u2584?] caf[\xe9?] \\?', stream.getvalue().decode(encoding).strip())


def test_print_config(capsys, recipe):
    with pytest.raises(SystemExit) as stop:
        parse(Sft, ['--recipe', recipe, '--num-gpus', '8', '--print_config', 'base_models.policy_0.path=p'])
    tree = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and tree['training']['learning_rate'] == 3e-4 and tree['num_gpus'] == 8
    assert tree['data']['datasets'][1] == {'name': 'second', 'prompt_column': 'prompt', 'weight': 2.0}
    assert tree['base_models']['policy_0']['path'] == 'p' and tree['GPU_num'] == 1 and tree['wandb']['enabled'] is False


def test_resume_reads_back_what_was_saved_and_typed_flags_win(recipe):
    saved = json.loads(json.dumps(as_dict(parse(Sft, [recipe, 'base_models.p.path=x', 'wandb.project=none, '
                                                                                      '"q" é']))))
    assert as_dict(from_dict(Sft, saved)) == saved
    again = from_dict(Sft, saved, parse(Sft, ['--max_length=7']))
    assert again.max_length == 7 and again.learning_rate == 3e-4 and again.typed == {'max_length'}
    with pytest.raises(UserError, match='gone'):
        from_dict(Sft, {'training': {'gone': 1}})


def test_help_takes_its_words_from_the_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Gpt, ['--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and re.search(r'^Optimizer:$', out, re.M)
    assert re.search(r'--optimizer STR +100% by hand \(adamw, sgd; default "adamw"\)', out)
    assert 'first line and the second' in ' '.join(out.split()) and not re.search('one for each', out)
    with pytest.raises(SystemExit):
        parse(Sft, ['-h'])
    out = capsys.readouterr().out
    assert '--data.datasets[0].name' in out and 'hub name or path' in out and '--epochs' in out


def test_positional():
    @dataclass
    class Sample:
        model_path: str = setting('out', positional=True)
        prompt: str = ''
        stream: bool = False

    cfg = parse(Sample, ['--stream', 'runs/lr=1', '--prompt', 'a = b'])
    assert (cfg.model_path, cfg.prompt, cfg.stream) == ('runs/lr=1', 'a = b', True)

    @dataclass
    class Compare:
        model_path: str = ''
        models: list[str] = setting([], positional=True)

    cfg = parse(Compare, ['--model-path', 'a', 'b', 'c'])
    assert (cfg.model_path, cfg.models) == ('a', ['b', 'c'])
    assert parse(Compare, ['a', 'b', 'c']).models == ['a', 'b', 'c']


def test_run(capsys):
    assert run_script(lambda cfg: {'loss': cfg}, 1) is None

    def wrong(cfg):
        raise UserError('two\nlines')

    def interrupted(cfg):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_script(wrong, None)
    assert stop.value.code == 2 and capsys.readouterr().err.endswith('error: two lines\n')
    with pytest.raises(SystemExit) as stop:
        run_script(interrupted, None)
    assert stop.value.code == 130

# ---- classes of flags that scripts share

@configclass
class Common:
    """Without a section: its fields stand in that of the class that inherits them."""
    # drawing
    seed: int = 1337  # of all that is drawn,
        # in every step
    rate: float = setting(0.1, above=0, below=1, also=('lr',))  # the learning rate


@configclass
class DataPart:
    section = 'data'

    rows: int = setting(8, min=1, max=64, also=('batch-size',))  # rows of a batch
    columns: list[str] = ['a']  # what is read
    limit: int | None = setting(None, min=2)  # the longest; null = none


@configclass
class Mine(Common, DataPart):
    """A script's: two inherited defaults are others here."""
    section = 'training'
    aliases = {'loader.count': 'data.rows'}
    accepted = {'data.workers': Accepted(0, 'batches are made in this process'),
                'training.engine': Accepted(None, 'it is not used; leave it out', refused=True),
                'legacy_switch': Accepted(False, 'the environment decides')}

    rows = 16
    seed = 7
    name: str = setting('x', path='name')  # of the run
    mode: str = 'plain'  # how it is done

    def check(self):
        if self.mode == 'odd' and self.rows % 2 == 0:
            raise UserError('mode=odd needs an odd number of rows')


def test_sections_of_inherited_fields():
    paths = {field.name: configurator.path_of(field) for field in dataclasses.fields(Mine)}
    assert paths == {'rows': 'data.rows', 'columns': 'data.columns', 'limit': 'data.limit',
                     'seed': 'training.seed',
                     'rate': 'training.rate', 'name': 'name', 'mode': 'training.mode'}
    assert {field.name: configurator.path_of(field) for field in dataclasses.fields(Common)} \
        == {'seed': 'seed', 'rate': 'rate'}
    for words in ('data.rows=3 training.rate=0.5 name=y', '--rows 3 --rate=0.5 --name y', 'rows=3 lr=0.5 '
                                                                                          'name=y',
                  'loader.count=3 --lr 0.5 --name=y', '--batch_size=3 training.rate=0.5 training.name=y'):
        cfg = parse(Mine, words.split())
        assert (cfg.rows, cfg.rate, cfg.name) == (3, 0.5, 'y') and cfg.typed == {'rows', 'rate',
                                                                                 'name'}, words


def test_an_inherited_default_is_changed_without_an_annotation():
    assert (Mine().rows, Mine().seed, DataPart().rows, Common().seed) == (16, 7, 8, 1337)
    assert Mine().columns == ['a'] and Mine().columns is not Mine().columns
    assert as_dict(parse(Mine, []))['data'] == {'rows': 16, 'columns': ['a'], 'limit': None, 'workers': 0}
    assert [field.name for field in dataclasses.fields(Mine)].count('rows') == 1
    # its type, path, range and spellings are inherited
    assert typing.get_type_hints(Mine)['rows'] is int


@pytest.mark.parametrize('words, says', [
    ('--rows=0', 'rows must be 1 or more, not 0'),
    ('--batch-size=65', 'rows must be 64 or less, not 65'),
    ('--rate=0', 'rate must be above 0, not 0.0'),
    ('training.rate=1', 'rate must be below 1, not 1.0'),
    ('--limit=1', 'limit must be 2 or more, not 1'),
    ('--rate=inf', "rate: 'inf' is not float"),
    ('--mode=odd', 'mode=odd needs an odd number of rows'),
    ('--rows=null', "rows: 'null' is not int"),
    ('--workers=many', "workers: 'many' is not int"),
    ('--engine=fast', 'engine=fast: it is not used; leave it out'),
    ('data.worker=1', "there is no setting 'data.worker'"),
])
def test_ranges_and_contradictions(capsys, words, says):
    assert says in mistake(capsys, Mine, words)


def test_bounds_are_inclusive_or_not_and_null_is_none():
    cfg = parse(Mine, '--rows=1 --rate=0.999 --limit=null'.split())
    assert (cfg.rows, cfg.rate, cfg.limit) == (1, 0.999, None) and parse(Mine,
                                                                         ['--rows=64',
                                                                          '--limit=2']).limit == 2
    cfg.rate = float('nan')                                 # not from a command line, which refuses it
    with pytest.raises(UserError, match='rate must be above 0, not nan'):
        check_settings(cfg)


def test_keys_that_change_nothing_are_taken_stored_printed_and_said(capsys, tmp_path):
    path = tmp_path / 'r.yaml'
    path.write_text('data: {workers: 4}\n')
    for words in (['data.workers=4'], ['--workers', '4'], ['--data.workers=4'], [str(path)]):
        cfg = parse(Mine, [*words, '--legacy-switch'])
        assert as_dict(cfg)['data']['workers'] == 4 and as_dict(cfg)['legacy_switch'] is True
        assert list(without_effect(cfg)) == ['workers=4 changes nothing here: batches are made in this '
                                             'process',
                                             'legacy_switch=true changes nothing here: the environment '
                                             'decides']
        again = from_dict(Mine, json.loads(json.dumps(as_dict(cfg))))
        assert as_dict(again) == as_dict(cfg) and list(without_effect(again)) == list(without_effect(cfg))
    assert as_dict(from_dict(Mine, as_dict(cfg), parse(Mine, ['--workers=2'])))['data']['workers'] == 2
    assert list(without_effect(parse(Mine, ['--workers=0', 'training.engine=null', '--no-legacy_switch']))) == []
    with pytest.raises(SystemExit):
        parse(Mine, ['--print_config'])
    tree = json.loads(capsys.readouterr().out)
    assert tree['data']['workers'] == 0 and tree['training']['engine'] is None and tree['legacy_switch'] is False


def test_help_of_inherited_flags(capsys):
    with pytest.raises(SystemExit):
        parse(Mine, ['--help'])
    out = ' '.join(capsys.readouterr().out.split())
    assert '--seed INT of all that is drawn, in every step (training.seed; default 7)' in out
    assert '--rows INT rows of a batch (data.rows; --batch-size; default 16)' in out
    assert '--rate FLOAT the learning rate (training.rate; --lr; default 0.1)' in out
    assert '--mode STR how it is done (training.mode; default "plain")' in out and 'drawing:' in out
    assert 'workers' not in out


def test_help_of_a_script(monkeypatch, capsys):
    """As wide as the terminal; what it is, its examples, what one needs; all else once."""
    import train_rl
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit):
        parse(train_rl.Config, ['--help'])
    out = capsys.readouterr().out
    settings = out.partition('most used:\n')[2]
    assert '\n    python train_rl.py training.algorithm=ppo' in out and 'A rollout samples' not in out
    assert max(map(len, settings.splitlines())) <= 80
    first = settings.partition('\n\n')[0]
    for name in ('base_model_name', 'learning_rate', 'output_dir', 'algorithm'):
        assert f'--{name} ' in first and settings.count(f'\n  --{name} ') == first.count(f'\n  --{name} ')
    assert 'and pictures' in first.partition('--output_dir')[2].partition('--num')[0]        # an inherited comment


def test_a_configuration_of_an_earlier_version_is_read():
    """Flat keys, another section, a null where the field has a default by now."""
    old = {'rows': 3, 'seed': None, 'lr': 0.2, 'limit': None, 'workers': 1, 'training': {'mode': 'fine'}}
    cfg = from_dict(Mine, old)
    assert (cfg.rows, cfg.seed, cfg.rate, cfg.limit, cfg.mode) == (3, 7, 0.2, None, 'fine')
    assert cfg.accepted_values == {'data.workers': 1} and cfg.typed == cfg.flags == frozenset()


def test_a_flag_that_needs_another_one_is_said():
    @configclass
    class Needing:
        section = ''
        lora: bool = False  # adapters
        rank: int = setting(8, needs=('lora=true',))  # of them
        places: list[str] = []  # where to log
        limit: int | None = None  # steps
        epochs: int = setting(1, needs=('limit=none', 'places=x', 'missing=1'))  # passes

    assert list(without_effect(parse(Needing, ['--rank=4']))) == ['rank=4 changes nothing: it is for lora=true']
    assert list(without_effect(parse(Needing, ['--rank=4', '--lora', '--limit=3', '--places=x', '--epochs=2']))) == []
    assert list(without_effect(parse(Needing, ['--epochs=2']))) == []
    cfg = parse(Needing, ['--limit=3'])
    cfg.flags = frozenset()                                         # as if of a recipe, which may spell it out
    assert list(without_effect(cfg)) == []


# ---- names that people type

NAMES = ('lr config model_name_or_path max_steps max_iters num_train_epochs epochs bs batch_size checkpoint ckpt gpus '
         'nproc_per_node temperature output_dir resume data train_file per_device_train_batch_size grad_accum '
         'warmup_steps block_size max_seq_length max_new_tokens max_tokens eval_interval save_steps logging_steps lora '
         'lora_rank target_modules precision run_name optim scheduler grad_clip num_return_sequences kl_coef '
         'reward_funcs torch_compile flash_attn val_split beta num_gpus version').split()
TRAINING = ('train_gpt', 'train_sft', 'train_dpo', 'train_rl', 'train_agents')


def takes(cls, name):
    known = {**spellings(configurator.Always), **spellings(cls), **getattr(cls, 'aliases', {})}
    return name in known or accepted_key(cls, name) is not None


@pytest.mark.parametrize('script', TRAINING)
def test_keys_without_effect_stay_readable(script):
    """Every run stored them: a key that goes from the table would stop all older runs from being resumed."""
    cls = importlib.import_module(script).Config
    assert from_dict(cls, {'data': {'dataset_num_proc': 1, 'remove_unused_columns': True},
                           'model': {'low_cpu_mem_usage': True}, 'distributed': False,
                           'training': {'prediction_loss_only': True, 'dataloader_num_workers': 0,
                                        'dataloader_pin_memory': False}})


@pytest.mark.parametrize('script', [*TRAINING, 'sample', 'evaluate'])
def test_hints_name_a_flag_of_the_script(script, capsys):
    """Or there is none: 'did you mean' never ends in a second mistake."""
    cls = importlib.import_module(script).Config
    for name in {*NAMES, *SYNONYMS}:
        if not takes(cls, name):
            hint = re.search("; did you mean '--(.*)'", mistake(capsys, cls, f'--{name}=1'))
            assert not hint or takes(cls, hint[1])


@pytest.mark.parametrize('script, word, meant', [
    ('train_gpt', 'num_train_epochs', 'max_steps'), ('train_gpt', 'bs', 'batch_size'),
    ('train_gpt', 'warmup_steps', 'warmup_iters'), ('train_sft', 'config', 'recipe'),
    ('train_sft', 'max_iters', 'max_steps'), ('train_sft', 'gpus', 'num_gpus'),
    ('train_sft', 'ckpt', 'base_model_name'), ('train_sft', 'temperature', None), ('train_sft', 'n_layer', None),
    ('train_dpo', 'bs', 'per_device_train_batch_size'), ('train_rl', 'reward_funcs', 'reward'),
    ('train_rl', 'max_tokens', 'max_completion_length'), ('train_agents', 'epochs', 'max_steps'),
    ('train_agents', 'checkpoint', 'model'), ('train_agents', 'run_name', 'experiment_name'),
    ('evaluate', 'max_steps', None), ('sample', 'model_path', 'model'),
])
def test_hints(script, word, meant):
    cls = importlib.import_module(script).Config
    known = {**spellings(configurator.Always), **spellings(cls), **getattr(cls, 'aliases', {})}
    assert closest(word, known, '--') == (f"; did you mean '--{meant}'?" if meant else '')


def test_hints_of_dotted_keys_are_paths(capsys):
    cls = importlib.import_module('train_sft').Config
    assert "'model.lora_r'" in mistake(capsys, cls, 'training.lora_r=8')
    assert "'training.max_steps'" in mistake(capsys, cls, 'training.max_iters=8')
    assert '"data.datasets[0].name=x"' in mistake(capsys, cls, '--datasets=x')
    assert parse(cls, ['training.epochs=2', 'training.lr=0.5']).num_train_epochs == 2


@pytest.mark.parametrize('script', TRAINING)
def test_names_that_every_training_script_takes(script):
    cls = importlib.import_module(script).Config
    cfg = parse(cls, '--model=gpt2 --lr=0.5 --max_steps=7 --output_dir=o --resume'.split())
    assert cfg.learning_rate == 0.5 and cfg.resume is True and takes(cls, 'num_gpus')
    values = [getattr(cfg, field.name) for field in dataclasses.fields(cfg)]
    assert 'o' in values and 7 in values and '"gpt2"' in json.dumps(as_dict(cfg))


@pytest.mark.parametrize('script, flag', [('train_sft', 'chosen_column'), ('train_sft', 'rejected_column'),
                                          ('train_dpo', 'answer_column')])
def test_a_column_that_a_script_does_not_read_is_refused(script, flag, capsys):
    cls = importlib.import_module(script).Config
    assert 'rows have no such column here, but prompt_column' in mistake(capsys, cls, f'--{flag}=x', '--dataset_path=y')
    assert parse(cls, ['--prompt_column=x', '--dataset_path=y']).sources()[0].prompt_column == 'x'


# ---- recipes

@pytest.mark.parametrize('path', RECIPES, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_recipes_name_every_setting(path, tmp_path):
    cls, text = config_of(path), path.read_text('utf-8')
    assert documented(path) == text, 'python scripts/document_recipes.py makes it so'
    own, _, rest = text.partition(MARK)
    # what is commented says what is so without it; but agents are entries that only the user can name
    lines = [line.removeprefix('# ') for line in rest.splitlines() if 'agent_0' not in line]
    changed = tmp_path / path.name
    changed.write_text(own + '\n'.join(lines), encoding='utf-8')
    plain, spelled_out = as_dict(parse(cls, [str(path)])), as_dict(parse(cls, [str(changed)]))
    if path.parent.name == 'agents':                                # of these the task knows the defaults
        spelled_out['env'] = {key: spelled_out['env'][key] for key in plain['env']}
        plain['base_models'] = {'policy_0': {'path': 'tiny'}}
    assert spelled_out == plain


def test_fill_in_sets_what_is_open_and_says_it():
    cfg = parse(Mine, ['--columns', 'b'])
    assert fill_in(cfg, limit=5, rows=1, columns=['c']) == 'limit=5' and (cfg.limit, cfg.rows) == (5, 16)
    cfg.columns, cfg.limit = [], None
    assert fill_in(cfg, limit=3, columns=['c', 'd']) == 'limit=3, columns=c d' and cfg.columns == ['c', 'd']
    cfg.rate = None
    assert fill_in(cfg, rate=1e-5) == 'rate=1e-05' and fill_in(cfg, rate=2.0) == ''


SCRIPT = '''"""A script."""
import os, signal, sys, time
from dataclasses import dataclass
from configurator import UserError, parse, run_script

@dataclass
class Config:
    mode: str = 'show'
    num_gpus: int = 1
    nohup: bool = False
    distributed: bool = False

def main(cfg):
    rank = os.environ.get('RANK')
    words = 'rank', rank, os.environ.get('WORLD_SIZE'), os.environ.get('LOCAL_RANK')
    os.write(1, (' '.join(map(str, words)) + '\\n').encode())     # at once: two ranks share the pipe
    if cfg.mode == 'wrong':
        raise UserError('bad data')
    if cfg.mode == 'one' and rank == '1':
        sys.exit(7)
    if cfg.mode == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.mode == 'wait':
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        print('ready', flush=True)
        time.sleep(20)

if __name__ == '__main__':
    run_script(main, parse(Config))
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'train it.py').write_text(SCRIPT)
    env = {name: value for name, value in os.environ.items() if name not in ('RANK', 'LOCAL_RANK', launch.ROLE)}
    env['PYTHONPATH'] = ROOT

    def start(*argv, **more):
        return subprocess.Popen([sys.executable, 'train it.py', *argv], cwd=tmp_path, env={**env, **more},
                                text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    start.folder = tmp_path
    return start


def finish(process):
    out, err = process.communicate(timeout=120)      # not how long it takes: a busy machine is slow
    return process.returncode, out, err


def test_num_gpus(script):
    code, out, err = finish(script('--num-gpus', '2'))
    assert (code, sorted(out.splitlines()), err) == (0, ['rank 0 2 0', 'rank 1 2 1'], '')
    code, out, err = finish(script('--num-gpus=3', 'mode=wrong'))
    assert code == 2 and re.fullmatch(r'train it.py( \(rank \d\))?: error: bad data\n', err)    # of three one prints
    assert finish(script('--num-gpus=2', '--mode=one'))[0] == 7
    code, out, err = finish(script('--num-gpus=2', '--mode=killed'))
    assert code == 128 + 9 and re.search(r'rank \d ended by SIGKILL \(was memory short\?\)', err)
    assert finish(script('--num-gpus=2', '--local-rank=1', '--distributed', RANK='1', LOCAL_RANK='1',
                         WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')) \
        == (0, 'rank 1 2 1\n', '')


WHOLE = dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')


def set_environment(monkeypatch, values):
    for name in (*WHOLE, *launch.OTHER_LAUNCHERS, 'SLURM_LOCALID', errors.FAILED):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize('values, expected', [
    ({}, (0, 0, 1)), (WHOLE, (1, 1, 2)), ({**WHOLE, 'LOCAL_RANK': ''}, (1, 0, 2)),
    ({'WORLD_SIZE': '1'}, (0, 0, 1)), ({'WORLD_SIZE': '1', 'RANK': '0', 'SLURM_STEP_NUM_TASKS': '8'}, (0, 0, 1)),
    ({'WORLD_SIZE': '', 'RANK': ''}, (0, 0, 1)), ({'LOCAL_RANK': 'x', 'MASTER_ADDR': 'x'}, (0, 0, 1)),
    ({'SLURM_STEP_NUM_TASKS': '1', 'PMI_SIZE': '1'}, (0, 0, 1)),
    ({**WHOLE, 'LOCAL_RANK': '', 'SLURM_LOCALID': '3'}, (1, 3, 2)),
])
def test_what_a_launcher_says(monkeypatch, values, expected):
    set_environment(monkeypatch, values)
    assert launched() == expected


@pytest.mark.parametrize('values, says', [
    ({'WORLD_SIZE': '2'}, 'has WORLD_SIZE=2, without RANK, MASTER_ADDR, MASTER_PORT: .* `unset WORLD_SIZE`'),
    ({'RANK': '1'}, 'has RANK=1, without WORLD_SIZE'),
    ({'RANK': '0', 'WORLD_SIZE': '2'}, 'without MASTER_ADDR, MASTER_PORT: .* `unset RANK WORLD_SIZE`'),
    ({**WHOLE, 'RANK': '2'}, 'which do not fit together'), ({**WHOLE, 'RANK': '-1'}, 'do not fit'),
    ({**WHOLE, 'WORLD_SIZE': 'two'}, 'do not fit'), ({**WHOLE, 'LOCAL_RANK': 'x'}, 'do not fit'),
    ({'SLURM_STEP_NUM_TASKS': '8'}, 'srun started 8 processes'), ({'OMPI_COMM_WORLD_SIZE': '2'}, 'mpirun'),
])
def test_half_of_what_a_launcher_says(monkeypatch, values, says):
    set_environment(monkeypatch, values)
    with pytest.raises(UserError, match=says):
        launched()


def test_of_the_ranks_that_torchrun_starts_the_first_prints_an_error(monkeypatch, capsys, tmp_path):
    set_environment(monkeypatch, WHOLE)

    def lost(_):
        raise RuntimeError('[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234')

    def wrong(_):
        raise UserError('bad data')

    def main_is_wrong(_):
        raise errors.MainRankFailed('its message says why')

    for local_rank, main in ((3, main_is_wrong), (0, wrong), (1, wrong), (2, lost)):
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / str(local_rank) / 'error.json'))
        with pytest.raises(SystemExit, match='2'):
            run_script(main, None)
    assert capsys.readouterr().err.endswith('(rank 1): error: bad data\n')
    (tmp_path / 'failed').unlink()
    with pytest.raises(SystemExit, match='2'):
        run_script(lost, None)
    assert 'another process of this run ended' in capsys.readouterr().err
    monkeypatch.setenv('WORLD_SIZE', '1')
    with pytest.raises(RuntimeError):                               # alone it has no other to lose
        run_script(lost, None)


def test_stop_signals_reach_every_process(script):
    process = script('--num_gpus=2', '--mode=wait')
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines.count('ready\n') == 2
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143


def test_open_sections(capsys):
    """A dict field takes what its section holds besides other fields; a script types and checks it."""
    @configclass
    class World:
        section = 'env'
        name: str = 'maze'  # which world
        more: dict = setting({}, path='env', open=lambda: [('size', 4, 'maze: rows'), ('seed', None, 'any number')])  # its own

    cfg = parse(World, ['env.size=6', '--env.wall-share', '0.5', 'env.name=grid'])
    assert cfg.more == {'size': '6', 'wall_share': '0.5'} and cfg.name == 'grid' and cfg.typed == {'more', 'name'}
    assert as_dict(cfg) == {'env': {'name': 'grid', 'size': '6', 'wall_share': '0.5'}}
    resumed = from_dict(World, as_dict(cfg), parse(World, ['env.size=7']))
    assert resumed.more == {'size': '7', 'wall_share': '0.5'} and resumed.name == 'grid'
    for words in (['env=x'], ['env.a.b=1']):
        with pytest.raises(SystemExit):
            parse(World, words)
    assert capsys.readouterr().err.count('error: ') == 2
    with pytest.raises(SystemExit):
        parse(World, ['--help'])
    shown = ' '.join(capsys.readouterr().out.split())
    assert 'env.size maze: rows (default 4)' in shown and 'env.seed any number' in shown


def test_nohup(script):
    started = [finish(script('--nohup', 'mode=wrong')) for _ in range(2)]
    logs = sorted((script.folder / 'logs').iterdir())
    assert len(logs) == 2 and all(re.fullmatch(r'training_\d{8}_\d{6}\.log', log.name) for log in logs)
    for code, out, err in started:
        assert code == 0 and err == '' and re.search(r'PID \d+', out) and 'tail -f logs/training_' in out
    until = time.time() + 120
    while not all(log.read_text().endswith('exit status 2\n') for log in logs):
        assert time.time() < until, [log.read_text() for log in logs]
        time.sleep(0.05)
    assert all('error: bad data' in log.read_text() and 'rank None' in log.read_text() for log in logs)


def test_a_mistake_is_told_before_anything_is_launched(script):
    code, _, err = finish(script('--nohup', '--num_gpus=2', '--mod=x'))
    assert code == 2 and "'--mode'" in err and not (script.folder / 'logs').exists()


def processor_seconds():
    """What the processes that have ended took of the processors: no busy neighbour changes that much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_answers_at_once_and_without_torch(script):
    check = "import sys, configurator; assert not {'torch', 'yaml', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', check], cwd=ROOT, check=True)
    for flag in ('--help', '--print_config'):
        before = processor_seconds()
        assert finish(script(flag))[0] == 0
        assert processor_seconds() - before < 0.5       # which on an idle machine is what the user waits
