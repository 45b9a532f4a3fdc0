"""Supervised fine-tuning: a model learns the answers of chats, tool calls, questions and texts.

    python train_sft.py                                         embedded tool calls, embedded model
    python train_sft.py --dataset_path dataset.jsonl --output_dir DATASET --max_length 4096 --bf16
    python train_sft.py --recipe recipes/training/sft/llama3_3B_lora.yaml --num-gpus 8 --lr=5e-5
    python train_sft.py --dataset_path dataset.jsonl --check    what is learned, what is wrong with the rows

The loss of an optimizer step is the mean of -log p(token | tokens before it) over its targets: the tokens of
the last answer (--loss_on: of every answer, or all). They are counted over micro-batches and ranks before the
sum is divided, so the loss does not depend on how the batch is cut; a mean of means, which transformers took
until 2024, weighs a token the more the fewer targets its micro-batch has.
    label_smoothing e       (1 - e) * -log p(target) + e * mean of -log p over the vocabulary
                            (Szegedy et al. 2016, section 7)
    neftune_noise_alpha a   uniform noise of at most a / sqrt(T C) on the embeddings (Jain et al. 2023, arXiv
                            2310.05914). T is the document's own length; where rows are padded (a GPU without
                            --packing) that of the row, as in the paper's code

Which rows a step takes is decided by seed and step alone. Formats of rows: data/formats.py. What of a row is
learned, and what is cut off: data/tokenized.py. Settings that several scripts have: nanoforge/flags.py.
"""
import functools
import itertools
import math
import operator
import os
import re
import time
from dataclasses import dataclass

from configurator import UserError, configclass, fill_in, parse, run_script, setting
from nanoforge.flags import DataFlags, LoaderFlags, ModelFlags, RunFlags, Source, TrainFlags
from nanoforge.optim import SCHEDULER_NAMES, WeightAverage, learning_rate, make_optimizer, warmup_within

HUB_DATASET = 'google/mobile-actions'
EMBEDDED_DATASET = 'devices'        # its stand-in: tool calls that are generated here
EMBEDDED_TEXTS = 'plays'            # of algorithm=cpt
SMALL_MODEL_RATE = 1.5e-3           # fine-tuning all weights of such a model is nearly pretraining


@configclass
class Config(RunFlags, TrainFlags, DataFlags, LoaderFlags, ModelFlags):
    section = 'training'
    unread_columns = ('chosen_column', 'rejected_column')
    seed = 42
    gradient_accumulation_steps = 4
    lr_scheduler_type = 'cosine'
    weight_decay = 0.01

    algorithm: str = setting('sft', choices=('sft', 'cpt'))  # cpt: continued pretraining on texts
    text_column: str = setting('text', path='data.text_column', needs=('algorithm=cpt',))  # its column
    # model
    load_checkpoint: str | None = None  # start from these weights, their epochs counted on; a fresh optimizer
    dropout: float = setting(0.0, path='model.dropout', min=0, below=1)  # of embeddings and layer outputs
    freeze: list[str] = setting([], path='model.freeze')  # parts that do not train: layers.0, q_proj, ...
    # data
    packing: bool = setting(False, path='data.packing')  # fill rows of max_length with several examples,
        # which do not see each other
    loss_on: str = setting('completion', path='data.loss_on', choices=('completion', 'assistant', 'all'))
        # the last answer, every answer, or all tokens
    group_by_length: bool | None = setting(None, path='data.group_by_length', also=('length_grouped',))
        # steps of similar lengths: less padding on a GPU, steps less alike; for the embedded set if not set
    augment: bool = setting(False, path='data.augment')  # reworded copies of training rows: synonyms, typos,
        # other wordings
    augment_factor: float = setting(2.0, path='data.augment_factor', needs=('augment=true',))  # rows with
        # copies to rows without
    # optimization
    warmup_ratio: float = setting(  # share of the steps in which the rate rises; warmup_steps beats it
        0.03, min=0, below=1, also=('warmup_proportion',), needs=('warmup_steps=none',))
    min_lr: float = setting(0.0, min=0)  # the lowest rate
    adam_beta1: float = setting(0.9, min=0, below=1)  # decay of the first moment
    adam_beta2: float = setting(0.999, min=0, below=1)  # decay of the second
    label_smoothing: float = setting(0.0, min=0, below=1, also=('label_smoothing_factor',))  # share of the
        # target that is spread over the vocabulary
    neftune_noise_alpha: float = setting(0.0, min=0)  # noise on embeddings in training, 5 to 15; 0 = none
    ema: float = setting(0.0, min=0, below=1, also=('ema_decay',))  # decay of the mean of the weights that is
        # evaluated and saved; 0 = off
    # evaluation and checkpoints
    per_device_eval_batch_size: int | None = setting(None, min=1, also=('eval_batch_size',))  # rows of a
        # batch; twice the training's if not set
    eval_strategy: str = setting('steps', also=('evaluation_strategy',), choices=('steps', 'epoch', 'no'))
        # when to evaluate
    eval_on_start: bool = True  # evaluate before the first step, too, where there are evaluations
    sample_rows: int = setting(2, min=0)  # held-out prompts that are answered at each evaluation; 0 = none
    patience: int = setting(0, min=0, also=('early_stopping_patience',))  # stop after so many evaluations
        # without a better one; 0 = never
    save_strategy: str | None = setting(None, choices=('steps', 'epoch', 'best', 'no'))  # when to save,
        # besides the best and the end; after each epoch if neither it nor save_steps nor max_steps is set
    load_best_model_at_end: bool = True  # the root holds the best model by eval_loss; false: the last
    checkpoint_name: str = 'checkpoint-{step}'  # of checkpoint folders, with {step} or {epoch}
    save_merged: bool = setting(False, needs=('use_lora=true',))  # LoRA: also the whole model with
        # the adapter in it, in output_dir/merged
    resume_from_checkpoint: str | None = None  # go on from this checkpoint of output_dir; true = the newest,
        # auto = the newest if there is one

    def check(self):
        super().check()
        if self.freeze and self.use_lora:
            raise UserError('freeze: under LoRA all but the adapters is frozen anyway; leave one of them out')
        by_steps = self.max_steps > 0 or 'save_steps' in self.typed
        if 'save_steps' in self.typed and 'save_strategy' not in self.typed:
            self.save_strategy = None           # that of a run that goes on
        self.save_strategy = self.save_strategy or ('steps' if by_steps else 'epoch')
        name = self.checkpoint_name
        if not re.search(r'\{(step|epoch)\}', name) or os.path.basename(name) != name:
            raise UserError(f'checkpoint_name={name}: a name with {{step}} or {{epoch}}, so that none '
                            'overwrites another')
        judges = {'patience': self.patience, 'lr_scheduler_type': uses_plateau(self)}
        for name, judging in judges.items():
            if judging and self.eval_strategy == 'no':
                raise UserError(f'{name}={getattr(self, name)} judges by evaluations, and eval_strategy=no '
                                'makes none')


def uses_plateau(cfg):
    return SCHEDULER_NAMES[cfg.lr_scheduler_type] == 'plateau'


def main(cfg):
    run, cfg = open_run(cfg)
    model, tokenizer = build_model(cfg, run)            # pretrained, or the checkpoint that is resumed
    sources = find_sources(cfg, run)
    rows, issues = load_rows(cfg, sources, model, tokenizer, run)
    if cfg.check_data:
        return show_check(cfg, tokenizer, rows, issues, run)
    refuse_or_warn(cfg, rows, issues, run)              # bad rows stop the run here, before the first step
    resolve_defaults(cfg, model, sources, run)
    epochs = make_epochs(cfg, rows, sources, run)       # which rows each step takes
    total, warmup = plan_steps(cfg, epochs, run)        # optimizer steps
    if cfg.plan:
        return plan.sft(cfg, model, rows, epochs, total, run)
    betas = cfg.adam_beta1, cfg.adam_beta2
    optimizer = make_optimizer(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay, betas)
    ema = WeightAverage(optimizer, cfg.ema)             # decay 0: there is no average
    before = epochs_of_loaded(cfg)
    state = run.restore(State(cfg.optimizer, epochs_before=before, epoch=before), optimizer, ema)
    if ended := run.ended(state, total):
        return ended
    print_summary(cfg, model, rows, sources, epochs, total, warmup, run)
    header = describe(cfg, model, rows, sources)
    log = run.start(total, state.step, header, cfg.logging_steps, data=sources,
                    flops_per_token=plan.sft_flops(model, rows))
    make_batch = functools.partial(get_batch, cfg, rows, epochs, run)
    prefetch = Prefetcher(make_batch, total, cfg.dataloader_num_workers)        # a thread makes them ahead
    alerts, began, metrics = TrainingAlerts(run), time.perf_counter() - state.seconds, {}
    first_step = state.step
    # a best model is kept because the root shall hold it, or because only it is saved
    keeps_best = cfg.save_strategy == 'best' or (cfg.save_strategy != 'no' and cfg.load_best_model_at_end)

    def validate():
        """Evaluates, logs and shows; True where the model is the best so far and is to be kept for it."""
        with log.pause(), ema.swapped(), run.unsharded():     # the mean of the weights; no speed counts it
            metrics.update(evaluate(cfg, model, rows, run))             # eval_loss in nats per target
            log.write(state.step, {'epoch': state.epoch, **metrics})
            if cfg.sample_rows and rows.held_out.any() and run.rank == 0:
                log.text(state.step, 'examples', answer_examples(cfg, model, tokenizer, rows))
            log.histograms(state.step, gradients(optimizer))
        alerts.evaluation(state, metrics['eval_loss'])
        if state.step == first_step or not rows.held_out.any():     # no result of training: no patience lost
            return False
        return state.note_eval(metrics['eval_loss']) and keeps_best

    def save(best=False):
        state.seconds = time.perf_counter() - began
        name = folder_name(cfg, state, epochs)
        with log.pause():
            run.save(state, model, tokenizer, optimizer, ema, best, name, metrics=only_finite(metrics))

    if cfg.eval_on_start and cfg.eval_strategy != 'no' and rows.held_out.any() and not run.resumed:
        validate()                                      # what there is to improve on
    for step in range(first_step, total):
        run.exit_if_asked(save)                         # SIGINT, SIGTERM: save, say how to resume, exit

        # ---- one optimizer step. Its batch is a function of (seed, step), so there is no data state to
        # restore; `targets` and `tokens` are counted over all micro-batches and ranks
        batches, targets, tokens = prefetch(step)
        lr = learning_rate(step, cfg.lr_scheduler_type, cfg.learning_rate, cfg.min_lr, warmup, total)
        if uses_plateau(cfg):                           # lowered where eval_loss stalls, but not below min_lr
            lr = max(lr * state.plateau['scale'], min(lr, cfg.min_lr))
        # Accuracy costs time, so only steps that are logged measure it. The last step is not forced to: a run
        # that is stopped here and resumed must compute what one does that was never stopped
        is_logged = (step + 1) % cfg.logging_steps == 0
        optimizer.zero_grad()                           # not after the step: an evaluation shows its gradient
        loss, correct = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
        for i, batch in enumerate(run.even(batches, model)):        # documents in rows (R, W), with N targets
            torch.manual_seed(seed_for(cfg.seed, 'noise', step, i, run.rank))       # of dropout and NEFTune
            with run.autocast():
                embeddings = None
                if cfg.neftune_noise_alpha:
                    embeddings = functools.partial(noisy_embeddings, cfg, model, batch)
                # only places that predict a target pass the last layer and the head: (N, C), never (R, W, V)
                hidden = model.hidden(batch.idx, batch.positions, embeddings, batch.logit_positions)
                stats = model.token_stats(hidden, batch.targets, extras=is_logged or cfg.label_smoothing > 0)
            nll = -stats['logp'].sum()
            if cfg.label_smoothing:                     # part of the objective, not of eval_loss
                nll = (1 - cfg.label_smoothing) * nll - cfg.label_smoothing * stats['mean_logp'].sum()
            # by the targets of the whole step, not of the micro-batch: the gradients add up to the mean's
            nll = nll / targets
            run.backward(nll)
            loss += nll.detach()
            if is_logged:
                correct += stats['correct'].sum()
        loss = run.sum(loss).item()                     # waits for the GPU, which run.step does in any case
        # sums over ranks, clips, steps; a gradient that is not finite is skipped, and too many stop the run
        grad_norm = run.step(optimizer, lr, cfg.max_grad_norm, zero_grad=False)
        ema.update(step + 1)                            # its decay is lower in the first steps
        state.note_step(loss, tokens, epochs)
        accuracy = {'mean_token_accuracy': run.sum(correct).item() / targets} if is_logged else {}
        log.train(state.step, tokens, epoch=state.epoch, loss=loss, learning_rate=lr, grad_norm=grad_norm,
                  num_tokens=state.num_tokens, **accuracy)
        alerts.train(loss, grad_norm)

        # ---- once in a while: evaluate, checkpoint. The log line comes first, since a checkpoint holds what
        # the next one will need; a best model is saved whether or not a checkpoint is due
        done = state.step == total
        best = is_due(cfg.eval_strategy, cfg.eval_steps, state, epochs, done) and validate()
        if 0 < cfg.patience <= state.evaluations_since_best:
            run.print0(f'no better evaluation in {cfg.patience}: stopped at step {state.step}')
            done = True
        if best or done or is_due(cfg.save_strategy, cfg.save_steps, state, epochs, done):
            save(best)
        if done:
            break

    return finish(cfg, state, metrics, log, run)


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import shlex

import numpy as np
import torch

from data.batches import Epochs, Prefetcher, best_fit, draw, micro_batches, pack_documents
from data.formats import read_rows, split_of_row, text_record, to_record
from data.splits import is_held_out, legacy_sft
from data.tokenized import TokenizedRows, encode_records
from data.tokenizer import read_json
from model import load_model, merge_lora, save_model
from nanoforge import plan, plots
from nanoforge.checkpoint import loaded_config, resolve_link
from nanoforge.data_checks import DataIssues, TrainingAlerts, compare_splits, print_mixture, show_check
from nanoforge.kernels import document_lengths
from nanoforge.policy import default_learning_rate, load_policy
from nanoforge.quantize import check_trainable
from nanoforge.run import Run, State as RunState, describe_device, seed_for
from sample import generate


# ---- loss and batch ----------------------------------------------------------------------------------------

def noisy_embeddings(cfg, model, batch):
    """(R, W, C): the embeddings of a PackedBatch with NEFTune's noise, uniform within alpha / sqrt(T C)."""
    embeddings = model.embed_tokens(batch.idx)
    R, W, C = embeddings.size()
    if batch.positions is None:
        lengths = batch.idx.new_full((R,), W)           # T of each document, with its padding
    else:
        lengths = document_lengths(batch.positions)     # packed, each gets the noise that it would get alone
    limit = cfg.neftune_noise_alpha / (lengths * C).sqrt()                      # of each document
    limit = limit.repeat_interleave(lengths).view(R, W, 1)                      # of each token
    return embeddings + limit * torch.empty_like(embeddings).uniform_(-1, 1)


def get_batch(cfg, rows, epochs, run, step):
    """(this rank's micro-batches, targets, tokens) of an optimizer step; the counts are of all ranks."""
    items = epochs.of_step(step)                # of all ranks, sorted by length: a micro-batch pads little
    if not cfg.packing:
        items = [[i] for i in items]            # an item is a list of rows that share one of the model's rows
    taken = [i for item in items for i in item]
    batches = []
    for part in micro_batches(items, cfg.per_device_train_batch_size, run.rank, run.world_size):
        documents = [[rows[i] for i in item] for item in part]
        batch = pack_documents(documents, run.device, packed=cfg.packing, pin=cfg.dataloader_pin_memory)
        batches.append(batch)
    tokens = rows.lengths[taken] - 1            # of each row that are fed: its last one predicts nothing
    return batches, int(rows.targets[taken].sum()), int(tokens.sum())


def make_epochs(cfg, rows, sources, run):
    """Epochs of training rows; packed: of bins of rows, which are the same in every epoch."""
    datasets = [np.flatnonzero(~rows.held_out & (rows.source == number)) for number in range(len(sources))]
    weights = [source.weight for source in sources]
    bins = None
    if cfg.packing:
        # whole rows by best fit: joining all tokens and cutting would leave no padding, but answers in halves
        drawn = draw(datasets, weights, cfg.seed, epoch=0)
        lengths = (rows.lengths[drawn] - 1).tolist()
        bins = [drawn[members].tolist() for members in best_fit(lengths, cfg.max_length)]

    def length(item):
        """Tokens that are fed for a row, or for a bin of rows."""
        return int(np.sum(rows.lengths[item] - 1))

    # in an optimizer step, over ranks too: N times as many processes are N times as large a step
    size = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * run.world_size
    return Epochs(datasets, weights, size, cfg.seed, cfg.dataloader_drop_last, length, cfg.group_by_length,
                  items=bins)


def is_due(when, every, state, epochs, done):
    """Whether it is time for what is done each `every` steps (when='steps') or each epoch, and at the end."""
    if when == 'steps':
        return done or state.step % every == 0
    if when == 'epoch':
        return done or state.step % epochs.per_epoch == 0
    return False            # 'no', and 'best', which is saved when an evaluation says so


# ---- evaluation --------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(cfg, model, rows, run):
    """{'eval_loss': nats per target, 'eval_mean_token_accuracy', ...} of the held-out rows; nan without any.

    The plain -log p, without label smoothing and noise, whatever the batch size and the number of ranks.
    """
    held_out, began = np.flatnonzero(rows.held_out), time.perf_counter()
    if not len(held_out):
        return {'eval_loss': math.nan}
    model.eval()
    by_length = held_out[np.argsort(rows.lengths[held_out], kind='stable')].tolist()        # little padding
    size = cfg.per_device_eval_batch_size or 2 * cfg.per_device_train_batch_size
    total = torch.zeros(2, dtype=torch.float64)             # sums, divided once: batches have unequal targets
    for part in micro_batches(by_length, size, run.rank, run.world_size):
        batch = pack_documents([[rows[i]] for i in part], run.device)
        with run.autocast():
            hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions)
            stats = model.token_stats(hidden, batch.targets)        # each (N,)
        total += torch.stack([stats['logp'].sum(), stats['correct'].sum()]).cpu()
    logp, accuracy = (run.sum(total) / rows.targets[held_out].sum()).tolist()
    model.train()
    seconds = time.perf_counter() - began
    return {'eval_loss': -logp, 'eval_mean_token_accuracy': accuracy, 'eval_runtime': seconds,
            'eval_samples_per_second': len(held_out) / seconds}


def answer_examples(cfg, model, tokenizer, rows):
    """What the model answers to the first held-out prompts, beside what it should, as text."""
    parts = []
    for i in np.flatnonzero(rows.held_out)[:cfg.sample_rows]:
        ids, targets = rows[i]
        # up to the first target, whatever loss_on: what stands there is given, the rest is to be found; of a
        # row without a prompt its first token
        start = max(1, int(np.flatnonzero(targets)[0]))
        limit = min(len(ids) - start + 32, 256)             # some more, to see whether it stops
        samples = generate(model, [ids[:start].tolist()], limit, temperature=0, stop_ids=tokenizer.stop_ids)
        prompt = tokenizer.decode(ids[max(0, start - 60):start].tolist())
        wanted = tokenizer.decode(ids[start:].tolist())
        answer = tokenizer.decode(samples.tokens[0, :samples.lengths[0]].tolist())
        parts.append(f'{rows.where[i]}\n  prompt  ...{prompt!r}\n  wanted  {wanted!r}\n  answer  {answer!r}')
    return '\n'.join(parts)


def gradients(optimizer):
    """{'gradients/PARAMETER': tensor} of the last step, clipped."""
    return {f'gradients/{name}': grad
            for flat in optimizer.flats for name, grad in zip(flat.names, flat.grads)}


# ---- model -------------------------------------------------------------------------------------------------

def build_model(cfg, run):
    """(model, tokenizer): the base model, load_checkpoint or the resumed checkpoint, ready to train."""
    model, tokenizer = load_policy(cfg, run, loaded_path(cfg) or cfg.base_model_name, run.resumed)
    for part in cfg.freeze:
        # whole words of the dotted name: 'norm' is no 'q_norm', and 'layers.1' no 'layers.10'
        frozen = [p for name, p in model.named_parameters() if f'.{part}.' in f'.{name}']
        if not frozen:
            names = ', '.join(name for name, _ in itertools.islice(model.named_parameters(), 4))
            raise UserError(f'freeze: the model has no part {part!r}; its parameters are called like {names}')
        for p in frozen:
            p.requires_grad_(False)
    check_trainable(model)      # once more: freeze may have left nothing
    if cfg.neftune_noise_alpha and not hasattr(model, 'embed_tokens'):
        raise UserError(f'neftune_noise_alpha: {model.config.arch} runs as transformers has it, which takes '
                        'no noise; leave it out')
    if cfg.dropout:
        set_dropout(model, cfg.dropout)
    model.config.dropout = cfg.dropout
    return run.prepare(model), tokenizer


def set_dropout(model, p):
    """Of embeddings, attention and MLPs; an adapter keeps its own."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        # ours keep it as a number, where torch's functional dropout reads it
        elif isinstance(getattr(module, 'dropout', None), float) and not hasattr(module, 'lora_A'):
            module.dropout = p


def loaded_path(cfg):
    """The folder of load_checkpoint, or None."""
    return str(resolve_link(cfg.load_checkpoint)) if cfg.load_checkpoint else None


# ---- rows --------------------------------------------------------------------------------------------------

def find_sources(cfg, run):
    """[Source]: the named data sets, else tool calls, from the hub or generated here, or plays."""
    if cfg.dataset_path and cfg.datasets:
        run.print0(f'data      dataset_path stands in for the {len(cfg.datasets)} entries of data.datasets')
    sources = cfg.sources()
    if not sources and cfg.algorithm == 'cpt':
        run.print0('data      the embedded plays, which are generated here (--dataset_path names your own '
                   'texts)')
        return [Source(name=EMBEDDED_TEXTS)]
    # the default must work offline: where the hub cannot be reached, a stand-in that says what it is
    if not sources and cfg.base_model_name == 'tiny':
        run.print0(f'data      the embedded tool calls: rows of {HUB_DATASET} do not fit the context of tiny '
                   '(--dataset_path insists)')
    elif not sources:
        try:
            next(read_rows(HUB_DATASET))
            sources = [Source(name=HUB_DATASET)]
        except UserError as error:
            run.print0(f'WARNING   {error}\nWARNING   training on the EMBEDDED STAND-IN {EMBEDDED_DATASET}; '
                       '--dataset_path names your own data')
    return sources or [Source(name=EMBEDDED_DATASET)]


def is_embedded(sources):
    return [source.name for source in sources] == [EMBEDDED_DATASET]


def load_rows(cfg, sources, model, tokenizer, run):
    """(TokenizedRows, DataIssues); max_length becomes what the rows need, or what the context allows."""
    print_mixture(sources, [cfg.system_prompt], run.print0)
    rows, issues = TokenizedRows(), DataIssues()
    context = model.config.block_size
    if cfg.max_length and cfg.max_length > context:
        run.print0(f'max_length {cfg.max_length} is clamped to the {context} tokens of context that the '
                   'model has')
    limit = min(cfg.max_length or context, context)
    # generators up to the file of TokenizedRows: a data set need not fit into memory
    records = read_records(cfg, sources, issues, run)
    if cfg.augment:
        records = with_copies(cfg, records, run)
    longest = encode_records(records, tokenizer, rows, issues, cfg.loss_on, limit, cfg.max_prompt_length,
                             cfg.dataset_num_proc, cfg.skip_bad_rows, cfg.algorithm == 'cpt')
    compare_splits(rows.close(), issues)
    # no longer than the longest row: it is the width of packed rows, and of the memory that they take
    cfg.max_length = min(cfg.max_length or longest, longest or context, context)
    # no prompt is so long, then; and a saved configuration that contradicts itself could not be resumed
    if cfg.max_prompt_length and cfg.max_prompt_length >= cfg.max_length:
        cfg.max_prompt_length = None
    return rows, issues


def read_records(cfg, sources, issues, run):
    """Yields (number of the source, Record) of every row that can be read; the others are issues.

    Rows without metadata are held out by their prompt: a question is never on both sides. A plain text has no
    prompt, and is held out by what it says.
    """
    held_out = 0
    for number, source in enumerate(sources):
        for where, row in read_rows(source.name, source.split, source.subset):
            try:
                record = (text_record(row, where, cfg.text_column) if cfg.algorithm == 'cpt' else
                          to_record(row, where, source, cfg.system_prompt))
            except UserError as error:
                issues.add('unreadable rows', str(error))
                continue
            if split_of_row(row) is None:       # else the row itself says on which side it is
                if cfg.split_rule == 'legacy':
                    is_eval = legacy_sft(record.prompt, cfg.eval_fraction, cfg.seed)
                else:
                    is_eval = is_held_out(record.prompt or record.completion, cfg.eval_fraction)
                if is_eval:
                    record.split = 'eval'
                    held_out += 1
            yield number, record
    if held_out:
        run.print0(f'data      {held_out:,} rows without "metadata" are held out '
                   f'(--eval_fraction={cfg.eval_fraction:g})')


def with_copies(cfg, records, run):
    """The (number, Record) pairs with reworded copies of those to train on, data set by data set."""
    # after the split and with its knowledge: no held-out row is reworded into training
    from data.augment import augment
    for number, group in itertools.groupby(records, key=operator.itemgetter(0)):
        originals = [record for _, record in group]
        for record in augment(originals, cfg.seed, cfg.augment_factor, print0=run.print0):
            yield number, record


def refuse_or_warn(cfg, rows, issues, run):
    """UserError where rows must not be learned, or none are left; prints what else is wrong with the data."""
    if not cfg.skip_bad_rows:
        issues.stop()
    for line in issues.lines():
        run.print0('note      ' + line)
    if rows.held_out.all():
        held_out = 'every row is held out: rows to train on have "metadata": "train" or none'
        raise UserError(f'no row is left to train on; {next(issues.lines(), held_out)}')
    if (cfg.patience or uses_plateau(cfg)) and not rows.held_out.any():
        run.print0('note      no row is held out: patience and lr_scheduler_type=plateau have nothing to '
                   'judge by, and do nothing')


# ---- what is chosen and printed before the first step ------------------------------------------------------

def resolve_defaults(cfg, model, sources, run):
    """Sets what was left open, and says so."""
    chosen = fill_in(cfg, learning_rate=default_learning_rate(cfg, model, small=SMALL_MODEL_RATE),
                     group_by_length=is_embedded(sources))
    if chosen:
        run.print0(f'chosen    {chosen} (type the flags for others)')
    if cfg.min_lr > cfg.learning_rate:
        raise UserError(f'min_lr={cfg.min_lr:g} is above learning_rate={cfg.learning_rate:g}: the rate would '
                        'rise')


def plan_steps(cfg, epochs, run):
    """(optimizer steps, steps of warm-up); clamps, and says, what would never come in so short a run."""
    total = cfg.max_steps if cfg.max_steps > 0 else math.ceil(cfg.num_train_epochs * epochs.per_epoch)
    warmup = math.ceil(cfg.warmup_ratio * total) if cfg.warmup_steps is None else cfg.warmup_steps
    # else a short run would end without one line of log, or without an evaluation before its end
    intervals = ['logging_steps', 'eval_steps'] if cfg.eval_strategy == 'steps' else ['logging_steps']
    for name in intervals:
        if getattr(cfg, name) > total:
            run.print0(f'note      {name}={getattr(cfg, name)} in a run of {total} steps: clamped to {total}')
            setattr(cfg, name, total)
    return total, warmup_within(warmup, total, run.print0)


def print_summary(cfg, model, rows, sources, epochs, total, warmup, run):
    """What will be trained on what, and for how long."""
    held_out = rows.held_out
    names = ', '.join(source.name for source in sources)
    run.print0(f'data      {names}: {(~held_out).sum():,} rows to train on, {held_out.sum():,} held out; '
               f'{rows.targets[~held_out].sum():,} of {rows.lengths[~held_out].sum():,} tokens are learned '
               f'(loss_on={cfg.loss_on})')
    order = 'steps of similar length' if cfg.group_by_length else 'in any order'
    if cfg.packing:
        order = f'packed into {epochs.count:,}'
    waste = f'{padding(cfg, epochs):.0%} of a batch is padding'
    if run.device.type == 'cpu':
        waste += ', which a CPU does not compute'
    run.print0(f'rows      longest {cfg.max_length} tokens, {order}: {waste}')
    name, mode = cfg.load_checkpoint or cfg.base_model_name, cfg.mode
    if mode == 'full' and getattr(model, 'adapters', None):
        mode = 'LoRA'                           # of an adapter that was loaded
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.print0(f'model     {name} ({model.config.arch}): {mode} fine-tuning, {trained:,} of '
               f'{model.num_params():,} parameters train')
    run.print0(f'machine   {describe_device(run)}')
    # the default is meant for a GPU; only who typed it expects something of it here
    is_half = cfg.use_lora and cfg.torch_dtype != 'float32' and 'torch_dtype' in cfg.typed
    if is_half and run.device.type == 'cpu':
        run.print0(f'note      torch_dtype={cfg.torch_dtype}: on a CPU weights are float32')
    rates = [learning_rate(step, cfg.lr_scheduler_type, cfg.learning_rate, cfg.min_lr, warmup, total)
             for step in range(0, total, max(1, total // 240))]
    run.print0(f'schedule  {plots.sparkline(rates, 40)} {cfg.lr_scheduler_type} to {max(rates):g} after '
               f'{warmup} steps of warm-up')
    often = {'steps': f'every {cfg.eval_steps} steps', 'epoch': 'after each epoch', 'no': 'never'}
    run.print0(f'run       {total:,} steps of {epochs.size} rows, {epochs.epoch(total):.3g} epochs, '
               f'evaluation {often[cfg.eval_strategy]}')


def padding(cfg, epochs):
    """The share of padding in the first epoch's micro-batches, each as wide as its longest item."""
    used = computed = 0
    for step in range(epochs.per_epoch):
        for part in micro_batches(epochs.of_step(step), cfg.per_device_train_batch_size):
            lengths = [epochs.length(item) for item in part]
            used += sum(lengths)
            computed += len(lengths) * max(lengths)
    return 1 - used / computed


def describe(cfg, model, rows, sources):
    """What the run is, for the first line of log.jsonl."""
    return {'data': [source.name for source in sources], 'rows': int((~rows.held_out).sum()),
            'model': cfg.load_checkpoint or cfg.base_model_name, 'parameters': model.num_params()}


# ---- start, resume, end ------------------------------------------------------------------------------------

@dataclass
class State(RunState):
    epochs_before: float = 0.0  # whole ones, of the checkpoint that was loaded: epochs are numbered on
    epoch: float = 0.0
    loss_sum: float = 0.0       # over all steps
    seconds: float = 0.0        # of training and evaluation, over all starts

    def note_step(self, loss, tokens, epochs):
        self.step += 1
        self.num_tokens += tokens
        self.epoch = self.epochs_before + epochs.epoch(self.step)
        if math.isfinite(loss):             # nan would stay for good, and JSON has none
            self.loss_sum += loss


def open_run(cfg):
    """(Run, its configuration). resume_from_checkpoint names a checkpoint, or says only whether to resume;
    load_checkpoint brings the settings of its run."""
    taken = ''
    if cfg.load_checkpoint:
        cfg, taken = loaded_config(cfg, cfg.load_checkpoint, 'train_sft.py')
    wanted = cfg.resume_from_checkpoint or ''
    resume, checkpoint = cfg.resume, None
    if wanted.lower() not in ('', 'false', 'no'):       # transformers takes a bool or a path here
        resume = cfg.resume = 'auto' if wanted.lower() == 'auto' else cfg.resume or True
        if wanted.lower() not in ('true', 'yes', 'auto'):
            checkpoint = str(resolve_link(wanted))
            folder = os.path.dirname(os.path.abspath(checkpoint))
            if os.path.realpath(folder) != os.path.realpath(cfg.output_dir):
                raise UserError(f'resume_from_checkpoint={wanted} is no checkpoint of output_dir='
                                f'{cfg.output_dir}: name that folder too, or take its weights alone with '
                                '--load_checkpoint')
    memory_flags = '--per_device_train_batch_size', '--per_device_eval_batch_size', '--max_length'
    run = Run.open(cfg, 'train_sft.py', cfg.output_dir, resume, memory_flags=memory_flags,
                   checkpoint=checkpoint)
    run.cfg.resume_from_checkpoint = cfg.resume_from_checkpoint         # not what an earlier resume named
    if taken and not run.resumed:
        run.print0(f'load      {cfg.load_checkpoint}, with what was set in its run: {taken}')
    return run, run.cfg


def epochs_of_loaded(cfg):
    """How many epochs the loaded checkpoint has behind it, as its trainer state says, or its name."""
    if not cfg.load_checkpoint:
        return 0.0
    state = read_json(os.path.join(loaded_path(cfg), 'trainer_state.json'))
    if 'epoch' in state:
        return float(int(state['epoch']))       # one that was broken off begins anew
    named = re.search(r'epoch_(\d+)/?$', cfg.load_checkpoint)
    return float(named[1]) if named else 0.0


def folder_name(cfg, state, epochs):
    """Of a checkpoint. Within an epoch none is named after an epoch alone."""
    name = cfg.checkpoint_name              # two checkpoints of one epoch would have one name
    if '{step}' not in name and state.step % epochs.per_epoch:
        name = 'checkpoint-{step}'
    return name.format(step=state.step, epoch=round(state.epoch))


def only_finite(metrics):
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def finish(cfg, state, metrics, log, run):
    """The last log line, the picture, with save_merged the whole model. Returns the final metrics."""
    seconds = max(state.seconds, 1e-9)      # evaluation and saving count here, unlike in the lines of a step
    summary = {'train_loss': state.loss_sum / max(state.step, 1), 'train_runtime': state.seconds,
               'num_tokens': state.num_tokens, 'train_steps_per_second': state.step / seconds,
               'tokens_per_second': state.num_tokens / seconds}
    log.write(state.step, summary)
    if run.is_main:
        title = os.path.basename(os.path.abspath(cfg.output_dir))
        plots.loss_picture(log.path, os.path.join(cfg.output_dir, 'loss.png'), title)
        if cfg.save_merged and os.path.exists(os.path.join(cfg.output_dir, 'adapter_config.json')):
            # the adapter names its base, but a base that was typed counts: it may lie elsewhere now
            base = cfg.base_model_name if 'base_model_name' in cfg.typed else None
            merged, tokenizer = load_model(cfg.output_dir, base=base)
            save_model(merge_lora(merged, keep=False), tokenizer, os.path.join(cfg.output_dir, 'merged'))
    run.barrier()                           # the other ranks wait till the files are there
    text = (f'the model is in {cfg.output_dir}/: python evaluate.py --model-path '
            f'{shlex.quote(cfg.output_dir)}')
    if state.best_eval_loss is not None:
        text = f'best eval_loss {state.best_eval_loss:.4f}; {text}'
    result = {**metrics, **summary, 'best_eval_loss': state.best_eval_loss, 'step': state.step}
    return run.finish(result, text)


if __name__ == '__main__':
    run_script(main, cfg)
