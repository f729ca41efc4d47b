// What a call computes, read from its code: for every head some branches, each a mask, and how their tokens are dealt to tiles.
#pragma once
#include "masks.h"

namespace native {

// Tokens of a tile: every `step`-th along the line, or a patch of the grid.
struct Layout {
  int64_t step = 1;
  int axes = 0;     // of the grid; 0: none
  int number = -1;  // of the grid
  int64_t offset = 0;
  int64_t sizes[3] = {1, 1, 1};
};

struct Branch {
  int root;          // node of its mask
  int64_t key_step;  // keys are looked for in classes modulo it
};

struct Group {
  Layout layout;
  std::vector<Branch> branches;
};

struct Program {
  Masks masks;
  std::vector<Group> groups;
  std::vector<int> group_of_head;
  bool varies_by_entry = false;  // whether entries of the batch may see other pairs
  std::vector<int64_t> score_mod_operands;
  std::unique_ptr<Function> score_mod;
  std::vector<Array> operands;  // of the score_mod
};

// The layout of the code, as encode.py writes it:
//
//   version, positions (-1: any)
//   heads, then the group of each
//   groups, then of each: step, axes, offset, sizes of the axes, branches, then of each branch: root, key step
//   nodes, then of each: number of its operation, count of its arguments, arguments
//   1 and the score_mod, or 0: count of its operands, their numbers, its tape
//
// Raises runtime_error for code that is none, or that does not fit the problem.
Program read_program(const Problem& problem);

}  // namespace native
