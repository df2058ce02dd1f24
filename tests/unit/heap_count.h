// Counts what is on the heap. It replaces the operators: for one source file of a binary of its
// own, without threads, and not with the sanitizers, which have operators too.
#pragma once

#include <malloc.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {
uint64_t heap_bytes = 0;
[[maybe_unused]] uint64_t heap_peak = 0;  // since somebody set it to heap_bytes
[[maybe_unused]] uint64_t allocations = 0;
}  // namespace

// Not inlined: the compiler takes the pair for mismatched where it sees into one of them.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  void* memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  heap_bytes += malloc_usable_size(memory);
  heap_peak = std::max(heap_peak, heap_bytes);
  ++allocations;
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  if (memory == nullptr) return;
  heap_bytes -= malloc_usable_size(memory);
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  operator delete(memory);
}
