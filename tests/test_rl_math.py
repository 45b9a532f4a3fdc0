"""The pure functions of train_rl.py against numbers worked by hand, independent loops,
and gradients by finite differences; and every preset on a bandit whose best arm is known."""
import math
import statistics

import pytest
import torch

import train_rl
from configurator import UserError
from train_rl import PRESETS, decoupled_advantages, gae, group_advantages, kl_estimate, policy_loss, value_loss, whiten

t = lambda *rows: torch.tensor(rows, dtype=torch.float64)


# ---- advantages --------------------------------------------------------------------------------------------

def test_group_advantages_by_hand():
    rewards, group = torch.tensor([1., 0., 0., 1., 5., 2., 2.]), torch.tensor([7, 7, 7, 7, 3, 3, 3])
    # group 7: mean 0.5, unbiased std sqrt(4 * 0.25 / 3); group 3: mean 3, std sqrt((4 + 1 + 1) / 2)
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(3) + 1e-4)
    assert group_advantages(rewards, group).tolist() == pytest.approx([a, -a, -a, a, 2 * b, -b, -b], abs=1e-6)
    assert group_advantages(rewards, group, 'none').tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 2, -1, -1])
    mean = 11 / 7
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards.tolist()) / 6)
    assert group_advantages(rewards, group, 'batch')[4].item() == pytest.approx(2 / (std + 1e-4), abs=1e-6)
    loo = [1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3, 5 - 2, 2 - 3.5, 2 - 3.5]
    assert group_advantages(rewards, group, 'none', 'leave_one_out').tolist() == pytest.approx(loo, abs=1e-6)


def test_group_advantages_leave_out_what_is_unscored():
    rewards, group = torch.tensor([1., 0., math.nan, 4., math.nan]), torch.tensor([0, 0, 0, 1, 1])
    valid = torch.tensor([True, True, False, True, False])
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert group_advantages(rewards, group, valid=valid).tolist() == pytest.approx([a, -a, 0, 0, 0], abs=1e-6)
    assert group_advantages(rewards, group, 'batch', 'leave_one_out', valid)[2:].tolist() == [0, 0, 0]


@pytest.mark.parametrize('scale', ['group', 'batch', 'none'])
def test_equal_rewards_give_exactly_zero(scale):
    rewards = torch.tensor([0.1] * 7 + [0.0, 1.0])              # the mean of seven 0.1 is not 0.1 in float32
    advantages = group_advantages(rewards, torch.tensor([0] * 7 + [1, 1]), scale)
    assert advantages[:7].tolist() == [0] * 7 and advantages[8] > 0


def test_group_of_one_is_an_error():
    with pytest.raises(UserError, match='group of one'):
        group_advantages(torch.ones(3), torch.tensor([0, 0, 1]))


def decoupled_by_hand(columns, weights, groups):
    """GDPO in plain Python: columns of numbers, [[indices of a group]] -> {index: advantage}."""
    mean_and_std = lambda x: (statistics.mean(x), statistics.stdev(x) if len(x) > 1 else 0)
    groups = [group for group in groups if group]
    total = dict.fromkeys((i for group in groups for i in group), 0.0)
    for weight, column in zip(weights, columns):
        for group in groups:
            mean, std = mean_and_std([column[i] for i in group])
            for i in group:
                total[i] += weight * (column[i] - mean) / (std + 1e-4)
    mean, std = mean_and_std(list(total.values()))
    return {i: (value - mean) / (std + 1e-4) for i, value in total.items()}


def test_decoupled_advantages_by_hand():
    right, short = [1., 0., 0., 1., 5., 2., 2., 9.], [0.01, 0.03, 0.02, 0.0, 0.5, 0.5, 0.5, 0.9]
    group, valid = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3]), torch.tensor([True] * 7 + [False])
    expected = decoupled_by_hand((right, short), (2, 0.5), ([0, 1, 2, 3], [4, 5, 6]))
    advantages = decoupled_advantages([torch.tensor(right), torch.tensor([*short[:7], math.nan])], (2, 0.5), group, valid)
    assert advantages.tolist() == pytest.approx([*expected.values(), 0], abs=1e-6)
    # summed first, a reward of small spread is nearly lost; with one reward of equal groups nothing is left
    summed = group_advantages(2 * torch.tensor(right) + 0.5 * torch.tensor(short), group, valid=valid)
    assert (summed[1] - summed[2]).abs() < 0.01 < 0.1 < (advantages[1] - advantages[2]).abs()
    nothing = decoupled_advantages([torch.ones(8), torch.zeros(8)], (1, 1), group, valid)
    assert nothing.tolist() == [0] * 8 and decoupled_advantages([torch.ones(8)], (1,), group, valid & False).tolist() == [0] * 8
    assert decoupled_advantages([torch.tensor(right)], (1,), group).sum().abs() < 1e-5


def test_gae_by_hand():
    rewards, values = t([0, 0, 1.0, 9]), t([0.5, 0.4, 0.6, 7])
    mask = torch.tensor([[1, 1, 1, 0]])
    gamma, lam = 0.9, 0.8
    d2 = 1 - 0.6
    d1 = 0.9 * 0.6 - 0.4
    d0 = 0.9 * 0.4 - 0.5
    a2, a1 = d2, d1 + 0.72 * d2
    a0 = d0 + 0.72 * a1
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert advantages[0].tolist() == pytest.approx([a0, a1, a2, 0], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([a0 + 0.5, a1 + 0.4, a2 + 0.6, 0], abs=1e-12)
    # cut off with 2 expected behind the last token
    advantages, _ = gae(rewards, values, mask, gamma, lam, bootstrap=t(2.0))
    assert advantages[0, 2].item() == pytest.approx(d2 + 0.9 * 2)
    # lam = 1: returns are discounted sums of rewards whatever the critic says
    assert gae(rewards, values, mask, gamma, 1.0)[1][0].tolist() == pytest.approx([0.81, 0.9, 1, 0])


def test_gae_steps_over_masked_tokens():
    rewards, values = t([0.2, 5, 5, 1.0]), t([0.5, 3, math.nan, 0.6])
    between, _ = gae(rewards, values, torch.tensor([[1, 0, 0, 1]]), 0.9, 0.8)
    plain, _ = gae(t([0.2, 1.0]), t([0.5, 0.6]), torch.ones(1, 2), 0.9, 0.8)
    assert between[0, [0, 3]].tolist() == pytest.approx(plain[0].tolist()) and between[0, 1:3].tolist() == [0, 0]


def test_whiten():
    x, mask = t([1, 2, 99], [3, 6, 5]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    y = whiten(x, mask)
    std = math.sqrt(sum((v - 3) ** 2 for v in (1, 2, 3, 6)) / 4)
    assert y.flatten().tolist() == pytest.approx([-2 / std, -1 / std, 0, 0, 3 / std, 0], abs=1e-6)


def test_kl_estimates_by_hand():
    logp, ref = t([-1.0]), t([-1.5])
    assert kl_estimate(logp, ref, 'k1').item() == pytest.approx(0.5)
    assert kl_estimate(logp, ref, 'k2').item() == pytest.approx(0.125)
    assert kl_estimate(logp, ref, 'k3').item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    with pytest.raises(UserError, match='k4'):
        kl_estimate(logp, ref, 'k4')


def test_kl_gradients():
    """Over the exact distribution: k1 and k3 are the KL in value,
    the gradient of k2 as a loss is that of the reverse KL."""
    z, ref = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True), torch.log_softmax(t(0.1, 0.5, -0.4)[:, ], 0)
    logp = z.log_softmax(0)
    p = logp.exp().detach()
    kl = (logp.exp() * (logp - ref)).sum()
    exact, = torch.autograd.grad(kl, z, retain_graph=True)
    for kind in ('k1', 'k3'):
        assert (p * kl_estimate(logp, ref, kind)).sum().item() == pytest.approx(kl.item(), abs=1e-12)
    k2, = torch.autograd.grad((p * kl_estimate(logp, ref, 'k2')).sum(), z, retain_graph=True)
    assert k2.tolist() == pytest.approx(exact.tolist(), abs=1e-12)
    k1, = torch.autograd.grad((p * kl_estimate(logp, ref, 'k1')).sum(), z)
    assert k1.abs().max() < 1e-12


# ---- the policy loss ---------------------------------------------------------------------------------------

OLD = t([-1.0, -2.0, -0.5, -9.0], [-0.7, -1.1, -9.0, -9.0], [-0.4, -0.6, -1.9, -2.2])
NEW = OLD + t([0.30, -0.05, -0.40, 5], [0.01, 0.35, 5, 5], [-0.60, 0.02, 0.25, 1.2])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
ADVANTAGES = t(1.5, -0.5, -2.0)[:]


def by_loops(logp, ratio='token', surrogate='clip', clip_low=0.2, clip_high=0.2, dual_clip=None, mean='token', weights=None, frozen=None):
    """The same loss, written token by token in plain Python from the papers' formulas.
    frozen: the log-probabilities at which what the formulas stop the gradient through is taken
    (for finite differences)."""
    frozen = logp if frozen is None else frozen
    rows = []
    for b in range(3):
        at = [i for i in range(4) if MASK[b, i]]
        d = [float(logp[b, i] - OLD[b, i]) for i in at]
        A, losses = float(ADVANTAGES[b]), []
        s = math.exp(sum(d) / len(d))
        for k, i in enumerate(at):
            r = math.exp(d[k]) if ratio == 'token' else s
            if surrogate == 'clip':
                loss = -min(r * A, max(min(r, 1 + clip_high), 1 - clip_low) * A)
                if dual_clip and A < 0:
                    loss = min(loss, -dual_clip * A)
            elif surrogate == 'cispo':
                stopped = math.exp(float(frozen[b, i] - OLD[b, i]))
                if ratio == 'sequence':
                    stopped = math.exp(sum(float(frozen[b, j] - OLD[b, j]) for j in at) / len(at))
                loss = -max(min(stopped, 1 + clip_high), 1 - clip_low) * A * float(logp[b, i])
            elif surrogate == 'gmpo':
                narrow = [min(x, clip_high) if A > 0 else max(x, -clip_low) for x in d]
                loss = -A * math.exp(sum(narrow) / len(narrow))
            elif surrogate == 'sapo':
                tau = 1.0 if A > 0 else 1.05
                loss = -A * 4 / tau / (1 + math.exp(-tau * (r - 1)))
            else:
                loss = -A * float(logp[b, i])
            losses.append(loss * (float(weights[b, i]) if weights is not None else 1))
        rows.append(losses)
    if mean == 'token':
        return sum(map(sum, rows)) / sum(map(len, rows))
    if mean == 'sequence':
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / 12


COMPOSITIONS = [dict(ratio=ratio, surrogate=surrogate, mean=mean)
                for ratio in ('token', 'sequence') for surrogate in ('clip', 'cispo', 'gmpo', 'sapo', 'reinforce')
                for mean in ('token', 'sequence', 'constant')]
SOUND = [c for c in COMPOSITIONS if not (c['ratio'] == 'sequence' and (c['mean'] != 'sequence' or c['surrogate'] in ('gmpo', 'reinforce')))
         and not (c['surrogate'] == 'gmpo' and c['mean'] != 'sequence')] + [
    dict(dual_clip=1.2), dict(clip_low=0.05, clip_high=0.5), dict(mean='sequence', weights=t([.5, 1, 2, 1], [1, 1, 1, 1], [.1, .2, .3, .4]))]


@pytest.mark.parametrize('how', SOUND, ids=lambda how: '-'.join(str(v) if not torch.is_tensor(v) else 'weights' for v in how.values()))
def test_policy_loss_equals_the_formulas_and_their_gradients(how):
    poisoned, old = NEW.clone(), OLD.clone()
    poisoned[0, 3] = old[1, 3] = math.nan                       # what is masked is never looked at
    logp = poisoned.requires_grad_()
    loss, stats = policy_loss(logp, old, ADVANTAGES, MASK, **how)
    assert loss.item() == pytest.approx(by_loops(NEW, **how), abs=1e-12)
    loss.backward()
    for b in range(3):
        for i in range(4):
            up, down = NEW.clone(), NEW.clone()
            up[b, i] += 1e-6
            down[b, i] -= 1e-6
            slope = (by_loops(up, frozen=NEW, **how) - by_loops(down, frozen=NEW, **how)) / 2e-6
            assert logp.grad[b, i].item() == pytest.approx(slope if MASK[b, i] else 0, abs=1e-6)
    assert all(math.isfinite(v) for v in stats.values())


@pytest.mark.parametrize('how', [c for c in COMPOSITIONS if c not in SOUND] + [
    dict(dual_clip=0.9), dict(dual_clip=3, surrogate='cispo'), dict(ratio='word'), dict(mean='median'), dict(surrogate='ppo')])
def test_compositions_without_meaning_are_errors(how):
    with pytest.raises(UserError):
        policy_loss(NEW, OLD, ADVANTAGES, MASK, **how)


def test_a_surrogate_without_a_formula_is_an_error(monkeypatch):
    monkeypatch.setattr(train_rl, 'SURROGATES', (*train_rl.SURROGATES, 'mine'))
    with pytest.raises(NotImplementedError, match='mine'):
        policy_loss(NEW, OLD, ADVANTAGES, MASK, surrogate='mine')


def test_clip_by_hand():
    """One token a case: what is clipped has no gradient, and the stats count it."""
    old, advantages = torch.zeros(4, 1), torch.tensor([1., -1., 1., -1.])
    logp = torch.tensor([[1.5], [1.5], [0.5], [0.5]]).log().requires_grad_()
    loss, stats = policy_loss(logp, old, advantages, torch.ones(4, 1))
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4, abs=1e-6)
    loss.backward()
    assert logp.grad.flatten().tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0], abs=1e-6)
    assert stats['clip_ratio/high_mean'] == 0.25 and stats['clip_ratio/low_mean'] == 0.25 and stats['clip_ratio/region_mean'] == 0.5
    assert stats['ratio_max'].item() == pytest.approx(1.5) and stats['ratio_min'].item() == pytest.approx(0.5)
    assert stats['approx_kl'].item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5)) / 4, abs=1e-6)


def test_first_update_is_plain_policy_gradient():
    """With the ratio exactly 1 every surrogate's gradient is -A / N per token
    (SAPO's sigmoid has slope 1 there)."""
    for how in SOUND[:-3]:
        logp = OLD.clone().requires_grad_()
        loss, stats = policy_loss(logp, OLD, ADVANTAGES, MASK, clip_high=0.2, **how)
        loss.backward()
        length, count = MASK.sum(1, keepdim=True), {'token': MASK.sum(), 'sequence': 3, 'constant': 12}[how['mean']]
        weight = MASK / (length if how['mean'] == 'sequence' else 1) / count
        assert torch.allclose(logp.grad, -ADVANTAGES[:, None] * weight, atol=1e-12)
        assert stats['ratio_mean'].item() == pytest.approx(1, abs=1e-6)


def test_cutting_a_batch_changes_nothing():
    """With the normaliser of the whole step the parts' losses add up, however the rows are shared out;
    empty rows cost nothing."""
    for how in SOUND[:-1]:
        mean = how.get('mean', 'token')
        count = {'token': int(MASK.sum()), 'sequence': 3, 'constant': 12}[mean]
        whole, _ = policy_loss(NEW, OLD, ADVANTAGES, MASK, **how)
        parts = [policy_loss(NEW[b:b + 1], OLD[b:b + 1], ADVANTAGES[b:b + 1], MASK[b:b + 1], normaliser=count, **how)[0] for b in range(3)]
        assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)
        empty = torch.cat((MASK, torch.zeros(1, 4, dtype=MASK.dtype)))
        padded = lambda x: torch.cat((x, x[:1]))
        if mean != 'constant':
            again, _ = policy_loss(padded(NEW), padded(OLD), padded(ADVANTAGES), empty, **how)
            assert again.item() == pytest.approx(whole.item(), abs=1e-12)
        nothing, _ = policy_loss(NEW.clone().requires_grad_(), OLD, ADVANTAGES, torch.zeros_like(MASK), **how)
        nothing.backward()
        assert nothing.item() == 0


def test_value_loss_by_hand():
    values, old, returns = t([1.0, 2.0, 9]).requires_grad_(), t([0.5, 2.0, 0]), t([2.0, 2.5, 0])
    mask = torch.tensor([[1, 1, 0]])
    loss, clipped = value_loss(values, old, returns, mask)
    assert loss.item() == pytest.approx(0.5 * (1 + 0.25) / 2) and clipped == 0
    # 1.0 counts as 0.7, whose error is larger
    loss, clipped = value_loss(values, old, returns, mask, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (1.3 ** 2 + 0.25) / 2) and clipped == 0.5
    loss.backward()
    assert values.grad.flatten().tolist() == pytest.approx([0, (2.0 - 2.5) / 2, 0])
    assert value_loss(values, old, returns, mask, normaliser=10)[0].item() == pytest.approx(0.5 * 1.25 / 10)


# ---- a bandit ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [*PRESETS, 'gdpo'])
def test_each_preset_solves_a_bandit(name):
    """Two tokens of five values each, only one of the 25 pairs pays in full and a worse one a third:
    from a uniform start the best pair becomes likely. Two updates a batch, so that ratios leave 1."""
    preset = dict(PRESETS['grpo' if name == 'gdpo' else name])
    scale, baseline = preset.pop('scale'), preset.pop('baseline')
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(2, 5, requires_grad=True)
    optimizer = torch.optim.SGD([logits], 2.0 if preset['mean'] != 'constant' else 4.0)
    values = torch.zeros(2)
    for _ in range(80):
        with torch.no_grad():
            # (256, 2)
            tokens = torch.multinomial(logits.softmax(1), 256, replacement=True, generator=generator).t()
        pay = (tokens == torch.tensor([3, 1])).all(1).float() + 0.3 * (tokens == torch.tensor([0, 0])).all(1).float()
        logp_of = lambda: logits.log_softmax(1)[torch.arange(2), tokens]                            # (256, 2)
        old, mask = logp_of().detach(), torch.ones(256, 2)
        if name == 'ppo':
            rewards = torch.stack((torch.zeros(256), pay), 1)
            advantages, returns = gae(rewards, values.expand(256, 2), mask, 1.0, 0.95)
            values += 0.5 * (returns.mean(0) - values)
            advantages = whiten(advantages, mask)
        elif name == 'distill':         # a teacher that likes that pair, and pays nothing
            teacher = torch.zeros(2, 5)
            teacher[0, 3] = teacher[1, 1] = 6.0
            advantages = teacher.log_softmax(1)[torch.arange(2), tokens] - old
        elif name == 'gdpo':            # a reward for each token, one a thousandth of the other
            each = [(tokens[:, 0] == 3) * 1.0, (tokens[:, 1] == 1) * 0.001]
            advantages = decoupled_advantages(each, (1, 1), torch.arange(256) // 8, scale=scale, baseline=baseline)
        else:
            advantages = group_advantages(pay, torch.arange(256) // 8, scale, baseline)
        for _ in range(1 if preset['surrogate'] == 'reinforce' else 2):
            optimizer.zero_grad()
            policy_loss(logp_of(), old, advantages, mask, **preset)[0].backward()
            optimizer.step()
    best = logits.softmax(1)[0, 3] * logits.softmax(1)[1, 1]
    assert best > 0.9, f'{name}: {best:.2f}'
