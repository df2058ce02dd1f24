// One real daemon with a worker that has a pool, two registered ranks and an open transfer: what
// wrong calls must leave as it is. Errors of its own set-up fail the test.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "client/bench/daemons.h"
#include "client/cpp/src/connection.h"
#include "daemon/base/unique_fd.h"
#include "kvferry/v1/admin.grpc.pb.h"
#include "tests/proc/bad_input_fields.h"
#include "tests/proc/bad_input_rows.h"

namespace kvferry::bad_input {

inline constexpr char kWideInstance[] = "bad-input-wide";  // rank 0 of 2 is registered
inline constexpr uint64_t kOpenHandle = 1;                 // an OpenSend of kInstance

// A memfd that a daemon takes, of `bytes`, unless `seals` and `allocate` say otherwise.
UniqueFd make_pool(uint64_t bytes, int seals, bool allocate = true);
UniqueFd good_pool(uint64_t bytes);

v1::RegisterPoolsRequest pools_request(const std::vector<std::pair<std::string, uint64_t>>& pools);
v1::RegisterLayoutRequest layout_request(const std::string& instance);

class Subject {
 public:
  Subject();
  ~Subject();
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  const bench::DaemonProcess& daemon() const { return *daemon_; }
  const client::Connection& worker() const { return *worker_; }
  std::unique_ptr<client::Connection> attach(const std::string& name,
                                             client::WorkerRole role = client::WorkerRole::kRank);
  const std::string& directory() const { return directory_; }

  // All that operators see of workers, transfers and arenas, without ages.
  std::string state();
  // Waits for an end that the daemon learns of by itself; false after 20 s.
  bool state_becomes(const std::string& wanted);
  std::size_t descriptors() const;  // that the daemon has open
  bool descriptors_become(std::size_t wanted) const;

  const std::string& ticket() const { return ticket_; }
  const std::string& card() const { return card_; }
  const std::string& wide_card() const { return wide_card_; }

  // A call that must succeed.
  template <typename Request, typename Response>
  Response good(grpc::Status (v1::WorkerService::Stub::*method)(grpc::ClientContext*,
                                                                const Request&, Response*),
                const Request& request) {
    auto response = worker_->call(method, request, std::chrono::seconds(20));
    expect(response.ok(), [&] { return response.error().to_string(); });
    return std::move(*response);
  }
  // One operation on a stream of the worker's own.
  v1::OperationResult submit(v1::Operation operation);

 private:
  static void expect(bool ok, const std::function<std::string()>& message);
  void register_all();

  std::string directory_;
  std::unique_ptr<bench::DaemonProcess> daemon_;
  std::unique_ptr<v1::Admin::Stub> admin_;
  std::unique_ptr<client::Connection> worker_;
  std::string ticket_;
  std::string card_;
  std::string wide_card_;
};

// Runs rows against the daemon, and counts which fields of which calls they change.
class Calls {
 public:
  explicit Calls(Subject& subject) : subject_(subject), state_(subject.state()) {}

  // Every row is refused with its error, and the daemon's state stays as it is.
  template <typename Request, typename Response>
  void refuse(const std::string& method,
              grpc::Status (v1::WorkerService::Stub::*call)(grpc::ClientContext*, const Request&,
                                                            Response*),
              const Request& good, const Rows<Request>& rows) {
    for (const Row<Request>& row : rows) {
      Request spoiled = good;
      row.spoil(spoiled);
      cover(method, good, spoiled);
      auto response = subject_.worker().call(call, spoiled, std::chrono::seconds(20));
      compare(method + ", " + row.name, *Request::descriptor(), row.code, row.reason, row.field,
              response ? client::Error{client::Code::kOk, {}, {}, {}, {}} : response.error());
    }
  }

  // The same by the unary call and by the stream. `put` writes the request into an operation.
  template <typename Request, typename Response>
  void refuse_twice(const std::string& method,
                    grpc::Status (v1::WorkerService::Stub::*call)(grpc::ClientContext*,
                                                                  const Request&, Response*),
                    Request* (v1::Operation::*put)(), const Request& good,
                    const Rows<Request>& rows) {
    refuse(method, call, good, rows);
    for (const Row<Request>& row : rows) {
      v1::Operation operation;
      operation.set_op_id(17);
      Request& spoiled = *(operation.*put)();
      spoiled = good;
      row.spoil(spoiled);
      refuse_operation(method + " on the stream, " + row.name, operation, *Request::descriptor(),
                       row.code, row.reason, row.field);
    }
  }
  void refuse_operation(const std::string& name, const v1::Operation& operation,
                        const google::protobuf::Descriptor& type, Code code,
                        const std::string& reason, const std::string& field);

  // One call outside the tables, with its error.
  void compare(const std::string& name, const google::protobuf::Descriptor& type, Code code,
               const std::string& reason, const std::string& field, const client::Error& error);

  void exempt(const std::string& method, const std::vector<Exempt>& fields);
  // All calls of the service were tried, and every field of each request.
  void check_complete() const;

 private:
  void cover(const std::string& method, const google::protobuf::Message& good,
             const google::protobuf::Message& spoiled);

  Subject& subject_;
  std::string state_;                     // that calls leave as it is
  std::map<std::string, Paths> covered_;  // by method
  std::set<std::string> operations_;      // that went over the stream
};

// The workers' service as the contract has it.
const google::protobuf::ServiceDescriptor& worker_service();

// A unary call with any bytes in it, and with any token or none.
struct RawAnswer {
  grpc::Status status;
  v1::ErrorDetail detail;
};
RawAnswer call_raw(const client::Connection& connection, const std::string& method,
                   const std::string* token, const std::string& body);

}  // namespace kvferry::bad_input
