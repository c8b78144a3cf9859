"""What is asked of a log: gradients of new samples, of generated ones and of a denoising path. Needs torch.

Their rows go into the log, beside those of the training; :mod:`diffhook.analysis` sets the two against each
other.
"""
