# nanoGPT's run for a laptop: a model of 0.8M parameters, a minute on two cores.
# python train_gpt.py recipes/shakespeare_char_cpu.py
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
arch = 'gpt2'
device = 'cpu'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0
batch_size = 12
max_iters = 2000

learning_rate = 1e-3
decay_lr = True
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

eval_interval = 250
eval_iters = 20
log_interval = 10
