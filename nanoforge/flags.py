"""The settings that several scripts have, each declared once. A Config inherits them, and declares its own.

    @configclass
    class Config(RunFlags, TrainFlags, DataFlags, ModelFlags):
        section = 'training'        # where the documented paths of its own fields begin
        warmup_steps = 10           # no annotation: another default of an inherited field, nothing else

The comment beside a field is its help text; its range stands on the field. torch is not imported.
"""
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from configurator import Accepted, UserError, as_text, configclass, setting
from data.splits import EVAL_FRACTION
from nanoforge.optim import OPTIMIZERS, SCHEDULER_NAMES

SMALL_MODEL = 20_000_000    # parameters below which full fine-tuning needs a rate nearer to pretraining's
DTYPES = ('float32', 'bfloat16', 'float16')
MODEL_NAMES = ('model', 'model_name', 'model_id', 'model_name_or_path')  # besides, as others say
WANDB = ('wandb_enabled=true', 'report_to=wandb', 'report_to=all')      # what the settings of wandb need
LORA, FOUR_BITS, PLAN = ('use_lora=true',), ('load_in_4bit=true',), ('plan=true',)
COLUMNS = ('prompt_column', 'answer_column', 'chosen_column', 'rejected_column')
# what does not go together with --shard yet: these values of a setting; (): all that switch it on
UNSHARDED = {'optimizer': ('adafactor',), 'compile': (), 'forward_kl': ()}
# and what does not with --tensor_parallel
UNPARALLEL = {**UNSHARDED, 'load_in_8bit': (), 'load_in_4bit': (), 'use_dora': ()}
# with --sampler_url: servers hold other weights than 4 or 8 bits of ours, and adapters without biases;
# ranks that share a model must draw the same; an evaluation alone needs no server
SAMPLED_HERE = {'load_in_4bit': (True,), 'load_in_8bit': (True,), 'lora_bias': ('all', 'lora_only'),
                'tensor_parallel': range(2, 10 ** 6), 'eval_only': (True,),
                'specialization': ('full', 'model')}

# Keys of the documents that change nothing here: taken, stored, printed by --print_config, and said when set.
ACCEPTED = {
    'model.low_cpu_mem_usage': Accepted(True, 'weights are mapped from disk, never held twice'),
    'data.remove_unused_columns': Accepted(True, 'a row is encoded as it is read, and no column is kept'),
    'data.dataset_num_proc': Accepted(1, 'what is read is tokenised in this process'),
    'training.prediction_loss_only': Accepted(True, 'an evaluation always samples and scores'),
    'training.dataloader_num_workers': Accepted(0, 'batches are made of what was just sampled'),
    'training.dataloader_pin_memory': Accepted(False, 'batches are made of what was just sampled'),
    'training.deepspeed_config': Accepted(
        None, 'DeepSpeed is not used here; leave it out: --num_gpus=N is data parallel, and load_in_4bit '
        'with use_lora or gradient_checkpointing save memory', refused=True, also=('deepspeed',)),
    'distributed': Accepted(False, "the launcher's environment says how many processes there are"),
}


class Flags:
    """What all of them are: their check() calls each other in the order of the bases, and ends here."""
    accepted = ACCEPTED
    # what --help shows first
    most_used = (
        'algorithm', 'base_model_name', 'dataset', 'dataset_path', 'reward', 'loss_type', 'out_dir',
        'output_dir', 'experiment_name', 'learning_rate', 'max_iters', 'num_train_epochs', 'max_steps',
        'total_training_steps', 'batch_size', 'per_device_train_batch_size', 'use_lora', 'resume', 'num_gpus',
        'plan')
    typed = flags = frozenset()     # of a Config made by hand; parse() says which fields were set, and where

    def check(self):
        pass


@configclass
class RunFlags(Flags):
    """One run: where it computes, what it logs, whether it goes on."""
    seed: int = 1337  # of data order, sampling, dropout and new weights
    resume: bool | str = setting(False, choices=('auto',))  # go on with the run in the output
        # folder; auto: if there is one
    # logging
    report_to: list[str] = setting([], choices=('tensorboard', 'wandb', 'none', 'all'))  # where to log, as
        # Hugging Face says it; if empty, tensorboard and wandb.enabled decide
    tensorboard: bool = True  # events under logs/<run>/
    wandb_enabled: bool = setting(False, path='wandb.enabled', also=('wandb_log',))  # also log to
        # Weights & Biases
    wandb_project: str = setting('nanoforge', path='wandb.project', needs=WANDB)  # its project
    wandb_entity: str | None = setting(None, path='wandb.entity', needs=WANDB)  # user or team; your own if
        # not set
    wandb_name: str | None = setting(None, path='wandb.name', needs=WANDB, also=('wandb_run_name',))  # its
        # run; the folder's name if not set
    wandb_tags: list[str] = setting([], path='wandb.tags', needs=WANDB)  # words to find it by
    # machine
    device: str = setting('auto', path='device')  # auto = cuda, mps or cpu; or cuda:1, ...
    dtype: str = setting('auto', path='dtype', choices=('auto', *DTYPES))  # of autocast on a GPU; weights
        # stay float32
    bf16: bool | None = None  # the same as dtype=bfloat16; false: float32
    fp16: bool | None = None  # the same as dtype=float16, with loss scaling
    matmul: str = setting('auto', path='matmul', choices=('auto', 'float32', 'bf16'))  # matrix products on a
        # CPU; auto = bf16 where the processor has it
    num_gpus: int = setting(1, path='num_gpus', min=1)  # processes on this machine, one for each GPU
    shard: str = setting('none', path='shard', choices=('none', 'full', 'hybrid'))  # what each process holds
        # of weights, gradients and optimizer state: all; its part; or its part of a copy on each node
    gradient_checkpointing: bool = setting(False, path='training.gradient_checkpointing')  # compute
        # activations again in backward: less memory, a third more time
    checkpoint_every: int = setting(1, path='training.checkpoint_every', min=1,  # those of every n-th layer
                                    needs=('gradient_checkpointing=true',))  # alone: 2 = half of both
    compile: bool = setting(False, path='compile')  # torch.compile each layer: faster on a GPU after half a
        # minute
    tensor_parallel: int = setting(1, path='tensor_parallel', also=('GPU_num',), min=1)  # processes that hold
        # a model together, each its part of the heads and inner channels
    plan: bool = setting(False, path='plan')  # print the memory and the time that this run would take, and
        # what makes it fit; no weights are loaded
    gpu_memory: float | None = setting(None, path='gpu_memory', above=0, needs=PLAN)  # GiB of each GPU that
        # is planned for; those of this machine if not set
    gpu_tflops: float | None = setting(None, path='gpu_tflops', above=0, needs=PLAN)  # what each reaches in
        # such a run, about 40% of its data sheet's bf16; this machine's products if not set
    nohup: bool = setting(False, path='nohup')  # in the background: prints PID and log,
        # logs/training_DATE_TIME.log

    def check(self):
        super().check()
        if self.bf16 and self.fp16:
            typed = self.flags & {'bf16', 'fp16'}
            if len(typed) != 1:
                raise UserError('bf16 and fp16 exclude each other: choose one')
            setattr(self, ({'bf16', 'fp16'} - typed).pop(), False)      # a typed flag beats the recipe's
        if 'num_gpus' not in self.typed:
            self.num_gpus = max(self.num_gpus, self.tensor_parallel)    # so many processes are started
        elif self.num_gpus % self.tensor_parallel:
            raise UserError(f'num_gpus={self.num_gpus} is no multiple of tensor_parallel='
                            f'{self.tensor_parallel}: so many processes hold a model together')
        if clash := self.clash():
            flag, name = clash
            why = ', whose steps depend on means over whole matrices' if name == 'optimizer' else ''
            raise UserError(f'--{flag}={as_text(getattr(self, flag))} does not go together with '
                            f'{name}={as_text(getattr(self, name))} yet{why}: leave one of them out')

    def clash(self):
        """(flag, name of a setting that it does not go together with yet); None where there is none."""
        for flag, is_on, table in (('shard', self.shard != 'none', UNSHARDED),
                                   ('tensor_parallel', self.tensor_parallel > 1, UNPARALLEL),
                                   ('sampler_url', getattr(self, 'sampler_url', None), SAMPLED_HERE)):
            for name, refused in table.items() if is_on else ():
                value = getattr(self, name, None)
                if value in refused or value and not refused:
                    return flag, name

    def autocast_dtype(self):
        """The dtype that the flags ask for: --bf16 and --fp16 beat --dtype."""
        if self.bf16 or self.fp16:
            return 'bfloat16' if self.bf16 else 'float16'
        return 'float32' if self.bf16 is False and self.dtype == 'auto' else self.dtype

    def reports_to(self, place):
        """Whether 'tensorboard' or 'wandb' is logged to."""
        if place == 'wandb' and self.wandb_enabled:
            return True             # a recipe names tensorboard, and the command line asks for this one, too
        if self.report_to:
            return place in self.report_to or 'all' in self.report_to
        return self.tensorboard if place == 'tensorboard' else self.wandb_enabled


@configclass
class AdapterFlags(Flags):
    """Forms of LoRA, for every script that has adapters."""
    use_rslora: bool = setting(False, path='model.use_rslora', needs=LORA)  # adapters count alpha / sqrt(r)
        # times, so that a higher rank learns no slower (Kalajdzievski 2023)
    use_dora: bool = setting(False, path='model.use_dora', needs=LORA)  # train the length of each row of the
        # weights beside the adapters, too (Liu et al. 2024); they then have no dropout

    def check(self):
        super().check()
        if self.use_dora and getattr(self, 'lora_dropout', 0):
            if 'lora_dropout' in self.flags:
                raise UserError(f'lora_dropout={self.lora_dropout:g} does not go together with use_dora, '
                                'which rescales the whole weight: leave one of them out')
            self.lora_dropout = 0.0                 # the default's, or a recipe's
        if (self.use_dora or self.use_rslora) and getattr(self, 'specialization', 'lora') != 'lora':
            raise UserError('use_rslora and use_dora are for specialization=lora, not '
                            f'{self.specialization}, which has no adapters')


@configclass
class ModelFlags(AdapterFlags):
    """The policy: which model, what of it trains, in which precision the rest is held."""
    section = 'model'

    base_model_name: str = setting(  # a directory, hub name or PEFT adapter; or tiny, the embedded model
        'tiny', also=MODEL_NAMES)
    torch_dtype: str = setting('bfloat16', choices=DTYPES)  # of frozen weights on a GPU (under LoRA, a
        # reference); what trains is float32
    use_flash_attention: bool = False  # on a GPU prefer the flash kernel; false: PyTorch chooses among the
        # fused ones
    load_in_8bit: bool = False  # hold the frozen weights under LoRA in 8 bits
    load_in_4bit: bool = False  # hold them in 4 bits: QLoRA
    bnb_4bit_compute_dtype: str | None = setting(None, choices=DTYPES, needs=FOUR_BITS)  # of products with
        # 4-bit weights; as all others if not set
    bnb_4bit_quant_type: str = setting('nf4', choices=('nf4', 'fp4'), needs=FOUR_BITS)  # spacing of the
        # 4-bit values
    bnb_4bit_use_double_quant: bool = setting(True, needs=FOUR_BITS)  # quantise their scales, too
    use_lora: bool = False  # train low-rank adapters, not the weights themselves
    lora_r: int = setting(8, min=1, needs=LORA)  # rank of the adapters
    lora_alpha: float = setting(16, above=0, needs=LORA)  # adapters count alpha / r times
    lora_dropout: float = setting(0.05, min=0, below=1, needs=LORA)  # on the input of the
        # adapters, while training
    lora_target_modules: list[str] = setting([], needs=LORA)  # layers with an adapter, named as in PEFT
        # (q_proj); empty = every linear one but the head
    lora_bias: str = setting('none', choices=('none', 'all', 'lora_only'), needs=LORA)  # which biases train
        # beside the adapters

    def check(self):
        super().check()
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError('load_in_4bit and load_in_8bit exclude each other: choose one')
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_lora:
            bits = 4 if self.load_in_4bit else 8
            raise UserError(f'load_in_{bits}bit needs use_lora=true: quantised weights are frozen, only '
                            'adapters train')

    @property
    def mode(self):
        """'full', 'LoRA' or 'QLoRA'."""
        if self.load_in_4bit or self.load_in_8bit:
            return 'QLoRA'
        return 'LoRA' if self.use_lora else 'full'


@dataclass
class Source:
    """One data set of several."""
    name: str = ''  # a file (.jsonl, .json, .csv, .parquet), a directory of them, an embedded set, or a hub
        # data set
    subset: str | None = None  # the configuration of a hub data set
    split: str = 'train'  # the split of a hub data set or directory that is trained on
    weight: float = 1.0  # how often its rows are seen in an epoch: 2 = twice, 0.5 = every other row
    prompt_column: str | None = None  # column of the question; found out if not set
    answer_column: str | None = None  # column of the answer; found out if not set
    chosen_column: str | None = None  # column of the preferred answer (preference data)
    rejected_column: str | None = None  # column of the other one (preference data)
    dataset_columns: list[str] = setting([])  # columns that a system_prompt template may name; empty = all


@configclass
class DataFlags(Flags):
    """Rows: where they come from, and how much of them is used."""
    section = 'data'
    unread_columns = ()     # those of COLUMNS that a script's rows do not have

    dataset_path: str | None = setting(None, also=('data_path', 'dataset', 'dataset_name'))  # file,
        # directory, embedded set or hub data set; several with commas. It stands in for `datasets`
    prompt_column: str | None = None  # column of what is asked, in dataset_path; found out if not set
    answer_column: str | None = None  # column of the answer
    chosen_column: str | None = None  # column of the preferred answer
    rejected_column: str | None = None  # column of the other one
    datasets: list[Source] = []  # the same as a list, with a weight for each; `data.datasets=` empties that
        # of a recipe
    system_prompt: str | None = setting(None, empty=True)  # template over the columns of a row: the system
        # message of every prompt; '' = none
    max_length: int | None = setting(None, min=1, also=('max_seq_length', 'max_seq_len'))  # tokens of prompt
        # and answer; the model's context if not set
    max_prompt_length: int | None = setting(None, min=1)  # tokens of the prompt
    eval_fraction: float | None = setting(EVAL_FRACTION, min=0, below=1, also=('val_fraction',))
        # of rows without metadata held out, by a hash of the prompt
    split_rule: str = setting('prompt', choices=('prompt', 'legacy'))  # legacy: as runs of earlier versions
        # held rows out
    skip_bad_rows: bool = False  # leave out rows that would stop the run, and say how many; a file that is
        # no JSON stops it all the same
    dataset_num_proc: int = setting(1, min=1)  # processes that render and tokenise

    def check(self):
        super().check()
        if self.eval_fraction is None:              # null, as earlier recipes have it
            self.eval_fraction = EVAL_FRACTION
        for name in self.unread_columns:
            if name in self.flags:
                read = ', '.join(column for column in COLUMNS if column not in self.unread_columns)
                raise UserError(f'{name}: rows have no such column here, but {read}')
        if getattr(self, 'algorithm', None) == 'cpt':
            if self.augment or self.system_prompt:
                raise UserError('algorithm=cpt learns texts as they are: it takes no system_prompt and no '
                                'augment')
            self.packing, self.loss_on = True, 'all'
        named = [name for name in COLUMNS if getattr(self, name)]
        if named and not self.dataset_path:
            if not self.datasets:
                raise UserError(f'{named[0]} names a column of --dataset_path, which is not given')
            for source in self.datasets:            # a flag is short for data.datasets.COLUMN
                for name in named:
                    setattr(source, name, getattr(self, name))
        for i, source in enumerate(self.datasets):
            if not source.name or not 0 < source.weight < float('inf'):
                raise UserError(f'data.datasets[{i}] needs a name and a weight above 0, not '
                                f'name={source.name!r}, weight={source.weight:g}')
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise UserError(f'max_prompt_length={self.max_prompt_length} leaves no room for an answer in '
                            f'max_length={self.max_length}')

    def sources(self, embedded=()):
        """The data sets as a list of Source: dataset_path, else datasets, else those called `embedded`."""
        if not self.dataset_path:
            return self.datasets or [Source(name=name) for name in embedded]
        columns = {name: getattr(self, name) for name in COLUMNS}
        is_one = os.path.exists(self.dataset_path)              # a comma may be part of its name
        names = [self.dataset_path] if is_one else self.dataset_path.split(',')
        return [Source(name=name.strip(), **columns) for name in names]


@configclass
class EnvironmentFlags(Flags):
    """What answers the turns of a policy (data/environments.py); without, a completion is one turn."""
    # environment
    env: str | None = None  # path.py:Env, a class of yours with reset(problem) -> messages and step(text) ->
        # (messages, reward, done); its rewards, summed over the turns, are the reward `env`
    max_turns: int = setting(8, min=1)  # that a policy has in an episode; what is said in all of them, and to
        # it, counts towards max_completion_length
    env_timeout: float = setting(10.0, above=0)  # seconds that a reset or step may take; with async def
        # reward_concurrency of them run side by side

    def check(self):
        super().check()
        for name in ('max_turns', 'env_timeout'):
            if name in self.flags and not self.env:
                raise UserError(f'{name} is about an environment, which is not given: --env=path.py:Env')
        if self.env and self.tensor_parallel > 1:
            raise UserError('env does not go together with tensor_parallel yet: processes that hold a model '
                            'together would hear different answers')
        if self.env and self.forward_kl:
            raise UserError('forward_kl learns answers that are given, and an environment has none: leave it '
                            'at 0')
        if self.env and self.system_prompt is None:
            self.system_prompt = ''                 # reset writes the prompt


@configclass
class RewardFlags(EnvironmentFlags):
    """What scores the samples of reinforcement learning."""
    # rewards
    rewards: list[str] = setting([], also=('reward', 'training.reward'))  # exact, number, tags, length, task,
        # model, env or path.py:function; by what the data has if not set
    reward_weights: list[float] = []  # one each; exact 2, number and tags 0.5, others 1 if not set
    multi_objective_aggregation: str = setting(  # normalize_then_sum: each reward is compared within its
        'sum_then_normalize', choices=('sum_then_normalize', 'normalize_then_sum'))  # group by itself (GDPO)
    reward_timeout: float = setting(10.0, above=0)  # seconds that a function of yours may take for a batch,
        # or, where it scores one sample or is async def, for a sample
    reward_concurrency: int = setting(32, min=1)  # samples that such a one judges side by side, on each rank
    length_buffer: int | None = setting(None, min=1)  # tokens before max_completion_length over which
        # `length` falls to -1; a quarter of it
    reward_epochs: int = setting(1, min=1)  # passes over the pairs of a reward model trained here
    reward_batch_size: int = setting(32, min=1)  # pairs in an optimizer step of it, over all GPUs
    reward_learning_rate: float | None = setting(None, above=0)  # highest; 1e-3 if small, else the policy's
    # what becomes of them
    collect: str | None = None  # a .jsonl for the best completion of each group, as a row that train_sft.py
        # reads; none of a group in which no reward is above the rollout's lowest

    def check(self):
        super().check()
        going_on = self.resume or self.replay is not None           # the rows of this run, which are cut back
        if self.env and self.collect:
            raise UserError('collect writes single answers, and an env has several: leave one of them out')
        if self.collect and not self.collect.endswith('.jsonl'):
            raise UserError(f'collect={self.collect}: train_sft.py reads such rows from a name that ends in '
                            '.jsonl')
        if self.collect and not going_on and os.path.exists(self.collect):
            raise UserError(f'collect={self.collect} is there already, and nothing is written over: name '
                            'another file, or move it away')


@configclass
class JudgeFlags(Flags):
    """Models that say what samples, or their tokens, are worth: a critic, a teacher, a reward model."""
    # judges
    value_model_name: str | None = setting(None, path='model.value_model_name')  # ppo: what the critic, and a
        # reward model that is trained here, begin as
    reward_model_path: str | None = setting(None, path='model.reward_model_path')  # a sequence classifier
        # with one label: the reward `model`
    teacher_model_name: str | None = setting(None, path='model.teacher_model_name',
                                             needs=('algorithm=distill',))  # distill: what it learns
        # from, a model with the same tokenizer
    forward_kl: float = setting(0.0, min=0, max=1, needs=('algorithm=distill',))  # distill: share of the loss
        # that is KL(teacher || policy) on the data's answers
    # ppo
    gamma: float = setting(1.0, min=0, max=1)  # discount per token
    lam: float = setting(0.95, min=0, max=1)  # of generalised advantage estimation
    cliprange: float = setting(0.2, above=0)  # clip range of ppo's ratio, both ways
    cliprange_value: float = setting(0.2, min=0)  # how far a value may move in a rollout's updates; 0 = any
    vf_coef: float = setting(0.1, min=0)  # weight of the value loss
    value_learning_rate: float | None = setting(None, above=0, needs=('algorithm=ppo',))  # as the reward's
    share_critic: bool = False  # the critic is a head on the policy's own backbone


@configclass
class SamplerFlags(Flags):
    """Completions drawn by servers of SGLang or vLLM (sampler_client.py), in place of this process."""
    # servers that sample
    sampler_url: list[str] = setting([], path='sampler_url')  # servers of SGLang or vLLM that draw the
        # completions: http://host:port; several with commas
    sampler_dir: str | None = setting(None, path='sampler_dir')  # folder through which they get the weights;
        # if not set /dev/shm, where they run here and it has room, else the output folder
    sampler_timeout: float = setting(600.0, path='sampler_timeout', above=0)  # seconds that an answer of
        # theirs may take

    def check(self):
        super().check()
        for url in self.sampler_url:
            check_url(url)


def check_url(url):
    """UserError where it is no address of a server."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0
    except ValueError:                                      # a port that is none
        fits = False
    if not fits or parts.query or parts.fragment:
        raise UserError(f"sampler_url: '{url}' is no address of a server, http://host:port")


@configclass
class LoaderFlags(Flags):
    """Rows that are rendered once and batched beside the training."""
    dataloader_num_workers: int = setting(0, path='training.dataloader_num_workers', min=0)  # steps whose
        # batches a thread makes ahead
    dataloader_pin_memory: bool = setting(True, path='training.dataloader_pin_memory')  # batches in
        # page-locked memory, copied to the GPU meanwhile
    check_data: bool = setting(False, path='check_data', also=('check', 'dry_run'))  # show what is learned of
        # which rows and what is wrong with them, and stop


@configclass
class OptimizerFlags(Flags):
    """What pretraining and fine-tuning call by one name. Without a section: it is that of the script."""
    # optimizer
    optimizer: str = setting('adamw', choices=OPTIMIZERS)  # the first four are ours; others are torch's
    weight_decay: float = setting(0.0, min=0)  # of matrices; norms and biases are spared
    gradient_accumulation_steps: int = setting(1, min=1, also=('grad_accum',))  # micro-batches of an
        # optimizer step


@configclass
class StepFlags(Flags):
    """Steps on a model that is trained already."""
    learning_rate: float | None = setting(None, above=0, also=('lr',))  # the highest; by mode if not set:
        # full 1e-5 (more for a small model), LoRA 1e-4, QLoRA 2e-4
    max_grad_norm: float = setting(1.0, min=0, also=('grad_clip',))  # highest gradient norm; 0 = no clipping


@configclass
class TrainFlags(OptimizerFlags, StepFlags):
    """Fine-tuning's optimizer, schedule, evaluations and checkpoints."""
    section = 'training'

    output_dir: str = setting('models', also=('checkpoint_dir', 'out_dir'))  # checkpoints, log and pictures;
        # the model to use ends up in its root
    num_train_epochs: float = setting(  # passes over the data
        3.0, above=0, also=('epochs', 'num_epochs'), needs=('max_steps=-1',))
    max_steps: int = setting(-1, min=-1)  # optimizer steps in place of epochs; -1 = by epochs
    per_device_train_batch_size: int = setting(4, min=1, also=('batch_size', 'train_batch_size'))  # rows of a
        # micro-batch in each process
    lr_scheduler_type: str = setting(  # how the learning rate decays
        'linear', choices=tuple(SCHEDULER_NAMES),
        also=('lr_scheduler', 'scheduler_type', 'training.lr_scheduler'))
    warmup_steps: int | None = setting(None, min=0)  # optimizer steps in which the rate rises
    logging_steps: int = setting(10, min=1)  # steps between log lines
    eval_steps: int = setting(50, min=1, needs=('eval_strategy=steps',))  # steps between evaluations
    save_steps: int = setting(500, min=1, needs=('save_strategy=steps',))  # steps between checkpoints
    save_total_limit: int | None = setting(None, min=1)  # so many of the newest checkpoints are kept, and
        # the best; null = all
    save_only_model: bool = False  # without optimizer, but for the two newest, from which a run resumes
    dataloader_drop_last: bool = False  # leave out what does not fill a step at the end of an epoch

    def check(self):
        super().check()
        if self.max_steps == 0:
            raise UserError('max_steps must be 1 or more, or -1 for what num_train_epochs gives; not 0')
