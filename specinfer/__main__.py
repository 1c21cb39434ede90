"""`python -m specinfer`."""

from specinfer.cli import app

app(prog_name="specinfer")
