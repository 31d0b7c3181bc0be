"""The two tokenizers of the embedded models: words of the recall task, and bytes."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..recall_task import N_KEYS, N_VALUES

RECALL_SPECIALS = ("<pad>", "<eos>", "<unk>", "_")
PAD, EOS, UNK, FILLER = range(len(RECALL_SPECIALS))
FIRST_KEY = len(RECALL_SPECIALS)
FIRST_VALUE = FIRST_KEY + N_KEYS
RECALL_VOCABULARY = FIRST_VALUE + N_VALUES

BYTE_EOS = 256
BYTE_PAD = 257
BYTE_SPECIALS = ("<|endoftext|>", "<|pad|>", "<|reserved_0|>", "<|reserved_1|>")
BYTE_VOCABULARY = 256 + len(BYTE_SPECIALS)


def recall_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `k0`..`k31`, `v0`..`v31` and the filler `_`, separated by blanks."""
    words = [*RECALL_SPECIALS, *(f"k{i}" for i in range(N_KEYS)), *(f"v{i}" for i in range(N_VALUES))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, its id the byte's value; four special tokens follow."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in BYTE_SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=BYTE_SPECIALS[0],
        pad_token=BYTE_SPECIALS[1],
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
    """The printable character by which `ByteLevel` writes each of the 256 bytes (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    symbols.update({byte: chr(256 + n) for n, byte in enumerate(others)})
    return [symbols[byte] for byte in range(256)]
