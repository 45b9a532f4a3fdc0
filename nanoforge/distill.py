"""The other half of `algorithm=distill`: KL(teacher || student) on answers that are given.

On-policy distillation (Agarwal et al. 2023, arXiv 2306.13649) learns from what the student samples:
train_rl.py gives each of its tokens the advantage log p_teacher - log p_student, the reverse KL as a reward.
What the student never samples it does not learn so; forward_kl mixes in the other direction, on answers of
the data and over the whole vocabulary:

    loss = (1 - forward_kl) * surrogate(ratio, A) + forward_kl * mean of KL(teacher || student)

The mean is over an answer's tokens first, then over the answers of an optimizer step, one for each problem.
"""
import random

import torch
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from data.batches import cut, pack
from data.chat import render
from data.completions import by_prompt

CHUNK = 2 ** 22         # logits of a model that are held at once


def given_answers(cfg, tokenizer, task, rollout, sizes, run):
    """[this rank's PackedBatches of each optimizer step of one pass over a Rollout], an answer a problem; an
    embedded task's are its noisy demonstrator's. UserError: a problem without an answer."""
    steps = [[] for _ in range(sizes.steps_per_rollout)]
    for row, c in zip(rollout.rows.tolist(), rollout.completions):
        if c.sample == 0:
            prompt, answer = given_answer(tokenizer, task, c.problem)
            steps[row // sizes.completions_per_step].append((prompt, [answer[:cfg.max_completion_length]]))
    return [[pack(part, run.device) for part in cut(pairs, cfg.per_device_train_batch_size)]
            for pairs in steps]


def given_answer(tokenizer, task, problem):
    """(prompt ids, ids of the answer with its stop token) of a problem."""
    text = problem.get('answer')
    if hasattr(task, 'demonstration'):
        text = task.demonstration(problem, random.Random(problem['question']))
    if not text:
        raise UserError(f'forward_kl: there is no answer to {problem["question"][:60]!r}; leave it at 0, or '
                        'name the column with --answer_column')
    row = render(tokenizer, [*task.prompt(problem), {'role': 'assistant', 'content': text}],
                 problem.get('tools'))
    begin, end = row.mask.index(True), len(row.mask) - row.mask[::-1].index(True)
    return row.ids[:begin], row.ids[begin:end]


def forward_kl(student, teacher, batch, temperature=1.0):
    """KL(teacher || student) at each token of a PackedBatch, (B, T), 0 where there is none; differentiable in
    the student. Where one vocabulary is padded further than the other, what both have is compared."""
    mask = batch.targets >= 0
    with torch.no_grad():
        wanted = batch.hidden_states(teacher)[mask]                 # (N, C')
    hidden = batch.hidden_states(student)[mask]                     # (N, C)
    vocab = min(model.config.vocab_size for model in (student, teacher))

    def of_rows(hidden, wanted):                                    # (n, C), (n, C') -> (n,)
        logq = (student.logits(hidden)[:, :vocab] / temperature).log_softmax(-1)
        with torch.no_grad():
            logp = (teacher.logits(wanted)[:, :vocab] / temperature).log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)

    rows = max(1, CHUNK // vocab)
    parts = [checkpoint(of_rows, *pair, use_reentrant=False)        # logits are made again in the backward
             for pair in zip(hidden.split(rows), wanted.split(rows))]
    kl = torch.cat(parts)
    return kl.new_zeros(mask.shape).masked_scatter(mask, kl)


def imitate(cfg, policy, reference, batches, answers, run):
    """Backward passes of forward_kl times the mean over an optimizer step's `answers`, of all ranks; returns
    the mean."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        with run.autocast(), reference() as teacher:
            kl = forward_kl(policy, teacher, batch, cfg.temperature)
        mean = (kl.sum(1) / (batch.targets >= 0).sum(1)).sum() / answers
        run.backward(cfg.forward_kl * mean)
        total += mean.detach().double().cpu()
    return float(run.sum(total))


@torch.no_grad()
def reverse_kl(cfg, reference, completions, run):
    """(sum of log p_student - log p_teacher, tokens) of Completions as they were sampled."""
    total, tokens = 0.0, 0
    said = [c for c in completions if c.completion_ids]
    for part in cut(said, cfg.per_device_train_batch_size):
        packed = pack(by_prompt(part), run.device, masks=[c.mask for c in part])
        with run.autocast(), reference() as teacher:
            stats = teacher.token_stats(packed.hidden_states(teacher), packed.targets, cfg.temperature,
                                        extras=False)
        total += sum(sum(c.logp) for c in part) - float(stats['logp'].double().sum())
        tokens += sum(c.length for c in part)
    return total, tokens
