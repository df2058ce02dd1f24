// What the rails process may do, and what it gives up: whoever takes it over through a UCX port has
// no more than this. Linux only; the list of system calls is in confinement.cc.
#pragma once

#include "daemon/base/result.h"
#include "daemon/rails/records.h"

namespace kvferry::rails {

// First of all in main, before any thread, as capabilities belong to threads: dies with its parent,
// gains no privileges, has no capabilities, leaves no core file, ignores SIGPIPE.
void drop_privileges();

// What the rails of a set-up need beyond TCP.
struct Needs {
  bool shm = false;      // files in /dev/shm and of peers under /proc
  bool devices = false;  // the CUDA driver's calls
  bool operator==(const Needs&) const = default;
};
Needs needs_of(const Setup& setup);

// Descriptors for every connection that the set-up's limits allow, as far as the inherited hard
// limit goes, and no more from then on.
void limit_descriptors(const Setup& setup);

// Without shm rails nobody of the same user may look into the process any more.
void hide(const Needs& needs);

// Once, when everything is made that connections do not make: from here on all threads of the
// process, those of libraries among them, have only the system calls that rails make while they
// work. Another one is not carried out: its name is said over `channel` and to standard error, and
// the process dies of SIGSYS. Fails with SECCOMP_UNAVAILABLE where the kernel has no such filter.
Status confine(const Needs& needs, int channel);

}  // namespace kvferry::rails
