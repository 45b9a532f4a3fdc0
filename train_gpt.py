"""Pretraining: a GPT on a stream of tokens.

    python train_gpt.py --dataset=shakespeare_char
    python train_gpt.py recipes/gpt2_124m.py --batch_size=32
    torchrun --nproc_per_node=8 train_gpt.py --dataset=fineweb
    python train_gpt.py --init_from=resume --out_dir=out

The loss is the mean of -model(x, y) over every token of the optimizer step, counted over micro-batches and ranks: it does
not depend on how the batch is cut. Windows are drawn at random, as in nanoGPT, by a counter: step and row alone decide.
"""
import contextlib
import math
import os
import time
from dataclasses import dataclass, replace

from configurator import UserError, as_dict, parse, run_script, setting
from nanoforge.optim import OPTIMIZERS, SCHEDULES, Plateau, WeightAverage, learning_rate, make_optimizer

MAX_BAD_STEPS = 5       # steps in a row without a finite gradient after which a run stops
SIZES = {'cpu': dict(n_layer=4, n_head=4, n_embd=128, block_size=64),       # documented command: minutes on two cores
         'gpu': dict(n_layer=6, n_head=6, n_embd=384, block_size=256)}


@dataclass
class Config:
    # data
    dataset: str = 'shakespeare_char'  # a folder in data/; ours are prepared on first use
    training_mode: str = setting('single', choices=('single', 'multidataset', 'multicontext'))  # one data set; each micro-batch from one of several; aligned parallel streams
    dataset_list: list[str] = setting([])  # multidataset: the data sets
    dataset_sampling_probs: list[float] = setting([])  # multidataset: how often each is drawn; empty = equally
    multicontext_datasets: list[str] = setting([])  # multicontext: one aligned stream of tokens each
    batch_size: int = 64  # rows in a micro-batch, over all ranks
    gradient_accumulation_steps: int = 1  # micro-batches in an optimizer step, over all ranks
    block_size: int | None = None  # tokens in a row; by device: 64 on a CPU, 256 on a GPU
    # start
    init_from: str = setting('scratch', choices=('scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'))  # new weights; the run in out_dir; a pretrained model
    gpt2_type: str = 'gpt2'  # with init_from=gpt2: gpt2, gpt2-medium, gpt2-large, gpt2-xl or a local model directory
    seed: int = 1337  # of weights, data order and dropout
    # model
    arch: str = setting('qwen3', choices=('qwen3', 'llama', 'gpt2'))  # family: also the format on disk that other tools open
    n_layer: int | None = None  # by device: 4 on a CPU, 6 on a GPU
    n_head: int | None = None  # by device: 4 on a CPU, 6 on a GPU
    n_kv_head: int | None = None  # fewer key/value heads than n_head; as many if not set
    n_embd: int | None = None  # channels; by device: 128 on a CPU, 384 on a GPU
    n_inner: int | None = None  # width of the MLP; 8/3 n_embd when gated, else 4 n_embd
    activation: str | None = setting(None, choices=('silu', 'gelu', 'gelu_tanh'))  # of the MLP; the family's own if not set
    dropout: float = 0.0  # for pretraining 0 is good, for fine-tuning try 0.1
    bias: bool = False  # biases in linear layers and layer norms (arch=gpt2 as published: true)
    # optimizer
    optimizer: str = setting('adamw', choices=OPTIMIZERS)  # ours: adamw, sgd, muon; others by their name in torch.optim
    max_iters: int = 3500  # optimizer steps in all
    learning_rate: float = 1e-3  # the highest
    weight_decay: float = 0.1  # of matrices; norms and biases are spared
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.99  # decay of the second: high where a step sees few tokens
    momentum: float | None = None  # of sgd (0.9) and muon (0.95)
    grad_clip: float = 1.0  # highest gradient norm; 0 = no clipping
    ema: float | None = None  # decay of the mean of the weights that is evaluated and saved, 0 = off; 0.998 where the rate stays constant, else 0
    lr_scheduler: str = setting('none', choices=SCHEDULES)  # naming one asks for it; none = constant, or the cosine with --decay_lr
    decay_lr: bool = False  # decay the rate; typed --no-decay_lr beats lr_scheduler
    warmup_iters: int = 100  # steps of linear warm-up
    lr_decay_iters: int = 3500  # step at which the schedule reaches min_lr
    min_lr: float = 1e-4  # the lowest, about a tenth of learning_rate
    # evaluation and output
    out_dir: str = 'out'  # checkpoints, log and pictures; the model to use ends up in its root
    eval_interval: int = 250  # steps between evaluations, each followed by a checkpoint
    eval_iters: int = 200  # at most so many batches an evaluation; windows do not overlap
    log_interval: int = 10  # steps between log lines
    eval_only: bool = False  # evaluate what init_from names, and stop
    always_save_checkpoint: bool = False  # keep every checkpoint, not only the last and the best
    patience: int = 0  # stop after so many evaluations without a better one; 0 = never
    sample_tokens: int = 160  # tokens sampled at each evaluation; 0 = none
    tensorboard: bool = True  # events under logs/<run>/
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = 'nanoforge'  # its project
    wandb_run_name: str | None = None  # its run; the folder's name if not set
    # machine
    device: str = 'auto'  # auto = cuda, mps or cpu; or cuda:1, ...
    dtype: str = setting('auto', choices=('auto', 'float32', 'bfloat16', 'float16'))  # of autocast on a GPU; weights stay float32
    matmul: str = setting('auto', choices=('auto', 'float32', 'bf16'))  # products on a CPU; auto = bf16 where the processor has it
    compile: bool = False  # torch.compile the model: faster on a GPU after a minute

    def check(self):
        names = {'multidataset': 'dataset_list', 'multicontext': 'multicontext_datasets'}.get(self.training_mode)
        if names and len(getattr(self, names)) < 2:
            raise UserError(f'training_mode={self.training_mode} needs --{names} with two data sets or more')
        probs = self.dataset_sampling_probs
        if probs and len(probs) != len(self.dataset_list):
            raise UserError(f'dataset_sampling_probs has {len(probs)} values for the {len(self.dataset_list)} data sets of dataset_list')
        if any(not 0 <= p < math.inf for p in probs) or probs and sum(probs) == 0:
            raise UserError(f'dataset_sampling_probs must be 0 or more, and not all 0: {probs}')
        for name in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval', 'block_size', 'n_layer',
                     'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f'{name} must be 1 or more, not {getattr(self, name)}')
        for name in ('max_iters', 'warmup_iters', 'lr_decay_iters', 'patience', 'sample_tokens', 'dropout', 'grad_clip', 'weight_decay'):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f'{name} must be 0 or more, not {getattr(self, name)}')
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f'ema must be 0 or more and below 1, not {self.ema}')
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f'learning_rate must be above 0, not {self.learning_rate}')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanoforge import plots
from nanoforge.checkpoint import Checkpoints, read_checkpoint, resume_config, start_fresh, write_json
from data.corpus import Corpus, check_together, prepare_missing, windows
from data.tokenizer import load_tokenizer
from nanoforge.kernels import TargetLogp
from model import (FAMILIES, GPT, GPTConfig, from_hf_weights, load_model, read_safetensors, save_model)
from nanoforge.log import Log
from nanoforge.run import LossScale, Stop, describe_device, device_peak_flops, explain_out_of_memory, resume_command, seed_for, setup
from sample import generate


# ---- data -------------------------------------------------------------------------------------------------------------------

def open_data(cfg, run):
    """The data sets of this run as Corpus objects, checked against each other and the block size."""
    names = {'single': [cfg.dataset], 'multidataset': cfg.dataset_list, 'multicontext': cfg.multicontext_datasets}[cfg.training_mode]
    for name in dict.fromkeys(names):
        if run.is_main:
            prepare_missing(name)
    run.barrier()
    corpora = [Corpus(name) for name in names]
    check_together(corpora, streams=cfg.training_mode == 'multicontext')
    return corpora


def get_batch(cfg, corpora, step, run):
    """This rank's micro-batches of an optimizer step: [(x, y)], each (rows, T), with a last axis of streams in multicontext.

    Row i of a step begins where a counter says, whatever the number of ranks: whole micro-batches are shared out among them where
    that comes out even, else the rows of each.
    """
    accum, B, T = cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
    ranks, rank = run.world_size, run.rank
    mine = range(rank, accum, ranks) if accum % ranks == 0 else range(accum)
    rows = slice(None) if accum % ranks == 0 else slice(rank * B // ranks, (rank + 1) * B // ranks)
    batches = []
    for micro in mine:
        rng = np.random.default_rng(seed_for(cfg.seed, 'data', step, micro))
        if cfg.training_mode == 'multidataset':
            probs = cfg.dataset_sampling_probs or [1] * len(corpora)
            sources = [corpora[rng.choice(len(corpora), p=np.array(probs) / sum(probs))]]
        else:
            sources = corpora
        offsets = rng.integers(len(sources[0].tokens('train')) - T, size=B)[rows]           # aligned streams share them
        pairs = [windows(corpus.tokens('train'), offsets, T, run.device) for corpus in sources]
        batches.append(pairs[0] if cfg.training_mode != 'multicontext' else [torch.stack(part, -1) for part in zip(*pairs)])
    return batches


# ---- model ------------------------------------------------------------------------------------------------------------------

class MultiContextGPT(GPT):
    """Aligned streams: at each position one token per stream. Embeddings are summed, and each stream has its own tied head.

    model(idx) -> [logits (B, T, V_s) for each stream s]; model(idx, targets) -> log-probabilities (B, T, S), for idx (B, T, S).
    """

    def __init__(self, config, vocab_sizes):
        # what no one else's class can hold says so in its config.json
        extra = {'model_type': 'nanoforge_multicontext', 'architectures': ['MultiContextGPT'],
                 'nanoforge': {'multicontext': True, 'vocab_sizes': vocab_sizes}}
        super().__init__(replace(config, vocab_size=vocab_sizes[0], extra=extra))
        self.more_embeddings = nn.ModuleList(nn.Embedding(size, config.n_embd) for size in vocab_sizes[1:])

    def forward(self, idx, targets=None):
        tables = [self.embed_tokens, *self.more_embeddings]
        embeddings = sum(table(idx[..., s]) for s, table in enumerate(tables))                  # (B, T, C)
        hidden = self.hidden(idx[..., 0], embeddings=embeddings).float()
        logits = [F.linear(hidden, table.weight) for table in tables]
        if targets is None:
            return logits
        return torch.stack([TargetLogp.apply(z.flatten(0, 1), targets[..., s].flatten()).view(idx.shape[:2])
                            for s, z in enumerate(logits)], -1)


def build_model(cfg, corpora, run):
    """(model, tokenizer, cfg with every size set), weights new or pretrained; float32 on the run's device."""
    tokenizer = load_tokenizer(corpora[0].directory)
    if cfg.init_from.startswith('gpt2'):
        return load_pretrained(cfg, tokenizer, corpora, run)
    sizes = SIZES['cpu' if run.device.type == 'cpu' else 'gpu']
    chosen = {name: value for name, value in sizes.items() if getattr(cfg, name) is None}
    if chosen:
        run.print0(f'sizes for {run.device.type}: ' + ', '.join(f'{k}={v}' for k, v in chosen.items()) + ' (type the flags for others)')
    cfg = replace_typed(cfg, **chosen)
    family = dict(FAMILIES[cfg.arch], bias=cfg.bias)
    if cfg.activation:
        family['activation'] = cfg.activation
    vocab_sizes = [corpus.meta['vocab_size'] for corpus in corpora]
    shape = GPTConfig(arch=cfg.arch, vocab_size=max(vocab_sizes), block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head,
                      n_kv_head=cfg.n_kv_head or 0, n_embd=cfg.n_embd, n_inner=cfg.n_inner or 0, dropout=cfg.dropout,
                      **{**family, 'tied': True})
    model = MultiContextGPT(shape, vocab_sizes) if cfg.training_mode == 'multicontext' else GPT(shape)
    torch.manual_seed(seed_for(cfg.seed, 'weights'))
    return model.init_weights().to(run.device), tokenizer, cfg


def build_optimizer(cfg, model, run):
    return make_optimizer(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.momentum,
                          ns_dtype=torch.bfloat16 if run.matmul == 'bf16' else None)


def load_pretrained(cfg, tokenizer, corpora, run):
    name = cfg.gpt2_type if cfg.init_from == 'gpt2' else cfg.init_from
    model, own = load_model(name, run.device)
    if own is None or own.backend.get_vocab() != tokenizer.backend.get_vocab():     # character ids never reach a GPT-2
        raise UserError(f'data set {corpora[0].name!r} has the ids of a {corpora[0].meta["tokenizer"]} tokenizer, not those of {name}: '
                        f'prepare it with --tokenizer=gpt2 (python data/prepare.py NAME FILE --tokenizer gpt2)')
    shape = model.config
    for flag in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
        if getattr(cfg, flag) not in (None, getattr(shape, flag)):
            raise UserError(f'--{flag}={getattr(cfg, flag)} contradicts {name}, whose {flag} is {getattr(shape, flag)}: leave it out')
    block_size = min(cfg.block_size or shape.block_size, shape.block_size)
    if cfg.block_size and cfg.block_size > block_size:
        run.print0(f'block_size {cfg.block_size} is clamped to the {block_size} tokens of context that {name} has')
    for module in model.modules():
        if hasattr(module, 'dropout'):
            module.dropout = cfg.dropout
    shape.dropout = cfg.dropout
    return model, own, replace_typed(cfg, block_size=block_size, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)


def replace_typed(cfg, **changes):
    """dataclasses.replace that keeps which fields were typed."""
    changed = replace(cfg, **changes)
    changed.typed = getattr(cfg, 'typed', frozenset())
    return changed


# ---- evaluation -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(cfg, model, corpora, split, run):
    """{corpus name: mean loss in nats per token} over fixed windows of a split, no token twice.

    The windows depend on nothing but the data, the block size and eval_iters: the same from run to run and rank to rank.
    """
    model.eval()
    B, T, streams = cfg.batch_size, cfg.block_size, cfg.training_mode == 'multicontext'
    losses = {}
    for group in [corpora] if streams else [[corpus] for corpus in corpora]:
        limit = min(cfg.eval_iters * B, min((len(c.tokens('val')) - 1) // T for c in group))
        limit = limit if split == 'val' else -(-limit // 4)     # the training loss of every step is logged besides
        count = min(limit, (len(group[0].tokens(split)) - 1) // T)
        stride = (len(group[0].tokens(split)) - 1) // T // count
        starts = np.arange(count) * stride * T
        total = torch.zeros(len(group), dtype=torch.float64)
        for offsets in np.array_split(starts, -(-count // B))[run.rank::run.world_size]:
            pairs = [windows(corpus.tokens(split), offsets, T, run.device) for corpus in group]
            x, y = pairs[0] if not streams else [torch.stack(part, -1) for part in zip(*pairs)]
            with run.autocast():
                total -= model(x, y).view(-1, len(group)).double().sum(0).cpu()
        run.sum(total)
        losses.update({corpus.name: loss for corpus, loss in zip(group, (total / (count * T)).tolist())})
    model.train()
    return losses


def validate(cfg, model, corpora, run):
    """The metrics of one evaluation. eval_loss is the one that counts: of several data sets, their mean weighted by the probabilities."""
    val = evaluate(cfg, model, corpora, 'val', run)
    train = evaluate(cfg, model, corpora, 'train', run)
    weights = dict(zip((c.name for c in corpora), cfg.dataset_sampling_probs or [1] * len(corpora)))
    mean = lambda losses: sum(weights[name] * loss for name, loss in losses.items()) / sum(weights.values())
    metrics = {'eval_loss': mean(val), 'train_loss': mean(train)}
    if len(corpora) == 1:
        meta = corpora[0].meta
        metrics['bits_per_byte'] = metrics['eval_loss'] / math.log(2) * meta['val_tokens'] / meta['val_bytes']
    else:
        metrics.update({f'eval_loss/{name}': loss for name, loss in val.items()})
    return metrics


def sample_text(cfg, model, tokenizer, step):
    """A few lines in the model's own words, begun with a newline where the tokenizer has one."""
    start = tokenizer.encode('\n') or [0]
    samples = generate(model, [start], cfg.sample_tokens, temperature=0.8, seed=seed_for(cfg.seed, 'sample', step))
    return tokenizer.decode(samples.tokens[0][:samples.lengths[0]].tolist())


# ---- schedule and announcements ---------------------------------------------------------------------------------------------

def effective_schedule(cfg):
    """(name, why) of the schedule that the flags ask for."""
    typed = getattr(cfg, 'typed', ())
    if cfg.lr_scheduler == 'none':
        return ('cosine', 'decay_lr') if cfg.decay_lr else ('none', 'constant after the warm-up')
    if 'decay_lr' in typed and not cfg.decay_lr:
        return 'none', f'--no-decay_lr overrules lr_scheduler={cfg.lr_scheduler}'
    return cfg.lr_scheduler, 'lr_scheduler'


def announce(cfg, model, corpora, schedule, why, decay, seconds_per_step, run):
    """What will be trained on what, and for how long, before the first step."""
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
    for corpus in corpora:
        note = 'STAND-IN TEXT, not the real corpus: ' if corpus.meta['stand_in'] else ''
        run.print0(f'data      {corpus.name}: {note}{len(corpus.tokens("train")):,} + {len(corpus.tokens("val")):,} tokens, '
                    f'{corpus.meta["tokenizer"]} vocabulary of {corpus.meta["vocab_size"]:,}')
    c = model.config
    run.print0(f'model     {c.arch}: {model.num_params():,} parameters, {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, '
                f'context {cfg.block_size}')
    run.print0(f'machine   {describe_device(run)}')
    rates = [learning_rate(s, schedule, cfg.learning_rate, cfg.min_lr, cfg.warmup_iters, cfg.lr_decay_iters)
             for s in range(0, max(cfg.max_iters, 1), max(1, cfg.max_iters // 240))]
    run.print0(f'schedule  {plots.sparkline(rates, 40)} {schedule} ({why}), {max(rates):g} to {rates[-1]:g}')
    if schedule not in ('none', 'constant', 'plateau') and not 0.8 <= cfg.max_iters / max(cfg.lr_decay_iters, 1) <= 1.25:
        run.print0(f'          note: max_iters={cfg.max_iters} is far from lr_decay_iters={cfg.lr_decay_iters}, where the schedule ends')
    if decay:
        run.print0(f'weights   evaluated and saved is their mean over about {1 / (1 - decay):.0f} steps (--ema=0: those of the last step)')
    time_needed = f', about {seconds_per_step * cfg.max_iters / 60:.1f} minutes of training' if seconds_per_step else ''
    run.print0(f'run       {cfg.max_iters:,} steps of {tokens:,} tokens with {cfg.optimizer}{time_needed}, '
                f'an evaluation every {cfg.eval_interval} steps')


def flops_per_token(model, T):
    """Of a forward and backward pass: 6 per weight that is multiplied, 12 per layer, channel and position for attention (PaLM, appendix B)."""
    c = model.config
    multiplied = model.num_params() - (0 if c.tied else c.vocab_size * c.n_embd)
    return 6 * multiplied + 12 * c.n_layer * c.n_head * c.head_size * T


# ---- resume -----------------------------------------------------------------------------------------------------------------

def restore(path, cfg, model, optimizer, average, run):
    """Puts a checkpoint's weights and optimizer state back; returns the trainer state.

    Where a mean of the weights is kept, the model's file holds the mean, and the optimizer's the weights of the last step.
    """
    tensors, state = read_checkpoint(path)
    last = {name.removeprefix('weights/'): tensors.pop(name) for name in list(tensors) if name.startswith('weights/')}
    weights = from_hf_weights(model.config, read_safetensors(path))
    own = model.state_dict()
    if weights.keys() != own.keys() - {'lm_head.weight'} or any(weights[name].shape != own[name].shape for name in weights):
        raise UserError(f'{path} holds another architecture than the flags ask for: leave out those that change it')
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)                         # in place: the optimizer's flat buffers hold the parameters
        if average:
            for mean, flat in zip(average.means, optimizer.flats):
                mean.copy_(flat.data)
        for name, tensor in last.items():
            own[name].copy_(tensor)
    if state['optimizer'] == cfg.optimizer:
        optimizer.load_state_dict(tensors)
    else:
        run.print0(f'note: the run used {state["optimizer"]}; {cfg.optimizer} starts with a fresh state')
    return state


# ---- the run ----------------------------------------------------------------------------------------------------------------

def train_step(cfg, forward, optimizer, batches, scaler, run):
    """One optimizer step: (this rank's part of the mean loss over all its tokens, gradient norm before clipping, whether it was sound).

    A norm that is not finite skips the step.
    """
    count = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    optimizer.zero_grad()
    loss = torch.zeros((), device=run.device)
    for x, y in batches:
        with explain_out_of_memory('--batch_size', '--block_size'):
            with run.autocast():
                logp = forward(x, y)                                    # (B, T), and streams in multicontext
            part = -logp.sum() / (count * (logp.size(-1) if logp.dim() == 3 else 1))
            (part * scaler.value).backward()
        loss += part.detach()
    for grad in optimizer.grads:
        run.sum(grad)
    scaler.unscale_(optimizer.grads)
    norm = float(optimizer.clip_grad_norm(cfg.grad_clip))
    if math.isfinite(norm):
        optimizer.step()
    rescaled = scaler.update(math.isfinite(norm))           # a float16 scale that was too high is no fault of the model's
    return loss, norm, math.isfinite(norm) or rescaled


def main(cfg):
    saved = None
    if cfg.init_from == 'resume':
        cfg, saved = resume_config(cfg, cfg.out_dir, 'train_gpt.py', '--init_from=resume')
        cfg.init_from = saved['config']['init_from']        # what the weights were first made of says their architecture
    run = setup(cfg.device, cfg.dtype, cfg.matmul)
    stop = Stop(run)
    checkpoints = Checkpoints(cfg.out_dir, run, limit=None if cfg.always_save_checkpoint else 2)
    resumed = checkpoints.latest() if saved else None
    if saved and not resumed:
        raise UserError(f'{cfg.out_dir} holds no whole checkpoint to resume from; start anew without --init_from=resume')
    corpora = open_data(cfg, run)
    model, tokenizer, cfg = build_model(cfg, corpora, run)
    model.set_matmul(run.matmul)
    for corpus in corpora:
        corpus.check(cfg.block_size)
    if run.world_size > 1 and cfg.gradient_accumulation_steps % run.world_size and cfg.batch_size % run.world_size:
        raise UserError(f'{run.world_size} ranks can share neither gradient_accumulation_steps={cfg.gradient_accumulation_steps} '
                        f'micro-batches nor their batch_size={cfg.batch_size} rows evenly: make one of them divisible')
    optimizer = build_optimizer(cfg, model, run)
    scaler, plateau = LossScale(run.dtype), Plateau()
    schedule, why = effective_schedule(cfg)
    # A rate that stays high keeps the last step's weights noisy; one that falls settles them, and tuned weights need not move far
    decay = cfg.ema if cfg.ema is not None else 0.998 if schedule in ('none', 'constant') and not cfg.init_from.startswith('gpt2') else 0
    average = WeightAverage(optimizer, decay) if decay else None
    averaged = average.swapped if average else contextlib.nullcontext
    step, best_loss, since_best = 0, math.inf, 0
    if resumed:
        state = restore(resumed, cfg, model, optimizer, average, run)
        step, best_loss, since_best = state['step'], state['best_eval_loss'] or math.inf, state['evaluations_since_best']
        plateau.load_state_dict(state['plateau'])
        scaler = LossScale(run.dtype, state['loss_scale'])
    if cfg.eval_only:
        with averaged():
            metrics = validate(cfg, model, corpora, run)
        run.print0('  '.join(f'{k} {v:.4f}' for k, v in metrics.items()))
        run.close()
        return metrics
    if resumed:
        checkpoints.discard_later(resumed)
        run.on_main(lambda: write_json(os.path.join(cfg.out_dir, 'run_config.json'), {**saved, 'config': as_dict(cfg)}))
    else:
        start_fresh(run, cfg.out_dir, as_dict(cfg), script='train_gpt.py')
    forward = torch.compile(model) if cfg.compile else model
    header = {'script': 'train_gpt.py', 'data': [{k: c.meta[k] for k in ('source', 'stand_in')} | {'name': c.name} for c in corpora],
              'model': model.config.arch, 'parameters': model.num_params(), 'machine': describe_device(run)}
    announce(cfg, model, corpora, schedule, why, decay, time_step(cfg, forward, optimizer, corpora, run), run)
    wandb = {'project': cfg.wandb_project} | ({'name': cfg.wandb_run_name} if cfg.wandb_run_name else {})
    log = Log(run, cfg.out_dir, header, cfg.max_iters, cfg.tensorboard, wandb if cfg.wandb_log else None,
              step if resumed else None)

    def save(best):
        state = {'step': step, 'optimizer': cfg.optimizer, 'best_eval_loss': best_loss if math.isfinite(best_loss) else None,
                 'evaluations_since_best': since_best, 'plateau': plateau.state_dict(), 'loss_scale': scaler.state}
        with averaged():
            tensors = {**optimizer.state_dict(), **(average.state_dict() if average else {})}
            checkpoints.save(step, lambda directory: save_model(model, tokenizer, directory), tensors, state, best)

    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    first, bad_steps, losses, since, metrics = step, 0, [], time.perf_counter(), {}
    model.train()
    while True:
        if (step % cfg.eval_interval == 0 or step == cfg.max_iters) and step > first or step == cfg.max_iters:
            with averaged():
                metrics = validate(cfg, model, corpora, run)
            log.write(step, metrics)
            best, since_best = metrics['eval_loss'] < best_loss, since_best + 1
            if best:
                best_loss, since_best = metrics['eval_loss'], 0
            if schedule == 'plateau':
                plateau.update(metrics['eval_loss'])
            save(best)
            if run.is_main:
                with averaged():
                    show(cfg, model, tokenizer, step, log)
            since, losses = time.perf_counter(), []
        if step >= cfg.max_iters or cfg.patience and since_best >= cfg.patience:
            break
        if stop.requested:
            save(False)
            log.close()
            run.print0(f'stopped at step {step}, saved; go on with: {resume_command(flag="--init_from=resume")}')
            run.close()
            raise SystemExit(stop.code)

        lr = learning_rate(step, schedule, cfg.learning_rate, cfg.min_lr, cfg.warmup_iters, cfg.lr_decay_iters)
        if schedule == 'plateau':
            lr = max(lr * plateau.scale, min(lr, cfg.min_lr))
        optimizer.set_lr(lr)
        if cfg.dropout:
            torch.manual_seed(seed_for(cfg.seed, 'dropout', step, run.rank))
        loss, norm, good = train_step(cfg, forward, optimizer, get_batch(cfg, corpora, step, run), scaler, run)
        losses.append(loss)
        step += 1
        if average:
            average.update(step)
        bad_steps = 0 if good else bad_steps + 1
        if not good:
            run.print0(f'step {step}: the gradient is not finite, the step is skipped ({bad_steps} in a row)')
            if bad_steps == MAX_BAD_STEPS:
                raise UserError(f'{bad_steps} steps in a row without a finite gradient: lower --learning_rate={cfg.learning_rate:g}; '
                                f'the checkpoints in {cfg.out_dir} are good')
        if step % cfg.log_interval == 0:
            mean = float(run.sum(torch.stack(losses).mean()))
            seconds = time.perf_counter() - since
            line = {'loss': mean, 'learning_rate': lr, 'grad_norm': norm, 'num_tokens': step * tokens_per_step,
                    'tokens_per_second': round(len(losses) * tokens_per_step / seconds)}
            if peak := device_peak_flops(run.device):
                line['mfu'] = line['tokens_per_second'] * flops_per_token(model, cfg.block_size) / peak / run.world_size
            log.write(step, line)
            since, losses = time.perf_counter(), []
        log.progress(step)
    log.close()
    run.print0(f'best eval_loss {best_loss:.4f}; the model is in {cfg.out_dir}/: python sample.py {cfg.out_dir}')
    run.close()
    return {**metrics, 'best_eval_loss': best_loss, 'step': step}


def show(cfg, model, tokenizer, step, log):
    """The picture so far, and a sample of text to the console, samples.txt and TensorBoard."""
    plots.loss_picture(log.path, os.path.join(cfg.out_dir, 'loss.png'), f'{os.path.basename(os.path.abspath(cfg.out_dir))}')
    if cfg.sample_tokens and cfg.training_mode != 'multicontext':
        text = sample_text(cfg, model, tokenizer, step)
        with open(os.path.join(cfg.out_dir, 'samples.txt'), 'a', encoding='utf-8') as f:
            f.write(f'---- step {step}\n{text}\n')
        log.text(step, 'sample', text.strip())


def time_step(cfg, forward, optimizer, corpora, run):
    """Seconds of a forward and backward pass, times the micro-batches of a step (None when that would compile first): the weights
    stay as they are."""
    if cfg.compile or not cfg.max_iters:
        return None
    x, y = get_batch(cfg, corpora, 0, run)[0]
    for _ in range(2):                                                  # the first pass allocates
        started = time.perf_counter()
        with explain_out_of_memory('--batch_size', '--block_size'), run.autocast():
            forward(x, y).sum().backward()
    optimizer.zero_grad()
    return (time.perf_counter() - started) * cfg.gradient_accumulation_steps / (
        run.world_size if cfg.gradient_accumulation_steps % run.world_size == 0 else 1)


if __name__ == '__main__':
    run_script(main, cfg)
