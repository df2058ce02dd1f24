// Keeps a client's descriptors out of forked children: a child that held a lifeline open would make
// a dead worker look alive. Registered descriptors are closed in every child of fork(); children
// that exec lose them by close-on-exec anyway. Any thread.
#pragma once

#include <cstdint>

namespace kvferry::client {

// Closed in children until removed. Beyond a few thousand descriptors nothing is registered.
void close_in_children(int fd);
void keep_no_more(int fd);
// Rises in each child of fork(): what was made under another number is dead here.
uint64_t fork_generation();

}  // namespace kvferry::client
