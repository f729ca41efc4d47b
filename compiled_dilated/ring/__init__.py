"""A program over many ranks: layouts, schedules and transports."""
