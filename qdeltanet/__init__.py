"""qdeltanet: true integer quantization of Gated DeltaNet, the triangular inverse included."""
