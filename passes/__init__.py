"""Memory planning for any fx graph: what lives when, when most lives, and passes that make it less. Knows no attention.

step = passes.compile(model, memory_budget="6GiB")      torch.compile with the cheapest passes under which a step fits
print(passes.report(step))                              predicted peaks, what each pass did, who holds the memory
passes.estimate(model, example_inputs, train=True)      peak and time of every candidate, before anything runs

The names are in __init__.pyi. Most bring torch's compiler, which takes seconds, and come when they are asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
