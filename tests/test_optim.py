"""Optimizers against torch.optim's trajectories, Muon against its definition,
schedules against values by hand."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from nanoforge import optim
from configurator import UserError
from nanoforge.kernels import dither, keep_copies
from nanoforge.optim import AdamW, Muon, NorMuon, Plateau, SGD, learning_rate, make_optimizer, warmup_within


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.down(torch.tanh(self.up(q * k + v)))


class Net(nn.Module):
    """A tied embedding, two blocks, odd sizes (padding), a frozen parameter, one that takes no part."""

    def __init__(self, width=6, vocab=7, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, width)
        self.h = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.to(dtype)

    def loss(self, step):
        x = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(step))
        h = self.embed(x)
        for block in self.h:
            h = block(h)
        return nn.functional.cross_entropy(self.lm_head(h).flatten(0, 1), (x * 3 + 1).flatten() % 7) * 20


def groups(net, **extra):
    """A decayed group and an undecayed one with its own rate, as torch's users write them."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad and name != 'unused']
    return [{'params': [p for _, p in trained if p.dim() > 1], 'weight_decay': 0.3, **extra},
            {'params': [p for _, p in trained if p.dim() < 2], 'weight_decay': 0.0, 'lr': 0.002, **extra}]


def same_trajectory(ours, theirs, optimizer, reference, steps=50):
    for step in range(steps):
        for net, opt in ((ours, optimizer), (theirs, reference)):
            for group in opt.param_groups:
                group['lr'] *= 0.99
            opt.zero_grad()
            net.loss(step).backward()
            opt.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            assert (a - b).abs().max() < 1e-12, (step, name)
    assert (ours.embed.weight - Net().embed.weight).abs().max() > 0.01  # it did move


@pytest.mark.parametrize('betas', [(0.9, 0.99), (0.8, 0.95)])
def test_adamw_follows_torch(betas):
    ours, theirs = Net(), Net()
    same_trajectory(ours, theirs, AdamW(groups(ours), 0.01, betas, 1e-5, 0.1),
                    torch.optim.AdamW(groups(theirs), 0.01, betas, 1e-5, 0.1))


@pytest.mark.parametrize('momentum,nesterov', [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_follows_torch(momentum, nesterov):
    ours, theirs = Net(), Net()
    same_trajectory(ours, theirs, SGD(groups(ours), 0.01, momentum, nesterov),
                    torch.optim.SGD(groups(theirs), 0.01, momentum, nesterov=nesterov))


def test_chunks_change_nothing(monkeypatch):
    whole, parts = Net(), Net()
    first = AdamW(whole.parameters(), 0.01)
    monkeypatch.setattr(optim, 'CHUNK', 50)
    second = AdamW(parts.parameters(), 0.01)
    assert len(second.flats[0].chunks) > 5 and len(first.flats[0].chunks) == 1
    for net, optimizer in ((whole, first), (parts, second)):
        net.loss(0).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_a_gradient_that_was_set_to_none_comes_back():
    """model.zero_grad() drops the views; the trajectory and the flat gradients must not notice."""
    ours, theirs = Net(), Net()
    optimizer, reference = AdamW(groups(ours), 0.01), AdamW(groups(theirs), 0.01)
    for step in range(5):
        ours.zero_grad(set_to_none=True)
        reference.zero_grad()
        for net, opt in ((ours, optimizer), (theirs, reference)):
            net.loss(step).backward()
            opt.step()
        assert all(torch.equal(a, b) for a, b in zip(optimizer.grads, reference.grads))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    ours.zero_grad(set_to_none=True)
    assert all(not grad.any() for grad in optimizer.grads)


def test_what_is_flat():
    net = Net()
    before = [p.clone() for p in net.parameters()]
    optimizer = make_optimizer('adamw', net, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    trained = [p for p in net.parameters() if p.requires_grad]  # parameters() counts the tied head once
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(trained)
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.0, 0.1}
    for group in optimizer.param_groups:
        assert all((p.dim() >= 2) == (group['weight_decay'] > 0) for p in group['params'])
    net.loss(0).backward()
    assert math.isclose(sum(g.abs().sum() for g in optimizer.grads),
                        sum(p.grad.abs().sum() for p in trained), rel_tol=1e-12)
    place = net.embed.weight.grad.data_ptr()
    optimizer.zero_grad()
    assert all(not p.grad.any() for p in trained) and net.embed.weight.grad.data_ptr() == place
    assert net.frozen.grad is None
    net.float()
    with pytest.raises(RuntimeError, match='moved'):
        optimizer.step()
    with pytest.raises(UserError, match='bfloat16'):
        AdamW(Net(dtype=torch.bfloat16).named_parameters())
    with pytest.raises(UserError, match='nesterov'):
        SGD(Net().parameters(), momentum=0.0, nesterov=True)
    with pytest.raises(UserError, match='nothing to train'):
        AdamW([net.frozen])


def test_two_dtypes_are_two_buffers():
    single, double = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGD([single, double], 0.5, momentum=0.0)
    (single.sum() * 3 + double.sum() * 4).backward()
    assert [g.dtype for g in optimizer.grads] == [torch.float32, torch.float64]
    assert math.isclose(optimizer.clip_grad_norm(0), math.sqrt(3 * 9 + 3 * 16), rel_tol=1e-6)
    optimizer.step()
    assert single.tolist() == [-0.5] * 3 and double.tolist() == [-1.0] * 3


@pytest.mark.parametrize('max_norm', [0.0, 0.5, 1e6])
def test_clip_follows_torch(max_norm):
    ours, theirs = Net(), Net()
    optimizer = AdamW(groups(ours), 0.01)
    ours.loss(0).backward()
    theirs.loss(0).backward()
    theirs = [p for p in theirs.parameters() if p.grad is not None]
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
    assert expected > 1
    assert abs(optimizer.clip_grad_norm(max_norm) - expected) < 1e-12
    mine = [p for p in ours.parameters() if p.requires_grad and p is not ours.unused]
    assert all((a.grad - b.grad).abs().max() < 1e-14 for a, b in zip(mine, theirs))


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(bad):
    net = Net()
    optimizer = AdamW(groups(net), 0.01)
    net.loss(0).backward()
    net.embed.weight.grad[0, 0] = bad
    before = [grad.clone() for grad in optimizer.grads]
    assert not optimizer.clip_grad_norm(1.0).isfinite()
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, optimizer.grads))


def muon_reference(weight, grads, lr, momentum, decay):
    """One matrix through its definition, in float64: X <- aX + bXX'X + c(XX')^2 X, five times,
    wide side last."""
    buffer = torch.zeros_like(weight)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        x = (1 - momentum) * grad + momentum * buffer
        x = x.T if len(x) > len(x.T) else x
        x = x / (math.sqrt(float((x * x).sum())) + 1e-7)
        for _ in range(5):
            x = 3.4445 * x - 4.775 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        x = x if x.shape == weight.shape else x.T
        weight = (1 - lr * decay) * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * x
    return weight


def test_muon_follows_its_definition():
    """Wide, tall, equal shapes (one batch) and a stack of projections of unequal heights;
    the rest is AdamW's."""
    torch.manual_seed(1)
    start = {name: torch.randn(shape, dtype=torch.float64) for name, shape in
             {'wide': (4, 9), 'tall': (9, 4), 'wide2': (4, 9), 'stack': (10, 6), 'vector': (5,)}.items()}
    params = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    params['stack'].splits = (6, 2, 2)
    twin = nn.Parameter(start['vector'].clone())
    optimizer = Muon([{'params': [(k, p) for k, p in params.items() if p.dim() == 2], 'weight_decay': 0.3},
                      {'params': [('vector', params['vector'])], 'muon': False, 'weight_decay': 0.0}],
                     lr=0.02, momentum=0.9, adam_lr=0.01, betas=(0.9, 0.99))
    adam = torch.optim.AdamW([twin], 0.01, (0.9, 0.99), weight_decay=0.0)
    grads = [{name: torch.randn_like(t) for name, t in start.items()} for _ in range(10)]
    for grad in grads:
        optimizer.zero_grad()
        for name, p in params.items():
            p.grad.add_(grad[name])
        twin.grad = grad['vector']
        optimizer.step()
        adam.step()
    for name in ('wide', 'tall', 'wide2'):
        expected = muon_reference(start[name], [g[name] for g in grads], 0.02, 0.9, 0.3)
        assert (params[name] - expected).abs().max() < 1e-12, name
    parts = [muon_reference(w, g, 0.02, 0.9, 0.3) for w, g in
             zip(start['stack'].split((6, 2, 2)), zip(*(g['stack'].split((6, 2, 2)) for g in grads)))]
    assert (params['stack'] - torch.cat(parts)).abs().max() < 1e-12
    assert (params['vector'] - twin).abs().max() < 1e-12
    optimizer.set_lr(0.1)
    assert [group['lr'] for group in optimizer.param_groups] == [0.1, pytest.approx(0.05)]


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_muon_steps_are_orthogonal(dtype):
    """Singular values near 1 and singular vectors the gradient's own: close to the polar factor U V'."""
    torch.manual_seed(2)
    for shape in ((64, 64), (64, 200), (200, 64)):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([p], lr=1.0, weight_decay=0.0, ns_dtype=dtype)
        p.grad.normal_()
        optimizer.step()
        update = -p.detach() / (0.2 * math.sqrt(max(shape)))
        values = torch.linalg.svdvals(update)
        # a square gradient's smallest singular values are near 0, where five steps do not reach
        if shape != (64, 64):
            assert 0.65 < values.min()
        assert values.max() < 1.2
        u, _, vt = torch.linalg.svd(p.grad, full_matrices=False)
        assert nn.functional.cosine_similarity(update.flatten(), (u @ vt).flatten(), 0) > 0.97
        # AdamW's update size
        assert 0.15 < p.detach().square().mean().sqrt() * math.sqrt(64 / min(shape)) < 0.25


def normuon_reference(weight, grads, lr, decay, beta=0.95):
    """Algorithm 1 of arXiv 2510.05491 in float64, with the five steps of Polar Express written out and a
    momentum that rises from 0.85 to 0.95 in 50 steps; 0.2 of the root mean square that a step then has."""
    buffer, row_square = torch.zeros_like(weight), torch.zeros(len(weight), dtype=weight.dtype)
    for t, grad in enumerate(grads, 1):
        momentum = 0.85 + 0.10 * min(t / 50, 1)
        buffer = momentum * buffer + (1 - momentum) * grad
        x = (1 - momentum) * grad + momentum * buffer
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        s = s / (x.norm() + 1e-7)
        for a, b, c in NorMuon.coefficients:
            s = a * s + b * s ** 3 + c * s ** 5
        x = u * s @ vt
        row_square = beta * row_square + (1 - beta) * x.square().mean(1)
        x = x / (row_square.sqrt() + 1e-8)[:, None]
        weight = (1 - lr * decay) * weight - lr * 0.2 * x / x.square().mean().sqrt()
    return weight


def test_normuon_follows_its_definition():
    """60 steps, so that the momentum has risen; wide, tall and stacked."""
    torch.manual_seed(3)
    start = {'wide': torch.randn(4, 9).double(), 'tall': torch.randn(9, 4).double(),
             'stack': torch.randn(10, 6).double()}
    params = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    params['stack'].splits = (6, 2, 2)
    optimizer = NorMuon(list(params.items()), lr=0.02, weight_decay=0.3)
    grads = [{name: torch.randn_like(t) for name, t in start.items()} for _ in range(60)]
    for grad in grads:
        optimizer.zero_grad()
        for name, p in params.items():
            p.grad.add_(grad[name])
        optimizer.step()
    for name in ('wide', 'tall'):
        expected = normuon_reference(start[name], [g[name] for g in grads], 0.02, 0.3)
        assert (params[name] - expected).abs().max() < 1e-11, name
    parts = [normuon_reference(w, g, 0.02, 0.3) for w, g in
             zip(start['stack'].split((6, 2, 2)), zip(*(g['stack'].split((6, 2, 2)) for g in grads)))]
    assert (params['stack'] - torch.cat(parts)).abs().max() < 1e-11


def test_polar_express_reaches_small_singular_values():
    """From a thousandth of the norm upwards to 0.85 to 1.15."""
    s = torch.logspace(-3, 0, 2000, dtype=torch.float64)
    for a, b, c in NorMuon.coefficients:
        s = a * s + b * s ** 3 + c * s ** 5
    assert 0.85 < s.min() and s.max() < 1.15


def test_muon_takes_hidden_matrices_only():
    net = Net()
    optimizer = make_optimizer('muon', net, 0.01)
    names = {name for flat in optimizer.flats if flat.group['muon'] for name in flat.names}
    assert names == {f'h.{i}.{layer}.weight' for i in (0, 1) for layer in ('qkv', 'up', 'down')}
    with pytest.raises(UserError, match='unused .* muon=False'):
        Muon(net.named_parameters())


def test_an_embedding_is_told_by_its_class():
    """Not by its name: rotary positions are called embeddings, too, and have no weight."""
    class RotaryEmbedding(nn.Module):
        pass

    class ScaledTable(nn.Embedding):
        pass
    net = nn.ModuleDict({'0': nn.ModuleDict({'rotary': RotaryEmbedding(), 'table': ScaledTable(5, 4),
                                             'linear': nn.Linear(4, 4)})})
    muon = optim.make_optimizer('muon', net, 0.1)
    names = {name: flat.group['muon'] for flat in muon.flats for name in flat.names}
    assert names == {'0.table.weight': False, '0.linear.weight': True, '0.linear.bias': False}


def test_names_are_those_of_torch():
    """All of torch.optim but the two that cannot take a plain step, and normuon; asked for without torch."""
    classes = {name.lower() for name, kind in vars(torch.optim).items() if isinstance(kind, type)} - {'optimizer'}
    assert set(optim.OPTIMIZERS) == classes - {'lbfgs', 'sparseadam'} | {'normuon'}
    code = 'import sys; from nanoforge import optim; optim.learning_rate(1, "cosine", 1.0, 0.1, 0, 9); sys.exit("torch" in sys.modules)'
    root = os.path.dirname(os.path.dirname(os.path.abspath(optim.__file__)))
    assert subprocess.run([sys.executable, '-c', code], cwd=root).returncode == 0
    with pytest.raises(UserError, match='adamv.*adamw'):
        make_optimizer('adamv', Net(), 0.1)


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_every_optimizer_steps_saves_and_resumes(name):
    """Learns; after a round trip of its state it continues bit for bit;
    a state that does not fit is refused."""
    def run(net, optimizer, steps):
        for step in steps:
            optimizer.set_lr(0.01 / (step + 1))
            optimizer.zero_grad()
            net.loss(step).backward()
            optimizer.clip_grad_norm(1.0)
            optimizer.step()

    net = Net(dtype=torch.float32)
    optimizer = make_optimizer(name, net, 0.01, weight_decay=0.2, betas=(0.8, 0.9), momentum=0.7)
    for key, value in {'betas': (0.8, 0.9), 'momentum': 0.7}.items():
        assert all(group.get(key, value) == value for group in optimizer.param_groups)
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.2, 0.0}
    before = net.loss(0).item()
    run(net, optimizer, range(3))
    assert net.loss(0) < before
    state = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    assert state['step'] == 3 and all(tensor.isfinite().all() for tensor in state.values())
    slots = {key.split('/', 1)[1] for key in state if '/' in key}
    assert slots == {key for key, p in net.named_parameters() if p.requires_grad}

    other = Net(dtype=torch.float32)
    other.load_state_dict(net.state_dict())
    resumed = make_optimizer(name, other, 0.01, weight_decay=0.2, betas=(0.8, 0.9), momentum=0.7)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    run(net, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    assert all(torch.equal(a, resumed.state_dict()[key]) for key, a in optimizer.state_dict().items())

    key = next(key for key in state if key.endswith('/h.1.up.weight') and state[key].dim())
    for wrong in ({k: t for k, t in state.items() if k != key}, {**state, key: state[key][:-1]}):
        with pytest.raises(UserError, match='/h.1.up.weight') as error:
            resumed.load_state_dict(wrong)
        assert '\n' not in str(error.value)


def test_state_before_the_first_step():
    for name in ('adamw', 'muon', 'normuon', 'adam'):
        state = make_optimizer(name, Net(), 0.01).state_dict()
        fresh = make_optimizer(name, Net(), 0.01)
        fresh.load_state_dict(state)
        assert fresh.steps == 0


def test_warmup_longer_than_the_run_is_clamped_and_said():
    said = []
    assert [warmup_within(steps, 20, said.append) for steps in (0, 19)] == [0, 19] and not said
    assert [warmup_within(steps, 20, said.append) for steps in (20, 500)] == [2, 2] and 'warm-up of 500 steps in a run of 20' in said[1]
    assert warmup_within(0, 0, said.append) == 0 and len(said) == 2


def rates(schedule, steps, warmup=4, decay=104, base=1.0, low=0.01):
    return [learning_rate(step, schedule, base, low, warmup, decay) for step in steps]


def test_schedules_by_hand():
    for schedule in optim.SCHEDULES:
        assert rates(schedule, range(5)) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-15)
        end = 1.0 if schedule in ('none', 'constant', 'plateau') else 0.01
        assert rates(schedule, (104, 105, 10 ** 6)) == [end] * 3
        assert rates(schedule, (0, 1), warmup=0, decay=0) == [end] * 2
    for schedule in ('none', 'constant', 'plateau'):
        assert rates(schedule, (4, 50, 103)) == [1.0] * 3
    assert rates('cosine', (29, 54, 79)) == pytest.approx(
        [0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2, 0.505, 0.01 + 0.99 * (1 - math.sqrt(0.5)) / 2], abs=1e-15)
    assert rates('exponential', (29, 54, 79)) == pytest.approx([10 ** -0.5, 0.1, 10 ** -1.5], abs=1e-15)
    assert rates('linear', (29, 54, 103)) == pytest.approx([0.7525, 0.505, 0.0199], abs=1e-15)
    assert rates('wsd', (50, 84, 89, 100)) == pytest.approx(
        [1.0, 1.0, 0.505, 0.01 + 0.99 * (1 - math.sqrt(0.8))], abs=1e-12)
    # cycles of 10, 20 and 40 steps: tops at 0, 10, 30, middles at 5, 20, 50
    assert rates('cosine_restarts', (0, 10, 30, 5, 20, 50), warmup=0, decay=70) == pytest.approx(
        [1, 1, 1, 0.505, 0.505, 0.505], abs=1e-12)
    assert rates('cosine_restarts', (9, 29, 69), warmup=0, decay=70) == pytest.approx(
        [0.01 + 0.99 * (1 + math.cos(math.pi * x)) / 2 for x in (0.9, 0.95, 0.975)], abs=1e-12)
    with pytest.raises(UserError, match='min_lr'):
        learning_rate(0, 'exponential', 1.0, 0.0, 5, 9)
    with pytest.raises(UserError, match='cosin.*cosine'):
        learning_rate(0, 'cosin', 1.0, 0.0, 5, 9)


def test_plateau_follows_torch():
    losses = [5, 4, 4, 4.1, 3.99999, 4, 3, 3, 3, 3, 3, 3, 3, 2.9, math.nan, 3, 3, 3, 1]
    reference = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, factor=0.5, patience=2)
    plateau, scales = Plateau(factor=0.5, patience=2), []
    for loss in losses:
        saved = json.loads(json.dumps(plateau.state_dict()))
        plateau = Plateau(factor=0.5, patience=2)
        plateau.load_state_dict(saved)
        torchs.step(loss)
        assert plateau.update(loss) == reference.param_groups[0]['lr']
        scales.append(plateau.scale)
    assert scales[-1] < 0.3


def test_weight_average_is_the_mean_and_swaps_back():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optim.SGD([('w', weight)], lr=1.0, momentum=0.0)
    average = optim.WeightAverage(optimizer, 0.5)
    expected = weight.detach().clone()
    for step in range(1, 5):
        weight.grad.copy_(torch.tensor([0.5, -1.0]) * step)
        optimizer.step()
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    last = weight.detach().clone()
    with average.swapped():
        torch.testing.assert_close(weight.detach(), expected)
        assert torch.equal(average.state_dict()['weights/w'], last)
    assert torch.equal(weight.detach(), last)


def test_copies_in_bfloat16_follow_the_weights():
    for name in ('adamw', 'muon', 'normuon', 'rmsprop'):
        weight = torch.nn.Parameter(torch.linspace(0.9, 1.1, 32).view(4, 8))
        keep_copies([weight])
        optimizer = make_optimizer(name, torch.nn.ParameterList([weight]), lr=0.01)
        average = optim.WeightAverage(optimizer, 0.5)
        weight.grad.fill_(1.0)
        optimizer.step()
        last = dither(weight.detach())
        assert weight.bf16_copy.equal(last)
        with average.swapped():
            assert weight.bf16_copy.equal(dither(weight.detach())) and not weight.bf16_copy.equal(last)
        assert weight.bf16_copy.equal(last)


def test_weight_average_comes_back_from_a_checkpoint():
    """A checkpoint's model is the average, beside it lie the last weights: restore() puts both in place."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optim.SGD([('w', weight)], lr=1.0, momentum=0.0)
    average = optim.WeightAverage(optimizer, 0.9)
    for step in (1, 2, 3):
        weight.grad.copy_(torch.tensor([1.0, 0.5]))
        optimizer.step()
        average.update(step)
    with average.swapped():
        mean = weight.detach().clone()
        saved = {key: tensor.clone() for key, tensor in {**average.state_dict(), **optimizer.state_dict()}.items()}
    again = torch.nn.Parameter(mean.clone())                # as the model of the checkpoint is loaded
    resumed = optim.SGD([('w', again)], lr=1.0, momentum=0.0)
    average_again = optim.WeightAverage(resumed, 0.9)
    average_again.restore(saved)
    assert set(saved) == {'step'}                           # what is left is the optimizer's
    assert torch.equal(again.detach(), weight.detach()) and not torch.equal(again.detach(), mean)
    with average_again.swapped():
        assert torch.equal(again.detach(), mean)
    assert torch.equal(average_again.means[0][0], average.means[0][0])


def test_weight_average_of_decay_0_is_none():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optim.SGD([('w', weight)], lr=1.0, momentum=0.0)
    average = optim.WeightAverage(optimizer, 0)
    weight.grad.fill_(1.0)
    optimizer.step()
    average.update(1)
    with average.swapped():
        assert weight.tolist() == [0, 1]
    assert average.means == [] and average.state_dict() == {}
    tensors = {'step': torch.tensor(1), 'weights/w': torch.ones(2)}
    average.restore(tensors)                                # of a run that had one: it is left out
    assert weight.tolist() == [0, 1] and set(tensors) == {'step'}


def test_names_of_schedules():
    """Every spelling, Hugging Face's among them, is one of ours."""
    assert set(optim.SCHEDULER_NAMES.values()) == set(optim.SCHEDULES)
    assert all(optim.SCHEDULER_NAMES[name] == name for name in optim.SCHEDULES)
    expected = {'constant_with_warmup': 'constant', 'cosine_with_restarts': 'cosine_restarts',
                'reduce_lr_on_plateau': 'plateau', 'warmup_stable_decay': 'wsd'}
    for name, ours in expected.items():
        assert optim.SCHEDULER_NAMES[name] == ours and rates(name, range(0, 120, 7)) == rates(ours, range(0, 120, 7))
