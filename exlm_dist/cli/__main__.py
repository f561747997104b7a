"""`python -m exlm_dist.cli`: what the launchers start on every rank."""

from exlm_dist.cli import entry

entry()
