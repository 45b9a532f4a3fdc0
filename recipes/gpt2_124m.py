# GPT-2 of 124M parameters on OpenWebText, as in nanoGPT: about 4 days on 8 A100 40GB to a loss of 2.85.
# torchrun --standalone --nproc_per_node=8 train_gpt.py recipes/gpt2_124m.py
out_dir = 'out-gpt2-124m'
dataset = 'openwebtext'
arch = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = False  # a bit better and faster than GPT-2's own biases

# 12 rows x 1,024 tokens x 40 micro-batches = 491,520 tokens a step, over all GPUs
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 600000

learning_rate = 6e-4
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5
weight_decay = 1e-1
beta2 = 0.95

eval_interval = 1000
eval_iters = 200
log_interval = 10
compile = True
