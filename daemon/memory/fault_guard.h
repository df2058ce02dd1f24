// Touching memory that another process can take away raises SIGBUS. Inside a guard that becomes a
// return value; anywhere else it stays what it was. Any thread, no locks, and cheap enough (no
// system call) to be taken for each piece of a copy.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace kvferry::memory {

// Puts the process-wide SIGBUS handler in place, once; what was there before gets the signals that
// no guard claims. The guard does it by itself; main calls it early so that the order is known.
// Ends the process if the kernel refuses.
void install_fault_guard();

// Runs body(context). False if it touched memory that could not be read or written: then it was
// left at that instruction, without unwinding, and `fault_address` (if given) holds where.
//
// So whatever runs inside holds no lock and owns nothing that a destructor would have to give back:
// it copies bytes. Guards may nest; the innermost catches.
bool run_guarded(void (*body)(void*), void* context, const void** fault_address = nullptr);

template <typename Body>
bool run_guarded(Body&& body, const void** fault_address = nullptr) {
  using Plain = std::remove_reference_t<Body>;
  return run_guarded([](void* context) { (*static_cast<Plain*>(context))(); },
                     const_cast<void*>(static_cast<const void*>(std::addressof(body))),
                     fault_address);
}

// memcpy under the guard; on false an unknown part of `bytes` has been copied.
bool guarded_copy(void* to, const void* from, std::size_t bytes,
                  const void** fault_address = nullptr);

}  // namespace kvferry::memory
