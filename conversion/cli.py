# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The `attnres` command."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer


app = typer.Typer(
    help="From a base checkpoint to an AttnRes checkpoint and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the first argument, if it is on the Hub.")]


@app.command()
def retrofit(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of the base checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    attn_res_type: Annotated[
        Literal["block", "full"], typer.Option("--type", help="Attend over block sums or over each sublayer's output.")
    ] = "block",
    block_size: Annotated[
        int | None, typer.Option(help="Decoder layers in a block.", show_default="what comes nearest to 8 blocks")
    ] = None,
    scale: Annotated[
        Literal["sum", "mean"], typer.Option(help="Exact at the start, or the paper's form, which is not.")
    ] = "sum",
    norm_eps: Annotated[float, typer.Option(help="Epsilon of the keys' RMSNorm.")] = 1e-6,
    temperature: Annotated[
        float | None, typer.Option(help="What the logits are divided by.", show_default="hidden_size / 128")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard-link the base's weights, copy nothing.")] = False,
    revision: Revision = None,
):
    """Make an AttnRes checkpoint of a Llama-style one."""
    with errors_in_one_line():
        from .retrofit import retrofit

        retrofit(source, output, attn_res_type, block_size, scale, norm_eps, temperature, link, revision)
    compare = ["attnres", "verify", source, str(output), *(["--revision", revision] if revision else [])]
    typer.echo(f"Wrote {output}. Compare with the base: {shlex.join(compare)}")


@app.command()
def verify(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base checkpoint.")],
    attnres: Annotated[str, typer.Argument(help="Folder or Hub id of the AttnRes checkpoint.")],
    revision: Revision = None,
):
    """Compare an AttnRes checkpoint with its base: structure, then logits in float32. Exits with 1 if they differ."""
    with errors_in_one_line():
        from .verify import TOLERANCE, verify

        result = verify(base, attnres, revision)
    typer.echo(
        f"Largest difference {result.max_difference:.2e}, largest logit {result.max_logit:.2e}: "
        f"{result.relative_difference:.1e} of it, {TOLERANCE:.0e} allowed."
    )
    if not result.passed:
        typer.echo("The two compute different things.", err=True)
        raise typer.Exit(1)


@app.command()
def revert(
    attnres: Annotated[str, typer.Argument(help="Folder or Hub id of the AttnRes checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    force: Annotated[bool, typer.Option("--force", help="Drop trained queries and key norms too.")] = False,
    revision: Revision = None,
):
    """Give the base of an AttnRes checkpoint back, byte for byte."""
    with errors_in_one_line():
        from .revert import revert

        revert(attnres, output, force, revision)
    typer.echo(f"Wrote {output}.")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What can be wrong with the input ends the command with a message; anything else is a bug and shows its trace."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
