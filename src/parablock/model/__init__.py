"""Hugging Face causal language models: loading, blocks, parameters, loss, saving.

pretrained    read a model and its tokenizer
blocks        the partition of the parameters into blocks
params        a client's copy, with one flat buffer for each block
adapters      LoRA adapters
loss          the next-token loss
device_copy   asynchronous copies to the CPU
save          write and hash checkpoints
"""
