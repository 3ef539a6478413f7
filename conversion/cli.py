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
Private = Annotated[bool, typer.Option("--private", help="Make the repository a private one, if it is new.")]


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
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Verify it and upload it under this Hub id.")
    ] = None,
    private: Private = False,
    revision: Revision = None,
):
    """Make an AttnRes checkpoint of a Llama-style one."""
    with errors_in_one_line():
        from .retrofit import retrofit

        try:
            retrofit(source, output, attn_res_type, block_size, scale, norm_eps, temperature, link, revision)
        except FileExistsError as error:
            if push_to_hub is None:
                raise
            go_on = shlex.join(["attnres", "push", str(output), push_to_hub])
            raise FileExistsError(f"{error} To go on with an upload that was interrupted: {go_on}") from error
        if push_to_hub is not None:
            from .push import push
            from .verify import verify

            typer.echo(f"Wrote {output}.")
            verification = verify(source, output, revision)
            if scale == "sum" and not verification.passed:
                raise ValueError(f"{output} does not compute what {source} computes, and was not uploaded.")
            typer.echo(f"Uploaded to {push(output, push_to_hub, private, verification)}")
            return
    compare = ["attnres", "verify", source, str(output), *(["--revision", revision] if revision else [])]
    typer.echo(f"Wrote {output}. Compare with the base: {shlex.join(compare)}")


@app.command()
def verify(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base checkpoint.")],
    attnres: Annotated[str, typer.Argument(help="Folder or Hub id of the AttnRes checkpoint.")],
    revision: Revision = None,
):
    """
    Compare an AttnRes checkpoint with its base: structure, then logits in float32. Exits with 1 if they differ; if not,
    a folder's model card says so from then on.
    """
    with errors_in_one_line():
        from .push import keep_verification
        from .verify import TOLERANCE, verify

        result = verify(base, attnres, revision)
        typer.echo(
            f"Largest difference {result.max_difference:.2e}, largest logit {result.max_logit:.2e}: "
            f"{result.relative_difference:.1e} of it, {TOLERANCE:.0e} allowed."
        )
        if not result.passed:
            typer.echo("The two compute different things.", err=True)
            raise typer.Exit(1)
        if (Path(attnres) / "README.md").is_file():
            try:
                keep_verification(Path(attnres), result)
            except (OSError, ValueError) as error:
                typer.echo(f"Its card does not say so: {error}", err=True)


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


@app.command()
def inspect(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids of AttnRes checkpoints; several are those of one run.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text file to run.", show_default="a paragraph of English", dir_okay=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to run, in place of a file.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base, to compare dilution with.")] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Take out one source at a time and measure the loss: a pass for each.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Where to cut the text off.")] = 512,
    output: Annotated[Path | None, typer.Option(help="Folder to draw pictures into.", file_okay=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write, on which one picks a token.")] = None,
    revision: Revision = None,
):
    """Show where the sublayers of a checkpoint look: tables, pictures (--output) and a page (--html)."""
    with errors_in_one_line():
        from .inspect_checkpoint import TEXT, inspect_checkpoint, labels, tables
        from .pictures import require_matplotlib

        if output is not None:
            require_matplotlib()
        if text is not None and prompt is not None:
            raise ValueError("Both --text and --prompt are given: leave one out.")
        content = TEXT if prompt is None else prompt
        if text is not None:
            content = text.read_text(encoding="utf-8")
        *earlier, last = checkpoints
        options = {"max_tokens": max_tokens, "revision": revision}
        inspections = [inspect_checkpoint(checkpoint, content, **options) for checkpoint in earlier]
        inspections.append(inspect_checkpoint(last, content, base, ablate, **options))
        for inspection, label in zip(inspections, labels(checkpoints)):
            inspection.name = label
        typer.echo(tables(inspections))
        if output is not None:
            from .pictures import write_pictures

            for file in write_pictures(inspections, output):
                typer.echo(f"Wrote {file}")
        if html is not None:
            from .page import write_page

            typer.echo(f"Wrote {write_page(inspections, html)}")


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the AttnRes checkpoint.")],
    name: Annotated[str, typer.Argument(help="Hub id to upload to.")],
    private: Private = False,
):
    """Upload an AttnRes checkpoint, or go on with an upload that was interrupted."""
    with errors_in_one_line():
        from .push import push

        typer.echo(f"Uploaded to {push(checkpoint, name, private)}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What can be wrong with the input ends the command with a message; anything else is a bug and shows its trace."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
