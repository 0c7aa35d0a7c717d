"""Measures fused_rnn against torch.nn on this machine: ``fused-rnn-bench`` and pytest suites."""
