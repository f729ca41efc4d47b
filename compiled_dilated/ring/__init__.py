"""A program over many ranks: layouts, schedules and transports.

layouts     tokens of each rank, as runs of places
schedules   the steps of every rank; steps: their blocks and messages; extents: their ranges
moved       masks over parts of a sequence
loads       bytes, work and memory of a rank
plans       the layouts weighed by their loads, and the choice
rings       Ring: ranks, a layout and a transport

workers     what one rank computes: forward and backward
blocks      the blocks of its steps, as problems of the planner
simulated   transport: all ranks in this process
distributed transport: processes of torch.distributed; exchanges: their messages
ledgers     counters of an executed ring

streamed    out of core, from files to a file; inputs: its checks
pipeline    read ahead, compute, write behind
sources     sources and sinks of rows; npy and files: their files
journals    the finished ranks of a run
checking    single rows of a result in float64
"""
