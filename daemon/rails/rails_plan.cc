#include "daemon/rails/rails_plan.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "daemon/rails/rails_capabilities.h"

namespace kvferry::rails {
namespace {

template <std::size_t N>
bool copy_name(char (&out)[N], const std::string& name) {
  if (name.size() >= N) return false;
  std::memcpy(out, name.c_str(), name.size() + 1);
  return true;
}

Status check_rails(const RailsConfig& config) {
  if (config.rails.empty() || config.rails.size() > kMaxRails)
    return invalid("rails", "RAILS_CONFIG_INVALID",
                   "1 to " + std::to_string(kMaxRails) + " rails are possible");
  uint64_t tcp_rails = 0;
  for (const RailSpec& rail : config.rails) {
    if (rail.transport != "tcp" && rail.transport != "shm")
      return invalid("rails.transport", "RAILS_CONFIG_INVALID",
                     "'" + rail.transport + "' is neither tcp nor shm");
    const bool good_device = std::all_of(rail.device.begin(), rail.device.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
             c == '_' || c == '-' || c == '.' || c == ':' || c == '@';
    });
    if (!good_device || rail.device.size() >= sizeof(SetupRail::device))
      return invalid("rails.device", "RAILS_CONFIG_INVALID", "not a device name");
    if (rail.transport == "tcp") ++tcp_rails;
  }
  const uint64_t ports = uint64_t{config.ucx.port_last} - config.ucx.port_first + 1;
  // The self-test has one listener more than there are rails.
  if (config.ucx.port_first != 0 && tcp_rails > 0 && ports < tcp_rails + 1)
    return invalid("rails.port_range", "PORT_RANGE_INVALID",
                   "needs one port more than there are tcp rails");
  if (!SharedLayout::make(config.limits, static_cast<uint32_t>(config.rails.size())))
    return invalid("rails.limits", "RAILS_CONFIG_INVALID", "a count is zero or too large");
  return {};
}

// Of a device segment only what can be seen without a driver.
Status check_segment(const Segment& segment, const std::string& field) {
  const auto wrong = [&](std::string what) {
    return invalid(field, "SEGMENT_INVALID", std::move(what));
  };
  if (!is_segment_kind(segment.kind)) return wrong("no such kind of memory");
  if (segment.bytes == 0) return wrong("has no bytes");
  const bool given = segment.handle != SegmentHandle{};
  const bool named = segment.device_uuid != DeviceUuid{};
  if (!has_handle(segment.kind) && given) return wrong("its kind has no handle");
  if (!has_descriptor(segment.kind) && segment.fd >= 0) return wrong("its kind has no descriptor");
  if (segment.kind == SegmentKind::kHost) {
    if (named) return wrong("host memory is on no device");
    if (auto sealed = check_sealed(segment.fd, segment.bytes); !sealed) {
      Error error = std::move(sealed).error();
      error.field = field;
      return tl::unexpected<Error>(std::move(error));
    }
    return {};
  }
  if (!named) return wrong("names no device");
  if (has_handle(segment.kind) && !given) return wrong("lacks its handle");
  if (has_descriptor(segment.kind) && ::fcntl(segment.fd, F_GETFD) < 0)
    return wrong("lacks its descriptor");
  return {};
}

// Fills in the set-up's segments; the descriptors of those that have one, in their order.
Result<std::vector<UniqueFd>> take_segments(std::span<const Segment> segments, Setup& setup) {
  if (segments.empty() || segments.size() > kMaxSegments)
    return invalid("segments", "SEGMENT_INVALID",
                   "1 to " + std::to_string(kMaxSegments) + " segments are possible");
  std::vector<UniqueFd> fds;
  setup.segment_count = static_cast<uint32_t>(segments.size());
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const Segment& segment = segments[i];
    KVFERRY_RETURN_IF_ERROR(check_segment(segment, "segments[" + std::to_string(i) + "]"));
    setup.segments[i] = {segment.kind, 0, segment.bytes, segment.device_uuid, segment.handle};
    if (!has_descriptor(segment.kind)) continue;
    if (!fds.emplace_back(::fcntl(segment.fd, F_DUPFD_CLOEXEC, 4)))
      return fail_errno("SEGMENT_INVALID", "fcntl(F_DUPFD_CLOEXEC)", errno);
  }
  return fds;
}

}  // namespace

Result<RailsPlan> plan_rails(const RailsConfig& config, std::span<const Segment> segments) {
  KVFERRY_RETURN_IF_ERROR(check_rails(config));
  auto executable = find_rails_executable(config.executable);
  if (!executable) return tl::unexpected<Error>(executable.error());
  auto environment = make_rails_environment(config.ucx);
  if (!environment) return tl::unexpected<Error>(environment.error());
  RailsPlan out;
  RailsProcess::Plan& plan = out.process;
  plan.executable = std::move(*executable);
  plan.environment = std::move(*environment);
  const bool on_device = std::any_of(segments.begin(), segments.end(),
                                     [](const Segment& s) { return is_on_device(s.kind); });
  if (on_device) {
    auto more = inherited_driver_environment();
    std::move(more.begin(), more.end(), std::back_inserter(plan.environment));
  }
  for (const std::string& line : config.unchecked_environment) {
    const std::string name = line.substr(0, line.find('=') + 1);
    std::erase_if(plan.environment, [&](const std::string& l) { return l.starts_with(name); });
    plan.environment.push_back(line);
  }
  Setup& setup = plan.setup;
  setup.rail_count = static_cast<uint32_t>(config.rails.size());
  auto fds = take_segments(segments, setup);
  if (!fds) return tl::unexpected<Error>(fds.error());
  for (const UniqueFd& fd : *fds) plan.segment_fds.push_back(fd.get());
  out.segment_fds = std::move(*fds);
  if (!copy_name(setup.cuda_driver, config.cuda_driver))
    return invalid("gpu.driver", "RAILS_CONFIG_INVALID", "the path is too long");
  setup.limits = config.limits;
  setup.confined = config.seccomp == Seccomp::kOn ? 1 : 0;
  setup.spin_ns = static_cast<uint64_t>(std::max<int64_t>(config.spin.count(), 0));
  setup.port_first = config.ucx.port_first;
  setup.port_last = config.ucx.port_last;
  for (std::size_t i = 0; i < config.rails.size(); ++i) {
    setup.rails[i].cpus = config.rails[i].cpus;
    if (!copy_name(setup.rails[i].transport, config.rails[i].transport) ||
        !copy_name(setup.rails[i].device, config.rails[i].device))
      return invalid("rails", "RAILS_CONFIG_INVALID", "a name is too long");
  }
  return out;
}

}  // namespace kvferry::rails
