"""qdeltanet: true integer quantization of Gated DeltaNet, the triangular inverse included.

Importing it loads neither transformers nor datasets nor brevitas, and yet makes exported checkpoints loadable:
`import qdeltanet; AutoModelForCausalLM.from_pretrained(CKPT)`.
"""

from ._hook import install as _install
from ._version import __version__ as __version__

_install()
