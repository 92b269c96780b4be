# The experiment at a size where it can be repeated: 8 seeds x 3 variants, each run at most 2 minutes on 2 cores.
# The report's proportions at a quarter of its width (so lora's ranks are 8/16, its heads 8 + 16 | 24), 15 times as many
# updates, a vocabulary of 1024 and the whole corpus: long enough for a model to learn something that can be seen.
n_layer = 4
n_head = 4
n_embd = 96
block_size = 128
d_ff = 256
vocab_size = 1024
max_train_tokens = 0
max_val_tokens = 65_536
max_steps = 300
batch_size = 16
micro_batch_size = 16
warmup_steps = 15
learning_rate = 3e-3            # from results/sweep
eval_interval = 100
experiment = 'laptop'
