# The shortest way we know to nanoGPT's laptop loss: Muon, a modern block, a high rate that falls to nothing.
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
max_iters = 400

optimizer = 'muon'
learning_rate = 1e-2
lr_scheduler = 'linear'
lr_decay_iters = 400
min_lr = 0.0
warmup_iters = 20
beta2 = 0.99

eval_interval = 100
