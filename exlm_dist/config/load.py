"""YAML file and dotted overrides -> RunConfig. Every error names the file, the line, the key and the remedy.

A file may name a base, `base: other.yaml` (relative to itself); its own keys override those of the base.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from exlm_dist.config.check import check_config
from exlm_dist.config.pinned import RESUMABLE, is_among
from exlm_dist.config.schema import RunConfig
from exlm_dist.config.setting_types import sections_of
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.files import fingerprint_of
from exlm_dist.utils.outputs import user_path

_NULL = "tag:yaml.org,2002:null"
#: Settings younger than the first checkpoints, and what runs that do not have them were trained with.
FORMER = {"model.jump_prior": "none"}
#: Where a dotted key was set: `file:line` or `command line`.
Origins = dict[str, str]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run configuration at `path`, apply `--section.key value` overrides, validate and cross-check.

    Raises:
        ConfigError: missing file or invalid YAML; unknown keys, wrong types or ranges (all, with file and line);
            settings that contradict each other.
    """
    tree, origins = read_yaml(user_path(path))
    for key, text in parse_overrides(overrides):
        _set(tree, key, _argument(key, text), key)
        parts = key.split(".")
        for depth in range(1, len(parts) + 1):
            origins[".".join(parts[:depth])] = "command line"
    return _checked(tree, origins, path)


def load_stored(path: str | Path) -> RunConfig:
    """The settings that a run or checkpoint was written with, from its `config.yaml`.

    A setting that is younger than the file has the value that the run was trained with (`FORMER`), whatever its
    default is now. Raises as `load_config`.
    """
    tree, origins = read_yaml(Path(path))
    for key, value in FORMER.items():
        if key not in origins:
            _set(tree, key, value, key)
    return _checked(tree, origins, path)


def _checked(tree: dict[str, Any], origins: Origins, path: str | Path) -> RunConfig:
    config = validate(tree, origins, str(path))
    check_config(config)
    return config


def validate(tree: dict[str, Any], origins: Origins, source: str) -> RunConfig:
    """Typed configuration from a nested dictionary; ConfigError with a line for each wrong key."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item, origins, source) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; loading it gives an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1000)


def flatten(config: BaseModel) -> dict[str, Any]:
    """Every setting by its dotted key: `{"model.layers": 12, ...}`."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


def config_difference(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of the settings that differ and decide what is computed (not those in RESUMABLE)."""
    before, after = flatten(old), flatten(new)
    fixed = [key for key in {**after, **before} if not is_among(key, RESUMABLE)]
    return [(key, before.get(key), after.get(key)) for key in fixed if before.get(key) != after.get(key)]


def recipe_of(config: RunConfig) -> str:
    """Fingerprint of the settings that decide what is computed, but for the seed: equal for runs that are repetitions
    of each other, whatever they are called."""
    settings = {key: value for key, value in flatten(config).items() if not is_among(key, RESUMABLE)}
    return fingerprint_of({key: value for key, value in settings.items() if key not in ("name", "seed")})


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`["--model.layers", "4", "--seed=1"]` -> `[("model.layers", "4"), ("seed", "1")]`."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}: settings are given as --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} has no value: give --{key} VALUE or --{key}=VALUE")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def read_yaml(path: Path) -> tuple[dict[str, Any], Origins]:
    """Nested dictionary of the file, merged with its bases, and where each dotted key was set."""
    return _read(path, ())


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    if not path.is_file():
        raise ConfigError(f"no configuration at {path} (working folder {Path.cwd()}){_near_file(path)}")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to this file")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if node is None:
        raise ConfigError(
            f"{path}: the file is empty; `exlm config show configs/pretrain/demo_smiles_exlm.yaml` prints a full one"
        )
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    origins: Origins = {}
    tree = _mapping(node, path, "", origins)
    base = tree.pop("base", None)
    if base is None:
        return tree, origins
    below, origins_below = _read(path.parent / user_path(str(base)), (*seen, path.resolve()))
    return _merge(below, tree), {**origins_below, **origins}


def _mapping(node: yaml.MappingNode, path: Path, prefix: str, origins: Origins) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        where = f"{path}:{key_node.start_mark.line + 1}"
        if key in values:
            raise ConfigError(f"{where}: {prefix}{key}: given twice")
        origins[prefix + key] = where
        if isinstance(value_node, yaml.MappingNode):
            values[key] = _mapping(value_node, path, f"{prefix}{key}.", origins)
        else:
            values[key] = _value(prefix + key, value_node, where)
            _locate(value_node, path, prefix + key, origins)
    return values


def _locate(node: yaml.Node, path: Path, key: str, origins: Origins) -> None:
    """Note where what is in a list stands: `phases.1.steps`."""
    if isinstance(node, yaml.SequenceNode):
        inside = [(str(number), item, item) for number, item in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        inside = [(str(name.value), name, item) for name, item in node.value]
    else:
        return
    for name, start, item in inside:
        origins[f"{key}.{name}"] = f"{path}:{start.start_mark.line + 1}"
        _locate(item, path, f"{key}.{name}", origins)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(tree: dict[str, Any], dotted: str, value: Any, whole: str) -> None:
    head, _, rest = dotted.partition(".")
    if not rest:
        tree[head] = value
        return
    child = tree.setdefault(head, {})
    if not isinstance(child, dict):
        raise ConfigError(f"--{whole}: {head} is a single setting, not a section")
    _set(child, rest, value, whole)


def _value(key: str, node: yaml.Node, where: str) -> Any:
    """Value of a setting in a file. Where text is expected, what looks like a number or a date is text as well."""
    if node.tag == _NULL:
        return None
    if is_among(key, _text_settings()) and isinstance(node, yaml.ScalarNode):
        return node.value
    try:
        return yaml.safe_load(yaml.serialize(node))
    except (yaml.YAMLError, ValueError) as error:  # an unknown tag; a date that does not exist
        raise ConfigError(f"{where}: {key}: {error}") from None


def _argument(key: str, text: str) -> Any:
    """The same for a setting on the command line."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    if is_among(key, _text_settings()):
        return value if isinstance(value, str) else text
    return text if isinstance(value, (dict, list)) and text.lstrip()[:1] not in ("{", "[") else value


@functools.cache
def _text_settings() -> frozenset[str]:
    """Dotted keys of the settings whose values are text."""
    return frozenset(key for key, annotation in _settings(RunConfig, "") if annotation is str)


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_keys() -> list[str]:
    """Dotted keys of all settings and sections; of those of sources, NAME for the name."""
    return [key for key, _ in _settings(RunConfig, "")]


def _settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of all settings and sections."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.annotation
        if (inner := sections_of(field.annotation)) is not None:
            yield from _settings(inner[1], f"{prefix}{name}.{inner[0]}")


def suggestion(key: str) -> str:
    """` Did you mean ...?` for a mistyped dotted key; empty if no key is similar."""
    names = known_keys()
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    if not near:
        last = key.rpartition(".")[2]
        tails = {name.rpartition(".")[2]: name for name in names}
        near = [tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.7)]
    return f" Did you mean {near[0]}?" if near else ""


def _explain(item: Any, origins: Origins, source: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    near = [key, *(".".join(key.split(".")[:depth]) for depth in range(key.count("."), 0, -1))]
    where = next((origins[one] for one in near if one in origins), source)
    if item["type"] == "extra_forbidden":
        section = key.rpartition(".")[0]
        listing = f"`exlm config schema {section}`" if section in known_keys() else "`exlm config schema`"
        return f"{where}: {key}: unknown setting.{suggestion(key)} ({listing} lists all)"
    if item["type"] == "missing":
        return f"{where}: {key}: must be given."
    return f"{where}: {key} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.glob("*.yaml")], n=1, cutoff=0.5)
    return f". Did you mean {folder / near[0]}?" if near else ""
