"""Reinforcement learning: PPO, GRPO, GSPO and their relatives, from one composition of small pure functions.

    python train_rl.py                                      # GRPO on the embedded sums, minutes on two cores
    python train_rl.py training.algorithm=ppo model.value_model_name=tiny
    python train_rl.py training.algorithm=distill model.teacher_model_name=models/rl
    python train_rl.py --recipe recipes/training/grpo/llama3_3B_lora.yaml --num-gpus 8
    python train_rl.py --dataset_path problems.jsonl --reward=mine.py:score
    python train_rl.py --resume --output_dir=models/rl      # or --replay=40: look at step 40 again

A rollout samples num_generations completions of each prompt and rewards them. A, the advantage of one, is its
reward less the baseline of its group, over a scale. With ppo every token has its own, from a critic by gae;
with distill from a teacher, as log p_teacher - log p.
    loss = mean of surrogate(ratio, A)          ratio: exp(logp - old_logp), of a token or of a sequence
         + beta * KL(policy || reference) - entropy_coef * entropy + vf_coef * value_loss
PRESETS names the published combinations: GRPO and GSPO differ by one argument. Departures from papers: the
mean is over the whole optimizer step, counted over micro-batches and ranks; in a rollout's first update the
ratio is exactly 1, as the old log-probabilities are those of the same forward pass.

Counts are completions, as in TRL: per_device_train_batch_size x gradient_accumulation_steps x GPUs make an
optimizer step, x steps_per_generation x GPUs a rollout, rounded up to whole groups. Where a rollout feeds
several steps, the later ones are off-policy. Settings of several scripts stand in nanoforge/flags.py.
"""
from configurator import UserError, configclass, fill_in, parse, run_script, setting
from data.problems import TASKS
from nanoforge.flags import DataFlags, JudgeFlags, ModelFlags, RewardFlags, RunFlags, SamplerFlags, TrainFlags

SURROGATES = ('clip', 'cispo', 'gmpo', 'sapo', 'reinforce')     # a new one: its name here, its formula below
GRPO = dict(ratio='token', surrogate='clip', mean='sequence', clip_low=0.2, clip_high=0.2, scale='group',
            baseline='mean')
PRESETS = {
    'grpo': GRPO,                                                           # Shao et al. 2024, 2402.03300
    'gspo': {**GRPO, 'ratio': 'sequence', 'clip_low': 3e-4, 'clip_high': 4e-4},     # Zheng 2025, 2507.18071
    'dr_grpo': {**GRPO, 'mean': 'constant', 'scale': 'none'},               # Liu et al. 2025, 2503.20783
    'dapo': {**GRPO, 'mean': 'token', 'clip_high': 0.28},                   # Yu et al. 2025, 2503.14476
    'cispo': {**GRPO, 'surrogate': 'cispo', 'mean': 'token', 'clip_low': 1.0, 'clip_high': 4.0},  # 2506.13585
    'gmpo': {**GRPO, 'surrogate': 'gmpo', 'clip_low': 0.4, 'clip_high': 0.4},   # Zhao et al. 2025, 2507.20673
    'sapo': {**GRPO, 'surrogate': 'sapo'},                                  # Gao et al. 2025, 2511.20347
    'rloo': {**GRPO, 'surrogate': 'reinforce', 'mean': 'constant', 'scale': 'none',
             'baseline': 'leave_one_out'},                                  # Ahmadian et al. 2024, 2402.14740
    'reinforce++': {**GRPO, 'mean': 'token', 'scale': 'batch'},    # Hu et al. 2025, 2501.03262, with baseline
    'ppo': {**GRPO, 'mean': 'token'},                               # Schulman et al. 2017; advantages by gae
    'distill': {**GRPO, 'mean': 'token'},               # Agarwal et al. 2023, 2306.13649; by a teacher
}
JUDGES = {'ppo': 'critic', 'distill': 'teacher'}        # who gives every token an advantage of its own


@configclass
class Config(RunFlags, SamplerFlags, TrainFlags, RewardFlags, JudgeFlags, DataFlags, ModelFlags):
    section = 'training'

    torch_dtype = 'float32'
    # data
    task: str = setting('arithmetic', path='data.task', choices=TASKS, needs=('dataset_path=none',))  # the
        # embedded task, without data sets
    num_problems: int = setting(20000, path='data.num_problems', min=1)  # how many problems it generates
    eval_problems: int = setting(200, path='data.eval_problems', min=1)  # that an evaluation asks, at most
    max_length = 512
    max_prompt_length = 256
    max_completion_length: int | None = setting(None, path='data.max_completion_length', min=1)  # tokens
        # sampled at most: max_length less max_prompt_length; 48 for the embedded task
    remove_unused_columns: bool = setting(False, path='data.remove_unused_columns')  # rewards see only
        # question and answer of a row, not its other columns
    # algorithm
    algorithm: str = setting('grpo', choices=tuple(PRESETS))  # a published combination of the next ones
    ratio: str | None = setting(None, path='training.importance_sampling_level', also=('training.ratio',),
                                choices=('token', 'sequence'))  # new over old probability, of what
    surrogate: str | None = setting(None, choices=SURROGATES)  # what is made of the ratio
    mean: str | None = setting(None, choices=('token', 'sequence', 'constant'))  # what the loss is averaged
        # over; constant: completions x max_completion_length
    scale: str | None = setting(None, path='training.scale_rewards', also=('training.scale',),
                                choices=('group', 'batch', 'none'))  # deviation that they are divided by
    baseline: str | None = setting(None, choices=('mean', 'leave_one_out'))  # of a group
    epsilon: float | None = setting(None, min=0)  # lower clip range: 0.2; gspo 3e-4, cispo 1, gmpo 0.4 (logs)
    epsilon_high: float | None = setting(None, min=0)  # upper: 0.2; gspo 4e-4, dapo 0.28, cispo 4, gmpo 0.4
    dual_clip: float | None = setting(None, also=('training.delta',))  # bound of the loss where A < 0 (3)
    beta: float | None = setting(None, min=0, also=('training.kl_coef',))  # weight of the KL to the
        # reference: ppo 0.05, else 0 = no reference
    kl: str | None = setting(None, choices=('reward', 'k2', 'k3'))  # where it counts: k1 in the reward (ppo,
        # rloo, reinforce++), or k2 or k3 in the loss
    kl_target: float | None = setting(None, above=0)  # adapt beta so that a completion's KL stays near it
    kl_horizon: int = setting(10000, min=1)  # completions over which it adapts
    entropy_coef: float = setting(0.0, min=0)  # weight of an entropy bonus
    num_generations: int | None = setting(None, min=1)  # completions of a prompt: 8; ppo, distill 4
    num_iterations: int = setting(1, min=1, also=('training.num_ppo_epochs',))  # passes over a rollout
    steps_per_generation: int | None = setting(None, min=1)  # micro-batches of a rollout; a step's if not set
    temperature: float = setting(1.0, above=0)  # of sampling, and of every log-probability in the loss
    dynamic_sampling: bool | None = None  # replace groups whose rewards are all equal (dapo)
    mask_truncated: bool = setting(False, also=('training.mask_truncated_completions',))  # leave completions
        # without a stop token out of baseline and loss
    importance_cap: float | None = setting(None, min=0)  # weight tokens by min(training / sampling
        # probability, this) (truncated importance sampling): 2 with sampler_url, else 0 = off
    # training
    output_dir = 'models/rl'
    per_device_train_batch_size = 64
    gradient_accumulation_steps = 4
    num_train_epochs = 1.0
    warmup_steps = 5
    logging_steps = 5
    eval_steps = setting(20, min=0)  # optimizer steps between evaluations; 0 = only at the end
    save_only_model = True
    dataloader_drop_last = True
    rollout_steps: int = setting(1, min=0)  # every so many rollouts go into rollouts.jsonl; 0 = none
    replay: int | None = setting(None, min=0)  # sample the rollout of this step again, compare and explain

    def check(self):
        super().check()
        let_critic_follow(self)
        check_algorithm(self)


def main(cfg):
    is_replay = cfg.replay is not None      # the run again, up to a rollout: nothing is evaluated or saved
    run = Run.open(cfg, 'train_rl.py', cfg.output_dir, cfg.resume, '--replay' if is_replay else '--resume',
                   is_replay, memory_flags=('--per_device_train_batch_size', '--max_completion_length'))
    cfg = run.cfg
    if is_replay:
        run.resumed = checkpoint_before(cfg, run)
    resolve_defaults(cfg, run)
    policy, tokenizer = load_policy(cfg, run, cfg.base_model_name, run.resumed)
    resolve_by_model(cfg, policy, run)                              # learning rates, lengths
    scorer = open_scorer(cfg)
    problems = open_problems(cfg, tokenizer, run.print0, scorer.environment)
    sizes = resolve_sizes(cfg, len(problems.train), run)            # of a step, a rollout, the run
    if cfg.plan:
        scorer.close()
        return plan.rl(cfg, policy, problems, sizes, run)
    reference = load_reference(cfg, policy, tokenizer, run)         # or teacher; None without a KL term
    critic = load_critic(cfg, policy, tokenizer, run)               # None but with ppo
    reward_model = open_reward_model(cfg, problems, tokenizer, run)
    optimizers, parameters = make_optimizers(cfg, run.prepare(policy), critic)
    state = run.restore(State(cfg.optimizer, beta=cfg.beta), optimizers, parameters=parameters)
    if ended := run.ended(state, sizes.total_steps):
        scorer.close()
        return ended
    print_summary(cfg, policy, critic, tokenizer, problems, sizes, run)
    log = start_log(cfg, state, sizes, run)
    if 'model' in cfg.rewards and not reward_model:                 # in the folder that is ready now
        reward_model = train_own_reward_model(cfg, problems, tokenizer, log, run)
    loss_args = composition(cfg)
    group_args = {name: loss_args.pop(name) for name in ('scale', 'baseline')}
    metrics, previous, first_answer = {}, state.step, None

    def save(best=False):
        run.save(state, policy, tokenizer, optimizers, best=best, parameters=parameters)

    def save_and_close():
        save()
        scorer.close()

    def is_due(every):          # a rollout feeds several steps at once: a multiple may lie between two looks
        return every > 0 and state.step // every > previous // every

    while True:
        run.sampler.update(state.step, [policy], tokenizer)     # servers, where they draw, get these weights
        # ---- once in a while: evaluate on held-out problems, also before the first step; checkpoint
        if not is_replay:
            last, best = state.step >= sizes.total_steps, False
            if last or is_due(cfg.eval_steps) or (state.step == 0 and cfg.eval_steps):
                with log.pause(), run.unsharded():
                    metrics, text = evaluate(cfg, policy, tokenizer, reward_model, reference, problems,
                                             scorer, run)
                    log.write(state.step, metrics)
                    log.text(state.step, 'samples', text)
                    show(cfg, log, run)
                    best = state.note_eval(metrics)
            if last or best or is_due(cfg.save_steps):
                with log.pause():
                    save(best)
            if last:
                break
            run.exit_if_asked(save_and_close)
        previous = state.step

        # ---- 1. generate completions and their rewards; on every rank row r is sample r % num_generations of
        # prompt r // num_generations. What is drawn depends on (seed, step, cursor) alone
        with log.timed('generate'), run.unsharded():
            rollout = generate_rollout(cfg, policy, tokenizer, reward_model, problems, scorer, sizes, state,
                                       run)

        # ---- 2. score: what the policy that sampled them, the reference and the critic say; no gradient
        with log.timed('score'), run.unsharded():
            if compares_each_reward(cfg):           # a reward at a time, then all
                rollout.advantage = decoupled_advantages(rollout.rewards.values(), scorer.weights,
                                                         rollout.group, rollout.valid, **group_args)
            elif compares_groups(cfg):              # a completion against the others of its prompt
                rollout.advantage = group_advantages(rollout.reward, rollout.group, valid=rollout.valid,
                                                     **group_args)
            batches = make_micro_batches(cfg, rollout, sizes, run)      # [this rank's] of each step
            score_micro_batches(cfg, policy, critic, reference, batches, run)
            if reference:
                rollout.kl = measure_kl(batches, len(rollout.reward), run)
            of_rollout = describe_rollout(cfg, rollout, scorer, state.beta, run)    # {name: number}
            if critic:                              # reward at the last token, KL off each, then gae
                of_rollout.update(advantages_by_critic(cfg, rollout, batches, state.beta, run))
            elif cfg.algorithm == 'distill':
                advantages_by_teacher(rollout, batches)
                if cfg.forward_kl:
                    answers = given_answers(cfg, tokenizer, problems.task, rollout, sizes, run)
            elif reference and cfg.kl == 'reward':  # again, now that the KL of each completion is known
                rewards = rollout.reward - state.beta * rollout.kl['k1']
                rollout.advantage = group_advantages(rewards, rollout.group, valid=rollout.valid,
                                                     **group_args)
        if is_replay and state.step >= cfg.replay:
            metrics = explain_replay(cfg, rollout.records(), log)
            scorer.close()
            run.close()
            return metrics
        if not is_replay and cfg.rollout_steps and state.rollouts % cfg.rollout_steps == 0:
            write_completions(rollout.records(), rollouts_path(cfg), run)
        if not is_replay and cfg.collect:
            by = 'advantage' if compares_each_reward(cfg) else 'reward'
            collect_best(rollout, problems.task.prompt, cfg.collect, run, by)
        first_answer = first_answer or next(iter(rollout.completions), None)
        state.rewards_differed = state.rewards_differed or rewards_differ(cfg, rollout)
        state.rollouts += 1
        state.cursor += rollout.groups_drawn
        new_tokens = int(rollout.length.sum())
        lengths = [(len(c.prompt_ids), len(c.completion_ids)) for c in rollout.completions]
        log.flops_per_token = plan.rollout_flops(cfg, policy, lengths)
        state.num_tokens += new_tokens

        # ---- 3. learn: the rollout feeds `steps_per_rollout` optimizer steps, num_iterations times
        # more passes than one reuse what was dear to sample; that they are off-policy the ratio corrects
        first_step = state.step
        num_steps = min(sizes.steps_per_rollout * cfg.num_iterations, sizes.total_steps - first_step)
        for i in range(num_steps):
            number = i % sizes.steps_per_rollout        # which part of the rollout this step takes
            is_first = state.step == first_step
            # what the loss is divided by is counted over the whole step: its gradient is that of one mean,
            # however the step is cut into micro-batches and dealt out to ranks
            tokens, normaliser = count_step(cfg, rollout, number, sizes, loss_args['mean'])
            policy.train()                              # dropout: in updates alone
            measured = []                               # (tokens, {name: tensor ()}) of each micro-batch
            with log.timed('update'):
                for micro, mb in enumerate(run.even(batches[number], policy, critic=critic)):
                    torch.manual_seed(seed_for(cfg.seed, 'dropout', state.step, run.rank, micro))
                    with run.autocast():
                        logp, entropy, values, _ = forward(cfg, policy, critic, mb.packed,
                                                           entropy=cfg.entropy_coef > 0)
                    # first update: the policy is still the one that sampled, so its logp is the old one and
                    # the ratio exactly 1; the sampler's logp, rounded in another way, makes it about 1
                    old_logp = logp.detach() if is_first else mb.old_logp
                    weights = None
                    if cfg.importance_cap:          # towards what training itself would have sampled
                        gap = torch.where(mb.mask, old_logp - mb.sampling_logp, 0.0)
                        weights = torch.exp(gap).clamp(max=cfg.importance_cap)
                    advantages = mb.advantages              # of tokens, or of completions
                    if advantages is None:
                        advantages = rollout.advantage[mb.rows].to(run.device)
                    loss, stats = policy_loss(logp, old_logp, advantages, mb.mask, normaliser=normaliser,
                                              weights=weights, **loss_args)
                    loss = loss * (1 - cfg.forward_kl)      # the rest is learned from given answers, below
                    if reference and state.beta and cfg.kl != 'reward':
                        kl = kl_estimate(logp, mb.ref_logp, cfg.kl)
                        loss = loss + state.beta * average(kl, mb.mask, loss_args['mean'], normaliser)
                    if cfg.entropy_coef:            # a bonus: what is likely must not become certain too soon
                        bonus = average(entropy, mb.mask, loss_args['mean'], normaliser)
                        loss = loss - cfg.entropy_coef * bonus
                        stats['entropy'] = entropy.detach()[mb.mask].mean()
                    stats['loss'] = loss.detach()               # the policy's: a critic's is logged beside it
                    if critic:                                  # per token always: every token has a value
                        of_values, stats['clip_ratio/value'] = value_loss(
                            values, mb.values, mb.returns, mb.mask, cfg.cliprange_value or None, tokens)
                        stats['value_loss'] = of_values.detach()
                        loss = loss + cfg.vf_coef * of_values
                    gap = (old_logp - mb.sampling_logp)[mb.mask].abs()      # of the policy that sampled
                    stats['sampling/logp_gap_mean'] = gap.mean()
                    stats['sampling/logp_gap_max'] = gap.max()
                    run.backward(loss)
                    measured.append((mb.mask.sum(), stats))
                if cfg.forward_kl:
                    of_rollout['forward_kl'] = imitate(cfg, policy, reference, answers[number],
                                                       sizes.groups_per_step, run)
                # to a tenth of the peak, not to 0: every rollout brings something new
                factor = learning_rate(state.step, cfg.lr_scheduler_type, 1.0, 0.1, sizes.warmup_steps,
                                       sizes.total_steps)
                rates = [peak * factor for peak in (cfg.learning_rate, cfg.value_learning_rate)]
                norms = run.step(list(optimizers.values()), rates, cfg.max_grad_norm)
            state.step += 1
            # tokens count once, with the first step that they feed: the speed includes sampling
            stats = {**of_rollout, **merge_stats(measured, run), 'grad_norm': norms[0]}
            if critic:
                stats['value_grad_norm'] = norms[1]
            log.train(state.step, new_tokens if is_first else 0, **stats, learning_rate=rates[0],
                      num_tokens=state.num_tokens)
            run.sampler.check(stats)
        if cfg.kl_target and reference:             # a controller: more KL than wanted, more weight on it
            state.beta = adapt_beta(cfg, state.beta, rollout.kl['k1'])
    scorer.close()
    if state.rewards_differed is False:
        run.print0(pages.explain_no_signal(cfg.algorithm, cfg.rewards, first_answer))
    if cfg.collect and run.is_main:
        with open(cfg.collect, encoding='utf-8') as file:
            print(f'{sum(1 for _ in file):,} rows are collected in {cfg.collect}')
    return run.finish({**metrics, 'step': state.step, 'best': state.best},
                      f'the model is in {cfg.output_dir}/: python sample.py {shlex.quote(cfg.output_dir)} '
                      f'--chat; samples: {cfg.output_dir}/rollouts.html')


def check_composition(ratio, surrogate, mean, dual_clip=None):
    """UserError for names that do not exist and for pairs that make no sense."""
    for name, value, known in (('ratio', ratio, ('token', 'sequence')), ('surrogate', surrogate, SURROGATES),
                               ('mean', mean, ('token', 'sequence', 'constant'))):
        if value not in known:
            raise UserError(f'{name}={value!r} is none of {", ".join(known)}')
    if ratio == 'sequence' and mean != 'sequence':
        raise UserError(f'ratio=sequence with mean={mean} would weight each sequence by its length: use '
                        'mean=sequence')
    if surrogate == 'gmpo' and (ratio, mean) != ('token', 'sequence'):
        raise UserError('surrogate=gmpo is the geometric mean of token ratios over a sequence: use '
                        f'ratio=token and mean=sequence, not ratio={ratio} and mean={mean}')
    if surrogate == 'reinforce' and ratio == 'sequence':
        raise UserError('surrogate=reinforce has no ratio: leave ratio=token')
    if dual_clip is not None and (surrogate != 'clip' or dual_clip <= 1):
        raise UserError(f'dual_clip={dual_clip} belongs to surrogate=clip and must be above 1 (3 is usual), '
                        f'not to {surrogate}')


def let_critic_follow(cfg):
    """The critic that a recipe names beside its policy follows the policy that is typed instead."""
    of_recipe = cfg.value_model_name and 'value_model_name' in cfg.typed - cfg.flags
    if of_recipe and 'base_model_name' in cfg.flags:
        cfg.value_model_name = cfg.base_model_name


def compares_groups(cfg):
    """Whether a completion is worth what it is better than the others of its prompt."""
    return cfg.algorithm not in JUDGES


def compares_each_reward(cfg):
    """Whether each reward is compared by itself, before they are summed."""
    return cfg.multi_objective_aggregation == 'normalize_then_sum'


def check_algorithm(cfg):
    """Combinations of settings that make no sense, before anything is loaded."""
    c, ppo = composition(cfg), cfg.algorithm == 'ppo'
    check_composition(c['ratio'], c['surrogate'], c['mean'], c['dual_clip'])
    if ppo and not cfg.value_model_name:
        raise UserError('algorithm=ppo needs a critic: set model.value_model_name to the model that it '
                        "begins as (the policy's own base_model_name is usual)")
    distill = cfg.algorithm == 'distill'
    if distill and not cfg.teacher_model_name:
        raise UserError('algorithm=distill needs a teacher: set model.teacher_model_name to a better model '
                        'with the same tokenizer')
    for name in ('beta', 'kl', 'kl_target'):
        if distill and getattr(cfg, name):
            raise UserError(f'{name}={getattr(cfg, name)} is about a reference; the KL of distill is that to '
                            'its teacher, and all that is learned from')
    if cfg.dynamic_sampling and not compares_groups(cfg):
        raise UserError(f'dynamic_sampling replaces groups of equal rewards, and {cfg.algorithm} has no '
                        'groups: leave it out, or choose dapo')
    if compares_groups(cfg) and cfg.num_generations == 1:
        raise UserError(f'num_generations=1: {cfg.algorithm} compares the completions of a prompt with one '
                        'another and needs 2 or more')
    unfit = not compares_groups(cfg) or c['scale'] == 'none' or cfg.kl == 'reward'
    if compares_each_reward(cfg) and unfit:
        raise UserError('multi_objective_aggregation=normalize_then_sum divides each reward by its deviation '
                        'in groups: not with ppo, distill, scale=none (dr_grpo, rloo) or kl=reward')
    for name in ('scale', 'baseline'):
        if getattr(cfg, name) and not compares_groups(cfg):
            raise UserError(f'{name}={getattr(cfg, name)} is about groups; the advantages of {cfg.algorithm} '
                            f'come from its {JUDGES[cfg.algorithm]}')
    if ppo and (cfg.epsilon is not None or cfg.epsilon_high is not None):
        raise UserError('ppo is clipped by training.cliprange: leave out epsilon and epsilon_high')
    # typed in vain: the user believes that there is a critic; a default that is spelled out does no harm
    for name in ('share_critic', 'cliprange', 'cliprange_value', 'vf_coef', 'gamma', 'lam'):
        if not ppo and name in getattr(cfg, 'typed', ()) and getattr(cfg, name) != getattr(Config(), name):
            raise UserError(f'{name} is a setting of ppo; {cfg.algorithm} has no critic')
    # only the first update of a rollout is on-policy
    off_policy = cfg.num_iterations > 1 or (cfg.steps_per_generation or 0) > cfg.gradient_accumulation_steps
    if c['surrogate'] == 'reinforce' and off_policy:
        raise UserError('surrogate=reinforce has no ratio to correct for an older policy: one update per '
                        'rollout (num_iterations=1, steps_per_generation not above '
                        'gradient_accumulation_steps)')
    if cfg.beta == 0 and cfg.kl_target:
        raise UserError('kl_target adapts beta, which is 0: give it a start, training.beta=0.05')
    if c['surrogate'] == 'clip' and c['clip_low'] >= 1:
        raise UserError(f'epsilon={c["clip_low"]:g}: a ratio clipped below 1 - epsilon = '
                        f'{1 - c["clip_low"]:g} is never clipped; it must be below 1')
    if cfg.lr_scheduler_type in ('plateau', 'reduce_lr_on_plateau'):
        raise UserError('lr_scheduler_type=plateau waits for an eval_loss to stall, and RL has none: choose '
                        'another')
    if cfg.reward_weights and not cfg.rewards:
        raise UserError('reward_weights without rewards: name the rewards that they belong to')


def composition(cfg):
    """The preset of the algorithm, with what was set besides."""
    # from the general to the particular: preset, the ratio's usual range, what was typed
    chosen = {**PRESETS[cfg.algorithm], 'dual_clip': cfg.dual_clip}
    if cfg.ratio == 'sequence' and chosen['ratio'] == 'token':          # gspo by its one argument
        chosen.update(clip_low=PRESETS['gspo']['clip_low'], clip_high=PRESETS['gspo']['clip_high'])
    for name in ('ratio', 'surrogate', 'mean', 'scale', 'baseline'):
        chosen[name] = getattr(cfg, name) or chosen[name]
    if cfg.algorithm == 'ppo':
        chosen.update(clip_low=cfg.cliprange, clip_high=cfg.cliprange)
    if cfg.epsilon is not None:                                 # of both sides, where only it is given
        chosen.update(clip_low=cfg.epsilon, clip_high=cfg.epsilon)
    if cfg.epsilon_high is not None:
        chosen['clip_high'] = cfg.epsilon_high
    return chosen


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import contextlib
import functools
import math
import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from itertools import chain, groupby

import torch
from torch.nn.utils.rnn import pad_sequence

from data.batches import PackedBatch, cut, pack
from data.completions import (Completion, by_prompt, collect_best, cut_rollouts, read_completions,
                              refuse_rows_of_others, write_completions)
from data.environments import Environment
from data.problems import describe_prompt, draw_problems, load_task, open_problems, uses_pairs
from data.rewards import Scorer, short_names
from nanoforge import pages, plan, plots
from nanoforge.distill import given_answers, imitate, reverse_kl
from nanoforge.episodes import play_episodes
from nanoforge.log import REDUCED, Log
from nanoforge.lora import adapters_off
from nanoforge.optim import learning_rate, make_optimizer, warmup_within
from nanoforge.policy import default_learning_rate, is_adapter, is_small, load_policy
from nanoforge.reward_model import (ValueModel, load_reward_model, pair_accuracy,
                                    save_reward_model, score_completions, train_reward_model)
from nanoforge.run import Run, State as RunState, describe_device, seed_for
from sample import generate


# ---- advantages --------------------------------------------------------------------------------------------

def group_advantages(rewards, group, scale='group', baseline='mean', valid=None):
    """rewards (B,), group (B,) int: the prompt that each completion answers -> advantages (B,) float32.

    baseline  'mean' of the group's rewards, or 'leave_one_out': that of the others (Kool et al. 2019), n / (n
              - 1) times the first
    scale     'group': over the unbiased standard deviation of the group + 1e-4 (GRPO, arXiv 2402.03300,
              section 4.1.2); 'batch': over that of all rewards; 'none' (Dr. GRPO)
    valid     (B,) bool: what is not (a reward that failed) counts in no mean and has advantage 0, whatever
              its reward

    A group whose rewards are all equal has advantages of exactly 0, and so has one with a single valid
    member. UserError: a group of one, for which every baseline is the reward itself.
    """
    if scale not in ('group', 'batch', 'none') or baseline not in ('mean', 'leave_one_out'):
        raise UserError(f'group_advantages: scale={scale!r} is one of group, batch, none; '
                        f'baseline={baseline!r} of mean, leave_one_out')
    _, place, size = group.unique(return_inverse=True, return_counts=True)      # place (B,), size (G,)
    if (size == 1).any():
        raise UserError('a group of one has nothing to be compared with: set num_generations to 2 or more')
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    rewards = torch.where(valid, rewards.float(), 0.0)                          # an invalid one may be NaN

    def summed(values):                                                         # (B,) -> (G,)
        return rewards.new_zeros(len(size)).index_add_(0, place, values)

    def extreme(how, empty):                                                    # (G,)
        members = torch.where(valid, rewards, empty)
        return rewards.new_full((len(size),), empty).scatter_reduce(0, place, members, how)

    count = summed(valid.float())
    difference = torch.where(valid, rewards - (summed(rewards) / count.clamp(min=1))[place], 0.0)
    # by max == min: rounding leaves the deviation of equal rewards a little above 0
    differs = valid & (extreme('amin', float('inf')) < extreme('amax', -float('inf')))[place]
    advantages = difference
    if baseline == 'leave_one_out':
        advantages = difference * (count / (count - 1).clamp(min=1))[place]
    if scale == 'group':
        deviation = (summed(difference.square()) / (count - 1).clamp(min=1)).sqrt()
        advantages = advantages / (deviation + 1e-4)[place]
    elif scale == 'batch' and valid.sum() > 1:
        advantages = advantages / (rewards[valid].std() + 1e-4)
    return torch.where(differs, advantages, 0.0)


def decoupled_advantages(rewards, weights, group, valid=None, **how):
    """[rewards (B,)] by name, each with a weight, else as group_advantages -> advantages (B,) as in GDPO
    (arXiv 2601.05242): those of each reward by itself, so that it counts as its weight says, however little
    it spreads; their weighted sum; and that over its deviation in the batch + 1e-4."""
    total = sum(weight * group_advantages(reward, group, valid=valid, **how)
                for weight, reward in zip(weights, rewards))
    count = len(total) if valid is None else int(valid.sum())
    # its mean is 0, like that of every group
    deviation = (total.square().sum() / max(count - 1, 1)).sqrt()
    return total / (deviation + 1e-4)


def gae(rewards, values, mask, gamma, lam, bootstrap=None):
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16): rewards, values and
    mask (B, T) -> (advantages (B, T), returns (B, T)), both 0 where the mask is; returns = advantages +
    values.

    values[:, t] is the critic's opinion before token t is drawn. Masked tokens (padding, what a tool or
    another agent wrote) are stepped over: neither their rewards nor their values are seen. bootstrap (B,):
    the value behind the last token of a row that was cut off; 0 (or None) where it ended by itself.
    """
    mask = mask.bool()
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    following = torch.zeros_like(running)                           # V of the next token that counts
    if bootstrap is not None:
        following = bootstrap.to(running)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = torch.where(mask[:, t], running, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values, mask, count=None, total=None, squares=None):
    """values (B, T) with mean 0 and deviation 1 where the mask is, 0 elsewhere. count, total and squares: of
    all ranks."""
    mask = mask.bool()
    if count is None:
        kept = values[mask].double()
        count, total, squares = kept.numel(), kept.sum(), kept.square().sum()
    mean = total / max(count, 1)
    deviation = math.sqrt(max(float(squares / max(count, 1) - mean ** 2), 0.0)) + 1e-8
    return torch.where(mask, ((values - mean) / deviation).to(values.dtype), 0.0)


# ---- losses ------------------------------------------------------------------------------------------------

def policy_loss(logp, old_logp, advantages, mask, ratio='token', surrogate='clip', clip_low=0.2,
                clip_high=0.2, dual_clip=None, mean='token', normaliser=None, weights=None,
                temperatures=(1.0, 1.05)):
    """The loss to minimise, a tensor (), and stats {name: tensor ()} -- of logp, old_logp and mask (B, T),
    advantages (B,) or (B, T).

    ratio      'token': rho = exp(logp - old_logp); 'sequence': s = exp of its mean over the sequence, one
               value for all of its tokens, each of which gets the gradient of its own logp (GSPO-token, arXiv
               2507.18071, eq. 13: with one advantage per sequence it is GSPO)
    surrogate  'clip'       -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (PPO); with dual_clip c at
                            most -c A where A < 0
               'cispo'      -sg(clip(rho)) A logp, sg: no gradient through it (arXiv 2506.13585, eq. 4)
               'gmpo'       -A exp(mean of the log ratios, each clipped to -clip_low .. clip_high)
                            (2507.20673, eq. 4)
               'sapo'       -A 4 / tau sigmoid(tau (rho - 1)), tau = temperatures[0] where A > 0, else [1]
                            (arXiv 2511.20347)
               'reinforce'  -A logp
    mean       'token': over all tokens; 'sequence': within each sequence first; 'constant': the sum over a
               given constant
    normaliser what the sum is divided by, counted over the whole optimizer step, micro-batches and ranks:
               tokens, sequences that have tokens, or the constant (Dr. GRPO: completions times the longest
               length allowed). None: counted here, the constant being B * T. Without a token the loss is a
               differentiable 0.
    weights    (B, T), of each token's loss: a correction for what the sampler computed otherwise

    stats: ratio_mean, ratio_min, ratio_max; approx_kl, k3 of old to new; clip_ratio/low_mean, /high_mean,
    /region_mean where there is a clip: the share whose gradient it stops. Of tokens, or with ratio='sequence'
    of sequences. UserError: see check_composition.
    """
    check_composition(ratio, surrogate, mean, dual_clip)
    mask = mask.bool()
    A = torch.where(mask, advantages[:, None] if advantages.dim() == 1 else advantages, 0.0)    # (B, T)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)     # not times the mask: what is masked may be NaN
    length = mask.sum(1, keepdim=True).clamp(min=1)                                             # (B, 1)

    def shared(x):                                          # a sequence's value, a token's gradient
        return x - x.detach() + x.detach().sum(1, keepdim=True) / length

    low = high = None
    if ratio == 'sequence':
        log_ratio = shared(log_ratio)
    rho = log_ratio.exp()
    if surrogate == 'clip':
        loss = -torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
        if dual_clip is not None:
            loss = torch.where(A < 0, torch.minimum(loss, -dual_clip * A), loss)
        low, high = (rho < 1 - clip_low) & (A < 0), (rho > 1 + clip_high) & (A > 0)
    elif surrogate == 'cispo':
        loss = -rho.clamp(1 - clip_low, 1 + clip_high).detach() * A * torch.where(mask, logp, 0.0)
        low, high = rho < 1 - clip_low, rho > 1 + clip_high
    elif surrogate == 'gmpo':
        sign = A.sign()
        narrow = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip_low, clip_high))
        loss = -A * shared(narrow).exp()
        low, high = (log_ratio < -clip_low) & (A < 0), (log_ratio > clip_high) & (A > 0)
    elif surrogate == 'sapo':
        tau = torch.where(A > 0, *(torch.tensor(t, dtype=rho.dtype, device=rho.device) for t in temperatures))
        loss = -A * 4 / tau * torch.sigmoid(tau * (rho - 1))
    elif surrogate == 'reinforce':
        loss = -A * torch.where(mask, logp, 0.0)
    else:
        raise NotImplementedError(f'surrogate={surrogate} is one of SURROGATES, but has no formula here')
    total = average(loss if weights is None else loss * weights, mask, mean, normaliser)
    return total, ratio_stats(log_ratio.detach(), mask, ratio, low, high)


@torch.no_grad()
def ratio_stats(log_ratio, mask, ratio, low, high):
    """The stats of policy_loss. low, high: where a clip stops the gradient; None without one. All (B, T)."""
    if ratio == 'sequence':
        # a sequence's tokens share its one ratio: each sequence counts once, however long
        share = mask / mask.sum(1, keepdim=True).clamp(min=1) / mask.any(1).sum().clamp(min=1)
    else:
        share = mask / mask.sum().clamp(min=1)
    rho = log_ratio.exp()
    seen = torch.where(mask, rho, 1.0)                      # padding: neither the least nor the largest
    k3 = kl_estimate(-log_ratio, torch.zeros_like(log_ratio), 'k3')
    stats = {'ratio_mean': (rho * share).sum(), 'ratio_min': seen.min(), 'ratio_max': seen.max(),
             'approx_kl': (k3 * share).sum()}
    if low is not None:
        low, high = (((side & mask) * share).sum() for side in (low, high))
        stats.update({'clip_ratio/low_mean': low, 'clip_ratio/high_mean': high,
                      'clip_ratio/region_mean': low + high})
    return stats


def average(x, mask, mean, normaliser=None):
    """x (B, T) where the mask is -> (), as `mean` and `normaliser` of policy_loss say."""
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)
    if mean == 'sequence':
        count = mask.any(1).sum() if normaliser is None else normaliser
        return (x / mask.sum(1, keepdim=True).clamp(min=1)).sum() / max(count, 1)
    if normaliser is None:
        normaliser = mask.sum() if mean == 'token' else mask.numel()
    return x.sum() / max(normaliser, 1)


def kl_estimate(logp, ref_logp, kind):
    """Per-token estimate of KL(policy || reference) at tokens drawn from the policy, (B, T), differentiable
    in logp.

    With d = logp - ref_logp: 'k1' d; 'k2' d^2 / 2; 'k3' exp(-d) + d - 1 (Schulman 2020,
    joschu.net/blog/kl-approx.html). As a loss k2 has the gradient of the reverse KL, k3 that of another
    divergence, k1 none in expectation: k1 belongs into the reward.
    """
    d = logp - ref_logp
    if kind == 'k1':
        return d
    if kind == 'k2':
        return d.square() / 2
    if kind == 'k3':
        return torch.expm1(-d) + d                          # exp(-d) - 1 + d would round to below 0
    raise UserError(f'kl_estimate: kind={kind!r} is none of k1, k2, k3')


def value_loss(values, old_values, returns, mask, clip=None, normaliser=None):
    """PPO's clipped value loss (arXiv 1707.06347's code): half the mean of the larger of two squared errors,
    that of the values and that of the values kept within `clip` of the old ones; (loss (), share clipped ()).
    All (B, T)."""
    mask = mask.bool()
    error = (values - returns).square()
    clipped = torch.zeros_like(mask)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        other = (near - returns).square()
        error, clipped = torch.maximum(error, other), other > error
    count = mask.sum().clamp(min=1)
    normaliser = count if normaliser is None else max(normaliser, 1)
    return 0.5 * torch.where(mask, error, 0.0).sum() / normaliser, (clipped & mask).sum() / count


def adapt_beta(cfg, beta, kl):
    """beta for the next rollout, so that the KL of a completion, kl (N,), comes near kl_target (Ziegler et
    al. 2019, arXiv 1909.08593, section 2.2)."""
    error = max(-0.2, min(0.2, float(kl.mean()) / cfg.kl_target - 1))
    return beta * (1 + error * len(kl) / cfg.kl_horizon)


# ---- rollouts ----------------------------------------------------------------------------------------------

MAX_REFILLS = 10        # times that dynamic sampling draws more for one rollout


@dataclass
class Rollout:
    """N completions of N / num_generations prompts, in the order of their groups. Tensors (N,) float64, the
    same on every rank; `completions` are this rank's, and `rows` (n,) their row numbers."""
    completions: list
    rows: torch.Tensor
    group: torch.Tensor                 # the number of its prompt among those that were drawn
    reward: torch.Tensor                # the weighted sum; NaN: counts neither in baselines nor in the loss
    rewards: dict                       # {name: (N,)}, NaN likewise
    length: torch.Tensor                # tokens, the stop token included
    stopped: torch.Tensor               # bool: ended by a stop token, not cut off
    logp: torch.Tensor                  # sum over tokens, as sampled
    groups_drawn: int                   # with those that dynamic sampling replaced
    kl: dict = field(default_factory=dict)      # {'k1', 'k3': (N,)}: sums over tokens, policy to reference
    advantage: torch.Tensor | None = None       # with a critic: the mean over tokens, of this rank's rows

    @property
    def valid(self):
        return ~self.reward.isnan()

    def records(self):
        """This rank's completions with their advantages, as they are written."""
        advantages = self.advantage[self.rows].tolist()
        return [replace(c, advantage=advantage) for c, advantage in zip(self.completions, advantages)]


def generate_rollout(cfg, policy, tokenizer, reward_model, problems, scorer, sizes, state, run):
    """A Rollout of the next problems.

    Who samples a group does not matter: its samples depend on its number. With dynamic sampling, groups whose
    rewards are all equal are replaced until there are enough (DAPO, arXiv 2503.14476, section 3.2), or
    MAX_REFILLS times.
    """
    G, seed = cfg.num_generations, seed_for(cfg.seed, 'rollout', state.step)
    completions, facts, drawn, missing = [], [], 0, sizes.groups_per_rollout
    for attempt in range(MAX_REFILLS + 1):
        asked = draw_problems(problems.train, state.cursor + drawn, missing, cfg.seed)
        mine = list(enumerate(asked, drawn))[run.rank::run.world_size]
        drawn += missing
        sampled = sample_completions(cfg, policy, tokenizer, scorer, mine, state.step, seed, run,
                                     cfg.temperature, G)
        reward_completions(cfg, scorer, reward_model, sampled)
        # what every rank must know of each, sorted by group and sample: from here on its row is its name
        known = [[c.group, c.sample, run.rank, as_number(c.reward), c.stopped, c.length,
                  sum(c.logp), *map(as_number, c.rewards.values())] for c in sampled]
        new = torch.tensor(sorted(run.gather(known)), dtype=torch.float64)
        reward, stopped = new[:, 3], new[:, 4]
        if cfg.mask_truncated:
            reward[stopped == 0] = math.nan             # what was cut off is neither right nor wrong
        # the last draw is taken as it is: a policy that solves all or nothing would never fill a rollout
        if cfg.dynamic_sampling and attempt < MAX_REFILLS:
            new = new[has_signal(reward, G).repeat_interleave(G)]
        kept = set(new[:, 0].tolist())
        completions += [c for c in sampled if c.group in kept]      # in the order of their rows
        facts.append(new)
        missing -= len(kept)
        if not missing:
            break
    group, _, rank, reward, stopped, length, logp, *rewards = torch.cat(facts).unbind(1)
    return Rollout(completions, (rank == run.rank).nonzero()[:, 0], group, reward,
                   dict(zip(scorer.names, rewards)), length, stopped > 0, logp, drawn)


def as_number(reward):
    return math.nan if reward is None else reward


def rewards_differ(cfg, rollout):
    """Whether a rollout says what is better: within a group, or to a critic anywhere."""
    if cfg.algorithm == 'distill':                      # learns from no reward
        return True
    compared = cfg.num_generations if compares_groups(cfg) else len(rollout.reward)
    return bool(has_signal(rollout.reward, compared).any())


def has_signal(reward, G):
    """(N,) -> (N / G,): whether the rewards of a group differ. Where they do not, every advantage is 0."""
    lowest = torch.where(reward.isnan(), math.inf, reward).view(-1, G).amin(1)
    highest = torch.where(reward.isnan(), -math.inf, reward).view(-1, G).amax(1)
    return lowest < highest


def sample_completions(cfg, policy, tokenizer, scorer, numbered, step, seed, run, temperature, num_samples):
    """[(number, problem)] -> Completions without rewards, num_samples of each, in parts that memory
    allows."""
    # as many rows as this rank's part of a rollout: an evaluation needs no more memory than that
    groups_at_once = max(1, cfg.per_device_train_batch_size * cfg.steps_per_generation // num_samples)
    completions, draw = [], run.sampler.generate if cfg.sampler_url else generate
    for part in cut(numbered, groups_at_once):
        if scorer.environment:                  # several turns, and what is said between them
            with run.autocast():
                completions += play_episodes(cfg, scorer.environment, policy, tokenizer, draw, part, step,
                                             seed, temperature, num_samples)
            continue
        numbers = [number for number, _ in part]
        prompts = [list(problem['prompt_ids']) for _, problem in part]
        with run.autocast():
            samples = draw(policy, prompts, cfg.max_completion_length, temperature, seed=seed,
                           stop_ids=tokenizer.stop_ids, num_samples=num_samples, numbers=numbers)
        asked = list(map(tokenizer.decode, prompts))
        columns = (samples.tokens, samples.lengths, samples.logp, samples.stopped)
        for i, (tokens, length, logp, stopped) in enumerate(zip(*(column.tolist() for column in columns))):
            number, problem = part[i // num_samples]
            ids = tokens[:length]                       # with the stop token: it is learned, too
            text = tokenizer.decode(ids[:-1] if stopped else ids)
            # the ids have a field of their own in a record
            shown = {key: value for key, value in problem.items() if key != 'prompt_ids'}
            k = i // num_samples
            completions.append(Completion(step, number, i % num_samples, shown, prompts[k], ids,
                                          logp[:length], stopped, text, prompt=asked[k]))
    return completions


def reward_completions(cfg, scorer, reward_model, completions):
    """Fills in the rewards of Completions."""
    records, columns = [c.problem for c in completions], {}
    if cfg.remove_unused_columns and cfg.sources():
        used = ('question', 'answer')               # all that a verifier needs
        records = [{key: record[key] for key in used if key in record} for record in records]
    if 'model' in scorer.names:
        columns['model'] = score_completions(reward_model, completions, cfg.per_device_train_batch_size)
    if 'env' in scorer.names:
        columns['env'] = [c.rewards['env'] for c in completions]
    lengths = [c.length for c in completions]
    for c, scores in zip(completions, scorer([c.text for c in completions], records, lengths, columns)):
        failed = scorer.environment and c.rewards['env'] is None
        c.rewards, c.reward = scores, None if failed else scorer.total(scores)


# ---- micro-batches -----------------------------------------------------------------------------------------

@dataclass
class MicroBatch:
    """B completions of this rank, at most T tokens long. Tensors (B, T), unless said otherwise."""
    rows: torch.Tensor                      # (B,): their rows of the rollout
    packed: PackedBatch
    mask: torch.Tensor                      # False: padding, and what an environment said
    sampling_logp: torch.Tensor             # of the distribution that each token was drawn from
    old_logp: torch.Tensor | None = None    # by a training forward before the updates; None for the first
    ref_logp: torch.Tensor | None = None
    values: torch.Tensor | None = None      # the critic's before the updates
    bootstrap: torch.Tensor | None = None   # (B,): its value behind the last token
    advantages: torch.Tensor | None = None  # with a critic
    returns: torch.Tensor | None = None

    @property
    def start_logp(self):
        """Of the policy that the rollout began with, as near as it is known."""
        return self.sampling_logp if self.old_logp is None else self.old_logp


def make_micro_batches(cfg, rollout, sizes, run):
    """[this rank's MicroBatches of each optimizer step of one pass over the rollout].

    What does not count is left out. Without a KL term, a critic and an entropy bonus the gradient of a
    completion with advantage 0 is 0: it is counted, not computed.
    """
    has_critic = cfg.algorithm == 'ppo'
    learns = rollout.valid
    if compares_groups(cfg) and not (cfg.beta or cfg.entropy_coef):
        learns = learns & (rollout.advantage != 0)
    steps = [[] for _ in range(sizes.steps_per_rollout)]
    # by rows, so that a step has the same completions however many ranks there are, and each rank its own
    mine = [(row, c) for row, c in zip(rollout.rows.tolist(), rollout.completions) if learns[row]]
    for number, of_step in groupby(mine, lambda pair: pair[0] // sizes.completions_per_step):
        for part in cut(list(of_step), cfg.per_device_train_batch_size):
            rows, completions = zip(*part)
            # a prompt is computed once for the completions that lie beside each other in a micro-batch
            packed = pack(by_prompt(completions), run.device, keep_last=has_critic,
                          masks=[c.mask for c in completions])
            logp = pad_sequence([torch.tensor(c.logp) for c in completions], batch_first=True).to(run.device)
            steps[number].append(MicroBatch(torch.tensor(rows), packed, packed.targets >= 0, logp))
    return steps


def count_step(cfg, rollout, number, sizes, mean):
    """(tokens, what policy_loss divides by) of optimizer step `number` of a rollout, over all ranks."""
    # also of those with advantage 0, which make_micro_batches leaves out: they are part of the mean
    rows = slice(number * sizes.completions_per_step, (number + 1) * sizes.completions_per_step)
    valid = rollout.valid[rows]
    tokens, sequences = int(rollout.length[rows][valid].sum()), int(valid.sum())
    counts = {'token': tokens, 'sequence': sequences, 'constant': sequences * cfg.max_completion_length}
    return tokens, counts[mean]


def forward(cfg, policy, critic, packed, entropy=False):
    """(log-probabilities (B, T), entropies (B, T) or None, values (B, T) and behind the last token (B,), or
    None)."""
    hidden = packed.hidden_states(policy)                           # (B, T, C); with a critic (B, T + 1, C)
    T = packed.targets.size(1)
    stats = policy.token_stats(hidden[:, :T], packed.targets, cfg.temperature, extras=entropy)
    values = bootstrap = None
    if critic and critic.owns_backbone:
        values, bootstrap = critic.values(packed)                   # another forward pass, of its backbone
    elif critic:                                                    # a head on the policy's own hidden states
        values, bootstrap = critic.read(hidden[:, :T]), critic.read(hidden[:, T])
    return stats['logp'], stats.get('entropy'), values, bootstrap


@torch.no_grad()
def score_micro_batches(cfg, policy, critic, reference, steps, run):
    """Fills in old_logp where it will be needed, ref_logp, and the critic's values. No dropout."""
    policy.eval()
    for number, micro_batches in enumerate(steps):
        for mb in micro_batches:
            with run.autocast():
                # in a rollout's first update the policy is the old one: nothing to compute. Not the sampler's
                # logp either, where it is needed: its kernels round in another way
                if number or cfg.num_iterations > 1:
                    mb.old_logp, _, mb.values, mb.bootstrap = forward(cfg, policy, critic, mb.packed)
                elif critic:
                    mb.values, mb.bootstrap = critic.values(mb.packed)
                if reference:
                    with reference() as model:
                        mb.ref_logp = forward(cfg, model, None, mb.packed._replace(last=None))[0]


def measure_kl(steps, N, run):
    """{'k1', 'k3': (N,) float64}: sums over each completion, of the policy that sampled it to the
    reference."""
    kl = {kind: torch.zeros(N, dtype=torch.float64) for kind in ('k1', 'k3')}
    for kind, sums in kl.items():
        for mb in chain.from_iterable(steps):           # what is unscored, or has no gradient, counts as 0
            per_token = torch.where(mb.mask, kl_estimate(mb.start_logp, mb.ref_logp, kind), 0.0)
            sums[mb.rows] = per_token.sum(1).double().cpu()
        run.sum(sums)
    return kl


def advantages_by_teacher(rollout, steps):
    """Fills in the advantages of every token: how much likelier the teacher finds it than the policy did."""
    rollout.advantage = torch.zeros(len(rollout.reward))
    for mb in chain.from_iterable(steps):
        mb.advantages = torch.where(mb.mask, -kl_estimate(mb.start_logp, mb.ref_logp, 'k1'), 0.0)
        rollout.advantage[mb.rows] = (mb.advantages.sum(1) / mb.mask.sum(1)).float().cpu()


def advantages_by_critic(cfg, rollout, steps, beta, run):
    """Fills in advantages and returns of every token by gae, with the reward at the last one, with
    kl='reward' beta times k1 off each, and what the critic expects behind a completion that was cut off.
    Advantages are whitened over the whole rollout, of all ranks. Returns metrics."""
    batches = list(chain.from_iterable(steps))
    # over all tokens: count; advantage, its square; return, its square; the square of the critic's error
    moments = torch.zeros(6, dtype=torch.float64)
    for mb in batches:
        rewards = torch.zeros_like(mb.values)
        if beta and cfg.kl == 'reward':
            rewards = -beta * kl_estimate(mb.start_logp, mb.ref_logp, 'k1')
        # the reward is for the whole completion: it comes with the last token
        last = (mb.mask * torch.arange(1, mb.mask.size(1) + 1, device=run.device)).argmax(1, keepdim=True)
        rewards = rewards.scatter_add(1, last, rollout.reward[mb.rows, None].to(run.device, rewards.dtype))
        # what was cut off would have gone on: its return ends with the critic's opinion, not with 0
        bootstrap = torch.where(rollout.stopped[mb.rows].to(run.device), 0.0, mb.bootstrap)
        mb.advantages, mb.returns = gae(rewards, mb.values, mb.mask, cfg.gamma, cfg.lam, bootstrap)
        A, R, V = (x[mb.mask].double().cpu() for x in (mb.advantages, mb.returns, mb.values))
        columns = torch.stack((torch.ones_like(A), A, A.square(), R, R.square(), (R - V).square()))
        moments += columns.sum(1)
    count, a, a2, r, r2, e2 = run.sum(moments).tolist()
    rollout.advantage = torch.zeros(len(rollout.reward))
    for mb in batches:
        mb.advantages = whiten(mb.advantages, mb.mask, count, a, a2)
        rollout.advantage[mb.rows] = (mb.advantages.sum(1) / mb.mask.sum(1)).cpu()
    # 1: the critic foresees every return; 0: no better than their mean
    variance = r2 / count - (r / count) ** 2
    explained = 1 - e2 / count / variance if variance > 1e-12 else 0.0
    return {'explained_variance': explained, 'returns': r / count}


# ---- metrics -----------------------------------------------------------------------------------------------

def merge_stats(measured, run):
    """[(tokens, {name: tensor ()})] of this rank's micro-batches -> {name: number} of the whole step, on
    every rank: parts of the loss are summed, extremes (REDUCED) stay extremes, all else is a mean over
    tokens."""
    mine = [(int(tokens), {name: float(x) for name, x in stats.items()}) for tokens, stats in measured]
    parts = run.gather(mine)
    total = sum(tokens for tokens, _ in parts)
    merged = {'loss': 0.0}                              # where no completion has an advantage
    # a rank may have no micro-batch at all, so the names come with the numbers
    for name in parts[0][1] if parts else ():
        values = [stats[name] for _, stats in parts]
        if name in ('loss', 'value_loss'):
            merged[name] = sum(values)
        elif name in REDUCED:
            merged[name] = REDUCED[name](values)
        else:
            merged[name] = sum(tokens * stats[name] for tokens, stats in parts) / total
    return merged


def answer_reward(scorer):
    """The name of the reward that says whether an answer is right, or None."""
    return next((name for name in ('task', 'exact') if name in scorer.names), None)


def describe_rollout(cfg, rollout, scorer, beta, run):
    """The metrics of a rollout, the same on every rank."""
    rewards, tokens = rollout.reward[rollout.valid], rollout.length.sum()
    if not len(rewards):
        cut_off = 'those cut off count as none (mask_truncated)' if cfg.mask_truncated else ''
        reasons = filter(None, (cut_off, scorer.explain_missing(rollout.rewards)))
        raise UserError(f'no completion of this rollout has a score: {"; ".join(reasons)}')
    metrics = {}
    if scorer.names:                            # distill may learn without
        metrics = {'reward': rewards.mean(), 'reward_std': rewards.std() if len(rewards) > 1 else 0.0}
    if len(scorer.names) > 1:
        called = short_names(scorer.names)
        for name, column in rollout.rewards.items():
            metrics[f'rewards/{called[name]}/mean'] = column.nanmean()
    if answer_reward(scorer):
        metrics['success_rate'] = rollout.rewards[answer_reward(scorer)].nanmean()
    if compares_groups(cfg):
        differ = has_signal(rollout.reward, cfg.num_generations)
        metrics['frac_reward_zero_std'] = 1 - differ.double().mean()
    metrics.update({'completions/mean_length': rollout.length.mean(),
                    'completions/clipped_ratio': 1 - rollout.stopped.double().mean(),
                    'entropy': -rollout.logp.sum() / tokens})       # estimated from the tokens drawn
    if rollout.kl:
        metrics['kl'] = rollout.kl['k3'].sum() / tokens
        if beta:
            metrics['beta'] = beta
    if len(rewards) < len(rollout.reward):
        metrics['unscored'] = len(rollout.reward) - len(rewards)
        if note := scorer.note_missing(rollout.rewards):
            run.print0(f'note      unscored: {note}')
    if rollout.groups_drawn * cfg.num_generations > len(rollout.reward):
        metrics['groups_drawn'] = rollout.groups_drawn
    return {key: float(value) for key, value in metrics.items()}


def evaluate(cfg, policy, tokenizer, reward_model, reference, problems, scorer, run):
    """{eval_accuracy (of exact or task), eval_reward} of the likeliest answers to held-out problems, and the
    same `_sampled` at the training temperature, with a teacher also eval_kl, of the samples; and two of the
    likeliest as text. What is drawn depends on neither step nor ranks."""
    metrics, shown, right = {}, '', answer_reward(scorer)
    numbered = list(enumerate(problems.held_out))[run.rank::run.world_size]
    # the likeliest answer is what users get; samples say how sure the policy is, and foresee the reward
    for name, temperature in (('', 0.0), ('_sampled', cfg.temperature)):
        completions = sample_completions(cfg, policy, tokenizer, scorer, numbered, 0,
                                         seed_for(cfg.seed, 'evaluation'), run, temperature, 1)
        reward_completions(cfg, scorer, reward_model, completions)
        shown = shown or '\n'.join(c.prompt + c.transcript for c in completions[:2])
        # an answer that could not be scored is left out, not wrong
        scores = [(c.reward, c.rewards.get(right)) for c in completions if c.reward is not None]
        scores = run.gather(scores)
        if scores and scorer.names:
            metrics[f'eval_reward{name}'] = sum(reward for reward, _ in scores) / len(scores)
        if scores and right:
            metrics[f'eval_accuracy{name}'] = sum(correct for _, correct in scores) / len(scores)
    if cfg.algorithm == 'distill':
        kl, tokens = map(sum, zip(*run.gather([reverse_kl(cfg, reference, completions, run)])))
        if tokens:                              # of nothing there is no KL, and none that could be the best
            metrics['eval_kl'] = kl / tokens
    return metrics, shown


def show(cfg, log, run):
    """The picture and the page so far."""
    if run.is_main:
        name = os.path.basename(os.path.abspath(cfg.output_dir))
        plots.reward_picture(log.path, os.path.join(cfg.output_dir, 'reward.png'), name)
        if os.path.exists(rollouts_path(cfg)):
            pages.rollouts_page(rollouts_path(cfg), os.path.join(cfg.output_dir, 'rollouts.html'), name,
                                JUDGES.get(cfg.algorithm, ''))


# ---- models ------------------------------------------------------------------------------------------------

def load_reference(cfg, policy, tokenizer, run):
    """reference() is a context that gives the reference model, with distill the teacher; None without a KL
    term. Adapters switched off are the reference only where training began without one."""
    if cfg.teacher_model_name:
        frozen, theirs = load_policy(cfg, run, cfg.teacher_model_name, trainable=False)
        same_tokens(cfg, 'teacher_model_name', theirs, tokenizer)
    elif not cfg.beta:
        return None
    elif cfg.use_lora and not is_adapter(cfg.base_model_name):      # no second copy of the weights
        return functools.partial(adapters_off, policy)
    else:
        frozen, _ = load_policy(cfg, run, cfg.base_model_name, trainable=False)
    return functools.partial(contextlib.nullcontext, run.prepare(frozen))


def same_tokens(cfg, name, theirs, tokenizer):
    """UserError: sampled tokens are never made from text again, so what reads them needs the same
    vocabulary."""
    if theirs.sha256 != tokenizer.sha256:
        raise UserError(f'{name}={getattr(cfg, name)} has another tokenizer than {cfg.base_model_name}: it '
                        'could not read its tokens')


def load_critic(cfg, policy, tokenizer, run):
    """PPO's critic, else None."""
    if cfg.algorithm != 'ppo':
        return None
    if cfg.share_critic:
        return ValueModel(policy, own=False)
    return load_value_model(cfg, cfg.value_model_name, tokenizer, run)


def load_value_model(cfg, name, tokenizer, run):
    """A critic or a reward model to train, which must read the policy's tokens: a new head on a backbone."""
    backbone, theirs = load_policy(cfg, run, name)
    same_tokens(cfg, 'value_model_name', theirs, tokenizer)
    model = ValueModel(backbone.eval())     # no dropout in a critic: noise in values is noise in advantages
    run.prepare(model.backbone)
    return model


def make_optimizers(cfg, policy, critic):
    """({prefix in a checkpoint: optimizer}, {prefix: {name: parameter}} of what is not the policy's), as
    Run.save takes them."""
    # beta2 0.99: with 0.999 the second moment would remember more steps than many runs have
    make = functools.partial(make_optimizer, cfg.optimizer, weight_decay=cfg.weight_decay, betas=(0.9, 0.99))
    optimizers = {'': make(policy, cfg.learning_rate)}
    if not critic:
        return optimizers, {}
    optimizers['critic_optimizer/'] = make(critic.own, cfg.value_learning_rate)
    return optimizers, {'critic/': {name: p for name, p in critic.own.named_parameters() if p.requires_grad}}


def open_reward_model(cfg, problems, tokenizer, run, path=None):
    """The reward `model`: that of `path` or reward_model_path, or the one that a run which goes on has
    trained; else None."""
    path = path or cfg.reward_model_path
    if not path and 'model' in cfg.rewards and (run.resumed or cfg.replay is not None):
        path = os.path.join(cfg.output_dir, 'reward_model')
    if not path:
        return None
    model = load_reward_model(path, run.device, tokenizer)
    if isinstance(model, ValueModel):
        run.shard(model.backbone)
        say_accuracy(model, problems.held_out_pairs, run)
    return model


def train_own_reward_model(cfg, problems, tokenizer, log, run):
    """A reward model trained from the pairs, as it is saved in output_dir/reward_model."""
    directory = os.path.join(cfg.output_dir, 'reward_model')
    if run.tensor_parallel > 1 and cfg.use_lora:
        raise UserError(f'--tensor_parallel={run.tensor_parallel} trains no reward model with an adapter '
                        'yet: train it in a run of its own, and name it as reward_model_path')
    with log.pause():
        model = load_value_model(cfg, cfg.value_model_name or cfg.base_model_name, tokenizer, run)
        with run.flags_to_lower('--reward_learning_rate', '--reward_batch_size', '--max_length'):
            train_reward_model(model, problems.pairs, run, cfg.reward_epochs, cfg.reward_batch_size,
                               cfg.reward_learning_rate, cfg.seed)
        # the main rank merges an adapter first, for which it needs the weights whole
        with run.gathering(), run.unsharded():
            run.on_main(functools.partial(save_reward_model, model, tokenizer, directory))
        run.release(model.backbone)
        return open_reward_model(cfg, problems, tokenizer, run, directory)      # from here on it only judges


def say_accuracy(model, pairs, run):
    """What the reward is worth, before a run depends on it."""
    if pairs:
        accuracy = pair_accuracy(model, pairs, run)
        run.print0(f'reward model: prefers the chosen side in {accuracy:.1%} of {len(pairs)} held-out pairs')


# ---- the run -----------------------------------------------------------------------------------------------

@dataclass
class State(RunState):
    """Where a run is."""
    rollouts: int = 0
    cursor: int = 0             # problems that were drawn
    beta: float = 0.0           # the KL's weight, which kl_target adapts
    rewards_differed: bool | None = None        # in any rollout so far; None: not known, as there was none
    best: float | None = None   # highest eval_accuracy; or eval_reward, where no answer is right or wrong;
                                # or -eval_kl, where a teacher alone says what is good

    def note_eval(self, metrics):
        """Whether an evaluation is the best so far; that of the start, and one of nothing, never is."""
        nearness = -metrics['eval_kl'] if 'eval_kl' in metrics else None
        mark = metrics.get('eval_accuracy', metrics.get('eval_reward', nearness))
        best = self.step > 0 and mark is not None and (self.best is None or mark > self.best)
        self.best = mark if best else self.best
        return best


@dataclass
class Sizes:
    """How much a step, a rollout and the run are, over all ranks."""
    groups_per_step: int
    completions_per_step: int
    steps_per_rollout: int      # of one pass over it
    total_steps: int
    warmup_steps: int

    @property
    def groups_per_rollout(self):
        return self.groups_per_step * self.steps_per_rollout


def resolve_sizes(cfg, num_problems, run):
    """Counts are completions; what makes no whole groups is rounded up, and said."""
    G = cfg.num_generations
    wanted = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * run.world_size
    sampled = cfg.per_device_train_batch_size * cfg.steps_per_generation * run.world_size
    groups = math.ceil(wanted / G)              # a group lies in one step as a whole
    steps = math.ceil(sampled / (groups * G))
    if groups * G != wanted or (sampled > wanted and steps * wanted != sampled):
        run.print0(f'batch     {wanted} completions a step and {sampled} a rollout make no whole groups of '
                   f'{G}: rounded up to {groups * G} and {groups * steps * G}')
    if groups * steps > num_problems:
        run.print0(f'note      a rollout asks {groups * steps} problems, the training set has '
                   f'{num_problems}: some come twice')
    # an epoch is whole rollouts; drop_last: one that would reach into the next epoch is left out
    rollouts = num_problems / (groups * steps)
    rollouts = max(1, math.floor(rollouts) if cfg.dataloader_drop_last else math.ceil(rollouts))
    total = max(1, round(rollouts * cfg.num_train_epochs)) * steps * cfg.num_iterations
    if cfg.max_steps > 0:
        total = cfg.max_steps
    return Sizes(groups, groups * G, steps, total, warmup_within(cfg.warmup_steps, total, run.print0))


def resolve_defaults(cfg, run):
    """Fills in, in place, what was left to be chosen and needs no model; each choice is said."""
    ppo, embedded = cfg.algorithm == 'ppo', not cfg.sources()
    if cfg.algorithm != 'distill':                      # Run.open has said that they change nothing
        cfg.teacher_model_name, cfg.forward_kl = None, 0.0
    # the reward that the data can give: a model's opinion, the task's own verdict, or the form of the answer
    if cfg.env:
        rewards = ['env']
    elif cfg.algorithm == 'distill' and not (embedded or cfg.reward_model_path):
        rewards = []                                    # the teacher alone teaches; what is named is measured
    elif uses_pairs(cfg) or cfg.reward_model_path:
        rewards = ['model']
    else:
        rewards = ['task'] if embedded else ['exact', 'number', 'tags']
    if cfg.algorithm == 'dapo':
        rewards = [*rewards, 'length']
    on_policy = composition(cfg)['surrogate'] == 'reinforce' or 'gradient_accumulation_steps' in cfg.typed
    steps = 2 if embedded and not on_policy else 1      # sampling is most of a step: two for one rollout
    in_reward = cfg.algorithm in ('ppo', 'rloo', 'reinforce++') and (
        not compares_each_reward(cfg))                  # else there is no sum to take it off
    kl = {} if cfg.algorithm == 'distill' else {'kl': 'reward' if in_reward else 'k3'}
    fill_in(cfg, max_length=512, max_prompt_length=256, importance_cap=2.0 if cfg.sampler_url else 0.0)
    chosen = [fill_in(
        cfg, num_generations=8 if compares_groups(cfg) else 4,
        steps_per_generation=steps * cfg.gradient_accumulation_steps,
        max_completion_length=48 if embedded and not cfg.env else cfg.max_length - cfg.max_prompt_length,
        rewards=rewards, beta=0.05 if ppo else 0.0, **kl,
        dynamic_sampling=cfg.algorithm == 'dapo')]
    if embedded and cfg.max_steps < 0 and not cfg.typed & {'max_steps', 'num_train_epochs'}:
        cfg.max_steps = 60
        chosen.append('max_steps=60')
    buffer = fill_in(cfg, length_buffer=max(1, cfg.max_completion_length // 4))
    if 'length' in cfg.rewards:
        chosen.append(buffer)
    if 'model' in cfg.rewards and not cfg.reward_model_path and not uses_pairs(cfg):
        raise UserError('rewards: model needs a reward model: give reward_model_path, or data with '
                        'chosen_column and rejected_column to train one from')
    if cfg.length_buffer > cfg.max_completion_length:
        raise UserError(f'length_buffer={cfg.length_buffer} is longer than max_completion_length='
                        f'{cfg.max_completion_length}')
    say_chosen(chosen, run)


def say_chosen(chosen, run):
    if any(chosen):
        run.print0('chosen    ' + ', '.join(filter(None, chosen)))


def resolve_by_model(cfg, policy, run):
    """Learning rates by the model's size and mode, and lengths within its context, in place."""
    if is_adapter(cfg.base_model_name) and not cfg.use_lora:
        raise UserError(f'{cfg.base_model_name} is an adapter: to train it further set model.use_lora=true, '
                        'or merge it into its base first')
    chosen = [fill_in(cfg, learning_rate=default_learning_rate(cfg, policy, small=2e-4))]
    # heads that begin at 0 on a small backbone learn at the rate of pretraining
    rate = 1e-3 if cfg.mode == 'full' and is_small(policy) else cfg.learning_rate
    fill_in(cfg, reward_learning_rate=rate)
    of_critic = fill_in(cfg, value_learning_rate=rate)
    if cfg.algorithm == 'ppo':
        chosen.append(of_critic)
    say_chosen(chosen, run)

    context = policy.config.block_size
    # a length that was chosen here is clamped; one that was typed and cannot be had is an error
    longest, half = cfg.max_completion_length, context // 2
    if longest >= context and 'max_completion_length' in cfg.typed:
        raise UserError(f'max_completion_length={longest} does not fit the context of {context} tokens that '
                        f'{cfg.base_model_name} has')
    if context - longest < min(cfg.max_prompt_length, half):        # prompts have a right to half of it
        longest = min(longest, half)
    prompts = min(cfg.max_prompt_length, context - longest)
    if (longest, prompts) != (cfg.max_completion_length, cfg.max_prompt_length):
        run.print0(f'lengths   clamped to the context of {context} tokens: prompts {prompts}, completions '
                   f'{longest}')
    cfg.max_completion_length, cfg.max_prompt_length = longest, prompts
    cfg.length_buffer = min(cfg.length_buffer, longest)


def open_scorer(cfg):
    task = None if cfg.sources() else load_task(cfg.task)
    environment = Environment(cfg.env, cfg.env_timeout, cfg.reward_concurrency) if cfg.env else None
    return Scorer(cfg.rewards, cfg.reward_weights, task, cfg.max_completion_length, cfg.length_buffer,
                  cfg.reward_timeout, cfg.reward_concurrency, environment)


def start_log(cfg, state, sizes, run):
    """Opens the log; rollouts.jsonl is cut back to where the run goes on."""
    if cfg.replay is not None:                  # says what it does, and keeps nothing: see explain_replay
        run.log = Log(run, tempfile.mkdtemp(), {}, sizes.total_steps, tensorboard=False,
                      interval=cfg.logging_steps)
        return run.log
    if cfg.collect:
        refuse_rows_of_others(cfg.collect, cfg.output_dir)
    header = {'algorithm': cfg.algorithm, 'model': cfg.base_model_name}
    log = run.start(sizes.total_steps, state.step, header, cfg.logging_steps, data=cfg.sources())
    if run.resumed:                             # what was sampled after the checkpoint is sampled again
        run.on_main(functools.partial(cut_rollouts, rollouts_path(cfg), state.step))
    if cfg.collect:                             # also of a start that was killed before its first checkpoint
        run.on_main(functools.partial(cut_rollouts, cfg.collect, state.step))
    return log


def rollouts_path(cfg):
    return os.path.join(cfg.output_dir, 'rollouts.jsonl')


def print_summary(cfg, policy, critic, tokenizer, problems, sizes, run):
    c = composition(cfg)
    names = ', '.join(source.name for source in cfg.sources()) or f'embedded task {cfg.task}'
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    model = f'{cfg.base_model_name}: {policy.num_params():,} parameters, {trained:,} trained'
    advantages, kl = f'{c["baseline"]} over {c["scale"]}', 'no reference'
    if critic:
        model += f'; critic {cfg.value_model_name}' if critic.owns_backbone else '; critic on its backbone'
        advantages = 'gae'
    if cfg.teacher_model_name:
        advantages, kl = f'teacher {cfg.teacher_model_name}', f'forward KL {cfg.forward_kl:g}'
    if cfg.beta:
        place = 'k1 in the reward' if cfg.kl == 'reward' else f'{cfg.kl} in the loss'
        kl = f'beta {cfg.beta:g} ({place})'
    run.print0(f'data      {names}: {len(problems.train):,} problems, {len(problems.held_out):,} held out; '
               f'rewards {" + ".join(cfg.rewards) or "none"}')
    run.print0(f'prompt    {describe_prompt(problems.train[0], tokenizer, cfg.system_prompt)}')
    run.print0(f'model     {model}')
    run.print0(f'algorithm {cfg.algorithm}: {c["ratio"]} ratio, {c["surrogate"]} '
               f'{c["clip_low"]:g}/{c["clip_high"]:g}, {c["mean"]} mean, advantages by {advantages}, {kl}')
    run.print0(f'machine   {describe_device(run)}')
    run.print0(f'run       {sizes.total_steps:,} optimizer steps of {sizes.groups_per_step} groups of '
               f'{cfg.num_generations}; a rollout feeds {sizes.steps_per_rollout * cfg.num_iterations}, up '
               f'to {cfg.max_completion_length} tokens a completion')


# ---- replay ------------------------------------------------------------------------------------------------

def checkpoint_before(cfg, run):
    """The newest checkpoint from which step cfg.replay can be reached, or None: from the start. UserError
    where no rollout was written at that step."""
    path = rollouts_path(cfg)
    if not os.path.exists(path):
        raise UserError(f'--replay: there is no {path} to compare with (rollout_steps=0?)')
    steps = {c.step for c in read_completions(path)}
    if cfg.replay not in steps:
        near = min(sorted(steps), key=lambda step: abs(step - cfg.replay))
        raise UserError(f'--replay={cfg.replay}: no rollout was written at that step; the nearest one is '
                        f'{near}')
    # all but the two newest may have lost their optimizer's state (save_only_model)
    usable = [str(path) for path, manifest in run.checkpoints.own()
              if manifest['step'] <= cfg.replay and (path / 'optimizer.safetensors').exists()]
    begin = usable[-1] if usable else None
    run.print0(f'replay    from {begin or "the start"}, step by step, to step {cfg.replay}')
    return begin


def explain_replay(cfg, completions, log):
    """Compares this rank's completions with rollouts.jsonl, and says of each prompt what it taught."""
    shutil.rmtree(os.path.dirname(log.path))        # its console lines were all that was wanted of it
    path = rollouts_path(cfg)
    written = {(c.group, c.sample): c.completion_ids for c in read_completions(path, cfg.replay)}
    # tokens, not texts: two ways to cut a text into tokens would be two different things to learn
    same = sum(c.completion_ids == written.get((c.group, c.sample)) for c in completions)
    for members in cut(completions, cfg.num_generations):
        print(pages.explain_group(members, JUDGES.get(cfg.algorithm, '')))
    print(f'{same} of {len(completions)} completions are those of {path}, token by token')
    return {'same': same, 'completions': len(completions)}


if __name__ == '__main__':
    run_script(main, cfg)
