"""train_agents.py: one update by hand, the mistakes of earlier trainers that must not be here, and short real runs."""
import copy
import glob
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

import train_agents
from conftest import ROOT
from configurator import UserError, parse
from data.tasks.env import Outcome
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig, find_model, load_model, save_model
from nanoforge.run import LossScale, setup
from train_agents import BaseModel, Candidate, Clock, Config, Group, give_advantages, load_team, plan_batches, play, rollout, update


class ScriptedEnv:
    """Two agents write; the more different characters, the better for the team, and each likes its own length. All that was executed
    is in the next prompt."""
    roles = ('first', 'second')

    def __init__(self, problem):
        self.words, self.turn, self.success = [problem['word']], 0, False

    done = property(lambda self: len(self.words) > 9)

    def prompt(self, role):
        return [{'role': 'user', 'content': f'{role}: ' + ' '.join(self.words)}]

    def score(self, role, text):
        return Outcome(len(set(text)) / 10, -abs(len(text) - {'first': 20, 'second': 10}[role]) / 30, True, text[:8])

    def step(self, role, outcome):
        self.words.append(''.join(c for c in outcome.action if c.isalnum()))
        self.turn += role == 'second'

    def view(self):
        return ' '.join(self.words)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A model of two layers with the embedded tokenizer, its weights random."""
    folder = str(tmp_path_factory.mktemp('model'))
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch='qwen3', vocab_size=1024, block_size=128, n_layer=2, n_head=2, n_embd=32, tied=True))
    save_model(model.init_weights(0.2), load_tokenizer(find_model('tiny')), folder)
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)     # logs/ goes there
    task = types.ModuleType('data.tasks.scripted')
    task.ROLES, task.ACTS, task.SETTINGS, task.Env = ScriptedEnv.roles, 'second', {}, ScriptedEnv
    task.problems = lambda split, n, seed: [{'word': f'{split} {i}'} for i in range(n)]
    monkeypatch.setitem(sys.modules, 'data.tasks.scripted', task)
    monkeypatch.setitem(train_agents.TASKS, 'scripted', 'scripted')
    return task


@pytest.fixture(scope='module')
def run():
    return setup('cpu', matmul='float32')


def config(small, benchmark='scripted', **changes):
    changes = {'base_models': {'policy_0': BaseModel(small)}, 'benchmark': benchmark, 'max_turns': 2, 'train_sample_num': 3, 'epoch_size': 2,
               'train_batch_size': 64, 'max_response_length': 8, 'max_prompt_length': 100, 'device': 'cpu', 'matmul': 'float32',
               'learning_rate': 1e-3, **changes}
    cfg = Config(**changes)
    cfg.typed = frozenset(changes)
    cfg.check()
    return cfg


def played(cfg, run, step=0):
    """(team, episodes with advantages) of one iteration."""
    team, task = load_team(cfg, run), train_agents.task_of(cfg)
    for policy in train_agents.distinct(team):
        policy.optimizer = train_agents.new_optimizer(policy, 'adamw', cfg.learning_rate, cfg.weight_decay)
    return team, rollout(cfg, team, task, train_agents.draw_problems(cfg, task, step, run), step, Clock())


def totals():
    return dict.fromkeys(train_agents.TOTALS, 0.0)


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def test_update_by_hand(small, run):
    """Two episodes, two agents, two turns, three candidates: advantages, loss and step from plain formulas and torch's own AdamW,
    candidate by candidate, each in a row of its own."""
    cfg = config(small, agents={'agent_0': train_agents.Agent('second', temperature=1.3)})
    team, episodes = played(cfg, run)
    groups = [group for episode in episodes for group in episode.groups]
    assert [(g.episode, g.turn, g.agent) for g in groups] == [(e, t, a) for e in (0, 1) for t in (0, 1) for a in ('first', 'second')]
    model, _ = load_model(small)
    loss, tokens = torch.zeros(()), sum(len(c.tokens) for g in groups for c in g.candidates)
    for group in groups:
        rewards = [c.outcome.team + c.outcome.local for c in group.candidates]
        mean = sum(rewards) / 3
        deviation = (sum((r - mean) ** 2 for r in rewards) / 2) ** 0.5
        assert group.executed == rewards.index(max(rewards))
        for candidate, reward in zip(group.candidates, rewards):
            advantage = (reward - mean) / (deviation + 1e-4)
            assert candidate.advantage == pytest.approx(advantage, abs=1e-4) and candidate.reward == pytest.approx(reward)
            row = torch.tensor([group.prompt + candidate.tokens])
            logits = model(row) / (1.3 if group.agent == 'second' else 1.0)
            logp = logits.log_softmax(-1)[0, len(group.prompt) - 1:-1].gather(1, torch.tensor(candidate.tokens)[:, None])[:, 0]
            torch.testing.assert_close(logp.detach(), torch.tensor(candidate.logp), atol=2e-5, rtol=0)      # drawn from what is trained
            ratio = (logp - torch.tensor(candidate.logp)).exp()
            loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / tokens
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    reference = torch.optim.AdamW([{'params': matrices, 'weight_decay': 0.01}, {'params': vectors, 'weight_decay': 0.0}], lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    reference.step()

    steps, groups = plan_batches(cfg, episodes, 0, run)
    sums = totals()
    update(cfg, team['first'], steps['policy_0'], groups, LossScale(torch.float32), run, sums)
    assert sums['loss'] == pytest.approx(float(loss.detach()), abs=1e-5) and sums['steps'] == 1
    assert any((a - b).abs().max() > 5e-4 for a, b in zip(before, model.parameters()))
    for (name, ours), theirs in zip(team['first'].model.named_parameters(), model.parameters()):
        # where a gradient is rounding, Adam's first step has the sign of it: there the weights may differ by the rate
        sure = theirs.grad.abs() > 1e-6
        torch.testing.assert_close(ours[sure], theirs[sure], atol=2e-5, rtol=0, msg=name)


def test_groups_are_of_one_problem_turn_and_agent(small, run):
    """32 problems with 8 candidates gave 4 groups that mixed 8 problems each."""
    cfg = config(small, epoch_size=32, train_sample_num=8, max_response_length=3)
    _, episodes = played(cfg, run)
    groups = [group for episode in episodes for group in episode.groups]
    assert len(groups) == 32 * 2 * 2 and len({tuple(group.prompt) for group in groups}) == len(groups)
    for group in groups:
        rewards = torch.tensor([c.reward for c in group.candidates])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert len(group.candidates) == 8
        torch.testing.assert_close(torch.tensor([c.advantage for c in group.candidates]), expected, atol=1e-4, rtol=1e-4)


def test_every_agent_sees_what_was_executed_before_it(small, run):
    """All agents answered before any acted; and from the second turn on the state that was seen stood still."""
    _, episodes = played(config(small, max_turns=3), run)
    for episode in episodes:
        words = [episode.problem['word']]
        for group in episode.groups:
            assert group.messages[0]['content'] == f'{group.agent}: ' + ' '.join(words)
            words.append(''.join(c for c in group.candidates[group.executed].text[:8] if c.isalnum()))
        assert len(words) == 7


def test_every_candidate_of_the_second_agent_is_scored_by_itself(small, run):
    """The second agent's candidates all had the reward of one, which is no signal; and a candidate is scored in the state that it saw."""
    _, episodes = played(config(small, train_sample_num=6), run)
    second = [group for episode in episodes for group in episode.groups if group.agent == 'second']
    assert all(len({c.reward for c in group.candidates}) > 1 for group in second)
    for group in second:
        for c in group.candidates:
            assert c.reward == pytest.approx(len(set(c.text)) / 10 - abs(len(c.text) - 10) / 30)


def test_candidates_come_from_the_distribution_that_is_trained(small, run):
    """Sampling with top_p, top_k and a repetition penalty, and scoring without, is off-policy. At another temperature too."""
    cfg = config(small, agents={'agent_0': train_agents.Agent('second', temperature=1.7)}, epoch_size=8)
    team, episodes = played(cfg, run)
    groups = [g for e in episodes for g in e.groups]
    for agent, temperature in (('first', 1.0), ('second', 1.7)):
        rows = [g for g in groups if g.agent == agent]
        logp, _, mask = train_agents.answer_stats(team[agent].model, [(g.prompt, [c.tokens for c in g.candidates]) for g in rows],
                                                  temperature, run)
        sampled = torch.tensor([value for g in rows for c in g.candidates for value in c.logp])
        torch.testing.assert_close(logp[mask].detach(), sampled, atol=2e-5, rtol=0)


def test_mixed_groups_are_refused(small):
    cfg = config(small)
    candidates = [Candidate([1], [0.0], 'a', True, reward=float(i)) for i in range(2)]
    groups = [Group(0, 0, 'first', prompt, [], '', copy.deepcopy(candidates)) for prompt in ([5, 6], [5, 7])]
    with pytest.raises(RuntimeError, match='not comparable'):
        give_advantages(cfg, [types.SimpleNamespace(number=0, groups=groups)])
    with pytest.raises(RuntimeError, match='not comparable'):
        give_advantages(cfg, [types.SimpleNamespace(number=0, groups=[Group(0, 0, 'first', [5], [], '', candidates[:1])])])


def test_no_tree_compares_whole_episodes(small, run):
    """K episodes of a problem: an agent's rewards are summed, and each of its turns has the episode's advantage."""
    cfg = config(small, rollout_mode='no_tree')
    _, episodes = played(cfg, run)
    assert len(episodes) == 6 and all(len(g.candidates) == 1 for e in episodes for g in e.groups)
    for problem in (0, 1):
        for agent in ('first', 'second'):
            rows = [[g.candidates[0] for g in e.groups if g.agent == agent] for e in episodes if e.number // 3 == problem]
            sums = torch.tensor([sum(c.reward for c in row) for row in rows])
            expected = (sums - sums.mean()) / (sums.std() + 1e-4)
            assert [c.advantage for row in rows for c in row] == pytest.approx([a for a in expected.tolist() for _ in (0, 1)], abs=1e-4)


def test_filters(small, run):
    """dapo drops groups whose rewards are equal; std and mean the share of lowest deviation and mean."""
    def group(episode, rewards):
        return Group(episode, 0, 'first', [episode + 1, 2], [], '', [Candidate([3], [0.0], '', True, reward=r) for r in rewards])

    rewards = {0: [1.0, 1.0, 1.0], 1: [5.0, 5.1, 5.0], 2: [0.0, 1.0, 2.0], 3: [-9.0, 9.0, 0.0]}
    kept = {}
    for method, ratio in (('none', 0.0), ('dapo', 0.0), ('std', 0.5), ('mean', 0.5)):
        cfg = config(small, filter_method=method, filter_ratio=ratio)
        episodes = [types.SimpleNamespace(number=e, groups=[group(e, r)]) for e, r in rewards.items()]
        give_advantages(cfg, episodes)
        steps, groups = plan_batches(cfg, episodes, 0, run)
        kept[method] = {groups[int(i)].episode for step in steps['policy_0'] for i in step[:, 1]}
    assert kept == {'none': {0, 1, 2, 3}, 'dapo': {1, 2, 3}, 'std': {2, 3}, 'mean': {1, 2}}


def test_steps_hold_train_batch_size_sequences_of_whole_groups(small, run):
    cfg = config(small, epoch_size=5, train_batch_size=8)
    _, episodes = played(cfg, run)
    steps, _ = plan_batches(cfg, episodes, 0, run)
    sizes = [len(step) for step in steps['policy_0']]
    assert sum(sizes) == 5 * 2 * 2 * 3 and set(sizes[:-1]) == {8}
    order = [int(i) for step in steps['policy_0'] for i in step[:, 1]]
    assert len(set(zip(order, order[1:]))) < len(order) and sum(a != b for a, b in zip(order, order[1:])) == len(set(order)) - 1
    assert sorted(order) == sorted(list(range(20)) * 3)


def test_gradient_does_not_depend_on_the_cut(small, run):
    """One pass over all candidates, or a pass for every few tokens: the same step."""
    found = []
    for tokens in (100_000, 60):
        cfg = config(small, micro_batch_tokens=tokens, entropy_coef=0.01)
        team, episodes = played(cfg, run)
        steps, groups = plan_batches(cfg, episodes, 0, run)
        passes = len(train_agents.micro_batches(cfg, steps['policy_0'][0], groups, run))
        assert passes == 1 if tokens > 60 else passes > 5
        team['first'].optimizer.step = lambda: None
        update(cfg, team['first'], steps['policy_0'], groups, LossScale(torch.float32), run, totals())
        found.append(torch.cat([grad.clone() for grad in team['first'].optimizer.grads]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


def test_gradients_that_are_not_finite_skip_and_then_stop(small, run):
    cfg = config(small, train_batch_size=8)
    team, episodes = played(cfg, run)
    steps, groups = plan_batches(cfg, episodes, 0, run)
    before, sums = weights(team['first']), totals()
    for group in groups:
        group.candidates[0].advantage = float('nan')
    with pytest.raises(UserError, match='learning_rate'):
        for _ in range(3):
            update(cfg, team['first'], steps['policy_0'], groups, LossScale(torch.float32), run, sums)
    assert sums['skipped'] == sums['steps'] == 4 and all(torch.equal(p, before[name]) for name, p in weights(team['first']).items())


@pytest.mark.parametrize('level', ['lora', 'full'])
def test_policies_learn_from_their_own_agents_only(small, run, level):
    cfg = config(small, specialization=level)
    team, episodes = played(cfg, run)
    assert team['first'].name != team['second'].name and (team['first'].model is team['second'].model) == (level == 'lora')
    for agent in ('first', 'second'):
        for p in team[agent].use().parameters():
            p.data.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) if p.requires_grad else 0)
    before = {agent: weights(team[agent]) for agent in team}
    steps, groups = plan_batches(cfg, episodes, 0, run)
    assert {g.agent for name in steps for step in steps[name] for g in [groups[int(i)] for i in step[:, 1]]} == {'first', 'second'}
    update(cfg, team['first'], steps[team['first'].name], groups, LossScale(torch.float32), run, totals())
    changed = {agent: {name for name, p in weights(team[agent]).items() if not torch.equal(p, before[agent][name])} for agent in team}
    if level == 'full':
        assert changed['first'] and not changed['second']
    else:
        assert changed['first'] and all('.lora.first.' in name for name in changed['first'])


def test_candidates_do_not_depend_on_who_else_plays(small, run):
    """A problem alone, or among others (on another rank): the same candidates."""
    cfg = config(small, epoch_size=4)
    team, task = load_team(cfg, run), train_agents.task_of(cfg)
    cases = train_agents.draw_problems(cfg, task, 0, run)
    whole, part = (play(cfg, team, task, some, 7, 3, Clock()) for some in (cases, cases[2:3]))
    texts = lambda episode: [[c.text for c in g.candidates] for g in episode.groups]
    assert texts(whole[2]) == texts(part[0]) and texts(whole[1]) != texts(whole[2])


def test_validation_never_branches_and_is_repeatable(small, run):
    cfg = config(small, validate_episodes=6)
    team, task = load_team(cfg, run), train_agents.task_of(cfg)
    os.makedirs('validate')
    cases = train_agents.held_out_problems(cfg, task, run)
    metrics = train_agents.validate(cfg, team, task, cases, 3, '.', run)
    assert metrics == train_agents.validate(cfg, team, task, cases, 4, '.', run)
    rows = [json.loads(line) for line in open('validate/step-3.jsonl')]
    assert len(rows) == 12 and all(len(turn['candidates']) == 1 for row in rows for turn in row['turns'])
    assert {'validation/success_rate', 'validation/greedy_success_rate', 'validation/reward', 'validation/episode_length'} <= set(metrics)


# ---- short real runs ----------------------------------------------------------------------------------------------------------

SHORT = ['env.benchmark=plan_path', 'training.experiment_name=x', 'training.total_training_steps=4', 'training.epoch_size=3',
         'training.train_batch_size=16', 'training.train_sample_num=3', 'training.max_response_length=12', 'training.val_freq=2',
         'training.validate_episodes=3', 'training.learning_rate=1e-3', 'env.max_turns=2', '--no-tensorboard', '--device=cpu', '--matmul=float32']


def go(small, *words):
    """A run in this process; what it said."""
    cfg = parse(Config, [*SHORT, f'base_models.policy_0.path={small}', *words])
    train_agents.main(cfg)
    return open(f'logs/{cfg.experiment_name}/latest/train.log').read()


def start(small, *words, launcher=()):
    command = [sys.executable, *launcher, os.path.join(ROOT, 'train_agents.py'), *SHORT, f'base_models.policy_0.path={small}', *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    return text


def saved(experiment='x', folder='last', policy=''):
    with open(os.path.join('logs', experiment, 'latest', 'checkpoints', folder, policy, 'model.safetensors'), 'rb') as file:
        return file.read()


def test_a_run_leaves_what_is_documented(small):
    text = go(small, 'demonstrations.steps=3', 'demonstrations.batch_size=8')
    assert all(word in text for word in ('reward', 'success_rate', 'episode_length', 'demonstrations 3/3', 'context of the model is 128'))
    assert not glob.glob('logs/x/*/train.log') == [] and os.path.islink('logs/x/latest')
    folder = glob.glob('logs/x/*-*-*/*-*-*')[0]
    assert {'train.log', 'summary.log', 'checkpoints', 'validate', 'log.jsonl', 'episodes.jsonl', 'episodes.html'} <= set(os.listdir(folder))
    assert [int(line.split()[1]) for line in open(f'{folder}/summary.log')] == [0, 1, 2, 2, 3, 4, 4]
    assert sorted(os.listdir(f'{folder}/validate')) == ['step-0.jsonl', 'step-2.jsonl', 'step-4.jsonl']
    model, tokenizer = load_model(f'{folder}/checkpoints')
    episodes = [json.loads(line) for line in open(f'{folder}/episodes.jsonl')]
    assert [e['step'] for e in episodes] == [1, 1, 2, 2, 3, 3, 4, 4]
    for turn in episodes[-1]['turns']:      # the transcript is what the model saw, token for token
        assert tokenizer.decode(turn['prompt_ids']).endswith('<|im_start|>assistant\n') and len(turn['candidates']) == 3
        assert turn['messages'][-1]['content'] in tokenizer.decode(turn['prompt_ids'])
        best = max(turn['candidates'], key=lambda c: c['reward'])
        assert turn['candidates'][turn['executed']]['reward'] == best['reward']
    page = open(f'{folder}/episodes.html').read()
    assert page.count('<details>') == 8 + 6 and 'class=executed' in page and page.count('<svg') == 2 and '<script' not in page
    lines = [json.loads(line) for line in open(f'{folder}/log.jsonl')]
    step = next(line for line in lines if line.get('step') == 3)
    assert {'loss', 'reward', 'success_rate', 'episode_length', 'plan_agent/reward', 'time/rollout', 'time/generate', 'sampling/logp_gap'} <= set(step)
    assert step['sampling/logp_gap'] < 1e-4

    text = go(small, '--eval_only', f'base_models.policy_0.path={folder}/checkpoints', 'training.experiment_name=y')
    last = [line for line in lines if 'validation/reward' in line][-1]
    if os.readlink(f'{folder}/checkpoints/best') == os.readlink(f'{folder}/checkpoints/last'):
        assert f"validation/reward {last['validation/reward']:.4f}" in text


def test_killed_and_resumed_is_the_same_run(small):
    go(small)
    process = start(small, 'training.experiment_name=killed')
    while not glob.glob('logs/killed/latest/checkpoints/checkpoint-2/manifest.json'):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    go(small, 'training.experiment_name=killed', '--resume')
    assert saved() == saved('killed')
    for name in ('optimizer.safetensors', 'trainer_state.json'):
        a, b = (open(f'logs/{e}/latest/checkpoints/last/{name}', 'rb').read() for e in ('x', 'killed'))
        assert a == b
    steps = [[json.loads(line)['step'] for line in open(f'logs/{e}/latest/episodes.jsonl')] for e in ('x', 'killed')]
    assert steps[0] == steps[1]
    with pytest.raises(UserError, match='holds no run'):
        go(small, 'training.experiment_name=nothing', '--resume')
    for path in glob.glob('logs/killed/latest/checkpoints/checkpoint-*/model.safetensors'):
        os.truncate(path, 100)
    with pytest.raises(UserError, match='no whole checkpoint'):
        go(small, 'training.experiment_name=killed', '--resume')


def test_sigterm_saves_and_says_how_to_go_on(small):
    process = start(small, 'training.total_training_steps=500', 'training.val_freq=400')
    while not glob.glob('logs/x/latest/episodes.jsonl'):
        time.sleep(0.02)
        assert process.poll() is None
    process.terminate()
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and '--resume' in text and os.path.exists('logs/x/latest/checkpoints/last/model.safetensors')


def test_two_ranks_train_what_one_does(small):
    """Uneven episodes: three on two ranks, of different lengths. The same candidates, steps and weights up to rounding."""
    go(small, 'training.total_training_steps=2', 'filter_method=dapo')
    finish(start(small, 'training.total_training_steps=2', 'filter_method=dapo', 'training.experiment_name=two',
                 launcher=['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']))
    logs = [[json.loads(line) for line in open(f'logs/{e}/latest/log.jsonl')] for e in ('x', 'two')]
    for one, two in zip(*([line for line in log if 'loss' in line] for log in logs)):
        for key in ('loss', 'reward', 'episode_length', 'grad_norm', 'optimizer_steps', 'groups', 'dead_groups', 'plan_agent/tokens'):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    models = [load_model(f'logs/{e}/latest/checkpoints/last')[0] for e in ('x', 'two')]
    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(*(model.parameters() for model in models))])
    assert gaps.median() < 1e-5


def test_two_shards_are_one_model(small):
    """GPU_num=2 starts two processes that hold half of the heads each; what they save is whole, and goes on in one process."""
    words = ['training.total_training_steps=2', 'training.learning_rate=1e-4', 'training.val_freq=1']
    go(small, *words)
    finish(start(small, *words, 'GPU_num=2', 'training.experiment_name=two', 'training.total_training_steps=1'))
    go(small, *words, 'training.experiment_name=two', '--resume')
    logs = [[json.loads(line) for line in open(f'logs/{e}/latest/log.jsonl')] for e in ('x', 'two')]
    for one, two in zip(*([line for line in log if 'loss' in line] for log in logs)):
        for key in ('loss', 'reward', 'grad_norm', 'optimizer_steps', 'dead_groups', 'plan_agent/tokens'):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    models = [load_model(f'logs/{e}/latest/checkpoints/last')[0] for e in ('x', 'two')]
    assert max((a - b).abs().max() for a, b in zip(*(model.parameters() for model in models))) < 5e-4
    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(*(model.parameters() for model in models))])
    assert gaps.median() < 1e-6


@pytest.mark.parametrize('level', ['lora', 'full'])
def test_levels_run_resume_and_are_evaluated(small, level):
    words = [f'specialization={level}', 'training.total_training_steps=2', 'training.val_freq=1']
    go(small, *words, 'demonstrations.steps=2', 'demonstrations.batch_size=8', 'demonstrations.learning_rate=1e-3')
    policies = ['tool_agent', 'plan_agent'] if level == 'lora' else ['policy_0', 'policy_1']
    checkpoints = 'logs/x/latest/checkpoints'
    assert set(policies) <= set(os.listdir(f'{checkpoints}/last'))
    file = 'adapter_model.safetensors' if level == 'lora' else 'model.safetensors'
    before = [open(f'{checkpoints}/last/{policy}/{file}', 'rb').read() for policy in policies]
    assert before[0] != before[1]
    go(small, *words, 'training.experiment_name=again', 'demonstrations.steps=2', 'demonstrations.batch_size=8',
                 'demonstrations.learning_rate=1e-3', 'training.total_training_steps=1')
    go(small, *words, 'training.experiment_name=again', '--resume', 'training.total_training_steps=2')
    assert before == [open(f'logs/again/latest/checkpoints/last/{policy}/{file}', 'rb').read() for policy in policies]
    text = go(small, f'specialization={level}', '--eval_only', 'training.experiment_name=y',
                        f'base_models.policy_0.path={os.path.realpath(checkpoints + "/last")}')
    last = [json.loads(line) for line in open('logs/x/latest/log.jsonl')][-1]
    assert f"validation/reward {last['validation/reward']:.4f}" in text


@pytest.mark.parametrize('words, said', [
    (['training.total_trainin_steps=3'], ['total_trainin_steps', 'total_training_steps']), (['env.benchmark=chess'], ['chess', 'sokoban', 'env.name']), (['env.name=chess'], ['chess', 'sokoban']),
    (['env.benchmark=sudoku', 'env.min_moves=3'], ['env.min_moves', 'sudoku', 'min_blanks']), (['training.train_sample_num=1'], ['two candidates']),
    (['turn_order=tool_agent'], ['plan_agent']), (['turn_order=reader plan_agent'], ['reader', 'tool_agent']),
    (['filter_method=std'], ['filter_ratio']), (['filter_ratio=0.3'], ['filter_method']), (['training.epoch_size=0'], ['epoch_size']),
    (['specialization=lora', 'GPU_num=2'], ['GPU_num', 'adapters']), (['base_models.policy_1.path=tiny'], ['policy_1', 'specialization=full']), (['env.dataset=polaris', 'env.benchmark=sokoban'], ['polaris', 'sokoban']),
    (['agent_policy_configs.agent_configs.agent_0.name=judge'], ['judge', 'plan_agent']), (['training.learning_rate=-1'], ['learning_rate'])])
def test_mistakes_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count('\n') == 1 and all(word in message for word in said), message


def test_documented_configuration():
    cfg = parse(Config, ['GPU_num=1', 'base_models.policy_0.path=tiny', 'training.epoch_size=10', 'env.dataset=suduku',
                         'agent_policy_configs.agent_configs.agent_0.name=plan_agent',
                         'agent_policy_configs.agent_configs.agent_0.train_llm_config.temperature=1.5'])
    assert cfg.base_models['policy_0'].path == 'tiny' and cfg.agents['agent_0'].temperature == 1.5 and cfg.epoch_size == 10
    assert train_agents.task_of(cfg).__name__ == 'data.tasks.sudoku' and cfg.order == ['tool_agent', 'plan_agent']
    with pytest.raises(UserError, match='base_models.policy_7'):
        load_team(Config(base_models={'policy_7': BaseModel('tiny')}, specialization='full', benchmark='plan_path'), None)
