"""Teams of agents trained by AT-GRPO: groups are made for every agent at every turn, by a tree of candidates.

    python train_agents.py env.benchmark=plan_path recipes/training/agents/plan_path.yaml
    python train_agents.py --model=Qwen/Qwen3-1.7B training.experiment_name=math env.dataset=polaris
    python train_agents.py --resume training.experiment_name=math
    python train_agents.py --eval_only --model=logs/math/latest/checkpoints env.benchmark=AIME24

At each turn of a trajectory the agents act in order. The acting one answers its prompt K times, and every
candidate is scored from the same state: r = alpha * team + local. The best is executed, and the next agent
sees the new state. Each policy learns from its own agents' candidates by PPO's clipped loss (Zhao et al.
2025, AT-GRPO):

    A = (r - mean) / (std + 1e-4) among the K candidates, std unbiased; rho = p(token) now / when drawn
    loss = max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A), at most -dual_clip A if A < 0: token mean

A turn's reward trains that turn only. Validation never branches. Deviations from the paper: the old
log-probabilities are the sampler's, of the same model (the log has the gap as sampling/logp_gap_mean),
and the deviation of a group is kept off 0 by 1e-4.
Settings that all scripts share stand in nanoforge/flags.py, an environment's in its file in data/tasks.
"""
import contextlib
import itertools
import json
import math
import operator
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from configurator import UserError, configclass, fill_in, parse, run_script, setting
from data.tasks.env import (demonstrations, find_task, known_tasks, list_settings, load_task, needs_rules,
                            read_settings)
from nanoforge.flags import MODEL_NAMES, AdapterFlags, Flags, RunFlags, SamplerFlags, StepFlags
from nanoforge.optim import SCHEDULES, learning_rate, warmup_within


@dataclass
class BaseModel:
    path: str = 'tiny'  # Hugging Face name, directory, tiny, or the checkpoints folder of an earlier team


@dataclass
class Agent:
    name: str = ''  # which agent of the task this entry is about
    policy_name: str | None = None  # the policy that it plays with; by specialization if not set
    temperature: float = setting(1.0, path='train_llm_config.temperature')  # of its candidates in training
    val_temperature: float = setting(1.0, path='val_llm_config.temperature')  # of its answers in validation


@configclass
class TeamFlags(Flags):
    section = ''
    # models
    base_models: dict[str, BaseModel] = {}  # policy_0, policy_1, ...: where each begins; others as policy_0
    specialization: str = setting('prompt', choices=('prompt', 'lora', 'full', 'model'))  # L1 one model,
        # roles by prompt; L2 one LoRA per agent on one base; L3 (full, model) a model per agent
    lora_rank: int = setting(16, min=1, needs=('specialization=lora',))  # with specialization=lora
    lora_alpha: float = setting(32.0, above=0, needs=('specialization=lora',))  # counts alpha / rank times
    # team
    turn_order: list[str] = setting([], path='multi_agent_interaction.turn_order')  # the agents in order, one
        # alone is L0; empty = all of the task
    agents: dict[str, Agent] = setting({}, path='agent_policy_configs.agent_configs')  # agent_0, ... each
    # algorithm
    rollout_mode: str = setting('tree', choices=('tree', 'no_tree'))  # AT-GRPO; or MAS+GRPO: K whole
        # trajectories, what an agent earned in one counts for all of its turns
    if_greedy: bool = True  # execute the best candidate; false = the first
    alpha: float = setting(1.0, min=0)  # weight of the team's reward beside an agent's own
    filter_method: str = setting('none', choices=('none', 'dapo', 'std', 'mean'))  # groups to drop. dapo: of
        # equal rewards; std, mean: the filter_ratio with the lowest
    filter_ratio: float = setting(0.0, min=0, below=1)  # share of the groups that std and mean drop
    clip_low: float = setting(0.2, min=0)  # the probability ratio is clipped to 1 - clip_low
    clip_high: float = setting(0.2, min=0)  # ... and 1 + clip_high
    dual_clip: float | None = setting(3.0, above=1)  # loss where A < 0: at most so many times -A; none = off
    entropy_coef: float = setting(0.0, min=0)  # bonus for entropy per token
    ppo_epochs: int = setting(1, min=1)  # passes over the candidates of a step
    # demonstrations
    demo_steps: int = setting(0, path='demonstrations.steps', min=0)  # optimizer steps on noisy
        # scripted ones, before the training; a recipe's are for tiny alone
    demo_batch_size: int = setting(64, path='demonstrations.batch_size', min=1)  # answers in each
    demo_learning_rate: float = setting(2e-3, path='demonstrations.learning_rate', above=0)  # of Muon,
        # of AdamW for adapters; falls linearly to 0
    # run
    allow_weak_sandbox: bool = False  # run programs that agents wrote even where they cannot be shut in
    eval_only: bool = False  # validate what base_models name, and stop


@configclass
class EnvFlags(Flags):
    section = 'env'
    # environment
    task: str | None = setting(None, path='env.name')  # what is played; if not set by data sets, or plan_path
    dataset: str | None = None  # training problems: a game, or data sets joined by + (polaris, code_contests)
    benchmark: str | None = None  # held-out problems: a game, or data sets (AIME24, code_contests)
    max_turns: int = setting(4, min=1)  # turns of a trajectory; in each, every agent acts once
    rules: bool | None = None  # prompts explain the task and the form of an answer; not set: not to tiny
    env: dict = setting({}, path='env', open=list_settings)  # settings of the environment's own


@configclass
class Config(RunFlags, SamplerFlags, StepFlags, EnvFlags, AdapterFlags, TeamFlags):
    section = 'training'
    aliases = dict.fromkeys(MODEL_NAMES, 'base_models.policy_0.path')
    tensor_parallel = setting(1, path='GPU_num')  # processes that share each model, as the guide calls it
    # training
    experiment_name: str = 'agents'  # names the run: logs/<experiment_name>/
    output_dir: str | None = setting(None, also=('out_dir',))  # of its runs; logs/<experiment_name> if unset
    total_training_steps: int = setting(200, min=0, also=('max_steps',))  # iterations: rollout and updates
    epoch_size: int = setting(20, min=1)  # problems that are rolled out per iteration
    train_batch_size: int = setting(32, min=1)  # sequences per optimizer step
    train_sample_num: int = setting(8, min=2)  # K: candidates of an agent at a turn, compared with each other
    max_prompt_length: int = setting(8192, min=1)  # tokens of a prompt; the end of a longer one is kept
    max_response_length: int = setting(8192, min=1)  # tokens of an answer
    val_freq: int = setting(10, min=1)  # iterations between validations, each followed by a checkpoint
    val_before_train: bool = True  # validate before the first iteration, too
    validate_episodes: int = setting(100, min=1)  # held-out problems, each played greedily and sampled
    micro_batch_tokens: int = setting(8192, min=1)  # of a pass on a rank: lower it when memory is short
    lr_scheduler: str = setting('constant', choices=SCHEDULES[:-1])  # over iterations; there is no plateau
    lr_warmup_steps: int = setting(0, min=0)  # iterations of linear warm-up
    min_lr_ratio: float = setting(0.1, min=0, max=1)  # where the schedule ends, as a share of learning_rate
    weight_decay: float = setting(0.01, min=0)  # of matrices
    log_episodes: int = setting(2, min=0)  # trajectories of an iteration that are written out, trees and all

    def check(self):
        super().check()
        check_team(self, task_of(self))


def main(cfg):
    directory = latest_directory(cfg)                           # logs/EXPERIMENT/DATE/TIME of the newest run
    run = Run.open(cfg, 'train_agents.py', os.path.join(directory, 'checkpoints'), cfg.resume,
                   memory_flags=('training.micro_batch_tokens',))
    cfg, task = run.cfg, task_of(run.cfg)
    if cfg.plan:
        return plan.agents(cfg, load_policies(cfg, run), run)
    directory = directory if run.resumed else new_directory(cfg, run)
    run.text_log = os.path.join(directory, 'train.log')         # what is printed from here on
    if getattr(task, 'RUNS_PROGRAMS', False):
        sandbox.start(cfg.allow_weak_sandbox)                   # or it refuses, before the work
    policies = load_policies(cfg, run)                          # one, or an adapter or model for each agent
    team = {agent: policy for policy in policies for agent in policy.agents}
    temperatures = {name: agent.temperature for name, agent in agents_of(cfg).items()}
    resolve_defaults(cfg, policies, task, run)                  # learning rate, lengths, rules
    held_out = held_out_problems(cfg, task, run)                # the same ones at every validation
    print_summary(cfg, policies, task, directory, run)
    if cfg.eval_only:
        metrics, _ = validate(cfg, team, task, held_out, 0, directory, run)
        return run.finish(metrics, '  '.join(f'{key} {value:.4f}' for key, value in metrics.items()))
    demo_seconds = 0.0 if run.resumed else warm_up(cfg, policies, task, run)
    for policy in policies:                                     # made now: the warm-up's moved the weights
        policy.optimizer = build_optimizer(policy, 'adamw', cfg.learning_rate, cfg.weight_decay)
    optimizers = {f'{policy.name}:': policy.optimizer for policy in policies}
    state = run.restore(State(), optimizers)                    # step, best_success_rate, where it resumes
    if ended := run.ended(state, cfg.total_training_steps, 'total_training_steps'):
        return ended
    log = run.start(cfg.total_training_steps, state.step, {'task': task.__name__}, log_interval=1,
                    name=board_name(cfg, directory), directory=directory, data=stored.files_read)
    run.on_main(lambda: cut_log(os.path.join(directory, 'episodes.jsonl'), state.step))     # they come again
    if demo_seconds:
        log.write(0, {'demonstrations/seconds': demo_seconds})

    def save(best=False):
        run.save(state, None, None, optimizers, best=best, write=team_writer(policies))

    while True:
        run.sampler.update(state.step, [policy.model for policy in policies], policies[0].tokenizer)
        # ---- once in a while: validate, checkpoint, draw; a resumed run has done that at its first step
        last = state.step >= cfg.total_training_steps
        is_due = state.step % cfg.val_freq == 0 and state.step > log.first_step
        if last or is_due or (state.step == 0 and cfg.val_before_train):
            with log.pause():
                metrics, text = validate(cfg, team, task, held_out, state.step, directory, run)
                log.write(state.step, metrics)
                log.text(state.step, 'samples', text)
                save(best=state.note_success(metrics['validation/success_rate']))
                if run.is_main:
                    show(cfg, team, directory)
        if last:
            break
        run.exit_if_asked(save)

        # ---- 1. roll out a tree: at each turn every agent draws K candidates from one state, and the best is
        # executed. What is drawn is a function of (seed, step, problem, turn, agent): no rank sees another's
        samples = cfg.train_sample_num if cfg.rollout_mode == 'tree' else 1
        with log.timed('rollout'), run.unsharded():
            problems = draw_problems(cfg, task, state.step, run)        # no_tree: each of them K times
            seed = seed_for(cfg.seed, 'play', state.step)
            trajectories = rollout(cfg, team, task, problems, seed, samples, temperatures, log.timed)

        # ---- 2. advantages: what a candidate earned beyond the others of its prompt. Not beyond those of
        # other turns or problems, some of which are easier; and no critic: the group is its own baseline.
        # no_tree: the members of a group are whole trajectories of one problem
        groups = comparable_groups(cfg, trajectories)
        for members in groups.values():
            rewards = torch.tensor([sum(c.reward for c in member) for member in members])       # (K,)
            deviations = rewards - rewards.mean()
            std = (deviations.square().sum() / max(len(members) - 1, 1)).sqrt()
            advantages = deviations / (std + 1e-4)
            if not rewards.min() < rewards.max():
                advantages = torch.zeros_like(rewards)              # exactly: rounding would leave a little
            for member, advantage in zip(members, advantages.tolist()):
                for candidate in member:
                    candidate.advantage = advantage

        # ---- 3. update: each policy learns from its own agents' candidates, in one or more optimizer steps
        lowest = cfg.learning_rate * cfg.min_lr_ratio
        lr = learning_rate(state.step, cfg.lr_scheduler, cfg.learning_rate, lowest, cfg.lr_warmup_steps,
                           cfg.total_training_steps)
        log.flops_per_token = plan.team_flops(cfg, policies[0].model, groups)
        learned, stats, norms = 0, [], []       # tokens; a row for each micro-batch; a norm for each step
        with log.timed('update'):
            for policy, tokens, candidates in optimizer_steps(cfg, policies, groups, state.step, run):
                learned += tokens
                model = policy.use().train()
                for micro_batch in run.even(micro_batches(cfg, candidates), model):
                    logp, entropy, mask = forward(model, micro_batch, run)                  # (B, T) each
                    sampling_logp = padded([c.logp for c in micro_batch], 0.0).to(logp)
                    A = torch.tensor([c.advantage for c in micro_batch], device=run.device)     # (B,)
                    A = torch.where(mask, A[:, None], 0.0)                                  # (B, T)
                    # train_rl.policy_loss with a token ratio, clip and token mean: a test holds them equal.
                    # The sampler is this very model, so its logp is the old one: no forward pass for that.
                    # `where`, as a product keeps a NaN
                    log_ratio = torch.where(mask, logp - sampling_logp, 0.0)
                    ratio = log_ratio.exp()
                    loss = -torch.min(ratio * A, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * A)
                    if cfg.dual_clip is not None:       # the minimum does not bound what a bad one costs
                        loss = torch.where(A < 0, torch.min(loss, -cfg.dual_clip * A), loss)
                    # over the tokens of the whole step, not of the micro-batch: the cut changes no gradient
                    loss = loss.sum() / tokens
                    if cfg.entropy_coef:
                        loss = loss - cfg.entropy_coef * torch.where(mask, entropy, 0.0).sum() / tokens
                    run.backward(loss)
                    with torch.no_grad():               # sums for the log
                        clipped = (ratio < 1 - cfg.clip_low) & (A < 0) | (ratio > 1 + cfg.clip_high) & (A > 0)
                        kl = torch.expm1(log_ratio) - log_ratio
                        sums = [loss, mask.sum(), entropy[mask].sum(), clipped.sum(), kl.sum(),
                                log_ratio.abs().sum(), log_ratio.abs().max()]
                    stats.append([len(norms), *torch.stack(sums).tolist()])     # waits for a GPU once
                # a sum over ranks; a step that is not finite is skipped, and five in a row end the run
                norms.append(run.step(policy.optimizer, lr, cfg.max_grad_norm))
        state.step += 1
        state.num_tokens += learned
        write_trajectories(cfg, trajectories, state.step, directory, run)
        metrics = step_metrics(cfg, trajectories, stats, norms, run)
        write_summary(state.step, metrics, directory, run)
        log.train(state.step, learned, learning_rate=lr, num_tokens=state.num_tokens, **metrics)
        run.sampler.check(metrics)
    best, folder = state.best_success_rate, os.path.join(directory, 'checkpoints')
    result = f'best validation success_rate {best:.4f}; the team is in {folder}/'
    if state.best_step == 0:
        result = (f'no validation was better than that before the training, success_rate {best:.4f}, whose '
                  f'model is in {folder}/; the trained team is in {folder}/last')
    return run.finish({**metrics, 'best_success_rate': best, 'step': state.step},
                      f'{result}, its trajectories in {directory}/episodes.html')


def check_team(cfg, task):
    """UserError where settings contradict the environment or each other. Types env.*, fills in turn_order."""
    cfg.env = read_settings(task, cfg.env)
    read_settings(task, {'rules': cfg.rules})           # where they are set it must have some
    order = cfg.turn_order = cfg.turn_order or list(task.ROLES)
    for agent in order:
        if agent not in task.ROLES:
            raise UserError(f"turn_order: {name_of(task)} has no '{agent}', but {', '.join(task.ROLES)}")
    if len(set(order)) < len(order) or task.ACTS not in order:
        raise UserError(f'turn_order names each agent once, and among them {task.ACTS}, without whom nothing '
                        'happens')
    for key, agent in cfg.agents.items():
        if agent.name not in order:
            raise UserError(f"agent_configs.{key}.name: '{agent.name}' is none of the agents in turn_order: "
                            f'{", ".join(order)}')
    if (cfg.filter_ratio > 0) != (cfg.filter_method in ('std', 'mean')):
        raise UserError(f'filter_ratio={cfg.filter_ratio:g} and filter_method={cfg.filter_method} do not '
                        'fit: std and mean need a ratio above 0, the others have none')
    # a second model means one for each agent, unless specialization was set in the same place
    if set(cfg.base_models) - {'policy_0', *policies_of(cfg)}:
        if 'specialization' not in (cfg.flags if 'base_models' in cfg.flags else cfg.typed):
            cfg.specialization = 'full'
    policies = policies_of(cfg)
    if unknown := set(cfg.base_models) - {'policy_0', *policies}:
        raise UserError(f'base_models.{min(unknown)}: no agent plays with it, since specialization='
                        f'{cfg.specialization} makes {", ".join(policies)}; '
                        'specialization=full makes one for each agent')


def task_of(cfg):
    """The module of data/tasks that env.name, env.benchmark and env.dataset mean. UserError: none, or two."""
    named = {name: find_task(name) for name in (cfg.task, cfg.benchmark, cfg.dataset) if name}
    tasks = [task for task in named.values() if task]
    if not named:
        return load_task('plan_path')
    # a data set may be a file of the user's, which only env.name can place
    if not tasks or cfg.task and not named[cfg.task]:
        known = [name for task, datasets in known_tasks().items() for name in (task, *datasets)]
        raise UserError(f"env: no environment or data set '{next(iter(named))}' is known; there are "
                        f'{", ".join(known)}; a game of yours is a file in data/tasks/, and data of yours '
                        'want env.name=math or env.name=code')
    for name, task in named.items():
        if task not in (None, tasks[0]):
            raise UserError(f"env: '{name}' is about {name_of(task)}, not {name_of(tasks[0])}: train and "
                            'validate on the same kind of task')
    return tasks[0]


def agents_of(cfg):
    """{agent: its entry of agent_configs, or one with the defaults}, in the order of turns."""
    entries = {agent.name: agent for agent in cfg.agents.values()}
    return {name: entries.get(name) or Agent(name) for name in cfg.turn_order}


def policies_of(cfg):
    """{policy: its agents}, by specialization or as agent_configs say."""
    policies = {}
    for number, (name, agent) in enumerate(agents_of(cfg).items()):
        usual = {'prompt': 'policy_0', 'lora': name}.get(cfg.specialization, f'policy_{number}')
        policies.setdefault(agent.policy_name or usual, []).append(name)
    return policies


def paths_of(cfg):
    """{policy: what it begins with}: the model that base_models name for it, else policy_0's."""
    first = cfg.base_models.get('policy_0', BaseModel())
    return {name: cfg.base_models.get(name, first).path for name in policies_of(cfg)}


def name_of(task):
    return task.__name__.rpartition('.')[2]


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import torch

from data import sandbox
from data.batches import cut, pack, padded
from data.chat import fold_system, prompt_ids, render
from data.tasks import stored
from model import load_model, save_model
from nanoforge import pages, plan, plots
from nanoforge.checkpoint import append_text, symlink, writing
from nanoforge.log import cut_log
from nanoforge.lora import add_lora, load_adapter, set_adapter
from nanoforge.optim import AdamW, make_optimizer
from nanoforge.run import Run, State as RunState, describe_device, explain_out_of_memory, seed_for
from sample import generate


@dataclass
class State(RunState):
    best_success_rate: float = -1.0
    best_step: int | None = None

    def note_success(self, success_rate):
        """True where a validation is the best so far."""
        best = success_rate > self.best_success_rate
        if best:
            self.best_success_rate, self.best_step = success_rate, self.step
        return best


@dataclass
class Policy:
    """What some of the agents play with: a model, or an adapter on one, and the optimizer of its weights."""
    name: str
    model: torch.nn.Module
    tokenizer: object
    agents: list
    adapter: str | None = None  # its name on the model
    generate: object = generate     # draws its answers: here, or on the servers of sampler_url
    optimizer: object = None

    def use(self):
        """Its model with its own adapter. Never between a forward pass and its backward."""
        if self.adapter:
            set_adapter(self.model, self.adapter)
        return self.model


@dataclass
class Candidate:
    """One answer, token by token as it was sampled."""
    prompt: list                # ids that it was drawn after; one list for all candidates of a group
    tokens: list                # ids, the stop token included
    logp: list = ()             # log-probability of each when it was drawn
    text: str = ''
    stopped: bool = True        # False: cut off at max_response_length
    temperature: float = 1.0    # that it was drawn at
    outcome: object = None      # data.tasks.env.Outcome
    reward: float = 0.0         # alpha * team + local
    advantage: float = 0.0      # what step 2 of main gives it


@dataclass
class Group:
    """The candidates of one agent at one turn of one trajectory: all answer the same prompt."""
    turn: int
    agent: str
    messages: list              # the prompt as a chat
    truncated: bool             # it was too long, and lost its beginning
    view: str                   # the state before, for people
    candidates: list
    chosen: int = 0             # which of them was executed


@dataclass
class Trajectory:
    number: int                 # of the problem, whatever the rank that plays it; no_tree: times K, plus k
    problem: dict
    env: object                 # the Env of the task, in its present state
    groups: list = field(default_factory=list)

    @property
    def reward(self):
        """The rewards of what was executed, summed over turns, mean over agents."""
        agents = {group.agent for group in self.groups}
        return sum(group.candidates[group.chosen].reward for group in self.groups) / max(len(agents), 1)


# ---- rollouts ----------------------------------------------------------------------------------------------

def rollout(cfg, team, task, problems, seed, num_samples, temperatures, timed=contextlib.nullcontext):
    """Plays problems [(number, problem)] side by side -> [Trajectory].

    At its turn an agent draws `num_samples` candidates, and one is executed: several make a tree, one a plain
    trajectory. Candidates depend on seed, turn, agent and the problem's number alone.
    """
    trajectories = [Trajectory(number, problem, task.Env(problem)) for number, problem in problems]
    with ThreadPoolExecutor(os.cpu_count()) as pool:            # of threads that wait for agents' programs
        for turn in range(cfg.max_turns):
            for agent in cfg.turn_order:
                acting = [trajectory for trajectory in trajectories if not trajectory.env.done]
                turn_seed = seed_for(seed, turn, agent)
                with timed('generate'):
                    groups = sample_candidates(cfg, team[agent], agent, acting, turn, turn_seed, num_samples,
                                               temperatures[agent])
                with timed('environment'):
                    for trajectory, group, outcomes in zip(acting, groups, pool.map(score, acting, groups)):
                        for candidate, outcome in zip(group.candidates, outcomes):
                            candidate.outcome, candidate.reward = outcome, outcome.reward(cfg.alpha)
                        rewards = [candidate.reward for candidate in group.candidates]
                        # the others are leaves of the tree: they teach, and nothing grows from them
                        group.chosen = rewards.index(max(rewards)) if cfg.if_greedy else 0
                        trajectory.env.step(agent, group.candidates[group.chosen].outcome)
                        trajectory.groups.append(group)
    return trajectories


def score(trajectory, group):
    """Outcomes of a group's candidates; at once where the task can run their programs side by side."""
    env, texts = trajectory.env, [candidate.text for candidate in group.candidates]
    if hasattr(env, 'score_many'):
        return env.score_many(group.agent, texts)
    return [env.score(group.agent, text) for text in texts]


def sample_candidates(cfg, policy, agent, trajectories, turn, seed, num_samples, temperature):
    """The candidates of an agent in the present state of each trajectory -> [Group]."""
    tokenizer = policy.tokenizer
    chats = [fold_system(tokenizer, trajectory.env.prompt(agent)) for trajectory in trajectories]
    whole = [prompt_ids(tokenizer, messages) for messages in chats]
    prompts = [prompt[-cfg.max_prompt_length:] for prompt in whole]         # what is new stands at the end
    # no top_k, top_p or repetition penalty: the distribution that is sampled is the one that is trained
    samples = policy.generate(policy.use(), prompts, cfg.max_response_length, temperature=temperature,
                              seed=seed, stop_ids=tokenizer.stop_ids, num_samples=num_samples,
                              numbers=[trajectory.number for trajectory in trajectories])
    columns = samples.tokens, samples.logp, samples.lengths, samples.stopped
    rows = zip(*(column.tolist() for column in columns))
    groups = []
    for i, trajectory in enumerate(trajectories):
        candidates = []
        for tokens, logp, length, stopped in itertools.islice(rows, num_samples):
            text = tokenizer.decode(tokens[:length - stopped], skip_special_tokens=True)
            candidates.append(Candidate(prompts[i], tokens[:length], logp[:length], text, stopped,
                                        temperature))
        truncated = len(prompts[i]) < len(whole[i])
        groups.append(Group(turn, agent, chats[i], truncated, trajectory.env.view(), candidates))
    return groups


def draw_problems(cfg, task, step, run):
    """This rank's (number, problem) of an iteration; no_tree: each problem K times."""
    seed = seed_for(cfg.seed, 'problems', step)         # a counter: a resumed run draws what it would have
    problems = task.problems('train', cfg.epoch_size, seed, **env_settings(cfg, task, cfg.dataset))
    own = list(enumerate(problems))[run.rank::run.world_size]       # a group never spans ranks
    if cfg.rollout_mode == 'tree':
        return own
    K = cfg.train_sample_num
    return [(number * K + k, problem) for number, problem in own for k in range(K)]


def held_out_problems(cfg, task, run):
    """This rank's (number, problem) of every validation. Those of the training are read, too: what is wrong
    with them is said before any work, and where they all come from, in train.log as well."""
    settings = env_settings(cfg, task, cfg.benchmark)
    with stored.reported_by(run.print0):
        problems = task.problems('eval', cfg.validate_episodes, 'validation', **settings)
        if not cfg.eval_only:
            draw_problems(cfg, task, 0, run)
    return list(enumerate(problems))[run.rank::run.world_size]


def env_settings(cfg, task, dataset):
    """What problems() of the task takes: env.* where they are set, else the task's defaults."""
    settings = {name: default for name, (default, _) in task.SETTINGS.items()}
    for name, value in (('dataset', dataset), ('rules', cfg.rules)):
        if name in settings:
            settings[name] = value
    return {**settings, **cfg.env}


# ---- updates -----------------------------------------------------------------------------------------------

def comparable_groups(cfg, trajectories):
    """{(problem, turn, agent's number): members}, members being lists of candidates that share an advantage.

    tree: K members of one candidate each, which answer one prompt. no_tree: K members, each with all that an
    agent said in a trajectory; there the turn is 0.
    """
    groups = {}
    for trajectory in trajectories:
        for group in trajectory.groups:
            for k, candidate in enumerate(group.candidates):
                problem, turn, member = trajectory.number, group.turn, k
                if cfg.rollout_mode == 'no_tree':
                    problem, turn, member = problem // cfg.train_sample_num, 0, problem
                members = groups.setdefault((problem, turn, cfg.turn_order.index(group.agent)), {})
                members.setdefault(member, []).append(candidate)
    return {key: list(members.values()) for key, members in groups.items()}


def optimizer_steps(cfg, policies, groups, step, run):
    """(policy, tokens of all ranks, this rank's candidates) of each optimizer step, the same on every rank.

    The candidates of a group stay together, so that their prompt is computed once; a step has
    train_batch_size sequences, of all ranks.
    """
    own = {key: [c for member in members for c in member] for key, members in groups.items()}
    # of other ranks' candidates what it takes to shuffle, filter and cut alike; they stay where they are
    facts = [[key, [[len(c.tokens), c.reward, c.advantage] for c in group]] for key, group in own.items()]
    known = sorted((tuple(key), group) for key, group in run.gather(facts))
    kept = kept_groups(cfg, [group for _, group in known])
    for policy in policies:
        for epoch in range(cfg.ppo_epochs):
            draw = torch.Generator().manual_seed(seed_for(cfg.seed, 'batches', policy.name, step, epoch))
            # groups are shuffled, anew in each pass; sequences within one are not
            sequences = []              # (group, place in it, tokens)
            for number in torch.randperm(len(known), generator=draw).argsort().tolist():
                key, group = known[number]
                if kept[number] and cfg.turn_order[key[-1]] in policy.agents:
                    sequences += [(key, place, tokens) for place, (tokens, *_) in enumerate(group)]
            for batch in cut(sequences, cfg.train_batch_size):
                tokens = sum(tokens for *_, tokens in batch)
                yield policy, tokens, [own[key][place] for key, place, _ in batch if key in own]


def kept_groups(cfg, groups):
    """Whether filter_method leaves each of these groups of (tokens, reward, advantage)."""
    if cfg.filter_method == 'dapo':
        return [any(advantage for *_, advantage in group) for group in groups]
    kept = [True] * len(groups)
    if cfg.filter_method in ('std', 'mean'):
        measure = statistics.pstdev if cfg.filter_method == 'std' else statistics.fmean
        values = [measure([reward for _, reward, _ in group]) for group in groups]
        ascending = sorted(range(len(groups)), key=values.__getitem__)      # of equal ones the first goes
        for number in ascending[:int(cfg.filter_ratio * len(groups))]:
            kept[number] = False
    return kept


def micro_batches(cfg, candidates):
    """Candidates -> lists of one temperature and at most micro_batch_tokens; neighbours share a prompt."""
    batches, size = [], 0
    # one without an advantage has no gradient: its tokens count in the mean, and that is all
    learned = [candidate for candidate in candidates if candidate.advantage or cfg.entropy_coef]
    for candidate in sorted(learned, key=operator.attrgetter('temperature')):
        before = batches[-1][-1] if batches else None
        size += len(candidate.tokens)
        if before and before.prompt is not candidate.prompt:
            size += len(candidate.prompt)
        if not before or before.temperature != candidate.temperature or size > cfg.micro_batch_tokens:
            batches.append([])
            size = len(candidate.prompt) + len(candidate.tokens)
        batches[-1].append(candidate)
    return batches


def forward(model, candidates, run):
    """log p and entropy of each token of B candidates at their temperature, and the mask: (B, T) each."""
    groups = []                 # a prompt is computed once for neighbours that share it
    for candidate in candidates:
        if not groups or groups[-1][0] is not candidate.prompt:
            groups.append((candidate.prompt, []))
        groups[-1][1].append(candidate.tokens)
    batch = pack(groups, run.device)
    with run.autocast():
        hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions)  # (B, T, C)
        stats = model.token_stats(hidden, batch.targets, candidates[0].temperature)
    return stats['logp'], stats['entropy'], batch.targets >= 0


# ---- the team ----------------------------------------------------------------------------------------------

def load_policies(cfg, run):
    """[Policy], still without optimizers: from the resumed checkpoint, else from what base_models name."""
    paths, policies = paths_of(cfg), []
    with explain_out_of_memory('--GPU_num (a higher one shards each model)'):
        if cfg.specialization == 'lora':        # one base for all: an agent costs the memory of an adapter
            base = load_model(base_of(cfg.base_models.get('policy_0', BaseModel()).path), run.device)
        for name, agents in policies_of(cfg).items():
            path = str(run.resumed or paths[name])
            if os.path.isdir(os.path.join(path, name)):         # a team's checkpoint has a folder for each
                path = os.path.join(path, name)
            if cfg.specialization != 'lora':
                policies.append(Policy(name, *load_model(path, run.device), agents))
                continue
            if os.path.exists(os.path.join(path, 'adapter_config.json')):
                load_adapter(base[0], path, name, trainable=True)
            else:                               # a new one, the same whatever the others are
                torch.manual_seed(seed_for(cfg.seed, 'weights', name))
                add_lora(base[0], cfg.lora_rank, cfg.lora_alpha, target_modules='all-linear', name=name,
                         rslora=cfg.use_rslora, dora=cfg.use_dora)
            policies.append(Policy(name, *base, agents, adapter=name))
    for policy in policies:
        if policy.tokenizer is None:
            raise UserError(f'{policy.model.name_or_path} has no tokenizer: an agent reads and writes text')
        run.prepare(policy.model.set_matmul(run.matmul))
        policy.generate = run.sampler.generate if cfg.sampler_url else generate
    return policies


def base_of(path):
    """The base model of a saved team of adapters; any other path is a model's own."""
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, 'config.json')):
        return path
    for file in sorted(Path(path).glob('*/adapter_config.json')):       # they share it: any one will do
        return json.loads(file.read_text(encoding='utf-8'))['base_model_name_or_path']
    raise UserError(f'{path} holds neither a model nor adapters of a team')


def team_writer(policies):
    """write(folder) for run.save: one policy is the model in the folder itself, each of several has one."""
    def write(folder):
        for policy in policies:
            path = os.path.join(folder, policy.name) if len(policies) > 1 else folder
            save_model(policy.use(), policy.tokenizer, path)
    return write


def build_optimizer(policy, kind, lr, weight_decay):
    """Over just this policy's weights: momentum and weight decay would move an idle adapter."""
    betas = (0.9, 0.999) if kind == 'adamw' else (0.9, 0.95)
    if not policy.adapter:
        return make_optimizer(kind, policy.model, lr, weight_decay, betas)
    own = [(name, p) for name, p in policy.model.named_parameters() if f'.lora.{policy.adapter}.' in name]
    return AdamW(own, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)     # Muon is for whole matrices


def resolve_defaults(cfg, policies, task, run):
    """Fills in what depends on the models: the learning rate, whether they are told the rules, and lengths
    that fit into the context."""
    values = {'learning_rate': 1e-4 if cfg.specialization == 'lora' else 1e-5}
    if 'rules' in task.SETTINGS:
        # a run of an earlier version that goes on had none
        values['rules'] = not run.resumed and any(map(needs_rules, paths_of(cfg).values()))
    if chosen := fill_in(cfg, **values):
        run.print0(f'chosen    {chosen}')
    cfg.lr_warmup_steps = warmup_within(cfg.lr_warmup_steps, cfg.total_training_steps, run.print0)
    context = min(policy.model.config.block_size for policy in policies)
    response = min(cfg.max_response_length, context // 2)       # at most half of it, prompts the rest
    prompt = min(cfg.max_prompt_length, context - response)
    if (prompt, response) != (cfg.max_prompt_length, cfg.max_response_length):
        run.print0(f'lengths   max_prompt_length {cfg.max_prompt_length} -> {prompt}, max_response_length '
                   f'{cfg.max_response_length} -> {response}: the context of the model is {context} tokens')
    cfg.max_prompt_length, cfg.max_response_length = prompt, response


# ---- the warm-up on demonstrations -------------------------------------------------------------------------

def warm_up(cfg, policies, task, run):
    """Supervised steps on noisy scripted demonstrations: afterwards a model knows the form of an answer, much
    of the task, and the demonstrators' faults. Returns the seconds that it took."""
    def draw_chats(step):
        settings, seed = env_settings(cfg, task, cfg.dataset), f'{cfg.seed}/demonstrations/{step}'
        chats = demonstrations(task, cfg.turn_order, cfg.max_turns, seed, settings)
        return list(itertools.islice(chats, cfg.demo_batch_size))

    if not cfg.demo_steps:
        return 0.0
    others, reason = set(paths_of(cfg).values()) - {'tiny'}, ''
    if others and 'demo_steps' not in cfg.flags:        # a recipe's
        reason = f'they are for the embedded model, and {min(others)} begins with what it knows'
    elif not draw_chats(0):
        reason = 'they are made of generated problems, and these are not'
    if reason:
        run.print0(f'note      trains without demonstrations: {reason}')
        return 0.0
    optimizers = {p.name: build_optimizer(p, 'muon', cfg.demo_learning_rate, 0.01) for p in policies}
    began, losses = time.perf_counter(), []
    for step in range(cfg.demo_steps):
        if run.stop.requested:
            run.print0('stopped during the demonstrations, of which nothing is kept: start again')
            run.close()
            raise SystemExit(run.stop.code)
        chats = draw_chats(step)
        for policy in policies:
            rows = [messages for agent, messages in chats if agent in policy.agents]
            if rows:
                with run.flags_to_lower('--demo_learning_rate', '--demo_batch_size'):
                    losses.append(supervised_step(cfg, policy, optimizers[policy.name], rows, step, run))
        if (step + 1) % max(1, cfg.demo_steps // 10) == 0:
            seconds, loss = time.perf_counter() - began, statistics.fmean(losses[-50:])
            left = seconds / (step + 1) * (cfg.demo_steps - step - 1)
            run.print0(f'demonstrations {step + 1}/{cfg.demo_steps}  loss {loss:.4f}  {seconds:.0f} s, about '
                       f'{left:.0f} s to go')
    return time.perf_counter() - began


def supervised_step(cfg, policy, optimizer, chats, step, run):
    """One step of next-token loss on the last message of each chat; the mean over all of its tokens."""
    rows = [render(policy.tokenizer, fold_system(policy.tokenizer, messages)) for messages in chats]
    rows = [row for row in rows if len(row.ids) <= policy.model.config.block_size]
    tokens = sum(sum(row.mask) for row in rows)
    answers = []
    own = sorted(rows[run.rank::run.world_size], key=lambda row: len(row.ids))      # so little is padding
    for row in own:                             # what is learned is the end, behind a prompt
        start = row.mask.index(True)
        answers.append(Candidate(row.ids[:start], row.ids[start:start + sum(row.mask)]))
    model, total = policy.use().train(), torch.zeros((), device=run.device)
    for micro_batch in run.even(cut(answers, 16), model):
        logp, _, _ = forward(model, micro_batch, run)
        loss = -logp.sum() / tokens             # of the whole step: the cut changes nothing
        run.backward(loss)
        total += loss.detach()
    scale = min((step + 1) / 20, 1 - step / cfg.demo_steps)     # up in 20 steps, then down to 0
    run.step(optimizer, cfg.demo_learning_rate * scale, 1.0)
    return float(run.sum(total))


# ---- validation --------------------------------------------------------------------------------------------

def validate(cfg, team, task, problems, step, directory, run):
    """Plays held-out problems without branching, greedily and sampled -> metrics, and what the team said to
    the first one. All trajectories go to validate/."""
    sampled = {name: agent.val_temperature for name, agent in agents_of(cfg).items()}
    metrics, records = {}, []
    for mode, prefix in (('sampled', 'validation/'), ('greedy', 'validation/greedy_')):
        # sampled is what is trained; greedy is how a team would be used
        temperatures = sampled if mode == 'sampled' else dict.fromkeys(sampled, 0.0)
        seed = seed_for(cfg.seed, 'validate', mode)             # the same at every validation
        with run.unsharded():
            trajectories = rollout(cfg, team, task, problems, seed, 1, temperatures)
        metrics.update({prefix + key: value for key, value in summary(cfg, trajectories, run).items()})
        records += [{'step': step, 'manner': mode, **record(trajectory)} for trajectory in trajectories]
    lines = ''.join(map(json_line, run.gather(records)))
    if run.is_main:
        Path(directory, 'validate', f'step-{step}.jsonl').write_text(lines, 'utf-8', 'replace')
    write_summary(step, metrics, directory, run)
    said = []
    for trajectory in trajectories[:1]:
        said = [f'{group.agent}: {group.candidates[group.chosen].text}' for group in trajectory.groups]
        said.append('solved' if trajectory.env.success else 'not solved')
    return metrics, '\n'.join(said)


def summary(cfg, trajectories, run):
    """{'reward', 'success_rate', 'episode_length', and by agent} over the trajectories of all ranks."""
    rows = [[t.reward, t.env.success, max((g.turn for g in t.groups), default=-1) + 1] for t in trajectories]
    metrics = dict(zip(('reward', 'success_rate', 'episode_length'), means(rows, 3, run)))
    for agent in cfg.turn_order:
        candidates = [c for t in trajectories for g in t.groups if g.agent == agent for c in g.candidates]
        rows = [[c.reward, c.outcome.valid, len(c.tokens), not c.stopped] for c in candidates]
        names = [f'{agent}/{key}' for key in ('reward', 'valid', 'tokens', 'cut_off')]
        metrics.update(zip(names, means(rows, 4, run)))
    return metrics


def means(rows, width, run):
    """The mean of each column over the rows of all ranks, 0 where there are none."""
    rows = torch.tensor(run.gather(rows), dtype=torch.float64).view(-1, width)
    return (rows.sum(0) / max(len(rows), 1)).tolist()


# ---- what is written ---------------------------------------------------------------------------------------

def latest_directory(cfg):
    """The folder of the experiment's newest run; logs/EXPERIMENT/latest where there is none."""
    return os.path.relpath(os.path.realpath(experiment_directory(cfg) / 'latest'))


def experiment_directory(cfg):
    return Path(cfg.output_dir or Path('logs', cfg.experiment_name))


def show(cfg, team, directory):
    """The page and the picture so far."""
    pages.episodes_page(directory)
    success = {'success_rate': 'training', 'validation/success_rate': 'sampled',
               'validation/greedy_success_rate': 'greedy'}
    panels = [('episodes solved', success),
              ('reward of a turn', {f'{agent}/reward': agent for agent in team}),
              ('tokens of an answer', {f'{agent}/tokens': agent for agent in team})]
    log = Path(directory, 'log.jsonl')
    plots.curves(log, Path(directory, 'reward.png'), cfg.experiment_name, panels)


def new_directory(cfg, run):
    """Makes logs/EXPERIMENT/DATE/TIME, which is `latest` from now on; the run's checkpoints go there."""
    root = experiment_directory(cfg)

    def create():
        name = time.strftime('%Y-%m-%d/%H-%M-%S')
        while (root / name).exists():                           # two starts in one second
            time.sleep(0.2)
            name = time.strftime('%Y-%m-%d/%H-%M-%S')
        with writing(root):
            os.makedirs(root / name / 'validate')
            os.makedirs(root / name / 'checkpoints')
            symlink(root / 'latest', name)
    run.on_main(create)
    directory = latest_directory(cfg)
    run.checkpoints.out_dir = Path(directory, 'checkpoints')
    return directory


def board_name(cfg, directory):
    """EXPERIMENT/DATE_TIME: TensorBoard's events lie beside the folder, in which `latest` would show them
    again."""
    return os.path.join(cfg.experiment_name, '_'.join(Path(directory).parts[-2:]))


def step_metrics(cfg, trajectories, stats, norms, run):
    """What an iteration logs, the same on every rank. stats: of micro-batches, as main gathers them."""
    stats = torch.tensor(run.gather(stats), dtype=torch.float64).view(-1, 8)
    _, loss, tokens, entropy, clipped, kl, *_ = stats.sum(0).tolist()
    tokens, steps = max(tokens, 1), max(len(norms), 1)
    first = stats[stats[:, 0] == 0]                     # still the weights that sampled: they should agree
    groups = [group for trajectory in trajectories for group in trajectory.groups]
    groups = run.gather([[any(c.advantage for c in group.candidates), group.truncated] for group in groups])
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {'loss': loss / steps,
            'grad_norm': sum(finite) / steps,
            **summary(cfg, trajectories, run),
            'entropy': entropy / tokens,
            'clip_ratio': clipped / tokens,             # tokens that the clip keeps from teaching more
            'approx_kl': kl / tokens,                   # of the sampler to the policy
            'sampling/logp_gap_mean': float(first[:, 6].sum() / first[:, 2].sum().clamp(min=1)),
            'sampling/logp_gap_max': float(first[:, 7].amax()) if len(first) else 0.0,
            'optimizer_steps': len(norms),
            'skipped_steps': len(norms) - len(finite),
            'groups': len(groups),
            'dead_groups': sum(not has_signal for has_signal, _ in groups),     # all members earned the same
            'truncated_prompts': sum(truncated for _, truncated in groups)}


def record(trajectory):
    """A trajectory as JSON: every prompt and candidate with ids, reward, advantage; which was executed."""
    turns = []
    for group in trajectory.groups:
        candidates = []
        for c in group.candidates:
            logp, outcome = [round(value, 5) for value in c.logp], c.outcome
            candidates.append({'text': c.text, 'tokens': c.tokens, 'logp': logp, 'reward': c.reward,
                               'team': outcome.team, 'local': outcome.local, 'valid': outcome.valid,
                               'note': outcome.note, 'advantage': c.advantage, 'stopped': c.stopped})
        turns.append({'turn': group.turn, 'agent': group.agent, 'view': group.view,
                      'messages': group.messages, 'prompt_ids': group.candidates[0].prompt,
                      'executed': group.chosen, 'candidates': candidates})
    return {'episode': trajectory.number, 'problem': trajectory.problem, 'success': trajectory.env.success,
            'reward': trajectory.reward, 'end': trajectory.env.view(), 'turns': turns}


def json_line(entry):
    return json.dumps(entry, ensure_ascii=False) + '\n'


def write_trajectories(cfg, trajectories, step, directory, run):
    """The first trajectories of an iteration, for people and tests."""
    if run.is_main:
        records = [{'step': step, **record(trajectory)} for trajectory in trajectories[:cfg.log_episodes]]
        append_text(os.path.join(directory, 'episodes.jsonl'), ''.join(map(json_line, records)))


def write_summary(step, metrics, directory, run):
    """A line of summary.log, for an iteration or a validation."""
    names = ('reward', 'success_rate', 'episode_length')        # validation/greedy_reward is one, too
    words = [f'{key} {value:.4f}' for key, value in metrics.items()
             if key.rpartition('/')[2].removeprefix('greedy_') in names]
    if run.is_main:
        append_text(os.path.join(directory, 'summary.log'), f'step {step:>5}  {"  ".join(words)}\n')


def print_summary(cfg, policies, task, directory, run):
    """What will be trained, on what, where."""
    levels = {'prompt': 'L1, one model, roles by prompt', 'lora': 'L2, an adapter per agent'}
    level = levels.get(cfg.specialization, 'L3, a model per agent')
    if len(cfg.turn_order) == 1:
        level = 'L0, a single agent'
    run.print0(f'task      {name_of(task)}: {env_settings(cfg, task, cfg.dataset)}, {cfg.max_turns} turns of '
               f'{", ".join(cfg.turn_order)}')
    for policy in policies:
        run.print0(f'policy    {policy.name}: {policy.model.name_or_path}, {policy.model.num_params():,} '
                   f'parameters, for {", ".join(policy.agents)}')
    run.print0(f'team      {level}; {cfg.rollout_mode}, {cfg.train_sample_num} candidates')
    run.print0(f'machine   {describe_device(run)}')
    run.print0(f'run       {cfg.total_training_steps:,} iterations of {cfg.epoch_size} problems, optimizer '
               f'steps of {cfg.train_batch_size} sequences; logs in {directory}/')


if __name__ == '__main__':
    run_script(main, cfg)
