"""train_dpo.py: its losses by hand, its gradients by autograd through transformers, and short real runs that survive a kill."""
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import train_dpo
from conftest import ROOT
from configurator import UserError, as_dict, parse
from data.preferences import TokenPair
from kills import run_and_kill
from nanoforge.lora import adapters_off
from model import load_model
from nanoforge.run import setup
from train_dpo import LOSS_TYPES, PER_TOKEN, REFERENCE_FREE, Config, Feed, Reference, answer_logps, dpo_loss, main, make_batch

SMALL = dict(logging_steps=1, save_steps=3, eval_steps=3, eval_samples=4, max_new_tokens=8, per_device_train_batch_size=4, warmup_steps=1,
             rpo_alpha=0.0, tensorboard=False, device='cpu')


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)     # models/ and logs/ go there


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    """A random Llama of two layers with tiny's tokenizer beside it: (transformers' model, its directory)."""
    folder = tmp_path_factory.mktemp('llama')
    load_model('tiny')[1].save(folder)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=False))
    theirs.save_pretrained(folder)
    return theirs.eval(), str(folder)


@pytest.fixture(scope='module')
def pairs():
    """Token pairs of many lengths, single tokens among them."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(10, 1024, n).tolist()
    return [TokenPair(ids(p), ids(c), ids(r), f'pair {i}') for i, (p, c, r) in enumerate(
        [(9, 5, 7), (1, 1, 1), (20, 1, 12), (3, 30, 1), (12, 8, 8), (5, 2, 3), (17, 6, 4), (8, 9, 2)])]


@pytest.fixture(scope='module')
def preferences(tmp_path_factory):
    """A file of forty pairs, eight of them held out."""
    path = tmp_path_factory.mktemp('data') / 'pairs.jsonl'
    rows = [{'prompt': f'How many are {n} and {n + 1}?', 'chosen': f'{2 * n + 1}.', 'rejected': 'That I do not know.',
             'metadata': 'train' if n % 5 else 'eval'} for n in range(40)]
    path.write_text('\n'.join(map(json.dumps, rows)))
    return str(path)


def config(**changes):
    cfg = Config(**{**SMALL, **changes})
    cfg.typed = frozenset(changes)
    cfg.check()
    return cfg


def lines(out='models/dpo'):
    with open(os.path.join(out, 'log.jsonl')) as f:
        return [json.loads(line) for line in f]


# ---- losses -----------------------------------------------------------------------------------------------------------------

# policy -10 and -12, reference -11 and -11: log-ratios 1 and -1, 2 apart; by hand
@pytest.mark.parametrize('loss_type, settings, expected', [
    ('sigmoid', dict(beta=0.5), 0.31326169),                                    # log(1 + 1/e)
    ('sigmoid', dict(beta=0.5, label_smoothing=0.1), 0.41326169),               # 0.9 log(1 + 1/e) + 0.1 log(1 + e)
    ('robust', dict(beta=0.5, label_smoothing=0.1), 0.18826169),                # (0.9 log(1 + 1/e) - 0.1 log(1 + e)) / 0.8
    ('hinge', dict(beta=0.25), 0.5),
    ('hinge', dict(beta=1.0), 0.0),
    ('ipo', dict(beta=0.5, chosen_length=2, rejected_length=4), 0.0625),        # (1/2 + 1/4 - 1)^2
    ('sigmoid_norm', dict(beta=0.5, chosen_length=2, rejected_length=4), 0.52312326),       # log(1 + exp(-0.375))
    ('simpo', dict(beta=0.5, gamma=0.2, chosen_length=5, rejected_length=4), 0.55435524),   # log(1 + exp(0.2 - (3 - 2) / 2))
    ('orpo', dict(beta=0.5, chosen_length=5, rejected_length=4), 2.14437539),   # 2 + log(1 + odds(e^-3) / odds(e^-2)) / 2
    ('apo_zero', dict(beta=0.5), 0.75508134),                                   # 2 / (1 + e^0.5)
])
def test_losses_by_hand(loss_type, settings, expected):
    numbers = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-10, -12)]
    reference = [None, None] if loss_type in REFERENCE_FREE else [torch.tensor([-11.0], dtype=torch.float64)] * 2
    loss, chosen, rejected = dpo_loss(*numbers, *reference, loss_type=loss_type, **settings)
    assert loss.item() == pytest.approx(expected, abs=1e-8)
    ratios = [1, -1] if loss_type not in REFERENCE_FREE else [-10, -12]
    if loss_type in PER_TOKEN:
        ratios = [ratios[0] / settings['chosen_length'], ratios[1] / settings['rejected_length']]
    assert (chosen.item(), rejected.item()) == pytest.approx([settings['beta'] * ratio for ratio in ratios])
    assert loss.requires_grad and not chosen.requires_grad and not rejected.requires_grad


def formula(loss_type, pw, pl, rw, rl, nw, nl, beta, e, gamma):
    """The published equations again, number by number, with probabilities where dpo_loss has logarithms."""
    sigma = lambda x: 1 / (1 + math.exp(-x))
    if loss_type in ('sigmoid', 'robust', 'hinge'):
        won = sigma(beta * (math.log(math.exp(pw - rw)) - math.log(math.exp(pl - rl))))
        return {'sigmoid': (e - 1) * math.log(won) - e * math.log(1 - won),
                'robust': ((e - 1) * math.log(won) + e * math.log(1 - won)) / (1 - 2 * e),
                'hinge': max(0, 1 - math.log(won / (1 - won)))}[loss_type]
    if loss_type == 'ipo':
        return ((pw - rw) / nw - (pl - rl) / nl - 0.5 / beta) ** 2
    if loss_type in ('sigmoid_norm', 'simpo'):
        better = (pw - rw) / nw - (pl - rl) / nl if loss_type == 'sigmoid_norm' else pw / nw - pl / nl
        won = sigma(beta * better - gamma)
        return (e - 1) * math.log(won) - e * math.log(1 - won)
    if loss_type == 'orpo':
        odds = [math.exp(p / n) / (1 - math.exp(p / n)) for p, n in ((pw, nw), (pl, nl))]
        return -pw / nw - beta * math.log(sigma(math.log(odds[0] / odds[1])))
    return 1 - sigma(beta * (pw - rw)) + sigma(beta * (pl - rl))


@pytest.mark.parametrize('loss_type', LOSS_TYPES)
def test_losses_and_their_gradients_against_the_equations(loss_type):
    rng, step = np.random.default_rng(1), 1e-5
    smoothing = 0.2 if loss_type in train_dpo.SMOOTHED else 0.0
    gamma = 0.3 if loss_type == 'simpo' else 0.0
    for beta in (0.1, 0.7):
        values, lengths = -5 * rng.random((4, 6)), rng.integers(2, 9, (2, 6))
        policy = [torch.tensor(v, requires_grad=True) for v in values[:2]]
        loss, *_ = dpo_loss(*policy, *map(torch.tensor, values[2:]), beta, loss_type, smoothing, gamma, *map(torch.tensor, lengths))
        grads = torch.autograd.grad(loss.sum(), policy, allow_unused=True)
        expected = lambda i, change: formula(loss_type, *(values[:, i] + change), *lengths[:, i], beta, smoothing, gamma)
        for i in range(6):
            assert loss[i].item() == pytest.approx(expected(i, np.zeros(4)), abs=1e-6)
            for side in range(2):
                bump = step * np.eye(4)[side]
                slope = (expected(i, bump) - expected(i, -bump)) / (2 * step)
                assert grads[side][i].item() == pytest.approx(slope, abs=1e-6)


def test_policy_equal_to_reference():
    """The sigmoid loss is log 2, to the last bit, and a tie counts as half a win."""
    logps = torch.tensor([-3.7, -90.1, -5.5, -0.3])
    cfg = config()
    loss, columns = train_dpo.measure(cfg, logps, logps.clone(), torch.tensor([2, 40, 3, 1]))
    assert loss.tolist() == [torch.tensor(2.0).log().item()] * 2
    assert dict(zip(train_dpo.KEYS, columns.mean(0).tolist()))['rewards/accuracies'] == 0.5


def test_odds_of_a_certain_answer_are_finite():
    loss, *_ = dpo_loss(torch.zeros(1, requires_grad=True), torch.tensor([-40.0]), None, None, 0.1, 'orpo', chosen_length=1,
                        rejected_length=1)
    assert loss.isfinite()


def test_what_a_loss_needs_is_asked_for():
    one = torch.zeros(1)
    with pytest.raises(UserError, match='give chosen_length'):
        dpo_loss(one, one, one, one, loss_type='ipo')
    with pytest.raises(UserError, match='none of sigmoid'):
        dpo_loss(one, one, one, one, loss_type='dpo')


# ---- log-probabilities, gradients, steps ------------------------------------------------------------------------------------

def their_logps(model, pairs):
    """(S,) by transformers, each answer behind its own copy of the prompt."""
    found = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + answer])
            log_p = model(ids).logits[0].log_softmax(-1)
            found.append(sum(log_p[len(pair.prompt) - 1 + i, token] for i, token in enumerate(answer)))
    return torch.stack(found)


def groups(pairs):
    return [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]


@pytest.mark.parametrize('one_row', (True, False))
@pytest.mark.parametrize('loss_type', LOSS_TYPES)
def test_gradients_equal_autograd_through_transformers(llama, pairs, loss_type, one_row):
    theirs, folder = llama
    theirs = theirs.double()
    ours = load_model(folder, dtype=torch.float64)[0].train()
    cfg = config(loss_type=loss_type, rpo_alpha=0.3, beta=0.3)
    batch = make_batch(groups(pairs), torch.device('cpu'), one_row=one_row)
    assert batch.idx.size(0) == 1 if one_row else batch.idx.size(0) > 1
    lengths = torch.tensor([len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)])
    assert batch.lengths.tolist() == lengths.tolist() and len(batch.targets) == lengths.sum()
    reference = torch.linspace(-30, -20, 16, dtype=torch.float64)
    logps = answer_logps(ours, batch)
    train_dpo.measure(cfg, logps, reference, batch.lengths)[0].sum().backward()
    expected = their_logps(theirs, pairs)
    torch.testing.assert_close(logps, expected, rtol=1e-7, atol=1e-7)
    chosen, rejected = expected.view(-1, 2).unbind(1)
    loss, *_ = dpo_loss(chosen, rejected, *reference.view(-1, 2).unbind(1), 0.3, loss_type, chosen_length=lengths[0::2],
                        rejected_length=lengths[1::2])
    grads = torch.autograd.grad((loss - 0.3 * chosen / lengths[0::2]).sum(), list(theirs.parameters()))
    named = dict(ours.named_parameters())
    for (name, _), grad in zip(theirs.named_parameters(), grads):
        torch.testing.assert_close(named[name.removeprefix('model.')].grad, grad, rtol=1e-6, atol=1e-6 * grad.abs().max().item(), msg=name)


def test_a_step_does_not_depend_on_how_it_is_cut(llama, pairs):
    """One micro-batch of 8 pairs, 8 of one, 2 ranks of 4 with 2 micro-batches each."""
    model = load_model(llama[1], dtype=torch.float64)[0].train()
    optimizer = train_dpo.make_optimizer('sgd', model, 0.0)
    reference = lambda batch, indices: torch.full((2 * len(indices),), -20.0, dtype=torch.float64)
    found = []
    for B, ranks in ((8, 1), (1, 1), (2, 2)):
        grads, sums = 0, 0
        for rank in range(ranks):
            run = setup('cpu')
            run.rank, run.world_size = rank, ranks
            run.sum = lambda tensor: tensor             # summed below
            batches = list(train_dpo.micro_batches(config(per_device_train_batch_size=B), pairs, list(range(8)), run))
            assert sum(len(indices) for _, indices in batches) == 8 // ranks
            means, *_ = train_dpo.train_step(config(max_grad_norm=0.0), model, reference, optimizer, batches, 8,
                                             train_dpo.LossScale(torch.float32), 0, run)
            grads, sums = grads + torch.cat(optimizer.grads), sums + means
        found.append((grads, sums))
    for grads, sums in found[1:]:
        torch.testing.assert_close(grads, found[0][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sums, found[0][1], rtol=1e-5, atol=1e-6)


def test_two_ranks_give_the_losses_of_one(llama, preferences):
    settings = {'matmul': 'float32', 'max_steps': 4, 'reference': 'cache', 'base_model_name': llama[1]}
    main(config(datasets=[train_dpo.Source(name=preferences)], output_dir='out1', reference_cache='cache1', per_device_train_batch_size=4, **settings))
    flags = [f'--{k}={v}' for k, v in {**SMALL, **settings, 'output_dir': 'out2', 'reference_cache': 'cache2', 'batch_size': 2}.items()]
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'train_dpo.py'), *flags, f'data.datasets[0].name={preferences}', '--num_gpus=2'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = lines('out1'), lines('out2')
    for key in ('loss', 'eval_loss', 'grad_norm', 'rewards/margins', 'logps/chosen', 'num_tokens'):
        a, b = ([line[key] for line in log if key in line] for log in (one, two))
        assert len(a) > 1 and a == pytest.approx(b, abs=2e-5), key


def test_order_of_the_pairs():
    """An epoch has each pair of a data set `weight` times, whatever the ranks; what does not fill a step is left out or a short step."""
    cfg = config(datasets=[train_dpo.Source(name='a', weight=2), train_dpo.Source(name='b', weight=0.5)])
    train = [list(range(9)), list(range(9, 17))]
    feed = Feed(cfg, train, 1)
    drawn = [i for step in range(feed.per_epoch) for i in feed.pairs(step)]
    assert feed.per_epoch == 5 and len(drawn) == 20 and max(map(drawn.count, drawn)) == 2
    full = sorted(feed.order(0))
    assert full[:18] == sorted(2 * train[0]) and len(full) == 22 and len(set(full[18:])) == 4
    assert feed.order(0) != feed.order(1) and Feed(cfg, train, 2).order(3) == feed.order(3)
    last = Feed(config(datasets=cfg.datasets, dataloader_drop_last=False), train, 1)
    assert last.per_epoch == 6 and len(last.pairs(5)) == 2
    with pytest.raises(UserError, match='fewer than the 32 of one step'):
        Feed(config(datasets=cfg.datasets, per_device_train_batch_size=32), train, 1)


# ---- references -------------------------------------------------------------------------------------------------------------

def test_cached_log_probabilities_are_those_of_the_reference_and_are_reused(llama, pairs, monkeypatch, capsys):
    run, cfg = setup('cpu', matmul='float32'), config(base_model_name=llama[1])
    model = load_model(llama[1])[0].train()
    expected = their_logps(llama[0].float(), pairs).detach()
    first = Reference(cfg, 'cache', model, True, True, pairs, [0, 1, 2, 5], run)
    batch = make_batch(groups([pairs[5], pairs[2]]), run.device)
    torch.testing.assert_close(first(batch, [5, 2]), expected[[10, 11, 4, 5]], rtol=1e-5, atol=1e-5)
    assert first.model is None                                                          # nothing is held in training
    counted, passes = answer_logps, []
    monkeypatch.setattr(train_dpo, 'answer_logps', lambda *given: passes.append(len(given[1].lengths)) or counted(*given))
    again = Reference(cfg, 'cache', model, True, True, pairs, range(8), run)
    assert sum(passes) == 2 * 4 and torch.equal(again.table[[0, 1, 2, 5]], first.table[[0, 1, 2, 5]])
    assert '4 of 8 pairs are in' in capsys.readouterr().out
    with torch.no_grad():
        model.norm.weight[0] += 1                                                       # another model: another file
    Reference(cfg, 'cache', model, True, True, pairs, range(8), run)
    assert sum(passes) == 2 * 4 + 2 * 8 and len(os.listdir(cfg.reference_cache)) == 2
    for name in os.listdir(cfg.reference_cache):
        os.truncate(os.path.join(cfg.reference_cache, name), 100)
    with pytest.raises(UserError, match='remove it'):
        Reference(cfg, 'cache', model, True, True, pairs, range(8), run)


def test_references_under_lora(llama, pairs, preferences):
    """Adapters off where training begins at the base; a frozen copy where it goes on from an adapter, which stays what it was."""
    data = [train_dpo.Source(name=preferences)]
    settings = dict(datasets=data, use_lora=True, learning_rate=0.01, max_steps=3, matmul='float32')
    main(config(base_model_name=llama[1], output_dir='first', **settings))
    assert lines('first')[0]['run']['reference'] == 'adapters_off'
    with open('first/adapter_config.json') as f:
        assert json.load(f)['base_model_name_or_path'] == llama[1]
    first, before = lines('first')[1], [line for line in lines('first') if 'eval_loss' in line]
    assert first['eval_loss'] == pytest.approx(math.log(2), abs=1e-7) and before[-1]['kl'] != 0
    main(config(base_model_name='first', output_dir='second', **settings))
    assert lines('second')[0]['run']['reference'] == 'copy'
    start = lines('second')[1]
    assert start['eval_loss'] == pytest.approx(math.log(2), abs=1e-7) and start['kl'] == 0
    assert start['eval_logps/chosen'] == pytest.approx(before[-1]['eval_logps/chosen'], abs=1e-4)
    with pytest.raises(UserError, match='is an adapter already'):
        main(config(base_model_name='first', output_dir='third', reference='adapters_off', **settings))
    run = setup('cpu', matmul='float32')
    model = load_model('first')[0]
    batch = make_batch(groups(pairs), run.device)
    copy = Reference(config(base_model_name='first', use_lora=True), 'copy', model, False, True, pairs, [], run)
    assert torch.equal(copy(batch, range(8)), answer_logps(model, batch))
    with adapters_off(model):
        assert not torch.equal(copy(batch, range(8)), answer_logps(model, batch))


@pytest.mark.parametrize('mode', ('full', 'lora', 'qlora', '8bit'))
def test_modes_learn_and_leave_the_base_alone(preferences, mode):
    settings = {'full': dict(gradient_checkpointing=True), 'lora': dict(use_lora=True, gradient_checkpointing=True, learning_rate=3e-3),
                'qlora': dict(use_lora=True, load_in_4bit=True, learning_rate=3e-3),
                '8bit': dict(use_lora=True, load_in_8bit=True, learning_rate=3e-3)}[mode]
    metrics = main(config(datasets=[train_dpo.Source(name=preferences)], max_steps=8, eval_steps=8, **settings))
    assert metrics['eval_rewards/accuracies'] > 0.7 and metrics['eval_loss'] < math.log(2) and metrics['step'] == 8
    log = lines()
    keys = {'loss', 'epoch', 'learning_rate', 'grad_norm', 'num_tokens', 'tokens_per_second', 'rewards/chosen', 'rewards/rejected',
            'rewards/accuracies', 'rewards/margins', 'logps/chosen', 'logps/rejected'}
    assert all(keys <= line.keys() for line in log if 'loss' in line) and sum('loss' in line for line in log) == 8
    assert {'loss.png', 'margins.png', 'run_config.json', 'last', 'best'} <= set(os.listdir('models/dpo'))
    tensors = 'model.safetensors' if mode == 'full' else 'adapter_model.safetensors'
    assert os.path.exists(f'models/dpo/{tensors}') and load_model('models/dpo')[0].config.vocab_size == 1024


def test_dropout_acts_only_where_asked_for(llama, preferences):
    """On the policy, not on the reference: the first loss is not log 2, the first evaluation is."""
    settings = dict(datasets=[train_dpo.Source(name=preferences)], base_model_name=llama[1], use_lora=True, lora_dropout=0.5, max_steps=3,
                    learning_rate=0.05, warmup_steps=0)
    main(config(output_dir='off', **settings))
    main(config(output_dir='on', disable_dropout=False, **settings))
    off, on = ([line['loss'] for line in lines(out) if 'loss' in line] for out in ('off', 'on'))
    assert off[0] == on[0] == pytest.approx(math.log(2)) and off[1] != on[1]            # B begins at zero: dropout shows at step 2


# ---- runs -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('more', (['--use_lora', '--disable_dropout=false'], ['--reference=cache', '--dataloader_num_workers=2']))
def test_kills_change_nothing(llama, preferences, more):
    """SIGKILL at random moments, resumed each time: weights, optimizer state and log are those of a run left alone."""
    settings = {**SMALL, 'base_model_name': llama[1], 'max_steps': 16, 'save_steps': 4, 'eval_steps': 8, 'logging_steps': 5,
                'eval_samples': 0, 'learning_rate': 0.01}
    flags = [*(f'--{k}={v}' for k, v in settings.items()), f'data.datasets[0].name={preferences}', *more]
    done = run_and_kill('train_dpo', flags, steps=(4, 8, 12))
    assert done.returncode == 0 and not done.stderr and done.stdout == '3', done.stderr
    tensors = 'adapter_model.safetensors' if '--use_lora' in more else 'model.safetensors'
    for name in (tensors, 'optimizer.safetensors', 'trainer_state.json'):
        with open(f'whole/last/{name}', 'rb') as a, open(f'killed/last/{name}', 'rb') as b:
            assert a.read() == b.read(), name
    curve = lambda out: [{key: value for key, value in line.items() if key != 'tokens_per_second'} for line in lines(out) if 'step' in line]
    assert curve('whole') == curve('killed')


def test_sigterm_saves_and_says_how_to_go_on(llama, preferences):
    flags = [f'--{k}={v}' for k, v in {**SMALL, 'base_model_name': llama[1], 'max_steps': 100000, 'save_steps': 50000, 'eval_steps': 50000,
                                       'output_dir': 'out'}.items()] + [f'data.datasets[0].name={preferences}']
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train_dpo.py'), *flags], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step') and 'grad_norm' in line:
            process.send_signal(signal.SIGTERM)
            break
    said = process.stdout.read()
    assert process.wait() == 143 and '--resume' in said
    step = json.load(open('out/last/trainer_state.json'))['step']
    cfg = Config(resume=True, output_dir='out', max_steps=step + 2)
    cfg.typed = frozenset({'resume', 'output_dir', 'max_steps'})
    assert main(cfg)['step'] == step + 2
    with pytest.raises(UserError, match='holds no run of train_dpo.py'):
        main(config(resume=True, output_dir='elsewhere'))


def test_held_out_prompts_are_not_trained_on(capsys):
    """Marked rows are held out, else a share by the hash of the prompt; a prompt is never on both sides."""
    rows = [{'prompt': f'{n % 30}?', 'chosen': f'{n}', 'rejected': 'no'} for n in range(60)]
    with open('plain.jsonl', 'w') as f:
        f.write('\n'.join(map(json.dumps, rows)))
    with open('marked.jsonl', 'w') as f:
        f.write('\n'.join(json.dumps({**row, 'metadata': 'eval' if n < 3 else 'train'}) for n, row in enumerate(rows)))
    tokenizer, run = load_model('tiny')[1], setup('cpu')
    for name, settings in (('plain.jsonl', dict(eval_fraction=0.2)), ('marked.jsonl', {})):
        cfg = config(datasets=[train_dpo.Source(name=name)], **settings)
        pairs, (train,), held = train_dpo.load_data(cfg, tokenizer, 128, run)
        assert held and not {tuple(pairs[i].prompt) for i in train} & {tuple(pairs[i].prompt) for i in held}
        assert len(train) + len(held) == (60 if name == 'plain.jsonl' else 57)
    assert '3 training pairs are left out' in capsys.readouterr().out


def test_check_shows_the_data_and_trains_nothing(preferences, capsys):
    result = main(config(datasets=[train_dpo.Source(name=preferences)], check_data=True))
    said = capsys.readouterr().out
    assert result == {'pairs': 32, 'held_out': 8} and not os.path.exists('models')
    assert 'How many are 1 and 2?' in said and 'the longer one in 0% of the pairs: a policy can win by length alone' in said


# ---- settings ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, words', [
    (['--loss_type=dpo'], ['loss_type', 'sigmoid']),
    (['--beta=0'], ['beta', 'above 0']),
    (['--label_smoothing=0.5'], ['label_smoothing', 'below 0.5']),
    (['--label_smoothing=0.1', '--loss_type=ipo'], ['label_smoothing', 'not to ipo']),
    (['--gamma=1'], ['gamma', 'simpo']),
    (['--loss_type=orpo', '--reference=copy'], ['orpo', 'no reference']),
    (['--reference=adapters_off'], ['use_lora']),
    (['--load_in_4bit'], ['use_lora=true']),
    (['--load_in_4bit', '--load_in_8bit', '--use_lora'], ['exclude each other']),
    (['--bf16', '--fp16'], ['exclude each other']),
    (['--deepspeed_config=ds.json'], ['num_gpus', 'reference=cache']),
    (['--max_length=64', '--max_prompt_length=64'], ['no room for an answer']),
    (['--max_steps=0'], ['max_steps', '-1']),
    (['--eval_fraction=1'], ['eval_fraction', 'below 1']),
    (['--algorithm=sft'], ['train_sft.py']),
    (['--apply_chat_template=false', '--system_prompt=x'], ['system_prompt', 'apply_chat_template']),
    (['data.datasets[0].weight=0'], ['weight of facts']),
    (['data.datasets[0].name='], ['needs a name']),
    (['--batch_size=0'], ['per_device_train_batch_size']),
    (['--warmup_steps=-1'], ['warmup_steps']),
])
def test_settings_that_make_no_sense(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, [*flags, '--print_config'])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count('\n') == 1 and all(word in said for word in words), said


@pytest.mark.parametrize('mode, rate', [('lora', 1e-4), ('full', 1e-5), ('qlora', 2e-4)])
def test_recipes(mode, rate):
    """Every setting with a documented path is in each recipe that it concerns, and explained on its line."""
    path = os.path.join(ROOT, 'recipes', 'training', 'dpo', f'llama3_3B_{mode}.yaml')
    cfg = parse(Config, ['--recipe', path])
    assert cfg.learning_rate == rate and cfg.use_lora == (mode != 'full') and cfg.load_in_4bit == (mode == 'qlora')
    assert cfg.reference == ('cache' if mode == 'full' else 'auto') and cfg.algorithm == 'dpo'
    assert [source.name for source in cfg.datasets] == ['Anthropic/hh-rlhf', 'allenai/coconot']
    with open(path) as f:
        text = f.read()
    for line in text.splitlines():
        assert not re.match(r' +(- )?\w+:', line) or re.search(r'\S  # \S', line), line
    concerned = {'lora_': mode != 'full', 'bnb_': mode == 'qlora'}
    for section in ('model', 'data', 'training', 'wandb'):
        for name in as_dict(cfg)[section]:
            wanted = all(use for prefix, use in concerned.items() if name.startswith(prefix))
            assert (f'  {name}: ' in text or name in ('datasets', 'resume')) == wanted or not wanted, name


def test_fp16_on_the_command_line_beats_a_recipe():
    path = os.path.join(ROOT, 'recipes', 'training', 'dpo', 'llama3_3B_lora.yaml')
    cfg = parse(Config, ['--recipe', path, '--fp16'])
    assert cfg.fp16 and not cfg.bf16
