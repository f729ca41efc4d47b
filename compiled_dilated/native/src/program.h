// What a call computes, read from its code: branches per head, each a mask, and how queries are
// tiled.
#pragma once
#include <algorithm>

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
  int64_t key_step;  // keys are walked by residue classes modulo it
  bool strict;       // whether queries see keys of their own class only
};

struct Group {
  Layout layout;
  std::vector<Branch> branches;
  std::vector<int> globals;  // the nodes of global tokens among its masks

  // Whether tiles and blocks are runs of tokens, so that neighboring tiles see the same keys.
  bool has_runs() const {
    return layout.step == 1 && layout.axes <= 1 && std::all_of(branches.begin(), branches.end(), [](const Branch& branch) { return branch.key_step == 1; });
  }
};

// The global ones of a call's queries, ascending. alike: whether one mask names them all.
struct GlobalQueries {
  std::vector<int32_t> positions;
  bool alike = true;

  // Whether any is at first .. last.
  bool any_of(int64_t first, int64_t last) const {
    const auto at = std::lower_bound(positions.begin(), positions.end(), first);
    return at != positions.end() && *at <= last;
  }
};

struct Program {
  Masks masks;
  std::vector<Group> groups;
  std::vector<int> group_of_head;
  bool varies_by_entry = false;  // whether entries of the batch may see different pairs
  std::vector<int64_t> score_mod_operands;
  std::unique_ptr<Function> score_mod;
  std::vector<Array> operands;  // of the score_mod

  // Whether one of its masks is a function.
  bool has_function() const;

  // Those of a group among positions start .. stop - 1 of entry b.
  GlobalQueries global_queries(const Group& group, int64_t b, int64_t start, int64_t stop) const;
};

// The layout of the code, as encode.py writes it:
//
//   version, positions (-1: any)
//   number of heads; per head: its group
//   number of groups; per group: step, axes, offset, sizes of the axes, number of branches;
//       per branch: root, key step, whether its classes are strict
//   number of nodes; per node: number of the operation, count of arguments, arguments
//   0, or 1 and the score_mod: count of operands, their numbers, its tape
//
// Throws runtime_error for code that is malformed or does not fit the problem.
Program read_program(const Problem& problem);

}  // namespace native
