"""Hugging Face causal language models: loading, blocks, parameters, loss, saving.

place         where a model is: a folder, or an id on the hub
source        the folder or id of a model: what cannot be trained, what an export keeps
pretrained    read a model and its tokenizer
positions     the longest text that a model can read
blocks        the partition of the parameters into blocks
params        a client's copy, with one flat buffer for each block
adapters      LoRA adapters
loss          the next-token loss
device_copy   asynchronous copies to the CPU
portable      the words of an export, for either release of Transformers
save          write, read back and hash checkpoints
gguf_file     write and read back a file for llama.cpp
gguf_tokenizer  its tokenizer
"""
