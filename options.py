"""Options are fields of frozen dataclasses: their checks, and the command line made from them.

    lr: Annotated[float, "learning rate", 0] = 1e-4                 # at least 0
    mixer: Annotated[str, "token mixer", MIXERS] = "attention"      # one of these
    overfit: Annotated[int, "first N images"] = 0                   # anything
    augment: Annotated[bool, "flips", ("light",)] = True            # --augment, --no-augment, or
                                                                    # --augment light

An annotation holds the type, the help, and where there is a limit the least number or the names.
"""

import argparse
import difflib
import math
import sys
import textwrap
from dataclasses import fields
from functools import partial
from typing import get_args, get_type_hints

from coco_eval import FlagParser, UserError


def annotations(config):
    """{field: (type, help, its limit or None)} of a config or its class."""
    kind = config if isinstance(config, type) else type(config)
    hints = get_type_hints(kind, include_extras=True)
    return {name: (*get_args(hint), None)[:3] for name, hint in hints.items()}


def nearest(value, names):
    """What to say of a value that is none of the names: the nearest ones, or where none is near,
    all of them if they are few."""
    close = difflib.get_close_matches(value.lower(), filter(None, names), 3, 0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if len(names) > 20:
        return "python train.py --help_all lists the known ones"
    return f"use one of: {', '.join(filter(None, names))}"


def check_options(config):
    """Raises ValueError for the first field whose value is of another type or beyond its limit."""
    for name, (type_, _, limit) in annotations(config).items():
        value = getattr(config, name)
        if type_ is bool and limit and isinstance(value, str):
            if value not in limit:
                raise UserError(f"--{name} {value} is unknown: give --{name}, --no-{name} or "
                                f"--{name} {' or '.join(limit)}")
            continue
        wanted = (int, float) if type_ is float else type_
        if not isinstance(value, wanted) or type_ is not bool and isinstance(value, bool):
            raise UserError(f"--{name} {value!r} must be of type {type_.__name__}")
        largest = {int: 2**63, float: 1e38}.get(type_, math.inf)     # of int64 and float32
        if type_ is not str and not -largest < value < largest:      # refuses NaN, too
            raise UserError(f"--{name} {value} must be a number below {largest}")
        if limit is None or type_ is bool:
            continue
        if type_ is str and value not in limit:
            raise UserError(f"--{name} {value} is unknown, {nearest(value, limit)}")
        if type_ is not str and not value >= limit:
            raise UserError(f"--{name} {value} must be a number of at least {limit}")


def option_help(config, field, presets, short):
    """The help of a field: its text, choices and defaults; short: the first default alone, and of
    many choices none."""
    type_, text, limit = annotations(config)[field.name]
    if type_ is str and limit is not None:
        names = [name for name in limit if name]
        many = "a name that --help_all lists" if short else "see the end"
        text += f": {', '.join(names) if len(names) <= 20 else many}"
    defaults = [] if short and field.default in ("", 0) else [f"default {field.default!r}"]
    if not short:
        defaults += [f"{kind}: {preset[field.name]}" for kind, preset in presets.items()
                     if field.name in preset]
    text += f" ({'; '.join(defaults)})" if defaults else ""
    return text.replace("%", "%%")


def lists_of_names(configs):
    """Text that lists the choices of the fields that have many, for the end of the help."""
    lists = {}
    for config in configs:
        for name, (type_, _, limit) in annotations(config).items():
            if type_ is str and limit is not None and len(limit) > 20:
                lists[name] = ", ".join(limit)
    return "\n\n".join(textwrap.fill(f"--{name}: {names}", 100, subsequent_indent="    ",
                                     break_on_hyphens=False) for name, names in lists.items())


def read_options(argv, description, configs, presets, groups, hidden=()):
    """The parser, and the flags that were given as a dict.

    One flag for each field of the config classes that is not hidden; booleans as --flag and
    --no-flag, those with other values, too, also as --flag VALUE. presets: {name: {field: value}},
    shown beside the defaults. A field of two configs is one flag, whose help has both; if one is a
    boolean, the later. groups: {first field of a group: its title} for --help_all; --help has the
    fields in groups[""] alone.
    """
    argv = sys.argv[1:] if argv is None else argv
    short = "--help_all" not in argv
    end = ("Defaults are those for COCO; built-in shapes, class folders, --recipe and --overfit "
           "have others.")
    parser = FlagParser(
        usage="python train.py [--option value ...]", description=description,
        epilog=end if short else lists_of_names(configs),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27,
                                width=100))
    parser.add_argument("--help_all", action="help", help="all options, models and backbones")
    flags, group = {}, parser
    for config in configs:
        for field in fields(config):
            name, (type_, _, limit) = field.name, annotations(config)[field.name]
            if name in groups and not short:
                group = parser.add_argument_group(groups[name])
            text = option_help(config, field, presets, short)
            if short and name not in groups[""]:
                text = argparse.SUPPRESS
            # a boolean that also takes a value, here or in the config of another model
            with_value = type_ is bool and bool(limit or name in flags)
            if name in flags:
                flags[name].help += "" if short else f"; {config.__name__}: {text}"
            elif name not in hidden:
                kind = dict(type=str if with_value else type_,
                            metavar={int: "N", float: "X"}.get(type_, "VALUE"))
                if type_ is bool and not with_value:
                    kind = dict(action=argparse.BooleanOptionalAction)
                flags[name] = group.add_argument(f"--{name}", help=text,
                                                 default=argparse.SUPPRESS, **kind)
            if with_value:
                flags[name].nargs, flags[name].const = "?", True
                group.add_argument(f"--no-{name}", dest=name, action="store_false",
                                   help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    return parser, vars(parser.parse_args(argv))
