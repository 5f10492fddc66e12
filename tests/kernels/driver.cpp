// A CUDA driver in imitation: two GPUs whose memory is the host's, and a journal of what was asked of them.
// Signatures as in cuda.h. Compiled by test_devices.py, which takes the journal after each step.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define DRIVER extern "C" int

namespace {
std::string journal;
std::map<std::string, int> failures;  // what the next call of a function returns
std::map<const void*, std::pair<int, void*>> places;  // of pointers: GPU and context
thread_local std::vector<void*> contexts;
thread_local int capture_mode = 0;
std::vector<std::string> names;  // of kernels
int gpus = 2;

template <class... T> int note(const char* function, const char* format, T... values) {
  char line[4096];
  int used = snprintf(line, sizeof line, "%s ", function);
  snprintf(line + used, sizeof line - used, format, values...);
  journal += std::string(line) + "\n";
  auto failure = failures.find(function);
  if (failure == failures.end()) return 0;
  int status = failure->second;
  failures.erase(failure);
  return status;
}
void* context_of(int gpu) { return (void*)(intptr_t)(0xc0de00 + gpu); }
}  // namespace

// ---- for the tests ----
extern "C" const char* test_take_journal() {
  static std::string taken;
  taken.swap(journal);
  journal.clear();
  return taken.c_str();
}
extern "C" void test_fail(const char* function, int status) { failures[function] = status; }
extern "C" void test_place(const void* pointer, int gpu, void* context) { places[pointer] = {gpu, context}; }
extern "C" void test_gpus(int count) { gpus = count; }
extern "C" int test_contexts() { return (int)contexts.size(); }

// ---- cuda.h ----
DRIVER cuInit(unsigned) { return note("cuInit", ""); }
DRIVER cuGetErrorName(int status, const char** name) {
  *name = status == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR";
  return 0;
}
DRIVER cuGetErrorString(int, const char** text) {
  *text = "as told by the test";
  return 0;
}
DRIVER cuDeviceGetCount(int* count) {
  *count = gpus;
  return 0;
}
DRIVER cuDeviceGet(int* device, int number) {
  *device = number;
  return number < gpus ? 0 : 101;
}
DRIVER cuDeviceGetName(char* name, int length, int device) { return snprintf(name, length, "GPU %d", device) < 0; }
DRIVER cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 132 - device; return 0;
    case 75: *value = device ? 8 : 9; return 0;
    case 76: *value = device ? 6 : 0; return 0;
    case 97: *value = device ? 99 * 1024 : 227 * 1024; return 0;
  }
  return 1;
}
DRIVER cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = context_of(device);
  return 0;
}
DRIVER cuCtxGetCurrent(void** context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return 0;
}
DRIVER cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return 0;
}
DRIVER cuCtxPopCurrent_v2(void** context) {
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}
DRIVER cuModuleLoadData(void** module, const void* image) {
  *module = strdup((const char*)image);
  return note("load", "%s in %p mode %d", (const char*)image, contexts.back(), capture_mode);
}
DRIVER cuModuleGetFunction(void** function, void* module, const char* name) {
  names.push_back(name);
  *function = (void*)(intptr_t)names.size();
  return note("function", "%s of %s", name, (const char*)module);
}
DRIVER cuFuncSetAttribute(void* function, int attribute, int value) {
  return note("attribute", "%s %d = %d", names[(intptr_t)function - 1].c_str(), attribute, value);
}
DRIVER cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void* stream, void** parameters, void** extra) {
  if (parameters || (intptr_t)extra[0] != 1 || (intptr_t)extra[2] != 2 || extra[4]) return 1;
  std::string bytes;
  for (size_t i = 0; i < *(size_t*)extra[3]; i++) {
    char digits[3];
    snprintf(digits, sizeof digits, "%02x", ((unsigned char*)extra[1])[i]);
    bytes += digits;
  }
  return note("launch", "%s (%u, %u, %u) (%u, %u, %u) %u stream %p in %p: %s", names[(intptr_t)function - 1].c_str(), gx,
              gy, gz, bx, by, bz, shared, stream, contexts.back(), bytes.c_str());
}
DRIVER cuMemAlloc_v2(void** pointer, size_t bytes) {
  *pointer = malloc(bytes);
  memset(*pointer, 0xaa, bytes);
  return note("allocate", "%zu in %p mode %d", bytes, contexts.back(), capture_mode);
}
DRIVER cuMemsetD8Async(void* pointer, unsigned char value, size_t bytes, void* stream) {
  memset(pointer, value, bytes);
  return note("memset", "%d %zu stream %p", value, bytes, stream);
}
DRIVER cuPointerGetAttribute(void* value, int attribute, const void* pointer) {
  auto place = places.find(pointer);
  if (place == places.end()) return 1;
  if (attribute == 9) *(int*)value = place->second.first;
  if (attribute == 1) *(void**)value = place->second.second;
  return 0;
}
DRIVER cuStreamCreate(void** stream, unsigned flags) {
  *stream = (void*)(intptr_t)(0x5000 + flags);
  return 0;
}
DRIVER cuStreamSynchronize(void* stream) { return note("synchronize", "%p", stream); }
DRIVER cuStreamDestroy_v2(void* stream) { return note("destroy", "%p", stream); }
DRIVER cuStreamWaitEvent(void* stream, void* event, unsigned) { return note("wait", "%p for %p", stream, event); }
DRIVER cuEventCreate(void** event, unsigned flags) {
  *event = (void*)(intptr_t)(0xe000 + flags);
  return 0;
}
DRIVER cuEventRecord(void* event, void* stream) { return note("record", "%p on %p", event, stream); }
DRIVER cuEventDestroy_v2(void* event) { return note("destroy", "%p", event); }
DRIVER cuThreadExchangeStreamCaptureMode(int* mode) {
  int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
