"""Embedded models, lm-eval tasks and everything that compares a quantized model with the float one."""
