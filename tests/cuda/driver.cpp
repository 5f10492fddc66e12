// A CUDA driver in imitation: two GPUs whose memory is the host's, and a journal of what was asked of them.
// Signatures as in cuda.h. Compiled by imitated_driver.py.
//
// What is enqueued on a stream runs as late as the rules allow: when something waits for it. With a seed, streams take
// turns at random instead. So work that is ordered by luck only reads what is not there yet, or what is gone.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define DRIVER extern "C" int
#define LOCKED std::lock_guard<std::recursive_mutex> held(lock)

namespace {
enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_HANDLE = 400, NOT_READY = 600, CAPTURE_UNSUPPORTED = 900 };

std::recursive_mutex lock;
std::string journal;
std::map<std::string, int> failures;  // what the next call of a function returns
std::map<const void*, std::pair<int, void*>> places;  // of pointers: GPU and context
thread_local std::vector<void*> contexts;
thread_local int capture_mode = 0;
thread_local int capturing = 0;  // streams that this thread captures
std::vector<std::string> names;  // of kernels
int gpus = 2, version = 13000;
int broken = 0;  // what every call returns once the GPU is lost
std::string breaking;  // the kernel that will break it
int breaking_status = 0;

int running = 0;  // work may be Python's, whose garbage collector may call the driver amidst

// ---- memory ----
struct Block { size_t bytes; bool device; };
std::map<uintptr_t, Block> blocks;
size_t total = (size_t)80 << 30, used = 0;

bool inside(const void* pointer, size_t bytes, bool device) {
  auto next = blocks.upper_bound((uintptr_t)pointer);
  if (next == blocks.begin()) return false;
  auto& [start, block] = *std::prev(next);
  return block.device == device && (uintptr_t)pointer + bytes <= start + block.bytes;
}
int reserve(void** pointer, size_t bytes, bool device) {
  if (!bytes) return INVALID_VALUE;
  if (device && bytes > total - used) return OUT_OF_MEMORY;
  *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(*pointer, 0xff, bytes);  // NaN
  blocks[(uintptr_t)*pointer] = {bytes, device};
  if (device) used += bytes;
  return 0;
}
int release(void* pointer, bool device) {
  auto found = blocks.find((uintptr_t)pointer);
  if (found == blocks.end() || found->second.device != device) return INVALID_VALUE;
  if (device) used -= found->second.bytes;
  if (!running) memset(pointer, 0xdd, found->second.bytes);
  blocks.erase(found);
  if (!running) free(pointer);
  return 0;
}

// ---- streams ----
struct Mark { bool done = false; float time = 0; void* stream = nullptr; };  // one recording of an event
using MarkOf = std::shared_ptr<Mark>;
struct Work { std::function<void()> run; MarkOf wait; };  // either
using Graph = std::vector<Work>;
std::map<void*, std::deque<Work>> queues;
std::map<void*, Graph*> captures;  // by stream
std::map<void*, MarkOf> events;
std::set<void*> streams;
std::set<Graph*> graphs, executables;
int streams_made = 0, events_made = 0;
float now = 0;
bool random_order = false;
unsigned random_number = 0;

bool known(void* stream) {
  auto handle = (uintptr_t)stream;
  return handle < 0x5000 || handle >= 0xe000 || streams.count(stream);  // others are the test's own
}
bool ready(void* stream) {
  auto& queue = queues[stream];
  return !queue.empty() && (!queue.front().wait || queue.front().wait->done);
}
void step(void* stream) {
  Work work = queues[stream].front();
  queues[stream].pop_front();
  if (!work.run) return;
  now += 1;  // a millisecond for all work
  running++;
  work.run();
  running--;
}
void advance(void* stream) {  // its next work, and what that waits for
  if (random_order) {
    std::vector<void*> able;
    for (auto& [it, queue] : queues) if (ready(it)) able.push_back(it);
    if (able.empty()) abort();
    random_number = random_number * 1664525u + 1013904223u;
    step(able[(random_number >> 16) % able.size()]);
    return;
  }
  while (!ready(stream)) {
    MarkOf mark = queues[stream].front().wait;
    while (!mark->done && !broken) advance(mark->stream);
    if (broken) return;
  }
  step(stream);
}
int finish(void* stream) {
  while (!broken && !queues[stream].empty()) advance(stream);
  return broken;
}
void settle() {
  if (!running) for (auto& [stream, queue] : queues) finish(stream);
}
int enqueue(void* stream, Work work) {
  if (broken) return broken;
  if (!known(stream)) return INVALID_HANDLE;
  auto capture = captures.find(stream);
  if (capture != captures.end()) capture->second->push_back(work);
  else queues[stream].push_back(work);
  return 0;
}
bool forbidden() { return capturing && capture_mode != 2; }  // while this thread captures, unless it is relaxed

template <class... T> int note(const char* function, const char* format, T... values) {
  LOCKED;
  char line[4096];
  int used = snprintf(line, sizeof line, "%s ", function);
  snprintf(line + used, sizeof line - used, format, values...);
  journal += std::string(line) + "\n";
  if (broken) return broken;
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
extern "C" void test_reset() {
  LOCKED;
  blocks.clear(), used = 0;  // what a test left behind is not given back, nor its addresses
  graphs.clear(), executables.clear(), queues.clear(), captures.clear(), events.clear(), streams.clear(), failures.clear(), places.clear(), breaking.clear();
  streams_made = events_made = broken = 0, total = (size_t)80 << 30, gpus = 2, version = 13000, random_order = false;
}
extern "C" void test_seed(unsigned seed) { random_order = true, random_number = seed; }
extern "C" void test_version(int number) { version = number; }
extern "C" void test_memory(size_t bytes) { total = bytes; }
extern "C" size_t test_used() { return used; }
extern "C" int test_blocks() { return (int)blocks.size(); }
extern "C" int test_objects() { return (int)(streams.size() + events.size() + graphs.size() + executables.size()); }
extern "C" void test_break(int status) { broken = status; }
extern "C" void test_break_in(const char* kernel, int status) { breaking = kernel, breaking_status = status; }
typedef void (*Kernel)(const char* name, const unsigned char* arguments, int bytes);
static Kernel run_kernel = nullptr;
extern "C" void test_kernels(Kernel run) { run_kernel = run; }
extern "C" int test_captures(void* stream) { return (int)captures.count(stream); }
extern "C" int test_enqueue(void* stream, void (*run)(int), int number) {
  LOCKED;
  return enqueue(stream, {[=] { run(number); }, nullptr});
}
extern "C" void test_fail(const char* function, int status) { failures[function] = status; }
extern "C" void test_place(const void* pointer, int gpu, void* context) { places[pointer] = {gpu, context}; }
extern "C" void test_gpus(int count) { gpus = count; }
extern "C" int test_contexts() { return (int)contexts.size(); }

// ---- cuda.h ----
DRIVER cuInit(unsigned) { return note("cuInit", ""); }
DRIVER cuDriverGetVersion(int* number) {
  *number = version;
  return 0;
}
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
DRIVER cuCtxGetDevice(int* device) {
  if (contexts.empty()) return 201;
  *device = (int)((intptr_t)contexts.back() - (intptr_t)context_of(0));
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
  LOCKED;
  std::string name = names[(intptr_t)function - 1], arguments((char*)extra[1], *(size_t*)extra[3]);
  if (int status = note("launch", "%s (%u, %u, %u) (%u, %u, %u) %u stream %p in %p: %s", name.c_str(), gx, gy, gz, bx,
                        by, bz, shared, stream, contexts.back(), bytes.c_str()))
    return status;
  return enqueue(stream, {[=] {
    if (name == breaking) broken = breaking_status;
    else if (run_kernel) run_kernel(name.c_str(), (const unsigned char*)arguments.data(), (int)arguments.size());
  }, nullptr});
}
// CUlaunchConfig and CUlaunchAttribute, as in cuda.h.
struct LaunchAttribute {
  int id;
  char padding[4];
  int value;
  char rest[60];
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
DRIVER cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  const int SERIALIZATION = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  for (unsigned i = 0; i < config->count; i++) {
    const LaunchAttribute& it = config->attributes[i];
    if (it.id != SERIALIZATION || it.value != 1) return 1;
    if (int status = note("early", "%s", names[(intptr_t)function - 1].c_str())) return status;
  }
  const unsigned *grid = config->grid, *block = config->block;
  return cuLaunchKernel(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], config->shared,
                        config->stream, parameters, extra);
}
DRIVER cuMemAlloc_v2(void** pointer, size_t bytes) {
  LOCKED;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  if (int status = note("allocate", "%zu in %p mode %d", bytes, contexts.back(), capture_mode)) return status;
  return reserve(pointer, bytes, true);
}
DRIVER cuMemAllocAsync(void** pointer, size_t bytes, void* stream) {
  LOCKED;
  if (int status = note("allocate", "%zu in %p on %p", bytes, contexts.back(), stream)) return status;
  return captures.count(stream) ? CAPTURE_UNSUPPORTED : reserve(pointer, bytes, true);
}
DRIVER cuMemFree_v2(void* pointer) {
  LOCKED;
  settle();  // it waits for the GPU
  return release(pointer, true);
}
DRIVER cuMemFreeAsync(void* pointer, void* stream) {
  LOCKED;
  return enqueue(stream, {[=] { release(pointer, true); }, nullptr});
}
DRIVER cuMemGetInfo_v2(size_t* available, size_t* all) {
  *available = total - used;
  *all = total;
  return broken;
}
DRIVER cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  LOCKED;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  if (int status = note("pin", "%zu", bytes)) return status;
  return reserve(pointer, bytes, false);
}
DRIVER cuMemFreeHost(void* pointer) {
  LOCKED;
  settle();
  return release(pointer, false);
}
DRIVER cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  LOCKED;
  if (!inside(to, bytes, true)) return INVALID_VALUE;
  if (int status = note("upload", "%zu stream %p", bytes, stream)) return status;
  if (inside(from, bytes, false)) return enqueue(stream, {[=] { memcpy(to, from, bytes); }, nullptr});
  auto staged = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + bytes);  // not pinned
  return enqueue(stream, {[=] { memcpy(to, staged->data(), bytes); }, nullptr});
}
DRIVER cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  LOCKED;
  if (!inside(from, bytes, true)) return INVALID_VALUE;
  if (int status = note("download", "%zu stream %p", bytes, stream)) return status;
  if (int status = enqueue(stream, {[=] { memcpy(to, from, bytes); }, nullptr})) return status;
  return inside(to, bytes, false) ? 0 : finish(stream);
}
DRIVER cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  LOCKED;
  if (!inside(to, bytes, true) || !inside(from, bytes, true)) return INVALID_VALUE;
  if (int status = note("copy", "%zu stream %p", bytes, stream)) return status;
  return enqueue(stream, {[=] { memmove(to, from, bytes); }, nullptr});
}
DRIVER cuMemsetD8Async(void* pointer, unsigned char value, size_t bytes, void* stream) {
  LOCKED;
  if (int status = note("memset", "%d %zu stream %p", value, bytes, stream)) return status;
  return enqueue(stream, {[=] { memset(pointer, value, bytes); }, nullptr});
}
DRIVER cuPointerGetAttribute(void* value, int attribute, const void* pointer) {
  LOCKED;
  auto place = places.find(pointer);
  if (place == places.end()) {
    if (!inside(pointer, 1, true)) return 1;
    attribute == 9 ? *(int*)value = 0 : 0;
    attribute == 1 ? *(void**)value = nullptr : nullptr;
    return 0;
  }
  if (attribute == 9) *(int*)value = place->second.first;
  if (attribute == 1) *(void**)value = place->second.second;
  return 0;
}
DRIVER cuStreamCreate(void** stream, unsigned flags) {
  LOCKED;
  *stream = (void*)(intptr_t)(0x5000 + flags + 0x10 * streams_made++);
  streams.insert(*stream);
  return broken;
}
DRIVER cuStreamSynchronize(void* stream) {
  LOCKED;
  if (!known(stream)) return INVALID_HANDLE;
  if (captures.count(stream)) return CAPTURE_UNSUPPORTED;
  if (int status = note("synchronize", "%p", stream)) return status;
  return finish(stream);
}
DRIVER cuStreamDestroy_v2(void* stream) {
  LOCKED;
  finish(stream);
  streams.erase(stream);
  return note("destroy", "%p", stream);
}
DRIVER cuStreamWaitEvent(void* stream, void* event, unsigned) {
  LOCKED;
  if (!events.count(event)) return INVALID_HANDLE;
  if (int status = note("wait", "%p for %p", stream, event)) return status;
  return enqueue(stream, {nullptr, events[event]});
}
DRIVER cuStreamBeginCapture_v2(void* stream, int mode) {
  LOCKED;
  if (int status = note("capture", "%p mode %d", stream, mode)) return status;
  if (!known(stream) || !stream || captures.count(stream)) return INVALID_VALUE;
  captures[stream] = new Graph;
  capturing++;
  return 0;
}
DRIVER cuStreamEndCapture(void* stream, void** graph) {
  LOCKED;
  if (!captures.count(stream)) return INVALID_VALUE;
  *graph = captures[stream];
  graphs.insert(captures[stream]);
  captures.erase(stream);
  capturing--;
  return note("captured", "%zu on %p", ((Graph*)*graph)->size(), stream);
}
DRIVER cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  LOCKED;
  if (int status = note("instantiate", "%zu", ((Graph*)graph)->size())) return status;
  *executable = *executables.insert(new Graph(*(Graph*)graph)).first;
  return 0;
}
DRIVER cuGraphUpload(void*, void*) { return broken; }
DRIVER cuGraphLaunch(void* executable, void* stream) {
  LOCKED;
  if (!executables.count((Graph*)executable)) return INVALID_HANDLE;
  if (int status = note("replay", "%zu stream %p", ((Graph*)executable)->size(), stream)) return status;
  for (auto& work : *(Graph*)executable)
    if (int status = enqueue(stream, work)) return status;
  return 0;
}
DRIVER cuGraphDestroy(void* graph) {
  LOCKED;
  if (!graphs.erase((Graph*)graph)) return INVALID_HANDLE;
  delete (Graph*)graph;
  return 0;
}
DRIVER cuGraphExecDestroy(void* executable) {
  LOCKED;
  if (!executables.erase((Graph*)executable)) return INVALID_HANDLE;
  delete (Graph*)executable;
  return 0;
}
DRIVER cuEventCreate(void** event, unsigned flags) {
  LOCKED;
  *event = (void*)(intptr_t)(0xe000 + flags + 0x10 * events_made++);
  events[*event] = std::make_shared<Mark>(Mark{true});
  return broken;
}
DRIVER cuEventRecord(void* event, void* stream) {
  LOCKED;
  if (!events.count(event)) return INVALID_HANDLE;
  if (int status = note("record", "%p on %p", event, stream)) return status;
  MarkOf mark = std::make_shared<Mark>();
  mark->stream = stream;
  if (int status = enqueue(stream, {[=] { mark->done = true, mark->time = now; }, nullptr})) return status;
  events[event] = mark;
  return 0;
}
DRIVER cuEventQuery(void* event) {
  LOCKED;
  if (broken) return broken;
  return !events.count(event) ? INVALID_HANDLE : events[event]->done ? 0 : NOT_READY;
}
DRIVER cuEventSynchronize(void* event) {
  LOCKED;
  if (!events.count(event)) return INVALID_HANDLE;
  MarkOf mark = events[event];
  while (!mark->done && !broken) advance(mark->stream);
  return broken;
}
DRIVER cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  LOCKED;
  if (!events.count(start) || !events.count(end)) return INVALID_HANDLE;
  if (((intptr_t)start | (intptr_t)end) & 2) return INVALID_HANDLE;  // made without timing
  if (!events[start]->done || !events[end]->done) return NOT_READY;
  *milliseconds = events[end]->time - events[start]->time;
  return broken;
}
DRIVER cuEventDestroy_v2(void* event) {
  LOCKED;
  events.erase(event);
  return note("destroy", "%p", event);
}
DRIVER cuThreadExchangeStreamCaptureMode(int* mode) {
  int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
