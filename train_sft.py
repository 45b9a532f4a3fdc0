"""Supervised fine-tuning: chats, tool calls, questions and answers.

    python train_sft.py                                                   the embedded tool calls on the embedded model
    python train_sft.py --dataset_path dataset.jsonl --output_dir DATASET --max_length 4096 --bf16
    python train_sft.py --recipe recipes/training/sft/llama3_3B_lora.yaml --num-gpus 8 training.learning_rate=5e-5
    python train_sft.py --dataset_path dataset.jsonl --check              what is learned of which rows, and what is wrong with them

The loss is the mean of -log p over every target of the optimizer step, counted over micro-batches and ranks: it does not depend on how
the batch is cut. Which rows a step sees is decided by step and seed alone. What is learned of a row, and formats: data/tokenized.py and
data/formats.py.
"""
import concurrent.futures
import contextlib
import itertools
import math
import os
import re
import time
from dataclasses import asdict, dataclass

from configurator import UserError, as_dict, parse, run_script, setting
from data.formats import Source
from nanoforge.optim import OPTIMIZERS, Plateau, WeightAverage, learning_rate, make_optimizer, warmup_within

SCHEDULES = {'linear': 'linear', 'cosine': 'cosine', 'cosine_with_restarts': 'cosine_restarts', 'cosine_hard_restarts': 'cosine_restarts',
             'cosine_restarts': 'cosine_restarts', 'constant': 'constant', 'constant_with_warmup': 'constant', 'plateau': 'plateau',
             'reduce_lr_on_plateau': 'plateau', 'wsd': 'wsd', 'warmup_stable_decay': 'wsd'}      # others' names: ours
HUB_DATASET = 'google/mobile-actions'
SMALL = 20_000_000      # parameters below which full fine-tuning needs a rate as in pretraining
EMBEDDED_EPOCHS = 8     # what a model of a million parameters needs on the embedded tool calls


@dataclass
class Config:
    # model
    base_model_name: str = setting('tiny', path='model.base_model_name', also=('model', 'model_name', 'model_id'))  # directory, hub name, or tiny (the embedded model)
    load_checkpoint: str | None = setting(None, path='training.load_checkpoint')  # begin with these weights and a fresh optimizer; epoch numbers go on from its own
    torch_dtype: str = setting('bfloat16', path='model.torch_dtype', choices=('float32', 'bfloat16', 'float16'))  # of weights frozen under LoRA on a GPU; what trains is float32
    low_cpu_mem_usage: bool = setting(True, path='model.low_cpu_mem_usage')  # weights are mapped from disk, never held twice; false is said to change nothing
    use_flash_attention: bool = setting(False, path='model.use_flash_attention')  # on a GPU prefer the flash kernel; false: PyTorch chooses among the fused ones
    load_in_8bit: bool = setting(False, path='model.load_in_8bit')  # frozen weights in 8 bits, under LoRA
    load_in_4bit: bool = setting(False, path='model.load_in_4bit')  # frozen weights in 4 bits: QLoRA
    bnb_4bit_compute_dtype: str | None = setting(None, path='model.bnb_4bit_compute_dtype', choices=('float32', 'bfloat16', 'float16'))  # of products with 4-bit weights; as all others if not set
    bnb_4bit_quant_type: str = setting('nf4', path='model.bnb_4bit_quant_type', choices=('nf4', 'fp4'))  # spacing of the 4-bit values
    bnb_4bit_use_double_quant: bool = setting(True, path='model.bnb_4bit_use_double_quant')  # quantise the scales too
    use_lora: bool = setting(False, path='model.use_lora')  # train low-rank adapters only
    lora_r: int = setting(8, path='model.lora_r')  # rank of the adapters
    lora_alpha: float = setting(16, path='model.lora_alpha')  # adapters count alpha / r times
    lora_dropout: float = setting(0.05, path='model.lora_dropout')  # on the input of the adapters
    lora_target_modules: list[str] = setting([], path='model.lora_target_modules')  # layers with an adapter; empty = every linear one but the head
    lora_bias: str = setting('none', path='model.lora_bias', choices=('none', 'all', 'lora_only'))  # biases that train beside adapters
    dropout: float = setting(0.0, path='model.dropout')  # of embeddings and of each layer's outputs
    freeze: list[str] = setting([], path='model.freeze')  # parts that stay as they are: embed_tokens, layers.0, norm, q_proj, ...
    # data
    dataset_path: str | None = setting(None, path='data.dataset_path', also=('data_path',))  # file, directory, embedded set or hub data set; several with commas
    datasets: list[Source] = setting([], path='data.datasets')  # the same as a list with columns and weights
    eval_fraction: float | None = setting(None, path='data.eval_fraction', also=('val_fraction',))  # held out of rows without metadata; 0.1 if not set
    system_prompt: str | None = setting(None, path='data.system_prompt')  # template over the columns, the system message of every row
    max_length: int | None = setting(None, path='data.max_length', also=('max_seq_length', 'max_seq_len'))  # tokens of prompt and completion; the longest row, at most the context, if not set
    max_prompt_length: int | None = setting(None, path='data.max_prompt_length')  # tokens of the prompt, trimmed from the left
    loss_on: str = setting('completion', path='data.loss_on', choices=('completion', 'assistant', 'all'))  # the last answer, every answer, or all tokens
    packing: bool = setting(False, path='data.packing')  # fill rows of max_length with several examples that do not see each other
    group_by_length: bool | None = setting(None, path='data.group_by_length', also=('length_grouped',))  # steps of similar lengths: less padding on a GPU, steps less alike; for the embedded set if not set
    augment: bool = setting(False, path='data.augment')  # reworded copies of training rows (synonyms, typos, other wordings)
    augment_factor: float = setting(2.0, path='data.augment_factor')  # training rows with the copies to rows without
    skip_bad_rows: bool = setting(False, path='data.skip_bad_rows')  # leave out rows that would stop the run
    dataset_num_proc: int = setting(1, path='data.dataset_num_proc')  # processes that render chats
    remove_unused_columns: bool = setting(True, path='data.remove_unused_columns')  # no column is kept once a row is encoded; false is said to change nothing
    # training
    algorithm: str = setting('sft', path='training.algorithm', choices=('sft',))  # whose recipe this is
    output_dir: str = setting('models', path='training.output_dir', also=('checkpoint_dir',))  # checkpoints, log, picture; the model to use ends up in its root
    num_train_epochs: float | None = setting(None, path='training.num_train_epochs', also=('epochs', 'num_epochs'))  # passes over the data; 3 if not set, more for the embedded set
    max_steps: int = setting(-1, path='training.max_steps')  # optimizer steps, in place of epochs; -1 = by epochs
    per_device_train_batch_size: int = setting(4, path='training.per_device_train_batch_size', also=('batch_size', 'train_batch_size'))  # rows of a micro-batch in each process
    per_device_eval_batch_size: int | None = setting(None, path='training.per_device_eval_batch_size', also=('eval_batch_size',))  # rows of a batch in evaluation; twice the training's if not set
    gradient_accumulation_steps: int = setting(4, path='training.gradient_accumulation_steps', also=('grad_accum',))  # micro-batches of an optimizer step
    learning_rate: float | None = setting(None, path='training.learning_rate', also=('lr',))  # the highest; by mode: full 1e-5 (a model below 20M parameters 1.5e-3), LoRA 1e-4, QLoRA 2e-4
    lr_scheduler_type: str = setting('cosine', path='training.lr_scheduler_type', also=('lr_scheduler', 'scheduler_type'), choices=tuple(SCHEDULES))  # shape of its decay
    min_lr: float = setting(0.0, path='training.min_lr')  # the lowest it decays to
    warmup_ratio: float = setting(0.03, path='training.warmup_ratio', also=('warmup_proportion',))  # share of the steps in which it rises
    warmup_steps: int | None = setting(None, path='training.warmup_steps')  # the same in steps; beats the ratio
    optimizer: str = setting('adamw', path='training.optimizer', choices=OPTIMIZERS)  # ours: adamw, sgd, muon; others by their name in torch.optim
    weight_decay: float = setting(0.01, path='training.weight_decay')  # of matrices; norms and biases are spared
    adam_beta1: float = setting(0.9, path='training.adam_beta1')  # decay of the first moment
    adam_beta2: float = setting(0.999, path='training.adam_beta2')  # decay of the second
    max_grad_norm: float = setting(1.0, path='training.max_grad_norm', also=('grad_clip',))  # highest gradient norm; 0 = no clipping
    label_smoothing: float = setting(0.0, path='training.label_smoothing', also=('label_smoothing_factor',))  # share of the target spread over the vocabulary
    neftune_noise_alpha: float = setting(0.0, path='training.neftune_noise_alpha')  # noise on embeddings in training, 5 to 15; 0 = none
    ema: float = setting(0.0, path='training.ema', also=('ema_decay',))  # decay of the mean of the weights that is evaluated and saved; 0 = off
    gradient_checkpointing: bool = setting(False, path='training.gradient_checkpointing')  # layers are computed again in backward: less memory, a third slower
    bf16: bool | None = setting(None, path='training.bf16')  # bfloat16 products on CUDA; where the card has them if not set. A CPU uses float32
    fp16: bool | None = setting(None, path='training.fp16')  # float16 products on CUDA, with loss scaling
    eval_strategy: str = setting('steps', path='training.eval_strategy', also=('evaluation_strategy',), choices=('steps', 'epoch', 'no'))  # when to evaluate
    eval_steps: int = setting(50, path='training.eval_steps')  # steps between evaluations
    eval_on_start: bool = setting(False, path='training.eval_on_start')  # one before the first step
    save_strategy: str = setting('steps', path='training.save_strategy', choices=('steps', 'epoch', 'best', 'no'))  # when to save, besides the best and the end
    save_steps: int = setting(500, path='training.save_steps')  # steps between checkpoints
    save_total_limit: int | None = setting(2, path='training.save_total_limit')  # newest checkpoints that are kept, with the best; null = all
    save_only_model: bool = setting(False, path='training.save_only_model')  # without optimizer, but for the newest, from which a run resumes
    load_best_model_at_end: bool = setting(True, path='training.load_best_model_at_end')  # the root holds the best by eval_loss; false: the last
    checkpoint_name: str = setting('checkpoint-{step}', path='training.checkpoint_name')  # of checkpoint folders, with {step} or {epoch}
    save_merged: bool = setting(False, path='training.save_merged')  # LoRA: also the whole model with the adapter in it, in output_dir/merged
    patience: int = setting(0, path='training.patience', also=('early_stopping_patience',))  # stop after so many evaluations without a better one; 0 = never
    logging_steps: int = setting(10, path='training.logging_steps')  # steps between log lines
    report_to: list[str] = setting(['tensorboard'], path='training.report_to', choices=('tensorboard', 'wandb', 'none', 'all'))  # where else
    sample_rows: int = setting(2, path='training.sample_rows')  # held-out prompts answered at each evaluation, for the eye; 0 = none
    seed: int = setting(42, path='training.seed')  # of order, dropout, noise and adapters
    dataloader_num_workers: int = setting(0, path='training.dataloader_num_workers')  # steps whose batches a thread makes ahead
    dataloader_pin_memory: bool = setting(True, path='training.dataloader_pin_memory')  # batches in page-locked memory, copied to the GPU meanwhile
    dataloader_drop_last: bool = setting(False, path='training.dataloader_drop_last')  # leave out what does not fill a step at the end of an epoch
    deepspeed_config: str | None = setting(None, path='training.deepspeed_config', also=('deepspeed',))  # not used: --num_gpus, QLoRA and gradient_checkpointing serve instead
    resume: bool | str = setting(False, path='training.resume', choices=('auto',))  # go on with the run in output_dir; auto: or begin one
    resume_from_checkpoint: str | None = setting(None, path='training.resume_from_checkpoint')  # go on from this checkpoint of output_dir; true = the newest
    # Weights & Biases
    wandb_enabled: bool = setting(False, path='wandb.enabled')  # also log there
    wandb_project: str = setting('nanoforge', path='wandb.project')  # its project
    wandb_entity: str | None = setting(None, path='wandb.entity')  # user or team
    wandb_name: str | None = setting(None, path='wandb.name')  # name of the run; the folder's and the time if not set
    wandb_tags: list[str] = setting([], path='wandb.tags')  # its tags
    # launch
    check_data: bool = setting(False, also=('check', 'dry_run'))  # show what is learned and what is wrong with the data, and stop
    num_gpus: int = 1  # processes, one on each GPU
    nohup: bool = False  # in the background: prints PID and the log's name, logs/training_DATE_TIME.log
    distributed: bool = False  # said by older launch commands; the launcher's environment decides
    device: str = 'auto'  # auto = cuda, mps or cpu; or cuda:1, ...
    matmul: str = setting('auto', choices=('auto', 'float32', 'bf16'))  # products on a CPU; auto = bf16 where the processor has it

    def check(self):
        if self.bf16 and self.fp16:
            typed = getattr(self, 'flags', frozenset()) & {'bf16', 'fp16'}
            if len(typed) != 1:
                raise UserError('--bf16 and --fp16 exclude each other: choose one')
            setattr(self, ({'bf16', 'fp16'} - typed).pop(), False)      # a typed flag beats the recipe's
        if self.deepspeed_config:
            raise UserError(f'deepspeed_config={self.deepspeed_config}: DeepSpeed is not used here; --num_gpus=N or torchrun is data '
                            'parallel, load_in_4bit with use_lora and gradient_checkpointing save memory')
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_lora:
            raise UserError(f'load_in_{"4" if self.load_in_4bit else "8"}bit needs use_lora=true: quantised weights do not train')
        for name in ('per_device_train_batch_size', 'per_device_eval_batch_size', 'gradient_accumulation_steps', 'eval_steps', 'save_steps',
                     'logging_steps', 'max_length', 'max_prompt_length', 'lora_r', 'dataset_num_proc', 'save_total_limit', 'num_gpus'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f'{name} must be 1 or more, not {getattr(self, name)}')
        for name in ('warmup_steps', 'weight_decay', 'max_grad_norm', 'neftune_noise_alpha', 'patience', 'sample_rows', 'min_lr',
                     'dataloader_num_workers'):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f'{name} must be 0 or more, not {getattr(self, name)}')
        for name in ('dropout', 'lora_dropout', 'label_smoothing', 'ema', 'eval_fraction', 'warmup_ratio', 'adam_beta1', 'adam_beta2'):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise UserError(f'{name} must be 0 or more and below 1, not {getattr(self, name)}')
        for name in ('learning_rate', 'num_train_epochs'):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f'{name} must be above 0, not {getattr(self, name)}')
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f'max_steps must be above 0, or -1 for as many as the epochs have; not {self.max_steps}')
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise UserError(f'max_prompt_length={self.max_prompt_length} leaves no room for completions in max_length={self.max_length}')
        if self.freeze and self.use_lora:
            raise UserError('freeze: under LoRA all but the adapters is frozen anyway; leave one of the two out')
        if not re.search(r'\{(step|epoch)\}', self.checkpoint_name) or os.path.basename(self.checkpoint_name) != self.checkpoint_name:
            raise UserError(f'checkpoint_name={self.checkpoint_name}: a name with {{step}} or {{epoch}}, so that none overwrites another')
        for name, judges in (('patience', self.patience), ('lr_scheduler_type', SCHEDULES[self.lr_scheduler_type] == 'plateau')):
            if judges and self.eval_strategy == 'no':
                raise UserError(f'{name}={getattr(self, name)} judges by evaluations, and eval_strategy=no makes none')
        for i, source in enumerate(self.datasets):
            if not source.name or not 0 < source.weight < math.inf:
                raise UserError(f'data.datasets[{i}] needs a name and a weight above 0, not name={source.name!r}, weight={source.weight:g}')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import numpy as np
import torch

from nanoforge import plots
from nanoforge.checkpoint import Checkpoints, resolve_link, read_checkpoint, resume_config, start_fresh, write_json
from data.tokenized import TokenizedRows, digest, encode_records
from data.formats import read_rows, to_record
from data.tokenizer import read_json
from nanoforge.data_checks import DataIssues, TrainingAlerts, compare_splits, show_check
from model import add_lora, load_model, merge_lora, save_model
from nanoforge.kernels import document_lengths
from nanoforge.quantize import check_trainable
from nanoforge.log import Log
from nanoforge.run import LossScale, Stop, describe_device, explain_out_of_memory, precision, resume_command, seed_for, setup
from sample import generate


# ---- model ------------------------------------------------------------------------------------------------------------------

def build_model(cfg, checkpoint, run):
    """(model, tokenizer), weights of the run's own `checkpoint` where it resumes, else of load_checkpoint or the base model."""
    half = cfg.use_lora and run.device.type == 'cuda'
    quantisation = dict(load_in_4bit=cfg.load_in_4bit, load_in_8bit=cfg.load_in_8bit, bnb_4bit_quant_type=cfg.bnb_4bit_quant_type,
                        bnb_4bit_use_double_quant=cfg.bnb_4bit_use_double_quant, bnb_4bit_compute_dtype=cfg.bnb_4bit_compute_dtype)
    source = checkpoint or (cfg.load_checkpoint and str(resolve_link(cfg.load_checkpoint))) or cfg.base_model_name
    is_adapter = lambda path: os.path.exists(os.path.join(path, 'adapter_config.json'))
    base = cfg.base_model_name if is_adapter(source) and 'base_model_name' in cfg.typed and not is_adapter(cfg.base_model_name) else None
    model, tokenizer = load_model(source, run.device, getattr(torch, cfg.torch_dtype) if half else torch.float32, **quantisation,
                                  base=base, trainable_adapter=True)
    if tokenizer is None:
        raise UserError(f'{source} has no tokenizer beside its weights: copy tokenizer.json there')
    if cfg.use_lora and not is_adapter(source):
        torch.manual_seed(seed_for(cfg.seed, 'adapter'))
        add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_target_modules or 'all-linear', cfg.lora_bias)
    for part in cfg.freeze:
        frozen = [p for name, p in model.named_parameters() if name.startswith(part + '.') or f'.{part}.' in f'.{name}']
        if not frozen:
            names = ', '.join(name for name, _ in list(model.named_parameters())[:4])
            raise UserError(f'freeze: the model has no part {part!r}; its parameters are called like {names}')
        for p in frozen:
            p.requires_grad_(False)
    check_trainable(model)
    if cfg.neftune_noise_alpha and not hasattr(model, 'embed_tokens'):
        raise UserError(f'neftune_noise_alpha: {model.config.arch} runs as transformers has it, which takes no noise; leave it out')
    for module in model.modules() if cfg.dropout else ():
        if isinstance(module, torch.nn.Dropout):
            module.p = cfg.dropout
        elif isinstance(getattr(module, 'dropout', None), float) and not hasattr(module, 'lora_A'):     # an adapter has its own
            module.dropout = cfg.dropout
    model.config.dropout = cfg.dropout
    model.gradient_checkpointing = cfg.gradient_checkpointing
    return model.set_matmul(run.matmul).train(), tokenizer


# ---- data -------------------------------------------------------------------------------------------------------------------

def sources_of(cfg, run):
    """The data sets of this run. dataset_path stands in for a recipe's list."""
    if cfg.dataset_path:
        if cfg.datasets:
            run.print0(f'data      dataset_path stands in for the {len(cfg.datasets)} entries of data.datasets')
        names = [cfg.dataset_path] if os.path.exists(cfg.dataset_path) else cfg.dataset_path.split(',')
        return [Source(name=name.strip()) for name in names]
    if cfg.datasets:
        return cfg.datasets
    if cfg.base_model_name == 'tiny':
        run.print0(f'data      the embedded tool calls: rows of {HUB_DATASET} do not fit the context of tiny (--dataset_path insists)')
        return [Source(name='devices')]
    try:
        next(read_rows(HUB_DATASET))
        return [Source(name=HUB_DATASET)]
    except UserError as error:
        run.print0(f'WARNING   {error}\nWARNING   training on the EMBEDDED STAND-IN devices; --dataset_path names your own data')
        return [Source(name='devices')]


def is_embedded(sources):
    return [source.name for source in sources] == ['devices']


def records_of(cfg, sources, findings, run):
    """(number of the source, Record) of every row that can be read; the others are findings."""
    fraction, held_out = 0.1 if cfg.eval_fraction is None else cfg.eval_fraction, 0
    for number, source in enumerate(sources):
        for where, row in read_rows(source.name, source.split, source.subset):
            try:
                record = to_record(row, where, source, cfg.system_prompt)
            except UserError as error:
                findings.add('unreadable rows', str(error))
                continue
            if 'metadata' not in row and fraction:      # by the prompt: the same question is never on both sides
                if seed_for(cfg.seed, 'held out', digest(record.prompt)) < fraction * 2 ** 63:
                    record.split, held_out = 'eval', held_out + 1
            yield number, record
    if held_out:
        run.print0(f'data      {held_out:,} rows without "metadata" are held out (--eval_fraction={fraction:g})')


def load_data(cfg, model, tokenizer, run):
    """(Rows, Findings, sources): every row encoded; max_length is set to what the rows need, or the context allows."""
    sources, rows, findings = sources_of(cfg, run), TokenizedRows(), DataIssues()
    context, asked = model.config.block_size, cfg.max_length
    if asked and asked > context:
        run.print0(f'max_length {asked} is clamped to the {context} tokens of context that the model has')
    records = records_of(cfg, sources, findings, run)
    if cfg.augment:
        from data.augment import augment
        records = ((number, record) for number, group in itertools.groupby(records, key=lambda pair: pair[0])
                   for record in augment([record for _, record in group], cfg.seed, cfg.augment_factor, say=run.print0))
    longest = encode_records(records, tokenizer, rows, findings, cfg.loss_on, min(asked or context, context), cfg.max_prompt_length,
                             cfg.dataset_num_proc, cfg.skip_bad_rows)
    compare_splits(rows.close(), findings)
    cfg.max_length = min(asked or longest, longest or context, context)
    return rows, findings, sources


class Batches:
    """Which rows each optimizer step learns from. A step is accumulation * ranks micro-batches of B items, an item a row or, packed,
    several rows; what they are depends on seed and step alone, so 1 x 8, 8 x 1 and 2 ranks x 4 are the same step."""

    def __init__(self, cfg, rows, weights, ranks):
        self.cfg, self.rows, self.weights = cfg, rows, weights
        self.B = cfg.per_device_train_batch_size
        self.size = self.B * cfg.gradient_accumulation_steps * ranks            # items in a step
        self.packs = self.pack(self.drawn(0)) if cfg.packing else None
        count = len(self.packs if cfg.packing else self.drawn(0))
        if cfg.dataloader_drop_last and count < self.size:
            raise UserError(f'dataloader_drop_last drops all: an epoch has {count} rows, a step {self.size}; lower '
                            '--gradient_accumulation_steps or --per_device_train_batch_size')
        self.steps_per_epoch = count // self.size if cfg.dataloader_drop_last else -(-count // self.size)
        self.epoch, self.items = None, None

    def drawn(self, epoch):
        """Numbers of the training rows of an epoch, each as often as the weight of its data set says."""
        parts = []
        for number, weight in enumerate(self.weights):
            mine = np.flatnonzero(~self.rows.held_out & (self.rows.source == number))
            whole, rest = divmod(round(weight * len(mine)), max(len(mine), 1))
            extra = np.random.default_rng(seed_for(self.cfg.seed, 'weight', epoch, number)).permutation(mine)[:rest]
            parts += [mine] * whole + [extra]
        return np.concatenate(parts)

    def pack(self, drawn):
        from data.formats import best_fit
        bins = best_fit((self.rows.lengths[drawn] - 1).tolist(), self.cfg.max_length)
        return [drawn[places].tolist() for places in bins]

    def length(self, item):
        return sum(int(self.rows.lengths[i]) - 1 for i in item)

    def order(self, epoch):
        """The items of an epoch in the order in which they are learned."""
        items = self.packs or [[int(i)] for i in self.drawn(epoch)]
        rng = np.random.default_rng(seed_for(self.cfg.seed, 'order', epoch))
        items = [items[i] for i in rng.permutation(len(items))]
        if self.cfg.group_by_length and not self.packs:
            # steps of similar lengths out of every 32: the rows of one are still drawn at random from many
            window = 32 * self.size
            chunks = [sorted(items[i:i + window], key=self.length) for i in range(0, len(items), window)]
            steps = [chunk[i:i + self.size] for chunk in chunks for i in range(0, len(chunk), self.size)]
            full, last = [s for s in steps if len(s) == self.size], [s for s in steps if len(s) < self.size]
            items = [item for i in rng.permutation(len(full)) for item in full[i]] + [item for s in last for item in s]
        return items

    def of_step(self, step):
        """The micro-batches of a step, lists of items, over all ranks."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.items = epoch, self.order(epoch)
        items = sorted(self.items[place * self.size:(place + 1) * self.size], key=self.length)
        return [items[i:i + self.B] for i in range(0, len(items), self.B)]

    def padding(self):
        """Share of the computed positions of the first epoch that are padding."""
        batches = [batch for step in range(self.steps_per_epoch) for batch in self.of_step(step)]
        lengths = [[self.length(item) for item in batch] for batch in batches]
        return 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths)


def micro_batch(rows, batch, packed, device, pin=False):
    """tensors() of a list of items. A CPU attends document by document, so that there items are laid end to end, as one row without
    padding."""
    end_to_end = device.type == 'cpu'
    return tensors(rows, [[i for item in batch for i in item]] if end_to_end else batch, device, packed or end_to_end, pin)


def tensors(rows, batch, device, packed, pin=False):
    """Items of row numbers -> x, y (B, T), y -1 where nothing is learned, and positions (B, T) where they are packed, else None."""
    ids = [[rows[i] for i in item] for item in batch]
    T = max(sum(len(tokens) - 1 for tokens, _ in item) for item in ids)
    x, y = np.zeros((len(batch), T), np.int64), np.full((len(batch), T), -1, np.int64)
    positions = np.zeros((len(batch), T), np.int64)
    for b, item in enumerate(ids):
        at = 0
        for tokens, targets in item:
            n = len(tokens) - 1
            x[b, at:at + n], positions[b, at:at + n] = tokens[:-1], np.arange(n)
            y[b, at:at + n] = np.where(targets[1:], tokens[1:], -1)
            at += n
        positions[b, at:] = np.arange(T - at)
    found = [torch.from_numpy(array) for array in ([x, y, positions] if packed else [x, y])]
    if pin and device.type == 'cuda':
        found = [tensor.pin_memory() for tensor in found]
    return (*(tensor.to(device, non_blocking=pin) for tensor in found), *([] if packed else [None]))


class Loader:
    """What a step needs, made ahead by `workers` threads: (this rank's micro-batches, targets of the step over all ranks, tokens)."""

    def __init__(self, cfg, batches, total, run):
        self.cfg, self.batches, self.total, self.run = cfg, batches, total, run
        self.pool = concurrent.futures.ThreadPoolExecutor(1) if cfg.dataloader_num_workers else None
        self.ahead = {}

    def make(self, step):
        cfg, rows = self.cfg, self.batches.rows
        batches = self.batches.of_step(step)
        learned = [i for batch in batches for item in batch for i in item]
        mine = [micro_batch(rows, batch, cfg.packing, self.run.device, cfg.dataloader_pin_memory)
                for batch in batches[self.run.rank::self.run.world_size]]
        return mine, int(rows.targets[learned].sum()), int((rows.lengths[learned] - 1).sum())

    def __call__(self, step):
        if not self.pool:
            return self.make(step)
        for later in range(step, min(step + 1 + self.cfg.dataloader_num_workers, self.total)):
            if later not in self.ahead:
                self.ahead[later] = self.pool.submit(self.make, later)
        return self.ahead.pop(step).result()


# ---- loss and step ----------------------------------------------------------------------------------------------------------

def negative_logp(cfg, model, x, y, positions, extras=False):
    """(-log p summed over the targets of a micro-batch, smoothed as cfg says; how many were the likeliest token, None without extras).

    x, y (B, T), y -1 where nothing is learned. Label smoothing e (Szegedy et al. 2016, section 7): (1 - e) -log p(target) + e times
    the mean of -log p over the vocabulary. NEFTune (Jain et al. 2023): uniform noise of alpha / sqrt(T C) on the embeddings,
    T the length of the row.
    """
    e, noisy = cfg.label_smoothing, {}
    if cfg.neftune_noise_alpha and model.training:
        embeddings = model.embed_tokens(x)                                              # (B, T, C)
        lengths = document_lengths(positions) if positions is not None else x.new_full((len(x),), x.size(1))
        scale = cfg.neftune_noise_alpha / (lengths * embeddings.size(-1)).sqrt()
        scale = scale.repeat_interleave(lengths).view(*x.shape, 1)                      # of each token's own row
        noisy = {'embeddings': embeddings + scale * torch.empty_like(embeddings).uniform_(-1, 1)}
    hidden = model.hidden(x, positions, **noisy, logit_positions=(y >= 0).flatten().nonzero().squeeze(1))            # (targets, C)
    stats = model.token_stats(hidden, y[y >= 0], extras=extras or e > 0)
    loss = -stats['logp'].sum()
    if e and model.training:
        loss = (1 - e) * loss - e * stats['mean_logp'].sum()
    return loss, stats['correct'].sum() if extras else None


def train_step(cfg, model, optimizer, batches, count, step, scaler, extras, run):
    """One optimizer step: (this rank's part of the mean loss over all `count` targets, gradient norm before clipping, how many of this
    rank's targets were the likeliest token, whether the step was sound). A norm that is not finite skips the step."""
    optimizer.zero_grad()
    loss, correct = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
    for micro, (x, y, positions) in enumerate(batches):
        torch.manual_seed(seed_for(cfg.seed, 'noise', step, micro, run.rank))       # of dropout and NEFTune
        with explain_out_of_memory('--per_device_train_batch_size', '--max_length'), run.autocast():
            part, hits = negative_logp(cfg, model, x, y, positions, extras)
            (part / max(count, 1) * scaler.value).backward()
        loss += part.detach() / max(count, 1)
        correct += hits if extras else 0
    for grad in optimizer.grads:
        run.sum(grad)
    scaler.unscale_(optimizer.grads)
    norm = float(optimizer.clip_grad_norm(cfg.max_grad_norm))
    if math.isfinite(norm):
        optimizer.step()
    rescaled = scaler.update(math.isfinite(norm))           # a float16 scale that was too high is no fault of the model's
    return loss, norm, correct, math.isfinite(norm) or rescaled


# ---- evaluation -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(cfg, model, rows, run):
    """{'eval_loss': nats per target, 'eval_mean_token_accuracy', 'eval_runtime', ...} on the held-out rows; nan where there are none."""
    held_out, started = np.flatnonzero(rows.held_out), time.perf_counter()
    if not len(held_out):
        return {'eval_loss': math.nan}
    model.eval()
    B = cfg.per_device_eval_batch_size or 2 * cfg.per_device_train_batch_size
    held_out = held_out[np.argsort(rows.lengths[held_out], kind='stable')]
    total = torch.zeros(2, dtype=torch.float64)
    for at in range(0, len(held_out), B)[run.rank::run.world_size]:
        x, y, positions = micro_batch(rows, [[i] for i in held_out[at:at + B]], False, run.device)
        with explain_out_of_memory('--per_device_eval_batch_size'), run.autocast():
            loss, correct = negative_logp(cfg, model, x, y, positions, extras=True)
        total += torch.stack([loss.double().cpu(), correct.double().cpu()])
    loss, correct = (run.sum(total) / rows.targets[held_out].sum()).tolist()
    model.train()
    seconds = time.perf_counter() - started
    return {'eval_loss': loss, 'eval_mean_token_accuracy': correct, 'eval_runtime': seconds,
            'eval_samples_per_second': len(held_out) / seconds}


def answer_examples(cfg, model, tokenizer, rows):
    """What the model answers to the first held-out prompts, beside what it should, as text."""
    parts = []
    for i in np.flatnonzero(rows.held_out)[:cfg.sample_rows]:
        ids, targets = rows[i]
        start = int(np.flatnonzero(targets)[0])
        samples = generate(model, [ids[:start].tolist()], min(len(ids) - start + 32, 256), temperature=0, stop_ids=tokenizer.stop_ids)
        answer = tokenizer.decode(samples.tokens[0, :samples.lengths[0]].tolist())
        parts.append(f'{rows.where[i]}\n  prompt  ...{tokenizer.decode(ids[max(0, start - 60):start].tolist())!r}\n'
                     f'  wanted  {tokenizer.decode(ids[start:].tolist())!r}\n  answer  {answer!r}')
    return '\n'.join(parts)


# ---- what is said -----------------------------------------------------------------------------------------------------------

def choose(cfg, model, sources, batches, run):
    """Sets what was left open, and says so; clamps what cannot be. Returns (optimizer steps, steps of warm-up)."""
    chosen = {}
    if cfg.learning_rate is None:
        quantised = cfg.load_in_4bit or cfg.load_in_8bit
        full = 1.5e-3 if model.num_params() < SMALL else 1e-5
        chosen['learning_rate'] = 2e-4 if quantised else 1e-4 if cfg.use_lora else full
    if cfg.num_train_epochs is None:
        chosen['num_train_epochs'] = EMBEDDED_EPOCHS if is_embedded(sources) else 3
    for name, value in chosen.items():
        setattr(cfg, name, value)
    if chosen:
        run.print0('chosen    ' + ', '.join(f'{name}={value:g}' for name, value in chosen.items()) + ' (type the flags for others)')
    total = cfg.max_steps if cfg.max_steps > 0 else math.ceil(cfg.num_train_epochs * batches.steps_per_epoch)
    warmup = math.ceil(cfg.warmup_ratio * total) if cfg.warmup_steps is None else cfg.warmup_steps
    warmup = warmup_within(warmup, total, run.print0)
    for name in ('logging_steps', 'eval_steps'):
        if getattr(cfg, name) > total and (name != 'eval_steps' or cfg.eval_strategy == 'steps'):
            run.print0(f'note      {name}={getattr(cfg, name)} in a run of {total} steps: clamped to {total}')
            setattr(cfg, name, total)
    return total, warmup


def announce(cfg, model, rows, sources, batches, total, warmup, run):
    """What will be trained on what, and for how long, before the first step."""
    held_out, c = rows.held_out, model.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = ', '.join(source.name for source in sources)
    run.print0(f'data      {names}: {(~held_out).sum():,} rows to train on, {held_out.sum():,} held out; {rows.targets[~held_out].sum():,} '
                f'of {rows.lengths[~held_out].sum():,} tokens are learned (loss_on={cfg.loss_on})')
    order = (f'packed into {len(batches.packs):,}' if cfg.packing else
             'steps of similar length' if cfg.group_by_length else 'in any order')
    waste = f'{100 * batches.padding():.0f}% of a batch is padding' + ', which a CPU does not compute' * (run.device.type == 'cpu')
    run.print0(f'rows      longest {cfg.max_length} tokens, {order}: {waste}')
    how = '4-bit ' * cfg.load_in_4bit + '8-bit ' * cfg.load_in_8bit + ('LoRA' if getattr(model, 'adapters', None) else 'full')
    run.print0(f'model     {cfg.load_checkpoint or cfg.base_model_name} ({c.arch}): {how} fine-tuning, {trained:,} of '
                f'{model.num_params():,} parameters train')
    run.print0(f'machine   {describe_device(run)}')
    rates = [learning_rate(s, SCHEDULES[cfg.lr_scheduler_type], cfg.learning_rate, cfg.min_lr, warmup, total)
             for s in range(0, total, max(1, total // 240))]
    run.print0(f'schedule  {plots.sparkline(rates, 40)} {cfg.lr_scheduler_type} to {max(rates):g} after {warmup} steps of warm-up')
    often = {'steps': f'every {cfg.eval_steps} steps', 'epoch': 'after each epoch', 'no': 'never'}[cfg.eval_strategy]
    run.print0(f'run       {total:,} steps of {batches.size} rows, {total / batches.steps_per_epoch:.3g} epochs, evaluation {often}')
    if not cfg.low_cpu_mem_usage:
        run.print0('note      low_cpu_mem_usage=false: weights are mapped from disk in any case')
    if not cfg.remove_unused_columns:
        run.print0('note      remove_unused_columns=false: rows are encoded as they are read, no column is kept in any case')
    if cfg.use_lora and cfg.torch_dtype != 'float32' and run.device.type == 'cpu' and 'torch_dtype' in cfg.typed:
        run.print0(f'note      torch_dtype={cfg.torch_dtype}: on a CPU weights are float32')
    if run.device.type == 'cuda' and cfg.use_flash_attention:
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


# ---- resume -----------------------------------------------------------------------------------------------------------------

def named_checkpoint(cfg):
    """The folder that resume_from_checkpoint names; '' where it only says whether to resume."""
    wanted = cfg.resume_from_checkpoint or ''
    if wanted.lower() in ('', 'true', 'yes', 'false', 'no'):
        return ''
    path = str(resolve_link(wanted))
    if os.path.realpath(os.path.dirname(os.path.abspath(path))) != os.path.realpath(cfg.output_dir):
        raise UserError(f'resume_from_checkpoint={wanted} is no checkpoint of output_dir={cfg.output_dir}: name that folder too, or '
                        'take its weights alone with --load_checkpoint')
    return path


def first_epoch(cfg):
    """The number of epochs that the loaded checkpoint has behind it."""
    if not cfg.load_checkpoint:
        return 0
    state = read_json(os.path.join(resolve_link(cfg.load_checkpoint), 'trainer_state.json'))
    named = re.search(r'epoch_(\d+)/?$', cfg.load_checkpoint)
    return int(state['epoch']) if 'epoch' in state else int(named[1]) if named else 0


def restore(path, optimizer, average):
    """Puts the optimizer state of a checkpoint back, whose model build_model() has loaded; returns the trainer state.

    Where a mean of the weights is kept, the model's file holds the mean, and the optimizer's the weights of the last step.
    """
    tensors, state = read_checkpoint(path)
    last = {name: tensors.pop(name) for name in list(tensors) if name.startswith('weights/')}
    if average:
        for mean, flat in zip(average.means, optimizer.flats):
            mean.copy_(flat.data)
        average.swap()
        for name, held in average.state_dict().items():
            held.copy_(last[name])
        average.swap()
    optimizer.load_state_dict(tensors)
    return state


@dataclass
class Progress:
    """Where a run is: what a checkpoint holds besides tensors."""
    step: int = 0
    epochs_before: int = 0          # of the checkpoint that was loaded
    num_tokens: int = 0
    loss_sum: float = 0.0           # over all steps
    interval_loss: float = 0.0      # over those since the last log line
    interval_steps: int = 0
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    seconds: float = 0.0            # of training and evaluation, over all starts

    def settle(self, losses, run):
        """Adds the ranks' parts of the losses of some steps, and empties the list."""
        if losses:
            total = float(run.sum(torch.stack(losses).sum()))
            self.loss_sum, self.interval_loss = self.loss_sum + total, self.interval_loss + total
            self.interval_steps += len(losses)
            losses.clear()


# ---- the run ----------------------------------------------------------------------------------------------------------------

def refuse_or_warn(cfg, rows, findings, run):
    """UserError where rows must not be learned, or none are left; everything else that is wrong with the data is said."""
    if not cfg.skip_bad_rows:
        findings.stop()
    for line in findings.lines():
        run.print0('note      ' + line)
    if rows.held_out.all():
        reason = next(findings.lines(), 'every row is held out: rows to train on have "metadata": "train" or none')
        raise UserError(f'no row is left to train on; {reason}')
    if (cfg.patience or SCHEDULES[cfg.lr_scheduler_type] == 'plateau') and not rows.held_out.any():
        run.print0('note      no row is held out: patience and lr_scheduler_type=plateau have nothing to judge by, and do nothing')


def open_log(cfg, model, sources, rows, total, resume_step, run):
    header = {'script': 'train_sft.py', 'data': [source.name for source in sources], 'rows': int((~rows.held_out).sum()),
              'model': cfg.load_checkpoint or cfg.base_model_name, 'parameters': model.num_params(), 'machine': describe_device(run)}
    places = set(cfg.report_to) | ({'wandb'} if cfg.wandb_enabled else set())
    named = {'project': cfg.wandb_project, 'entity': cfg.wandb_entity, 'name': cfg.wandb_name, 'tags': cfg.wandb_tags}
    return Log(run, cfg.output_dir, header, total, bool(places & {'tensorboard', 'all'}),
               {key: value for key, value in named.items() if value} if places & {'wandb', 'all'} else None, resume_step)


def gradient_histograms(optimizer):
    """{'gradients/PARAMETER': tensor} of the last step, clipped."""
    return {f'gradients/{name}': grad for flat in optimizer.flats for name, grad in zip(flat.names, flat.grads)}


def finish(cfg, progress, metrics, log, run):
    """The last log line and the picture; with save_merged the whole model. Returns the final metrics."""
    seconds = progress.seconds
    summary = {'train_loss': progress.loss_sum / max(progress.step, 1), 'train_runtime': seconds, 'num_tokens': progress.num_tokens,
               'train_steps_per_second': progress.step / max(seconds, 1e-9), 'tokens_per_second': progress.num_tokens / max(seconds, 1e-9)}
    log.write(progress.step, summary)
    if run.is_main:
        plots.loss_picture(log.path, os.path.join(cfg.output_dir, 'loss.png'), os.path.basename(os.path.abspath(cfg.output_dir)))
    log.close()
    if cfg.save_merged and os.path.exists(os.path.join(cfg.output_dir, 'adapter_config.json')) and run.is_main:
        base = cfg.base_model_name if 'base_model_name' in cfg.typed else None
        merged, tokenizer = load_model(cfg.output_dir, base=base)
        save_model(merge_lora(merged, keep=False), tokenizer, os.path.join(cfg.output_dir, 'merged'))
    run.barrier()
    best = '' if progress.best_eval_loss is None else f'best eval_loss {progress.best_eval_loss:.4f}; '
    run.print0(f'{best}the model is in {cfg.output_dir}/: python evaluate.py --model-path {cfg.output_dir}')
    run.close()
    return {**metrics, **summary, 'best_eval_loss': progress.best_eval_loss, 'step': progress.step}


def main(cfg):
    saved, wanted, named = None, cfg.resume_from_checkpoint, named_checkpoint(cfg)
    if cfg.resume or (wanted or '').lower() not in ('', 'false', 'no'):
        cfg, saved = resume_config(cfg, cfg.output_dir, 'train_sft.py')
        cfg.resume_from_checkpoint = wanted                 # not what an earlier resume named
    run = setup(cfg.device, precision(cfg), cfg.matmul)
    stop = Stop(run)
    checkpoints = Checkpoints(cfg.output_dir, run, cfg.save_total_limit, cfg.save_only_model)
    resumed = named or checkpoints.latest() if saved else None
    if saved and not resumed and cfg.resume != 'auto':
        raise UserError(f'{cfg.output_dir} holds no whole checkpoint to resume from; start anew without --resume')
    model, tokenizer = build_model(cfg, resumed, run)
    rows, findings, sources = load_data(cfg, model, tokenizer, run)
    if cfg.check_data:
        return show_check(cfg, tokenizer, rows, findings, run)
    refuse_or_warn(cfg, rows, findings, run)
    if cfg.group_by_length is None:
        cfg.group_by_length = is_embedded(sources)
    batches = Batches(cfg, rows, [source.weight for source in sources], run.world_size)
    total, warmup = choose(cfg, model, sources, batches, run)
    optimizer = make_optimizer(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay, (cfg.adam_beta1, cfg.adam_beta2))
    average = WeightAverage(optimizer, cfg.ema) if cfg.ema else None
    averaged = average.swapped if average else contextlib.nullcontext
    scaler, plateau, progress = LossScale(run.dtype), Plateau(), Progress(epochs_before=first_epoch(cfg))
    if resumed:
        state = restore(resumed, optimizer, average)
        scaler, progress = LossScale(run.dtype, state['loss_scale']), Progress(**state['progress'])
        plateau.load_state_dict(state['plateau'])
        checkpoints.say_processes(resumed)
        checkpoints.discard_later(resumed)
        run.on_main(lambda: write_json(os.path.join(cfg.output_dir, 'run_config.json'), {**saved, 'config': as_dict(cfg)}))
    else:
        start_fresh(run, cfg.output_dir, as_dict(cfg), keep=cfg.load_checkpoint and resolve_link(cfg.load_checkpoint), script='train_sft.py')
    announce(cfg, model, rows, sources, batches, total, warmup, run)
    log = open_log(cfg, model, sources, rows, total, progress.step if resumed else None, run)
    started, before = time.perf_counter(), progress.seconds
    loader, flags, schedule = Loader(cfg, batches, total, run), TrainingAlerts(run), SCHEDULES[cfg.lr_scheduler_type]
    per_epoch, losses, metrics, since = batches.steps_per_epoch, [], {}, [time.perf_counter(), progress.num_tokens]
    epoch_now = lambda: progress.epochs_before + progress.step / per_epoch

    def save(best):
        progress.settle(losses, run)
        progress.seconds = before + time.perf_counter() - started
        whole = progress.step % per_epoch == 0
        name = cfg.checkpoint_name if whole or '{step}' in cfg.checkpoint_name else 'checkpoint-{step}'
        state = {'epoch': epoch_now(), 'step': progress.step, 'metrics': {k: v for k, v in metrics.items() if math.isfinite(v)},
                 'progress': asdict(progress), 'plateau': plateau.state_dict(), 'loss_scale': scaler.state}
        with averaged():
            held = {**optimizer.state_dict(), **(average.state_dict() if average else {})}
            checkpoints.save(progress.step, lambda directory: save_model(model, tokenizer, directory), held, state, best,
                             name.format(step=progress.step, epoch=round(epoch_now())))

    def validate():
        began = time.perf_counter()
        progress.settle(losses, run)
        with averaged():
            metrics.update(evaluate(cfg, model, rows, run))
            log.write(progress.step, {'epoch': epoch_now(), **metrics})
            if cfg.sample_rows and rows.held_out.any() and run.is_main:
                log.text(progress.step, 'examples', answer_examples(cfg, model, tokenizer, rows))
        log.histograms(progress.step, gradient_histograms(optimizer))
        flags.evaluation(progress, metrics['eval_loss'])
        best = metrics['eval_loss'] < (math.inf if progress.best_eval_loss is None else progress.best_eval_loss)
        if rows.held_out.any():
            plateau.update(metrics['eval_loss'])
            progress.best_eval_loss = metrics['eval_loss'] if best else progress.best_eval_loss
            progress.evaluations_since_best = 0 if best else progress.evaluations_since_best + 1
        since[0] += time.perf_counter() - began         # tokens_per_second is that of training
        return best and keeps_best

    keeps_best = cfg.save_strategy == 'best' or cfg.save_strategy != 'no' and cfg.load_best_model_at_end
    if cfg.eval_on_start and not resumed:
        save(validate())
    done = progress.step >= total
    while not done:
        lr = learning_rate(progress.step, schedule, cfg.learning_rate, cfg.min_lr, warmup, total)
        optimizer.set_lr(max(lr * plateau.scale, min(lr, cfg.min_lr)) if schedule == 'plateau' else lr)
        micro_batches, count, tokens = loader(progress.step)
        logging = (progress.step + 1) % cfg.logging_steps == 0
        loss, norm, correct, good = train_step(cfg, model, optimizer, micro_batches, count, progress.step, scaler, logging, run)
        losses.append(loss)
        progress.step, progress.num_tokens = progress.step + 1, progress.num_tokens + tokens
        if average:
            average.update(progress.step)
        flags.step(good, cfg.learning_rate, cfg.output_dir)
        if logging:
            progress.settle(losses, run)
            seconds = time.perf_counter() - since[0]
            line = {'epoch': epoch_now(), 'loss': progress.interval_loss / progress.interval_steps, 'grad_norm': norm,
                    'learning_rate': optimizer.param_groups[0]['lr'], 'mean_token_accuracy': float(run.sum(correct)) / max(count, 1),
                    'num_tokens': progress.num_tokens, 'tokens_per_second': (progress.num_tokens - since[1]) / seconds}
            log.write(progress.step, line)
            flags.train(line['loss'], norm)
            progress.interval_loss, progress.interval_steps, since = 0.0, 0, [time.perf_counter(), progress.num_tokens]
        log.progress(progress.step)
        stopping, done = stop.requested, progress.step >= total
        due = lambda when, n: done or when == 'steps' and progress.step % n == 0 or when == 'epoch' and progress.step % per_epoch == 0
        best = validate() if cfg.eval_strategy != 'no' and due(cfg.eval_strategy, cfg.eval_steps) else False
        if cfg.patience and progress.evaluations_since_best >= cfg.patience:
            run.print0(f'no better evaluation in {cfg.patience}: stopped at step {progress.step}')
            done = True
        if done or stopping or due(cfg.save_strategy, cfg.save_steps) or best:
            save(best)
        if stopping and not done:
            log.close()
            run.print0(f'stopped at step {progress.step}, saved; go on with: {resume_command()}')
            run.close()
            raise SystemExit(stop.code)
    return finish(cfg, progress, metrics, log, run)


if __name__ == '__main__':
    run_script(main, cfg)
