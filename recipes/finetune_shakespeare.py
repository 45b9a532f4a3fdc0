# GPT-2 XL taught Shakespeare: a few steps at a constant low rate.
# python train_gpt.py recipes/finetune_shakespeare.py          (needs less memory: --init_from=gpt2-medium)
out_dir = 'out-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False

# 1 row x 1,024 tokens x 32 micro-batches = 32,768 tokens a step;
# the text has 301,966 tokens, so an epoch is 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
eval_interval = 5
eval_iters = 40
log_interval = 1
