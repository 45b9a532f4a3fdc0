"""algorithm=distill of train_rl.py: its two losses by hand, what teaches itself teaches nothing, a lesson learned."""
import contextlib
import json
import os
import shutil
import types

import pytest
import torch

import data.problems
import train_rl
from configurator import UserError, check_settings
from conftest import ROOT
from data.batches import pack
from data.chat import prompt_ids
from data.rewards import Scorer
from data.tasks import arithmetic
from model import GPT, load_model, save_model
from nanoforge import distill
from nanoforge.hf import FAMILIES, GPTConfig
from nanoforge.run import setup
from test_rl import TINY, lines
from train_rl import Config, MicroBatch, State, advantages_by_teacher, main, policy_loss

DISTILL = {**TINY, 'algorithm': 'distill', 'teacher_model_name': 'tiny', 'rewards': ['task'], 'max_steps': 2, 'eval_steps': 0}


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_rl, 'show', lambda *arguments: None)      # pictures cost more than these runs


def config(out='out', **changes):
    changes = {**DISTILL, 'output_dir': out, **changes}
    cfg = Config(**changes)
    cfg.typed = frozenset(changes)
    check_settings(cfg)
    return cfg


def small_gpt(seed, vocab_size=11):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=8, n_inner=16)
    return GPT(GPTConfig(arch='llama', **FAMILIES['llama'] | sizes)).init_weights(0.3).double()


def test_the_update_by_hand():
    """Two rows, one of one token: the gradient is that of the mean over tokens of -(log p_teacher - log p) log p."""
    student, teacher = small_gpt(0), small_gpt(1)
    packed = pack([([1, 2], [[3, 4, 5]]), ([6], [[7]])], torch.device('cpu'))
    mask = packed.targets >= 0
    logp = student.token_stats(packed.hidden_states(student), packed.targets)['logp']
    wanted = teacher.token_stats(packed.hidden_states(teacher), packed.targets)['logp'].detach()
    batch = MicroBatch(torch.tensor([0, 1]), packed, mask, logp.detach(), ref_logp=wanted)
    rollout = types.SimpleNamespace(reward=torch.zeros(2))
    advantages_by_teacher(rollout, [[batch]])
    loss, _ = policy_loss(logp, logp.detach(), batch.advantages, mask, mean='token')
    loss.backward()
    got = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    total = 0.0
    for ids, first in (([1, 2, 3, 4, 5], 2), ([6, 7], 1)):
        logits = [model(torch.tensor([ids]))[0].log_softmax(-1) for model in (student, teacher)]
        for place in range(first, len(ids)):
            ours, theirs = (of_model[place - 1, ids[place]] for of_model in logits)
            total = total - (theirs - ours).detach() * ours / 4
    total.backward()
    for one, other in zip(got, student.parameters()):
        torch.testing.assert_close(one, other.grad, rtol=1e-9, atol=1e-12)
    expected = [(wanted - logp.detach())[row][mask[row]].mean().item() for row in (0, 1)]
    assert rollout.advantage.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_forward_kl_by_hand(temperature, monkeypatch):
    """Over the tokens that both vocabularies have, in parts of two rows; gradients as torch's own kl_div."""
    student, teacher = small_gpt(0, vocab_size=11), small_gpt(1, vocab_size=13)
    monkeypatch.setattr(distill, 'CHUNK', 22)
    packed = pack([([1, 2], [[3, 4, 5]]), ([6], [[7]])], torch.device('cpu'))
    kl = distill.forward_kl(student, teacher, packed, temperature)
    kl.sum().backward()
    got = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for row, (ids, first) in enumerate((([1, 2, 3, 4, 5], 2), ([6, 7], 1))):
        ours, theirs = (model(torch.tensor([ids]))[0, first - 1:-1, :11] / temperature for model in (student, teacher))
        theirs = theirs.detach().softmax(-1)
        of_row = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs, reduction='none').sum(-1)
        of_row.sum().backward()
        expected[row, :len(of_row)] = of_row.detach()
    torch.testing.assert_close(kl.detach(), expected, rtol=1e-9, atol=1e-12)
    for one, other in zip(got, student.parameters()):
        torch.testing.assert_close(one, other.grad, rtol=1e-9, atol=1e-12)


def test_imitation_is_one_mean_however_it_is_cut():
    """Of answers' means, over micro-batches; a student is not moved by itself."""
    student, teacher = small_gpt(0), small_gpt(1)
    pairs = [([1, 2], [[3, 4, 5]]), ([6], [[7]]), ([1], [[8, 9]])]
    run, grads, means = setup('cpu'), [], []
    cfg = Config(forward_kl=0.5)
    for cuts in ([pairs], [pairs[:1], pairs[1:]]):
        student.zero_grad()
        batches = [pack(part, torch.device('cpu')) for part in cuts]
        means.append(distill.imitate(cfg, student, lambda: contextlib.nullcontext(teacher), batches, 3, run))
        grads.append([p.grad.clone() for p in student.parameters()])
    kl = distill.forward_kl(student, teacher, pack(pairs, torch.device('cpu')))
    by_hand = (kl[0].sum() / 3 + kl[1].sum() + kl[2].sum() / 2) / 3
    assert means == pytest.approx([by_hand.item()] * 2, rel=1e-9)
    student.zero_grad()
    (0.5 * by_hand).backward()
    for p, one, two in zip(student.parameters(), *grads):
        torch.testing.assert_close(one, p.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(two, p.grad, rtol=1e-9, atol=1e-12)
    assert distill.imitate(cfg, teacher, lambda: contextlib.nullcontext(teacher), batches, 3, run) == pytest.approx(0, abs=1e-12)


def test_a_given_answer_stands_behind_the_prompt_that_is_asked():
    _, tokenizer = load_model('tiny')
    problem = arithmetic.problems('train', 1, 0)[0]
    prompt, answer = distill.given_answer(tokenizer, arithmetic, problem)
    assert prompt == list(prompt_ids(tokenizer, arithmetic.prompt(problem)))
    assert answer[-1] in tokenizer.stop_ids and '<answer>' in tokenizer.decode(answer)
    of_data = {'question': 'how many?', 'answer': 'two', 'system': ''}
    prompt, answer = distill.given_answer(tokenizer, data.problems, of_data)
    assert tokenizer.decode(answer[:-1]) == 'two'
    with pytest.raises(UserError, match='no answer'):
        distill.given_answer(tokenizer, data.problems, {'question': 'why?'})


@pytest.mark.parametrize('use_lora', [False, True])
def test_a_model_teaches_itself_nothing(use_lora):
    """Teacher and student are one model, which a new adapter leaves as it is: its KL and its gradient are 0, of
    samples and of given answers."""
    main(config(forward_kl=0.5, max_steps=1, eval_steps=1, use_lora=use_lora))
    [step] = [line for line in lines() if 'loss' in line]
    assert abs(step['kl']) < 1e-6 and abs(step['forward_kl']) < 1e-6 and step['grad_norm'] < 1e-3
    assert abs(next(line['eval_kl'] for line in lines() if 'eval_kl' in line)) < 1e-6          # before the step


def test_prompts_alone_are_enough(tmp_path):
    """tiny teaches a copy of itself that was shaken, on questions without answers."""
    model, tokenizer = load_model('tiny')
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25 * p.std() * torch.randn_like(p))
    save_model(model, tokenizer, 'shaken')
    rows = [{'question': problem['question']} for problem in arithmetic.problems('train', 80, 0)]
    (tmp_path / 'asked.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    main(config(base_model_name='shaken', dataset_path='asked.jsonl', system_prompt='', rewards=[], max_steps=8,
                per_device_train_batch_size=16, learning_rate=5e-5, temperature=1.0, eval_steps=8))
    log = lines()
    first, last = (line['eval_kl'] for line in log if 'eval_kl' in line)
    assert 0.02 < first and last < 0.6 * first
    assert not any(key.startswith(('reward', 'eval_reward', 'success')) for line in log for key in line)


def test_of_no_held_out_problem_there_is_no_best():
    model, tokenizer = load_model('tiny')
    scorer, nothing = Scorer([]), types.SimpleNamespace(held_out=[])
    cfg = config(rewards=[])
    metrics, text = train_rl.evaluate(cfg, model, tokenizer, None, lambda: contextlib.nullcontext(model), nothing, scorer, setup('cpu'))
    assert metrics == {} and text == '' and not State(cfg.optimizer, step=1).note_eval(metrics)


@pytest.mark.parametrize('named, rewards', [({}, []), (dict(reward_model_path='scores'), ['model'])])
def test_a_reward_model_that_is_named_is_asked(named, rewards):
    cfg = config(dataset_path='asked.jsonl', rewards=[], **named)
    train_rl.resolve_defaults(cfg, setup('cpu'))
    assert cfg.rewards == rewards


def test_a_run_goes_on_and_is_replayed():
    """What was chosen for it is no mistake when its settings are read again."""
    main(config(max_steps=1, save_steps=1, steps_per_generation=1))
    for changes in (dict(resume=True, max_steps=2), dict(replay=1)):
        cfg = Config(output_dir='out', **changes)
        cfg.typed = cfg.flags = frozenset(changes)
        main(cfg)
    assert [line['step'] for line in lines() if 'loss' in line] == [1, 2]


def test_what_is_of_distill_alone_changes_nothing_elsewhere():
    """A teacher is not taken for the reference of a KL term, and no share of the loss is left out."""
    main(config(algorithm='grpo', teacher_model_name='./nowhere', forward_kl=0.3, max_steps=1, beta=0.1))
    [step] = [line for line in lines() if 'loss' in line]
    assert 'forward_kl' not in step and abs(step['kl']) < 1e-6


MISTAKES = {
    'no teacher': (dict(teacher_model_name=None), 'teacher_model_name'),
    'a reference beside the teacher': (dict(beta=0.1), 'beta=0.1'),
    'a controller of it': (dict(kl_target=0.1), 'kl_target'),
    'dynamic sampling': (dict(dynamic_sampling=True), 'no groups'),
    'a baseline': (dict(baseline='mean'), 'come from its teacher'),
    'a critic': (dict(gamma=0.9), 'no critic'),
    'a share above 1': (dict(forward_kl=1.5), 'forward_kl'),
    'shards': (dict(forward_kl=0.5, shard='full'), 'forward_kl'),
    'a teacher that is not there': (dict(teacher_model_name='./nowhere'), 'nowhere'),
    'answers that are not there': (dict(forward_kl=0.5, dataset_path='asked.jsonl', rewards=[]), 'line 1: .*--answer_column'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_end_with_one_line(name, tmp_path):
    (tmp_path / 'asked.jsonl').write_text(''.join(json.dumps({'question': f'{i} and {i}?'}) + '\n' for i in range(40)))
    changes, words = MISTAKES[name]
    with pytest.raises(UserError, match=words) as stopped:
        main(config(**changes))
    assert len(str(stopped.value).splitlines()) == 1


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    shutil.copytree(os.path.join(ROOT, 'data', 'tiny'), 'other', ignore=shutil.ignore_patterns('*.py', '__pycache__'))
    path = tmp_path / 'other' / 'tokenizer.json'
    path.write_text(path.read_text(encoding='utf-8').replace('<think>', '<thunk>'), encoding='utf-8')
    with pytest.raises(UserError, match='teacher_model_name=other has another tokenizer than tiny'):
        main(config(teacher_model_name='other'))
