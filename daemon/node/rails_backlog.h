// What the rails had no room for: messages and offers in their order, and accepted offers beside
// them. A round may tell more at once than there are slots, and giving a lane up for that would
// only bring the next resync. Belongs to the engine thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "daemon/engine/commands.h"
#include "daemon/rails/rails_client.h"

namespace kvferry::node {

class RailsBacklog {
 public:
  struct Message {
    engine::LaneRef lane;
    std::vector<uint8_t> message;                                 // sealed
    std::optional<std::pair<OfferId, rails::Region>> offer = {};  // whose header it is
  };

  // Messages that wait have so many bytes at most. Accepted offers are bounded by their regions.
  explicit RailsBacklog(std::size_t most_bytes) : most_bytes_(most_bytes) {}

  // `hand_over(what)` answers whether there was room, or it is settled otherwise; it is called at
  // once unless others wait, and by retry(). False if too many messages wait: this one does not.
  template <typename HandOver>
  [[nodiscard]] bool send(Message message, HandOver&& hand_over) {
    if (messages_.empty() && hand_over(std::as_const(message))) return true;
    if (bytes_ + message.message.size() > most_bytes_) return false;
    bytes_ += message.message.size();
    messages_.push_back(std::move(message));
    return true;
  }
  template <typename HandOver>
  void accept(const engine::AcceptOffer& offer, HandOver&& hand_over) {
    if (accepts_.empty() && hand_over(offer)) return;
    accepts_.push_back(offer);
  }
  // Accepted offers first: what they bring in frees more than it takes.
  template <typename HandOverAccept, typename HandOverMessage>
  void retry(HandOverAccept&& hand_over_accept, HandOverMessage&& hand_over_message) {
    while (!accepts_.empty() && hand_over_accept(std::as_const(accepts_.front())))
      accepts_.pop_front();
    while (!messages_.empty() && hand_over_message(std::as_const(messages_.front()))) {
      bytes_ -= messages_.front().message.size();
      messages_.pop_front();
    }
  }
  // The rails process died, and with it all that these are about.
  void clear() {
    messages_.clear();
    accepts_.clear();
    bytes_ = 0;
  }
  bool empty() const { return messages_.empty() && accepts_.empty(); }
  std::size_t bytes() const { return bytes_; }

 private:
  const std::size_t most_bytes_;
  std::deque<Message> messages_;
  std::deque<engine::AcceptOffer> accepts_;
  std::size_t bytes_ = 0;
};

}  // namespace kvferry::node
