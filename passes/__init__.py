"""Memory planning for fx graphs: predict a step's peak, and rewrite the graph to lower it.

    step = passes.compile(model, memory_budget="6GiB")      torch.compile with the cheapest passes under which a step fits
    print(passes.report(step))                              predicted peaks, what each pass did, who holds the memory
    passes.estimate(model, example_inputs, train=True)      peak and time of every candidate, before anything runs

protocol         Pass and Stage: what a pass is, and where in torch.compile it runs

analysis/        measures of a graph; nothing is rewritten
  effects            what is known of an operator: in-place, elementwise, side effects
  liveness           when each storage of a graph is allocated and freed
  peak               the step that needs most, as a table, a timeline or a picture
  inductor_program   inductor's generated program, loaded without its kernels
  footprint          the peak of that program, run on tensors without data
  workspaces         what kernels allocate and free while they run
  costs              flops and bytes moved, and seconds from both
  joint              a joint graph split into its forward and backward

rewrites/        the passes
  causal                 a computed causal mask becomes is_causal=True
  chunk                  MLPs and heads in chunks of rows
  linear_cross_entropy   the loss in chunks of tokens, without its logits
  stream_qkv             transformer blocks of inference in chunks of tokens
  materialize            shared elementwise values as buffers of their own
  reorder                the node order of lowest peak; order_search finds it
  remat                  recomputation in backward; checkpoint_cuts chooses what is kept
  spill/                 activations moved to pinned memory or to disk
  rows/                  what chunk, linear_cross_entropy and stream_qkv share: recipes of row-wise work

arena/           one buffer for all tensors of a graph: offsets, a validator, an executor

planning/        which passes a step gets
  backend               compile and estimate: a backend of torch.compile
  choose                the cheapest candidate that fits the budget
  tracing               the graphs that inductor would be given, without compiling them
  inductor_hooks        passes as inductor's custom graph passes, and their name in its compile cache
  operator_workspaces   what this package's own operators allocate and compute
  choice_cache          choices stored on disk between processes
  reports               what was chosen, and why
  budgets               "6GiB" as bytes

package, arguments, factories, allocators, versions   its own files, checks of arguments, MODULE:FACTORY, malloc, torch versions

Public names are in __init__.pyi. They load on first use, because most need torch's compiler, which takes seconds to import.
Nothing here imports compiled_dilated.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
