// What a crash leaves behind: the signal and the stack of the thread that it struck, with the names
// of functions, on stderr; then the process ends by the signal as it would have. Nothing of
// memory's contents is written.
#pragma once

namespace kvferry::ops {

// For SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT and SIGTRAP. Before threads and before other
// handlers, which are to pass on what is not theirs. `program` is argv[0].
void install_crash_handler(const char* program);

}  // namespace kvferry::ops
