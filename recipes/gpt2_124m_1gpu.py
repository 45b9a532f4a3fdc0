# GPT-2 of 124M parameters on one card of 24 GB: 2.6 billion tokens of web pages, 20 for each parameter.
# python data/fineweb/prepare.py --num_tokens=2700000000 && python train_gpt.py recipes/gpt2_124m_1gpu.py
# It needs 10 GiB, and 10.4 hours on a card that reaches 60 TFLOP/s (`--plan`). For eight: gpt2_124m.py.
out_dir = 'out-gpt2-124m'
dataset = 'fineweb'
arch = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

# 16 rows x 1,024 tokens x 32 micro-batches = 524,288 tokens a step
batch_size = 16
gradient_accumulation_steps = 32
max_iters = 5000

learning_rate = 1e-3
decay_lr = True
warmup_iters = 250
lr_decay_iters = 5000
min_lr = 1e-4
weight_decay = 1e-1
beta2 = 0.95

eval_interval = 250
eval_iters = 100
log_interval = 10
compile = True

# ---- All other settings, with their defaults: take away a # to change one.

# seed = 1337  # of data order, sampling, dropout and new weights
# resume = False  # go on with the run in the output folder; auto: if there is one

# optimizer = 'adamw'  # the first four are ours; others are torch's (adamw, sgd, muon, normuon, adadelta,
#     # adafactor, adagrad, adam, adamax, asgd, nadam, radam, rmsprop, rprop)
# beta1 = 0.9  # decay of the first moment
# momentum = None  # of sgd (0.9), muon (0.95)
# adam_lr = None  # muon: the rate of embeddings, head and vectors, which AdamW trains; learning_rate if not
#     # set
# grad_clip = 1.0  # highest gradient norm; 0 = no clipping
# ema = None  # decay of the mean of the weights, which is evaluated and saved; 0 = off; 0.998 where the rate
#     # stays constant, else 0
# lr_scheduler = 'none'  # none = constant, or the cosine with --decay_lr (none, constant, cosine,
#     # exponential, linear, wsd, cosine_restarts, plateau)

# report_to = []  # where to log, as Hugging Face says it; if empty, tensorboard and wandb.enabled decide
#     # (tensorboard, wandb, none, all)
# tensorboard = True  # events under logs/<run>/
# wandb_enabled = False  # also log to Weights & Biases
# wandb_project = 'nanoforge'  # its project
# wandb_entity = None  # user or team; your own if not set
# wandb_name = None  # its run; the folder's name if not set
# wandb_tags = []  # words to find it by

# device = 'auto'  # auto = cuda, mps or cpu; or cuda:1, ...
# dtype = 'auto'  # of autocast on a GPU; weights stay float32 (auto, float32, bfloat16, float16)
# bf16 = None  # the same as dtype=bfloat16; false: float32
# fp16 = None  # the same as dtype=float16, with loss scaling
# matmul = 'auto'  # matrix products on a CPU; auto = bf16 where the processor has it (auto, float32, bf16)
# num_gpus = 1  # processes on this machine, one for each GPU
# shard = 'none'  # what each process holds of weights, gradients and optimizer state: all; its part; or its
#     # part of a copy on each node (none, full, hybrid)
# gradient_checkpointing = False  # compute activations again in backward: less memory, a third more time
# checkpoint_every = 1  # those of every n-th layer alone: 2 = half of both
# tensor_parallel = 1  # processes that hold a model together, each its part of the heads and inner channels
# plan = False  # print the memory and the time that this run would take, and what makes it fit; no weights
#     # are loaded
# gpu_memory = None  # GiB of each GPU that is planned for; those of this machine if not set
# gpu_tflops = None  # what each reaches in such a run, about 40% of its data sheet's bf16; this machine's
#     # products if not set
# nohup = False  # in the background: prints PID and log, logs/training_DATE_TIME.log

# training_mode = 'single'  # single: one data set; multidataset: each micro-batch from one of several;
#     # multicontext: aligned streams
# dataset_list = []  # multidataset: the data sets
# dataset_sampling_probs = []  # multidataset: how often each is drawn; empty = equally
# multicontext_datasets = []  # multicontext: one aligned stream of tokens each

# init_from = 'scratch'  # scratch: new weights; resume: the run in out_dir, as --resume; gpt2...: a
#     # pretrained model (scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl)
# gpt2_type = 'gpt2'  # what init_from=gpt2 begins as: one of the four sizes, or a local model directory

# n_kv_head = None  # fewer key/value heads than n_head; as many if not set
# n_inner = None  # width of the MLP; 8/3 n_embd when gated, else 4 n_embd
# activation = None  # of the MLP; the family's own if not set (silu, gelu, gelu_tanh)
# dropout = 0.0  # for pretraining 0 is good, for fine-tuning try 0.1
# bias = False  # in linear layers and norms; the published GPT-2 has them

# eval_only = False  # evaluate what init_from names, and stop
# always_save_checkpoint = False  # keep every checkpoint, not only the last and the best
# patience = 0  # stop after so many evaluations without a better one; 0 = never
# sample_tokens = 160  # tokens sampled at each evaluation; 0 = none
