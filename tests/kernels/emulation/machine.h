// What the emulated kernels and the machine that runs them agree on. No header is included: it is read once a kernel.
#pragma once

struct dim3 { unsigned x, y, z; };

namespace emulated {

// Where in the sources a thread calls or waits; as a default argument, the place of the call.
struct Place { const char* file; int line; };
constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

struct Coordinates { dim3 thread, block, threads, blocks; };
extern Coordinates* self;  // of the thread that runs now

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Place place, const char* message, ...);

// ---- a warp's lanes do something together: the last to come performs it on the records of all ----
using Operation = void (*)(void* const (&records)[32]);  // null where a lane takes no part
void together(unsigned mask, const char* name, Operation operation, void* record, Place place);
void warp_barrier(unsigned mask, Place place);
int lane();
template <class Record> Record* const (&of(void* const (&records)[32]))[32] {
  return reinterpret_cast<Record* const (&)[32]>(records);
}

// ---- barriers ----
void block_barrier(int id, int threads, Place place);  // threads 0: all of the block
void cluster_barrier(Place place);
void barrier_set(unsigned long long* barrier, int count, Place place);
void barrier_count(unsigned long long* barrier, Place place);
void barrier_bytes(unsigned long long* barrier, int bytes, bool arrives, Place place);  // expected; come if negative
void barrier_await(unsigned long long* barrier, unsigned parity, Place place);
unsigned count_add(unsigned* count);
void count_await(const unsigned* count, unsigned least, Place place);

// ---- shared memory ----
unsigned char* dynamic_shared(Place place);
unsigned shared_offset(const void* pointer, Place place);  // its address in the window of shared memory
void check_shared(const void* pointer, int bytes, const char* name, Place place);  // inside, and aligned to `bytes`
unsigned rank_in_cluster();
const void* at_rank(unsigned rank, const void* place_in_shared, Place place);

// ---- copies that run behind a thread's back ----
struct Copy { void* shared; const void* global; bool valid; int bytes; };
void copy_later(const Copy& copy);
void copies_commit();
bool copy_due(int pending, Copy& copy);  // takes the next copy that must be done for `pending` groups to be left

// ---- products of a warpgroup ----
struct Product {
  float* d;
  unsigned a[4];
  unsigned long long b;
  bool accumulate, bf16, mn_major;
  int columns;
  bool a_shared = false;  // then `a_matrix` describes a
  unsigned long long a_matrix = 0;
};
void products_fence();
void product_later(const Product& product, Place place);
void products_commit(Place place);
void products_wait(int pending, Place place);

// A kernel: how to call it with cuLaunchKernel's array of arguments, and what was written beside its name.
struct Entry {
  void (*call)(void** arguments);
  const char* const* parameters;  // "int", "long long", "float", "float*", "f16*" …; ends with null
  int most_threads;               // __launch_bounds__; 0: none
  int cluster[3];                 // __cluster_dims__
  char *statics, *statics_end;    // the __shared__ arrays
};

struct Launch {
  const Entry* entry;
  const char* kernel;
  int grid[3], block[3];
  long shared;
  unsigned long long seed;  // 0: threads and blocks take turns in order; otherwise shuffled
};

}  // namespace emulated

extern "C" const char* emulated_launch(const emulated::Launch* launch, void** arguments);  // null, or what went wrong
