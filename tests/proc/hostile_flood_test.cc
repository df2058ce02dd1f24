// Floods of a hostile process of the same machine: each ends at a limit that is named, and others
// are served meanwhile.
#include <sys/socket.h>
#include <sys/un.h>

#include <fstream>
#include <sstream>

#include "tests/proc/hostile_worker.h"
#include "tests/proc/raw_lifeline.h"

namespace kvferry::testing {

using bad_input::RawLifeline;

TEST_CASE("floods meet their limits by name, and others are served meanwhile") {
  HostileScene& s = hostile_scene();
  const std::string other = other_socket();
  SECTION("connections that say nothing") {
    std::vector<std::unique_ptr<RawLifeline>> silent;
    for (int i = 0; i < 1000; ++i)
      silent.push_back(std::make_unique<RawLifeline>(s.daemon(0).socket()));
    // All but the last ones are told why.
    lifeline::AttachReply reply;
    REQUIRE(silent.front()->receive(reply));
    CHECK(std::string(reply.reason) == "TOO_MANY_CONNECTIONS");
    const auto newcomer = attached(s.daemon(0).socket(), "newcomer");
    s.honest().require_more();
  }
  SECTION("connections to the calls' socket that say nothing, or no HTTP") {
    std::vector<UniqueFd> silent;
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    (s.daemon(0).socket() + ".grpc").copy(address.sun_path, sizeof address.sun_path - 1);
    const std::string frames = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for (int i = 0; i < 1000; ++i) {
      silent.emplace_back(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
      REQUIRE(::connect(silent.back().get(), reinterpret_cast<const sockaddr*>(&address),
                        sizeof address) == 0);
      const std::string said = i % 3 == 0   ? ""
                               : i % 3 == 1 ? std::string(100, static_cast<char>(i))
                                            : frames + std::string(64, '\xff');
      (void)::send(silent.back().get(), said.data(), said.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    const auto newcomer = attached(s.daemon(0).socket(), "newcomer");
    v1::GetTicketRequest ticket;
    ticket.set_instance("prefill");
    good(*newcomer, &Stub::GetTicket, ticket);
    s.honest().require_more();
  }
  SECTION("workers") {
    std::vector<std::unique_ptr<RawLifeline>> workers;
    lifeline::AttachReply reply;
    for (int i = 0; i <= 1024; ++i) {
      workers.push_back(std::make_unique<RawLifeline>(other));
      workers.back()->send(bad_input::attach_request("w" + std::to_string(i)));
      REQUIRE(workers.back()->receive(reply));
      if (reply.code != 0) break;
    }
    CHECK(std::string(reply.reason) == "TOO_MANY_WORKERS");
    const auto newcomer = attached(s.daemon(0).socket(), "newcomer");
    s.honest().require_more();
  }
  SECTION("descriptors, pools and their bytes") {
    const auto hoarder = attached(other, "hoarder");
    const UniqueFd pool = good_pool(64 << 10);
    std::string reason;
    for (int i = 0; i < 30 && reason.empty(); ++i)
      if (const auto sent = send_pool(*hoarder, "p" + std::to_string(i), pool.get(), 64 << 10);
          !sent)
        reason = sent.error().reason;
    CHECK(reason == "DESCRIPTOR_LIMIT");
    reason.clear();
    for (int i = 0; i < 20 && reason.empty(); ++i)
      reason = refused(*hoarder, &Stub::RegisterPools,
                       bad_input::pools_request({{"p" + std::to_string(i), 64 << 10}}));
    CHECK(reason == "POOL_LIMIT");
    s.honest().require_more();
  }
  SECTION("layouts, transfers, claims and streams") {
    const auto hoarder = attached(other, "hoarder");
    const UniqueFd pool = good_pool(bad_input::kPoolBytes);
    REQUIRE(send_pool(*hoarder, bad_input::kPool, pool.get(), bad_input::kPoolBytes).ok());
    good(*hoarder, &Stub::RegisterPools,
         bad_input::pools_request({{bad_input::kPool, bad_input::kPoolBytes}}));
    good(*hoarder, &Stub::RegisterLayout, bad_input::layout_request(bad_input::kInstance));
    std::string reason;
    for (int i = 0; i < 100 && reason.empty(); ++i)
      reason = refused(*hoarder, &Stub::RegisterLayout,
                       bad_input::layout_request("hoard" + std::to_string(i)));
    CHECK(reason == "TOO_MANY_LAYOUTS");
    reason.clear();
    uint32_t open = 0;
    for (; open < 100 && reason.empty(); ++open) {
      v1::OpenSendRequest request = bad_input::good_open_send();
      request.set_client_handle(1000 + open);
      request.mutable_transfer()->set_transfer_id("t" + std::to_string(open));
      reason = refused(*hoarder, &Stub::OpenSend, request);
    }
    CHECK(reason == "STATUS_TABLE_FULL");
    CHECK(open == kFewTransfers + 1);
    std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
    std::vector<std::unique_ptr<grpc::ClientReader<v1::WatchResponse>>> watches;
    v1::WatchResponse response;
    grpc::Status last;
    for (int i = 0; i < 5; ++i) {
      contexts.push_back(std::make_unique<grpc::ClientContext>());
      hoarder->authenticate(*contexts.back());
      contexts.back()->set_deadline(std::chrono::system_clock::now() + kPatience);
      watches.push_back(hoarder->stub->Watch(contexts.back().get(), v1::WatchRequest()));
      if (!watches.back()->Read(&response)) last = watches.back()->Finish();
    }
    CHECK(last.error_message().find("TOO_MANY_WATCHES") != std::string::npos);
    for (auto& context : contexts) context->TryCancel();
    for (std::size_t i = 0; i + 1 < watches.size(); ++i) {
      while (watches[i]->Read(&response)) {
      }
      (void)watches[i]->Finish();
    }
    s.honest().require_more();
  }
  SECTION("what the workers of a socket may hold together") {
    const std::string crowd = crowd_socket();
    auto hoarder = attached(crowd, "hoarder");
    const auto neighbour = attached(crowd, "neighbour");
    const UniqueFd small = good_pool(64 << 10);
    const UniqueFd large = good_pool(2 << 20);
    const auto add = [](client::Connection& worker, const std::string& name, const UniqueFd& pool,
                        uint64_t bytes) {
      const auto sent = send_pool(worker, name, pool.get(), bytes);
      return sent ? refused(worker, &Stub::RegisterPools, bad_input::pools_request({{name, bytes}}))
                  : sent.error().reason;
    };
    const auto forget = [](client::Connection& worker, const std::string& name) {
      v1::UnregisterRequest request;
      request.mutable_pools()->add_names(name);
      CHECK(good(worker, &Stub::Unregister, request).existed());
    };
    CHECK(add(*hoarder, "large", large, 2 << 20) == "");
    CHECK(add(*neighbour, "small", small, 64 << 10) == "SOCKET_LIMIT");  // bytes
    forget(*hoarder, "large");
    for (const char* name : {"a", "b", "c"}) CHECK(add(*hoarder, name, small, 64 << 10) == "");
    CHECK(add(*neighbour, "small", small, 64 << 10) == "");
    CHECK(add(*neighbour, "more", small, 64 << 10) == "SOCKET_LIMIT");  // pools
    CHECK(send_pool(*hoarder, "d", small.get(), 64 << 10));
    CHECK(send_pool(*neighbour, "d", small.get(), 64 << 10).error().reason == "SOCKET_LIMIT");
    for (const char* name : {"a", "b", "c"}) forget(*hoarder, name);

    forget(*neighbour, "small");

    const UniqueFd pool = good_pool(bad_input::kPoolBytes);
    for (client::Connection* worker : {hoarder.get(), neighbour.get()}) {
      REQUIRE(add(*worker, bad_input::kPool, pool, bad_input::kPoolBytes) == "");
      good(*worker, &Stub::RegisterLayout,
           bad_input::layout_request(worker == hoarder.get() ? "hoarder" : "neighbour"));
    }
    const auto name_of = [&](const client::Connection& worker) {
      return &worker == hoarder.get() ? "hoarder" : "neighbour";
    };
    const auto ticket = [&](const client::Connection& worker) {
      v1::GetTicketRequest request;
      request.set_instance(name_of(worker));
      return good(worker, &Stub::GetTicket, request).ticket();
    };
    const auto open = [&](client::Connection& worker, uint64_t handle) {
      v1::OpenSendRequest request = bad_input::good_open_send();
      request.mutable_layout()->set_instance(name_of(worker));
      request.mutable_transfer()->set_instance(name_of(worker));
      request.set_client_handle(handle);
      request.mutable_transfer()->set_transfer_id("t" + std::to_string(handle));
      return refused(worker, &Stub::OpenSend, request);
    };
    for (uint64_t handle = 1; handle <= 5; ++handle) CHECK(open(*hoarder, handle) == "");
    CHECK(open(*hoarder, 6) == "SOCKET_LIMIT");
    CHECK(open(*neighbour, 7) == "SOCKET_LIMIT");
    const auto claim = [&](client::Connection& worker, int number) {
      v1::ClaimRequest request = bad_input::good_claim(ticket(worker));
      request.mutable_layout()->set_instance(name_of(worker));
      request.mutable_transfer()->set_instance(name_of(worker));
      request.mutable_transfer()->set_transfer_id("claimed" + std::to_string(number));
      return refused(worker, &Stub::Claim, request);
    };
    for (int number = 1; number <= 3; ++number) CHECK(claim(*hoarder, number) == "");
    CHECK(claim(*hoarder, 4) == "SOCKET_LIMIT");
    CHECK(claim(*neighbour, 5) == "SOCKET_LIMIT");
    const auto reserve = [&](client::Connection& worker, int number) {
      v1::ReserveRequest request = bad_input::good_reserve(ticket(worker));
      request.mutable_layout()->set_instance(name_of(worker));
      request.mutable_transfer()->set_instance(name_of(worker));
      request.mutable_transfer()->set_transfer_id("reserved" + std::to_string(number));
      return refused(worker, &Stub::Reserve, request);
    };
    for (int number = 1; number <= 2; ++number) CHECK(reserve(*hoarder, number) == "");
    CHECK(reserve(*hoarder, 3) == "SOCKET_LIMIT");
    CHECK(reserve(*neighbour, 4) == "SOCKET_LIMIT");
    const auto third = attached(crowd, "third");
    CHECK(attach(crowd, "fourth").error().reason == "TOO_MANY_WORKERS");
    s.honest().require_more();
    // All that the hoarder held, others may have when it has gone.
    hoarder.reset();
    CHECK(comes_true([&] { return open(*neighbour, 7) == ""; }));
    CHECK(comes_true([&] { return reserve(*neighbour, 4) == ""; }));
    for (const char* name : {"a", "b", "c"}) CHECK(add(*neighbour, name, small, 64 << 10) == "");
    s.honest().require_more();
  }
  SECTION("calls, as fast as they can be made") {
    const auto hoarder = attached(s.daemon(0).socket(), "hoarder");
    const uint64_t before = s.honest().done();
    std::vector<std::thread> threads;
    std::atomic<bool> over{false};
    std::atomic<uint64_t> calls{0};
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&] {
        while (!over.load()) {
          (void)hoarder->call(&Stub::Cancel, with_handle<v1::CancelRequest>(1), kPatience);
          calls.fetch_add(1);
        }
      });
    const bool goes_on = comes_true([&] { return s.honest().done() >= before + 3; }, kPatience * 2);
    over.store(true);
    for (std::thread& thread : threads) thread.join();
    CHECK(goes_on);
    CHECK(calls.load() > 0);
    s.honest().require_more();
  }
  s.require_nothing_left();
}

TEST_CASE("a daemon takes all the descriptors that it may have") {
  for (const int side : {0, 1}) {
    std::ifstream limits("/proc/" + std::to_string(hostile_scene().daemon(side).pid()) + "/limits");
    std::string line, soft, hard;
    while (std::getline(limits, line) && !line.starts_with("Max open files")) {
    }
    std::istringstream(line.substr(14)) >> soft >> hard;
    // Else there is nothing to take.
    REQUIRE(hard != std::to_string(kFewDescriptors));
    CHECK(soft == hard);
  }
}

}  // namespace kvferry::testing
