// Registers what evaluates functions.
#include "parts.h"

namespace native {

static const FunctionPart part_of_functions{
    &read_function, &check_operands, &mask, &classify, &score<float>, &score<double>, &score_backward<float>, &score_backward<double>,
    [] { return new FunctionRoom; }, [](FunctionRoom* room) { delete room; }};
static const bool registered = (parts().functions = &part_of_functions, true);

}  // namespace native
