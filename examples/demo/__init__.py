"""A byte-level language model with LongNet attention: `python -m examples.demo`."""
