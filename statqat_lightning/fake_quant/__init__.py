"""One tensor of one layer in training: its specification, fake quantizer, observer and scale.

In come the tensors of each forward; fake quantizers round them with the scale in force, and
observers add up statistics of a sample. `scale_refresh` turns these into new scales at batch end,
for all layers at once.
"""
