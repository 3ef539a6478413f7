# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""`python -m modeling_attnres.conversion` is the `attnres` command."""

from attnres import app


app(prog_name="python -m modeling_attnres.conversion")
