# The same question on one data-centre GPU (80 GB): the report's 384-wide model and context at a budget that means
# something. 1,400 updates of 192 x 512 tokens are 138M tokens, at least 5 per active parameter of every variant (the
# baseline's 26.4M need 132M). The default corpus has 3.3M: give --dataset=FOLDER a larger one (any tree of source
# text), or the model reads the same text 40 times over.
# What it costs, by count, not by clock: 2.4e16 model FLOPs a run, 1 to 2.5 minutes at 40 to 15% of an H100's 989
# TFLOP/s; compilation, evaluation (983 thousand tokens, 7 times) and start besides. config/gpu.plan has 56 runs.
max_train_tokens = 0
max_val_tokens = 10 * 192 * 512 + 1     # ten whole micro-batches: no second shape to compile
max_steps = 1_400
batch_size = 192
micro_batch_size = 192                  # all at once, about 20 GB; 96 or 48 where there is less, the result stays
warmup_steps = 50
learning_rate = 1e-3                    # Experiment 1's; not swept at this batch
eval_interval = 200
checkpoint_interval = 700               # a checkpoint is 1 GB; SIGTERM and Ctrl-C save one at any step
experiment = 'gpu'
