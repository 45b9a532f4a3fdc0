"""Preference optimisation: pairs of a chosen and a rejected answer to one prompt; DPO and its relatives.

    python train_dpo.py
    python train_dpo.py --recipe recipes/training/dpo/llama3_3B_lora.yaml --num-gpus 8
    python train_dpo.py data.datasets[0].name=pairs.jsonl --loss_type=simpo --beta=2 --gamma=1
    python train_dpo.py --resume

The loss of a pair is a function of four numbers, the log-probability of either answer under the policy and under the reference
(dpo_loss); a step takes its mean over all pairs of the step, counted over micro-batches and ranks. The two answers stand behind one
copy of their prompt, and only their tokens reach the head. Dropout is off, so that policy and reference differ in nothing but weights.
"""
import concurrent.futures
import contextlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, as_dict, parse, run_script, setting
from data.formats import Source, best_fit
from nanoforge.optim import SCHEDULES, learning_rate, make_optimizer, warmup_within

LOSS_TYPES = ('sigmoid', 'robust', 'hinge', 'ipo', 'sigmoid_norm', 'simpo', 'orpo', 'apo_zero')
PER_TOKEN = ('ipo', 'sigmoid_norm', 'simpo', 'orpo')    # these take the mean log-probability of an answer's tokens, the others the sum
REFERENCE_FREE = ('simpo', 'orpo')
SMOOTHED = ('sigmoid', 'robust', 'sigmoid_norm', 'simpo')
RATES = {'full': 1e-5, 'LoRA': 1e-4, 'QLoRA': 2e-4}
SMALL = 10_000_000      # parameters below which a model learns at thirty times these rates, and needs to
MAX_BAD_STEPS = 5       # steps in a row without a finite gradient after which a run stops


@dataclass
class Config:
    # model
    base_model_name: str = setting('tiny', 'model.base_model_name', also=('model', 'model_name'))  # directory, hub name, a PEFT adapter, or `tiny`, the embedded model
    torch_dtype: str = setting('bfloat16', 'model.torch_dtype', choices=('float32', 'bfloat16', 'float16'))  # of frozen weights on a GPU (LoRA's base, the reference); what trains is float32
    low_cpu_mem_usage: bool = setting(True, 'model.low_cpu_mem_usage')  # weights are mapped from disk, never held twice; false is said to change nothing
    load_in_8bit: bool = setting(False, 'model.load_in_8bit')  # quantise the frozen weights to 8 bits (needs use_lora)
    load_in_4bit: bool = setting(False, 'model.load_in_4bit')  # to 4 bits: QLoRA (needs use_lora)
    bnb_4bit_compute_dtype: str | None = setting(None, 'model.bnb_4bit_compute_dtype', choices=('float32', 'bfloat16', 'float16'))  # of products with 4-bit weights; as all others if not set
    bnb_4bit_quant_type: str = setting('nf4', 'model.bnb_4bit_quant_type', choices=('nf4', 'fp4'))  # the sixteen values of a 4-bit weight
    bnb_4bit_use_double_quant: bool = setting(True, 'model.bnb_4bit_use_double_quant')  # quantise the scales of 4-bit weights too
    use_flash_attention: bool = setting(False, 'model.use_flash_attention')  # attention always runs in fused kernels; true is said to change nothing
    use_lora: bool = setting(False, 'model.use_lora')  # train a low-rank adapter instead of all weights
    lora_r: int = setting(8, 'model.lora_r')  # its rank
    lora_alpha: float = setting(16, 'model.lora_alpha')  # its change counts alpha / r times
    lora_dropout: float = setting(0.05, 'model.lora_dropout')  # on its input, if disable_dropout is false
    lora_target_modules: list[str] = setting([], 'model.lora_target_modules')  # layers with an adapter, names as in PEFT (q_proj); empty = every linear one but the head
    lora_bias: str = setting('none', 'model.lora_bias', choices=('none', 'all', 'lora_only'))  # which biases train too
    # data
    datasets: list[Source] = setting([Source(name='facts')], 'data.datasets')  # one or more; `facts` is the embedded preference set
    max_length: int | None = setting(None, 'data.max_length')  # tokens of prompt and answer; the model's context if not set
    max_prompt_length: int | None = setting(None, 'data.max_prompt_length')  # a longer prompt loses its beginning; if not set it is never cut
    system_prompt: str | None = setting(None, 'data.system_prompt')  # template over the columns of a row: the system message of every prompt
    apply_chat_template: bool = setting(True, 'data.apply_chat_template')  # false: texts as they are, for models that do not chat
    remove_unused_columns: bool = setting(True, 'data.remove_unused_columns')  # of a row only the columns that are named are kept; false is said to change nothing
    dataset_num_proc: int = setting(1, 'data.dataset_num_proc')  # processes that render and tokenise
    eval_fraction: float = setting(0.05, 'data.eval_fraction')  # held out, by the hash of the prompt, where no row's metadata says "eval"
    max_eval_pairs: int = setting(512, 'data.max_eval_pairs')  # so many of the held-out pairs are looked at
    # training
    algorithm: str = setting('dpo', 'training.algorithm', choices=('dpo',))  # what the recipe is for
    output_dir: str = setting('models/dpo', 'training.output_dir')  # checkpoints, log and pictures; the model to use ends up in its root
    loss_type: str = setting('sigmoid', 'training.loss_type', choices=LOSS_TYPES)  # see dpo_loss
    beta: float = setting(0.1, 'training.beta')  # how much a log-ratio counts: the larger, the nearer the policy stays to the reference
    label_smoothing: float = setting(0.0, 'training.label_smoothing')  # share of pairs that are labelled the wrong way round (cDPO, robust DPO)
    gamma: float = setting(0.0, 'training.gamma')  # margin by which SimPO wants the chosen answer to win
    rpo_alpha: float | None = setting(None, 'training.rpo_alpha')  # weight of an SFT term, minus the mean log-probability of the chosen answer's tokens; if not set 1 for small models, which would forget how to speak, else 0
    reference: str = setting('auto', 'training.reference', choices=('auto', 'adapters_off', 'copy', 'cache'))  # auto: adapters off under LoRA, else a frozen copy; cache: log-probabilities computed once, kept on disk
    reference_cache: str = setting('models/reference_logps', 'training.reference_cache')  # folder of these, shared by runs
    disable_dropout: bool = setting(True, 'training.disable_dropout')  # false: the adapter's dropout acts on the policy
    per_device_train_batch_size: int = setting(16, 'training.per_device_train_batch_size', also=('batch_size',))  # pairs in a micro-batch of one process
    gradient_accumulation_steps: int = setting(1, 'training.gradient_accumulation_steps')  # micro-batches of one process in a step
    learning_rate: float | None = setting(None, 'training.learning_rate')  # the highest; by mode if not set: full 1e-5, LoRA 1e-4, QLoRA 2e-4, thirty times that below 10M parameters
    num_train_epochs: float = setting(2, 'training.num_train_epochs')  # passes over the pairs
    max_steps: int = setting(-1, 'training.max_steps')  # optimizer steps, whatever the epochs say; -1 = by epochs
    warmup_steps: int = setting(10, 'training.warmup_steps')  # steps of linear warm-up
    lr_scheduler: str = setting('linear', 'training.lr_scheduler', also=('lr_scheduler_type', 'training.lr_scheduler_type'), choices=[s for s in SCHEDULES if s not in ('plateau', 'none', 'exponential')])  # down to 0 at the last step
    optimizer: str = setting('adamw', 'training.optimizer', choices=('adamw', 'sgd', 'muon'))  # muon: for the matrices inside the blocks
    weight_decay: float = setting(0.0, 'training.weight_decay')  # of matrices
    max_grad_norm: float = setting(1.0, 'training.max_grad_norm')  # highest gradient norm; 0 = no clipping
    seed: int = setting(42, 'training.seed')  # of data order, adapter and samples
    logging_steps: int = setting(10, 'training.logging_steps')  # steps between log lines
    save_steps: int = setting(500, 'training.save_steps')  # steps between checkpoints
    eval_steps: int = setting(50, 'training.eval_steps')  # steps between evaluations on the held-out pairs, each followed by a checkpoint
    save_total_limit: int | None = setting(2, 'training.save_total_limit')  # so many of the newest checkpoints stay, and the best; null = all
    save_only_model: bool = setting(False, 'training.save_only_model')  # all checkpoints but the newest without optimizer state
    prediction_loss_only: bool = setting(False, 'training.prediction_loss_only')  # evaluate losses and rewards only, without sampling answers
    eval_samples: int = setting(64, 'training.eval_samples')  # held-out prompts that are answered at each evaluation
    max_new_tokens: int = setting(64, 'training.max_new_tokens')  # of such an answer
    bf16: bool | None = setting(None, 'training.bf16')  # autocast on a GPU in bfloat16; false = float32; not set, nor fp16 = what the card does best
    fp16: bool = setting(False, 'training.fp16')  # in float16, with loss scaling
    gradient_checkpointing: bool = setting(False, 'training.gradient_checkpointing')  # compute activations again in backward: less memory, a third more time
    deepspeed_config: str | None = setting(None, 'training.deepspeed_config')  # there is no DeepSpeed here: an error that names what to use
    dataloader_num_workers: int = setting(0, 'training.dataloader_num_workers')  # steps whose batches a thread makes ahead
    dataloader_pin_memory: bool = setting(False, 'training.dataloader_pin_memory')  # copy batches to the GPU from page-locked memory, while it computes
    dataloader_drop_last: bool = setting(True, 'training.dataloader_drop_last')  # leave out an epoch's last batch where it is not full
    resume: bool | str = setting(False, 'training.resume', choices=('auto',))  # go on with the run in output_dir; auto: if there is one
    check_data: bool = setting(False, also=('check', 'dry_run'))  # read and show the data, train nothing
    tensorboard: bool = setting(True, 'training.tensorboard')  # events under logs/<run>/
    # wandb
    wandb_enabled: bool = setting(False, 'wandb.enabled')  # also log to Weights & Biases
    wandb_project: str = setting('nanoforge', 'wandb.project')  # its project
    wandb_entity: str | None = setting(None, 'wandb.entity')  # user or team; your own if not set
    wandb_name: str | None = setting(None, 'wandb.name')  # its run; the folder's name if not set
    wandb_tags: list[str] = setting([], 'wandb.tags')  # words to find it by
    # machine
    device: str = 'auto'  # auto = cuda, mps or cpu; or cuda:1, ...
    matmul: str = setting('auto', choices=('auto', 'float32', 'bf16'))  # products on a CPU; auto = bf16 where the processor has it
    num_gpus: int = 1  # processes, one for each GPU
    nohup: bool = False  # run in the background, with a log in logs/

    def check(self):
        fp16_asked = 'fp16' in getattr(self, 'flags', ()) and 'bf16' not in getattr(self, 'flags', ())
        if self.fp16 and self.bf16 and not fp16_asked:
            raise UserError('bf16 and fp16 exclude each other: set one of them to false')
        self.bf16 = self.bf16 and not self.fp16
        if self.deepspeed_config:
            raise UserError('deepspeed_config: there is no DeepSpeed here; leave it out and use num_gpus (data parallel) with '
                            'gradient_checkpointing, load_in_4bit or reference=cache where memory is short')
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_lora:
            raise UserError('load_in_4bit and load_in_8bit freeze the weights: add model.use_lora=true')
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')
        for name in ('per_device_train_batch_size', 'gradient_accumulation_steps', 'logging_steps', 'save_steps', 'eval_steps',
                     'max_length', 'max_prompt_length', 'max_new_tokens', 'num_gpus', 'lora_r', 'save_total_limit', 'dataset_num_proc'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f'{name} must be 1 or more, not {getattr(self, name)}')
        for name in ('warmup_steps', 'weight_decay', 'max_grad_norm', 'gamma', 'rpo_alpha', 'eval_samples', 'max_eval_pairs',
                     'lora_dropout', 'dataloader_num_workers'):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f'{name} must be 0 or more, not {getattr(self, name)}')
        for name in ('beta', 'learning_rate', 'num_train_epochs', 'lora_alpha'):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f'{name} must be above 0, not {getattr(self, name)}')
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f'max_steps must be 1 or more, or -1 for what num_train_epochs gives; not {self.max_steps}')
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f'eval_fraction is a share of the pairs, 0 or more and below 1, not {self.eval_fraction}')
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise UserError(f'max_prompt_length={self.max_prompt_length} leaves no room for an answer in max_length={self.max_length}')
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f'label_smoothing is the share of wrong labels, 0 or more and below 0.5, not {self.label_smoothing}')
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise UserError(f'label_smoothing belongs to loss_type {", ".join(SMOOTHED)}, not to {self.loss_type}')
        if self.gamma and self.loss_type != 'simpo':
            raise UserError(f'gamma is the margin of loss_type=simpo, not of {self.loss_type}')
        if self.reference != 'auto' and self.loss_type in REFERENCE_FREE:
            raise UserError(f'loss_type={self.loss_type} has no reference: leave out reference={self.reference}')
        if self.reference == 'adapters_off' and not self.use_lora:
            raise UserError('reference=adapters_off needs an adapter: add model.use_lora=true, or use reference=copy or cache')
        if self.system_prompt is not None and not self.apply_chat_template:
            raise UserError('system_prompt is a message of the chat template, which apply_chat_template=false leaves out')
        if not self.datasets or not all(source.name for source in self.datasets):
            raise UserError('data.datasets: each needs a name: a file, a directory, a data set of the hub, or facts (embedded)')
        for source in self.datasets:
            if not 0 < source.weight < math.inf:
                raise UserError(f'data.datasets: weight of {source.name} must be above 0, not {source.weight}')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanoforge import plots
from nanoforge.checkpoint import Checkpoints, read_checkpoint, atomic_write, resume_config, start_fresh, write_json, writing
from data.preferences import encode_pairs, read_pairs
from data.tasks import facts
from data.tasks.world import split_of
from nanoforge.lora import add_lora, adapters_off, lora_layers, merge_lora
from model import find_model, load_model, save_model
from nanoforge.quantize import check_trainable
from nanoforge.log import Log
from nanoforge.run import LossScale, Stop, describe_device, explain_out_of_memory, precision, resume_command, seed_for, setup
from sample import generate


# ---- the loss ---------------------------------------------------------------------------------------------------------------

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, loss_type='sigmoid', label_smoothing=0.0, gamma=0.0,
             chosen_length=None, rejected_length=None):
    """(loss (B,), chosen_reward (B,), rejected_reward (B,)) of B pairs; the rewards carry no gradient.

    The first four: (B,) float32, log-probability of an answer, summed over its tokens, in nats; the reference's may be None where
    loss_type has no reference (simpo, orpo). chosen_length, rejected_length: (B,) tokens of the answers, for the types that take the
    mean over tokens instead of the sum. Below, w and l are the log-ratios policy - reference (for simpo and orpo the policy's
    log-probabilities), d = w - l, s the logistic function, e = label_smoothing. A reward is beta w or beta l.

      sigmoid       -(1 - e) log s(beta d) - e log s(-beta d)             DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7);
                                                                          e > 0: cDPO (Mitchell 2023)
      robust        (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)    unbiased under flips (arXiv 2403.00409, eq. 8)
      hinge         max(0, 1 - beta d)                                    SLiC (arXiv 2305.10425, eq. 1) on log-ratios
      ipo           (d - 1 / (2 beta))^2, means over tokens               IPO (arXiv 2310.12036, eq. 17)
      sigmoid_norm  sigmoid with means over tokens                        length-normalised DPO (arXiv 2411.15124, section 5.1.2)
      simpo         sigmoid of beta d - gamma, means over tokens          SimPO (arXiv 2405.14734, eq. 6)
      orpo          -w - beta log s(log odds(w) - log odds(l)), means     ORPO (arXiv 2403.07691, eq. 6-7)
      apo_zero      1 - s(beta w) + s(beta l)                             APO-zero (arXiv 2408.06266, eq. 7)
    """
    if loss_type not in LOSS_TYPES:
        raise UserError(f'loss_type={loss_type!r} is none of {", ".join(LOSS_TYPES)}')
    chosen, rejected = (policy_chosen, policy_rejected) if loss_type in REFERENCE_FREE else (
        policy_chosen - ref_chosen, policy_rejected - ref_rejected)                                 # w, l (B,)
    if loss_type in PER_TOKEN:
        if chosen_length is None or rejected_length is None:
            raise UserError(f'loss_type={loss_type} takes means over tokens: give chosen_length and rejected_length')
        chosen, rejected = chosen / chosen_length, rejected / rejected_length
    z = beta * (chosen - rejected)
    if loss_type in ('sigmoid', 'sigmoid_norm', 'simpo'):
        z = z - gamma
        loss = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    elif loss_type == 'robust':
        loss = (-(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)) / (1 - 2 * label_smoothing)
    elif loss_type == 'hinge':
        loss = torch.relu(1 - z)
    elif loss_type == 'ipo':
        loss = (chosen - rejected - 1 / (2 * beta)).square()
    elif loss_type == 'orpo':
        loss = -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    else:
        loss = 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    return loss, (beta * chosen).detach(), (beta * rejected).detach()


def log_odds(logp):
    """log(p / (1 - p)) of log p, which rounding may have brought to 0, where odds are infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - torch.log(-torch.expm1(logp))


# ---- data -------------------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """Prompts with their answers as packed rows: every prompt once, followed by its answers, each without its last token."""
    idx: torch.Tensor           # (R, T) token ids
    positions: torch.Tensor     # (R, T); a jump back begins the next answer to the same prompt
    source: torch.Tensor        # (N,) place in the flattened rows from which a token of an answer is predicted
    targets: torch.Tensor       # (N,) that token; answer after answer
    lengths: torch.Tensor       # (S,) tokens of each answer


def make_batch(groups, device, pin=False, one_row=None):
    """[(prompt ids, [answer ids, ...]), ...] -> Batch. one_row: without padding, as a CPU likes it, which attends document by document;
    else rows as long as the longest, filled by best fit, since a GPU makes a mask of (T, T) a row."""
    one_row = device.type == 'cpu' if one_row is None else one_row
    sizes = [len(prompt) + sum(len(answer) - 1 for answer in answers) for prompt, answers in groups]
    width = sum(sizes) if one_row else max(sizes)
    bins = [list(range(len(groups)))] if one_row else best_fit(sizes, width)
    idx, positions = np.zeros((len(bins), width), np.int64), np.tile(np.arange(width), (len(bins), 1))
    starts = {}
    for row, members in enumerate(bins):
        at = 0
        for i in members:
            prompt, answers = groups[i]
            starts[i] = row * width + at
            for part, begin in [(prompt, 0), *((answer[:-1], len(prompt)) for answer in answers)]:
                idx[row, at:at + len(part)], positions[row, at:at + len(part)] = part, range(begin, begin + len(part))
                at += len(part)
        positions[row, at:] -= at       # padding is a document of its own
    source, targets, lengths = [], [], []
    for i, (prompt, answers) in enumerate(groups):
        at = starts[i] + len(prompt)
        for answer in answers:
            source += [starts[i] + len(prompt) - 1, *range(at, at + len(answer) - 1)]
            targets += answer
            lengths.append(len(answer))
            at += len(answer) - 1
    tensors = [torch.from_numpy(idx), torch.from_numpy(positions), *map(torch.tensor, (source, targets, lengths))]
    if pin and device.type == 'cuda':
        tensors = [tensor.pin_memory() for tensor in tensors]
    return Batch(*(tensor.to(device, non_blocking=pin) for tensor in tensors))


def load_data(cfg, tokenizer, context, run):
    """(pairs, train, held): all pairs as TokenPair; for each data set the indices of those that are trained on; those held out."""
    max_length = min(cfg.max_length or context, context)
    if cfg.max_length and cfg.max_length > context:
        run.print0(f'max_length={cfg.max_length} is clamped to the {context} tokens of context that the model has')
    if cfg.max_prompt_length and cfg.max_prompt_length >= max_length:
        raise UserError(f'max_prompt_length={cfg.max_prompt_length} leaves no room for an answer in the model\'s context of {context}')
    pairs, train, held = [], [], []
    for source in cfg.datasets:
        raw, drops = read_pairs(source, cfg.system_prompt, cfg.apply_chat_template)
        splits = {pair.where: pair.split for pair in raw}
        found, more, cuts = encode_pairs(tokenizer, raw, max_length, cfg.max_prompt_length, cfg.dataset_num_proc)
        drops.update(more)
        marked = 'eval' in splits.values()
        own, own_held = [], []
        for i, pair in enumerate(found, len(pairs)):
            is_held = splits[pair.where] == 'eval' if marked else split_of(str(pair.prompt), cfg.eval_fraction) == 'eval'
            (own_held if is_held else own).append(i)
        pairs, train, held = pairs + found, train + [own], held + own_held
        say_data(run, source.name, len(raw) + sum(map(len, drops.values())), own, own_held, drops, cuts, max_length)
    prompts = {tuple(pairs[i].prompt) for i in held}
    known = [[i for i in own if tuple(pairs[i].prompt) not in prompts] for own in train]
    if lost := sum(map(len, train)) - sum(map(len, known)):
        run.print0(f'          {lost:,} training pairs are left out, since their prompts are held out too')
    if not any(known):
        raise UserError('no pair is left to train on; what was dropped is said above')
    if len(held) > cfg.max_eval_pairs:
        held = sorted(np.random.default_rng(seed_for(cfg.seed, 'held')).choice(held, cfg.max_eval_pairs, replace=False).tolist())
        run.print0(f'          of the held-out pairs {cfg.max_eval_pairs:,} are looked at (max_eval_pairs)')
    return pairs, known, held


def say_data(run, name, rows, train, held, drops, cuts, max_length):
    run.print0(f'data      {name}: {rows:,} rows, {len(train):,} pairs to train on, {len(held):,} held out')
    if drops:
        run.print0(f'          dropped: {drops}')
    if any(cuts.values()):
        run.print0(f'          cut: the beginning of {cuts["prompts"]:,} prompts, the end of {cuts["answers"]:,} answers '
                    f'(max_length={max_length})')


class Feed:
    """Which pairs an optimizer step takes: each data set `weight` times an epoch, shuffled by (seed, epoch), whatever the ranks."""

    def __init__(self, cfg, train, world_size):
        self.cfg, self.train, self.epoch = cfg, train, None
        self.count = sum(round(source.weight * len(own)) for source, own in zip(cfg.datasets, train))      # pairs in an epoch
        self.size = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * world_size
        self.per_epoch = self.count // self.size if cfg.dataloader_drop_last else -(-self.count // self.size)
        if not self.per_epoch:
            raise UserError(f'{self.count} pairs are fewer than the {self.size} of one step: lower per_device_train_batch_size or '
                            f'gradient_accumulation_steps, or set dataloader_drop_last=false')
        self.total = cfg.max_steps if cfg.max_steps > 0 else math.ceil(cfg.num_train_epochs * self.per_epoch)

    def order(self, epoch):
        if self.epoch != epoch:
            rng, chosen = np.random.default_rng(seed_for(self.cfg.seed, 'order', epoch)), []
            for source, own in zip(self.cfg.datasets, self.train):
                whole, part = divmod(round(source.weight * len(own)), max(len(own), 1))
                chosen += [*own * whole, *rng.permutation(own)[:part].tolist()]
            self.epoch, self.shuffled = epoch, rng.permutation(chosen).tolist()
        return self.shuffled

    def pairs(self, step):
        """Indices of the pairs of a step, over micro-batches and ranks."""
        epoch, at = divmod(step, self.per_epoch)
        return self.order(epoch)[at * self.size:(at + 1) * self.size]

    def epochs(self, step):
        """How many epochs `step` steps are."""
        return round(step / self.per_epoch, 3)


def micro_batches(cfg, pairs, indices, run):
    """This rank's share of some pairs as [(Batch, indices)] of at most per_device_train_batch_size pairs."""
    mine, B = indices[run.rank::run.world_size], cfg.per_device_train_batch_size
    for start in range(0, len(mine), B):
        part = mine[start:start + B]
        yield make_batch([(pairs[i].prompt, [pairs[i].chosen, pairs[i].rejected]) for i in part], run.device,
                         cfg.dataloader_pin_memory), part


class Loader:
    """(indices of all pairs of a step, this rank's micro-batches), made `dataloader_num_workers` steps ahead by a thread."""

    def __init__(self, cfg, feed, pairs, run):
        self.cfg, self.feed, self.pairs, self.run, self.ahead = cfg, feed, pairs, run, {}
        self.pool = concurrent.futures.ThreadPoolExecutor(1) if cfg.dataloader_num_workers else None

    def make(self, step):
        indices = self.feed.pairs(step)
        return indices, list(micro_batches(self.cfg, self.pairs, indices, self.run))

    def __call__(self, step):
        if not self.pool:
            return self.make(step)
        for later in range(step, min(step + 1 + self.cfg.dataloader_num_workers, self.feed.total)):
            if later not in self.ahead:
                self.ahead[later] = self.pool.submit(self.make, later)
        return self.ahead.pop(step).result()


# ---- policy and reference ---------------------------------------------------------------------------------------------------

def mode_of(cfg):
    return 'QLoRA' if cfg.load_in_4bit or cfg.load_in_8bit else 'LoRA' if cfg.use_lora else 'full'


def load(cfg, name, run, trainable):
    """load_model with the quantisation that the configuration asks for; weights that stay frozen in torch_dtype where autocast computes."""
    frozen = cfg.use_lora or not trainable
    dtype = getattr(torch, cfg.torch_dtype) if frozen and run.dtype != torch.float32 else torch.float32
    model, tokenizer = load_model(name, run.device, dtype, cfg.load_in_4bit, cfg.load_in_8bit, cfg.bnb_4bit_quant_type,
                                  cfg.bnb_4bit_use_double_quant, cfg.bnb_4bit_compute_dtype, trainable_adapter=trainable)
    return model.set_matmul(run.matmul), tokenizer


def build_policy(cfg, resumed, run):
    """(model, tokenizer) with the weights of the base model, an adapter of it, or the checkpoint that is resumed."""
    model, tokenizer = load(cfg, resumed or cfg.base_model_name, run, trainable=True)
    if tokenizer is None:
        raise UserError(f'{cfg.base_model_name} has no tokenizer beside it')
    if cfg.use_lora and not getattr(model, 'adapters', None):
        torch.manual_seed(seed_for(cfg.seed, 'adapter'))
        add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_target_modules or 'all-linear', cfg.lora_bias)
    elif not cfg.use_lora and getattr(model, 'adapters', None):
        merge_lora(model, keep=False)
    for adapter in (adapter for layer in lora_layers(model) for adapter in layer.lora.values()):
        adapter.dropout = 0.0 if cfg.disable_dropout else cfg.lora_dropout
    model.gradient_checkpointing = cfg.gradient_checkpointing
    check_trainable(model)
    return model.train(), tokenizer


def answer_logps(model, batch):
    """(S,) float32: the log-probability of each answer of a Batch, summed over its tokens."""
    hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.source)                         # (N, C)
    logp = model.token_stats(hidden[None], batch.targets[None], extras=False)['logp'][0]           # (N,)
    inside = torch.arange(int(batch.lengths.max()), device=logp.device) < batch.lengths[:, None]   # (S, longest)
    return logp.new_zeros(inside.shape).masked_scatter(inside, logp).sum(1)


class Reference:
    """What rewards are measured against: reference(batch, indices) -> (S,) log-probabilities, or None where the loss has no reference.

    kind  adapters_off: the policy without its adapter; copy: the base model, frozen; cache: a table, computed once by either
    """

    def __init__(self, cfg, kind, policy, from_base, fresh, pairs, needed, run):
        self.run, self.model, self.table, self.off, self.kept = run, None, None, contextlib.nullcontext, {}
        if kind == 'adapters_off' or kind == 'cache' and cfg.use_lora and from_base:
            self.model, self.off = policy, lambda: adapters_off(policy)
        elif kind == 'cache' and fresh:
            self.model = policy             # which has not been trained yet
        elif kind in ('copy', 'cache'):
            self.model = load(cfg, cfg.base_model_name, run, trainable=False)[0].requires_grad_(False)
        if kind == 'cache':
            self.table = self.cached(cfg, pairs, needed)
            self.model = policy if self.model is policy and self.off is not contextlib.nullcontext else None

    def __call__(self, batch, indices, keep=False):
        """keep: remember the answer for these indices (the held-out pairs, which come again and again)."""
        if self.table is not None:
            return self.table[indices].to(batch.idx.device).flatten()                               # (B, 2) -> (S,)
        if keep and tuple(indices) not in self.kept:
            self.kept[tuple(indices)] = self.compute(batch)
        return self.kept[tuple(indices)] if keep else self.compute(batch)

    @torch.no_grad()
    def compute(self, batch):
        """(S,) of any Batch; None where the loss has no reference, or only its table is left."""
        if self.model is None:
            return None
        training = self.model.training
        self.model.eval()
        try:
            with self.off(), self.run.autocast():
                return answer_logps(self.model, batch)
        finally:
            self.model.train(training)

    def cached(self, cfg, pairs, needed):
        """(len(pairs), 2) float32, from a file named after a hash of the weights and the precision, whose rows are named after hashes
        of the ids, so that template and truncation count too. What is missing is computed and added."""
        run, names = self.run, [hash_of([pair.prompt, pair.chosen, pair.rejected]) for pair in pairs]
        with self.off():
            weights = {name: tensor for name, tensor in self.model.state_dict().items()
                       if self.off is contextlib.nullcontext or '.lora.' not in name}
        path = os.path.join(cfg.reference_cache, f'{hash_of([str(run.dtype), run.matmul], weights)}.safetensors')
        known = {}
        if os.path.exists(path):
            try:
                saved = load_file(path)
            except SafetensorError as error:
                raise UserError(f'{path} is not a whole file of reference log-probabilities ({error}): remove it, it is made again') from None
            known = dict(zip((row.tobytes().hex() for row in saved['pairs'].numpy()), saved['logps']))
        missing = sorted({names[i]: i for i in needed if names[i] not in known}.values(), key=lambda i: len(pairs[i].prompt))
        table = torch.zeros(len(pairs), 2)
        if missing:
            run.print0(f'reference {len(needed) - len(missing):,} of {len(needed):,} pairs are in {path}; computing the others')
            table = table.to(run.device)
            for batch, indices in micro_batches(cfg, pairs, missing, run):
                table[indices] = self.compute(batch).view(-1, 2)
            table = run.sum(table).cpu()
            known.update((names[i], table[i].clone()) for i in missing)
            run.on_main(lambda: self.write(path, known))
        for i in needed:
            table[i] = known[names[i]]
        return table

    @staticmethod
    def write(path, known):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        names = torch.tensor([list(bytes.fromhex(name)) for name in known], dtype=torch.uint8)
        with writing(path):
            atomic_write(Path(path), lambda temporary: save_file({'pairs': names, 'logps': torch.stack(list(known.values()))}, temporary))


def hash_of(value, tensors=()):
    """Sixteen bytes in hexadecimal of JSON-able values, and of tensors by name."""
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- evaluation -------------------------------------------------------------------------------------------------------------

PANELS = [('loss', {'loss': 'training', 'eval_loss': 'held out'}),
          ('accuracy', {'rewards/accuracies': 'training', 'eval_rewards/accuracies': 'held out, by reward',
                        'eval_logps/accuracies': 'by the policy alone', 'success_rate': 'sampled answers'}),
          ('reward', {'eval_rewards/chosen': 'chosen', 'eval_rewards/rejected': 'rejected', 'eval_rewards/margins': 'margin'}),
          ('log-probability', {'eval_logps/chosen': 'chosen', 'eval_logps/rejected': 'rejected'})]
KEYS = ('loss', 'rewards/chosen', 'rewards/rejected', 'rewards/accuracies', 'rewards/margins', 'logps/chosen', 'logps/rejected',
        'logps/accuracies')


def measure(cfg, logps, reference, lengths):
    """(S,) of policy and reference, tokens (S,) -> (loss (B,), a column for each of KEYS (B, 8) without gradient).

    An accuracy is the share of pairs whose chosen answer has the higher reward, or log-probability; a tie counts as half.
    """
    (chosen, rejected), (n_chosen, n_rejected) = logps.view(-1, 2).unbind(1), lengths.view(-1, 2).unbind(1)
    ref_chosen, ref_rejected = (None, None) if reference is None else reference.view(-1, 2).unbind(1)
    loss, chosen_reward, rejected_reward = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta, cfg.loss_type,
                                                    cfg.label_smoothing, cfg.gamma, n_chosen, n_rejected)
    if cfg.rpo_alpha:                                                   # Pang et al. 2024, arXiv 2404.19733, eq. 1
        loss = loss - cfg.rpo_alpha * chosen / n_chosen
    won = lambda a, b: (1 + torch.sign(a - b)) / 2
    with torch.no_grad():
        columns = (loss, chosen_reward, rejected_reward, won(chosen_reward, rejected_reward), chosen_reward - rejected_reward, chosen,
                   rejected, won(chosen, rejected))
        return loss, torch.stack([column.float() for column in columns], 1)


@torch.no_grad()
def evaluate(cfg, model, reference, pairs, held, run):
    """(metrics, margins (n,)) over the held-out pairs, each once."""
    model.eval()
    table, place = torch.zeros(len(held), len(KEYS), device=run.device), {i: at for at, i in enumerate(held)}
    for batch, indices in micro_batches(cfg, pairs, held, run):
        with run.autocast():
            logps = answer_logps(model, batch)
        table[[place[i] for i in indices]] = measure(cfg, logps, reference(batch, indices, keep=True), batch.lengths)[1]
    run.sum(table)
    model.train()
    return {f'eval_{key}': value for key, value in zip(KEYS, table.mean(0).tolist())}, table[:, KEYS.index('rewards/margins')].cpu()


def sample_answers(cfg, model, reference, tokenizer, pairs, held, run):
    """Answers drawn to held-out prompts at temperature 1 -> (metrics, text of the first three). kl estimates KL(policy || reference)
    in nats an answer by the mean log-ratio; success_rate is the share that follows the rule of an embedded set."""
    asked = list({tuple(pairs[i].prompt): pairs[i] for i in held}.values())[:cfg.eval_samples]
    with explain_out_of_memory('--eval_samples', '--max_new_tokens'), run.autocast():
        samples = generate(model, [pair.prompt for pair in asked], cfg.max_new_tokens, stop_ids=tokenizer.stop_ids,
                           seed=seed_for(cfg.seed, 'samples'))
        drawn = [row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths)]
        log_ratio = []
        for start in range(0, len(asked), cfg.per_device_train_batch_size):
            part = slice(start, start + cfg.per_device_train_batch_size)
            batch = make_batch([(pair.prompt, [ids]) for pair, ids in zip(asked[part], drawn[part])], run.device)
            if (other := reference.compute(batch)) is not None:
                with torch.no_grad():
                    log_ratio += (answer_logps(model, batch) - other).tolist()
    metrics = {'kl': sum(log_ratio) / len(log_ratio)} if log_ratio else {}
    texts = [(tokenizer.decode(pair.prompt), tokenizer.decode(ids, skip_special_tokens=True)) for pair, ids in zip(asked, drawn)]
    if [source.name for source in cfg.datasets] == ['facts']:
        metrics['success_rate'] = sum(facts.in_form(*text) for text in texts) / len(texts)
    return metrics, '\n'.join(map(''.join, texts[:3]))


# ---- announcements ----------------------------------------------------------------------------------------------------------

def notes(cfg):
    """What some settings do not do here."""
    if not cfg.low_cpu_mem_usage:
        yield 'low_cpu_mem_usage=false changes nothing: weights are mapped from disk, never read twice'
    if cfg.use_flash_attention:
        yield 'use_flash_attention changes nothing: attention always runs in fused kernels, those of torch'
    if not cfg.remove_unused_columns:
        yield 'remove_unused_columns=false changes nothing: a row is encoded as it is read, and no column is kept'
    if cfg.use_lora and cfg.lora_dropout and cfg.disable_dropout:
        yield (f'lora_dropout={cfg.lora_dropout} is not applied, so that policy and reference differ in weights alone '
               '(disable_dropout=false applies it)')


def announce(cfg, model, feed, kind, run):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.print0(f'model     {cfg.base_model_name}: {model.num_params():,} parameters, {mode_of(cfg)}: {trained:,} are trained')
    run.print0(f'machine   {describe_device(run)}')
    words = {'adapters_off': 'the model without its adapter', 'copy': 'a frozen copy', 'cache': 'log-probabilities on disk', 'none': 'none'}
    sft = f' + {cfg.rpo_alpha:g} SFT' if cfg.rpo_alpha else ''
    run.print0(f'loss      {cfg.loss_type}, beta {cfg.beta:g}{sft}, reference: {words[kind]}')
    run.print0(f'run       {feed.total:,} steps of {feed.size} pairs, {feed.total / feed.per_epoch:.2g} epochs; highest learning rate '
                f'{cfg.learning_rate:g}')
    for note in notes(cfg):
        run.print0(f'note      {note}')


def show_data(tokenizer, pairs, train, held, feed, run):
    """What --check prints: lengths, and three pairs as the model sees them, what is learned in colour."""
    for name in ('prompt', 'chosen', 'rejected'):
        lengths = sorted(len(getattr(pair, name)) for pair in pairs)
        run.print0(f'          {name + ":":<10} {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}')
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) / len(pairs)
    run.print0(f'          the chosen answer is the longer one in {longer:.0%} of the pairs' + (
        ': a policy can win by length alone (see loss_type=sigmoid_norm or simpo)' if not 0.35 < longer < 0.65 else ''))
    unended = sum(pair.chosen[-1] not in tokenizer.stop_ids for pair in pairs)
    if unended:
        run.print0(f'          {unended:,} chosen answers do not end with a stop token')
    run.print0(f'          {feed.per_epoch:,} steps an epoch, {feed.total:,} in all')
    for i in [*(own[0] for own in train if own), *held[:1]][:3]:
        pair = pairs[i]
        run.print0(f'--- {pair.where}\n{tokenizer.decode(pair.prompt)}\033[32m{tokenizer.decode(pair.chosen)}\033[0m\n'
                    f'   instead of: \033[31m{tokenizer.decode(pair.rejected)}\033[0m')


# ---- the run ----------------------------------------------------------------------------------------------------------------

def choose(cfg, model, from_base, run):
    """Fills in what is unset and says so; returns the kind of reference."""
    small = model.num_params() < SMALL
    chosen = {'learning_rate': RATES[mode_of(cfg)] * (30 if small else 1), 'rpo_alpha': 1.0 if small and cfg.loss_type != 'orpo' else 0.0}
    chosen = {name: value for name, value in chosen.items() if getattr(cfg, name) is None}
    for name, value in chosen.items():
        setattr(cfg, name, value)
    if chosen:
        run.print0('chosen    ' + ', '.join(f'{name}={value:g}' for name, value in chosen.items()) +
                    f' for {mode_of(cfg)} training' + ' of a small model' * small + ' (type the flags for others)')
    if cfg.loss_type in REFERENCE_FREE:
        return 'none'
    if cfg.reference == 'adapters_off' and not from_base:
        raise UserError(f'reference=adapters_off: {cfg.base_model_name} is an adapter already, and without it the model is not what '
                        'training starts from; use reference=copy or cache')
    return cfg.reference if cfg.reference != 'auto' else 'adapters_off' if cfg.use_lora and from_base else 'copy'


def train_step(cfg, model, reference, optimizer, batches, count, scaler, step, run):
    """One optimizer step over `count` pairs: (this rank's part of the means of KEYS (8,), gradient norm, whether it was sound)."""
    optimizer.zero_grad()
    means = torch.zeros(len(KEYS), device=run.device)
    for micro, (batch, indices) in enumerate(batches):
        if not cfg.disable_dropout:
            torch.manual_seed(seed_for(cfg.seed, 'dropout', step, micro, run.rank))
        with explain_out_of_memory('--per_device_train_batch_size', '--max_length'):
            with run.autocast():
                logps = answer_logps(model, batch)                                                 # (S,)
            loss, columns = measure(cfg, logps, reference(batch, indices), batch.lengths)
            (loss.sum() / count * scaler.value).backward()
        means += columns.sum(0) / count
    for grad in optimizer.grads:
        run.sum(grad)
    scaler.unscale_(optimizer.grads)
    norm = float(optimizer.clip_grad_norm(cfg.max_grad_norm))
    if math.isfinite(norm):
        optimizer.step()
    rescaled = scaler.update(math.isfinite(norm))
    return means, norm, math.isfinite(norm) or rescaled


def main(cfg):
    cfg, saved = resume_config(cfg, cfg.output_dir, 'train_dpo.py') if cfg.resume else (cfg, None)
    run = setup(cfg.device, precision(cfg), cfg.matmul)
    stop = Stop(run)
    checkpoints = Checkpoints(cfg.output_dir, run, cfg.save_total_limit, cfg.save_only_model)
    resumed = checkpoints.latest() if saved else None
    if saved and not resumed and cfg.resume != 'auto':
        raise UserError(f'{cfg.output_dir} holds no whole checkpoint to resume from; start anew without --resume')
    from_base = not os.path.exists(os.path.join(find_model(cfg.base_model_name), 'adapter_config.json'))
    model, tokenizer = build_policy(cfg, resumed, run)
    pairs, train, held = load_data(cfg, tokenizer, model.config.block_size, run)
    feed = Feed(cfg, train, run.world_size)
    kind, warmup = choose(cfg, model, from_base, run), warmup_within(cfg.warmup_steps, feed.total, run.print0)
    announce(cfg, model, feed, kind, run)
    if cfg.check_data:
        show_data(tokenizer, pairs, train, held, feed, run)
        run.close()
        return {'pairs': sum(map(len, train)), 'held_out': len(held)}
    used = sorted({i for step in range(feed.total) for i in feed.pairs(step)} | set(held)) if kind == 'cache' else []
    reference = Reference(cfg, kind, model, from_base, not resumed, pairs, used, run)
    optimizer = make_optimizer(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay, (0.9, 0.999))
    step, num_tokens, best_loss, scaler = 0, 0, math.inf, LossScale(run.dtype)
    window = [0.0] * (len(KEYS) + 2)        # since the last log line: sums of KEYS, tokens, steps
    if resumed:
        tensors, state = read_checkpoint(resumed)
        optimizer.load_state_dict(tensors)
        step, num_tokens, window = state['step'], state['num_tokens'], state['window']
        scaler = LossScale(run.dtype, state['loss_scale'])
        best_loss = math.inf if state['best_eval_loss'] is None else state['best_eval_loss']
        checkpoints.say_processes(resumed)
        checkpoints.discard_later(resumed)
        run.on_main(lambda: write_json(os.path.join(cfg.output_dir, 'run_config.json'), {**saved, 'config': as_dict(cfg)}))
    else:
        start_fresh(run, cfg.output_dir, as_dict(cfg), keep=cfg.base_model_name, script='train_dpo.py')
    header = {'script': 'train_dpo.py', 'data': [source.name for source in cfg.datasets], 'model': cfg.base_model_name,
              'mode': mode_of(cfg), 'loss_type': cfg.loss_type, 'reference': kind, 'machine': describe_device(run)}
    wandb = {name: getattr(cfg, f'wandb_{name}') for name in ('project', 'entity', 'name', 'tags') if getattr(cfg, f'wandb_{name}')}
    log = Log(run, cfg.output_dir, header, feed.total, cfg.tensorboard, wandb if cfg.wandb_enabled else None, step if resumed else None)

    def save(best):
        state = {'step': step, 'num_tokens': num_tokens, 'window': window, 'loss_scale': scaler.state,
                 'best_eval_loss': best_loss if math.isfinite(best_loss) else None}
        checkpoints.save(step, lambda directory: save_model(model, tokenizer, directory), optimizer.state_dict(), state, best)

    loader = Loader(cfg, feed, pairs, run)
    first, bad_steps, since, metrics = step, 0, time.perf_counter(), {}
    while True:
        looked = bool(held) and (step % cfg.eval_steps == 0 or step == feed.total) and (step > first or not resumed)
        if looked:
            metrics = look(cfg, model, reference, tokenizer, pairs, held, step, log, run)
        if step > first and (looked or step % cfg.save_steps == 0 or step == feed.total):
            best = looked and metrics['eval_loss'] < best_loss
            best_loss = metrics['eval_loss'] if best else best_loss
            save(best)
        if step >= feed.total:
            break
        if stop.requested:
            save(False)
            log.close()
            run.print0(f'stopped at step {step}, saved; go on with: {resume_command()}')
            run.close()
            raise SystemExit(stop.code)
        if looked:
            since = time.perf_counter()

        lr = learning_rate(step, cfg.lr_scheduler, cfg.learning_rate, 0.0, warmup, feed.total)
        optimizer.set_lr(lr)
        indices, batches = loader(step)
        means, norm, good = train_step(cfg, model, reference, optimizer, batches, len(indices), scaler, step, run)
        tokens = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in map(pairs.__getitem__, indices))
        step, bad_steps, num_tokens = step + 1, 0 if good else bad_steps + 1, num_tokens + tokens
        window = [a + b for a, b in zip(window, [*run.sum(means).tolist(), tokens, 1])]
        if not good:
            run.print0(f'step {step}: the gradient is not finite, the step is skipped ({bad_steps} in a row)')
            if bad_steps == MAX_BAD_STEPS:
                raise UserError(f'{bad_steps} steps in a row without a finite gradient: lower training.learning_rate='
                                f'{cfg.learning_rate:g}; the checkpoints in {cfg.output_dir} are good')
        if step % cfg.logging_steps == 0 or step == feed.total:
            *sums, tokens, steps = window
            speed = round(tokens / (time.perf_counter() - since))
            log.write(step, {**{key: value / steps for key, value in zip(KEYS, sums)}, 'epoch': feed.epochs(step), 'learning_rate': lr,
                             'grad_norm': norm, 'num_tokens': num_tokens, 'tokens_per_second': speed})
            window, since = [0.0] * len(window), time.perf_counter()
        log.progress(step)
    log.close()
    found = f' (eval_loss {best_loss:.4f})' if held else ''
    run.print0(f'the model is in {cfg.output_dir}/{found}: python sample.py {cfg.output_dir} --chat')
    run.close()
    return {**metrics, 'step': step}


def look(cfg, model, reference, tokenizer, pairs, held, step, log, run):
    """Evaluates on the held-out pairs, samples answers, logs and draws; returns the metrics."""
    metrics, margins = evaluate(cfg, model, reference, pairs, held, run)
    if run.is_main:
        text = None
        if cfg.eval_samples and not cfg.prediction_loss_only:
            sampled, text = sample_answers(cfg, model, reference, tokenizer, pairs, held, run)
            metrics.update(sampled)
        log.write(step, metrics)
        if text is not None:
            log.text(step, 'samples', text)
        title = os.path.basename(os.path.abspath(cfg.output_dir))
        plots.curves(log.path, os.path.join(cfg.output_dir, 'loss.png'), title, PANELS)
        plots.margins(margins.tolist(), os.path.join(cfg.output_dir, 'margins.png'), f'{title}: held-out pairs after step {step}')
    run.barrier()
    return metrics


if __name__ == '__main__':
    run_script(main, cfg)
