# The experiment at a size where it can be repeated: 8 seeds x 3 variants on a laptop, each run at most 2 minutes on 2 cores.
# Same question as the defaults, smaller model, 20 times as many updates: long enough for losses to part.
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
d_ff = 256
vocab_size = 1024
max_train_tokens = 0
max_val_tokens = 65_536
max_steps = 400
batch_size = 16
micro_batch_size = 16
warmup_steps = 20
learning_rate = 3e-3
eval_interval = 100
experiment = 'laptop'
