"""Optimizers and learning-rate schedules, written by hand.

Every optimizer keeps the parameters of a group in one flat tensor, of which the model's parameters are views; gradients
and state likewise. A step is then a handful of operations however many parameters there are; clipping, zeroing and the
all-reduce of data parallel are one call per buffer.

Nothing here needs torch to be imported: the optimizers call methods of the tensors that they are given. So a script
reads OPTIMIZERS and SCHEDULES, and draws its learning-rate curve, before it pays for that import.
"""
import copy
import inspect
import math

from configurator import UserError

# ours, then those of torch.optim that can take a plain step: LBFGS needs a closure, SparseAdam sparse gradients
OPTIMIZERS = ('adamw', 'sgd', 'muon', 'adadelta', 'adafactor', 'adagrad', 'adam', 'adamax', 'asgd', 'nadam', 'radam',
              'rmsprop', 'rprop')
SCHEDULES = ('none', 'constant', 'cosine', 'exponential', 'linear', 'wsd', 'cosine_restarts', 'plateau')

ALIGN = 16       # elements: every parameter starts on a cache line
CHUNK = 2 ** 19  # elements of a CPU update: what several passes reread stays in cache; smaller ones pay for the threads


# Schedules -----------------------------------------------------------------------------------------------------------

def learning_rate(step, schedule, base_lr, min_lr, warmup_steps, decay_steps):
    """The learning rate of optimizer step `step` (from 0), for a name of SCHEDULES.

    Warm-up is linear and comes first, (step + 1) / (warmup_steps + 1) of base_lr. What decays then goes from base_lr at
    warmup_steps to min_lr at decay_steps, and stays there:
      exponential      geometric, so min_lr must be positive
      wsd              base_lr, then over the last fifth 1 - sqrt (Haegele et al. 2024, arXiv 2405.18392)
      cosine_restarts  three cosine cycles, each twice as long as the one before (SGDR, arXiv 1608.03983)
    'none', 'constant' and 'plateau' stay at base_lr; Plateau.scale is the factor for the last.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / (warmup_steps + 1)
    if schedule in ('none', 'constant', 'plateau'):
        return base_lr
    if schedule == 'exponential' and min_lr <= 0:
        raise UserError(f'the exponential schedule multiplies its way down to min_lr, which must be above 0, not {min_lr}')
    if step >= decay_steps:
        return min_lr
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)  # [0, 1)
    if schedule == 'exponential':
        return base_lr * (min_lr / base_lr) ** progress
    if schedule == 'linear':
        share = 1 - progress
    elif schedule == 'cosine':
        share = (1 + math.cos(math.pi * progress)) / 2
    elif schedule == 'wsd':
        share = 1 - math.sqrt(max(0.0, (progress - 0.8) / 0.2))
    elif schedule == 'cosine_restarts':
        cycle = int(math.log2(1 + 7 * progress))  # cycles of 1, 2 and 4 sevenths
        share = (1 + math.cos(math.pi * ((1 + 7 * progress) / 2 ** cycle - 1))) / 2
    else:
        raise UserError(f'no learning-rate schedule {schedule!r}; there are {", ".join(SCHEDULES)}')
    return min_lr + share * (base_lr - min_lr)


class Plateau:
    """`scale` for the learning rate: times `factor` after more than `patience` evaluations in a row without a loss that is
    lower than the best by a ten-thousandth of it. A loss that is not finite counts as no improvement."""

    def __init__(self, factor=0.5, patience=2):
        self.factor, self.patience = factor, patience
        self.scale, self.best, self.stalled = 1.0, None, 0

    def update(self, loss):
        """Takes one validation loss, returns the scale from now on."""
        if math.isfinite(loss) and (self.best is None or loss < self.best * (1 - 1e-4)):
            self.best, self.stalled = loss, 0
        else:
            self.stalled += 1
        if self.stalled > self.patience:
            self.scale, self.stalled = self.scale * self.factor, 0
        return self.scale

    def state_dict(self):
        return {'scale': self.scale, 'best': self.best, 'stalled': self.stalled}  # goes into a JSON file

    def load_state_dict(self, state):
        self.scale, self.best, self.stalled = state['scale'], state['best'], state['stalled']


# Flat buffers --------------------------------------------------------------------------------------------------------

class Flat:
    """Parameters of one group, device and dtype as views of `data`, their gradients as views of `grad`, and one tensor of
    the same length for each name in `slots`. Autograd accumulates into the gradient views in place."""

    def __init__(self, group, names, params, slots):
        self.group, self.names, self.params, self.starts = group, names, params, []
        length = 0
        for p in params:
            self.starts.append(length)
            length += -(-p.numel() // ALIGN) * ALIGN
        self.data, self.grad = params[0].new_zeros(length), params[0].new_zeros(length)
        self.state = {slot: params[0].new_zeros(length) for slot in slots}
        self.grads = self.views(self.grad)
        for p, view in zip(params, self.views(self.data)):
            view.copy_(p.detach())
            p.data = view
        self.places = [p.data_ptr() for p in params]
        size = CHUNK if self.data.device.type == 'cpu' else max(length, 1)
        self.chunks = list(zip(*(t.split(size) for t in (self.data, self.grad, *self.state.values()))))
        self.gather()

    def views(self, flat):
        """A flat tensor as a list of tensors with the parameters' shapes."""
        return [flat[start:start + p.numel()].view(p.shape) for start, p in zip(self.starts, self.params)]

    def gather(self):
        """Puts gradients that are no longer our views (model.zero_grad() sets None, a later backward makes a new tensor)
        back in place. None is a gradient of zero."""
        for p, grad, place in zip(self.params, self.grads, self.places):
            if p.grad is not grad:
                grad.zero_() if p.grad is None else grad.copy_(p.grad)
                p.grad = grad
            if p.data_ptr() != place:
                raise RuntimeError('a parameter was moved or replaced after its optimizer was made: make it afterwards')


class FlatOptimizer:
    """What the optimizers below share. `params`: parameters, (name, parameter) pairs, or dicts of these under 'params' with
    settings of their own, as in torch. Frozen parameters and second mentions of one (tied weights) are left out.

    param_groups  one dict per group, whose 'lr' the next step uses; set_lr sets them all
    state_dict()  {'step': int64 (), 'SLOT/PARAMETER NAME': tensor}, views of the live state
    """

    def __init__(self, params, **defaults):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{'params': params}]
        self.steps, self.param_groups, self.flats = 0, [], []
        seen = set()
        for given in groups:
            group = {**defaults, 'lr_scale': 1.0, **given, 'params': []}
            buckets = {}  # (device, dtype) -> (names, parameters)
            for item in given['params']:
                name, p = item if isinstance(item, tuple) else (f'param.{len(seen)}', item)
                if not p.requires_grad or id(p) in seen:
                    continue
                if str(p.dtype) not in ('torch.float32', 'torch.float64'):
                    raise UserError(f'{name} is {p.dtype}: parameters that are trained must be float32')
                seen.add(id(p))
                group['params'].append(p)
                names, members = buckets.setdefault((p.device, p.dtype), ([], []))
                names.append(name)
                members.append(p)
            if group['params']:
                self.param_groups.append(group)
                self.flats += [Flat(group, *bucket, self.slots(group)) for bucket in buckets.values()]
        if not self.flats:
            raise UserError('nothing to train: no parameter requires a gradient')

    @property
    def grads(self):
        """The flat gradients: what data parallel sums over ranks."""
        for flat in self.flats:
            flat.gather()
        return [flat.grad for flat in self.flats]

    def zero_grad(self):
        for grad in self.grads:
            grad.zero_()

    def set_lr(self, lr):
        for group in self.param_groups:
            group['lr'] = lr * group['lr_scale']

    def clip_grad_norm(self, max_norm):
        """Scales all gradients so that their common 2-norm is at most max_norm (0: never) and returns the norm before, a
        tensor (). A norm that is not finite leaves the gradients as they are: the caller skips that step."""
        grads = self.grads
        squares = [part.dot(part).to(grads[0].device) for grad in grads for part in grad.split(2 ** 24)]
        norm = sum(squares).sqrt()
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).where(norm.isfinite(), 1.0)
            if scale.device.type != 'cpu' or scale < 1:  # on a GPU asking would wait for it
                for grad in grads:
                    grad.mul_(scale.to(grad.device))
        return norm

    def step(self):
        self.steps += 1
        for flat in self.flats:
            flat.gather()
            self.update(flat)

    def state_dict(self):
        state = {'step': self.flats[0].data.new_zeros(()).long().add_(self.steps)}
        for flat in self.flats:
            for slot, tensor in flat.state.items():
                state.update((f'{slot}/{name}', view) for name, view in zip(flat.names, flat.views(tensor)))
        return state

    def load_state_dict(self, state):
        own = self.state_dict()
        check_state(own, state)
        self.steps = int(state['step'])
        for key in own.keys() - {'step'}:
            own[key].copy_(state[key])


def check_state(own, state):
    """UserError unless both hold the same names and shapes."""
    for key in sorted(own.keys() | state.keys()):
        if key not in state or key not in own:
            raise UserError(f'optimizer state does not fit: {key} is ' + ('missing' if key in own else 'unknown here'))
        if own[key].shape != state[key].shape:
            raise UserError(f'optimizer state does not fit: {key} is {tuple(state[key].shape)}, '
                            f'here it is {tuple(own[key].shape)}')


# Optimizers ----------------------------------------------------------------------------------------------------------

class AdamW(FlatOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def slots(self, group):
        return 'exp_avg', 'exp_avg_sq'

    def update(self, flat):
        lr, (beta1, beta2), eps, decay = (flat.group[key] for key in ('lr', 'betas', 'eps', 'weight_decay'))
        # m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), with both corrections moved into scalars
        correction = math.sqrt(1 - beta2 ** self.steps)
        rate = lr * correction / (1 - beta1 ** self.steps)
        for p, grad, exp_avg, exp_avg_sq in flat.chunks:
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = exp_avg_sq.sqrt().add_(eps * correction)
            if decay:
                p.mul_(1 - lr * decay)
            p.addcdiv_(exp_avg, denominator, value=-rate)


class SGD(FlatOptimizer):
    """Gradient descent, with torch's meaning of each setting: momentum buffer b = momentum * b + g, weight decay added to
    the gradient, Nesterov's step g + momentum * b."""

    def __init__(self, params, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    def slots(self, group):
        return ('momentum_buffer',) if group['momentum'] else ()

    def update(self, flat):
        lr, momentum, decay = (flat.group[key] for key in ('lr', 'momentum', 'weight_decay'))
        for p, grad, *state in flat.chunks:
            if decay:
                grad = grad.add(p, alpha=decay)
            if momentum:
                buffer = state[0].mul_(momentum).add_(grad)
                grad = grad.add(buffer, alpha=momentum) if flat.group['nesterov'] else buffer
            p.add_(grad, alpha=-lr)


def newton_schulz(x, steps=5):
    """Matrices x (N, rows, columns) with their singular values brought to about 1 (0.7 to 1.2): five steps of the odd
    quintic of Jordan et al. 2024, kellerjordan.github.io/posts/muon, on the shorter side."""
    if x.size(1) > x.size(2):
        return newton_schulz(x.mT, steps).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = x.baddbmm(gram.baddbmm(gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class Muon(AdamW):
    """Orthogonalised Nesterov momentum for matrices, AdamW for groups with muon=False (embeddings, heads, vectors).

    The step is scaled by 0.2 * sqrt(max(rows, columns)), so that its size, and with it learning rate and weight decay, are
    AdamW's (Moonlight, arXiv 2502.16982, equation 4). adam_lr: the rate of the AdamW groups, lr unless given.
    A weight that stacks several projections says so: weight.splits = (rows of each); each is orthogonalised alone.
    ns_dtype: the precision of the Newton-Schulz products, the parameters' own unless given.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1, adam_lr=None, betas=(0.9, 0.95), eps=1e-8,
                 ns_dtype=None):
        FlatOptimizer.__init__(self, params, lr=lr, momentum=momentum, weight_decay=weight_decay, betas=betas, eps=eps,
                               muon=True)
        self.ns_dtype = ns_dtype
        for flat in self.flats:
            if not flat.group['muon'] and adam_lr is not None:
                flat.group.update(lr=adam_lr, lr_scale=adam_lr / lr)
            for name, p in zip(flat.names, flat.params):
                if flat.group['muon'] and p.dim() != 2:
                    raise UserError(f'{name} {tuple(p.shape)} is no matrix: its group needs muon=False')

    def slots(self, group):
        return ('momentum_buffer',) if group['muon'] else super().slots(group)

    def update(self, flat):
        if not flat.group['muon']:
            return super().update(flat)
        lr, momentum, decay = (flat.group[key] for key in ('lr', 'momentum', 'weight_decay'))
        buffer = flat.state['momentum_buffer'].lerp_(flat.grad, 1 - momentum)
        direction = flat.grad.lerp(buffer, momentum)
        batches = {}  # shape -> [(weight, direction)]
        for p, d in zip(flat.params, flat.views(direction)):
            rows = getattr(p, 'splits', p.size(0))
            for weight, part in zip(p.detach().split(rows), d.split(rows)):
                batches.setdefault(weight.shape, []).append((weight, part))
        if decay:
            flat.data.mul_(1 - lr * decay)
        for shape, pairs in batches.items():
            x = direction.new_empty((len(pairs), *shape), dtype=self.ns_dtype)
            for row, (_, part) in zip(x, pairs):
                row.copy_(part)
            for row, (weight, _) in zip(newton_schulz(x), pairs):
                weight.add_(row, alpha=-lr * 0.2 * math.sqrt(max(shape)))


class TorchOptimizer(FlatOptimizer):
    """Any optimizer class of torch.optim behind the same methods."""

    def __init__(self, params, kind, **settings):
        super().__init__(params, **settings)
        self.inner = kind(self.param_groups)
        self.names = {p: name for flat in self.flats for name, p in zip(flat.names, flat.params)}

    def slots(self, group):
        return ()

    def step(self):
        self.steps += 1
        self.grads  # back in place
        self.inner.step()

    def state_dict(self):
        state = super().state_dict()
        for p, slots in self.inner.state.items():
            state.update((f'{slot}/{self.names[p]}', t) for slot, t in slots.items() if t is not None)
        return state

    def load_state_dict(self, state):
        trial = copy.deepcopy(self.inner)  # steps on copies, to learn what state there must be
        own, mine = FlatOptimizer.state_dict(self), [p for group in self.param_groups for p in group['params']]
        copies = [p for group in trial.param_groups for p in group['params']]
        for p in copies:
            p.grad = p.detach().clone().zero_()
        if int(state.get('step', 1)):
            trial.step()
        own.update((f'{slot}/{self.names[p]}', t) for p, c in zip(mine, copies)
                   for slot, t in trial.state[c].items() if t is not None)
        check_state(own, state)
        self.steps = int(state['step'])
        for p, c in zip(mine, copies):
            for slot, t in trial.state[c].items():
                if t is not None:
                    t.copy_(state[f'{slot}/{self.names[p]}'])
            self.inner.state[p] = trial.state[c]


def make_optimizer(name, model, lr, weight_decay=0.1, betas=(0.9, 0.95), momentum=None, nesterov=False, adam_lr=None,
                   ns_dtype=None):
    """The optimizer `name` of OPTIMIZERS for a model's trainable parameters.

    Weight decay is for matrices, embeddings among them, never for norms and biases. Muon takes the matrices inside the
    numbered blocks. momentum None: the optimizer's own. One of torch.optim gets those settings that it has by name.
    """
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    vectors = {'params': [(key, p) for key, p in named if p.dim() < 2], 'weight_decay': 0.0}
    matrices = {'params': [(key, p) for key, p in named if p.dim() >= 2], 'weight_decay': weight_decay}
    settings = {'lr': lr} if momentum is None else {'lr': lr, 'momentum': momentum}
    if name == 'adamw':
        return AdamW([matrices, vectors], lr, betas)
    if name == 'sgd':
        return SGD([matrices, vectors], nesterov=nesterov, **settings)
    if name == 'muon':
        tables = {id(m.weight) for m in model.modules() if 'Embedding' in type(m).__name__}
        hidden = [(key, p) for key, p in matrices['params'] if p.dim() == 2 and id(p) not in tables
                  and any(part.isdigit() for part in key.split('.')) and 'head' not in key]
        chosen = {id(p) for _, p in hidden}
        rest = [(key, p) for key, p in matrices['params'] if id(p) not in chosen]
        groups = [{'params': hidden, 'weight_decay': weight_decay}, {**vectors, 'muon': False},
                  {'params': rest, 'weight_decay': weight_decay, 'muon': False}]
        return Muon(groups, adam_lr=adam_lr, betas=betas, ns_dtype=ns_dtype, **settings)
    if name not in OPTIMIZERS:
        raise UserError(f'no optimizer {name!r}; there are {", ".join(OPTIMIZERS)}')
    from torch import optim
    kind = getattr(optim, next(key for key in dir(optim) if key.lower() == name and isinstance(getattr(optim, key), type)))
    known = inspect.signature(kind).parameters
    settings = {key: value for key, value in dict(settings, betas=betas).items() if key in known}
    return TorchOptimizer([matrices, vectors] if 'weight_decay' in known else named, kind, **settings)
