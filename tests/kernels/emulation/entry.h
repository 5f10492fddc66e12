// Included after a kernel's last line: ENTRY(name, …) lets the launcher call it as cuLaunchKernel would.
#pragma once

#include <utility>

#include "types.cuh"

namespace emulated {

template <class T> constexpr const char* name_of = "?";
template <> inline constexpr const char* name_of<int> = "int";
template <> inline constexpr const char* name_of<long long> = "long long";
template <> inline constexpr const char* name_of<float> = "float";
template <> inline constexpr const char* name_of<float*> = "float*";
template <> inline constexpr const char* name_of<f16*> = "f16*";
template <> inline constexpr const char* name_of<bf16*> = "bf16*";
template <> inline constexpr const char* name_of<u8*> = "u8*";
template <> inline constexpr const char* name_of<int*> = "int*";
template <> inline constexpr const char* name_of<unsigned*> = "unsigned*";
template <class T> inline constexpr const char* name_of<T*> = "void*";
template <class T> inline constexpr const char* name_of<const T*> = name_of<T*>;

template <auto kernel> struct Kernel;
template <class... Parameters, void (*kernel)(Parameters...)> struct Kernel<kernel> {
  static constexpr const char* parameters[] = {name_of<Parameters>..., nullptr};
  template <std::size_t... I> static void call(void** arguments, std::index_sequence<I...>) {
    kernel(*(Parameters*)arguments[I]...);
  }
  static void call(void** arguments) { call(arguments, std::index_sequence_for<Parameters...>()); }
};

template <int I> constexpr int number(int x, int y = 1, int z = 1) { return I == 0 ? x : I == 1 ? y : z; }

}  // namespace emulated

// All that the library may write is its __shared__ arrays.
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];

// BOUNDS and CLUSTER are what stands in the brackets of __launch_bounds__ and __cluster_dims__, brackets included.
#define ENTRY(NAME, BOUNDS, CLUSTER)  \
  extern "C" const emulated::Entry* entry_##NAME() {  \
    using namespace emulated;  \
    static const Entry entry{Kernel<&NAME>::call, Kernel<&NAME>::parameters, number<0> BOUNDS,  \
                             {number<0> CLUSTER, number<1> CLUSTER, number<2> CLUSTER}, __bss_start, _end};  \
    return &entry;  \
  }
