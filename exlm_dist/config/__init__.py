"""Every setting of a run: typed schema, YAML with overrides, cross-checks, generated reference. No torch."""

from exlm_dist.config.check import (
    check_config,
    check_division,
    check_init,
    check_length,
    check_world,
    largest_num_masks,
    longest_expansion,
)
from exlm_dist.config.layouts import check_vocabulary, data_degree
from exlm_dist.config.load import (
    config_difference,
    dump_config,
    flatten,
    load_config,
    load_stored,
    parse_overrides,
    recipe_of,
)
from exlm_dist.config.schema import RunConfig

__all__ = [
    "RunConfig",
    "check_config",
    "check_division",
    "check_init",
    "check_length",
    "check_vocabulary",
    "check_world",
    "config_difference",
    "data_degree",
    "dump_config",
    "flatten",
    "largest_num_masks",
    "load_config",
    "load_stored",
    "longest_expansion",
    "parse_overrides",
    "recipe_of",
]
