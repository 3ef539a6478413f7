# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The `attnres` command. A module outside of the packages: importing those takes seconds, and `--help` must not."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the first argument, if it is on the Hub.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"modeling-attnres {version('modeling-attnres')}")
        raise typer.Exit


@app.callback()
def attnres(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=show_version)
    ] = False,
):
    """
    Attention Residuals: from a base checkpoint to an AttnRes checkpoint and back.

    Example: attnres retrofit Qwen/Qwen3-0.6B qwen3-attnres
    """


@app.command()
def retrofit(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    attn_res_type: Annotated[
        Literal["block", "full"], typer.Option("--type", help="Attend over block sums or each sublayer's output.")
    ] = "block",
    block_size: Annotated[
        int | None, typer.Option(help="Decoder layers in a block.", show_default="nearest to 8 blocks")
    ] = None,
    scale: Annotated[
        Literal["sum", "mean"], typer.Option(help="'sum' equals the base at first; 'mean', the paper's, does not.")
    ] = "sum",
    norm_eps: Annotated[float, typer.Option(help="Epsilon of the keys' RMSNorm.")] = 1e-6,
    temperature: Annotated[
        float | None, typer.Option(help="Divisor of the logits.", show_default="hidden_size / 128")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard-link the base's weights, copy nothing.")] = False,
    revision: Revision = None,
):
    """
    Make an AttnRes checkpoint of a base checkpoint.

    Example: attnres retrofit Qwen/Qwen3-0.6B qwen3-attnres --block-size 4
    """
    options = {
        "attn_res_type": attn_res_type,
        "attn_res_block_size": block_size,
        "attn_res_scale": scale,
        "attn_res_norm_eps": norm_eps,
        "attn_res_temperature": temperature,
    }
    with errors_in_one_line():
        from modeling_attnres.conversion import retrofit
        from modeling_attnres.conversion.retrofit import summary

        retrofit(base, output, link=link, revision=revision, **options)
        typer.echo(f"Wrote {output}: {summary(output)}.")
    if scale == "sum":
        compare = ["attnres", "verify", base, str(output), *(["--revision", revision] if revision else [])]
        typer.echo(f"Next: {shlex.join(compare)}")
    else:
        typer.echo("Next: train it. With the scale 'mean' it differs from its base until then.")


@app.command()
def verify(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base checkpoint.")],
    attnres: Annotated[str, typer.Argument(help="Folder or Hub id of the AttnRes checkpoint.")],
    revision: Revision = None,
):
    """
    Compare an AttnRes checkpoint with its base.

    Compares tensors, tokenizer and logits. Exits with 1 if they differ.

    Example: attnres verify Qwen/Qwen3-0.6B qwen3-attnres
    """
    with errors_in_one_line():
        from modeling_attnres.conversion import verify

        result = verify(base, attnres, revision=revision)
    typer.echo(result)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def revert(
    attnres: Annotated[str, typer.Argument(help="Folder or Hub id of the AttnRes checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    force: Annotated[bool, typer.Option("--force", help="Drop trained queries and key norms too.")] = False,
    revision: Revision = None,
):
    """
    Give the base of an AttnRes checkpoint back, byte for byte.

    Example: attnres revert qwen3-attnres qwen3
    """
    with errors_in_one_line():
        from modeling_attnres.conversion import revert

        revert(attnres, output, force=force, revision=revision)
    typer.echo(f"Wrote {output}.")


@app.command()
def inspect(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids of AttnRes checkpoints, several only of one run.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text file to run.", show_default="a paragraph of English", dir_okay=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to run, instead of a file.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base, to compare dilution with.")] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Leave out one source at a time and measure the loss.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Length at which the text is cut.")] = 512,
    output: Annotated[Path | None, typer.Option(help="Folder for pictures.", file_okay=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write, which shows the weights token by token.")] = None,
    revision: Revision = None,
):
    """
    Show the weights of depth attention.

    Prints tables; draws pictures with --output and writes a page with --html.

    Example: attnres inspect qwen3-attnres --ablate --html page.html
    """
    with errors_in_one_line():
        from modeling_attnres.conversion.inspect_checkpoint import TEXT, inspect_checkpoint, labels, tables
        from modeling_attnres.conversion.page import write_page
        from modeling_attnres.conversion.pictures import require_matplotlib, write_pictures

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
            for file in write_pictures(inspections, output):
                typer.echo(f"Wrote {file}")
        if html is not None:
            typer.echo(f"Wrote {write_page(inspections, html)}")


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the AttnRes checkpoint.")],
    name: Annotated[str, typer.Argument(help="Hub id to upload to.")],
    private: Private = False,
):
    """
    Upload an AttnRes checkpoint, or continue an interrupted upload.

    Example: attnres push qwen3-attnres me/qwen3-attnres --private
    """
    with errors_in_one_line():
        from modeling_attnres.conversion import push

        typer.echo(f"Uploaded to {push(checkpoint, name, private=private)}")


@app.command()
def card(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a trained AttnRes checkpoint.")],
    retrofit: Annotated[str, typer.Argument(help="Folder or Hub id of the retrofit that it was trained from.")],
):
    """
    Write the model card of a trained checkpoint.

    Base and license are those in the retrofit's card. A card that is there is replaced.

    Example: attnres card my-checkpoint qwen3-attnres
    """
    with errors_in_one_line():
        from modeling_attnres.conversion.push import write_card

        typer.echo(f"Wrote {write_card(checkpoint, retrofit)}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """An error of the input ends the command with one line; any other error is a bug and shows its traceback."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
