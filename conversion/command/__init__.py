# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The `attnres` command. It is outside of the other packages, whose import takes seconds, so that `--help` is quick."""

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    def invoke(self, ctx):
        """An error of the input ends the command with one line; any other error is a bug and shows its traceback."""
        try:
            return super().invoke(ctx)
        except (OSError, ValueError, ImportError) as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Base = Annotated[str, typer.Argument(help="Folder or Hub id of the base checkpoint.")]
AttnRes = Annotated[str, typer.Argument(help="Folder or Hub id of the AttnRes checkpoint.")]
Output = Annotated[Path, typer.Argument(help="Folder to write, new or empty.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the first argument, if it is on the Hub.")]


def conversion():
    import modeling_attnres.conversion

    return modeling_attnres.conversion


@app.callback(invoke_without_command=True)
def attnres(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False):
    """
    Attention Residuals: from a base checkpoint to an AttnRes checkpoint and back.

    Example: attnres retrofit Qwen/Qwen3-0.6B qwen3-attnres
    """
    if version:
        typer.echo(f"modeling-attnres {metadata.version('modeling-attnres')}")
        raise typer.Exit


@app.command()
def retrofit(
    base: Base,
    output: Output,
    type: Annotated[Literal["block", "full"], typer.Option(help="Sources: sums of blocks, or every output.")] = "block",
    block_size: Annotated[
        int | None, typer.Option(help="Decoder layers in a block.", show_default="for 8 blocks")
    ] = None,
    scale: Annotated[
        Literal["sum", "mean"], typer.Option(help="'sum' equals the base at first; 'mean', the paper's, does not.")
    ] = "sum",
    norm_eps: Annotated[float, typer.Option(help="Epsilon of the keys' RMSNorm.")] = 1e-6,
    temperature: Annotated[float | None, typer.Option(help="Divisor of the logits.", show_default="width/128")] = None,
    value_read: Annotated[bool, typer.Option("--value-read", help="A separate read for attention's values.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Hard-link the base's weights, without a copy.")] = False,
    revision: Revision = None,
):
    """
    Make an AttnRes checkpoint from a base checkpoint.

    Example: attnres retrofit Qwen/Qwen3-0.6B qwen3-attnres --block-size 4
    """
    from modeling_attnres.conversion.retrofit import retrofit, summary

    options = {"type": type, "block_size": block_size, "scale": scale, "norm_eps": norm_eps}
    options |= {"temperature": temperature, "value_read": value_read}
    attn_res = {f"attn_res_{name}": value for name, value in options.items()}
    retrofit(base, output, link=link, revision=revision, **attn_res)
    typer.echo(f"Wrote {output}: {summary(output)}.")
    verify = ["attnres", "verify", base, str(output), *(["--revision", revision] if revision else [])]
    typer.echo(f"Next: {shlex.join(verify) if scale == 'sum' else 'train it'}")


@app.command()
def verify(base: Base, attnres: AttnRes, revision: Revision = None):
    """
    Compare an AttnRes checkpoint with its base.

    Compares tensors, tokenizer and logits. Exits with 1 if they differ.

    Example: attnres verify Qwen/Qwen3-0.6B qwen3-attnres
    """
    result = conversion().verify(base, attnres, revision=revision)
    typer.echo(result)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def revert(
    attnres: AttnRes,
    output: Output,
    force: Annotated[bool, typer.Option("--force", help="Drop trained queries and key norms too.")] = False,
    revision: Revision = None,
):
    """
    Restore the base of an AttnRes checkpoint, byte for byte.

    Example: attnres revert qwen3-attnres qwen3
    """
    typer.echo(f"Wrote {conversion().revert(attnres, output, force=force, revision=revision)}.")


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the PEFT adapter.")],
    output: Output,
    base: Annotated[str | None, typer.Option(help="Its AttnRes checkpoint.", show_default="as recorded")] = None,
):
    """
    Merge a PEFT adapter into its AttnRes checkpoint.

    Example: attnres merge my-adapter merged
    """
    typer.echo(f"Wrote {conversion().merge(adapter, output, base=base)}.")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a trained AttnRes checkpoint or of a PEFT adapter.")],
    base: Annotated[str | None, typer.Option(help="The model that was trained.", show_default="as recorded")] = None,
):
    """
    Complete the model card of a trained checkpoint or adapter.

    Adds base, license and tags, and keeps the text.

    Example: attnres card my-checkpoint --base qwen3-attnres
    """
    typer.echo(f"Wrote {conversion().card(folder, base)}.")


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of an AttnRes checkpoint or a PEFT adapter.")],
    text: Annotated[Path | None, typer.Option(help="Text file to run.", show_default="English", dir_okay=False)] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Measure the loss without each source.")] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Maximum number of tokens.")] = 512,
    html: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    revision: Revision = None,
):
    """
    Show the weights of depth attention.

    Example: attnres inspect qwen3-attnres --ablate --html page.html
    """
    content = conversion().inspection.TEXT if text is None else text.read_text(encoding="utf-8")
    inspection = conversion().inspect_checkpoint(checkpoint, content, ablate, max_tokens, revision)
    typer.echo(json.dumps(inspection.to_dict()) if as_json else inspection)
    if html is not None:
        html.write_text(inspection.page(), encoding="utf-8")
        typer.echo(f"Wrote {html}.", err=True)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the AttnRes checkpoint.")],
    name: Annotated[str, typer.Argument(help="Hub id to upload to.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
):
    """
    Upload an AttnRes checkpoint, or continue an interrupted upload.

    Example: attnres push qwen3-attnres me/qwen3-attnres --private
    """
    typer.echo(f"Uploaded to {conversion().push(checkpoint, name, private=private)}")
