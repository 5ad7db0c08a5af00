"""From requests to training batches: which candidates are drawn, and how rows become arrays.

sampling    the arithmetic of a draw: random starts -> the candidates of a batch, on host or device
samplers    the samplers by name, functions of one request, and their contract
cutting     rows of a draw -> packed batches, and the batches of an evaluation
training    endless training batches, made in a thread ahead of the steps
"""
