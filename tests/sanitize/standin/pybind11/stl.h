// csrc/ops.cpp includes it for the module, which these programs do not have.
#pragma once
