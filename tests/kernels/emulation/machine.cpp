// The emulated GPU: runs one cluster of blocks after another (a block alone where a kernel knows no clusters), every
// thread of it a fiber. A fiber runs until it must wait for others; nothing else interrupts it, so a run is repeated
// exactly by its seed, and races are for ThreadSanitizer to find, which is told what orders threads and what does not.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <csetjmp>
#include <csignal>
#include <sys/mman.h>
#include <string>
#include <vector>

#include "machine.h"

#ifdef EMULATED_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATED_THREAD
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read16(void* address);
#endif

// ---- what orders threads, told to ThreadSanitizer: what comes before `gives(x)` in one thread is seen by what comes
//      after `takes(x)` in another ----
#ifdef EMULATED_THREAD
static void gives(void* address) { __tsan_release(address); }
static void takes(void* address) { __tsan_acquire(address); }
#else
static void gives(void*) {}
static void takes(void*) {}
#endif

// ---- stacks change hands ----
#if defined(__x86_64__)
extern "C" void emulated_switch(void** old_stack, void* new_stack);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, . - emulated_switch
)");
static void* prepared_stack(char* top, void (*start)()) {
  void** stack = (void**)top - 8;  // six registers, where to return to, and nowhere to return to from there
  memset(stack, 0, 8 * sizeof(void*));
  stack[6] = (void*)start;
  return stack;
}
#elif defined(__aarch64__)
extern "C" void emulated_switch(void** old_stack, void* new_stack);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, %function
emulated_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulated_switch, . - emulated_switch
)");
static void* prepared_stack(char* top, void (*start)()) {
  void** stack = (void**)(top - 160);
  memset(stack, 0, 160);
  stack[11] = (void*)start;
  return stack;
}
#else
#error "The emulation knows how to switch stacks on x86-64 and AArch64 only."
#endif

namespace emulated {

namespace {

constexpr long STACK = 256 << 10, PAGE = 4096;
constexpr unsigned SHARED_START = 1024;  // where dynamic shared memory begins in the window of shared memory
constexpr unsigned STATICS_START = 0x80000;  // and static arrays: far away, wgmma cannot name them

struct Thread;
struct Block;

// Where threads wait for each other. Two places for ThreadSanitizer, taken in turns: threads of the next phase must not
// seem ordered before slow ones of this phase.
struct Meeting {
  int expected = 0, arrived = 0;
  unsigned phase = 0;
  Place place{};
  char sync[2];
  Thread *first = nullptr, *last = nullptr;  // of those that wait, in the order they came
};

struct Gathering {  // of a warp's lanes
  unsigned mask = 0, arrived = 0, phase = 0;
  const char* name = nullptr;
  Place place{};
  void* records[32];
  char sync[2];
};

struct Warp {
  Thread* lanes[32];
  unsigned mask = 0;  // of the lanes that exist
  unsigned ready = 0;  // of those that may run, and the warp's place in the order; only where a seed decides
  int place = 0;
  Gathering gatherings[32];  // by the lowest lane of the mask
  unsigned long long products = 0, products_digest = 0;
};

struct Block {
  dim3 index;
  unsigned rank;
  char* dynamic = nullptr;
  std::vector<Warp> warps;
  Meeting barriers[16];
  int running;
};

struct Thread : Coordinates {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block_of = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  bool done = false;
  const char* waits = nullptr;  // what for; null: it does not
  Place place{};
  Thread* next = nullptr;  // who waits at the same meeting
  unsigned long long* barrier = nullptr;  // waited for, in shared memory
  unsigned parity = 0;
  const unsigned* count = nullptr;  // waited for, in global memory
  unsigned least = 0;
  std::vector<Copy> copies;
  std::vector<int> copy_groups;  // how many copies had been issued at each commit
  size_t copies_done = 0, groups_done = 0;
  std::vector<Product> products;
  std::vector<int> product_groups;
  size_t products_done = 0, products_to_do = 0;  // of `products`
  bool fenced = false;
#ifdef EMULATED_ADDRESS
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#ifdef EMULATED_THREAD
  void* fiber = nullptr;
#endif
};

Thread main_thread;  // the one that launches
std::vector<std::unique_ptr<Thread>> threads;  // of the cluster; their fibers and stacks are kept
std::vector<std::unique_ptr<Block>> blocks;
std::vector<Thread*> sleepers;  // waiting for a barrier in shared memory
std::vector<Thread*> watchers;  // waiting for a count in global memory
Meeting cluster_meeting;
const Launch* launch;
void** arguments;
char start_sync, finish_sync;
bool failed;
char message[4096];

unsigned long long random_state;
unsigned long long random_number() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1dull >> 16;
}
template <class T> void shuffle_order(std::vector<T>& values, size_t from, size_t to) {
  for (size_t i = to; i > from + 1; i--) std::swap(values[i - 1], values[from + random_number() % (i - from)]);
}

// The threads that may run. Without a seed: first come, first run; a ring.
std::vector<Thread*> ready;
size_t ready_first, ready_count;

// With a seed: blocks, and warps in them, come in an order drawn by lot; the first that can run does, now and then
// another. So some warps run far ahead of others, as they hardly would if every turn were drawn.
std::vector<Warp*> order;
std::vector<unsigned long long> ready_warps;  // bit i: order[i] has lanes that may run

void wake(Thread* thread) {
  thread->waits = nullptr;
  if (!launch->seed) {
    size_t i = ready_first + ready_count++;
    ready[i < ready.size() ? i : i - ready.size()] = thread;
    return;
  }
  thread->warp->ready |= 1u << thread->lane;
  ready_warps[thread->warp->place / 64] |= 1ull << thread->warp->place % 64;
}

Thread* next_in_line() {
  if (!ready_count) return &main_thread;
  Thread* next = ready[ready_first];
  if (++ready_first == ready.size()) ready_first = 0;
  ready_count--;
  return next;
}

Thread* next_by_lot() {
  unsigned long long number = random_number();
  size_t words = ready_warps.size(), first = number % 16 ? 0 : (number >> 4) % words;
  for (size_t i = 0; i < words; i++) {
    unsigned long long& word = ready_warps[(first + i) % words];
    if (!word) continue;
    int turn = number % 16 ? 0 : (number >> 12) % 64;  // where to begin to look
    unsigned long long later = word >> turn << turn;
    int bit = __builtin_ctzll(later ? later : word);
    Warp& warp = *order[(first + i) % words * 64 + bit];
    turn = (number >> 20) % 32;
    unsigned lanes = warp.ready >> turn << turn;
    int lane = __builtin_ctz(lanes ? lanes : warp.ready);
    warp.ready &= ~(1u << lane);
    if (!warp.ready) word &= ~(1ull << bit);
    return warp.lanes[lane];
  }
  return &main_thread;
}

Thread* next_thread() { return launch->seed ? next_by_lot() : next_in_line(); }

void draw_order() {
  ready_first = ready_count = 0;
  order.clear();
  if (!launch->seed) return;
  std::vector<Block*> turns;
  for (auto& block : blocks) turns.push_back(block.get());
  shuffle_order(turns, 0, turns.size());
  for (Block* block : turns) {
    size_t from = order.size();
    for (Warp& warp : block->warps) order.push_back(&warp);
    shuffle_order(order, from, order.size());
  }
  for (size_t i = 0; i < order.size(); i++) order[i]->place = i, order[i]->ready = 0;
  ready_warps.assign((order.size() + 63) / 64, 0);
}

Thread& current() { return *static_cast<Thread*>(self); }

void transfer(Thread& to) {
  Thread& from = current();
  if (&from == &to) return;
  self = &to;
#ifdef EMULATED_ADDRESS
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#ifdef EMULATED_THREAD
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
  emulated_switch(&from.stack_pointer, to.stack_pointer);
#ifdef EMULATED_ADDRESS
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void wait(const char* what, Place place) {
  Thread& me = current();
  me.waits = what;
  me.place = place;
  transfer(*next_thread());
}

// By hand: sanitizers would take a memset for an access by this thread.
void poison(char* from, char* to) {
  for (; to - from >= 8; from += 8) *(volatile unsigned long long*)from = ~0ull;
  for (; from < to; from++) *(volatile unsigned char*)from = 0xff;
}

void finish() {
  Thread& me = current();
  me.done = true;
  if (me.products_done < me.products.size()) fail(me.place, "a thread returned before the wgmma_wait of its products");
  Block& block = *me.block_of;
  if (--block.running == 0) {
    for (size_t w = 0; w < block.warps.size(); w++) {
      Warp &warp = block.warps[w], &first = block.warps[w / 4 * 4];
      if (warp.products != first.products || warp.products_digest != first.products_digest) {
        fail(me.place, "the warps of a warpgroup did not issue the same wgmma");
      }
    }
    // What a block leaves in shared memory is gone: others of its cluster must have read it before.
    poison(block.dynamic, block.dynamic + launch->shared);
  }
}

void fiber_main() {
#ifdef EMULATED_ADDRESS
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!main_thread.bottom) main_thread.bottom = bottom, main_thread.size = size;
#endif
  for (;;) {
    takes(&start_sync);
    launch->entry->call(arguments);
    gives(&finish_sync);
    finish();
    transfer(*next_thread());
  }
}

void prepare_fiber(Thread& thread, size_t number) {
  if (!thread.stack) {
    char* stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, PAGE, PROT_NONE)) fail({"", 0}, "no memory for the stacks of threads");
    thread.stack = stack;
#ifdef EMULATED_THREAD
    thread.fiber = __tsan_create_fiber(0);
#endif
  }
  // Stacks begin at different places of their first page, or all threads would meet in the same few lines of cache.
  char* top = thread.stack + STACK - number % 32 * 128;
  thread.stack_pointer = prepared_stack(top, fiber_main);
#ifdef EMULATED_ADDRESS
  thread.bottom = thread.stack + PAGE;
  thread.size = STACK - PAGE;
#endif
}

long block_threads() { return (long)launch->block[0] * launch->block[1] * launch->block[2]; }

void report_deadlock() {
  std::string report;
  std::vector<bool> told(threads.size());
  for (size_t i = 0; i < threads.size(); i++) {
    if (told[i]) continue;
    int same = 0;
    for (size_t j = i; j < threads.size(); j++) {
      const Thread &a = *threads[i], &b = *threads[j];
      if (a.done == b.done && (a.done || (a.waits == b.waits && a.place.line == b.place.line))) told[j] = true, same++;
    }
    const Thread& thread = *threads[i];
    char line[512];
    if (thread.done) {
      snprintf(line, sizeof line, "%s%d returned", report.empty() ? "" : ", ", same);
    } else {
      const char* name = strrchr(thread.place.file, '/');
      snprintf(line, sizeof line, "%s%d wait at %s (%s:%d)", report.empty() ? "" : ", ", same, thread.waits,
               name ? name + 1 : thread.place.file, thread.place.line);
    }
    report += line;
  }
  const dim3& b = blocks[0]->index;
  snprintf(message, sizeof message, "%s, block (%u, %u, %u): the threads wait for ever: of %zu, %s", launch->kernel, b.x,
           b.y, b.z, threads.size(), report.c_str());
  failed = true;
}

bool wake_watchers() {
  size_t before = watchers.size();
  for (size_t i = 0; i < watchers.size();) {
    if (__atomic_load_n(watchers[i]->count, __ATOMIC_RELAXED) < watchers[i]->least) {
      i++;
    } else {
      wake(watchers[i]);
      watchers[i] = watchers.back();
      watchers.pop_back();
    }
  }
  return watchers.size() < before;
}

void run_cluster(const dim3& cluster) {
  const int *size = launch->entry->cluster, *grid = launch->grid, *block = launch->block;
  poison(launch->entry->statics, launch->entry->statics_end);
  for (auto& b : blocks) {
    unsigned rank = b->rank;
    b->index = {cluster.x * size[0] + rank % size[0], cluster.y * size[1] + rank / size[0] % size[1],
                cluster.z * size[2] + rank / size[0] / size[1]};
    poison(b->dynamic, b->dynamic + launch->shared);
    b->running = block_threads();
    for (Warp& warp : b->warps) warp.products = warp.products_digest = 0;
  }
  draw_order();
  for (auto& thread : threads) {
    thread->Coordinates::block = thread->block_of->index;
    thread->blocks = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    thread->threads = {(unsigned)block[0], (unsigned)block[1], (unsigned)block[2]};
    thread->done = thread->fenced = false;
    thread->copies.clear(), thread->copy_groups.clear(), thread->copies_done = thread->groups_done = 0;
    thread->products.clear(), thread->product_groups.clear();
    thread->products_done = thread->products_to_do = 0;
    wake(thread.get());
  }
  gives(&start_sync);
  do transfer(*next_thread());  // comes back when no thread can run
  while (wake_watchers());
  takes(&finish_sync);
  if (failed) return;
  for (auto& b : blocks) {
    if (b->running) return report_deadlock();
  }
}

void prepare_cluster() {
  const int *size = launch->entry->cluster, *shape = launch->block;
  size_t in_block = block_threads(), count = size[0] * size[1] * size[2];
  blocks.clear();
  sleepers.clear();
  watchers.clear();
  cluster_meeting = Meeting();
  for (size_t rank = 0; rank < count; rank++) {
    blocks.push_back(std::make_unique<Block>());
    Block& block = *blocks.back();
    block.rank = rank;
    block.warps = std::vector<Warp>((in_block + 31) / 32);
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, launch->shared)) fail({"", 0}, "no memory for shared memory");
    block.dynamic = (char*)memory;
  }
  while (threads.size() < count * in_block) threads.push_back(std::make_unique<Thread>());
  while (threads.size() > count * in_block) {  // one launch's threads are all there are, so that a report counts them
#ifdef EMULATED_THREAD
    __tsan_destroy_fiber(threads.back()->fiber);
#endif
    munmap(threads.back()->stack, STACK);
    threads.pop_back();
  }
  ready.assign(threads.size() + 1, nullptr);
  watchers.reserve(threads.size());
  sleepers.reserve(threads.size());  // no thread allocates memory that others use
  for (size_t i = 0; i < threads.size(); i++) {
    Thread& thread = *threads[i];
    size_t j = i % in_block;
    thread.block_of = blocks[i / in_block].get();
    thread.warp = &thread.block_of->warps[j / 32];
    thread.lane = j % 32;
    thread.warp->lanes[j % 32] = &thread;
    thread.warp->mask |= 1u << j % 32;
    thread.thread = {(unsigned)(j % shape[0]), (unsigned)(j / shape[0] % shape[1]), (unsigned)(j / shape[0] / shape[1])};
    prepare_fiber(thread, i);
#ifdef EMULATED_THREAD
    char name[64];
    snprintf(name, sizeof name, "block %zu of the cluster, thread (%u, %u, %u)", i / in_block, thread.thread.x,
             thread.thread.y, thread.thread.z);
    __tsan_set_fiber_name(thread.fiber, name);
#endif
  }
}

sigjmp_buf escape;
void on_fault(int number) {
  const Thread& me = current();
  snprintf(message, sizeof message, "%s, block (%u, %u, %u), thread (%u, %u, %u): %s", launch->kernel,
           me.Coordinates::block.x, me.Coordinates::block.y, me.Coordinates::block.z, me.thread.x, me.thread.y,
           me.thread.z, number == SIGFPE ? "division by zero" : "an address that is not mapped, or not aligned");
  siglongjmp(escape, 1);
}

// A wild pointer ends the launch, not the tests: the handler runs on its own stack and returns to run().
struct FaultHandlers {
  static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction old[3];
  stack_t old_stack;
  std::vector<char> stack = std::vector<char>(64 << 10);
  FaultHandlers() {
    stack_t alternative{};
    alternative.ss_sp = stack.data();
    alternative.ss_size = stack.size();
    sigaltstack(&alternative, &old_stack);
    struct sigaction action {};
    action.sa_handler = on_fault;
    action.sa_flags = SA_ONSTACK;
    for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &old[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

void run_clusters() {
  const int *size = launch->entry->cluster, *grid = launch->grid;
  unsigned x = grid[0] / size[0], y = grid[1] / size[1], z = grid[2] / size[2];
  size_t count = (size_t)x * y * z;
  std::vector<unsigned> turns(count);
  for (size_t i = 0; i < count; i++) turns[i] = i;
  if (launch->seed) shuffle_order(turns, 0, count);
  for (size_t i = 0; i < count && !failed; i++) run_cluster({turns[i] % x, turns[i] / x % y, turns[i] / x / y});
}

}  // namespace

Coordinates* self = &main_thread;

void fail(Place place, const char* text, ...) {
  if (!failed) {
    failed = true;
    const Thread& me = current();
    const char* name = strrchr(place.file, '/');
    int n = snprintf(message, sizeof message, "%s, block (%u, %u, %u), thread (%u, %u, %u), %s:%d: ", launch->kernel,
                     me.Coordinates::block.x, me.Coordinates::block.y, me.Coordinates::block.z, me.thread.x,
                     me.thread.y, me.thread.z, name ? name + 1 : place.file, place.line);
    va_list list;
    va_start(list, text);
    vsnprintf(message + n, sizeof message - n, text, list);
    va_end(list);
  }
  transfer(main_thread);
  abort();  // nobody comes back to a launch that failed
}

int lane() { return current().lane; }

// ---- a warp's lanes together ----

static Gathering& gather(unsigned mask, const char* name, void* record, Place place) {
  Thread& me = current();
  mask &= me.warp->mask;
  if (!(mask >> me.lane & 1)) fail(place, "%s: lane %d calls, and its mask %#x leaves it out", name, me.lane, mask);
  Gathering& gathering = me.warp->gatherings[__builtin_ctz(mask)];
  if (!gathering.arrived) {
    gathering.mask = mask, gathering.name = name, gathering.place = place;
    for (void*& other : gathering.records) other = nullptr;
  } else if (gathering.mask != mask || gathering.name != name || gathering.place.line != place.line) {
    fail(place, "the lanes of a warp diverge: some are at %s (line %d, mask %#x), others at %s (line %d, mask %#x)",
         gathering.name, gathering.place.line, gathering.mask, name, place.line, mask);
  }
  gathering.records[me.lane] = record;
  gathering.arrived |= 1u << me.lane;
  return gathering;
}

static void scatter(Gathering& gathering) {
  Thread& me = current();
  gathering.arrived = 0;
  gathering.phase++;
  for (unsigned others = gathering.mask & ~(1u << me.lane); others; others &= others - 1) {
    wake(me.warp->lanes[__builtin_ctz(others)]);
  }
}

void together(unsigned mask, const char* name, Operation operation, void* record, Place place) {
  Gathering& gathering = gather(mask, name, record, place);
  if (gathering.arrived != gathering.mask) return wait(name, place);
  operation(gathering.records);
  scatter(gathering);
}

void warp_barrier(unsigned mask, Place place) {
  Gathering& gathering = gather(mask, "__syncwarp", nullptr, place);
  char* sync = &gathering.sync[gathering.phase & 1];
  gives(sync);
  if (gathering.arrived != gathering.mask) {
    wait("__syncwarp", place);
  } else {
    scatter(gathering);
  }
  takes(sync);
}

struct Shuffle { unsigned long long mine, result; int source; };
struct Vote { bool mine; unsigned result; };

void shuffle(void* const (&lanes)[32]) {
  auto& records = of<Shuffle>(lanes);
  for (Shuffle* to : records) {
    if (!to) continue;
    const Shuffle* from = records[to->source];
    to->result = from ? from->mine : ~0ull;  // of a lane that takes no part: undefined on a GPU, NaN here
  }
}

void vote(void* const (&lanes)[32]) {
  auto& records = of<Vote>(lanes);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (records[lane]) votes |= (unsigned)records[lane]->mine << lane;
  }
  for (Vote* record : records) {
    if (record) record->result = votes;
  }
}

// ---- barriers ----

static void meet(Meeting& meeting, int expected, const char* name, Place place) {
  if (!meeting.arrived++) {
    meeting.expected = expected, meeting.place = place;
  } else if (meeting.expected != expected) {
    fail(place, "%s: %d threads are expected here, and %d at line %d", name, expected, meeting.expected,
         meeting.place.line);
  }
  char* sync = &meeting.sync[meeting.phase & 1];
  gives(sync);
  if (meeting.arrived < expected) {
    Thread& me = current();
    (meeting.first ? meeting.last->next : meeting.first) = &me;
    meeting.last = &me;
    me.next = nullptr;
    wait(name, place);
  } else {
    meeting.arrived = 0;
    meeting.phase++;
    for (Thread* thread = meeting.first; thread; thread = thread->next) wake(thread);
    meeting.first = nullptr;
  }
  takes(sync);
}

void block_barrier(int id, int expected, Place place) {
  Meeting& meeting = current().block_of->barriers[id];
  if (id == 0) {
    if (meeting.arrived && meeting.place.line != place.line) {
      fail(place, "__syncthreads diverges: others of the block wait at line %d", meeting.place.line);
    }
    return meet(meeting, block_threads(), "__syncthreads", place);
  }
  if (expected > block_threads()) fail(place, "named_barrier: the block has fewer than %d threads", expected);
  meet(meeting, expected, "named_barrier", place);
}

void cluster_barrier(Place place) { meet(cluster_meeting, threads.size(), "cluster_sync", place); }

static long dynamic_offset(const void* pointer, const Block& block) {
  long offset = (const char*)pointer - block.dynamic;
  return offset >= 0 && offset < launch->shared ? offset : -1;
}

// A barrier in shared memory: a mark, the phase's parity, the arrivals that a phase takes, those still to come, and the
// bytes still to come, in pieces of 16, which may come before they are expected.
static constexpr unsigned long long MARK = 0xba44;
static constexpr int NO_PIECES = 0x4000;
static unsigned long long encoded(unsigned phase, unsigned expected, unsigned pending, int pieces) {
  return MARK << 48 | (unsigned long long)(phase & 1) << 47 | (unsigned long long)(NO_PIECES + pieces) << 32 |
         (unsigned long long)expected << 16 | pending;
}
static unsigned parity_of(const unsigned long long* barrier) { return *barrier >> 47 & 1; }
static void check_barrier(unsigned long long* barrier, const char* name, Place place) {
  bool shared = false;  // of any block of the cluster
  for (auto& block : blocks) shared |= dynamic_offset(barrier, *block) >= 0 && (uintptr_t)barrier % 8 == 0;
  if (!shared) check_shared(barrier, 8, name, place);
  if (*barrier >> 48 != MARK) fail(place, "%s: no barrier_init came before, or it was overwritten", name);
}

void barrier_set(unsigned long long* barrier, int count, Place place) {
  check_shared(barrier, 8, "barrier_init", place);
  if (count < 1 || count > 0xffff) fail(place, "barrier_init: the count must be 1 to 2^16 - 1, got %d", count);
  *barrier = encoded(0, count, count, 0);
}

// Where a seed decides, others may run here, as they might on a GPU.
static void step_aside() {
  if (!launch->seed) return;
  wake(&current());
  transfer(*next_thread());
}

// So many arrivals, and pieces of 16 bytes expected (or come, where negative).
static void barrier_change(unsigned long long* barrier, int arrivals, int pieces) {
  unsigned phase = parity_of(barrier), expected = *barrier >> 16 & 0xffff, pending = (*barrier & 0xffff) - arrivals;
  pieces += (int)(*barrier >> 32 & 0x7fff) - NO_PIECES;
  gives(barrier);
  if (pending || pieces) {
    *barrier = encoded(phase, expected, pending, pieces);
    return step_aside();
  }
  *barrier = encoded(phase + 1, expected, expected, 0);
  for (size_t i = 0; i < sleepers.size();) {
    if (sleepers[i]->barrier == barrier && sleepers[i]->parity == phase) {
      wake(sleepers[i]);
      sleepers[i] = sleepers.back();
      sleepers.pop_back();
    } else {
      i++;
    }
  }
  step_aside();
}

void barrier_count(unsigned long long* barrier, Place place) {
  check_barrier(barrier, "barrier_arrive", place);
  if ((*barrier & 0xffff) == 0) fail(place, "barrier_arrive: more arrivals than the phase takes");
  barrier_change(barrier, 1, 0);
}

void barrier_bytes(unsigned long long* barrier, int bytes, bool arrives, Place place) {
  check_barrier(barrier, arrives ? "barrier_expect" : "bulk_copy", place);
  if (bytes % 16) fail(place, "bulk copies are of multiples of 16 bytes, got %d", bytes);
  barrier_change(barrier, arrives, bytes / 16);
}

void barrier_await(unsigned long long* barrier, unsigned parity, Place place) {
  check_barrier(barrier, "barrier_wait", place);
  if (parity > 1) fail(place, "barrier_wait: the parity must be 0 or 1, got %u", parity);
  while (parity_of(barrier) == parity) {
    Thread& me = current();
    me.barrier = barrier;
    me.parity = parity;
    sleepers.push_back(&me);
    wait("barrier_wait", place);
  }
  takes(barrier);
}

unsigned count_add(unsigned* count) {
  gives(count);
  takes(count);
  return __atomic_fetch_add(count, 1u, __ATOMIC_RELAXED);
}

void count_await(const unsigned* count, unsigned least, Place place) {
  while (__atomic_load_n(count, __ATOMIC_RELAXED) < least) {
    Thread& me = current();
    me.count = count;
    me.least = least;
    watchers.push_back(&me);
    wait("wait_for_count", place);
  }
  takes(const_cast<unsigned*>(count));
}

// ---- shared memory ----

unsigned char* dynamic_shared(Place place) {
  if (!launch->shared) fail(place, "dynamic_shared(): the launch asks for no dynamic shared memory");
  return (unsigned char*)current().block_of->dynamic;
}

// The offset in the dynamic shared memory of one of the cluster's blocks, or -1.
unsigned shared_offset(const void* pointer, Place place) {
  long offset = dynamic_offset(pointer, *current().block_of);
  if (offset >= 0) return SHARED_START + offset;
  if (pointer >= launch->entry->statics && pointer < launch->entry->statics_end) {
    return STATICS_START + ((const char*)pointer - (const char*)((uintptr_t)launch->entry->statics & -256));
  }
  fail(place, "%p does not lie in shared memory", pointer);
}

void check_shared(const void* pointer, int bytes, const char* name, Place place) {
  unsigned offset = shared_offset(pointer, place);
  if (offset % bytes) fail(place, "%s: shared address %#x is not aligned to %d bytes", name, offset, bytes);
  shared_offset((const char*)pointer + bytes - 1, place);
}

unsigned rank_in_cluster() { return current().block_of->rank; }

const void* at_rank(unsigned rank, const void* pointer, Place place) {
  if (rank >= blocks.size()) fail(place, "shared_of: rank %u of a cluster of %zu blocks", rank, blocks.size());
  long offset = dynamic_offset(pointer, *current().block_of);
  if (offset < 0) fail(place, "shared_of: %p does not lie in the block's dynamic shared memory", pointer);
  return blocks[rank]->dynamic + offset;
}

// ---- copies ----

void copy_later(const Copy& copy) { current().copies.push_back(copy); }
void copies_commit() { current().copy_groups.push_back(current().copies.size()); }

bool copy_due(int pending, Copy& copy) {
  Thread& me = current();
  size_t groups = me.copy_groups.size(), due = groups > (size_t)pending ? me.copy_groups[groups - pending - 1] : 0;
  if (me.copies_done >= due) return false;
  copy = me.copies[me.copies_done++];
  return true;
}

// ---- matrices of a warp ----

struct Rows { unsigned short row[8]; unsigned* r; };
struct Tile { float* d; const unsigned *a, *b; };

void ldmatrix(void* const (&lanes)[32]) {
  auto& records = of<Rows>(lanes);
  for (int lane = 0; lane < 32; lane++) {
    for (int m = 0; m < 4; m++) {
      const unsigned short* row = records[8 * m + lane / 4]->row + lane % 4 * 2;
      records[lane]->r[m] = row[0] | (unsigned)row[1] << 16;
    }
  }
}
void ldmatrix_trans(void* const (&lanes)[32]) {
  auto& records = of<Rows>(lanes);
  for (int lane = 0; lane < 32; lane++) {
    for (int m = 0; m < 4; m++) {
      auto row = &records[8 * m + lane % 4 * 2];
      records[lane]->r[m] = row[0]->row[lane / 4] | (unsigned)row[1]->row[lane / 4] << 16;
    }
  }
}

template <bool BF16> static void widen(const unsigned short* from, float* to, int count) {
  for (int i = 0; i < count; i++) {
    if constexpr (BF16) {
      unsigned bits = (unsigned)from[i] << 16;
      memcpy(&to[i], &bits, 4);
    } else {
      _Float16 value;
      memcpy(&value, &from[i], 2);
      to[i] = value;
    }
  }
}

// Rows of a (16 × 16) from the registers of 32 lanes; a(lane) gives the four of a lane.
template <class Registers> static void collect_a(unsigned short (&a)[16][16], Registers registers) {
  for (int lane = 0; lane < 32; lane++) {
    const unsigned* r = registers(lane);
    int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; i++) memcpy(&a[g + i % 2 * 8][t + i / 2 * 8], &r[i], 4);
  }
}

// d (16 × 8) += a b; sums in float, in the order of k.
static void multiply(const float (&a)[16][16], const float (&b)[16][8], float (&d)[16][8]) {
  for (int row = 0; row < 16; row++) {
    for (int k = 0; k < 16; k++) {
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    }
  }
}

template <bool BF16> static void mma(void* const (&lanes)[32]) {
  auto& tiles = of<Tile>(lanes);
  for (Tile* tile : tiles) {
    if (!tile) fail(current().place, "mma by a warp of fewer than 32 threads");
  }
  unsigned short a16[16][16], b16[16][8];
  float a[16][16], b[16][8], d[16][8];
  collect_a(a16, [&](int lane) { return tiles[lane]->a; });
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 2; i++) {
      b16[t + 8 * i][g] = tiles[lane]->b[i] & 0xffff;
      b16[t + 8 * i + 1][g] = tiles[lane]->b[i] >> 16;
    }
    for (int i = 0; i < 4; i++) d[g + i / 2 * 8][t + i % 2] = tiles[lane]->d[i];
  }
  widen<BF16>(a16[0], a[0], 256);
  widen<BF16>(b16[0], b[0], 128);
  multiply(a, b, d);
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) tiles[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}
void mma_f16(void* const (&lanes)[32]) { mma<false>(lanes); }
void mma_bf16(void* const (&lanes)[32]) { mma<true>(lanes); }

// ---- matrices of a warpgroup ----

void products_fence() { current().fenced = true; }

void product_later(const Product& product, Place place) {
  Thread& me = current();
  if (block_threads() % 128) fail(place, "wgmma: the block must be whole warpgroups of 128 threads");
  if (!me.fenced) fail(place, "wgmma: a wgmma_fence must come before the first product after a commit");
  me.products.push_back(product);
  if (me.lane == 0) {
    me.warp->products++;
    for (unsigned long long matrix : {product.a_matrix, product.b}) {
      me.warp->products_digest = (me.warp->products_digest ^ matrix) * 0x9e3779b97f4a7c15ull + product.accumulate;
    }
  }
}

void products_commit(Place) {
  Thread& me = current();
  me.product_groups.push_back(me.products.size());
  me.fenced = false;
}

// Where a byte of a matrix lies that is `offset` bytes from its start before the swizzle.
static const unsigned char* swizzled(unsigned long long matrix, unsigned offset, const Block& block) {
  unsigned address = (matrix & 0x3fff) << 4;
  address += offset;
  address ^= matrix >> 62 == 1 ? (address >> 7 & 7) << 4 : (address >> 7 & 3) << 4;
  long place = (long)address - SHARED_START;
  if (place < 0 || place + 16 > launch->shared) fail(current().place, "wgmma reads outside of dynamic shared memory");
#ifdef EMULATED_THREAD
  __tsan_read16(block.dynamic + place);
#endif
  return (unsigned char*)block.dynamic + place;
}

// Rows of 16 k of a K-major matrix. Read in pieces of 16 bytes, which the swizzle keeps together.
static void read_row(unsigned short (&values)[16], unsigned long long matrix, int row, const Block& block) {
  const unsigned stride = (matrix >> 32 & 0x3fff) << 4, row_bytes = matrix >> 62 == 1 ? 128 : 64;
  for (int k = 0; k < 16; k += 8) {
    memcpy(&values[k], swizzled(matrix, row / 8 * stride + row % 8 * row_bytes + k * 2, block), 16);
  }
}

// b as 16 rows of `columns` values.
static void collect_b(const Product& product, const Block& block, unsigned short (&b)[16][256]) {
  const unsigned leading = (product.b >> 16 & 0x3fff) << 4, stride = (product.b >> 32 & 0x3fff) << 4;
  const unsigned row_bytes = product.b >> 62 == 1 ? 128 : 64;
  if (!product.mn_major) {
    unsigned short row[16];
    for (int n = 0; n < product.columns; n++) {
      read_row(row, product.b, n, block);
      for (int k = 0; k < 16; k++) b[k][n] = row[k];
    }
    return;
  }
  const int in_row = row_bytes / 2;
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < product.columns; n += 8) {
      unsigned offset = k / 8 * stride + k % 8 * row_bytes + n / in_row * leading + n % in_row * 2;
      memcpy(&b[k][n], swizzled(product.b, offset, block), 16);
    }
  }
}

// The rows of one warp, as its lanes issued them.
static void multiply_rows(Product* const (&lanes)[32], int warp, const Block& block) {
  static float b[16][256], d[16][256];
  static unsigned short b16[16][256];
  const Product& first = *lanes[0];
  collect_b(first, block, b16);
  unsigned short a16[16][16];
  float a[16][16];
  if (first.a_shared) {
    for (int row = 0; row < 16; row++) read_row(a16[row], first.a_matrix, warp % 4 * 16 + row, block);
  } else {
    collect_a(a16, [&](int lane) { return lanes[lane]->a; });
  }
  if (first.bf16) {
    widen<true>(a16[0], a[0], 256);
    widen<true>(b16[0], b[0], 16 * 256);
  } else {
    widen<false>(a16[0], a[0], 256);
    widen<false>(b16[0], b[0], 16 * 256);
  }
  auto each = [&](auto action) {
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < first.columns / 2; i++) {
        action(lanes[lane]->d[i], d[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
      }
    }
  };
  each([&](float& register_, float& element) { element = first.accumulate ? register_ : 0.0f; });
  for (int row = 0; row < 16; row++) {
    for (int k = 0; k < 16; k++) {
      for (int column = 0; column < first.columns; column++) d[row][column] += a[row][k] * b[k][column];
    }
  }
  each([&](float& register_, float& element) { register_ = element; });
}

static void products_due(void* const (&lanes)[32]) {
  Thread* const(&warp)[32] = of<Thread>(lanes);
  Thread& first = *warp[0];
  for (size_t i = first.products_done; i < first.products_to_do; i++) {
    Product* products[32];
    for (int lane = 0; lane < 32; lane++) {
      Thread& thread = *warp[lane];
      if (thread.products_to_do != first.products_to_do || thread.products[i].b != first.products[i].b ||
          thread.products[i].a_matrix != first.products[i].a_matrix ||
          thread.products[i].accumulate != first.products[i].accumulate) {
        fail(first.place, "the lanes of a warp did not issue the same wgmma");
      }
      products[lane] = &thread.products[i];
    }
    multiply_rows(products, first.warp - first.block_of->warps.data(), *first.block_of);
  }
  for (Thread* thread : warp) thread->products_done = thread->products_to_do;
}

void products_wait(int pending, Place place) {
  Thread& me = current();
  size_t groups = me.product_groups.size();
  if (groups > (size_t)pending) me.products_to_do = me.product_groups[groups - pending - 1];
  me.place = place;
  // The lanes are ordered here, as the last to come reads shared memory for all.
  Gathering& gathering = gather(~0u, "wgmma_wait", &me, place);
  char* sync = &gathering.sync[gathering.phase & 1];
  gives(sync);
  if (gathering.arrived != gathering.mask) {
    wait("wgmma_wait", place);
  } else {
    takes(sync);
    products_due(gathering.records);
    gives(sync);
    scatter(gathering);
  }
  takes(sync);
}

}  // namespace emulated

// ---- a launch ----

extern "C" const char* emulated_launch(const emulated::Launch* what, void** with) {
  using namespace emulated;
  launch = what;
  arguments = with;
  failed = false;
  self = &main_thread;
  random_state = what->seed * 0x9e3779b97f4a7c15ull + 1;
#ifdef EMULATED_THREAD
  main_thread.fiber = __tsan_get_current_fiber();
#endif
#if !defined(EMULATED_ADDRESS) && !defined(EMULATED_THREAD)  // those tell more about a fault themselves
  FaultHandlers handlers;
  if (sigsetjmp(escape, 1)) {
    failed = true;
  } else
#endif
  {
    prepare_cluster();
    run_clusters();
  }
  self = &main_thread;
  for (auto& block : blocks) free(block->dynamic);
  blocks.clear();
  return failed ? message : nullptr;
}
