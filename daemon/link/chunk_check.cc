#include "daemon/link/chunk_check.h"

#include <xxhash.h>

#include <algorithm>

#include "daemon/base/crypto.h"

namespace kvferry::link {

engine::Check ChunkCheck::of(std::span<const std::byte> data) const {
  engine::Check check;
  check.kind = kind_;
  check.number = number_;
  if (kind_ == engine::CheckKind::kXxh3) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data.data(), data.size()));
    std::copy(std::begin(canonical.digest), std::end(canonical.digest), check.value.begin());
  } else if (kind_ == engine::CheckKind::kGmac) {
    check.value =
        gmac_aes128(key_.bytes, {reinterpret_cast<const uint8_t*>(data.data()), data.size()});
  }
  return check;
}

bool ChunkCheck::matches(std::span<const std::byte> data, const engine::Check& check) const {
  const engine::Check right = of(data);
  return right.kind == check.kind && right.number == check.number &&
         equal_constant_time(right.value, check.value);
}

}  // namespace kvferry::link
