"""Reinforcement learning: PPO, GRPO, GSPO and their relatives, from one composition of small pure functions.

    python train_rl.py                                              # GRPO, embedded sums and model: minutes on two cores
    python train_rl.py training.algorithm=ppo model.value_model_name=tiny
    python train_rl.py --recipe recipes/training/grpo/llama3_3B_lora.yaml --num-gpus 8
    python train_rl.py data.datasets[0].name=problems.jsonl --reward=mine.py:score
    python train_rl.py --resume --output_dir=models/rl              # or --replay=40, to look at step 40 again

A policy loss is a ratio (of a token or of a sequence) put through a surrogate (clip, cispo, gmpo, sapo, reinforce) and averaged
(per token, per sequence, by a constant); an advantage is a reward less the baseline of its group, over a scale. PRESETS names the
published combinations: GRPO and GSPO differ by one argument, and PPO has advantages from a critic.

Counts are completions, as in TRL: an optimizer step sees per_device_train_batch_size x gradient_accumulation_steps x GPUs of them,
a rollout per_device_train_batch_size x steps_per_generation x GPUs, both rounded up to whole groups; where a rollout feeds several
optimizer steps, the later ones are off-policy. The mean is over the whole step, counted over micro-batches and ranks.
"""
import math
import os
import time
from dataclasses import dataclass, replace

from configurator import UserError, as_dict, parse, run_script, setting
from data.problems import TASKS
from data.formats import Source
from nanoforge.optim import OPTIMIZERS, SCHEDULES

MAX_BAD_STEPS = 5       # steps in a row without a finite gradient after which a run stops
MAX_REFILLS = 10        # rollouts that dynamic sampling draws at most for one step
SMALL = 10_000_000      # parameters below which a model learns at a small model's rate

GRPO = dict(ratio='token', surrogate='clip', mean='sequence', clip_low=0.2, clip_high=0.2, scale='group', baseline='mean')
PRESETS = {
    'grpo': GRPO,                                                                       # Shao et al. 2024, arXiv 2402.03300
    'gspo': {**GRPO, 'ratio': 'sequence', 'clip_low': 3e-4, 'clip_high': 4e-4},         # Zheng et al. 2025, arXiv 2507.18071
    'dr_grpo': {**GRPO, 'mean': 'constant', 'scale': 'none'},                           # Liu et al. 2025, arXiv 2503.20783
    'dapo': {**GRPO, 'mean': 'token', 'clip_high': 0.28},                               # Yu et al. 2025, arXiv 2503.14476
    'cispo': {**GRPO, 'surrogate': 'cispo', 'mean': 'token', 'clip_low': 1.0, 'clip_high': 4.0},    # MiniMax 2025, arXiv 2506.13585
    'gmpo': {**GRPO, 'surrogate': 'gmpo', 'clip_low': 0.4, 'clip_high': 0.4},           # Zhao et al. 2025, arXiv 2507.20673
    'sapo': {**GRPO, 'surrogate': 'sapo'},                                              # Gao et al. 2025, arXiv 2511.20347
    'rloo': {**GRPO, 'surrogate': 'reinforce', 'mean': 'constant', 'scale': 'none', 'baseline': 'leave_one_out'},   # Ahmadian et al. 2024
    'reinforce++': {**GRPO, 'mean': 'token', 'scale': 'batch'},                         # Hu et al. 2025, arXiv 2501.03262, with baseline
    'ppo': {**GRPO, 'mean': 'token'},                                                   # Schulman et al. 2017; advantages by gae
}


def check_composition(ratio, surrogate, mean, dual_clip=None):
    """UserError for names that do not exist and for pairs that make no sense."""
    for name, value, known in (('ratio', ratio, ('token', 'sequence')), ('mean', mean, ('token', 'sequence', 'constant')),
                               ('surrogate', surrogate, ('clip', 'cispo', 'gmpo', 'sapo', 'reinforce'))):
        if value not in known:
            raise UserError(f'{name}={value!r} is none of {", ".join(known)}')
    if ratio == 'sequence' and mean != 'sequence':
        raise UserError(f'ratio=sequence with mean={mean} would weight each sequence by its length: use mean=sequence')
    if surrogate == 'gmpo' and (ratio, mean) != ('token', 'sequence'):
        raise UserError(f'surrogate=gmpo is the geometric mean of token ratios over a sequence: use ratio=token and mean=sequence, '
                        f'not ratio={ratio} and mean={mean}')
    if surrogate == 'reinforce' and ratio == 'sequence':
        raise UserError('surrogate=reinforce has no ratio: leave ratio=token')
    if dual_clip is not None and (surrogate != 'clip' or dual_clip <= 1):
        raise UserError(f'dual_clip={dual_clip} belongs to surrogate=clip and must be above 1 (3 is usual), not to {surrogate}')


@dataclass
class Config:
    # start
    base_model_name: str = setting('tiny', 'model.base_model_name', also=('model', 'model_name'))  # the policy: a directory, a hub name or `tiny`, the embedded model
    value_model_name: str | None = setting(None, 'model.value_model_name')  # ppo: what the critic, and a reward model that is trained here, begin as
    reward_model_path: str | None = setting(None, 'model.reward_model_path')  # a sequence classifier with one label: the reward `model`
    torch_dtype: str = setting('float32', 'model.torch_dtype', choices=('float32', 'bfloat16', 'float16'))  # of frozen weights on a GPU (those under LoRA, the reference); what is trained is float32
    low_cpu_mem_usage: bool = setting(True, 'model.low_cpu_mem_usage')  # weights are always mapped from disk: false changes nothing
    use_flash_attention: bool = setting(False, 'model.use_flash_attention')  # on a GPU prefer the flash kernel; false: PyTorch chooses among the fused ones
    load_in_8bit: bool = setting(False, 'model.load_in_8bit')  # hold the frozen weights under LoRA in 8 bits
    load_in_4bit: bool = setting(False, 'model.load_in_4bit')  # hold them in 4 bits (QLoRA)
    bnb_4bit_compute_dtype: str = setting('bfloat16', 'model.bnb_4bit_compute_dtype', choices=('float32', 'bfloat16', 'float16'))  # what 4-bit weights are multiplied in
    bnb_4bit_quant_type: str = setting('nf4', 'model.bnb_4bit_quant_type', choices=('nf4', 'fp4'))  # the 4-bit numbers
    bnb_4bit_use_double_quant: bool = setting(True, 'model.bnb_4bit_use_double_quant')  # quantise their scales, too
    use_lora: bool = setting(False, 'model.use_lora')  # train adapters; the reference is the model without them
    lora_r: int = setting(8, 'model.lora_r')  # rank of an adapter
    lora_alpha: float = setting(16, 'model.lora_alpha')  # its scale is alpha / r
    lora_dropout: float = setting(0.05, 'model.lora_dropout')  # on its input, in updates; never while sampling or scoring
    lora_target_modules: list[str] = setting([], 'model.lora_target_modules')  # layers by the end of their names, or all-linear; empty = PEFT's choice for the family
    lora_bias: str = setting('none', 'model.lora_bias', choices=('none', 'all', 'lora_only'))  # biases that are trained besides
    # data
    datasets: list[Source] = setting([], 'data.datasets')  # questions and answers, or pairs for a reward model; none = the embedded task
    task: str = setting('arithmetic', 'data.task', choices=TASKS)  # the embedded task
    num_problems: int = setting(20000, 'data.num_problems')  # how many of its problems are generated for training
    eval_problems: int = setting(200, 'data.eval_problems')  # held-out problems of an evaluation; of a data set without a split of its own at most a tenth
    system_prompt: str | None = setting(None, 'data.system_prompt')  # the form of the answer that data sets are asked for; think and answer tags if not set
    max_length: int = setting(512, 'data.max_length')  # tokens of prompt and completion
    max_prompt_length: int = setting(256, 'data.max_prompt_length')  # longer prompts are left out, and counted
    max_completion_length: int | None = setting(None, 'data.max_completion_length')  # tokens sampled at most: max_length less max_prompt_length; 48 for the embedded task
    dataset_num_proc: int = setting(1, 'data.dataset_num_proc')  # the tokenizer uses all cores by itself: changes nothing
    remove_unused_columns: bool = setting(False, 'data.remove_unused_columns')  # rewards see only question and answer of a row, not its other columns
    # rewards
    rewards: list[str] = setting([], 'training.rewards', also=('reward', 'training.reward'))  # exact, number, tags, length, task, model or path.py:function; by what the data has if not set
    reward_weights: list[float] = setting([], 'training.reward_weights')  # one each; exact 2, number and tags 0.5, others 1 if not set
    reward_timeout: float = setting(10.0, 'training.reward_timeout')  # seconds that a function of yours may take for a batch
    length_buffer: int | None = setting(None, 'training.length_buffer')  # tokens before max_completion_length over which `length` falls to -1; a quarter of it
    reward_epochs: int = setting(1, 'training.reward_epochs')  # passes over the pairs of a reward model trained here
    reward_batch_size: int = setting(32, 'training.reward_batch_size')  # pairs in an optimizer step of it, over all GPUs
    reward_learning_rate: float | None = setting(None, 'training.reward_learning_rate')  # its highest rate; by size if not set: 1e-3 for a small model, else as learning_rate
    # algorithm
    algorithm: str = setting('grpo', 'training.algorithm', choices=tuple(PRESETS))  # a published combination of the next ones
    ratio: str | None = setting(None, 'training.importance_sampling_level', also=('training.ratio',), choices=('token', 'sequence'))  # new over old probability
    surrogate: str | None = setting(None, 'training.surrogate', choices=('clip', 'cispo', 'gmpo', 'sapo', 'reinforce'))  # what is made of the ratio
    mean: str | None = setting(None, 'training.mean', choices=('token', 'sequence', 'constant'))  # what the loss is averaged over; constant: completions x max_completion_length
    scale: str | None = setting(None, 'training.scale_rewards', also=('training.scale',), choices=('group', 'batch', 'none'))  # deviation that advantages are divided by
    baseline: str | None = setting(None, 'training.baseline', choices=('mean', 'leave_one_out'))  # of a group
    epsilon: float | None = setting(None, 'training.epsilon')  # lower clip range: 0.2; gspo 3e-4, cispo 1, gmpo 0.4 (of the logarithm)
    epsilon_high: float | None = setting(None, 'training.epsilon_high')  # upper clip range: 0.2; gspo 4e-4, dapo 0.28, cispo 4, gmpo 0.4
    dual_clip: float | None = setting(None, 'training.dual_clip', also=('training.delta',))  # bound of the loss where the advantage is negative (3 is usual)
    beta: float | None = setting(None, 'training.beta', also=('training.kl_coef',))  # weight of the KL to the reference; ppo 0.05, else 0 = no reference
    kl: str | None = setting(None, 'training.kl', choices=('reward', 'k2', 'k3'))  # where it counts: k1 in the reward (ppo, rloo, reinforce++), or k2 or k3 in the loss
    kl_target: float | None = setting(None, 'training.kl_target')  # adapt beta so that the KL of a completion stays near this (Ziegler et al. 2019); not set = fixed
    kl_horizon: int = setting(10000, 'training.kl_horizon')  # completions over which it adapts
    entropy_coef: float = setting(0.0, 'training.entropy_coef')  # weight of an entropy bonus
    num_generations: int | None = setting(None, 'training.num_generations')  # completions of a prompt: 8, ppo 4 (any number; they share the prompt's computation)
    num_iterations: int = setting(1, 'training.num_iterations', also=('training.num_ppo_epochs',))  # passes over a rollout
    steps_per_generation: int | None = setting(None, 'training.steps_per_generation')  # micro-batches of a rollout; as many as of an optimizer step if not set
    temperature: float = setting(1.0, 'training.temperature')  # of sampling, and of every log-probability in the loss
    dynamic_sampling: bool | None = setting(None, 'training.dynamic_sampling')  # replace groups whose rewards are all equal (dapo)
    mask_truncated: bool = setting(False, 'training.mask_truncated', also=('training.mask_truncated_completions',))  # leave completions without a stop token out of baseline and loss
    importance_cap: float = setting(0.0, 'training.importance_cap')  # weight tokens by min(training / sampling probability, this) (truncated importance sampling, 2 is usual); 0 = off
    # ppo
    gamma: float = setting(1.0, 'training.gamma')  # discount per token
    lam: float = setting(0.95, 'training.lam')  # of generalised advantage estimation
    cliprange: float = setting(0.2, 'training.cliprange')  # clip range of ppo's ratio, both ways
    cliprange_value: float = setting(0.2, 'training.cliprange_value')  # how far a value may move in a rollout's updates; 0 = any
    vf_coef: float = setting(0.1, 'training.vf_coef')  # weight of the value loss
    value_learning_rate: float | None = setting(None, 'training.value_learning_rate')  # of the critic: 1e-3 for a small model, else learning_rate
    share_critic: bool = setting(False, 'training.share_critic')  # the critic is a head on the policy's own trunk
    # training
    output_dir: str = setting('models/rl', 'training.output_dir')  # checkpoints, log, rollouts and pictures; the model to use ends up in its root
    per_device_train_batch_size: int = setting(64, 'training.per_device_train_batch_size')  # completions in a micro-batch
    gradient_accumulation_steps: int = setting(4, 'training.gradient_accumulation_steps')  # micro-batches in an optimizer step
    learning_rate: float | None = setting(None, 'training.learning_rate')  # the highest; by mode: full 1e-5 (a small model 2e-4), LoRA 1e-4, QLoRA 2e-4
    lr_scheduler: str = setting('linear', 'training.lr_scheduler_type', also=('training.lr_scheduler',), choices=tuple(s for s in SCHEDULES if s != 'plateau'))  # after the warm-up, down to a tenth
    warmup_steps: int = setting(5, 'training.warmup_steps')  # optimizer steps
    optimizer: str = setting('adamw', 'training.optimizer', choices=OPTIMIZERS)  # ours: adamw, sgd, muon; others by their name in torch.optim
    weight_decay: float = setting(0.0, 'training.weight_decay')  # of matrices
    max_grad_norm: float = setting(1.0, 'training.max_grad_norm')  # highest gradient norm; 0 = no clipping
    num_train_epochs: float = setting(1.0, 'training.num_train_epochs')  # passes over the problems
    max_steps: int = setting(-1, 'training.max_steps')  # optimizer steps instead; -1 = by epochs (of the embedded task: 60)
    logging_steps: int = setting(5, 'training.logging_steps')  # optimizer steps between log lines
    save_steps: int = setting(500, 'training.save_steps')  # between checkpoints; there is one at the end, too
    eval_steps: int = setting(20, 'training.eval_steps')  # between evaluations on held-out problems; 0 = only at the end
    save_total_limit: int = setting(2, 'training.save_total_limit')  # newest checkpoints that are kept besides the best
    save_only_model: bool = setting(True, 'training.save_only_model')  # all checkpoints but the newest are for use only, not for resuming
    prediction_loss_only: bool = setting(True, 'training.prediction_loss_only')  # an evaluation always samples and scores: changes nothing
    bf16: bool | None = setting(None, 'training.bf16')  # autocast to bfloat16 on a GPU; chosen by device if neither is set
    fp16: bool = setting(False, 'training.fp16')  # autocast to float16 on a GPU
    gradient_checkpointing: bool = setting(False, 'training.gradient_checkpointing')  # recompute activations in backward: less memory, a third more time
    deepspeed_config: str | None = setting(None, 'training.deepspeed_config')  # not used here: --num_gpus=N runs data parallel
    dataloader_num_workers: int = setting(0, 'training.dataloader_num_workers')  # prompts are tokenised once, before the first step: changes nothing
    dataloader_pin_memory: bool = setting(False, 'training.dataloader_pin_memory')  # as above
    dataloader_drop_last: bool = setting(True, 'training.dataloader_drop_last')  # an epoch ends before a rollout that would not be full; false = it begins the next
    seed: int = setting(1337, 'training.seed')  # of data order, sampling and dropout
    # output
    rollout_steps: int = setting(1, 'training.rollout_steps')  # every so many rollouts go into rollouts.jsonl; 0 = none
    tensorboard: bool = setting(True, 'training.tensorboard')  # events under logs/<run>/
    wandb_enabled: bool = setting(False, 'wandb.enabled')  # also log to Weights & Biases
    wandb_project: str = setting('nanoforge', 'wandb.project')  # its project
    wandb_entity: str | None = setting(None, 'wandb.entity')  # its team or user
    wandb_name: str | None = setting(None, 'wandb.name')  # its run; the folder's name if not set
    wandb_tags: list[str] = setting([], 'wandb.tags')  # labels of the run
    resume: bool | str = setting(False, 'training.resume', choices=('auto',))  # go on with the run in output_dir; auto = if there is one
    replay: int | None = setting(None, 'training.replay')  # sample the rollout of this step of the run in output_dir again, compare and explain it
    # machine
    num_gpus: int = 1  # processes on this machine, one for each GPU
    nohup: bool = False  # in the background, with its output in logs/
    device: str = 'auto'  # auto = cuda, mps or cpu; or cuda:1, ...
    matmul: str = setting('auto', choices=('auto', 'float32', 'bf16'))  # products on a CPU; auto = bf16 where the processor has it

    def check(self):
        for name in ('per_device_train_batch_size', 'gradient_accumulation_steps', 'steps_per_generation', 'num_generations', 'num_iterations',
                     'logging_steps', 'save_steps', 'max_prompt_length', 'max_completion_length', 'length_buffer', 'num_problems', 'lora_r',
                     'reward_batch_size', 'reward_epochs', 'kl_horizon', 'eval_problems', 'save_total_limit'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f'{name} must be 1 or more, not {getattr(self, name)}')
        for name in ('epsilon', 'epsilon_high', 'beta', 'entropy_coef', 'importance_cap', 'cliprange_value', 'vf_coef', 'weight_decay',
                     'max_grad_norm', 'warmup_steps', 'eval_steps', 'rollout_steps', 'replay'):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f'{name} must be 0 or more, not {getattr(self, name)}')
        for name in ('learning_rate', 'value_learning_rate', 'reward_learning_rate', 'temperature', 'cliprange', 'kl_target', 'reward_timeout',
                     'num_train_epochs', 'lora_alpha'):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f'{name} must be above 0, not {getattr(self, name)}')
        for name in ('gamma', 'lam'):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f'{name} must be from 0 to 1, not {getattr(self, name)}')
        if self.max_steps != -1 and self.max_steps < 1:
            raise UserError(f'max_steps must be 1 or more, or -1 for num_train_epochs, not {self.max_steps}')
        if self.max_prompt_length >= self.max_length:
            raise UserError(f'max_prompt_length={self.max_prompt_length} leaves no room for a completion in max_length={self.max_length}')
        self.check_algorithm()
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_lora:
            raise UserError('load_in_4bit and load_in_8bit hold weights that are not trained: add model.use_lora=true')
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')
        if self.bf16 and self.fp16:
            typed = getattr(self, 'flags', frozenset()) & {'bf16', 'fp16'}
            if len(typed) != 1:
                raise UserError('bf16 and fp16 exclude each other: choose one')
            setattr(self, ({'bf16', 'fp16'} - typed).pop(), False)      # a typed flag beats the recipe's
        if self.deepspeed_config:
            raise UserError('deepspeed_config: DeepSpeed is not used here; leave it out, and set --num_gpus=N for data parallel, '
                            'model.use_lora or model.load_in_4bit for less memory')
        if self.reward_weights and not self.rewards:
            raise UserError('reward_weights without rewards: name the rewards that they belong to')

    def check_algorithm(self):
        """Combinations of settings that make no sense, before anything is loaded."""
        c, ppo = self.composition(), self.algorithm == 'ppo'
        check_composition(c['ratio'], c['surrogate'], c['mean'], self.dual_clip)
        if ppo and not self.value_model_name:
            raise UserError('algorithm=ppo needs a critic: set model.value_model_name to the model that it begins as (the policy\'s own '
                            'base_model_name is usual)')
        if ppo and self.dynamic_sampling:
            raise UserError('dynamic_sampling replaces groups of equal rewards, and ppo has no groups: leave it out, or choose dapo')
        if not ppo and self.num_generations == 1:
            raise UserError(f'num_generations=1: {self.algorithm} compares the completions of a prompt with one another and needs 2 or more')
        for name in ('scale', 'baseline'):
            if ppo and getattr(self, name):
                raise UserError(f'{name}={getattr(self, name)} is about groups; the advantages of ppo come from its critic')
        if ppo and (self.epsilon is not None or self.epsilon_high is not None):
            raise UserError('ppo is clipped by training.cliprange: leave out epsilon and epsilon_high')
        for name in ('share_critic', 'cliprange', 'cliprange_value', 'vf_coef', 'gamma', 'lam'):
            if not ppo and name in getattr(self, 'typed', ()) and getattr(self, name) != getattr(Config(), name):
                raise UserError(f'{name} is a setting of ppo; {self.algorithm} has no critic')
        if c['surrogate'] == 'reinforce' and (self.num_iterations > 1 or (self.steps_per_generation or 0) > self.gradient_accumulation_steps):
            raise UserError('surrogate=reinforce has no ratio to correct for an older policy: one update per rollout '
                            '(num_iterations=1, steps_per_generation not above gradient_accumulation_steps)')
        if self.beta == 0 and self.kl_target:
            raise UserError('kl_target adapts beta, which is 0: give it a start, training.beta=0.05')
        if c['surrogate'] == 'clip' and c['clip_low'] >= 1:
            raise UserError(f'epsilon={c["clip_low"]:g}: a ratio clipped below 1 - epsilon = {1 - c["clip_low"]:g} is never clipped; it must be below 1')

    def composition(self):
        """The preset of the algorithm, with what was set besides."""
        chosen = dict(PRESETS[self.algorithm])
        for name in ('ratio', 'surrogate', 'mean', 'scale', 'baseline'):
            chosen[name] = getattr(self, name) or chosen[name]
        if self.ratio == 'sequence' and PRESETS[self.algorithm]['ratio'] == 'token':        # gspo by its one argument
            chosen.update(clip_low=PRESETS['gspo']['clip_low'], clip_high=PRESETS['gspo']['clip_high'])
        if self.algorithm == 'ppo':
            return {**chosen, 'clip_low': self.cliprange, 'clip_high': self.cliprange}
        low = chosen['clip_low'] if self.epsilon is None else self.epsilon
        high = self.epsilon_high if self.epsilon_high is not None else chosen['clip_high'] if self.epsilon is None else self.epsilon
        return {**chosen, 'clip_low': low, 'clip_high': high}


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import contextlib

import torch

from nanoforge import pages
from nanoforge.checkpoint import Checkpoints, read_checkpoint, resume_config, start_fresh, write_json
from data import problems as questions
from data.rewards import Scorer
from data.completions import Episode, Table, all_ranks, cut_rollouts, grouped, lay_out, read_episodes, write_rollout
from nanoforge.lora import add_lora, adapters_off
from model import find_model, load_model, save_model
from nanoforge.optim import learning_rate, make_optimizer, warmup_within
from nanoforge.log import Log
from nanoforge.run import DTYPES, LossScale, Stop, describe_device, explain_out_of_memory, precision, resume_command, seed_for, setup
from sample import generate
from nanoforge.reward_model import ValueModel, load_reward_model, pair_accuracy, save_reward_model, hidden_states, train_reward_model

# ---- advantages -------------------------------------------------------------------------------------------------------------

def group_advantages(rewards, group, scale='group', baseline='mean', valid=None):
    """rewards (B,), group (B,) int: the prompt that each completion answers -> advantages (B,) float32.

    baseline  'mean' of the group's rewards, or 'leave_one_out': that of the others (Kool et al. 2019), n / (n - 1) times the first
    scale     'group': over the unbiased standard deviation of the group + 1e-4 (GRPO, arXiv 2402.03300, section 4.1.2);
              'batch': over that of all rewards; 'none' (Dr. GRPO)
    valid     (B,) bool: what is not (a reward that failed) counts in no mean and has advantage 0, whatever its reward

    A group whose rewards are all equal has advantages of exactly 0, and so has one with a single valid member. UserError: a group
    of one, for which every baseline is the reward itself.
    """
    if scale not in ('group', 'batch', 'none') or baseline not in ('mean', 'leave_one_out'):
        raise UserError(f'group_advantages: scale={scale!r} is one of group, batch, none; baseline={baseline!r} of mean, leave_one_out')
    _, place, size = group.unique(return_inverse=True, return_counts=True)                      # place (B,), size (G,)
    if (size == 1).any():
        raise UserError('a group of one has nothing to be compared with: set num_generations to 2 or more')
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    rewards = torch.where(valid, rewards.float(), 0.0)                                          # an invalid one may be NaN
    over = lambda values: rewards.new_zeros(len(size)).index_add_(0, place, values)             # (B,) summed into (G,)
    count = over(valid.float())
    difference = torch.where(valid, rewards - (over(rewards) / count.clamp(min=1))[place], 0.0)
    # by max == min: rounding leaves the deviation of equal rewards a little above 0
    end = lambda how, empty: rewards.new_full((len(size),), empty).scatter_reduce(0, place, torch.where(valid, rewards, empty), how)
    alive = valid & (end('amin', float('inf')) < end('amax', -float('inf')))[place]
    advantages = difference * (count / (count - 1).clamp(min=1))[place] if baseline == 'leave_one_out' else difference
    if scale == 'group':
        advantages = advantages / ((over(difference.square()) / (count - 1).clamp(min=1)).sqrt() + 1e-4)[place]
    elif scale == 'batch' and valid.sum() > 1:
        advantages = advantages / (rewards[valid].std() + 1e-4)
    return torch.where(alive, advantages, 0.0)


def gae(rewards, values, mask, gamma, lam, bootstrap=None):
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16): rewards, values and mask (B, T) ->
    (advantages (B, T), returns (B, T)), both 0 where the mask is; returns = advantages + values.

    values[:, t] is the critic's opinion before token t is drawn. Masked tokens (padding, what a tool or another agent wrote) are
    stepped over: neither their rewards nor their values are seen. bootstrap (B,): the value behind the last token of a row that was
    cut off; 0 (or None) where it ended by itself.
    """
    mask = mask.bool()
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    following = torch.zeros_like(running) if bootstrap is None else bootstrap.to(running)       # V of the next token that counts
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = torch.where(mask[:, t], running, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values, mask, count=None, total=None, squares=None):
    """values (B, T) with mean 0 and deviation 1 where the mask is, 0 elsewhere. count, total and squares: of all ranks."""
    mask = mask.bool()
    kept = values[mask].double()
    count, total, squares = (kept.numel(), kept.sum(), kept.square().sum()) if count is None else (count, total, squares)
    mean = total / max(count, 1)
    deviation = math.sqrt(max(float(squares / max(count, 1) - mean ** 2), 0.0)) + 1e-8
    return torch.where(mask, ((values - mean) / deviation).to(values.dtype), 0.0)


# ---- losses -----------------------------------------------------------------------------------------------------------------

def policy_loss(logp, old_logp, advantages, mask, ratio='token', surrogate='clip', clip_low=0.2, clip_high=0.2, dual_clip=None,
                mean='token', normaliser=None, weights=None, temperatures=(1.0, 1.05)):
    """The loss to minimise, a tensor (), and stats {name: tensor ()} -- of logp, old_logp and mask (B, T), advantages (B,) or (B, T).

    ratio      'token': rho = exp(logp - old_logp); 'sequence': s = exp of its mean over the sequence, one value for all of its
               tokens, each of which gets the gradient of its own logp (GSPO-token, arXiv 2507.18071, eq. 13: with one advantage
               per sequence it is GSPO)
    surrogate  'clip'       -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (PPO); with dual_clip c at most -c A where A < 0
               'cispo'      -sg(clip(rho)) A logp, sg: no gradient through it (arXiv 2506.13585, eq. 4)
               'gmpo'       -A exp(mean of the log ratios, each clipped to -clip_low .. clip_high) (arXiv 2507.20673, eq. 4)
               'sapo'       -A 4 / tau sigmoid(tau (rho - 1)), tau = temperatures[0] where A > 0, else [1] (arXiv 2511.20347)
               'reinforce'  -A logp
    mean       'token': over all tokens; 'sequence': within each sequence first; 'constant': the sum over a given constant
    normaliser what the sum is divided by, counted over the whole optimizer step, micro-batches and ranks: tokens, sequences that
               have tokens, or the constant (Dr. GRPO: completions times the longest length allowed). None: counted here, the
               constant being B * T. Without a token the loss is a differentiable 0.
    weights    (B, T), of each token's loss: a correction for what the sampler computed otherwise

    stats: ratio_mean, ratio_min, ratio_max; approx_kl, k3 of old to new; clip_ratio/low_mean, /high_mean, /region_mean where there is
    a clip: the share whose gradient it stops. Of tokens, or with ratio='sequence' of sequences. UserError: see check_composition.
    """
    check_composition(ratio, surrogate, mean, dual_clip)
    mask = mask.bool()
    A = torch.where(mask, advantages[:, None] if advantages.dim() == 1 else advantages, 0.0)    # (B, T)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)         # not times the mask: what is masked may be NaN
    length = mask.sum(1, keepdim=True).clamp(min=1)                                             # (B, 1)
    shared = lambda x: x - x.detach() + x.detach().sum(1, keepdim=True) / length                # a sequence's value, a token's gradient
    low = high = None
    if ratio == 'sequence':
        log_ratio = shared(log_ratio)
    rho = log_ratio.exp()
    if surrogate == 'clip':
        clipped = rho.clamp(1 - clip_low, 1 + clip_high)
        loss = -torch.minimum(rho * A, clipped * A)
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
    else:
        loss = -A * torch.where(mask, logp, 0.0)
    total = average(loss if weights is None else loss * weights, mask, mean, normaliser)
    with torch.no_grad():
        share = mask / length / mask.any(1).sum().clamp(min=1) if ratio == 'sequence' else mask / mask.sum().clamp(min=1)
        over = lambda x: (x.float() * share).sum()
        stats = {'ratio_mean': over(rho), 'ratio_min': torch.where(mask, rho, 1.0).min(), 'ratio_max': torch.where(mask, rho, 1.0).max(),
                 'approx_kl': over(kl_estimate(-log_ratio, torch.zeros_like(log_ratio), 'k3'))}
        if low is not None:
            low, high = over(low & mask), over(high & mask)
            stats.update({'clip_ratio/low_mean': low, 'clip_ratio/high_mean': high, 'clip_ratio/region_mean': low + high})
    return total, stats


def average(x, mask, mean, normaliser=None):
    """x (B, T) where the mask is -> (), as `mean` and `normaliser` of policy_loss say."""
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)
    if mean == 'sequence':
        count = mask.any(1).sum() if normaliser is None else normaliser
        return (x / mask.sum(1, keepdim=True).clamp(min=1)).sum() / max(count, 1)
    count = normaliser if normaliser is not None else mask.sum() if mean == 'token' else mask.numel()
    return x.sum() / max(count, 1)


def kl_estimate(logp, ref_logp, kind):
    """Per-token estimate of KL(policy || reference) at tokens drawn from the policy, (B, T), differentiable in logp.

    With d = logp - ref_logp: 'k1' d; 'k2' d^2 / 2; 'k3' exp(-d) + d - 1 (Schulman 2020, joschu.net/blog/kl-approx.html). As a loss
    k2 has the gradient of the reverse KL, k3 that of another divergence, k1 none in expectation: k1 belongs into the reward.
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
    """PPO's clipped value loss (arXiv 1707.06347's code): half the mean of the larger of two squared errors, that of the values and
    that of the values kept within `clip` of the old ones; (loss (), share clipped ()). All (B, T)."""
    mask = mask.bool()
    error = (values - returns).square()
    clipped = torch.zeros_like(mask)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        other = (near - returns).square()
        error, clipped = torch.maximum(error, other), other > error
    count = mask.sum().clamp(min=1)
    return 0.5 * torch.where(mask, error, 0.0).sum() / (count if normaliser is None else max(normaliser, 1)), (clipped & mask).sum() / count


# ---- models -----------------------------------------------------------------------------------------------------------------

@dataclass
class Learner:
    """What a run trains and asks: reference() is a context that gives the reference model, None without a KL term."""
    policy: torch.nn.Module
    tokenizer: object
    optimizers: list
    scaler: LossScale
    reference: object = None
    critic: ValueModel | None = None
    reward_model: object = None
    beta: float = 0.0

    @property
    def shared(self):
        return self.critic is not None and self.critic.backbone is self.policy


def load_language_model(cfg, name, run, path=None, trainable=True):
    """(model, tokenizer): `name` with a fresh adapter where LoRA is on, or what the checkpoint `path` of this run holds of it."""
    frozen = DTYPES[cfg.torch_dtype] if run.device.type == 'cuda' and (cfg.use_lora or not trainable) else torch.float32
    bits = dict(load_in_4bit=cfg.load_in_4bit, load_in_8bit=cfg.load_in_8bit, bnb_4bit_quant_type=cfg.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=cfg.bnb_4bit_use_double_quant, bnb_4bit_compute_dtype=DTYPES[cfg.bnb_4bit_compute_dtype])
    base = name if path and cfg.use_lora and not is_adapter(name) else None
    model, tokenizer = load_model(path or name, run.device, frozen, base=base, trainable_adapter=trainable, **bits)
    if tokenizer is None:
        raise UserError(f'{name} has no tokenizer beside its weights: copy tokenizer.json there')
    if is_adapter(name) and not cfg.use_lora:
        raise UserError(f'{name} is an adapter: to train it further set model.use_lora=true, or merge it into its base first')
    if trainable and cfg.use_lora and not getattr(model, 'adapters', None):
        torch.manual_seed(seed_for(cfg.seed, 'adapter'))
        add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_target_modules or None, cfg.lora_bias)
    if not trainable:
        model.requires_grad_(False)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    return model.set_matmul(run.matmul), tokenizer


def is_adapter(name):
    return os.path.exists(os.path.join(find_model(name), 'adapter_config.json'))


def load_reference(cfg, policy, run):
    """The context of Learner.reference. Adapters switched off are the reference only where training began without one."""
    if not cfg.beta:
        return None
    if cfg.use_lora and not is_adapter(cfg.base_model_name):
        return lambda: adapters_off(policy)
    frozen, _ = load_language_model(cfg, cfg.base_model_name, run, trainable=False)
    return lambda: contextlib.nullcontext(frozen)


def load_critic(cfg, policy, tokenizer, run):
    """PPO's critic, else None."""
    if cfg.algorithm != 'ppo':
        return None
    if cfg.share_critic:
        return ValueModel(policy, own=False)
    backbone, theirs = load_language_model(cfg, cfg.value_model_name, run)
    if theirs.sha256 != tokenizer.sha256:
        raise UserError(f'value_model_name={cfg.value_model_name} has another tokenizer than {cfg.base_model_name}: it could not read its tokens')
    return ValueModel(backbone)


def make_optimizers(cfg, policy, critic):
    """[the policy's], or [the policy's, the critic's]."""
    make = lambda model, lr: make_optimizer(cfg.optimizer, model, lr, cfg.weight_decay, (0.9, 0.99))
    return [make(policy, cfg.learning_rate)] + ([make(critic.own, cfg.value_learning_rate)] if critic else [])


# ---- rollouts ---------------------------------------------------------------------------------------------------------------

def sample_group_by_group(cfg, learner, numbered, step, seed, run, temperature, num_samples):
    """[(number, problem)] -> Episodes without rewards, num_samples for each, sampled in parts that memory allows."""
    part = max(1, cfg.per_device_train_batch_size * cfg.steps_per_generation // num_samples)
    episodes = []
    for at in range(0, len(numbered), part):
        numbers, chunk = zip(*numbered[at:at + part])
        with explain_out_of_memory('--per_device_train_batch_size', '--max_completion_length'), run.autocast():
            samples = generate(learner.policy, [problem['prompt_ids'] for problem in chunk], cfg.max_completion_length, temperature,
                               stop_ids=learner.tokenizer.stop_ids, num_samples=num_samples, seed=seed, numbers=numbers)
        rows = zip(samples.tokens.tolist(), samples.lengths.tolist(), samples.logp.tolist(), samples.stopped.tolist())
        for i, (tokens, length, logp, stopped) in enumerate(rows):
            problem = {key: value for key, value in chunk[i // num_samples].items() if key != 'prompt_ids'}
            ids = tokens[:length]
            text = learner.tokenizer.decode(ids[:-1] if stopped else ids)
            episodes.append(Episode(step, numbers[i // num_samples], i % num_samples, problem, chunk[i // num_samples]['prompt_ids'],
                                    ids, logp[:length], stopped, text))
    return episodes


def reward(cfg, learner, scorer, episodes):
    """Fills in the rewards of Episodes."""
    columns = {}
    if 'model' in scorer.names and episodes:
        columns['model'] = ask_reward_model(cfg, learner.reward_model, episodes)
    unused = cfg.remove_unused_columns and cfg.datasets
    records = [{key: e.problem[key] for key in ('question', 'answer') if key in e.problem} if unused else e.problem for e in episodes]
    scores = scorer([e.text for e in episodes], records, [len(e.completion_ids) for e in episodes], columns)
    for episode, score in zip(episodes, scores):
        episode.rewards, episode.reward = score, scorer.total(score)


@torch.no_grad()
def ask_reward_model(cfg, model, episodes):
    if not isinstance(model, ValueModel):
        return model.texts([[*questions.prompt(e.problem), {'role': 'assistant', 'content': e.text}] for e in episodes]).tolist()
    size, scores = cfg.per_device_train_batch_size, []
    for at in range(0, len(episodes), size):
        scores += model.rewards(grouped(episodes[at:at + size])).tolist()
    return scores


def rollout(cfg, learner, problems, scorer, plan, step, cursor, run):
    """(this rank's Episodes, the Table of all ranks' in the order of their groups, the new cursor).

    Who samples a group does not matter: its samples depend on its number. With dynamic sampling, groups whose rewards are all equal
    are replaced until there are enough (DAPO, arXiv 2503.14476, section 3.2), or MAX_REFILLS times.
    """
    episodes, groups, drawn, started = [], [], 0, cursor
    for attempt in range(MAX_REFILLS + 1 if cfg.dynamic_sampling else 1):
        wanted = plan.groups - len(groups)
        numbered = list(zip(range(drawn, drawn + wanted), questions.draw_problems(problems.train, cursor, wanted, cfg.seed)))
        own = sample_group_by_group(cfg, learner, numbered[run.rank::run.world_size], step, seed_for(cfg.seed, 'rollout', step),
                                    run, cfg.temperature, cfg.num_generations)
        reward(cfg, learner, scorer, own)
        table = Table.gather(own, range(drawn, drawn + wanted), cfg.num_generations, scorer.names, run, cfg.mask_truncated)
        cursor, drawn = cursor + wanted, drawn + wanted
        alive = table.alive() if cfg.dynamic_sampling and attempt < MAX_REFILLS else table.groups
        groups += alive
        episodes += [e for e in own if e.group in set(alive)]
        whole = table if attempt == 0 else whole.extend(table)
        if len(groups) == plan.groups:
            break
    whole.drawn = cursor - started
    return episodes, whole.select(groups), cursor


# ---- batches ----------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """A micro-batch of B completions, at most T tokens long. Tensors (B, T) unless said otherwise, 0 where the mask is."""
    episodes: list
    layout: object
    mask: torch.Tensor                      # tokens that count: not padding, not of a completion that is unscored
    sampled: torch.Tensor                   # log-probabilities as sampled
    old: torch.Tensor | None = None         # by the training forward, before the rollout's updates
    reference: torch.Tensor | None = None
    values: torch.Tensor | None = None      # the critic's, before the updates
    behind: torch.Tensor | None = None      # (B,): its opinion behind the last token
    advantages: torch.Tensor | None = None  # (B,), or (B, T) with a critic
    returns: torch.Tensor | None = None


def pack(cfg, learner, episodes, table, plan, run):
    """[this rank's Batches of each optimizer step of the rollout].

    Without a KL term, a critic and an entropy bonus the gradient of a completion with advantage 0 is 0: it is counted, not computed.
    """
    place = {group: i for i, group in enumerate(table.groups)}
    scored = dict(zip(((g, s) for g in table.groups for s in range(cfg.num_generations)), (table['scored'] > 0).tolist()))
    idle = not (cfg.beta or learner.critic or cfg.entropy_coef)
    updates = []
    for update in range(plan.updates):
        own = [e for e in episodes if place[e.group] // plan.groups_per_update == update and scored[e.group, e.sample]
               and not (idle and e.advantage == 0)]
        own.sort(key=lambda e: (place[e.group], e.sample))
        batches = []
        for at in range(0, len(own), cfg.per_device_train_batch_size):
            part = own[at:at + cfg.per_device_train_batch_size]
            layout = lay_out(grouped(part), run.device, keep_last=learner.critic is not None)
            sampled = torch.nn.utils.rnn.pad_sequence([torch.tensor(e.logp) for e in part], batch_first=True).to(run.device)
            batches.append(Batch(part, layout, layout.targets >= 0, sampled))
        updates.append(batches)
    return updates


def look(cfg, learner, batch, entropy=False):
    """One forward pass: (log-probabilities (B, T), entropies (B, T) or None, values (B, T) and (B,) or None)."""
    layout, critic = batch.layout, learner.critic
    hidden = hidden_states(learner.policy, layout)                                                                 # (B, T + 1, C)
    stats = learner.policy.token_stats(hidden[:, :-1], layout.targets, cfg.temperature, extras=entropy)
    values = behind = None
    if learner.shared:
        values, behind = critic.read(hidden[:, :-1]), critic.read(hidden[:, -1])
    elif critic:
        values, behind = critic.values(layout)
    return stats['logp'], stats.get('entropy'), values, behind


@torch.no_grad()
def score(cfg, learner, updates, run):
    """Old log-probabilities, where they will be needed, the reference's, and the critic's values. No gradient, no dropout."""
    learner.policy.eval()
    later = cfg.num_iterations > 1
    for number, batches in enumerate(updates):
        for batch in batches:
            with explain_out_of_memory('--per_device_train_batch_size'), run.autocast():
                if later or number:                         # a rollout's first update compares the policy with itself
                    batch.old, _, batch.values, batch.behind = look(cfg, learner, batch)
                elif learner.critic:
                    batch.values, batch.behind = learner.critic.values(batch.layout)
                if learner.reference:
                    with learner.reference() as model:
                        hidden = model.hidden(batch.layout.idx, batch.layout.positions, logit_positions=batch.layout.source)
                        batch.reference = model.token_stats(hidden, batch.layout.targets, cfg.temperature, extras=False)['logp']


# ---- advantages of a rollout -------------------------------------------------------------------------------------------------

def prepare(cfg, learner, episodes, table, plan, run):
    """(this rank's Batches of each optimizer step of a rollout, packed, scored, with advantages; metrics of the critic)."""
    in_reward = cfg.kl == 'reward' and learner.beta > 0
    if not learner.critic:
        compare_in_groups(cfg, episodes, table, table['reward'])
    updates = pack(cfg, learner, episodes, table, plan, run)
    score(cfg, learner, updates, run)
    if learner.reference:
        measure_kl(cfg, updates, table, run)
    about = {}
    if learner.critic:
        about = ask_critic(updates, cfg.gamma, cfg.lam, learner.beta if in_reward else 0.0, run)
    elif in_reward:
        compare_in_groups(cfg, episodes, table, table['reward'] - learner.beta * table['k1'])
    for batch in [batch for batches in updates for batch in batches if batch.advantages is None]:
        batch.advantages = torch.tensor([e.advantage for e in batch.episodes], device=run.device)
    return updates, about


def compare_in_groups(cfg, episodes, table, rewards):
    """Sets the advantage of each Episode: its reward against those of its group."""
    c, numbers = cfg.composition(), torch.arange(len(table.groups)).repeat_interleave(cfg.num_generations)
    advantages = group_advantages(rewards, numbers, c['scale'], c['baseline'], table['scored'] > 0).view(len(table.groups), -1)
    place = {group: i for i, group in enumerate(table.groups)}
    for e in episodes:
        e.advantage = advantages[place[e.group], e.sample].item()


def measure_kl(cfg, updates, table, run):
    """Fills in the table's k1 and k3: sums over each completion, of the policy that sampled it to the reference."""
    place = {group: i for i, group in enumerate(table.groups)}
    for kind in ('k1', 'k3'):
        sums = torch.zeros(len(table.values), dtype=torch.float64)
        for batch in [batch for batches in updates for batch in batches]:
            policy = batch.sampled if batch.old is None else batch.old
            kl = torch.where(batch.mask, kl_estimate(policy, batch.reference, kind), 0.0).sum(1).double().cpu()
            sums[[place[e.group] * cfg.num_generations + e.sample for e in batch.episodes]] = kl
        table[kind] = all_ranks(sums, run)


def ask_critic(updates, gamma, lam, beta, run):
    """Advantages and returns of every token by gae, with the reward at the last one, beta times k1 off each, and what the critic
    expects behind a completion that was cut off. Advantages are whitened over the whole rollout. Returns metrics."""
    batches = [batch for part in updates for batch in part]
    moments = torch.zeros(6, dtype=torch.float64)       # count; advantage, its square; return, its square; error's square
    for batch in batches:
        last = batch.mask.sum(1, keepdim=True) - 1                                                          # (B, 1)
        policy = batch.sampled if batch.old is None else batch.old
        rewards = -beta * kl_estimate(policy, batch.reference, 'k1') if beta else torch.zeros_like(policy)
        rewards = rewards.scatter_add(1, last, torch.tensor([[e.reward] for e in batch.episodes], device=run.device))
        stopped = torch.tensor([e.stopped for e in batch.episodes], device=run.device)
        batch.advantages, batch.returns = gae(rewards, batch.values, batch.mask, gamma, lam, torch.where(stopped, 0.0, batch.behind))
        A, R, V = (x[batch.mask].double().cpu() for x in (batch.advantages, batch.returns, batch.values))
        moments += torch.stack((torch.ones_like(A).sum(), A.sum(), (A * A).sum(), R.sum(), (R * R).sum(), ((R - V) ** 2).sum()))
    n, a, a2, r, r2, e2 = all_ranks(moments, run).tolist()
    for batch in batches:
        batch.advantages = whiten(batch.advantages, batch.mask, n, a, a2)
        for e, row, mask in zip(batch.episodes, batch.advantages, batch.mask):
            e.advantage = row[mask].mean().item()
    variance = r2 / n - (r / n) ** 2
    return {'explained_variance': 1 - e2 / n / variance if variance > 1e-12 else 0.0, 'returns': r / n}


# ---- updates ----------------------------------------------------------------------------------------------------------------

MEANS = ('ratio_mean', 'approx_kl', 'clip_ratio/low_mean', 'clip_ratio/high_mean', 'clip_ratio/region_mean', 'entropy',
         'sampling/logp_gap_mean', 'clip_ratio/value')                          # over tokens
LARGEST = ('ratio_max', 'ratio_min', 'sampling/logp_gap_max')                   # over everything; ratio_min as its negative


def update(cfg, learner, batches, normaliser, tokens, first, step, run):
    """One optimizer step on this rank's Batches -> (metrics, whether the gradient was sound).

    normaliser: what policy_loss divides by, tokens: how many there are, both over all ranks. In the first update since the rollout
    the old log-probabilities are the new ones: the ratio is exactly 1.
    """
    c = cfg.composition()
    shape = dict(ratio=c['ratio'], surrogate=c['surrogate'], clip_low=c['clip_low'], clip_high=c['clip_high'], dual_clip=cfg.dual_clip,
                 mean=c['mean'], normaliser=normaliser)
    sums, largest = dict.fromkeys(('loss', 'value_loss', 'tokens', *MEANS), 0.0), dict.fromkeys(LARGEST, -math.inf)
    for optimizer in learner.optimizers:
        optimizer.zero_grad()
    learner.policy.train()
    for number, batch in enumerate(batches):
        torch.manual_seed(seed_for(cfg.seed, 'dropout', step, run.rank, number))
        with explain_out_of_memory('--per_device_train_batch_size', '--max_completion_length'), run.autocast():
            logp, entropy, values, _ = look(cfg, learner, batch, entropy=cfg.entropy_coef > 0)
        mask, old = batch.mask, logp.detach() if first else batch.old
        weights = torch.exp(torch.where(mask, old - batch.sampled, 0.0)).clamp(max=cfg.importance_cap) if cfg.importance_cap else None
        loss, stats = policy_loss(logp, old, batch.advantages, mask, weights=weights, **shape)
        if learner.reference and cfg.kl != 'reward':
            loss = loss + learner.beta * average(kl_estimate(logp, batch.reference, cfg.kl), mask, c['mean'], normaliser)
        if cfg.entropy_coef:
            loss = loss - cfg.entropy_coef * average(entropy, mask, c['mean'], normaliser)
            stats['entropy'] = entropy.detach()[mask].mean()
        whole = loss
        if learner.critic:
            of_values, stats['clip_ratio/value'] = value_loss(values, batch.values, batch.returns, mask, cfg.cliprange_value or None, tokens)
            whole = loss + cfg.vf_coef * of_values
            sums['value_loss'] += of_values.detach()
        with explain_out_of_memory('--per_device_train_batch_size', '--max_completion_length'):
            (whole * learner.scaler.value).backward()
        count = mask.sum()
        if first:                                           # later the policy itself has moved
            gap = (old - batch.sampled)[mask].abs()
            stats['sampling/logp_gap_mean'], stats['sampling/logp_gap_max'] = gap.mean(), gap.max()
        sums['loss'], sums['tokens'] = sums['loss'] + loss.detach(), sums['tokens'] + count
        for key in MEANS:
            sums[key] += stats.get(key, 0.0) * count
        stats['ratio_min'] = -stats['ratio_min']
        for key in LARGEST:
            largest[key] = max(largest[key], float(stats.get(key, -math.inf)))
    for optimizer in learner.optimizers:
        for grad in optimizer.grads:
            run.sum(grad)
        learner.scaler.unscale_(optimizer.grads)
    norms = [float(optimizer.clip_grad_norm(cfg.max_grad_norm)) for optimizer in learner.optimizers]
    good = all(map(math.isfinite, norms))
    if good:
        for optimizer in learner.optimizers:
            optimizer.step()
    rescaled = learner.scaler.update(good)                  # a float16 scale that was too high is no fault of the model's
    totals = dict(zip(sums, all_ranks(torch.tensor([float(x) for x in sums.values()], dtype=torch.float64), run).tolist()))
    metrics = {'loss': totals['loss'], 'grad_norm': norms[0]}
    if learner.critic:
        metrics.update({'value_loss': totals['value_loss'], 'value_grad_norm': norms[1]})
    known = [key for key in MEANS if totals['tokens'] and (
        learner.critic if key == 'clip_ratio/value' else cfg.entropy_coef if key == 'entropy' else first if 'gap' in key else
        c['surrogate'] in ('clip', 'cispo', 'gmpo') if 'clip' in key else True)]
    metrics.update({key: totals[key] / totals['tokens'] for key in known})
    for key, value in largest.items():
        value = run.max(int(max(-1e9, min(value, 1e9)) * 1e6))
        if value > -1e15:
            metrics[key] = (-value if key == 'ratio_min' else value) / 1e6
    return metrics, good or rescaled


# ---- evaluation and what is written -----------------------------------------------------------------------------------------

def evaluate(cfg, learner, problems, scorer, run):
    """{eval_accuracy (of exact or task), eval_reward} of the likeliest answers to held-out problems, and the same `_sampled` at the
    training temperature; samples depend on neither step nor ranks."""
    metrics = {}
    for name, temperature in (('', 0.0), ('_sampled', cfg.temperature)):
        numbered = list(enumerate(problems.held_out))[run.rank::run.world_size]
        episodes = sample_group_by_group(cfg, learner, numbered, 0, seed_for(cfg.seed, 'evaluation'), run, temperature, 1)
        reward(cfg, learner, scorer, episodes)
        right = next((kind for kind in ('task', 'exact') if kind in scorer.names), None)
        scored = [e for e in episodes if e.reward is not None]
        sums = torch.tensor([len(scored), sum(e.reward for e in scored), sum(e.rewards[right] for e in scored) if right else 0.0],
                            dtype=torch.float64)
        count, total, correct = all_ranks(sums, run).tolist()
        if count:
            metrics[f'eval_reward{name}'] = total / count
            if right:
                metrics[f'eval_accuracy{name}'] = correct / count
    return metrics


def describe_rollout(cfg, learner, table, scorer):
    """The metrics of a rollout, over all ranks."""
    scored, lengths = table['scored'] > 0, table['length']
    if not scored.any():
        raise UserError(f'no completion of this rollout has a score; the last trouble: {scorer.last_error or "every one was cut off (mask_truncated)"}')
    rewards, groups = table['reward'][scored], table.by_group('reward')
    metrics = {'reward': rewards.mean(), 'reward_std': rewards.std() if len(rewards) > 1 else torch.zeros(())}
    for name in scorer.names if len(scorer.names) > 1 else ():
        found = table[f'rewards/{name}']
        metrics[f'rewards/{os.path.basename(name)}/mean'] = found.nanmean()
    right = next((name for name in ('task', 'exact') if name in scorer.names), None)
    if right:
        metrics['success_rate'] = table[f'rewards/{right}'].nanmean()
    if cfg.num_generations > 1:
        metrics['frac_reward_zero_std'] = 1 - len(table.alive()) / len(table.groups)
    metrics.update({'completions/mean_length': lengths.mean(), 'completions/clipped_ratio': 1 - table['stopped'].mean(),
                    'entropy': -table['logp'].sum() / lengths.sum()})
    if learner.reference:
        metrics['kl'] = table['k3'].sum() / lengths.sum()
        metrics['beta'] = learner.beta
    if unscored := int((~scored).sum()):
        metrics['unscored'] = unscored
    if table.drawn > len(table.groups):
        metrics['groups_drawn'] = table.drawn
    return {key: float(value) for key, value in metrics.items()}


# ---- the run ----------------------------------------------------------------------------------------------------------------

def resolve(cfg, run):
    """cfg with every setting that was left to be chosen; each choice is said."""
    ppo, c = cfg.algorithm == 'ppo', cfg.composition()
    embedded = not cfg.datasets
    default = {'num_generations': 4 if ppo else 8, 'steps_per_generation': (2 if embedded and c['surrogate'] != 'reinforce' else 1)
               * cfg.gradient_accumulation_steps if 'gradient_accumulation_steps' not in cfg.typed else cfg.gradient_accumulation_steps,
               'max_completion_length': 48 if embedded else cfg.max_length - cfg.max_prompt_length,
               'beta': 0.05 if ppo else 0.0, 'kl': 'reward' if cfg.algorithm in ('ppo', 'rloo', 'reinforce++') else 'k3',
               'dynamic_sampling': cfg.algorithm == 'dapo'}
    if not cfg.rewards:
        default['rewards'] = ['model'] if questions.uses_pairs(cfg) or cfg.reward_model_path else ['task'] if embedded else ['exact', 'number', 'tags']
        if cfg.algorithm == 'dapo':
            default['rewards'] = [*default['rewards'], 'length']
    cfg, said = choose(cfg, default)
    if embedded and cfg.max_steps < 0 and cfg.num_train_epochs == Config().num_train_epochs and not cfg.typed & {'max_steps', 'num_train_epochs'}:
        cfg.max_steps = 60
        said.append('max_steps=60')
    lengths = {'length_buffer': max(1, cfg.max_completion_length // 4)}
    cfg, more = choose(cfg, lengths)
    if 'model' in cfg.rewards and not cfg.reward_model_path and not questions.uses_pairs(cfg):
        raise UserError('rewards: model needs a reward model: give reward_model_path, or data with chosen_column and rejected_column to train '
                        'one from')
    if cfg.length_buffer > cfg.max_completion_length:
        raise UserError(f'length_buffer={cfg.length_buffer} is longer than max_completion_length={cfg.max_completion_length}')
    say_chosen(said + (more if 'length' in cfg.rewards else []), run)
    for name, why in (('dataloader_num_workers', 'prompts are tokenised once, at the start'), ('dataset_num_proc', 'the tokenizer uses all cores by itself'),
                      ('dataloader_pin_memory', 'batches are made of sampled tokens'), ('low_cpu_mem_usage', 'weights are always mapped from disk'),
                      ('prediction_loss_only', 'an evaluation always samples and scores')):
        if getattr(cfg, name) != getattr(Config(), name):
            run.print0(f'note      {name}={getattr(cfg, name)} changes nothing here: {why}')
    if run.device.type == 'cuda' and cfg.use_flash_attention:
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return cfg


def choose(cfg, values):
    """(cfg with `values` where it has None or an empty list, what was chosen in words)."""
    chosen = {name: value for name, value in values.items() if getattr(cfg, name) in (None, [])}
    changed = replace(cfg, **chosen)
    changed.typed = cfg.typed
    return changed, [f'{name}={" ".join(value) if isinstance(value, list) else value}' for name, value in chosen.items()]


def say_chosen(choices, run):
    if choices:
        run.print0('chosen    ' + ', '.join(choices))


def fit_to_model(cfg, policy, run):
    """cfg with learning rates by the model's size and mode, and lengths within its context."""
    small = sum(p.numel() for p in policy.parameters()) < SMALL and not cfg.use_lora
    by_mode = 2e-4 if cfg.load_in_4bit or cfg.load_in_8bit else 1e-4 if cfg.use_lora else 2e-4 if small else 1e-5
    cfg, said = choose(cfg, {'learning_rate': by_mode})
    cfg, more = choose(cfg, {'value_learning_rate': 1e-3 if small else cfg.learning_rate, 'reward_learning_rate': 1e-3 if small else cfg.learning_rate})
    say_chosen(said + (more if cfg.algorithm == 'ppo' else []), run)
    context, room = policy.config.block_size, policy.config.block_size - cfg.max_completion_length
    if 'max_completion_length' in cfg.typed and room < 1:
        raise UserError(f'max_completion_length={cfg.max_completion_length} does not fit the context of {context} tokens that {cfg.base_model_name} has')
    longest = min(cfg.max_completion_length, context // 2) if room < min(cfg.max_prompt_length, context // 2) else cfg.max_completion_length
    prompts = min(cfg.max_prompt_length, context - longest)
    if (longest, prompts) != (cfg.max_completion_length, cfg.max_prompt_length):
        run.print0(f'lengths   clamped to the context of {context} tokens: prompts {prompts}, completions {longest}')
    changed = replace(cfg, max_completion_length=longest, max_prompt_length=prompts, length_buffer=min(cfg.length_buffer, longest))
    changed.typed = cfg.typed
    return changed


@dataclass
class Plan:
    """How many groups an optimizer step and a rollout have, over all ranks."""
    groups_per_update: int
    updates: int            # optimizer steps of one pass over a rollout
    total_steps: int
    warmup: int = 0         # of them

    @property
    def groups(self):
        return self.groups_per_update * self.updates


def make_plan(cfg, num_problems, run):
    """Counts are completions; what makes no whole groups is rounded up, and said."""
    wanted = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * run.world_size
    sampled = cfg.per_device_train_batch_size * cfg.steps_per_generation * run.world_size
    groups = -(-wanted // cfg.num_generations)
    updates = max(1, -(-sampled // (groups * cfg.num_generations)))
    if groups * cfg.num_generations != wanted or sampled > wanted and updates * wanted != sampled:
        run.print0(f'batch     {wanted} completions a step and {sampled} a rollout make no whole groups of {cfg.num_generations}: rounded up to '
                    f'{groups * cfg.num_generations} and {groups * updates * cfg.num_generations}')
    if groups * updates > num_problems:
        run.print0(f'note      a rollout asks {groups * updates} problems, the training set has {num_problems}: some come twice')
    per_epoch = num_problems / (groups * updates)
    per_epoch = max(1, math.floor(per_epoch) if cfg.dataloader_drop_last else math.ceil(per_epoch))
    steps = max(1, round(per_epoch * cfg.num_train_epochs)) * updates * cfg.num_iterations
    steps = cfg.max_steps if cfg.max_steps > 0 else steps
    return Plan(groups, updates, steps, warmup_within(cfg.warmup_steps, steps, run.print0))


def train_own_reward_model(cfg, problems, tokenizer, run, resumed):
    """A reward model trained from the pairs and saved in output_dir/reward_model, or the one that is there of a run that goes on."""
    directory = os.path.join(cfg.output_dir, 'reward_model')
    if resumed:
        return load_reward_model(directory, run.device, tokenizer)
    backbone, theirs = load_language_model(cfg, cfg.value_model_name or cfg.base_model_name, run)
    if theirs.sha256 != tokenizer.sha256:
        raise UserError(f'value_model_name={cfg.value_model_name} has another tokenizer than {cfg.base_model_name}: it could not read its tokens')
    model = ValueModel(backbone)
    result = train_reward_model(model, problems.pairs, problems.held_out_pairs, run, cfg.reward_epochs, cfg.reward_batch_size,
                                cfg.reward_learning_rate, cfg.seed)
    run.print0(f'reward model: prefers the chosen side in {result["accuracy"]:.1%} of {len(problems.held_out_pairs)} held-out pairs; {directory}')
    run.on_main(lambda: save_reward_model(model, tokenizer, directory))
    return model.requires_grad_(False).eval()


def announce(cfg, learner, problems, plan, run):
    c = cfg.composition()
    source = ', '.join(s.name for s in cfg.datasets) if cfg.datasets else f'embedded task {cfg.task}'
    policy = learner.policy
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    run.print0(f'data      {source}: {len(problems.train):,} problems, {len(problems.held_out):,} held out; rewards {" + ".join(cfg.rewards)}')
    run.print0(f'model     {cfg.base_model_name}: {policy.num_params():,} parameters, {trained:,} trained' + (
        f'; critic {"on its trunk" if learner.shared else cfg.value_model_name}' if learner.critic else ''))
    kl = f'beta {learner.beta:g} ({"k1 in the reward" if cfg.kl == "reward" else cfg.kl + " in the loss"})' if cfg.beta else 'no reference'
    advantage = 'gae' if learner.critic else f'{c["baseline"]} over {c["scale"]}'
    run.print0(f'algorithm {cfg.algorithm}: {c["ratio"]} ratio, {c["surrogate"]} {c["clip_low"]:g}/{c["clip_high"]:g}, {c["mean"]} mean, '
                f'advantages by {advantage}, {kl}')
    run.print0(f'machine   {describe_device(run)}')
    run.print0(f'run       {plan.total_steps:,} optimizer steps of {plan.groups_per_update} groups of {cfg.num_generations}; a rollout feeds '
                f'{plan.updates * cfg.num_iterations}, up to {cfg.max_completion_length} tokens a completion')


def save_checkpoint(checkpoints, learner, state, best):
    """Policy, critic, optimizers and counters."""
    tensors = learner.optimizers[0].state_dict()
    if learner.critic:
        tensors.update({f'critic/{name}': p.detach() for name, p in learner.critic.own.named_parameters() if p.requires_grad})
        tensors.update({f'critic_optimizer/{name}': t for name, t in learner.optimizers[1].state_dict().items()})
    checkpoints.save(state['step'], lambda directory: save_model(learner.policy, learner.tokenizer, directory), tensors,
                     {**state, 'beta': learner.beta, 'loss_scale': learner.scaler.state}, best)


def fresh_state():
    return {'step': 0, 'rollouts': 0, 'cursor': 0, 'num_tokens': 0, 'bad_steps': 0, 'best': None}


def restore(learner, tensors, state, run):
    """Critic, optimizers and KL weight of a checkpoint, into a learner whose policy was loaded from there; returns the counters."""
    parts = {'critic': {}, 'critic_optimizer': {}, '': {}}
    for key, tensor in tensors.items():
        prefix, _, name = key.partition('/')
        parts[prefix if prefix in parts else ''][name if prefix in parts else key] = tensor
    if learner.critic:
        own = dict(learner.critic.own.named_parameters())
        with torch.no_grad():
            for name, tensor in parts['critic'].items():
                own[name].copy_(tensor)             # in place: the optimizer's flat buffers hold the parameters
        learner.optimizers[1].load_state_dict(parts['critic_optimizer'])
    learner.optimizers[0].load_state_dict(parts[''])
    learner.beta, learner.scaler = state['beta'], LossScale(run.dtype, state['loss_scale'])
    return {key: state[key] for key in fresh_state()}


def adapt_beta(cfg, beta, table):
    """beta for the next rollout, so that the KL of a completion comes near kl_target (Ziegler et al. 2019, section 2.2)."""
    error = max(-0.2, min(0.2, float(table['k1'].mean()) / cfg.kl_target - 1))
    return beta * (1 + error * len(table.values) / cfg.kl_horizon)


def build(cfg, run, resumed=None):
    """(cfg with every choice made, learner, problems, scorer, plan)."""
    cfg = resolve(cfg, run)
    scorer = Scorer([name for name in cfg.rewards], cfg.reward_weights, None if cfg.datasets else questions.load_task(cfg.task),
                    cfg.max_completion_length, cfg.length_buffer, cfg.reward_timeout)
    policy, tokenizer = load_language_model(cfg, cfg.base_model_name, run, resumed)
    cfg = fit_to_model(cfg, policy, run)
    scorer.longest, scorer.buffer = cfg.max_completion_length, cfg.length_buffer
    problems = questions.open_problems(cfg, tokenizer, run.print0)
    critic = load_critic(cfg, policy, tokenizer, run)
    learner = Learner(policy, tokenizer, make_optimizers(cfg, policy, critic), LossScale(run.dtype), load_reference(cfg, policy, run),
                      critic, beta=cfg.beta)
    if cfg.reward_model_path:
        learner.reward_model = load_reward_model(cfg.reward_model_path, run.device, tokenizer)
        if problems.held_out_pairs and isinstance(learner.reward_model, ValueModel):
            accuracy = pair_accuracy(learner.reward_model, problems.held_out_pairs, run)
            run.print0(f'reward model: prefers the chosen side in {accuracy:.1%} of {len(problems.held_out_pairs)} held-out pairs')
    return cfg, learner, problems, scorer, make_plan(cfg, len(problems.train), run)


def main(cfg):
    saved, replayed = None, cfg.replay is not None
    if cfg.resume or replayed:
        cfg, saved = resume_config(cfg, cfg.output_dir, 'train_rl.py', '--replay' if replayed else '--resume', from_start=replayed)
    run = setup(cfg.device, precision(cfg), cfg.matmul)
    stop = Stop(run)
    checkpoints = Checkpoints(cfg.output_dir, run, cfg.save_total_limit, cfg.save_only_model)
    if replayed:
        return replay(cfg, checkpoints, run)
    resumed = checkpoints.latest() if saved else None
    if saved and not resumed and cfg.resume != 'auto':
        raise UserError(f'{cfg.output_dir} holds no whole checkpoint to resume from; start anew without --resume')
    cfg, learner, problems, scorer, plan = build(cfg, run, resumed)
    state, rollouts_path = fresh_state(), os.path.join(cfg.output_dir, 'rollouts.jsonl')
    if resumed:
        state = restore(learner, *read_checkpoint(resumed), run)
        checkpoints.say_processes(resumed)
        checkpoints.discard_later(resumed)
        run.on_main(lambda: (write_json(os.path.join(cfg.output_dir, 'run_config.json'), {**saved, 'config': as_dict(cfg)}),
                                 cut_rollouts(rollouts_path, state['step'])))
    else:
        start_fresh(run, cfg.output_dir, as_dict(cfg), script='train_rl.py')
    if 'model' in cfg.rewards and not cfg.reward_model_path:
        learner.reward_model = train_own_reward_model(cfg, problems, learner.tokenizer, run, resumed)
    announce(cfg, learner, problems, plan, run)
    header = {'script': 'train_rl.py', 'algorithm': cfg.algorithm, 'model': cfg.base_model_name, 'machine': describe_device(run)}
    wandb = {name: getattr(cfg, f'wandb_{name}') for name in ('project', 'entity', 'name', 'tags') if getattr(cfg, f'wandb_{name}')}
    log = Log(run, cfg.output_dir, header, plan.total_steps, cfg.tensorboard, wandb if cfg.wandb_enabled else None,
              state['step'] if resumed else None)
    metrics = learn(cfg, learner, problems, scorer, plan, state, checkpoints, log, stop, rollouts_path, run)
    log.close()
    scorer.close()
    run.print0(f'the model is in {cfg.output_dir}/: python sample.py {cfg.output_dir} --chat; samples: {cfg.output_dir}/rollouts.html')
    run.close()
    return metrics


def learn(cfg, learner, problems, scorer, plan, state, checkpoints, log, stop, rollouts_path, run):
    """The loop: rollouts, each with its updates. `state` counts what is done; all that is drawn depends on it and the seed alone."""
    lines, metrics, clock, before = [], {}, Clock(), state['step']
    while True:
        step, ended = state['step'], state['step'] >= plan.total_steps
        due = lambda every: every > 0 and step // every > before // every
        best = False
        if due(cfg.eval_steps) or ended or step == 0 and cfg.eval_steps:
            with clock('evaluating'):
                metrics = evaluate(cfg, learner, problems, scorer, run)
            log.write(step, metrics)
            show(cfg, log, rollouts_path, run)
            mark = metrics.get('eval_accuracy', metrics.get('eval_reward', 0.0))
            best = step > 0 and (state['best'] is None or mark > state['best'])
            state['best'] = mark if best else state['best']
        if due(cfg.save_steps) or ended or best or stop.requested:
            save_checkpoint(checkpoints, learner, state, best)
        if ended:
            return {**metrics, 'step': step, 'best': state['best']}
        if stop.requested:
            run.print0(f'stopped at step {step}, saved; go on with: {resume_command()}')
            raise SystemExit(stop.code)

        before = step
        with clock('generating'):
            episodes, table, state['cursor'] = rollout(cfg, learner, problems, scorer, plan, step, state['cursor'], run)
        with clock('scoring'):
            updates, about = prepare(cfg, learner, episodes, table, plan, run)
        about = {**describe_rollout(cfg, learner, table, scorer), **about}
        if cfg.rollout_steps and state['rollouts'] % cfg.rollout_steps == 0:
            write_rollout(episodes, rollouts_path, run)
        state.update(rollouts=state['rollouts'] + 1, num_tokens=state['num_tokens'] + int(table['length'].sum()))
        for result in learn_from(cfg, learner, updates, table, plan, state, clock, run):
            lines.append({**about, **result})
            if state['step'] % cfg.logging_steps == 0 or state['step'] == plan.total_steps:
                log.write(state['step'], {**mean_of(lines), 'num_tokens': state['num_tokens'], **clock.rates(state['num_tokens'])})
                lines = []
            log.progress(state['step'])


def learn_from(cfg, learner, updates, table, plan, state, clock, run):
    """The optimizer steps of a rollout, one after the other: yields the metrics of each and counts it in `state`."""
    begin = state['step']
    for number in [number for _ in range(cfg.num_iterations) for number in range(plan.updates)][:plan.total_steps - begin]:
        factor = learning_rate(state['step'], cfg.lr_scheduler, 1.0, 0.1, plan.warmup, plan.total_steps)
        for optimizer, peak in zip(learner.optimizers, (cfg.learning_rate, cfg.value_learning_rate)):
            optimizer.set_lr(peak * factor)
        with clock('updating'):
            metrics, good = update(cfg, learner, updates[number], *count(cfg, table, number, plan), state['step'] == begin, state['step'],
                                   run)
        state.update(step=state['step'] + 1, bad_steps=0 if good else state['bad_steps'] + 1)
        if not good:
            run.print0(f'step {state["step"]}: the gradient is not finite, the step is skipped ({state["bad_steps"]} in a row)')
            if state['bad_steps'] == MAX_BAD_STEPS:
                raise UserError(f'{MAX_BAD_STEPS} steps in a row without a finite gradient: lower --learning_rate={cfg.learning_rate:g}; '
                                f'the checkpoints in {cfg.output_dir} are good')
        yield {**metrics, 'learning_rate': cfg.learning_rate * factor}
    if cfg.kl_target and learner.reference:
        learner.beta = adapt_beta(cfg, learner.beta, table)


def count(cfg, table, number, plan):
    """(what policy_loss divides by, tokens) of optimizer step `number` of a rollout, over all ranks."""
    size = plan.groups_per_update * cfg.num_generations
    rows = slice(number * size, (number + 1) * size)
    scored = table['scored'][rows]
    tokens, sequences = int((table['length'][rows] * scored).sum()), int(scored.sum())
    return {'token': tokens, 'sequence': sequences, 'constant': sequences * cfg.max_completion_length}[cfg.composition()['mean']], tokens


class Clock:
    """with clock('generating'): ... adds up seconds; rates() is tokens per second since it was last asked, in all and by part."""

    def __init__(self):
        self.seconds, self.tokens, self.began = {}, None, time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, part):
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def rates(self, tokens):
        evaluating, now, new = self.seconds.pop('evaluating', 0.0), time.perf_counter(), tokens - (self.tokens or 0)
        if not new:                                         # a later update of a rollout that was counted already
            return {}
        rates = {'tokens_per_second': new / (now - self.began - evaluating),
                 **{f'tokens_per_second/{part}': new / seconds for part, seconds in self.seconds.items()}}
        self.seconds, self.tokens, self.began = {}, tokens, now
        return {key: round(value) for key, value in rates.items()}


def mean_of(lines):
    """One dict of many: the means, of the extremes the extremes, of counts the sum, of a setting the last."""
    how = {'ratio_max': max, 'sampling/logp_gap_max': max, 'ratio_min': min, 'unscored': sum, 'groups_drawn': sum,
           'learning_rate': lambda x: x[-1], 'beta': lambda x: x[-1]}
    columns = {key: [line[key] for line in lines if key in line] for line in lines for key in line}
    return {key: how.get(key, lambda x: sum(x) / len(x))(values) for key, values in columns.items()}


def show(cfg, log, rollouts_path, run):
    """The picture and the page so far."""
    if run.is_main:
        name = os.path.basename(os.path.abspath(cfg.output_dir))
        pages.reward_picture(log.path, os.path.join(cfg.output_dir, 'reward.png'), name)
        if os.path.exists(rollouts_path):
            pages.rollouts_page(rollouts_path, os.path.join(cfg.output_dir, 'rollouts.html'), name)


# ---- replay -----------------------------------------------------------------------------------------------------------------

def replay(cfg, checkpoints, run):
    """Samples the rollout of step cfg.replay again, from the nearest checkpoint before it (or the start) and the seeds, compares it with
    rollouts.jsonl and says of each group what there was to learn from it. Writes nothing."""
    path = os.path.join(cfg.output_dir, 'rollouts.jsonl')
    if not os.path.exists(path):
        raise UserError(f'--replay: there is no {path} to compare with (rollout_steps=0?)')
    written = read_episodes(path)
    steps = sorted({e.step for e in written})
    if cfg.replay not in steps:
        near = min(steps, key=lambda step: abs(step - cfg.replay))
        raise UserError(f'--replay={cfg.replay}: no rollout was written at that step; the nearest one is {near}')
    usable = [path for path, manifest in checkpoints.own() if manifest['step'] <= cfg.replay and (path / 'optimizer.safetensors').exists()]
    resumed = str(usable[-1]) if usable else None
    cfg, learner, problems, scorer, plan = build(cfg, run, resumed)
    state = fresh_state()
    if resumed:
        state = restore(learner, *read_checkpoint(resumed), run)
    if 'model' in cfg.rewards and not cfg.reward_model_path:
        learner.reward_model = train_own_reward_model(cfg, problems, learner.tokenizer, run, resumed=True)
    run.print0(f'replay    from {resumed or "the start"}, step {state["step"]}, to step {cfg.replay}')
    while True:
        episodes, table, state['cursor'] = rollout(cfg, learner, problems, scorer, plan, state['step'], state['cursor'], run)
        updates, _ = prepare(cfg, learner, episodes, table, plan, run)
        if state['step'] >= cfg.replay:
            break
        for _ in learn_from(cfg, learner, updates, table, plan, state, Clock(), run):
            pass
    wanted = {(e.group, e.sample): e for e in written if e.step == cfg.replay}
    same = sum(e.completion_ids == wanted[e.group, e.sample].completion_ids for e in episodes if (e.group, e.sample) in wanted)
    for group in table.groups:
        members = sorted((e for e in episodes if e.group == group), key=lambda e: e.sample)
        if members:
            print(pages.explain_group(members))
    print(f'{same} of {len(episodes)} completions are those of {path}, token by token')
    scorer.close()
    return {'same': same, 'completions': len(episodes)}


if __name__ == '__main__':
    run_script(main, cfg)
