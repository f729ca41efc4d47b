"""`python -m compiled_dilated`: the command line."""

from .cli import app

app(prog_name="python -m compiled_dilated")
