"""train_gpt.py in short real runs: what they leave on disk, what they compute, and that a kill changes
nothing."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import train_gpt
from conftest import ROOT, ranks
from configurator import UserError, check_settings, parse
from data.corpus import Corpus, windows
from data.prepare import prepare_files
from chaos import survive
from nanoforge.run import Run, setup
from train_gpt import Config, main

TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, max_iters=6, eval_interval=3,
            eval_iters=2, log_interval=1,
            warmup_iters=2, sample_tokens=8, device='cpu', tensorboard=False)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two data sets with one tokenizer and one with another, prepared as a user would."""
    folder = tmp_path_factory.mktemp('data')
    rng = random.Random(0)
    words = ['the', 'king', 'and', 'queen', 'shall', 'speak', 'of', 'war', 'love', 'night']
    for name, tokenizer in (('plays', 'char'), ('songs', None), ('bytes', 'byte')):
        text = folder / f'{name}.txt'
        text.write_text('\n'.join(' '.join(rng.choices(words, k=8)) for _ in range(400)) + '\nxyz')
        prepare_files(str(folder / name), [str(text)], tokenizer or str(folder / 'plays'), 'written by the '
                                                                                           'test')
    return folder


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)     # logs/ goes there


def config(data, out_dir='out', **changes):
    changes = {'dataset': str(data / 'plays'), 'out_dir': str(out_dir), **TINY, **changes}
    cfg = Config(**changes)
    cfg.typed = frozenset(changes)
    check_settings(cfg)
    return cfg


def set_up(data, **changes):
    """(cfg, run, corpora, model) as main has them before its loop."""
    cfg, run = config(data, **changes), setup('cpu', matmul='float32')
    train_gpt.resolve_defaults(cfg, run)
    corpora = train_gpt.open_data(cfg, run)
    model, _ = train_gpt.build_model(cfg, corpora, run)
    return cfg, run, corpora, model


def lines(out_dir):
    with open(os.path.join(out_dir, 'log.jsonl')) as f:
        return [json.loads(line) for line in f]


def weights(out_dir, which='last'):
    with open(os.path.join(out_dir, which, 'model.safetensors'), 'rb') as f:
        return f.read()


@pytest.mark.pictures
def test_run_leaves_what_is_promised(data, tmp_path):
    metrics = main(config(data, tensorboard=True))
    for name in ('config.json', 'model.safetensors', 'tokenizer.json', 'run_config.json', 'log.jsonl',
                 'loss.png', 'samples.txt',
                 'checkpoint-6/optimizer.safetensors', 'checkpoint-6/trainer_state.json',
                 'checkpoint-6/manifest.json'):
        assert os.path.getsize(tmp_path / 'out' / name) > 0
    assert list(tmp_path.glob('logs/out-*/events.out.tfevents*'))
    log = lines('out')
    assert [line['step'] for line in log if 'loss' in line] == [1, 2, 3, 4, 5, 6]
    assert [line['step'] for line in log if 'eval_loss' in line] == [3, 6]
    first = next(line for line in log if 'loss' in line)
    assert first['loss'] == pytest.approx(math.log(Corpus(str(data / 'plays')).meta['vocab_size']), abs=0.3)
    assert [line['learning_rate'] for line in log if 'loss' in line][:3] == pytest.approx([1e-3 / 3, 2e-3 / 3,
                                                                                           1e-3])
    assert metrics['eval_loss'] == log[-1]['eval_loss'] if 'eval_loss' in log[-1] else True
    corpus = Corpus(str(data / 'plays'))
    assert metrics['bits_per_byte'] == pytest.approx(metrics['eval_loss'] / math.log(2) * corpus.meta['val_tokens'] / corpus.meta['val_bytes'])


def test_it_learns(data):
    metrics = main(config(data, max_iters=150, eval_interval=150, learning_rate=3e-2, optimizer='adamw',
                          n_embd=32))
    assert metrics['eval_loss'] < 1.6        # 2.6 is what counting characters alone gives


def test_transformers_opens_the_result(data):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from model import load_model
    for arch in ('qwen3', 'gpt2', 'llama'):
        main(config(data, f'out-{arch}', arch=arch, max_iters=2, eval_interval=2))
        theirs, tokenizer = AutoModelForCausalLM.from_pretrained(f'out-{arch}'), AutoTokenizer.from_pretrained(f'out-{arch}')
        ids = tokenizer('the king', return_tensors='pt').input_ids
        ours, own_tokenizer = load_model(f'out-{arch}')
        assert own_tokenizer.encode('the king') == ids[0].tolist()
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)
        assert theirs.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.size(1) + 4)


def test_gradient_does_not_depend_on_the_cut(data, monkeypatch):
    """1 micro-batch of 8 rows = 8 of 1 = 2 of 4, given the same rows, in the script's own loop; in
    float64."""
    gradients, logged = [], []
    cfg, run, corpora, model = set_up(data, batch_size=8)
    [(x, y)] = train_gpt.get_batch(cfg, corpora, 0, run)
    build_model, step = train_gpt.build_model, Run.step

    def build_in_float64(*arguments):
        model, tokenizer = build_model(*arguments)
        return model.double(), tokenizer

    def recording_step(self, optimizer, lr, max_norm):
        gradients.append(torch.cat([grad.flatten() for grad in optimizer.grads]))
        return step(self, optimizer, lr, max_norm)

    monkeypatch.setattr(train_gpt, 'build_model', build_in_float64)
    monkeypatch.setattr(Run, 'step', recording_step)
    for rows in (8, 1, 4):
        monkeypatch.setattr(train_gpt, 'get_batch', lambda *_: zip(x.split(rows), y.split(rows)))
        main(config(data, f'out-{rows}', batch_size=rows, gradient_accumulation_steps=8 // rows, max_iters=1,
                    matmul='float32', sample_tokens=0))
        logged.append(next(line['loss'] for line in lines(f'out-{rows}') if 'loss' in line))
    assert gradients[0].dtype == torch.float64 and gradients[0].abs().max() > 1e-3
    for parts in gradients[1:]:
        torch.testing.assert_close(parts, gradients[0], atol=1e-12, rtol=1e-10)
    expected = -model(x, y).mean().item()
    assert logged == pytest.approx([expected] * 3, abs=2e-6)


@pytest.mark.parametrize('accumulation', (1, 2))
def test_two_ranks_give_the_losses_of_one(data, accumulation):
    settings = {'matmul': 'float32', 'max_iters': 12, 'eval_interval': 6,
                'gradient_accumulation_steps': accumulation}
    main(config(data, 'one', **settings))
    ranks(2, lambda rank: main(config(data, 'two', **settings)))
    one, two = lines('one'), lines('two')
    for key in ('loss', 'eval_loss', 'train_loss', 'grad_norm'):
        a, b = ([line[key] for line in log if key in line] for log in (one, two))
        assert len(a) > 1 and a == pytest.approx(b, abs=1e-5)


def test_kills_change_nothing(data):
    """SIGKILL at random moments, resumed each time: the final weights and optimizer state are those of a
    run left alone."""
    flags = [f'--{k}={v}' for k, v in {**TINY, 'dataset': data / 'plays', 'max_iters': 120, 'eval_interval': 10, 'log_interval': 7,
                                       'dropout': 0.1, 'sample_tokens': 0}.items()]
    report = survive('train_gpt', flags, kills=3)
    assert report['kills'] == 3 and report['differences'] == []
    curve = lambda out: [(line['step'], line['eval_loss']) for line in lines(out) if 'eval_loss' in line]
    assert len(curve('whole')) == 12 and curve('whole') == curve('killed')


def test_sigterm_saves_and_says_how_to_go_on(data):
    flags = [f'--{k}={v}' for k, v in {**TINY, 'dataset': data / 'plays', 'max_iters': 100000, 'eval_interval': 50000}.items()]
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train_gpt.py'), *flags, '--out_dir=out'],
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step'):
            process.send_signal(signal.SIGTERM)
            break
    said = process.stdout.read()
    assert process.wait() == 143
    assert '--init_from=resume' in said and 'Traceback' not in said
    step = json.load(open('out/last/trainer_state.json'))['step']
    main(resume('out', max_iters=step + 2))
    assert json.load(open('out/last/trainer_state.json'))['step'] == step + 2


def resume(out_dir, **typed):
    cfg = Config(init_from='resume', out_dir=str(out_dir), **typed)
    cfg.typed = frozenset({'init_from', 'out_dir', *typed})
    return cfg


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_resume_has_two_spellings(data, tmp_path):
    """--resume is --init_from=resume; --resume=auto starts fresh in an empty folder, and goes on in
    another."""
    main(config(data, 'auto', resume='auto', max_iters=4, eval_interval=2))
    shutil.copytree('auto', 'flag', symlinks=True)
    shutil.copytree('auto', 'init', symlinks=True)
    for folder, typed in (('auto', {'resume': 'auto'}), ('flag', {'resume': True}),
                          ('init', {'init_from': 'resume'})):
        cfg = Config(out_dir=folder, max_iters=6, **typed)
        cfg.typed = frozenset({'out_dir', 'max_iters', *typed})
        main(cfg)
        assert json.load(open(f'{folder}/run_config.json'))['config']['init_from'] == 'scratch'
        assert [line['step'] for line in lines(folder) if 'loss' in line] == [1, 2, 3, 4, 5, 6]
    assert weights('auto') == weights('flag') == weights('init')
    before = files(tmp_path / 'auto')
    with pytest.raises(UserError, match='--init_from=resume: .*empty holds no run of train_gpt'):
        main(config(data, 'empty', resume=True))
    assert files(tmp_path / 'auto') == before and not os.path.exists('empty')


def test_resume_takes_the_saved_configuration(data):
    main(config(data, learning_rate=5e-3, max_iters=4, eval_interval=2))
    main(resume('out', max_iters=6))
    assert json.load(open('out/run_config.json'))['config']['learning_rate'] == 5e-3
    assert os.path.exists('out/checkpoint-6/model.safetensors')
    assert [line['step'] for line in lines('out') if 'loss' in line] == [1, 2, 3, 4, 5, 6]


def test_truncated_checkpoint_falls_back(data, capsys):
    main(config(data))
    path = 'out/checkpoint-6/model.safetensors'
    os.truncate(path, os.path.getsize(path) // 2)
    main(resume('out', max_iters=9))
    assert 'checkpoint-6' in capsys.readouterr().out
    assert [line['step'] for line in lines('out') if 'loss' in line] == list(range(1, 10))


def test_second_fresh_run_keeps_the_first(data):
    main(config(data, max_iters=2))
    first = weights('out')
    main(config(data, max_iters=2, seed=7))
    assert weights('out/earlier-1') == first != weights('out')


def test_multidataset_draws_by_probability(data):
    cfg, run, corpora, _ = set_up(data, training_mode='multidataset', dataset_sampling_probs=[3.0, 1.0],
                                  dataset_list=[str(data / 'plays'), str(data / 'songs')])
    plays = np.asarray(corpora[0].tokens('train')).tobytes()
    rows = [next(train_gpt.get_batch(cfg, corpora, step, run))[0][0] for step in range(400)]
    drawn = [np.uint16(row.numpy()).tobytes() in plays for row in rows]
    assert 0.68 < sum(drawn) / 400 < 0.82
    metrics = main(cfg)
    names = [f'eval_loss/{name}' for name in ('plays', 'songs')]
    assert metrics['eval_loss'] == pytest.approx((3 * metrics[names[0]] + metrics[names[1]]) / 4)


def test_multicontext_is_the_sum_of_embeddings_and_the_mean_of_losses(data):
    streams = [str(data / 'plays'), str(data / 'plays')]
    metrics = main(config(data, training_mode='multicontext', multicontext_datasets=streams, max_iters=3))
    assert json.load(open('out/config.json'))['nanoforge']['multicontext']
    cfg, run, corpora, model = set_up(data, training_mode='multicontext', multicontext_datasets=streams)
    (x, y), = train_gpt.get_batch(cfg, corpora, 0, run)
    # aligned: one data set twice gives equal streams
    assert x.shape == (4, 16, 2) and torch.equal(x[..., 0], x[..., 1])
    hidden = model.hidden(x[..., 0], embeddings=lambda: model.embed_tokens(x[..., 0]) + model.more_embeddings[0](x[..., 1]))
    logp = (hidden @ model.more_embeddings[0].weight.t()).log_softmax(-1).gather(-1, y[..., 1:]).squeeze(-1)
    torch.testing.assert_close(model(x, y)[..., 1], logp)
    assert metrics['eval_loss'] > 0


def test_evaluation_uses_no_token_twice(data, monkeypatch):
    for eval_iters in (1, 3, 10 ** 6):
        cfg, run, corpora, model = set_up(data, eval_iters=eval_iters)
        seen = []

        def recorded(tokens, offsets, T, device):
            seen.extend(offsets)
            return windows(tokens, offsets, T, device)
        monkeypatch.setattr(train_gpt, 'windows', recorded)
        loss = train_gpt.evaluate(cfg, model, corpora, 'val', run)
        assert len(seen) <= eval_iters * cfg.batch_size and np.diff(sorted(seen)).min(initial=16) >= 16
        assert loss == train_gpt.evaluate(cfg, model, corpora, 'val', run)
    assert len(seen) // 2 == (len(corpora[0].tokens('val')) - 1) // 16


def test_fine_tuning_from_a_local_gpt2(data):
    from transformers import GPT2Config, GPT2LMHeadModel
    vocab = Corpus(str(data / 'plays')).meta['vocab_size']
    GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=32, n_embd=16, n_layer=1,
                               n_head=2)).save_pretrained('gpt2-local')
    for name in ('tokenizer.json', ):
        shutil.copy(data / 'plays' / name, 'gpt2-local')
    cfg = config(data, init_from='gpt2', gpt2_type='gpt2-local', block_size=64)
    cfg.n_layer = cfg.n_head = cfg.n_embd = None
    metrics = main(cfg)
    assert metrics['step'] == 6 and json.load(open('out/config.json'))['model_type'] == 'gpt2'
    with pytest.raises(UserError, match='prepare it with --tokenizer=gpt2-local '):
        main(config(data, 'other', init_from='gpt2', gpt2_type='gpt2-local', dataset=str(data / 'bytes')))


def test_schedule_that_the_flags_ask_for():
    for argv, expected in (([], 'none'), (['--decay_lr'], 'cosine'),
                           (['--lr_scheduler=exponential'], 'exponential'),
                           (['--lr_scheduler=wsd', '--no-decay_lr'], 'none'),
                           (['--lr_scheduler=linear', '--decay_lr'], 'linear')):
        cfg = parse(Config, argv)
        train_gpt.resolve_defaults(cfg, setup('cpu'))
        assert cfg.lr_scheduler == expected and cfg.ema == (0.998 if expected == 'none' else 0)
        train_gpt.resolve_defaults(cfg, setup('cpu'))             # a resumed run comes here again with what it saved
        assert cfg.lr_scheduler == expected
    typed = parse(Config, ['--ema=0', '--lr_scheduler=plateau', '--min_lr=4e-4', '--warmup_iters=0'])
    train_gpt.resolve_defaults(typed, setup('cpu'))
    assert typed.ema == 0
    assert [train_gpt.get_lr(typed, 5, scale) for scale in (1.0, 0.5, 0.25)] == [1e-3, 5e-4, 4e-4]


def test_bad_input_is_one_line_before_any_step(data, tmp_path):
    cases = {
        'no data set': dict(dataset='nowhere'),
        'divisible': dict(n_embd=17),
        'block_size': dict(block_size=10 ** 6),
        'different tokenizers': dict(training_mode='multidataset',
                                     dataset_list=[str(data / 'plays'), str(data / 'bytes')]),
        'equal lengths': dict(training_mode='multicontext',
                              multicontext_datasets=[str(data / 'plays'), str(data / 'bytes')]),
        'GPU': dict(device='cuda'),
        'cannot write|not writable|could not be written': dict(out_dir='/proc/none'),
        'no run of train_gpt': dict(init_from='resume', out_dir=str(tmp_path / 'empty')),
    }
    for message, changes in cases.items():
        with pytest.raises(UserError, match=message) as error:
            main(config(data, **changes))
        assert '\n' not in str(error.value)
    for argv in (['--dataset_sampling_probs', '1', '--training_mode=multidataset', '--dataset_list', 'a',
                  'b'], ['--batch_size=0'],
                 ['--training_mode=multidataset', '--dataset_list', 'a', 'b', '--dataset_sampling_probs',
                  '-1', '2']):
        with pytest.raises(SystemExit) as stop:
            parse(Config, argv)
        assert stop.value.code == 2
    main(config(data))
    with pytest.raises(UserError, match='architecture'):
        main(resume('out', n_embd=32))


def test_gradients_that_are_not_finite_skip_and_then_stop(data):
    with pytest.raises(UserError, match='in a row'):
        main(config(data, learning_rate=1e30, optimizer='sgd', max_iters=50, eval_interval=50, grad_clip=0.0))
    assert not [name for name in os.listdir('out') if name.startswith('checkpoint')]


# ---- settings that depend on each other

def test_a_list_of_data_sets_chooses_its_mode(data):
    cfg = parse(Config, ['--dataset_list', 'a', 'b'])
    assert cfg.training_mode == 'multidataset' and parse(Config, []).training_mode == 'single'
    assert parse(Config, ['--multicontext_datasets=a,b']).training_mode == 'multicontext'
    lists = dict(dataset_list=['a', 'b'], multicontext_datasets=['a', 'b'])
    for changes in (dict(training_mode='single', dataset_list=['a', 'b']), lists,
                    dict(training_mode='multicontext', **lists)):
        with pytest.raises(UserError, match='leave one of them out'):
            config(data, **changes)


def test_a_named_model_is_where_training_begins(data, capsys):
    assert parse(Config, ['--gpt2_type=gpt2-xl']).init_from == 'gpt2'
    cfg = parse(Config, ['--model', 'some/model'])
    assert (cfg.init_from, cfg.gpt2_type) == ('gpt2', 'some/model')
    assert parse(Config, ['--init_from=resume', '--gpt2_type=gpt2-xl']).init_from == 'resume'
    with pytest.raises(UserError, match='init_from=scratch: leave one of them out'):
        config(data, init_from='scratch', gpt2_type='gpt2-xl')
    train_gpt.resolve_defaults(cfg, setup('cpu'))
    assert 'init_from=gpt2: training begins with the weights of some/model' in capsys.readouterr().out


def test_rates_that_would_rise(data, capsys, tmp_path):
    run = setup('cpu')
    cfg = config(data, learning_rate=3e-5, lr_scheduler='cosine')
    train_gpt.resolve_defaults(cfg, run)
    assert cfg.min_lr == pytest.approx(3e-6) and 'min_lr=3e-06, a tenth of' in capsys.readouterr().out
    cfg = config(data, learning_rate=3e-5)                          # constant: nothing reads min_lr
    train_gpt.resolve_defaults(cfg, run)
    assert cfg.min_lr == 1e-4 and 'min_lr' not in capsys.readouterr().out
    with pytest.raises(UserError, match='min_lr=0.01 is above learning_rate=0.001'):
        config(data, min_lr=0.01, decay_lr=True)
    recipe = tmp_path / 'recipe.py'
    recipe.write_text('learning_rate = 1e-3\nmin_lr = 1e-4\ndecay_lr = True\n')
    cfg = parse(Config, [str(recipe), '--learning_rate=5e-5'])      # a recipe's min_lr follows the rate of a flag
    train_gpt.resolve_defaults(cfg, run)
    assert cfg.min_lr == pytest.approx(5e-6) and 'min_lr=5e-06' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(Config, [str(recipe), '--learning_rate=5e-5', '--min_lr=1e-4'])


def test_a_warm_up_that_would_not_end_is_clamped(data, capsys):
    cfg = config(data, warmup_iters=100, max_iters=50)
    train_gpt.resolve_defaults(cfg, setup('cpu'))
    assert cfg.warmup_iters == 5 and 'clamped to 5' in capsys.readouterr().out


@pytest.mark.parametrize('wandb, says', [
    (None, 'wandb is not installed'),
    (types.ModuleType('wandb'), 'wandb is not installed'),          # a folder that its runs left behind
    (types.SimpleNamespace(init=None, login=lambda: 1 / 0), 'wandb: division by zero'),
])
def test_wandb_is_asked_before_anything_is_loaded(data, monkeypatch, wandb, says):
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setattr(train_gpt, 'open_data', None)               # not reached
    with pytest.raises(UserError, match=says):
        main(config(data, wandb_enabled=True))
    assert not os.path.exists('out')
    with pytest.raises(TypeError, match='NoneType'):                # an evaluation logs nothing: it comes to open_data
        main(config(data, wandb_enabled=True, eval_only=True))


def test_wandb_that_does_not_begin_is_one_line(data, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **_: 1 / 0))
    with pytest.raises(UserError, match='wandb: division by zero'):
        main(config(data, wandb_enabled=True))
