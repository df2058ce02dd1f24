#include "tests/proc/bad_input_subject.h"

#include <fcntl.h>
#include <google/protobuf/descriptor.h>
#include <grpcpp/generic/generic_stub.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <future>

namespace kvferry::bad_input {
namespace {

using Stub = v1::WorkerService::Stub;
using std::chrono::seconds;

constexpr seconds kPatience{20};

template <typename Condition>
bool wait_until(Condition&& condition) {
  const auto limit = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > limit) return false;
    ::poll(nullptr, 0, 5);  // between two questions
  }
  return true;
}

template <typename Request, typename Response>
Response ask(v1::Admin::Stub& admin,
             grpc::Status (v1::Admin::Stub::*method)(grpc::ClientContext*, const Request&,
                                                     Response*)) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  Response response;
  const grpc::Status status = (admin.*method)(&context, Request(), &response);
  INFO(status.error_message());
  REQUIRE(status.ok());
  return response;
}

}  // namespace

UniqueFd make_pool(uint64_t bytes, int seals, bool allocate) {
  UniqueFd fd(::memfd_create("kvferry-bad-input", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0);
  if (allocate) REQUIRE(::fallocate(fd.get(), 0, 0, static_cast<off_t>(bytes)) == 0);
  if (seals != 0) REQUIRE(::fcntl(fd.get(), F_ADD_SEALS, seals) == 0);
  return fd;
}

UniqueFd good_pool(uint64_t bytes) {
  return make_pool(bytes, F_SEAL_SHRINK | F_SEAL_GROW);
}

v1::RegisterPoolsRequest pools_request(const std::vector<std::pair<std::string, uint64_t>>& pools) {
  v1::RegisterPoolsRequest request;
  for (const auto& [name, bytes] : pools) {
    v1::PoolSpec& pool = *request.add_pools();
    pool.set_name(name);
    pool.set_kind(v1::POOL_KIND_HOST_SHM);
    pool.set_bytes(bytes);
  }
  return request;
}

v1::RegisterLayoutRequest layout_request(const std::string& instance) {
  v1::RegisterLayoutRequest request;
  request.set_instance(instance);
  request.set_reuse_hash_scheme("sha256");
  *request.mutable_layout() = good_layout();
  return request;
}

// ---- the daemon --------------------------------------------------------------------------------

void Subject::expect(bool ok, const std::function<std::string()>& message) {
  if (!ok) FAIL(message());
}

Subject::Subject() {
  char directory[] = "/tmp/kvferry-bad-input.XXXXXX";
  REQUIRE(::mkdtemp(directory) != nullptr);
  directory_ = directory;
  bench::DaemonOptions options;
  options.binary_directory = KVFERRY_BIN_DIR;
  options.settings = {"arena.bytes=16MiB", "arena.segment_bytes=16MiB", "gpu.enabled=off"};
  auto daemon = bench::DaemonProcess::start(directory_, {"subject", 0, "nobody", 9}, options);
  expect(daemon.ok(), [&] { return daemon.error().to_string(); });
  daemon_ = std::move(*daemon);
  const client::Status serving = daemon_->wait_until_serving();
  expect(serving.ok(), [&] { return serving.error().to_string(); });
  grpc::ChannelArguments arguments;
  arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "localhost");
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  admin_ = v1::Admin::NewStub(grpc::CreateCustomChannel(
      "unix:" + daemon_->admin_socket(), grpc::InsecureChannelCredentials(), arguments));
  worker_ = attach("bad-input");
  register_all();
}

Subject::~Subject() {
  worker_.reset();
  daemon_.reset();
  std::error_code error;
  std::filesystem::remove_all(directory_, error);
}

void Subject::register_all() {
  const UniqueFd pool = good_pool(kPoolBytes);
  const auto sent = worker_->attachment->send_pools(
      std::vector<client::PoolToSend>{
          {kPool, lifeline::PoolKind::kHostShm, kPoolBytes, pool.get()}},
      std::chrono::steady_clock::now() + kPatience);
  expect(sent.ok(), [&] { return sent.error().to_string(); });
  good(&Stub::RegisterPools, pools_request({{kPool, kPoolBytes}}));
  card_ = good(&Stub::RegisterLayout, layout_request(kInstance)).card();
  v1::RegisterLayoutRequest wide = layout_request(kWideInstance);
  wide.mutable_layout()->mutable_topology()->set_rank_count(2);
  wide_card_ = good(&Stub::RegisterLayout, wide).card();
  v1::GetTicketRequest ticket;
  ticket.set_instance(kInstance);
  ticket_ = good(&Stub::GetTicket, ticket).ticket();
  v1::OpenSendRequest open = good_open_send();
  open.set_client_handle(kOpenHandle);
  open.mutable_transfer()->set_transfer_id("open");
  open.set_lease_ms(600'000);
  good(&Stub::OpenSend, open);
}

std::unique_ptr<client::Connection> Subject::attach(const std::string& name,
                                                    client::WorkerRole role) {
  client::AttachOptions options;
  options.socket = daemon_->socket();
  options.name = name;
  options.role = role;
  options.attach_timeout = kPatience;
  auto attachment = client::Attachment::connect(options);
  expect(attachment.ok(), [&] { return attachment.error().to_string(); });
  return std::make_unique<client::Connection>(std::move(*attachment));
}

std::string Subject::state() {
  auto workers = ask(*admin_, &v1::Admin::Stub::ListWorkers);
  for (v1::Worker& worker : *workers.mutable_workers()) worker.clear_age();
  auto transfers = ask(*admin_, &v1::Admin::Stub::ListTransfers);
  for (v1::TransferPart& part : *transfers.mutable_transfers()) part.clear_age();
  const auto arenas = ask(*admin_, &v1::Admin::Stub::ListArenas);
  return workers.DebugString() + transfers.DebugString() + arenas.DebugString();
}

bool Subject::state_becomes(const std::string& wanted) {
  return wait_until([&] { return state() == wanted; });
}

std::size_t Subject::descriptors() const {
  std::size_t count = 0;
  const std::string path = "/proc/" + std::to_string(daemon_->pid()) + "/fd";
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path)) ++count;
  return count;
}

bool Subject::descriptors_become(std::size_t wanted) const {
  return wait_until([&] { return descriptors() == wanted; });
}

v1::OperationResult Subject::submit(v1::Operation operation) {
  grpc::ClientContext context;
  worker_->authenticate(context);
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  auto stream = worker_->stub->Submit(&context);
  v1::SubmitRequest request;
  *request.add_operations() = std::move(operation);
  v1::SubmitResponse response;
  const bool answered = stream->Write(request) && stream->Read(&response);
  stream->WritesDone();
  v1::SubmitResponse more;
  while (stream->Read(&more)) {
  }
  const grpc::Status status = stream->Finish();
  INFO(status.error_message());
  REQUIRE(answered);
  REQUIRE(status.ok());
  REQUIRE(response.results_size() == 1);
  return response.results(0);
}

// ---- tables ------------------------------------------------------------------------------------

void Calls::cover(const std::string& method, const google::protobuf::Message& good,
                  const google::protobuf::Message& spoiled) {
  covered_[method].merge(changed_fields(good, spoiled));
}

void Calls::compare(const std::string& name, const google::protobuf::Descriptor& type, Code code,
                    const std::string& reason, const std::string& field,
                    const client::Error& error) {
  INFO(name << ": " << error.to_string());
  CHECK(static_cast<int>(error.code) == static_cast<int>(code));
  CHECK(error.reason == reason);
  CHECK(error.field == field);
  CHECK_FALSE(error.message.empty());
  if (!field.empty()) CHECK(names_a_field(type, field));
  const std::string now = subject_.state();
  CHECK(now == state_);
  state_ = now;  // each change is told once
}

void Calls::refuse_operation(const std::string& name, const v1::Operation& operation,
                             const google::protobuf::Descriptor& type, Code code,
                             const std::string& reason, const std::string& field) {
  const v1::OperationResult result = subject_.submit(operation);
  INFO(name);
  CHECK(result.op_id() == operation.op_id());
  CHECK(result.outcome() == v1::OPERATION_OUTCOME_REJECTED);
  compare(name, type, code, reason, field, client::decode(result.error()));
  const auto* kind = v1::Operation::descriptor()->FindFieldByNumber(operation.kind_case());
  if (kind != nullptr) operations_.insert(kind->name());
}

void Calls::exempt(const std::string& method, const std::vector<Exempt>& fields) {
  for (const Exempt& field : fields) covered_[method].insert(field.field);
}

void Calls::check_complete() const {
  const google::protobuf::ServiceDescriptor* service = &worker_service();
  for (int i = 0; i < service->method_count(); ++i) {
    const auto& method = *service->method(i);
    // The stream carries the unary calls' requests, each of which is counted with its call.
    if (method.name() == "Submit") continue;
    INFO(method.name() << " was not tried");
    REQUIRE(covered_.contains(method.name()));
    for (const std::string& field : leaf_fields(*method.input_type())) {
      INFO(method.name() << "." << field << " has no row and is not exempt");
      CHECK(covered_.at(method.name()).contains(field));
    }
  }
  const auto* kinds = v1::Operation::descriptor()->FindOneofByName("kind");
  for (int i = 0; i < kinds->field_count(); ++i) {
    INFO(kinds->field(i)->name() << " was not tried on the stream");
    CHECK(operations_.contains(kinds->field(i)->name()));
  }
}

const google::protobuf::ServiceDescriptor& worker_service() {
  return *v1::Operation::descriptor()->file()->FindServiceByName("WorkerService");
}

RawAnswer call_raw(const client::Connection& connection, const std::string& method,
                   const std::string* token, const std::string& body) {
  grpc::GenericStub stub(connection.channel);
  grpc::ClientContext context;
  if (token != nullptr) context.AddMetadata("kvferry-token-bin", *token);
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  const grpc::Slice slice(body);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  std::promise<grpc::Status> ended;
  stub.UnaryCall(&context, "/kvferry.v1.WorkerService/" + method, grpc::StubOptions(), &request,
                 &response, [&](grpc::Status status) { ended.set_value(std::move(status)); });
  RawAnswer answer;
  answer.status = ended.get_future().get();
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto it = metadata.find("kvferry-error-bin");
  if (it != metadata.end())
    (void)answer.detail.ParseFromArray(it->second.data(), static_cast<int>(it->second.size()));
  return answer;
}

}  // namespace kvferry::bad_input
