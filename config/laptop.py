# The experiment at a size where it can be repeated: 72 runs, about 20 minutes each on one thread of an old EPYC.
# The report's proportions at a quarter of its width (so lora's ranks are 8/16, its heads 8 + 16 | 24) and a vocabulary of
# 1024; 1,500 updates see 3.07M tokens, 0.69 of the corpus, 3.7 for each parameter that a token uses.
n_layer = 4
n_head = 4
n_embd = 96
block_size = 128
d_ff = 256
vocab_size = 1024
max_train_tokens = 0
max_val_tokens = 0              # the whole validation split: its first 65,536 tokens would be 14 documents
max_steps = 1_500
batch_size = 16
micro_batch_size = 16
warmup_steps = 75
learning_rate = 6e-3            # config/laptop.plan has each arm's own
eval_interval = 300
dtype = 'float32'               # whatever the processor has, so that any machine may add runs; too small for bfloat16 to gain
experiment = 'laptop'
