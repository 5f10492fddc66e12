// A program that runs one launch under a sanitizer: runner LIBRARY KERNEL LAUNCH RESULT. The file LAUNCH holds numbers
// of 8 bytes: grid, block, blocks that run at once, bytes of dynamic shared memory, seed, counts of regions and of arguments; for each region of
// memory its bytes, its place in 256 bytes, whether holes are marked, then its content and the marks (1: a hole); for
// each argument its region (-1: none) and its offset there or its value. RESULT gets the contents afterwards.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "machine.h"

#ifdef EMULATED_ADDRESS
#include <sanitizer/asan_interface.h>
static void forbid(const char* from, long bytes) { __asan_poison_memory_region(from, bytes); }
static void allow(const char* from, long bytes) { __asan_unpoison_memory_region(from, bytes); }
#else
static void forbid(const char*, long) {}
static void allow(const char*, long) {}
#endif

struct Region { char *memory, *content; long bytes; };

static void give_up(const char* message) {
  fprintf(stderr, "EMULATED: %s\n", message);
  exit(3);
}

static FILE* file;
static void read(void* to, long bytes) {
  if (fread(to, 1, bytes, file) != (size_t)bytes) give_up("the file of a launch is too short");
}
static long number() {
  long value;
  read(&value, sizeof value);
  return value;
}

// Memory of exactly this size, so that the sanitizer forbids what lies around it.
static Region read_region() {
  long bytes = number(), place = number(), holes = number();
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, place + bytes)) give_up("out of memory");
  Region region{(char*)memory, (char*)memory + place, bytes};
  read(region.content, bytes);
  forbid(region.memory, place);
  if (holes) {
    std::vector<char> marks(bytes);
    read(marks.data(), bytes);
    for (long from = 0, to; from < bytes; from = to) {
      for (to = from; to < bytes && marks[to] == marks[from];) to++;
      if (marks[from]) forbid(region.content + from, to - from);
    }
  }
  return region;
}

int main(int, char** argv) {
  file = fopen(argv[3], "rb");
  if (!file) give_up("the file of a launch cannot be read");
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) give_up(dlerror());
  auto find = (const emulated::Entry* (*)())dlsym(library, (std::string("entry_") + argv[2]).c_str());
  if (!find) give_up(dlerror());

  emulated::Entry entry = *find();
  emulated::Launch launch{&entry, argv[2], {}, {}, 0, 0};
  for (int& size : launch.grid) size = number();
  for (int& size : launch.block) size = number();
  for (int& size : entry.cluster) size = number();
  launch.shared = number();
  launch.seed = number();
  std::vector<Region> regions(number());
  std::vector<long> values(number());
  for (Region& region : regions) region = read_region();
  std::vector<void*> arguments;
  for (long& value : values) {
    long region = number();
    value = number();
    if (region >= 0) value = (long)(regions[region].content + value);
    arguments.push_back(&value);
  }
  fclose(file);

  if (const char* error = emulated_launch(&launch, arguments.data())) give_up(error);

  file = fopen(argv[4], "wb");
  for (Region& region : regions) {
    allow(region.memory, region.content + region.bytes - region.memory);
    fwrite(region.content, 1, region.bytes, file);
  }
  fclose(file);
}
