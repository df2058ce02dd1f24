// The looped link: what the two ends of this daemon's own legs say to each other.
#include <algorithm>
#include <utility>

#include "daemon/engine/core.h"

namespace kvferry::engine {

Lanes::Lanes(Core& core) : core_(core) {
  Link& own = links_[kLoopedLink];
  own.id = kLoopedLink;
  own.node = core.config.node;
  by_node_[own.node] = kLoopedLink;
  own.boot = core.config.boot;
  own.chunk_bytes = std::max<uint64_t>(core.config.chunk_bytes, 1);
}

bool Lanes::send_end(Link& link, Role by, MsgEnd message) {
  if (!link.looped()) return send(link, std::move(message));
  looped_.emplace_back(by, std::move(message));
  return true;
}

void Lanes::loop() {
  Link& link = links_.at(kLoopedLink);
  while (true) {
    if (looped_.empty()) core_.receiver.tell_oldest(link);
    if (looped_.empty()) return;
    auto [by, message] = std::move(looped_.front());
    looped_.pop_front();
    deliver(link, by, message);
  }
}

}  // namespace kvferry::engine
