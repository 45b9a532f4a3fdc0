"""train_rl.py in short real runs of the embedded model:
what they leave, that counts, ranks and kills change nothing, and forty mistakes."""
import hashlib
import glob
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

import data.problems
import train_rl
from conftest import ROOT, ranks
from configurator import UserError, check_settings, parse
from data.chat import prompt_ids
from data.preferences import encode_pairs, to_pair
from data.problems import draw_problems, open_problems
from data.formats import Source, to_record
from data.completions import Completion, cut_rollouts, read_completions, write_completions
from data.tasks import arithmetic, facts
from data.tokenized import TokenizedRows, encode_records
from chaos import survive
from test_rl_math import decoupled_by_hand
from model import load_model
from nanoforge.data_checks import DataIssues
from nanoforge.run import setup
from train_rl import Config, MicroBatch, Rollout, main
from nanoforge.reward_model import ValueModel, load_reward_model, pair_accuracy, save_reward_model, train_reward_model

TINY = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1, steps_per_generation=2, num_generations=4, max_steps=4, logging_steps=1,
            eval_steps=2, eval_problems=6, num_problems=64, max_completion_length=24, learning_rate=2e-4, warmup_steps=0, temperature=1.5,
            rewards=['task', 'length'], length_buffer=20, device='cpu', matmul='float32', tensorboard=False)
PPO = dict(algorithm='ppo', value_model_name='tiny', num_generations=1)
SHOW = train_rl.show


@pytest.fixture(autouse=True)
def in_scratch_folder(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)     # logs/ goes there
    if 'promised' not in request.node.name:
        monkeypatch.setattr(train_rl, 'show', lambda *arguments: None)  # pictures cost more than these runs


def config(out='out', **changes):
    changes = {**TINY, 'output_dir': str(out), **changes}
    cfg = Config(**changes)
    cfg.typed = frozenset(changes)
    check_settings(cfg)
    return cfg


def flags(**changes):
    spell = lambda value: ' '.join(map(str, value)) if isinstance(value, list) else str(value)
    return [f'--{key}={spell(value)}' for key, value in {**TINY, **changes}.items()]


def lines(out='out'):
    with open(os.path.join(out, 'log.jsonl')) as f:
        return [line for line in map(json.loads, f) if 'samples' not in line][1:]       # of numbers alone


def read(*path):
    with open(os.path.join(*path), 'rb') as f:
        return f.read()


def problems_file(tmp_path, rows=40, name='sums.jsonl', **more):
    path = tmp_path / name
    path.write_text(''.join(json.dumps({'question': f'What is {i} plus {i + 1}?', 'answer': f'#### {2 * i + 1}', **more}) + '\n' for i in range(1, rows + 1)))
    return str(path)


def pairs_file(tmp_path, n=40):
    path = tmp_path / 'pairs.jsonl'
    rows = [{'prompt': p['question'], 'chosen': facts.solution(p), 'rejected': facts.other_form(p)} for p in facts.problems('train', n, 0)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


# ---- short runs --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', [dict(), dict(algorithm='gspo'), PPO], ids=['grpo', 'gspo', 'ppo'])
@pytest.mark.pictures
def test_a_run_leaves_what_is_promised(how, tmp_path, capsys):
    metrics = main(config(**how, eval_steps=4))
    for name in ('config.json', 'model.safetensors', 'tokenizer.json', 'run_config.json', 'log.jsonl', 'rollouts.jsonl', 'rollouts.html',
                 'reward.png', 'checkpoint-4/optimizer.safetensors', 'checkpoint-4/trainer_state.json', 'checkpoint-4/manifest.json'):
        assert os.path.getsize(tmp_path / 'out' / name) > 0
    log = lines()
    assert [line['step'] for line in log if 'loss' in line] == [1, 2, 3, 4]
    assert [line['step'] for line in log if 'eval_accuracy' in line] == [0, 4] and metrics['eval_accuracy'] == log[-1]['eval_accuracy']
    keys = {'reward', 'reward_std', 'success_rate', 'loss', 'grad_norm', 'learning_rate', 'num_tokens', 'entropy', 'approx_kl', 'ratio_mean',
            'ratio_max', 'ratio_min', 'completions/mean_length', 'completions/clipped_ratio', 'clip_ratio/region_mean'}
    keys |= {'value_loss', 'explained_variance', 'kl', 'beta'} if how == PPO else {'frac_reward_zero_std'}
    updates = [line for line in log if 'loss' in line]
    assert all(keys <= line.keys() for line in updates), keys - updates[0].keys()
    # a rollout feeds two updates: in the first the ratio is 1, exactly, and sampler and training agree;
    # the second is off-policy
    assert updates[0]['ratio_max'] == updates[0]['ratio_min'] == 1 and updates[0]['sampling/logp_gap_max'] < 1e-4
    assert updates[1]['ratio_max'] > 1 > updates[1]['ratio_min'] and updates[1]['sampling/logp_gap_max'] < 1e-4
    episodes = read_completions('out/rollouts.jsonl')
    assert sorted({e.step for e in episodes}) == [0, 2] and len(episodes) == 32
    model, tokenizer = load_model('out')
    for e in episodes[:8]:
        assert tokenizer.decode(e.completion_ids[:-1] if e.stopped else e.completion_ids) == e.text
        assert e.rewards['task'] == arithmetic.reward(e.problem, e.text) and e.reward == sum(e.rewards.values()) and len(e.logp) == len(e.completion_ids)
        assert e.completion_ids[-1] in tokenizer.stop_ids or not e.stopped
    said = capsys.readouterr().out
    assert 'reward' in said and 'kl' in said
    for name in ('task', 'length'):
        own = [e.rewards[name] for e in episodes if e.step == 0]
        assert updates[0][f'rewards/{name}/mean'] == pytest.approx(sum(own) / len(own), abs=1e-6)


def test_every_other_preset_runs():
    for name in sorted(train_rl.PRESETS.keys() - {'grpo', 'gspo', 'ppo', 'distill'}):       # distill: tests/test_distill.py
        once = dict(steps_per_generation=1) if train_rl.PRESETS[name]['surrogate'] == 'reinforce' else {}
        main(config(name, **{**TINY, 'algorithm': name, 'max_steps': 1, 'eval_steps': 0, 'eval_problems': 2, 'beta': 0.02, **once}))
        assert all(math.isfinite(line['loss']) and line['kl'] == pytest.approx(0, abs=1e-6) for line in lines(name) if 'loss' in line)


def test_rewards_that_are_compared_one_by_one(tmp_path):
    """The advantages of a run are those of GDPO by hand, of what both of its rewards scored."""
    (tmp_path / 'mine.py').write_text('def score(completions, records):\n    return [len(c) / 100 if len(c) % 5 else None for c in completions]\n')
    main(config(multi_objective_aggregation='normalize_then_sum', rewards=['task', 'mine.py:score'], reward_weights=[1, 2], max_steps=1, eval_steps=0))
    rollout = read_completions('out/rollouts.jsonl')
    scored = {i: c for i, c in enumerate(rollout) if c.reward is not None}
    groups = [[i for i, c in scored.items() if c.group == number] for number in {c.group for c in rollout}]
    columns = [{i: c.rewards[name] for i, c in scored.items()} for name in ('task', 'mine.py:score')]
    expected = decoupled_by_hand(columns, (1, 2), groups)
    assert [c.advantage for c in rollout] == pytest.approx([expected.get(i, 0) for i in range(len(rollout))], abs=1e-4)
    assert 2 < len(scored) < len(rollout) and lines()[0]['unscored'] == len(rollout) - len(scored)


@pytest.mark.parametrize('how', [PPO, dict(algorithm='dr_grpo'), dict(algorithm='rloo'), dict(scale='none'), dict(beta=0.1, kl='reward')])
def test_rewards_that_cannot_be_compared_one_by_one(how):
    with pytest.raises(UserError, match='normalize_then_sum divides each reward'):
        config(multi_objective_aggregation='normalize_then_sum', **how)


def test_same_gradient_however_the_batch_is_cut():
    """8 completions a step as 1 x 8, 8 x 1, 2 x 4 and 2 ranks x 4;
    with groups of 4, on two ranks of one group each."""
    for how, kind in ((dict(beta=0.1, kl='k3', num_iterations=2), 'grpo'), (dict(PPO, beta=0.1), 'ppo')):
        how = {**TINY, **how, 'max_steps': 2, 'eval_steps': 0, 'optimizer': 'sgd', 'learning_rate': 1e-2}
        cuts = {'one': (8, 1, 2), 'eight': (1, 8, 16), **({'two': (4, 2, 4)} if kind == 'grpo' else {})}
        for cut, (size, accumulate, sampled) in cuts.items():
            main(config(f'{kind}-{cut}', **{**how, 'per_device_train_batch_size': size, 'gradient_accumulation_steps': accumulate,
                                             'steps_per_generation': sampled}))
        ranks(2, lambda rank: main(config(f'{kind}-ranks', **{**how, 'per_device_train_batch_size': 4})))
        reference = lines(f'{kind}-one')
        for cut in [*cuts, 'ranks'][1:]:
            for a, b in zip(reference, lines(f'{kind}-{cut}')):
                for key in ('loss', 'grad_norm', 'kl', 'reward', 'value_loss', 'approx_kl', 'explained_variance', 'num_tokens'):
                    assert a.get(key) == pytest.approx(b.get(key), abs=2e-5), (kind, cut, key)
        texts = lambda out: sorted((e.step, e.group, e.sample, e.text) for e in read_completions(f'{out}/rollouts.jsonl'))
        assert texts(f'{kind}-one') == texts(f'{kind}-ranks')


def test_the_best_of_each_group_are_rows_of_fine_tuning(tmp_path):
    """Of a run that went on, too; and the tokens that fine-tuning learns are those that were sampled."""
    (tmp_path / 'mine.py').write_text('def score(completions, records):\n    return [len(c) % 4 if len(c) % 7 else None for c in completions]\n')
    how = dict(rewards=['mine.py:score'], temperature=0.9, max_completion_length=48, eval_steps=0,
               collect='rows/best.jsonl')
    main(config(**how, save_steps=2, save_only_model=False, save_total_limit=9))
    rows, rollout = [json.loads(line) for line in open('rows/best.jsonl')], read_completions('out/rollouts.jsonl')
    expected = []
    for step in (0, 2):
        scored = [c for c in rollout if c.step == step and c.reward is not None]
        for number in sorted({c.group for c in scored}):
            best = max((c for c in scored if c.group == number and c.stopped), key=lambda c: c.reward)      # the first of several
            if best.reward > min(c.reward for c in scored):
                expected.append(best)
    assert len(expected) == len(rows) > 4
    assert [(row['step'], row['messages']) for row in rows] == [
        (c.step, [{'role': 'user', 'content': c.problem['question']}, {'role': 'assistant', 'content': c.text}]) for c in expected]
    learned, (_, tokenizer) = TokenizedRows(), load_model('tiny')
    encode_records([(0, to_record(row, 'row', Source())) for row in rows], tokenizer, learned, DataIssues())
    learned.close()
    for i, c in enumerate(expected):
        ids, targets = learned[i]
        assert ids.tolist()[:len(c.prompt_ids + c.completion_ids)] == c.prompt_ids + c.completion_ids
        assert targets.sum() == len(c.completion_ids)
    before = read('rows/best.jsonl')
    shutil.rmtree('out/checkpoint-4')
    with open('rows/best.jsonl', 'ab') as file:
        file.write(b'{"messages": ["\xe2\x82')      # as a kill leaves it, within a character
    main(parse(Config, ['--resume', '--output_dir=out']))
    assert read('rows/best.jsonl') == before
    # another file is nobody's to cut; and of a start that was killed before it saved no row is there twice
    shutil.rmtree('out/checkpoint-4')
    (tmp_path / 'theirs.jsonl').write_text('{"messages": [], "step": 9}\n')
    with pytest.raises(UserError, match='theirs.jsonl is there already, and not of the run in out'):
        main(parse(Config, ['--resume', '--output_dir=out', '--collect=theirs.jsonl']))
    assert read('theirs.jsonl') == b'{"messages": [], "step": 9}\n'
    for checkpoint in glob.glob('out/checkpoint-*'):
        shutil.rmtree(checkpoint)
    main(config(**how, resume='auto', max_steps=4))
    assert read('rows/best.jsonl') == before
    with pytest.raises(UserError, match='best.jsonl is there already, and not of the run in new'):
        main(config('new', **how, resume='auto'))
    assert read('rows/best.jsonl') == before


def test_a_reference_may_be_left_out_when_a_run_goes_on():
    main(config(beta=0.1, max_steps=2, eval_steps=0, save_steps=2, save_only_model=False))
    main(parse(Config, ['--resume', '--output_dir=out', '--beta=0', '--max_steps=4']))
    assert ['kl' in line for line in lines() if 'loss' in line] == [True, True, False, False]


def test_the_best_is_what_the_aggregation_calls_so(tmp_path, capsys):
    """Right sums and a brevity that counts in characters: the sum of both prefers the shortest, right or wrong."""
    (tmp_path / 'mine.py').write_text('def brief(completions, records):\n    return [-100 * len(c) for c in completions]\n')
    main(config(rewards=['task', 'mine.py:brief'], reward_weights=[1.0, 0.1], multi_objective_aggregation='normalize_then_sum',
                num_generations=8, temperature=1.5, max_completion_length=48, max_steps=4, eval_steps=0, collect='best.jsonl'))
    kept = [row['messages'][-1]['content'] for row in map(json.loads, open('best.jsonl'))]
    assert f'{len(kept)} rows are collected in best.jsonl' in capsys.readouterr().out
    rollout, mixed = read_completions('out/rollouts.jsonl'), 0
    for key in {(c.step, c.group) for c in rollout}:
        scored = [c for c in rollout if (c.step, c.group) == key and c.stopped]
        if 0 < sum(c.rewards['task'] for c in scored) < len(scored):
            assert max(scored, key=lambda c: c.advantage).text in kept
            mixed += max(scored, key=lambda c: c.reward).text not in kept
    assert mixed


@pytest.mark.parametrize('name, there, words', [('best.json', False, 'ends in .jsonl'), ('best.jsonl', True, 'is there already'),
                                                ('mine.py/best.jsonl', False, 'cannot write mine.py')])
def test_files_that_nothing_can_be_collected_in(tmp_path, name, there, words):
    (tmp_path / 'mine.py').write_text('def score(completions, records):\n    return list(map(len, completions))\n')
    if there:
        (tmp_path / name).write_text('a row\n')
    with pytest.raises(UserError, match=words):
        main(config(collect=name, eval_steps=0, rewards=['mine.py:score'], max_completion_length=4, length_buffer=4))
    assert not there or (tmp_path / name).read_text() == 'a row\n'


def test_uneven_work_per_rank():
    """Three groups on two ranks, with refills that leave one rank without any:
    it ends, and equals one process."""
    how = {**TINY, 'algorithm': 'dapo', 'rewards': ['task'], 'per_device_train_batch_size': 6, 'gradient_accumulation_steps': 1, 'max_steps': 3, 'eval_steps': 0,
           'steps_per_generation': 1, 'temperature': 0.7}
    ranks(2, lambda rank: main(config('ranks', **how, collect='ranks/best.jsonl')))
    main(config('one', **{**how, 'per_device_train_batch_size': 12}, collect='one/best.jsonl'))
    collected = [sorted(open(f'{out}/best.jsonl')) for out in ('one', 'ranks')]
    assert collected[0] == collected[1] and len(collected[0]) == 9          # of each group of the three steps
    for a, b in zip(lines('one'), lines('ranks')):
        for key in ('loss', 'grad_norm', 'reward', 'groups_drawn'):
            assert a.get(key) == pytest.approx(b.get(key), abs=2e-5)
    assert all(line['frac_reward_zero_std'] == 0 for line in lines('one') if 'loss' in line)
    assert any(line.get('groups_drawn', 0) > 3 for line in lines('one'))


@pytest.mark.parametrize('how', [dict(use_lora=True, lora_dropout=0.1, beta=0.05, kl_target=0.01, num_iterations=2, max_steps=8),
                                 dict(PPO, max_steps=6, eval_steps=0)], ids=['lora', 'ppo'])
def test_kills_change_nothing(how, tmp_path, small):
    """SIGKILL at random moments, resumed each time:
    weights, critic, optimizers, counters, curve and rollouts of a run left alone."""
    if how.get('algorithm') == 'ppo':
        pairs = pairs_file(tmp_path)
        how = {**how, 'rewards': ['model'], 'value_model_name': small}
        extra = [f'data.datasets[0].name={pairs}', 'data.datasets[0].chosen_column=chosen', 'data.datasets[0].rejected_column=rejected']
    else:
        extra = []
    report = survive('train_rl', [*flags(**how, save_steps=1, base_model_name=small), *extra], kills=2)
    assert report['kills'] == 2 and report['differences'] == []
    assert len(lines('whole')) > 5 and read('whole/rollouts.jsonl') == read('killed/rollouts.jsonl')


def test_a_critic_of_an_earlier_version_goes_on(small):
    """It called the critic's backbone `trunk`, and its trainer_state.json had these keys alone."""
    from safetensors.torch import load_file, save_file
    how = {**PPO, 'base_model_name': small, 'value_model_name': small, 'eval_steps': 0, 'num_iterations': 2}
    main(config('whole', **how, max_steps=8))
    main(config('old', **how, max_steps=8, save_steps=4, save_only_model=False, save_total_limit=9))
    shutil.rmtree('old/checkpoint-8')
    tensors = load_file('old/checkpoint-4/optimizer.safetensors')
    assert any('critic/backbone.' in key for key in tensors)
    save_file({key.replace('/backbone.', '/trunk.'): tensor for key, tensor in tensors.items()}, 'old/checkpoint-4/optimizer.safetensors')
    state = json.load(open('old/checkpoint-4/trainer_state.json'))
    keys = ('step', 'rollouts', 'cursor', 'num_tokens', 'bad_steps', 'best', 'beta', 'loss_scale')
    with open('old/checkpoint-4/trainer_state.json', 'w') as file:
        json.dump({key: state[key] for key in keys}, file)
    manifest = json.load(open('old/checkpoint-4/manifest.json'))
    for name in ('optimizer.safetensors', 'trainer_state.json'):
        content = read('old/checkpoint-4', name)
        manifest['files'][name] = {'size': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
    del manifest['sha256']
    with open('old/checkpoint-4/manifest.json', 'w') as file:
        json.dump(manifest, file)
    cfg = Config(resume=True, output_dir='old')
    cfg.typed = frozenset({'resume', 'output_dir'})
    main(cfg)
    for name in ('model.safetensors', 'optimizer.safetensors'):
        assert read('whole/last', name) == read('old/last', name), name
    assert read('whole/rollouts.jsonl') == read('old/rollouts.jsonl')


def test_sigterm_saves_and_says_how_to_go_on():
    command = [sys.executable, os.path.join(ROOT, 'train_rl.py'), *flags(output_dir='out', max_steps=10000, eval_steps=0)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step'):
            process.send_signal(signal.SIGTERM)
            break
    said = process.stdout.read()
    assert process.wait() == 143 and '--resume' in said
    step = json.load(open('out/last/trainer_state.json'))['step']
    cfg = Config(resume=True, output_dir='out', max_steps=step + 2)
    cfg.typed = frozenset({'resume', 'output_dir', 'max_steps'})
    main(cfg)
    assert json.load(open('out/last/trainer_state.json'))['step'] == step + 2
    assert json.load(open('out/run_config.json'))['config']['training']['learning_rate'] == 2e-4


def test_a_resumed_run_keeps_its_precision(capsys):
    main(config(max_steps=1, eval_steps=0, matmul='bf16'))
    capsys.readouterr()
    cfg = Config(resume=True, output_dir='out', max_steps=2)
    cfg.typed = frozenset({'resume', 'output_dir', 'max_steps'})
    main(cfg)
    assert 'bf16 matrix products' in capsys.readouterr().out


def test_replay(capsys):
    main(config(max_steps=6, save_steps=4, eval_steps=0, save_only_model=False))
    capsys.readouterr()
    before = {name: read('out', name) for name in ('log.jsonl', 'rollouts.jsonl', 'model.safetensors')}
    for step, begin in ((2, 'the start'), (4, 'checkpoint-4')):
        cfg = Config(replay=step, output_dir='out')
        cfg.typed = frozenset({'replay', 'output_dir'})
        assert main(cfg) == {'same': 16, 'completions': 16}
        said = capsys.readouterr().out
        assert f'{begin}, step' in said and f'to step {step}' in said and said.count('--- group') == 4 and ('made likelier' in said or 'nothing to learn' in said)
    assert all(read('out', name) == content for name, content in before.items())
    cfg.replay = 3
    with pytest.raises(UserError, match='nearest one is'):
        main(cfg)


def test_a_critic_compares_no_groups(monkeypatch, capsys):
    """Neither ppo's replay nor its page calls equal rewards nothing to learn: advantages are the critic's."""
    monkeypatch.setattr(train_rl, 'show', SHOW)
    main(config(**{**PPO, 'num_generations': 4}, max_steps=2, rewards=['number']))
    page = (open('out/rollouts.html', encoding='utf-8').read().partition('</style>')[2]).replace('class=group', '')
    assert 'group' not in page and 'equal rewards' not in page and 'critic' in page and 'prompt 3' in page and '</i>unscored' in page
    assert all('frac_reward_zero_std' not in line for line in lines())
    capsys.readouterr()
    cfg = Config(replay=0, output_dir='out')
    cfg.typed = frozenset({'replay', 'output_dir'})
    assert main(cfg) == {'same': 16, 'completions': 16}
    said = capsys.readouterr().out
    assert said.count('--- prompt') == said.count('than the critic expected') == 4 and 'nothing to learn' not in said
    assert any(e.advantage and e.reward == 0 for e in read_completions('out/rollouts.jsonl', 0)), 'the case that was called nothing to learn'


def test_nothing_was_learned(tmp_path, capsys):
    """A run whose rewards never differ within a group says so, with an answer and what was wanted."""
    shared = dict(datasets=[Source(problems_file(tmp_path))], rewards=['exact'], max_steps=2, eval_steps=0, max_prompt_length=150, length_buffer=1)
    (tmp_path / 'mine.py').write_text('def score(completions, records):\n    return [len(r["question"]) for r in records]\n')
    for how, word in ((dict(max_completion_length=2), 'prompt'), (dict(max_completion_length=2, system_prompt=''), 'prompt'),
                      (dict(rewards=[f'{tmp_path}/mine.py:score']), 'prompt'),                  # differs, but not within a group
                      (dict(**PPO, max_completion_length=2), 'rollout')):
        main(config(**{**shared, **how}))
        said = capsys.readouterr().out
        first = read_completions('out/rollouts.jsonl')[0]
        assert f'nothing was learned: no completion ever earned more than another of its {word}' in said
        asked = load_model('out')[1].decode(first.prompt_ids)
        assert repr(asked[-300:]) in said and repr(first.text) in said and repr(first.problem['answer']) in said and first.prompt == asked
        assert ('<think>' in asked) == ('system_prompt' not in how) and f'prompt    {asked[:20]!r}'[:-1] in said
        assert ('--system_prompt= leaves it out' in said) == ('system_prompt' not in how)
        assert json.loads(read('out', 'last', 'trainer_state.json'))['rewards_differed'] is False
    cfg = Config(resume=True, output_dir='out', max_steps=3)
    cfg.typed = frozenset({'resume', 'output_dir', 'max_steps'})
    main(cfg)
    assert 'nothing was learned' in capsys.readouterr().out
    main(config(max_steps=2, eval_steps=0))
    assert 'nothing was learned' not in capsys.readouterr().out


def test_a_reward_that_gives_no_number_is_named(tmp_path, capsys):
    (tmp_path / 'mine.py').write_text('def none(c, r):\n    return [None] * len(c)\ndef nan(c, r):\n    return [float("nan")] * len(c)\n'
                                      'def fails(c, r):\n    return [1 / len(r[0]["nothing"]) for text in c]\n'
                                      'def some(c, r):\n    return [1.0 if i % 2 else float("inf") for i in range(len(c))]\n')
    for name, words in (('none', []), ('nan', ['returned nan']), ('fails', ['mine.py line 6: KeyError'])):
        for masked in (False, True):
            with pytest.raises(UserError) as error:
                main(config(rewards=[f'{tmp_path}/mine.py:{name}', 'task'], eval_steps=0, mask_truncated=masked))
            assert all(word in str(error.value) for word in [f'mine.py:{name} gave no number', 'for 16 of 16', *words])
            assert ('mask_truncated' in str(error.value)) == masked
    capsys.readouterr()
    main(config(rewards=[f'{tmp_path}/mine.py:some'], eval_steps=0))
    assert capsys.readouterr().out.count('some returned inf') == 1


def test_the_critic_of_a_recipe_follows_a_typed_base_model(tmp_path):
    (tmp_path / 'ppo.yaml').write_text('model:\n  base_model_name: org/base\n  value_model_name: org/critic\ntraining:\n  algorithm: ppo\n')
    for argv, critic in (([], 'org/critic'), (['--model=mine'], 'mine'), (['model.base_model_name=mine', 'model.value_model_name=other'], 'other'),
                         (['--value_model_name=other'], 'other')):
        assert parse(Config, ['ppo.yaml', *argv]).value_model_name == critic, argv
    assert parse(Config, ['--model=mine']).value_model_name is None


# ---- modes -------------------------------------------------------------------------------------------------

def test_lora_and_its_reference():
    main(config(use_lora=True, lora_dropout=0.0, beta=0.05, max_steps=4, learning_rate=5e-3))
    log = [line for line in lines() if 'loss' in line]
    assert log[0]['kl'] == pytest.approx(0, abs=1e-6) and log[-1]['kl'] > 1e-6  # adapters off are the start
    assert os.path.exists('out/adapter_model.safetensors') and not os.path.exists('out/model.safetensors')
    base, _ = load_model('tiny')
    tuned, _ = load_model('out')
    for (name, a), (_, b) in zip(base.named_parameters(), [(n, p) for n, p in tuned.named_parameters() if 'lora' not in n]):
        assert torch.equal(a, b), name
    full = config('full', beta=0.05, max_steps=2)
    main(full)
    assert [line for line in lines('full') if 'loss' in line][0]['kl'] == pytest.approx(0, abs=1e-6)
    # an adapter is trained further only against a frozen copy of itself
    main(config('further', base_model_name='out', use_lora=True, beta=0.05, max_steps=2))
    assert [line for line in lines('further') if 'loss' in line][0]['kl'] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('bits', ['load_in_4bit', 'load_in_8bit'])
def test_quantised(bits):
    main(config(use_lora=True, beta=0.05, max_steps=2, gradient_checkpointing=True, eval_steps=0, **{bits: True}))
    assert math.isfinite(lines()[-2]['loss']) and os.path.exists('out/adapter_model.safetensors')


def test_ppo_on_a_shared_trunk():
    main(config(**PPO, share_critic=True, max_steps=4, eval_steps=0))
    from safetensors.torch import load_file
    saved = load_file('out/last/optimizer.safetensors')
    assert [key for key in saved if key.startswith('critic/')] == ['critic/weight'] and saved['critic/weight'].abs().sum() > 0


def test_data_set_with_a_users_reward(tmp_path, capsys):
    (tmp_path / 'mine.py').write_text('def score(completions, records):\n'
                                      '    return [None if i % 4 == 3 else float(len(c)) for i, c in enumerate(completions)]\n')
    path = problems_file(tmp_path, level=3)
    main(config(datasets=[Source(path)], rewards=[f'{tmp_path}/mine.py:score', 'tags'], eval_steps=0, max_steps=2, max_prompt_length=100,
                mask_truncated=True, importance_cap=2.0, dual_clip=3.0, entropy_coef=0.01))
    log = [line for line in lines() if 'loss' in line]
    assert log[0]['unscored'] >= 4 and {'rewards/mine.py:score/mean', 'rewards/tags/mean'} <= log[0].keys()
    episodes = read_completions('out/rollouts.jsonl')
    assert all(e.reward is None and e.advantage == 0 for e in episodes if e.sample == 3)
    assert all(e.problem['level'] == 3 and 'system' in e.problem for e in episodes)
    train, held_out = map(int, re.search(r'(\d+) problems, (\d+) held out', capsys.readouterr().out).groups())
    assert train + held_out == 40 and 0 < held_out < 10


def test_counts_are_rounded_up_to_whole_groups(capsys):
    main(config(per_device_train_batch_size=1, gradient_accumulation_steps=6, steps_per_generation=4, num_generations=4, max_steps=1, eval_steps=0))
    said = capsys.readouterr().out
    assert 'rounded up to 8' in said and len(read_completions('out/rollouts.jsonl')) == 8


def test_the_documented_recipe_on_one_device(capsys, monkeypatch):
    """GSPO as shipped: batch 1, 8 generations, 4 steps per generation;
    another model, and embedded problems."""
    monkeypatch.setattr(sys, 'argv', ['train_rl.py'])
    cfg = parse(Config, ['--recipe', os.path.join(ROOT, 'recipes/training/gspo/llama3_3B_lora.yaml'), 'model.base_model_name=tiny', 'data.datasets=[]',
                         'training.output_dir=out', 'training.max_steps=1', '--eval_problems=4', '--num_problems=16', '--max_completion_length=24'])
    main(cfg)
    assert len(read_completions('out/rollouts.jsonl')) == 16 and 'lengths   clamped' in capsys.readouterr().out


# ---- parts -------------------------------------------------------------------------------------------------

def completion(reward, stopped, n=2, **more):
    return Completion(0, more.pop('group', 0), more.pop('sample', 0), {}, [1], [2] * n, [-0.1] * n, stopped, '', {'task': reward}, reward, **more)


def rollout(rewards, stopped, lengths):
    """A Rollout of which one rank holds everything."""
    N = len(rewards)
    return Rollout([completion(r, s, n) for r, s, n in zip(rewards, stopped, lengths)], torch.arange(N), torch.arange(N), torch.tensor(rewards, dtype=torch.float64),
                   {}, torch.tensor(lengths, dtype=torch.float64), torch.tensor(stopped), torch.zeros(N), N)


def test_critic_is_asked_behind_what_was_cut_off():
    """gae by hand: the reward at the last token, beta k1 off each,
    V behind a row that was cut off and not behind a stop token."""
    mask = torch.tensor([[True, True], [True, False]])
    batch = MicroBatch(torch.tensor([0, 1]), None, mask, torch.zeros(2, 2), old_logp=torch.tensor([[-1., -2.], [-1., 0.]]),
                       ref_logp=torch.tensor([[-1.5, -2.], [-0.8, 9.]]), values=torch.tensor([[0.2, 0.4], [0.1, 7.]]), bootstrap=torch.tensor([5., 3.]))
    made = rollout([1.0, 0.5], [True, False], [2, 1])
    about = train_rl.advantages_by_critic(Config(lam=1.0, kl='reward'), made, [[batch]], 0.1, setup('cpu'))
    # returns with lam = 1: what is still to come. Row 0: 1 - 0.1 * (0.5 + 0), then 1;
    # row 1: 0.5 - 0.1 * -0.2 + 3
    assert batch.returns.tolist() == [pytest.approx([0.95, 1.0]), pytest.approx([3.52, 0.0])]
    raw = torch.tensor([0.95 - 0.2, 1 - 0.4, 3.52 - 0.1])
    white = (raw - raw.mean()) / raw.std(unbiased=False)
    assert batch.advantages[mask].tolist() == pytest.approx(white.tolist(), abs=1e-5) and batch.advantages[1, 1] == 0
    assert made.records()[0].advantage == pytest.approx(white[:2].mean().item(), abs=1e-5)
    returns = torch.tensor([0.95, 1.0, 3.52])
    assert about['explained_variance'] == pytest.approx(1 - (raw.square().mean() / returns.var(unbiased=False)).item(), abs=1e-5)


def test_adaptive_beta():
    cfg = Config(kl_target=1.0, kl_horizon=40)
    # the error is clipped at 0.2
    assert train_rl.adapt_beta(cfg, 0.1, torch.full((4,), 3.0)) == pytest.approx(0.1 * (1 + 0.2 * 4 / 40))
    assert train_rl.adapt_beta(cfg, 0.1, torch.full((4,), 0.9)) == pytest.approx(0.1 * (1 - 0.1 * 4 / 40))


def test_statistics_of_a_step_are_of_all_its_micro_batches():
    """Parts of the loss are summed, extremes stay extremes, all else is a mean over tokens;
    a rank may have no micro-batch."""
    one = {'loss': 0.5, 'ratio_max': 2.0, 'ratio_min': 0.5, 'sampling/logp_gap_max': 0.1, 'approx_kl': 1.0, 'value_loss': 0.25}
    two = {'loss': 0.25, 'ratio_max': 3.0, 'ratio_min': 0.75, 'sampling/logp_gap_max': 0.3, 'approx_kl': 5.0, 'value_loss': 0.5}
    want = {'loss': 0.75, 'ratio_max': 3.0, 'ratio_min': 0.5, 'sampling/logp_gap_max': pytest.approx(0.3), 'approx_kl': 2.0, 'value_loss': 0.75}
    parts = [(30, one), (10, two)]
    tensors = [(torch.tensor(n), {name: torch.tensor(x) for name, x in stats.items()}) for n, stats in parts]

    class Ranks:            # three: this one, one without a micro-batch, and another
        def gather(self, mine):
            return [*mine, *parts[1:]]

    assert train_rl.merge_stats(tensors, setup('cpu')) == want
    assert train_rl.merge_stats(tensors[:1], Ranks()) == want
    assert train_rl.merge_stats([], setup('cpu')) == {'loss': 0.0}


def test_a_question_that_is_held_out_is_in_no_training_row(tmp_path):
    """By the prompt, whatever the seed and the order of the rows; duplicates of it are left out, and said;
    old runs keep their rule."""
    path, said = problems_file(tmp_path, 200), []
    with open(path, 'a') as file:                               # every question a second time
        file.write(open(path).read())
    _, tokenizer = load_model('tiny')
    opened = {}
    for name, changes in (('one', {}), ('seed', dict(seed=5)), ('few', dict(eval_problems=3)), ('none', dict(eval_fraction=0.0)),
                          ('legacy', dict(split_rule='legacy')), ('legacy seed', dict(split_rule='legacy', seed=5))):
        cfg = config(datasets=[Source(path)], rewards=['exact'], **{'eval_problems': 200, 'max_prompt_length': 200, **changes})
        opened[name] = open_problems(cfg, tokenizer, said.append)
        asked = [[p['question'] for p in part] for part in (opened[name].train, opened[name].held_out)]
        assert not set(asked[0]) & set(asked[1]), name
        opened[name] = asked
    held_out = opened['one'][1]
    assert 10 <= len(held_out) <= 30 and len(set(held_out)) == len(held_out) and len(opened['one'][0]) == 400 - 2 * len(held_out)
    assert opened['seed'] == opened['one'] and opened['few'][1] == held_out[:3] and opened['few'][0] == opened['one'][0]
    assert len(opened['none'][0]) == 400 and opened['none'][1] == []
    assert opened['legacy'] != opened['legacy seed'] and len(opened['legacy'][1]) == 40
    said = [text for text in said if 'left out' in text]
    assert f'{len(held_out)} of 400 rows are left out' in said[0] and 'held out' in said[0]
    assert len(said) == 5               # all but where none is held out
    rows = [json.loads(line) for line in open(path)]
    (tmp_path / 'backwards.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in reversed(rows)))
    cfg = config(datasets=[Source(str(tmp_path / 'backwards.jsonl'))], rewards=['exact'], eval_problems=200, max_prompt_length=200)
    assert [p['question'] for p in open_problems(cfg, tokenizer, said.append).held_out] == held_out
    # metadata decides where it is given, and its questions are in no training row either
    marked = [{**row, 'metadata': 'eval' if i < 3 else 'train'} for i, row in enumerate(rows)]
    (tmp_path / 'marked.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in marked))
    cfg = config(datasets=[Source(str(tmp_path / 'marked.jsonl'))], rewards=['exact'], eval_problems=200, max_prompt_length=200)
    problems = open_problems(cfg, tokenizer, said.append)
    assert len(problems.held_out) == 3 and len(problems.train) == 394 and '3 of 397 rows' in said[-1]


def test_a_dialogue_beside_the_question_is_never_asked(tmp_path):
    """NuminaMath and others hold the solution in it; rewards see the row as it is."""
    path, (_, tokenizer) = tmp_path / 'rows.jsonl', load_model('tiny')
    dialogue = [{'role': 'user', 'content': 'what is 1 + 1?'}, {'role': 'assistant', 'content': 'it is \\boxed{2}'}]
    row = {'problem': 'what is 1 + 1?', 'answer': '2', 'messages': dialogue, 'dialogue': dialogue, 'conversations': dialogue, 'prompt': dialogue}
    path.write_text(json.dumps(row))
    problems = open_problems(config(datasets=[Source(str(path))], rewards=['exact'], eval_fraction=0.0, max_prompt_length=300), tokenizer, print)
    asked = tokenizer.decode(list(problems.train[0]['prompt_ids']))
    assert 'boxed' not in asked and asked.count('what is 1 + 1?') == 1 and problems.train[0]['messages'] == dialogue


def test_rows_of_arrow_and_of_pandas_are_written_as_json(tmp_path):
    """Timestamps, bytes, decimals; NaN and half a character in columns that nobody reads."""
    import datetime
    import decimal
    import pyarrow
    import pyarrow.parquet
    rows = [{'question': f'what is {i}?', 'answer': decimal.Decimal(i), 'created': datetime.datetime(2024, 1, 1), 'raw': b'\xff', 'level': math.nan} for i in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'rows.parquet')
    (tmp_path / 'rows.jsonl').write_text(json.dumps({'question': 'q', 'answer': '1', 'level': math.nan, 'scores': [math.inf], 'note': 'cut \ud83d'}))
    _, tokenizer = load_model('tiny')
    cfg = config(datasets=[Source(str(tmp_path / 'rows.parquet')), Source(str(tmp_path / 'rows.jsonl'))], rewards=['exact'], eval_fraction=0.0, max_prompt_length=300)
    said = []
    problems = open_problems(cfg, tokenizer, said.append).train
    assert said[0].startswith('data      2 data sets are mixed: ') and 'rows.jsonl (weight 1)' in said[0]
    assert problems[3]['answer'] == '3' and problems[3]['created'] == '2024-01-01T00:00:00' and problems[-1]['scores'] == [None]
    shown = [{key: value for key, value in problem.items() if key != 'prompt_ids'} for problem in problems]
    completions = [Completion(0, i, 0, problem, [1], [2], [0.0], True, 'x', {}, 1.0) for i, problem in enumerate(shown)]
    run = types.SimpleNamespace(rank=0, tp_rank=0, world_size=1, barrier=lambda: None)
    for path in (tmp_path / 'rollouts.jsonl', tmp_path / 'again.jsonl'):
        write_completions(completions, path, run)
        json.loads(path.read_text().splitlines()[-1], parse_constant=pytest.fail)
        completions = read_completions(path)
    cut_rollouts(tmp_path / 'again.jsonl', 1)
    assert [c.problem for c in read_completions(tmp_path / 'again.jsonl')] == shown


def test_bad_rows_are_left_out_and_counted_where_that_is_wanted(tmp_path):
    path, (_, tokenizer), said = tmp_path / 'rows.jsonl', load_model('tiny'), []
    rows = [{'question': 'q', 'answer': '1', 'metadata': {'source': 'web'}}, {'question': 'q', 'answer': math.nan}, {'question': 'cut \ud83d', 'answer': '1'},
            {'question': 'r', 'answer': '1', 'tools': ['x']}, {'question': '<|im_end|> s', 'answer': '1', 'metadata': 'gsm8k'}]
    path.write_text('\n'.join(map(json.dumps, rows)))
    settings = dict(datasets=[Source(str(path))], rewards=['exact'], eval_fraction=0.0, max_prompt_length=300, system_prompt='Answer.')
    with pytest.raises(UserError, match='line 2: answer: null'):
        open_problems(config(**settings), tokenizer, said.append)
    problems = open_problems(config(skip_bad_rows=True, **settings), tokenizer, said.append)
    assert [p['question'] for p in problems.train] == ['q', '<|im_end|> s']
    assert any(text.startswith('3 rows that cannot be read are left out (first: ') and 'line 2: answer: null' in text for text in said)
    assert any(text.startswith('training problems: 1 chats that spell a turn token') for text in said)
    assert [list(p['prompt_ids']).count(tokenizer.eos_id) for p in problems.train] == [2, 2]


def test_several_processes_tokenise_the_same_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr('data.problems.CHUNK', 16)
    path, (_, tokenizer) = problems_file(tmp_path, 50), load_model('tiny')
    cfg = config(datasets=[Source(path)], rewards=['exact'], max_prompt_length=200)
    one = open_problems(cfg, tokenizer, print).train
    cfg.dataset_num_proc = 2
    assert open_problems(cfg, tokenizer, print).train == one
    assert all(list(problem['prompt_ids']) == prompt_ids(tokenizer, data.problems.prompt(problem)) for problem in one)


def test_pairs_are_held_out_by_their_prompt(tmp_path):
    _, tokenizer = load_model('tiny')
    path = pairs_file(tmp_path, 300)
    cfg = config(datasets=[Source(path, chosen_column='chosen', rejected_column='rejected')], rewards=['model'], max_prompt_length=200)
    problems = open_problems(cfg, tokenizer, lambda text: None)
    sides = [{tuple(pair.prompt) for pair in pairs} for pairs in (problems.pairs, problems.held_out_pairs)]
    assert not sides[0] & sides[1] and 10 <= len(sides[1]) <= 60 and len(problems.pairs) + len(problems.held_out_pairs) <= 300
    asked = [{p['question'] for p in part} for part in (problems.train, problems.held_out)]
    assert not asked[0] & asked[1]


def test_problems_are_drawn_without_replacement():
    problems = list(range(10))
    drawn = [p for at in range(0, 30, 6) for p in draw_problems(problems, at, 6, seed=1)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == problems and drawn[:10] != drawn[10:20]


def test_page_of_rollouts_is_self_contained_and_escaped(tmp_path):
    from nanoforge.pages import rollouts_page
    members = [completion(1.0, True, advantage=1.0), completion(0.0, False, sample=1, advantage=-1.0), completion(None, True, sample=2)]
    for e in members:
        e.text, e.problem = '<script>alert(1)</script>', {'question': 'How <many>?', 'answer': '5'}
    (tmp_path / 'rollouts.jsonl').write_text(''.join(e.line() + '\n' for e in members) + '{"cut')
    rollouts_page(tmp_path / 'rollouts.jsonl', tmp_path / 'page.html', 'a run')
    page = (tmp_path / 'page.html').read_text()
    assert '<script' not in page and 'src=' not in page and 'http' not in page and '&lt;script&gt;' in page and 'How &lt;many&gt;?' in page
    assert 'cut off' in page and 'unscored' in page and page.count('class=sample') == 3 and page.count('class=group') == 1
    green, red, grey = (page.split('class=sample style="background:')[i][:12] for i in (1, 2, 3))
    assert green.startswith('hsl(140') and red.startswith('hsl(8') and grey.startswith('hsl(0 0%')
    (tmp_path / 'rollouts.jsonl').write_text(''.join(replace(members[0], group=group).line() + '\n' for group in (10, 2, 0)))
    rollouts_page(tmp_path / 'rollouts.jsonl', tmp_path / 'page.html', 'a run')
    assert re.findall(r'>group (\d+)', (tmp_path / 'page.html').read_text().replace('</span>', '>')) == ['0', '2', '10']
    # groups from which something is learned come first, and the curves and facts of the run above them
    equal = [replace(members[0], group=1, sample=i, reward=1.0) for i in range(2)]
    mixed = [replace(members[0], group=2, sample=i, reward=float(i)) for i in range(2)]
    (tmp_path / 'rollouts.jsonl').write_text(''.join(member.line() + '\n' for member in equal + mixed))
    log = [{'run': {'model': 'a <model>'}}, {'step': 1, 'reward': 0.25}, {'step': 2, 'reward': 0.75}]
    (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in log))
    rollouts_page(tmp_path / 'rollouts.jsonl', tmp_path / 'page.html', 'a run')
    page = (tmp_path / 'page.html').read_text()
    assert re.findall(r'>group (\d+)', page.replace('</span>', '>')) == ['2', '1']
    assert 'model a &lt;model&gt;' in page and page.count('<polyline') == 1 and 'reward 0.250 &rarr; 0.750' in page


# ---- the reward model --------------------------------------------------------------------------------------

def test_reward_model_learns_saves_and_is_opened_by_transformers(tmp_path):
    """Full sentences are preferred to single words, also about people of whom there was no pair;
    transformers' own class says the same."""
    model, tokenizer = load_model('tiny')

    def pairs(split, n, seed):
        found = [to_pair({'prompt': p['question'], 'chosen': long, 'rejected': short}, 'row', Source()) for p in facts.problems(split, n, seed)
                 for short, long in [sorted((facts.solution(p), facts.other_form(p)), key=len)]]
        return encode_pairs(tokenizer, found, 128)[0]

    value, run = ValueModel(model), setup('cpu')
    train_reward_model(value, pairs('train', 160, 0), run, 1, 16, 1e-3)
    assert pair_accuracy(value, pairs('eval', 64, 0), run) > 0.9
    save_reward_model(value, tokenizer, tmp_path / 'rm')
    from transformers import AutoModelForSequenceClassification
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / 'rm')
    ours = load_reward_model(str(tmp_path / 'rm'), run.device, tokenizer)
    groups = [([5, 6, 7, 8], [[9, 10], [11]])]
    with torch.no_grad():
        scores = ours.rewards(groups)
        for row, ids in enumerate(([5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11])):
            assert theirs(torch.tensor([ids])).logits[0, 0].item() == pytest.approx(scores[row].item(), abs=1e-4)
        assert torch.allclose(scores, value.rewards(groups), atol=1e-5)


def test_ppo_from_pairs_and_a_reward_model_used_again(tmp_path, capsys):
    sources = [Source(pairs_file(tmp_path), chosen_column='chosen', rejected_column='rejected')]
    main(config(**PPO, datasets=sources, rewards=['model'], reward_batch_size=8, max_steps=2, eval_steps=0))
    assert 'held-out pairs' in capsys.readouterr().out and os.path.exists('out/reward_model/model.safetensors')
    main(config('again', datasets=[Source(problems_file(tmp_path))], rewards=['model'], reward_model_path='out/reward_model', max_steps=2, eval_steps=0, max_prompt_length=100))
    assert all('model' in e.rewards for e in read_completions('again/rollouts.jsonl'))


def test_a_foreign_reward_model_reads_texts(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models, pre_tokenizers
    backend = Tokenizer(models.WordLevel({'[UNK]': 0, '[PAD]': 1, 'What': 2, 'is': 3}, unk_token='[UNK]'))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='[UNK]', pad_token='[PAD]', model_max_length=64).save_pretrained(tmp_path / 'bert')
    BertForSequenceClassification(BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                             max_position_embeddings=64, num_labels=1)).save_pretrained(tmp_path / 'bert')
    main(config(datasets=[Source(problems_file(tmp_path))], rewards=['model'], reward_model_path=str(tmp_path / 'bert'), max_steps=1, eval_steps=0, max_prompt_length=100))
    assert len({e.reward for e in read_completions('out/rollouts.jsonl')}) > 1


# ---- forty mistakes ----------------------------------------------------------------------------------------

YAML = 'training:\n  algorithm: grpo\n'
MISTAKES = {                        # command line -> words of the one line that it ends with
    'unknown algorithm': (['training.algorithm=grop'], ['grop', 'grpo']),
    'another script': (['training.algorithm=dpo'], ['train_dpo.py']),
    'unknown key': (['training.num_generation=4'], ['num_generation', 'num_generations']),
    'not a number': (['training.learning_rate=fast'], ['learning_rate', 'fast', 'float']),
    'zero where one is least': (['training.num_iterations=0'], ['num_iterations', '1 or more']),
    'a schedule that waits for a loss': (['--lr_scheduler=plateau'], ['plateau', 'eval_loss']),
    'zero rate': (['training.learning_rate=0'], ['learning_rate', 'above 0']),
    'discount above one': (['training.gamma=1.5'], ['gamma', '1 or less']),
    'no steps': (['training.max_steps=0'], ['max_steps', '-1']),
    'no room for completions': (['data.max_length=100', 'data.max_prompt_length=100'], ['max_prompt_length', 'no room']),
    'a group of one': (['training.num_generations=1'], ['num_generations=1', '2 or more']),
    'ppo without a critic': (['training.algorithm=ppo'], ['value_model_name']),
    'ppo with groups': (['training.algorithm=ppo', 'model.value_model_name=tiny', '--scale=group'], ['scale', 'critic']),
    'ppo with refills': (['training.algorithm=ppo', 'model.value_model_name=tiny', '--dynamic_sampling'], ['dynamic_sampling', 'no groups']),
    'ppo with epsilon': (['training.algorithm=ppo', 'model.value_model_name=tiny', '--epsilon=0.1'], ['cliprange', 'epsilon']),
    'ppo with rewards one by one': (['training.algorithm=ppo', 'model.value_model_name=tiny', '--multi_objective_aggregation=normalize_then_sum'],
                                    ['normalize_then_sum', 'ppo']),
    'critic settings without a critic': (['training.gamma=0.9'], ['gamma', 'ppo']),
    'sequence ratio over tokens': (['--ratio=sequence', '--mean=token'], ['mean=token', 'length']),
    'geometric mean over tokens': (['--surrogate=gmpo', '--mean=token'], ['gmpo', 'mean=sequence']),
    'ratio without a ratio': (['--surrogate=reinforce', '--ratio=sequence'], ['reinforce', 'ratio']),
    'old data without a ratio': (['--surrogate=reinforce', '--num_iterations=2'], ['reinforce', 'older policy']),
    'dual clip below one': (['--dual_clip=0.5'], ['dual_clip', 'above 1']),
    'epsilon of one': (['training.epsilon=1'], ['epsilon', 'below 1']),
    'nothing to adapt': (['--kl_target=0.1', '--beta=0'], ['kl_target', 'beta']),
    'bits without adapters': (['model.load_in_4bit=true'], ['use_lora']),
    'two kinds of bits': (['model.load_in_4bit=true', 'model.load_in_8bit=true', 'model.use_lora=true'], ['exclude']),
    'two precisions': (['--bf16', '--fp16'], ['bf16 and fp16']),
    'deepspeed': (['training.deepspeed_config=zero3.json'], ['DeepSpeed', 'num_gpus']),
    'weights without rewards': (['--reward_weights=1'], ['reward_weights', 'name the rewards']),
    'recipe that is no YAML': (['--recipe', 'broken.yaml'], ['broken.yaml', 'YAML']),
    'recipe that is a list': (['--recipe', 'list.yaml'], ['list.yaml', 'section']),
    'reward file that is not there': (['--reward=none.py:score'], ['none.py']),
    'unknown reward': (['--reward=exakt'], ['exakt', 'exact']),
    'reward of an absent model': (['--reward=model'], ['reward_model_path']),
    'reward model that is none': (['--reward=model', 'model.reward_model_path=tiny'], ['Qwen3ForCausalLM', 'sequence classifier']),
    'generation longer than the context': (['--max_completion_length=400'], ['max_completion_length=400', '384']),
    'model that is not there': (['model.base_model_name=./nowhere'], ['nowhere']),
    'data that is not there': (['data.datasets[0].name=nowhere.jsonl'], ['nowhere.jsonl', 'no such file']),
    'column that is not there': (['data.datasets[0].name=sums.jsonl', 'data.datasets[0].answer_column=anser'], ['anser', "did you mean 'answer'"]),
    'answer that is empty': (['data.datasets[0].name=empty.jsonl'], ['empty.jsonl line 1', 'no answer']),
    'prompts that are too long': (['data.datasets[0].name=sums.jsonl', '--max_prompt_length=3'], ['max_prompt_length=3', 'no problem is left']),
    'pairs without a rejected side': (['data.datasets[0].name=sums.jsonl', 'data.datasets[0].chosen_column=answer'], ['rejected', 'sums.jsonl line 1']),
    'buffer longer than completions': (['--length_buffer=90', '--max_completion_length=50'], ['length_buffer=90']),
    'nothing to resume': (['--resume', '--output_dir=fresh'], ['fresh', '--resume']),
    'nothing to replay': (['--replay=3', '--output_dir=run'], ['run/rollouts.jsonl']),
}


def test_forty_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys):
    """Each is named with what was meant, before any step; no two by the same check."""
    (tmp_path / 'broken.yaml').write_text('training: [1,\n')
    (tmp_path / 'list.yaml').write_text('- training\n')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'run_config.json').write_text(json.dumps({'written_by': 'nanoforge', 'script': 'train_rl.py', 'config': {}}))
    problems_file(tmp_path)
    (tmp_path / 'empty.jsonl').write_text(json.dumps({'question': 'q', 'answer': 'so ####'}) + '\n')
    monkeypatch.setattr(sys, 'argv', ['train_rl.py'])
    assert len(MISTAKES) >= 40
    origins = {}
    for name, (argv, words) in MISTAKES.items():
        with pytest.raises((UserError, SystemExit)) as stopped:
            main(parse(Config, ['--num_problems=8', '--eval_problems=2', '--device=cpu', '--no-tensorboard', *argv]))
        said = capsys.readouterr().err
        error, message = stopped.value, str(stopped.value)
        if stopped.type is SystemExit:          # parse() has said it; the UserError is what it was handling
            assert error.code == 2, name
            error, message = error.__context__, said
        assert all(word in message for word in words) and len(message.strip().splitlines()) == 1, f'{name}: {message}'
        # where it was raised first, before a file and a row were put in front
        while isinstance(error.__context__, UserError):
            error = error.__context__
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        bound = frame.tb_frame.f_locals.get('bound')        # one line checks all ranges
        origins.setdefault((frame.tb_frame.f_code.co_filename, frame.tb_lineno, bound), []).append(name)
    assert all(len(names) == 1 for names in origins.values()), [names for names in origins.values() if len(names) > 1]
    assert not os.path.exists('models')


@pytest.mark.parametrize('algorithm', ['ppo', 'grpo', 'gspo'])
def test_shipped_recipes(algorithm, monkeypatch):
    """Each parses, explains every parameter on its line, and says what the documents say."""
    monkeypatch.setattr(sys, 'argv', ['train_rl.py'])
    for mode, rate in (('lora', 1e-4), ('qlora', 2e-4), ('full', 1e-5)):
        path = os.path.join(ROOT, f'recipes/training/{algorithm}/llama3_3B_{mode}.yaml')
        cfg = parse(Config, ['--recipe', path])
        assert (cfg.algorithm, cfg.learning_rate, cfg.use_lora, cfg.load_in_4bit) == (algorithm, rate, mode != 'full', mode == 'qlora')
        with open(path) as file:
            for line in file:
                assert not line.strip() or line.startswith('#') or '  # ' in line or line.rstrip() in ('model:', 'data:', 'training:', 'wandb:'), line
