"""Pretraining: a GPT on a stream of tokens.

    python train_gpt.py --dataset=shakespeare_char
    python train_gpt.py recipes/gpt2_124m.py --batch_size=32
    torchrun --nproc_per_node=8 train_gpt.py --dataset=fineweb
    python train_gpt.py --init_from=resume --out_dir=out

The loss is the mean of -log p(token | tokens before it) over every token of an optimizer step, counted over micro-batches
and ranks, so it does not depend on how the batch is cut. Rows are windows at random places of the text, as in nanoGPT;
unlike there, a counter (seed, step, micro-batch) draws them, so that a resumed run sees what it would have seen.
Settings that all scripts share stand in nanoforge/flags.py.
"""
import math
import os
from dataclasses import replace

from configurator import UserError, configclass, fill_in, parse, run_script, setting
from nanoforge.flags import RunFlags
from nanoforge.optim import OPTIMIZERS, SCHEDULES, WeightAverage, learning_rate, make_optimizer

SIZES = {'cpu': dict(n_layer=4, n_head=4, n_embd=128, block_size=64),       # minutes on two cores
         'gpu': dict(n_layer=6, n_head=6, n_embd=384, block_size=256)}


@configclass
class Config(RunFlags):
    section = ''

    # data
    dataset: str = 'shakespeare_char'  # a folder in data/; ours are prepared on first use
    training_mode: str = setting('single', choices=('single', 'multidataset', 'multicontext'))  # one data set; each
        # micro-batch from one of several; aligned parallel streams
    dataset_list: list[str] = []  # multidataset: the data sets
    dataset_sampling_probs: list[float] = []  # multidataset: how often each is drawn; empty = equally
    multicontext_datasets: list[str] = []  # multicontext: one aligned stream of tokens each
    batch_size: int = setting(64, min=1)  # rows in a micro-batch, over all ranks
    gradient_accumulation_steps: int = setting(1, min=1)  # micro-batches in an optimizer step, over all ranks
    block_size: int | None = setting(None, min=1)  # tokens in a row; by device: 64 on a CPU, 256 on a GPU
    # start
    init_from: str = setting('scratch', choices=('scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'))  # new
        # weights; the run in out_dir; a pretrained model
    gpt2_type: str = 'gpt2'  # with init_from=gpt2: gpt2, gpt2-medium, gpt2-large, gpt2-xl or a local model directory
    # model
    arch: str = setting('qwen3', choices=('qwen3', 'llama', 'gpt2'))  # family: also the format on disk that other tools open
    n_layer: int | None = setting(None, min=1)  # by device: 4 on a CPU, 6 on a GPU
    n_head: int | None = setting(None, min=1)  # by device: 4 on a CPU, 6 on a GPU
    n_kv_head: int | None = setting(None, min=1)  # fewer key/value heads than n_head; as many if not set
    n_embd: int | None = setting(None, min=1)  # channels; by device: 128 on a CPU, 384 on a GPU
    n_inner: int | None = setting(None, min=1)  # width of the MLP; 8/3 n_embd when gated, else 4 n_embd
    activation: str | None = setting(None, choices=('silu', 'gelu', 'gelu_tanh'))  # of the MLP; the family's own if not set
    dropout: float = setting(0.0, min=0, below=1)  # for pretraining 0 is good, for fine-tuning try 0.1
    bias: bool = False  # biases in linear layers and layer norms (arch=gpt2 as published: true)
    # optimizer
    optimizer: str = setting('adamw', choices=OPTIMIZERS)  # ours: adamw, sgd, muon; others by their name in torch.optim
    max_iters: int = setting(3500, min=0, also=('max_steps',))  # optimizer steps in all
    learning_rate: float = setting(1e-3, above=0, also=('lr',))  # the highest
    weight_decay: float = setting(0.1, min=0)  # of matrices; norms and biases are spared
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.99  # decay of the second: high where a step sees few tokens
    momentum: float | None = None  # of sgd (0.9) and muon (0.95)
    grad_clip: float = setting(1.0, min=0, also=('max_grad_norm',))  # highest gradient norm; 0 = no clipping
    ema: float | None = setting(None, min=0, below=1)  # decay of the mean of the weights that is evaluated and saved,
        # 0 = off; 0.998 where the rate stays constant, else 0
    lr_scheduler: str = setting('none', choices=SCHEDULES)  # naming one asks for it; none = constant, or the cosine with
        # --decay_lr
    decay_lr: bool = False  # decay the rate; typed --no-decay_lr beats lr_scheduler
    warmup_iters: int = setting(100, min=0)  # steps of linear warm-up
    lr_decay_iters: int = setting(3500, min=0)  # step at which the schedule reaches min_lr
    min_lr: float = 1e-4  # the lowest, about a tenth of learning_rate
    # evaluation and output
    out_dir: str = setting('out', also=('output_dir',))  # checkpoints, log and pictures; the model ends up in its root
    eval_interval: int = setting(250, min=1)  # steps between evaluations, each followed by a checkpoint
    eval_iters: int = setting(200, min=1)  # at most so many batches an evaluation; windows do not overlap
    log_interval: int = setting(10, min=1)  # steps between log lines
    eval_only: bool = False  # evaluate what init_from names, and stop
    always_save_checkpoint: bool = False  # keep every checkpoint, not only the last and the best
    patience: int = setting(0, min=0)  # stop after so many evaluations without a better one; 0 = never
    sample_tokens: int = setting(160, min=0)  # tokens sampled at each evaluation; 0 = none
    compile: bool = False  # torch.compile each layer: faster on a GPU after half a minute

    def check(self):
        super().check()
        lists = {'multidataset': 'dataset_list', 'multicontext': 'multicontext_datasets'}
        needed = lists.get(self.training_mode)
        if needed and len(getattr(self, needed)) < 2:
            raise UserError(f'training_mode={self.training_mode} needs --{needed} with two data sets or more')
        probs = self.dataset_sampling_probs
        if probs and len(probs) != len(self.dataset_list):
            raise UserError(f'dataset_sampling_probs has {len(probs)} values for the {len(self.dataset_list)} data sets of '
                            'dataset_list')
        if any(not 0 <= p < math.inf for p in probs) or probs and sum(probs) == 0:
            raise UserError(f'dataset_sampling_probs must be 0 or more, and not all 0: {probs}')


def main(cfg):
    run = Run.open(cfg, 'train_gpt.py', cfg.out_dir, resume=cfg.resume or cfg.init_from == 'resume',
                   resume_flag='--init_from=resume', memory_flags=('--batch_size', '--block_size'),
                   limit=None if cfg.always_save_checkpoint else 2)
    cfg = run.cfg
    if run.resumed:
        cfg.init_from = run.saved['config']['init_from']        # what the weights were first made of says their architecture
    corpora = open_data(cfg, run)
    model, tokenizer = build_model(cfg, corpora, run)           # new, pretrained, or the checkpoint that is resumed
    check_batch(cfg, corpora, run)
    optimizer = build_optimizer(cfg, model, run)
    schedule, why = effective_schedule(cfg)
    ema = WeightAverage(optimizer, ema_decay(cfg, schedule))    # decay 0: there is no average
    state = run.restore(State(cfg.optimizer), optimizer, ema)
    if cfg.eval_only:
        with ema.swapped():
            metrics = validate(cfg, model, corpora, run)
        return run.finish(metrics, '  '.join(f'{key} {value:.4f}' for key, value in metrics.items()))
    print_summary(cfg, model, corpora, schedule, why, ema, run)
    first_step, metrics = state.step, {}
    log = run.start(cfg.max_iters, first_step, describe(model, corpora), cfg.log_interval,
                    flops_per_token=flops_per_token(model, cfg.block_size))
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    targets_per_step = tokens_per_step * (len(corpora) if cfg.training_mode == 'multicontext' else 1)
    if cfg.compile:
        for layer in model.layers:                              # one graph for all of them; the head is quicker as it is
            layer.compile()
    model.train()

    def save(best=False):
        run.save(state, model, tokenizer, optimizer, ema, best)

    while True:
        # ---- once in a while: validate, checkpoint, plot, sample; a resumed run has done that at its first step already
        last = state.step >= cfg.max_iters
        if last or (state.step % cfg.eval_interval == 0 and state.step > first_step):
            with log.pause(), ema.swapped():
                metrics = validate(cfg, model, corpora, run)
                log.write(state.step, metrics)
            with log.pause():
                save(best=state.note_eval(metrics['eval_loss']))
                with ema.swapped():
                    show(cfg, model, tokenizer, state.step, log, run)
        if last or 0 < cfg.patience <= state.evaluations_since_best:
            break
        run.exit_if_asked(save)

        # ---- one optimizer step; its batch is a function of (seed, step), so there is no data state to restore
        lr = learning_rate(state.step, schedule, cfg.learning_rate, cfg.min_lr, cfg.warmup_iters, cfg.lr_decay_iters)
        if schedule == 'plateau':                               # scaled down where eval_loss stalls, never below min_lr
            lr = max(lr * state.plateau['scale'], min(lr, cfg.min_lr))
        if cfg.dropout:
            torch.manual_seed(seed_for(cfg.seed, 'dropout', state.step, run.rank))
        loss = 0.0
        for x, y in get_batch(cfg, corpora, state.step, run):   # this rank's micro-batches, (B, T) each
            with run.autocast():
                logp = model(x, y)                              # (B, T), and streams in multicontext
            # divided by the targets of the whole step, not of the micro-batch: the gradients add up to that of the mean
            nll = -logp.sum() / targets_per_step
            run.backward(nll)
            loss += nll.detach()
        grad_norm = run.step(optimizer, lr, cfg.grad_clip)      # sum over ranks, clip, step; a non-finite one is skipped
        state.step += 1
        state.num_tokens = state.step * tokens_per_step
        ema.update(state.step)
        log.train(state.step, tokens_per_step, loss=loss, learning_rate=lr, grad_norm=grad_norm, num_tokens=state.num_tokens)
    best_loss = math.nan if state.best_eval_loss is None else state.best_eval_loss
    return run.finish({**metrics, 'best_eval_loss': best_loss, 'step': state.step},
                      f'best eval_loss {best_loss:.4f}; the model is in {cfg.out_dir}/: python sample.py {cfg.out_dir}')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.corpus import Corpus, check_together, prepare_missing, windows
from data.tokenizer import load_tokenizer
from model import FAMILIES, GPT, GPTConfig, from_hf_weights, load_model, read_safetensors
from nanoforge import plots
from nanoforge.kernels import TargetLogp
from nanoforge.run import Run, State, describe_device, seed_for
from sample import generate


# ---- data -----------------------------------------------------------------------------------------------------------

def open_data(cfg, run):
    """The data sets of this run as Corpus objects, checked against each other."""
    names = {'single': [cfg.dataset], 'multidataset': cfg.dataset_list, 'multicontext': cfg.multicontext_datasets}
    names = names[cfg.training_mode]
    for name in dict.fromkeys(names):
        if run.is_main:
            prepare_missing(name)
    run.barrier()
    corpora = [Corpus(name) for name in names]
    check_together(corpora, streams=cfg.training_mode == 'multicontext')
    return corpora


def check_batch(cfg, corpora, run):
    """UserError where a text is shorter than a row, or the ranks cannot share the batch evenly."""
    for corpus in corpora:
        corpus.check(cfg.block_size)
    ranks = run.world_size
    if cfg.gradient_accumulation_steps % ranks and cfg.batch_size % ranks:
        raise UserError(f'{ranks} ranks can share neither gradient_accumulation_steps={cfg.gradient_accumulation_steps} '
                        f'micro-batches nor their batch_size={cfg.batch_size} rows evenly: make one of them divisible')


def get_batch(cfg, corpora, step, run):
    """This rank's micro-batches of an optimizer step: [(x, y)], each (rows, T), with a last axis of streams in multicontext.

    Row i of a step begins where a counter says, whatever the number of ranks: whole micro-batches are dealt out among them
    where that comes out even, else the rows of each.
    """
    accum, B, T = cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
    micro_batches, rows = range(run.rank, accum, run.world_size), slice(None)
    if accum % run.world_size:
        micro_batches, rows = range(accum), slice(run.rank * B // run.world_size, (run.rank + 1) * B // run.world_size)
    batches = []
    for micro in micro_batches:
        rng = np.random.default_rng(seed_for(cfg.seed, 'data', step, micro))
        drawn = corpora
        if cfg.training_mode == 'multidataset':
            probs = np.array(cfg.dataset_sampling_probs or [1] * len(corpora))
            drawn = [corpora[rng.choice(len(corpora), p=probs / probs.sum())]]
        offsets = rng.integers(len(drawn[0].tokens('train')) - T, size=B)[rows]     # aligned streams share them
        batches.append(read_windows(cfg, drawn, 'train', offsets, run))
    return batches


def read_windows(cfg, corpora, split, offsets, run):
    """x, y (rows, T) from these offsets of a corpus; of aligned streams (rows, T, S)."""
    pairs = [windows(corpus.tokens(split), offsets, cfg.block_size, run.device) for corpus in corpora]
    if cfg.training_mode != 'multicontext':
        return pairs[0]
    return [torch.stack(streams, -1) for streams in zip(*pairs)]


# ---- model ----------------------------------------------------------------------------------------------------------

class MultiContextGPT(GPT):
    """Aligned streams: at each position one token per stream. Embeddings are summed, and each stream has its own tied head.

    model(idx) -> [logits (B, T, V_s) for each stream s]; model(idx, targets) -> log-probabilities (B, T, S), idx (B, T, S).
    """

    def __init__(self, config, vocab_sizes):
        # no other tool has a class for it: config.json says so
        extra = {'model_type': 'nanoforge_multicontext', 'architectures': ['MultiContextGPT'],
                 'nanoforge': {'multicontext': True, 'vocab_sizes': vocab_sizes}}
        super().__init__(replace(config, vocab_size=vocab_sizes[0], extra=extra))
        self.more_embeddings = nn.ModuleList(nn.Embedding(size, config.n_embd) for size in vocab_sizes[1:])

    def forward(self, idx, targets=None):
        tables = [self.embed_tokens, *self.more_embeddings]
        embeddings = sum(table(idx[..., s]) for s, table in enumerate(tables))          # (B, T, C)
        hidden = self.hidden(idx[..., 0], embeddings=embeddings).float()
        logits = [F.linear(hidden, table.weight) for table in tables]                   # S times (B, T, V_s)
        if targets is None:
            return logits
        logp = [TargetLogp.apply(z.flatten(0, 1), targets[..., s].flatten()).view(idx.shape[:2])
                for s, z in enumerate(logits)]
        return torch.stack(logp, -1)


def build_model(cfg, corpora, run):
    """(model, tokenizer), weights new, pretrained or resumed, float32 on the run's device. Sets the sizes that cfg left open."""
    tokenizer = load_tokenizer(corpora[0].directory)
    if cfg.init_from.startswith('gpt2'):
        model = load_pretrained(cfg, tokenizer, corpora, run)
    else:
        kind = 'cpu' if run.device.type == 'cpu' else 'gpu'
        if chosen := fill_in(cfg, **SIZES[kind]):
            run.print0(f'sizes for {run.device.type}: {chosen} (type the flags for others)')
        model = new_model(cfg, corpora)
        torch.manual_seed(seed_for(cfg.seed, 'weights'))
        model.init_weights()
    if run.resumed:
        load_resumed(model, run.resumed)
    return model.to(run.device).set_matmul(run.matmul), tokenizer


def new_model(cfg, corpora):
    """The GPT that the flags describe, its weights not yet drawn."""
    family = {**FAMILIES[cfg.arch], 'bias': cfg.bias, 'tied': True}
    if cfg.activation:
        family['activation'] = cfg.activation
    vocab_sizes = [corpus.meta['vocab_size'] for corpus in corpora]
    config = GPTConfig(arch=cfg.arch, vocab_size=max(vocab_sizes), block_size=cfg.block_size, n_layer=cfg.n_layer,
                       n_head=cfg.n_head, n_kv_head=cfg.n_kv_head or 0, n_embd=cfg.n_embd, n_inner=cfg.n_inner or 0,
                       dropout=cfg.dropout, **family)
    return MultiContextGPT(config, vocab_sizes) if cfg.training_mode == 'multicontext' else GPT(config)


def load_pretrained(cfg, tokenizer, corpora, run):
    """A GPT-2, or the model directory of gpt2_type, for data of the same tokenizer; cfg takes over its sizes."""
    name = cfg.gpt2_type if cfg.init_from == 'gpt2' else cfg.init_from
    model, own = load_model(name, run.device)
    if own is None or own.backend.get_vocab() != tokenizer.backend.get_vocab():     # character ids never reach a GPT-2
        raise UserError(f'data set {corpora[0].name!r} has the ids of a {corpora[0].meta["tokenizer"]} tokenizer, not those of '
                        f'{name}: prepare it with --tokenizer=gpt2 (python data/prepare.py NAME FILE --tokenizer gpt2)')
    config = model.config
    for flag in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
        if getattr(cfg, flag) not in (None, getattr(config, flag)):
            raise UserError(f'--{flag}={getattr(cfg, flag)} contradicts {name}, whose {flag} is {getattr(config, flag)}: '
                            'leave it out')
    if cfg.block_size and cfg.block_size > config.block_size:
        run.print0(f'block_size {cfg.block_size} is clamped to the {config.block_size} tokens of context that {name} has')
    cfg.block_size = min(cfg.block_size or config.block_size, config.block_size)
    cfg.n_layer, cfg.n_head, cfg.n_embd = config.n_layer, config.n_head, config.n_embd
    for module in [model, *model.modules()]:
        if hasattr(module, 'dropout'):
            module.dropout = cfg.dropout
    config.dropout = cfg.dropout
    return model


def load_resumed(model, checkpoint):
    """Overwrites the weights of `model` with a checkpoint's (the mean of the weights, where one is kept)."""
    weights, own = from_hf_weights(model.config, read_safetensors(checkpoint)), model.state_dict()
    if weights.keys() != own.keys() - {'lm_head.weight'} or any(weights[name].shape != own[name].shape for name in weights):
        raise UserError(f'{checkpoint} holds another architecture than the flags ask for: leave out those that change it')
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


# ---- optimizer and schedule -----------------------------------------------------------------------------------------

def build_optimizer(cfg, model, run):
    return make_optimizer(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.momentum,
                          ns_dtype=torch.bfloat16 if run.matmul == 'bf16' else None)


def effective_schedule(cfg):
    """(name, why) of the schedule that the flags ask for."""
    if cfg.lr_scheduler == 'none':
        return ('cosine', 'decay_lr') if cfg.decay_lr else ('none', 'constant after the warm-up')
    if 'decay_lr' in getattr(cfg, 'typed', ()) and not cfg.decay_lr:
        return 'none', f'--no-decay_lr overrules lr_scheduler={cfg.lr_scheduler}'
    return cfg.lr_scheduler, 'lr_scheduler'


def ema_decay(cfg, schedule):
    """A rate that stays high keeps the last step's weights noisy, and their mean is better; one that falls settles them by
    itself, and the weights of a pretrained model need not move far."""
    if cfg.ema is not None:
        return cfg.ema
    return 0.998 if schedule in ('none', 'constant') and not cfg.init_from.startswith('gpt2') else 0


# ---- evaluation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(cfg, model, corpora, split, run):
    """{corpus name: mean loss in nats per token} over fixed windows of a split, no token twice.

    The windows depend on nothing but the data, the block size and eval_iters: the same from run to run and rank to rank.
    """
    model.eval()
    B, T = cfg.batch_size, cfg.block_size
    losses = {}
    for group in [corpora] if cfg.training_mode == 'multicontext' else [[corpus] for corpus in corpora]:
        available = (len(group[0].tokens(split)) - 1) // T
        limit = min(cfg.eval_iters * B, min((len(corpus.tokens('val')) - 1) // T for corpus in group))
        if split == 'train':
            limit = -(-limit // 4)          # the training loss of every step is logged besides
        count = min(limit, available)
        starts = np.arange(count) * (available // count) * T
        total = torch.zeros(len(group), dtype=torch.float64)
        for offsets in np.array_split(starts, -(-count // B))[run.rank::run.world_size]:
            x, y = read_windows(cfg, group, split, offsets, run)
            with run.autocast():
                total -= model(x, y).view(-1, len(group)).double().sum(0).cpu()
        run.sum(total)
        losses.update({corpus.name: loss for corpus, loss in zip(group, (total / (count * T)).tolist())})
    model.train()
    return losses


def validate(cfg, model, corpora, run):
    """The metrics of an evaluation. eval_loss is the one that counts: of several data sets the mean, weighted as they are drawn."""
    weights = dict(zip((corpus.name for corpus in corpora), cfg.dataset_sampling_probs or [1] * len(corpora)))
    metrics = {}
    for split, key in (('val', 'eval_loss'), ('train', 'train_loss')):
        losses = evaluate(cfg, model, corpora, split, run)
        metrics[key] = sum(weights[name] * loss for name, loss in losses.items()) / sum(weights.values())
        if len(corpora) > 1 and split == 'val':
            metrics.update({f'eval_loss/{name}': loss for name, loss in losses.items()})
    if len(corpora) == 1:
        meta = corpora[0].meta
        metrics['bits_per_byte'] = metrics['eval_loss'] / math.log(2) * meta['val_tokens'] / meta['val_bytes']
    return metrics


def show(cfg, model, tokenizer, step, log, run):
    """The picture so far, and a sample of text to the console, samples.txt and TensorBoard."""
    if not run.is_main:
        return
    plots.loss_picture(log.path, os.path.join(cfg.out_dir, 'loss.png'), os.path.basename(os.path.abspath(cfg.out_dir)))
    if cfg.sample_tokens and cfg.training_mode != 'multicontext':
        start = tokenizer.encode('\n') or [0]
        samples = generate(model, [start], cfg.sample_tokens, temperature=0.8, seed=seed_for(cfg.seed, 'sample', step))
        text = tokenizer.decode(samples.tokens[0][:samples.lengths[0]].tolist())
        with open(os.path.join(cfg.out_dir, 'samples.txt'), 'a', encoding='utf-8') as file:
            file.write(f'---- step {step}\n{text}\n')
        log.text(step, 'sample', text.strip())


# ---- what is printed before the first step ---------------------------------------------------------------------------

def describe(model, corpora):
    """What the run is, for the first line of log.jsonl."""
    data = [{'source': corpus.meta['source'], 'stand_in': corpus.meta['stand_in'], 'name': corpus.name} for corpus in corpora]
    return {'data': data, 'model': model.config.arch, 'parameters': model.num_params()}


def print_summary(cfg, model, corpora, schedule, why, ema, run):
    """What will be trained on what."""
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
    for corpus in corpora:
        note = 'STAND-IN TEXT, not the real corpus: ' if corpus.meta['stand_in'] else ''
        run.print0(f'data      {corpus.name}: {note}{len(corpus.tokens("train")):,} + {len(corpus.tokens("val")):,} tokens, '
                   f'{corpus.meta["tokenizer"]} vocabulary of {corpus.meta["vocab_size"]:,}')
    c = model.config
    run.print0(f'model     {c.arch}: {model.num_params():,} parameters, {c.n_layer} layers, {c.n_head} heads, {c.n_embd} '
               f'channels, context {cfg.block_size}')
    run.print0(f'machine   {describe_device(run)}')
    rates = [learning_rate(step, schedule, cfg.learning_rate, cfg.min_lr, cfg.warmup_iters, cfg.lr_decay_iters)
             for step in range(0, max(cfg.max_iters, 1), max(1, cfg.max_iters // 240))]
    run.print0(f'schedule  {plots.sparkline(rates, 40)} {schedule} ({why}), {max(rates):g} to {rates[-1]:g}')
    if schedule not in ('none', 'constant', 'plateau') and not 0.8 <= cfg.max_iters / max(cfg.lr_decay_iters, 1) <= 1.25:
        run.print0(f'          note: max_iters={cfg.max_iters} is far from lr_decay_iters={cfg.lr_decay_iters}, where the '
                   'schedule ends')
    if ema.decay:
        run.print0(f'weights   evaluated and saved is their mean over about {1 / (1 - ema.decay):.0f} steps (--ema=0: those of '
                   'the last step)')
    run.print0(f'run       {cfg.max_iters:,} steps of {tokens:,} tokens with {cfg.optimizer}, an evaluation every '
               f'{cfg.eval_interval} steps')


def flops_per_token(model, T):
    """Of a forward and backward pass: 6 per weight that is multiplied, 12 per layer, channel and position for attention
    (PaLM, appendix B)."""
    c = model.config
    multiplied = model.num_params() - (0 if c.tied else c.vocab_size * c.n_embd)
    return 6 * multiplied + 12 * c.n_layer * c.n_head * c.head_size * T


if __name__ == '__main__':
    run_script(main, cfg)
