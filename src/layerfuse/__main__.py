"""`python -m layerfuse`, which launchers of several processes call."""

from layerfuse.cli import app

app()
