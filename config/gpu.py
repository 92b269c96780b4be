# The same question on one data-centre GPU: the report's 384-wide model at a budget that means something. 1,400 updates of
# 96 x 1024 tokens are 138M tokens, 5 per active parameter. The default corpus has 3.3M: give --dataset=FOLDER a larger one
# (any tree of source text), or the model reads the same text 40 times over.
block_size = 1024
max_train_tokens = 0
max_val_tokens = 0
max_steps = 1_400
batch_size = 96
micro_batch_size = 96
warmup_steps = 50
learning_rate = 1e-3
eval_interval = 140
experiment = 'gpu'
