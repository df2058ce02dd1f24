// The other process of gpu_exporter.h. Ends with its socket.
#include <unistd.h>

#include <cstdio>
#include <map>

#include "kernels/cuda/driver.h"
#include "tests/unit/gpu_exporter.h"

namespace kvferry::gpu_test {
namespace {

using namespace kvferry::cuda;

constexpr uint64_t kGranularity = 2U << 20;

class Memory {
 public:
  explicit Memory(const Api& api) : api_(api) {}

  CUresult serve(const Request& request, Reply& reply, UniqueFd& fd) {
    CUcontext context = nullptr;
    CUresult result = context_of(request.device, context);
    if (result == CUDA_SUCCESS) result = api_.cuCtxSetCurrent(context);
    if (result != CUDA_SUCCESS) return result;
    switch (request.op) {
      case Op::kAlloc: {
        CUdeviceptr address = 0;
        result = api_.cuMemAlloc(&address, request.bytes);
        reply.address = address;
        return result == CUDA_SUCCESS ? handle(address, reply) : result;
      }
      case Op::kFree:
        return api_.cuMemFree(request.address);
      case Op::kHandle:
        return handle(request.address, reply);
      case Op::kVmmFd:
        return vmm(request, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, reply, fd);
      case Op::kVmmFabric:
        return vmm(request, CU_MEM_HANDLE_TYPE_FABRIC, reply, fd);
      case Op::kWrite:
        result =
            api_.cuMemcpyHtoDAsync(request.address, request.data.data(), request.bytes, nullptr);
        return result == CUDA_SUCCESS ? api_.cuStreamSynchronize(nullptr) : result;
    }
    return CUDA_ERROR_INVALID_VALUE;
  }

 private:
  CUresult context_of(int device, CUcontext& context) {
    const auto known = contexts_.find(device);
    if (known != contexts_.end()) {
      context = known->second;
      return CUDA_SUCCESS;
    }
    const CUresult result = api_.cuDevicePrimaryCtxRetain(&context, device);
    if (result == CUDA_SUCCESS) contexts_[device] = context;
    return result;
  }

  CUresult handle(CUdeviceptr address, Reply& reply) {
    CUipcMemHandle out{};
    const CUresult result = api_.cuIpcGetMemHandle(&out, address);
    std::memcpy(reply.handle.data(), &out, sizeof out);
    return result;
  }

  CUresult vmm(const Request& request, CUmemAllocationHandleType type, Reply& reply, UniqueFd& fd) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = type;
    properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, request.device};
    CUmemGenericAllocationHandle allocation = 0;
    CUdeviceptr address = 0;
    const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, request.device},
                                 CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUresult result = api_.cuMemCreate(&allocation, request.bytes, &properties, 0);
    if (result == CUDA_SUCCESS)
      result = api_.cuMemAddressReserve(&address, request.bytes, kGranularity, 0, 0);
    if (result == CUDA_SUCCESS) result = api_.cuMemMap(address, request.bytes, 0, allocation, 0);
    if (result == CUDA_SUCCESS) result = api_.cuMemSetAccess(address, request.bytes, &access, 1);
    reply.address = address;
    if (result != CUDA_SUCCESS) return result;
    if (type == CU_MEM_HANDLE_TYPE_FABRIC) {
      CUmemFabricHandle out{};
      result = api_.cuMemExportToShareableHandle(&out, allocation, type, 0);
      std::memcpy(reply.handle.data(), &out, sizeof out);
      return result;
    }
    int exported = -1;
    result = api_.cuMemExportToShareableHandle(&exported, allocation, type, 0);
    fd.reset(exported);
    return result;
  }

  const Api& api_;
  std::map<int, CUcontext> contexts_;
};

bool send_reply(const Reply& reply, const UniqueFd& fd) {
  Reply out = reply;
  iovec part{&out, sizeof out};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (fd) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    const int number = fd.get();
    std::memcpy(CMSG_DATA(header), &number, sizeof number);
  }
  return ::sendmsg(STDIN_FILENO, &message, MSG_NOSIGNAL) >= 0;
}

int run(const char* library) {
  auto driver = Driver::load(library);
  if (!driver) {
    std::fprintf(stderr, "gpu_exporter: %s\n", driver.error().to_string().c_str());
    return 1;
  }
  Memory memory((*driver)->api());
  Request request;
  while (::recv(STDIN_FILENO, &request, sizeof request, 0) ==
         static_cast<ssize_t>(sizeof request)) {
    Reply reply;
    UniqueFd fd;
    const CUresult result = memory.serve(request, reply, fd);
    if (result != CUDA_SUCCESS)
      std::fprintf(stderr, "gpu_exporter: operation %u: %s\n", static_cast<unsigned>(request.op),
                   (*driver)->name_of(result).c_str());
    reply.code = static_cast<int32_t>(result);
    reply.has_fd = fd ? 1 : 0;
    if (!send_reply(reply, fd)) return 1;
  }
  return 0;
}

}  // namespace
}  // namespace kvferry::gpu_test

int main(int argc, char** argv) {
  return argc == 2 ? kvferry::gpu_test::run(argv[1]) : 64;
}
