"""Ways to compute a program: proposals with costs, refusals with reasons.

registry    LOWERINGS, the only place that lists them
protocol    what a lowering has: propose, forward, merge_into, backward
native      one C++ kernel for all branches, on a CPU (native/)
dense, strided, tiled    batches of dense tiles: batched, with the engine in tiling/
per_branch  tiled for the branches that strided refuses
flex/, lanes/    FlexAttention, and one Triton kernel: fused
execute     a plan's lowering runs its proposals
hidden      NaN and infinity in keys that a query does not see
devices     constants of kinds of devices
"""
