"""Memory planning for fx graphs: predict a step's peak, and lower it.

step = passes.compile(model, memory_budget="6GiB")     torch.compile with passes that fit a budget
print(passes.report(step))                             predicted peaks, changes, live storages
passes.estimate(model, example_inputs, train=True)     peak and time of every candidate

protocol             Pass and Stage: what a pass is, and where in torch.compile it runs

analysis/            measures of a graph, which they do not change
  effects              operators: in-place, elementwise, side effects
  values               traced values of nodes, and sizes as numbers
  schemas              views, by operators' schemas
  sources              the source lines of nodes
  liveness             when each storage of a graph is allocated and freed
  peak                 the step with most live bytes, as a table, a timeline or a picture
  inductor_program     inductor's generated program, loaded without its kernels
  footprint            the peak of that program, run on tensors without data
  meter                counts the bytes of the tensors allocated under it
  workspaces           bytes that kernels allocate and free while they run
  costs                flops and bytes moved, and seconds from both
  joint                a joint graph split into its forward and its backward

rewrites/            the passes
  causal               a computed causal mask becomes is_causal=True
  chunk                MLPs and heads in chunks of rows
  linear_cross_entropy the loss in chunks of tokens, without its logits
  stream_qkv           transformer blocks in inference, in chunks of tokens
  materialize          shared elementwise values as buffers
  reorder              the node order of lowest peak; order_search finds it
  remat                recomputation in backward; checkpoint_cuts chooses what to keep
  spill/               saved activations on disk or in host memory
  rows/                row-wise work as recipes, for chunk, linear_cross_entropy and stream_qkv

arena/               one buffer for all tensors of a graph: offsets, validator, executor

planning/            the passes that a step gets
  backend              compile and estimate: a backend of torch.compile
  choose               no pass, or the fastest candidate that fits the budget
  candidates           the combinations of passes to choose from
  estimates            peak and seconds of a traced step
  tracing              the graphs that inductor would lower, without compiling them
  inductor_hooks       passes as inductor's custom graph passes, and their name in its cache
  operator_workspaces  workspace and work of this package's own operators
  choice_cache         choices stored on disk between processes
  reports              what was chosen, and why
  budgets              "6GiB" as bytes

package              the package's own name, folder and files
arguments            checks of arguments
factories            MODULE:FACTORY of a command line
allocators           returning freed memory to the system
versions             features that old versions of torch do not have

Public names are in __init__.pyi. They load on first use, because most need torch's compiler, which
is slow to import. Passes import nothing of compiled_dilated.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
