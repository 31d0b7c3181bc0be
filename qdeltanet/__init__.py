"""qdeltanet: true integer quantization of Gated DeltaNet, the triangular inverse included.

Importing it loads neither transformers nor datasets nor brevitas, and yet makes exported checkpoints loadable:
`import qdeltanet; AutoModelForCausalLM.from_pretrained(CKPT)`.
"""

from importlib.metadata import PackageNotFoundError, version

from ._hook import install as _install

try:
    __version__ = version("qdeltanet")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_install()
