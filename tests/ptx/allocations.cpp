#include "allocations.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>

extern "C" {
extern char __executable_start, __data_start, _end;
void* __real_mmap(void*, size_t, int, int, int, off_t);
int __real_munmap(void*, size_t);
}

namespace quaver::ptx {

namespace {

thread_local int unregistered = 0;

std::mutex& mutex() {
  static std::mutex m;
  return m;
}

void add_program(Memory* memory) {
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  memory->add(stack, bytes);
  memory->add(&__executable_start, static_cast<size_t>(&__data_start - &__executable_start), false);
  memory->add(&__data_start, static_cast<size_t>(&_end - &__data_start));
}

void* allocate(size_t bytes, size_t align) {
  if (bytes == 0) bytes = 1;
  void* memory = nullptr;
  if (posix_memalign(&memory, align, bytes) != 0) throw std::bad_alloc();
  if (unregistered == 0) {
    const std::lock_guard<std::mutex> lock(mutex());
    host_memory().add(memory, bytes);
  }
  return memory;
}

void release(void* memory) {
  if (!memory) return;
  {
    const std::lock_guard<std::mutex> lock(mutex());
    host_memory().remove(memory);
  }
  std::free(memory);
}

constexpr size_t kAlign = 128;  // of whole sectors and lines, so that counts repeat

}  // namespace

// Never destroyed: objects with static storage are released after it would be.
Memory& host_memory() {
  static Memory* memory = [] {
    void* place = std::malloc(sizeof(Memory));
    auto* made = new (place) Memory;
    add_program(made);
    return made;
  }();
  return *memory;
}

Unregistered::Unregistered() { ++unregistered; }
Unregistered::~Unregistered() { --unregistered; }

}  // namespace quaver::ptx

void* operator new(size_t n) { return quaver::ptx::allocate(n, quaver::ptx::kAlign); }
void* operator new[](size_t n) { return quaver::ptx::allocate(n, quaver::ptx::kAlign); }
void* operator new(size_t n, std::align_val_t a) {
  return quaver::ptx::allocate(n, static_cast<size_t>(a));
}
void operator delete(void* p) noexcept { quaver::ptx::release(p); }
void operator delete[](void* p) noexcept { quaver::ptx::release(p); }
void operator delete(void* p, size_t) noexcept { quaver::ptx::release(p); }
void operator delete[](void* p, size_t) noexcept { quaver::ptx::release(p); }
void operator delete(void* p, std::align_val_t) noexcept { quaver::ptx::release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { quaver::ptx::release(p); }

// The linker gives the program's own calls these (--wrap).
extern "C" void* __wrap_mmap(void* at, size_t bytes, int protection, int flags, int file,
                             off_t from) {
  void* memory = __real_mmap(at, bytes, protection, flags, file, from);
  if (memory != MAP_FAILED) quaver::ptx::host_memory().add(memory, bytes);
  return memory;
}

extern "C" int __wrap_munmap(void* memory, size_t bytes) {
  quaver::ptx::host_memory().remove(memory);
  return __real_munmap(memory, bytes);
}
