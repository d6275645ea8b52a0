"""What is known of a quantized model: the SNR of its tensors, in numbers and in pictures.

In comes a model with quantizers, whose statistics are there anyway; out come figures in dB by
tensor, summaries and plots.
"""
