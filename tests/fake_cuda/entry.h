// How the driver's entry points are written: each goes through call(), which counts it, makes it
// fail where a test has asked for that, and finds the current context.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "kernels/cuda/abi.h"
#include "kernels/cuda/functions.h"
#include "tests/fake_cuda/state.h"

#define KVFERRY_FAKE_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace kvferry::fake_cuda {

using namespace cuda;  // NOLINT: these files define its functions

// The entry points, so that each definition is compared with what the caller believes.
#define KVFERRY_FAKE_CUDA_DECLARE(name, symbol, version, need, parameters) \
  KVFERRY_FAKE_CUDA_EXPORT CUresult symbol parameters;
KVFERRY_CUDA_FUNCTIONS(KVFERRY_FAKE_CUDA_DECLARE)
#undef KVFERRY_FAKE_CUDA_DECLARE

// What must be there for a call.
enum class Needs : uint8_t {
  kNothing,
  kInit,          // cuInit was called
  kContext,       // ... and a context is current that works
  kKnownContext,  // ... also one that is broken
};

struct Call {
  State& state;
  std::unique_lock<std::mutex>& lock;
  std::shared_ptr<Context> context;  // with kContext and kKnownContext
};

CUresult current_context(Call& call);
// Whether the function gives something back. Those do it also when a test makes them fail: the
// driver's errors there are as a rule those of earlier work.
bool gives_back(const std::string& function);

template <typename Fn>
CUresult call(const char* name, Needs needs, Fn&& fn) {
  State& all = state();
  std::unique_lock<std::mutex> lock(all.mutex);
  if (all.forked) return CUDA_ERROR_NOT_INITIALIZED;
  Call c{all, lock, nullptr};
  const CUresult injected = all.count(name);
  if (injected != CUDA_SUCCESS) {
    if (is_sticky(injected) && current_context(c) == CUDA_SUCCESS) c.context->sticky = injected;
    if (is_sticky(injected) || !gives_back(name)) return injected;
  }
  if (needs != Needs::kNothing && !all.initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (needs == Needs::kContext || needs == Needs::kKnownContext) {
    if (const CUresult none = current_context(c); none != CUDA_SUCCESS) return none;
    if (needs == Needs::kContext) {
      const CUresult sticky = all.sticky_error(*c.context);
      if (sticky != CUDA_SUCCESS) return sticky;
    }
  }
  const CUresult result = std::forward<Fn>(fn)(c);
  return injected != CUDA_SUCCESS ? injected : result;
}

// Changes to the address space, and to who may touch it.
class Changing {
 public:
  explicit Changing(Call& c) : lock_(c.state.map_mutex) {}

 private:
  const std::unique_lock<std::shared_mutex> lock_;
};

}  // namespace kvferry::fake_cuda
