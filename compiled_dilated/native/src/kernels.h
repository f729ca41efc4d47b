// One entry for each engine, compiled by itself.
#pragma once
#include "backward.h"
#include "forward.h"

namespace native {

// Whether products of bfloat16 tiles were compiled in and may be used.
bool has_amx();
void forward_amx(const Problem& problem, const Program& program, bool merges);
bool tiles_f32(const Problem& problem, const Program& program, bool merges, bool careful);
void forward_f32(const Problem& problem, const Program& program, bool merges);
void forward_f64(const Problem& problem, const Program& program, bool merges);
void backward_f32(const Problem& problem, const Program& program, const Gradients& gradients);
void backward_f64(const Problem& problem, const Program& program, const Gradients& gradients);

}  // namespace native
