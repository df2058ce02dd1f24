// The kernels. All of their work is in copy_lane.h; here is how a GPU reads and writes.
#include "kernels/copy_lane.h"

namespace kvferry::kernels {
namespace {

// Whatever a launch reads, its plan, its pages or its chunk, nobody writes while it runs: the
// worker has said that its pages are ready, a chunk has landed, and source and destination do not
// overlap. So all loads may go the read-only way. Data is read once and need not stay in L1.
struct DeviceMemory {
  template <typename T>
  __device__ __forceinline__ T read(uint64_t address) const {
    if constexpr (sizeof(T) % sizeof(uint4) == 0) {
      T value;
      const auto* words = reinterpret_cast<const uint4*>(address);
#pragma unroll
      for (uint32_t i = 0; i < sizeof(T) / sizeof(uint4); ++i)
        reinterpret_cast<uint4*>(&value)[i] = __ldg(words + i);
      return value;
    } else {
      return __ldg(reinterpret_cast<const T*>(address));
    }
  }

  template <uint32_t kWidth>
  __device__ __forceinline__ Vector load(uint64_t address) const {
    Vector v{};
    if constexpr (kWidth == 16) {
      asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
          : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
          : "l"(address));
    } else if constexpr (kWidth == 8) {
      asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
          : "=r"(v.words[0]), "=r"(v.words[1])
          : "l"(address));
    } else if constexpr (kWidth == 4) {
      asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v.words[0]) : "l"(address));
    } else if constexpr (kWidth == 2) {
      v.words[0] = __ldg(reinterpret_cast<const unsigned short*>(address));
    } else {
      v.words[0] = __ldg(reinterpret_cast<const unsigned char*>(address));
    }
    return v;
  }

  template <uint32_t kWidth, Store kStore>
  __device__ __forceinline__ void store(uint64_t address, const Vector& v) const {
    if constexpr (kWidth == 16)
      put<kStore>(reinterpret_cast<uint4*>(address),
                  make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]));
    else if constexpr (kWidth == 8)
      put<kStore>(reinterpret_cast<uint2*>(address), make_uint2(v.words[0], v.words[1]));
    else if constexpr (kWidth == 4)
      put<kStore>(reinterpret_cast<unsigned int*>(address), v.words[0]);
    else if constexpr (kWidth == 2)
      put<kStore>(reinterpret_cast<unsigned short*>(address),
                  static_cast<unsigned short>(v.words[0]));
    else
      put<kStore>(reinterpret_cast<unsigned char*>(address),
                  static_cast<unsigned char>(v.words[0]));
  }

 private:
  template <Store kStore, typename T>
  static __device__ __forceinline__ void put(T* to, T value) {
    if constexpr (kStore == Store::kStream)
      __stcs(to, value);
    else
      __stwb(to, value);
  }
};

template <typename Copy>
__device__ __forceinline__ void copy_thread(const CopyArgs& args) {
  constexpr uint32_t kWarps = kBlockThreads / kLanes;
  copy_lane<Copy>(DeviceMemory(), args, blockIdx.x * kWarps + threadIdx.x / kLanes,
                  gridDim.x * kWarps, threadIdx.x % kLanes);
}

}  // namespace
}  // namespace kvferry::kernels

// The blocks for each SM are what the registers allow without spilling; launch_shape() counts on
// them.
extern "C" __global__ void __launch_bounds__(kvferry::kernels::kBlockThreads,
                                             kvferry::kernels::kCopyBlocksPerSm)
    kvferry_copy(const __grid_constant__ kvferry::kernels::CopyArgs args) {
  kvferry::kernels::copy_thread<kvferry::kernels::FlatCopy>(args);
}

extern "C" __global__ void __launch_bounds__(kvferry::kernels::kBlockThreads,
                                             kvferry::kernels::kTransferBlocksPerSm)
    kvferry_transfer(const __grid_constant__ kvferry::kernels::CopyArgs args) {
  kvferry::kernels::copy_thread<kvferry::kernels::PagesCopy>(args);
}
