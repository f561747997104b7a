"""The former place of `load_tokenizer`, for scripts that people have. It is `exlm_dist.tokenizers.load_tokenizer`."""

import warnings

from exlm_dist.tokenizers import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]

warnings.warn(
    "exlm_dist.data.tokenizer is now exlm_dist.tokenizers; import from there.", DeprecationWarning, stacklevel=2
)
