#include "daemon/link/envelope.h"

#include <algorithm>

#include "daemon/base/check.h"

namespace kvferry::link {
namespace {

constexpr std::string_view kLabel = "kvferry message 1";
constexpr std::string_view kChunkLabel = "kvferry chunk 1";
constexpr uint8_t kMagic[2] = {'K', 'V'};

template <typename U>
void put(uint8_t* at, U value) {
  for (std::size_t i = 0; i < sizeof(U); ++i)
    at[i] = static_cast<uint8_t>(uint64_t{value} >> (8 * i));
}
template <typename U>
U get(const uint8_t* at) {
  uint64_t value = 0;
  for (std::size_t i = 0; i < sizeof(U); ++i) value |= uint64_t{at[i]} << (8 * i);
  return static_cast<U>(value);
}

}  // namespace

struct LinkTable::Entry {
  LinkId link;
  Mac out;
  Mac in;
  Mac data_out;
  Mac data_in;
  uint8_t out_id;
  uint8_t in_id;
  uint64_t out_selector;
  uint64_t in_selector;
};

LinkTable::LinkTable() = default;
LinkTable::~LinkTable() = default;

void LinkTable::add(LinkId link, const LinkKeys& keys) {
  KVFERRY_CHECK(!links_.contains(link) && !by_selector_.contains(keys.in.selector),
                "a link is added once");
  auto entry = std::make_unique<Entry>(Entry{
      link, Mac(keys.out.control), Mac(keys.in.control), Mac(keys.out.data), Mac(keys.in.data),
      keys.out.control_id, keys.in.control_id, keys.out.selector, keys.in.selector});
  by_selector_.emplace(keys.in.selector, entry.get());
  links_.emplace(link, std::move(entry));
}

void LinkTable::remove(LinkId link) {
  const auto it = links_.find(link);
  if (it == links_.end()) return;
  by_selector_.erase(it->second->in_selector);
  links_.erase(it);
}

bool LinkTable::contains(LinkId link) const {
  return links_.contains(link);
}

std::optional<ChunkKey> LinkTable::chunk_key(LinkId link, bool sent, uint64_t number) {
  const auto it = links_.find(link);
  if (it == links_.end()) return std::nullopt;
  std::array<uint8_t, 8> bytes{};
  put(bytes.data(), number);
  return ChunkKey(
      (sent ? it->second->data_out : it->second->data_in).tag({bytes_of(kChunkLabel), bytes}));
}

template <typename M>
Status LinkTable::seal_any(const engine::LaneRef& lane, uint64_t number, MessageType type,
                           const M& message, std::vector<uint8_t>& out) {
  const auto it = links_.find(lane.link);
  if (it == links_.end()) return fail(Code::kNotFound, "UNKNOWN_LINK", "the link has ended");
  Entry& entry = *it->second;
  out.clear();
  out.resize(kHeaderBytes);
  KVFERRY_RETURN_IF_ERROR(encode_body(message, out));
  uint8_t* header = out.data();
  std::copy(std::begin(kMagic), std::end(kMagic), header);
  header[2] = kWireVersion;
  header[3] = entry.out_id;
  header[4] = static_cast<uint8_t>(type);
  put(header + 8, entry.out_selector);
  put(header + 16, lane.lane);
  put(header + 20, lane.epoch);
  put(header + 24, number);
  put(header + 32, static_cast<uint32_t>(out.size() - kHeaderBytes));
  const TagBytes tag = entry.out.tag({bytes_of(kLabel), out});
  out.insert(out.end(), tag.begin(), tag.end());
  return {};
}

Status LinkTable::seal(const engine::LaneRef& lane, uint64_t sequence,
                       const engine::ControlMessage& message, std::vector<uint8_t>& out) {
  return seal_any(lane, sequence, type_of(message), message, out);
}
Status LinkTable::seal(const engine::LaneRef& lane, const engine::MsgOffer& offer,
                       std::vector<uint8_t>& out) {
  return seal_any(lane, offer.offer.value, MessageType::kOffer, offer, out);
}
Status LinkTable::seal(const engine::LaneRef& lane, const engine::MsgRefuse& refuse,
                       std::vector<uint8_t>& out) {
  return seal_any(lane, refuse.offer.value, MessageType::kRefuse, refuse, out);
}

Result<Opened> LinkTable::open(Bytes sealed) {
  opened_lane_.reset();
  const uint8_t* header = sealed.data();
  if (sealed.size() < kOverheadBytes || sealed.size() > kMaxSealedBytes || header[0] != kMagic[0] ||
      header[1] != kMagic[1] || header[2] != kWireVersion || header[5] != 0 || header[6] != 0 ||
      header[7] != 0 || get<uint32_t>(header + 32) != sealed.size() - kOverheadBytes)
    return invalid("header", "BAD_ENVELOPE", "not a message of this protocol");
  const auto it = by_selector_.find(get<uint64_t>(header + 8));
  if (it == by_selector_.end())
    return fail(Code::kNotFound, "UNKNOWN_LINK", "no link has this selector");
  Entry& entry = *it->second;
  const Bytes tagged = sealed.first(sealed.size() - kTagBytes);
  const TagBytes tag = entry.in.tag({bytes_of(kLabel), tagged});
  if (!equal_constant_time(tag, sealed.last(kTagBytes)) || header[3] != entry.in_id)
    return fail(Code::kPermissionDenied, "BAD_TAG", "the message's tag is wrong");

  Opened opened;
  opened.lane = {entry.link, get<uint32_t>(header + 16), get<uint32_t>(header + 20)};
  opened.sequence = get<uint64_t>(header + 24);
  Result<Message> message = decode_body(header[4], tagged.subspan(kHeaderBytes));
  if (message) {
    // The number is what the tag of these two is bound to, so it must be the one inside.
    const auto* offer = std::get_if<engine::MsgOffer>(&*message);
    const auto* refuse = std::get_if<engine::MsgRefuse>(&*message);
    if ((offer != nullptr && offer->offer.value != opened.sequence) ||
        (refuse != nullptr && refuse->offer.value != opened.sequence))
      message = invalid("offer", "BAD_MESSAGE", "the header names another offer than the body");
  }
  if (!message) {
    opened_lane_ = opened.lane;
    return tl::unexpected<Error>(std::move(message).error());
  }
  opened.message = std::move(*message);
  return opened;
}

}  // namespace kvferry::link
