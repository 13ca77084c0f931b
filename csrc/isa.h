// Which instruction set the CPU kernels use: the best that this processor has, unless told otherwise.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace lets::cpu {

const Kernels& kernels();
std::string current_isa();
// Built into this library and supported by this processor, from the plainest to the best.
std::vector<std::string> supported_isas();
// Throws std::invalid_argument for a name that supported_isas() does not hold. Not to be called during an op.
void use_isa(const std::string& name);

}  // namespace lets::cpu
