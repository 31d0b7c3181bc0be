"""Trains the embedded models again: `python -m qdeltanet.eval.train tiny-recall | tiny-hybrid`."""
