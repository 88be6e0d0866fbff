"""`python -m layerfuse`, which launchers of several processes call."""

from layerfuse_cli.app import app

app()
