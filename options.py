"""Options are fields of frozen dataclasses: their checks, and the command line made from them.

    lr: Annotated[float, "learning rate", 0] = 1e-4                 # at least 0
    mixer: Annotated[str, "token mixer", MIXERS] = "attention"      # one of these
    overfit: Annotated[int, "first N images"] = 0                   # anything

An annotation holds the type, the help, and where there is a limit the least number or the names.
"""

import argparse
import math
from dataclasses import fields
from typing import get_args, get_type_hints

from coco_eval import UserError


def annotations(config):
    """{field: (type, help, its limit or None)} of a config or its class."""
    kind = config if isinstance(config, type) else type(config)
    hints = get_type_hints(kind, include_extras=True)
    return {name: (*get_args(hint), None)[:3] for name, hint in hints.items()}


def check_options(config):
    """Raises ValueError for the first field whose value is of another type or beyond its limit."""
    for name, (type_, _, limit) in annotations(config).items():
        value = getattr(config, name)
        wanted = (int, float) if type_ is float else type_
        if not isinstance(value, wanted) or type_ is not bool and isinstance(value, bool):
            raise UserError(f"--{name} {value!r} must be of type {type_.__name__}")
        largest = {int: 2**63, float: 1e38}.get(type_, math.inf)     # of int64 and float32
        if type_ is not str and not -largest < value < largest:      # refuses NaN, too
            raise UserError(f"--{name} {value} must be a number below {largest}")
        if limit is None:
            continue
        if type_ is str and value not in limit:
            known = ", ".join(known for known in limit if known)
            raise UserError(f"--{name} {value} is unknown, use one of: {known}")
        if type_ is not str and not value >= limit:
            raise UserError(f"--{name} {value} must be a number of at least {limit}")
        if type_ is int and value >= 2**63:
            raise UserError(f"--{name} {value} must be below 2**63")


def read_options(argv, description, configs, presets, hidden=()):
    """The parser, and the flags that were given as a dict.

    One flag for each field of the config classes that is not hidden; booleans as --flag and
    --no-flag. presets: {name: {field: value}}, shown beside the defaults. A field of two configs is
    one flag, whose help has both; if one is a boolean, the later. Abbreviations are off, so that a
    typo is an error.
    """
    parser = argparse.ArgumentParser(
        usage="python train.py [--option value ...]", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = {}
    for config in configs:
        group, hints = parser.add_argument_group(config.__name__), annotations(config)
        for field in fields(config):
            type_, text, limit = hints[field.name]
            if type_ is str and limit is not None:
                text += f": {', '.join(name for name in limit if name)}"
            defaults = [f"default {field.default!r}"]
            defaults += [f"{kind}: {preset[field.name]}" for kind, preset in presets.items()
                         if field.name in preset]
            text = f"{text} ({'; '.join(defaults)})".replace("%", "%%")
            if field.name in flags:
                flags[field.name].help += f"; {config.__name__}: {text}"
                if type_ is bool:                  # a value for one model, none for the other
                    flags[field.name].nargs, flags[field.name].const = "?", True
                    group.add_argument(f"--no-{field.name}", dest=field.name, help="see above",
                                       action="store_false", default=argparse.SUPPRESS)
            elif field.name not in hidden:
                kind = dict(action=argparse.BooleanOptionalAction) if type_ is bool else dict(
                    type=type_)
                flags[field.name] = group.add_argument(
                    f"--{field.name}", help=text, default=argparse.SUPPRESS, **kind)
    return parser, vars(parser.parse_args(argv))
