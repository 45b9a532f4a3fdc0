# A speed run: the shortest way we know to nanoGPT's laptop loss. NorMuon, a modern block, high rates that
# fall to nothing where that loss is reached. For a better model train longer: shakespeare_char_cpu.py.
# python train_gpt.py recipes/shakespeare_char_fast.py
# measured by: python bench/gpt.py --nanogpt PATH --fast
out_dir = 'out-shakespeare-fast'
dataset = 'shakespeare_char'
device = 'cpu'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
max_iters = 240

optimizer = 'normuon'
learning_rate = 1e-2
adam_lr = 3e-2  # of embeddings and vectors
weight_decay = 0.0
lr_scheduler = 'linear'
lr_decay_iters = 240
min_lr = 0.0
warmup_iters = 20
beta2 = 0.99

eval_interval = 100

# ---- All other settings, with their defaults: take away a # to change one.

# seed = 1337  # of data order, sampling, dropout and new weights
# resume = False  # go on with the run in the output folder; auto: if there is one

# gradient_accumulation_steps = 1  # micro-batches of an optimizer step
# beta1 = 0.9  # decay of the first moment
# momentum = None  # of sgd (0.9), muon (0.95)
# grad_clip = 1.0  # highest gradient norm; 0 = no clipping
# ema = None  # decay of the mean of the weights, which is evaluated and saved; 0 = off; 0.998 where the rate
#     # stays constant, else 0
# decay_lr = False  # decay the rate; typed --no-decay_lr beats lr_scheduler

# report_to = []  # where to log, as Hugging Face says it; if empty, tensorboard and wandb.enabled decide
#     # (tensorboard, wandb, none, all)
# tensorboard = True  # events under logs/<run>/
# wandb_enabled = False  # also log to Weights & Biases
# wandb_project = 'nanoforge'  # its project
# wandb_entity = None  # user or team; your own if not set
# wandb_name = None  # its run; the folder's name if not set
# wandb_tags = []  # words to find it by

# dtype = 'auto'  # of autocast on a GPU; weights stay float32 (auto, float32, bfloat16, float16)
# bf16 = None  # the same as dtype=bfloat16; false: float32
# fp16 = None  # the same as dtype=float16, with loss scaling
# matmul = 'auto'  # matrix products on a CPU; auto = bf16 where the processor has it (auto, float32, bf16)
# num_gpus = 1  # processes on this machine, one for each GPU
# shard = 'none'  # what each process holds of weights, gradients and optimizer state: all; its part; or its
#     # part of a copy on each node (none, full, hybrid)
# gradient_checkpointing = False  # compute activations again in backward: less memory, a third more time
# checkpoint_every = 1  # those of every n-th layer alone: 2 = half of both
# compile = False  # torch.compile each layer: faster on a GPU after half a minute
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

# arch = 'qwen3'  # family, and so the format on disk (qwen3, llama, gpt2)
# n_kv_head = None  # fewer key/value heads than n_head; as many if not set
# n_inner = None  # width of the MLP; 8/3 n_embd when gated, else 4 n_embd
# activation = None  # of the MLP; the family's own if not set (silu, gelu, gelu_tanh)
# dropout = 0.0  # for pretraining 0 is good, for fine-tuning try 0.1
# bias = False  # in linear layers and norms; the published GPT-2 has them

# eval_iters = 200  # at most so many batches an evaluation; windows do not overlap
# log_interval = 10  # steps between log lines
# eval_only = False  # evaluate what init_from names, and stop
# always_save_checkpoint = False  # keep every checkpoint, not only the last and the best
# patience = 0  # stop after so many evaluations without a better one; 0 = never
# sample_tokens = 160  # tokens sampled at each evaluation; 0 = none
