"""Teams of agents trained by AT-GRPO: groups are made for every agent at every turn, by a tree of candidates.

    python train_agents.py env.benchmark=plan_path recipes/training/agents/plan_path.yaml
    python train_agents.py GPU_num=1 base_models.policy_0.path=Qwen/Qwen3-1.7B training.experiment_name=math env.dataset=polaris
    python train_agents.py --resume training.experiment_name=math
    python train_agents.py --eval_only base_models.policy_0.path=logs/math/latest/checkpoints env.benchmark=AIME24

At each turn of an episode the agents act in order. The acting one answers its prompt K times; every candidate is scored from the same
state, r = alpha * team + local; its advantage is (r - mean) / std among the K; the best is executed, and the next agent sees the new
state. Each policy is then updated on its agents' candidates by PPO's clipped loss (Zhao et al. 2025, AT-GRPO). A turn's reward
trains that turn only. Validation never branches.

Deviations from the paper: the old log-probabilities are those of the sampler, which is the same model (the log shows the gap as
sampling/logp_gap), and the deviation of a group is kept off 0 by 1e-4.
"""
import contextlib
import importlib
import json
import math
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from configurator import UserError, as_dict, parse, run_script, setting
from nanoforge.optim import SCHEDULES, learning_rate, warmup_within

MAX_BAD_STEPS = 5       # optimizer steps in a row without a finite gradient after which a run stops
NAMES = ('plan_path', 'sokoban', 'sudoku', 'math', 'code')     # modules in data/tasks that a team plays
# what env.dataset and env.benchmark are known to name -> one of them
TASKS = {**{name: name for name in NAMES}, 'suduku': 'sudoku',
         **dict.fromkeys(('polaris', 'dapo_math', 'aime_past', 'gsm8k', 'aime24', 'aime25', 'olympiadbench'), 'math'),
         **dict.fromkeys(('code_contests', 'apps', 'livecodebench', 'interview'), 'code')}


@dataclass
class BaseModel:
    path: str = 'tiny'  # Hugging Face name, directory, `tiny`, or the checkpoints folder of an earlier team


@dataclass
class Agent:
    name: str = ''  # which agent of the task this entry is about
    policy_name: str | None = None  # the policy that it plays with; by specialization if not set
    temperature: float = setting(1.0, path='train_llm_config.temperature')  # of its candidates in training
    val_temperature: float = setting(1.0, path='val_llm_config.temperature')  # of its answers in sampled validation


@dataclass
class Config:
    # models
    base_models: dict[str, BaseModel] = setting({})  # policy_0, policy_1, ...: where each begins; those not named begin as policy_0
    specialization: str = setting('prompt', choices=('prompt', 'lora', 'full', 'model'))  # L1 one model, roles by prompt; L2 one LoRA per agent on one base; L3 (full, model) a model per agent
    lora_rank: int = 16  # with specialization=lora
    lora_alpha: float = 32.0  # with specialization=lora: an adapter is scaled by alpha / rank
    # team
    turn_order: list[str] = setting([], path='multi_agent_interaction.turn_order')  # the agents in order, one alone is L0; empty = all of the task
    agents: dict[str, Agent] = setting({}, path='agent_policy_configs.agent_configs')  # agent_0, agent_1, ...: settings of single agents
    # algorithm
    rollout_mode: str = setting('tree', choices=('tree', 'no_tree'))  # AT-GRPO; or MAS+GRPO: K whole episodes, an episode's reward for all of its turns
    if_greedy: bool = True  # execute the best candidate; false = the first
    alpha: float = 1.0  # weight of the team's reward beside an agent's own
    filter_method: str = setting('none', choices=('none', 'dapo', 'std', 'mean'))  # drop groups: without variance; the filter_ratio of lowest deviation; of lowest mean
    filter_ratio: float = 0.0  # share of the groups that std and mean drop
    clip_low: float = 0.2  # the probability ratio is clipped to 1 - clip_low
    clip_high: float = 0.2  # ... and 1 + clip_high
    dual_clip: float | None = 3.0  # bound of the loss for a candidate worse than its group, as a multiple of its advantage; none = off
    entropy_coef: float = 0.0  # bonus for entropy per token
    ppo_epochs: int = 1  # passes over the candidates of a step
    # training
    experiment_name: str = setting('agents', path='training.experiment_name')  # names the run: logs/<experiment_name>/
    total_training_steps: int = setting(200, path='training.total_training_steps')  # iterations: one rollout and one pass of updates each
    epoch_size: int = setting(20, path='training.epoch_size')  # episodes rolled out per iteration
    train_batch_size: int = setting(32, path='training.train_batch_size')  # sequences per optimizer step
    train_sample_num: int = setting(8, path='training.train_sample_num')  # K: candidates of an agent at a turn
    max_prompt_length: int = setting(8192, path='training.max_prompt_length')  # tokens of a prompt; the end of a longer one is kept
    max_response_length: int = setting(8192, path='training.max_response_length')  # tokens of an answer
    val_freq: int = setting(10, path='training.val_freq')  # iterations between validations, each followed by a checkpoint
    val_before_train: bool = setting(True, path='training.val_before_train')  # validate before the first iteration, too
    validate_episodes: int = setting(100, path='training.validate_episodes')  # held-out problems, each played greedily and sampled
    micro_batch_tokens: int = setting(8192, path='training.micro_batch_tokens')  # tokens of a forward and backward pass on a rank: lower it when memory is short
    learning_rate: float | None = setting(None, path='training.learning_rate')  # 1e-5, of adapters 1e-4, where not set
    lr_scheduler: str = setting('constant', path='training.lr_scheduler', choices=SCHEDULES)  # over iterations
    lr_warmup_steps: int = setting(0, path='training.lr_warmup_steps')  # iterations of linear warm-up
    min_lr_ratio: float = setting(0.1, path='training.min_lr_ratio')  # where the schedule ends, as a share of learning_rate
    weight_decay: float = setting(0.01, path='training.weight_decay')  # of matrices
    max_grad_norm: float = setting(1.0, path='training.max_grad_norm')  # highest gradient norm; 0 = no clipping
    log_episodes: int = setting(2, path='training.log_episodes')  # episodes of an iteration written out in full, their trees in episodes.html
    # demonstrations
    demo_steps: int = setting(0, path='demonstrations.steps')  # optimizer steps on the answers of the task's pupils before training; 0 = none
    demo_batch_size: int = setting(64, path='demonstrations.batch_size')  # answers in each
    demo_learning_rate: float = setting(2e-3, path='demonstrations.learning_rate')  # of Muon for whole models, of AdamW for adapters; falls linearly to 0
    # environment
    task: str | None = setting(None, path='env.name', choices=NAMES)  # what is played; the data sets say so, or plan_path, where not set
    dataset: str | None = setting(None, path='env.dataset')  # training problems: a game, or data sets of math and code (polaris, gsm8k, code_contests), joined by +
    benchmark: str | None = setting(None, path='env.benchmark')  # held-out problems: a game, or data sets (AIME24, code_contests)
    data_dir: str | None = setting(None, path='env.data_dir')  # math, code: where scripts/dataprocess stored them; by task if not set, as the rest
    steps: int | None = setting(None, path='env.steps')  # math: operations in a generated problem
    tests: int | None = setting(None, path='env.tests')  # code: hidden tests of a training problem at most
    timeout: float | None = setting(None, path='env.timeout')  # math, code: seconds that a program may run
    max_turns: int = setting(4, path='env.max_turns')  # turns of an episode; in each, every agent acts once
    map_size: int | None = setting(None, path='env.map_size')  # games: rows of the map
    min_moves: int | None = setting(None, path='env.min_moves')  # plan_path, sokoban: moves of the shortest solution at least
    max_moves: int | None = setting(None, path='env.max_moves')  # sokoban: and at most
    min_blanks: int | None = setting(None, path='env.min_blanks')  # sudoku: numbers to fill in at least
    max_blanks: int | None = setting(None, path='env.max_blanks')  # sudoku: and at most
    rules: bool | None = setting(None, path='env.rules')  # explain the rules in a system message, for models that were not warmed up on them
    allow_weak_sandbox: bool = False  # math, code: run programs that agents wrote even where the system cannot shut them in
    # run
    seed: int = 1337  # of problems, candidates, demonstrations and their order
    resume: bool | str = setting(False, choices=('auto',))  # go on with the latest run of the experiment; auto: start where there is none
    eval_only: bool = False  # validate what base_models name, and stop
    tensorboard: bool = True  # events in the run's folder
    wandb_enabled: bool = setting(False, path='wandb.enabled')  # also log to Weights & Biases
    wandb_project: str = setting('nanoforge', path='wandb.project')  # its project
    # machine
    GPU_num: int = 1  # GPUs (or processes on a CPU) that share each model by tensor parallelism
    device: str = 'auto'  # auto = cuda, mps or cpu; or cuda:1, ...
    dtype: str = setting('auto', choices=('auto', 'float32', 'bfloat16', 'float16'))  # of autocast on a GPU; weights stay float32
    matmul: str = setting('auto', choices=('auto', 'float32', 'bf16'))  # products on a CPU; auto = bf16 where the processor has it

    def check(self):
        kinds = {name: TASKS.get(name.split('+')[0].lower()) for name in (self.dataset, self.benchmark) if name}
        for name, kind in kinds.items():
            if not (kind or self.task or any(kinds.values())):
                raise UserError(f"env: no data set '{name}' is known; there are {', '.join(TASKS)}; for a file of yours say env.name=math "
                                'or env.name=code')
            if kind and kind != task_name(self):
                raise UserError(f"env: '{name}' is about {kind}, not {task_name(self)}: train and validate on the same kind of task")
        task = task_of(self)
        for name in self.turn_order:
            if name not in task.ROLES:
                raise UserError(f"turn_order: {task.__name__.rpartition('.')[2]} has no agent '{name}', but {', '.join(task.ROLES)}")
        if len(set(self.turn_order)) < len(self.turn_order) or task.ACTS not in self.order:
            raise UserError(f'turn_order names each agent once, and among them {task.ACTS}, without whom nothing happens')
        for key, agent in self.agents.items():
            if agent.name not in self.order:
                raise UserError(f"agent_configs.{key}.name: '{agent.name}' is none of the agents in turn_order: {', '.join(self.order)}")
        for key in ('data_dir', 'steps', 'tests', 'timeout', 'map_size', 'min_moves', 'max_moves', 'min_blanks', 'max_blanks', 'rules'):
            if getattr(self, key) is not None and key not in task.SETTINGS:
                raise UserError(f'env.{key} means nothing to {task.__name__.rpartition(".")[2]}, which knows '
                                f'{", ".join("env." + name for name in task.SETTINGS) or "no settings"}')
        for name in ('epoch_size', 'train_batch_size', 'max_prompt_length', 'max_response_length', 'val_freq', 'validate_episodes',
                     'micro_batch_tokens', 'ppo_epochs', 'demo_batch_size', 'max_turns', 'GPU_num', 'lora_rank'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} must be 1 or more, not {getattr(self, name)}')
        if self.train_sample_num < 2:
            raise UserError(f'train_sample_num={self.train_sample_num}: a group needs two candidates to compare, 4 to 16 are usual')
        for name in ('total_training_steps', 'demo_steps', 'lr_warmup_steps', 'max_grad_norm', 'weight_decay', 'alpha', 'log_episodes'):
            if getattr(self, name) < 0:
                raise UserError(f'{name} must be 0 or more, not {getattr(self, name)}')
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise UserError(f'learning_rate must be above 0, not {self.learning_rate}')
        if not 0 <= self.filter_ratio < 1:
            raise UserError(f'filter_ratio is a share of the groups, 0 to below 1, not {self.filter_ratio}')
        if (self.filter_ratio > 0) != (self.filter_method in ('std', 'mean')):
            raise UserError(f'filter_ratio={self.filter_ratio:g} and filter_method={self.filter_method} do not fit: std and mean need a '
                            'ratio above 0, the others have none')
        if self.specialization == 'lora' and self.GPU_num > 1:
            raise UserError('GPU_num above 1 shards whole models, not adapters: use specialization=prompt or full')
        others = set(self.base_models) - {'policy_0'} - {agent.policy_name for agent in self.agents.values()}
        if self.specialization == 'prompt' and others:
            raise UserError(f'base_models.{min(others)}: with specialization=prompt all agents share policy_0; set specialization=full')

    num_gpus = property(lambda self: self.GPU_num)      # so many processes are started where torchrun has started none

    @property
    def order(self):
        return self.turn_order or list(task_of(self).ROLES)


def task_name(cfg):
    """What is played: env.name, or what the data sets are about."""
    named = [TASKS.get(name.split('+')[0].lower()) for name in (cfg.benchmark, cfg.dataset) if name]
    return cfg.task or next(filter(None, named), 'plan_path')


def task_of(cfg):
    """The module of data/tasks that is played."""
    return importlib.import_module('data.tasks.' + task_name(cfg))


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanoforge import pages
from nanoforge.checkpoint import Checkpoints, symlink, read_checkpoint, read_manifest, resume_config, start_fresh, write_json
from data import sandbox
from data.chat import encode, segments
from data.completions import lay_out
from nanoforge.lora import add_lora, load_adapter, set_adapter
from model import load_model, save_model
from nanoforge.optim import AdamW, make_optimizer
from nanoforge.parallel import Shared, clip_grad_norm, shard, share, share_out, whole, whole_model
from nanoforge.log import Log
from nanoforge.run import LossScale, Stop, describe_device, explain_out_of_memory, resume_command, seed_for, setup
from sample import generate
from train_rl import group_advantages, policy_loss


@dataclass
class Policy:
    """What some of the agents play with: a model, of several adapters on it one, and the optimizer of just these weights."""
    name: str
    model: torch.nn.Module
    tokenizer: object
    agents: list
    adapter: str | None = None
    optimizer: object = None
    bad_steps: int = 0      # in a row, without a finite gradient

    def use(self):
        """Its model with its own adapter. Never between a forward pass and its backward."""
        if self.adapter:
            set_adapter(self.model, self.adapter)
        return self.model


@dataclass
class Candidate:
    """One answer, token by token as it was sampled."""
    tokens: list            # ids, the stop token included
    logp: list              # log-probability of each when it was drawn
    text: str
    stopped: bool           # False: cut off at max_response_length
    outcome: object = None  # data.tasks.env.Outcome
    reward: float = 0.0     # alpha * team + local
    advantage: float = 0.0


@dataclass
class Group:
    """The candidates of one agent at one moment of one episode: all answer the same prompt."""
    episode: int
    turn: int
    agent: str
    prompt: list            # ids, exactly those that the candidates were drawn after
    messages: list
    view: str
    candidates: list
    executed: int = 0


@dataclass
class Episode:
    number: int             # of the problem, whatever the rank that plays it
    problem: dict
    env: object
    groups: list = field(default_factory=list)

    @property
    def reward(self):
        """The rewards of what was executed, summed over turns, mean over agents."""
        return sum(g.candidates[g.executed].reward for g in self.groups) / max(len({g.agent for g in self.groups}), 1)


# ---- the team ---------------------------------------------------------------------------------------------------------------

def policies_of(cfg):
    """{policy: its agents}, by specialization or as agent_configs say."""
    named = {agent.name: agent.policy_name for agent in cfg.agents.values()}
    usual = {'prompt': lambda i, agent: 'policy_0', 'lora': lambda i, agent: agent}.get(cfg.specialization, lambda i, agent: f'policy_{i}')
    policies = {}
    for i, agent in enumerate(cfg.order):
        policies.setdefault(named.get(agent) or usual(i, agent), []).append(agent)
    return policies


def load_team(cfg, run, saved=None):
    """{agent: Policy}, still without optimizers; `saved`: a checkpoint of this team, else the models that base_models name."""
    policies, paths = policies_of(cfg), {name: model.path for name, model in cfg.base_models.items()}
    first, team = paths.get('policy_0', 'tiny'), []
    unknown = set(paths) - set(policies) - {'policy_0'}
    if unknown:
        raise UserError(f'base_models.{min(unknown)}: no agent plays with it; the policies are {", ".join(policies)}')

    def folder(path, name):
        """A team's checkpoint has a folder for each of several policies."""
        inner = os.path.join(path, name)
        return inner if os.path.isdir(inner) else path

    with explain_out_of_memory('--GPU_num (a higher one shards each model)'):
        if cfg.specialization == 'lora':
            model, tokenizer = load_model(first if not os.path.isdir(first) or os.path.exists(os.path.join(first, 'config.json'))
                                          else base_of(first), run.device)
            for name, agents in policies.items():
                source = folder(saved or first, name)
                if os.path.exists(os.path.join(source, 'adapter_config.json')):
                    load_adapter(model, source, name, trainable=True)
                else:
                    torch.manual_seed(seed_for(cfg.seed, 'weights', name))
                    add_lora(model, cfg.lora_rank, cfg.lora_alpha, target_modules='all-linear', name=name)
                team.append(Policy(name, model, tokenizer, agents, adapter=name))
        else:
            for name, agents in policies.items():
                source = paths.get(name) or first
                team.append(Policy(name, *load_model(folder(saved or source, name), run.device), agents))
    for policy in team:
        if policy.tokenizer is None:
            raise UserError(f'{policy.model.name_or_path} has no tokenizer: an agent reads and writes text')
        policy.model.set_matmul(run.matmul)
        if isinstance(run, Shared):
            shard(policy.model, run)
    return {agent: policy for policy in team for agent in policy.agents}


def base_of(directory):
    """The base model of a saved team of adapters."""
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name, 'adapter_config.json')
        if os.path.exists(path):
            with open(path, encoding='utf-8') as file:
                return json.load(file)['base_model_name_or_path']
    raise UserError(f'{directory} holds neither a model nor adapters of a team')


def new_optimizer(policy, kind, lr, weight_decay):
    """Over just this policy's weights: momentum and weight decay would move an idle adapter."""
    if policy.adapter:
        own = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad and f'.lora.{policy.adapter}.' in name]
        return AdamW(own, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    return make_optimizer(kind, policy.model, lr, weight_decay, (0.9, 0.999) if kind == 'adamw' else (0.9, 0.95))


def distinct(team):
    return list({policy.name: policy for policy in team.values()}.values())


def settings_of(cfg, agent):
    """The entry of agent_configs about an agent, or one with the defaults."""
    return next((entry for entry in cfg.agents.values() if entry.name == agent), Agent(agent))


def clamp_lengths(cfg, team, run):
    """Answers get at most half of the context, prompts the rest; said where that is less than asked for."""
    context = min(policy.model.config.block_size for policy in distinct(team))
    response = min(cfg.max_response_length, context // 2)
    prompt = min(cfg.max_prompt_length, context - response)
    if (prompt, response) != (cfg.max_prompt_length, cfg.max_response_length):
        run.print0(f'lengths   max_prompt_length {cfg.max_prompt_length} -> {prompt}, max_response_length {cfg.max_response_length} -> '
                    f'{response}: the context of the model is {context} tokens')
    cfg.max_prompt_length, cfg.max_response_length = prompt, response


# ---- rollouts ---------------------------------------------------------------------------------------------------------------

class Clock:
    """Seconds by what they were spent on: with clock('generate'): ..."""

    def __init__(self):
        self.seconds, self.truncated = {}, 0        # and prompts that were cut

    @contextlib.contextmanager
    def __call__(self, name):
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def draw_problems(cfg, task, step, run):
    """This rank's (number, problem) of an iteration."""
    problems = task.problems('train', cfg.epoch_size, seed_for(cfg.seed, 'problems', step), **env_settings(cfg, task, cfg.dataset))
    return list(enumerate(problems))[run.rank::run.world_size]


def env_settings(cfg, task, dataset):
    """What problems() of the task takes: env.* where they are set, else the task's defaults."""
    given = {key: getattr(cfg, key) for key in task.SETTINGS if getattr(cfg, key, None) is not None}
    given.update({'dataset': dataset} if 'dataset' in task.SETTINGS else {})
    return {**{key: default for key, (default, _) in task.SETTINGS.items()}, **given}


def play(cfg, team, task, cases, seed, samples, clock, temperature=None):
    """Plays problems [(number, problem)] side by side -> [Episode].

    Every agent draws `samples` candidates at its turn, and one is executed: with several it is a tree, with one a plain episode.
    Candidates depend on seed, turn, agent and the problem's number alone. temperature: for all agents, else each one's own.
    """
    episodes = [Episode(number, problem, task.Env(problem)) for number, problem in cases]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for turn in range(cfg.max_turns):
            for agent in cfg.order:
                acting = [episode for episode in episodes if not episode.env.done]
                with clock('generate'):
                    groups = ask(cfg, team[agent], agent, acting, turn, seed_for(seed, turn, agent), samples, clock, temperature)
                with clock('environment'):
                    texts = [[candidate.text for candidate in group.candidates] for group in groups]
                    scored = pool.map(lambda episode, texts: score(episode.env, agent, texts), acting, texts)
                    for episode, group, outcomes in zip(acting, groups, scored):
                        for candidate, outcome in zip(group.candidates, outcomes):
                            candidate.outcome, candidate.reward = outcome, outcome.reward(cfg.alpha)
                        rewards = [candidate.reward for candidate in group.candidates]
                        group.executed = rewards.index(max(rewards)) if cfg.if_greedy else 0
                        episode.env.step(agent, group.candidates[group.executed].outcome)
                        episode.groups.append(group)
    return episodes


def score(env, agent, texts):
    """Outcomes of candidates; at once where the task can run their programs side by side."""
    return env.score_many(agent, texts) if hasattr(env, 'score_many') else [env.score(agent, text) for text in texts]


def ask(cfg, policy, agent, episodes, turn, seed, samples, clock, temperature=None):
    """The candidates of an agent in the present state of each episode -> [Group]."""
    if not episodes:
        return []
    if temperature is None:
        temperature = settings_of(cfg, agent).temperature
    messages = [episode.env.prompt(agent) for episode in episodes]
    rendered = [segments(policy.tokenizer, chat, None, 'completion', True) for chat in messages]
    prompts = [row.ids for row in encode(policy.tokenizer, rendered)]
    clock.truncated += sum(len(prompt) > cfg.max_prompt_length for prompt in prompts)
    prompts = [prompt[-cfg.max_prompt_length:] for prompt in prompts]
    drawn = generate(policy.use(), prompts, cfg.max_response_length, temperature=temperature, stop_ids=policy.tokenizer.stop_ids,
                     num_samples=samples, seed=seed, numbers=[episode.number for episode in episodes])
    rows = zip(drawn.tokens.tolist(), drawn.logp.tolist(), drawn.lengths.tolist(), drawn.stopped.tolist())
    candidates = [Candidate(tokens[:n], logp[:n], policy.tokenizer.decode(tokens[:n - stopped], skip_special_tokens=True), stopped)
                  for tokens, logp, n, stopped in rows]
    return [Group(episode.number, turn, agent, prompt, chat, episode.env.view(), candidates[i * samples:(i + 1) * samples])
            for i, (episode, prompt, chat) in enumerate(zip(episodes, prompts, messages))]


def rollout(cfg, team, task, cases, step, clock):
    """The episodes of an iteration, their candidates with advantages. no_tree: K whole episodes of each problem."""
    if cfg.rollout_mode == 'tree':
        episodes = play(cfg, team, task, cases, seed_for(cfg.seed, 'play', step), cfg.train_sample_num, clock)
    else:
        copies = [(number * cfg.train_sample_num + k, problem) for number, problem in cases for k in range(cfg.train_sample_num)]
        episodes = play(cfg, team, task, copies, seed_for(cfg.seed, 'play', step), 1, clock)
    give_advantages(cfg, episodes)
    return episodes


def give_advantages(cfg, episodes):
    """Sets the advantage of every candidate, within its group.

    tree: the group is (episode, turn, agent), its members the candidates; they must share one prompt. no_tree: the group is
    (problem, agent), its members whole episodes with the sum of the agent's rewards, and all of its turns get the same advantage.
    """
    members, prompts = {}, {}               # group -> [(reward, its candidates)], and the prompts that it answers
    for episode in episodes:
        for agent in dict.fromkeys(group.agent for group in episode.groups):
            own = [group for group in episode.groups if group.agent == agent]
            if cfg.rollout_mode == 'no_tree':
                candidates = [group.candidates[0] for group in own]
                key = episode.number // cfg.train_sample_num, agent
                members.setdefault(key, []).append((sum(c.reward for c in candidates), candidates))
                continue
            for group in own:
                key = episode.number, group.turn, agent
                members.setdefault(key, []).extend((candidate.reward, [candidate]) for candidate in group.candidates)
                prompts.setdefault(key, set()).add(tuple(group.prompt))
    for key, found in prompts.items():
        if len(found) > 1 or len(members[key]) < 2:
            raise RuntimeError(f'group {key} has {len(members[key])} candidates for {len(found)} prompts: not comparable')
    rows = [(reward, place, candidates) for place, group in enumerate(members.values()) for reward, candidates in group]
    if rows:
        advantages = group_advantages(torch.tensor([r for r, _, _ in rows]), torch.tensor([place for _, place, _ in rows])).tolist()
        for advantage, (_, _, candidates) in zip(advantages, rows):
            for candidate in candidates:
                candidate.advantage = advantage


# ---- updates ----------------------------------------------------------------------------------------------------------------

TOTALS = ('loss', 'entropy', 'tokens', 'clipped', 'kl', 'grad_norm', 'gap', 'gap_tokens', 'steps', 'skipped')      # summed over an iteration
COLUMNS = ('rank', 'group', 'candidate', 'agent', 'tokens', 'reward', 'advantage', 'episode', 'turn')


def gather(rows, width, run):
    """Numbers [(width values)] of every rank -> float64 (N, width) of all ranks; every rank calls it, with any number of rows."""
    return gather_tensor(torch.tensor(rows, dtype=torch.float64).view(-1, width), run)


def gather_text(text, run):
    return bytes(gather_tensor(torch.tensor(list(text.encode(errors='replace')), dtype=torch.uint8), run).tolist()).decode()


def gather_tensor(mine, run):
    """(n, ...) of every rank, whatever its n -> (N, ...) of all, one rank's after the other's."""
    if run.world_size == 1:
        return mine
    group = getattr(run, 'copies', None)
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(run.world_size)]
    dist.all_gather(counts, torch.tensor([len(mine)]), group=group)
    padded = mine.new_zeros(max(map(int, counts)), *mine.shape[1:])
    padded[:len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:int(count)] for part, count in zip(parts, counts)])


def plan_batches(cfg, episodes, step, run):
    """{policy: [optimizer steps]}, a step being float64 (sequences, COLUMNS) of all ranks, the same on each.

    The candidates of a group stay together, so that their prompt is computed once; a step has train_batch_size sequences.
    """
    groups = [group for episode in episodes for group in episode.groups]
    rows = [(run.rank, i, k, cfg.order.index(group.agent), len(c.tokens), c.reward, c.advantage, group.episode, group.turn)
            for i, group in enumerate(groups) for k, c in enumerate(group.candidates)]
    table = gather(rows, len(COLUMNS), run)
    column = {name: table[:, i] for i, name in enumerate(COLUMNS)}
    problem = column['episode'] if cfg.rollout_mode == 'tree' else column['episode'] // cfg.train_sample_num
    turn = column['turn'] if cfg.rollout_mode == 'tree' else torch.zeros_like(problem)
    key, place = torch.stack((problem, turn, column['agent']), 1).unique(dim=0, return_inverse=True)
    kept = kept_groups(cfg, column['reward'], column['advantage'], place, len(key))
    batches = {}
    for name, agents in policies_of(cfg).items():
        chosen = torch.isin(column['agent'], torch.tensor([cfg.order.index(a) for a in agents], dtype=torch.float64)) & kept[place]
        steps = []
        for epoch in range(cfg.ppo_epochs):
            draw = torch.Generator().manual_seed(seed_for(cfg.seed, 'batches', name, step, epoch))
            shuffled = torch.randperm(len(key), generator=draw)                     # of groups
            rank = torch.stack((column['candidate'], column['turn'], column['episode'], shuffled[place]), 1)
            order = sorted(chosen.nonzero().flatten().tolist(), key=lambda row: rank[row].flip(0).tolist())
            steps += [table[part] for part in torch.tensor(order, dtype=torch.long).split(cfg.train_batch_size) if len(part)]
        batches[name] = steps
    return batches, groups


def kept_groups(cfg, reward, advantage, place, count):
    """(count,) bool: the groups that filter_method leaves; reward and advantage (N,), place (N,) the group of each."""
    over = lambda values: torch.zeros(count, dtype=torch.float64).index_add_(0, place, values)
    size = over(torch.ones_like(reward)).clamp(min=1)
    mean = over(reward) / size
    kept = torch.ones(count, dtype=torch.bool)
    if cfg.filter_method == 'dapo':
        kept = over(advantage.abs()) > 0
    elif cfg.filter_method in ('std', 'mean'):
        value = mean if cfg.filter_method == 'mean' else over((reward - mean[place]).square()) / size
        kept[value.argsort(stable=True)[:int(cfg.filter_ratio * count)]] = False
    return kept


def answer_stats(model, rows, temperature, run):
    """Log-probability and entropy of every token of the answers in rows [(prompt ids, [answer ids])] -> (B, T) each, and their mask."""
    layout = lay_out(rows, run.device)                                  # a prompt is computed once for all of its answers
    with run.autocast():
        hidden = model.hidden(layout.idx, layout.positions, logit_positions=layout.source)               # (B, T, C)
        stats = model.token_stats(hidden, layout.targets, temperature)
    return stats['logp'], stats['entropy'], layout.targets >= 0


def micro_batches(cfg, batch, groups, run):
    """This rank's share of an optimizer step, cut so that a pass has at most micro_batch_tokens and one temperature: [(temperature,
    [(group, [candidates])])]."""
    found = []
    rows = [(groups[int(i)], int(k)) for rank, i, k in batch[:, :3].tolist() if rank == run.rank]
    for temperature in sorted({settings_of(cfg, group.agent).temperature for group, _ in rows}):
        own = [(group, group.candidates[k]) for group, k in rows if settings_of(cfg, group.agent).temperature == temperature]
        found += [(temperature, part) for part in cut(cfg, own)]
    return found


def cut(cfg, rows):
    """[(group, candidate)] -> lists of (group, [candidates]) of at most micro_batch_tokens each."""
    mine, size = [[]], 0
    for group, candidate in rows:
        if candidate.advantage == 0 and not cfg.entropy_coef:
            continue                                            # it has no gradient, but its tokens are counted
        new = not mine[-1] or mine[-1][-1][0] is not group
        size += len(candidate.tokens) + new * len(group.prompt)
        if size > cfg.micro_batch_tokens and mine[-1]:
            mine.append([])
            new, size = True, len(candidate.tokens) + len(group.prompt)
        if new:
            mine[-1].append((group, []))
        mine[-1][-1][1].append(candidate)
    return [part for part in mine if part]


def update(cfg, policy, steps, groups, scaler, run, totals):
    """The optimizer steps of a policy on the candidates of its agents. Adds to totals {name: float} what is logged. A step without a
    finite gradient is skipped; UserError after MAX_BAD_STEPS in a row."""
    model, optimizer = policy.use(), policy.optimizer
    model.train()
    for batch in steps:
        tokens = int(batch[:, COLUMNS.index('tokens')].sum())                                   # of all ranks
        optimizer.zero_grad()
        sums = torch.zeros(6, dtype=torch.float64)
        for temperature, part in micro_batches(cfg, batch, groups, run):
            rows = [candidate for _, candidates in part for candidate in candidates]
            with explain_out_of_memory('training.micro_batch_tokens'):
                logp, entropy, mask = answer_stats(model, [(g.prompt, [c.tokens for c in cs]) for g, cs in part], temperature, run)
                old = torch.zeros_like(logp)
                old[mask] = torch.tensor([value for c in rows for value in c.logp], device=old.device)
                advantages = torch.tensor([c.advantage for c in rows], device=old.device)
                loss, stats = policy_loss(logp, old, advantages, mask, clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                                          dual_clip=cfg.dual_clip, mean='token', normaliser=tokens)
                if cfg.entropy_coef:
                    loss = loss - cfg.entropy_coef * torch.where(mask, entropy, 0.0).sum() / tokens
                (loss * scaler.value).backward()
            with torch.no_grad():
                n, gap = mask.sum(), (logp - old)[mask].abs().sum() if not totals['steps'] else 0.0
                sums += torch.tensor([float(loss), float(entropy[mask].sum()), float(n), float(stats['clip_ratio/region_mean'] * n),
                                      float(gap), float(stats['approx_kl'] * n)], dtype=torch.float64)
        for grad in optimizer.grads:
            run.sum(grad)
        scaler.unscale_(optimizer.grads)
        norm = float(clip_grad_norm(model, optimizer, cfg.max_grad_norm, run))
        finite = math.isfinite(norm)
        if finite:
            optimizer.step()
        rescaled = scaler.update(finite)
        policy.bad_steps = 0 if finite or rescaled else policy.bad_steps + 1
        if policy.bad_steps == MAX_BAD_STEPS:
            raise UserError(f'{MAX_BAD_STEPS} optimizer steps in a row without a finite gradient: lower training.learning_rate; the '
                            'checkpoints are good')
        loss, entropy, n, clipped, gap, kl = run.sum(sums).tolist()
        for name, value in dict(loss=loss, entropy=entropy, tokens=n, clipped=clipped, kl=kl, grad_norm=norm if finite else 0.0,
                                gap=gap, gap_tokens=0 if totals['steps'] else n, steps=1, skipped=not finite).items():
            totals[name] += value
    model.eval()


# ---- the warm-up on demonstrations ------------------------------------------------------------------------------------------

def warm_up(cfg, team, task, stop, run):
    """Supervised steps on what the task's pupils answer, in the situations that they get into: from here on a model knows the form of
    an answer, much of the task, and the pupils' faults."""
    kind = 'adamw' if isinstance(run, Shared) else 'muon'           # which needs whole matrices
    started, optimizers = time.perf_counter(), {p.name: new_optimizer(p, kind, cfg.demo_learning_rate, 0.01) for p in distinct(team)}
    losses, bar = [], tqdm(total=cfg.demo_steps, desc='demonstrations', leave=False, disable=not (run.is_main and sys.stderr.isatty()))
    for step in range(cfg.demo_steps):
        if stop.requested:
            run.print0('stopped during the demonstrations, of which nothing is kept: start again')
            run.close()
            raise SystemExit(stop.code)
        draw, rows, number = random.Random(f'{cfg.seed}/demonstrations/{step}'), [], 0
        while len(rows) < cfg.demo_batch_size:
            problem = task.problems('train', 1, f'{cfg.seed}/demonstrations/{step}/{number}', **env_settings(cfg, task, cfg.dataset))[0]
            env = task.Env(problem)
            number += 1
            for _ in range(cfg.max_turns):
                for agent in cfg.order if not env.done else ():
                    text, messages = env.demonstration(agent, draw), env.prompt(agent)
                    rows.append((agent, [*messages, {'role': 'assistant', 'content': text}]))
                    env.step(agent, env.score(agent, text))
        rows = rows[:cfg.demo_batch_size]
        for policy in distinct(team):
            own = [messages for agent, messages in rows if agent in policy.agents]
            loss = supervised_step(cfg, policy, optimizers[policy.name], own, step, run)
            losses.append(loss)
        bar.update()
        if (step + 1) % max(1, cfg.demo_steps // 10) == 0:
            recent, seconds = losses[-50:], time.perf_counter() - started
            run.print0(f'demonstrations {step + 1}/{cfg.demo_steps}  loss {sum(recent) / len(recent):.4f}  {seconds:.0f} s, about '
                        f'{seconds / (step + 1) * (cfg.demo_steps - step - 1):.0f} s to go')
    bar.close()
    return time.perf_counter() - started


def supervised_step(cfg, policy, optimizer, chats, step, run):
    """One step of next-token loss on the last message of each chat; the mean over all of its tokens."""
    if not chats:
        return 0.0
    rows = encode(policy.tokenizer, [segments(policy.tokenizer, chat, None, 'completion') for chat in chats])
    rows = [row for row in rows if len(row.ids) <= policy.model.config.block_size]
    tokens = sum(sum(row.mask) for row in rows)
    mine = sorted(rows[run.rank::run.world_size], key=lambda row: len(row.ids))             # so that little is padding
    model, total = policy.use().train(), torch.zeros((), device=run.device)
    optimizer.set_lr(cfg.demo_learning_rate * min((step + 1) / 20, 1 - step / cfg.demo_steps))
    optimizer.zero_grad()
    for part in [mine[i:i + 16] for i in range(0, len(mine), 16)]:
        starts = [row.mask.index(True) for row in part]
        pairs = [(row.ids[:start], [row.ids[start:start + sum(row.mask)]]) for row, start in zip(part, starts)]
        with explain_out_of_memory('demonstrations.batch_size'):
            loss = -answer_stats(model, pairs, 1.0, run)[0].sum() / tokens
        loss.backward()
        total += loss.detach()
    for grad in optimizer.grads:
        run.sum(grad)
    clip_grad_norm(model, optimizer, 1.0, run)
    optimizer.step()
    model.eval()
    return float(run.sum(total))


# ---- validation and what is written -----------------------------------------------------------------------------------------

def held_out_problems(cfg, task, run):
    """This rank's (number, problem) of every validation."""
    problems = task.problems('eval', cfg.validate_episodes, 'validation', **env_settings(cfg, task, cfg.benchmark))
    return list(enumerate(problems))[run.rank::run.world_size]


def validate(cfg, team, task, cases, step, directory, run):
    """Plays held-out problems without branching, greedily and sampled; returns metrics, writes every episode to validate/."""
    metrics, records = {}, []
    sampled = replace(cfg, agents={agent: Agent(agent, temperature=settings_of(cfg, agent).val_temperature) for agent in cfg.order})
    for manner, temperature in (('sampled', None), ('greedy', 0.0)):
        episodes = play(sampled, team, task, cases, seed_for(cfg.seed, 'validate', manner), 1, Clock(), temperature)
        prefix = 'validation/' if manner == 'sampled' else 'validation/greedy_'
        metrics.update({prefix + key: value for key, value in summary(cfg, episodes, run).items()})
        records += [{'step': step, 'manner': manner, **record(episode)} for episode in episodes]
    lines = gather_text(''.join(json.dumps(entry, ensure_ascii=False) + '\n' for entry in records), run)
    if run.is_main:
        with open(os.path.join(directory, 'validate', f'step-{step}.jsonl'), 'w', encoding='utf-8', errors='replace') as file:
            file.write(lines)
    return metrics


def summary(cfg, episodes, run):
    """{'reward', 'success_rate', 'episode_length', and by agent} over the episodes of all ranks."""
    columns = [[1.0, e.reward, float(e.env.success), float(max((g.turn for g in e.groups), default=-1) + 1)] for e in episodes]
    count, *sums = gather(columns, 4, run).sum(0).tolist()
    metrics = {key: total / max(count, 1) for key, total in zip(('reward', 'success_rate', 'episode_length'), sums)}
    for agent in cfg.order:
        rows = [[1.0, c.reward, float(c.outcome.valid), float(len(c.tokens)), float(not c.stopped)]
                for e in episodes for g in e.groups if g.agent == agent for c in g.candidates]
        count, *sums = gather(rows, 5, run).sum(0).tolist()
        metrics.update({f'{agent}/{key}': total / max(count, 1) for key, total in zip(('reward', 'valid', 'tokens', 'cut_off'), sums)})
    return metrics


def record(episode):
    """An episode as JSON: every prompt and candidate with ids, reward and advantage, and which was executed."""
    return {'episode': episode.number, 'problem': episode.problem, 'success': episode.env.success, 'reward': episode.reward,
            'end': episode.env.view(), 'turns': [
                {'turn': g.turn, 'agent': g.agent, 'view': g.view, 'messages': g.messages, 'prompt_ids': g.prompt, 'executed': g.executed,
                 'candidates': [{'text': c.text, 'tokens': c.tokens, 'logp': [round(value, 5) for value in c.logp], 'reward': c.reward,
                                 'team': c.outcome.team, 'local': c.outcome.local, 'valid': c.outcome.valid, 'note': c.outcome.note,
                                 'advantage': c.advantage, 'stopped': c.stopped} for c in g.candidates]} for g in episode.groups]}


def write_episodes(cfg, episodes, step, directory, run):
    """The first episodes of an iteration, for people and tests."""
    if run.is_main and cfg.log_episodes:
        with open(os.path.join(directory, 'episodes.jsonl'), 'a', encoding='utf-8', errors='replace') as file:
            for episode in episodes[:cfg.log_episodes]:
                file.write(json.dumps({'step': step, **record(episode)}, ensure_ascii=False) + '\n')


class Texts:
    """train.log, which is the console, and summary.log, a line per iteration and validation; `say` of the machine writes both."""

    def __init__(self, run, directory):
        self.run, self.directory = run, directory
        console = run.print0
        run.print0 = lambda text: (console(text), self.append('train.log', text))

    def append(self, name, text):
        if self.run.is_main:
            with open(os.path.join(self.directory, name), 'a', encoding='utf-8', errors='replace') as file:
                file.write(text + '\n')

    def summarise(self, step, metrics):
        keys = [key for key in metrics if key.rpartition('/')[2].removeprefix('greedy_') in ('reward', 'success_rate', 'episode_length')]
        self.append('summary.log', f'step {step:>5}  ' + '  '.join(f'{key} {metrics[key]:.4f}' for key in keys))


# ---- the run ----------------------------------------------------------------------------------------------------------------

def saved_config(cfg):
    """(the configuration, of a resumed run the saved one, of which only flags typed again change anything; the run's folder or None)."""
    latest = os.path.join('logs', cfg.experiment_name, 'latest')
    merged, saved = resume_config(cfg, os.path.join(latest, 'checkpoints'), 'train_agents.py') if cfg.resume else (cfg, None)
    return (replace(merged, GPU_num=cfg.GPU_num), os.path.relpath(os.path.realpath(latest))) if saved else (cfg, None)


def new_run(cfg, run):
    """The folder of a new run, logs/<experiment>/<date>/<time>."""
    root = os.path.join('logs', cfg.experiment_name)
    latest = os.path.join(root, 'latest')

    def create():
        while True:
            date, clock = time.strftime('%Y-%m-%d'), time.strftime('%H-%M-%S')
            try:
                os.makedirs(os.path.join(root, date, clock, 'validate'))
                break
            except FileExistsError:
                time.sleep(0.2)
            except OSError as error:
                raise UserError(f'cannot write {root}: {error.strerror}') from None
        os.makedirs(os.path.join(root, date, clock, 'checkpoints'))
        symlink(Path(latest), os.path.join(date, clock))
    run.on_main(create)
    return os.path.relpath(os.path.realpath(latest))


def announce(cfg, team, task, directory, run):
    kind = {'prompt': 'L1, one model, roles by prompt', 'lora': 'L2, an adapter per agent'}.get(cfg.specialization, 'L3, a model per agent')
    run.print0(f'task      {task_name(cfg)}: {env_settings(cfg, task, cfg.dataset)}, {cfg.max_turns} turns of {", ".join(cfg.order)}')
    for policy in distinct(team):
        run.print0(f'policy    {policy.name}: {policy.model.name_or_path}, {policy.model.num_params():,} parameters, for '
                    f'{", ".join(policy.agents)}')
    run.print0(f'team      {"L0, a single agent" if len(cfg.order) == 1 else kind}; {cfg.rollout_mode}, {cfg.train_sample_num} candidates')
    run.print0(f'machine   {describe_device(run)}')
    run.print0(f'run       {cfg.total_training_steps:,} iterations of {cfg.epoch_size} episodes, optimizer steps of '
                f'{cfg.train_batch_size} sequences; logs in {directory}/')


def write_team(checkpoints, team, state, is_best, run):
    """A checkpoint: one policy is the model in the folder itself, several have a folder each."""
    models, tensors = {}, {}
    for policy in distinct(team):
        models[policy.name] = whole_model(policy.model, run) if isinstance(run, Shared) else policy.model
        tensors.update({f'{policy.name}:{key}': value for key, value in whole(policy.optimizer.state_dict(), run).items()})

    def write(folder):
        for policy in distinct(team):
            policy.use()
            save_model(models[policy.name], policy.tokenizer, folder if len(models) == 1 else os.path.join(folder, policy.name))
    checkpoints.save(state['step'], write, tensors, state, is_best)


def restore(cfg, team, path, directory, run):
    """Puts the optimizers' states of a checkpoint back, cuts what was written after it, and returns the state of the run."""
    tensors, state = read_checkpoint(path)
    for policy in distinct(team):
        own = {key.partition(':')[2]: value for key, value in tensors.items() if key.partition(':')[0] == policy.name}
        policy.optimizer.load_state_dict({key: share(key, value, run) for key, value in own.items()})
    settings, episodes = os.path.join(directory, 'checkpoints', 'run_config.json'), os.path.join(directory, 'episodes.jsonl')

    def cut():
        write_json(settings, {**read_manifest(settings), 'config': as_dict(cfg)})
        if os.path.exists(episodes):
            with open(episodes, encoding='utf-8', errors='replace') as file:
                lines = [line for line in file if line.endswith('\n') and json.loads(line)['step'] <= state['step']]
            with open(episodes, 'w', encoding='utf-8', errors='replace') as file:
                file.writelines(lines)
    run.on_main(cut)
    return state


def main(cfg):
    cfg, directory = saved_config(cfg)              # before setup: device and precision are those of the run, too
    run = setup(cfg.device, cfg.dtype, cfg.matmul)
    run = share_out(run, cfg.GPU_num) if cfg.GPU_num > 1 else run
    stop, going_on = Stop(run), bool(directory)
    directory = directory or new_run(cfg, run)
    texts, task = Texts(run, directory), task_of(cfg)
    if getattr(task, 'RUNS_PROGRAMS', False):
        sandbox.start(cfg.allow_weak_sandbox)       # or it refuses, before the work
    checkpoints = Checkpoints(os.path.join(directory, 'checkpoints'), run)
    resumed = checkpoints.latest() if going_on else None
    if going_on and not resumed and cfg.resume != 'auto':
        raise UserError(f'{directory} holds no whole checkpoint to resume from; start anew without --resume')
    team = load_team(cfg, run, resumed)
    clamp_lengths(cfg, team, run)
    announce(cfg, team, task, directory, run)
    held_out = held_out_problems(cfg, task, run)
    if cfg.eval_only:
        metrics = validate(cfg, team, task, held_out, 0, directory, run)
        run.print0('  '.join(f'{key} {value:.4f}' for key, value in metrics.items()))
        texts.summarise(0, metrics)
        run.close()
        return metrics
    warmup = warmup_within(cfg.lr_warmup_steps, cfg.total_training_steps, run.print0)
    scaler, step, best, metrics, seconds = LossScale(run.dtype), 0, -1.0, {}, 0.0
    if not resumed:
        start_fresh(run, checkpoints.out_dir, as_dict(cfg), script='train_agents.py')
        seconds = warm_up(cfg, team, task, stop, run) if cfg.demo_steps else 0.0
    base_lr = cfg.learning_rate or (1e-4 if cfg.specialization == 'lora' else 1e-5)
    for policy in distinct(team):                   # after the warm-up, whose optimizers moved the weights into their own buffers
        policy.optimizer = new_optimizer(policy, 'adamw', base_lr, cfg.weight_decay)
    if resumed:
        state = restore(cfg, team, resumed, directory, run)
        step, best, scaler = state['step'], state['best_success_rate'], LossScale(run.dtype, state['loss_scale'])
        checkpoints.discard_later(resumed)
    header = {'script': 'train_agents.py', 'task': task.__name__, 'machine': describe_device(run)}
    log = Log(run, directory, header, cfg.total_training_steps, cfg.tensorboard, cfg.wandb_project if cfg.wandb_enabled else None,
              step if resumed else None, name=os.path.relpath(directory, 'logs'))
    if seconds:
        log.write(0, {'demonstrations/seconds': seconds})

    def save(is_best):
        write_team(checkpoints, team, {'step': step, 'best_success_rate': best, 'loss_scale': scaler.state}, is_best, run)

    started, first = time.perf_counter(), step
    while True:
        if step == cfg.total_training_steps or step > first and step % cfg.val_freq == 0 or step == 0 and cfg.val_before_train:
            metrics = validate(cfg, team, task, held_out, step, directory, run)
            log.write(step, metrics)
            texts.summarise(step, metrics)
            is_best = metrics['validation/success_rate'] > best
            best = max(best, metrics['validation/success_rate'])
            save(is_best)
            run.on_main(lambda: pages.episodes_page(directory))
        if step >= cfg.total_training_steps:
            break
        if stop.requested:
            save(False)
            log.close()
            run.print0(f'stopped at step {step}, saved; go on with: {resume_command()}')
            run.close()
            raise SystemExit(stop.code)

        clock, totals = Clock(), dict.fromkeys(TOTALS, 0.0)
        lr = learning_rate(step, cfg.lr_scheduler, base_lr, base_lr * cfg.min_lr_ratio, warmup, cfg.total_training_steps)
        with clock('rollout'):
            episodes = rollout(cfg, team, task, draw_problems(cfg, task, step, run), step, clock)
        with clock('update'):
            batches, groups = plan_batches(cfg, episodes, step, run)
            for policy in distinct(team):
                policy.optimizer.set_lr(lr)
                update(cfg, policy, batches[policy.name], groups, scaler, run, totals)
        step += 1
        write_episodes(cfg, episodes, step, directory, run)
        metrics = step_metrics(cfg, episodes, totals, clock, lr, run)
        log.write(step, metrics)
        texts.summarise(step, metrics)
        log.progress(step)
        if step == first + 1:
            left = (time.perf_counter() - started) * (cfg.total_training_steps - step) / 60
            run.print0(f'          about {left:.1f} minutes for the other {cfg.total_training_steps - step} iterations, validation aside')
    log.close()
    run.print0(f'best validation success_rate {best:.4f}; the team is in {directory}/checkpoints/, its episodes in '
                f'{directory}/episodes.html')
    run.close()
    return {**metrics, 'best_success_rate': best, 'step': step}


def step_metrics(cfg, episodes, totals, clock, lr, run):
    """What an iteration logs; seconds are those of the main rank."""
    tokens, steps = max(totals['tokens'], 1), max(totals['steps'], 1)
    metrics = {'loss': totals['loss'] / steps, 'learning_rate': lr, 'grad_norm': totals['grad_norm'] / steps,
               **summary(cfg, episodes, run), 'entropy': totals['entropy'] / tokens, 'clip_ratio': totals['clipped'] / tokens,
               'approx_kl': totals['kl'] / tokens, 'sampling/logp_gap': totals['gap'] / max(totals['gap_tokens'], 1),
               'optimizer_steps': int(totals['steps'])}
    live = [any(c.advantage for c in g.candidates) for e in episodes for g in e.groups]
    metrics['groups'] = int(gather([[1.0]] * len(live), 1, run).sum())
    metrics['dead_groups'] = int(gather([[float(not alive)] for alive in live], 1, run).sum())
    if cut := int(run.max(clock.truncated)):
        metrics['truncated_prompts'] = cut
    if totals['skipped']:
        metrics['skipped_steps'] = int(totals['skipped'])
    metrics.update({f'time/{name}': round(clock.seconds.get(name, 0.0), 3) for name in ('rollout', 'generate', 'environment', 'update')})
    return metrics


if __name__ == '__main__':
    run_script(main, cfg)
