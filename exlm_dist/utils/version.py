"""The version of the package, for every room; `exlm_dist.__version__` is the same."""

VERSION = "0.1.0"
