"""Choosing the passes of a step: candidates, tracing, estimates, the backend, reports."""
