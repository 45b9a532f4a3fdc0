"""train_agents.py: one update by hand, the mistakes of earlier trainers that must not be here,
and short real runs."""
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

import train_agents
from conftest import ROOT, ranks
from configurator import UserError, as_dict, check_settings, from_dict, parse
from data.chat import fold_system
from data.tasks import env as environments
from data.tasks.env import Outcome
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig, find_model, load_model, save_model
from nanoforge.run import Run, seed_for, setup
from train_agents import BaseModel, Candidate, Config, Group, comparable_groups, load_policies, optimizer_steps, rollout


class ScriptedEnv:
    """Two agents write; the more different characters, the better for the team,
    and each likes its own length. All that was executed is in the next prompt."""
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
    """logs/ goes to a folder of the test's own, and there is an environment `scripted`,
    found by its file's name like any other."""
    monkeypatch.chdir(tmp_path)
    task = types.ModuleType('data.tasks.scripted')
    task.ROLES, task.ACTS, task.SETTINGS, task.Env = ScriptedEnv.roles, 'second', {}, ScriptedEnv
    task.problems = lambda split, n, seed: [{'word': f'{split} {i}'} for i in range(n)]
    monkeypatch.setitem(sys.modules, 'data.tasks.scripted', task)
    known = {**environments.known_tasks(), 'scripted': ()}
    monkeypatch.setattr(environments, 'known_tasks', lambda: known)
    return task


@pytest.fixture(scope='module')
def run():
    return setup('cpu', matmul='float32')


def config(small, benchmark='scripted', **changes):
    changes = {'base_models': {'policy_0': BaseModel(small)}, 'benchmark': benchmark, 'max_turns': 2, 'train_sample_num': 3, 'epoch_size': 2,
               'train_batch_size': 64, 'max_response_length': 8, 'max_prompt_length': 100, 'device': 'cpu', 'matmul': 'float32',
               'learning_rate': 1e-3, 'tensorboard': False, 'total_training_steps': 1, 'val_before_train': False, 'validate_episodes': 1,
               **changes}
    cfg = Config(**changes)
    cfg.typed = frozenset(changes)
    check_settings(cfg)
    return cfg


def players(cfg, run):
    """(team, temperatures of training)"""
    team = {agent: policy for policy in load_policies(cfg, run) for agent in policy.agents}
    return team, {name: agent.temperature for name, agent in train_agents.agents_of(cfg).items()}


def played(cfg, run, step=0):
    """(team, trajectories) of one rollout."""
    team, temperatures = players(cfg, run)
    task, samples = train_agents.task_of(cfg), cfg.train_sample_num if cfg.rollout_mode == 'tree' else 1
    problems = train_agents.draw_problems(cfg, task, step, run)
    return team, rollout(cfg, team, task, problems, seed_for(cfg.seed, 'play', step), samples, temperatures)


def iterate(cfg, monkeypatch):
    """main() for one iteration -> (its trajectories, its line of log.jsonl).
    What it trained is in logs/agents/latest."""
    kept = []
    monkeypatch.setattr(train_agents, 'write_trajectories', lambda cfg, trajectories, *rest: kept.extend(trajectories))
    train_agents.main(cfg)
    lines = [json.loads(line) for line in open('logs/agents/latest/log.jsonl')]
    return kept, next(line for line in lines if 'loss' in line)


def spy(monkeypatch, owner, name, note):
    """`owner.name` as it is, with note(result, *arguments) behind each call."""
    plain = getattr(owner, name)

    def spied(*arguments, **named):
        result = plain(*arguments, **named)
        note(result, *arguments)
        return result
    monkeypatch.setattr(owner, name, spied)


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def test_update_by_hand(small, monkeypatch):
    """Two problems, two agents, two turns, three candidates: advantages, loss and step from plain formulas
    and torch's own AdamW, candidate by candidate, each in a row of its own."""
    cfg = config(small, agents={'agent_0': train_agents.Agent('second', temperature=1.3)})
    trajectories, line = iterate(cfg, monkeypatch)
    groups = [group for trajectory in trajectories for group in trajectory.groups]
    assert [(t.number, g.turn, g.agent) for t in trajectories for g in t.groups] == [
        (n, turn, agent) for n in (0, 1) for turn in (0, 1) for agent in ('first', 'second')]
    model, _ = load_model(small)
    loss, tokens = torch.zeros(()), sum(len(c.tokens) for g in groups for c in g.candidates)
    for group in groups:
        rewards = [c.outcome.team + c.outcome.local for c in group.candidates]
        mean = sum(rewards) / 3
        deviation = (sum((r - mean) ** 2 for r in rewards) / 2) ** 0.5
        assert group.chosen == rewards.index(max(rewards))
        for candidate, reward in zip(group.candidates, rewards):
            advantage = (reward - mean) / (deviation + 1e-4)
            assert candidate.advantage == pytest.approx(advantage, abs=1e-4) and candidate.reward == pytest.approx(reward)
            row = torch.tensor([candidate.prompt + candidate.tokens])
            logits = model(row) / (1.3 if group.agent == 'second' else 1.0)
            logp = logits.log_softmax(-1)[0, len(candidate.prompt) - 1:-1].gather(1, torch.tensor(candidate.tokens)[:, None])[:, 0]
            # drawn from what is trained
            torch.testing.assert_close(logp.detach(), torch.tensor(candidate.logp), atol=2e-5, rtol=0)
            ratio = (logp - torch.tensor(candidate.logp)).exp()
            loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / tokens
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    reference = torch.optim.AdamW([{'params': matrices, 'weight_decay': 0.01}, {'params': vectors, 'weight_decay': 0.0}], lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    reference.step()

    assert line['loss'] == pytest.approx(float(loss.detach()), abs=1e-5) and line['optimizer_steps'] == 1
    trained = load_model('logs/agents/latest/checkpoints/last')[0]
    assert any((a - b).abs().max() > 5e-4 for a, b in zip(before, model.parameters()))
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters()):
        # where a gradient is rounding, Adam's first step has the sign of it:
        # there the weights may differ by the rate
        sure = theirs.grad.abs() > 1e-6
        torch.testing.assert_close(ours[sure], theirs[sure], atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize('dual_clip', [3.0, 1.1, None])
def test_the_loss_is_train_rls_policy_loss(small, monkeypatch, dual_clip):
    """Of every micro-batch, entropy bonus aside; with ratios far from 1,
    as there are three passes at a high rate."""
    from train_rl import policy_loss
    cfg = config(small, ppo_epochs=3, learning_rate=0.02, max_grad_norm=0.0, train_batch_size=8, clip_low=0.1, clip_high=0.3,
                 dual_clip=dual_clip, agents={'agent_0': train_agents.Agent('second', temperature=1.3)})
    calls, losses, tokens = [], [], []
    spy(monkeypatch, train_agents, 'forward', lambda result, model, candidates, run: calls.append((candidates, result)))
    spy(monkeypatch, Run, 'backward', lambda _, run, loss: losses.append(loss.detach()))
    steps = train_agents.optimizer_steps

    def noted(*arguments):
        for policy, count, candidates in steps(*arguments):
            tokens.append((len(losses), count))             # the step's tokens, and where its losses begin
            yield policy, count, candidates
    monkeypatch.setattr(train_agents, 'optimizer_steps', noted)
    iterate(cfg, monkeypatch)
    clipped = []
    assert len(losses) == len(calls) > len(tokens) > 8
    for i, (loss, (candidates, (logp, _, mask))) in enumerate(zip(losses, calls)):
        old = torch.zeros_like(logp)
        old[mask] = torch.tensor([value for c in candidates for value in c.logp])
        advantages = torch.tensor([c.advantage for c in candidates])
        normaliser = next(count for begin, count in reversed(tokens) if begin <= i)
        expected, stats = policy_loss(logp.detach(), old, advantages, mask, clip_low=0.1, clip_high=0.3, dual_clip=dual_clip,
                                      normaliser=normaliser)
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
        clipped.append(float(stats['clip_ratio/region_mean']))
    assert clipped[0] == 0 and max(clipped) > 0.1


@pytest.mark.parametrize('mode', ['tree', 'no_tree'])
def test_the_advantages_are_train_rls_group_advantages(small, monkeypatch, mode):
    from train_rl import group_advantages
    cfg = config(small, rollout_mode=mode, train_sample_num=5, epoch_size=3)
    trajectories, _ = iterate(cfg, monkeypatch)
    members = [(number, member) for number, group in enumerate(comparable_groups(cfg, trajectories).values()) for member in group]
    rewards = torch.tensor([sum(c.reward for c in member) for _, member in members])
    expected = group_advantages(rewards, torch.tensor([number for number, _ in members])).tolist()
    assert len(members) == (5 * 3 * 4 if mode == 'tree' else 5 * 3 * 2) and any(expected)
    for (_, member), advantage in zip(members, expected):
        assert [c.advantage for c in member] == pytest.approx([advantage] * len(member), abs=1e-5)


def test_equal_rewards_have_no_advantage(small, monkeypatch, scratch):
    """Exactly: a tenth in binary, thrice, has a mean that is not a tenth."""
    monkeypatch.setattr(ScriptedEnv, 'score', lambda self, role, text: Outcome(0.1, 0.0, True, text[:8]))
    trajectories, line = iterate(config(small), monkeypatch)
    assert all(c.advantage == 0 for t in trajectories for g in t.groups for c in g.candidates)
    assert line['dead_groups'] == line['groups'] == 8 and line['loss'] == line['grad_norm'] == 0


def test_groups_are_of_one_problem_turn_and_agent(small, monkeypatch):
    """32 problems with 8 candidates gave 4 groups that mixed 8 problems each."""
    cfg = config(small, epoch_size=32, train_sample_num=8, max_response_length=3)
    trajectories, line = iterate(cfg, monkeypatch)
    groups = comparable_groups(cfg, trajectories)
    prompts = [{tuple(c.prompt) for member in members for c in member} for members in groups.values()]
    assert len(groups) == line['groups'] == 32 * 2 * 2 and all(len(each) == 1 for each in prompts) and len(set.union(*prompts)) == len(groups)
    for members in groups.values():
        rewards = torch.tensor([c.reward for c, in members])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert len(members) == 8
        torch.testing.assert_close(torch.tensor([c.advantage for c, in members]), expected, atol=1e-4, rtol=1e-4)


def test_every_agent_sees_what_was_executed_before_it(small, run):
    """All agents answered before any acted; and from the second turn on the state
    that was seen stood still."""
    _, trajectories = played(config(small, max_turns=3), run)
    for trajectory in trajectories:
        words = [trajectory.problem['word']]
        for group in trajectory.groups:
            assert group.messages[0]['content'] == f'{group.agent}: ' + ' '.join(words)
            words.append(''.join(c for c in group.candidates[group.chosen].text[:8] if c.isalnum()))
        assert len(words) == 7


def test_every_candidate_of_the_second_agent_is_scored_by_itself(small, run):
    """The second agent's candidates all had the reward of one, which is no signal;
    and a candidate is scored in the state that it saw."""
    _, trajectories = played(config(small, train_sample_num=6), run)
    second = [group for trajectory in trajectories for group in trajectory.groups if group.agent == 'second']
    assert all(len({c.reward for c in group.candidates}) > 1 for group in second)
    for group in second:
        for c in group.candidates:
            assert c.reward == pytest.approx(len(set(c.text)) / 10 - abs(len(c.text) - 10) / 30)


def test_candidates_come_from_the_distribution_that_is_trained(small, run):
    """Sampling with top_p, top_k and a repetition penalty, and scoring without, is off-policy.
    At another temperature too."""
    cfg = config(small, agents={'agent_0': train_agents.Agent('second', temperature=1.7)}, epoch_size=8)
    team, trajectories = played(cfg, run)
    for agent, temperature in (('first', 1.0), ('second', 1.7)):
        candidates = [c for t in trajectories for g in t.groups if g.agent == agent for c in g.candidates]
        assert {c.temperature for c in candidates} == {temperature}
        logp, _, mask = train_agents.forward(team[agent].model, candidates, run)
        sampled = torch.tensor([value for c in candidates for value in c.logp])
        torch.testing.assert_close(logp[mask].detach(), sampled, atol=2e-5, rtol=0)


def test_no_tree_compares_whole_trajectories(small, monkeypatch):
    """K trajectories of a problem: an agent's rewards are summed,
    and each of its turns has the trajectory's advantage."""
    cfg = config(small, rollout_mode='no_tree')
    trajectories, _ = iterate(cfg, monkeypatch)
    assert len(trajectories) == 6 and all(len(g.candidates) == 1 for t in trajectories for g in t.groups)
    for problem in (0, 1):
        for agent in ('first', 'second'):
            rows = [[g.candidates[0] for g in t.groups if g.agent == agent] for t in trajectories if t.number // 3 == problem]
            sums = torch.tensor([sum(c.reward for c in row) for row in rows])
            expected = (sums - sums.mean()) / (sums.std() + 1e-4)
            assert [c.advantage for row in rows for c in row] == pytest.approx([a for a in expected.tolist() for _ in (0, 1)], abs=1e-4)


def test_filters(small, run):
    """dapo drops groups whose rewards are equal; std and mean the share of lowest deviation and mean."""
    rewards = {0: [1.0, 1.0, 1.0], 1: [5.0, 5.1, 5.0], 2: [0.0, 1.0, 2.0], 3: [-9.0, 9.0, 0.0]}
    trajectories = []
    for number, values in rewards.items():
        candidates = [Candidate([number + 1, 2], [3], reward=r, advantage=r - sum(values) / 3) for r in values]
        trajectories.append(types.SimpleNamespace(number=number, groups=[Group(0, 'first', [], False, '', candidates)]))
    kept = {}
    for method, ratio in (('none', 0.0), ('dapo', 0.0), ('std', 0.5), ('mean', 0.5)):
        cfg = config(small, filter_method=method, filter_ratio=ratio)
        policies = [types.SimpleNamespace(name='policy_0', agents=['first', 'second'])]
        steps = optimizer_steps(cfg, policies, comparable_groups(cfg, trajectories), 0, run)
        kept[method] = {c.prompt[0] - 1 for _, _, candidates in steps for c in candidates}
    assert kept == {'none': {0, 1, 2, 3}, 'dapo': {1, 2, 3}, 'std': {2, 3}, 'mean': {1, 2}}


def test_steps_hold_train_batch_size_sequences_of_whole_groups(small, run):
    cfg = config(small, epoch_size=5, train_batch_size=8)
    team, trajectories = played(cfg, run)
    steps = list(optimizer_steps(cfg, [team['first']], comparable_groups(cfg, trajectories), 0, run))
    sizes = [len(candidates) for _, _, candidates in steps]
    assert sum(sizes) == 5 * 2 * 2 * 3 and set(sizes[:-1]) == {8}
    assert all(tokens == sum(len(c.tokens) for c in candidates) for _, tokens, candidates in steps)
    prompts = [id(g.candidates[0].prompt) for t in trajectories for g in t.groups]
    order = [prompts.index(id(c.prompt)) for _, _, candidates in steps for c in candidates]
    assert sum(a != b for a, b in zip(order, order[1:])) == len(set(order)) - 1 and order != sorted(order)
    assert sorted(order) == sorted(list(range(20)) * 3)


def test_gradient_does_not_depend_on_the_cut(small, monkeypatch):
    """One pass over all candidates, or a pass for every few tokens: the same step."""
    gradients, passes = [], []
    plain = Run.step

    def step(run, optimizer, lr, max_norm):
        gradients.append(torch.cat([grad.clone() for grad in optimizer.grads]))
        return plain(run, optimizer, lr, max_norm)
    monkeypatch.setattr(Run, 'step', step)
    spy(monkeypatch, Run, 'backward', lambda *_: passes.append(len(gradients)))
    for tokens in (100_000, 60):
        train_agents.main(config(small, micro_batch_tokens=tokens, entropy_coef=0.01))
    assert passes.count(0) == 1 and passes.count(1) > 5
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_gradients_that_are_not_finite_skip_and_then_stop(small, monkeypatch):
    teams, norms, plain = [], [], train_agents.forward
    spy(monkeypatch, train_agents, 'load_policies', lambda policies, *_: teams.append(policies))
    spy(monkeypatch, Run, 'step', lambda norm, *_: norms.append(norm))
    monkeypatch.setattr(train_agents, 'forward', lambda *a: (plain(*a)[0] * float('nan'), *plain(*a)[1:]))
    with pytest.raises(UserError, match='learning_rate'):
        train_agents.main(config(small, train_batch_size=4))
    before = dict(load_model(small)[0].named_parameters())
    assert len(norms) == 4 and not any(map(torch.isfinite, map(torch.tensor, norms)))       # the fifth raises
    assert all(torch.equal(p, before[name]) for name, p in weights(teams[0][0]).items())
    with monkeypatch.context() as patch:
        patch.setattr('nanoforge.run.MAX_BAD_STEPS', 99)
        _, line = iterate(config(small, train_batch_size=8), patch)
    assert line['skipped_steps'] == line['optimizer_steps'] == 3 and line['loss'] is None and line['grad_norm'] == 0


@pytest.mark.parametrize('level', ['lora', 'full'])
def test_policies_learn_from_their_own_agents_only(small, monkeypatch, level):
    """Steps of the first agent's policy alone: they move its weights, and no other's."""
    seen, teams, plain = [], [], train_agents.optimizer_steps

    def perturb(policies, *_):
        for policy in policies:
            for p in policy.use().parameters():
                p.data.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) if p.requires_grad else 0)
        teams.append({policy.agents[0]: policy for policy in policies})
        teams.append({policy.agents[0]: weights(policy) for policy in policies})

    def steps_of_the_first(*arguments):
        for policy, tokens, candidates in plain(*arguments):
            seen.append((policy.agents, {id(c.prompt) for c in candidates}))
            if policy.agents == ['first']:
                yield policy, tokens, candidates
    spy(monkeypatch, train_agents, 'load_policies', perturb)
    monkeypatch.setattr(train_agents, 'optimizer_steps', steps_of_the_first)
    trajectories, _ = iterate(config(small, specialization=level), monkeypatch)
    team, before = teams
    assert team['first'].name != team['second'].name and (team['first'].model is team['second'].model) == (level == 'lora')
    for agent in ('first', 'second'):
        prompts = {id(g.candidates[0].prompt) for t in trajectories for g in t.groups if g.agent == agent}
        assert prompts == set.union(*(own for agents, own in seen if agents == [agent]))
    changed = {agent: {name for name, p in weights(team[agent]).items() if not torch.equal(p, before[agent][name])} for agent in team}
    if level == 'full':
        assert changed['first'] and not changed['second']
    else:
        assert changed['first'] and all('.lora.first.' in name for name in changed['first'])


def test_candidates_do_not_depend_on_who_else_plays(small, run):
    """A problem alone, or among others (on another rank): the same candidates."""
    cfg = config(small, epoch_size=4)
    (team, temperatures), task = players(cfg, run), train_agents.task_of(cfg)
    problems = train_agents.draw_problems(cfg, task, 0, run)
    whole, part = (rollout(cfg, team, task, some, 7, 3, temperatures) for some in (problems, problems[2:3]))

    def texts(trajectory):
        return [[c.text for c in g.candidates] for g in trajectory.groups]
    assert texts(whole[2]) == texts(part[0]) and texts(whole[1]) != texts(whole[2])


def test_validation_never_branches_and_is_repeatable(small, run):
    cfg = config(small, validate_episodes=6)
    (team, _), task = players(cfg, run), train_agents.task_of(cfg)
    os.makedirs('validate')
    problems = train_agents.held_out_problems(cfg, task, run)
    metrics, said = train_agents.validate(cfg, team, task, problems, 3, '.', run)
    assert (metrics, said) == train_agents.validate(cfg, team, task, problems, 4, '.', run)
    assert said.splitlines()[-1] in ('solved', 'not solved') and said.startswith(cfg.turn_order[0])
    rows = [json.loads(line) for line in open('validate/step-3.jsonl')]
    assert len(rows) == 12 and all(len(turn['candidates']) == 1 for row in rows for turn in row['turns'])
    assert {'validation/success_rate', 'validation/greedy_success_rate', 'validation/reward', 'validation/episode_length'} <= set(metrics)


# ---- short real runs ---------------------------------------------------------------------------------------

SHORT = ['env.benchmark=plan_path', 'training.experiment_name=x', 'training.total_training_steps=4', 'training.epoch_size=3',
         'training.train_batch_size=16', 'training.train_sample_num=3', 'training.max_response_length=12', 'training.val_freq=2',
         'training.validate_episodes=3', 'training.learning_rate=1e-3', 'env.max_turns=2', '--no-tensorboard', '--device=cpu', '--matmul=float32']


def go(small, *words):
    """A run in this process; what it said."""
    cfg = parse(Config, [*SHORT, f'base_models.policy_0.path={small}', *words])
    train_agents.main(cfg)
    return open(f'logs/{cfg.experiment_name}/latest/train.log').read()


def start(small, *words):
    command = [sys.executable, os.path.join(ROOT, 'train_agents.py'), *SHORT, f'base_models.policy_0.path={small}', *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    return text


def saved(experiment='x', folder='last', policy=''):
    with open(os.path.join('logs', experiment, 'latest', 'checkpoints', folder, policy, 'model.safetensors'), 'rb') as file:
        return file.read()


@pytest.mark.pictures
def test_a_run_leaves_what_is_documented(small):
    text = go(small, 'demonstrations.steps=3', 'demonstrations.batch_size=8')
    assert all(word in text for word in ('reward', 'success_rate', 'episode_length', 'demonstrations 3/3', 'context of the model is 128'))
    assert not glob.glob('logs/x/*/train.log') == [] and os.path.islink('logs/x/latest')
    folder = glob.glob('logs/x/*-*-*/*-*-*')[0]
    assert {'train.log', 'summary.log', 'checkpoints', 'validate', 'log.jsonl', 'episodes.jsonl', 'episodes.html', 'reward.png'} <= set(os.listdir(folder))
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
    assert page.count('<details>') == 1 + 8 + 6 and 'class=executed' in page and page.count('<polyline') == 3 and '<script' not in page
    assert page.count('class=board') > 8 + 6 and page.count('class=story') == 8 + 6     # maps are drawn
    lines = [json.loads(line) for line in open(f'{folder}/log.jsonl')]
    step = next(line for line in lines if line.get('step') == 3)
    assert {'loss', 'reward', 'success_rate', 'episode_length', 'plan_agent/reward', 'time/rollout', 'time/generate', 'sampling/logp_gap_mean'} <= set(step)
    assert step['sampling/logp_gap_mean'] <= step['sampling/logp_gap_max'] < 1e-4

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
    """Uneven episodes: three on two ranks, of different lengths.
    The same candidates, steps and weights up to rounding."""
    go(small, 'training.total_training_steps=2', 'filter_method=dapo')
    ranks(2, lambda rank: go(small, 'training.total_training_steps=2', 'filter_method=dapo', 'training.experiment_name=two'))
    logs = [[json.loads(line) for line in open(f'logs/{e}/latest/log.jsonl')] for e in ('x', 'two')]
    for one, two in zip(*([line for line in log if 'loss' in line] for log in logs)):
        for key in ('loss', 'reward', 'episode_length', 'grad_norm', 'optimizer_steps', 'groups', 'dead_groups', 'plan_agent/tokens'):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    models = [load_model(f'logs/{e}/latest/checkpoints/last')[0] for e in ('x', 'two')]
    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(*(model.parameters() for model in models))])
    assert gaps.median() < 1e-5


def test_two_shards_are_one_model(small):
    """GPU_num=2 starts two processes that hold half of the heads each;
    what they save is whole, and goes on in one process."""
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
    last = [line for line in map(json.loads, open('logs/x/latest/log.jsonl')) if 'validation/reward' in line][-1]
    assert f"validation/reward {last['validation/reward']:.4f}" in text


@pytest.mark.parametrize('words, said', [
    (['training.total_trainin_steps=3'], ['total_trainin_steps', 'total_training_steps']), (['env.benchmark=chess'], ['chess', 'sokoban', 'env.name']), (['env.name=chess'], ['chess', 'sokoban']),
    (['env.benchmark=sudoku', 'env.min_moves=3'], ['env.min_moves', 'sudoku', 'min_blanks']), (['training.train_sample_num=1'], ['train_sample_num', '2 or more']),
    (['env.map_size=big'], ['env.map_size', 'big', 'int']), (['env.benchmrk=sudoku'], ['env.benchmrk', 'benchmark']),
    (['turn_order=tool_agent'], ['plan_agent']), (['turn_order=reader plan_agent'], ['reader', 'tool_agent']),
    (['filter_method=std'], ['filter_ratio']), (['filter_ratio=0.3'], ['filter_method']), (['training.epoch_size=0'], ['epoch_size']),
    (['base_models.policy_1.path=tiny', 'specialization=prompt'], ['policy_1', 'specialization=full']),
    (['base_models.policy_1.path=tiny', 'specialization=lora'], ['policy_1', 'specialization=full']), (['env.rules=maybe'], ['env.rules', 'maybe']),
    (['base_models.policy_7.path=tiny', 'specialization=full'], ['policy_7', 'policy_0, policy_1']), (['env.dataset=polaris', 'env.benchmark=sokoban'], ['polaris', 'sokoban']),
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
    assert train_agents.task_of(cfg).__name__ == 'data.tasks.sudoku' and cfg.turn_order == ['tool_agent', 'plan_agent']


def test_an_environment_has_its_settings_from_its_file(scratch):
    """env.* is open: what the file's SETTINGS name, typed by their defaults, stored,
    and kept when a run is resumed."""
    scratch.SETTINGS = {'size': (4, ''), 'rate': (0.5, ''), 'hard': (False, ''), 'path': ('here', ''), 'seeds': (None, '')}
    cfg = parse(Config, ['env.name=scripted', 'env.size=6', '--env.rate=2', 'env.hard=yes', 'env.path=3', 'env.seeds=7'])
    assert cfg.env == {'size': 6, 'rate': 2.0, 'hard': True, 'path': '3', 'seeds': 7} and isinstance(cfg.env['rate'], float)
    saved = as_dict(cfg)
    assert saved['env'] == {'name': 'scripted', 'dataset': None, 'benchmark': None, 'max_turns': 4, 'rules': None, **cfg.env}
    again = parse(Config, ['env.name=scripted', 'env.size=5', 'env.seeds=a'])
    # null: of an earlier version
    resumed = from_dict(Config, {**saved, 'env': {**saved['env'], 'map_size': None}}, again)
    check_settings(resumed)
    assert resumed.env == {**cfg.env, 'size': 5, 'seeds': 'a'}
    task = train_agents.task_of(resumed)
    assert train_agents.env_settings(parse(Config, ['env.name=scripted', 'env.size=none']), task, None) == {
        'size': 4, 'rate': 0.5, 'hard': False, 'path': 'here', 'seeds': None}


@pytest.mark.parametrize('words', [['base_models.policy_1.path=a'], ['base_models.policy_0.path=tiny', '--base_models.policy_1.path', 'a'],
                                   [os.path.join(ROOT, 'recipes/training/agents/sokoban.yaml'), 'base_models.policy_1.path=a']])
def test_a_second_model_means_a_model_per_agent(words):
    cfg = parse(Config, words)
    assert cfg.specialization == 'full' and train_agents.paths_of(cfg) == {'policy_0': 'tiny', 'policy_1': 'a'}


def test_a_policy_of_agent_configs_stays_what_it_is():
    words = ['agent_policy_configs.agent_configs.agent_0.name=plan_agent', 'agent_policy_configs.agent_configs.agent_0.policy_name=policy_1']
    assert parse(Config, [*words, 'base_models.policy_1.path=tiny']).specialization == 'prompt'


@pytest.mark.parametrize('words, said', [('--model=x', 'base_models.policy_0.path'), ('max_steps=7', 'total_training_steps'), ('lr=0.1', 'learning_rate')])
def test_the_words_of_other_scripts_are_known(words, said):
    cfg = parse(Config, [words])
    value = words.partition('=')[2]
    assert str(cfg.base_models['policy_0'].path if 'path' in said else getattr(cfg, said)) == value


# ---- real models and real data -----------------------------------------------------------------------------

def test_all_models_but_the_embedded_one_are_told_the_rules(small):
    """Unless they were trained without; a team goes on, and is evaluated, as it was trained."""
    words = ['training.total_training_steps=1', 'training.val_freq=1']
    assert 'rules=True' in go(small, *words)
    first = json.loads(open('logs/x/latest/episodes.jsonl').readline())['turns'][0]
    assert [message['role'] for message in first['messages']] == ['system', 'user'] and '####' in first['messages'][0]['content']
    assert 'rules=False' in go('tiny', *words, 'training.experiment_name=toy', 'training.total_training_steps=0')
    first = json.loads(open('logs/toy/latest/validate/step-0.jsonl').readline())['turns'][0]
    assert [message['role'] for message in first['messages']] == ['user']
    for path in ('', '/last'):
        folder = os.path.realpath(f'logs/toy/latest/checkpoints{path}')
        assert not environments.needs_rules(folder)
        assert environments.needs_rules(os.path.realpath(f'logs/x/latest/checkpoints{path}'))
    assert 'rules' not in go(small, *words, 'env.rules=false', 'training.experiment_name=z').partition('task')[0]
    # a run of an earlier version had none, and goes on without
    path = 'logs/x/latest/checkpoints/run_config.json'
    saved = json.load(open(path))
    del saved['config']['env']['rules']
    json.dump(saved, open(path, 'w'))
    assert 'rules=False' in go(small, '--resume', 'training.total_training_steps=1')


def test_rules_reach_a_model_whose_template_has_no_system_role(small):
    tokenizer = load_tokenizer(small)
    messages = [{'role': 'system', 'content': 'The rules.'}, {'role': 'user', 'content': 'Play.'}]
    assert fold_system(tokenizer, messages) == messages
    for first in ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}", ''):
        tokenizer = load_tokenizer(small)
        tokenizer.chat_template = first + ("{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                                           "{% if add_generation_prompt %}[assistant]{% endif %}")
        assert fold_system(tokenizer, messages) == [{'role': 'user', 'content': 'The rules.\n\nPlay.'}]


def test_a_recipes_demonstrations_are_for_the_embedded_model(small, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('demonstrations:\n  steps: 3\n  batch_size: 8\n')
    text = go(small, str(recipe), 'training.total_training_steps=0')
    assert f'trains without demonstrations: they are for the embedded model, and {small} begins' in text
    assert 'demonstrations 3/3' in go('tiny', str(recipe), 'training.total_training_steps=0', 'training.experiment_name=y')


def test_a_team_that_no_validation_found_better_is_not_called_the_trained_one(small):
    text = go(small, 'training.total_training_steps=1', 'training.val_freq=1')
    assert 'no validation was better than that before the training' in text and os.readlink('logs/x/latest/checkpoints/best') == 'checkpoint-0'
    assert 'the trained team is in logs/x/' in text and 'checkpoints/last' in text
    state = train_agents.State(step=0)
    assert state.note_success(0.1) and not state.note_success(0.1) and state.best_step == 0
    state.step = 10
    assert state.note_success(0.2) and state.best_step == 10


def test_tensorboard_shows_a_run_once(small):
    io_wrapper = pytest.importorskip('tensorboard.backend.event_processing.io_wrapper')
    go(small, '--tensorboard', 'training.total_training_steps=1', 'training.val_freq=1')
    go(small, '--tensorboard', '--resume', 'training.total_training_steps=2')
    runs = list(io_wrapper.GetLogdirSubdirectories('logs'))
    assert len(runs) == 1 and runs[0].startswith(os.path.join('logs', 'x', time.strftime('%Y-')))


REAL_ROWS = {
    'math': [{'question': f'Let $x = {n}$. Find $x^2$.', 'solution': str(n * n), 'source': 'POLARIS-Project/Polaris-Dataset-53K'} for n in range(9)],
    'code': [{'question': f'Print the number plus {n}.', 'test_input': ['1\n', '2\n'], 'test_output': [f'{n + 1}\n', f'{n + 2}\n'],
              'solution': f'print(int(input()) + {n})', 'examples': [['5\n', f'{n + 5}\n']], 'source': 'deepmind/code_contests'} for n in range(9)]}


@pytest.fixture
def checkout(tmp_path):
    """A folder with the project in it, whose datasets/ and logs/ are its own."""
    for name in ('train_agents.py', 'recipes', 'data'):
        (tmp_path / name).symlink_to(os.path.join(ROOT, name))
    shutil.copytree(os.path.join(ROOT, 'scripts'), tmp_path / 'scripts')
    return tmp_path


def bash(script, *words):
    return subprocess.run(['bash', script, *words], capture_output=True, text=True, timeout=120, env={**os.environ, 'PYTHON': sys.executable})


@pytest.mark.usefixtures('workers')
@pytest.mark.parametrize('task, train, test', [('math', 'polaris', 'AIME24'), ('code', 'code_contests', 'code_contests')])
def test_scripts_train_on_rows_of_the_hub(checkout, task, train, test):
    """Prepare data, run the script: as it stands, and with another model."""
    for split, name, rows in (('train', train, REAL_ROWS[task][:6]), ('test', test, REAL_ROWS[task][6:])):
        path = checkout / 'datasets' / task / split / f'{name}.jsonl'
        path.parent.mkdir(parents=True)
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    script = str(checkout / 'scripts' / 'train' / task / f'{task}_L1_prompt.sh')
    done = bash(script, 'training.total_training_steps=1', 'training.epoch_size=2', 'training.train_sample_num=2', 'env.max_turns=1',
                'training.validate_episodes=2', '--no-tensorboard', '--device=cpu', '--allow_weak_sandbox')
    assert done.returncode == 0, done.stderr
    assert 'the model is tiny, so the half toy: recipes/' in done.stderr
    with open(checkout / 'logs' / f'{task}_L1_prompt' / 'latest' / 'train.log') as file:
        said = file.read()
    assert 'trains without demonstrations: they are made of generated problems, and these are not' in said
    assert f'6 problems in datasets/{task}/train/{train}.jsonl' in said and f'3 problems in datasets/{task}/test/{test}.jsonl' in said
    assert 'demonstrations ' not in said.replace('without demonstrations', '') and 'stand in' not in said


def test_the_line_that_problems_are_generated_is_in_the_log(scratch):
    go('tiny', 'env.benchmark=AIME24', 'training.total_training_steps=0', '--allow_weak_sandbox')
    assert 'env.benchmark=AIME24: not in datasets/math/test, so problems of the generator' in open('logs/x/latest/train.log').read()


SCRIPTS = sorted(glob.glob(os.path.join(ROOT, 'scripts', 'train', '*', '*.sh')))
DOCUMENTED = {'total_training_steps': 200, 'epoch_size': 20, 'train_batch_size': 32, 'max_prompt_length': 8192, 'max_response_length': 8192,
              'val_freq': 10}


@pytest.mark.parametrize('script', SCRIPTS, ids=os.path.basename)
def test_a_script_has_a_half_for_tiny_and_one_for_other_models(script):
    """What is typed beats both, the half is said, and every key of the guide is a line to edit."""
    with open(script) as file:
        lines = file.read()
    for key, value in DOCUMENTED.items():
        assert f'\n    training.{key}={value} ' in lines
    for key in ('base_models.policy_0.path', 'training.experiment_name', 'env.dataset', 'env.benchmark'):
        assert f'\n    {key}=' in lines
    with_bash = ('math_L1_prompt', 'code_L0_single_agent', 'sokoban_two_policy')       # each takes a second
    if os.path.basename(script).removesuffix('.sh') not in with_bash:
        return
    resolved = {}
    for half, words in (('toy', []), ('real', ['--model', 'some/model']), ('typed', ['base_models.policy_0.path=some/model', '--val_freq=7'])):
        done = bash(script, *words, '--print_config')
        assert done.returncode == 0 and f'so the half {"toy" if half == "toy" else "real"}: ' in done.stderr, done.stderr
        resolved[half] = json.loads(done.stdout)
    name = os.path.basename(script).removesuffix('.sh')
    assert {cfg['training']['experiment_name'] for cfg in resolved.values()} == {name}
    assert resolved['toy']['demonstrations']['steps'] >= 200 and resolved['toy']['training']['max_response_length'] <= 80
    assert resolved['real']['demonstrations']['steps'] == 0
    assert {key: resolved['real']['training'][key] for key in DOCUMENTED} == DOCUMENTED
    assert resolved['typed']['training'] == {**resolved['real']['training'], 'val_freq': 7}


def test_a_script_refuses_what_its_lines_would_replace():
    done = bash(SCRIPTS[0], 'mine.yaml')
    assert done.returncode == 2 and 'run python train_agents.py mine.yaml instead' in done.stderr
    done = bash(SCRIPTS[0], 'training.val_frq=7')
    assert done.returncode == 2 and 'did you mean' in done.stderr and 'so the half' not in done.stderr
