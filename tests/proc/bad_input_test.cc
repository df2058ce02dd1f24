// Wrong calls of a worker, against a real daemon: each is refused by the name of its field, and the
// daemon is afterwards as it was before.
#include <google/protobuf/descriptor.h>

#include <catch2/catch.hpp>

#include "tests/proc/bad_input_subject.h"

using namespace kvferry;
using namespace kvferry::bad_input;
using Stub = v1::WorkerService::Stub;

namespace {

constexpr Code kInvalid = Code::kInvalidArgument;
const std::string kBadNames[] = {"", "/", "-x", "a b", "a/b", "\xc3\xa4", std::string(64, 'n')};

template <typename Request>
void append(Rows<Request>& rows, const Rows<Request>& more) {
  rows.insert(rows.end(), more.begin(), more.end());
}

// ---- pools and layouts -------------------------------------------------------------------------

Rows<v1::RegisterPoolsRequest> pool_rows() {
  using Request = v1::RegisterPoolsRequest;
  const auto first = [](std::function<void(v1::PoolSpec&)> spoil) {
    return [=](Request& r) { spoil(*r.mutable_pools(0)); };
  };
  Rows<Request> rows = {
      {"no pool", [](Request& r) { r.clear_pools(); }, kInvalid, "POOL_COUNT", "pools"},
      {"65 pools",
       [](Request& r) {
         while (r.pools_size() < 65) *r.add_pools() = r.pools(0);
       },
       kInvalid, "POOL_COUNT", "pools"},
      {"a pool twice", [](Request& r) { *r.add_pools() = r.pools(0); }, kInvalid, "NAME_TWICE",
       "pools[1].name"},
      {"a pool whose descriptor was not sent", first([](auto& p) { p.set_name("unsent"); }),
       Code::kNotFound, "POOL_NOT_SENT", "pools[0].name"},
      {"one pool known and one not",
       [](Request& r) {
         *r.add_pools() = r.pools(0);
         r.mutable_pools(1)->set_name("unsent");
       },
       Code::kAlreadyExists, "REGISTERED_OTHERWISE", "pools"},
      {"no kind", first([](auto& p) { p.clear_kind(); }), kInvalid, "UNKNOWN_VALUE",
       "pools[0].kind"},
      {"an unknown kind", first([](auto& p) { p.set_kind(static_cast<v1::PoolKind>(9)); }),
       kInvalid, "UNKNOWN_VALUE", "pools[0].kind"},
      {"no byte", first([](auto& p) { p.set_bytes(0); }), kInvalid, "POOL_SIZE_INVALID",
       "pools[0].bytes"},
      {"a known pool in another size", first([](auto& p) { p.set_bytes(4096); }),
       Code::kAlreadyExists, "REGISTERED_OTHERWISE", "pools[0].bytes"},
      {"an offset", first([](auto& p) { p.set_offset_bytes(4096); }), Code::kUnimplemented,
       "FEATURE_NOT_SERVED", "pools[0].offset_bytes"},
      {"a handle", first([](auto& p) { p.set_handle("h"); }), kInvalid, "UNEXPECTED",
       "pools[0].handle"},
      {"a device", first([](auto& p) { p.set_device_uuid(std::string(16, 'u')); }), kInvalid,
       "UNEXPECTED", "pools[0].device_uuid"},
      {"a place for a proof", first([](auto& p) { p.set_proof_offset_bytes(0); }), kInvalid,
       "UNEXPECTED", "pools[0].proof_offset_bytes"},
  };
  for (const std::string& name : kBadNames)
    rows.push_back({"the name '" + name + "'", first([=](auto& p) { p.set_name(name); }), kInvalid,
                    "NAME_INVALID", "pools[0].name"});
  for (const v1::PoolKind kind :
       {v1::POOL_KIND_CUDA_VMM_FD, v1::POOL_KIND_CUDA_IPC, v1::POOL_KIND_CUDA_FABRIC})
    rows.push_back({v1::PoolKind_Name(kind), first([=](auto& p) { p.set_kind(kind); }),
                    Code::kUnimplemented, "FEATURE_NOT_SERVED", "pools[0].kind"});
  return rows;
}

template <typename Request>
Rows<Request> instance_rows() {
  Rows<Request> rows;
  for (const std::string& name : kBadNames)
    rows.push_back({"the instance '" + name + "'", [=](Request& r) { r.set_instance(name); },
                    kInvalid, "NAME_INVALID", "instance"});
  return rows;
}

template <typename Request>
Rows<Request> key_rows() {
  return {
      {"a key of 5 bytes", [](Request& r) { r.set_instance_key("12345"); }, kInvalid, "WRONG_SIZE",
       "instance_key"},
      {"a key of zeros", [](Request& r) { r.set_instance_key(std::string(16, '\0')); }, kInvalid,
       "ALL_ZERO", "instance_key"},
  };
}

// Of a rank that is not registered yet.
Rows<v1::RegisterLayoutRequest> register_rows() {
  using Request = v1::RegisterLayoutRequest;
  Rows<Request> rows = instance_rows<Request>();
  append(rows, key_rows<Request>());
  append(
      rows,
      {
          {"no layout", [](Request& r) { r.clear_layout(); }, kInvalid, "MISSING", "layout"},
          {"an incarnation of 17 bytes",
           [](Request& r) { r.set_incarnation(std::string(17, 'i')); }, kInvalid, "WRONG_SIZE",
           "incarnation"},
          {"an incarnation of zeros", [](Request& r) { r.set_incarnation(std::string(16, '\0')); },
           kInvalid, "ALL_ZERO", "incarnation"},
          {"a reuse key of 15 bytes", [](Request& r) { r.set_reuse_key(std::string(15, 'k')); },
           kInvalid, "WRONG_SIZE", "reuse_key"},
          {"a reuse key of zeros", [](Request& r) { r.set_reuse_key(std::string(16, '\0')); },
           kInvalid, "ALL_ZERO", "reuse_key"},
          {"a hash scheme with a space", [](Request& r) { r.set_reuse_hash_scheme("sha 256"); },
           kInvalid, "HASH_SCHEME_INVALID", "reuse_hash_scheme"},
          {"a hash scheme of 65 characters",
           [](Request& r) { r.set_reuse_hash_scheme(std::string(65, 's')); }, kInvalid,
           "HASH_SCHEME_INVALID", "reuse_hash_scheme"},
          {"a pool that is not registered",
           [](Request& r) { r.mutable_layout()->mutable_pools(0)->set_name("unsent"); }, kInvalid,
           "POOL_UNKNOWN", "layout.pools[0].name"},
          {"a pool larger than it is",
           [](Request& r) { r.mutable_layout()->mutable_pools(0)->set_bytes(kPoolBytes + 1); },
           kInvalid, "POOL_TOO_SMALL", "layout.pools[0].bytes"},
      });
  for (const Row<v1::RankLayout>& row : layout_rows())
    rows.push_back({row.name, [=](Request& r) { row.spoil(*r.mutable_layout()); }, row.code,
                    row.reason, "layout." + row.field});
  return rows;
}

// Of a rank that is registered, or whose instance has other ranks.
Rows<v1::RegisterLayoutRequest> registered_rows() {
  using Request = v1::RegisterLayoutRequest;
  return {
      {"another layout",
       [](Request& r) { r.mutable_layout()->mutable_groups(0)->set_block_count(7); },
       Code::kAlreadyExists, "REGISTERED_OTHERWISE", "layout"},
      {"another incarnation", [](Request& r) { r.set_incarnation(std::string(16, 'i')); },
       Code::kAlreadyExists, "REGISTERED_OTHERWISE", "incarnation"},
      {"another key", [](Request& r) { r.set_instance_key(std::string(16, 'k')); },
       Code::kAlreadyExists, "REGISTERED_OTHERWISE", "instance_key"},
      {"another reuse key", [](Request& r) { r.set_reuse_key(std::string(16, 'k')); },
       Code::kAlreadyExists, "REGISTERED_OTHERWISE", "reuse_key"},
      {"another hash scheme", [](Request& r) { r.set_reuse_hash_scheme("xxhash"); },
       Code::kAlreadyExists, "REGISTERED_OTHERWISE", "reuse_hash_scheme"},
  };
}

Rows<v1::RegisterLayoutRequest> second_rank_rows() {
  using Request = v1::RegisterLayoutRequest;
  return {
      {"another count of ranks",
       [](Request& r) { r.mutable_layout()->mutable_topology()->set_rank_count(3); }, kInvalid,
       "RANK_COUNT_MISMATCH", "layout.topology.rank_count"},
      {"another fingerprint", [](Request& r) { r.mutable_layout()->set_fingerprint("other"); },
       kInvalid, "INSTANCE_INCONSISTENT", "layout.fingerprint"},
      {"another shape of a plane",
       [](Request& r) {
         r.mutable_layout()->mutable_groups(1)->mutable_planes(0)->set_cell_bytes(128);
       },
       kInvalid, "INSTANCE_INCONSISTENT", "layout.groups[1].planes[0].cell_bytes"},
      {"a key where the others have none",
       [](Request& r) { r.set_instance_key(std::string(16, 'k')); }, Code::kPermissionDenied,
       "INSTANCE_FOREIGN", "instance_key"},
  };
}

void try_registrations(Subject& subject, Calls& calls) {
  calls.refuse("RegisterPools", &Stub::RegisterPools, pools_request({{kPool, kPoolBytes}}),
               pool_rows());
  calls.refuse("RegisterLayout", &Stub::RegisterLayout, layout_request("bad-input-new"),
               register_rows());
  calls.refuse("RegisterLayout", &Stub::RegisterLayout, layout_request(kInstance),
               registered_rows());
  v1::RegisterLayoutRequest second = layout_request(kWideInstance);
  second.mutable_layout()->mutable_topology()->set_rank(1);
  second.mutable_layout()->mutable_topology()->set_rank_count(2);
  calls.refuse("RegisterLayout", &Stub::RegisterLayout, second, second_rank_rows());
  for (Exempt field : layout_exempt()) {
    field.field.insert(0, "layout.");
    calls.exempt("RegisterLayout", {field});
  }

  v1::UnregisterRequest unregister;
  unregister.mutable_layout()->set_instance(kInstance);
  Rows<v1::UnregisterRequest> rows = {
      {"neither layout nor pools", [](auto& r) { r.clear_what(); }, kInvalid, "MISSING", "what"},
      {"pools without names", [](auto& r) { r.mutable_pools(); }, kInvalid, "EMPTY", "pools.names"},
      {"too many pools",
       [](auto& r) {
         for (int i = 0; i < 4097; ++i) r.mutable_pools()->add_names(kPool);
       },
       kInvalid, "POOL_COUNT", "pools.names"},
      {"a pool that is no name",
       [](auto& r) {
         r.mutable_pools()->add_names("unsent");
         r.mutable_pools()->add_names("a b");
       },
       kInvalid, "NAME_INVALID", "pools.names[1]"},
  };
  for (const std::string& name : kBadNames)
    rows.push_back({"the instance '" + name + "'",
                    [=](auto& r) { r.mutable_layout()->set_instance(name); }, kInvalid,
                    "NAME_INVALID", "layout.instance"});
  calls.refuse("Unregister", &Stub::Unregister, unregister, rows);
  calls.exempt("Unregister", {{"layout.rank", "a rank that is not there is no error"}});
  unregister.mutable_layout()->set_rank(9);
  const std::string state = subject.state();
  CHECK_FALSE(subject.good(&Stub::Unregister, unregister).existed());
  unregister.mutable_pools()->add_names("unsent");
  CHECK_FALSE(subject.good(&Stub::Unregister, unregister).existed());
  CHECK(subject.state() == state);
}

void try_another_workers_rank(Subject& subject) {
  const std::string before = subject.state();
  {
    const auto other = subject.attach("bad-input-other");
    Calls calls(subject);
    const auto answer =
        other->call(&Stub::RegisterLayout, layout_request(kInstance), std::chrono::seconds(20));
    REQUIRE_FALSE(answer.ok());
    calls.compare("a rank of another worker", *v1::RegisterLayoutRequest::descriptor(),
                  Code::kAlreadyExists, "RANK_IN_USE", "layout.topology.rank", answer.error());
  }
  CHECK(subject.state_becomes(before));
}

template <typename Request>
Rows<Request> own_layout_rows() {
  return {
      {"no layout", [](Request& r) { r.clear_layout(); }, kInvalid, "MISSING", "layout"},
      {"a layout of an unknown instance",
       [](Request& r) { r.mutable_layout()->set_instance("unknown"); }, Code::kNotFound,
       "LAYOUT_UNKNOWN", "layout"},
      {"a layout of an unknown rank", [](Request& r) { r.mutable_layout()->set_rank(1); },
       Code::kNotFound, "LAYOUT_UNKNOWN", "layout"},
  };
}

template <typename Request>
Rows<Request> ticket_rows() {
  Rows<Request> rows;
  const auto set = [](std::string ticket) { return [=](Request& r) { r.set_ticket(ticket); }; };
  for (const std::string& ticket :
       {std::string(), std::string(513, 't'), std::string("a b"), std::string("a\0b", 3)})
    rows.push_back(
        {"the ticket '" + ticket + "'", set(ticket), kInvalid, "TICKET_INVALID", "ticket"});
  for (const char* ticket : {"t", "AAAA", "kvferry:", "kvferry:host", "kvferry:host:1/",
                             "kvferry:host/name", "kvferry:host:99999/name"})
    rows.push_back({"the ticket '" + std::string(ticket) + "'", set(ticket), kInvalid, "BAD_TICKET",
                    "ticket"});
  rows.push_back({"a ticket that was cut",
                  [](Request& r) { r.mutable_ticket()->resize(r.ticket().size() - 4); }, kInvalid,
                  "BAD_TICKET", "ticket"});
  rows.push_back({"a ticket with a changed letter",
                  [](Request& r) {
                    char& letter = r.mutable_ticket()->at(20);
                    letter = letter == 'A' ? 'B' : 'A';
                  },
                  kInvalid, "BAD_TICKET", "ticket"});
  rows.push_back({"another tenant's ticket", set("kvferry:127.0.0.1:9/other/name"),
                  Code::kPermissionDenied, "OTHER_TENANT", "ticket"});
  return rows;
}

// ---- instances ---------------------------------------------------------------------------------

void try_instances(Subject& subject, Calls& calls) {
  using Join = v1::JoinInstanceRequest;
  Join join;
  join.set_instance(kInstance);
  *join.add_cards() = subject.card();
  Rows<Join> rows = instance_rows<Join>();
  append(rows, key_rows<Join>());
  append(rows,
         {
             {"no card", [](Join& r) { r.clear_cards(); }, kInvalid, "CARD_COUNT", "cards"},
             {"4097 cards",
              [](Join& r) {
                while (r.cards_size() < 4097) r.add_cards();
              },
              kInvalid, "CARD_COUNT", "cards"},
             {"an empty card", [](Join& r) { r.mutable_cards(0)->clear(); }, kInvalid, "BAD_CARD",
              "cards[0]"},
             {"a card that is none", [](Join& r) { r.set_cards(0, "\xff\xff\xff"); }, kInvalid,
              "BAD_CARD", "cards[0]"},
             {"a card that was cut",
              [](Join& r) { r.mutable_cards(0)->resize(r.cards(0).size() / 2); }, kInvalid,
              "BAD_CARD", "cards[0]"},
             {"a card twice", [](Join& r) { *r.add_cards() = r.cards(0); }, kInvalid, "BAD_CARD",
              "cards[0]"},
             {"another instance's card", [&](Join& r) { r.set_cards(0, subject.wide_card()); },
              kInvalid, "BAD_CARD", "cards[0]"},
             {"one of two cards",
              [&](Join& r) {
                r.set_instance(kWideInstance);
                r.set_cards(0, subject.wide_card());
              },
              kInvalid, "BAD_CARD", "cards[0]"},
             {"a key that the ranks do not have",
              [](Join& r) { r.set_instance_key(std::string(16, 'k')); }, Code::kPermissionDenied,
              "INSTANCE_FOREIGN", "instance_key"},
         });
  calls.refuse("JoinInstance", &Stub::JoinInstance, join, rows);
  const auto joined = subject.good(&Stub::JoinInstance, join);
  CHECK(joined.complete());
  CHECK_FALSE(joined.existing());
  CHECK(subject.good(&Stub::JoinInstance, join).existing());

  using Get = v1::GetTicketRequest;
  Get get;
  get.set_instance(kInstance);
  Rows<Get> tickets = instance_rows<Get>();
  append(tickets,
         {
             {"an unknown instance", [](Get& r) { r.set_instance("unknown"); }, Code::kNotFound,
              "INSTANCE_UNKNOWN", "instance"},
             {"an instance that lacks a rank", [](Get& r) { r.set_instance(kWideInstance); },
              Code::kFailedPrecondition, "INSTANCE_INCOMPLETE", "instance"},
         });
  calls.refuse("GetTicket", &Stub::GetTicket, get, tickets);

  v1::ResolveRequest resolve;
  resolve.set_ticket(subject.ticket());
  resolve.mutable_layout()->set_instance(kInstance);
  Rows<v1::ResolveRequest> resolves = ticket_rows<v1::ResolveRequest>();
  for (Row<v1::ResolveRequest>& row : own_layout_rows<v1::ResolveRequest>())
    if (row.name != "no layout") resolves.push_back(std::move(row));
  calls.refuse("Resolve", &Stub::Resolve, resolve, resolves);
}

// ---- transfers ---------------------------------------------------------------------------------

// A group of which the prompt's blocks have no hashes.
template <typename Request>
Rows<Request> unhashed_rows() {
  return {{"hashes of a state",
           [](Request& r) {
             r.clear_prompt_hashes();
             v1::PromptHashes& hashes = *r.add_prompt_hashes();
             hashes.set_group(1);
             hashes.add_hashes("h");
           },
           kInvalid, "BAD_PROMPT_HASHES", "prompt_hashes[0].group"},
          {"a group's hashes twice",
           [](Request& r) {
             r.clear_prompt_hashes();
             r.add_prompt_hashes()->add_hashes("h");
             r.add_prompt_hashes()->add_hashes("h");
           },
           kInvalid, "BAD_PROMPT_HASHES", "prompt_hashes[1].group"}};
}

Rows<v1::OpenSendRequest> open_conflict_rows() {
  using Request = v1::OpenSendRequest;
  return {
      {"an open transfer under another handle", [](Request& r) { r.set_client_handle(9); },
       Code::kAlreadyExists, "TRANSFER_EXISTS", "client_handle"},
      {"an open transfer for more receivers", [](Request& r) { r.set_max_receivers(2); },
       Code::kAlreadyExists, "TRANSFER_EXISTS", "max_receivers"},
      {"a handle of another transfer",
       [](Request& r) { r.mutable_transfer()->set_transfer_id("another"); }, Code::kAlreadyExists,
       "HANDLE_IN_USE", "client_handle"},
  };
}

Rows<v1::ClaimRequest> claim_conflict_rows() {
  using Request = v1::ClaimRequest;
  return {{"a claim for another time", [](Request& r) { r.set_ttl_ms(21000); },
           Code::kAlreadyExists, "CLAIM_EXISTS", "ttl_ms"},
          {"a claim under another handle", [](Request& r) { r.set_client_handle(10); },
           Code::kAlreadyExists, "CLAIM_EXISTS", "client_handle"}};
}

void try_operations(Subject& subject, Calls& calls) {
  const std::vector<Exempt> exempt = operation_exempt();
  for (const char* method : {"OpenSend", "Send", "Receive", "Claim"}) calls.exempt(method, exempt);

  Rows<v1::OpenSendRequest> open = open_send_rows();
  append(open, own_layout_rows<v1::OpenSendRequest>());
  calls.refuse_twice("OpenSend", &Stub::OpenSend, &v1::Operation::mutable_open_send,
                     good_open_send(), open);
  v1::OpenSendRequest opened = good_open_send();
  opened.set_client_handle(kOpenHandle);
  opened.mutable_transfer()->set_transfer_id("open");
  calls.refuse_twice("OpenSend", &Stub::OpenSend, &v1::Operation::mutable_open_send, opened,
                     open_conflict_rows());

  Rows<v1::SendRequest> send = send_rows();
  append(send, own_layout_rows<v1::SendRequest>());
  append(send, {{"a first slice numbered 1", [](auto& r) { r.set_send_index(1); }, kInvalid,
                 "SEND_INDEX_GAP", "send_index"}});
  calls.refuse_twice("Send", &Stub::Send, &v1::Operation::mutable_send, good_send(), send);

  Rows<v1::ReceiveRequest> receive = receive_rows();
  append(receive, own_layout_rows<v1::ReceiveRequest>());
  append(receive, ticket_rows<v1::ReceiveRequest>());
  append(receive, unhashed_rows<v1::ReceiveRequest>());
  calls.refuse_twice("Receive", &Stub::Receive, &v1::Operation::mutable_receive,
                     good_receive(subject.ticket()), receive);

  Rows<v1::ClaimRequest> claim = claim_rows();
  append(claim, own_layout_rows<v1::ClaimRequest>());
  append(claim, ticket_rows<v1::ClaimRequest>());
  calls.refuse_twice("Claim", &Stub::Claim, &v1::Operation::mutable_claim,
                     good_claim(subject.ticket()), claim);
  v1::ClaimRequest claimed = good_claim(subject.ticket());
  claimed.mutable_transfer()->set_transfer_id("claimed");
  claimed.set_ttl_ms(20000);
  CHECK(subject.good(&Stub::Claim, claimed).result().outcome() == v1::OPERATION_OUTCOME_ACCEPTED);
  calls.refuse_twice("Claim", &Stub::Claim, &v1::Operation::mutable_claim, claimed,
                     claim_conflict_rows());
  CHECK(subject.good(&Stub::Claim, claimed).result().outcome() == v1::OPERATION_OUTCOME_EXISTING);

  Rows<v1::DeclineRequest> decline = decline_rows();
  append(decline, own_layout_rows<v1::DeclineRequest>());
  append(decline, ticket_rows<v1::DeclineRequest>());
  calls.refuse_twice("Decline", &Stub::Decline, &v1::Operation::mutable_decline,
                     good_decline(subject.ticket()), decline);

  Rows<v1::ReserveRequest> reserve = reserve_rows();
  append(reserve, own_layout_rows<v1::ReserveRequest>());
  append(reserve, ticket_rows<v1::ReserveRequest>());
  append(reserve, {{"2^64 - 1 bytes", [](auto& r) { r.set_bytes(UINT64_MAX); }, kInvalid,
                    "RESERVATION_TOO_LARGE", "bytes"}});
  calls.refuse("Reserve", &Stub::Reserve, good_reserve(subject.ticket()), reserve);
  calls.exempt("Reserve", {{"lease_ms", "0 is the default, longer ones are cut"}});

  v1::CloseTransferRequest close;
  close.set_client_handle(kOpenHandle);
  calls.refuse_twice<v1::CloseTransferRequest>(
      "CloseTransfer", &Stub::CloseTransfer, &v1::Operation::mutable_close_transfer, close,
      {{"handle 0", [](auto& r) { r.set_client_handle(0); }, kInvalid, "HANDLE_ZERO",
        "client_handle"},
       {"a transfer that has not ended", [](auto&) {}, Code::kFailedPrecondition, "STILL_OPEN",
        ""}});
}

void try_the_stream_itself(Calls& calls) {
  v1::Operation unnumbered;
  *unnumbered.mutable_open_send() = good_open_send();
  calls.refuse_operation("an operation without a number", unnumbered, *v1::Operation::descriptor(),
                         kInvalid, "OP_ID_ZERO", "op_id");
  v1::Operation nothing;
  nothing.set_op_id(1);
  calls.refuse_operation("an operation of no kind", nothing, *v1::Operation::descriptor(), kInvalid,
                         "MISSING", "kind");
}

void try_reuse(Calls& calls) {
  Rows<v1::CommitReuseRequest> commit = commit_rows();
  append(commit, {{"a commit of an unknown transfer", [](auto& r) { r.set_client_handle(4711); },
                   Code::kNotFound, "TRANSFER_UNKNOWN", "client_handle"},
                  {"a commit of a send", [](auto& r) { r.set_client_handle(kOpenHandle); },
                   Code::kNotFound, "TRANSFER_UNKNOWN", "client_handle"}});
  calls.refuse_twice("CommitReuse", &Stub::CommitReuse, &v1::Operation::mutable_commit_reuse,
                     good_commit(), commit);
  calls.exempt("CommitReuse", {{"groups.group", "of a completed receive: the engine's own tests"},
                               {"groups.tokens", "likewise"}});

  Rows<v1::LookupReuseRequest> lookup = lookup_rows();
  append(lookup, own_layout_rows<v1::LookupReuseRequest>());
  append(lookup, unhashed_rows<v1::LookupReuseRequest>());
  append(lookup, {{"a controller's key", [](auto& r) { r.set_reuse_key(std::string(16, 'k')); },
                   kInvalid, "UNEXPECTED", "reuse_key"}});
  calls.refuse("LookupReuse", &Stub::LookupReuse, good_lookup(), lookup);

  Rows<v1::WithdrawReuseRequest> withdraw = withdraw_rows();
  append(withdraw, own_layout_rows<v1::WithdrawReuseRequest>());
  calls.refuse("WithdrawReuse", &Stub::WithdrawReuse, good_withdraw(), withdraw);
}

template <typename Request>
Rows<Request> handle_rows(Code code, const std::string& reason) {
  return {
      {"handle 0", [](Request& r) { r.set_client_handle(0); }, kInvalid, "HANDLE_ZERO",
       "client_handle"},
      {"an unknown handle", [](Request& r) { r.set_client_handle(4711); }, code, reason,
       "client_handle"},
  };
}

void try_handles(Calls& calls) {
  v1::CancelRequest cancel;
  cancel.set_client_handle(kOpenHandle);
  calls.refuse("Cancel", &Stub::Cancel, cancel,
               handle_rows<v1::CancelRequest>(Code::kNotFound, "TRANSFER_UNKNOWN"));
  v1::RevokeRequest revoke;
  revoke.set_client_handle(kOpenHandle);
  calls.refuse("Revoke", &Stub::Revoke, revoke,
               handle_rows<v1::RevokeRequest>(Code::kNotFound, "TRANSFER_UNKNOWN"));
  v1::GetReceiverNeedsRequest needs;
  needs.set_client_handle(kOpenHandle);
  calls.refuse("GetReceiverNeeds", &Stub::GetReceiverNeeds, needs,
               handle_rows<v1::GetReceiverNeedsRequest>(Code::kNotFound, "TRANSFER_UNKNOWN"));
  calls.exempt("Revoke", {{"from_token", "a prompt may be dropped from any token on"}});
  v1::GetAuxRequest aux;
  aux.set_client_handle(kOpenHandle);
  calls.refuse("GetAux", &Stub::GetAux, aux,
               handle_rows<v1::GetAuxRequest>(Code::kNotFound, "AUX_UNKNOWN"));
}

void try_proofs(Subject& subject, Calls& calls) {
  v1::ProvePoolsRequest prove;
  prove.add_pools(kPool);
  Rows<v1::ProvePoolsRequest> rows = {
      {"no pool", [](auto& r) { r.clear_pools(); }, kInvalid, "EMPTY", "pools"},
      {"65 pools",
       [](auto& r) {
         while (r.pools_size() < 65) r.add_pools(kPool);
       },
       kInvalid, "POOL_COUNT", "pools"},
      {"a pool that is not registered", [](auto& r) { r.add_pools("unsent"); }, Code::kNotFound,
       "POOL_UNKNOWN", "pools[1]"},
  };
  for (const std::string& name : kBadNames)
    rows.push_back({"the pool '" + name + "'", [=](auto& r) { r.set_pools(0, name); }, kInvalid,
                    "NAME_INVALID", "pools[0]"});
  calls.refuse("ProvePools", &Stub::ProvePools, prove, rows);
  // A descriptor needs no proof.
  subject.good(&Stub::ProvePools, prove);
}

void try_what_says_nothing(Calls& calls) {
  calls.exempt("Watch", {{"", "says nothing; watch_test is about it"}});
}

// What was refused before goes through once it is right.
void try_good_calls(Subject& subject) {
  const v1::OpenSendRequest open = good_open_send();
  CHECK(subject.good(&Stub::OpenSend, open).result().outcome() == v1::OPERATION_OUTCOME_ACCEPTED);
  CHECK(subject.good(&Stub::OpenSend, open).result().outcome() == v1::OPERATION_OUTCOME_EXISTING);
  v1::SendRequest send = good_send();
  send.set_client_handle(open.client_handle());
  CHECK(subject.good(&Stub::Send, send).result().outcome() == v1::OPERATION_OUTCOME_ACCEPTED);
  v1::CancelRequest cancel;
  cancel.set_client_handle(open.client_handle());
  CHECK(subject.good(&Stub::Cancel, cancel).state() == v1::TRANSFER_STATE_CANCELLED);
  v1::CloseTransferRequest close;
  close.set_client_handle(open.client_handle());
  subject.good(&Stub::CloseTransfer, close);
  CHECK_FALSE(subject.good(&Stub::RegisterLayout, layout_request("bad-input-new")).existing());
  v1::UnregisterRequest pools;
  pools.mutable_pools()->add_names(kPool);
  CHECK(subject.good(&Stub::Unregister, pools).existed());
}

}  // namespace

TEST_CASE("A wrong call is refused by the name of its field and changes nothing") {
  Subject subject;
  Calls calls(subject);
  try_registrations(subject, calls);
  try_another_workers_rank(subject);
  try_instances(subject, calls);
  try_operations(subject, calls);
  try_the_stream_itself(calls);
  try_reuse(calls);
  try_handles(calls);
  try_proofs(subject, calls);
  try_what_says_nothing(calls);
  calls.check_complete();
  try_good_calls(subject);
}

TEST_CASE("A call without the token of a live worker is refused and changes nothing") {
  Subject subject;
  const std::string state = subject.state();
  std::string dead;
  {
    const auto other = subject.attach("bad-input-other");
    dead = other->attachment->token();
  }
  REQUIRE(subject.state_becomes(state));
  std::string wrong = subject.worker().attachment->token();
  wrong[15] = static_cast<char>(wrong[15] ^ 1);
  const std::string cut = subject.worker().attachment->token().substr(0, 15);
  const std::string longer = subject.worker().attachment->token() + "x";
  const std::string empty;
  const std::vector<const std::string*> tokens = {nullptr, &empty, &wrong, &cut, &longer, &dead};
  const google::protobuf::ServiceDescriptor* service = &worker_service();
  for (int i = 0; i < service->method_count(); ++i) {
    const std::string& method = service->method(i)->name();
    for (const std::string* token : tokens) {
      const RawAnswer answer = call_raw(subject.worker(), method, token, {});
      INFO(method << " with " << (token == nullptr ? "no token" : std::to_string(token->size())));
      CHECK(answer.status.error_code() == grpc::StatusCode::UNAUTHENTICATED);
      CHECK(answer.status.error_message().find("UNAUTHENTICATED") == 0);
      CHECK(answer.detail.reason() == "TOKEN_UNKNOWN");
      CHECK(answer.detail.field() == "kvferry-token-bin");
    }
  }
  CHECK(subject.state() == state);
  const auto metrics = subject.daemon().metrics();
  REQUIRE(metrics.ok());
  CHECK(metrics->at("kvferry_rpcs_total{code=\"UNAUTHENTICATED\"}") >
        static_cast<double>(service->method_count()));
}

TEST_CASE("A call whose bytes are no message is refused and changes nothing") {
  Subject subject;
  const std::string state = subject.state();
  const std::string token = subject.worker().attachment->token();
  const google::protobuf::ServiceDescriptor* service = &worker_service();
  for (int i = 0; i < service->method_count(); ++i) {
    const auto& method = *service->method(i);
    if (method.client_streaming()) continue;  // a message that cannot be read ends the stream
    const RawAnswer garbage = call_raw(subject.worker(), method.name(), &token, "\xff\xff\xff");
    INFO(method.name() << ": " << garbage.status.error_message());
    CHECK_FALSE(garbage.status.ok());
    const RawAnswer large =
        call_raw(subject.worker(), method.name(), &token, std::string((8U << 20) + 1, 'x'));
    CHECK(large.status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
  CHECK(subject.state() == state);
  try_good_calls(subject);
}
