#include "daemon/memory/fault_guard.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstring>
#include <mutex>

#include "daemon/base/check.h"

namespace kvferry::memory {
namespace {

struct Frame {
  sigjmp_buf jump;
  Frame* outer;
  const void* address;
  sigset_t mask;  // of the thread at the fault
};

// Read by the signal handler, so it must not need allocation at first touch.
[[gnu::tls_model("initial-exec")]] constinit thread_local Frame* innermost = nullptr;
[[gnu::tls_model("initial-exec")]] constinit thread_local bool unblocked = false;

struct sigaction previous_action;

// An access that failed, as opposed to a signal that somebody sent or to the early warning of a bad
// memory page that nobody has touched.
bool is_access_fault(int code) {
  return code == BUS_ADRALN || code == BUS_ADRERR || code == BUS_OBJERR || code == BUS_MCEERR_AR;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if ((previous_action.sa_flags & SA_SIGINFO) != 0) {
    previous_action.sa_sigaction(signal, info, context);
    return;
  }
  const bool fault = is_access_fault(info->si_code);
  if (previous_action.sa_handler == SIG_IGN && !fault) return;
  if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
    return;
  }
  struct sigaction fatal {};
  fatal.sa_handler = SIG_DFL;
  ::sigaction(SIGBUS, &fatal, nullptr);
  // A failed access is repeated when the handler returns and ends the process then, with the right
  // registers in its core dump; a signal that was sent has to be sent anew.
  if (!fault) ::raise(signal);
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  Frame* const frame = innermost;
  if (frame == nullptr || !is_access_fault(info->si_code)) {
    pass_on(signal, info, context);
    return;
  }
  frame->address = info->si_addr;
  frame->mask = static_cast<const ucontext_t*>(context)->uc_sigmask;
  siglongjmp(frame->jump, 1);
}

}  // namespace

void install_fault_guard() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_sigaction = on_bus_error;
    sigemptyset(&action.sa_mask);
    action.sa_flags = SA_SIGINFO;
    KVFERRY_CHECK(::sigaction(SIGBUS, nullptr, &previous_action) == 0, "SIGBUS can be asked for");
    KVFERRY_CHECK(::sigaction(SIGBUS, &action, nullptr) == 0, "SIGBUS can be handled");
  });
}

bool run_guarded(void (*body)(void*), void* context, const void** fault_address) {
  install_fault_guard();
  if (!unblocked) {
    // A thread that inherited a mask with SIGBUS in it would be killed instead of asked.
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &mask, nullptr);
    unblocked = true;
  }
  Frame frame;
  frame.outer = innermost;
  frame.address = nullptr;
  sigemptyset(&frame.mask);
  // The signal mask is not saved here, since that costs a system call each time; the handler finds
  // it where the kernel has put it.
  if (sigsetjmp(frame.jump, 0) != 0) {
    innermost = frame.outer;
    pthread_sigmask(SIG_SETMASK, &frame.mask, nullptr);
    if (fault_address != nullptr) *fault_address = frame.address;
    return false;
  }
  innermost = &frame;
  // The compiler does not see that the handler reads it.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  body(context);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  innermost = frame.outer;
  return true;
}

bool guarded_copy(void* to, const void* from, std::size_t bytes, const void** fault_address) {
  return run_guarded([=] { std::memcpy(to, from, bytes); }, fault_address);
}

}  // namespace kvferry::memory
