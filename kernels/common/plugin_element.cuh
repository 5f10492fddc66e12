// The type of a plugin's tensors, by their bits: compiled with -DPLUGIN=16 or -DPLUGIN=32. Included after types.cuh.
#pragma once

#if PLUGIN == 16
using Element = f16;
#define PLUGIN_NAME(OP) OP##_plugin_f16
#else
using Element = float;
#define PLUGIN_NAME(OP) OP##_plugin_f32
#endif
