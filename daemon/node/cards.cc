#include "daemon/node/cards.h"

#include <utility>

#include "daemon/base/crypto.h"
#include "daemon/mapping/limits.h"
#include "daemon/mapping/validate.h"

namespace kvferry::node {
namespace {

std::array<uint8_t, 16> tag_of(const std::string& card, const InstanceKey& key) {
  return cut<16>(hmac_sha256(key.span(), {bytes_of("kvferry rank card"), bytes_of(card)}));
}

Digest16 digest_of(const std::vector<rpc::SignedCard>& cards) {
  std::vector<uint8_t> hashes;
  for (const rpc::SignedCard& card : cards) {
    const Sha256 hash = sha256({bytes_of(card.card)});
    hashes.insert(hashes.end(), hash.begin(), hash.end());
  }
  return {cut<16>(sha256({bytes_of("kvferry card set 1"), hashes}))};
}

}  // namespace

Result<rpc::SignedCard> make_card(const rpc::RankCard& card,
                                  const std::optional<InstanceKey>& key) {
  Result<std::string> bytes = rpc::encode_card(card);
  if (!bytes) return tl::unexpected<Error>(std::move(bytes).error());
  rpc::SignedCard out{std::move(*bytes), {}};
  if (key) {
    const auto tag = tag_of(out.card, *key);
    out.tag.assign(tag.begin(), tag.end());
  }
  return out;
}

bool card_tag_right(const rpc::SignedCard& card, const std::optional<InstanceKey>& key) {
  if (!key) return card.tag.empty();
  return equal_constant_time(tag_of(card.card, *key), bytes_of(card.tag));
}

Result<std::shared_ptr<const CardSet>> make_card_set(const std::string& instance,
                                                     const Incarnation& incarnation,
                                                     std::vector<rpc::SignedCard> cards) {
  if (cards.empty() || cards.size() > mapping::kMaxRanks)
    return invalid("cards", "BAD_CARD", "an instance has 1 to 4096 ranks");
  auto set = std::make_shared<CardSet>();
  auto made = std::make_shared<mapping::Instance>();
  made->name = instance;
  made->incarnation = incarnation;
  for (std::size_t i = 0; i < cards.size(); ++i) {
    const std::string field = "cards[" + std::to_string(i) + "]";
    Result<rpc::RankCard> card = rpc::decode_card(cards[i].card);
    if (!card) return invalid(field, "BAD_CARD", card.error().to_string());
    const mapping::Topology& topology = card->holding.topology;
    if (card->instance != instance || card->incarnation != incarnation || topology.rank != i ||
        topology.rank_count != cards.size())
      return invalid(field, "BAD_CARD", "the card is of another instance or rank");
    set->places.push_back({std::move(card->node), std::move(card->address)});
    made->ranks.push_back(std::move(card->holding));
  }
  KVFERRY_RETURN_IF_ERROR(mapping::validate_instance(*made));
  set->instance = std::move(made);
  set->digest = digest_of(cards);
  set->cards = std::move(cards);
  return std::shared_ptr<const CardSet>(std::move(set));
}

std::string_view tenant_of(std::string_view instance) {
  return instance.substr(0, instance.find('/'));
}

}  // namespace kvferry::node
