#include "program.h"

#include "parts.h"

#include <string>

namespace native {

namespace {

constexpr int64_t version = 2;

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& code) : at_(code.data()), end_(code.data() + code.size()) {}

  int64_t next() {
    if (at_ == end_) throw std::runtime_error("the attention's code stops too early");
    return *at_++;
  }

  int64_t next(int64_t least, int64_t most, const char* what) {
    const int64_t value = next();
    if (value < least || value > most)
      throw std::runtime_error(std::string("the attention's code names ") + what + " " + std::to_string(value) + ", which must be from " +
                               std::to_string(least) + " to " + std::to_string(most));
    return value;
  }

  std::vector<int64_t> list(int64_t count) {
    if (count < 0 || count > end_ - at_) throw std::runtime_error("the attention's code stops too early");
    std::vector<int64_t> out(at_, at_ + count);
    at_ += count;
    return out;
  }

  const int64_t*& at() { return at_; }
  const int64_t* end() const { return end_; }
  bool done() const { return at_ == end_; }

 private:
  const int64_t *at_, *end_;
};

constexpr int64_t most = int64_t{1} << 60;

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("the attention's code has a mask whose arguments do not fit: ") + what);
}

void require_ascending(const std::vector<int64_t>& numbers, size_t from) {
  for (size_t i = from; i < numbers.size(); ++i) {
    require(numbers[i] >= 0 && numbers[i] <= most, "numbers from 0 on");
    require(i == from || numbers[i - 1] <= numbers[i], "ascending numbers");
  }
}

// Checks that a node's arguments fit its operation, so that no later step divides by zero or reads
// out of bounds.
void check(const Node& node, int64_t nodes, size_t data) {
  const std::vector<int64_t>& x = node.arguments;
  const auto within = [&](size_t i, int64_t least, int64_t greatest) {
    require(i < x.size() && x[i] >= least && x[i] <= greatest, "one out of range");
  };
  switch (node.op) {
    case Op::full: case Op::causal: require(x.empty(), "none expected"); break;
    case Op::all_of: case Op::any_of: case Op::none_of:
      require(!x.empty() && (node.op != Op::none_of || x.size() == 1), "the masks that it joins");
      for (size_t i = 0; i < x.size(); ++i) within(i, 0, nodes - 1);
      break;
    case Op::window: within(0, 0, most), within(1, 0, most), within(2, 1, most), require(x.size() == 3, "three"); break;
    case Op::segments: within(0, 1, most), require(x.size() == 1, "one"); break;
    case Op::congruent: within(0, 1, most), within(1, 0, most), within(2, 0, most), require(x.size() == 3, "three"); break;
    case Op::sinks: case Op::leading: within(0, 0, most), require(x.size() == 1, "one"); break;
    case Op::dilated_blocks: within(0, 1, most), within(1, 1, most), require(x.size() == 2, "two"); break;
    case Op::block_window: within(0, 1, most), within(1, 0, most), within(2, 0, most), require(x.size() == 3, "three"); break;
    case Op::document_lengths: case Op::global_positions: require_ascending(x, 0); break;
    case Op::tiles: within(0, 1, most), within(1, 1, most), require_ascending(x, 2); break;
    case Op::neighborhood: {
      within(0, 0, most), within(1, 1, 3);
      require(x.size() == static_cast<size_t>(2 + 5 * x[1]), "five for each axis");
      int64_t cells = 1;
      for (int64_t axis = 0; axis < x[1]; ++axis) {
        const size_t at = 2 + 5 * axis;
        within(at, 1, most_positions), within(at + 1, 0, most_positions), within(at + 2, 1, most_positions);
        within(at + 3, 0, 1), within(at + 4, 0, 1);
        cells *= x[at];
        require(cells <= most_positions, "a grid of at most 2**30 cells");
      }
      break;
    }
    case Op::document_ids: case Op::padding: case Op::global_data:
      require(x.size() == 1, "one");
      if (x[0] < 0 || x[0] >= static_cast<int64_t>(data)) throw std::runtime_error("the attention's code reads data that the call does not have");
      break;
    case Op::function: break;
  }
}

std::vector<Array> operands_of(const std::vector<int64_t>& numbers, const Problem& problem) {
  std::vector<Array> out;
  for (const int64_t number : numbers) {
    if (number < 0 || number >= static_cast<int64_t>(problem.operands.size()))
      throw std::runtime_error("the attention's code reads operands that the call does not have");
    out.push_back(problem.operands[number]);
  }
  return out;
}

Node read_node(Reader& reader, int64_t index, const Problem& problem, size_t data) {
  Node node;
  node.op = static_cast<Op>(reader.next(0, static_cast<int64_t>(Op::function), "an operation"));
  node.arguments = reader.list(reader.next(0, most, "a count of arguments"));
  check(node, index, data);
  if (node.op == Op::function) {
    Reader of(node.arguments);
    node.head = of.next(-1, most, "a head");
    node.operands = operands_of(of.list(of.next(0, most, "a count of operands")), problem);
    node.function = std::make_unique<Function>(functions().read(of.at(), of.end()));
    functions().check(*node.function, node.operands.data(), node.operands.size());
  }
  return node;
}

Group read_group(Reader& reader, Masks& masks) {
  Group group;
  Layout& layout = group.layout;
  layout.step = reader.next(1, most_positions, "a step");
  layout.axes = static_cast<int>(reader.next(0, 3, "axes"));
  layout.offset = reader.next(0, most_positions, "an offset");
  int64_t cells = 1;
  for (int i = 0; i < layout.axes; ++i) {
    layout.sizes[i] = reader.next(1, most_positions, "the size of an axis");
    cells *= layout.sizes[i];
    if (cells > most_positions) throw std::runtime_error("the attention's code has a grid of more than 2**30 cells");
  }
  if (layout.axes) {
    std::vector<int64_t> kind{layout.offset};
    kind.insert(kind.end(), layout.sizes, layout.sizes + layout.axes);
    layout.number = masks.grid_number(kind);
  }
  const int64_t branches = reader.next(0, most_positions, "a count of branches");
  for (int64_t i = 0; i < branches; ++i) {
    const int root = static_cast<int>(reader.next(0, most_positions, "a mask"));
    const int64_t key_step = reader.next(1, most_positions, "a step of keys");
    group.branches.push_back({root, key_step, reader.next(0, 1, "a kind of classes") == 1});
  }
  return group;
}

// The nodes of global tokens among a group's masks.
std::vector<int> globals_of(const Masks& masks, const Group& group) {
  std::vector<char> is_part(masks.nodes.size(), 0);
  for (const Branch& branch : group.branches) is_part[branch.root] = 1;
  std::vector<int> out;
  // Parts have lower numbers than the nodes that they compose.
  for (int index = static_cast<int>(masks.nodes.size()) - 1; index >= 0; --index) {
    const Node& node = masks.nodes[index];
    if (!is_part[index]) continue;
    if (node.op == Op::global_positions || node.op == Op::global_data) out.push_back(index);
    if (node.op != Op::all_of && node.op != Op::any_of && node.op != Op::none_of) continue;
    for (const int64_t part : node.arguments) is_part[part] = 1;
  }
  return out;
}

}  // namespace

bool Program::has_function() const {
  const std::vector<Node>& nodes = masks.nodes;
  return std::any_of(nodes.begin(), nodes.end(), [](const Node& node) { return node.op == Op::function; });
}

GlobalQueries Program::global_queries(const Group& group, int64_t b, int64_t start, int64_t stop) const {
  GlobalQueries out;
  std::vector<int32_t>& positions = out.positions;
  for (const int index : group.globals) {
    const Node& node = masks.nodes[index];
    const std::vector<int64_t>& x = node.arguments;
    if (node.op == Op::global_positions) {
      for (auto at = std::lower_bound(x.begin(), x.end(), start); at != x.end() && *at < stop; ++at)
        positions.push_back(static_cast<int32_t>(*at));
      continue;
    }
    const int32_t* flags = masks.data[x[0]].row(b);
    for (int64_t position = start; position < stop; ++position)
      if (flags[position]) positions.push_back(static_cast<int32_t>(position));
  }
  out.alike = group.globals.size() == 1;
  std::sort(positions.begin(), positions.end());
  positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
  return out;
}

Program read_program(const Problem& problem) {
  Program program;
  Reader reader(problem.code);
  if (reader.next() != version) throw std::runtime_error("the attention's code was written by another version of compiled_dilated; export the program again");
  const int64_t limit = reader.next(-1, most, "a limit of positions");
  const int64_t q_len = problem.q.sizes[2], kv_len = problem.k.sizes[2];
  int64_t positions = kv_len;
  for (const int64_t offset : problem.q_offsets) {
    // A ring counts a block's queries from its first key, so that their positions may be negative.
    if (offset < -most_positions) throw std::runtime_error("q_offset must be at least -2**30; got " + std::to_string(offset));
    // Before the sum, which may overflow.
    if (offset > most_positions) throw std::runtime_error("the native kernel takes positions up to 2**30; got a q_offset of " + std::to_string(offset));
    positions = std::max(positions, offset + q_len);
  }
  if (positions > most_positions) throw std::runtime_error("the native kernel takes positions up to 2**30; got " + std::to_string(positions));
  if (limit >= 0 && positions > limit)
    throw std::runtime_error("the program's grid has " + std::to_string(limit) + " tokens; got positions up to " + std::to_string(positions));
  const int64_t heads = reader.next(1, most, "a count of heads");
  if (heads != problem.q.sizes[1])
    throw std::runtime_error("the attention's code is of " + std::to_string(heads) + " heads; the query has " + std::to_string(problem.q.sizes[1]));
  for (const int64_t group : reader.list(heads)) program.group_of_head.push_back(static_cast<int>(group));
  const int64_t groups = reader.next(0, most, "a count of groups");
  for (int64_t i = 0; i < groups; ++i) program.groups.push_back(read_group(reader, program.masks));
  for (const int group : program.group_of_head)
    if (group < 0 || group >= groups) throw std::runtime_error("the attention's code names a group that it does not have");
  for (const Array& data : problem.data) {
    program.masks.data.push_back(rows_of(data));
    const DataRows& rows = program.masks.data.back();
    if (rows.tokens < kv_len || (rows.batch != 1 && rows.batch != problem.q.sizes[0]))
      throw std::runtime_error("data must have shape (batch or 1, tokens), of at least as many tokens as there are keys");
  }
  const int64_t nodes = reader.next(0, most, "a count of masks");
  std::vector<int> depths;
  for (int64_t i = 0; i < nodes; ++i) {
    Node node = read_node(reader, i, problem, problem.data.size());
    int depth = 1;
    if (node.op == Op::all_of || node.op == Op::any_of || node.op == Op::none_of)
      for (const int64_t part : node.arguments) depth = std::max(depth, depths[part] + 1);
    if (depth > 1000) throw std::runtime_error("the attention's code has masks of masks, more than 1000 deep");
    depths.push_back(depth);
    program.masks.add(std::move(node));
  }
  for (const Group& group : program.groups)
    for (const Branch& branch : group.branches)
      if (branch.root >= nodes) throw std::runtime_error("the attention's code names a mask that it does not have");
  for (Group& group : program.groups) group.globals = globals_of(program.masks, group);
  if (reader.next(0, 1, "a score_mod")) {
    program.score_mod_operands = reader.list(reader.next(0, most, "a count of operands"));
    program.operands = operands_of(program.score_mod_operands, problem);
    program.score_mod = std::make_unique<Function>(functions().read(reader.at(), reader.end()));
    functions().check(*program.score_mod, program.operands.data(), program.operands.size());
  }
  program.varies_by_entry = problem.q_offsets.size() > 1 || !problem.data.empty();
  program.varies_by_entry |= program.has_function();
  const int64_t first = *std::min_element(problem.q_offsets.begin(), problem.q_offsets.end());
  for (const Node& node : program.masks.nodes) {
    const bool reads_flags = node.op == Op::padding || node.op == Op::global_data;
    if (reads_flags && problem.data[node.arguments[0]].type != Type::boolean)
      throw std::runtime_error("padding and global tokens are bool data, True where a key is padding or a token global");
    const bool reads_queries = node.op == Op::document_ids || node.op == Op::global_data;
    if (reads_queries && (first < 0 || program.masks.data[node.arguments[0]].tokens < positions))
      throw std::runtime_error("data that is read at the query's position must have an entry for each query");
    if (first < 0 && (node.op == Op::neighborhood || node.op == Op::tiles || node.op == Op::document_lengths || node.op == Op::function))
      throw std::runtime_error("queries before position 0 have no place in lists and grids; got q_offset " + std::to_string(first));
  }
  return program;
}

}  // namespace native
