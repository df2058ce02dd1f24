#include "daemon/engine/ended.h"

#include "daemon/base/crypto.h"

namespace kvferry::engine {

std::string short_hash(const TransferName& name) {
  const Sha256 hash = sha256({bytes_of(name.instance), name.incarnation.span(), bytes_of(name.id),
                              name.secret_tag.span()});
  return to_hex(std::span<const uint8_t>(hash).first(4));
}

TransferEnded ended(const Transfer& transfer, Role role, Time now) {
  TransferEnded end;
  end.role = role;
  end.state = transfer.record.state;
  end.reason = transfer.record.reason;
  end.bytes = transfer.record.bytes_done;
  end.chunks = transfer.chunks;
  end.total = now - transfer.created;
  end.wait = (transfer.moved ? transfer.first_move : now) - transfer.created;
  end.gather = transfer.gather;
  end.wire = transfer.wire;
  end.scatter = transfer.scatter;
  end.label =
      transfer.hash + (role == Role::kSender ? " S" : " R") + std::to_string(transfer.layout->rank);
  return end;
}

}  // namespace kvferry::engine
