"""Random words of the Triton kernels: hashes of counters, so nothing is stored and every pass computes the same."""

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """A 32-bit hash (two multiplications, Wellons' lowbias32): each input bit flips each output bit half the time."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def extended(key, number):
    """The hash `key` extended by one more number."""
    return mixed(key + number.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32))


@triton.jit
def key_of(seed, site):
    """Hash of the seed (one int64 in memory, so that a captured CUDA graph reads it anew) and the number of a site."""
    words = tl.load(seed)
    key = extended(mixed(words.to(tl.uint32)), words >> 32)
    return extended(key, site)
