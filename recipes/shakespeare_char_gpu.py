# A character-level model for a GPU: minutes. Overfits after a while, so only the best checkpoint matters.
# python train_gpt.py recipes/shakespeare_char_gpu.py
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
batch_size = 64
max_iters = 5000

learning_rate = 1e-3  # small networks stand a higher rate
decay_lr = True
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens a step
warmup_iters = 100

eval_interval = 250
eval_iters = 200
