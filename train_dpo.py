"""Preference optimisation: pairs of a chosen and a rejected answer to one prompt; DPO and its relatives.

    python train_dpo.py
    python train_dpo.py --recipe recipes/training/dpo/llama3_3B_lora.yaml --num-gpus 8
    python train_dpo.py --dataset_path pairs.jsonl --loss_type=simpo --beta=2 --gamma=1
    python train_dpo.py --resume

The policy p is trained to prefer the chosen answer y_w to the rejected one y_l, measured from a frozen
reference, the model that training starts from (Rafailov et al. 2023, arXiv 2305.18290, eq. 7):

    loss = -log sigmoid(beta (log[p(y_w|x) / ref(y_w|x)] - log[p(y_l|x) / ref(y_l|x)]))

dpo_loss has this and seven others, functions of the answers' log-probabilities, some of their lengths, too.
Departures from the paper:
  - dropout is off, so that policy and reference differ in nothing but weights (see disable_dropout)
  - a small model also learns the chosen answer as in SFT (rpo_alpha): it would forget how to speak
  - a prompt is computed once for both of its answers, and only the answers' tokens reach the head
  - a step is the mean over all its pairs, counted over micro-batches and ranks, however it is cut

Settings that several scripts share stand in nanoforge/flags.py.
"""
import math
import os
from typing import NamedTuple

from configurator import UserError, configclass, fill_in, parse, run_script, setting
from nanoforge.flags import DataFlags, LoaderFlags, ModelFlags, RunFlags, TrainFlags
from nanoforge.optim import SCHEDULER_NAMES, learning_rate, make_optimizer, warmup_within


class Loss(NamedTuple):
    """What a loss type takes; its formula is a branch of dpo_loss."""
    per_token: bool = False         # the mean log-probability of an answer's tokens, not the sum
    reference_free: bool = False
    smoothed: bool = False          # obeys label_smoothing


# A new loss type is a row here and a branch of dpo_loss; flags, checks and messages follow
LOSSES = {
    'sigmoid': Loss(smoothed=True),  # DPO and cDPO
    'robust': Loss(smoothed=True),  # DPO under flipped labels
    'hinge': Loss(),  # SLiC
    'ipo': Loss(per_token=True),  # a margin that is reached, not maximised
    'sigmoid_norm': Loss(per_token=True, smoothed=True),  # DPO without a bonus for length
    'simpo': Loss(per_token=True, reference_free=True, smoothed=True),
    'orpo': Loss(per_token=True, reference_free=True),  # with SFT in it: from a base model
    'apo_zero': Loss(),  # chosen up, rejected down, each alone
}
SAMPLES = ('prediction_loss_only=false',)


@configclass
class Config(RunFlags, TrainFlags, DataFlags, LoaderFlags, ModelFlags):
    section = 'training'
    unread_columns = ('answer_column',)

    algorithm: str = setting('dpo', choices=('dpo',))  # what a recipe is for
    loss_type: str = setting('sigmoid', choices=tuple(LOSSES))  # see dpo_loss
    beta: float = setting(0.1, above=0)  # strength of the pull to the reference: the larger, the nearer
        # the policy stays
    label_smoothing: float = setting(0.0, min=0, below=0.5)  # share of pairs labelled the wrong way round
        # (cDPO, robust DPO)
    gamma: float = setting(0.0, min=0)  # margin by which SimPO wants the chosen answer to win
    rpo_alpha: float | None = setting(None, min=0)  # weight of an SFT term, minus the mean log-probability of
        # the chosen answer's tokens; if not set 1 for small models, which would forget how to speak, else 0
    reference: str = setting('auto', choices=('auto', 'adapters_off', 'copy', 'cache'))  # auto: adapters off
        # under LoRA, else a frozen copy; cache: log-probabilities computed once, kept on disk
    reference_cache: str = setting('models/reference_logps', needs=('reference=cache',))  # folder of
        # these, shared by runs
    disable_dropout: bool = True  # false: the adapter's dropout acts on the policy
    apply_chat_template: bool = setting(True, path='data.apply_chat_template')  # false: texts as they are,
        # for models that do not chat
    max_eval_pairs: int = setting(512, path='data.max_eval_pairs', min=0)  # held-out pairs that are evaluated
    eval_samples: int = setting(64, min=0, needs=SAMPLES)  # held-out prompts answered at each evaluation
    max_new_tokens: int = setting(64, min=1, needs=SAMPLES)  # of such an answer
    prediction_loss_only: bool = False  # evaluate losses and rewards only, without sampling answers

    output_dir = 'models/dpo'
    per_device_train_batch_size = 16
    num_train_epochs = 2
    warmup_steps = 10
    seed = 42
    dataloader_drop_last = True
    dataloader_pin_memory = False

    def check(self):
        super().check()
        loss = LOSSES[self.loss_type]
        if self.label_smoothing and not loss.smoothed:
            smoothed = ', '.join(name for name in LOSSES if LOSSES[name].smoothed)
            raise UserError(f'label_smoothing belongs to loss_type {smoothed}, not to {self.loss_type}')
        if self.gamma and self.loss_type != 'simpo':
            raise UserError(f'gamma is the margin of loss_type=simpo, not of {self.loss_type}')
        if self.reference != 'auto' and loss.reference_free:
            raise UserError(f'loss_type={self.loss_type} has no reference: leave out '
                            f'reference={self.reference}')
        if self.reference == 'adapters_off' and not self.use_lora:
            raise UserError('reference=adapters_off needs an adapter: add model.use_lora=true, or use '
                            'reference=copy or cache')
        if self.system_prompt and not self.apply_chat_template:
            raise UserError('system_prompt is a message of the chat template, which '
                            'apply_chat_template=false leaves out')
        if SCHEDULER_NAMES[self.lr_scheduler_type] in ('plateau', 'exponential'):
            raise UserError(f'lr_scheduler_type={self.lr_scheduler_type} is not for runs as short as these: '
                            'use linear, cosine, wsd, cosine_restarts or constant')


def main(cfg):
    run = Run.open(cfg, 'train_dpo.py', cfg.output_dir, cfg.resume,
                   memory_flags=('--per_device_train_batch_size', '--max_length'))
    cfg = run.cfg
    sources = cfg.sources(embedded=('facts',))
    policy, tokenizer = build_policy(cfg, run)          # the base model, an adapter on it, or what is resumed
    pairs, train, held_out = load_pairs(cfg, sources, tokenizer, policy.config.block_size, run)
    pairs_per_step = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * run.world_size
    weights = [source.weight for source in sources]
    epochs = Epochs(train, weights, pairs_per_step, cfg.seed, cfg.dataloader_drop_last)
    resolve_defaults(cfg, policy, run)                  # learning_rate, rpo_alpha
    total_steps = cfg.max_steps if cfg.max_steps > 0 else math.ceil(cfg.num_train_epochs * epochs.per_epoch)
    warmup_steps = warmup_within(cfg.warmup_steps, total_steps, run.print0)
    kind = reference_kind(cfg)                          # none, adapters_off, copy or cache
    if cfg.plan:
        return plan.dpo(cfg, policy, pairs, epochs, total_steps, kind, run)
    print_summary(cfg, policy, epochs, total_steps, kind, run)
    if cfg.check_data:
        counts = {'pairs': sum(map(len, train)), 'held_out': len(held_out)}
        return run.finish(counts, describe_data(tokenizer, pairs, train, held_out))

    reference = open_reference(cfg, kind, policy, run)
    if kind == 'cache':
        used = {i for step in range(total_steps) for i in epochs.of_step(step)}
        read_cache(cfg, reference, [pairs[i] for i in sorted(used)] + held_out, run)
        if not reference.without_adapter:               # no second model is held while training
            if reference.model is not policy:
                run.release(reference.model)
            reference = None
    elif reference:
        precompute(cfg, reference, held_out, run)       # these come again at each evaluation
    optimizer = make_optimizer(cfg.optimizer, policy, cfg.learning_rate, cfg.weight_decay, betas=(0.9, 0.999))
    state = run.restore(State(cfg.optimizer), optimizer)
    if ended := run.ended(state, total_steps):
        return ended
    header = {'data': [source.name for source in sources], 'model': cfg.base_model_name, 'mode': cfg.mode,
              'loss_type': cfg.loss_type, 'reference': kind}
    log = run.start(total_steps, state.step, header, cfg.logging_steps, data=sources,
                    flops_per_token=plan.dpo_flops(policy, [pairs[i] for part in train for i in part], kind))
    first_step, metrics = state.step, {}
    frozen = [reference.model] if kind in ('adapters_off', 'copy') else []

    def load_step(step):
        """All pairs of a step, and this rank's micro-batches of them."""
        step_pairs = [pairs[i] for i in epochs.of_step(step)]
        return step_pairs, [make_batch(cfg, part, run) for part in local_batches(cfg, step_pairs, run)]

    def save(best=False):
        run.save(state, policy, tokenizer, optimizer, best=best)

    prefetch = Prefetcher(load_step, total_steps, cfg.dataloader_num_workers)
    while True:
        # ---- once in a while: evaluate, sample, plot, checkpoint. A new run is evaluated before its first
        # step, too: its curves begin at the reference. A resumed one has done that at its first step already
        last = state.step >= total_steps
        is_new = state.step > first_step
        is_due = last or state.step % cfg.eval_steps == 0
        evaluates = bool(held_out) and is_due and (is_new or not run.resumed)
        with log.pause():
            if evaluates:
                with run.unsharded():
                    metrics, margins = evaluate(cfg, policy, held_out, run)
                    sampled, text = sample_answers(cfg, policy, reference, tokenizer, held_out, run)
                metrics |= sampled
                log.write(state.step, metrics)
                if text:
                    log.text(state.step, 'samples', text)
                plot(cfg, margins, state.step, run)
            if is_new and (evaluates or last or state.step % cfg.save_steps == 0):
                save(best=evaluates and state.note_eval(metrics['eval_loss']))
        if last:
            break
        run.exit_if_asked(save)

        # ---- one optimizer step. Its pairs are a function of (seed, step): there is no data state to
        # restore, and a thread may make its batches ahead
        lr = learning_rate(state.step, cfg.lr_scheduler_type, cfg.learning_rate, 0.0, warmup_steps,
                           total_steps)
        step_pairs, batches = prefetch(state.step)
        means = torch.zeros(len(METRICS), device=run.device)    # this rank's part; log.train sums over ranks
        # each prompt once, its two answers behind it
        for micro, (batch, ref_logp) in enumerate(run.even(batches, policy, *frozen)):
            if not cfg.disable_dropout:                         # a counter, not a stream: a resume has it
                torch.manual_seed(seed_for(cfg.seed, 'dropout', state.step, micro, run.rank))
            # chosen and rejected in one forward pass, each the sum over its tokens
            with run.autocast():
                logp = answer_logp(policy, batch)               # (2B,): chosen, rejected, chosen, ...
            # the same of the reference: the policy without its adapter, or a frozen copy. With cache it came
            # with the batch; where the loss has no reference it is None
            if kind in ('adapters_off', 'copy'):
                ref_logp = reference(batch)                     # (2B,)
            # dpo_loss and the SFT term; neither the reference nor the columns carry a gradient
            loss, columns = pair_loss(cfg, logp, ref_logp, answer_lengths(batch))   # (B,), (B, 8)
            # divided by the pairs of the whole step, not of the micro-batch, which may be a short one: the
            # gradients add up to that of the mean, however the step is cut
            run.backward(loss.sum() / len(step_pairs))
            means += columns.sum(0) / len(step_pairs)
        # sum over ranks, clip, step; a gradient that is not finite is skipped
        grad_norm = run.step(optimizer, lr, cfg.max_grad_norm)
        # what a pair costs: its prompt counts once
        tokens = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in step_pairs)
        state.step += 1
        state.num_tokens += tokens
        log.train(state.step, tokens, **dict(zip(METRICS, means)), epoch=round(epochs.epoch(state.step), 3),
                  learning_rate=lr, grad_norm=grad_norm, num_tokens=state.num_tokens)
    best = '' if state.best_eval_loss is None else f' (eval_loss {state.best_eval_loss:.4f})'
    return run.finish({**metrics, 'step': state.step},
                      f'the model is in {cfg.output_dir}/{best}: python sample.py '
                      f'{shlex.quote(cfg.output_dir)} --chat')


if __name__ == '__main__':
    cfg = parse(Config)     # before torch is imported: --help and --print_config answer at once

import contextlib
import hashlib
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.batches import Epochs, Prefetcher, micro_batches, pack
from data.preferences import encode_pairs, read_pairs, remarks_on
from data.splits import is_held_out, legacy_dpo
from data.tasks import facts
from nanoforge import plan, plots
from nanoforge.checkpoint import atomic_write, writing
from nanoforge.data_checks import print_mixture
from nanoforge.lora import adapters_off, lora_layers, merge_lora
from nanoforge.policy import RATES, is_adapter, is_small, load_policy
from nanoforge.run import Run, State, describe_device, explain_out_of_memory, seed_for
from nanoforge.tensors import gathered
from sample import generate


# ---- the loss ----------------------------------------------------------------------------------------------

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, loss_type='sigmoid',
             label_smoothing=0.0, gamma=0.0, chosen_length=None, rejected_length=None):
    """(loss (B,), chosen_reward (B,), rejected_reward (B,)) of B pairs; the rewards carry no gradient.

    The first four: (B,) float32, log-probability of an answer, summed over its tokens, in nats; the
    reference's may be None where loss_type has no reference (simpo, orpo). chosen_length, rejected_length:
    (B,) tokens of the answers, for the types that take the mean over tokens instead of the sum. Below, w and
    l are the log-ratios policy - reference (for simpo and orpo the policy's log-probabilities), d = w - l,
    s the logistic function, e = label_smoothing. A reward is beta w or beta l.

      sigmoid       -(1 - e) log s(beta d) - e log s(-beta d)   DPO (Rafailov et al. 2023, arXiv 2305.18290,
                                                                eq. 7); e > 0: cDPO (Mitchell 2023)
      robust        (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)
                                                                unbiased under flips (arXiv 2403.00409, eq. 8)
      hinge         max(0, 1 - beta d)                          SLiC (arXiv 2305.10425, eq. 1) on log-ratios
      ipo           (d - 1 / (2 beta))^2, means over tokens     IPO (arXiv 2310.12036, eq. 17)
      sigmoid_norm  sigmoid with means over tokens              length-normalised DPO (arXiv 2411.15124,
                                                                section 5.1.2)
      simpo         sigmoid of beta d - gamma, means            SimPO (arXiv 2405.14734, eq. 6)
      orpo          -w - beta log s(log odds(w) - log odds(l)), means over tokens
                                                                ORPO (arXiv 2403.07691, eq. 6-7)
      apo_zero      1 - s(beta w) + s(beta l)                   APO-zero (arXiv 2408.06266, eq. 7)
    """
    if loss_type not in LOSSES:
        raise UserError(f'loss_type={loss_type!r} is none of {", ".join(LOSSES)}')
    chosen, rejected = policy_chosen, policy_rejected                   # w, l (B,)
    if not LOSSES[loss_type].reference_free:
        chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
    if LOSSES[loss_type].per_token:
        if chosen_length is None or rejected_length is None:
            raise UserError(f'loss_type={loss_type} takes means over tokens: give chosen_length and '
                            'rejected_length')
        chosen, rejected = chosen / chosen_length, rejected / rejected_length
    z = beta * (chosen - rejected)
    e = label_smoothing
    if loss_type in ('sigmoid', 'sigmoid_norm', 'simpo'):
        z = z - gamma
        loss = -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    elif loss_type == 'robust':
        loss = (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)
    elif loss_type == 'hinge':
        loss = torch.relu(1 - z)
    elif loss_type == 'ipo':
        loss = (chosen - rejected - 1 / (2 * beta)).square()
    elif loss_type == 'orpo':
        loss = -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    elif loss_type == 'apo_zero':
        loss = 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    else:
        raise NotImplementedError(f'loss_type={loss_type} has a row in LOSSES, but no branch here')
    return loss, (beta * chosen).detach(), (beta * rejected).detach()


def log_odds(logp):
    """log(p / (1 - p)) of log p, which rounding may have brought to 0, where odds are infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - torch.log(-torch.expm1(logp))


# TRL's names; an accuracy is the share of pairs whose chosen answer has the higher reward, or log-probability
METRICS = ('loss', 'rewards/chosen', 'rewards/rejected', 'rewards/accuracies', 'rewards/margins',
           'logps/chosen', 'logps/rejected', 'logps/accuracies')


def pair_loss(cfg, logp, ref_logp, lengths):
    """(loss (B,), a column for each of METRICS (B, 8) without gradient) of B pairs.

    logp, ref_logp, lengths (2B,): chosen, rejected, chosen, ...; ref_logp may be None, as in dpo_loss.
    """
    chosen, rejected = logp.view(-1, 2).unbind(1)                       # (B,) each, like all below
    chosen_length, rejected_length = lengths.view(-1, 2).unbind(1)
    ref_chosen = ref_rejected = None
    if ref_logp is not None:
        ref_chosen, ref_rejected = ref_logp.view(-1, 2).unbind(1)
    loss, chosen_reward, rejected_reward = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, cfg.beta, cfg.loss_type, cfg.label_smoothing, cfg.gamma,
        chosen_length, rejected_length)
    # DPO is content with both answers getting less likely, if the rejected one does so faster; the SFT term
    # holds the chosen one up (Pang et al. 2024, arXiv 2404.19733, eq. 1)
    if cfg.rpo_alpha:
        loss = loss - cfg.rpo_alpha * chosen / chosen_length
    columns = (loss, chosen_reward, rejected_reward, win(chosen_reward, rejected_reward),
               chosen_reward - rejected_reward, chosen, rejected, win(chosen, rejected))
    return loss, torch.stack([column.detach().float() for column in columns], 1)


def win(a, b):
    """1 where a is larger, 0 where b is. A tie is half a win: a policy equal to its reference scores 0.5."""
    return (1 + torch.sign(a - b)) / 2


# ---- data --------------------------------------------------------------------------------------------------

def load_pairs(cfg, sources, tokenizer, context, run):
    """(pairs, train, held_out): all pairs, as TokenPair; for each data set the numbers of those that are
    trained on; those that are held out, as TokenPair."""
    max_length = min(cfg.max_length or context, context)
    if cfg.max_length and cfg.max_length > context:
        run.print0(f'max_length={cfg.max_length} is clamped to the {context} tokens of context that the '
                   'model has')
    if cfg.max_prompt_length and cfg.max_prompt_length >= max_length:
        raise UserError(f'max_prompt_length={cfg.max_prompt_length} leaves no room for an answer in the '
                        f'model\'s context of {context}')
    print_mixture(sources, [cfg.system_prompt], run.print0)
    # A mistake in a row's form is an error that names it; a pair that teaches nothing is dropped, and counted
    pairs, train, held_out = [], [], []
    for source in sources:
        texts, drops = read_pairs(source, cfg.system_prompt, cfg.apply_chat_template, cfg.skip_bad_rows)
        rows = len(texts) + sum(map(len, drops.values()))
        encoded, more_drops, cuts = encode_pairs(tokenizer, texts, max_length, cfg.max_prompt_length,
                                                 cfg.dataset_num_proc)
        drops.update(more_drops)
        held = held_out_rows(cfg, texts, encoded)
        train.append([len(pairs) + row for row in range(len(encoded)) if not held[row]])
        held_out += [pair for pair, is_held in zip(encoded, held) if is_held]
        pairs += encoded
        print_source(source.name, rows, len(train[-1]), sum(held), drops, cuts, max_length, run)
        for line in remarks_on(tokenizer, texts):
            run.print0(f'          {line}')

    # a prompt that is held out anywhere is trained on nowhere: another data set may have it, too
    prompts = {tuple(pair.prompt) for pair in held_out}
    kept = [[i for i in rows if tuple(pairs[i].prompt) not in prompts] for rows in train]
    if lost := sum(map(len, train)) - sum(map(len, kept)):
        run.print0(f'          {lost:,} training pairs are left out, since their prompts are held out too')
    if not any(kept):
        raise UserError('no pair is left to train on; what was dropped is said above')
    # drawn, not the first ones: a file may be sorted
    if len(held_out) > cfg.max_eval_pairs:
        rng = np.random.default_rng(seed_for(cfg.seed, 'held'))
        drawn = sorted(rng.choice(len(held_out), cfg.max_eval_pairs, replace=False))
        held_out = [held_out[i] for i in drawn]
        run.print0(f'          of the held-out pairs {cfg.max_eval_pairs:,} are evaluated (max_eval_pairs)')
    return pairs, kept, held_out


def held_out_rows(cfg, texts, encoded):
    """For each encoded pair of a data set whether it is held out: as its metadata says, if any row's does,
    else by the hash of its prompt."""
    text_of = {text.where: text for text in texts}                      # encoding has dropped some
    if any(text.split == 'eval' for text in texts):
        return [text_of[pair.where].split == 'eval' for pair in encoded]
    if cfg.split_rule == 'legacy':                                      # it hashed the prompt's ids
        return [legacy_dpo(pair.prompt, cfg.eval_fraction) for pair in encoded]
    return [is_held_out(text_of[pair.where].prompt, cfg.eval_fraction) for pair in encoded]


def print_source(name, rows, train, held_out, drops, cuts, max_length, run):
    run.print0(f'data      {name}: {rows:,} rows, {train:,} pairs to train on, {held_out:,} held out')
    if drops:
        run.print0(f'          dropped: {drops}')
    if any(cuts.values()):
        run.print0(f'          cut: the beginning of {cuts["prompts"]:,} prompts, the end of '
                   f'{cuts["answers"]:,} answers (max_length={max_length})')


def make_batch(cfg, pairs, run):
    """B pairs -> (PackedBatch, ref_logp (2B,) or None), targets (2B, T): chosen, rejected, chosen, ..."""
    groups = [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    # share=None would decide batch by batch, and a pair's last bits would depend on its neighbours
    batch = pack(groups, run.device, share=True, pin=cfg.dataloader_pin_memory)
    if pairs[0].ref_logp is None:               # then none of them has one
        return batch, None
    return batch, torch.tensor([pair.ref_logp for pair in pairs], device=run.device).flatten()


def local_batches(cfg, items, run):
    """This rank's micro-batches of `items`."""
    return micro_batches(items, cfg.per_device_train_batch_size, run.rank, run.world_size)


def answer_logp(model, batch):
    """(N,) float32: the log-probability of each completion of a PackedBatch, summed over its tokens."""
    is_token = batch.targets >= 0                                       # (N, T)
    # without the padding of targets: as few positions as can be, (tokens, C), reach last layer and head
    hidden = model.hidden(batch.idx, batch.positions, logit_positions=batch.logit_positions[is_token])
    logp = model.token_stats(hidden[None], batch.targets[is_token][None], extras=False)['logp'][0]
    return logp.new_zeros(is_token.shape).masked_scatter(is_token, logp).sum(1)


def answer_lengths(batch):
    """(N,): how many tokens each completion has."""
    return (batch.targets >= 0).sum(1)


# ---- policy and reference ----------------------------------------------------------------------------------

def build_policy(cfg, run):
    """(model, tokenizer): the base model, a new or a loaded adapter on it, or the checkpoint resumed."""
    policy, tokenizer = load_policy(cfg, run, cfg.base_model_name, run.resumed)
    if not cfg.use_lora and getattr(policy, 'adapters', None):
        merge_lora(policy, keep=False)          # base_model_name is an adapter, but all weights are to train
    # load_policy gives an adapter its lora_dropout, and one that is loaded has brought its own
    for layer in lora_layers(policy):
        for adapter in layer.lora.values():
            adapter.dropout = 0.0 if cfg.disable_dropout else cfg.lora_dropout
    return run.prepare(policy), tokenizer


def reference_kind(cfg):
    """What rewards are measured from: none, adapters_off, copy or cache."""
    if LOSSES[cfg.loss_type].reference_free:
        return 'none'
    # where an adapter is trained further, the model without it is not what this training starts from
    from_base = not is_adapter(cfg.base_model_name)
    if cfg.reference == 'adapters_off' and not from_base:
        raise UserError(f'reference=adapters_off: {cfg.base_model_name} is an adapter already, and without '
                        'it the model is not what training starts from; use reference=copy or cache')
    if cfg.reference != 'auto':
        return cfg.reference
    return 'adapters_off' if cfg.use_lora and from_base else 'copy'


def open_reference(cfg, kind, policy, run):
    """The Reference of this run; None where the loss has none. With cache it is the one that fills it."""
    if kind == 'none':
        return None
    can_switch_off = cfg.use_lora and not is_adapter(cfg.base_model_name)
    if kind == 'adapters_off' or kind == 'cache' and can_switch_off:        # costs no memory
        return Reference(policy, run, without_adapter=True)
    if kind == 'cache' and not run.resumed:
        return Reference(policy, run)           # which has not been trained yet
    # a second model, in torch_dtype on a GPU
    frozen, _ = load_policy(cfg, run, cfg.base_model_name, trainable=False)
    return Reference(run.prepare(frozen), run)


class Reference:
    """The model that rewards are measured from: reference(batch) -> (N,), its answer_logp."""

    def __init__(self, model, run, without_adapter=False):
        self.model, self.run, self.without_adapter = model, run, without_adapter

    def opened(self):
        return adapters_off(self.model) if self.without_adapter else contextlib.nullcontext()

    @torch.no_grad()
    def __call__(self, batch):
        was_training = self.model.training
        self.model.eval()                       # the policy's dropout is not the reference's
        with self.opened(), self.run.autocast():
            logp = answer_logp(self.model, batch)
        self.model.train(was_training)
        return logp

    def fingerprint(self):
        """A hash of what its log-probabilities depend on: precision and weights."""
        with self.opened():
            weights = self.model.state_dict()
            weights = {name: weights[name] for name in weights
                       if not (self.without_adapter and '.lora.' in name)}
            return hash_of([str(self.run.dtype), self.run.matmul], weights)


def precompute(cfg, reference, pairs, run):
    """Sets ref_logp of these pairs, on every rank."""
    # a row is 0 on the ranks that have not computed it: their sum is the whole
    table = torch.zeros(len(pairs), 2, device=run.device)
    with run.unsharded():
        for rows in local_batches(cfg, list(range(len(pairs))), run):
            batch, _ = make_batch(cfg, [pairs[row] for row in rows], run)
            table[rows] = reference(batch).view(-1, 2).float()
    for pair, logp in zip(pairs, run.sum(table).tolist()):
        pair.ref_logp = logp


def read_cache(cfg, reference, pairs, run):
    """Sets ref_logp of these pairs, on every rank, from a file to which it adds what is missing.

    The file is named after a hash of the weights and the precision: another model has another one. A row
    is named after a hash of the pair's ids, so that chat template and truncation count, too.
    """
    path = Path(cfg.reference_cache) / f'{reference.fingerprint()}.safetensors'
    names = [hash_of([pair.prompt, pair.chosen, pair.rejected]) for pair in pairs]
    known = {}
    if path.exists():
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise UserError(f'{path} is not a whole file of reference log-probabilities ({error}): remove '
                            'it, it is made again') from None
        known = dict(zip((row.tobytes().hex() for row in saved['pairs'].numpy()), saved['logps'].tolist()))
    # a dictionary: what two data sets share is computed once
    missing = {name: pair for name, pair in zip(names, pairs) if name not in known}
    if missing:
        run.print0(f'reference {len(pairs) - len(missing):,} of {len(pairs):,} pairs are in {path}; '
                   'computing the others')
        # rows of about the same length pad little
        by_length = sorted(missing, key=lambda name: len(missing[name].prompt))
        precompute(cfg, reference, [missing[name] for name in by_length], run)
        known.update((name, missing[name].ref_logp) for name in by_length)
        run.on_main(lambda: write_cache(path, known))
    for name, pair in zip(names, pairs):
        pair.ref_logp = known[name]


def write_cache(path, known):
    """{name: [chosen, rejected]} as two tensors: pairs (n, 16) bytes of the names, logps (n, 2) float32."""
    # a hexadecimal name is two characters a byte; safetensors holds no text
    tensors = {'pairs': torch.tensor([list(bytes.fromhex(name)) for name in known], dtype=torch.uint8),
               'logps': torch.tensor(list(known.values()))}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: save_file(tensors, temporary))


def hash_of(value, tensors=()):
    """Sixteen bytes in hexadecimal of JSON-able values, and of tensors by name. Every rank calls it: sharded
    tensors are gathered one at a time."""
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(gathered(tensors[name]).cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- evaluation --------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(cfg, policy, held_out, run):
    """(metrics, margins (n,)) over the held-out pairs, each once."""
    policy.eval()
    table = torch.zeros(len(held_out), len(METRICS), device=run.device)
    for rows in local_batches(cfg, list(range(len(held_out))), run):
        batch, ref_logp = make_batch(cfg, [held_out[row] for row in rows], run)
        with run.autocast():
            logp = answer_logp(policy, batch)
        table[rows] = pair_loss(cfg, logp, ref_logp, answer_lengths(batch))[1]
    run.sum(table)                              # a row is 0 on the ranks that have not computed it
    policy.train()
    metrics = {f'eval_{key}': value for key, value in zip(METRICS, table.mean(0).tolist())}
    return metrics, table[:, METRICS.index('rewards/margins')].cpu()


@torch.no_grad()
def sample_answers(cfg, policy, reference, tokenizer, held_out, run):
    """Answers drawn to held-out prompts at temperature 1 -> (metrics, text of the first three).

    kl estimates KL(policy || reference) in nats an answer by the mean log-ratio of what the policy drew;
    there is none where only a cache is left of the reference. success_rate is the share of answers that
    follow the rule of the embedded data set. ({}, '') where no samples are wanted, and on other ranks.
    """
    if run.rank or not cfg.eval_samples or cfg.prediction_loss_only:
        return {}, ''
    # a prompt may have many pairs: it is answered once
    prompts = list({tuple(pair.prompt): pair.prompt for pair in held_out}.values())[:cfg.eval_samples]
    log_ratios = []
    with run.autocast(), explain_out_of_memory('--eval_samples', '--max_new_tokens'):
        # the same uniform numbers at each evaluation: what differs is the policy
        samples = generate(policy, prompts, cfg.max_new_tokens, stop_ids=tokenizer.stop_ids,
                           seed=seed_for(cfg.seed, 'samples'))
        # rows end where their answer does, behind its stop token if it has one
        answers = [row[:length].tolist() for row, length in zip(samples.tokens, samples.lengths)]
        groups = [(prompt, [answer]) for prompt, answer in zip(prompts, answers)]
        for part in micro_batches(groups, cfg.per_device_train_batch_size):
            if reference:
                batch = pack(part, run.device, share=True)
                log_ratios += (answer_logp(policy, batch) - reference(batch)).tolist()
    # k1 of Schulman's estimators: unbiased, and noisy with so few answers
    metrics = {}
    if log_ratios:
        metrics['kl'] = sum(log_ratios) / len(log_ratios)
    texts = [(tokenizer.decode(prompt), tokenizer.decode(answer, skip_special_tokens=True))
             for prompt, answer in zip(prompts, answers)]
    if [source.name for source in cfg.sources(embedded=('facts',))] == ['facts']:
        metrics['success_rate'] = sum(facts.in_form(*text) for text in texts) / len(texts)
    return metrics, '\n'.join(map(''.join, texts[:3]))


PANELS = [('loss', {'loss': 'training', 'eval_loss': 'held out'}),
          ('accuracy', {'rewards/accuracies': 'training', 'eval_rewards/accuracies': 'held out, by reward',
                        'eval_logps/accuracies': 'by the policy alone', 'success_rate': 'sampled answers'}),
          ('reward', {'eval_rewards/chosen': 'chosen', 'eval_rewards/rejected': 'rejected',
                      'eval_rewards/margins': 'margin'}),
          ('log-probability', {'eval_logps/chosen': 'chosen', 'eval_logps/rejected': 'rejected'})]


def plot(cfg, margins, step, run):
    """The curves so far, and how the margins of the held-out pairs are spread."""
    if not run.is_main:
        return
    title = os.path.basename(os.path.abspath(cfg.output_dir))
    plots.curves(run.log.path, os.path.join(cfg.output_dir, 'loss.png'), title, PANELS)
    plots.margins(margins.tolist(), os.path.join(cfg.output_dir, 'margins.png'),
                  f'{title}: held-out pairs after step {step}')


# ---- what is chosen, and printed before the first step -----------------------------------------------------

def resolve_defaults(cfg, policy, run):
    """Fills in what is unset, and says so."""
    small = is_small(policy)
    # A small model learns at thirty times a large one's rates, and needs to, adapters included. It also
    # forgets how to speak without an SFT term, which orpo brings with it
    chosen = fill_in(cfg, learning_rate=RATES[cfg.mode] * (30 if small else 1),
                     rpo_alpha=1.0 if small and cfg.loss_type != 'orpo' else 0.0,
                     warmup_steps=10)
    if chosen:
        trained = f'{cfg.mode} training of a small model' if small else f'{cfg.mode} training'
        run.print0(f'chosen    {chosen} for {trained} (type the flags for others)')


def print_summary(cfg, policy, epochs, total_steps, kind, run):
    """What will be trained, by what loss, for how long."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    run.print0(f'model     {cfg.base_model_name}: {policy.num_params():,} parameters, {cfg.mode}: '
               f'{trained:,} are trained')
    run.print0(f'machine   {describe_device(run)}')
    words = {'adapters_off': 'the model without its adapter', 'copy': 'a frozen copy',
             'cache': 'log-probabilities on disk', 'none': 'none'}
    sft = f' + {cfg.rpo_alpha:g} SFT' if cfg.rpo_alpha else ''
    run.print0(f'loss      {cfg.loss_type}, beta {cfg.beta:g}{sft}, reference: {words[kind]}')
    run.print0(f'run       {total_steps:,} steps of {epochs.size} pairs, {epochs.per_epoch:,} an epoch, '
               f'{epochs.epoch(total_steps):.2g} epochs; highest learning rate {cfg.learning_rate:g}')
    if cfg.use_lora and cfg.lora_dropout and cfg.disable_dropout:
        run.print0(f'note      lora_dropout={cfg.lora_dropout} is not applied, so that policy and reference '
                   'differ in weights alone (disable_dropout=false applies it)')


def describe_data(tokenizer, pairs, train, held_out):
    """What --check prints: lengths, and three pairs as the model sees them, in a terminal in colour."""
    lines = []
    for name in ('prompt', 'chosen', 'rejected'):       # of all pairs, the held-out ones, too
        lengths = sorted(len(getattr(pair, name)) for pair in pairs)
        lines.append(f'          {name + ":":<10} {lengths[0]} to {lengths[-1]} tokens, median '
                     f'{lengths[len(lengths) // 2]}')
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) / len(pairs)
    lines.append(f'          the chosen answer is the longer one in {longer:.0%} of the pairs')
    if not 0.35 < longer < 0.65:
        lines[-1] += ': a policy can win by length alone (see loss_type=sigmoid_norm or simpo)'
    unended = sum(pair.chosen[-1] not in tokenizer.stop_ids for pair in pairs)
    if unended:
        lines.append(f'          {unended:,} chosen answers do not end with a stop token')
    first_of_each = [pairs[rows[0]] for rows in train if rows]
    for pair in [*first_of_each, *held_out[:1]][:3]:
        prompt, chosen, rejected = map(tokenizer.decode, (pair.prompt, pair.chosen, pair.rejected))
        if sys.stdout.isatty():
            chosen, rejected = f'\033[32m{chosen}\033[0m', f'\033[31m{rejected}\033[0m'
        lines.append(f'--- {pair.where}\n{prompt}{chosen}\n   instead of: {rejected}')
    return '\n'.join(lines)


if __name__ == '__main__':
    run_script(main, cfg)
