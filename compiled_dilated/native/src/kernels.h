// One entry for each engine, compiled by itself.
#pragma once
#include "backward.h"
#include "forward.h"

namespace native {

void forward_f32(const Problem& problem, const Program& program, bool merges);
void forward_f64(const Problem& problem, const Program& program, bool merges);
void backward_f32(const Problem& problem, const Program& program, const Gradients& gradients);
void backward_f64(const Problem& problem, const Program& program, const Gradients& gradients);

}  // namespace native
