"""Reinforcement learning: PPO, GRPO, GSPO and their relatives, from one composition of small pure functions.

A policy loss is a ratio (of a token or of a sequence) put through a surrogate (clip, cispo, gmpo, sapo, reinforce) and averaged
(per token, per sequence, by a constant); an advantage is a reward less the baseline of its group, over a scale. PRESETS names the
published combinations: GRPO and GSPO differ by one argument.
"""
from configurator import UserError

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


import torch


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
    deviation = (squares / max(count, 1) - mean.square()).clamp(min=0).sqrt() + 1e-8
    return torch.where(mask, ((values - mean) / deviation).to(values.dtype), 0.0)


# ---- losses -----------------------------------------------------------------------------------------------------------------

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
    loss = torch.where(mask, loss if weights is None else loss * weights, 0.0)

    if mean == 'sequence':
        count = (mask.any(1).sum() if normaliser is None else normaliser)
        total = (loss / length).sum()
    else:
        count = normaliser if normaliser is not None else mask.sum() if mean == 'token' else mask.numel()
        total = loss.sum()
    with torch.no_grad():
        share = mask / length / mask.any(1).sum().clamp(min=1) if ratio == 'sequence' else mask / mask.sum().clamp(min=1)
        average = lambda x: (x.float() * share).sum()
        stats = {'ratio_mean': average(rho), 'ratio_min': torch.where(mask, rho, 1.0).min(), 'ratio_max': torch.where(mask, rho, 1.0).max(),
                 'approx_kl': average(kl_estimate(-log_ratio, torch.zeros_like(log_ratio), 'k3'))}
        if low is not None:
            low, high = average(low & mask), average(high & mask)
            stats.update({'clip_ratio/low_mean': low, 'clip_ratio/high_mean': high, 'clip_ratio/region_mean': low + high})
    return total / max(count, 1), stats


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
        return torch.exp(-d) + d - 1
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
