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

struct LinkTable::DataKeys {
  uint32_t renewal;
  KeyBytes out;
  KeyBytes in;
  Time replaced = Time::never();
};

// Of one handshake.
struct LinkTable::Keys {
  explicit Keys(const LinkKeys& keys)
      : out(keys.out.control),
        in(keys.in.control),
        out_id(keys.out.control_id),
        in_id(keys.in.control_id),
        out_selector(keys.out.selector),
        in_selector(keys.in.selector),
        data{keys.renewal, keys.out.data, keys.in.data},
        data_out(keys.out.data),
        data_in(keys.in.data) {}
  Mac out;
  Mac in;
  uint8_t out_id;
  uint8_t in_id;
  uint64_t out_selector;
  uint64_t in_selector;
  bool seen = false;  // a message came under them
  DataKeys data;
  Mac data_out;
  Mac data_in;
};

struct LinkTable::Entry {
  LinkId link;
  std::unique_ptr<Keys> current;   // this side seals under these
  std::unique_ptr<Keys> next;      // the peer may have them by now
  std::unique_ptr<Keys> previous;  // of messages on their way ...
  Time previous_until = Time::never();
  std::deque<DataKeys> data;  // of those before `current`, the newest last
};

LinkTable::LinkTable() = default;
LinkTable::~LinkTable() = default;

void LinkTable::add(LinkId link, const LinkKeys& keys) {
  KVFERRY_CHECK(!links_.contains(link) && !by_selector_.contains(keys.in.selector),
                "a link is added once");
  auto entry = std::make_unique<Entry>();
  entry->link = link;
  by_selector_.emplace(keys.in.selector, entry.get());
  entry->current = std::make_unique<Keys>(keys);
  links_.emplace(link, std::move(entry));
}

void LinkTable::renew(LinkId link, const LinkKeys& keys, bool seal_now, Time now) {
  const auto it = links_.find(link);
  if (it == links_.end()) return;
  Entry& entry = *it->second;
  if (!by_selector_.emplace(keys.in.selector, &entry).second) return;  // known already
  auto renewed = std::make_unique<Keys>(keys);
  if (seal_now) {
    take_over(entry, std::move(renewed), now);
  } else {
    forget(entry.next);  // of a handshake whose answer was lost
    entry.next = std::move(renewed);
  }
}

void LinkTable::take_over(Entry& entry, std::unique_ptr<Keys> keys, Time now) {
  forget(entry.previous);
  entry.previous = std::move(entry.current);
  entry.previous_until = Time::never();
  entry.current = std::move(keys);
  entry.data.push_back(entry.previous->data);
  entry.data.back().replaced = now;
  while (entry.data.size() >= kDataKeysKept || entry.data.front().replaced + kDataKeyLife < now)
    entry.data.pop_front();
}

void LinkTable::forget(std::unique_ptr<Keys>& keys) {
  if (keys != nullptr) by_selector_.erase(keys->in_selector);
  keys.reset();
}

void LinkTable::remove(LinkId link) {
  const auto it = links_.find(link);
  if (it == links_.end()) return;
  for (auto* keys : {&it->second->current, &it->second->next, &it->second->previous}) forget(*keys);
  links_.erase(it);
}

bool LinkTable::contains(LinkId link) const {
  return links_.contains(link);
}

std::optional<ChunkKey> LinkTable::chunk_key(LinkId link, bool sent, uint64_t number) {
  const auto it = links_.find(link);
  if (it == links_.end()) return std::nullopt;
  Entry& entry = *it->second;
  std::array<uint8_t, 8> bytes{};
  put(bytes.data(), number);
  const auto key_of = [&](Mac& mac) { return ChunkKey(mac.tag({bytes_of(kChunkLabel), bytes})); };
  const auto meant = [&](const DataKeys& keys) {
    return keys.renewal % kDataKeysKept == number % kDataKeysKept;
  };
  if (meant(entry.current->data))
    return key_of(sent ? entry.current->data_out : entry.current->data_in);
  const auto keys = std::find_if(entry.data.begin(), entry.data.end(), meant);
  if (keys == entry.data.end()) return std::nullopt;
  Mac mac(sent ? keys->out : keys->in);
  return key_of(mac);
}

uint64_t LinkTable::chunk_number(LinkId link, uint64_t gather) const {
  const auto it = links_.find(link);
  if (it == links_.end()) return 0;
  return gather * kDataKeysKept + it->second->current->data.renewal % kDataKeysKept;
}

template <typename M>
Status LinkTable::seal_any(const engine::LaneRef& lane, uint64_t number, MessageType type,
                           const M& message, std::vector<uint8_t>& out) {
  const auto it = links_.find(lane.link);
  if (it == links_.end()) return fail(Code::kNotFound, "UNKNOWN_LINK", "the link has ended");
  Keys& keys = *it->second->current;
  out.clear();
  out.resize(kHeaderBytes);
  KVFERRY_RETURN_IF_ERROR(encode_body(message, out));
  uint8_t* header = out.data();
  std::copy(std::begin(kMagic), std::end(kMagic), header);
  header[2] = kWireVersion;
  header[3] = keys.out_id;
  header[4] = static_cast<uint8_t>(type);
  put(header + 8, keys.out_selector);
  put(header + 16, lane.lane);
  put(header + 20, lane.epoch);
  put(header + 24, number);
  put(header + 32, static_cast<uint32_t>(out.size() - kHeaderBytes));
  const TagBytes tag = keys.out.tag({bytes_of(kLabel), out});
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

Result<Opened> LinkTable::open(Bytes sealed, Time now) {
  opened_lane_.reset();
  const uint8_t* header = sealed.data();
  if (sealed.size() < kOverheadBytes || sealed.size() > kMaxSealedBytes || header[0] != kMagic[0] ||
      header[1] != kMagic[1] || header[2] != kWireVersion || header[5] != 0 || header[6] != 0 ||
      header[7] != 0 || get<uint32_t>(header + 32) != sealed.size() - kOverheadBytes)
    return invalid("header", "BAD_ENVELOPE", "not a message of this protocol");
  const auto selector = get<uint64_t>(header + 8);
  auto it = by_selector_.find(selector);
  if (it != by_selector_.end() && it->second->previous_until < now) {
    it->second->previous_until = Time::never();
    forget(it->second->previous);
    it = by_selector_.find(selector);
  }
  if (it == by_selector_.end())
    return fail(Code::kNotFound, "UNKNOWN_LINK", "no link has this selector");
  Entry& entry = *it->second;
  const bool is_next = entry.next != nullptr && entry.next->in_selector == selector;
  const bool is_current = entry.current->in_selector == selector;
  Keys& keys = is_next ? *entry.next : is_current ? *entry.current : *entry.previous;
  const Bytes tagged = sealed.first(sealed.size() - kTagBytes);
  const TagBytes tag = keys.in.tag({bytes_of(kLabel), tagged});
  if (!equal_constant_time(tag, sealed.last(kTagBytes)) || header[3] != keys.in_id)
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
  if ((is_next || is_current) && !keys.seen) {
    keys.seen = true;
    if (is_next) take_over(entry, std::move(entry.next), now);
    entry.previous_until = now + kOldKeysGrace;
    opened.first_under = selector;
  }
  return opened;
}

}  // namespace kvferry::link
