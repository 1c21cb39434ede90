"""`python -m specinfer.cli`."""

from specinfer.cli import app

app(prog_name="specinfer")
