#include "daemon/rpc/worker_ops.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "daemon/mapping/validate.h"
#include "daemon/rpc/layout_proto.h"
#include "daemon/rpc/pool_messages.h"
#include "daemon/rpc/quiet_parser.h"
#include "tests/proc/bad_input_fields.h"
#include "tests/proc/bad_input_rows.h"

using namespace kvferry;
using namespace kvferry::bad_input;
using namespace kvferry::rpc;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

// A registered layout as the registry would keep it.
struct Registered {
  mapping::RankLayout layout;
  std::shared_ptr<engine::LayoutHandle> handle = std::make_shared<engine::LayoutHandle>();

  Registered() {
    auto converted = from_proto(good_layout());
    REQUIRE(converted);
    layout = std::move(*converted);
    REQUIRE(mapping::validate_layout(layout));
    handle->instance = std::string("default/") + kInstance;
    handle->incarnation.bytes.fill(7);
  }
  LayoutView view() const { return {handle, &layout}; }
  TicketFacts ticket() const { return {handle->instance, handle->incarnation}; }
};

struct Outcome {
  bool accepted = false;
  Error error;
};

template <typename T>
Outcome outcome_of(const Result<T>& result) {
  if (result) return {true, {}};
  return {false, result.error()};
}

// Every row is refused with its error, which names a field that the message has, and every field of
// the message is changed by some row or exempt.
template <typename Request, typename Convert>
void check_rows(const Request& good, const Rows<Request>& rows, const std::vector<Exempt>& exempt,
                Convert&& convert) {
  const google::protobuf::Descriptor& type = *Request::descriptor();
  {
    const Outcome outcome = convert(good);
    INFO(type.name() << ": " << outcome.error.to_string());
    REQUIRE(outcome.accepted);
  }
  Paths covered;
  for (const Row<Request>& row : rows) {
    Request spoiled = good;
    row.spoil(spoiled);
    const Paths changed = changed_fields(good, spoiled);
    const Outcome outcome = convert(spoiled);
    INFO(type.name() << ", " << row.name << ": " << outcome.error.to_string());
    CHECK_FALSE(changed.empty());
    covered.insert(changed.begin(), changed.end());
    CHECK_FALSE(outcome.accepted);
    CHECK(name_of(outcome.error.code) == name_of(row.code));
    CHECK(outcome.error.reason == row.reason);
    CHECK(outcome.error.field == row.field);
    CHECK(names_a_field(type, row.field));
    CHECK_FALSE(outcome.error.message.empty());
  }
  const Paths leaves = leaf_fields(type);
  for (const Exempt& field : exempt)
    if (leaves.contains(field.field)) covered.insert(field.field);
  for (const std::string& field : leaves) {
    INFO(type.name() << "." << field << " has no row and is not exempt");
    CHECK(covered.contains(field));
  }
}

// What the service looks up before it converts; tests/proc/bad_input_test.cc has its rows.
std::vector<Exempt> exempt_here() {
  std::vector<Exempt> exempt = operation_exempt();
  exempt.push_back({"layout.instance", "looked up by the service"});
  exempt.push_back({"layout.rank", "looked up by the service"});
  exempt.push_back({"ticket", "read by the service"});
  exempt.push_back({"reuse_key", "likewise"});
  exempt.push_back({"send_index", "counted by the engine"});
  exempt.push_back({"bytes", "compared with the arena by the engine"});
  return exempt;
}

}  // namespace

TEST_CASE("Every wrong field of a layout is refused by its name") {
  Rows<v1::RankLayout> rows = layout_rows();
  for (Row<v1::RankLayout>& row : pool_span_rows()) rows.push_back(std::move(row));
  check_rows(good_layout(), rows, layout_exempt(), [](const v1::RankLayout& layout) -> Outcome {
    const auto converted = from_proto(layout);
    if (!converted) return outcome_of(converted);
    if (Status valid = mapping::validate_layout(*converted); !valid)
      return {false, as_spelled(valid.error())};
    return {true, {}};
  });
}

TEST_CASE("A layout goes into a message and comes back the same") {
  const Registered registered;
  v1::RankLayout message;
  to_proto(registered.layout, message);
  const auto back = from_proto(message);
  REQUIRE(back);
  CHECK(*back == registered.layout);
}

TEST_CASE("Every wrong field of OpenSend is refused by its name") {
  const Registered registered;
  check_rows(good_open_send(), open_send_rows(), exempt_here(), [&](const auto& request) {
    return outcome_of(to_open_send(request, registered.view(), {}));
  });
}

TEST_CASE("Every wrong field of Send is refused by its name") {
  const Registered registered;
  check_rows(good_send(), send_rows(), exempt_here(), [&](const auto& request) {
    return outcome_of(to_send(request, registered.view(), {}));
  });
}

TEST_CASE("Every wrong field of Receive is refused by its name") {
  const Registered registered;
  check_rows(good_receive("ticket"), receive_rows(), exempt_here(), [&](const auto& request) {
    return outcome_of(to_receive(request, registered.view(), registered.ticket(), {}));
  });
}

TEST_CASE("Every wrong field of Claim is refused by its name") {
  const Registered registered;
  check_rows(good_claim("ticket"), claim_rows(), exempt_here(), [&](const auto& request) {
    return outcome_of(to_claim(request, registered.view(), registered.ticket(), {}));
  });
}

TEST_CASE("Every wrong field of Decline is refused by its name") {
  const Registered registered;
  check_rows(good_decline("ticket"), decline_rows(), exempt_here(), [&](const auto& request) {
    return outcome_of(to_decline(request, registered.view(), registered.ticket()));
  });
}

TEST_CASE("Every wrong field of Reserve is refused by its name") {
  const Registered registered;
  check_rows(good_reserve("ticket"), reserve_rows(), exempt_here(), [&](const auto& request) {
    return outcome_of(to_reserve(request, registered.view(), registered.ticket(), {}));
  });
}

TEST_CASE("Every wrong field of the reuse calls is refused by its name") {
  const Registered registered;
  // Which groups a transfer has is the engine's to know.
  check_rows(good_commit(), commit_rows(),
             {{"groups.group", "the engine's"}, {"groups.tokens", "the engine's"}},
             [&](const auto& request) { return outcome_of(to_commit_reuse(request)); });
  check_rows(good_lookup(), lookup_rows(), exempt_here(), [&](const auto& request) {
    return outcome_of(to_lookup_reuse(request, registered.view()));
  });
  check_rows(good_withdraw(), withdraw_rows(), exempt_here(), [&](const auto& request) {
    return outcome_of(to_withdraw_reuse(request, registered.view()));
  });
  for (const std::string& scheme :
       {std::string(65, 's'), std::string("a b"), std::string("\xff")}) {
    const Status status = check_hash_scheme(scheme);
    REQUIRE_FALSE(status);
    CHECK(status.error().reason == "HASH_SCHEME_INVALID");
    CHECK(status.error().field == "reuse_hash_scheme");
  }
  CHECK(check_hash_scheme(""));
  CHECK(check_hash_scheme(std::string(64, 's')));
}

TEST_CASE("Handles and tickets that are none are refused by their name") {
  CHECK(check_handle(1));
  CHECK(check_handle(0).error().field == "client_handle");
  CHECK(check_ticket_text("kvferry:host:1/name"));
  CHECK(check_ticket_text(std::string(kMaxTicketBytes, 't')));
  for (const std::string& ticket : {std::string(), std::string(kMaxTicketBytes + 1, 't'),
                                    std::string("a b"), std::string("a\nb"), std::string("a\x7f"),
                                    std::string("a\0b", 3), std::string("\xc3\xa9")}) {
    INFO(ticket);
    const Status status = check_ticket_text(ticket);
    REQUIRE_FALSE(status);
    CHECK(status.error().reason == "TICKET_INVALID");
    CHECK(status.error().field == "ticket");
  }
}

TEST_CASE("A CUDA event is a ready condition where there is a GPU, by a handle of 64 bytes") {
  const Registered registered;
  OpLimits limits;
  v1::SendRequest send = good_send();
  send.mutable_ready()->mutable_cuda_ipc_event()->set_handle(std::string(64, 'e'));
  CHECK(to_send(send, registered.view(), limits).error().reason == "FEATURE_NOT_SERVED");
  limits.cuda_events = true;
  const auto op = to_send(send, registered.view(), limits);
  REQUIRE(op);
  CHECK(op->ready.kind == engine::ReadyCondition::Kind::kCudaEvent);
  CHECK(op->ready.event.back() == 'e');
  send.mutable_ready()->mutable_cuda_ipc_event()->set_handle(std::string(63, 'e'));
  const auto shorter = to_send(send, registered.view(), limits);
  REQUIRE_FALSE(shorter);
  CHECK(shorter.error().field == "ready.cuda_ipc_event.handle");
}

TEST_CASE("Values at the edge of what is allowed are accepted") {
  const Registered registered;
  v1::SendRequest send = good_send();
  send.mutable_transfer()->set_transfer_id(std::string(64, '\0'));
  send.mutable_transfer()->set_instance(kInstance);
  send.mutable_transfer()->set_incarnation(std::string(16, '\7'));
  send.set_aux(std::string(64 * 1024, 'a'));
  send.mutable_ready()->mutable_timeline()->set_word(OpLimits{}.timeline_words - 1);
  send.mutable_done()->set_word(OpLimits{}.done_words - 1);
  send.mutable_done()->set_value(~uint64_t{0});
  send.mutable_layers()->set_end(65536);
  send.set_max_receivers(OpLimits{}.max_receivers);
  send.mutable_groups(0)->set_block_ids(ids({-1, 7, -1}));
  const auto op = to_send(send, registered.view(), {});
  INFO((op ? std::string() : op.error().to_string()));
  REQUIRE(op);
  // Only the block that is there is offered.
  CHECK(op->offer == std::vector<mapping::GroupRanges>{{0, {{16, 32}}}, {1, {{0, 1}}}});

  // What lies past the prompt is not looked at.
  send.mutable_groups(0)->set_block_ids(ids({0, 1, 2, 99}));
  CHECK(to_send(send, registered.view(), {}));

  v1::ReceiveRequest receive = good_receive("ticket");
  receive.mutable_groups(0)->set_cached_tokens(1000);
  receive.mutable_groups(1)->set_cached_tokens(1);
  receive.set_sender_dp_group(4095);
  const auto nothing = to_receive(receive, registered.view(), registered.ticket(), {});
  REQUIRE(nothing);
  CHECK(nothing->needs.empty());
}

TEST_CASE("A packed copy takes the bytes of the blocks and layers that are offered") {
  const Registered registered;
  v1::SendRequest send = good_send();
  CHECK_FALSE(to_send(send, registered.view(), {})->packed_bytes);
  send.set_packed_copy(true);
  const uint64_t all = to_send(send, registered.view(), {})->packed_bytes.value();
  send.mutable_groups(0)->set_block_ids(ids({0, -1, 2}));
  const uint64_t fewer = to_send(send, registered.view(), {})->packed_bytes.value();
  send.mutable_groups(0)->set_block_ids(ids({-1, -1, -1}));
  const uint64_t state = to_send(send, registered.view(), {})->packed_bytes.value();
  CHECK(all >= fewer);
  CHECK(fewer > state);
  CHECK(state > 0);
  for (const uint64_t bytes : {all, fewer, state}) CHECK(bytes % 4096 == 0);  // whole pages
  send.mutable_groups(1)->set_block_ids(ids({-1}));
  CHECK(to_send(send, registered.view(), {})->packed_bytes.value() == 0);
}

TEST_CASE("A request's values reach the engine's operation") {
  const Registered registered;
  v1::SendRequest send = good_send();
  send.set_send_index(3);
  send.set_lease_ms(1500);
  send.set_deadline_ms(2500);
  send.set_max_receivers(2);
  send.set_aux("aux");
  send.mutable_ready()->mutable_timeline()->set_word(5);
  send.mutable_ready()->mutable_timeline()->set_value(9);
  send.mutable_groups(0)->set_first_block(1);
  send.mutable_groups(0)->set_block_ids(ids({4, 5}));
  const auto op = to_send(send, registered.view(), {});
  REQUIRE(op);
  CHECK(op->client_handle == 71);
  CHECK(op->key.instance == registered.handle->instance);
  CHECK(op->key.incarnation == registered.handle->incarnation);
  CHECK(op->key.id == "spoiled");
  CHECK(op->key.secret.bytes[0] == 's');
  CHECK(op->layout == registered.handle);
  CHECK(op->send_index == 3);
  CHECK(op->num_tokens == 40);
  CHECK(op->last);
  CHECK(op->aux == "aux");
  CHECK(op->ready == engine::ReadyCondition{engine::ReadyCondition::Kind::kTimeline, 5, 9});
  CHECK(op->lease == milliseconds(1500));
  CHECK(op->deadline == milliseconds(2500));
  CHECK(op->max_receivers == 2);
  CHECK(op->blocks.at(0) == mapping::GroupBlocks{0, 1, {4, 5}});
  CHECK(op->offer.at(0) == mapping::GroupRanges{0, {{16, 48}}});

  v1::ReceiveRequest receive = good_receive("the ticket");
  receive.set_arena_full(v1::ARENA_FULL_FAIL);
  receive.set_wait_ms(700);
  receive.mutable_groups(0)->set_cached_tokens(20);
  const auto wanted = to_receive(receive, registered.view(), registered.ticket(), {});
  REQUIRE(wanted);
  CHECK(wanted->ticket == "the ticket");
  CHECK_FALSE(wanted->wait_for_arena);
  CHECK_FALSE(wanted->sender_dp_group);
  CHECK(wanted->wait == milliseconds(700));
  CHECK(wanted->needs.at(0) == mapping::GroupNeed{0, 16, 40, {{16, 48}}});
}

TEST_CASE("Times have defaults and are cut to their maximum") {
  const Registered registered;
  OpLimits limits;
  limits.lease = seconds(3);
  limits.lease_max = seconds(5);
  limits.deadline = seconds(7);
  limits.deadline_max = seconds(9);
  limits.wait = seconds(11);
  limits.wait_max = seconds(13);
  v1::OpenSendRequest open = good_open_send();
  auto op = to_open_send(open, registered.view(), limits);
  REQUIRE(op);
  CHECK(op->lease == seconds(3));
  CHECK(op->deadline == seconds(7));
  CHECK(op->max_receivers == 1);
  open.set_lease_ms(UINT32_MAX);
  open.set_deadline_ms(UINT32_MAX);
  op = to_open_send(open, registered.view(), limits);
  REQUIRE(op);
  CHECK(op->lease == seconds(5));
  CHECK(op->deadline == seconds(9));
  v1::ReceiveRequest receive = good_receive("ticket");
  CHECK(to_receive(receive, registered.view(), registered.ticket(), limits)->wait == seconds(11));
  receive.set_wait_ms(UINT32_MAX);
  CHECK(to_receive(receive, registered.view(), registered.ticket(), limits)->wait == seconds(13));
}

TEST_CASE("The engine's and the mapping's names of fields are told as the messages spell them") {
  const auto spelled = [](const std::string& field) {
    return as_spelled(Error{Code::kInvalidArgument, "R", "m", field}).field;
  };
  CHECK(spelled("transfer.id") == "transfer.transfer_id");
  CHECK(spelled("needs") == "groups");
  CHECK(spelled("wait_for_arena") == "arena_full");
  CHECK(spelled("groups[3].cached") == "groups[3].cached_tokens");
  CHECK(spelled("groups[3].prompt") == "num_tokens");
  CHECK(spelled("layout.groups[1].planes[2].offset") == "layout.groups[1].planes[2].offset_bytes");
  CHECK(spelled("ranks[1].groups[0].cp_interleave") == "layout.groups[0].cp_interleave_tokens");
  CHECK(spelled("ranks[1].fingerprint") == "layout.fingerprint");
  CHECK(spelled("ranks") == "ranks");
  CHECK(spelled("").empty());
  for (const char* right : {"groups[0].block_ids[17]", "client_handle", "layout.pools[0].bytes",
                            "groups[0].planes[0].offset_bytes"})
    CHECK(spelled(right) == right);
}

TEST_CASE("a worker may say where in a pool its proof is to be") {
  v1::RegisterPoolsRequest request;
  v1::PoolSpec& spec = *request.add_pools();
  spec.set_name("kv");
  spec.set_kind(v1::POOL_KIND_CUDA_IPC);
  spec.set_bytes(4096);
  spec.set_handle(std::string(64, 'h'));
  spec.set_device_uuid(std::string(16, 'u'));
  const auto convert = [&] { return pools_of(request, [](PoolKind) { return Status{}; }); };
  CHECK_FALSE(convert()->at(0).proof_offset_bytes);
  for (const uint64_t offset : {uint64_t{0}, uint64_t{4080}}) {
    spec.set_proof_offset_bytes(offset);
    CHECK(convert()->at(0).proof_offset_bytes == offset);
  }
  for (const uint64_t offset : {uint64_t{4081}, ~uint64_t{0}}) {
    spec.set_proof_offset_bytes(offset);
    CHECK(convert().error().reason == "OUT_OF_RANGE");
    CHECK(convert().error().field == "pools[0].proof_offset_bytes");
  }
  // Nobody challenges what comes as a descriptor.
  spec.set_proof_offset_bytes(0);
  spec.set_kind(v1::POOL_KIND_CUDA_VMM_FD);
  spec.clear_handle();
  CHECK(convert().error().reason == "UNEXPECTED");
}

TEST_CASE("Messages that cannot be read write no lines, however many somebody sends") {
  quiet_parser();
  const UniqueFd file(::memfd_create("kvferry-test", MFD_CLOEXEC));
  const UniqueFd before(::dup(STDERR_FILENO));
  REQUIRE(::dup2(file.get(), STDERR_FILENO) >= 0);
  v1::LayoutRef unreadable;
  const bool read = unreadable.ParseFromString("\x0a\x02\xff\xff");
  REQUIRE(::dup2(before.get(), STDERR_FILENO) >= 0);
  CHECK_FALSE(read);
  struct stat written {};
  REQUIRE(::fstat(file.get(), &written) == 0);
  CHECK(written.st_size == 0);
}

TEST_CASE("A group of which no block is named is withdrawn as nothing") {
  const Registered registered;
  v1::WithdrawReuseRequest request = good_withdraw();
  request.clear_groups();
  request.add_groups()->set_group(0);
  const auto op = to_withdraw_reuse(request, registered.view());
  REQUIRE(op);
  REQUIRE(op->groups.size() == 1);
  CHECK(op->groups[0].ids.empty());
}
