#include "daemon/rpc/pool_messages.h"

#include <algorithm>

#include "daemon/rpc/worker_ops.h"

namespace kvferry::rpc {
namespace {

constexpr std::size_t kUuidBytes = 16;

Status check_no_proof(const v1::PoolSpec& spec, const std::string& field) {
  if (spec.has_proof_offset_bytes())
    return invalid(field + "proof_offset_bytes", "UNEXPECTED",
                   "pools that come as descriptors are not challenged");
  return {};
}

Status check_host_pool(const v1::PoolSpec& spec, const std::string& field) {
  if (spec.offset_bytes() != 0)
    return not_served(field + "offset_bytes", "host pools that begin inside a file");
  if (!spec.handle().empty())
    return invalid(field + "handle", "UNEXPECTED", "host pools come as descriptors");
  if (!spec.device_uuid().empty())
    return invalid(field + "device_uuid", "UNEXPECTED", "host pools have no device");
  return check_no_proof(spec, field);
}

Status check_device_pool(const v1::PoolSpec& spec, PoolKind kind, const std::string& field) {
  if (spec.offset_bytes() + spec.bytes() < spec.bytes())
    return invalid(field + "offset_bytes", "POOL_SIZE_INVALID", "no memory ends there");
  if (!is_value(kind) && !spec.handle().empty())
    return invalid(field + "handle", "UNEXPECTED", "this kind comes as descriptors");
  if (is_value(kind) && spec.handle().size() != sizeof(PoolRequest::handle))
    return invalid(field + "handle", "WRONG_SIZE",
                   std::to_string(spec.handle().size()) + " bytes, not 64");
  if (is_value(kind) && spec.bytes() < sizeof(PoolChallenge::nonce))
    return invalid(field + "bytes", "POOL_SIZE_INVALID", "too small for the 16 bytes of its proof");
  if (!is_value(kind)) KVFERRY_RETURN_IF_ERROR(check_no_proof(spec, field));
  if (spec.has_proof_offset_bytes() &&
      spec.proof_offset_bytes() > spec.bytes() - sizeof(PoolChallenge::nonce))
    return invalid(field + "proof_offset_bytes", "OUT_OF_RANGE",
                   "16 bytes from there do not lie in the pool");
  if (spec.device_uuid().size() != kUuidBytes)
    return invalid(field + "device_uuid", "WRONG_SIZE",
                   std::to_string(spec.device_uuid().size()) + " bytes, not 16");
  return {};
}

Result<PoolRequest> pool_of(const v1::PoolSpec& spec, const std::string& field,
                            const std::function<Status(PoolKind)>& check_kind) {
  PoolRequest pool;
  pool.name = spec.name();
  switch (spec.kind()) {
    case v1::POOL_KIND_HOST_SHM:
    case v1::POOL_KIND_CUDA_VMM_FD:
    case v1::POOL_KIND_CUDA_IPC:
    case v1::POOL_KIND_CUDA_FABRIC:
      pool.kind = static_cast<PoolKind>(spec.kind());
      break;
    default:
      return invalid(field + "kind", "UNKNOWN_VALUE", "no such kind of pool");
  }
  if (Status taken = check_kind(pool.kind); !taken) {
    Error error = std::move(taken).error();
    error.field = field + "kind";
    return tl::unexpected<Error>(std::move(error));
  }
  if (spec.bytes() == 0) return invalid(field + "bytes", "POOL_SIZE_INVALID", "0 bytes");
  if (pool.kind == PoolKind::kHostShm)
    KVFERRY_RETURN_IF_ERROR(check_host_pool(spec, field));
  else
    KVFERRY_RETURN_IF_ERROR(check_device_pool(spec, pool.kind, field));
  pool.bytes = spec.bytes();
  pool.offset_bytes = spec.offset_bytes();
  if (is_value(pool.kind))
    std::copy(spec.handle().begin(), spec.handle().end(), pool.handle.begin());
  if (spec.has_proof_offset_bytes()) pool.proof_offset_bytes = spec.proof_offset_bytes();
  pool.device_uuid.assign(spec.device_uuid().begin(), spec.device_uuid().end());
  return pool;
}

}  // namespace

std::string_view name_of(PoolKind kind) {
  switch (kind) {
    case PoolKind::kHostShm:
      return "host_shm";
    case PoolKind::kCudaVmmFd:
      return "cuda_vmm_fd";
    case PoolKind::kCudaIpc:
      return "cuda_ipc";
    case PoolKind::kCudaFabric:
      return "cuda_fabric";
  }
  return "unknown";
}

tl::unexpected<Error> bad_name(std::string field) {
  return invalid(std::move(field), "NAME_INVALID", "[A-Za-z0-9][A-Za-z0-9._:+-]{0,62}");
}

Status check_pool_names(const google::protobuf::RepeatedPtrField<std::string>& names,
                        const std::string& field, int most) {
  if (names.empty()) return invalid(field, "EMPTY", "names no pool");
  if (names.size() > most)
    return invalid(field, "POOL_COUNT", "at most " + std::to_string(most) + " pools");
  for (int i = 0; i < names.size(); ++i)
    if (!valid_name(names[i])) return bad_name(field + "[" + std::to_string(i) + "]");
  return {};
}

Result<std::vector<PoolRequest>> pools_of(const v1::RegisterPoolsRequest& request,
                                          const std::function<Status(PoolKind)>& check_kind) {
  if (request.pools_size() == 0 || request.pools_size() > kMaxPoolsPerCall)
    return invalid("pools", "POOL_COUNT", std::to_string(request.pools_size()) + ", not 1 to 64");
  std::vector<PoolRequest> pools;
  for (int i = 0; i < request.pools_size(); ++i) {
    const v1::PoolSpec& spec = request.pools(i);
    const std::string field = "pools[" + std::to_string(i) + "].";
    if (!valid_name(spec.name())) return bad_name(field + "name");
    for (const PoolRequest& other : pools)
      if (other.name == spec.name()) return invalid(field + "name", "NAME_TWICE", spec.name());
    auto pool = pool_of(spec, field, check_kind);
    KVFERRY_RETURN_IF_ERROR(pool);
    pools.push_back(std::move(*pool));
  }
  return pools;
}

void to_proto(const PoolsOutcome& outcome, v1::RegisterPoolsResponse& out) {
  out.set_existing(outcome.existing);
  for (const PoolChallenge& challenge : outcome.challenges) {
    v1::PoolChallenge& to = *out.add_challenges();
    to.set_pool(challenge.pool);
    to.set_offset_bytes(challenge.offset_bytes);
    to.set_nonce(challenge.nonce.data(), challenge.nonce.size());
  }
}

}  // namespace kvferry::rpc
