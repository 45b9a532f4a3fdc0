"""Optimizers and learning-rate schedules, written by hand.

An optimizer keeps the parameters of a group in one flat tensor, of which the model's parameters become views;
gradients and state likewise. A step is a handful of operations however many parameters there are, and
clipping, zeroing and the all-reduce of data parallel are one call per buffer.

torch is not imported here: optimizers call the methods of the tensors they are given. So a script can read
OPTIMIZERS and SCHEDULES, and draw its learning-rate curve, before it pays for that import.
"""
import contextlib
import inspect
import math

from configurator import UserError

# ours, then those of torch.optim that take a plain step: LBFGS needs a closure, SparseAdam sparse gradients
OPTIMIZERS = ('adamw', 'sgd', 'muon', 'normuon', 'adadelta', 'adafactor', 'adagrad', 'adam', 'adamax',
              'asgd', 'nadam', 'radam', 'rmsprop', 'rprop')
SCHEDULES = ('none', 'constant', 'cosine', 'exponential', 'linear', 'wsd', 'cosine_restarts', 'plateau')
# what Hugging Face's and others' flags call them: ours
SCHEDULER_NAMES = {
    'constant_with_warmup': 'constant', 'cosine_with_restarts': 'cosine_restarts',
    'cosine_hard_restarts': 'cosine_restarts', 'reduce_lr_on_plateau': 'plateau',
    'warmup_stable_decay': 'wsd',
    **{name: name for name in SCHEDULES},
}
ALIGN = 16       # elements: every parameter starts on a cache line
CHUNK = 2 ** 19  # elements of a CPU update: what it rereads stays in cache, and threads wake seldom enough


def learning_rate(step, schedule, base_lr, min_lr, warmup_steps, decay_steps):
    """The learning rate of optimizer step `step` (from 0) under one of SCHEDULES, a float.

    Linear warm-up first: (step + 1) / (warmup_steps + 1) of base_lr. Then 'none', 'constant' and 'plateau'
    (whose factor is Plateau.scale) stay; the others go from base_lr at warmup_steps to min_lr at decay_steps
    and stay there:
      exponential      geometric, so min_lr must be positive
      wsd              base_lr, then 1 - sqrt over the last fifth (Haegele et al. 2024, arXiv 2405.18392)
      cosine_restarts  three cosine cycles, each twice as long as the one before (SGDR, arXiv 1608.03983)
    """
    if schedule not in SCHEDULER_NAMES:
        raise UserError(f'no learning-rate schedule {schedule!r}; there are {", ".join(SCHEDULES)}')
    schedule = SCHEDULER_NAMES[schedule]
    if schedule == 'exponential' and min_lr <= 0:
        raise UserError(f'the exponential schedule is geometric: min_lr must be above 0, not {min_lr}')
    if step < warmup_steps:
        return base_lr * (step + 1) / (warmup_steps + 1)
    if schedule in ('none', 'constant', 'plateau'):
        return base_lr
    if step >= decay_steps:
        return min_lr
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)  # [0, 1)
    if schedule == 'exponential':
        return base_lr * (min_lr / base_lr) ** progress
    if schedule == 'linear':
        share = 1 - progress
    elif schedule == 'wsd':
        share = 1 - math.sqrt(max(0.0, (progress - 0.8) / 0.2))
    else:
        if schedule == 'cosine_restarts':  # cycles of 1, 2 and 4 sevenths
            progress = (1 + 7 * progress) / 2 ** int(math.log2(1 + 7 * progress)) - 1
        share = (1 + math.cos(math.pi * progress)) / 2
    return min_lr + share * (base_lr - min_lr)


def warmup_within(steps, total, print0):
    """Steps of warm-up in a run of `total`: a tenth of that, and said, where it would never end."""
    if steps < total or not steps:
        return steps
    print0(f'note      warm-up of {steps} steps in a run of {total}, whose highest rate would never come: '
        f'clamped to {total // 10}')
    return total // 10


class Plateau:
    """`scale` for the learning rate: times `factor` when more than `patience` evaluations in a row bring no
    loss below the best by a ten-thousandth of it (as torch's ReduceLROnPlateau). A loss that is not finite is
    no improvement."""

    def __init__(self, state=None, factor=0.5, patience=2):
        self.factor, self.patience = factor, patience
        self.load_state_dict(state or {'scale': 1.0, 'best': None, 'stalled': 0})

    def update(self, loss):
        """Takes a validation loss, returns the scale from now on."""
        better = math.isfinite(loss) and (self.best is None or loss < self.best * (1 - 1e-4))
        self.best, self.stalled = (loss, 0) if better else (self.best, self.stalled + 1)
        if self.stalled > self.patience:
            self.scale, self.stalled = self.scale * self.factor, 0
        return self.scale

    def state_dict(self):
        """For a JSON file."""
        return {'scale': self.scale, 'best': self.best, 'stalled': self.stalled}

    def load_state_dict(self, state):
        self.scale, self.best, self.stalled = state['scale'], state['best'], state['stalled']


class Flat:
    """Parameters of one group, device and dtype as views of `data`, their gradients as views of `grad` (into
    which autograd accumulates), and for each name in `slots` a tensor of the same length."""
    is_sharded = is_summed = False

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
        self.addresses = [p.data_ptr() for p in params]
        size = CHUNK if self.data.device.type == 'cpu' else length
        self.chunks = list(zip(*(t.split(size) for t in (self.data, self.grad, *self.state.values()))))
        self.gather()

    def views(self, flat):
        """A flat tensor as tensors of the parameters' shapes."""
        return [flat[start:start + p.numel()].view(p.shape) for start, p in zip(self.starts, self.params)]

    def flat_grads(self):
        self.gather()
        return [self.grad]

    def zero_grad(self):
        self.gather()
        self.grad.zero_()

    @property
    def weights(self):
        """Plain tensors that hold this rank's weights."""
        return [self.data]

    @property
    def takes_triton(self):
        """Whether an update may be a single Triton kernel."""
        from nanoforge.kernels import has_triton
        return has_triton(self.data.device) and self.data.itemsize == 4

    def named(self, parts):
        """(name, view) of each parameter in what has the form of `weights`."""
        return zip(self.names, self.views(parts[0]))

    def named_state(self, slot):
        return self.named([self.state[slot]])

    def new_rows(self):
        """A number, 0, for each row of each matrix."""
        return [p.detach().new_zeros(p.size(0)) for p in self.params]

    def named_rows(self):
        return zip(self.names, self.row_squares)

    def squares(self):
        """[sum of squares of a piece of the gradient]."""
        return [part.dot(part) for part in self.grad.split(2 ** 24)]

    def gather(self):
        """Puts gradients back in place where they are our views no longer: model.zero_grad() sets None, which
        is a gradient of zero here, and the next backward then makes a new tensor."""
        for p, grad, address in zip(self.params, self.grads, self.addresses):
            if p.grad is not grad:
                grad.zero_() if p.grad is None else grad.copy_(p.grad)
                p.grad = grad
            if p.data_ptr() != address:
                raise RuntimeError('a parameter was moved or replaced after its optimizer was made: make it '
                                   'afterwards')


class FlatOptimizer:
    """What the optimizers below share. `params`: parameters, (name, parameter) pairs, or dicts with either
    under 'params' and settings of their own, as in torch. Frozen parameters, and tied ones after the first,
    are left out. The next step reads its settings from the dicts in param_groups; set_lr sets 'lr' in all of
    them."""

    def __init__(self, params, **defaults):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{'params': params}]
        self.steps, self.param_groups, self.flats = 0, [], []
        seen = set()
        for given in groups:
            group, buckets = {**defaults, 'lr_scale': 1.0, **given, 'params': []}, {}
            for item in given['params']:
                name, p = item if isinstance(item, tuple) else (f'param.{len(seen)}', item)
                if not p.requires_grad or id(p) in seen:
                    continue
                if str(p.dtype) not in ('torch.float32', 'torch.float64'):
                    raise UserError(f'{name} is {p.dtype}: parameters that are trained must be float32')
                seen.add(id(p))
                group['params'].append(p)
                mesh = getattr(p, 'device_mesh', None)          # of ranks among whom run.shard has cut it
                buckets.setdefault((p.device, p.dtype, mesh), []).append((name, p))
            if group['params']:
                self.param_groups.append(group)
                for (*_, mesh), bucket in buckets.items():
                    kind = Flat
                    if mesh:
                        from nanoforge.shard import Shards as kind
                    self.flats.append(kind(group, *zip(*bucket), self.slots(group)))
        if not self.flats:
            raise UserError('nothing to train: no parameter requires a gradient')

    def slots(self, group):
        return ()

    @property
    def grads(self):
        """The flat gradients."""
        return [grad for flat in self.flats for grad in flat.flat_grads()]

    @property
    def grads_to_sum(self):
        """Those that data parallel sums over ranks: backward has done it where --shard cuts them."""
        return [grad for flat in self.flats if not flat.is_summed for grad in flat.flat_grads()]

    def zero_grad(self):
        for flat in self.flats:
            flat.zero_grad()

    def set_lr(self, lr):
        for group in self.param_groups:
            group['lr'] = lr * group['lr_scale']

    def clip_grad_norm(self, max_norm):
        """Scales the gradients so that their joint 2-norm is at most max_norm (0: never) and returns the norm
        before, a tensor (). Where that is not finite the gradients stay as they are: the caller skips the
        step."""
        grads = self.grads
        squares = [square for flat in self.flats for square in flat.squares()]
        norm = sum(square.to(grads[0].device) for square in squares).sqrt()
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).where(norm.isfinite(), 1.0)
            if scale.device.type != 'cpu' or scale < 1:  # a GPU would have to be waited for
                for grad in grads:
                    grad.mul_(scale.to(grad.device))
        return norm

    def step(self):
        self.steps += 1
        for flat in self.flats:
            flat.gather()
            self.update(flat)
        self.update_copies()

    def update_copies(self):
        """For whoever has changed the weights: products may read a copy of them in bfloat16."""
        from nanoforge.kernels import update_copies
        for flat in self.flats:
            update_copies(flat.params)

    def state_dict(self):
        """{'step': int64 (), 'SLOT/PARAMETER': tensor}, the live state."""
        state = {'step': self.flats[0].weights[0].new_zeros(()).long().add_(self.steps)}
        for flat in self.flats:
            for slot in flat.state:
                state.update((f'{slot}/{name}', view) for name, view in flat.named_state(slot))
        return state

    def load_state_dict(self, state):
        """Copies what state_dict gave. UserError, and nothing changed, where a name or a shape differs."""
        live = self.state_dict()
        for key in sorted(live.keys() | state.keys()):
            shapes = [tuple(s[key].shape) if key in s else 'nothing' for s in (live, state)]
            if shapes[0] != shapes[1]:
                raise UserError(f'optimizer state {key}: needed is {shapes[0]}, the checkpoint holds '
                                f'{shapes[1]}')
        from nanoforge.tensors import assign
        for key in live.keys() - {'step'}:
            assign(live[key], state[key])
        self.steps = int(state['step'])


class WeightAverage:
    """Exponential moving average of an optimizer's parameters, in float32 beside its flat buffers.

    Within `with average.swapped()` the model holds the average, and this object the weights of the last step.
    With decay 0 there is no average, and nothing here does anything.
    """

    def __init__(self, optimizer, decay):
        self.flats, self.decay = optimizer.flats if decay else [], decay      # decay 0: nothing is averaged
        self.update_copies = optimizer.update_copies
        self.means = [[part.clone() for part in flat.weights] for flat in self.flats]

    def pairs(self):
        """[(mean, weights)] as plain tensors: two of each flat buffer, or of each shard."""
        return [pair for mean, flat in zip(self.means, self.flats) for pair in zip(mean, flat.weights)]

    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))   # early on the start is forgotten sooner
        for mean, weights in self.pairs():
            mean.lerp_(weights, 1 - decay)

    def swap(self):
        for mean, weights in self.pairs():
            held = weights.clone()
            weights.copy_(mean)
            mean.copy_(held)
        if self.flats:
            self.update_copies()

    @contextlib.contextmanager
    def swapped(self):
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def restore(self, tensors):
        """Takes the last step's weights ('weights/PARAMETER') out of a checkpoint's tensors; the model of the
        checkpoint is the average, and goes where that belongs."""
        from nanoforge.tensors import assign
        last = {name: tensors.pop(name) for name in list(tensors) if name.startswith('weights/')}
        for mean, weights in self.pairs():
            mean.copy_(weights)
        self.swap()
        for name, held in self.state_dict().items():
            assign(held, last[name])
        self.swap()

    def state_dict(self):
        """{'weights/PARAMETER': tensor}: what this object holds, live."""
        return {f'weights/{name}': view for mean, flat in zip(self.means, self.flats)
                for name, view in flat.named(mean)}


class AdamW(FlatOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def slots(self, group):
        return 'exp_avg', 'exp_avg_sq'

    def update(self, flat):
        lr, (beta1, beta2), eps, decay = (flat.group[key] for key in ('lr', 'betas', 'eps', 'weight_decay'))
        # m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), the corrections moved from tensors to scalars
        correction = math.sqrt(1 - beta2 ** self.steps)
        rate = lr * correction / (1 - beta1 ** self.steps)
        if flat.takes_triton:
            from nanoforge.triton_kernels import adamw
            for part in flat.chunks:
                adamw(*part, 1 - lr * decay, rate, beta1, beta2, eps * correction)
            return
        for p, grad, exp_avg, exp_avg_sq in flat.chunks:
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if decay:
                p.mul_(1 - lr * decay)
            p.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps * correction), value=-rate)


class SGD(FlatOptimizer):
    """Gradient descent with torch's meaning of each setting: weight decay is added to the gradient g, the
    momentum buffer is b = momentum * b + g, Nesterov's direction g + momentum * b."""

    def __init__(self, params, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0):
        if nesterov and not momentum:
            raise UserError('nesterov needs momentum above 0')
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    def slots(self, group):
        return ('momentum_buffer',) if group['momentum'] else ()

    def update(self, flat):
        lr, momentum, decay = (flat.group[key] for key in ('lr', 'momentum', 'weight_decay'))
        for p, grad, *buffer in flat.chunks:
            if decay:
                grad = grad.add(p, alpha=decay)
            if momentum:
                buffer[0].mul_(momentum).add_(grad)
                grad = grad.add(buffer[0], alpha=momentum) if flat.group['nesterov'] else buffer[0]
            p.add_(grad, alpha=-lr)


def newton_schulz(x, coefficients):
    """Matrices x (N, rows, columns) with their singular values brought near 1, on the shorter side: a step
    (a, b, c) takes each singular value s to a s + b s^3 + c s^5."""
    if x.size(1) > x.size(2):
        return newton_schulz(x.mT, coefficients).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = x.baddbmm(gram.baddbmm(gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(AdamW):
    """Orthogonalised Nesterov momentum for matrices, AdamW for groups with muon=False (embeddings, heads,
    vectors).

    Steps are scaled by 0.2 * sqrt(max(rows, columns)), which makes their size, hence learning rate and weight
    decay, AdamW's (Moonlight, arXiv 2502.16982, section 2.2). adam_lr: the rate of the AdamW groups if
    another. A weight that stacks projections says so, weight.splits = (rows of each): each is orthogonalised
    alone. ns_dtype: the precision of the Newton-Schulz products if not the parameters'.
    """
    coefficients = 5 * ((3.4445, -4.7750, 2.0315),)     # kellerjordan.github.io/posts/muon: 0.68 to 1.15
    row_beta = None                                     # NorMuon's: rows are left as they are

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1, adam_lr=None, betas=(0.9, 0.95),
                 eps=1e-8, ns_dtype=None):
        FlatOptimizer.__init__(self, params, lr=lr, momentum=momentum, weight_decay=weight_decay, betas=betas,
                               eps=eps, muon=True)
        self.ns_dtype = ns_dtype
        for flat in self.flats:
            if not flat.group['muon'] and adam_lr is not None:
                flat.group.update(lr=adam_lr, lr_scale=adam_lr / lr)
            for name, p in zip(flat.names, flat.params):
                if flat.group['muon'] and p.dim() != 2:
                    raise UserError(f'{name} {tuple(p.shape)} is no matrix: its group needs muon=False')
            if flat.group['muon'] and self.row_beta:
                flat.row_squares = flat.new_rows()

    def slots(self, group):
        return ('momentum_buffer',) if group['muon'] else super().slots(group)

    def momentum(self, group):
        return group['momentum']

    def update(self, flat):
        if not flat.group['muon']:
            return super().update(flat)
        lr, decay, momentum = flat.group['lr'], flat.group['weight_decay'], self.momentum(flat.group)
        if flat.is_sharded:
            return self.update_shards(flat, lr, decay, momentum)
        buffer = flat.state['momentum_buffer'].lerp_(flat.grad, 1 - momentum)
        flat.data.mul_(1 - lr * decay)
        matrices = []
        for i, (p, direction) in enumerate(zip(flat.params, flat.views(flat.grad.lerp(buffer, momentum)))):
            rows = getattr(p, 'splits', p.size(0))
            squares = flat.row_squares[i].split(rows) if self.row_beta else [None] * p.size(0)
            matrices += zip(p.detach().split(rows), direction.split(rows), squares)
        self.add_orthogonal(matrices, lr)

    def update_shards(self, flat, lr, decay, momentum):
        """Each matrix is orthogonalised by the one rank that owns it, which gets its rows from all others and
        sends back what is added to them."""
        parts = []                              # this rank's rows of each: direction, NorMuon's squares
        for i, (p, grad, buffer) in enumerate(flat.chunks):
            buffer.lerp_(grad, 1 - momentum)
            p.mul_(1 - lr * decay)
            direction = grad.lerp(buffer, momentum)
            parts.append(flat.beside(direction, flat.row_squares[i]) if self.row_beta else direction)
        owned = flat.to_owners(parts)           # {number: matrix}
        columns = {i: flat.params[i].size(1) for i in owned}
        steps = {i: whole.new_zeros(whole.shape) for i, whole in owned.items()}
        matrices = []
        for i, whole in owned.items():
            squares = steps[i][:, -1].copy_(whole[:, -1]) if self.row_beta else None
            matrices.append((steps[i][:, :columns[i]], whole[:, :columns[i]], squares))
        self.add_orthogonal(matrices, lr)
        for i, (p, step) in enumerate(zip(flat.weights, flat.from_owners(steps, parts))):
            p.add_(step[:, :p.size(1)])
            if self.row_beta:
                flat.row_squares[i].copy_(step[:, -1])

    def add_orthogonal(self, matrices, lr):
        """Adds to each weight (rows, columns) of [(weight, direction, mean square of each row)] its step."""
        same_shape = {}
        for part in matrices:
            same_shape.setdefault(part[0].shape, []).append(part)
        for shape, parts in same_shape.items():
            x = parts[0][0].new_empty((len(parts), *shape), dtype=self.ns_dtype)
            for row, (_, direction, _) in zip(x, parts):
                row.copy_(direction)
            x = newton_schulz(x, self.coefficients)
            if self.row_beta:
                x = self.even_rows(x.to(parts[0][0].dtype), [square for *_, square in parts])
            for row, (weight, *_) in zip(x, parts):
                weight.add_(row, alpha=-lr * 0.2 * math.sqrt(max(shape)))


class NorMuon(Muon):
    """Muon whose rows, one for each neuron, are of one size on average: each is divided by the root of its
    running mean square, each matrix then scaled to the norm of an orthogonal one (Li et al. 2025, arXiv
    2510.05491, algorithm 1).

    With the coefficients of Polar Express for five steps (Amsel et al. 2025, arXiv 2505.16932), which bring
    singular values from 1e-3 upwards to 0.86 to 1.14, and a momentum that rises in the first steps.
    """
    coefficients = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
    row_beta = 0.95
    momentum_warmup = 50    # steps; from 0.85

    def momentum(self, group):
        missing = max(0.0, 1 - self.steps / self.momentum_warmup)
        return group['momentum'] - missing * max(0.0, group['momentum'] - 0.85)

    def even_rows(self, x, squares):
        """x (N, rows, columns) with even rows; squares: N tensors (rows,), brought up to date in place."""
        for matrix, square in zip(x, squares):
            square.lerp_(matrix.square().mean(1), 1 - self.row_beta)
            matrix.div_((square.sqrt() + 1e-8)[:, None])
        return x.mul_(math.sqrt(min(x.shape[1:])) / x.norm(dim=(1, 2), keepdim=True))

    def state_dict(self):
        state = super().state_dict()
        for flat in self.flats:
            if flat.group['muon']:
                state.update((f'row_square/{name}', square) for name, square in flat.named_rows())
        return state


class TorchOptimizer(FlatOptimizer):
    """An optimizer class of torch.optim behind the same methods. In place of a sharded parameter it gets this
    rank's rows: right for all that update each number by itself, so not for Adafactor."""

    def __init__(self, params, kind, **settings):
        super().__init__(params, **settings)
        self.leaves = {}    # parameter -> what the inner optimizer knows of it
        for flat in self.flats:
            leaves = [rows.requires_grad_() for rows in flat.weights] if flat.is_sharded else flat.params
            self.leaves.update(zip(flat.params, leaves))
        for group in self.param_groups:
            group['params'] = [self.leaves[p] for p in group['params']]
        self.inner = kind(self.param_groups)

    def inner_step(self):
        self.grads  # puts them back in place
        for flat in self.flats:
            if flat.is_sharded:     # each backward makes gradients anew, and FSDP may move rows to pad them
                for p, rows, grad in zip(flat.params, flat.weights, flat.grads):
                    self.leaves[p].data, self.leaves[p].grad = rows, grad
        self.inner.step()

    def step(self):
        self.steps += 1
        self.inner_step()
        self.update_copies()

    def state_dict(self):
        state = super().state_dict()
        for flat in self.flats:
            for name, p in zip(flat.names, flat.params):
                for slot, tensor in self.inner.state.get(self.leaves[p], {}).items():
                    if tensor is not None:
                        # a count of steps is no row of anything
                        of_rows = flat.is_sharded and tensor.dim() > 0
                        state[f'{slot}/{name}'] = flat.sharded(p, tensor) if of_rows else tensor
        return state

    def load_state_dict(self, state):
        if not self.inner.state and int(state.get('step', 1)):
            before = [[part.clone() for part in flat.weights] for flat in self.flats]
            self.zero_grad()
            self.inner_step()  # makes the state, which is then overwritten
            for flat, parts in zip(self.flats, before):
                for part, held in zip(flat.weights, parts):
                    part.copy_(held)
        super().load_state_dict(state)


def make_optimizer(name, model, lr, weight_decay=0.1, betas=(0.9, 0.95), momentum=None, nesterov=False,
                   adam_lr=None, ns_dtype=None):
    """The optimizer `name` of OPTIMIZERS for what trains of a model, with the settings that it knows.

    Weight decay is for matrices, embeddings among them, not for norms and biases. Muon and NorMuon take the
    matrices inside numbered blocks. momentum None is the optimizer's own.
    """
    if name not in OPTIMIZERS:
        raise UserError(f'no optimizer {name!r}; there are {", ".join(OPTIMIZERS)}')
    from torch import nn, optim
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = {}  # (is a matrix, is for Muon) -> [(name, parameter)]
    for key, p in model.named_parameters():
        in_a_block = any(map(str.isdigit, key.split('.')))
        hidden = p.dim() == 2 and id(p) not in tables and in_a_block and 'head' not in key
        groups.setdefault((p.dim() >= 2, 'muon' in name and hidden), []).append((key, p))
    groups = [{'params': members, 'weight_decay': weight_decay if matrix else 0.0, 'muon': hidden}
              for (matrix, hidden), members in groups.items()]
    kind = {'adamw': AdamW, 'sgd': SGD, 'muon': Muon, 'normuon': NorMuon}.get(name)
    if not kind:
        kind = {key.lower(): value for key, value in vars(optim).items() if isinstance(value, type)}[name]
    settings = dict(lr=lr, betas=betas, momentum=momentum, nesterov=nesterov, adam_lr=adam_lr,
                    ns_dtype=ns_dtype)
    known = inspect.signature(kind).parameters
    settings = {key: value for key, value in settings.items() if key in known and value is not None}
    if issubclass(kind, FlatOptimizer):
        return kind(groups, **settings)
    return TorchOptimizer(groups, kind, **settings)
