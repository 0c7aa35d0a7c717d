"""Triton kernels. Installed as ``fused_rnn.kernels``."""
