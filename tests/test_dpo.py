"""train_dpo.py: its losses by hand, its gradients by autograd through transformers,
and short real runs that survive a kill."""
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import train_dpo
from conftest import ROOT, ranks
from configurator import UserError, as_dict, check_settings, parse
from data.batches import pack
from data.preferences import TokenPair
from data.splits import legacy_dpo
from chaos import survive
from nanoforge.flags import Source
from nanoforge.log import Log
from nanoforge.lora import adapters_off
from model import load_model
from nanoforge.run import Run, setup
from train_dpo import LOSSES, Config, answer_lengths, answer_logp, dpo_loss, main, open_reference, pair_loss, read_cache

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
    check_settings(cfg)
    return cfg


def lines(out='models/dpo'):
    with open(os.path.join(out, 'log.jsonl')) as f:
        return [json.loads(line) for line in f]


# ---- losses ------------------------------------------------------------------------------------------------

# policy -10 and -12, reference -11 and -11: log-ratios 1 and -1, 2 apart; by hand
@pytest.mark.parametrize('loss_type, settings, expected', [
    ('sigmoid', dict(beta=0.5), 0.31326169),                                    # log(1 + 1/e)
    ('sigmoid', dict(beta=0.5, label_smoothing=0.1), 0.41326169),       # 0.9 log(1 + 1/e) + 0.1 log(1 + e)
    ('robust', dict(beta=0.5, label_smoothing=0.1), 0.18826169),   # (0.9 log(1 + 1/e) - 0.1 log(1 + e)) / 0.8
    ('hinge', dict(beta=0.25), 0.5),
    ('hinge', dict(beta=1.0), 0.0),
    ('ipo', dict(beta=0.5, chosen_length=2, rejected_length=4), 0.0625),        # (1/2 + 1/4 - 1)^2
    ('sigmoid_norm', dict(beta=0.5, chosen_length=2, rejected_length=4), 0.52312326),   # log(1 + exp(-0.375))
    # log(1 + exp(0.2 - (3 - 2) / 2))
    ('simpo', dict(beta=0.5, gamma=0.2, chosen_length=5, rejected_length=4), 0.55435524),
    # 2 + log(1 + odds(e^-3) / odds(e^-2)) / 2
    ('orpo', dict(beta=0.5, chosen_length=5, rejected_length=4), 2.14437539),
    ('apo_zero', dict(beta=0.5), 0.75508134),                                   # 2 / (1 + e^0.5)
])
def test_losses_by_hand(loss_type, settings, expected):
    numbers = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-10, -12)]
    reference = [None, None] if LOSSES[loss_type].reference_free else [torch.tensor([-11.0], dtype=torch.float64)] * 2
    loss, chosen, rejected = dpo_loss(*numbers, *reference, loss_type=loss_type, **settings)
    assert loss.item() == pytest.approx(expected, abs=1e-8)
    ratios = [1, -1] if not LOSSES[loss_type].reference_free else [-10, -12]
    if LOSSES[loss_type].per_token:
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


@pytest.mark.parametrize('loss_type', LOSSES)
def test_losses_and_their_gradients_against_the_equations(loss_type):
    rng, step = np.random.default_rng(1), 1e-5
    smoothing = 0.2 if LOSSES[loss_type].smoothed else 0.0
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
    loss, columns = pair_loss(cfg, logps, logps.clone(), torch.tensor([2, 40, 3, 1]))
    assert loss.tolist() == [torch.tensor(2.0).log().item()] * 2
    assert dict(zip(train_dpo.METRICS, columns.mean(0).tolist()))['rewards/accuracies'] == 0.5


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


def test_a_loss_type_without_a_branch_is_an_error(monkeypatch):
    monkeypatch.setitem(LOSSES, 'new', train_dpo.Loss())
    with pytest.raises(NotImplementedError, match='no branch'):
        dpo_loss(*[torch.zeros(1)] * 4, loss_type='new')


# ---- log-probabilities, gradients, steps -------------------------------------------------------------------

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
@pytest.mark.parametrize('loss_type', LOSSES)
def test_gradients_equal_autograd_through_transformers(llama, pairs, loss_type, one_row):
    theirs, folder = llama
    theirs = theirs.double()
    ours = load_model(folder, dtype=torch.float64)[0].train()
    cfg = config(loss_type=loss_type, rpo_alpha=0.3, beta=0.3)
    batch = pack(groups(pairs), torch.device('cpu'), share=True, one_row=one_row)
    assert batch.idx.size(0) == 1 if one_row else batch.idx.size(0) > 1
    lengths = torch.tensor([len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)])
    assert answer_lengths(batch).tolist() == lengths.tolist()
    reference = torch.linspace(-30, -20, 16, dtype=torch.float64)
    logps = answer_logp(ours, batch)
    pair_loss(cfg, logps, reference, answer_lengths(batch))[0].sum().backward()
    expected = their_logps(theirs, pairs)
    torch.testing.assert_close(logps, expected, rtol=1e-7, atol=1e-7)
    chosen, rejected = expected.view(-1, 2).unbind(1)
    loss, *_ = dpo_loss(chosen, rejected, *reference.view(-1, 2).unbind(1), 0.3, loss_type, chosen_length=lengths[0::2],
                        rejected_length=lengths[1::2])
    grads = torch.autograd.grad((loss - 0.3 * chosen / lengths[0::2]).sum(), list(theirs.parameters()))
    named = dict(ours.named_parameters())
    for (name, _), grad in zip(theirs.named_parameters(), grads):
        torch.testing.assert_close(named[name.removeprefix('model.')].grad, grad, rtol=1e-6, atol=1e-6 * grad.abs().max().item(), msg=name)


def test_a_step_does_not_depend_on_how_it_is_cut(llama, pairs, monkeypatch):
    """One micro-batch of 8 pairs, 8 of one, 2 ranks of 4 with 2 micro-batches each:
    main's own gradients and means, in float64."""
    model, tokenizer = load_model(llama[1], dtype=torch.float64)
    constant = lambda batch: torch.full((len(batch.targets),), -20.0, dtype=torch.float64)
    constant.model = None
    opened, seen = Run.open, {}

    def step(run, optimizer, lr, max_norm):
        seen['grads'] = torch.cat(optimizer.grads).clone()
        optimizer.zero_grad()
        return 1.0

    def train(log, step, tokens, **values):
        seen.update(values, pairs=tokens)
        raise InterruptedError

    monkeypatch.setattr(train_dpo, 'build_policy', lambda cfg, run: (model.train(), tokenizer))
    monkeypatch.setattr(train_dpo, 'load_pairs', lambda *given: (pairs, [list(range(8))], []))
    monkeypatch.setattr(train_dpo, 'open_reference', lambda *given: constant)
    monkeypatch.setattr(Run, 'step', step)
    monkeypatch.setattr(Run, 'sum', lambda run, tensor: tensor)         # summed below
    monkeypatch.setattr(Run, 'max', lambda run, value: value)
    monkeypatch.setattr(Log, 'train', train)
    results = []
    for B, accumulation, ranks in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        total = {}
        for rank in range(ranks):
            def open_as_rank(*given, **more):
                run = opened(*given, **more)
                run.rank, run.world_size = rank, ranks
                return run
            monkeypatch.setattr(Run, 'open', open_as_rank)
            cfg = config(per_device_train_batch_size=B, gradient_accumulation_steps=accumulation, optimizer='sgd', max_steps=1)
            with pytest.raises(InterruptedError):
                main(cfg)
            for key in ('grads', *train_dpo.METRICS):
                total[key] = total.get(key, 0) + seen[key]
        assert seen['pairs'] == sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
        results.append(total)
    assert results[0]['grads'].abs().max() > 1e-4
    for total in results[1:]:
        torch.testing.assert_close(total.pop('grads'), results[0]['grads'], rtol=1e-9, atol=1e-12)
        for key in total:
            torch.testing.assert_close(total[key], results[0][key], rtol=1e-5, atol=1e-6)


def test_two_ranks_give_the_losses_of_one(llama, preferences):
    settings = {'matmul': 'float32', 'max_steps': 4, 'reference': 'cache', 'base_model_name': llama[1]}
    main(config(datasets=[Source(name=preferences)], output_dir='out1', reference_cache='cache1', per_device_train_batch_size=4, **settings))
    flags = [f'--{k}={v}' for k, v in {**SMALL, **settings, 'output_dir': 'out2', 'reference_cache': 'cache2', 'batch_size': 2}.items()]
    ranks(2, lambda rank: main(parse(Config, [*flags, f'data.datasets[0].name={preferences}'])))
    one, two = lines('out1'), lines('out2')
    for key in ('loss', 'eval_loss', 'grad_norm', 'rewards/margins', 'logps/chosen', 'num_tokens'):
        a, b = ([line[key] for line in log if key in line] for log in (one, two))
        assert len(a) > 1 and a == pytest.approx(b, abs=2e-5), key
    assert not any('kl' in line for line in one)        # of the reference nothing but the cache is held


# ---- references --------------------------------------------------------------------------------------------

def test_cached_log_probabilities_are_those_of_the_reference_and_are_reused(llama, pairs, monkeypatch, capsys):
    run, cfg = setup('cpu', matmul='float32'), config(base_model_name=llama[1])
    model = load_model(llama[1])[0].train()
    expected = their_logps(llama[0].float(), pairs).detach().view(-1, 2)

    def read(*numbers):
        fresh = [replace(pairs[i]) for i in numbers]
        read_cache(cfg, open_reference(cfg, 'cache', model, run), fresh, run)
        return torch.tensor([pair.ref_logp for pair in fresh])

    first = read(0, 1, 2, 5)
    torch.testing.assert_close(first, expected[[0, 1, 2, 5]], rtol=1e-5, atol=1e-5)
    counted, passes = answer_logp, []
    monkeypatch.setattr(train_dpo, 'answer_logp', lambda *given: passes.append(len(given[1].targets)) or counted(*given))
    again = read(*range(8))
    assert sum(passes) == 2 * 4 and torch.equal(again[[0, 1, 2, 5]], first) and model.training
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    assert '4 of 8 pairs are in' in capsys.readouterr().out
    with torch.no_grad():
        model.norm.weight[0] += 1                                               # another model: another file
    read(*range(8))
    assert sum(passes) == 2 * 4 + 2 * 8 and len(os.listdir(cfg.reference_cache)) == 2
    for name in os.listdir(cfg.reference_cache):
        os.truncate(os.path.join(cfg.reference_cache, name), 100)
    with pytest.raises(UserError, match='remove it'):
        read(*range(8))


def test_references_under_lora(llama, pairs, preferences):
    """Adapters off where training begins at the base; a frozen copy where it goes on from an adapter,
    which stays what it was."""
    data = [Source(name=preferences)]
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
    batch = pack(groups(pairs), run.device, share=True)
    copy = open_reference(config(base_model_name='first', use_lora=True), 'copy', model, run)
    assert copy.model is not model and torch.equal(copy(batch), answer_logp(model, batch))
    with adapters_off(model):
        assert not torch.equal(copy(batch), answer_logp(model, batch))


@pytest.mark.pictures
@pytest.mark.parametrize('mode', ('full', 'lora', 'qlora', '8bit'))
def test_modes_learn_and_leave_the_base_alone(preferences, mode):
    settings = {'full': dict(gradient_checkpointing=True), 'lora': dict(use_lora=True, gradient_checkpointing=True, learning_rate=3e-3),
                'qlora': dict(use_lora=True, load_in_4bit=True, learning_rate=3e-3),
                '8bit': dict(use_lora=True, load_in_8bit=True, learning_rate=3e-3)}[mode]
    metrics = main(config(datasets=[Source(name=preferences)], max_steps=8, eval_steps=8, **settings))
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
    settings = dict(datasets=[Source(name=preferences)], base_model_name=llama[1], use_lora=True, lora_dropout=0.5, max_steps=3,
                    learning_rate=0.05, warmup_steps=0)
    main(config(output_dir='off', **settings))
    main(config(output_dir='on', disable_dropout=False, **settings))
    off, on = ([line['loss'] for line in lines(out) if 'loss' in line] for out in ('off', 'on'))
    # B begins at zero: dropout shows at step 2
    assert off[0] == on[0] == pytest.approx(math.log(2)) and off[1] != on[1]


# ---- runs --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('more', (['--use_lora', '--disable_dropout=false'], ['--reference=cache', '--dataloader_num_workers=2']))
def test_kills_change_nothing(llama, preferences, more):
    """SIGKILL at random moments, resumed each time:
    weights, optimizer state and log are those of a run left alone."""
    settings = {**SMALL, 'base_model_name': llama[1], 'max_steps': 16, 'save_steps': 2, 'eval_steps': 8, 'logging_steps': 5,
                'eval_samples': 0, 'learning_rate': 0.01}
    flags = [*(f'--{k}={v}' for k, v in settings.items()), f'data.datasets[0].name={preferences}', *more]
    report = survive('train_dpo', flags, kills=3)
    assert report['kills'] == 3 and report['differences'] == []
    assert len(lines('whole')) > 5


def test_sigterm_saves_and_says_how_to_go_on(llama, preferences):
    flags = [f'--{k}={v}' for k, v in {**SMALL, 'base_model_name': llama[1], 'max_steps': 100000, 'save_steps': 50000, 'eval_steps': 50000,
                                       'output_dir': 'out'}.items()] + [f'data.datasets[0].name={preferences}']
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train_dpo.py'), *flags], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step') and ' loss ' in line:
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

    def load(name, **settings):
        cfg = config(datasets=[Source(name=name)], **settings)
        pairs, (train,), held_out = train_dpo.load_pairs(cfg, cfg.datasets, tokenizer, 128, run)
        prompts = {tuple(pair.prompt) for pair in held_out}
        assert held_out and not {tuple(pairs[i].prompt) for i in train} & prompts
        assert len(train) + len(held_out) == (60 if name == 'plain.jsonl' else 57) or 'max_eval_pairs' in settings
        return pairs, prompts, held_out

    pairs, prompts, _ = load('plain.jsonl', eval_fraction=0.2)
    _, (_, legacy, _) = load('marked.jsonl'), load('plain.jsonl', eval_fraction=0.2, split_rule='legacy')
    assert '3 training pairs are left out' in capsys.readouterr().out
    assert legacy == {tuple(pair.prompt) for pair in pairs if legacy_dpo(pair.prompt, 0.2)} != prompts
    few = load('plain.jsonl', eval_fraction=0.2, max_eval_pairs=3)[2]
    assert len({pair.where for pair in few}) == 3 and {tuple(pair.prompt) for pair in few} <= prompts


def test_check_shows_the_data_and_trains_nothing(preferences, capsys):
    result = main(config(datasets=[Source(name=preferences)], check_data=True))
    said = capsys.readouterr().out
    assert result == {'pairs': 32, 'held_out': 8} and not os.path.exists('models')
    assert 'How many are 1 and 2?' in said and 'the longer one in 0% of the pairs: a policy can win by length alone' in said
    assert '\033' not in said and '   instead of: ' in said         # colours are for a terminal


# ---- settings ----------------------------------------------------------------------------------------------

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
    (['--deepspeed_config=ds.json'], ['num_gpus', 'gradient_checkpointing']),
    (['--lr_scheduler=plateau'], ['plateau', 'linear']),
    (['--max_length=64', '--max_prompt_length=64'], ['no room for an answer']),
    (['--max_steps=0'], ['max_steps', '-1']),
    (['--eval_fraction=1'], ['eval_fraction', 'below 1']),
    (['--algorithm=sft'], ['train_sft.py']),
    (['--apply_chat_template=false', '--system_prompt=x'], ['system_prompt', 'apply_chat_template']),
    (['data.datasets[0].name=facts', 'data.datasets[0].weight=0'], ['data.datasets[0]', 'weight above 0']),
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
    # other ways to say what stands there (data.datasets, wandb.enabled), what only an earlier run needs, and forms of LoRA
    others = {'dataset_path', 'prompt_column', 'answer_column', 'chosen_column', 'rejected_column', 'report_to', 'split_rule',
              'use_rslora', 'use_dora', 'checkpoint_every'}
    for section in ('model', 'data', 'training', 'wandb'):
        for name in as_dict(cfg)[section]:
            wanted = all(use for prefix, use in concerned.items() if name.startswith(prefix))
            name = {'lr_scheduler_type': 'lr_scheduler'}.get(name, name)
            assert f'  {name}: ' in text or name in ('datasets', 'resume') or name in others or not wanted, name


def test_fp16_on_the_command_line_beats_a_recipe():
    path = os.path.join(ROOT, 'recipes', 'training', 'dpo', 'llama3_3B_lora.yaml')
    cfg = parse(Config, ['--recipe', path, '--fp16'])
    assert cfg.fp16 and not cfg.bf16
