"""What commands share: options, checks of what they write, and how they print."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE",
    help="Override one value of the job file, as in --set cluster.ranks=4.",
)  # fmt: skip


class Finite(click.FloatRange):
    """A number within a range; neither NaN, which passes every comparison, nor infinite."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return `value` as a number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def output_file(help_text: str, *, required: bool = True) -> Callable[[F], F]:
    """Return the option `-o`."""
    return click.option("-o", "--output", type=FILE, required=required, help=help_text)


def is_given(name: str) -> bool:
    """Return whether an option of the command that runs was given by the user."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not click.core.ParameterSource.DEFAULT


def spare(inputs: Sequence[Path], output: Path | None) -> None:
    """Raise InvalidInputError where writing `output` would overwrite one of `inputs`."""
    from profiles.errors import InvalidInputError

    files = [path / name for path in inputs for name in ("", "plan.json", "record.json")]
    if output is not None and output.resolve() in [path.resolve() for path in files]:
        raise InvalidInputError([f"{output}: is also read; name another file to write"])


def print_as(value: object, text: str, as_json: bool) -> None:
    """Print `value` as canonical JSON, or `text`."""
    from profiles.files import plain

    if as_json:
        click.echo(json.dumps(plain(value), sort_keys=True, indent=1, allow_nan=False))
    else:
        click.echo(text)
