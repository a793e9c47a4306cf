"""Runs that are killed, stopped, starved of disk and started twice. ``pytest -m crash`` prints their figures."""
