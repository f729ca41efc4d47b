"""The native CPU kernel: programs as numbers, and the library.

encode      a program as nodes of masks; src/ has the kernel that reads them
tape        a function of scores or masks as tapes of operations
expressions, ranges, derivatives    the operations, ranges of whole numbers, gradients
tensors, cells    a function's tensors, entry by entry
aten        the table of torch's operators: pointwise (arithmetic, activations), views, constants,
            reductions

library     the operators: schemas, shapes, the first call
recipes     sources, flags, compiler and CPU of a library
build, cache    libraries compiled once per machine, and their folder
cpp         libraries for programs without Python
"""
