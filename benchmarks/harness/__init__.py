"""The harness of benchmarks/attention.py and benchmarks/masks.py.

problems    attention to compute: a program, lengths, dtype, data; and the ways to compute it
cases       a problem, what it is a share of, and the least share
turns       calls in turn, so that a drift of the machine hits all alike; slow-downs beside a busy process
reports     options, progress, the table, the JSON file
"""
