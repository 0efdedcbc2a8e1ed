// The project converts half types by their bits where it is not compiled for a device: nothing of the toolkit is needed.
#pragma once

#include "cuda_runtime.h"
