// What workers call: of the form that the conversions of daemon/rpc let through (worker_ops.cc
// looks at those), in any order.
#include "tests/fuzz/engine_world.h"

namespace kvferry::fuzz {

using namespace engine;
using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

OpRef EngineWorld::new_op(WorkerId worker) {
  const uint64_t op = next_op_++;
  waiting_.insert({worker.value, op});
  return {worker, op};
}

TransferKey EngineWorld::some_key() {
  const uint8_t kind = in_.byte();
  TransferKey key;
  key.instance = "default/prefill";
  key.incarnation = incarnation_of(1);
  key.id = std::string(1, static_cast<char>('a' + kind % 3));
  key.secret.bytes.fill(kind >= 240 ? 9 : 7);
  return key;
}

std::vector<Range> EngineWorld::some_ranges() {
  const uint8_t kind = in_.byte();
  if (kind < 160) return {{0, 64}};
  if (kind < 190) return {{0, 16}, {32, 64}};
  if (kind < 220) return {{16u * (kind % 4), 64}};
  return {{16u * (kind % 4), 16u * (kind % 4) + 16}};
}

std::shared_ptr<const FuzzLayout> EngineWorld::some_layout() {
  return layouts_[in_.below(static_cast<uint32_t>(layouts_.size()))];
}

void EngineWorld::call_send(OpRef op) {
  SendOp send;
  send.op = op;
  send.key = some_key();
  send.client_handle = 1 + in_.below(6);
  send.layout = layouts_[0];
  send.send_index = in_.below(3);
  send.num_tokens = 64;
  if (in_.below(8) != 1) send.offer = {{0, some_ranges()}};
  send.last = in_.chance();
  if (in_.below(4) == 1) send.aux = "aux";
  if (in_.below(4) == 1) send.ready.kind = ReadyCondition::Kind::kTimeline;
  send.lease = milliseconds(in_.number<uint16_t>() + 1);
  send.deadline = seconds(1 + in_.byte());
  send.max_receivers = 1 + in_.below(3);
  if (in_.below(4) == 1) send.done = DoneWord{in_.below(2), 1};
  if (in_.below(8) == 1) send.packed_bytes = 100 * in_.below(3);
  if (in_.below(8) == 1) send.layers = Range{0, 1u + in_.below(3)};
  post(std::move(send));
}

void EngineWorld::call_receive(OpRef op) {
  ReceiveOp receive;
  receive.op = op;
  receive.key = some_key();
  receive.client_handle = 1 + in_.below(6);
  receive.layout = layouts_[1 + in_.below(2)];
  receive.num_tokens = 64;
  receive.needs = {{0, 0, 64, some_ranges()}};
  receive.blocks = {{0, 0, {1, 2, 3, 4}}};
  if (in_.below(4) == 1) receive.ready.kind = ReadyCondition::Kind::kTimeline;
  if (in_.below(2) == 1) receive.sender_dp_group = in_.below(3);
  receive.wait_for_arena = in_.below(4) != 1;
  receive.wait = milliseconds(in_.number<uint16_t>() + 1);
  receive.deadline = seconds(1 + in_.byte());
  if (in_.below(4) == 1) receive.hashes = {{0, {"h1", "h2", "h3"}}};
  if (in_.below(8) == 1) receive.reuse_pin = in_.below(4);
  if (in_.below(4) == 1) receive.done = DoneWord{in_.below(2), 1};
  post(std::move(receive));
}

void EngineWorld::call_reuse(OpRef op) {
  const uint64_t handle = 1 + in_.below(6);
  switch (in_.below(3)) {
    case 0:
      return post(CommitReuseOp{op, handle, {{0, 64, {"h1", "h2", "h3", "h4"}}}});
    case 1:
      return post(LookupReuseOp{op,
                                some_layout(),
                                {{0, {"h1", "h2", "h3", "h4"}}},
                                milliseconds(in_.chance() ? 0 : 500)});
    default:
      return post(
          WithdrawReuseOp{op, some_layout(), {{0, 0, {1, static_cast<int>(in_.below(4))}}}});
  }
}

void EngineWorld::call() {
  // Also of a worker that is not there any more.
  const WorkerId sender = layouts_[0]->worker;
  const WorkerId receiver = layouts_[1]->worker;
  const uint8_t kind = in_.byte();
  const WorkerId worker = (kind & 128) != 0 ? sender : receiver;
  switch (kind % 16) {
    case 0:
    case 1:
    case 2:
      return call_send(new_op(sender));
    case 3:
    case 4:
    case 5:
      return call_receive(new_op(receiver));
    case 6: {
      OpenSendOp open;
      open.op = new_op(sender);
      open.client_handle = 1 + in_.below(6);
      open.key = some_key();
      open.layout = layouts_[0];
      open.lease = milliseconds(in_.number<uint16_t>() + 1);
      open.deadline = seconds(1 + in_.byte());
      open.max_receivers = 1 + in_.below(3);
      return post(std::move(open));
    }
    case 7:
      return post(CancelOp{new_op(worker), 1 + in_.below(6)});
    case 8:
      return post(CloseOp{new_op(worker), 1 + in_.below(6)});
    case 9:
      return post(RevokeOp{new_op(worker), 1 + in_.below(6), in_.byte()});
    case 10:
      return post(ReceiverNeedsOp{new_op(worker), 1 + in_.below(6)});
    case 11:
      return post(ClaimOp{new_op(receiver), 1 + in_.below(6), some_key(), "ticket", layouts_[1],
                          milliseconds(in_.number<uint16_t>() + 1)});
    case 12:
      return post(DeclineOp{new_op(receiver), some_key(), "ticket", layouts_[1]});
    case 13: {
      ReserveOp reserve;
      reserve.op = new_op(receiver);
      reserve.key = some_key();
      reserve.layout = layouts_[1];
      reserve.bytes = in_.size();
      reserve.may_wait = in_.chance();
      reserve.lease = milliseconds(in_.number<uint16_t>() + 1);
      return post(std::move(reserve));
    }
    default:
      return call_reuse(new_op(receiver));
  }
}

// A worker goes and comes back with a new number and layouts of its own, or takes a layout back.
void EngineWorld::worker_comes_or_goes() {
  const uint8_t kind = in_.byte();
  const bool sender = (kind & 1) != 0;
  const std::size_t first = sender ? 0 : 1;
  const std::size_t last = sender ? 1 : layouts_.size();
  if (kind >= 224 && !drained_) {
    drained_ = true;
    return post(Drain{now_ + seconds(in_.byte())});
  }
  const WorkerId old = layouts_[first]->worker;
  if (kind >= 128) return post(UnregisterLayout{layouts_[first], Reason::kUnregistered});
  if (kind >= 64) return;
  post(WorkerGone{old});
  workers_.erase(old.value);
  const WorkerId worker{next_worker_++};
  for (std::size_t i = first; i < last; ++i) {
    auto layout = std::make_shared<FuzzLayout>(*layouts_[i]);
    layout->worker = worker;
    layouts_[i] = std::move(layout);
  }
  workers_.insert(worker.value);
  post(WorkerAttached{worker, "default", 6});
}

}  // namespace kvferry::fuzz
