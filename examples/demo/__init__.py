"""A byte-level language model with LongNet attention, trained and compared in minutes: `python -m examples.demo`."""
