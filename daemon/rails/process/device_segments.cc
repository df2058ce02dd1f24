#include "daemon/rails/process/device_segments.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvferry::rails {
namespace {

using gpu::ArenaKind;
using gpu::Device;
using gpu::Uuid;

tl::unexpected<Error> refuse(std::string reason, std::string message) {
  return fail(Code::kFailedPrecondition, std::move(reason), std::move(message));
}

std::string name_of_segment(uint32_t index) {
  return "segment " + std::to_string(index);
}

// The devices by UUID, without a context on each: that costs memory of the device.
class DeviceFinder {
 public:
  explicit DeviceFinder(std::shared_ptr<const cuda::Driver> driver) : driver_(std::move(driver)) {}

  Result<std::shared_ptr<const Device>> open(const Uuid& uuid) const {
    const cuda::Api& api = driver_->api();
    int count = 0;
    if (const auto result = api.cuDeviceGetCount(&count); result != cuda::CUDA_SUCCESS)
      return refuse("CUDA_DRIVER", driver_->error(result, "cuDeviceGetCount").to_string());
    std::string seen;
    for (int ordinal = 0; ordinal < count; ++ordinal) {
      cuda::CUdevice handle{};
      cuda::CUuuid told{};
      if (api.cuDeviceGet(&handle, ordinal) != cuda::CUDA_SUCCESS ||
          api.cuDeviceGetUuid(&told, handle) != cuda::CUDA_SUCCESS)
        continue;
      Uuid have{};
      static_assert(sizeof told.bytes == std::tuple_size_v<Uuid>);
      std::transform(std::begin(told.bytes), std::end(told.bytes), have.begin(),
                     [](auto byte) { return static_cast<uint8_t>(byte); });
      if (have == uuid) return Device::open(driver_, ordinal);
      seen += (seen.empty() ? "" : ", ") + gpu::to_string(have);
    }
    return refuse("DEVICE_UNKNOWN", gpu::to_string(uuid) + " is not seen by kvferry-rails, but " +
                                        (seen.empty() ? std::string("no device") : seen) + " is");
  }

 private:
  const std::shared_ptr<const cuda::Driver> driver_;
};

ArenaKind arena_kind(SegmentKind kind) {
  switch (kind) {
    case SegmentKind::kFabricVmm:
      return ArenaKind::kFabricVmm;
    case SegmentKind::kDeviceVmm:
      return ArenaKind::kDeviceVmm;
    case SegmentKind::kCudaMalloc:
    case SegmentKind::kHost:  // is never asked for
      break;
  }
  return ArenaKind::kCudaMalloc;
}

gpu::ExportedSegment exported(const SetupSegment& told, UniqueFd fd) {
  gpu::ExportedSegment out;
  out.kind = arena_kind(told.kind);
  out.fd = std::move(fd);
  static_assert(std::is_same_v<gpu::HandleValue, SegmentHandle>);
  static_assert(std::is_same_v<gpu::Uuid, DeviceUuid>);
  out.handle = told.handle;
  out.bytes = told.bytes;
  out.device_uuid = told.device_uuid;
  return out;
}

// The numbers of the device's segments.
std::vector<uint32_t> segments_on(const ProcessSetup& setup, const Uuid& uuid) {
  std::vector<uint32_t> numbers;
  for (uint32_t i = 0; i < setup.setup.segment_count; ++i)
    if (setup.segments[i].on_device && setup.setup.segments[i].device_uuid == uuid)
      numbers.push_back(i);
  return numbers;
}

}  // namespace

Result<DeviceSegments> DeviceSegments::import(ProcessSetup& setup) {
  DeviceSegments out;
  std::optional<DeviceFinder> finder;
  for (uint32_t i = 0; i < setup.setup.segment_count; ++i) {
    const Uuid& uuid = setup.setup.segments[i].device_uuid;
    if (!setup.segments[i].on_device || setup.segments[i].base != nullptr) continue;
    if (!finder) {
      const std::string library = setup.setup.cuda_driver;
      auto driver = cuda::Driver::load(library.empty() ? cuda::Driver::kDefaultLibrary : library);
      if (!driver)
        return refuse("CUDA_DRIVER", name_of_segment(i) + " is GPU memory, but the CUDA driver " +
                                         "cannot be used: " + driver.error().to_string());
      finder.emplace(std::move(*driver));
    }
    auto device = finder->open(uuid);
    if (!device) {
      Error error = std::move(device).error();
      error.message = name_of_segment(i) + ": " + error.message;
      return tl::unexpected<Error>(std::move(error));
    }
    const std::vector<uint32_t> numbers = segments_on(setup, uuid);
    std::vector<gpu::ExportedSegment> segments;
    for (const uint32_t number : numbers)
      segments.push_back(
          exported(setup.setup.segments[number], std::move(setup.device_fds[number])));
    auto view = gpu::DeviceArenaView::open(*device, std::move(segments));
    if (!view) {
      Error error = std::move(view).error();
      error.message = "import of " + std::to_string(numbers.size()) + " segments of " +
                      gpu::to_string(uuid) + " from " + name_of_segment(numbers.front()) +
                      " on: " + error.message;
      return tl::unexpected<Error>(std::move(error));
    }
    for (uint32_t k = 0; k < numbers.size(); ++k) {
      SegmentMemory& segment = setup.segments[numbers[k]];
      // All of the segment: address_of() knows its size.
      segment.base = reinterpret_cast<std::byte*>(*(*view)->address_of({k, 0, segment.bytes}));
    }
    out.devices_.push_back(std::move(*device));
    out.views_.push_back(std::move(*view));
  }
  return out;
}

}  // namespace kvferry::rails
