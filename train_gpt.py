"""Pretraining: a GPT on a stream of tokens.

    python train_gpt.py --dataset=shakespeare_char
    python train_gpt.py recipes/gpt2_124m.py --batch_size=32
    torchrun --nproc_per_node=8 train_gpt.py --dataset=fineweb
    python train_gpt.py --init_from=resume --out_dir=out

The loss is the mean over the N tokens of an optimizer step of -log p(token | the tokens before it).
Where this departs from nanoGPT's train.py:
  - N counts micro-batches and ranks: neither the gradient nor the logged loss depends on how a batch is cut;
  - rows begin at random places, but a counter (seed, step, micro-batch) draws them: a resumed run sees what
    it would have seen, on any number of ranks;
  - validation reads fixed windows, no token twice; with a constant learning rate the weights that are
    evaluated and saved are their running mean (ema).
Settings that several scripts share stand in nanoforge/flags.py. torch is imported below main, so that --help
answers at once.
"""
import math
import os
import shlex
from dataclasses import replace

from configurator import UserError, configclass, fill_in, parse, run_script, setting
from nanoforge.flags import MODEL_NAMES, OptimizerFlags, RunFlags
from nanoforge.optim import SCHEDULES, WeightAverage, learning_rate, make_optimizer, warmup_within

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# what settings of a new model and of a falling rate need
SCRATCH = ('init_from=scratch', 'init_from=resume')
DECAY = ('decay_lr=true', *(f'lr_scheduler={name}' for name in SCHEDULES[2:]))      # all but none, constant
MUONS = 'optimizer=muon', 'optimizer=normuon'
DATASETS_OF = {'multidataset': 'dataset_list', 'multicontext': 'multicontext_datasets'}


@configclass
class Config(RunFlags, OptimizerFlags):
    section = ''
    weight_decay = 0.1

    # data
    dataset: str = setting('shakespeare_char', needs=('training_mode=single',))  # a folder in data/; ours
        # are prepared on first use
    training_mode: str = setting('single', choices=('single', 'multidataset', 'multicontext'))
        # single: one data set; multidataset: each micro-batch from one of several; multicontext: aligned
        # streams
    dataset_list: list[str] = []  # multidataset: the data sets
    dataset_sampling_probs: list[float] = []  # multidataset: how often each is drawn; empty = equally
    multicontext_datasets: list[str] = []  # multicontext: one aligned stream of tokens each
    batch_size: int = setting(64, min=1)  # rows of a micro-batch, over all GPUs together
    block_size: int | None = setting(None, min=1)  # tokens in a row; by device: 64 on a CPU, 256 on a GPU
    # start
    init_from: str = setting('scratch', choices=('scratch', 'resume', *GPT2))  # scratch: new
        # weights; resume: the run in out_dir, as --resume; gpt2...: a pretrained model
    gpt2_type: str = setting('gpt2', also=MODEL_NAMES)  # what init_from=gpt2 begins as: one of the four
        # sizes, or a local model directory
    # model
    arch: str = setting('qwen3', choices=('qwen3', 'llama', 'gpt2'), needs=SCRATCH)  # family, and so the
        # format on disk
    n_layer: int | None = setting(None, min=1)  # by device: 4 on a CPU, 6 on a GPU
    n_head: int | None = setting(None, min=1)  # by device: 4 on a CPU, 6 on a GPU
    n_kv_head: int | None = setting(None, min=1)  # fewer key/value heads than n_head; as many if not set
    n_embd: int | None = setting(None, min=1)  # channels; by device: 128 on a CPU, 384 on a GPU
    n_inner: int | None = setting(None, min=1)  # width of the MLP; 8/3 n_embd when gated, else 4 n_embd
    activation: str | None = setting(None, choices=('silu', 'gelu', 'gelu_tanh'), needs=SCRATCH)  # of
        # the MLP; the family's own if not set
    dropout: float = setting(0.0, min=0, below=1)  # for pretraining 0 is good, for fine-tuning try 0.1
    bias: bool = setting(False, needs=SCRATCH)  # in linear layers and norms; the published GPT-2 has them
    # optimizer
    max_iters: int = setting(3500, min=0, also=('max_steps',))  # optimizer steps in all
    learning_rate: float = setting(1e-3, above=0, also=('lr',))  # the highest
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.99  # decay of the second: high where a step sees few tokens
    momentum: float | None = setting(None, needs=('optimizer=sgd', *MUONS))  # of sgd (0.9), muon (0.95)
    adam_lr: float | None = setting(None, above=0, needs=MUONS)  # muon: the rate of embeddings, head and
        # vectors, which AdamW trains; learning_rate if not set
    grad_clip: float = setting(1.0, min=0, also=('max_grad_norm',))  # highest gradient norm; 0 = no clipping
    ema: float | None = setting(None, min=0, below=1)  # decay of the mean of the weights, which is evaluated
        # and saved; 0 = off; 0.998 where the rate stays constant, else 0
    lr_scheduler: str = setting('none', choices=SCHEDULES)  # none = constant, or the cosine with --decay_lr
    decay_lr: bool = False  # decay the rate; typed --no-decay_lr beats lr_scheduler
    warmup_iters: int = setting(100, min=0)  # steps of linear warm-up
    lr_decay_iters: int = setting(3500, min=0, needs=DECAY)  # step at which the schedule reaches min_lr
    min_lr: float = setting(1e-4, needs=DECAY)  # the lowest, about a tenth of learning_rate
    # evaluation and output
    out_dir: str = setting('out', also=('output_dir',))  # checkpoints, log, pictures; the model in its root
    eval_interval: int = setting(250, min=1)  # steps between evaluations, each followed by a checkpoint
    eval_iters: int = setting(200, min=1)  # at most so many batches an evaluation; windows do not overlap
    log_interval: int = setting(10, min=1)  # steps between log lines
    eval_only: bool = False  # evaluate what init_from names, and stop
    always_save_checkpoint: bool = False  # keep every checkpoint, not only the last and the best
    patience: int = setting(0, min=0)  # stop after so many evaluations without a better one; 0 = never
    sample_tokens: int = setting(160, min=0)  # tokens sampled at each evaluation; 0 = none

    def check(self):
        super().check()
        lists = [mode for mode, name in DATASETS_OF.items() if getattr(self, name)]
        if len(lists) == 1 and 'training_mode' not in self.typed:
            self.training_mode = lists[0]                   # resolve_defaults says so
        for mode in lists:
            if mode != self.training_mode:
                raise UserError(f'{DATASETS_OF[mode]} belongs to training_mode={mode}, not to '
                                f'{self.training_mode}: leave one of them out')
        names_model = 'gpt2_type' in self.flags or self.gpt2_type != 'gpt2'
        if names_model and 'init_from' not in self.typed:
            self.init_from = 'gpt2'                         # likewise
        if names_model and self.init_from not in ('gpt2', 'resume'):
            raise UserError(f'gpt2_type={self.gpt2_type} is what init_from=gpt2 begins as, not '
                            f'init_from={self.init_from}: leave one of them out')
        # a recipe's min_lr follows the rate of a flag
        stands = 'min_lr' in (self.flags if 'learning_rate' in self.flags else self.typed)
        if stands and self.decays() and self.min_lr > self.learning_rate:
            raise UserError(f'min_lr={self.min_lr:g} is above learning_rate={self.learning_rate:g}: the rate '
                            'falls from learning_rate to min_lr')
        needed = DATASETS_OF.get(self.training_mode)
        if needed and len(getattr(self, needed)) < 2:
            raise UserError(f'training_mode={self.training_mode} needs --{needed} with two data sets or more')
        probs, names = self.dataset_sampling_probs, self.dataset_list
        if probs and len(probs) != len(names):
            raise UserError(f'dataset_sampling_probs has {len(probs)} values for {len(names)} data sets')
        if probs and (min(probs) < 0 or sum(probs) == 0):
            raise UserError(f'dataset_sampling_probs must be 0 or more, and not all 0: {probs}')

    def decays(self):
        return self.decay_lr or self.lr_scheduler not in ('none', 'constant')


def main(cfg):
    # device, ranks, signals; where a run is resumed its own settings, but for what is typed again
    run = Run.open(cfg, 'train_gpt.py', cfg.out_dir, resume=cfg.resume or cfg.init_from == 'resume',
                   resume_flag='--init_from=resume', memory_flags=('--batch_size', '--block_size'))
    cfg = run.cfg
    if cfg.always_save_checkpoint:
        run.checkpoints.limit = None                        # not the newest two and the best alone: all
    if run.resumed:
        cfg.init_from = run.saved['config']['init_from']    # the architecture is that of the first start
    resolve_defaults(cfg, run)
    corpora = open_data(cfg, run)
    if cfg.plan:
        return plan.gpt(cfg, corpora, build_model, run)
    model, tokenizer = build_model(cfg, corpora, run)       # new, pretrained, or as the checkpoint has it
    check_batch(cfg, corpora, run)
    optimizer = build_optimizer(cfg, model, run)
    ema = WeightAverage(optimizer, cfg.ema)                 # decay 0: there is no average
    state = run.restore(State(cfg.optimizer), optimizer, ema)
    if cfg.eval_only:
        with ema.swapped(), run.unsharded():
            metrics = validate(cfg, model, corpora, run)
        return run.finish(metrics, '  '.join(f'{key} {value:.4f}' for key, value in metrics.items()))
    if ended := run.ended(state, cfg.max_iters, 'max_iters'):
        return ended
    print_summary(cfg, model, corpora, run)
    first_step, metrics = state.step, {}
    log = run.start(cfg.max_iters, first_step, describe(model, corpora), cfg.log_interval,
                    flops_per_token=plan.train_flops(model, cfg.block_size), data=corpora)
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    targets_per_step = tokens_per_step * num_streams(cfg)
    model.train()

    def save(best=False):
        run.save(state, model, tokenizer, optimizer, ema, best)

    while True:
        # ---- once in a while: validate, checkpoint, plot, sample
        # Before the step, so that the last weights are seen, too; a resumed run has done its first already.
        last = state.step >= cfg.max_iters
        if last or (state.step % cfg.eval_interval == 0 and state.step > first_step):
            with log.pause(), ema.swapped(), run.unsharded():
                metrics = validate(cfg, model, corpora, run)
                log.write(state.step, metrics)
            with log.pause():
                save(best=state.note_eval(metrics['eval_loss']))
                with ema.swapped(), run.unsharded():
                    show(cfg, model, tokenizer, state.step, log, run)
        if last or 0 < cfg.patience <= state.evaluations_since_best:
            break
        run.exit_if_asked(save)                             # SIGINT, SIGTERM: save, say how to go on, exit

        # ---- one optimizer step
        # Its batch is a function of (seed, step): there is no state of a data loader to save or restore.
        lr = get_lr(cfg, state.step, state.plateau['scale'])
        if cfg.dropout:
            # a seed for each step, not a stream: neither an evaluation nor a resume changes what is dropped
            torch.manual_seed(seed_for(cfg.seed, 'dropout', state.step, run.rank))
        loss = 0.0
        for x, y in get_batch(cfg, corpora, state.step, run):   # this rank's micro-batches, (B, T) each
            with run.autocast():
                logp = model(x, y)                          # (B, T), in multicontext (B, T, streams)
            # Divided by the targets of the whole step, not of the micro-batch: the parts add up to the mean,
            # whatever the cut. Gradients are summed over ranks once, in run.step, not at each backward.
            nll = -logp.sum() / targets_per_step
            run.backward(nll)
            loss += nll.detach()                            # no .item() here: it would wait for the GPU
        grad_norm = run.step(optimizer, lr, cfg.grad_clip)  # clips; a gradient that is not finite is skipped
        state.step += 1
        state.num_tokens = state.step * tokens_per_step
        ema.update(state.step)
        # the loss is this rank's part: the log sums it over ranks when it writes a line, not at every step
        log.train(state.step, tokens_per_step, loss=loss, learning_rate=lr, grad_norm=grad_norm,
                  num_tokens=state.num_tokens)

    best_loss = math.nan if state.best_eval_loss is None else state.best_eval_loss
    return run.finish({**metrics, 'best_eval_loss': best_loss, 'step': state.step},
                      f'best eval_loss {best_loss:.4f}; the model is in {cfg.out_dir}/: '
                      f'python sample.py {shlex.quote(cfg.out_dir)}')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.corpus import Corpus, check_together, prepare_missing, windows
from data.tokenizer import Tokenizer, load_tokenizer
from model import FAMILIES, GPT, GPTConfig, from_hf_weights, load_model, read_safetensors
from nanoforge import plan, plots
from nanoforge.kernels import TargetLogp
from nanoforge.run import Run, State, describe_device, seed_for
from sample import generate


# ---- data ------------------------------------------------------------------------------------------

def open_data(cfg, run):
    """The data sets of this run as Corpus objects, checked against each other."""
    names = {'single': [cfg.dataset],
             'multidataset': cfg.dataset_list,
             'multicontext': cfg.multicontext_datasets}[cfg.training_mode]

    def prepare():
        for name in names:
            prepare_missing(name)
    run.on_main(prepare)            # the other ranks wait, and then find them
    corpora = [Corpus(name) for name in names]
    check_together(corpora, streams=cfg.training_mode == 'multicontext')
    return corpora


def num_streams(cfg):
    """Targets at each position: one, in multicontext one of each stream."""
    return len(cfg.multicontext_datasets) if cfg.training_mode == 'multicontext' else 1


def check_batch(cfg, corpora, run):
    """UserError where a text is shorter than a row, or the ranks cannot share the batch evenly."""
    for corpus in corpora:
        corpus.check(cfg.block_size)
    ranks = run.world_size
    if cfg.gradient_accumulation_steps % ranks and cfg.batch_size % ranks:
        raise UserError(f'{ranks} ranks can share neither gradient_accumulation_steps='
                        f'{cfg.gradient_accumulation_steps} micro-batches nor their '
                        f'batch_size={cfg.batch_size} rows evenly: make one of them divisible')


def get_batch(cfg, corpora, step, run):
    """Yields this rank's micro-batches of a step: x and y (rows, T), in multicontext (rows, T, streams)."""
    accum, B, ranks = cfg.gradient_accumulation_steps, cfg.batch_size, run.world_size
    # Where a row begins does not depend on the number of ranks. They are dealt whole micro-batches where that
    # comes out even, else the rows of each.
    micro_steps, rows = range(run.rank, accum, ranks), slice(None)
    if accum % ranks:
        micro_steps = range(accum)
        rows = slice(run.rank * B // ranks, (run.rank + 1) * B // ranks)
    for micro_step in micro_steps:
        rng = np.random.default_rng(seed_for(cfg.seed, 'data', step, micro_step))
        drawn = corpora
        if cfg.training_mode == 'multidataset':
            probs = np.array(sampling_weights(cfg, corpora))
            drawn = [corpora[rng.choice(len(corpora), p=probs / probs.sum())]]
        highest = len(drawn[0].tokens('train')) - cfg.block_size
        offsets = rng.integers(highest, size=B)             # aligned streams share them
        yield read_windows(cfg, drawn, 'train', offsets[rows], run)


def sampling_weights(cfg, corpora):
    return cfg.dataset_sampling_probs or [1] * len(corpora)


def read_windows(cfg, corpora, split, offsets, run):
    """x, y (rows, T) from these offsets of a corpus; of aligned streams (rows, T, streams)."""
    # (x, y) for each corpus, from the same offsets
    pairs = [windows(corpus.tokens(split), offsets, cfg.block_size, run.device) for corpus in corpora]
    if cfg.training_mode != 'multicontext':
        return pairs[0]
    return [torch.stack(streams, -1) for streams in zip(*pairs)]


# ---- model -----------------------------------------------------------------------------------------

class MultiContextGPT(GPT):
    """Aligned streams, a token of each at every position: embeddings are summed, each stream has a tied head.

    model(idx)           [logits (B, T, V_s) of each stream s], of idx (B, T, S)
    model(idx, targets)  log-probabilities of the targets (B, T, S)
    """

    def __init__(self, config, vocab_sizes):
        # no other tool has a class for it, and config.json says so
        extra = {'model_type': 'nanoforge_multicontext', 'architectures': ['MultiContextGPT'],
                 'nanoforge': {'multicontext': True, 'vocab_sizes': vocab_sizes}}
        super().__init__(replace(config, vocab_size=vocab_sizes[0], extra=extra))
        self.more_embeddings = nn.ModuleList(nn.Embedding(size, config.n_embd) for size in vocab_sizes[1:])

    def forward(self, idx, targets=None):
        B, T, _ = idx.shape
        tables = [self.embed_tokens, *self.more_embeddings]

        def embeddings():
            return sum(table(idx[..., s]) for s, table in enumerate(tables))        # (B, T, C)

        hidden = self.hidden(idx[..., 0], embeddings=embeddings).to(tables[0].weight.dtype)
        logits = [F.linear(hidden, table.weight) for table in tables]               # S times (B, T, V_s)
        if targets is None:
            return logits
        logp = [TargetLogp.apply(z.flatten(0, 1), targets[..., s].flatten()) for s, z in enumerate(logits)]
        return torch.stack(logp, -1).view(B, T, -1)


def build_model(cfg, corpora, run):
    """(model, tokenizer): float32 weights, new, pretrained or resumed. Fills in the sizes in cfg."""
    tokenizer = load_tokenizer(corpora[0].directory)
    if run.resumed and load_tokenizer(run.resumed).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise UserError(f'{corpora[0].described()} was prepared again with another tokenizer, in which ids '
                        f'mean something else: prepare it with --tokenizer={run.resumed}, or start anew')
    if cfg.init_from.startswith('gpt2'):
        model, tokenizer = load_pretrained(cfg, tokenizer, corpora, run)
    else:
        device = plan.device_type(cfg) if cfg.plan else run.device.type
        if device == 'cpu':                                 # minutes on two cores
            chosen = fill_in(cfg, n_layer=4, n_head=4, n_embd=128, block_size=64)
        else:
            chosen = fill_in(cfg, n_layer=6, n_head=6, n_embd=384, block_size=256)
        if chosen:
            run.print0(f'sizes for {device}: {chosen} (type the flags for others)')
        model = new_model(cfg, corpora)
        torch.manual_seed(seed_for(cfg.seed, 'weights'))    # the same on every rank
        model.init_weights()
    if run.resumed:                                         # over the weights just drawn
        load_resumed(model, run.resumed)
    return run.prepare(model.to(run.device).set_matmul(run.matmul)), tokenizer


def new_model(cfg, corpora):
    """The GPT that the flags describe, its weights not yet drawn."""
    # a tied head, whatever the family: at these sizes a second table of embeddings would be most of the model
    family = {**FAMILIES[cfg.arch], 'bias': cfg.bias, 'tied': True}
    if cfg.activation:
        family['activation'] = cfg.activation
    vocab_sizes = [corpus.meta['vocab_size'] for corpus in corpora]
    config = GPTConfig(
        arch=cfg.arch, vocab_size=max(vocab_sizes), block_size=cfg.block_size,
        n_layer=cfg.n_layer, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head or 0,
        n_embd=cfg.n_embd, n_inner=cfg.n_inner or 0, dropout=cfg.dropout, **family)     # 0: the family's rule
    return MultiContextGPT(config, vocab_sizes) if cfg.training_mode == 'multicontext' else GPT(config)


def load_pretrained(cfg, tokenizer, corpora, run):
    """(model, tokenizer): a GPT-2, or the model directory of gpt2_type, for data of the same tokenizer."""
    name = cfg.gpt2_type if cfg.init_from == 'gpt2' else cfg.init_from
    model, its_tokenizer = load_model(name, run.device)
    data = corpora[0]
    # never character ids for a GPT-2: they would train without an error, and mean nothing
    ids = tokenizer.backend.get_vocab().items()
    if its_tokenizer is None or not ids <= its_tokenizer.backend.get_vocab().items():
        wanted = name if os.path.isdir(name) else 'gpt2'
        raise UserError(f'data set {data.name!r} has the ids of a {data.meta["tokenizer"]} tokenizer, not '
                        f'those of {name}: prepare it with --tokenizer={wanted} (python data/prepare.py NAME '
                        f'FILE --tokenizer {wanted})')
    config = model.config
    for flag in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
        asked, size = getattr(cfg, flag), getattr(config, flag)
        if asked not in (None, size):
            raise UserError(f'--{flag}={asked} contradicts {name}, whose {flag} is {size}: leave it out')
    context = config.block_size
    if cfg.block_size and cfg.block_size > context:
        run.print0(f'block_size {cfg.block_size} is clamped to {context}, the context of {name}')
    cfg.block_size = min(cfg.block_size or context, context)
    config.dropout = cfg.dropout
    for module in model.modules():
        if hasattr(module, 'dropout'):
            module.dropout = cfg.dropout
    # the ids are those of the data; names, stop tokens and chat template are the model's
    return model, Tokenizer(tokenizer.text, its_tokenizer.config, its_tokenizer.stop_ids,
                            its_tokenizer.chat_template, its_tokenizer.generation)


def load_resumed(model, checkpoint):
    """The weights of a checkpoint into `model`; where there is a mean of the weights, it is what they are."""
    weights = from_hf_weights(model.config, read_safetensors(checkpoint))
    needed = {name: p.shape for name, p in model.named_parameters()}        # names a tied head once
    if {name: tensor.shape for name, tensor in weights.items()} != needed:
        raise UserError(f'{checkpoint} holds another architecture than the flags ask for: leave out those '
                        'that change it')
    model.load_state_dict(weights, strict=False)


# ---- optimizer and schedule ------------------------------------------------------------------------

def build_optimizer(cfg, model, run):
    ns_dtype = torch.bfloat16 if run.matmul == 'bf16' else None         # of Muon's products
    betas = cfg.beta1, cfg.beta2
    return make_optimizer(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay, betas, cfg.momentum,
                          adam_lr=cfg.adam_lr, ns_dtype=ns_dtype)


def resolve_defaults(cfg, run):
    """Settles in cfg what the flags leave open, and says it: mode, start, schedule, ema."""
    if cfg.training_mode != 'single' and 'training_mode' not in cfg.typed and not run.resumed:
        run.print0(f'note      training_mode={cfg.training_mode}: {DATASETS_OF[cfg.training_mode]} is given')
    if cfg.init_from == 'gpt2' and 'init_from' not in cfg.typed and not run.resumed:
        run.print0(f'note      init_from=gpt2: training begins with the weights of {cfg.gpt2_type}')
    if cfg.lr_scheduler == 'none' and cfg.decay_lr:
        cfg.lr_scheduler = 'cosine'
    if 'decay_lr' in cfg.typed and not cfg.decay_lr and cfg.lr_scheduler != 'none':
        run.print0(f'--no-decay_lr overrules lr_scheduler={cfg.lr_scheduler}')
        cfg.lr_scheduler = 'none'
    if cfg.min_lr > cfg.learning_rate and cfg.lr_scheduler not in ('none', 'constant'):
        cfg.min_lr = cfg.learning_rate / 10                 # else the rate would rise
        run.print0(f'note      min_lr={cfg.min_lr:g}, a tenth of learning_rate={cfg.learning_rate:g}')
    if not run.resumed:             # else it goes on with the warm-up that it began with
        cfg.warmup_iters = warmup_within(cfg.warmup_iters, cfg.max_iters, run.print0)
    # A rate that stays high leaves the last step's weights noisy, and their mean is better. One that falls
    # settles them by itself, and the weights of a pretrained model do not move far.
    stays_high = cfg.lr_scheduler in ('none', 'constant') and not cfg.init_from.startswith('gpt2')
    fill_in(cfg, ema=0.998 if stays_high else 0)


def get_lr(cfg, step, plateau_scale=1.0):
    """The learning rate of a step; the schedule `plateau` scales it, down to min_lr."""
    lr = learning_rate(step, cfg.lr_scheduler, cfg.learning_rate, cfg.min_lr,
                       cfg.warmup_iters, cfg.lr_decay_iters)
    if cfg.lr_scheduler == 'plateau':
        lr = max(lr * plateau_scale, min(lr, cfg.min_lr))
    return lr


# ---- evaluation ------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(cfg, model, corpora, split, run):
    """{corpus name: mean loss in nats per token} over fixed windows of a split, no token twice.

    The windows depend on nothing but the data, the block size and eval_iters: the same from run to run.
    """
    model.eval()                            # no dropout
    losses = {}
    groups = [[corpus] for corpus in corpora]
    if cfg.training_mode == 'multicontext':
        groups = [corpora]                  # aligned streams go through the model together
    for group in groups:
        offsets = eval_offsets(cfg, group, split)
        batches = np.array_split(offsets, -(-len(offsets) // cfg.batch_size))
        total = torch.zeros(len(group), dtype=torch.float64)
        for batch in batches[run.rank::run.world_size]:
            x, y = read_windows(cfg, group, split, batch, run)
            with run.autocast():
                logp = model(x, y)
            total -= logp.view(-1, len(group)).double().sum(0).cpu()
        run.sum(total)                      # each rank has read its share of the batches
        means = total / (len(offsets) * cfg.block_size)
        losses.update(zip((corpus.name for corpus in group), means.tolist()))
    model.train()
    return losses


def eval_offsets(cfg, corpora, split):
    """Where the windows of an evaluation begin: spread over the split, never overlapping."""
    T = cfg.block_size
    available = (len(corpora[0].tokens(split)) - 1) // T
    in_val = min((len(corpus.tokens('val')) - 1) // T for corpus in corpora)
    count = min(cfg.eval_iters * cfg.batch_size, in_val)
    if split == 'train':
        count = -(-count // 4)              # a quarter: the loss of every training step is logged besides
    count = min(count, available)
    return np.arange(count) * (available // count) * T


def validate(cfg, model, corpora, run):
    """The metrics of an evaluation; of several data sets the mean, weighted as they are drawn."""
    names = [corpus.name for corpus in corpora]
    weights = dict(zip(names, sampling_weights(cfg, corpora)))
    metrics = {}
    for split, key in (('val', 'eval_loss'), ('train', 'train_loss')):
        losses = evaluate(cfg, model, corpora, split, run)
        metrics[key] = sum(weights[name] * losses[name] for name in weights) / sum(weights.values())
        if len(corpora) > 1 and split == 'val':
            metrics.update({f'eval_loss/{name}': loss for name, loss in losses.items()})
    if len(corpora) == 1:
        metrics['bits_per_byte'] = corpora[0].bits_per_byte(metrics['eval_loss'])
    return metrics


def show(cfg, model, tokenizer, step, log, run):
    """The picture so far, and a sample of text to the console, samples.txt and TensorBoard."""
    if run.is_main:
        title = os.path.basename(os.path.abspath(cfg.out_dir))
        plots.loss_picture(log.path, os.path.join(cfg.out_dir, 'loss.png'), title)
    if run.rank == 0 and cfg.sample_tokens and cfg.training_mode != 'multicontext':
        prompt = tokenizer.encode('\n') or [0]      # some tokenizers have no line break
        seed = seed_for(cfg.seed, 'sample', step)
        # keyed by the step alone, so that a sample shows what was learned, and never disturbs the training
        samples = generate(model, [prompt], cfg.sample_tokens, temperature=0.8, seed=seed)
        text = tokenizer.decode(samples.tokens[0][:samples.lengths[0]].tolist())
        if run.is_main:
            with open(os.path.join(cfg.out_dir, 'samples.txt'), 'a', encoding='utf-8') as file:
                file.write(f'---- step {step}\n{text}\n')
        log.text(step, 'sample', text.strip())


# ---- what is said before the first step ------------------------------------------------------------

def describe(model, corpora):
    """What the run is, for the first line of log.jsonl."""
    data = [{'source': corpus.meta['source'], 'stand_in': corpus.meta['stand_in'], 'name': corpus.name}
            for corpus in corpora]
    return {'data': data, 'stand_in': any(source['stand_in'] for source in data),
            'model': model.config.arch, 'parameters': model.num_params()}


def print_summary(cfg, model, corpora, run):
    """What will be trained on what."""
    for corpus in corpora:
        run.print0(f'data      {corpus}')
    c = model.config
    run.print0(f'model     {c.arch}: {model.num_params():,} parameters, {c.n_layer} layers, '
               f'{c.n_head} heads, {c.n_embd} channels, context {cfg.block_size}')
    run.print0(f'machine   {describe_device(run)}')
    rates = [get_lr(cfg, step) for step in range(0, max(cfg.max_iters, 1), max(1, cfg.max_iters // 240))]
    run.print0(f'schedule  {plots.sparkline(rates, 40)} {cfg.lr_scheduler}, {max(rates):g} to {rates[-1]:g}')
    # the commonest slip with a schedule: max_iters is changed, and lr_decay_iters is not
    ends_elsewhere = not 0.8 <= cfg.max_iters / max(cfg.lr_decay_iters, 1) <= 1.25
    if cfg.lr_scheduler not in ('none', 'constant', 'plateau') and ends_elsewhere:
        run.print0(f'          note: max_iters={cfg.max_iters} is far from the end of the schedule, '
                   f'lr_decay_iters={cfg.lr_decay_iters}')
    if cfg.ema:
        run.print0(f'weights   evaluated and saved is their mean over about {1 / (1 - cfg.ema):.0f} steps '
                   '(--ema=0: those of the last step)')
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
    run.print0(f'run       {cfg.max_iters:,} steps of {tokens:,} tokens with {cfg.optimizer}, '
               f'an evaluation every {cfg.eval_interval} steps')


if __name__ == '__main__':
    run_script(main, cfg)
