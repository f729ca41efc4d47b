"""The harness of the benchmarks.

problems    attention to compute: a program, lengths, dtype, data; and the ways to compute it
cases       a problem, its baseline, and the least share of the baseline's rate
turns       calls in turn, so that a drift of the machine affects all; slow-downs by other load
runs        the origin of figures, the choice of cases, progress
reports     options, the table, the JSON file
apart       a case in a process of its own, with limits of memory and time
"""
