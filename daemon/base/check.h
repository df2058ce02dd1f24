// Broken invariants end the process: going on would mean copying into memory that belongs to
// somebody else. The service manager restarts the daemon and the peers' leases end by themselves.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace kvferry {

[[noreturn]] inline void die(const char* what, const char* file, int line) {
  std::fprintf(stderr, "kvferry: broken invariant: %s (%s:%d)\n", what, file, line);
  std::abort();
}

// Holds in every build, also without assertions. `what` says in words what must be true.
#define KVFERRY_CHECK(condition, what)                            \
  do {                                                            \
    if (!(condition)) ::kvferry::die((what), __FILE__, __LINE__); \
  } while (false)

}  // namespace kvferry
