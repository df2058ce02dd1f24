// A child process that is none: it takes the set-up out of its channel and shows the shared memory
// to the fuzz target, which plays the rails process. Linked in place of
// daemon/rails/child_process.cc.
#include "tests/fuzz/fake_child.h"

#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>

#include "tests/fuzz/input.h"

namespace kvferry::fuzz {
FakeChild& fake_child() {
  static FakeChild child;
  return child;
}
}  // namespace kvferry::fuzz

namespace kvferry::rails {
namespace {

using fuzz::fake_child;

// The descriptors that came with the set-up, of which the first is the shared memory.
std::vector<UniqueFd> receive_setup(int channel, Setup& setup) {
  iovec part = {&setup, sizeof setup};
  alignas(cmsghdr) char control[CMSG_SPACE(64 * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = ::recvmsg(channel, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  FUZZ_CHECK(got == static_cast<ssize_t>(sizeof setup), "the set-up lies in the channel");
  std::vector<UniqueFd> fds;
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
  for (std::size_t i = 0; i < count; ++i) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
    fds.emplace_back(fd);
  }
  return fds;
}

}  // namespace

Result<ChildProcess> ChildProcess::spawn(const std::string&, const std::vector<std::string>&,
                                         const std::vector<std::string>&, const Ends& ends) {
  fuzz::FakeChild& child = fake_child();
  child = {};
  auto fds = receive_setup(ends.channel, child.setup);
  child.layout = SharedLayout::make(child.setup.limits, child.setup.rail_count);
  FUZZ_CHECK(child.layout && !fds.empty(), "the set-up is one that a child takes");
  auto memory = Mapping::map(fds.front().get(), child.layout->total_bytes());
  FUZZ_CHECK(memory.has_value(), "the shared memory can be mapped");
  child.memory = std::move(*memory);
  child.channel = UniqueFd(::dup(ends.channel));
  ChildProcess out;
  out.pidfd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC));
  out.pid_ = 1;
  return out;
}

void ChildProcess::kill() {
  fake_child().killed = true;
}

bool ChildProcess::reap(Exit& exit) {
  fuzz::FakeChild& child = fake_child();
  if (pid_ < 0 || !(child.killed || child.exited)) return false;
  exit.exited = !child.killed;
  exit.signal = child.killed ? 9 : 0;
  pid_ = -1;
  pidfd_.reset();
  return true;
}

void ChildProcess::end(Duration) {
  fake_child().killed = true;
  pid_ = -1;
  pidfd_.reset();
}

}  // namespace kvferry::rails
