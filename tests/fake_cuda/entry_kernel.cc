// Modules and kernels. A kernel's parameters are copied at the call; its twin on the host runs
// later, as work of the stream.
#include <cstring>

#include "kernels/device_copy.h"
#include "tests/fake_cuda/entry.h"

namespace kvferry::fake_cuda {
namespace {

constexpr unsigned int kMaxThreads = 1024;
constexpr unsigned int kMaxGridX = 0x7fffffff;
constexpr unsigned int kMaxGrid = 0xffff;
constexpr unsigned int kSharedBytes = 48 << 10;  // without asking for more

// Reads only as far as it agrees: nobody says how long an image is.
bool is_our_image(const void* image) {
  const auto ours = kernels::kernel_image();
  const auto* bytes = static_cast<const volatile unsigned char*>(image);
  for (std::size_t i = 0; i < ours.size(); ++i) {
    if (bytes[i] != ours[i]) return false;
  }
  return !ours.empty();
}

bool is_known(const char* name) {
  for (const char* known : kernels::kernel_names()) {
    if (std::strcmp(known, name) == 0) return true;
  }
  return false;
}

CUresult run_twin(const DeviceView& view, const kernels::CopyArgs& args,
                  kernels::LaunchShape shape) {
  switch (kernels::run_copy_twin(view, args, shape)) {
    case kernels::TwinResult::kOk:
      return CUDA_SUCCESS;
    case kernels::TwinResult::kIllegalAddress:
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    case kernels::TwinResult::kMisalignedAddress:
      return CUDA_ERROR_MISALIGNED_ADDRESS;
  }
  return CUDA_ERROR_LAUNCH_FAILED;
}

}  // namespace

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return call("cuModuleLoadData", Needs::kContext, [&](Call& c) {
    if (module == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (!is_our_image(image)) return CUDA_ERROR_INVALID_IMAGE;
    *module = c.state.new_handle<CUmodule>();
    c.state.modules[*module] = {c.context};
    return CUDA_SUCCESS;
  });
}

// Waits for its kernels, with all else of the context.
CUresult cuModuleUnload(CUmodule module) {
  return call("cuModuleUnload", Needs::kContext, [&](Call& c) {
    const auto known = [&] {
      const auto found = c.state.modules.find(module);
      return found != c.state.modules.end() && found->second.context == c.context;
    };
    if (!known()) return CUDA_ERROR_INVALID_HANDLE;
    const CUresult waited = c.state.wait_for(c.lock, c.context, c.state.streams_of(*c.context));
    if (waited != CUDA_SUCCESS) return waited;
    if (!known()) return CUDA_ERROR_INVALID_HANDLE;
    c.state.modules.erase(module);
    std::erase_if(c.state.functions,
                  [&](const auto& entry) { return entry.second.module == module; });
    return CUDA_SUCCESS;
  });
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return call("cuModuleGetFunction", Needs::kContext, [&](Call& c) {
    if (function == nullptr || name == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const auto found = c.state.modules.find(module);
    if (found == c.state.modules.end() || found->second.context != c.context) {
      return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!is_known(name)) return CUDA_ERROR_NOT_FOUND;
    for (const auto& [handle, known] : c.state.functions) {
      if (known.module != module || known.name != name) continue;
      *function = handle;
      return CUDA_SUCCESS;
    }
    *function = c.state.new_handle<CUfunction>();
    c.state.functions[*function] = {module, name};
    return CUDA_SUCCESS;
  });
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return call("cuFuncSetAttribute", Needs::kContext, [&](Call& c) {
    if (!c.state.functions.contains(function)) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES &&
        attribute != CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    return value < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  });
}

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                        unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                        unsigned int block_z, unsigned int shared_bytes, CUstream handle,
                        void** parameters, void** extra) {
  return call("cuLaunchKernel", Needs::kContext, [&](Call& c) {
    const auto found = c.state.functions.find(function);
    const std::shared_ptr<Stream> stream = c.state.stream_of(c.context, handle);
    if (found == c.state.functions.end() || !stream ||
        c.state.modules.at(found->second.module).context != c.context) {
      return CUDA_ERROR_INVALID_HANDLE;
    }
    const uint64_t threads = uint64_t{block_x} * block_y * block_z;
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || threads == 0 || threads > kMaxThreads ||
        grid_x > kMaxGridX || grid_y > kMaxGrid || grid_z > kMaxGrid ||
        shared_bytes > kSharedBytes || parameters == nullptr || parameters[0] == nullptr ||
        extra != nullptr) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    // The twins know one dimension only.
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1) return CUDA_ERROR_INVALID_VALUE;
    kernels::CopyArgs args;
    std::memcpy(&args, parameters[0], sizeof args);
    // A kernel of one kind cannot be asked for another.
    if (found->second.name != kernels::kernel_name(args.kind)) return CUDA_ERROR_INVALID_VALUE;
    Work work;
    work.on_device = true;
    work.run = [args, grid_x, block_x](const DeviceView& view) {
      return run_twin(view, args, {grid_x, block_x});
    };
    c.state.submit(stream, std::move(work));
    return CUDA_SUCCESS;
  });
}

}  // namespace kvferry::fake_cuda
