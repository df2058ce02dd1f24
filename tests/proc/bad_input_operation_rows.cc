#include <cstring>
#include <limits>
#include <utility>

#include "tests/proc/bad_input_rows.h"

namespace kvferry::bad_input {
namespace {

constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
constexpr uint32_t kHuge32 = std::numeric_limits<uint32_t>::max();
constexpr Code kInvalid = Code::kInvalidArgument;
constexpr uint64_t kPrompt = 40;

void set_transfer(v1::TransferRef& transfer) {
  transfer.set_transfer_id("spoiled");
  transfer.set_secret(std::string(16, 's'));
}

template <typename Request>
void set_layout(Request& request) {
  request.mutable_layout()->set_instance(kInstance);
}

// 40 tokens of group 0, and the state of group 1.
template <typename Request>
void set_groups(Request& request) {
  v1::GroupBlocks& tokens = *request.add_groups();
  tokens.set_block_ids(ids({0, 1, 2}));
  v1::GroupBlocks& state = *request.add_groups();
  state.set_group(1);
  state.set_block_ids(ids({2}));
}

template <typename Request>
void append(Rows<Request>& rows, Rows<Request> more) {
  for (Row<Request>& row : more) rows.push_back(std::move(row));
}

template <typename Request>
Rows<Request> handle_rows() {
  return {{"handle 0", [](Request& r) { r.set_client_handle(0); }, kInvalid, "HANDLE_ZERO",
           "client_handle"}};
}

template <typename Request>
Rows<Request> transfer_rows(const std::string& other_instance) {
  using Transfer = std::function<void(v1::TransferRef&)>;
  const auto on = [](Transfer spoil) { return [=](Request& r) { spoil(*r.mutable_transfer()); }; };
  return {
      {"no transfer", [](Request& r) { r.clear_transfer(); }, kInvalid, "TRANSFER_ID_SIZE",
       "transfer.transfer_id"},
      {"no transfer id", on([](auto& t) { t.clear_transfer_id(); }), kInvalid, "TRANSFER_ID_SIZE",
       "transfer.transfer_id"},
      {"a transfer id of 65 bytes", on([](auto& t) { t.set_transfer_id(std::string(65, 'x')); }),
       kInvalid, "TRANSFER_ID_SIZE", "transfer.transfer_id"},
      {"no secret", on([](auto& t) { t.clear_secret(); }), kInvalid, "WRONG_SIZE",
       "transfer.secret"},
      {"a secret of 15 bytes", on([](auto& t) { t.set_secret(std::string(15, 's')); }), kInvalid,
       "WRONG_SIZE", "transfer.secret"},
      {"a secret of 17 bytes", on([](auto& t) { t.set_secret(std::string(17, 's')); }), kInvalid,
       "WRONG_SIZE", "transfer.secret"},
      {"a secret of zeros", on([](auto& t) { t.set_secret(std::string(16, '\0')); }), kInvalid,
       "SECRET_ZERO", "transfer.secret"},
      {"an incarnation of 5 bytes", on([](auto& t) { t.set_incarnation("12345"); }), kInvalid,
       "WRONG_SIZE", "transfer.incarnation"},
      {"another incarnation", on([](auto& t) { t.set_incarnation(std::string(16, 'i')); }),
       kInvalid, "OTHER_INCARNATION", "transfer.incarnation"},
      {"another instance", on([](auto& t) { t.set_instance("somebody-else"); }), kInvalid,
       other_instance, "transfer.instance"},
      {"an instance with its tenant",
       on([](auto& t) { t.set_instance("default/" + std::string(kInstance)); }), kInvalid,
       other_instance, "transfer.instance"},
  };
}

template <typename Request>
Rows<Request> receiver_count_rows() {
  return {{"too many receivers", [](Request& r) { r.set_max_receivers(kHuge32); }, kInvalid,
           "TOO_MANY_RECEIVERS", "max_receivers"}};
}

template <typename Request>
Rows<Request> ready_rows() {
  return {
      {"a timeline word that does not exist",
       [](Request& r) { r.mutable_ready()->mutable_timeline()->set_word(kHuge32); }, kInvalid,
       "WORD_OUT_OF_RANGE", "ready.timeline.word"},
      {"a CUDA event",
       [](Request& r) {
         r.mutable_ready()->mutable_cuda_ipc_event()->set_handle(std::string(64, 'e'));
       },
       Code::kUnimplemented, "FEATURE_NOT_SERVED", "ready.cuda_ipc_event"},
  };
}

template <typename Request>
Rows<Request> prompt_rows() {
  return {
      {"a prompt of no token", [](Request& r) { r.set_num_tokens(0); }, kInvalid,
       "TOKENS_OUT_OF_RANGE", "num_tokens"},
      {"a prompt of 2^64 - 1 tokens", [](Request& r) { r.set_num_tokens(kHuge); }, kInvalid,
       "TOKENS_OUT_OF_RANGE", "num_tokens"},
      {"a prompt of more blocks than a transfer has",
       [](Request& r) { r.set_num_tokens(((uint64_t{1} << 20) + 1) * 16); }, kInvalid,
       "OUT_OF_RANGE", "num_tokens"},
      {"a done word that does not exist",
       [](Request& r) {
         r.mutable_done()->set_word(kHuge32);
         r.mutable_done()->set_value(1);
       },
       kInvalid, "WORD_OUT_OF_RANGE", "done.word"},
  };
}

template <typename Request>
Rows<Request> group_rows() {
  const auto first = [](std::function<void(v1::GroupBlocks&)> spoil) {
    return [=](Request& r) { spoil(*r.mutable_groups(0)); };
  };
  return {
      {"a group beyond the layout's", first([](auto& g) { g.set_group(3); }), kInvalid,
       "UNKNOWN_GROUP", "groups[0].group"},
      {"group 2^32 - 1", first([](auto& g) { g.set_group(kHuge32); }), kInvalid, "UNKNOWN_GROUP",
       "groups[0].group"},
      {"a group twice", [](Request& r) { *r.add_groups() = r.groups(0); }, kInvalid, "GROUP_TWICE",
       "groups[2].group"},
      {"65 groups",
       [](Request& r) {
         while (r.groups_size() < 65) r.add_groups();
       },
       kInvalid, "TOO_MANY_GROUPS", "groups"},
      {"a first block beyond a transfer's",
       first([](auto& g) { g.set_first_block((uint64_t{1} << 20) + 1); }), kInvalid, "OUT_OF_RANGE",
       "groups[0].first_block"},
      {"first block 2^64 - 1", first([](auto& g) { g.set_first_block(kHuge); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].first_block"},
      {"block ids of 7 bytes", first([](auto& g) { g.set_block_ids("1234567"); }), kInvalid,
       "WRONG_SIZE", "groups[0].block_ids"},
      {"a block id beyond the group's", first([](auto& g) {
         g.set_block_ids(ids({0, 8, 2}));
       }),
       kInvalid, "BLOCK_OUT_OF_RANGE", "groups[0].block_ids[1]"},
      {"a block id of -2", first([](auto& g) {
         g.set_block_ids(ids({0, 1, -2}));
       }),
       kInvalid, "BLOCK_OUT_OF_RANGE", "groups[0].block_ids[2]"},
      {"block id -2^31",
       first([](auto& g) { g.set_block_ids(ids({std::numeric_limits<int32_t>::min()})); }),
       kInvalid, "BLOCK_OUT_OF_RANGE", "groups[0].block_ids[0]"},
      {"a slot beyond the states", [](Request& r) { r.mutable_groups(1)->set_block_ids(ids({4})); },
       kInvalid, "BLOCK_OUT_OF_RANGE", "groups[1].block_ids[0]"},
      {"more block ids than a transfer has",
       first([](auto& g) { g.set_block_ids(std::string(((std::size_t{1} << 20) + 1) * 4, '\0')); }),
       kInvalid, "TOO_MANY_BLOCKS", "groups[0].block_ids"},
  };
}

// Every other block is a hole, more often than a slice may have ranges.
template <typename Request>
void fragment(Request& request) {
  std::vector<int32_t> blocks;
  for (int i = 0; i < 4097; ++i) {
    blocks.push_back(0);
    blocks.push_back(-1);
  }
  request.set_num_tokens(blocks.size() * 16);
  request.mutable_groups(0)->set_block_ids(ids(blocks));
}

Rows<v1::SendRequest> slice_rows() {
  using Request = v1::SendRequest;
  return {
      {"tokens that end before they begin",
       [](Request& r) { r.mutable_tokens()->set_begin(kPrompt + 1); }, kInvalid,
       "TOKENS_OUT_OF_RANGE", "tokens"},
      {"tokens beyond the prompt", [](Request& r) { r.mutable_tokens()->set_end(kPrompt + 1); },
       kInvalid, "TOKENS_OUT_OF_RANGE", "tokens"},
      {"tokens up to 2^64 - 1", [](Request& r) { r.mutable_tokens()->set_end(kHuge); }, kInvalid,
       "TOKENS_OUT_OF_RANGE", "tokens"},
      {"tokens beyond the prompt of no group",
       [](Request& r) {
         r.clear_groups();
         r.mutable_tokens()->set_end(kHuge);
       },
       kInvalid, "TOKENS_OUT_OF_RANGE", "tokens"},
      {"a prompt shorter than its tokens", [](Request& r) { r.set_num_tokens(kPrompt - 1); },
       kInvalid, "TOKENS_OUT_OF_RANGE", "tokens"},
      {"a group's tokens beyond the prompt",
       [](Request& r) { r.mutable_groups(0)->mutable_tokens()->set_end(kPrompt + 1); }, kInvalid,
       "TOKENS_OUT_OF_RANGE", "groups[0].tokens"},
      {"a group's tokens that end before they begin",
       [](Request& r) { r.mutable_groups(0)->mutable_tokens()->set_begin(8); }, kInvalid,
       "TOKENS_OUT_OF_RANGE", "groups[0].tokens"},
      {"tokens of a state", [](Request& r) { r.mutable_groups(1)->mutable_tokens()->set_end(2); },
       kInvalid, "TOKENS_OUT_OF_RANGE", "groups[1].tokens"},
      {"cached tokens of a sender", [](Request& r) { r.mutable_groups(0)->set_cached_tokens(1); },
       kInvalid, "RECEIVER_ONLY", "groups[0].cached_tokens"},
      {"layers that end before they begin",
       [](Request& r) {
         r.mutable_layers()->set_begin(2);
         r.mutable_layers()->set_end(1);
       },
       kInvalid, "LAYERS_OUT_OF_RANGE", "layers"},
      {"no layer at all", [](Request& r) { r.mutable_layers(); }, kInvalid, "LAYERS_OUT_OF_RANGE",
       "layers"},
      {"layers beyond all", [](Request& r) { r.mutable_layers()->set_end(65537); }, kInvalid,
       "LAYERS_OUT_OF_RANGE", "layers"},
      {"aux before the last slice",
       [](Request& r) {
         r.set_last(false);
         r.set_aux("x");
       },
       kInvalid, "AUX_NOT_LAST", "aux"},
      {"aux of 64 KiB and a byte", [](Request& r) { r.set_aux(std::string(64 * 1024 + 1, 'a')); },
       kInvalid, "AUX_TOO_LARGE", "aux"},
      {"more ranges than a slice has",
       [](Request& r) {
         fragment(r);
         r.mutable_tokens()->set_end(r.num_tokens());
       },
       Code::kResourceExhausted, "TOO_FRAGMENTED", "groups[0].block_ids"},
  };
}

Rows<v1::ReceiveRequest> need_rows() {
  using Request = v1::ReceiveRequest;
  return {
      {"a dp group beyond all", [](Request& r) { r.set_sender_dp_group(4096); }, kInvalid,
       "OUT_OF_RANGE", "sender_dp_group"},
      {"tokens of a receiver",
       [](Request& r) {
         r.mutable_groups(0)->mutable_tokens()->set_begin(8);
         r.mutable_groups(0)->mutable_tokens()->set_end(16);
       },
       kInvalid, "SENDER_ONLY", "groups[0].tokens"},
      {"a state cached twice", [](Request& r) { r.mutable_groups(1)->set_cached_tokens(2); },
       kInvalid, "OUT_OF_RANGE", "groups[1].cached_tokens"},
      {"a block twice in a group",
       [](Request& r) {
         r.mutable_groups(0)->set_block_ids(ids({3, 1, 3}));
       },
       kInvalid, "BLOCK_TWICE", "groups[0].block_ids[2]"},
      {"a block in two groups of one storage",
       [](Request& r) {
         v1::GroupBlocks& other = *r.add_groups();
         other.set_group(2);
         other.set_block_ids(ids({3, 1}));
       },
       kInvalid, "BLOCK_TWICE", "groups[2].block_ids[1]"},
      {"an unknown choice for a full arena",
       [](Request& r) { r.set_arena_full(static_cast<v1::ArenaFull>(9)); }, kInvalid,
       "UNKNOWN_VALUE", "arena_full"},
      {"more ranges than a transfer has", [](Request& r) { fragment(r); }, Code::kResourceExhausted,
       "TOO_FRAGMENTED", "groups[0].block_ids"},
  };
}

// Of the first entry, which is added where there is none.
template <typename Request>
Rows<Request> hash_rows() {
  const auto with = [](uint32_t group, const std::string& second) {
    return [=](Request& r) {
      r.clear_prompt_hashes();
      v1::PromptHashes& of = *r.add_prompt_hashes();
      of.set_group(group);
      of.add_hashes("h");
      of.add_hashes(second);
    };
  };
  return {
      {"hashes of a group beyond the layout's", with(3, "h"), kInvalid, "UNKNOWN_GROUP",
       "prompt_hashes[0].group"},
      {"an empty hash", with(0, ""), kInvalid, "WRONG_SIZE", "prompt_hashes[0].hashes[1]"},
      {"a hash of 33 bytes", with(0, std::string(33, 'h')), kInvalid, "WRONG_SIZE",
       "prompt_hashes[0].hashes[1]"},
      {"hashes of 65 groups",
       [](Request& r) {
         while (r.prompt_hashes_size() < 65) r.add_prompt_hashes();
       },
       kInvalid, "TOO_MANY_GROUPS", "prompt_hashes"},
  };
}

}  // namespace

std::string ids(const std::vector<int32_t>& block_ids) {
  std::string out(block_ids.size() * sizeof(int32_t), '\0');
  std::memcpy(out.data(), block_ids.data(), out.size());
  return out;
}

v1::OpenSendRequest good_open_send() {
  v1::OpenSendRequest request;
  request.set_client_handle(70);
  set_transfer(*request.mutable_transfer());
  set_layout(request);
  return request;
}

v1::SendRequest good_send() {
  v1::SendRequest request;
  request.set_client_handle(71);
  set_transfer(*request.mutable_transfer());
  set_layout(request);
  request.set_num_tokens(kPrompt);
  request.mutable_tokens()->set_end(kPrompt);
  set_groups(request);
  request.set_last(true);
  return request;
}

v1::ReceiveRequest good_receive(const std::string& ticket) {
  v1::ReceiveRequest request;
  request.set_client_handle(72);
  set_transfer(*request.mutable_transfer());
  set_layout(request);
  request.set_ticket(ticket);
  request.set_num_tokens(kPrompt);
  set_groups(request);
  return request;
}

v1::ClaimRequest good_claim(const std::string& ticket) {
  v1::ClaimRequest request;
  request.set_client_handle(73);
  set_transfer(*request.mutable_transfer());
  set_layout(request);
  request.set_ticket(ticket);
  return request;
}

v1::DeclineRequest good_decline(const std::string& ticket) {
  v1::DeclineRequest request;
  set_transfer(*request.mutable_transfer());
  set_layout(request);
  request.set_ticket(ticket);
  return request;
}

v1::ReserveRequest good_reserve(const std::string& ticket) {
  v1::ReserveRequest request;
  set_transfer(*request.mutable_transfer());
  set_layout(request);
  request.set_ticket(ticket);
  return request;
}

v1::CommitReuseRequest good_commit() {
  v1::CommitReuseRequest request;
  request.set_client_handle(74);
  v1::CommitReuseRequest::GroupCommit& group = *request.add_groups();
  group.set_tokens(32);
  group.add_hashes("h0");
  group.add_hashes("h1");
  return request;
}

v1::LookupReuseRequest good_lookup() {
  v1::LookupReuseRequest request;
  set_layout(request);
  request.add_prompt_hashes()->add_hashes("h0");
  return request;
}

v1::WithdrawReuseRequest good_withdraw() {
  v1::WithdrawReuseRequest request;
  set_layout(request);
  request.add_groups()->set_block_ids(ids({0, -1, 7}));
  return request;
}

Rows<v1::OpenSendRequest> open_send_rows() {
  Rows<v1::OpenSendRequest> rows = handle_rows<v1::OpenSendRequest>();
  append(rows, transfer_rows<v1::OpenSendRequest>("NOT_OWN_INSTANCE"));
  append(rows, receiver_count_rows<v1::OpenSendRequest>());
  return rows;
}

Rows<v1::SendRequest> send_rows() {
  Rows<v1::SendRequest> rows = handle_rows<v1::SendRequest>();
  append(rows, transfer_rows<v1::SendRequest>("NOT_OWN_INSTANCE"));
  append(rows, receiver_count_rows<v1::SendRequest>());
  append(rows, ready_rows<v1::SendRequest>());
  append(rows, prompt_rows<v1::SendRequest>());
  append(rows, group_rows<v1::SendRequest>());
  append(rows, slice_rows());
  return rows;
}

Rows<v1::ReceiveRequest> receive_rows() {
  Rows<v1::ReceiveRequest> rows = handle_rows<v1::ReceiveRequest>();
  append(rows, transfer_rows<v1::ReceiveRequest>("OTHER_INSTANCE"));
  append(rows, ready_rows<v1::ReceiveRequest>());
  append(rows, prompt_rows<v1::ReceiveRequest>());
  append(rows, group_rows<v1::ReceiveRequest>());
  append(rows, need_rows());
  append(rows, hash_rows<v1::ReceiveRequest>());
  return rows;
}

Rows<v1::ClaimRequest> claim_rows() {
  Rows<v1::ClaimRequest> rows = handle_rows<v1::ClaimRequest>();
  append(rows, transfer_rows<v1::ClaimRequest>("OTHER_INSTANCE"));
  return rows;
}

Rows<v1::DeclineRequest> decline_rows() {
  return transfer_rows<v1::DeclineRequest>("OTHER_INSTANCE");
}

Rows<v1::ReserveRequest> reserve_rows() {
  using Request = v1::ReserveRequest;
  Rows<Request> rows = transfer_rows<Request>("OTHER_INSTANCE");
  append(rows, {{"an unknown choice for a full arena",
                 [](Request& r) { r.set_arena_full(static_cast<v1::ArenaFull>(9)); }, kInvalid,
                 "UNKNOWN_VALUE", "arena_full"}});
  return rows;
}

Rows<v1::CommitReuseRequest> commit_rows() {
  using Request = v1::CommitReuseRequest;
  Rows<Request> rows = handle_rows<Request>();
  append(rows, {{"an empty hash", [](Request& r) { r.mutable_groups(0)->set_hashes(1, ""); },
                 kInvalid, "WRONG_SIZE", "groups[0].hashes[1]"},
                {"a hash of 33 bytes",
                 [](Request& r) { r.mutable_groups(0)->set_hashes(0, std::string(33, 'h')); },
                 kInvalid, "WRONG_SIZE", "groups[0].hashes[0]"},
                {"65 groups",
                 [](Request& r) {
                   while (r.groups_size() < 65) r.add_groups();
                 },
                 kInvalid, "TOO_MANY_GROUPS", "groups"}});
  return rows;
}

Rows<v1::LookupReuseRequest> lookup_rows() {
  using Request = v1::LookupReuseRequest;
  Rows<Request> rows = hash_rows<Request>();
  append(rows, {{"nothing to look up", [](Request& r) { r.clear_prompt_hashes(); }, kInvalid,
                 "MISSING", "prompt_hashes"},
                {"a pin of more than a second", [](Request& r) { r.set_pin_ms(1001); }, kInvalid,
                 "PIN_TOO_LONG", "pin_ms"}});
  return rows;
}

Rows<v1::WithdrawReuseRequest> withdraw_rows() {
  using Request = v1::WithdrawReuseRequest;
  const auto first = [](std::function<void(v1::GroupBlocks&)> spoil) {
    return [=](Request& r) { spoil(*r.mutable_groups(0)); };
  };
  return {
      {"a group beyond the layout's", first([](auto& g) { g.set_group(3); }), kInvalid,
       "UNKNOWN_GROUP", "groups[0].group"},
      {"65 groups",
       [](Request& r) {
         while (r.groups_size() < 65) r.add_groups();
       },
       kInvalid, "TOO_MANY_GROUPS", "groups"},
      {"positions", first([](auto& g) { g.set_first_block(1); }), kInvalid, "UNEXPECTED",
       "groups[0].first_block"},
      {"tokens", first([](auto& g) {
         g.mutable_tokens()->set_begin(1);
         g.mutable_tokens()->set_end(2);
       }),
       kInvalid, "UNEXPECTED", "groups[0].tokens"},
      {"cached tokens", first([](auto& g) { g.set_cached_tokens(1); }), kInvalid, "UNEXPECTED",
       "groups[0].cached_tokens"},
      {"block ids of 7 bytes", first([](auto& g) { g.set_block_ids("1234567"); }), kInvalid,
       "WRONG_SIZE", "groups[0].block_ids"},
      {"a block id beyond the group's", first([](auto& g) {
         g.set_block_ids(ids({0, 8}));
       }),
       kInvalid, "BLOCK_OUT_OF_RANGE", "groups[0].block_ids[1]"},
      {"a block id of -2", first([](auto& g) { g.set_block_ids(ids({-2})); }), kInvalid,
       "BLOCK_OUT_OF_RANGE", "groups[0].block_ids[0]"},
  };
}

std::vector<Exempt> operation_exempt() {
  return {
      {"reuse_pin", "a pin that is over is none"},
      {"lease_ms", "0 is the default, longer ones are cut"},
      {"deadline_ms", "0 is the default, longer ones are cut"},
      {"wait_ms", "0 is the default, longer ones are cut"},
      {"ttl_ms", "0 is the default, longer ones are cut"},
      {"last", "both values mean something"},
      {"packed_copy", "likewise; what finds no room has a test of its own"},
      {"ready.host_synced", "has no content"},
      {"ready.timeline.value", "a word may wait for any value"},
  };
}

}  // namespace kvferry::bad_input
