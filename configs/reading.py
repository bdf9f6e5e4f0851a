"""How configs are read: YAML with the numbers of its version 1.2, in files that inherit."""

import os
import re
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent


def need(condition, message):
    if not condition:
        raise ValueError(message)


def short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][\d_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(?i:inf)$|\.(?i:nan)$"),
}
DATE = "tag:yaml.org,2002:timestamp"  # text here


class Loader(yaml.SafeLoader):
    """YAML with the numbers of its version 1.2, such as 1e-4; no doubled keys, aliases, depths."""
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag not in NUMBERS and tag != DATE]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    depth = 0

    def compose_node(self, parent, index):
        line = self.peek_event().start_mark.line + 1
        need(not self.check_event(yaml.AliasEvent), f"line {line} refers to an anchor by *; write "
             "the value out")
        need(self.depth < 10, f"line {line} is nested 10 deep; a config has sections with keys")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                need(key.value not in lines, f"{key.value} stands twice, in lines "
                     f"{lines.get(key.value)} and {line}; keep one")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Puts quotes around text that Loader would take for a number."""


for tag, form in NUMBERS.items():
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(tag, form, list("-+.0123456789"))


def parse_yaml(text, source):
    need(text.count("[") + text.count("{") < 200, f"{source} has hundreds of brackets; a config "
         "has sections with keys, and few lists")
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def place(key, path):
    """A path with ~ and $VAR replaced. What is in configs/ of this repository is found from any
    folder."""
    need(path.strip(), f"{key} is empty; give a path")
    full = os.path.expandvars(os.path.expanduser(path))
    try:
        found, shipped = Path(full).exists(), REPOSITORY / full
    except OSError as error:
        raise ValueError(f"{key} is {short(path)}: {error.strerror}") from None
    unset = re.search(r"\$\{?(\w+)", full)
    need(found or not unset, f"{key} is {path}, but ${unset and unset[1]} is not set")
    if not found and Path(full).parts[:1] == ("configs",) and shipped.exists():
        return str(shipped)
    return full


def read_yaml(path, above=()):
    """{"section.key": value} of a config file, over those of the file that it names as `base`."""
    path = Path(place("the config", str(path)))
    if not path.is_file():
        meant = path.with_name(f"{path.name}.yaml")
        hint = f"did you mean {meant}?" if meant.is_file() else "the configs are in configs/"
        raise FileNotFoundError(f"there is no config file {path}; {hint}")
    need(path.resolve() not in above, f"{path} is its own base, by way of "
         f"{', '.join(map(str, above))}; inherit from another config")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 in line {line}; save it as UTF-8") from None
    tree = parse_yaml(text, path) or {}
    need(isinstance(tree, dict),
         f"{path} must hold sections such as 'data:', it holds {short(tree)}")

    values, base = {}, tree.pop("base", None)
    if base is not None:
        need(isinstance(base, str), f"{path}: base must be a config file, not {short(base)}")
        beside = path.parent / place("base", base)
        values = read_yaml(beside, (*above, path.resolve()))
    for section, keys in tree.items():
        need(isinstance(keys, dict),
             f"{path}: config section {short(section)} must hold keys, it holds {short(keys)}")
        values |= {f"{section}.{key}": value for key, value in keys.items()}
    return values
