// Rank cards and the sets that make an instance. Values and pure functions; any thread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "daemon/node/registered_layout.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

// All cards of one instance, by rank. Immutable once made.
struct CardSet {
  std::shared_ptr<const mapping::Instance> instance;
  std::vector<rpc::SignedCard> cards;
  std::vector<rpc::NodeAddress> places;  // which daemon made each
  Digest16 digest;                       // of the cards' bytes, in order
};

// CARD_TOO_LARGE if the holding does not fit one.
Result<rpc::SignedCard> make_card(const rpc::RankCard& card, const std::optional<InstanceKey>& key);
bool card_tag_right(const rpc::SignedCard& card, const std::optional<InstanceKey>& key);

// `cards[i]` must be rank i's, all of the same instance. INVALID_ARGUMENT BAD_CARD, and the errors
// of mapping::validate_instance.
Result<std::shared_ptr<const CardSet>> make_card_set(const std::string& instance,
                                                     const Incarnation& incarnation,
                                                     std::vector<rpc::SignedCard> cards);

// "tenant" of "tenant/name".
std::string_view tenant_of(std::string_view instance);

}  // namespace kvferry::node
